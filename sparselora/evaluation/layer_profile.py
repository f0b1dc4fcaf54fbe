"""The losses that the sparse cells of each layer cost, one layer after the other, by forward passes alone.

Each layer's FFN, and then its attention projections, is made sparse for the context tokens, in every mode and at every
level, by the code that a sparse training step runs. The layers below it are not computed again, and the layers above
compute all cells of a layer side by side (`layer_passes`).

On a GPU half of the time of a small model's profile was the host's, which launches every operation. Of 24 layers of
Qwen2 with 43 cells each, on 128 rows in batches of 16, the cells take 250 thousand operations (30 a batch for one of an
FFN, 80 of attention), the layers above them as many, and whole schedules 190 thousand.
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
from sparselora.evaluation.sparse_blocks import SameInput, SparseBlocks

Tensor = torch.Tensor

REPLACED = 1.0
"""The sparsity in the tables of a mode that replaces the whole layer."""


@dataclass(frozen=True)
class Rows:
    """Batches of rows, and the losses of the rows under the dense model in their order.

    Attributes:
        joined: the same rows, in their order, in fewer and larger batches.
    """

    batches: list[RowBatch]
    dense: Losses
    joined: list[RowBatch]

    @classmethod
    def of(cls, passes: LayerPasses, batches: list[RowBatch], n_outputs: int = 1) -> Rows:
        """Measure the dense model on ``batches``; hidden states of ``n_outputs`` of a joined batch are kept at once."""
        sums = np.concatenate([passes.row_losses(batch) for batch in batches])
        counts = np.concatenate([batch.counts for batch in batches])
        return cls(batches, Losses(sums, counts), passes.joined(batches, n_outputs))

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
        device = passes.head.weight.device
        self.moments = {name: value.to(device) for name, value in moments.items()}  # once, and not for every cell
        self.cache_dir = cache_dir

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
            losses, outputs, remaining = [], [], iter(inputs)
            for joined in self.rows.joined:
                hidden = list(itertools.islice(remaining, len(joined.parts)))
                of_fixed = self._fixed_outputs(blocks, [modes[n] for n in fixed], joined, hidden)
                for number, (batch, entering) in enumerate(zip(joined.parts, hidden, strict=True)):
                    states = self._states(blocks, [modes[n] for n in others], batch, probe)
                    calls = self.passes.block_outputs(batch, layer, entering, states)
                    of_others = itertools.islice(calls, len(others))
                    of_cells = itertools.chain(of_others, (parts[number] for parts in of_fixed))
                    losses.append(self.passes.losses_after(batch, layer, of_cells))
                    outputs.append(next(calls))
        finally:
            blocks.remove()
        sums = np.empty((len(cells), len(self.rows.dense.counts)))
        sums[[*others, *fixed]] = torch.cat(losses, dim=1).cpu().numpy()
        return self._tables(layer, cells, sums, probe), outputs

    def _fixed_outputs(
        self, blocks: SparseBlocks, modes: Sequence[Mode], joined: RowBatch, hidden: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """Return the outputs ``(B, T, d)`` of the block of ``blocks`` under each mode, of each part of a joined batch.

        Choices that no batch changes are computed for many rows at a time, and the layers above for the rows of each
        part, without the padding that joining adds: on rows of GSM8K, sorted by length, nearly half of all positions.
        """
        padded = [F.pad(x, (0, 0, 0, joined.layout.length - x.shape[1])) for x in hidden]
        layer = blocks.plans[0].block.index
        states = self._states(blocks, modes, joined)
        outputs = self.passes.block_outputs(joined, layer, torch.cat(padded), states)
        return [joined.split(output) for output in outputs]

    def _states(
        self, blocks: SparseBlocks, modes: Sequence[Mode], batch: RowBatch, probe: LayerProbe | None = None
    ) -> Iterator[AbstractContextManager[None]]:
        """Yield the states that the one block of ``blocks`` is measured in: each mode, and dense under ``probe``."""
        (plan,) = blocks.plans
        same_input = SameInput()
        for mode in modes:
            plan.mode = mode
            yield blocks.within(batch, all_tokens=not self.base.dense_output_tokens, same_input=same_input)
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
