"""The whole search on tiny models: the one training path, kill and resume, planted candidates, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sparselora.__main__ import main
from sparselora.config.yaml_text import read_yaml
from sparselora.frontier import measured_plan
from sparselora.frontier.candidates import list_candidates
from sparselora.frontier.pilots import PilotRuns
from sparselora.frontier.plan import Plan
from sparselora.frontier.step_seconds import TIME_COLUMNS, Probe, StepClock
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

STEP_S = {"dense": 1.0, "none": 0.9, "random_99": 0.5, "rank_half": 0.97, "static_50": 0.8, "svd_99": 0.7}


@pytest.fixture(scope="module")
def taught_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama half-way through learning the task with all its weights, so that its FFNs matter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_tiny_llama(tmp_path_factory.mktemp("taught") / "llama", layers=3)
    rows = write_instructions(folder.parent / "rows.jsonl", 300)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [" ".join(json.loads(line).values()) for line in rows.read_text().splitlines()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = tokenizer(texts[4 * step : 4 * step + 4], return_tensors="pt", padding=True)
        model(**batch, labels=batch["input_ids"].where(batch["attention_mask"] > 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the candidates of `STEP_S` those times, which are longer than the true ones, and refuse all others.

    Random 99 % trains with a learning rate that spoils it: tiny models hardly need the FFNs of their context.
    """

    def measure(self: StepClock, candidates: list, rounds: int) -> tuple[pd.DataFrame, dict[str, str]]:
        rows = [(c.name, STEP_S[c.name], 0.5, 2.0, 100.0, 1.0, 0.0) for c in candidates if c.name in STEP_S]
        problems = {c.name: "not in this test" for c in candidates if c.name not in STEP_S}
        return pd.DataFrame(rows, columns=list(TIME_COLUMNS)), problems

    def planted(*args: object) -> list:
        return [
            replace(c, settings={**c.settings, "lr": 0.3}) if c.name == "random_99" else c
            for c in list_candidates(*args)
        ]

    monkeypatch.setattr(measured_plan, "list_candidates", planted)
    monkeypatch.setattr(StepClock, "measure", measure)
    monkeypatch.setattr(StepClock, "probe", lambda self, dense: Probe(0.1, 0.1, 1e-3, 0.0))


def arguments(model: Path, *more: str) -> list[str]:
    rows = model.parent / "rows.jsonl"
    return ["--model", str(model), "--task", "causal_lm", "--dataset", str(rows), "--device", "cpu", "--lr", "1e-2",
            "--train_bsz", "4", "--max_steps", "16", "--budget", "2h", *more]  # fmt: skip


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Candidates, pilots without their times, held-out rows, and learning rates."""
    pilots = pd.read_csv(folder / "pilots.csv").drop(columns=["train_seconds", "finished"])
    names = ("candidates.csv", "pilots_rows.csv.gz", "learning_rates.csv")
    candidates, rows, rates = (pd.read_csv(folder / name, float_precision="round_trip") for name in names)
    return candidates, pilots, rows, rates


def stop_after(runs: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Interrupt the pilot run after the next ``runs``; return a function that tells how many there were."""
    train, count = PilotRuns.train, [0]

    def counted(self: PilotRuns, *args: object) -> object:
        count[0] += 1
        if count[0] > runs:
            raise KeyboardInterrupt
        return train(self, *args)

    monkeypatch.setattr(PilotRuns, "train", counted)
    return lambda: count[0]


def test_a_search_that_is_killed_goes_on_to_the_same_pilots_and_drops_the_planted_candidate(
    taught_llama, fixed_times, tmp_path, monkeypatch, capsys
):
    whole = tmp_path / "whole"
    assert main(["frontier", *arguments(taught_llama, "--seeds", "2"), "--out_dir", str(whole)]) == 0
    candidates, pilots, rows, rates = tables(whole)
    by_name = candidates.set_index("candidate")
    plan = Plan.from_dict(json.loads((whole / "plan.json").read_text())["plan"])
    assert [(rung.steps, rung.count, len(rung.seeds)) for rung in plan.rungs] == [(8, 5, 1), (16, 2, 2)]
    # Random 99 % is half as dear as dense, and loses so much that it does not go on.
    assert by_name.loc["random_99", "stage"] == 0
    assert "dense for the same time" in by_name.loc["random_99", "reason"]
    reached = set(by_name.index[by_name["stage"] == 1])
    assert reached >= {"dense", "data_75", "half_data"}
    assert len(reached) == 5
    assert by_name.loc["fp8", "reason"].startswith("fp8 products need")
    assert by_name.loc["map", "reason"] == "not in this test"
    assert len(pilots) == 8 + 2 * 5
    steps = pilots[pilots["rung"] == 1].groupby("candidate")["steps"].first()
    assert (steps["dense"], steps["data_75"], steps["half_data"]) == (16, 12, 8)
    assert (pilots["rows_seen"] == 4 * pilots["steps"]).all()
    # Rows are paired, and their sums are the losses.
    for (name, seed, rung), table in rows[rows["rung"] >= 0].groupby(["candidate", "seed", "rung"]):
        place = (pilots["candidate"] == name) & (pilots["seed"] == seed) & (pilots["rung"] == rung)
        assert pilots.loc[place, "loss"].item() == pytest.approx(table["loss"].sum() / table["labels"].sum())
    assert rows.groupby(["candidate", "seed", "rung"])["row"].agg(tuple).nunique() == 1

    # What runs in the last rung has the best of three learning rates, dense too; what does not has the search's own.
    assert set(rates["candidate"]) == reached
    for name, tried in rates.groupby("candidate"):
        np.testing.assert_allclose(tried["lr"], [1e-2 / 3, 1e-2, 3e-2], rtol=1e-12)
        assert tried["steps"].nunique() == 1
        best = tried.loc[tried["loss"].idxmin(), "lr"]
        last = pilots[(pilots["candidate"] == name) & (pilots["rung"] == 1)]
        assert set(last["lr"]) == {best}
        assert by_name.loc[name, "lr"] == best
        shorter = pilots[(pilots["candidate"] == name) & (pilots["rung"] == 0)]
        assert tried.loc[tried["lr"] == 1e-2, "loss"].item() == shorter["loss"].item()
    assert (pilots.loc[(pilots["rung"] == 0) & (pilots["candidate"] != "random_99"), "lr"] == 1e-2).all()
    assert "best of three in pilots of up to 8 steps" in (whole / "frontier.md").read_text()
    chosen = next(path for path in (whole / "best.yaml", whole / "dense.yaml") if path.is_file())
    assert read_yaml(chosen)["lr"] in set(rates["lr"])

    # Killed in each rung and between them, and then with rows of held-out losses whose line was not written any more.
    killed = tmp_path / "killed"
    for runs in (3, 9, 8):
        with monkeypatch.context() as patch:
            stop_after(runs, patch)
            assert main(["frontier", *arguments(taught_llama, "--seeds", "2"), "--out_dir", str(killed)]) == 130
        assert json.loads((killed / "run.json").read_text())["status"] == "cancelled"
    extra = pd.read_csv(killed / "pilots.csv")
    extra.iloc[:-1].to_csv(killed / "pilots.csv", index=False)
    with monkeypatch.context() as patch:
        count = stop_after(1000, patch)
        assert main(["frontier", *arguments(taught_llama, "--seeds", "2"), "--out_dir", str(killed)]) == 0
        assert count() == 8 + 2 * 5 + 2 * 5 - (3 + 9 + 8 - 1)
    for ours, theirs in zip(tables(killed), (candidates, pilots, rows, rates), strict=True):
        ours, theirs = (table.sort_values(list(table.columns[:3]), ignore_index=True) for table in (ours, theirs))
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert not (killed / "checkpoints").exists()
    # A rerun does nothing.
    before = {path.name: path.read_bytes() for path in killed.iterdir() if path.is_file()}
    capsys.readouterr()
    assert main(["frontier", *arguments(taught_llama, "--seeds", "2"), "--out_dir", str(killed)]) == 0
    assert "already finished" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in killed.iterdir() if path.is_file()} == before
    # A dry run of it shows the plan.
    assert main(["frontier", *arguments(taught_llama, "--seeds", "2"), "--out_dir", str(killed), "--dry_run"]) == 0
    assert "rung 1: 2 candidates and the controls, 16 steps, 2 seeds" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["none", "static_50"])
def test_a_pilot_of_whole_length_is_the_run_of_train(taught_llama, fixed_times, tmp_path, monkeypatch, name):
    """One training path: base models that are used again give the bytes of a model that was loaded for the run."""
    monkeypatch.setitem(STEP_S, "svd_99", 0.7)
    for other in set(STEP_S) - {"dense", name, "rank_half"}:
        monkeypatch.delitem(STEP_S, other)
    out = tmp_path / "search"
    assert main(["frontier", *arguments(taught_llama, "--seeds", "1"), "--out_dir", str(out)]) == 0
    candidates, pilots, rows, _ = tables(out)
    candidate = candidates.set_index("candidate").loc[name]
    settings = json.loads(candidate["settings"]) | {"lr": float(candidate["lr"])}
    flags = [f"--{key}={value}" for key, value in settings.items() if not isinstance(value, dict)]
    for key, value in settings.get("sparsity.layer_sparsity", {}).items():
        flags += ["--sparsity.layer_sparsity", f"{key}={value}"]
    typed = [flag for flag in arguments(taught_llama) if flag not in ("--budget", "2h")]
    assert main(["train", *typed, *flags, "--out_dir", str(tmp_path / "train")]) == 0
    trained = pd.read_csv(tmp_path / "train" / "predictions.csv")
    last = rows[(rows["candidate"] == name) & (rows["rung"] == pilots["rung"].max())]
    assert pilots["steps"].max() == 16
    np.testing.assert_array_equal(last["loss"], trained["loss"])
    np.testing.assert_array_equal(last["row"], trained["row"])


def test_a_search_measures_times_by_itself(taught_llama, tmp_path, capsys):
    out = tmp_path / "out"
    typed = arguments(taught_llama, "--seeds", "1", "--max_steps", "4", "--eval_samples", "30", "--lr", "2e-2")
    assert main(["frontier", *typed, "--out_dir", str(out)]) == 0
    times = pd.read_csv(out / "times.csv").set_index("candidate")
    assert list(times.reset_index().columns) == list(TIME_COLUMNS)
    assert (times["q25"] <= times["seconds_per_step"]).all()
    assert (times["seconds_per_step"] <= times["q75"]).all()
    assert (times["seconds_per_step"] > 0).all()
    assert times.loc["half_data"].equals(times.loc["dense"])
    assert {"svd_99", "skip", "map", "lora_upper_half", "sampled_half"} <= set(times.index)
    # What a mode's first candidate had to compute, the others of the mode pay, too.
    assert times.loc["static_90", "setup_seconds"] > 0
    plan = Plan.from_dict(json.loads((out / "plan.json").read_text())["plan"])
    assert len(plan.candidates) == 12
    assert len(pd.read_csv(out / "pilots.csv")) == (3 + 12) + (3 + 4)


def test_a_classifier_is_searched(tiny_bert, word_files, fixed_times, tmp_path, monkeypatch):
    for other in ("static_50", "svd_99"):
        monkeypatch.delitem(STEP_S, other)
    out = tmp_path / "out"
    typed = ["--model", str(tiny_bert), "--task", "classification", "--dataset", str(word_files[0]), "--eval_file",
             str(word_files[1]), "--device", "cpu", "--lr", "1e-2", "--lora_r", "8", "--max_steps", "72", "--budget",
             "1h", "--seeds", "2"]  # fmt: skip
    assert main(["frontier", *typed, "--out_dir", str(out)]) == 0
    candidates, pilots, rows, _ = tables(out)
    assert "no context" in candidates.set_index("candidate").loc["none", "reason"]
    assert set(pilots["candidate"]) == {"dense", "data_75", "half_data", "rank_half", "random_99"}
    # The head is drawn by the seed, so the loss before training is another one for each seed.
    assert pilots.groupby("seed")["loss_base"].nunique().tolist() == [1, 1]
    assert pilots["loss_base"].nunique() == 2
    assert (rows["labels"] == 1).all()


def test_a_candidate_whose_loss_diverges_is_dropped_and_the_others_go_on(
    taught_llama, fixed_times, tmp_path, monkeypatch
):
    for other in ("static_50", "svd_99", "random_99"):
        monkeypatch.delitem(STEP_S, other)

    def diverging(*args: object) -> list:
        return [
            replace(c, settings={**c.settings, "lr": 1e30}) if c.name == "none" else c for c in list_candidates(*args)
        ]

    monkeypatch.setattr(measured_plan, "list_candidates", diverging)
    out = tmp_path / "out"
    assert main(["frontier", *arguments(taught_llama, "--seeds", "1"), "--out_dir", str(out)]) == 0
    candidates, pilots, _, rates = tables(out)
    assert np.isinf(rates.loc[rates["candidate"] == "none", "loss"]).all()
    assert candidates.set_index("candidate").loc["none", "reason"].startswith("training diverged: the loss is nan")
    assert list(pilots["candidate"]) == ["dense", "data_75", "half_data", "rank_half"]


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal_lm"), ("bert", "classification")])
def test_the_task_follows_from_the_model_where_it_is_not_given(kind, task, taught_llama, tiny_bert, tmp_path, capsys):
    model = taught_llama if kind == "llama" else tiny_bert
    rows = str(taught_llama.parent / "rows.jsonl")
    typed = ["--model", str(model), "--dataset", rows, "--dry_run", "--out_dir", str(tmp_path / "out")]
    assert main(["frontier", *typed]) == 0
    assert f"\ntask: {task}\n" in capsys.readouterr().out
    assert main(["frontier", *typed, "--task", "classification"]) == 0  # the control
    assert "\ntask: classification\n" in capsys.readouterr().out


# --- refusals -----------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *typed: str) -> str:
    capsys.readouterr()
    assert main(["frontier", *typed]) == 2
    error = capsys.readouterr().err
    return next(line for line in error.splitlines() if "error: " in line)


def test_an_adapter_that_does_not_learn_is_refused(taught_llama, fixed_times, tmp_path, capsys):
    typed = [*arguments(taught_llama, "--lr", "1e-12"), "--out_dir", str(tmp_path / "out")]
    message = "dense training for 8 steps does not learn: held-out loss"
    assert message in refused(capsys, *typed)
    assert message in refused(capsys, *typed)  # at once, the second time: what was measured is on file
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


def test_a_budget_that_is_too_small_is_refused(taught_llama, fixed_times, tmp_path, capsys):
    error = refused(capsys, *arguments(taught_llama, "--budget", "30s"), "--out_dir", str(tmp_path / "out"))
    assert "budget leaves" in error
    assert "give a larger budget" in error
    assert not (tmp_path / "out").exists()


def test_data_without_context_are_refused_and_nothing_is_written(taught_llama, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "", "completion": f"w{i % 9} w3"}) for i in range(60)))
    typed = ["--model", str(taught_llama), "--task", "causal_lm", "--template", "{prompt}", "--dataset", str(rows)]
    assert "have no context" in refused(capsys, *typed, "--device", "cpu", "--out_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--budget", "20"], "budget must be a time"),
        (["--tolerance", "1"], "tolerance must be a percentage"),
        (["--seeds", "0"], "--seeds must be a number from 1 to 100"),
        (["--profile", "nowhere"], "not the folder of a finished run of profile"),
        (["sparse.yaml"], "sparsity is set, and frontier starts from dense training"),
        (["activated.yaml"], "adapter_on_context false is set"),
    ],
)
def test_flags_that_are_refused(taught_llama, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    Path("sparse.yaml").write_text("sparsity:\n  mode: static\n  ffn_sparsity: 0.5\n")
    Path("activated.yaml").write_text("task: causal_lm\nadapter_on_context: false\n")
    assert says in refused(capsys, *flags, *arguments(taught_llama)[: -2 if "--budget" in flags else None])
    assert not (tmp_path / "frontier_results").exists()
