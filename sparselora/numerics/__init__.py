"""Scores, reconstruction errors, spectra and statistics on plain arrays: numpy and scipy only.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "column_energy": "numerics.channels",
        "compare_paired": "numerics.stats",
        "energy_rank": "numerics.reconstruction",
        "factored_svd": "numerics.reconstruction",
        "gap_rank": "numerics.reconstruction",
        "holm": "numerics.stats",
        "keep_count": "numerics.channels",
        "leverage_scores": "numerics.channels",
        "marchenko_pastur": "numerics.spectra",
        "mean_interval": "numerics.stats",
        "optimal_rank": "numerics.reconstruction",
        "paired_bootstrap": "numerics.stats",
        "power_law": "numerics.spectra",
        "randomized_spectrum": "numerics.spectra",
        "relative_tail": "numerics.reconstruction",
        "spectrum": "numerics.spectra",
        "stable_rank": "numerics.spectra",
        "top_channels": "numerics.channels",
    },
)
