"""`train --no-adapter_on_context`: an activated LoRA from the template's closing text on, sparse or not, for PEFT."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sparselora.__main__ import main
from sparselora.data.batches import Collator
from sparselora.data.instructions import closing_text, encode_instructions, load_instructions
from sparselora.models.load import load_causal_lm
from tests.helpers.train_command import Train

TEMPLATE = "{prompt} w39 w38 w39"


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    settings = ("--epochs", "2", "--lora_r", "4", "--template", TEMPLATE, "--no-adapter_on_context")
    return Train(tmp_path_factory.mktemp("activated"), *settings)


def test_sparsify_trains_what_peft_trains_and_peft_loads_it(train: Train) -> None:
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


def test_other_commands_read_it_or_refuse_it_by_name(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_sparse_modes_run(train: Train, mode: str) -> None:
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
    train: Train, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train.assert_refused(arguments, message, capsys)


def test_the_closing_text_follows_the_last_field() -> None:
    assert closing_text("Q: {prompt}\n{{A}}:") == "\n{A}:"
    assert closing_text("Q: {prompt}") == ""
    assert closing_text("{prompt} of {topic}.") == "."
