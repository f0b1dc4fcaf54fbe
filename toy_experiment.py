"""Phase A: does an SVD or energy signal beat random choice, on matrices whose structure is known?

The same command as `sparselora toy`, from a checkout; ``--help`` says what it measures and writes.
"""

from __future__ import annotations

from sparselora.runs.process import end, start

if __name__ == "__main__":
    start("toy_experiment.py")  # before the imports that take time

from collections.abc import Sequence

from sparselora.cli import run_script
from sparselora.commands import toy


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(toy, "toy_experiment.py", argv)


if __name__ == "__main__":
    end(main())
