"""A sparse pass equals the masked model that defines it, for every architecture, in float64, with all gradients."""

from __future__ import annotations

import pytest
import torch
from contextual_models import DECODERS, ENCODERS, PACKED, exact_loss, masked, ragged, tiny

from sparselora.config import SparsityConfig
from sparselora.contextual.schedule import sparsify

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
    ours = model(**batch).loss
    handle.remove()
    assert_same(ours, exact_loss(model, batch), model)


@pytest.mark.parametrize("mode", ["svd", "oracle", "random", "static"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", ALL)
def test_sparse_pass_equals_the_masked_model(name, left, mode, tmp_path):
    model, batch = tiny(name), ragged(name, left)
    handle = sparsify(model, SparsityConfig(mode=mode, **SPARSE), calibration=[batch], cache_dir=tmp_path)
    ours = model(**batch).loss
    choices = handle.choices()
    handle.remove()
    assert set(choices) == {(0, "ffn"), (2, "ffn"), (1, "attention"), (2, "attention")} - (
        {(2, "ffn")} if name in PACKED else set()
    )
    with masked(model, batch, choices):
        assert_same(ours, exact_loss(model, batch), model)
    assert abs(float(ours - exact_loss(model, batch))) > 1e-6  # the control: it is not the dense model
