"""Several examples in one row: best fit, decreasing, so that rows have little padding.

A row says by its positions, which begin again with every example, that none of them sees another: transformers builds
its masks from them where a batch has no ``attention_mask``, and `sparselora.contextual.layout` its attention.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from sparselora.data.batches import Example


@dataclass(frozen=True)
class PackedRows:
    """Examples packed into rows.

    Attributes:
        rows: as examples, with ``position_ids`` that begin again at every one of them.
        fill: share of the rows' positions that are tokens, were each as long as the limit.
    """

    rows: list[Example]
    fill: float


def best_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Return the indices of ``lengths`` in bins of at most ``limit``.

    The longest comes first (of equal ones the first), each to the bin with the least room that it fits into (of equal
    ones the first that had so much room); a bin is opened where there is none. Indices of a bin are in that order.
    """
    assert all(0 < length <= limit for length in lengths)
    bins: list[list[int]] = []
    by_room: dict[int, deque[int]] = {}  # room → bins with so much, the first first
    rooms: list[int] = []  # the keys that have bins, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            bins.append([index])
            room, chosen_bin = limit - length, len(bins) - 1
        else:
            room = rooms[place]
            chosen_bin = by_room[room].popleft()
            if not by_room[room]:
                rooms.pop(place)
            bins[chosen_bin].append(index)
            room -= length
        if room:
            waiting = by_room.setdefault(room, deque())
            if not waiting:
                insort(rooms, room)
            waiting.append(chosen_bin)
    return bins


def pack_examples(examples: Sequence[Example], limit: int) -> PackedRows:
    """Return ``examples`` (``input_ids`` and ``labels``, of which the first is none) in rows of at most ``limit``."""
    rows = []
    for indices in best_fit([len(example["input_ids"]) for example in examples], limit):
        members = [examples[i] for i in indices]
        rows.append(
            {
                **{name: [x for member in members for x in member[name]] for name in ("input_ids", "labels")},
                "position_ids": [i for member in members for i in range(len(member["input_ids"]))],
            }
        )
    tokens = sum(len(row["input_ids"]) for row in rows)
    return PackedRows(rows, tokens / (limit * len(rows)) if rows else 1.0)
