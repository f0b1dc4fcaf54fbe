from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sparselora.errors import InputError
from tests.helpers.adapters import read_factors

MODULES = {"encoder.layer.0.query": (6, 8, 3), "encoder.layer.10.query": (5, 8, 2)}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    state = {}
    for module, (d_out, d_in, r) in MODULES.items():
        state[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((r, d_in)).astype(np.float32)
        state[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((d_out, r)).astype(np.float32)
    state["base_model.model.classifier.weight"] = np.zeros((2, 6), np.float32)
    return state


def write(folder: Path, state: dict[str, np.ndarray] | None = None, **config: object) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "rank_pattern": {"layer.10.query": 2}, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors() if state is None else state, str(folder / "adapter_model.safetensors"))
    return folder


def test_factors_and_plain_scaling(tmp_path):
    _, factors = read_factors(write(tmp_path / "a"))
    state = tensors()
    assert {factor.module for factor in factors} == set(MODULES)
    for factor in factors:
        key = f"base_model.model.{factor.module}"
        np.testing.assert_array_equal(factor.A, state[f"{key}.lora_A.weight"])
        np.testing.assert_array_equal(factor.B, state[f"{key}.lora_B.weight"])
        assert factor.shape == MODULES[factor.module][:2]
        assert factor.scaling == 6 / MODULES[factor.module][2]


def test_rslora_and_alpha_pattern(tmp_path):
    found = {f.module: f.scaling for f in read_factors(write(tmp_path / "a", use_rslora=True))[1]}
    assert found["encoder.layer.10.query"] == pytest.approx(6 / np.sqrt(2))
    found = {f.module: f.scaling for f in read_factors(write(tmp_path / "b", alpha_pattern={"0.query": 9}))[1]}
    # `0.query` is a dotted end of layer.0.query alone, as in PEFT: 10.query does not end in ".0.query".
    assert found == {"encoder.layer.0.query": 3.0, "encoder.layer.10.query": 3.0}
    found = {f.module: f.scaling for f in read_factors(write(tmp_path / "c", alpha_pattern={"10.query": 9}))[1]}
    assert found == {"encoder.layer.0.query": 2.0, "encoder.layer.10.query": 4.5}


def test_scaling_agrees_with_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    for rslora in (False, True):
        wrapped = get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 5)),
            LoraConfig(
                r=4, lora_alpha=10, target_modules=["0", "1"], rank_pattern={"1": 2}, alpha_pattern={"0": 3},
                use_rslora=rslora, init_lora_weights=False,
            ),
        )  # fmt: skip
        folder = tmp_path / f"peft{rslora}"
        wrapped.save_pretrained(str(folder))
        factors = read_factors(folder)[1]
        assert len(factors) == 2
        for factor in factors:
            delta = wrapped.base_model.model[int(factor.module)].get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(factor.scaling * factor.B @ factor.A, delta, atol=1e-6)


def test_pickled_weights_are_read_without_running_code(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({key: torch.tensor(value) for key, value in tensors().items()}, folder / "adapter_model.bin")
    assert len(read_factors(folder)[1]) == 2
    (folder / "adapter_model.bin").write_bytes((folder / "adapter_model.bin").read_bytes()[:300])
    with pytest.raises(InputError, match="truncated"):
        read_factors(folder)

    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"x": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match="more than tensors"):
        read_factors(folder)


def test_embedding_adapters_are_read(tmp_path):
    state = {
        "base_model.model.emb.lora_embedding_A": np.ones((3, 20), np.float32),
        "base_model.model.emb.lora_embedding_B": np.ones((8, 3), np.float32),
    }
    [factor] = read_factors(write(tmp_path / "a", state))[1]
    assert (factor.module, factor.shape) == ("emb", (8, 20))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"enable_lora": [True, False]}, "enable_lora"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"peft_type": "IA3"}, "of type 'IA3'"),
        ({"r": 4}, "says rank 4"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        read_factors(write(tmp_path / "a", **config))


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_factors(tmp_path / "none")
    folder = write(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    good = weights.read_bytes()

    weights.write_bytes(good[:-20])
    with pytest.raises(InputError, match="truncated or corrupt"):
        read_factors(folder)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(InputError, match="Git-LFS pointer"):
        read_factors(folder)
    weights.unlink()
    with pytest.raises(InputError, match="has no weights"):
        read_factors(folder)
    weights.write_bytes(good)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_factors(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        read_factors(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("base_model.model.encoder.layer.0.query.lora_B.weight"), "has no lora_B"),
        (lambda s: s["base_model.model.encoder.layer.0.query.lora_A.weight"].fill(np.nan), "NaN"),
        (
            lambda s: s.update(
                {f"base_model.model.c.lora_{x}.weight": np.ones((3, 3, 1, 1), np.float32) for x in "AB"}
            ),
            "not 2-D",
        ),
        (lambda s: [s.pop(key) for key in list(s) if "lora" in key], "no lora_A"),
    ],
)
def test_broken_weights_are_refused(tmp_path, change, message):
    state = tensors()
    change(state)
    with pytest.raises(InputError, match=message):
        read_factors(write(tmp_path / "a", state))


REFUSED = {
    "bloom560m_qkv_merged_legacy": "enable_lora",
    "broken_lfs_pointer": "has no adapter_config.json",
    "configs_only": "has no adapter_config.json",
}


def test_every_real_adapter_is_read_or_refused_with_a_reason(shared, tmp_path):
    folders = sorted(path for path in (shared / "data" / "adapters").iterdir() if path.is_dir())
    assert len(folders) >= 10
    for folder in folders:
        if folder.name in REFUSED:
            with pytest.raises(InputError, match=REFUSED[folder.name]):
                read_factors(folder)
            continue
        config, factors = read_factors(folder)
        assert factors, folder.name
        assert all(factor.A.shape[0] == config["r"] for factor in factors)
        assert any(np.abs(factor.B).max() > 0 for factor in factors), f"{folder.name} is untrained"
    for path in (shared / "data" / "adapters" / "configs_only").glob("*dora*"):
        folder = tmp_path / path.stem
        folder.mkdir()
        shutil.copy(path, folder / "adapter_config.json")
        with pytest.raises(InputError, match="DoRA"):
            read_factors(folder)
    pointer = tmp_path / "pointer"
    shutil.copytree(shared / "data" / "adapters" / "broken_lfs_pointer", pointer)
    shutil.copy(shared / "data" / "adapters" / "bert_r8_qv" / "adapter_config.json", pointer)
    with pytest.raises(InputError, match="Git-LFS pointer"):
        read_factors(pointer)
