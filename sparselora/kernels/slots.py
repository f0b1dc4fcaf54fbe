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

from sparselora.kernels import fp8
from sparselora.kernels._dispatch import has_triton, row_warps, use_triton
from sparselora.kernels.rows import Rows

if has_triton():
    import triton
    import triton.language as tl

    from sparselora.kernels.fp8 import largest_magnitude, row_scale, store_quantised

    @triton.jit
    def _scatter_kernel(
        PIECE, INVERSE, SLOT, COS, SIN, FULL, width, full_width, HEAD: tl.constexpr, ALL: tl.constexpr,
        ROTATE: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr, rotated,
    ):  # fmt: skip
        # One token, a block of the buffer's channels, those before `rotated` turned; SIGN is 1 for a rotation, -1 for
        # its transpose.
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
            angle = d if SIGN > 0 else p
            sin = tl.load(SIN + token * HEAD + angle, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(channel < rotated, value * cos + tl.where(low, -SIGN, SIGN) * b * sin, value)
        tl.store(FULL + slot * full_width + channel, value.to(FULL.dtype.element_ty), mask=inside)

    @triton.jit
    def _gather_kernel(
        Q, K, V, INDEX, SLOT, COS, SIN, PIECE, VALUES, SCALE, width, q_width, k_width, q_row, k_row, v_row,
        HEAD: tl.constexpr, ALL: tl.constexpr, ROTATE: tl.constexpr, QUANTISE: tl.constexpr,
        INVERSE_MAX: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # One token, a block of the channels it has, from three buffers that count as one; q and k turned back. To
        # quantise, the block has all channels.
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        slot = tl.load(SLOT + token)
        channel = column if ALL else tl.load(INDEX + column, mask=inside, other=0).to(tl.int32)
        in_q, in_v = inside & (channel < q_width), inside & (channel >= q_width + k_width)
        in_k = inside & ~in_q & ~in_v
        value = tl.load(Q + slot * q_row + channel, mask=in_q, other=0.0).to(tl.float32)
        value += tl.load(K + slot * k_row + channel - q_width, mask=in_k, other=0.0).to(tl.float32)
        value += tl.load(V + slot * v_row + channel - q_width - k_width, mask=in_v, other=0.0).to(tl.float32)
        if ROTATE:
            d = channel % HEAD
            low = d < HEAD // 2
            partner = tl.where(low, channel + HEAD // 2, channel - HEAD // 2)
            p = tl.where(low, d + HEAD // 2, d - HEAD // 2)
            b = tl.load(Q + slot * q_row + partner, mask=in_q, other=0.0).to(tl.float32)
            b += tl.load(K + slot * k_row + partner - q_width, mask=in_k, other=0.0).to(tl.float32)
            cos = tl.load(COS + token * HEAD + d, mask=inside, other=0.0).to(tl.float32)
            sin = tl.load(SIN + token * HEAD + p, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(in_v, value, value * cos + tl.where(low, 1, -1) * b * sin)
        value = value.to(PIECE.dtype.element_ty)
        tl.store(PIECE + token * width + column, value, mask=inside)
        if QUANTISE:
            rounded = value.to(tl.float32)
            scale = row_scale(largest_magnitude(rounded), INVERSE_MAX)
            tl.store(SCALE + token, scale)
            store_quantised(rounded, scale, token * width + column, inside, VALUES)


@dataclass(frozen=True)
class Rotation:
    """RoPE per packed row: ``cos``, ``sin (n, head_dim)``."""

    cos: torch.Tensor
    sin: torch.Tensor


def to_slots(
    pieces: Sequence[tuple[Rows, torch.Tensor]],
    slots: torch.Tensor,
    shape: tuple[int, int],
    *,
    covered: bool = False,
    impl: str = "auto",
    detached: int = 0,
) -> torch.Tensor:
    """The buffer ``shape = (slots, channels)`` with each packed row at its slot.

    Args:
        pieces: rows and their values ``(stop - start, k)``.
        slots: slot of every packed row ``(n,)``, each slot at most once.
        covered: promises that the pieces reach every slot, so that none needs to be zeroed.
        detached: rows before it get no gradient, as `sparselora.kernels.rows` says.
    """
    widths = (shape[1], 0, 0)
    return to_heads(pieces, slots, shape[0], widths, None, covered=covered, impl=impl, detached=detached)[0]


def to_heads(
    pieces: Sequence[tuple[Rows, torch.Tensor]],
    slots: torch.Tensor,
    rows: int,
    widths: tuple[int, int, int],
    rotation: Rotation | None,
    *,
    covered: bool = False,
    quantise_grad: bool = False,
    impl: str = "auto",
    detached: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in slots ``(rows, width)``, from values that hold their channels side by side; q and k are rotated.

    Channels are counted over all three, and a piece may hold some of them. The results share memory: a row of q, k and
    v is one row of it. With ``quantise_grad`` the gradient of each value gets an fp8 twin. Rows before ``detached`` get
    no gradient, as `sparselora.kernels.rows` says.
    """
    ranges, values = [piece for piece, _ in pieces], [value for _, value in pieces]
    twins = fp8.GRADIENT_DTYPE if quantise_grad else None
    fused = use_triton(impl, values[0])
    return _ToHeads.apply(ranges, slots, rows, widths, rotation, covered, twins, fused, detached, *values)


def from_slots(
    full: torch.Tensor,
    pieces: Sequence[Rows],
    slots: torch.Tensor,
    *,
    covered: bool = False,
    quantise: bool = False,
    impl: str = "auto",
    detached: int = 0,
) -> tuple[torch.Tensor, ...]:
    """The values ``(stop - start, k)`` of each piece, read from the buffer ``full (slots, channels)``.

    With ``quantise`` they get fp8 twins. Rows before ``detached`` give a gradient of zero to their slots.
    """
    twins = fp8.WEIGHT_DTYPE if quantise else None
    covered = covered and not detached
    return _FromSlots.apply(list(pieces), slots, covered, twins, use_triton(impl, full), detached, full)


def _rotate(x: torch.Tensor, rotation: Rotation, rows: slice, sign: int) -> torch.Tensor:
    """x ``(n, H·D)`` rotated by ``rotation``, or by its transpose (``sign`` -1)."""
    cos, sin = rotation.cos[rows, None, :], rotation.sin[rows, None, :]
    heads = x.reshape(len(x), x.shape[1] // cos.shape[-1], cos.shape[-1])
    wide = heads.to(torch.promote_types(x.dtype, torch.float32))
    low, high = (wide * (sin if sign < 0 else 1)).chunk(2, dim=-1)
    turned = torch.cat((-sign * high, sign * low), dim=-1)
    return (wide * cos + turned * (sin if sign > 0 else 1)).to(x.dtype).reshape(x.shape)


def _scatter(
    full: torch.Tensor, value: torch.Tensor, piece: Rows, slots: torch.Tensor, rotation: Rotation | None,
    rotated: int, fused: bool,
) -> None:  # fmt: skip
    """Write a piece into the buffer; channels before ``rotated`` are turned."""
    rows = piece.slice
    if not len(piece):
        return
    if fused:
        block = min(1024, triton.next_power_of_2(full.shape[1]))
        _scatter_kernel[(len(piece), triton.cdiv(full.shape[1], block))](
            value.contiguous(), full if piece.channels is None else piece.channels.inverse, slots[rows],
            rotation.cos[rows] if rotation else full, rotation.sin[rows] if rotation else full, full,
            value.shape[1], full.shape[1], HEAD=rotation.cos.shape[-1] if rotation else 1,
            ALL=piece.channels is None, ROTATE=rotation is not None, SIGN=1, BLOCK=block, rotated=rotated, num_warps=4,
        )  # fmt: skip
        return
    if piece.channels is not None:
        wide = value.new_zeros(len(value), full.shape[1])
        value = wide.index_copy_(1, piece.channels.index, value)
    if rotation is not None:
        value = torch.cat((_rotate(value[:, :rotated], rotation, rows, 1), value[:, rotated:]), dim=1)
    full.index_copy_(0, slots[rows], value)


def _gather(
    parts: tuple[torch.Tensor, ...], piece: Rows, slots: torch.Tensor, rotation: Rotation | None,
    twins: torch.dtype | None, fused: bool, detached: int = 0,
) -> torch.Tensor:  # fmt: skip
    """A piece read from three buffers side by side, the first two turned back, with a twin in the dtype ``twins``.

    Rows before ``detached`` are not read.
    """
    attached = piece.after(detached)
    if len(attached) < len(piece):
        value = _gather(parts, attached, slots, rotation, twins, fused)
        before = len(piece) - len(attached)
        whole = value.new_empty(len(piece), value.shape[1])
        whole[before:] = value
        quantised = fp8.twin(value)
        if quantised is not None:
            fp8.attach_twin(whole, fp8.after_detached(quantised, before))
        return whole
    rows = piece.slice
    widths = [part.shape[1] for part in parts]
    width = sum(widths) if piece.channels is None else len(piece.channels.index)
    if fused:
        value = torch.empty(len(piece), width, dtype=parts[0].dtype, device=parts[0].device)
        twin: fp8.Quantised | None = None
        block, warps = min(1024, triton.next_power_of_2(width)), 4
        if twins is not None and width <= fp8.WIDEST_ROW:
            twin = fp8.empty_quantised(len(piece), width, twins, value.device)
            block = triton.next_power_of_2(width)
            warps = max(4, row_warps(block))
        if len(value):
            _gather_kernel[(len(value), triton.cdiv(width, block))](
                *parts, slots if piece.channels is None else piece.channels.index, slots[rows],
                rotation.cos[rows] if rotation else slots, rotation.sin[rows] if rotation else slots, value,
                *((value, value) if twin is None else (twin.values, twin.scale)), width,
                *widths[:2], *(part.stride(0) for part in parts), HEAD=rotation.cos.shape[-1] if rotation else 1,
                ALL=piece.channels is None, ROTATE=rotation is not None, QUANTISE=twin is not None,
                INVERSE_MAX=fp8.inverse_max(twins or fp8.WEIGHT_DTYPE), BLOCK=block, num_warps=warps,
            )  # fmt: skip
    else:
        twin = None
        values = [part.index_select(0, slots[rows]) for part in parts]
        if rotation is not None:
            values = [*(_rotate(value, rotation, rows, -1) for value in values[:2]), values[2]]
        value = torch.cat(values, dim=1)
        value = value if piece.channels is None else value.index_select(1, piece.channels.index)
    if twins is not None:
        fp8.attach_twin(value, fp8.quantise_rows(value, twins, "auto" if fused else "torch") if twin is None else twin)
    return value


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: list[Rows], slots: torch.Tensor, rows: int, widths: tuple[int, int, int],
        rotation: Rotation | None, covered: bool, twins: torch.dtype | None, fused: bool, detached: int,
        *values: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        make = torch.empty if covered else torch.zeros
        full = make((rows, sum(widths)), dtype=values[0].dtype, device=values[0].device)
        for piece, value in zip(pieces, values):
            _scatter(full, value, piece, slots, rotation, widths[0] + widths[1], fused)
        ctx.pieces, ctx.slots, ctx.rotation, ctx.twins, ctx.fused = pieces, slots, rotation, twins, fused
        ctx.like, ctx.widths, ctx.rows, ctx.detached = full.new_empty(0), widths, rows, detached
        return full.split(widths, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        parts = tuple(
            ctx.like.new_zeros(ctx.rows, width)
            if grad is None
            else (grad if grad.stride(1) == 1 else grad.contiguous())
            for grad, width in zip(grads, ctx.widths)
        )
        needed = ctx.needs_input_grad[9:]
        d_values = (
            _gather(parts, piece, ctx.slots, ctx.rotation, ctx.twins, ctx.fused, ctx.detached) if need else None
            for piece, need in zip(ctx.pieces, needed)
        )
        return (None, None, None, None, None, None, None, None, None, *d_values)


class _FromSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: list[Rows], slots: torch.Tensor, covered: bool, twins: torch.dtype | None, fused: bool,
        detached: int, full: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.pieces, ctx.slots, ctx.covered, ctx.fused, ctx.shape = pieces, slots, covered, fused, full.shape
        ctx.detached, ctx.like = detached, full.new_empty(0)
        full = full.contiguous()
        nothing = full[:, :0]
        return tuple(_gather((full, nothing, nothing), piece, slots, None, twins, fused) for piece in pieces)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        covered = ctx.covered and all(grad is not None for grad in grads)
        full = ctx.like.new_empty(ctx.shape) if covered else ctx.like.new_zeros(ctx.shape)
        for piece, grad in zip(ctx.pieces, grads):
            attached = piece.after(ctx.detached)
            if grad is not None and len(attached):
                grad = grad[len(piece) - len(attached) :].contiguous()
                _scatter(full, grad, attached, ctx.slots, None, 0, ctx.fused)
        return (None, None, None, None, None, None, full)
