"""The terminal side of every command: flags, the scaffold of a run, one-line errors, exit status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import math
import re
import shlex
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from sparselora.config import LARGEST_SEED
from sparselora.errors import InputError, one_line, shown
from sparselora.runs.folder import RECORD, FolderTakenError, RunFolder
from sparselora.runs.process import cancel_status, cancelled_by_signals, complain, flush_output, say_cancelled
from sparselora.runs.provenance import model_stem
from sparselora.runs.report_copy import CopyOfReport
from sparselora.runs.request import RunRequest


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr, with exit status 2, and whose help shows defaults.

    A flag may not be abbreviated: a sweep must not change its meaning when a flag is added.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        # In one place for every flag: what a type of Python accepts and no flag means.
        for kind, convert in ((int, _whole_number), (float, _number), (None, _text), (str, _text), (Path, _path)):
            self.register("type", kind, convert)
        self._common: frozenset[str] | None = None

    def shorten_help(self, common: Collection[str]) -> None:
        """Let ``--help`` show only the flags whose settings are in ``common``, and ``--help_all`` all of them."""
        self.add_argument("--help_all", action=_HelpAll, help="show this help with all flags and exit")
        self._common = frozenset(common) | {"help", "help_all"}

    def format_help(self, *, whole: bool = False) -> str:
        """Return the help: how to call, what the command does, its flags by group, an example.

        Args:
            whole: with the flags that `shorten_help` leaves out.
        """
        formatter = self._get_formatter()
        positional = "".join(f" {_positional(action)}" for action in self._actions if not action.option_strings)
        formatter.add_usage(f"%(prog)s{positional} [--FLAG VALUE …]", self._actions, [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            in_full = whole or self._common is None
            actions = [action for action in group._group_actions if in_full or action.dest in (self._common or ())]
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): (?=must )", r"\1 ", message)
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def _whole_number(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at most 18 digits, got {shown(text)}")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {shown(text)}")
    return value


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty; leave the flag out for its default")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"must be UTF-8 text, got {shown(text)}; rename the file")
    return text


def _path(text: str) -> Path:
    return Path(_text(text))


def _positional(action: argparse.Action) -> str:
    name = action.dest.upper()
    return f"[{name}]" if action.nargs == "?" else f"{name} …" if action.nargs == "+" else name


class _HelpAll(argparse.Action):
    """``--help_all``: print the whole help and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        assert isinstance(parser, Parser)
        print(parser.format_help(whole=True), end="")
        parser.exit()


def _epilog(module: ModuleType) -> str | None:
    examples = getattr(module, "EXAMPLES", None)
    return None if examples is None else f"examples:\n{examples}"


def command_parser(module: ModuleType, prog: str, kind: type[Parser] = Parser) -> Parser:
    """Return the parser of a command's module: its docstring, its ``add_arguments``, its ``EXAMPLES``."""
    parser = kind(prog=prog, description=module.__doc__, epilog=_epilog(module))
    module.add_arguments(parser)
    return parser


def run_script(module: ModuleType, prog: str, argv: Sequence[str] | None = None) -> int:
    """Run a command's module with the arguments ``argv`` (default: the process's); return the exit status."""
    parser = command_parser(module, prog)
    return run_command(module.run, parser.parse_args(argv), prog)


class LineParser(Parser):
    """Parser whose errors are `InputError`: one line of a grid is wrong, not the command line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, except where there is none to speak of (None, False); paragraphs and indented lines of a
    description stay what they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(action.option_strings)
        if isinstance(action, argparse.BooleanOptionalAction):
            names = names.replace("--", "--[no-]", 1).partition(",")[0]
        metavar = self._get_default_metavar_for_optional(action)
        return f"{names} {self._format_args(action, metavar)}".rstrip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kinds: dict[object, str] = {int: "N", row_count: "N", float: "X", Path: "PATH"}
        return kinds.get(action.type, "TEXT")

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs in ("+", "*"):
            return f"{action.metavar or default_metavar} …"
        return super()._format_args(action, default_metavar)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
        return "\n\n".join(
            "\n".join(indent + line for line in paragraph.splitlines())
            if re.search(r"^\s", paragraph, flags=re.MULTILINE)
            else super(_HelpFormatter, self)._fill_text(paragraph, width, indent)
            for paragraph in paragraphs
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):  # as it would be typed
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def check_seed(seed: int) -> None:
    """Raise InputError for a ``--seed`` that some generator of random numbers does not take."""
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"--seed must be a whole number from 0 to {LARGEST_SEED}, got {shown(seed)}")


def refuse_flags(
    args: argparse.Namespace, names: Iterable[str], add_arguments: Callable[[argparse.ArgumentParser], None], why: str
) -> None:
    """Raise InputError where a flag that would change nothing is not at its default.

    Args:
        names: the flags, by the attribute that holds their value.
        add_arguments: adds them, with their defaults.
        why: rest of the sentence that the flag begins: what it is for, and what to do.
    """
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    for name in names:
        if getattr(args, name) != defaults.get_default(name):
            raise InputError(f"--{name} {why}")


def add_run_arguments(parser: argparse.ArgumentParser, out_dir: str, *, seed: bool = True) -> None:
    """Add the flags that every command with an output folder has.

    Args:
        out_dir: the default folder; one with a placeholder, such as ``rank_results/<model>``, is for the help alone,
            and `output_folder` fills it in.
    """
    group = parser.add_argument_group("run")
    text, default = "output folder", out_dir or None
    if "<" in out_dir:
        text, default = f"{text} (default: {out_dir})", None
    group.add_argument("--out_dir", "--outdir", default=default, metavar="DIR", help=text)
    if seed:
        group.add_argument("--seed", type=int, default=0, help="seed of everything random")
    group.add_argument("--dry_run", action="store_true", help="print settings and outputs, then stop")
    group.add_argument("--overwrite", action="store_true", help="replace a finished run in the folder")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def row_count(text: str) -> int:
    """Return the number of rows that a flag asks for, 0 for all of them; -1 means all, too.

    Raises:
        argparse.ArgumentTypeError: no such number.
    """
    count = _whole_number(text)
    if count < -1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, or 0 for all rows, got {count}")
    return max(0, count)


def output_folder(args: argparse.Namespace, root: str, *parts: str | None) -> Path:
    """Return the folder that ``--out_dir`` names; without it, one below ``root`` that is called after the request.

    Args:
        parts: what is asked for, such as the model, in few words; None is left out.
    """
    if args.out_dir is not None:
        return Path(args.out_dir)
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(part for part in parts if part)).lstrip(".")
    return Path(root, name[:_LONGEST_FOLDER])


def source_name(source: str | None) -> str | None:
    """Return the name of a model or adapter for an output folder; of an adapter called "adapter", its run's folder."""
    if source is None:
        return None
    path = Path(source)
    named = path.parent if path.name == "adapter" and path.parent.name else path
    return model_stem(named.as_posix())


_LONGEST_FOLDER = 100

NOT_RESULT = frozenset({"out_dir", "dry_run", "overwrite", "debug", "resume", "command", "run"})
"""Arguments that do not change what a run computes."""


def result_arguments(args: argparse.Namespace) -> dict[str, object]:
    """The parsed arguments that decide a run's result, for `records.RunFolder`."""
    return {name: value for name, value in vars(args).items() if name not in NOT_RESULT}


def print_request(request: RunRequest) -> None:
    """Print what ``--dry_run`` shows: the resolved settings, then the files that the run would write."""
    for name, value in request.settings.items():
        if name not in {"run", "dry_run", "debug"}:
            print(f"{name}: {request.folder if name == 'out_dir' and value is None else value}")
    print("would write:")
    shared = [request.folder.parent / name for name in request.shared_outputs]
    names = [name for name in dict.fromkeys((RECORD, *request.outputs)) if not name.endswith(".partial")]
    for path in (*shared, *(request.folder / name for name in names)):
        print(f"  {path}")


@dataclass(frozen=True)
class ReportCopy:
    """A copy of the output ``name`` of a run in the file that ``flag`` names; none where ``path`` is None."""

    flag: str
    path: Path | None
    name: str


def run_in_folder(
    request: RunRequest,
    body: Callable[[RunFolder], None],
    *,
    dry_run: bool,
    check: Callable[[], object] = lambda: None,
    preview: Callable[[], object] = lambda: None,
    on_finished: Callable[[RunFolder], object] = lambda folder: None,
    copy: ReportCopy | None = None,
    is_main: bool = True,
) -> None:
    """Carry out ``request``: print the plan of a dry run, skip a finished run, or hold the folder and call ``body``.

    Args:
        body: reads the input while the folder is held but nothing is recorded, then enters the folder (``with
            folder:``) and writes the outputs.
        check: raises InputError for what makes the run impossible and only a dry run may leave open, such as a model
            that has to be fetched. Called before the inputs are hashed.
        preview: prints what a dry run shows before its plan.
        on_finished: mends what a finished run has lost outside its folder.
        copy: written when the run has ended, or is finished already.
        is_main: False in all but the first process of a run: it neither holds the folder nor prints.
    Raises:
        InputError: as `RunFolder` and `CopyOfReport`.
    """
    if dry_run:
        preview()
        print_request(request)
        return
    check()
    try:
        _run(request, body, on_finished, copy, is_main)
    except FolderTakenError as error:
        raise InputError(f"{error} (--out_dir {shlex.quote(str(_free_folder(request.folder)))} is free)") from None


def _free_folder(taken: Path) -> Path:
    """Return a folder next to ``taken``, with a number behind its name, that does not exist."""
    return next(
        folder for number in itertools.count(2) if not (folder := taken.with_name(f"{taken.name}_{number}")).exists()
    )


def _run(
    request: RunRequest,
    body: Callable[[RunFolder], None],
    on_finished: Callable[[RunFolder], object],
    copy: ReportCopy | None,
    is_main: bool,
) -> None:
    folder = request.open()
    copied = None if copy is None else CopyOfReport(copy.path, copy.flag, folder, copy.name)
    if folder.is_finished():
        if copied is not None:
            copied.write()
        if is_main:
            on_finished(folder)
            print(folder.finished_message())
            if copied is not None and copied.path is not None:
                print(f"wrote {copied.path}")
        return
    with folder.reserved() if is_main else contextlib.nullcontext():
        body(folder)
        if copied is not None:
            copied.write()
            if copied.path is not None:
                print(f"wrote {copied.path}")


_BAD_NAME = frozenset({
    errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS,
})  # fmt: skip
"""What a system says of a path that cannot be used as asked, however often one tries: bad input, not a failure."""


def run_command(function: Callable[[argparse.Namespace], None], args: argparse.Namespace, prog: str) -> int:
    """Call ``function(args)`` and turn what it raises into an exit status.

    0 is success, 2 bad input, 1 a failure, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP. The error is one line on stderr;
    ``--debug`` shows the traceback before it.
    """
    try:
        with cancelled_by_signals():
            if getattr(args, "seed", None) is not None:
                check_seed(args.seed)
            function(args)
            flush_output()
    except KeyboardInterrupt as error:
        status = cancel_status(error)
        say_cancelled(prog, status - 128)
        return status
    except Exception as error:
        if getattr(args, "debug", False):
            complain(traceback.format_exc().rstrip())
        text = one_line(str(error)) or type(error).__name__
        if isinstance(error, InputError):
            complain(f"{prog}: error: {text}")
            return 2
        if isinstance(error, OSError) and error.errno in _BAD_NAME and error.filename is not None:
            complain(f"{prog}: error: {shown(error.filename)} cannot be used ({error.strerror}); name another")
            return 2
        complain(f"{prog}: failed: {type(error).__name__}: {text} (--debug shows where)")
        return 1
    return 0
