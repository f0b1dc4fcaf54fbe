from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import (
    FACTORS,
    Lora,
    Shape,
    Workload,
    compare_costs,
    comparison_table,
    estimator_macs,
    format_comparison,
    layer_costs,
    token_costs,
    total,
)
from sparselora.errors import InputError
from sparselora.models.architectures import SHAPES
from sparselora.numerics.channels import keep_count

ROOT = Path(__file__).resolve().parents[2]
DISTILBERT = Shape.from_config(SHAPES["distilbert"])
LLAMA3 = Shape.from_config(SHAPES["llama3-8b"])
DENSE = SparsityConfig(mode="dense")


FROZEN = ("FFN", "attention projections", "head")
"""Components of frozen weights: what the published figures of contextual sparsity count."""


def component(costs, name):
    return next(cost for cost in costs if cost.component == name)


def share(config, work, exact) -> float:
    """Frozen MACs left, against plain PEFT."""
    return total(token_costs(LLAMA3, config, work, exact=exact), components=FROZEN) / total(
        token_costs(LLAMA3, None, work), components=FROZEN
    )


# --- published numbers --------------------------------------------------------------------------------------------


def test_distilberts_ffn_as_published():
    dense, _ = layer_costs(DISTILBERT, DENSE, Workload(1, 128), 0, None, exact=True)
    assert dense["FFN"] == 4_718_592
    rank8, rank4 = (estimator_macs(DISTILBERT, SparsityConfig(svd_rank=k, ffn_sparsity=0.5), 0) for k in (8, 4))
    assert (rank8, rank4) == (30_720, 15_360)
    # The published variant computes the first projection whole and makes the second sparse: never twice as fast.
    first = second = 768 * 3072
    assert rank8 + first + second // 2 == 3_569_664
    assert rank4 + first + second // 4 == 2_964_480


@pytest.mark.parametrize(("sparsity", "rank"), [(0.5, 8), (0.75, 4), (0.25, 16)])
def test_channels_chosen_before_the_first_projection_shrink_both(sparsity, rank):
    config = SparsityConfig(svd_rank=rank, ffn_sparsity=sparsity, estimator_tokens=0)
    context, output = layer_costs(DISTILBERT, config, Workload(1, 128), 0, None, exact=True)
    assert context["FFN"] + context["estimator"] == 4_718_592 * (1 - sparsity) + rank * (768 + 3072)
    assert output["FFN"] == 4_718_592


def test_the_published_llama_setting_keeps_its_share_of_the_frozen_flops():
    math = SparsityConfig.from_yaml(ROOT / "configs" / "llama3_8b_math.yaml")
    work = Workload(8, 512, 128)
    assert round(share(math, work, exact=False), 3) == 0.468
    assert round(share(math, work, exact=True), 3) == 0.395
    # Independently, by hand (millions of MACs): the FFN off in 28 layers, attention to a quarter in 14, the head whole.
    ffn, attention, head = 3 * 4096 * 14336, 4096 * (2 * 4096 + 2 * 1024), 4096 * 128256
    kept = keep_count(14336, 1 - 0.99) / 14336
    context = (4 + 28 * kept) * ffn + (18 + 14 / 4) * attention
    dense = 32 * (ffn + attention)
    frozen = 0.75 * context + 0.25 * dense
    assert share(math, work, exact=False) == pytest.approx((frozen + head) / (dense + head), rel=1e-12)
    last = 0.75 * (ffn + 2 * 4096 * 4096)
    assert share(math, work, exact=True) == pytest.approx((frozen - last + head / 4) / (dense + head), rel=1e-12)


# --- against the counter of torch ---------------------------------------------------------------------------------

SETTINGS = {
    "peft": None,
    "dense": {"mode": "dense"},
    "random": {"mode": "random", "ffn_sparsity": 0.5, "layer_sparsity": {"layer.2": 0.75, "layer.1.attention": 0.5}},
    "skip": {"mode": "skip", "ffn_sparsity": 0.5},
    "svd": {"mode": "svd", "svd_rank": 2, "ffn_sparsity": 0.5, "attention_sparsity": 0.0},
    "oracle": {"mode": "oracle", "layer_sparsity": {"layer.0-1": 0.5}},
    "surrogate": {"mode": "surrogate", "surrogate_rank": 3, "ffn_sparsity": 0.5},
}


def counted_and_predicted(name, causal, targets, tmp_path) -> tuple[float, float, dict[str, float]]:
    """FLOPs of a real forward pass by torch's own counter, those predicted, and the latter by component."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sparselora.bench.timing import adapt, build_model, random_batch
    from sparselora.contextual.handle import sparsify
    from sparselora.contextual.layout import TokenLayout

    config = {**SHAPES["llama-7b" if causal else "bert-base"], "vocab_size": 50, "hidden_size": 32}
    config |= {"intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2} if causal else {}
    work = Workload(2, 16, 4 if causal else 0)
    model = build_model(config, causal=causal, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    modules = None if targets is None else list(targets)
    adapted = adapt(model, r=2, alpha=4, targets=modules, causal=causal)
    batch = random_batch(50, work, causal=causal, seed=0)
    sparsity = None if SETTINGS[name] is None else SparsityConfig(**SETTINGS[name])
    if sparsity is not None:
        handle = sparsify(adapted, sparsity, calibration=[batch], cache_dir=tmp_path)
        handle.begin_step(0, 10)
        batch |= {"token_layout": TokenLayout.build(batch["attention_mask"], batch["labels"], causal=causal)}
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        assert adapted(**batch).loss.requires_grad
    short = ("q", "k", "v", "o") if targets is None else tuple(module.removesuffix("_proj") for module in targets)
    costs = token_costs(Shape.from_config(config), sparsity, work, Lora(2, short))
    predicted = {cost.component: 2 * cost.mean * work.batch * work.seq for cost in costs}
    return counter.get_total_flops(), sum(predicted.values()), predicted


@pytest.mark.parametrize("name", SETTINGS)
def test_an_encoders_forward_pass_costs_exactly_what_torch_counts(name, tmp_path):
    counted, predicted, _ = counted_and_predicted(name, False, None, tmp_path)
    assert counted == predicted


def block_zeros(targets) -> float:
    """At most what a pass multiplies by zeros: adapters of one input stand in one block-diagonal B over all outputs."""
    adapted = ("q_proj", "k_proj", "v_proj") if targets is None else targets
    zeros = 0
    for widths in ({"q_proj": 32, "k_proj": 16, "v_proj": 16}, {"gate_proj": 48, "up_proj": 48}):
        own = [width for name, width in widths.items() if name in adapted]
        zeros += 2 * 2 * (len(own) * sum(widths.values()) - sum(own))
    return zeros * 4 * 2 * 16


@pytest.mark.parametrize("targets", [None, ("q_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_decoders_forward_pass_costs_what_torch_counts(name, targets, tmp_path):
    counted, predicted, parts = counted_and_predicted(name, True, targets, tmp_path)
    # torch's counter does not see the fused causal attention, and sees 2 · 32 multiplications of the rotation. The loss
    # of our own pass computes the gradient of the output layer's input as well, and some lora_A (of the oracle's
    # scores, the adapter) is applied to tokens that have no use for it.
    products = predicted - parts["attention scores"]
    if name == "peft":
        assert counted == products + 128
    else:
        _, _, whole = counted_and_predicted("peft", True, targets, tmp_path)
        spare = 256 + parts["head"] + whole["adapter"] / 4 + block_zeros(targets)
        assert products <= counted <= products + spare


# --- properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_dense_frozen_macs_are_the_parameters_of_the_matrices(name):
    from sparselora.models.architectures import architecture

    config = SHAPES[name]
    shape = Shape.from_config(config)
    weights = sum(m.count * m.d_out * m.d_in for m in architecture(config).matrices)
    for settings_ in (None, DENSE):
        costs = token_costs(shape, settings_, Workload(2, 64, 8), exact=False)
        assert sum(component(costs, n).mean for n in ("FFN", "attention projections")) == weights
    assert component(costs, "estimator").mean == 0


def test_sparsity_zero_costs_what_dense_costs():
    for shape in (DISTILBERT, LLAMA3):
        work, lora = Workload(4, 128, 32), Lora(8)
        assert token_costs(shape, SparsityConfig(), work, lora) == token_costs(shape, DENSE, work, lora)


def test_exact_savings_are_the_head_and_the_last_layer_alone():
    work, lora = Workload(8, 512, 128), Lora(8, ("q", "k", "v", "o", "gate", "up", "down"))
    for layer in range(32):
        plain, saved = (layer_costs(LLAMA3, DENSE, work, layer, lora, exact=exact) for exact in (False, True))
        assert plain[1] == saved[1]
        assert (plain[0] == saved[0]) == (layer != 31)
    # There a context token needs its key and value, and nothing else.
    assert saved[0]["FFN"] == saved[0]["attention scores"] == 0
    assert saved[0]["attention projections"] == 2 * 4096 * 1024
    assert saved[0]["adapter"] == 2 * 8 * (4096 + 1024)
    assert component(token_costs(LLAMA3, DENSE, work), "head").mean == 4096 * 128256 / 4
    # Nothing is saved where every token is labelled, nor in an encoder.
    full = Workload(8, 512, 512)
    assert token_costs(LLAMA3, DENSE, full)[1].mean == token_costs(LLAMA3, None, full)[1].mean
    assert token_costs(DISTILBERT, DENSE, work) == token_costs(DISTILBERT, None, work)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 128), st.sampled_from(["svd", "random", "static"]))
def test_more_sparsity_never_costs_more(low, high, labelled, mode):
    low, high = sorted((low, high))
    work, lora = Workload(2, 128, labelled), Lora(8, ("q", "o", "up"))
    rare, dense = (
        token_costs(LLAMA3, SparsityConfig(mode=mode, ffn_sparsity=s, attention_sparsity=s), work, lora)
        for s in (high, low)
    )
    for a, b in zip(rare, dense):
        if a.component != "estimator":
            assert a.mean <= b.mean
            assert a.output == b.output


def test_output_tokens_are_dense_unless_told():
    work = Workload(1, 128, 32)
    sparse = SparsityConfig(ffn_sparsity=0.9)
    both = SparsityConfig(ffn_sparsity=0.9, dense_output_tokens=False)
    ffn = [component(token_costs(LLAMA3, config, work), "FFN").output for config in (DENSE, sparse, both)]
    assert ffn[0] == ffn[1] > 9 * ffn[2]


def test_an_encoder_has_no_output_tokens():
    config = SparsityConfig(ffn_sparsity=0.9)
    assert total(token_costs(DISTILBERT, config, Workload(1, 128, 64))) == pytest.approx(
        total(token_costs(DISTILBERT, config, Workload(1, 128))), rel=1e-3
    )


def test_the_estimate_is_counted_for_the_tokens_that_are_looked_at():
    one = estimator_macs(LLAMA3, SparsityConfig(ffn_sparsity=0.5, attention_sparsity=0.5), 3)
    assert one == 8 * (2 * (4096 + 14336) + (4096 + 4096) + 2 * (4096 + 1024))
    for batch, seq, labelled, limit, expected in [
        (1, 256, 0, 512, 1.0),
        (8, 512, 128, 512, 512 / 3072),
        (8, 512, 128, 0, 1.0),
        (8, 512, 512, 512, 1.0),
    ]:
        config = SparsityConfig(ffn_sparsity=0.5, attention_sparsity=0.5, estimator_tokens=limit)
        context, _ = layer_costs(LLAMA3, config, Workload(batch, seq, labelled), 3, None, exact=True)
        assert context["estimator"] == pytest.approx(expected * one)


def test_only_modes_that_estimate_pay_for_it():
    def estimate(mode):
        return estimator_macs(LLAMA3, SparsityConfig(mode=mode, ffn_sparsity=0.5), 3)

    assert [mode for mode in ("dense", "random", "static", "surrogate", "skip") if estimate(mode)] == []
    assert estimate("oracle") == 2 * 4096 * 14336 > 100 * estimate("svd") > 0
    # A layer that is dense estimates nothing.
    config = SparsityConfig(layer_sparsity={"layer.3": 0.5})
    assert estimator_macs(LLAMA3, config, 2) == 0 < estimator_macs(LLAMA3, config, 3)


def test_what_stands_in_for_a_layer():
    def context(**settings_):
        config = SparsityConfig(ffn_sparsity=0.9, **settings_)
        return layer_costs(LLAMA3, config, Workload(1, 64), 3, Lora(8, ("up", "q")), exact=True)[0]

    assert context(mode="skip")["FFN"] == 0
    assert context(mode="surrogate", surrogate_rank=64)["FFN"] == 64 * 2 * 4096
    assert context(mode="surrogate", surrogate_rank=64, surrogate_channels=100)["FFN"] == (128 + 300) * 4096
    mapped = context(mode="surrogate", surrogate_rank=64, attention_sparsity=0.5)
    assert mapped["attention projections"] == 64 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    # The adapter of a skipped FFN is not applied; that of a mapped projection is, whole.
    assert context(mode="skip")["adapter"] == mapped["adapter"] == 8 * (4096 + 4096)


def test_adapters_of_sliced_projections_are_sliced_with_them():
    config = SparsityConfig(ffn_sparsity=0.75, attention_sparsity=0.5)
    context, output = layer_costs(LLAMA3, config, Workload(1, 64, 8), 3, Lora(8, ("q", "o", "down")), exact=True)
    assert output["adapter"] == 8 * (4 * 4096 + 4096 + 14336)
    assert context["adapter"] == 8 * (2 * (4096 + 2048) + 4096 + 3584)


def test_fused_projections_count_as_their_parts():
    gpt2 = Shape.from_config(SHAPES["gpt2"])
    assert (gpt2.q_width, gpt2.kv_width, gpt2.ffn_width, gpt2.gated, gpt2.decoder) == (768, 768, 3072, False, True)


def test_a_training_step_multiplies_each_component_by_its_factor():
    costs = token_costs(LLAMA3, None, Workload(1, 64, 8), Lora(8))
    assert [cost.component for cost in costs] == list(FACTORS)
    for cost in costs:
        assert cost.training == FACTORS[cost.component] * cost.mean
    assert total(costs, training=True) == sum(cost.training for cost in costs)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_sampled_contexts_cost_their_share_of_what_lies_between_none_and_all(share):
    work, lora = Workload(8, 512, 128), Lora(32)

    def cost(**settings: Any) -> float:
        return total(token_costs(LLAMA3, SparsityConfig(mode="dense", **settings), work, lora), training=True)

    full, none = cost(), cost(context_backward="none")
    assert none < full
    sampled = cost(context_backward="sampled", context_backward_share=share)
    assert sampled == pytest.approx(share * full + (1 - share) * none, rel=1e-12)


# --- tables -------------------------------------------------------------------------------------------------------


def test_the_comparison_names_its_unit_and_adds_up():
    work, lora = Workload(8, 512, 128), Lora(32)
    after = token_costs(LLAMA3, SparsityConfig(ffn_sparsity=0.9), work, lora)
    rows = compare_costs(token_costs(LLAMA3, DENSE, work, lora), after)
    assert rows[-1].component == "total"
    assert rows[-1].after == total(after)
    assert rows[-1].after_training == total(after, training=True)
    assert rows[0].reduction == float("-inf")  # the estimator is new
    assert component(rows, "attention scores").reduction == 0
    macs, flops = (comparison_table(rows, unit) for unit in ("MACs", "FLOPs"))
    for one, two in zip(macs, flops):
        assert two["forward_FLOPs_after"] == 2 * one["forward_MACs_after"]
        assert two["forward_reduction"] == one["forward_reduction"]
    text = format_comparison(rows, "FLOPs")
    assert text.splitlines()[0].count("FLOPs") == 2
    assert "MACs" not in text
    assert len({len(line) for line in text.splitlines()}) == 1


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: Workload(0, 8), "at least 1"),
        (lambda: Workload(1, 8, 9), "between 0 and the sequence's 8"),
        (lambda: token_costs(DISTILBERT, None, Workload(1, 8), Lora(8, ("gate",))), "unknown target 'gate'"),
        (lambda: token_costs(DISTILBERT, SparsityConfig(layer_sparsity={"layer.6": 0.5}), Workload(1, 8)), "layer.6"),
        (lambda: comparison_table([], "flop"), "MACs or FLOPs"),
        (lambda: Shape.from_config({"model_type": "nothing"}), "unknown architecture"),
    ],
)
def test_bad_input_is_refused(attempt, words):
    with pytest.raises(InputError) as caught:
        attempt()
    assert words in str(caught.value)


def test_a_mixture_of_experts_is_refused_by_name():
    config = {**SHAPES["llama-7b"], "model_type": "mixtral", "num_local_experts": 8}
    with pytest.raises(InputError, match="mixtral has a mixture of experts"):
        Shape.from_config(config)
