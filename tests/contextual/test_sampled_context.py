"""With the backward pass of sampled contexts only, gradients stay unbiased, with the variance of sampling sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.handle import sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.structure import Structure, find_blocks
from sparselora.errors import InputError
from tests.helpers.contextual_models import PACKED, exact_loss, masked, tiny

Batch = dict[str, torch.Tensor]
Gradients = dict[str, torch.Tensor]

SPARSE = {"layer_sparsity": {"layer.0": 0.6, "layer.2": 0.75, "layer.1-2.attention": 0.5}, "svd_rank": 4}
MODES: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "svd": {"mode": "svd", "estimator_tokens": 7} | SPARSE,
    "static": {"mode": "static"} | SPARSE,
    "random": {"mode": "random"} | SPARSE,
    "all_tokens": {"mode": "svd", "estimator_tokens": 7, "dense_output_tokens": False} | SPARSE,
    "skip": {"mode": "skip", "layer_sparsity": {"layer.0": 0.6, "layer.1": 0.75}},
}
DRAWABLE = (0, 1, 3)
"""Rows of `conversations` with context before an output token."""


def conversations(left: bool = False) -> Batch:
    """Rows with one completion; with two, and tokens behind; without labels; with one, of every last token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (4, 12), generator=generator)
    labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
    for row, (length, spans) in enumerate([(12, [(5, 9)]), (10, [(3, 5), (7, 9)]), (6, []), (9, [(4, 9)])]):
        start = 12 - length if left else 0
        mask[row] = 0
        mask[row, start : start + length] = 1
        for a, b in spans:
            labels[row, start + a : start + b] = ids[row, start + a : start + b]
    ids[mask == 0] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@contextmanager
def cut_prompts(structure: Structure, batch: Batch, attached: tuple[int, ...]) -> Iterator[None]:
    """Detach keys and values of what stands before the first output token, in the rows that are not ``attached``."""
    is_output = torch.zeros_like(batch["labels"], dtype=torch.bool)
    is_output[:, :-1] = batch["labels"][:, 1:] != -100
    cut = is_output.long().cumsum(dim=1) == 0
    cut[list(attached)] = False
    with ExitStack() as hooks:
        for block in structure.blocks:
            heads = block.attention
            for name in {heads.q} if heads.fused else {heads.k, heads.v}:
                handle = structure.module(name).register_forward_hook(
                    lambda _module, _inputs, output: torch.where(cut[..., None], output.detach(), output)
                )
                hooks.callback(handle.remove)
        yield


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> Gradients:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    computed = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), computed)}


def combined(*terms: tuple[float, Gradients]) -> Gradients:
    return {name: sum(factor * term[name] for factor, term in terms) for name in terms[0][1]}  # type: ignore[misc]


def largest_difference(ours: Gradients, reference: Gradients) -> float:
    return max(float((ours[name] - reference[name]).abs().max()) for name in reference)


def squared_norm(x: Gradients) -> float:
    return sum(float(part.square().sum()) for part in x.values())


def dot(x: Gradients, y: Gradients) -> float:
    return sum(float((x[name] * y[name]).sum()) for name in x)


def probabilities(share: float, rows: tuple[int, ...] = DRAWABLE) -> dict[tuple[int, ...], float]:
    """Probability of each subset of ``rows``, from the definition of the draw."""
    least, rest = math.floor(share * len(rows)), share * len(rows) - math.floor(share * len(rows))
    sizes = {least: 1 - rest, least + 1: rest} if rest else {least: 1.0}
    return {
        subset: chance / math.comb(len(rows), size)
        for size, chance in sizes.items()
        for subset in combinations(rows, size)
    }


def sampled_gradients(
    monkeypatch: Any, model: Any, batch: Batch, settings: dict[str, Any], share: float, **conversion: Any
) -> tuple[dict[tuple[int, ...], Gradients], dict[Any, Any]]:
    """Gradients by drawn rows, for every draw of a positive probability; and the choices, which are the same."""
    config = SparsityConfig(**settings, context_backward="sampled", context_backward_share=share)
    handle = sparsify(model, config, calibration=[batch], **conversion)
    by_subset, choices = {}, []
    for subset in probabilities(share):
        monkeypatch.setattr(TokenLayout, "draw", lambda _layout, _share, _seed, rows=subset: list(rows))
        handle.begin_step(3, 10)
        by_subset[subset] = gradients(model(**batch).loss, model)
        choices.append(handle.choices())
    handle.remove()
    for other in choices[1:]:
        for place, choice in other.items():
            first, second = (getattr(c, "channels", None) for c in (choices[0][place], choice))
            assert not isinstance(first, torch.Tensor) or torch.equal(first, second)
    return by_subset, choices[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2"])
def test_every_draw_is_the_weighted_sum_and_their_mean_the_full_gradient(name, mode, monkeypatch, tmp_path):
    model, share = tiny(name), 0.5
    batch = conversations(left=mode == "static")
    with monkeypatch.context() as patch:
        by_subset, choices = sampled_gradients(patch, model, batch, MODES[mode], share, cache_dir=tmp_path)
    structure = find_blocks(model)

    def reference(attached: tuple[int, ...]) -> Gradients:
        with cut_prompts(structure, batch, attached):
            return gradients(exact_loss(model, batch), model)

    with masked(model, batch, choices, all_tokens=mode == "all_tokens"):
        full, none = gradients(exact_loss(model, batch), model), reference(())
        of_row = {row: combined((1, reference((row,))), (-1, none)) for row in DRAWABLE}
    assert all(squared_norm(part) > 1e-6 for part in of_row.values())
    for subset, ours in by_subset.items():
        expected = combined((1, none), *((1 / share, of_row[row]) for row in subset))
        assert largest_difference(ours, expected) < 1e-10

    chances = probabilities(share)
    mean = combined(*((chance, by_subset[subset]) for subset, chance in chances.items()))
    assert largest_difference(mean, full) < 1e-10
    unweighted = combined((1, none), *((share, part) for part in of_row.values()))
    assert largest_difference(unweighted, full) > 1e-4  # the control: without weights the mean is another


@pytest.mark.parametrize("share", [0.25, 0.5, 2 / 3, 0.9])
def test_variance_is_that_of_sampling_sequences_without_replacement(share, monkeypatch):
    """Over draws of k of n rows, P(i) = p and P(i, j) = E[k (k − 1)] / (n (n − 1)), with c_i what row i adds."""
    model, batch = tiny("llama"), conversations()
    with monkeypatch.context() as patch:
        by_subset, _ = sampled_gradients(patch, model, batch, MODES["dense"], share)
    full, structure = gradients(exact_loss(model, batch), model), find_blocks(model)
    none = by_reference(model, structure, batch, ())
    of_row = [combined((1, by_reference(model, structure, batch, (row,))), (-1, none)) for row in DRAWABLE]
    n, k = len(DRAWABLE), math.floor(share * len(DRAWABLE))
    pairs = (k * (k - 1) + 2 * k * (share * n - k)) / (n * (n - 1))
    stated = sum(
        ((share if i == j else pairs) / share**2 - 1) * dot(of_row[i], of_row[j]) for i in range(n) for j in range(n)
    )
    brute_force = sum(
        chance * squared_norm(combined((1, by_subset[subset]), (-1, full)))
        for subset, chance in probabilities(share).items()
    )
    assert brute_force > 1e-6
    assert stated == pytest.approx(brute_force, rel=1e-9)


def by_reference(model: Any, structure: Structure, batch: Batch, attached: tuple[int, ...]) -> Gradients:
    with cut_prompts(structure, batch, attached):
        return gradients(exact_loss(model, batch), model)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_each_row_is_drawn_with_the_probability_of_the_share(share):
    batch, draws = conversations(), 3000
    layout = TokenLayout.build(batch["attention_mask"], batch["labels"])
    drawn = [layout.draw(share, seed) for seed in range(draws)]
    assert drawn[:50] == [layout.draw(share, seed) for seed in range(50)]
    chances = probabilities(share)
    assert set(map(tuple, drawn)) == {subset for subset, chance in chances.items() if chance}
    for subset, chance in chances.items():
        deviation = math.sqrt(draws * chance * (1 - chance))
        assert abs(drawn.count(list(subset)) - draws * chance) <= 4 * deviation


def test_detached_rows_come_first_and_nothing_is_lost():
    batch = conversations()
    layout = TokenLayout.build(batch["attention_mask"], batch["labels"])
    sampled = layout.sampled([1])
    rows, columns = sampled.tokens // 12, sampled.tokens % 12
    assert (sampled.n_detached, sampled.n_sampled, sampled.n_context) == (20, 22, layout.n_context)
    assert set(rows[:20].tolist()) == {0, 1, 2, 3}  # row 1's last tokens: they lead nowhere
    assert list(zip(rows[20:22].tolist(), columns[20:22].tolist())) == [(1, 0), (1, 1)]
    assert torch.equal(sampled.tokens[sampled.places], layout.tokens)
    assert torch.equal(sampled.slots[sampled.places], layout.slots)
    assert torch.equal(sampled.tokens[layout.n_context :], layout.tokens[layout.n_context :])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"mode": "svd"} | SPARSE),
        ("gpt2", {"mode": "svd"} | SPARSE),
        ("llama", {"frozen_precision": "fp8_emulated"}),
    ],
    ids=["llama", "gpt2", "llama_sparse", "gpt2_sparse", "llama_fp8"],
)
def test_dropout_and_fp8_are_weighted_alike(name, settings, monkeypatch):
    """With every row drawn and with none the rows have one order, so dropout is the same in all three passes."""
    is_fp8 = "frozen_precision" in settings
    model, batch = tiny(name, dropout=0.3), conversations()
    model = model.float() if is_fp8 else model

    def ours(rows: tuple[int, ...], share: float) -> Gradients:
        sampling = {"mode": "dense", "context_backward": "sampled", "context_backward_share": share}
        handle = sparsify(model, SparsityConfig(**sampling | settings))
        assert handle.packed == (name in PACKED)
        torch.manual_seed(5)
        with monkeypatch.context() as patch:
            patch.setattr(TokenLayout, "draw", lambda *_: list(rows))
            result = gradients(model(**batch).loss, model)
        handle.remove()
        return result

    full, none, weighted = ours(DRAWABLE, 1.0), ours((), 0.25), ours(DRAWABLE, 0.25)
    assert largest_difference(weighted, combined((4, full), (-3, none))) < (1e-6 if is_fp8 else 1e-10)
    assert largest_difference(weighted, full) > 1e-3


def test_a_share_of_one_is_the_full_backward_pass():
    model, batch = tiny("llama"), conversations()
    full = gradients(exact_loss(model, batch), model)
    sparsify(model, SparsityConfig(mode="dense", context_backward="sampled", context_backward_share=1.0))
    assert largest_difference(gradients(model(**batch).loss, model), full) < 1e-10


def test_the_draw_follows_the_seed_and_the_step():
    model, batch = tiny("llama"), conversations()

    def passes(seed: int, first: int) -> list[Gradients]:
        settings = {"mode": "dense", "context_backward": "sampled", "context_backward_share": 0.5}
        handle = sparsify(model, SparsityConfig(**settings, seed=seed))
        steps = []
        for step in range(first, 8):
            handle.begin_step(step, 8)
            steps.append(gradients(model(**batch).loss, model))
        handle.remove()
        return steps

    whole, resumed, other = passes(3, 0), passes(3, 5), passes(4, 0)
    assert all(largest_difference(x, y) == 0 for x, y in zip(whole[5:], resumed, strict=True))
    assert any(largest_difference(x, whole[0]) > 1e-4 for x in whole)
    assert any(largest_difference(x, y) > 1e-4 for x, y in zip(whole, other))


def test_checkpointing_gives_the_same_gradients():
    model, batch = tiny("llama"), conversations()
    handle = sparsify(model, SparsityConfig(mode="dense", context_backward="sampled"))

    def first_pass() -> Gradients:
        handle.begin_step(0, 4)
        return gradients(model(**batch).loss, model)

    plain = first_pass()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert largest_difference(first_pass(), plain) < 1e-12


def test_other_trained_parameters_are_refused_by_name():
    model = tiny("llama")
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"model\.norm\.weight is trained too"):
        sparsify(model, SparsityConfig(mode="dense", context_backward="sampled"))


def test_a_share_of_none_is_refused():
    with pytest.raises(InputError, match="context_backward_share above 0"):
        SparsityConfig(context_backward="sampled", context_backward_share=0.0)


def test_an_encoder_has_no_context_to_sample():
    with pytest.raises(InputError, match="context_backward sampled needs a causal language model"):
        sparsify(tiny("bert"), SparsityConfig(mode="dense", context_backward="sampled"))
