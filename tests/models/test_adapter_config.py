"""Configurations of adapters: damaged ones are one line, patterns cannot hang, other methods are refused by name."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from sparselora.__main__ import main
from sparselora.errors import InputError
from sparselora.evaluation.losses import with_adapter
from sparselora.models.adapter_config import read_config, read_peft_config
from sparselora.models.adapter_files import open_adapter
from tests.helpers.adapters import read_factors
from tests.helpers.byte_llama import byte_llama, byte_tokenizer, save_adapter

MODULE = "model.layers.0.self_attn.q_proj"


def store(folder: Path, module: str = MODULE, **config: Any) -> Path:
    """An adapter of one module of rank 4."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [module.split(".")[-1]], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)
    key = f"base_model.model.{module}"
    state = {f"{key}.lora_A.weight": torch.randn(4, 32, generator=generator)}
    state[f"{key}.lora_B.weight"] = torch.randn(32, 4, generator=generator)
    save_file(state, folder / "adapter_model.safetensors")
    return folder


# --- values -------------------------------------------------------------------------------------------------------

DAMAGED = [
    *(("r", value, "r must be a positive integer") for value in (None, "4", "abc", [4], 4.0, 4.5, True, 0, -4, {})),
    *(
        ("lora_alpha", value, "lora_alpha must be a finite number")
        for value in (None, "8", [8], True, math.nan, math.inf, -math.inf, 1e31, 10**400, {})
    ),
    *(
        ("rank_pattern", value, "rank_pattern must be an object of positive integers")
        for value in ([["q_proj", 4]], "q_proj", 4, {"q_proj": "4"}, {"q_proj": None}, {"q_proj": 0}, {"q_proj": 4.5})
    ),
    *(
        ("alpha_pattern", value, "alpha_pattern must be an object of finite numbers")
        for value in ([["q_proj", 4]], "x", True, {"q_proj": "8"}, {"q_proj": math.nan}, {"q_proj": [8]})
    ),
    *(
        (field, {key: 4}, f"{field} holds .*, which is no regular expression")
        for field in ("rank_pattern", "alpha_pattern")
        for key in ("*.q_proj", "(", "[a", "q_proj)", "(?P<1>q)", "a{99999999999}")
    ),
    *(("target_modules", value, "target_modules must be") for value in (4, True, {"q_proj": 1}, ["q_proj", None], [4])),
    ("target_modules", "(q_proj", "target_modules holds .*, which is no regular expression"),
    *(("modules_to_save", value, "modules_to_save must be") for value in ("head", 1, [None])),
    ("modules_to_save", ["("], "modules_to_save holds .*, which is no regular expression"),
    ("use_rslora", "yes", "use_rslora must be true or false"),
    ("use_rslora", 1, "use_rslora must be true or false"),
    ("lora_dropout", "0.1", "lora_dropout must be"),
    ("alora_invocation_tokens", "text", "alora_invocation_tokens must be"),
    ("alora_invocation_tokens", [-1], "alora_invocation_tokens must be"),
    ("alora_invocation_tokens", [True], "alora_invocation_tokens must be"),
    ("bias", "some", "bias must be"),
    ("init_lora_weights", 3, "init_lora_weights must be"),
    ("layers_to_transform", ["0"], "layers_to_transform must be"),
    ("peft_type", ["LORA"], "peft_type must be a text"),
]


@pytest.mark.parametrize(("field", "value", "message"), DAMAGED)
def test_damaged_fields_are_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    folder = store(tmp_path / "a", **{field: value})
    for read in (read_factors, open_adapter, read_peft_config, lambda path: with_adapter(torch.nn.Module(), str(path))):
        with pytest.raises(InputError, match=rf"adapter a, adapter_config.json: {message}"):
            read(folder)


@pytest.mark.parametrize("command", ["rank", "reduce", "edit", "eval", "sensitivity"])
def test_every_command_ends_with_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder, out = str(store(tmp_path / "a", r=None)), tmp_path / "out"
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "a", "answer": "b"}\n' * 5)
    flags = {
        "rank": ["--adapter", folder],
        "reduce": ["--adapter", folder, "--rank", "2"],
        "edit": ["--adapter", folder, "--model", "m", "--dataset", str(data)],
        "eval": ["--adapter", folder, "--model", "m", "--dataset", str(data)],
        "sensitivity": ["--adapter", folder, "--model", "m", "--dataset", str(data), "--task", "causal_lm",
                        "--sparsity.mode", "oracle"],
    }[command]  # fmt: skip
    assert main([command, *flags, "--out_dir", str(out)]) == 2
    error = capsys.readouterr().err
    assert "adapter_config.json: r must be a positive integer, got null" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_fields_as_peft_writes_them_are_read(tmp_path: Path) -> None:
    peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], lora_dropout=0.1).save_pretrained(tmp_path / "c")
    assert read_config(tmp_path / "c")["r"] == 4
    nothing = {"rank_pattern": None, "alpha_pattern": None, "modules_to_save": None, "fan_in_fan_out": None}
    [factor] = read_factors(store(tmp_path / "a", lora_alpha=-2.5, init_lora_weights=None, **nothing))[1]
    assert factor.scaling == -2.5 / 4
    [factor] = read_factors(store(tmp_path / "b", alpha_pattern={r"layers\.\d+\.(self_attn|mlp)\.q_proj": 2}))[1]
    assert factor.scaling == 0.5
    [factor] = read_factors(store(tmp_path / "d", alpha_pattern={"0.self_attn.q_proj": 2, "q_proj": 1}))[1]
    assert factor.scaling == 0.5


# --- patterns -----------------------------------------------------------------------------------------------------

LONG = "model." + "a" * 40


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"(a+)+b": 4}},
        {"alpha_pattern": {"(a|a)*b": 4}},
        {"rank_pattern": {"a*" * 12 + "b": 4}},
        {"modules_to_save": ["(a+)+b"]},
    ],
)
def test_patterns_that_would_never_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    monkeypatch.setattr("sparselora.models.adapter_config._SLOWEST_S", 1.0)
    folder = store(tmp_path / "a", LONG, **config)
    for read in (read_factors, open_adapter):
        began = time.monotonic()
        with pytest.raises(InputError, match=r"its patterns .* take more than 1 s"):
            read(folder)
        assert time.monotonic() - began < 20


def test_a_target_that_would_never_end_is_refused_on_the_models_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparselora.models.adapter_config._SLOWEST_S", 1.0)
    model = torch.nn.ModuleDict({"a" * 40: torch.nn.Linear(32, 32)})
    with pytest.raises(InputError, match="take more than 1 s"):
        with_adapter(model, str(store(tmp_path / "a", target_modules="(a+)+b")))
    # The same expression on names that it takes no time with.
    assert read_factors(store(tmp_path / "b", rank_pattern={"(a+)+b": 9}))[1]


def test_patterns_choose_as_peft_does(tmp_path: Path) -> None:
    patterns: dict[str, Any] = {
        "rank_pattern": {r"layers\.\d+\.self_attn\.(q|v)_proj": 3, "^model.layers.1": 5, "down.proj": 2},
        "alpha_pattern": {r".*[01]\.mlp\..*": 7, "1.self_attn.q_proj": 4},
    }
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **patterns)
    model = peft.get_peft_model(byte_llama(), config)
    model.save_pretrained(str(tmp_path / "a"))
    factors = read_factors(tmp_path / "a")[1]
    assert len(factors) == 4
    for factor in factors:
        layer = model.base_model.model.get_submodule(factor.module)
        assert factor.scaling == layer.scaling["default"]
        assert len(factor.A) == layer.r["default"]


# --- other methods ------------------------------------------------------------------------------------------------

METHODS = {
    "ADALORA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, task_type="CAUSAL_LM"),
    "LOHA": peft.LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "LOKR": peft.LoKrConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "VERA": peft.VeraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM"),
    "IA3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "OFT": peft.OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4, task_type="CAUSAL_LM"),
    "BOFT": peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4, task_type="CAUSAL_LM"),
    "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_other_methods_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    folder = tmp_path / "a"
    peft.get_peft_model(byte_llama().float(), METHODS[method]).save_pretrained(str(folder))
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "a", "answer": "b"}\n' * 5)
    commands = [
        ["rank", "--adapter", str(folder)],
        ["edit", "--model", "m", "--dataset", str(data), "--adapter", str(folder)],
    ]
    if method != "ADALORA":  # which reduce reads, as a plain LoRA (test_adalora.py)
        commands.append(["reduce", "--rank", "1", "--adapter", str(folder)])
    for flags in commands:
        assert main([*flags, "--out_dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"of type '{method}'; only LORA is read" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with_adapter(byte_llama().float(), str(folder))  # eval loads any method that PEFT has


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_a_changed_base_is_refused_wherever_factors_are_read(tmp_path: Path, start: str) -> None:
    folder = store(tmp_path / "a", init_lora_weights=start)
    for read in (read_config, read_factors, open_adapter):
        with pytest.raises(InputError, match=f"initialised by {start}, which changes the base weights"):
            read(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "newest"}, "initialised by 'newest'.*not known"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "copies layers"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
    ],
)
def test_what_is_not_known_to_leave_the_base_alone_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_config(store(tmp_path / "a", **config))


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_keep_the_base_are_read(tmp_path: Path, start: Any) -> None:
    """The control: with factors of zero, the loaded model is the base bit for bit."""
    folder = store(tmp_path / "a", init_lora_weights=start)
    assert read_factors(folder)[1]
    key = f"base_model.model.{MODULE}"
    zeros = {f"{key}.lora_A.weight": torch.zeros(4, 32), f"{key}.lora_B.weight": torch.zeros(32, 4)}
    save_file(zeros, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": r".*layers\.0.*q_proj"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ids = byte_tokenizer()("abc", return_tensors="pt")["input_ids"]
    base = byte_llama().float()
    expected = base(input_ids=ids).logits
    torch.testing.assert_close(with_adapter(base, str(folder))(input_ids=ids).logits, expected, rtol=0, atol=0)


def test_factors_that_two_modules_have_are_refused(tmp_path: Path) -> None:
    folder = store(tmp_path / "a", ensure_weight_tying=True)
    assert read_factors(folder)[1]  # nothing is tied to a linear module
    key = "base_model.model.emb"
    state = {f"{key}.lora_embedding_A": torch.ones(4, 9), f"{key}.lora_embedding_B": torch.ones(8, 4)}
    save_file(state, folder / "adapter_model.safetensors")
    for read in (read_factors, open_adapter):
        with pytest.raises(InputError, match="factors of emb to the modules tied to it"):
            read(folder)


def test_a_rank_of_any_size_is_refused_before_peft_makes_its_factors(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"r": 10**9}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="says rank 1000000000"):
        with_adapter(byte_llama(), str(folder))
