"""Curves of one training run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from sparselora.figures import COLORS, new_figure, save_figure

_PHASE_COLORS = {"warmup": COLORS["sky"], "post": COLORS["blue"]}
_PHASE_NAMES = {"warmup": "warm-up", "post": "after pruning"}


def plot_loss_curve(path: Path, losses: pd.DataFrame, evaluations: pd.DataFrame, n_eval: int) -> None:
    """Training loss by step with its running mean, and held-out accuracy where it was measured.

    Args:
        losses: columns step, phase, train_loss.
        evaluations: columns step, moment, accuracy, eval_loss.
        n_eval: held-out sentences behind each accuracy; its error bars are one binomial standard error.
    """
    with new_figure(8, 4) as figure:
        left, right = figure.subplots(1, 2, sharex=True)
        window = max(1, len(losses) // 20)
        for phase, part in losses.groupby("phase", sort=False):
            color = _PHASE_COLORS[str(phase)]
            left.plot(part["step"], part["train_loss"], color=color, alpha=0.3, linewidth=1)
            smooth = part["train_loss"].rolling(window, min_periods=1).mean()
            label = _PHASE_NAMES[str(phase)] + (f", mean of {window} steps" if window > 1 else "")
            left.plot(part["step"], smooth, color=color, label=label)
        left.set(xlabel="optimizer step", ylabel="training loss (nats)", title="training loss")
        accuracy = evaluations["accuracy"]
        error = (accuracy * (1 - accuracy) / n_eval) ** 0.5
        right.errorbar(evaluations["step"], accuracy, yerr=error, color=COLORS["blue"], marker="o", capsize=3)
        pruned_at = evaluations.loc[evaluations["moment"] == "before", "step"].iloc[0]
        for axes in (left, right):
            axes.axvline(pruned_at, color=COLORS["grey"], linestyle="--", linewidth=1, label="pruning")
        left.legend()
        right.set(
            xlabel="optimizer step",
            ylabel="accuracy (fraction, ± 1 standard error)",
            title=f"held-out accuracy (n = {n_eval})",
        )
        save_figure(figure, path)
