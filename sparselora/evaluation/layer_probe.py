"""Energies of the channels of a layer on context tokens, and the variance that calibrated maps explain there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sparselora.config.sparsity import Part
from sparselora.contextual.choices import fused_sizes
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.structure import Structure
from sparselora.contextual.surrogate import AffineMap, AttentionStatistics, ChannelStatistics
from sparselora.evaluation.layer_passes import RowBatch

Tensor = torch.Tensor

SHARES = (0.01, 0.03, 0.10, 0.25)
"""Shares of the channels whose energy is reported."""


class LayerProbe:
    """Energies of the channels of one layer, and what the calibrated maps explain, on the context of measured rows."""

    def __init__(self, plan: LayerPlan, moments: Mapping[str, Tensor], parts: Sequence[Part]) -> None:
        self.plan, self.heads = plan, plan.block.attention
        device, heads = plan.linears.device, self.heads
        self.hidden = ChannelStatistics(plan.linears.ffn_width, device)
        self.attention = AttentionStatistics(heads.heads, heads.kv_heads, heads.head_dim, heads.rope, device)
        letters = ("q", "o") if heads.fused else ("q", "k", "v", "o")
        self.names = [*(["ffn"] if "ffn" in parts else []), *(letters if "attention" in parts else [])]
        self.maps = {name: _fitted(moments, plan.block.index, name, device) for name in self.names}
        self.sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.count = 0
        self._inputs: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, batch: RowBatch, structure: Structure) -> Iterator[None]:
        """Measure a dense pass of the block over ``batch``."""
        rows = batch.layout.tokens[: batch.layout.n_context]
        ffn, parts = self.plan.block.ffn, dict[str, Tensor]()

        def flat(x: Tensor) -> Tensor:
            return x.reshape(-1, x.shape[-1]).index_select(0, rows).double()

        def enters(module: Any, args: tuple[Any, ...]) -> None:
            self._inputs["ffn"] = flat(args[0])

        def leaves(module: Any, args: tuple[Any, ...], y: Tensor) -> None:
            self.hidden.update(flat(args[0]))
            self._explain("ffn", self._inputs["ffn"], flat(y))

        def projected(name: str) -> Callable[..., None]:
            def hook(module: Any, args: tuple[Any, ...], y: Tensor) -> None:
                parts[name] = flat(y)
                self._explain(name, flat(args[0]), parts[name])

            return hook

        hooks = []
        if "ffn" in self.names:
            hooks.append(structure.module(ffn.up).register_forward_pre_hook(enters))
            hooks.append(structure.module(ffn.down).register_forward_hook(leaves))
        for name in (name for name in self.names if name != "ffn"):
            hooks.append(structure.module(getattr(self.heads, name)).register_forward_hook(projected(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.count += len(rows)
        if "q" in parts:
            qkv = parts["q"].split(fused_sizes(self.heads), dim=1) if self.heads.fused else [parts[p] for p in "qkv"]
            self.attention.update(*qkv)

    def _explain(self, name: str, x: Tensor, y: Tensor) -> None:
        residual = (y - self.maps[name].apply(x)).square().sum()
        parts = (y.sum(dim=0), y.square().sum(), residual)
        self.sums[name] = tuple(a + b for a, b in zip(self.sums[name], parts)) if name in self.sums else parts  # type: ignore[assignment]

    def explained(self) -> dict[str, float]:
        """Return 1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖² of the map ŷ of each product; NaN where y does not vary."""
        result = {}
        for name, (total, squares, residual) in self.sums.items():
            variation = float(squares - total.square().sum() / self.count)
            result[name] = 1 - float(residual) / variation if variation > 0 else float("nan")
        return result

    def energies(self) -> list[dict[str, Any]]:
        """Return the share of the energy in the best channels, a row a kind of channel and `SHARES`.

        Energy of an FFN channel: (‖h_c‖·‖W_down[:, c]‖)²; of a kv channel of q and k (‖q_c‖·‖k_c‖)², as attention's
        choice scores it, and of v ‖v_c‖².
        """
        scores: dict[str, Tensor] = {}
        if "ffn" in self.names:
            down = self.plan.linears.down.stored().double()
            scores["ffn"] = self.hidden.norms * torch.linalg.vector_norm(down, dim=0)
        if "q" in self.names:
            scores["qk"], scores["v"] = self.attention.scores()
        return [
            {"layer": self.plan.block.index, "channels": kind, "best": share, "energy": energy_share(score, share)}
            for kind, score in scores.items()
            for share in SHARES
        ]


def energy_share(scores: Tensor, share: float) -> float:
    """Return the share of Σ scores² that the largest ``share`` of ``scores (n,)`` hold, at least one; NaN for zeros."""
    energy = scores.double().square().sort(descending=True).values
    count = max(1, round(share * len(energy)))
    total = float(energy.sum())
    return float(energy[:count].sum()) / total if total > 0 else float("nan")


def _fitted(moments: Mapping[str, Tensor], layer: int, name: str, device: torch.device) -> AffineMap:
    tensors = {part: moments[f"{layer}.{name}.{part}"].to(device) for part in ("down", "up", "bias")}
    return AffineMap.from_tensors(tensors)
