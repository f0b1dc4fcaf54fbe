"""Settings of one search of the frontier, frozen, and the texts that name them; needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparselora.config.train import TrainConfig
from sparselora.errors import InputError, shown
from sparselora.frontier.plan import Lanes

CANDIDATES = "candidates.csv"
TIMES = "times.csv"
PLAN = "plan.json"
PILOTS = "pilots.csv"
PILOT_ROWS = "pilots_rows.csv.gz"
LEARNING_RATES = "learning_rates.csv"
SEARCH_OUTPUTS = (CANDIDATES, TIMES, PLAN, PILOTS, PILOT_ROWS, LEARNING_RATES)
"""Files of the search: candidates, step times, the plan, pilot runs, the held-out rows of each, and the learning rates
that were tried."""
BEST_FILE, DENSE_FILE = "best.yaml", "dense.yaml"
VERDICT_OUTPUTS = ("frontier.csv", "frontier_points.csv", "frontier.md", "frontier.png", BEST_FILE, DENSE_FILE)
"""Files of its outcome; of the two configurations, one."""

_UNITS = {"h": 3600.0, "min": 60.0, "s": 1.0}
_LONGEST = 30 * 24 * 3600.0


@dataclass(frozen=True)
class FrontierRequest:
    """Checked settings of one search.

    Attributes:
        config: the dense run that is to become cheaper: model, data, adapter, optimization; without sparsity.
        tolerance: rise of the held-out loss that is accepted, as a share of the dense loss.
        budget: wall clock of the whole search, in seconds.
        seeds: of the last rung's pilot runs, as far as the budget goes; the rungs before it have the first of them.
        least_seeds: number of them below which candidates are left out instead.
        profile: folder of a finished run of `profile`, which narrows the candidates; None without.
        gpus: values of ``CUDA_VISIBLE_DEVICES`` of the processes that make pilot runs; empty leaves it as it is.
        jobs: pilot runs at a time, on each of ``gpus`` or in all.
    """

    config: TrainConfig
    tolerance: float
    budget: float
    seeds: tuple[int, ...]
    least_seeds: int
    profile: str | None
    gpus: tuple[str, ...] = ()
    jobs: int = 1

    @property
    def lanes(self) -> Lanes:
        return Lanes(max(1, len(self.gpus)), self.jobs)

    @property
    def slots(self) -> list[str | None]:
        """The GPU of each pilot run at a time; None for the one that this process has."""
        return [*(self.gpus or [None])] * self.jobs


def parse_tolerance(text: str) -> float:
    """Return the share that a text such as ``1%`` or ``0.5%`` means.

    Raises:
        InputError: no percentage above 0 and below 100.
    """
    match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{1,12})?)\s*%\s*", text)
    if match is None or not 0 < float(match[1]) < 100:
        raise InputError(
            f"tolerance must be a percentage above 0% and below 100%, such as 1% or 0.5%, got {shown(text)}"
        )
    return float(match[1]) / 100


def parse_budget(text: str) -> float:
    """Return the seconds that a text such as ``20min``, ``90s`` or ``1h30min`` means.

    Raises:
        InputError: no time with a unit, none at all, or more than 30 days.
    """
    parts = re.fullmatch(
        r"\s*(?:([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*h)?\s*(?:([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*min)?"
        r"\s*(?:([0-9]{1,7}(?:\.[0-9]{1,6})?)\s*s)?\s*",
        text,
    )
    amounts = [] if parts is None else [
        float(amount) * unit for amount, unit in zip(parts.groups(), _UNITS.values()) if amount is not None
    ]  # fmt: skip
    if not 0 < sum(amounts) <= _LONGEST:
        raise InputError(
            f"budget must be a time above 0 and of at most 30 days with its unit, such as 20min, 90s or 1h30min, got "
            f"{shown(text)}"
        )
    return sum(amounts)
