"""One measurement of the sensitivity of layers, from a request to the files of its folder.

Forward passes alone, over rows of the training data, with one part of one layer sparse at a time. The schedule that is
chosen from them and a uniform one of the same budget are then measured on further rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Shape
from sparselora.contextual.layer_schedule import SparseMacs, choose_schedule, predicted_increase, uniform_schedule
from sparselora.contextual.layer_sensitivity import (
    Cell,
    Increase,
    Losses,
    cells,
    evaluate,
    increase,
    sensitivity,
    sparse_losses,
    with_layers,
)
from sparselora.contextual.modes import selects_channels
from sparselora.data.load import Data, load_data
from sparselora.errors import InputError
from sparselora.evaluation.adapted_model import AdaptedModel, load_adapted_model
from sparselora.evaluation.row_batches import Batch, average_workload, disjoint_rows, row_batches
from sparselora.evaluation.sensitivity_request import SensitivityRequest
from sparselora.models.load import device_name
from sparselora.models.model_files import model_facts, model_label
from sparselora.report.sensitivity import loss_by_layer
from sparselora.runs.files import write_csv, write_text
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress

_UNTRAINED_SHARE = 0.95
"""A classifier whose loss is above this share of that of guessing has not learned: its head is fresh, most likely."""
_CHANCE_SHARE = 0.1
"""Share of cells that may lower the loss by more than two standard errors without a doubt about the model: by chance
one in forty does, and a layer or two may truly be better off sparse."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class LayerSensitivities:
    """The outcome of a measurement.

    Attributes:
        data_name: name of the data set.
        dense_loss: loss of the dense model on the rows measured on, nats a label.
        allocation: a row per layer and part: its sparsity in each schedule, its MACs per sparse token.
        check: a row per schedule: its loss on other rows, and what was predicted.
        verdict: sentence on the difference between the schedules.
        doubt: sentence on a model that does not fit these data; None where it does.
    """

    data_name: str
    dense_loss: float
    allocation: pd.DataFrame
    check: pd.DataFrame
    verdict: str
    doubt: str | None


def run_sensitivity(request: SensitivityRequest, folder: RunFolder) -> LayerSensitivities:
    """Load the model and its rows, measure, choose a schedule, check it, and write everything.

    Args:
        folder: reserved, but not entered: nothing is written before the data and the model have been checked.
    Raises:
        InputError: data, a model or settings that do not go together, an untrained classifier, or a budget that no
            schedule keeps.
    """
    measurement = Measurement.prepare(request)
    with folder:
        folder.note(device=device_name(measurement.adapted.device), **model_facts(str(request.config.model)))
        return _measure(measurement, folder)


# --- what is measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """A model without gradients and disjoint batches of training rows.

    Attributes:
        batches: rows to measure on.
        held_out: rows to check the schedules on.
        calibration: rows that the mode is fitted to; None where it needs none.
        macs: what the layers cost on ``batches``.
        dense: losses of the dense model on ``batches``.
    """

    request: SensitivityRequest
    adapted: AdaptedModel
    data: Data
    batches: list[Batch]
    held_out: list[Batch]
    calibration: list[Batch] | None
    macs: SparseMacs
    dense: Losses

    @classmethod
    def prepare(cls, request: SensitivityRequest) -> Measurement:
        """Load everything and try the extremes, so that what can be wrong with the input is found at once."""
        data = load_data(request.config, request.adapter)
        adapted = load_adapted_model(request.config, request.adapter, len(data.labels))
        adapted.model.requires_grad_(False)
        measured, held_out, calibration = (
            row_batches(data.train.iloc[rows], data, adapted, request.config)
            for rows in disjoint_rows(len(data.train), _sizes(request, len(data.train)), request.config.seed)
        )
        shape = Shape.from_config(adapted.model.config.to_dict())
        macs = SparseMacs(shape, average_workload(measured, request.is_causal))
        dense = evaluate(adapted.model, measured, bf16=adapted.bf16)
        measurement = cls(request, adapted, data, measured, held_out, calibration or None, macs, dense)
        measurement._check_trained()
        measurement._check_schedules()
        return measurement

    @property
    def cells(self) -> list[Cell]:
        """Every part of every layer at every level."""
        return cells(self.macs.shape.layers, self.request.levels, self.request.sparsity)

    @property
    def title(self) -> str:
        return f"{model_label(str(self.request.config.model))} on {self.data.name}"

    def sparse_losses(self, batches: Sequence[Batch], config: SparsityConfig) -> Losses:
        """Return the losses with the model sparse as ``config`` says."""
        return sparse_losses(
            self.adapted.model, batches, config, calibration=self.calibration, cache_dir=self.request.cache_dir,
            bf16=self.adapted.bf16,
        )  # fmt: skip

    def schedules(self, rows: Rows) -> dict[str, SparsityConfig]:
        """Return the schedules to compare: one sparsity for all layers, and what is chosen by ``rows``.

        Args:
            rows: of `sparselora.contextual.layer_sensitivity.sensitivity`.
        Raises:
            InputError: the budget cannot be had.
        """
        sparsity, budget = self.request.sparsity, self.request.budget
        cheapest = choose_schedule(sparsity, rows, self.macs, budget)
        return {"uniform": uniform_schedule(sparsity, self.macs, budget, self.request.parts), "chosen": cheapest}

    def _check_trained(self) -> None:
        if self.request.is_causal:
            return
        loss, guessing = self.dense.mean, math.log(self.adapted.model.config.num_labels)
        if loss >= _UNTRAINED_SHARE * guessing:
            raise InputError(
                f"the dense model's loss is {loss:.3f}, no better than guessing ({guessing:.3f}), so nothing can be "
                "measured by it; give a trained classifier, or the adapter of a dense run"
            )

    def _check_schedules(self) -> None:
        """Raise for a budget that no schedule keeps, or a sparsity that the model does not take."""
        measured = self.cells
        self.schedules([{**vars(cell), "loss_increase": 0.0} for cell in measured])
        self.sparse_losses(self.batches[:1], with_layers(self.request.sparsity, [measured[0], measured[-1]]))


def _sizes(request: SensitivityRequest, n_rows: int) -> list[int]:
    """Return how many rows are measured on, held out and calibrated with; the first two are the same in every mode."""
    n_fitted = request.sparsity.calibration_samples if request.sparsity.needs_calibration else 0
    sizes = [request.samples, request.held_out, n_fitted]
    if sum(sizes) > n_rows:
        raise InputError(
            f"{sum(sizes)} rows are needed (samples {request.samples}, held_out {request.held_out}, calibration "
            f"{n_fitted}), the training data has {n_rows}; ask for fewer"
        )
    return sizes


# --- measuring ----------------------------------------------------------------------------------------------------


def _measure(measurement: Measurement, folder: RunFolder) -> LayerSensitivities:
    request, macs, measured = measurement.request, measurement.macs, measurement.cells
    losses = partial(measurement.sparse_losses, measurement.batches)
    with Progress(len(measured), "cell", "sensitivity") as progress:
        rows = sensitivity(losses, measurement.dense, request.sparsity, measured, progress.update)
    table = pd.DataFrame(rows).assign(
        macs_saved=[macs.saved(request.sparsity, cell) for cell in measured],
        dense_loss=measurement.dense.mean,
        batches=len(measurement.batches),
    )
    write_csv(folder.path("sensitivity.csv"), table)
    schedules = measurement.schedules(rows)
    check, verdict = _check(measurement, schedules, rows)
    write_csv(folder.path("check.csv"), check)
    allocation = _allocation(measured, schedules, macs)
    write_csv(folder.path("allocation.csv"), allocation)
    for name, schedule in schedules.items():
        write_text(folder.path(f"{name}.yaml"), _yaml(name, schedule, measurement))
    uniform: dict[str, float] = {}
    if selects_channels(request.sparsity):
        uniform = {part: schedules["uniform"].ratio(0, part) for part in request.parts}
    loss_by_layer(
        folder.path("loss_by_layer.png"),
        table,
        allocation.rename(columns={"chosen": "sparsity"}),
        uniform,
        f"{measurement.title}, mode {request.sparsity.mode}, n = {len(measurement.batches)} batches of "
        f"{request.config.train_bsz}",
    )
    return LayerSensitivities(measurement.data.name, measurement.dense.mean, allocation, check, verdict, _doubt(table))


def _check(measurement: Measurement, schedules: Mapping[str, SparsityConfig], rows: Rows) -> tuple[pd.DataFrame, str]:
    """Measure the schedules on rows that were not used to choose, and say how they differ."""
    batches = measurement.held_out
    dense = evaluate(measurement.adapted.model, batches, bf16=measurement.adapted.bf16)
    losses = {name: measurement.sparse_losses(batches, schedule) for name, schedule in schedules.items()}
    table = [{"schedule": "dense", "remaining": 1.0, "predicted_increase": 0.0, "loss": dense.mean,
              "loss_increase": 0.0, "standard_error": 0.0}]  # fmt: skip
    for name, schedule in schedules.items():
        change = increase(losses[name], dense)
        table.append({"schedule": name, "remaining": measurement.macs.remaining(schedule),
                      "predicted_increase": predicted_increase(schedule, rows), **vars(change)})  # fmt: skip
    gap = increase(losses["chosen"], losses["uniform"])
    return pd.DataFrame(table).assign(batches=len(batches)), difference_text(gap)


def difference_text(gap: Increase) -> str:
    """Say by how much the chosen schedule's loss differs from the uniform one's, and if that is more than noise."""
    difference = f"chosen minus uniform: {gap.loss_increase:+.4f}"
    if math.isnan(gap.standard_error):
        return f"{difference} on one batch, which has no standard error: not tested; raise held_out"
    size = abs(gap.loss_increase) / gap.standard_error if gap.standard_error > 0 else 0.0
    word = "not distinguishable" if size <= 2 else "better" if gap.loss_increase < 0 else "worse"
    return f"{difference} ± {gap.standard_error:.4f} (standard error): {word}"


def _doubt(table: pd.DataFrame) -> str | None:
    """Warn where fewer layers help: such a model does not know these data, and no layer shows its worth."""
    n_helpful = int((table["loss_increase"] < -2 * table["standard_error"]).sum())
    if n_helpful <= _CHANCE_SHARE * len(table):
        return None
    return (
        f"{n_helpful} of {len(table)} cells lower the loss by more than two standard errors, so the model does not fit "
        "these data yet; train dense for some steps and give that adapter"
    )


def _allocation(measured: Sequence[Cell], schedules: Mapping[str, SparsityConfig], macs: SparseMacs) -> pd.DataFrame:
    """Return a row per layer and part: its sparsity in each schedule, its MACs per sparse token, dense and chosen."""
    dense, rows = SparsityConfig(mode="dense"), []
    for layer, part in dict.fromkeys((cell.layer, cell.part) for cell in measured):
        sparsities = {name: schedule.ratio(layer, part) for name, schedule in schedules.items()}
        before = macs.layer(dense, layer)[part]
        after = macs.layer(schedules["chosen"], layer)[part]
        rows.append({"layer": layer, "part": part, **sparsities, "dense_macs": before, "chosen_macs": after})
    return pd.DataFrame(rows)


def _yaml(name: str, schedule: SparsityConfig, measurement: Measurement) -> str:
    return (
        f"# The {name} schedule of `python -m sparselora sensitivity` for {measurement.title}:\n"
        f"# sparse tokens keep {measurement.macs.remaining(schedule):.3f} of the frozen projections' FLOPs "
        f"(budget {measurement.request.budget:g}).\n" + schedule.to_yaml()
    )
