"""Dense training for the same wall clock: its loss, from dense pilots of several lengths.

The control of a shortcut is dense training that stops at the shortcut's wall clock, with a schedule of its own. Its
loss D(t) is measured at the lengths of the dense pilots and interpolated between them. Every form of interpolation here
is linear in the losses: D(t) = Σ_i w_i L_i with weights that depend on times alone. So a difference to it is a contrast
that is paired by seed and by row, and its tests are those of any other contrast.

Which form is right is not known, so a verdict has to hold against two: the estimate is the chord in log t, which lies
above a curve that falls ever more slowly; the parabola through a third length errs by a fifth of that, or less, for
power laws b·t^−c at the lengths of a search. Beyond the lengths that were run, dense's loss is only bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparselora.compare.contrasts import BETTER, UNDECIDED, WORSE
from sparselora.compare.pairing import compare_values
from sparselora.numerics.stats import Bootstrap, equivalence_p, paired_bootstrap

Values = NDArray[np.float64]

MEASURED, BETWEEN, LONGER, SHORTER = "measured", "between", "longer than all", "shorter than all"
"""Places of a time among those of the dense pilots. The last two are beyond what was measured."""
_SAME_TIME = 1e-9
"""Times that differ by less, relatively, are one."""


@dataclass(frozen=True)
class EqualTime:
    """Dense training for a given time, as weights of the dense pilots ``(points,)``.

    Attributes:
        place: of `MEASURED`, `BETWEEN`, `LONGER`, `SHORTER`.
        forms: the estimate, then the other form that a verdict has to hold against, if there is one.
        can_be_lower: dense's loss may lie below all forms by an unknown amount, so nothing is better than it.
        can_be_higher: it may lie above all forms by an unknown amount, so nothing is worse than it.
    """

    place: str
    forms: tuple[Values, ...]
    can_be_lower: bool = False
    can_be_higher: bool = False


def dense_for(seconds: float, dense_seconds: Sequence[float]) -> EqualTime:
    """Return dense training for ``seconds`` in terms of dense pilots of ``dense_seconds`` ``(points,)``, ascending.

    - At a pilot's own time: that pilot.
    - Between two: their chord in log t, and the parabola in log t through the nearest three. With only two pilots, the
      longer one in its place: a loss that falls is not below it before.
    - Longer than all: the longest pilot, and the last chord made longer. A loss that falls ever more slowly lies
      between. With one pilot, anything below it.
    - Shorter than all: the shortest pilot, or anything above it.
    """
    times = np.log(np.asarray(dense_seconds, dtype=np.float64))
    if not times.size or (np.diff(times) <= 0).any():
        raise ValueError(f"times of dense pilots must ascend, got {list(dense_seconds)}")
    x, last = math.log(seconds), times.size - 1
    nearest = int(np.abs(times - x).argmin())
    if abs(times[nearest] - x) <= _SAME_TIME:
        return EqualTime(MEASURED, (_only(nearest, times.size),))
    if x < times[0]:
        return EqualTime(SHORTER, (_only(0, times.size),), can_be_higher=True)
    if x > times[last]:
        if last == 0:
            return EqualTime(LONGER, (_only(0, 1),), can_be_lower=True)
        return EqualTime(LONGER, (_only(last, times.size), _lagrange(times, [last - 1, last], x)))
    right = int(np.searchsorted(times, x))
    chord = _lagrange(times, [right - 1, right], x)
    if last == 1:
        return EqualTime(BETWEEN, (chord, _only(right, 2)))
    # The third point is the nearer neighbour of the two.
    outer = [i for i in (right - 2, right + 1) if 0 <= i <= last]
    third = min(outer, key=lambda i: abs(times[i] - x))
    return EqualTime(BETWEEN, (chord, _lagrange(times, sorted([right - 1, right, third]), x)))


def _only(point: int, points: int) -> Values:
    weights = np.zeros(points)
    weights[point] = 1.0
    return weights


def _lagrange(times: Values, points: Sequence[int], x: float) -> Values:
    """Return the weights ``(times,)`` of the polynomial through ``points`` at ``x``."""
    weights = np.zeros(times.size)
    for i in points:
        weights[i] = math.prod((x - times[j]) / (times[i] - times[j]) for j in points if j != i)
    return weights


# --- differences to it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EqualTimeDifference:
    """A loss minus that of dense training for the same time, in nats per label.

    Attributes:
        dense: the estimate of dense's loss.
        difference: to that estimate.
        low, high: ends of the 95 % intervals to all forms together; infinite where dense's loss is not bounded, NaN
            without an interval.
        t_p: the largest p of "no difference" to a form, 1 where the forms lie on different sides; NaN for one seed.
        equivalence_p: the largest p of "the difference is at least the margin"; NaN for one seed.
    """

    dense: float
    difference: float
    low: float
    high: float
    t_p: float = math.nan
    equivalence_p: float = math.nan


def difference_over_seeds(
    losses: Values, dense_losses: Values, equal_time: EqualTime, margin: float
) -> EqualTimeDifference:
    """Return the difference of ``losses (seeds,)`` to dense for the same time, from ``dense_losses (seeds, points)``.

    Args:
        margin: share of dense's loss at which a difference matters.
    """
    references = [dense_losses @ weights for weights in equal_time.forms]
    compared = [compare_values(losses, reference) for reference in references]
    sides = {bool(pairs.mean_difference > 0) for pairs in compared}
    equivalence = [equivalence_p(losses, reference, margin, is_relative=True) for reference in references]
    is_open = equal_time.can_be_lower or equal_time.can_be_higher
    # A direction that the unknown part of dense's loss could turn round is no difference.
    is_decisive = len(sides) == 1 and not (equal_time.can_be_higher if sides == {True} else equal_time.can_be_lower)
    return EqualTimeDifference(
        dense=float(references[0].mean()),
        difference=compared[0].mean_difference,
        **_ends([(pairs.ci_low, pairs.ci_high) for pairs in compared], equal_time),
        t_p=_largest([pairs.t_p for pairs in compared]) if is_decisive else 1.0,
        equivalence_p=1.0 if is_open else _largest(equivalence),
    )


def difference_over_rows(
    losses: Values, dense_losses: Values, labels: Values, equal_time: EqualTime, rng: np.random.Generator, draws: int
) -> EqualTimeDifference:
    """Return the difference of one seed to dense for the same time, with an interval over rows alone.

    Args:
        losses: summed over the labels of each row ``(rows,)``.
        dense_losses: the same of the dense pilots ``(rows, points)``.
        labels: of each row ``(rows,)``.
    """
    references = [dense_losses @ weights for weights in equal_time.forms]
    compared: list[Bootstrap] = [paired_bootstrap(losses - r, labels, rng, draws=draws) for r in references]
    return EqualTimeDifference(
        dense=float(references[0].sum() / labels.sum()),
        difference=compared[0].mean,
        **_ends([(rows.low, rows.high) for rows in compared], equal_time),
    )


def _ends(intervals: Sequence[tuple[float, float]], equal_time: EqualTime) -> dict[str, float]:
    lows, highs = np.transpose(intervals)
    return {
        "low": -math.inf if equal_time.can_be_higher else float(lows.min()),
        "high": math.inf if equal_time.can_be_lower else float(highs.max()),
    }


def _largest(p_values: Sequence[float]) -> float:
    """Return the largest p; NaN where one could not be tested."""
    return float(np.max(p_values))


def side(difference: EqualTimeDifference) -> str:
    """Return the side of 0 on which the interval lies: better, worse, or undecided."""
    return BETTER if difference.high < 0 else WORSE if difference.low > 0 else UNDECIDED
