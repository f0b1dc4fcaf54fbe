"""The profile of a causal language model before any training: the loss that each sparse layer alone costs.

Forward passes alone, on held-out rows. Each layer's FFN, and then its attention projections, is made sparse for the
context tokens, in every mode and at every level, by the code that a sparse training step runs. The layers below it are
not computed again, and the layers above compute all cells of a layer side by side (`layer_passes`). Channels and maps
that need calibration see training rows; no measured row is among them.
"""

from __future__ import annotations

import string
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from sparselora.config.sparsity import MODES as FACTS
from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.config.train import TrainConfig
from sparselora.contextual.cache import Cache
from sparselora.contextual.choices import fused_sizes
from sparselora.contextual.flops import Shape, Workload
from sparselora.contextual.handle import sparsify
from sparselora.contextual.layer_schedule import SparseMacs
from sparselora.contextual.layer_sensitivity import Cell, Increase, Losses, increase, with_layers
from sparselora.contextual.modes import mode_of, selects_channels
from sparselora.contextual.patches import Patches, patch_block
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.statistics import Calibration, apply_moments
from sparselora.contextual.step import Step
from sparselora.contextual.structure import Structure, find_blocks
from sparselora.contextual.surrogate import AffineMap, AttentionStatistics, ChannelStatistics
from sparselora.data.batches import Collator, Example
from sparselora.data.instructions import DEFAULT_TEMPLATE, encode_instructions
from sparselora.data.load import load_data
from sparselora.data.tokens import encode_prompts
from sparselora.errors import InputError
from sparselora.evaluation.layer_passes import LayerPasses, RowBatch
from sparselora.evaluation.layer_verdict import CONTRAST, PROFILED, SUGGESTED, chosen_cells, layer_verdicts
from sparselora.models import load as models
from sparselora.models.labels import IGNORED
from sparselora.models.load import evaluating
from sparselora.models.model_files import model_facts, model_label
from sparselora.report import profile as report
from sparselora.runs.files import write_csv, write_json, write_text
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress
from sparselora.runs.user_files import read_json

Tensor = torch.Tensor
Batch = Mapping[str, Tensor]

SHARES = (0.01, 0.03, 0.10, 0.25)
"""Shares of the channels whose energy is reported."""
PARTIAL = "profile.partial"
"""The file of the layers that are done, for a run that is started again."""

_REPLACED = 1.0
"""The sparsity in the tables of a mode that replaces the whole layer."""
_LEAST_SPARSE = 2
"""First layer, and distance of the last from the end, of the blanket schedules: the published recipes begin there."""


@dataclass(frozen=True)
class ProfileRequest:
    """Checked settings of one profile.

    Attributes:
        config: model, data, template, lengths, batch size, dtype and device.
        base: ranks of estimates and maps, calibration rows and which tokens are sparse; its mode is not used.
        ffn_levels, attention_levels: sparsities to measure, ascending; none leaves the part out.
        rows: held-out rows to measure on; as many others check the whole schedules.
        tolerance: rise of the answer loss, in % of the dense one, that a layer of the schedule may cost.
        schedule: a whole schedule to measure as well; None without.
    """

    config: TrainConfig
    base: SparsityConfig
    ffn_levels: tuple[float, ...]
    attention_levels: tuple[float, ...]
    rows: int
    tolerance: float
    schedule: SparsityConfig | None
    cache_dir: str | None

    @property
    def levels(self) -> dict[Part, tuple[float, ...]]:
        return {"ffn": self.ffn_levels, "attention": self.attention_levels}


# --- rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Batches of rows, and the losses of the rows under the dense model in their order."""

    batches: list[RowBatch]
    dense: Losses

    @classmethod
    def of(cls, passes: LayerPasses, batches: list[RowBatch]) -> Rows:
        sums = np.concatenate([passes.row_losses(batch) for batch in batches])
        return cls(batches, Losses(sums, np.concatenate([batch.counts for batch in batches])))

    def increase(self, sums: NDArray[np.float64]) -> Increase:
        """Return the rise over the dense loss, paired by row, for the losses ``sums (rows,)`` of these rows."""
        return increase(Losses(sums, self.dense.counts), self.dense)

    def percents(self, change: Increase) -> dict[str, float]:
        """Return a rise in nats per label, and in % of the dense loss, each with its standard error over rows."""
        percent = 100 / self.dense.mean
        return {
            **vars(change), "percent": percent * change.loss_increase,
            "percent_error": percent * change.standard_error,
        }  # fmt: skip


@dataclass(frozen=True)
class _Data:
    """Rows of a run: frames with ``prompt`` and ``completion``, of similar length next to each other."""

    name: str
    measured: pd.DataFrame
    further: pd.DataFrame
    calibration: pd.DataFrame


def _load_rows(request: ProfileRequest) -> _Data:
    """Draw the rows to measure on, as many to check schedules on, and those to calibrate on, by the run's seed.

    Raises:
        InputError: too few of either kind.
    """
    config, data = request.config, load_data(request.config)
    wanted = {"held-out": (data.eval, 2 * request.rows), "training": (data.train, request.base.calibration_samples)}
    drawn = {}
    for kind, (frame, count) in wanted.items():
        if len(frame) < count:
            raise InputError(
                f"{data.name} has {len(frame)} {kind} rows, and {count} are needed (--rows {request.rows} to measure "
                f"on and as many to check on, --calibration_rows {request.base.calibration_samples}); ask for fewer"
            )
        drawn[kind] = frame.iloc[np.random.default_rng(config.seed).permutation(len(frame))[:count]]
    rows = drawn["held-out"]
    return _Data(data.name, rows.iloc[: request.rows], rows.iloc[request.rows :], drawn["training"])


class _Encoder:
    """Frames of rows as batches on the model's device."""

    def __init__(self, config: TrainConfig, tokenizer: Any, device: torch.device) -> None:
        self._config, self._tokenizer, self._device = config, tokenizer, device

    def examples(self, frame: pd.DataFrame) -> list[Example]:
        """Return the rows as token ids and labels, the shortest first, so that little is padded."""
        examples: list[Example] = encode_instructions(frame, self._tokenizer, self._config.max_length).examples
        return sorted(examples, key=lambda example: len(example["input_ids"]))

    def tensors(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Return the collated batches of ``examples`` on the device, in their order."""
        collator, size = Collator(self._tokenizer.pad_token_id, causal=True), self._config.train_bsz
        batches = [collator.tensors(examples[i : i + size]) for i in range(0, len(examples), size)]
        return [{name: value.to(self._device) for name, value in batch.items()} for batch in batches]

    def batches(self, examples: Sequence[Example]) -> list[RowBatch]:
        return [RowBatch.build(batch, self._device) for batch in self.tensors(examples)]

    def empty_prompt(self) -> list[int]:
        """Return the tokens of the template without a prompt, at least one."""
        template = self._config.template
        literals = string.Formatter().parse(DEFAULT_TEMPLATE if template is None else template)
        return encode_prompts(self._tokenizer, ["".join(literal for literal, *_ in literals) or "\n"])[0]


def _with_prompts(examples: Sequence[Example], prompts: Sequence[list[int]]) -> list[Example]:
    """Return ``examples`` with other tokens before their labels, which stay the same."""
    replaced = []
    for example, prompt in zip(examples, prompts, strict=True):
        answer = example["input_ids"][len(_prompt(example)) :]
        replaced.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return replaced


def _prompt(example: Example) -> list[int]:
    """Return the tokens before the first label."""
    first = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
    tokens: list[int] = example["input_ids"][:first]
    return tokens


def _check_context(name: str, batches: Sequence[RowBatch]) -> None:
    """Raise where rows have no context: the last token of a row, which predicts nothing, is none."""
    tokens = sum(batch.layout.n_context - batch.layout.batch for batch in batches)
    if tokens <= 0:
        raise InputError(
            f"the rows of {name} have no context: every token but the last predicts a label, so there is nothing that "
            "could be sparse; give data with prompts (--prompt_field), whose completions alone are labelled"
        )


# --- sparse blocks ------------------------------------------------------------------------------------------------


class SparseBlocks:
    """Blocks of a model whose linear layers follow plans while a pass is under way, and are the model's own otherwise.

    Args:
        layers: blocks to patch, by index.
        config: what every plan begins with; `set_mode` changes it.
    """

    def __init__(self, structure: Structure, layers: Sequence[int], config: SparsityConfig) -> None:
        self.plans = [LayerPlan(structure, structure.blocks[layer], config) for layer in layers]
        self._patches = Patches(lambda: False)
        self._step: Step | None = None
        for plan in self.plans:
            patch_block(self._patches, plan, structure.module, lambda: self._step, causal=True)

    def set_mode(self, config: SparsityConfig, moments: Mapping[str, Tensor], cache_dir: str | Path | None) -> None:
        """Let the blocks be sparse as ``config`` says, by the calibrated ``moments``."""
        for plan in self.plans:
            plan.mode = mode_of(config)(plan.linears, config)
            plan.mode.attach(cache_dir)
            if config.needs_calibration and any(plan.sparsity.values()):
                apply_moments(plan, moments)

    @contextmanager
    def within(self, batch: RowBatch, *, all_tokens: bool) -> Iterator[None]:
        """Have the blocks be sparse for a pass over ``batch``: for its context tokens, or for all."""
        layout = batch.layout
        self._step = Step(layout, sparse=True, split=layout.n if all_tokens else layout.n_context, seed=0)
        try:
            yield
        finally:
            self._step = None

    def remove(self) -> None:
        """Put every module back as it was."""
        self._patches.remove()
        for plan in self.plans:
            plan.linears.release()


# --- energies -----------------------------------------------------------------------------------------------------


class _Probe:
    """Energies of the channels of one layer, and what the calibrated maps explain, on the context of measured rows."""

    def __init__(self, plan: LayerPlan, moments: Mapping[str, Tensor], parts: Sequence[Part]) -> None:
        self.plan, self.heads = plan, plan.block.attention
        device, heads = plan.linears.device, self.heads
        self.hidden = ChannelStatistics(plan.linears.ffn_width, device)
        self.attention = AttentionStatistics(heads.heads, heads.kv_heads, heads.head_dim, heads.rope, device)
        letters = ("q", "o") if heads.fused else ("q", "k", "v", "o")
        self.names = [*(["ffn"] if "ffn" in parts else []), *(letters if "attention" in parts else [])]
        self.maps = {name: _fitted(moments, plan.block.index, name, device) for name in self.names}
        self.sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.count = 0
        self._inputs: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, batch: RowBatch, structure: Structure) -> Iterator[None]:
        """Measure a dense pass of the block over ``batch``."""
        rows = batch.layout.tokens[: batch.layout.n_context]
        ffn, parts = self.plan.block.ffn, dict[str, Tensor]()

        def flat(x: Tensor) -> Tensor:
            return x.reshape(-1, x.shape[-1]).index_select(0, rows).double()

        def enters(module: Any, args: tuple[Any, ...]) -> None:
            self._inputs["ffn"] = flat(args[0])

        def leaves(module: Any, args: tuple[Any, ...], y: Tensor) -> None:
            self.hidden.update(flat(args[0]))
            self._explain("ffn", self._inputs["ffn"], flat(y))

        def projected(name: str) -> Callable[..., None]:
            def hook(module: Any, args: tuple[Any, ...], y: Tensor) -> None:
                parts[name] = flat(y)
                self._explain(name, flat(args[0]), parts[name])

            return hook

        hooks = []
        if "ffn" in self.names:
            hooks.append(structure.module(ffn.up).register_forward_pre_hook(enters))
            hooks.append(structure.module(ffn.down).register_forward_hook(leaves))
        for name in (name for name in self.names if name != "ffn"):
            hooks.append(structure.module(getattr(self.heads, name)).register_forward_hook(projected(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.count += len(rows)
        if "q" in parts:
            qkv = parts["q"].split(fused_sizes(self.heads), dim=1) if self.heads.fused else [parts[p] for p in "qkv"]
            self.attention.update(*qkv)

    def _explain(self, name: str, x: Tensor, y: Tensor) -> None:
        residual = (y - self.maps[name].apply(x)).square().sum()
        parts = (y.sum(dim=0), y.square().sum(), residual)
        self.sums[name] = tuple(a + b for a, b in zip(self.sums[name], parts)) if name in self.sums else parts  # type: ignore[assignment]

    def explained(self) -> dict[str, float]:
        """Return 1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖² of the map ŷ of each product; NaN where y does not vary."""
        result = {}
        for name, (total, squares, residual) in self.sums.items():
            variation = float(squares - total.square().sum() / self.count)
            result[name] = 1 - float(residual) / variation if variation > 0 else float("nan")
        return result

    def energies(self) -> list[dict[str, Any]]:
        """Return the share of the energy in the best channels, a row a kind of channel and `SHARES`.

        Energy of an FFN channel: (‖h_c‖·‖W_down[:, c]‖)²; of a kv channel of q and k (‖q_c‖·‖k_c‖)², as attention's
        choice scores it, and of v ‖v_c‖².
        """
        scores: dict[str, Tensor] = {}
        if "ffn" in self.names:
            down = self.plan.linears.down.stored().double()
            scores["ffn"] = self.hidden.norms * torch.linalg.vector_norm(down, dim=0)
        if "q" in self.names:
            scores["qk"], scores["v"] = self.attention.scores()
        return [
            {"layer": self.plan.block.index, "channels": kind, "best": share, "energy": energy_share(score, share)}
            for kind, score in scores.items()
            for share in SHARES
        ]


def energy_share(scores: Tensor, share: float) -> float:
    """Return the share of Σ scores² that the largest ``share`` of ``scores (n,)`` hold, at least one; NaN for zeros."""
    energy = scores.double().square().sort(descending=True).values
    count = max(1, round(share * len(energy)))
    total = float(energy.sum())
    return float(energy[:count].sum()) / total if total > 0 else float("nan")


def _fitted(moments: Mapping[str, Tensor], layer: int, name: str, device: torch.device) -> AffineMap:
    tensors = {part: moments[f"{layer}.{name}.{part}"].to(device) for part in ("down", "up", "bias")}
    return AffineMap.from_tensors(tensors)


# --- one layer ----------------------------------------------------------------------------------------------------


class LayerProfiler:
    """Measures the cells of one layer after the other.

    Args:
        structure: a causal model on its device, without gradients.
        base: everything about sparsity but the mode and the sparsities.
        levels: sparsities of each part.
        moments: calibrated measurements of every layer, as `sparselora.contextual.statistics` names them.
    """

    def __init__(
        self, structure: Structure, rows: Rows, base: SparsityConfig, levels: Mapping[Part, Sequence[float]],
        moments: Mapping[str, Tensor], cache_dir: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.structure, self.rows, self.base, self.levels = structure, rows, base, levels
        self.moments, self.cache_dir = moments, cache_dir
        self.passes = LayerPasses(structure)

    def inputs(self, layer: int) -> list[Tensor]:
        """Return the hidden states that enter ``layer``, batch by batch."""
        return [self.passes.dense(batch, layer)[1] for batch in self.rows.batches]

    def cells(self, layer: int) -> list[tuple[str, float, SparsityConfig]]:
        """Return every cell of a layer: mode, sparsity in the tables, settings with that cell alone sparse."""
        cells = []
        for part, levels in self.levels.items():
            for mode in PROFILED if levels else ():
                config = self.base.replace(mode=mode)
                if part == "attention" and not FACTS[mode].has_attention:
                    continue
                for level in levels if selects_channels(config) else levels[-1:]:
                    sparsity = level if selects_channels(config) else _REPLACED
                    cells.append((mode, sparsity, with_layers(config, [Cell(layer, part, level)])))
        return cells

    def measure(self, layer: int, inputs: Sequence[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """Measure a layer, and return its tables and the hidden states that enter the next one.

        Args:
            inputs: hidden states that enter ``layer``, batch by batch.
        """
        cells = self.cells(layer)
        blocks = SparseBlocks(self.structure, [layer], self.base.replace(mode="dense"))
        plan = blocks.plans[0]
        try:
            modes = []
            for _, _, config in cells:
                blocks.set_mode(config, self.moments, self.cache_dir)
                modes.append(plan.mode)
            probe = _Probe(plan, self.moments, [part for part, levels in self.levels.items() if levels])
            losses, outputs = [], []
            for batch, hidden in zip(self.rows.batches, inputs, strict=True):
                sparse = []
                for mode in modes:
                    plan.mode = mode
                    with blocks.within(batch, all_tokens=not self.base.dense_output_tokens):
                        sparse.append(self.passes.block_output(batch, layer, hidden))
                with probe.watching(batch, self.structure):
                    outputs.append(self.passes.block_output(batch, layer, hidden))
                losses.append(self.passes.losses_after(batch, layer, sparse))
        finally:
            blocks.remove()
        sums = np.concatenate(losses, axis=1) if cells else np.empty((0, 0))
        return self._tables(layer, cells, sums, probe), outputs

    def _tables(
        self, layer: int, cells: Sequence[tuple[str, float, SparsityConfig]], sums: NDArray[np.float64], probe: _Probe
    ) -> dict[str, Any]:
        rows, by_cell = [], {}
        for (mode, sparsity, config), cell_sums in zip(cells, sums, strict=True):
            part: Part = "ffn" if config.ratio(layer, "ffn") > 0 else "attention"
            by_cell[part, mode, sparsity] = Losses(cell_sums, self.rows.dense.counts)
            change = self.rows.increase(cell_sums)
            place: dict[str, Any] = {"layer": layer, "part": part, "mode": mode, "sparsity": sparsity}
            rows.append(place | self.rows.percents(change))
        first, second = CONTRAST
        contrasts = []
        for part, levels in self.levels.items():
            for sparsity in levels:
                change = increase(by_cell[part, first, sparsity], by_cell[part, second, sparsity])
                contrasts.append(
                    {"layer": layer, "part": part, "sparsity": sparsity, "difference": change.loss_increase,
                     "standard_error": change.standard_error}
                )  # fmt: skip
        explained = [{"layer": layer, "map": name, "explained": value} for name, value in probe.explained().items()]
        return {"cells": rows, "contrasts": contrasts, "energy": probe.energies(), "explained": explained}


# --- whole schedules ----------------------------------------------------------------------------------------------


def schedule_losses(
    passes: LayerPasses,
    structure: Structure,
    rows: Rows,
    config: SparsityConfig,
    moments: Mapping[str, Tensor],
    cache_dir: str | Path | None = None,
) -> NDArray[np.float64]:
    """Return the loss of each row ``(rows,)`` with every layer as sparse as ``config`` says."""
    sparse = [b.index for b in structure.blocks if any(config.ratio(b.index, p) for p in ("ffn", "attention"))]
    blocks = SparseBlocks(structure, sparse, config)
    try:
        blocks.set_mode(config, moments, cache_dir)
        losses = []
        for batch in rows.batches:
            with blocks.within(batch, all_tokens=not config.dense_output_tokens):
                losses.append(passes.row_losses(batch))
        return np.concatenate(losses)
    finally:
        blocks.remove()


def whole_schedules(request: ProfileRequest, schedule_cells: Sequence[Cell], layers: int) -> dict[str, SparsityConfig]:
    """Return the whole schedules to measure, by name: chosen, the user's, and one blanket range at each level."""
    schedules = {"chosen": with_layers(request.base, schedule_cells)} if schedule_cells else {}
    if request.schedule is not None:
        schedules["given"] = request.schedule
    last = layers - _LEAST_SPARSE
    for level in request.ffn_levels if last >= _LEAST_SPARSE else ():
        cells = [Cell(layer, "ffn", level) for layer in range(_LEAST_SPARSE, last + 1)]
        schedules[f"layers {_LEAST_SPARSE}-{last} at {level:g}"] = with_layers(request.base, cells)
    return schedules


def _schedule_table(
    request: ProfileRequest, passes: LayerPasses, structure: Structure, rows: Mapping[str, Rows],
    cells: pd.DataFrame, schedule_cells: Sequence[Cell], moments: Mapping[str, Tensor], macs: SparseMacs,
) -> pd.DataFrame:  # fmt: skip
    """Return a row a schedule, mode and set of rows: the rise of the loss next to the sum of the single layers."""
    table = []
    schedules = whole_schedules(request, schedule_cells, len(structure.blocks))
    with Progress(len(schedules) * len(PROFILED), "schedule", "whole schedules") as progress:
        for name, schedule in schedules.items():
            for mode in PROFILED:
                config = _with_mode(schedule, mode)
                for kind, measured in rows.items():
                    sums = schedule_losses(passes, structure, measured, config, moments, request.cache_dir)
                    change = measured.increase(sums)
                    table.append(
                        {"schedule": name, "mode": mode, "rows": kind, "flops_left": macs.remaining(config),
                         **measured.percents(change),
                         "sum_of_layers_percent": _sum_of_layers(config, cells, len(structure.blocks))}
                    )  # fmt: skip
                progress.update()
    return pd.DataFrame(table)


def _with_mode(schedule: SparsityConfig, mode: str) -> SparsityConfig:
    """Return the schedule under a mode; attention stays dense where the mode leaves out FFNs only."""
    if FACTS[mode].has_attention:
        return schedule.replace(mode=mode)
    layers = {key: value for key, value in schedule.layer_sparsity.items() if not key.endswith(".attention")}
    return schedule.replace(mode=mode, attention_sparsity=0.0, layer_sparsity=layers)


def _sum_of_layers(config: SparsityConfig, cells: pd.DataFrame, layers: int) -> float:
    """Return the sum of the rises in % of single layers as sparse as in a schedule; NaN where one was not measured."""
    measured = cells.set_index(["layer", "part", "mode", "sparsity"])["percent"]
    total = 0.0
    for layer in range(layers):
        for part in ("ffn", "attention"):
            sparsity = config.ratio(layer, part)
            if sparsity > 0:
                place = (layer, part, config.mode, sparsity if selects_channels(config) else _REPLACED)
                total += float(measured.get(place, float("nan")))
    return total


# --- the run ------------------------------------------------------------------------------------------------------


def run_profile(request: ProfileRequest, folder: RunFolder) -> str:
    """Load, measure and write everything, and return the summary to print.

    Args:
        folder: reserved, but not entered: nothing is written before data and model have been checked.
    Raises:
        InputError: data, a model or settings that do not go together.
    """
    config = request.config
    assert config.model is not None
    device = models.resolve_device(config.device)
    bf16 = models.is_bf16(config.dtype, device)
    data = _load_rows(request)
    model: Any
    model, tokenizer = models.load_causal_lm(
        config.model, torch.bfloat16 if bf16 else torch.float32, in_4bit=config.load_in_4bit
    )
    model.to(device).requires_grad_(False)
    encoder = _Encoder(config, tokenizer, device)
    examples = encoder.examples(data.measured)
    batches = encoder.batches(examples)
    _check_context(data.name, batches)
    structure = find_blocks(model)
    parts: list[Part] = [part for part, levels in request.levels.items() if levels]
    halves: dict[str, Any] = {f"{part}_sparsity": 0.5 for part in parts}
    every = request.base.replace(mode="random_fixed", **halves)
    sparsify(model, every, cache_dir=request.cache_dir).remove()  # raises for a model that cannot be sparse
    with folder, evaluating(model):
        folder.note(device=models.device_name(device), **model_facts(config.model))
        began = time.perf_counter()
        calibration = Calibration(
            structure,
            [LayerPlan(structure, b, every.replace(mode="surrogate")) for b in structure.blocks],
            encoder.tensors(encoder.examples(data.calibration)),
            Cache(request.cache_dir),
        )
        moments = calibration.moments()
        calibrated = time.perf_counter() - began
        passes = LayerPasses(structure)
        measured = Rows.of(passes, batches)
        profiler = LayerProfiler(structure, measured, request.base, request.levels, moments, request.cache_dir)
        prompts = _prompt_controls(encoder, passes, measured, examples)
        tables = _measured_layers(profiler, folder)
        cells, contrasts = pd.DataFrame(tables["cells"]), pd.DataFrame(tables["contrasts"])
        verdicts = layer_verdicts(cells, contrasts, measured.dense.mean, request.tolerance, prompts)
        verdicts = _with_maps(verdicts, pd.DataFrame(tables["energy"]), pd.DataFrame(tables["explained"]))
        schedule_cells = chosen_cells(verdicts)
        further = Rows.of(passes, encoder.batches(encoder.examples(data.further)))
        macs = SparseMacs(Shape.from_config(model.config.to_dict()), _workload(batches))
        schedules = _schedule_table(
            request, passes, structure, {"measured": measured, "further": further}, cells, schedule_cells, moments, macs
        )
        seconds = time.perf_counter() - began
        facts = {
            "model": model_label(config.model), "data": data.name, "rows": request.rows,
            "dense_loss": measured.dense.mean, "tolerance": request.tolerance,
            "cells": len(cells), "seconds": round(seconds, 1), "calibration_seconds": round(calibrated, 1),
            **_floor(profiler.passes, model, structure, device, bf16),
        }  # fmt: skip
        folder.note(**{name: value for name, value in facts.items() if name not in ("model", "data")})
        best = with_layers(request.base.replace(mode=SUGGESTED, seed=None), schedule_cells)
        page = report.profile_page(facts, verdicts, prompts, schedules)
        for name, table in {
            "profile.csv": cells, "contrasts.csv": contrasts, "energy.csv": pd.DataFrame(tables["energy"]),
            "maps.csv": pd.DataFrame(tables["explained"]), "layers.csv": verdicts, "prompts.csv": prompts,
            "schedules.csv": schedules,
        }.items():  # fmt: skip
            write_csv(folder.path(name), table)
        report.heat_map(folder.path("profile.png"), cells, _title(facts))
        write_text(folder.path("profile.md"), page)
        write_text(folder.path("schedule.yaml"), _yaml(best, facts, macs))
        folder.path(PARTIAL).unlink(missing_ok=True)
    return page


def _measured_layers(profiler: LayerProfiler, folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Measure layer after layer, and keep what is done, so that a run that was stopped goes on at the next layer."""
    path = folder.path(PARTIAL)
    done: list[dict[str, Any]] = read_json(path, allow_nan=True) if folder.can_resume() and path.is_file() else []
    layers = len(profiler.structure.blocks)
    with Progress(layers, "layer", "profile", done=len(done)) as progress:
        hidden = profiler.inputs(len(done)) if len(done) < layers else []
        for layer in range(len(done), layers):
            tables, hidden = profiler.measure(layer, hidden)
            done.append(tables)
            write_json(path, done)
            progress.update()
    return {name: [row for tables in done for row in tables[name]] for name in done[0]}


def _prompt_controls(
    encoder: _Encoder, passes: LayerPasses, measured: Rows, examples: Sequence[Example]
) -> pd.DataFrame:
    """Return what another row's prompt and an empty one cost: a task that does not read its prompt has no context."""
    originals = [_prompt(example) for example in examples]
    prompts = {"shuffled": [*originals[-1:], *originals[:-1]], "empty": [encoder.empty_prompt()] * len(originals)}
    table = []
    for name, tokens in prompts.items():
        other = Rows.of(passes, encoder.batches(_with_prompts(examples, tokens)))
        change = measured.increase(other.dense.sums)
        table.append({"prompt": name, "rows": len(originals), **measured.percents(change)})
    return pd.DataFrame(table)


def _with_maps(verdicts: pd.DataFrame, energy: pd.DataFrame, explained: pd.DataFrame) -> pd.DataFrame:
    """Return ``verdicts`` with the energy in the best channels and what the map explains (of attention: v and o)."""
    columns = {}
    for part, channels, fitted in (("ffn", "ffn", "ffn"), ("attention", "v", "o")):
        rows = energy[energy["channels"] == channels] if len(energy) else energy
        for row in rows.to_dict("records"):
            columns[row["layer"], part, f"energy_best_{100 * row['best']:g}"] = row["energy"]
        for row in explained[explained["map"] == fitted].to_dict("records") if len(explained) else ():
            columns[row["layer"], part, "map_explained"] = row["explained"]
    names = [*(f"energy_best_{100 * share:g}" for share in SHARES), "map_explained"]
    added = {
        name: [columns.get((layer, part, name), float("nan")) for layer, part in verdicts[["layer", "part"]].to_numpy()]
        for name in names
    }
    text = verdicts.pop("verdict")
    return verdicts.assign(**added, verdict=text)


def _workload(batches: Sequence[RowBatch]) -> Workload:
    """Return the batches' average row."""
    rows = sum(batch.layout.batch for batch in batches)
    tokens, outputs = (sum(getattr(b.layout, name) for b in batches) for name in ("n", "n_output"))
    return Workload(max(1, rows // len(batches)), max(1, round(tokens / rows)), round(outputs / rows))


def _floor(passes: LayerPasses, model: Any, structure: Structure, device: torch.device, bf16: bool) -> dict[str, float]:
    """Return the FLOPs of the layers' products that the cells need, and the seconds these take at the device's rate.

    The rate is measured on the product of a first FFN projection with 4,096 tokens.
    """
    plan = LayerPlan(structure, structure.blocks[0], SparsityConfig(mode="dense"))
    weights = [linear.stored() for linear in plan.linears.all]
    distinct = {weight.data_ptr(): weight.numel() for weight in weights}
    flops = 2.0 * sum(distinct.values()) * passes.restarted_tokens
    weight = plan.linears.up.stored().to(torch.bfloat16 if bf16 else torch.float32)
    x = torch.randn(4096, weight.shape[1], device=device).to(weight.dtype)
    repeats = 20

    def run() -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run()
    rate = repeats * 2.0 * x.shape[0] * weight.numel() / run()
    return {"tflop": float(f"{flops / 1e12:.3g}"), "floor_seconds": float(f"{flops / rate:.3g}")}


def _title(facts: Mapping[str, Any]) -> str:
    return f"{facts['model']} on {facts['data']}: one layer sparse at a time, n = {facts['rows']} held-out rows"


def _yaml(config: SparsityConfig, facts: Mapping[str, Any], macs: SparseMacs) -> str:
    return (
        f"# Schedule of `python -m sparselora profile` for {facts['model']} on {facts['data']}: each layer alone costs "
        f"at most\n# {facts['tolerance']:g} % of the answer loss, standard error included; sparse tokens keep "
        f"{macs.remaining(config):.3f} of the frozen\n# projections' FLOPs. Costs do not add: see schedules.csv.\n"
        + config.to_yaml()
    )
