"""Scores at labelled positions: equal to those of all logits, in float64, with no large tensor on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparselora.models import label_scores
from sparselora.models.label_scores import LabelScores
from sparselora.models.labels import IGNORED
from tests.helpers.contextual_models import SIZES, tiny

SMALL = SIZES | {"vocab_size": 400, "num_hidden_layers": 2}
HEADS = SMALL | {"num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0}


def _gemma2() -> nn.Module:
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**HEADS, final_logit_softcapping=0.1))


def _granite() -> nn.Module:
    return tf.GraniteForCausalLM(tf.GraniteConfig(**(SMALL | {"num_key_value_heads": 2}), logits_scaling=3.0))


def _cohere() -> nn.Module:
    return tf.CohereForCausalLM(tf.CohereConfig(**(SMALL | {"num_key_value_heads": 2}), logit_scale=0.25))


def _llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2))


def _adapted_head() -> nn.Module:
    model = get_peft_model(_llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    return model


def _prompted() -> nn.Module:
    return get_peft_model(_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny("llama"), "tied": lambda: tiny("llama_mha_tied"), "gpt2": lambda: tiny("gpt2"),
    "qwen3": lambda: tiny("qwen3"), "wide": _llama, "prompts": _prompted,
}  # fmt: skip
OTHER = {"softcap": _gemma2, "granite": _granite, "cohere": _cohere, "adapted head": _adapted_head}


def batch_of(model: Any, rows: int = 5, length: int = 12) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch padded on the right, with labels on some tokens of each row, on none of the third."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    labels = torch.where(torch.rand(rows, length, generator=generator) < 0.4, ids, IGNORED)
    labels[2] = IGNORED
    mask = torch.ones_like(ids)
    mask[1, -3:] = mask[4, -1:] = 0
    labels[mask == 0] = IGNORED
    return {"input_ids": ids, "attention_mask": mask}, labels


def by_hand(model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Scores from all logits at once."""
    with torch.no_grad():
        logits = model(**inputs).logits[:, -labels.shape[1] :]
    scores = []
    for row, wanted in zip(logits[:, :-1], labels[:, 1:], strict=True):
        loss = F.cross_entropy(row, wanted, reduction="sum", ignore_index=IGNORED)
        has_label = wanted != IGNORED
        hits = (row.argmax(dim=1) == wanted) & has_label
        scores.append(torch.stack((has_label.sum().double(), loss.double(), hits.sum().double())))
    return torch.stack(scores)


@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
@pytest.mark.parametrize("limit", [1 << 26, 1500])
def test_scores_are_those_of_all_logits(name: str, limit: int, monkeypatch) -> None:
    monkeypatch.setattr(label_scores, "_LOGITS", limit)
    torch.manual_seed(0)
    model = (PLAIN | OTHER)[name]().double().eval()
    inputs, labels = batch_of(model)
    expected = by_hand(model, inputs, labels)
    scores = LabelScores(model)
    for _ in range(2):  # the second batch knows what the first has shown
        torch.testing.assert_close(scores(inputs, labels), expected, rtol=1e-10, atol=1e-12)
    assert (scores.head is not None) == (name in PLAIN)
    assert expected[2].tolist() == [0, 0, 0]
    if name == "softcap":
        # The control: the output layer's product alone is another loss.
        model.config.final_logit_softcapping = None
        assert (by_hand(model, inputs, labels) - expected)[:, 1].abs().max() > 1e-3


def test_a_cap_that_small_logits_do_not_show_is_found() -> None:
    """Soft-capping at 10⁴ changes logits of size 1 by less than 10⁻⁸ of them, but it is not the plain product."""
    model = tf.Gemma2ForCausalLM(tf.Gemma2Config(**HEADS, final_logit_softcapping=1e4)).eval()
    scores = LabelScores(model)
    scores(*batch_of(model))
    assert scores.head is None


class _LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(output) if torch.is_tensor(x)]
        self.elements = max([self.elements, *sizes])
        return output


@pytest.mark.parametrize("name", ["wide", "softcap"])
def test_no_tensor_is_larger_than_the_logits_of_a_piece(name: str, monkeypatch) -> None:
    rows, length, piece = 8, 16, 16 * 400
    monkeypatch.setattr(label_scores, "_LOGITS", piece)
    model = (PLAIN | OTHER)[name]().eval()
    weights = max(p.numel() for p in model.parameters())
    inputs, labels = batch_of(model, rows, length)
    scores = LabelScores(model)
    if name == "softcap":
        scores(inputs, labels)
    with _LargestTensor() as largest:
        scores(inputs, labels)
    assert largest.elements <= max(piece, weights)
    # The control: the old way makes the logits of every position.
    with torch.no_grad(), _LargestTensor() as largest:
        _ = model(**inputs).logits
    assert largest.elements >= rows * length * 400 > 4 * max(piece, weights)


class _LiveBytes(TorchDispatchMode):
    """The most bytes, in storages that operations made, that were alive after an operation; no allocator is asked."""

    peak = 0

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {key: value for key, value in self._made.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(n_bytes for _, n_bytes in self._made.values()))
        return output


PARTS = 8
"""Widths of the model below are those of Qwen2.5-0.5B divided by this, and so are its activations and its pieces."""


def test_64_rows_of_512_tokens_of_a_05b_model_in_float32_take_less_than_4_gb(monkeypatch) -> None:
    """An eighth of the activations, of one layer: those of a layer are free before the next begins."""
    model = tf.Qwen2ForCausalLM(
        tf.Qwen2Config(
            hidden_size=896 // PARTS, intermediate_size=4864 // PARTS, vocab_size=151936 // PARTS, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=64, tie_word_embeddings=True, use_cache=False,
        )
    ).eval()  # fmt: skip
    monkeypatch.setattr(label_scores, "_LOGITS", label_scores._LOGITS // PARTS)
    weight_bytes = 4 * 494_032_768
    limit = (4e9 - weight_bytes) / PARTS
    ids = torch.randint(0, 1000, (64, 512), generator=torch.Generator().manual_seed(0))
    inputs, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone()
    labels[:, :-40] = IGNORED

    def peak(tokens: int) -> tuple[torch.Tensor, int]:
        monkeypatch.setattr(label_scores, "_TOKENS", tokens)
        with _LiveBytes() as live:
            scores = LabelScores(model)(inputs, labels)
        return scores, live.peak

    scores, in_parts = peak(label_scores._TOKENS)
    assert scores[:, 0].tolist() == [40] * 64
    assert in_parts < limit / 2
    # The control: all rows in one pass are more, of the same losses.
    expected, whole = peak(ids.numel())
    assert whole > limit
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)


def test_a_row_has_the_same_scores_in_any_batch(monkeypatch) -> None:
    monkeypatch.setattr(label_scores, "_TOKENS", 25)  # two rows of 12 tokens
    calls = []
    model = tiny("llama").double().eval()
    model.get_input_embeddings().register_forward_hook(lambda *args: calls.append(len(args[-1])))
    inputs, labels = batch_of(model)
    scores = LabelScores(model)(inputs, labels)
    assert calls == [2, 2, 1]
    for row in range(len(labels)):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        torch.testing.assert_close(LabelScores(model)(alone, labels[row : row + 1])[0], scores[row], rtol=1e-12, atol=0)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama").eval()
    inputs, labels = batch_of(model)
    before = model(**inputs).logits
    LabelScores(model)(inputs, labels)
    assert torch.equal(model(**inputs).logits, before)
    head = model.get_output_embeddings()
    assert not head._forward_hooks
    assert not head._forward_pre_hooks
