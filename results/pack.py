"""Pack a folder of runs into a table of runs and compressed tables of predictions, which `compare` reads as well.

    python results/pack.py lora_runs results/pruning/runs

The layout is described in sparselora/runs/packed.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparselora.cli import Parser, run_command
from sparselora.runs.packed import pack


def build_parser() -> Parser:
    parser = Parser(prog="pack.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of run folders, or of a sweep with its results.csv")
    parser.add_argument("packed", type=Path, help="folder for the tables: new, or an earlier packed study")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(args: argparse.Namespace) -> None:
    for path in pack(args.source, args.packed):
        print(f"wrote {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    parsed = build_parser()
    sys.exit(run_command(run, parsed.parse_args(), parsed.prog))
