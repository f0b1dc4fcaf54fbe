"""The candidates: valid settings, reasons for those that are not possible, and what a profile closes."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.frontier.candidates import (
    FIXED_CONTROLS,
    Candidate,
    Circumstances,
    list_candidates,
    upper_layers,
    with_settings,
)
from sparselora.frontier.profile_levels import read_profile
from sparselora.models.architectures import SHAPES
from sparselora.models.target_modules import resolve_target_modules
from tests.helpers.tiny_llama import make_tiny_llama

CAUSAL = TrainConfig(model="m", dataset="d.jsonl", task="causal_lm", epochs=2.0)
LLAMA = dict(SHAPES["llama-7b"])
CPU = Circumstances(LLAMA, fp8_problem="fp8 products need an NVIDIA GPU")


def by_name(config: TrainConfig, circumstances: Circumstances) -> dict[str, Candidate]:
    return {candidate.name: candidate for candidate in list_candidates(config, circumstances)}


def test_every_candidate_is_a_valid_configuration_and_differs_from_the_others():
    candidates = by_name(CAUSAL, Circumstances(LLAMA))
    assert tuple(candidates)[:3] == FIXED_CONTROLS
    assert not any(candidate.reason for candidate in candidates.values())
    configs = {name: with_settings(CAUSAL, c.settings).to_yaml() for name, c in candidates.items()}
    assert len(set(configs.values())) == len(configs)
    for name, candidate in candidates.items():
        assert json.loads(json.dumps(dict(candidate.settings))) == candidate.settings
        changed = with_settings(CAUSAL, candidate.settings)
        changed.sparsity.check(32)
        assert candidate.is_control == (name in FIXED_CONTROLS or name == "random_99")
    assert with_settings(CAUSAL, candidates["half_data"].settings).epochs == 1.0
    assert with_settings(CAUSAL, candidates["static_90"].settings).sparsity.ratio(30) == 0.9
    assert with_settings(CAUSAL, candidates["static_90"].settings).sparsity.ratio(31) == 0.0
    both = with_settings(CAUSAL, candidates["fp8_none_static_50"].settings).sparsity
    assert (both.frozen_precision, both.context_backward, both.mode) == ("fp8", "none", "static")
    rank = with_settings(CAUSAL, candidates["rank_half"].settings)
    assert rank.lora_alpha / rank.lora_r == CAUSAL.lora_alpha / CAUSAL.lora_r


@pytest.mark.parametrize("use_rslora", [False, True])
def test_half_of_the_rank_has_the_scale_of_the_whole(use_rslora):
    config = CAUSAL.replace(use_rslora=use_rslora, lora_r=16, lora_alpha=32.0)
    (half,) = [c for c in list_candidates(config, Circumstances(LLAMA)) if c.name == "rank_half"]
    scales = []
    for settings in (config, with_settings(config, half.settings)):
        linear = torch.nn.Sequential(torch.nn.Linear(32, 32))
        lora = LoraConfig(
            r=settings.lora_r, lora_alpha=settings.lora_alpha, use_rslora=settings.use_rslora, target_modules=["0"]
        )
        scales.append(get_peft_model(linear, lora).base_model.model[0].scaling["default"])
    assert scales[0] == pytest.approx(scales[1], rel=1e-12)


def test_less_data_of_a_run_of_so_many_steps_is_fewer_steps():
    candidates = by_name(CAUSAL.replace(max_steps=30), CPU)
    assert candidates["data_75"].settings["max_steps"] == 22
    assert candidates["half_data"].settings["max_steps"] == 15


def test_of_layers_that_are_named_already_the_upper_half_has_lora():
    candidates = by_name(CAUSAL.replace(layers_to_transform=("3", "8-10", "20")), CPU)
    assert candidates["lora_upper_half"].settings["layers_to_transform"] == ["10", "20"]
    reasons = {name: c.reason for name, c in by_name(CAUSAL.replace(layers_to_transform=("4",)), CPU).items()}
    assert reasons["lora_upper_half"] == "the layers that LoRA is in are not known, or only one"
    assert not reasons["rank_half"]


def test_impossible_candidates_have_a_reason():
    reasons = {name: c.reason for name, c in by_name(CAUSAL, CPU).items() if c.reason}
    assert set(reasons) == {"fp8", "fp8_none", "fp8_none_static_50"}
    classifier = CAUSAL.replace(task="classification", lora_r=1)
    reasons = {name: c.reason for name, c in by_name(classifier, Circumstances(dict(SHAPES["bert-base"]))).items()}
    for name in ("none", "upper", "sampled_half", "none_static_50", "fp8_none"):
        assert "has no context" in reasons[name]
    assert reasons["rank_half"] == "rank 1 has no half"
    assert not reasons["static_50"]
    in_4bit = by_name(CAUSAL.replace(load_in_4bit=True), Circumstances(LLAMA))
    assert "4 bits" in in_4bit["fp8"].reason


def test_a_model_whose_steps_cannot_be_changed_has_dense_and_smaller_adapters_alone():
    candidates = by_name(CAUSAL, Circumstances(LLAMA, sparse_problem="no blocks"))
    possible = [name for name, c in candidates.items() if not c.reason]
    assert possible == [*FIXED_CONTROLS, "rank_half", "lora_upper_half"]
    assert candidates["dense"].settings == {}
    unknown = by_name(CAUSAL, Circumstances({"model_type": "strange"}, sparse_problem="no blocks"))
    assert "not known" in unknown["lora_upper_half"].reason


@pytest.mark.parametrize(
    ("entries", "exclude"),
    [
        (None, None), (["q_proj", "down_proj"], None), (["all-linear"], None), ([r".*\.mlp\.(up|gate)_proj"], None),
        (["all-linear"], ["o_proj"]),
    ],
)  # fmt: skip
def test_lora_in_the_upper_half_is_what_peft_adapts_there(tmp_path, entries, exclude):
    from transformers import AutoModelForCausalLM

    folder = make_tiny_llama(tmp_path / "llama", layers=13)
    circumstances = Circumstances(json.loads((folder / "config.json").read_text()))
    whole = CAUSAL.replace(target_modules=entries, exclude_modules=exclude, lora_r=2)
    upper = with_settings(whole, by_name(whole, circumstances)["lora_upper_half"].settings)

    def adapted(**options: object) -> set[str]:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, **options))
        return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if entries is None else entries
    targets = targets[0] if targets[0].startswith((".*", "all")) else targets  # for PEFT a text is a pattern
    everywhere = adapted(target_modules=targets, exclude_modules=exclude)
    expected = {name for name in everywhere if int(name.split(".layers.")[1].split(".")[0]) >= 7}
    names = resolve_target_modules(
        AutoModelForCausalLM.from_pretrained(folder), upper.target_modules, exclude=upper.exclude_modules,
        layers=upper.layers,
    )  # fmt: skip
    assert adapted(target_modules=names) == expected
    assert 0 < len(expected) < len(everywhere)


def test_upper_halves():
    assert upper_layers(None, 4) == ["2-3"]
    assert upper_layers(None, 3) == ["2"]
    assert upper_layers((0, 2, 4, 6), 8) == ["4", "6"]
    assert (upper_layers(None, 1), upper_layers(None, None)) == ([], [])


# --- a profile ----------------------------------------------------------------------------------------------------


def write_profile(folder: Path, sparsities: list[float], model: object = "m", **record: object) -> Path:
    """A folder as `profile` leaves it, of a model whose FFNs may be so sparse."""
    folder.mkdir()
    facts = {"command": "profile", "status": "success", "arguments": {"model": model}, "fingerprint": "0" * 12}
    (folder / "run.json").write_text(json.dumps(facts | record))
    rows = [{"layer": i, "part": "ffn", "sparsity": sparsity} for i, sparsity in enumerate(sparsities)]
    pd.DataFrame([*rows, {"layer": 0, "part": "attention", "sparsity": 0.5}]).to_csv(folder / "layers.csv", index=False)
    lines = [f"  layer.{i}.ffn: {sparsity}" for i, sparsity in enumerate(sparsities) if sparsity]
    (folder / "schedule.yaml").write_text("\n".join(["mode: static", "layer_sparsity:", *(lines or ["  {}"])]) + "\n")
    return folder


def test_a_profile_gives_its_schedule_and_closes_levels_that_most_layers_do_not_bear(tmp_path):
    levels = read_profile(write_profile(tmp_path / "p", [0.0, 0.5, 0.5, 0.9]), "m")
    assert levels.schedule == {"layer.1.ffn": 0.5, "layer.2.ffn": 0.5, "layer.3.ffn": 0.9}
    assert [levels.is_open(level) for level in (0.5, 0.9)] == [True, False]
    opened = {level: levels.is_open(level) for level in (0.5, 0.9, 0.99)}
    candidates = by_name(CAUSAL, Circumstances(LLAMA, schedule=levels.schedule, open_levels=opened))
    closed = {name for name, c in candidates.items() if "the profile" in c.reason}
    assert closed == {"static_90", "svd_99", "map"}
    assert with_settings(CAUSAL, candidates["svd_layers"].settings).sparsity.ratio(3) == 0.9
    assert candidates["random_layers"].is_control
    # The control: without a profile nothing is closed, and there is no schedule.
    assert "static_layers" not in by_name(CAUSAL, CPU)


def test_a_profile_that_leaves_every_layer_dense(tmp_path):
    levels = read_profile(write_profile(tmp_path / "p", [0.0, 0.0]), "m")
    candidates = by_name(CAUSAL, Circumstances(LLAMA, schedule=levels.schedule))
    assert candidates["static_layers"].reason == "the profile leaves every layer dense"


def test_folders_that_are_no_profile_of_this_model(tmp_path):
    with pytest.raises(InputError, match="not the folder of a finished run of profile"):
        read_profile(tmp_path, "m")
    for i, record in enumerate(({"status": "failed"}, {"command": "train"})):
        with pytest.raises(InputError, match="not the folder of a finished run of profile"):
            read_profile(write_profile(tmp_path / str(i), [0.5], **record), "m")
    with pytest.raises(InputError, match="of another model"):
        read_profile(write_profile(tmp_path / "other", [0.5], model="n"), "m")
