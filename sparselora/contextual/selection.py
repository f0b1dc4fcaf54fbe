"""From scores of FFN and attention channels to the channels that stay, and how good a choice was.

kv channel (g, d) of attention has index ``g·head_dim + d``; query head h belongs to kv group ``h // (heads/kv_heads)``.
Except for `estimator_quality`, nothing here reads a value back from the device.
"""

from __future__ import annotations

import torch

from sparselora.errors import InputError
from sparselora.kernels.select import top_indices
from sparselora.numerics.channels import keep_count

Tensor = torch.Tensor


def check_heads(heads: int, kv_heads: int, head_dim: int, pairs: bool) -> None:
    """Raises InputError where heads do not fall into equal kv groups, or rotary pairs into two halves of a head."""
    if kv_heads < 1 or heads % kv_heads:
        raise InputError(f"{heads} query heads cannot share {kv_heads} key-value heads evenly")
    if pairs and head_dim % 2:
        raise InputError(f"rotary position embedding needs an even head_dim, got {head_dim}")


def select_ffn_channels(scores: Tensor, sparsity: float) -> Tensor:
    """Ascending int64 indices of the ``keep_count(n, 1 − sparsity)`` largest of ``scores (n,)``, on their device.

    Among equal scores the lower index wins. Nothing is read back, so NaN is not refused: it counts as largest.

    Raises:
        InputError: sparsity outside [0, 1).
    """
    return top_indices(scores, _kept(len(scores), sparsity))


def largest_channels(scores: Tensor, count: int) -> Tensor:
    """Ascending int64 indices of the ``count`` largest of ``scores (n,)``, or of all; ties as `select_ffn_channels`."""
    return top_indices(scores, min(count, len(scores)))


def _kept(n: int, sparsity: float) -> int:
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity must be in [0, 1), got {sparsity}; to drop a whole FFN use mode skip")
    return keep_count(n, 1 - sparsity)


def kept_attention_channels(sparsity: float, kv_heads: int, head_dim: int, pairs: bool) -> tuple[int, int]:
    """Numbers of kv channels that stay: of q and k (``pairs``: two at a time), and of v."""
    of_v = _kept(kv_heads * head_dim, sparsity)
    return (2 * _kept(kv_heads * head_dim // 2, sparsity) if pairs else of_v), of_v


def select_attention_channels(scores: Tensor, sparsity: float, kv_heads: int, head_dim: int, pairs: bool) -> Tensor:
    """Ascending kv channels to keep, chosen over all channels of the layer together (a head may keep none).

    With ``pairs`` (RoPE) channels d and d + head_dim/2 of a head stay together, ranked by the sum of their scores;
    then ``keep_count`` counts pairs.

    Args:
        scores: ``(kv_heads·head_dim,)``.
    Returns:
        int64, on the device of ``scores``.
    Raises:
        InputError: sparsity outside [0, 1), scores of another length, or pairs of an odd head_dim.
    """
    check_heads(kv_heads, kv_heads, head_dim, pairs)
    if scores.shape != (kv_heads * head_dim,):
        raise InputError(f"attention scores must be {kv_heads} × {head_dim} in one row, got {tuple(scores.shape)}")
    if not pairs:
        return select_ffn_channels(scores, sparsity)
    half = head_dim // 2
    pair_index = select_ffn_channels(scores.view(kv_heads, 2, half).sum(dim=1).reshape(-1), sparsity)
    pair = torch.zeros(kv_heads * half, device=scores.device).index_fill_(0, pair_index, 1.0)
    both = pair.view(kv_heads, 1, half).expand(kv_heads, 2, half)
    return top_indices(both.reshape(-1), 2 * len(pair_index))


def query_channels(index: Tensor, kv_heads: int, heads: int, head_dim: int) -> Tensor:
    """The query channels of kept kv channels, ascending: (g, d) → (g·group + j)·head_dim + d for all j < group.

    They are also the o_proj input columns of kept V channels.

    Args:
        index: ``(m,)`` int64 kv channels g·head_dim + d, ascending.
    Returns:
        ``(m·heads/kv_heads,)`` int64 on the same device.
    """
    check_heads(heads, kv_heads, head_dim, pairs=False)
    group = heads // kv_heads
    if group == 1:
        return index
    flags = torch.zeros(kv_heads * head_dim, device=index.device).index_fill_(0, index, 1.0)
    every = flags.view(kv_heads, 1, head_dim).expand(kv_heads, group, head_dim)
    return top_indices(every.reshape(-1), group * len(index))


# --- how good an estimate is --------------------------------------------------------------------------------------


def estimator_quality(estimated: Tensor, oracle: Tensor, sparsity: float) -> dict[str, float]:
    """Quality of scores ``estimated (n,)`` against ``oracle (n,)`` when ``keep_count(n, 1 − sparsity)`` channels stay.

    Returns:
        ``recall``: part of the oracle's choice that is chosen too; ``random_recall``: its expectation for a random
        choice, count/n; ``cosine`` of the two score vectors (1 if both are zero, 0 if one is); ``energy``: Σ oracle²
        over the choice, divided by that over the oracle's (1 if that is zero); ``random_energy``: its expectation for
        a random choice.
    """
    estimated, oracle = estimated.detach().double().cpu(), oracle.detach().double().cpu()
    selected, best = select_ffn_channels(estimated, sparsity), select_ffn_channels(oracle, sparsity)
    energy = oracle.square()
    most, total, share = float(energy[best].sum()), float(energy.sum()), len(best) / len(oracle)
    norms = float(estimated.norm()), float(oracle.norm())
    cosine = float(estimated @ oracle) / (norms[0] * norms[1]) if all(norms) else float(not any(norms))
    return {
        "recall": float(torch.isin(best, selected).double().mean()),
        "random_recall": share,
        "cosine": cosine,
        "energy": float(energy[selected].sum()) / most if most else 1.0,
        "random_energy": share * total / most if most else 1.0,
    }
