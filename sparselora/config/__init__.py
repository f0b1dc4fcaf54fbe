"""Settings of a run: strict models, YAML, and the flags made from them.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

LARGEST_SEED = 2**32 - 1
"""Largest seed that random, numpy and torch all take."""

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "GateConfig": "config.novelty",
        "SparsityConfig": "config.sparsity",
        "TokenGateConfig": "config.token_gates",
        "TrainConfig": "config.train",
        "get_layer_sparsity_ratio": "config.sparsity",
    },
)
