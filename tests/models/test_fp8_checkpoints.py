"""Checkpoints whose weights are stored in fp8 with a scale for each block are read as the numbers they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparselora.__main__ import main
from sparselora.errors import InputError
from sparselora.models.load import load_causal_lm
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

BLOCK = 16


def in_blocks(W: torch.Tensor, block_size: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the fp8 values of ``W``, a scale for each block, and their products."""
    n, k = W.shape
    values, exact = torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(n, k)
    scales = torch.empty(-(-n // block_size), -(-k // block_size))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = tuple(slice(place * block_size, (place + 1) * block_size) for place in (i, j))
            scales[i, j] = W[block].abs().max() / 448
            values[block] = (W[block] / scales[i, j]).to(values.dtype)
            exact[block] = values[block].float() * scales[i, j]
    return values, scales, exact


def store(folder: Path, block_size: int = BLOCK) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of such a checkpoint, and the matrices it stands for by their names."""
    make_tiny_llama(folder)
    tensors, exact = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if "proj" in name]:
        tensors[name], tensors[f"{name}_scale_inv"], exact[name] = in_blocks(tensors[name], block_size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "fp8", "weight_block_size": [block_size, block_size], "activation_scheme": "dynamic",
              "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    set_method(folder, method)
    return folder, exact


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    return store(tmp_path / "model")


def set_method(folder: Path, method: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gpu", [False, True])
def test_products_are_those_of_values_times_scales(stored, dtype, gpu, monkeypatch):
    folder, exact = stored
    # transformers asks whether there is a GPU, and then keeps the weights in layers of its own that have no LoRA.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    model, _ = load_causal_lm(str(folder), dtype)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name, W in exact.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert type(module) is torch.nn.Linear
        assert torch.equal(module.weight, W.to(dtype))
        if W.shape[1] == 32:
            assert torch.equal(module(x), x @ W.to(dtype).t())


def test_a_lora_is_trained_on_it_as_on_the_matrices_themselves(stored, tmp_path):
    folder, exact = stored
    plain = make_tiny_llama(tmp_path / "plain")
    save_file(load_file(plain / "model.safetensors") | exact, plain / "model.safetensors", metadata={"format": "pt"})
    rows = write_instructions(tmp_path / "rows.jsonl", 24)
    weights = []
    for model in (folder, plain):
        out = tmp_path / f"run_{model.name}"
        arguments = ["--task", "causal_lm", "--dataset", str(rows), "--device", "cpu", "--max_steps", "3"]
        fp8 = ["--sparsity.mode", "dense", "--sparsity.frozen_precision", "fp8_emulated"]
        assert main(["train", "--model", str(model), *arguments, *fp8, "--out_dir", str(out)]) == 0
        weights.append((out / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_method_that_is_not_installed_is_refused_in_one_line(stored):
    folder, _ = stored
    set_method(folder, {"quant_method": "compressed-tensors", "format": "float-quantized"})
    with pytest.raises(InputError, match="could not be loaded as a causal language model") as error:
        load_causal_lm(str(folder))
    assert "\n" not in str(error.value)


def test_blocks_that_do_not_divide_a_weight_are_refused(tmp_path):
    """transformers 5.17 derives the size of a block from the number of scales: three blocks of 20 in 48 rows are 16."""
    folder, _ = store(tmp_path / "model", 20)
    with pytest.raises(InputError, match=r"in blocks of 20 × 20, and model.layers.0.self_attn.q_proj is 32 × 32"):
        load_causal_lm(str(folder))
