from __future__ import annotations

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselora.errors import InputError
from sparselora.numerics import channels as ch
from sparselora.numerics import reconstruction as rec


@given(st.integers(1, 10_000), st.integers(1, 1000), st.integers(1, 1000))
@settings(max_examples=300, deadline=None)
def test_keep_count_is_the_exact_ceiling_of_the_ratio_written_down(n, p, q):
    p, q = min(p, q), max(p, q)
    exact = ceil(Fraction(p, q) * n)
    assert ch.keep_count(n, p / q) == exact


@given(st.integers(1, 10_000), st.floats(1e-6, 1))
@settings(max_examples=300, deadline=None)
def test_keep_count_is_within_bounds_and_monotone(n, ratio):
    count = ch.keep_count(n, ratio)
    assert 1 <= count <= n
    assert ch.keep_count(n, min(1.0, ratio * 1.1)) >= count
    assert ch.keep_count(n, 1.0) == n


def test_keep_count_does_not_overshoot_as_floats_do():
    assert ch.keep_count(25, 0.28) == 7
    assert ceil(0.28 * 25) == 8  # the control


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, float("nan")])
def test_keep_count_refuses_ratios_out_of_range(ratio):
    with pytest.raises(InputError, match="keep_ratio"):
        ch.keep_count(8, ratio)


def test_keep_count_refuses_no_channels():
    with pytest.raises(InputError, match="at least 1"):
        ch.keep_count(0, 0.5)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.data())
@settings(max_examples=200, deadline=None)
def test_top_channels_are_the_best_with_ties_to_the_lower_index(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    expected = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])
    assert ch.top_channels(np.array(scores, dtype=float), count).tolist() == expected


def test_top_channels_of_a_stack_are_those_of_each_row():
    scores = np.random.default_rng(0).standard_normal((3, 4, 9))
    chosen = ch.top_channels(scores, 5)
    assert chosen.shape == (3, 4, 5)
    for i in range(3):
        for j in range(4):
            assert chosen[i, j].tolist() == ch.top_channels(scores[i, j], 5).tolist()


def test_top_channels_refuse_nan_and_counts_out_of_range():
    with pytest.raises(InputError, match="NaN"):
        ch.top_channels(np.array([1.0, np.nan]), 1)
    for count in (-1, 3):
        with pytest.raises(InputError, match="count"):
            ch.top_channels(np.array([1.0, 2.0]), count)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_energy_over_all_singular_values_is_column_magnitude(shape):
    W = np.random.default_rng(0).standard_normal(shape)
    _, s, Vt = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(ch.topk_column_energy(s, Vt, len(s)), ch.column_energy(W), atol=1e-12)
    for k in range(1, len(s)):
        truncated = ch.topk_column_energy(s, Vt, k)
        assert (truncated <= ch.column_energy(W) + 1e-12).all()
        assert truncated.sum() == pytest.approx(np.sum(s[:k] ** 2))
        assert ch.leverage_scores(Vt, k).sum() == pytest.approx(k)


def test_truncated_scores_see_past_a_loud_noise_column():
    """Many columns share a signal, a loud column has nothing of it: magnitude takes it, the top direction does not."""
    rng = np.random.default_rng(0)
    signal, own = np.linalg.qr(rng.standard_normal((40, 2)))[0].T
    W = np.outer(signal, np.r_[np.full(30, 2.0), 0.0]) + 0.001 * rng.standard_normal((40, 31))
    W[:, 30] += 6 * own
    _, s, Vt = np.linalg.svd(W, full_matrices=False)
    loud = 30
    assert np.argmax(ch.column_energy(W)) == loud
    assert np.argmin(ch.leverage_scores(Vt, 1)) == loud
    assert np.argmin(ch.topk_column_energy(s, Vt, 1)) == loud


def test_column_scores_of_a_stack_are_those_of_each_matrix():
    W = np.random.default_rng(0).standard_normal((3, 7, 5))
    _, s, Vt = np.linalg.svd(W, full_matrices=False)
    for i in range(3):
        np.testing.assert_allclose(ch.column_energy(W)[i], ch.column_energy(W[i]), rtol=1e-14)
        np.testing.assert_allclose(
            ch.topk_column_energy(s, Vt, 2)[i], ch.topk_column_energy(s[i], Vt[i], 2), rtol=1e-14
        )
        np.testing.assert_allclose(ch.leverage_scores(Vt, 2)[i], ch.leverage_scores(Vt[i], 2), rtol=1e-14)


def test_channel_energy_is_the_energy_of_the_rank_one_term():
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((4, 9)), rng.standard_normal((7, 4))
    terms = [np.linalg.norm(np.outer(B[:, k], A[k])) ** 2 for k in range(4)]
    np.testing.assert_allclose(ch.channel_energy(A, B), terms, rtol=1e-12)
    np.testing.assert_allclose(ch.magnitude_B(A, B), np.linalg.norm(B, axis=0), rtol=1e-12)


def test_best_columns_have_the_least_error_of_all_subsets():
    from itertools import combinations

    W = np.random.default_rng(3).standard_normal((6, 7))
    energy = ch.column_energy(W)
    best = rec.subset_error(energy, ch.top_channels(energy, 3))
    assert best == min(rec.subset_error(energy, np.array(kept)) for kept in combinations(range(7), 3))
