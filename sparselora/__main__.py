"""``python -m sparselora COMMAND`` and ``sparselora COMMAND``: only the sub-command that is called is imported."""

from __future__ import annotations

import sys

from sparselora.namesake import mixed_installation

if _mixed := mixed_installation():  # before an import of what the other package may have overwritten
    print(f"sparselora: error: {_mixed}", file=sys.stderr)
    sys.exit(2)

from sparselora.runs.process import complain, end, start

_MODULE = "python -m sparselora"

if __name__ == "__main__":
    start(_MODULE)  # before the imports that take time

import importlib
from collections.abc import Sequence
from typing import NoReturn

from sparselora import __version__
from sparselora.cli import run_script
from sparselora.commands import COMMANDS, PHASES
from sparselora.errors import shown, suggest


def _usage(program: str) -> str:
    width = max(map(len, (*COMMANDS, *PHASES)))

    def table(commands: dict[str, str]) -> str:
        return "".join(f"  {name:<{width}}  {text}\n" for name, text in commands.items())

    return f"usage: {program} COMMAND [--help] …\n\n{table(COMMANDS)}\nphases:\n{table(PHASES)}"


def main(argv: Sequence[str] | None = None, program: str = _MODULE) -> int:
    """Run the command in ``argv`` (default: the process's arguments) and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = [*COMMANDS, *PHASES]
    listed = ", ".join(commands)
    if not argv:
        complain(f"{program}: error: no command given (commands: {listed}; --help says what each does)")
        return 2
    if argv[0] in {"-h", "--help"}:
        print(_usage(program), end="")
        return 0
    if argv[0] == "--version":
        print(f"sparselora {__version__}")
        return 0
    name = argv[0]
    if name not in commands:
        complain(f"{program}: error: unknown command {shown(name)}{suggest(name, commands)} (commands: {listed})")
        return 2
    return run_script(importlib.import_module(f"sparselora.commands.{name}"), f"{program} {name}", argv[1:])


def console() -> NoReturn:
    """Run the ``sparselora`` command of an installation."""
    start("sparselora")
    end(main(program="sparselora"))


if __name__ == "__main__":
    end(main())
