"""The plan of a search: rungs of pilot runs, each with fewer candidates and more steps, that fit a budget.

Successive halving: a third of the candidates goes on to the next rung, whose pilot runs are twice as long; the last
rung repeats over seeds. The fixed controls run in every rung. Before the last rung, learning rates are tried in pilot
runs of half its length. A pilot run has a learning-rate schedule of its own length, as a whole run of so many steps
would.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparselora.errors import InputError
from sparselora.runs.progress import duration

_KEPT = 3
"""One in so many candidates goes on: with twice the steps a rung costs two thirds of the one before."""
_LONGER = 2
_FINALISTS = 4
"""Candidates of the last rung at most: each of them costs a run of full length for every seed."""
LEAST_STEPS = 8
"""Optimizer steps of the shortest pilot run: below that, a linear schedule has hardly left its first value."""
LEAST_ROWS, _MOST_ROWS = 16, 512
"""Held-out rows of a pilot run: at 16 the standard error of a difference is a quarter of its spread over rows."""
_EVALUATION_SHARE = 0.25
_LEAST_CANDIDATES = 2


@dataclass(frozen=True)
class Lanes:
    """Pilot runs at a time.

    Attributes:
        devices: devices that have some.
        jobs: pilot runs at a time on each of them. Their steps and evaluations take turns on the device; what goes
            before and between does not.
    """

    devices: int = 1
    jobs: int = 1

    @property
    def count(self) -> int:
        return self.devices * self.jobs

    def makespan(self, seconds: Sequence[float]) -> float:
        """Return the time of pilot runs of ``seconds``, the longest first, each to the lane that is free first."""
        loads = [0.0] * self.count
        for duration_s in sorted(seconds, reverse=True):
            heapq.heapreplace(loads, loads[0] + duration_s)
        return max(loads)


@dataclass(frozen=True)
class Cost:
    """The times of a candidate's pilot runs.

    Attributes:
        step_s: seconds of an optimizer step.
        setup_s: seconds before the first step: calibration, fp8 copies.
        share: of a rung's steps that it takes.
    """

    step_s: float
    setup_s: float = 0.0
    share: float = 1.0

    def steps(self, rung_steps: int) -> int:
        return max(1, round(rung_steps * self.share))

    def seconds(self, rung_steps: int, jobs: int = 1) -> float:
        """Return the seconds of a pilot run at a rung, of ``jobs`` whose steps take turns."""
        return self.setup_s + self.steps(rung_steps) * self.step_s * jobs


@dataclass(frozen=True)
class Rung:
    """Pilot runs of one length.

    Attributes:
        steps: optimizer steps of a pilot run (less for dense on less data).
        count: candidates next to the fixed controls.
        seeds: of its pilot runs.
        seconds: forecast for the dearest candidates that may come so far.
    """

    steps: int
    count: int
    seeds: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Plan:
    """All pilot runs of a search.

    Attributes:
        candidates: names of those that the budget has room for, the fixed controls left out.
        rungs: from the shortest pilot runs to the longest.
        tuning: pilot runs before the last rung that try learning rates; its ``count`` is that of the last rung.
        eval_rows: held-out rows of each pilot run.
        full_steps: steps of the run that the search is for.
    """

    candidates: tuple[str, ...]
    rungs: tuple[Rung, ...]
    tuning: Rung
    eval_rows: int
    full_steps: int

    @property
    def seconds(self) -> float:
        return sum(rung.seconds for rung in self.rungs) + self.tuning.seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        *rungs, tuning = (
            Rung(**{**rung, "seeds": tuple(rung["seeds"])}) for rung in (*values["rungs"], values["tuning"])
        )
        return cls(tuple(values["candidates"]), tuple(rungs), tuning, values["eval_rows"], values["full_steps"])

    def lines(self) -> list[str]:
        """Return the plan in words, a line a rung."""
        lines = [
            f"rung {number}: {rung.count} candidates and the controls, {rung.steps} steps, "
            f"{len(rung.seeds)} seed{'s' if len(rung.seeds) > 1 else ''}, about {duration(rung.seconds)}"
            for number, rung in enumerate(self.rungs)
        ]
        lines.insert(
            -1, f"learning rates: {self.tuning.count} candidates and the controls, {self.tuning.steps} steps, about "
            f"{duration(self.tuning.seconds)}"
        )  # fmt: skip
        share = self.rungs[-1].steps / self.full_steps
        return [*lines, f"the longest pilot run is {share:.1%} of a whole run; {self.eval_rows} held-out rows"]


def rung_counts(candidates: int) -> list[int]:
    """Return the number of candidates of each rung, ``candidates`` of them in the first."""
    counts = [candidates]
    while counts[-1] > _FINALISTS:
        counts.append(max(2, math.ceil(counts[-1] / _KEPT)))
    return counts


def plan_pilots(
    costs: Mapping[str, Cost],
    order: Sequence[str],
    *,
    budget_s: float,
    full_steps: int,
    seeds: Sequence[int],
    row_s: float,
    overhead_s: float,
    held_out: int,
    eval_rows: int = 0,
    lanes: Lanes = Lanes(),
    least_seeds: int | None = None,
) -> Plan:
    """Return the longest pilot runs that fit ``budget_s``, of as many seeds and candidates as there is room for.

    Where there is none for all candidates with all seeds, the last seeds are left out first, down to ``least_seeds``,
    and then the last candidates.

    Args:
        costs: of each candidate and each fixed control, by name.
        order: candidates, the fixed controls left out; the last are left out first.
        budget_s: seconds that are left for pilot runs.
        full_steps: steps of a whole run, and the most that a pilot run takes.
        row_s: seconds to evaluate one held-out row.
        overhead_s: seconds of a pilot run beyond its set-up, steps and evaluation.
        held_out: held-out rows there are.
        eval_rows: held-out rows that the user asks for; 0 leaves it to the plan.
        lanes: pilot runs at a time.
        least_seeds: of ``seeds``; None for all.
    Raises:
        InputError: the budget has no room for pilot runs of two candidates.
    """
    fixed = [name for name in costs if name not in order]
    needed = 0.0
    fewest = len(seeds) if least_seeds is None else min(least_seeds, len(seeds))
    sizes_to_try = [(len(order), count) for count in range(len(seeds), fewest, -1)]
    sizes_to_try += [(count, fewest) for count in range(len(order), min(_LEAST_CANDIDATES, len(order)) - 1, -1)]
    for count, seed_count in sizes_to_try:
        names = list(order[:count])
        counts = rung_counts(count)
        runs = sum(
            (len(fixed) + number) * (seed_count if rung == len(counts) - 1 else 1) for rung, number in enumerate(counts)
        )
        runs += (len(fixed) + counts[-1]) * tuning_runs(len(counts))
        rows = eval_rows or int(_EVALUATION_SHARE * budget_s * lanes.devices / (runs * row_s))
        rows = min(held_out, eval_rows or min(_MOST_ROWS, max(LEAST_ROWS, rows)))
        run_s = overhead_s + rows * row_s * lanes.jobs
        sizes = _Sizes(costs, fixed, names, counts, tuple(seeds[:seed_count]), run_s, full_steps, lanes)
        needed = sizes.seconds(sizes.shortest)
        if needed <= budget_s:
            break
    else:
        raise InputError(
            f"budget leaves {duration(budget_s)} for pilot runs, and those of {len(fixed)} controls and {len(names)} "
            f"candidates take {duration(needed)} at {sizes.shortest} steps; give a larger budget, a smaller train_bsz "
            "or max_length, or fewer seeds"
        )
    last = _largest(sizes.shortest, full_steps, lambda steps: sizes.seconds(steps) <= budget_s)
    return Plan(tuple(names), tuple(sizes.rungs(last)), sizes.tuning(last), rows, full_steps)


def tuning_runs(rungs: int) -> int:
    """Return the learning rates that are tried for each candidate; one of three has run in the rung before, if any."""
    return 3 if rungs == 1 else 2


@dataclass(frozen=True)
class _Sizes:
    """Rungs of given numbers of candidates, as the steps of the last one vary."""

    costs: Mapping[str, Cost]
    fixed: Sequence[str]
    names: Sequence[str]
    counts: Sequence[int]
    seeds: tuple[int, ...]
    run_s: float
    full_steps: int
    lanes: Lanes

    @property
    def shortest(self) -> int:
        """Steps of the last rung with `LEAST_STEPS` in the first, or of a whole run, if that is shorter."""
        return min(self.full_steps, LEAST_STEPS * _LONGER ** (len(self.counts) - 1))

    def rungs(self, last_steps: int) -> list[Rung]:
        last = len(self.counts) - 1
        return [
            self._rung(max(1, round(last_steps / _LONGER ** (last - number))), count,
                       self.seeds if number == last else self.seeds[:1])
            for number, count in enumerate(self.counts)
        ]  # fmt: skip

    def tuning(self, last_steps: int) -> Rung:
        steps, repeats = max(1, round(last_steps / _LONGER)), tuning_runs(len(self.counts))
        return self._rung(steps, self.counts[-1], self.seeds[:1], repeats)

    def _rung(self, steps: int, count: int, seeds: tuple[int, ...], repeats: int = 1) -> Rung:
        seconds = {name: self.run_s + self.costs[name].seconds(steps, self.lanes.jobs) for name in self.costs}
        dearest = sorted((seconds[name] for name in self.names), reverse=True)[:count]
        durations = [*dearest, *(seconds[name] for name in self.fixed)]
        return Rung(steps, count, seeds, self.lanes.makespan(durations * len(seeds) * repeats))

    def seconds(self, last_steps: int) -> float:
        return sum(rung.seconds for rung in (*self.rungs(last_steps), self.tuning(last_steps)))


def _largest(low: int, high: int, fits: Any) -> int:
    """Return the largest whole number from ``low``, which fits, to ``high`` that does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
