"""Layer sparsities that keep a FLOP budget: those that cost the least loss as measured, and one for all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.contextual.flops import Shape, Workload, layer_costs
from sparselora.contextual.layer_sensitivity import Cell, with_layers
from sparselora.contextual.modes import selects_channels
from sparselora.errors import InputError

_COMPONENT: dict[Part, str] = {"ffn": "FFN", "attention": "attention projections"}
_FRONT = 20_000
_HIGHEST = 0.9999

# --- what a schedule saves ----------------------------------------------------------------------------------------


class SparseMacs:
    """Forward MACs of the frozen projections per sparse token, layer by layer.

    Sparse tokens are the context tokens, or all where output tokens are sparse too. Estimates that choose channels
    are not counted. What no label depends on (in a decoder's last layer the FFN of context tokens) costs nothing, and
    so cannot be saved.
    """

    def __init__(self, shape: Shape, work: Workload) -> None:
        self.shape, self._work = shape, work

    def layer(self, config: SparsityConfig, layer: int) -> dict[Part, float]:
        """MACs of the FFN and of the attention projections of ``layer`` under ``config``."""
        context, output = layer_costs(self.shape, config, self._work, layer, None, exact=True)
        share = 0.0 if config.dense_output_tokens or not self.shape.decoder else self._work.output_share
        return {part: (1 - share) * context[name] + share * output[name] for part, name in _COMPONENT.items()}

    def total(self, config: SparsityConfig) -> float:
        return sum(sum(self.layer(config, i).values()) for i in range(self.shape.layers))

    def remaining(self, config: SparsityConfig) -> float:
        """`total` as a share of the dense one."""
        return self.total(config) / self.total(_dense(config))

    def saved(self, config: SparsityConfig, cell: Cell) -> float:
        """MACs that ``cell`` saves."""
        dense = self.layer(_dense(config), cell.layer)
        return dense[cell.part] - self.layer(with_layers(config, [cell]), cell.layer)[cell.part]


def _dense(config: SparsityConfig) -> SparsityConfig:
    return SparsityConfig(mode="dense", dense_output_tokens=config.dense_output_tokens)


# --- choosing -----------------------------------------------------------------------------------------------------


def allocate(items: Sequence[Sequence[tuple[float, float]]], required: float) -> list[int]:
    """One option of each item, so that ``Σ saved ≥ required`` at the least ``Σ cost``.

    Exact by way of the Pareto front of partial sums. Should that front grow beyond 20,000 points it is thinned evenly:
    what is saved is then still exact, and the cost within what a ten-thousandth of ``required`` costs at each item.

    Args:
        items: the options ``(saved, cost)`` of each item; costs are 0 or more.
        required: above 0.
    Raises:
        InputError: not even the options that save most are enough.
    """
    saved, cost = np.zeros(1), np.zeros(1)
    trail: list[NDArray[np.intp]] = []
    for options in items:
        values = np.asarray(options, dtype=np.float64)
        every = (saved[:, None] + values[:, 0]).ravel()
        every[every >= required * (1 - 1e-9)] = required  # more than enough is no better
        price = (cost[:, None] + values[:, 1]).ravel()
        order = np.lexsort((price, -every))
        least = np.minimum.accumulate(price[order])
        order = order[np.r_[True, price[order][1:] < least[:-1]]]
        if len(order) > _FRONT:
            bins = np.floor(every[order] / required * (_FRONT // 2))
            order = order[np.r_[True, bins[1:-1] != bins[2:], True]]
        trail.append(order)
        saved, cost = every[order], price[order]
    if saved[0] < required:
        raise InputError(f"at most {saved[0]:.4g} of the {required:.4g} MACs to save can be saved")
    state, picked = 0, []
    for options, order in zip(reversed(items), reversed(trail)):
        state, option = divmod(int(order[state]), len(options))
        picked.append(option)
    return picked[::-1]


def choose_schedule(
    config: SparsityConfig, measured: Sequence[Mapping[str, Any]], macs: SparseMacs, budget: float
) -> SparsityConfig:
    """``config`` with the ``layer_sparsity`` that leaves at most ``budget`` of the MACs at the least added loss.

    Losses are taken to add up over layers; a measured decrease counts as no increase.

    Args:
        measured: rows of `sensitivity`.
        budget: share of the dense frozen MACs of the sparse tokens that may remain, in (0, 1).
    Raises:
        InputError: the budget cannot be had with the levels that were measured.
    """
    by_part: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in measured:
        by_part.setdefault((row["layer"], row["part"]), []).append(row)
    options = [
        [Cell(layer, part, 0.0), *(Cell(layer, part, row["sparsity"]) for row in rows)]  # type: ignore[arg-type]
        for (layer, part), rows in by_part.items()
    ]
    costs = [[0.0, *(max(row["loss_increase"], 0.0) for row in rows)] for rows in by_part.values()]
    items = [
        [(macs.saved(config, cell), cost) for cell, cost in zip(cells, prices)] for cells, prices in zip(options, costs)
    ]
    dense = macs.total(_dense(config))
    try:
        picked = allocate(items, (1 - budget) * dense)
    except InputError:
        least = 1 - sum(max(saved for saved, _ in item) for item in items) / dense
        raise InputError(
            f"budget {budget:g} cannot be had: the highest levels everywhere leave {least:.3f} of the frozen FLOPs; "
            "measure higher levels, attention too, or give a larger budget"
        ) from None
    return with_layers(config, [cells[i] for cells, i in zip(options, picked)])


def uniform_schedule(config: SparsityConfig, macs: SparseMacs, budget: float, parts: Sequence[Part]) -> SparsityConfig:
    """The schedule to beat: the least sparsity, the same for ``parts`` of every layer, that keeps the budget.

    Where the mode replaces whole layers: the fewest layers, evenly spread, that do.

    Raises:
        InputError: no sparsity is enough.
    """
    layers = macs.shape.layers
    if not selects_channels(config):
        for count in range(1, layers + 1):
            spread = [int((i + 0.5) * layers / count) for i in range(count)]
            schedule = with_layers(config, [Cell(i, part, 0.99) for i in spread for part in parts])
            if macs.remaining(schedule) <= budget:
                return schedule
    else:
        low, high = 0.0, _HIGHEST
        everywhere = _everywhere(config, layers, parts, high)
        if macs.remaining(everywhere) <= budget:
            while high - low > 1e-4:
                middle = (low + high) / 2
                enough = macs.remaining(_everywhere(config, layers, parts, middle)) <= budget
                low, high = (low, middle) if enough else (middle, high)
            return _everywhere(config, layers, parts, min(math.ceil(high * 1e4) / 1e4, _HIGHEST))
    raise InputError(f"budget {budget:g} cannot be had by the {' and '.join(parts)} alone; give a larger one")


def _everywhere(config: SparsityConfig, layers: int, parts: Sequence[Part], sparsity: float) -> SparsityConfig:
    return with_layers(config, [Cell(i, part, sparsity) for i in range(layers) for part in parts])


def predicted_increase(config: SparsityConfig, measured: Sequence[Mapping[str, Any]]) -> float:
    """The sum of the measured increases at the sparsities of ``config``; NaN where one of them was not measured.

    Between two measured levels (and 0, where there is none) it is interpolated.
    """
    points: dict[tuple[int, Part], list[tuple[float, float]]] = {}
    for row in measured:
        points.setdefault((row["layer"], row["part"]), [(0.0, 0.0)]).append((row["sparsity"], row["loss_increase"]))
    total = 0.0
    for (layer, part), measurements in points.items():
        x, y = zip(*sorted(measurements))
        sparsity = config.ratio(layer, part)
        if sparsity > 0 and not selects_channels(config):
            total += y[-1]
        else:
            total += float(np.interp(sparsity, x, y, right=float("nan")))
    return total
