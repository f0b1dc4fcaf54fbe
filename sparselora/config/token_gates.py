"""Settings of the per-token gates of LoRA rank channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparselora.config.fields import Option, build, check_fields, option
from sparselora.errors import InputError

POLICIES = ("learned", "energy", "static", "random")
BASES = ("channels", "singular")
"""Candidates of the choice: the channels as they were trained, or the singular directions of the adapter, which is
rotated to them when gating begins. Their outputs are orthogonal then: the k of largest energy change a token's
output least (Eckart–Young, token by token). They train like channels. A fresh adapter has no directions: give it a
warm-up."""
SELECTIONS = ("topk", "threshold")
FEATURES = ("projection", "statistics", "both")
ESTIMATORS = ("straight_through", "relaxed")
SUPERVISIONS = ("task", "energy", "gradient")

SETTINGS, TENSORS = "token_gate.json", "token_gate.safetensors"
"""Files of the gates in the folder of an adapter."""

_BUDGET = Option(float, "share of a module's rank channels active for a token, above 0", low=0, high=1)


def check_budget(value: Any) -> float:
    """Return ``value`` as a budget.

    Raises:
        InputError: it is no number in (0, 1].
    """
    budget = float(_BUDGET.check("budget", value))
    if budget == 0:
        raise InputError("budget must be above 0, got 0; use 1 to gate nothing")
    return budget


@dataclass(frozen=True)
class TokenGateConfig:
    """Choice of the rank channels active for a token; `sparselora.token_gates.gates` says what each setting does.

    Raises:
        InputError: a value of another type or outside its range, settings that contradict one another.
    """

    policy: str = option("learned", str, "rule that scores the channels of a token", choices=POLICIES)
    budget: float = option(0.5, float, _BUDGET.help, low=0, high=1)
    basis: str = option(
        "channels",
        str,
        "candidates: the trained channels, or the singular directions of each update when gating begins",
        choices=BASES,
    )
    select: str = option(
        "topk", str, "the same number of channels for every token, or those above a threshold", choices=SELECTIONS
    )
    features: str = option("projection", str, "features of a token that a learned gate sees", choices=FEATURES)
    estimator: str = option("straight_through", str, "gradient of a decision", choices=ESTIMATORS)
    supervision: str = option(
        "task", str, "target that a learned gate is matched to, in addition to the task loss", choices=SUPERVISIONS
    )
    match_weight: float = option(0.1, float, "weight of that matching", low=0)
    penalty: float = option(10.0, float, "weight of the term that holds a threshold's share at the budget", low=0)
    temperature: float = option(1.0, float, "width of the sigmoid in a decision's gradient", low=0, below=True)
    warmup_ratio: float = option(0.0, float, "share of the steps before gating begins", low=0, high=1)
    anneal_ratio: float = option(
        0.0, float, "share of the steps, after the warm-up, in which the budget falls from 1", low=0, high=1
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_budget(self.budget)
        for name, plain in (("select", "topk"), ("estimator", "straight_through"), ("supervision", "task")):
            if self.policy != "learned" and getattr(self, name) != plain:
                raise InputError(
                    f"{name} {getattr(self, name)} needs policy learned, got policy {self.policy}; "
                    f"set {name} to {plain}, which is all the others know"
                )
        if self.warmup_ratio + self.anneal_ratio > 1 + 1e-9:
            raise InputError(
                f"warmup_ratio {self.warmup_ratio:g} and anneal_ratio {self.anneal_ratio:g} are more than the whole "
                "run; their sum may be 1 at most"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenGateConfig:
        """Build from a mapping as `to_dict` gives it; settings left out have their defaults."""
        return build(cls, values, "the token gate settings")

    def to_dict(self) -> dict[str, Any]:
        """Return every setting, in plain types."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

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
