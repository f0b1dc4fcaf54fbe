"""`compare` on runs of `train` whose effects are known because they were planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sparselora.__main__ import main
from sparselora.compare.runs import has_runs
from sparselora.compare.training_runs import compare_runs, describe_runs, read_runs
from sparselora.config.sparsity import SparsityConfig
from sparselora.config.token_gates import TokenGateConfig
from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.numerics.stats import compare_paired

ROWS = 300
COSTS = {"step_ms": 10.0, "tokens_per_s": 1000.0, "peak_mb": 100.0, "active_flops_per_token": 1e6, "sparse_steps": 0}


class Maker:
    """Writes folders as `train` leaves them. A row's difficulty and a seed's quality are common to all of them."""

    def __init__(self, root: Path, task: str) -> None:
        self.root, self.task = root, task
        rng = np.random.default_rng(0)
        self.hard = rng.uniform(size=ROWS)
        self.tokens = rng.integers(1, 20, ROWS)
        self.rng = rng
        self.quality = rng.normal(0, 0.02, 100)

    def __call__(
        self, name: str, seed: int, effect: float = 0.0, *, sparsity: dict | None = None, costs: dict | None = None,
        status: str = "success", **settings: Any,
    ) -> Path:  # fmt: skip
        config = TrainConfig(model="tiny", dataset="d.jsonl", task=self.task, seed=seed).to_dict() | settings
        if sparsity is not None:
            config["sparsity"] = SparsityConfig(**sparsity).to_dict()
        folder = self.root / name
        folder.mkdir(parents=True)
        record = {"command": "train", "status": status, "arguments": config, "device": "cpu", "seed": seed}
        (folder / "run.json").write_text(json.dumps(record))
        noise = self.rng.normal(0, 0.01, ROWS)
        if self.task == "causal_lm":
            loss = self.tokens * (2 + self.hard + self.quality[seed] + effect + noise)
            predictions = pd.DataFrame({"row": np.arange(ROWS), "tokens": self.tokens, "loss": loss, "correct": 0})
            means = {"eval_loss": loss.sum() / self.tokens.sum(), "eval_accuracy": 0.0}
        else:
            correct = (self.hard + self.rng.normal(0, 0.05, ROWS) < 0.8 + self.quality[seed] + effect).astype(int)
            label = np.arange(ROWS) % 2
            predicted = np.where(correct == 1, label, 1 - label)
            predictions = pd.DataFrame(
                {"row": np.arange(ROWS), "label": label, "predicted": predicted, "loss": 0.5, "correct": correct}
            )
            means = {"eval_loss": 0.5, "eval_accuracy": correct.mean()}
        predictions.to_csv(folder / "predictions.csv", index=False)
        summary = {"model": "tiny", "dataset": "d", "task": self.task} | means | COSTS | (costs or {})
        pd.DataFrame([summary]).to_csv(folder / "summary.csv", index=False)
        return folder


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    return Maker(tmp_path / "runs", "causal_lm")


SVD = {"mode": "svd", "ffn_sparsity": 0.9}


def seeds(number: int = 7) -> np.random.SeedSequence:
    return np.random.SeedSequence(number)


def test_planted_effect_is_found_and_none_is_not(make: Callable[..., Path]) -> None:
    paths = [make(f"dense_{s}", s) for s in range(5)]
    paths += [make(f"svd_{s}", s, 0.05, sparsity=SVD, costs={"step_ms": 4.0}) for s in range(5)]
    paths += [make(f"same_{s}", s, sparsity={"mode": "dense"}) for s in range(5)]
    comparison = read_runs(paths)
    assert [(g.label, len(g.runs)) for g in comparison.groups] == [("plain PEFT", 5), ("svd", 5), ("dense", 5)]
    assert comparison.is_lower_better
    table = compare_runs(comparison, seeds()).set_index("config")
    svd, same = table.loc["svd"], table.loc["dense"]
    assert svd["difference"] == pytest.approx(0.05, abs=0.003)
    assert svd["ci_low"] > 0
    assert svd["row_ci_low"] > 0.04
    assert svd["t_p_holm"] < 0.001
    assert same["ci_low"] < 0 < same["ci_high"]
    assert same["row_p_holm"] > 0.01
    assert svd["speed_up"] == pytest.approx(2.5)
    assert same["speed_up"] == 1


def test_pairing_removes_what_a_seed_shares_and_rows_agree_with_seeds(make: Callable[..., Path]) -> None:
    paths = [make(f"dense_{s}", s) for s in range(4)] + [make(f"svd_{s}", s, 0.01, sparsity=SVD) for s in range(4)]
    comparison = read_runs(paths)
    row = compare_runs(comparison, seeds()).iloc[0]
    described = describe_runs(comparison).set_index("config")
    means = [[g.runs[s].metrics["eval_loss"] for s in range(4)] for g in comparison.groups]
    assert row["difference"] == pytest.approx(compare_paired(means[1], means[0]).mean_difference)
    assert row["difference"] == pytest.approx(row["row_difference"], rel=1e-3), (
        "the token-weighted mean of both is one number"
    )
    # The control: unpaired, the spread of the seeds hides an effect that the pairs show.
    assert described.loc["svd", "ci_low"] < described.loc["plain PEFT", "mean"] < described.loc["svd", "ci_high"]
    assert row["ci_low"] > 0
    assert 0 < row["detectable"] < 0.01


def test_last_bits_are_no_difference(make: Callable[..., Path]) -> None:
    paths = [make("dense", 0), make("same", 0, sparsity={"mode": "dense"})]
    table = pd.read_csv(paths[0] / "predictions.csv")
    table["loss"] = table["loss"].astype("float32") * (1 - 1e-7)
    table.to_csv(paths[1] / "predictions.csv", index=False)
    row = compare_runs(read_runs(paths), seeds()).iloc[0]
    assert (row["row_ci_low"], row["row_ci_high"], row["row_p"]) == (0, 0, 1)


def test_accuracy_is_the_metric_of_classification(tmp_path: Path) -> None:
    make = Maker(tmp_path, "classification")
    paths = [make(f"dense_{s}", s) for s in range(3)] + [make(f"svd_{s}", s, -0.1, sparsity=SVD) for s in range(3)]
    comparison = read_runs(paths)
    assert comparison.metric == "accuracy"
    row = compare_runs(comparison, seeds()).iloc[0]
    assert row["difference"] == pytest.approx(-0.1, abs=0.03)
    assert row["row_difference"] == pytest.approx(row["difference"])
    assert row["row_ci_high"] < 0


def test_labels_say_what_differs_within_a_mode(make: Callable[..., Path]) -> None:
    paths = [make("dense", 0), make("a", 0, sparsity=SVD), make("b", 0, sparsity=SVD | {"svd_rank": 4})]
    assert [g.label for g in read_runs(paths).groups] == ["plain PEFT", "svd svd_rank=8", "svd svd_rank=4"]


def test_baseline_and_folders_of_runs(make: Callable[..., Path]) -> None:
    a = make("dense_0", 0)
    b = make("svd_0", 0, sparsity=SVD)
    assert has_runs(a, "train")
    assert has_runs(a.parent, "train")
    assert not has_runs(a.parent / "missing", "train")
    assert read_runs([a.parent]).baseline.label == "plain PEFT"
    assert read_runs([a.parent], baseline=b).baseline.label == "svd"
    assert read_runs([a], baseline=b).baseline.label == "svd"
    assert [g.label for g in read_runs([a.parent], baseline=b).groups] == ["svd", "plain PEFT"]


def test_what_is_not_gated_by_token_is_the_baseline(make: Maker) -> None:
    gate = TokenGateConfig(policy="energy", budget=0.25).to_dict()
    make("energy_0", 0, token_gate=gate)
    make("plain_0", 0)
    make("random_0", 0, token_gate=gate | {"policy": "random"})
    comparison = read_runs([make.root])
    assert comparison.baseline.label == "plain PEFT"
    assert [group.label for group in comparison.groups[1:]] == ["token gate energy", "token gate random"]


def test_seeds_without_a_partner_are_left_out_of_pairs_and_named(make: Callable[..., Path]) -> None:
    paths = [make(f"dense_{s}", s) for s in (0, 1, 2)] + [make(f"svd_{s}", s, sparsity=SVD) for s in (1, 2, 5)]
    paths.append(make("skip", 9, sparsity={"mode": "skip", "ffn_sparsity": 0.5}))
    comparison = read_runs(paths)
    table = compare_runs(comparison, seeds()).set_index("config")
    assert table["n_seeds"].to_dict() == {"svd": 2, "skip": 0}
    assert np.isnan(table.loc["skip", "difference"])
    assert "svd: seeds 0, 5 have no partner" in comparison.notes[0]


def test_bad_comparisons_are_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    dense = make("dense", 0)
    with pytest.raises(InputError, match="of one configuration"):
        read_runs([dense, make("dense_1", 1)])
    with pytest.raises(InputError, match="one configuration with one seed"):
        read_runs([dense, make("twice", 0), make("svd", 0, sparsity=SVD)])
    with pytest.raises(InputError, match="has dataset"):
        read_runs([dense, make("other", 0, dataset="e.jsonl")])
    with pytest.raises(InputError, match="has chat_template None"):
        read_runs([dense, make("chat", 0, chat_template="{{ messages }}")])
    with pytest.raises(InputError, match="status running"):
        read_runs([dense, make("unfinished", 0, sparsity=SVD, status="running")])
    with pytest.raises(InputError, match="holds no run of train"):
        read_runs([dense, tmp_path / "nothing"])
    rows = make("rows", 0, sparsity=SVD)
    pd.read_csv(rows / "predictions.csv").iloc[1:].to_csv(rows / "predictions.csv", index=False)
    with pytest.raises(InputError, match="different rows"):
        read_runs([dense, rows])
    (rows / "predictions.csv").unlink()
    with pytest.raises(InputError, match="is not whole"):
        read_runs([dense, rows])


def test_command_writes_report_tables_and_figure(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make(f"dense_{s}", s) for s in range(3)] + [make(f"svd_{s}", s, 0.05, sparsity=SVD) for s in range(3)]
    out = tmp_path / "out"
    arguments = ["compare", *map(str, runs), "--out_dir", str(out)]
    assert main([*arguments, "--dry_run"]) == 0
    assert not out.exists()
    capsys.readouterr()
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "baseline plain PEFT" in printed
    assert "four times in five" in printed
    assert all(len(line) < 220 for line in printed.splitlines())
    for name in (
        "compare.md",
        "configs.csv",
        "comparisons.csv",
        "quality_against_cost.png",
        "quality_against_cost.csv",
    ):
        assert (out / name).is_file(), name
    assert str(tmp_path) not in (out / "run.json").read_text() + (out / "compare.md").read_text()
    first = (out / "comparisons.csv").read_bytes()
    assert main(arguments) == 0
    assert "already finished" in capsys.readouterr().out
    assert main([*arguments, "--overwrite"]) == 0
    assert (out / "comparisons.csv").read_bytes() == first
    assert main(["compare", str(runs[0]), "--out_dir", str(out)]) == 2
    assert "of one configuration" in capsys.readouterr().err


def test_one_seed_says_that_it_says_nothing_about_seeds(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make("dense", 0), make("svd", 0, sparsity=SVD)]
    assert main(["compare", *map(str, runs), "--out_dir", str(tmp_path / "out")]) == 0
    assert "Run three seeds or more" in capsys.readouterr().out


@pytest.mark.parametrize("effect", [0.0, -0.3])
def test_classifiers_at_chance_are_named_in_one_line(tmp_path: Path, effect: float) -> None:
    """With an effect of -0.3 half of the answers are right, of two classes of equal frequency."""
    maker = Maker(tmp_path / "runs", "classification")
    runs = [maker(f"dense_{s}", s) for s in range(2)]
    runs += [maker(f"svd_{s}", s, effect, sparsity=SVD) for s in range(2)]
    lines = [line for line in read_runs(runs).report(0).text.splitlines() if "Nothing was learned" in line]
    assert len(lines) == (effect != 0)
    assert all("by svd (seed 0, 1): accuracy at chance." in line for line in lines)


def test_a_language_model_that_noted_that_it_learned_nothing_is_named(make: Callable[..., Path]) -> None:
    runs = [make(f"dense_{s}", s) for s in range(2)] + [make(f"svd_{s}", s, sparsity=SVD) for s in range(2)]
    assert "Nothing was learned" not in read_runs(runs).report(0).text
    record = json.loads((runs[1] / "run.json").read_text())
    (runs[1] / "run.json").write_text(json.dumps(record | {"nothing_learned": "nothing was learned: …"}))
    (line,) = [line for line in read_runs(runs).report(0).text.splitlines() if "Nothing was learned" in line]
    assert "by plain PEFT (seed 1): held-out loss not clearly below that before training." in line
