"""`train` in two processes over whose cards accelerate's FSDP2 shards the model, against one process with it whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from sparselora.__main__ import main
from tests.helpers import sharded_command
from tests.helpers.accelerate_steps import FSDP2
from tests.helpers.processes import start_two
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

STATIC = ["--sparsity.mode", "static", "--sparsity.ffn_sparsity", "0.5"]
FP8 = ["--sparsity.frozen_precision", "fp8_emulated", "--sparsity.context_backward", "none"]


class Sharded:
    """Calls `train` on a tiny Llama, as one process or as two that shard; four rows a step either way."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, patch
        rows, dev = write_instructions(folder / "rows.jsonl", 24, 1), write_instructions(folder / "dev.jsonl", 9, 2)
        self.arguments = [
            "train", "--task", "causal_lm", "--model", str(make_tiny_llama(folder / "llama")), "--dataset", str(rows),
            "--eval_file", str(dev), "--eval_bsz", "3", "--max_steps", "4", "--lr", "0.01", "--lora_r", "4",
            "--dtype", "fp32", "--device", "cpu",
        ]  # fmt: skip

    def one(self, out: str, *flags: str) -> None:
        assert main([*self.arguments, "--train_bsz", "4", "--out_dir", str(self.folder / out), *flags]) == 0

    def two(self, out: str, *flags: str, **environment: str) -> None:
        flags = ("--train_bsz", "2", "--out_dir", str(self.folder / out), *flags)
        with self._patch.context() as changes:
            for name, value in (FSDP2 | {"SHARDS": str(self.folder)} | environment).items():
                changes.setenv(name, value)
            start_two(sharded_command.__file__, *self.arguments, *flags, folder=self.folder)

    def table(self, out: str, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / out / name, keep_default_na=False)

    def adapter(self, out: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / out / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sharded:
    return Sharded(tmp_path, monkeypatch)


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two adapters, relative to the second."""
    assert first.keys() == second.keys()
    parts = [(float((first[n] - x).square().sum()), float(x.square().sum())) for n, x in second.items()]
    return (sum(part for part, _ in parts) / sum(whole for _, whole in parts)) ** 0.5


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--grad_accum", "2", "--generations", "2", "--eval_steps", "2"], id="dense"),
        pytest.param(["--sparsity.mode", "dense", *FP8, "--group_by_length"], id="fp8"),
        pytest.param([*STATIC, "--packing", "--max_length", "24"], id="packed rows"),
        pytest.param(
            ["--sparsity.mode", "skip", "--sparsity.ffn_sparsity", "0.5"], id="skip", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--sparsity.mode", "surrogate", "--sparsity.ffn_sparsity", "0.5", "--gradient_checkpointing", "--optim",
             "sgd"],
            id="checkpointing", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_two_processes_with_half_of_the_model_each_train_as_one(sharded: Sharded, flags: list[str]) -> None:
    """In float32, by AdamW. The control is an adapter of another seed's data order."""
    sharded.two("two", *flags)
    sharded.one("one", *flags)
    one, two = (sharded.table(out, "metrics.csv") for out in ("one", "two"))
    assert two["tokens"].tolist() == one["tokens"].tolist()
    assert two["loss"].tolist() == pytest.approx(one["loss"].tolist(), rel=1e-5)
    alone, both = (sharded.table(out, "predictions.csv") for out in ("one", "two"))
    assert both["row"].tolist() == alone["row"].tolist()
    assert both["loss"].tolist() == pytest.approx(alone["loss"].tolist(), rel=1e-5)
    assert both["correct"].equals(alone["correct"])
    assert distance(sharded.adapter("two"), sharded.adapter("one")) < 1e-3
    sharded.one("other", *flags, "--seed", "1")
    assert distance(sharded.adapter("other"), sharded.adapter("one")) > 0.1
    if "--generations" in flags:
        assert sharded.table("two", "generations.csv").equals(sharded.table("one", "generations.csv"))
    for rank in range(2):
        shards = json.loads((sharded.folder / f"shards{rank}.json").read_text())
        assert shards["share"] < 0.6
        assert shards["units"] >= 4  # two blocks, what is left, and the output layer


def test_a_run_that_stopped_goes_on_from_its_whole_checkpoint(sharded: Sharded) -> None:
    flags = [*STATIC, "--save_steps", "2"]
    sharded.two("whole", *flags)
    sharded.two("stopped", *flags, STOP_AT="3")
    assert json.loads((sharded.folder / "stopped" / "run.json").read_text())["status"] == "failed"
    saved = sharded.folder / "stopped" / "checkpoints" / "checkpoint-2"
    assert (saved / "optimizer.pt").exists()
    halfway = load_file(saved / "adapter_model.safetensors")
    assert all(type(x) is torch.Tensor for x in halfway.values())
    shutil.copytree(sharded.folder / "stopped", sharded.folder / "forgetful")
    sharded.two("stopped", *flags, "--resume")
    for name in ("adapter/adapter_model.safetensors", "predictions.csv"):
        assert (sharded.folder / "stopped" / name).read_bytes() == (sharded.folder / "whole" / name).read_bytes()
    assert sharded.table("stopped", "metrics.csv")["loss"].equals(sharded.table("whole", "metrics.csv")["loss"])
    sharded.two("forgetful", *flags, "--resume", FORGETS="1")  # the control
    assert distance(sharded.adapter("forgetful"), sharded.adapter("whole")) > 1e-3


@pytest.mark.parametrize(
    ("flags", "settings", "reason"),
    [
        (["--use_dora"], {}, "use_dora does not go with accelerate's FSDP"),
        (["--init_lora_weights", "pissa"], {}, "init_lora_weights pissa does not go with"),
        (["--squeeze", "4:2"], {}, "squeeze does not go with"),
        (["--optim", "muon"], {}, "optim muon does not go with"),
        (["--loraplus_lr_ratio", "4"], {}, "loraplus_lr_ratio does not go with"),
        (["--neftune_noise_alpha", "5"], {}, "neftune_noise_alpha does not go with"),
        (["--no-adapter_on_context", "--template", "{prompt} :"], {}, "adapter_on_context false does not go with"),
        ([], {"FSDP_VERSION": "1"}, "accelerate's fsdp_version 1"),
        ([], {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "fsdp_auto_wrap_policy other than TRANSFORMER_BASED_WRAP"),
        ([], {"FSDP_OFFLOAD_PARAMS": "true"}, "accelerate's fsdp_offload_params"),
        ([], {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing (gradient_checkpointing"),
        ([], {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "accelerate's fsdp_cpu_ram_efficient_loading"),
    ],
)
def test_what_does_not_go_with_shards_is_named(
    sharded: Sharded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: list[str], settings: dict[str, str], reason: str,
) -> None:  # fmt: skip
    for name, value in (FSDP2 | settings).items():
        monkeypatch.setenv(name, value)
    out = sharded.folder / "out"
    assert main([*sharded.arguments, "--out_dir", str(out), *flags]) == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()
