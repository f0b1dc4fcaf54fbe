"""The product act(gate) · up of a gated FFN, with a backward pass that keeps its two inputs only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from sparselora.kernels import fp8
from sparselora.kernels._dispatch import has_triton, row_warps, use_triton
from sparselora.kernels.rows import attached_rows

Activation = Callable[[torch.Tensor], torch.Tensor]

_BLOCK = 1024

if has_triton():
    import triton
    import triton.language as tl

    from sparselora.kernels.fp8 import largest_magnitude, row_scale, store_quantised

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

    @triton.jit
    def _forward_row_kernel(
        Y, OUT, VALUES, SCALE, width, KEEP: tl.constexpr, INVERSE_MAX: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(Y + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(Y + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        out = (g * tl.sigmoid(g) * u).to(OUT.dtype.element_ty)
        if KEEP:
            tl.store(OUT + row * width + column, out, mask=inside)
        rounded = out.to(tl.float32)
        scale = row_scale(largest_magnitude(rounded), INVERSE_MAX)
        tl.store(SCALE + row, scale)
        store_quantised(rounded, scale, row * width + column, inside, VALUES)

    @triton.jit
    def _backward_row_kernel(
        Y, D_OUT, D_Y, VALUES, SCALE, width, KEEP: tl.constexpr, INVERSE_MAX: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        # Both halves of a row have one scale: to the products that follow they are one row.
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(Y + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(Y + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(D_OUT + row * width + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        dg = (d * u * s * (1 + g * (1 - s))).to(D_Y.dtype.element_ty)
        du = (d * g * s).to(D_Y.dtype.element_ty)
        place = row * 2 * width + column
        if KEEP:
            tl.store(D_Y + place, dg, mask=inside)
            tl.store(D_Y + place + width, du, mask=inside)
        largest = tl.maximum(largest_magnitude(dg.to(tl.float32)), largest_magnitude(du.to(tl.float32)))
        scale = row_scale(largest, INVERSE_MAX)
        tl.store(SCALE + row, scale)
        store_quantised(dg.to(tl.float32), scale, place, inside, VALUES)
        store_quantised(du.to(tl.float32), scale, place + width, inside, VALUES)


def gated_activation(
    y: torch.Tensor,
    act: Activation,
    impl: str = "auto",
    *,
    quantise: bool = False,
    keep_wide: bool = True,
    quantise_grad: bool = False,
    keep_wide_grad: bool = True,
    detached: int = 0,
) -> torch.Tensor:
    """``act(gate) · up`` for ``y (n, 2·width)`` with gate and up side by side; ``(n, width)``.

    One pass where ``act`` is SiLU and Triton runs; quantisation joins it for rows up to `fp8.WIDEST_ROW`.

    Args:
        quantise: give the result an fp8 twin.
        keep_wide: with ``quantise``, compute the result itself too; else it is a placeholder.
        quantise_grad: give the gradient of ``y`` an fp8 twin.
        keep_wide_grad: as ``keep_wide``, for that gradient.
        detached: rows before it have no backward pass, as `sparselora.kernels.rows` says.
    """
    fused = use_triton(impl, y) and is_silu(act)
    whole = fused and y.shape[1] // 2 <= fp8.WIDEST_ROW
    if quantise_grad and not whole:
        y = fp8.with_gradient_twin(y, keep_wide=keep_wide_grad, impl=impl)
    if fused:
        forward = _Twin(quantise and whole, keep_wide)
        out = _SwiGLU.apply(y, forward, _Twin(quantise_grad and whole, keep_wide_grad), detached)
    else:
        out = by_attachment(lambda y: act(y.chunk(2, dim=1)[0]) * y.chunk(2, dim=1)[1], y, detached)
    return fp8.with_twin(out, keep_wide=keep_wide, impl=impl) if quantise and not whole else out


def by_attachment(function: Activation, x: torch.Tensor, detached: int) -> torch.Tensor:
    """``function(x)``, which treats every row ``x (n, d)`` by itself, without a backward pass of the detached rows."""
    if detached == 0:
        return function(x)
    with torch.no_grad():
        first = function(x[:detached])
    return torch.cat((first, function(x[detached:])))


def is_silu(act: Activation) -> bool:
    return isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation" or act is nn.functional.silu


class _Twin(NamedTuple):
    """A tensor is to get a twin, and is computed itself too or a placeholder."""

    quantise: bool
    keep_wide: bool

    def empty(self, n: int, k: int, like: torch.Tensor) -> torch.Tensor:
        wide = self.keep_wide or not self.quantise
        return like.new_empty(n, k) if wide else fp8.placeholder(n, k, like.dtype, like.device)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, result: _Twin, gradient: _Twin, detached: int) -> torch.Tensor:
        y = y.contiguous()
        ctx.save_for_backward(attached_rows(y, detached))
        ctx.gradient, ctx.detached = gradient, detached
        rows, width = y.shape[0], y.shape[1] // 2
        out = result.empty(rows, width, y)
        if result.quantise:
            twin = fp8.empty_quantised(rows, width, fp8.WEIGHT_DTYPE, y.device)
            block = triton.next_power_of_2(width)
            if rows:
                _forward_row_kernel[(rows,)](
                    y, out, twin.values, twin.scale, width, KEEP=result.keep_wide,
                    INVERSE_MAX=fp8.inverse_max(fp8.WEIGHT_DTYPE), BLOCK=block, num_warps=row_warps(block),
                )  # fmt: skip
            fp8.attach_twin(out, twin)
        elif rows:
            _forward_kernel[_grid(rows, width)](y, out, width, BLOCK=_BLOCK, num_warps=4)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
        (y,) = ctx.saved_tensors
        rows, width = y.shape[0], y.shape[1] // 2
        dy = ctx.gradient.empty(ctx.detached + rows, 2 * width, y)
        attached, d_out = dy[ctx.detached :], d_out[ctx.detached :]
        if ctx.gradient.quantise:
            twin = fp8.empty_quantised(len(dy), 2 * width, fp8.GRADIENT_DTYPE, y.device)
            block = triton.next_power_of_2(width)
            if rows:
                values, scale = twin.values[ctx.detached :], twin.scale[ctx.detached :]
                _backward_row_kernel[(rows,)](
                    y, d_out.contiguous(), attached, values, scale, width, KEEP=ctx.gradient.keep_wide,
                    INVERSE_MAX=fp8.inverse_max(fp8.GRADIENT_DTYPE), BLOCK=block, num_warps=row_warps(block),
                )  # fmt: skip
            fp8.attach_twin(dy, twin)
        elif rows:
            _backward_kernel[_grid(rows, width)](y, d_out.contiguous(), attached, width, BLOCK=_BLOCK, num_warps=4)
        return dy, None, None, None


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, _BLOCK)
