"""Cross-entropy of a frozen output layer, without keeping logits: its gradient is formed with the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from sparselora.kernels._dispatch import has_triton, use_triton

Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

_CHUNK_LOGITS = 1 << 28
"""Logits formed at a time: 2**28 bfloat16 values are 512 MiB."""

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _kernel(LOGITS, TARGET, LOSS, vocabulary, BLOCK: tl.constexpr):
        # One row: the log-sum-exp in one pass, then its softmax minus the target in place.
        row = tl.program_id(0).to(tl.int64)
        base = LOGITS + row * vocabulary
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(base + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
            new = tl.maximum(largest, x)
            scale = tl.where(new == float("-inf"), 0.0, tl.exp(largest - new))
            total = total * scale + tl.where(x == float("-inf"), 0.0, tl.exp(x - new))
            largest = new
        top = tl.max(largest, axis=0)
        lse = top + tl.log(tl.sum(tl.where(largest == float("-inf"), 0.0, total * tl.exp(largest - top)), axis=0))
        target = tl.load(TARGET + row)
        counts = target >= 0
        tl.store(LOSS + row, tl.where(counts, lse - tl.load(base + tl.maximum(target, 0)).to(tl.float32), 0.0))
        tl.debug_barrier()
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(base + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
            grad = tl.where(counts, tl.exp(x - lse) - tl.where(column == target, 1.0, 0.0), 0.0)
            tl.store(base + column, grad.to(LOGITS.dtype.element_ty), mask=column < vocabulary)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    impl: str = "auto",
    observe: Observer | None = None,
) -> torch.Tensor:
    """Sum over rows of the cross-entropy of ``x weightᵀ + bias`` against ``targets``, a float32 (or 64) scalar.

    Args:
        x: rows that carry a label, ``(n, d)``.
        weight: ``(vocabulary, d)``, frozen: it gets no gradient, nor does ``bias (vocabulary,)``.
        targets: class of each row ``(n,)``; a row with a negative one does not count.
        observe: called with rows of ``x``, their logits and their targets, a chunk at a time; it must not change them.
    """
    return _LinearCrossEntropy.apply(x, weight, bias, targets, use_triton(impl, x), observe)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, fused: bool,
        observe: Observer | None,
    ) -> torch.Tensor:  # fmt: skip
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        dx = torch.empty_like(x)
        rows = max(1, _CHUNK_LOGITS // weight.shape[0])
        for start in range(0, len(x), rows):
            part, target = x[start : start + rows], targets[start : start + rows]
            logits = F.linear(part, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            if observe is not None:
                observe(part, logits, target)
            if fused:
                losses = torch.empty(len(part), dtype=torch.float32, device=x.device)
                _kernel[(len(part),)](logits, target, losses, logits.shape[1], BLOCK=4096, num_warps=8)
                loss += losses.sum()
            else:
                wide = logits.to(loss.dtype)
                lse = torch.logsumexp(wide, dim=-1, keepdim=True)
                counts, index = (target >= 0)[:, None], target.clamp_min(0)[:, None]
                loss += ((lse - wide.gather(1, index)) * counts).sum()
                grad = (wide - lse).exp_()
                grad.scatter_add_(1, index, -torch.ones_like(lse))
                logits = (grad * counts).to(x.dtype)
            torch.mm(logits, weight.to(x.dtype), out=dx[start : start + rows])
        ctx.save_for_backward(dx)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (dx,) = ctx.saved_tensors
        return dx * grad.to(dx.dtype), None, None, None, None, None
