"""Settings of a training run: a dataclass, with strict YAML in and out.

Each field carries the rule its value must keep and a line of help (`Option`), so that a command builds its flags from
them. An unknown key, a key given twice, a value of another type or outside its range is an `InputError` of one line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselora.config.fields import (
    LARGEST_SEED,
    build,
    check_fields,
    in_file,
    option,
    read_yaml,
    to_yaml_text,
)
from sparselora.config.novelty import GateConfig
from sparselora.config.sparsity import SparsityConfig
from sparselora.config.token_gates import TokenGateConfig
from sparselora.errors import InputError, shown, suggest
from sparselora.runs.former_names import FORMER_NAMES, with_present_names

TASKS = ("classification", "causal_lm")
DTYPES = ("auto", "fp32", "bf16")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
REPORTS = ("none", "wandb", "tensorboard")


SECTIONS: dict[str, dict[str, str]] = {
    "model": {
        "name": "model", "load_in_4bit": "load_in_4bit", "use_flash_attention_2": "use_flash_attention_2",
        "dtype": "dtype",
    },
    "lora": {
        "r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora",
        "target_modules": "target_modules",
    },
    "data": {
        "dataset_name": "dataset", "train_split": "train_split", "max_seq_length": "max_length",
        "eval_file": "eval_file", "prompt_field": "prompt_field", "completion_field": "completion_field",
        "template": "template", "train_samples": "train_samples", "eval_samples": "eval_samples",
    },
}  # fmt: skip
"""Sections of a configuration file whose keys are settings of `TrainConfig` under another name."""

ALIASES = {
    "per_device_train_batch_size": "train_bsz", "per_device_eval_batch_size": "eval_bsz",
    "gradient_accumulation_steps": "grad_accum", "learning_rate": "lr", "num_train_epochs": "epochs",
    "lr_scheduler_type": "scheduler",
}  # fmt: skip
"""The Trainer's names of settings."""

NESTED: dict[str, type[SparsityConfig | GateConfig | TokenGateConfig]] = {
    "sparsity": SparsityConfig, "novelty": GateConfig, "token_gate": TokenGateConfig,
}  # fmt: skip
"""Sections of `TrainConfig` that are settings of their own; None (in a file null, as a flag ``none``) is without."""


def _flattened(values: Any) -> Any:
    """Return ``values`` with `SECTIONS` and `ALIASES` in our own names; a setting given by two names is an error."""
    if not isinstance(values, Mapping):
        return values
    flat: dict[str, Any] = {}

    def put(name: str, value: Any, source: str) -> None:
        if name in flat:
            raise InputError(f"{name} is given twice, once as {source}; give it once")
        flat[name] = value

    for key, value in with_present_names(values, "train").items():
        if key in SECTIONS and isinstance(value, Mapping):
            for inner, setting in value.items():
                if inner not in SECTIONS[key]:
                    near, names = suggest(str(inner), SECTIONS[key]), ", ".join(SECTIONS[key])
                    raise InputError(f"unknown key {shown(inner)} in section {key}{near} (known: {names})")
                put(SECTIONS[key][inner], setting, f"{key}.{inner}")
        else:
            put(str(ALIASES.get(key, key)), value, key)
    return flat


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run's result.

    ``sparsity`` None is plain PEFT, untouched; ``novelty`` None runs every backward pass; ``token_gate`` None has every
    rank channel active for every token. `from_dict` also understands the sections ``model``, ``lora`` and ``data`` and
    the names of the Trainer (`SECTIONS`, `ALIASES`).

    Raises:
        InputError: a value of another type or outside its range, settings that contradict one another.
    """

    model: str | None = option(None, str, "hub name, local folder, GGUF file, minilm or smollm2", optional=True)
    task: str = option("classification", str, "kind of model and data", choices=TASKS)
    # data
    dataset: str | None = option(None, str, "data set: docstrings, glue/<task>, or a file", optional=True)
    eval_file: str | None = option(None, str, "held-out rows (default: every fifth row)", optional=True)
    text_fields: tuple[str, ...] | None = option(None, tuple, "text columns (classification)", optional=True)
    label_field: str = option("label", str, "label column")
    prompt_field: str = option("prompt", str, "prompt column")
    completion_field: str = option("completion", str, "completion column")
    template: str | None = option(None, str, "text around a prompt, with {prompt} in it", optional=True)
    train_samples: int = option(0, int, "training rows, drawn by seed; 0: all", low=0)
    eval_samples: int = option(0, int, "held-out rows to evaluate; 0: all", low=0)
    max_length: int = option(512, int, "tokens after which a text is cut", low=2)
    packing: bool = option(False, bool, "fill each row of a batch with several samples")
    group_by_length: bool = option(False, bool, "batch samples of similar length")
    train_split: str = option("train", str, "training split of a hub data set")
    # adapter
    lora_r: int = option(16, int, "LoRA rank", low=1)
    lora_alpha: float = option(32, float, "LoRA alpha", low=0, below=True)
    lora_dropout: float = option(0.0, float, "dropout before lora_A", low=0, high=1, below=True)
    use_rslora: bool = option(False, bool, "scale the update by alpha / sqrt(r)")
    target_modules: tuple[str, ...] | None = option(
        None, tuple, "modules to adapt (default: attention projections)", optional=True
    )
    # optimization
    epochs: float = option(1.0, float, "passes over the training data", low=0, below=True)
    max_steps: int = option(0, int, "optimizer steps; 0: set by epochs", low=0)
    train_bsz: int = option(8, int, "samples in a batch, per device", low=1)
    eval_bsz: int = option(16, int, "samples in an evaluation batch, per device", low=1)
    grad_accum: int = option(1, int, "batches in an optimizer step", low=1)
    lr: float = option(2e-4, float, "peak learning rate", low=0, below=True)
    warmup_ratio: float = option(0.0, float, "share of steps in which lr rises", low=0, high=1)
    weight_decay: float = option(0.0, float, "AdamW's weight decay", low=0)
    scheduler: str = option("linear", str, "schedule of the learning rate", choices=SCHEDULERS)
    # machine
    load_in_4bit: bool = option(False, bool, "4-bit frozen weights, causal_lm")
    use_flash_attention_2: bool = option(False, bool, "compute attention with flash_attn")
    tf32: bool = option(False, bool, "fp32 products in TF32 on an NVIDIA GPU")
    dataloader_num_workers: int = option(0, int, "processes that prepare batches", low=0)
    gradient_checkpointing: bool = option(False, bool, "recompute activations to save memory")
    dtype: str = option("auto", str, "of frozen weights and computation", choices=DTYPES)
    device: str = option("auto", str, "auto, cpu, cuda or cuda:n")
    seed: int = option(0, int, "seed of everything random", low=0, high=LARGEST_SEED)
    # what is written
    save_steps: int = option(0, int, "steps between checkpoints; 0: none", low=0)
    eval_steps: int = option(0, int, "steps between evaluations; 0: at end", low=0)
    logging_steps: int = option(1, int, "steps between rows of the log", low=1)
    report_to: str = option("none", str, "tracker in addition to the CSV files", choices=REPORTS)
    sparsity: SparsityConfig | None = None
    novelty: GateConfig | None = None
    token_gate: TokenGateConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name, kind in NESTED.items():
            section = getattr(self, name)
            if isinstance(section, Mapping):
                object.__setattr__(self, name, kind.from_dict(section))
            elif not isinstance(section, kind | None):
                raise InputError(f"{name} must be a mapping of settings or null, got {shown(section)}")
        self._check_token_gate()
        if self.load_in_4bit and self.task != "causal_lm":
            raise InputError("load_in_4bit is for task causal_lm; a classifier's new head is not quantised")
        if self.packing and self.task != "causal_lm":
            raise InputError(f"packing is for task causal_lm, got task {self.task}")
        if self.packing and self.group_by_length:
            raise InputError("packing and group_by_length are both given; a packed row has no padding to save")
        if self.template is not None and "{prompt}" not in self.template:
            raise InputError(f"template must have {{prompt}} in it, got {shown(self.template)}")

    def _check_token_gate(self) -> None:
        if self.token_gate is None:
            return
        if self.sparsity is not None:
            raise InputError(
                "token_gate and sparsity are both given; a sparse pass leaves out the modules that are gated: give one"
            )
        if self.gated:
            raise InputError(
                "token_gate and an enabled novelty gate are both given; gate tokens or backward passes, not both"
            )

    @property
    def gated(self) -> bool:
        """Return whether backward passes are gated."""
        return self.novelty is not None and self.novelty.enable

    @property
    def seeded_sparsity(self) -> SparsityConfig | None:
        """Return the sparsity settings with the run's seed, where they set none of their own."""
        if self.sparsity is None or self.sparsity.seed is not None:
            return self.sparsity
        return dataclasses.replace(self.sparsity, seed=self.seed)

    def merge(self, overrides: Mapping[str, Any]) -> TrainConfig:
        """Return this configuration with ``overrides`` in place of its values; one that is None was not given.

        A section of `NESTED` may be a mapping of the settings that change in it (it begins at its defaults where this
        configuration has none), an object in place of the whole section, or the word ``none``.

        Raises:
            InputError: as for the constructor, and for an unknown name.
        """
        changes = with_present_names({k: v for k, v in overrides.items() if v is not None}, "train")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in NESTED:
            section, present = changes.get(name), getattr(self, name)
            if section == "none":
                changes[name] = None
            elif isinstance(section, Mapping):
                settings = present.to_dict() if present else {}
                section = with_present_names(section, name) if name in FORMER_NAMES else section
                changes[name] = settings | {key: value for key, value in section.items() if value is not None}
        return build(TrainConfig, values | changes, "the training settings")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From a mapping as `to_dict` gives it; what is left out has its default. Strict: see the module."""
        return build(cls, _flattened(values), "the training settings")

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        values = read_yaml(path)
        with in_file(path):
            return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting, in plain types; a section as a mapping or None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        sections = {name: getattr(self, name) for name in NESTED} | {"sparsity": self.seeded_sparsity}
        return plain | {name: section.to_dict() if section else None for name, section in sections.items()}

    def to_yaml(self) -> str:
        """As `from_yaml` reads it."""
        return to_yaml_text(self.to_dict())


def read_sparsity(path: str | Path) -> SparsityConfig:
    """Return the sparsity settings of a YAML file: alone in it, or the section of a training configuration.

    Raises:
        InputError: the file is missing, or any of its settings is unknown or outside its range.
    """
    if "sparsity" in read_yaml(path):
        TrainConfig.from_yaml(path)
    return SparsityConfig.from_yaml(path)
