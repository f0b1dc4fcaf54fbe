"""One product with a frozen weight, whole or restricted to channels, in the dtype of the pass or in fp8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from sparselora.contextual.lora_update import Lora
from sparselora.kernels.columns import take_columns
from sparselora.kernels.fp8 import (
    GRADIENT_DTYPE,
    FrozenFp8,
    Quantised,
    quantise_rows,
    scaled_product,
    twin_or_quantise,
)
from sparselora.kernels.thin import thin_product

Tensor = torch.Tensor

Padding = Sequence[slice]
"""Positions of a list of channels that count nothing: the channels there are others', to fill up the list."""


Fp8Source = FrozenFp8 | Callable[[], Tensor]
"""The copies of a weight in fp8; or the weight ``(d_out, d_in)``, quantised at each use, where no copy may be kept."""


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A weight in fp8 restricted to output ``rows`` and input ``columns``; None takes all.

    Where the weight has copies, that of the forward direction is gathered at once, that of the other when the backward
    pass asks for it. Both are zero at the positions ``padding`` of the restricted side.
    """

    source: Fp8Source
    rows: Tensor | None = None
    columns: Tensor | None = None
    padding: Padding = ()
    gathered: Quantised | None = None

    def forward(self) -> Quantised:
        """The rows of the weight, ``(d_out, d_in)``."""
        if self.gathered is not None:
            return self.gathered
        return _restricted(copy_of(self.source), self.rows, self.columns, self.padding)

    def backward(self) -> Quantised:
        """The rows of the transposed weight, ``(d_in, d_out)``."""
        return _restricted(copy_of(self.source, backward=True), self.columns, self.rows, self.padding)


def fp8_weight(
    source: Fp8Source, rows: Tensor | None = None, columns: Tensor | None = None, padding: Padding = ()
) -> Fp8Weight:
    """Return an fp8 weight restricted to output ``rows`` or input ``columns``, or whole."""
    weight = Fp8Weight(source, rows, columns, padding)
    return replace(weight, gathered=weight.forward()) if isinstance(source, FrozenFp8) else weight


def copy_of(source: Fp8Source, *, backward: bool = False) -> Quantised:
    """Return the fp8 rows of a weight, or of its transpose for ``backward``, quantised now where no copy is kept."""
    if not isinstance(source, FrozenFp8):
        return quantise_rows(source().t().contiguous() if backward else source())
    source.reclaim()  # an evaluation may have come between a pass and its backward pass
    return source.backward if backward else source.forward


def _restricted(copy: Quantised, rows: Tensor | None, columns: Tensor | None, padding: Padding) -> Quantised:
    return copy if rows is None and columns is None else _restricted_copy(copy, rows, columns, padding)


def _restricted_copy(copy: Quantised, rows: Tensor | None, columns: Tensor | None, padding: Padding) -> Quantised:
    restricted = copy.select(rows, columns)
    _zero_padding(restricted.values.view(torch.uint8), padding, 1 if rows is None else 0)
    return restricted


def _zero_padding(x: Tensor, padding: Padding, dim: int) -> Tensor:
    """Return ``x``, which is nobody else's, with zeros at the padding of a dimension."""
    for part in padding:
        x.narrow(dim, part.start, part.stop - part.start).zero_()
    return x


@dataclass(frozen=True, eq=False)
class Operand:
    """A frozen map ``x → weight (pre x) + bias`` of a range of rows, and the LoRA that joins in.

    ``weight (d_out, d_in)`` is a tensor, or a function that makes one where the stored weight is quantised or sharded:
    then it is made again for the backward pass and not kept. In fp8 it is an `Fp8Weight`, and inputs and gradients
    bring fp8 twins or are quantised here. ``pre (R, d_in)`` comes before a weight ``(d_out, R)``; None is the identity.
    ``rows`` and ``columns`` are the channels that ``weight`` was restricted to: the LoRA is restricted alike, and both
    are zero at the positions ``padding`` of these channels.
    """

    weight: Tensor | Callable[[], Tensor] | Fp8Weight
    bias: Tensor | None = None
    pre: Tensor | None = None
    lora: Lora | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    padding: Padding = ()
    _restrictions: dict[str, Tensor] = field(default_factory=dict)

    def get(self) -> Tensor:
        assert not isinstance(self.weight, Fp8Weight)
        return self.weight if isinstance(self.weight, Tensor) else self.weight()

    @property
    def d_in(self) -> int:
        """Width of the inputs."""
        if self.columns is not None:
            return len(self.columns)
        if isinstance(self.weight, Fp8Weight):
            return self.weight.forward().values.shape[1]
        return (self.get() if self.pre is None else self.pre).shape[1]

    def a(self, dtype: torch.dtype) -> Tensor:
        """The LoRA's A restricted to the input channels, ``(r, d_in)``."""
        return self._restricted("a", dtype, self.columns, 1)

    def b(self, dtype: torch.dtype) -> Tensor:
        """The LoRA's B restricted to the output channels, ``(d_out, r)``."""
        return self._restricted("b", dtype, self.rows, 0)

    def _restricted(self, factor: str, dtype: torch.dtype, index: Tensor | None, dim: int) -> Tensor:
        assert self.lora is not None
        whole: Tensor = getattr(self.lora, factor)(dtype)
        if index is None:
            return whole
        if factor not in self._restrictions:
            self._restrictions[factor] = _zero_padding(whole.index_select(dim, index), self.padding, dim)
        return self._restrictions[factor]

    def apply(
        self, x: Tensor, z: Tensor | None = None, out: Tensor | None = None, twin: Quantised | None = None
    ) -> Tensor:
        """The map of ``x (n, d_in)``, with that of its LoRA where ``z (n, r)`` = A x is given; into ``out``.

        Args:
            twin: the fp8 twin of ``x``, where the weight is in fp8 and ``x`` is a part of the tensor that has one.
        """
        if isinstance(self.weight, Fp8Weight):
            quantised = twin_or_quantise(x) if twin is None else twin
            y = scaled_product(quantised, self.weight.forward(), x.dtype, self.bias, out)  # (n, d_in) (d_in, d_out)
            return y if z is None else y.addmm_(z, self.b(x.dtype).t())  # (n, r) (r, d_out)
        weight = self.get()
        if out is None:
            out = x.new_empty(len(x), len(weight))
        thin = [] if z is None else [(z, self.b(x.dtype).t())]
        if self.pre is not None:
            return thin_product([(x @ self.pre.t(), weight.t()), *thin], out, self.bias)
        if thin:
            # First the thin product: the wide one adds to it as it writes, without a pass over memory of its own.
            return thin_product(thin, out, self.bias).addmm_(x, weight.t())
        if self.bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(self.bias, x, weight.t(), out=out)

    def transpose_into(
        self, dy: Tensor, dx: Tensor, dz: Tensor | None, *, add: bool, twin: Quantised | None = None
    ) -> None:
        """``dx (+)= dy weight pre``, and the LoRA's ``dz A`` where ``dz (n, r)`` is given; ``twin`` is that of dy."""
        if isinstance(self.weight, Fp8Weight):
            quantised = twin_or_quantise(dy, GRADIENT_DTYPE) if twin is None else twin
            weight_t = self.weight.backward()
            if add:
                dx.add_(scaled_product(quantised, weight_t, dx.dtype))
            else:
                scaled_product(quantised, weight_t, dx.dtype, out=dx)  # (n, d_out) (d_out, d_in)
            if dz is not None:
                dx.addmm_(dz, self.a(dy.dtype))  # (n, r) (r, d_in)
            return
        weight = self.get()
        thin = [] if dz is None else [(dz, self.a(dy.dtype))]
        if self.pre is not None:
            thin.insert(0, (dy @ weight, self.pre))
        if add:
            for z, C in thin:
                dx.addmm_(z, C)
        elif thin:
            thin_product(thin, dx)
        if self.pre is None:
            if add or thin:
                dx.addmm_(dy, weight)
            else:
                torch.mm(dy, weight, out=dx)


def part_of(
    weight: Tensor | Callable[[], Tensor], rows: Tensor | None, columns: Tensor | None, *, at_use: bool
) -> Tensor | Callable[[], Tensor]:
    """Return output ``rows`` and input ``columns`` of a weight, copied now or ``at_use``; None takes all."""
    if rows is None and columns is None:
        return weight

    def part() -> Tensor:
        whole = weight if isinstance(weight, Tensor) else weight()
        whole = whole if rows is None else whole.index_select(0, rows)
        return whole if columns is None else take_columns(whole, columns)

    return part if at_use else part()


def bias_of(bias: Tensor | None, rows: Tensor | None, padding: Padding) -> Tensor | None:
    """Return a bias restricted to output ``rows``, zero at ``padding``; None takes all."""
    if bias is None or rows is None:
        return bias
    return _zero_padding(bias.index_select(0, rows), padding, 0)
