"""Frozen linear layers of a model with their LoRA, alone or several as one: weights, fp8 copies, and operands."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparselora.contextual.activated import is_activated
from sparselora.contextual.lora_update import Adapter, Lora
from sparselora.contextual.operand import Operand, Padding, bias_of, copy_of, fp8_weight, part_of
from sparselora.contextual.precision import Precision
from sparselora.contextual.sharding import is_sharded
from sparselora.contextual.structure import base_layer, out_in, partition
from sparselora.errors import InputError
from sparselora.kernels.fp8 import FrozenFp8
from sparselora.models.four_bit import dequantised, is_4bit

Tensor = torch.Tensor


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
            return copy_of(self.fp8 or self.stored).select(columns=index).wide(dtype)
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
            return Operand(quantised, bias_of(bias, rows, padding), None, self.lora(), rows, columns, padding)
        weight = part_of(self.weight(dtype), rows, columns, at_use=self.is_sharded)
        return Operand(weight, bias_of(bias, rows, ()), None, self.lora(), rows, columns)


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

    def join(self) -> None:
        """Move the weights together on the present stream, where that is still to be done.

        On a `side_stream`, others would read the weights in their new place before they are there.
        """
        if self._movable and self.precision is None and not self.is_sharded:
            self.stored()

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
            return Operand(quantised, bias_of(bias, rows, padding), None, self.lora(), rows, None, padding)
        weight = part_of(self.weight(dtype), rows, None, at_use=self.is_sharded)
        return Operand(weight, bias_of(bias, rows, ()), None, self.lora(), rows)
