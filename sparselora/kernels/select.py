"""Indices of the largest scores, ascending, without reading anything back from the device."""

from __future__ import annotations

import torch

from sparselora.kernels._dispatch import has_triton, use_triton

_LARGEST = 1 << 16

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _kernel(SCORES, OUT, n, count, BLOCK: tl.constexpr):
        # Radix selection of the count-th largest key, eight bits a round; then a running count gives each its place.
        at = tl.arange(0, BLOCK)
        inside = at < n
        score = tl.load(SCORES + at, mask=inside, other=0.0).to(tl.float32)
        bits = score.to(tl.int32, bitcast=True)
        # Keys whose order as unsigned numbers is that of the scores; nothing is below the places past the end.
        key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
        bins = tl.arange(0, 256)
        prefix = tl.zeros((), tl.uint32)
        wanted = count
        for round_ in tl.static_range(4):
            alike = inside
            if round_ > 0:
                alike = inside & ((key >> (32 - 8 * round_)) == prefix)
            digit = ((key >> (24 - 8 * round_)) & 255).to(tl.int32)
            others = tl.sum((~alike).to(tl.int32), axis=0)
            histogram = tl.histogram(tl.where(alike, digit, 0), 256)
            histogram = histogram - tl.where(bins == 0, others, 0)
            above = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0)  # keys in higher bins
            chosen = (above < wanted) & (above + histogram >= wanted)
            digit_found = tl.sum(tl.where(chosen, bins, 0), axis=0)
            wanted = wanted - tl.sum(tl.where(chosen, above, 0), axis=0)
            prefix = (prefix << 8) | digit_found.to(tl.uint32)
        equal = inside & (key == prefix)
        kept = (inside & (key > prefix)) | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= wanted))
        place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(OUT + place, at.to(tl.int64), mask=kept)


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
    _kernel[(1,)](scores.contiguous(), out, len(scores), count, BLOCK=block, num_warps=max(4, min(32, block // 512)))
    return out
