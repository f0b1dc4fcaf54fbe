"""Statistics of a comparison: intervals, paired tests, effect sizes, correction for many tests.

Written here and not taken from scipy.stats, which doubles the time of an import (2.6 s against 1.3 s), and whose exact
Wilcoxon test is not exact with ties: it gives 0.625 where the answer is 0.5 (n = 5).
Otherwise tests hold ours to scipy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

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
    half = float(special.stdtrit(x.size - 1, 0.5 + confidence / 2)) * std / math.sqrt(x.size)
    return Interval(int(x.size), mean, std, mean - half, mean + half)


def column_intervals(table: NDArray[np.float64]) -> tuple[NDArray[Any], ...]:
    """n, mean, median, std (ddof 1), and Student's-t 95 % interval of each column of ``table (rows, columns)``.

    NaN is left out: n, an integer, counts the others. The rest is NaN where n is 0, std and interval where n < 2.
    """
    ordered = np.sort(table, axis=0)  # NaN last
    n = len(table) - np.isnan(ordered).sum(axis=0)
    middle = np.take_along_axis(ordered, np.stack([(n - 1) // 2, n // 2]).clip(0, len(table) - 1), axis=0)
    some = np.where(n > 0, n, np.nan)
    mean = np.nansum(ordered, axis=0) / some
    degrees = np.where(n > 1, n - 1.0, np.nan)
    std = np.sqrt(np.nansum((ordered - mean) ** 2, axis=0) / degrees)
    half = special.stdtrit(degrees, 0.975) * std / np.sqrt(some)
    return n, mean, middle.mean(axis=0), std, mean - half, mean + half


@dataclass(frozen=True)
class PairedComparison:
    """Differences first − second on the same items, tested and sized.

    ``cohens_dz`` is the mean difference over the standard deviation of the differences, ``rank_biserial`` the matched
    rank-biserial correlation of the signed ranks, in [−1, 1]. With n < 2 all of these are NaN.

    Where every difference is equal there is no spread for a t test. If all are zero, ``t_p`` is 1, the interval is
    [0, 0] and dz 0. If not, ``t_p`` and the interval are NaN and dz ±inf: three seeds whose accuracies on 200
    sentences differ by the same count each are a coincidence of rounding, not certainty. (The signed-rank test still
    counts signs.)

    ``wilcoxon_p`` is NaN below `LEAST_WILCOXON_PAIRS` pairs: the p of n pairs is never below 2^(1−n).
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
    d = _without_rounding_noise(a, b)
    gap = mean_interval(d, confidence)
    nan = float("nan")
    if d.size < 2:
        return PairedComparison(gap.n, gap.mean, nan, nan, nan, nan, nan, nan)
    if np.ptp(d) == 0:
        if d[0] == 0:
            return PairedComparison(gap.n, 0.0, 0.0, 0.0, 1.0, _wilcoxon_p(d), 0.0, 0.0)
        sign = float(np.sign(d[0]))
        return PairedComparison(gap.n, gap.mean, nan, nan, nan, _wilcoxon_p(d), sign * float("inf"), sign)
    return PairedComparison(
        n=gap.n,
        mean_difference=gap.mean,
        ci_low=gap.low,
        ci_high=gap.high,
        t_p=float(2 * special.stdtr(d.size - 1, -abs(gap.mean) / gap.std * math.sqrt(d.size))),
        wilcoxon_p=_wilcoxon_p(d),
        cohens_dz=gap.mean / gap.std,
        rank_biserial=_rank_biserial(d),
    )


def _without_rounding_noise(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """``a − b`` rounded at 1e-12 of the values' scale.

    0.81 − 0.80 and 0.80 − 0.79 differ in their last bits. Left alone, that would break ties between ranks and turn
    "every difference is equal" into a spread of 1e-17.
    """
    scale = max(np.abs(a).max(initial=0.0), np.abs(b).max(initial=0.0))
    if not 0 < scale < np.inf:
        return a - b
    return np.asarray(np.round((a - b) / scale, 12) * scale)


def _rank_biserial(differences: NDArray[np.float64]) -> float:
    """(R₊ − R₋) / (R₊ + R₋) over the ranks of the non-zero |differences|."""
    d = differences[differences != 0]
    if d.size == 0:
        return 0.0
    ranks, _ = _midranks(np.abs(d))
    return float((ranks[d > 0].sum() - ranks[d < 0].sum()) / ranks.sum())


def _midranks(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Ranks from 1, equal values sharing the mean of theirs, and the size of each group of equals."""
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size - 1) / 2)[group], size


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation of ``first (n,)`` and ``second (n,)``; NaN for n < 2 or where one has one value."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"paired values must have one shape (n,), got {a.shape} and {b.shape}")
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(_midranks(a)[0], _midranks(b)[0])[0, 1])


def auc(first: ArrayLike, second: ArrayLike) -> float:
    """Probability that a value of ``first (n,)`` exceeds one of ``second (m,)``, ties counted half; NaN where n or m
    is 0."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if not a.size or not b.size:
        return float("nan")
    ranks = _midranks(np.concatenate([a, b]))[0]
    return float((ranks[: a.size].sum() - a.size * (a.size + 1) / 2) / (a.size * b.size))


LEAST_WILCOXON_PAIRS = 6
"""Pairs below which no signed-rank test can have p < 0.05: five give at least 2⁻⁴ = 0.0625."""
_EXACT_UP_TO = 50


def _wilcoxon_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the signed-rank test, zeros dropped; 1 if nothing is left, NaN of too few pairs.

    Exact over all sign flips for up to 50 differences, ties included; beyond, the normal limit with tied variance.
    """
    if differences.size < LEAST_WILCOXON_PAIRS:
        return float("nan")
    d = differences[differences != 0]
    n = d.size
    if n == 0:
        return 1.0
    ranks, tied = _midranks(np.abs(d))
    plus, total = float(ranks[d > 0].sum()), n * (n + 1) / 2
    low = min(plus, total - plus)
    if n > _EXACT_UP_TO:
        variance = n * (n + 1) * (2 * n + 1) / 24 - float((tied.astype(np.float64) ** 3 - tied).sum()) / 48
        return float(min(1.0, 2 * special.ndtr((low - total / 2) / math.sqrt(variance))))
    # Law of the sum of the positive ranks, in half ranks so that shared ones are whole numbers too.
    law = np.ones(1)
    for step in np.round(2 * ranks).astype(int):
        wider = np.zeros(len(law) + step)
        wider[: len(law)] += law / 2
        wider[step:] += law / 2
        law = wider
    return float(min(1.0, 2 * law[: round(2 * low) + 1].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the given order; NaN stays NaN and does not count as a test."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else []
    return [float(value) for value in adjusted]


def step_down(p_values: Sequence[Sequence[float]], family: int | None = None) -> list[list[float]]:
    """Adjusted p-values of contrasts with one or two hypotheses each, of which at most one can be true.

    "There is no difference" and "the difference is at least the margin" exclude one another, so k contrasts hold at
    most k true hypotheses. Every p is multiplied by the number of contrasts that can still hold a true one: those of
    which not all hypotheses have been rejected before (Shaffer 1986). With one hypothesis each this is Holm's
    procedure, and the probability of any false rejection is held in the same way.

    Args:
        p_values: by contrast, the p of its hypotheses. One with NaN, which could not be tested, still counts: which
            contrasts a family has was decided before there were data.
        family: number of contrasts, at least that of ``p_values``, where some are tested elsewhere; else their number.
    Returns:
        The adjusted p-values in the same places, NaN where it was NaN.
    """
    open_contrasts = len(p_values) if family is None else family
    if open_contrasts < len(p_values):
        raise InputError(f"a family of {open_contrasts} cannot hold {len(p_values)} contrasts")
    adjusted = [[float("nan")] * len(contrast) for contrast in p_values]
    left = [len(contrast) for contrast in p_values]
    tested = [(p, i, j) for i, contrast in enumerate(p_values) for j, p in enumerate(contrast) if not math.isnan(p)]
    reached = 0.0
    for p, i, j in sorted(tested):
        reached = adjusted[i][j] = max(reached, min(1.0, p * open_contrasts))
        left[i] -= 1
        open_contrasts -= left[i] == 0
    return adjusted


def equivalence_p(first: ArrayLike, second: ArrayLike, margin: float, *, is_relative: bool = False) -> float:
    """P of "the means differ by the margin or more": two one-sided paired t-tests (Schuirmann 1987).

    A small p says that the mean of ``first (n,)`` lies within the margin of that of ``second (n,)``. At p < 0.05 the
    90 % interval of the difference lies inside the margin.

    Args:
        margin: positive; in the unit of the values, or, if ``is_relative``, a fraction below 1 of the mean of
            ``second``, which counts as the estimate that it is: tested is first − (1 ± margin)·second.
    Returns:
        The larger p of the two tests; NaN for n < 2, and where every difference is equal (see `PairedComparison`).
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"paired values must have one shape (n,), got {a.shape} and {b.shape}")
    if not 0 < margin < (1 if is_relative else math.inf):
        raise InputError(f"a margin must be positive{' and below 1' if is_relative else ''}, got {margin}")
    if a.size < 2 or np.ptp(_without_rounding_noise(a, b)) == 0:
        return float("nan")
    if is_relative:
        sign = -1.0 if b.mean() < 0 else 1.0  # the bounds change places where the reference is negative
        above, below = sign * (a - (1 - margin) * b), sign * (a - (1 + margin) * b)
    else:
        above, below = a - b + margin, a - b - margin
    return max(_one_sided_p(-above), _one_sided_p(below))


def noninferiority_p(first: ArrayLike, second: ArrayLike, margin: float) -> float:
    """P of "the mean of ``first (n,)`` is above that of ``second (n,)`` by the margin or more": a paired t-test.

    A small p says that a loss is hardly worse; it may be far better, which `equivalence_p` would not reject for.

    Args:
        margin: positive fraction of the mean of ``second``, which counts as the estimate that it is: tested is
            first − (1 + margin)·second. The values of ``second`` are positive, as losses are.
    Returns:
        NaN for n < 2, and where every difference is equal (see `PairedComparison`).
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"paired values must have one shape (n,), got {a.shape} and {b.shape}")
    if not margin > 0:
        raise InputError(f"a margin must be positive, got {margin}")
    if a.size < 2 or np.ptp(_without_rounding_noise(a, b)) == 0:
        return float("nan")
    return _one_sided_p(a - (1 + margin) * b)


def _one_sided_p(values: NDArray[np.float64]) -> float:
    """P of the t test that the mean of ``values (n,)`` is 0 or more."""
    std = float(values.std(ddof=1))
    if std == 0:
        return float(values.mean() >= 0)
    return float(special.stdtr(values.size - 1, values.mean() / std * math.sqrt(values.size)))


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means and its confidence interval; infinite ends where the data leave the ratio open.

    ``low`` and ``high`` are −inf and inf where the mean of the denominator is not distinguishable from 0, and NaN with
    the ratio itself for fewer than two items (the ratio stands for one).
    """

    n: int
    ratio: float
    low: float
    high: float


def ratio_of_means(numerator: ArrayLike, denominator: ArrayLike, confidence: float = 0.95) -> Ratio:
    """Mean of ``numerator (n,)`` over mean of ``denominator (n,)``, with Fieller's interval over the paired items.

    The interval holds every ratio ρ for which a t test does not reject that numerator − ρ·denominator has mean 0. For
    normal items it covers as often as it says, for any n ≥ 2. A bootstrap over three seeds does not: it has ten
    different resamples, and its 95 % intervals cover less than four times in five.
    """
    x, y = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or x.size == 0:
        raise InputError(f"numerators and denominators must have one shape (n,), n ≥ 1, got {x.shape} and {y.shape}")
    nan = float("nan")
    top, bottom = float(x.mean()), float(y.mean())
    ratio = top / bottom if bottom else nan
    if x.size < 2:
        return Ratio(1, ratio, nan, nan)
    covariance = np.cov(x, y) / x.size
    critical = float(special.stdtrit(x.size - 1, 0.5 + confidence / 2)) ** 2
    # Ends of the interval: the roots of (top − ρ·bottom)² = critical · Var(top − ρ·bottom), a·ρ² − 2b·ρ + c = 0.
    a = bottom**2 - critical * float(covariance[1, 1])
    b = top * bottom - critical * float(covariance[0, 1])
    c = top**2 - critical * float(covariance[0, 0])
    if a <= 0:
        return Ratio(int(x.size), ratio, -math.inf, math.inf)
    half = math.sqrt(max(0.0, b * b - a * c))
    return Ratio(int(x.size), ratio, (b - half) / a, (b + half) / a)


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
    p = 1.0 if discordant == 0 else min(1.0, 2 * float(special.bdtr(min(only_first, only_second), discordant, 0.5)))
    return only_first, only_second, p


DRAWS_PER_TEST = 40
"""Draws of a bootstrap per test of the family and unit of level: the adjusted floor of the p is then level / 20."""


def bootstrap_draws(family: int, least: int, alpha: float = 0.05) -> int:
    """Number of draws whose smallest p, adjusted for ``family`` tests, is far below ``alpha``; at least ``least``."""
    return max(least, math.ceil(DRAWS_PER_TEST * family / alpha))


def is_bootstrap_floor(p: float, draws: int) -> bool:
    """Return whether ``p`` is the smallest that ``draws`` of `paired_bootstrap` allow: the true one may be less."""
    return p <= 2 / (draws + 1)


@dataclass(frozen=True)
class Bootstrap:
    """A mean over items, its percentile interval and the two-sided p of "the mean is zero"; NaN where n < 2."""

    n: int
    mean: float
    low: float
    high: float
    p: float


_DRAWN_AT_A_TIME = 1 << 16
"""Numbers drawn at a time: half a megabyte stays in the cache (12 µs a draw of 1,319 items; 29 µs with 2.6 million)."""


def paired_bootstrap(
    sums: ArrayLike, counts: ArrayLike, rng: np.random.Generator, draws: int = 10_000, confidence: float = 0.95
) -> Bootstrap:
    """Bootstrap over items (sentences) of the mean difference between two systems, items drawn whole.

    An item that was seen under several seeds is one cluster: its answers are not independent, so they are drawn
    together. The interval therefore speaks about new items, for the seeds at hand; it says nothing about new seeds.

    Args:
        sums: ``(n,)``, the item's summed difference over the seeds it was seen under.
        counts: ``(n,)``, under how many seeds that was, ≥ 1.
        rng: where the resampling is drawn from.
    Returns:
        Mean ``Σ sums / Σ counts``; p counts the draws on the other side of zero (ties with zero on both sides), and
        is at least ``2 / (draws + 1)``: an observed effect is one of the draws.
    """
    total, seen = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if total.shape != seen.shape or total.ndim != 1 or total.size == 0:
        raise InputError(f"sums and counts must have one shape (n,), n ≥ 1, got {total.shape} and {seen.shape}")
    mean = float(total.sum() / seen.sum())
    if total.size < 2:
        return Bootstrap(1, mean, float("nan"), float("nan"), float("nan"))
    means = _resampled_means(total, seen, rng, draws)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Bootstrap(int(total.size), mean, float(low), float(high), min(1.0, 2 * (tail + 1) / (draws + 1)))


def _resampled_means(
    total: NDArray[np.float64], seen: NDArray[np.float64], rng: np.random.Generator, draws: int
) -> NDArray[np.float64]:
    """Σ total / Σ seen of ``draws`` resamples of the items ``(draws,)``."""
    n = total.size
    # Answers are right or wrong, so items take few distinct values: draw how often each value comes, not each item.
    # Losses are all distinct, where drawing items is faster (1,319 of them: 12 µs a draw against 70).
    kinds, multiplicity = np.unique(np.stack([total, seen], axis=1), axis=0, return_counts=True)
    has_few_kinds = 4 * len(kinds) <= n
    rows = max(1, _DRAWN_AT_A_TIME // (len(kinds) if has_few_kinds else n))
    means = []
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        if has_few_kinds:
            times = rng.multinomial(n, multiplicity / n, size=count)
            means.append((times @ kinds[:, 0]) / (times @ kinds[:, 1]))
        else:
            index = rng.integers(0, n, size=(count, n))
            means.append(total.take(index).sum(axis=1) / seen.take(index).sum(axis=1))
    return np.concatenate(means)


def smallest_detectable_difference(std_of_differences: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Mean difference that a paired t test of n items would find with the given power (two-sided); NaN for n < 2.

    The power is that of the noncentral t distribution, by quadrature over the sample standard deviation: the common
    sum of two t quantiles is 5 % too small at three items and 10 % at two.
    """
    if n < 2:
        return float("nan")
    return _detectable_shift(n, power, alpha) * std_of_differences / math.sqrt(n)


@functools.lru_cache(maxsize=256)
def _detectable_shift(n: int, power: float, alpha: float) -> float:
    """The mean difference over its standard error at which the t test of n items has this power."""
    critical = float(special.stdtrit(n - 1, 1 - alpha / 2))
    # Midpoints of 4,000 equally likely values of (sample std / true std).
    spread = np.sqrt(2 * special.gammaincinv((n - 1) / 2, (np.arange(4000) + 0.5) / 4000) / (n - 1))

    def missing_power(shift: float) -> float:
        reached = special.ndtr(shift - critical * spread) + special.ndtr(-critical * spread - shift)
        return float(reached.mean()) - power

    lower, upper = 0.0, critical + float(special.ndtri(power))
    while missing_power(upper) < 0:
        upper *= 2
    while upper - lower > 1e-7:
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if missing_power(middle) < 0 else (lower, middle)
    return (lower + upper) / 2


def is_at_chance(correct: ArrayLike, labels: ArrayLike, z: float = 1.96) -> bool:
    """Return whether a classifier may be no better than naming the most frequent class for every item.

    It may if the lower end of Wilson's 95 % interval of its accuracy does not exceed that class's share.

    Args:
        correct: 1 where the predicted class is right ``(n,)``.
        labels: true classes ``(n,)``.
    """
    hits = np.asarray(correct, dtype=np.float64)
    n = hits.size
    if n == 0:
        return True
    rate, shrink = hits.mean(), 1 + z**2 / n
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / shrink
    low = (rate + z**2 / (2 * n)) / shrink - half
    chance = np.unique(np.asarray(labels), return_counts=True)[1].max() / n
    return bool(low <= chance)
