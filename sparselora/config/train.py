"""Settings of a training run and of its sparsity: dataclasses, with strict YAML in and out.

Each field carries the rule its value must keep and a line of help (`Option`), so that a command builds its flags from
them. An unknown key, a key given twice, a value of another type or outside its range is an `InputError` of one line.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from sparselora.config.fields import (
    LARGEST_SEED,
    Option,
    build,
    check_fields,
    in_file,
    option,
    read_yaml,
    to_yaml_text,
)
from sparselora.config.novelty import GateConfig
from sparselora.config.token_gates import TokenGateConfig
from sparselora.errors import InputError, shown, suggest

Part = Literal["ffn", "attention"]

MODES = {
    "dense": "every channel, with the exact savings",
    "svd": "the channels that a low-rank estimate of the activations ranks first, chosen every step (the published "
    "method; on a pretrained 0.5B model worse than static)",
    "oracle": "the channels with the largest true activations (costs more than dense: a reference)",
    "random": "channels drawn anew every step (a control)",
    "static": "channels calibrated once on training data (the first to try)",
    "surrogate": "a calibrated affine map of low rank in place of the layer (not recommended: on a pretrained 0.5B "
    "model worse than no FFN at all)",
    "skip": "no FFN at all (a control)",
}
COMPENSATIONS = ("none", "mean")
TASKS = ("classification", "causal_lm")
DTYPES = ("auto", "fp32", "bf16")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
REPORTS = ("none", "wandb", "tensorboard")


# --- sparsity -----------------------------------------------------------------------------------------------------

_LAYER_KEY = re.compile(r"layer\.(\d+)(?:-(\d+))?(?:\.(ffn|attention))?")
_SPARSITY = Option(float, "", low=0, high=1, below=True)


@dataclass(frozen=True)
class _LayerRange:
    """What a key of ``layer_sparsity`` names: layers ``first`` to ``last``, both included, and one part of each."""

    key: str
    first: int
    last: int
    part: str

    @property
    def single(self) -> bool:
        return "-" not in self.key


def _parse_layer_key(key: Any) -> _LayerRange:
    match = _LAYER_KEY.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise InputError(
            f"layer_sparsity has the key {shown(key)}; write layer.3, layer.3-30, layer.3.attention or layer.3-30.ffn"
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise InputError(f"layer_sparsity key {shown(key)} ends before it begins; write layer.{last}-{first}")
    return _LayerRange(key, first, last, match[3] or "ffn")


def _check_sparsity(name: str, value: Any) -> float:
    if value == 1 and not isinstance(value, bool):
        raise InputError(f"{name} must be {_SPARSITY.accepts()}, got {shown(value)}; to compute no FFN use mode: skip")
    return float(_SPARSITY.check(name, value))


@dataclass(frozen=True)
class SparsityConfig:
    """Which channels a training step computes, in which layers, and when.

    Sparsity is the fraction of channels dropped, in [0, 1). ``ffn_sparsity`` and ``attention_sparsity`` hold for the
    layers that ``layer_sparsity`` does not name. Its keys are ``layer.3`` or ``layer.3-30`` (both ends included),
    followed by ``.attention`` or ``.ffn`` (without: the FFN); a single layer wins over a range, two ranges that overlap
    are an error. With modes ``skip`` and ``surrogate`` an FFN is replaced where its sparsity is above 0; with
    ``dense`` every sparsity reads as 0.

    Raises:
        InputError: a value of another type or outside its range, settings that contradict one another.
    """

    mode: str = option("svd", str, "how channels are chosen", choices=tuple(MODES))
    svd_rank: int = option(8, int, "rank of the estimator of mode svd", low=1)
    estimator_tokens: int = option(
        512, int, "channels are chosen by at most this many context tokens, evenly spaced; 0: by all", low=0
    )
    ffn_sparsity: float = option(0.0, float, "FFN channels dropped where layer_sparsity names none", low=0)
    attention_sparsity: float = option(0.0, float, "attention channels dropped where layer_sparsity names none", low=0)
    layer_sparsity: Mapping[str, float] = field(default_factory=dict)
    sparse_warmup_ratio: float = option(0.0, float, "share of the steps that is dense at first", low=0, high=1)
    sparse_warmup_steps: int | None = option(None, int, "dense steps at first", low=0, optional=True)
    sparse_end_ratio: float = option(1.0, float, "share of the steps after which it is dense again", low=0, high=1)
    sparse_end_step: int | None = option(None, int, "step from which it is dense again", low=0, optional=True)
    compensate: str = option("none", str, "what dropped FFN channels contribute", choices=COMPENSATIONS)
    surrogate_rank: int = option(64, int, "rank of the affine map of mode surrogate", low=1)
    surrogate_channels: int = option(0, int, "calibrated FFN channels kept beside the map", low=0)
    surrogate_refresh_steps: int = option(0, int, "steps between two fits of the map; 0: fitted once", low=0)
    calibration_samples: int = option(256, int, "training samples that calibrate", low=1)
    dense_output_tokens: bool = option(True, bool, "tokens whose next token is labelled compute every channel")
    sparse_eval: bool = option(False, bool, "evaluate sparse too")
    seed: int = option(0, int, "seed of mode random and of the calibration samples", low=0, high=LARGEST_SEED)

    def __post_init__(self) -> None:
        for name in ("ffn_sparsity", "attention_sparsity"):
            _check_sparsity(name, getattr(self, name))
        check_fields(self)
        if not isinstance(self.layer_sparsity, Mapping):
            raise InputError(f"layer_sparsity must be a mapping of layers to numbers, got {shown(self.layer_sparsity)}")
        ranges = [_parse_layer_key(key) for key in self.layer_sparsity]
        values = {k: _check_sparsity(f"layer_sparsity of {k}", v) for k, v in self.layer_sparsity.items()}
        object.__setattr__(self, "layer_sparsity", values)
        object.__setattr__(self, "_ranges", tuple(sorted(ranges, key=lambda each: not each.single)))
        self._check_overlap(ranges)
        self._check_schedule()
        if self.mode == "skip" and (self.attention_sparsity > 0 or self._largest("attention") > 0):
            raise InputError("mode skip leaves out FFNs only; set attention_sparsity and every .attention layer to 0")

    def _check_overlap(self, ranges: list[_LayerRange]) -> None:
        for i, one in enumerate(ranges):
            for two in ranges[:i]:
                overlap = one.first <= two.last and two.first <= one.last
                if overlap and one.part == two.part and one.single == two.single:
                    raise InputError(
                        f"layer_sparsity keys {two.key!r} and {one.key!r} both name the {one.part} of layer "
                        f"{max(one.first, two.first)}; give each layer once (a single layer wins over a range)"
                    )

    def _check_schedule(self) -> None:
        if self.sparse_warmup_steps is not None and self.sparse_warmup_ratio > 0:
            raise InputError("sparse_warmup_ratio and sparse_warmup_steps are both given; give one")
        if self.sparse_end_step is not None and self.sparse_end_ratio < 1:
            raise InputError("sparse_end_ratio and sparse_end_step are both given; give one")
        for first, last in (("sparse_warmup_ratio", "sparse_end_ratio"), ("sparse_warmup_steps", "sparse_end_step")):
            begin, end = getattr(self, first), getattr(self, last)
            if begin is not None and end is not None and begin >= end and (begin, end) != (1.0, 1.0):
                raise InputError(f"{first} {begin:g} is not below {last} {end:g}, so no step would be sparse")

    def _largest(self, part: str) -> float:
        return max((self.layer_sparsity[r.key] for r in self._layer_ranges() if r.part == part), default=0.0)

    def _layer_ranges(self) -> tuple[_LayerRange, ...]:
        return cast("tuple[_LayerRange, ...]", self._ranges)  # type: ignore[attr-defined]

    # --- what it says ---

    def ratio(self, layer: int, part: Part = "ffn") -> float:
        """Sparsity of ``part`` of layer ``layer`` (counted from 0); 0 in mode dense.

        Raises:
            InputError: ``part`` is neither ``ffn`` nor ``attention``.
        """
        if part not in ("ffn", "attention"):
            raise InputError(f"part must be ffn or attention, got {part!r}")
        if self.mode == "dense":
            return 0.0
        for each in self._layer_ranges():  # single layers first
            if each.part == part and each.first <= layer <= each.last:
                return self.layer_sparsity[each.key]
        return self.ffn_sparsity if part == "ffn" else self.attention_sparsity

    def check(self, num_layers: int) -> None:
        """Raise an `InputError` where ``layer_sparsity`` names a layer that a model of ``num_layers`` does not have."""
        for each in self._layer_ranges():
            if each.last >= num_layers:
                raise InputError(
                    f"layer_sparsity key {each.key!r} names layer {each.last}, but the model has {num_layers} layers, "
                    f"0 to {num_layers - 1}"
                )

    @property
    def needs_calibration(self) -> bool:
        """Whether training samples must be seen before the first sparse step."""
        return self.mode in ("static", "surrogate") or (self.compensate == "mean" and self.mode != "dense")

    def first_sparse_step(self, total_steps: int) -> int:
        """The number of dense steps at first: ``sparse_warmup_steps``, or the share of ``total_steps`` rounded up."""
        if self.sparse_warmup_steps is not None:
            return self.sparse_warmup_steps
        return math.ceil(self.sparse_warmup_ratio * total_steps - 1e-9)

    def active(self, step: int, total_steps: int) -> bool:
        """Whether step ``step`` (counted from 0) of ``total_steps`` is sparse."""
        if step < self.first_sparse_step(total_steps):
            return False
        if self.sparse_end_step is not None:
            return step < self.sparse_end_step
        return self.sparse_end_ratio == 1 or step < math.ceil(self.sparse_end_ratio * total_steps - 1e-9)

    # --- in and out ---

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparsityConfig:
        """From a mapping as `to_dict` gives it; what is left out has its default. Strict: see the module."""
        return build(cls, values, "the sparsity settings")

    @classmethod
    def from_yaml(cls, path: str | Path) -> SparsityConfig:
        """From a YAML file: these settings alone, or a training configuration, of which ``sparsity`` is taken.

        A training configuration whose ``sparsity`` is null gives mode dense.
        """
        values = read_yaml(path)
        with in_file(path):
            if "sparsity" not in values:
                return cls.from_dict(values)
            return TrainConfig.from_dict(values).sparsity or cls(mode="dense")

    def to_dict(self) -> dict[str, Any]:
        """Every setting, in plain types."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"layer_sparsity": dict(self.layer_sparsity)}

    def to_yaml(self) -> str:
        """As `from_yaml` reads it."""
        return to_yaml_text(self.to_dict())


def get_layer_sparsity_ratio(config: SparsityConfig, layer: int, part: Part = "ffn") -> float:
    """The sparsity that ``config`` gives to ``part`` (``ffn`` or ``attention``) of layer ``layer``, counted from 0."""
    return config.ratio(layer, part)


# --- a training run -----------------------------------------------------------------------------------------------

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
    "sparsity": SparsityConfig, "slora": GateConfig, "token_gate": TokenGateConfig,
}  # fmt: skip
"""Sections of `TrainConfig` that are settings of their own; None (in a file null, as a flag ``none``) is without."""


def _flattened(values: Any) -> Any:
    """``values`` with `SECTIONS` and `ALIASES` in our own names; a setting given by two names is an error."""
    if not isinstance(values, Mapping):
        return values
    flat: dict[str, Any] = {}

    def put(name: str, value: Any, source: str) -> None:
        if name in flat:
            raise InputError(f"{name} is given twice, once as {source}; give it once")
        flat[name] = value

    for key, value in values.items():
        if key in SECTIONS and isinstance(value, Mapping):
            for inner, each in value.items():
                if inner not in SECTIONS[key]:
                    near, known = suggest(str(inner), SECTIONS[key]), ", ".join(SECTIONS[key])
                    raise InputError(f"unknown key {shown(inner)} in section {key}{near} (known: {known})")
                put(SECTIONS[key][inner], each, f"{key}.{inner}")
        else:
            put(str(ALIASES.get(key, key)), value, key)
    return flat


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run's result.

    ``sparsity`` None is plain PEFT, untouched; ``slora`` None runs every backward pass; ``token_gate`` None has every
    rank channel active for every token. `from_dict` also understands the sections ``model``, ``lora`` and ``data`` and
    the names of the Trainer (`SECTIONS`, `ALIASES`).

    Raises:
        InputError: a value of another type or outside its range, settings that contradict one another.
    """

    model: str | None = option(None, str, "hub name, local folder, or minilm", optional=True)
    task: str = option("classification", str, "what is trained", choices=TASKS)
    # data
    dataset: str | None = option(None, str, "named data set or a file", optional=True)
    eval_file: str | None = option(None, str, "file to evaluate on; without: every fifth row", optional=True)
    text_fields: tuple[str, ...] | None = option(None, tuple, "columns of the text (classification)", optional=True)
    label_field: str = option("label", str, "column of the label (classification)")
    prompt_field: str = option("prompt", str, "field of the prompt (causal_lm)")
    completion_field: str = option("completion", str, "field of the completion (causal_lm)")
    template: str | None = option(None, str, "text around the prompt, with {prompt} in it (causal_lm)", optional=True)
    train_samples: int = option(0, int, "training rows, drawn by seed; 0: all", low=0)
    eval_samples: int = option(0, int, "evaluation rows; 0: all", low=0)
    max_length: int = option(512, int, "tokens after which a text is cut", low=2)
    packing: bool = option(False, bool, "fill each row of a batch with several samples (causal_lm)")
    group_by_length: bool = option(False, bool, "put samples of like length into a batch")
    train_split: str = option("train", str, "split to train on, of a hub data set (causal_lm)")
    # adapter
    lora_r: int = option(16, int, "LoRA rank", low=1)
    lora_alpha: float = option(32, float, "LoRA alpha", low=0, below=True)
    lora_dropout: float = option(0.0, float, "dropout before lora_A", low=0, high=1, below=True)
    use_rslora: bool = option(False, bool, "scale by alpha / sqrt(r)")
    target_modules: tuple[str, ...] | None = option(
        None, tuple, "modules to adapt; without: the attention projections", optional=True
    )
    # optimization
    epochs: float = option(1.0, float, "passes over the training data", low=0, below=True)
    max_steps: int = option(0, int, "optimizer steps; 0: as many as epochs says", low=0)
    train_bsz: int = option(8, int, "samples of a training batch, per device", low=1)
    eval_bsz: int = option(16, int, "samples of an evaluation batch, per device", low=1)
    grad_accum: int = option(1, int, "batches of an optimizer step", low=1)
    lr: float = option(2e-4, float, "peak learning rate", low=0, below=True)
    warmup_ratio: float = option(0.0, float, "share of the steps in which the learning rate rises", low=0, high=1)
    weight_decay: float = option(0.0, float, "AdamW's weight decay", low=0)
    scheduler: str = option("linear", str, "course of the learning rate", choices=SCHEDULERS)
    # machine
    load_in_4bit: bool = option(False, bool, "frozen weights in 4 bits (needs bitsandbytes; causal_lm)")
    use_flash_attention_2: bool = option(False, bool, "attention by the package flash_attn")
    tf32: bool = option(False, bool, "fp32 products in TF32 on an NVIDIA GPU")
    dataloader_num_workers: int = option(0, int, "processes that make batches", low=0)
    gradient_checkpointing: bool = option(False, bool, "recompute activations in the backward pass")
    dtype: str = option("auto", str, "of the frozen weights and the computation", choices=DTYPES)
    device: str = option("auto", str, "auto, cpu, cuda or cuda:n")
    seed: int = option(0, int, "seed of everything random", low=0, high=LARGEST_SEED)
    # what is written
    save_steps: int = option(0, int, "optimizer steps between checkpoints; 0: none", low=0)
    eval_steps: int = option(0, int, "optimizer steps between evaluations; 0: at the end only", low=0)
    logging_steps: int = option(1, int, "optimizer steps between rows of the log", low=1)
    report_to: str = option("none", str, "tracker beside the CSV files", choices=REPORTS)
    sparsity: SparsityConfig | None = None
    slora: GateConfig | None = None
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
            raise InputError("token_gate and an enabled slora are both given; gate tokens or backward passes, not both")

    @property
    def gated(self) -> bool:
        """Whether backward passes are gated."""
        return self.slora is not None and self.slora.enable

    def merge(self, overrides: Mapping[str, Any]) -> TrainConfig:
        """This configuration with ``overrides`` in place of its values; one that is None was not given.

        A section of `NESTED` may be a mapping of the settings that change in it (it begins at its defaults where this
        configuration has none), an object in place of the whole section, or the word ``none``.

        Raises:
            InputError: as for the constructor, and for an unknown name.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in NESTED:
            section, own = given.get(name), getattr(self, name)
            if section == "none":
                given[name] = None
            elif isinstance(section, Mapping):
                old = own.to_dict() if own else {}
                given[name] = old | {key: value for key, value in section.items() if value is not None}
        return build(TrainConfig, values | given, "the training settings")

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
        """Every setting, in plain types; a section as a mapping or None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        sections = {name: getattr(self, name) for name in NESTED}
        return plain | {name: section.to_dict() if section else None for name, section in sections.items()}

    def to_yaml(self) -> str:
        """As `from_yaml` reads it."""
        return to_yaml_text(self.to_dict())
