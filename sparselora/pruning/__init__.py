"""Phase C: one run that prunes rank channels, and its output files.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Cell": "pruning.cell",
        "Study": "pruning.study",
        "run_cell": "pruning.run",
    },
)
