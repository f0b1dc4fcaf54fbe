"""Settings of a bench from its flags and a configuration: model, shape, sparsity, adapter and batch."""

from __future__ import annotations

import argparse
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
class Setup:
    """Model, shape, sparsity, adapter and batch of one bench."""

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
        tokens = f"{self.work.batch} × {self.work.seq} tokens"
        return f"{self.label}, {tokens}" + (f", {self.work.labelled} labelled" if self.shape.decoder else "")

    @property
    def sparse(self) -> SparsityConfig:
        if self.config is None:
            raise InputError("--flops and --estimators need --sparsity, a YAML file such as configs/llama_sparse.yaml")
        return self.config

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Raise where a row would be longer than the model has position embeddings for."""
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


def resolve(args: argparse.Namespace) -> Setup:
    train, config = TrainConfig(), None
    if args.sparsity is not None:
        values = read_yaml(args.sparsity)
        config = read_sparsity(args.sparsity)
        train = TrainConfig.from_yaml(args.sparsity) if "sparsity" in values else train
    if args.mode is not None:
        config = (config or SparsityConfig()).replace(mode=args.mode)
    train = train.merge({name: getattr(args, name) for name in ("lora_r", "lora_alpha", "target_modules")})
    model = args.model if args.model is not None else None if args.shape else train.model
    if model is None and args.shape is None:
        raise InputError(f"no model given; use --model FOLDER or --shape ({', '.join(SHAPES)})")
    model_config = SHAPES[args.shape] if model is None else read_model_config(model)
    shape = Shape.from_config(model_config)
    if config is not None:
        config.check(shape.layers)
    return Setup(
        source=model_config if model is None else model,
        label=args.shape if model is None else model_label(model),
        model_config=model_config,
        shape=shape,
        config=config,
        train=train,
        work=_workload(args, shape),
        lora=Lora(train.lora_r, _short_targets(model_config, train.target_modules)),
    )


_MOST_TOKENS = 2**31 - 1
"""What an index of 32 bits can number; a batch of as many does not fit any device."""


def check_tokens(batch: int, seq: int) -> None:
    """Raise InputError for a batch of more tokens than can be numbered."""
    if batch * seq > _MOST_TOKENS:
        raise InputError(
            f"a batch of {shown(batch)} rows of {shown(seq)} tokens is too large; --train_bsz times --seq must be at "
            f"most {_MOST_TOKENS:,}"
        )


def _workload(args: argparse.Namespace, shape: Shape) -> Workload:
    if args.labelled is not None and not shape.decoder:
        raise InputError(
            f"--labelled is for decoders; {shape.model_type} is an encoder, all of whose tokens are sparse"
        )
    check_tokens(args.train_bsz, args.seq)
    labelled = args.seq // 4 if args.labelled is None else args.labelled
    return Workload(args.train_bsz, args.seq, labelled if shape.decoder else 0)


def _short_targets(model_config: Mapping[str, Any], modules: Sequence[str] | None) -> tuple[str, ...]:
    """The short names of what target modules compute; without modules, the attention projections.

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
