"""Check the mathematics of spectral editing, and one tiny edit from file to file, on this machine.

No GPU, no network, no data: a random Llama of two layers with a random LoRA, made on the spot in a temporary folder and
gone afterwards. A line a check; exit status 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparselora.spectral.self_check import Outcome

EXAMPLES = """\
  sparselora smoke_test
  sparselora smoke_test --seed 1 --debug"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the model, the adapter and the data")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a check that breaks")


def run(args: argparse.Namespace) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it
    from sparselora.spectral.self_check import CHECKS, run_checks

    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for outcome in run_checks(Path(folder), args.seed):
            if args.debug and outcome.exception is not None:
                raise outcome.exception
            print(describe(outcome))
            failures += not outcome.is_passed
    if failures:
        raise RuntimeError(f"{failures} of {len(CHECKS)} checks failed")
    print(f"all {len(CHECKS)} checks passed")


def describe(outcome: Outcome) -> str:
    """Return the line of one check."""
    name, exception = outcome.check.name, outcome.exception
    if exception is not None:
        return f"FAILED  {name}: {type(exception).__name__}: {' '.join(str(exception).split())}"
    verdict = "ok" if outcome.is_passed else "FAILED"
    return f"{verdict:<6}  {name}: error {outcome.error:.1e} (at most {outcome.check.limit:.0e})"
