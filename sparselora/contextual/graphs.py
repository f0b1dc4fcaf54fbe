"""Replay a packed pass, forward and backward, as one CUDA graph: thousands of launches become one.

A graph belongs to one shape of padded layout (`TokenLayout.graph`) and one state of the adapter. It is captured when
its shape comes for the first time, except that the first pass of a state runs as usual, so that everything is compiled
and loaded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sparselora.contextual.layout import TokenLayout
from sparselora.kernels.slots import Rotation

Tensor = torch.Tensor
Run = Callable[[TokenLayout, Tensor, Rotation], Tensor]
"""The summed loss, from a layout, the embedded tokens ``(n, d)`` and their rotation."""

_MOST_GRAPHS = 64


@dataclass
class _Captured:
    graph: Any
    inputs: list[Tensor]
    loss: Tensor
    choices: dict[Any, Any] = field(default_factory=dict)


class GraphedLoss:
    """Captured passes of one model over the same trained parameters.

    Attributes:
        captures, replays: how often each has happened.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.captures = self.replays = 0
        self._gradients: list[Tensor] = []
        self._latest: weakref.ref[_PendingGradients] | None = None
        self._graphs: dict[Hashable, _Captured] = {}
        self._seen: set[Hashable] = set()
        self._pool: Any = None

    def clear(self) -> None:
        """Forget every graph: what they compute with has changed."""
        self._graphs.clear()
        self._seen.clear()
        self._pool = None  # it goes with the last graph that used it

    def loss(
        self, state: Hashable, layout: TokenLayout, x: Tensor, rotation: Rotation, run: Run, choices: dict[Any, Any]
    ) -> Tensor | None:
        """The summed loss by a graph for ``state`` and this shape; None where there is none yet and none is made.

        ``choices`` is what ``run`` fills in, and is filled in here too.
        """
        key = (state, layout.n_context, layout.n_output, layout.batch, layout.width, x.dtype)
        if key not in self._graphs:
            if state not in self._seen or len(self._graphs) >= _MOST_GRAPHS:
                self._seen.add(state)
                return None
            self._graphs[key] = self._capture(layout, x, rotation, run)
            self._graphs[key].choices.update(choices)
        captured = self._graphs[key]
        choices.update(captured.choices)
        inputs = _inputs(layout, x, rotation)
        for old, new in zip(captured.inputs, inputs):
            old.copy_(new, non_blocking=True)
        self.replays += 1
        loss: Tensor = _Replay.apply(self, captured, *self.parameters)
        return loss

    def _capture(self, layout: TokenLayout, x: Tensor, rotation: Rotation, run: Run) -> _Captured:
        inputs = [tensor.detach().clone() for tensor in _inputs(layout, x, rotation)]
        x_, cos, sin, slots, targets, *counted = inputs
        still = replace(layout, slots=slots, targets=targets, counted=counted[0] if counted else None, graph=None)
        if not self._gradients:
            self._gradients = [torch.empty_like(p) for p in self.parameters]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.enable_grad(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = run(still, x_, Rotation(cos, sin))
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            used = [(buffer, new) for buffer, new in zip(self._gradients, gradients) if new is not None]
            torch._foreach_copy_([buffer for buffer, _ in used], [new for _, new in used])
            unused = [buffer for buffer, new in zip(self._gradients, gradients) if new is None]
            if unused:
                torch._foreach_zero_(unused)
            loss = loss.detach()
        self.captures += 1
        return _Captured(graph, inputs, loss)


def _inputs(layout: TokenLayout, x: Tensor, rotation: Rotation) -> list[Tensor]:
    counted = [] if layout.counted is None else [layout.counted]
    return [x, rotation.cos, rotation.sin, layout.slots, layout.targets, *counted]


class _PendingGradients:
    """The gradients of one pass: in the buffers that every replay overwrites, or copied from there before the next."""

    def __init__(self, replay: int) -> None:
        self.replay = replay
        self.copies: list[Tensor] | None = None


class _Replay(torch.autograd.Function):
    """The gradients are there with the loss: backward only scales them."""

    @staticmethod
    def forward(ctx: Any, owner: GraphedLoss, captured: _Captured, *parameters: Tensor) -> Tensor:
        latest = owner._latest() if owner._latest is not None else None
        if latest is not None:  # its backward is still to come
            latest.copies = [gradient.clone() for gradient in owner._gradients]
        captured.graph.replay()
        ctx.owner, ctx.pending = owner, _PendingGradients(owner.replays)
        owner._latest = weakref.ref(ctx.pending)
        return captured.loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        owner, pending = ctx.owner, ctx.pending
        if pending.copies is None and pending.replay != owner.replays:
            raise RuntimeError("backward a second time, after another pass: the gradients of this one are gone")
        gradients = torch._foreach_mul(owner._gradients if pending.copies is None else pending.copies, grad)
        if owner._latest is not None and owner._latest() is pending:
            owner._latest = None
        return (None, None, *gradients)
