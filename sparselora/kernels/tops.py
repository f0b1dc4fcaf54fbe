"""The largest logits of each row and their log-sum-exp, the logits read once."""

from __future__ import annotations

import math

import torch

from sparselora.kernels._dispatch import has_triton, use_triton

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _kernel(LOGITS, ROWS, BEST, PEAK, SUM, stride, vocabulary, width, GROUP: tl.constexpr, BLOCK: tl.constexpr):
        row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        column = tile * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        base = LOGITS + tl.load(ROWS + row).to(tl.int64) * stride
        peak = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for j in range(GROUP):
            x = tl.load(base + j * width + column, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(peak, x)
            # Where all are -inf so far, the difference must not be NaN.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(peak - shift) + tl.exp(x - shift)
            peak = higher
        tl.store(BEST + row.to(tl.int64) * width + column, peak, mask=inside)
        rest = GROUP * width + tl.arange(0, GROUP)  # fewer than a group are left
        x = tl.load(base + rest, mask=(rest < vocabulary) & (tile == 0), other=float("-inf")).to(tl.float32)
        highest = tl.maximum(tl.max(peak, axis=0), tl.max(x, axis=0))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        tl.store(PEAK + row * tiles + tile, highest)
        tl.store(
            SUM + row * tiles + tile, tl.sum(total * tl.exp(peak - shift), axis=0) + tl.sum(tl.exp(x - shift), axis=0)
        )


_BLOCK = 512


def top_logits(
    logits: torch.Tensor, k: int, rows: torch.Tensor | None = None, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest entries of each row, their indices, and the log-sum-exp of all entries.

    In no order, and which of several equal entries is taken is not said. `torch.topk` finds the same, slower where
    there are many columns: the k largest lie in the k groups of columns with the largest maxima, so only those are
    searched.

    Args:
        logits: ``(T, V)``.
        k: 1..V.
        rows: the rows that are meant ``(n,)``, on the device of ``logits``; all of them by default.
        impl: ``auto``, ``torch`` or ``triton``; the latter makes no copy of the logits.
    Returns:
        Values ``(n, k)`` in the dtype of ``logits``, int64 indices ``(n, k)``, and log-sum-exp ``(n,)`` in float32 (or
        float64).
    """
    vocabulary = logits.shape[1]
    # About √(V/k) columns a group: then both searches are equally long.
    group = 1 << round(math.log2(math.sqrt(vocabulary / k)))
    fused = use_triton(impl, logits) and logits.stride(1) == 1 and group >= 4
    if not fused:
        logits, rows = logits if rows is None else logits[rows], None
        lse = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
        if group < 4:
            top = logits.topk(k, dim=1)
            return top.values, top.indices, lse
    width = vocabulary // group  # a group is every width-th column: maxima over them run along the memory
    if fused:
        rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
        best, lse = _maxima(logits, rows, group, width)
    else:
        best = logits[:, : group * width].unflatten(1, (group, width)).amax(dim=1)
    columns = torch.arange(vocabulary, device=logits.device)
    best_groups = best.topk(k, dim=1, sorted=False).indices[:, None]
    index = (best_groups + width * columns[:group, None]).flatten(1)
    if group * width < vocabulary:
        index = torch.cat([index, columns[group * width :].expand(len(index), -1)], dim=1)
    candidates = logits.gather(1, index) if rows is None else logits[rows[:, None], index]
    values, position = candidates.topk(k, dim=1, sorted=False)
    return values, index.gather(1, position), lse


def _maxima(logits: torch.Tensor, rows: torch.Tensor, group: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest entry of each group of columns ``(n, width)``, and the log-sum-exp ``(n,)``, both float32."""
    n, tiles = len(rows), triton.cdiv(width, _BLOCK)
    best = torch.empty(n, width, device=logits.device)
    peak, total = torch.empty(2, n, tiles, device=logits.device)
    if n:
        _kernel[(n, tiles)](
            logits, rows, best, peak, total, logits.stride(0), logits.shape[1], width, GROUP=group, BLOCK=_BLOCK
        )  # fmt: skip
    return best, torch.logsumexp(peak + total.log(), dim=1)
