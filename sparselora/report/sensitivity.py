"""Figure of ``python -m sparselora sensitivity``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparselora.report.style import COLORS, new_figure, save_figure

_LEVELS = (("sky", "o"), ("blue", "s"), ("green", "^"), ("orange", "D"), ("red", "v"), ("purple", "P"), ("black", "X"))
_TITLES = {"ffn": "FFN", "attention": "attention"}


def loss_by_layer(
    path: Path, table: pd.DataFrame, selected: pd.DataFrame, uniform: Mapping[str, float], title: str
) -> None:
    """A column a part. Above: what the loss gains with one layer sparse, a line a level, ± standard error. Below: the
    sparsity that each layer was given. Data (of the upper half) in a CSV of the same name.

    Args:
        table: columns layer, part, sparsity, loss_increase, standard_error.
        selected: columns layer, part, sparsity.
        uniform: part → the sparsity that keeps the same budget in every layer; empty where there is no such number.
    """
    parts = list(table["part"].unique())
    with new_figure(6.2) as figure:
        grid = figure.subplots(2, len(parts), squeeze=False, height_ratios=(2.2, 1), sharex="col")
        for column, part in enumerate(parts):
            above, below = grid[0][column], grid[1][column]
            _increases(above, table[table["part"] == part])
            above.set_title(_TITLES[part])
            rows = selected[selected["part"] == part]
            below.bar(rows["layer"], rows["sparsity"], color=COLORS["grey"], label="chosen")
            if part in uniform:
                below.axhline(uniform[part], color=COLORS["black"], ls="--", lw=1.2, label="uniform, same budget")
            below.set(xlabel="layer", ylabel="sparsity", ylim=(0, 1.03))
            below.xaxis.get_major_locator().set_params(integer=True)
            below.legend(loc="upper left", bbox_to_anchor=(0, -0.32), ncols=2)
        figure.suptitle(title, fontsize=11.5)
        save_figure(figure, path, table)


def _increases(axes: Axes, table: pd.DataFrame) -> None:
    for (color, marker), (level, rows) in zip(_LEVELS, table.groupby("sparsity")):
        error = np.nan_to_num(rows["standard_error"].to_numpy(dtype=float))
        axes.errorbar(
            rows["layer"], rows["loss_increase"], error, color=COLORS[color], marker=marker, markersize=5, capsize=2,
            lw=1.4, label=f"{level:g}",
        )  # fmt: skip
    # Layers differ by orders of magnitude, and some may fall below zero: linear near it, logarithmic beyond.
    largest = float(table["loss_increase"].abs().max()) or 1.0
    axes.set_yscale("symlog", linthresh=largest / 30)
    axes.axhline(0, color=COLORS["grey"], ls="--", lw=1)
    axes.set_ylabel("loss increase (nats per label)\n± 1 standard error")
    axes.legend(title="sparsity of that layer alone", ncols=2, fontsize=9)
