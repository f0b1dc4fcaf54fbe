"""Whole schedules of a profile: their losses next to the sums of those of their single layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from sparselora.config.sparsity import MODES as FACTS
from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.contextual.layer_schedule import SparseMacs
from sparselora.contextual.layer_sensitivity import Cell, with_layers
from sparselora.contextual.modes import selects_channels
from sparselora.evaluation.layer_passes import LayerPasses
from sparselora.evaluation.layer_profile import REPLACED, Rows
from sparselora.evaluation.layer_verdict import PROFILED, SUGGESTED, cells_within
from sparselora.evaluation.profile_request import ProfileRequest
from sparselora.evaluation.sparse_blocks import SparseBlocks
from sparselora.runs.progress import Progress

Tensor = torch.Tensor

_LEAST_SPARSE = 2
"""First layer, and distance of the last from the end, of the blanket schedules: the published recipes begin there."""
_HALVINGS = 8
"""Limits of a single layer that are tried: from the tolerance down to a 128th of it, below any standard error."""


class ScheduleLosses:
    """Losses of a model under whole schedules, one after the other, for which it is patched once.

    Args:
        passes: of the model.
        moments: calibrated measurements of every layer, as `sparselora.contextual.statistics` names them.
    """

    def __init__(self, passes: LayerPasses, moments: Mapping[str, Tensor], cache_dir: str | Path | None = None) -> None:
        structure = passes.structure
        self._passes, self._cache_dir = passes, cache_dir
        self._moments = {name: value.to(passes.head.weight.device) for name, value in moments.items()}
        self._blocks = SparseBlocks(structure, range(len(structure.blocks)), SparsityConfig(mode="dense"))

    def __enter__(self) -> ScheduleLosses:
        return self

    def __exit__(self, *_: object) -> None:
        self._blocks.remove()

    def measure(self, rows: Rows, config: SparsityConfig) -> NDArray[np.float64]:
        """Return the loss of each row ``(rows,)`` with every layer as sparse as ``config`` says.

        Rows are joined in as few passes as there is room for. Within one, each batch makes its own choices.
        """
        blocks = self._blocks
        blocks.set_mode(config, self._moments, self._cache_dir)
        losses = []
        for batch in rows.joined:
            with blocks.within(batch, all_tokens=not config.dense_output_tokens):
                losses.append(self._passes.row_losses(batch))
        return np.concatenate(losses)


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


def fitted_schedule(
    request: ProfileRequest, passes: LayerPasses, rows: Rows, cells: pd.DataFrame, moments: Mapping[str, Tensor]
) -> tuple[list[Cell], float]:
    """Return the cells of a schedule that costs at most the tolerance as a whole, and what each alone may cost in %.

    Costs of layers do not add: where each may cost 1 %, all together cost 46 % on one model (results/profile).
    So the limit of a single layer is halved from the tolerance down until the whole schedule's cost, with two standard
    errors, is within it. No cells, and a limit of 0, where none is.
    """
    limit = request.tolerance
    with ScheduleLosses(passes, moments, request.cache_dir) as losses:
        for _ in range(_HALVINGS):
            sparse_cells = cells_within(cells, rows.dense.mean, limit)
            if not sparse_cells:
                break
            config = with_layers(request.base.replace(mode=SUGGESTED), sparse_cells)
            cost = rows.percents(rows.increase(losses.measure(rows, config)))
            if cost["percent"] + 2 * cost["percent_error"] <= request.tolerance:
                return sparse_cells, limit
            limit /= 2
    return [], 0.0


def schedule_table(
    request: ProfileRequest, passes: LayerPasses, rows: Mapping[str, Rows], cells: pd.DataFrame,
    schedule_cells: Sequence[Cell], moments: Mapping[str, Tensor], macs: SparseMacs,
) -> pd.DataFrame:  # fmt: skip
    """Return a row a schedule, mode and set of rows: the rise of the loss next to the sum of the single layers."""
    table = []
    layers = len(passes.blocks)
    schedules = whole_schedules(request, schedule_cells, layers)
    measured_losses: dict[tuple[object, ...], NDArray[np.float64]] = {}
    progress = Progress(len(schedules) * len(PROFILED), "schedule", "whole schedules")
    with progress, ScheduleLosses(passes, moments, request.cache_dir) as losses:
        for name, schedule in schedules.items():
            for mode in PROFILED:
                config = _with_mode(schedule, mode)
                for kind, measured in rows.items():
                    # Blanket schedules of a mode that replaces whole layers differ by name alone.
                    place = (mode, kind, *_effective_ratios(config, layers))
                    if place not in measured_losses:
                        measured_losses[place] = losses.measure(measured, config)
                    change = measured.increase(measured_losses[place])
                    table.append(
                        {"schedule": name, "mode": mode, "rows": kind, "flops_left": macs.remaining(config),
                         **measured.percents(change),
                         "sum_of_layers_percent": _sum_of_layers(config, cells, layers)}
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
    for layer, part, sparsity in _effective_ratios(config, layers):
        total += float(measured.get((layer, part, config.mode, sparsity), float("nan")))
    return total


def _effective_ratios(config: SparsityConfig, layers: int) -> list[tuple[int, Part, float]]:
    """Return layer, part and sparsity, `REPLACED` where the mode replaces it, of each part that is sparse."""
    parts: tuple[Part, ...] = ("ffn", "attention")
    ratios = [(layer, part, config.ratio(layer, part)) for layer in range(layers) for part in parts]
    selects = selects_channels(config)
    return [(layer, part, ratio if selects else REPLACED) for layer, part, ratio in ratios if ratio > 0]
