"""Figures of ``python -m sparselora bench``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sparselora.report.style import COLORS, new_figure, save_figure

_PHASES = {"forward": "blue", "backward": "sky", "optimizer": "grey"}
_NAME_WIDTH = 28
"""Letters of a variant's name in one line: the bars keep three quarters of the width."""
_SERIES = (("blue", "o"), ("orange", "s"), ("green", "^"), ("purple", "D"), ("red", "v"), ("sky", "P"), ("black", "X"))
_COMPONENTS = {
    "FFN": "blue",
    "attention projections": "orange",
    "attention scores": "yellow",
    "head": "purple",
    "adapter": "green",
    "estimator": "red",
}


def step_times(path: Path, table: pd.DataFrame, title: str) -> None:
    """A bar a variant: median milliseconds of a step by phase, the quartiles of the whole, and the ratio to the best
    dense step. Data in a CSV of the same name.

    Args:
        table: columns variant, step_ms, step_ms_low, step_ms_high, forward_ms, backward_ms, optimizer_ms, speedup.
    """
    with new_figure(1.6 + 0.5 * len(table)) as figure:
        axes = figure.add_subplot()
        height = np.arange(len(table))
        left = np.zeros(len(table))
        # Medians of parts do not add up to the median of the whole, whose place the error bar shows.
        for phase, color in _PHASES.items():
            width = table[f"{phase}_ms"].to_numpy(dtype=float)
            axes.barh(height, width, left=left, height=0.62, color=COLORS[color], label=phase)
            left += width
        middle = table["step_ms"].to_numpy(dtype=float)
        spread = np.stack([middle - table["step_ms_low"], table["step_ms_high"] - middle])
        axes.errorbar(middle, height, xerr=spread, fmt="|", color=COLORS["black"], capsize=3, markersize=9,
                      label="median and quartiles of the step")  # fmt: skip
        for y, (end, times) in enumerate(zip(np.maximum(left, table["step_ms_high"]), table["speedup"])):
            axes.annotate(
                f"{times:.2f}×", (end, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9.5
            )
        axes.set_yticks(height, [textwrap.fill(name, _NAME_WIDTH) for name in table["variant"]])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="ms per training step; × is the speed-up over the best dense step")
        figure.suptitle(title, fontsize=11)
        figure.legend(loc="outside lower center", ncols=4)
        save_figure(figure, path, table)


def step_parts(path: Path, table: pd.DataFrame, title: str, parts: Sequence[str]) -> None:
    """A bar a variant: milliseconds of a step by part. Data in a CSV of the same name.

    Args:
        table: columns variant, part, ms, of which those of the part ``step`` are the whole.
        parts: the parts in order, at most as many as there are colours and hatches.
    """
    cells = table.pivot(index="variant", columns="part", values="ms").loc[table["variant"].unique()]
    with new_figure(1.8 + 0.5 * len(cells)) as figure:
        axes = figure.add_subplot()
        height, left = np.arange(len(cells)), np.zeros(len(cells))
        for i, part in enumerate(parts):
            if part not in cells:
                continue
            width = cells[part].fillna(0).clip(lower=0).to_numpy(dtype=float)
            color = list(COLORS.values())[i % len(COLORS)]
            hatch = None if i < len(COLORS) else "//"
            axes.barh(height, width, left=left, height=0.62, color=color, hatch=hatch, label=part)
            left += width
        axes.set_yticks(height, [textwrap.fill(name, _NAME_WIDTH) for name in cells.index])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="ms per training step")
        figure.suptitle(title, fontsize=12)
        figure.legend(loc="outside lower center", ncols=4)
        save_figure(figure, path, table)


def sweep(path: Path, table: pd.DataFrame, column: str, label: str, title: str) -> None:
    """Step time against ``column``, a line a variant with its quartiles, and the speed-up over the best dense step.
    Data in a CSV of the same name.

    Args:
        table: columns ``column``, variant, dense (whether it computes every channel), step_ms, step_ms_low,
            step_ms_high, speedup, speedup_low, speedup_high.
        label: of the axis, with its unit.
    """
    with new_figure(4.2) as figure:
        times, ratios = figure.subplots(1, 2)
        for (color, marker), (name, part) in zip(_SERIES, table.groupby("variant", sort=False)):
            part = part.sort_values(column)
            x = part[column].to_numpy(dtype=float)
            axes_columns = (
                [(times, "step_ms")] if bool(part["dense"].iloc[0]) else [(times, "step_ms"), (ratios, "speedup")]
            )
            for axes, value in axes_columns:
                axes.plot(x, part[value], marker=marker, color=COLORS[color], label=str(name))
                axes.fill_between(x, part[f"{value}_low"], part[f"{value}_high"], color=COLORS[color], alpha=0.2, lw=0)
        ratios.axhline(1.0, color=COLORS["black"], linewidth=1.0, linestyle="--", label="breaks even")
        times.set_ylim(bottom=0)
        times.set(xlabel=label, ylabel="ms per training step", title="median, quartiles shaded")
        ratios.set(xlabel=label, ylabel="speed-up over best dense (×)", title="above the line it pays")
        _log_axis(times, ratios, values=table[column])
        figure.suptitle(title, fontsize=11)
        handles, texts = times.get_legend_handles_labels()
        line, text = ratios.get_legend_handles_labels()
        figure.legend([*handles, line[-1]], [*texts, text[-1]], loc="outside lower center", ncols=4)
        save_figure(figure, path, table)


def _log_axis(*axes: Axes, values: pd.Series) -> None:
    """Give powers of two a logarithmic axis with their own ticks."""
    ticks = sorted(set(values))
    if len(ticks) > 1 and min(ticks) >= 1 and max(ticks) / min(ticks) >= 4:
        for panel in axes:
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()


def estimators(path: Path, table: pd.DataFrame, title: str) -> None:
    """Draw recall, energy and cosine of the estimates of each rank against the oracle, by layer.
    Data in a CSV of the same name.

    Args:
        table: a row a layer, part and rank, with the mean over batches of recall, energy, cosine, random_recall and
            random_energy, their standard deviations under the same name with ``_std``, and n, the number of batches.
    """
    parts = list(table["part"].unique())
    measures = ("recall", "energy", "cosine")
    with new_figure(1.3 + 2.5 * len(parts)) as figure:
        grid = figure.subplots(len(parts), 3, squeeze=False, sharex=True)
        for i, part in enumerate(parts):
            rows = table[table["part"] == part]
            for axes, measure in zip(grid[i], measures):
                for (color, marker), (rank, curve) in zip(_SERIES, rows.groupby("rank")):
                    axes.errorbar(curve["layer"], curve[measure], yerr=curve[f"{measure}_std"], color=COLORS[color],
                                  marker=marker, markersize=4.5, capsize=2, linewidth=1.4,
                                  label=f"rank {rank}")  # fmt: skip
                if measure != "cosine":
                    first = rows[rows["rank"] == rows["rank"].min()]
                    axes.plot(first["layer"], first[f"random_{measure}"], color=COLORS["grey"], linestyle="--",
                              label="random channels")  # fmt: skip
                axes.set_ylim(0, 1.03)
                axes.set_ylabel(_MEASURES[measure], fontsize=10)
                axes.set_title({"ffn": "FFN"}.get(part, part))
                axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in grid[-1]:
            axes.set_xlabel("layer")
        batches = int(table["n"].iloc[0])
        figure.suptitle(f"{title} (mean ± standard deviation, n = {batches} batches)", fontsize=11)
        handles, texts = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=min(6, len(texts)))
        save_figure(figure, path, table)


_MEASURES = {
    "recall": "recall of kept channels",
    "energy": "energy / oracle's",
    "cosine": "cosine of scores",
}


def flops(path: Path, table: pd.DataFrame, names: Sequence[str], unit: str, title: str) -> None:
    """MACs or FLOPs per token of two configurations, stacked by component: the forward pass and a training step.

    Args:
        table: as `sparselora.contextual.flops.comparison_table` gives it, with its row ``total``.
        names: of the configuration before and after.
    """
    rows = table[table["component"] != "total"].set_index("component")
    with new_figure(3.6) as figure:
        for axes, phase, word in zip(figure.subplots(1, 2), ("forward", "training"), ("forward pass", "training step")):
            left = np.zeros(2)
            for component, color in _COMPONENTS.items():
                width = (
                    rows.loc[component, [f"{phase}_{unit}_before", f"{phase}_{unit}_after"]].to_numpy(dtype=float) / 1e6
                )
                axes.barh([0, 1], width, left=left, height=0.6, color=COLORS[color],
                          label=component if phase == "forward" else None)  # fmt: skip
                left += width
            axes.annotate(f"−{1 - left[1] / left[0]:.1%}", (left[1], 1), xytext=(5, 0), textcoords="offset points",
                          va="center", fontsize=10)  # fmt: skip
            axes.set_yticks([0, 1], list(names) if phase == "forward" else ["", ""])
            axes.invert_yaxis()
            axes.set_xlim(0, 1.04 * max(left[0], 1.15 * left[1]))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="y", visible=False)
            axes.set(xlabel=f"million {unit} per token", title=word)
        figure.suptitle(title, fontsize=11)
        figure.legend(loc="outside lower center", ncols=6)
        save_figure(figure, path, table)
