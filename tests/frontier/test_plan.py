"""The plan of a search fits its budget whoever survives, and is the longest that does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sparselora.errors import InputError
from sparselora.frontier.plan import LEAST_ROWS, LEAST_STEPS, Cost, Plan, plan_pilots, rung_counts
from sparselora.frontier.request import parse_budget, parse_tolerance

FIXED = {"dense": 1.0, "data_75": 0.75, "half_data": 0.5}


def drawn_costs(rng: np.random.Generator, count: int) -> dict[str, Cost]:
    dense = rng.uniform(0.01, 2)
    fixed = {name: Cost(dense, 0.1, share) for name, share in FIXED.items()}
    others = {f"c{i}": Cost(dense * rng.uniform(0.4, 1.3), rng.uniform(0, 5)) for i in range(count)}
    return fixed | others


def spent(plan: Plan, costs: dict[str, Cost], survivors: list[str], row_s: float, overhead_s: float) -> float:
    """Seconds of the plan when ``survivors`` go on, the first of them the furthest; counted run by run."""
    total = 0.0
    for rung in plan.rungs:
        for name in [*FIXED, *survivors[: rung.count]]:
            cost = costs[name]
            steps = max(1, round(rung.steps * cost.share))
            run_s = cost.setup_s + steps * cost.step_s + plan.eval_rows * row_s + overhead_s
            total += len(rung.seeds) * run_s
    # Learning rates: two more for each that goes on to the last rung, or three where that is the only one.
    for name in [*FIXED, *survivors[: plan.rungs[-1].count]]:
        cost = costs[name]
        steps = max(1, round(plan.tuning.steps * cost.share))
        run_s = cost.setup_s + steps * cost.step_s + plan.eval_rows * row_s + overhead_s
        total += (2 if len(plan.rungs) > 1 else 3) * run_s
    return total


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_fits_its_budget_whoever_goes_on_and_one_step_more_would_not(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 7))
    costs = drawn_costs(rng, count)
    order = [name for name in costs if name not in FIXED]
    row_s, overhead_s, full_steps = rng.uniform(1e-4, 0.05), rng.uniform(0, 1), int(rng.integers(20, 2000))
    budget_s = rng.uniform(2000, 10_000)
    options = {"full_steps": full_steps, "seeds": (0, 1, 2), "row_s": row_s, "overhead_s": overhead_s}
    plan = plan_pilots(costs, order, budget_s=budget_s, held_out=1000, **options)
    worst = max(spent(plan, costs, list(names), row_s, overhead_s) for names in itertools.permutations(plan.candidates))
    assert worst == pytest.approx(plan.seconds, rel=1e-9)
    assert worst <= budget_s
    assert plan.rungs[-1].steps <= full_steps
    assert plan.eval_rows >= LEAST_ROWS
    if plan.rungs[-1].steps < full_steps:
        longer = plan_pilots(costs, order, budget_s=budget_s, held_out=1000, **options | {"full_steps": 10**6})
        assert longer.candidates == plan.candidates or full_steps < LEAST_STEPS * 2 ** (len(plan.rungs) - 1)
    # The candidates that are left out are the last of the order.
    assert list(plan.candidates) == order[: len(plan.candidates)]
    assert Plan.from_dict(plan.to_dict()) == plan


def test_the_control_a_budget_below_the_least_plan_is_refused_and_just_above_it_is_not():
    costs = {name: Cost(1.0, 0.0, share) for name, share in FIXED.items()} | {"a": Cost(1.0), "b": Cost(1.0)}
    # Eight steps of two candidates and dense, six of data_75, four of half_data, with one seed and no other cost, and
    # three times half of each for the learning rates.
    options = {"full_steps": 100, "seeds": (0,), "row_s": 1e-9, "overhead_s": 0.0, "held_out": 50}
    plan = plan_pilots(costs, ["a", "b"], budget_s=85.001, **options)
    assert plan.rungs[-1].steps == LEAST_STEPS
    with pytest.raises(InputError, match=r"budget leaves 85 s .* take 85 s at 8 steps; give a larger budget"):
        plan_pilots(costs, ["a", "b"], budget_s=84.9, **options)


def test_a_large_budget_gives_whole_runs_and_a_small_one_fewer_candidates():
    costs = drawn_costs(np.random.default_rng(0), 9)
    order = [name for name in costs if name not in FIXED]
    options = {"full_steps": 50, "seeds": (0, 1), "row_s": 1e-3, "overhead_s": 0.1, "held_out": 40}
    plan = plan_pilots(costs, order, budget_s=1e6, **options)
    assert (plan.rungs[-1].steps, plan.eval_rows) == (50, 40)
    assert [rung.count for rung in plan.rungs] == rung_counts(9)
    assert [len(rung.seeds) for rung in plan.rungs] == [1] * (len(plan.rungs) - 1) + [2]
    assert plan_pilots(costs, order, budget_s=1e6, eval_rows=30, **options).eval_rows == 30
    smaller = plan_pilots(costs, order, budget_s=plan.seconds / 4, **options)
    assert 2 <= len(smaller.candidates) < 9


def test_seeds_are_left_out_before_candidates_and_not_below_the_least():
    costs = drawn_costs(np.random.default_rng(1), 6)
    order = [name for name in costs if name not in FIXED]
    options = {"full_steps": 400, "row_s": 1e-3, "overhead_s": 0.1, "held_out": 40, "eval_rows": 40}
    least = {n: plan_pilots(costs, order, budget_s=1e6, seeds=range(n), **options | {"full_steps": 16}).seconds
             for n in (3, 4, 6)}  # fmt: skip

    def planned(budget_s: float, **more: int) -> tuple[int, int]:
        plan = plan_pilots(costs, order, budget_s=budget_s, seeds=range(6), **options, **more)
        assert plan.seconds <= budget_s
        return len(plan.candidates), len(plan.rungs[-1].seeds)

    assert planned(least[6] + 1, least_seeds=3) == (6, 6)
    assert planned(least[4] + 1, least_seeds=3) == (6, 4)
    assert planned(least[3] + 1, least_seeds=3) == (6, 3)
    few, seeds = planned(least[3] - 1, least_seeds=3)
    assert few < 6
    assert seeds == 3
    # The control: with all seeds asked for, candidates are left out in their place.
    assert planned(least[4] + 1)[0] < 6
    assert planned(least[4] + 1)[1] == 6


def test_a_third_goes_on_until_four_are_left():
    assert [rung_counts(n) for n in (0, 1, 4, 5, 12, 15, 40)] == [
        [0], [1], [4], [5, 2], [12, 4], [15, 5, 2], [40, 14, 5, 2],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20min", 1200), ("90s", 90), ("1h30min", 5400), ("1.5h", 5400), (" 2 min 5 s ", 125), ("0.5min", 30)],
)
def test_budgets_that_are_times(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["20", "", "min", "0s", "-5min", "20 m", "5min 1h", "nan", "1e3s", "31 days", "721h"])
def test_budgets_that_are_none(text):
    with pytest.raises(InputError, match=r"budget must be a time .* such as 20min"):
        parse_budget(text)


def test_tolerances():
    assert parse_tolerance("1%") == 0.01
    assert parse_tolerance(" 0.5 % ") == 0.005
    for text in ("1", "0%", "100%", "-1%", "nan%", "1%%", "", "0.01"):
        with pytest.raises(InputError, match=r"tolerance must be a percentage .* such as 1%"):
            parse_tolerance(text)
