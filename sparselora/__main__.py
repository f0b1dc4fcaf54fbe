"""``python -m sparselora COMMAND``: a table of sub-commands; only the one that is called is imported."""

from __future__ import annotations

from sparselora.runs.process import complain, end, start

_PROGRAM = "python -m sparselora"

if __name__ == "__main__":
    start(_PROGRAM)  # before the imports that take time

import importlib
import sys
from collections.abc import Sequence

from sparselora import __version__
from sparselora.cli import Parser, run_command
from sparselora.errors import shown, suggest

COMMANDS = {
    "rank": "the least rank each layer of a model, or each module of an adapter, needs",
    "savings": "what LoRA saves in parameters, gradients and optimizer state",
    "train": "fine-tune a LoRA, dense or with contextual sparsity, from a YAML file",
    "bench": "does contextual sparsity pay here: step times, FLOPs, quality of the estimates",
    "sensitivity": "how the loss rises with one layer sparse, and layer sparsities for a FLOP budget",
    "eval": "GSM8K exact match, held-out loss or accuracy of a model, with an adapter or alone",
    "edit": "a LoRA adapter with its spectrum rescaled by what the loss reacts to, and whether that helps",
    "reduce": "a smaller adapter: every module's update cut to a lower rank",
    "smoke_test": "the mathematics of editing and one tiny edit, without GPU or network, in seconds",
    "compare": "tables, paired tests and figures from the results of a sweep",
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return f"usage: {_PROGRAM} COMMAND [--help] …\n\n" + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    known = ", ".join(COMMANDS)
    if not argv:
        complain(f"{_PROGRAM}: error: no command given (commands: {known}; --help says what each does)")
        return 2
    if argv[0] in {"-h", "--help"}:
        print(_usage(), end="")
        return 0
    if argv[0] == "--version":
        print(f"sparselora {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        complain(f"{_PROGRAM}: error: unknown command {shown(name)}{suggest(name, COMMANDS)} (commands: {known})")
        return 2
    module = importlib.import_module(f"sparselora.commands.{name}")
    parser = Parser(prog=f"{_PROGRAM} {name}", description=module.__doc__)
    module.add_arguments(parser)
    return run_command(module.run, parser.parse_args(argv[1:]), parser.prog)


if __name__ == "__main__":
    end(main())
