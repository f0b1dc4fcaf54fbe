"""Copies of every LoRA factor in the dtype of a pass, made by one call for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparselora.contextual.block_linears import BlockLinears
from sparselora.contextual.frozen import FrozenLinear, FusedLinear
from sparselora.contextual.lora_update import Lora
from sparselora.kernels.casts import CastTable

Tensor = torch.Tensor
Layer = FrozenLinear | FusedLinear


class LoraCasts:
    """The copies of one model.

    The factors of layers that share an input stand in one A and one block-diagonal B, so that their thin products are
    one.
    """

    def __init__(self, blocks: Sequence[BlockLinears]) -> None:
        self._layers: list[Layer] = [
            layer for block in blocks for layer in (block.qkv, block.attention["o"], block.first, block.down)
        ]
        self._state: tuple[Any, ...] | None = None
        self._table = CastTable([], [], [])
        self._casts: list[tuple[Layer, tuple[Tensor, Tensor]]] = []

    @property
    def parameters(self) -> list[Tensor]:
        """The factors of every layer, as they are now."""
        loras = (layer.lora() for layer in self._layers)
        return [parameter for lora in loras if lora is not None for parameter in lora.parameters]

    @property
    def memory(self) -> Any:
        """The copies and what fills them: other factors get others, and these may be freed unless they are held."""
        return self._table, self._casts

    @torch.no_grad()
    def prepare(self, dtype: torch.dtype) -> None:
        """Make room for the copies, where the factors are others than in the last pass."""
        loras = [(layer, layer.lora()) for layer in self._layers]
        adapted = [(layer, lora) for layer, lora in loras if lora is not None]
        adapters = [adapter for _, lora in adapted for adapter in lora.adapters]
        state = (dtype, *((a.A.data_ptr(), a.B.data_ptr(), len(a.A), a.scale) for a in adapters))
        if state != self._state:
            self._allocate(adapted, dtype)
            self._state = state

    def refresh(self) -> None:
        """Make the copies current and hand them to the layers."""
        self._table.run()
        for layer, cast in self._casts:
            layer.cast = cast

    def forget(self) -> None:
        """Take the copies away again: another pass may come after the factors have changed."""
        for layer, _ in self._casts:
            layer.cast = None

    def _allocate(self, adapted: Sequence[tuple[Layer, Lora]], dtype: torch.dtype) -> None:
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        scales: list[float] = []
        self._casts = []
        for layer, lora in adapted:
            first = lora.adapters[0].A
            A = torch.empty(lora.rank, first.shape[1], dtype=dtype, device=first.device)
            B = torch.zeros(lora.d_out, lora.rank, dtype=dtype, device=first.device)
            for adapter, out, rank in zip(lora.adapters, lora.outs, lora.ranks):
                sources += [adapter.A.detach(), adapter.B.detach()]
                targets += [A[rank], B[out, rank]]
                scales += [1.0, adapter.scale]
            self._casts.append((layer, (A, B)))
        self._table = CastTable(sources, targets, scales)
