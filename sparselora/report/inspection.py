"""Figures of `inspect_svd_predictors.py`: all layers at a glance, one layer's spectrum, one layer's predictors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator
from numpy.typing import NDArray

from sparselora.report.style import COLORS, STYLE, literal, new_figure, save_figure, write_canvas

Array = NDArray[np.floating]

_FAMILY_COLORS = {
    "attention": COLORS["blue"],
    "feed-forward": COLORS["red"],
    "embedding": COLORS["green"],
    "other": COLORS["purple"],
}

PREDICTOR_LABELS = {
    "svd_topk_err": "rank k: SVD",
    "rand_svd_subspace_err": "rank k: random triplets",
    "random_AB_scaled_err": "rank k: random A·B, best scale",
    "random_AB_err": "rank k: random A·B, norm of W",
    "leverage_col_err": "columns: magnitude (= all-energy)",
    "topk_energy_col_err": "columns: top-k energy",
    "leverage_score_col_err": "columns: leverage score",
    "random_colprune_err": "columns: random",
    "mag_row_err": "rows: magnitude",
    "random_rowprune_err": "rows: random",
}
_RANDOM = frozenset({"rand_svd_subspace_err", "random_AB_scaled_err", "random_AB_err"}) | {
    "random_colprune_err",
    "random_rowprune_err",
}


def overview(
    path: Path, table: pd.DataFrame, curves: pd.DataFrame, intervals: Mapping[str, tuple[float, float]], title: str
) -> None:
    """All layers: normalised spectra, energy curves with the Gaussian null of each shape, and error by predictor.

    Args:
        table: the measured layers that are not full rank, one row each, with a ``family``.
        curves: param, family, fraction, s_over_s1, energy, energy_gaussian; written next to the figure.
        intervals: predictor column → (mean, half width of its 95 % interval over layers).
    """
    with _placed_figure(7.8) as figure:
        spectra, energy = figure.add_axes((0.095, 0.575, 0.39, 0.34)), figure.add_axes((0.585, 0.575, 0.39, 0.34))
        _draw_curves(spectra, energy, curves)
        _draw_predictors(figure.add_axes((0.335, 0.075, 0.59, 0.4)), table, intervals)
        figure.suptitle(literal(title), fontsize=12, y=0.985)
        save_figure(figure, path, curves)


def _draw_curves(spectra: Axes, energy: Axes, curves: pd.DataFrame) -> None:
    layers = [layer for _, layer in curves.groupby("param", sort=False)]
    colors = [_FAMILY_COLORS[layer["family"].iloc[0]] for layer in layers]
    for axes, name in ((spectra, "s_over_s1"), (energy, "energy")):
        axes.add_collection(LineCollection(_paths(layers, name), colors=colors, linewidths=0.9, alpha=0.55))
    # One null a shape; shapes of one aspect ratio lie on each other.
    nulls = [part for _, part in curves.drop_duplicates(["fraction", "energy_gaussian"]).groupby("param", sort=False)]
    black = COLORS["black"]
    energy.add_collection(LineCollection(_paths(nulls, "energy_gaussian"), colors=black, linewidths=1.3, ls="--"))
    for axes in (spectra, energy):
        axes.set_xlim(-0.03, 1.03)
    energy.set_ylim(-0.03, 1.03)
    spectra.set(yscale="log", xlabel="index i / min(n, m)", ylabel="singular value s_i / s_1", title="spectra")
    energy.set(xlabel="rank k / min(n, m)", ylabel="energy in the top k (share)", title="energy")
    smallest = float(curves["s_over_s1"].min())
    spectra.set_ylim(max(smallest, 1e-4) / 1.3, 1.2)
    present = [family for family in _FAMILY_COLORS if (curves["family"] == family).any()]
    handles = [Line2D([], [], color=_FAMILY_COLORS[family], label=family) for family in present]
    handles.append(Line2D([], [], color=COLORS["black"], ls="--", label="Gaussian of the same shape"))
    spectra.legend(handles=handles, loc="lower left")


def _paths(layers: Sequence[pd.DataFrame], name: str) -> list[Array]:
    return [layer[["fraction", name]].to_numpy(dtype=np.float64) for layer in layers]


def _draw_predictors(axes: Axes, table: pd.DataFrame, intervals: Mapping[str, tuple[float, float]]) -> None:
    shown = [name for name in PREDICTOR_LABELS if name in intervals][::-1]
    rng = np.random.default_rng(0)  # spreads the dots; no figure is read off their height
    values = table[shown].to_numpy(dtype=np.float64).T
    places = np.arange(len(shown))[:, None] + rng.uniform(-0.22, 0.22, values.shape)
    random = np.array([name in _RANDOM for name in shown])
    for some, color in ((random, COLORS["grey"]), (~random, COLORS["blue"])):
        axes.scatter(values[some], places[some], s=11, color=color, alpha=0.55, lw=0)
    means, halves = np.array([intervals[name] for name in shown]).T
    axes.errorbar(means, range(len(shown)), xerr=halves, fmt="D", color=COLORS["red"], ms=5, capsize=4, zorder=3)
    for place, mean in enumerate(means):
        axes.annotate(f"{mean:.3f}", (1.005, place), xycoords=("axes fraction", "data"), va="center", fontsize=9.5)
    axes.set_yticks(range(len(shown)), [PREDICTOR_LABELS[name] for name in shown], fontsize=10)
    axes.axvline(1.0, color=COLORS["black"], lw=1.2, ls=":")
    axes.annotate("zero matrix", (1.0, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9)
    axes.set_xlabel("relative error ‖W − Ŵ‖ / ‖W‖  (dots: layers; diamond, number: mean, 95 % interval)", fontsize=10)


@contextmanager
def _placed_figure(height: float) -> Iterator[Figure]:
    """A figure whose axes are placed by hand: finding a layout for these two would take as long as drawing them."""
    with new_figure(height) as figure:
        figure.set_layout_engine("none")
        yield figure


class SpectrumFigure:
    """The spectrum of one layer after another, as PNG files, on one canvas: what stays the same is drawn once.

    Use as a context manager; `draw` writes one file.
    """

    def __init__(self) -> None:
        # Placed by hand: the constrained layout of every figure would cost as much as drawing it.
        self._style = mpl.rc_context({**STYLE, "figure.constrained_layout.use": False})

    def __enter__(self) -> SpectrumFigure:
        self._style.__enter__()
        self._figure = Figure(figsize=(6.4, 4.0))
        self._canvas = FigureCanvasAgg(self._figure)
        self._axes = axes = self._figure.add_axes((0.12, 0.14, 0.85, 0.75))
        layer = axes.loglog([1], [1], color=COLORS["blue"], label="this layer")[0]
        null = axes.loglog([1], [1], color=COLORS["black"], ls="--", lw=1.3, label="Gaussian, same shape and norm")[0]
        rank = axes.axvline(1, color=COLORS["red"], lw=1.2, ls=":", label="rank k")
        edge = axes.axhline(1, color=COLORS["orange"], lw=1.2, ls="-.", label="edge of the random bulk")
        self._lines = (layer, null, rank, edge)
        axes.set(xlabel="index i", ylabel="singular value s_i")
        axes.xaxis.set_label_coords(0.5, -0.1)
        axes.yaxis.set_label_coords(-0.095, 0.5)
        axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=10))
            axis.set_major_formatter(FormatStrFormatter("%g"))
        self._rank_label = axes.legend(loc="lower left", handlelength=2.6).get_texts()[2]
        self._title = axes.set_title("", fontsize=10.5, y=1.0)
        self._moving = (axes.yaxis, *self._lines, self._title)
        for artist in self._moving:
            artist.set_animated(True)
        self._drawn_for = (0, 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._style.__exit__(kind, error, trace)

    def draw(self, path: Path, name: str, s: Array, null: Array, rank: int, edge: float | None, facts: str) -> None:
        """Write the spectrum ``s (r,)`` of layer ``name`` with that of a Gaussian matrix ``null (r,)``.

        Args:
            rank: k of the approximations; edge: upper end of the random bulk as a singular value, None if not fitted.
            facts: a line under the name.
        """
        layer_line, null_line, rank_line, edge_line = self._lines
        index = np.arange(1, len(s) + 1)
        shown = s > 1e-8 * s[0]
        layer_line.set_data(index[shown], s[shown])
        null_line.set_data(np.arange(1, len(null) + 1), null)
        rank_line.set_xdata([rank, rank])
        edge_line.set_visible(edge is not None)
        if edge is not None:
            edge_line.set_ydata([edge, edge])
        lowest = min(float(s[shown].min()), float(null.min()) if len(null) else np.inf)
        self._axes.set_ylim(max(lowest, 1e-3 * float(s[0])) / 1.25, float(max(s[0], null.max(initial=0))) * 1.25)
        self._title.set_text(literal(f"{name}\n{facts}"))
        self._restore_background(len(s), rank)
        for artist in self._moving:
            self._axes.draw_artist(artist)
        write_canvas(self._canvas, path)

    def _restore_background(self, length: int, rank: int) -> None:
        """Frame, index axis and legend, drawn again only if the number of singular values or the rank is another."""
        if (length, rank) != self._drawn_for:
            self._axes.set_xlim(0.9, length * 1.1)
            self._rank_label.set_text(f"rank k = {rank}")
            self._canvas.draw()
            self._background = self._canvas.copy_from_bbox(self._figure.bbox)
            self._drawn_for = (length, rank)
        self._canvas.restore_region(self._background)


def experiment(path: Path, data: pd.DataFrame, name: str, facts: Sequence[str]) -> None:
    """One layer in four panels, from ``data`` (panel, series, x, mean, std, n), which is written next to it.

    Panels: ``spectrum`` and ``rank`` (error against rank), ``columns`` (error against the share of columns kept), and
    ``predictors`` (all of them at the run's rank and keep ratio; bars are one standard deviation over the draws).
    """
    with _placed_figure(7.4) as figure:
        spectrum, rank = figure.add_axes((0.095, 0.545, 0.385, 0.335)), figure.add_axes((0.595, 0.545, 0.385, 0.335))
        columns, bars = figure.add_axes((0.095, 0.095, 0.32, 0.325)), figure.add_axes((0.715, 0.095, 0.265, 0.325))
        _draw_series(spectrum, data, "spectrum", ("this layer", "Gaussian, same norm"))
        spectrum.set(xscale="log", yscale="log", xlabel="index i", ylabel="singular value s_i", title="spectrum")
        _draw_series(rank, data, "rank", ("SVD", "random triplets", "Gaussian, SVD"))
        rank.set(xlabel="rank k", ylabel="relative error", title="error against rank", ylim=(0, 1.05))
        _draw_series(columns, data, "columns", ("magnitude", "top-k energy", "leverage score", "random"))
        columns.set(
            xlabel="columns kept (share)", ylabel="relative error", title="error against columns kept", ylim=(0, 1.05)
        )
        _draw_bars(bars, data[data["panel"] == "predictors"])
        figure.suptitle(literal("\n".join([name, *facts])), fontsize=11, y=0.985)
        save_figure(figure, path, data)


_SERIES_STYLE = {
    "this layer": (COLORS["blue"], "-"),
    "SVD": (COLORS["blue"], "-"),
    "magnitude": (COLORS["orange"], "-"),
    "top-k energy": (COLORS["blue"], "--"),
    "leverage score": (COLORS["green"], "-."),
    "random": (COLORS["grey"], "-"),
    "random triplets": (COLORS["grey"], "-"),
    "Gaussian, same norm": (COLORS["black"], "--"),
    "Gaussian, SVD": (COLORS["black"], "--"),
}


def _draw_series(axes: Axes, data: pd.DataFrame, panel: str, order: Sequence[str]) -> None:
    for series in order:
        points = data[(data["panel"] == panel) & (data["series"] == series)]
        color, line = _SERIES_STYLE[series]
        x, mean = points["x"].to_numpy(dtype=np.float64), points["mean"].to_numpy(dtype=np.float64)
        axes.plot(x, mean, color=color, ls=line, label=series)
        std = points["std"].to_numpy(dtype=np.float64)
        if np.isfinite(std).any():
            axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.3, lw=0)
    axes.legend(loc="lower left")


def _draw_bars(axes: Axes, bars: pd.DataFrame) -> None:
    names = [name for name in PREDICTOR_LABELS if name in set(bars["series"])][::-1]
    by_name = bars.set_index("series")
    for place, name in enumerate(names):
        std = float(by_name.loc[name, "std"])
        mean = float(by_name.loc[name, "mean"])
        color = COLORS["grey"] if name in _RANDOM else COLORS["blue"]
        axes.barh(place, mean, color=color, height=0.65, alpha=0.85)
        if np.isfinite(std):
            axes.errorbar(mean, place, xerr=std, color=COLORS["black"], capsize=3, lw=1.2)
        axes.annotate(f"{mean:.3f}", (0.02, place), va="center", fontsize=8.5, color="white", weight="bold")
    axes.set_yticks(range(len(names)), [PREDICTOR_LABELS[name] for name in names], fontsize=8.5)
    axes.axvline(1.0, color=COLORS["black"], lw=1.2, ls=":")
    draws = int(bars["n"].max())
    axes.set_xlabel(f"relative error (± 1 SD, {draws} draws)\ndotted: the zero matrix", fontsize=9.5)
    axes.set_title("predictors")
    axes.grid(axis="y", visible=False)
