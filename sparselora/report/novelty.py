"""Runs with a novelty gate: the loss that they reach for their expense, and the decisions of the gate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from sparselora.report.style import COLORS, legend_columns, new_figure, save_figure

_POLICY_COLORS = {
    "none": COLORS["black"],
    "accept_all": COLORS["grey"],
    "random": COLORS["orange"],
    "loss_floor": COLORS["purple"],
    "novelty": COLORS["blue"],
    "novelty+loss_floor": COLORS["green"],
}
_MARKERS = "osD^vPX*"
_DASHES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)), (0, (9, 3))
)  # type: ignore[assignment]  # fmt: skip


def gate_loss(curves: pd.DataFrame, path: Path, title: str) -> None:
    """Evaluation loss against accepted steps, against tokens and against wall clock.

    Args:
        curves: of `sparselora.compare.gated_runs.loss_curves`; written next to the figure. Colours are policies.
        title: what was trained on what.
    """
    with new_figure(4.2 + 0.2 * curves["config"].nunique() / 2) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        for label, part, marker, dash in _arms(curves):
            color = _color(part)
            for axes, spent in zip(panels, ("accepted_steps", "tokens_trained", "wall_s")):
                points = part.dropna(subset=[spent])
                axes.plot(points[spent], points["loss"], color=color, ls=dash, marker=marker, ms=4, label=label)
                axes.vlines(points[spent], points["ci_low"], points["ci_high"], color=color, alpha=0.3, lw=1)
            panels[1].plot(part["tokens_seen"], part["loss"], color=color, ls=dash, lw=0.8, alpha=0.7)
        panels[0].set(xlabel="accepted steps\n(updates)", ylabel="evaluation loss (nats)")
        panels[1].set(xlabel="tokens\n(thick: trained on,\nthin: seen)")
        panels[1].xaxis.set_major_formatter(EngFormatter(sep=""))
        panels[2].set(xlabel="wall clock\n(s of training)")
        for axes, spent in zip(panels[1:], ("tokens_seen", "wall_s")):
            if curves[spent].isna().all():
                _say(axes, "not recorded")
        _limit_to_means(panels[0], curves)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns(labels, 3))
        has_interval = bool(curves["ci_low"].notna().any())
        spread = "mean over seeds, bars: 95 % interval over seeds" if has_interval else "one seed each, no interval"
        figure.suptitle(f"{title}\n{spread}", fontsize=11)
        save_figure(figure, path, data=curves)


def gate_behaviour(stretches: pd.DataFrame, path: Path, title: str) -> None:
    """Draw a row a policy: left, the share it accepted over the steps, right, the novelty it saw and its threshold.

    Args:
        stretches: of `sparselora.compare.gated_runs.gate_behaviour`; written next to the figure.
        title: what was trained on what.
    """
    order = [*_POLICY_COLORS, *stretches["policy"]]
    policies = sorted(set(stretches["policy"]), key=order.index)
    names = stretches["config"].nunique()
    with new_figure(1.4 + 1.6 * len(policies) + 0.2 * -(-names // 3)) as figure:
        panels = figure.subplots(len(policies), 2, sharex=True, sharey=True, squeeze=False)
        handles: dict[str, Line2D] = {}
        for (left, right), policy in zip(panels, policies):
            left.set(ylabel="accepted (share)", ylim=(-0.03, 1.05))
            right.set(ylabel="novelty")
            left.set_title(policy, loc="left")
            handles |= _policy(left, right, stretches[stretches["policy"] == policy], policy)
        for axes in panels[-1]:
            axes.set_xlabel("step")
        handles["target, threshold"] = Line2D([], [], color=COLORS["red"], lw=1)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=legend_columns([*handles], 3))
        figure.suptitle(f"{title}\nthick: since burn-in, pale: of the last steps", fontsize=11)
        save_figure(figure, path, data=stretches)


def _policy(left: Axes, right: Axes, stretches: pd.DataFrame, policy: str) -> dict[str, Line2D]:
    """Fill the two panels of one policy; return its arms by name, for the legend."""
    handles = {}
    for label, part, _, dash in _arms(stretches):
        color = _color(part)
        left.plot(part["step"], part["accepted_share"], color=color, ls=dash, lw=0.8, alpha=0.35)
        handles[label] = left.plot(part["step"], part["acceptance_rate"], color=color, ls=dash)[0]
        if policy != "accept_all":
            left.axhline(part["target_rate"].iloc[0], color=COLORS["red"], ls="--", lw=1)
        right.plot(part["step"], part["novelty"], color=color, ls=dash)
        if policy != "loss_floor":  # its threshold is a loss
            right.plot(part["step"], part["threshold"], color=COLORS["red"], ls=dash, lw=1)
    if stretches["novelty"].isna().all():
        _say(right, "decides by loss" if policy == "loss_floor" else "decides without a signal")
    return handles


def _arms(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, str, tuple[int, tuple[int, ...]]]]:
    """Yield each arm's name, its rows, and a marker and a dash in which the arms of one policy differ."""
    seen: dict[str, int] = {}
    for name, part in table.groupby("config", sort=False):
        policy = str(part["policy"].iloc[0])
        place = seen[policy] = seen.get(policy, -1) + 1
        label = f"{name} (n = {int(part['n_seeds'].max())})"
        yield label, part, _MARKERS[place % len(_MARKERS)], _DASHES[place % len(_DASHES)]


def _color(part: pd.DataFrame) -> str:
    return _POLICY_COLORS.get(str(part["policy"].iloc[0]), COLORS["sky"])


def _limit_to_means(axes: Axes, curves: pd.DataFrame) -> None:
    """Let the means decide what is seen: an interval of two seeds is wide enough to flatten every curve."""
    low, high = float(curves["loss"].min()), float(curves["loss"].max())
    spare = 0.15 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - spare, high + spare)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=COLORS["grey"])
