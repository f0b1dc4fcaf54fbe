"""Frozen linear layers of a model with their LoRA: whole, several as one, or restricted to channels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparselora.contextual.activated import is_activated
from sparselora.contextual.precision import Precision
from sparselora.contextual.sharding import is_sharded
from sparselora.contextual.structure import base_layer, out_in, partition
from sparselora.errors import InputError
from sparselora.kernels.casts import factor_gradients
from sparselora.kernels.columns import take_columns
from sparselora.kernels.fp8 import (
    GRADIENT_DTYPE,
    FrozenFp8,
    Quantised,
    quantise_rows,
    scaled_product,
    twin_or_quantise,
)
from sparselora.kernels.thin import thin_product
from sparselora.models.four_bit import dequantised, is_4bit

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
        present, outs, ranks, row, rank = [], [], [], 0, 0
        for adapter, width in zip(adapters, widths):
            if adapter is not None:
                present.append(adapter)
                outs.append(slice(row, row + width))
                ranks.append(slice(rank, rank + len(adapter.A)))
                rank += len(adapter.A)
            row += width
        return cls(tuple(present), tuple(outs), tuple(ranks), row, cast) if present else None

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
    def parameters(self) -> list[Tensor]:
        """A and B of each adapter, or what stands in for them (`stand_ins`)."""
        leaves = _STAND_INS.get()
        parameters = [parameter for adapter in self.adapters for parameter in (adapter.A, adapter.B)]
        return [leaves.get(id(parameter), parameter) for parameter in parameters]

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
        gradients: list[Tensor] = []
        for adapter, out, rank in zip(self.adapters, self.outs, self.ranks):
            gradients += factor_gradients(dA[rank], dB[out, rank], adapter.scale, adapter.A.dtype)
        return gradients


_STAND_INS: ContextVar[Mapping[int, Tensor]] = ContextVar("_STAND_INS", default=MappingProxyType({}))


@contextmanager
def stand_ins(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Have passes inside take new leaves in place of ``parameters``, in the same memory, and yield these leaves.

    Autograd runs the node that accumulates a parameter's gradient on the stream it was made on, in the first pass after
    the last one that anything still holds, such as a loss or logits. A capture as a CUDA graph must not wait for that
    stream; leaves that it makes itself have nodes of its own.
    """
    leaves = [parameter.detach().requires_grad_() for parameter in parameters]
    token = _STAND_INS.set({id(parameter): leaf for parameter, leaf in zip(parameters, leaves)})
    try:
        yield leaves
    finally:
        _STAND_INS.reset(token)


Padding = Sequence[slice]
"""Positions of a list of channels that count nothing: the channels there are others', to fill up the list."""


Fp8Source = FrozenFp8 | Callable[[], Tensor]
"""The copies of a weight in fp8; or the weight ``(d_out, d_in)``, quantised at each use, where no copy may be kept."""


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A weight in fp8 restricted to output ``rows`` and input ``columns``; None takes all.

    Where the weight has copies, that of the forward direction is gathered at once, that of the other when the backward
    pass asks for it. Both are zero at the positions ``padding`` of the restricted side.
    """

    source: Fp8Source
    rows: Tensor | None = None
    columns: Tensor | None = None
    padding: Padding = ()
    gathered: Quantised | None = None

    def forward(self) -> Quantised:
        """The rows of the weight, ``(d_out, d_in)``."""
        if self.gathered is not None:
            return self.gathered
        return _restricted(_copy_of(self.source), self.rows, self.columns, self.padding)

    def backward(self) -> Quantised:
        """The rows of the transposed weight, ``(d_in, d_out)``."""
        return _restricted(_copy_of(self.source, backward=True), self.columns, self.rows, self.padding)


def fp8_weight(
    source: Fp8Source, rows: Tensor | None = None, columns: Tensor | None = None, padding: Padding = ()
) -> Fp8Weight:
    """Return an fp8 weight restricted to output ``rows`` or input ``columns``, or whole."""
    weight = Fp8Weight(source, rows, columns, padding)
    return replace(weight, gathered=weight.forward()) if isinstance(source, FrozenFp8) else weight


def _copy_of(source: Fp8Source, *, backward: bool = False) -> Quantised:
    if not isinstance(source, FrozenFp8):
        return quantise_rows(source().t().contiguous() if backward else source())
    source.reclaim()  # an evaluation may have come between a pass and its backward pass
    return source.backward if backward else source.forward


def _restricted(copy: Quantised, rows: Tensor | None, columns: Tensor | None, padding: Padding) -> Quantised:
    return copy if rows is None and columns is None else _restricted_copy(copy, rows, columns, padding)


def _restricted_copy(copy: Quantised, rows: Tensor | None, columns: Tensor | None, padding: Padding) -> Quantised:
    restricted = copy.select(rows, columns)
    _zero_padding(restricted.values.view(torch.uint8), padding, 1 if rows is None else 0)
    return restricted


def _zero_padding(x: Tensor, padding: Padding, dim: int) -> Tensor:
    """Return ``x``, which is nobody else's, with zeros at the padding of a dimension."""
    for part in padding:
        x.narrow(dim, part.start, part.stop - part.start).zero_()
    return x


@dataclass(frozen=True, eq=False)
class Operand:
    """A frozen map ``x → weight (pre x) + bias`` of a range of rows, and the LoRA that joins in.

    ``weight (d_out, d_in)`` is a tensor, or a function that makes one where the stored weight is quantised or sharded:
    then it is made again for the backward pass and not kept. In fp8 it is an `Fp8Weight`, and inputs and gradients
    bring fp8 twins or are quantised here. ``pre (R, d_in)`` comes before a weight ``(d_out, R)``; None is the identity.
    ``rows`` and ``columns`` are the channels that ``weight`` was restricted to: the LoRA is restricted alike, and both
    are zero at the positions ``padding`` of these channels.
    """

    weight: Tensor | Callable[[], Tensor] | Fp8Weight
    bias: Tensor | None = None
    pre: Tensor | None = None
    lora: Lora | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    padding: Padding = ()
    _restrictions: dict[str, Tensor] = field(default_factory=dict)

    def get(self) -> Tensor:
        assert not isinstance(self.weight, Fp8Weight)
        return self.weight if isinstance(self.weight, Tensor) else self.weight()

    @property
    def d_in(self) -> int:
        """Width of the inputs."""
        if self.columns is not None:
            return len(self.columns)
        if isinstance(self.weight, Fp8Weight):
            return self.weight.forward().values.shape[1]
        return (self.get() if self.pre is None else self.pre).shape[1]

    def a(self, dtype: torch.dtype) -> Tensor:
        """The LoRA's A restricted to the input channels, ``(r, d_in)``."""
        return self._restricted("a", dtype, self.columns, 1)

    def b(self, dtype: torch.dtype) -> Tensor:
        """The LoRA's B restricted to the output channels, ``(d_out, r)``."""
        return self._restricted("b", dtype, self.rows, 0)

    def _restricted(self, factor: str, dtype: torch.dtype, index: Tensor | None, dim: int) -> Tensor:
        assert self.lora is not None
        whole: Tensor = getattr(self.lora, factor)(dtype)
        if index is None:
            return whole
        if factor not in self._restrictions:
            self._restrictions[factor] = _zero_padding(whole.index_select(dim, index), self.padding, dim)
        return self._restrictions[factor]

    def apply(
        self, x: Tensor, z: Tensor | None = None, out: Tensor | None = None, twin: Quantised | None = None
    ) -> Tensor:
        """The map of ``x (n, d_in)``, with that of its LoRA where ``z (n, r)`` = A x is given; into ``out``.

        Args:
            twin: the fp8 twin of ``x``, where the weight is in fp8 and ``x`` is a part of the tensor that has one.
        """
        if isinstance(self.weight, Fp8Weight):
            quantised = twin_or_quantise(x) if twin is None else twin
            y = scaled_product(quantised, self.weight.forward(), x.dtype, self.bias, out)  # (n, d_in) (d_in, d_out)
            return y if z is None else y.addmm_(z, self.b(x.dtype).t())  # (n, r) (r, d_out)
        weight = self.get()
        if out is None:
            out = x.new_empty(len(x), len(weight))
        thin = [] if z is None else [(z, self.b(x.dtype).t())]
        if self.pre is not None:
            return thin_product([(x @ self.pre.t(), weight.t()), *thin], out, self.bias)
        if thin:
            # First the thin product: the wide one adds to it as it writes, without a pass over memory of its own.
            return thin_product(thin, out, self.bias).addmm_(x, weight.t())
        if self.bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(self.bias, x, weight.t(), out=out)

    def transpose_into(
        self, dy: Tensor, dx: Tensor, dz: Tensor | None, *, add: bool, twin: Quantised | None = None
    ) -> None:
        """``dx (+)= dy weight pre``, and the LoRA's ``dz A`` where ``dz (n, r)`` is given; ``twin`` is that of dy."""
        if isinstance(self.weight, Fp8Weight):
            quantised = twin_or_quantise(dy, GRADIENT_DTYPE) if twin is None else twin
            weight_t = self.weight.backward()
            if add:
                dx.add_(scaled_product(quantised, weight_t, dx.dtype))
            else:
                scaled_product(quantised, weight_t, dx.dtype, out=dx)  # (n, d_out) (d_out, d_in)
            if dz is not None:
                dx.addmm_(dz, self.a(dy.dtype))  # (n, r) (r, d_in)
            return
        weight = self.get()
        thin = [] if dz is None else [(dz, self.a(dy.dtype))]
        if self.pre is not None:
            thin.insert(0, (dy @ weight, self.pre))
        if add:
            for z, C in thin:
                dx.addmm_(z, C)
        elif thin:
            thin_product(thin, dx)
        if self.pre is None:
            if add or thin:
                dx.addmm_(dy, weight)
            else:
                torch.mm(dy, weight, out=dx)


def _part_of(
    weight: Tensor | Callable[[], Tensor], rows: Tensor | None, columns: Tensor | None, *, at_use: bool
) -> Tensor | Callable[[], Tensor]:
    """Return output ``rows`` and input ``columns`` of a weight, copied now or ``at_use``; None takes all."""
    if rows is None and columns is None:
        return weight

    def part() -> Tensor:
        whole = weight if isinstance(weight, Tensor) else weight()
        whole = whole if rows is None else whole.index_select(0, rows)
        return whole if columns is None else take_columns(whole, columns)

    return part if at_use else part()


def _bias_of(bias: Tensor | None, rows: Tensor | None, padding: Padding) -> Tensor | None:
    if bias is None or rows is None:
        return bias
    return _zero_padding(bias.index_select(0, rows), padding, 0)


class FrozenLinear:
    """One linear layer of a model, adapted or not: its weight and bias in a dtype, and its active LoRA.

    Raises:
        InputError: (on use) trainable base weights, an adapter that is no plain LoRA, or several active ones.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.base: Any = base_layer(module)  # of one of several classes
        self.cast: tuple[Tensor, Tensor] | None = None
        self.precision: type[Precision] | None = None
        self.fp8: FrozenFp8 | None = None
        weight: Any = self.base.weight
        bias = getattr(self.base, "bias", None)
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            raise InputError(f"{name} is trained itself; contextual sparsity needs frozen base weights and a LoRA")
        self._device: torch.device | None = None
        self.transposed = isinstance(self.base, Conv1D)
        self.quantised = is_4bit(weight)
        if not self.quantised and not weight.dtype.is_floating_point:
            raise InputError(f"{name} is stored as {weight.dtype} of an unknown kind; use fp32, bf16 or 4-bit weights")
        if isinstance(module, LoraLayer):
            for adapter in module.lora_A:
                variant = module.lora_variant.get(adapter)
                if not isinstance(variant, ALoraLinearVariant | None) or module.lora_bias[adapter]:
                    raise InputError(
                        f"{name} has a LoRA variant or a bias on lora_B; use plain LoRA, rsLoRA or activated LoRA"
                    )

    def stored(self) -> Tensor:
        """The weight ``(d_out, d_in)`` as it is kept, dequantised if need be."""
        weight = self.base.weight
        if owner := partition(weight):
            raise InputError(
                f"the weight of {self.name} is partitioned by {owner} in this pass; sparse passes need whole weights: "
                "train with DDP or ZeRO-2, or with fully_shard on whole blocks and on the model around them"
            )
        if self.quantised:
            return dequantised(weight)
        weight = weight.detach().to(self.device)
        return weight.t() if self.transposed else weight

    @property
    def device(self) -> torch.device:
        """The device of its products: the weight itself may wait in host memory while its fp8 copy is used."""
        device: torch.device = self.base.weight.device if self._device is None else self._device
        return device

    def hold_device(self) -> None:
        """Form products on the weight's present device, wherever the weight waits later."""
        self._device = self.base.weight.device

    def follow_shards(self) -> None:
        """Form products on the device of the weight as it is gathered, with nothing that was made of it before."""
        self._device = self.fp8 = None

    @property
    def is_sharded(self) -> bool:
        """True if the weight is whole during a pass over its block alone: no copy of it may outlive its use."""
        return is_sharded(self.base)

    def quantise(self, precision: type[Precision]) -> None:
        """Form products in fp8 from now on: from copies, or where the weight is sharded, quantised at each use."""
        self.precision = precision
        self.fp8 = None if self.is_sharded else precision.frozen(self.stored())

    def fill(self) -> None:
        """Make the copies again, in their memory, from the weight as it is."""
        if self.fp8 is not None:
            self.fp8.fill(self.stored().clone())

    @property
    def bases(self) -> list[Any]:
        """The module that holds the weight."""
        return [self.base]

    def weight(self, dtype: torch.dtype) -> Tensor | Callable[[], Tensor]:
        if self.quantised or self.is_sharded:
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
        layer: Any = self.module
        if not isinstance(layer, LoraLayer):
            return None
        layer = cast(Any, layer)
        attributes = layer.__dict__  # a property of a module is a slow look-up, and this is asked for in every step
        if attributes["merged_adapters"] and self.fp8 is not None:
            raise InputError(
                f"the adapter of {self.name} is merged into its weight, and the fp8 copy of the weight is without it; "
                "unmerge it before training, or use frozen_precision native"
            )
        if attributes["_disable_adapters"] or attributes["merged_adapters"]:
            return None
        A = layer._modules["lora_A"]._modules
        names = attributes["_active_adapter"]
        active = [name for name in ([names] if isinstance(names, str) else names) if name in A]
        if not active:
            return None
        if len(active) > 1:
            raise InputError(f"{self.name} has {len(active)} active adapters; contextual sparsity trains one at a time")
        (name,) = active
        dropout = layer._modules["lora_dropout"]._modules[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        B = layer._modules["lora_B"]._modules
        for factor in (A[name], B[name]):
            if factor._forward_hooks or factor._forward_pre_hooks:
                raise InputError(
                    f"the LoRA of {self.name} has a hook on its factors (token gates, a mask of channels), which a "
                    "sparse pass does not run; take it off, or train without contextual sparsity"
                )
        return Adapter(A[name]._parameters["weight"], B[name]._parameters["weight"], attributes["scaling"][name], p)

    def lora(self) -> Lora | None:
        """The update that PEFT would apply now."""
        return Lora.of([self.adapter()], [self.width], self.cast)

    def effective(self, dtype: torch.dtype) -> Tensor:
        """The weight with its LoRA added: what the layer computes for context, where no activated LoRA is active."""
        weight, lora = self.stored().to(dtype), None if is_activated(self.module) else self.lora()
        return weight if lora is None else weight + lora.b(dtype) @ lora.a(dtype)

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Input channels ``index (k,)`` of the weight that products are formed with, ``(d_out, k)``."""
        if self.precision is not None:
            return _copy_of(self.fp8 or self.stored).select(columns=index).wide(dtype)
        return self.stored().index_select(1, index).to(dtype)

    def operand(
        self,
        dtype: torch.dtype,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        padding: Padding = (),
    ) -> Operand:
        """The layer as it is, or restricted to output ``rows``, or to input ``columns``.

        Args:
            padding: positions of these channels that count nothing (in fp8).
        """
        bias = self.bias(dtype)
        if self.precision is not None:
            quantised = fp8_weight(self.fp8 or self.stored, rows, columns, padding)
            return Operand(quantised, _bias_of(bias, rows, padding), None, self.lora(), rows, columns, padding)
        weight = _part_of(self.weight(dtype), rows, columns, at_use=self.is_sharded)
        return Operand(weight, _bias_of(bias, rows, ()), None, self.lora(), rows, columns)


def _joined(layers: Sequence[FrozenLinear]) -> Tensor:
    """Return the weights below one another, in memory of their own."""
    weights = [layer.stored() for layer in layers]
    return weights[0].clone() if len(weights) == 1 else torch.cat(weights)


class FusedLinear:
    """Linear layers of one input as one, outputs side by side: q, k and v, or gate and up.

    Their weights are moved into one stretch of memory, each parameter a part of it, so that no copy is kept; `release`
    gives them memory of their own again. Quantised weights are put together again at each use.
    """

    def __init__(self, layers: Sequence[FrozenLinear]) -> None:
        self.layers = list(layers)
        self.cast: tuple[Tensor, Tensor] | None = None
        self.precision: type[Precision] | None = None
        self.fp8: FrozenFp8 | None = None
        ends = [0]
        for layer in self.layers:
            ends.append(ends[-1] + layer.width)
        self.parts = [slice(a, b) for a, b in pairwise(ends)]
        self.width = ends[-1]
        self._whole: Tensor | None = None
        weights = [layer.base.weight for layer in self.layers]
        # Weak: what fully_shard replaces is to be freed, layer by layer.
        self._weights = [weakref.ref(weight) for weight in weights]
        plain = not any(layer.quantised or layer.transposed for layer in self.layers)
        self._movable = plain and len({(w.dtype, w.device, w.shape[1]) for w in weights}) == 1

    def stored(self) -> Tensor:
        """The weights below one another, ``(Σd_out, d_in)``."""
        weights = [layer.base.weight for layer in self.layers]
        if not self._movable or any(weight is not ref() for weight, ref in zip(weights, self._weights)):
            self._whole = None  # FSDP2 has weights of its own, gathered for this pass
            parts = [layer.stored() for layer in self.layers]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
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

    @property
    def is_sharded(self) -> bool:
        """True if the weights are whole during a pass over their block alone."""
        return self.layers[0].is_sharded

    def follow_shards(self) -> None:
        """Free what was made of the weights before they were sharded."""
        self._whole = self.fp8 = None

    def quantise(self, precision: type[Precision]) -> None:
        """Form products in fp8 from now on: from copies, or where the weights are sharded, quantised at each use."""
        self.precision = precision
        for layer in self.layers:
            layer.precision = precision
        if self.is_sharded:
            return
        self.fp8 = precision.frozen(_joined(self.layers))
        for layer, part in zip(self.layers, self.parts):
            layer.fp8 = self.fp8.part(part)
        self._whole = None  # the parameters hold its memory until they leave the device

    def fill(self) -> None:
        """Make the copies again, in their memory, from the weights as they are."""
        if self.fp8 is not None:
            self.fp8.fill(_joined(self.layers))

    @property
    def bases(self) -> list[Any]:
        """The modules that hold the weights, in the order of their output channels."""
        return [layer.base for layer in self.layers]

    def release(self) -> None:
        if self._whole is not None:
            for weight in (ref() for ref in self._weights):
                if weight is not None:
                    weight.data = weight.data.clone()
            self._whole = None

    def weight(self, dtype: torch.dtype) -> Tensor | Callable[[], Tensor]:
        if self._movable and not self.is_sharded:
            return self.stored().to(dtype)
        return lambda: self.stored().to(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        biases = [layer.bias(dtype) for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        device = self.layers[0].device
        return torch.cat(
            [
                torch.zeros(layer.width, dtype=dtype, device=device) if bias is None else bias
                for layer, bias in zip(self.layers, biases)
            ]
        )

    def lora(self) -> Lora | None:
        return Lora.of([layer.adapter() for layer in self.layers], [layer.width for layer in self.layers], self.cast)

    def operand(self, dtype: torch.dtype, rows: Tensor | None = None, padding: Padding = ()) -> Operand:
        """All outputs, or the ``rows`` of them, of which those at the positions ``padding`` are zero (in fp8)."""
        bias = self.bias(dtype)
        if self.precision is not None:
            quantised = fp8_weight(self.fp8 or self.stored, rows, None, padding)
            return Operand(quantised, _bias_of(bias, rows, padding), None, self.lora(), rows, None, padding)
        weight = _part_of(self.weight(dtype), rows, None, at_use=self.is_sharded)
        return Operand(weight, _bias_of(bias, rows, ()), None, self.lora(), rows)
