"""Dense for the same time by interpolation, and who goes on: against brute force, with planted candidates."""

from __future__ import annotations

import numpy as np
import pytest

from sparselora.frontier.halving import Standing, dense_for_time, standing, survivors

CONTROLS = (0.5, 0.75, 1.0)


def curve(share: float) -> float:
    """Loss of dense after a share of its steps: linear in the logarithm."""
    return 1.0 - 0.2 * np.log(share)


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.8, 1.0, 1.4])
def test_dense_for_another_time_lies_on_a_curve_that_is_linear_in_the_logarithm(ratio):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=20)  # of the rows, the same at every length
    rows = dense_for_time({share: curve(share) + noise for share in CONTROLS}, ratio)
    np.testing.assert_allclose(rows, curve(ratio) + noise)
    kinked = {0.5: np.array([3.0]), 0.75: np.array([2.0]), 1.0: np.array([1.9])}
    if 0.5 <= ratio <= 1:
        expected = np.interp(np.log(ratio), np.log(CONTROLS), [3.0, 2.0, 1.9])
        np.testing.assert_allclose(dense_for_time(kinked, ratio), expected)


def test_below_the_shortest_control_dense_is_taken_as_there():
    controls = {share: np.array([curve(share)]) for share in CONTROLS}
    assert dense_for_time(controls, 0.2) == controls[0.5]


def test_the_difference_is_per_label_and_its_error_is_over_rows():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 9, 400).astype(float)
    dense = {share: (curve(share) + 0.3 * rng.normal(size=400)) * counts for share in CONTROLS}
    noise = 0.05 * rng.normal(size=400)
    row = standing("c", dense[0.75] + (0.02 + noise) * counts, counts, dense, 0.75)
    assert row.difference == pytest.approx(((0.02 + noise) * counts).sum() / counts.sum())
    draws = []
    for _ in range(400):  # the bootstrap over rows
        rows = rng.integers(0, 400, 400)
        draws.append(((0.02 + noise) * counts)[rows].sum() / counts[rows].sum())
    assert row.standard_error == pytest.approx(np.std(draws), rel=0.15)
    # The control: not paired by row, the error would be many times as large.
    unpaired = np.std(dense[0.75] / counts) / 20
    assert row.standard_error < 0.4 * unpaired


def test_a_planted_bad_candidate_never_goes_on_and_a_planted_good_one_does():
    """Ten candidates at the truth of dense for the same time, one far worse however fast, one a little better."""
    good = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        counts = np.full(200, 5.0)
        shared = rng.normal(size=200)
        dense = {share: 5 * (curve(share) + shared + 0.02 * rng.normal(size=200)) for share in CONTROLS}

        def drawn(name, ratio, worse, rng=rng, shared=shared, counts=counts, dense=dense):
            losses = 5 * (curve(ratio) + worse + shared + 0.2 * rng.normal(size=200))
            return standing(name, losses, counts, dense, ratio)

        standings = [drawn(f"c{i}", rng.uniform(0.5, 1), rng.uniform(0, 0.05)) for i in range(10)]
        standings += [drawn("random_99", 0.3, 0.3), drawn("rank_half", 0.97, -0.01)]
        names, reasons = survivors(standings, 4, 0.01, curve(1.0))
        assert "random_99" not in names
        assert "worse than dense for the same time by" in reasons["random_99"]
        assert len(names) <= 4
        assert {*names, *reasons} == {row.name for row in standings}
        good += "rank_half" in names
    assert good >= 36


def test_a_clearly_worse_candidate_is_dropped_even_where_there_is_room():
    standings = [Standing("a", 1.0, 0.0, 0.01), Standing("b", 1.2, 0.2, 0.01), Standing("c", 1.02, 0.02, 0.01)]
    assert survivors(standings, 3, 0.01, 1.0)[0] == ["a", "c"]
    assert survivors(standings, 3, 0.5, 1.0)[0] == ["a", "c", "b"]  # the control: within the tolerance
    names, reasons = survivors(standings, 1, 0.5, 1.0)
    assert names == ["a"]
    assert reasons["c"].startswith("place 2 of 3 against dense for the same time (+2.00 %")
