"""Intruder dimensions against numpy's full SVD, planted ones, and their damping against dense projections."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparselora.spectral.factors import adapter_svd, refactor
from sparselora.spectral.intruders import intruder_table, leading_directions, split_by
from sparselora.spectral.modes import EditOptions, edit_spectrum

SHAPES = [(24, 40), (40, 24), (30, 30), (7, 50), (50, 7), (1, 9)]


def random_case(shape: tuple[int, int], r: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    W0 = torch.randn(shape, generator=draw)
    A, B = torch.randn(r, shape[1], generator=draw), 0.7 * torch.randn(shape[0], r, generator=draw)
    return W0, A, B


def planted(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """W0 with a decaying spectrum; A and B of rank 2: a large update along a mixture of all W0's left singular vectors,
    and one along W0's own first. The mixture is the last value."""
    W0 = random_case(shape, seed=seed)[0].double().numpy()
    U, s, Vt = np.linalg.svd(W0, full_matrices=False)
    n = len(s)
    W0 = (U * np.linspace(10, 1, n)) @ Vt
    mixture = U @ np.full(n, 1 / np.sqrt(n))
    A = torch.from_numpy(np.stack([Vt[n // 2], Vt[0]]))
    B = torch.from_numpy(np.stack([40 * mixture, 5 * U[:, 0]], axis=1))
    return torch.from_numpy(W0), A, B, mixture


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 5, 100])
def test_leading_directions_are_those_of_a_full_svd(shape, k):
    W0, A, B = random_case(shape)
    leading = leading_directions(W0, A, B, -0.5, k)
    U, sigma, _ = np.linalg.svd(
        W0.double().numpy() - 0.5 * B.double().numpy() @ A.double().numpy(), full_matrices=False
    )
    U0, _, _ = np.linalg.svd(W0.double().numpy(), full_matrices=False)
    k = min(k, len(sigma))
    np.testing.assert_allclose(leading.sigma, sigma[:k], rtol=1e-9)
    likeness = np.abs((leading.U.numpy() * U[:, :k]).sum(axis=0))
    np.testing.assert_allclose(likeness, 1, atol=1e-9)
    np.testing.assert_allclose(leading.cosine, np.abs(U0.T @ U[:, :k]).max(axis=0), atol=1e-7)
    # The control: W0's own directions are others.
    if min(shape) > 3:
        assert np.abs((U0[:, :k] * U[:, :k]).sum(axis=0)).min() < 0.99


def test_a_base_without_full_rank_has_no_more_directions_than_its_rank():
    W0, A, B = random_case((12, 20))
    W0[:6] = 0
    B[:6] *= 9
    leading = leading_directions(W0, A, B, 1.0, 2)
    U0, s, _ = np.linalg.svd(W0.double().numpy(), full_matrices=False)
    U = np.linalg.svd((W0.double() + B.double() @ A.double()).numpy())[0][:, :2]
    np.testing.assert_allclose(leading.cosine, np.abs(U0[:, s > 1e-9].T @ U).max(axis=0), atol=1e-9)
    nothing = leading_directions(torch.zeros(12, 20), A, B, 1.0, 2)
    assert not nothing.cosine.any()


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)])
def test_a_planted_intruder_is_found_and_nothing_else(shape):
    W0, A, B, mixture = planted(shape)
    leading = leading_directions(W0, A, B, 1.0, 10)
    split = split_by(A, B, 1.0, leading, 0.6)
    assert split.is_leading_intruder.tolist() == [True] + [False] * 9
    assert abs(float(leading.U[:, 0] @ torch.from_numpy(mixture))) > 0.95
    # Without that update there is none, whatever the size of the other.
    leading = leading_directions(W0, A[1:], 10 * B[:, 1:], 1.0, 10)
    assert not split_by(A[1:], 10 * B[:, 1:], 1.0, leading, 0.6).is_leading_intruder.any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [1, 3, 6])
@pytest.mark.parametrize("threshold", [0.4, 0.8, 1.0])
def test_a_split_is_the_update_in_orthogonal_directions(shape, r, threshold):
    W0, A, B = random_case(shape, r)
    split = split_by(A, B, -0.5, leading_directions(W0, A, B, -0.5, 4), threshold)
    update = -0.5 * B.double() @ A.double()
    torch.testing.assert_close((split.U * split.sigma) @ split.V.T, update, rtol=1e-9, atol=1e-9)
    alive = split.sigma > 0
    U = split.U[:, alive]
    torch.testing.assert_close(U.T @ U, torch.eye(int(alive.sum()), dtype=U.dtype), rtol=0, atol=1e-7)
    torch.testing.assert_close(U.T @ update, split.sigma[alive, None] * split.V[:, alive].T, rtol=0, atol=1e-7)
    if not split.is_leading_intruder.any():
        torch.testing.assert_close(split.sigma, adapter_svd(A, B, -0.5).sigma)


@pytest.mark.parametrize("factor", [0.0, 0.8, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_damping_scales_what_the_update_has_along_the_intruders_and_keeps_lora_A(shape, dtype, factor):
    W0, A, B, _ = planted(shape)
    A, B = A.to(dtype), B.to(dtype)
    leading = leading_directions(W0, A, B, 2.0, 10)
    split = split_by(A, B, 2.0, leading, 0.6)
    ones = np.ones(split.rank)
    options = EditOptions(sup_factor=factor)
    result = edit_spectrum("damp_intruders", split.sigma, ones, ones, ones, options, is_intruder=split.intruder_flags)
    assert result.count("noise") == split.is_leading_intruder.sum() >= 1
    new_A, new_B = refactor(split, torch.from_numpy(result.sigma), A, B, 2.0)
    assert new_A is A
    assert (new_B.shape, new_B.dtype) == (B.shape, B.dtype)
    # By dense matrices: numpy's SVD of the whole, its intruders projected out.
    update = 2.0 * B.double().numpy() @ A.double().numpy()
    U, U0 = (np.linalg.svd(W)[0] for W in (W0.numpy() + update, W0.numpy()))
    n = min(shape)
    P = U[:, :10][:, np.abs(U0[:, :n].T @ U[:, :10]).max(axis=0) < 0.6]
    wanted = update + (factor - 1) * P @ (P.T @ update)
    error = np.linalg.norm(2.0 * new_B.double().numpy() @ A.double().numpy() - wanted) / np.linalg.norm(update)
    assert error < (1e-6 if dtype == torch.float32 else 4e-3)
    assert result.change_l2 == pytest.approx(np.linalg.norm(wanted - update), rel=1e-6)
    assert np.linalg.norm(wanted - update) > 0.1 * np.linalg.norm(update), "the control: there is much to damp"


def test_a_factor_of_one_returns_the_factors_bit_for_bit():
    W0, A, B, _ = planted((40, 64))
    split = split_by(A, B, 1.0, leading_directions(W0, A, B, 1.0, 10), 0.6)
    assert split.rank == 3
    assert all(new is old for new, old in zip(refactor(split, split.sigma, A, B, 1.0), (A, B)))


def test_the_table_has_the_share_of_the_update_along_each_direction():
    W0, A, B, _ = planted((40, 64))
    split = split_by(A, B, 1.0, leading_directions(W0, A, B, 1.0, 6), 0.6)
    table = intruder_table({"layer": split})
    update = (B @ A).numpy()
    shares = ((split.leading.U.numpy().T @ update) ** 2).sum(axis=1) / (update**2).sum()
    np.testing.assert_allclose(table["energy_share"], shares, atol=1e-12)
    assert table["is_intruder"].tolist() == [1, 0, 0, 0, 0, 0]
    assert shares[0] > 0.9
