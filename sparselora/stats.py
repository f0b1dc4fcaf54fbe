"""Statistics of a comparison: intervals, paired tests, effect sizes, correction for many tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sparselora.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A mean with its sample standard deviation (ddof 1) and Student's-t confidence interval; NaN where n < 2."""

    n: int
    mean: float
    std: float
    low: float
    high: float


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean, std and confidence interval of ``values (n,)``, n ≥ 1."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise InputError("cannot take the mean of no values")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(1, mean, float("nan"), float("nan"), float("nan"))
    std = float(x.std(ddof=1))
    half = float(stats.t.ppf(0.5 + confidence / 2, x.size - 1)) * std / np.sqrt(x.size)
    return Interval(int(x.size), mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class PairedComparison:
    """Differences first − second on the same items, tested and sized.

    ``cohens_dz`` is the mean difference over the standard deviation of the differences, ``rank_biserial`` the matched
    rank-biserial correlation of the signed ranks, in [−1, 1]. Where every difference is equal there is no spread to
    test against: p is 1 if they are all zero, 0 if not, and dz is 0 or ±inf. With n < 2 all of these are NaN.
    """

    n: int
    mean_difference: float
    ci_low: float
    ci_high: float
    t_p: float
    wilcoxon_p: float
    cohens_dz: float
    rank_biserial: float


def compare_paired(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> PairedComparison:
    """Paired t test and Wilcoxon signed-rank test of ``first (n,)`` against ``second (n,)``, item by item."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"paired values must have one shape (n,), got {a.shape} and {b.shape}")
    d = a - b
    gap = mean_interval(d, confidence)
    nan = float("nan")
    if d.size < 2:
        return PairedComparison(gap.n, gap.mean, nan, nan, nan, nan, nan, nan)
    if np.ptp(d) == 0:
        sign = float(np.sign(d[0]))
        p = 1.0 if sign == 0 else 0.0
        wilcoxon_p = 1.0 if sign == 0 else float(stats.wilcoxon(d).pvalue)
        dz = 0.0 if sign == 0 else sign * float("inf")
        return PairedComparison(gap.n, gap.mean, gap.low, gap.high, p, wilcoxon_p, dz, sign)
    return PairedComparison(
        n=gap.n,
        mean_difference=gap.mean,
        ci_low=gap.low,
        ci_high=gap.high,
        t_p=float(stats.ttest_rel(a, b).pvalue),
        wilcoxon_p=float(stats.wilcoxon(d).pvalue),
        cohens_dz=gap.mean / gap.std,
        rank_biserial=_rank_biserial(d),
    )


def _rank_biserial(differences: NDArray[np.float64]) -> float:
    """(R₊ − R₋) / (R₊ + R₋) over the ranks of the non-zero |differences|."""
    d = differences[differences != 0]
    if d.size == 0:
        return 0.0
    ranks = stats.rankdata(np.abs(d))
    return float((ranks[d > 0].sum() - ranks[d < 0].sum()) / ranks.sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the given order; NaN stays NaN and does not count as a test."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else []
    return [float(value) for value in adjusted]


def mcnemar(first_correct: ArrayLike, second_correct: ArrayLike) -> tuple[int, int, float]:
    """Exact McNemar test of two classifiers on the same items.

    Args:
        first_correct, second_correct: booleans ``(n,)``, whether each got the item right.
    Returns:
        Items only the first got right, items only the second got right, two-sided binomial p.
    """
    a, b = np.asarray(first_correct, dtype=bool), np.asarray(second_correct, dtype=bool)
    if a.shape != b.shape:
        raise InputError(f"paired answers must have one shape, got {a.shape} and {b.shape}")
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_first + only_second
    p = 1.0 if discordant == 0 else float(stats.binomtest(only_first, discordant).pvalue)
    return only_first, only_second, p


def smallest_detectable_difference(std_of_differences: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Mean difference that a paired t test of n items would find with the given power (two-sided); NaN for n < 2."""
    if n < 2:
        return float("nan")
    freedom = n - 1
    quantiles = stats.t.ppf(1 - alpha / 2, freedom) + stats.t.ppf(power, freedom)
    return float(quantiles * std_of_differences / np.sqrt(n))
