"""Cut the rank of an adapter while it trains: new factors, and Adam's moments in their basis.

ΔW = s · B A is replaced by its best approximation of lower rank k (Eckart–Young), s · B A ≈ U diag(σ) Vᵀ, written as

    A' = ρ · V_kᵀ = T_A A        T_A (k, r) = A' A⁺
    B' = U_k diag(σ_k) / (ρ s) = B T_B        T_B (r, k) = A V_k / ρ

so that T_A T_B = I. ρ, the root mean square of the lengths of A's rows, leaves A as large as it was: of a LoRA whose A
is close to where it began (rows of one length, nearly orthogonal) T_A is nearly a rotation and T_B its transpose, and
Adam's step, which has the same size whatever the gradient's, changes ΔW by as much as before.

With G = ∂L/∂ΔW the gradients are ∂L/∂A = s Bᵀ G and ∂L/∂B = s G Aᵀ, and at the new factors

    ∂L/∂A' = s B'ᵀ G = T_Bᵀ (∂L/∂A)        ∂L/∂B' = s G A'ᵀ = (∂L/∂B) T_Aᵀ.

First moments are sums of gradients, so that they turn by the same products, exactly. Second moments do not: they lack
the products of two entries. Taking the deviations of gradients from their mean as uncorrelated between channels, with
T = T_Bᵀ or T_A, and m̂ and v̂ the moments without their bias after t steps,

    v' = (1 − β₂ᵗ) · [(T∘T) (v̂ − m̂∘m̂)₊ + (T m̂)∘(T m̂)],

which is how LDAdam turns them (Robert et al., 2024, arXiv:2410.16103): exact where every gradient was the same, and
never below (T m̂)², so that no step of the new factors is longer than the learning rate allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor, nn

from sparselora.errors import InputError
from sparselora.models import lora
from sparselora.models.adapter_names import PREFIX
from sparselora.spectral.factors import AdapterSVD, adapter_svd

_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = "exp_avg_sq"


# --- one module ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """New factors of a module, and what takes the old ones to them.

    Attributes:
        A, B: ``(k, d_in)`` and ``(d_out, k)`` in float64, of the old scaling.
        turn_A, turn_B: T_A ``(k, r)`` and T_B ``(r, k)``: A = T_A A_old and B = B_old T_B.
    """

    A: Tensor
    B: Tensor
    turn_A: Tensor
    turn_B: Tensor


@torch.no_grad()
def cut_factors(svd: AdapterSVD, A: Tensor, scaling: float, rank: int) -> Cut:
    """Return the factors of the best approximation of rank ``rank``, as the module's docstring has them.

    Args:
        svd: of the module's update, its scaling included.
        A: ``(r, d_in)``.
        rank: from 1 to the number of directions, min(r, d_out, d_in).
    """
    old_A = A.detach().double()
    V = svd.V[:, :rank]
    size = old_A.norm() / len(old_A) ** 0.5
    size = torch.where(size > 0, size, torch.ones_like(size))
    new_A = size * V.T
    gram = torch.linalg.pinv(old_A @ old_A.T, hermitian=True)
    return Cut(
        A=new_A,
        B=svd.U[:, :rank] * (svd.sigma[:rank] / (size * scaling)),
        turn_A=new_A @ old_A.T @ gram,
        turn_B=old_A @ V / size,
    )


def turn_state(state: Mapping[str, Any], turn: Tensor, dim: int, beta2: float, beta1: float) -> dict[str, Any]:
    """Return an optimizer's state of a factor in the basis of the new one.

    Args:
        state: of Adam, AdamW or SGD with momentum: tensors of the factor's shape, and numbers, which stay.
        turn: ``(k, r)``, by which the gradient of the factor turns: T_Bᵀ for A, T_A for B.
        dim: dimension of the factor that is the rank, 0 for A and 1 for B.
        beta1, beta2: of Adam.
    """
    moments = {name: state[name].double() for name in (*_FIRST, _SECOND) if torch.is_tensor(state.get(name))}
    sides = {name: moment if dim == 0 else moment.T for name, moment in moments.items()}  # (r, width)
    turned = {name: turn @ side for name, side in sides.items() if name != _SECOND}
    if _SECOND in sides:
        steps = float(state["step"])
        mean = sides["exp_avg"] / (1 - beta1**steps)
        spread = (sides[_SECOND] / (1 - beta2**steps) - mean.square()).clamp(min=0)
        turned[_SECOND] = (1 - beta2**steps) * (turn.square() @ spread + (turn @ mean).square())
    shaped = {name: side if dim == 0 else side.T for name, side in turned.items()}
    plain = {name: value.clone() if torch.is_tensor(value) else value for name, value in state.items()}
    return plain | {name: value.to(state[name].dtype).contiguous() for name, value in shaped.items()}


# --- how many channels --------------------------------------------------------------------------------------------


def uniform_ranks(svds: Mapping[str, AdapterSVD], rank: int) -> dict[str, int]:
    """Return ``rank`` for every module, or all that it has if that is less."""
    return {name: min(rank, directions(svd)) for name, svd in svds.items()}


def budget_ranks(svds: Mapping[str, AdapterSVD], rank: int, multiple: int) -> dict[str, int]:
    """Spend the parameters of ``rank`` everywhere where they hold the most of the squared norm of all updates.

    Directions are bought in blocks of ``multiple``, that of the largest energy for a parameter first; every module gets
    one block, and the last block of a module may be smaller where it has no more directions. Ties go to the earlier
    module.

    Raises:
        InputError: ``multiple`` is above ``rank``.
    """
    if multiple > rank:
        raise InputError(f"squeeze_multiple must be at most the rank that is left, {rank}, got {multiple}")
    widths = {name: len(svd.U) + len(svd.V) for name, svd in svds.items()}
    limits = {name: directions(svd) for name, svd in svds.items()}
    ranks = {name: min(multiple, limit) for name, limit in limits.items()}
    left = sum(widths[name] * (min(rank, limits[name]) - ranks[name]) for name in svds)
    blocks = [
        (float(svd.sigma[start : start + multiple].square().sum()) / _cost(svd, start, multiple), order, start, name)
        for order, (name, svd) in enumerate(svds.items())
        for start in range(multiple, limits[name], multiple)
    ]
    for _, _, start, name in sorted(blocks, key=lambda block: (-block[0], block[1], block[2])):
        size = min(multiple, limits[name] - start)
        if start == ranks[name] and size * widths[name] <= left:
            ranks[name] += size
            left -= size * widths[name]
    return ranks


def _cost(svd: AdapterSVD, start: int, multiple: int) -> int:
    """Parameters of the block of directions from ``start`` on."""
    return min(multiple, directions(svd) - start) * (len(svd.U) + len(svd.V))


def directions(svd: AdapterSVD) -> int:
    """Number of singular directions that a module can have."""
    return min(svd.rank, len(svd.U), len(svd.V))


# --- a model ------------------------------------------------------------------------------------------------------


def squeezable_layers(model: nn.Module, adapter: str = "default") -> dict[str, LoraLayer]:
    """Return the LoRA layers of ``model`` by name, all of which can be cut on their own.

    Raises:
        InputError: what `lora_layers` refuses (DoRA, embeddings, …); an adapter that changed the base weights when it
            was made (PiSSA, OLoRA, …); factors or a weight that several modules share.
    """
    lora.refuse_changed_base(model, adapter)
    layers = lora.lora_layers(model, adapter, variants=(ALoraLinearVariant,))
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        for factor in lora.weights(layer, adapter):
            other = owners.setdefault(id(factor), name)
            if other != name:
                raise InputError(
                    f"{name} and {other} share one LoRA (ensure_weight_tying), so that neither can be cut alone; "
                    "leave one of them out of target_modules"
                )
    factors = set(owners)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = name.rpartition(".")[0].removesuffix(".base_layer")
        if id(parameter) in factors:
            continue
        other = owners.setdefault(id(parameter), module)
        if other != module and {module, other} & layers.keys():
            shared = " and ".join(sorted(part.removeprefix(PREFIX) for part in (module, other)))
            raise InputError(
                f"{shared} share one weight (tied), so that the update of one belongs to no other module's weight; "
                "leave it out of target_modules, or train without squeeze"
            )
    return layers


def decompose(model: nn.Module, adapter: str = "default") -> dict[str, AdapterSVD]:
    """Return the SVD of every module's update, by name.

    Raises:
        InputError: as `squeezable_layers`.
        RuntimeError: a factor is not finite, for training has diverged.
    """
    svds = {}
    for name, layer in squeezable_layers(model, adapter).items():
        A, B = lora.weights(layer, adapter)
        if not bool(A.isfinite().all() and B.isfinite().all()):
            raise RuntimeError(f"training diverged: the adapter of {name} holds NaN or infinite values; lower --lr")
        svds[name] = adapter_svd(A, B, layer.scaling[adapter])
    return svds


def squeeze(
    model: nn.Module,
    svds: Mapping[str, AdapterSVD],
    ranks: Mapping[str, int],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    agree: Callable[[Sequence[Tensor]], object] = lambda tensors: None,
    adapter: str = "default",
) -> None:
    """Cut every module to its rank in ``ranks``; a module of rank 0 loses its adapter, and one of no lower rank stays.

    The tensors shrink and the scaling stays, with alpha rewritten to match. ``optimizer`` trains the new parameters in
    place of the old, with its moments turned.

    Args:
        svds: of every module (`decompose`).
        optimizer: Adam, AdamW or SGD, or accelerate's wrapper of one.
        agree: called with tensors that must be the same in every process of a distributed run, to make them so.
    Raises:
        InputError: an optimizer whose state cannot be turned; as `squeezable_layers`. Nothing has changed then.
    """
    if optimizer is not None:
        plain = getattr(optimizer, "optimizer", optimizer)
        check_turnable(type(plain), plain.defaults)
    for name, layer in squeezable_layers(model, adapter).items():
        old = lora.weights(layer, adapter)
        rank = ranks[name]
        if rank >= len(old[0]):
            continue
        if rank == 0:
            lora.remove_adapter(model, name, layer)
            continue
        cut = cut_factors(svds[name], old[0], layer.scaling[adapter], rank)
        agree([cut.A, cut.B, cut.turn_A, cut.turn_B])
        new = lora.set_factors(layer, cut.A.to(old[0]), cut.B.to(old[1]), adapter)
        if optimizer is not None:
            for dim, turn in enumerate((cut.turn_B.T, cut.turn_A)):
                _replace(optimizer, old[dim], new[dim], turn, dim)
    lora.record_ranks(model, adapter)


def check_turnable(kind: type, settings: Mapping[str, Any]) -> None:
    """Raise InputError for an optimizer whose state is not known to turn: another than Adam, AdamW and SGD.

    Args:
        kind: class of the optimizer.
        settings: its keywords.
    """
    if kind not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD) or settings.get("amsgrad"):
        raise InputError(
            f"squeeze turns the moments of Adam, AdamW and SGD to the new basis, and those of {kind.__name__} "
            "are not known to turn (quantised, factored or preconditioned state does not); use AdamW"
        )


def _replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, turn: Tensor, dim: int) -> None:
    """Put ``new`` in the place that ``old`` has in ``optimizer``, its state turned."""
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][position] = new
                state = optimizer.state.pop(old, {})
                if state:
                    beta1, beta2 = group.get("betas", (0.0, 0.0))
                    optimizer.state[new] = turn_state(state, turn, dim, beta2, beta1)


def adopt_ranks(model: nn.Module, ranks: Mapping[str, int], adapter: str = "default") -> None:
    """Give every module factors of its rank in ``ranks``, whose values are to be loaded: those of a checkpoint."""
    for name, layer in squeezable_layers(model, adapter).items():
        A, B = (weight.detach() for weight in lora.weights(layer, adapter))
        if ranks[name] < len(A):
            lora.set_factors(layer, A[: ranks[name]].clone(), B[:, : ranks[name]].clone(), adapter)
    lora.record_ranks(model, adapter)
