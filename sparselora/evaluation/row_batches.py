"""Rows in batches on the device of a model, for measurements by forward passes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from sparselora.config.train import TrainConfig
from sparselora.contextual.flops import Workload
from sparselora.data.batches import Collator
from sparselora.data.load import Data, encode_rows
from sparselora.evaluation.adapted_model import AdaptedModel
from sparselora.models.labels import IGNORED

Batch = Mapping[str, torch.Tensor]


def disjoint_rows(n_rows: int, sizes: Sequence[int], seed: int) -> list[NDArray[np.intp]]:
    """Return disjoint random subsets of ``range(n_rows)``, one of each of ``sizes``; a subset does not depend on the
    sizes of those after it."""
    assert sum(sizes) <= n_rows
    order = np.random.default_rng(seed).permutation(n_rows)
    return np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])


def row_batches(frame: pd.DataFrame, data: Data, adapted: AdaptedModel, config: TrainConfig) -> list[Batch]:
    """Return the rows of ``frame`` in batches of ``config.train_bsz``: ``input_ids``, ``attention_mask`` and ``labels``
    ``(batch, length)``, or ``(batch,)`` for a classifier, by length where ``config.group_by_length`` says so."""
    examples = encode_rows(frame, data, adapted.tokenizer, config)
    if config.group_by_length:
        examples.sort(key=_length)
    return example_batches(examples, adapted, config)


def example_batches(examples: Sequence[dict[str, Any]], adapted: AdaptedModel, config: TrainConfig) -> list[Batch]:
    """Return encoded rows in batches as `row_batches` does, in their order."""
    tokenizer, is_causal = adapted.tokenizer, config.task == "causal_lm"
    collator = Collator(tokenizer.pad_token_id, is_causal, longest=min(config.max_length, tokenizer.model_max_length))
    parts = [examples[i : i + config.train_bsz] for i in range(0, len(examples), config.train_bsz)]
    return [{name: value.to(adapted.device) for name, value in collator.tensors(part).items()} for part in parts]


def _length(example: Mapping[str, Any]) -> int:
    return len(example["input_ids"])


def average_workload(batches: Sequence[Batch], is_causal: bool) -> Workload:
    """Return the batch of average size, its row of average length and number of labels."""
    n_rows = sum(len(batch["input_ids"]) for batch in batches)
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    n_labels = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches) if is_causal else 0
    return Workload(max(1, n_rows // len(batches)), max(1, round(n_tokens / n_rows)), round(n_labels / n_rows))
