"""`train` with frozen products in fp8: resuming, several processes, the novelty gate, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from sparselora.__main__ import main
from sparselora.contextual import precision
from sparselora.contextual.precision import Fp8
from sparselora.models import load
from sparselora.training import run as training_run
from tests.helpers.processes import start_two
from tests.helpers.train_command import Train

DENSE = ["--sparsity.mode", "dense"]
EMULATED = [*DENSE, "--sparsity.frozen_precision", "fp8_emulated"]
CHEAP = [*EMULATED, "--sparsity.context_backward", "none"]
ADAPTER = Path("adapter", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    return Train(
        tmp_path_factory.mktemp("train"), "--grad_accum", "2", "--epochs", "3", "--lora_r", "4", "--group_by_length"
    )


def test_native_is_what_a_run_without_the_setting_does_byte_for_byte(train: Train) -> None:
    for out, arguments in (("absent", []), ("native", ["--sparsity.frozen_precision", "native"])):
        assert train(out, *DENSE, *arguments, "--epochs", "1") == 0
    assert train("fp8", *EMULATED, "--epochs", "1") == 0
    absent, native, rounded = ((train.folder / out / ADAPTER).read_bytes() for out in ("absent", "native", "fp8"))
    assert absent == native
    assert absent != rounded  # the control
    losses = {out: train.table(out)["loss"] for out in ("absent", "fp8")}
    assert losses["fp8"].tolist() == pytest.approx(losses["absent"].tolist(), rel=0.05)


@pytest.mark.parametrize("arguments", [EMULATED, CHEAP], ids=["fp8", "both"])
def test_a_resumed_run_is_the_uninterrupted_one(train: Train, tmp_path: Path, arguments: list[str]) -> None:
    arguments = [*arguments, "--save_steps", "4", "--eval_steps", "3", "--lora_dropout", "0.1"]
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    assert train(whole, *arguments) == 0
    train.kill_in_step(10, broken, *arguments)
    assert train(broken, *arguments, "--resume") == 0
    assert (tmp_path / "whole" / ADAPTER).read_bytes() == (tmp_path / "broken" / ADAPTER).read_bytes()
    columns = ["step", "loss", "lr", "tokens"]
    pd.testing.assert_frame_equal(train.table(whole)[columns], train.table(broken)[columns], check_exact=True)


def test_two_processes_train_as_one_with_twice_the_batch(train: Train, tmp_path: Path) -> None:
    arguments = [*train.arguments, *CHEAP]
    two = ["-m", "sparselora", "train", *arguments, "--train_bsz", "2", "--out_dir", str(tmp_path / "two")]
    start_two(*two, folder=tmp_path)
    assert main(["train", *arguments, "--out_dir", str(tmp_path / "one")]) == 0
    one, both = (pd.read_csv(tmp_path / out / "metrics.csv") for out in ("one", "two"))
    assert both["tokens"].tolist() == one["tokens"].tolist()
    # Sums in another order round elsewhere, and what is near a tie of fp8 goes the other way.
    assert both["loss"].tolist() == pytest.approx(one["loss"].tolist(), rel=2e-3)


def test_the_novelty_gate_decides_on_these_passes_too(train: Train) -> None:
    gate = ["--novelty.policy", "novelty", "--novelty.m", "128", "--novelty.k", "8", "--novelty.k_topk", "8"]
    assert train("gated", *CHEAP, *gate, "--novelty.burn_in", "4", "--novelty.target_accept_rate", "0.5") == 0
    summary = train.table("gated", "summary").iloc[0]
    assert 4 <= summary["accepted_steps"] < summary["steps"]
    assert train.table("gated")["loss"].notna().all()


def test_accumulated_batches_are_one_large_batch(train: Train) -> None:
    assert train("accumulated", *EMULATED, "--epochs", "1") == 0
    assert train("large", *EMULATED, "--epochs", "1", "--train_bsz", "8", "--grad_accum", "1") == 0
    losses = [train.table(out)["loss"].tolist() for out in ("accumulated", "large")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_loss_that_is_not_finite_is_one_line_and_a_failed_run(train: Train, capsys) -> None:
    assert train("diverged", *CHEAP, "--lr", "1e30", "--scheduler", "constant", "--warmup_ratio", "0") == 1
    error = capsys.readouterr().err
    assert "training diverged: the loss is nan at step" in error
    assert "Traceback" not in error
    assert train.record("diverged")["status"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "frozen_precision fp8 is not possible here: fp8 products need an NVIDIA GPU of compute capability 8.9"),
        (["--device", "auto"], "and this is cpu; use native, or fp8_emulated"),
        (["--load_in_4bit"], "load_in_4bit and frozen_precision fp8 are both given"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_folder_is_claimed_or_data_are_read(
    train: Train, arguments: list[str], message: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(training_run, "run_training", lambda *_: pytest.fail("the run has begun"))
    assert train("bad", *DENSE, "--sparsity.frozen_precision", "fp8", "--dataset", "not there.jsonl", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (train.folder / "bad").exists()


def test_a_card_without_fp8_is_refused_before_the_model_is_loaded(train: Train, capsys, monkeypatch) -> None:
    problem = "fp8 products need compute capability 8.9 or more (Ada, Hopper, Blackwell), and A100 has 8.0"
    answers = iter([None])  # the first question is about the kind of device
    monkeypatch.setattr(precision, "fp8_device_problem", lambda device: next(answers, problem))
    monkeypatch.setattr(load, "load_causal_lm", lambda *_, **__: pytest.fail("the model is loaded"))
    assert train("bad", *DENSE, "--sparsity.frozen_precision", "fp8") == 2
    error = capsys.readouterr().err
    assert f"{problem}; use native" in error
    assert error.count("\n") == 1
    assert not (train.folder / "bad").exists()


def test_layers_of_other_sides_are_refused_by_name(train: Train, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precision, "fp8_device_problem", lambda device: None)
    monkeypatch.setattr(Fp8, "leaves_device", False)
    model = load.load_causal_lm(str(train.model))[0].config
    model.intermediate_size = 50
    odd = tmp_path / "odd"
    from transformers import AutoTokenizer, LlamaForCausalLM

    LlamaForCausalLM(model).save_pretrained(odd)
    AutoTokenizer.from_pretrained(train.model).save_pretrained(odd)
    assert train("bad", *DENSE, "--sparsity.frozen_precision", "fp8", "--model", str(odd)) == 2
    error = capsys.readouterr().err
    assert "mlp.gate_proj: fp8 products need multiples of 16 inputs and outputs, got 32 inputs and 50 outputs" in error
    assert error.count("\n") == 1
    assert not (train.folder / "bad").exists()
    assert train("fits", *DENSE, "--sparsity.frozen_precision", "fp8", "--epochs", "1") == 0  # the control
