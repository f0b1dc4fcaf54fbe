"""Replay a packed pass, forward and backward, as one CUDA graph: thousands of launches become one.

A graph belongs to one shape of padded layout (`TokenLayout.graph`) and one state of the adapter. To capture it costs
as much of the host's time as one to three replays take, so few shapes are captured when a run begins, and more where
they pay (`GraphedLoss.fitting`). The first pass of a state runs as usual, so that everything is compiled and loaded.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from sparselora.contextual.layout import TokenLayout, rounded_up
from sparselora.contextual.lora_update import stand_ins
from sparselora.kernels.slots import Rotation

Tensor = torch.Tensor
Run = Callable[[TokenLayout, Tensor, Rotation, dict[Any, Any]], Tensor]
"""The summed loss, from a layout, the embedded tokens ``(n, d)``, their rotation, and room for the choices it makes."""

_Shape = tuple[Hashable, tuple[int, int, int, int], int, int]
"""State, groups of rows (`TokenLayout.groups`), batch and width of a captured pass."""

_MOST_GRAPHS = 64

_LARGEST_EXCESS = 2.0
"""Rows, and width, of a graph that takes another shape's place, relative to that shape's."""

_EXCESS_THAT_PAYS = 0.5
"""Rows added in place of a graph of the batch's own shape, in steps, after which that graph is captured.

By a simulation (a capture takes 200 ms of the host, behind the replay of the larger graph where there is one; steps of
84 and of 197 ms at 4,096 tokens, else in proportion to their rows; means of three runs): tokens per second in the first
100 and in 1,000 batches, relative to the same without captures and padding, at 84 and at 197 ms.

    ==========================  ======================  ==============================
    captured                    8 rows of 256 to 512    GSM8K, 16 rows of like lengths
    ==========================  ======================  ==============================
    every shape at first sight  .63, .86  and .77, .91  .51, .82  and  .64, .87
    after 0.25 added steps      .73, .89  and .85, .93  .70, .88  and  .80, .91
    after 0.5 added steps       .74, .89  and .85, .92  .71, .87  and  .79, .90
    after 1 added step          .76, .89  and .84, .92  .71, .86  and  .76, .89
    after 2 added steps         .76, .88  and .83, .91  .67, .84  and  .72, .87
    ==========================  ======================  ==============================
"""


@dataclass
class _Captured:
    graph: Any
    inputs: list[Tensor]
    loss: Tensor
    choices: dict[Any, Any]
    memory: Any
    """What its kernels read and write beyond that, which must not be freed."""


class Fit(NamedTuple):
    """The padded layout to run a batch by, and another one of the same batch whose capture pays from now on."""

    layout: TokenLayout
    due: TokenLayout | None = None


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
        self._graphs: dict[_Shape, _Captured] = {}
        self._seen: set[Hashable] = set()
        self._excess: dict[_Shape, float] = {}
        self._pool: Any = None
        self._pass_bytes = 0

    def clear(self) -> None:
        """Forget every graph: what they compute with has changed."""
        if self._graphs and self.parameters and self.parameters[0].is_cuda:
            torch.cuda.synchronize(self.parameters[0].device)  # a replay may still run in the memory they free
        self._graphs.clear()
        self._seen.clear()
        self._excess.clear()
        self._pool = None  # it goes with the last graph that used it

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take ``parameters`` for the trained ones, some of which were replaced: every graph is forgotten."""
        self.clear()
        self.parameters, self._gradients, self._latest = list(parameters), [], None

    def fitting(self, state: Hashable, layout: TokenLayout) -> Fit:
        """Return the padded layout to run a batch by.

        That is ``layout.graph`` if its shape was captured; else that of the least graph that holds the batch, until the
        rows this adds have cost what a capture costs; else a coarse one, for a graph that will hold many batches.
        """
        exact = layout.graph
        assert exact is not None
        shape = _shape(state, exact)
        if shape in self._graphs or state not in self._seen or layout.host is None:
            return Fit(exact)
        larger = [
            (sum(groups), width, groups)
            for other, groups, batch, width in self._graphs
            if (other, batch) == (state, exact.batch)
            and all(n <= room for n, room in zip(exact.groups, groups))
            and exact.width <= width <= _LARGEST_EXCESS * exact.width
            and sum(groups) <= _LARGEST_EXCESS * exact.n
        ]
        if not larger:
            return Fit(exact if len(self._graphs) >= _MOST_GRAPHS else _coarse(layout))
        rows, width, groups = min(larger)
        self._excess[shape] = self._excess.get(shape, 0.0) + rows / exact.n - 1
        is_due = self._excess[shape] >= _EXCESS_THAT_PAYS and len(self._graphs) < _MOST_GRAPHS
        fitted = layout.host.padded_to(groups, width).to(layout.tokens.device)
        return Fit(fitted, exact if is_due else None)

    def loss(
        self, state: Hashable, fit: Fit, x: Tensor, rotation: Rotation, run: Run, choices: dict[Any, Any], memory: Any
    ) -> Tensor | None:
        """The summed loss by a graph for ``state`` and this shape; None where there is none yet and none is made.

        ``x`` and ``rotation`` are those of ``fit.layout``; ``choices`` is filled in. ``memory`` is what ``run`` reads
        and writes in place: a graph that is captured now keeps it.
        """
        shape = _shape(state, fit.layout)
        if shape not in self._graphs:
            if state not in self._seen or len(self._graphs) >= _MOST_GRAPHS:
                self._seen.add(state)
                return None
            self._graphs[shape] = self._capture(fit.layout, _inputs(fit.layout, x, rotation), run, memory)
        captured = self._graphs[shape]
        choices.update(captured.choices)
        for old, new in zip(captured.inputs, _inputs(fit.layout, x, rotation), strict=True):
            old.copy_(new, non_blocking=True)
        self.replays += 1
        loss: Tensor = _Replay.apply(self, captured, *self.parameters)
        if fit.due is not None:  # now: the device is busy with the replay
            rows = [tensor.new_zeros(fit.due.n, tensor.shape[1]) for tensor in (x, rotation.cos, rotation.sin)]
            inputs = _inputs(fit.due, rows[0], Rotation(*rows[1:]))
            self._graphs[_shape(state, fit.due)] = self._capture(fit.due, inputs, run, memory)
        return loss

    def _capture(self, layout: TokenLayout, inputs: Sequence[Tensor], run: Run, memory: Any) -> _Captured:
        """Capture a pass over tensors of the shapes of ``inputs``; every replay writes its own into them first."""
        held = [tensor.detach().clone() for tensor in inputs]
        x, cos, sin, slots, targets, counted, *places = held
        still = replace(
            layout, slots=slots, targets=targets, counted=counted, places=places[0] if places else None, graph=None,
            host=None,
        )  # fmt: skip
        if not self._gradients:
            self._gradients = [torch.empty_like(p) for p in self.parameters]
        choices: dict[Any, Any] = {}

        def compute() -> Tensor:
            choices.clear()
            with stand_ins(self.parameters) as leaves:
                loss = run(still, x, Rotation(cos, sin), choices)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            used = [(buffer, new) for buffer, new in zip(self._gradients, gradients) if new is not None]
            torch._foreach_copy_([buffer for buffer, _ in used], [new for _, new in used])
            unused = [buffer for buffer, new in zip(self._gradients, gradients) if new is None]
            if unused:
                torch._foreach_zero_(unused)
            return loss.detach()

        with torch.enable_grad():
            graph, loss = self._record(compute, x.device)
        self.captures += 1
        return _Captured(graph, held, loss, choices, memory)

    def _record(self, compute: Callable[[], Tensor], device: torch.device) -> tuple[Any, Tensor]:
        """Return a CUDA graph of what ``compute`` launches, and its result, which every replay writes again."""
        if self._pool is None or torch.cuda.mem_get_info(device)[0] < self._pass_bytes:
            # What the allocator keeps from other passes may be all that is left, and a capture cannot ask it back.
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        reserved = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        try:
            with _capturing(graph, self._pool, device):
                result = compute()
        except BaseException:
            if not self._graphs:
                self._pool = None  # it went with the only graph that used it
            raise
        self._pass_bytes = max(self._pass_bytes, torch.cuda.memory_reserved(device) - reserved)
        return graph, result


@contextmanager
def _capturing(graph: Any, pool: Any, device: torch.device) -> Iterator[None]:
    """Record what the block launches.

    `torch.cuda.graph` would wait for the device and empty the allocator's cache each time. Nothing is collected in the
    meantime, because an object's end may be a call that a capture forbids.
    """
    stream, current = _capture_stream(device), torch.cuda.current_stream(device)
    collects = gc.isenabled()
    gc.disable()
    # The beginning of a capture resets, at once, the offset of random numbers that all graphs of a device read.
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield
            except BaseException:  # which the user is to see, not the end of a capture that it made void
                try:
                    graph.capture_end()
                except RuntimeError:
                    torch._C._cuda_endAllocateToPool(current.device_index, pool)
                raise
            graph.capture_end()
    finally:
        if collects:
            gc.enable()
    current.wait_stream(stream)


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def _shape(state: Hashable, layout: TokenLayout) -> _Shape:
    return state, layout.groups, layout.batch, layout.width


def _coarse(layout: TokenLayout) -> TokenLayout:
    """Return a layout (moved from the CPU) padded further than `TokenLayout.graph`, to one of fewer shapes."""
    exact, host = layout.graph, layout.host
    assert exact is not None
    assert host is not None
    groups = [rounded_up(n, 1, parts=8) for n in exact.groups]
    width = rounded_up(max(exact.width, -(-sum(groups) // exact.batch)), 1, parts=4)
    return host.padded_to(groups, width).to(layout.tokens.device)


def _inputs(layout: TokenLayout, x: Tensor, rotation: Rotation) -> list[Tensor]:
    """Return the tensors that change from pass to pass, of a padded layout."""
    assert layout.counted is not None
    places = [] if layout.places is None else [layout.places]
    return [x, rotation.cos, rotation.sin, layout.slots, layout.targets, layout.counted, *places]


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
