"""Figure of the README: the time of a training step, and the exact match of a pretrained model, by setting.

python results/overview.py    # reads {contextual,fast}/speed.csv and contextual/pretrained.csv, writes overview.png
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparselora.config.sparsity import MODES
from sparselora.report.style import COLORS, new_figure, save_figure

RESULTS = Path(__file__).resolve().parent
VARIANTS = {
    "peft": ("PEFT", COLORS["grey"]),
    "liger": ("PEFT + Liger", COLORS["grey"]),
    "dense": ("ours, dense", COLORS["blue"]),
    "svd": ("ours, sparse (svd)", COLORS["orange"]),
    "both": ("ours, fp8 and no\ncontext backward", COLORS["green"]),
}
SETTINGS = {
    "dense": "dense",
    "fp8 products": "fp8",
    "no context backward": "no context backward",
    "fp8 products and no context backward": "both",
    "dense on half of the rows": "dense, half of rows",
    "static, 50 % off": "static, 50 % off",
    "static, 99 % off": "static, 99 % off",
    "static, 90 % off": "static, 90 % off",
    "svd rank 8, 99 % off (as published)": "published svd, 99 %",
    "skip": "no FFN (skip)",
    "random, 99 % off": "random, 99 % off",
}
STANDARD_ERROR = 1.2
"""Percentage points of exact match on 1,319 questions, as results/contextual/README.md states it."""


def step_times() -> pd.DataFrame:
    """Return the step times of both tables by variant, two runs on cards of one kind."""
    first, second = (pd.read_csv(RESULTS / name / "speed.csv") for name in ("contextual", "fast"))
    rows = pd.concat([first[first.setting == "math"], second[(second.group == "main") & (second.variant == "both")]])
    return rows.set_index("variant").loc[list(VARIANTS)]


def draw_step_times(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw a bar per variant: median milliseconds of a step with quartiles, and the ratio to PEFT."""
    positions = np.arange(len(VARIANTS))
    quartiles = np.abs(rows[["step_ms_low", "step_ms_high"]].to_numpy().T - rows.step_ms.to_numpy())
    axes.barh(positions, rows.step_ms, xerr=quartiles, color=[color for _, color in VARIANTS.values()], height=0.66)
    for position, step_ms in zip(positions, rows.step_ms):
        axes.text(step_ms - 7, position, f"{step_ms:.0f} ms", va="center", ha="right", color="white", fontsize=11)
    ratios = [rows.step_ms["peft"] / step_ms for step_ms in rows.step_ms]
    axes.set_yticks(
        positions,
        [
            label if ratio == 1 else f"{label}\n{ratio:.1f} times as fast"
            for (label, _), ratio in zip(VARIANTS.values(), ratios)
        ],
    )
    axes.set_xlabel("time of a training step, ms")
    axes.set_title("Speed: Llama-3-8B shape,\nrandom weights, H200, two runs", loc="left", fontsize=11)
    axes.set_xlim(0, 330)


def draw_exact_match(axes: Axes, pretrained: pd.DataFrame) -> None:
    """Draw a dot per setting: exact match in percent with its standard error."""
    positions = np.arange(len(SETTINGS))
    rows = pretrained.set_index("setting").loc[list(SETTINGS)]
    dense = [COLORS["blue"] if setting.startswith("dense") else COLORS["green"] for setting in SETTINGS]
    colors = [COLORS["orange"] if MODES[mode].is_sparse else color for mode, color in zip(rows["mode"], dense)]
    axes.errorbar(
        rows.exact_match_percent, positions, xerr=STANDARD_ERROR, fmt="none", ecolor=COLORS["grey"], capsize=3
    )
    axes.scatter(rows.exact_match_percent, positions, color=colors, s=46, zorder=3)
    for position, percent in zip(positions, rows.exact_match_percent):
        axes.text(percent, position - 0.24, f"{percent:.1f}", ha="center", va="bottom", fontsize=9.5)
    axes.axvline(rows.exact_match_percent["dense"], color=COLORS["blue"], linewidth=1, linestyle=":")
    axes.set_yticks(positions, list(SETTINGS.values()))
    axes.set_ylim(len(SETTINGS) - 0.5, -0.8)
    axes.set_xlim(11, 30.5)
    axes.set_xlabel("exact match, % (± SE)")
    axes.set_title("Quality: GSM8K, pretrained\n0.5B (one seed, no records)", loc="left", fontsize=11)


def main() -> None:
    """Write overview.png next to this script."""
    pretrained = pd.read_csv(RESULTS / "contextual" / "pretrained.csv")
    with new_figure(4.8) as figure:
        figure.set_dpi(212)  # twice the width at which the README shows it
        left, right = figure.subplots(1, 2, width_ratios=(1, 1))
        left.invert_yaxis()
        draw_step_times(left, step_times())
        draw_exact_match(right, pretrained)
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
        save_figure(figure, RESULTS / "overview.png")


if __name__ == "__main__":
    main()
