"""One cell of Phase C as frozen settings: what is trained, how its rank channels are chosen, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sparselora.config.token_gates import TokenGateConfig
from sparselora.config.train import Task
from sparselora.errors import InputError


@dataclass(frozen=True)
class Cell:
    """Settings of one cell, by the names of the script's flags.

    The control ``no_prune`` keeps everything, whatever was asked for: it is one cell for all keep ratios.

    Attributes:
        task: ``classification``, or ``causal_lm`` for prompts with completions.
        method: one of `sparselora.numerics.channels.PRUNE_METHODS` or ``GATE_METHODS``.
        keep_ratio: fraction of the rank channels that stay, or that a token uses.
        scope: spend the budget per ``module``, or over the whole model (``global``).
        mask: mask channels in place of removing them.
        train_bsz, eval_bsz: batch sizes per process.
        lr: peak learning rate; it falls linearly to 0 over both phases.
        gate: token gates, which take the place of pruning; None for a method without them.
    """

    task: Task
    model: str
    dataset: str
    text_fields: tuple[str, ...] | None
    label_field: str
    prompt_field: str
    completion_field: str
    template: str | None
    eval_file: str | None
    train_samples: int
    eval_samples: int
    max_length: int
    target_modules: tuple[str, ...] | None
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    method: str
    keep_ratio: float
    scope: str
    mask: bool
    warmup_epochs: float
    post_epochs: float
    train_bsz: int
    eval_bsz: int
    lr: float
    device: str
    dtype: str
    seed: int
    gate: TokenGateConfig | None = None

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], gate: TokenGateConfig | None) -> Cell:
        """Freeze parsed arguments, of which there may be more than a cell has settings."""
        values = {field.name: arguments[field.name] for field in fields(cls) if field.name != "gate"}
        for name in ("text_fields", "target_modules"):
            values[name] = None if values[name] is None else tuple(values[name])
        if arguments["method"] == "no_prune":
            values |= {"keep_ratio": 1.0, "scope": "module", "mask": False}
        return cls(**values, gate=gate)

    @property
    def is_causal(self) -> bool:
        """Return whether a language model is trained."""
        return self.task == "causal_lm"

    def steps(self, rows: int, processes: int = 1) -> tuple[int, int]:
        """Return the optimizer steps before and after pruning, for ``rows`` training rows.

        Raises:
            InputError: a phase that was asked for rounds to no step.
        """
        per_epoch = -(-rows // (self.train_bsz * processes))
        steps = round(self.warmup_epochs * per_epoch), round(self.post_epochs * per_epoch)
        for name, epochs, count in (
            ("warmup_epochs", self.warmup_epochs, steps[0]),
            ("post_epochs", self.post_epochs, steps[1]),
        ):
            if epochs > 0 and count == 0:
                raise InputError(
                    f"--{name} {epochs:g} is no step: an epoch of {rows} training rows in batches of "
                    f"{self.train_bsz * processes} has {per_epoch}; give {1 / per_epoch:.2g} or more, or 0 to leave "
                    "this phase out"
                )
        return steps
