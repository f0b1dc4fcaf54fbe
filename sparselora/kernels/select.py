"""Indices of the largest scores, ascending, without reading anything back from the device."""

from __future__ import annotations

import torch

from sparselora.kernels._dispatch import has_triton, use_triton

_LARGEST = (1 << 16) - 1

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def select_largest(score, inside, count):
        """Flag the ``count`` largest of ``score``, the lower index first among equals, and give their ranks."""
        bits = score.to(tl.int32, bitcast=True)
        # Keys whose order as unsigned numbers is that of the scores.
        key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
        key = tl.where(inside, key, 0)
        # The count-th largest key, bit by bit: a comparison and a sum each, all in registers.
        least = tl.zeros((), tl.uint32)
        for i in tl.static_range(32):
            raised = least | (1 << (31 - i))
            reached = tl.sum((key >= raised).to(tl.int32), axis=0)
            least = tl.where(reached >= count, raised, least)
        greater, equal = inside & (key > least), inside & (key == least)
        wanted = count - tl.sum(greater.to(tl.int32), axis=0)
        # Two running counts in one number, of 16 bits each.
        both = tl.cumsum(greater.to(tl.uint32) + (equal.to(tl.uint32) << 16), axis=0)
        above, same = (both & 65535).to(tl.int32), (both >> 16).to(tl.int32)
        return greater | (equal & (same <= wanted)), above + tl.minimum(same, wanted) - 1

    @triton.jit
    def _kernel(SCORES, OUT, n, count, BLOCK: tl.constexpr):
        position = tl.arange(0, BLOCK)
        inside = position < n
        score = tl.load(SCORES + position, mask=inside, other=0.0).to(tl.float32)
        flags, place = select_largest(score, inside, count)
        tl.store(OUT + place, position.to(tl.int64), mask=flags & (place < count))

    @triton.jit
    def _expand(FLAG, INDEX, INVERSE, first, offset, total, HEAD: tl.constexpr, GROUP: tl.constexpr,
                HALF: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        # The channels `first + (0 … total)` whose flag is set, from place `offset` on: GROUP heads share the flags of
        # one, and within a head d and d + HALF do.
        position = tl.arange(0, BLOCK)
        inside = position < total
        flag = (position // (HEAD * GROUP)) * HALF + (position % HEAD) % HALF
        flags = tl.load(FLAG + flag, mask=inside, other=0).to(tl.int32)
        place = offset + tl.cumsum(flags, axis=0) - 1
        tl.store(INDEX + place, (first + position).to(tl.int64), mask=inside & (flags > 0))
        tl.store(INVERSE + first + position, tl.where(flags > 0, place, -1), mask=inside)

    @triton.jit
    def _attention_kernel(
        QK, V, FLAG, QKV, QKV_INVERSE, OUT, OUT_INVERSE, pairs, kept_qk, kept_v, KV: tl.constexpr, HEAD: tl.constexpr,
        GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        # Program 0 chooses q and k, program 1 v and o. Flags of what is kept pass through memory.
        position = tl.arange(0, BLOCK)
        query = KV * HEAD * GROUP
        if tl.program_id(0) == 0:
            inside = position < pairs
            channel = (position // HALF) * HEAD + position % HALF
            score = tl.load(QK + channel, mask=inside, other=0.0)
            if HALF < HEAD:
                score += tl.load(QK + channel + HALF, mask=inside, other=0.0)
            flags, _ = select_largest(score, inside, kept_qk // (HEAD // HALF))
            tl.store(FLAG + position, flags.to(tl.int32), mask=inside)
            tl.debug_barrier()
            _expand(FLAG, QKV, QKV_INVERSE, 0, 0, query, HEAD, GROUP, HALF, WIDE)
            _expand(FLAG, QKV, QKV_INVERSE, query, kept_qk * GROUP, KV * HEAD, HEAD, 1, HALF, BLOCK)
        else:
            inside = position < KV * HEAD
            score = tl.load(V + position, mask=inside, other=0.0)
            flags, _ = select_largest(score, inside, kept_v)
            tl.store(FLAG + pairs + position, flags.to(tl.int32), mask=inside)
            tl.debug_barrier()
            _expand(FLAG + pairs, QKV, QKV_INVERSE, query + KV * HEAD, kept_qk * (GROUP + 1), KV * HEAD, HEAD, 1, HEAD,
                    BLOCK)  # fmt: skip
            _expand(FLAG + pairs, OUT, OUT_INVERSE, 0, 0, query, HEAD, GROUP, HEAD, WIDE)


def top_indices(scores: torch.Tensor, count: int, impl: str = "auto") -> torch.Tensor:
    """Ascending int64 indices of the ``count`` largest of ``scores (n,)``; among equals the lower index wins.

    NaN is not looked for: it may count as the largest or the smallest.
    """
    if count == len(scores):
        return torch.arange(count, device=scores.device)
    if not use_triton(impl, scores) or len(scores) > _LARGEST:
        return scores.sort(descending=True, stable=True).indices[:count].sort().values
    out = torch.empty(count, dtype=torch.int64, device=scores.device)
    block = triton.next_power_of_2(len(scores))
    _kernel[(1,)](scores.contiguous(), out, len(scores), count, BLOCK=block, num_warps=_warps(block))
    return out


def attention_indices(
    qk: torch.Tensor, v: torch.Tensor, counts: tuple[int, int], heads: int, kv_heads: int, head_dim: int, pairs: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The channels of q, k and v (side by side) and of o that stay, by one launch; None where Triton cannot.

    Args:
        qk, v: scores per kv channel ``(kv_heads·head_dim,)`` of q and k, and of v.
        counts: number of kv channels that stay, of q and k (even with ``pairs``), and of v.
        pairs: channels d and d + head_dim/2 stay together.
    Returns:
        Ascending int64 indices of q|k|v with their inverse (int32, -1 where a channel is dropped), and those of o.
    """
    width = kv_heads * head_dim
    if not use_triton("auto", qk) or qk.dtype != torch.float32 or heads * head_dim > _LARGEST:
        return None
    group, half = heads // kv_heads, head_dim // 2 if pairs else head_dim
    device = qk.device
    flags = torch.empty(kv_heads * half + width, dtype=torch.int32, device=device)
    index = torch.empty(counts[0] * (group + 1) + counts[1], dtype=torch.int64, device=device)
    inverse = torch.empty(width * (group + 2), dtype=torch.int32, device=device)
    o = torch.empty(counts[1] * group, dtype=torch.int64, device=device)
    o_inverse = torch.empty(width * group, dtype=torch.int32, device=device)
    block, wide = triton.next_power_of_2(width), triton.next_power_of_2(width * group)
    _attention_kernel[(2,)](
        qk.contiguous(), v.contiguous(), flags, index, inverse, o, o_inverse, kv_heads * half, *counts, KV=kv_heads,
        HEAD=head_dim, GROUP=group, HALF=half, BLOCK=block, WIDE=wide, num_warps=_warps(wide),
    )  # fmt: skip
    return index, inverse, o, o_inverse


def _warps(block: int) -> int:
    return max(4, min(32, block // 512))
