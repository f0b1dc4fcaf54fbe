"""Phase C: warm up a LoRA, prune its rank channels by importance, or gate them by token, train on.

The same command as `sparselora prune`, from a checkout; ``--help`` says what it measures and writes.
"""

from __future__ import annotations

from sparselora.runs.process import end, start

if __name__ == "__main__":
    start("prune_finetune_lora.py")  # before the imports that take time

from collections.abc import Sequence

from sparselora.cli import run_script
from sparselora.commands import prune


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(prune, "prune_finetune_lora.py", argv)


if __name__ == "__main__":
    end(main())
