"""Curves of one training run, and the use of its rank channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from sparselora.report.style import COLORS, new_figure, save_figure

_PHASE_COLORS = {"warmup": COLORS["sky"], "post": COLORS["blue"]}


def plot_loss_curve(
    path: Path, losses: pd.DataFrame, evaluations: pd.DataFrame, n_eval: int, act: str = "pruning", causal: bool = False
) -> None:
    """Training loss by step with its running mean, and held-out accuracy where it was measured.

    Of a language model it is the held-out loss in place of the accuracy.

    Args:
        losses: columns step, phase, train_loss.
        evaluations: columns step, moment, accuracy, eval_loss.
        n_eval: held-out sentences behind each accuracy; its error bars are one binomial standard error.
        act: what happens between the phases.
        causal: a language model.
    """
    with new_figure(4.0) as figure:
        left, right = figure.subplots(1, 2, sharex=True)
        names = {"warmup": "warm-up", "post": f"after {act}"}
        window = max(1, len(losses) // 20)
        for phase, part in losses.groupby("phase", sort=False):
            color = _PHASE_COLORS[str(phase)]
            left.plot(part["step"], part["train_loss"], color=color, alpha=0.3, linewidth=1)
            smooth = part["train_loss"].rolling(window, min_periods=1).mean()
            label = names[str(phase)] + (f", mean of {window} steps" if window > 1 else "")
            left.plot(part["step"], smooth, color=color, label=label)
        left.set(xlabel="optimizer step", ylabel="training loss (nats)", title="training loss")
        if causal:
            right.plot(evaluations["step"], evaluations["eval_loss"], color=COLORS["blue"], marker="o")
        else:
            accuracy = evaluations["accuracy"]
            error = (accuracy * (1 - accuracy) / n_eval) ** 0.5
            right.errorbar(evaluations["step"], accuracy, yerr=error, color=COLORS["blue"], marker="o", capsize=3)
        pruned_at = evaluations.loc[evaluations["moment"] == "before", "step"].iloc[0]
        for axes in (left, right):
            axes.axvline(pruned_at, color=COLORS["grey"], linestyle="--", linewidth=1, label=act)
        left.legend()
        right.set(
            xlabel="optimizer step",
            ylabel="loss (nats per token)" if causal else "accuracy (fraction, ± 1 standard error)",
            title=f"held-out {'loss' if causal else 'accuracy'} (n = {n_eval})",
        )
        save_figure(figure, path)


def plot_loss(path: Path, metrics: pd.DataFrame, evaluations: pd.DataFrame, title: str, unit: str) -> None:
    """Draw the training loss by step with its running mean, and the held-out loss where it was measured.

    Args:
        metrics: columns ``step`` and ``loss``, one row per step (``metrics.csv``).
        evaluations: columns ``step``, ``loss`` and ``n`` (``eval.csv``); rows without a loss are left out.
        title: model, data and mode.
        unit: of the loss, and of ``n``: ``token`` or ``row``.
    """
    window = max(1, len(metrics) // 20)
    measured = evaluations.dropna(subset=["loss"])
    with new_figure(4.0) as figure:
        axes = figure.subplots()
        steps, losses = metrics["step"], metrics["loss"]
        axes.plot(steps, losses, color=COLORS["sky"], alpha=0.4, linewidth=1, label="training, each step")
        smooth = losses.rolling(window, min_periods=1).mean()
        if window > 1:
            axes.plot(steps, smooth, color=COLORS["blue"], label=f"training, mean of {window} steps")
        if len(measured):
            axes.plot(
                measured["step"], measured["loss"], color=COLORS["orange"], marker="o",
                label=f"held out (n = {int(measured['n'].iloc[-1]):,} {unit}s)",
            )  # fmt: skip
        axes.set(xlabel="optimizer step", ylabel=f"loss (nats per {unit})")
        axes.set_title(title, fontsize=11)
        axes.legend()
        save_figure(figure, path)


def plot_gate(path: Path, table: pd.DataFrame, active_r: float) -> None:
    """Draw the share of tokens that used each channel of each module, the most frequent first.

    The data are in a CSV of the same name.

    Args:
        table: columns module, channel, frequency (share of the tokens), energy; channels of a module together.
        active_r: mean number of active channels of a token.
    """
    modules = {str(name): np.sort(part["frequency"])[::-1] for name, part in table.groupby("module", sort=False)}
    picture = np.full((len(modules), max(map(len, modules.values()))), np.nan)
    for row, frequency in zip(picture, modules.values()):
        row[: len(frequency)] = frequency
    with new_figure(min(1.8 + 0.17 * len(modules), 12.0)) as figure:
        axes = figure.subplots()
        image = axes.imshow(picture, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.grid(False)
        step = -(-len(modules) // 60)  # more names than that cannot be read
        axes.set_yticks(range(0, len(modules), step), _without_common_parts(list(modules))[::step], fontsize=8)
        axes.set_xticks(range(picture.shape[1]) if picture.shape[1] <= 16 else [0, picture.shape[1] - 1])
        axes.set_xticklabels([f"{int(x) + 1}" for x in axes.get_xticks()])
        axes.set(
            xlabel="rank channel, by frequency within its module",
            title=f"{active_r:.2f} of {picture.shape[1]} channels active for a token (mean)",
        )
        figure.colorbar(image, label="share of held-out tokens")
        save_figure(figure, path, data=table)


def _without_common_parts(names: list[str]) -> list[str]:
    """Dotted ``names`` without the parts in front that all of them share."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [".".join(part[shared:]) for part in parts]
