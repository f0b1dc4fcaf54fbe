"""A base model with its adapter and the data to calibrate and evaluate it on, for an edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import set_seed

from sparselora.config.train import TrainConfig
from sparselora.data.batches import Collator, Example, encode_texts
from sparselora.data.instructions import encode_instructions
from sparselora.data.load import Data, load_data
from sparselora.errors import InputError
from sparselora.evaluation.losses import held_out_losses, with_adapter
from sparselora.models import load as models
from sparselora.spectral.edit import ROWS, generator, name_in_model
from sparselora.spectral.factors import AdapterSVD
from sparselora.spectral.sensitivity import Sensitivity, measure


def load_rows(config: TrainConfig, lora_path: str) -> Data:
    """Load the data that ``config`` names, whole for training, with the classes of the adapter in ``lora_path``.

    The seed of ``config``, the calibration's, draws no rows to evaluate.
    """
    return load_data(config.replace(train_samples=0, seed=0), lora_path)


def drawn_rows(data: Data, samples: int, seed: int) -> pd.DataFrame:
    """Return ``samples`` training rows drawn by ``seed``, in their order.

    Raises:
        InputError: there are fewer.
    """
    if samples > len(data.train):
        raise InputError(
            f"--calib_samples {samples} is more than the {len(data.train)} training rows of {data.name}; ask for fewer"
        )
    places = generator(seed, ROWS).permutation(len(data.train))[:samples]
    return data.train.iloc[np.sort(places)].reset_index(drop=True)


@dataclass(frozen=True)
class Adapted:
    """A base model with the adapter.

    Attributes:
        model: in evaluation mode, on ``device``.
        tokenizer: of the base model.
        device: of the model.
        bf16: evaluate in bfloat16.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    bf16: bool


def load_adapted(config: TrainConfig, lora_path: str, labels: int) -> Adapted:
    """Load the model that ``config`` names with the adapter in ``lora_path``; a classifier has ``labels`` classes.

    Raises:
        InputError: a model or an adapter that cannot be loaded, or that do not fit each other.
    """
    assert config.model is not None
    device = models.resolve_device(config.device)
    bf16 = models.is_bf16(config.dtype, device)
    set_seed(config.seed)  # before a head is drawn
    if config.task == "causal_lm":
        model, tokenizer = models.load_causal_lm(config.model, torch.bfloat16 if bf16 else torch.float32)
    else:
        model, tokenizer = models.load_classifier(config.model, labels)
    adapted = with_adapter(model, lora_path)
    return Adapted(adapted.to(device).eval(), tokenizer, device, bf16)


def encode(frame: pd.DataFrame, rows: Data, tokenizer: Any, config: TrainConfig) -> list[Example]:
    """Return the rows of ``frame`` as tokens, by the task of ``config``."""
    if config.task == "causal_lm":
        return list(encode_instructions(frame, tokenizer, config.max_length).examples)
    return encode_texts(frame, rows.text_fields, tokenizer, config.max_length)


def batches(examples: Sequence[Example], tokenizer: Any, size: int) -> list[Mapping[str, torch.Tensor]]:
    """Return batches of examples of similar length; the grouping makes no difference to what is measured."""
    ordered = sorted(examples, key=lambda example: -len(example["input_ids"]))
    collator = Collator(tokenizer.pad_token_id, causal=False, longest=tokenizer.model_max_length)
    return [collator.tensors(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def calibrate(
    adapted: Adapted,
    calibration: Sequence[Mapping[str, torch.Tensor]],
    svds: Mapping[str, AdapterSVD],
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Sensitivity]:
    """Return the statistics of every module of ``svds`` on the batches; names are those of the adapter's file."""
    named = {name_in_model(module): svd for module, svd in svds.items()}
    measured = measure(adapted.model, calibration, named, progress=progress)
    return {module: replace(sensitivity, module=module) for module, sensitivity in zip(svds, measured)}


def held_out(
    adapted: Adapted, examples: Sequence[Example], frame: pd.DataFrame, batch_size: int
) -> Callable[[], pd.DataFrame]:
    """Return a function of the losses of ``examples`` (encoded from ``frame``) by the model in its state at the call,
    one row per item."""

    def losses() -> pd.DataFrame:
        table = held_out_losses(adapted.model, examples, adapted.tokenizer, batch_size=batch_size, bf16=adapted.bf16)
        table.insert(0, "row", frame["row"].to_numpy())
        return table

    return losses
