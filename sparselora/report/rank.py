"""Figures of ``python -m sparselora rank``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.numerics import reconstruction as rec
from sparselora.report.style import COLORS, literal, new_figure, save_figure

_SERIES = (("blue", "o"), ("orange", "s"), ("green", "^"), ("purple", "D"), ("sky", "v"), ("red", "P"))
_MOST_KINDS = 24


class Simulation(Protocol):
    """The size and the seed of the simulated matrices, see `sparselora.inspection.simulation.Simulation`."""

    @property
    def n(self) -> int: ...
    @property
    def m(self) -> int: ...
    @property
    def seed(self) -> int: ...


def ranks_by_kind(path: Path, source: str, table: pd.DataFrame, labels: Sequence[str]) -> None:
    """Every matrix's least rank as a share of its full rank, or an update's as a share of its LoRA rank, one row a
    layer type; data in `ranks.csv`."""
    is_adapter = "lora_r" in table
    groups = list(table.groupby(["kind", "d_out", "d_in"], sort=False))
    shown = groups[:_MOST_KINDS]
    with new_figure(2.0 + 0.48 * len(shown)) as figure:
        axes = figure.add_subplot()
        for y, ((_, n, m), part) in enumerate(shown):
            full = part["lora_r"] if is_adapter else min(n, m)
            if not is_adapter:
                limit = part["largest_saving_rank"].iloc[0] / full
                axes.plot([limit, limit], [y - 0.45, y + 0.45], color=COLORS["black"], linewidth=1.6,
                          label="largest rank whose factors save storage" if y == 0 else None)  # fmt: skip
            for i, label in enumerate(labels):
                color, marker = _SERIES[i % len(_SERIES)]
                height = y + 0.6 * ((i + 0.5) / len(labels) - 0.5)
                share = part[f"rank_{label}"] / full
                axes.plot(share, np.full(len(part), height), marker, color=COLORS[color], markersize=5.5, alpha=0.6,
                          markeredgewidth=0, clip_on=False, label=_text(label) if y == 0 else None)  # fmt: skip
        names = [f"{kind}\n{n}×{m}, n = {len(part)}" for (kind, n, m), part in shown]
        axes.set_yticks(range(len(shown)), [literal(name) for name in names], fontsize=9)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"least rank / {'LoRA rank' if is_adapter else 'min(d_out, d_in)'}, each dot a matrix")
        remark = f" (first {_MOST_KINDS} of {len(groups)} layer types)" if len(groups) > _MOST_KINDS else ""
        noun = "update ΔW" if is_adapter else "matrix"
        figure.suptitle(f"{literal(source)}: rank each {noun} needs{remark}", fontsize=12)
        handles, texts = axes.get_legend_handles_labels()
        order = sorted(range(len(handles)), key=lambda i: texts[i].startswith("largest"))
        figure.legend([handles[i] for i in order], [texts[i] for i in order], loc="outside lower center", ncols=2)
        save_figure(figure, path)


def simulated_ranks(
    path: Path, simulation: Simulation, spectra: Mapping[str, NDArray[np.floating]], table: pd.DataFrame,
    labels: Sequence[str],
) -> None:  # fmt: skip
    """A low-rank and a full-rank matrix: singular values, error left by each rank, and what the factors store."""
    series = dict(zip(spectra, (("blue", "o"), ("orange", "s"))))
    with new_figure(4.8) as figure:
        values, errors, bars = figure.subplots(1, 3)
        data: dict[str, NDArray[Any]] = {"rank": np.arange(min(simulation.n, simulation.m) + 1)}
        lowest = min(float(tail[tail > 1e-12].min()) for tail in map(rec.relative_tail, spectra.values())) / 2
        for j, (name, s) in enumerate(spectra.items()):
            color, marker = series[name]
            tail = rec.relative_tail(s)
            data[f"singular_value {name}"], data[f"error {name}"] = np.append(s, np.nan), tail
            values.semilogy(np.arange(1, len(s) + 1), s / s[0], color=COLORS[color], label=name)
            errors.semilogy(np.arange(len(tail)), np.where(tail > 0, tail, np.nan), color=COLORS[color])
            row = table[table["name"] == name].iloc[0]
            ranks = [int(row[f"rank_{label}"]) for label in labels]
            heights = np.maximum(tail[ranks], lowest)  # an error of 0 is drawn on the lower edge
            errors.plot(ranks, heights, marker, color=COLORS[color], markersize=6, clip_on=False)
            for rank, height in set(zip(ranks, heights.tolist())):
                errors.annotate(str(rank), (rank, height), xytext=(4, 5), textcoords="offset points", fontsize=8.5)
            stored = [float(row[f"stored_{label}"]) for label in labels]
            drawn = bars.bar(np.arange(len(labels)) + (j - 0.5) * 0.38, stored, 0.36, color=COLORS[color])
            bars.bar_label(drawn, [f"{value:.0%}" for value in stored], fontsize=8.5)
        values.set(xlabel="index i", ylabel="singular value s_i / s_1", title="spectrum")
        errors.set(xlabel="rank k", ylabel="relative error ‖W − Ŵ‖ / ‖W‖", title="error, least ranks marked")
        errors.set_ylim(lowest, 1.6)
        bars.axhline(1.0, color=COLORS["black"], linewidth=1.0, label="size of the matrix itself")
        bars.set_xticks(range(len(labels)), [_text(label) for label in labels], rotation=45, ha="right", fontsize=9)
        bars.set(ylabel="numbers in the factors / in the matrix", title="compression")
        bars.margins(y=0.12)
        size = f"{simulation.n}×{simulation.m}"
        figure.suptitle(
            f"Low-rank and full-rank random {size} matrices, one of each, seed {simulation.seed}", fontsize=12
        )
        handles, texts = values.get_legend_handles_labels()
        bar_handles, extra = bars.get_legend_handles_labels()
        figure.legend(handles + bar_handles, texts + extra, loc="outside lower center", ncols=3)
        save_figure(figure, path, pd.DataFrame(data))


def _text(label: str) -> str:
    """``error_0.1`` → ``error < 0.1``."""
    criterion, _, target = label.partition("_")
    if criterion == "gap":
        return "widest gap"
    return f"{criterion} {'<' if criterion == 'error' else '≥'} {target}"


def data_ranks(path: Path, title: str, table: pd.DataFrame, captured: pd.DataFrame, rank: int) -> None:
    """Suggested ranks of every module with their spread over halves of the rows, and the gradient energy of other rows
    that they, one rank and random ranks of as many parameters hold; data in `data_ranks.csv`, `captured_energy.csv`."""
    kinds = list(dict.fromkeys(table["kind"]))[:_MOST_KINDS]
    with new_figure(max(3.4, 1.6 + 0.42 * len(kinds))) as figure:
        ranks, shares = figure.subplots(1, 2, width_ratios=(3, 2))
        for y, kind in enumerate(kinds):
            part = table[table["kind"] == kind]
            heights = y + np.linspace(-0.3, 0.3, len(part)) if len(part) > 1 else np.array([float(y)])
            ranks.hlines(heights, part["rank_low"], part["rank_high"], color=COLORS["grey"], lw=1.0, alpha=0.7,
                         label="5–95 % of halves of the rows" if y == 0 else None)  # fmt: skip
            ranks.plot(part["rank"], heights, "o", ms=4.0, color=COLORS["blue"], ls="",
                       label="suggested, a dot a module" if y == 0 else None)  # fmt: skip
        ranks.axvline(rank, color=COLORS["black"], lw=1.2, label=f"uniform rank {rank}")
        ranks.set_yticks(range(len(kinds)), [literal(kind) for kind in kinds], fontsize=9)
        ranks.set_ylim(len(kinds) - 0.4, -0.6)
        ranks.set_xlim(left=0)
        ranks.set_xlabel("rank")
        names = ("data", "uniform", "random")
        for x, (name, color) in enumerate(zip(names, ("blue", "black", "grey"))):
            low, middle, high = (float(captured[name].quantile(q)) for q in (0.05, 0.5, 0.95))
            shares.errorbar([x], [middle], yerr=[[middle - low], [high - middle]], fmt="o", ms=7, capsize=4,
                            color=COLORS[color])  # fmt: skip
        shares.set_xticks(range(len(names)), names)
        shares.set_xlim(-0.5, len(names) - 0.5)
        shares.set_ylim(bottom=0)
        shares.set_ylabel("energy share of other rows")
        shares.set_xlabel(f"ranks, n = {len(captured)} halves (5–95 %)")
        figure.suptitle(literal(title), fontsize=12)
        figure.legend(*ranks.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save_figure(figure, path)
