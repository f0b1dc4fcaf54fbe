"""Run a command once for each line of a file, over GPUs or processes; what is finished is skipped.

Every line of FILE is a JSON object of flags of --command, such as {"name": "svd_s1", "seed": 1}; --defaults gives
flags of all lines, over which a line wins. The same call goes on after an interrupt or a failure. Each run has a
folder of its name in --run_root (prune: one results.csv there, a folder a cell) and a log in --run_root/logs.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from sparselora.cli import LineParser, command_parser
from sparselora.commands import IN_GRIDS
from sparselora.errors import InputError
from sparselora.runs.grid import NOT_IN_A_LINE, GridCommand, is_local_data, plain_name_parts
from sparselora.runs.grid_run import parse_gpus, report_failures, run_grid
from sparselora.runs.process import complain

EXAMPLES = """\
  sparselora grid sweep.jsonl --command train --jobs 2 --defaults --model minilm --dataset rows.jsonl
  sparselora grid edits.jsonl --command edit --run_root runs/edits --gpus 0,1 --dry_run"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a JSON object of flags on each line")
    parser.add_argument("--command", required=True, choices=IN_GRIDS, help="the command that each line runs")
    parser.add_argument(
        "--run_root", type=Path, metavar="DIR", help="folder of the runs (default: runs/ and the name of FILE)"
    )
    parser.add_argument("--gpus", metavar="0,1,…", help="GPUs, each for --jobs runs at a time that see it alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--prefetch", action="store_true", help="fetch adapters and models of the hub first")
    parser.add_argument("--dry_run", action="store_true", help="print the state of each run, then stop")
    parser.add_argument("--overwrite", action="store_true", help="run finished lines again, too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--defaults", nargs=argparse.REMAINDER, default=[], metavar="FLAG", help="flags of all lines; the last flag"
    )


def run(args: argparse.Namespace) -> None:
    """Run the lines of the file that are not finished. One that fails does not stop the others, but is an error."""
    if args.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {args.jobs}")
    command = grid_command(args.command)
    run_root = args.run_root or Path("runs") / args.file.stem
    failures = run_grid(
        args.file,
        command,
        run_root,
        parse_defaults(command, args.defaults),
        lambda text: print(text, flush=True),
        gpus=parse_gpus(args.gpus),
        jobs=args.jobs,
        prefetch=args.prefetch,
        dry_run=args.dry_run,
        overwrite=args.overwrite,
    )
    report_failures(failures, run_root, complain)


def grid_command(name: str) -> GridCommand:
    """Return the sub-command ``name`` as a grid runs it."""
    module: Any = importlib.import_module(f"sparselora.commands.{name}")
    inputs = tuple(getattr(module, "INPUTS", ()))
    return GridCommand(
        name,
        command_parser(module, name, LineParser),
        module.request,
        getattr(module, "name_parts", plain_name_parts(name, inputs)),
        getattr(module, "reads_hub", lambda values: "dataset" in values and not is_local_data(values["dataset"])),
        inputs,
        hasattr(module, "SHARED_OUTPUTS"),
    )


def parse_defaults(command: GridCommand, words: list[str]) -> dict[str, Any]:
    """Return the value of each flag of ``command`` where ``words`` are given for all lines.

    Raises:
        InputError: no flags of the command, or flags that a grid sets itself.
    """
    module: Any = importlib.import_module(f"sparselora.commands.{command.name}")
    parser = command_parser(module, command.name, LineParser)
    # What a run cannot do without may be on the lines.
    for action in parser._actions:
        action.required = False
    for group in parser._mutually_exclusive_groups:
        group.required = False
    try:
        values = vars(parser.parse_args(words))
    except InputError as error:
        raise InputError(f"--defaults: {error}") from None
    for action in parser._actions:
        if action.dest in NOT_IN_A_LINE and values.get(action.dest, action.default) != action.default:
            raise InputError(f"--defaults: --{action.dest} is a flag of the grid; give it before --defaults")
    return values
