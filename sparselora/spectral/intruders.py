"""Intruder dimensions of an adapter: leading directions of W = W0 + ΔW that W0 does not have.

A left singular vector u of W, among its first k, is an *intruder dimension* if its cosine with every left singular
vector of W0 is below a threshold (Shuttleworth et al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence").
They come with forgetting: to damp them is to ask whether an edit gives back what fine-tuning has cost.

With P the orthogonal projector on the intruder dimensions, ΔW = P ΔW + (I − P) ΔW, and damping by a factor f leaves
f P ΔW + (I − P) ΔW. P acts on B alone: the result is a LoRA of the same rank with the same A, exactly. The paper takes
(1 − f) u σ vᵀ from W, with σ vᵀ = uᵀW; that also removes what *W0* has along u, and adds one to the rank for each. Here
W0 keeps what it has.

W's vectors come from the Gram matrix of W0's short side, to which ΔW adds terms of rank 2r: one eigendecomposition of
W0 for all of its directions, and of the sum only the first k. On one core that takes 0.08 s for a weight of 576 × 1536
and 0.37 s for one of 896 × 4864; full SVDs of W0 and W take 0.34 s and 2.1 s. A block Lanczos iteration for the k
vectors alone took 0.3 s and more on trained weights of the smaller shape: their spectra are flat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor, nn

from sparselora.errors import InputError
from sparselora.models.adapter_files import AdapterFile
from sparselora.models.lora import base_weight, lora_layers
from sparselora.spectral.edit import name_in_model
from sparselora.spectral.factors import AdapterSVD, adapter_svd
from sparselora.spectral.modes import EditOptions

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class LeadingDirections:
    """First left singular vectors of W0 + ΔW, and their likeness to W0's.

    Attributes:
        U: ``(d_out, k)``, the largest singular value first; fewer than asked for where the rank is lower.
        sigma: ``(k,)``, singular values of W0 + ΔW.
        cosine: ``(k,)``, the largest |cosine| of each with any left singular vector of W0.
    """

    U: Tensor
    sigma: Tensor
    cosine: Tensor


@dataclass(frozen=True)
class IntruderSplit(AdapterSVD):
    """ΔW = U diag(sigma) Vᵀ with the intruder dimensions set apart.

    Its first directions are the SVD of P ΔW, the others that of (I − P) ΔW: each u is a unit vector, orthogonal to all
    others, and uᵀΔW = σ vᵀ. The v of one part need not be orthogonal to those of the other. Without an intruder it is
    the SVD of ΔW.

    Attributes:
        leading: the directions of W0 + ΔW that were looked at.
        is_leading_intruder: ``(k,)``, which of these are intruder dimensions.
        is_intruder: ``(n,)``, which directions of the split are in P ΔW.
    """

    leading: LeadingDirections
    is_leading_intruder: Tensor
    is_intruder: Tensor

    @property
    def intruder_flags(self) -> NDArray[np.bool_]:
        return np.asarray(self.is_intruder.cpu().numpy())


def leading_directions(W0: Tensor, A: Tensor, B: Tensor, scaling: float, k: int) -> LeadingDirections:
    """Return the first ``k`` left singular vectors of W0 + scaling · B A, compared with all of W0's.

    The work is in float64, on the device of ``W0``; singular values below 1e-8 of the largest are rounding, and their
    vectors are no directions of W0.

    Args:
        W0: ``(d_out, d_in)``; A: ``(r, d_in)``; B: ``(d_out, r)``.
    """
    W0, A, B = (X.detach().to(W0.device, torch.float64) for X in (W0, A, scaling * B.detach().double()))
    is_wide = W0.shape[0] <= W0.shape[1]
    if is_wide:
        gram, cross, outer = W0 @ W0.T, W0 @ A.T, B  # (d_out, d_out), (d_out, r), (d_out, r)
        inner = A @ A.T
    else:
        gram, cross, outer = W0.T @ W0, W0.T @ B, A.T  # (d_in, d_in), (d_in, r), (d_in, r)
        inner = B.T @ B
    values, vectors = torch.linalg.eigh(gram)
    base = vectors[:, values > len(values) * _EPS * values[-1]]
    half = cross @ outer.T
    updated = gram + half + half.T + outer @ inner @ outer.T
    n = len(updated)
    squares, top = eigh(updated.cpu().numpy(), subset_by_index=[max(0, n - k), n - 1])
    is_alive = squares[::-1] > n * _EPS * squares[-1]
    sigma = torch.from_numpy(np.sqrt(squares[::-1][is_alive].copy())).to(W0)
    U = torch.from_numpy(top[:, ::-1][:, is_alive].copy()).to(W0)
    if not is_wide:  # from right to left singular vectors
        U, base = _unit_columns(W0 @ U + B @ (A @ U)), _unit_columns(W0 @ base)
    cosines = (base.T @ U).abs()
    cosine = cosines.amax(dim=0) if len(cosines) else torch.zeros_like(sigma)
    return LeadingDirections(U, sigma, cosine.clamp(max=1))


def _unit_columns(X: Tensor) -> Tensor:
    return X / X.norm(dim=0).clamp_min(torch.finfo(X.dtype).tiny)


def split_by(A: Tensor, B: Tensor, scaling: float, leading: LeadingDirections, threshold: float) -> IntruderSplit:
    """Decompose ΔW = scaling · B A into its part along the intruder dimensions, cosine < ``threshold``, and the rest.

    Args:
        A: ``(r, d_in)``; B: ``(d_out, r)``.
    Raises:
        InputError: as `adapter_svd` does.
    """
    is_leading_intruder = leading.cosine < threshold
    whole = adapter_svd(A, B, scaling)
    P = leading.U[:, is_leading_intruder].to(B.device)
    count = min(P.shape[1], whole.rank)
    if not count or not whole.sigma.any():
        no_intruder = torch.zeros(whole.rank, dtype=torch.bool, device=whole.sigma.device)
        return IntruderSplit(whole.U, whole.sigma, whole.V, leading, is_leading_intruder, no_intruder)
    exact_B = B.detach().double()
    within = adapter_svd(A, P.T @ exact_B, scaling)
    rest = adapter_svd(A, exact_B - P @ (P.T @ exact_B), scaling)
    U = torch.cat([P @ within.U[:, :count], rest.U], dim=1)
    sigma = torch.cat([within.sigma[:count], rest.sigma])
    V = torch.cat([within.V[:, :count], rest.V], dim=1)
    # What the subtraction leaves of a vector that lies in P is rounding.
    sigma = sigma.masked_fill(sigma <= 10 * whole.rank * _EPS * whole.sigma[0], 0.0)
    is_intruder = torch.arange(len(sigma), device=sigma.device) < count
    return IntruderSplit(U, sigma, V, leading, is_leading_intruder, is_intruder)


def intruder_splits(
    model: nn.Module,
    adapter: AdapterFile,
    modules: Sequence[str],
    options: EditOptions,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, IntruderSplit]:
    """Return the split of each of ``modules``, with the base weights of the loaded PEFT ``model``; ``progress`` is
    called after each.

    Raises:
        InputError: no module has an intruder dimension; a base weight that cannot be read.
    """
    layers = lora_layers(model, names=[name_in_model(module) for module in modules])
    splits = {}
    for module in modules:
        A, B, scaling = adapter.factors(module)
        W0 = base_weight(layers[name_in_model(module)])
        leading = leading_directions(W0, A, B, scaling, options.intruder_k)
        splits[module] = split_by(A, B, scaling, leading, options.intruder_cosine)
        progress()
    if not any(bool(split.is_leading_intruder.any()) for split in splits.values()):
        least = min(float(split.leading.cosine.min()) for split in splits.values())
        raise InputError(
            f"no module has an intruder dimension among its first {options.intruder_k} directions: the least likeness "
            f"to the base is {least:.3f}, intruder_cosine is {options.intruder_cosine:g}; raise it, or intruder_k, or "
            "edit more modules (target_modules)"
        )
    return splits


def intruder_table(splits: Mapping[str, IntruderSplit]) -> pd.DataFrame:
    """Return one row per leading direction of each module: its singular value in W0 + ΔW, its likeness to W0, whether
    it is an intruder dimension (0 or 1), and the share of ‖ΔW‖² along it."""
    parts = []
    for module, split in splits.items():
        leading = split.leading
        along = (leading.U.to(split.U).T @ (split.U * split.sigma)) @ split.V.T  # (k, d_in): uᵀΔW
        size = float(split.sigma.square().sum())
        share = along.square().sum(dim=1).cpu().numpy() / size if size else np.zeros(len(along))
        parts.append(pd.DataFrame({
            "module": module, "index": range(len(leading.sigma)), "sigma": leading.sigma.cpu().numpy(),
            "cosine": leading.cosine.cpu().numpy(), "is_intruder": split.is_leading_intruder.cpu().numpy().astype(int),
            "energy_share": share,
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def describe(table: pd.DataFrame) -> str:
    """Return the counts of an `intruder_table` as a line for a terminal."""
    intruders = table[table["is_intruder"] == 1]
    shares = intruders.groupby("module")["energy_share"].sum()
    return (
        f"{len(intruders)} intruder dimensions in {len(shares)} of {table['module'].nunique()} modules, with "
        f"{100 * shares.mean():.0f} % of ‖ΔW‖² there on average"
    )
