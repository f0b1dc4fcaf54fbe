"""Truncation weighted by the inputs: against the SVD of the full ΔW C^½ in numpy, with plain truncation as control."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.linalg import sqrtm
from torch import nn

from sparselora.errors import InputError
from sparselora.spectral.factors import adapter_svd, truncated
from sparselora.spectral.weighted import random_basis, second_moments, weighted_basis

D_IN, D_OUT, R = 13, 9, 5


def problem(seed: int = 0, d_out: int = D_OUT, r: int = R) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Return A, B, inputs ``(200, d_in)`` of very different energy by direction, and their second moment."""
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((r, D_IN)), rng.standard_normal((d_out, r))
    X = rng.standard_normal((200, D_IN)) @ (rng.standard_normal((D_IN, D_IN)) * np.logspace(0, -2, D_IN))
    return torch.tensor(A), torch.tensor(B), X, X.T @ X / len(X)


def product(factors: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    return (factors[1].double() @ factors[0].double()).numpy()


@pytest.mark.parametrize(("d_out", "r"), [(9, 5), (3, 5)])
@pytest.mark.parametrize("scaling", [0.5, -2.0])
def test_it_is_the_best_of_its_rank_on_the_inputs(d_out, r, scaling):
    A, B, X, C = problem(d_out=d_out, r=r)
    W, root = scaling * (B @ A).numpy(), np.real(sqrtm(C))
    basis = weighted_basis(A, B, scaling, torch.tensor((X @ A.numpy().T).T @ (X @ A.numpy().T) / len(X)))
    U, s, Vt = np.linalg.svd(W @ root)
    n = min(d_out, r)
    assert basis.sigma[:n].numpy() == pytest.approx(s[:n], rel=1e-8)
    svd = adapter_svd(A, B, scaling)
    for k in range(1, n):
        W_k = product(truncated(basis.cut(k), k, torch.float64, torch.float64))
        best = (U[:, :k] * s[:k]) @ Vt[:k] @ np.linalg.pinv(root)
        assert W_k == pytest.approx(best, abs=1e-7)
        error = np.linalg.norm((W - W_k) @ root)
        assert error == pytest.approx(np.sqrt((s[k:] ** 2).sum()), rel=1e-7)
        # The mean squared error of the outputs on these very inputs.
        assert error**2 == pytest.approx(np.mean(np.sum((X @ (W - W_k).T) ** 2, axis=1)), rel=1e-7)
        # The controls: the plain SVD does worse on the inputs, though better on all directions alike.
        plain = product(truncated(svd, k, torch.float64, torch.float64))
        assert np.linalg.norm((W - plain) @ root) > 1.01 * error
        assert np.linalg.norm(W - plain) < np.linalg.norm(W - W_k)


def test_for_inputs_of_every_direction_alike_it_is_the_svd():
    A, B, _, _ = problem()
    basis, svd = weighted_basis(A, B, 2.0, A @ A.T), adapter_svd(A, B, 2.0)
    for k in range(1, R + 1):
        factors = (truncated(source, k, torch.float64, torch.float64) for source in (basis.cut(k), svd))
        first, second = map(product, factors)
        assert first == pytest.approx(second, abs=1e-10)


def test_the_control_is_a_random_subspace_of_the_update():
    A, B, _, _ = problem()
    svd = adapter_svd(A, B, 2.0)
    W = 2.0 * (B @ A).numpy()
    basis = random_basis(svd, np.random.default_rng(0))
    assert product(truncated(basis.cut(R), R, torch.float64, torch.float64)) == pytest.approx(W)
    lost = []
    for seed in range(200):
        W_2 = product(truncated(random_basis(svd, np.random.default_rng(seed)).cut(2), 2, torch.float64, torch.float64))
        assert np.linalg.matrix_rank(W_2) == 2
        lost.append(np.linalg.norm(W - W_2) ** 2)
    # A random 2 of 5 directions holds 2/5 of the energy on average.
    assert np.mean(lost) == pytest.approx(0.6 * np.linalg.norm(W) ** 2, rel=0.05)


class Net(nn.Module):
    """Two layers that see (batch, length, d) or, flattened, (batch · length, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.flat = nn.Embedding(20, D_IN), nn.Linear(D_IN, 7), nn.Linear(7, 4)
        self.config: dict[str, object] = {}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.flat(torch.tanh(self.q(self.embed(input_ids))).reshape(-1, 7))


def test_moments_are_of_what_leaves_lora_A_without_padding():
    torch.manual_seed(0)
    settings = LoraConfig(r=3, target_modules=["q", "flat"], init_lora_weights=False, lora_dropout=0.5)
    model = get_peft_model(Net(), settings)
    model.train()
    rng = np.random.default_rng(0)
    batches = []
    for rows in (2, 3):
        mask = torch.tensor(rng.integers(0, 2, (rows, 6)))
        mask[:, 0] = 1
        batches.append({"input_ids": torch.tensor(rng.integers(0, 20, (rows, 6))), "attention_mask": mask,
                        "labels": torch.zeros(rows)})  # fmt: skip
    names = ["base_model.model.q", "base_model.model.flat"]
    moments = second_moments(model, batches, names)
    assert model.training
    model.eval()
    net = model.base_model.model
    with torch.no_grad():
        x = torch.cat([net.embed(batch["input_ids"])[batch["attention_mask"].bool()] for batch in batches])
        z = net.q.lora_A["default"](x).double()
        w = net.flat.lora_A["default"](torch.tanh(net.q(x))).double()
    for name, values in zip(names, (z, w)):
        assert moments[name].numpy() == pytest.approx((values.T @ values / len(values)).numpy(), rel=1e-5)
    whole = torch.cat([net.embed(batch["input_ids"]).reshape(-1, D_IN) for batch in batches])
    padded = net.q.lora_A["default"](whole).double().detach()
    assert not torch.allclose(moments[names[0]], padded.T @ padded / len(padded), rtol=1e-2)  # the control
    with pytest.raises(InputError, match="no calibration row reaches"):
        second_moments(model, [], names)
