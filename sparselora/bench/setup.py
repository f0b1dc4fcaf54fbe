"""Model, shape, sparsity, adapter and batch of a bench, resolved from what was asked for and a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparselora.config.sparsity import SparsityConfig
from sparselora.config.train import TrainConfig, read_sparsity
from sparselora.config.yaml_text import read_yaml
from sparselora.contextual.flops import ENCODERS, Lora, Shape, Workload
from sparselora.errors import InputError, shown
from sparselora.models.architectures import SHAPES, architecture
from sparselora.models.model_files import model_label, read_model_config


@dataclass(frozen=True)
class SetupRequest:
    """Settings of a bench as a user states them; None: the configuration's, or its default.

    Attributes:
        model: local folder, hub name or ``minilm``; None with a ``shape``.
        shape: key of `sparselora.models.architectures.SHAPES`, for random weights.
        sparsity: YAML of sparsity settings, or of a training configuration with them.
        mode: sparsity mode in place of the configuration's.
        train_bsz, seq: rows of a batch, tokens of a row.
        labelled: labelled tokens of a row of a decoder; None: a quarter.
    """

    model: str | None
    shape: str | None
    sparsity: str | None
    mode: str | None
    lora_r: int | None
    lora_alpha: float | None
    target_modules: tuple[str, ...] | None
    train_bsz: int
    seq: int
    labelled: int | None

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> SetupRequest:
        """Freeze parsed arguments, of which there may be more than a setup has settings."""
        values = {field.name: arguments[field.name] for field in dataclasses.fields(cls)}
        targets = values["target_modules"]
        return cls(**values | {"target_modules": None if targets is None else tuple(targets)})


@dataclass(frozen=True)
class Setup:
    """Model, shape, sparsity, adapter and batch of one bench.

    Attributes:
        source: name or folder of a model, or a configuration for random weights.
        label: the model's short name.
        config: sparsity settings; None without any.
        train: training settings: adapter, data, fields.
    """

    source: str | Mapping[str, Any]
    label: str
    model_config: Mapping[str, Any]
    shape: Shape
    config: SparsityConfig | None
    train: TrainConfig
    work: Workload
    lora: Lora

    @property
    def title(self) -> str:
        """The model and the size of the batch, for figures and reports."""
        tokens = f"{self.work.batch} × {self.work.seq} tokens"
        return f"{self.label}, {tokens}" + (f", {self.work.labelled} labelled" if self.shape.decoder else "")

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Raise InputError where a row would be longer than the model has position embeddings for."""
        most = self.model_config.get("max_position_embeddings") or self.model_config.get("n_positions")
        if most is None or self.shape.model_type not in _ABSOLUTE:
            return
        most -= 2 if "roberta" in self.shape.model_type else 0  # it counts from behind the padding
        for length in lengths:
            if length > most:
                raise InputError(
                    f"a row of {length} tokens is longer than the {most} that {self.label} has positions for"
                )


_ABSOLUTE = (*ENCODERS, "gpt2", "opt")


def resolve(request: SetupRequest) -> Setup:
    """Read the configurations of the model and of the sparsity, and check that they fit each other.

    Raises:
        InputError: no model, an unreadable or wrong configuration, layers or modules that the model does not have, a
            batch that is too large.
    """
    train, config = TrainConfig(), None
    if request.sparsity is not None:
        values = read_yaml(request.sparsity)
        config = read_sparsity(request.sparsity)
        train = TrainConfig.from_yaml(request.sparsity) if "sparsity" in values else train
    if request.mode is not None:
        config = (config or SparsityConfig()).replace(mode=request.mode)
    targets = None if request.target_modules is None else list(request.target_modules)
    train = train.merge({"lora_r": request.lora_r, "lora_alpha": request.lora_alpha, "target_modules": targets})
    model = request.model if request.model is not None else None if request.shape else train.model
    if model is None and request.shape is None:
        raise InputError(f"no model given; use --model FOLDER or --shape ({', '.join(SHAPES)})")
    model_config = read_model_config(model) if model is not None else SHAPES[str(request.shape)]
    shape = Shape.from_config(model_config)
    if config is not None:
        config.check(shape.layers)
    return Setup(
        source=model_config if model is None else model,
        label=str(request.shape) if model is None else model_label(model),
        model_config=model_config,
        shape=shape,
        config=config,
        train=train,
        work=_workload(request, shape),
        lora=Lora(train.lora_r, _short_targets(model_config, train.target_modules)),
    )


_MOST_TOKENS = 2**31 - 1
"""Limit of an index of 32 bits; a batch of as many tokens does not fit any device."""


def check_tokens(batch: int, seq: int) -> None:
    """Raise InputError for a batch of more tokens than can be numbered."""
    if batch * seq > _MOST_TOKENS:
        raise InputError(
            f"a batch of {shown(batch)} rows of {shown(seq)} tokens is too large; --train_bsz times --seq must be at "
            f"most {_MOST_TOKENS:,}"
        )


def _workload(request: SetupRequest, shape: Shape) -> Workload:
    if request.labelled is not None and not shape.decoder:
        raise InputError(
            f"--labelled is for decoders; {shape.model_type} is an encoder, all of whose tokens are sparse"
        )
    check_tokens(request.train_bsz, request.seq)
    labelled = request.seq // 4 if request.labelled is None else request.labelled
    return Workload(request.train_bsz, request.seq, labelled if shape.decoder else 0)


def _short_targets(model_config: Mapping[str, Any], modules: Sequence[str] | None) -> tuple[str, ...]:
    """Return the short names of what target modules compute; without modules, the attention projections.

    Raises:
        InputError: a module that the model does not have.
    """
    model = architecture(model_config)
    if modules is None:
        return ("q", "k", "v", "o")
    targets: list[str] = []
    for module in modules:
        parts = [m.parts for m in model.matrices if m.name == module or m.name.endswith("." + module)]
        if not parts:
            names = ", ".join(matrix.name for matrix in model.matrices)
            raise InputError(f"target module {module!r} is none of {model.model_type}'s: {names}")
        targets += [part for matrix_parts in parts for part in matrix_parts if part not in targets]
    return tuple(targets)
