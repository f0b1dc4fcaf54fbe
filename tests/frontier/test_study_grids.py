"""Grids of the study of cheaper steps: runs that `train` accepts, equal times, rates, and arms of its contrasts."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from sparselora.__main__ import main
from sparselora.config.contrasts import read_contrasts
from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.frontier.candidates import Circumstances, list_candidates
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

STUDIES = Path(__file__).resolve().parents[2] / "configs" / "studies"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("frontier_study", STUDIES / "frontier.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_llama(tmp_path_factory.mktemp("study") / "llama", layers=6)
    write_instructions(folder.parent / "rows.jsonl", 40)
    return folder


@pytest.fixture
def search(llama: Path, tmp_path: Path) -> Path:
    """A search of all candidates, without fp8, which cannot be dry-run here; `none` is as slow as dense."""
    folder = tmp_path / "search"
    folder.mkdir()
    circumstances = Circumstances(
        json.loads((llama / "config.json").read_text()), schedule={"layer.1.ffn": 0.5, "layer.3": 0.9}
    )
    candidates = list_candidates(TrainConfig(task="causal_lm"), circumstances)
    seconds = {"static_50": 0.25, "fp8_none": 0.5}
    rows, times = [], []
    for candidate in candidates:
        settings = {key: "fp8_emulated" if value == "fp8" else value for key, value in candidate.settings.items()}
        rows.append({"candidate": candidate.name, "settings": json.dumps(settings)})
        times.append((candidate.name, seconds.get(candidate.name, 0.5), 6.0 if candidate.name == "static_50" else 1.0))
    pd.DataFrame(rows).to_csv(folder / "candidates.csv", index=False)
    columns = ["candidate", "seconds_per_step", "setup_seconds"]
    pd.DataFrame(times, columns=columns).to_csv(folder / "times.csv", index=False)
    (folder / "frontier.csv").write_text("candidate\n")
    return folder


def tuned(study: ModuleType, arms: object, folder: Path) -> None:
    """Results of tuning in which dense is best at the highest rate and all others at the lowest."""
    for line in study.tuning(arms):
        (folder / line["name"]).mkdir(parents=True)
        best = 2.7e-3 if line["name"].startswith("dense_lr") else 3e-4
        loss = 0.5 + abs(math.log(line["lr"] / best))
        pd.DataFrame({"eval_loss": [loss]}).to_csv(folder / line["name"] / "summary.csv", index=False)


def test_every_run_is_one_that_train_accepts(study, search, llama, tmp_path, capsys):
    arms = study.Arms(search)
    tuned(study, arms, tmp_path / "tune")
    rates = study.tuned_rates(tmp_path / "tune", arms.possible(study.TUNED))
    grids = {"tune": study.tuning(arms), "main": study.runs(arms, rates)}
    assert len(grids["main"]) == 8 * len(study.PRIMARY) + 3 * len(study.SECONDARY)
    for name, lines in grids.items():
        study.write(tmp_path / f"{name}.jsonl", lines)
        rows = str(llama.parent / "rows.jsonl")
        typed = ["grid", str(tmp_path / f"{name}.jsonl"), "--command", "train", "--run_root", str(tmp_path / "runs"),
                 "--dry_run", "--defaults", str(study.SETTINGS), "--model", str(llama), "--dataset", rows,
                 "--eval_file", rows, "--train_samples", "0", "--device", "cpu"]  # fmt: skip
        capsys.readouterr()
        assert main(typed) == 0
        assert f"{len(lines)} runs, 0 finished" in capsys.readouterr().out
    # Dry runs that differ in name alone would be one run.
    settings = [json.dumps({**line, "name": ""}, sort_keys=True) for line in grids["main"]]
    assert len(set(settings)) == len(settings)


def test_dense_for_equal_time_has_no_less_time_and_no_more_than_a_step(study, search):
    arms = study.Arms(search)
    steps = arms.equal_steps()
    assert arms.steps == math.ceil(3000 / 16)
    # 188 steps of a half of dense's time and 5 s more of set-up: 188 × 0.25 + 5 = 52 s, and 104 dense steps.
    assert steps["dense_time_static_50"] == 104
    assert steps["dense_time_fp8_none"] == 189  # as slow as dense: one step more than dense itself
    assert arms.flags("dense_time_static_50")["max_steps"] == 104


def test_rates_are_those_of_the_arm_or_of_one_like_it(study, search, tmp_path):
    arms = study.Arms(search)
    tuned(study, arms, tmp_path / "tune")
    rates = study.tuned_rates(tmp_path / "tune", arms.possible(study.TUNED))
    lines = {line["name"]: line["lr"] for line in study.runs(arms, rates)}
    assert (lines["dense_s10"], lines["fp8_s12"], lines["none_s11"]) == (2.7e-3, 2.7e-3, 3e-4)
    assert "fp8_s13" not in lines
    (tmp_path / "tune" / "skip_lr0.0003" / "summary.csv").unlink()
    for path in (tmp_path / "tune").glob("skip_lr*/summary.csv"):
        path.unlink()
    with pytest.raises(InputError, match="no finished run of skip"):
        study.tuned_rates(tmp_path / "tune", arms.possible(study.TUNED))
    with pytest.raises(InputError, match="not the folder of a finished search"):
        study.Arms(tmp_path)


def test_the_contrasts_are_of_primary_arms(study):
    contrasts = read_contrasts(STUDIES / "frontier_contrasts.yaml").contrasts
    assert len(contrasts) == 4
    assert {side for contrast in contrasts for side in (contrast.first, contrast.second)} <= set(study.PRIMARY)


def test_the_pooled_questions_are_in_the_form_of_gsm8k(study, tmp_path):
    for name in study.POOLED:
        answer = "Two and two.\n#### 4" if name == "gsm8k" else "4.0"
        key = "question" if name == "gsm8k" else "instruction"
        (tmp_path / f"{name}_test.jsonl").write_text(json.dumps({key: f"{name}?", "answer": answer}) + "\n")
    rows = study.pooled(tmp_path)
    assert [row["question"] for row in rows] == [f"{name}?" for name in study.POOLED]
    assert [row["answer"].rpartition("#### ")[2] for row in rows] == ["4"] + ["4.0"] * 5
