"""Packing: bins by best fit, and rows of several sequences whose losses and gradients are those of each by itself."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pandas as pd
import pytest
import torch

from sparselora.__main__ import main
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.handle import sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.data.batches import Collator
from sparselora.data.packing import best_fit, pack_examples
from sparselora.errors import InputError
from sparselora.models.packed_rows import check_packed_rows
from tests.helpers.contextual_models import DECODERS, exact_loss, tiny
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

LIMIT = 24


# --- bins ---------------------------------------------------------------------------------------------------------


def naive_best_fit(lengths: list[int], limit: int) -> list[list[int]]:
    """Every bin is looked at for every item; of equal rooms that which has been so for the longest."""
    bins: list[list[int]] = []
    changed: list[int] = []
    for time, i in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        rooms = [(limit - sum(lengths[j] for j in members), changed[b], b) for b, members in enumerate(bins)]
        fitting = [entry for entry in rooms if entry[0] >= lengths[i]]
        if fitting:
            b = min(fitting)[2]
            bins[b].append(i)
            changed[b] = time
        else:
            bins.append([i])
            changed.append(time)
    return bins


@pytest.mark.parametrize("seed", range(20))
def test_bins_are_those_of_a_search_through_all_of_them(seed: int) -> None:
    rng = random.Random(seed)
    limit = rng.choice([1, 7, 24, 100])
    lengths = [rng.randint(1, limit) for _ in range(rng.choice([0, 1, 5, 200]))]
    bins = best_fit(lengths, limit)
    assert bins == naive_best_fit(lengths, limit)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= limit for members in bins)


@pytest.mark.parametrize("seed", range(4))
def test_few_items_are_packed_almost_as_well_as_can_be(seed: int) -> None:
    rng = random.Random(seed)
    lengths, limit = [rng.randint(1, 10) for _ in range(6)], 10

    def needed() -> int:
        return min(
            max(places) + 1
            for places in itertools.product(range(6), repeat=6)
            if all(sum(n for n, p in zip(lengths, places) if p == b) <= limit for b in set(places))
        )

    assert len(best_fit(lengths, limit)) <= 11 / 9 * needed() + 6 / 9


# --- rows ---------------------------------------------------------------------------------------------------------


def examples(seed: int = 0, count: int = 9) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    made_up = []
    for _ in range(count):
        n = rng.randint(2, 11)
        prompt = rng.randint(1, n - 1)
        ids = [rng.randint(2, 63) for _ in range(n)]
        labels = [-100] * prompt + ids[prompt:]
        if n > 6:  # several turns
            labels[prompt + (n - prompt) // 2] = -100
        made_up.append({"input_ids": ids, "labels": labels})
    return made_up


def batches(is_padded: bool = True) -> tuple[dict, dict]:
    """The same examples: one a row, and packed; not padded, those of the first packed row alone."""
    collator = Collator(1, causal=True, multiple=1, layout=lambda mask, labels, positions: TokenLayout.build(
        mask, labels, position_ids=positions))  # fmt: skip
    one_a_row = examples()
    rows = pack_examples(one_a_row, LIMIT).rows
    assert 1 < len(rows) < len(one_a_row)
    if is_padded:
        return collator(one_a_row), collator(rows)
    members = best_fit([len(example["input_ids"]) for example in one_a_row], LIMIT)[0]
    return collator([one_a_row[i] for i in members]), collator(rows[:1])


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=1e-9, atol=1e-11) for x, y in zip(a, b))


def arguments(batch: dict, *more: str) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", *more) if name in batch}


def uncached(name: str):
    model = tiny(name)
    model.config.use_cache = False  # as `load_causal_lm` has it: with a cache transformers looks at no positions
    return model


def test_a_batch_says_by_positions_alone_what_belongs_together() -> None:
    plain, packed = batches()
    assert "attention_mask" not in packed
    assert packed["token_counts"].tokens == plain["token_counts"].tokens
    assert packed["token_counts"].outputs == plain["token_counts"].outputs
    assert packed["token_counts"].rows == 9
    assert packed["token_counts"].padded < plain["token_counts"].padded
    layout = packed["token_layout"]
    assert layout.n == packed["token_counts"].tokens
    assert layout.n_sequences == 9
    assert len(set(layout.slots.tolist())) == layout.n
    assert layout.n_slots >= int(layout.slots.max()) + 1
    assert sorted(layout.runs) == sorted(plain["token_layout"].runs)


@pytest.mark.parametrize("name", DECODERS)
def test_the_plain_step_is_that_of_rows_apart(name: str) -> None:
    model = uncached(name)
    check_packed_rows(model)
    plain, packed = batches()
    losses = [exact_loss(model, arguments(batch, "labels") | {"labels": batch["labels"]}) for batch in (plain, packed)]
    assert torch.allclose(*losses, rtol=1e-12)
    assert close(*(gradients(model, loss) for loss in losses))
    # The control: one sequence a row, and the sequences see one another.
    joined = exact_loss(model, {"input_ids": packed["input_ids"], "labels": packed["labels"]})
    assert not torch.allclose(joined, losses[0], rtol=1e-4)


SPARSE = {
    "dense": {"mode": "dense"},
    "oracle": {"mode": "oracle", "ffn_sparsity": 0.5, "attention_sparsity": 0.4},
    "static": {"mode": "static", "ffn_sparsity": 0.6},
    "random, all tokens sparse": {"mode": "random", "ffn_sparsity": 0.5, "dense_output_tokens": False},
    "no backward pass of the context": {"mode": "dense", "context_backward": "none"},
    "of a half of the layers": {"mode": "oracle", "ffn_sparsity": 0.5, "context_backward": "none"},
}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("by", ["layout", "positions"])
def test_the_sparse_step_is_that_of_rows_apart(name: str, kind: str, by: str, tmp_path, recwarn) -> None:
    model = uncached(name)
    config = SparsityConfig(**SPARSE[kind])
    calibration = [arguments(batches()[0], "labels")] if config.needs_calibration else None
    handle = sparsify(model, config, calibration=calibration, cache_dir=tmp_path)
    assert handle.packed == (name != "gpt2")
    results = []
    pair = batches(is_padded=by == "layout")  # positions alone do not tell padding from sequences of one token
    for batch in pair:
        handle.begin_step(0, 10)  # the same draws
        keys = ("labels", "token_layout") if by == "layout" else ("labels",)
        loss = model(**arguments(batch, *keys)).loss
        results.append((loss.detach(), gradients(model, loss), dict(handle.choices())))
        assert handle._latest.is_packed == (name != "gpt2")
    (plain, plain_grads, plain_choices), (packed, packed_grads, packed_choices) = results
    assert torch.allclose(plain, packed, rtol=1e-9)
    assert close(plain_grads, packed_grads)
    assert plain_choices.keys() == packed_choices.keys()
    assert bool(packed_choices) == ("oracle" in str(SPARSE[kind]) or "static" in kind or "random" in kind)
    # The control: without positions the sequences of a row see one another.
    joined = pair[1]
    handle.begin_step(0, 10)
    loss = model(input_ids=joined["input_ids"], labels=joined["labels"]).loss
    assert not torch.allclose(loss, plain, rtol=1e-5)


def test_a_sampled_context_draws_among_sequences_and_an_activated_lora_refuses_them() -> None:
    layout = batches()[1]["token_layout"]
    whole = layout.sampled(range(9))
    assert sorted(whole.tokens[: whole.n_context].tolist()) == sorted(layout.tokens[: layout.n_context].tolist())
    one = layout.sampled([3])
    assert one.n_sampled - one.n_detached == layout.runs[3].before
    with pytest.raises(InputError, match="rows of a batch hold several sequences"):
        layout.activated(torch.zeros(len(batches()[1]["input_ids"]), dtype=torch.int64))


def test_sequences_of_very_different_lengths_do_not_fill_the_buffer_with_padding() -> None:
    lengths = [400, *[5] * 60, 90, 100]
    rows = pack_examples([{"input_ids": [3] * n, "labels": [-100] + [3] * (n - 1)} for n in lengths], 450).rows
    positions = torch.zeros(len(rows), 450, dtype=torch.int64)
    mask = torch.zeros(len(rows), 450)
    for i, row in enumerate(rows):
        positions[i, : len(row["position_ids"])] = torch.tensor(row["position_ids"])
        mask[i, : len(row["position_ids"])] = 1
    layout = TokenLayout.build(mask, None, position_ids=positions)
    assert layout.n_sequences == 63
    assert layout.width == 400
    assert layout.n_slots < 1.1 * sum(lengths) < 63 * 400


def test_a_model_that_carries_a_state_along_is_refused() -> None:
    import transformers as tf

    torch.manual_seed(0)
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=24, n_layer=2, n_head=4))
    with pytest.raises(InputError, match="packing is not supported for BloomForCausalLM"):
        check_packed_rows(bloom)


# --- the command --------------------------------------------------------------------------------------------------


def test_train_packs_and_reports_tokens_per_step(tmp_path: Path) -> None:
    model, rows = make_tiny_llama(tmp_path / "llama"), write_instructions(tmp_path / "rows.jsonl", 60)
    size = ["--model", str(model), "--dataset", str(rows), "--task", "causal_lm", "--train_bsz", "2", "--lora_r", "4",
            "--max_length", "60", "--device", "cpu", "--lr", "1e-2"]  # fmt: skip
    oracle = ["--sparsity.mode", "oracle", "--sparsity.ffn_sparsity", "0.5"]
    for name, flags in (("plain", []), ("packed", ["--packing"]), ("sparse", ["--packing", *oracle])):
        assert main(["train", *size, *flags, "--out_dir", str(tmp_path / name)]) == 0
    plain, packed, sparse = (pd.read_csv(tmp_path / n / "metrics.csv") for n in ("plain", "packed", "sparse"))
    for name in ("tokens", "outputs", "rows"):
        assert packed[name].sum() == sparse[name].sum() == plain[name].sum()
    assert len(packed) == len(sparse) < 0.5 * len(plain)
    assert packed["tokens"].sum() / packed["padded"].sum() > 0.9
    assert sparse["sparse"].all()
    record = json.loads((tmp_path / "packed" / "run.json").read_text())["packing"]
    assert record["examples"] == 48
    assert record["rows"] < 24
    assert record["fill"] > 0.9
    # Held-out rows are evaluated one by one, so losses of both are comparable.
    assert len(pd.read_csv(tmp_path / "packed" / "predictions.csv")) == 12
