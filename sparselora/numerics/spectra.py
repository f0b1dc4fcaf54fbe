"""The spectrum of a weight, and what it says about the weight: ranks, tails, and how far it is from random.

The spectrum is taken from the Gram matrix of W's small side, in float64. For float32 weights that is exact to 1e-8 of
the largest singular value at a fifth of the cost of an SVD; where it is not enough, a float64 SVD takes its place.

Definitions that WeightWatcher also has (stable rank, entropy, matrix rank, power-law alpha) agree with its 0.7.7, in
its words: ``norm`` ‖W‖²_F, ``spectral_norm`` s₁². Where ours differs the function says so.

The Lanczos method for one largest eigenvalue is our own: scipy.sparse.linalg.eigsh takes 25 ms at size 1,024 where it
takes 15.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, lapack, svdvals
from threadpoolctl import ThreadpoolController

from sparselora.errors import InputError

Array = NDArray[np.floating]

METHODS = ("gram64", "svd", "randomized")
_EPS = float(np.finfo(np.float64).eps)
_UNRESOLVED = 1e-12  # λ_min/λ_max below which a Gram matrix no longer tells s_min from rounding
_BLOCK = 1 << 19  # elements converted to float64 at a time
_FEWEST_FOR_ALPHA = 20
_ONE_THREAD_BELOW = 1024


def blas_threads(size: int) -> AbstractContextManager[object]:
    """One BLAS thread within the block if the matrices in it are small, the process's setting otherwise.

    Below size 1024 a second thread gains a tenth on an idle machine, and costs a factor of 20 on a busy one, where
    the threads of every small call wait for each other.
    """
    return _controller().limit(limits=1, user_api="blas") if single_threaded(size) else nullcontext()


def single_threaded(size: int) -> bool:
    """Return whether `blas_threads` limits matrices of this size to one thread."""
    return size < _ONE_THREAD_BELOW


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


# --- Gram matrix --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gram:
    """The Gram matrix of W's small side, and the energy of each column and row of W; all float64.

    ``G`` is WᵀW ``(d_in, d_in)`` if ``of_columns`` (d_out ≥ d_in), else WWᵀ ``(d_out, d_out)``.
    """

    G: Array
    of_columns: bool
    column_energy: Array
    row_energy: Array

    @property
    def total(self) -> float:
        """‖W‖²_F."""
        return float(np.trace(self.G))


def gram(W: Array) -> Gram:
    """Gram matrix of the small side of ``W (d_out, d_in)``, converted to float64 a block at a time."""
    tall = W if W.shape[0] >= W.shape[1] else W.T
    long, short = tall.shape
    G, energy = np.zeros((short, short)), np.empty(long)
    step = max(1, _BLOCK // short)
    with blas_threads(short):
        for start in range(0, long, step):
            block = np.asarray(tall[start : start + step], dtype=np.float64)
            G += block.T @ block
            energy[start : start + step] = np.einsum("ij,ij->i", block, block)
    diagonal = np.diagonal(G).copy()
    of_columns = tall is W
    return Gram(G, of_columns, diagonal if of_columns else energy, energy if of_columns else diagonal)


def eigen(G: Array, k: int) -> tuple[Array, Array]:
    """All eigenvalues of a symmetric positive semi-definite matrix, and its top eigenvectors, from one reduction.

    Reducing to tridiagonal form is nearly all the work; the eigenvalues and a few eigenvectors of that form are cheap.

    Args:
        G: ``(r, r)`` float64; k: how many eigenvectors, 0..r.
    Returns:
        Eigenvalues ``(r,)`` descending, none negative, and eigenvectors ``(r, k)`` in the same order.
    """
    r = len(G)
    if r == 1:
        return np.maximum(G[0], 0.0), np.ones((1, k))
    work = int(lapack.dsytrd_lwork(r, lower=1)[0])
    reflectors, diagonal, off, tau, info = lapack.dsytrd(G, lower=1, lwork=work)
    if info:
        raise np.linalg.LinAlgError("reduction to tridiagonal form failed")
    ascending, info = lapack.dsterf(diagonal, off)
    if info:
        raise np.linalg.LinAlgError("the tridiagonal eigenvalue problem did not converge")
    values = np.maximum(ascending[::-1], 0.0)
    if k == 0:
        return values, np.zeros((r, 0))
    Z = _tridiagonal_vectors(diagonal, off, ascending, k)
    # Q is 1 ⊕ the product of the reflectors below the subdiagonal, which is QR's own storage one row down.
    V = Z[:, ::-1].copy(order="F")
    vectors, _, info = lapack.dormqr("L", "N", reflectors[1:, :-1], tau, V[1:], max(64 * k, 1))
    if info:
        raise np.linalg.LinAlgError("applying the reflectors failed")
    V[1:] = vectors
    return values, V


def _tridiagonal_vectors(diagonal: Array, off: Array, values: Array, k: int) -> Array:
    """Eigenvectors ``(r, k)`` of the k largest of the ascending ``values (r,)``, by inverse iteration.

    LAPACK's routine itself: at these sizes scipy's eigh_tridiagonal would find the values once more. It is left the
    matrices that fall into blocks, whose values inverse iteration would have to be separated by block.
    """
    r = len(diagonal)
    whole, failed = bool(np.abs(off).min() > r * _EPS * values[-1]), 0
    if whole:
        one_block = np.zeros(r, dtype=np.int32)
        one_block[0] = r
        Z, failed = lapack.dstein(diagonal, off, values[r - k :], np.ones(r, dtype=np.int32), one_block)
    if not whole or failed:
        _, Z = eigh_tridiagonal(diagonal, off, select="i", select_range=(r - k, r - 1), check_finite=False)
    return np.asarray(Z)


# --- spectrum -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one weight and how they were found.

    Attributes:
        s: descending, float64; all min(n, m) of them if ``complete``, else the largest.
        method: gram64, svd or randomized.
        error_bound: upper bound on |ŝ_i − s_i| / s₁ over the values in ``s``.
        total: ‖W‖²_F, exact whatever the method.
    """

    s: Array
    method: str
    error_bound: float
    total: float
    complete: bool


def from_gram(W: Array, gram_matrix: Gram, eigenvalues: Array, method: str = "gram64") -> Spectrum:
    """The spectrum of W from the eigenvalues of its Gram matrix, or by SVD if these cannot tell its small end.

    ``method="gram64"`` falls back to a float64 values-only SVD where λ_min < 1e-12·λ_max: rank, s_min and condition
    would be rounding. ``"svd"`` asks for it at once.
    """
    top = eigenvalues[0]
    if method == "gram64" and (top == 0 or eigenvalues[-1] >= _UNRESOLVED * top):
        s = np.sqrt(eigenvalues)
        # Weyl: every λ is off by at most δ, so √λ by at most min(√δ, δ/√λ).
        delta = len(s) * _EPS * gram_matrix.total
        worst = min(float(np.sqrt(delta)), delta / float(s[-1])) / float(s[0]) if top else 0.0
        return Spectrum(s, "gram64", worst, gram_matrix.total, True)
    s = svdvals(np.asarray(W, dtype=np.float64), overwrite_a=True, check_finite=False)
    return Spectrum(s, "svd", max(W.shape) * _EPS, gram_matrix.total, True)


def spectrum(W: Array, method: str = "gram64") -> Spectrum:
    """Singular values of ``W (d_out, d_in)`` by one of `METHODS` but randomized, for callers that want no vectors."""
    if method not in ("gram64", "svd"):
        raise InputError(f"unknown spectrum method {method!r}; use gram64 or svd")
    gram_matrix = gram(W)
    return from_gram(W, gram_matrix, eigen(gram_matrix.G, 0)[0], method)


def randomized_spectrum(
    W: Array, k: int, rng: np.random.Generator, oversample: int = 10, power_iterations: int = 2
) -> tuple[Spectrum, Array, Array]:
    """The k largest singular triplets by a randomised range finder (Halko, Martinsson and Tropp, 2011).

    Its own error is measured: with Q the basis found and ρ² = ‖W‖²_F − ‖QᵀW‖²_F, each ŝ_i ≤ s_i ≤ √(ŝ_i² + ρ²). On the
    flat spectra of weights that bound is wide, and so may be the error: no source of metrics, a look at huge layers.

    Returns:
        The spectrum (not ``complete``), ``U (d_out, k)`` and ``Vt (k, d_in)``.
    """
    n, m = W.shape
    if not 1 <= k <= min(n, m):
        raise InputError(f"rank must be between 1 and {min(n, m)}, got {k}")
    width = min(k + oversample, n, m)
    Q = np.linalg.qr(W @ rng.standard_normal((m, width)).astype(W.dtype))[0]
    for _ in range(power_iterations):
        Q = np.linalg.qr(W @ np.linalg.qr(W.T @ Q)[0])[0]
    # The last steps in float64, so that ρ is not rounding.
    Q = np.linalg.qr(Q.astype(np.float64))[0]
    B, total = np.zeros((width, m)), 0.0
    step = max(1, _BLOCK // m)
    for start in range(0, n, step):
        block = np.asarray(W[start : start + step], dtype=np.float64)
        B += Q[start : start + step].T @ block
        total += float(np.einsum("ij,ij->", block, block))
    U, s, Vt = np.linalg.svd(B, full_matrices=False)
    missed = max(0.0, total - float(np.sum(s**2)))
    gap = np.sqrt(s[:k] ** 2 + missed) - s[:k]
    bound = float(gap.max() / s[0]) if s[0] > 0 else 0.0
    return Spectrum(s[:k], "randomized", bound, total, k == min(n, m)), Q @ U[:, :k], Vt[:k]


# --- what a spectrum says -----------------------------------------------------------------------------------------


def stable_rank(s: Array) -> float:
    """‖W‖²_F / s₁², between 1 and the rank; 0 for a zero matrix."""
    return float(np.sum(s**2) / s[0] ** 2) if s[0] > 0 else 0.0


def matrix_rank(s: Array, longest: int) -> int:
    """Values above s₁·longest·ε (numpy's rule, ε of float64), ``longest`` the larger side of W."""
    return int(np.count_nonzero(s > s[0] * longest * _EPS))


def _entropy(s: Array) -> float:
    """−Σ p ln p in nats with p_i = s_i² / Σ s²; 0 for a zero matrix."""
    energy = np.asarray(s, dtype=np.float64) ** 2
    total = energy.sum()
    p = energy[energy > 0] / total if total > 0 else np.ones(1)
    return float(-np.sum(p * np.log(p)))


def effective_rank(s: Array) -> float:
    """exp of the entropy of the energies: how many equal singular values would be as spread out; 1 for rank one.

    Over the energies p ∝ s², as WeightWatcher's entropy; Roy and Vetterli (2007) take p ∝ s, which gives more.
    """
    return float(np.exp(_entropy(s))) if s[0] > 0 else 0.0


def relative_entropy(s: Array, longest: int) -> float:
    """Entropy over ln(matrix rank), WeightWatcher's ``entropy``: 1 for a flat spectrum; NaN below rank two."""
    rank = matrix_rank(s, longest)
    return _entropy(s) / float(np.log(rank)) if rank > 1 else float("nan")


def condition(s: Array) -> float:
    """s_max / s_min; inf for a singular matrix, NaN for a zero one."""
    if s[0] == 0:
        return float("nan")
    return float(s[0] / s[-1]) if s[-1] > 0 else float("inf")


@dataclass(frozen=True)
class PowerLaw:
    """Tail exponent of the eigenvalues s², where the tail begins, its Kolmogorov–Smirnov distance and its size."""

    alpha: float
    x_min: float
    distance: float
    n_tail: int


def power_law(s: Array, block: int = 64) -> PowerLaw:
    """Fit p(x) ∝ x^−alpha, x ≥ x_min, to the eigenvalues x = s²: maximum likelihood for alpha, x_min of least distance.

    The estimator of Clauset, Shalizi and Newman (2009), as WeightWatcher applies it by default, with every x_min tried
    at once. Values below 1e-12 of the largest are left out (WeightWatcher: below 1e-5, which depends on W's scale).
    With fewer than 20 values left the fit means nothing and all is NaN (WeightWatcher switches estimator there).
    """
    x = np.sort(np.asarray(s, dtype=np.float64) ** 2)
    x = x[x > _UNRESOLVED * x[-1]]
    count = len(x)
    if count < _FEWEST_FOR_ALPHA or x[0] == x[-1]:
        return PowerLaw(float("nan"), float("nan"), float("nan"), 0)
    logs = np.log(x)
    n = np.arange(count, 1, -1, dtype=np.float64)
    above = np.cumsum(logs[::-1])[::-1][:-1] - n * logs[:-1]  # Σ_{j≥i} ln(x_j / x_i)
    alphas = 1 + np.divide(n, above, out=np.zeros_like(n), where=above > 0)
    distances = np.ones(count - 1)
    for start in range(0, count - 1, block):
        stop = min(start + block, count - 1)
        i = np.arange(start, stop)[:, None]
        j = np.arange(start, count)
        model = 1 - np.exp((1 - alphas[start:stop, None]) * (logs[j] - logs[i]))
        gap = np.abs(model - (j - i) / n[start:stop, None])
        gap[j < i] = 0.0
        distances[start:stop] = np.where(alphas[start:stop] > 1, gap.max(axis=1), 1.0)
    best = int(np.argmin(distances))
    return PowerLaw(float(alphas[best]), float(x[best]), float(distances[best]), count - best)


@dataclass(frozen=True)
class Bulk:
    """Upper end of the eigenvalues s² of a random matrix, and the number that lie beyond it.

    Attributes:
        edge: upper end of the Marchenko–Pastur law, in units of s².
        sigma: standard deviation of the entries that would explain the middle of the spectrum.
        spikes: eigenvalues beyond ``threshold``, which adds the edge's own fluctuation (Tracy–Widom, 99 %).
        threshold: ``edge`` and that.
    """

    edge: float
    sigma: float
    spikes: int
    threshold: float


_TRACY_WIDOM_99 = 2.0234  # 99th percentile of the Tracy–Widom law, β = 1


def marchenko_pastur(s: Array, n: int, m: int) -> Bulk:
    """Fit a Marchenko–Pastur law to all eigenvalues s² of an ``(n, m)`` matrix by its median, and count the spikes.

    The median hardly moves with the spikes one wants to count (Gavish and Donoho, 2014). WeightWatcher fits a kernel
    density instead, which depends on a bandwidth: its ``num_spikes`` and ``sigma_mp`` are other figures than these.
    """
    short, long = min(n, m), max(n, m)
    x = np.asarray(s, dtype=np.float64) ** 2
    variance = float(np.median(x)) / (long * _marchenko_pastur_median(short / long))
    root = np.sqrt(long) + np.sqrt(short)
    edge = variance * root**2
    # Johnstone's (2001) scale of the largest eigenvalue around the edge.
    scale = variance * root * (1 / np.sqrt(long) + 1 / np.sqrt(short)) ** (1 / 3)
    threshold = edge + _TRACY_WIDOM_99 * scale
    return Bulk(float(edge), float(np.sqrt(variance)), int(np.count_nonzero(x > threshold)), float(threshold))


@lru_cache(maxsize=256)
def _marchenko_pastur_median(ratio: float) -> float:
    """Median of the Marchenko–Pastur law of unit variance with aspect ratio in (0, 1]."""
    low, high = (1 - np.sqrt(ratio)) ** 2, (1 + np.sqrt(ratio)) ** 2
    # x = middle − half·cos θ takes the square-root ends out of the density.
    theta = (np.arange(4096) + 0.5) * np.pi / 4096
    x = (low + high) / 2 - (high - low) / 2 * np.cos(theta)
    mass = np.cumsum(np.sin(theta) ** 2 / x)
    return float(np.interp(0.5, mass / mass[-1], x))


# --- the Gaussian null --------------------------------------------------------------------------------------------

NULL_DRAWS = 4


def gaussian_spectra(n: int, m: int, rng: np.random.Generator, draws: int = NULL_DRAWS) -> Array:
    """Singular values ``(draws, min(n, m))`` of n×m matrices of independent N(0, 1), drawn without the matrices.

    They have the law of a bidiagonal matrix of chi variables (Dumitriu and Edelman, 2002): O(r²) instead of O(nmr).
    """
    short, long = min(n, m), max(n, m)
    s = np.empty((draws, short))
    for draw in range(draws):
        d = np.sqrt(rng.chisquare(np.arange(long, long - short, -1)))
        e = np.sqrt(rng.chisquare(np.arange(short - 1, 0, -1))) if short > 1 else np.empty(0)
        # BBᵀ of the lower bidiagonal B is tridiagonal.
        diagonal = d**2
        diagonal[1:] += e**2
        values = eigvalsh_tridiagonal(diagonal, d[:-1] * e, lapack_driver="sterf") if short > 1 else diagonal
        s[draw] = np.sqrt(np.maximum(values[::-1], 0.0))
    return s


@lru_cache(maxsize=64)
def gaussian_energy(n: int, m: int, seed: int) -> Array:
    """Mean share of the energy in the top k of an n×m Gaussian matrix, k = 0..min(n, m); cached by shape and seed."""
    if n < m:
        return gaussian_energy(m, n, seed)
    s = gaussian_spectra(n, m, np.random.default_rng([seed, n, m]))
    energy = np.cumsum(s**2, axis=1) / np.sum(s**2, axis=1, keepdims=True)
    curve = np.concatenate([[0.0], energy.mean(axis=0)])
    curve.flags.writeable = False
    return curve


# --- largest eigenvalue -------------------------------------------------------------------------------------------


def largest_eigenvalue(A: Array, start: Array | None = None, tolerance: float = 1e-14) -> float:
    """Largest eigenvalue of a symmetric positive semi-definite ``A (r, r)`` by Lanczos with full reorthogonalisation.

    Stops when the square of the relative residual is below ``tolerance``, or after 300 products A·x with a lower bound.
    Usually a few dozen suffice, where an eigenvalue solver would reduce the whole matrix.

    Args:
        start: ``(r,)``, a guess of the eigenvector. A part of a generic vector is always mixed in.
    """
    r = len(A)
    if r == 0:
        return 0.0
    # A fixed, generic start: never orthogonal to the top eigenvector but by a coincidence of measure zero.
    generic = np.cos(np.arange(1.0, r + 1.0) ** 2)
    x = A @ (generic if start is None else generic * (0.1 * float(np.linalg.norm(start)) / np.sqrt(r)) + start)
    norm = float(np.linalg.norm(x))
    if norm == 0:
        return 0.0
    Q = np.empty((min(r, 300) + 1, r))
    Q[0] = x / norm
    alphas: list[float] = []
    betas: list[float] = []
    for step in range(len(Q) - 1):
        x = A @ Q[step]
        alphas.append(float(Q[step] @ x))
        for _ in range(2):  # once is not enough when the Krylov space is nearly exhausted
            x -= (Q[: step + 1] @ x) @ Q[: step + 1]
        beta = float(np.linalg.norm(x))
        last = step == len(Q) - 2 or beta <= 1e-14 * alphas[0]
        if last or (step > 8 and step % 8 == 7):
            value, end = _top_of_tridiagonal(np.array(alphas), np.array(betas))
            # The eigenvalue's error is quadratic in the residual.
            if last or (beta * end) ** 2 <= tolerance * value**2:
                return value
        betas.append(beta)
        Q[step + 1] = x / beta
    raise AssertionError("unreachable: the last step returns")


def _top_of_tridiagonal(diagonal: Array, off: Array) -> tuple[float, float]:
    """Largest eigenvalue of a symmetric tridiagonal matrix, and |last entry| of its eigenvector."""
    size = len(diagonal)
    if size == 1:
        return float(diagonal[0]), 1.0
    values, info = lapack.dsterf(diagonal, off)
    if info:
        raise np.linalg.LinAlgError("the tridiagonal eigenvalue problem did not converge")
    return float(values[-1]), abs(float(_tridiagonal_vectors(diagonal, off, values, 1)[-1, 0]))
