"""The losses that the sparse cells of each layer cost, one layer after the other, by forward passes alone.

Each layer's FFN, and then its attention projections, is made sparse for the context tokens, in every mode and at every
level, by the code that a sparse training step runs. The layers below it are not computed again, and the layers above
compute all cells of a layer side by side (`layer_passes`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from sparselora.config.sparsity import MODES as FACTS
from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.contextual.layer_sensitivity import Cell, Increase, Losses, increase, with_layers
from sparselora.contextual.modes import Mode, selects_channels
from sparselora.evaluation.layer_passes import LayerPasses, RowBatch
from sparselora.evaluation.layer_probe import LayerProbe
from sparselora.evaluation.layer_verdict import CONTRAST, PROFILED
from sparselora.evaluation.sparse_blocks import SparseBlocks

Tensor = torch.Tensor

REPLACED = 1.0
"""The sparsity in the tables of a mode that replaces the whole layer."""


@dataclass(frozen=True)
class Rows:
    """Batches of rows, and the losses of the rows under the dense model in their order.

    Attributes:
        joined: the same rows, in their order, in fewer and larger batches, for choices that do not depend on the batch.
    """

    batches: list[RowBatch]
    dense: Losses
    joined: list[RowBatch]

    @classmethod
    def of(cls, passes: LayerPasses, batches: list[RowBatch]) -> Rows:
        sums = np.concatenate([passes.row_losses(batch) for batch in batches])
        counts = np.concatenate([batch.counts for batch in batches])
        return cls(batches, Losses(sums, counts), passes.joined(batches))

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


def layer_cells(
    base: SparsityConfig, levels: Mapping[Part, Sequence[float]], layer: int
) -> list[tuple[str, float, SparsityConfig]]:
    """Return every cell of a layer: mode, sparsity in the tables, settings with that cell alone sparse."""
    cells = []
    for part, sparsities in levels.items():
        for mode in PROFILED if sparsities else ():
            config = base.replace(mode=mode)
            if part == "attention" and not FACTS[mode].has_attention:
                continue
            for level in sparsities if selects_channels(config) else sparsities[-1:]:
                sparsity = level if selects_channels(config) else REPLACED
                cells.append((mode, sparsity, with_layers(config, [Cell(layer, part, level)])))
    return cells


class LayerProfiler:
    """Measures the cells of one layer after the other.

    Args:
        passes: of a causal model on its device, without gradients.
        rows: rows to measure on.
        base: everything about sparsity but the mode and the sparsities.
        levels: sparsities of each part.
        moments: calibrated measurements of every layer, as `sparselora.contextual.statistics` names them.
    """

    def __init__(
        self, passes: LayerPasses, rows: Rows, base: SparsityConfig, levels: Mapping[Part, Sequence[float]],
        moments: Mapping[str, Tensor], cache_dir: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.passes, self.structure = passes, passes.structure
        self.rows, self.base, self.levels = rows, base, levels
        self.moments, self.cache_dir = moments, cache_dir

    def inputs(self, layer: int) -> list[Tensor]:
        """Return the hidden states that enter ``layer``, batch by batch."""
        return [self.passes.dense(batch, layer)[1] for batch in self.rows.batches]

    def measure(self, layer: int, inputs: Sequence[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """Measure a layer, and return its tables and the hidden states that enter the next one.

        Args:
            inputs: hidden states that enter ``layer``, batch by batch.
        """
        cells = layer_cells(self.base, self.levels, layer)
        blocks = SparseBlocks(self.structure, [layer], self.base.replace(mode="dense"))
        plan = blocks.plans[0]
        try:
            modes: list[Mode] = []
            fixed: list[int] = []
            others: list[int] = []
            for number, (_, _, config) in enumerate(cells):
                blocks.set_mode(config, self.moments, self.cache_dir)
                modes.append(plan.mode)
                (fixed if blocks.is_fixed else others).append(number)
            probe = LayerProbe(plan, self.moments, [part for part, levels in self.levels.items() if levels])
            # A pass of the model waits for the device: those that give a block's arguments come before all the others.
            joined = [
                self.passes.block_outputs(batch, layer, hidden, self._states(blocks, [modes[n] for n in fixed], batch))
                for batch, hidden in zip(self.rows.joined, self._joined(inputs), strict=True)
            ]
            calls = [
                self.passes.block_outputs(
                    batch, layer, hidden, self._states(blocks, [modes[n] for n in others], batch, probe)
                )
                for batch, hidden in zip(self.rows.batches, inputs, strict=True)
            ]
            losses, outputs = [], []
            for batch, states in zip(self.rows.batches, calls, strict=True):
                losses.append(self.passes.losses_after(batch, layer, itertools.islice(states, len(others))))
                outputs.append(next(states))
            of_fixed = [
                self.passes.losses_after(batch, layer, states)
                for batch, states in zip(self.rows.joined, joined, strict=True)
            ]
        finally:
            blocks.remove()
        sums = np.empty((len(cells), len(self.rows.dense.counts)))
        sums[others], sums[fixed] = torch.cat(losses, dim=1).cpu().numpy(), torch.cat(of_fixed, dim=1).cpu().numpy()
        return self._tables(layer, cells, sums, probe), outputs

    def _joined(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the hidden states of `Rows.joined` from those of `Rows.batches`, padded with zeros."""
        remaining, joined = iter(inputs), []
        for batch in self.rows.joined:
            parts: list[Tensor] = []
            while sum(map(len, parts)) < batch.layout.batch:
                part = next(remaining)
                parts.append(F.pad(part, (0, 0, 0, batch.layout.length - part.shape[1])))
            joined.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        return joined

    def _states(
        self, blocks: SparseBlocks, modes: Sequence[Mode], batch: RowBatch, probe: LayerProbe | None = None
    ) -> Iterator[AbstractContextManager[None]]:
        """Yield the states that the one block of ``blocks`` is measured in: each mode, and dense under ``probe``."""
        (plan,) = blocks.plans
        for mode in modes:
            plan.mode = mode
            yield blocks.within(batch, all_tokens=not self.base.dense_output_tokens)
        if probe is not None:
            yield probe.watching(batch, self.structure)

    def _tables(
        self,
        layer: int,
        cells: Sequence[tuple[str, float, SparsityConfig]],
        sums: NDArray[np.float64],
        probe: LayerProbe,
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
