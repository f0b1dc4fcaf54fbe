"""The frozen linear layers of one block, and their operands for rows that compute everything or follow a choice."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from sparselora.contextual.choices import AttentionChoice, FFNChoice, fused_sizes
from sparselora.contextual.estimator import AttentionWeights, FFNWeights
from sparselora.contextual.frozen import FrozenLinear, FusedLinear
from sparselora.contextual.operand import Operand, Padding
from sparselora.contextual.precision import Precision
from sparselora.contextual.structure import Block, Structure
from sparselora.kernels.fp8 import FP8_MULTIPLE
from sparselora.kernels.rows import Channels

Tensor = torch.Tensor


class BlockLinears:
    """The linear layers of one block of a model.

    Attributes:
        gate: of a gated FFN; None without.
        attention: q, k, v and o by their letters.
        first: the FFN's first projections as one: gate and up, or up alone.
        qkv: q, k and v as one.
    """

    def __init__(self, structure: Structure, block: Block) -> None:
        def linear(name: str) -> FrozenLinear:
            return FrozenLinear(name, structure.module(name))

        ffn, attention = block.ffn, block.attention
        self.block = block
        self.up, self.down = linear(ffn.up), linear(ffn.down)
        self.gate = None if ffn.gate is None else linear(ffn.gate)
        self.attention: dict[str, FrozenLinear] = {part: linear(getattr(attention, part)) for part in "qkvo"}
        self.first = FusedLinear([self.up] if self.gate is None else [self.gate, self.up])
        self.qkv = FusedLinear([self.attention[part] for part in (["q"] if attention.fused else list("qkv"))])

    @property
    def all(self) -> list[FrozenLinear]:
        """The block's linear layers: q, k, v, o, gate, up, down."""
        return [*self.attention.values(), *(x for x in (self.gate, self.up, self.down) if x is not None)]

    @property
    def products(self) -> list[FrozenLinear | FusedLinear]:
        """The block's linear layers as they are multiplied with: q, k and v as one, o, gate and up as one, down."""
        return [self.qkv, self.attention["o"], self.first, self.down]

    @property
    def _layers(self) -> list[FrozenLinear | FusedLinear]:
        return [self.first, self.qkv, *self.all]

    @property
    def ffn_width(self) -> int:
        return self.up.width

    @property
    def device(self) -> torch.device:
        return self.up.device

    def quantise(self, precision: type[Precision]) -> None:
        """Make the fp8 copies that products are formed from, from now on.

        Raises:
            InputError: a layer that has no such products.
        """
        for linear in self.all:
            precision.check(linear.name, linear.module, linear.base.weight)
        for linear in self.all:
            if not linear.is_sharded:
                linear.hold_device()
        for layer in self.products:
            layer.quantise(precision)

    def release(self) -> None:
        """Give parameters that were moved together memory of their own, and free the fp8 copies."""
        self.first.release()
        self.qkv.release()
        for layer in self._layers:
            layer.fp8 = layer.precision = None

    def follow_shards(self) -> None:
        """Read weights that have been sharded as they are gathered, and free what was made of them before."""
        for layer in self._layers:
            layer.follow_shards()

    # --- weights that estimators are built from ---

    def ffn_weights(self) -> FFNWeights:
        up, gate = self.up.stored(), None if self.gate is None else self.gate.stored()
        gate_bias = None if self.gate is None else self.gate.bias(up.dtype)
        ffn = self.block.ffn
        return FFNWeights(ffn.unit, up, ffn.act, gate, self.up.bias(up.dtype), gate_bias)

    def attention_weights(self) -> AttentionWeights:
        heads = self.block.attention
        biases: Sequence[Tensor | None]
        if heads.fused:
            weight = self.attention["q"].stored()
            weights = weight.split(fused_sizes(heads))
            bias = self.attention["q"].bias(weight.dtype)
            biases = [None] * 3 if bias is None else bias.split(fused_sizes(heads))
        else:
            weights = tuple(self.attention[part].stored() for part in "qkv")
            biases = [self.attention[part].bias(weights[0].dtype) for part in "qkv"]
        q, k, v = weights
        return AttentionWeights(heads.o, q, k, v, heads.heads, heads.kv_heads, heads.head_dim, heads.rope, *biases)

    # --- operands of the FFN ---

    def computed_channels(self, channels: Tensor) -> tuple[Tensor, Padding]:
        """Return chosen FFN channels ``(k,)``, filled up where their fp8 products need more, and what is padding.

        Padding channels are zero in both products and their gradients. Channels that activate an input of zero get
        none: products of such a number are not formed in fp8.
        """
        missing = -len(channels) % FP8_MULTIPLE
        if missing == 0 or self.down.precision is None or not self._keeps_zeros:
            return channels, ()
        filled = torch.cat((channels, channels[:1].expand(missing)))
        return filled, (slice(len(channels), len(filled)),)

    @functools.cached_property
    def _keeps_zeros(self) -> bool:
        """True if a hidden channel is 0 where the outputs of the first projections are."""
        return self.gate is not None or not bool(self.block.ffn.act(torch.zeros(1, device=self.device)).any())

    def first_operands(self, choice: FFNChoice | None, dtype: torch.dtype) -> tuple[Operand, ...]:
        """Return the operands of `split_linear`: gate and up, and the first factor of a map."""
        operands: list[Operand] = []
        if choice is None:
            operands.append(self.first.operand(dtype))
        elif choice.channels is not None:
            rows, padding = self.computed_channels(choice.channels)
            if self.gate is not None:
                count = len(rows)
                rows = torch.cat((rows, rows + self.ffn_width))
                padding = [*padding, *(slice(part.start + count, part.stop + count) for part in padding)]
            operands.append(self.first.operand(dtype, rows, padding))
        if choice is not None and choice.map is not None:
            operands.append(Operand(choice.map.down.to(dtype)))
        return tuple(operands)

    def last_operands(self, choice: FFNChoice | None, dtype: torch.dtype) -> tuple[Operand, ...]:
        """Return the operands of `join_linear`: down, and the second factor of a map."""
        operands: list[Operand] = []
        if choice is None:
            operands.append(self.down.operand(dtype))
        elif choice.channels is not None:
            columns, padding = self.computed_channels(choice.channels)
            down = self.down.operand(dtype, columns=columns, padding=padding)
            if choice.bias is not None:
                extra = choice.bias.to(dtype)
                down = replace(down, bias=extra if down.bias is None else down.bias + extra)
            operands.append(down)
        if choice is not None and choice.map is not None:
            fitted = choice.map.to(dtype=dtype)
            operands.append(Operand(fitted.up, fitted.bias))
        return tuple(operands)

    # --- operands of attention ---

    def projection(self, part: str, choice: AttentionChoice | None, dtype: torch.dtype) -> Operand:
        """Return the operand of q, k or v (or of all, where one matrix computes them) for rows that follow a choice."""
        linear = self.attention[part]
        if choice is None:
            return linear.operand(dtype)
        if choice.maps is not None:
            fitted = choice.maps["qkvo".index(part)].to(dtype=dtype)
            return Operand(fitted.up, fitted.bias, fitted.down, linear.lora())
        channels = choice.channels("qkv" if self.block.attention.fused else part)
        assert channels is not None
        return linear.operand(dtype, rows=channels.index)

    def projections(self, channels: Channels | None, choice: AttentionChoice | None, dtype: torch.dtype) -> Operand:
        """Return the operand of q, k and v side by side, restricted to ``channels``, or that of the maps for them."""
        if choice is not None and choice.maps is not None:
            fitted = choice.side_by_side.to(dtype=dtype)
            return Operand(fitted.up, fitted.bias, fitted.down, self.qkv.lora())
        return self.qkv.operand(dtype, None if channels is None else channels.index)

    def output(self, choice: AttentionChoice | None, dtype: torch.dtype) -> Operand:
        """Return the operand of the output projection, for rows that hold the channels of a choice."""
        linear = self.attention["o"]
        if choice is None:
            return linear.operand(dtype)
        if choice.maps is not None:
            fitted = choice.maps[3].to(dtype=dtype)
            return Operand(fitted.up, fitted.bias, fitted.down, linear.lora())
        assert choice.out is not None
        return linear.operand(dtype, columns=choice.out.index)
