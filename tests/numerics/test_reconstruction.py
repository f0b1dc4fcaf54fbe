"""Every closed form against the explicit reconstruction it replaces."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselora.errors import InputError
from sparselora.numerics import reconstruction as rec
from sparselora.numerics.spectra import blas_threads

SHAPES = [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1), (1, 1), (23, 11)]


def matrix(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def svd(W: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(W, full_matrices=False)


def brute_force_rank(W: np.ndarray, target: float) -> int:
    U, s, Vt = svd(W)
    return next(
        k for k in range(len(s) + 1) if rec.relative_error(W, (U[:, :k] * s[:k]) @ Vt[:k]) < target or k == len(s)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_relative_and_spectral_tail_equal_reconstruction(shape):
    W = matrix(shape)
    U, s, Vt = svd(W)
    tail, spectral = rec.relative_tail(s), rec.spectral_tail(s)
    assert tail[0] == 1
    assert tail[-1] == 0
    for k in range(len(s) + 1):
        W_k = (U[:, :k] * s[:k]) @ Vt[:k]
        assert tail[k] == pytest.approx(rec.relative_error(W, W_k), abs=1e-10)
        assert spectral[k] == pytest.approx(np.linalg.norm(W - W_k, 2) / np.linalg.norm(W, 2), abs=1e-10)


def test_small_tails_keep_their_digits():
    s = np.array([1.0, 1e-9, 1e-12])
    assert rec.relative_tail(s)[2] == pytest.approx(1e-12, rel=1e-12)
    # The control: summing from the top loses it altogether.
    assert 1 - np.sum(s[:2] ** 2) / np.sum(s**2) == 0


def test_a_zero_matrix_has_no_error_and_no_rank():
    zero = np.zeros(4)
    assert rec.relative_tail(zero).tolist() == [0] * 5
    assert rec.optimal_rank(zero, 0.1) == rec.energy_rank(zero, 0.9) == rec.gap_rank(zero, 9) == 0
    assert rec.subset_error(np.zeros(3), np.array([0])) == 0
    assert rec.projection_error(np.zeros((3, 3)), np.array([0])) == 0
    assert rec.factor_cosine(np.zeros((3, 2)), matrix((3, 1)), matrix((1, 2))) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", [1e-6, 0.01, 0.1, 0.3, 0.7, 1.5])
def test_optimal_rank_equals_brute_force(shape, target):
    W = matrix(shape, seed=1)
    assert rec.optimal_rank(svd(W)[1], target) == brute_force_rank(W, target)


def test_reading_the_tail_one_place_early_would_answer_one_too_many():
    W = matrix((9, 6)) @ np.diag([4, 3, 2, 0.1, 0.01, 0.001])
    s = svd(W)[1]
    shifted = int(np.argmax(np.concatenate([[1.0], rec.relative_tail(s)[:-1]]) < 0.2))
    assert rec.optimal_rank(s, 0.2) == brute_force_rank(W, 0.2) == shifted - 1


spectra = st.lists(st.floats(0, 1e3), min_size=1, max_size=12).map(lambda values: np.sort(np.array(values))[::-1])


@given(spectra, st.floats(1e-6, 2))
@settings(max_examples=200, deadline=None)
def test_optimal_rank_is_the_least_that_suffices(s, target):
    k = rec.optimal_rank(s, target)
    tail = rec.relative_tail(s)
    assert 0 <= k <= len(s)
    assert tail[k] < target
    assert k == 0 or tail[k - 1] >= target


@given(spectra, st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_energy_rank_is_the_least_that_holds_enough(s, target):
    k = rec.energy_rank(s, target)
    energy = np.concatenate([[0], np.cumsum(s**2)])
    if energy[-1] > 0:
        held = energy / energy[-1]
        assert held[k] >= target - 1e-12
        assert k == 0 or held[k - 1] < target + 1e-12
    else:
        assert k == 0


def test_energy_rank_of_equal_values_counts_them():
    assert [rec.energy_rank(np.ones(10), x) for x in (0.1, 0.5, 0.9, 0.91, 1.0)] == [1, 5, 9, 10, 10]


def test_gap_rank_finds_the_rank_of_a_low_rank_matrix():
    W = matrix((30, 4)) @ matrix((4, 20), 1)
    assert rec.gap_rank(svd(W)[1], 11) == 4
    assert rec.gap_rank(svd(W + 1e-3 * matrix((30, 20), 2))[1], 11) == 4
    assert rec.gap_rank(np.array([5.0]), 0) == rec.gap_rank(np.array([5.0]), 1) == 1


def test_gap_rank_does_not_fall_for_the_smallest_value_of_a_square_matrix():
    s = np.append(np.linspace(10, 1, 30), 1e-3)
    s[:4] *= 2
    assert rec.gap_rank(s, len(s)) == 30  # the control: unbounded, the last ratio wins
    assert rec.gap_rank(s, rec.largest_saving_rank(31, 31)) == 4


@pytest.mark.parametrize("target", [0, -1, float("nan")])
def test_targets_out_of_range_are_refused(target):
    with pytest.raises(InputError, match="target error"):
        rec.optimal_rank(np.ones(3), target)
    with pytest.raises(InputError, match="target energy"):
        rec.energy_rank(np.ones(3), target)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (128, 64)])
def test_storage_rules(shape):
    n, m = shape
    best = rec.largest_saving_rank(n, m)
    assert rec.factor_params(n, m, best) < n * m <= rec.factor_params(n, m, best + 1)
    for k in range(1, min(n, m) + 1):
        c = rec.equal_storage_columns(n, m, k)
        assert c * n <= rec.factor_params(n, m, k)
        assert c == m or (c + 1) * n > rec.factor_params(n, m, k)


@pytest.mark.parametrize("shape", SHAPES)
def test_subset_error_equals_reconstruction_for_triplets_columns_and_rows(shape):
    W = matrix(shape)
    U, s, Vt = svd(W)
    for k in range(1, len(s) + 1):
        kept = np.sort(np.random.default_rng(k).permutation(len(s))[:k])
        partial = (U[:, kept] * s[kept]) @ Vt[kept]
        assert rec.subset_error(s**2, kept) == pytest.approx(rec.relative_error(W, partial), abs=1e-10)
    for axis in (0, 1):
        size = shape[1 - axis]
        kept = np.arange(0, size, 2)
        pruned = np.zeros_like(W)
        index = (slice(None), kept) if axis == 0 else (kept, slice(None))
        pruned[index] = W[index]
        assert rec.subset_error((W**2).sum(axis), kept) == pytest.approx(rec.relative_error(W, pruned), abs=1e-10)


def test_mean_square_over_all_subsets_is_the_share_dropped():
    energy = np.array([5.0, 1.0, 0.5, 2.0, 0.0, 3.0])
    for k in range(1, 7):
        squares = [float(rec.subset_error(energy, np.array(kept))) ** 2 for kept in combinations(range(6), k)]
        assert np.mean(squares) == pytest.approx(1 - k / 6, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 9])
def test_random_factor_errors_equal_reconstruction(shape, k):
    W, (n, m) = matrix(shape), shape
    A, B = matrix((n, k), 1), matrix((k, m), 2)
    R = A @ B
    cosine = rec.factor_cosine(W, A, B)
    rescaled = R * np.linalg.norm(W) / np.linalg.norm(R)
    scaled = R * (W * R).sum() / (R * R).sum()
    assert rec.rescaled_error(cosine) == pytest.approx(
        rec.relative_error(W, rescaled), abs=1e-7 if n * m == 1 else 1e-10
    )
    assert rec.optimally_scaled_error(cosine) == pytest.approx(rec.relative_error(W, scaled), abs=1e-7)
    assert rec.optimally_scaled_error(cosine) <= 1
    if n * m > 20:
        assert rec.optimally_scaled_error(cosine) == pytest.approx(rec.relative_error(W, scaled), abs=1e-10)


def test_the_cosine_of_a_random_product_is_isotropic_whatever_the_matrix_and_rank():
    rng = np.random.default_rng(0)
    W = np.outer(np.arange(1.0, 9.0), np.ones(5))  # rank one: as far from isotropic as can be
    for k in (1, 4):
        squares = rec.factor_cosine(W, rng.standard_normal((40_000, 8, k)), rng.standard_normal((40_000, k, 5))) ** 2
        error = squares.std() / np.sqrt(len(squares))
        assert abs(squares.mean() - 1 / 40) < 4 * error


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (23, 11), (3, 9)])
def test_projection_error_equals_least_squares(shape):
    W = matrix(shape)
    for k in range(1, min(shape)):
        kept = np.sort(np.random.default_rng(k).permutation(shape[1])[:k])
        C = W[:, kept]
        fitted = C @ np.linalg.lstsq(C, W, rcond=None)[0]
        error = rec.projection_error(W.T @ W, kept)
        assert error == pytest.approx(rec.relative_error(W, fitted), abs=1e-10)
        zeroed = rec.subset_error((W**2).sum(0), kept)
        assert error < zeroed  # fitting beats zeroing: they are two different errors


def test_projection_error_survives_dependent_columns():
    W = matrix((8, 6))
    W[:, 1], W[:, 3] = 2 * W[:, 0], 0.0
    for kept in ([0, 1, 2], [1, 3], [3]):
        C = W[:, kept]
        expected = rec.relative_error(W, C @ np.linalg.pinv(C) @ W)
        assert rec.projection_error(W.T @ W, np.array(kept)) == pytest.approx(expected, abs=1e-10)


def test_projection_error_is_never_below_the_best_rank():
    W = matrix((12, 9))
    tail = rec.relative_tail(svd(W)[1])
    for kept in combinations(range(9), 3):
        assert rec.projection_error(W.T @ W, np.array(kept)) >= tail[3] - 1e-12


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (23, 11)])
def test_pruned_spectral_error_equals_reconstruction(shape):
    W = matrix(shape)
    top = np.linalg.norm(W, 2)
    for k in range(1, shape[1] + 1):
        kept = np.sort(np.random.default_rng(k).permutation(shape[1])[:k])
        dropped = W.copy()
        dropped[:, kept] = 0
        error = rec.pruned_spectral_error(W.T @ W, kept, np.asarray(top))
        assert error == pytest.approx(np.linalg.norm(dropped, 2) / top, abs=1e-10)


def test_stacks_equal_one_at_a_time():
    W = np.stack([matrix((9, 6), seed) for seed in range(4)])
    G = W.transpose(0, 2, 1) @ W
    kept = np.array([[0, 1], [2, 5], [1, 4], [0, 5]])
    A, B = np.random.default_rng(9).standard_normal((4, 9, 2)), np.random.default_rng(8).standard_normal((4, 2, 6))
    energy = np.diagonal(G, axis1=1, axis2=2)
    top = np.ones(4)
    for i in range(4):
        assert rec.projection_error(G, kept)[i] == pytest.approx(rec.projection_error(G[i], kept[i]), abs=1e-14)
        assert rec.subset_error(energy, kept)[i] == rec.subset_error(energy[i], kept[i])
        assert rec.factor_cosine(W, A, B)[i] == pytest.approx(rec.factor_cosine(W[i], A[i], B[i]), abs=1e-14)
        one = rec.pruned_spectral_error(G[i], kept[i], top[i])
        assert rec.pruned_spectral_error(G, kept, top)[i] == pytest.approx(one, abs=1e-14)


def test_gaussian_tail_is_the_limit_of_gaussian_matrices():
    for n, m in ((200, 100), (100, 200), (150, 150)):
        with blas_threads(max(n, m)):
            s = svd(matrix((n, m)))[1]
        assert np.abs(rec.gaussian_tail(n, m) - rec.relative_tail(s)).max() < 0.01
    # At finite size it is a little high: .8414/.7026/.4586 where 4,000 draws of 128×64 gave .8404/.7012/.4569.
    np.testing.assert_allclose(rec.gaussian_tail(128, 64)[[8, 16, 32]], [0.8414, 0.7026, 0.4586], atol=5e-5)


def test_relative_error_limits():
    assert rec.relative_error(np.zeros((2, 2)), np.zeros((2, 2))) == 0
    assert rec.relative_error(np.zeros((2, 2)), np.ones((2, 2))) == float("inf")
    assert rec.relative_error(np.ones((2, 2)), np.zeros((2, 2))) == 1


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(20, 12, 3), (12, 20, 5), (4, 9, 7), (9, 4, 7), (5, 5, 1)])
def test_factored_svd_equals_the_svd_of_the_product(d_out, d_in, r):
    B, A = matrix((d_out, r)), matrix((r, d_in), 1)
    U, s, Vt = rec.factored_svd(B, A)
    q = min(r, d_out, d_in)
    assert (U.shape, s.shape, Vt.shape) == ((d_out, q), (q,), (q, d_in))
    np.testing.assert_allclose((U * s) @ Vt, B @ A, atol=1e-10)
    np.testing.assert_allclose(s, np.linalg.svd(B @ A, compute_uv=False)[:q], atol=1e-10)
    np.testing.assert_allclose(U.T @ U, np.eye(q), atol=1e-10)
    np.testing.assert_allclose(Vt @ Vt.T, np.eye(q), atol=1e-10)


def test_factored_svd_of_an_untrained_adapter_is_zero():
    _, s, _ = rec.factored_svd(np.zeros((6, 3)), matrix((3, 5)))
    assert (s == 0).all()


@pytest.mark.parametrize("shape", [(12, 40), (20, 90)])
@pytest.mark.parametrize("count", [3, 11, 30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_span_error_equals_projection_error(shape, count, dtype):
    W = np.random.default_rng(count).standard_normal(shape).astype(dtype)
    exact = W.astype(np.float64)
    kept = np.arange(0, count)
    found = rec.span_error(W[:, kept], exact @ exact.T)
    assert found == pytest.approx(rec.projection_error(exact.T @ exact, kept), abs=1e-7 if count > shape[0] else 1e-10)
    assert (found == 0) == (count >= shape[0])


def test_span_error_is_not_misled_by_wide_but_dependent_columns():
    rng = np.random.default_rng(0)
    W = rng.standard_normal((12, 60))
    W[:, :30] = rng.standard_normal((12, 4)) @ rng.standard_normal((4, 30))
    kept = np.arange(20)
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5)):
        V = W.astype(dtype)
        exact = rec.relative_error(W, W[:, kept] @ np.linalg.pinv(W[:, kept], rcond=1e-5) @ W)
        gram = V.astype(np.float64) @ V.T.astype(np.float64)
        assert exact > 0.4
        assert rec.span_error(V[:, kept], gram) == pytest.approx(exact, abs=tolerance)
