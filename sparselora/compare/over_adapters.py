"""A mean over adapters: runs of one adapter are averaged first, so that each adapter counts once."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sparselora.numerics.stats import compare_paired

ENDPOINTS = ("loss_change", "null_gap")
"""The changes that are tested: against the unedited adapter and against the mean of its null's draws."""


def over_adapters(runs: pd.DataFrame, name: str) -> dict[str, float]:
    """Mean over adapters of a column, as the columns ``name``, ``name_n``, ``name_low``, ``name_high``, ``name_p``.

    Args:
        runs: a row a run: ``adapter`` and the column. Runs are averaged within their adapter, then adapters have equal
            weight. A run without the value (NaN) is not in its adapter's mean; an adapter without it does not count.
    Returns:
        The number of adapters that count; Student's-t 95 % interval and p of no change over these, NaN for a single
        adapter and where all have the same value other than 0; all but the number NaN for none.
    """
    means = runs.groupby("adapter")[name].mean().dropna().to_numpy(dtype=float)
    if not means.size:
        return {f"{name}_n": 0} | dict.fromkeys((name, f"{name}_low", f"{name}_high", f"{name}_p"), float("nan"))
    found = compare_paired(means, np.zeros_like(means))
    # The plain mean: the paired test rounds differences at the twelfth digit.
    row: dict[str, float] = {name: float(means.mean()), f"{name}_n": len(means)}
    return row | {f"{name}_low": found.ci_low, f"{name}_high": found.ci_high, f"{name}_p": found.t_p}
