"""A mixture of small LoRAs, one active for a token: against an explicit loop over tokens, with autograd through it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sparselora.config.token_gates import TokenGateConfig
from sparselora.errors import InputError
from sparselora.models import lora
from sparselora.token_gates.gates import (
    attach_token_gates,
    gate_flops_per_token,
    gate_parameters,
    load_token_gates,
    save_token_gates,
)
from sparselora.token_gates.scores import BALANCE, Pass, routed_product
from tests.helpers.contextual_models import ragged, tiny
from tests.token_gates.test_token_gate import assert_same, backward

Tensor = torch.Tensor
R, EXPERTS = 6, 3
ROUTED = {"policy": "routed", "budget": 1 / EXPERTS}
TARGETS = ["q_proj", "down_proj"]


def routed(seed: int = 0) -> tuple[Any, Any]:
    model = tiny("llama", targets=TARGETS, r=R)
    torch.manual_seed(seed)
    return model, attach_token_gates(model, TokenGateConfig(**ROUTED))


def explicit(model: Any, routers: dict[str, Tensor], batch: dict[str, Tensor], balance: float) -> Tensor:
    """Loss of the same model, whose LoRA layers go from token to token, each with one of three separate small LoRAs."""
    valid, terms = batch["attention_mask"].bool().flatten(), []
    for name, layer in lora.lora_layers(model).items():
        A, B = lora.weights(layer)
        size = R // EXPERTS
        small = [(A[e * size : (e + 1) * size], B[:, e * size : (e + 1) * size]) for e in range(EXPERTS)]

        def forward(x: Tensor, layer: Any = layer, small: Any = small, W: Tensor = routers[name]) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            p = (flat.detach().float() @ W.T).softmax(dim=-1)
            experts, rows = p.argmax(dim=-1).tolist(), []
            for token, e in enumerate(experts):
                factor = p[token, e] / p[token, e].detach()
                rows.append(factor * layer.scaling["default"] * (small[e][1] @ (small[e][0] @ flat[token])))
            counted = [e for e, counts in zip(experts, valid.tolist()) if counts]
            load = torch.tensor([counted.count(e) / len(counted) for e in range(EXPERTS)])
            terms.append(EXPERTS * (load * p[valid].mean(dim=0)).sum())
            return layer.base_layer(x) + torch.stack(rows).reshape(*x.shape[:-1], -1)

        layer.forward = forward
    loss = model(**batch).loss
    return loss + balance * sum(terms), loss


def gradients(loss: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_losses_and_gradients_are_those_of_separate_small_loras_and_a_balance_term(scale: float) -> None:
    batch = ragged("llama")
    assert not batch["attention_mask"].all()
    model, gates = routed()
    heads = {gate.name: gate.head.weight for gate in gates}
    for weight in heads.values():
        weight.data.mul_(20)  # routers that are sure of themselves
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(**batch).loss
    ours = gradients(loss * scale, named)

    plain = tiny("llama", targets=TARGETS, r=R)
    routers = {name: weight.detach().clone().requires_grad_(True) for name, weight in heads.items()}
    total, task = explicit(plain, routers, batch, BALANCE)
    assert loss.item() == pytest.approx(task.item(), rel=1e-12), "the term is no part of the loss's value"
    theirs = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    wanted = gradients(total * scale, theirs | {f"router {name}": weight for name, weight in routers.items()})
    for name, gradient in ours.items():
        is_router = "token_gates" in name
        key = next(f"router {n}" for n, w in heads.items() if w is named[name]) if is_router else name
        torch.testing.assert_close(gradient.double(), wanted[key].double(), rtol=1e-4, atol=1e-9)
        if is_router:
            assert gradient.abs().max() > 1e-6
    # The control: without the balance the routers' gradients are others.
    plain = tiny("llama", targets=TARGETS, r=R)
    routers = {name: weight.detach().clone().requires_grad_(True) for name, weight in heads.items()}
    _, task = explicit(plain, routers, batch, 0.0)
    for name, gradient in gradients(task * scale, routers).items():
        assert (gradient - wanted[f"router {name}"]).abs().max() > 1e-3 * gradient.abs().max()


def test_one_expert_is_active_for_every_token_and_all_are_used() -> None:
    model, gates = routed()
    model.eval()
    with torch.no_grad():
        model(**ragged("llama"))
    assert gates.active_share() == pytest.approx(1 / EXPERTS)
    used = 0
    for share in gates.frequency().values():
        by_expert = share.reshape(EXPERTS, -1)
        assert (by_expert == by_expert[:, :1]).all()  # an expert is whole
        assert by_expert[:, 0].sum() == pytest.approx(1)
        used += (by_expert[:, 0] > 0).sum()
    assert used > 2 * len(list(gates))
    for name, channels in gates.static_subset().items():
        share = gates.frequency()[name]
        assert np.array_equal(channels, np.sort(np.argsort(-share, kind="stable")[: R // EXPERTS]))
    d_in = [gate.d_in for gate in gates]
    assert gate_parameters(gates) == EXPERTS * sum(d_in)
    assert gate_flops_per_token(gates) == 2 * EXPERTS * sum(d_in)


def test_the_balance_evens_out_a_router_that_prefers_one_expert() -> None:
    """The term alone: a router at whose experts nothing is to be learned, and all tokens begin at one of them."""
    shares = {}
    for has_term in (True, False):
        torch.manual_seed(0)
        x, W = torch.randn(400, 8), torch.randn(EXPERTS, 8) * 0.1
        x[:, 0] = 1.0
        W[0, 0] = 0.4
        W.requires_grad_(True)
        for _ in range(400):
            p = (x @ W.T).softmax(dim=-1)
            load = torch.bincount(p.argmax(dim=-1), minlength=EXPERTS) / len(x)
            run = Pass()
            run.scale = torch.tensor(1.0)
            product, _ = routed_product(
                torch.zeros(400, R, requires_grad=True), x @ W.T, run if has_term else None, torch.ones(400).bool()
            )
            (gradient,) = torch.autograd.grad(product.sum(), W, allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                W -= 100 * gradient
        shares[has_term] = float(load.max())
    assert shares[False] > 0.6
    assert shares[True] < 0.42


def test_a_mixture_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    model, gates = routed(seed=5)
    save_token_gates(model, tmp_path)
    batch = ragged("llama")
    model.eval()
    with torch.no_grad():
        before = model(**batch).logits
    other = tiny("llama", targets=TARGETS, r=R)
    loaded = load_token_gates(other, tmp_path)
    other.eval()
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, before)
        loaded.remove()
        assert not torch.equal(other(**batch).logits, before), "the control: all experts at once"
    third = [gate.head.weight for gate in routed(seed=5)[1]]
    assert all(torch.equal(a, gate.head.weight) for a, gate in zip(third, gates))
    assert not torch.equal(third[0], next(iter(routed(seed=6)[1])).head.weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    batch, (model, _) = ragged("llama"), routed()
    model.enable_input_require_grads()
    loss, expected = backward(model, batch)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, found = backward(model, batch)
    assert torch.equal(again, loss)
    assert_same(found, expected, rtol=1e-6, atol=1e-9)


def test_bf16_autocast_and_bf16_models_train() -> None:
    model = tiny("llama", targets=TARGETS, r=R).float()
    attach_token_gates(model, TokenGateConfig(**ROUTED))
    for whole in (model, model.to(torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            loss, found = backward(whole, ragged("llama"))
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert any("token_gates" in name and gradient.any() for name, gradient in found.items())


def test_what_makes_no_mixture_is_refused() -> None:
    for wrong, message in (
        ({"budget": 0.3}, "budget must be 1 / 2"),
        ({"basis": "singular"}, "leave basis singular"),
        ({"anneal_ratio": 0.2}, "anneal_ratio out"),
        ({"select": "threshold"}, "needs policy learned"),
    ):
        with pytest.raises(InputError, match=message):
            TokenGateConfig(**(ROUTED | wrong))
    with pytest.raises(InputError, match="rank 5, which 3 experts cannot share"):
        attach_token_gates(tiny("llama", targets=TARGETS, r=5), TokenGateConfig(**ROUTED))
    model, gates = routed()
    gates.set_budget(1)
    with pytest.raises(InputError, match=r"a mixture of 3 has budget 0\.333"):
        gates.set_budget(0.5)
    gates.set_budget(1 / EXPERTS)
    loss = F.cross_entropy(model(input_ids=torch.arange(2, 8)[None]).logits[0], torch.arange(6))
    with pytest.raises(InputError, match="through the model's own loss"):
        loss.backward()
    assert math.isclose(gates.budget, 1 / EXPERTS)
