"""A step with frozen products in fp8 is the plain model's whose frozen linear layers round as the format says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual import block_linears, precision
from sparselora.contextual import passes as passes_module
from sparselora.contextual.block_linears import BlockLinears
from sparselora.contextual.handle import sparsify
from sparselora.contextual.precision import Fp8Emulated, FrozenWeights
from sparselora.contextual.structure import Structure, base_layer, find_blocks
from sparselora.errors import InputError
from sparselora.kernels.fp8 import quantisation_passes
from tests.contextual.test_context_backward import Batch, cut_context, gradients, largest_difference
from tests.helpers.contextual_models import PACKED, SIZES, bytes_kept, exact_loss, masked, ragged, tiny, training_loss

E4M3 = torch.float8_e4m3fn
EMULATED = {"frozen_precision": "fp8_emulated"}
SPARSE = {"layer_sparsity": {"layer.0": 0.6, "layer.2": 0.75, "layer.1-2.attention": 0.5}, "svd_rank": 4}
SKIPPED = {"layer_sparsity": {"layer.0": 0.6, "layer.1": 0.75}}
MODES: list[dict[str, Any]] = [
    {"mode": "dense"},
    {"mode": "svd"} | SPARSE,
    {"mode": "svd", "compensate": "mean"} | SPARSE,
    {"mode": "static", "compensate": "mean"} | SPARSE,
    {"mode": "oracle"} | SPARSE,
    {"mode": "random"} | SPARSE,
    {"mode": "surrogate", "surrogate_rank": 4, "surrogate_channels": 9} | SKIPPED,
    {"mode": "skip"} | SKIPPED,
]
CUTS: dict[str, tuple[dict[str, Any], int | None]] = {
    "full": ({}, None),
    "none": ({"context_backward": "none"}, 0),
    "upper": ({"context_backward": "upper", "context_backward_share": 0.4}, 2),
}
"""Settings of a cut, and the first layer whose context has no backward pass."""


# --- the reference ------------------------------------------------------------------------------------------------


def rounded(x: torch.Tensor, dtype: torch.dtype = E4M3) -> torch.Tensor:
    """The numbers that rows ``x (n, k)`` have in an fp8 format with a scale for each row, in float64."""
    x = x.detach().float()
    largest = x.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest * (1 / torch.finfo(dtype).max), torch.ones(()))
    return (x * (1 / scale)).to(dtype).double() * scale.double()


class RoundedLinear(torch.autograd.Function):
    """``x Wᵀ`` with x and the rows of W rounded; its gradient with dy and the columns of W rounded."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.W_t, ctx.dtype = rounded(W.t(), dtype), dtype
        return (rounded(x.flatten(0, -2), dtype) @ rounded(W, dtype).t()).view(*x.shape[:-1], len(W))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        dx = rounded(dy.flatten(0, -2), ctx.dtype) @ ctx.W_t.t()
        return dx.view(*dy.shape[:-1], len(ctx.W_t)), None, None


class RoundedInput(torch.autograd.Function):
    """One of several outputs of one input, whose gradients are rounded each by itself, with the scales of all."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, part: slice, dtype: torch.dtype) -> torch.Tensor:
        ctx.W_t, ctx.dtype = rounded(W.t(), dtype)[:, part], dtype
        return (rounded(x.flatten(0, -2), dtype) @ rounded(W, dtype)[part].t()).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        return (
            (rounded(dy.flatten(0, -2), ctx.dtype) @ ctx.W_t.t()).view(*dy.shape[:-1], len(ctx.W_t)),
            None,
            None,
            None,
        )


@contextmanager
def rounding(structure: Structure, packed: bool, dtype: torch.dtype = E4M3) -> Iterator[None]:
    """Have the frozen linear layers of a plain model round as fp8 does: the definition.

    A packed pass takes q, k and v as one layer, any pass gate and up: their weights have common scales, and the
    gradients of their outputs too.
    """
    with ExitStack() as hooks:
        for block in structure.blocks:
            heads, ffn = block.attention, block.ffn
            qkv = [heads.q] if heads.fused else [heads.q, heads.k, heads.v]
            first = [ffn.up] if ffn.gate is None else [ffn.gate, ffn.up]
            for names, joint in ((qkv, packed), ([heads.o], True), (first, True), ([ffn.down], True)):
                for hook in _round_together(structure, names, joint, dtype):
                    hooks.callback(hook.remove)
        yield


def _round_together(structure: Structure, names: list[str], joint: bool, dtype: torch.dtype) -> list[Any]:
    layers: list[Any] = [base_layer(structure.module(name)) for name in names]
    weights = [x.weight.t() if type(x).__name__ == "Conv1D" else x.weight for x in layers]
    whole, widths = torch.cat(weights), [len(weight) for weight in weights]
    outputs: list[torch.Tensor] = []

    def replace(i: int) -> Any:
        def hook(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if joint:
                if i == 0:
                    outputs[:] = RoundedLinear.apply(inputs[0], whole, dtype).split(widths, dim=-1)
                y = outputs[i]
            else:
                start = sum(widths[:i])
                y = RoundedInput.apply(inputs[0], whole, slice(start, start + widths[i]), dtype)
            return y if layer.bias is None else y + layer.bias

        return hook

    return [layer.register_forward_hook(replace(i)) for i, layer in enumerate(layers)]


def reference_step(
    model: torch.nn.Module, batch: Batch, choices: Any, packed: bool, first_cut: int | None,
    dtype: torch.dtype | None = E4M3,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """Loss and gradients of the plain model with masks, cuts and rounding; without rounding for ``dtype`` None."""
    structure = find_blocks(model)
    with ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(rounding(structure, packed, dtype))
        stack.enter_context(masked(model, batch, choices))
        if first_cut is not None:
            stack.enter_context(cut_context(structure, batch, first_cut))
        loss = exact_loss(model, batch)
        return loss, gradients(loss, model)


def relative_distance(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    difference = sum(float((ours[name] - reference[name]).double().square().sum()) for name in reference)
    return (difference / sum(float(g.double().square().sum()) for g in reference.values())) ** 0.5


# --- the step -----------------------------------------------------------------------------------------------------


def name_of(settings: dict[str, Any]) -> str:
    return settings["mode"] + ("_mean" if settings.get("compensate") == "mean" else "")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("mode", MODES, ids=name_of)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "bert"])
def test_a_step_is_that_of_a_plain_model_whose_frozen_layers_round(name, mode, cut, tmp_path):
    settings, first_cut = CUTS[cut]
    if first_cut is not None and name == "bert":
        pytest.skip("an encoder has no context to cut")
    model, batch = tiny(name), ragged(name, left=cut == "upper")
    handle = sparsify(model, SparsityConfig(**mode, **settings, **EMULATED), calibration=[batch], cache_dir=tmp_path)
    assert handle.packed == (name in PACKED)
    loss = model(**batch).loss
    choices = handle.choices()
    ours = gradients(loss, model)
    packed = handle.packed
    handle.remove()
    reference_loss, reference = reference_step(model, batch, choices, packed, first_cut)
    torch.testing.assert_close(loss.double(), reference_loss.double(), rtol=0, atol=1e-9)
    assert largest_difference(ours, reference) < 1e-9
    _, exact = reference_step(model, batch, choices, packed, first_cut, None)
    assert largest_difference(exact, reference) > 1e-5  # the control: the rounding is felt


@pytest.mark.parametrize(("name", "bound"), [("llama", 0.05), ("gemma", 0.115), ("gpt2", 0.1), ("bert", 0.035)])
def test_gradients_are_near_those_without_rounding_and_a_bit_less_is_farther(name, bound):
    """The bounds are between what three bits of mantissa cost and what two do."""
    model, batch = tiny(name), ragged(name)
    handle = sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    ours, packed = gradients(model(**batch).loss, model), handle.packed
    handle.remove()
    _, exact = reference_step(model, batch, {}, packed, None, None)
    _, coarser = reference_step(model, batch, {}, packed, None, torch.float8_e5m2)
    assert relative_distance(ours, exact) < bound < relative_distance(coarser, exact)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_native_is_the_setting_that_is_not_given_and_equals_no_precision_bit_for_bit(name):
    def step(settings: dict[str, Any]) -> tuple[bytes, ...]:
        model, batch = tiny(name), ragged(name)
        handle = sparsify(model.float(), SparsityConfig(mode="svd", **SPARSE, **settings))
        loss = model(**batch).loss
        computed = gradients(loss, model)
        handle.remove()
        return tuple(x.detach().numpy().tobytes() for x in (loss, *computed.values()))

    assert step({}) == step({"frozen_precision": "native"})
    assert step({}) != step(EMULATED)  # the control


def zero_token(model: Any, batch: Batch) -> None:
    model.get_input_embeddings().weight.data[batch["input_ids"][0, 2]] = 0


def outlier(model: Any, batch: Batch) -> None:
    model.get_input_embeddings().weight.data[batch["input_ids"][0, 2], 5] = 3e6


def loud_weight(model: Any, batch: Batch) -> None:
    blocks = find_blocks(model)
    base_layer(blocks.module(blocks.blocks[1].ffn.down)).weight.data[3, 4] = 2e5


@pytest.mark.parametrize("change", [zero_token, outlier, loud_weight], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_zero_rows_and_huge_outliers_round_as_any_other(name, change):
    model, batch = tiny(name), ragged(name)
    change(model, batch)
    handle = sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    loss, packed = model(**batch).loss, handle.packed
    ours = gradients(loss, model)
    handle.remove()
    reference_loss, reference = reference_step(model, batch, {}, packed, None)
    assert bool(loss.isfinite())
    torch.testing.assert_close(loss.double(), reference_loss.double(), rtol=1e-9, atol=1e-9)
    assert relative_distance(ours, reference) < 1e-7
    assert all(bool(gradient.isfinite().all()) for gradient in ours.values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_an_activation_that_is_not_finite_makes_the_loss_so(name, value):
    model, batch = tiny(name), ragged(name)
    sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    assert bool(model(**batch).loss.isfinite())
    model.get_input_embeddings().weight.data[batch["input_ids"][0, 2], 5] = value
    assert not bool(model(**batch).loss.isfinite())


def test_checkpointing_gives_the_same_gradients():
    model, batch = tiny("llama"), ragged("llama")
    handle = sparsify(model, SparsityConfig(mode="dense", context_backward="none", **EMULATED))
    plain = gradients(model(**batch).loss, model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert largest_difference(gradients(model(**batch).loss, model), plain) < 1e-12
    handle.remove()


def test_several_batches_add_up():
    model, batch = tiny("llama"), ragged("llama")
    sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    loss = [model(**{k: v[row : row + 1] for k, v in batch.items()}).loss for row in range(3)]
    summed = gradients(sum(loss), model)
    each = [gradients(model(**{k: v[row : row + 1] for k, v in batch.items()}).loss, model) for row in range(3)]
    assert largest_difference({n: sum(g[n] for g in each) for n in summed}, summed) < 1e-12


def test_labels_need_not_be_known_where_only_the_precision_changes():
    """A trainer with label smoothing or a loss of its own keeps the labels from the model."""
    model, batch = tiny("llama"), ragged("llama")
    handle = sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    ours = gradients(exact_loss(model, batch), model)
    handle.remove()
    _, reference = reference_step(model, batch, {}, True, None)
    assert largest_difference(ours, reference) < 1e-9


# --- nothing that could be fused is a pass of its own -------------------------------------------------------------


@pytest.mark.parametrize("cut", ["full", "none"])
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "o_proj"], None], ids=["attention", "all"])
@pytest.mark.parametrize("mode", [{"mode": "dense"}, {"mode": "static"} | SPARSE], ids=name_of)
def test_everything_is_quantised_where_it_is_computed(mode, targets, cut):
    model, batch = tiny("llama", targets=targets), ragged("llama")
    handle = sparsify(model, SparsityConfig(**mode, **CUTS[cut][0], **EMULATED), calibration=[batch])
    with quantisation_passes() as shapes:
        model(**batch).loss.backward()
    assert shapes == []
    handle.remove()
    handle = sparsify(tiny("gpt2"), SparsityConfig(mode="dense", **EMULATED))
    with quantisation_passes() as shapes:
        handle._structure.model(**ragged("gpt2")).loss.backward()
    assert shapes != []  # the control: block by block nobody else does it


# --- channels that fill up a choice -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "mode", [{"mode": "static", "compensate": "mean"}, {"mode": "svd", "svd_rank": 4}], ids=name_of
)
def test_a_choice_is_filled_up_to_a_multiple_without_any_effect(name, mode, monkeypatch, tmp_path):
    computed: list[int] = []
    original = BlockLinears.computed_channels

    def observed(linears: BlockLinears, channels: torch.Tensor) -> Any:
        filled, padding = original(linears, channels)
        computed.append(len(filled))
        return filled, padding

    monkeypatch.setattr(BlockLinears, "computed_channels", observed)

    def step(multiple: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
        monkeypatch.setattr(block_linears, "FP8_MULTIPLE", multiple)
        model, batch = tiny(name), ragged(name)
        settings = mode | {"svd_rank": 4, "layer_sparsity": {"layer.0": 0.42, "layer.2": 0.75}}
        handle = sparsify(model, SparsityConfig(**settings, **EMULATED), calibration=[batch], cache_dir=tmp_path)
        loss = training_loss(name, model, batch)
        choices = {place: choice.channels for place, choice in handle.choices().items()}
        counts = {(row["layer"], "ffn"): row["ffn_kept"] for row in handle.report}
        assert all(len(channels) == counts[place] for place, channels in choices.items())
        return loss, gradients(loss, model), choices

    loss, reference, choices = step(1)
    exact = set(computed)
    computed.clear()
    filled_loss, ours, filled_choices = step(16)
    assert {n % 16 for n in computed} == {0} != {n % 16 for n in exact}
    assert all(torch.equal(choices[place], filled_choices[place]) for place in choices)
    torch.testing.assert_close(filled_loss, loss, rtol=0, atol=1e-12)
    assert largest_difference(ours, reference) < 1e-12


# --- weights that wait in host memory ------------------------------------------------------------------------------


class Unreadable(FrozenWeights):
    """Weights that are NaN while they wait, so that nothing can multiply with them unnoticed."""

    def _leave(self) -> None:
        super()._leave()
        for stored in self._stored:
            copy: Any = stored.host_copy
            if copy is not None and not hasattr(stored, "hidden"):
                stored.hidden = copy.clone()  # type: ignore[attr-defined]
            if copy is not None:
                copy.fill_(torch.nan)

    def come_back(self) -> None:
        for stored in self._stored:
            if stored.host_copy is not None:
                stored.host_copy.copy_(stored.hidden)  # type: ignore[attr-defined]
        super().come_back()


class Away(Fp8Emulated):
    leaves_device = True


@pytest.fixture
def away(monkeypatch):
    monkeypatch.setitem(precision.PRECISIONS, "fp8_emulated", Away)
    monkeypatch.setattr(passes_module, "FrozenWeights", Unreadable)


def state(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items() if "lora_" not in name}


@pytest.mark.parametrize("mode", [m for m in MODES if m["mode"] != "oracle"], ids=name_of)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "llama_mha_tied"])
def test_no_pass_multiplies_with_a_weight_that_is_away(name, mode, away, tmp_path):
    model, batch = tiny(name), ragged(name)
    before = state(model)
    reference_logits = model.eval()(batch["input_ids"]).logits
    model.train()
    handle = sparsify(model, SparsityConfig(**mode, **EMULATED), calibration=[batch], cache_dir=tmp_path)
    loss = model(**batch).loss
    first = gradients(loss, model)
    assert bool(base_layer(handle._structure.module(handle._structure.blocks[0].attention.o)).weight.isnan().all())
    assert torch.equal(model.eval()(batch["input_ids"]).logits, reference_logits)
    assert state(model) == before
    model.train()
    handle._steps.number, handle._steps.passes = None, 0  # random channels are drawn by the number of the pass
    again = gradients(model(**batch).loss, model)
    assert all(torch.equal(first[parameter], again[parameter]) for parameter in first)
    handle.remove()
    assert state(model) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(precision.PRECISIONS, "fp8_emulated", Fp8Emulated)
        handle = sparsify(model, SparsityConfig(**mode, **EMULATED), calibration=[batch], cache_dir=tmp_path)
    assert torch.equal(model(**batch).loss, loss)  # the control: a precision whose weights stay
    assert not bool(base_layer(handle._structure.module(handle._structure.blocks[0].attention.o)).weight.isnan().any())


def test_a_layer_that_is_called_on_other_rows_has_its_weight(away):
    """DeBERTa's q and k see relative positions as well: their weights stay where they are."""
    model, batch = tiny("deberta"), ragged("deberta")
    handle = sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    loss = model(**batch).loss
    assert bool(loss.isfinite())
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad and p.grad is not None)
    handle.remove()


def test_a_part_that_is_called_by_itself_has_its_weights(away):
    model, batch = tiny("llama"), ragged("llama")
    sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    model(**batch).loss.backward()
    model.eval()
    assert bool(model.get_base_model().model(batch["input_ids"])[0].isfinite().all())


def test_generation_is_that_of_the_plain_model(away):
    model, batch = tiny("llama").float(), ragged("llama")
    prompt = {"input_ids": batch["input_ids"][:1, :4], "attention_mask": batch["attention_mask"][:1, :4]}
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    reference = model.eval().generate(**prompt, **arguments)
    handle = sparsify(model.train(), SparsityConfig(mode="dense", **EMULATED))
    model(**batch).loss.backward()
    assert torch.equal(model.eval().generate(**prompt, **arguments), reference)
    handle.remove()


def test_the_model_can_be_saved_moved_and_merged_afterwards(away, tmp_path):
    model, batch = tiny("llama"), ragged("llama")
    merged = copy.deepcopy(model).merge_and_unload()
    handle = sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    model(**batch).loss.backward()
    model.save_pretrained(tmp_path)
    model.to("cpu", torch.float64)
    handle.remove()
    model.get_base_model().save_pretrained(tmp_path / "base")
    ours = model.merge_and_unload()
    assert state(ours) == state(merged)


def test_a_refresh_of_the_calibration_sees_the_weights(away):
    model, batch = tiny("llama"), ragged("llama")
    settings = {"mode": "surrogate", "surrogate_rank": 4, "surrogate_channels": 9, "surrogate_refresh_steps": 2}
    handle = sparsify(model, SparsityConfig(**settings, **SKIPPED, **EMULATED), calibration=[batch])
    for step in range(4):
        handle.begin_step(step, 4)
        loss = model(**batch).loss
        loss.backward()
        assert bool(loss.isfinite())
        handle.end_step()
    handle.remove()


def write(layer: Any) -> None:
    with torch.no_grad():
        layer.weight[0, 0] += 1


def replace_weight(layer: Any) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("change", [write, replace_weight], ids=lambda change: change.__name__)
@pytest.mark.parametrize("leaves", [False, True])
def test_a_weight_that_changes_under_its_copy_is_refused(leaves, change, trained, monkeypatch):
    monkeypatch.setitem(precision.PRECISIONS, "fp8_emulated", Away if leaves else Fp8Emulated)
    model, batch = tiny("llama"), ragged("llama")
    sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    if trained:
        model(**batch).loss.backward()
        model.eval()(batch["input_ids"])
        model.train()
    change(model.get_base_model().model.layers[2].mlp.down_proj.base_layer)
    with pytest.raises(InputError, match="changed or replaced after sparsify, and its fp8 copy was not"):
        model(**batch)


def test_writing_the_same_numbers_again_is_no_change(away):
    """DistributedDataParallel sends the first process's weights to all when it is made."""
    model, batch = tiny("llama"), ragged("llama")
    sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    loss = model(**batch).loss
    model.eval()(batch["input_ids"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.clone())
    assert torch.equal(model.train()(**batch).loss, loss)


def test_a_merged_adapter_is_not_left_out_in_silence():
    model, batch = tiny("llama"), ragged("llama")
    sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    model.merge_adapter()
    with pytest.raises(InputError, match="merged into its weight"):
        model(**batch)


def test_nothing_of_the_copies_is_left_after_remove(away):
    model, batch = tiny("llama"), ragged("llama")
    handle = sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    model(**batch).loss.backward()

    def bytes_held() -> int:
        linears = [plan.linears for plan in handle._plans]
        layers = [layer for each in linears for layer in (*each.all, each.first, each.qkv)]
        copies = sum(layer.fp8.nbytes for layer in layers if layer.fp8 is not None)
        return copies + sum(s.host_copy.nbytes for s in handle._passes.frozen._stored if s.host_copy is not None)

    assert bytes_held() > 0
    handle.remove()
    assert bytes_held() == 0


# --- evaluation in the memory of the copies -------------------------------------------------------------------------


def in_bf16() -> tuple[Any, Batch, dict[str, torch.Tensor], torch.Tensor]:
    """A model whose weights have as many bytes as their copies, its batch, frozen weights and logits."""
    model, batch = tiny("llama").to(torch.bfloat16), ragged("llama")
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    logits = model.eval()(batch["input_ids"]).logits
    return model.train(), batch, weights, logits


def linear_weights(handle: Any) -> list[torch.Tensor]:
    return [linear.base.weight for plan in handle._plans for linear in plan.linears.all]


def copies_of(handle: Any) -> list[Any]:
    return [layer.fp8 for plan in handle._plans for layer in plan.linears.products]


def test_an_evaluation_has_16_bit_weights_where_their_copies_are(away):
    model, batch, weights, logits = in_bf16()
    handle = sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    first = gradients(model(**batch).loss, model)
    memories = [copies.memory.storage for copies in copies_of(handle)]  # held, so that their places stay taken
    storages = {memory.untyped_storage().data_ptr() for memory in memories}
    values = [(copies.forward.values.data_ptr(), copies.forward.values.view(torch.uint8).clone())
              for copies in copies_of(handle)]  # fmt: skip
    for _ in range(2):
        assert torch.equal(model.eval()(batch["input_ids"]).logits, logits)
        assert {weight.untyped_storage().data_ptr() for weight in linear_weights(handle)} == storages
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
        again = gradients(model.train()(**batch).loss, model)
        assert all(torch.equal(first[name], again[name]) for name in first)
        for copies, (place, numbers) in zip(copies_of(handle), values):
            assert copies.forward.values.data_ptr() == place
            assert torch.equal(copies.forward.values.view(torch.uint8), numbers)
    model.eval()(batch["input_ids"])
    handle.remove()  # while the weights are in borrowed memory
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    assert storages.isdisjoint({weight.untyped_storage().data_ptr() for weight in linear_weights(handle)})


@pytest.mark.parametrize("is_returned", [True, False])
def test_an_evaluation_between_a_pass_and_its_backward_changes_nothing(is_returned, away):
    model, batch, _, _ = in_bf16()
    handle = sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    plain = gradients(model(**batch).loss, model)
    loss = model(**batch).loss
    model.eval()(batch["input_ids"])
    if not is_returned:  # the control: products with the bytes of the weights
        for copies in copies_of(handle):
            copies.memory.reclaim = None
    computed = gradients(loss, model)
    assert all(torch.equal(plain[name], computed[name]) for name in plain) == is_returned


def test_what_merging_leaves_behind_is_not_quantised(away):
    model, batch, weights, _ = in_bf16()
    handle = sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    first = gradients(model(**batch).loss, model)
    model.eval()(batch["input_ids"])
    model.merge_adapter()
    model.unmerge_adapter()
    assert not all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    again = gradients(model.train()(**batch).loss, model)
    assert all(torch.equal(first[name], again[name]) for name in first)
    handle.remove()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)


def test_wider_weights_come_back_next_to_their_copies(away):
    model, batch = tiny("llama").float(), ragged("llama")
    handle = sparsify(model, SparsityConfig(mode="dense", **EMULATED))
    model(**batch).loss.backward()
    model.eval()(batch["input_ids"])
    storages = {copies.memory.storage.untyped_storage().data_ptr() for copies in copies_of(handle)}
    assert storages.isdisjoint({weight.untyped_storage().data_ptr() for weight in linear_weights(handle)})


@pytest.mark.parametrize("cut", ["full", "none"])
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "o_proj"], None], ids=["attention", "all"])
def test_no_more_is_kept_for_the_backward_pass_than_without_fp8(targets, cut):
    def kept(settings: dict[str, Any]) -> int:
        model, batch = tiny("llama", targets=targets).float(), ragged("llama")
        sparsify(model, SparsityConfig(mode="dense", **CUTS[cut][0], **settings))
        return bytes_kept(model, batch["input_ids"], batch["labels"])

    assert kept(EMULATED) <= kept({})


# --- on a GPU -----------------------------------------------------------------------------------------------------


def wide_model() -> torch.nn.Module:
    """A Llama in bf16 whose sides are multiples of 16, with a LoRA on attention."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 160}
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2)).to("cuda", torch.bfloat16)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.train()


@pytest.mark.gpu
@pytest.mark.parametrize("cut", ["full", "none"])
@pytest.mark.parametrize(
    "mode",
    [
        {"mode": "dense"},
        {"mode": "random_fixed", "ffn_sparsity": 0.93},
        {"mode": "random_fixed", "ffn_sparsity": 0.5, "attention_sparsity": 0.7},  # 40 channels of q, k and v
    ],
    ids=["dense", "ffn", "attention"],
)
def test_tensor_cores_are_near_the_emulation_and_the_weights_come_back(mode, cut):
    batch = {name: value.cuda() for name, value in ragged("llama").items()}
    computed: dict[str, dict[str, torch.Tensor]] = {}
    for frozen_precision in ("native", "fp8_emulated", "fp8"):
        model = wide_model()
        weight = model.get_base_model().model.layers[1].mlp.up_proj.weight
        before = weight.detach().clone()
        logits = model.eval()(batch["input_ids"]).logits
        handle = sparsify(model.train(), SparsityConfig(**mode, **CUTS[cut][0], frozen_precision=frozen_precision))
        for _ in range(3):  # the later passes replay a graph
            model.zero_grad()
            model(**batch).loss.backward()
        computed[frozen_precision] = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        assert weight.is_cuda == (frozen_precision != "fp8")
        assert torch.equal(model.eval()(batch["input_ids"]).logits, logits)
        assert weight.is_cuda
        handle.remove()
        assert torch.equal(weight, before)
    rounding_error = relative_distance(computed["fp8_emulated"], computed["native"])
    assert relative_distance(computed["fp8"], computed["fp8_emulated"]) < 0.7 * rounding_error
    assert 1e-3 < rounding_error < 0.5


@pytest.mark.gpu
def test_an_evaluation_needs_no_more_memory_than_that_of_the_plain_model():
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2)).to("cuda", torch.bfloat16)
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    batch = {name: value.cuda() for name, value in ragged("llama").items()}

    def evaluated() -> tuple[int, torch.Tensor]:
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            logits = model.eval()(batch["input_ids"]).logits
        return torch.cuda.max_memory_allocated(), logits

    evaluated()
    dense, logits = evaluated()
    handle = sparsify(model.train(), SparsityConfig(mode="dense", frozen_precision="fp8"))
    losses = [model(**batch).loss.detach() for _ in range(3)]  # the later passes replay a graph
    captures = handle.graphs[0]
    ours, logits_again = evaluated()
    copies = sum(copies.nbytes for copies in copies_of(handle))
    assert copies > 200e6  # the control: on top of the weights they would be seen
    assert ours < dense + 0.25 * copies
    assert torch.equal(logits_again, logits)
    assert torch.equal(model.train()(**batch).loss, losses[-1])
    assert handle.graphs[0] == captures  # the copies are where the graph reads them
    handle.remove()


# --- what cannot be done -------------------------------------------------------------------------------------------


def test_a_device_without_fp8_is_refused_and_the_model_is_as_it_was():
    model, batch = tiny("llama"), ragged("llama")
    reference = model(**batch).loss
    with pytest.raises(InputError, match=r"need an NVIDIA GPU of compute capability 8\.9 or more, and this is cpu"):
        sparsify(model, SparsityConfig(mode="dense", frozen_precision="fp8"))
    assert torch.equal(model(**batch).loss, reference)
