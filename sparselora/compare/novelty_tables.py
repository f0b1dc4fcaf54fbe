"""Compare runs whose backward passes were gated: what each arm skipped, and what that cost in loss.

An arm is the runs of one configuration. Every run is read along its evaluations: updates done by then, tokens seen
and trained on, seconds of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sparselora.compare.runs import ACCEPT_ALL, DRAWS, UNGATED, Comparison, Group, Run, row_differences
from sparselora.errors import InputError
from sparselora.numerics.stats import compare_paired, holm, mean_interval, paired_bootstrap
from sparselora.runs.folder import read_table

MARGIN_PCT = 0.5
"""How far an arm's loss may be from the baseline's, in percent of it, to be called the same."""
YES, NO, UNDECIDED, NOT_GATED = "yes", "no", "undecided", "no gating happened"
"""What a verdict can be; empty for the baseline, and where there is nothing to compare with."""

SPENT = ("accepted_steps", "tokens_seen", "tokens_trained", "wall_s")
"""What a run has spent by a step. ``wall_s`` are seconds of training, evaluations left out where that is known."""
_DECISION = ("step", "accept", "acceptance_rate", "novelty", "threshold", "loss")
_OUTCOMES = ("final_loss", "best_loss", "final_accuracy", "best_accuracy")
_SETTINGS = {"unit": "unit", "k": "k", "m": "m", "k_topk": "k_topk", "beta": "target_novelty_scaler",
             "novelty_ema_rate": "novelty_ema_rate", "burn_in": "burn_in"}  # fmt: skip
"""Columns of the table, and the settings of the gate that they hold."""
_BINS = 40


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """One run in time.

    Attributes:
        spent: a row a step, columns ``step`` and `SPENT`; NaN where the run did not record it.
        evaluations: a row an evaluation, columns ``step``, `SPENT`, ``loss``, ``accuracy``.
        decisions: the rows of gate.csv; None of a run without a gate.
    """

    run: Run
    spent: pd.DataFrame
    evaluations: pd.DataFrame
    decisions: pd.DataFrame | None

    @property
    def gated_decisions(self) -> int:
        """Decisions after burn-in."""
        return int(self.run.summary.get("gated_decisions", 0))

    def outcome(self, name: str) -> float:
        """One of ``final_loss``, ``best_loss``, ``final_accuracy``, ``best_accuracy``; best of all evaluations."""
        moment, column = name.split("_")
        values = self.evaluations[column]
        if moment == "final":
            return float(values.iloc[-1])
        return float(values.min() if column == "loss" else values.max())

    def loss_at(self, spent: str, value: float) -> float:
        """The evaluation loss when ``spent`` was ``value``, linear between evaluations; NaN before the first one and
        after the last."""
        points = self.evaluations[[spent, "loss"]].dropna().drop_duplicates(spent)
        if points.empty:
            return float("nan")
        return float(np.interp(value, points[spent], points["loss"], left=np.nan, right=np.nan))


@dataclass(frozen=True)
class Arm:
    """The courses of one configuration, by seed."""

    label: str
    policy: str
    courses: dict[int, Course]

    @property
    def gated(self) -> bool:
        return self.policy != UNGATED

    @property
    def target_rate(self) -> float:
        """The rate of acceptance that was asked for; NaN where none was."""
        return float(self._first.summary.get("target_rate", float("nan")))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its gate, by the columns of the table; None where it has none."""
        return {column: self._first.gate.get(name) for column, name in _SETTINGS.items()}

    @property
    def _first(self) -> Run:
        return next(iter(self.courses.values())).run

    def each(self, seeds: Sequence[int], name: str) -> list[float]:
        """By seed: an outcome, or what was spent by the end."""
        courses = [self.courses[seed] for seed in seeds]
        if name in _OUTCOMES:
            return [course.outcome(name) for course in courses]
        return [float(course.spent[name].iloc[-1]) for course in courses]


@dataclass(frozen=True)
class GateStudy:
    """The arms, the baseline among them, and notes on what limits the comparison."""

    arms: list[Arm]
    baseline: Arm
    notes: list[str]

    @property
    def has_verdict(self) -> bool:
        """Whether the baseline skips nothing, so that it makes sense to speak of fewer steps than it."""
        return self.baseline.policy in (UNGATED, ACCEPT_ALL)


def holds_gated_runs(comparison: Comparison) -> bool:
    return any(run.policy != UNGATED for group in comparison.groups for run in group.runs.values())


def read_gates(comparison: Comparison) -> GateStudy:
    """The courses of all runs of ``comparison``.

    Raises:
        InputError: a run without its eval.csv, a gated one without its gate.csv, or either without its columns.
    """
    arms = [_arm(group) for group in comparison.groups]
    baseline = next(arm for arm in arms if arm.label == comparison.baseline.label)
    return GateStudy(arms, baseline, _notes(arms))


def _arm(group: Group) -> Arm:
    courses = {seed: _course(run) for seed, run in group.runs.items()}
    return Arm(group.label, next(iter(group.runs.values())).policy, courses)


def _course(run: Run) -> Course:
    evaluations = _read(run, "eval.csv", ("step", "loss", "accuracy")).sort_values("step", ignore_index=True)
    decisions = None if run.policy == UNGATED else _read(run, "gate.csv", (*_DECISION, *SPENT))
    spent = _spent(run, decisions)
    at = pd.merge_asof(evaluations.astype({"step": "int64"}), spent, on="step")
    at.loc[at["step"] == 0, list(SPENT)] = 0.0
    return Course(run, spent, at, decisions)


def _read(run: Run, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """The table ``name`` of a run; it must have ``columns``, and a row."""
    again = "run it again with --overwrite, or leave it out"
    if not (run.path / name).exists():
        raise InputError(f"run {run.path} (policy {run.policy}) has no {name}; {again}")
    try:
        table = read_table(run.path / name, columns)
    except InputError as error:
        raise InputError(f"{run.path / name} cannot be read ({error}); {again}") from None
    if table.empty:
        raise InputError(f"{run.path / name} has no rows; {again}")
    return table


def _spent(run: Run, decisions: pd.DataFrame | None) -> pd.DataFrame:
    """What a run had spent by the end of each step."""
    metrics = _metrics(run)
    if decisions is not None:
        spent = decisions.groupby("step", as_index=False)[list(SPENT)].last()
        seconds = _seconds(metrics)
        # gate.csv's clock runs on through evaluations, the one of the steps does not: the latter where both are.
        if seconds is not None and set(spent["step"]) <= set(seconds.index):
            spent["wall_s"] = seconds.loc[spent["step"]].to_numpy()
    elif metrics is not None:
        tokens = metrics["tokens"].cumsum()
        spent = pd.DataFrame({"step": metrics["step"], "accepted_steps": metrics["step"], "tokens_seen": tokens,
                              "tokens_trained": tokens, "wall_s": metrics["step_ms"].cumsum() / 1000})  # fmt: skip
    else:
        steps = np.arange(1, int(run.summary["steps"]) + 1)
        spent = pd.DataFrame({"step": steps, "accepted_steps": steps}).reindex(columns=["step", *SPENT])
    return spent.astype({"step": "int64"} | dict.fromkeys(SPENT, "float64"))


def _metrics(run: Run) -> pd.DataFrame | None:
    """metrics.csv; None where it is not there: committed runs leave it out for its size."""
    return _read(run, "metrics.csv", ("step", "tokens", "step_ms")) if (run.path / "metrics.csv").is_file() else None


def _seconds(metrics: pd.DataFrame | None) -> pd.Series | None:
    """Seconds of training by step, evaluations and waiting for data left out."""
    return None if metrics is None else metrics.set_index("step")["step_ms"].cumsum() / 1000


def _notes(arms: Sequence[Arm]) -> list[str]:
    courses = [course for arm in arms for course in arm.courses.values()]
    notes = []
    timed = [(course.run.path / "metrics.csv").is_file() for course in courses]
    if not all(timed):
        names = ", ".join(course.run.path.name for course, has in zip(courses, timed) if not has)
        notes.append(f"No metrics.csv in {names}: seconds are gate.csv's, evaluations included, or not known.")
    early = [c.run.path.name for c in courses if c.run.policy not in (UNGATED, ACCEPT_ALL) and c.gated_decisions == 0]
    if early:
        notes.append(f"Ended inside the burn-in, so nothing was gated: {', '.join(early)}.")
    if all(len(course.evaluations) < 2 for course in courses):
        notes.append("Every run was evaluated once, at its end; train with eval_steps to read the baseline elsewhere.")
    return notes


# --- tables -------------------------------------------------------------------------------------------------------


def gate_table(study: GateStudy, seed: np.random.SeedSequence) -> pd.DataFrame:
    """A row an arm, the baseline first.

    Columns: ``config``, ``policy``, ``target_rate``, settings of the gate; means over seeds of `SPENT`, of
    ``fewer_steps_pct`` (than the baseline's, by seed), ``acceptance_rate`` and ``gated_decisions`` (after burn-in) and
    of the four outcomes. Of each outcome ``…_difference`` is arm minus baseline over the ``n_pairs`` seeds that both
    have, with a paired t interval and p; ``row_difference`` is that of the final loss on the same evaluation rows, with
    a bootstrap interval over rows. ``relative_pct`` is the final loss's difference in percent of the baseline's, and
    ``verdict`` what that says about `MARGIN_PCT`. ``at_steps_…`` and ``at_wall_…`` set the arm's final loss against the
    baseline's when that had done as many updates, and had trained as long; NaN with ``…_seeds`` 0 where it was not
    evaluated so early, or ended before. ``…_holm`` are adjusted over the rows.
    """
    others = [arm for arm in study.arms if arm is not study.baseline]
    children = iter(seed.spawn(len(others)))
    rows = [_described(study.baseline, study.baseline) | {"verdict": ""}]
    for arm in others:
        row = _described(arm, study.baseline) | _against(arm, study.baseline, np.random.default_rng(next(children)))
        rows.append(row | {"verdict": _verdict(arm, row) if study.has_verdict else ""})
    table = pd.DataFrame(rows)
    for name in ("final_loss_p", "final_accuracy_p", "row_p"):
        place = int(table.columns.get_indexer([name])[0]) + 1
        table.insert(place, f"{name}_holm", holm(table[name].tolist()))
    return table


def _described(arm: Arm, baseline: Arm) -> dict[str, Any]:
    seeds = list(arm.courses)
    pairs = [seed for seed in arm.courses if seed in baseline.courses]
    row: dict[str, Any] = {"config": arm.label, "policy": arm.policy, "target_rate": arm.target_rate, **arm.settings}
    row |= {"n_seeds": len(seeds), "n_pairs": len(pairs)}
    row |= {name: float(np.mean(arm.each(seeds, name))) for name in SPENT}
    ours, theirs = arm.each(pairs, "accepted_steps"), baseline.each(pairs, "accepted_steps")
    row["fewer_steps_pct"] = _mean([100 * (1 - one / two) for one, two in zip(ours, theirs)])
    courses = list(arm.courses.values())
    row["acceptance_rate"] = _mean([float(c.run.summary.get("acceptance_rate", float("nan"))) for c in courses])
    row["gated_decisions"] = _mean([float(course.gated_decisions) for course in courses])
    return row | {name: float(np.mean(arm.each(seeds, name))) for name in _OUTCOMES}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _against(arm: Arm, baseline: Arm, rng: np.random.Generator) -> dict[str, float]:
    """The columns of `gate_table` that compare an arm with the baseline."""
    seeds = [seed for seed in arm.courses if seed in baseline.courses]
    row: dict[str, float] = {}
    for name in _OUTCOMES:
        row |= _difference(name, arm.each(seeds, name), baseline.each(seeds, name))
    pairs = [(arm.courses[seed].run, baseline.courses[seed].run) for seed in seeds]
    row |= _on_rows(pairs, rng) | _relative(arm.each(seeds, "final_loss"), baseline.each(seeds, "final_loss"))
    for prefix, spent in (("at_steps", "accepted_steps"), ("at_wall", "wall_s")):
        row |= _at_equal(prefix, spent, [(arm.courses[seed], baseline.courses[seed]) for seed in seeds])
    return row


def _difference(name: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    columns = [f"{name}_{end}" for end in ("difference", "ci_low", "ci_high", "p")]
    if not ours:
        return dict.fromkeys(columns, float("nan"))
    found = compare_paired(ours, theirs)
    return dict(zip(columns, (found.mean_difference, found.ci_low, found.ci_high, found.t_p)))


def _on_rows(pairs: Sequence[tuple[Run, Run]], rng: np.random.Generator) -> dict[str, float]:
    """The difference in final loss on evaluation rows; NaN where the predictions carry none."""
    columns = ("row_difference", "row_ci_low", "row_ci_high", "row_p")
    if not pairs or not all("loss" in run.predictions for pair in pairs for run in pair):
        return {"n_rows": 0} | dict.fromkeys(columns, float("nan"))
    found = paired_bootstrap(*row_differences(pairs, "loss"), rng, draws=DRAWS)
    return {"n_rows": found.n} | dict(zip(columns, (found.mean, found.low, found.high, found.p)))


def _relative(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The mean over seeds of 100 (ours / theirs − 1), with its paired interval."""
    columns = ("relative_pct", "relative_low", "relative_high")
    if not ours:
        return dict.fromkeys(columns, float("nan"))
    found = compare_paired(np.divide(ours, theirs), np.ones(len(ours)))
    return dict(zip(columns, (100 * found.mean_difference, 100 * found.ci_low, 100 * found.ci_high)))


def _at_equal(prefix: str, spent: str, pairs: Sequence[tuple[Course, Course]]) -> dict[str, float]:
    """The arm's final loss against the baseline's at the arm's final ``spent``, over the seeds where that is known."""
    read = [
        (ours.outcome("final_loss"), theirs.loss_at(spent, float(ours.spent[spent].iloc[-1]))) for ours, theirs in pairs
    ]
    known = [(own, other) for own, other in read if not np.isnan(other)]
    row: dict[str, float] = {f"{prefix}_seeds": len(known), f"{prefix}_baseline_loss": _mean([two for _, two in known])}
    found = _difference(prefix, [own for own, _ in known], [other for _, other in known])
    return row | found


def _verdict(arm: Arm, row: Mapping[str, Any]) -> str:
    """Whether the interval of the relative difference lies inside the margin, outside of it, or neither."""
    if arm.gated and row["gated_decisions"] == 0:
        return NOT_GATED
    if row["n_pairs"] == 0:
        return ""
    low, high = row["relative_low"], row["relative_high"]
    if low > MARGIN_PCT or high < -MARGIN_PCT:
        return NO
    return YES if low >= -MARGIN_PCT and high <= MARGIN_PCT else UNDECIDED


# --- what the figures show ----------------------------------------------------------------------------------------


def loss_curves(study: GateStudy) -> pd.DataFrame:
    """A row an arm and evaluation: mean loss over seeds with a 95 % interval, mean accuracy and mean `SPENT`."""
    rows = []
    for arm in study.arms:
        every = pd.concat([course.evaluations for course in arm.courses.values()])
        for step, part in every.groupby("step"):
            loss = mean_interval(part["loss"])
            row = {"config": arm.label, "policy": arm.policy, "step": step, "n_seeds": loss.n}
            row |= {name: float(part[name].mean()) for name in SPENT}
            row |= {"loss": loss.mean, "ci_low": loss.low, "ci_high": loss.high}
            rows.append(row | {"accuracy": float(part["accuracy"].mean())})
    return pd.DataFrame(rows)


def gate_behaviour(study: GateStudy) -> pd.DataFrame:
    """A row a gated arm and stretch of steps, of which there are at most forty: means over its decisions and the seeds.

    ``step`` is the last of the stretch, ``accepted_share`` what was accepted in it, ``acceptance_rate`` what was
    accepted since burn-in; ``novelty``, ``threshold`` and ``loss`` as in gate.csv, NaN where the policy has none.
    """
    tables = [_stretches(arm) for arm in study.arms if arm.gated]
    return pd.concat(tables, ignore_index=True)


def _stretches(arm: Arm) -> pd.DataFrame:
    decisions = [course.decisions for course in arm.courses.values() if course.decisions is not None]
    every = pd.concat(decisions)
    width = max(1, -(-int(every["step"].max()) // _BINS))
    stretch = (every["step"].astype("int64") - 1) // width
    means = every.groupby(stretch)[list(_DECISION)].mean().rename(columns={"accept": "accepted_share"})
    means["step"] = every.groupby(stretch)["step"].max()
    means.insert(1, "decisions", every.groupby(stretch).size())
    front = {"config": arm.label, "policy": arm.policy, "target_rate": arm.target_rate, "n_seeds": len(decisions)}
    return pd.concat([pd.DataFrame(front, index=means.index), means], axis=1).reset_index(drop=True)
