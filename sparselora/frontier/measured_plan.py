"""Times of the candidates and the plan of pilot runs that follows from them, before anything is written."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from sparselora.config.sparsity import MODES, SparsityConfig
from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.frontier.candidates import DENSE, FIXED_CONTROLS, Candidate, Circumstances, left_out, list_candidates
from sparselora.frontier.pilots import PilotRuns
from sparselora.frontier.plan import Cost, Plan, plan_pilots
from sparselora.frontier.profile_levels import read_profile
from sparselora.frontier.request import FrontierRequest
from sparselora.frontier.step_seconds import Probe, StepClock
from sparselora.kernels.fp8 import fp8_device_problem
from sparselora.models.model_files import read_model_config
from sparselora.runs.files import write_json
from sparselora.runs.progress import duration
from sparselora.runs.provenance import portable
from sparselora.runs.user_files import read_json

_RESERVE = 0.05
"""Share of the budget that no pilot run is planned in: steps of a rung vary by some per cent."""
_CALIBRATION_SHARE = 0.05
_CALIBRATION, _LEAST_CALIBRATION = SparsityConfig().calibration_samples, 8
_TIMED_ROWS = 512
"""Training rows that steps are timed on, at most: to encode all of a large file would take longer."""


def circumstances_of(request: FrontierRequest, device: torch.device) -> Circumstances:
    """Return what decides, before the model is loaded, which candidates are possible.

    Raises:
        InputError: no model, or a profile that cannot be used.
    """
    config = request.config
    assert config.model is not None
    circumstances = Circumstances(read_model_config(config.model), fp8_device_problem(device))
    if request.profile is None:
        return circumstances
    model = portable({"model": config.model}, ("model",))["model"]
    levels = read_profile(Path(request.profile), model)
    open_levels = {level: levels.is_open(level) for level in (0.5, 0.9, 0.99)}
    return dataclasses.replace(circumstances, schedule=levels.schedule, open_levels=open_levels)


@dataclass(frozen=True)
class MeasuredPlan:
    """The plan of a search, with what else its pilot runs need, as it is on file.

    Attributes:
        train_rows: training rows that pilot runs draw from; 0 for all.
        calibration_samples: training rows that calibrate; None leaves it to the settings.
        sparse_problem: why no step of this model can be changed; None where it can.
        reasons: why candidates are left out that were possible at first.
    """

    plan: Plan
    train_rows: int
    calibration_samples: int | None
    sparse_problem: str | None
    reasons: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> MeasuredPlan:
        values = read_json(path)
        return cls(**{**values, "plan": Plan.from_dict(values["plan"])})

    def write(self, path: Path) -> None:
        write_json(path, {**vars(self), "plan": self.plan.to_dict()})

    def candidates(self, config: TrainConfig, circumstances: Circumstances) -> list[Candidate]:
        """Return all candidates; those that are left out have a reason."""
        circumstances = dataclasses.replace(circumstances, sparse_problem=self.sparse_problem)
        candidates = _calibrated(list_candidates(config, circumstances), self.calibration_samples)
        return left_out(candidates, self.reasons)


def _calibrated(candidates: Sequence[Candidate], samples: int | None) -> list[Candidate]:
    """Return the candidates with ``samples`` calibration rows, where a mode needs any."""
    changes = {} if samples is None else {"sparsity.calibration_samples": samples}
    return [
        dataclasses.replace(c, settings={**c.settings, **changes})
        if MODES.get(c.settings.get("sparsity.mode", ""), MODES[DENSE]).needs_calibration
        else c
        for c in candidates
    ]


class Planner:
    """Measures the candidates of a search and plans its pilot runs.

    Args:
        began: `time.perf_counter` when the search began.
    """

    def __init__(self, request: FrontierRequest, runs: PilotRuns, began: float) -> None:
        self._request, self._runs, self._began = request, runs, began

    @property
    def _config(self) -> TrainConfig:
        return self._runs.config

    def measure(self, circumstances: Circumstances) -> tuple[MeasuredPlan, pd.DataFrame]:
        """Time the candidates, dense first and alone, and plan the pilot runs.

        Returns:
            The plan, and a row for each candidate that was timed, as ``times.csv``.
        Raises:
            InputError: a budget without room for pilot runs, as soon as that is known.
        """
        clock = StepClock(self._runs, self._rows_drawn(_TIMED_ROWS))
        sparse_problem = None
        try:
            probe = clock.probe(list_candidates(self._config, circumstances)[0])
        except InputError as error:  # an architecture whose steps are PEFT's own
            sparse_problem = str(error)
            circumstances = dataclasses.replace(circumstances, sparse_problem=sparse_problem)
            probe = clock.probe(list_candidates(self._config, circumstances)[0])
        samples = int(_CALIBRATION_SHARE * self._request.budget / probe.row_s)
        calibration = max(_LEAST_CALIBRATION, samples) if samples < _CALIBRATION else None
        candidates = _calibrated(list_candidates(self._config, circumstances), calibration)
        timed = [c for c in candidates if not c.reason and c.share == 1.0]
        costs = {c.name: Cost(probe.step_s, share=c.share) for c in candidates if c.is_fixed or c in timed[:3]}
        self._plan(costs, probe)  # whether two candidates can be had at all, at the time of dense
        room = max(3, probe.timed_candidates(self._request.budget))
        reasons = {c.name: self._no_room() for c in timed[room:]}
        rounds = clock.rounds(len(timed[:room]), probe.step_s, self._request.budget)
        times, problems = clock.measure(timed[:room], rounds)
        times = _with_less_data(times, candidates)
        costs = costs_of(times, candidates)
        plan = self._plan(costs, probe)
        reasons |= problems | {
            name: self._no_room() for name in costs if name not in (*FIXED_CONTROLS, *plan.candidates)
        }
        train_rows = self._rows_drawn(max(self._batch * plan.rungs[-1].steps, calibration or _CALIBRATION))
        return MeasuredPlan(plan, train_rows, calibration, sparse_problem, reasons), times

    def _plan(self, costs: Mapping[str, Cost], probe: Probe) -> Plan:
        """Return the plan of pilot runs for what is left of the budget now."""
        data = self._runs.data(self._config)
        return plan_pilots(
            costs,
            [name for name in costs if name not in FIXED_CONTROLS],
            budget_s=(1 - _RESERVE) * self._request.budget - (time.perf_counter() - self._began),
            full_steps=self._full_steps(len(data.train)),
            seeds=self._request.seeds,
            row_s=probe.row_s,
            overhead_s=probe.overhead_s,
            held_out=len(data.eval),
            eval_rows=self._config.eval_samples,
            lanes=self._request.lanes,
            least_seeds=self._request.least_seeds,
        )

    def _rows_drawn(self, rows: int) -> int:
        """Return the ``train_samples`` that draw so many rows; those of the search's own run, if it has no more."""
        return rows if rows < len(self._runs.data(self._config).train) else self._config.train_samples

    @property
    def _batch(self) -> int:
        return self._config.train_bsz * self._config.grad_accum

    def _full_steps(self, train_rows: int) -> int:
        batches = math.ceil(train_rows / self._config.train_bsz)
        return self._config.max_steps or math.ceil(self._config.epochs * math.ceil(batches / self._config.grad_accum))

    def _no_room(self) -> str:
        return f"a budget of {duration(self._request.budget)} has no room for it"


# --- times --------------------------------------------------------------------------------------------------------


def _with_less_data(times: pd.DataFrame, candidates: Sequence[Candidate]) -> pd.DataFrame:
    """Return ``times`` with rows for dense on less data, whose steps are those of dense."""
    dense = times[times["candidate"] == DENSE]
    fewer = [dense.assign(candidate=c.name) for c in candidates if c.share < 1]
    return pd.concat([dense, *fewer, times[times["candidate"] != DENSE]], ignore_index=True)


def costs_of(times: pd.DataFrame, candidates: Sequence[Candidate]) -> dict[str, Cost]:
    """Return what each timed candidate's steps cost, in the order of ``candidates``."""
    rows = times.set_index("candidate")
    return {
        c.name: Cost(float(rows.at[c.name, "seconds_per_step"]), float(rows.at[c.name, "setup_seconds"]), c.share)
        for c in candidates
        if c.name in rows.index
    }


def time_ratios(costs: Mapping[str, Cost], plan: Plan) -> dict[str, float]:
    """Return each candidate's time of a whole run, set-up included, as a share of dense's."""
    dense = costs[DENSE].seconds(plan.full_steps)
    return {name: cost.seconds(plan.full_steps) / dense for name, cost in costs.items()}
