"""Settings of the novelty gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparselora.errors import InputError
from sparselora.settings import build, check_fields, option

POLICIES = ("accept_all", "random", "loss_floor", "novelty", "novelty+loss_floor")
UNITS = ("window", "micro_batch")


@dataclass(frozen=True)
class GateConfig:
    """When a batch's backward pass is skipped; `sparselora.novelty.HeadGradientGate` says what each setting does.

    Raises:
        InputError: a value of another type or outside its range, settings that contradict one another.
    """

    enable: bool = option(True, bool, "gate the backward passes; false trains as if the section were not there")
    policy: str = option("novelty", str, "what decides", choices=POLICIES)
    unit: str = option(
        "window", str, "what is decided on: an accumulation window, or each of its batches", choices=UNITS
    )
    target_novelty: float | None = option(
        None, float, "share of batches to accept (a rate, its name notwithstanding; 0.3)", low=0, high=1, optional=True
    )
    target_accept_rate: float | None = option(
        None, float, "the same by its clear name; give one", low=0, high=1, optional=True
    )
    target_novelty_scaler: float = option(10.0, float, "steepness of the accept probability", low=0, below=True)
    novelty_ema_rate: float = option(0.01, float, "weight of a decision in the running acceptance rate", low=0, high=1)
    burn_in: float = option(
        2000, float, "updates that are all accepted at first; below 1: that share of the run", low=0
    )
    m: int = option(512, int, "length of a sketch, a power of two", low=2)
    k: int = option(64, int, "rank of the subspace of accepted gradients", low=1)
    k_topk: int = option(64, int, "logits kept of each token", low=1)
    reorth_every: int = option(128, int, "updates between two renewals of the subspace", low=1)
    max_consecutive_rejects: int | None = option(
        None, int, "after so many rejects in a row the next batch is accepted", low=1, optional=True
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.burn_in >= 1 and self.burn_in != int(self.burn_in):
            raise InputError(f"burn_in must be a whole number of updates, or a share below 1, got {self.burn_in:g}")
        object.__setattr__(
            self, "burn_in", int(self.burn_in) if self.burn_in >= 1 or not self.burn_in else self.burn_in
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GateConfig:
        """From a mapping as `to_dict` gives it; what is left out has its default, an unknown key is an error."""
        return build(cls, values, "the slora settings")

    def to_dict(self) -> dict[str, Any]:
        """Every setting, in plain types."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def gate_arguments(self) -> dict[str, Any]:
        """The settings that `HeadGradientGate` takes, by its names."""
        return {name: value for name, value in self.to_dict().items() if name not in ("enable", "unit")}
