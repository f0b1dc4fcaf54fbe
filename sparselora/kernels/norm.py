"""Residual addition and RMS normalisation in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sparselora.kernels import fp8
from sparselora.kernels._dispatch import has_triton, row_warps, use_triton
from sparselora.kernels.rows import attached_rows

if has_triton():
    import triton
    import triton.language as tl

    from sparselora.kernels.fp8 import largest_magnitude, row_scale, store_quantised

    @triton.jit
    def _forward_kernel(
        X, DELTA, WEIGHT, TOTAL, OUT, RSTD, VALUES, SCALE, d, eps, HAS_DELTA: tl.constexpr, QUANTISE: tl.constexpr,
        KEEP: tl.constexpr, INVERSE_MAX: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < d
        x = tl.load(X + row * d + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_DELTA:
            x += tl.load(DELTA + row * d + column, mask=inside, other=0.0).to(tl.float32)
            x = x.to(TOTAL.dtype.element_ty)
            tl.store(TOTAL + row * d + column, x, mask=inside)
            x = x.to(tl.float32)
        rstd = 1 / tl.sqrt(tl.sum(x * x, axis=0) / d + eps)
        tl.store(RSTD + row, rstd)
        weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32)
        unit = (x * rstd).to(X.dtype.element_ty).to(tl.float32)
        out = (unit * weight).to(OUT.dtype.element_ty)
        if KEEP:
            tl.store(OUT + row * d + column, out, mask=inside)
        if QUANTISE:
            rounded = out.to(tl.float32)
            scale = row_scale(largest_magnitude(rounded), INVERSE_MAX)
            tl.store(SCALE + row, scale)
            store_quantised(rounded, scale, row * d + column, inside, VALUES)

    @triton.jit
    def _backward_kernel(
        TOTAL, WEIGHT, RSTD, D_OUT, D_TOTAL, D_X, D_DELTA, VALUES, SCALE, d, HAS_TOTAL: tl.constexpr,
        QUANTISE: tl.constexpr, INVERSE_MAX: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < d
        rstd = tl.load(RSTD + row)
        unit = tl.load(TOTAL + row * d + column, mask=inside, other=0.0).to(tl.float32) * rstd
        weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(D_OUT + row * d + column, mask=inside, other=0.0).to(tl.float32) * weight
        dx = rstd * (g - unit * (tl.sum(g * unit, axis=0) / d))
        if HAS_TOTAL:
            dx += tl.load(D_TOTAL + row * d + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(D_X + row * d + column, dx.to(D_X.dtype.element_ty), mask=inside)
        if QUANTISE:  # what delta's gradient is: dx, in the dtype of delta
            rounded = dx.to(D_X.dtype.element_ty).to(D_DELTA.dtype.element_ty).to(tl.float32)
            scale = row_scale(largest_magnitude(rounded), INVERSE_MAX)
            tl.store(SCALE + row, scale)
            store_quantised(rounded, scale, row * d + column, inside, VALUES)


def add_rms_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
    *,
    quantise: bool = False,
    keep_wide: bool = True,
    quantise_grad: bool = False,
    detached: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``total = x + delta`` and ``weight · total / sqrt(mean(total²) + eps)``, per row.

    Args:
        x: residual stream ``(n, d)``; ``total`` has its dtype.
        delta: what is added, ``(n, d)``; None adds nothing and returns ``x`` itself.
        weight: ``(d,)``, frozen: it gets no gradient.
        out_dtype: of the second result; the dtype of ``x`` by default.
        impl: ``auto``, ``torch`` or ``triton``.
        quantise: give the second result an fp8 twin.
        keep_wide: with ``quantise``, compute the second result itself too; else it is a placeholder.
        quantise_grad: give the gradient of ``delta`` an fp8 twin.
        detached: rows before it have no backward pass, as `sparselora.kernels.rows` says.
    """
    twins = _Twins(quantise, keep_wide or not quantise, quantise_grad and delta is not None)
    return _AddRMSNorm.apply(x, delta, weight, eps, out_dtype or x.dtype, use_triton(impl, x), twins, detached)


class _Twins(NamedTuple):
    forward: bool
    keep_wide: bool
    backward: bool


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        out_dtype: torch.dtype,
        fused: bool,
        twins: _Twins,
        detached: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous()
        rows, d = x.shape
        if fused:
            total = torch.empty_like(x) if delta is not None else x
            out = fp8.placeholder(rows, d, out_dtype, x.device)
            if twins.keep_wide:
                out = torch.empty(rows, d, dtype=out_dtype, device=x.device)
            rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
            twin = fp8.empty_quantised(rows, d, fp8.WEIGHT_DTYPE, x.device) if twins.forward else None
            block = triton.next_power_of_2(d)
            _forward_kernel[(rows,)](
                x, x if delta is None else delta.contiguous(), weight, total, out, rstd,
                *((rstd, rstd) if twin is None else (twin.values, twin.scale)), d, eps,
                HAS_DELTA=delta is not None, QUANTISE=twins.forward, KEEP=twins.keep_wide,
                INVERSE_MAX=fp8.inverse_max(fp8.WEIGHT_DTYPE), BLOCK=block, num_warps=row_warps(block),
            )  # fmt: skip
        else:
            total = x if delta is None else x + delta
            wide = total.to(_accumulation(x.dtype))
            rstd = torch.rsqrt(wide.square().mean(dim=-1) + eps)
            out = ((wide * rstd[:, None]).to(x.dtype) * weight).to(out_dtype)
            twin = fp8.quantise_rows(out, impl="torch") if twins.forward else None
            if not twins.keep_wide:
                out = fp8.placeholder(rows, d, out_dtype, x.device)
        if twin is not None:
            fp8.attach_twin(out, twin)
        ctx.save_for_backward(attached_rows(total, detached), weight, attached_rows(rstd, detached))
        ctx.fused, ctx.detached, ctx.delta_dtype = fused, detached, None if delta is None else delta.dtype
        ctx.quantise = twins.backward
        if delta is None:
            return x.view_as(x), out
        return total, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor | None, d_out: torch.Tensor) -> tuple[Any, ...]:
        total, weight, rstd = ctx.saved_tensors
        rows, d = total.shape
        whole = total.new_empty(ctx.detached + rows, d)
        dx, d_out = whole[ctx.detached :], d_out[ctx.detached :]
        d_total = None if d_total is None else d_total[ctx.detached :]
        whole_twin: fp8.Quantised | None = None
        if ctx.quantise and ctx.fused:
            whole_twin = fp8.empty_quantised(len(whole), d, fp8.GRADIENT_DTYPE, total.device)
        if ctx.fused and not rows:
            pass
        elif ctx.fused:
            like_delta = total if ctx.delta_dtype in (None, dx.dtype) else total.new_empty(1, dtype=ctx.delta_dtype)
            twin = None if whole_twin is None else whole_twin.rows(slice(ctx.detached, None))
            block = triton.next_power_of_2(d)
            _backward_kernel[(rows,)](
                total, weight, rstd, d_out.contiguous(), total if d_total is None else d_total.contiguous(), dx,
                like_delta, *((rstd, rstd) if twin is None else (twin.values, twin.scale)), d,
                HAS_TOTAL=d_total is not None, QUANTISE=twin is not None,
                INVERSE_MAX=fp8.inverse_max(fp8.GRADIENT_DTYPE), BLOCK=block, num_warps=row_warps(block),
            )  # fmt: skip
        else:
            unit = total.to(rstd.dtype) * rstd[:, None]
            g = d_out.to(rstd.dtype) * weight.to(rstd.dtype)
            dx.copy_(rstd[:, None] * (g - unit * (g * unit).mean(dim=-1, keepdim=True)))
            if d_total is not None:
                dx.add_(d_total)
            if ctx.quantise:
                quantised = fp8.quantise_rows(dx.to(ctx.delta_dtype), fp8.GRADIENT_DTYPE, impl="torch")
                whole_twin = fp8.after_detached(quantised, ctx.detached)
        d_delta = None if ctx.delta_dtype is None else whole.to(ctx.delta_dtype)
        if d_delta is not None and whole_twin is not None:
            fp8.attach_twin(d_delta, whole_twin)
        return whole, d_delta, None, None, None, None, None, None


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
