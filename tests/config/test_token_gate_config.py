"""Settings of the token gates: what is refused, and the schedule of the budget."""

from __future__ import annotations

import math

import pytest

from sparselora.config.token_gates import TokenGateConfig
from sparselora.errors import InputError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 0}, "budget must be above 0"),
        ({"budget": -0.1}, "budget must be a number in"),
        ({"budget": 1.5}, "budget must be a number in"),
        ({"budget": math.nan}, "budget must be a number in"),
        ({"budget": True}, "budget must be a number in"),
        ({"policy": "learnt"}, "did you mean 'learned'"),
        ({"budgets": 0.5}, "unknown key 'budgets'.*did you mean 'budget'"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"match_weight": -1}, "match_weight must be"),
        ({"policy": "energy", "select": "threshold"}, "select threshold needs policy learned"),
        ({"policy": "static", "estimator": "relaxed"}, "estimator relaxed needs policy learned"),
        ({"policy": "random", "supervision": "gradient"}, "supervision gradient needs policy learned"),
        ({"warmup_ratio": 0.6, "anneal_ratio": 0.5}, "warmup_ratio 0.6 and anneal_ratio 0.5"),
    ],
)
def test_bad_settings_are_refused_with_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        TokenGateConfig.from_dict(values)
    assert "\n" not in str(caught.value)


def test_settings_survive_a_round_trip() -> None:
    config = TokenGateConfig(budget=0.3, select="threshold", estimator="relaxed", supervision="energy", penalty=3)
    assert TokenGateConfig.from_dict(config.to_dict()) == config
    assert TokenGateConfig.from_dict({}) == TokenGateConfig()
    assert TokenGateConfig(budget=1).budget == 1


def test_the_budget_falls_after_the_warm_up() -> None:
    config = TokenGateConfig(budget=0.2, warmup_ratio=0.1, anneal_ratio=0.4)
    budgets = [config.budget_at(step, 10) for step in range(10)]
    assert budgets == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2])
    assert budgets[:2] == [1, 1]
    assert budgets[5:] == [0.2] * 5
    # 0.1 · 30 in floating point is a little more than 3: step 3 has gating all the same.
    begins = TokenGateConfig(budget=0.5, warmup_ratio=0.1)
    assert [begins.budget_at(step, 30) for step in (0, 2, 3, 29)] == [1, 1, 0.5, 0.5]
    assert TokenGateConfig(budget=0.5).budget_at(0, 10) == 0.5
    assert TokenGateConfig(budget=0.5, warmup_ratio=1).budget_at(9, 10) == 1
