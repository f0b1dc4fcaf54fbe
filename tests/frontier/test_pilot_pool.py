"""Pilot runs in several processes are those of one process, whatever the order in which they end."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from sparselora.__main__ import main
from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.frontier import pilot_log, pilot_pool, search
from sparselora.frontier.candidates import Circumstances, list_candidates
from sparselora.frontier.device_memory import OUT_OF_MEMORY, is_out_of_memory
from sparselora.frontier.pilot_pool import PilotFailure, PilotPool, PilotTask, attempt
from sparselora.frontier.pilots import PilotRuns
from sparselora.frontier.plan import Lanes
from sparselora.frontier.step_seconds import TIME_COLUMNS, Probe, StepClock
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

STEP_S = {"dense": 1.0, "none": 0.9, "random_99": 0.5}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_llama(tmp_path_factory.mktemp("pool") / "llama", layers=2)
    write_instructions(folder.parent / "rows.jsonl", 120)
    return folder


@pytest.fixture
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the candidates of `STEP_S` those times and refuse all others; `random_99` diverges at its second seed."""

    def measure(self: StepClock, candidates: list, rounds: int) -> tuple[pd.DataFrame, dict[str, str]]:
        rows = [(c.name, STEP_S[c.name], 0.5, 2.0, 100.0, 1.0, 0.0) for c in candidates if c.name in STEP_S]
        problems = {c.name: "not in this test" for c in candidates if c.name not in STEP_S}
        return pd.DataFrame(rows, columns=list(TIME_COLUMNS)), problems

    configured = PilotRuns.configured

    def planted(self: PilotRuns, candidate, *, seed: int, **more):
        config = configured(self, candidate, seed=seed, **more)
        return config.replace(weight_decay=1e30) if (candidate.name, seed) == ("random_99", 1) else config

    monkeypatch.setattr(PilotRuns, "configured", planted)
    monkeypatch.setattr(StepClock, "measure", measure)
    monkeypatch.setattr(StepClock, "probe", lambda self, dense: Probe(0.1, 0.1, 1e-3, 0.0))


def arguments(model: Path, *more: str) -> list[str]:
    rows = model.parent / "rows.jsonl"
    return ["--model", str(model), "--dataset", str(rows), "--device", "cpu", "--lr", "3e-2", "--train_bsz", "4",
            "--max_steps", "8", "--budget", "2h", "--seeds", "3", "--eval_samples", "16", *more]  # fmt: skip


def tables(folder: Path) -> list[pd.DataFrame]:
    """Candidates, pilots without their times, held-out rows and learning rates, as they stand in the files."""
    pilots = pd.read_csv(folder / "pilots.csv").drop(columns=["train_seconds", "finished"])
    names = ("candidates.csv", "pilots_rows.csv.gz", "learning_rates.csv")
    candidates, *others = (pd.read_csv(folder / name) for name in names)
    return [candidates, pilots, *others]


def test_two_processes_give_the_files_of_one_and_may_be_stopped(llama, fixed_times, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["frontier", *arguments(llama), "--out_dir", str(one)]) == 0
    add, count = pilot_log.PilotLog.add, [0]

    def stopped(self: pilot_log.PilotLog, *args: object) -> None:
        if count[0] == 5:
            raise KeyboardInterrupt
        count[0] += 1
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(pilot_log.PilotLog, "add", stopped)
        assert main(["frontier", *arguments(llama, "--jobs", "2"), "--out_dir", str(two)]) == 130
    assert not multiprocessing.active_children()
    assert len(pd.read_csv(two / "pilots.csv")) == 5
    assert main(["frontier", *arguments(llama, "--jobs", "2"), "--out_dir", str(two)]) == 0
    assert not multiprocessing.active_children()
    expected = tables(one)
    assert expected[0].set_index("candidate").loc["random_99", "reason"].startswith("training diverged")
    pilots = expected[1]
    assert pilots.loc[pilots["candidate"] == "random_99", "seed"].tolist() == [0]  # not the third, though it could run
    assert len(pilots) == 3 * 4 + 1
    assert len(expected[3]) == 3 * 5
    for ours, theirs in zip(tables(two), expected, strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    for name in ("frontier.csv", "best.yaml", "dense.yaml"):
        assert (one / name).is_file() == (two / name).is_file()


def task(runs: PilotRuns, name: str, cost_s: float, **changes: object) -> PilotTask:
    dense = list_candidates(runs.config, Circumstances({}, sparse_problem="not in this test"))[0]
    config = runs.configured(dense, seed=0, steps=1, train_rows=8, eval_rows=4).replace(**changes)
    return PilotTask(name, 0, 0, config, cost_s)


@pytest.fixture
def runs(llama: Path, tmp_path: Path) -> PilotRuns:
    config = TrainConfig(
        model=str(llama), dataset=str(llama.parent / "rows.jsonl"), task="causal_lm", device="cpu", train_bsz=2
    )
    return PilotRuns(config, str(tmp_path), torch.device("cpu"))


def test_the_first_task_begins_first_and_then_those_that_take_longest(runs):
    tasks = [task(runs, name, cost) for name, cost in (("first", 1.0), ("short", 1.0), ("long", 9.0))]
    with PilotPool(runs, [None, None]) as pool:
        pool.wait_until_ready()
        names = [done.name for done, _ in pool.run(tasks)]
    assert set(names) == {"first", "short", "long"}
    assert names[-1] == "short"
    assert [done.name for done, _ in PilotPool(runs, [None]).run(tasks)] == ["first", "short", "long"]


def test_an_error_in_a_process_is_raised_here(runs):
    with PilotPool(runs, [None, None]) as pool:
        pool.wait_until_ready()
        with pytest.raises(InputError, match="nowhere"):
            list(pool.run([task(runs, "a", 1.0, target_modules=["nowhere"]), task(runs, "b", 1.0)]))
    with PilotPool(runs, [None, None]) as pool:
        pool.wait_until_ready()
        pool._processes[0].terminate()
        pool._processes[0].join()
        with pytest.raises(RuntimeError, match="a process of the search was killed"):
            list(pool.run([task(runs, "a", 1.0), task(runs, "b", 1.0)]))


def test_a_pilot_without_memory_enough_is_a_failure_of_its_candidate(runs, monkeypatch):
    def train(self: PilotRuns, *args: object) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(PilotRuns, "train", train)
    assert attempt(runs, task(runs, "a", 1.0)) == PilotFailure(OUT_OF_MEMORY)
    assert not is_out_of_memory(RuntimeError("something else"))  # the control

    def broken(self: PilotRuns, *args: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(PilotRuns, "train", broken)
    with pytest.raises(RuntimeError, match="something else"):
        attempt(runs, task(runs, "a", 1.0))


def test_each_process_sees_the_gpu_of_its_slot_alone(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pilot_pool._visible("2"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pilot_pool._visible("2"):
        pass
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    request = search.FrontierRequest(TrainConfig(), 0.01, 60.0, (0,), 1, None, ("0", "3"), 2)
    assert request.slots == ["0", "3", "0", "3"]
    assert (request.lanes, replace(request, gpus=()).lanes) == (Lanes(2, 2), Lanes(1, 2))
    assert replace(request, gpus=()).slots == [None, None]


def test_the_process_that_times_steps_sees_the_first_gpu_alone(llama, tmp_path, monkeypatch):
    visible = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(
        search, "run_search", lambda request, folder: visible.append(os.environ["CUDA_VISIBLE_DEVICES"])
    )
    for typed in (["--gpus", "3,1"], []):
        flags = [flag for flag in arguments(llama, *typed) if flag not in ("--device", "cpu")]
        assert main(["frontier", *flags, "--out_dir", str(tmp_path / str(len(typed)))]) == 0
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert visible == ["3", "7"]


def test_lanes_take_the_longest_first():
    assert Lanes().makespan([3.0, 1.0, 2.0]) == 6.0
    assert Lanes(2, 1).makespan([3.0, 1.0, 2.0]) == 3.0
    assert Lanes(1, 2).makespan([5.0, 3.0, 3.0, 3.0]) == 8.0  # the optimum is 8 too: 5 + 3 and 3 + 3
    assert json.dumps(Lanes(3, 2).count) == "6"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--jobs", "0"], "--jobs must be a number from 1 to 64"),
        (["--gpus", "0,0"], "GPUs are different names"),
        (["--gpus", "0"], "--gpus cannot go with device cpu"),
    ],
)
def test_flags_that_are_refused(llama, tmp_path, capsys, flags, says):
    assert main(["frontier", *arguments(llama, *flags), "--out_dir", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
