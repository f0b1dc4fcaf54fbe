"""Phase B: do the weights of a model concentrate, which cheap predictor ranks channels best, what rank do they need?

The same command as `sparselora inspect`, from a checkout; ``--help`` says what it measures and writes.
"""

from __future__ import annotations

from sparselora.runs.process import end, start

if __name__ == "__main__":
    start("inspect_svd_predictors.py")  # before the imports that take time

from collections.abc import Sequence

from sparselora.cli import run_script
from sparselora.commands import inspect


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(inspect, "inspect_svd_predictors.py", argv)


if __name__ == "__main__":
    end(main())
