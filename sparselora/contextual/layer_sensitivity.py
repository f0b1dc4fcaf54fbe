"""The change of the loss when one part of one layer is sparse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.contextual.handle import sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.modes import selects_channels
from sparselora.models.label_scores import LabelScores

Tensor = torch.Tensor
Batch = Mapping[str, Tensor]

PARTS: tuple[Part, ...] = ("ffn", "attention")


# --- losses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """For each batch ``(n,)``: the summed loss in nats, and over how many labels."""

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.counts.sum())


def evaluate(model: nn.Module, batches: Sequence[Batch], *, bf16: bool = False) -> Losses:
    """The loss of ``model``, which is not sparse, in evaluation mode (no dropout).

    Args:
        batches: ``input_ids``, ``attention_mask`` and ``labels`` ``(batch, length)``, or ``(batch,)`` for a
            classifier, on the model's device.
        bf16: compute in bfloat16 autocast.
    """
    return _losses(model, batches, bf16, is_sparse=False)


@torch.no_grad()
def _losses(model: nn.Module, batches: Sequence[Batch], bf16: bool, *, is_sparse: bool) -> Losses:
    """`Losses` of ``model``; where it is sparse in evaluation, it is told what is context."""
    training = model.training
    model.eval()
    label_scores = LabelScores(model)
    sums, counts = [], []
    try:
        for batch in batches:
            labels = batch["labels"]
            inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=bf16):
                if labels.dim() == 2:
                    if is_sparse:
                        inputs["token_layout"] = TokenLayout.build(batch["attention_mask"].cpu(), labels.cpu())
                    count, total, _ = label_scores(inputs, labels).sum(dim=0)
                else:
                    logits = model(**inputs).logits
                    precise = torch.promote_types(logits.dtype, torch.float32)
                    count, total = len(labels), F.cross_entropy(logits.to(precise), labels, reduction="sum")
            sums.append(total)
            counts.append(int(count))
    finally:
        model.train(training)
    return Losses(torch.stack(sums).double().cpu().numpy(), np.array(counts, dtype=np.float64))


@dataclass(frozen=True)
class Increase:
    """Loss per label, its difference to the reference, and the standard error of that difference over batches."""

    loss: float
    loss_increase: float
    standard_error: float


def increase(losses: Losses, reference: Losses) -> Increase:
    """``losses`` minus ``reference`` on the same batches, paired. The standard error is NaN for one batch."""
    difference = losses.sums - reference.sums
    total = losses.counts.sum()
    mean, n = float(difference.sum() / total), len(difference)
    residual = difference - mean * losses.counts
    error = math.sqrt(n / (n - 1) * float(residual @ residual)) / total if n > 1 else float("nan")
    return Increase(losses.mean, mean, float(error))


def sparse_losses(
    model: nn.Module,
    batches: Sequence[Batch],
    config: SparsityConfig,
    *,
    calibration: Iterable[Batch] | None = None,
    cache_dir: str | Path | None = None,
    bf16: bool = False,
) -> Losses:
    """Losses as by `evaluate`, with ``model`` made sparse as ``config`` says; the model is left as it was."""
    # What is left out is measured against the dense model, so in its precision.
    measured = config.replace(sparse_eval=True, frozen_precision="native")
    handle = sparsify(model, measured, calibration=calibration, cache_dir=cache_dir)
    try:
        return _losses(model, batches, bf16, is_sparse=True)
    finally:
        handle.remove()


# --- one part at a time -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One part of one layer at one sparsity."""

    layer: int
    part: Part
    sparsity: float


def cells(layers: int, levels: Mapping[Part, Sequence[float]], config: SparsityConfig) -> list[Cell]:
    """Every cell to measure; where the mode replaces whole layers, one level is enough: the highest."""
    grid = []
    for part in PARTS:
        ascending = sorted(set(levels.get(part, ())))
        measured = ascending if selects_channels(config) else ascending[-1:]
        grid += [Cell(layer, part, sparsity) for layer in range(layers) for sparsity in measured]
    return grid


def with_layers(config: SparsityConfig, cells: Iterable[Cell]) -> SparsityConfig:
    """``config`` with these sparsities and no others."""
    named = {
        f"layer.{cell.layer}" + (".attention" if cell.part == "attention" else ""): cell.sparsity
        for cell in cells
        if cell.sparsity > 0
    }
    return config.replace(ffn_sparsity=0.0, attention_sparsity=0.0, layer_sparsity=named)


def sensitivity(
    measure: Callable[[SparsityConfig], Losses],
    reference: Losses,
    config: SparsityConfig,
    measured: Sequence[Cell],
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """One row a cell: layer, part, sparsity, and the fields of `Increase` with that cell alone sparse.

    Args:
        measure: losses under a configuration, as `sparse_losses` gives them.
        reference: those of the dense model on the same batches.
        config: everything but the sparsities: mode, rank, compensation, which tokens.
    """
    rows = []
    for cell in measured:
        change = increase(measure(with_layers(config, [cell])), reference)
        rows.append({**dataclasses.asdict(cell), **dataclasses.asdict(change)})
        progress()
    return rows
