"""Scores of the FFN and attention channels that a set of tokens needs: training-free estimates, and their definition.

The estimates come from the best rank-k factors of frozen weights and cost a few thousandths of the projections they
approximate (SparseLoRA, arXiv 2506.16500). Everything here works on plain tensors: weights ``(d_out, d_in)``, tokens
``x (T, d_in)``, and an optional ``mask (T,)`` that is False or 0 for tokens that do not count (padding). No function
that runs inside a training step reads a value back from the device.

Scores are float32, or float64 where tokens and weights are float64. kv channel (g, d) of attention has index
``g·head_dim + d``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn import functional as F

from sparselora.contextual.cache import Cache, Value, digest
from sparselora.contextual.selection import check_heads
from sparselora.errors import InputError
from sparselora.kernels.scores import attention_scores, gated_norms, query_key_scores
from sparselora.numerics.spectra import eigen

Tensor = torch.Tensor
Activation = Callable[[Tensor], Tensor]
Estimator = TypeVar("Estimator")

_FEW = 4  # on the CPU, a solver for some eigenvectors is faster where they are at most a quarter of all
_LARGE = 1024  # on a GPU a full eigendecomposition of this size takes longer than many products
_ITERATIONS = 100


# --- low-rank factors of a frozen weight --------------------------------------------------------------------------


def top_eigenvectors(G: Tensor, k: int) -> Tensor:
    """Eigenvectors ``(n, k)`` of the k largest eigenvalues of a symmetric PSD ``G (n, n)``, descending, float64.

    Signs are fixed: the entry of largest modulus of each vector (the first of equals) is positive.

    Raises:
        InputError: ``k`` outside 1..n, or ``G`` not finite.
    """
    n = len(G)
    if not 1 <= k <= n:
        raise InputError(f"number of directions must be between 1 and {n}, got {k}")
    G = G.double()
    if not torch.isfinite(G).all():
        raise InputError("the matrix to factorise holds NaN or infinite values; check the weights and the data")
    if G.device.type == "cpu" and _FEW * k <= n:
        V = torch.from_numpy(eigen(G.numpy(), k)[1])
    elif G.device.type == "cuda" and n >= _LARGE and 16 * k <= n:
        V = _subspace_iteration(G, k)
    else:
        V = torch.linalg.eigh(G)[1].flip(1)[:, :k]
    largest = V.gather(0, V.abs().argmax(dim=0, keepdim=True))
    return (V * torch.where(largest < 0, -1.0, 1.0)).contiguous()


def _subspace_iteration(G: Tensor, k: int) -> Tensor:
    """Leading eigenvectors by repeated products with ``G``, from a fixed start and twice as many vectors as wanted.

    The energy ΣΛ they hold is the best one's to several digits after `_ITERATIONS` even where eigenvalues lie close
    (then the vectors of equals are mixed, which an estimate does not feel).
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(G), 2 * k + 8, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(start.to(G.device))[0]
    for i in range(_ITERATIONS):
        Q = G @ Q
        Q = torch.linalg.qr(Q)[0] if i % 4 == 3 else Q / Q.norm(dim=0)
    Q = torch.linalg.qr(Q)[0]
    return Q @ torch.linalg.eigh(Q.T @ (G @ Q))[1].flip(1)[:, :k]


def svd_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``down (rank, d_in)`` and ``up (d_out, rank)`` with ``up @ down`` the best rank-``rank`` approximation of W.

    It is W projected on its leading singular vectors, found in float64 from the Gram matrix of W's small side; so a
    W of lower rank is reproduced too. The factors have the weight's dtype and device.

    Raises:
        InputError: ``rank`` outside 1..min(d_out, d_in), or a weight with NaN or infinite values.
    """
    _check_rank(weight, rank)
    W = weight.detach().double()
    if W.shape[0] >= W.shape[1]:
        V = top_eigenvectors(W.T @ W, rank)
        down, up = V.T, W @ V
    else:
        U = top_eigenvectors(W @ W.T, rank)
        down, up = U.T @ W, U
    return down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous()


def _check_rank(weight: Tensor, rank: int) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InputError(
            f"an estimator needs a floating-point weight (d_out, d_in), got {weight.dtype} {tuple(weight.shape)}; "
            "dequantise it first"
        )
    if not 1 <= rank <= min(weight.shape):
        raise InputError(
            f"estimator rank must be between 1 and {min(weight.shape)} for a weight of {weight.shape[0]} × "
            f"{weight.shape[1]}, got {rank}; lower svd_rank"
        )


class SVDSparsityEstimator:
    """The best rank-k approximation of one frozen projection y = Wx + b. It holds no parameters or buffers.

    Args:
        weight: ``(d_out, d_in)``, floating point; bias: ``(d_out,)`` or None.
        rank: k, 1..min(d_out, d_in).
        cache: where factors are kept between runs; None computes them.
    Attributes:
        down: ``(k, d_in)``; up: ``(d_out, k)``; bias: ``(d_out,)`` or None; in the weight's dtype, on its device.
    Raises:
        InputError: a rank that is out of range; a weight that is no floating-point matrix or not finite.
    """

    def __init__(self, weight: Tensor, rank: int, bias: Tensor | None = None, *, cache: Cache | None = None) -> None:
        _check_rank(weight, rank)
        self.rank = rank
        if cache is None:
            self.down, self.up = svd_factors(weight, rank)
        else:
            parts: dict[str, Value] = {"weight": digest(weight), "rank": rank}
            factors = cache.fetch("svd", parts, lambda: dict(zip(("down", "up"), svd_factors(weight, rank))))
            self.down, self.up = factors["down"].to(weight.device), factors["up"].to(weight.device)
        self.bias = None if bias is None else bias.detach().clone()

    @torch.no_grad()
    def estimate(self, x: Tensor) -> Tensor:
        """``(T, d_out)`` estimate of Wx + b for ``x (T, d_in)``, in the factors' dtype."""
        return F.linear(F.linear(x.to(self.down.dtype), self.down), self.up, self.bias)

    @property
    def macs(self) -> int:
        """MACs per token: k·(d_in + d_out)."""
        return self.down.numel() + self.up.numel()

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token, two a MAC."""
        return 2 * self.macs


# --- FFN -----------------------------------------------------------------------------------------------------------


def masked_out(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x (T, n)`` with zeros in the rows where ``mask (T,)`` is False or 0, whatever they held."""
    return x if mask is None else x.masked_fill(~mask.bool()[:, None], 0)


def channel_norms(h: Tensor, mask: Tensor | None = None) -> Tensor:
    """L2 norm over the tokens of each channel of ``h (T, n)``: ``(n,)``. Rows that are masked may hold anything."""
    return _norms(masked_out(h, mask))


def _norms(h: Tensor, mask: Tensor | None = None) -> Tensor:
    """`channel_norms` where the masked rows are known to be finite: their squares get weight zero, at no extra cost."""
    dtype = _score_dtype(h)
    if h.device.type == "cpu" and h.dtype == dtype:  # here a norm along dim 0 takes six times as long
        squares = h.square()
        return (squares.sum(dim=0) if mask is None else torch.mv(squares.T, mask.to(dtype))).sqrt()
    if mask is not None:
        h = h * mask.to(h.dtype)[:, None]
    return torch.linalg.vector_norm(h, dim=0, dtype=dtype)


def _score_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.no_grad()
def oracle_ffn_scores(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None = None,
    *,
    act: Activation,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The score that estimators estimate, ``(d_ffn,)``: ‖h_c‖ over tokens of h = act(gate(x))·up(x), or act(up(x))."""
    hidden = F.linear(x, up, up_bias)
    hidden = act(hidden) if gate is None else act(F.linear(x, gate, gate_bias)) * hidden
    return channel_norms(hidden, mask)


class FFNEstimator:
    """Scores of an FFN's hidden channels from rank-k approximations of its first projections.

    Args:
        up: ``(d_ffn, d)``, the only first projection of a plain FFN; gate: ``(d_ffn, d)`` of a gated one.
        act: the activation, of the gate where there is one; it must not work in place.
        rank: k of each; cache: where factors are kept between runs.
    Raises:
        InputError: a rank out of range, or gate and up of different shapes.
    """

    def __init__(
        self,
        up: Tensor,
        gate: Tensor | None = None,
        *,
        act: Activation,
        rank: int,
        up_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        cache: Cache | None = None,
    ) -> None:
        if gate is not None and gate.shape != up.shape:
            raise InputError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} projections differ in shape")
        self.act = act
        self.rank = rank
        self.up = SVDSparsityEstimator(up, rank, up_bias, cache=cache)
        self.gate = None if gate is None else SVDSparsityEstimator(gate, rank, gate_bias, cache=cache)
        # One product for both first factors; the parts stay views of it.
        self._down = self.up.down
        if self.gate is not None:
            self._down = torch.cat([self.up.down, self.gate.down])
            self.up.down, self.gate.down = self._down[:rank], self._down[rank:]

    @torch.no_grad()
    def scores(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Estimated `oracle_ffn_scores` ``(d_ffn,)`` for tokens ``x (T, d)``; without an unmasked token, zeros."""
        z = masked_out(F.linear(x.to(self._down.dtype), self._down), mask)
        if self.gate is not None and mask is None:
            up, gate = self.up, self.gate
            norms = gated_norms(z, up.up, gate.up, act=self.act, up_bias=up.bias, gate_bias=gate.bias)
            if norms is not None:
                return norms
        hidden = F.linear(z[:, : self.rank], self.up.up, self.up.bias)
        if self.gate is None:
            hidden = self.act(hidden)
        else:
            hidden = self.act(F.linear(z[:, self.rank :], self.gate.up, self.gate.bias)) * hidden
        return _norms(hidden, mask)

    @property
    def macs(self) -> int:
        """MACs per unmasked token."""
        return self.up.macs + (0 if self.gate is None else self.gate.macs)

    @property
    def flops_per_token(self) -> int:
        """FLOPs per unmasked token, two a MAC."""
        return 2 * self.macs


# --- attention -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def oracle_attention_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rope: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scores that `AttentionEstimator` estimates, from projection outputs before q/k norm and RoPE.

    ``qk[g, d]`` is the mean of ‖q_(h, d)‖ over the query heads h of group g, times ‖k_(g, d)‖; norms are over tokens.
    With RoPE, channels d and d + head_dim/2 rotate into each other, so each norm is replaced by that of its pair,
    √(‖q_d‖² + ‖q_(d + head_dim/2)‖²), for q and for k, before the mean and the product: both get the same score.
    ``v[g, d]`` is ‖v_(g, d)‖.

    Args:
        q: ``(T, heads·head_dim)``, query head h in group h // (heads/kv_heads); k, v: ``(T, kv_heads·head_dim)``.
    Returns:
        Two tensors ``(kv_heads·head_dim,)``.
    """
    check_heads(heads, kv_heads, head_dim, rope)
    query, key = channel_norms(q, mask).square(), channel_norms(k, mask).square()
    return query_key_scores(query, key, heads, kv_heads, head_dim, rope), channel_norms(v, mask)


class AttentionEstimator:
    """`oracle_attention_scores` estimated from rank-k approximations of the q, k and v projections.

    The projections are linear, so the squared norm of channel c over all tokens is u_cᵀ(ZᵀZ)u_c, with u_c the channel's
    row of the second factor and Z the tokens after the first: no product of tokens and channels is formed. A bias is
    one more coordinate, which is 1 in every token.

    Args:
        q: ``(heads·head_dim, d)``; k, v: ``(kv_heads·head_dim, d)``; biases ``(d_out,)`` or None.
        rope: whether q and k are rotated in pairs (d, d + head_dim/2).
        rank: k of each; cache: where factors are kept between runs.
    Raises:
        InputError: a rank out of range, shapes that do not fit the heads, or an odd head_dim with ``rope``.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope: bool,
        rank: int,
        q_bias: Tensor | None = None,
        k_bias: Tensor | None = None,
        v_bias: Tensor | None = None,
        cache: Cache | None = None,
    ) -> None:
        check_heads(heads, kv_heads, head_dim, rope)
        for name, weight, count in (("q", q, heads), ("k", k, kv_heads), ("v", v, kv_heads)):
            if weight.shape[0] != count * head_dim:
                raise InputError(f"{name} projection has {weight.shape[0]} outputs, {count} × {head_dim} were expected")
        self.rank, self.heads, self.kv_heads, self.head_dim, self.rope = rank, heads, kv_heads, head_dim, rope
        parts = [
            SVDSparsityEstimator(weight, rank, bias, cache=cache)
            for weight, bias in ((q, q_bias), (k, k_bias), (v, v_bias))
        ]
        self.macs = sum(part.macs for part in parts)
        self._down = torch.cat([part.down for part in parts])
        dtype = _score_dtype(q)
        rows = torch.block_diag(*(part.up.to(dtype) for part in parts))
        biases = [rows.new_zeros(len(part.up)) if part.bias is None else part.bias.to(dtype) for part in parts]
        self._rows = torch.cat([rows, torch.cat(biases)[:, None]], dim=1)  # (all channels, 3k + 1)

    @torch.no_grad()
    def scores(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Estimated ``qk`` and ``v``, each ``(kv_heads·head_dim,)``, for tokens ``x (T, d)``."""
        z = masked_out(F.linear(x.to(self._down.dtype), self._down), mask)
        with torch.autocast(z.device.type, enabled=False):
            return attention_scores(
                z, self._rows, mask, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, rope=self.rope
            )

    @property
    def flops_per_token(self) -> int:
        """FLOPs per unmasked token, two a MAC, had each projection's estimate been formed; in fact it is less."""
        return 2 * self.macs


# --- a whole model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FFNWeights:
    """One FFN's first projections, ``(d_ffn, d)`` each, as `FFNEstimator` takes them; ``gate`` is None if plain."""

    name: str
    up: Tensor
    act: Activation
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None


@dataclass(frozen=True)
class AttentionWeights:
    """One attention's projections, as `AttentionEstimator` takes them."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    rope: bool
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None


def build_ffn_estimators(
    layers: Iterable[FFNWeights], rank: int, cache_dir: str | Path | None = None
) -> dict[str, FFNEstimator]:
    """An estimator for every FFN by name, factors from the cache in ``cache_dir`` (None: its default folder).

    ``layers`` may be a generator that makes (dequantises) one layer's weights at a time; they are not kept.

    Raises:
        InputError: no layer at all, a rank that is out of range (naming the layer), a cache that cannot be written.
    """
    return _build(layers, partial(FFNEstimator, rank=rank, cache=Cache(cache_dir)), "FFN")


def build_attention_estimators(
    layers: Iterable[AttentionWeights], rank: int, cache_dir: str | Path | None = None
) -> dict[str, AttentionEstimator]:
    """An estimator for every attention by name; see `build_ffn_estimators`."""
    return _build(layers, partial(AttentionEstimator, rank=rank, cache=Cache(cache_dir)), "attention")


def _build(layers: Iterable[Any], make: Callable[..., Estimator], what: str) -> dict[str, Estimator]:
    built = {}
    for layer in layers:
        options = dict(vars(layer))
        name = options.pop("name")
        try:
            built[name] = make(**options)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    if not built:
        raise InputError(f"the model has no {what} that an estimator could be built for")
    return built
