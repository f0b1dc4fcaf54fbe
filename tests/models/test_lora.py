"""Rank channels: shrinking is masking made real, and every choice is the one its definition names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from sparselora.errors import InputError
from sparselora.models import lora
from sparselora.models.adapter_files import folded

TARGETS = ["query", "value", "attention.output.dense"]
Build = Callable[..., PeftModel]


def build(rank: int = 5, *, dtype: torch.dtype = torch.float64, random: bool = True, **options: object) -> PeftModel:
    """A small random BERT with a LoRA whose B is not zero if ``random``; the same numbers at every call."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    settings = {"r": rank, "lora_alpha": 7, "target_modules": TARGETS, "task_type": "SEQ_CLS"} | options
    model = get_peft_model(
        BertForSequenceClassification(config).to(dtype), LoraConfig(**settings), autocast_adapter_dtype=False
    )
    for name, parameter in model.named_parameters():
        if random and ".lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


VARIANTS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"layer.0.attention.self.query": 3}, "alpha_pattern": {"value": 2}},
]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (6, 7), generator=torch.Generator().manual_seed(1))


def random_kept(model: PeftModel, keep_ratio: float, scope: str) -> lora.Kept:
    scores = lora.score_channels(model, "random", rng=np.random.default_rng(3))
    return lora.select_channels(scores, keep_ratio, scope)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("scope", ["module", "global"])
@pytest.mark.parametrize("keep_ratio", [0.2, 0.5, 1.0])
def test_pruned_model_computes_what_the_masked_one_does(
    tokens: torch.Tensor, options: dict[str, object], scope: str, keep_ratio: float
) -> None:
    masked, pruned = build(**options), build(**options)
    kept = random_kept(masked, keep_ratio, scope)
    unpruned = pruned(tokens).logits
    lora.mask_channels(masked, kept)
    lora.prune(pruned, kept)
    torch.testing.assert_close(pruned(tokens).logits, masked(tokens).logits, rtol=0, atol=1e-12)
    same = torch.equal(pruned(tokens).logits, unpruned)
    assert same if keep_ratio == 1.0 else not same


def test_pruning_shrinks_tensors_parameters_and_alpha() -> None:
    for options in VARIANTS:
        model = build(**options)
        before = lora.adapter_parameters(model)
        ranks = {name: lora.rank(layer) for name, layer in lora.lora_layers(model).items()}
        scaling = {name: layer.scaling["default"] for name, layer in lora.lora_layers(model).items()}
        kept = random_kept(model, 0.4, "module")
        lora.prune(model, kept)
        for name, layer in lora.lora_layers(model).items():
            A, B = lora.weights(layer)
            r = len(kept[name])
            assert A.shape == (r, 24)
            assert B.shape == (24, r)
            assert r < ranks[name]
            root = r**0.5 if options.get("use_rslora") else r
            assert layer.lora_alpha["default"] / root == pytest.approx(scaling[name])
        assert lora.adapter_parameters(model) == sum(len(k) * 48 for k in kept.values()) < before
        assert lora.adapter_flops_per_token(model) == 2 * sum(len(k) * (24 + 24) for k in kept.values())


def train(model: PeftModel, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, steps: int) -> None:
    labels = torch.arange(len(tokens)) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def adamw(model: PeftModel) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)


@pytest.mark.parametrize("scope", ["module", "global"])
def test_pruned_model_trains_as_the_masked_one_does(tokens: torch.Tensor, scope: str) -> None:
    masked, pruned, forgetful = build(), build(), build()
    optimizers = [adamw(model) for model in (masked, pruned, forgetful)]
    for model, optimizer in zip((masked, pruned, forgetful), optimizers):
        train(model, optimizer, tokens, 5)
    kept = random_kept(masked, 0.4, scope)
    lora.mask_channels(masked, kept)
    train(masked, optimizers[0], tokens, 10)
    for model, old, carries in ((pruned, optimizers[1], True), (forgetful, optimizers[2], False)):
        replaced = lora.prune(model, kept)
        new = adamw(model)
        if carries:
            lora.carry_optimizer_state(old, new, replaced)
        train(model, new, tokens, 10)
    reference = masked(tokens).logits
    torch.testing.assert_close(pruned(tokens).logits, reference, rtol=0, atol=1e-9)
    # The control: dropping the moments of the kept rows is visible.
    assert (forgetful(tokens).logits - reference).abs().max() > 1e-4


FACTORED: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adafactor": torch.optim.Adafactor,
    "Factored": lambda parameters: transformers.Adafactor(parameters, lr=1e-3, relative_step=False),
    "Quantised": lambda parameters: OddState(parameters, lambda p: torch.zeros_like(p, dtype=torch.uint8)),
    "Blocks": lambda parameters: OddState(parameters, lambda p: torch.zeros(4)),
    "Preconditioner": lambda parameters: OddState(parameters, lambda p: [torch.eye(len(p))]),
    "Paged": lambda parameters: OddState(parameters, paged),
}


class OddState(torch.optim.SGD):
    """SGD that keeps one more thing of each parameter."""

    def __init__(self, parameters: list[nn.Parameter], more: Callable[[nn.Parameter], object]) -> None:
        super().__init__(parameters, lr=0.1)
        for parameter in parameters:
            self.state[parameter]["more"] = more(parameter)


def paged(parameter: nn.Parameter) -> torch.Tensor:
    value = torch.zeros_like(parameter)
    value.is_paged = True  # as bitsandbytes marks it
    return value


@pytest.mark.parametrize("name", FACTORED)
def test_state_without_rows_is_refused_and_nothing_changes(tokens: torch.Tensor, name: str) -> None:
    model = build()
    old = FACTORED[name]([p for p in model.parameters() if p.requires_grad])
    train(model, old, tokens, 1)
    replaced = lora.prune(model, random_kept(model, 0.4, "module"))
    new = adamw(model)
    with pytest.raises(InputError, match=r"keeps '(row_var|exp_avg_sq_row|more)' as .* only floating-point state"):
        lora.carry_optimizer_state(old, new, replaced)
    assert not new.state


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, amsgrad=True),
        torch.optim.NAdam,
        torch.optim.ASGD,
        torch.optim.Rprop,
    ],
)
def test_other_optimizers_with_state_of_the_parameters_shape_go_on(
    tokens: torch.Tensor, make: Callable[..., torch.optim.Optimizer]
) -> None:
    masked, pruned = build(), build()
    olds = [make([p for p in model.parameters() if p.requires_grad]) for model in (masked, pruned)]
    for model, old in zip((masked, pruned), olds):
        train(model, old, tokens, 2)
    kept = random_kept(masked, 0.4, "module")
    lora.mask_channels(masked, kept)
    replaced = lora.prune(pruned, kept)
    new = make([p for p in pruned.parameters() if p.requires_grad])
    lora.carry_optimizer_state(olds[1], new, replaced)
    for model, optimizer in ((masked, olds[0]), (pruned, new)):
        train(model, optimizer, tokens, 3)
    torch.testing.assert_close(pruned(tokens).logits, masked(tokens).logits, rtol=0, atol=1e-9)


def test_mask_handle_restores_the_model(tokens: torch.Tensor) -> None:
    model = build()
    before = model(tokens).logits
    handle = lora.mask_channels(model, random_kept(model, 0.2, "module"))
    assert not torch.equal(model(tokens).logits, before)
    handle.remove()
    assert torch.equal(model(tokens).logits, before)


def test_channel_energy_is_the_norm_of_the_rank_one_term() -> None:
    model = build(use_rslora=True)
    scores = lora.score_channels(model, "channel_energy")
    for name, layer in lora.lora_layers(model).items():
        A, B = (w.detach().numpy() for w in lora.weights(layer))
        terms = [np.linalg.norm(layer.scaling["default"] * np.outer(B[:, k], A[k])) ** 2 for k in range(5)]
        np.testing.assert_allclose(scores[name], terms, rtol=1e-12)


def test_gradient_score_is_the_derivative_of_the_loss_by_the_channels_strength(tokens: torch.Tensor) -> None:
    model = build()
    labels = torch.arange(len(tokens)) % 3
    scores = lora.score_channels(model, "gradient", losses=lambda: iter([model(input_ids=tokens, labels=labels).loss]))
    assert all(p.grad is None for p in model.parameters())
    for name, layer in lora.lora_layers(model).items():
        strength = torch.ones(5, dtype=torch.float64, requires_grad=True)
        hook = layer.lora_A["default"].register_forward_hook(lambda _m, _i, z, strength=strength: z * strength)
        (slope,) = torch.autograd.grad(model(input_ids=tokens, labels=labels).loss, strength)
        hook.remove()
        np.testing.assert_allclose(scores[name], slope.abs().numpy(), rtol=1e-9, atol=1e-15)


def regauge(model: PeftModel) -> None:
    """B → B M, A → M⁻¹ A with a random well-conditioned M: other channels, the same update."""
    generator = torch.Generator().manual_seed(5)
    for layer in lora.lora_layers(model).values():
        M = torch.randn(5, 5, generator=generator, dtype=torch.float64) + 3 * torch.eye(5, dtype=torch.float64)
        A, B = lora.weights(layer)
        with torch.no_grad():
            B.copy_(B @ M)
            A.copy_(torch.linalg.solve(M, A))


@pytest.mark.parametrize("scope", ["module", "global"])
def test_svd_does_not_depend_on_the_gauge_and_channel_energy_does(tokens: torch.Tensor, scope: str) -> None:
    plain, turned = build(), build()
    regauge(turned)
    torch.testing.assert_close(turned(tokens).logits, plain(tokens).logits)
    chosen = [lora.select_channels(lora.score_channels(m, "channel_energy"), 0.4, scope) for m in (plain, turned)]
    assert any(not np.array_equal(chosen[0][name], chosen[1][name]) for name in chosen[0])
    for model in (plain, turned):
        lora.truncate_svd(model, 0.4, scope)
    ranks = [{name: lora.rank(layer) for name, layer in lora.lora_layers(m).items()} for m in (plain, turned)]
    assert ranks[0] == ranks[1]
    torch.testing.assert_close(turned(tokens).logits, plain(tokens).logits, rtol=0, atol=1e-10)


def test_directions_without_energy_still_learn(tokens: torch.Tensor) -> None:
    """A fresh adapter (B = 0) and one of lower rank than r: turned to the singular basis, every row of B has a
    gradient."""
    model = build()
    for number, layer in enumerate(lora.lora_layers(model).values()):
        B = lora.weights(layer)[1]
        with torch.no_grad():
            B.mul_(0) if number % 2 else B[:, 2:].copy_(B[:, :1].expand_as(B[:, 2:]))
    before = model(tokens).logits.detach()
    lora.truncate_svd(model, 1.0, "module")
    out = model(tokens).logits
    torch.testing.assert_close(out, before, rtol=0, atol=1e-10)
    out.square().sum().backward()
    for layer in lora.lora_layers(model).values():
        A, B = lora.weights(layer)
        assert (A.norm(dim=1) > 0).all()
        assert (B.grad.norm(dim=0) > 0).all()


@pytest.mark.parametrize("options", VARIANTS[:2])
def test_svd_is_the_best_approximation_of_its_rank(options: dict[str, object]) -> None:
    model = build(**options)
    dense = {name: _update(layer) for name, layer in lora.lora_layers(model).items()}
    replaced = lora.truncate_svd(model, 0.4, "module")
    assert all(entry.kept_entries is None for entry in replaced)
    for name, layer in lora.lora_layers(model).items():
        U, s, Vt = np.linalg.svd(dense[name])
        assert lora.rank(layer) == 2
        np.testing.assert_allclose(_update(layer), (U[:, :2] * s[:2]) @ Vt[:2], atol=1e-12)


def _update(layer: nn.Module) -> np.ndarray:
    A, B = lora.factors(layer)
    return B @ A


@pytest.mark.parametrize("options", VARIANTS)
def test_turning_in_place_gives_the_factors_of_full_rank_and_forgets_their_moments(
    options: dict[str, object], tokens: torch.Tensor
) -> None:
    turned, replaced = build(**options), build(**options)
    parameters = [p for p in turned.parameters() if p.requires_grad]
    other = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([*parameters, other], lr=0.0)
    (turned(tokens).logits.square().sum() + other.sum()).backward()
    optimizer.step()
    before = turned(tokens).logits.detach()
    lora.turn_to_singular(turned, optimizer)
    lora.truncate_svd(replaced, 1.0, "module")
    torch.testing.assert_close(turned(tokens).logits, before, rtol=0, atol=1e-10)
    assert all(p is q for p, q in zip(parameters, (p for p in turned.parameters() if p.requires_grad), strict=True))
    for layer, like in zip(lora.lora_layers(turned).values(), lora.lora_layers(replaced).values(), strict=True):
        for weight, expected in zip(lora.weights(layer), lora.weights(like), strict=True):
            assert torch.equal(weight, expected)
            assert weight not in optimizer.state
        A, B = lora.factors(layer)
        energies = np.linalg.norm(A, axis=1) * np.linalg.norm(B, axis=0)
        assert (np.diff(energies) <= 1e-12).all()
    assert other in optimizer.state


def test_a_diverged_adapter_is_not_turned() -> None:
    model = build()
    name, layer = next(iter(lora.lora_layers(model).items()))
    lora.weights(layer)[1].data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=f"diverged.*{name}"):
        lora.turn_to_singular(model)


def test_svd_of_a_rank_above_the_smaller_dimension(tokens: torch.Tensor) -> None:
    model = build(rank=30)
    before = {name: _update(layer) for name, layer in lora.lora_layers(model).items()}
    lora.truncate_svd(model, 0.9, "module")  # 27 channels of which 24 can differ from zero
    for name, layer in lora.lora_layers(model).items():
        assert lora.rank(layer) == 27
        np.testing.assert_allclose(_update(layer), before[name], atol=1e-12)


def test_untouched_b_is_pruned_by_index() -> None:
    model = build()
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            lora.weights(layer)[1].zero_()
    kept = lora.select_channels(lora.score_channels(model, "channel_energy"), 0.4, "module")
    assert all(np.array_equal(index, [0, 1]) for index in kept.values())


def test_global_budget_is_spent_over_the_model_and_may_empty_a_module(tokens: torch.Tensor) -> None:
    model = build()
    names = list(lora.lora_layers(model))
    scores = {name: np.full(5, float(position)) for position, name in enumerate(names)}
    kept = lora.select_channels(scores, 0.5, "global")
    assert sum(map(len, kept.values())) == 15
    assert [len(kept[name]) for name in names] == [0, 0, 0, 5, 5, 5]
    lora.prune(model, kept)
    assert list(lora.lora_layers(model)) == names[3:]
    model(tokens)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("scope", ["module", "global"])
def test_exported_adapter_is_read_by_plain_peft(
    tokens: torch.Tensor, tmp_path: Path, options: dict[str, object], scope: str
) -> None:
    model = build(**options)
    lora.prune(model, random_kept(model, 0.3, scope))
    lora.export_adapter(model, tmp_path / "adapter", "some/base")
    base = build().unload()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-12)

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["r"] == config["lora_alpha"]
    # Loaders that divide the global alpha by the global rank, or by each module's own, find ΔW too: B A as stored.
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, layer in lora.lora_layers(model).items():
        stored = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        np.testing.assert_allclose(stored, _update(layer), atol=1e-12)
        assert len(tensors[f"{name}.lora_A.weight"]) == config["r"]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_changed_its_base_is_not_pruned_or_exported(
    tokens: torch.Tensor, tmp_path: Path, start: str
) -> None:
    model = build(rank=4, init_lora_weights=start, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = random_kept(model, 0.5, "module")
    for act in (
        lambda: lora.prune(model, kept),
        lambda: lora.truncate_svd(model, 0.5, "module"),
        lambda: lora.export_adapter(model, tmp_path / "adapter", "some/base"),
    ):
        with pytest.raises(InputError, match=rf"initialised by {start}.*convert it to plain LoRA first"):
            act()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "adapter").exists()


def test_a_converted_pissa_adapter_is_pruned_and_exported_on_the_original_base(
    tokens: torch.Tensor, tmp_path: Path
) -> None:
    """The remedy that the message names; what is exported asks for no other initialisation."""
    torch.manual_seed(0)
    model = build(rank=4, init_lora_weights="pissa", dtype=torch.float32, random=False, task_type=None)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's conversion asks for
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    train(model, adamw(model), tokens, 3)
    expected = model(tokens).logits
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))

    def base() -> nn.Module:
        return build(dtype=torch.float32, task_type=None).unload()

    plain = PeftModel.from_pretrained(base(), str(tmp_path / "plain")).eval()
    torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    lora.prune(plain, random_kept(plain, 0.5, "global"))
    lora.export_adapter(plain, tmp_path / "adapter", "some/base")
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_export_keeps_the_ranks_of_a_global_budget_in_the_metadata(tmp_path: Path) -> None:
    model = build()
    kept = random_kept(model, 0.4, "global")
    lora.prune(model, kept)
    lora.export_adapter(model, tmp_path / "adapter", "some/base")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        ranks = json.loads(file.metadata()["ranks"])
        stored = {file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key}  # noqa: SIM118
    assert ranks == {name.removeprefix("base_model.model."): len(k) for name, k in kept.items() if len(k)}
    assert len(set(ranks.values())) > 1
    assert stored == {max(ranks.values())}


@pytest.mark.parametrize(("scaling", "fits"), [(2.0, True), (3e5, True), (1e-7, True), (1e12, False), (1e-15, False)])
def test_the_folded_scale_fits_in_half_precision_or_is_refused(scaling: float, fits: bool) -> None:
    A, B = (torch.randn(4, 7, dtype=torch.float64).half(), torch.randn(5, 4, dtype=torch.float64).half())
    expected = scaling * B.double() @ A.double()
    if not fits:
        with pytest.raises(InputError, match=r"layer: .* do not fit in torch.float16; convert the adapter to float32"):
            folded("layer", A, B, scaling)
        return
    new_A, new_B = folded("layer", A, B, scaling)
    assert new_A.dtype == new_B.dtype == torch.float16
    found = new_B.double() @ new_A.double()
    assert (found - expected).norm() < 2e-3 * expected.norm()
    if scaling != 2.0:  # the control: B alone cannot hold it
        assert ((B.double() * scaling).half().double() @ A.double() - expected).norm() > 0.01 * expected.norm() or not (
            (B.double() * scaling).half().isfinite().all()
        )


def test_export_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lora.export_adapter(build(), tmp_path / name, "some/base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(use_dora=True), "only plain LoRA"),
        (lambda: build(lora_bias=True), "bias"),
        (lambda: build(target_modules=["word_embeddings"]), "linear layers only"),
        (lambda: build().unload(), "no LoRA layer"),
    ],
)
def test_layers_without_plain_rank_channels_are_refused(make: Build, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lora.lora_layers(make())


def test_unknown_names_are_refused() -> None:
    model = build()
    with pytest.raises(InputError, match="unknown method 'energy'"):
        lora.score_channels(model, "energy")
    with pytest.raises(InputError, match="scope"):
        lora.select_channels(lora.score_channels(model, "magnitude_B"), 0.5, "layer")
    with pytest.raises(InputError, match="calibration"):
        lora.score_channels(model, "gradient", losses=lambda: iter([]))


@pytest.mark.gpu
def test_pruned_equals_masked_on_the_gpu(tokens: torch.Tensor) -> None:
    masked, pruned = build().cuda(), build().cuda()
    kept = random_kept(masked, 0.4, "global")
    lora.mask_channels(masked, kept)
    lora.prune(pruned, kept)
    torch.testing.assert_close(pruned(tokens.cuda()).logits, masked(tokens.cuda()).logits, rtol=0, atol=1e-12)
