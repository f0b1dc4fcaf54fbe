"""What a comparison of gated runs says in Markdown: tables, one verdict an arm, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from sparselora.compare.novelty_tables import MARGIN_PCT, NOT_GATED, UNDECIDED, GateStudy
from sparselora.report.markdown import markdown_table, number, p_value, with_interval

Row = Mapping[str, Any]

HOW_TO_READ_GATE = f"""\
An *accepted step* is an update of the weights; a gate skips the backward pass of the other steps. *Tokens trained* are
those of accepted batches. Seconds are those of the training steps; evaluations are left out.

- **rate**: the share accepted after burn-in, and in brackets the target. **best**: the best of all evaluations.
- **difference** and its p are of the final evaluation, as above; the p values are adjusted by Holm over the rows.
- **at equal accepted steps**, **at equal wall clock**: the arm's final loss against the baseline's when that had done
  as many updates, and had trained for as long, linear between its evaluations. *Not reached*: the baseline was not
  evaluated so early, or had ended by then. There the baseline is in the middle of its schedule, its learning rate not
  yet down, which favours the arm.
- **Verdict**: *yes* if the 95 % interval over seeds of the loss's relative difference lies within ±{MARGIN_PCT:g} %,
  *no* if it lies outside, else *undecided*. Positive is a higher loss than the baseline's.
- A median step says little of a run that skips: of gated runs read *wall clock* here, not *speed-up* above."""


def gate_report(study: GateStudy, table: pd.DataFrame) -> str:
    """The section on gates: ``table`` is `sparselora.compare.novelty_tables.gate_table` of ``study``."""
    rows = table.to_dict("records")
    others = [row for row in rows if row["config"] != study.baseline.label]
    parts = [
        f"## Gated steps, baseline {study.baseline.label}",
        "What each arm did, means over seeds (loss in nats):",
        _arms_table(rows),
        f"Final evaluation minus that of {study.baseline.label}:",
        _differences_table(others),
        "Final loss against the baseline's at the same expense:",
        _equal_table(others, study),
        _verdicts(others, study),
        *study.notes,
    ]
    return "\n\n".join(parts) + "\n"


def _arms_table(rows: list[Row]) -> str:
    header = ["config", "seeds", "k", "β", "burn-in", "rate", "accepted steps", "fewer", "tokens trained", "wall clock"]
    header += ["loss", "best loss", "accuracy", "best accuracy"]
    lines = []
    for row in rows:
        line = [row["config"], str(row["n_seeds"]), *(_setting(row[name]) for name in ("k", "beta", "burn_in"))]
        line += [_rate(row), f"{row['accepted_steps']:.0f}", number(row["fewer_steps_pct"], ".1f") + " %"]
        line += [_tokens(row["tokens_trained"], row["tokens_seen"]), _unit(row["wall_s"], ".1f", "s")]
        line += [f"{row[name]:.4f}" for name in ("final_loss", "best_loss", "final_accuracy", "best_accuracy")]
        lines.append(line)
    return markdown_table(header, lines)


def _setting(value: Any) -> str:
    return "" if value is None or value != value else f"{value:g}"


def _rate(row: Row) -> str:
    target = number(row["target_rate"], "g")
    return number(row["acceptance_rate"], ".3f") + (f" ({target})" if target else "")


def _tokens(trained: float, seen: float) -> str:
    return "not recorded" if math.isnan(trained) else f"{trained:,.0f} of {seen:,.0f}"


def _unit(value: float, form: str, unit: str) -> str:
    return "not recorded" if math.isnan(value) else f"{value:{form}} {unit}"


def _differences_table(rows: list[Row]) -> str:
    header = ["config", "seeds", "loss", "t p", "loss on rows", "bootstrap p", "accuracy", "t p", "best loss"]
    lines = []
    for row in rows:
        line = [row["config"], str(row["n_pairs"]), _interval(row, "final_loss"), p_value(row["final_loss_p_holm"])]
        line += [with_interval(row["row_difference"], row["row_ci_low"], row["row_ci_high"])]
        line += [p_value(row["row_p_holm"]), _interval(row, "final_accuracy"), p_value(row["final_accuracy_p_holm"])]
        lines.append([*line, _interval(row, "best_loss")])
    return markdown_table(header, lines)


def _interval(row: Row, name: str) -> str:
    return with_interval(row[f"{name}_difference"], row[f"{name}_ci_low"], row[f"{name}_ci_high"])


def _equal_table(rows: list[Row], study: GateStudy) -> str:
    header = ["config", "loss", "baseline at equal accepted steps", "difference"]
    header += ["baseline at equal wall clock", "difference"]
    timed = not math.isnan(study.baseline.each(list(study.baseline.courses), "wall_s")[0])
    lines = []
    for row in rows:
        line = [row["config"], f"{row['final_loss']:.4f}", _reached(row, "at_steps"), _interval(row, "at_steps")]
        known = timed and not math.isnan(row["wall_s"])
        line += [_reached(row, "at_wall") if known else "not recorded", _interval(row, "at_wall")]
        lines.append(line)
    return markdown_table(header, lines)


def _reached(row: Row, prefix: str) -> str:
    seeds, pairs = int(row[f"{prefix}_seeds"]), row["n_pairs"]
    if seeds == 0:
        return "not reached"
    return f"{row[f'{prefix}_baseline_loss']:.4f}" + (f" ({seeds} of {pairs} seeds)" if seeds < pairs else "")


def _verdicts(rows: list[Row], study: GateStudy) -> str:
    if not study.has_verdict:
        return (
            f"**No verdict**: the baseline, {study.baseline.label}, skips steps itself; add a run without a gate, or "
            "of policy accept_all, to say what skipping costs."
        )
    return "**Verdicts**\n\n" + "\n".join(f"- {verdict_sentence(row)}" for row in rows)


def verdict_sentence(row: Row) -> str:
    """One row of `sparselora.compare.novelty_tables.gate_table` in words, its verdict signed."""
    name, verdict = row["config"], row["verdict"]
    if verdict == NOT_GATED:
        return f"{name}: **{NOT_GATED}** (the run ended inside its burn-in)."
    if row["n_pairs"] == 0:
        return f"{name}: no seed in common with the baseline, nothing to compare."
    fewer = row["fewer_steps_pct"]
    steps = f"{number(abs(fewer), '.1f')} % {'more' if fewer < 0 else 'fewer'} accepted steps"
    return f"{name}: within {MARGIN_PCT:g} % of the baseline's loss at {steps}: **{verdict}** ({_evidence(row)})."


def _evidence(row: Row) -> str:
    found = f"difference {number(row['relative_pct'], '+.2f')} %"
    if row["n_pairs"] == 1:
        return f"{found}, one seed: no interval, run three seeds or more"
    if math.isnan(row["relative_low"]):
        assert row["verdict"] == UNDECIDED
        return f"{found} in each of {row['n_pairs']} seeds: no spread, no interval"
    interval = f"[{number(row['relative_low'], '+.2f')}, {number(row['relative_high'], '+.2f')}]"
    return f"{found} {interval} over {row['n_pairs']} seeds"
