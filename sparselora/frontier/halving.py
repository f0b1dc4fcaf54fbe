"""The candidates that go on to the next rung: those whose loss is lowest against dense for the same time.

Dense for another time is not run for each candidate: dense and dense on less data, in the same rung and on the same
held-out rows, give its loss as a function of the share of the steps, and between two of them it is linear in the
logarithm of that share. So the comparison is paired by held-out row, and its standard error is over rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparselora.evaluation.losses import mean_loss

Array = NDArray[np.float64]

_SHARES = 0.25, 2.0
"""Time ratios beyond these are taken as these: dense was not run so short or long."""
_ERRORS = 3.0
"""Standard errors by which a candidate that is dropped out of turn is worse: one in 700 of those that are not."""


@dataclass(frozen=True)
class Standing:
    """A candidate's pilot runs of one rung against dense for the same time.

    Attributes:
        loss: held-out loss, nats per label, mean over seeds.
        difference: loss minus that of dense for the same time; below 0 is better.
        standard_error: of the difference, over rows.
    """

    name: str
    loss: float
    difference: float
    standard_error: float


def dense_for_time(controls: Mapping[float, Array], ratio: float) -> Array:
    """Return each row's loss ``(rows,)`` had dense the share ``ratio`` of its steps.

    Args:
        controls: share of the steps → loss of each row ``(rows,)``; at least two shares.
    """
    shares = sorted(controls)
    target = math.log(min(max(ratio, _SHARES[0]), _SHARES[1]))
    upper = next((i for i, share in enumerate(shares[1:-1], 1) if math.log(share) >= target), len(shares) - 1)
    low, high = shares[upper - 1], shares[upper]
    weight = (target - math.log(low)) / (math.log(high) - math.log(low))
    return (1 - weight) * controls[low] + weight * controls[high]


def standing(name: str, losses: Array, counts: Array, controls: Mapping[float, Array], ratio: float) -> Standing:
    """Compare a candidate with dense for the same time.

    Args:
        losses: summed loss of each row ``(rows,)``, in nats, mean over seeds.
        counts: labels of each row ``(rows,)``.
        controls: as `dense_for_time`.
        ratio: time of a whole run as a share of dense's.
    """
    difference, error = mean_loss(losses - dense_for_time(controls, ratio), counts)
    return Standing(name, float(losses.sum() / counts.sum()), difference, error)


def survivors(
    standings: Sequence[Standing], count: int, tolerance: float, dense_loss: float
) -> tuple[list[str], dict[str, str]]:
    """Return the names of at most ``count`` candidates that go on, the best first, and why each other does not.

    Args:
        tolerance: share of ``dense_loss`` that a candidate may be worse than dense for the same time.
        dense_loss: nats per label.
    """
    reasons: dict[str, str] = {}
    for candidate in standings:
        if candidate.difference - _ERRORS * candidate.standard_error > tolerance * dense_loss:
            reasons[candidate.name] = (
                f"worse than dense for the same time by {100 * candidate.difference / dense_loss:.2f} ± "
                f"{100 * candidate.standard_error / dense_loss:.2f} % of its loss"
            )
    remaining = sorted((s for s in standings if s.name not in reasons), key=lambda s: s.difference)
    for place, candidate in enumerate(remaining[count:], count + 1):
        reasons[candidate.name] = (
            f"place {place} of {len(standings)} against dense for the same time "
            f"({100 * candidate.difference / dense_loss:+.2f} % of its loss), and {count} go on"
        )
    return [candidate.name for candidate in remaining[:count]], reasons
