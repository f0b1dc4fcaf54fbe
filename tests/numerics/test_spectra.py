"""Spectra and what they say, against LAPACK's SVD, brute force and WeightWatcher."""

from __future__ import annotations

import numpy as np
import pytest

from sparselora.errors import InputError
from sparselora.numerics import spectra

SHAPES = [(40, 30), (30, 40), (33, 33), (1, 7), (7, 1), (2, 50), (700, 3)]


def matrix(shape: tuple[int, int], seed: int = 0, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["gram64", "svd"])
def test_spectrum_is_that_of_a_float64_svd(shape, method):
    W = matrix(shape, dtype=np.float32)
    found = spectra.spectrum(W, method)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    gap = np.abs(found.s - exact).max() / exact[0]
    assert gap <= min(found.error_bound, 1e-7) + 1e-15
    assert found.total == pytest.approx(np.sum(W.astype(np.float64) ** 2), rel=1e-13)
    assert found.complete


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64])
def test_eigenvectors_of_one_reduction(size):
    W = matrix((size + 5, size))
    G = W.T @ W
    for k in {0, 1, size // 2, size}:
        values, V = spectra.eigen(G, k)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(G)[::-1], rtol=1e-10, atol=1e-12)
        assert V.shape == (size, k)
        np.testing.assert_allclose(V.T @ V, np.eye(k), atol=1e-12)
        np.testing.assert_allclose(G @ V, V * values[:k], atol=1e-11 * values[0])


def test_gram_holds_the_energies_of_both_sides_across_blocks():
    for shape in ((3000, 300), (300, 3000)):
        W = matrix(shape, dtype=np.float32)
        exact = W.astype(np.float64)
        gram = spectra.gram(W)
        small = exact.T @ exact if shape[0] >= shape[1] else exact @ exact.T
        np.testing.assert_allclose(gram.G, small, rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(gram.column_energy, (exact**2).sum(axis=0), rtol=1e-12)
        np.testing.assert_allclose(gram.row_energy, (exact**2).sum(axis=1), rtol=1e-12)


def test_an_unresolved_small_end_falls_back_to_svd():
    U, _ = np.linalg.qr(matrix((50, 20)))
    V, _ = np.linalg.qr(matrix((30, 20), 1))
    s = np.geomspace(1, 1e-9, 20)
    found = spectra.spectrum((U * s) @ V.T)
    assert found.method == "svd"
    np.testing.assert_allclose(found.s[:20], s, rtol=1e-5, atol=0)
    assert spectra.matrix_rank(found.s, 50) == 20
    # The control: the Gram matrix alone would have made up the small end.
    blurred = np.sqrt(spectra.eigen(spectra.gram((U * s) @ V.T).G, 0)[0])
    assert not np.allclose(blurred[:20], s, rtol=1e-2, atol=0)
    assert spectra.spectrum(matrix((50, 30))).method == "gram64"


def test_randomized_states_an_error_that_holds():
    U, _ = np.linalg.qr(matrix((200, 60)))
    V, _ = np.linalg.qr(matrix((90, 60), 1))
    for decay, tight in ((2.0, True), (0.1, False)):
        s = np.arange(1.0, 61) ** -decay
        W = (U * s) @ V.T
        found, left, right = spectra.randomized_spectrum(W, 8, np.random.default_rng(0))
        exact = np.linalg.svd(W, compute_uv=False)
        gap = (exact[:8] - found.s) / found.s[0]
        assert (gap > -1e-12).all()
        assert gap.max() <= found.error_bound
        assert (found.error_bound < 0.01) == tight
        assert left.shape == (200, 8)
        np.testing.assert_allclose(right @ right.T, np.eye(8), atol=1e-10)
    with pytest.raises(InputError, match="rank must be between"):
        spectra.randomized_spectrum(W, 0, np.random.default_rng(0))


def test_ranks_of_known_spectra():
    flat, one = np.ones(16), np.array([3.0, 0, 0, 0])
    assert spectra.stable_rank(flat) == pytest.approx(16)
    assert spectra.effective_rank(flat) == pytest.approx(16)
    assert spectra.relative_entropy(flat, 16) == pytest.approx(1)
    assert spectra.condition(flat) == 1
    assert spectra.stable_rank(one) == 1
    assert spectra.effective_rank(one) == pytest.approx(1)
    assert spectra.matrix_rank(one, 4) == 1
    assert np.isinf(spectra.condition(one))
    assert spectra.stable_rank(np.zeros(3)) == spectra.effective_rank(np.zeros(3)) == 0


def brute_power_law(s: np.ndarray) -> tuple[float, float]:
    x = np.sort(s**2)
    best = (np.inf, 0.0, 0.0)
    for i in range(len(x) - 1):
        tail = x[i:]
        alpha = 1 + len(tail) / np.log(tail / tail[0]).sum()
        distance = np.abs(1 - (tail / tail[0]) ** (1 - alpha) - np.arange(len(tail)) / len(tail)).max()
        if distance < best[0]:
            best = (distance, alpha, tail[0])
    return best[1], best[2]


@pytest.mark.parametrize("size", [20, 64, 65, 150])
def test_power_law_equals_a_loop_over_every_x_min(size):
    s = np.abs(matrix((1, size))[0]) + 0.01
    found = spectra.power_law(s)
    assert (found.alpha, found.x_min) == pytest.approx(brute_power_law(s), rel=1e-10)


def test_power_law_recovers_an_exponent_and_knows_its_limits():
    u = np.random.default_rng(0).random(4000)
    x = (1 - u) ** (-1 / (3.0 - 1))
    assert spectra.power_law(np.sqrt(x)).alpha == pytest.approx(3.0, abs=0.2)
    assert np.isnan(spectra.power_law(np.arange(1.0, 15)).alpha)
    assert np.isnan(spectra.power_law(np.ones(50)).alpha)


@pytest.mark.parametrize("shape", [(300, 300), (600, 200), (200, 600)])
def test_spikes_are_those_that_were_planted(shape):
    noise = matrix(shape, 3) * 0.1
    bulk = spectra.marchenko_pastur(np.linalg.svd(noise, compute_uv=False), *shape)
    assert bulk.sigma == pytest.approx(0.1, rel=0.03)
    assert bulk.spikes == 0
    U, _ = np.linalg.qr(matrix((shape[0], 5), 1))
    V, _ = np.linalg.qr(matrix((shape[1], 5), 2))
    s = np.linalg.svd(noise + 12 * U @ V.T, compute_uv=False)
    assert spectra.marchenko_pastur(s, *shape).spikes == 5


def test_gaussian_null_has_the_law_of_gaussian_matrices():
    shape, draws = (30, 20), 400
    drawn = spectra.gaussian_spectra(*shape, np.random.default_rng(0), draws)
    real = np.linalg.svd(np.random.default_rng(1).standard_normal((draws, *shape)), compute_uv=False)
    error = np.sqrt(drawn.var(axis=0) / draws + real.var(axis=0) / draws)
    assert (np.abs(drawn.mean(axis=0) - real.mean(axis=0)) < 4.5 * error).all()
    np.testing.assert_allclose(drawn.std(axis=0), real.std(axis=0), rtol=0.25)
    curve = spectra.gaussian_energy(30, 20, 0)
    assert curve is spectra.gaussian_energy(20, 30, 0)
    assert curve[0] == 0
    assert curve[-1] == pytest.approx(1)


@pytest.mark.parametrize("size", [1, 2, 5, 40, 200])
def test_largest_eigenvalue_equals_the_full_solver(size):
    for seed, decay in ((0, 0.0), (1, 1.0), (2, 3.0)):
        X = matrix((size + 3, size), seed) * np.arange(1, size + 1) ** -decay
        A = X.T @ X
        assert spectra.largest_eigenvalue(A) == pytest.approx(np.linalg.eigvalsh(A)[-1], rel=1e-12)
    assert spectra.largest_eigenvalue(np.zeros((size, size))) == 0
    assert spectra.largest_eigenvalue(np.eye(size)) == pytest.approx(1, rel=1e-12)


def test_agrees_with_weightwatcher():
    weightwatcher = pytest.importorskip("weightwatcher")
    torch = pytest.importorskip("torch")
    import logging

    layers = {"0": (120, 80), "1": (60, 120)}
    model = torch.nn.Sequential(*(torch.nn.Linear(m, n, bias=False) for n, m in layers.values()))
    weights = [layer.weight.detach().numpy() for layer in model]
    details = weightwatcher.WeightWatcher(model=model, log_level=logging.ERROR).analyze()
    for W, theirs in zip(weights, details.itertuples()):
        found = spectra.spectrum(W)
        assert found.total == pytest.approx(theirs.norm, rel=1e-4)
        assert found.s[0] ** 2 == pytest.approx(theirs.spectral_norm, rel=1e-4)
        assert spectra.stable_rank(found.s) == pytest.approx(theirs.stable_rank, rel=1e-4)
        assert spectra.relative_entropy(found.s, max(W.shape)) == pytest.approx(theirs.entropy, rel=1e-4)
        assert spectra.matrix_rank(found.s, max(W.shape)) == theirs.matrix_rank
        fit = spectra.power_law(found.s)
        assert (fit.alpha, fit.x_min, fit.distance) == pytest.approx((theirs.alpha, theirs.xmin, theirs.D), rel=1e-4)
