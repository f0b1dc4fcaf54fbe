"""The statistics that all comparisons share, against plain loops and scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sparselora.compare.pairing import Endpoint, add_holm, compare_pairs, item_differences, pair_by_seed
from sparselora.compare.runs import Group, Run

LOSS = Endpoint("loss", "loss", weight="tokens")


def run_of(seed: int, losses: dict[object, float] | None, tokens: dict[object, int] | None = None, **metrics) -> Run:
    items = None
    if losses is not None:
        items = pd.DataFrame({"loss": pd.Series(losses)})
        if tokens is not None:
            items["tokens"] = pd.Series(tokens)
    return Run(Path(f"r{seed}"), {}, seed, {"loss": 0.0, **metrics}, items)


def group_of(*runs: Run) -> Group[Run]:
    return Group("g", {run.seed: run for run in runs})


def test_runs_are_paired_by_seed_and_only_where_both_have_it():
    first, second = group_of(*(run_of(s, None) for s in (0, 2, 5))), group_of(*(run_of(s, None) for s in (5, 1, 2)))
    assert [(a.seed, b.seed) for a, b in pair_by_seed(first, second)] == [(2, 2), (5, 5)]


def test_items_are_paired_by_their_id_whatever_their_order():
    tokens = {"a": 3, "b": 0, "c": 2}
    ours = run_of(0, {"a": 1.0, "b": 9.0, "c": 4.0}, tokens)
    theirs = run_of(0, {"c": 1.0, "a": 0.5, "d": 100.0}, {"c": 2, "a": 3, "d": 1})
    sums, weights = item_differences([(ours, theirs)], LOSS)
    assert (sorted(sums), sorted(weights)) == ([0.5, 3.0], [2.0, 3.0])
    # The control: by position the differences would be others.
    assert sorted(sums) != [0.0, 8.5]


@pytest.mark.parametrize("seed", range(3))
def test_a_difference_is_a_paired_t_test_over_seeds_and_a_weighted_mean_over_items(seed):
    rng = np.random.default_rng(seed)
    pairs, differences, labels = [], [], []
    for s in range(5):
        rows = rng.permutation(31)[: rng.integers(20, 31)].tolist()
        tokens = {row: 1 + row % 4 for row in rows}
        losses = [{row: rng.normal(2, 1) for row in rows} for _ in range(2)]
        pairs.append(tuple(run_of(s, side, tokens, loss=np.mean(list(side.values()))) for side in losses))
        differences += [losses[0][row] - losses[1][row] for row in rows]
        labels += [tokens[row] for row in rows]
    found = compare_pairs(pairs, LOSS, np.random.default_rng(0), 500)
    oracle = stats.ttest_rel(*([run.metrics["loss"] for run in side] for side in zip(*pairs)))
    assert found.seeds.t_p == pytest.approx(oracle.pvalue)
    assert found.items.mean == pytest.approx(sum(differences) / sum(labels), abs=1e-5)
    assert found.items.low < found.items.mean < found.items.high
    # The control: unweighted, the mean over items is another.
    assert found.items.mean != pytest.approx(np.mean(differences), rel=0.1)


def test_what_is_not_there_is_not_compared():
    none = compare_pairs([], LOSS, np.random.default_rng(0), 10)
    assert (none.seeds.n, none.items.n) == (0, 0)
    assert np.isnan([none.seeds.mean_difference, none.items.mean, none.detectable]).all()
    without = compare_pairs([(run_of(0, None), run_of(0, {1: 2.0}))], LOSS, np.random.default_rng(0), 10)
    assert (without.seeds.n, without.items.n) == (1, 0)


def test_equal_differences_have_no_spread_to_say_what_is_detectable():
    pairs = [(run_of(s, None, loss=0.3 + 0.1 * s), run_of(s, None, loss=0.1 + 0.1 * s)) for s in range(3)]
    assert np.isnan(compare_pairs(pairs, LOSS, np.random.default_rng(0), 10).detectable)
    pairs[0] = (run_of(0, None, loss=0.31), pairs[0][1])  # the control
    assert compare_pairs(pairs, LOSS, np.random.default_rng(0), 10).detectable > 0


def test_the_reference_may_be_read_at_another_moment():
    endpoint = Endpoint("static", "static", reference_metric="after", reference_item="after")
    items = [pd.DataFrame({"static": [True, True], "after": [False, True]}), pd.DataFrame({"after": [False, True]})]
    pair = tuple(Run(Path(), {}, 0, {"static": 1.0, "after": 0.5}, frame) for frame in items)
    found = compare_pairs([pair], endpoint, np.random.default_rng(0), 10)
    assert (found.seeds.mean_difference, found.items.mean) == (0.5, 0.5)


def test_holm_is_next_to_its_column_or_at_the_end():
    for next_to_raw, columns in ((True, ["p", "p_holm", "x"]), (False, ["p", "x", "p_holm"])):
        table = pd.DataFrame({"p": [0.01, 0.04, np.nan], "x": 1})
        add_holm(table, ["p"], next_to_raw)
        assert list(table) == columns
        assert table["p_holm"].tolist() == pytest.approx([0.02, 0.04, np.nan], nan_ok=True)
