"""Statistics of a model's activations on a few hundred samples, and the fixed choices that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sparselora.contextual.cache import Cache, Value, data_digest, digest
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.plan import AttentionChoice, FFNChoice, LayerPlan, attention_choice, fused_sizes
from sparselora.contextual.selection import select_ffn_channels
from sparselora.contextual.structure import Structure, base_weight
from sparselora.contextual.surrogate import (
    AffineMap,
    AffineStatistics,
    AttentionStatistics,
    ChannelStatistics,
    fit_affine,
    fit_low_rank,
)
from sparselora.errors import InputError
from sparselora.models.four_bit import stored_tensors
from sparselora.models.load import evaluating

Tensor = torch.Tensor
Batch = Mapping[str, Tensor]


class Calibration:
    """Calibrates the sparse layers of one model on given batches, for the modes and compensations that need it."""

    def __init__(
        self, structure: Structure, plans: Sequence[LayerPlan], batches: Iterable[Batch], cache: Cache
    ) -> None:
        self.structure, self.cache = structure, cache
        self.plans = [plan for plan in plans if plan.ffn_sparsity or plan.attention_sparsity]
        self.batches = [{k: v for k, v in batch.items() if isinstance(v, Tensor)} for batch in batches]
        if not self.batches:
            raise InputError("calibration needs at least one batch, got none")
        self.config = plans[0].config

    def run(self, *, refresh: bool = False) -> None:
        """Fill the plans. ``refresh`` measures the model as it is now and leaves the cache alone."""
        if refresh:
            found = self._measure()
        else:
            weights = [p for _, p in sorted(stored_tensors(self.structure.model).items())]
            config = self.config
            parts: dict[str, Value] = {
                "weights": digest(*weights), "data": data_digest(self.batches), "mode": config.mode,
                "rank": config.surrogate_rank, "channels": config.surrogate_channels,
                "layers": repr([(p.block.index, p.ffn_sparsity, p.attention_sparsity) for p in self.plans]),
                "output": config.dense_output_tokens,
            }  # fmt: skip
            found = self.cache.fetch("calibration", parts, self._measure)
        for plan in self.plans:
            _apply(plan, found, base_weight(plan.up.base).device)

    @property
    def _is_encoder_decoder(self) -> bool:
        """Whether labels make the input of a decoder, which is not sparse but has to run."""
        config: Any = self.structure.model.config
        return bool(getattr(config, "is_encoder_decoder", False))

    # --- measuring ---

    def _measure(self) -> dict[str, Tensor]:
        collectors = [_Collector(plan, self.structure) for plan in self.plans]
        self._pass(collectors)
        if self.config.mode == "surrogate" and self.config.surrogate_channels:
            for collector in collectors:  # the map stands for what the kept channels leave
                collector.keep(self.config.surrogate_channels)
            self._pass(collectors)
        found: dict[str, Tensor] = {}
        for collector in collectors:
            found |= collector.result()
        return found

    @torch.no_grad()
    def _pass(self, collectors: Sequence[_Collector]) -> None:
        model: Any = self.structure.model
        device = next(model.parameters()).device
        with evaluating(model):
            for batch in self.batches:
                labels = batch.get("labels") if self.structure.causal else None
                mask = batch.get("attention_mask")
                rows_in_batch, length = batch["input_ids"].shape
                layout = TokenLayout.build(
                    None if mask is None else mask.cpu(), None if labels is None else labels.cpu(),
                    (rows_in_batch, length), causal=self.structure.causal,
                )  # fmt: skip
                sparse = layout.n_context if self.config.dense_output_tokens else layout.n
                rows = layout.tokens[:sparse].to(device)
                left_out = {"token_layout"} if self._is_encoder_decoder else {"labels", "token_layout"}
                inputs = {name: value.to(device) for name, value in batch.items() if name not in left_out}
                shape = (rows_in_batch, length)
                handles = [handle for collector in collectors for handle in collector.hooks(rows, shape)]
                try:
                    model(**inputs)
                finally:
                    for handle in handles:
                        handle.remove()


class _Collector:
    """Moments of one layer, from hooks on its linear layers."""

    def __init__(self, plan: LayerPlan, structure: Structure) -> None:
        self.plan, self.structure = plan, structure
        config, block = plan.config, plan.block
        device = base_weight(plan.up.base).device
        d_ffn, d = plan.up.stored().shape
        self.hidden = ChannelStatistics(d_ffn, device)
        self.ffn = AffineStatistics(d, plan.down.stored().shape[0], device) if config.mode == "surrogate" else None
        self.kept: Tensor | None = None
        self._x: Tensor | None = None
        self._h: Tensor | None = None
        heads = block.attention
        self.attention = AttentionStatistics(heads.heads, heads.kv_heads, heads.head_dim, heads.rope, device)
        self.inputs = {
            part: AffineStatistics(plan.attention[part].stored().shape[1], 0, device) for part in ("q", "o")
        }  # fmt: skip
        self._parts: dict[str, Tensor] = {}
        self.measure_attention = True

    def keep(self, count: int) -> None:
        """Fix the ``count`` largest channels, and start the FFN's moments again, of what they leave."""
        width = len(self.hidden.norms)
        self.kept = select_ffn_channels(self.hidden.norms, 1 - min(count, width) / width)
        assert self.ffn is not None
        d_out, d_in = self._sides()
        self.ffn = AffineStatistics(d_in, d_out, base_weight(self.plan.up.base).device)
        self.measure_attention = False

    def _sides(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the FFN as one map."""
        return self.plan.down.stored().shape[0], self.plan.up.stored().shape[1]

    def hooks(self, rows: Tensor, shape: tuple[int, int]) -> list[Any]:
        """Hooks for one pass over a batch of ``shape = (batch, length)``, whose tokens ``rows`` are measured.

        Only the first call of a projection in the pass is one of its tokens: DeBERTa's are called on relative positions
        too, after that.
        """
        plan, module = self.plan, self.structure.module
        projected: set[str] = set()

        def first(part: str, x: tuple[Tensor, ...]) -> bool:
            is_first = part not in projected and x[0].shape[:-1] == shape
            projected.add(part)
            return is_first

        def project(part: str, x: tuple[Tensor, ...], y: Tensor) -> None:
            if first(part, x):
                self._projected(part, _flat(x[0], rows), _flat(y, rows))

        handles = []
        if plan.ffn_sparsity:
            handles += [
                module(plan.block.ffn.up).register_forward_pre_hook(lambda _, x: self._ffn_input(_flat(x[0], rows))),
                module(plan.block.ffn.down).register_forward_hook(
                    lambda _, x, y: self._ffn_output(_flat(x[0], rows), _flat(y, rows))
                ),
            ]
        if plan.attention_sparsity and self.measure_attention:
            heads = plan.block.attention
            for part in ("q",) if heads.fused else ("q", "k", "v"):
                handles.append(
                    module(getattr(heads, part)).register_forward_hook(lambda _, x, y, part=part: project(part, x, y))
                )
            handles.append(
                module(heads.o).register_forward_pre_hook(lambda _, x: self.inputs["o"].update(_flat(x[0], rows)))
            )
        return handles

    def _ffn_input(self, x: Tensor) -> None:
        self._x = x

    def _ffn_output(self, h: Tensor, y: Tensor) -> None:
        if self.kept is None:
            self.hidden.update(h)
        if self.ffn is not None:
            if self.kept is not None:
                down = self.plan.down.effective(h.dtype).index_select(1, self.kept)  # its LoRA stays on kept channels
                y = y - h.index_select(1, self.kept) @ down.t()
                bias = self.plan.down.bias(y.dtype)
                y = y if bias is None else y - bias
            assert self._x is not None
            self.ffn.update(self._x, y)

    def _projected(self, part: str, x: Tensor, y: Tensor) -> None:
        if part == "q":
            self.inputs["q"].update(x)
        self._parts[part] = y
        heads = self.plan.block.attention
        if heads.fused:
            self.attention.update(*y.split(fused_sizes(heads), dim=1))
        elif part == "v":
            self.attention.update(*(self._parts.pop(name) for name in "qkv"))

    # --- results ---

    def result(self) -> dict[str, Tensor]:
        plan, config = self.plan, self.plan.config
        found: dict[str, Tensor] = {}
        if plan.ffn_sparsity:
            found |= {"mean": self.hidden.mean, "norms": self.hidden.norms}
            if self.ffn is not None:
                rank = min(config.surrogate_rank, *self._sides())
                found |= {f"ffn.{k}": v for k, v in fit_affine(self.ffn, rank).tensors().items()}
        if plan.attention_sparsity:
            qk, v = self.attention.scores()
            found |= {"qk": qk, "v": v}
            if config.mode == "surrogate":
                for part in ("q",) if plan.block.attention.fused else ("q", "k", "v"):
                    found |= self._low_rank(part, self.inputs["q"])
                found |= self._low_rank("o", self.inputs["o"])
        return {f"{plan.block.index}.{name}": value.cpu() for name, value in found.items()}

    def _low_rank(self, part: str, stats: AffineStatistics) -> dict[str, Tensor]:
        linear = self.plan.attention[part]
        weight = linear.stored().double()
        bias = linear.bias(torch.float64)
        fitted = fit_low_rank(stats, weight, bias, min(self.plan.config.surrogate_rank, *weight.shape))
        return {f"{part}.{name}": value for name, value in fitted.tensors().items()}


def _flat(x: Tensor, rows: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).index_select(0, rows)


def _apply(plan: LayerPlan, found: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the plan's fixed choices and means from what was measured."""
    config, index = plan.config, plan.block.index
    own = {name.split(".", 1)[1]: value.to(device) for name, value in found.items() if name.startswith(f"{index}.")}
    base = base_weight(plan.up.base).dtype
    dtype = base if base.is_floating_point else torch.bfloat16

    def fitted(part: str) -> AffineMap:
        return AffineMap.from_tensors({k: own[f"{part}.{k}"] for k in ("down", "up", "bias")}).to(device, dtype)

    if plan.ffn_sparsity:
        if config.compensate == "mean":
            plan.mean = own["mean"].to(torch.promote_types(dtype, torch.float32))
            plan.mean_output = plan.down.stored().to(plan.mean.dtype) @ plan.mean
        if config.mode == "static":
            kept = select_ffn_channels(own["norms"], plan.ffn_sparsity)
            plan.fixed_ffn = FFNChoice(kept, plan.compensation(kept, dtype))
        elif config.mode == "skip":
            plan.fixed_ffn = FFNChoice(None, None, mean_map(plan, dtype))
        elif config.mode == "surrogate":
            kept = None
            if config.surrogate_channels:
                width = len(own["norms"])
                kept = select_ffn_channels(own["norms"], 1 - min(config.surrogate_channels, width) / width)
            plan.fixed_ffn = FFNChoice(kept, None, fitted("ffn"))
    if plan.attention_sparsity:
        heads = plan.block.attention
        if config.mode == "static":
            plan.fixed_attention = attention_choice(heads, own["qk"], own["v"], plan.attention_sparsity)
        elif config.mode == "surrogate":
            parts = ("q", "q", "q", "o") if heads.fused else ("q", "k", "v", "o")
            plan.fixed_attention = AttentionChoice(heads, maps=tuple(fitted(part) for part in parts))


def mean_map(plan: LayerPlan, dtype: torch.dtype) -> AffineMap | None:
    """The FFN's mean output as an affine map of rank 0: what mode skip adds under ``compensate: mean``."""
    if plan.mean_output is None:
        return None
    bias = plan.mean_output.to(dtype)
    down = plan.down.bias(dtype)
    d = plan.up.stored().shape[1]
    return AffineMap(bias.new_zeros(0, d), bias.new_zeros(len(bias), 0), bias if down is None else bias + down)
