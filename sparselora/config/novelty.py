"""Settings of the novelty gate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, field_serializer, field_validator, model_validator

from sparselora.config.fields import Settings
from sparselora.errors import InputError
from sparselora.runs.former_names import with_present_names

Policy = Literal["accept_all", "random", "loss_floor", "novelty", "novelty+loss_floor", "oracle"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
ORACLE: Policy = "oracle"
"""The control that decides by the novelty of the true LoRA gradient, and so runs every backward pass."""
BY_NOVELTY: tuple[Policy, ...] = ("novelty", ORACLE)
"""Policies that decide by novelty alone."""
DEFAULT_RATE = 0.30


class GateConfig(Settings):
    """Rule that skips the backward pass of a batch; `sparselora.novelty.HeadGradientGate` says what each setting does.

    Raises:
        InputError: a value of another type or outside its range, settings that contradict one another.
    """

    title: ClassVar[str] = "the novelty settings"

    enable: bool = Field(True, description="gate the backward passes")
    policy: Policy = Field("novelty", description="rule that accepts or rejects")
    unit: Literal["window", "micro_batch"] = Field(
        "window", description="unit of a decision: an accumulation window, or each of its batches"
    )
    target_accept_rate: float = Field(DEFAULT_RATE, ge=0, le=1, description="share of batches to accept")
    target_novelty_scaler: float | None = Field(
        None, gt=0, description="steepness of the accept probability (default: 2 over the burn-in's spread of novelty)"
    )
    novelty_ema_rate: float = Field(0.01, gt=0, le=1, description="weight of a decision in the running acceptance rate")
    burn_in: float = Field(2000, ge=0, description="first updates, all accepted; below 1: a share of the run")
    m: int = Field(512, ge=2, description="length of a sketch, a power of two")
    k: int = Field(64, ge=1, description="rank of the subspace of accepted gradients")
    k_topk: int = Field(64, ge=1, description="largest logits kept of each token")
    reorth_every: int = Field(128, ge=1, description="updates between two orthogonalizations of the subspace")
    max_consecutive_rejects: int | None = Field(
        None, ge=1, description="rejects in a row after which a batch is accepted"
    )

    @field_validator("burn_in")
    @classmethod
    def _whole_updates(cls, value: float) -> float:
        """Return a number of updates as an int, and a share of the run as it is."""
        if value >= 1 and value != int(value):
            raise InputError(f"burn_in must be a whole number of updates, or a share below 1, got {value:g}")
        return int(value) if value >= 1 or not value else value

    @field_serializer("burn_in")
    def _keep_whole(self, value: float) -> Any:  # not float: pydantic would write 2000 as 2000.0
        return value

    @model_validator(mode="after")
    def _check_together(self) -> GateConfig:
        if self.m & (self.m - 1):
            raise InputError(f"m must be a power of two, got {self.m}; {1 << self.m.bit_length() - 1} is near")
        if self.k >= self.m:
            raise InputError(f"k must be below the sketch's length m, {self.m}, got {self.k}; lower k")
        check_rejects(self.max_consecutive_rejects, target_rate(None, self.target_accept_rate))
        return self

    @classmethod
    def _by_field(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return with_present_names(values, "novelty")

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
