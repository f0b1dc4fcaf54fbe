"""`train` with the novelty gate: its log and summary, resuming, beside contextual sparsity, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from sparselora.__main__ import main
from sparselora.config.novelty import GateConfig
from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from tests.commands.test_train import Train

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
    return Train(tmp_path_factory.mktemp("gate"))


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
