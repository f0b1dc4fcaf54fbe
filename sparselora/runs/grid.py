"""A grid of edits: a file of configurations, each an edit of its own process, folder and log; what is done is skipped.

Every line of a grid is a JSON object of flags of `edit`; the flags beside ``--grid`` are defaults of all lines. All of
it is checked before anything runs.
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
from sparselora.runs.former_names import with_present_names
from sparselora.runs.provenance import recorded_fingerprint
from sparselora.runs.user_files import parse_json, read_text

COMMAND = "edit"
NAME = "name"
LOGS, ADAPTERS, COMPARED = "logs", "adapters", "compare"
"""Folders beside those of the runs."""
FINISHED, UNFINISHED, NEW = "finished", "to run again", "to run"

_NOT_IN_A_LINE = frozenset({
    "grid", "run_root", "gpus", "prefetch", "out_dir", "dry_run", "overwrite", "debug", "help",
})  # fmt: skip
_PATHS = ("model", "dataset", "eval_file", "sensitivity")
_NOT_IN_A_NAME = frozenset({
    "adapter", "mode", "seed", "device", "report", "calib_bsz", "eval_bsz", *_PATHS,
})  # fmt: skip
"""Flags that begin a made name anyway, or say little about the edit."""
_FILES = ("dataset", "eval_file", "sensitivity")
_FILE_ENDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gz")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_LONGEST_NAME = 120

Flags = Mapping[str, argparse.Action]


@dataclass(frozen=True)
class Line:
    """A configuration: its line's ``number`` (from 1), its ``name`` and whether that was ``given``, and the ``values``
    of all flags, defaults included."""

    number: int
    name: str
    given: bool
    values: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """An edit of a grid: its ``flags`` without ``--out_dir``, its folder's ``state``, and whether a finished run there
    is to be replaced."""

    line: Line
    folder: Path
    flags: list[str]
    state: str
    overwrite: bool = False

    @property
    def command(self) -> list[str]:
        # What an earlier edit left half done is replaced in any case: its record says what it is.
        more = ["--overwrite"] if self.overwrite else []
        return [sys.executable, "-m", "sparselora", COMMAND, *self.flags, "--out_dir", str(self.folder), *more]


# --- reading ------------------------------------------------------------------------------------------------------


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The flags of ``parser`` that a line of a grid may set, by name."""
    return {action.dest: action for action in parser._actions if action.dest not in _NOT_IN_A_LINE}


def read_grid(path: Path, defaults: Mapping[str, Any], flags: Flags) -> list[Line]:
    """The configurations of the JSONL file at ``path``; empty lines are left out.

    Args:
        defaults: the value of each flag where a line says nothing.
    Raises:
        InputError: no such file or nothing in it; with the line's number: no JSON object, an unknown key (named with
            the nearest known), a value of the wrong kind, a bad or repeated name, a repeated configuration.
    """
    # Lines end at \n, \r\n or \r: a text of JSON may hold the others that splitlines knows, such as U+2028.
    text = read_text(path, f"--grid {path}", remedy="name a file with a JSON object on each line")
    texts = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    lines = [_read_line(path, number, text, defaults, flags) for number, text in enumerate(texts, 1) if text.strip()]
    if not lines:
        raise InputError(f"--grid {path} has no configuration; write a JSON object on each line")
    lines = _told_apart(lines)
    _refuse_repeated(path, lines)
    return lines


@contextmanager
def at_line(path: Path, number: int) -> Iterator[None]:
    """Put the line's number before the text of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path.name}, line {number}: {error}") from None


def _read_line(path: Path, number: int, text: str, defaults: Mapping[str, Any], flags: Flags) -> Line:
    with at_line(path, number):
        try:
            given = parse_json(text)
        except InputError as error:
            raise InputError(f"{error}; write one object on a line") from None
        if not isinstance(given, dict):
            raise InputError("no JSON object; write flags of edit and their values")
        name = given.pop(NAME, None)
        values = {key: _value(key, value, flags) for key, value in with_present_names(given, COMMAND).items()}
        merged = {key: defaults[key] for key in flags} | {k: v for k, v in values.items() if v is not None}
        made = made_name(merged, flags) if name is None else _checked_name(name)
        return Line(number, made, name is not None, merged)


def _value(key: str, value: Any, flags: Flags) -> Any:
    """``value`` of a line as the flag takes it; None for null, which leaves the default.

    Raises:
        InputError: no flag has this name, or it takes another kind of value.
    """
    if key in _NOT_IN_A_LINE:
        raise InputError(f"{key} is not set line by line; give --{key} on the command line")
    if key not in flags:
        raise InputError(f"unknown key {shown(key)}{suggest(key, [*flags, NAME])} (keys are edit's flags, and {NAME})")
    if value is None:
        return None
    action = flags[key]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{key} is true or false, got {shown(value)}")
        return value
    if action.nargs == "+":
        value = value if isinstance(value, list) else [value]
        if not value or not all(isinstance(item, str) for item in value):
            raise InputError(f"{key} is a list of names, got {shown(value)}")
        return value
    kind = action.type or str
    assert callable(kind)
    try:
        if isinstance(value, (bool, list, dict)) or (kind is str and not isinstance(value, str)):
            raise ValueError
        return kind(str(value))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{key} {error}") from None
    except ValueError:
        named = getattr(kind, "__name__", kind)
        raise InputError(f"{key} is one value of type {named}, got {shown(value)}") from None


def to_flags(values: Mapping[str, Any], flags: Flags) -> list[str]:
    """``values`` as they would be typed; those that are edit's defaults are left out."""
    typed: list[str] = []
    for name, action in flags.items():
        value = values[name]
        if value == action.default or value is None:
            continue
        if action.nargs == 0:
            typed.append(f"--{name}")
        elif action.nargs == "+":
            typed += [f"--{name}", *value]
        else:
            typed.append(f"--{name}={value}")  # one word: a value may begin with a dash
    return typed


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


def made_name(values: Mapping[str, Any], flags: Flags) -> str:
    """Adapter, mode and seed, then what else is not edit's default; from the configuration alone, so that a name stays
    what it is when lines are added."""
    parts = [_adapter_name(values), str(values["mode"]), f"seed{values['seed']}"]
    for name, action in flags.items():
        value = values[name]
        if name in _NOT_IN_A_NAME or value == action.default:
            continue
        shown = "+".join(map(str, value)) if isinstance(value, list) else "" if value is True else value
        parts.append(f"{name}{shown}")
    text = re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(parts)).lstrip("._=+-")
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 9]}-{_digest(values)}"


def _adapter_name(values: Mapping[str, Any]) -> str:
    """The adapter's folder; of one that is called just "adapter", as `train` writes it, the folder it is in."""
    path = Path(str(values.get("adapter") or "none"))
    named = path.name == "adapter" and path.parent.name
    return path.parent.name if named else path.name


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _told_apart(lines: Sequence[Line]) -> list[Line]:
    """Made names that several configurations share get a digest of theirs."""
    shared = {name for name, count in Counter(line.name for line in lines).items() if count > 1}
    return [
        replace(line, name=f"{line.name}-{_digest(line.values)}") if line.name in shared and not line.given else line
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


# --- what is to do ------------------------------------------------------------------------------------------------


def plan_grid(
    path: Path,
    lines: Sequence[Line],
    run_root: Path,
    parser: argparse.ArgumentParser,
    check: Callable[[argparse.Namespace], Mapping[str, object]],
    *,
    overwrite: bool = False,
) -> list[Job]:
    """What each line would run, and whether it has.

    Args:
        check: raises InputError for settings that no edit can have; else the arguments as an edit's record has them.
        overwrite: nothing counts as finished.
    Raises:
        InputError: with the line's number: of ``check``; a file that is not there; a folder that holds something else.
    """
    jobs, flags = [], flags_of(parser)
    for line in lines:
        with at_line(path, line.number):
            folder = run_root / line.name
            _refuse_missing_files(line.values)
            typed = to_flags(line.values, flags)
            arguments = check(parser.parse_args([*typed, "--out_dir", str(folder)]))
            jobs.append(Job(line, folder, typed, folder_state(folder, arguments, overwrite), overwrite))
    return jobs


def _refuse_missing_files(values: Mapping[str, Any]) -> None:
    for name in _FILES:
        value = values[name]
        if value is not None and str(value).endswith(_FILE_ENDS) and not Path(value).is_file():
            raise InputError(f"no file {value}; check {name}")


def folder_state(folder: Path, arguments: Mapping[str, object], overwrite: bool = False) -> str:
    """What ``folder`` holds of the edit with ``arguments``.

    Raises:
        InputError: it holds what is no edit's; or, unless told to ``overwrite``, a finished edit with other arguments
            or files without a record.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; use another --run_root or {NAME}")
    if not os.path.lexists(folder / RECORD):
        left = list(folder.iterdir()) if folder.is_dir() else []
        if any(not entry.name.startswith(".") for entry in left) and not overwrite:
            raise InputError(f"folder {folder.name} is not empty and no run is recorded in it; move it away")
        return UNFINISHED if left else NEW
    record = read_record(folder)
    if record is not None and record["command"] != COMMAND:
        raise InputError(f"folder {folder.name} holds a run of another command; use another --run_root or {NAME}")
    if record is None or not isinstance(record.get("fingerprint"), str):
        raise InputError(f"folder {folder.name} holds a {RECORD} that is damaged or no record of edit; move it away")
    if record["status"] != "success" or overwrite:
        return UNFINISHED
    if record["fingerprint"] != recorded_fingerprint(COMMAND, arguments):
        raise InputError(
            f"folder {folder.name} holds a finished edit with other arguments; give another {NAME} or --run_root, or "
            "--overwrite to run the whole grid again"
        )
    return FINISHED
