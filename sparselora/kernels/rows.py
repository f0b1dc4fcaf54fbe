"""A range of packed rows, and the channels that they hold.

Rows before ``detached`` take part in the forward pass only: nothing of them is kept for the backward pass, and their
part of a gradient is never computed or read, so it holds whatever memory held. What hands a gradient to other code
fills that part with zeros first (`detach_rows`, `sparselora.kernels.slots.from_slots`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Channels:
    """Some of ``total`` channels: ``index (k,)`` int64 ascending; ``inverse (total,)`` int32, -1 where absent."""

    index: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, index: torch.Tensor, total: int) -> Channels:
        inverse = torch.full((total,), -1, dtype=torch.int32, device=index.device)
        inverse[index] = torch.arange(len(index), dtype=torch.int32, device=index.device)
        return cls(index, inverse)


@dataclass(frozen=True, eq=False)
class Rows:
    """Consecutive rows ``start:stop`` of a packed batch that are treated alike.

    Attributes:
        channels: the channels that these rows hold; None for all.
        ready: the CUDA event after which the operands of these rows may be read, where a side stream makes them.
    """

    start: int
    stop: int
    channels: Channels | None = None
    ready: Any = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def wait(self) -> None:
        """Make the current stream wait until the operands are ready."""
        if self.ready is not None:
            torch.cuda.current_stream(self.ready.device).wait_event(self.ready)

    def after(self, row: int) -> Rows:
        """Return the rows of this range from ``row`` on; empty where all come before it."""
        return Rows(min(max(self.start, row), self.stop), self.stop, self.channels, self.ready)


@dataclass(frozen=True)
class AdapterRows:
    """The part that the rows of a packed batch have in a LoRA.

    Attributes:
        n_inactive: rows before it do without the LoRA. They have no backward pass: `detached` is as large, or larger.
        n_weighted: what rows before it give to the gradients of the LoRA counts ``factor`` times, as that of a random
            sample of rows which stand for all; the gradient of the input stays as it is.
        factor: their weight.
    """

    n_inactive: int = 0
    n_weighted: int = 0
    factor: float = 1.0

    def after(self, row: int) -> AdapterRows:
        """Return the same of the rows from ``row`` on."""
        return AdapterRows(max(0, self.n_inactive - row), max(0, self.n_weighted - row), self.factor)

    def project(self, x: torch.Tensor, A: torch.Tensor, start: int) -> torch.Tensor:
        """Return ``x Aᵀ (n, r)`` for rows ``x (n, d_in)`` from ``start`` on, zero where the LoRA is inactive."""
        inactive = min(max(0, self.n_inactive - start), len(x))
        if inactive == 0:
            return x @ A.t()
        z = x.new_zeros(len(x), len(A))
        torch.mm(x[inactive:], A.t(), out=z[inactive:])
        return z

    def weight_(self, x: torch.Tensor, start: int) -> None:
        """Multiply in place the weighted rows of ``x``, whose first row is ``start``, by their weight."""
        if self.n_weighted > start and self.factor != 1:
            x[: self.n_weighted - start].mul_(self.factor)


EVERY_ROW = AdapterRows()
"""Every row, once."""


def attached_rows(x: torch.Tensor, detached: int) -> torch.Tensor:
    """Return ``x[detached:]`` in memory of its own, so that keeping it does not keep the detached rows; ``x`` for 0."""
    return x if detached == 0 else x[detached:].clone()


def detach_rows(x: torch.Tensor, detached: int) -> torch.Tensor:
    """Return ``x (n, d)`` as it is, where a gradient of zero reaches the rows before ``detached``."""
    return x if detached == 0 or not x.requires_grad else _DetachRows.apply(x, detached)


class _DetachRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, detached: int) -> torch.Tensor:
        ctx.detached = detached
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone()  # an engine may hand the same tensor to others
        grad[: ctx.detached].zero_()
        return grad, None
