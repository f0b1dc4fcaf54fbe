"""The whole search of the frontier, from a request to the files of its folder.

Candidates are listed, their steps timed, pilot runs planned for what is left of the budget, and run rung by rung. The
plan and every pilot run are on file as soon as they are done, and all that follows is worked out from the files: a run
that was killed goes on where it was, to the same pilot runs.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sparselora.config.train import TrainConfig
from sparselora.data.load import encode_rows
from sparselora.errors import InputError
from sparselora.evaluation.profile_rows import refuse_without_context
from sparselora.frontier.candidates import DENSE, FIXED_CONTROLS, Candidate, Circumstances, left_out, list_candidates
from sparselora.frontier.halving import Standing, standing, survivors
from sparselora.frontier.learning_rates import LR_FACTORS, LearningRates
from sparselora.frontier.measured_plan import MeasuredPlan, Planner, circumstances_of, costs_of, time_ratios
from sparselora.frontier.pilot_log import BASE, PilotLog
from sparselora.frontier.pilot_pool import PilotFailure, PilotPool, PilotTask
from sparselora.frontier.pilots import PilotRuns, loss_per_label
from sparselora.frontier.plan import LEAST_STEPS, rung_counts, tuning_runs
from sparselora.frontier.request import CANDIDATES, PLAN, TIMES, FrontierRequest
from sparselora.frontier.verdict import write_outputs
from sparselora.models.labels import IGNORED
from sparselora.models.load import device_name, resolve_device
from sparselora.models.model_files import model_facts
from sparselora.runs.files import read_table, write_csv
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress, duration

_SLOWER = 1.1
"""Pilot runs that took so many times as long as planned make those of the next rung shorter."""
_CONTEXT_ROWS = 64


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
        return [*lines, "plan:", *(f"  {line}" for line in MeasuredPlan.read(folder / PLAN).plan.lines())]
    counts = rung_counts(sum(not c.is_fixed and not c.reason for c in candidates))
    return [
        *lines,
        f"plan: {' then '.join(map(str, counts))} candidates, next to {len(FIXED_CONTROLS)} controls; the last "
        f"{counts[-1]} with a learning rate of their own and {_seed_counts(request)} seeds; pilot runs of "
        f"{LEAST_STEPS} steps and more, each rung twice as long as the one before, as long as "
        f"{duration(request.budget)} allow at the step times, which are measured first",
    ]


def _seed_counts(request: FrontierRequest) -> str:
    most = len(request.seeds)
    return str(most) if request.least_seeds == most else f"{request.least_seeds} to {most}"


def run_search(request: FrontierRequest, folder: RunFolder) -> str:
    """Time the candidates, run the pilot runs, write everything, and return the page.

    This process, which times the steps, sees the first of the request's GPUs alone; so it has been told by
    ``CUDA_VISIBLE_DEVICES`` before torch looked for them.

    Args:
        folder: reserved, but not entered: nothing is written before data, model and budget have been checked.
    Raises:
        InputError: data, a model, a profile or settings that do not go together; a budget without room for pilot runs;
            dense training that does not lower the loss.
    """
    began = time.perf_counter()
    device = resolve_device("cuda" if request.gpus else request.config.device)  # a process without its GPU must fail
    config = request.config.replace(device=device.type)
    with tempfile.TemporaryDirectory(prefix="sparselora-frontier-") as cache_dir:
        runs = PilotRuns(config, cache_dir, device)
        with PilotPool(runs, request.slots) as pool:
            check_rows(runs)
            circumstances = circumstances_of(request, device)
            pool.wait_until_ready()
            on_file = _on_file(folder)
            stored, times = on_file or Planner(request, runs, began).measure(circumstances)
            with folder:
                folder.note(device=device_name(device), **model_facts(config.model))
                if on_file is None:
                    write_csv(folder.path(TIMES), times)
                    stored.write(folder.path(PLAN))
                return Search(request, folder, runs, pool, circumstances, stored, times).run()


def check_rows(runs: PilotRuns) -> None:
    """Raise where the data have no held-out rows, or no context, before anything is written."""
    data = runs.data(runs.config)
    if len(data.eval) < 2:
        raise InputError(f"{data.name} has {len(data.eval)} held-out rows, and at least 2 are needed to compare on")
    if not runs.is_causal:
        return
    examples = encode_rows(data.train.iloc[:_CONTEXT_ROWS], data, runs.base().tokenizer, runs.config)
    context = sum(label == IGNORED for example in examples for label in example["labels"][1:])
    refuse_without_context(data.name, context)


def _on_file(folder: RunFolder) -> tuple[MeasuredPlan, pd.DataFrame] | None:
    """Return the plan and the times of a search that was begun in the folder; None where there are none."""
    plan_path, times_path = folder.path(PLAN), folder.path(TIMES)
    if not (folder.can_resume() and plan_path.is_file() and times_path.is_file()):
        return None
    times = read_table(times_path, numbers=("seconds_per_step", "setup_seconds"), texts=("candidate",))
    return MeasuredPlan.read(plan_path), times


class Search:
    """One search, in its folder, from its plan on.

    Attributes:
        request: as given.
        folder: entered.
        runs: has model and data.
        pool: makes the pilot runs.
        stored: the plan.
        candidates: all of them, in order; those left out have a reason.
        stages: last rung of each candidate that was tried.
        log: finished pilot runs.
        learning_rates: of the last rung.
    """

    def __init__(
        self, request: FrontierRequest, folder: RunFolder, runs: PilotRuns, pool: PilotPool,
        circumstances: Circumstances, stored: MeasuredPlan, times: pd.DataFrame,
    ) -> None:  # fmt: skip
        self.request, self.folder, self.runs, self.pool = request, folder, runs, pool
        self.stored = stored
        self.candidates = stored.candidates(runs.config, circumstances)
        self.stages: dict[str, int] = {}
        self.log = PilotLog(folder, [candidate.name for candidate in self.candidates])
        self.learning_rates = LearningRates(folder)
        self._costs = costs_of(times, self.candidates)
        self._dropped: dict[str, str] = {}

    @property
    def _config(self) -> TrainConfig:
        return self.runs.config

    def run(self) -> str:
        """Run what is not on file, and return the page."""
        plan = self.stored.plan
        self.folder.note(steps=plan.full_steps, pilot_steps=plan.rungs[-1].steps)
        with Progress(0, "pilot") as progress:
            for line in plan.lines():
                progress.say(f"frontier: {line}")
        self.log.read()
        self._write_candidates()
        return self._run_rungs()

    # --- pilot runs

    def _run_rungs(self) -> str:
        plan = self.stored.plan
        names, page, last = list(plan.candidates), "", len(plan.rungs) - 1
        total = sum((len(FIXED_CONTROLS) + rung.count) * len(rung.seeds) for rung in plan.rungs)
        total += (len(FIXED_CONTROLS) + plan.tuning.count) * tuning_runs(len(plan.rungs))
        done = len(self.log.pilots) + len(self.learning_rates.table)
        with Progress(total, "pilot run", "frontier", done=done) as progress:
            for number in range(last + 1):
                if number == last:
                    self._tune(names, progress)
                self.stages |= dict.fromkeys((*FIXED_CONTROLS, *names), number)
                self._run_rung(number, names, progress)
                if number < last:
                    names = self._halved(names, number, plan.rungs[number + 1].count)
                self._write_candidates()
                is_finished = number == last or not names
                page = write_outputs(self.folder.folder, self.request, is_finished=is_finished)
                if is_finished:
                    break
        return page

    def _run_rung(self, number: int, names: Sequence[str], progress: Progress) -> None:
        """Make the pilot runs of a rung that are not on file, and put each there as soon as it has ended.

        Raises:
            InputError: dense training does not lower the loss.
        """
        rung = self.stored.plan.rungs[number]
        steps = self._shortened(rung.steps, number)
        bases = {seed: self._base_rows(seed) for seed in rung.seeds}
        tasks = [
            self._task(name, seed, number, steps)
            for seed in rung.seeds
            for name in (*FIXED_CONTROLS, *names)
            if not len(self.log.rows_of(name, seed, number))
        ]
        self._check_learning(number, bases)
        for task, outcome in self.pool.run(tasks, lambda task: task.name not in self._dropped):
            if isinstance(outcome, PilotFailure):
                self._drop(task, outcome.reason)
            elif task.name not in self._dropped:
                self.log.add(task, outcome, loss_per_label(bases[task.seed]))
            progress.update()
            if task.name == DENSE:
                self._check_learning(number, bases)

    def _task(self, name: str, seed: int, number: int, steps: int, factor: float | None = None) -> PilotTask:
        """Return a pilot run, with the learning rate times ``factor``, or else the one that was chosen, if one was."""
        candidate = next(candidate for candidate in self.candidates if candidate.name == name)
        config = self.runs.configured(
            candidate, seed=seed, steps=self._costs[name].steps(steps), train_rows=self.stored.train_rows,
            eval_rows=self.stored.plan.eval_rows,
        )  # fmt: skip
        if factor is not None:
            config = config.replace(lr=config.lr * factor)
        elif number == len(self.stored.plan.rungs) - 1 and (best := self.learning_rates.best(name)) is not None:
            config = config.replace(lr=best)
        return PilotTask(name, seed, number, config, self._costs[name].seconds(steps))

    def _tune(self, names: Sequence[str], progress: Progress) -> None:
        """Try the learning rates of all that run in the last rung; that of the search has run in the one before."""
        last, seed = len(self.stored.plan.rungs) - 1, self.request.seeds[0]
        earlier = {name: self.log.pilot(name, seed, last - 1) for name in (*FIXED_CONTROLS, *names)}
        dense = earlier[DENSE]
        steps = self._shortened(self.stored.plan.tuning.steps, last) if dense is None else int(dense["steps"])
        for name, pilot in earlier.items():
            lr = self._task(name, seed, last, steps, 1.0).config.lr
            if pilot is not None and self.learning_rates.loss(name, lr) is None:
                self.learning_rates.add(name, lr, int(pilot["steps"]), float(pilot["loss"]))
        tasks = [self._task(name, seed, last, steps, factor) for name in earlier for factor in LR_FACTORS]
        self.learning_rates.try_all(self.pool, tasks, progress.update)

    def _check_learning(self, number: int, bases: Mapping[int, pd.DataFrame]) -> None:
        """Raise where dense training, if it has run, does not lower the held-out loss by two standard errors."""
        seed = self.request.seeds[0]
        pilot = self.log.pilot(DENSE, seed, number)
        if pilot is not None:
            _check_learning(bases[seed], self.log.rows_of(DENSE, seed, number), int(pilot["steps"]))

    def _shortened(self, steps: int, number: int) -> int:
        """Return the steps of a rung: fewer than planned where the pilot runs before it took longer than planned."""
        earlier = self.log.pilots[self.log.pilots["rung"] < number]
        planned = sum(self._costs[name].step_s * count for name, count in zip(earlier["candidate"], earlier["steps"]))
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
        self.log.forget_later(task)

    def _base_rows(self, seed: int) -> pd.DataFrame:
        """Return the held-out rows before training; those of a language model are the same for every seed."""
        seed = self.request.seeds[0] if self.runs.is_causal else seed
        if not len(self.log.rows_of(BASE, seed, -1)):
            config = self.runs.configured(
                self.candidates[0], seed=seed, steps=1, train_rows=self.stored.train_rows,
                eval_rows=self.stored.plan.eval_rows,
            )  # fmt: skip
            self.log.add_base(seed, self.runs.untrained(config))
        return self.log.rows_of(BASE, seed, -1)

    # --- comparing

    def _halved(self, names: Sequence[str], number: int, count: int) -> list[str]:
        """Return the candidates of the next rung, and note why the others are none."""
        standings = [row for row in self._standings(number) if row.name in names]
        dense = loss_per_label(self.log.rows_of(DENSE, self.request.seeds[0], number))
        survivor_names, reasons = survivors(standings, count, self.request.tolerance, dense)
        self._dropped |= reasons
        return [name for name in names if name in survivor_names]

    def _standings(self, number: int) -> list[Standing]:
        """Return the standing of each candidate of a rung that ran with all of its seeds."""
        rung = self.log.rows[self.log.rows["rung"] == number]
        ratios = time_ratios(self._costs, self.stored.plan)
        losses: dict[str, Any] = {}
        seeds = rung["seed"].nunique()
        for name, rows in rung.groupby("candidate", sort=False):
            if rows["seed"].nunique() == seeds:
                losses[str(name)] = np.mean([part["loss"].to_numpy() for _, part in rows.groupby("seed")], axis=0)
        counts = self.log.rows_of(DENSE, self.request.seeds[0], number)["labels"].to_numpy(np.float64)
        controls = {c.share: losses[c.name] for c in self.candidates if c.is_fixed}
        names = [name for name in losses if name not in FIXED_CONTROLS]
        return [standing(name, losses[name], counts, controls, ratios[name]) for name in names]

    def _write_candidates(self) -> None:
        rows = [
            {"candidate": c.name, "settings": json.dumps(dict(c.settings)), "lr": self._lr(c), "control": c.is_control,
             "stage": self.stages.get(c.name), "reason": c.reason}
            for c in left_out(self.candidates, self._dropped)
        ]  # fmt: skip
        write_csv(self.folder.path(CANDIDATES), pd.DataFrame(rows).astype({"stage": "Int64"}))

    def _lr(self, candidate: Candidate) -> float:
        """Return the learning rate of a candidate's last pilot runs, or of its next ones."""
        best = self.learning_rates.best(candidate.name)
        return float(candidate.settings.get("lr", self._config.lr)) if best is None else best


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
