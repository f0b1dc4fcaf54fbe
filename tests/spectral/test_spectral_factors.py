from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparselora.errors import InputError
from sparselora.spectral.factors import AdapterSVD, adapter_svd, refactor, truncated


def pair(d_out: int, d_in: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, d_in, generator=generator, dtype=torch.float64)
    B = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
    return A.to(dtype), B.to(dtype)


def dense(A: torch.Tensor, B: torch.Tensor, scaling: float) -> np.ndarray:
    return scaling * B.double().numpy() @ A.double().numpy()


def product(svd: AdapterSVD) -> np.ndarray:
    return ((svd.U * svd.sigma) @ svd.V.T).numpy()


def distance(X: np.ndarray, Y: np.ndarray) -> float:
    """‖X − Y‖ / ‖Y‖, or ‖X‖ where Y is zero."""
    return float(np.linalg.norm(X - Y) / (np.linalg.norm(Y) or 1.0))


# --- the decomposition --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(1, 23), d_in=st.integers(1, 23), r=st.integers(1, 12), seed=st.integers(0, 99),
    scaling=st.sampled_from([2.0, 0.5, 1e-6, -1.5]), spread=st.sampled_from([0.0, 3.0, 9.0]),
)  # fmt: skip
def test_equals_the_dense_svd_in_float64(d_out, d_in, r, seed, scaling, spread):
    A, B = pair(d_out, d_in, r, seed, torch.float64)
    A *= 10.0 ** torch.linspace(0, -spread, r, dtype=torch.float64)[:, None]
    B = B @ pair(r, r, r, seed + 1, torch.float64)[0]  # rows of A and columns of B of all conditions
    svd = adapter_svd(A, B, scaling)
    W = dense(A, B, scaling)
    k = min(r, d_out, d_in)
    expected = np.linalg.svd(W, compute_uv=False)[:k]
    assert svd.U.shape == (d_out, r)
    assert svd.sigma.shape == (r,)
    assert svd.V.shape == (d_in, r)
    np.testing.assert_allclose(svd.sigma[:k].numpy(), expected, atol=1e-10 * max(expected[0], 1e-300))
    assert distance(product(svd), W) < 1e-10
    assert (svd.sigma[:-1] >= svd.sigma[1:]).all()
    for basis in (svd.U, svd.V):
        np.testing.assert_allclose((basis[:, :k].T @ basis[:, :k]).numpy(), np.eye(k), atol=1e-9)
        assert not basis[:, k:].any()
    assert not svd.sigma[k:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_stored_type_is_decomposed_in_float64(dtype):
    A, B = pair(40, 30, 5, dtype=dtype)
    svd = adapter_svd(A, B, 2.0)
    assert svd.sigma.dtype == svd.U.dtype == svd.V.dtype == torch.float64
    assert distance(product(svd), dense(A, B, 2.0)) < 1e-12


def test_both_ways_to_an_orthogonal_basis_agree_and_are_taken(monkeypatch):
    calls = []
    householder = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda M: calls.append(M.shape) or householder(M))
    A, B = pair(50, 40, 6, dtype=torch.float64)
    fast = adapter_svd(A, B, 1.0)
    assert calls == []
    # Lengths alone are no ill condition: Cholesky-QR does not see them.
    adapter_svd(A * 10.0 ** torch.arange(0, -12, -2)[:, None], B, 1.0)
    assert calls == []
    # Nearly parallel rows are; the Gram matrix has lost them, Householder has not.
    C = A.clone()
    C[1] = C[0] + 1e-9 * C[1]
    assert distance(product(adapter_svd(C, B, 1.0)), dense(C, B, 1.0)) < 1e-12
    assert calls == [(40, 6)]
    monkeypatch.setattr("sparselora.spectral.factors._LARGEST_CONDITION", 0.0)
    slow = adapter_svd(A, B, 1.0)
    assert len(calls) == 3
    np.testing.assert_allclose(fast.sigma, slow.sigma, rtol=1e-13)
    # The control: what the limit is for. Trusting Cholesky here loses the basis.
    monkeypatch.setattr("sparselora.spectral.factors._LARGEST_CONDITION", 1e30)
    C[1] = C[0] + 1e-7 * A[1]
    lost = adapter_svd(C, B, 1.0).V
    assert (lost.T @ lost - torch.eye(6)).abs().max() > 1e-6


def test_deficient_ranks_give_zeros_that_are_exact():
    A, B = pair(30, 20, 6, dtype=torch.float64)
    A[3:], B[:, 3:] = A[:3], B[:, :3]
    svd = adapter_svd(A, B, 2.0)
    assert (svd.sigma[:3] > 0.1).all()
    assert (svd.sigma[3:] == 0).all()
    raw = np.linalg.svd(dense(A, B, 2.0), compute_uv=False)[:6]
    assert (raw[3:] > 0).all(), "the control: rounding does not give zeros by itself"
    # A small value that is real stays.
    A, B = pair(30, 20, 2, dtype=torch.float64)
    A[1] *= 1e-11
    assert adapter_svd(A, B, 1.0).sigma[1] > 0


@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_zero_adapters(zero):
    A, B = pair(9, 8, 4)
    A = torch.zeros_like(A) if zero != "B" else A
    B = torch.zeros_like(B) if zero != "A" else B
    svd = adapter_svd(A, B, 2.0)
    assert not svd.sigma.any()
    np.testing.assert_allclose((svd.V.T @ svd.V).numpy(), np.eye(4), atol=1e-12)
    for round_trip in (False, True):
        new_A, new_B = refactor(svd, svd.sigma, A, B, 2.0, round_trip=round_trip)
        assert torch.equal(new_A, A)
        assert torch.equal(new_B, B)


def test_repeated_values_are_one_space():
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 8)))[0]
    A, B = torch.from_numpy(Q[:, :4].T.copy()), torch.from_numpy(Q[:, 4:].copy())
    svd = adapter_svd(A, B, 3.0)
    np.testing.assert_allclose(svd.sigma.numpy(), 3.0, rtol=1e-13)
    assert distance(product(svd), dense(A, B, 3.0)) < 1e-13


def test_bad_factors_are_refused():
    A, B = pair(9, 8, 4)
    for left, right in [(A, B[:, :3]), (A[0], B), (A[:0], B[:, :0])]:
        with pytest.raises(InputError, match="lora_A must be"):
            adapter_svd(left, right, 1.0)
    A[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        adapter_svd(A, B, 1.0)


class LargestTensor(TorchDispatchMode):
    """The most elements that any result of an operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_nothing_of_the_size_of_the_matrix_is_allocated():
    d, r = 200_000, 4  # the product would be 320 GB
    A, B = pair(d, d, r)
    with LargestTensor() as seen:
        svd = adapter_svd(A, B, 2.0)
        sigma = svd.sigma * torch.tensor([2.0, 1, 1, 0.5])
        new_A, new_B = refactor(svd, sigma, A, B, 2.0)
        truncated(svd, 2)
    assert seen.elements == d * r
    np.testing.assert_allclose(adapter_svd(new_A, new_B, 2.0).sigma, sigma, rtol=1e-6)
    # The control: the mode sees a product where there is one.
    with LargestTensor() as seen:
        B[:300] @ A[:, :300]
    assert seen.elements == 300 * 300
    tracemalloc.start()
    adapter_svd(A, B, 2.0).sigma.numpy()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# --- new factors --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    d_out=st.integers(1, 19), d_in=st.integers(1, 19), r=st.integers(1, 10), seed=st.integers(0, 99),
    scaling=st.sampled_from([2.0, 0.25, -1.0]),
)  # fmt: skip
def test_refactor_gives_the_spectrum_it_is_asked_for(d_out, d_in, r, seed, scaling):
    A, B = pair(d_out, d_in, r, seed, torch.float64)
    svd = adapter_svd(A, B, scaling)
    factor = torch.from_numpy(np.random.default_rng(seed).choice([0.0, 0.8, 1.25], r))
    new_A, new_B = refactor(svd, svd.sigma * factor, A, B, scaling)
    assert new_A.shape == A.shape
    assert new_B.shape == B.shape
    expected = ((svd.U * (svd.sigma * factor)) @ svd.V.T).numpy()
    np.testing.assert_allclose(dense(new_A, new_B, scaling), expected, atol=1e-12 * max(1.0, float(svd.sigma[0])))
    assert new_A.any(), "factors that are both 0 could never be trained again"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.bfloat16, 3e-3), (torch.float64, 1e-13)]
)
def test_unchanged_is_bit_for_bit_and_the_round_trip_is_rounding_alone(dtype, tolerance):
    A, B = pair(120, 80, 8, dtype=dtype)
    svd = adapter_svd(A, B, 2.0)
    same_A, same_B = refactor(svd, svd.sigma.clone(), A, B, 2.0)
    assert same_A is A
    assert same_B is B
    new_A, new_B = refactor(svd, svd.sigma, A, B, 2.0, round_trip=True)
    assert not torch.equal(new_A, A)
    assert new_A.dtype == new_B.dtype == dtype
    assert distance(dense(new_A, new_B, 2.0), dense(A, B, 2.0)) < tolerance
    # The control: one direction a hundredth larger is no rounding (in bfloat16 a tenth).
    sigma = svd.sigma.clone()
    sigma[0] *= 1.1 if dtype == torch.bfloat16 else 1.01
    assert distance(dense(*refactor(svd, sigma, A, B, 2.0), 2.0), dense(A, B, 2.0)) > tolerance


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-3), (torch.float16, 2.5e-4), (torch.float32, 3e-8)])
@pytest.mark.parametrize(("d_out", "d_in", "r"), [(120, 80, 8), (300, 200, 1), (200, 300, 36)])
def test_an_edit_is_rounded_in_one_factor_alone(dtype, bound, d_out, d_in, r):
    A, B = pair(d_out, d_in, r, dtype=dtype)
    svd = adapter_svd(A, B, -2.0)
    sigma = svd.sigma * torch.from_numpy(np.random.default_rng(0).choice([0.8, 1.0, 1.25], r))
    expected = ((svd.U * sigma) @ svd.V.T).numpy()
    new_A, new_B = refactor(svd, sigma, A, B, -2.0)
    assert new_A is A
    assert new_B.dtype == dtype
    assert distance(dense(new_A, new_B, -2.0), expected) < bound
    # The control: the split, in which both factors are rounded, is what the bound tells it from.
    both = refactor(svd, sigma, A, B, -2.0, round_trip=True)
    assert bound < distance(dense(*both, -2.0), expected) < 1.7 * bound
    # An energy that is restored leaves sigma a last bit off: no bit of the factors changes.
    same_A, same_B = refactor(svd, svd.sigma * (1 + 2e-16), A, B, -2.0)
    assert torch.equal(same_A, A)
    assert torch.equal(same_B, B)


def test_rows_of_A_that_nearly_depend_on_each_other_are_not_kept():
    """B' would be large and cancel: rounding it would lose the update."""
    A, B = pair(60, 50, 4)
    A[1] = A[0] + 1e-4 * A[1]
    svd = adapter_svd(A, B, 1.0)
    # Of a large sigma where A is small, B has to be large.
    sigma = torch.full_like(svd.sigma, float(svd.sigma[0]))
    new_A, new_B = refactor(svd, sigma, A, B, 1.0)
    assert not torch.equal(new_A, A)
    assert distance(dense(new_A, new_B, 1.0), ((svd.U * sigma) @ svd.V.T).numpy()) < 1e-7
    # The control: with A as it is, as good a B' as float32 holds.
    wanted = ((svd.U * sigma) @ svd.V.T).numpy()
    best = (wanted @ np.linalg.pinv(A.double().numpy())).astype("float32").astype("float64")
    assert distance(best @ A.double().numpy(), wanted) > 1e-5


def test_factors_are_balanced():
    A, B = pair(60, 50, 5, dtype=torch.float64)
    svd = adapter_svd(1e-3 * A, 1e3 * B, 0.5)
    new_A, new_B = refactor(svd, svd.sigma, 1e-3 * A, 1e3 * B, 0.5, round_trip=True)
    for gram in (new_A @ new_A.T, new_B.T @ new_B):
        np.testing.assert_allclose(gram.numpy(), np.diag(2 * svd.sigma.numpy()), atol=1e-10 * float(svd.sigma[0]))


def test_a_direction_edited_to_zero_can_still_be_trained_and_all_of_them_too():
    A, B = pair(12, 10, 4)
    svd = adapter_svd(A, B, 2.0)
    new_A, new_B = refactor(svd, svd.sigma * torch.tensor([1.0, 1, 0, 0]), A, B, 2.0)
    assert not new_B[:, 2:].any()
    assert new_A.any(dim=1).all()
    new_A, new_B = refactor(svd, torch.zeros(4), A, B, 2.0)
    assert torch.equal(new_A, A)
    assert not new_B.any()


@pytest.mark.parametrize("sigma", [[1.0, 2.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0], [[1.0, 1.0, 1.0]]])
def test_bad_spectra_are_refused(sigma):
    A, B = pair(9, 8, 3)
    with pytest.raises(InputError, match="sigma must be 3 finite values"):
        refactor(adapter_svd(A, B, 1.0), torch.tensor(sigma), A, B, 1.0)


def test_a_scaling_of_zero_is_a_zero_adapter():
    A, B = pair(9, 8, 3)
    svd = adapter_svd(A, B, 0.0)
    assert not svd.sigma.any()
    assert refactor(svd, svd.sigma, A, B, 0.0)[1] is B
    with pytest.raises(InputError, match="scaling is 0"):
        refactor(svd, torch.ones(3), A, B, 0.0)


# --- lower ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(30, 20, 6), (7, 50, 5), (4, 9, 6)])
def test_truncation_is_the_best_approximation(d_out, d_in, r):
    A, B = pair(d_out, d_in, r, dtype=torch.float64)
    svd = adapter_svd(A, B, 2.0)
    W = dense(A, B, 2.0)
    s = np.linalg.svd(W, compute_uv=False)
    for rank in range(1, r + 1):
        low_A, low_B = truncated(svd, rank, torch.float64, torch.float64)
        assert low_A.shape == (rank, d_in)
        assert low_B.shape == (d_out, rank)
        error = np.linalg.norm(W - dense(low_A, low_B, 1.0))
        assert error == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), abs=1e-10)
    # The control: the first channels as stored are a worse choice.
    if r > 2:
        assert np.linalg.norm(W - dense(A[:2], B[:, :2], 2.0)) > np.sqrt((s[2:] ** 2).sum()) + 1e-3
    for rank in (0, r + 1):
        with pytest.raises(InputError, match=f"rank must be between 1 and {r}"):
            truncated(svd, rank)


def test_truncating_a_zero_adapter_keeps_it_trainable():
    A, B = pair(9, 8, 4)
    low_A, low_B = truncated(adapter_svd(A, torch.zeros_like(B), 1.0), 2)
    assert not low_B.any()
    np.testing.assert_allclose(low_A.norm(dim=1), 1.0, rtol=1e-6)
