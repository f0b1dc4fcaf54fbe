"""Move per-token channels between packed rows and the padded buffer that attention reads, rotating on the way.

Packed rows hold the tokens of a batch in any order, and of each token possibly some channels only. The buffer has one
row a slot ``(batch · length)`` and all channels. `to_slots` writes the buffer (channels that a token lacks are zero),
`from_slots` reads it; each is the other's transpose. Rotation is RoPE on halves: channel d of a head with d + D/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparselora.kernels._dispatch import has_triton, use_triton

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _scatter_kernel(
        PIECE, INVERSE, SLOT, COS, SIN, FULL, width, full_width, HEAD: tl.constexpr, ALL: tl.constexpr,
        ROTATE: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # One token, a block of the buffer's channels; SIGN is 1 for a rotation, -1 for its transpose.
        token = tl.program_id(0).to(tl.int64)
        channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = channel < full_width
        slot = tl.load(SLOT + token)
        source = channel if ALL else tl.load(INVERSE + channel, mask=inside, other=-1)
        value = tl.load(PIECE + token * width + source, mask=inside & (source >= 0), other=0.0).to(tl.float32)
        if ROTATE:
            d = channel % HEAD
            low = d < HEAD // 2
            partner = tl.where(low, channel + HEAD // 2, channel - HEAD // 2)
            p = tl.where(low, d + HEAD // 2, d - HEAD // 2)
            other = partner if ALL else tl.load(INVERSE + partner, mask=inside, other=-1)
            b = tl.load(PIECE + token * width + other, mask=inside & (other >= 0), other=0.0).to(tl.float32)
            cos = tl.load(COS + token * HEAD + d, mask=inside, other=0.0).to(tl.float32)
            at = d if SIGN > 0 else p
            sin = tl.load(SIN + token * HEAD + at, mask=inside, other=0.0).to(tl.float32)
            value = value * cos + tl.where(low, -SIGN, SIGN) * b * sin
        tl.store(FULL + slot * full_width + channel, value.to(FULL.dtype.element_ty), mask=inside)

    @triton.jit
    def _gather_kernel(
        FULL, INDEX, SLOT, COS, SIN, PIECE, width, full_width, HEAD: tl.constexpr, ALL: tl.constexpr,
        ROTATE: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # One token, a block of the channels it has.
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        slot = tl.load(SLOT + token)
        channel = column if ALL else tl.load(INDEX + column, mask=inside, other=0)
        value = tl.load(FULL + slot * full_width + channel, mask=inside, other=0.0).to(tl.float32)
        if ROTATE:
            d = channel % HEAD
            low = d < HEAD // 2
            partner = tl.where(low, channel + HEAD // 2, channel - HEAD // 2)
            p = tl.where(low, d + HEAD // 2, d - HEAD // 2)
            b = tl.load(FULL + slot * full_width + partner, mask=inside, other=0.0).to(tl.float32)
            cos = tl.load(COS + token * HEAD + d, mask=inside, other=0.0).to(tl.float32)
            at = d if SIGN > 0 else p
            sin = tl.load(SIN + token * HEAD + at, mask=inside, other=0.0).to(tl.float32)
            value = value * cos + tl.where(low, -SIGN, SIGN) * b * sin
        tl.store(PIECE + token * width + column, value.to(PIECE.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Channels:
    """Which of ``total`` channels a piece holds: ``index (k,)`` ascending, ``inverse (total,)`` int32, -1 for absent."""

    index: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, index: torch.Tensor, total: int) -> Channels:
        inverse = torch.full((total,), -1, dtype=torch.int32, device=index.device)
        inverse[index] = torch.arange(len(index), dtype=torch.int32, device=index.device)
        return cls(index, inverse)


@dataclass(frozen=True)
class Piece:
    """Consecutive packed rows ``start:stop`` and the channels they hold (None: all)."""

    start: int
    stop: int
    channels: Channels | None = None


@dataclass(frozen=True)
class Rotation:
    """RoPE per packed row: ``cos``, ``sin (n, head_dim)``."""

    cos: torch.Tensor
    sin: torch.Tensor


def to_slots(
    pieces: Sequence[tuple[Piece, torch.Tensor]],
    slots: torch.Tensor,
    shape: tuple[int, int],
    rotation: Rotation | None = None,
    *,
    covered: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """The buffer ``shape = (slots, channels)`` with each packed row at its slot, rotated if ``rotation`` is given.

    Args:
        pieces: rows and their values ``(stop - start, k)``.
        slots: slot of every packed row ``(n,)``, each slot at most once.
        covered: promises that the pieces reach every slot, so that none needs to be zeroed.
    """
    values = [value for _, value in pieces]
    return _ToSlots.apply(
        [p for p, _ in pieces], slots, shape, rotation, covered, use_triton(impl, values[0]), *values
    )  # fmt: skip


def from_slots(
    full: torch.Tensor, pieces: Sequence[Piece], slots: torch.Tensor, *, covered: bool = False, impl: str = "auto"
) -> tuple[torch.Tensor, ...]:
    """The values ``(stop - start, k)`` of each piece, read from the buffer ``full (slots, channels)``."""
    return _FromSlots.apply(list(pieces), slots, covered, use_triton(impl, full), full)


def _rotate(x: torch.Tensor, rotation: Rotation, rows: slice, sign: int) -> torch.Tensor:
    """x ``(n, H·D)`` rotated by ``rotation``, or by its transpose (``sign`` -1)."""
    cos, sin = rotation.cos[rows, None, :], rotation.sin[rows, None, :]
    heads = x.view(x.shape[0], -1, cos.shape[-1])
    wide = heads.to(torch.promote_types(x.dtype, torch.float32))
    low, high = (wide * (sin if sign < 0 else 1)).chunk(2, dim=-1)
    turned = torch.cat((-sign * high, sign * low), dim=-1)
    return (wide * cos + turned * (sin if sign > 0 else 1)).to(x.dtype).reshape(x.shape)


def _scatter(
    full: torch.Tensor, value: torch.Tensor, piece: Piece, slots: torch.Tensor, rotation: Rotation | None, sign: int,
    fused: bool,
) -> None:  # fmt: skip
    rows, all_channels = slice(piece.start, piece.stop), piece.channels is None
    if piece.stop == piece.start:
        return
    if fused:
        block = min(1024, triton.next_power_of_2(full.shape[1]))
        head = rotation.cos.shape[-1] if rotation else 1
        dummy = full
        _scatter_kernel[(piece.stop - piece.start, triton.cdiv(full.shape[1], block))](
            value.contiguous(), dummy if piece.channels is None else piece.channels.inverse, slots[rows],
            rotation.cos[rows] if rotation else dummy, rotation.sin[rows] if rotation else dummy, full,
            value.shape[1], full.shape[1], HEAD=head, ALL=all_channels, ROTATE=rotation is not None, SIGN=sign,
            BLOCK=block, num_warps=4,
        )  # fmt: skip
        return
    if piece.channels is not None:
        wide = value.new_zeros(len(value), full.shape[1])
        value = wide.index_copy_(1, piece.channels.index, value)
    if rotation is not None:
        value = _rotate(value, rotation, rows, sign)
    full.index_copy_(0, slots[rows], value)


def _gather(
    full: torch.Tensor, piece: Piece, slots: torch.Tensor, rotation: Rotation | None, sign: int, fused: bool
) -> torch.Tensor:
    rows = slice(piece.start, piece.stop)
    width = full.shape[1] if piece.channels is None else len(piece.channels.index)
    if fused:
        value = torch.empty(piece.stop - piece.start, width, dtype=full.dtype, device=full.device)
        if len(value):
            block = min(1024, triton.next_power_of_2(width))
            head = rotation.cos.shape[-1] if rotation else 1
            dummy = full
            _gather_kernel[(len(value), triton.cdiv(width, block))](
                full, dummy if piece.channels is None else piece.channels.index, slots[rows],
                rotation.cos[rows] if rotation else dummy, rotation.sin[rows] if rotation else dummy, value, width,
                full.shape[1], HEAD=head, ALL=piece.channels is None, ROTATE=rotation is not None, SIGN=sign,
                BLOCK=block, num_warps=4,
            )  # fmt: skip
        return value
    value = full.index_select(0, slots[rows])
    if rotation is not None:
        value = _rotate(value, rotation, rows, sign)
    return value if piece.channels is None else value.index_select(1, piece.channels.index)


class _ToSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: list[Piece], slots: torch.Tensor, shape: tuple[int, int], rotation: Rotation | None,
        covered: bool, fused: bool, *values: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        make = torch.empty if covered else torch.zeros
        full = make(shape, dtype=values[0].dtype, device=values[0].device)
        for piece, value in zip(pieces, values):
            _scatter(full, value, piece, slots, rotation, 1, fused)
        ctx.pieces, ctx.slots, ctx.rotation, ctx.fused = pieces, slots, rotation, fused
        return full

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        grad = grad.contiguous()
        found = (_gather(grad, piece, ctx.slots, ctx.rotation, -1, ctx.fused) for piece in ctx.pieces)
        return (None, None, None, None, None, None, *found)


class _FromSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: list[Piece], slots: torch.Tensor, covered: bool, fused: bool, full: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.pieces, ctx.slots, ctx.covered, ctx.fused, ctx.shape = pieces, slots, covered, fused, full.shape
        full = full.contiguous()
        return tuple(_gather(full, piece, slots, None, 1, fused) for piece in pieces)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        make = torch.empty if ctx.covered else torch.zeros
        full = make(ctx.shape, dtype=grads[0].dtype, device=grads[0].device)
        for piece, grad in zip(ctx.pieces, grads):
            _scatter(full, grad.contiguous(), piece, ctx.slots, None, 1, ctx.fused)
        return (None, None, None, None, full)
