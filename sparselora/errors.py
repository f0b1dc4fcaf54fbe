"""The one exception that means "what you gave is wrong", as opposed to "something broke"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. Its text is one line: what, what was given, what is accepted, what to do. Commands exit with 2."""


def suggest(given: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known word nearest to ``given``, or an empty string."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
