"""Grids of any command: values of every kind of flag, restarts, several processes at a time, sweeps of one folder."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparselora.__main__ import main
from sparselora.cli import LineParser
from sparselora.commands import IN_GRIDS
from sparselora.commands.grid import grid_command, parse_defaults
from sparselora.errors import InputError
from sparselora.runs import grid as g
from sparselora.runs import grid_run
from sparselora.runs.request import RunRequest
from tests.helpers.made_up_runs import write_gated_runs

TOY = {"n": 6, "m": 5, "ranks": [1, 2], "trials": 3}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def call(path: Path, command: str, *more: str) -> int:
    return main(["grid", str(path), "--command", command, "--run_root", str(path.with_suffix("")), *more])


def states(path: Path, command: str, *more: str) -> list[str]:
    """Return the state of each line, as the grid itself finds it."""
    grid = grid_command(command)
    lines = g.read_grid(path, grid, parse_defaults(grid, list(more)))
    return [job.state for job in g.plan_grid(path, lines, path.with_suffix(""), grid)]


# --- flags of every kind ------------------------------------------------------------------------------------------


def every_kind() -> g.GridCommand:
    parser = LineParser(prog="study")
    parser.add_argument("config", nargs="?", type=Path)
    parser.add_argument("--pair", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--on", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--two", type=float, nargs=2)
    parser.add_argument("--text", "--words")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--out_dir", default="out")
    parser.add_argument("--resume", action="store_true")

    def request(args: argparse.Namespace) -> RunRequest:
        arguments = {name: value for name, value in vars(args).items() if name not in ("out_dir", "resume")}
        return RunRequest("study", Path(args.out_dir), arguments, (), arguments, inputs=("config",))

    return g.GridCommand("study", parser, request, g.plain_name_parts("study", ("config",)), lambda values: False)


@pytest.mark.parametrize(
    "entries",
    [
        {"config": "a.yaml"},
        {"config": "-a.yaml", "pair": False, "on": True},
        {"pair": True, "on": False, "sizes": [3, -4]},
        {"sizes": 7, "two": [0.5, 1e-9]},
        {"text": "--x y=z", "rate": -2.5e-7},
        {"pair": None, "rate": 1},
    ],
)
def test_a_line_parses_to_its_own_values(tmp_path, entries):
    """The words for the command line, read back by the command's own parser, are the values of the line."""
    command = every_kind()
    defaults = vars(command.parser.parse_args([]))
    path = write(tmp_path / "kinds.jsonl", entries)
    (line,) = g.read_grid(path, command, defaults)
    words = g.to_flags(line.values, command.flags)
    job = g.Job(line, "study", words, tmp_path / "o", g.NEW, ("--resume",))
    args = command.parser.parse_args(job.process[4:])
    expected = defaults | {name: value for name, value in entries.items() if value is not None}
    if "sizes" in entries and not isinstance(entries["sizes"], list):
        expected["sizes"] = [entries["sizes"]]
    if "config" in entries:
        expected["config"] = Path(entries["config"])
    assert vars(args) == expected | {"out_dir": str(tmp_path / "o"), "resume": True}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"wrods": "x"}, "unknown key 'wrods'; did you mean 'words'?"),
        ({"no-pair": True}, "unknown key 'no-pair'"),
        ({"text": "a", "words": "b"}, "words is another name of text"),
        ({"sizes": [1, True]}, "sizes is a list of int"),
        ({"sizes": [1, 2.5]}, "sizes is one value of type int, got 2.5"),
        ({"two": [0.5]}, "expected 2 arguments"),
        ({"pair": "yes"}, "pair is true or false"),
        ({"config": 3}, "config is one value of type Path"),
        ({"rate": "fast"}, "rate is one value of type float"),
        ({"rate": [1.0]}, "rate is one value of type float"),
        ({"resume": True}, "resume is not set line by line"),
    ],
)
def test_bad_entries_are_refused_with_their_line(tmp_path, entries, message):
    command = every_kind()
    path = write(tmp_path / "bad.jsonl", {"text": "good"}, entries)
    defaults = vars(command.parser.parse_args([]))
    with pytest.raises(InputError) as error:
        g.plan_grid(path, g.read_grid(path, command, defaults), tmp_path / "runs", command)
    assert message in str(error.value)
    assert str(error.value).startswith("bad.jsonl, line 2: ")


def test_an_interrupted_run_resumes_only_with_its_own_arguments(tmp_path):
    command = every_kind()
    path = write(tmp_path / "study.jsonl", {"name": "a", "rate": 1}, {"name": "b", "rate": 2}, {"name": "c", "rate": 3})
    lines = g.read_grid(path, command, vars(command.parser.parse_args([])))
    root = tmp_path / "runs"
    request = command.request(command.parser.parse_args(["--rate", "1"]))
    for name in ("a", "b"):  # the record of b is that of the arguments of a
        (root / name).mkdir(parents=True)
        record = {"command": "study", "status": "cancelled", "fingerprint": request.fingerprint()}
        (root / name / "run.json").write_text(json.dumps(record))
    jobs = g.plan_grid(path, lines, root, command)
    assert [(job.state, job.extra) for job in jobs] == [
        (g.UNFINISHED, ("--resume",)), (g.UNFINISHED, ()), (g.NEW, ()),
    ]  # fmt: skip
    jobs = g.plan_grid(path, lines, root, command, overwrite=True)
    assert {job.extra for job in jobs} == {("--overwrite",)}


def test_at_once_is_the_number_of_processes_that_run_together(tmp_path, monkeypatch):
    """Four processes that each wait for a second one: with one at a time, the first would wait in vain."""
    code = (
        "import sys, time, pathlib; root = pathlib.Path(sys.argv[1]); (root / f'{sys.argv[2]}.began').touch()\n"
        "deadline = time.monotonic() + 20\n"
        "while len(list(root.glob('*.began'))) < 2:\n"
        "    assert time.monotonic() < deadline\n"
        "    time.sleep(.02)\n"
    )
    monkeypatch.setattr(
        g.Job, "process", property(lambda job: [sys.executable, "-c", code, str(tmp_path), job.line.name])
    )
    jobs = [g.Job(g.Line(n, f"job{n}", True, {}), "toy", (), tmp_path / f"job{n}", g.NEW) for n in range(4)]
    reports: list[str] = []
    assert grid_run.run_jobs(jobs, tmp_path, [], reports.append, at_once=2) == []
    assert ["started" in line for line in reports[:3]] == [True, True, False]


# --- the command --------------------------------------------------------------------------------------------------


def test_a_grid_of_phase_a_runs_skips_and_takes_defaults(tmp_path, capsys):
    path = write(tmp_path / "toy.jsonl", {"name": "first", "seed": 1}, {"matrix": "powerlaw"})
    defaults = ["--defaults", "--n", "6", "--m", "5", "--ranks", "1", "2", "--trials", "3"]
    assert call(path, "toy", "--dry_run", *defaults) == 0
    assert "first: to run\n" in capsys.readouterr().out
    assert not (tmp_path / "toy").exists()
    assert call(path, "toy", "--jobs", "2", *defaults) == 0
    assert "2 runs, 0 finished, 2 to run" in capsys.readouterr().out
    (other,) = {folder.name for folder in (tmp_path / "toy").iterdir()} - {"first", "logs", ".lock"}
    assert other.startswith("toy-seed0-n6-m5-ranks1+2-trials3-matrixpowerlaw")
    record = json.loads((tmp_path / "toy" / "first" / "run.json").read_text())
    # The same as one call of the command: this is what a line means.
    alone = tmp_path / "alone"
    assert main(["toy", *defaults[1:], "--seed", "1", "--out_dir", str(alone)]) == 0
    assert record["fingerprint"] == json.loads((alone / "run.json").read_text())["fingerprint"]
    for table in alone.glob("*.csv"):
        assert table.read_bytes() == (tmp_path / "toy" / "first" / table.name).read_bytes()
    stamp = (tmp_path / "toy" / "first" / "run.json").stat().st_mtime_ns
    assert call(path, "toy", *defaults) == 0
    assert "2 runs, 2 finished, 0 to run" in capsys.readouterr().out
    assert (tmp_path / "toy" / "first" / "run.json").stat().st_mtime_ns == stamp
    assert call(path, "toy", "--defaults", *defaults[1:-1], "4") == 2
    assert "line 1: folder first holds a finished run with other arguments" in capsys.readouterr().err


def test_comparisons_are_lines_of_a_grid(tmp_path, capsys):
    runs = tmp_path / "trained"
    write_gated_runs(runs, {"plain": ("none", 0.0), "half": ("random", 0.01)})
    path = write(tmp_path / "compared.jsonl", {"results": [str(runs)]}, {"results": [str(runs)], "seed": 1})
    assert call(path, "compare") == 0
    assert "2 runs, 0 finished, 2 to run" in capsys.readouterr().out
    alone = tmp_path / "alone"
    assert main(["compare", str(runs), "--out_dir", str(alone)]) == 0
    first = tmp_path / "compared" / "compare-trained-seed0"
    for table in alone.glob("*.csv"):
        assert table.read_bytes() == (first / table.name).read_bytes()
    assert states(path, "compare") == [g.FINISHED, g.FINISHED]
    # Runs that change make another comparison: its folder is refused, not kept.
    summary = runs / "half_s0" / "summary.csv"
    summary.write_text(summary.read_text().replace(",10.5,", ",11.5,"))
    assert call(path, "compare", "--dry_run") == 2
    assert "line 1: folder compare-trained-seed0 holds a finished run" in capsys.readouterr().err


RANKS = [
    {"simulated": True, "n": 12, "m": 9, "true_rank": 2},
    {"simulated": True, "n": 12, "m": 9, "true_rank": 3, "criterion": "gap", "name": "gap"},
]
COUNTS = [
    {"flops": True, "shape": "gpt2", "mode": "svd", "name": "svd"},
    {"flops": True, "shape": "distilbert", "mode": "skip", "unit": "MACs"},
]


@pytest.mark.parametrize(("command", "lines", "table"), [("rank", RANKS, "simulated"), ("bench", COUNTS, "flops")])
def test_a_line_of_rank_or_bench_is_one_call_of_it(tmp_path, command, lines, table):
    path = write(tmp_path / "g.jsonl", *lines)
    assert call(path, command, "--jobs", "2") == 0
    assert states(path, command) == [g.FINISHED, g.FINISHED]
    grid = grid_command(command)
    for line in g.read_grid(path, grid, parse_defaults(grid, [])):
        alone, run = tmp_path / "alone" / line.name, tmp_path / "g" / line.name
        assert main([command, *g.to_flags(line.values, grid.flags), "--out_dir", str(alone)]) == 0
        assert (alone / f"{table}.csv").read_bytes() == (run / f"{table}.csv").read_bytes()
        records = [json.loads((folder / "run.json").read_text()) for folder in (alone, run)]
        assert records[0]["fingerprint"] == records[1]["fingerprint"]
    write(path, lines[0] | {"name": "other", "seed": 7})  # the control: another seed is another run
    assert states(path, command) == [g.NEW]


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        ("rank", {"simulated": True, "n": 0}, "--n and --m must be at least 1"),
        ("rank", {"adapter": "a", "noise": 0.1}, "--noise belongs to --simulated"),
        ("rank", {"criterion": "gap"}, "required"),
        ("bench", {"shape": "gpt2", "rounds": 0}, "--rounds must be at least 1"),
        ("bench", {"flops": True, "shape": "gpt2"}, "need --sparsity"),
        ("bench", {"estimators": True, "shape": "gpt2", "mode": "svd"}, "real --model"),
        ("bench", {"flops": True, "shape": "gpt2", "mode": "svd", "against": "nowhere.yaml"}, "nowhere.yaml"),
        ("bench", {"shape": "gpt2", "seq": 2048}, "2048 tokens is longer than the 1024"),
    ],
)
def test_a_line_that_no_run_of_rank_or_bench_can_have_is_refused_before_anything(
    tmp_path, capsys, command, line, message
):
    good = {"rank": {"simulated": True}, "bench": {"flops": True, "shape": "gpt2", "mode": "svd"}}[command]
    assert call(write(tmp_path / "g.jsonl", good, line), command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "g.jsonl, line 2: " in error
    assert message in error
    assert not (tmp_path / "g").exists()


def test_a_failing_line_does_not_stop_the_others_and_its_log_is_named(tmp_path, capsys):
    lines = [TOY | {"name": "bad"}, TOY | {"name": "good", "seed": 2}]
    path = write(tmp_path / "fail.jsonl", *lines)
    (tmp_path / "fail" / "bad").mkdir(parents=True)
    (tmp_path / "fail" / "bad" / ".lock").write_text("not ours")
    assert call(path, "toy") == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("bad: exit status 2: ")
    assert "1 run failed, its log is in" in last
    assert states(path, "toy") == [g.UNFINISHED, g.FINISHED]


def test_cells_of_phase_c_share_one_folder_and_one_table(tmp_path, tiny_bert, word_files, capsys):
    data = ["--model", str(tiny_bert), "--dataset", str(word_files[0]), "--eval_file", str(word_files[1])]
    defaults = [*data, "--train_samples", "16", "--eval_samples", "8", "--lora_r", "2", "--device", "cpu"]
    path = write(tmp_path / "cells.jsonl", {"method": "random", "name": "r"}, {"method": "no_prune"})
    assert call(path, "prune", "--defaults", *defaults) == 0
    rows = (tmp_path / "cells" / "results.csv").read_text().splitlines()
    assert len(rows) == 3
    assert (tmp_path / "cells" / "logs" / "r.log").is_file()
    assert states(path, "prune", *defaults) == [g.FINISHED, g.FINISHED]
    # The control prunes nothing, whatever the ratio: one cell, twice on the list.
    capsys.readouterr()
    write(path, {"method": "no_prune", "keep_ratio": 0.25}, {"method": "no_prune"})
    assert call(path, "prune", "--defaults", *defaults) == 2
    assert "line 2: the run of line 1 again" in capsys.readouterr().err


def test_flags_of_the_grid_itself(tmp_path, capsys):
    path = write(tmp_path / "g.jsonl", TOY)
    for flags, message in (
        (["--command", "tyo"], "invalid choice: 'tyo'"),
        ([], "--command"),
        (["--command", "toy", "--jobs", "0"], "--jobs must be at least 1"),
        (["--command", "toy", "--gpus", "0"], "runs on no GPU"),
        (["--command", "toy", "--defaults", "--sede", "3"], "--defaults: unrecognized arguments: --sede"),
        (["--command", "toy", "--defaults", "--dry_run"], "--dry_run is a flag of the grid"),
        (["--command", "toy", "--defaults", "--out_dir", "x"], "--out_dir is a flag of the grid"),
        (["--command", "train", "--defaults", "--resume"], "--resume is a flag of the grid"),
    ):
        try:
            status = main(["grid", str(path), *flags, *([] if "--defaults" in flags else ["--dry_run"])])
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert (status, error.count("\n")) == (2, 1), (flags, error)
        assert message in error, (flags, error)
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("name", IN_GRIDS)
def test_every_command_of_grids_has_what_a_grid_needs(name):
    command = grid_command(name)
    assert command.flags
    assert set(command.inputs) <= set(command.flags)
    values = parse_defaults(command, [])
    parts, covered = command.name_parts(values)
    assert parts
    assert covered
    assert isinstance(command.reads_hub(values), bool)


def test_children_end_with_a_grid_that_is_killed(tmp_path):
    """SIGKILL leaves the grid no time to stop anything."""
    path = write(tmp_path / "long.jsonl", {"n": 300, "m": 300, "ranks": [100], "trials": 100_000, "name": "long"})
    process = subprocess.Popen(
        [sys.executable, "-m", "sparselora", "grid", str(path), "--command", "toy", "--run_root", str(tmp_path / "r")],
        stdout=subprocess.DEVNULL,
    )
    record = tmp_path / "r" / "long" / "run.json"
    deadline = time.monotonic() + 60
    while not record.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while json.loads(record.read_text())["status"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads(record.read_text())["status"] == "cancelled"
