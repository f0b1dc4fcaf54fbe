"""Frozen linear maps with LoRA, whole or restricted to channels, applied to parts of a batch in one autograd function.

The rows of a batch are split into consecutive segments, context tokens and output tokens, and each segment may use
other channels of the same weight. `split_linear` is one input and several projections (q, k and v; gate and up),
`join_linear` one projection of inputs that differ by segment (o; down). Both share the LoRA's thin products over all
segments and give exact gradients of the input and of the LoRA factors; the frozen weights get none and nothing of their
size is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from sparselora.contextual.frozen import Lora, Operand

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows ``start:stop``. Of `split_linear` an operand each output; of `join_linear` the terms of a sum, in order.

    ``ready`` is the event after which the operands may be used, where another stream makes them.
    """

    start: int
    stop: int
    operands: tuple[Operand, ...]
    ready: Any = None

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def wait(self) -> None:
        if self.ready is not None:
            torch.cuda.current_stream().wait_event(self.ready)


def _dropped(x: Tensor, loras: Sequence[Lora | None]) -> Tensor:
    """What the LoRA branch sees of ``x``: the same tensor without dropout."""
    p = max((lora.dropout for lora in loras if lora is not None), default=0.0)
    return F.dropout(x, p, training=True) if p > 0 else x


def _distinct(segments: Sequence[Segment]) -> list[Lora]:
    """The LoRAs of all operands, each once."""
    found = (operand.lora for segment in segments for operand in segment.operands)
    return list({lora.key: lora for lora in found if lora is not None}.values())


def _slices(loras: Sequence[Lora]) -> list[slice]:
    """Where each LoRA's channels stand when all are side by side."""
    ends = [0]
    for lora in loras:
        ends.append(ends[-1] + lora.rank)
    return [slice(a, b) for a, b in pairwise(ends)]


def _stacked(loras: Sequence[Lora], dtype: torch.dtype) -> Tensor:
    """The A of all of them below one another."""
    parts = [lora.a(dtype) for lora in loras]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Sum:
    """A gradient ``(rows, columns)`` from parts that reach all of it, or some indices along ``dim``."""

    def __init__(self, rows: int, columns: int, dim: int) -> None:
        self._shape, self._dim = (rows, columns), dim
        self._total: Tensor | None = None

    def add(self, part: Tensor, index: Tensor | None) -> None:
        if index is not None:
            if self._total is None:
                self._total = part.new_zeros(self._shape)
            self._total.index_add_(self._dim, index, part)
        elif self._total is None:
            self._total = part
        else:
            self._total.add_(part)

    def value(self, like: Tensor) -> Tensor:
        return like.new_zeros(self._shape) if self._total is None else self._total


# --- one input, several projections -------------------------------------------------------------------------------


def split_linear(x: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, ...]:
    """The outputs ``(stop - start, d_out)`` of every operand of every segment, for ``x (n, d_in)``.

    Operands without ``columns``. A LoRA that several segments use is one LoRA: its gradient is their sum.
    """
    loras = _distinct(segments)
    parameters = [parameter for lora in loras for parameter in lora.parameters]
    seen = _dropped(x, loras)
    return _SplitLinear.apply(segments, loras, seen is not x, x, seen, *parameters)


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, segments: Sequence[Segment], loras: list[Lora], apart: bool, x: Tensor, seen: Tensor, *_: Tensor
    ) -> tuple[Tensor, ...]:
        places = {lora.key: place for lora, place in zip(loras, _slices(loras))}
        z: Any = seen @ _stacked(loras, x.dtype).t() if loras else None
        outputs: dict[Segment, list[Tensor]] = {}
        for segment in sorted(segments, key=lambda each: each.ready is not None):  # what is still made comes last
            segment.wait()
            thin = [None if o.lora is None else z[segment.rows, places[o.lora.key]] for o in segment.operands]
            outputs[segment] = [o.apply(x[segment.rows], t) for o, t in zip(segment.operands, thin)]
        ctx.segments, ctx.loras, ctx.places, ctx.apart, ctx.shape = segments, loras, places, apart, x.shape
        ctx.save_for_backward(seen if loras else None, z)
        return tuple(y for segment in segments for y in outputs[segment])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        seen, z = ctx.saved_tensors
        like = next(grad for grad in grads if grad is not None)
        dx = like.new_empty(ctx.shape) if ctx.needs_input_grad[3] else None
        dz: Any = None if z is None else _covering(z, ctx.segments, ctx.loras, grads)
        sums = {lora.key: _Sum(lora.d_out, lora.rank, 0) for lora in ctx.loras}
        remaining = iter(grads)
        for segment in ctx.segments:
            written = False
            for operand in segment.operands:
                dy = next(remaining)
                if dy is None or not len(dy):
                    continue
                thin = None
                if operand.lora is not None:
                    place = ctx.places[operand.lora.key]
                    thin = dz[segment.rows, place]
                    torch.mm(dy, operand.b(dy.dtype), out=thin)
                    sums[operand.lora.key].add(dy.t() @ z[segment.rows, place], operand.rows)
                if dx is not None:
                    operand.transpose_into(dy, dx[segment.rows], None if ctx.apart else thin, add=written)
                    written = True
            if dx is not None and not written:
                dx[segment.rows].zero_()
        d_seen, d_lora = None, []
        if ctx.loras:
            dA = dz.t() @ seen
            if ctx.apart:
                d_seen = dz @ _stacked(ctx.loras, like.dtype)
            for lora in ctx.loras:
                d_lora += lora.split(dA[ctx.places[lora.key]], sums[lora.key].value(like))
        return (None, None, None, dx, d_seen, *d_lora)


def _covering(z: Tensor, segments: Sequence[Segment], loras: Sequence[Lora], grads: Sequence[Tensor | None]) -> Tensor:
    """Room for the gradient of ``z``, zeroed unless every part of it will be written."""
    used = [{o.lora.key for o in s.operands if o.lora is not None} for s in segments]
    full = all(len(u) == len(loras) for u in used) and all(g is not None for g in grads)
    return torch.empty_like(z) if full else torch.zeros_like(z)


# --- one projection of inputs that differ by segment --------------------------------------------------------------


def join_linear(inputs: Sequence[Sequence[Tensor]], segments: Sequence[Segment], shape: tuple[int, int]) -> Tensor:
    """The rows ``shape = (n, d_out)``, each segment the sum of its operands on their ``inputs``; without any, zero.

    Args:
        inputs: of each segment, one ``(stop - start, k)`` an operand.
        segments: consecutive, from row 0 to n; all operands with a LoRA have the same one, and no ``rows``.
    """
    flat = [x for row in inputs for x in row]
    if not flat:
        raise ValueError("join_linear needs an input")
    loras = _distinct(segments)
    assert len(loras) <= 1, "one projection has one LoRA"
    seen = [
        _dropped(x, [o.lora]) for x, o in zip(flat, (o for s in segments for o in s.operands))
    ]  # fmt: skip
    apart = any(a is not b for a, b in zip(flat, seen))
    parameters = loras[0].parameters if loras else []
    return _JoinLinear.apply(segments, loras, apart, shape, len(flat), *flat, *(seen if apart else []), *parameters)


class _JoinLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, segments: Sequence[Segment], loras: list[Lora], apart: bool, shape: tuple[int, int], count: int,
        *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        inputs = tensors[:count]
        seen = tensors[count : 2 * count] if apart else inputs
        dtype = inputs[0].dtype
        y = inputs[0].new_empty(shape)
        kept: list[Tensor | None] = []
        number = 0
        for segment in segments:
            segment.wait()
            out = y[segment.rows]
            for position, operand in enumerate(segment.operands):
                z = None if operand.lora is None else seen[number] @ operand.a(dtype).t()
                if position == 0:
                    operand.apply(inputs[number], z, out)
                else:
                    out.add_(operand.apply(inputs[number], z))
                kept += [seen[number] if z is not None else None, z]
                number += 1
            if not segment.operands:
                out.zero_()
        ctx.segments, ctx.loras, ctx.apart, ctx.count = segments, loras, apart, count
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad = grad.contiguous()
        saved = ctx.saved_tensors  # once: under recomputation each look at it unpacks
        lora: Any = ctx.loras[0] if ctx.loras else None
        dA: Any = None
        dB: Any = None
        if lora is not None:
            dA, dB = _Sum(lora.rank, lora.adapters[0].A.shape[1], 1), _Sum(lora.d_out, lora.rank, 0)
        d_inputs: list[Tensor | None] = []
        d_seen: list[Tensor | None] = []
        for segment in ctx.segments:
            dy = grad[segment.rows]
            for operand in segment.operands:
                seen, z = saved[2 * len(d_inputs) : 2 * len(d_inputs) + 2]
                width = operand.pre.shape[1] if operand.pre is not None else operand.get().shape[1]
                dx = dy.new_empty(len(dy), width)
                d_drop = dz = None
                if z is not None:
                    dz = dy @ operand.b(dy.dtype)
                    d_drop = dz @ operand.a(dy.dtype) if ctx.apart else None
                    dA.add(dz.t() @ seen, operand.columns)
                    dB.add(dy.t() @ z, None)
                operand.transpose_into(dy, dx, None if ctx.apart else dz, add=False)
                d_inputs.append(dx)
                d_seen.append(d_drop)
        parameters = [] if lora is None else lora.split(dA.value(grad), dB.value(grad))
        return (None, None, None, None, None, *d_inputs, *(d_seen if ctx.apart else []), *parameters)
