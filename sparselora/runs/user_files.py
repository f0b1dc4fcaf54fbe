"""Text and JSON files that a user names, read with limits: no file may hang a command or end it in a traceback.

Every error is an `InputError` of one line that says which file, what is wrong and what to do.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparselora.errors import InputError, shown

LARGEST_BYTES = 64 * 2**20
"""Limit on a text file. The index of a model of a thousand shards has under a megabyte."""
DEEPEST = 100
"""Limit on lists and mappings within one another. A configuration has about five levels."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class in_file:
    """Names the file in an `InputError` that its contents raise."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError):
            raise InputError(f"{self._path}: {error}") from None


def expand_user(path: str | Path) -> Path:
    """Return ``path`` with the home folder in place of a ``~`` that begins it; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def read_text(
    path: str | Path, what: str | None = None, *, remedy: str = "restore it", limit: int = LARGEST_BYTES
) -> str:
    """Return the UTF-8 text in a file, without a byte order mark.

    Args:
        what: names the file in an error; without, ``path`` does.
        remedy: ends an error.
        limit: the most bytes that are read.
    Raises:
        InputError: the file is missing, unreadable, larger than ``limit``, or not UTF-8.
    """
    what = what or str(path)
    try:
        with expand_user(path).open("rb") as stream:
            data = stream.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise InputError(f"{what} cannot be read ({reason}); {remedy}") from error
    if len(data) > limit:
        raise InputError(f"{what} cannot be read (it has more than {limit:,} bytes); {remedy}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{what} cannot be read (not UTF-8 text); {remedy}") from None


def parse_json(text: str | bytes, *, allow_nan: bool = False) -> Any:
    """Return the value that a JSON text holds.

    Args:
        allow_nan: accept NaN and Infinity, which JSON does not have, and numbers too large for a float.
    Raises:
        InputError: no valid JSON, nested deeper than `DEEPEST`, a key given twice in one object, half a character
            (``\\ud800`` alone); without ``allow_nan``, a number that is not finite.
    """

    def finite(literal: str) -> float:
        value = float(literal)
        if not math.isfinite(value) and not allow_nan:
            raise InputError(f"{shown(literal)} is no finite number")
        return value

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise InputError(f"lists or objects are nested more than {DEEPEST} deep") from None
    except InputError:
        raise
    except ValueError as error:  # also UnicodeDecodeError, and more digits than Python converts
        raise InputError(f"no valid JSON: {error}") from None
    _check_depth(value)
    if _SURROGATE.search(text):
        _check_characters(value)
    return value


def read_json(path: str | Path, what: str | None = None, *, remedy: str = "restore it", allow_nan: bool = False) -> Any:
    """Return the value in a JSON file.

    Args:
        what, remedy: as for `read_text`.
        allow_nan: as for `parse_json`.
    Raises:
        InputError: as `read_text` and `parse_json`, or the path is no regular file (a pipe would wait for ever).
    """
    what = what or str(path)
    try:
        regular = stat.S_ISREG(expand_user(path).stat().st_mode)
    except (OSError, ValueError):
        regular = True  # read_text says what is wrong
    if not regular:
        raise InputError(f"{what} cannot be read (it is no regular file); {remedy}")
    text = read_text(path, what, remedy=remedy)
    try:
        return parse_json(text, allow_nan=allow_nan)
    except InputError as error:
        raise InputError(f"{what} cannot be read ({error}); {remedy}") from None


def read_json_object(
    path: str | Path, what: str | None = None, *, remedy: str = "restore it", allow_nan: bool = False
) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        what, remedy, allow_nan: as for `read_json`.
    Raises:
        InputError: as `read_json`, or the file holds another value than an object.
    """
    value = read_json(path, what, remedy=remedy, allow_nan=allow_nan)
    if not isinstance(value, dict):
        raise InputError(f"{what or path} cannot be read (it must hold a JSON object, got {shown(value)}); {remedy}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InputError(f"key {shown(key)} is given twice; give it once")
            seen.add(key)
    return values


def _check_depth(value: Any) -> None:
    """Raise for a value nested deeper than `DEEPEST`; level by level, so that this cannot itself run out of stack."""
    level: list[Any] = [value]
    for _ in range(DEEPEST + 1):
        level = [item for item in level if isinstance(item, (list, dict))]
        if not level:
            return
        level = [item for container in level for item in _items(container)]
    raise InputError(f"lists or objects are nested more than {DEEPEST} deep")


def _check_characters(value: Any) -> None:
    """Raise for a text in ``value`` that holds half a character of UTF-16, which no file or terminal takes."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, (list, dict)):
            stack.extend(_items(item))
            stack.extend(item if isinstance(item, dict) else ())
        elif isinstance(item, str) and any("\ud800" <= character <= "\udfff" for character in item):
            raise InputError(f"{shown(item)} is no valid text: it has half a character")


def _items(container: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container
