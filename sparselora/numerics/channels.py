"""Scores of channels, and the selection of the best ones. Scores and selection are apart.

A *column* of W ``(d_out, d_in)`` is an input feature; a *rank channel* k of an adapter is the pair (B[:, k], A[k, :]).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sparselora.errors import InputError

Array = NDArray[np.floating]


def keep_count(n: int, keep_ratio: float) -> int:
    """Return the number of ``n`` channels that a keep ratio leaves: ``min(n, max(1, ceil(keep_ratio·n − 1e-9)))``.

    The subtraction undoes floating-point overshoot (0.28·25 is 7.000000000000001, and 7 are kept).

    Raises:
        InputError: ``n < 1``, or ``keep_ratio`` outside (0, 1].
    """
    if n < 1:
        raise InputError(f"number of channels must be at least 1, got {n}")
    if not 0 < keep_ratio <= 1:
        raise InputError(f"keep_ratio must be in (0, 1], got {keep_ratio}; use 1 to keep everything")
    return min(n, max(1, math.ceil(keep_ratio * n - 1e-9)))


def top_channels(scores: Array, count: int) -> NDArray[np.intp]:
    """Ascending indices of the ``count`` largest ``scores`` ``(..., n)``; among equal scores the lower index wins.

    Raises:
        InputError: a score that is NaN, or ``count`` outside 0..n.
    """
    scores = np.asarray(scores)
    if np.isnan(scores).any():
        raise InputError("channel scores contain NaN; check the weights for NaN or infinite values")
    n = scores.shape[-1]
    if not 0 <= count <= n:
        raise InputError(f"count must be between 0 and {n}, got {count}")
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)


# --- columns of a weight ------------------------------------------------------------------------------------------


def column_energy(W: Array) -> Array:
    """‖W[:, j]‖² per column of ``W (..., d_out, d_in)``, in float64.

    Equal to Σ_i s_i² V_ij² over *all* i, the published "leverage by energy".
    """
    return np.einsum("...ij,...ij->...j", W, W, dtype=np.float64)


def topk_column_energy(s: Array, Vt: Array, k: int) -> Array:
    """Σ_{i<k} s_i² V_ij² per column, from singular values ``s (..., r)`` and right vectors ``Vt (..., r, d_in)``."""
    return np.einsum("...i,...ij->...j", s[..., :k] ** 2, Vt[..., :k, :] ** 2)


def leverage_scores(Vt: Array, k: int) -> Array:
    """Statistical leverage Σ_{i<k} V_ij² of each column, from ``Vt (..., r, d_in)``; they sum to k."""
    return np.asarray((Vt[..., :k, :] ** 2).sum(axis=-2))


# --- rank channels of an adapter ----------------------------------------------------------------------------------


def channel_energy(A: Array, B: Array) -> Array:
    """‖B[:, k]‖²·‖A[k, :]‖² = ‖b_k a_kᵀ‖_F² per rank channel; ``A (r, d_in)``, ``B (d_out, r)``."""
    return np.einsum("kj,kj->k", A, A, dtype=np.float64) * np.einsum("ik,ik->k", B, B, dtype=np.float64)


def magnitude_B(A: Array, B: Array) -> Array:
    """‖B[:, k]‖ per rank channel. It depends on how scale is split between A and B: (cB, A/c) is the same update."""
    return np.sqrt(np.einsum("ik,ik->k", B, B, dtype=np.float64))


RANK_CHANNEL_SCORES: dict[str, Callable[[Array, Array], Array]] = {
    "channel_energy": channel_energy,
    "magnitude_B": magnitude_B,
}
"""Rank-channel scores that need the two factors alone; `sparselora.models.lora` adds those that need more."""

PRUNE_METHODS = (*RANK_CHANNEL_SCORES, "random", "gradient", "svd", "squeeze", "no_prune")
"""Ways to prune an adapter; ``no_prune`` is the control that trains on with all channels."""

GATE_METHODS = {"token_gate": "learned", "energy_gate": "energy", "random_gate": "random"}
"""Ways to choose channels by token in place of pruning them → the policy of `sparselora.config.token_gates`."""
