"""Grids of edits: what runs, what is skipped, what is said of bad lines; and the one table that `compare` makes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import make_tiny_llama, write_instructions
from transformers import AutoModelForCausalLM

from sparselora.__main__ import main
from sparselora.commands.edit import add_arguments
from sparselora.errors import InputError
from sparselora.spectral import grid as g
from sparselora.spectral import grid_run

ROOT = Path(__file__).resolve().parent.parent


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
            source = ["--lora_path", str(adapter), "--base_model", str(self.model), "--dataset", str(self.rows)]
            assert main(["edit", *source, "--calib_samples", "4", "--device", "cpu", "--out_dir", str(out)]) == 0
            self.statistics.append(str(out / "sensitivity.csv"))

    def _adapter(self, folder: Path, seed: int) -> Path:
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(self.model)
        options = {"r": 8, "target_modules": ["o_proj", "down_proj"], "init_lora_weights": False}
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(folder)
        return folder

    def line(self, number: int = 0, **more: object) -> dict[str, object]:
        return {"lora_path": str(self.adapters[number]), "sensitivity": self.statistics[number], **more}

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


def parser() -> g.LineParser:
    made = g.LineParser(prog="edit")
    add_arguments(made)
    return made


def read(path: Path) -> list[g.Line]:
    return g.read_grid(path, vars(parser().parse_args([])), g.flags_of(parser()))


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_line_is_what_would_be_typed(grid):
    flags = g.flags_of(parser())
    given = {"mode": "gd", "eta": 1, "seed": 3, "report": True, "target_modules": ["all"], "eval_samples": -1}
    path = grid.write("typed", grid.line(**given, layer_min=None, prompt_field="-x"))
    (line,) = read(path)
    typed = g.to_flags(line.values, flags)
    args = parser().parse_args(typed)
    assert {name: getattr(args, name) for name in given} == given
    assert args.prompt_field == "-x"
    assert "--eval_samples=-1" not in typed  # edit's default


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
        ("{", "no JSON"),
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
        ({"lora_path": None}, "no --lora_path given"),
        ({"lora_path": "nowhere"}, "does not exist"),
        ({"lora_path": "owner/adapter"}, "--prefetch takes it from the hub"),
        ({"target_modules": ["v_proj"]}, "matches nothing"),
        ({"sensitivity": "none.csv"}, "no file none.csv"),
        ({"sensitivity": None}, "no --base_model given"),
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
        (["--lora_path", "x", "--prefetch"], "--prefetch is for a grid"),
        (["--grid", path, "--run_root", "x", "--out_dir", "y"], "--out_dir is for one edit"),
        (["--grid", path, "--run_root", "x", "--gpus", "0,,1"], "--gpus takes"),
        (["--grid", path, "--run_root", "x", "--gpus", "0,0"], "--gpus takes"),
        (["--grid", path, "--run_root", "x", "--gpus", "0", "--device", "cpu"], "cannot go with --gpus"),
        (["--grid", "none.jsonl", "--run_root", "x"], "cannot be read"),
        (["--grid", os.devnull, "--run_root", "x"], "has no configuration"),
        ([], "no --lora_path given"),
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
    assert "3 configurations, 0 finished, 3 to run" in printed
    assert not (grid.folder / "runs").exists()

    assert grid("runs", "--amp_factor", "1.5") == 1
    err = capsys.readouterr().err
    (failure, summary) = err.splitlines()
    assert failure.startswith("wrong: exit status 2: ")
    assert "other singular values" in failure
    assert "1 edits failed" in summary
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
    assert "3 configurations, 1 finished, 2 to run" in capsys.readouterr().out
    assert grid.record("runs", made)["status"] == grid.record("runs", "wrong")["status"] == "success"
    assert (grid.folder / "runs" / "good" / "run.json").stat().st_mtime_ns == stamp

    # Other settings are not what is finished there.
    assert grid("runs", "--amp_factor", "2") == 2
    assert "line 1: folder good holds a finished edit with other arguments" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_grid_stops_its_edits_and_leaves_the_finished_ones(grid):
    slow = {"lora_path": str(grid.adapters[0]), "base_model": str(grid.model), "dataset": str(grid.rows)}
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
    assert caller.wait(timeout=30) == 130
    assert grid.record("stopped", "slow")["status"] == "cancelled"
    assert grid.record("stopped", "first")["status"] == "success"
    states = [job.state for job in _jobs(grid, "stopped")]
    assert states == [g.FINISHED, g.UNFINISHED]


def _jobs(grid: Grid, name: str) -> list[g.Job]:
    from sparselora.commands.edit import _grid_check

    path = grid.folder / f"{name}.jsonl"
    return g.plan_grid(path, read(path), grid.folder / name, parser(), _grid_check())


def test_folders_of_others_are_refused(grid, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        g.folder_state(tmp_path, {})
    (tmp_path / "run.json").write_text('{"command": "train", "status": "success"}')
    with pytest.raises(InputError, match="another command"):
        g.folder_state(tmp_path, {})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        g.folder_state(tmp_path, {})


def _stand_ins(monkeypatch: pytest.MonkeyPatch, folder: Path, *codes: str) -> list[g.Job]:
    """Jobs whose processes run these lines of Python instead of an edit."""
    monkeypatch.setattr(g.Job, "command", property(lambda job: [sys.executable, "-c", codes[job.line.number]]))
    return [g.Job(g.Line(n, f"job{n}", True, {}), folder / f"job{n}", [], g.NEW) for n in range(len(codes))]


def test_a_failure_does_not_stop_the_others_and_what_is_finished_is_not_started(tmp_path, monkeypatch):
    jobs = _stand_ins(monkeypatch, tmp_path, "import sys; print('a'); sys.exit('it broke')", "print(1)", "1 / 0")
    jobs[2] = g.Job(jobs[2].line, jobs[2].folder, [], g.FINISHED)
    (failure,) = grid_run.run_jobs(jobs, tmp_path, [], lambda text: None)
    assert (failure.job, failure.status, failure.said) == (jobs[0], 1, "it broke")
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
    hub = {"lora_path": "owner/lora", "base_model": "owner/base", "sensitivity": grid.statistics[0]}
    path = grid.write("hub", hub, hub | {"mode": "gd"}, grid.line(base_model=str(grid.model)))
    lines = grid_run.with_local_adapters(path, read(path), tmp_path, grid_run.fetch_adapter)
    assert [line.values["lora_path"] for line in lines[:2]] == [str(tmp_path / "adapters" / "owner--lora")] * 2
    assert lines[2].values["lora_path"] == str(grid.adapters[0])
    assert lines[0].name == "lora-abs_select-seed0"
    assert grid_run.base_models(lines) == ["owner/base"]
    assert grid_run.only_local_data(lines)
    assert asked == ["owner/lora"]


def test_the_script_writes_a_grid_that_can_be_read(grid):
    script = ROOT / "results" / "spectral" / "make_grid.py"
    flags = ["--lora_path", *map(str, grid.adapters), "--modes", "abs_select", "gd", "--seeds", "0", "1"]
    crossed = ["--core_frac", "0.1", "0.3", "--eta", "0.1", "0.2", "0.4", "--report"]
    done = subprocess.run([sys.executable, script, *flags, *crossed], capture_output=True, text=True, check=True)
    lines = read(grid.write("made", *done.stdout.splitlines()))
    assert len(lines) == 2 * 2 * (2 + 3)
    assert all(line.values["report"] for line in lines)
    assert len({line.name for line in lines}) == len(lines)


def test_the_script_knows_what_each_mode_reads():
    from sparselora.spectral.edit import MODES

    spec = importlib.util.spec_from_file_location("make_grid", ROOT / "results" / "spectral" / "make_grid.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.READS) == set(MODES)


# --- one table ----------------------------------------------------------------------------------------------------

N = 40
LABELS = 2
DRAWS = 20


def save_edit(folder: Path, mode: str, seed: int, change, adapter: str = "a", **arguments: object) -> Path:
    """An edit's record and report as `edit` leaves them: its loss is ``change`` (a number, or one a row) nats a label
    above that of the unedited adapter, the draws' are on the mean 0.01 above it."""
    from sparselora.spectral.editing import BOOTSTRAP, generator
    from sparselora.spectral.report import compare

    plain = 2.0 + 0.01 * np.arange(N)
    losses = {"no adapter": plain + 1, "unedited": plain, "round trip": plain, mode: plain + change}
    losses |= {f"draw {i}": plain + 0.01 + 0.001 * (i - 9.5) for i in range(DRAWS)}
    kinds = dict(zip(losses, ["base", "unedited", "round_trip", "edit", *["draw"] * DRAWS]))
    parts = [
        pd.DataFrame({"variant": name, "row": range(N), "loss": LABELS * loss, "tokens": LABELS})
        for name, loss in losses.items()
    ]
    items = pd.concat(parts, ignore_index=True)
    facts = pd.DataFrame({"variant": losses.keys(), "kind": kinds.values(), "change_l2": 1.0})
    facts = facts.assign(predicted_first=0.5, predicted_second=0.25)
    folder.mkdir(parents=True)
    compare(items, facts, generator(seed, BOOTSTRAP)).table.to_csv(folder / "report.csv", index=False)
    items.to_csv(folder / "report_items.csv", index=False)
    known = {"lora_path": {"name": adapter, "sha256": adapter}, "base_model": "m", "dataset": "d", "mode": mode}
    known |= {"seed": seed, "core_frac": 0.2, **arguments}
    record = {"command": "edit", "status": "success", "fingerprint": folder.name, "seed": seed, "arguments": known}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_the_tables_are_what_one_computes_by_hand(tmp_path, capsys):
    changes = {"abs_select": [-0.02, -0.04, -0.03], "gd": [0.01, 0.03, 0.05]}
    for mode, values in changes.items():
        for seed, change in enumerate(values):
            save_edit(tmp_path / f"{mode}{seed}", mode, seed, change)
    (save_edit(tmp_path / "half", "gd", 9, 0.0) / "report.csv").unlink()
    assert main(["compare", str(tmp_path)]) == 0
    out = tmp_path / "compare"
    runs = pd.read_csv(out / "edits.csv").set_index("name")
    assert len(runs) == 6
    assert runs["unedited_loss"].to_numpy() == pytest.approx(2.0 + 0.01 * (N - 1) / 2)
    assert runs.loc["gd1", "loss_change"] == pytest.approx(0.03)
    assert runs.loc["gd1", "null_gap"] == pytest.approx(0.02)
    assert runs.loc["abs_select0", "rank_p"] == pytest.approx(1 / 21)
    assert runs["verdict"].to_dict() == {
        **dict.fromkeys([f"abs_select{i}" for i in range(3)], "better"),
        "gd0": "not told apart", "gd1": "worse", "gd2": "worse",
    }  # fmt: skip
    configs = pd.read_csv(out / "configs.csv").set_index("config")
    assert list(configs.index) == ["abs_select", "gd"]
    half = 4.302652729911275 * 0.01 / np.sqrt(3)  # t of 2 degrees of freedom; the spread is 0.01
    best = configs.loc["abs_select"]
    assert best[["loss_change", "loss_change_low", "loss_change_high"]].tolist() == pytest.approx(
        [-0.03, -0.03 - half, -0.03 + half]
    )
    assert best["null_gap"] == pytest.approx(-0.04)
    # t = 3·√3 and 1.5·√3 at two degrees of freedom; Holm doubles the smaller.
    p = {3.0: 0.0350988, 1.5: 0.1217}
    assert configs["loss_change_p"].tolist() == pytest.approx(list(p.values()), rel=1e-3)
    assert configs["loss_change_p_holm"].tolist() == pytest.approx([2 * p[3.0], p[1.5]], rel=1e-3)
    assert configs[["better", "worse"]].to_numpy().tolist() == [[3, 0], [0, 2]]
    text = (out / "compare.md").read_text()
    assert "of 2 configurations **abs_select** has the lowest" in text
    assert "1 edits are left out" in text
    assert str(tmp_path) not in text + (out / "run.json").read_text()
    assert (out / "edit_configs.png").is_file()
    # Its own folder is beside the runs, and the same call is done.
    capsys.readouterr()
    assert main(["compare", str(tmp_path)]) == 0
    assert "already finished" in capsys.readouterr().out


def test_the_halves_are_disjoint_and_whole_and_the_same_for_every_run(tmp_path):
    from sparselora.spectral import edit_tables as t

    halves = {half: {row for row in range(1000) if t.half_of(row) == half} for half in (t.SELECTION, t.REPORTING)}
    assert not halves[t.SELECTION] & halves[t.REPORTING]
    assert halves[t.SELECTION] | halves[t.REPORTING] == set(range(1000))
    assert 400 < len(halves[t.SELECTION]) < 600


def test_the_best_is_chosen_on_one_half_and_reported_on_the_other(tmp_path):
    """One that only looks good where it is chosen: reported on the same rows it would be a success."""
    from sparselora.spectral import edit_tables as t

    chosen = np.array([t.half_of(row) == t.SELECTION for row in range(N)])
    for seed in range(2):
        save_edit(tmp_path / f"lucky{seed}", "gd", seed, np.where(chosen, -0.5, 0.25), core_frac=0.1)
        save_edit(tmp_path / f"honest{seed}", "gd", seed, np.where(chosen, -0.1, -0.2))
    # The best of all, but with one run less than the others.
    save_edit(tmp_path / "once", "gd", 0, -9.0, core_frac=0.9)
    edits = t.read_edits([tmp_path])
    (row,) = t.selection_table(edits).to_dict("records")
    assert row["config"] == "gd, core_frac 0.1"
    assert (row["n_configs"], row["n_runs"]) == (2, 2)
    assert row["selection_change"] == pytest.approx(-0.5)
    assert row["loss_change"] == pytest.approx(0.25)
    assert row["null_gap"] == pytest.approx(0.24)
    assert (row["selection_rows"], row["reporting_rows"]) == (chosen.sum(), N - chosen.sum())


def test_adapters_and_data_are_told_apart(tmp_path):
    from sparselora.spectral import edit_tables as t

    save_edit(tmp_path / "r0", "gd", 0, 0.1)
    save_edit(tmp_path / "r1", "gd", 0, 0.2, lora_path={"name": "a", "sha256": "other"})
    save_edit(tmp_path / "r2", "gd", 0, 0.3, dataset={"name": "rows.csv", "sha256": "x"})
    edits = t.read_edits([tmp_path])
    assert len(set(edits.adapters)) == 2
    assert edits.adapters[0].startswith("a@")
    assert edits.studies == ["m on d", "m on d", "m on rows.csv"]
    configs = t.config_table(t.run_table(edits, np.random.default_rng))
    assert configs[["study", "n_runs", "n_adapters"]].to_numpy().tolist() == [["m on d", 2, 2], ["m on rows.csv", 1, 1]]


def test_edits_without_a_report_and_other_runs_are_refused(tmp_path, capsys):
    (save_edit(tmp_path / "e" / "r", "gd", 0, 0.1) / "report.csv").unlink()
    (tmp_path / "none").mkdir()
    whole = save_edit(tmp_path / "w" / "r", "gd", 0, 0.1)
    for flags, said in (
        (["e"], "run them with --report"),
        (["w", "none"], "holds no run of edit"),
        (["w", "--baseline", "w"], "--baseline is for runs of train"),
    ):
        words = [word if word.startswith("--") else str(tmp_path / word) for word in flags]
        assert main(["compare", *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["compare", str(whole), "--dry_run"]) == 0
    assert str(tmp_path / "w" / "compare" / "edits.csv") in capsys.readouterr().out
    assert not (tmp_path / "w" / "compare").exists()
