from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparselora import __version__
from sparselora.__main__ import main
from sparselora.cli import (
    Parser,
    add_run_arguments,
    output_folder,
    print_request,
    result_arguments,
    run_command,
    source_name,
)
from sparselora.commands import COMMANDS, PHASES
from sparselora.errors import InputError, suggest
from sparselora.runs.request import RunRequest

ROOT = Path(__file__).resolve().parents[2]


def _run(error: BaseException | None, *, debug: bool = False) -> int:
    def function(args: argparse.Namespace) -> None:
        if error is not None:
            raise error

    return run_command(function, argparse.Namespace(debug=debug), "study")


# --- exit status --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (InputError("rank must be at least 1,\n  got 0"), 2, "study: error: rank must be at least 1, got 0\n"),
        (RuntimeError("disk\nfull"), 1, "study: failed: RuntimeError: disk full (--debug shows where)\n"),
        (ValueError(), 1, "study: failed: ValueError: ValueError (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "study: cancelled\n"),
    ],
)
def test_exit_status_and_one_line(error, status, line, capsys):
    assert _run(error) == status
    out, err = capsys.readouterr()
    assert (out, err) == ("", line)


def test_debug_shows_the_traceback_and_keeps_the_status(capsys):
    assert _run(InputError("bad"), debug=True) == 2
    assert _run(RuntimeError("broken"), debug=True) == 1
    err = capsys.readouterr().err
    assert err.count("Traceback (most recent call last)") == 2
    assert "raise error" in err
    assert _run(RuntimeError("broken")) == 1
    assert "Traceback" not in capsys.readouterr().err


# --- flags --------------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(prog="study")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter")
    parser.add_argument("--name", help="a name")
    add_run_arguments(parser, "study_results")
    return parser


@pytest.mark.parametrize("argv", [["--rank", "eight"], ["--ran", "8"], ["--nonsense"], ["--rank"]])
def test_bad_flags_are_one_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        _parser().parse_args(argv)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("study: error: ")
    assert err.count("\n") == 1


def test_out_dir_has_two_spellings_and_is_no_part_of_the_result(capsys):
    args = _parser().parse_args(["--outdir", "here", "--overwrite", "--debug", "--dry_run"])
    assert args.out_dir == "here"
    assert result_arguments(args) == {"rank": 8, "name": None, "seed": 0}
    print_request(RunRequest("study", Path("here"), {}, ("table.csv", "rest.partial"), vars(args)))
    written = [f"  {Path('here') / name}\n" for name in ("run.json", "table.csv")]
    assert capsys.readouterr().out.endswith(f"would write:\n{''.join(written)}")


def test_a_default_folder_is_called_after_what_is_asked_for(capsys):
    parser = Parser(prog="study")
    add_run_arguments(parser, "study_results/<model>")
    args = parser.parse_args([])
    assert output_folder(args, "study_results", "times", None, "a model/x") == Path("study_results/times-a_model_x")
    assert output_folder(args, "study_results", "../..") == Path("study_results/_..")
    assert output_folder(parser.parse_args(["--out_dir", "here"]), "study_results", "x") == Path("here")
    assert len(output_folder(args, "study_results", "x" * 500).name) == 100
    assert "(default: study_results/<model>)" in " ".join(parser.format_help().split())
    # An adapter is called after its run, a model after its folder or its name on the hub.
    assert source_name("runs/first/adapter") == "first"
    assert source_name("owner/model-7b.v2") == "model-7b"
    assert source_name(None) is None


def test_two_calls_in_one_folder_do_not_collide_and_a_taken_folder_names_a_free_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["toy", "--n", "6", "--m", "5", "--ranks", "2", "--trials", "3"]
    assert main(flags) == main([*flags, "--matrix", "powerlaw"]) == 0
    assert sorted(path.name for path in Path("toy_results").iterdir()) == ["gaussian", "powerlaw"]
    capsys.readouterr()
    assert main([*flags, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    # What the error shows is pasted, and runs.
    pasted = re.search(r"\((--out_dir \S+) is free\)", error)[1].split()
    assert main([*flags, "--seed", "1", *pasted]) == 0
    assert Path("toy_results/gaussian_2/run.json").is_file()
    assert main([*flags, "--seed", "2"]) == 2
    assert "--out_dir toy_results/gaussian_3 is free" in capsys.readouterr().err


def test_help_shows_defaults_where_there_are_any(capsys):
    with pytest.raises(SystemExit) as exit_:
        _parser().parse_args(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rank of the adapter (default: 8)" in text
    assert "(default: study_results)" in text
    assert "None" not in text
    assert "False" not in text


def test_suggest():
    assert suggest("savigns", COMMANDS) == "; did you mean 'savings'?"
    assert suggest("zzz", COMMANDS) == ""


# --- python -m sparselora -----------------------------------------------------------------------------------------


def test_commands_are_listed_and_none_given_is_bad_usage(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    commands, phases = text.split("\nphases:\n")
    assert all(f"  {name} " in commands for name in COMMANDS)
    assert all(f"  {name} " in phases for name in PHASES)
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert all(name in err for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"sparselora {__version__}\n")


def test_an_unknown_command_suggests_the_nearest(capsys):
    assert main(["compair"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "did you mean 'compare'?" in err
    assert all(name in err for name in COMMANDS)


@pytest.mark.parametrize("name", ["rank", "savings", "compare"])
def test_every_command_has_complete_help(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m sparselora {name}")
    assert "--out_dir" in text
    assert "run:" in text
    assert "(default: [" not in text


def test_the_process_itself_exits_with_the_status(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sparselora", "savings", "--shape", "bert-base", "--rank", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("python -m sparselora savings: error: ")
    assert done.stderr.count("\n") == 1
