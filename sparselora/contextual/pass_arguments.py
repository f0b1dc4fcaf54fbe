"""The arguments of a training pass: the tokens that are context in it, and the passes of ours that can stand for it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import TransformersKwargs

from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.structure import Structure
from sparselora.errors import InputError

Tensor = torch.Tensor

_PACKED = {"input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch", "use_cache", "return_dict",
           "output_attentions", "output_hidden_states", "token_layout", "inputs_embeds", "task_ids"}  # fmt: skip
"""Arguments that the packed pass understands (those it ignores must be empty)."""

_SEQUENCES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""What collators that pack rows say of the sequences in a row, again: positions that start at 0 again have said it."""

_LAYOUT = "token_layout=TokenLayout.build(attention_mask, labels)"


def batch_shape(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """``(batch, length)`` of the arguments of a pass."""
    for name, dims in (("input_ids", 2), ("inputs_embeds", 3)):
        if isinstance(arguments.get(name), Tensor) and arguments[name].dim() == dims:
            return arguments[name].shape[0], arguments[name].shape[1]
    return None


def wants_loss_alone(model: Any, names: Collection[str], arguments: Mapping[str, Any]) -> bool:
    """Return whether the loss is the model's own and all that is wanted: then ours does without most logits.

    Args:
        model: a causal model.
        names: the arguments of its forward.
    """
    if not (model.training and arguments.get("labels") is not None):
        return False
    if (
        arguments.get("output_hidden_states")
        or arguments.get("output_attentions")
        or arguments.get("return_dict") is False
    ):
        return False
    understood = {*names, *_PACKED, *TransformersKwargs.__annotations__} - {"shift_labels"}
    if any(value is not None and name not in understood for name, value in arguments.items()):
        return False
    return getattr(model, "loss_function", ForCausalLMLoss) is ForCausalLMLoss


def is_packable(arguments: Mapping[str, Any], layout: TokenLayout, window: int | None) -> bool:
    """Return whether the packed pass understands every argument; ``window`` is that of the model's attention."""
    if arguments.get("inputs_embeds") is not None or arguments.get("input_ids") is None:
        return False
    understood = _PACKED | _SEQUENCES if layout.sequences else _PACKED
    if any(value is not None and name not in understood for name, value in arguments.items()):
        return False
    if layout.sequences and arguments.get("max_length_q") not in (None, layout.width):
        return False
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    # A mask of its own, or positions that may start again, decide which tokens see one another.
    if (mask is not None and mask.dim() != 2) or bool(layout.sequences) != (mask is None and positions is not None):
        return False
    longest = layout.width if layout.sequences else arguments["input_ids"].shape[1]
    return window is None or longest <= window


def layout_of(
    structure: Structure, arguments: Mapping[str, Any], labels: Tensor | None, *, follows_labels: bool, trains: bool,
    multiple: int,
) -> TokenLayout | None:  # fmt: skip
    """The layout from the arguments: on a GPU this waits for the device once. None where nothing tells.

    Args:
        labels: of the batch, ``(batch, length)``, for arguments without.
        follows_labels: the pass treats context and output tokens differently.
        trains: it is a training pass of a model that differs from the plain one.
        multiple: as in `TokenLayout.build`.

    Raises:
        InputError: nothing tells, in a training pass.
    """
    shape, mask, other_labels = batch_shape(arguments), arguments.get("attention_mask"), labels
    labels = arguments.get("labels")
    if labels is None and other_labels is not None and other_labels.shape == shape:
        labels = other_labels
    last_logits = arguments.get("logits_to_keep")
    last_logits = last_logits if isinstance(last_logits, int) and not isinstance(last_logits, bool) else 0
    cause = None
    if shape is None:
        cause = "it has neither input_ids nor inputs_embeds of (batch, length)"
    elif arguments.get("past_key_values") is not None:
        cause = "it has past_key_values (prefix tuning, a cache), which sparse passes do not support; use a LoRA"
    elif mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        cause = f"its attention_mask is {kind}, wanted (batch, length), so padding is unknown; or add {_LAYOUT}"
    elif structure.causal and labels is None and not last_logits and (follows_labels or not trains):
        cause = (
            "it has no labels (label smoothing and a loss of the trainer's own take them out of the batch), so "
            f"which tokens are context is unknown; call sparsify on the trainer, or add {_LAYOUT} to the batch, or "
            "set dense_output_tokens to false"
        )
    if cause is not None:
        if trains:
            raise InputError(f"a training pass cannot be sparse: {cause}")
        if not structure.model.training:  # asked for by sparse_eval
            warnings.warn(f"an evaluation pass is dense in spite of sparse_eval: {cause}", stacklevel=2)
        return None
    mask = None if mask is None else mask.detach().cpu()
    labels = labels.detach().cpu() if structure.causal and labels is not None else None
    assert shape is not None
    positions = arguments.get("position_ids") if mask is None and structure.causal else None
    return TokenLayout.build(
        mask, labels, shape, causal=structure.causal, multiple=multiple, last_logits=last_logits,
        position_ids=positions if isinstance(positions, Tensor) and positions.dim() == 2 else None,
    )  # fmt: skip
