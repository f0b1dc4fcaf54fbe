"""Tables and numbers as a Markdown report has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEGEND = "p (Holm): adjusted over the rows of the table. Intervals in brackets: 95 %, not adjusted."
"""One line below every table of differences, where it is printed without the page that explains its columns."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose source lines up too: it is read in the terminal as well.

    Columns that are empty in all rows are left out.
    """
    filled = [i for i in range(len(header)) if not rows or any(row[i] for row in rows)]
    texts = [[line[i] for i in filled] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts)]
    lines = [texts[0], ["-" * width for width in widths], *texts[1:]]
    return "\n".join(
        "| " + " | ".join(f"{text:<{width}}" for text, width in zip(line, widths)) + " |" for line in lines
    )


def number(value: float, form: str) -> str:
    """Return ``value`` in the given form, without the sign of a rounded-off negative; empty for NaN."""
    return "" if math.isnan(value) else format(0.0 if abs(value) < 1e-12 else value, form)


def with_interval(value: float, low: float, high: float, form: str = "+.4f") -> str:
    """Return ``value [low, high]``; without the brackets where there is no interval (NaN)."""
    interval = "" if math.isnan(low) else f" [{number(low, form)}, {number(high, form)}]"
    return number(value, form) + interval


def p_value(value: float, *, is_floor: bool = False) -> str:
    """Return a p with three digits; ``≤`` in front where it ``is_floor``, the smallest that a resampling test gives."""
    if math.isnan(value):
        return ""
    return "<0.001" if value < 0.001 else f"{'≤' if is_floor and value < 1 else ''}{value:.3f}"


def mean_and_spread(mean: float, std: float, form: str = ".4f") -> str:
    """Return ``mean ± std``; without the latter where it is not known (NaN)."""
    return format(mean, form) + ("" if math.isnan(std) else f" ± {std:{form}}")
