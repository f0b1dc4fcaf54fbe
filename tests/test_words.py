"""The words of the code, as far as a machine can hold them: docstring openings, standard terms, names of variables.

CONTRIBUTING.md says why. `docs/glossary.md` has the term for each thing.
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "sparselora").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "examples").glob("*.py")])
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

OPENINGS = frozenset({"What", "Whether", "How", "Which", "Where", "Of", "Who", "Whose", "When", "Why"})
"""A docstring begins with an imperative verb (a function) or a noun phrase, never with one of these."""

UNUSED_WORDS = {
    r"\bvoters?\b": "unmasked tokens",
    r"\b(have|has|had|having) (a|no|their) say\b": "count, or are masked",
    r"\bsilenced\b": "masked out",
    r"\bstand-ins?\b": "surrogate, replacement",
    r"\bleavings?\b": "leftover files",
    r"\bstrangers?\b": "unknown files",
    r"\bowed\b": "pending",
    r"\b(told|tell|tells|telling) apart\b": "distinguishable, different",
    r"\bof like length\b": "of similar length",
    r"\bdear to\b": "expensive to",
    r"\bshall\b": "is to, must",
    r"\bits name notwithstanding\b": "despite its name",
    r"\bforetells?\b": "predicts",
    r"\bof its own accord\b": "automatically",
    r"\bto be had\b": "available",
    r"\bbut for\b": "except for",
    r"\bmakes? sense of\b": "reads",
    r"\bbeside\b": "next to, with, in addition to",
    r"\banew\b": "again",
    r"\bnought\b": "zero",
}
"""Pattern → the standard term."""

NEVER_ALONE = frozenset(
    {"found", "made", "given", "known", "kept", "own", "each", "one", "two", "theirs", "ours", "chosen", "asked",
     "said", "more", "at"}
)  # fmt: skip
"""Names that say nothing by themselves: as adjectives they are fine (`kept_channels`)."""


def _documented(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _openings(source: str) -> list[str]:
    """Docstrings of ``source`` that open with a question word, as ``name: opening``."""
    docstrings = ((getattr(node, "name", "module"), ast.get_docstring(node)) for node in _documented(ast.parse(source)))
    return [f"{name}: {text[:40]}" for name, text in docstrings if text and re.match(r"\w+", text)
            and re.match(r"\w+", text).group() in OPENINGS]  # fmt: skip


def _prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of every comment and string of a module."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type in kinds:
            yield from enumerate(token.string.splitlines(), token.start[0])


def _unused_words(lines: Iterator[tuple[int, str]]) -> list[str]:
    return [
        f"line {number}: {match.group()!r}: say {term}"
        for number, line in lines
        for pattern, term in UNUSED_WORDS.items()
        if (match := re.search(pattern, line, flags=re.IGNORECASE))
    ]


def _lone_names(source: str) -> list[str]:
    """Variables and parameters of ``source`` whose whole name is in `NEVER_ALONE`."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        else:
            continue
        if name.strip("_") in NEVER_ALONE:
            names.append(f"line {node.lineno}: {name}")
    return names


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_docstrings_state_what_the_code_is_or_does(path):
    assert not _openings(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_sources_use_the_standard_terms(path):
    assert not _unused_words(_prose(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_pages_use_the_standard_terms(path):
    assert not _unused_words(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_variables_are_nouns(path):
    assert not _lone_names(path.read_text(encoding="utf-8"))


def test_the_rules_see_what_they_forbid():
    assert _openings('def f():\n    """Whether it rains."""') == ["f: Whether it rains."]
    assert not _openings('def f():\n    """Return whether it rains."""')
    assert _unused_words(_prose("x = 1  # these have no say\n"))
    assert not _unused_words(_prose("beside = 1\n"))
    assert _lone_names("found = 1\nfor one, k in x:\n    pass\ndef f(at): ...") == [
        "line 1: found",
        "line 2: one",
        "line 4: at",
    ]
    assert not _lone_names("kept_channels = found_rows = 1")
