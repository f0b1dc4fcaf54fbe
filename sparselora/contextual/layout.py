"""The tokens of a batch: those of the context, those that predict a label, and their places in attention."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from sparselora.errors import InputError
from sparselora.models.labels import IGNORED

_CLASS_WIDTH = 16
"""Least difference of the widths for which sequences of one row are put through attention apart."""


class ContextRuns(NamedTuple):
    """The numbers of a row's context tokens that stand before its first output token, between two, after the last.

    No output token depends on those that come after all of them; where a row has none, that is the whole row.
    """

    before: int
    between: int
    after: int


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one batch in packed order: context tokens first, then output tokens; padding is left out.

    Context tokens are in the order of the batch, unless some are detached (`sampled`, `activated`).

    Attributes:
        tokens: flat position ``row · length + column`` of each packed token ``(n,)``.
        columns: its column ``(n,)``.
        slots: its place ``row · width + rank`` in the buffer that attention reads ``(n,)``: rows keep their order and
            are aligned to the left, so a causal mask is all they need. Where a row holds several sequences, each is a
            row of the buffer, which then has parts of several widths (`buffers`).
        targets: label of each output token's successor ``(n_output,)``; empty without token labels.
        n_context, n_output: how many of each.
        batch, length: shape of the batch.
        width: length of the longest row without padding; of the longest sequence, where rows hold several.
        sequences: where rows hold several sequences, how many the parts of attention's buffer have, and their width;
            else empty.
        runs: the context of each row (or sequence), in parts; empty in a padded layout.
        n_detached: packed rows before this one, of the context, have no backward pass.
        n_sampled: packed rows from there to this one are a sample of the rows' context before their first output token.
        n_inactive: packed rows before this one are without an adapter; 0, or as many as ``n_detached``.
        places: packed row of each token, had the order stayed that of the batch ``(n,)``; of `padded` layouts, of the
            context's tokens alone, filled up with zeros ``(n_context,)``. None where the order is the batch's.
        counted: of `padded` layouts, how many of the context and of the output rows are tokens ``(2,)``; else None.
        multiple: what sizes of ``graph`` are multiples of; 0 without.
        graph: the same batch `padded` to one of few shapes, for passes that are captured once a shape; None if not
            asked for.
        host: the same layout on the CPU, where this one was moved from there; else None.
    """

    tokens: torch.Tensor
    columns: torch.Tensor
    slots: torch.Tensor
    targets: torch.Tensor
    n_context: int
    n_output: int
    batch: int
    length: int
    width: int
    sequences: tuple[tuple[int, int], ...] = ()
    runs: tuple[ContextRuns, ...] = ()
    n_detached: int = 0
    n_sampled: int = 0
    n_inactive: int = 0
    places: torch.Tensor | None = None
    counted: torch.Tensor | None = None
    multiple: int = 0
    graph: TokenLayout | None = None
    host: TokenLayout | None = None

    @classmethod
    def build(
        cls,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        shape: tuple[int, int] | None = None,
        *,
        causal: bool = True,
        multiple: int = 0,
        last_logits: int = 0,
        position_ids: torch.Tensor | None = None,
    ) -> TokenLayout:
        """The layout of a batch; to be called on CPU tensors, where it costs no synchronisation.

        Args:
            attention_mask: ``(batch, length)``, 1 where a token is; None where all are.
            labels: of a causal model ``(batch, length)``, -100 where there is none. Position t is an output token if
                position t + 1 carries a label, which it predicts. Ignored for an encoder.
            shape: of the batch, if neither of the two tells.
            causal: a causal language model; an encoder's tokens are all context.
            multiple: also make ``graph``, padded to multiples of this; 0 does not, nor do rows of several sequences.
            last_logits: of a causal model without labels, the number of last positions whose logits are wanted: those
                are the output tokens.
            position_ids: ``(batch, length)`` or ``(1, length)``, of rows that hold several sequences: one begins where
                a position does not follow that before it, as transformers reads them.

        Raises:
            InputError: shapes that differ.

        A label whose predecessor is padding, or that has none, has nothing to predict it and does not count.
        """
        known_shape = attention_mask if attention_mask is not None else labels if causal else None
        batch, length = shape if shape is not None else tuple(known_shape.shape) if known_shape is not None else (0, 0)
        device = torch.device("cpu")
        valid = torch.ones(batch, length, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise InputError(f"attention_mask must be (batch, length), got {tuple(attention_mask.shape)}")
            valid = attention_mask.to(device) != 0
        output = torch.zeros_like(valid)
        targets = torch.empty(0, dtype=torch.int64)
        if causal and labels is not None:
            labels = labels.to(device)
            if labels.shape != valid.shape:
                raise InputError(f"labels are {tuple(labels.shape)}, the batch is {tuple(valid.shape)}")
            following = torch.full_like(labels, IGNORED)
            following[:, :-1] = labels[:, 1:]
            output = (following != IGNORED) & valid
            targets = following[output]
        elif causal and last_logits:
            output[:, -last_logits:] = valid[:, -last_logits:]
            targets = torch.full((int(output.sum()),), IGNORED)
        context = valid & ~output
        flat = torch.cat((context.flatten().nonzero()[:, 0], output.flatten().nonzero()[:, 0]))
        if position_ids is not None:
            return cls._of_sequences(valid, output, flat, targets, position_ids.to(device).expand(batch, length))
        rank = valid.long().cumsum(dim=1) - 1
        width = int(valid.sum(dim=1).max()) if valid.numel() else 0
        slots = (torch.arange(batch)[:, None] * width + rank).flatten()[flat]
        columns = flat % max(length, 1)
        ordinal = output.long().cumsum(dim=1)
        n_output = ordinal[:, -1:] if length else ordinal
        parts = ((ordinal == 0) & (n_output > 0), (ordinal > 0) & (ordinal < n_output), ordinal == n_output)
        counts = zip(*((context & part).sum(dim=1).tolist() for part in parts))
        layout = cls(
            flat, columns, slots, targets, int(context.sum()), int(output.sum()), batch, length, width,
            runs=tuple(ContextRuns(*of_row) for of_row in counts), multiple=multiple,
        )  # fmt: skip
        return layout._with_graph()

    @classmethod
    def _of_sequences(
        cls, valid: torch.Tensor, output: torch.Tensor, flat: torch.Tensor, targets: torch.Tensor,
        positions: torch.Tensor,
    ) -> TokenLayout:  # fmt: skip
        """The layout of rows of several sequences: ``valid``, ``output`` and ``positions (batch, length)``.

        Attention runs over sequences of similar length at a time, so that its buffer has few empty slots.
        """
        begins = torch.ones_like(valid)
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        sequence_ids = begins.flatten().cumsum(dim=0)[valid.flatten()]  # of each token, in the order of the batch
        _, sequence, lengths = sequence_ids.unique_consecutive(return_inverse=True, return_counts=True)
        first = lengths.cumsum(dim=0) - lengths
        rank = torch.arange(len(sequence)) - first[sequence]
        classes = [rounded_up(length, _CLASS_WIDTH, parts=4) for length in lengths.tolist()]
        offsets, widths = torch.zeros_like(lengths), torch.zeros_like(lengths)
        sequences, n_slots = [], 0
        for members in (torch.tensor([c == size for c in classes]) for size in sorted(set(classes))):
            count, width = int(members.sum()), int(lengths[members].max())
            widths[members] = width
            offsets[members] = n_slots + torch.arange(count) * width
            sequences.append((count, width))
            n_slots += count * width
        slots = torch.zeros(valid.numel(), dtype=torch.int64)
        slots[valid.flatten()] = offsets[sequence] + rank
        is_output = output[valid].long()
        before = is_output.cumsum(dim=0) - is_output
        ordinal = before + is_output - before[first][sequence]
        n_output = torch.bincount(sequence, weights=is_output.double(), minlength=len(lengths)).long()[sequence]
        parts = ((ordinal == 0) & (n_output > 0), (ordinal > 0) & (ordinal < n_output), ordinal == n_output)
        is_context = is_output == 0
        counts = zip(*(torch.bincount(sequence[is_context & p], minlength=len(lengths)).tolist() for p in parts))
        (batch, length), n_outputs = valid.shape, int(is_output.sum())
        return cls(
            flat, flat % max(length, 1), slots[flat], targets, len(sequence) - n_outputs, n_outputs, batch, length,
            int(lengths.max()) if len(lengths) else 0, sequences=tuple(sequences),
            runs=tuple(ContextRuns(*of_sequence) for of_sequence in counts),
        )  # fmt: skip

    @property
    def buffers(self) -> tuple[tuple[int, int], ...]:
        """The parts of the buffer that attention reads, one behind the other: rows and width of each."""
        return self.sequences or ((self.batch, self.width),)

    @property
    def n_slots(self) -> int:
        """Slots of the buffer that attention reads."""
        return sum(rows * width for rows, width in self.buffers)

    @property
    def n_sequences(self) -> int:
        """Rows of that buffer: those of the batch, or the sequences in them."""
        return sum(rows for rows, _ in self.buffers)

    def _with_graph(self) -> TokenLayout:
        """Return this layout with its ``graph``, where one was asked for and it is on the CPU."""
        if not self.multiple or not self.n or self.tokens.device.type != "cpu":
            return self
        return replace(self, graph=self.padded(self.multiple))

    @property
    def groups(self) -> tuple[int, int, int, int]:
        """Numbers of packed rows treated alike: detached, sampled and other context, and output tokens."""
        sampled = max(self.n_sampled - self.n_detached, 0)
        return self.n_detached, sampled, self.n_context - self.n_detached - sampled, self.n_output

    def padded(self, multiple: int) -> TokenLayout:
        """This layout (on the CPU) with rows that are no tokens, so that few shapes occur.

        The numbers of rows of each of its `groups` and the width are rounded up: to ``multiple``, and large ones to a
        sixteenth of the next power of two. Added rows stand in free slots behind the tokens of a row, where causal
        attention keeps them out of everything, and have the target -100.
        """
        groups = tuple(rounded_up(n, multiple) for n in self.groups)
        width = rounded_up(self.width, multiple)
        while self.batch * width < sum(groups):
            width += multiple
        return self.padded_to(groups, width)

    def padded_to(self, groups: Sequence[int], width: int) -> TokenLayout:
        """This layout (on the CPU) with so many rows in each of its `groups`, and a buffer of attention so wide.

        Each is at least what the layout has itself, and ``batch · width`` at least the sum of ``groups``.
        """
        sizes = self.groups
        added = [n - size for n, size in zip(groups, sizes)]
        rows = torch.div(self.slots, self.width, rounding_mode="floor")
        slots = rows * width + self.slots % self.width
        free = torch.ones(self.batch * width, dtype=torch.bool)
        free[slots] = False
        spare = free.nonzero()[: sum(added), 0]

        def fill(values: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
            return torch.cat([x for pair in zip(values.split(sizes), extra.split(added)) for x in pair])

        nothing = torch.zeros(sum(added), dtype=torch.int64)
        context = sum(groups[:3])
        places = None
        if self.places is not None:
            moved = torch.arange(sum(groups)).split([n for pair in zip(sizes, added) for n in pair])
            of_context = torch.cat(moved[::2]).index_select(0, self.places[: self.n_context])
            places = torch.cat((of_context, of_context.new_zeros(context - self.n_context)))
        return TokenLayout(
            fill(self.tokens, nothing),
            fill(self.columns, nothing),
            fill(slots, spare),
            torch.cat((self.targets, torch.full((added[3],), IGNORED))),
            context,
            groups[3],
            self.batch,
            self.length,
            width,
            n_detached=groups[0],
            n_sampled=groups[0] + groups[1] if self.n_sampled or groups[1] else 0,
            n_inactive=groups[0] if self.n_inactive else 0,
            places=places,
            counted=torch.tensor([self.n_context, self.n_output]),
        )

    def sampled(self, rows: Collection[int]) -> TokenLayout:
        """This layout with a backward pass for the context of some ``rows`` of the batch only.

        Context before a row's first output token is detached in the other rows, and comes first; then that of
        ``rows``, then context between output tokens, which keeps its backward pass in every row. What comes after a
        row's last output token has a gradient of zero, and is detached in every row.
        """
        sizes = [size for runs in self.runs for size in runs]
        pieces = torch.arange(self.n, device=self.tokens.device).split([*sizes, self.n_output])
        detached = [3 * i + 2 for i in range(len(self.runs))] + [3 * i for i in range(len(self.runs)) if i not in rows]
        sample = [3 * i for i in sorted(rows)]
        between = [3 * i + 1 for i in range(len(self.runs))]
        order = torch.cat([pieces[i] for i in (*detached, *sample, *between, -1)])
        n_detached = sum(sizes[i] for i in detached)
        n_sampled = n_detached + sum(sizes[i] for i in sample)
        return replace(self._ordered(order), n_detached=n_detached, n_sampled=n_sampled)._with_graph()

    def activated(self, starts: torch.Tensor) -> TokenLayout:
        """This layout for an adapter that is active from a column of each row on: ``starts (batch,)``.

        Tokens before it, on which nothing trained has a bearing, come first. It waits for the device.

        Raises:
            InputError: an output token stands before the start of its row; rows of several sequences.
        """
        if self.sequences:
            raise InputError(
                "an activated LoRA is active from one place of a row on, and rows of a batch hold several sequences; "
                "give each a row of its own (no packing)"
            )
        starts = starts.to(self.tokens.device)
        rows = torch.div(self.tokens, max(self.length, 1), rounding_mode="floor")
        is_inactive = self.columns < starts.index_select(0, rows)
        if bool(is_inactive[self.n_context :].any()):
            row = int(rows[self.n_context :][is_inactive[self.n_context :]][0])
            raise InputError(
                f"row {row} of a batch has labels before the last invocation tokens of its activated LoRA, or lacks "
                "those tokens, so the adapter is inactive where it should learn; write them between prompt and "
                "completion, and label what follows"
            )
        inactive = is_inactive.nonzero()[:, 0]
        order = torch.cat((inactive, (~is_inactive).nonzero()[:, 0]))
        return replace(self._ordered(order), n_detached=len(inactive), n_inactive=len(inactive))._with_graph()

    def _ordered(self, order: torch.Tensor) -> TokenLayout:
        """Return the layout with its packed rows in another order ``(n,)``, in which the output tokens keep theirs."""
        return replace(
            self,
            tokens=self.tokens.index_select(0, order),
            columns=self.columns.index_select(0, order),
            slots=self.slots.index_select(0, order),
            places=torch.empty_like(order).scatter_(0, order, torch.arange(self.n, device=order.device)),
            graph=None,
            host=None,
        )

    def draw(self, share: float, seed: int) -> list[int]:
        """Return a random ``share`` of the rows with context before an output token, ascending, without replacement.

        Of n such rows ``share · n`` are drawn on average: that number rounded down, and by chance one more. Each row is
        drawn with probability ``share``.
        """
        rows = [i for i, runs in enumerate(self.runs) if runs.before]
        generator = np.random.default_rng([seed, 1])  # not the stream of channels
        count = int(share * len(rows) + generator.random())
        return sorted(rows[i] for i in generator.permutation(len(rows))[:count])

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TokenLayout:
        """The same layout with its tensors on ``device``."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("tokens", "columns", "slots", "targets", "places", "counted", "graph")
            if getattr(self, name) is not None
        }
        leaves_host = self.tokens.device.type == "cpu" and torch.device(device).type != "cpu"
        return replace(self, **moved, host=self if leaves_host else self.host)

    @property
    def n(self) -> int:
        """Tokens without padding."""
        return self.n_context + self.n_output

    @property
    def covered(self) -> bool:
        """True if the attention buffer has no empty slot."""
        return self.n == self.n_slots

    def spread(self, count: int, total: int) -> torch.Tensor | None:
        """At most ``count`` of the first ``total`` packed rows, evenly spaced, as indices; None for all of them.

        Of a padded layout ``total`` must be its context rows, and only those that are tokens are taken.
        """
        if self.counted is not None:
            count = min(count or total, total)
            return torch.arange(count, device=self.tokens.device) * self.counted[0] // count
        if count == 0 or count >= total:
            return None
        return torch.arange(count, device=self.tokens.device) * total // count


def rounded_up(n: int, multiple: int, parts: int = 16) -> int:
    """The least of few sizes that is at least ``n``: a multiple of ``multiple``, and of 2^⌈log₂ n⌉ / ``parts``."""
    if n == 0:
        return 0
    step = max(multiple, (1 << (n - 1).bit_length()) // parts)
    return -(-n // step) * step
