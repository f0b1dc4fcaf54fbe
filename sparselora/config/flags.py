"""The settings of a training run as flags of a command: flags win over the YAML file."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparselora.config.fields import Option, options
from sparselora.config.sparsity import SparsityConfig
from sparselora.config.train import NESTED, TrainConfig, read_sparsity
from sparselora.errors import InputError, shown
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names

_LAYER_FLAG = "--sparsity.layer_sparsity"
_LONGEST_CHOICES = 20
"""Letters of the choices that stand next to a flag; longer ones stand in its help."""

_SECTION_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparsity": (
        "sparsity (which channels a training step computes)",
        {"metavar": "FILE|none", "help": "YAML of sparsity settings (default: none)"},
    ),
    "novelty": (
        "novelty gate (which backward passes run)",
        {"choices": ("none",), "help": "none: every backward pass runs (default: none)"},
    ),
    "token_gate": (
        "token gates (which rank channels are active for a token)",
        {"choices": ("none",), "help": "none: every rank channel is active for every token (default: none)"},
    ),
}  # fmt: skip
"""Section → the title of its group in the help, and the flag of the whole section."""


GROUPS: dict[str, tuple[str, ...]] = {
    "model and data": (
        "model", "task", "dataset", "eval_file", "text_fields", "label_field", "prompt_field", "completion_field",
        "template", "chat_template", "train_samples", "eval_samples", "dedupe", "max_length", "packing",
        "group_by_length", "shuffle_batches", "streaming", "train_split",
    ),
    "adapter": (
        "lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "target_modules",
        "exclude_modules", "layers_to_transform", "adapter_on_context", "squeeze", "squeeze_ratio", "squeeze_budget",
        "squeeze_multiple", "squeeze_warmup_ratio",
    ),
    "training": (
        "epochs", "max_steps", "train_bsz", "eval_bsz", "grad_accum", "lr", "warmup_ratio", "weight_decay", "scheduler",
        "scheduler_kwargs", "optim", "optim_args", "loraplus_lr_ratio", "max_grad_norm", "neftune_noise_alpha",
    ),
    "machine": (
        "device", "dtype", "load_in_4bit", "load_in_8bit", "gradient_checkpointing", "use_flash_attention_2", "tf32",
        "dataloader_num_workers", "seed",
    ),
    "log and checkpoints": (
        "save_steps", "eval_steps", "logging_steps", "report_to", "generations", "push_to_hub", "hub_model_id",
    ),
}  # fmt: skip
"""Settings of `TrainConfig` by group of the help."""

COMMON_DATA = (
    "config", "model", "task", "dataset", "eval_file", "prompt_field", "completion_field", "train_samples",
    "max_length", "train_bsz", "device", "dtype", "out_dir", "dry_run", "overwrite",
)  # fmt: skip
"""Settings that a command's short help shows wherever a model meets data."""
COMMON_TRAINING = (
    *COMMON_DATA, "text_fields", "label_field", "eval_samples", "lora_r", "lora_alpha", "target_modules", "epochs",
    "max_steps", "grad_accum", "lr", "warmup_ratio", "load_in_4bit", "seed", "eval_steps", "save_steps", "sparsity",
    "sparsity.mode", "sparsity.ffn_sparsity", "resume",
)  # fmt: skip
"""Settings that the short help of training shows."""


def add_config_flags(
    parser: argparse.ArgumentParser, *, without: Collection[str] = (), sections: Collection[str] = tuple(NESTED)
) -> None:
    """Add a positional YAML file, a flag for each field of `TrainConfig`, and ``--SECTION.NAME`` for those of its
    sections.

    Args:
        without: fields that the command has no flag for.
        sections: the sections of `NESTED` that it has flags for.
    """
    parser.add_argument("config", nargs="?", type=Path, help="YAML of settings (see configs/); flags win over it")
    settings = options(TrainConfig)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name not in without:
                _add_flag(group, name, settings[name])
    for section in sections:
        title, whole = _SECTION_FLAGS[section]
        group = parser.add_argument_group(title)
        group.add_argument(f"--{section}", **whole)
        for name, option in options(NESTED[section]).items():
            _add_flag(group, f"{section}.{name}", option)
        if section == "sparsity":
            group.add_argument(_LAYER_FLAG, nargs="+", metavar="LAYER=VALUE", help="such as layer.0=0 layer.3-30=0.99")
    accept_former_names(parser, _former_flags())


def _former_flags() -> dict[str, str]:
    """Return the former name of every flag of the novelty gate's section."""
    names = {f"slora.{name}": f"novelty.{name}" for name in options(NESTED["novelty"])}
    former = {f"slora.{name}": f"novelty.{present}" for name, present in FORMER_NAMES["novelty"].items()}
    return {**FORMER_NAMES["train"], **names, **former}


def add_setting_flags(group: argparse._ArgumentGroup, names: Iterable[str]) -> None:
    """Add flags for settings of `TrainConfig` to a command that reads no YAML: each has the setting's default."""
    settings = options(TrainConfig)
    for name in names:
        _add_flag(group, name, settings[name], settings[name].default)


def _help(setting: Option) -> str:
    """Return the help of a setting, its default at the end: the flag itself has none, so that a file's value counts."""
    default = setting.default
    if default is None:
        return setting.help
    if isinstance(default, bool):
        text = "on" if default else "off"
    else:
        text = f"{default:g}" if setting.kind is float else str(default)
    return f"{setting.help} (default: {text})"


def _add_flag(group: argparse._ArgumentGroup, name: str, setting: Option, default: Any = None) -> None:
    keywords: dict[str, Any] = {"help": _help(setting) if default is None else setting.help, "default": default}
    if setting.kind is bool:
        keywords["action"] = Switch
    elif setting.kind is tuple:
        keywords |= {"nargs": "+", "metavar": "NAME"}
    elif setting.choices:
        keywords["choices"] = setting.choices
        if sum(map(len, setting.choices)) > _LONGEST_CHOICES:
            text = f"{setting.help}: {', '.join(setting.choices)}"
            keywords |= {"metavar": "NAME", "help": text if default else f"{text} (default: {setting.default})"}
    else:
        keywords |= {"type": setting.kind, "metavar": {int: "N", float: "X", str: "TEXT"}[setting.kind]}
    group.add_argument(f"--{name}", **keywords)


class Switch(argparse.BooleanOptionalAction):
    """``--NAME`` and ``--no-NAME``, by a former name too."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        setattr(namespace, self.dest, not str(option_string).startswith("--no-"))


def resolve_config(args: argparse.Namespace) -> TrainConfig:
    """Return the settings of the file with the flags in place of them.

    Raises:
        InputError: as `TrainConfig` does.
    """
    config = TrainConfig.from_yaml(args.config) if args.config else TrainConfig()
    # All at once: what a flag switches off does not contradict what another switches on.
    flags = {name: getattr(args, name) for name in options(TrainConfig) if hasattr(args, name)}
    config = config.merge(flags | {name: _section(args, name) for name in NESTED if hasattr(args, name)})
    paths = {name: getattr(config, name) for name in ("model", "dataset", "eval_file")}
    config = config.merge({name: _relative(value) for name, value in paths.items() if value})
    return config


def _section(args: argparse.Namespace, name: str) -> SparsityConfig | Mapping[str, Any] | str | None:
    """Return the values that the flags give a section, as `TrainConfig.merge` takes them; None without any.

    ``none`` wins over the other flags of its section, except for ``--sparsity``, from which they start.
    """
    whole = getattr(args, name)
    flags = {key: getattr(args, f"{name}.{key}") for key in options(NESTED[name])}
    flags = {key: value for key, value in flags.items() if value is not None}
    if name == "sparsity" and (layers := getattr(args, _LAYER_FLAG.lstrip("-"))):
        flags["layer_sparsity"] = _layer_values(layers)
    if name != "sparsity" or whole is None or (whole == "none" and not flags):
        return whole or flags or None
    start = SparsityConfig() if whole == "none" else read_sparsity(whole)
    return start.replace(**flags)


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
    """Return a path that exists as seen from the working folder: records hold no absolute path."""
    if not os.path.isabs(name) or not os.path.exists(name):
        return name
    with contextlib.suppress(ValueError):  # another drive on Windows
        return Path(os.path.relpath(name)).as_posix()
    return name
