"""The product act(gate) · up of a gated FFN, with a backward pass that keeps its two inputs only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparselora.kernels._dispatch import has_triton, use_triton

Activation = Callable[[torch.Tensor], torch.Tensor]

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(GATE, UP, OUT, n, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        g = tl.load(GATE + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(UP + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + at, (g * tl.sigmoid(g) * u).to(OUT.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(GATE, UP, D_OUT, D_GATE, D_UP, n, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        g = tl.load(GATE + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(UP + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(D_OUT + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        tl.store(D_UP + at, (d * g * s).to(D_UP.dtype.element_ty), mask=inside)
        tl.store(D_GATE + at, (d * u * s * (1 + g * (1 - s))).to(D_GATE.dtype.element_ty), mask=inside)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, act: Activation, impl: str = "auto") -> torch.Tensor:
    """``act(gate) · up``, elementwise; one pass where ``act`` is SiLU and Triton runs."""
    if use_triton(impl, gate) and is_silu(act):
        return _SwiGLU.apply(gate, up)
    return act(gate) * up


def is_silu(act: Activation) -> bool:
    return isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation" or act is nn.functional.silu


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        n = gate.numel()
        _forward_kernel[(triton.cdiv(n, 4096),)](gate.contiguous(), up.contiguous(), out, n, BLOCK=4096, num_warps=8)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        n = gate.numel()
        _backward_kernel[(triton.cdiv(n, 4096),)](
            gate, up, d_out.contiguous(), d_gate, d_up, n, BLOCK=4096, num_warps=8
        )
        return d_gate, d_up
