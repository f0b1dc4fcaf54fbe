"""Token gates: what they cost, the singular basis, what they refuse, and a GPU."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from sparselora.config.token_gates import TokenGateConfig
from sparselora.errors import InputError
from sparselora.models import lora
from sparselora.numerics.channels import keep_count
from sparselora.token_gates.gates import (
    active_adapter_flops_per_token,
    attach_token_gates,
    calibrate,
    find_token_gates,
    gate_flops_per_token,
    gate_parameters,
    save_token_gates,
)
from tests.helpers.contextual_models import ragged, tiny
from tests.token_gates.test_token_gate import R, Tensor, assert_same, backward, gated, recorded

# --- costs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parameters", "flops"),
    [
        ({}, (10 + 1) * 5, 2 * 10 * 5 + 2 * 24 * 3),
        ({"features": "statistics"}, (4 + 1) * 5, 2 * 4 * 5 + 4 * 2 * 24),
        ({"features": "both"}, (14 + 1) * 5, 2 * 14 * 5 + 4 * 2 * 24 + 2 * 24 * 3),
        ({"policy": "energy"}, 0, 2 * 24 * 3),
        ({"policy": "static"}, 0, 0),
        ({"policy": "random"}, 0, 0),
    ],
)
def test_costs(settings: dict[str, Any], parameters: int, flops: int) -> None:
    model, gates = gated("bert", targets=["query"], budget=0.4, **settings)  # three modules, 24 → 24, r 5, k 2
    assert gate_parameters(gates) == 3 * parameters
    assert gate_flops_per_token(gates) == 3 * flops
    assert active_adapter_flops_per_token(gates) == 3 * 2 * 48 * 2
    model.eval()(**ragged("bert"))
    assert active_adapter_flops_per_token(gates, gates.active_rank()) == 3 * 2 * 48 * 2
    gates.set_budget(1)
    assert gate_flops_per_token(gates) == 0
    assert active_adapter_flops_per_token(gates) == lora.adapter_flops_per_token(model)


# --- the singular basis --------------------------------------------------------------------------------------------


def test_static_in_the_singular_basis_is_truncation() -> None:
    gated_model, gates = gated("bert", policy="static", basis="singular", budget=0.4)
    truncated = tiny("bert", r=R)
    gates.begin()
    lora.truncate_svd(truncated, 0.4, "module")
    torch.testing.assert_close(gated_model(**ragged("bert")).logits, truncated(**ragged("bert")).logits)


def test_in_the_singular_basis_energy_is_the_best_choice_for_every_token() -> None:
    """Of all subsets of k it changes each token's output least; in another basis some other subset often does."""
    turned, plain = tiny("bert", r=R), tiny("bert", r=R)
    lora.turn_to_singular(turned)
    worse = {}
    for name, model in (("turned", turned), ("plain", plain)):
        gates = attach_token_gates(model, TokenGateConfig(policy="energy", budget=0.4))
        with recorded(model) as seen, torch.no_grad():
            model.eval()(**ragged("bert"))
        errors = []
        for module, layer in lora.lora_layers(model).items():
            B, z = lora.weights(layer)[1].detach(), seen[module].z.flatten(0, -2)
            chosen = ((z - seen[module].y.flatten(0, -2)) @ B.T).norm(dim=-1)
            subsets = torch.tensor([[k in kept for k in range(R)] for kept in itertools.combinations(range(R), 2)])
            least = (torch.where(subsets[:, None], 0.0, z) @ B.T).norm(dim=-1).min(dim=0).values
            errors.append(chosen / least)
        worse[name] = torch.cat(errors).max()
        gates.remove()
    assert worse["turned"] < 1 + 1e-4
    assert worse["plain"] > 1.01


# --- what is refused -----------------------------------------------------------------------------------------------


def test_what_cannot_be_gated_is_refused() -> None:
    model, gates = gated("bert")
    with pytest.raises(InputError, match="has token gates already; call remove"):
        attach_token_gates(model, TokenGateConfig())
    for budget in (0, 1.5, float("nan"), "half"):
        with pytest.raises(InputError, match="budget must be"):
            gates.set_budget(budget)
    with pytest.raises(InputError, match="select topk"):
        calibrate(model, [ragged("bert")])
    with pytest.raises(InputError, match="no token was counted"):
        gates.static_subset()
    gates.remove()
    for call in (find_token_gates, lambda m: save_token_gates(m, "nowhere"), lambda m: calibrate(m, [])):
        with pytest.raises(InputError, match="has no token gates"):
            call(model)
    with pytest.raises(InputError, match="need a PEFT model, got Bert"):
        attach_token_gates(tiny("bert", lora=False), TokenGateConfig())
    with pytest.raises(InputError, match="no LoRA layer of adapter 'other'"):
        attach_token_gates(model, TokenGateConfig(), "other")
    model.peft_config["default"].bias = "all"
    with pytest.raises(InputError, match="bias='all'"):
        attach_token_gates(model, TokenGateConfig())


# --- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["learned", "energy", "static", "random"])
def test_a_gpu_decides_and_trains_as_the_cpu_does(policy: str) -> None:
    model, gates = gated("bert", policy=policy, budget=0.4)
    model.double().eval()
    batch = ragged("bert")
    logits = model(**batch).logits
    moved = copy.deepcopy(model).to("cuda")
    on_gpu = {name: value.to("cuda") for name, value in batch.items()}
    if policy != "random":
        torch.testing.assert_close(moved(**on_gpu).logits.cpu(), logits, rtol=1e-9, atol=1e-9)
        assert_same(gradients_on_cpu(moved, on_gpu), backward(model.train(), batch)[1], rtol=1e-4, atol=1e-6)
    counted = find_token_gates(moved)
    counted.reset_counts()
    moved.eval()(**on_gpu)
    assert set(counted.active_rank().values()) == {float(keep_count(R, 0.4))}
    counted.set_budget(1)
    gates.remove()
    torch.testing.assert_close(moved(**on_gpu).logits.cpu(), model.eval()(**batch).logits, rtol=1e-9, atol=1e-9)


def gradients_on_cpu(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient.cpu() for name, gradient in backward(model.train(), batch)[1].items()}
