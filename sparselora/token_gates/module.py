"""The gate of one LoRA layer: a hook on its lora_A, and what it has learned and counted."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn.utils import skip_init

from sparselora.config.token_gates import ROUTED, TokenGateConfig
from sparselora.errors import InputError
from sparselora.models import lora
from sparselora.numerics.channels import RANK_CHANNEL_SCORES, keep_count
from sparselora.token_gates.scores import (
    STATISTICS,
    Objective,
    Pass,
    gated_product,
    log_energy,
    log_norms,
    projection_features,
    routed_product,
    select_topk,
    token_statistics,
)

Tensor = torch.Tensor

_ROUTER_STD = 0.02
"""Of a router's first weights: logits of about 0.5 for a normalised x of width 576, so that no expert is left out."""


@dataclass
class Shared:
    """State that the gates of a model have in common at a moment; ``collected`` has scores while thresholds are set."""

    budget: float
    run: Pass
    collected: dict[str, list[Tensor]] | None = None


class ModuleGate(nn.Module):
    """The gate of one LoRA layer.

    Attributes:
        name: of the module in the model.
        rank: r.
        head: of a learned gate, features → scores ``(r,)``, of a routed one, x → logits of its experts, in float32;
            else None.
        ranking: of a static gate, its channels from the largest energy to the smallest ``(r,)``; −1 before it is taken.
        active, tokens: tokens counted in evaluation mode by active channel ``(r,)``, and altogether.
    """

    active: Tensor
    tokens: Tensor
    ranking: Tensor

    def __init__(self, config: TokenGateConfig, name: str, layer: LoraLayer, adapter: str, shared: Shared) -> None:
        super().__init__()
        self.config, self.name, self.rank = config, name, lora.rank(layer, adapter)
        # In a tuple: the layer is a part of the model, and must not be one of its gate too.
        self._layer = (layer,)
        self._adapter, self._shared = adapter, shared
        A, B = lora.weights(layer, adapter)
        self.d_in, self.d_out = A.shape[1], B.shape[0]
        self.head: nn.Linear | None = None
        if config.policy == ROUTED:
            if self.rank % config.experts:
                raise InputError(
                    f"{name} has rank {self.rank}, which {config.experts} experts cannot share evenly; take a rank "
                    f"that is a multiple of {config.experts}, or another budget"
                )
            self.head = _head(self.d_in, config.experts, A, has_bias=False)
        elif config.policy == "learned":
            self.head = _head(feature_count(config.features, self.rank), self.rank, A)
        self.start_head()
        self._ranked = False
        if config.policy == "static":
            self.register_buffer("ranking", torch.full((self.rank,), -1, device=A.device))
        self.reset_counts()
        self._hook = layer.lora_A[adapter].register_forward_hook(self._on_projection)

    @property
    def k(self) -> int:
        """Active channels under the budget of the moment."""
        return keep_count(self.rank, self._shared.budget)

    @property
    def gates(self) -> bool:
        """True if this module's channels are selected at the moment: not at budget 1, nor where k is r for all."""
        return self._shared.budget < 1 and (self.config.select == "threshold" or self.k < self.rank)

    def remove(self) -> None:
        self._hook.remove()

    def reset_counts(self) -> None:
        device = lora.weights(self._layer[0], self._adapter)[0].device
        # No buffers: under DDP those of the first process overwrite the others' before every training pass.
        self.active = torch.zeros(self.rank, dtype=torch.long, device=device)
        self.tokens = torch.zeros((), dtype=torch.long, device=device)

    def energies(self) -> NDArray[np.floating]:
        """‖B_k‖²‖A_k‖² ``(r,)``, now."""
        return RANK_CHANNEL_SCORES["channel_energy"](*lora.factors(self._layer[0], self._adapter))

    @torch.no_grad()
    def start_head(self) -> None:
        """Make the scores of a learned gate energies: the token's own where it sees A x, else those of the factors.

        A router starts with small random weights, drawn by the seed of torch's default generator and the module's name.
        """
        if self.head is None:
            return
        if self.config.policy == ROUTED:
            generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32 + zlib.crc32(self.name.encode()))
            self.head.weight.copy_(_ROUTER_STD * torch.randn(self.head.weight.shape, generator=generator))
            return
        A, B = lora.weights(self._layer[0], self._adapter)
        self.head.weight.zero_()
        self.head.bias.copy_(log_norms(B, 0))
        if self.config.features == "statistics":
            self.head.bias.add_(log_norms(A, 1))
        else:
            self.head.weight.fill_diagonal_(1)

    def take_ranking(self) -> None:
        """Rank the channels by their energy, unless that was done since gating began."""
        if not self._ranked and bool(self.ranking[0] < 0):  # a loaded ranking stays
            self.ranking.copy_(torch.from_numpy(np.argsort(-self.energies(), kind="stable")))
        self._ranked = True

    def forget_ranking(self) -> None:
        """Have a static gate rank its channels again when gating begins again."""
        self._ranked = False
        if self.config.policy == "static":
            self.ranking.fill_(-1)

    def _on_projection(self, module: nn.Module, inputs: tuple[Tensor, ...], z: Tensor) -> Tensor | None:
        """Hook of lora_A: ``z (..., r)`` with the channels that are off for a token at 0; None leaves z as it is."""
        if z.shape[-1] != self.rank:
            raise InputError(
                f"{self.name} has rank {z.shape[-1]}, its gate was attached at rank {self.rank}; "
                "call remove() on the gates before ranks change"
            )
        run = self._shared.run
        if not self.gates:
            if not module.training:
                self._count(torch.ones(1, self.rank, dtype=torch.bool, device=z.device), run.valid(z))
            return None
        run.gated += 1
        flat = z.reshape(-1, self.rank)
        if self.config.policy == ROUTED:
            return self._routed(inputs[0].reshape(-1, self.d_in), flat, module.training, run.valid(z)).reshape(z.shape)
        scores = self._scores(inputs[0].reshape(-1, inputs[0].shape[-1]), flat)
        mask, theta = self._select(scores)
        if self._shared.collected is not None:
            self._shared.collected.setdefault(self.name, []).append(scores[run.valid(z)].cpu())
        elif not module.training:
            self._count(mask, run.valid(z))
        if self.head is None:
            return z * mask.reshape(z.shape).to(z.dtype)
        objective = self._objective(run, z, flat, mask) if module.training else None
        relaxed = module.training and self.config.estimator == "relaxed"
        return gated_product(flat, scores, mask, theta, self.config.temperature, relaxed, objective).reshape(z.shape)

    def _routed(self, x: Tensor, z: Tensor, training: bool, valid: Tensor) -> Tensor:
        """Return ``z (N, r)`` with the channels of the expert that the router gives each token of ``x (N, d_in)``."""
        assert self.head is not None
        with torch.autocast(z.device.type, enabled=False):
            logits = nn.functional.linear(x.detach().float(), self.head.weight.float())
        product, mask = routed_product(z, logits, self._shared.run if training else None, valid)
        if not training:
            self._count(mask, valid)
        return product

    def _scores(self, x: Tensor, z: Tensor) -> Tensor:
        """Scores ``(N, r)`` of the channels, in float32, from ``x (N, d_in)`` and ``z (N, r)``; larger is better."""
        if self.config.policy == "random":
            return torch.rand(z.shape, device=z.device)
        if self.config.policy == "static":
            self.take_ranking()
            places = torch.arange(self.rank, 0, -1, device=z.device, dtype=torch.float32)
            return torch.empty_like(places).scatter_(0, self.ranking, places).expand(z.shape)
        with torch.autocast(z.device.type, enabled=False):
            if self.head is None:
                return log_energy(z, self._B)
            features = {"projection": lambda: projection_features(z), "statistics": lambda: token_statistics(x)}
            names = features if self.config.features == "both" else [self.config.features]
            seen = torch.cat([features[name]() for name in names], dim=-1)
            return nn.functional.linear(seen, self.head.weight.float(), self.head.bias.float())

    @property
    def _B(self) -> Tensor:
        return lora.weights(self._layer[0], self._adapter)[1]

    def _select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        # While thresholds are set there is none yet: what follows a layer sees the budget as `topk` keeps it.
        if self.config.select == "threshold" and (self._shared.collected is None or self.k == self.rank):
            return scores.detach() > 0, scores.new_zeros(())
        return select_topk(scores, self.k)

    def _objective(self, run: Pass, z: Tensor, flat: Tensor, mask: Tensor) -> Objective | None:
        config = self.config
        penalty = config.penalty if config.select == "threshold" else 0.0
        matched = config.supervision != "task" and self.k < self.rank
        match_weight = config.match_weight if matched else 0.0
        if not penalty and not match_weight:
            return None
        valid = run.valid(z)
        run.add(mask, valid)
        saliency = log_energy(flat, self._B) if match_weight and config.supervision == "energy" else None
        return Objective(run, valid, self.k, self._shared.budget, penalty, match_weight, saliency)

    def _count(self, mask: Tensor, valid: Tensor) -> None:
        # Not in place: what inference mode has made may not be changed outside of it. The model may have moved.
        self.active = self.active.to(mask.device) + (mask & valid[:, None]).sum(dim=0)
        self.tokens = self.tokens.to(mask.device) + valid.sum()


def feature_count(features: str, r: int) -> int:
    """Number of features that a learned gate of a module of rank ``r`` sees of a token."""
    return {"projection": 2 * r, "statistics": STATISTICS, "both": 2 * r + STATISTICS}[features]


def _head(features: int, outputs: int, A: Tensor, *, has_bias: bool = True) -> nn.Linear:
    # skip_init draws no random numbers: a run with gates shares the rest of its draws with one without.
    head = skip_init(nn.Linear, features, outputs, bias=has_bias, device=A.device, dtype=torch.float32)
    return cast(nn.Linear, head)
