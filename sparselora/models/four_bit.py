"""Frozen weights that bitsandbytes stores in 4 bits: the matrices they stand for, and layers that keep their storage.

On a CPU with AVX-512 BF16, a layer of bitsandbytes 0.50 rearranges its weight when it first evaluates, and rounds the
scales to bfloat16 on the way. Its own way back (called by ``state_dict``) is not the inverse: without double
quantisation the scales come back in another order, with it they are quantised again. So nothing here takes that way:
layers are told to compute with the weight as it is stored, and a weight that was rearranged before is only read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_REARRANGES = "support_avx512bf16_for_cpu"


def is_4bit(weight: torch.Tensor) -> bool:
    """Return whether ``weight`` is stored in 4 bits by bitsandbytes; the dtype of the storage does not tell."""
    return getattr(weight, "quant_state", None) is not None


def is_rearranged(weight: Any) -> bool:
    """Return whether a pass has rearranged a 4-bit weight: bitsandbytes' own gradients through it are wrong then."""
    return is_4bit(weight) and bool(getattr(weight.quant_state, "packing_format_for_cpu", False))


def dequantised(weight: Any) -> torch.Tensor:
    """The matrix ``(d_out, d_in)`` that a 4-bit weight stands for, in the dtype it was quantised from."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

    data, state = weight.data, weight.quant_state
    if is_rearranged(weight):
        by_column = state.absmax
        state = copy.copy(state)  # of the original, the layer's next pass has need
        state.original_nested = False
        data, state = _convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = by_column.t().reshape(-1).float()
    return dequantize_4bit(data, state)


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of ``model.state_dict()``, 4-bit weights as they are stored: by name, with their scales."""
    weights = dict(model.named_parameters())
    if not any(is_4bit(weight) for weight in weights.values()):
        return model.state_dict()
    tensors: dict[str, torch.Tensor] = weights | dict(model.named_buffers())
    for name, weight in weights.items():
        if not is_4bit(weight):
            continue
        state: Any = weight.quant_state  # type: ignore[attr-defined]
        tensors[f"{name}.absmax"] = state.absmax
        if state.nested:
            tensors |= {f"{name}.nested_absmax": state.state2.absmax, f"{name}.offset": state.offset}
    return tensors


def keep_storage(model: nn.Module) -> Callable[[], None]:
    """Let no pass of ``model`` rearrange its 4-bit weights; returns a function that permits it again."""
    layers: list[Any] = [module for module in model.modules() if module.__dict__.get(_REARRANGES)]
    for layer in layers:
        setattr(layer, _REARRANGES, False)

    def permit() -> None:
        for layer in layers:
            setattr(layer, _REARRANGES, True)

    return permit
