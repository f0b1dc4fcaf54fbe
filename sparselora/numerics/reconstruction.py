"""Approximations of a matrix and their errors, in closed form: nothing is reconstructed to measure an error.

Relative errors are ‖W − Ŵ‖_F / ‖W‖_F unless a name says ``spectral``. Index convention: ``tail[k]`` belongs to rank k,
so ``tail[0]`` is 1 (the zero approximation) and ``tail[r]`` is 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparselora.errors import InputError

Array = NDArray[np.floating]

_DEPENDENT = 1e-12  # energy of a direction against the largest, below which it counts as absent
_LARGE_FACTOR = 64 * 64  # elements of a triangular factor from which scipy's solve is worth its import


def relative_tail(s: Array) -> Array:
    """Best rank-k error for every k at once (Eckart–Young): ``tail[k] = sqrt(Σ_{i≥k} s_i²) / sqrt(Σ s_i²)``.

    Args:
        s: singular values in descending order, ``(..., r)``.
    Returns:
        ``(..., r + 1)``, descending from 1 to 0. All zeros for a zero matrix: nothing is left to approximate.
        Sums run from the smallest value up, so that small tails keep their digits.
    """
    energy = np.asarray(s, dtype=np.float64) ** 2
    tail = np.zeros((*energy.shape[:-1], energy.shape[-1] + 1))
    tail[..., :-1] = np.cumsum(energy[..., ::-1], axis=-1)[..., ::-1]
    total = tail[..., :1]
    return np.sqrt(np.divide(tail, total, out=np.zeros_like(tail), where=total > 0))


def spectral_tail(s: Array) -> Array:
    """Best rank-k error in the spectral norm for every k: ``s[k] / s[0]``, ``(..., r + 1)``; zeros if W is."""
    s = np.asarray(s, dtype=np.float64)
    tail = np.concatenate([s, np.zeros((*s.shape[:-1], 1))], axis=-1)
    top = tail[..., :1]
    return np.divide(tail, top, out=np.zeros_like(tail), where=top > 0)


def optimal_rank(s: Array, target_error: float) -> int:
    """Least k whose best rank-k error is below ``target_error``; ``s (r,)`` descending. 0 for a zero matrix.

    Raises:
        InputError: ``target_error`` not positive (rank r has error 0, and 0 < 0 never holds).
    """
    if not target_error > 0:
        raise InputError(
            f"target error must be above 0, got {target_error}; for an exact factorisation use the full rank"
        )
    return int(np.argmax(relative_tail(s) < target_error))


def energy_rank(s: Array, target_energy: float) -> int:
    """Least k whose top-k energy Σ_{i<k} s_i² is at least ``target_energy`` of the whole; ``s (r,)`` descending.

    It is 0 for a zero matrix. Energy 0.99 asks for the error 0.1, not 0.01: the error is √(1 − energy).

    Raises:
        InputError: ``target_energy`` outside (0, 1].
    """
    if not 0 < target_energy <= 1:
        raise InputError(f"target energy must be in (0, 1], got {target_energy}; 0.99 keeps 99 % of the energy")
    # Energy left is compared, not energy held: near 1 the held sum has lost the digits that decide. The slack
    # forgives the rounding of 1 − target itself (1 − 0.9 is 0.09999999999999998).
    return int(np.argmax(relative_tail(s) ** 2 <= 1 - target_energy + 1e-15))


def gap_rank(s: Array, largest: int) -> int:
    """k at the widest relative gap: the argmax of ``s[k − 1] / s[k]`` for k in 1..min(r − 1, largest).

    Args:
        s: singular values ``(r,)``, descending.
        largest: most that k may be. The smallest values of a square matrix lie near zero and their ratios are wild, so
            that without a bound the answer is r − 1 for most weights; `largest_saving_rank` is the one of use.
    Returns:
        0 for a zero matrix; q for one of exact rank q (values up to ``r·eps·s[0]`` are rounding), whatever the bound;
        r if no k is allowed. A flat spectrum has no gap and k is then an accident: look at ``s[k − 1] / s[k]``.
    """
    s = np.asarray(s, dtype=np.float64)
    if s.size == 0 or s[0] <= 0:
        return 0
    above = int((s > s.size * np.finfo(np.float64).eps * s[0]).sum())
    if above < s.size:
        return above
    last = min(s.size - 1, largest)
    return s.size if last < 1 else int(np.argmax(s[:last] / s[1 : last + 1])) + 1


# --- what a rank or a set of columns stores -----------------------------------------------------------------------


def factor_params(n: int, m: int, k: int) -> int:
    """Numbers that a rank-k factorisation of an ``(n, m)`` matrix stores: k(n + m)."""
    return k * (n + m)


def largest_saving_rank(n: int, m: int) -> int:
    """Largest k whose factors store less than the ``(n, m)`` matrix itself, k < nm/(n + m); 0 if none does."""
    return (n * m - 1) // (n + m)


def equal_storage_columns(n: int, m: int, k: int) -> int:
    """Return how many whole columns of an ``(n, m)`` matrix fit in the storage of its rank-k factors; at most m.

    The indices of the kept columns are not counted. For rows, swap n and m.
    """
    return min(m, factor_params(n, m, k) // n)


# --- errors of approximations other than the best -----------------------------------------------------------------


def subset_error(energy: Array, kept_channels: NDArray[np.intp]) -> Array:
    """Error of keeping some orthogonal parts of W and zeroing the others: ``sqrt(Σ_dropped energy / Σ energy)``.

    The parts are singular triplets (energy ``s²``), columns (‖W[:, j]‖²) or rows.

    Args:
        energy: squared norm of each part, ``(..., n)``.
        kept_channels: distinct indices of the parts kept, ``(..., k)``.
    Returns:
        ``(...)``; 0 for a zero matrix. What is dropped is summed: 1 − Σ kept would lose the digits of small errors.
    """
    dropped = np.array(energy, dtype=np.float64)
    total = dropped.sum(axis=-1)
    np.put_along_axis(dropped, np.asarray(kept_channels), 0.0, axis=-1)
    return np.sqrt(np.divide(dropped.sum(axis=-1), total, out=np.zeros_like(total), where=total > 0))


def factor_cosine(W: Array, A: Array, B: Array) -> Array:
    """Cosine ⟨W, AB⟩ / (‖W‖·‖AB‖) of W and a product of thin factors, without forming AB.

    ⟨W, AB⟩ is summed from AᵀW and B, ‖AB‖² from the Gram matrices AᵀA and BBᵀ. For Gaussian factors, whatever W and
    the rank, the cosine has mean 0 and mean square exactly 1/(nm).

    Args:
        W: ``(..., n, m)``; A: ``(..., n, k)``; B: ``(..., k, m)``.
    Returns:
        ``(...)`` in [−1, 1]; 0 where W or AB is zero.
    """
    At = np.swapaxes(A, -1, -2)
    inner = ((At @ W) * B).sum(axis=(-2, -1))
    product = ((At @ A) * (B @ np.swapaxes(B, -1, -2))).sum(axis=(-2, -1))
    norms = np.sqrt(np.maximum(product, 0.0) * np.einsum("...ij,...ij->...", W, W))
    cosine = np.divide(inner, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.clip(cosine, -1.0, 1.0)


def rescaled_error(cosine: Array) -> Array:
    """Error of a matrix R scaled to the norm of W: √(2 − 2cos). An unrelated R is worse than zero: √2."""
    return np.sqrt(2 - 2 * np.asarray(cosine))


def optimally_scaled_error(cosine: Array) -> Array:
    """Error of R times its best factor ⟨W, R⟩/‖R‖²: √(1 − cos²) ≤ 1."""
    cosine = np.asarray(cosine)
    return np.sqrt((1 - cosine) * (1 + cosine))


def pruned_spectral_error(G: Array, kept_columns: NDArray[np.intp], top: Array) -> Array:
    """‖W_dropped‖₂ / ‖W‖₂ when all columns but the kept ones are zeroed.

    Args:
        G: WᵀW ``(..., m, m)``; kept: distinct column indices ``(..., k)``.
        top: largest singular value of W, ``(...)``, above 0.
    """
    G, kept_columns = np.asarray(G, dtype=np.float64), np.asarray(kept_columns)
    if kept_columns.shape[-1] == G.shape[-1]:
        return np.zeros(G.shape[:-2])
    _, block = _gram_rows(G, _others(kept_columns, G.shape[-1]))
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh(block)[..., -1], 0.0)) / top)


def projection_error(G: Array, kept_columns: NDArray[np.intp]) -> Array:
    """Column-subset error ‖W − C C⁺W‖_F / ‖W‖_F, C the kept columns: every column is fitted by the kept ones.

    Never above the error of zeroing the other columns. From the Gram matrix alone: a Cholesky factor L of G_JJ, and
    ``G_jj − ‖L⁻¹G_Jj‖²`` is what is left of column j.

    Args:
        G: WᵀW, ``(..., m, m)``, float64.
        kept_columns: distinct column indices, ``(..., k)``, k ≥ 1.
    Returns:
        ``(...)``; 0 for a zero matrix. Errors below about 1e-7 are the Gram matrix's rounding. Directions of C with
        an energy below 1e-12 of its largest are taken as absent.
    """
    G, kept_columns = np.asarray(G, dtype=np.float64), np.asarray(kept_columns)
    total = np.trace(G, axis1=-2, axis2=-1)
    if kept_columns.shape[-1] == G.shape[-1]:
        return np.zeros_like(total)
    dropped = _others(kept_columns, G.shape[-1])
    rows, block = _gram_rows(G, kept_columns)
    across = np.take_along_axis(rows, dropped[..., None, :], axis=-1)
    left = np.take_along_axis(np.diagonal(G, axis1=-2, axis2=-1), dropped, axis=-1) - _fitted_energy(block, across)
    residual = np.maximum(left, 0.0).sum(axis=-1)
    return np.sqrt(np.divide(residual, total, out=np.zeros_like(total), where=total > 0))


def span_error(C: Array, G: Array) -> float:
    """`projection_error` of a W with more columns than rows, from its kept columns ``C (n, c)`` and WWᵀ ``G (n, n)``.

    0 for a zero matrix, and where C spans all rows.
    """
    total = float(np.trace(G))
    n, c = C.shape
    if total == 0 or (c >= n and _surely_spans(C)):
        return 0.0
    C = np.asarray(C, dtype=np.float64)
    L = _cholesky(C @ C.T if c >= n else C.T @ C)
    if L is None:
        energy, U = np.linalg.eigh(C @ C.T)
        basis = U[:, energy > _DEPENDENT * energy[-1]].T
    elif c >= n:
        return 0.0
    else:
        basis = _solve_lower(L, C.T)  # orthonormal rows that span the columns of C
    fitted = float(np.sum((basis @ G) * basis))
    return float(np.sqrt(max(0.0, 1 - fitted / total)))


def _surely_spans(C: Array) -> bool:
    """Return whether CCᵀ in C's own precision already shows full row rank; False leaves it open."""
    try:
        L = np.linalg.cholesky(C @ C.T)
    except np.linalg.LinAlgError:
        return False
    pivots = np.diagonal(L) ** 2
    # Far above what rounding makes of a zero pivot, about len(C)·eps of the largest.
    return bool(pivots.min() > max(_DEPENDENT, 10 * len(C) * np.finfo(C.dtype).eps) * pivots.max())


def _others(kept_columns: NDArray[np.intp], m: int) -> NDArray[np.intp]:
    """The indices of range(m) that are not in ``kept_columns (..., k)``, ``(..., m − k)``, ascending."""
    mask = np.ones((*kept_columns.shape[:-1], m), dtype=bool)
    np.put_along_axis(mask, kept_columns, False, axis=-1)
    return np.nonzero(mask)[-1].reshape(*kept_columns.shape[:-1], -1)


def _gram_rows(G: Array, index: NDArray[np.intp]) -> tuple[Array, Array]:
    """G_J: ``(..., k, m)`` and G_JJ ``(..., k, k)`` for the indices J ``(..., k)`` of each ``G (..., m, m)``."""
    m, k = G.shape[-1], index.shape[-1]
    stack, J = G.reshape(-1, m, m), index.reshape(-1, k)
    item = np.arange(len(stack))[:, None]
    rows = stack[item, J]
    block = rows[item[:, None], np.arange(k)[:, None], J[:, None, :]]
    return rows.reshape(*G.shape[:-2], k, m), block.reshape(*G.shape[:-2], k, k)


def _fitted_energy(block: Array, rows: Array) -> Array:
    """‖C C⁺w‖² of columns w, from G_JJ = CᵀC ``(..., k, k)`` and Cᵀw ``(..., k, columns)``."""
    L = _cholesky(block)
    if L is not None:
        return np.asarray((_solve_lower(L, rows) ** 2).sum(axis=-2))
    # Dependent columns: project on the directions that are there.
    energy, V = np.linalg.eigh(block)
    there = energy > _DEPENDENT * np.maximum(energy[..., -1:], np.finfo(np.float64).tiny)
    weight = np.divide(1.0, energy, out=np.zeros_like(energy), where=there)
    return np.asarray((weight[..., :, None] * (np.swapaxes(V, -1, -2) @ rows) ** 2).sum(axis=-2))


def _cholesky(block: Array) -> Array | None:
    """Lower Cholesky factors of ``(..., k, k)``; None where one of the matrices is singular to rounding."""
    try:
        L = np.linalg.cholesky(block)
    except np.linalg.LinAlgError:
        return None
    energy = np.diagonal(L, axis1=-2, axis2=-1) ** 2
    return L if (energy.min(axis=-1) > _DEPENDENT * energy.max(axis=-1)).all() else None


def _solve_lower(L: Array, rows: Array) -> Array:
    """L⁻¹·rows for lower triangular ``L (..., k, k)`` and ``rows (..., k, columns)``."""
    if L.ndim > 2 or L.size < _LARGE_FACTOR:
        # numpy has no triangular solve; its general one doubles the work of a small step, takes a whole stack at
        # once, and spares the import of scipy.linalg, which takes longer than inspecting a small model.
        return np.linalg.solve(L, rows)
    from scipy.linalg.blas import dtrsm

    # On transposes, which are Fortran's order of the same memory: nothing is copied but the result.
    return np.asarray(dtrsm(1.0, L.T, rows.T, side=1, lower=0)).T


def gaussian_tail(n: int, m: int) -> Array:
    """Best rank-k error of an ``(n, m)`` matrix of independent Gaussians for every k: the Marchenko–Pastur limit.

    Returns:
        ``(r + 1,)`` from 1 to 0, r = min(n, m), indexed like `relative_tail`. The limit of large n and m; at 128×64 it
        is about 0.001 above the mean of finite matrices.
    """
    r, ratio = min(n, m), min(n, m) / max(n, m)
    low, high = (1 - np.sqrt(ratio)) ** 2, (1 + np.sqrt(ratio)) ** 2
    # x = middle + half·cos θ takes out the square-root ends of the density √((high − x)(x − low)) / x.
    theta = (np.arange(20000) + 0.5) * np.pi / 20000
    x = (low + high) / 2 + (high - low) / 2 * np.cos(theta)
    density = np.sin(theta) ** 2 / x
    count = np.concatenate([[0.0], np.cumsum(density)])
    energy = np.concatenate([[0.0], np.cumsum(density * x)])
    held = np.interp(np.arange(r + 1) / r, count / count[-1], energy / energy[-1])
    return np.sqrt(np.maximum(1 - held, 0.0))


# --- by explicit difference, and thin factors ---------------------------------------------------------------------


def relative_error(W: Array, W_hat: Array) -> float:
    """‖W − Ŵ‖_F / ‖W‖_F ≥ 0 by explicit difference; 0 if both are zero, inf if only W is."""
    norm = float(np.linalg.norm(W))
    gap = float(np.linalg.norm(np.asarray(W, dtype=np.float64) - W_hat))
    if norm == 0:
        return 0.0 if gap == 0 else float("inf")
    return gap / norm


def factored_svd(B: Array, A: Array) -> tuple[Array, Array, Array]:
    """Thin SVD of B A without forming it: QR of both factors, SVD of the r×r core.

    Args:
        B: ``(d_out, r)``; A: ``(r, d_in)``.
    Returns:
        ``U (d_out, q), s (q,), Vt (q, d_in)`` in float64, with q = min(r, d_out, d_in) and s descending.
    """
    B, A = np.asarray(B, dtype=np.float64), np.asarray(A, dtype=np.float64)
    Qb, Rb = np.linalg.qr(B)
    Qa, Ra = np.linalg.qr(A.T)
    U, s, Vt = np.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return Qb @ U, s, Vt @ Qa.T
