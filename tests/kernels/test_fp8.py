"""Quantisation, its twins and products against float64 and the format's bound; every kernel against plain torch.

An element in e4m3 is off by half a unit of its last place: 2⁻⁴ of itself, or 2⁻¹⁰ of the scale below the smallest
normal number.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselora.kernels import fp8
from sparselora.kernels.activation import gated_activation
from sparselora.kernels.fp8 import FrozenFp8, Quantised, quantise_rows, scaled_product, twin
from sparselora.kernels.norm import add_rms_norm
from sparselora.kernels.rows import Channels, Rows
from sparselora.kernels.slots import Rotation, from_slots, to_heads

IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=pytest.mark.gpu)]
DEVICES = {"torch": "cpu", "triton": "cuda"}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def unusual_rows(k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of ordinary numbers, zeros, an outlier, huge and tiny numbers, inf, NaN, many magnitudes."""
    x = draw(0, 9, k, dtype=torch.float64)
    x[1], x[2, k // 2], x[3], x[4] = 0, 3e4, x[3] * 1e37, x[4] * 1e-30
    x[5, 0], x[6, k - 1], x[7, 0] = torch.inf, torch.nan, -torch.inf
    x[8] *= torch.logspace(-9, 6, k, dtype=torch.float64)
    return x.to(dtype)


def dequantised(x: Quantised) -> torch.Tensor:
    return x.values.double().cpu() * x.scale.double().cpu()


def bound(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return 2**-4 * x.double().abs() + 2**-10 * scale.double()


def assert_same(a: Quantised | None, b: Quantised | None) -> None:
    """Bit for bit, except that NaN has several codes."""
    assert a is not None
    assert b is not None
    assert a.values.dtype == b.values.dtype
    assert a.values.shape == b.values.shape
    assert torch.equal(a.scale.cpu(), b.scale.cpu())
    ours, theirs = (x.values.cpu().float() for x in (a, b))
    assert torch.equal(ours.isnan(), theirs.isnan())
    differs = a.values.cpu().view(torch.uint8) != b.values.cpu().view(torch.uint8)
    assert not bool((differs & ~ours.isnan()).any())


def codes_of(dtype: torch.dtype) -> torch.Tensor:
    """The finite numbers of the format from its definition, ascending, one zero."""
    mantissa, bias, top = (3, 7, 448.0) if dtype == E4M3 else (2, 15, 57344.0)
    numbers = set()
    for exponent in range(32):
        for fraction in range(2**mantissa):
            normal = (1 + fraction / 2**mantissa) * 2.0 ** (exponent - bias)
            numbers.add(normal if exponent else fraction / 2**mantissa * 2.0 ** (1 - bias))
    positive = sorted(number for number in numbers if number <= top)
    return torch.tensor([*(-p for p in reversed(positive[1:])), *positive], dtype=torch.float64)


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 130), (2, 4096)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_elements_go_to_the_nearest_number_of_the_format(impl, shape, dtype):
    x = draw(0, *shape, device=DEVICES[impl]) * 10
    quantised = quantise_rows(x, dtype, impl)
    largest = x.double().cpu().abs().amax(1, keepdim=True)
    torch.testing.assert_close(quantised.scale.cpu().double(), largest / torch.finfo(dtype).max, rtol=3e-7, atol=0)
    unit = x.double().cpu() / quantised.scale.double().cpu()
    codes = codes_of(dtype)
    nearest = (unit[..., None] - codes).abs().amin(-1)
    got = quantised.values.double().cpu()
    assert bool(torch.isin(got, codes).all())
    # To float32's rounding of the division; where two are as near, either is.
    assert bool(((got - unit).abs() <= nearest + 1e-6 * unit.abs()).all())


def test_ties_go_to_the_even_number():
    x = torch.tensor([[448.0, 17.0, 19.0, 21.0, 23.0, -17.0]])  # numbers from 16 on are 2 apart
    assert quantise_rows(x).values.tolist() == [[448.0, 16.0, 20.0, 20.0, 24.0, -16.0]]


@pytest.mark.parametrize("k", [5, 96, 1001])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_scale_for_each_row_holds_the_bound_that_one_for_all_breaks(impl, k):
    x = draw(0, 6, k, device=DEVICES[impl])
    x[4] *= 2.0**14
    quantised = quantise_rows(x, impl=impl)
    limit = bound(x.cpu(), quantised.scale.cpu()) * (1 + 1e-6)
    assert bool(((dequantised(quantised) - x.double().cpu()).abs() <= limit).all())
    flat = quantise_rows(x.reshape(1, -1), impl=impl)
    assert bool(((dequantised(flat).reshape(6, k) - x.double().cpu()).abs() > limit).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_unusual_rows(impl, dtype):
    x = unusual_rows(33, dtype).to(DEVICES[impl])
    quantised = quantise_rows(x, impl=impl)
    finite = torch.tensor([0, 1, 2, 3, 4, 8])
    assert quantised.scale[1].item() == 1
    assert not bool(quantised.values[1].float().any())
    some = x.cpu()[finite]
    error = (dequantised(quantised)[finite] - some.double()).abs()
    assert bool((error <= bound(some, quantised.scale.cpu()[finite]) * (1 + 1e-6)).all())
    assert quantised.scale.flatten()[5:8].tolist() == [torch.inf] * 3
    # What is not finite stays so in every product, and stays in its row.
    w = quantise_rows(draw(1, 16, 33, dtype=dtype))
    product = scaled_product(Quantised(quantised.values.cpu(), quantised.scale.cpu()), w, torch.float32)
    assert not bool(product[5:8].isfinite().any())
    assert bool(product[finite].isfinite().all())


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (3, 0)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_empty_matrices(impl, shape):
    quantised = quantise_rows(torch.ones(shape, device=DEVICES[impl]), impl=impl)
    assert quantised.values.shape == shape
    assert quantised.scale.shape == (shape[0], 1)
    assert len(quantised.rows(slice(0, 1))) == min(1, shape[0])


@pytest.mark.gpu
@pytest.mark.parametrize("fp8_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [1, 7, 130, 4096, 6000, 20000])
def test_rows_by_triton_equal_the_reference(k, dtype, fp8_dtype):
    x = (torch.cat((unusual_rows(k), 5 * draw(1, 40, k))) if dtype != torch.float16 else draw(1, 40, k)).to(dtype)
    there = x.to(DEVICES["triton"])
    assert_same(quantise_rows(there, fp8_dtype, "triton"), quantise_rows(x, fp8_dtype, "torch"))
    wide = torch.cat((there, there), dim=1)[:, :k]  # rows apart
    assert_same(quantise_rows(wide, fp8_dtype, "triton"), quantise_rows(x, fp8_dtype, "torch"))
    across = there[:, :40].t()
    assert_same(quantise_rows(across, fp8_dtype, "triton"), quantise_rows(x[:, :40].t(), fp8_dtype, "torch"))


# --- twins --------------------------------------------------------------------------------------------------------


class Probe(torch.autograd.Function):
    """The identity; keeps what backward passes through it."""

    @staticmethod
    def forward(ctx, x, gradients):
        ctx.gradients = gradients
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.gradients.append(grad)
        return grad, None


def test_a_twin_ends_when_its_tensor_is_written_to():
    x = draw(0, 3, 8)
    assert twin(x) is None
    fp8.attach_twin(x, quantise_rows(x))
    assert twin(x) is not None
    with fp8.quantisation_passes() as passes:
        assert fp8.twin_or_quantise(x) is twin(x)
        assert passes == []
        x[0] = 2  # through a view too
        assert twin(x) is None
        assert_same(fp8.twin_or_quantise(x), quantise_rows(x))
        assert passes == [(3, 8)]
    fp8.twin_or_quantise(x)
    assert passes == [(3, 8)]
    fp8.attach_twin(x, quantise_rows(x))
    fp8.drop_twin(x)
    fp8.drop_twin(x)
    assert twin(x) is None
    with pytest.raises(ValueError, match="twin of shape"):
        fp8.attach_twin(x, quantise_rows(x[:2]))


def test_a_sum_of_gradients_has_no_twin():
    gradients: list[torch.Tensor] = []
    x = draw(0, 3, 8).requires_grad_()
    y = Probe.apply(x, gradients)
    (fp8.with_gradient_twin(y) + fp8.with_gradient_twin(y)).sum().backward()
    assert twin(gradients[0]) is None
    fp8.with_gradient_twin(Probe.apply(x, gradients)).sum().backward()
    assert_same(twin(gradients[1]), quantise_rows(gradients[1]))


def test_a_placeholder_needs_no_memory_and_hides_nothing():
    x = fp8.placeholder(1000, 1000, torch.bfloat16, torch.device("cpu"))
    assert x.untyped_storage().nbytes() == 2
    assert x.shape == (1000, 1000)
    assert bool(x.isnan().all())


# --- products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "d_out"), [(1, 16, 16), (7, 48, 32), (130, 80, 176), (0, 16, 16)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_within_the_bound_of_the_format(n, k, d_out, has_bias):
    x, w, bias = draw(0, n, k), draw(1, d_out, k) / k**0.5, draw(2, d_out) if has_bias else None
    xq, wq = quantise_rows(x), quantise_rows(w)
    got = scaled_product(xq, wq, torch.bfloat16, bias).double()
    assert got.shape == (n, d_out)
    offset = 0 if bias is None else bias.double()
    exact = dequantised(xq) @ dequantised(wq).t() + offset
    assert bool(((got - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all())  # bf16, and float32's sums
    expected = x.double() @ w.double().t() + offset
    X, W = x.double().abs(), w.double().abs()
    limit = (X + bound(x, xq.scale)) @ (W + bound(w, wq.scale)).t() - X @ W.t() + 2**-8 * exact.abs() + 1e-5
    assert bool(((got - expected).abs() <= limit).all())
    if n > 1:
        assert float((got - expected).norm() / expected.norm()) < 0.05
        swapped = scaled_product(Quantised(xq.values, xq.scale.flip(0)), wq, torch.bfloat16, bias).double()
        assert bool(((swapped - expected).abs() > limit).any())  # scales of other rows


def test_products_go_where_they_are_asked_to_and_in_the_dtype_asked_for():
    x, w = quantise_rows(draw(0, 6, 32)), quantise_rows(draw(1, 16, 32))
    exact = dequantised(x) @ dequantised(w).t()
    torch.testing.assert_close(scaled_product(x, w, torch.float64), exact, rtol=1e-12, atol=1e-12)
    buffer = torch.full((8, 16), 7.0)
    scaled_product(x.rows(slice(2, 5)), w, torch.float32, out=buffer[2:5])
    torch.testing.assert_close(buffer[2:5].double(), exact[2:5], rtol=1e-5, atol=1e-5)
    assert bool((buffer[[0, 1, 5, 6, 7]] == 7).all())
    with pytest.raises(ValueError, match="impl"):
        scaled_product(x, w, torch.float32, impl="triton")


@pytest.mark.parametrize(("n", "k", "d_out"), [(5, 32, 41), (3, 45, 32), (7, 45, 21), (2, 16, 16)])
def test_zeros_fill_up_a_shape_without_any_effect(n, k, d_out):
    x, w = quantise_rows(draw(0, n, k)), quantise_rows(draw(1, d_out, k))
    wider, taller = fp8.filled_up(x, 0), fp8.filled_up(w, -d_out % 16)
    assert fp8.fp8_shape_problem(*taller.values.shape) is None
    product = scaled_product(wider, taller, torch.float64)
    assert torch.equal(product[:, :d_out], scaled_product(x, w, torch.float64))
    assert not bool(product[:, d_out:].any())
    assert len(wider) == n


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E5M2, E4M3)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "d_out"),
    [
        (1, 16, 16),
        (7, 48, 32),
        (130, 4096, 176),
        (0, 16, 16),
        (513, 1440, 96),
        (5, 32, 41),
        (33, 1434, 64),
        (7, 45, 21),
    ],
)
def test_products_by_tensor_cores_equal_the_reference(n, k, d_out, has_bias, dtypes):
    x = quantise_rows(draw(0, n, k, device="cuda"), dtypes[0])
    w = quantise_rows(draw(1, d_out, k, device="cuda") / k**0.5, dtypes[1])
    bias = draw(2, d_out, device="cuda") if has_bias else None
    expected = scaled_product(x, w, torch.float32, bias, impl="torch")
    for dtype in (torch.bfloat16, torch.float32):
        got = scaled_product(x, w, dtype, bias)
        assert got.shape == (n, d_out)
        assert got.dtype == dtype
        assert float((got.float() - expected).norm()) <= 5e-3 * float(expected.norm())
        buffer = torch.full((n + 2, d_out), 7.0, dtype=dtype, device="cuda")
        scaled_product(x, w, dtype, bias, out=buffer[1 : n + 1])
        assert torch.equal(buffer[1 : n + 1], got)
        assert bool((buffer[[0, n + 1]] == 7).all())


@pytest.mark.gpu
@pytest.mark.parametrize(("start", "stop"), [(1, 2), (3, 130), (129, 300), (130, 299)])
def test_products_by_tensor_cores_of_rows_from_anywhere(start, stop):
    # A range starts at any row: its scales are aligned to 4 bytes only.
    x, w = quantise_rows(draw(0, 300, 256, device="cuda")), quantise_rows(draw(1, 128, 256, device="cuda"))
    expected = scaled_product(x, w, torch.float32, impl="torch")[start:stop]
    got = scaled_product(x.rows(slice(start, stop)), w, torch.bfloat16)
    assert float((got.float() - expected).norm()) <= 5e-3 * float(expected.norm())


@pytest.mark.gpu
def test_products_by_tensor_cores_do_not_hide_what_is_not_finite():
    x = quantise_rows(unusual_rows(64).cuda())
    product = scaled_product(x, quantise_rows(draw(1, 32, 64, device="cuda")), torch.bfloat16)
    assert not bool(product[5:8].isfinite().any())
    assert bool(product[[0, 1, 2, 4, 8]].isfinite().all())


def test_devices_and_shapes_without_fp8_say_what_they_need(monkeypatch):
    assert "and this is cpu" in str(fp8.fp8_device_problem(torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    for capability, possible in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        problem = fp8.fp8_device_problem(torch.device("cuda"))
        assert problem is None if possible else "A100 has 8.0" in str(problem)
    assert fp8.fp8_shape_problem(4096, 14336) is None
    assert "1434" in str(fp8.fp8_shape_problem(1434, 4096))
    assert "4100" in str(fp8.fp8_shape_problem(4096, 4100))


@pytest.mark.parametrize("shape", [(32, 48), (20, 13)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_frozen_weights_have_a_copy_for_each_direction(impl, shape):
    W = draw(0, *shape, device=DEVICES[impl])
    W[3] *= 1000
    frozen = FrozenFp8.of(W, impl=impl)
    assert_same(frozen.forward, quantise_rows(W.cpu()))
    assert_same(frozen.backward, quantise_rows(W.cpu().t().contiguous()))
    assert frozen.nbytes == W.nbytes + 4 * sum(shape)
    before = frozen.forward.values.data_ptr(), frozen.backward.values.data_ptr()
    assert frozen.memory.storage.nbytes == W.nbytes
    frozen.memory.storage.zero_()
    frozen.fill(W, impl)
    assert (frozen.forward.values.data_ptr(), frozen.backward.values.data_ptr()) == before
    assert_same(frozen.forward, quantise_rows(W.cpu()))
    assert_same(frozen.backward, quantise_rows(W.cpu().t().contiguous()))
    rows, columns = torch.tensor([0, 3, 4, 19]), torch.tensor([1, 2, 12])
    for r, c in ((rows, None), (None, columns), (rows, columns)):
        r_, c_ = (None if i is None else i.to(W.device) for i in (r, c))
        rr, cc = torch.arange(shape[0]) if r is None else r, torch.arange(shape[1]) if c is None else c
        for part, whole, first, second in (
            (frozen.forward.select(r_, c_), quantise_rows(W.cpu()), rr, cc),
            (frozen.backward.select(c_, r_), quantise_rows(W.cpu().t()), cc, rr),
        ):
            values = whole.values.float()[first][:, second].to(E4M3)
            assert_same(part, Quantised(values, whole.scale[first]))
            assert part.values.is_contiguous()
            assert part.scale.is_contiguous()


# --- twins made by the kernels that compute -----------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize(("n", "d"), [(5, 7), (3, 96), (4, 1000), (1, 4096), (0, 16)])
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_norm(impl, has_delta, n, d, dtypes):
    device, (dtype, delta_dtype) = DEVICES[impl], dtypes
    weight = draw(2, d, dtype=dtype, device=device)
    grads = draw(3, n, d, dtype=dtype, device=device), draw(4, n, d, device=device)

    def run(**options):
        x = draw(0, n, d, dtype=dtype, device=device)
        delta = draw(1, n, d, dtype=delta_dtype, device=device)
        gradients: list[torch.Tensor] = []
        inputs = x.requires_grad_(), Probe.apply(delta.requires_grad_(), gradients) if has_delta else None
        total, out = add_rms_norm(*inputs, weight, 1e-5, torch.bfloat16, impl, **options)
        torch.autograd.backward((total, out), grads)
        return total, out, x.grad, gradients

    total, out, dx, gradients = run()
    assert twin(out) is None
    assert not any(map(twin, gradients))
    for keep in (True, False):
        ours = run(quantise=True, keep_wide=keep, quantise_grad=True)
        assert torch.equal(ours[0], total)
        assert torch.equal(ours[1], out) if keep else bool(ours[1].isnan().all())
        assert_same(twin(ours[1]), quantise_rows(out.detach(), impl="torch"))
        # A kernel that quantises too is another program, which may contract products and sums otherwise.
        torch.testing.assert_close(ours[2], dx)
        for ours_delta, delta in zip(ours[3], gradients, strict=True):
            torch.testing.assert_close(ours_delta, delta)
            assert_same(twin(ours_delta), quantise_rows(ours_delta, fp8.GRADIENT_DTYPE, "torch"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_norm_of_unusual_rows(impl):
    x = unusual_rows(40).to(DEVICES[impl])
    out = add_rms_norm(x, None, torch.ones(40, device=x.device), 1e-5, torch.bfloat16, impl, quantise=True)[1]
    assert_same(twin(out), quantise_rows(out, impl="torch"))
    assert twin(out).scale.flatten()[5:8].tolist() == [torch.inf] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "width"), [(5, 33), (3, 128), (2, 1434), (1, 14336), (0, 16)])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU()])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_activation(impl, act, n, width, dtype):
    check_activation(impl, act, n, width, dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_activation_wider_than_a_kernel_holds(impl, monkeypatch):
    monkeypatch.setattr(fp8, "WIDEST_ROW", 64)
    check_activation(impl, nn.SiLU(), 3, 100, torch.bfloat16)


def check_activation(impl, act, n, width, dtype):
    y, d_out = (draw(i, n, 2 * width // (1 + i), dtype=dtype, device=DEVICES[impl]) for i in range(2))

    def run(**options):
        gradients: list[torch.Tensor] = []
        leaf = y.clone().requires_grad_()
        out = gated_activation(Probe.apply(leaf, gradients), act, impl, **options)
        out.backward(d_out)
        return out.detach() if not options else out, gradients[0]

    out, dy = run()
    assert twin(dy) is None
    for keep in (True, False):
        for keep_grad in (True, False):
            options = {"keep_wide": keep, "keep_wide_grad": keep_grad}
            ours, ours_dy = run(quantise=True, quantise_grad=True, **options)
            assert ours.dtype == out.dtype
            assert torch.equal(ours, out) if keep else bool(ours.isnan().all())
            assert_same(twin(ours), quantise_rows(out, impl="torch"))
            if keep_grad:
                torch.testing.assert_close(ours_dy, dy)
                assert_same(twin(ours_dy), quantise_rows(ours_dy, fp8.GRADIENT_DTYPE, "torch"))
                dy = ours_dy
            else:
                assert bool(ours_dy.isnan().all())
                assert_same(twin(ours_dy), quantise_rows(dy, fp8.GRADIENT_DTYPE, "torch"))
    plain, plain_dy = run(keep_wide=False, keep_wide_grad=False)  # nothing is quantised, so all is computed
    assert torch.equal(plain, out)
    assert twin(plain) is None
    assert twin(plain_dy) is None
    torch.testing.assert_close(plain_dy, dy)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_activation_of_unusual_rows(impl):
    y = torch.cat([unusual_rows(40).to(DEVICES[impl])] * 2, dim=1)
    out = gated_activation(y, nn.SiLU(), impl, quantise=True)
    assert_same(twin(out), quantise_rows(out, impl="torch"))
    assert twin(out).scale.flatten()[[5, 6]].tolist() == [torch.inf] * 2


@pytest.mark.parametrize("widest", [16384, 8])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_slots(impl, widest, monkeypatch):
    monkeypatch.setattr(fp8, "WIDEST_ROW", widest)
    device = DEVICES[impl]
    head, widths = 6, (12, 6, 6)
    index = Channels.of(torch.tensor([0, 3, 4, 7, 11, 13, 16, 19, 23], device=device), 24)
    slots = torch.tensor([9, 2, 0, 5, 7, 1, 3], device=device)
    pieces = [Rows(0, 4, index), Rows(4, 7), Rows(7, 7)]
    full = draw(0, 11, 24, device=device)
    expected = from_slots(full, pieces, slots, impl=impl)
    assert not any(map(twin, expected))
    values = from_slots(full, pieces, slots, quantise=True, impl=impl)
    for ours, plain in zip(values, expected, strict=True):
        assert torch.equal(ours, plain)
        assert_same(twin(ours), quantise_rows(plain, impl="torch"))

    rotation = Rotation(draw(5, 7, head, dtype=torch.float32, device=device), draw(6, 7, head, device=device).float())

    def gradients_of(**options):
        gradients: list[torch.Tensor] = []
        leaves = [Probe.apply(value.detach().requires_grad_(), gradients) for value in expected]
        parts = to_heads(list(zip(pieces, leaves)), slots, 11, widths, rotation, impl=impl, **options)
        torch.autograd.backward(parts, [draw(7 + i, 11, w, device=device) for i, w in enumerate(widths)])
        return sorted(gradients, key=len)

    for ours, plain in zip(gradients_of(quantise_grad=True), gradients_of(), strict=True):
        assert torch.equal(ours, plain)
        assert twin(plain) is None
        assert_same(twin(ours), quantise_rows(plain, fp8.GRADIENT_DTYPE, "torch"))


def test_the_format_of_gradients_is_one_constant(monkeypatch):
    monkeypatch.setattr(fp8, "GRADIENT_DTYPE", E5M2)
    gradients: list[torch.Tensor] = []
    y = Probe.apply(draw(0, 3, 16).requires_grad_(), gradients)
    delta = gated_activation(y, nn.SiLU(), quantise_grad=True)
    delta = Probe.apply(delta, gradients)
    add_rms_norm(torch.ones_like(delta), delta, torch.ones(8), 1e-5, quantise_grad=True)[1].sum().backward()
    pieces = [(Rows(0, 3), Probe.apply(draw(1, 3, 24).requires_grad_(), gradients))]
    rows = torch.arange(3)
    to_heads(pieces, rows, 3, (8, 8, 8), None, quantise_grad=True)[0].sum().backward()
    assert [twin(gradient).values.dtype for gradient in gradients] == [E5M2] * 3
