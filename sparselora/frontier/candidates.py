"""The candidates of a search: ways to train that may be cheaper, the controls, and why the others are left out.

A candidate is a set of changed settings of `TrainConfig`, by dotted names. All of them, dense too, have the exact
savings of mode ``dense``, where the model can have them: work that no label depends on is no shortcut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparselora.config.sparsity import MODES
from sparselora.config.train import NESTED, TrainConfig
from sparselora.contextual.flops import Shape
from sparselora.errors import InputError

DENSE = "dense"
LESS_DATA = {"data_75": 0.75, "half_data": 0.5}
"""Dense on less data: share of the steps, by name. With dense they span the loss that dense has for any time."""
FIXED_CONTROLS = (DENSE, *LESS_DATA)
"""Candidates of every rung: what the others are compared with."""

_LEAST_SPARSE = 2
"""First layer, and distance of the last from the end, of the blanket range: the published recipes begin there. A model
that has fewer than five layers is sparse in all."""
_BLANKET_MODES = {
    "static_50": ("static", 0.5), "static_90": ("static", 0.9), "random_99": ("random_fixed", 0.99),
    "svd_99": ("svd", 0.99), "skip": ("skip", 0.99), "map": ("surrogate", 0.99),
}  # fmt: skip
"""Mode and sparsity of the FFNs by candidate, over one blanket range of layers."""
_SCHEDULED_MODES = {"static_layers": "static", "random_layers": "random_fixed", "svd_layers": "svd"}
"""Mode by candidate, at the sparsities of a profile's schedule, layer by layer."""
_ORDER = (
    "none", "static_50", "fp8_none", "random_99", "rank_half", "static_layers", "fp8", "none_static_50", "static_90",
    "svd_99", "skip", "upper", "fp8_none_static_50", "sampled_half", "lora_upper_half", "map", "svd_layers",
    "random_layers",
)  # fmt: skip
"""All but the fixed controls: where the budget does not suffice for all, the last are left out. What kept its quality
on a pretrained model comes first, with one control of every kind."""


@dataclass(frozen=True)
class Candidate:
    """A way to train.

    Attributes:
        name: in all tables.
        settings: changed settings of `TrainConfig` by dotted names.
        is_control: compared with, not proposed.
        share: of the steps that it takes.
        reason: why it is left out; empty where it is tried.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_control: bool = False
    share: float = 1.0
    reason: str = ""

    @property
    def is_fixed(self) -> bool:
        return self.name in FIXED_CONTROLS


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """Return ``config`` with ``settings``, by dotted names, in place of its own.

    Raises:
        InputError: as `TrainConfig`.
    """
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        if key and section in NESTED:
            changes.setdefault(section, {})[key] = value
        else:
            changes[name] = value
    return config.merge(changes)


@dataclass(frozen=True)
class Circumstances:
    """Model, machine and profile, as far as they decide which candidates are possible.

    Attributes:
        model_config: ``config.json`` of the model.
        fp8_problem: why there are no fp8 products here; None where there are.
        sparse_problem: why training steps of this model cannot be changed; None where they can.
        schedule: sparsity of FFNs and attention by key of ``layer_sparsity``, of a profile; None without one.
        open_levels: level → whether a profile leaves it open in most layers, where it was measured.
    """

    model_config: Mapping[str, Any]
    fp8_problem: str | None = None
    sparse_problem: str | None = None
    schedule: Mapping[str, float] | None = None
    open_levels: Mapping[float, bool] = field(default_factory=dict)


def list_candidates(config: TrainConfig, circumstances: Circumstances) -> list[Candidate]:
    """Return every candidate, the fixed controls first, then in the order in which a budget is spent on them."""
    base = _dense_settings(circumstances)
    candidates = [Candidate(DENSE, base, is_control=True)]
    for name, share in LESS_DATA.items():
        candidates.append(Candidate(name, base | _less_data(config, share), is_control=True, share=share))
    others = _step_candidates(config, base, circumstances)
    others |= {name: _smaller(name, config, base, circumstances) for name in ("rank_half", "lora_upper_half")}
    return [*candidates, *(others[name] for name in _ORDER if name in others)]


def _dense_settings(circumstances: Circumstances) -> dict[str, Any]:
    return {} if circumstances.sparse_problem else {"sparsity.mode": "dense"}


def _less_data(config: TrainConfig, share: float) -> dict[str, Any]:
    if config.max_steps:
        return {"max_steps": max(1, round(config.max_steps * share))}
    return {"epochs": config.epochs * share}


# --- cheaper steps ------------------------------------------------------------------------------------------------


def _step_candidates(
    config: TrainConfig, base: Mapping[str, Any], circumstances: Circumstances
) -> dict[str, Candidate]:
    """Return the candidates whose steps are cheaper, by name, with the reason of those that are not possible."""
    contexts: dict[str, dict[str, Any]] = {
        "none": {"sparsity.context_backward": "none"},
        "upper": {"sparsity.context_backward": "upper", "sparsity.context_backward_share": 0.5},
        "sampled_half": {"sparsity.context_backward": "sampled", "sparsity.context_backward_share": 0.5},
    }
    fp8: dict[str, Any] = {"sparsity.frozen_precision": "fp8"}
    blanket = {name: _blanket(name, circumstances) for name in _BLANKET_MODES}
    settings: dict[str, Mapping[str, Any]] = {
        **contexts, "fp8": fp8, "fp8_none": fp8 | contexts["none"], **blanket,
        "none_static_50": contexts["none"] | blanket["static_50"],
        "fp8_none_static_50": fp8 | contexts["none"] | blanket["static_50"],
    }  # fmt: skip
    if circumstances.schedule is not None:
        settings |= {name: _scheduled(name, circumstances.schedule) for name in _SCHEDULED_MODES}
    problem = functools.partial(_problem, config, circumstances)
    return {
        name: Candidate(name, {**base, **changes}, is_control=_is_random(changes), reason=problem(name, changes))
        for name, changes in settings.items()
    }


def _is_random(settings: Mapping[str, Any]) -> bool:
    return str(settings.get("sparsity.mode", "")).startswith("random")


def _blanket(name: str, circumstances: Circumstances) -> dict[str, Any]:
    mode, sparsity = _BLANKET_MODES[name]
    layers = _layers(circumstances.model_config)
    if layers is None:
        return {"sparsity.mode": mode, "sparsity.ffn_sparsity": sparsity}
    first, last = (_LEAST_SPARSE, layers - _LEAST_SPARSE) if layers > 2 * _LEAST_SPARSE else (0, layers - 1)
    return {"sparsity.mode": mode, "sparsity.layer_sparsity": {f"layer.{first}-{last}.ffn": sparsity}}


def _layers(model_config: Mapping[str, Any]) -> int | None:
    """Return the number of layers; None for an architecture that is not known."""
    try:
        return Shape.from_config(model_config).layers
    except (InputError, KeyError):
        return None


def _scheduled(name: str, schedule: Mapping[str, float]) -> dict[str, Any]:
    return {"sparsity.mode": _SCHEDULED_MODES[name], "sparsity.layer_sparsity": dict(schedule)}


def _problem(config: TrainConfig, circumstances: Circumstances, name: str, settings: Mapping[str, Any]) -> str:
    """Return why a candidate with a cheaper step is not possible, or not worth a pilot run; empty where it is."""
    if circumstances.sparse_problem:
        return circumstances.sparse_problem
    if "sparsity.context_backward" in settings and config.task != "causal_lm":
        return "a classifier has no context: its one label is read from the whole text"
    if "sparsity.frozen_precision" in settings:
        if config.load_in_4bit:
            return "the frozen weights are in 4 bits, and fp8 copies would take more memory than they save"
        if circumstances.fp8_problem:
            return circumstances.fp8_problem
    if "sparsity.layer_sparsity" in settings and not settings["sparsity.layer_sparsity"]:
        return "the profile leaves every layer dense"
    mode = settings.get("sparsity.mode")
    level = max(settings.get("sparsity.layer_sparsity", {}).values(), default=None)
    is_blanket = name not in _SCHEDULED_MODES
    selects = mode is not None and not _is_random(settings) and MODES[mode].has_attention
    if is_blanket and selects and level is not None and circumstances.open_levels.get(level) is False:
        return f"the profile keeps most layers below a sparsity of {level:g} at its tolerance"
    return ""


# --- smaller adapters ---------------------------------------------------------------------------------------------


def _smaller(name: str, config: TrainConfig, base: Mapping[str, Any], circumstances: Circumstances) -> Candidate:
    if name == "rank_half":
        rank = config.lora_r // 2
        # The same scale, alpha / r or alpha / sqrt(r), so that the same lr fits.
        alpha = config.lora_alpha * (rank / config.lora_r) ** (0.5 if config.use_rslora else 1.0)
        settings = {**base, "lora_r": rank, "lora_alpha": alpha}
        if rank < 1:
            return Candidate(name, base, reason=f"rank {config.lora_r} has no half")
        return Candidate(name, settings)
    layers = upper_layers(config.layers, _layers(circumstances.model_config))
    if not layers:
        return Candidate(name, base, reason="the layers that LoRA is in are not known, or only one")
    return Candidate(name, {**base, "layers_to_transform": layers})


def upper_layers(layers: Sequence[int] | None, count: int | None) -> list[str]:
    """Return the upper half of ``layers``, or of all ``count`` layers, as ``layers_to_transform`` has them.

    Of an odd number the middle one is in the lower half; without two layers, or any that are known, there is none.
    """
    numbers = sorted(range(count or 0) if layers is None else layers)
    upper = numbers[math.ceil(len(numbers) / 2) :]
    if not upper:
        return []
    is_whole_range = upper[-1] - upper[0] == len(upper) - 1 and len(upper) > 1
    return [f"{upper[0]}-{upper[-1]}"] if is_whole_range else [str(layer) for layer in upper]


def left_out(candidates: Sequence[Candidate], reasons: Mapping[str, str]) -> list[Candidate]:
    """Return ``candidates`` with the reasons of those that ``reasons`` names."""
    return [replace(c, reason=reasons[c.name]) if c.name in reasons and not c.reason else c for c in candidates]
