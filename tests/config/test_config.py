from __future__ import annotations

import argparse
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sparselora.config.fields import options
from sparselora.config.flags import add_config_flags, resolve_config
from sparselora.config.novelty import GateConfig
from sparselora.config.sparsity import MODES, SparsityConfig, get_layer_sparsity_ratio
from sparselora.config.token_gates import TokenGateConfig
from sparselora.config.train import NESTED, TrainConfig
from sparselora.config.yaml_text import parse_yaml, to_yaml_text
from sparselora.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.name != "accelerate_config.yaml")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error(build, *arguments, **keywords) -> str:
    with pytest.raises(InputError) as caught:
        build(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- layers -------------------------------------------------------------------------------------------------------


def test_a_layer_is_named_alone_or_in_a_range_and_the_defaults_fill_the_rest():
    config = SparsityConfig(
        ffn_sparsity=0.5,
        attention_sparsity=0.25,
        layer_sparsity={"layer.3": 0.1, "layer.2-5": 0.9, "layer.4-6.attention": 0.75, "layer.5.attention": 0},
    )
    assert [config.ratio(i) for i in range(8)] == [0.5, 0.5, 0.9, 0.1, 0.9, 0.9, 0.5, 0.5]
    assert [config.ratio(i, "attention") for i in range(8)] == [0.25, 0.25, 0.25, 0.25, 0.75, 0.0, 0.75, 0.25]
    assert [get_layer_sparsity_ratio(config, i) for i in range(8)] == [config.ratio(i, "ffn") for i in range(8)]
    # The order in which they are written does not matter.
    turned = config.replace(layer_sparsity=dict(reversed(config.layer_sparsity.items())))
    assert [turned.ratio(i) for i in range(8)] == [config.ratio(i) for i in range(8)]


def test_without_a_part_the_key_means_the_ffn():
    short, long = (SparsityConfig(layer_sparsity={key: 0.5}) for key in ("layer.1-3", "layer.1-3.ffn"))
    for part in ("ffn", "attention"):
        assert [short.ratio(i, part) for i in range(5)] == [long.ratio(i, part) for i in range(5)]
    assert short.ratio(2, "attention") == 0


def test_mode_dense_reads_every_sparsity_as_zero():
    settings = {"ffn_sparsity": 0.5, "layer_sparsity": {"layer.0": 0.9, "layer.0.attention": 0.5}}
    assert SparsityConfig(mode="dense", **settings).ratio(0) == 0
    assert SparsityConfig(mode="dense", **settings).ratio(0, "attention") == 0
    assert SparsityConfig(mode="svd", **settings).ratio(0) == 0.9


@pytest.mark.parametrize(
    "keys",
    [("layer.1-3", "layer.3-4"), ("layer.2.ffn", "layer.2"), ("layer.1-3.attention", "layer.2-2.attention")],
)
def test_equal_claims_to_a_layer_are_refused(keys):
    text = error(SparsityConfig, layer_sparsity=dict.fromkeys(keys, 0.5))
    assert all(repr(key) in text for key in keys)


def test_parts_of_one_layer_do_not_clash():
    SparsityConfig(layer_sparsity={"layer.1-3.ffn": 0.5, "layer.1-3.attention": 0.5, "layer.2": 0.1})


@pytest.mark.parametrize("key", ["layer", "layer.x", "layer.-1", "layers.1", "layer.1.mlp", "layer.1-", "layer.1 ", 3])
def test_a_key_that_names_no_layer_is_refused_with_an_example(key):
    assert "layer.3-30" in error(SparsityConfig, layer_sparsity={key: 0.5})


def test_a_range_runs_forward():
    assert "layer.2-4" in error(SparsityConfig, layer_sparsity={"layer.4-2": 0.5})


def test_check_names_the_layer_that_is_not_there():
    config = SparsityConfig(layer_sparsity={"layer.0": 0.1, "layer.3-6": 0.5})
    config.check(7)
    text = error(config.check, 6)
    assert "layer.3-6" in text
    assert "6 layers, 0 to 5" in text


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ffn_sparsity", "attention_sparsity"])
@pytest.mark.parametrize("value", [1, 1.0])
def test_sparsity_one_is_refused_and_points_to_mode_skip(name, value):
    assert "mode: skip" in error(SparsityConfig, **{name: value})
    assert "mode: skip" in error(SparsityConfig, layer_sparsity={"layer.0": value})


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"mode": "svdd"}, ["mode", "'svdd'", "'svd'", "surrogate"]),
        ({"svd_rank": 0}, ["svd_rank", "1 or more", "got 0"]),
        ({"svd_rank": 8.0}, ["svd_rank", "whole number", "8.0"]),
        ({"svd_rank": True}, ["svd_rank", "whole number", "got true"]),
        ({"svd_rank": None}, ["svd_rank", "got null"]),
        ({"ffn_sparsity": "0.5"}, ["ffn_sparsity", "[0, 1)", "'0.5'"]),
        ({"ffn_sparsity": -0.1}, ["ffn_sparsity", "-0.1"]),
        ({"ffn_sparsity": float("nan")}, ["ffn_sparsity", "nan"]),
        ({"attention_sparsity": True}, ["attention_sparsity", "got true"]),
        ({"layer_sparsity": {"layer.3": 1.5}}, ["layer_sparsity of layer.3", "1.5"]),
        ({"layer_sparsity": [0.5]}, ["layer_sparsity", "[0.5]"]),
        ({"compensate": "median"}, ["compensate", "'mean'"]),
        ({"sparse_eval": "no"}, ["sparse_eval", "true or false", "'no'"]),
        ({"sparse_warmup_ratio": 1.5}, ["sparse_warmup_ratio", "[0, 1]", "1.5"]),
        ({"sparse_warmup_ratio": 0.1, "sparse_warmup_steps": 5}, ["sparse_warmup_ratio and sparse_warmup_steps"]),
        ({"sparse_end_ratio": 0.9, "sparse_end_step": 5}, ["sparse_end_ratio and sparse_end_step"]),
        ({"sparse_warmup_ratio": 0.5, "sparse_end_ratio": 0.5}, ["no step would be sparse"]),
        ({"sparse_warmup_steps": 9, "sparse_end_step": 9}, ["no step would be sparse"]),
        ({"mode": "skip", "attention_sparsity": 0.1}, ["mode skip", "attention_sparsity"]),
        ({"mode": "skip", "layer_sparsity": {"layer.1-2.attention": 0.1}}, ["mode skip"]),
    ],
)
def test_bad_sparsity_is_one_line_that_names_it(settings, parts):
    text = error(SparsityConfig, **settings)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"task": "causal"}, ["task", "causal_lm"]),
        ({"lr": 0}, ["lr", "above 0", "got 0"]),
        ({"lora_dropout": 1}, ["lora_dropout", "[0, 1)"]),
        ({"epochs": 0}, ["epochs"]),
        ({"text_fields": []}, ["text_fields", "list of texts"]),
        ({"text_fields": [1]}, ["text_fields"]),
        ({"packing": True}, ["packing", "causal_lm"]),
        ({"packing": True, "task": "causal_lm", "novelty": {"enable": True}}, ["packing and an enabled novelty gate"]),
        ({"packing": True, "task": "causal_lm", "group_by_length": True}, ["packing and group_by_length"]),
        ({"streaming": True}, ["streaming and task classification"]),
        ({"streaming": True, "task": "causal_lm", "dedupe": 0.9}, ["streaming and dedupe"]),
        ({"streaming": True, "task": "causal_lm", "dataset": "a.jsonl"}, ["streaming needs eval_file"]),
        ({"template": "Q:"}, ["template", "{prompt}"]),
        ({"sparsity": "svd"}, ["sparsity", "'svd'"]),
        ({"sparsity": {"svd_rank": 0}}, ["svd_rank"]),
    ],
)
def test_bad_training_settings_are_one_line_that_names_them(settings, parts):
    text = error(TrainConfig, **settings)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(("build", "word"), [(SparsityConfig, "svd_rnk"), (TrainConfig, "lora_rr")])
def test_an_unknown_key_names_the_nearest_known_one(build, word):
    text = error(build.from_dict, {word: 1})
    assert repr(word) in text
    assert repr(word[:-1] if word == "lora_rr" else "svd_rank") in text


# --- schedule -----------------------------------------------------------------------------------------------------


def test_the_schedule_is_dense_then_sparse_then_dense():
    config = SparsityConfig(sparse_warmup_ratio=0.2, sparse_end_ratio=0.9)
    assert [config.active(step, 10) for step in range(10)] == [False] * 2 + [True] * 7 + [False]
    steps = SparsityConfig(sparse_warmup_steps=2, sparse_end_step=9)
    assert [steps.active(step, 10) for step in range(10)] == [config.active(step, 10) for step in range(10)]
    assert not any(SparsityConfig(sparse_warmup_ratio=1.0).active(step, 7) for step in range(7))


@given(st.floats(0, 1), st.integers(1, 500))
def test_a_share_of_the_steps_rounds_up_to_whole_dense_steps(ratio, total):
    dense = sum(not SparsityConfig(sparse_warmup_ratio=ratio).active(step, total) for step in range(total))
    assert ratio * total - 1e-8 <= dense < ratio * total + 1 + 1e-8


def test_shares_do_not_overshoot():
    # 0.28 · 25 is 7.000000000000001 in floating point.
    assert SparsityConfig(sparse_warmup_ratio=0.28).first_sparse_step(25) == 7


@pytest.mark.parametrize("mode", MODES)
def test_what_needs_calibration(mode):
    assert SparsityConfig(mode=mode).needs_calibration == (mode in {"static", "surrogate"})
    assert SparsityConfig(mode=mode, compensate="mean").needs_calibration == (mode != "dense")


# --- in and out ---------------------------------------------------------------------------------------------------


@st.composite
def sparsity(draw) -> SparsityConfig:
    layers = draw(st.dictionaries(st.integers(0, 40), st.floats(0, 0.999), max_size=5))
    return SparsityConfig(
        mode=draw(st.sampled_from([m for m in MODES if m != "skip"])),
        ffn_sparsity=draw(st.floats(0, 0.999)),
        layer_sparsity={f"layer.{i}{draw(st.sampled_from(['', '.attention']))}": v for i, v in layers.items()},
        sparse_end_step=draw(st.none() | st.integers(1, 9)),
        sparse_eval=draw(st.booleans()),
    )


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)


@given(
    st.builds(
        TrainConfig,
        model=st.none() | texts | st.sampled_from(["1e3", "null", "yes", "2024-01-01", "=", "0x1f", "~"]),
        text_fields=st.none() | st.lists(texts, min_size=1, max_size=3).map(tuple),
        lr=st.floats(1e-12, 1.0),
        weight_decay=st.floats(0, 1),
        sparsity=st.none() | sparsity(),
    )
    | st.builds(
        TrainConfig,
        token_gate=st.builds(
            TokenGateConfig,
            budget=st.floats(0, 1, exclude_min=True),
            select=st.sampled_from(["topk", "threshold"]),
            anneal_ratio=st.floats(0, 1),
        ),
        novelty=st.none() | st.builds(GateConfig, enable=st.just(False)),
    )
)
def test_yaml_in_is_yaml_out(config):
    again = TrainConfig.from_dict(parse_yaml(config.to_yaml()))
    assert again == config.replace(sparsity=config.seeded_sparsity)
    assert again.to_yaml() == config.to_yaml()


def test_channels_and_calibration_are_drawn_by_the_seed_of_the_run():
    config = TrainConfig(sparsity=SparsityConfig(ffn_sparsity=0.5))
    assert config.seeded_sparsity.seed == config.to_dict()["sparsity"]["seed"] == 0
    other = config.merge({"seed": 3})  # a flag that wins over the file moves it too
    assert other.seeded_sparsity.drawing_seed == other.to_dict()["sparsity"]["seed"] == 3
    fixed = other.merge({"sparsity": {"seed": 0}})
    assert fixed.seeded_sparsity.drawing_seed == 0
    assert TrainConfig().seeded_sparsity is None
    assert SparsityConfig().drawing_seed == 0


def test_a_saved_file_has_the_bytes_of_earlier_runs():
    """As PyYAML wrote them: line breaks, quotes and numbers of files that stand beside results do not change."""
    values = {
        "template": "Q: {prompt}\n\nA: it's\n", "text_fields": ["yes", "1e3", "a b"], "lr": 1e-5, "rate": 1e22,
        "on": True, "none": None, "share": 0.25, "time": "1:20", "y": "y", "empty": {}, "layers": {"layer.1-3": 0.5},
        "long": "word " * 24 + "end",
    }  # fmt: skip
    assert to_yaml_text(values) == (
        "template: 'Q: {prompt}\n\n\n  A: it''s\n\n  '\n"
        "text_fields:\n- 'yes'\n- '1e3'\n- a b\n"
        "lr: 1.0e-05\nrate: 1.0e+22\n'on': true\nnone: null\nshare: 0.25\ntime: '1:20'\ny: y\nempty: {}\n"
        "layers:\n  layer.1-3: 0.5\n"
        "long: " + "word " * 23 + "word\n  end\n"
    )
    assert parse_yaml(to_yaml_text(values)) == values


anything = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=200)


@given(st.dictionaries(anything, anything | st.lists(anything) | st.floats(allow_nan=False, allow_infinity=False)))
def test_every_text_that_is_written_is_read_as_it_was(values):
    assert parse_yaml(to_yaml_text(values)) == values


def test_a_default_is_what_a_file_would_give():
    """Pydantic takes defaults as they stand: one of another type, or out of range, would be found only here."""
    for cls in (SparsityConfig, GateConfig, TokenGateConfig, TrainConfig):
        given_again = cls.from_dict(cls().to_dict())
        for name in cls.model_fields:
            default, read = getattr(cls(), name), getattr(given_again, name)
            assert (default, type(default)) == (read, type(read)), name
    # The control: a whole number in place of a number becomes one when it is given.
    assert type(TrainConfig(lora_alpha=8).lora_alpha) is float


@pytest.mark.parametrize("value", [2**63, -(2**63), 10**400])
@pytest.mark.parametrize(
    ("cls", "name"),
    [(SparsityConfig, "svd_rank"), (TrainConfig, "lr"), (TrainConfig, "max_steps"), (GateConfig, "burn_in")],
)
def test_a_number_that_no_register_holds_is_refused(cls, name, value):
    assert f"{name} must be a" in error(cls, **{name: value})
    assert f"{name} must be a" in error(cls.from_dict, {name: float("inf")})


def test_an_error_in_a_section_is_that_of_the_section_alone():
    for section, cls in NESTED.items():
        for values in ({"no_such": 1}, {"seed": -1, "budget": -1, "m": -1}, {"policy": 3, "mode": 3}):
            values = {name: value for name, value in values.items() if name in cls.model_fields or name == "no_such"}
            assert error(TrainConfig.from_dict, {section: values}) == error(cls.from_dict, values)
        assert f"{section} must be a mapping of settings to values or null, got [1]" == error(
            TrainConfig, **{section: [1]}
        )


def test_the_first_of_several_errors_is_shown_and_an_unknown_name_before_it():
    assert error(TrainConfig, lr=-1, epochs=-1).startswith("epochs must be a number above 0, got -1")
    assert error(TrainConfig, lr=-1, epoch=1).startswith(
        "unknown key 'epoch' in the training settings; did you mean 'ep"
    )


def test_the_saved_file_gives_the_same_configuration(tmp_path):
    config = TrainConfig(model="no", dataset="1e3", lr=1e-5, template="null: {prompt}", sparsity=SparsityConfig())
    path = write(tmp_path, config.to_yaml())
    assert TrainConfig.from_yaml(path) == config.replace(sparsity=config.seeded_sparsity)
    assert SparsityConfig.from_yaml(path) == config.seeded_sparsity
    assert SparsityConfig.from_yaml(write(tmp_path, config.sparsity.to_yaml())) == config.sparsity


def test_a_number_may_be_written_without_a_point(tmp_path):
    assert TrainConfig.from_yaml(write(tmp_path, "lr: 1e-4\nepochs: 2\nweight_decay: 1E-2")).lr == 1e-4
    # The control: in quotes it is a text, and no number.
    assert "lr must be a number above 0, got '1e-4'" in error(TrainConfig.from_dict, parse_yaml("lr: '1e-4'"))


def test_yes_and_no_are_texts():
    assert parse_yaml("a: yes\nb: No\nc: [on, off]\nd: true") == {"a": "yes", "b": "No", "c": ["on", "off"], "d": True}
    assert TrainConfig.from_dict(parse_yaml("label_field: yes")).label_field == "yes"
    assert "packing must be true or false, got 'yes'" in error(TrainConfig.from_dict, parse_yaml("packing: yes"))


def test_a_plain_peft_configuration_is_a_dense_one_to_the_engine(tmp_path):
    assert SparsityConfig.from_yaml(write(tmp_path, "sparsity: null")).mode == "dense"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lr: 1\nlr: 2", ["'lr'", "twice", "line 2"]),
        ("sparsity:\n  svd_rank: 1\n  svd_rank: 1", ["'svd_rank'", "twice", "line 3"]),
        ("sparsity:\n  svd_rnk: 1", ["svd_rnk", "'svd_rank'"]),
        ("- lr", ["mapping"]),
        ("lr: [", ["YAML"]),
        ("1: 2", ["key", "1"]),
        ("lr: !!python/object/apply:os.getcwd []", ["YAML"]),
        ("a: 2024-13-45", ["YAML"]),
        ("lr: .nan", ["lr", "nan"]),
        ("sparsity:\n  compensate: null", ["compensate", "none, mean"]),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, text, parts):
    path = write(tmp_path, text)
    message = error(TrainConfig.from_yaml, path)
    assert str(path) in message
    for part in parts:
        assert part in message


def test_a_missing_or_binary_file_is_an_input_error(tmp_path):
    assert "nowhere.yaml" in error(TrainConfig.from_yaml, tmp_path / "nowhere.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "b.yaml" in error(SparsityConfig.from_yaml, tmp_path / "b.yaml")
    assert "cannot be read" in error(SparsityConfig.from_yaml, tmp_path)


def test_an_empty_file_is_all_defaults(tmp_path):
    assert TrainConfig.from_yaml(write(tmp_path, "# nothing\n")) == TrainConfig()
    assert SparsityConfig.from_yaml(write(tmp_path, "")) == SparsityConfig()


# --- overrides ----------------------------------------------------------------------------------------------------


def test_flags_win_and_those_not_given_do_not():
    base = TrainConfig(model="a", lr=1e-3, sparsity=SparsityConfig(mode="svd", svd_rank=4))
    merged = base.merge({"lr": 1e-4, "model": None, "sparsity": {"mode": "random", "svd_rank": None}})
    assert (merged.lr, merged.model) == (1e-4, "a")
    assert merged.sparsity == SparsityConfig(mode="random", svd_rank=4)
    assert base.sparsity.mode == "svd"
    assert base.merge({"sparsity": "none"}).sparsity is None
    assert base.merge({"sparsity": SparsityConfig()}).sparsity == SparsityConfig()
    assert TrainConfig().merge({"sparsity": {"mode": "skip"}}).sparsity == SparsityConfig(mode="skip")
    assert base.merge({}) == base


def test_overrides_are_as_strict():
    assert "'lora_r'" in error(TrainConfig().merge, {"lora_rr": 1})
    assert "got 0" in error(TrainConfig().merge, {"lora_r": 0})
    assert "'svd_rank'" in error(TrainConfig().merge, {"sparsity": {"svd_rnk": 1}})


def test_a_section_changes_in_place_and_ends_by_a_word():
    base = TrainConfig(token_gate=TokenGateConfig(policy="random", budget=0.25))
    assert base.merge({"token_gate": {"budget": 0.75, "policy": None}}).token_gate == TokenGateConfig(
        policy="random", budget=0.75
    )
    assert base.merge({"token_gate": "none"}).token_gate is None
    assert base.merge({"token_gate": TokenGateConfig()}).token_gate == TokenGateConfig()
    assert TrainConfig().merge({"token_gate": {"budget": 0.25}}).token_gate == TokenGateConfig(budget=0.25)
    assert "'budget'" in error(base.merge, {"token_gate": {"budgett": 1}})
    assert "token_gate must be a mapping" in error(TrainConfig, token_gate=0.5)


def test_token_gates_stand_alone():
    gate = {"token_gate": {"budget": 0.5}}
    assert "token_gate and sparsity" in error(TrainConfig.from_dict, gate | {"sparsity": {"mode": "dense"}})
    assert "token_gate and an enabled novelty gate" in error(TrainConfig.from_dict, gate | {"novelty": {}})
    assert (
        TrainConfig.from_dict(gate | {"novelty": {"enable": False}, "sparsity": None}).token_gate == TokenGateConfig()
    )


def resolved(*flags: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    return resolve_config(parser.parse_args(flags))


def test_flags_switch_one_section_off_and_another_on(tmp_path):
    gated = str(write(tmp_path, "token_gate: {budget: 0.25, policy: energy}"))
    assert resolved(gated, "--token_gate.budget", "0.5").token_gate == TokenGateConfig(policy="energy", budget=0.5)
    assert resolved(gated, "--token_gate", "none", "--token_gate.budget", "0.5").token_gate is None
    assert resolved("--token_gate.select", "threshold").token_gate == TokenGateConfig(select="threshold")
    sparse = resolved(gated, "--token_gate", "none", "--sparsity.mode", "skip")
    assert (sparse.token_gate, sparse.sparsity) == (None, SparsityConfig(mode="skip"))
    assert "token_gate and sparsity" in error(resolved, gated, "--sparsity.mode", "skip")


def test_flags_of_the_sparsity_start_from_the_file_that_is_named(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("sparsity: {mode: random, sparse_warmup_steps: 3}")
    section = str(write(tmp_path, "mode: svd\nsvd_rank: 4\nsparse_warmup_ratio: 0.5"))
    expected = SparsityConfig(mode="svd", svd_rank=2, sparse_warmup_ratio=0.5)
    assert resolved(str(config), "--sparsity", section, "--sparsity.svd_rank", "2").sparsity == expected
    assert resolved(str(config), "--sparsity", "none").sparsity is None
    assert resolved(str(config), "--sparsity", "none", "--sparsity.svd_rank", "2").sparsity == SparsityConfig(
        svd_rank=2
    )


# --- the files that ship ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_whole(path):
    config = TrainConfig.from_yaml(path)
    again = TrainConfig.from_dict(parse_yaml(config.to_yaml()))
    assert again == config.replace(sparsity=config.seeded_sparsity)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert max(map(len, text.splitlines())) <= 120


def test_the_distilbert_trio_holds_its_numbers():
    expected = {
        "_conservative": (8, 0.5, [0, 0.2, 0.3, 0.5, 0.6, 0.7], 0.1, 0.383),
        "": (4, 0.75, [0.4, 0.5, 0.6, 0.8, 0.9, 0.95], 0.2, 0.692),
        "_fallback": (4, 0.65, [0.3, 0.4, 0.5, 0.7, 0.8, 0.9], 0.2, 0.6),
    }
    dense = TrainConfig.from_yaml(ROOT / "configs" / "sst2_dense.yaml")
    assert dense.sparsity is None
    for name, (rank, ffn, layers, warmup, mean) in expected.items():
        config = TrainConfig.from_yaml(ROOT / "configs" / f"sst2_sparse_lora_svd{name}.yaml")
        assert config.replace(sparsity=None) == dense  # the same run but for the sparsity
        assert config.sparsity is not None
        assert (config.sparsity.svd_rank, config.sparsity.ffn_sparsity) == (rank, ffn)
        assert [config.sparsity.ratio(i) for i in range(6)] == layers
        assert config.sparsity.sparse_warmup_ratio == warmup
        assert round(sum(layers) / 6, 3) == mean


def test_the_published_llama_settings():
    math, common = (TrainConfig.from_yaml(ROOT / "configs" / f"llama3_8b_{n}.yaml") for n in ("math", "commonsense"))
    chosen = {*range(14, 20), *range(21, 24), *range(25, 30)}
    assert math.sparsity is not None
    assert common.sparsity is not None
    math.sparsity.check(32)
    for layer in range(32):
        assert math.sparsity.ratio(layer) == (0.99 if 3 <= layer <= 30 else 0)
        assert math.sparsity.ratio(layer, "attention") == (0.75 if layer in chosen else 0)
        assert common.sparsity.ratio(layer) == (0.97 if 17 <= layer <= 30 else 0)
        assert common.sparsity.ratio(layer, "attention") == (0.2 if layer in chosen - {14, 15, 16} else 0)
    assert (math.lora_r, math.lora_alpha, math.sparsity.sparse_warmup_ratio) == (32, 64, 0.05)


# --- the object ---------------------------------------------------------------------------------------------------


def test_a_configuration_is_frozen_copied_and_pickled():
    layers = {"layer.1": 0.5}
    config = SparsityConfig(layer_sparsity=layers)
    layers["layer.1"] = 0.9
    assert config.ratio(1) == 0.5
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace()):
        assert again == config
        assert again.ratio(1) == 0.5
    with pytest.raises(ValidationError, match="frozen"):
        config.mode = "dense"


def test_every_plain_field_has_its_line_of_help():
    for cls, nested in ((SparsityConfig, {"layer_sparsity"}), (GateConfig, set()), (TrainConfig, set(NESTED))):
        assert set(cls.model_fields) - nested == set(options(cls))
        assert all(option.help for option in options(cls).values())


def test_settings_need_no_torch():
    code = "import sys, sparselora.config.train; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
