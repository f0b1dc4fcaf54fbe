"""Draw what a cheaper step costs in quality: loss on held-out rows against the time that a step takes.

python results/fast/frontier.py    # reads runs/runs.csv and speed.csv, writes frontier.png

Loss: a 0.5B model on GSM8K, one run a seed. Time: a step of a Llama-3-8B shape, since the 0.5B model's own steps were
not timed alone. Dense training for the time of `both` takes fewer dense steps, and counts as that share of one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t

from sparselora.report.style import COLORS, new_figure, save_figure

HERE = Path(__file__).resolve().parent
ARMS = {
    "dense": ("dense", "dense", COLORS["blue"]),
    "fp8": ("fp8", "fp8", COLORS["orange"]),
    "both": ("both", "fp8 and no context backward", COLORS["green"]),
    "dense_time_both": ("dense", "dense for the same time", COLORS["sky"]),
}
"""Arm of the runs: its variant in speed.csv, its name and its colour in the figure."""


def points() -> pd.DataFrame:
    """Return a row an arm: mean loss with its 95 % t interval over seeds, and milliseconds of a step with quartiles."""
    runs = pd.read_csv(HERE / "runs" / "runs.csv")
    runs["arm"] = runs["run"].str.replace(r"_s\d+$", "", regex=True)
    speed = pd.read_csv(HERE / "speed.csv")
    speed = speed[speed["group"] == "main"].set_index("variant")
    full_steps = runs["summary/steps"].max()
    rows = []
    for arm, (variant, _, _) in ARMS.items():
        losses = runs.loc[runs["arm"] == arm, "summary/eval_loss"]
        half_width = t.ppf(0.975, len(losses) - 1) * losses.std() / np.sqrt(len(losses))
        share = runs.loc[runs["arm"] == arm, "summary/steps"].max() / full_steps
        times = speed.loc[variant, ["step_ms", "step_ms_low", "step_ms_high"]].astype(float) * share
        rows.append({"arm": arm, "seeds": len(losses), "loss": losses.mean(), "half_width": half_width, **times})
    return pd.DataFrame(rows)


def draw(arms: pd.DataFrame, path: Path) -> None:
    """Draw a dot an arm, its name beside it."""
    with new_figure(3.8) as figure:
        axes = figure.subplots()
        for row in arms.to_dict("records"):
            _, name, color = ARMS[row["arm"]]
            quartiles = [[row["step_ms"] - row["step_ms_low"]], [row["step_ms_high"] - row["step_ms"]]]
            axes.errorbar(
                row["step_ms"], row["loss"], xerr=quartiles, yerr=row["half_width"], fmt="o", color=color, capsize=3
            )
            axes.annotate(
                name, (row["step_ms"], row["loss"]), xytext=(8, 0), textcoords="offset points", va="center", fontsize=10
            )
        axes.set_xlim(60, 225)
        axes.set_xlabel("ms per step of a Llama-3-8B shape (quartiles)")
        axes.set_ylabel("loss on held-out rows, nats a label\n(0.5B model, 95 % over 3 seeds)")
        save_figure(figure, path)


if __name__ == "__main__":
    arms = points()
    draw(arms, HERE / "frontier.png")
    print(arms.to_string(index=False))
