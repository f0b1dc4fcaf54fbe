"""Tables of Phase A over trials: means, paired tests, the error of every rank, and the least rank of a target error."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.inspection.matrix_errors import SCORES, TrialSettings
from sparselora.numerics import reconstruction as rec
from sparselora.numerics.stats import compare_paired, holm, mean_interval

Array = NDArray[np.floating]

CONTROL = ("control_col_err", "control_random_err")
"""The positive control: the error that is compared, and that it is compared with."""


def metrics(table: pd.DataFrame) -> list[str]:
    """Return the columns of the per-trial table that are averaged over trials."""
    return [name for name in table.columns if name.endswith("_err") or name == "topk_energy"]


def expected_errors(settings: TrialSettings, k: int) -> dict[str, float]:
    """Return the exact √(E err²) over the random choices at rank k, for any matrix of the family, by error."""
    n, m = settings.n, settings.m
    room = rec.equal_storage_columns(n, m, k)
    expected = {
        "random_AB_err": np.sqrt(2),  # E⟨W, AB⟩ = 0: its sign is a coin's
        "rand_svd_subspace_err": np.sqrt(1 - k / min(n, m)),
        "random_colprune_err": np.sqrt(1 - k / m),
        "random_AB_scaled_err": np.sqrt(1 - 1 / (n * m)),  # AB points in every direction alike, whatever k
        "random_colprune_eqb_err": np.sqrt(1 - room / m),
    }
    if settings.family == "gaussian":
        # k independent columns span a uniform subspace, which leaves (n − k)/n of every other column.
        expected["random_colprune_proj_err"] = np.sqrt((1 - k / m) * (1 - k / n))
    return expected


def summarise(settings: TrialSettings, table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per rank: mean and std of each metric, then n, 95 % intervals, nulls and budgets.

    Where E err² is known exactly, ``_rms_expected`` is its root and ``_rms`` what was measured.
    """
    limit = rec.gaussian_tail(settings.n, settings.m)
    rows = []
    for rank in settings.ranks:
        part = table[table["rank_used"] == rank]
        intervals = {name: mean_interval(part[name]) for name in metrics(table)}
        row: dict[str, object] = {"rank_used": rank}
        for name, value in intervals.items():
            row |= {f"{name}_mean": value.mean, f"{name}_std": value.std}
        row["n"] = len(part)
        for name, value in intervals.items():
            row |= {f"{name}_ci_low": value.low, f"{name}_ci_high": value.high}
        for name, expected in expected_errors(settings, rank).items():
            row |= {f"{name}_rms": np.sqrt((part[name] ** 2).mean()), f"{name}_rms_expected": expected}
        row["svd_topk_err_gaussian_limit"] = limit[rank]
        budget = ("params_svd_topk", "params_random_AB", "nnz_svd_col", "cols_equal_budget", "nnz_equal_budget")
        row |= {name: part[name].iloc[0] for name in (*budget, "full_rank")}
        rows.append(row)
    return pd.DataFrame(rows)


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """Return paired tests on the same trials: SVD against each baseline, each column score against random columns.

    The last pair is the positive control. Holm's correction runs over all tests of the table. Full-rank rows have
    error 0 and nothing to test.
    """
    baselines = [name for name in metrics(table) if name not in ("svd_topk_err", "topk_energy")]
    baselines = [name for name in baselines if not name.endswith("_spectral_err") and not name.startswith("control")]
    pairs = [("svd_topk_err", name) for name in baselines]
    pairs += [
        (f"{score}{kind}", f"random_colprune{kind}")
        for kind in ("_err", "_proj_err", "_eqb_err")
        for score in SCORES[:-1]
    ]
    pairs.append(CONTROL)
    rows = []
    for rank, part in table[~table["full_rank"]].groupby("rank_used", sort=False):
        for metric, baseline in pairs:
            result = compare_paired(part[metric], part[baseline])
            rows.append({"rank_used": rank, "metric": metric, "baseline": baseline, **asdict(result)})
    if not rows:
        return pd.DataFrame(columns=["rank_used", "metric", "baseline"])
    frame = pd.DataFrame(rows)
    for test in ("t_p", "wilcoxon_p"):
        frame.insert(frame.columns.get_loc(test) + 1, f"{test}_holm", holm(frame[test].tolist()))
    return frame


def error_curve(settings: TrialSettings, tails: Array) -> pd.DataFrame:
    """Return the mean best error of every rank 0..r over the trials, and the Gaussian limit of the same shape.

    Args:
        tails: best rank-k errors ``(trials, r + 1)``.
    """
    spread = tails.std(axis=0, ddof=1) if len(tails) > 1 else np.full(tails.shape[1], np.nan)
    limit = rec.gaussian_tail(settings.n, settings.m)
    return pd.DataFrame({
        "rank": np.arange(tails.shape[1]), "n": len(tails), "svd_topk_err_mean": tails.mean(axis=0),
        "svd_topk_err_std": spread, "gaussian_limit": limit,
    })  # fmt: skip


def optimal_ranks(settings: TrialSettings, tails: Array) -> pd.DataFrame:
    """Return the least rank below each target error, over the trials, and what its factors store against W.

    Args:
        tails: best rank-k errors ``(trials, r + 1)``.
    """
    rows = []
    for target in settings.target_errors:
        ranks = np.argmax(tails < target, axis=1)
        median = int(np.median(ranks))
        params = rec.factor_params(settings.n, settings.m, median)
        rows.append({
            "target_error": target, "n": len(ranks), "rank_min": ranks.min(), "rank_median": median,
            "rank_max": ranks.max(), "params_factors": params, "params_full": settings.n * settings.m,
            "stored_ratio": params / (settings.n * settings.m), "factors_save": params < settings.n * settings.m,
        })  # fmt: skip
    return pd.DataFrame(rows)
