"""The result of choosing: what a layer computes for its sparse tokens in one pass."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from sparselora.contextual.selection import kept_attention_channels, query_channels, select_attention_channels
from sparselora.contextual.structure import Attention
from sparselora.contextual.surrogate import AffineMap
from sparselora.kernels.rows import Channels
from sparselora.kernels.select import attention_indices

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class FFNChoice:
    """The work of sparse tokens in place of the whole FFN: some of its channels, an affine map, both or neither.

    Attributes:
        channels: FFN channels that are computed, int64 ascending ``(k,)``; None computes none.
        bias: added to the second projection's own ``(d,)``: the mean contribution of the channels that are dropped.
        map: affine map of the FFN's input whose output is added.
    """

    channels: Tensor | None = None
    bias: Tensor | None = None
    map: AffineMap | None = None


@dataclass(frozen=True, eq=False)
class AttentionChoice:
    """The channels of each projection that sparse tokens compute, or the affine maps in place of the projections.

    Attributes:
        qkv: channels of q, k and v counted as side by side, the first ``queries`` of them q's, the next ``keys`` k's.
        out: input channels of the output projection.
        maps: affine maps in place of the frozen q, k, v and o, in this order; then there are no ``qkv`` and ``out``.
    """

    heads: Attention
    qkv: Channels | None = None
    out: Channels | None = None
    queries: int = 0
    keys: int = 0
    maps: tuple[AffineMap, ...] | None = None
    _by_part: dict[str, Channels] = field(default_factory=dict)

    def channels(self, part: str) -> Channels | None:
        """Return the channels of ``q``, ``k``, ``v``, ``o``, ``qkv`` or ``kv``; None where all are there (``maps``)."""
        if self.maps is not None:
            return None
        if part in ("qkv", "o"):
            return self.qkv if part == "qkv" else self.out
        if part not in self._by_part:
            self._by_part[part] = Channels.of(*self._indices(part))
        return self._by_part[part]

    def _indices(self, part: str) -> tuple[Tensor, int]:
        """Return the channels of a part, and how many it has in all; those of ``kv`` are counted over q, k and v."""
        assert self.qkv is not None
        q, k, v = fused_sizes(self.heads)
        first, last = self.queries, self.queries + self.keys
        index = self.qkv.index
        match part:
            case "q":
                return index[:first], q
            case "k":
                return index[first:last] - q, k
            case "v":
                return index[last:] - q - k, v
            case _:
                return index[first:], q + k + v

    @functools.cached_property
    def side_by_side(self) -> AffineMap:
        """The maps of q, k and v as one: the same input, outputs side by side."""
        assert self.maps is not None
        qkv = self.maps[:1] if self.heads.fused else self.maps[:3]
        return AffineMap(
            torch.cat([m.down for m in qkv]), torch.block_diag(*(m.up for m in qkv)), torch.cat([m.bias for m in qkv])
        )


Choice = FFNChoice | AttentionChoice


def fused_sizes(heads: Attention) -> list[int]:
    """Rows of q, k and v in a fused projection."""
    return [heads.heads * heads.head_dim, heads.kv_width, heads.kv_width]


def attention_choice(heads: Attention, qk: Tensor, v: Tensor, sparsity: float) -> AttentionChoice:
    """Return the channels with the largest scores ``qk`` and ``v``, each ``(kv_heads·head_dim,)``."""
    shape = (heads.heads, heads.kv_heads, heads.head_dim, heads.rope)
    counts = kept_attention_channels(sparsity, heads.kv_heads, heads.head_dim, pairs=heads.rope)
    group = heads.heads // heads.kv_heads
    indices = attention_indices(qk, v, counts, *shape)
    if indices is not None:
        qkv, out = Channels(*indices[:2]), Channels(*indices[2:])
    else:
        sizes = fused_sizes(heads)
        k_index = select_attention_channels(qk, sparsity, heads.kv_heads, heads.head_dim, pairs=heads.rope)
        v_index = select_attention_channels(v, sparsity, heads.kv_heads, heads.head_dim, pairs=False)
        q_index, o_index = (
            query_channels(index, heads.kv_heads, heads.heads, heads.head_dim) for index in (k_index, v_index)
        )
        qkv = Channels.of(torch.cat((q_index, k_index + sizes[0], v_index + sizes[0] + sizes[1])), sum(sizes))
        out = Channels.of(o_index, sizes[0])
    return AttentionChoice(heads, qkv, out, counts[0] * group, counts[0])
