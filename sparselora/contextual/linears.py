"""Frozen linear maps with LoRA, whole or restricted to channels, applied to parts of a batch in one autograd function.

The rows of a batch are split into consecutive segments, context tokens and output tokens, and each segment may use other
channels of the same weight. `split_linear` is one input and several projections (q, k and v; gate and up), `join_linear`
one projection of inputs that differ by segment (o; down). Both share the LoRA's thin products over all segments and
give exact gradients of the input and of the LoRA factors; the frozen weights get none and nothing of their size is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparselora.contextual.structure import base_layer, out_in
from sparselora.errors import InputError

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA of one linear layer: ``A (r, d_in)``, ``B (d_out, r)``."""

    A: nn.Parameter
    B: nn.Parameter
    scale: float
    dropout: float


@dataclass(frozen=True, eq=False)
class Lora:
    """The update ``B A`` of a layer, or of layers with one input whose outputs stand side by side.

    ``A (Σr, d_in)`` has the adapters' A below one another, ``B (Σd_out, Σr)`` their scale · B along its diagonal, zero
    where a layer has no adapter. ``outs`` and ``ranks`` say where each adapter stands. ``cast`` holds A and B in the
    dtype of a pass where they were made for the whole model at once.
    """

    adapters: tuple[Adapter, ...]
    outs: tuple[slice, ...]
    ranks: tuple[slice, ...]
    d_out: int
    cast: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, adapters: Sequence[Adapter | None], widths: Sequence[int], cast: Any = None) -> Lora | None:
        """The common update of layers of ``widths`` outputs; None where none has an adapter."""
        found, outs, ranks, at, r = [], [], [], 0, 0
        for adapter, width in zip(adapters, widths):
            if adapter is not None:
                found.append(adapter)
                outs.append(slice(at, at + width))
                ranks.append(slice(r, r + len(adapter.A)))
                r += len(adapter.A)
            at += width
        return cls(tuple(found), tuple(outs), tuple(ranks), at, cast) if found else None

    @property
    def key(self) -> int:
        return id(self.adapters[0].A)

    @property
    def rank(self) -> int:
        return self.ranks[-1].stop

    @property
    def dropout(self) -> float:
        return max(adapter.dropout for adapter in self.adapters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self.adapters for parameter in (adapter.A, adapter.B)]

    def a(self, dtype: torch.dtype) -> Tensor:
        if self.cast is not None and self.cast[0].dtype == dtype:
            return self.cast[0]
        parts = [adapter.A.detach().to(dtype) for adapter in self.adapters]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def b(self, dtype: torch.dtype) -> Tensor:
        if self.cast is not None and self.cast[1].dtype == dtype:
            return self.cast[1]
        block = torch.zeros(self.d_out, self.rank, dtype=dtype, device=self.adapters[0].B.device)
        for adapter, out, rank in zip(self.adapters, self.outs, self.ranks):
            block[out, rank] = adapter.B.detach() * adapter.scale
        return block

    def split(self, dA: Tensor, dB: Tensor) -> list[Tensor]:
        """Gradients of `parameters` from those of A and B."""
        found = []
        for adapter, out, rank in zip(self.adapters, self.outs, self.ranks):
            found += [dA[rank].to(adapter.A.dtype), dB[out, rank].to(adapter.B.dtype) * adapter.scale]
        return found


@dataclass(frozen=True, eq=False)
class Operand:
    """A frozen map ``x → weight (pre x) + bias`` of one segment, and where a LoRA joins in.

    ``weight (d_out, d_in)`` is a tensor, or a function that makes one where the stored weight is quantised: then it is
    made again for the backward pass and not kept. ``pre (R, d_in)`` comes before a weight ``(d_out, R)``; None is the
    identity. ``rows`` and ``columns`` are the channels that ``weight`` was restricted to: the LoRA is restricted alike.
    """

    weight: Tensor | Callable[[], Tensor]
    bias: Tensor | None = None
    pre: Tensor | None = None
    lora: Lora | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def get(self) -> Tensor:
        return self.weight if isinstance(self.weight, Tensor) else self.weight()

    def apply(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        z = x if self.pre is None else x @ self.pre.t()
        if self.bias is None:
            return torch.mm(z, self.get().t(), out=out)
        return torch.addmm(self.bias, z, self.get().t(), out=out)

    def transpose_into(self, dy: Tensor, dx: Tensor, add: bool) -> None:
        """``dx (+)= dy weight pre``."""
        weight = self.get()
        if self.pre is not None:
            dy, weight = dy @ weight, self.pre
        if add:
            dx.addmm_(dy, weight)
        else:
            torch.mm(dy, weight, out=dx)


@dataclass(frozen=True)
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


class FrozenLinear:
    """One linear layer of a model, adapted or not: its weight and bias in a dtype, and its active LoRA.

    Raises:
        InputError: (on use) trainable base weights, an adapter that is no plain LoRA, or several active ones.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module, self.base = name, module, base_layer(module)
        self.cast: tuple[Tensor, Tensor] | None = None
        weight, bias = self.base.weight, getattr(self.base, "bias", None)
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            raise InputError(f"{name} is trained itself; contextual sparsity needs frozen base weights and a LoRA")
        self.transposed = isinstance(self.base, Conv1D)
        self.quantised = not weight.dtype.is_floating_point
        if self.quantised and not hasattr(weight, "quant_state"):
            raise InputError(f"{name} is stored as {weight.dtype} of an unknown kind; use fp32, bf16 or 4-bit weights")
        if isinstance(module, LoraLayer):
            for adapter in module.lora_A:
                if adapter in module.lora_variant or module.lora_bias[adapter]:
                    raise InputError(f"{name} has a LoRA variant or a bias on lora_B; use plain LoRA or rsLoRA")

    def stored(self) -> Tensor:
        """The weight ``(d_out, d_in)`` as it is kept, dequantised if need be."""
        weight = self.base.weight
        if self.quantised:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state)
        return weight.detach().t() if self.transposed else weight.detach()

    def weight(self, dtype: torch.dtype) -> Tensor | Callable[[], Tensor]:
        if self.quantised:
            return lambda: self.stored().to(dtype)
        return self.stored().to(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        bias = getattr(self.base, "bias", None)
        return None if bias is None else bias.detach().to(dtype)

    @property
    def width(self) -> int:
        return out_in(self.module)[0]

    def adapter(self) -> Adapter | None:
        """The adapter that PEFT would apply now: None where it is disabled or merged."""
        layer = self.module
        if not isinstance(layer, LoraLayer):
            return None
        own = layer.__dict__  # a property of a module is a slow look-up, and this is asked for in every step
        if own["_disable_adapters"] or own["merged_adapters"]:
            return None
        A = layer._modules["lora_A"]._modules
        names = own["_active_adapter"]
        active = [name for name in ([names] if isinstance(names, str) else names) if name in A]
        if not active:
            return None
        if len(active) > 1:
            raise InputError(f"{self.name} has {len(active)} active adapters; contextual sparsity trains one at a time")
        (name,) = active
        dropout = layer._modules["lora_dropout"]._modules[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        B = layer._modules["lora_B"]._modules
        return Adapter(A[name]._parameters["weight"], B[name]._parameters["weight"], own["scaling"][name], p)

    @property
    def layers(self) -> list[FrozenLinear]:
        return [self]

    def lora(self) -> Lora | None:
        """The update that PEFT would apply now."""
        return Lora.of([self.adapter()], [self.width], self.cast)

    def operand(self, dtype: torch.dtype, rows: Tensor | None = None, columns: Tensor | None = None) -> Operand:
        """The layer as it is, or restricted to output ``rows``, or to input ``columns``."""
        from sparselora.kernels.columns import take_columns

        weight, bias = self.weight(dtype), self.bias(dtype)
        if rows is not None or columns is not None:
            full = weight if isinstance(weight, Tensor) else weight()
            if rows is not None:
                full, bias = full.index_select(0, rows), None if bias is None else bias.index_select(0, rows)
            weight = full if columns is None else take_columns(full, columns)
        return Operand(weight, bias, None, self.lora(), rows, columns)


class FusedLinear:
    """Linear layers of one input as one, outputs side by side: q, k and v, or gate and up.

    Their weights are moved into one stretch of memory, each parameter a part of it, so that no copy is kept; `release`
    gives them memory of their own again. Quantised weights are put together anew at each use.
    """

    def __init__(self, layers: Sequence[FrozenLinear]) -> None:
        self.layers = list(layers)
        self.cast: tuple[Tensor, Tensor] | None = None
        ends = [0]
        for layer in self.layers:
            ends.append(ends[-1] + layer.width)
        self.parts = [slice(a, b) for a, b in zip(ends, ends[1:])]
        self.width = ends[-1]
        self._whole: Tensor | None = None
        weights = [layer.base.weight for layer in self.layers]
        plain = not any(layer.quantised or layer.transposed for layer in self.layers)
        self._movable = plain and len({(w.dtype, w.device, w.shape[1]) for w in weights}) == 1

    def stored(self) -> Tensor:
        """The weights below one another, ``(Σd_out, d_in)``."""
        weights = [layer.base.weight for layer in self.layers]
        if not self._movable:
            return torch.cat([layer.stored() for layer in self.layers])
        whole = self._whole
        if whole is None or any(w.data_ptr() != whole[p].data_ptr() for w, p in zip(weights, self.parts)):
            first, stride = weights[0], weights[0].shape[1]
            ends = [w.data_ptr() + w.nbytes for w in weights]
            if [w.data_ptr() for w in weights[1:]] == ends[:-1] and all(
                w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for w in weights
            ):  # another conversion has moved them already
                whole = first.detach().as_strided((self.width, stride), (stride, 1))
            else:
                whole = torch.cat([w.detach() for w in weights])
                for w, part in zip(weights, self.parts):
                    w.data = whole[part]
            self._whole = whole
        return whole

    def release(self) -> None:
        if self._whole is not None:
            for layer in self.layers:
                layer.base.weight.data = layer.base.weight.data.clone()
            self._whole = None

    def weight(self, dtype: torch.dtype) -> Tensor | Callable[[], Tensor]:
        if self._movable:
            return self.stored().to(dtype)
        return lambda: self.stored().to(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        biases = [layer.bias(dtype) for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        device = self.layers[0].base.weight.device
        return torch.cat(
            [
                torch.zeros(layer.width, dtype=dtype, device=device) if bias is None else bias
                for layer, bias in zip(self.layers, biases)
            ]
        )

    def lora(self) -> Lora | None:
        return Lora.of([layer.adapter() for layer in self.layers], [layer.width for layer in self.layers], self.cast)

    def operand(self, dtype: torch.dtype, rows: Tensor | None = None) -> Operand:
        """All outputs, or the ``rows`` of them."""
        weight, bias = self.weight(dtype), self.bias(dtype)
        if rows is not None:
            full = weight if isinstance(weight, Tensor) else weight()
            weight, bias = full.index_select(0, rows), None if bias is None else bias.index_select(0, rows)
        return Operand(weight, bias, None, self.lora(), rows)


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
    return [slice(a, b) for a, b in zip(ends, ends[1:])]


def _stacked(loras: Sequence[Lora], dtype: torch.dtype) -> Tensor:
    """The A of all of them below one another."""
    parts = [lora.a(dtype) for lora in loras]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _at(weight: Tensor, index: Tensor | None, dim: int) -> Tensor:
    return weight if index is None else weight.index_select(dim, index)


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
        z = None
        if loras:
            z = seen @ _stacked(loras, x.dtype).t()
        found: dict[int, list[Tensor]] = {}
        # What waits for another stream comes last.
        for number, segment in sorted(enumerate(segments), key=lambda item: item[1].ready is not None):
            outputs = found[number] = []
            if segment.ready is not None:
                torch.cuda.current_stream().wait_event(segment.ready)
            for operand in segment.operands:
                y = operand.apply(x[segment.rows])
                if operand.lora is not None:
                    assert z is not None
                    B = _at(operand.lora.b(x.dtype), operand.rows, 0)
                    y.addmm_(z[segment.rows, places[operand.lora.key]], B.t())
                outputs.append(y)
        ctx.segments, ctx.loras, ctx.places, ctx.apart, ctx.shape = segments, loras, places, apart, x.shape
        ctx.save_for_backward(seen if loras else None, z)
        return tuple(y for number in range(len(segments)) for y in found[number])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        seen, z = ctx.saved_tensors
        like = next(grad for grad in grads if grad is not None)
        dx = like.new_empty(ctx.shape) if ctx.needs_input_grad[3] else None
        dz = None if z is None else _covering(z, ctx.segments, ctx.loras, grads)
        sums = {lora.key: _Sum(lora.d_out, lora.rank, 0) for lora in ctx.loras}
        remaining = iter(grads)
        for segment in ctx.segments:
            written = False
            for operand in segment.operands:
                dy = next(remaining)
                if dy is None or not len(dy):
                    continue
                if dx is not None:
                    operand.transpose_into(dy, dx[segment.rows], add=written)
                    written = True
                if operand.lora is not None:
                    lora, place = operand.lora, ctx.places[operand.lora.key]
                    B = _at(lora.b(dy.dtype), operand.rows, 0)
                    torch.mm(dy, B, out=dz[segment.rows, place])
                    sums[lora.key].add(dy.t() @ z[segment.rows, place], operand.rows)
            if dx is not None and not written:
                dx[segment.rows].zero_()
        d_seen, d_lora = None, []
        if ctx.loras:
            dA = dz.t() @ seen
            if ctx.apart:
                d_seen = dz @ _stacked(ctx.loras, like.dtype)
            elif dx is not None:
                dx.addmm_(dz, _stacked(ctx.loras, like.dtype))
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
            if segment.ready is not None:
                torch.cuda.current_stream().wait_event(segment.ready)
            out = y[segment.rows]
            for position, operand in enumerate(segment.operands):
                if position == 0:
                    operand.apply(inputs[number], out=out)
                else:
                    out.add_(operand.apply(inputs[number]))
                z = None
                if operand.lora is not None:
                    z = seen[number] @ _at(operand.lora.a(dtype), operand.columns, 1).t()
                    out.addmm_(z, operand.lora.b(dtype).t())
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
        lora = ctx.loras[0] if ctx.loras else None
        dA, dB = None, None
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
                operand.transpose_into(dy, dx, add=False)
                d_drop = None
                if z is not None:
                    A = _at(lora.a(dy.dtype), operand.columns, 1)
                    dz = dy @ lora.b(dy.dtype)
                    if ctx.apart:
                        d_drop = dz @ A
                    else:
                        dx.addmm_(dz, A)
                    dA.add(dz.t() @ seen, operand.columns)
                    dB.add(dy.t() @ z, None)
                d_inputs.append(dx)
                d_seen.append(d_drop)
        parameters = [] if lora is None else lora.split(dA.value(grad), dB.value(grad))
        return (None, None, None, None, None, *d_inputs, *(d_seen if ctx.apart else []), *parameters)
