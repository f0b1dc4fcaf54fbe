"""The whole search of the frontier, from a request to the files of its folder.

Candidates are listed, their steps timed, pilot runs planned for what is left of the budget, and run rung by rung. The
plan and every pilot run are on file as soon as they are done, and all that follows is worked out from the files: a run
that was killed goes on where it was, to the same pilot runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sparselora.config.sparsity import MODES, SparsityConfig
from sparselora.config.train import TrainConfig
from sparselora.data.load import encode_rows
from sparselora.errors import InputError
from sparselora.evaluation.profile_rows import refuse_without_context
from sparselora.frontier.candidates import (
    DENSE,
    FIXED_CONTROLS,
    Candidate,
    Circumstances,
    left_out,
    list_candidates,
)
from sparselora.frontier.halving import Standing, standing, survivors
from sparselora.frontier.pilot_pool import PilotFailure, PilotPool, PilotTask
from sparselora.frontier.pilots import PilotResult, PilotRuns, loss_per_label
from sparselora.frontier.plan import LEAST_STEPS, Cost, Plan, plan_pilots, rung_counts
from sparselora.frontier.profile_levels import read_profile
from sparselora.frontier.request import (
    CANDIDATES,
    PILOT_ROWS,
    PILOTS,
    PLAN,
    TIMES,
    FrontierRequest,
)
from sparselora.frontier.step_seconds import Probe, StepClock
from sparselora.frontier.verdict import write_outputs
from sparselora.kernels.fp8 import fp8_device_problem
from sparselora.models.labels import IGNORED
from sparselora.models.load import device_name, resolve_device
from sparselora.models.model_files import model_facts, read_model_config
from sparselora.runs.files import read_table, write_csv, write_json
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress, duration
from sparselora.runs.provenance import portable
from sparselora.runs.user_files import read_json

BASE = "base"
"""The model before its first step, in the table of held-out rows, where its rung is -1."""
PILOT_COLUMNS = (
    "candidate", "seed", "rung", "steps", "rows_seen", "train_seconds", "loss", "loss_base", "finished",
)  # fmt: skip
_ROW_COLUMNS = ("candidate", "seed", "rung", "row", "loss", "labels")

_RESERVE = 0.05
"""Share of the budget that no pilot run is planned in: steps of a rung vary by some per cent."""
_CALIBRATION_SHARE = 0.05
_CALIBRATION, _LEAST_CALIBRATION = SparsityConfig().calibration_samples, 8
_SLOWER = 1.1
"""Pilot runs that took so many times as long as planned make those of the next rung shorter."""
_CONTEXT_ROWS = 64
_TIMED_ROWS = 512
"""Training rows that steps are timed on, at most: to encode all of a large file would take longer."""


# --- before the first measurement ---------------------------------------------------------------------------------


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


def preview_lines(request: FrontierRequest, folder: Path) -> list[str]:
    """Return what a dry run says: the candidates, and the plan, as far as it is known before anything is measured."""
    is_gpu = request.config.device != "cpu" and torch.cuda.is_available()
    circumstances = circumstances_of(request, torch.device("cuda" if is_gpu else "cpu"))
    candidates = list_candidates(request.config, circumstances)
    lines = ["candidates:"]
    lines += [
        f"  {c.name}: {f'left out, {c.reason}' if c.reason else json.dumps(dict(c.settings))}" for c in candidates
    ]
    if (folder / PLAN).is_file():
        return [*lines, "plan:", *(f"  {line}" for line in _Stored.read(folder / PLAN).plan.lines())]
    counts = rung_counts(sum(not c.is_fixed and not c.reason for c in candidates))
    return [
        *lines,
        f"plan: {' then '.join(map(str, counts))} candidates, next to {len(FIXED_CONTROLS)} controls; the last "
        f"{counts[-1]} with seeds {' '.join(map(str, request.seeds))}; pilot runs of {LEAST_STEPS} steps and "
        f"more, each rung twice as long as the one before, as long as {duration(request.budget)} allow at the step "
        "times, which are measured first",
    ]


# --- the search ---------------------------------------------------------------------------------------------------


def run_search(request: FrontierRequest, folder: RunFolder) -> str:
    """Time the candidates, run the pilot runs, write everything, and return the page.

    Args:
        folder: reserved, but not entered: nothing is written before data and model have been checked.
    Raises:
        InputError: data, a model, a profile or settings that do not go together; a budget without room for pilot runs;
            dense training that does not lower the loss.
    """
    began = time.perf_counter()
    if request.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = request.gpus[0]  # of this process, which times the steps
    device = resolve_device("cuda" if request.gpus else request.config.device)  # a process without its GPU must fail
    config = request.config.replace(device=device.type)
    with tempfile.TemporaryDirectory(prefix="sparselora-frontier-") as cache_dir:
        runs = PilotRuns(config, cache_dir, device)
        with PilotPool(runs, request.slots) as pool:
            search = Search(request, folder, runs, pool, began)
            search.check_rows()
            circumstances = circumstances_of(request, device)
            with folder:
                folder.note(device=device_name(device), **model_facts(config.model))
                return search.run(circumstances)


@dataclass(frozen=True)
class _Stored:
    """The plan on file, with what else the pilot runs of a search that goes on need.

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
    def read(cls, path: Path) -> _Stored:
        values = read_json(path)
        return cls(**{**values, "plan": Plan.from_dict(values["plan"])})

    def write(self, path: Path) -> None:
        write_json(path, {**vars(self), "plan": self.plan.to_dict()})


class Search:
    """One search, in its folder.

    Attributes:
        request: as given.
        folder: held.
        runs: has model and data, and measures.
        pool: makes the pilot runs.
        candidates: all of them, in order; those left out have a reason.
        stages: last rung of each candidate that was tried.
    """

    def __init__(
        self, request: FrontierRequest, folder: RunFolder, runs: PilotRuns, pool: PilotPool, began: float
    ) -> None:
        self.request, self.folder, self.runs, self.pool = request, folder, runs, pool
        self.candidates: list[Candidate] = []
        self.stages: dict[str, int] = {}
        self._dropped: dict[str, str] = {}
        self._began = began
        self._pilots = pd.DataFrame(columns=list(PILOT_COLUMNS))
        self._rows = pd.DataFrame(columns=list(_ROW_COLUMNS))

    @property
    def _config(self) -> TrainConfig:
        return self.runs.config

    def check_rows(self) -> None:
        """Raise where the data have no held-out rows, or no context, before anything is written."""
        data = self.runs.data(self._config)
        if len(data.eval) < 2:
            raise InputError(f"{data.name} has {len(data.eval)} held-out rows, and at least 2 are needed to compare on")
        if not self.runs.is_causal:
            return
        examples = encode_rows(data.train.iloc[:_CONTEXT_ROWS], data, self.runs.base().tokenizer, self._config)
        context = sum(label == IGNORED for example in examples for label in example["labels"][1:])
        refuse_without_context(data.name, context)

    def run(self, circumstances: Circumstances) -> str:
        """Measure, plan and run what is not on file, and return the page."""
        self.pool.wait_until_ready()
        stored, times = self._planned(circumstances)
        self.folder.note(steps=stored.plan.full_steps, pilot_steps=stored.plan.rungs[-1].steps)
        with Progress(0, "pilot") as progress:
            for line in stored.plan.lines():
                progress.say(f"frontier: {line}")
        self._read_pilots()
        return self._run_rungs(stored, times)

    # --- measuring and planning

    def _planned(self, circumstances: Circumstances) -> tuple[_Stored, pd.DataFrame]:
        """Return the plan and the times: those on file, or new ones, which are then on file."""
        plan_path, times_path = self.folder.path(PLAN), self.folder.path(TIMES)
        if self.folder.can_resume() and plan_path.is_file() and times_path.is_file():
            stored = _Stored.read(plan_path)
            self._list(circumstances, stored)
            return stored, read_table(times_path, numbers=("seconds_per_step", "setup_seconds"), texts=("candidate",))
        stored, times = self._measured(circumstances)
        self._list(circumstances, stored)
        write_csv(times_path, times)
        stored.write(plan_path)
        self._write_candidates()
        return stored, times

    def _measured(self, circumstances: Circumstances) -> tuple[_Stored, pd.DataFrame]:
        """Time the candidates, dense first and alone, and plan the pilot runs.

        Raises:
            InputError: a budget without room for pilot runs, as soon as that is known.
        """
        clock = StepClock(self.runs, self._rows_drawn(_TIMED_ROWS))
        sparse_problem = None
        try:
            probe = clock.probe(list_candidates(self._config, circumstances)[0])
        except InputError as error:  # an architecture whose steps are PEFT's own
            sparse_problem = str(error)
            circumstances = dataclasses.replace(circumstances, sparse_problem=sparse_problem)
            probe = clock.probe(list_candidates(self._config, circumstances)[0])
        samples = int(_CALIBRATION_SHARE * self.request.budget / probe.row_s)
        calibration = max(_LEAST_CALIBRATION, samples) if samples < _CALIBRATION else None
        candidates = self._calibrated(list_candidates(self._config, circumstances), calibration)
        timed = [c for c in candidates if not c.reason and c.share == 1.0]
        costs = {c.name: Cost(probe.step_s, share=c.share) for c in candidates if c.is_fixed or c in timed[:3]}
        self._plan(costs, probe)  # whether two candidates can be had at all, at the time of dense
        room = max(3, probe.timed_candidates(self.request.budget))
        reasons = {c.name: self._no_room() for c in timed[room:]}
        rounds = clock.rounds(len(timed[:room]), probe.step_s, self.request.budget)
        times, problems = clock.measure(timed[:room], rounds)
        times = _with_less_data(times, candidates)
        costs = _costs(times, candidates)
        plan = self._plan(costs, probe)
        reasons |= problems | {
            name: self._no_room() for name in costs if name not in (*FIXED_CONTROLS, *plan.candidates)
        }
        train_rows = self._rows_drawn(max(self._batch * plan.rungs[-1].steps, calibration or _CALIBRATION))
        return _Stored(plan, train_rows, calibration, sparse_problem, reasons), times

    def _plan(self, costs: Mapping[str, Cost], probe: Probe) -> Plan:
        """Return the plan of pilot runs for what is left of the budget now."""
        data = self.runs.data(self._config)
        return plan_pilots(
            costs,
            [name for name in costs if name not in FIXED_CONTROLS],
            budget_s=(1 - _RESERVE) * self.request.budget - (time.perf_counter() - self._began),
            full_steps=self._full_steps(len(data.train)),
            seeds=self.request.seeds,
            row_s=probe.row_s,
            overhead_s=probe.overhead_s,
            held_out=len(data.eval),
            eval_rows=self._config.eval_samples,
            lanes=self.request.lanes,
        )

    def _rows_drawn(self, rows: int) -> int:
        """Return the ``train_samples`` that draw so many rows; those of the search's own run, if it has no more."""
        return rows if rows < len(self.runs.data(self._config).train) else self._config.train_samples

    @property
    def _batch(self) -> int:
        return self._config.train_bsz * self._config.grad_accum

    def _full_steps(self, train_rows: int) -> int:
        batches = math.ceil(train_rows / self._config.train_bsz)
        return self._config.max_steps or math.ceil(self._config.epochs * math.ceil(batches / self._config.grad_accum))

    def _no_room(self) -> str:
        return f"a budget of {duration(self.request.budget)} has no room for it"

    @staticmethod
    def _calibrated(candidates: Sequence[Candidate], samples: int | None) -> list[Candidate]:
        """Return the candidates with ``samples`` calibration rows, where a mode needs any."""
        changes = {} if samples is None else {"sparsity.calibration_samples": samples}
        return [
            dataclasses.replace(c, settings={**c.settings, **changes})
            if MODES.get(c.settings.get("sparsity.mode", ""), MODES[DENSE]).needs_calibration
            else c
            for c in candidates
        ]

    def _list(self, circumstances: Circumstances, stored: _Stored) -> None:
        circumstances = dataclasses.replace(circumstances, sparse_problem=stored.sparse_problem)
        candidates = self._calibrated(list_candidates(self._config, circumstances), stored.calibration_samples)
        self.candidates = left_out(candidates, stored.reasons)

    # --- pilot runs

    def _run_rungs(self, stored: _Stored, times: pd.DataFrame) -> str:
        plan, costs = stored.plan, _costs(times, self.candidates)
        names, page = list(plan.candidates), ""
        total = sum((len(FIXED_CONTROLS) + rung.count) * len(rung.seeds) for rung in plan.rungs)
        with Progress(total, "pilot run", "frontier", done=len(self._pilots)) as progress:
            for number, rung in enumerate(plan.rungs):
                self.stages |= dict.fromkeys((*FIXED_CONTROLS, *names), number)
                self._run_rung(number, rung.seeds, self._tasks(number, names, stored, costs), stored, progress)
                if number + 1 < len(plan.rungs):
                    names = self._halved(names, number, plan.rungs[number + 1].count, _time_ratios(costs, plan))
                self._write_candidates()
                is_finished = number + 1 == len(plan.rungs) or not names
                page = write_outputs(self.folder.folder, self.request, is_finished=is_finished)
                if is_finished:
                    break
        return page

    def _tasks(self, number: int, names: Sequence[str], stored: _Stored, costs: Mapping[str, Cost]) -> list[PilotTask]:
        """Return the pilot runs of a rung that are not on file, seed by seed, dense first."""
        by_name = {candidate.name: candidate for candidate in self.candidates}
        rung = stored.plan.rungs[number]
        steps = self._shortened(rung.steps, number, costs)
        return [
            PilotTask(
                name, seed, number,
                self.runs.configured(
                    by_name[name], seed=seed, steps=costs[name].steps(steps), train_rows=stored.train_rows,
                    eval_rows=stored.plan.eval_rows,
                ),
                costs[name].seconds(steps),
            )
            for seed in rung.seeds
            for name in (*FIXED_CONTROLS, *names)
            if not len(self._rows_of(name, seed, number))
        ]  # fmt: skip

    def _run_rung(
        self, number: int, seeds: Sequence[int], tasks: Sequence[PilotTask], stored: _Stored, progress: Progress
    ) -> None:
        """Make the pilot runs of a rung and put each on file as soon as it has ended.

        Raises:
            InputError: dense training does not lower the loss.
        """
        bases = {seed: self._base_rows(seed, stored) for seed in seeds}
        self._check_learning(number, seeds[0], bases)
        for task, outcome in self.pool.run(tasks, lambda task: task.name not in self._dropped):
            if isinstance(outcome, PilotFailure):
                self._drop(task, outcome.reason)
            elif task.name not in self._dropped:
                self._add_pilot(task, outcome, bases[task.seed])
            progress.update()
            if (task.name, task.seed) == (DENSE, seeds[0]):
                self._check_learning(number, seeds[0], bases)

    def _check_learning(self, number: int, seed: int, bases: Mapping[int, pd.DataFrame]) -> None:
        dense = self._rows_of(DENSE, seed, number)
        if len(dense):
            pilots = self._pilots[(self._pilots["candidate"] == DENSE) & (self._pilots["rung"] == number)]
            _check_learning(bases[seed], dense, int(pilots["steps"].iloc[0]))

    def _shortened(self, steps: int, number: int, costs: Mapping[str, Cost]) -> int:
        """Return the steps of a rung: fewer than planned where the pilot runs before it took longer than planned."""
        earlier = self._pilots[self._pilots["rung"] < number]
        planned = sum(costs[name].step_s * count for name, count in zip(earlier["candidate"], earlier["steps"]))
        planned *= self.request.lanes.jobs
        if not planned or (slower := float(earlier["train_seconds"].sum()) / planned) <= _SLOWER:
            return steps
        return max(min(steps, LEAST_STEPS), int(steps / slower))

    def _drop(self, task: PilotTask, reason: str) -> None:
        """Drop the candidate of a pilot run that failed, with those of later seeds that ran at the same time.

        Raises:
            RuntimeError: it is a control, without which nothing can be compared.
        """
        if task.name in FIXED_CONTROLS:
            raise RuntimeError(f"pilot run of {task.label}: {reason}")
        self._dropped.setdefault(task.name, reason)
        self._pilots, self._rows = (_without_later(table, task) for table in (self._pilots, self._rows))
        self._write_pilots()

    def _add_pilot(self, task: PilotTask, result: PilotResult, base: pd.DataFrame) -> None:
        """Put a pilot run on file, in its place in the search."""
        self._add_rows(task.name, task.seed, task.rung, result.rows)
        row = (
            task.name, task.seed, task.rung, result.steps, result.rows_seen, result.train_seconds, result.loss,
            loss_per_label(base), datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip
        table = pd.DataFrame([row], columns=list(PILOT_COLUMNS))
        self._pilots = self._sorted(pd.concat([self._pilots, table], ignore_index=True) if len(self._pilots) else table)
        self._write_pilots()

    def _write_pilots(self) -> None:
        """Write the rows first: those of a pilot run without a line are none."""
        write_csv(self.folder.path(PILOT_ROWS), self._rows)
        write_csv(self.folder.path(PILOTS), self._pilots)

    def _sorted(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return a table of pilot runs in their order in the search, whatever the order in which they ended."""
        places = {BASE: -1} | {candidate.name: place for place, candidate in enumerate(self.candidates)}
        keyed = table.assign(place=table["candidate"].map(places))
        return keyed.sort_values(["rung", "seed", "place"], kind="stable", ignore_index=True).drop(columns="place")

    def _base_rows(self, seed: int, stored: _Stored) -> pd.DataFrame:
        """Return the held-out rows before training; those of a language model are the same for every seed."""
        seed = self.request.seeds[0] if self.runs.is_causal else seed
        if not len(rows := self._rows_of(BASE, seed, -1)):
            config = self.runs.configured(
                self.candidates[0], seed=seed, steps=1, train_rows=stored.train_rows, eval_rows=stored.plan.eval_rows
            )
            self._add_rows(BASE, seed, -1, self.runs.untrained(config))
            write_csv(self.folder.path(PILOT_ROWS), self._rows)
            rows = self._rows_of(BASE, seed, -1)
        return rows

    # --- comparing

    def _halved(self, names: Sequence[str], number: int, count: int, ratios: Mapping[str, float]) -> list[str]:
        """Return the candidates of the next rung, and note why the others are none."""
        standings = [row for row in self._standings(number, ratios) if row.name in names]
        dense = loss_per_label(self._rows_of(DENSE, self.request.seeds[0], number))
        survivor_names, reasons = survivors(standings, count, self.request.tolerance, dense)
        self._dropped |= reasons
        return [name for name in names if name in survivor_names]

    def _standings(self, number: int, ratios: Mapping[str, float]) -> list[Standing]:
        """Return the standing of each candidate of a rung that ran with all of its seeds."""
        rung = self._rows[self._rows["rung"] == number]
        losses: dict[str, Any] = {}
        seeds = rung["seed"].nunique()
        for name, rows in rung.groupby("candidate", sort=False):
            if rows["seed"].nunique() == seeds:
                losses[str(name)] = np.mean([part["loss"].to_numpy() for _, part in rows.groupby("seed")], axis=0)
        counts = self._rows_of(DENSE, self.request.seeds[0], number)["labels"].to_numpy(np.float64)
        controls = {c.share: losses[c.name] for c in self.candidates if c.is_fixed}
        names = [name for name in losses if name not in FIXED_CONTROLS]
        return [standing(name, losses[name], counts, controls, ratios[name]) for name in names]

    # --- files

    def _read_pilots(self) -> None:
        """Read the pilot runs that are on file; rows of one that was killed before its line was written are none."""
        pilots, rows = self.folder.path(PILOTS), self.folder.path(PILOT_ROWS)
        if not self.folder.can_resume() or not rows.is_file():
            return
        if pilots.is_file():
            self._pilots = read_table(pilots, numbers=PILOT_COLUMNS[1:-1], texts=("candidate", "finished"))
        table = pd.read_csv(rows, float_precision="round_trip")
        finished = set(self._pilots[["candidate", "seed", "rung"]].itertuples(index=False, name=None))
        places = table[["candidate", "seed", "rung"]].itertuples(index=False, name=None)
        self._rows = table[[place[0] == BASE or place in finished for place in places]].reset_index(drop=True)

    def _rows_of(self, name: str, seed: int, number: int) -> pd.DataFrame:
        rows = self._rows
        return rows[(rows["candidate"] == name) & (rows["seed"] == seed) & (rows["rung"] == number)]

    def _add_rows(self, name: str, seed: int, number: int, rows: pd.DataFrame) -> None:
        table = rows.assign(candidate=name, seed=seed, rung=number)[list(_ROW_COLUMNS)]
        self._rows = self._sorted(pd.concat([self._rows, table], ignore_index=True) if len(self._rows) else table)

    def _write_candidates(self) -> None:
        rows = [
            {"candidate": c.name, "settings": json.dumps(dict(c.settings)), "control": c.is_control,
             "stage": self.stages.get(c.name), "reason": c.reason}
            for c in left_out(self.candidates, self._dropped)
        ]  # fmt: skip
        write_csv(self.folder.path(CANDIDATES), pd.DataFrame(rows).astype({"stage": "Int64"}))


def _without_later(table: pd.DataFrame, task: PilotTask) -> pd.DataFrame:
    """Return ``table`` without the rows of later seeds of the same candidate and rung."""
    is_later = (table["candidate"] == task.name) & (table["rung"] == task.rung) & (table["seed"] > task.seed)
    return table[~is_later].reset_index(drop=True)


# --- times --------------------------------------------------------------------------------------------------------


def _with_less_data(times: pd.DataFrame, candidates: Sequence[Candidate]) -> pd.DataFrame:
    """Return ``times`` with rows for dense on less data, whose steps are those of dense."""
    dense = times[times["candidate"] == DENSE]
    fewer = [dense.assign(candidate=c.name) for c in candidates if c.share < 1]
    return pd.concat([dense, *fewer, times[times["candidate"] != DENSE]], ignore_index=True)


def _costs(times: pd.DataFrame, candidates: Sequence[Candidate]) -> dict[str, Cost]:
    """Return what each timed candidate's steps cost, in the order of ``candidates``."""
    rows = times.set_index("candidate")
    return {
        c.name: Cost(float(rows.at[c.name, "seconds_per_step"]), float(rows.at[c.name, "setup_seconds"]), c.share)
        for c in candidates
        if c.name in rows.index
    }


def _time_ratios(costs: Mapping[str, Cost], plan: Plan) -> dict[str, float]:
    """Return each candidate's time of a whole run, set-up included, as a share of dense's."""
    dense = costs[DENSE].seconds(plan.full_steps)
    return {name: cost.seconds(plan.full_steps) / dense for name, cost in costs.items()}


def _check_learning(base: pd.DataFrame, dense: pd.DataFrame, steps: int) -> None:
    """Raise where dense training does not lower the held-out loss by two standard errors."""
    gains = base["loss"].to_numpy() - dense["loss"].to_numpy()
    if gains.sum() > 2 * math.sqrt(len(gains)) * gains.std(ddof=1):
        return
    raise InputError(
        f"dense training for {steps} steps does not learn: held-out loss {loss_per_label(dense):.4f}, not clearly "
        f"below the {loss_per_label(base):.4f} before it ({len(gains)} rows), so nothing can be compared with it; give "
        "a larger budget, another lr, or a task that this model can learn"
    )
