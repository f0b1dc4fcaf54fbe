"""Compare the profile of a model with what training did: rise of the loss before it, exact match after it.

python results/profile/prediction.py [FOLDER]    # writes prediction.png and prediction.csv into FOLDER

FOLDER holds the schedules.csv of a profile of Qwen2.5-Coder-0.5B-Instruct on GSM8K (default: results/profile, whose
table has the profiles of several models, and `qwen05_gsm8k` among them). The exact match is
that of results/contextual/pretrained.csv: one seed, whose records were not kept, with the FFNs of layers 2-22 of 24
sparse. The profile's cost is that of the same layers at the same sparsity, before any training.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.stats import permutation_test, rankdata

from sparselora.errors import InputError
from sparselora.report.style import COLORS, new_figure, save_figure

RESULTS = Path(__file__).resolve().parents[1]
PROFILE = "qwen05_gsm8k"
ARMS = {
    "static, 50 % off": ("static", 0.5),
    "static, 90 % off": ("static", 0.9),
    "static, 99 % off": ("static", 0.99),
    "svd, 50 % off": ("svd", 0.5),
    "svd rank 8, 99 % off (as published)": ("svd", 0.99),
    "oracle, 99 % off": ("oracle", 0.99),
    "random, 99 % off": ("random_fixed", 0.99),
    "skip": ("skip", 0.99),
    "affine map, rank 64": ("surrogate", 0.99),
}
"""Arms of the trained run, and mode and level of their blanket schedule in a profile. Training drew random channels in
every step, the profile once; skip and the map are the same at all levels."""
NAMES = {"svd rank 8, 99 % off (as published)": "svd, 99 % off"}
STANDARD_ERROR = 1.2
"""Percentage points of exact match on 1,319 questions, as results/contextual/README.md states it."""
TICKS = (1, 3, 10, 30, 100, 300)
NAME_HEIGHT = 0.75
"""Percentage points of exact match that a name takes in the figure."""
COSTS = {"percent": "the whole schedule", "sum_of_layers_percent": "the sum of its single layers"}


def joined(folder: Path) -> pd.DataFrame:
    """Return a row an arm: its cost in the profile, whole and as a sum of layers, and its exact match after training.

    Raises:
        InputError: the profile lacks a blanket schedule of an arm.
    """
    schedules = pd.read_csv(folder / "schedules.csv")
    if "profile" in schedules:
        schedules = schedules[schedules["profile"] == PROFILE]
    trained = pd.read_csv(RESULTS / "contextual" / "pretrained.csv").set_index("setting")
    rows = []
    for arm, (mode, level) in ARMS.items():
        name = f"layers 2-22 at {level:g}"
        row = schedules.query("schedule == @name and mode == @mode and rows == 'measured'")
        if len(row) != 1:
            raise InputError(f"{folder / 'schedules.csv'} has {len(row)} rows of {mode} for {name!r}, wanted 1")
        rows.append(
            {"arm": NAMES.get(arm, arm), "mode": mode, "sparsity": level,
             **row.iloc[0][["percent", "percent_error", "sum_of_layers_percent"]],
             "exact_match_percent": trained.loc[arm, "exact_match_percent"]}
        )  # fmt: skip
    return pd.DataFrame(rows)


def correlation(arms: pd.DataFrame, cost: str) -> tuple[float, float]:
    """Return Spearman's rank correlation of a cost with the exact match, and its exact p-value over all orders."""
    exact_match = rankdata(arms["exact_match_percent"])

    def statistic(costs: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        ranks = rankdata(costs, axis=axis)
        centred = ranks - ranks.mean(axis=axis, keepdims=True)
        other = exact_match - exact_match.mean()
        norms = np.linalg.norm(centred, axis=axis) * np.linalg.norm(other)
        return np.asarray(centred @ other / norms)

    test = permutation_test(
        (arms[cost].to_numpy(),), statistic, permutation_type="pairings", n_resamples=np.inf, vectorized=True, axis=-1,
        batch=10_000,
    )  # fmt: skip
    return float(test.statistic), float(test.pvalue)


def sentence(arms: pd.DataFrame) -> str:
    """Say how well each cost orders the arms as training did: all of them, and those at 99 % with skip and map."""
    highest = arms[arms["sparsity"] == arms["sparsity"].max()]
    texts = []
    for cost, name in COSTS.items():
        (whole, p), (top, p_top) = correlation(arms, cost), correlation(highest, cost)
        texts.append(
            f"by {name} {whole:+.2f} over n = {len(arms)} arms (p {p:.2g}) and {top:+.2f} over the {len(highest)} at "
            f"the highest sparsity (p {p_top:.2g})"
        )
    return (
        "Rank correlation of the profile's cost with the exact match after training, -1 if the profile orders the arms "
        f"as training does: {'; '.join(texts)}. One training seed whose records were not kept, standard error "
        f"{STANDARD_ERROR} points, arms that share data and seed: an indication."
    )


def draw(arms: pd.DataFrame, path: Path) -> None:
    """Draw exact match against either cost, a dot an arm with both standard errors, each arm at its own height."""
    with new_figure(4.2) as figure:
        grid = figure.subplots(1, 2, sharey=True)
        for axes, (cost, name) in zip(grid, COSTS.items()):
            axes.errorbar(
                arms[cost], arms["exact_match_percent"], xerr=arms["percent_error"] if cost == "percent" else None,
                yerr=STANDARD_ERROR, fmt="o", color=COLORS["blue"], ecolor=COLORS["grey"], capsize=2,
            )  # fmt: skip
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axes.minorticks_off()
            axes.set_xlim(max(0.0, arms[cost].min() / 1.5), 1.5 * arms[cost].max())
            for match in arms["exact_match_percent"]:
                axes.axhline(match, color=COLORS["grey"], linewidth=0.4, zorder=0)
            axes.set_xlabel(name)
            axes.set_title(f"rank correlation {correlation(arms, cost)[0]:+.2f}, n = {len(arms)}", fontsize=11)
        grid[0].set_ylabel("exact match after training, %\n(one seed, no records)")
        figure.supxlabel("rise of the answer loss before training, %", fontsize=11)
        _name(grid[-1], arms)
        save_figure(figure, path, arms)


def _name(axes: Axes, arms: pd.DataFrame) -> None:
    """Write the arms' names right of the last panel, at the heights of their dots or as near as names fit."""
    height = -math.inf
    for row in arms.sort_values("exact_match_percent").to_dict("records"):
        match = row["exact_match_percent"]
        height = max(match, height + NAME_HEIGHT)
        axes.annotate(
            row["arm"], (1, match), xytext=(1.06, height), xycoords=("axes fraction", "data"), fontsize=8, va="center",
            textcoords=("axes fraction", "data"), arrowprops={"arrowstyle": "-", "color": COLORS["grey"], "lw": 0.6},
        )  # fmt: skip


def main() -> None:
    """Write the figure and its data into the folder of the profile, and print the sentence."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    arms = joined(folder)
    draw(arms, folder / "prediction.png")
    print(sentence(arms))


if __name__ == "__main__":
    main()
