"""Dense for the same time, against scipy's interpolation, curves whose loss is known, and planted equals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import interpolate, stats

from sparselora.frontier.equal_time import (
    BETWEEN,
    LONGER,
    MEASURED,
    SHORTER,
    EqualTime,
    dense_for,
    difference_over_rows,
    difference_over_seeds,
    side,
)

SHARES = np.array([0.5, 0.75, 1.0])


def test_forms_between_lengths_are_scipys_interpolants_in_log_time():
    rng = np.random.default_rng(0)
    for points in (3, 4, 7):
        times = np.cumsum(rng.uniform(1.0, 5.0, points))
        losses = rng.normal(size=points)
        for seconds in rng.uniform(times[0], times[-1], 20):
            equal_time = dense_for(seconds, times)
            chord, parabola = (float(weights @ losses) for weights in equal_time.forms)
            x = math.log(seconds)
            assert equal_time.place == BETWEEN
            assert chord == pytest.approx(float(interpolate.interp1d(np.log(times), losses)(x)))
            right = int(np.searchsorted(times, seconds))
            outer = [i for i in (right - 2, right + 1) if 0 <= i < points]
            third = min(outer, key=lambda i: abs(math.log(times[i]) - x))
            three = sorted([right - 1, right, third])
            polynomial = interpolate.BarycentricInterpolator(np.log(times)[three], losses[three])
            assert parabola == pytest.approx(float(polynomial(x)))


@pytest.mark.parametrize("power", [0.1, 0.4, 1.0])
def test_the_forms_know_a_power_law(power: float):
    def loss(t: float) -> float:
        return 0.5 + 0.2 * t**-power

    for share in np.linspace(0.51, 0.99, 25):
        forms = [float(weights @ loss(SHARES)) for weights in dense_for(share, SHARES).forms]
        error = forms[0] - loss(share)
        assert error >= 0  # the chord of a convex curve
        assert max(min(forms) - loss(share), loss(share) - max(forms), 0) <= 0.2 * error
        # The control: linear in the time itself, the error is larger.
        assert np.interp(share, SHARES, loss(SHARES)) - loss(share) > error or share in SHARES


def test_what_is_beyond_the_lengths_is_bounded_and_not_guessed():
    def loss(t: float) -> float:
        return 0.5 + 0.2 * t**-0.4

    longer = dense_for(1.3, SHARES)
    highest, lowest = (float(weights @ loss(SHARES)) for weights in longer.forms)
    assert longer.place == LONGER
    assert lowest < loss(1.3) < highest == loss(1.0)
    shorter = dense_for(0.3, SHARES)
    assert shorter.place == SHORTER
    assert shorter.can_be_higher
    assert [list(weights) for weights in shorter.forms] == [[1, 0, 0]]
    alone = dense_for(1.3, [1.0])
    assert (alone.place, alone.can_be_lower) == (LONGER, True)
    between_two = [float(weights @ loss(SHARES[1:])) for weights in dense_for(0.9, SHARES[1:]).forms]
    assert between_two[1] < loss(0.9) < between_two[0]
    for i, share in enumerate(SHARES):
        equal_time = dense_for(float(share), SHARES)
        assert (equal_time.place, list(equal_time.forms[0])) == (MEASURED, list(np.eye(3)[i]))
    with pytest.raises(ValueError, match="must ascend"):
        dense_for(1.0, [1.0, 1.0])


def test_tests_over_seeds_are_scipys_against_the_harder_form():
    rng = np.random.default_rng(1)
    dense = rng.normal(1.0, 0.02, (5, 3)) + np.array([0.06, 0.02, 0.0])
    losses = rng.normal(0.95, 0.02, 5)
    equal_time = dense_for(0.6, SHARES)
    references = [dense @ weights for weights in equal_time.forms]
    got = difference_over_seeds(losses, dense, equal_time, 0.02)
    tests = [stats.ttest_rel(losses, reference) for reference in references]
    intervals = [test.confidence_interval() for test in tests]
    assert got.t_p == pytest.approx(max(test.pvalue for test in tests))
    assert got.difference == pytest.approx(float((losses - references[0]).mean()))
    assert got.low == pytest.approx(min(interval.low for interval in intervals))
    assert got.high == pytest.approx(max(interval.high for interval in intervals))
    equivalence = [
        max(stats.ttest_1samp(losses - 1.02 * r, 0, alternative="less").pvalue,
            stats.ttest_1samp(losses - 0.98 * r, 0, alternative="greater").pvalue)
        for r in references
    ]  # fmt: skip
    assert got.equivalence_p == pytest.approx(max(equivalence))


def test_a_difference_that_the_form_could_turn_round_is_none():
    rng = np.random.default_rng(2)
    dense = np.array([0.2, 0.0]) + 1e-4 * rng.normal(size=(6, 2))
    losses = 0.05 + 1e-4 * rng.normal(size=6)
    between = difference_over_seeds(losses, dense, dense_for(0.75, [0.5, 1.0]), 0.01)
    assert between.low < 0 < between.high
    assert between.t_p == 1.0
    # Faster than every dense pilot: it may be better than the shortest, never worse. And the other way round.
    open_above = EqualTime(SHORTER, (np.array([1.0, 0.0]),), can_be_higher=True)
    better = difference_over_seeds(losses, dense, open_above, 0.01)
    assert better.t_p < 1e-6
    assert (better.low, better.equivalence_p) == (-math.inf, 1.0)
    assert difference_over_seeds(losses + 1, dense, open_above, 0.01).t_p == 1.0
    open_below = EqualTime(LONGER, (np.array([0.0, 1.0]),), can_be_lower=True)
    assert difference_over_seeds(losses, dense, open_below, 0.01).t_p < 1e-6
    assert difference_over_seeds(losses - 1, dense, open_below, 0.01).t_p == 1.0


def test_rows_are_paired_and_weighted_by_their_labels():
    rng = np.random.default_rng(3)
    labels = rng.integers(1, 40, 300).astype(float)
    difficulty = rng.lognormal(0, 1.0, 300)
    per_label = np.stack([difficulty + 0.1, difficulty], axis=1)
    equal_time = dense_for(math.sqrt(0.5), [0.5, 1.0])
    losses = (difficulty + 0.01 * rng.normal(size=300)) * labels
    got = difference_over_rows(losses, per_label * labels[:, None], labels, equal_time, rng, 2000)
    expected = float(np.average(losses / labels - difficulty - 0.05, weights=labels))
    assert got.difference == pytest.approx(expected)
    assert got.dense == pytest.approx(float(np.average(difficulty, weights=labels)) + 0.05)
    # The hull over the chord (−0.05) and the longer pilot (0): paired, it is as narrow as the noise of 0.01 leaves it.
    assert -0.053 < got.low < -0.049
    assert -0.002 < got.high < 0.003
    assert math.isnan(got.t_p)
    assert side(got) in ("better", "undecided")


def test_dense_itself_for_less_time_is_hardly_ever_called_better_or_worse():
    """Candidates that are exactly dense for their time, at the noise of runs: the level holds, the naive rule fails."""
    rng = np.random.default_rng(4)

    def loss(t: float | np.ndarray) -> np.ndarray:
        return 0.5 + 0.2 * np.asarray(t) ** -0.4

    trials, noise, decided, naive = 1500, 0.002, 0, 0
    for _ in range(trials):
        share = rng.uniform(0.52, 0.98)
        luck = rng.normal(0, 0.01, (3, 1))
        dense = loss(SHARES) + luck + noise * rng.normal(size=(3, 3))
        losses = loss(share) + luck[:, 0] + noise * rng.normal(size=3)
        decided += difference_over_seeds(losses, dense, dense_for(share, SHARES), 0.01).t_p < 0.05
        naive += stats.ttest_rel(losses, dense[:, 2]).pvalue < 0.05
    assert decided / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert naive / trials > 0.6
