"""The rows that an edit is calibrated and evaluated on, and the statistics and losses of an adapted model on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from sparselora.config.train import TrainConfig
from sparselora.data.batches import Collator, Example
from sparselora.data.load import Data, load_data
from sparselora.errors import InputError
from sparselora.evaluation.adapted_model import AdaptedModel
from sparselora.evaluation.losses import held_out_losses
from sparselora.spectral.edit import ROWS, generator, name_in_model
from sparselora.spectral.factors import AdapterSVD
from sparselora.spectral.sensitivity import Sensitivity, measure


def load_rows(config: TrainConfig, adapter: str) -> Data:
    """Load the data that ``config`` names, whole for training, with the classes of the adapter in ``adapter``.

    The seed of ``config``, the calibration's, draws no rows to evaluate.
    """
    return load_data(config.replace(train_samples=0, seed=0), adapter)


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


def batches(examples: Sequence[Example], tokenizer: Any, size: int) -> list[Mapping[str, torch.Tensor]]:
    """Return batches of examples of similar length; the grouping makes no difference to what is measured."""
    ordered = sorted(examples, key=lambda example: -len(example["input_ids"]))
    collator = Collator(tokenizer.pad_token_id, causal=False, longest=tokenizer.model_max_length)
    return [collator.tensors(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def calibrate(
    adapted: AdaptedModel,
    calibration: Sequence[Mapping[str, torch.Tensor]],
    svds: Mapping[str, AdapterSVD],
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Sensitivity]:
    """Return the statistics of every module of ``svds`` on the batches; names are those of the adapter's file."""
    named = {name_in_model(module): svd for module, svd in svds.items()}
    measured = measure(adapted.model, calibration, named, progress=progress)
    return {module: replace(sensitivity, module=module) for module, sensitivity in zip(svds, measured)}


def held_out(
    adapted: AdaptedModel,
    examples: Sequence[Example],
    frame: pd.DataFrame,
    batch_size: int,
    on_done: Callable[[int], object],
) -> Callable[[], pd.DataFrame]:
    """Return a function of the losses of ``examples`` (encoded from ``frame``) by the model in its state at the call,
    one row per item; ``on_done`` is called with the number of rows after each batch."""

    def losses() -> pd.DataFrame:
        table = held_out_losses(
            adapted.model, examples, adapted.tokenizer, batch_size=batch_size, bf16=adapted.bf16, on_done=on_done
        )
        table.insert(0, "row", frame["row"].to_numpy())
        return table

    return losses
