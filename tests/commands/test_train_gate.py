"""`train` with the novelty gate: its log and summary, resuming, beside contextual sparsity, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from sparselora.__main__ import main
from sparselora.config.novelty import GateConfig
from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.novelty.manipulation import describe_check
from tests.helpers.train_command import Train

ROOT = Path(__file__).resolve().parents[2]
GATE = [
    "--novelty.burn_in",
    "4",
    "--novelty.m",
    "64",
    "--novelty.k",
    "8",
    "--novelty.k_topk",
    "8",
    "--novelty.target_accept_rate",
    "0.5",
]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    return Train(
        tmp_path_factory.mktemp("gate"), "--grad_accum", "2", "--epochs", "3", "--lora_r", "4", "--group_by_length"
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_gated_run_leaves_its_decisions(train: Train, sparse: bool, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"sparse_{sparse}"
    more = ["--sparsity.mode", "svd", "--sparsity.ffn_sparsity", "0.5", "--sparsity.svd_rank", "4"] if sparse else []
    assert train(out, *GATE, *more, "--epochs", "6") == 0
    gate, metrics, summary = (train.table(out, name) for name in ("gate", "metrics", "summary"))
    assert gate["step"].tolist() == metrics["step"].tolist() == list(range(1, 31))
    assert gate["accept"].iloc[:4].all()
    assert 0 < gate["accept"].iloc[4:].sum() < 26
    assert gate["accepted_steps"].iloc[-1] == gate["accept"].sum() == summary["accepted_steps"].iloc[0]
    assert gate["tokens"].tolist() == metrics["tokens"].tolist()
    assert (
        gate["tokens_trained"].iloc[-1] == (gate["tokens"] * gate["accept"]).sum() == summary["tokens_trained"].iloc[0]
    )
    assert gate["loss"].tolist() == pytest.approx(metrics["loss"].tolist(), rel=1e-5)
    assert summary["acceptance_rate"].iloc[0] == pytest.approx(gate["accept"].iloc[4:].mean())
    assert summary["gated_decisions"].iloc[0] == 26
    # The learning rate moves with updates alone.
    assert (metrics["lr"].diff().iloc[1:] != 0).tolist() == gate["accept"].astype(bool).iloc[:-1].tolist()
    assert "updates of 30 steps" in capsys.readouterr().out


def test_resumed_gated_run_is_the_uninterrupted_one(train: Train, tmp_path: Path) -> None:
    arguments = [*GATE, "--save_steps", "5", "--lora_dropout", "0.1", "--epochs", "4"]
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    assert train(whole, *arguments) == 0
    train.kill_in_step(13, broken, *arguments)
    assert train(broken, *arguments, "--resume") == 0
    one, two = (train.table(out, "gate").drop(columns="wall_s") for out in (whole, broken))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_disabled_gate_trains_as_if_it_were_not_there(train: Train, tmp_path: Path) -> None:
    for out, more in (("plain", []), ("off", ["--no-novelty.enable"]), ("none", [*GATE, "--novelty", "none"])):
        assert train(str(tmp_path / out), *more, "--max_steps", "3") == 0
        assert not (tmp_path / out / "gate.csv").exists()
    name = "adapter/adapter_model.safetensors"
    assert len({(tmp_path / out / name).read_bytes() for out in ("plain", "off", "none")}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--novelty.m", "100"], "power of two"),
        (["--novelty.m", "8", "--novelty.k", "8"], "k must be below the sketch's length m, 8"),
        (["--novelty.k_topk", "100000"], "k_topk must be between 1 and"),
        (["--novelty.target_accept_rate", "1.5"], "target_accept_rate must be a number in [0, 1]"),
        (["--novelty.target_accept_rate", "1"], "must be in (0, 1)"),
        (["--novelty.burn_in", "2.5"], "burn_in must be a whole number"),
        (["--novelty.max_consecutive_rejects", "1"], "raise it to"),
        (["--load_in_4bit", "--task", "classification"], "load_in_4bit is for task causal_lm"),
    ],
)
def test_bad_gate_is_one_line(
    train: Train, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(str(tmp_path / "run"), "--novelty.k_topk", "8", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_published_sections_and_names_are_understood() -> None:
    values = {
        "model": {"name": "m", "load_in_4bit": True, "use_flash_attention_2": False},
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]},
        "data": {"dataset_name": "d", "train_split": "train", "max_seq_length": 99},
        "task": "causal_lm", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "tf32": True,
        "dataloader_num_workers": 4, "gradient_checkpointing": True,
        "novelty": {"enable": True, "m": 256, "k": 16, "burn_in": 0.25},
    }  # fmt: skip
    config = TrainConfig.from_dict(values)
    assert (config.model, config.lora_r, config.lora_alpha, config.target_modules) == ("m", 8, 16.0, ("q_proj",))
    assert (config.dataset, config.max_length, config.train_bsz, config.grad_accum) == ("d", 99, 3, 5)
    assert (config.load_in_4bit, config.tf32, config.dataloader_num_workers) == (True, True, 4)
    assert config.novelty == GateConfig(m=256, k=16, burn_in=0.25)
    assert config.gated
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert not config.merge({"novelty": {"enable": False}}).gated
    assert config.merge({"novelty": "none"}).novelty is None
    former = values | {"slora": {"target_novelty": 0.4}}
    del former["novelty"]
    assert TrainConfig.from_dict(former).novelty == GateConfig(target_accept_rate=0.4)
    merged = config.merge({"slora": {"target_novelty": 0.4}})
    assert merged.novelty == config.novelty.replace(target_accept_rate=0.4)
    for wrong, message in (
        ({"lora": {"rank": 8}}, "unknown key 'rank' in section lora"),
        ({"lora": {"r": 8}, "lora_r": 4}, "lora_r is given twice"),
        ({"train_bsz": 2, "per_device_train_batch_size": 2}, "train_bsz is given twice"),
        ({"novelty": {"topk": 1}}, "unknown key 'topk'"),
        ({"novelty": 3}, "novelty must be a mapping"),
        ({"novelty": {}, "slora": {}}, "slora is the former name of novelty"),
        ({"novelty": {"target_novelty": 0.3, "target_accept_rate": 0.4}}, "target_novelty is the former name"),
    ):
        with pytest.raises(InputError, match=message):
            TrainConfig.from_dict(wrong)


def test_shipped_gate_configs_gate_four_fifths_of_their_run() -> None:
    baseline, quick = (TrainConfig.from_yaml(ROOT / "configs" / f"novelty_{n}.yaml") for n in ("baseline", "quick"))
    assert baseline.merge({"novelty": quick.novelty}) == quick
    for name in ("quick", "llama3_8b"):
        config = TrainConfig.from_yaml(ROOT / "configs" / f"novelty_{name}.yaml")
        assert config.gated
        assert config.novelty is not None
        assert 0 < config.novelty.burn_in <= 0.2


@pytest.mark.slow
def test_shipped_grid_runs_baseline_and_gate_for_compare(train: Train, tmp_path: Path) -> None:
    runs, shared = tmp_path / "runs", ["--max_steps", "12", "--device", "cpu", "--train_bsz", "4"]
    grid = ["grid", str(ROOT / "configs" / "novelty.jsonl"), "--command", "train", "--run_root", str(runs)]
    shared += ["--model", str(train.model), "--dataset", str(train.train), "--eval_steps", "6", *GATE]
    assert main([*grid, "--defaults", str(ROOT / "configs" / "novelty_quick.yaml"), *shared]) == 0
    assert main(["compare", str(runs), "--out_dir", str(tmp_path / "compare")]) == 0
    table = pd.read_csv(tmp_path / "compare" / "configs.csv")
    assert table["n_seeds"].tolist() == [3, 3]
    assert table["config"][0] == "plain PEFT"


def test_dry_run_names_the_log(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *train.arguments, *GATE, "--dry_run"]) == 0
    assert "gate.csv" in capsys.readouterr().out


# --- planted redundancy and the manipulation check -----------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(train: Train) -> list[str]:
    """Eight batches of originals, then eight of near-duplicates, as settings of a run that keeps them together."""
    lines = [json.loads(line) for line in train.train.read_text().splitlines()]
    rows = [row | {"planted": int(batch >= 8)} for batch in range(16) for row in (lines * 2)[batch : batch + 8]]
    path = train.folder / "planted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset", str(path), "--no-group_by_length", "--shuffle_batches", "--epochs", "2"]


def test_batches_of_planted_rows_stay_whole_and_the_run_says_whether_its_gate_chose(
    train: Train, planted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("planted", *GATE, *planted, "--save_steps", "7") == 0
    gate, summary = train.table("planted", "gate"), train.table("planted", "summary").iloc[0]
    for epoch in (gate.iloc[:16], gate.iloc[16:]):
        assert sorted(epoch["planted"]) == [0] * 8 + [1] * 8
        assert epoch["planted"].tolist() != sorted(epoch["planted"])
    gated = gate.iloc[4:]
    sides = [gated.loc[gated["accept"] == side, "novelty"].to_numpy() for side in (1, 0)]
    pairs = [(x > y) + 0.5 * (x == y) for x in sides[0] for y in sides[1]]
    assert summary["choice_auc"] == pytest.approx(sum(pairs) / len(pairs))
    assert summary["novelty_beta"] == pytest.approx(2 / gate["novelty"].iloc[2:4].std(ddof=0))
    assert 0 <= summary["duplicate_auc"] <= 1
    printed = capsys.readouterr().out
    assert f"AUC of novelty, accepted against rejected: {summary['choice_auc']:.2f} (steepness" in printed
    assert "original batches against planted near-duplicates" in printed
    # The control: without the setting the rows of a batch are mixed.
    assert train("mixed", *GATE, *planted[:-3], "--epochs", "1") == 0
    assert train.table("mixed", "gate")["planted"].between(0.01, 0.99).any()


def test_a_resumed_run_keeps_the_order_of_its_batches(train: Train, planted: list[str], tmp_path: Path) -> None:
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    arguments = [*GATE, *planted, "--novelty.policy", "oracle", "--save_steps", "5"]
    assert train(whole, *arguments) == 0
    train.kill_in_step(23, broken, *arguments)
    assert train(broken, *arguments, "--resume") == 0
    one, two = (train.table(out, "gate").drop(columns="wall_s") for out in (whole, broken))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert one["novelty"].notna().all()


def test_what_does_not_go_with_kept_batches_or_the_oracle_is_refused(
    train: Train, planted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        (["--shuffle_batches", "--packing", "--no-group_by_length"], "shuffle_batches and packing"),
        (["--shuffle_batches"], "shuffle_batches and group_by_length"),
        ([*planted, "--train_samples", "8"], "shuffle_batches and train_samples"),
        ([*planted, "--dedupe", "0.9"], "shuffle_batches and dedupe"),
        (["--novelty.policy", "oracle", "--squeeze", "8:4", "--lora_r", "8"], "squeeze and novelty policy oracle"),
    ):
        assert train("refused", *more) == 2
        assert message in capsys.readouterr().err
    assert not (train.folder / "refused").exists()
    with pytest.raises(InputError, match="shuffle_batches needs eval_file"):
        TrainConfig(dataset="d.jsonl", shuffle_batches=True)


def test_a_gate_that_did_not_choose_says_so() -> None:
    summary = {"novelty_beta": 3.0, "choice_auc": 0.56, "duplicate_auc": float("nan")}
    (sentence,) = describe_check(summary)
    assert "below 0.8: the gate did not choose" in sentence
    assert "did not choose" not in "".join(describe_check(summary | {"choice_auc": 0.8}))
    assert describe_check({}) == []
