"""`benchmarks/serving.py` at a tiny size: its bytes are those of the files, and loading leaves the model as it was."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.paths import ROOT


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("serving_script", ROOT / "benchmarks" / "serving.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def _model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def test_a_row_for_every_variant_and_batch(script, tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "model")
    args = argparse.Namespace(
        model=str(tmp_path / "model"), ranks=[16, 4], batches=[1, 3], prompt_tokens=5, new_tokens=3, rounds=2,
        device="cpu", dtype="fp32",
    )  # fmt: skip
    table = script.measure(args, tmp_path)
    assert table["variant"].tolist() == ["r16", "r16", "r4", "r4", "merged", "merged"]
    assert table["batch"].tolist() == [1, 3] * 3
    assert (table["tokens_per_s_min"] <= table["tokens_per_s"]).all()
    assert (table.loc[table["variant"] == "merged", "of_merged"] == 1).all()
    for rank in (16, 4):
        file = tmp_path / f"r{rank}" / "adapter_model.safetensors"
        row = table[table["variant"] == f"r{rank}"].iloc[0]
        assert row["adapter_bytes"] == file.stat().st_size
        tensor_bytes = sum(tensor.nbytes for tensor in load_file(file).values())
        # vLLM holds a rank that is none of its sizes as the next that is: rank 4 takes twice its bytes.
        assert row["vllm_slot_bytes"] == tensor_bytes * (1 if rank == 16 else 2)
        assert row["vllm_max_lora_rank"] == max(rank, 8)


def test_loading_leaves_the_base_model_without_adapters(script, tmp_path: Path) -> None:
    model, tokens = _model(), torch.arange(6)[None]
    before = model(tokens).logits
    script.write_adapter(model, 4, tmp_path / "r4")
    assert len(script.load_seconds(model, tmp_path / "r4", torch.device("cpu"), 3)) == 3
    assert torch.equal(model(tokens).logits, before)
    assert not any("lora_" in name for name, _ in model.named_parameters())
    adapted = script.PeftModel.from_pretrained(model, str(tmp_path / "r4"))
    assert not torch.equal(adapted(tokens).logits, before)  # the adapter that was timed does something


def test_as_many_tokens_as_asked_for_whatever_the_model_says(script) -> None:
    model = _model()
    first = script.generate(model, torch.arange(6)[None], 4)[0, 6].item()
    model.generation_config.eos_token_id = first  # it would end at once
    assert script.generate(model, torch.arange(6)[None], 4).shape == (1, 10)
