"""Every flag of every command, found in its parser, with values that no flag means: one line and status 2, or success.

A new flag is tried by itself. The calls are dry runs, so that a value that is accepted starts no work.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

import inspect_svd_predictors
import prune_finetune_lora
import toy_experiment
from sparselora.__main__ import COMMANDS, main
from sparselora.cli import Parser, command_parser, row_count
from sparselora.config.fields import options
from sparselora.config.flags import GROUPS
from sparselora.config.train import TrainConfig
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

SCRIPTS = {module.__name__: module for module in (toy_experiment, inspect_svd_predictors, prune_finetune_lora)}
FLAGS = Path(__file__).with_name("flags.txt")
PHASE_OF = dict(zip(SCRIPTS, ("toy", "inspect", "prune")))
NO_NUMBERS = ["nan", "inf", "-inf", "1e400", "9" * 5000, "1_000", "\u0661", "0x10", "abc", "", " "]
NO_TEXTS = ["", " ", "\n", "a\0b", "\udc80", "\ud800", "x" * 5000 + "/y", "a\nb\x1b[31m", "~nosuchuser/x"]


def parser_of(command: str) -> Parser:
    name = PHASE_OF.get(command, command)
    return command_parser(importlib.import_module(f"sparselora.commands.{name}"), command)


def call(command: str, arguments: Sequence[str]) -> int:
    try:
        return SCRIPTS[command].main(arguments) if command in SCRIPTS else main([command, *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def flag_lines(command: str) -> list[str]:
    """Return each flag of ``command`` on a line, sorted, with its former names."""
    table = parser_of(command)._option_string_actions
    present = sorted(name for name in table if name in table[name].option_strings and name.startswith("--"))
    return [
        " ".join([flag, *(f"(formerly {name})" for name in sorted(table) if _is_former_name(name, flag, table))])
        for flag in present
    ]


def _is_former_name(name: str, flag: str, table: dict[str, argparse.Action]) -> bool:
    is_hidden = name not in table[name].option_strings
    return is_hidden and table[name] is table[flag] and name.startswith("--no-") == flag.startswith("--no-")


def test_the_flags_of_every_command_are_those_that_were_decided_on():
    """A new flag, or another name for one, is a decision: write it into flags.txt."""
    sections = [
        "\n".join([command, *(f"  {line}" for line in flag_lines(command))]) for command in [*COMMANDS, *SCRIPTS]
    ]
    assert "\n".join(sections) + "\n" == FLAGS.read_text()


SHORT = ("train", "frontier", "sensitivity", "edit")
"""Commands whose ``--help`` leaves flags to ``--help_all``."""


def help_of(command: str, monkeypatch: pytest.MonkeyPatch, *, whole: bool = True) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    return parser_of(command).format_help(whole=whole)


def flags_in(text: str) -> set[str]:
    """Return the flags that stand at the beginning of lines, the negations of switches written out."""
    names = [name for line in text.splitlines() if line.startswith("  -") for name in line.split("  ")[1].split(", ")]
    words = [name.split()[0] for name in names]
    return {flag for word in words for flag in ({word.replace("[no-]", ""), word.replace("[no-]", "no-")})}


@pytest.mark.parametrize("command", SHORT)
def test_the_short_help_is_at_most_40_lines_of_flags_with_defaults_and_an_example(command, monkeypatch):
    text = help_of(command, monkeypatch, whole=False)
    listing, examples = text.split("\noptions:\n")[1].split("\nexamples:\n")
    assert sum(line.startswith("  ") for line in listing.splitlines()) <= 40
    assert f"sparselora {command} " in examples
    assert all(f"{flag} " in text for flag in ("--model", "--dataset", "--out_dir,", "--dry_run"))
    assert flags_in(text) < flags_in(help_of(command, monkeypatch))
    for action in parser_of(command)._actions:
        if action.dest in options_with_defaults(command) and action.option_strings[0] in flags_in(text):
            entry = listing.partition(f"{action.dest} ")[2].split("\n  -")[0]
            assert "(default: " in entry, action.dest


def options_with_defaults(command: str) -> set[str]:
    settings = {name for name, each in options(TrainConfig).items() if each.default is not None}
    return settings & {action.dest for action in parser_of(command)._actions}


@pytest.mark.parametrize("command", [*COMMANDS, *SCRIPTS])
def test_the_whole_help_shows_every_flag_once_and_ends_in_an_example(command, monkeypatch):
    text = help_of(command, monkeypatch)
    present = {line.split()[0] for line in flag_lines(command)}
    assert flags_in(text) - {"-h"} == present
    assert "\nexamples:\n  sparselora " in text
    assert "(default: so" not in text
    entries = re.split(r"\n  (?=-)", text)
    assert all(entry.count("(default: ") <= 1 for entry in entries), "a default is told twice"


def test_help_all_prints_the_whole_help_and_ends(capsys, monkeypatch):
    assert call("train", ["--help_all"]) == 0
    assert "--novelty.burn_in" in capsys.readouterr().out
    assert call("train", ["--help"]) == 0
    assert "--novelty.burn_in" not in capsys.readouterr().out


def test_every_setting_of_training_is_in_one_group_of_the_help():
    names = [name for group in GROUPS.values() for name in group]
    assert sorted(names) == sorted(options(TrainConfig))


@pytest.mark.parametrize("command", [*COMMANDS, *SCRIPTS])
def test_the_examples_of_the_help_are_accepted(command, monkeypatch):
    examples = help_of(command, monkeypatch).split("\nexamples:\n")[1].splitlines()
    assert examples
    for example in examples:
        program, name, *flags = shlex.split(example)
        assert (program, name) == ("sparselora", PHASE_OF.get(command, command))
        parser_of(command).parse_args(flags)


def test_a_flag_means_the_same_in_all_commands():
    """One name for one thing: no flag is known by one name here and by its former name there."""
    former = {f"--{name}" for owner, names in FORMER_NAMES.items() if owner != "savings" for name in names}
    for command in [*COMMANDS, *SCRIPTS]:
        assert not former & {line.split()[0] for line in flag_lines(command)}, command


def test_a_former_name_gives_the_present_setting_and_is_not_shown(capsys):
    parser = Parser(prog="study")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=row_count, default=0)
    accept_former_names(parser, {"base_model": "model", "max_samples": "rows"})
    for argv in (["--base_model", "m", "--max_samples=-1"], ["--model=m", "--rows=0"], ["--base_model=m"]):
        assert vars(parser.parse_args(argv)) == {"model": "m", "rows": 0}
    assert "base_model" not in parser.format_help()
    for argv, message in (
        (["--max_samples=x"], "--rows must be a whole number"),
        (["--max_samples=-2"], "--rows must"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(argv)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("switch", ["--novelty.enable", "--no-novelty.enable"])
def test_a_former_switch_switches_the_same_way(switch):
    parser = parser_of("train")
    former = switch.replace("novelty", "slora")
    assert vars(parser.parse_args([former])) == vars(parser.parse_args([switch]))
    assert vars(parser.parse_args([former])) != vars(parser.parse_args([]))


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
        "profile": ["--model", llama, *data],
        "frontier": ["--model", llama, *data],
        "eval": ["--model", llama, "--task", "causal_lm", *data],
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
        is_number = action.type in (int, float, row_count) and not action.choices
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
