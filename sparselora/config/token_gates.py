"""Settings of the per-token gates of LoRA rank channels."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sparselora.config.fields import Settings
from sparselora.errors import InputError

Basis = Literal["channels", "singular"]
"""Candidates of the choice: the channels as they were trained, or the singular directions of the adapter, which is
rotated to them when gating begins. Their outputs are orthogonal then: the k of largest energy change a token's
output least (Eckart–Young, token by token). They train like channels. A fresh adapter has no directions: give it a
warm-up."""

ROUTED = "routed"
"""The policy of a mixture of small LoRAs, one of which is active for a token."""

SETTINGS, TENSORS = "token_gate.json", "token_gate.safetensors"
"""Files of the gates in the folder of an adapter."""


class TokenGateConfig(Settings):
    """Choice of the rank channels active for a token; `sparselora.token_gates.gates` says what each setting does.

    Raises:
        InputError: a value of another type or outside its range, settings that contradict one another.
    """

    title: ClassVar[str] = "the token gate settings"

    policy: Literal["learned", "energy", "static", "random", "routed"] = Field(
        "learned", description="rule that scores the channels of a token"
    )
    budget: float = Field(0.5, ge=0, le=1, description="share of a module's rank channels active for a token, above 0")
    basis: Basis = Field(
        "channels",
        description="candidates: the trained channels, or the singular directions of each update when gating begins",
    )
    select: Literal["topk", "threshold"] = Field(
        "topk", description="the same number of channels for every token, or those above a threshold"
    )
    features: Literal["projection", "statistics", "both"] = Field(
        "projection", description="features of a token that a learned gate sees"
    )
    estimator: Literal["straight_through", "relaxed"] = Field("straight_through", description="gradient of a decision")
    supervision: Literal["task", "energy", "gradient"] = Field(
        "task", description="target that a learned gate is matched to, in addition to the task loss"
    )
    match_weight: float = Field(0.1, ge=0, description="weight of that matching")
    penalty: float = Field(10.0, ge=0, description="weight of the term that holds a threshold's share at the budget")
    temperature: float = Field(1.0, gt=0, description="width of the sigmoid in a decision's gradient")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of the steps before gating begins")
    anneal_ratio: float = Field(
        0.0, ge=0, le=1, description="share of the steps, after the warm-up, in which the budget falls from 1"
    )

    @field_validator("budget")
    @classmethod
    def _above_zero(cls, budget: float) -> float:
        if budget == 0:
            raise InputError("budget must be above 0, got 0; use 1 to gate nothing")
        return budget

    @model_validator(mode="after")
    def _check_together(self) -> TokenGateConfig:
        for name, plain in (("select", "topk"), ("estimator", "straight_through"), ("supervision", "task")):
            if self.policy != "learned" and getattr(self, name) != plain:
                raise InputError(
                    f"{name} {getattr(self, name)} needs policy learned, got policy {self.policy}; "
                    f"set {name} to {plain}, which is all the others know"
                )
        if self.policy == ROUTED:
            if self.basis != "channels" or self.anneal_ratio:
                raise InputError(
                    f"policy {ROUTED} keeps the groups of channels that it begins with; leave basis singular and "
                    "anneal_ratio out"
                )
            if abs(1 / self.budget - self.experts) > 1e-6:
                raise InputError(
                    f"policy {ROUTED} activates one of 1 / budget groups of channels; budget must be 1 / 2, 1 / 3, …, "
                    f"got {self.budget:g}"
                )
        if self.warmup_ratio + self.anneal_ratio > 1 + 1e-9:
            raise InputError(
                f"warmup_ratio {self.warmup_ratio:g} and anneal_ratio {self.anneal_ratio:g} are more than the whole "
                "run; their sum may be 1 at most"
            )
        return self

    @property
    def experts(self) -> int:
        """Number of groups of channels, one of which is active for a token, of policy ``routed``."""
        return round(1 / self.budget)

    @property
    def has_heads(self) -> bool:
        """Return whether the policy has parameters of its own, which are trained."""
        return self.policy in ("learned", ROUTED)

    def budget_at(self, step: int, total_steps: int) -> float:
        """Return the budget of step ``step`` (counted from 0) of ``total_steps``.

        It is 1 while ``step < warmup_ratio · total_steps``, falls linearly over the next ``anneal_ratio · total_steps``
        (whose first step still has 1), and is ``budget`` from then on.
        """
        begun = step - self.warmup_ratio * total_steps
        if begun < -1e-9:  # 0.1 · 30 is 3.0000000000000004, and step 3 is past it
            return 1.0
        falls = self.anneal_ratio * total_steps
        if begun >= falls - 1e-9:
            return self.budget
        return 1 + (self.budget - 1) * max(begun, 0.0) / falls
