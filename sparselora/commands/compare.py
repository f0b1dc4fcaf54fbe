"""Compare the methods of a pruning sweep, runs of `train`, or edits: tables, paired tests on seeds and rows, figures.

Reads the results.csv that prune_finetune_lora.py fills, and the predictions in the folders of its cells; or the folders
of several runs of `train`, and reads those with a novelty gate at equal updates and equal time too; or the --run_root
of a grid of edits with reports. A packed study (a folder of runs as tables, results/pack.py) is read like the folder
that it was. Unless --out_dir says otherwise, writes to the folder 'compare' next to the runs (in the --run_root of a
grid, in a packed study).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparselora.cli import add_run_arguments, print_request
from sparselora.compare import Comparison, read_comparison
from sparselora.runs.folder import CopyOfReport, RunFolder, write_csv, write_text
from sparselora.runs.packed import is_packed, unpacked
from sparselora.runs.provenance import files_hash
from sparselora.runs.request import RunRequest

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
        comparison = read_comparison(results, baseline)
        packed = next((path for path in (args.results[0], args.results[0].parent) if is_packed(path)), None)
        default = comparison.default_folder if packed is None else packed / "compare"
        out_dir = str(default) if args.out_dir is None else args.out_dir
        if args.dry_run:
            settings = {**vars(args), "out_dir": out_dir}
            print_request(RunRequest("compare", Path(out_dir), {}, tuple(comparison.outputs), settings))
        else:
            write_comparison(comparison, open_folder(comparison, out_dir, args.seed, args.overwrite), args)


def write_comparison(comparison: Comparison, folder: RunFolder, args: argparse.Namespace) -> None:
    """Write the report, its tables and figures and the copy of it, unless a finished run already has; print it."""
    copy = CopyOfReport(args.output, "--output", folder, "compare.md")
    if folder.is_finished():
        copy.write()
        print(folder.finished_message())
    else:
        with folder:
            report = comparison.report(args.seed)
            for name, table in report.tables.items():
                write_csv(folder.path(name), table)
            for name, draw in report.figures.items():
                draw(folder.path(name))
            write_text(folder.path("compare.md"), report.page)
        copy.write()
        print(report.text)
        print(f"wrote {folder.folder}: compare.md says how to read the columns")
    if copy.path is not None:
        print(f"wrote {copy.path}")


def open_folder(comparison: Comparison, out_dir: str, seed: int, overwrite: bool) -> RunFolder:
    """Return the folder of a comparison, which is identified by the content that it reads.

    The content, not the paths: the folder may lie inside one that the command was called with.
    """
    arguments = {
        "results": [path.resolve().name for path in comparison.inputs],
        "content": files_hash(comparison.files),
        "baseline": comparison.baseline_label,
        "seed": seed,
    }
    return RunFolder(
        out_dir,
        "compare",
        arguments,
        reads=[("results", path) for path in comparison.inputs],
        outputs=comparison.outputs,
        seed=seed,
        overwrite=overwrite,
    )
