"""The statistics that every comparison shares: differences paired by seed and by evaluation item, means over clusters.

A seed fixes the data order and the adapter's start, so runs of one seed differ only in what is compared. Items are the
evaluation rows (or sentences): all seeds of one item are drawn together, because they are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from sparselora.compare.runs import AnyRun, Group, Run
from sparselora.numerics.stats import (
    Bootstrap,
    PairedComparison,
    compare_paired,
    holm,
    paired_bootstrap,
    smallest_detectable_difference,
)

Pair = tuple[Run, Run]
"""Two runs of one seed: of a group, and of its reference."""

NAN = float("nan")
NO_PAIRS = PairedComparison(0, NAN, NAN, NAN, NAN, NAN, NAN, NAN)
NO_ITEMS = Bootstrap(0, NAN, NAN, NAN, NAN)


@dataclass(frozen=True)
class Endpoint:
    """A quantity on which two groups are compared, over seeds and over items.

    Attributes:
        metric: its name in `Run.metrics`.
        item: its column in `Run.items`.
        weight: column of `Run.items` with the number of labels that an item's quantity is summed over; 1 if None or
            if the items have no such column.
        reference_metric, reference_item: the names on the side of the reference; as above if None.
    """

    metric: str
    item: str
    weight: str | None = None
    reference_metric: str | None = None
    reference_item: str | None = None

    def values(self, pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
        """Return the metric of the group's runs and of the reference's."""
        reference = self.reference_metric or self.metric
        return [float(a.metrics[self.metric]) for a, _ in pairs], [float(b.metrics[reference]) for _, b in pairs]

    def items(self, pair: Pair) -> tuple[pd.Series, pd.Series] | None:
        """Return the quantity of the items that both runs have; None if one of them does not record it."""
        first, second = pair[0].items, pair[1].items
        column = self.reference_item or self.item
        if first is None or second is None or self.item not in first or column not in second:
            return None
        a, b = first[self.item], second[column]
        if not a.index.equals(b.index):
            shared = a.index.intersection(b.index, sort=False)
            a, b = a.loc[shared], b.loc[shared]
        return a, b


@dataclass(frozen=True)
class Difference:
    """A group minus its reference at one endpoint.

    Attributes:
        seeds: paired over the seeds that both have; n is 0 and the rest NaN without any.
        detectable: the smallest mean difference that this many seeds with this spread find with power 0.8; NaN where
            they show no spread to judge by.
        items: over the items that both answered, all seeds of an item drawn together; n is 0 and the rest NaN
            without any.
    """

    seeds: PairedComparison
    detectable: float
    items: Bootstrap


def pair_by_seed(group: Group[AnyRun], reference: Group[AnyRun]) -> list[tuple[AnyRun, AnyRun]]:
    """Return the runs of the seeds that both groups have, in the order of ``group``."""
    return [(run, reference.runs[seed]) for seed, run in group.runs.items() if seed in reference.runs]


def compare_pairs(pairs: Sequence[Pair], endpoint: Endpoint, rng: np.random.Generator, draws: int) -> Difference:
    """Compare paired runs over seeds (t and signed-rank tests) and over items (``draws`` of a bootstrap)."""
    first, second = endpoint.values(pairs)
    seeds = compare_values(first, second)
    return Difference(seeds, detectable(first, second), bootstrap_items(pairs, endpoint, rng, draws))


def compare_values(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> PairedComparison:
    """Return `compare_paired` of ``first (n,)`` and ``second (n,)``; NaN for n = 0."""
    return compare_paired(first, second, confidence) if np.size(first) else NO_PAIRS


def detectable(first: ArrayLike, second: ArrayLike) -> float:
    """Return the smallest mean difference that these pairs ``(n,)``, ``(n,)`` would find with power 0.8.

    NaN where the differences show no spread: equal ones are a coincidence of rounding, not certainty.
    """
    d = np.subtract(first, second)
    if d.size < 2 or np.ptp(d) <= 1e-12:
        return math.nan
    return smallest_detectable_difference(float(d.std(ddof=1)), d.size)


def bootstrap_items(pairs: Sequence[Pair], endpoint: Endpoint, rng: np.random.Generator, draws: int) -> Bootstrap:
    """Return the bootstrap over the items of ``pairs``; n = 0 and NaN where no pair has items."""
    sums, weights = item_differences(pairs, endpoint)
    return paired_bootstrap(sums, weights, rng, draws=draws) if len(sums) else NO_ITEMS


def item_differences(pairs: Sequence[Pair], endpoint: Endpoint) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each item's difference and its weight (labels, or 1), both summed over the pairs, ``(items,)``.

    Pairs without the items are left out, and so are items of weight 0: a row without a label says nothing.
    """
    sums, weights = pd.Series(dtype=float), pd.Series(dtype=float)
    scale = 0.0
    for pair in pairs:
        values = endpoint.items(pair)
        if values is None:
            continue
        first, second = (side.astype(float) for side in values)
        difference, weight = first - second, _weight(pair[0], endpoint, first.index)
        if sums.empty:
            scale = max(float(side.abs().max()) for side in (first, second)) if len(first) else 0.0
            sums, weights = difference, weight
        else:
            sums, weights = sums.add(difference, fill_value=0.0), weights.add(weight, fill_value=0.0)
    # Single precision: runs that compute the same in another order differ in the last bits of every item.
    rounded = np.round(sums.to_numpy() / (scale or 1.0), 5) * (scale or 1.0)
    labels = weights.to_numpy()
    return rounded[labels > 0], labels[labels > 0]


def _weight(run: Run, endpoint: Endpoint, index: pd.Index) -> pd.Series:
    """The weights of the items in ``index``."""
    assert run.items is not None
    if endpoint.weight is None or endpoint.weight not in run.items:
        return pd.Series(1.0, index=index)
    weight = run.items[endpoint.weight].astype(float)
    return weight if weight.index.equals(index) else weight.loc[index]


def mean_over_clusters(runs: pd.DataFrame, name: str, cluster: str, tested: bool = True) -> dict[str, float]:
    """Return the mean over clusters of a column, as the columns ``name``, ``name_n``, ``name_low``, ``name_high``.

    Args:
        runs: a row per run: ``cluster`` and the column. Runs are averaged within their cluster, then clusters have
            equal weight. A run without the value (NaN) is not in its cluster's mean; a cluster without it does not
            count.
        tested: add ``name_p``, the p of a mean of zero.
    Returns:
        The number of clusters that count; Student's-t 95 % interval and p over these, NaN for a single cluster and
        where all have the same value other than 0; all except the number NaN for none.
    """
    means = runs.groupby(cluster)[name].mean().dropna().to_numpy(dtype=float)
    p_name = [f"{name}_p"] if tested else []
    if not means.size:
        return {f"{name}_n": 0} | dict.fromkeys((name, f"{name}_low", f"{name}_high", *p_name), NAN)
    over = compare_paired(means, np.zeros_like(means))
    # The plain mean: the paired test rounds differences at the twelfth digit.
    row = {name: float(means.mean()), f"{name}_n": means.size}
    return row | {f"{name}_low": over.ci_low, f"{name}_high": over.ci_high} | dict.fromkeys(p_name, over.t_p)


def add_holm(table: pd.DataFrame, names: Iterable[str], next_to_raw: bool = False) -> None:
    """Add to each column of p values one adjusted by Holm over the rows of ``table``, ``NAME_holm``.

    Args:
        next_to_raw: put it next to the raw one, otherwise at the end.
    """
    for name in names if len(table) else ():
        place = int(table.columns.get_indexer([name])[0]) + 1 if next_to_raw else len(table.columns)
        table.insert(place, f"{name}_holm", holm(table[name].tolist()))
