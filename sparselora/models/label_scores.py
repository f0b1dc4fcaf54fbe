"""Losses of a causal language model at its labelled positions: logits exist there only, a piece at a time.

A batch of 64 × 512 tokens and 152 thousand words has 20 GB of logits in float32, of which an evaluation reads those
whose next token carries a label. The hidden states of an FFN of such a batch are gigabytes too, so a pass of the model
takes a few rows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from sparselora.models.labels import IGNORED

_LOGITS = 1 << 26
"""Logits formed at a time: 256 MB in float32."""
_TOKENS = 1 << 13
"""Tokens of one pass of the model, or one row: a GPU is busy from about here, two cores from far fewer. A batch of
64 × 512 tokens of a 0.5B model in float32, whose weights are 2 GB, peaked at 4.9 GB in one pass (H200). In passes of
this size the operations of a layer hold 0.7 GB at most."""
_LOUD = 100.0
"""Size of the logits that stand in for the output layer's: soft-capping is invisible on small ones."""

Tensor = torch.Tensor


class LabelScores:
    """Scores of the labels of a causal language model in evaluation mode, with an adapter or without.

    The model runs as it is, on as many rows at a time as `_TOKENS` allows, except that its output layer gets one
    position only; what it would have got is taken for the labelled positions. That is exact where the layer is a plain
    linear one and nothing is done to its logits, which every pass proves: random logits stand in for those of the one
    position, and the model must hand them on as they are. Where it does not (soft-capping, scaling), or has another
    output layer, the logits are the model's own, of as many rows at a time as `_LOGITS` allows.

    The other rows of a batch change the scores of a row by rounding only: products of another size may add in another
    order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        output_layer: Any = getattr(model, "get_output_embeddings", None)
        head: Any = None if output_layer is None else output_layer()
        self.head: nn.Linear | None = head if isinstance(head, nn.Linear) else None
        self._vocabulary: int | None = head.weight.shape[0] if hasattr(head, "weight") else None

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """Return for each row of a batch its labels, their summed loss in nats, and hits of the argmax, ``(batch, 3)``.

        In float64. The logits of a position are for the label at the next one.

        Args:
            inputs: arguments of the model without ``labels``; tensors have the batch first.
            labels: ``(batch, length)``; `IGNORED` is none.
        """
        can_split = all(isinstance(value, Tensor) for value in inputs.values())
        size = max(1, _TOKENS // labels.shape[1]) if can_split else len(labels)
        passes = [
            self._of_rows(_part(inputs, slice(start, start + size)), labels[start : start + size])
            for start in range(0, len(labels), size)
        ]
        return torch.cat(passes)

    def _of_rows(self, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """Return the scores ``(rows, 3)`` of rows that the model may take at once."""
        scores = torch.zeros(len(labels), 3, dtype=torch.float64, device=labels.device)
        rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        for part, logits in self._logits(inputs, labels, rows, columns):
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            wanted = labels[rows[part], columns[part] + 1]
            loss = F.cross_entropy(wide, wanted, reduction="none")
            hits = wide.argmax(dim=1) == wanted
            of_labels = torch.stack((torch.ones_like(loss), loss, hits.to(loss.dtype)), dim=1)
            scores.index_add_(0, rows[part], of_labels.double())
        return scores

    def _logits(
        self, inputs: Mapping[str, Any], labels: Tensor, rows: Tensor, columns: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield parts of the labels, in order, with the logits ``(part, V)`` for them."""
        length = labels.shape[1]
        hidden = self._hidden(inputs)
        if hidden is not None and self.head is not None:
            text = _of_text(hidden, length)
            size = max(1, _LOGITS // self.head.weight.shape[0])
            with _whole(self.head) as logits_of:
                for start in range(0, len(rows), size):
                    part = slice(start, start + size)
                    yield part, logits_of(text[rows[part], columns[part]])
            return
        can_split = all(isinstance(value, Tensor) for value in inputs.values())
        size = max(1, _LOGITS // (length * (self._vocabulary or _LOGITS))) if can_split else len(labels)
        done = 0
        for start in range(0, len(labels), size):
            logits = _of_text(self.model(**_part(inputs, slice(start, start + size))).logits, length)
            count = int(((rows >= start) & (rows < start + size)).sum())
            part = slice(done, done + count)
            yield part, logits[rows[part] - start, columns[part]]
            done += count

    def _hidden(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the input of the output layer ``(batch, length, d)``; None where the logits are more than its output,
        which holds for later batches too."""
        if self.head is None:
            return None
        with _standing_in(self.head) as seen:
            logits = self.model(**inputs).logits
        is_plain = len(seen) == 1 and seen[0][1].shape == logits.shape and seen[0][0].dim() == 3
        if is_plain and torch.equal(seen[0][1].to(logits.dtype), logits):
            return seen[0][0]
        self.head = None
        return None


@contextmanager
def _whole(head: nn.Linear) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the map of ``head``. Where FSDP2 shards it, its weight is gathered once: processes do that together, and
    have different numbers of labels."""
    if not isinstance(head, FSDPModule):
        yield head
        return
    head.unshard()
    try:
        yield lambda x: F.linear(x, head.weight, head.bias)
    finally:
        head.reshard()


@contextmanager
def _standing_in(head: nn.Linear) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Give ``head`` the first position only and have it answer at random; collect its input and the answer."""
    inputs: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []

    def shorten(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0])
        return (args[0][:1, :1], *args[1:])

    def answer(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(len(seen))
        loud = (_LOUD * torch.randn(output.shape, generator=generator)).to(output.device, output.dtype)
        seen.append((inputs[-1], loud))
        return loud

    hooks = (head.register_forward_pre_hook(shorten), head.register_forward_hook(answer))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _part(inputs: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Return ``inputs`` with these rows of every tensor."""
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _of_text(values: Tensor, length: int) -> Tensor:
    """Return the positions of the text ``(batch, length, …)``: virtual tokens of prompt tuning stand before them."""
    if values.shape[1] < length:
        raise RuntimeError(f"the model gave {values.shape[1]} positions for a text of {length}")
    return values[:, -length:]
