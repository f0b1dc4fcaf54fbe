"""Replacements for work that sparse tokens skip, fitted to a few hundred samples.

An affine map of rank R replaces a whole FFN or a frozen projection; channels may be chosen once (static); dropped
channels may contribute their mean. All come from moments of activations, accumulated in float64 without keeping the
activations: `AffineStatistics`, `ChannelStatistics` and `AttentionStatistics`. Updating reads nothing back from the
device, masked tokens do not count, and statistics of two parts of the data merge into those of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sparselora.contextual.estimator import masked_out, top_eigenvectors
from sparselora.contextual.selection import check_heads
from sparselora.errors import InputError
from sparselora.kernels.scores import query_key_scores

Tensor = torch.Tensor

RIDGE = 1e-3
"""Default ridge, relative to the mean variance of an input feature. On held-out tokens of two models of width 384 any
value from 0 to 0.1 explained the same to 0.002."""

_CHOLESKY_RIDGE = 1e-10  # below it a covariance may be too close to singular for a Cholesky factor to mean anything
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class AffineMap:
    """ŷ = up (down x) + bias, with ``down (R, d_in)``, ``up (d_out, R)`` and ``bias (d_out,)``."""

    down: Tensor
    up: Tensor
    bias: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """``(…, d_out)`` for ``x (…, d_in)`` of the map's dtype."""
        return F.linear(F.linear(x, self.down), self.up, self.bias)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AffineMap:
        return AffineMap(*(part.to(device=device, dtype=dtype) for part in (self.down, self.up, self.bias)))

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def macs(self) -> int:
        """MACs per token: R·(d_in + d_out)."""
        return self.down.numel() + self.up.numel()

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token, two a MAC."""
        return 2 * self.macs

    def tensors(self) -> dict[str, Tensor]:
        """The parts by name, as a cache keeps them; `from_tensors` is the way back."""
        return {"down": self.down, "up": self.up, "bias": self.bias}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> AffineMap:
        return cls(tensors["down"], tensors["up"], tensors["bias"])


# --- moments -------------------------------------------------------------------------------------------------------


class AffineStatistics:
    """Moments of input-output pairs: what any affine fit of y on x needs.

    Sums are taken about the running mean, so that features far from zero lose no digits.

    Args:
        d_in: features of x; d_out: features of y, 0 for the moments of x alone.
    Attributes:
        count: number of tokens, a float64 scalar tensor; mean_x ``(d_in,)``; mean_y ``(d_out,)``.
        xx ``(d_in, d_in)``, xy ``(d_in, d_out)``: sums of products about the means.
    """

    _PARTS = ("count", "mean_x", "mean_y", "xx", "xy")

    def __init__(self, d_in: int, d_out: int = 0, device: torch.device | str | None = None) -> None:
        shapes = ((), (d_in,), (d_out,), (d_in, d_in), (d_in, d_out))
        self.count, self.mean_x, self.mean_y, self.xx, self.xy = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes
        )

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add tokens ``x (T, d_in)`` with ``y (T, d_out)``; ``mask (T,)`` is False or 0 for those that do not count."""
        if (y is None) != (len(self.mean_y) == 0):
            raise InputError("an update needs y where the statistics were made with d_out, and only there")
        count = _count(x, mask)
        x, mean_x = _centred(x, count, mask)
        mean_y = self.mean_y
        if y is not None:
            y, mean_y = _centred(y, count, mask)
            self.xy.addmm_(x.T, y)
        self.xx.addmm_(x.T, x)
        self._shift(count, mean_x, mean_y)

    def _shift(self, count: Tensor, mean_x: Tensor, mean_y: Tensor) -> None:
        """Move the means to those of all tokens, with what that adds to the sums about them."""
        total = (self.count + count).clamp_min(1)
        share = count / total
        dx, dy = mean_x - self.mean_x, mean_y - self.mean_y
        self.xx += torch.outer(dx, dx * (self.count * share))
        self.xy += torch.outer(dx, dy * (self.count * share))
        self.mean_x += dx * share
        self.mean_y += dy * share
        self.count += count

    def merge(self, other: AffineStatistics) -> None:
        """Add the tokens that ``other`` has seen."""
        self._shift(other.count, other.mean_x, other.mean_y)
        self.xx += other.xx
        self.xy += other.xy

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name, as a cache keeps them; `from_tensors` is the way back."""
        return {name: getattr(self, name) for name in self._PARTS}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> AffineStatistics:
        statistics = cls(0)
        for name in cls._PARTS:
            setattr(statistics, name, tensors[name].clone())
        return statistics


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    """Number of unmasked tokens of ``x (T, n)``, a float64 scalar on their device."""
    return x.new_full((), len(x), dtype=torch.float64) if mask is None else mask.bool().sum().double()


def _centred(x: Tensor, count: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x (T, n)`` in float64 about its mean ``(n,)``, masked rows zero; and that mean."""
    x = masked_out(x.detach().double(), mask)
    mean = x.sum(dim=0) / count.clamp_min(1)
    return masked_out(x - mean, mask), mean


# --- fits ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_affine(stats: AffineStatistics, rank: int, ridge: float = RIDGE) -> AffineMap:
    """The affine map of rank R that predicts y best: reduced-rank ridge regression.

    Of all maps of rank ≤ R it minimises Σ‖y − ŷ‖² + λ·count·‖map‖²_F, with λ = ridge × the mean variance of an input
    feature: the ridge solution, projected on the leading R directions of its fitted output (of the data and the
    penalty's rows). The mean of ŷ is the mean of y, and is not penalised. Without ridge, inputs that do not vary get
    weight zero (the solution of least norm).

    Args:
        rank: R ≥ 1; more than min(d_in, d_out) counts as that.
    Returns:
        A float64 map on the device of ``stats``.
    Raises:
        InputError: no token, no y, rank below 1, negative ridge, or moments that are not finite.
    """
    _check_fit(stats, rank)
    if not len(stats.mean_y):
        raise InputError("these statistics are of inputs alone; an affine fit needs pairs (x, y)")
    if ridge < 0:
        raise InputError(f"ridge must be 0 or above, got {ridge}")
    d_in, d_out = stats.xy.shape
    rank = min(rank, d_in, d_out)
    root = _inverse_root(stats.xx / stats.count, ridge)
    whitened = root.T @ (stats.xy / stats.count)  # of the regression on whitened inputs, (d_in, d_out)
    if d_out <= d_in:
        up = top_eigenvectors(whitened.T @ whitened, rank)
        down = (root @ (whitened @ up)).T
    else:
        U = top_eigenvectors(whitened @ whitened.T, rank)
        down, up = (root @ U).T, whitened.T @ U
    return AffineMap(down.contiguous(), up.contiguous(), stats.mean_y - up @ (down @ stats.mean_x))


def _inverse_root(covariance: Tensor, ridge: float) -> Tensor:
    """R ``(d, d)`` with R Rᵀ = (C + ridge·tr(C)/d·I)⁻¹, the pseudo-inverse where that does not exist."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    C = covariance + ridge * covariance.diagonal().mean() * eye
    if ridge >= _CHOLESKY_RIDGE:
        L, failed = torch.linalg.cholesky_ex(C)
        if not failed:
            return torch.linalg.solve_triangular(L.T, eye, upper=True)
    values, V = torch.linalg.eigh(C)
    resolved = values > values[-1] * len(C) * _EPS
    return V * torch.where(resolved, values.clamp_min(0).rsqrt(), 0.0)


@torch.no_grad()
def fit_low_rank(stats: AffineStatistics, weight: Tensor, bias: Tensor | None, rank: int) -> AffineMap:
    """The affine map of rank R nearest to y = Wx + b over the inputs that ``stats`` has seen.

    It is `fit_affine` without ridge on the pairs (x, Wx + b), and needs no inverse: W projected on the leading R
    directions of its output. The SVD of W is the same with the inputs taken as white.

    Args:
        stats: moments of x (of y too, or not); weight: ``(d_out, d_in)``; bias: ``(d_out,)`` or None.
        rank: R ≥ 1; more than min(d_in, d_out) counts as that.
    Returns:
        A float64 map on the device of ``stats``.
    Raises:
        InputError: no token, rank below 1, or moments that are not finite.
    """
    _check_fit(stats, rank)
    W = weight.detach().to(stats.xx.device, torch.float64)
    up = top_eigenvectors(W @ (stats.xx / stats.count) @ W.T, min(rank, *W.shape))
    down = up.T @ W
    mean_y = W @ stats.mean_x + (0 if bias is None else bias.detach().to(W))
    return AffineMap(down, up, mean_y - up @ (down @ stats.mean_x))


def _check_fit(stats: AffineStatistics, rank: int) -> None:
    if rank < 1:
        raise InputError(f"surrogate rank must be at least 1, got {rank}; use mode skip for no map at all")
    if not stats.count > 0:
        raise InputError("no calibration token was seen; raise calibration_samples")
    if not all(torch.isfinite(part).all() for part in stats.tensors().values()):
        raise InputError("calibration activations hold NaN or infinite values; calibrate in bf16 or fp32")


# --- channels ------------------------------------------------------------------------------------------------------


class ChannelStatistics:
    """Mean and L2 norm of each of ``n`` channels over all calibration tokens.

    Attributes:
        count: number of tokens; total ``(n,)``: Σh; squares ``(n,)``: Σh²; float64 tensors.
    """

    def __init__(self, n: int, device: torch.device | str | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total, self.squares = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2))

    @torch.no_grad()
    def update(self, h: Tensor, mask: Tensor | None = None) -> None:
        """Add tokens ``h (T, n)``; ``mask (T,)`` is False or 0 for those that do not count."""
        self.count += _count(h, mask)
        h = masked_out(h.detach().double(), mask)
        self.total += h.sum(dim=0)
        self.squares += h.square().sum(dim=0)

    def merge(self, other: ChannelStatistics) -> None:
        """Add the tokens that ``other`` has seen."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> Tensor:
        """E h_c ``(n,)``; zeros before the first token."""
        return self.total / self.count.clamp_min(1)

    @property
    def norms(self) -> Tensor:
        """‖h_c‖ over all tokens ``(n,)``: the score by which static channels are chosen."""
        return self.squares.sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, as a cache keeps them; `from_tensors` is the way back."""
        return {"count": self.count, "total": self.total, "squares": self.squares}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ChannelStatistics:
        statistics = cls(0)
        statistics.count, statistics.total, statistics.squares = (
            tensors[name].clone() for name in ("count", "total", "squares")
        )
        return statistics


class AttentionStatistics:
    """Channel statistics of q, k and v before q/k norm and RoPE, and the scores of kv channels that follow."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, rope: bool, device: torch.device | str | None = None
    ) -> None:
        check_heads(heads, kv_heads, head_dim, rope)
        self._shape = (heads, kv_heads, head_dim, rope)
        self.q = ChannelStatistics(heads * head_dim, device)
        self.k, self.v = (ChannelStatistics(kv_heads * head_dim, device) for _ in range(2))

    def update(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        """Add tokens ``q (T, heads·head_dim)``, ``k`` and ``v (T, kv_heads·head_dim)``."""
        for statistics, part in ((self.q, q), (self.k, k), (self.v, v)):
            statistics.update(part, mask)

    def scores(self) -> tuple[Tensor, Tensor]:
        """``qk`` and ``v (kv_heads·head_dim,)``, as `estimator.oracle_attention_scores` of all tokens together."""
        return query_key_scores(self.q.squares, self.k.squares, *self._shape), self.v.norms
