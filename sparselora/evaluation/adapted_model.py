"""A model with its adapter, loaded to be evaluated: for `eval`, for an edit, for the sensitivity of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import set_seed

from sparselora.config.train import TrainConfig
from sparselora.evaluation.losses import with_adapter
from sparselora.models import load as models


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with an adapter, if any.

    Attributes:
        model: in evaluation mode, on ``device``.
        tokenizer: of the base model.
        device: of the model.
        bf16: evaluate in bfloat16 autocast.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    bf16: bool


def load_adapted_model(config: TrainConfig, adapter: str | None, n_labels: int) -> AdaptedModel:
    """Load the model that ``config`` names, for its task, with the adapter in the folder ``adapter``.

    Args:
        adapter: None for the model alone.
        n_labels: classes of a classifier; of no account for a language model.
    Raises:
        InputError: a model or an adapter that cannot be loaded, or that do not fit each other.
    """
    assert config.model is not None
    device = models.resolve_device(config.device)
    bf16 = models.is_bf16(config.dtype, device)
    set_seed(config.seed)  # before a head is drawn
    model: Any
    if config.task == "causal_lm":
        model, tokenizer = models.load_causal_lm(
            config.model, torch.bfloat16 if bf16 else torch.float32, in_4bit=config.load_in_4bit,
            in_8bit=config.load_in_8bit,
            flash_attention=config.use_flash_attention_2,
        )  # fmt: skip
    else:
        model, tokenizer = models.load_classifier(config.model, n_labels)
    if adapter is not None:
        model = with_adapter(model, adapter)
    return AdaptedModel(model.to(device).eval(), tokenizer, device, bf16)
