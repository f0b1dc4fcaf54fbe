"""Page and figure of ``python -m sparselora frontier``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparselora.report.markdown import markdown_table, number, with_interval
from sparselora.report.style import COLORS, literal, new_figure, save_figure


@dataclass(frozen=True)
class FrontierFacts:
    """Facts of a search that stand around its table.

    Attributes:
        title: model and data.
        tolerance: accepted rise of the loss, as a share of dense's.
        budget: in words.
        full_steps: optimizer steps of the run that the search is for.
        base_loss: held-out loss of the model without an adapter, in nats per label.
        dense_loss: of dense's longest pilots; NaN where none has finished.
        is_finished: the search has ended.
        winner: the candidate to train with; None if nothing pays.
        is_verdict: the choice rests on tests over seeds.
        learning_rates: sentences on how those of the longest pilots were chosen.
        command: that trains with it.
    """

    title: str
    tolerance: float
    budget: str
    full_steps: int
    base_loss: float
    dense_loss: float
    is_finished: bool
    winner: str | None
    is_verdict: bool
    learning_rates: str
    command: str


# --- the page -----------------------------------------------------------------------------------------------------

HOW_TO_READ = """\
*Time*: of training, relative to dense in the same rung, by the interleaved steps; set-up is charged in proportion.
*Loss − dense*: held-out loss minus that of dense on as many rows, in nats per label, paired by seed and data order. *At
equal time*: minus that of dense for the same wall clock, interpolated between dense pilots of several lengths (linear
in log time; the interval includes the error of that form). Below 0 the shortcut does more with its time than dense
training on less data. Intervals are 95 %. Over seeds they speak about other seeds, and a verdict is a test, adjusted
over all candidates with several seeds (Holm). Over rows they describe these very runs: *looks better*, *looks worse*
and *open* are no verdicts. *Pareto*: no pilot of any candidate is at once as fast and as low."""


def frontier_page(table: pd.DataFrame, facts: FrontierFacts) -> str:
    """Return the report: the choice, the table, what stands under it, and the candidates that were left out.

    Args:
        table: of `sparselora.frontier.verdict.frontier_table`.
    """
    compared, others = table[table["seeds"] > 0], table[table["seeds"] == 0]
    parts = [f"# Frontier of {facts.title}"]
    if not facts.is_finished:
        parts.append("**The search has not ended**: this is the table of the pilots so far. The same command goes on.")
    if not len(compared):
        parts.append("No pilot of dense has finished: there is nothing to compare yet.")
        return "\n\n".join([*parts, _left_out(others)]) + "\n"
    parts += [_choice(table, facts), f"    {facts.command}", _learned(facts), _table(compared)]
    parts += ["\n".join(f"- {line}" for line in _limits(compared, facts)), HOW_TO_READ]
    return "\n\n".join([*parts, *([_left_out(others)] if len(others) else [])]) + "\n"


def _choice(table: pd.DataFrame, facts: FrontierFacts) -> str:
    tolerance = f"{100 * facts.tolerance:g} %"
    if facts.winner is None:
        evidence = "is shown to do" if facts.is_verdict else "looks, on the rows of one seed, as if it did"
        parts = [
            f"**Nothing pays: train dense.** No candidate {evidence} better than dense for the same time *and* stay "
            f"within {tolerance} of dense's loss on as many rows."
        ]
        is_better = table["verdict"].isin(["better", "looks better"]) & ~table["control"]
        better = table[is_better & (table["rung"] == table["rung"].max())]
        if len(better):
            costs = [
                f"{row['candidate']} by {-row['equal_time_difference']:.4f} nats, at a loss up to "
                f"{100 * row['difference_high'] / facts.dense_loss:.1f} % above dense's"
                for row in better.sort_values("difference_high").head(_SHOWN).to_dict("records")
            ]
            parts.append(
                f"{'Better' if facts.is_verdict else 'Looking better'} than dense for the same time, but not shown to "
                f"be within the tolerance: {'; '.join(costs)} (upper ends of intervals). More held-out rows, more "
                "seeds or a larger --tolerance may admit them."
            )
        return " ".join(parts)
    row = table.set_index("candidate").loc[facts.winner]
    equal_time = _interval(row, "equal_time_difference", "equal_time_low", "equal_time_high")
    numbers = (
        f"{1 / row['time_ratio']:.2f} times as fast as dense; loss "
        f"{_interval(row, 'difference', 'difference_low', 'difference_high')} on as many rows, and {equal_time} "
        "against dense for the same time"
    )
    if facts.is_verdict:
        return (
            f"**{facts.winner} pays**: {numbers} ({row['seeds']} seeds). It is the fastest that is better than dense "
            f"for the same time and stays within {tolerance} of dense's loss."
        )
    return (
        f"**{facts.winner} looks as if it pays, which is no verdict**: {numbers}. No candidate has two seeds yet, and "
        "these intervals are over the rows of one."
    )


def _learned(facts: FrontierFacts) -> str:
    gain = facts.base_loss - facts.dense_loss
    return (
        f"Dense training took the held-out answer loss from {facts.base_loss:.4f} to {facts.dense_loss:.4f} nats per "
        f"label in its longest pilot. The tolerance of {100 * facts.tolerance:g} % is "
        f"{facts.tolerance * facts.dense_loss:.4f} nats, {100 * facts.tolerance * facts.dense_loss / gain:.1f} % of "
        "that gain."
    )


def _table(compared: pd.DataFrame) -> str:
    header = ["candidate", "ms a step", "tokens/s", "GB", "steps", "time", "loss − dense", "at equal time", "over"]
    rows = []
    for row in in_order(compared).to_dict("records"):
        unit = f"{row['rows']} rows" if row["seeds"] == 1 else f"{row['seeds']} seeds"
        is_dense = row["candidate"] == "dense"
        rows.append([
            row["candidate"] + ("" if is_dense or not row["control"] else " (control)"),
            number(row["step_ms"], ".1f"), number(row["tokens_per_s"], ",.0f"), number(row["peak_gb"], ".2f"),
            str(int(row["steps"])), number(row["time_ratio"], ".2f"),
            "" if is_dense else _interval(row, "difference", "difference_low", "difference_high"),
            _interval(row, "equal_time_difference", "equal_time_low", "equal_time_high"),
            unit if row["interval_over"] else "",
            "yes" if row["pareto"] else "", f"**{row['verdict']}**" if row["pays"] else row["verdict"],
        ])  # fmt: skip
    return markdown_table([*header, "Pareto", "verdict"], rows)


def in_order(compared: pd.DataFrame) -> pd.DataFrame:
    """Return the table with dense first, then by the last rung, the longest pilots first, then by loss at equal time.

    Dense on less data, which has no difference to itself, comes after dense.
    """
    order = compared.assign(
        _kind=np.where(compared["candidate"] == "dense", 0, np.where(compared["dense_time"] == "", 1, 2)),
        _rung=-compared["rung"],
    )
    return order.sort_values(["_kind", "_rung", "equal_time_difference"], kind="stable")[list(compared)]


def _interval(row: Mapping[str, Any] | pd.Series, value: str, low: str, high: str) -> str:
    text = with_interval(float(row[value]), float(row[low]), float(row[high]))
    return text.replace("+inf", "∞").replace("-inf", "−∞")


_SHOWN = 3
"""Candidates that miss the tolerance and are named where nothing pays."""
_APART = 1.1
"""Ratio of two clocks from which they are said to disagree."""


def _limits(compared: pd.DataFrame, facts: FrontierFacts) -> list[str]:
    """Return what the table rests on, and what it cannot know."""
    last = compared["rung"].max()
    longest = int(compared.loc[compared["candidate"] == "dense", "steps"].iloc[0])
    lines = [
        f"The longest pilots have {longest:,} of the {facts.full_steps:,} steps of a whole run "
        f"({100 * longest / facts.full_steps:.1f} %), each with a schedule of its own length. **What a whole run would "
        "give is not measured here**: a smaller adapter or fewer trained layers may cost more the longer a run is, and "
        "a loss is not the accuracy of the task.",
        facts.learning_rates,
    ]
    earlier = compared[(compared["rung"] < last) & (compared["candidate"] != "dense")]
    if len(earlier):
        lines.append(f"Dropped on shorter pilots, and compared with dense on those: {_names(earlier['candidate'])}.")
    for place, text in (
        ("longer than all", "Slower than any dense pilot, so that dense for their time lies between its longest pilot "
         "and the extension of its last trend (extrapolated)"),
        ("shorter than all", "Faster than any dense pilot of their seeds, so that they are compared with the shortest "
         "one, which had more time (no verdict *worse* is possible)"),
    ):  # fmt: skip
        rows = compared[compared["dense_time"] == place]
        if len(rows):
            lines.append(f"{text}: {_names(rows['candidate'])}.")
    slower = compared[(compared["time_ratio"] >= 1) & ~compared["control"]]
    if len(slower):
        shown = [f"{row['candidate']} {row['time_ratio']:.2f}" for row in slower.to_dict("records")]
        lines.append(
            f"**No shortcut on this machine, model and batch**: {_names(shown)} times dense's time. What they leave "
            "out or round costs loss, and saves no time here."
        )
    random_controls = compared[compared["control"] & (compared["dense_time"] != "")]
    if len(random_controls):
        shown = [f"{row['candidate']} {_interval(row, 'difference', 'difference_low', 'difference_high')}"
                 for row in random_controls.to_dict("records")]  # fmt: skip
        lines.append(
            f"Controls with random channels, loss − dense: {_names(shown)}. At the same sparsity and rung, channels "
            "that are not better than these were chosen in vain."
        )
    growing = compared[
        (compared["difference_low"] > compared["shorter_difference"].clip(lower=0)) & ~compared["control"]
    ]
    if len(growing):
        lines.append(
            f"The loss over dense grew from the pilots before to these: {_names(growing['candidate'])}. It may grow on."
        )
    less = compared[
        (compared["verdict"] == "dense for less time")
        & (compared["difference_high"] <= facts.tolerance * facts.dense_loss)
    ]
    if len(less):
        lines.append(
            f"Dense on less data is within the tolerance, too ({_names(less['candidate'])}): at this length the task "
            "does not need all of the rows, and a shortcut has little to gain here."
        )
    shortest = compared[(compared["verdict"] == "dense for less time") & (compared["rung"] == last)]
    if len(shortest):
        row = shortest.sort_values("time_ratio").iloc[0]
        slope = row["difference"] / -math.log(row["time_ratio"])
        lines.append(
            f"The intervals take the times as exact: a time that is a tenth longer would move a loss at equal time by "
            f"about {abs(slope) * math.log(1.1):.4f} nats, by dense's own slope."
        )
    clocks = compared["train_seconds_ratio"] / compared["step_seconds_ratio"]
    apart = compared[(clocks > _APART) | (clocks < 1 / _APART)]
    if len(apart):
        shown = [f"{row['candidate']} {row['train_seconds_ratio']:.2f} against {row['step_seconds_ratio']:.2f}"
                 for row in apart.to_dict("records")]  # fmt: skip
        lines.append(
            "The pilots' own clocks, relative to dense's, disagree with the interleaved steps by more than a tenth, so "
            f"the machine was not quiet or the steps timed were not typical: {_names(shown)}."
        )
    return lines


def _left_out(others: pd.DataFrame) -> str:
    lines = [f"- {row['candidate']}: {row['reason'] or 'no pilot has finished'}" for row in others.to_dict("records")]
    return "\n".join(["Left out:", *lines]) if lines else ""


def _names(names: Sequence[str] | pd.Series) -> str:
    return ", ".join(map(str, names))


# --- the figure ---------------------------------------------------------------------------------------------------

_LABEL_SIZE = 8.5
_LINE = 1.45
"""Distance of two labels, in heights of a letter."""
_ABOVE = 0.2
"""Share of the drawn range of losses above the highest dense pilot or finalist, and of differences beyond the intervals
of the last rung. What lies further out stands on the edge, with an arrow and its value: one bad candidate would press
all others into a line."""
_KINDS = (
    ("dense", "black", "s"),
    ("control", "red", "X"),
    ("several seeds", "blue", "o"),
    ("one seed", "sky", "o"),
)
"""Label, colour and marker of the kinds of candidates."""


def frontier_figure(path: Path, table: pd.DataFrame, points: pd.DataFrame, title: str) -> None:
    """Draw loss against time with the Pareto line, and below it the loss at equal time of every candidate.

    The data are ``points``, in a CSV of the same name with ``_points`` at its end, and ``table``, in one of the same
    name.

    Args:
        table: of `sparselora.frontier.frontier_table.frontier_table`.
        points: time and loss of all pilots: columns candidate, rung, seconds, loss, pareto, and
            ``dense_length``, which numbers the lengths of dense training and is −1 of every other pilot.
    """
    compared = in_order(table[table["seeds"] > 0])
    tested = compared[compared["dense_time"] != ""]
    heights = (4.0, 0.5 + 0.2 * len(tested)) if len(tested) else (4.0,)
    with new_figure(sum(heights) + 1.1) as figure:
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        ends = _draw_points(panels[0], compared, points)
        panels[0].set_title(literal(title), fontsize=11)
        if len(tested):
            _draw_differences(panels[1], tested)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        _label(figure, panels[0], ends)
        save_figure(figure, path)


def _kind(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return _KINDS[0 if row["candidate"] == "dense" else 1 if row["control"] else 2 if row["seeds"] > 1 else 3]


def _draw_points(axes: Axes, compared: pd.DataFrame, points: pd.DataFrame) -> list[tuple[float, float, str]]:
    """Draw dense at its lengths, each candidate at its last pilots and the Pareto line; return what is to be labelled.

    Labelled are the controls, the Pareto line, those with several seeds and what is above the upper edge; the panel
    below names all.
    """
    dense = points[points["dense_length"] >= 0].groupby("dense_length")[["seconds", "loss"]].mean()
    line = points[points["pareto"]].sort_values("seconds")
    low, high = _loss_limits(compared, dense)
    axes.plot(
        dense["seconds"], dense["loss"], "-s", color=COLORS["grey"], lw=1.4, ms=4, zorder=1, label="dense for less time"
    )
    axes.plot(
        line["seconds"], line["loss"], color=COLORS["orange"], lw=1.2, ls="--", drawstyle="steps-post", zorder=2,
        label="Pareto line of all pilots",
    )  # fmt: skip
    ends = []
    for row in compared.to_dict("records"):
        label, color, marker = _kind(row)
        is_outside = row["loss"] > high
        x, y = row["seconds"], min(row["loss"], high)
        axes.plot(x, y, "^" if is_outside else marker, color=COLORS[color], ms=6, mec="white", mew=0.5, zorder=4,
                  clip_on=False)  # fmt: skip
        if is_outside or row["pareto"] or row["control"] or row["seeds"] > 1:
            ends.append((x, y, f"{row['candidate']} ({row['loss']:.2f})" if is_outside else row["candidate"]))
    for label, color, marker in dict.fromkeys(_kind(row) for row in compared.to_dict("records")):
        axes.plot([], [], marker, color=COLORS[color], ms=6, mec="white", mew=0.5, label=label)
    axes.set(xlabel="training time of the pilot (s, by interleaved steps)", ylabel="held-out loss\n(nats per label)")
    axes.set_xscale("log")
    _plain_ticks(axes, points["seconds"].to_numpy(dtype=float))
    axes.set_ylim(low, high)
    return ends


def _loss_limits(compared: pd.DataFrame, dense: pd.DataFrame) -> tuple[float, float]:
    finalists = compared[(compared["seeds"] > 1) & ~compared["control"]]
    low = float(min(compared["loss"].min(), dense["loss"].min()))
    high = float(max([*finalists["loss"], *dense["loss"]]))
    room = max(high - low, 1e-3)
    return low - 0.08 * room, high + _ABOVE * room


def _plain_ticks(axes: Axes, seconds: np.ndarray) -> None:
    """Put ticks at round times, written out: a log axis over less than a decade has none by itself."""
    low, high = float(seconds.min()), float(seconds.max())
    round_times = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 3, 5, 7)]
    ticks = [t for t in round_times if 0.9 * low <= t <= 1.1 * high]
    if len(ticks) > 8:
        ticks = [t for t in ticks if f"{t:.0e}"[0] in "125"]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def _draw_differences(axes: Axes, tested: pd.DataFrame) -> None:
    """Draw the loss of each candidate minus that of dense for the same time, with its interval; the last rung first."""
    low, high = _difference_limits(tested)
    for place, row in enumerate(tested.to_dict("records")):
        _, color, marker = _kind(row)
        x, ends = row["equal_time_difference"], (row["equal_time_low"], row["equal_time_high"])
        axes.plot(
            np.clip(ends, low, high), [place, place], color=COLORS[color], lw=1.4, solid_capstyle="butt", zorder=2
        )
        if low <= x <= high:
            axes.plot(x, place, marker, color=COLORS[color], ms=6, mec="white", mew=0.5, zorder=3)
        else:
            side = high if x > high else low
            axes.plot(side, place, ">" if x > high else "<", color=COLORS[color], ms=6, zorder=3, clip_on=False)
            axes.annotate(
                f"{x:+.3f}", (side, place), (-8 if x > high else 8, 0), textcoords="offset points", va="center",
                ha="right" if x > high else "left", fontsize=_LABEL_SIZE, zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    axes.axvline(0, color=COLORS["grey"], lw=1.4, zorder=1)
    axes.set_yticks(range(len(tested)), [literal(name) for name in tested["candidate"]], fontsize=_LABEL_SIZE)
    for rung_end in np.flatnonzero(np.diff(tested["rung"])):
        axes.axhline(rung_end + 0.5, color=COLORS["grey"], lw=0.8, ls=":")
    axes.set_xlim(low, high)
    axes.set_ylim(len(tested) - 0.5, -0.5)
    axes.set_xlabel(
        "loss minus that of dense for the same time (nats per label, 95 %: over seeds, or over rows of one seed)",
        fontsize=10,
    )


def _difference_limits(tested: pd.DataFrame) -> tuple[float, float]:
    last = tested[tested["rung"] == tested["rung"].max()]
    ends = last[~last["control"]] if (~last["control"]).any() else last
    values = np.concatenate(
        [ends[f"equal_time_{name}"].to_numpy(dtype=float) for name in ("low", "high", "difference")]
    )
    values = np.append(values[np.isfinite(values)], 0.0)
    # Half of all candidates of a first rung may be far worse; the better half decides the scale.
    better = tested["equal_time_difference"].quantile([0.0, 0.5]).to_numpy(dtype=float)
    low = min(float(np.quantile(values, 0.02)), float(better[0]))
    high = max(min(float(values.max()), 2 * max(abs(low), float(better[1]))), 0.3 * abs(low), 1e-4)
    return low - _ABOVE * (high - low), high + _ABOVE * (high - low)


def _label(figure: Figure, axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Put the labels in a column to the right of the axes, from the highest point to the lowest, each with a line."""
    figure.canvas.draw()  # the place of the axes in the figure is known once they are laid out
    height = axes.get_window_extent().height
    step = _LINE * _LABEL_SIZE * figure.dpi / 72 / height
    places = [axes.transAxes.inverted().transform(axes.transData.transform((x, y))) for x, y, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: (places[i][1], -places[i][0]))
    heights = spread([float(places[i][1]) for i in order], step, low=0.0, high=1.0)
    for i, y in zip(order, heights):
        axes.annotate(
            literal(ends[i][2]), xy=(ends[i][0], ends[i][1]), xycoords="data", xytext=(1.04, y),
            textcoords="axes fraction", fontsize=_LABEL_SIZE, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": COLORS["grey"], "lw": 0.5, "alpha": 0.6, "shrinkB": 3},
        )  # fmt: skip


def spread(heights: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Return the places nearest to ``heights``, which ascend, that are at least ``step`` apart (least squares).

    Neighbours that are too near form a block about the mean of where its members would like to begin (pool adjacent
    violators). All lie between ``low`` and ``high``, as long as there is room; otherwise from ``low`` on.
    """
    blocks: list[list[float]] = []
    for i, height in enumerate(heights):
        blocks.append([height - i * step])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    begins = [float(np.mean(block)) for block in blocks for _ in block]
    highest = high - (len(begins) - 1) * step
    return [max(low, min(highest, begin)) + i * step for i, begin in enumerate(begins)]
