"""Approximations of a matrix and their errors, in closed form: nothing is reconstructed to measure an error.

Relative errors are ‖W − Ŵ‖_F / ‖W‖_F unless a name says ``spectral``. Index convention: ``tail[k]`` belongs to rank k,
so ``tail[0]`` is 1 (the zero approximation) and ``tail[r]`` is 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparselora.errors import InputError

Array = NDArray[np.floating]


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
