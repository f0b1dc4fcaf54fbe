"""Plain SGD on an adapter's factors with the calibration rows: the rival of an edit that has the same information.

An edit moves singular values by statistics of the calibration rows; a few steps of gradient descent on the same rows
move both factors of the same modules. θ ← θ − η ∂L/∂θ with θ all of these factors and L the mean loss over the labels
of all rows, without dropout, momentum or decay. The step size η is chosen on the calibration rows alone, by two-fold
cross-validation: one half descends, the loss of the other is measured, and the halves change places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparselora.data.batches import Example
from sparselora.errors import InputError
from sparselora.evaluation.adapted_model import AdaptedModel
from sparselora.models.adapter_files import AdapterFile
from sparselora.models.lora import lora_layers, weights
from sparselora.spectral import calibrate as cal
from sparselora.spectral.edit import Factors, in_place, name_in_model
from sparselora.spectral.modes import PredictedChange
from sparselora.spectral.request import SGD_STEPS
from sparselora.spectral.sensitivity import Batch, PreparedBatch, cross_entropy_sum, frozen_in_evaluation

RELATIVE_STEPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Step sizes that are tried, as the length of the first step over ‖θ‖: a relative length is of use for every adapter,
and 3e-2 in one step is as far as the edits go."""

TABLE_COLUMNS = ("steps", "relative_step", "step_size", "validation_loss", "is_chosen")


@dataclass(frozen=True)
class SteppedAdapter:
    """An adapter after SGD steps.

    Attributes:
        adapter: as it is stored.
        new_factors: of the modules that moved, in the adapter's stored types.
        steps: how many were taken.
    """

    adapter: AdapterFile
    new_factors: Factors
    steps: int

    def factors(self, *, round_trip: bool = False) -> Factors:
        """Return the factors after the steps; nothing is decomposed, so that ``round_trip`` makes no difference."""
        return self.new_factors

    def predicted(self) -> PredictedChange:
        """Return no prediction: the statistics of singular values do not cover a change of their directions."""
        return PredictedChange(float("nan"), float("nan"))

    @property
    def change_l2(self) -> float:
        """‖ΔW' − ΔW‖_F over all modules, from thin factors: of an edit it is ‖Δσ‖₂."""
        total = 0.0
        for module, (new_A, new_B) in self.new_factors.items():
            A, B, scaling = self.adapter.factors(module)
            left = torch.cat([new_B.double(), -B.double()], dim=1)  # (d_out, 2r)
            right = torch.cat([new_A.double(), A.double()])  # (2r, d_in)
            total += scaling**2 * float(((left.T @ left) * (right @ right.T)).sum())
        return float(np.sqrt(max(total, 0.0)))


@dataclass(frozen=True)
class Descent:
    """The adapter after each number of `SGD_STEPS`, and ``table``, a row per number of steps and step size."""

    stepped: list[SteppedAdapter]
    table: pd.DataFrame


PASSES = 1 + 1 + len(RELATIVE_STEPS) * (max(SGD_STEPS) - 1 + len(SGD_STEPS)) + sum(SGD_STEPS) - len(SGD_STEPS)
"""Passes over the calibration rows that `descend` makes: the gradient where all begin; by fold the same, further
steps and validations; the remaining steps on all rows."""


def descend(
    adapted: AdaptedModel,
    adapter: AdapterFile,
    modules: Sequence[str],
    examples: Sequence[Example],
    batch_size: int,
    rng: np.random.Generator,
    progress: Callable[[int], object] = lambda rows: None,
) -> Descent:
    """Take SGD steps on the factors of ``modules``; the model is afterwards as before, bit for bit.

    Args:
        examples: the calibration rows, two or more.
        batch_size: rows that are computed together; a step always has the gradient of all of them.
        rng: draws the halves of the cross-validation.
        progress: called with the number of rows after each batch.
    Raises:
        InputError: fewer than two rows; rows without a label, or without a finite gradient.
    """
    if len(examples) < 2:
        raise InputError("SGD steps are validated on half of the calibration rows; let calib_samples be 2 or more")
    halves = [sorted(part) for part in np.array_split(rng.permutation(len(examples)), 2)]
    rows = [cal.batches([examples[i] for i in half], adapted.tokenizer, batch_size) for half in halves]
    whole = cal.batches(examples, adapted.tokenizer, batch_size)
    stored = {module: adapter.factors(module)[:2] for module in modules}
    with in_place(adapted.model, stored), frozen_in_evaluation(adapted.model):
        layers = lora_layers(adapted.model, names=[name_in_model(module) for module in modules])
        parameters = [factor for module in modules for factor in weights(layers[name_in_model(module)])]
        descent = _Descent(adapted.model, parameters, progress)
        start = [factor.double().to(parameters[0].device) for pair in stored.values() for factor in pair]
        slope = descent.gradient(start, whole)
        length = _norm(slope)
        if not (np.isfinite(length) and length > 0):
            raise InputError(
                "the loss of the calibration rows has no finite slope in lora_A and lora_B; check the rows"
            )
        sizes = [relative * _norm(start) / length for relative in RELATIVE_STEPS]
        losses = np.mean([descent.validation(start, sizes, rows[i], rows[1 - i]) for i in range(2)], axis=0)
        table, stepped = [], []
        for number, steps in enumerate(SGD_STEPS):
            best = int(np.argmin(losses[:, number]))
            for i, (relative, size) in enumerate(zip(RELATIVE_STEPS, sizes)):
                table.append((steps, relative, size, losses[i, number], int(i == best)))
            *_, end = descent.path(start, slope, sizes[best], steps, whole)
            new = zip(stored, zip(end[::2], end[1::2]))
            factors = {module: tuple(x.to(old) for x, old in zip(pair, stored[module])) for module, pair in new}
            stepped.append(SteppedAdapter(adapter, cast(Factors, factors), steps))
    return Descent(stepped, pd.DataFrame(table, columns=list(TABLE_COLUMNS)))


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())


@dataclass(frozen=True)
class _Descent:
    """The model's ``parameters`` θ, given values in float64 and asked for the loss and its gradient."""

    model: nn.Module
    parameters: list[nn.Parameter]
    progress: Callable[[int], object]

    def gradient(self, values: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
        """Return the gradient in float64 of the mean loss over all labels of ``batches``."""
        self._set(values)
        total, labels = [torch.zeros_like(value) for value in values], 0
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for batch, count in self._labelled(batches):
            gradients = torch.autograd.grad(
                cross_entropy_sum(self.model, batch), self.parameters, allow_unused=True, materialize_grads=True
            )
            for whole, part in zip(total, gradients):
                whole += part.double()
            labels += count
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        if labels == 0:
            raise InputError("half of the calibration rows have no label to predict; give more of them")
        return [whole / labels for whole in total]

    @torch.no_grad()
    def loss(self, values: Sequence[Tensor], batches: Sequence[Batch]) -> float:
        """Return the mean loss over all labels of ``batches``, in nats."""
        self._set(values)
        total, labels = 0.0, 0
        for batch, count in self._labelled(batches):
            total, labels = total + float(cross_entropy_sum(self.model, batch)), labels + count
        return total / max(labels, 1)

    def path(
        self, start: list[Tensor], slope: list[Tensor], size: float, steps: int, batches: Sequence[Batch]
    ) -> Iterator[list[Tensor]]:
        """Yield the values after each step; ``slope`` is the gradient at ``start``, which all paths share."""
        values = start
        for step in range(steps):
            gradient = slope if step == 0 else self.gradient(values, batches)
            values = [value - size * part for value, part in zip(values, gradient)]
            yield values

    def validation(
        self, start: list[Tensor], sizes: Sequence[float], train: Sequence[Batch], held_out: Sequence[Batch]
    ) -> NDArray[np.float64]:
        """Return the losses ``(sizes, SGD_STEPS)`` of ``held_out`` after steps on ``train``, infinity for NaN."""
        slope, losses = self.gradient(start, train), np.full((len(sizes), len(SGD_STEPS)), np.inf)
        for i, size in enumerate(sizes):
            for step, values in enumerate(self.path(start, slope, size, max(SGD_STEPS), train), start=1):
                if step in SGD_STEPS:
                    loss = self.loss(values, held_out)
                    losses[i, SGD_STEPS.index(step)] = loss if np.isfinite(loss) else np.inf
        return losses

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)

    def _labelled(self, batches: Sequence[Batch]) -> Iterator[tuple[PreparedBatch, int]]:
        """Yield the batches that have labels, and how many."""
        for raw in batches:
            batch = PreparedBatch.of(self.model, raw)
            if batch.labels:
                yield batch, batch.labels
            self.progress(batch.rows)
