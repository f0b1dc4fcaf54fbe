"""Frozen linear maps with LoRA, whole or restricted to channels, applied to ranges of rows in one autograd function.

The rows of a batch are split into consecutive ranges, context tokens and output tokens, and each range may use other
channels of the same weight. `split_linear` is one input and several projections (q, k and v; gate and up),
`join_linear` one projection of inputs that differ by range (o; down). Both share the LoRA's thin products over all
ranges and give exact gradients of the input and of the LoRA factors; the frozen weights get none and nothing of their
size is kept. Rows before ``detached`` have no backward pass, as `sparselora.kernels.rows` says; ``adapted`` says
which rows the LoRA is active on, and the weight of some in the gradients of its factors.

Shapes: n rows, d_in inputs, d_out outputs, r the rank of all LoRAs of an input together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from sparselora.contextual.lora_update import Lora
from sparselora.contextual.operand import Operand
from sparselora.kernels.fp8 import Quantised, drop_twin, twin
from sparselora.kernels.rows import EVERY_ROW, AdapterRows, Rows, attached_rows

Tensor = torch.Tensor


Operands = Sequence[Sequence[Operand]]
"""Of each range of rows, an operand for each output (`split_linear`) or for each term of a sum (`join_linear`)."""


def _dropped(x: Tensor, loras: Sequence[Lora | None]) -> Tensor:
    """Return the input of the LoRA branch: ``x`` itself without dropout."""
    p = max((lora.dropout for lora in loras if lora is not None), default=0.0)
    return F.dropout(x, p, training=True) if p > 0 else x


def _distinct(operands: Operands) -> list[Lora]:
    """Return the LoRAs of all operands, each once."""
    loras = (operand.lora for range_operands in operands for operand in range_operands)
    return list({lora.key: lora for lora in loras if lora is not None}.values())


def _slices(loras: Sequence[Lora]) -> list[slice]:
    """Return the places of each LoRA's channels when all are side by side."""
    ends = [0]
    for lora in loras:
        ends.append(ends[-1] + lora.rank)
    return [slice(a, b) for a, b in pairwise(ends)]


def _stacked(loras: Sequence[Lora], dtype: torch.dtype) -> Tensor:
    """Return the A of all of them below one another, ``(r, d_in)``."""
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


def split_linear(
    x: Tensor, rows: Sequence[Rows], operands: Operands, detached: int = 0, adapted: AdapterRows = EVERY_ROW
) -> tuple[Tensor, ...]:
    """Return the outputs ``(len(rows), d_out)`` of every operand of every range, for ``x (n, d_in)``.

    Operands without ``columns``. A LoRA that several ranges use is one LoRA: its gradient is their sum.
    """
    loras = _distinct(operands)
    parameters = [parameter for lora in loras for parameter in lora.parameters]
    seen = _dropped(x, loras)
    parts = list(zip(rows, operands, strict=True))
    return _SplitLinear.apply(parts, loras, seen is not x, detached, adapted, x, seen, *parameters)


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: list[tuple[Rows, Sequence[Operand]]], loras: list[Lora], dropped: bool, detached: int,
        adapted: AdapterRows, x: Tensor, seen: Tensor, *_: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        places = {lora.key: place for lora, place in zip(loras, _slices(loras))}
        z: Any = adapted.project(seen, _stacked(loras, x.dtype), 0) if loras else None  # (n, d_in) (d_in, r)
        quantised = twin(x)
        outputs: dict[Rows, list[Tensor]] = {}
        for rows, operands in sorted(parts, key=lambda part: part[0].ready is not None):  # what is pending comes last
            rows.wait()
            thin = [None if o.lora is None else z[rows.slice, places[o.lora.key]] for o in operands]
            part = None if quantised is None else quantised.rows(rows.slice)
            outputs[rows] = [o.apply(x[rows.slice], t, twin=part) for o, t in zip(operands, thin)]
            # (rows, d_in) (d_in, d_out)
        drop_twin(x)
        ctx.parts, ctx.loras, ctx.places, ctx.dropped, ctx.shape = parts, loras, places, dropped, x.shape
        ctx.detached, ctx.adapted = detached, adapted
        saved: Any = (attached_rows(seen, detached), attached_rows(z, detached)) if loras else (None, None)
        if loras:
            adapted.weight_(saved[1], detached)  # z is for the gradient of B alone from here on
        ctx.save_for_backward(*saved)
        return tuple(y for rows, _ in parts for y in outputs[rows])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        seen, z = ctx.saved_tensors  # from row `detached` on, as everything below
        like = next(grad for grad in grads if grad is not None)
        whole = like.new_empty(ctx.shape) if ctx.needs_input_grad[5] else None
        dx = None if whole is None else whole[ctx.detached :]
        dz: Any = None if z is None else _covering(z, ctx.parts, ctx.loras, grads, ctx.detached)
        sums = {lora.key: _Sum(lora.d_out, lora.rank, 0) for lora in ctx.loras}
        remaining = iter(grads)
        for rows, operands in ctx.parts:
            attached = rows.after(ctx.detached)
            saved_rows = slice(attached.start - ctx.detached, attached.stop - ctx.detached)
            written = False
            for operand in operands:
                dy = next(remaining)
                if dy is None or not len(attached):
                    continue
                quantised, dy = _part(dy, slice(attached.start - rows.start, None))
                thin = None
                if operand.lora is not None:
                    place = ctx.places[operand.lora.key]
                    thin = dz[saved_rows, place]
                    torch.mm(dy, operand.b(dy.dtype), out=thin)  # (rows, d_out) (d_out, r)
                    sums[operand.lora.key].add(dy.t() @ z[saved_rows, place], operand.rows)  # (d_out, rows) (rows, r)
                if dx is not None:
                    # (rows, d_out) (d_out, d_in), and of the LoRA (rows, r) (r, d_in)
                    thin = None if ctx.dropped else thin
                    operand.transpose_into(dy, dx[saved_rows], thin, add=written, twin=quantised)
                    written = True
            if dx is not None and not written and len(attached):
                dx[saved_rows].zero_()
        d_seen: Any = None
        d_lora = []
        if ctx.loras:
            if ctx.dropped:
                d_seen = like.new_empty(ctx.shape)
                torch.mm(dz, _stacked(ctx.loras, like.dtype), out=d_seen[ctx.detached :])  # (n, r) (r, d_in)
            ctx.adapted.weight_(dz, ctx.detached)  # no input's gradient is made of dz any more
            dA = dz.t() @ seen  # (r, n) (n, d_in)
            for lora in ctx.loras:
                d_lora += lora.split(dA[ctx.places[lora.key]], sums[lora.key].value(like))
        return (None, None, None, None, None, whole, d_seen, *d_lora)


def _part(x: Tensor, rows: slice) -> tuple[Quantised | None, Tensor]:
    """Return rows of the fp8 twin of ``x``, where it has one, and of ``x`` itself."""
    quantised = twin(x)
    return None if quantised is None else quantised.rows(rows), x[rows]


def _covering(
    z: Tensor, parts: Sequence[tuple[Rows, Sequence[Operand]]], loras: Sequence[Lora], grads: Sequence[Tensor | None],
    detached: int,
) -> Tensor:  # fmt: skip
    """Return room for the gradient of ``z``, zeroed unless every part of it will be written."""
    remaining = iter(grads)
    for rows, operands in parts:
        factors = [(operand.lora, next(remaining)) for operand in operands]
        written = {lora.key for lora, grad in factors if lora is not None and grad is not None}
        if len(rows.after(detached)) and len(written) < len(loras):
            return torch.zeros_like(z)
    return torch.empty_like(z)


# --- one projection of inputs that differ by range ----------------------------------------------------------------


def join_linear(
    inputs: Sequence[Sequence[Tensor]], rows: Sequence[Rows], operands: Operands, shape: tuple[int, int],
    detached: int = 0, adapted: AdapterRows = EVERY_ROW,
) -> Tensor:  # fmt: skip
    """Return the rows ``shape = (n, d_out)``, each range the sum of its operands on their ``inputs``.

    A range without an operand is zero.

    Args:
        inputs: of each range, an input ``(len(rows), k)`` for each operand.
        rows: consecutive ranges, from row 0 to n.
        operands: all with a LoRA have the same one, and no ``rows``.
    """
    flat = [x for range_inputs in inputs for x in range_inputs]
    if not flat:
        raise ValueError("join_linear needs an input")
    loras = _distinct(operands)
    assert len(loras) <= 1, "one projection has one LoRA"
    seen = [_dropped(x, [o.lora]) for x, o in zip(flat, (o for range_operands in operands for o in range_operands))]
    dropped = any(a is not b for a, b in zip(flat, seen))
    parameters = loras[0].parameters if loras else []
    parts = list(zip(rows, operands, strict=True))
    seen = seen if dropped else []
    return _JoinLinear.apply(parts, loras, dropped, shape, detached, adapted, len(flat), *flat, *seen, *parameters)


class _JoinLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: list[tuple[Rows, Sequence[Operand]]], loras: list[Lora], dropped: bool, shape: tuple[int, int],
        detached: int, adapted: AdapterRows, count: int, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        inputs = tensors[:count]
        seen = tensors[count : 2 * count] if dropped else inputs
        dtype = inputs[0].dtype
        y = inputs[0].new_empty(shape)
        saved: list[Any] = []
        number = 0
        for rows, operands in parts:
            rows.wait()
            out = y[rows.slice]
            for position, operand in enumerate(operands):
                z = None if operand.lora is None else adapted.project(seen[number], operand.a(dtype), rows.start)
                # (rows, k) (k, r)
                if position == 0:
                    operand.apply(inputs[number], z, out, twin(inputs[number]))  # (rows, k) (k, d_out)
                else:
                    out.add_(operand.apply(inputs[number], z))
                drop_twin(inputs[number])
                first = rows.after(detached).start
                hidden = first - rows.start
                saved += [None, None] if z is None else [attached_rows(t, hidden) for t in (seen[number], z)]
                if z is not None:
                    adapted.weight_(saved[-1], first)  # z is for the gradient of B alone from here on
                number += 1
            if not operands:
                out.zero_()
        ctx.parts, ctx.loras, ctx.dropped, ctx.detached, ctx.adapted = parts, loras, dropped, detached, adapted
        ctx.save_for_backward(*saved)
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
        for rows, operands in ctx.parts:
            attached = rows.after(ctx.detached)
            quantised, dy = _part(grad, attached.slice)
            hidden = len(rows) - len(attached)
            for operand in operands:
                if not len(attached):
                    d_inputs.append(None)
                    d_seen.append(None)
                    continue
                seen, z = saved[2 * len(d_inputs) : 2 * len(d_inputs) + 2]
                dx = dy.new_empty(len(rows), operand.d_in)
                d_drop = None
                dz = None if z is None else dy @ operand.b(dy.dtype)  # (rows, d_out) (d_out, r)
                # (rows, d_out) (d_out, k), and of the LoRA (rows, r) (r, k)
                operand.transpose_into(dy, dx[hidden:], None if ctx.dropped else dz, add=False, twin=quantised)
                if dz is not None:
                    if ctx.dropped:
                        d_drop = torch.empty_like(dx)
                        torch.mm(dz, operand.a(dy.dtype), out=d_drop[hidden:])  # (rows, r) (r, k)
                    ctx.adapted.weight_(dz, attached.start)  # no input's gradient is made of dz any more
                    dA.add(dz.t() @ seen, operand.columns)  # (r, rows) (rows, k)
                    dB.add(dy.t() @ z, None)  # (d_out, rows) (rows, r)
                d_inputs.append(dx)
                d_seen.append(d_drop)
        parameters = [] if lora is None else lora.split(dA.value(grad), dB.value(grad))
        return (None, None, None, None, None, None, None, *d_inputs, *(d_seen if ctx.dropped else []), *parameters)
