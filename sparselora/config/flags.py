"""The settings of a training run as flags of a command: flags win over the YAML file."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparselora.config.fields import Option, options
from sparselora.config.sparsity import SparsityConfig
from sparselora.config.train import NESTED, TrainConfig, read_sparsity
from sparselora.errors import InputError, shown
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names

_LAYER_FLAG = "--sparsity.layer_sparsity"

_SECTION_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparsity": (
        "sparsity settings", {"metavar": "FILE|none", "help": "the whole section, or none for plain PEFT"}
    ),
    "novelty": ("settings of the novelty gate", {"choices": ("none",), "help": "none: every backward pass runs"}),
    "token_gate": (
        "settings of the per-token gates of rank channels",
        {"choices": ("none",), "help": "none: every rank channel is active for every token"},
    ),
}  # fmt: skip
"""Of each section: the title of its group in the help, and its own flag."""


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """A positional YAML file, a flag for each field of `TrainConfig`, and ``--SECTION.NAME`` for those of its
    sections."""
    parser.add_argument("config", nargs="?", type=Path, help="YAML file of settings (see configs/)")
    settings = parser.add_argument_group("settings (flags win over the file)")
    for name, each in options(TrainConfig).items():
        _add_flag(settings, name, each)
    for section, (title, whole) in _SECTION_FLAGS.items():
        group = parser.add_argument_group(f"{title} (likewise)")
        group.add_argument(f"--{section}", **whole)
        for name, each in options(NESTED[section]).items():
            _add_flag(group, f"{section}.{name}", each)
        if section == "sparsity":
            group.add_argument(_LAYER_FLAG, nargs="+", metavar="LAYER=VALUE", help="such as layer.0=0 layer.3-30=0.99")
    accept_former_names(parser, _former_flags())


def _former_flags() -> dict[str, str]:
    """Return the former name of every flag of the novelty gate's section."""
    names = {f"slora.{name}": f"novelty.{name}" for name in options(NESTED["novelty"])}
    former = {f"slora.{name}": f"novelty.{present}" for name, present in FORMER_NAMES["novelty"].items()}
    return {**FORMER_NAMES["train"], **names, **former}


def _add_flag(group: argparse._ArgumentGroup, name: str, each: Option) -> None:
    how: dict[str, Any] = {"help": each.help, "default": None}
    if each.kind is bool:
        how["action"] = Switch
    elif each.kind is tuple:
        how |= {"nargs": "+", "metavar": "NAME"}
    elif each.choices:
        how["choices"] = each.choices
    else:
        how |= {"type": each.kind, "metavar": each.kind.__name__.upper()}
    group.add_argument(f"--{name}", **how)


class Switch(argparse.BooleanOptionalAction):
    """``--NAME`` and ``--no-NAME``, by a former name too."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        setattr(namespace, self.dest, not str(option_string).startswith("--no-"))


def resolve_config(args: argparse.Namespace) -> TrainConfig:
    """The settings of the file with the flags in place of them.

    Raises:
        InputError: as `TrainConfig` does.
    """
    config = TrainConfig.from_yaml(args.config) if args.config else TrainConfig()
    # All at once: what a flag switches off does not contradict what another switches on.
    given = {name: getattr(args, name) for name in options(TrainConfig)}
    config = config.merge(given | {name: _section(args, name) for name in NESTED})
    paths = {name: getattr(config, name) for name in ("model", "dataset", "eval_file")}
    config = config.merge({name: _relative(value) for name, value in paths.items() if value})
    return config


def _section(args: argparse.Namespace, name: str) -> SparsityConfig | Mapping[str, Any] | str | None:
    """What the flags say of a section, as `TrainConfig.merge` takes it; None where they say nothing.

    ``none`` wins over the other flags of its section, but for ``--sparsity``, from which they start.
    """
    whole = getattr(args, name)
    given = {each: getattr(args, f"{name}.{each}") for each in options(NESTED[name])}
    given = {each: value for each, value in given.items() if value is not None}
    if name == "sparsity" and (layers := getattr(args, _LAYER_FLAG.lstrip("-"))):
        given["layer_sparsity"] = _layer_values(layers)
    if name != "sparsity" or whole is None or (whole == "none" and not given):
        return whole or given or None
    start = SparsityConfig() if whole == "none" else read_sparsity(whole)
    return SparsityConfig.from_dict(start.to_dict() | given)


def _layer_values(pairs: Sequence[str]) -> dict[str, float]:
    values = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            values[key] = float(value)
        except ValueError:
            raise InputError(f"{_LAYER_FLAG} takes LAYER=VALUE, such as layer.3=0.5, got {shown(pair)}") from None
    return values


def _relative(name: str) -> str:
    """A path that is there, seen from the working folder: records hold no absolute path."""
    if not os.path.isabs(name) or not os.path.exists(name):
        return name
    with contextlib.suppress(ValueError):  # another drive on Windows
        return Path(os.path.relpath(name)).as_posix()
    return name
