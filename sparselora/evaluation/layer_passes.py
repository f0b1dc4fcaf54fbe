"""Forward passes of a causal language model that begin at a layer, with the loss of each row at its labels alone.

When one layer changes, the layers below it do not. `LayerPasses` therefore calls the blocks from a layer on, one after
the other, on hidden states that were computed before. Whatever else a model does stays the model's own code: what comes
before its blocks (masks, rotations) is computed once for a batch, by a pass whose blocks are the identity, and what
comes after them (its last norm, a cap on its logits) by a pass of one token whose last block returns our hidden states.
These are those of labelled positions only.

A model asks the device whether a mask has padding, and waits for the answer: for all that the device still has to do.
So no pass that begins at a layer makes a mask, and the host can prepare the next one while the device works.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.structure import Structure
from sparselora.errors import InputError
from sparselora.models.labels import IGNORED

Tensor = torch.Tensor
Forward = Callable[..., Any]

_POSITIONS = 1024
"""Positions whose logits are in full precision at a time: half a gigabyte at a vocabulary of 128 thousand."""
_LOGIT_BYTES = 1 << 28
"""Memory that the logits of one pass may take; on a GPU, `_LOGIT_SHARE` of it."""
_LOGIT_SHARE = 1 / 8
_TOKENS = {"cpu": 4096, "cuda": 1 << 16}
"""Tokens of one pass. On two cores 1,024 to 8,192 took the same time; a GPU is busy from about 8,192."""


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Rows that are measured in one pass.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask (B, T)``.
        layout: context and output tokens, on the device of the inputs.
        flat: position ``row · T + column`` of each token that predicts a label ``(n,)``.
        rows: row of each of them ``(n,)``.
        targets: its label ``(n,)``.
        joined_from: the batches whose rows these are; empty where the batch was built by itself.
    """

    inputs: Mapping[str, Tensor]
    layout: TokenLayout
    flat: Tensor
    rows: Tensor
    targets: Tensor
    joined_from: tuple[RowBatch, ...] = ()

    @classmethod
    def build(cls, batch: Mapping[str, Tensor], device: torch.device) -> RowBatch:
        """Return the batch of ``input_ids``, ``attention_mask`` and ``labels (B, T)`` on ``device``."""
        layout = TokenLayout.build(batch["attention_mask"].cpu(), batch["labels"].cpu())
        flat = layout.tokens[layout.n_context :]
        rows = torch.div(flat, layout.length, rounding_mode="floor")
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        return cls(inputs, layout.to(device), flat.to(device), rows.to(device), layout.targets.to(device))

    @classmethod
    def joined(cls, batches: Sequence[RowBatch]) -> RowBatch:
        """Return the rows of several batches in one, in their order, padded to the right."""
        length = max(batch.layout.length for batch in batches)

        def stacked(tensors: Iterable[Tensor], fill: int) -> Tensor:
            return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=fill) for tensor in tensors])

        tensors = {name: stacked((batch.inputs[name] for batch in batches), 0) for name in batches[0].inputs}
        labels = stacked((batch.labels for batch in batches), IGNORED)
        return replace(cls.build(tensors | {"labels": labels}, labels.device), joined_from=tuple(batches))

    @property
    def parts(self) -> tuple[RowBatch, ...]:
        """The batches that this one was joined from; itself where it was not."""
        return self.joined_from or (self,)

    def split(self, padded: Tensor) -> list[Tensor]:
        """Return the rows of each of `parts` in ``padded (B, T, …)``, without the padding that joining added."""
        sizes = [part.layout.batch for part in self.parts]
        return [rows[:, : part.layout.length] for rows, part in zip(padded.split(sizes), self.parts, strict=True)]

    @property
    def labels(self) -> Tensor:
        """The label of each token ``(B, T)``; `IGNORED` is none."""
        labels = torch.full_like(self.inputs["input_ids"], IGNORED)
        labels.view(-1)[self.flat + 1] = self.targets
        return labels

    @property
    def counts(self) -> NDArray[np.float64]:
        """Labels of each row ``(B,)``."""
        return torch.bincount(self.rows, minlength=self.layout.batch).double().cpu().numpy()


@dataclass(frozen=True)
class _Arguments:
    """The arguments of a block but its hidden states, which come first or by their name."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    is_named: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Arguments:
        return cls(args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}, not args)

    def call(self, block: torch.nn.Module, hidden: Tensor) -> Tensor:
        """Return the hidden states ``(B, T, d)`` that leave ``block`` for those that enter it."""
        if self.is_named:
            output = block(hidden_states=hidden, **self.kwargs)
        else:
            output = block(hidden, *self.args, **self.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states


class LayerPasses:
    """Passes of one causal model, in evaluation mode and without gradients, that may begin at any layer.

    Args:
        structure: the model and its blocks.
    Raises:
        InputError: the model is no causal language model, or has no plain output layer.
    """

    def __init__(self, structure: Structure) -> None:
        model: Any = structure.model
        self.structure, self.model = structure, model
        self.blocks = [structure.module(block.name) for block in structure.blocks]
        head: Any = model.get_output_embeddings() if structure.causal else None
        if head is None:
            raise InputError(
                f"{type(model).__name__} is no causal language model with an output layer; its rows have no "
                "context that could be sparse while the answers are not"
            )
        self.head = head
        self._arguments_of: weakref.WeakKeyDictionary[RowBatch, dict[int, list[_Arguments]]]
        self._arguments_of = weakref.WeakKeyDictionary()
        self._length = 0  # of the tuple that a block returns; 0 where it returns its hidden states alone
        self.restarted_tokens = 0
        """Tokens × layers computed by passes that began at a layer, padding left out."""
        self.restarted_labels = 0
        """Positions that the output layer computed in these passes."""

    # --- whole passes ---

    @torch.no_grad()
    def row_losses(self, batch: RowBatch) -> NDArray[np.float64]:
        """Return the loss of each row in nats, summed over its labels ``(B,)``."""
        losses: NDArray[np.float64] = self._losses(batch)[0].cpu().numpy()
        return losses

    @torch.no_grad()
    def dense(self, batch: RowBatch, layer: int) -> tuple[NDArray[np.float64], Tensor]:
        """Return `row_losses`, and the hidden states ``(B, T, d)`` that enter ``layer``."""
        captured: list[Tensor] = []

        def capture(original: Forward, *args: Any, **kwargs: Any) -> Any:
            captured.append(_hidden(args, kwargs))
            output = original(*args, **kwargs)
            self._length = len(output) if isinstance(output, tuple) else 0
            return output

        with self._replaced({layer: capture}):
            losses = self.row_losses(batch)
        return losses, captured[0]

    # --- from a layer on ---

    def block_outputs(
        self, batch: RowBatch, layer: int, hidden: Tensor, states: Iterable[AbstractContextManager[object]]
    ) -> Iterator[Tensor]:
        """Yield the outputs ``(B, T, d)`` of block ``layer`` for its input ``hidden``, called in each of ``states``.

        The next state is asked for when the one before has been left.
        """
        arguments = self._arguments(batch, 1)[layer]
        for state in states:
            with torch.no_grad(), state:
                output = arguments.call(self.blocks[layer], hidden)
            self.restarted_tokens += batch.layout.n
            yield output

    @torch.no_grad()
    def losses_after(self, batch: RowBatch, layer: int, outputs: Iterable[Tensor]) -> Tensor:
        """Return the losses ``(C, B)`` of the rows for each of C ``outputs (B, T, d)`` of block ``layer``, in float64.

        The outputs go through the layers above side by side, as many at a time as memory allows. They are asked for
        when it is their turn, and nothing is read back from the device: it works on some while the host prepares the
        next.
        """
        remaining, size = iter(outputs), self.copies(batch)
        parts = iter(lambda: list(itertools.islice(remaining, size)), [])
        return torch.cat([self._losses_after(batch, layer, part) for part in parts])

    def _losses_after(self, batch: RowBatch, layer: int, outputs: Sequence[Tensor]) -> Tensor:
        copies, hidden = len(outputs), torch.cat(list(outputs))
        above = slice(layer + 1, None)
        for block, arguments in zip(self.blocks[above], self._arguments(batch, copies)[above], strict=True):
            hidden = arguments.call(block, hidden)
        labelled = hidden.reshape(-1, hidden.shape[-1]).index_select(0, _repeated(batch.flat, hidden, copies))
        losses = self._summed(batch, self._logits(labelled[None]), copies)
        self.restarted_tokens += batch.layout.n * copies * (len(self.blocks) - layer - 1)
        self.restarted_labels += len(batch.flat) * copies
        return losses

    def _arguments(self, batch: RowBatch, copies: int) -> list[_Arguments]:
        """Return what each block gets next to its hidden states in a pass over ``copies`` of a batch.

        It is kept as long as the batch: all layers have passes of the same few sizes.
        """
        arguments_of = self._arguments_of.setdefault(batch, {})
        if copies not in arguments_of:
            captured: list[_Arguments] = []

            def capture(original: Forward, *args: Any, **kwargs: Any) -> Any:
                captured.append(_Arguments.of(args, kwargs))
                return self._identity(original, *args, **kwargs)

            inputs = {name: value.repeat(copies, 1) for name, value in batch.inputs.items()}
            with torch.no_grad(), self._every_block(capture), self._head_at(batch.flat[:0]):
                self.model(**inputs, use_cache=False)
            if len(captured) != len(self.blocks):
                raise InputError(
                    f"{type(self.model).__name__} called {len(captured)} of its {len(self.blocks)} blocks in a pass, "
                    "so no pass can begin at a layer"
                )
            arguments_of[copies] = captured
        return arguments_of[copies]

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the logits ``(1, n, v)`` that the model makes of hidden states ``(1, n, d)`` after its last block.

        With a cache and without a mask, a pass of one token makes no mask: nothing is read back from the device.
        """
        token = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
        with self._every_block(lambda original, *args, **kwargs: self._as_output(hidden)):
            logits: Tensor = self.model(input_ids=token, use_cache=True).logits
        return logits

    def copies(self, batch: RowBatch) -> int:
        """Return how many copies of ``batch`` one pass of `losses_after` takes."""
        return max(1, self._fitting(batch.flat.device, len(batch.flat), batch.layout.batch * batch.layout.length))

    def joined(self, batches: Sequence[RowBatch], n_outputs: int = 1) -> list[RowBatch]:
        """Return the rows of ``batches``, in their order, in as few batches as passes may take.

        Args:
            n_outputs: hidden states of each that are kept side by side.
        """
        groups: list[list[RowBatch]] = []
        device, width = self.head.weight.device, self.head.weight.shape[1] * self.head.weight.element_size()
        for batch in batches:
            group = [*(groups[-1] if groups else []), batch]
            length = max(b.layout.length for b in group)
            n_labels, n_positions = sum(len(b.flat) for b in group), length * sum(b.layout.batch for b in group)
            kept_outputs = n_outputs * n_positions * width
            fits = self._fitting(device, n_labels, n_positions) > 0 and kept_outputs <= self._room(device)
            if groups and fits:
                groups[-1] = group
            else:
                groups.append([batch])
        return [RowBatch.joined(group) if len(group) > 1 else group[0] for group in groups]

    def _fitting(self, device: torch.device, n_labels: int, n_positions: int) -> int:
        """Return how many times a batch with so many labels and positions, padding included, fits in one pass."""
        weight = self.head.weight
        logits = self._room(device) // max(1, n_labels * weight.shape[0] * weight.element_size())
        return min(logits, _TOKENS["cuda" if device.type == "cuda" else "cpu"] // n_positions)

    @staticmethod
    def _room(device: torch.device) -> int:
        """Return the memory in bytes that the logits of one pass may take, or the outputs that are kept of a block."""
        if device.type != "cuda":
            return _LOGIT_BYTES
        return int(_LOGIT_SHARE * torch.cuda.get_device_properties(device).total_memory)

    # --- the model's forward ---

    def _losses(self, batch: RowBatch) -> Tensor:
        """Return the losses ``(1, B)`` of a whole pass over a batch."""
        with self._head_at(batch.flat):
            logits = self.model(**batch.inputs, use_cache=False).logits
        return self._summed(batch, logits, 1)

    def _summed(self, batch: RowBatch, logits: Tensor, copies: int) -> Tensor:
        """Return the losses ``(copies, B)`` by the logits at the labelled positions of ``copies`` of a batch."""
        logits = logits.reshape(-1, logits.shape[-1])
        if len(logits) != copies * len(batch.flat):
            raise InputError(
                f"{type(self.model).__name__} does not apply its output layer to its hidden states, so the losses of "
                "labelled positions cannot be measured alone"
            )
        rows = batch.layout.batch
        steps = torch.arange(copies, device=batch.flat.device)[:, None]
        precise = torch.promote_types(logits.dtype, torch.float32)
        place, targets = (batch.rows + steps * rows).flatten(), batch.targets.repeat(copies)
        sums = torch.zeros(copies * rows, dtype=torch.float64, device=logits.device)
        for some, index, labels in zip(*(x.split(_POSITIONS) for x in (logits, place, targets)), strict=True):
            losses = F.cross_entropy(some.to(precise), labels, reduction="none")
            sums.index_add_(0, index, losses.double())
        return sums.view(copies, rows)

    @contextmanager
    def _head_at(self, positions: Tensor) -> Iterator[None]:
        """Let the output layer see these flat positions only."""

        def select(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].reshape(-1, args[0].shape[-1]).index_select(0, positions), *args[1:])

        hook = self.head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            hook.remove()

    def _every_block(self, forward: Forward) -> AbstractContextManager[None]:
        return self._replaced(dict.fromkeys(range(len(self.blocks)), forward))

    @contextmanager
    def _replaced(self, forwards: Mapping[int, Forward]) -> Iterator[None]:
        """Replace the forward of blocks; each gets the original before the arguments.

        Not by `Patches`: nothing copies or compiles a model in the middle of a pass, and there are many passes.
        """
        before = {layer: vars(self.blocks[layer]).get("forward") for layer in forwards}
        try:
            for layer, forward in forwards.items():
                block: Any = self.blocks[layer]
                block.forward = functools.partial(forward, block.forward)
            yield
        finally:
            for layer, instance_forward in before.items():
                values = vars(self.blocks[layer])
                values.pop("forward", None)
                if instance_forward is not None:
                    values["forward"] = instance_forward

    def _identity(self, original: Forward, *args: Any, **kwargs: Any) -> Any:
        return self._as_output(_hidden(args, kwargs))

    def _as_output(self, hidden: Tensor) -> Any:
        """Return hidden states as a block returns them, which `dense` has seen: all blocks of a stack do it alike."""
        return (hidden, *(None,) * (self._length - 1)) if self._length else hidden


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states among a block's arguments: the first, or by their name."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _repeated(flat: Tensor, hidden: Tensor, copies: int) -> Tensor:
    """Return flat positions of one batch, in ``copies`` of it below one another in ``hidden (copies · B, T, d)``."""
    positions = hidden.shape[0] * hidden.shape[1] // copies
    return (flat + positions * torch.arange(copies, device=flat.device)[:, None]).flatten()
