"""results/contextual/study.py on runs that were made up, so that what it must find is known."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from tests.helpers.paths import ROOT

ROWS, SEEDS = 120, (0, 1, 2)
SPARSE = {"layer_sparsity": {"layer.1-2": 0.99}}
ARMS = {  # arm → sparsity section, what it adds to the loss of a label
    "dense": ({"mode": "dense"}, 0.0),
    "skip": ({"mode": "skip", **SPARSE}, 0.10),
    "random_99": ({"mode": "random", **SPARSE}, 0.08),
    "oracle_99": ({"mode": "oracle", **SPARSE}, 0.05),
    "svd_99": ({"mode": "svd", **SPARSE}, 0.08),
    "surrogate_r64": ({"mode": "surrogate", "surrogate_rank": 1, **SPARSE}, 0.02),
}


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", ROOT / "results" / "contextual" / "study.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module
    spec.loader.exec_module(module)
    return module


def _write(folder: Path, arm: str, seed: int, losses: np.ndarray, section: dict) -> None:
    run = folder / f"{arm}_s{seed}"
    run.mkdir(parents=True)
    config = TrainConfig.from_dict(
        {"model": "m", "task": "causal_lm", "dataset": "d.jsonl", "seed": seed, "sparsity": section}
    )
    record = {"command": "train", "status": "success", "arguments": config.to_dict(), "device": "cpu"}
    (run / "run.json").write_text(json.dumps(record))
    tokens = np.full(ROWS, 10)
    frame = pd.DataFrame({"row": range(ROWS), "tokens": tokens, "loss": losses * tokens, "correct": 0})
    frame.to_csv(run / "predictions.csv", index=False)
    costs = dict.fromkeys(("sparse_steps", "step_ms", "tokens_per_s", "peak_mb", "active_flops_per_token"), 1.0)
    summary = {"model": "m", "dataset": "d", "seed": seed, "eval_loss": losses.mean(), "eval_accuracy": 0.0, **costs}
    pd.DataFrame([summary]).to_csv(run / "summary.csv", index=False)


def _mean_loss(folder: Path, arm: str, seed: int) -> float:
    return float(pd.read_csv(folder / f"{arm}_s{seed}" / "summary.csv")["eval_loss"].iloc[0])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    hardness = rng.normal(2.0, 0.5, ROWS)
    for seed in SEEDS:
        luck = rng.normal(0, 0.1)  # of the seed: far larger than what arms differ by, but the same in all
        for arm, (section, extra) in ARMS.items():
            noise = rng.normal(0, 0.01, ROWS)
            _write(folder, arm, seed, hardness + luck + extra + noise - noise.mean() + rng.normal(0, 0.001), section)
    (folder / "logs").mkdir()
    return folder


def test_what_was_put_in_is_found(study, runs, tmp_path, capsys):
    model = tmp_path / "config.json"
    model.write_text(json.dumps({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 100, "num_hidden_layers": 4, "vocab_size": 50,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }))  # fmt: skip
    args = study.build_parser().parse_args([str(runs), "--model", str(model), "--out_dir", str(tmp_path / "out")])
    study.run(args)
    assert "Positive control holds." in capsys.readouterr().out
    arms = pd.read_csv(tmp_path / "out" / "arms.csv").set_index("arm")
    for arm, (_, extra) in ARMS.items():
        if arm != "dense":
            assert arms.loc[arm, "minus_dense"] == pytest.approx(extra, abs=0.005)
            assert arms.loc[arm, "minus_dense_row_low"] < extra + 0.005
    assert arms.loc["surrogate_r64", "gap_closed"] == pytest.approx(0.75, abs=0.05)
    assert arms.loc["surrogate_r64", "gap_closed_low"] < arms.loc["surrogate_r64", "gap_closed"]
    assert arms.loc["svd_99", "gap_closed"] == 0
    values = {arm: [_mean_loss(runs, arm, seed) for seed in SEEDS] for arm in ("svd_99", "surrogate_r64", "dense")}
    worst, ours, best = (np.array(values[arm]) for arm in ("svd_99", "surrogate_r64", "dense"))
    for end in ("gap_closed_low", "gap_closed_high"):  # Fieller: where a t test over seeds just rejects the share
        share = arms.loc["surrogate_r64", end]
        assert stats.ttest_1samp(worst - ours - share * (worst - best), 0).pvalue == pytest.approx(0.05, abs=1e-6)
    shares = {"dense": 1.0, "skip": 0.0, "svd_99": 0.01, "surrogate_r64": 2 * 8 / (3 * 8 * 100)}
    assert {arm: arms.loc[arm, "ffn_macs_share"] for arm in shares} == pytest.approx(shares)
    answers = pd.read_csv(tmp_path / "out" / "questions.csv").set_index(["first", "second"])["answer"]
    assert answers["surrogate_r64", "svd_99"] == "better"
    assert answers["random_99", "oracle_99"] == "worse"
    assert answers["svd_99", "random_99"] == "undecided"
    assert (tmp_path / "out" / "by_arm.png").is_file()
    assert len(pd.read_csv(tmp_path / "out" / "by_arm.csv")) == len(ARMS) * len(SEEDS)


def test_a_gap_that_is_not_there_is_not_closed(study, runs, tmp_path):
    found = study.read_study(runs)
    table = study.arms_table(found, None, "dense", 0)  # dense against itself
    assert table["gap_closed"].isna().all()


def test_a_study_without_dense_is_an_error(study, tmp_path):
    _write(tmp_path, "svd_99", 0, np.ones(ROWS), {"mode": "svd"})
    with pytest.raises(InputError, match="no finished run dense_s0"):
        study.read_study(tmp_path)


def test_runs_that_are_not_finished_are_left_out_and_named(study, runs, tmp_path):
    for seed in SEEDS:
        for arm in ("dense", "skip"):
            _write(tmp_path, arm, seed, np.random.default_rng(seed).normal(2, 1, ROWS), ARMS[arm][0])
    record = json.loads((tmp_path / "skip_s2" / "run.json").read_text())
    (tmp_path / "skip_s2" / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    found = study.read_study(tmp_path)
    assert found.notes == ["skip_s2 has status failed and is left out.", "skip has 2 of 3 seeds."]
    assert sorted(found.arms["skip"].runs) == [0, 1]
