"""Compare the methods of a pruning sweep, runs of `train`, or edits: tables, paired tests on seeds and rows, figures.

Reads the results.csv that prune_finetune_lora.py fills, and the predictions in the folders of its cells; or the folders
of several runs of `train`, and reads those with a novelty gate at equal updates and equal time too; or the --run_root
of a grid of edits with reports. A packed study (a folder of runs as tables, results/pack.py) is read like the folder
that it was. Unless --out_dir says otherwise, writes to the folder 'compare' next to the runs (in the --run_root of a
grid, in a packed study).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparselora.cli import ReportCopy, add_run_arguments, run_in_folder
from sparselora.compare import Comparison, read_comparison
from sparselora.config.contrasts import read_contrasts
from sparselora.runs.files import write_csv, write_text
from sparselora.runs.folder import RunFolder
from sparselora.runs.packed import is_packed, unpacked
from sparselora.runs.provenance import files_hash
from sparselora.runs.request import RunRequest

EXAMPLES = """\
  sparselora compare lora_runs
  sparselora compare runs/baseline runs/novelty --output gate.md
  sparselora compare runs/arms --study study.yaml"""


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
    parser.add_argument(
        "--study", type=Path, metavar="FILE",
        help="YAML file of the contrasts that were named before the runs (else all is exploratory)",
    )  # fmt: skip
    parser.add_argument(
        "--forecast", type=Path, metavar="FILE",
        help="frontier.csv of a search, checked by runs of train that are named like its candidates",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the Markdown report here too")
    add_run_arguments(parser, "")
    parser.set_defaults(out_dir=None)


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a comparison, as a grid asks for it; the runs must be there."""
    with _read(args) as comparison:
        return _request(args, comparison)


def run(args: argparse.Namespace) -> None:
    with _read(args) as comparison:

        def body(folder: RunFolder) -> None:
            _write(comparison, folder, args.seed)

        run_in_folder(
            _request(args, comparison),
            body,
            dry_run=args.dry_run,
            copy=ReportCopy("--output", args.output, "compare.md"),
        )


def name_parts(values: Mapping[str, Any]) -> tuple[list[str], frozenset[str]]:
    """Return how the name of a comparison in a grid begins: what is compared; and the flags to leave out behind."""
    names = [Path(path).name for path in values["results"] or ()]
    return ["compare", "+".join(names), f"seed{values['seed']}"], frozenset({"results", "seed", "output"})


@contextlib.contextmanager
def _read(args: argparse.Namespace) -> Iterator[Comparison]:
    """Read what the flags name; a packed study is unpacked for as long as the block runs."""
    with unpacked([*args.results, *([] if args.baseline is None else [args.baseline])]) as paths:
        study = None if args.study is None else read_contrasts(args.study)
        baseline = None if args.baseline is None else paths[-1]
        yield read_comparison(paths[: len(args.results)], baseline, study, args.forecast)


def _request(args: argparse.Namespace, comparison: Comparison) -> RunRequest:
    """Return the request of a comparison, which is identified by the content that it reads.

    The content, not the paths: the folder may lie inside one that the command was called with.
    """
    folder = _folder(args, comparison)
    return RunRequest(
        "compare",
        folder,
        {
            "results": [path.resolve().name for path in comparison.inputs],
            "content": files_hash(comparison.files),
            "baseline": comparison.baseline_label,
            "seed": args.seed,
            "study": args.study,
        },
        tuple(comparison.outputs),
        settings=vars(args) | {"out_dir": folder},
        inputs=("study",),
        reads=tuple(("results", path) for path in comparison.inputs),
        seed=args.seed,
        overwrite=args.overwrite,
    )


def _folder(args: argparse.Namespace, comparison: Comparison) -> Path:
    if args.out_dir is not None:
        return Path(args.out_dir)
    packed = next((path for path in (args.results[0], args.results[0].parent) if is_packed(path)), None)
    return comparison.default_folder if packed is None else packed / "compare"


def _write(comparison: Comparison, folder: RunFolder, seed: int) -> None:
    """Write the page, its tables and its figures, and print what the page says."""
    with folder:
        report = comparison.report(seed)
        for name, table in report.tables.items():
            write_csv(folder.path(name), table)
        for name, draw in report.figures.items():
            draw(folder.path(name))
        write_text(folder.path("compare.md"), report.page)
    print(report.text)
    print(f"wrote {folder.folder}: compare.md says how to read the columns")
