"""Compare the methods of a pruning sweep, runs of `train`, or edits: tables, paired tests on seeds and rows, figures.

Reads the results.csv that prune_finetune_lora.py fills, and the predictions in the folders of its cells; or the folders
of several runs of `train`, and reads those with a novelty gate at equal updates and equal time too; or the --run_root
of a grid of edits with reports. A packed study (a folder of runs as tables, results/pack.py) is read like the folder
that it was. Unless --out_dir says otherwise, writes to the folder 'compare' beside the runs (in the --run_root of a
grid, in a packed study).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sparselora.cli import add_run_arguments, print_plan
from sparselora.compare.edit_comparison import HOW_TO_READ_EDITS, edits_report
from sparselora.compare.edit_prediction import prediction_points, prediction_table
from sparselora.compare.edit_runs import Edits, holds_edits, read_edits
from sparselora.compare.edit_tables import adapter_table, config_table, run_table, selection_table
from sparselora.compare.novelty_report import HOW_TO_READ_GATE, gate_report
from sparselora.compare.novelty_tables import (
    GateStudy,
    gate_behaviour,
    gate_table,
    holds_gated_runs,
    loss_curves,
    read_gates,
)
from sparselora.compare.packed import is_packed, unpacked
from sparselora.compare.runs import Comparison, compare_runs, describe_runs, holds_train_runs, read_runs
from sparselora.compare.sweep import (
    CONTROL,
    REFERENCE_MOMENT,
    STATIC,
    PositiveControl,
    Study,
    compare,
    describe,
    has_gates,
    positive_control,
    read_sweep,
)
from sparselora.errors import InputError
from sparselora.report.markdown import markdown_table, number, p_value, with_interval
from sparselora.runs.folder import CopyOfReport, RunFolder, write_csv, write_text
from sparselora.runs.provenance import files_hash

_MOMENT = {"before": "before", "right_after": "right after", "after": "after"}
_GATE_MOMENT = {STATIC: "best fixed subset"}

EXAMPLES = """\
  sparselora compare lora_runs
  sparselora compare runs/baseline runs/novelty --output gate.md"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        help="results.csv of a sweep, or the folder that holds it; or runs of train, or of edit; or a packed study",
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN",
        help="run of train that the others are compared with (else the first that skips no step)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the Markdown report here too")
    add_run_arguments(parser, "")
    parser.set_defaults(out_dir=None)


def run(args: argparse.Namespace) -> None:
    with unpacked([*args.results, *([] if args.baseline is None else [args.baseline])]) as paths:
        results, baseline = paths[: len(args.results)], None if args.baseline is None else paths[-1]
        if holds_edits(results[0]):
            _compare_edits(args, results)
        elif len(results) > 1 or baseline is not None or holds_train_runs(results[0]):
            _compare_train_runs(args, results, baseline)
        else:
            _compare_sweep(args, results[0])


@dataclass(frozen=True)
class Opened:
    """The folder of a comparison, and the copy of its report; None where there is nothing to do."""

    folder: RunFolder
    copy: CopyOfReport

    def end(self, report: str) -> None:
        """Print the report and write its copy."""
        self.copy.write()
        print(report)
        print(f"wrote {self.folder.folder}: compare.md says how to read the columns")
        self._say_copied()

    def _say_copied(self) -> None:
        if self.copy.path is not None:
            print(f"wrote {self.copy.path}")


def _open(
    args: argparse.Namespace,
    default: Path,
    outputs: Sequence[str],
    results: Sequence[Path],
    files: Sequence[Path],
    baseline: str | None = None,
) -> Opened | None:
    """Open the folder of a comparison; print what there is to say if that is all.

    Args:
        default: the folder unless ``--out_dir`` says otherwise, or the runs are of a packed study.
        results: the table or the runs that are compared.
        files: what is read of them, where it is there. A comparison is known by its content: it may lie inside the
            folder that it was called with, whose content is no part of it.
        baseline: the name of the run that was chosen as such.
    """
    packed = next((path for path in (args.results[0], args.results[0].parent) if is_packed(path)), None)
    default = default if packed is None else packed / "compare"
    out_dir = str(default) if args.out_dir is None else args.out_dir
    if args.dry_run:
        print_plan(argparse.Namespace(**{**vars(args), "out_dir": out_dir}), ["run.json", *outputs])
        return None
    arguments = {
        "results": [path.resolve().name for path in results],
        "content": files_hash(files),
        "baseline": baseline,
        "seed": args.seed,
    }
    folder = RunFolder(
        out_dir, "compare", arguments, reads=[("results", path) for path in results], outputs=outputs, seed=args.seed,
        overwrite=args.overwrite,
    )  # fmt: skip
    opened = Opened(folder, CopyOfReport(args.output, "--output", folder, "compare.md"))
    if folder.is_finished():
        opened.copy.write()
        print(folder.finished_message())
        opened._say_copied()
        return None
    return opened


def _files(folders: Sequence[Path], *names: str) -> list[Path]:
    return [folder / name for folder in folders for name in names]


def _compare_sweep(args: argparse.Namespace, results: Path) -> None:
    if results.is_dir():
        results /= "results.csv"
    studies = read_sweep(results)
    figures = [f"accuracy_against_keep_ratio{suffix}" for suffix in _suffixes(studies)]
    charts = [f"{name}.{end}" for name in figures for end in ("csv", "png")]
    cells = sorted({run for study in studies for run in study.cells["run_dir"] if run})
    opened = _open(
        args, results.parent / "compare", ["compare.md", "comparisons.csv", "mcnemar.csv", *charts], [results],
        [results, *_files([results.parent / cell for cell in cells], "predictions.csv", "run_args.json")],
    )  # fmt: skip
    if opened is None:
        return
    reports, differences, exact = [], [], []
    with opened.folder as folder:
        from sparselora.report.pruning import accuracy_against_keep_ratio

        seeds = np.random.SeedSequence(args.seed).spawn(len(studies))
        for number, (study, seed, figure) in enumerate(zip(studies, seeds, figures), start=1):
            for_control, for_tests = seed.spawn(2)
            described = describe(study)
            control = positive_control(study, for_control)
            table, per_seed = compare(study, for_tests)
            differences.append(_with_settings(table, number, study))
            exact.append(_with_settings(per_seed, number, study))
            reports.append(_report(number, study, studies, described, control, table, per_seed))
            accuracy_against_keep_ratio(described, folder.path(f"{figure}.png"), _title(study), CONTROL)
        write_csv(folder.path("comparisons.csv"), pd.concat(differences, ignore_index=True))
        write_csv(folder.path("mcnemar.csv"), pd.concat(exact, ignore_index=True))
        how_to_read = [_HOW_TO_READ, ""]
        if any(map(has_gates, studies)):
            how_to_read += [_HOW_TO_READ_TOKEN_GATES, ""]
        text = "\n".join(["# Comparison of a pruning sweep", "", *how_to_read, *reports])
        write_text(folder.path("compare.md"), text)
    opened.end("\n".join(reports))


def _suffixes(studies: Sequence[Study]) -> list[str]:
    return [""] if len(studies) == 1 else [f"_{number}" for number in range(1, len(studies) + 1)]


def _with_settings(table: pd.DataFrame, number: int, study: Study) -> pd.DataFrame:
    """``table`` with the study it belongs to in front."""
    front = pd.DataFrame({"study": number, **study.settings}, index=table.index)
    return pd.concat([front, table], axis=1)


# --- the report ---------------------------------------------------------------------------------------------------

_HOW_TO_READ = """\
Runs are paired by seed within one study (equal settings): each difference is the method minus its reference at the
same seed, keep ratio and moment. `no_prune` is the control: the same warm-up and the same further training, nothing
removed. *Right after* is the accuracy between pruning and further training.

- **difference** [95 % interval] and **t p**, **Wilcoxon p**: over seeds (paired t, signed rank); **dz** is the mean
  difference over its standard deviation. **detectable**: the smallest mean difference that this many seeds with this
  spread find four times in five. With n seeds the signed-rank p is never below 2^(1−n).
- **on sentences** [95 % interval] and **bootstrap p**: accuracy on the same sentences, the answers of all seeds to a
  sentence drawn together (10,000 draws). It speaks about new sentences for these seeds, not about new seeds.
- **McNemar**: in how many seeds the exact test of the two runs' answers has an adjusted p below 0.05.
- Every p is adjusted by Holm over all rows of the study, for each test by itself (for McNemar: all rows and seeds).
  The raw ones are in `comparisons.csv` and `mcnemar.csv`."""


_HOW_TO_READ_TOKEN_GATES = """\
Gates (`token_gate`, `energy_gate`, `random_gate`) remove nothing: each token uses that share of the channels, *mean
rank* of them. They are compared with `no_prune`, with as many channels or singular directions chosen once
(`channel_energy`, `svd`), with channels drawn for each token (`random_gate`) and, if the gate learns, of largest energy
for each token (`energy_gate`); a variant (in brackets) also with its plain gate.

*Best fixed subset* is the gated model at the end without its gates, every token using the channels that were active
most often. It is compared with the gate itself (what is lost by choosing once what was trained to be chosen for each
token) and with `channel_energy` and `svd`, which chose once and trained on: these have no such moment, so theirs is
*after*."""


def _title(study: Study) -> str:
    return f"{study.settings['model']} on {study.settings['dataset']}, LoRA r {study.settings['lora_r']}"


def _report(
    number: int,
    study: Study,
    studies: Sequence[Study],
    cells: pd.DataFrame,
    control: PositiveControl | None,
    table: pd.DataFrame,
    per_seed: pd.DataFrame,
) -> str:
    heading = f"## {_title(study)}" if len(studies) == 1 else f"## Study {number} of {len(studies)}: {_title(study)}"
    settings = "; ".join(
        f"{name.removeprefix('arg_')} {value}"
        for name, value in study.settings.items()
        if name not in {"model", "dataset", "lora_r"}
    )
    parts = [heading, settings + ".", f"**Positive control.** {_control_text(control, study, table)}"]
    without = len(study.cells) - len(study.predictions)
    if without:
        parts.append(
            f"No predictions.csv for {without} of {len(study.cells)} runs: "
            + ("tests on sentences are skipped." if not study.predictions else "tests on sentences leave them out.")
        )
    parts.append(f"{study.metric}, mean ± standard deviation over seeds:\n\n" + _cells_table(cells))
    if len(table):
        parts.append(f"Differences in {study.metric}:\n\n" + _differences_table(table, per_seed))
    else:
        parts.append("No two cells share a seed with the control or with random: nothing is tested.")
    return "\n\n".join(parts) + "\n"


def _control_text(control: PositiveControl | None, study: Study, table: pd.DataFrame) -> str:
    if not study.pruned():
        return "None is needed: nothing is pruned in these runs."
    if control is None:
        return (
            f"Missing: the sweep has no {CONTROL} run at a seed of a pruned one. Whether it could see an effect is "
            "unknown; add one with --method no_prune."
        )
    what = f"{CONTROL} minus {control.against} at keep ratio {control.keep_ratio:g}, right after pruning"
    seeds = f"{control.n_seeds} seed{'s' * (control.n_seeds != 1)}"
    if np.isnan(control.low):
        return f"{what}, is {control.difference:+.4f} ({seeds}, no interval): **unknown**. Run three seeds or more."
    interval = (
        f"{control.difference:+.4f} [{control.low:+.4f}, {control.high:+.4f}] ({seeds}, interval over {control.by})"
    )
    if control.separated:
        return f"{what}, is {interval}: it separates. This sweep can see an effect of that size."
    detectable = f"; these {seeds} would find {control.detectable:.4f} or more" if control.detectable > 0 else ""
    found = table[[name for name in ("t_p_holm", "bootstrap_p_holm") if name in table]].min(axis=1)
    some = int((found < 0.05).sum())
    return (
        f"{what}, is {interval}: it does not separate. **Underpowered**{detectable}. Below, no difference is no "
        "evidence of equality"
        + (
            f"; {some} of {len(table)} rows differ all the same (adjusted p < 0.05)."
            if some
            else ", and nothing separates."
        )
    )


def _cells_table(cells: pd.DataFrame) -> str:
    moments = _MOMENT | (_GATE_MOMENT if (cells["moment"] == STATIC).any() else {})
    rows = []
    for (method, keep), part in cells.groupby(["method", "keep_ratio"], sort=False):
        at = part.set_index("moment")
        shown = [_mean_text(at.loc[moment]) if moment in at.index else "" for moment in moments]
        first = part.iloc[0]
        rows.append([str(method), f"{keep:g}", f"{first['active_r']:.3g}", str(first["n_seeds"]), *shown])
    return markdown_table(["method", "keep", "mean rank", "seeds", *moments.values()], rows)


def _mean_text(row: pd.Series) -> str:
    return f"{row['mean']:.4f}" + (f" ± {row['std']:.4f}" if row["n_seeds"] > 1 else "")


def _differences_table(table: pd.DataFrame, per_seed: pd.DataFrame) -> str:
    sentences = bool((table["n_sentences"] > 0).any())
    header = ["method", "keep", "moment", "against", "seeds", "difference", "t p", "Wilcoxon p", "dz", "detectable"]
    key = ["method", "keep_ratio", "moment", "reference"]
    found = {name: part["p_holm"] < 0.05 for name, part in per_seed.groupby(key)}
    rows = []
    for row in table.to_dict("records"):
        cells = [row["method"], f"{row['keep_ratio']:g}", *_compared(row["moment"], row["reference"])]
        cells += [str(row["n_seeds"])]
        cells += [with_interval(row["difference"], row["ci_low"], row["ci_high"])]
        cells += [p_value(row["t_p_holm"]), p_value(row["wilcoxon_p_holm"])]
        cells += [number(row["cohens_dz"], "+.2f"), number(row["smallest_detectable"], ".4f")]
        if sentences:
            low, high = row["sentence_ci_low"], row["sentence_ci_high"]
            cells += [with_interval(row["sentence_difference"], low, high), p_value(row["bootstrap_p_holm"])]
            mcnemar = found.get(tuple(row[name] for name in key))
            cells += ["" if mcnemar is None else f"{int(mcnemar.sum())} of {len(mcnemar)}"]
        rows.append(cells)
    return markdown_table(header + (["on sentences", "bootstrap p", "McNemar"] if sentences else []), rows)


def _compared(moment: str, reference: str) -> list[str]:
    """The moment of a method in words, and its reference, with the moment of that where it is another."""
    at = REFERENCE_MOMENT[moment]
    return [(_MOMENT | _GATE_MOMENT)[moment], reference if at == moment else f"{reference}, {_MOMENT[at]}"]


# --- runs of train ------------------------------------------------------------------------------------------------

_HOW_TO_READ_RUNS = """\
Runs are grouped by configuration (all settings but the seed) and paired by seed with the baseline: each difference is
the configuration minus the baseline at the same seed, which trains on the same batches. Times are medians over steps.

- **difference** [95 % interval], **t p**, **dz**: over seeds (paired t); **detectable** is the smallest mean difference
  that this many seeds with this spread find four times in five.
- **on rows** [95 % interval] and **bootstrap p**: the same difference on the same evaluation rows, the answers of all
  seeds to a row drawn together (2,000 draws). It speaks about new rows for these seeds, not about new seeds.
- **speed-up**: time of the baseline's step over that of the configuration's, a geometric mean over seeds. The other
  ratios are configuration over baseline.
- Every p is adjusted by Holm over the rows of the table. The raw ones are in `comparisons.csv`."""


_RUNS_OUTPUTS = (
    "compare.md", "configs.csv", "comparisons.csv", "quality_against_cost.png", "quality_against_cost.csv",
)  # fmt: skip
_GATE_OUTPUTS = ("gate.csv", "gate_loss.png", "gate_loss.csv", "gate_behaviour.png", "gate_behaviour.csv")


_RUN_FILES = ("summary.csv", "predictions.csv", "eval.csv", "gate.csv", "metrics.csv")


def _compare_train_runs(args: argparse.Namespace, results: Sequence[Path], baseline: Path | None) -> None:
    comparison = read_runs(results, baseline)
    gates = read_gates(comparison) if holds_gated_runs(comparison) else None
    runs = [run.path for group in comparison.groups for run in group.runs.values()]
    opened = _open(
        args, results[0].parent / "compare", _RUNS_OUTPUTS + (_GATE_OUTPUTS if gates else ()),
        runs, _files(runs, *_RUN_FILES), comparison.baseline.label,
    )  # fmt: skip
    if opened is None:
        return
    with opened.folder as folder:
        from sparselora.report.runs import quality_against_cost

        configs = describe_runs(comparison)
        differences = compare_runs(comparison, np.random.SeedSequence(args.seed))
        write_csv(folder.path("configs.csv"), configs)
        write_csv(folder.path("comparisons.csv"), differences)
        quality_against_cost(configs, differences, folder.path("quality_against_cost.png"), _runs_title(comparison))
        report, how_to_read = _runs_report(comparison, configs, differences), _HOW_TO_READ_RUNS
        if gates is not None:
            report += "\n" + _write_gates(gates, folder, args.seed, _runs_title(comparison))
            how_to_read += "\n\nOf runs with a gate:\n\n" + HOW_TO_READ_GATE
        write_text(folder.path("compare.md"), f"# Comparison of runs\n\n{how_to_read}\n\n{report}")
    opened.end(report)


def _write_gates(study: GateStudy, folder: RunFolder, seed: int, title: str) -> str:
    """Write the table and the figures of gated runs; their section of the report."""
    from sparselora.report import novelty

    # A stream of its own: the draws of the comparison above are what they are without gates.
    table = gate_table(study, np.random.SeedSequence([seed, 1]))
    write_csv(folder.path("gate.csv"), table)
    novelty.gate_loss(loss_curves(study), folder.path("gate_loss.png"), title)
    novelty.gate_behaviour(gate_behaviour(study), folder.path("gate_behaviour.png"), title)
    return gate_report(study, table)


def _runs_title(comparison: Comparison) -> str:
    summary = next(iter(comparison.baseline.runs.values())).summary
    return f"{summary['model']} on {summary['dataset']}, baseline {comparison.baseline.label}"


def _runs_report(comparison: Comparison, configs: pd.DataFrame, differences: pd.DataFrame) -> str:
    unit = "nats per token, lower is better" if comparison.lower_is_better else "fraction, higher is better"
    parts = [
        f"## {_runs_title(comparison)}",
        f"Evaluation {comparison.metric} ({unit}), mean ± standard deviation over seeds, and costs:",
        _configs_table(configs),
        f"Differences in {comparison.metric} to {comparison.baseline.label}:",
        _runs_table(differences),
        _detectable_text(differences),
        *comparison.notes,
    ]
    return "\n\n".join(parts) + "\n"


def _configs_table(configs: pd.DataFrame) -> str:
    metric = configs["metric"].iloc[0]
    header = ["config", "seeds", metric, "ms/step", "tokens/s", "peak MB", "FLOPs/token", "sparse steps"]
    rows = []
    for row in configs.to_dict("records"):
        quality = f"{row['mean']:.4f}" + ("" if np.isnan(row["std"]) else f" ± {row['std']:.4f}")
        cells = [row["config"], str(row["n_seeds"]), quality, f"{row['step_ms']:.1f}", f"{row['tokens_per_s']:.0f}"]
        cells += [number(row["peak_mb"], ".0f"), number(row["active_flops_per_token"], ".4g")]
        rows.append([*cells, f"{row['sparse_steps']:.0f}"])
    return markdown_table(header, rows)


def _runs_table(differences: pd.DataFrame) -> str:
    header = ["config", "seeds", "difference", "t p", "dz", "detectable", "on rows", "bootstrap p"]
    header += ["speed-up", "memory", "FLOPs"]
    rows = []
    for row in differences.to_dict("records"):
        cells = [row["config"], str(row["n_seeds"]), with_interval(row["difference"], row["ci_low"], row["ci_high"])]
        cells += [p_value(row["t_p_holm"]), number(row["cohens_dz"], "+.2f"), number(row["detectable"], ".4f")]
        cells += [
            with_interval(row["row_difference"], row["row_ci_low"], row["row_ci_high"]),
            p_value(row["row_p_holm"]),
        ]
        low, high = row["speed_up_low"], row["speed_up_high"]
        spread = "" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        cells += [f"{row['speed_up']:.2f}×{spread}" if not np.isnan(row["speed_up"]) else ""]
        rows.append([*cells, *(number(row[name], ".2f") for name in ("memory_ratio", "flops_ratio"))])
    return markdown_table(header, rows)


def _detectable_text(differences: pd.DataFrame) -> str:
    """What these seeds could have seen, in words."""
    known = differences.dropna(subset=["detectable"])
    if known.empty:
        return (
            "With one seed a configuration nothing is said about seeds: only the intervals over rows stand. "
            "Run three seeds or more."
        )
    least, most = known["detectable"].min(), known["detectable"].max()
    several = f"{least:.4f}" if np.isclose(least, most) else f"{least:.4f} to {most:.4f} (by configuration)"
    return (
        f"These seeds find a difference of {several} four times in five; a smaller one may be there and not be seen, "
        "so no difference is no evidence of equality beyond the interval."
    )


# --- edits --------------------------------------------------------------------------------------------------------

_EDIT_OUTPUTS = (
    "compare.md", "edits.csv", "adapters.csv", "configs.csv", "selection.csv", "prediction.csv",
    "edit_configs.png", "edit_configs.csv", "prediction.png", "prediction_points.csv",
)  # fmt: skip


def _compare_edits(args: argparse.Namespace, results: Sequence[Path]) -> None:
    if args.baseline is not None:
        raise InputError("--baseline is for runs of train; an edit is compared with its own unedited adapter")
    edits, root = read_edits(results), results[0]
    runs = [run.path for run in edits.runs]
    opened = _open(
        args, (root.parent if (root / "run.json").is_file() else root) / "compare", _EDIT_OUTPUTS,
        runs, _files(runs, "report.csv", "report_items.csv"),
    )  # fmt: skip
    if opened is None:
        return
    with opened.folder as folder:
        from sparselora.spectral.edit import BOOTSTRAP, generator

        table_of_runs = run_table(edits, lambda seed: generator(seed, BOOTSTRAP))
        configs, chosen, predictions = config_table(table_of_runs), selection_table(edits), prediction_table(edits)
        tables = {"edits": table_of_runs, "adapters": adapter_table(table_of_runs), "configs": configs}
        for name, table in (tables | {"selection": chosen, "prediction": predictions}).items():
            write_csv(folder.path(f"{name}.csv"), table)
        _edit_figures(folder, edits, configs)
        report = edits_report(table_of_runs, configs, chosen, predictions, edits.left_out)
        write_text(folder.path("compare.md"), f"# Comparison of edits\n\n{HOW_TO_READ_EDITS}\n\n{report}")
    opened.end(report)


def _edit_figures(folder: RunFolder, edits: Edits, configs: pd.DataFrame) -> None:
    from sparselora.report.spectral import edit_configs, predictions

    edit_configs(folder.path("edit_configs.png"), configs, f"{len(edits.runs)} edits by configuration")
    points = prediction_points(edits)
    write_csv(folder.path("prediction_points.csv"), points)
    title = f"Predicted against measured change of the loss, {len(edits.runs)} runs"
    predictions(folder.path("prediction.png"), points, title)
