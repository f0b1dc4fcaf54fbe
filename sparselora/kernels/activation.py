"""The product act(gate) · up of a gated FFN, with a backward pass that keeps its two inputs only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparselora.kernels._dispatch import has_triton, use_triton

Activation = Callable[[torch.Tensor], torch.Tensor]

_BLOCK = 1024

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(Y, OUT, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(Y + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(Y + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + row * width + column, (g * tl.sigmoid(g) * u).to(OUT.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(Y, D_OUT, D_Y, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(Y + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(Y + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(D_OUT + row * width + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        tl.store(D_Y + row * 2 * width + column, (d * u * s * (1 + g * (1 - s))).to(D_Y.dtype.element_ty), mask=inside)
        tl.store(D_Y + row * 2 * width + width + column, (d * g * s).to(D_Y.dtype.element_ty), mask=inside)


def gated_activation(y: torch.Tensor, act: Activation, impl: str = "auto") -> torch.Tensor:
    """``act(gate) · up`` for ``y (n, 2·width)`` with gate and up side by side; ``(n, width)``.

    One pass where ``act`` is SiLU and Triton runs.
    """
    if use_triton(impl, y) and is_silu(act):
        return _SwiGLU.apply(y)
    gate, up = y.chunk(2, dim=1)
    return act(gate) * up


def is_silu(act: Activation) -> bool:
    return isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation" or act is nn.functional.silu


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        y = y.contiguous()
        ctx.save_for_backward(y)
        rows, width = y.shape[0], y.shape[1] // 2
        out = torch.empty(rows, width, dtype=y.dtype, device=y.device)
        if rows:
            _forward_kernel[_grid(rows, width)](y, out, width, BLOCK=_BLOCK, num_warps=4)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        rows, width = y.shape[0], y.shape[1] // 2
        dy = torch.empty_like(y)
        if rows:
            _backward_kernel[_grid(rows, width)](y, d_out.contiguous(), dy, width, BLOCK=_BLOCK, num_warps=4)
        return dy


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, _BLOCK)
