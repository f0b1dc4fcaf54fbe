"""The mathematics of per-token gates against independent computations: features, selection, gradients, padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparselora.token_gates.scores import (
    Pass,
    gated_product,
    log_energy,
    projection_features,
    select_topk,
    token_statistics,
)

R = 5


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """The mask of the k largest of each row, the lower index first among equals."""
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(-scores, axis=-1, kind="stable")[..., :k], True, axis=-1)
    return mask


@pytest.mark.parametrize("r", [2, 3, 8, 13])
def test_topk_is_the_stable_order_of_the_scores(r: int) -> None:
    rng = np.random.default_rng(0)
    for scores in (rng.normal(size=(50, r)), rng.integers(0, 3, (200, r)).astype(float), np.zeros((4, r))):
        for k in range(1, r):
            mask, theta = select_topk(torch.from_numpy(scores), k)
            assert (mask.numpy() == top(scores, k)).all()
            ordered = -np.sort(-scores, axis=-1)
            assert theta.shape == (len(scores), 1)
            np.testing.assert_allclose(theta[:, 0], (ordered[:, k - 1] + ordered[:, k]) / 2)


def test_features_are_finite_and_what_they_are_called() -> None:
    x, z = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, R, dtype=torch.float64)
    x[1], z[1] = 0, 0
    seen = projection_features(z)
    np.testing.assert_allclose(seen[0, :R], np.log(np.abs(z[0]) + 1e-6), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen[0, R:], z[0] / np.linalg.norm(z[0]), rtol=1e-5)
    assert (seen[1, R:] == 0).all()
    rms = np.sqrt((x[2].numpy() ** 2).mean())
    expected = [np.log(x[2].norm()), x[2].mean() / rms, np.log(x[2].abs().max()), x[2].abs().mean() / rms]
    np.testing.assert_allclose(token_statistics(x)[2], expected, rtol=1e-4)
    for values in (seen, token_statistics(x), log_energy(z, torch.zeros(4, R))):
        assert values.dtype == torch.float32
        assert values.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("select", ["topk", "threshold"])
def test_straight_through_gradient_is_its_definition(select: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z, scores, G = (torch.randn(11, R, generator=generator, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    scores.requires_grad_()
    mask, theta = select_topk(scores, 2) if select == "topk" else (scores > 0, scores.new_zeros(()))
    out = gated_product(z, scores, mask, theta, temperature)
    assert torch.equal(out, torch.where(mask, z, 0.0))
    grad_z, grad_scores = torch.autograd.grad((out * G).sum(), (z, scores))
    assert torch.equal(grad_z, G * mask)
    smooth = z.detach() * torch.sigmoid((scores - theta.detach()) / temperature)
    (expected,) = torch.autograd.grad((smooth * G).sum(), scores)
    torch.testing.assert_close(grad_scores, expected, rtol=1e-12, atol=1e-14)
    assert expected.abs().max() > 1e-2


def test_relaxed_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    z, scores = (torch.randn(4, R, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    mask, theta = select_topk(scores, 2)
    assert torch.autograd.gradcheck(lambda z, s: gated_product(z, s, mask, theta, 0.7, relaxed=True), (z, scores))
    with pytest.raises(Exception, match="Jacobian mismatch"):  # the control: the hard mask has no such gradient
        torch.autograd.gradcheck(lambda z, s: gated_product(z, s, mask, theta, 0.7), (z, scores))


def test_which_tokens_count_by_shape() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    run = Pass(mask)
    assert run.valid(torch.zeros(2, 4, R)).tolist() == mask.bool().flatten().tolist()
    assert run.valid(torch.zeros(8, R)).tolist() == mask.bool().flatten().tolist()
    assert Pass(mask.flip(1)).valid(torch.zeros(2, 2, R)).tolist() == [False, False, True, False]  # the last columns
    assert run.valid(torch.zeros(2, R)).tolist() == [True, True]  # pooled
    assert run.valid(torch.zeros(3, 4, R)).all()


@pytest.mark.gpu
def test_ties_go_to_the_lower_index_on_a_gpu() -> None:
    scores = torch.randint(0, 3, (4096, 16), device="cuda").float()
    mask, _ = select_topk(scores, 5)
    assert np.array_equal(mask.cpu().numpy(), top(scores.cpu().numpy(), 5))
