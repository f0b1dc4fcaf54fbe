"""The registry of sparsity modes: it is the only place that knows a mode by its name, and each mode is complete."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparselora.config.sparsity import MODES as FACTS
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.modes import MODES, Mode, mode_of, selects_channels

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(path for folder in ("sparselora", "benchmarks", "results", "examples")
                           for path in (ROOT / folder).rglob("*.py"))]
)  # fmt: skip
EDIT_MODES = ROOT / "sparselora" / "spectral"
"""The modes of an edit have a registry of their own."""


def _is_mode(node: ast.expr) -> bool:
    """Return whether an expression reads a mode's name: ``mode``, ``anything.mode`` or ``anything["mode"]``."""
    if isinstance(node, ast.Attribute):
        return node.attr == "mode"
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "mode"
    return isinstance(node, ast.Name) and node.id == "mode"


def _names_modes(node: ast.expr) -> bool:
    """Return whether an expression is the name of a mode, or a literal collection with one in it."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
        elements = node.keys if isinstance(node, ast.Dict) else node.elts
        return any(_names_modes(element) for element in elements if element is not None)
    return isinstance(node, ast.Constant) and node.value in MODES


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _knows_a_mode(node: ast.Compare) -> bool:
    """Return whether a comparison asks for certain modes: grouping runs by mode, or asking for None, does not."""
    sides = [node.left, *node.comparators]
    others = [side for side in sides if not _is_mode(side) and not _is_none(side)]
    read = [side for side in sides if _is_mode(side)]
    return any(_names_modes(other) for other in others if read) or bool(
        others and any(isinstance(side, ast.Attribute) for side in read)
    )


def mode_comparisons(tree: ast.AST) -> Iterator[int]:
    """Yield the lines in which a mode's name is compared, matched, or looked up in a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            forbidden = _knows_a_mode(node)
        elif isinstance(node, ast.Match):
            forbidden = _is_mode(node.subject)
        else:
            literal = isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict)
            forbidden = literal and _is_mode(node.slice)
        if forbidden:
            yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_modes_name_is_compared_nowhere(path):
    if EDIT_MODES not in path.parents:
        assert not list(mode_comparisons(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "line",
    [
        'config.mode == "svd"',
        'config.mode != "dense"',
        '"skip" == setup.config.mode',
        'config.mode in ("skip", "surrogate")',
        'mode not in {"random"}',
        "config.mode in REPLACING",
        'row["mode"] == "oracle"',
        '{"svd": 1}[config.mode]',
        'match config.mode:\n    case "svd":\n        pass',
    ],
)
def test_the_rule_sees_a_comparison(line):
    assert list(mode_comparisons(ast.parse(line))) == [1]


@pytest.mark.parametrize(
    "line",
    [
        "MODES[config.mode]",
        'open(path, mode="w")',
        'replace(config, mode="random")',
        "args.mode is None",
        'one["mode"] == other["mode"]',
    ],
)
def test_the_rule_lets_the_registry_be_asked(line):
    assert not list(mode_comparisons(ast.parse(line)))


def test_the_registry_has_the_modes_that_settings_know_in_their_order():
    assert list(MODES) == list(FACTS)
    assert len(set(MODES.values())) == len(MODES)
    assert all(facts.help for facts in FACTS.values())


def config(name: str) -> SparsityConfig:
    return SparsityConfig(mode=name, ffn_sparsity=0.75, surrogate_rank=5, surrogate_channels=3, svd_rank=2)


@pytest.mark.parametrize("name", MODES)
def test_a_mode_has_scores_or_a_choice_that_is_fixed_before_the_first_step(name):
    mode = MODES[name]
    scores = mode.ffn_scores is not Mode.ffn_scores
    fixes = mode.fix is not Mode.fix or (mode.attach is not Mode.attach and not scores)
    assert scores + fixes == FACTS[name].is_sparse
    assert (mode.attention_scores is not Mode.attention_scores) == scores
    if FACTS[name].needs_calibration:
        assert mode.fix is not Mode.fix
    assert mode.fits_maps == (mode.map_rank(config(name)) > 0)


@pytest.mark.parametrize("name", MODES)
def test_a_mode_that_pays_for_choosing_is_timed_against_one_that_computes_as_much_for_nothing(name):
    settings, mode = config(name), MODES[name]
    assert (mode.choosing_macs(settings, 30, 10) > 0) == (mode.control is not None)
    if mode.control is not None:
        control = MODES[mode.control]
        assert control.control is None
        assert control.ffn_channels(settings, 40, 0.75) == mode.ffn_channels(settings, 40, 0.75)


@pytest.mark.parametrize("name", MODES)
def test_sparsity_is_a_matter_of_degree_unless_the_layer_is_replaced(name):
    settings, mode = config(name), mode_of(config(name))
    counts = {mode.ffn_channels(settings, 40, sparsity) for sparsity in (0.25, 0.5, 0.75)}
    if FACTS[name].is_sparse:
        assert selects_channels(settings) == (len(counts) == 3) == (not mode.replaces_layer)
    if mode.computes_nothing:
        assert counts == {0}
