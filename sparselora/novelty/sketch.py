"""Sketches of the output layer's gradient from forward quantities, and the subspace that past sketches span.

The gradient of a cross-entropy in an output layer's weight is Σ_t e_t h_tᵀ, with h_t the layer's input at token t and
e_t = softmax(logits_t) − onehot(target_t). `TensorSketch` maps it to m numbers that keep inner products on average,
without forming it; sketches of parts add up to the sketch of the whole. `FrequentDirections` follows the leading
subspace of a stream of such rows in bounded memory.

Nothing here reads a value back from a GPU, except the eigensolver of `FrequentDirections.rotate`, which checks itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from sparselora.errors import InputError
from sparselora.kernels.tops import top_logits
from sparselora.models.labels import IGNORED

Tensor = torch.Tensor


_CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Logits worked on at a time: few enough for a CPU's cache, enough that a GPU's time is not that of its launches."""


class CountSketch:
    """A random linear map from n to m numbers: coordinate i is added to bucket h(i) with sign s(i).

    E⟨Cx, Cy⟩ = ⟨x, y⟩ and Var⟨Cx, Cy⟩ = (‖x‖²‖y‖² + ⟨x, y⟩² − 2 Σ_i x_i² y_i²)/m over the draw of h and s (Charikar,
    Chen and Farach-Colton, 2002).

    Args:
        n, m: length of what is mapped, and of its sketch.
        rng: draws buckets and signs; on the CPU, so that every device gets the same ones.
    Attributes:
        buckets: ``(n,)`` int64 in 0..m−1; signs: ``(n,)`` float32, ±1.
    """

    def __init__(self, n: int, m: int, rng: np.random.Generator, device: torch.device | str = "cpu") -> None:
        self.n, self.m = n, m
        self.buckets = torch.from_numpy(rng.integers(m, size=n)).to(device)
        self.signs = torch.from_numpy(2 * rng.integers(2, size=n) - 1).to(device, torch.float32)
        self._matrix: Tensor | None = None

    def dense(self, x: Tensor) -> Tensor:
        """Sketches ``(T, m)`` of the rows of ``x (T, n)``, in x's dtype.

        It is a product with the sparse map held as a matrix ``(n, m)``: on a GPU that costs less than it sounds, and,
        unlike additions in any order, it gives the same bits every time.
        """
        if self._matrix is None or self._matrix.dtype != x.dtype:
            matrix = torch.zeros(self.n, self.m, dtype=x.dtype, device=self.buckets.device)
            self._matrix = matrix.scatter_(1, self.buckets[:, None], self.signs.to(x.dtype)[:, None])
        return x @ self._matrix

    def sparse(self, index: Tensor, values: Tensor) -> Tensor:
        """Sketches ``(T, m)`` of rows given by entries: row t holds ``values[t, j]`` at ``index[t, j]``, else zeros.

        Entries of a row with the same index add up. Both are ``(T, j)``; the result has the dtype of ``values``.
        """
        rows = torch.arange(len(index), device=index.device)[:, None]
        flat = (rows * self.m + self.buckets[index]).reshape(-1)  # in one dimension the addition can be deterministic
        out = torch.zeros(len(index) * self.m, dtype=values.dtype, device=values.device)
        return out.scatter_add_(0, flat, (values * self.signs[index]).reshape(-1)).view(-1, self.m)


class GradientSketch:
    """A CountSketch of the gradients of some parameters, n numbers in all, whose m buckets are of equal size.

    The coordinates are put into a random order with random signs, and every m-th of them is added up. The signs alone
    give E⟨Cx, Cy⟩ = ⟨x, y⟩, and sums of columns come out the same every time, unlike additions in any order.

    Args:
        parameters: those whose gradients are sketched.
        m: length of a sketch.
        seed: of order and signs; the same seed gives the same sketches on every device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], m: int, seed: int, device: torch.device | str) -> None:
        self.parameters, self.m = list(parameters), m
        size = sum(parameter.numel() for parameter in self.parameters)
        rng = np.random.default_rng([seed, 2])
        self._order = torch.from_numpy(rng.permutation(size).astype(np.int32)).to(device)
        self._signs = torch.from_numpy((2 * rng.integers(2, size=size) - 1).astype(np.int8)).to(device)

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return the sketch ``(m,)`` of the parameters' ``grad`` in float32; one without a gradient counts as zeros."""
        flat = torch.cat([
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten().float().to(self._order.device)
            for p in self.parameters
        ])  # fmt: skip
        mixed = flat.index_select(0, self._order) * self._signs
        return nn.functional.pad(mixed, (0, -len(mixed) % self.m)).view(-1, self.m).sum(dim=0)


class TensorSketch:
    """Sketches of head gradients: z = Σ_t C₁h_t ⊛ C₂e_t, circular convolutions of two independent CountSketches.

    Over the draw of the hashes E⟨z, z'⟩ = ⟨G, G'⟩, the inner product of the gradients G = Σ_t e_t h_tᵀ (Pham and Pagh,
    2013). The tokens are summed in the Fourier domain, with one inverse transform for the sum.

    e_t is cut to the ``top_k`` largest logits and the target, a set: a target among them is there once. Their
    probabilities come from the log-sum-exp over all logits.

    Args:
        d_hidden: width d of the layer's input; vocab_size: its number of outputs V.
        m: length of a sketch, a power of two.
        top_k: logits kept of each token, 1..V; None keeps all, which makes e_t exact.
        seed: of the hashes; the same seed gives the same sketches on every device.
    Attributes:
        hidden, vocab: the CountSketches C₁ of h and C₂ of e.
    Raises:
        InputError: m no power of two, top_k outside 1..V, a size below 1, or a negative seed.
    """

    def __init__(
        self,
        d_hidden: int,
        vocab_size: int,
        m: int = 512,
        *,
        top_k: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if d_hidden < 1 or vocab_size < 2:
            raise InputError(
                f"the head must have at least 1 input and 2 outputs, got d_hidden={d_hidden}, vocab_size={vocab_size}; "
                "a single output has no softmax"
            )
        if m < 2 or m & (m - 1):
            near = 1 << max(1, round(math.log2(max(m, 2))))
            raise InputError(f"sketch length m must be a power of two, 2 or more, got {m}; {near} is near")
        if top_k is not None and not 1 <= top_k <= vocab_size:
            raise InputError(f"k_topk must be between 1 and the vocabulary's {vocab_size}, got {top_k}; lower k_topk")
        if seed < 0:
            raise InputError(f"seed must be 0 or more, got {seed}")
        self.d_hidden, self.vocab_size, self.m = d_hidden, vocab_size, m
        self.top_k = vocab_size if top_k is None else top_k
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors say it
        first, second = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
        self.hidden = CountSketch(d_hidden, m, first, self.device)
        self.vocab = CountSketch(vocab_size, m, second, self.device)

    def head_gradient(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """The sketch ``(m,)`` of Σ_t e_t h_tᵀ; the arguments are those of `SketchSum.add`."""
        total = self.accumulate()
        total.add(hidden, logits, targets)
        return total.value()

    def accumulate(self) -> SketchSum:
        """An empty sum, for tokens that come in parts: a loss that never forms all logits adds them chunk by chunk."""
        return SketchSum(self)


class SketchSum:
    """The sketch of a batch as its tokens come in; made by `TensorSketch.accumulate`."""

    def __init__(self, sketch: TensorSketch) -> None:
        self._sketch = sketch
        self._sum = torch.zeros(sketch.m // 2 + 1, dtype=torch.complex64, device=sketch.device)

    @torch.no_grad()
    def add(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Adds tokens, or the samples of a classifier.

        Nothing is shifted here: ``targets[t]`` is what ``logits[t]`` predict (see `align_causal`). A token with target
        −100 has no part, whatever its row holds. Rows of logits are read a chunk at a time, so no second ``(T, V)``
        array exists. Work is in float32, or in float64 where hidden or logits are.

        Args:
            hidden: the head's inputs ``(T, d_hidden)``; logits: its outputs ``(T, vocab_size)``; any float dtype, on
                the sketch's device.
            targets: ``(T,)`` integers, 0..vocab_size−1 or −100. On the CPU, wherever the rest is, they let unlabelled
                rows be skipped; on a GPU their number is not known here, and rows count with weight zero.
        Raises:
            InputError: shapes or devices that do not fit.
        """
        sketch = self._sketch
        _check_rows(sketch, hidden, logits, targets)
        hidden, logits = hidden.detach(), logits.detach()
        rows = None
        if targets.device.type == "cpu":
            rows = (targets != IGNORED).nonzero().squeeze(1)
            rows = None if len(rows) == len(targets) else rows
        count = len(targets) if rows is None else len(rows)
        size = max(1, _CHUNK_LOGITS.get(sketch.device.type, 1 << 20) // sketch.vocab_size)
        # A caller's autocast would round the products to half precision.
        with torch.autocast(sketch.device.type, enabled=False):
            for start in range(0, count, size):
                chunk: slice | Tensor = slice(start, min(count, start + size))
                if rows is None:
                    self._add(hidden[chunk], logits[chunk], targets[chunk], None)
                else:
                    some = rows[chunk].to(sketch.device, non_blocking=True)
                    self._add(hidden[some], logits, targets[rows[chunk]], some)

    def _add(self, hidden: Tensor, logits: Tensor, targets: Tensor, rows: Tensor | None) -> None:
        """Adds the Fourier coefficients ``(m/2 + 1,)`` of a chunk; ``rows`` says where in ``logits`` it lies."""
        sketch = self._sketch
        targets = targets.to(sketch.device, non_blocking=True)
        wide = torch.promote_types(torch.promote_types(hidden.dtype, logits.dtype), torch.float32)
        counts, gold = targets != IGNORED, targets.clamp_min(0)[:, None]
        values, index, lse = top_logits(logits, sketch.top_k, rows)
        lse = lse.to(wide)[:, None]
        others = (values.to(wide) - lse).exp_().masked_fill_(index == gold, 0)
        golden = logits.gather(1, gold) if rows is None else logits[rows[:, None], gold]
        gold_error = (golden.to(wide) - lse).exp_() - 1
        e = sketch.vocab.sparse(torch.cat([index, gold], dim=1), torch.cat([others, gold_error], dim=1))
        h = sketch.hidden.dense(hidden.to(wide))
        for part in (e, h):  # both, since what an ignored row holds may not be finite
            part.masked_fill_(~counts[:, None], 0)
        self._sum = self._sum + (torch.fft.rfft(h) * torch.fft.rfft(e)).sum(dim=0)

    def value(self) -> Tensor:
        """The sketch ``(m,)`` of all that was added, float32 or float64; zeros if no token had a label."""
        return torch.fft.irfft(self._sum, n=self._sketch.m)


def _check_rows(sketch: TensorSketch, hidden: Tensor, logits: Tensor, targets: Tensor) -> None:
    rows = targets.shape
    wanted = ((*rows, sketch.d_hidden), (*rows, sketch.vocab_size))
    if targets.dim() != 1 or (tuple(hidden.shape), tuple(logits.shape)) != wanted:
        raise InputError(
            f"hidden {tuple(hidden.shape)}, logits {tuple(logits.shape)} and targets {tuple(rows)} must be "
            f"(T, {sketch.d_hidden}), (T, {sketch.vocab_size}) and (T,); d_hidden and vocab_size are those of the "
            "head's weight, padding of the vocabulary included"
        )
    for name, x in (("hidden", hidden), ("logits", logits), ("targets", targets)):
        if x.device == sketch.device or (name == "targets" and x.device.type == "cpu"):
            continue
        raise InputError(f"{name} are on {x.device}, the sketch is on {sketch.device}; make it with device={x.device}")


def align_causal(hidden: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``(B·L, d)``, ``(B·L, V)`` and targets ``(B·L,)`` of a causal language model: position i predicts label i+1.

    The last position of a sequence predicts nothing and gets target −100. The rows are views: moving the labels and
    not the logits saves a copy of them.

    Args:
        hidden: ``(..., L, d)``; logits: ``(..., L, V)``; labels: ``(..., L)``, where label i is token i's own, or −100.
    Raises:
        InputError: leading shapes that differ.
    """
    if hidden.shape[:-1] != labels.shape or logits.shape[:-1] != labels.shape or labels.dim() == 0:
        raise InputError(
            f"hidden {tuple(hidden.shape)}, logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be "
            "(..., L, d), (..., L, V) and (..., L)"
        )
    targets = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], IGNORED)], dim=-1)
    return hidden.flatten(0, -2), logits.flatten(0, -2), targets.flatten()


class FrequentDirections:
    """The leading k-dimensional subspace of a stream of rows, with energies, in at most 2k + ``rotate_every`` rows.

    With A the rows so far, B `rows` and ℓ = 2k (Liberty, 2013; Ghashami and others, 2016), to float32 rounding of ‖A‖²:

        0 ⪯ AᵀA − BᵀB ⪯ Σδ·I          Σδ ≤ ‖A − A_j‖²_F/(ℓ − j) for every j < ℓ, A_j the best of rank j

    A rotation replaces B by its right singular vectors v_i scaled by √(s_i² − δ), δ = s_ℓ² the ℓ-th largest: fewer than
    ℓ rows stay. It takes place every ``rotate_every`` updates, and after updates 1, 2, 4, … before the first of those,
    so that a young basis is no older than half its rows. It works on the Gram matrix of B in float64, whose error,
    1e-16·s₁², is far below the bar under which a direction is rounding of float32 and dropped. Rows that depend on
    others, and zero rows, add no direction.

    Args:
        m: length of a row; k: rank of the basis, 1..m−1.
        rotate_every: updates from one rotation to the next, at least 1.
    Attributes:
        basis: ``(k, m)`` float32, orthonormal rows by falling energy as of the last rotation; zero rows where the
            stream had fewer directions.
        energies: ``(k,)`` float32, s_i² − δ of each: at most the stream's energy ‖A v_i‖² by then, at least that − Σδ.
        directions: how many rows of the basis are not zero, a scalar on the device.
        shrinkage: Σδ, a float64 scalar on the device.
        updates: rows seen.
    Raises:
        InputError: k outside 1..m−1, or rotate_every below 1.
    """

    def __init__(self, m: int, k: int, *, rotate_every: int = 128, device: torch.device | str = "cpu") -> None:
        if not 1 <= k < m:
            raise InputError(
                f"basis rank k must be between 1 and {m - 1}, below the sketch length {m}, got {k}; lower k"
            )
        if rotate_every < 1:
            raise InputError(f"reorth_every must be at least 1 update, got {rotate_every}")
        self.m, self.k, self.rotate_every = m, k, rotate_every
        self.updates = 0
        self.basis = torch.zeros(k, m, device=device)
        self.energies = torch.zeros(k, device=device)
        self.directions = torch.zeros((), dtype=torch.int64, device=device)
        self.shrinkage = torch.zeros((), dtype=torch.float64, device=device)
        self._buffer = torch.zeros(2 * k - 1 + rotate_every, m, device=device)
        self._filled = 0

    @property
    def rows(self) -> Tensor:
        """B ``(n, m)``, n ≤ 2k − 1 + ``rotate_every``: what the last rotation left, then the rows since."""
        return self._buffer[: self._filled]

    @torch.no_grad()
    def update(self, row: Tensor) -> None:
        """Adds one ``row (m,)``.

        Raises:
            InputError: a row of another shape.
        """
        if row.shape != (self.m,):
            raise InputError(f"a row must have shape ({self.m},), got {tuple(row.shape)}")
        self._buffer[self._filled] = row
        self._filled += 1
        self.updates += 1
        young = self.updates < self.rotate_every and self.updates & (self.updates - 1) == 0
        if young or self.updates % self.rotate_every == 0:
            self.rotate()

    @torch.no_grad()
    def rotate(self) -> None:
        """Shrinks the rows to fewer than 2k and takes the basis from them. It may be called at any time."""
        if not self._filled:
            return
        B = self.rows.double()
        s2, U = torch.linalg.eigh(B @ B.T)
        s2, U = s2.flip(0).clamp_min(0), U.flip(1)
        noise = max(B.shape) * torch.finfo(torch.float32).eps
        real = s2 > s2[0] * noise**2
        V = torch.where(real[:, None], (U.T @ B) / s2.sqrt().clamp_min(torch.finfo(torch.float64).tiny)[:, None], 0.0)
        length = 2 * self.k
        delta = torch.where(real[length - 1], s2[length - 1], 0.0) if len(s2) >= length else torch.zeros_like(s2[0])
        left = torch.where(real, s2 - delta, 0.0).clamp_min(0)
        self._filled = min(len(s2), length - 1)
        self._buffer.zero_()
        self._buffer[: self._filled] = (left.sqrt()[:, None] * V)[: self._filled]
        self.shrinkage = self.shrinkage + delta
        top = min(self.k, len(s2))
        self.basis, self.energies = torch.zeros_like(self.basis), torch.zeros_like(self.energies)
        self.basis[:top], self.energies[:top] = V[:top], left[:top]
        self.directions = real[:top].sum()

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that later updates depend on: tensors and numbers."""
        tensors = {name: getattr(self, name).clone() for name in ("basis", "energies", "directions", "shrinkage")}
        return {**tensors, "rows": self.rows.clone(), "updates": self.updates, "rotate_every": self.rotate_every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was called, on this object's device.

        Raises:
            InputError: a state of another k, m or ``rotate_every``.
        """
        if state["basis"].shape != self.basis.shape or state["rotate_every"] != self.rotate_every:
            k, m = state["basis"].shape
            raise InputError(
                f"the saved basis has k={k}, m={m}, reorth_every={state['rotate_every']}, this one k={self.k}, "
                f"m={self.m}, reorth_every={self.rotate_every}; use the settings it was saved with"
            )
        for name in ("basis", "energies", "directions", "shrinkage"):
            setattr(self, name, state[name].to(self.basis.device, copy=True))
        self._filled = len(state["rows"])
        self._buffer.zero_()
        self._buffer[: self._filled] = state["rows"].to(self._buffer)
        self.updates = state["updates"]
