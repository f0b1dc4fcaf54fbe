"""`train --no-adapter_on_context`: an activated LoRA from the template's closing text on, sparse or not, for PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparselora.__main__ import main
from sparselora.data.batches import Collator
from sparselora.data.instructions import closing_text, encode_instructions, load_instructions
from sparselora.models.load import load_causal_lm
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

TEMPLATE = "{prompt} w39 w38 w39"


class Activated:
    """Calls the command on a tiny Llama and a file of instructions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_tiny_llama(folder / "llama")
        self.train, self.dev = (write_instructions(folder / f"{n}.jsonl", r, r) for n, r in (("train", 40), ("dev", 9)))

    def __call__(self, out: str, *arguments: str) -> int:
        return main([
            "train", "--task", "causal_lm", "--model", str(self.model), "--dataset", str(self.train), "--eval_file",
            str(self.dev), "--train_bsz", "4", "--epochs", "2", "--lr", "1e-2", "--lora_r", "4", "--device", "cpu",
            "--template", TEMPLATE, "--no-adapter_on_context", "--out_dir", str(self.folder / out), *arguments,
        ])  # fmt: skip

    def adapter(self, out: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / out / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Activated:
    return Activated(tmp_path_factory.mktemp("activated"))


def test_sparsify_trains_what_peft_trains_and_peft_loads_it(train: Activated) -> None:
    assert train("peft") == 0
    assert train("ours", "--sparsity.mode", "dense", "--sparsity.context_backward", "none") == 0
    assert train("plain", "--adapter_on_context") == 0  # the control
    reference, plain = train.adapter("peft"), train.adapter("plain")
    for name, ours in train.adapter("ours").items():
        torch.testing.assert_close(ours, reference[name], rtol=0, atol=2e-4)
    assert max(float((plain[name] - reference[name]).abs().max()) for name in reference) > 1e-2

    config = json.loads((train.folder / "ours" / "adapter" / "adapter_config.json").read_text())
    tokenizer = load_causal_lm(str(train.model))[1]
    tokens = tokenizer.encode("w39 w38 w39", add_special_tokens=False)
    assert config["alora_invocation_tokens"] == tokens
    data = load_instructions(str(train.train), eval_file=str(train.dev), template=TEMPLATE)
    batch = Collator(2, causal=True).tensors(encode_instructions(data.eval, tokenizer, 64).examples)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(train.model), train.folder / "ours" / "adapter"
    ).eval()
    eval_loss = pd.read_csv(train.folder / "ours" / "summary.csv")["eval_loss"].iloc[0]
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(eval_loss, rel=1e-4)
        model.peft_config["default"].alora_invocation_tokens = [0, 0, 0, 0]  # nowhere: the base model
        assert model(**batch).loss.item() != pytest.approx(eval_loss, rel=1e-2)


def test_other_commands_read_it_or_refuse_it_by_name(train: Activated, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("read", "--max_steps", "6") == 0
    folder, common = train.folder, ["--adapter", str(train.folder / "read" / "adapter"), "--model", str(train.model)]
    data = ["--dataset", str(train.train), "--device", "cpu"]
    evaluate = ["eval", *common, *data, "--eval_file", str(train.dev), "--task", "causal_lm"]
    assert main([*evaluate, "--out_dir", str(folder / "evaluated")]) == 0
    metrics = json.loads((folder / "evaluated" / "metrics_causal_lm.json").read_text())
    assert metrics["loss"] == pytest.approx(pd.read_csv(folder / "read" / "summary.csv")["eval_loss"].iloc[0], rel=1e-6)
    capsys.readouterr()
    assert main(["edit", *common, *data, "--calib_samples", "8", "--out_dir", str(folder / "edited")]) == 2
    assert "ALoraLinearVariant; only plain LoRA" in capsys.readouterr().err
    assert main(["reduce", *common[:2], "--rank", "2", "--out_dir", str(folder / "reduced")]) == 0
    (config,) = (folder / "reduced").rglob("adapter_config.json")
    assert len(json.loads(config.read_text())["alora_invocation_tokens"]) == 3


@pytest.mark.parametrize("mode", ["static", "svd"])
def test_sparse_modes_run(train: Activated, mode: str) -> None:
    assert train(mode, "--sparsity.mode", mode, "--sparsity.ffn_sparsity", "0.5", "--max_steps", "3") == 0
    assert any(value.abs().max() > 0 for name, value in train.adapter(mode).items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--template", "{prompt}\n"], "needs a template with a text after its last field"),
        (["--template", "{prompt} w1"], "comes again in the completion of row"),
        (["--max_length", "4"], "is not in row"),
        (["--packing"], "adapter_on_context false and packing"),
        (["--gradient_checkpointing"], "adapter_on_context false and gradient_checkpointing"),
        (["--novelty.policy", "random"], "adapter_on_context false and an enabled novelty gate"),
        (["--sparsity.mode", "dense", "--sparsity.context_backward", "sampled"], "is not for an activated LoRA"),
        (["--task", "classification"], "is for task causal_lm"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    train: Activated, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("bad", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (train.folder / "bad").exists()


def test_the_closing_text_follows_the_last_field() -> None:
    assert closing_text("Q: {prompt}\n{{A}}:") == "\n{A}:"
    assert closing_text("Q: {prompt}") == ""
    assert closing_text("{prompt} of {topic}.") == "."
