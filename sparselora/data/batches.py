"""Examples into batches: token ids of texts, padding, counts on the host, and an order by length.

Whatever a sparse step needs in addition to the tensors of a batch is built here too, by a function of the caller: on
the host, so that the step itself never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from sparselora.data.tokens import encode_fields
from sparselora.models.labels import IGNORED

Example = dict[str, Any]
Batch = dict[str, Any]

PLANTED = "planted"
"""Entry of an example, and column of its data: 1 for a planted near-duplicate of other rows, 0 for an original."""
_NOT_FOR_MODEL = ("position", PLANTED)


def encode_texts(frame: pd.DataFrame, text_fields: Sequence[str], tokenizer: Any, max_length: int) -> list[Example]:
    """Sentences (or pairs) of ``frame`` as token ids, with their class as ``labels``; cut to ``max_length``.

    Raises:
        InputError: what `sparselora.data.tokens.encode_fields` refuses.
    """
    encoded = encode_fields(frame, text_fields, tokenizer, max_length)
    names = [name for name in encoded if name != "attention_mask"]
    labels = frame["label"].tolist()
    return [{**{name: encoded[name][i] for name in names}, "labels": labels[i]} for i in range(len(labels))]


@dataclass(frozen=True)
class Collator:
    """Pads examples to the right into tensors ``(batch, length)``, and counts their tokens on the host.

    ``layout``, if given, is called with the attention mask, the labels and the positions (None unless rows hold several
    examples); what it returns stands in the batch as ``token_layout``. A batch of such rows has ``position_ids`` and no
    ``attention_mask``; its padding is sequences of one token. ``multiple`` rounds the padded length up, but not beyond
    ``longest``.
    """

    pad_id: int
    causal: bool
    multiple: int = 8
    longest: int | None = None
    layout: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Any] | None = None

    def __call__(self, examples: Sequence[Example]) -> Batch:
        batch: Batch = dict(self.tensors(examples))
        labels, positions = batch["labels"], batch.get("position_ids")
        mask = batch.get("attention_mask")
        mask = _mask(examples, batch["input_ids"].shape[1]) if mask is None else mask
        outputs = int((labels[:, 1:] != IGNORED).sum()) if self.causal else 0
        rows = sum(example["position_ids"].count(0) if "position_ids" in example else 1 for example in examples)
        batch["token_counts"] = TokenCounts(rows, int(mask.sum()), outputs, mask.numel())
        if self.layout is not None:
            batch["token_layout"] = self.layout(mask, labels, positions)
        if "position" in examples[0]:
            batch["position"] = torch.tensor([example["position"] for example in examples])
        return batch

    def tensors(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """The tensors for the model alone."""
        longest = max(len(example["input_ids"]) for example in examples)
        length = -(-longest // self.multiple) * self.multiple
        if self.longest is not None:
            length = max(longest, min(length, self.longest))
        fill = {"input_ids": self.pad_id, "labels": IGNORED}
        batch = {}
        for name, value in examples[0].items():
            if isinstance(value, list):
                padded = torch.full((len(examples), length), fill.get(name, 0), dtype=torch.int64)
                for row, example in zip(padded, examples):
                    row[: len(example[name])] = torch.tensor(example[name], dtype=torch.int64)
                batch[name] = padded
            elif name not in _NOT_FOR_MODEL:
                batch[name] = torch.tensor([example[name] for example in examples])
        if "position_ids" not in batch:
            batch["attention_mask"] = _mask(examples, length)
        return batch


def _mask(examples: Sequence[Example], length: int) -> torch.Tensor:
    """Return ``(batch, length)``: 1 where an example has a token."""
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return (torch.arange(length) < lengths[:, None]).long()


@dataclass(frozen=True)
class TokenCounts:
    """Counts of one batch: rows (examples, where a row holds several), tokens without padding, those whose successor is
    labelled, and padded positions."""

    rows: int
    tokens: int
    outputs: int
    padded: int


class LengthGroups(Sampler[int]):
    """Every index once an epoch, examples of similar length together; the order depends on seed and epoch alone.

    The Trainer's own sampler draws from the global generator, whose state at the start of an epoch is lost when a run
    is resumed in the middle of it.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._batch_size, generator=generator))


class BatchOrder(Sampler[int]):
    """Every index once an epoch, ``batch_size`` neighbours together; the order of these batches depends on seed and
    epoch alone. A last batch with fewer comes last, so that no batch is torn."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        whole, size = self._count // self._batch_size, self._batch_size
        for batch in torch.randperm(whole, generator=generator).tolist():
            yield from range(batch * size, (batch + 1) * size)
        yield from range(whole * size, self._count)
