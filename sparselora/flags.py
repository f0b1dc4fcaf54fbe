"""The settings of a training run as flags of a command: flags win over the YAML file."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparselora.config import SparsityConfig, TrainConfig
from sparselora.errors import InputError
from sparselora.gate_config import GateConfig
from sparselora.settings import Option, options

_PREFIX = "sparsity."
_GATE = "slora."


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """A positional YAML file, a flag for each field of `TrainConfig`, ``--sparsity.NAME`` and ``--slora.NAME`` for
    those of its sections."""
    parser.add_argument("config", nargs="?", type=Path, help="YAML file of settings (see configs/)")
    settings = parser.add_argument_group("settings (flags win over the file)")
    for name, each in options(TrainConfig).items():
        _add_flag(settings, name, each)
    sparsity = parser.add_argument_group("sparsity settings (likewise)")
    sparsity.add_argument("--sparsity", metavar="FILE|none", help="the whole section, or none for plain PEFT")
    for name, each in options(SparsityConfig).items():
        _add_flag(sparsity, _PREFIX + name, each)
    sparsity.add_argument(
        f"--{_PREFIX}layer_sparsity", nargs="+", metavar="LAYER=VALUE", help="such as layer.0=0 layer.3-30=0.99"
    )
    gate = parser.add_argument_group("settings of the novelty gate (likewise)")
    gate.add_argument("--slora", choices=("none",), help="none: every backward pass runs")
    for name, each in options(GateConfig).items():
        _add_flag(gate, _GATE + name, each)


def _add_flag(group: argparse._ArgumentGroup, name: str, each: Option) -> None:
    how: dict[str, Any] = {"help": each.help, "default": None}
    if each.kind is bool:
        how["action"] = argparse.BooleanOptionalAction
    elif each.kind is tuple:
        how |= {"nargs": "+", "metavar": "NAME"}
    elif each.choices:
        how["choices"] = each.choices
    else:
        how |= {"type": each.kind, "metavar": each.kind.__name__.upper()}
    group.add_argument(f"--{name}", **how)


def resolve_config(args: argparse.Namespace) -> TrainConfig:
    """The settings of the file with the flags in place of them.

    Raises:
        InputError: as `TrainConfig` does.
    """
    config = TrainConfig.from_yaml(args.config) if args.config else TrainConfig()
    given = {name: getattr(args, name) for name in options(TrainConfig)}
    if args.sparsity not in (None, "none"):
        config = config.merge({"sparsity": SparsityConfig.from_yaml(args.sparsity)})
    elif args.sparsity == "none":
        config = config.merge({"sparsity": "none"})
    section = {name: getattr(args, _PREFIX + name) for name in options(SparsityConfig)}
    if args.__dict__[f"{_PREFIX}layer_sparsity"]:
        section["layer_sparsity"] = _layer_values(args.__dict__[f"{_PREFIX}layer_sparsity"])
    if any(value is not None for value in section.values()):
        given["sparsity"] = section
    gate = {name: getattr(args, _GATE + name) for name in options(GateConfig)}
    if any(value is not None for value in gate.values()):
        given["slora"] = gate
    if args.slora == "none":
        given["slora"] = "none"
    config = config.merge(given)
    paths = {name: getattr(config, name) for name in ("model", "dataset", "eval_file")}
    config = config.merge({name: _relative(value) for name, value in paths.items() if value})
    return config


def _layer_values(pairs: Sequence[str]) -> dict[str, float]:
    values = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            values[key] = float(value)
        except ValueError:
            raise InputError(
                f"--sparsity.layer_sparsity takes LAYER=VALUE, such as layer.3=0.5, got {pair!r}"
            ) from None
    return values


def _relative(name: str) -> str:
    """A path that is there, seen from the working folder: records hold no absolute path."""
    if not os.path.isabs(name) or not os.path.exists(name):
        return name
    with contextlib.suppress(ValueError):  # another drive on Windows
        return Path(os.path.relpath(name)).as_posix()
    return name
