"""Singular values of an adapter's update, and new factors from edited ones; never a ``d_out × d_in`` matrix.

ΔW = scaling · B A with ``lora_A (r, d_in)`` and ``lora_B (d_out, r)`` has rank r at most, so that two thin orthogonal
bases and the SVD of one r×r core say all there is to say about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparselora.errors import InputError

_EPS = torch.finfo(torch.float64).eps
_LARGEST_CONDITION = 1e3
"""Cholesky-QR loses ε·κ² of orthogonality; beyond this bound on κ a factor goes to Householder QR instead."""


@dataclass(frozen=True)
class AdapterSVD:
    """ΔW = scaling · B A = U diag(sigma) Vᵀ in float64, with exactly r directions.

    ``U (d_out, r)``, ``sigma (r,)`` descending and with the scaling in it, ``V (d_in, r)``. Where B A has a lower rank
    than r, sigma is 0 from there on: values that rounding alone can produce are set to 0. The first
    min(r, d_out, d_in) columns of U and V are orthonormal, those of zero directions too; any further ones are 0.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        """r, the number of directions, those of sigma 0 included."""
        return len(self.sigma)

    @property
    def intruder_flags(self) -> NDArray[np.bool_] | None:
        """Directions along intruder dimensions, ``(r,)``; None: the decomposition does not set them apart."""
        return None


@dataclass(frozen=True)
class _Basis:
    """M ``(d, r)`` = Q R with Q = ``left · into`` of orthonormal columns, which is never formed by itself."""

    left: Tensor
    into: Tensor
    R: Tensor

    def times(self, W: Tensor) -> Tensor:
        """Q W for ``W (k, n)``."""
        return self.left @ (self.into @ W)


def adapter_svd(A: Tensor, B: Tensor, scaling: float) -> AdapterSVD:
    """The SVD of scaling · B A from its factors ``A (r, d_in)`` and ``B (d_out, r)``: two thin QR and an r×r core.

    The work is in float64 whatever the factors' type, on their device. A negative scaling turns the signs of U.

    Raises:
        InputError: factors that are not 2-D or do not fit together, NaN or infinite values.
    """
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise InputError(
            f"lora_A must be (r, d_in) and lora_B (d_out, r), got {tuple(A.shape)} and {tuple(B.shape)}; "
            "pass the two factors of one linear layer"
        )
    r = A.shape[0]
    right, left = _orthogonal(A.detach().double().T), _orthogonal(B.detach().double())
    core = left.R @ right.R.T
    if not torch.isfinite(core).all():
        raise InputError("lora_A or lora_B holds NaN or infinite values; the weights are damaged")
    U, s, Vt = torch.linalg.svd(core, full_matrices=False)
    # ‖R_b‖·‖R_a‖ bounds what was added up to give the core: below its rounding a value is no value.
    s = torch.where(s <= r * _EPS * left.R.norm() * right.R.norm(), torch.zeros_like(s), s)
    U = U if scaling >= 0 else -U
    return AdapterSVD(_padded(left.times(U), r), _padded(abs(scaling) * s, r), _padded(right.times(Vt.T), r))


def _orthogonal(M: Tensor) -> _Basis:
    """``M (d, r)`` = QR by Cholesky of the Gram matrix, or by Householder where its condition does not allow that.

    The Gram matrix of the columns at unit length is what is measured: Cholesky-QR does not see their lengths.
    """
    gram = M.T @ M
    lengths = gram.diagonal().sqrt()
    chol, info = torch.linalg.cholesky_ex(gram / lengths[:, None] / lengths)
    if not info and torch.isfinite(chol).all():
        inverse = torch.linalg.solve_triangular(
            chol.T, torch.eye(len(chol), dtype=M.dtype, device=M.device), upper=True
        )
        # The product of Frobenius norms is at least κ, so that this errs on the safe side.
        if chol.norm() * inverse.norm() <= _LARGEST_CONDITION:
            return _Basis(M, inverse / lengths[:, None], chol.T * lengths)
    Q, R = torch.linalg.qr(M)
    return _Basis(Q, torch.eye(Q.shape[1], dtype=M.dtype, device=M.device), R)


def _padded(X: Tensor, r: int) -> Tensor:
    """``X (..., k)`` with zeros up to ``(..., r)``."""
    return torch.nn.functional.pad(X, (0, r - X.shape[-1]))


def refactor(
    svd: AdapterSVD, sigma: Tensor, A: Tensor, B: Tensor, scaling: float, *, round_trip: bool = False
) -> tuple[Tensor, Tensor]:
    """New factors (A', B') with scaling · B' A' = U diag(``sigma (r,)``) Vᵀ, of A's and B's shapes, types and devices.

    Of two such pairs it is the one that loses less by rounding to these types:

    - A stays and B' takes the whole change, so that B' alone is rounded: about 1.7e-3 of ‖ΔW‖ in bfloat16, and nothing
      where B' is B. It needs a sigma without zeros, and rows of A that are not nearly dependent.
    - Each singular value is split evenly, A' = √(σ/|scaling|) Vᵀ and B' = ± U √(σ/|scaling|): about 2.4e-3 of ‖ΔW‖ in
      bfloat16 and 4e-8 in float32, whatever A and B are. A direction of sigma 0 has a zero column in B', so that it is
      exactly 0, and a row in A' that is not zero, so that it could still be trained.

    A decomposition of more directions than A has rows (`sparselora.spectral.intruders`) goes another way: A stays, and
    B' = B + U diag(σ'/σ − 1) Uᵀ B, which is exact because uᵀΔW = σ vᵀ for each of its directions.

    Where nothing has changed, A and B come back bit for bit. ``round_trip=True`` takes the second pair all the same:
    what an edit must be compared with, as it differs from the original by rounding alone, and by no less than an edit
    is rounded. If sigma is all 0, A stays and B' is 0; a zero adapter so keeps both, and factors that are both 0 (a
    saddle that no training leaves) never arise.

    Raises:
        InputError: another number of values than r; negative, NaN or infinite ones; a change of an adapter whose
            scaling is 0; new factors that do not fit in the types of the old ones.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=svd.sigma.device)
    if sigma.shape != svd.sigma.shape or not bool((torch.isfinite(sigma) & (sigma >= 0)).all()):
        raise InputError(
            f"sigma must be {svd.rank} finite values of 0 or more, got {tuple(sigma.shape)}"
            + (f" with least {float(sigma.min())}" if sigma.numel() else "")
        )
    if not sigma.any():
        return A, B if not svd.sigma.any() else torch.zeros_like(B)
    if not round_trip and torch.equal(sigma, svd.sigma):
        return A, B
    if scaling == 0:
        raise InputError("an adapter whose scaling is 0 has no spectrum to edit; check lora_alpha")
    if svd.rank > len(A):
        new_B = _rescaled(svd, sigma, B)
        pair = A, new_B.to(B)
        _refuse_misfit(_rounding((A.detach().double(), new_B), pair), float(sigma.norm()) / abs(scaling), pair)
        return pair
    split = _split(svd, sigma, scaling)
    rounded = split[0].to(A), split[1].to(B)
    size = float(sigma.norm()) / abs(scaling)
    if round_trip or not sigma.all():
        _refuse_misfit(_rounding(split, rounded), size, rounded)
        return rounded
    whole = A.detach().double(), _lora_B(svd, sigma, A, scaling)
    exact_A = A, whole[1].to(B)
    errors = _rounding(whole, exact_A), _rounding(split, rounded)
    # NaN, of rows of A that depend on each other, is not less than anything.
    pair, error = (exact_A, errors[0]) if errors[0] < errors[1] else (rounded, errors[1])
    _refuse_misfit(error, size, pair)
    return pair


def truncated(
    svd: AdapterSVD, rank: int, dtype_A: torch.dtype = torch.float32, dtype_B: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Factors ``A (rank, d_in)``, ``B (d_out, rank)`` with B A the best approximation of ΔW of that rank.

    The scaling is in them: they belong to alpha == rank. By Eckart–Young ‖ΔW − B A‖² = Σ_{i ≥ rank} sigma_i².

    Args:
        dtype_A, dtype_B: of the factors.
    Raises:
        InputError: ``rank`` outside 1..r; factors that do not fit in these types.
    """
    if not 1 <= rank <= svd.rank:
        raise InputError(f"rank must be between 1 and {svd.rank}, got {rank}")
    head = AdapterSVD(svd.U[:, :rank], svd.sigma[:rank], svd.V[:, :rank])
    A, B = _split(head, head.sigma, 1.0)
    rounded = A.to(dtype_A), B.to(dtype_B)
    _refuse_misfit(_rounding((A, B), rounded), float(head.sigma.norm()), rounded)
    return rounded


_LARGEST_ROUNDING = 0.05
"""Share of ‖ΔW‖ that rounding the factors may change: 20 times what bfloat16 does where nothing leaves its range."""


def _refuse_misfit(squared_error: float, size: float, factors: tuple[Tensor, Tensor]) -> None:
    """Raise InputError where ``factors`` are not B A of norm ``size``: values above or below what their types hold."""
    finite = all(bool(torch.isfinite(factor).all()) for factor in factors)
    if not finite or not squared_error <= (_LARGEST_ROUNDING * size) ** 2:
        raise InputError(
            f"an update of norm {size:.3g} does not fit in factors of {factors[0].dtype}: values leave its range; "
            "convert the adapter to float32, and check lora_alpha"
        )


def _split(svd: AdapterSVD, sigma: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    root = (sigma / abs(scaling)).sqrt()
    alive = root[root > 0]
    # A zero direction gets a row of A of the least live one's length, or of length 1 where none lives.
    rows = torch.where(root > 0, root, alive.min() if len(alive) else torch.ones_like(root[0]))
    columns = root if scaling > 0 else -root
    return (svd.V * rows).T.contiguous(), svd.U * columns


def _rescaled(svd: AdapterSVD, sigma: Tensor, B: Tensor) -> Tensor:
    """Return ``B (d_out, r)`` with what it has along each u scaled as sigma is, in float64."""
    is_alive = svd.sigma > 0
    factor = torch.where(is_alive, sigma / svd.sigma.where(is_alive, torch.ones_like(sigma)), 1.0)
    exact_B = B.detach().double()
    return exact_B + (svd.U * (factor - 1)) @ (svd.U.T @ exact_B)


def _lora_B(svd: AdapterSVD, sigma: Tensor, A: Tensor, scaling: float) -> Tensor:
    """B' ``(d_out, r)`` with scaling · B' A = U diag(sigma) Vᵀ, for rows of A that are independent and span V.

    Aᵀ = QR, so that Vᵀ = (QᵀV)ᵀ R⁻ᵀ A.
    """
    rows = _orthogonal(A.detach().double().T)
    within = rows.into.T @ (rows.left.T @ svd.V)
    return (svd.U * (sigma / scaling)) @ torch.linalg.solve_triangular(rows.R, within, upper=True).T


def _rounding(exact: tuple[Tensor, Tensor], rounded: tuple[Tensor, Tensor]) -> float:
    """Return the change of B A by rounding the factors, squared and to first order: ‖B·δA‖² + ‖δB·A‖²."""
    A, B = exact
    delta_A, delta_B = (new.double() - old for new, old in zip(rounded, exact))
    terms = (B.T @ B) * (delta_A @ delta_A.T) + (delta_B.T @ delta_B) * (A @ A.T)
    return float(terms.sum())
