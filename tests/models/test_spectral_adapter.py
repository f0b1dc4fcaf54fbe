from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparselora.__main__ import main
from sparselora.errors import InputError
from sparselora.models.adapter_files import open_adapter, refuse_overlap, write_adapter
from sparselora.models.adapter_layers import layer_index, select_modules
from sparselora.spectral.factors import adapter_svd, refactor
from sparselora.spectral.modes import EditOptions, edit_spectrum
from tests.helpers.adapters import read_factors
from tests.helpers.contextual_models import ENCODERS, tiny

PREFIX = "base_model.model."
MODULES = {"encoder.layer.2.query": (6, 8, 3), "encoder.layer.10.query": (5, 8, 2)}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {"base_model.model.classifier.weight": torch.arange(12.0).view(2, 6)}
    for module, (d_out, d_in, r) in MODULES.items():
        state[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(r, d_in, generator=generator).to(dtype)
        state[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(d_out, r, generator=generator).to(dtype)
    state["base_model.model.norm.num_batches_tracked"] = torch.tensor(7)
    return state


def store(folder: Path, state: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "rank_pattern": {"layer.10.query": 2}, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors() if state is None else state, str(folder / "adapter_model.safetensors"))
    return folder


def delta(adapter: Any, module: str) -> np.ndarray:
    A, B, scaling = adapter.factors(module)
    return scaling * B.double().numpy() @ A.double().numpy()


def double_first(adapter: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """New factors with the first singular value of every module doubled."""
    new = {}
    for module in adapter.modules:
        A, B, scaling = adapter.factors(module)
        svd = adapter_svd(A, B, scaling)
        sigma = svd.sigma.clone()
        sigma[0] *= 2
        new[module] = refactor(svd, sigma, A, B, scaling)
    return new


# --- reading and writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_edited_comes_out_byte_for_byte(tmp_path, dtype):
    source = store(tmp_path / "a", tensors(dtype))
    adapter = open_adapter(source)
    assert adapter.name == "a"
    assert list(adapter.modules) == list(MODULES)
    assert adapter.carried == {
        "base_model.model.classifier.weight": "trained in full",
        "base_model.model.norm.num_batches_tracked": "trained in full",
    }
    for factor in read_factors(source)[1]:
        assert adapter.modules[factor.module].scaling == factor.scaling
    write_adapter(tmp_path / "same", adapter, {})
    before, after = (
        load_file(source / "adapter_model.safetensors"),
        load_file(tmp_path / "same/adapter_model.safetensors"),
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert value.view(torch.uint8).equal(after[key].view(torch.uint8)) if value.dim() else value == after[key]
    assert json.loads((tmp_path / "same/adapter_config.json").read_text()) == adapter.config

    first = next(iter(MODULES))
    write_adapter(tmp_path / "new", adapter, {first: double_first(adapter)[first]}, {"task_type": "SEQ_CLS"})
    after = load_file(tmp_path / "new/adapter_model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{PREFIX}{first}.lora_B.weight"}, "all of the change is in B, which alone is rounded then"
    assert all(before[key].dtype == after[key].dtype for key in before)
    assert open_adapter(tmp_path / "new").config["task_type"] == "SEQ_CLS"
    assert not list(tmp_path.glob("*/.*")), "nothing half-written is left"


def test_pickles_come_out_as_safetensors(tmp_path):
    source = store(tmp_path / "a")
    state = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    both = state[f"{PREFIX}encoder.layer.2.query.lora_A.weight"]
    # Tensors that share memory, as pickles may have them.
    torch.save(
        {**state, "base_model.model.tied.weight": both.T, "base_model.model.same": both}, source / "adapter_model.bin"
    )
    adapter = open_adapter(source)
    write_adapter(tmp_path / "b", adapter, {})
    written = load_file(tmp_path / "b/adapter_model.safetensors")
    assert torch.equal(written["base_model.model.tied.weight"], both.T)
    assert all(torch.equal(written[key], state[key]) for key in state)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def broken(folder: Path, how: str) -> None:
    weights = folder / "adapter_model.safetensors"
    whole, state = weights.read_bytes(), load_file(weights)
    name = f"{PREFIX}encoder.layer.2.query"
    if how == "truncated":
        weights.write_bytes(whole[:-9])
    elif how == "header":
        weights.write_bytes(whole[:30])
    elif how == "garbage":
        weights.write_bytes(b"\xff" * 400)
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "pointer":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    elif how == "missing":
        weights.unlink()
    elif how in {"code", "cut pickle", "plain pickle", "no tensors"}:
        weights.unlink()
        pickled = folder / "adapter_model.bin"
        torch.save(
            {**state, "x": Evil()} if how == "code" else {**state, "epoch": 3} if how == "no tensors" else state,
            pickled,
        )
        if how == "cut pickle":
            pickled.write_bytes(pickled.read_bytes()[:300])
        if how == "plain pickle":
            pickled.write_bytes(pickle.dumps(Evil()))
    else:
        state = {
            "no B": {key: value for key, value in state.items() if key != f"{name}.lora_B.weight"},
            "rank": {**state, f"{name}.lora_A.weight": torch.ones(4, 8)},
            "other B": {**state, f"{name}.lora_B.weight": torch.ones(6, 2)},
            "1-D": {**state, f"{name}.lora_A.weight": torch.ones(3), f"{name}.lora_B.weight": torch.ones(3)},
            "nan": {**state, f"{name}.lora_A.weight": torch.full((3, 8), float("nan"))},
            "integers": {**state, f"{name}.lora_A.weight": torch.ones(3, 8, dtype=torch.int64)},
            "huge": {**state, f"{name}.lora_A.weight": torch.full((3, 8), 1e200, dtype=torch.float64)},
            "bytes": {**state, f"{name}.lora_A.weight": torch.ones(3, 8).to(torch.float8_e4m3fn)},
            "twice": {**state, "encoder.layer.2.query.lora_A.weight": torch.ones(3, 8)},
            "dora": {**state, f"{name}.lora_magnitude_vector": torch.ones(6)},
            "none": {"base_model.model.classifier.weight": torch.ones(2, 6)},
        }[how]
        save_file(state, str(weights))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "truncated or corrupt"), ("header", "truncated or corrupt"), ("garbage", "truncated or corrupt"),
        ("empty", "truncated or corrupt"), ("pointer", "Git-LFS pointer"), ("missing", "has no weights"),
        ("code", "more than tensors"), ("cut pickle", "truncated"), ("plain pickle", "more than tensors"),
        ("no tensors", "holds 'epoch', which is no tensor"), ("no B", "has no lora_B"), ("rank", "says rank 3"),
        ("other B", "says rank 3"), ("1-D", "not 2-D"), ("nan", "NaN"), ("integers", "floating-point"),
        ("huge", "above 1e+50"), ("bytes", "float8"), ("twice", "twice"), ("dora", "DoRA"), ("none", "holds no lora_A"),
    ],
)  # fmt: skip
def test_damaged_files_end_with_one_line(tmp_path, capfd, how, message):
    folder = store(tmp_path / "a")
    open_adapter(folder)  # the control: it is whole
    broken(folder, how)
    assert main(["reduce", "--adapter", str(folder), "--rank", "1", "--out_dir", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert "ran" not in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [{"use_dora": True}, {"peft_type": "LOHA"}, {"enable_lora": [True]}])
def test_other_methods_are_refused(tmp_path, config):
    with pytest.raises(InputError, match=r"DoRA|LOHA|enable_lora"):
        open_adapter(store(tmp_path / "a", **config))


# --- what PEFT makes of it ----------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """An embedding, a convolution, linear layers, and a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.layers = nn.ModuleList([nn.Linear(32, 12), nn.Linear(12, 10)])
        self.head = nn.Linear(10, 3)
        self.config = {"model_type": "mixed"}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.emb(ids)[:, None]).transpose(1, 2).flatten(2)
        return self.head(self.layers[1](torch.tanh(self.layers[0](x))))


def mixed(folder: Path, **options: object) -> tuple[Any, torch.Tensor]:
    """A saved adapter on `Mixed` with random factors; its inputs."""
    torch.manual_seed(0)
    settings: dict[str, object] = {"r": 4, "lora_alpha": 6, "target_modules": ["layers.0", "layers.1"], **options}
    model = get_peft_model(Mixed(), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(str(folder))
    return model, torch.randint(0, 20, (3, 5))


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # the base weights of `mixed`
    with torch.no_grad():
        return PeftModel.from_pretrained(Mixed(), str(folder)).eval()(ids)


MIXED = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"layers.1": 2}, "alpha_pattern": {"layers.0": 9}},
    {"target_modules": ["layers.0", "layers.1", "emb", "conv"], "modules_to_save": ["head"]},
    {"target_modules": ["layers.0", "layers.1", "emb"], "use_rslora": True, "rank_pattern": {"emb": 2}},
    {"lora_bias": True},
    {"bias": "lora_only"},
    {"r": 16, "lora_alpha": 4},
]  # r 16 is above min(d_in, d_out) of the second layer


@pytest.mark.parametrize("options", MIXED)
def test_plain_peft_computes_what_was_edited(tmp_path, options):
    model, ids = mixed(tmp_path / "a", **options)
    with torch.no_grad():
        before = model.eval()(ids)
    torch.testing.assert_close(logits(tmp_path / "a", ids), before)
    adapter = open_adapter(tmp_path / "a")
    assert len(adapter.modules) == 2

    trips, edits = {}, {}
    for module in adapter.modules:
        A, B, scaling = adapter.factors(module)
        svd = adapter_svd(A, B, scaling)
        trips[module] = refactor(svd, svd.sigma, A, B, scaling, round_trip=True)
        ones = np.ones(svd.rank)
        result = edit_spectrum("gd", svd.sigma, ones, ones, ones, EditOptions(eta=1.0))
        edits[module] = refactor(svd, torch.from_numpy(result.sigma), A, B, scaling)
    write_adapter(tmp_path / "trip", adapter, trips)
    torch.testing.assert_close(logits(tmp_path / "trip", ids), before, rtol=1e-6, atol=1e-6)

    # All sigma times 1/e: what PEFT gives with both layers' ΔW scaled so.
    write_adapter(tmp_path / "edit", adapter, edits)
    with torch.no_grad():
        for layer in model.base_model.model.layers:
            layer.scaling["default"] *= np.exp(-1)
            if options.get("lora_bias"):
                layer.lora_B["default"].bias /= np.exp(-1)
        expected = model(ids)
    torch.testing.assert_close(logits(tmp_path / "edit", ids), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3, "the control: the edit is seen in the logits"


def test_other_kinds_are_carried_and_listed(tmp_path):
    mixed(tmp_path / "a", target_modules=["layers.0", "emb", "conv"], modules_to_save=["head"], lora_bias=False)
    adapter = open_adapter(tmp_path / "a")
    assert list(adapter.modules) == ["layers.0"]
    assert set(adapter.fixed) == {"emb", "conv"}
    assert sorted(set(adapter.carried.values())) == ["LoRA of a convolution", "LoRA of an embedding", "trained in full"]
    assert len(adapter.carried) == 6
    mixed(tmp_path / "b", lora_bias=True)
    assert set(open_adapter(tmp_path / "b").carried.values()) == {"LoRA bias"}
    mixed(tmp_path / "c", target_modules=["emb"])
    with pytest.raises(InputError, match="embeddings and convolutions only"):
        select_modules(open_adapter(tmp_path / "c"))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_a_language_model_gives_the_same_logits(tmp_path, name):
    model = tiny(name).eval()
    model.save_pretrained(str(tmp_path / "a"))
    adapter = open_adapter(tmp_path / "a")
    new = {}
    for module in adapter.modules:
        A, B, scaling = adapter.factors(module)
        svd = adapter_svd(A, B, scaling)
        new[module] = refactor(svd, svd.sigma, A, B, scaling, round_trip=True)
    write_adapter(tmp_path / "b", adapter, new)
    ids = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        base = model.unload()
        alone = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "b"), autocast_adapter_dtype=False).eval()
        found = loaded(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert name in ENCODERS or (alone - expected).abs().max() > 1e-3


# --- choosing and places ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "index"),
    [
        ("model.layers.3.mlp.down_proj", 3),
        ("bert.encoder.layer.11.attention.self.query", 11),
        ("transformer.h.7.attn.c_attn", 7),
        ("encoder.block.2.layer.0.SelfAttention.q", 2),
        ("model.decoder.layers.4.self_attn.q_proj", 4),
        ("model.layers.5.block_sparse_moe.experts.2.w1", 5),
        ("gpt_neox.layers.6.attention.query_key_value", 6),
        ("segformer.encoder.block.1.0.attention.self.query", 1),
        ("0.auto_model.encoder.layer.9.output.dense", 9),
        ("vision_model.resblocks.8.mlp", 8),
        ("transformer.blocks.10.ffn.down_proj", 10),
        ("4.linear", 4),
        ("classifier", None),
        ("fc2", None),
    ],
)
def test_layer_numbers_of_any_architecture(module, index):
    assert layer_index(module) == index


def test_modules_are_chosen_by_ending_and_layer(tmp_path):
    state = {}
    for module in (
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
        "head",
    ):
        state[f"{PREFIX}{module}.lora_A.weight"] = torch.ones(3, 4)
        state[f"{PREFIX}{module}.lora_B.weight"] = torch.ones(5, 3)
    adapter = open_adapter(store(tmp_path / "a", state))
    down = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert sorted(select_modules(adapter)) == sorted([*down, "head", "model.layers.1.mlp.up_proj"])
    assert select_modules(adapter, ["down_proj", "o_proj"]) == down
    assert select_modules(adapter, ["mlp.down_proj"], 1) == down[1:]
    assert select_modules(adapter, None, 0, 0) == down[:1]
    with pytest.raises(InputError, match=r"own_proj matches nothing.*; there are: head, mlp.down_proj, mlp.up_proj"):
        select_modules(adapter, ["own_proj"])
    with pytest.raises(InputError, match="in layers 2 to inf; there are layers 0, 1"):
        select_modules(adapter, ["down_proj"], 2)
    with pytest.raises(InputError, match="in no numbered layer"):
        select_modules(adapter, ["head"], 0)
    with pytest.raises(InputError, match="must not be above"):
        select_modules(adapter, None, 3, 2)


def test_the_adapter_itself_is_never_written_over(tmp_path):
    (tmp_path / "runs").mkdir()
    source = store(tmp_path / "runs" / "a")
    (tmp_path / "link").symlink_to(source)
    places = {source: "equal to", tmp_path / "link": "equal to", source / "new": "inside", tmp_path: "above",
              tmp_path / "runs": "above", source / ".." / "a": "equal to"}  # fmt: skip
    for place, word in places.items():
        with pytest.raises(InputError, match=word):
            refuse_overlap(place, source)
    refuse_overlap(tmp_path / "runs" / "b", source)
    refuse_overlap(tmp_path / "runs" / "a2", source)


# --- reduce -------------------------------------------------------------------------------------------------------


def reduce(source: Path, out: Path, *flags: str) -> int:
    return main(["reduce", "--adapter", str(source), "--out_dir", str(out), *flags])


@pytest.mark.parametrize("options", MIXED)
def test_reducing_by_no_rank_keeps_the_function_and_folds_the_scale(tmp_path, options):
    _, ids = mixed(tmp_path / "a", **options)
    assert reduce(tmp_path / "a", tmp_path / "b", "--energy", "1") == 0
    torch.testing.assert_close(logits(tmp_path / "b", ids), logits(tmp_path / "a", ids), rtol=2e-6, atol=2e-6)
    old, new = open_adapter(tmp_path / "a"), open_adapter(tmp_path / "b")
    assert all(entry.scaling == 1 for entry in new.modules.values())
    assert not new.config["use_rslora"]
    for name, entry in old.fixed.items():
        assert new.fixed[name].scaling == pytest.approx(entry.scaling)
        assert torch.equal(old.tensors[entry.key_A], new.tensors[entry.key_A])


@pytest.mark.parametrize("flags", [("--rank", "2"), ("--energy", "0.8")])
def test_reduced_adapters_are_the_best_of_their_rank(tmp_path, capsys, flags):
    options = {"target_modules": ["layers.0", "layers.1", "emb"], "modules_to_save": ["head"], "r": 6}
    _, ids = mixed(tmp_path / "a", **options)
    assert reduce(tmp_path / "a", tmp_path / "b", *flags) == 0
    printed = capsys.readouterr().out
    old, new = open_adapter(tmp_path / "a"), open_adapter(tmp_path / "b")
    table = pd.read_csv(tmp_path / "b/reduce.csv").set_index("module")
    for module in old.modules:
        W, low = delta(old, module), delta(new, module)
        s = np.linalg.svd(W, compute_uv=False)
        k = int(table.loc[module, "rank"])
        error = np.linalg.norm(W - low)
        assert np.linalg.matrix_rank(low) == k
        assert new.factors(module)[2] == 1
        assert error == pytest.approx(np.linalg.norm(s[k:]), rel=1e-5)
        kept = (s[:k] ** 2).sum() / (s**2).sum()
        assert table.loc[module, "retained_energy"] == pytest.approx(kept, abs=1e-12)
        assert table.loc[module, "relative_error"] == pytest.approx(error / np.linalg.norm(W), rel=1e-5)
        assert f"6 → {k}" in printed
        if "--energy" in flags:
            assert kept >= 0.8 > (s[: k - 1] ** 2).sum() / (s**2).sum()
    assert "4 tensors" in printed or "2 tensors (trained in full)" in printed
    # PEFT loads it, and it is the reduced function, not the old one.
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Mixed(), str(tmp_path / "b"))
    for module in old.modules:
        found = model.base_model.model.get_submodule(module).get_delta_weight("default").detach().double().numpy()
        np.testing.assert_allclose(found, delta(new, module), atol=1e-6)
    assert (logits(tmp_path / "b", ids) - logits(tmp_path / "a", ids)).abs().max() > 1e-3
    record = json.loads((tmp_path / "b/run.json").read_text())
    assert record["status"] == "success"
    assert record["carried"] == old.carried
    assert set(record["outputs"]) == {"adapter_config.json", "adapter_model.safetensors", "reduce.csv"}
    assert str(tmp_path) not in (tmp_path / "b/run.json").read_text()


def test_ranks_above_what_there_is_and_zero_updates(tmp_path):
    state = tensors()
    state[f"{PREFIX}encoder.layer.10.query.lora_B.weight"].zero_()
    source = store(tmp_path / "a", state)
    assert reduce(source, tmp_path / "b", "--rank", "99") == 0
    assert list(pd.read_csv(tmp_path / "b/reduce.csv")["rank"]) == [3, 2]
    assert reduce(source, tmp_path / "c", "--energy", "0.9") == 0
    adapter = open_adapter(tmp_path / "c")
    A, B, _ = adapter.factors("encoder.layer.10.query")
    assert A[0].any()
    assert not A[1:].any()
    assert not B.any()
    table = pd.read_csv(tmp_path / "c/reduce.csv")
    assert table["rank"].iloc[1] == 1
    assert table["retained_energy"].iloc[1] == 1


def test_a_name_that_ends_in_another_keeps_its_own_rank(tmp_path):
    state = {
        f"{PREFIX}a.q.lora_embedding_A": torch.ones(3, 7),
        f"{PREFIX}a.q.lora_embedding_B": torch.ones(5, 3),
    }
    for module in ("q", "b.a.q"):
        state |= {
            f"{PREFIX}{module}.lora_A.weight": torch.ones(3, 4),
            f"{PREFIX}{module}.lora_B.weight": torch.ones(5, 3),
        }
    source = store(tmp_path / "x", state, rank_pattern={}, alpha_pattern={"^a.q": 12})
    assert reduce(source, tmp_path / "y", "--rank", "1") == 0
    adapter = open_adapter(tmp_path / "y")  # it refuses ranks that the configuration does not say
    assert {module: len(adapter.factors(module)[0]) for module in adapter.modules} == {"q": 1, "b.a.q": 1}
    assert adapter.fixed["a.q"].scaling == 4
    assert all(entry.scaling == 1 for entry in adapter.modules.values())


def delta_by(folder: Path, rule: str) -> dict[str, np.ndarray]:
    """Module → ΔW of the linear modules in ``folder``, by the arithmetic of a loader, from its files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    state = {key: value.double().numpy() for key, value in load_file(folder / "adapter_model.safetensors").items()}
    found = {}
    for key, A in state.items():
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if module + ".lora_A.weight" != key.removeprefix(PREFIX):
            continue
        alpha, r = config["lora_alpha"], config["r"]
        if rule == "peft":
            scale = config.get("alpha_pattern", {}).get(module, alpha) / config.get("rank_pattern", {}).get(module, r)
        else:
            scale = alpha / (r if rule == "vllm" else len(A))
        found[module] = scale * state[f"{PREFIX}{module}.lora_B.weight"] @ A
    return found


@pytest.mark.parametrize("rule", ["peft", "vllm", "llama.cpp"])
def test_every_loader_finds_the_same_update_where_ranks_differ(tmp_path, rule):
    """PEFT divides each module's alpha by its rank, vLLM the global alpha by the global rank, llama.cpp the global
    alpha by each module's rank."""
    generator = torch.Generator().manual_seed(3)
    state, needed = {}, {"layers.0.q": 1, "layers.0.v": 4, "layers.1.q": 2}
    for module, rank in needed.items():
        A, B = torch.randn(8, 12, generator=generator), torch.randn(10, 8, generator=generator)
        B[:, rank:] = 0
        state |= {f"{PREFIX}{module}.lora_A.weight": A, f"{PREFIX}{module}.lora_B.weight": B}
    source = store(tmp_path / "a", state, r=8, lora_alpha=24, rank_pattern={})
    expected = delta_by(source, "peft")
    assert reduce(source, tmp_path / "b", "--energy", "0.999999999") == 0
    found = delta_by(tmp_path / "b", rule)
    for module, W in expected.items():
        np.testing.assert_allclose(found[module], W, atol=1e-5 * np.abs(W).max())
    table = pd.read_csv(tmp_path / "b/reduce.csv").set_index("module")
    assert table["rank"].to_dict() == needed
    assert table["params_after"].to_dict() == {module: 22 * rank for module, rank in needed.items()}
    with safe_open(tmp_path / "b/adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ranks"]) == needed
        assert {file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key} == {4}  # noqa: SIM118


def test_reduce_at_the_terminal(tmp_path, capsys):
    source = store(tmp_path / "a")
    assert reduce(source, tmp_path / "b", "--rank", "1", "--dry_run") == 0
    assert "3 → 1" in capsys.readouterr().out
    assert not (tmp_path / "b").exists()
    assert reduce(source, tmp_path / "b", "--rank", "1") == 0
    assert "trained in full" in capsys.readouterr().out
    assert reduce(source, tmp_path / "b", "--rank", "1") == 0
    assert "already finished" in capsys.readouterr().out
    assert reduce(source, tmp_path / "b", "--rank", "2") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert reduce(source, tmp_path / "b", "--rank", "2", "--overwrite") == 0
    assert len(open_adapter(tmp_path / "b").factors("encoder.layer.2.query")[0]) == 2
    for flags, message in [
        (("--rank", "0"), "--rank must be at least 1"),
        (("--energy", "1.5"), "--energy must be in"),
        (("--rank", "1", "--overwrite", "--out_dir", str(source)), "equal to"),
        (("--rank", "1", "--adapter", str(tmp_path / "none")), "does not exist"),
    ]:
        assert reduce(source, tmp_path / "c", *flags) == 2
        assert message in capsys.readouterr().err
    assert reduce(store(tmp_path / "p", init_lora_weights="pissa_niter_4"), tmp_path / "c", "--rank", "1") == 2
    assert "initialised by pissa_niter_4" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("alpha", "fits"), [(6, True), (1e-3, True), (1e4, True), (1e29, False), (1e-30, False)])
def test_values_that_leave_the_stored_type_are_refused(tmp_path, capsys, dtype, alpha, fits):
    """In bfloat16 and float32 the range is that of float32: they hold what float16 does not."""
    source = store(tmp_path / "a", tensors(dtype), lora_alpha=alpha)
    status = reduce(source, tmp_path / "b", "--rank", "1")
    if not fits and dtype == torch.float16:
        assert status == 2
        error = capsys.readouterr().err
        assert re.search(r"query: an update of norm .* does not fit in factors of torch.float16", error)
        assert error.count("\n") == 1
        assert not (tmp_path / "b").exists()
        return
    assert status == 0
    old, new = open_adapter(source), open_adapter(tmp_path / "b")
    for module, row in pd.read_csv(tmp_path / "b/reduce.csv").set_index("module").iterrows():
        W = delta(old, module)
        s = np.linalg.svd(W / np.abs(W).max(), compute_uv=False)
        assert row["fro_norm"] == pytest.approx(np.linalg.norm(W / np.abs(W).max()) * np.abs(W).max(), rel=1e-9)
        assert row["retained_energy"] == pytest.approx(s[0] ** 2 / (s**2).sum(), rel=1e-6)
        error = np.linalg.norm((W - delta(new, module)) / np.abs(W).max())
        assert error == pytest.approx(np.linalg.norm(s[1:]), rel=0.05)


def test_an_edit_whose_factors_leave_their_type_is_refused(tmp_path):
    state = {key: value / value.abs().max() for key, value in tensors().items() if "10" in key}
    state = {key: (value * (6e4 if "lora_B" in key else 1)).half() for key, value in state.items()}
    adapter = open_adapter(store(tmp_path / "a", state))
    A, B, scaling = adapter.factors("encoder.layer.10.query")
    svd = adapter_svd(A, B, scaling)
    assert refactor(svd, svd.sigma * 0.9, A, B, scaling)[1].isfinite().all()
    with pytest.raises(InputError, match=r"does not fit in factors of torch.float16"):
        refactor(svd, svd.sigma * 1e6, A, B, scaling)


# --- real adapters ------------------------------------------------------------------------------------------------

REFUSED = {
    "bloom560m_qkv_merged_legacy": "enable_lora",
    "broken_lfs_pointer": "has no adapter_config.json",
    "configs_only": "has no adapter_config.json",
}


def test_every_real_adapter_is_edited_and_reduced_or_refused_with_a_reason(shared, tmp_path, capsys):
    folders = sorted(path for path in (shared / "data" / "adapters").iterdir() if path.is_dir())
    assert len(folders) >= 10
    for folder in folders:
        out = tmp_path / folder.name
        status = reduce(folder, out, "--rank", "4")
        if folder.name in REFUSED:
            assert status == 2
            assert REFUSED[folder.name] in capsys.readouterr().err
            continue
        assert status == 0
        adapter, small = open_adapter(folder), open_adapter(out)
        assert {len(small.factors(module)[0]) for module in small.modules} == {4}
        assert small.carried == adapter.carried
        assert all(torch.equal(small.tensors[key], adapter.tensors[key]) for key in adapter.carried)
        new = {}
        for module in adapter.modules:
            A, B, scaling = adapter.factors(module)
            svd = adapter_svd(A, B, scaling)
            W = delta(adapter, module)
            trip_A, trip_B = refactor(svd, svd.sigma, A, B, scaling, round_trip=True)
            trip = scaling * trip_B.double().numpy() @ trip_A.double().numpy()
            bound = 3e-3 if A.dtype == torch.bfloat16 else 1e-6
            assert np.linalg.norm(trip - W) <= bound * np.linalg.norm(W), module
            g = np.arange(1.0, svd.rank + 1)
            result = edit_spectrum("abs_select", svd.sigma, g, g, g**2, EditOptions())
            new[module] = refactor(svd, torch.from_numpy(result.sigma), A, B, scaling)
            assert result.count("core") >= 1
        write_adapter(tmp_path / f"{folder.name}_edited", adapter, new)
        edited = open_adapter(tmp_path / f"{folder.name}_edited")
        assert edited.config == adapter.config
        assert edited.tensors.keys() == adapter.tensors.keys()
        assert all(edited.tensors[key].dtype == value.dtype for key, value in adapter.tensors.items())
    pointer = tmp_path / "pointer"
    shutil.copytree(shared / "data" / "adapters" / "broken_lfs_pointer", pointer)
    shutil.copy(shared / "data" / "adapters" / "bert_r8_qv" / "adapter_config.json", pointer)
    with pytest.raises(InputError, match="Git-LFS pointer"):
        open_adapter(pointer)


def test_an_adapter_that_is_gated_per_token_is_refused(tmp_path: Path) -> None:
    source = store(tmp_path / "gated")
    (source / "token_gate.json").write_text("{}")
    with pytest.raises(InputError, match=r"gated per token.*adapter_static"):
        open_adapter(source)
