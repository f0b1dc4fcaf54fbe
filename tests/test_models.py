"""Target modules come from a model's structure, and what cannot be adapted is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from sparselora.errors import InputError
from sparselora.models import (
    attach_lora,
    attention_projections,
    head_modules,
    load_classifier,
    public_name,
    resolve_device,
    resolve_target_modules,
)

SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SMALL))


FAMILIES = {
    "bert": (bert, ["query", "key", "value", "attention.output.dense"], ["classifier"]),
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)),
        ["query", "key", "value", "attention.output.dense"],
        ["classifier"],
    ),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=30, dim=16, n_layers=2, n_heads=2, hidden_dim=20)
        ),
        ["q_lin", "k_lin", "v_lin", "out_lin"],
        ["pre_classifier", "classifier"],
    ),
    "gpt2": (
        lambda: GPT2ForSequenceClassification(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2)),
        ["c_attn", "attn.c_proj"],
        ["score"],
    ),
    "llama": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, num_key_value_heads=1)),
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        ["score"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_projections_and_head_by_structure(family: str) -> None:
    make, targets, head = FAMILIES[family]
    model = make()
    assert attention_projections(model) == targets
    assert head_modules(model) == head
    adapted = attach_lora(model, r=2, alpha=4, dropout=0.0, target_modules=targets, base_model="x")
    modules = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert len(modules) == 2 * len(targets)
    assert all("attn" in name or "attention" in name for name in modules)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained
    assert all(any(f".{part}." in name for part in head) for name in trained)


def test_named_targets_are_obeyed_or_refused() -> None:
    assert resolve_target_modules(bert(), ["query", "intermediate.dense"]) == ["query", "intermediate.dense"]
    with pytest.raises(
        InputError, match=r"'qery' matches no linear layer.*did you mean 'query'.*it has: query, key, value, dense"
    ):
        resolve_target_modules(bert(), ["qery"])


@pytest.mark.parametrize("r", [0, 17])
def test_ranks_outside_the_dimensions_are_refused(r: int) -> None:
    with pytest.raises(InputError, match="lora_r must be between 1 and 16"):
        attach_lora(bert(), r=r, alpha=4, dropout=0.0, target_modules=["query"], base_model="x")


def test_local_folder_loads_with_a_seeded_head(tiny_bert: Path) -> None:
    heads = []
    for _ in range(2):
        torch.manual_seed(3)
        model, tokenizer = load_classifier(str(tiny_bert), num_labels=3)
        heads.append(model.classifier.weight)
    assert torch.equal(*heads)
    assert heads[0].shape == (3, 24)
    assert heads[0].dtype == torch.float32
    assert tokenizer("w1 w2")["input_ids"] == [5, 6]
    assert public_name(str(tiny_bert)) == "tiny_bert"


def test_models_that_are_not_there(tmp_path: Path) -> None:
    for name in (str(tmp_path), "no-one/no-such-model"):
        with pytest.raises(InputError, match="could not be loaded as a classifier") as caught:
            load_classifier(name, num_labels=2)
        assert "\n" not in str(caught.value)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(InputError, match="not there"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")


def test_weights_that_are_not_finite_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("key.weight"))
    weights[name][1, 2] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"NaN or infinite values in .*{name}"):
        load_classifier(str(folder), 2)


def test_a_folder_without_a_tokenizer_is_refused_not_given_an_empty_one(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        load_classifier(str(folder), 2)


def test_texts_are_cut_to_the_positions_a_model_has(tiny_bert: Path, tmp_path: Path) -> None:
    assert load_classifier(str(tiny_bert), 2)[1].model_max_length == 40
    folder = shutil.copytree(tiny_bert, tmp_path / "roberta")
    config = RobertaConfig(**{**SMALL, "vocab_size": 64}, max_position_embeddings=42, pad_token_id=1)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    model, tokenizer = load_classifier(str(folder), 2)
    longest = tokenizer.model_max_length
    assert longest == 40
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):  # the control: one more and there is no position for it
        model(torch.full((1, longest + 1), 5))
