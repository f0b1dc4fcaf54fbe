"""A handle inside somebody else's trainer: which step it is, and which labels the trainer keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparselora.errors import InputError
from sparselora.models.labels import IGNORED

Tensor = torch.Tensor

CALIBRATION_ROWS = 128
"""Rows that a calibration takes from a trainer's own data, where none are given."""


class FollowsSteps(Protocol):
    """The part of a `sparselora.contextual.handle.Handle` that a trainer speaks to."""

    def begin_step(self, step: int, total_steps: int) -> None: ...

    def end_step(self) -> None: ...

    def labelled(self, labels: Tensor | None) -> AbstractContextManager[None]: ...


class SparsityCallback(TrainerCallback):
    """Tells a `Handle` which step comes, and raises at the end of one that was not as sparse as it should be."""

    def __init__(self, handle: FollowsSteps) -> None:
        self._handle = handle

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handle.begin_step(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._handle.end_step()


def is_trainer(target: object) -> bool:
    """Return whether ``target`` is a Trainer of transformers, or one of its kind, and no model."""
    return not isinstance(target, torch.nn.Module) and all(
        hasattr(target, name) for name in ("model", "add_callback", "compute_loss", "get_train_dataloader")
    )


def attach(handle: FollowsSteps, trainer: Any) -> Callable[[], None]:
    """Have ``trainer`` tell ``handle`` of its steps and of the labels of its batches; returns what undoes it."""
    callback = SparsityCallback(handle)
    trainer.add_callback(callback)
    original = trainer.compute_loss
    instance_method = trainer.__dict__.get("compute_loss")

    @functools.wraps(original)
    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with handle.labelled(batch_labels(inputs)):
            return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss

    def detach() -> None:
        trainer.remove_callback(callback)
        if trainer.__dict__.get("compute_loss") is compute_loss:
            if instance_method is None:
                del trainer.compute_loss
            else:
                trainer.compute_loss = instance_method

    return detach


def batch_labels(inputs: Any) -> Tensor | None:
    """Labels ``(batch, length)`` of a trainer's batch: its own, or its ids where a mask of completions has them."""
    if not isinstance(inputs, Mapping):
        return None
    labels, ids, completion = (inputs.get(name) for name in ("labels", "input_ids", "completion_mask"))
    if isinstance(labels, Tensor):
        return labels
    if isinstance(ids, Tensor) and isinstance(completion, Tensor) and ids.shape == completion.shape:
        return ids.masked_fill(completion == 0, IGNORED)
    return None


def calibration_batches(trainer: Any) -> list[dict[str, Tensor]]:
    """The first batches of a trainer's training data, as the model takes them; random generators stay as they are.

    Raises:
        InputError: its batches are no token ids with labels, such as prompts to sample from.
    """
    with torch.random.fork_rng():
        loader = trainer.get_train_dataloader()
        count = max(1, CALIBRATION_ROWS // max(1, int(trainer.args.per_device_train_batch_size)))
        batches = list(islice(_as_inputs(loader), count))
    if not batches:
        raise InputError(f"{type(trainer).__name__} has no training data to calibrate on; give calibration batches")
    return batches


def _as_inputs(loader: Any) -> Iterator[dict[str, Tensor]]:
    for batch in loader:
        labels = batch_labels(batch)
        if labels is None or not isinstance(batch.get("input_ids"), Tensor):
            raise InputError(
                "the trainer's batches are not token ids with labels (it samples completions?), so they cannot "
                "calibrate; give sparsify(..., calibration=batches) of prompts and completions"
            )
        wanted = ("input_ids", "attention_mask", "position_ids")
        yield {name: batch[name] for name in wanted if isinstance(batch.get(name), Tensor)} | {"labels": labels}
