"""Many small matrices cast and scaled by one launch: LoRA's factors before a pass, their gradients after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparselora.kernels._dispatch import has_triton, use_triton

_BLOCK = 1024

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _table_kernel(TABLE, SCALES, SOURCE, TARGET, BLOCK: tl.constexpr):
        # One matrix a second index; SOURCE and TARGET tell the types, the table where it is and where it goes.
        entry = TABLE + tl.program_id(1) * 5
        source = tl.load(entry).to(SOURCE.dtype)
        target = tl.load(entry + 1).to(TARGET.dtype)
        size, columns, stride = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
        position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(source + position, mask=position < size, other=0.0).to(tl.float32) * tl.load(
            SCALES + tl.program_id(1)
        )
        place = (position // columns) * stride + position % columns
        tl.store(target + place, value.to(TARGET.dtype.element_ty), mask=position < size)

    @triton.jit
    def _pair_kernel(DA, DB, A, B, a_size, total, rank, stride, scale, BLOCK: tl.constexpr):
        position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        in_a, b = position < a_size, position - a_size
        value = tl.load(DA + position, mask=in_a, other=0.0)
        tl.store(A + position, value.to(A.dtype.element_ty), mask=in_a)
        in_b = (position >= a_size) & (position < total)
        value = tl.load(DB + (b // rank) * stride + b % rank, mask=in_b, other=0.0).to(tl.float32) * scale
        tl.store(B + b, value.to(B.dtype.element_ty), mask=in_b)


class CastTable:
    """Copies ``targets[i] = scales[i] · sources[i]``, matrices each, with a cast; `run` makes them again.

    Where the tensors stand is written down once: they must stay there, and sources be contiguous.
    """

    def __init__(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], scales: Sequence[float]
    ) -> None:
        self._sources, self._targets, self._scales = list(sources), list(targets), list(scales)
        self._table: torch.Tensor | None = None
        uniform = all(len({(t.dtype, t.device) for t in tensors}) == 1 for tensors in (sources, targets))
        plain = all(s.is_contiguous() and t.stride(1) == 1 for s, t in zip(sources, targets))
        if sources and uniform and plain and all(use_triton("auto", tensors[0]) for tensors in (sources, targets)):
            rows = [[s.data_ptr(), t.data_ptr(), s.numel(), s.shape[1], t.stride(0)] for s, t in zip(sources, targets)]
            self._table = torch.tensor(rows, dtype=torch.int64).to(sources[0].device)
            self._factors = torch.tensor(self._scales, dtype=torch.float32).to(sources[0].device)
            self._grid = (triton.cdiv(max(s.numel() for s in sources), _BLOCK), len(rows))

    @torch.no_grad()
    def run(self) -> None:
        if self._table is not None:
            _table_kernel[self._grid](
                self._table, self._factors, self._sources[0], self._targets[0], BLOCK=_BLOCK, num_warps=4
            )
            return
        for source, target, scale in zip(self._sources, self._targets, self._scales):
            target.copy_(source * scale)


def factor_gradients(
    dA: torch.Tensor, dB: torch.Tensor, scale: float, dtype: torch.dtype, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``dA (r, d_in)`` and ``scale · dB (d_out, r)`` in ``dtype``, contiguous; ``dA`` is contiguous."""
    if not use_triton(impl, dA) or not dA.is_contiguous() or dB.stride(1) != 1:
        return dA.to(dtype), dB.to(dtype) * scale
    A = torch.empty(dA.shape, dtype=dtype, device=dA.device)
    B = torch.empty(dB.shape, dtype=dtype, device=dA.device)
    total = A.numel() + B.numel()
    _pair_kernel[(triton.cdiv(total, _BLOCK),)](
        dA, dB, A, B, A.numel(), total, dB.shape[1], dB.stride(0), scale, BLOCK=_BLOCK, num_warps=4
    )
    return A, B
