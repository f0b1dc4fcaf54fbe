"""Runs of `train` with a novelty gate: what each configuration skipped, what that cost in loss, and the report on it.

Every run is read along its evaluations: updates done by then, tokens seen and trained on, seconds of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.compare.pairing import NAN, add_holm, bootstrap_items, compare_values, pair_by_seed
from sparselora.compare.runs import ComparisonReport, Group, PairedValues
from sparselora.compare.training_runs import ACCEPT_ALL, DRAWS, ENDPOINTS, UNGATED, TrainingComparison, TrainingRun
from sparselora.config.contrasts import Contrast
from sparselora.errors import InputError
from sparselora.novelty.manipulation import COLUMNS, LEAST_AUC
from sparselora.numerics.stats import PairedComparison, bootstrap_draws, is_bootstrap_floor, mean_interval
from sparselora.report.markdown import markdown_table, number, p_value, with_interval
from sparselora.runs.files import read_table

MARGIN_PCT = 0.5
"""The largest difference of a loss from the baseline's, in percent of it, that is called the same."""
YES, NO, UNDECIDED, NOT_GATED = "yes", "no", "undecided", "no gating happened"
"""The verdicts; empty for the baseline, and where there is nothing to compare with."""

SPENT = ("accepted_steps", "tokens_seen", "tokens_trained", "wall_s")
"""The expense of a run by a step. ``wall_s`` are seconds of training, evaluations left out where that is known."""
_DECISION = ("step", "accept", "acceptance_rate", "novelty", "threshold", "loss")
_OUTCOMES = ("final_loss", "best_loss", "final_accuracy", "best_accuracy")
_SETTINGS = {"unit": "unit", "k": "k", "m": "m", "k_topk": "k_topk", "beta": "target_novelty_scaler",
             "novelty_ema_rate": "novelty_ema_rate", "burn_in": "burn_in"}  # fmt: skip
"""Columns of the table, and the settings of the novelty gate that they hold."""
_BINS = 40

Row = Mapping[str, Any]


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GatedRun(TrainingRun):
    """A run in time; its metrics are also its outcomes (final and best loss and accuracy) and `SPENT` at its end.

    Attributes:
        evaluations: a row per evaluation, columns ``step``, `SPENT` (NaN where not recorded), ``loss``, ``accuracy``.
        decisions: the rows of gate.csv; None of a run without a novelty gate.
    """

    evaluations: pd.DataFrame
    decisions: pd.DataFrame | None

    def loss_at(self, spent: str, value: float) -> float:
        """Return the evaluation loss when ``spent`` was ``value``, linear between evaluations; NaN before the first
        one and after the last."""
        points = self.evaluations[[spent, "loss"]].dropna().drop_duplicates(spent)
        if points.empty:
            return NAN
        return float(np.interp(value, points[spent], points["loss"], left=np.nan, right=np.nan))


Arm = Group[GatedRun]


@dataclass(frozen=True)
class GatedComparison:
    """Runs with novelty gates and the runs that they are compared with.

    Attributes:
        training: the same runs as runs of `train`.
        arms: a group per configuration, the baseline among them.
        notes: sentences on what limits the comparison of novelty gates.
    """

    training: TrainingComparison
    arms: Sequence[Arm]
    baseline: Arm
    notes: Sequence[str]

    @property
    def default_folder(self) -> Path:
        return self.training.default_folder

    @property
    def baseline_label(self) -> str:
        return self.baseline.label

    @property
    def outputs(self) -> list[str]:
        return [*self.training.outputs, *OUTPUTS]

    @property
    def inputs(self) -> list[Path]:
        return self.training.inputs

    @property
    def files(self) -> list[Path]:
        return self.training.files

    def paired_values(self, contrast: Contrast) -> PairedValues:
        """Return the values by seed, as of any runs of `train`."""
        return self.training.paired_values(contrast)

    def report(self, seed: int) -> ComparisonReport:
        """Compare every arm with the baseline as runs of `train`, then as gated ones."""
        training, gated = self.training.report(seed), gate_report(self, self.training.title, seed)
        return ComparisonReport(
            training.title,
            f"{training.how_to_read}\n\nOf runs with a gate:\n\n{gated.how_to_read}",
            f"{training.text}\n{gated.text}",
            {**training.tables, **gated.tables},
            {**training.figures, **gated.figures},
        )

    @property
    def has_verdict(self) -> bool:
        """True if the baseline skips nothing, so that "fewer steps than it" has a meaning."""
        return policy_of(self.baseline) in (UNGATED, ACCEPT_ALL)


def policy_of(arm: Arm) -> str:
    return next(iter(arm.runs.values())).policy


def has_gated_runs(comparison: TrainingComparison) -> bool:
    return any(run.policy != UNGATED for run in comparison.runs)


def read_gated_runs(comparison: TrainingComparison) -> GatedComparison:
    """Read the course of all runs of ``comparison``.

    Raises:
        InputError: a run without its eval.csv, a gated one without its gate.csv, or either without its columns.
    """
    arms = [
        Group(group.label, {seed: _gated_run(run) for seed, run in group.runs.items()}) for group in comparison.groups
    ]
    baseline = next(arm for arm in arms if arm.label == comparison.baseline.label)
    return GatedComparison(comparison, arms, baseline, _notes(arms))


def _gated_run(run: TrainingRun) -> GatedRun:
    evaluations = _read(run, "eval.csv", ("step", "loss", "accuracy")).sort_values("step", ignore_index=True)
    decisions = None if run.policy == UNGATED else _read(run, "gate.csv", (*_DECISION, *SPENT))
    spent = _spent(run, decisions)
    course = pd.merge_asof(evaluations.astype({"step": "int64"}), spent, on="step")
    course.loc[course["step"] == 0, list(SPENT)] = 0.0
    losses, accuracies = course["loss"], course["accuracy"]
    metrics = {"acceptance_rate": NAN, "gated_decisions": 0, **dict.fromkeys(COLUMNS, NAN), **run.metrics}
    metrics |= {"final_loss": float(losses.iloc[-1]), "best_loss": float(losses.min())}
    metrics |= {"final_accuracy": float(accuracies.iloc[-1]), "best_accuracy": float(accuracies.max())}
    metrics |= {name: float(spent[name].iloc[-1]) for name in SPENT}
    return GatedRun(run.path, run.config, run.seed, metrics, run.items, run.device, run.is_idle, course, decisions)


def _read(run: TrainingRun, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """Read the table ``name`` of a run; it must have ``columns``, and a row."""
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


def _spent(run: TrainingRun, decisions: pd.DataFrame | None) -> pd.DataFrame:
    """Return the expense of a run by the end of each step."""
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
        steps = np.arange(1, int(run.metrics["steps"]) + 1)
        spent = pd.DataFrame({"step": steps, "accepted_steps": steps}).reindex(columns=["step", *SPENT])
    return spent.astype({"step": "int64"} | dict.fromkeys(SPENT, "float64"))


def _metrics(run: TrainingRun) -> pd.DataFrame | None:
    """Read metrics.csv; None where it is not there: committed runs leave it out for its size."""
    return _read(run, "metrics.csv", ("step", "tokens", "step_ms")) if (run.path / "metrics.csv").is_file() else None


def _seconds(metrics: pd.DataFrame | None) -> pd.Series | None:
    """Return seconds of training by step, evaluations and waiting for data left out."""
    return None if metrics is None else metrics.set_index("step")["step_ms"].cumsum() / 1000


def _notes(arms: Sequence[Arm]) -> list[str]:
    runs = [run for arm in arms for run in arm.runs.values()]
    notes = []
    untimed = [run.path.name for run in runs if not (run.path / "metrics.csv").is_file()]
    if untimed:
        notes.append(
            f"No metrics.csv in {', '.join(untimed)}: seconds are gate.csv's, evaluations included, or not known."
        )
    early = [r.path.name for r in runs if r.policy not in (UNGATED, ACCEPT_ALL) and r.metrics["gated_decisions"] == 0]
    if early:
        notes.append(f"Ended inside the burn-in, so nothing was gated: {', '.join(early)}.")
    blind = [run.path.name for run in runs if run.metrics["choice_auc"] < LEAST_AUC]
    if blind:
        notes.append(
            f"The gate did not choose in {', '.join(blind)}: the AUC of novelty, accepted against rejected batches, is "
            f"below {LEAST_AUC:g}. Read such a run as one of random skipping, not as a test of novelty."
        )
    if all(len(run.evaluations) < 2 for run in runs):
        notes.append("Every run was evaluated once, at its end; train with eval_steps to read the baseline elsewhere.")
    return notes


# --- tables -------------------------------------------------------------------------------------------------------


def gate_table(comparison: GatedComparison, seed: np.random.SeedSequence, family: int | None = None) -> pd.DataFrame:
    """Return a row per arm, the baseline first.

    Columns: ``config``, ``policy``, ``target_rate``, settings of the novelty gate; means over seeds of `SPENT`, of
    ``fewer_steps_pct`` (than the baseline's, by seed), ``acceptance_rate`` and ``gated_decisions`` (after burn-in), the
    AUCs of the manipulation check and of the four outcomes. Of each outcome ``…_difference`` is arm minus baseline over
    the ``n_pairs`` seeds that both have, with a paired t interval and p; ``row_difference`` is that of the final loss
    on the same evaluation rows, with a bootstrap interval over rows. ``relative_pct`` is the final loss's difference in
    percent of the baseline's, and ``verdict`` what that says about `MARGIN_PCT`. ``at_steps_…`` and ``at_wall_…`` set
    the arm's final loss against the baseline's when that had done as many updates, and had trained as long; NaN with
    ``…_seeds`` 0 where it was not evaluated so early, or ended before. ``…_holm`` are adjusted over the rows.
    """
    baseline = comparison.baseline
    others = [arm for arm in comparison.arms if arm is not baseline]
    children, draws = seed.spawn(len(others)), bootstrap_draws(len(others), DRAWS)
    rows = [_described(baseline, baseline) | {"verdict": ""}]
    for arm, child in zip(others, children):
        row = _described(arm, baseline) | _against(arm, baseline, np.random.default_rng(child), draws)
        rows.append(row | {"verdict": _verdict(arm, baseline, row, len(others)) if comparison.has_verdict else ""})
    table = pd.DataFrame(rows)
    add_holm(table, ("final_loss_p", "final_accuracy_p", "row_p"), next_to_raw=True)
    return table


def _described(arm: Arm, baseline: Arm) -> dict[str, Any]:
    first, pairs = next(iter(arm.runs.values())), pair_by_seed(arm, baseline)
    row: dict[str, Any] = {"config": arm.label, "policy": first.policy}
    row |= {"target_rate": float(first.metrics.get("target_rate", NAN))}
    row |= {column: first.novelty_gate.get(name) for column, name in _SETTINGS.items()}
    if row["beta"] is None:  # the gate took it from its burn-in
        row["beta"] = _mean(arm.values("novelty_beta"))
    row |= {"n_seeds": len(arm.runs), "n_pairs": len(pairs)}
    row |= {name: float(np.mean(arm.values(name))) for name in SPENT}
    accepted = [(run.metrics["accepted_steps"], base.metrics["accepted_steps"]) for run, base in pairs]
    row["fewer_steps_pct"] = _mean([100 * (1 - steps / of_baseline) for steps, of_baseline in accepted])
    check = ("choice_auc", "duplicate_auc")
    return row | {name: _mean(arm.values(name)) for name in ("acceptance_rate", "gated_decisions", *check, *_OUTCOMES)}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else NAN


def _against(arm: Arm, baseline: Arm, rng: np.random.Generator, draws: int) -> dict[str, float]:
    """Return the columns of `gate_table` that compare an arm with the baseline."""
    pairs = pair_by_seed(arm, baseline)
    row: dict[str, float] = {}
    for name in _OUTCOMES:
        first, second = ([run.metrics[name] for run in side] for side in _sides(pairs))
        difference = compare_values(first, second)
        row |= _difference_columns(name, difference)
    by_row = bootstrap_items(pairs, ENDPOINTS["loss"], rng, draws)
    row |= {"n_rows": by_row.n, "row_difference": by_row.mean}
    row |= {"row_ci_low": by_row.low, "row_ci_high": by_row.high}
    row |= {"row_draws": draws if by_row.n else 0, "row_p": by_row.p}
    relative = _relative_difference(pairs)
    row |= {"relative_pct": 100 * relative.mean_difference}
    row |= {"relative_low": 100 * relative.ci_low, "relative_high": 100 * relative.ci_high}
    for prefix, spent in (("at_steps", "accepted_steps"), ("at_wall", "wall_s")):
        row |= _at_equal(prefix, spent, pairs)
    return row


def _sides(pairs: Sequence[tuple[GatedRun, GatedRun]]) -> tuple[list[GatedRun], list[GatedRun]]:
    return [run for run, _ in pairs], [base for _, base in pairs]


def _difference_columns(name: str, difference: PairedComparison) -> dict[str, float]:
    return {
        f"{name}_difference": difference.mean_difference,
        f"{name}_ci_low": difference.ci_low,
        f"{name}_ci_high": difference.ci_high,
        f"{name}_p": difference.t_p,
    }


def _at_equal(prefix: str, spent: str, pairs: Sequence[tuple[GatedRun, GatedRun]]) -> dict[str, float]:
    """Set the arm's final loss against the baseline's at the arm's final ``spent``, over the seeds where that is
    known."""
    losses = [(run.metrics["final_loss"], base.loss_at(spent, run.metrics[spent])) for run, base in pairs]
    reached = [(loss, of_baseline) for loss, of_baseline in losses if not np.isnan(of_baseline)]
    baseline_losses = [of_baseline for _, of_baseline in reached]
    row: dict[str, float] = {f"{prefix}_seeds": len(reached), f"{prefix}_baseline_loss": _mean(baseline_losses)}
    return row | _difference_columns(prefix, compare_values([loss for loss, _ in reached], baseline_losses))


def _relative_difference(pairs: Sequence[tuple[GatedRun, GatedRun]], confidence: float = 0.95) -> PairedComparison:
    """Compare the final losses, as fractions of the baseline's, with 1."""
    losses, of_baseline = ([run.metrics["final_loss"] for run in side] for side in _sides(pairs))
    return compare_values(np.divide(losses, of_baseline), np.ones(len(losses)), confidence)


def _verdict(arm: Arm, baseline: Arm, row: Row, arms: int) -> str:
    """Say whether the interval of the relative difference lies inside the margin, outside of it, or neither.

    The interval is as wide as it must be for all the ``arms`` to be covered together 95 times in 100 (Bonferroni).
    """
    if policy_of(arm) != UNGATED and row["gated_decisions"] == 0:
        return NOT_GATED
    if row["n_pairs"] == 0:
        return ""
    interval = _relative_difference(pair_by_seed(arm, baseline), 1 - 0.05 / arms)
    low, high = 100 * interval.ci_low, 100 * interval.ci_high
    if low > MARGIN_PCT or high < -MARGIN_PCT:
        return NO
    return YES if low >= -MARGIN_PCT and high <= MARGIN_PCT else UNDECIDED


# --- what the figures show ----------------------------------------------------------------------------------------


def loss_curves(comparison: GatedComparison) -> pd.DataFrame:
    """Return a row per arm and evaluation: mean loss over seeds with a 95 % interval, mean accuracy, mean `SPENT`."""
    rows = []
    for arm in comparison.arms:
        evaluations = pd.concat([run.evaluations for run in arm.runs.values()])
        for step, part in evaluations.groupby("step"):
            loss = mean_interval(part["loss"])
            row = {"config": arm.label, "policy": policy_of(arm), "step": step, "n_seeds": loss.n}
            row |= {name: float(part[name].mean()) for name in SPENT}
            row |= {"loss": loss.mean, "ci_low": loss.low, "ci_high": loss.high}
            rows.append(row | {"accuracy": float(part["accuracy"].mean())})
    return pd.DataFrame(rows)


def gate_behaviour(comparison: GatedComparison) -> pd.DataFrame:
    """Return a row per gated arm and stretch of steps, at most forty stretches: means over its decisions and the seeds.

    ``step`` is the last of the stretch, ``accepted_share`` what was accepted in it, ``acceptance_rate`` what was
    accepted since burn-in; ``novelty``, ``threshold`` and ``loss`` as in gate.csv, NaN where the policy has none.
    """
    tables = [_stretches(arm) for arm in comparison.arms if policy_of(arm) != UNGATED]
    return pd.concat(tables, ignore_index=True)


def _stretches(arm: Arm) -> pd.DataFrame:
    by_seed = [run.decisions for run in arm.runs.values() if run.decisions is not None]
    decisions = pd.concat(by_seed)
    width = max(1, -(-int(decisions["step"].max()) // _BINS))
    stretch = (decisions["step"].astype("int64") - 1) // width
    means = decisions.groupby(stretch)[list(_DECISION)].mean().rename(columns={"accept": "accepted_share"})
    means["step"] = decisions.groupby(stretch)["step"].max()
    means.insert(1, "decisions", decisions.groupby(stretch).size())
    first = next(iter(arm.runs.values()))
    front = {"config": arm.label, "policy": first.policy, "target_rate": float(first.metrics.get("target_rate", NAN))}
    front |= {"n_seeds": len(by_seed)}
    return pd.concat([pd.DataFrame(front, index=means.index), means], axis=1).reset_index(drop=True)


# --- the report ---------------------------------------------------------------------------------------------------

OUTPUTS = ("gate.csv", "gate_loss.png", "gate_loss.csv", "gate_behaviour.png", "gate_behaviour.csv")

HOW_TO_READ = f"""\
An *accepted step* is an update of the weights; a gate skips the backward pass of the other steps. *Tokens trained* are
those of accepted batches. Seconds are those of the training steps; evaluations are left out.

- **rate**: the share accepted after burn-in, and in brackets the target. **best**: the best of all evaluations.
- **AUC**: of the novelty of accepted against rejected batches (0.5: the gate chose at random; below {LEAST_AUC:g} a run
  is no test of novelty), and in brackets that of original batches against planted near-duplicates.
- **difference** and its p are of the final evaluation, as above; the p values are adjusted by Holm over the rows.
- **at equal accepted steps**, **at equal wall clock**: the arm's final loss against the baseline's when that had done
  as many updates, and had trained for as long, linear between its evaluations. *Not reached*: the baseline was not
  evaluated so early, or had ended by then. There the baseline is in the middle of its schedule, its learning rate not
  yet down, which favours the arm.
- **Verdict**: *yes* if the interval over seeds of the loss's relative difference lies within ±{MARGIN_PCT:g} %, *no*
  if it lies outside, else *undecided*. For this the 95 % interval is widened so that those of all arms hold together.
  Positive is a higher loss than the baseline's.
- A median step says little of a run that skips: of gated runs read *wall clock* here, not *speed-up* above."""


def gate_report(comparison: GatedComparison, title: str, seed: int) -> ComparisonReport:
    """Compare every arm with the baseline: the sections that follow those of the training runs."""
    from sparselora.report import novelty

    # A stream of its own: the draws of the comparison of training runs are the same with and without novelty gates.
    table = gate_table(comparison, np.random.SeedSequence([seed, 1]))
    rows = table.to_dict("records")
    baseline = comparison.baseline.label
    others = [row for row in rows if row["config"] != baseline]
    parts = [
        f"## Gated steps, baseline {baseline}",
        "What each arm did, means over seeds (loss in nats):",
        _arms_table(rows),
        f"Final evaluation minus that of {baseline}:",
        _differences_table(others),
        "Final loss against the baseline's at the same expense:",
        _equal_table(others, comparison),
        _verdicts(others, comparison),
        *comparison.notes,
    ]
    figures = {
        "gate_loss.png": partial(novelty.gate_loss, loss_curves(comparison), title=title),
        "gate_behaviour.png": partial(novelty.gate_behaviour, gate_behaviour(comparison), title=title),
    }
    return ComparisonReport("Gated steps", HOW_TO_READ, "\n\n".join(parts) + "\n", {"gate.csv": table}, figures)


def _arms_table(rows: Sequence[Row]) -> str:
    header = [
        "config",
        "seeds",
        "k",
        "β",
        "burn-in",
        "rate",
        "AUC",
        "accepted steps",
        "fewer",
        "tokens trained",
        "wall clock",
    ]
    header += ["loss", "best loss", "accuracy", "best accuracy"]
    lines = []
    for row in rows:
        line = [row["config"], str(row["n_seeds"]), *(_setting(row[name]) for name in ("k", "beta", "burn_in"))]
        line += [_rate(row), _checked(row), f"{row['accepted_steps']:.0f}", _unit(row["fewer_steps_pct"], ".1f", "%")]
        line += [_tokens(row["tokens_trained"], row["tokens_seen"]), _unit(row["wall_s"], ".1f", "s")]
        line += [f"{row[name]:.4f}" for name in ("final_loss", "best_loss", "final_accuracy", "best_accuracy")]
        lines.append(line)
    return markdown_table(header, lines)


def _setting(value: Any) -> str:
    return "" if value is None or value != value else f"{value:g}"


def _rate(row: Row) -> str:
    target = number(row["target_rate"], "g")
    return number(row["acceptance_rate"], ".3f") + (f" ({target})" if target else "")


def _checked(row: Row) -> str:
    """The manipulation check, and behind it the AUC of originals against planted duplicates."""
    duplicates = number(row["duplicate_auc"], ".2f")
    return number(row["choice_auc"], ".2f") + (f" ({duplicates})" if duplicates else "")


def _tokens(trained: float, seen: float) -> str:
    return "not recorded" if math.isnan(trained) else f"{trained:,.0f} of {seen:,.0f}"


def _unit(value: float, form: str, unit: str) -> str:
    return "not recorded" if math.isnan(value) else f"{value:{form}} {unit}"


def _differences_table(rows: Sequence[Row]) -> str:
    header = ["config", "seeds", "loss", "t p (Holm)", "loss on rows", "bootstrap p (Holm)", "accuracy"]
    header += ["t p (Holm)", "best loss"]
    lines = []
    for row in rows:
        line = [row["config"], str(row["n_pairs"]), _interval(row, "final_loss"), p_value(row["final_loss_p_holm"])]
        line += [with_interval(row["row_difference"], row["row_ci_low"], row["row_ci_high"])]
        is_floor = is_bootstrap_floor(row["row_p"], row["row_draws"])
        line += [
            p_value(row["row_p_holm"], is_floor=is_floor),
            _interval(row, "final_accuracy"),
            p_value(row["final_accuracy_p_holm"]),
        ]
        lines.append([*line, _interval(row, "best_loss")])
    return markdown_table(header, lines)


def _interval(row: Row, name: str) -> str:
    return with_interval(row[f"{name}_difference"], row[f"{name}_ci_low"], row[f"{name}_ci_high"])


def _equal_table(rows: Sequence[Row], comparison: GatedComparison) -> str:
    header = ["config", "loss", "baseline at equal accepted steps", "difference"]
    header += ["baseline at equal wall clock", "difference"]
    is_baseline_timed = not math.isnan(comparison.baseline.values("wall_s")[0])
    lines = []
    for row in rows:
        line = [row["config"], f"{row['final_loss']:.4f}", _reached(row, "at_steps"), _interval(row, "at_steps")]
        is_timed = is_baseline_timed and not math.isnan(row["wall_s"])
        line += [_reached(row, "at_wall") if is_timed else "not recorded", _interval(row, "at_wall")]
        lines.append(line)
    return markdown_table(header, lines)


def _reached(row: Row, prefix: str) -> str:
    seeds, pairs = int(row[f"{prefix}_seeds"]), row["n_pairs"]
    if seeds == 0:
        return "not reached"
    return f"{row[f'{prefix}_baseline_loss']:.4f}" + (f" ({seeds} of {pairs} seeds)" if seeds < pairs else "")


def _verdicts(rows: Sequence[Row], comparison: GatedComparison) -> str:
    if not comparison.has_verdict:
        return (
            f"**No verdict**: the baseline, {comparison.baseline.label}, skips steps itself; add a run without a "
            "gate, or of policy accept_all, to say what skipping costs."
        )
    return "**Verdicts**\n\n" + "\n".join(f"- {verdict_sentence(row)}" for row in rows)


def verdict_sentence(row: Row) -> str:
    """Say one row of `gate_table` in words, its verdict signed."""
    name, verdict = row["config"], row["verdict"]
    if verdict == NOT_GATED:
        return f"{name}: **{NOT_GATED}** (the run ended inside its burn-in)."
    if row["n_pairs"] == 0:
        return f"{name}: no seed in common with the baseline, nothing to compare."
    fewer = row["fewer_steps_pct"]
    steps = f"{number(abs(fewer), '.1f')} % {'more' if fewer < 0 else 'fewer'} accepted steps"
    return f"{name}: within {MARGIN_PCT:g} % of the baseline's loss at {steps}: **{verdict}** ({_evidence(row)})."


def _evidence(row: Row) -> str:
    difference = f"difference {number(row['relative_pct'], '+.2f')} %"
    if row["n_pairs"] == 1:
        return f"{difference}, one seed: no interval, run three seeds or more"
    if math.isnan(row["relative_low"]):
        assert row["verdict"] == UNDECIDED
        return f"{difference} in each of {row['n_pairs']} seeds: no spread, no interval"
    interval = f"[{number(row['relative_low'], '+.2f')}, {number(row['relative_high'], '+.2f')}]"
    return f"{difference} {interval} over {row['n_pairs']} seeds"
