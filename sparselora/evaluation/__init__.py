"""Held-out losses, accuracy, generation and GSM8K exact match.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "exact_match": "evaluation.losses",
        "held_out_losses": "evaluation.losses",
        "with_adapter": "evaluation.losses",
    },
)
