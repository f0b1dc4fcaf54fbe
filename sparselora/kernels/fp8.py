"""Products of frozen weights in fp8: rows with a scale each, and the copies that travel with bf16 tensors.

A matrix is quantised row by row: ``scale = max|row| / 448`` in float32 and ``values = row / scale`` rounded to e4m3
(3 mantissa bits: an element is off by at most 2⁻⁴ of itself, or by 2⁻¹⁰ of the scale where it is smaller than 2⁻⁶ of
it). A product of two such matrices over their common columns is ``(values valuesᵀ) · scale · scaleᵀ``: the scales are
constant over the sum, so that the tensor cores see only 8 bits. A row of zeros has scale 1. A row with NaN or inf has
scale inf, which makes every product with it NaN: nothing is clamped in silence.

To quantise an activation costs nothing of its own where the kernel that computes it does it too. The result is the
tensor's *twin*: a `Quantised` that is kept as an attribute of the bf16 tensor, and so passes through autograd
functions, forward and backward, without a second output. Writing to the tensor in place invalidates its twin. Where
only the twin will be read, the bf16 tensor is a `placeholder` without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sparselora.kernels._dispatch import has_triton, row_warps, use_triton
from sparselora.kernels.columns import take_columns

Tensor = torch.Tensor

WEIGHT_DTYPE = torch.float8_e4m3fn
"""The format of weights and activations."""

GRADIENT_DTYPE = torch.float8_e4m3fn
"""The format of gradients: with a scale for each row the range of e4m3 suffices, and it has a bit more than e5m2.

Measured with the backward products of every frozen linear layer in fp8, on 512 tokens: the median relative error of the
layers' weight gradients (in brackets the first layer's mean, behind all the others) against float32.

    ==================  =============  =============  =============
    model               weights alone  e4m3           e5m2
    SmolLM2-135M        0.063 (0.087)  0.087 (0.126)  0.135 (0.190)
    Qwen2.5-Coder-0.5B  0.050 (0.056)  0.069 (0.077)  0.109 (0.137)
    ==================  =============  =============  =============
"""

FP8_MULTIPLE = 16
"""Both sides of a weight are multiples of it in products by the tensor cores, which read 16 bytes at a time."""

WIDEST_ROW = 16384
"""The widest row that a kernel holds whole, to quantise it as it is computed."""

_SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: its inverse is finite
_ATTRIBUTE = "_fp8_twin"

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def largest_magnitude(x):
        """The largest magnitude of a row in float32, inf where it holds NaN (which a maximum would pass over)."""
        return tl.max(tl.where(x != x, float("inf"), tl.abs(x)), axis=0)

    @triton.jit
    def row_scale(largest, INVERSE_MAX: tl.constexpr):
        """The scale of a row, by a multiplication: `/` is not correctly rounded here."""
        return tl.where(largest > 0, tl.maximum(largest * INVERSE_MAX, 1.1754943508222875e-38), 1.0)

    @triton.jit
    def store_quantised(x, scale, place, inside, VALUES):
        """Store float32 numbers ``x``, which are zero where not ``inside``, divided by the scale of their row."""
        tl.store(VALUES + place, (x * tl.div_rn(1.0, scale)).to(VALUES.dtype.element_ty), mask=inside)

    @triton.jit
    def _rows_kernel(
        X, VALUES, SCALE, k, x_row, INVERSE_MAX: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        if WHOLE:
            x = tl.load(X + row * x_row + column, mask=column < k, other=0.0).to(tl.float32)
            scale = row_scale(largest_magnitude(x), INVERSE_MAX)
            store_quantised(x, scale, row * k + column, column < k, VALUES)
        else:
            largest = 0.0
            for start in range(0, k, BLOCK):
                x = tl.load(X + row * x_row + start + column, mask=start + column < k, other=0.0).to(tl.float32)
                largest = tl.maximum(largest, largest_magnitude(x))
            scale = row_scale(largest, INVERSE_MAX)
            for start in range(0, k, BLOCK):
                x = tl.load(X + row * x_row + start + column, mask=start + column < k, other=0.0).to(tl.float32)
                store_quantised(x, scale, row * k + start + column, start + column < k, VALUES)
        tl.store(SCALE + row, scale)


@dataclass(frozen=True, eq=False)
class Quantised:
    """A matrix ``values · scale``: ``values (n, k)`` in fp8, contiguous, and ``scale (n, 1)`` in float32."""

    values: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def rows(self, rows: slice) -> Quantised:
        """Return a view of a range of rows."""
        return Quantised(self.values[rows], self.scale[rows])

    def select(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Quantised:
        """Return some rows and columns, by int64 indices, with the scales of the whole."""
        values, scale = self.values.contiguous().view(torch.uint8), self.scale
        if rows is not None:
            # Rows are copied as the widest integers that divide them: a gather moves one element at a time.
            unit = torch.int64 if values.shape[1] % 8 == 0 else torch.uint8
            values, scale = values.view(unit).index_select(0, rows).view(torch.uint8), scale.index_select(0, rows)
        if columns is not None:
            values = take_columns(values, columns)
        return Quantised(values.view(self.values.dtype), scale)

    def wide(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in ``dtype``."""
        return (self.values.float() * self.scale).to(dtype)


def empty_quantised(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Quantised:
    """Return room for a quantised matrix, for a kernel to fill."""
    return Quantised(torch.empty(n, k, dtype=dtype, device=device), torch.empty(n, 1, device=device))


def after_detached(quantised: Quantised, detached: int) -> Quantised:
    """Return ``quantised`` behind ``detached`` rows that are never read (`sparselora.kernels.rows`)."""
    if detached == 0:
        return quantised
    n, k = quantised.values.shape
    whole = empty_quantised(detached + n, k, quantised.values.dtype, quantised.values.device)
    attached = whole.rows(slice(detached, None))
    attached.values.copy_(quantised.values)
    attached.scale.copy_(quantised.scale)
    return whole


def inverse_max(dtype: torch.dtype) -> float:
    """Return 1 over the largest number of an fp8 format."""
    return 1 / torch.finfo(dtype).max


def quantise_rows(
    x: Tensor, dtype: torch.dtype = WEIGHT_DTYPE, impl: str = "auto", out: Quantised | None = None
) -> Quantised:
    """Quantise each row of ``x (n, k)`` to ``dtype``, an fp8 format, in a pass of its own, into ``out`` if given.

    The result is the same, bit for bit, in every kernel that quantises what it computes, and in plain torch. (GPUs of
    compute capability 8.9 convert by way of float16, where an element near a tie may go the other way than in torch.)
    """
    n, k = x.shape
    if not x.numel():
        return Quantised(x.new_empty(n, k, dtype=dtype), x.new_ones(n, 1, dtype=torch.float32))
    if use_triton(impl, x):
        x = x if x.stride(1) == 1 else x.contiguous()
        quantised = empty_quantised(n, k, dtype, x.device) if out is None else out
        block = min(WIDEST_ROW, triton.next_power_of_2(k))
        _rows_kernel[(n,)](
            x, quantised.values, quantised.scale, k, x.stride(0), INVERSE_MAX=inverse_max(dtype), BLOCK=block,
            WHOLE=k <= block, num_warps=row_warps(block),
        )  # fmt: skip
        return quantised
    x = x.detach().float()
    largest = torch.where(x.isnan(), torch.inf, x.abs()).amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, (largest * inverse_max(dtype)).clamp_min(_SMALLEST_SCALE), 1.0)
    # inf · 0 is NaN: in a row whose scale is inf no number survives.
    quantised = Quantised((x * (1 / scale)).to(dtype), scale)
    if out is None:
        return quantised
    out.values.copy_(quantised.values)
    out.scale.copy_(quantised.scale)
    return out


# --- twins --------------------------------------------------------------------------------------------------------


def attach_twin(x: Tensor, quantised: Quantised) -> None:
    """Let ``quantised`` travel with ``x``, of which it is a copy, until ``x`` is written to."""
    if x.shape != quantised.values.shape:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no twin of shape {tuple(quantised.values.shape)}")
    setattr(x, _ATTRIBUTE, (quantised, x._version))


def twin(x: Tensor) -> Quantised | None:
    """Return the quantised copy that travels with ``x``; None where there is none, or ``x`` changed since."""
    quantised, version = getattr(x, _ATTRIBUTE, (None, None))
    return quantised if version == x._version else None


def drop_twin(x: Tensor) -> None:
    """Free the quantised copy of a tensor that lives longer than its products."""
    if hasattr(x, _ATTRIBUTE):
        delattr(x, _ATTRIBUTE)


_observers: list[list[tuple[int, ...]]] = []


@contextmanager
def quantisation_passes() -> Iterator[list[tuple[int, ...]]]:
    """Record the shapes of the tensors that `twin_or_quantise` quantises in passes of their own."""
    shapes: list[tuple[int, ...]] = []
    _observers.append(shapes)
    try:
        yield shapes
    finally:
        # By identity: lists of equal shapes are equal.
        del _observers[next(i for i, observer in enumerate(_observers) if observer is shapes)]


def twin_or_quantise(x: Tensor, dtype: torch.dtype = WEIGHT_DTYPE) -> Quantised:
    """Return the twin of ``x``, or quantise its rows to ``dtype`` now."""
    quantised = twin(x)
    if quantised is not None:
        return quantised
    for shapes in _observers:
        shapes.append(tuple(x.shape))
    return quantise_rows(x, dtype)


def placeholder(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor ``(rows, columns)`` of NaN in the memory of one number: its twin has the values."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(rows, columns)


def with_twin(x: Tensor, *, keep_wide: bool = True, impl: str = "auto") -> Tensor:
    """Return ``x (n, k)`` with a twin, made in a pass of its own; a placeholder of it without ``keep_wide``."""
    return _WithTwin.apply(x, keep_wide, impl)


def with_gradient_twin(x: Tensor, *, keep_wide: bool = True, impl: str = "auto") -> Tensor:
    """Return ``x (n, k)`` itself; its gradient gets a twin in a pass of its own, and is a placeholder if asked."""
    return _WithGradientTwin.apply(x, keep_wide, impl)


def _quantised_result(x: Tensor, dtype: torch.dtype, keep_wide: bool, impl: str) -> Tensor:
    result = x if keep_wide else placeholder(x.shape[0], x.shape[1], x.dtype, x.device)
    attach_twin(result, quantise_rows(x, dtype, impl))
    return result


class _WithTwin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep_wide: bool, impl: str) -> Tensor:
        return _quantised_result(x.view_as(x), WEIGHT_DTYPE, keep_wide, impl)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, None


class _WithGradientTwin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep_wide: bool, impl: str) -> Tensor:
        ctx.keep_wide, ctx.impl = keep_wide, impl
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _quantised_result(grad, GRADIENT_DTYPE, ctx.keep_wide, ctx.impl), None, None


# --- products -----------------------------------------------------------------------------------------------------


def fp8_device_problem(device: torch.device) -> str | None:
    """Say why fp8 products do not run on ``device``; None where they do."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"fp8 products need an NVIDIA GPU of compute capability 8.9 or more, and this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return f"fp8 products need compute capability 8.9 or more (Ada, Hopper, Blackwell), and {name} has {version}"
    return None


def fp8_shape_problem(d_out: int, d_in: int) -> str | None:
    """Say why a weight ``(d_out, d_in)`` has no fp8 products; None where it has, in both directions."""
    if d_out % FP8_MULTIPLE == 0 and d_in % FP8_MULTIPLE == 0:
        return None
    return f"fp8 products need multiples of {FP8_MULTIPLE} inputs and outputs, got {d_in} inputs and {d_out} outputs"


def filled_up(x: Quantised, rows: int) -> Quantised:
    """Return ``x (n, k)`` with so many rows of zeros more, and columns of zeros up to a multiple of `FP8_MULTIPLE`."""
    values = F.pad(x.values.view(torch.uint8), (0, -x.values.shape[1] % FP8_MULTIPLE, 0, rows))
    return Quantised(values.view(x.values.dtype), F.pad(x.scale, (0, 0, 0, rows), value=1.0))


def scaled_product(
    x: Quantised,
    w: Quantised,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``x wᵀ (+ bias)`` for ``x (n, k)`` and ``w (d_out, k)``: ``(n, d_out)`` in ``out_dtype``, into ``out`` if given.

    By the tensor cores on a GPU: in bf16, with sides filled up by zeros to what `fp8_shape_problem` says, and rounded
    to ``out_dtype`` from there. Elsewhere, and with ``impl`` ``torch``, from the same fp8 values in float32: the
    reference.
    """
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl must be 'auto' or 'torch', got {impl!r}")
    if impl == "auto" and x.values.is_cuda and len(x):
        d_out = len(w)
        if fp8_shape_problem(*w.values.shape):
            x, w = filled_up(x, 0), filled_up(w, -d_out % FP8_MULTIPLE)
            bias = None if bias is None else F.pad(bias, (0, len(w) - d_out))
            product = scaled_product(x, w, out_dtype, bias)[:, :d_out]
            return product if out is None else out.copy_(product)
        b = None if bias is None else bias.to(torch.bfloat16)
        x_scale = x.scale if x.scale.data_ptr() % 16 == 0 else x.scale.clone()  # cuBLASLt refuses others
        w_scale = (w.scale if w.scale.data_ptr() % 16 == 0 else w.scale.clone()).t()
        arguments: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        if out is not None and out.dtype == torch.bfloat16 and out.is_contiguous():
            return torch._scaled_mm(x.values, w.values.t(), x_scale, w_scale, b, out=out, **arguments)
        product = torch._scaled_mm(x.values, w.values.t(), x_scale, w_scale, b, **arguments)
    else:
        wide = torch.promote_types(out_dtype, torch.float32)
        product = (x.values.to(wide) @ w.values.to(wide).t()) * (x.scale.to(wide) * w.scale.to(wide).t())
        product = product if bias is None else product + bias.to(wide)
    return product.to(out_dtype) if out is None else out.copy_(product)


@dataclass(eq=False)
class SharedMemory:
    """The memory of a weight's two copies, as many bytes as the weight has in 16 bits.

    The weight itself may borrow it, as long as no product is formed with the copies.

    Attributes:
        storage: uint8 ``(2 · d_out · d_in,)``.
        reclaim: takes the memory back from the weight and makes the copies again; None while it holds them.
    """

    storage: Tensor
    reclaim: Callable[[], None] | None = None


@dataclass(frozen=True, eq=False)
class FrozenFp8:
    """A frozen weight ``W (d_out, d_in)`` in fp8, a copy for each direction.

    Attributes:
        forward: the rows of W, ``(d_out, d_in)``: a scale for each output channel.
        backward: the rows of Wᵀ, ``(d_in, d_out)``: a scale for each input channel.
        memory: of the values of both.
    """

    forward: Quantised
    backward: Quantised
    memory: SharedMemory

    @classmethod
    def of(cls, W: Tensor, impl: str = "auto") -> FrozenFp8:
        """Quantise ``W (d_out, d_in)``."""
        d_out, d_in = W.shape
        storage = torch.empty(2 * W.numel(), dtype=torch.uint8, device=W.device)
        first, second = (half.view(WEIGHT_DTYPE) for half in storage.split(W.numel()))
        forward = Quantised(first.view(d_out, d_in), torch.empty(d_out, 1, device=W.device))
        backward = Quantised(second.view(d_in, d_out), torch.empty(d_in, 1, device=W.device))
        copies = cls(forward, backward, SharedMemory(storage))
        copies.fill(W, impl)
        return copies

    def fill(self, W: Tensor, impl: str = "auto") -> None:
        """Make both copies of ``W (d_out, d_in)``, which stands in memory of its own."""
        quantise_rows(W, impl=impl, out=self.forward)
        quantise_rows(W.t().contiguous(), impl=impl, out=self.backward)

    def reclaim(self) -> None:
        """Make sure that the memory holds the copies, and not the weight."""
        if self.memory.reclaim is not None:
            self.memory.reclaim()

    @property
    def nbytes(self) -> int:
        return self.forward.nbytes + self.backward.nbytes

    def part(self, rows: slice) -> FrozenFp8:
        """Return views of the copies restricted to consecutive output channels."""
        backward = Quantised(self.backward.values[:, rows], self.backward.scale)
        return FrozenFp8(self.forward.rows(rows), backward, self.memory)
