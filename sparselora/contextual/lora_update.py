"""The LoRA that joins a frozen linear layer in a pass: its factors, their gradients, and what takes their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sparselora.kernels.casts import factor_gradients

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA of one linear layer: ``A (r, d_in)``, ``B (d_out, r)``."""

    A: nn.Parameter
    B: nn.Parameter
    scale: float
    dropout: float


@dataclass(frozen=True, eq=False)
class Lora:
    """The update ``B A`` of a layer, or of layers with one input whose outputs stand side by side.

    ``A (Σr, d_in)`` has the adapters' A below one another, ``B (Σd_out, Σr)`` their scale · B along its diagonal, zero
    where a layer has no adapter. ``outs`` and ``ranks`` say where each adapter stands. ``cast`` holds A and B in the
    dtype of a pass where they were made for the whole model at once.
    """

    adapters: tuple[Adapter, ...]
    outs: tuple[slice, ...]
    ranks: tuple[slice, ...]
    d_out: int
    cast: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, adapters: Sequence[Adapter | None], widths: Sequence[int], cast: Any = None) -> Lora | None:
        """The common update of layers of ``widths`` outputs; None where none has an adapter."""
        present, outs, ranks, row, rank = [], [], [], 0, 0
        for adapter, width in zip(adapters, widths):
            if adapter is not None:
                present.append(adapter)
                outs.append(slice(row, row + width))
                ranks.append(slice(rank, rank + len(adapter.A)))
                rank += len(adapter.A)
            row += width
        return cls(tuple(present), tuple(outs), tuple(ranks), row, cast) if present else None

    @property
    def key(self) -> int:
        return id(self.adapters[0].A)

    @property
    def rank(self) -> int:
        return self.ranks[-1].stop

    @property
    def dropout(self) -> float:
        return max(adapter.dropout for adapter in self.adapters)

    @property
    def parameters(self) -> list[Tensor]:
        """A and B of each adapter, or what stands in for them (`stand_ins`)."""
        leaves = _STAND_INS.get()
        parameters = [parameter for adapter in self.adapters for parameter in (adapter.A, adapter.B)]
        return [leaves.get(id(parameter), parameter) for parameter in parameters]

    def a(self, dtype: torch.dtype) -> Tensor:
        if self.cast is not None and self.cast[0].dtype == dtype:
            return self.cast[0]
        parts = [adapter.A.detach().to(dtype) for adapter in self.adapters]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def b(self, dtype: torch.dtype) -> Tensor:
        if self.cast is not None and self.cast[1].dtype == dtype:
            return self.cast[1]
        block = torch.zeros(self.d_out, self.rank, dtype=dtype, device=self.adapters[0].B.device)
        for adapter, out, rank in zip(self.adapters, self.outs, self.ranks):
            block[out, rank] = adapter.B.detach() * adapter.scale
        return block

    def split(self, dA: Tensor, dB: Tensor) -> list[Tensor]:
        """Gradients of `parameters` from those of A and B."""
        gradients: list[Tensor] = []
        for adapter, out, rank in zip(self.adapters, self.outs, self.ranks):
            gradients += factor_gradients(dA[rank], dB[out, rank], adapter.scale, adapter.A.dtype)
        return gradients


_STAND_INS: ContextVar[Mapping[int, Tensor]] = ContextVar("_STAND_INS", default=MappingProxyType({}))


@contextmanager
def stand_ins(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Have passes inside take new leaves in place of ``parameters``, in the same memory, and yield these leaves.

    Autograd runs the node that accumulates a parameter's gradient on the stream it was made on, in the first pass after
    the last one that anything still holds, such as a loss or logits. A capture as a CUDA graph must not wait for that
    stream; leaves that it makes itself have nodes of its own.
    """
    leaves = [parameter.detach().requires_grad_() for parameter in parameters]
    token = _STAND_INS.set({id(parameter): leaf for parameter, leaf in zip(parameters, leaves)})
    try:
        yield leaves
    finally:
        _STAND_INS.reset(token)
