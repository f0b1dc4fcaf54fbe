"""Novelty against random skipping at the same rate: one table of all rates of the sweeps.

    python results/novelty/rates.py runs/gsm8k runs/mnli runs/sst2 runs/mawps --out_dir results/novelty

Each folder is named after a data set and holds its runs, named ARM_sSEED. Writes study.csv and study.md, and in
runs.csv what each run reached and how its gate chose, a block a data set. Every pair of arms is compared by
`gated_runs.gate_table`: paired by seed (t tests and intervals over seeds), which is what answers are given by;
intervals on the evaluation rows (bootstrap over rows, the seeds of a row together) describe these very runs.
`python -m sparselora compare` draws the figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.cli import Parser, add_run_arguments, print_request, result_arguments, run_command
from sparselora.compare.contrasts import BETTER, UNDECIDED, WORSE
from sparselora.compare.gated_runs import gate_table, read_gated_runs
from sparselora.compare.training_runs import TrainingComparison, read_runs
from sparselora.errors import InputError
from sparselora.numerics.stats import holm
from sparselora.report.markdown import markdown_table, number, p_value, with_interval
from sparselora.runs.files import write_csv, write_text
from sparselora.runs.folder import RunFolder
from sparselora.runs.packed import unpacked
from sparselora.runs.request import RunRequest

BASELINE, CONTROL, RANDOM = "accept_all", "half", "random"
SHARP = "novelty_0.3_beta300"
SIGNALS = ("novelty", "loss_floor", "novelty_floor")
"""Policies that look at the batch. Arms are named POLICY_RATE."""
OUTPUTS = ("run.json", "study.csv", "runs.csv", "study.md")
Row = Mapping[str, Any]

HOW_TO_READ = """\
Exploratory: no contrasts were named before these runs. First minus second, positive is a higher loss (nats) or
accuracy (fraction). *Better* or *worse* is said of the final evaluation loss where the p of the t test over seeds,
adjusted by Holm over the data set (the positive control by itself), is below 0.05; else *undecided*, which is no
evidence of equality beyond the interval. Intervals over rows describe these very runs. The second columns read the
first arm's final loss against the second's when that had done as many updates, and had trained as long: empty where it
had ended by then, or was not evaluated so early; there the second is in the middle of its schedule. *Rate* and
*updates* are the first's and the second's: a short run meets its target rate only roughly, and arms that differ in
updates differ for that alone."""


def finished(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the finished runs of each arm, and notes on the others."""
    arms: dict[str, list[Path]] = {}
    notes = []
    for record in sorted(folder.glob("*_s*/run.json")):
        status = json.loads(record.read_text(encoding="utf-8")).get("status")
        if status == "success":
            arms.setdefault(record.parent.name.rpartition("_s")[0], []).append(record.parent)
        else:
            notes.append(f"{record.parent.name} has status {status} and is left out.")
    if BASELINE not in arms:
        raise InputError(f"{folder} has no finished run {BASELINE}_s0; run the sweep there first")
    most = max(len(runs) for runs in arms.values())
    notes += [f"{arm} has {len(runs)} of {most} seeds." for arm, runs in arms.items() if len(runs) < most]
    return arms, notes


def questions(arms: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the question, first and second arm of each comparison whose arms are there."""
    rates = sorted({arm.rpartition("_")[2] for arm in arms if arm.startswith(f"{RANDOM}_")}, key=float)
    pairs = [("Positive control: half the steps are worse than all", CONTROL, BASELINE)]
    pairs += [(f"Better than random at rate {rate}?", f"{name}_{rate}", f"{RANDOM}_{rate}")
              for rate in rates for name in SIGNALS]  # fmt: skip
    pairs += [("Against every step", f"{name}_{rate}", BASELINE) for rate in rates for name in (*SIGNALS, RANDOM)]
    factors = [arm for arm in arms if arm.startswith("novelty_0.3_")]
    pairs += [("Better than random with a steep bar?", SHARP, f"{RANDOM}_0.3")]
    pairs += [("One setting changed", arm, "novelty_0.3") for arm in factors]
    return ((question, first, second) for question, first, second in pairs if first in arms and second in arms)


def pair(arms: Mapping[str, Sequence[Path]], first: str, second: str, seed: np.random.SeedSequence) -> dict[str, Any]:
    """Return the row of ``first`` in `gate_table` with ``second`` as its baseline, and what that one accepted."""
    comparison = read_runs([*arms[first], *arms[second]], arms[second][0])
    names = {path.resolve(): arm for arm in (first, second) for path in arms[arm]}
    groups = [
        replace(group, label=names[next(iter(group.runs.values())).path.resolve()]) for group in comparison.groups
    ]
    if len(groups) != 2:
        raise InputError(f"the seeds of {first} or {second} differ in more than the seed; overwrite one of them")
    base = next(group for group in groups if group.label == second)
    table = gate_table(read_gated_runs(TrainingComparison(groups, base, comparison.metric)), seed).to_dict("records")
    row, other = (next(row for row in table if row["config"] == arm) for arm in (first, second))
    columns = {f"second_{name}": other[name] for name in ("acceptance_rate", "accepted_steps", "final_loss")}
    dropped = {
        "config",
        "verdict",
        "row_draws",
        "row_p",
        *(name for name in row if name.endswith("_holm")),
    }  # of a table of one comparison
    return {**columns, **{name: value for name, value in row.items() if name not in dropped}}


def study(arms: Mapping[str, Sequence[Path]], seed: int) -> pd.DataFrame:
    """Compare the arms of one data set: a row for each of `questions`, p values adjusted by Holm over the table."""
    pairs = list(questions(list(arms)))
    children = np.random.SeedSequence(seed).spawn(len(pairs))
    rows = [{"question": question, "first": first, "second": second, **pair(arms, first, second, child)}
            for (question, first, second), child in zip(pairs, children)]  # fmt: skip
    table = pd.DataFrame(rows)
    if len(table):
        is_control = table["first"] == CONTROL
        for part, name in itertools.product((is_control, ~is_control), ("final_loss_p", "final_accuracy_p")):
            table.loc[part, f"{name}_holm"] = holm(table.loc[part, name].tolist())
        table["answer"] = [answer(row) for row in table.to_dict("records")]
    return table


def answer(row: Row) -> str:
    """Say in words how the final losses differ; see `HOW_TO_READ`."""
    if not row["final_loss_p_holm"] < 0.05:
        return UNDECIDED
    return BETTER if row["final_loss_difference"] < 0 else WORSE


def described(arms: Mapping[str, Sequence[Path]]) -> pd.DataFrame:
    """Describe each run in a row. ``novelty_…`` are means over the accepted and the rejected of the decisions after
    burn-in, ``…_ms`` medians over the steps that were."""
    rows = []
    for arm, folders in arms.items():
        for folder in folders:
            summary = pd.read_csv(folder / "summary.csv").iloc[0]
            columns = ("seed", "steps", "acceptance_rate", "accepted_steps", "eval_loss", "eval_accuracy")
            rows.append({"arm": arm, **{name: summary.get(name) for name in columns}, **_chosen(folder, summary)})
    return pd.DataFrame(rows)


def _chosen(folder: Path, summary: pd.Series) -> dict[str, float]:
    milliseconds = pd.read_csv(folder / "metrics.csv").set_index("step")["step_ms"]
    columns = {"train_s": milliseconds.sum() / 1000}
    if not (folder / "gate.csv").exists():
        return columns
    gate = pd.read_csv(folder / "gate.csv").tail(int(summary["gated_decisions"]))
    gate["step_ms"] = gate["step"].map(milliseconds)
    for name, side in (("accepted", gate[gate["accept"] == 1]), ("rejected", gate[gate["accept"] == 0])):
        columns |= {f"novelty_{name}": side["novelty"].mean(), f"loss_{name}": side["loss"].mean(),
                  f"{name}_ms": side["step_ms"].median()}  # fmt: skip
    return columns | {"novelty_std": gate["novelty"].std(), "novelty_loss_rank": _rank_correlation(gate)}


def _rank_correlation(gate: pd.DataFrame) -> float:
    return gate["novelty"].corr(gate["loss"], method="spearman") if gate["novelty"].notna().any() else float("nan")


# --- the report ---------------------------------------------------------------------------------------------------


def report(table: pd.DataFrame, title: str, notes: Sequence[str]) -> str:
    """Render the section of one data set."""
    parts = [f"## {title}", _verdict(table)]
    for question, rows in table.groupby("question", sort=False):
        parts.append(f"**{question}**\n\n{_rows(rows.to_dict('records'))}")
    return "\n\n".join([*parts, *notes]) + "\n"


def _verdict(table: pd.DataFrame) -> str:
    control = table[table["first"] == CONTROL]
    seen = control["answer"].tolist()
    power = (
        "**Positive control missing**: whether this study could see an effect is unknown." if not seen
        else "**Positive control holds**: half the steps are worse than all." if seen == [WORSE]
        else f"**Positive control does not hold** (half the steps: {seen[0]}): read nothing below as equality."
    )  # fmt: skip
    rows = table[(table["second"].str.startswith(f"{RANDOM}_")) & (table["first"].str.startswith("novelty_"))]
    lines = [
        f"- {row['first']}: {row['answer']} ({_interval(row, 'final_loss')} nats, {row['accepted_steps']:.0f} updates "
        f"against {row['second_accepted_steps']:.0f}, n = {row['n_pairs']})"
        for row in rows.to_dict("records")
    ]
    heading = "**Novelty against random skipping at the same rate**"
    return f"{power}\n\n{heading}\n\n" + ("\n".join(lines) or "Unknown: no pair of such arms is finished.")


def _rows(rows: Sequence[Row]) -> str:
    header = ["first against second", "rate", "updates", "final loss [95 %, seeds]", "p (seeds, Holm)", "[95 %, rows]",
              "best loss", "accuracy", "loss at equal updates", "at equal wall clock", "the first is"]  # fmt: skip
    return markdown_table(header, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    rates = " : ".join(number(row[name], ".3f") for name in ("acceptance_rate", "second_acceptance_rate"))
    return [
        f"{row['first']} against {row['second']}", rates,
        f"{row['accepted_steps']:.0f} : {row['second_accepted_steps']:.0f}", _interval(row, "final_loss"),
        p_value(row["final_loss_p_holm"]),
        f"[{number(row['row_ci_low'], '+.4f')}, {number(row['row_ci_high'], '+.4f')}]",
        *(_interval(row, name) for name in ("best_loss", "final_accuracy", "at_steps", "at_wall")), row["answer"],
    ]  # fmt: skip


def _interval(row: Row, name: str) -> str:
    return with_interval(row[f"{name}_difference"], row[f"{name}_ci_low"], row[f"{name}_ci_high"])


# --- the command --------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    request = RunRequest(
        "rates", Path(args.out_dir), result_arguments(args), OUTPUTS, vars(args), inputs=("runs",), seed=args.seed,
        overwrite=args.overwrite,
    )  # fmt: skip
    if args.dry_run:
        print_request(request)
        return
    with unpacked(args.runs) as folders:
        sweeps = {path.resolve().name: finished(path) for path in folders}
        if len(sweeps) < len(folders):
            raise InputError("two of the folders have one name; name each folder after its data set")
        folder = request.open()
        if folder.is_finished():
            print(folder.finished_message())
            return
        with folder:
            print(write_tables(folder, sweeps, args.seed))


def write_tables(folder: RunFolder, sweeps: Mapping[str, tuple[dict[str, list[Path]], list[str]]], seed: int) -> str:
    """Write the tables of all data sets, by name what `finished` returns of each; return the report."""
    studies, runs, texts = [], [], []
    for name, (arms, notes) in sweeps.items():
        table = study(arms, seed)
        if table.empty:
            raise InputError(f"{name} has no two arms to compare; run the sweep there first")
        summary = pd.read_csv(arms[BASELINE][0] / "summary.csv").iloc[0]
        texts.append(report(table, f"{summary['model']} on {summary['dataset']}", notes))
        studies.append(table.assign(dataset=name))
        runs.append(described(arms).round(5).assign(dataset=name))
    for file, tables in (("study.csv", studies), ("runs.csv", runs)):
        joined = pd.concat(tables, ignore_index=True)
        write_csv(folder.path(file), joined[["dataset", *joined.columns.drop("dataset")]])
    write_text(folder.path("study.md"), "\n\n".join(["# The cost of skipping", HOW_TO_READ, *texts]))
    return "\n".join(texts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of the runs of one data set each")
    add_run_arguments(parser, "study")
    return run_command(run, parser.parse_args(argv), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
