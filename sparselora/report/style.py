"""One function per figure, headless. Each module holds the figures of one command; this one holds what they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sparselora.runs.files import replacing, write_csv

COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
    "grey": "#7F7F7F",
}
"""The Okabe–Ito palette, distinguishable for colour-blind readers; grey is for references and nulls."""

STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}


WIDTH = 8.0
"""Inches of every figure, which is the width at which README and docs show it: so its fonts are read at their size."""

_LEGEND_WIDTH = 105
"""Characters of a legend that fit into `WIDTH`, with 8 for each entry's line."""


@contextmanager
def new_figure(height: float) -> Iterator[Figure]:
    """A figure of `WIDTH` × ``height`` inches in the project's style. No pyplot: no global state, no display."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(figure)
        yield figure


def legend_columns(labels: Sequence[str], most: int = 4) -> int:
    """Return how many columns, at most ``most``, a legend of ``labels`` below the panels may have."""
    longest = max(map(len, labels), default=0)
    return max(1, min(most, _LEGEND_WIDTH // (longest + 8), len(labels)))


def literal(text: str) -> str:
    """Return a text out of a file as matplotlib draws it as it is: a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: Path, data: pd.DataFrame | None = None) -> None:
    """Write ``figure`` as PNG at ``path`` and the ``data`` behind it as a CSV of the same name next to it."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()  # once, where savefig draws twice: the first time only to find out about sizes
    write_canvas(canvas, path)
    if data is not None:
        write_csv(path.with_suffix(".csv"), data)


def write_canvas(canvas: FigureCanvasAgg, path: Path) -> None:
    """Write what has been drawn as PNG, without a date or version: the same figure is the same bytes on another day."""
    # A palette makes the file a third as large, and faster to write than the full colours.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).quantize(method=Image.Quantize.FASTOCTREE)
    with replacing(path) as part:
        picture.save(part, format="png", dpi=(canvas.figure.dpi, canvas.figure.dpi))
