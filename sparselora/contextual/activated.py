"""Activated LoRA (aLoRA): PEFT's adapter that is inactive before its invocation tokens.

An adapter with ``alora_invocation_tokens`` acts from the start of their last occurrence in a row on. What comes before
is computed by the frozen model alone, so no gradient passes it, and a step without its backward pass is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import nn

from sparselora.errors import InputError

Tensor = torch.Tensor


def is_activated(layer: nn.Module) -> bool:
    """Return whether a layer's active LoRA is an activated one."""
    if not isinstance(layer, LoraLayer):
        return False
    variants: Any = layer.lora_variant
    return any(isinstance(variants.get(name), ALoraLinearVariant) for name in _active(layer))


def _active(layer: Any) -> list[str]:
    return [layer.active_adapter] if isinstance(layer.active_adapter, str) else list(layer.active_adapter)


def invocation_tokens(model: Any) -> tuple[int, ...] | None:
    """Return the invocation tokens of the active adapter of ``model``; None where it is none, or a plain LoRA.

    Raises:
        InputError: it has an empty list of them.
    """
    layer = next((module for module in model.modules() if is_activated(module)), None)
    if layer is None:
        return None
    (name,) = _active(layer)
    tokens = model.peft_config[name].alora_invocation_tokens
    if not tokens:
        raise InputError(
            f"adapter {name} is an activated LoRA without invocation tokens; give alora_invocation_tokens, the token "
            "ids from which on it is active"
        )
    return tuple(tokens)


def invocation_starts(input_ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the column at which the last occurrence of ``tokens`` in each row begins ``(batch,)``.

    It is the length of a row where there is none.

    Args:
        input_ids: ``(batch, length)``.
    """
    length, sought = input_ids.shape[1], torch.tensor(tokens, device=input_ids.device)
    if length < len(sought):
        return torch.full((len(input_ids),), length, device=input_ids.device)
    occurs = (input_ids.unfold(1, len(sought), 1) == sought).all(dim=2)  # (batch, windows)
    last = occurs.shape[1] - 1 - occurs.flip(1).long().argmax(dim=1)
    return torch.where(occurs.any(dim=1), last, length)


@contextmanager
def activated_from(model: nn.Module, starts: Sequence[int], length: int) -> Iterator[None]:
    """Have the LoRA layers of ``model`` be active from ``starts`` on, by PEFT's own code, as under `PeftModel`."""
    offsets = [length - start for start in starts]

    def add(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "alora_offsets": offsets}

    with ExitStack() as hooks:
        for module in model.modules():
            if is_activated(module):
                hooks.callback(module.register_forward_pre_hook(add, with_kwargs=True).remove)
        yield
