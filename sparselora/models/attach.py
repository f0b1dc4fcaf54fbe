"""Attach a LoRA to a model: its factors, and the head that is trained whole with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparselora.errors import InputError
from sparselora.models.initialisation import LORA_GA, start_adapter, start_settings
from sparselora.models.load import head_modules, is_main_process
from sparselora.models.target_modules import is_match, linear_names

_LOG = logging.getLogger("sparselora")


def attach_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    base_model: str,
    task_type: str = "SEQ_CLS",
    use_rslora: bool = False,
    use_dora: bool = False,
    initialisation: str = "default",
    batches: Sequence[Mapping[str, torch.Tensor]] | None = None,
    invocation_tokens: Sequence[int] | None = None,
) -> PeftModel:
    """Freeze ``model`` and attach a LoRA of rank ``r`` in float32, whatever the weights are in.

    With ``task_type`` SEQ_CLS the classifier head outside the encoder trains with it, whole and without an adapter
    (said on stderr where an entry matches in it too); with CAUSAL_LM nothing else. With ``invocation_tokens`` it is an
    activated LoRA: inactive before their last occurrence in a text.

    Args:
        initialisation: of the factors, by a name of `sparselora.config.train.Initialisation`.
        batches: batches with labels on the model's device, for an initialisation that reads data.
    Raises:
        InputError: ``r`` below 1 or above the smallest dimension of a target, where it could not be of full rank; an
            entry that matches modules of the head alone.
    """
    head = head_modules(model) if task_type == "SEQ_CLS" else []
    targets = _adapted(model, target_modules, head)
    smallest = min(min(_sizes(model.get_submodule(name))) for name in targets)
    if not 1 <= r <= smallest:
        raise InputError(
            f"lora_r must be between 1 and {smallest} (the smallest dimension of a target module), got {r}"
        )
    if initialisation == LORA_GA and 2 * r > smallest:
        raise InputError(
            f"init_lora_weights lora_ga takes 2 · lora_r directions of {smallest}, got lora_r {r}; lower it"
        )
    config = LoraConfig(
        task_type=task_type,
        r=r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]  # PEFT divides it by r
        use_rslora=use_rslora,
        use_dora=use_dora,
        **start_settings(initialisation),
        lora_dropout=dropout,
        target_modules=list(target_modules),
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),  # GPT-2's layers, stored transposed
        modules_to_save=head or None,
        alora_invocation_tokens=None if invocation_tokens is None else list(invocation_tokens),
    )
    adapted = start_adapter(model, config, batches)
    adapted.peft_config["default"].base_model_name_or_path = base_model
    return adapted


def _adapted(model: nn.Module, target_modules: Sequence[str], head: Sequence[str]) -> list[str]:
    """Names of the linear layers that entries match outside the head."""
    adapted: list[str] = []
    for entry in target_modules:
        matched = [name for name in linear_names(model) if is_match(name, entry)]
        outside = [name for name in matched if name.partition(".")[0] not in head]
        inside = [name for name in matched if name not in outside]
        if not outside:
            raise InputError(
                f"target module {entry!r} is only in the head ({', '.join(inside)}), which is trained whole; "
                "leave it out, or name modules of the body"
            )
        if inside and is_main_process():
            _LOG.warning(
                f"target module {entry!r} is adapted in the body only: {', '.join(inside)} is in the head, which is "
                "trained whole"
            )
        adapted += outside
    return adapted


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """``(d_out, d_in)``, whatever the weight is stored in."""
    if isinstance(linear, Conv1D):
        return linear.weight.shape[1], linear.weight.shape[0]
    linear = cast(nn.Linear, linear)
    return linear.out_features, linear.in_features
