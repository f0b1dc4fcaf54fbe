"""The settings of per-token gates as flags of a script, and what is recorded of them.

A run is known by the flags that matter to it: those of a learned gate are nothing to an analytic one, and none of them
is anything to pruning.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sparselora.config.fields import options
from sparselora.config.token_gates import TokenGateConfig
from sparselora.errors import InputError
from sparselora.numerics.channels import GATE_METHODS

_FIELDS = {
    "gate_basis": "basis",
    "gate_select": "select",
    "gate_features": "features",
    "gate_estimator": "estimator",
    "gate_supervision": "supervision",
    "gate_match_weight": "match_weight",
    "gate_penalty": "penalty",
    "gate_temperature": "temperature",
    "gate_anneal": "anneal_ratio",
}
"""Flag → field of `TokenGateConfig`, in the order in which a variant is named."""

_BARE = ("basis", "select", "features", "estimator")
"""Settings whose values speak for themselves in the name of a variant."""


def add_token_gate_flags(parser: argparse.ArgumentParser) -> None:
    """The group ``token gate``: a flag for each setting of `TokenGateConfig` but policy, budget and warm-up."""
    group = parser.add_argument_group("token gate (of the methods " + ", ".join(GATE_METHODS) + ")")
    settings, defaults = options(TokenGateConfig), TokenGateConfig()
    for flag, field in _FIELDS.items():
        setting = settings[field]
        how: dict[str, Any] = {"choices": setting.choices} if setting.choices else {"type": float, "metavar": "X"}
        text = "share of the steps after the warm-up in which the budget falls from 1 to --keep_ratio"
        help = text if field == "anneal_ratio" else setting.help
        group.add_argument(f"--{flag}", default=getattr(defaults, field), help=help, **how)


def token_gate_config(arguments: Mapping[str, Any]) -> TokenGateConfig | None:
    """The gates that ``--method`` and the flags ask for; None for a method without gates, whatever the flags say.

    Raises:
        InputError: a value out of range, or flags that contradict the method.
    """
    method = arguments["method"]
    if method not in GATE_METHODS:
        return None
    if arguments["mask"] or arguments["scope"] != "module":
        raise InputError(
            f"{'--mask' if arguments['mask'] else '--scope global'} goes with methods that choose channels once; "
            f"{method} chooses them by token in each module, so leave it out"
        )
    plain = TokenGateConfig()
    values = {field: arguments[flag] for flag, field in _FIELDS.items()}
    for flag, field in _FIELDS.items():
        try:
            TokenGateConfig(**{field: values[field]})  # alone, so that an error is about this flag
        except InputError as error:
            raise InputError(str(error).replace(field, f"--{flag}", 1)) from None
    policy = GATE_METHODS[method]
    for flag in ("gate_select", "gate_estimator", "gate_supervision") if policy != "learned" else ():
        if values[_FIELDS[flag]] != getattr(plain, _FIELDS[flag]):
            raise InputError(
                f"--{flag} {values[_FIELDS[flag]]} needs a gate that learns, got --method {method}; "
                "use --method token_gate or leave it out"
            )
    return TokenGateConfig.from_dict(values | {"policy": policy, "budget": arguments["keep_ratio"]})


def without_idle_flags(arguments: Mapping[str, Any], gate: TokenGateConfig | None) -> dict[str, Any]:
    """``arguments`` of a run less the gate flags that do not matter to it."""
    idle = set(_FIELDS)
    if gate is not None:
        idle = {flag for flag, field in _FIELDS.items() if field not in _relevant(gate)}
    return {name: value for name, value in arguments.items() if name not in idle}


def variant_text(gate: TokenGateConfig | None) -> str:
    """The settings that matter and are not the default, a word each: ``statistics relaxed anneal=0.5``; often empty."""
    if gate is None:
        return ""
    words: list[str] = []
    plain, matters = TokenGateConfig(), _relevant(gate)
    for flag, field in _FIELDS.items():
        value = getattr(gate, field)
        if field in matters and value != getattr(plain, field):
            name = flag.removeprefix("gate_")
            words.append(
                value if field in _BARE else f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            )
    return " ".join(words)


def _relevant(gate: TokenGateConfig) -> set[str]:
    """The fields that can change what gates of this policy do."""
    if gate.budget == 1:
        return set()
    if gate.policy != "learned":
        return {"basis", "anneal_ratio"}
    fields = set(_FIELDS.values())
    if gate.select != "threshold":
        fields -= {"penalty"}
    if gate.supervision == "task":
        fields -= {"match_weight"}
    return fields
