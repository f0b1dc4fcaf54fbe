"""Tables and numbers as a Markdown report has them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source lines up too: it is read in the terminal as well."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(f"{text:<{width}}" for text, width in zip(line, widths)) + " |" for line in lines
    )


def number(value: float, form: str) -> str:
    """``value`` in the given form, without the sign of a rounded-off negative; empty for NaN."""
    return "" if math.isnan(value) else format(0.0 if abs(value) < 1e-12 else value, form)


def with_interval(value: float, low: float, high: float, form: str = "+.4f") -> str:
    """``value [low, high]``; without the brackets where there is no interval (NaN)."""
    interval = "" if math.isnan(low) else f" [{number(low, form)}, {number(high, form)}]"
    return number(value, form) + interval


def p_value(value: float) -> str:
    return "" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"


def mean_and_spread(mean: float, std: float, form: str = ".4f") -> str:
    """Return ``mean ± std``; without the latter where it is not known (NaN)."""
    return format(mean, form) + ("" if math.isnan(std) else f" ± {std:{form}}")
