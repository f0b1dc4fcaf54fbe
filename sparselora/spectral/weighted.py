"""Truncation of an adapter's update by what it does to real inputs, not by its singular values alone.

The SVD is the best approximation of ΔW for inputs of every direction alike. Inputs are not like that: with their second
moment C = E[x xᵀ] the mean squared error of a module's output is ‖(ΔW − ΔW_k) C^{1/2}‖_F², and by Eckart–Young, applied
to M = ΔW C^{1/2}, the best ΔW_k of rank k is U_k U_kᵀ ΔW, where U_k are the first left singular vectors of M. They are
the eigenvectors of

    M Mᵀ = ΔW C ΔWᵀ = s² B (A C Aᵀ) Bᵀ = s² B S Bᵀ        S (r, r) = E[z zᵀ],  z = A x

so that neither C ``(d_in, d_in)`` nor its root is formed: S is the second moment of what leaves lora_A. With B = Q R
and S = L Lᵀ, U = Q times the left singular vectors of the r × r core s R L.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselora.errors import InputError
from sparselora.models.load import evaluating
from sparselora.models.lora import lora_layers, weights
from sparselora.spectral.factors import AdapterSVD, adapter_svd


@dataclass(frozen=True)
class LeftBasis:
    """Orthonormal directions of a module's output, on the first k of which its update can be projected.

    Attributes:
        U: ``(d_out, q)`` with orthonormal columns, which span those of ΔW.
        sigma: ``(q,)``, each direction's share of what the basis is ordered by, as a norm.
        rows: ``(q, d_in)``: Uᵀ ΔW.
    """

    U: Tensor
    sigma: Tensor
    rows: Tensor

    def first(self, count: int) -> LeftBasis:
        """Return the basis of the first ``count`` directions."""
        return LeftBasis(self.U[:, :count], self.sigma[:count], self.rows[:count])

    def cut(self, rank: int) -> AdapterSVD:
        """Return the SVD of U_k U_kᵀ ΔW for k = ``rank``."""
        head = self.first(rank)
        return adapter_svd(head.rows, head.U, 1.0)


def weighted_basis(A: Tensor, B: Tensor, scaling: float, moment: Tensor) -> LeftBasis:
    """Return the directions of ΔW = scaling · B A by how much of its output on real inputs lies along them.

    Args:
        A, B: ``(r, d_in)`` and ``(d_out, r)``.
        moment: S = E[(A x)(A x)ᵀ] ``(r, r)``.
    """
    A, B = A.detach().double(), B.detach().double()
    Q, R = torch.linalg.qr(B)
    values, vectors = torch.linalg.eigh(moment.to(B))
    core, sigma, _ = torch.linalg.svd(R @ (vectors * values.clamp(min=0).sqrt()), full_matrices=False)
    U = Q @ core
    return LeftBasis(U, abs(scaling) * sigma, scaling * (U.T @ B) @ A)


def random_basis(svd: AdapterSVD, rng: np.random.Generator) -> LeftBasis:
    """Return random directions within those of ΔW: the control of a basis that was chosen."""
    live = max(1, int((svd.sigma > 0).sum()))
    noise = torch.as_tensor(rng.standard_normal((live, live))).to(svd.U)
    turn, _ = torch.linalg.qr(noise)
    rows = turn.T @ (svd.sigma[:live, None] * svd.V[:, :live].T)
    return LeftBasis(svd.U[:, :live] @ turn, rows.norm(dim=1), rows)


@torch.no_grad()
def second_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    modules: Collection[str],
    adapter: str = "default",
    *,
    bf16: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Return S = E[z zᵀ] ``(r, r)`` of what leaves lora_A, in float64 on the CPU, by module.

    The mean is over the tokens of all batches, padding left out; the model is in evaluation mode meanwhile.

    Args:
        batches: ``input_ids`` and ``attention_mask``, and what else the model takes; labels are left out.
        modules: names of LoRA layers.
        bf16: compute in bfloat16 autocast.
    Raises:
        InputError: as `lora_layers`; no input reaches a module, or one that is not finite.
    """
    layers = lora_layers(model, adapter, modules)
    moments = {name: _Moment(len(weights(layer, adapter)[0])) for name, layer in layers.items()}
    device = next(model.parameters()).device
    with evaluating(model), ExitStack() as stack:
        current: dict[str, Tensor] = {}
        for name, layer in layers.items():
            handle = layer.lora_A[adapter].register_forward_hook(_recorder(moments[name], current))
            stack.callback(handle.remove)
        for batch in batches:
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            current["mask"] = inputs["attention_mask"].bool()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                model(**inputs)
            progress()
    for name, moment in moments.items():
        if moment.tokens == 0:
            raise InputError(f"no calibration row reaches {name}, so that its inputs are unknown; give more rows")
        if not bool(torch.isfinite(moment.total).all()):
            raise InputError(f"the inputs of {name} are not finite; load the model in float32 or bfloat16")
    return {name: moment.total.cpu() / moment.tokens for name, moment in moments.items()}


@dataclass
class _Moment:
    """Sum of z zᵀ ``(r, r)`` over tokens, and their number."""

    rank: int
    tokens: int = 0

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.rank, self.rank, dtype=torch.float64)

    def add(self, z: Tensor) -> None:
        """Add the tokens of ``z (tokens, r)``."""
        z = z.double()
        self.total = self.total.to(z.device) + z.T @ z
        self.tokens += len(z)


def _recorder(moment: _Moment, current: Mapping[str, Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    def record(_module: nn.Module, _inputs: Any, z: Tensor) -> None:
        mask = current["mask"]
        if z.shape[:-1] == mask.shape:
            z = z[mask]
        elif z.dim() == 2 and len(z) == mask.numel():  # experts and some decoders flatten rows
            z = z[mask.reshape(-1)]
        moment.add(z.reshape(-1, z.shape[-1]))

    return record
