"""A grid: a file of configurations, each a run of one command in its own process, folder and log; finished ones are
skipped.

Every line of a grid is a JSON object of flags of the command; further flags are defaults of all lines. All of it is
checked before anything runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparselora.errors import InputError, shown, suggest
from sparselora.runs.folder import RECORD, read_record
from sparselora.runs.request import RunRequest
from sparselora.runs.user_files import parse_json, read_text

NAME = "name"
LOGS, ADAPTERS, COMPARED = "logs", "adapters", "compare"
"""Folders next to those of the runs."""
FINISHED, UNFINISHED, NEW = "finished", "to run again", "to run"

NOT_IN_A_LINE = frozenset({
    "grid", "run_root", "gpus", "prefetch", "out_dir", "dry_run", "overwrite", "resume", "debug", "help", "help_all",
})  # fmt: skip
"""Flags of a command that a grid sets itself, or that mean nothing line by line."""
_FILE_ENDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gz")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_LONGEST_NAME = 120

Values = Mapping[str, Any]
Flags = Mapping[str, argparse.Action]


@dataclass(frozen=True)
class GridCommand:
    """A command as a grid runs it."""

    name: str
    """The sub-command."""
    parser: argparse.ArgumentParser
    """Of one run; raises InputError."""
    request: Callable[[argparse.Namespace], RunRequest]
    """Raises InputError for arguments that no run can have; otherwise returns what the run would be."""
    name_parts: Callable[[Values], tuple[list[str], frozenset[str]]]
    """Returns how the name of a run with these values begins, and the flags that need no mention behind that."""
    reads_hub: Callable[[Values], bool]
    """Returns whether a run with these values reads a data set on the hub."""
    inputs: tuple[str, ...] = ()
    """Flags that name files or folders."""
    shares_folder: bool = False
    """All runs have one output folder, and each a folder below it that the command names."""

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """The flags that a line may set, by the attribute that holds their value."""
        return {action.dest: action for action in self.parser._actions if action.dest not in NOT_IN_A_LINE}

    @property
    def can_resume(self) -> bool:
        return any(action.dest == "resume" for action in self.parser._actions)


@dataclass(frozen=True)
class Line:
    """One configuration of a grid."""

    number: int
    """Line of the file, from 1."""
    name: str
    """Name of the run's log, and of its folder unless the command names that."""
    is_named: bool
    """The line itself gives the name."""
    values: dict[str, Any]
    """Values of all flags, defaults included."""


@dataclass(frozen=True)
class Job:
    """A run of a grid: what it takes to start it, and what its folder holds."""

    line: Line
    command: str
    """The sub-command."""
    flags: tuple[str, ...]
    """Its flags without the output folder."""
    out_dir: Path
    state: str
    """`FINISHED`, `UNFINISHED` or `NEW`."""
    extra: tuple[str, ...] = ()
    """Flags that the state of the folder calls for: to replace a run, or to resume it."""

    @property
    def process(self) -> list[str]:
        """The words of the command line."""
        # An interrupted run that cannot be resumed is replaced in any case: its record shows that it is ours.
        output = ["--out_dir", str(self.out_dir), *self.extra]
        split = self.flags.index("--") if "--" in self.flags else len(self.flags)
        options, positional = self.flags[:split], self.flags[split:]
        return [sys.executable, "-m", "sparselora", self.command, *options, *output, *positional]


def plain_name_parts(command: str, inputs: Sequence[str] = ()) -> Callable[[Values], tuple[list[str], frozenset[str]]]:
    """Return the `GridCommand.name_parts` of a command without its own: configuration file or command, and seed."""

    def name_parts(values: Values) -> tuple[list[str], frozenset[str]]:
        config, seed = values.get("config"), values.get("seed")
        parts = [command if config is None else Path(str(config)).stem]
        if seed is not None:
            parts.append(f"seed{seed}")
        return parts, frozenset({"config", "seed", "device", *inputs})

    return name_parts


def is_local_data(dataset: str | None) -> bool:
    """Return whether a data set is a file or folder here, or made from what is installed."""
    return dataset is not None and (dataset == "docstrings" or Path(dataset).exists())


# --- reading ------------------------------------------------------------------------------------------------------


def read_grid(path: Path, command: GridCommand, defaults: Values) -> list[Line]:
    """Return the configurations of the JSONL file at ``path``, without empty lines.

    Args:
        defaults: the value of each flag that a line leaves out.
    Raises:
        InputError: no such file or nothing in it; with the line's number: no JSON object, an unknown key (named with
            the nearest one), a value of the wrong kind, a bad or repeated name, a repeated configuration.
    """
    # Lines end at \n, \r\n or \r: a text of JSON may hold the others that splitlines knows, such as U+2028.
    text = read_text(path, f"grid {path}", remedy="name a file with a JSON object on each line")
    texts = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    lines = [_read_line(path, number, text, command, defaults) for number, text in enumerate(texts, 1) if text.strip()]
    if not lines:
        raise InputError(f"grid {path} has no configuration; write a JSON object on each line")
    lines = _with_distinct_names(lines)
    _refuse_repeated(path, lines)
    return lines


@contextmanager
def at_line(path: Path, number: int) -> Iterator[None]:
    """Put the line's number before the text of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path.name}, line {number}: {error}") from None


def _read_line(path: Path, number: int, text: str, command: GridCommand, defaults: Values) -> Line:
    flags = command.flags
    with at_line(path, number):
        try:
            entries = parse_json(text)
        except InputError as error:
            raise InputError(f"{error}; write one object on a line") from None
        if not isinstance(entries, dict):
            raise InputError(f"no JSON object; write flags of {command.name} and their values")
        name = entries.pop(NAME, None)
        values: dict[str, Any] = {}
        for key, entry in entries.items():
            action = _action(key, command, flags)
            if entry is None:  # the default
                continue
            if action.dest in values:
                raise InputError(f"{key} is another name of {action.dest}, and both are given; give one")
            values[action.dest] = _value(key, entry, action)
        merged = {dest: defaults[dest] for dest in flags} | values
        label = default_name(merged, command) if name is None else _checked_name(name)
        return Line(number, label, name is not None, merged)


def _action(key: str, command: GridCommand, flags: Flags) -> argparse.Action:
    """Return the flag with the name ``key``, which may be any name that it has on the command line, a former one too.

    Raises:
        InputError: there is none, or it is not one that a line sets.
    """
    if key in NOT_IN_A_LINE:
        raise InputError(f"{key} is not set line by line; give --{key} on the command line")
    by_name = dict(flags)
    for option, action in command.parser._option_string_actions.items():
        # The other half of a pair of flags is said by false.
        is_negative = action.nargs == 0 and option.startswith("--no-")
        if action.dest in flags and option.startswith("--") and not is_negative:
            by_name.setdefault(option[2:], action)
    if key not in by_name:
        hint = suggest(key, [*by_name, NAME])
        raise InputError(f"unknown key {shown(key)}{hint} (keys are {command.name}'s flags, and {NAME})")
    return by_name[key]


def _value(key: str, entry: Any, action: argparse.Action) -> Any:
    """Return the entry of a line, which is not null, as its flag takes it.

    Raises:
        InputError: the flag takes another kind of value.
    """
    if action.nargs == 0:
        if not isinstance(entry, bool):
            raise InputError(f"{key} is true or false, got {shown(entry)}")
        return entry
    kind: Any = action.type or str
    named = getattr(kind, "__name__", kind)
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        items = entry if isinstance(entry, list) else [entry]
        if (not items and action.nargs != "*") or not all(_is_kind(item, kind) for item in items):
            raise InputError(f"{key} is a list of {'names' if kind is str else named}, got {shown(entry)}")
        return [_converted(key, item, kind) for item in items]
    if not _is_kind(entry, kind):
        raise InputError(f"{key} is one value of type {named}, got {shown(entry)}")
    return _converted(key, entry, kind)


def _is_kind(item: Any, kind: Any) -> bool:
    if isinstance(item, (bool, list, dict)) or item is None:
        return False
    return isinstance(item, str) if kind in (str, Path) else True


def _converted(key: str, item: Any, kind: Any) -> Any:
    try:
        return kind(str(item))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{key} {error}") from None
    except ValueError:
        raise InputError(f"{key} is one value of type {getattr(kind, '__name__', kind)}, got {shown(item)}") from None


def to_flags(values: Values, flags: Flags) -> tuple[str, ...]:
    """Return ``values`` as they would be typed, positional ones last, behind ``--``; defaults are left out."""
    words: list[str] = []
    positional: list[str] = []
    for dest, action in flags.items():
        value = values[dest]
        if value == action.default or value is None:
            continue
        items = [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
        if not action.option_strings:
            positional += items
        elif action.nargs == 0:
            words.append(_switch(action, value))
        elif isinstance(value, (list, tuple)):
            words += [action.option_strings[0], *items]
        else:
            words.append(f"{action.option_strings[0]}={value}")  # one word: a value may begin with a dash
    return (*words, *(["--", *positional] if positional else []))


def _switch(action: argparse.Action, value: bool) -> str:
    """Return the half of a pair of flags, or the one flag, that means ``value``."""
    negative = [option for option in action.option_strings if option.startswith("--no-")]
    return action.option_strings[0] if value or not negative else negative[0]


# --- names --------------------------------------------------------------------------------------------------------


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise InputError(
            f"{NAME} {shown(name)} names no folder; use at most {_LONGEST_NAME} letters, digits and . _ = + -, "
            "the first a letter or digit"
        )
    if name.lower() in (LOGS, ADAPTERS, COMPARED):
        raise InputError(f"{NAME} {name!r} is a folder of the grid's own; use another")
    return name


def default_name(values: Values, command: GridCommand) -> str:
    """Return the name of a run: `GridCommand.name_parts`, then every other value that is not the command's default.

    It depends on the configuration alone, so that a name stays what it is when lines are added.
    """
    parts, covered = command.name_parts(values)
    for dest, action in command.flags.items():
        value = values[dest]
        if dest in covered or value == action.default:
            continue
        text = "+".join(map(str, value)) if isinstance(value, list) else "" if value is True else value
        parts.append(f"{dest}{text}")
    text = re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(parts)).lstrip("._=+-")
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 9]}-{_digest(values)}"


def _digest(values: Values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _with_distinct_names(lines: Sequence[Line]) -> list[Line]:
    """Return ``lines`` with a digest of the configuration in every default name that several of them share."""
    shared = {name for name, count in Counter(line.name for line in lines).items() if count > 1}
    return [
        replace(line, name=f"{line.name}-{_digest(line.values)}") if line.name in shared and not line.is_named else line
        for line in lines
    ]


def _refuse_repeated(path: Path, lines: Sequence[Line]) -> None:
    by_name: dict[str, int] = {}
    by_values: dict[str, int] = {}
    for line in lines:
        with at_line(path, line.number):
            same = by_values.setdefault(_digest(line.values), line.number)
            if same != line.number:
                raise InputError(f"the configuration of line {same} again; remove one")
            # Some file systems do not tell "A" from "a".
            same = by_name.setdefault(line.name.lower(), line.number)
            if same != line.number:
                raise InputError(f"{NAME} {line.name!r} is that of line {same}, too; every run has a folder of its own")


# --- planning ---------------------------------------------------------------------------------------------------


def plan_grid(
    path: Path, lines: Sequence[Line], run_root: Path, command: GridCommand, *, overwrite: bool = False
) -> list[Job]:
    """Return the job of each line: what it would run, and whether it has.

    Args:
        overwrite: no run counts as finished.
    Raises:
        InputError: with the line's number: of the command's own check; a file that is not there; a folder that holds
            something else, or the run of another line.
    """
    jobs, flags = [], command.flags
    numbers: dict[Path, int] = {}
    for line in lines:
        with at_line(path, line.number):
            out_dir = run_root if command.shares_folder else run_root / line.name
            _refuse_missing_files(line.values, command.inputs)
            words = to_flags(line.values, flags)
            job = Job(line, command.name, words, out_dir, NEW)
            request = command.request(command.parser.parse_args(job.process[4:]))
            first = numbers.setdefault(request.folder, line.number)
            if first != line.number:
                raise InputError(f"the run of line {first} again; remove one")
            state, is_same = folder_state(request, overwrite)
            extra = ["--overwrite"] if overwrite else []
            if is_same and state == UNFINISHED and command.can_resume:
                extra.append("--resume")
            jobs.append(replace(job, state=state, extra=tuple(extra)))
    return jobs


def _refuse_missing_files(values: Values, inputs: Sequence[str]) -> None:
    for name in inputs:
        value = values.get(name)
        if isinstance(value, (str, Path)) and str(value).endswith(_FILE_ENDS) and not Path(value).is_file():
            raise InputError(f"no file {value}; check {name}")


def folder_state(request: RunRequest, overwrite: bool = False) -> tuple[str, bool]:
    """Return what the folder of ``request`` holds of its run, and whether that can be resumed.

    Raises:
        InputError: the folder holds no run of this command; or, unless told to ``overwrite``, a finished run with
            other arguments or files without a record.
    """
    folder = request.folder
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; use another run root or {NAME}")
    if not os.path.lexists(folder / RECORD):
        entries = list(folder.iterdir()) if folder.is_dir() else []
        if any(not entry.name.startswith(".") for entry in entries) and not overwrite:
            raise InputError(f"folder {folder.name} is not empty and no run is recorded in it; move it away")
        return (UNFINISHED if entries else NEW), False
    record = read_record(folder)
    if record is not None and record["command"] != request.command:
        raise InputError(f"folder {folder.name} holds a run of another command; use another run root or {NAME}")
    if record is None or not isinstance(record.get("fingerprint"), str):
        raise InputError(
            f"folder {folder.name} holds a {RECORD} that is damaged or no record of {request.command}; move it away"
        )
    if overwrite:
        return UNFINISHED, False
    is_same = record["fingerprint"] == request.fingerprint()
    if record["status"] != "success":
        return UNFINISHED, is_same
    if not is_same:
        raise InputError(
            f"folder {folder.name} holds a finished run with other arguments; give another {NAME} or run root, or "
            "overwrite the whole grid"
        )
    return FINISHED, False
