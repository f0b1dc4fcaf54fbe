"""The mathematics of per-token gates: what a gate sees, which channels it selects, and the gradient of that decision.

N is the number of tokens, r the rank, z = A x ``(N, r)`` the projection of x ``(N, d_in)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from sparselora.errors import InputError

Tensor = torch.Tensor

EPS = 1e-6
"""Added to a magnitude before its logarithm is taken."""

_SMALLEST_NORM = 1e-8

STATISTICS = 4
"""How many `token_statistics` there are, each one reduction over d_in."""


# --- what a gate sees ----------------------------------------------------------------------------------------------


def log_norms(weight: Tensor, dim: int) -> Tensor:
    """log ‖·‖ along ``dim`` of a matrix, in float32; log 1e-8 where the norm is less, so that a zero B stays finite."""
    return weight.detach().float().norm(dim=dim).clamp_min(_SMALLEST_NORM).log()


def log_energy(z: Tensor, B: Tensor) -> Tensor:
    """log(|z_k| + 1e-6) + log ‖B_k‖ ``(N, r)``, in float32: the size of a channel's output for this token."""
    return (z.detach().float().abs() + EPS).log() + log_norms(B, 0)


def projection_features(z: Tensor) -> Tensor:
    """[log(|z| + 1e-6), z/‖z‖] ``(N, 2r)``, in float32; z/‖z‖ is 0 for a zero vector."""
    z = z.detach().float()
    norm = z.norm(dim=-1, keepdim=True)
    return torch.cat([(z.abs() + EPS).log(), torch.where(norm > 0, z / norm, 0.0)], dim=-1)


def token_statistics(x: Tensor) -> Tensor:
    """[log(‖x‖ + 1e-6), mean(x)/rms, log(max|x| + 1e-6), mean|x|/rms] ``(N, 4)``, float32; a ratio is 0 for x = 0."""
    x = x.detach().float()
    norm, size = x.norm(dim=-1), x.abs()
    rms = norm / x.shape[-1] ** 0.5
    ratios = [torch.where(rms > 0, part.mean(dim=-1) / rms, 0.0) for part in (x, size)]
    return torch.stack([(norm + EPS).log(), ratios[0], (size.amax(dim=-1) + EPS).log(), ratios[1]], dim=-1)


# --- which channels ------------------------------------------------------------------------------------------------


def select_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of ``scores (N, r)`` for each token, 0 < k < r; among equal scores the lower index wins.

    Returns:
        The mask ``(N, r)``, bool, and the threshold ``(N, 1)`` halfway between the k-th score and the next, detached.
    """
    ordered, index = scores.detach().sort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(ordered, dtype=torch.bool).scatter_(-1, index[..., :k], True)
    return mask, (ordered[..., k - 1 : k] + ordered[..., k : k + 1]) / 2


# --- one pass ------------------------------------------------------------------------------------------------------


class Pass:
    """One forward pass of a model: which of its tokens count, what was selected, and the gradient of its loss.

    Attributes:
        scale: ∂(what backward is called on)/∂(the loss of this pass), times ``share``. The backward pass alone knows
            it: the inverse of the accumulation steps, the factor of an AMP scaler. None before.
        modules: gated modules with an `Objective` so far; a module that is called twice counts twice.
        gated: calls of gates so far.
    """

    def __init__(self, attention_mask: Tensor | None = None, share: Tensor | float = 1.0) -> None:
        """``share``: this batch's part of the loss's normalisation, where that spans several batches."""
        self.scale: Tensor | None = None
        self.modules = self.gated = 0
        self._share = share
        self._mask = attention_mask
        self._valid: dict[tuple[Any, ...], Tensor] = {}
        self._active: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._closed = False

    def valid(self, z: Tensor) -> Tensor:
        """Return which of the tokens of ``z (..., r)`` count ``(N,)``, bool: those that the attention mask shows.

        A mask that is longer than the tokens is one of generation with a cache: its last columns count. Where there is
        no mask, or the shape is not the tokens' (a pooled vector per text), all count.
        """
        key = (*z.shape[:-1], z.device)
        if key not in self._valid:
            self._valid[key] = self._find_valid(z.shape[:-1], z.device)
        return self._valid[key]

    def _find_valid(self, shape: torch.Size, device: torch.device) -> Tensor:
        mask = None if self._mask is None else self._mask.to(device)
        if mask is not None:
            if len(shape) == 2 and shape[0] == mask.shape[0] and shape[1] <= mask.shape[1]:
                return (mask[:, mask.shape[1] - shape[1] :] != 0).reshape(-1)
            if tuple(shape) == (mask.numel(),):
                return (mask != 0).reshape(-1)
        return torch.ones(shape.numel(), dtype=torch.bool, device=device)

    def add(self, mask: Tensor, valid: Tensor) -> None:
        """Count a module's ``mask (N, r)``, unless the pass is over: checkpointing computes it again in backward."""
        if not self._closed:
            self.modules += 1
            self._active.append((mask & valid[:, None]).sum())
            self._slots.append(valid.sum() * mask.shape[1])

    def close(self) -> None:
        self._closed = True

    def note_scale(self, gradient: Tensor) -> None:
        self.scale = gradient.detach() * (self._share.to(gradient) if torch.is_tensor(self._share) else self._share)

    def slots(self, device: torch.device) -> Tensor:
        """Valid tokens times channels, over all modules; at least 1."""
        return torch.stack([n.to(device) for n in self._slots]).sum().clamp_min(1)

    def active_share(self, device: torch.device) -> Tensor:
        """Share of the channels that are active, over all modules and valid tokens."""
        return torch.stack([n.to(device) for n in self._active]).sum() / self.slots(device)


class Objective(NamedTuple):
    """The aim of a module's scores in addition to the task, as the gradient it adds to theirs.

    The loss of the pass is L + penalty·(ρ − budget)² + match_weight·mean over modules, valid tokens and channels of the
    cross-entropy between σ((s − θ)/τ) and a target. ρ is the active share of the hard masks, with the gradient of the
    decision; the target has the k channels of largest saliency, which is ``saliency (N, r)`` or, where that is None,
    |∂L/∂m_k|. Only its gradient exists: the value of the loss stays the task's.
    """

    run: Pass
    valid: Tensor
    k: int
    budget: float
    penalty: float
    match_weight: float
    saliency: Tensor | None

    def gradient(self, p: Tensor, slope: Tensor, grad_m: Tensor, temperature: float) -> Tensor:
        """The addition to ∂L/∂s ``(N, r)``, from p = σ((s − θ)/τ), slope = ∂m/∂s and ∂L/∂m, all ``(N, r)``.

        Raises:
            InputError: backward did not come through the model's own loss.
        """
        if self.run.scale is None:
            raise InputError(
                "learned token gates with a penalty or supervision train through the model's own loss (output.loss), "
                "and backward did not come through it; give the model its labels and train on its loss (no label "
                "smoothing, no loss of the trainer's own), or set supervision to task and penalty to 0"
            )
        total = torch.zeros_like(p)
        if self.penalty:
            excess = self.run.active_share(p.device) - self.budget
            total += 2 * self.penalty * excess / self.run.slots(p.device) * slope
        if self.match_weight:
            saliency = grad_m.abs() if self.saliency is None else self.saliency
            target, _ = select_topk(saliency, self.k)
            away = (p - target.to(p.dtype)) / temperature
            if self.saliency is None:  # a token on which the loss does not depend has no order of channels to match
                away = away * (saliency != 0).any(dim=-1, keepdim=True)
            total += self.match_weight / (self.valid.sum().clamp_min(1) * p.shape[1] * self.run.modules) * away
        return total * self.valid[:, None] * self.run.scale.to(p)


# --- a mixture of small LoRAs ---------------------------------------------------------------------------------------

BALANCE = 0.01
"""Weight of the load balancing term: the published one (Fedus et al., arXiv 2101.03961)."""


class _WithTerm(torch.autograd.Function):
    """z as it is, and in the backward pass the gradient of ``term``, which the value of the loss leaves out."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, term: Tensor, run: Pass) -> Tensor:
        ctx.run = run
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.run.scale is None:
            raise InputError(
                "routed token gates balance their load through the model's own loss (output.loss), and backward did "
                "not come through it; give the model its labels and train on its loss"
            )
        return grad, ctx.run.scale.to(grad.device, torch.float32), None


def routed_product(z: Tensor, logits: Tensor, run: Pass | None, valid: Tensor) -> tuple[Tensor, Tensor]:
    """z with the channels of one expert for each token, and what is active: E experts of r / E neighbouring channels.

    Expert e = argmax p, p = softmax(``logits``), the lower one among equals. Forward, its channels are as they are and
    the others 0. Backward, they are scaled by p_e / p_e with the divisor constant, so that ∂/∂logits is that of log p_e
    times what the gradient says of the channels (straight through), plus `BALANCE` times that of
    E · Σ_e (share of the valid tokens that e has) · (mean of p_e over them), which is least for an even load.

    Args:
        z: ``(N, r)``; logits: ``(N, E)`` in float32; valid: ``(N,)``, bool, the tokens that count.
        run: the training pass; None where nothing is trained.
    Returns:
        The product ``(N, r)`` and the mask ``(N, r)``, bool.
    """
    n_experts = logits.shape[1]
    p = logits.softmax(dim=-1)
    first = (logits == logits.amax(dim=-1, keepdim=True)).int().argmax(dim=-1, keepdim=True)
    is_active = torch.zeros_like(p, dtype=torch.bool).scatter_(1, first, True)
    mask = is_active.repeat_interleave(z.shape[1] // n_experts, dim=1)
    gate = p.gather(1, first)
    product = torch.where(mask, z, 0.0) * (gate / gate.detach()).to(z.dtype)
    if run is not None:
        count = valid.sum().clamp_min(1)
        load = (is_active & valid[:, None]).sum(dim=0) / count
        term = BALANCE * n_experts * (load * (p * valid[:, None]).sum(dim=0) / count).sum()
        product = _WithTerm.apply(product, term, run)
    return product, mask


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        scores: Tensor,
        mask: Tensor,
        theta: Tensor,
        temperature: float,
        relaxed: bool,
        objective: Objective | None,
    ) -> Tensor:
        ctx.save_for_backward(z, scores, mask, theta)
        # What describes the pass is kept by itself: recomputed under checkpointing, it could be another pass's.
        ctx.settings = temperature, relaxed, objective
        return z * (torch.sigmoid((scores - theta) / temperature) if relaxed else mask).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, scores, mask, theta = ctx.saved_tensors
        temperature, relaxed, objective = ctx.settings
        p = torch.sigmoid((scores - theta) / temperature)
        slope = p * (1 - p) / temperature
        grad_m = grad.to(p.dtype) * z.to(p.dtype)
        grad_scores = grad_m * slope
        if objective is not None:
            grad_scores = grad_scores + objective.gradient(p, slope, grad_m, temperature)
        return grad * (p if relaxed else mask).to(grad.dtype), grad_scores, None, None, None, None, None


def gated_product(
    z: Tensor,
    scores: Tensor,
    mask: Tensor,
    theta: Tensor,
    temperature: float,
    relaxed: bool = False,
    objective: Objective | None = None,
) -> Tensor:
    """m ⊙ z, with a gradient for the scores that m was decided by.

    Forward, m is ``mask`` exactly. Backward, ∂m_k/∂s_k := σ'((s_k − θ)/τ)/τ with θ constant (straight-through
    estimator, Bengio et al., arXiv 1308.3432), and the gradient of z is that of the output times ``mask``.

    Args:
        z, scores: ``(N, r)``; the scores in the precision in which their gradient is computed.
        mask: ``(N, r)``, bool.
        theta: what the scores were compared with, ``(N, 1)`` or ``()``.
        temperature: τ > 0.
        relaxed: m is σ((s − θ)/τ) forward too.
        objective: what the scores are trained for in addition to the task.
    """
    return _GatedProduct.apply(z, scores, mask, theta, temperature, relaxed, objective)
