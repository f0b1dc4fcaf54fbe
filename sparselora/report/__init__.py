"""Figures and Markdown tables: the style, and one module of figures per capability.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "markdown_table": "report.markdown",
        "new_figure": "report.style",
        "save_figure": "report.style",
    },
)
