"""The one exception that means "what you gave is wrong", as opposed to "something broke", and the words of its text."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

_LONGEST_LINE = 1000
_LONGEST_WORD = 100


class InputError(ValueError):
    """Bad input. Its text is one line: what, what was given, what is accepted, what to do. Commands exit with 2."""


def suggest(word: str, known_words: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word nearest to ``word``, or an empty string."""
    # No name is as long as the limit, and the search takes longer than the square of the length.
    near = difflib.get_close_matches(word, list(known_words), n=1) if len(word) <= _LONGEST_WORD else ()
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: Any) -> str:
    """Return ``value`` as an error shows it: short, on one line, and true, false, null as YAML and JSON write them.

    A value that contains itself, or whose whole text would fill the memory, is cut like a long one.
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return f"a whole number of {value.bit_length():,} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= 2 * _LONGEST_WORD else f"{text[:_LONGEST_WORD]} … {text[-_LONGEST_WORD // 2 :]}"


def one_line(text: str) -> str:
    """Return ``text`` on one line, cut in its middle where it is very long, with control characters escaped.

    A name from a file can then neither forge a line of its own nor send codes to the terminal.
    """
    text = " ".join(text.split())
    if len(text) > _LONGEST_LINE:
        text = f"{text[: _LONGEST_LINE * 2 // 3]} … {text[-_LONGEST_LINE // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def plain(name: str) -> str:
    """Return a name from a file as a message writes it bare: on one line, of at most 60 characters."""
    text = one_line(name[:_LONGEST_LINE])
    return text if len(text) <= 60 else text[:59] + "…"


def few(names: Iterable[object], most: int = 8) -> str:
    """Return the first ``most`` of ``names`` with commas between them, and how many more there are."""
    listed = [plain(str(name)) for name in names]
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``"1 run"``, ``"2 runs"``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _LONGEST_WORD
_SHORT.maxlevel = 3


def printable(text: str) -> str:
    """Return ``text`` with every character that a terminal would act on, and the backslash, as its escape sequence.

    For names out of files: no two of them become the same.
    """
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )
