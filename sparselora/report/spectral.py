"""Figures of ``python -m sparselora edit``: the spectra, the results of the calibration, the edit and its controls."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import FixedLocator, MaxNLocator

from sparselora.report.style import COLORS, literal, new_figure, save_figure

ROLE_STYLES = {
    "core": (COLORS["blue"], "^"),
    "mid": (COLORS["grey"], "o"),
    "noise": (COLORS["orange"], "v"),
    "zero": (COLORS["black"], "x"),
}
KIND_STYLES = {
    "base": (COLORS["black"], "X", "no adapter"),
    "no_lora": (COLORS["purple"], "P", "no LoRA"),
    "round_trip": (COLORS["green"], "s", "round trip"),
    "edit": (COLORS["blue"], "D", "edit"),
    "signed": (COLORS["red"], "^", "signed"),
    "draw": (COLORS["grey"], "o", "random draws"),
}
_PANELS = 6
_COLUMNS = 3


def spectra(path: Path, directions: pd.DataFrame, title: str) -> None:
    """Singular values before (line) and after (marks, by role) of the modules that changed most, a panel each.

    Args:
        directions: ``module``, ``index``, ``sigma_before``, ``sigma_after``, ``role``; written next to the figure, all
            modules.
        title: which adapter, which mode.
    """
    squares = (directions["sigma_after"] - directions["sigma_before"]) ** 2
    change = np.sqrt(squares.groupby(directions["module"], sort=False).sum())
    largest = set(change.sort_values(ascending=False, kind="stable").index[:_PANELS])
    shown = [module for module in change.index if module in largest]
    rows, columns = -(-len(shown) // _COLUMNS), min(len(shown), _COLUMNS)
    with new_figure(1.2 + 2.4 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, module in zip(grid, shown):
            part = directions[directions["module"] == module]
            axes.plot(part["index"] + 1, part["sigma_before"], color=COLORS["black"], lw=1.1, label="before")
            _marks(axes, part, "sigma_after")
            axes.set_title(_short(module), fontsize=9)
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for axes in grid[max(0, len(shown) - columns) : len(shown)]:
            axes.set_xlabel("direction (1 = largest σ)")
        for axes in grid[: len(shown) : columns]:
            axes.set_ylabel("singular value of ΔW", fontsize=10)
        _legend(figure, grid[: len(shown)])
        count = f"{len(shown)} of {len(change)} modules, those with the largest change"
        figure.suptitle(f"{title}: spectrum before and after\n{count}", fontsize=11)
        save_figure(figure, path, directions)


def _marks(axes: Axes, part: pd.DataFrame, column: str) -> None:
    for role, (color, marker) in ROLE_STYLES.items():
        marks = part[part["role"] == role]
        if len(marks):
            label = f"after: {role}"
            axes.plot(marks["index"] + 1, marks[column], ls="", marker=marker, ms=5, color=color, label=label)


def _legend(figure: Figure, panels: np.ndarray) -> None:
    """One legend for all panels, each entry once."""
    entries = {text: mark for axes in panels for mark, text in zip(*axes.get_legend_handles_labels())}
    columns = min(len(entries), int(figure.get_figwidth() / 1.6))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def _short(module: str) -> str:
    """A module's name from its layer on."""
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[max(0, number - 1) :])


def sensitivity(path: Path, directions: pd.DataFrame, title: str) -> None:
    """Mean |∂L/∂σ| and signed ∂L/∂σ against σ, a mark a direction: colour its layer, shape its role.

    Args:
        directions: also ``mean``, ``mean_abs`` and ``layer`` (missing where a module is in none); written next to it.
    """
    live = directions[directions["sigma_before"] > 0]
    with new_figure(4.2) as figure:
        panels = figure.subplots(1, 2, sharex=True)
        layer = live["layer"].fillna(-1).astype(float)
        scale = ScalarMappable(
            Normalize(layer.min(), max(layer.max(), layer.min() + 1)) if len(live) else None, "cividis"
        )
        for axes, column in zip(panels, ("mean_abs", "mean")):
            for role, (_, marker) in ROLE_STYLES.items():
                marks = live[live["role"] == role]
                if len(marks):
                    colors = scale.to_rgba(layer[marks.index].to_numpy())
                    axes.scatter(marks["sigma_before"], marks[column], c=colors, marker=marker, s=22, label=role)
            axes.set_xlabel("singular value σ of ΔW, before")
        if len(live):
            panels[0].set_xscale("log")
        if (live["mean_abs"] > 0).any():
            panels[0].set_yscale("log")
            _symmetric(panels[1], live["mean"])
        panels[0].set_ylabel("mean |∂L/∂σ| (nats a label)")
        panels[1].set_ylabel("∂L/∂σ (nats a label)")
        panels[1].axhline(0, color=COLORS["grey"], lw=1, ls="--")
        figure.colorbar(scale, ax=list(panels), label="layer", pad=0.01, ticks=MaxNLocator(integer=True))
        _legend(figure, panels)
        figure.suptitle(f"{title}: sensitivity against σ, n = {len(live)} directions", fontsize=11)
        save_figure(figure, path, directions)


def _symmetric(axes: Axes, values: pd.Series) -> None:
    """Linear near zero, logarithmic beyond: gradients of both signs over orders of magnitude."""
    largest = float(values.abs().max())
    if largest > 0:
        axes.set_yscale("symlog", linthresh=10.0 ** (np.floor(np.log10(largest)) - 1))


def layers(path: Path, directions: pd.DataFrame, title: str) -> None:
    """By layer, a line a kind of module: the loss's sensitivity to scaling, and how much the edit changes.

    Above, the root mean square over directions of σ·∂L/∂σ in mean absolute value: it is of no unit of σ, so that
    layers of different size compare. Below, ‖Δσ‖₂ / ‖σ‖₂.
    """
    table = layer_table(directions)
    styles = zip(("blue", "orange", "green", "red", "purple", "sky", "black", "yellow"), "osD^vPX*")
    with new_figure(5.6) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        for (kind, part), (color, marker) in zip(table.groupby("kind", sort=False), styles):
            for axes, column in ((above, "log_sensitivity"), (below, "relative_change")):
                axes.plot(part["layer"], part[column], color=COLORS[color], marker=marker, ms=5, label=kind)
        if (table["log_sensitivity"] > 0).any():
            above.set_yscale("log")
        above.set_ylabel("σ · mean |∂L/∂σ|\n(nats a label, rms)")
        below.set(xlabel="layer", ylabel="‖Δσ‖₂ / ‖σ‖₂", ylim=(0, None))
        below.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, np.array([above]))
        figure.suptitle(f"{title}: by layer, n = {len(table)} modules", fontsize=11)
        save_figure(figure, path, table)


def layer_table(directions: pd.DataFrame) -> pd.DataFrame:
    """A row a module in a layer: ``module``, ``kind`` (its name after the layer's number), ``layer``,
    ``log_sensitivity`` and ``relative_change``."""
    rows = []
    for module, part in directions.dropna(subset=["layer"]).groupby("module", sort=False):
        sigma, change = part["sigma_before"], part["sigma_after"] - part["sigma_before"]
        size = float(np.linalg.norm(sigma))
        rows.append({
            "module": module, "kind": ".".join(_short(str(module)).split(".")[2:]) or "module",
            "layer": int(part["layer"].iloc[0]),
            "log_sensitivity": float(np.sqrt(np.mean((sigma * part["mean_abs"]) ** 2))),
            "relative_change": float(np.linalg.norm(change)) / size if size else 0.0,
        })  # fmt: skip
    columns = ["module", "kind", "layer", "log_sensitivity", "relative_change"]
    return pd.DataFrame(rows, columns=columns).sort_values(["kind", "layer"], kind="stable")


def report(path: Path, table: pd.DataFrame, title: str) -> None:
    """Left: the loss of each variant minus the unedited adapter's, draws as a cloud, the others with their 95 %
    interval. Right: predicted against measured.

    Args:
        table: of `sparselora.spectral.verdict.compare`; written next to the figure.
    """
    with new_figure(4.4) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _changes(left, table)
        _predictions(right, table)
        figure.suptitle(title, fontsize=11)
        save_figure(figure, path, table)


def _changes(axes: Axes, table: pd.DataFrame) -> None:
    shown = [kind for kind in ("round_trip", "edit", "signed", "draw") if (table["kind"] == kind).any()]
    for place, kind in enumerate(shown):
        color, marker, _ = KIND_STYLES[kind]
        rows = table[table["kind"] == kind]
        if kind == "draw":
            spread = np.linspace(-0.25, 0.25, len(rows)) if len(rows) > 1 else np.zeros(1)
            axes.scatter(place + spread, rows["loss_change"], s=26, color=color, alpha=0.7)
            axes.hlines(rows["loss_change"].mean(), place - 0.33, place + 0.33, color=color, lw=1.5)
            continue
        row = rows.iloc[0]
        axes.plot(place, row["loss_change"], marker=marker, color=color, ms=8)
        axes.vlines(place, row["ci_low"], row["ci_high"], color=color, lw=1.5)
    labels = [KIND_STYLES[kind][2] for kind in shown]
    names = dict(zip(table["kind"], table["variant"]))
    for kind, word in (("edit", "edit:\n{}"), ("signed", "signed:\n{}")):
        if kind in shown:
            labels[shown.index(kind)] = word.format(names[kind])
    if "draw" in shown:
        labels[shown.index("draw")] = f"{(table['kind'] == 'draw').sum()} random\ndraws"
    axes.set_xticks(range(len(shown)), labels, fontsize=9.5)
    axes.axhline(0, color=COLORS["black"], lw=1, ls="--")
    axes.set_ylabel("held-out loss minus unedited\n(nats a label; bars: 95 % interval)")
    controls = [
        f"{row['variant']}: {row['loss_change']:+.3f}"
        for row in table.to_dict("records")
        if row["kind"] in ("base", "no_lora")
    ]
    axes.set_title("; ".join(controls) + " (not shown)", fontsize=9.5)


def _predictions(axes: Axes, table: pd.DataFrame) -> None:
    """Hollow on the calibration rows, where they are known; filled on the held-out ones."""
    edited = table[table["kind"].isin(["edit", "signed", "draw"])]
    for kind, rows in edited.groupby("kind", sort=False):
        color, marker, label = KIND_STYLES[str(kind)]
        style: dict[str, Any] = {"ls": "", "marker": marker, "ms": 6, "color": color}
        predicted = rows["predicted_second"]
        axes.plot(predicted, rows["loss_change"], label=label, **style)
        axes.plot(predicted, rows["calibration_change"], mfc="none", **style)
    values = edited[["predicted_second", "loss_change", "calibration_change"]].to_numpy()
    low, high = min(0.0, np.nanmin(values)), max(0.0, np.nanmax(values))
    axes.plot([low, high], [low, high], color=COLORS["black"], lw=1, ls="--", label="equal")
    axes.set(xlabel="predicted ΔL, second order (nats a label)", ylabel="measured ΔL (nats a label)")
    if edited["calibration_change"].notna().any():
        axes.plot([], [], ls="", marker="o", ms=6, color=COLORS["black"], mfc="none", label="hollow: calibration rows")
    axes.legend()


def edit_configs(path: Path, configs: pd.DataFrame, title: str) -> None:
    """The mean change of the loss by each configuration of an edit, against the unedited adapter and against the null.

    Args:
        configs: of `sparselora.compare.edit_tables.config_table`; written next to the figure.
    """
    names = {"loss_change": ("blue", "o", "minus unedited"), "null_gap": ("orange", "s", "minus random draws")}
    places = np.arange(len(configs))[::-1]
    several = configs["study"].nunique() > 1
    labels = [
        f"{textwrap.fill(row['config'], 42)}\n" + (f"{row['study']}, " if several else "") + _count(row)
        for row in configs.to_dict("records")
    ]
    with new_figure(2.0 + 0.5 * len(configs)) as figure:
        axes = figure.subplots()
        for shift, (name, (color, marker, label)) in zip((0.13, -0.13), names.items()):
            axes.hlines(
                places + shift, configs[f"{name}_low"], configs[f"{name}_high"], color=COLORS[color], lw=2.5, alpha=0.6
            )
            axes.plot(configs[name], places + shift, ls="", marker=marker, color=COLORS[color], label=label)
        axes.axvline(0, color=COLORS["grey"], ls="--", lw=1)
        axes.set_yticks(places, labels, fontsize=9)
        axes.set_ylim(-0.6, len(configs) - 0.4)
        axes.set_xlabel("change of the held-out loss (nats a label)\nbars: 95 % over adapters, if several")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(title, fontsize=11)
        save_figure(figure, path, configs)


def _count(row: dict[Any, Any]) -> str:
    adapters = "1 adapter" if row["n_adapters"] == 1 else f"{row['n_adapters']} adapters"
    return f"{adapters}, {row['n_runs']} runs"


_MODE_STYLES = tuple(zip(("blue", "orange", "green", "red", "purple", "sky", "black", "yellow"), "os^DvPX*"))
_MEASURED = (("calibration_change", "calibration rows"), ("loss_change", "held-out rows"))


def predictions(path: Path, points: pd.DataFrame, title: str) -> None:
    """Predicted (second order) against measured ΔL of every edit of every run: a row a study, on the calibration rows
    at the left and on the held-out ones at the right. Colour and mark are the edit's mode, hollow is the signed mode
    as a control, light grey are the draws.

    Args:
        points: of `sparselora.compare.edit_tables.prediction_points`.
    """
    studies = list(points["study"].unique())
    styles = dict(zip(sorted(points["mode"].unique()), itertools.cycle(_MODE_STYLES)))
    with new_figure(1.3 + 3.6 * len(studies)) as figure:
        panels = figure.subplots(len(studies), 2, squeeze=False)
        for row, study in zip(panels, studies):
            study_points = points[points["study"] == study]
            for axes, (column, where) in zip(row, _MEASURED):
                _prediction_panel(axes, study_points, column, styles)
                axes.set_title(f"{study}\n{where}: {_within_runs(study_points, column)}", fontsize=9)
            row[0].set_ylabel("measured ΔL (nats a label)")
        for axes in panels[-1]:
            axes.set_xlabel("predicted ΔL, second order (nats a label)")
        _legend(figure, panels.ravel())
        figure.suptitle(title, fontsize=11)
        save_figure(figure, path)


def _prediction_panel(axes: Axes, points: pd.DataFrame, column: str, styles: dict[str, tuple[str, str]]) -> None:
    complete = points.dropna(subset=["predicted_second", column])
    _lines_of_reference(axes, complete[["predicted_second", column]].to_numpy(dtype=float))
    draws = complete[complete["kind"] == "draw"]
    axes.plot(draws["predicted_second"], draws[column], ls="", marker=".", ms=4, color="#C8C8C8", label="draws")
    signed = complete[complete["kind"] == "signed"]
    style: dict[str, Any] = {"ls": "", "ms": 5, "mec": COLORS["black"], "mew": 0.7}
    axes.plot(signed["predicted_second"], signed[column], marker="o", mfc="none", label="signed control", **style)
    for mode, (color, marker) in styles.items():
        edits = complete[(complete["kind"] == "edit") & (complete["mode"] == mode)]
        style = {"ls": "", "ms": 5.5, "mec": "white", "mew": 0.4, "marker": marker, "color": COLORS[color]}
        axes.plot(edits["predicted_second"], edits[column], label=mode, **style)


def _lines_of_reference(axes: Axes, values: np.ndarray) -> None:
    """The scales that the values ask for, the zero lines and the line of equals."""
    for line in (axes.axhline, axes.axvline):
        line(0, color=COLORS["grey"], lw=0.8)
    sizes = np.abs(values[values != 0])
    if not sizes.size:
        return
    largest, typical = float(sizes.max()), float(np.quantile(sizes, 0.25))
    low, high = values.min(axis=0).clip(max=0), values.max(axis=0).clip(min=0)
    if largest > _WIDE * typical:
        _symmetric_logarithmic(axes, max(typical, largest / 1e4), 1.5 * largest)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        room = 0.05 * (high - low)
        axes.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
    axes.autoscale(False)
    ends = [-2 * largest, 2 * largest]
    axes.plot(ends, ends, color=COLORS["black"], lw=1, ls="--", label="equal")


def _symmetric_logarithmic(axes: Axes, typical: float, largest: float) -> None:
    """Both axes alike, linear below the decade of ``typical``; labels at few decades, so that they do not touch."""
    first, last = int(np.floor(np.log10(typical))), int(np.floor(np.log10(largest)))
    decades = 10.0 ** np.arange(last, first - 1, -max(1, -(-(last - first) // 2)))
    ticks = [*-decades, 0.0, *decades]
    for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        axes.set(**{f"{name}scale": SymmetricalLogScale(axis, linthresh=10.0**first, linscale=0.6)})
        axis.set_major_locator(FixedLocator(ticks))
    axes.set(xlim=(-largest, largest), ylim=(-largest, largest))


_WIDE = 30
"""Values over a wider range than this, from the lower quartile to the largest, are drawn on symmetric-log axes."""


def _within_runs(points: pd.DataFrame, column: str) -> str:
    """The correlation in words: the mean of that within each run, which is what a prediction is for, and over all
    points together, which is what one sees."""
    complete = points.dropna(subset=["predicted_second", column])
    correlations = [_correlation(part, column) for _, part in complete.groupby("name")]
    within = [value for value in correlations if not np.isnan(value)]
    if not within:
        return "too few for a correlation"
    return f"r {np.mean(within):+.2f} in a run, {_correlation(complete, column):+.2f} of all"


def _correlation(points: pd.DataFrame, column: str) -> float:
    pairs = points[["predicted_second", column]].to_numpy(dtype=float).T
    if pairs.shape[1] < 3 or (np.ptp(pairs, axis=1) == 0).any():
        return float("nan")
    return float(np.corrcoef(pairs)[0, 1])


# --- a finished adapter at lower ranks ------------------------------------------------------------------------------

_METHOD_STYLES = {"svd": (COLORS["blue"], "o"), "activations": (COLORS["orange"], "s"), "random": (COLORS["grey"], "x")}
_METHOD_NAMES = {"svd": "SVD", "activations": "weighted by activations", "random": "random subspace (control)"}
_NEAR = 4.0
"""The right panel reaches this many margins above the whole adapter."""


def losses_by_rank(path: Path, table: pd.DataFrame, title: str, margin: float) -> None:
    """Losses of an adapter at lower ranks: all of them, and those near the whole adapter's as differences with their
    95 % intervals over rows and the margin; data in the table of the same name.

    Args:
        table: of `sparselora.spectral.rank_curve.judge`, the whole adapter first and no LoRA second.
        margin: share of the whole adapter's loss.
    """
    whole, nothing, cells = table.iloc[0], table.iloc[1], table.iloc[2:]
    with new_figure(4.4) as figure:
        everything, near = figure.subplots(1, 2)
        everything.axhline(whole["loss"], color=COLORS["black"], lw=1.1, label=f"whole adapter, rank {whole['rank']}")
        everything.axhline(nothing["loss"], color=COLORS["red"], lw=1.1, ls=":", label="no LoRA")
        near.axhspan(-whole["margin"], whole["margin"], color=COLORS["green"], alpha=0.15, lw=0,
                     label=f"margin, ±{100 * margin:g} % of the whole adapter's loss")  # fmt: skip
        near.axhline(0, color=COLORS["black"], lw=1.1)
        groups = list(cells.groupby(["method", "budget"], sort=False))
        for i, ((method, budget), part) in enumerate(groups):
            color, marker = _METHOD_STYLES[method]
            is_uniform = budget == "uniform"
            label = f"{_METHOD_NAMES[method]}, {budget}"
            shape = {"color": color, "marker": marker, "ls": "-" if is_uniform else "--", "ms": 5.5,
                     "mfc": color if is_uniform else "white"}  # fmt: skip
            everything.plot(part["mean_rank"], part["loss"], label=label, **shape)
            # Side by side, so that intervals at one rank do not cover one another.
            shifted = part["mean_rank"] * 2 ** (0.09 * (i - (len(groups) - 1) / 2))
            half = part["ci_high"] - part["difference"]
            near.errorbar(shifted, part["difference"], yerr=half, capsize=2.5, elinewidth=1.1, **shape)
        top = _NEAR * whole["margin"]
        for axes in (everything, near):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("mean rank (equal parameters)")
            axes.xaxis.set_major_formatter("{x:g}")
        everything.set_ylabel("held-out loss, nats a label")
        everything.set_title("all")
        near.set_ylabel("difference, nats a label")
        near.set_title("near the whole adapter")
        near.set_ylim(-top, top)
        figure.suptitle(f"{literal(title)}, n = {whole['n']} held-out rows (95 % intervals)", fontsize=12)
        handles, labels = everything.get_legend_handles_labels()
        more_handles, more_labels = near.get_legend_handles_labels()
        figure.legend(handles + more_handles, labels + more_labels, loc="outside lower center", ncols=2)
        save_figure(figure, path)
