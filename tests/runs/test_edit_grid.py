"""Grids of edits: what runs, what is skipped, what is said of bad lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sparselora.__main__ import main
from sparselora.commands.grid import grid_command, parse_defaults
from sparselora.errors import InputError
from sparselora.runs import grid as g
from sparselora.runs import grid_run, prefetch
from sparselora.runs.request import RunRequest
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

ROOT = Path(__file__).resolve().parents[2]


class Grid:
    """Calls `edit --grid` on a tiny Llama and two random adapters, from whose statistics an edit takes a second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_tiny_llama(folder / "llama")
        self.rows = write_instructions(folder / "rows.jsonl", 60, 60)
        self.adapters = [self._adapter(folder / f"run_{n}" / "adapter", n) for n in (0, 1)]
        self.statistics = []
        for n, adapter in enumerate(self.adapters):
            out = folder / f"calibrated_{n}"
            source = ["--adapter", str(adapter), "--model", str(self.model), "--dataset", str(self.rows)]
            assert main(["edit", *source, "--calib_samples", "4", "--device", "cpu", "--out_dir", str(out)]) == 0
            self.statistics.append(str(out / "sensitivity.csv"))

    def _adapter(self, folder: Path, seed: int) -> Path:
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(self.model)
        options = {"r": 8, "target_modules": ["o_proj", "down_proj"], "init_lora_weights": False}
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(folder)
        return folder

    def line(self, number: int = 0, **more: object) -> dict[str, object]:
        return {"adapter": str(self.adapters[number]), "sensitivity": self.statistics[number], **more}

    def write(self, name: str, *lines: object) -> Path:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        return path

    def flags(self, name: str, *more: str) -> list[str]:
        where = ["--grid", str(self.folder / f"{name}.jsonl"), "--run_root", str(self.folder / name)]
        return ["edit", *where, *more]

    def __call__(self, name: str, *more: str) -> int:
        return main(self.flags(name, *more))

    def record(self, name: str, run: str) -> dict:
        return json.loads((self.folder / name / run / "run.json").read_text())


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid(tmp_path_factory.mktemp("grid"))


EDIT = grid_command("edit")


def read(path: Path) -> list[g.Line]:
    return g.read_grid(path, EDIT, parse_defaults(EDIT, []))


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_line_is_what_would_be_typed(grid):
    flags = EDIT.flags
    given = {"mode": "gd", "eta": 1, "seed": 3, "report": True, "target_modules": ["all"], "eval_samples": 0}
    path = grid.write("typed", grid.line(**given, layer_min=None, prompt_field="-x"))
    (line,) = read(path)
    typed = g.to_flags(line.values, flags)
    args = EDIT.parser.parse_args(typed)
    assert {name: getattr(args, name) for name in given} == given
    assert args.prompt_field == "-x"
    assert "--eval_samples=0" not in typed  # edit's default


def test_names_say_what_differs_and_do_not_depend_on_other_lines(grid):
    lines = [grid.line(0), grid.line(1, mode="gd", eta=0.5, seed=2), grid.line(0, target_modules=["o_proj"])]
    names = [line.name for line in read(grid.write("names", *lines))]
    assert names == [
        "run_0-abs_select-seed0", "run_1-gd-seed2-eta0.5", "run_0-abs_select-seed0-target_moduleso_proj",
    ]  # fmt: skip
    assert [line.name for line in read(grid.write("names", lines[1]))] == names[1:2]
    # Two configurations of one made name get folders of their own.
    same = [grid.line(0), grid.line(0) | {"sensitivity": grid.statistics[1]}, grid.line(0, mode="gd")]
    apart = [line.name for line in read(grid.write("names", *same))]
    assert len(set(apart)) == 3
    assert apart[0].startswith("run_0-abs_select-seed0-")
    assert apart[2] == "run_0-gd-seed0"
    assert len(read(grid.write("names", grid.line(target_modules=["x" * 200])))[0].name) <= 120


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("{", "no valid JSON"),
        ("[1]", "no JSON object"),
        ({"core_fraction": 0.1}, "unknown key 'core_fraction'; did you mean 'core_frac'?"),
        ({"out_dir": "x"}, "not set line by line"),
        ({"seed": 1.5}, "seed is one value of type int, got 1.5"),
        ({"seed": True}, "seed is one value of type int"),
        ({"mode": 3}, "mode is one value of type str"),
        ({"report": 1}, "report is true or false"),
        ({"target_modules": []}, "target_modules is a list of names"),
        ({"mode": "abs"}, "invalid choice: 'abs'"),
        ({"core_frac": 2}, "core_frac"),
        ({"draws": 0}, "--draws must be 1 or more"),
        ({"adapter": None}, "no --adapter given"),
        ({"adapter": "nowhere"}, "does not exist"),
        ({"adapter": "owner/adapter"}, "--prefetch takes it from the hub"),
        ({"target_modules": ["v_proj"]}, "matches nothing"),
        ({"sensitivity": "none.csv"}, "no file none.csv"),
        ({"sensitivity": None}, "no --model given"),
        ({"name": "../x"}, "names no folder"),
        ({"name": "logs"}, "a folder of the grid's own"),
        ({"name": "FIRST"}, "'FIRST' is that of line 1"),
        ({"name": "other", "seed": 7}, "the configuration of line 1 again"),
    ],
)
def test_a_bad_line_is_one_sentence_with_its_number_before_anything_runs(grid, capsys, more, said):
    line = more
    if isinstance(more, dict):
        line = {k: v for k, v in (grid.line(seed=1) | more).items() if v is not None}
    grid.write("bad", grid.line(name="first", seed=7), "", line)
    assert grid("bad") == 2
    error = capsys.readouterr().err
    assert said in error
    assert "bad.jsonl, line 3: " in error
    assert error.count("\n") == 1
    assert not (grid.folder / "bad").exists()


def test_the_flags_of_a_grid_belong_together(grid, capsys):
    grid.write("together", grid.line())
    path = str(grid.folder / "together.jsonl")
    for flags, said in (
        (["--grid", path], "needs --run_root"),
        (["--run_root", "x"], "--run_root is for a grid"),
        (["--adapter", "x", "--prefetch"], "--prefetch is for a grid"),
        (["--grid", path, "--run_root", "x", "--out_dir", "y"], "--out_dir is for one edit"),
        (["--grid", path, "--run_root", "x", "--gpus", "0,,1"], "GPUs are different names"),
        (["--grid", path, "--run_root", "x", "--gpus", "0,0"], "GPUs are different names"),
        (["--grid", path, "--run_root", "x", "--gpus", "0", "--device", "cpu"], "cannot go with GPUs"),
        (["--grid", "none.jsonl", "--run_root", "x"], "cannot be read"),
        (["--grid", os.devnull, "--run_root", "x"], "has no configuration"),
        ([], "no --adapter given"),
    ):
        assert main(["edit", *flags]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


# --- running ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_grid_runs_skips_restarts_and_goes_on_after_a_failure(grid, capsys):
    """One line fails while it runs (its statistics are those of the other adapter); then it is mended."""
    wrong = grid.line(0, name="wrong", sensitivity=grid.statistics[1])
    grid.write("runs", grid.line(0, name="good", seed=4), wrong, grid.line(1, mode="gd"))
    assert grid("runs", "--amp_factor", "1.5", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "good: to run" in printed
    assert "3 runs, 0 finished, 3 to run" in printed
    assert not (grid.folder / "runs").exists()

    assert grid("runs", "--amp_factor", "1.5") == 1
    err = capsys.readouterr().err
    (failure, summary) = err.splitlines()
    assert failure.startswith("wrong: exit status 2: ")
    assert "other singular values" in failure
    assert "1 run failed, its log is in" in summary
    made = "run_1-gd-seed0-amp_factor1.5"
    assert {run: grid.record("runs", run)["status"] for run in ("good", made)} == dict.fromkeys(
        ("good", made), "success"
    )
    assert grid.record("runs", "good")["arguments"]["amp_factor"] == 1.5
    assert "grid" not in grid.record("runs", "good")["arguments"]
    assert {path.stem for path in (grid.folder / "runs" / "logs").iterdir()} == {"good", "wrong", made}
    assert "wrote" in (grid.folder / "runs" / "logs" / "good.log").read_text()

    # One that was cut short, by hand: it runs again, the finished one is left alone, the mended one runs.
    record = grid.record("runs", made) | {"status": "running"}
    (grid.folder / "runs" / made / "run.json").write_text(json.dumps(record))
    stamp = (grid.folder / "runs" / "good" / "run.json").stat().st_mtime_ns
    grid.write("runs", grid.line(0, name="good", seed=4), grid.line(0, name="wrong"), grid.line(1, mode="gd"))
    assert grid("runs", "--amp_factor", "1.5", "--dry_run") == 0
    assert f"good: finished\nwrong: to run\n{made}: to run again\n" in capsys.readouterr().out
    assert grid("runs", "--amp_factor", "1.5") == 0
    assert "3 runs, 1 finished, 2 to run" in capsys.readouterr().out
    assert grid.record("runs", made)["status"] == grid.record("runs", "wrong")["status"] == "success"
    assert (grid.folder / "runs" / "good" / "run.json").stat().st_mtime_ns == stamp

    # Other settings are not what is finished there.
    assert grid("runs", "--amp_factor", "2") == 2
    assert "line 1: folder good holds a finished run with other arguments" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_grid_stops_its_edits_and_leaves_the_finished_ones(grid):
    slow = {"adapter": str(grid.adapters[0]), "model": str(grid.model), "dataset": str(grid.rows)}
    slow |= {"report": True, "draws": 5000, "calib_samples": 4, "device": "cpu", "name": "slow"}
    grid.write("stopped", grid.line(0, name="first"), slow)
    caller = subprocess.Popen([sys.executable, "-m", "sparselora", *grid.flags("stopped")], stdout=subprocess.DEVNULL)
    record = grid.folder / "stopped" / "slow" / "run.json"
    deadline = time.monotonic() + 90
    while not record.exists():
        assert time.monotonic() < deadline
        assert caller.poll() is None
        time.sleep(0.05)
    caller.send_signal(signal.SIGTERM)
    assert caller.wait(timeout=30) == 143
    assert grid.record("stopped", "slow")["status"] == "cancelled"
    assert grid.record("stopped", "first")["status"] == "success"
    states = [job.state for job in _jobs(grid, "stopped")]
    assert states == [g.FINISHED, g.UNFINISHED]


def _jobs(grid: Grid, name: str) -> list[g.Job]:
    path = grid.folder / f"{name}.jsonl"
    return g.plan_grid(path, read(path), grid.folder / name, EDIT)


def test_folders_of_others_are_refused(grid, tmp_path):
    wanted = RunRequest("edit", tmp_path, {}, (), {})
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        g.folder_state(wanted)
    (tmp_path / "run.json").write_text('{"command": "train", "status": "success"}')
    with pytest.raises(InputError, match="another command"):
        g.folder_state(wanted)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        g.folder_state(wanted)
    (tmp_path / "run.json").write_text('{"command": "edit", "status": "running"}')  # nothing says that it is ours
    with pytest.raises(InputError, match="no record of edit"):
        g.folder_state(wanted, overwrite=True)


def _stand_ins(monkeypatch: pytest.MonkeyPatch, folder: Path, *codes: str) -> list[g.Job]:
    """Jobs whose processes run these lines of Python instead of an edit."""
    monkeypatch.setattr(g.Job, "process", property(lambda job: [sys.executable, "-c", codes[job.line.number]]))
    return [g.Job(g.Line(n, f"job{n}", True, {}), "edit", (), folder / f"job{n}", g.NEW) for n in range(len(codes))]


def test_a_failure_does_not_stop_the_others_and_what_is_finished_is_not_started(tmp_path, monkeypatch):
    jobs = _stand_ins(monkeypatch, tmp_path, "import sys; print('a'); sys.exit('it broke')", "print(1)", "1 / 0")
    jobs[2] = replace(jobs[2], state=g.FINISHED)
    (failure,) = grid_run.run_jobs(jobs, tmp_path, [], lambda text: None)
    assert (failure.job, failure.status, failure.last_line) == (jobs[0], 1, "it broke")
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["job0.log", "job1.log"]


def test_an_interrupt_reaches_what_runs_once_and_nothing_more_starts(tmp_path, monkeypatch):
    code = """
import signal, sys, time
def stop(*_):
    print("stopped", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
time.sleep(60)
"""
    jobs = _stand_ins(monkeypatch, tmp_path, code, code)
    log = tmp_path / "logs" / "job0.log"

    real_sleep = time.sleep

    def interrupted(seconds: float) -> None:
        real_sleep(seconds)
        if log.read_text().endswith("\nready\n"):
            monkeypatch.setattr(time, "sleep", real_sleep)
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grid_run.run_jobs(jobs, tmp_path, [], lambda text: None)
    assert log.read_text().splitlines()[-2:] == ["ready", "stopped"]
    assert not (tmp_path / "logs" / "job1.log").exists()


def test_each_gpu_has_one_process_that_sees_it_alone(tmp_path, monkeypatch):
    """Processes that only say what they see, two at a time."""
    code = (
        "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('HF_HUB_OFFLINE')); time.sleep(.3)"
    )
    jobs = _stand_ins(monkeypatch, tmp_path, *[code] * 4)
    said: list[str] = []
    assert grid_run.run_jobs(jobs, tmp_path, ["3", "5"], said.append, offline=True) == []
    seen = [(tmp_path / "logs" / f"job{n}.log").read_text().splitlines()[-1] for n in range(4)]
    assert sorted(seen) == ["3 1", "3 1", "5 1", "5 1"]
    assert ["started" in line for line in said[:3]] == [True, True, False]


def test_what_is_on_the_hub_is_fetched_once_and_what_is_local_is_left_alone(grid, tmp_path, monkeypatch):
    import shutil

    import huggingface_hub

    asked = []

    def download(name: str, local_dir: Path | None = None, **_: object) -> str:
        asked.append(name)
        if local_dir is not None:
            shutil.copytree(grid.adapters[0], local_dir)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub = {"adapter": "owner/lora", "model": "owner/base", "sensitivity": grid.statistics[0]}
    path = grid.write("hub", hub, hub | {"mode": "gd"}, grid.line(model=str(grid.model)))
    lines = prefetch.with_local_adapters(path, read(path), tmp_path, prefetch.fetch_adapter)
    assert [line.values["adapter"] for line in lines[:2]] == [str(tmp_path / "adapters" / "owner--lora")] * 2
    assert lines[2].values["adapter"] == str(grid.adapters[0])
    assert lines[0].name == "lora-abs_select-seed0"
    assert prefetch.hub_models(lines) == ["owner/base"]
    assert not any(EDIT.reads_hub(line.values) for line in lines)
    assert EDIT.reads_hub(lines[0].values | {"dataset": "owner/data"})
    assert asked == ["owner/lora"]
