"""The quality study: its grids, with every arm's settings, learning rate and steps; its records; its tables and figure.

    python results/fast/study.py tune runs       # runs/grids/tune_qwen.jsonl and tune_smollm2.jsonl
    python results/fast/study.py main runs       # qwen, smollm2, breaks.jsonl, at the rates of runs/tune_MODEL
    python results/fast/study.py exact runs      # exact.jsonl: exact match of the adapters in runs/qwen
    python results/fast/study.py pack runs       # runs -> runs/, smollm2/ (packed) and other.csv of this folder
    python results/fast/study.py tables          # these and speed.csv -> the tables in README.md, frontier.png

Dense training for the time of an arm takes as many dense steps as fit into it, by the step times of speed.csv.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.compare.contrasts import contrast_table
from sparselora.compare.pairing import NO_PAIRS, compare_values
from sparselora.compare.training_runs import TrainingComparison, TrainingRun, arm_name, read_runs
from sparselora.compare.tuned_rates import tuned_rates
from sparselora.config.contrasts import Study, read_contrasts
from sparselora.errors import InputError
from sparselora.numerics.stats import mean_interval
from sparselora.report.markdown import markdown_table, number, p_value, with_interval
from sparselora.report.style import COLORS, new_figure, save_figure
from sparselora.runs.files import write_csv, write_text
from sparselora.runs.packed import is_packed, pack, unpacked
from sparselora.runs.user_files import read_json_object

HERE = Path(__file__).resolve().parent
OTHER = "other.csv"
"""Table of the runs whose predictions are not kept."""
DECIMALS = 2
"""Of the loss of a row in the kept predictions; a run's own loss is kept whole."""

FP8 = {"sparsity.frozen_precision": "fp8"}
NONE = {"sparsity.context_backward": "none"}
UPPER = {"sparsity.context_backward": "upper", "sparsity.context_backward_share": 0.5}
HALF = {"sparsity.context_backward": "sampled", "sparsity.context_backward_share": 0.5}
QUARTER = {"sparsity.context_backward": "sampled", "sparsity.context_backward_share": 0.25}
STATIC = {"sparsity.mode": "static"}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "fp8": FP8,
    "none": NONE,
    "both": FP8 | NONE,
    "fp8_upper": FP8 | UPPER,
    "fp8_sampled_half": FP8 | HALF,
    "sampled_half": HALF,
    "upper": UPPER,
    "sampled_quarter": QUARTER,
    "both_static50": FP8 | NONE | STATIC | {"sparsity.ffn_sparsity": 0.5},
    "both_static90": FP8 | NONE | STATIC | {"sparsity.ffn_sparsity": 0.9},
}
"""Arm by its name: settings beyond those of quality.yaml."""

SPEED = {
    "fp8": ("main", "fp8"),
    "none": ("main", "no context backward"),
    "both": ("main", "both"),
    "fp8_upper": ("sparse", "both, upper half"),
    "fp8_sampled_half": ("sampled", "fp8 + sampled half"),
    "sampled_half": ("sampled", "sampled half"),
    "both_static50": ("sparse", "both + static 50 %"),
    "both_static90": ("sparse", "both + static 90 %"),
}
"""Arm → group and variant of speed.csv."""

TIME = "dense_time_"
PRIMARY = (
    "dense", "fp8", "both", "fp8_upper", "fp8_sampled_half", "none", "sampled_half",
    "dense_time_both", "dense_time_fp8_upper", "dense_time_fp8_sampled_half",
)  # fmt: skip
"""The arms of the contrasts in study.yaml."""
SECONDARY = (
    "upper", "sampled_quarter", "both_static50", "both_static90",
    "dense_time_fp8", "dense_time_none", "dense_time_both_static90",
)  # fmt: skip
SEEDS = range(3, 9)
"""Of the primary arms: seeds 0 to 2 were run, and seen, before the arms with `fp8_upper` and `fp8_sampled_half` were
added."""

EXACT = ("dense", "fp8", "both", "fp8_upper", "fp8_sampled_half", "none", "dense_time_both", "dense_time_fp8_upper")
"""Arms whose adapters answer the questions of GSM8K."""

TUNED = ("dense", "both", "dense_time_both", "fp8_upper")
TUNING_SEED = 100
LIKE = {
    "fp8": "dense", "none": "both", "both_static50": "both", "both_static90": "both", "upper": "fp8_upper",
    "sampled_half": "fp8_upper", "sampled_quarter": "fp8_upper", "fp8_sampled_half": "fp8_upper",
}  # fmt: skip
"""Arm that was not tuned → the tuned one whose learning rate it takes; dense for equal time takes that of
``dense_time_both``."""

STEPS = {"qwen": 188, "smollm2": 230}
"""Steps of a whole run, by model: one pass over 3,000 rows of GSM8K, two over MRPC."""
RATES = {"qwen": (9e-4, 1.8e-3, 2.7e-3), "smollm2": (6e-4, 1.8e-3, 5.4e-3)}
MODEL: dict[str, dict[str, Any]] = {
    "qwen": {},
    "smollm2": {
        "prompt_field": "sentence1",
        "completion_field": "sentence2",
        "template": "Sentence: {prompt}\nIn other words:",
        "max_length": 256,
        "train_bsz": 32,
        "train_samples": 0,
        "max_steps": STEPS["smollm2"],
    },
}
"""Settings of a model's runs beyond those of quality.yaml."""

PACKED = {"qwen": "runs", "smollm2": "smollm2"}
"""Folder of the packed runs, by model."""
TITLES = {
    "qwen": "Qwen2.5-Coder-0.5B on GSM8K",
    "smollm2": "SmolLM2-135M on MRPC: the second sentence from the first",
}

BREAKS: dict[str, dict[str, Any]] = {
    "lr3": {"lr": 3},
    "lr10": {"lr": 10},
    "r4": {"lora_r": 4, "lora_alpha": 8},
    "r64": {"lora_r": 64, "lora_alpha": 128},
    "linears": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
}  # fmt: skip
"""Settings under which fp8 is compared with dense; ``lr`` multiplies the tuned rate."""


def dense_steps(arm: str, speed: pd.DataFrame, steps: int) -> int:
    """Return the dense steps that last as long as ``steps`` of ``arm``, rounded up: dense has no less time.

    Raises:
        InputError: the arm or the dense step of its group was not timed.
    """
    group, variant = SPEED[arm]
    times = speed[speed["group"] == group].set_index("variant")["step_ms"]
    if variant not in times or "dense" not in times:
        raise InputError(f"speed.csv has no {variant!r} in group {group}; run benchmarks/fast.py --groups {group}")
    return math.ceil(steps * times[variant] / times["dense"])


def equal_time_steps(model: str, speed: pd.DataFrame) -> dict[str, int]:
    """Return the steps of each arm of dense training for equal time; arms whose step was not timed are left out.

    No two have the same number, which would be one run under two names: the later one gets a step more.
    """
    steps: dict[str, int] = {}
    for arm in (*PRIMARY, *SECONDARY):
        if not arm.startswith(TIME):
            continue
        try:
            count = dense_steps(arm.removeprefix(TIME), speed, STEPS[model])
        except InputError as error:
            print(f"left out {arm}: {error}")
            continue
        while count in steps.values():
            count += 1
        steps[arm] = count
    return steps


def settings(arm: str, model: str, steps: Mapping[str, int]) -> dict[str, Any]:
    """Return the flags of an arm beyond its seed and learning rate; ``steps`` is of `equal_time_steps`."""
    if arm.startswith(TIME):
        return MODEL[model] | {"max_steps": steps[arm]}
    return MODEL[model] | ARMS[arm]


def tuning(model: str, steps: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the runs that choose learning rates."""
    return [
        {"name": f"{arm}_lr{rate:g}", "seed": TUNING_SEED, "lr": rate, **settings(arm, model, steps)}
        for rate in RATES[model]
        for arm in TUNED
    ]


def rate_of(arm: str, rates: Mapping[str, float]) -> float:
    """Return the learning rate of an arm, which is its own or that of the arm it is like."""
    if arm in rates:
        return rates[arm]
    return rates[TIME + "both" if arm.startswith(TIME) else LIKE[arm]]


def runs(
    model: str, arms: Sequence[str], seeds: Sequence[int], steps: Mapping[str, int], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return a run for each seed and arm, the arms of a seed together: what is cut off leaves whole pairs."""
    return [
        {"name": f"{arm}_s{seed}", "seed": seed, "lr": rate_of(arm, rates), **settings(arm, model, steps)}
        for seed in seeds
        for arm in arms
        if not arm.startswith(TIME) or arm in steps
    ]


def breaks(rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return pairs of a dense and an fp8 run under settings that may be hard for fp8."""
    grid = []
    for seed in SEEDS[:2]:
        for setting, flags in BREAKS.items():
            rate = rates["dense"] * flags.get("lr", 1)
            grid += [
                {"name": f"{arm}_{setting}_s{seed}", "seed": seed, **ARMS[arm], **flags, "lr": round(rate, 6)}
                for arm in ("dense", "fp8")
            ]
    return grid


def exact(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of the base model and of the adapters that are trained, a seed after the other."""
    names = [f"{arm}_s{seed}" for seed in SEEDS for arm in EXACT]
    adapters = [folder / name / "adapter" for name in names]
    return [{"name": "base"}] + [
        {"name": path.parent.name, "adapter": str(path)}
        for path in adapters
        if (path / "adapter_model.safetensors").exists()
    ]


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"wrote {path} ({len(lines)} runs)")


def write_grids(stage: str, folder: Path, speed: pd.DataFrame) -> None:
    """Write the grids of a stage to ``folder/grids``; the runs of earlier stages are in ``folder``."""
    grids = folder / "grids"
    if stage == "exact":
        write(grids / "exact.jsonl", exact(folder / "qwen"))
        return
    for model in STEPS:
        steps = equal_time_steps(model, speed)
        if stage == "tune":
            write(grids / f"tune_{model}.jsonl", tuning(model, steps))
            continue
        if not (folder / f"tune_{model}").is_dir():
            print(f"left out {model}: no rates in {folder / f'tune_{model}'}")
            continue
        rates = tuned_rates(folder / f"tune_{model}", TUNED)
        print(model, rates)
        lines = runs(model, PRIMARY, SEEDS, steps, rates)
        if model == "qwen":
            lines += runs(model, SECONDARY, SEEDS[:3], steps, rates)
            write(grids / "breaks.jsonl", breaks(rates))
        write(grids / f"{model}.jsonl", lines)


# --- records ----------------------------------------------------------------------------------------------------------


def finished(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the finished runs in a folder, each with its record."""
    records = [(path.parent, read_json_object(path)) for path in sorted(folder.glob("*/run.json"))]
    return [(path, record) for path, record in records if record.get("status") == "success"]


def gather(runs_folder: Path, exact_folder: Path, copies: Path) -> None:
    """Copy what is kept of the runs of a model: record, summary and predictions, the losses of rows to `DECIMALS`.

    Where an adapter answered the questions, the summary has its ``exact_match`` and the predictions a column ``exact``.
    """
    for path, _ in finished(runs_folder):
        target = copies / path.name
        target.mkdir(parents=True)
        shutil.copyfile(path / "run.json", target / "run.json")
        summary = pd.read_csv(path / "summary.csv", dtype=str, keep_default_na=False)
        rows = pd.read_csv(path / "predictions.csv")
        rows["loss"] = rows["loss"].round(DECIMALS)
        if (items := exact_folder / path.name / "items_gsm8k.csv").exists():
            answers = pd.read_csv(items).set_index("row")["correct"]
            rows["exact"] = answers.loc[rows["row"]].to_numpy()
            summary["exact_match"] = str(rows["exact"].mean())
        rows.to_csv(target / "predictions.csv", index=False)
        summary.to_csv(target / "summary.csv", index=False)


def other_runs(folder: Path) -> pd.DataFrame:
    """Return a row for each run without kept predictions: the tuning, the settings that may be hard for fp8, the base
    model's answers. A run that failed has no loss."""
    rows = []
    for part in ("tune_qwen", "tune_smollm2", "breaks"):
        for path in sorted((folder / part).glob("*/run.json")):
            record = read_json_object(path)
            row = {"part": part, "run": path.parent.name, "seed": record["seed"], "status": record["status"]}
            row |= {"error": record.get("error") or "", "commit": record.get("commit"), "lr": record["arguments"]["lr"]}
            if record["status"] == "success":
                summary = pd.read_csv(path.parent / "summary.csv").iloc[0]
                row |= {name: summary[name] for name in ("steps", "eval_rows", "eval_loss", "eval_accuracy")}
            rows.append(row)
    for path, record in finished(folder / "exact"):
        metrics = read_json_object(path / "metrics_gsm8k.json")
        row = {"part": "exact", "run": path.name, "status": "success", "commit": record.get("commit")}
        rows.append(row | {"eval_rows": metrics["n"], "exact_match": metrics["exact_match"]})
    return pd.DataFrame(rows)


def pack_runs(folder: Path, target: Path) -> None:
    """Write the records of the study to ``target``: a packed study of each model, and `OTHER`."""
    for model, name in PACKED.items():
        if not finished(folder / model):
            print(f"left out {model}: no finished run in {folder / model}")
            continue
        with tempfile.TemporaryDirectory() as copies:
            gather(folder / model, folder / "exact" if model == "qwen" else Path(copies), Path(copies) / name)
            for path in pack(Path(copies) / name, target / name):
                print(f"wrote {path} ({path.stat().st_size:,} bytes)")
    write_csv(target / OTHER, other_runs(folder))


# --- tables -----------------------------------------------------------------------------------------------------------


def judged(study: Study, comparison: TrainingComparison) -> pd.DataFrame:
    """Return the verdicts on the contrasts whose two sides have runs, adjusted over the family of all of them."""
    arms = {arm_name(run) for run in comparison.runs}
    contrasts = tuple(c for c in study.contrasts if {c.first, c.second} <= arms)
    return contrast_table(study.replace(contrasts=contrasts, family=len(study.contrasts)), comparison.paired_values)


def contrast_lines(table: pd.DataFrame) -> str:
    """Return the verdicts as a table."""
    header = ["contrast", "n", "difference", "of the loss", "p", "margin", "p of equivalence", "verdict"]
    rows = []
    for row in table.to_dict("records"):
        share = (100 * row[name] / row["second_mean"] for name in ("difference", "ci_low", "ci_high"))
        rows.append([
            f"{row['first']} − {row['second']}", str(row["n"]),
            with_interval(row["difference"], row["ci_low"], row["ci_high"]), with_interval(*share, "+.2f") + " %",
            p_value(row["t_p_adjusted"]), row["margin"], p_value(row["equivalence_p_adjusted"]), row["verdict"],
        ])  # fmt: skip
    return markdown_table(header, rows)


def step_times(speed: pd.DataFrame, steps: Mapping[str, int], whole: int) -> dict[str, float]:
    """Return milliseconds per step of the 8B shape by arm, on the scale of group ``main``'s dense step.

    Each arm's time is its ratio to the dense step of its own group; dense training for equal time counts as its share
    of the steps.
    """
    dense = float(speed[(speed["group"] == "main") & (speed["variant"] == "dense")]["step_ms"].iloc[0])
    times = {"dense": dense}
    for arm, (group, variant) in SPEED.items():
        rows = speed[speed["group"] == group].set_index("variant")["step_ms"]
        if variant in rows:
            times[arm] = dense * float(rows[variant] / rows["dense"])
    return times | {arm: dense * count / whole for arm, count in steps.items()}


def arm_table(comparison: TrainingComparison, speed: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each arm: its losses over seeds, its difference to dense over the seeds of both, its time."""
    runs: dict[str, dict[int, TrainingRun]] = {}
    for run in comparison.runs:
        runs.setdefault(arm_name(run), {})[run.seed] = run
    counts = {arm: int(next(iter(seeds.values())).metrics["steps"]) for arm, seeds in runs.items()}
    steps = {arm: count for arm, count in counts.items() if arm.startswith(TIME)}
    times = step_times(speed, steps, counts["dense"])
    rows = []
    for arm in [name for name in (*PRIMARY, *SECONDARY) if name in runs]:
        seeds, dense = runs[arm], runs["dense"]
        common = sorted(seeds.keys() & dense.keys())
        over = mean_interval([run.metrics["eval_loss"] for run in seeds.values()])
        row = {"arm": arm, "seeds": len(seeds), "steps": counts[arm], "lr": next(iter(seeds.values())).config["lr"]}
        row |= {"loss": over.mean, "ci_low": over.low, "ci_high": over.high, "step_ms": times.get(arm, math.nan)}
        row["accuracy"] = float(np.mean([run.metrics["eval_accuracy"] for run in seeds.values()]))
        pairs = [(seeds[s].metrics["eval_loss"], dense[s].metrics["eval_loss"]) for s in common]
        difference = compare_values(*zip(*pairs))
        row |= {"difference": difference.mean_difference, "low": difference.ci_low, "high": difference.ci_high}
        row["dense_loss"] = float(np.mean([second for _, second in pairs]))
        matches = {s: float(run.metrics["exact_match"]) for s, run in seeds.items() if has_answers(run)}
        row["exact"] = 100 * float(np.mean([*matches.values()])) if matches else math.nan
        both = [(matches[s], float(dense[s].metrics["exact_match"])) for s in matches if has_answers(dense.get(s))]
        exact_difference = compare_values(*zip(*both)) if both else NO_PAIRS
        row["exact_seeds"] = len(matches)
        row |= {
            "exact_difference": 100 * exact_difference.mean_difference,
            "exact_low": 100 * exact_difference.ci_low,
            "exact_high": 100 * exact_difference.ci_high,
        }
        rows.append(row)
    return pd.DataFrame(rows)


def has_answers(run: TrainingRun | None) -> bool:
    """Return whether the adapter of a run answered the questions."""
    return run is not None and "exact" in run.items


def arm_lines(arms: pd.DataFrame) -> str:
    """Return the arms as a table."""
    header = ["arm", "seeds", "steps", "lr", "loss", "− dense, %", "token accuracy", "ms, 8B shape", "exact match, %",
              "− dense, points"]  # fmt: skip
    rows = []
    for row in arms.to_dict("records"):
        is_dense = row["arm"] == "dense"
        share = [100 * row[name] / row["dense_loss"] for name in ("difference", "low", "high")]
        points = [row[name] for name in ("exact_difference", "exact_low", "exact_high")]
        exact_match = number(row["exact"], ".1f") + (f" ({row['exact_seeds']})" if row["exact_seeds"] else "")
        rows.append([
            row["arm"], str(row["seeds"]), str(row["steps"]), f"{row['lr']:g}", f"{row['loss']:.4f}",
            "" if is_dense else with_interval(*share, "+.2f"), f"{row['accuracy']:.4f}", number(row["step_ms"], ".0f"),
            exact_match, "" if is_dense else with_interval(*points, "+.1f"),
        ])  # fmt: skip
    return markdown_table(header, rows)


def rate_lines(other: pd.DataFrame, model: str) -> str:
    """Return the held-out loss of each tuned arm by learning rate, the best in bold."""
    part = other[other["part"] == f"tune_{model}"].assign(arm=lambda t: t["run"].str.rpartition("_lr")[0])
    rates = sorted(part["lr"].unique())
    rows = []
    for arm in [arm for arm in TUNED if arm in set(part["arm"])]:
        losses = part[part["arm"] == arm].set_index("lr")["eval_loss"]
        cells = [number(losses.get(rate, math.nan), ".4f") or "failed" for rate in rates]
        best = rates.index(losses.idxmin())
        cells[best] = f"**{cells[best]}**"
        rows.append([arm, *cells])
    return markdown_table(["loss", *(f"{rate:g}" for rate in rates)], rows)


def break_lines(other: pd.DataFrame, arms: pd.DataFrame) -> str:
    """Return dense and fp8 under each setting: mean losses, and their difference in percent of dense by seed."""
    part = other[other["part"] == "breaks"].set_index("run")
    tuned = arms.set_index("arm")
    fp8 = tuned.loc["fp8"]
    usual = f"{100 * fp8['difference'] / fp8['dense_loss']:+.2f} (mean of {fp8['seeds']:.0f})"
    rows = [["as tuned", f"{tuned.loc['dense', 'loss']:.4f}", f"{fp8['loss']:.4f}", usual]]
    for setting in BREAKS:
        pairs = [[f"{arm}_{setting}_s{seed}" for arm in ("dense", "fp8")] for seed in SEEDS[:2]]
        losses = np.array([part["eval_loss"].reindex(pair) for pair in pairs])
        absent = ["failed" if part["status"].reindex(pair).eq("failed").any() else "not run" for pair in pairs]
        means = [number(pd.Series(column).mean(), ".4f") for column in losses.T]  # of the runs that ended
        shares = 100 * (losses[:, 1] / losses[:, 0] - 1)
        cells = [number(share, "+.2f") or absent[i] for i, share in enumerate(shares)]
        rows.append([setting, *means, ", ".join(cells)])
    return markdown_table(["setting", "dense", "fp8", "fp8 − dense, %, by seed"], rows)


def draw(arms: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draw a panel for each model: a dot an arm, and dense training for less time as a line."""
    with new_figure(3.7 * len(arms)) as figure:
        for axes, (model, table) in zip(figure.subplots(len(arms), squeeze=False)[:, 0], arms.items()):
            table = table.dropna(subset=["step_ms"])
            is_dense = table["arm"].str.startswith("dense")
            line = table[is_dense].sort_values("step_ms")
            for part, color, style in ((line, COLORS["blue"], "o-"), (table[~is_dense], COLORS["orange"], "o")):
                errors = [part["loss"] - part["ci_low"], part["ci_high"] - part["loss"]]
                axes.errorbar(part["step_ms"], part["loss"], yerr=errors, fmt=style, color=color, capsize=3)
            for i, row in enumerate(table[~is_dense].sort_values("step_ms").to_dict("records")):
                offset, side = ((7, 5), "bottom") if i % 2 else ((7, -5), "top")  # neighbours have labels apart
                place = (row["step_ms"], row["loss"])
                axes.annotate(row["arm"], place, offset, textcoords="offset points", va=side, fontsize=9)
            axes.annotate(
                "dense, and for less time", (line["step_ms"].iloc[0], line["loss"].iloc[0]), (9, 5),
                textcoords="offset points", fontsize=9, color=COLORS["blue"],
            )  # fmt: skip
            axes.set_title(TITLES[model], fontsize=11)
            axes.set_ylabel("loss, nats a label (95 %)")
        axes.set_xlabel("ms per step of a Llama-3-8B shape, 8 × 512 tokens, a quarter labelled")
        save_figure(figure, path)


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """Return ``page`` with each table in place of what stands between its two markers.

    Raises:
        InputError: the page lacks a marker.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, marker, rest = page.partition(begin)
        _, end_marker, after = rest.partition(end)
        if not marker or not end_marker:
            raise InputError(f"README.md has no <!-- {name} --> with an {end} behind it")
        page = f"{before}{begin}{table}\n{end}{after}"
    return page


def write_tables(folder: Path, speed: pd.DataFrame) -> None:
    """Rewrite the tables of README.md in ``folder``, and its figure, from the records there."""
    study, other = read_contrasts(folder / "study.yaml"), pd.read_csv(folder / OTHER)
    tables, arms = {}, {}
    for model, name in PACKED.items():
        if not is_packed(folder / name):
            continue
        with unpacked([folder / name]) as paths:
            comparison = read_runs(paths)
        arms[model] = arm_table(comparison, speed)
        tables[f"{model} contrasts"] = contrast_lines(judged(study, comparison))
        tables[f"{model} arms"] = arm_lines(arms[model])
        tables[f"{model} rates"] = rate_lines(other, model)
    tables["breaks"] = break_lines(other, arms["qwen"])
    page = folder / "README.md"
    write_text(page, with_tables(page.read_text(encoding="utf-8"), tables))
    draw(arms, folder / "frontier.png")
    for name, table in tables.items():
        print(f"{name}\n{table}\n")
    print(other[other["part"] == "exact"][["run", "eval_rows", "exact_match"]].to_string(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "main", "exact", "pack", "tables"))
    parser.add_argument("folder", type=Path, nargs="?", help="of the runs; grids are written to its folder grids")
    parser.add_argument("--speed", type=Path, default=HERE / "speed.csv", help="table of step times")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the records, the page and the figure")
    args = parser.parse_args()
    speed = pd.read_csv(args.speed)
    if args.stage == "tables":
        write_tables(args.results, speed)
        return
    if args.folder is None:
        parser.error(f"{args.stage} needs the folder of the runs")
    if args.stage == "pack":
        pack_runs(args.folder, args.results)
    else:
        write_grids(args.stage, args.folder, speed)


if __name__ == "__main__":
    main()
