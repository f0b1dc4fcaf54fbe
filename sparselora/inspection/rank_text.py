"""Ranks as lines of text, by layer type and shape, with what follows from them and what does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from sparselora.inspection.rank import RankRequest, RankResults
from sparselora.inspection.simulation import SimulatedRanks, SimulationRequest
from sparselora.models.weights import describe_unmeasured
from sparselora.numerics import reconstruction as rec

if TYPE_CHECKING:
    from sparselora.inspection.data_ranks import DataRanks  # which needs torch


def suggestion_lines(results: DataRanks) -> Iterator[str]:
    """Yield the suggested ranks by layer type, and the judgement."""
    yield f"{len(results.table)} modules; suggested rank: median (least–most), and share of the gradient energy"
    for kind, part in results.table.groupby("kind", sort=False):
        ranks = part["rank"]
        yield f"  {kind:<24} {ranks.median():>6g} ({ranks.min()}–{ranks.max()}) {part['energy_share'].sum():>8.1%}"
    yield from results.sentences


def source_lines(criterion: str, ranking: RankRequest, results: RankResults, folder: Path) -> Iterator[str]:
    """Yield the ranks of a model's weights or of an adapter's updates."""
    table, configs, labels = results.table, results.configs, list(ranking.rules)
    measured = "updates ΔW" if ranking.model is None else "weights"
    yield f"{ranking.source}: {len(table)} {measured}; least rank by {criterion}: median (least–most)"
    if criterion == "gap":
        yield "×: ratio of the singular values before and after the gap, median; near 1 is no gap"
    else:
        yield "*: factors of the median rank are no smaller than the matrix"
    yield from _rank_lines(table, labels)
    if results.unmeasured:
        yield f"not measured (listed in not_measured.csv): {describe_unmeasured(results.unmeasured)}"
    yield from results.remarks
    if ranking.model is not None:
        yield "these are ranks of frozen weights: how far factors could replace them, not the rank that LoRA needs;"
        yield "that is the rank of a trained update: rank --adapter DIR"
        return
    missing = [label for label in labels if label not in configs]
    if missing:
        reason = "no update needs a rank" if table["fro_norm"].any() else "every update is zero"
        yield f"no rank_pattern_{', rank_pattern_'.join(missing)}: {reason}"
    if configs:
        yield f"each rank_pattern_*.json in {folder} holds these ranks as arguments of peft.LoraConfig"


def _rank_lines(table: pd.DataFrame, labels: list[str]) -> Iterator[str]:
    """Yield one line per layer type and shape."""
    groups = table.groupby(["kind", "d_out", "d_in"], sort=False)
    width = max(len(kind) for kind, *_ in groups.groups)
    yield f"  {'':{width}} {'n':>4} {'shape':>13}" + "".join(f"{label.replace('_', ' '):>18}" for label in labels)
    for (kind, n, m), part in groups:
        cells = []
        for label in labels:
            ranks = part[f"rank_{label}"]
            middle = int(ranks.median())
            star = "" if rec.factor_params(n, m, middle) < n * m else "*"
            spread = f" ({ranks.min()}–{ranks.max()})" if len(part) > 1 else ""
            ratio = f" ×{part['gap_ratio'].median():.2f}" if label == "gap" else ""
            cells.append(f"{f'{middle}{star}{spread}{ratio}':>18}")
        yield f"  {kind:{width}} {len(part):>4} {f'{n}×{m}':>13}" + "".join(cells)


def simulated_lines(criterion: str, ranking: SimulationRequest, results: SimulatedRanks) -> Iterator[str]:
    """Yield the ranks of the simulated matrices, and the times of both ways to find them."""
    table, labels, simulation = results.table, list(ranking.rules), ranking.simulation
    size = f"{simulation.n}×{simulation.m}"
    yield f"{size} matrices; least rank by {criterion}, and the factors' size against the matrix"
    width = max(map(len, results.spectra))
    yield f"  {'':{width}}" + "".join(f"{label.replace('_', ' '):>18}" for label in labels)
    for _, row in table.iterrows():
        cells = (f"{row[f'rank_{label}']} ({row[f'stored_{label}']:.0%})" for label in labels)
        yield f"  {row['name']:{width}}" + "".join(f"{cell:>18}" for cell in cells)
    if not all(table[f"saves_{label}"].all() for label in labels):
        yield "100 % or more: as factors at that rank the matrix is no smaller"
    runs = results.times["runs"].iloc[0]
    yield f"from matrix to rank at error {ranking.target:g}, median of {runs} alternating runs:"
    for name, part in results.times.groupby("matrix", sort=False):
        values, formed = part["median_ms"]
        yield (
            f"  {name:{width}}  values only {values:.1f} ms, "
            f"SVD and reconstruction {formed:.1f} ms: {formed / values:.1f}×"
        )
