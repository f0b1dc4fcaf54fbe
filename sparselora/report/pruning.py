"""The effect of pruning on a model, over keep ratios."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparselora.report.style import COLORS, legend_columns, new_figure, save_figure

_LINES = (
    ("blue", "o", "-"),
    ("orange", "s", "-"),
    ("green", "^", "-"),
    ("purple", "D", "-"),
    ("red", "v", "-"),
    ("sky", "P", "-"),
    ("black", "X", "--"),
)
_UNITS = {"accuracy": "accuracy (fraction correct)", "answer_loss": "held-out loss (nats a label)"}
"""Metric → label of its axis; any other is its name."""
_PANELS = {"right_after": "right after pruning", "after": "after more training"}


def metric_against_keep_ratio(cells: pd.DataFrame, path: Path, title: str, control: str = "no_prune") -> None:
    """Draw the metric against the keep ratio right after pruning and after more training.

    A method is a line, the control a band.

    Args:
        cells: columns method, keep_ratio, moment (right_after and after are drawn), metric, n_seeds, mean, std (over
            seeds, NaN for one); written to a CSV of the figure's name.
        title: what was trained on what.
        control: the method drawn as a band, which has one row per moment whatever the keep ratio.
    """
    methods = [name for name in cells["method"].unique() if name != control]
    ratios = np.sort(cells.loc[cells["method"] != control, "keep_ratio"].unique())
    # Points of different methods are side by side, a few pixels apart whatever the keep ratios are, so that their error
    # bars do not overlap. With a single keep ratio an axis fitted to the points would spread them from edge to edge.
    low, high = (ratios[0], ratios[-1]) if len(ratios) else (1.0, 1.0)
    if low == high:
        low, high = low - 0.25, high + 0.25
    margin = 0.12 * (high - low)
    shifts = (np.arange(len(methods)) - (len(methods) - 1) / 2) * 0.014 * (high - low + 2 * margin)
    columns = legend_columns([*methods, _band_label(control)])
    lines = -(-(len(methods) + 1) // columns)
    with new_figure(4.4 + 0.2 * max(0, lines - 2)) as figure:
        panels = figure.subplots(1, len(_PANELS), sharey=True)
        for axes, (moment, name) in zip(panels, _PANELS.items()):
            part = cells[cells["moment"] == moment]
            _band(axes, part[part["method"] == control], control)
            for (color, marker, dash), method, shift in zip(_styles(len(methods)), methods, shifts):
                line = part[part["method"] == method].sort_values("keep_ratio")
                axes.errorbar(
                    line["keep_ratio"] + shift,
                    line["mean"],
                    yerr=line["std"],
                    color=COLORS[color],
                    marker=marker,
                    markersize=6,
                    linestyle=dash,
                    linewidth=1.5,
                    capsize=3,
                    label=method,
                )
            axes.set_title(name)
            axes.set_xlabel("keep ratio of rank channels")
            axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios], rotation=45 if len(ratios) > 3 else 0)
            axes.set_xlim(low - margin, high + margin)
        metric = cells["metric"].iloc[0]
        panels[0].set_ylabel(_UNITS.get(metric, metric))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        figure.suptitle(f"{title}\n{_spread(cells['n_seeds'])}", fontsize=11)
        save_figure(figure, path, data=cells)


def _spread(counts: pd.Series) -> str:
    """Say what the error bars are, from the number of seeds of every point."""
    if counts.max() == 1:
        return "one seed, no error bars"
    seeds = f"{counts.min()}" if counts.nunique() == 1 else f"{counts.min()} to {counts.max()}"
    return f"mean ± 1 standard deviation over {seeds} seeds"


def _band(axes: Axes, control: pd.DataFrame, name: str) -> None:
    """Draw the control's mean as a line with one standard deviation around it."""
    if control.empty:
        return
    mean, std = control["mean"].iloc[0], np.nan_to_num(control["std"].iloc[0])
    axes.axhspan(mean - std, mean + std, color=COLORS["grey"], alpha=0.25, linewidth=0)
    axes.axhline(mean, color=COLORS["grey"], linewidth=1.5, linestyle="--", label=_band_label(name))


def _band_label(control: str) -> str:
    return f"{control} (same steps)"


def _styles(count: int) -> list[tuple[str, str, str]]:
    """Return distinguishable line styles: by colour, and beyond the colours there are, by marker and dots."""
    n = len(_LINES)
    again = [(_LINES[i][0], _LINES[(i + 3) % n][1], ":") for i in range(n)]
    return [(_LINES + tuple(again))[i % (2 * n)] for i in range(count)]
