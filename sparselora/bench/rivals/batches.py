"""Batches of a case: the same rows for our steps and for every rival's."""

from __future__ import annotations

import torch

from sparselora.bench.rivals.jobs import Case
from sparselora.models.labels import IGNORED

Batch = dict[str, torch.Tensor]


def case_batches(vocabulary: int, case: Case, *, seed: int, count: int = 2) -> list[Batch]:
    """Return ``count`` batches of random tokens on the CPU, whose shapes are the same.

    Args:
        vocabulary: number of tokens to draw from.
        seed: of the first; each next one has the next seed.
    """
    return [_batch(vocabulary, case, seed + i) for i in range(count)]


def _batch(vocabulary: int, case: Case, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(vocabulary, (length,), generator=generator) for length in case.lengths]
    share = case.labelled / case.seq
    labels = [row.clone() for row in rows]
    for row in labels:
        row[: len(row) - round(share * len(row))] = IGNORED
        row[0] = IGNORED  # nothing predicts it, least of all the row in front of it
    if case.layout == "packed":
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        return {"input_ids": torch.cat(rows)[None], "position_ids": positions[None], "labels": torch.cat(labels)[None]}

    def stacked(rows: list[torch.Tensor], padding: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)

    mask = stacked([torch.ones_like(row) for row in rows], 0)
    return {"input_ids": stacked(rows, 0), "attention_mask": mask, "labels": stacked(labels, IGNORED)}
