"""Copy chosen columns of a matrix."""

from __future__ import annotations

import torch

from sparselora.kernels._dispatch import FLOATS, has_triton, use_triton

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _kernel(W, INDEX, OUT, rows, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
        position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        column = tl.load(INDEX + position, mask=position < count, other=0)
        inside = (row < rows) & (position[None, :] < count)
        value = tl.load(W + row * width + column[None, :], mask=inside, other=0)
        tl.store(OUT + row * count + position[None, :], value, mask=inside)


def take_columns(W: torch.Tensor, index: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """``W[:, index]`` as a new contiguous matrix; ``W (rows, width)``, ``index (count,)``."""
    if not use_triton(impl, W, (*FLOATS, torch.uint8)) or not W.is_contiguous():
        return W.index_select(1, index)
    rows, count = W.shape[0], len(index)
    out = torch.empty(rows, count, dtype=W.dtype, device=W.device)
    block = min(256, triton.next_power_of_2(count))
    grid = (triton.cdiv(rows, 8), triton.cdiv(count, block))
    _kernel[grid](W, index, out, rows, count, W.shape[1], ROWS=8, BLOCK=block, num_warps=4)
    return out
