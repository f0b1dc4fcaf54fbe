"""Token gates: exact budgets, gradients of a stated loss, and a model that is itself again without them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import binary_cross_entropy, linear

from sparselora.config.token_gates import TokenGateConfig
from sparselora.errors import InputError
from sparselora.models import lora
from sparselora.numerics.channels import keep_count
from sparselora.token_gates.gates import (
    TokenGateCallback,
    TokenGates,
    attach_token_gates,
    calibrate,
    find_token_gates,
    gate_parameters,
)
from sparselora.token_gates.scores import Objective, Pass, gated_product, projection_features
from tests.helpers.contextual_models import ragged, tiny
from tests.token_gates.test_gate_scores import top

Tensor = torch.Tensor
R = 5


def gated(name: str, *, targets: Any = None, r: int = R, **settings: Any) -> tuple[PeftModel, TokenGates]:
    model = tiny(name, targets=targets, r=r)
    return model, attach_token_gates(model, TokenGateConfig(**settings))


def perturb(gates: TokenGates, size: float = 0.3) -> None:
    """Heads that are no longer the energy."""
    generator = torch.Generator().manual_seed(7)
    for gate in gates:
        for parameter in gate.head.parameters():
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


@contextmanager
def recorded(model: PeftModel) -> Iterator[dict[str, SimpleNamespace]]:
    """What goes into lora_A (x), A x (z) and what comes out of its gate (y), by module; y keeps its gradient."""
    seen: dict[str, SimpleNamespace] = {}
    hooks = []
    for name, layer in lora.lora_layers(model).items():

        def note(module: Any, inputs: Any, y: Tensor, name: str = name) -> None:
            if y.requires_grad:
                y.retain_grad()
            seen[name] = SimpleNamespace(x=inputs[0].detach(), z=linear(inputs[0], module.weight).detach(), y=y)

        hooks.append(layer.lora_A["default"].register_forward_hook(note))
    yield seen
    for hook in hooks:
        hook.remove()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model: nn.Module, batch: dict[str, Tensor], scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    (loss * scale).backward()
    return loss.detach(), gradients(model)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


# --- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["learned", "energy", "static", "random"])
@pytest.mark.parametrize(("r", "budget"), [(5, 0.5), (5, 0.2), (8, 0.25), (7, 0.9), (1, 0.5), (3, 1.0)])
def test_every_token_has_exactly_its_budget(policy: str, r: int, budget: float) -> None:
    model, gates = gated("bert", targets=["query", "value"], r=r, policy=policy, budget=budget)
    model.eval()
    with recorded(model) as seen, torch.no_grad():
        model(**ragged("bert"))
    k = keep_count(r, budget)
    for part in seen.values():
        assert ((part.y != 0).sum(-1) == k).all()
        assert torch.equal(part.y, torch.where(part.y != 0, part.z, 0.0))
    assert gates.active_share() == pytest.approx(k / r)
    assert set(gates.active_rank().values()) == {float(k)}


def test_energy_is_the_size_of_the_channels_output() -> None:
    model, _ = gated("llama", policy="energy", budget=0.4)
    model.eval()
    with recorded(model) as seen, torch.no_grad():
        model(**ragged("llama"))
    for name, layer in lora.lora_layers(model).items():
        B = lora.factors(layer)[1]
        outputs = seen[name].z.numpy()[..., :, None] * B.T  # B_k z_k, for every token and channel
        chosen = seen[name].y.numpy() != 0
        assert (chosen == top(np.linalg.norm(outputs, axis=-1), 2)).all()


@pytest.mark.parametrize("features", ["projection", "both"])
@pytest.mark.parametrize("name", ["distilbert", "qwen2"])
def test_a_learned_gate_starts_as_the_energy_gate(name: str, features: str) -> None:
    batch = ragged(name)
    energy, _ = gated(name, policy="energy", budget=0.4)
    learned, gates = gated(name, features=features, budget=0.4)
    assert torch.equal(learned(**batch).logits, energy(**batch).logits)
    perturb(gates)  # the control
    assert not torch.equal(learned(**batch).logits, energy(**batch).logits)


@pytest.mark.parametrize("basis", ["channels", "singular"])
def test_a_static_gate_ranks_the_adapter_as_it_is_when_it_begins(basis: str) -> None:
    batch = ragged("bert")
    model, gates = gated("bert", policy="static", basis=basis, budget=0.4)
    model(**batch)  # takes a ranking
    for layer in lora.lora_layers(model).values():
        lora.weights(layer)[1].data *= torch.arange(R, 0.0, -1) ** 3
    stale = [gate.ranking.clone() for gate in gates]
    gates.begin()
    model(**batch)
    for gate in gates:
        assert (gate.ranking.numpy() == np.argsort(-gate.energies(), kind="stable")).all()
    assert any(not torch.equal(gate.ranking, old) for gate, old in zip(gates, stale, strict=True))


def test_the_callback_begins_when_the_warm_up_is_over() -> None:
    model, gates = gated("bert", basis="singular", budget=0.4, warmup_ratio=0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    callback = TokenGateCallback(gates)
    turned = []
    for number in range(4):
        before = [lora.weights(layer)[0].clone() for layer in lora.lora_layers(model).values()]
        callback.on_step_begin(None, SimpleNamespace(global_step=number, max_steps=4), None, optimizer=optimizer)
        after = [lora.weights(layer)[0] for layer in lora.lora_layers(model).values()]
        turned.append(not all(map(torch.equal, before, after)))
    assert turned == [False, False, True, False]


@pytest.mark.parametrize("basis", ["channels", "singular"])
def test_gates_begin_from_the_adapter_as_it_is_then(basis: str) -> None:
    """Attached before the adapter had learned anything, and begun after: the scores are the energies of then."""
    batch, models = ragged("bert"), []
    for policy in ("learned", "energy"):
        model, gates = gated("bert", policy=policy, basis=basis, budget=0.4)
        for layer in lora.lora_layers(model).values():
            lora.weights(layer)[1].data *= torch.arange(1.0, R + 1)
        before = model(**batch).logits
        gates.begin()
        models.append((model, before, model(**batch).logits))
    (learned, stale, begun), (_, still, energy) = models
    assert torch.equal(begun, energy)
    assert not torch.equal(stale, begun)  # the control: heads of an adapter that has changed since
    assert torch.equal(still, energy) == (basis == "channels")
    find_token_gates(learned).set_budget(1)
    plain = tiny("bert", r=R)
    for layer in lora.lora_layers(plain).values():
        lora.weights(layer)[1].data *= torch.arange(1.0, R + 1)
    torch.testing.assert_close(learned(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-6)


def test_a_gate_of_statistics_starts_as_the_static_one() -> None:
    static, _ = gated("bert", policy="static", budget=0.4)
    learned, _ = gated("bert", features="statistics", budget=0.4)
    assert torch.equal(learned(**ragged("bert")).logits, static(**ragged("bert")).logits)


def test_a_fresh_adapter_has_finite_heads_and_learns() -> None:
    model = tiny("bert", r=R)
    for layer in lora.lora_layers(model).values():
        lora.weights(layer)[1].data.zero_()
    for features in ("projection", "statistics", "both"):
        gates = attach_token_gates(model, TokenGateConfig(features=features))
        assert all(p.isfinite().all() for p in gates.parameters())
        _, found = backward(model, ragged("bert"))
        assert all(g.isfinite().all() for g in found.values())
        assert any(g.any() for name, g in found.items() if "lora_B" in name)
        gates.remove()


# --- gradients -----------------------------------------------------------------------------------------------------


def test_a_relaxed_gate_is_hard_in_evaluation() -> None:
    relaxed, _ = gated("bert", estimator="relaxed", budget=0.4)
    hard, _ = gated("bert", budget=0.4)
    batch = ragged("bert")
    assert not torch.equal(relaxed(**batch).logits, hard(**batch).logits)
    assert torch.equal(relaxed.eval()(**batch).logits, hard.eval()(**batch).logits)


def stated_objective(config: TokenGateConfig, gates: TokenGates, seen: dict[str, Any], valid: Tensor) -> Tensor:
    """The auxiliary loss in plain autograd operations, from what a pass has shown; θ and targets are constants."""
    matches, active, slots = [], [], 0
    for gate in gates:
        part = seen[gate.name]
        z = part.z.reshape(-1, R)
        scores = linear(projection_features(z), gate.head.weight, gate.head.bias)
        if config.select == "topk":
            ordered = scores.detach().sort(dim=-1, descending=True).values
            theta = (ordered[:, gate.k - 1] + ordered[:, gate.k])[:, None] / 2
        else:
            theta = torch.zeros(())
        p = torch.sigmoid((scores - theta) / config.temperature)
        hard = (scores > theta).float()
        active.append(((hard + p - p.detach()) * valid[:, None]).sum())
        slots += int(valid.sum()) * R
        if config.supervision == "task":
            continue
        if config.supervision == "gradient":
            saliency = (part.y.grad.reshape(-1, R) * z).abs()
            known = valid & saliency.any(dim=-1)
        else:
            saliency = z.abs() * lora.weights(gate._layer[0])[1].detach().norm(dim=0)
            known = valid
        target = torch.from_numpy(top(saliency.numpy(), gate.k)).float()
        matches.append(binary_cross_entropy(p[known], target[known], reduction="sum") / (int(valid.sum()) * R))
    total = torch.zeros(())
    if matches:
        total = total + config.match_weight * torch.stack(matches).mean()
    if config.select == "threshold":
        total = total + config.penalty * (torch.stack(active).sum() / slots - config.budget) ** 2
    return total


OBJECTIVES = [
    {"supervision": "energy"},
    {"supervision": "gradient"},
    {"supervision": "gradient", "estimator": "relaxed", "temperature": 0.6},
    {"select": "threshold"},
    {"select": "threshold", "supervision": "energy", "temperature": 0.6},
]


@pytest.mark.parametrize("settings", OBJECTIVES)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_objectives_add_the_gradient_of_their_loss_and_leave_its_value(name: str, settings: dict[str, Any]) -> None:
    batch = ragged(name, left=name == "llama")
    weights = {"match_weight": 3.0, "penalty": 5.0}
    model, gates = gated(name, budget=0.4, **weights, **settings)
    plain, others = gated(name, budget=0.4, **settings | {"match_weight": 0.0, "penalty": 0.0})
    for each in (gates, others):
        perturb(each)
        if "select" in settings:
            for gate in each:
                gate.head.bias.data += 1
    loss, base = backward(plain, batch)
    with recorded(model) as seen:
        with_aux, found = backward(model, batch)
        expected = torch.autograd.grad(
            stated_objective(gates.config, gates, seen, batch["attention_mask"].flatten() == 1), [*gates.parameters()]
        )
    assert torch.equal(with_aux, loss)
    for (parameter, _), value in zip(gates.named_parameters(), expected):
        key = f"token_gates.{parameter}"
        torch.testing.assert_close(found[key] - base[key], value, rtol=2e-3, atol=2e-6)
        assert value.abs().max() > 1e-5
    assert_same(*({k: v for k, v in g.items() if "token_gates" not in k} for g in (found, base)))
    for factor in (0.5, 1024.0):  # accumulation, the scale of an AMP scaler
        _, scaled = backward(model, batch, factor)
        assert_same(scaled, {k: v * factor for k, v in found.items()}, rtol=1e-5, atol=1e-7 * factor)


def test_objectives_share_the_normalisation_of_a_step_of_several_batches() -> None:
    batch = ragged("llama")
    model, _ = gated("llama", supervision="energy", match_weight=50.0)
    own = int((batch["labels"][:, 1:] != -100).sum())
    _, whole = backward(model, {**batch, "num_items_in_batch": torch.tensor(own)})
    _, half = backward(model, {**batch, "num_items_in_batch": torch.tensor(2 * own)})
    assert_same({k: v / 2 for k, v in whole.items()}, half, rtol=1e-4, atol=1e-7)


def test_the_gradient_of_two_passes_is_the_sum_of_theirs() -> None:
    model, _ = gated("bert", supervision="gradient", select="threshold", budget=0.3)
    first, second = ragged("bert"), {k: v[:2, :7] if v.dim() == 2 else v[:2] for k, v in ragged("bert").items()}
    one, other = (backward(model, batch)[1] for batch in (first, second))
    model.zero_grad()
    losses = [model(**batch).loss for batch in (first, second)]
    (losses[0] + losses[1]).backward()
    assert_same(gradients(model), {k: one[k] + other[k] for k in one}, rtol=1e-4, atol=1e-7)


def test_tokens_that_the_loss_ignores_have_no_target() -> None:
    scores = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    run = Pass()
    mask, theta = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.float64)
    run.add(mask, torch.ones(2, dtype=torch.bool))
    run.note_scale(torch.ones(()))
    objective = Objective(run, torch.ones(2, dtype=torch.bool), 1, 0.5, 0.0, 1.0, None)
    z = torch.tensor([[1.0, 2.0, 3.0]] * 2, dtype=torch.float64, requires_grad=True)
    (gated_product(z, scores, mask, theta, 1.0, False, objective)[0].sum() * 1e-9).backward()
    assert (scores.grad[0].sign() == torch.tensor([1.0, 1.0, -1.0])).all()
    assert (scores.grad[1] == 0).all()


def share_after_training(penalty: float) -> float:
    model, gates = gated("bert", targets=["query", "value"], select="threshold", budget=0.3, penalty=penalty)
    for gate in gates:
        gate.head.bias.data += 2
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model(**ragged("bert")).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        model(**ragged("bert"))
    return gates.active_share()


def test_the_penalty_holds_the_share_at_the_budget() -> None:
    assert abs(share_after_training(10.0) - 0.3) < 0.05
    assert abs(share_after_training(0.0) - 0.3) > 0.15


@pytest.mark.parametrize("budget", [0.3, 0.75])
def test_calibrated_thresholds_start_at_the_budget(budget: float) -> None:
    model, gates = gated("bert", select="threshold", budget=budget)
    batch = ragged("bert")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    calibrate(model, [inputs])
    assert model.training
    with pytest.raises(InputError, match="no token was counted"):  # calibration is not counted
        gates.active_share()
    model.eval()
    model(**batch)
    tokens = int(batch["attention_mask"].sum())
    first = next(iter(gates.frequency().values()))
    assert first.sum() * tokens == pytest.approx(round(budget * tokens * R))
    assert abs(gates.active_share() - budget) < 0.06
    # The control: other tokens of the batch have other numbers of channels.
    with recorded(model) as seen, torch.no_grad():
        model(**batch)
    assert len(set((next(iter(seen.values())).y != 0).sum(-1).flatten().tolist())) > 1
    with pytest.raises(InputError, match="at least one batch"):
        calibrate(model, [])
    gates.set_budget(1)
    with pytest.raises(InputError, match="at budget 1"):
        calibrate(model, [inputs])


# --- the model around them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama", "gpt2"])
def test_budget_one_and_removal_are_the_plain_model_bit_for_bit(name: str) -> None:
    batch = ragged(name)
    plain, model = tiny(name, r=R), tiny(name, r=R)
    state = torch.get_rng_state()
    gates = attach_token_gates(model, TokenGateConfig(budget=0.4, supervision="gradient", match_weight=9.0))
    assert torch.equal(torch.get_rng_state(), state)
    loss, expected = backward(plain, batch)
    gated_loss, found = backward(model, batch)
    assert not torch.equal(gated_loss, loss)
    assert any("token_gates" in key for key in found)

    gates.set_budget(1)
    gated_loss, found = backward(model, batch)
    assert torch.equal(gated_loss, loss)
    assert_same(found, expected)
    assert torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)
    assert gates.active_share() == 1

    gates.set_budget(0.4)
    gates.remove()
    gates.remove()
    model.train(), plain.train()
    gated_loss, found = backward(model, batch)
    assert torch.equal(gated_loss, loss)
    assert_same(found, expected)
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    attach_token_gates(model, TokenGateConfig()).remove()


def test_the_decisions_of_a_token_are_its_own() -> None:
    for name, left in (("bert", False), ("llama", False), ("llama", True)):
        batch = ragged(name, left)
        model, gates = gated(name, features="both", budget=0.4)
        perturb(gates)
        model.eval()
        mask = batch["attention_mask"] == 1
        with recorded(model) as seen, torch.no_grad():
            model(**batch)
            together = {key: part.y != 0 for key, part in seen.items()}
            for row in range(3):
                model(input_ids=batch["input_ids"][row : row + 1, mask[row]])
                for key, part in seen.items():
                    assert torch.equal(part.y[0] != 0, together[key][row, mask[row]]), (name, key, row)


@pytest.mark.parametrize("left", [False, True])
def test_counts_leave_out_padding(left: bool) -> None:
    batch = ragged("llama", left)
    model, gates = gated("llama", budget=0.4)
    model(**batch)
    with pytest.raises(InputError, match="no token was counted"):
        gates.active_share()
    model.eval()
    with recorded(model) as seen, torch.no_grad():
        model(**batch)
    valid = batch["attention_mask"] == 1
    for gate in gates:
        assert int(gate.tokens) == int(valid.sum())
        expected = (seen[gate.name].y != 0)[valid].double().mean(0)
        np.testing.assert_allclose(gates.frequency()[gate.name], expected, rtol=1e-12)
    model(input_ids=batch["input_ids"])  # no mask is known: all of them
    assert int(gate.tokens) == int(valid.sum()) + valid.numel()
    gates.reset_counts()
    assert int(gate.tokens) == 0


def test_generation_with_a_cache_gates_and_counts_what_is_new() -> None:
    batch = {k: v for k, v in ragged("llama", left=True).items() if k != "labels"}
    model, gates = gated("llama", budget=0.4)
    model.eval()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    cached = model.generate(**batch, **options, use_cache=True)
    tokens = int(next(iter(gates)).tokens)
    assert tokens == int(batch["attention_mask"].sum()) + 4 * 3
    assert torch.equal(model.generate(**batch, **options, use_cache=False), cached)
    assert gates.active_share() == pytest.approx(0.4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"supervision": "gradient"}),
        ("bert", {"select": "threshold", "supervision": "energy"}),
        ("bert", {"policy": "random"}),
        ("llama", {"policy": "static"}),
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(name: str, settings: dict[str, Any], reentrant: bool) -> None:
    batch = ragged(name)
    model, _ = gated(name, budget=0.4, match_weight=3.0, **settings)
    model.enable_input_require_grads()
    torch.manual_seed(5)
    loss, expected = backward(model, batch)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    again, found = backward(model, batch)
    assert torch.equal(again, loss)
    assert_same(found, expected, rtol=1e-6, atol=1e-9)


def test_checkpointed_passes_may_overlap() -> None:
    model, _ = gated("bert", supervision="energy", match_weight=3.0)
    batches = [ragged("bert"), {**ragged("bert"), "attention_mask": ragged("bert", left=True)["attention_mask"]}]
    one, other = (backward(model, batch)[1] for batch in batches)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    losses[0].backward()
    losses[1].backward()
    assert_same(gradients(model), {k: one[k] + other[k] for k in one}, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("settings", [{"policy": "energy"}, {"features": "both", "supervision": "gradient"}])
@pytest.mark.parametrize("name", ["distilbert", "llama"])
def test_bf16_autocast_and_bf16_models_train(name: str, settings: dict[str, Any]) -> None:
    model = tiny(name, r=R).float()
    gates = attach_token_gates(model, TokenGateConfig(budget=0.4, **settings))
    for whole in (model, model.to(torch.bfloat16)):
        for p in gates.parameters():
            assert p.dtype == next(whole.parameters()).dtype
        with torch.autocast("cpu", torch.bfloat16), recorded(model) as seen:
            loss, found = backward(whole, ragged(name))
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in found.values())
        assert all(((part.y != 0).sum(-1) <= 2).all() for part in seen.values())
        assert any("token_gates" in key for key in found) == bool(gate_parameters(gates))


@pytest.mark.parametrize("policy", ["learned", "static"])
def test_a_copy_has_gates_of_its_own(policy: str) -> None:
    batch = ragged("bert")
    model, gates = gated("bert", policy=policy, budget=0.4)
    model.eval()
    logits = model(**batch).logits
    other = copy.deepcopy(model)
    copied = find_token_gates(other)
    assert torch.equal(other(**batch).logits, logits)
    tokens = int(next(iter(gates)).tokens)
    assert int(next(iter(copied)).tokens) == 2 * tokens
    copied.set_budget(0.2)
    assert not torch.equal(other(**batch).logits, logits)
    assert torch.equal(model(**batch).logits, logits)
    copied.remove()
    assert not torch.equal(other(**batch).logits, logits)
    assert find_token_gates(model) is gates
    assert torch.equal(model(**batch).logits, logits)


def test_ddp_gives_the_same_gradients(tmp_path: Path) -> None:
    import torch.distributed as dist

    batch = ragged("bert")
    model, _ = gated("bert", supervision="gradient", match_weight=3.0)
    _, expected = backward(model, batch)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        model.zero_grad()
        wrapped(**batch).loss.backward()
        assert_same(gradients(model), expected, rtol=1e-9, atol=1e-12)
    finally:
        dist.destroy_process_group()


# --- controls ------------------------------------------------------------------------------------------------------


def test_random_channels_differ_between_tokens_and_follow_the_seed() -> None:
    model, gates = gated("bert", policy="random", budget=0.4)
    model.eval()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with recorded(model) as seen, torch.no_grad():
            model(**ragged("bert"))
        draws.append(torch.stack([part.y.reshape(-1, R) != 0 for part in seen.values() if part.y.dim() == 3]))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert (draws[0] != draws[0][:, :1]).any(dim=-1).any(dim=-1).all()
    assert all(abs(f.mean() - 0.4) < 1e-9 for f in gates.frequency().values())
    assert np.stack([*gates.frequency().values()]).mean(0) == pytest.approx([0.4] * R, abs=0.06)


def test_static_channels_are_those_of_the_energy_when_gating_begins() -> None:
    batch = ragged("bert")
    model, gates = gated("bert", policy="static", budget=0.4, warmup_ratio=0.5)
    masked = tiny("bert", r=R)
    callback = TokenGateCallback(gates)

    def step(number: int) -> None:
        callback.on_step_begin(None, SimpleNamespace(global_step=number, max_steps=4), None, optimizer=None)

    def scale_a_channel(factor: float) -> None:
        for each in (model, masked):
            for layer in lora.lora_layers(each).values():
                lora.weights(layer)[1].data[:, 3] *= factor

    model(**batch)  # an evaluation before the first step must not fix the channels
    step(0)
    assert gates.budget == 1
    scale_a_channel(50.0)
    step(2)
    assert gates.budget == 0.4
    kept = lora.select_channels(lora.score_channels(masked, "channel_energy"), 0.4, "module")
    assert all(3 in index for index in kept.values())
    lora.mask_channels(masked, kept)
    assert torch.equal(model(**batch).logits, masked(**batch).logits)
    scale_a_channel(1e-3)
    step(3)
    assert torch.equal(model(**batch).logits, masked(**batch).logits)
    model.eval()(**batch)
    assert all((gates.static_subset()[name] == kept[name]).all() for name in kept)


def test_the_static_subset_is_the_most_frequent_and_can_be_pruned() -> None:
    batch = ragged("bert")
    model, gates = gated("bert", budget=0.4)
    model.eval()(**batch)
    kept = gates.static_subset()
    for name, frequency in gates.frequency().items():
        assert len(kept[name]) == 2
        others = np.delete(frequency, kept[name])
        assert frequency[kept[name]].min() >= others.max()
        assert (np.diff(kept[name]) > 0).all()
    # Among equally frequent ones, the larger energy.
    for gate in gates:
        gate.active.fill_(1)
    by_energy = lora.select_channels(lora.score_channels(model, "channel_energy"), 0.4, "module")
    assert all((index == by_energy[name]).all() for name, index in gates.static_subset().items())

    masked = tiny("bert", r=R).eval()
    lora.mask_channels(masked, kept)
    gates.remove()
    lora.prune(model, kept)
    torch.testing.assert_close(model(**batch).logits, masked(**batch).logits, rtol=0, atol=1e-12)


def test_pruning_under_the_gates_is_refused_at_the_next_pass() -> None:
    model, _ = gated("bert", budget=0.4)
    lora.prune(model, {name: np.array([0, 1]) for name in lora.lora_layers(model)})
    with pytest.raises(InputError, match="attached at rank 5; call remove"):
        model(**ragged("bert"))
