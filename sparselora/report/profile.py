"""Page and figure of ``python -m sparselora profile``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from sparselora.report.markdown import markdown_table, number
from sparselora.report.style import literal, new_figure, save_figure

_PARTS = {"ffn": "FFN", "attention": "attention q, k, v, o"}
_TITLES = {"skip": "skip", "random_fixed": "random, fixed", "surrogate": "map"}
_FLOOR = 0.03
"""Rise in % below which all cells have one colour: a thirtieth of a percent is below the noise of any profile."""
_MAP = "cividis"
"""Colour map that looks the same to colour-blind readers, and in grey."""
_CONTROLS = (
    ("skip", "skipping the FFN costs at least 10 SE"),
    ("oracle", "the oracle beats random channels by 2 SE at some level"),
    ("shuffled", "shuffled prompts cost at least 10 times what static costs at the highest level"),
)  # fmt: skip


def heat_map(path: Path, cells: pd.DataFrame, title: str) -> None:
    """Draw the rise of the answer loss: a row of panels a part, a panel a mode, layers × sparsity.

    A dot marks a cell within two standard errors of 0. The data go into a CSV of the same name.

    Args:
        cells: columns layer, part, mode, sparsity, percent, standard_error, loss_increase.
    """
    parts = [part for part in _PARTS if (cells["part"] == part).any()]
    modes = list(dict.fromkeys(cells["mode"]))
    widths = [max(1.6, cells.loc[cells["mode"] == mode, "sparsity"].nunique()) for mode in modes]
    layers = int(cells["layer"].max()) + 1
    height = 0.7 + len(parts) * (0.75 + 0.085 * max(layers, 12))
    top = max(float(cells["percent"].max()), 10 * _FLOOR)
    norm = LogNorm(_FLOOR, top)
    with new_figure(height) as figure:
        grid = figure.subplots(len(parts), len(modes), squeeze=False, sharey=True, width_ratios=widths)
        image: Any = None
        for axes_row, part in zip(grid, parts):
            for axes, mode in zip(axes_row, modes):
                rows = cells[(cells["part"] == part) & (cells["mode"] == mode)]
                if not len(rows):  # a mode that the part has not: its place stays, so that columns are one mode each
                    axes.set_frame_on(False)
                    axes.grid(visible=False)
                    axes.set_xticks([])
                    axes.tick_params(left=False, labelleft=False)
                    continue
                image = _panel(axes, rows, layers, norm)
                axes.set_title(_TITLES.get(mode, mode), fontsize=10)
            axes_row[0].set_ylabel(f"{_PARTS[part]}\nlayer", fontsize=10)
            next(axes for axes in axes_row if axes.images).tick_params(labelleft=True)
        figure.supxlabel("sparsity of that layer alone (%); a dot: within 2 standard errors of no rise", fontsize=9.5)
        bar = figure.colorbar(image, ax=grid, extend="min", pad=0.01, fraction=0.035)
        bar.set_label("rise of the answer loss (% of the dense loss)", fontsize=9.5)
        ticks = [t for t in (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if t <= top]
        bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks], fontsize=9)
        bar.minorticks_off()
        figure.suptitle(literal(title), fontsize=11)
        save_figure(figure, path, cells)


def _panel(axes: Axes, rows: pd.DataFrame, layers: int, norm: LogNorm) -> Any:
    levels = sorted(rows["sparsity"].unique())
    values = np.full((layers, len(levels)), np.nan)
    for row in rows.to_dict("records"):
        column = levels.index(row["sparsity"])
        values[row["layer"], column] = max(row["percent"], _FLOOR / 2)
        if not abs(row["loss_increase"]) > 2 * row["standard_error"]:
            axes.plot(column, row["layer"], ".", color="white", markersize=2.6, markeredgewidth=0)
    image = axes.imshow(values, aspect="auto", cmap=_MAP, norm=norm, interpolation="nearest", origin="upper")
    axes.grid(visible=False)
    axes.set_xticks(range(len(levels)), [f"{100 * level:g}" for level in levels], fontsize=8)
    axes.set_yticks(range(0, layers, max(1, layers // 8)))
    axes.tick_params(labelsize=8, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    return image


# --- the page -----------------------------------------------------------------------------------------------------


def profile_page(
    title: str, facts: Mapping[str, Any], verdicts: pd.DataFrame, prompts: pd.DataFrame, schedules: pd.DataFrame
) -> str:
    """Return the report: prompts, controls, a verdict a layer, whole schedules next to the sums of their layers."""
    lines = [
        f"# Profile of {title}",
        "",
        f"{facts['rows']} held-out rows, dense answer loss {facts['dense_loss']:.4f} nats per label; rises in % of "
        f"it, ± one standard error over rows. {facts['cells']} cells in {facts['seconds']:g} s, of which calibration "
        f"{facts['calibration_seconds']:g} s; the products of the cells are {facts['tflop']:g} TFLOP, "
        f"{facts['floor_seconds']:g} s at this device's rate.",
        "",
        *_prompt_lines(prompts),
        "",
        "Controls, over layers:",
        *_control_lines(verdicts),
    ]
    for part, rows in verdicts.groupby("part", sort=False):
        lines += ["", f"## {_PARTS[str(part)]}", "", _layer_table(rows)]
    lines += ["", "## Whole schedules", "", _chosen_line(facts)]
    lines += ["", _schedule_lines(schedules), "", _additivity(schedules)]
    return "\n".join(lines) + "\n"


def _chosen_line(facts: Mapping[str, Any]) -> str:
    """Say how the chosen schedule was found."""
    tolerance, limit = facts["tolerance"], facts["layer_limit"]
    if not limit:
        return (
            f"No schedule is chosen: none of static channels costs at most {tolerance:g} % as a whole, two standard "
            "errors included."
        )
    return (
        f"*Chosen*: static channels where a layer alone costs at most {limit:g} %, the largest such limit (of "
        f"{tolerance:g} % halved) whose schedule costs at most {tolerance:g} % as a whole, two standard errors "
        "included, on the measured rows."
    )


def _prompt_lines(prompts: pd.DataFrame) -> list[str]:
    lines = []
    for row in prompts.to_dict("records"):
        increase, error = row["loss_increase"], row["standard_error"]
        if increase > 0 and increase >= 10 * error:
            verdict = "the task reads its context"
        elif increase > 2 * error:
            verdict = "FAILS: the task reads its context, but by less than 10 SE: measure more rows"
        else:
            verdict = "FAILS: nothing shows that the task reads its context"
        cost = f"{row['percent']:+.1f} ± {row['percent_error']:.1f} %"
        lines.append(f"- {row['prompt']} prompt ({row['rows']} rows): {cost}: {verdict}")
    return lines


def _control_lines(verdicts: pd.DataFrame) -> list[str]:
    lines = []
    for control, text in _CONTROLS:
        tested = verdicts[verdicts[f"{control}_passes"].notna()]
        failing = tested[~tested[f"{control}_passes"].astype(bool)]
        places = [f"{row['part']} {row['layer']}" for row in failing.to_dict("records")]
        line = f"- {text}: passes in {len(tested) - len(failing)} of {len(tested)}"
        lines.append(line if not places else f"{line}; FAILS in {_few(places)}")
    return lines


def _few(places: Sequence[str]) -> str:
    """Return places as ``ffn 0, 3-5, attention 2``."""
    by_part: dict[str, list[int]] = {}
    for place in places:
        part, layer = place.split()
        by_part.setdefault(part, []).append(int(layer))
    return ", ".join(f"{part} {_ranges(layers)}" for part, layers in by_part.items())


def _ranges(layers: Sequence[int]) -> str:
    texts, start = [], layers[0]
    for layer, following in zip(layers, [*layers[1:], math.inf]):
        if following != layer + 1:
            texts.append(f"{start}" if start == layer else f"{start}-{layer}")
            start = int(following) if following != math.inf else 0
    return ", ".join(texts)


def _layer_table(rows: pd.DataFrame) -> str:
    header = ["layer", "best 1 %", "best 10 %", "map", "skip %", "static at highest %", "oracle − random %", "verdict"]
    lines = [
        [
            str(row["layer"]), _share(row["energy_best_1"]), _share(row["energy_best_10"]),
            _share(row["map_explained"]),
            _with_error(row["skip_percent"], row["skip_standard_error"]),
            _with_error(row["static_percent"], row["static_standard_error"]),
            number(row["oracle_minus_random"], "+.2f"), row["verdict"],
        ]
        for row in rows.to_dict("records")
    ]  # fmt: skip
    return markdown_table(header, lines)


def _share(value: float) -> str:
    return number(value, ".2f")


def _with_error(value: float, error: float) -> str:
    return "" if math.isnan(value) else f"{value:+.2f} ± {error:.2f}"


def _schedule_lines(schedules: pd.DataFrame) -> str:
    rows = []
    for (name, mode), group in schedules.groupby(["schedule", "mode"], sort=False):
        by_rows = group.set_index("rows")
        measured, further = by_rows.loc["measured"], by_rows.loc["further"]
        rows.append(
            [str(name), str(mode), f"{measured['flops_left']:.3f}",
             _with_error(measured["percent"], measured["percent_error"]),
             number(float(measured["sum_of_layers_percent"]), "+.2f"),
             _with_error(further["percent"], further["percent_error"])]
        )  # fmt: skip
    return markdown_table(
        ["schedule", "mode", "FLOPs left", "rise %", "sum of layers %", "rise % on further rows"], rows
    )


def _additivity(schedules: pd.DataFrame) -> str:
    rows = schedules[(schedules["rows"] == "measured") & (schedules["sum_of_layers_percent"] > 0)]
    if not len(rows):
        return "Costs of single layers do not add up to that of a schedule in general; the schedule itself counts."
    ratios = rows["percent"] / rows["sum_of_layers_percent"]
    return (
        f"Costs do not add: these schedules cost {ratios.min():.1f} to {ratios.max():.1f} times the sum of their "
        "single layers. Rows that chose a schedule flatter it; the further rows do not."
    )
