"""Statistics of a model's activations on a few hundred samples, and the fixed choices that follow from them.

Measured of each sparse layer, by name: of its FFN ``mean`` and ``norms (d_ffn,)`` of the hidden channels; of attention
``qk`` and ``v``, scores of the kv channels; where the mode fits maps, ``ffn.down``, ``ffn.up`` and ``ffn.bias`` of the
FFN's map, and likewise ``q.down`` and so on of the projections'.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from sparselora.contextual.cache import Cache, Value, data_digest, digest
from sparselora.contextual.choices import fused_sizes
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.selection import largest_channels
from sparselora.contextual.sharding import gathered, is_sharded
from sparselora.contextual.structure import Structure, base_weight, out_in
from sparselora.contextual.surrogate import (
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
        self.plans = [plan for plan in plans if any(plan.sparsity.values())]
        self.batches = [{k: v for k, v in batch.items() if isinstance(v, Tensor)} for batch in batches]
        if not self.batches:
            raise InputError("calibration needs at least one batch, got none")
        self.config = plans[0].mode.config

    def run(self, *, refresh: bool = False) -> None:
        """Fill the plans. ``refresh`` measures the model as it is now and leaves the cache alone."""
        # Processes that gather weights from one another measure together: the cache of one may not be that of another.
        is_parted = is_sharded(self.plans[0].linears.up.base)
        moments = self._measure() if refresh or is_parted else self.moments()
        for plan in self.plans:
            with gathered(self.structure.module(plan.block.name)):
                apply_moments(plan, moments)

    @property
    def steps(self) -> int:
        """Number of calls of ``progress`` by `moments`: after a batch of a pass, and after the fits of a layer."""
        return len(self.batches) * (2 if self._needs_second_pass else 1) + len(self.plans)

    def moments(self, progress: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
        """Return the measurements of the sparse layers, named ``LAYER.NAME``, on the CPU; from the cache if there.

        Args:
            progress: called after each of `steps` steps, unless the cache has them.
        """
        weights = [p for _, p in sorted(stored_tensors(self.structure.model).items())]
        config = self.config
        parts: dict[str, Value] = {
            "weights": digest(*weights), "data": data_digest(self.batches), "mode": config.mode,
            "rank": config.surrogate_rank, "channels": config.surrogate_channels,
            "layers": repr([(p.block.index, *p.sparsity.values()) for p in self.plans]),
            "output": config.dense_output_tokens,
        }  # fmt: skip
        return self.cache.fetch("calibration", parts, lambda: self._measure(progress))

    @property
    def _is_encoder_decoder(self) -> bool:
        """True if labels make the input of a decoder, which is not sparse but has to run."""
        config: Any = self.structure.model.config
        return bool(getattr(config, "is_encoder_decoder", False))

    # --- measuring ---

    @property
    def _needs_second_pass(self) -> bool:
        return self.plans[0].mode.fits_maps and self.config.surrogate_channels > 0

    def _measure(self, progress: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
        collectors = [_Collector(plan, self.structure) for plan in self.plans]
        self._pass(collectors, progress)
        if self._needs_second_pass:
            for collector in collectors:  # the map stands for what the kept channels leave
                collector.keep(self.config.surrogate_channels)
            self._pass(collectors, progress)
        measured: dict[str, Tensor] = {}
        for collector in collectors:
            with gathered(self.structure.module(collector.plan.block.name)):
                measured |= collector.result()
            progress()
        return measured

    @torch.no_grad()
    def _pass(self, collectors: Sequence[_Collector], progress: Callable[[], object]) -> None:
        model: Any = self.structure.model
        device = next(model.parameters()).device
        # The logits of a vocabulary are of no use here, and larger than all else in the pass: those of one token.
        fewest = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
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
                    model(**inputs, **fewest)
                finally:
                    for handle in handles:
                        handle.remove()
                progress()


class _Collector:
    """Moments of one layer, from hooks on its linear layers."""

    def __init__(self, plan: LayerPlan, structure: Structure) -> None:
        self.plan, self.structure = plan, structure
        block, linears = plan.block, plan.linears
        self._device = linears.device
        self.hidden = ChannelStatistics(linears.ffn_width, self._device)
        self.ffn = self._pairs() if plan.mode.fits_maps else None
        self.kept_channels: Tensor | None = None
        self._x: Tensor | None = None
        self._h: Tensor | None = None
        heads = block.attention
        self.attention = AttentionStatistics(heads.heads, heads.kv_heads, heads.head_dim, heads.rope, self._device)
        self.inputs = {
            part: AffineStatistics(out_in(linears.attention[part].module)[1], 0, self._device) for part in ("q", "o")
        }  # fmt: skip
        self._parts: dict[str, Tensor] = {}
        self.measure_attention = True

    def keep(self, count: int) -> None:
        """Fix the ``count`` largest channels, and start the FFN's moments again, of what they leave."""
        self.kept_channels = largest_channels(self.hidden.norms, count)
        self.ffn = self._pairs()
        self.measure_attention = False

    def _pairs(self) -> AffineStatistics:
        """Moments of the FFN's inputs and outputs, of no token yet."""
        d_out, d_in = self._sides()
        return AffineStatistics(d_in, d_out, self._device)

    def _sides(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the FFN as one map."""
        return out_in(self.plan.linears.down.module)[0], out_in(self.plan.linears.up.module)[1]

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
        if plan.sparsity["ffn"]:
            handles += [
                module(plan.block.ffn.up).register_forward_pre_hook(lambda _, x: self._ffn_input(_flat(x[0], rows))),
                module(plan.block.ffn.down).register_forward_hook(
                    lambda _, x, y: self._ffn_output(_flat(x[0], rows), _flat(y, rows))
                ),
            ]
        if plan.sparsity["attention"] and self.measure_attention:
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
        if self.kept_channels is None:
            self.hidden.update(h)
        if self.ffn is not None:
            if self.kept_channels is not None:
                layer = self.plan.linears.down
                down = layer.effective(h.dtype).index_select(1, self.kept_channels)  # its LoRA stays on kept channels
                y = y - h.index_select(1, self.kept_channels) @ down.t()
                bias = layer.bias(y.dtype)
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
        """Return the measurements on the CPU, named ``LAYER.NAME``."""
        plan, mode = self.plan, self.plan.mode
        measured: dict[str, Tensor] = {}
        if plan.sparsity["ffn"]:
            measured |= {"mean": self.hidden.mean, "norms": self.hidden.norms}
            if self.ffn is not None:
                rank = min(mode.config.surrogate_rank, *self._sides())
                measured |= {f"ffn.{k}": v for k, v in fit_affine(self.ffn, rank).tensors().items()}
        if plan.sparsity["attention"]:
            qk, v = self.attention.scores()
            measured |= {"qk": qk, "v": v}
            if mode.fits_maps:
                for part in ("q",) if plan.block.attention.fused else ("q", "k", "v"):
                    measured |= self._low_rank(part, self.inputs["q"])
                measured |= self._low_rank("o", self.inputs["o"])
        return {f"{plan.block.index}.{name}": value.cpu() for name, value in measured.items()}

    def _low_rank(self, part: str, stats: AffineStatistics) -> dict[str, Tensor]:
        linear = self.plan.linears.attention[part]
        weight = linear.stored().double()
        bias = linear.bias(torch.float64)
        fitted = fit_low_rank(stats, weight, bias, min(self.plan.mode.config.surrogate_rank, *weight.shape))
        return {f"{part}.{name}": value for name, value in fitted.tensors().items()}


def _flat(x: Tensor, rows: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).index_select(0, rows)


def apply_moments(plan: LayerPlan, measured: Mapping[str, Tensor]) -> None:
    """Set the means and the fixed choices of a layer's mode from the measurements of all layers."""
    mode, prefix, device = plan.mode, f"{plan.block.index}.", plan.linears.device
    moments = {
        name.removeprefix(prefix): value.to(device) for name, value in measured.items() if name.startswith(prefix)
    }
    base = base_weight(plan.linears.up.base).dtype
    dtype = base if base.is_floating_point else torch.bfloat16
    if mode.sparsity["ffn"] and mode.config.compensate == "mean":
        mode.mean = moments["mean"].to(torch.promote_types(dtype, torch.float32))
        mode.mean_output = plan.linears.down.stored().to(mode.mean.dtype) @ mode.mean
    mode.fix(moments, dtype)
