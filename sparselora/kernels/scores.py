"""Scores of channels from rank-k approximations of projections; the product of tokens and channels is never stored."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparselora.kernels._dispatch import has_triton, use_triton
from sparselora.kernels.activation import is_silu

_MOST_COORDINATES = 128

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _gated_kernel(
        Z, UP, GATE, UP_BIAS, GATE_BIAS, OUT, tokens, channels, RANK: tl.constexpr, K: tl.constexpr,
        BIAS_UP: tl.constexpr, BIAS_GATE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        # A block of channels, all tokens: the norm of silu(gate) * up over the tokens.
        c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        k = tl.arange(0, K)
        real = (c < channels)[None, :] & (k < RANK)[:, None]
        up = tl.load(UP + c[None, :] * RANK + k[:, None], mask=real, other=0.0)
        gate = tl.load(GATE + c[None, :] * RANK + k[:, None], mask=real, other=0.0)
        up_bias = tl.zeros((BLOCK,), tl.float32)
        gate_bias = tl.zeros((BLOCK,), tl.float32)
        if BIAS_UP:
            up_bias += tl.load(UP_BIAS + c, mask=c < channels, other=0.0).to(tl.float32)
        if BIAS_GATE:
            gate_bias += tl.load(GATE_BIAS + c, mask=c < channels, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, tokens, CHUNK):
            t = start + tl.arange(0, CHUNK)
            there = (t < tokens)[:, None] & (k < RANK)[None, :]
            z = Z + t[:, None] * (2 * RANK) + k[None, :]
            u = tl.dot(tl.load(z, mask=there, other=0.0), up, input_precision="ieee") + up_bias[None, :]
            g = tl.dot(tl.load(z + RANK, mask=there, other=0.0), gate, input_precision="ieee") + gate_bias[None, :]
            h = tl.where((t < tokens)[:, None], g * tl.sigmoid(g) * u, 0.0)
            total += tl.sum(h * h, axis=0)
        tl.store(OUT + c, tl.sqrt(total), mask=c < channels)

    @triton.jit
    def _energy(ROWS, channel, inside, gram, coordinates, K: tl.constexpr):
        k = tl.arange(0, K)
        mask = inside[:, None] & (k < coordinates)[None, :]
        rows = tl.load(ROWS + channel[:, None] * coordinates + k[None, :], mask=mask, other=0.0)
        energy = tl.sum(tl.dot(rows, gram, input_precision="ieee") * rows, axis=1)
        return tl.maximum(energy, 0.0)

    @triton.jit
    def _attention_kernel(
        Z, ROWS, QK, V, tokens, width, count, query, HEAD: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
        KV: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        # A block of kv channels (of pairs where HALF < HEAD); each program makes the Gram matrix of the tokens again.
        k = tl.arange(0, K)
        gram = tl.zeros((K, K), tl.float32)
        for start in range(0, tokens, CHUNK):
            t = start + tl.arange(0, CHUNK)
            there = (t < tokens)[:, None]
            z = tl.load(Z + t[:, None] * width + k[None, :], mask=there & (k < width)[None, :], other=0.0)
            z = tl.where(there & (k == width)[None, :], 1.0, z.to(tl.float32)).to(z.dtype)
            gram += tl.dot(tl.trans(z), z, input_precision="ieee")
        position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = position < count
        head, d = position // HALF, position % HALF
        norm = tl.zeros((BLOCK,), tl.float32)
        for j in tl.static_range(GROUP):
            channel = (head * GROUP + j) * HEAD + d
            energy = _energy(ROWS, channel, inside, gram, width + 1, K)
            if HALF < HEAD:
                energy += _energy(ROWS, channel + HALF, inside, gram, width + 1, K)
            norm += tl.sqrt(energy)
        channel = head * HEAD + d
        energy = _energy(ROWS, query + channel, inside, gram, width + 1, K)
        if HALF < HEAD:
            energy += _energy(ROWS, query + channel + HALF, inside, gram, width + 1, K)
        score = norm / GROUP * tl.sqrt(energy)
        value = query + KV + channel
        tl.store(QK + channel, score, mask=inside)
        tl.store(V + channel, tl.sqrt(_energy(ROWS, value, inside, gram, width + 1, K)), mask=inside)
        if HALF < HEAD:
            tl.store(QK + channel + HALF, score, mask=inside)
            tl.store(V + channel + HALF, tl.sqrt(_energy(ROWS, value + HALF, inside, gram, width + 1, K)), mask=inside)


def gated_norms(
    z: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    *,
    act: Callable[[torch.Tensor], torch.Tensor],
    up_bias: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | None:
    """The norm over tokens ``(channels,)`` of act(z_g gateᵀ) · (z_u upᵀ), in float32, where Triton can; else None.

    Args:
        z: ``(T, 2k)``, z_u and z_g side by side; up, gate: ``(channels, k)``.
    """
    rank = up.shape[1]
    if not use_triton(impl, z) or not is_silu(act) or rank > _MOST_COORDINATES or up.dtype != z.dtype:
        return None
    out = torch.empty(len(up), dtype=torch.float32, device=z.device)
    k, block = max(16, triton.next_power_of_2(rank)), 32
    _gated_kernel[(triton.cdiv(len(up), block),)](
        z.contiguous(), up.contiguous(), gate.contiguous(), out if up_bias is None else up_bias,
        out if gate_bias is None else gate_bias, out, len(z), len(up), RANK=rank, K=k, BIAS_UP=up_bias is not None,
        BIAS_GATE=gate_bias is not None, BLOCK=block, CHUNK=128 if k <= 32 else 32, num_warps=4,
    )  # fmt: skip
    return out


def attention_scores(
    z: torch.Tensor,
    rows: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rope: bool,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``qk`` and ``v``, each ``(kv_heads·head_dim,)``, of tokens ``z (T, w)`` with a coordinate 1 appended.

    Rows that ``mask (T,)`` leaves out are zeros in ``z``, and have no coordinate 1.

    The squared norm of channel c over the tokens is r_cᵀ(ZᵀZ)r_c, with r_c its row of ``rows (channels, w + 1)``: those
    of q, k and v below one another. `query_key_scores` says how they make a score.
    """
    count, width = kv_heads * head_dim, z.shape[1]
    if mask is None and use_triton(impl, z) and width < _MOST_COORDINATES and rows.dtype == torch.float32:
        qk, v = (torch.empty(count, dtype=torch.float32, device=z.device) for _ in range(2))
        half = head_dim // 2 if rope else head_dim
        k, block = max(16, triton.next_power_of_2(width + 1)), 16
        _attention_kernel[(triton.cdiv(kv_heads * half, block),)](
            z.contiguous(), rows, qk, v, len(z), width, kv_heads * half, heads * head_dim, HEAD=head_dim,
            GROUP=heads // kv_heads, HALF=half, KV=count, K=k, BLOCK=block, CHUNK=128 if k <= 32 else 32, num_warps=4,
        )  # fmt: skip
        return qk, v
    ones = z.new_ones(len(z)) if mask is None else mask
    z = torch.cat((z.to(rows.dtype), ones.to(rows.dtype)[:, None]), dim=1)
    squared = ((rows @ (z.T @ z)) * rows).sum(dim=1).clamp_min(0)
    query, key, value = squared.split([heads * head_dim, count, count])
    return query_key_scores(query, key, heads, kv_heads, head_dim, rope), value.sqrt()


def query_key_scores(
    query: torch.Tensor, key: torch.Tensor, heads: int, kv_heads: int, head_dim: int, rope: bool
) -> torch.Tensor:
    """QK score per kv channel from squared norms ``query (heads·head_dim,)`` and ``key (kv_heads·head_dim,)``."""
    query, key = query.view(kv_heads, heads // kv_heads, head_dim), key.view(kv_heads, 1, head_dim)
    if rope:
        query, key = (
            (part + part.roll(head_dim // 2, dims=-1)) for part in (query, key)
        )  # both channels of a pair get its sum
    return (query.sqrt().mean(dim=1) * key.sqrt().squeeze(1)).reshape(-1)
