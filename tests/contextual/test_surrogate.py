"""Calibrated stand-ins against least squares by other means: scikit-learn, alternating least squares, brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from torch.nn import functional as F

from sparselora.contextual.cache import Cache
from sparselora.contextual.estimator import (
    channel_norms,
    oracle_attention_scores,
    svd_factors,
)
from sparselora.contextual.surrogate import (
    AffineMap,
    AffineStatistics,
    AttentionStatistics,
    ChannelStatistics,
    fit_affine,
    fit_low_rank,
)
from sparselora.errors import InputError

SHAPES = [(6, 4), (4, 6), (5, 5), (7, 1), (1, 7)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def pairs(d_in: int, d_out: int, n: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs away from zero, and outputs that depend on them beyond a linear map."""
    x = normal(n, d_in, seed=seed) @ normal(d_in, d_in, seed=100) + 3
    return x, torch.tanh(x @ normal(d_in, d_out, seed=101)) + 0.3 * x @ normal(d_in, d_out, seed=102) - 2


def statistics(x: torch.Tensor, y: torch.Tensor | None = None) -> AffineStatistics:
    made = AffineStatistics(x.shape[1], 0 if y is None else y.shape[1])
    made.update(x, y)
    return made


def loss(fitted: AffineMap, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((fitted.apply(x) - y).square().sum())


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- moments -------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_valid_tokens_however_they_are_cut():
    x, y = pairs(5, 3, n=41)
    mask = torch.from_numpy(np.random.default_rng(1).random(41) < 0.6)
    dirty_x, dirty_y = x.clone(), y.clone()
    dirty_x[~mask], dirty_y[~mask] = torch.nan, torch.inf
    whole, parts, other = AffineStatistics(5, 3), AffineStatistics(5, 3), AffineStatistics(5, 3)
    whole.update(dirty_x, dirty_y, mask)
    for start, end in ((0, 7), (7, 8), (8, 8), (8, 20)):
        parts.update(dirty_x[start:end], dirty_y[start:end], mask[start:end].float())
    other.update(dirty_x[20:], dirty_y[20:], mask[20:].long())
    other.update(dirty_x[:5], dirty_y[:5], torch.zeros(5))  # nobody votes
    parts.merge(other)
    parts.merge(AffineStatistics(5, 3))
    x, y = x[mask].numpy(), y[mask].numpy()
    joint = np.cov(x.T, y.T, ddof=0) * len(x)
    for made in (whole, parts):
        assert made.count == len(x)
        close(made.mean_x, torch.from_numpy(x.mean(0)))
        close(made.mean_y, torch.from_numpy(y.mean(0)))
        close(made.xx, torch.from_numpy(joint[:5, :5]))
        close(made.xy, torch.from_numpy(joint[:5, 5:]))


def test_features_far_from_zero_lose_no_digits():
    x = normal(500, 3)
    made = AffineStatistics(3)
    for part in (x + 1e8).split(64):
        made.update(part)
    centred = (x + 1e8) - (x + 1e8).mean(0)
    close(made.xx, centred.T @ centred, atol=1e-4)
    # The control: sums about zero have none left.
    far = x + 1e8
    naive = far.T @ far - len(x) * torch.outer(far.mean(0), far.mean(0))
    assert (naive - centred.T @ centred).abs().max() > 1


def test_moments_are_float64_and_the_same_every_time():
    x, y = (part.to(torch.bfloat16) for part in pairs(4, 3))
    first, second = statistics(x, y), statistics(x, y)
    for name, part in first.tensors().items():
        assert part.dtype == torch.float64
        assert torch.equal(part, second.tensors()[name])
        assert not part.requires_grad
    close(first.mean_x, x.double().mean(0))


def test_an_update_needs_what_it_was_made_for():
    with pytest.raises(InputError, match="needs y"):
        AffineStatistics(4, 3).update(normal(5, 4))
    with pytest.raises(InputError, match="needs y"):
        AffineStatistics(4).update(normal(5, 4), normal(5, 3))


# --- affine fits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_at_full_rank_and_without_ridge_it_is_least_squares(d_in, d_out):
    x, y = pairs(d_in, d_out)
    oracle = LinearRegression().fit(x.numpy(), y.numpy())
    for ridge in (0.0, 1e-13):
        fitted = fit_affine(statistics(x, y), rank=50, ridge=ridge)
        assert fitted.rank == min(d_in, d_out)
        close(fitted.up @ fitted.down, torch.from_numpy(oracle.coef_))
        close(fitted.bias, torch.from_numpy(oracle.intercept_))
    # The controls: ridge and a lower rank are other maps.
    assert not torch.allclose(fit_affine(statistics(x, y), 50, ridge=1.0).apply(x), fitted.apply(x), atol=1e-3)
    if min(d_in, d_out) > 1:
        assert loss(fit_affine(statistics(x, y), 1, 0.0), x, y) > 1.001 * loss(fitted, x, y)


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("ridge", [1e-12, 1e-3, 2.0])
def test_at_full_rank_it_is_ridge_regression(d_in, d_out, ridge):
    """Both ways to solve, below and above the ridge from which Cholesky is trusted."""
    x, y = pairs(d_in, d_out)
    penalty = ridge * float(x.var(dim=0, correction=0).mean()) * len(x)
    oracle = Ridge(alpha=penalty, solver="svd").fit(x.numpy(), y.numpy())
    fitted = fit_affine(statistics(x, y), rank=50, ridge=ridge)
    close(fitted.apply(x), torch.from_numpy(oracle.predict(x.numpy())).reshape(y.shape), atol=1e-8)


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 4), (4, 6)])
@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_of_its_rank_it_is_the_best(d_in, d_out, ridge):
    """No minimum that alternating least squares finds, from anywhere, is lower; on rows that carry the penalty too."""
    x, y = pairs(d_in, d_out)
    fitted = fit_affine(statistics(x, y), rank=2, ridge=ridge)
    penalty = ridge * float(x.var(dim=0, correction=0).mean()) * len(x)
    X = torch.cat([x - x.mean(0), penalty**0.5 * torch.eye(d_in, dtype=torch.float64)])
    Y = torch.cat([y - y.mean(0), torch.zeros(d_in, d_out, dtype=torch.float64)])

    def objective(down, up):
        return float((X @ down.T @ up.T - Y).square().sum())

    got, found = objective(fitted.down, fitted.up), []
    for seed in range(4):
        down = normal(2, d_in, seed=seed)
        for _ in range(400):
            up = torch.linalg.lstsq(X @ down.T, Y).solution.T
            down = (torch.linalg.pinv(up) @ torch.linalg.lstsq(X, Y).solution.T).contiguous()
        found.append(objective(down, up))
        random = normal(2, d_in, seed=seed)
        assert objective(random, torch.linalg.lstsq(X @ random.T, Y).solution.T) > got
    assert min(found) == pytest.approx(got, rel=1e-9)
    # The control: the least-squares map truncated by its own SVD takes no notice of the inputs, and is worse.
    down, up = svd_factors(torch.linalg.lstsq(X, Y).solution.T, 2)
    assert objective(down, up) > 1.01 * got


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 10.0])
def test_the_mean_is_exact_at_every_rank_and_ridge(d_in, d_out, ridge):
    x, y = pairs(d_in, d_out)
    for rank in (1, 3):
        fitted = fit_affine(statistics(x, y), rank, ridge)
        close(fitted.apply(x).mean(0), y.mean(0), atol=1e-12)
    low = fit_low_rank(statistics(x), normal(d_out, d_in), normal(d_out, seed=1), 1)
    close(low.apply(x).mean(0), F.linear(x, normal(d_out, d_in), normal(d_out, seed=1)).mean(0), atol=1e-12)


@pytest.mark.parametrize(("d_in", "d_out"), [(9, 6), (6, 9)])
def test_a_map_of_that_rank_is_recovered(d_in, d_out):
    x, _ = pairs(d_in, d_out, n=80)
    W, b = normal(d_out, 3, seed=5) @ normal(3, d_in, seed=6), normal(d_out, seed=7)
    y = F.linear(x, W, b)
    for rank in (3, 5):
        fitted = fit_affine(statistics(x, y), rank, ridge=0.0)
        close(fitted.up @ fitted.down, W, atol=1e-8)
        close(fitted.bias, b, atol=1e-8)
    assert loss(fit_affine(statistics(x, y), 2, ridge=0.0), x, y) > 1e-4 * float((y - y.mean(0)).square().sum())


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_fewer_tokens_than_features_and_features_that_do_not_vary(ridge):
    x, y = pairs(8, 3, n=6)
    x[:, 2] = 4.0
    fitted = fit_affine(statistics(x, y), 3, ridge)
    assert all(torch.isfinite(part).all() for part in fitted.tensors().values())
    if ridge == 0:
        oracle = LinearRegression().fit(x.numpy(), y.numpy())  # of least norm too
        close(fitted.up @ fitted.down, torch.from_numpy(oracle.coef_), atol=1e-7)
    one = fit_affine(statistics(x[:1], y[:1]), 3, ridge)
    close(one.apply(x), y[:1].expand(6, 3))


def test_fits_refuse_what_they_cannot_use():
    x, y = pairs(4, 3)
    with pytest.raises(InputError, match="rank must be at least 1"):
        fit_affine(statistics(x, y), 0)
    with pytest.raises(InputError, match="ridge"):
        fit_affine(statistics(x, y), 2, ridge=-1.0)
    with pytest.raises(InputError, match="inputs alone"):
        fit_affine(statistics(x), 2)
    with pytest.raises(InputError, match="calibration_samples"):
        fit_affine(AffineStatistics(4, 3), 2)
    with pytest.raises(InputError, match="NaN"):
        fit_affine(statistics(x, y * torch.inf), 2)


# --- known linear maps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_fit_of_a_linear_map_needs_no_outputs(d_in, d_out, biased):
    x, _ = pairs(d_in, d_out)
    W, b = normal(d_out, d_in, seed=3), normal(d_out, seed=4) if biased else None
    for rank in range(1, min(d_in, d_out) + 1):
        fast, slow = fit_low_rank(statistics(x), W, b, rank), fit_affine(statistics(x, F.linear(x, W, b)), rank, 0.0)
        close(fast.apply(x), slow.apply(x), atol=1e-8)
    close(fast.apply(x), F.linear(x, W, b), atol=1e-8)


def test_low_rank_of_a_projection_beats_its_svd_where_inputs_are_not_white():
    d, rank = 24, 4
    scales = torch.logspace(0, 2, d, dtype=torch.float64).flip(0)
    x, held_out = normal(900, d) * scales + 5, normal(900, d, seed=1) * scales + 5
    W, b = normal(16, d, seed=2) / scales.sqrt(), normal(16, seed=3)
    true = F.linear(held_out, W, b)
    down, up = svd_factors(W, rank)
    svd = AffineMap(down, up, statistics(F.linear(x, W, b)).mean_x - up @ (down @ x.mean(0)))  # its mean is right too
    assert loss(fit_low_rank(statistics(x), W, b, rank), held_out, true) < 0.8 * loss(svd, held_out, true)
    # The control: for white inputs the two are the same map.
    white = torch.linalg.qr(x - x.mean(0))[0]
    same = fit_low_rank(statistics(white), W, b, rank)
    close(same.up @ same.down, up @ down)


# --- maps ---------------------------------------------------------------------------------------------------------


def test_a_map_moves_counts_and_passes_through_the_cache(tmp_path):
    x, y = pairs(5, 3)
    stats = statistics(x, y)
    fitted = fit_affine(stats, 2)
    small = fitted.to(dtype=torch.float32)
    assert {part.dtype for part in small.tensors().values()} == {torch.float32}
    torch.testing.assert_close(small.apply(x.float()).double(), fitted.apply(x), rtol=0, atol=1e-5)
    assert (fitted.macs, fitted.flops_per_token) == (2 * 8, 4 * 8)
    assert fitted.apply(x.view(4, 15, 5)).shape == (4, 15, 3)
    channels = ChannelStatistics(5)
    channels.update(x)
    for name, thing in (("map", fitted), ("moments", stats), ("channels", channels)):
        for _ in range(2):
            read = Cache(tmp_path).fetch(name, {"weight": "a"}, thing.tensors)
        back = type(thing).from_tensors(read)
        assert all(torch.equal(part, back.tensors()[key]) for key, part in thing.tensors().items())
    assert len(list(tmp_path.iterdir())) == 3


# --- channels ------------------------------------------------------------------------------------------------------


def test_channel_statistics_against_all_tokens_at_once():
    h = normal(30, 7) + 1
    mask = torch.arange(30) % 3 > 0
    dirty = h.clone()
    dirty[~mask] = torch.nan
    first, second = ChannelStatistics(7), ChannelStatistics(7)
    first.update(dirty[:11], mask[:11])
    second.update(dirty[11:], mask[11:].int())
    first.merge(second)
    assert first.count == mask.sum()
    close(first.mean, h[mask].mean(0))
    close(first.norms, channel_norms(h[mask]))
    assert not ChannelStatistics(3).mean.any()


@pytest.mark.parametrize("rope", [False, True])
def test_attention_statistics_score_as_the_oracle_of_all_tokens(rope):
    shape = {"heads": 6, "kv_heads": 2, "head_dim": 4, "rope": rope}
    q, k, v = normal(20, 24), normal(20, 8, seed=1), normal(20, 8, seed=2)
    made = AttentionStatistics(**shape)
    for part in (slice(0, 13), slice(13, 20)):
        made.update(q[part], k[part], v[part])
    for got, want in zip(made.scores(), oracle_attention_scores(q, k, v, **shape)):
        close(got, want)
