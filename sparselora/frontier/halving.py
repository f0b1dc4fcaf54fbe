"""The candidates that go on to the next rung: those whose loss is lowest against dense for the same time.

Dense for another time is not run for each candidate: it is interpolated (`sparselora.frontier.equal_time`) between
dense and dense on less data, in the same rung and on the same held-out rows. So the comparison is paired by held-out
row, and its standard error is over rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparselora.evaluation.losses import mean_loss
from sparselora.frontier.equal_time import LONGER, dense_for

Array = NDArray[np.float64]

_ERRORS = 3.0
"""Standard errors by which a candidate that is dropped at once is worse: one in 700 of those that are not."""


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
    """Return each row's loss ``(rows,)`` had dense the share ``ratio`` of its time.

    Between two controls it is their chord; beyond all of them, the last chord made longer, which a candidate that is
    slower than dense has to beat; below all, the shortest control.

    Args:
        controls: share of the steps → loss of each row ``(rows,)``.
    """
    shares = sorted(controls)
    dense = dense_for(ratio, shares)
    weights = dense.forms[-1] if dense.place == LONGER else dense.forms[0]
    total: Array = weights @ np.stack([controls[share] for share in shares])
    return total


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
