"""Runs of `train` against one another: what quality costs."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from sparselora.report.style import COLORS, legend_columns, new_figure, save_figure

_CYCLE = ("blue", "orange", "green", "purple", "red", "sky", "black", "yellow")
_MARKERS = "osD^vPX*"


def quality_against_cost(configs: pd.DataFrame, differences: pd.DataFrame, path: Path, title: str) -> None:
    """On the left the metric against the time of a step, on the right each difference to the baseline.

    Args:
        configs: of `sparselora.compare.training_runs.describe_runs`; written next to the figure.
        differences: of `training_runs.compare_runs`. Thick bars are intervals over seeds, thin ones over rows.
        title: what was trained on what.
    """
    metric = str(configs["metric"].iloc[0])
    unit = "loss (nats per token)" if metric == "loss" else "accuracy (fraction correct)"
    style = {
        name: (COLORS[_CYCLE[i % len(_CYCLE)]], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(configs["config"])
    }
    with new_figure(1.2 + max(3.4, 0.45 * len(configs))) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.1))
        for row in configs.to_dict("records"):
            color, marker = style[row["config"]]
            label = f"{row['config']} (n = {row['n_seeds']})"
            left.errorbar(
                row["step_ms"], row["mean"], row["std"], color=color, marker=marker, capsize=3, ls="", label=label
            )
        left.set(xlabel="time of a training step (ms, median)", ylabel=f"evaluation {unit}")
        has_spread = bool(configs["std"].notna().any())
        spread = "mean ± 1 standard deviation\nover seeds" if has_spread else "one seed each"
        left.set_title(spread, fontsize=10)
        places = np.arange(len(differences))[::-1]
        for place, row in zip(places, differences.to_dict("records")):
            color, marker = style[row["config"]]
            right.hlines(place, row["ci_low"], row["ci_high"], color=color, linewidth=6, alpha=0.4)
            right.hlines(place, row["row_ci_low"], row["row_ci_high"], color=color, linewidth=1.5)
            right.plot(row["difference"], place, color=color, marker=marker)
        right.axvline(0, color=COLORS["grey"], linestyle="--", linewidth=1)
        right.set_yticks(places, [_short(name) for name in differences["config"]], fontsize=9)
        right.set_ylim(-0.7, len(differences) - 0.3)
        right.set(xlabel="difference in " + unit.replace(" (", "\n("))
        intervals = "over seeds (thick), over rows (thin)" if differences["ci_low"].notna().any() else "over rows"
        right.set_title(f"minus baseline, 95 %\n{intervals}", fontsize=10)
        right.xaxis.set_major_locator(MaxNLocator(5))
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns(labels, 2))
        figure.suptitle(title, fontsize=11)
        save_figure(figure, path, data=configs)


def _short(name: str) -> str:
    """Return ``name`` in at most three lines of 24 characters."""
    return "\n".join(textwrap.wrap(name, 24, max_lines=3, placeholder=" …", break_long_words=False))
