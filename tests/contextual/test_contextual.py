"""A sparse pass equals the masked model that defines it, for every architecture, in float64, with all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual import decoder as decoder_module
from sparselora.contextual import plan as plan_module
from sparselora.contextual import step as step_module
from sparselora.contextual.frozen import FusedLinear
from sparselora.contextual.handle import sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.lora_update import Adapter, Lora
from sparselora.contextual.modes import MODES
from sparselora.contextual.operand import Operand
from sparselora.contextual.row_linear import split_linear
from sparselora.contextual.structure import find_blocks
from sparselora.contextual.surrogate import AffineStatistics, fit_affine
from sparselora.errors import InputError
from sparselora.kernels.rows import Rows
from tests.helpers.contextual_models import (
    DECODERS,
    ENCODERS,
    PACKED,
    SIZES,
    exact_loss,
    masked,
    ragged,
    tiny,
    training_loss,
)

ALL = [*DECODERS, *ENCODERS]
SPARSE = {"layer_sparsity": {"layer.0": 0.6, "layer.2": 0.75, "layer.1-2.attention": 0.5}, "svd_rank": 4}


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found)}


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, model: torch.nn.Module, atol: float = 1e-10) -> None:
    a, b = gradients(ours, model), gradients(theirs, model)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=atol)
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float(g.abs().max()) for g in b.values()) > 1e-4


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", ALL)
def test_dense_pass_equals_peft(name, left):
    model, batch = tiny(name), ragged(name, left)
    handle = sparsify(model, SparsityConfig(mode="dense"))
    assert handle.packed == (name in PACKED)
    ours = training_loss(name, model, batch)
    handle.remove()
    assert_same(ours, exact_loss(model, batch), model)


ALL_PARTS, FFNS = SPARSE, {"layer_sparsity": {"layer.0": 0.6, "layer.1": 0.75}, "svd_rank": 4}
EVERYWHERE, SOME = ALL, ["llama", "gemma", "gpt2", "bert", "distilbert"]

MASKED_REFERENCES: dict[str, list[tuple[dict[str, Any], dict[str, Any], list[str]]]] = {
    "dense": [],  # it is plain PEFT, above
    "svd": [({}, ALL_PARTS, EVERYWHERE), ({"compensate": "mean"}, FFNS, SOME)],
    "oracle": [({}, ALL_PARTS, EVERYWHERE)],
    "oracle_activation": [({}, ALL_PARTS, EVERYWHERE)],
    "random": [({}, ALL_PARTS, EVERYWHERE)],
    "random_fixed": [({}, ALL_PARTS, EVERYWHERE), ({"compensate": "mean"}, FFNS, SOME)],
    "static": [({}, ALL_PARTS, EVERYWHERE), ({"compensate": "mean"}, FFNS, SOME)],
    "surrogate": [
        ({"surrogate_rank": 5}, FFNS, SOME),
        ({"surrogate_rank": 4, "surrogate_channels": 9}, FFNS, SOME),
    ],
    "skip": [({}, FFNS, SOME), ({"compensate": "mean"}, FFNS, SOME)],
}
"""Of each mode: settings, the layers that are sparse, and the models on which it is held to the masked model."""


def masked_references() -> list[Any]:
    return [
        pytest.param(name, {"mode": mode} | settings | layers, left, id=f"{name}-{mode}-{settings}-{left}")
        for mode, rows in MASKED_REFERENCES.items()
        for settings, layers, names in rows
        for name in names
        for left in ((False, True) if layers is ALL_PARTS else (False,))
    ]


def test_every_mode_has_a_masked_reference():
    assert MASKED_REFERENCES.keys() == MODES.keys()


@pytest.mark.parametrize(("name", "settings", "left"), masked_references())
def test_a_sparse_pass_equals_the_masked_model(name, settings, left, tmp_path):
    model, batch = tiny(name), ragged(name, left)
    config = SparsityConfig(**settings)
    handle = sparsify(model, config, calibration=[batch], cache_dir=tmp_path)
    ours = training_loss(name, model, batch)
    choices = handle.choices()
    handle.remove()
    sparse = {(i, part) for i in range(3) for part in ("ffn", "attention") if config.ratio(i, part) > 0}
    assert set(choices) == sparse - ({(2, "ffn")} if name in PACKED else set())
    with masked(model, batch, choices):
        assert_same(ours, exact_loss(model, batch), model)
    assert abs(float((ours - exact_loss(model, batch)).detach())) > 1e-7  # the control: it is not the dense model


def test_fixed_random_channels_follow_the_seed_alone_and_those_of_the_oracle_their_contribution(tmp_path):
    model, batch, shifted = tiny("llama"), ragged("llama"), dict(ragged("llama"))
    shifted["input_ids"] = shifted["input_ids"].roll(1, 1)

    def channels(mode: str, batch: dict[str, torch.Tensor], seed: int | None = None) -> torch.Tensor:
        handle = sparsify(model, SparsityConfig(mode=mode, seed=seed, ffn_sparsity=0.75), cache_dir=tmp_path)
        model(**batch)
        choice = handle.choices()[0, "ffn"].channels
        handle.remove()
        return choice

    assert torch.equal(channels("random_fixed", batch), channels("random_fixed", shifted, 0))
    assert not torch.equal(channels("random_fixed", batch), channels("random_fixed", batch, 1))
    assert not torch.equal(channels("random", batch), channels("random", batch, 1))  # the control: it is drawn
    by_activation, by_contribution = channels("oracle_activation", batch), channels("oracle", batch)
    down = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    weight = down.base_layer.weight if hasattr(down, "base_layer") else down.weight
    dropped = next(c for c in range(40) if c not in by_contribution)
    with torch.no_grad():
        weight[:, dropped] *= 1e6  # its activation stays, its contribution is the largest
    assert dropped not in by_contribution
    assert dropped in channels("oracle", batch)
    assert torch.equal(channels("oracle_activation", batch), by_activation)


def test_attention_surrogate_of_full_rank_is_the_projection_itself(tmp_path):
    """At full rank the fitted maps of q, k, v and o are the frozen projections, wherever calibration tokens lie."""
    model, batch = tiny("llama"), ragged("llama")
    many = [dict(batch) | {"input_ids": batch["input_ids"].roll(i, 1)} for i in range(8)]
    config = SparsityConfig(mode="surrogate", surrogate_rank=64, layer_sparsity={"layer.1.attention": 0.5})
    handle = sparsify(model, config, calibration=many, cache_dir=tmp_path)
    ours = model(**batch).loss
    handle.remove()
    assert_same(ours, exact_loss(model, batch), model, atol=2e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_output_tokens_may_be_sparse_too(name, tmp_path):
    model, batch = tiny(name), ragged(name)
    handle = sparsify(model, SparsityConfig(mode="svd", dense_output_tokens=False, **SPARSE), cache_dir=tmp_path)
    ours = model(**batch).loss
    choices = handle.choices()
    handle.remove()
    assert (2, "ffn") in choices  # in the last layer it is the output tokens that are left
    with masked(model, batch, choices, all_tokens=True):
        assert_same(ours, exact_loss(model, batch), model)


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "down_proj"], ["gate_proj", "o_proj"]], ids=str)
def test_lora_on_any_subset(targets, tmp_path):
    model, batch = tiny("llama", targets=targets), ragged("llama")
    handle = sparsify(model, SparsityConfig(mode="svd", **SPARSE), cache_dir=tmp_path)
    ours = model(**batch).loss
    choices = handle.choices()
    handle.remove()
    with masked(model, batch, choices):
        assert_same(ours, exact_loss(model, batch), model)


@pytest.mark.parametrize("name", ["llama", "distilbert"])
def test_sparsity_zero_is_the_dense_step_bit_for_bit(name, tmp_path):
    model, batch = tiny(name).float(), ragged(name)
    results = []
    for config in (
        SparsityConfig(mode="dense"),
        SparsityConfig(mode="svd", svd_rank=4, layer_sparsity={"layer.0": 0.0, "layer.1": 0.0, "layer.2": 1e-9}),
    ):
        handle = sparsify(model, config, cache_dir=tmp_path)
        loss = model(**batch).loss
        results.append((loss, gradients(loss, model)))
        handle.remove()
    (a, grads_a), (b, grads_b) = results
    if name == "llama":  # layer.2 keeps every channel of tokens that end there; an encoder gathers all of them
        assert torch.equal(a, b)
        assert all(torch.equal(grads_a[n], grads_b[n]) for n in grads_a)
    else:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["svd", "random"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "distilbert"])
def test_recomputation_picks_the_same_channels(name, mode, tmp_path):
    model, batch = tiny(name), ragged(name)
    config = SparsityConfig(mode=mode, **SPARSE)

    def run():
        handle = sparsify(model, config, cache_dir=tmp_path)
        handle.begin_step(3, 10)
        loss = model(**batch).loss
        found = loss, gradients(loss, model)
        handle.remove()
        return found

    plain, expected = run()
    inner = model.get_base_model()
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    again, got = run()
    assert any(getattr(m, "gradient_checkpointing", False) for m in inner.modules())
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-12)
    for n in expected:
        torch.testing.assert_close(got[n], expected[n], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_remove_restores_the_model_bit_for_bit(name, tmp_path):
    model, batch = tiny(name), ragged(name)
    forwards = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    classes = {type(m): type(m).forward for m in model.modules()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = set(model.state_dict())
    before = model(**batch).loss
    handle = sparsify(model, SparsityConfig(mode="svd", **SPARSE), cache_dir=tmp_path)
    model(**batch).loss.backward()
    assert set(model.state_dict()) == state  # estimators are in no state dict
    assert all(type(m).forward is classes[type(m)] for m in model.modules())  # no class is patched
    handle.remove()
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == forwards
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    storages = [p.untyped_storage().data_ptr() for p in dict(model.named_parameters()).values()]
    assert len(set(storages)) == len(storages)
    assert torch.equal(model(**batch).loss, before)


def test_evaluation_generation_and_merging_are_as_without_us(tmp_path):
    model, batch = tiny("llama"), ragged("llama")
    prompt = {k: batch[k][:1, :5] for k in ("input_ids", "attention_mask")}

    def answers():
        model.eval()
        generated = model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=1)
        with torch.no_grad():
            logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
            loss = model(**batch).loss
            with model.disable_adapter():
                plain = model(**batch).loss
            model.merge_adapter()
            merged = model(**batch).loss
            model.unmerge_adapter()
        model.train()
        return generated, logits, loss, plain, merged

    expected = answers()
    handle = sparsify(model, SparsityConfig(mode="svd", **SPARSE), cache_dir=tmp_path)
    sparse = model(**batch).loss
    for ours, theirs in zip(answers(), expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert abs(float((sparse - expected[2]).detach())) > 1e-6
    with model.disable_adapter():  # a training pass of the bare model is sparse too, and has no LoRA
        bare = model(**batch).loss
    choices = handle.choices()
    handle.remove()
    with masked(model, batch, choices), model.disable_adapter():
        torch.testing.assert_close(bare, exact_loss(model, batch), rtol=0, atol=1e-10)


def test_sparse_evaluation_when_asked(tmp_path):
    model, batch = tiny("llama"), ragged("llama")
    model.eval()
    dense = model(**batch).loss
    handle = sparsify(model, SparsityConfig(mode="svd", sparse_eval=True, **SPARSE), cache_dir=tmp_path)
    output = model(**batch)
    assert output.logits.shape == (3, 11, 64)
    assert abs(float((output.loss - dense).detach())) > 1e-6
    handle.remove()


def test_two_models_with_two_settings_live_side_by_side(tmp_path):
    first, second, batch = tiny("llama"), tiny("llama"), ragged("llama")
    alone = []
    configs = [SparsityConfig(mode="svd", **SPARSE), SparsityConfig(mode="skip", layer_sparsity={"layer.1": 0.9})]
    for model, config in zip((first, second), configs):
        handle = sparsify(model, config, cache_dir=tmp_path)
        alone.append(model(**batch).loss)
        handle.remove()
    handles = [sparsify(m, c, cache_dir=tmp_path) for m, c in zip((first, second), configs)]
    together = [model(**batch).loss for model in (first, second, first, second)]
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    assert torch.equal(together[2], alone[0])
    for handle in handles:
        handle.remove()


def test_padding_never_votes(tmp_path):
    """More padding, or other words in it, and the same channels are chosen."""
    for name in ("llama", "gpt2", "distilbert"):
        model, batch = tiny(name), ragged(name)
        handle = sparsify(model, SparsityConfig(mode="svd", **SPARSE), cache_dir=tmp_path)
        model(**batch)
        before = handle.choices()
        wider = {k: v if v.dim() == 1 else torch.nn.functional.pad(v, (0, 4), value=-100 if k == "labels" else 0)
                 for k, v in batch.items()}  # fmt: skip
        wider["input_ids"][wider["attention_mask"] == 0] = 37
        model(**wider)
        after = handle.choices()
        handle.remove()
        assert before.keys() == after.keys()
        for key, choice in before.items():
            ours, theirs = (c.channels if key[1] == "ffn" else c.channels("qkv").index for c in (choice, after[key]))
            assert torch.equal(ours, theirs), (name, key)


@pytest.mark.parametrize("name", ["llama", "distilbert"])
def test_lora_dropout_has_the_gradient_of_its_own_draw(name, tmp_path):
    """With the draw fixed by a seed, autograd agrees with finite differences; and the draw is of the right scale."""
    model, batch = tiny(name, dropout=0.5), ragged(name)
    handle = sparsify(model, SparsityConfig(mode="svd", **SPARSE), cache_dir=tmp_path)
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}

    def loss():
        torch.manual_seed(1)
        return model(**batch).loss

    grads = gradients(loss(), model)
    for name_, parameter in list(factors.items())[::5]:
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            parameter.data.add_(sign * 1e-6 * direction)
            values.append(float(loss().detach()))
            parameter.data.sub_(sign * 1e-6 * direction)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float((grads[name_] * direction).sum()), abs=2e-6)
    handle.remove()
    x = torch.ones(4000, 3, dtype=torch.float64)
    lora = Adapter(torch.nn.Parameter(torch.eye(3).double()), torch.nn.Parameter(torch.eye(3).double()), 1.0, 0.5)
    operand = Operand(torch.zeros(3, 3, dtype=torch.float64), lora=Lora.of([lora], [3]))
    (y,) = split_linear(x, [Rows(0, 4000)], [(operand,)])
    assert set(y.detach().unique().tolist()) == {0.0, 2.0}


def test_mode_random_draws_anew_each_step_and_repeats_a_step(tmp_path):
    model, batch = tiny("llama"), ragged("llama")
    handle = sparsify(model, SparsityConfig(mode="random", **SPARSE), cache_dir=tmp_path)

    def draw(step):
        handle.begin_step(step, 10)
        model(**batch)
        return handle.choices()[0, "ffn"].channels

    assert torch.equal(draw(4), draw(4))
    assert not torch.equal(draw(4), draw(5))
    handle.begin_step(4, 10)
    model(**batch)
    first = handle.choices()[0, "ffn"].channels
    model(**batch)  # the second pass of an accumulated step is another draw
    assert not torch.equal(handle.choices()[0, "ffn"].channels, first)
    handle.remove()


def test_schedule_is_dense_outside_its_steps(tmp_path):
    model, batch = tiny("llama"), ragged("llama")
    config = SparsityConfig(mode="svd", sparse_warmup_ratio=0.2, sparse_end_ratio=0.8, **SPARSE)
    handle = sparsify(model, config, cache_dir=tmp_path)
    chosen = []
    for step in range(10):
        handle.begin_step(step, 10)
        assert handle.active == (2 <= step < 8)
        model(**batch)
        chosen.append(bool(handle.choices()))
    handle.remove()
    assert chosen == [False] * 2 + [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_sparsity": {"layer.7": 0.5}}, "layer 7"),
        ({"layer_sparsity": {"layer.0": 0.5}, "svd_rank": 100}, "rank"),
        ({"mode": "static", "layer_sparsity": {"layer.0": 0.5}}, "calibration"),
        ({"mode": "svd"}, "no sparse layer"),
    ],
)
def test_bad_settings_are_errors_before_the_first_step(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        sparsify(tiny("llama"), SparsityConfig(**{"svd_rank": 4} | settings), cache_dir=tmp_path)


def test_what_is_not_supported_is_refused_by_name():
    opt = tf.OPTForCausalLM(
        tf.OPTConfig(vocab_size=64, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
                     word_embed_proj_dim=24)
    )  # fmt: skip
    with pytest.raises(InputError, match="OPTDecoderLayer"):
        sparsify(opt, SparsityConfig(mode="dense"))
    trained = tiny("llama", lora=False)
    trained.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj is trained itself"):
        sparsify(trained, SparsityConfig(mode="dense"))
    dora = get_peft_model(
        tiny("llama", lora=False), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(InputError, match="q_proj has a LoRA variant"):
        sparsify(dora, SparsityConfig(mode="dense"))
    with pytest.raises(InputError, match="no stack"):
        sparsify(torch.nn.Sequential(torch.nn.Linear(3, 3)), SparsityConfig(mode="dense"))


def test_sliding_windows_and_output_options_take_the_models_own_pass(tmp_path):
    """What the packed pass does not know runs block by block, and gives the same loss."""
    base = tf.MistralForCausalLM(
        tf.MistralConfig(**SIZES, num_key_value_heads=2, head_dim=6, sliding_window=4)
    ).double()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).double()
    model.train()
    batch = ragged("llama")
    expected = model(**batch).loss
    handle = sparsify(model, SparsityConfig(mode="dense"))
    torch.testing.assert_close(model(**batch).loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 4
    handle.remove()


def test_a_layout_from_the_collator_gives_the_same_pass(tmp_path):
    model, batch = tiny("llama"), ragged("llama")
    handle = sparsify(model, SparsityConfig(mode="svd", **SPARSE), cache_dir=tmp_path)
    expected = model(**batch).loss
    layout = TokenLayout.build(batch["attention_mask"], batch["labels"])
    assert torch.equal(model(**batch, token_layout=layout).loss, expected)
    assert torch.allclose(model(**batch, num_items_in_batch=7).loss * 7 / layout.n_output, expected)
    handle.remove()


def test_four_bit_base_weights(tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit base weights need bitsandbytes")
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128}
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2)).save_pretrained(tmp_path / "base")
    quantised = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantised, device_map="cpu", dtype=torch.float32
    )
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.train()
    batch = ragged("llama")
    expected = model(**batch).loss
    grads = gradients(expected, model)
    handle = sparsify(model, SparsityConfig(mode="dense"))
    ours = model(**batch).loss
    # On the CPU, bitsandbytes repacks the weights in evaluation, in bfloat16: they are not quite the same afterwards.
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=0)
    for name, grad in gradients(ours, model).items():
        assert float((grad - grads[name]).norm()) < 0.1 * float(grads[name].norm())
    handle.remove()
    handle = sparsify(model, SparsityConfig(mode="svd", **SPARSE), cache_dir=tmp_path)
    ours, choices = model(**batch).loss, handle.choices()
    handle.remove()
    with masked(model, batch, choices):
        torch.testing.assert_close(ours.double(), exact_loss(model, batch).double(), rtol=2e-3, atol=1e-5)
    assert abs(float((ours - expected).detach())) > 1e-2


def context_activations(model, batch, layer):
    """Input, hidden and output of one FFN at context tokens, by hooks on its linear layers."""
    structure = find_blocks(model)
    ffn, seen = structure.blocks[layer].ffn, {}
    hooks = [
        structure.module(ffn.up).register_forward_pre_hook(lambda _, x: seen.update(x=x[0])),
        structure.module(ffn.down).register_forward_hook(lambda _, x, y: seen.update(h=x[0], y=y)),
    ]
    model.eval()
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"})
    model.train()
    for hook in hooks:
        hook.remove()
    layout = TokenLayout.build(batch["attention_mask"], batch["labels"])
    rows = layout.tokens[: layout.n_context]
    return (seen[name].flatten(0, 1)[rows] for name in "xhy")


def test_what_calibration_measures(tmp_path):
    """Means, static channels and maps come from the context tokens alone, and say what they should."""
    model, batch = tiny("llama"), ragged("llama")
    x, h, y = context_activations(model, batch, 1)
    down = find_blocks(model).module("model.layers.1.mlp.down_proj").get_base_layer().weight
    layers = {"layer.1": 0.75}

    def choice(**settings):
        config = SparsityConfig(layer_sparsity=layers, svd_rank=4, **settings)
        handle = sparsify(model, config, calibration=[batch], cache_dir=tmp_path / str(settings))
        model(**batch)
        found = handle.choices()[1, "ffn"]
        handle.remove()
        return found

    for mode in ("svd", "static"):
        found = choice(mode=mode, compensate="mean")
        dropped = torch.ones(40, dtype=torch.bool)
        dropped[found.channels] = False
        torch.testing.assert_close(found.bias, down[:, dropped] @ h[:, dropped].mean(dim=0), rtol=0, atol=1e-12)
    assert found.channels.tolist() == sorted(h.norm(dim=0).argsort(descending=True)[:10].tolist())
    found = choice(mode="skip", compensate="mean")
    bias = find_blocks(model).module("model.layers.1.mlp.down_proj").get_base_layer().bias
    torch.testing.assert_close(found.map.apply(x[:1])[0], down @ h.mean(dim=0) + bias, rtol=0, atol=1e-12)
    moments = AffineStatistics(24, 24)
    moments.update(x, y)
    expected = fit_affine(moments, 5)
    found = choice(mode="surrogate", surrogate_rank=5)
    torch.testing.assert_close(found.map.apply(x), expected.apply(x), rtol=0, atol=1e-9)
    found = choice(mode="surrogate", surrogate_rank=5, surrogate_channels=10)
    assert found.channels.tolist() == sorted(h.norm(dim=0).argsort(descending=True)[:10].tolist())
    moments = AffineStatistics(24, 24)
    with_lora = down + find_blocks(model).module("model.layers.1.mlp.down_proj").get_delta_weight("default")
    moments.update(x, (y - h[:, found.channels] @ with_lora[:, found.channels].T - bias).detach())
    torch.testing.assert_close(found.map.apply(x), fit_affine(moments, 5).apply(x), rtol=0, atol=1e-9)


def test_a_refreshed_surrogate_is_fitted_to_the_adapter_as_it_is(tmp_path):
    model, batch = tiny("llama"), ragged("llama")
    config = SparsityConfig(
        mode="surrogate", surrogate_rank=5, surrogate_refresh_steps=2, layer_sparsity={"layer.1": 0.9}
    )
    handle = sparsify(model, config, calibration=[batch], cache_dir=tmp_path)

    def fitted(step):
        handle.begin_step(step, 10)
        model(**batch)
        return handle.choices()[1, "ffn"].map.up.clone()

    first = fitted(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 2
    assert torch.equal(fitted(1), first)
    assert not torch.allclose(fitted(2), first)
    handle.remove()


def test_sequences_packed_in_one_row_do_not_see_one_another():
    model = tiny("llama")
    ids = torch.randint(2, 64, (1, 10), generator=torch.Generator().manual_seed(4))
    labels = ids.clone()
    labels[:, [0, 1, 5, 6]] = -100
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    expected = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss
    handle = sparsify(model, SparsityConfig(mode="dense"))
    ours = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=1e-6)
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_batch_without_labels_gives_every_parameter_a_gradient(name, tmp_path):
    model, batch = tiny(name), ragged(name)
    handle = sparsify(model, SparsityConfig(mode="svd", **SPARSE), cache_dir=tmp_path)
    if name == "llama":
        batch["labels"] = torch.full_like(batch["labels"], -100)
        model(**batch).loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)
    whole = ragged(name)
    loss = model(**whole).loss
    layout = TokenLayout.build(whole["attention_mask"], whole["labels"])
    torch.testing.assert_close(model(**whole, num_items_in_batch=torch.tensor(7)).loss * 7 / layout.n_output, loss)
    handle.remove()


@pytest.mark.parametrize(
    "settings", [{"mode": "static", "compensate": "mean"}, {"mode": "surrogate"}, {"mode": "svd"}], ids=str
)
@pytest.mark.parametrize("name", ["qwen3", "bert", "llama"])
def test_autocast_over_float32_weights(name, settings, tmp_path):
    model, batch = tiny(name).float(), ragged(name)
    config = SparsityConfig(surrogate_rank=4, **SPARSE, **settings)
    handle = sparsify(model, config, calibration=[batch], cache_dir=tmp_path)
    exact = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), exact, rtol=0.05, atol=0.05)
    handle.remove()


def test_an_adapted_or_trained_head(tmp_path):
    for change in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    ):
        base = tiny("llama", lora=False).float()
        model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **change)).train()
        batch = ragged("llama")
        expected = model(**batch).loss
        handle = sparsify(model, SparsityConfig(mode="dense"))
        assert handle.packed
        torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
        handle.remove()


def test_models_that_change_their_logits_keep_their_own_head():
    config = tf.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5)
    model = tf.Gemma2ForCausalLM(config).requires_grad_(False).train()
    batch = ragged("llama")
    expected = model(**batch).loss
    handle = sparsify(model, SparsityConfig(mode="dense"))
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-4, atol=1e-4)
    handle.remove()


def test_the_kept_channels_lora_is_not_in_the_map_too(tmp_path):
    """A full-rank map beside kept channels reproduces the FFN, LoRA on every linear layer included."""
    model, batch = tiny("llama", targets=["down_proj"]), ragged("llama")
    many = [dict(batch) | {"input_ids": batch["input_ids"].roll(i, 1)} for i in range(8)]
    config = SparsityConfig(mode="surrogate", surrogate_rank=24, surrogate_channels=39, layer_sparsity={"layer.1": 0.9})
    handle = sparsify(model, config, calibration=many, cache_dir=tmp_path)
    ours = model(**batch).loss
    handle.remove()
    assert abs(float((ours - exact_loss(model, batch)).detach())) < 2e-3


def test_misuse_of_a_handle_is_told(tmp_path):
    model, batch = tiny("llama"), ragged("llama")
    handle = sparsify(model, SparsityConfig(mode="dense"))
    with pytest.raises(InputError, match="sparse already"):
        sparsify(model, SparsityConfig(mode="dense"))
    handle.remove()
    handle.remove()
    bare = tiny("llama", lora=False)
    handle = sparsify(bare, SparsityConfig(mode="dense"))
    get_peft_model(bare, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="was replaced after sparsify"):
        bare.train()(**batch)


def test_the_backbone_called_by_itself_in_evaluation_is_dense(tmp_path):
    for name in ("gpt2", "bert"):
        model, batch = tiny(name), ragged(name)
        inner = model.get_base_model()
        backbone = getattr(inner, inner.base_model_prefix)
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        model.eval()
        expected = backbone(**inputs)[0]
        model.train()
        handle = sparsify(model, SparsityConfig(mode="svd", **SPARSE), cache_dir=tmp_path)
        model(**batch)
        model.eval()
        assert torch.equal(backbone(**inputs)[0], expected)
        handle.remove()


# --- two streams ----------------------------------------------------------------------------------------------------


def give_own_memory(model: torch.nn.Module) -> None:
    """As moving the model to a device does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def test_weights_are_moved_together_before_a_second_stream_selects(monkeypatch):
    model, batch = tiny("llama"), ragged("llama")
    layers = {"layer.0-2.attention": 0.5}
    handle = sparsify(model, SparsityConfig(mode="svd", svd_rank=4, ffn_sparsity=0.5, layer_sparsity=layers))
    expected = training_loss("llama", model, batch)
    give_own_memory(model)
    stored, is_selecting, moved = FusedLinear.stored, [False], []

    def watched(linear: FusedLinear) -> torch.Tensor:
        before = linear._whole
        whole = stored(linear)
        if whole is not before:
            moved.append(is_selecting[0])
        return whole

    @contextmanager
    def selection(x: torch.Tensor, wanted: bool) -> Iterator[Callable[[], Any]]:
        is_selecting[0] = wanted
        yield lambda: None
        is_selecting[0] = False

    monkeypatch.setattr(FusedLinear, "stored", watched)
    monkeypatch.setattr(plan_module, "side_stream", selection)
    monkeypatch.setattr(decoder_module, "side_stream", selection)
    assert handle.packed
    assert torch.equal(training_loss("llama", model, batch), expected)
    assert len(moved) == 2 * 3  # gate and up, and q, k and v, of every layer
    assert not any(moved)


@pytest.mark.gpu
def test_a_slow_second_stream_changes_nothing():
    model = tiny("llama").float().cuda()
    batch = {key: value.cuda() for key, value in ragged("llama").items()}
    layers = {"layer.0-2.attention": 0.5}
    handle = sparsify(model, SparsityConfig(mode="svd", svd_rank=4, ffn_sparsity=0.5, layer_sparsity=layers))
    expected = training_loss("llama", model, batch)
    handle.forget_graphs()
    give_own_memory(model)
    with torch.cuda.stream(step_module._second_stream(torch.device("cuda", torch.cuda.current_device()))):
        torch.cuda._sleep(1 << 28)  # a tenth of a second, in which the first stream would run ahead
    torch.testing.assert_close(training_loss("llama", model, batch), expected, rtol=1e-5, atol=0)
