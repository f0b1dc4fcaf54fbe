"""Rank channels of PEFT LoRA layers: score, mask, remove, truncate, export.

A layer's update is ΔW = scaling · B A with ``lora_A (r, d_in)`` and ``lora_B (d_out, r)``; rank channel k is the pair
(B[:, k], A[k, :]). Removing channels shrinks the tensors and leaves the scaling as it was, so that the function right
after is that of the masked layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparselora.errors import InputError, suggest
from sparselora.models.adapter_config import TO_PLAIN_LORA, changes_base, uniform_config
from sparselora.models.adapter_files import folded, padded, write_files
from sparselora.models.adapter_names import PREFIX
from sparselora.models.class_names import class_names
from sparselora.models.four_bit import dequantised, is_4bit
from sparselora.models.prompt_template import Template
from sparselora.numerics.channels import RANK_CHANNEL_SCORES, keep_count, top_channels
from sparselora.numerics.reconstruction import factored_svd

Kept = dict[str, NDArray[np.intp]]
"""Module name → ascending indices of the rank channels it keeps; an empty array where none is left."""

Scores = dict[str, NDArray[np.floating]]

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module name → lora_A ``(r, d_in)`` and lora_B ``(d_out, r)``."""


def lora_layers(
    model: nn.Module,
    adapter: str = "default",
    names: Iterable[str] | None = None,
    *,
    variants: tuple[type, ...] = (),
) -> dict[str, LoraLayer]:
    """The LoRA linear layers of ``model`` by module name, in module order.

    Args:
        names: those to take, by default all; the others may be of any kind.
        variants: PEFT's variants of LoRA that are taken, too.
    Raises:
        InputError: there is none, or none is taken; a name that is no LoRA layer; one that is taken is of a kind whose
            channels are not plain rank-one terms (DoRA, embeddings, convolutions, a bias on lora_B).
    """
    other_types = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in (*module.lora_A, *module.lora_embedding_A)
    }
    if not other_types:
        raise InputError(
            f"the model has no LoRA layer of adapter {adapter!r}; attach one with peft.get_peft_model first"
        )
    wanted = set(other_types if names is None else names)
    for name in sorted(wanted - other_types.keys()):
        raise InputError(f"{name} is no LoRA layer of adapter {adapter!r}{suggest(name, other_types)}")
    if not wanted:
        raise InputError(f"no module is chosen; known: {', '.join(other_types)}")
    layers_by_name: dict[str, LoraLayer] = {}
    for name, module in other_types.items():
        if name not in wanted:
            continue
        if not _is_linear(module, adapter):
            raise InputError(
                f"{name} is a LoRA {type(module).__name__} layer; rank channels are supported on linear layers only"
            )
        variant = module.lora_variant.get(adapter)
        if variant is not None and not isinstance(variant, variants):
            raise InputError(f"{name} uses {type(variant).__name__}; only plain LoRA and rsLoRA are supported")
        if module.lora_bias[adapter]:
            raise InputError(f"{name} has a bias on lora_B; train with lora_bias=False")
        layers_by_name[name] = module
    return layers_by_name


def _is_linear(layer: LoraLayer, adapter: str) -> bool:
    """Return whether ``layer`` adapts a linear layer by two linear factors, whatever its weight is stored in."""
    sides = (layer.lora_A, layer.lora_B)
    if not all(adapter in side and isinstance(side[adapter], nn.Linear) for side in sides):
        return False
    base = layer.get_base_layer()
    return isinstance(base, Conv1D) or hasattr(base, "in_features")


def weights(layer: LoraLayer, adapter: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters ``lora_A (r, d_in)`` and ``lora_B (d_out, r)``."""
    return cast(nn.Parameter, layer.lora_A[adapter].weight), cast(nn.Parameter, layer.lora_B[adapter].weight)


def base_weight(layer: LoraLayer) -> torch.Tensor:
    """Return the frozen weight ``(d_out, d_in)`` of a linear LoRA layer, dequantised from 4 bits if need be.

    Raises:
        InputError: a weight in another quantised format.
    """
    base = layer.get_base_layer()
    weight = cast(torch.Tensor, base.weight)
    if is_4bit(weight):
        return dequantised(weight)
    if not weight.is_floating_point():
        raise InputError(
            f"a base weight is stored as {weight.dtype}, which cannot be read as a matrix; load the model unquantised"
        )
    return weight.detach().T if isinstance(base, Conv1D) else weight.detach()


def rank(layer: LoraLayer, adapter: str = "default") -> int:
    return weights(layer, adapter)[0].shape[0]


def factors(layer: LoraLayer, adapter: str = "default") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``A (r, d_in)`` and ``scaling · B (d_out, r)`` in float64, so that their product is the layer's ΔW."""
    A, B = (weight.detach().double().cpu().numpy() for weight in weights(layer, adapter))
    return A, B * layer.scaling[adapter]


def adapter_parameters(model: nn.Module, adapter: str = "default") -> int:
    """Number of LoRA parameters (a head trained with them is not counted); 0 where no layer is left."""
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name and f".{adapter}." in name)


def adapter_flops_per_token(model: nn.Module, adapter: str = "default") -> int:
    """Forward FLOPs of the adapter per token: Σ 2·(d_in + d_out)·r over its modules, one MAC (2 FLOPs) a parameter."""
    return 2 * adapter_parameters(model, adapter)


# --- which channels ------------------------------------------------------------------------------------------------


def first_order_sensitivity(model: nn.Module, losses: Iterator[torch.Tensor], adapter: str = "default") -> Scores:
    """|⟨B[:, k], ∂L/∂B[:, k]⟩| per rank channel, averaged over calibration batches.

    It is the first-order change of the loss when channel k is removed, and does not depend on how scale is split
    between the factors: ⟨b_k, ∂L/∂b_k⟩ = ⟨a_k, ∂L/∂a_k⟩.

    Args:
        losses: the loss of one calibration batch at a time, with its graph. The model's ``grad`` is not touched.
    """
    layers = lora_layers(model, adapter)
    lora_Bs = [weights(layer, adapter)[1] for layer in layers.values()]
    total = [torch.zeros(B.shape[1], dtype=torch.float64) for B in lora_Bs]
    batches = 0
    for loss in losses:
        for acc, B, grad in zip(total, lora_Bs, torch.autograd.grad(loss, lora_Bs)):
            acc += (B.detach().double() * grad.double()).sum(dim=0).abs().cpu()
        batches += 1
    if batches == 0:
        raise InputError("gradient sensitivity needs at least one calibration batch, got none")
    return {name: (acc / batches).numpy() for name, acc in zip(layers, total)}


def score_channels(
    model: nn.Module,
    method: str,
    *,
    rng: np.random.Generator | None = None,
    losses: Callable[[], Iterator[torch.Tensor]] | None = None,
    adapter: str = "default",
) -> Scores:
    """Importance of every rank channel, larger is better: module name → ``(r,)``.

    Args:
        method: ``channel_energy`` or ``magnitude_B`` (of the factors), ``random`` (needs ``rng``), ``gradient``
            (needs ``losses``, see `first_order_sensitivity`).
    """
    layers = lora_layers(model, adapter)
    if method in RANK_CHANNEL_SCORES:
        return {name: RANK_CHANNEL_SCORES[method](*factors(layer, adapter)) for name, layer in layers.items()}
    if method == "random":
        if rng is None:
            raise InputError("method 'random' needs a generator")
        return {name: rng.random(rank(layer, adapter)) for name, layer in layers.items()}
    if method == "gradient":
        if losses is None:
            raise InputError("method 'gradient' needs calibration losses")
        return first_order_sensitivity(model, losses(), adapter)
    raise InputError(f"unknown method {method!r}; known: {', '.join((*RANK_CHANNEL_SCORES, 'random', 'gradient'))}")


def select_channels(scores: Mapping[str, NDArray[np.floating]], keep_ratio: float, scope: str) -> Kept:
    """The channels to keep: ``keep_count`` of each module (scope ``module``), or of all modules together (``global``).

    Under a global budget a module may keep none. Ties go to the earlier module and the lower index.
    """
    if scope == "module":
        return {name: top_channels(s, keep_count(len(s), keep_ratio)) for name, s in scores.items()}
    if scope != "global":
        raise InputError(f"scope must be 'module' or 'global', got {scope!r}")
    flat = np.concatenate(list(scores.values()))
    top = top_channels(flat, keep_count(len(flat), keep_ratio))
    offsets = np.cumsum([0, *(len(s) for s in scores.values())])
    return {name: top[(top >= lo) & (top < hi)] - lo for name, lo, hi in zip(scores, offsets, offsets[1:])}


# --- act on them ---------------------------------------------------------------------------------------------------


class MaskHandle:
    """Undoes `mask_channels`."""

    def __init__(self, hooks: list[Any]) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def mask_channels(model: nn.Module, kept_channels: Kept, adapter: str = "default") -> MaskHandle:
    """Zero the output of the dropped rank channels, forward and backward, and keep the tensors: nothing gets faster.

    This is the reference that `prune` must equal. The output of lora_A is multiplied by the mask, so that dropped rows
    of A and columns of B both have zero gradients, whatever an optimizer's moments still do to their values.
    """
    hooks = []
    for name, layer in lora_layers(model, adapter).items():
        A, _ = weights(layer, adapter)
        mask = torch.zeros(A.shape[0], dtype=A.dtype, device=A.device)
        mask[torch.as_tensor(kept_channels[name])] = 1
        hooks.append(layer.lora_A[adapter].register_forward_hook(lambda _module, _inputs, z, mask=mask: z * mask.to(z)))
    return MaskHandle(hooks)


@dataclass(frozen=True)
class Replaced:
    """A parameter that took another's place; ``kept_entries`` along ``dim`` are the entries it carries over, if any."""

    old: nn.Parameter
    new: nn.Parameter
    dim: int
    kept_entries: torch.Tensor | None


def prune(model: nn.Module, kept_channels: Kept, adapter: str = "default") -> list[Replaced]:
    """Remove every rank channel not in ``kept_channels``: the tensors shrink, the function is that of the masked model.

    A module left without channels loses its adapter (PEFT has no rank 0). The scaling stays; alpha is rewritten to
    match it (alpha·r'/r, for rsLoRA alpha·√(r'/r)), for the default alpha/r' would double the update at keep 0.5.

    Returns:
        The replaced parameters, for `carry_optimizer_state`.
    Raises:
        InputError: what `lora_layers` refuses; an adapter that changed the base weights when it was made (PiSSA, …).
    """
    refuse_changed_base(model, adapter)
    replaced = []
    for name, layer in lora_layers(model, adapter).items():
        if len(kept_channels[name]) == 0:
            remove_adapter(model, name, layer)
            continue
        A, B = weights(layer, adapter)
        index = torch.as_tensor(kept_channels[name], device=A.device)
        new_A, new_B = set_factors(layer, A.detach()[index], B.detach()[:, index], adapter)
        replaced += [Replaced(A, new_A, 0, index), Replaced(B, new_B, 1, index)]
    return replaced


def drop_padding(model: nn.Module, ranks: Mapping[str, Any], adapter: str = "default") -> None:
    """Remove the channels of zeros beyond ``ranks`` (by module) with which `export_adapter` fills a loaded adapter."""
    kept_channels = {}
    for name, layer in lora_layers(model, adapter).items():
        A, B = weights(layer, adapter)
        r, count = ranks.get(name), len(A)
        if isinstance(r, int) and 0 < r < count and not A[r:].any() and not B[:, r:].any():
            count = r
        kept_channels[name] = np.arange(count)
    if any(len(kept_channels[name]) < rank(layer, adapter) for name, layer in lora_layers(model, adapter).items()):
        prune(model, kept_channels, adapter)


def truncate_svd(model: nn.Module, keep_ratio: float, scope: str, adapter: str = "default") -> list[Replaced]:
    """Replace every ΔW by its best approximation of lower rank, from the SVD of B A in factor space (Eckart–Young).

    The budget is that of `select_channels` with the singular values as scores. New factors split each singular value
    evenly: B' = U√s, A' = √s Vᵀ. The channels are rotated, so no optimizer state belongs to them: it starts afresh.
    A direction without energy (s below 1e-12 of the largest) begins like a fresh adapter, B' = 0 and A' of the size of
    a row of A: with both at 0 neither would ever have a gradient.

    Raises:
        InputError: as `prune` does.
    """
    refuse_changed_base(model, adapter)
    layers = lora_layers(model, adapter)
    decomposed = {name: factored_svd(*factors(layer, adapter)[::-1]) for name, layer in layers.items()}
    scores = {name: np.pad(s, (0, rank(layers[name], adapter) - len(s))) for name, (_, s, _) in decomposed.items()}
    replaced = []
    for name, channels in select_channels(scores, keep_ratio, scope).items():
        layer = layers[name]
        if len(channels) == 0:
            remove_adapter(model, name, layer)
            continue
        A, B = weights(layer, adapter)
        set_A, set_B = set_factors(layer, *_balanced(layer, decomposed[name], len(channels), adapter), adapter)
        replaced += [Replaced(A, set_A, 0, None), Replaced(B, set_B, 1, None)]
    return replaced


@torch.no_grad()
def turn_to_singular(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, adapter: str = "default"
) -> None:
    """Turn the channels of every adapter to the singular directions of its update, in place, the largest first.

    The factors are those of `truncate_svd` at full rank: the same function up to rounding. ``optimizer`` forgets what
    it knew of the channels that were. A fresh adapter (B = 0) has no directions: its rows of A become orthogonal.

    Raises:
        RuntimeError: a factor is not finite, for training has diverged.
    """
    for name, layer in lora_layers(model, adapter).items():
        if not all(bool(weight.isfinite().all()) for weight in weights(layer, adapter)):
            raise RuntimeError(f"training diverged: the adapter of {name} holds NaN or infinite values; lower --lr")
        turned = _balanced(layer, factored_svd(*factors(layer, adapter)[::-1]), rank(layer, adapter), adapter)
        for parameter, values in zip(weights(layer, adapter), turned, strict=True):
            parameter.copy_(values)
            if optimizer is not None:
                optimizer.state.pop(parameter, None)


def _balanced(
    layer: LoraLayer, svd: tuple[NDArray[np.floating], ...], count: int, adapter: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``(count, d_in)`` and B ``(d_out, count)`` of the first singular directions, as `truncate_svd` says."""
    U, s, Vt = svd
    n = min(count, len(s))  # rank above min(d_in, d_out): the padded directions stay as zero columns of B
    root = np.sqrt(np.where(s[:n] > 1e-12 * s[0], s[:n], 0.0) / layer.scaling[adapter])
    A, B = (weight.detach() for weight in weights(layer, adapter))
    new_A, new_B = A[:count].clone(), torch.zeros_like(B[:, :count])
    size = float(A.double().norm(dim=1).mean())
    new_A[:n] = torch.from_numpy(np.where(root > 0, root, size)[:, None] * Vt[:n]).to(A)
    new_B[:, :n] = torch.from_numpy(U[:, :n] * root).to(B)
    return new_A, new_B


def set_factors(
    layer: LoraLayer, A: torch.Tensor, B: torch.Tensor, adapter: str = "default"
) -> tuple[nn.Parameter, nn.Parameter]:
    """Give ``layer`` new parameters ``A (k, d_in)`` and ``B (d_out, k)``; its scaling stays, alpha is rewritten."""
    old, new = rank(layer, adapter), A.shape[0]
    for side, weight in ((layer.lora_A, A), (layer.lora_B, B)):
        linear = cast(nn.Linear, side[adapter])
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
        linear.out_features, linear.in_features = weight.shape
    shrink = (new / old) ** (0.5 if layer.use_rslora[adapter] else 1.0)
    layer.lora_alpha[adapter] = layer.lora_alpha[adapter] * shrink
    layer.r[adapter] = new
    return weights(layer, adapter)


def record_ranks(model: nn.Module, adapter: str = "default") -> None:
    """Bring rank and alpha in the adapter's configuration up to date, so that PEFT loads what is saved from now on."""
    config = cast(Any, cast(PeftModel, model).peft_config[adapter])
    layers = {
        name.removeprefix(PREFIX): layer
        for name, layer in lora_layers(model, adapter, variants=(ALoraLinearVariant,)).items()
    }
    ranks = {name: layer.r[adapter] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[adapter] for name, layer in layers.items()}
    is_uniform = len(set(ranks.values())) == 1
    config.r, config.lora_alpha = max(ranks.values()), max(alphas.values())
    config.rank_pattern, config.alpha_pattern = ({}, {}) if is_uniform else (ranks, alphas)


def remove_adapter(model: nn.Module, name: str, layer: LoraLayer) -> None:
    """Put the base layer in the place of ``layer``, whose module is called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.get_base_layer())


def refuse_changed_base(model: nn.Module, adapter: str) -> None:
    """Raise InputError for an adapter that is relative to other base weights than those that its export would name."""
    config = getattr(model, "peft_config", {}).get(adapter)
    start = getattr(config, "init_lora_weights", True)
    if changes_base(start):
        raise InputError(
            f"adapter {adapter!r} was initialised by {start}, which changed the base weights by its rank: at another "
            f"rank or scale, PEFT would load another function; {TO_PLAIN_LORA}"
        )


def carry_optimizer_state(old: torch.optim.Optimizer, new: torch.optim.Optimizer, replaced: list[Replaced]) -> None:
    """Give ``new`` the state that ``old`` holds: whole for parameters both have, the kept rows for replaced ones.

    Tensors of a parameter's shape (Adam's moments) are indexed like the parameter; others (its step count) are copied.
    A parameter replaced with ``kept_entries=None`` starts without state.

    Raises:
        InputError: a replaced parameter has state that is neither of its shape nor a number (factored, quantised or
            paged state, preconditioners), which has no rows to keep; ``new`` is left as it was.
    """
    source = {entry.new: entry for entry in replaced}
    carried = {}
    for parameter in (p for group in new.param_groups for p in group["params"]):
        entry = source.get(parameter)
        state = old.state.get(parameter if entry is None else entry.old)
        if state and (entry is None or entry.kept_entries is not None):
            carried[parameter] = {key: _carried(old, key, value, entry) for key, value in state.items()}
    for parameter, state in carried.items():
        new.state[parameter] = state


def _carried(optimizer: torch.optim.Optimizer, key: str, value: Any, entry: Replaced | None) -> Any:
    """One value of an optimizer's state, of what is left of its parameter."""
    if entry is None or entry.kept_entries is None:
        return value.clone() if torch.is_tensor(value) else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if torch.is_tensor(value) and value.numel() == 1:
        return value.clone()
    if (
        type(value) in (torch.Tensor, nn.Parameter)  # not a quantised subclass
        and value.is_floating_point()
        and value.shape == entry.old.shape
        and not getattr(value, "is_paged", False)
    ):
        return value.index_select(entry.dim, entry.kept_entries.to(value.device)).clone()
    kind = f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
    paged = " in paged memory" if getattr(value, "is_paged", False) else ""
    name = type(getattr(optimizer, "optimizer", optimizer)).__name__
    raise InputError(
        f"{name} keeps {key!r} as {kind}{paged} for a parameter of shape {tuple(entry.old.shape)}, and only "
        "floating-point state of the parameter's shape can follow its rows; use AdamW or SGD, or begin the new "
        "optimizer afresh"
    )


# --- export --------------------------------------------------------------------------------------------------------


def export_adapter(
    model: PeftModel,
    folder: Path,
    base_model: str,
    adapter: str = "default",
    *,
    template: Template | None = None,
    initial: Factors | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter in PEFT's format, scaling folded into B and zero channels up to the largest rank, so that
    ``alpha == r`` in every module.

    Plain PEFT loads it and computes the same function, and so does a loader that knows one scale for all modules, or
    divides one alpha by each module's rank. Each module that still has an adapter is named.

    Args:
        base_model: name of the base model to record (a hub name; never a path of this machine).
        template: text around the prompts that it was trained on, to record; None for a classifier.
        initial: factors at the beginning, by which the base weights were changed then (PiSSA, …): what is written is
            the difference B A - B0 A0, of both ranks together, for the base as it was.
        tensors: the trained tensors by their names in ``model``, where its own are sharded.
    Raises:
        InputError: what `prune` refuses, without ``initial``; factors whose type cannot hold the scale.
    """
    if initial is None:
        refuse_changed_base(model, adapter)
    layers = lora_layers(model, adapter, variants=(ALoraLinearVariant, DoraLinearVariant))
    ranks = {
        name.removeprefix(PREFIX): rank(layer, adapter) + (len(initial[name][0]) if initial else 0)
        for name, layer in layers.items()
    }
    largest = max(ranks.values())
    config = uniform_config(model.peft_config[adapter].to_dict(), largest) | {
        "base_model_name_or_path": base_model,
        "target_modules": list(ranks),
        "inference_mode": True,
    }
    state = get_peft_model_state_dict(model, tensors, adapter_name=adapter, save_embedding_layers=False)
    for name, layer in layers.items():
        key_A, key_B = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        A, B = state[key_A], state[key_B]
        if initial:
            A0, B0 = initial[name]
            A, B = torch.cat((A, A0.to(A))), torch.cat((B, -B0.to(B)), dim=1)
        state[key_A], state[key_B] = padded(*folded(name, A, B, layer.scaling[adapter]), largest)
    # PEFT keeps some lists as sets, whose order differs from run to run.
    ordered = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in config.items()}
    kept_ranks = None if set(ranks.values()) == {largest} else ranks
    write_files(folder, ordered, state, kept_ranks, class_names(model, adapter), template)
