"""Every flag of every command, found in its parser, with values that no flag means: one line and status 2, or success.

A new flag is tried by itself. The calls are dry runs, so that a value that is accepted starts no work.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

import inspect_svd_predictors
import prune_finetune_lora
import toy_experiment
from sparselora.__main__ import COMMANDS, main
from sparselora.cli import Parser
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

SCRIPTS = {module.__name__: module for module in (toy_experiment, inspect_svd_predictors, prune_finetune_lora)}
NO_NUMBERS = ["nan", "inf", "-inf", "1e400", "9" * 5000, "1_000", "\u0661", "0x10", "abc", "", " "]
NO_TEXTS = ["", " ", "\n", "a\0b", "\udc80", "\ud800", "x" * 5000 + "/y", "a\nb\x1b[31m", "~nosuchuser/x"]


def parser_of(command: str) -> argparse.ArgumentParser:
    if command in SCRIPTS:
        return SCRIPTS[command].build_parser()
    parser = Parser(prog=command)
    importlib.import_module(f"sparselora.commands.{command}").add_arguments(parser)
    return parser


def call(command: str, arguments: Sequence[str]) -> int:
    try:
        return SCRIPTS[command].main(arguments) if command in SCRIPTS else main([command, *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each command, flags with which a dry run succeeds, or nothing where no work is done before a check."""
    folder = tmp_path_factory.mktemp("flags")
    llama = str(make_tiny_llama(folder / "llama"))
    rows = str(write_instructions(folder / "rows.jsonl", 20))
    data = ["--dataset", rows, "--prompt_field", "question", "--completion_field", "answer"]
    return {
        "savings": ["--shape", "bert-base"],
        "rank": ["--simulated"],
        "train": ["--model", llama, "--task", "causal_lm", *data],
        "bench": ["--model", llama, "--seq", "16"],
        "sensitivity": ["--model", llama, *data],
        "eval": ["--base_model", llama, "--task", "causal_lm", *data],
        "toy_experiment": [],
        "inspect_svd_predictors": ["--model", llama],
        "prune_finetune_lora": ["--model", llama, "--dataset", rows],
    }


@pytest.mark.parametrize("command", [*COMMANDS, *SCRIPTS])
def test_hostile_values_of_every_flag_are_one_line_and_status_2(command, calls, tmp_path, monkeypatch, capsys):
    parser, dry = parser_of(command), "--dry_run"
    flags = [action for action in parser._actions if action.option_strings and action.nargs != 0]
    has_dry_run = any(dry in action.option_strings for action in parser._actions)
    usual = [*calls.get(command, []), *([dry] if has_dry_run else [])]
    monkeypatch.chdir(tmp_path)
    if command in calls:
        assert call(command, usual) == 0
    refused = 0
    for action in flags:
        is_number = action.type in (int, float) and not action.choices
        for value in NO_NUMBERS if is_number else NO_TEXTS:
            capsys.readouterr()
            status = call(command, [*usual, f"{action.option_strings[0]}={value}"])
            output, error = capsys.readouterr()
            told = (command, action.option_strings[0], value[:20], status, error[-300:])
            assert status in ((2,) if is_number else (0, 2)), told
            if status:
                assert (output, error.count("\n")) == ("", 1), told
                assert error[:-1].isprintable(), told
                assert len(error) < 2000, told
                refused += 1
    assert refused >= len(flags)
    assert not list(tmp_path.iterdir())  # nothing is left of any call


def test_numbers_and_texts_that_flags_mean_are_taken_as_they_are(tmp_path):
    parser = Parser(prog="study")
    parser.add_argument("--n", type=int)
    parser.add_argument("--x", type=float, nargs="+")
    parser.add_argument("--text")
    parser.add_argument("--path", type=Path)
    args = parser.parse_args(["--n=-12", "--x", "1e-4", "-.5", "3", "--text", " é → ", "--path", str(tmp_path)])
    assert (args.n, args.x, args.text, args.path) == (-12, [1e-4, -0.5, 3.0], " é → ", tmp_path)
    assert all(math.isfinite(x) for x in args.x)
