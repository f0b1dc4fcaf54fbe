"""Settings of the novelty gate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparselora.config.fields import build, check_fields, option
from sparselora.errors import InputError
from sparselora.runs.former_names import with_present_names

POLICIES = ("accept_all", "random", "loss_floor", "novelty", "novelty+loss_floor")
UNITS = ("window", "micro_batch")
DEFAULT_RATE = 0.30


@dataclass(frozen=True)
class GateConfig:
    """Rule that skips the backward pass of a batch; `sparselora.novelty.HeadGradientGate` says what each setting does.

    Raises:
        InputError: a value of another type or outside its range, settings that contradict one another.
    """

    enable: bool = option(True, bool, "gate the backward passes")
    policy: str = option("novelty", str, "rule that accepts or rejects", choices=POLICIES)
    unit: str = option(
        "window", str, "unit of a decision: an accumulation window, or each of its batches", choices=UNITS
    )
    target_accept_rate: float = option(DEFAULT_RATE, float, "share of batches to accept", low=0, high=1)
    target_novelty_scaler: float = option(10.0, float, "steepness of the accept probability", low=0, below=True)
    novelty_ema_rate: float = option(0.01, float, "weight of a decision in the running acceptance rate", low=0, high=1)
    burn_in: float = option(2000, float, "first updates, all accepted; below 1: a share of the run", low=0)
    m: int = option(512, int, "length of a sketch, a power of two", low=2)
    k: int = option(64, int, "rank of the subspace of accepted gradients", low=1)
    k_topk: int = option(64, int, "largest logits kept of each token", low=1)
    reorth_every: int = option(128, int, "updates between two orthogonalizations of the subspace", low=1)
    max_consecutive_rejects: int | None = option(
        None, int, "rejects in a row after which a batch is accepted", low=1, optional=True
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.burn_in >= 1 and self.burn_in != int(self.burn_in):
            raise InputError(f"burn_in must be a whole number of updates, or a share below 1, got {self.burn_in:g}")
        if self.m & (self.m - 1):
            raise InputError(f"m must be a power of two, got {self.m}; {1 << self.m.bit_length() - 1} is near")
        if self.k >= self.m:
            raise InputError(f"k must be below the sketch's length m, {self.m}, got {self.k}; lower k")
        if self.novelty_ema_rate == 0:
            raise InputError("novelty_ema_rate must be above 0, got 0; 0.01 is usual")
        check_rejects(self.max_consecutive_rejects, target_rate(None, self.target_accept_rate))
        object.__setattr__(
            self, "burn_in", int(self.burn_in) if self.burn_in >= 1 or not self.burn_in else self.burn_in
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GateConfig:
        """Build from a mapping as `to_dict` gives it, former names included; settings left out have their defaults."""
        return build(cls, with_present_names(values, "novelty"), "the novelty settings")

    def to_dict(self) -> dict[str, Any]:
        """Return every setting, in plain types."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def gate_arguments(self) -> dict[str, Any]:
        """Return the settings that `HeadGradientGate` takes, by its names."""
        return {name: value for name, value in self.to_dict().items() if name not in ("enable", "unit")}


def target_rate(target_novelty: float | None, target_accept_rate: float | None) -> float:
    """Return the acceptance rate that either name gives, `DEFAULT_RATE` without.

    Raises:
        InputError: two rates, or one outside (0, 1).
    """
    rates = [x for x in (target_novelty, target_accept_rate) if x is not None]
    if len(set(rates)) > 1:
        raise InputError(
            f"target_novelty={target_novelty} and target_accept_rate={target_accept_rate} name the same rate; give one"
        )
    target = rates[0] if rates else DEFAULT_RATE
    if not 0 < target < 1:
        raise InputError(
            f"target acceptance rate (target_novelty, target_accept_rate) must be in (0, 1), got {target}; to accept "
            "every batch use policy accept_all"
        )
    return target


def check_rejects(limit: int | None, target: float) -> None:
    """Raise an `InputError` where a limit on rejects in a row cannot go with the rate ``target``."""
    if limit is None:
        return
    if limit < 1:
        raise InputError(f"max_consecutive_rejects must be 1 or more, or None for no limit, got {limit}")
    if target * (limit + 1) <= 1:
        raise InputError(
            f"max_consecutive_rejects={limit} forces one accept in {limit + 1}, which no target rate of {target} "
            f"allows; raise it to {math.floor(1 / target)} or more"
        )
