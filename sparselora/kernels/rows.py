"""A range of packed rows, and the channels that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Channels:
    """Some of ``total`` channels: ``index (k,)`` int64 ascending; ``inverse (total,)`` int32, -1 where absent."""

    index: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, index: torch.Tensor, total: int) -> Channels:
        inverse = torch.full((total,), -1, dtype=torch.int32, device=index.device)
        inverse[index] = torch.arange(len(index), dtype=torch.int32, device=index.device)
        return cls(index, inverse)


@dataclass(frozen=True, eq=False)
class Rows:
    """Consecutive rows ``start:stop`` of a packed batch that are treated alike.

    Attributes:
        channels: the channels that these rows hold; None for all.
        ready: the CUDA event after which the operands of these rows may be read, where a side stream makes them.
    """

    start: int
    stop: int
    channels: Channels | None = None
    ready: Any = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def wait(self) -> None:
        """Make the current stream wait until the operands are ready."""
        if self.ready is not None:
            torch.cuda.current_stream().wait_event(self.ready)
