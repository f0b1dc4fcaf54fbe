"""Arms of the contextual studies against one another: tables, the questions they answer, and the figure.

    cd results/contextual
    python study.py runs/gsm8k runs/commonsense runs/mawps --model storyllama-20m --out_dir decoder

Each folder holds the runs of one data set, named ARM_sSEED as in decoder.jsonl and encoder.jsonl: their folders, or
the packed study of them. Writes
study.md, arms.csv, questions.csv and figures. Differences are paired by seed (t tests and intervals over seeds), which
is what answers are given by; intervals on the evaluation rows (bootstrap over rows, the seeds of a row together)
describe these very runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sparselora.cli import Parser, run_command
from sparselora.compare.contrasts import BETTER, UNDECIDED, WORSE
from sparselora.compare.pairing import compare_values, pair_by_seed
from sparselora.compare.runs import Group
from sparselora.compare.training_runs import (
    ENDPOINTS,
    TrainingComparison,
    TrainingRun,
    compare_runs,
    describe_runs,
    read_runs,
)
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Shape, Workload, layer_costs
from sparselora.errors import InputError
from sparselora.models.model_files import read_model_config
from sparselora.numerics.stats import Ratio, holm, ratio_of_means, step_down
from sparselora.report.markdown import number, p_value
from sparselora.report.style import COLORS, new_figure, save_figure
from sparselora.runs.files import write_csv, write_text
from sparselora.runs.packed import unpacked

DENSE = "dense"
CONTROL = "Positive control"
MARGIN = 0.01
"""A configuration holds the accuracy if it loses less than this: one point."""

CONTROLS = (
    ("skip", DENSE, "no FFN at all, against every channel"),
    ("random_99", "oracle_99", "random channels, against those with the largest activations (99 % off)"),
    ("random_90", "oracle_90", "random channels, against those with the largest activations (90 % off)"),
    ("random", DENSE, "random channels, against every channel"),
)
"""Positive controls: pairs in which the first must be worse, or the study cannot see what it is about."""

QUESTIONS = (
    ("Does choosing channels beat random ones?", [
        ("svd_99", "random_99"), ("static_99", "random_99"), ("svd_90", "random_90"), ("static_90", "random_90"),
        ("svd_75", "random_75"), ("static_75", "random_75"), ("svd_50", "random_50"), ("static_50", "random_50"),
        ("optimised", "random"), ("static", "random"),
    ]),
    ("Does it beat computing no FFN?", [
        ("random_99", "skip"), ("svd_99", "skip"), ("static_99", "skip"), ("oracle_99", "skip"),
    ]),
    ("Do surrogates and mean compensation beat choosing?", [
        ("surrogate_r64", "svd_99"), ("surrogate_r64", "static_99"), ("surrogate_r64", "oracle_99"),
        ("surrogate_r64", "svd_90"), ("surrogate_r16", "svd_99"), ("surrogate_r8", "svd_99"), ("skip_mean", "svd_99"),
        ("svd_99_mean", "svd_99"), ("static_99_mean", "static_99"), ("surrogate", "optimised"),
        ("surrogate_r64", "svd_99_mean"), ("surrogate_r64_refresh", "svd_99"), ("surrogate_r64_refresh", "oracle_99"),
        ("surrogate_r64_refresh", "surrogate_r64"),
    ]),
    ("Where it is sparse: by sensitivity, or the same everywhere (one budget)?", [
        ("schedule_chosen", "schedule_uniform"), ("schedule_chosen", "svd_99"),
    ]),
    ("Output tokens sparse too (90 % off)", [
        ("svd_90_out", "svd_90"), ("svd_90_out", "random_90_out"), ("svd_90_out", "oracle_90_out"),
    ]),
    ("Ranks and start", [
        ("svd_99_rank2", "svd_99"), ("svd_99_rank32", "svd_99"), ("surrogate_r8", "surrogate_r64"),
        ("surrogate_r16", "surrogate_r64"), ("svd_99_start00", "svd_99"), ("svd_99_start20", "svd_99"),
        ("surrogate_r64_start00", "surrogate_r64"), ("surrogate_r64_start20", "surrogate_r64"),
    ]),
    ("What the shipped configurations cost", [
        ("conservative", DENSE), ("fallback", DENSE), ("optimised", DENSE), ("surrogate", DENSE), ("static", DENSE),
    ]),
)  # fmt: skip


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """The finished runs of one data set: a group an arm, its label the arm's name; notes on what is missing."""

    name: str
    model: str
    comparison: TrainingComparison
    notes: list[str]

    @property
    def arms(self) -> dict[str, Group[TrainingRun]]:
        return {group.label: group for group in self.comparison.groups}

    @property
    def metric(self) -> str:
        return self.comparison.metric

    def against(self, baseline: str, arms: Sequence[str], seed: int) -> pd.DataFrame:
        """`compare_runs` of ``arms`` with ``baseline``."""
        groups = [self.arms[name] for name in (baseline, *arms)]
        pair = TrainingComparison(groups, groups[0], self.metric)
        return compare_runs(pair, np.random.SeedSequence(seed))


def read_study(folder: Path) -> Study:
    finished, notes = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (path / "run.json").is_file():
            status = json.loads((path / "run.json").read_text(encoding="utf-8")).get("status")
            if status == "success":
                finished.append(path)
            else:
                notes.append(f"{path.name} has status {status} and is left out.")
    dense = [path for path in finished if arm_of(path) == DENSE]
    if not dense:
        raise InputError(f"{folder} has no finished run {DENSE}_s0; run the sweep there first")
    comparison = read_runs(finished, dense[0])
    groups = [replace(group, label=arm_of(next(iter(group.runs.values())).path)) for group in comparison.groups]
    doubled = {group.label for group in groups if sum(other.label == group.label for other in groups) > 1}
    if doubled:
        raise InputError(f"{folder}: the seeds of {', '.join(sorted(doubled))} differ in more than the seed")
    base = next(group for group in groups if group.label == DENSE)
    first = next(iter(base.runs.values()))
    return Study(
        str(first.metrics["dataset"]), str(first.metrics["model"]),
        TrainingComparison(groups, base, comparison.metric), notes + _lacking(groups),
    )  # fmt: skip


def arm_of(path: Path) -> str:
    return path.name.rpartition("_s")[0]


def _lacking(groups: Sequence[Group[TrainingRun]]) -> list[str]:
    seeds = set().union(*(group.runs for group in groups))
    return [
        f"{group.label} has {len(group.runs)} of {len(seeds)} seeds." for group in groups if set(group.runs) != seeds
    ]


# --- tables -------------------------------------------------------------------------------------------------------


def arms_table(study: Study, shape: Shape | None, reference: str | None, seed: int) -> pd.DataFrame:
    """Describe each arm in a row, best difference to dense first: mean, cost, difference, share of the gap closed."""
    table = describe_runs(study.comparison).rename(columns={"config": "arm"}).drop(columns="metric")
    table.insert(0, "dataset", study.name)
    others = [name for name in study.arms if name != DENSE]
    gap = study.against(DENSE, others, seed).rename(columns={"config": "arm"})
    columns = {"difference": "minus_dense", "ci_low": "minus_dense_low", "ci_high": "minus_dense_high",
               "row_ci_low": "minus_dense_row_low", "row_ci_high": "minus_dense_row_high"}  # fmt: skip
    table = table.merge(gap[["arm", *columns]].rename(columns=columns), on="arm", how="left")
    if reference in study.arms:
        closed = {name: gap_closed(study, name, str(reference)) for name in study.arms}
        table["gap_closed"] = [closed[name].ratio for name in table["arm"]]
        table["gap_closed_low"] = [closed[name].low for name in table["arm"]]
        table["gap_closed_high"] = [closed[name].high for name in table["arm"]]
    if shape is not None:
        table["ffn_macs_share"] = [ffn_share(study.arms[name], shape) for name in table["arm"]]
    order = table["minus_dense"].fillna(0.0).argsort(kind="stable").to_numpy()
    return table.iloc[order if study.comparison.is_lower_better else order[::-1]].reset_index(drop=True)


def gap_closed(study: Study, arm: str, reference: str) -> Ratio:
    """Return (reference − arm) / (reference − dense) of the metric, with Fieller's 95 % interval over seeds.

    1 is as good as dense, 0 as bad as the reference. Seeds that all three have; NaN without any, infinite ends where
    these seeds show no gap.
    """
    groups = [study.arms[name] for name in (reference, arm, DENSE)]
    seeds = sorted(set.intersection(*(set(group.runs) for group in groups)))
    if not seeds or reference == DENSE:
        return Ratio(0, float("nan"), float("nan"), float("nan"))
    column = f"eval_{study.metric}"
    worst, values, best = (np.array([float(group.runs[seed].metrics[column]) for seed in seeds]) for group in groups)
    return ratio_of_means(worst - values, worst - best)


def ffn_share(group: Group[TrainingRun], shape: Shape) -> float:
    """Return the MACs of a context token in the FFNs that are sparse, over the dense ones; 1 without any.

    The estimates are not counted."""
    section = next(iter(group.runs.values())).config.get("sparsity")
    if section is None:
        return 1.0
    config, work = SparsityConfig.from_dict(section), Workload(1, 256, 64 if shape.decoder else 0)
    dense = SparsityConfig(mode="dense")
    layers = [i for i in range(shape.layers) if config.ratio(i) > 0]
    before, after = (
        sum(layer_costs(shape, setting, work, i, None, exact=True)[0]["FFN"] for i in layers)
        for setting in (dense, config)
    )
    return after / before if before else 1.0


def questions_table(study: Study, seed: int) -> pd.DataFrame:
    """Compare each pair of arms that this study has, first minus second; p values adjusted by Holm over the table."""
    pairs = [(CONTROL, first, second) for first, second, _ in CONTROLS]
    pairs += [(question, first, second) for question, listed in QUESTIONS for first, second in listed]
    rows = []
    for question, first, second in pairs:
        if first in study.arms and second in study.arms:
            (row,) = study.against(second, [first], seed).to_dict("records")
            names = ("n_seeds", "difference", "ci_low", "ci_high", "t_p", "detectable", "row_ci_low", "row_ci_high",
                     "speed_up", "memory_ratio", "flops_ratio")  # fmt: skip
            rows.append({"dataset": study.name, "question": question, "first": first, "second": second,
                         **{name: row[name] for name in names}})  # fmt: skip
    table = pd.DataFrame(rows)
    if len(table):
        # The controls are a family of their own: they were named to show whether the study sees anything.
        is_control = table["question"] == CONTROL
        for part in (is_control, ~is_control):
            table.loc[part, "t_p_holm"] = holm(table.loc[part, "t_p"].tolist())
        table["answer"] = [answer(row, study.comparison.is_lower_better) for row in table.to_dict("records")]
    return table


def answer(row: Mapping[str, Any], lower_is_better: bool) -> str:
    """Say in words how two arms differ, from the adjusted p of the t test over seeds."""
    if not row["t_p_holm"] < 0.05:
        return UNDECIDED
    return BETTER if (row["difference"] < 0) == lower_is_better else WORSE


# --- the report ---------------------------------------------------------------------------------------------------


def report(study: Study, arms: pd.DataFrame, questions: pd.DataFrame, reference: str | None) -> str:
    unit = "loss (nats per label, lower is better)" if study.metric == "loss" else "accuracy (higher is better)"
    parts = [f"## {study.model} on {study.name}: {unit}", _control(study, questions)]
    parts.append(_arms_markdown(study, arms, reference))
    for question in dict.fromkeys(questions["question"] if len(questions) else []):
        rows = questions[questions["question"] == question]
        parts.append(f"**{question}**\n\n{_pairs_markdown(rows)}")
    if study.metric == "accuracy":
        parts.append(_within(study, arms))
    parts += [" ".join(study.notes)] if study.notes else []
    return "\n\n".join(parts) + "\n"


def _control(study: Study, questions: pd.DataFrame) -> str:
    rows = questions[questions["question"] == CONTROL] if len(questions) else questions
    if not len(rows):
        return "**Positive control missing**: whether this study could see an effect is unknown."
    worse = [row["answer"] == WORSE for row in rows.to_dict("records")]
    texts = {(first, second): text for first, second, text in CONTROLS}
    lines = [
        f"- {row['first']} against {row['second']} ({texts[row['first'], row['second']]}): {row['answer']}"
        for row in rows.to_dict("records")
    ]
    verdict = (
        "holds" if all(worse) else "holds in part" if any(worse) else "does not hold: read nothing below as equality"
    )
    return f"**Positive control {verdict}.**\n\n" + "\n".join(lines)


def _signed(low: float, mid: float, high: float, digits: int = 4) -> str:
    ends = "" if np.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"  # one seed has no interval
    return f"{mid:+.{digits}f}{ends}"


def _share(ratio: float, low: float, high: float) -> str:
    if np.isnan(ratio):
        return ""
    ends = "" if np.isnan(low) else " [open]" if np.isinf(low) else f" [{low:.0%}, {high:.0%}]"
    return f"{ratio:.0%}{ends}"


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join(["---", *["---:"] * (len(names) - 1)])]
    lines += [" | ".join(row[name] for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _arms_markdown(study: Study, arms: pd.DataFrame, reference: str | None) -> str:
    rows = []
    for row in arms.to_dict("records"):
        is_dense = row["arm"] == DENSE
        spread = "" if np.isnan(row["std"]) else f" ± {row['std']:.4f}"
        cells = {"arm": row["arm"], "seeds": str(row["n_seeds"]), study.metric: f"{row['mean']:.4f}{spread}"}
        cells["minus dense [95 %, seeds]"] = (
            "" if is_dense else _signed(row["minus_dense_low"], row["minus_dense"], row["minus_dense_high"])
        )
        cells["[95 %, rows]"] = (
            "" if is_dense else f"[{row['minus_dense_row_low']:+.4f}, {row['minus_dense_row_high']:+.4f}]"
        )
        if "gap_closed" in row:
            header = f"of the gap {reference} to dense closed [95 %, seeds]"
            share = _share(row["gap_closed"], row["gap_closed_low"], row["gap_closed_high"])
            cells[header] = "" if row["arm"] in (DENSE, reference) else share
        if "ffn_macs_share" in row:
            cells["FFN MACs kept"] = f"{row['ffn_macs_share']:.1%}"
        cells["ms/step"] = f"{row['step_ms']:.1f}"
        cells["peak MB"] = f"{row['peak_mb']:.0f}"
        rows.append(cells)
    return _markdown(rows)


def _pairs_markdown(rows: pd.DataFrame) -> str:
    return _markdown(
        [
            {
                "first against second": f"{row['first']} against {row['second']}",
                "first minus second [95 %, seeds]": _signed(row["ci_low"], row["difference"], row["ci_high"]),
                "p (seeds, Holm)": p_value(row["t_p_holm"]),
                "detectable": number(row["detectable"], ".4f"),
                "[95 %, rows]": f"[{row['row_ci_low']:+.4f}, {row['row_ci_high']:+.4f}]",
                "n": str(row["n_seeds"]),
                "the first is": row["answer"],
            }
            for row in rows.to_dict("records")
        ]
    )


def _within(study: Study, arms: pd.DataFrame) -> str:
    """List by the margin, over seeds, the arms that lose less than a point of accuracy, and those that lose more."""
    others = [name for name in arms["arm"] if name != DENSE]
    tests = []
    for name in others:
        pairs = pair_by_seed(study.arms[name], study.arms[DENSE])
        of_arm, of_dense = ENDPOINTS["accuracy"].values(pairs)
        lost = np.subtract(of_dense, of_arm)
        tests.append([_one_sided_p(lost, MARGIN), _one_sided_p(-lost, -MARGIN)])
    lines = []
    for name, (within, beyond) in zip(others, step_down(tests), strict=True):
        (row,) = arms[arms["arm"] == name].to_dict("records")
        says = "within" if within < 0.05 else "not within" if beyond < 0.05 else UNDECIDED
        low, mid, high = (100 * row[f"minus_dense{end}"] for end in ("_low", "", "_high"))
        lines.append(f"- {name}: {says} ({_signed(low, mid, high, 2)})")
    return "**Within one point of dense?** (accuracy points, over seeds)\n\n" + "\n".join(lines)


def _one_sided_p(lost: NDArray[np.float64], margin: float) -> float:
    """Return the p of "the mean of ``lost`` is at least the margin" of a t test; NaN without a spread."""
    test = compare_values(lost, np.full(len(lost), margin))
    return test.t_p / 2 if test.mean_difference < 0 else 1 - test.t_p / 2


# --- the figure ---------------------------------------------------------------------------------------------------

_FAMILIES = (
    ("dense", "black", "s"), ("skip", "grey", "X"), ("random", "orange", "o"), ("svd", "blue", "o"),
    ("oracle", "green", "D"), ("static", "sky", "^"), ("surrogate", "red", "P"), ("schedule", "purple", "v"),
)  # fmt: skip


def _style(arm: str) -> tuple[str, str]:
    return next(((COLORS[color], marker) for name, color, marker in _FAMILIES if arm.startswith(name)),
                (COLORS["purple"], "v"))  # fmt: skip


def figure(
    path: Path, studies: Sequence[Study], tables: Sequence[pd.DataFrame], arms: Sequence[str], title: str
) -> None:
    """Draw a panel for each data set and a line for each arm: its metric minus that of dense at the same seed.

    Data next to it as CSV.

    Dots are seeds, the marker their mean, thin lines intervals over seeds, thick ones over evaluation rows.
    """
    points = pd.DataFrame([row for study in studies for row in _points(study, arms)])
    with new_figure(1.6 + 0.24 * len(arms)) as drawn:
        panels = drawn.subplots(1, len(studies), squeeze=False, sharey=True)[0]
        for axes, study, table in zip(panels, studies, tables):
            _panel(axes, study, table.set_index("arm"), points[points["dataset"] == study.name], arms)
        panels[0].set_yticks(range(len(arms)), arms, fontsize=9)
        panels[0].set_ylim(len(arms) - 0.4, -0.6)
        drawn.suptitle(f"{title}\ndots: seeds; 95 % intervals over seeds (thin) and over rows (thick)", fontsize=11)
        save_figure(drawn, path, points)


def _points(study: Study, arms: Sequence[str]) -> list[dict[str, Any]]:
    column, dense = f"eval_{study.metric}", study.arms[DENSE].runs
    return [
        {"dataset": study.name, "arm": arm, "seed": seed, study.metric: run.metrics[column],
         "minus_dense": run.metrics[column] - dense[seed].metrics[column]}
        for arm in arms
        if arm in study.arms
        for seed, run in study.arms[arm].runs.items()
        if seed in dense
    ]  # fmt: skip


def _panel(axes: Any, study: Study, table: pd.DataFrame, points: pd.DataFrame, arms: Sequence[str]) -> None:
    seen = [0.0]
    for place, arm in enumerate(arms):
        differences = points.loc[points["arm"] == arm, "minus_dense"]
        if arm == DENSE:
            axes.plot(0, place, marker="s", markersize=7, color=COLORS["black"])
        if arm == DENSE or not len(differences):
            continue
        row, (color, marker) = table.loc[arm], _style(arm)
        axes.hlines(place, row["minus_dense_low"], row["minus_dense_high"], color=color, lw=1)
        axes.hlines(place, row["minus_dense_row_low"], row["minus_dense_row_high"], color=color, lw=4, alpha=0.45)
        axes.plot(differences, [place + 0.22] * len(differences), ls="", marker=".", markersize=5, color=color)
        fill = "white" if arm.endswith("_mean") else color
        axes.plot(row["minus_dense"], place, marker=marker, markersize=7, color=color, markerfacecolor=fill)
        seen += [*differences, row["minus_dense_row_low"], row["minus_dense_row_high"]]
    axes.axvline(0, color=COLORS["black"], lw=1.2)
    low, high = np.nanmin(seen), np.nanmax(seen)
    pad = 0.08 * (high - low) or 0.01
    axes.set_xlim(low - pad, high + pad)  # intervals over seeds may leave the picture: three seeds make long ones
    unit = "loss minus dense\n(nats per label)" if study.metric == "loss" else "accuracy minus dense\n(fraction)"
    axes.set_xlabel(unit, fontsize=10)
    axes.set_title(f"{study.name}\n(dense {table.loc[DENSE, 'mean']:.4f})", fontsize=9.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="x", labelsize=9)


# --- the command --------------------------------------------------------------------------------------------------

_HOW = """\
Exploratory: no contrasts were named before these runs. Differences are first minus second, paired by seed. **[95 %,
seeds]**: t interval over seeds; with three of them it is long. **p (seeds, Holm)**: the t test, adjusted over the data
set's pairs (the controls by themselves); "better" and "worse" need it below 0.05, all else is *undecided*, which is no
evidence of equality: **detectable** is the difference that these seeds find four times in five, before the adjustment.
**[95 %, rows]**: bootstrap over evaluation rows, the seeds of a row drawn together; it describes these very runs and
says nothing about other seeds. **Gap closed**: (reference − arm) / (reference − dense), 100 % is dense, 0 % the
reference, with Fieller's interval over seeds; *open* where these seeds show no gap. **FFN MACs kept**: of a context
token in the layers that are sparse, without the estimates. Times are of a device that several runs shared, unless said
otherwise: use `bench` for speed."""


def build_parser() -> Parser:
    parser = Parser(prog="study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "studies", nargs="+", type=Path, help="packed studies or folders of run folders, one a data set"
    )
    parser.add_argument("--out_dir", "--outdir", default="study", metavar="DIR", help="folder for tables and figures")
    parser.add_argument("--model", metavar="FOLDER", help="model, for the share of MACs that an arm keeps")
    parser.add_argument("--reference", metavar="ARM", help="arm from which the gap to dense is measured")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(args: argparse.Namespace) -> None:
    with unpacked(args.studies) as folders:
        studies = [read_study(folder) for folder in folders]
    shape = Shape.from_config(read_model_config(args.model)) if args.model else None
    names = {arm for study in studies for arm in study.arms}
    reference = args.reference or next((arm for arm in ("svd_99", "optimised") if arm in names), None)
    out = Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    every_arm, every_question, texts = [], [], []
    for study in studies:
        arms, questions = arms_table(study, shape, reference, args.seed), questions_table(study, args.seed)
        every_arm.append(arms)
        every_question.append(questions)
        texts.append(report(study, arms, questions, reference))
    write_csv(out / "arms.csv", pd.concat(every_arm, ignore_index=True))
    write_csv(out / "questions.csv", pd.concat(every_question, ignore_index=True))
    write_text(out / "study.md", "\n".join(["# Arms of the study", "", _HOW, "", *texts]))
    _figures(out, studies, every_arm)
    print("\n".join(texts))


def _figures(out: Path, studies: Sequence[Study], tables: Sequence[pd.DataFrame]) -> None:
    """Arms in the order of the first study that has them; those whose output tokens are sparse too apart."""
    order = list(dict.fromkeys(arm for table in tables for arm in table["arm"]))
    usual = [arm for arm in order if not arm.endswith("_out")]
    figure(out / "by_arm.png", studies, tables, usual, f"{studies[0].model}: arms minus dense at the same seed")
    if len(usual) < len(order):
        apart = [arm for arm in order if "_90" in arm]
        having = [i for i, study in enumerate(studies) if any(arm.endswith("_out") for arm in study.arms)]
        title = f"{studies[0].model}: FFNs 90 % off; _out: for output tokens too"
        figure(out / "output_tokens.png", [studies[i] for i in having], [tables[i] for i in having], apart, title)


if __name__ == "__main__":
    parsed = build_parser()
    sys.exit(run_command(run, parsed.parse_args(), parsed.prog))
