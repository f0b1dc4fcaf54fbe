"""Residual addition and RMS normalisation in one pass."""

from __future__ import annotations

from typing import Any

import torch

from sparselora.kernels._dispatch import has_triton, use_triton

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(
        X, DELTA, WEIGHT, TOTAL, OUT, RSTD, d, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
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
        tl.store(OUT + row * d + column, (unit * weight).to(OUT.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(
        TOTAL, WEIGHT, RSTD, D_OUT, D_TOTAL, D_X, d, HAS_TOTAL: tl.constexpr, BLOCK: tl.constexpr
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


def add_rms_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``total = x + delta`` and ``weight · total / sqrt(mean(total²) + eps)``, per row.

    Args:
        x: residual stream ``(n, d)``; ``total`` has its dtype.
        delta: what is added, ``(n, d)``; None adds nothing and returns ``x`` itself.
        weight: ``(d,)``, frozen: it gets no gradient.
        out_dtype: of the second result; the dtype of ``x`` by default.
        impl: ``auto``, ``torch`` or ``triton``.
    """
    return _AddRMSNorm.apply(x, delta, weight, eps, out_dtype or x.dtype, use_triton(impl, x))


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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous()
        rows, d = x.shape
        if fused:
            total = torch.empty_like(x) if delta is not None else x
            out = torch.empty(rows, d, dtype=out_dtype, device=x.device)
            rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
            block = triton.next_power_of_2(d)
            _forward_kernel[(rows,)](
                x, x if delta is None else delta.contiguous(), weight, total, out, rstd, d, eps,
                HAS_DELTA=delta is not None, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
        else:
            total = x if delta is None else x + delta
            wide = total.to(_accumulation(x.dtype))
            rstd = torch.rsqrt(wide.square().mean(dim=-1) + eps)
            out = ((wide * rstd[:, None]).to(x.dtype) * weight).to(out_dtype)
        ctx.save_for_backward(total, weight, rstd)
        ctx.fused, ctx.delta_dtype = fused, None if delta is None else delta.dtype
        if delta is None:
            return x.view_as(x), out
        return total, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor | None, d_out: torch.Tensor) -> tuple[Any, ...]:
        total, weight, rstd = ctx.saved_tensors
        rows, d = total.shape
        if ctx.fused:
            dx = torch.empty_like(total)
            block = triton.next_power_of_2(d)
            _backward_kernel[(rows,)](
                total, weight, rstd, d_out.contiguous(), total if d_total is None else d_total.contiguous(), dx, d,
                HAS_TOTAL=d_total is not None, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
        else:
            unit = total.to(rstd.dtype) * rstd[:, None]
            g = d_out.to(rstd.dtype) * weight.to(rstd.dtype)
            dx = (rstd[:, None] * (g - unit * (g * unit).mean(dim=-1, keepdim=True))).to(total.dtype)
            if d_total is not None:
                dx = dx + d_total
        d_delta = None if ctx.delta_dtype is None else dx.to(ctx.delta_dtype)
        return dx, d_delta, None, None, None, None


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
