"""The output layer of a model whose loss is the cross-entropy of its product: computed where a label is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.proof import head_disproof, undisturbed
from sparselora.contextual.sharding import between_hooks, class_of, is_unit
from sparselora.contextual.structure import partition
from sparselora.kernels.cross_entropy import Observer, linear_cross_entropy

Tensor = torch.Tensor


def plain_head(model: Any, proven: nn.Module | None = None) -> nn.Linear | None:
    """The output layer, where the loss is nothing but that of its product with the last hidden state; else None.

    Args:
        proven: an output layer that has passed `head_disproof` and is not tried again.
    """
    head = model.get_output_embeddings()
    if class_of(head) is not nn.Linear or head.weight.requires_grad:
        return None
    is_plain = head is proven
    if not is_plain:
        with undisturbed(model):
            is_plain = head_disproof(model, head) is None
    return head if is_plain else None


def is_readable(head: nn.Module) -> bool:
    """Return whether the weight of an output layer is whole in the pass of its model, or can be gathered."""
    return class_of(head) is not nn.Linear or is_unit(head) or not partition(cast(nn.Linear, head).weight)


def labelled_loss(
    model: Any, head: nn.Linear, arguments: Mapping[str, Any], layout: TokenLayout, observe: Observer | None
) -> Tensor:
    """The loss with the output layer at labelled positions only, for decoders that keep their own pass."""
    backbone = getattr(model, model.base_model_prefix)
    skipped = ("labels", "num_items_in_batch", "logits_to_keep", "return_dict")
    hidden = backbone(**{k: v for k, v in arguments.items() if k not in skipped})[0]
    rows = hidden.flatten(0, 1).index_select(0, layout.tokens[layout.n_context :])

    def summed(rows: Tensor) -> Tensor:
        rows = rows.to(head.weight.dtype)
        return linear_cross_entropy(rows, head.weight, head.bias, layout.targets, observe=observe)

    loss = between_hooks(head, summed, rows)
    count = arguments.get("num_items_in_batch")
    return loss / (layout.n_output if count is None else count)


def no_loss(forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Tensor:
    """A loss of zero, by the model's own pass: other processes wait for this one's part in every gather of weights."""
    inputs = {name: value for name, value in arguments.items() if name not in ("labels", "num_items_in_batch")}
    loss: Tensor = forward(**inputs, logits_to_keep=1).logits.float().sum() * 0.0
    return loss
