"""Without a backward pass through the context, gradients are those of a model whose context keys and values are cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.handle import sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.structure import Structure, find_blocks
from sparselora.errors import InputError
from tests.helpers.contextual_models import PACKED, bytes_kept, exact_loss, masked, ragged, tiny

Batch = dict[str, torch.Tensor]

SPARSE = {"layer_sparsity": {"layer.0": 0.6, "layer.2": 0.75, "layer.1-2.attention": 0.5}, "svd_rank": 4}
SKIPPED = {"layer_sparsity": {"layer.0": 0.6, "layer.1": 0.75}}
CUTS: dict[str, dict[str, Any]] = {
    "none": {"context_backward": "none"},
    "upper": {"context_backward": "upper", "context_backward_share": 0.4},
}


@contextmanager
def cut_context(structure: Structure, batch: Batch, first_layer: int) -> Iterator[None]:
    """Detach keys and values of context positions in the layers from ``first_layer`` on: the definition."""
    layout = TokenLayout.build(batch["attention_mask"], batch["labels"])
    context = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    context[layout.tokens[: layout.n_context]] = True
    context = context.view(batch["input_ids"].shape)[..., None]
    with ExitStack() as hooks:
        for block in structure.blocks[first_layer:]:
            heads = block.attention
            for name in {heads.q} if heads.fused else {heads.k, heads.v}:
                handle = structure.module(name).register_forward_hook(
                    lambda _module, _inputs, output: torch.where(context, output.detach(), output)
                )
                hooks.callback(handle.remove)
        yield


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    computed = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), computed)}


def largest_difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    return max(float((ours[name] - reference[name]).abs().max()) for name in reference)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    "mode",
    [
        {"mode": "dense"},
        {"mode": "svd"} | SPARSE,
        {"mode": "static"} | SPARSE,
        {"mode": "random"} | SPARSE,
        {"mode": "surrogate", "surrogate_rank": 4, "surrogate_channels": 9} | SKIPPED,
        {"mode": "skip"} | SKIPPED,
    ],
    ids=lambda settings: settings["mode"],
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "olmo_clipped"])
def test_gradients_are_those_of_a_model_with_cut_keys_and_values(name, mode, cut, tmp_path):
    model, batch = tiny(name), ragged(name, left=cut == "upper")
    config = SparsityConfig(**mode, **CUTS[cut])
    handle = sparsify(model, config, calibration=[batch], cache_dir=tmp_path)
    assert handle.packed == (name in PACKED)
    loss = model(**batch).loss
    choices = handle.choices()
    ours = gradients(loss, model)
    handle.remove()
    structure = find_blocks(model)
    with masked(model, batch, choices):
        with cut_context(structure, batch, {"none": 0, "upper": 2}[cut]):
            reference_loss = exact_loss(model, batch)
            reference = gradients(reference_loss, model)
        full = gradients(exact_loss(model, batch), model)
    torch.testing.assert_close(loss.double(), reference_loss.double(), rtol=0, atol=1e-10)
    assert largest_difference(ours, reference) < 1e-10
    assert largest_difference(full, reference) > 1e-4  # the control: the cut is felt


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_upper_share_of_all_layers_is_the_full_backward_pass(name):
    model, batch = tiny(name), ragged(name)
    full = gradients(exact_loss(model, batch), model)
    handle = sparsify(model, SparsityConfig(mode="dense", context_backward="upper", context_backward_share=1.0))
    ours = gradients(model(**batch).loss, model)
    handle.remove()
    assert largest_difference(ours, full) < 1e-10


def test_nothing_of_the_context_is_kept_for_the_backward_pass():
    """With a long prompt, next to nothing is left of what autograd keeps but the buffers of attention."""
    ids = torch.randint(2, 64, (3, 30), generator=torch.Generator().manual_seed(2))
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]

    def kept(settings: dict[str, Any]) -> int:
        model = tiny("llama")
        sparsify(model, SparsityConfig(mode="dense", **settings))
        return bytes_kept(model, ids, labels)

    layer = 3 * 30 * 8 * (2 * (40 + 2 * 20) + 40 + 4)  # q, k, v twice (keys of all heads), output, log-sum-exp
    assert kept(CUTS["none"]) < 3 * layer < 0.6 * kept({})


def test_an_encoder_has_no_context_to_cut():
    with pytest.raises(InputError, match="context_backward none needs a causal language model"):
        sparsify(tiny("bert"), SparsityConfig(mode="dense", context_backward="none"))


def test_a_pass_without_labels_is_refused():
    model, batch = tiny("llama"), ragged("llama")
    sparsify(model, SparsityConfig(mode="dense", context_backward="none"))
    with pytest.raises(InputError, match="no labels"):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp"])
def test_a_layer_that_is_replaced_afterwards_is_noticed(part):
    model, batch = tiny("gemma"), ragged("gemma")
    sparsify(model, SparsityConfig(mode="dense", context_backward="none"))
    layer = find_layer(model).get_submodule(part)
    del layer.__dict__["forward"]
    with pytest.raises(InputError, match="should be cheaper"):
        model(**batch)


def find_layer(model: Any) -> torch.nn.Module:
    return model.get_base_model().model.layers[1]


def test_checkpointing_gives_the_same_gradients():
    model, batch = tiny("llama"), ragged("llama")
    handle = sparsify(model, SparsityConfig(mode="dense", context_backward="none"))
    plain = gradients(model(**batch).loss, model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert largest_difference(gradients(model(**batch).loss, model), plain) < 1e-12
    handle.remove()
