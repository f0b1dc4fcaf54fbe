"""Products with a LoRA's factors: as thin as its rank, so that what counts is to read and write once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparselora.kernels._dispatch import has_triton, use_triton

_MOST_RANK = 256
_FEW = 64  # above it one term alone is as fast by the library's product

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _add_product(total, Z, C, row, column, n, d, rank, z_row, c_row, c_column, K: tl.constexpr, STEP: tl.constexpr):
        for start in tl.static_range(0, K, STEP):
            k = start + tl.arange(0, STEP)
            there = k < rank
            z = tl.load(Z + row[:, None] * z_row + k[None, :], mask=(row < n)[:, None] & there[None, :], other=0.0)
            c = tl.load(C + k[:, None] * c_row + column[None, :] * c_column,
                        mask=there[:, None] & (column < d)[None, :], other=0.0)  # fmt: skip
            total += tl.dot(z, c, input_precision="ieee")
        return total

    @triton.jit
    def _kernel(
        Z, C, Z2, C2, BIAS, OUT, n, d, rank, rank2, z_row, c_row, c_column, z2_row, c2_row, c2_column, out_row,
        HAS_BIAS: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total = _add_product(total, Z, C, row, column, n, d, rank, z_row, c_row, c_column, K, STEP)
        if K2 > 0:
            total = _add_product(total, Z2, C2, row, column, n, d, rank2, z2_row, c2_row, c2_column, K2, STEP)
        if HAS_BIAS:
            total += tl.load(BIAS + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
        inside = (row < n)[:, None] & (column < d)[None, :]
        tl.store(OUT + row[:, None] * out_row + column[None, :], total.to(OUT.dtype.element_ty), mask=inside)


def thin_product(
    terms: Sequence[tuple[torch.Tensor, torch.Tensor]],
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """``out = Σ z C (+ bias)`` over one or two terms ``z (n, r)``, ``C (r, d)``; ``out (n, d)``, which it returns."""
    (z, C), (z2, C2) = terms[0], terms[-1]
    ranks = [len(c) for _, c in terms]
    plain = all(t.stride(1) == 1 for t in (z, z2, out))
    large = max(ranks) > (_FEW if len(terms) == 1 and impl == "auto" else _MOST_RANK)
    if not use_triton(impl, z) or large or not plain:
        if bias is None:
            torch.mm(z, C, out=out)
        else:
            torch.addmm(bias, z, C, out=out)
        return out if len(terms) == 1 else out.addmm_(z2, C2)
    n, d = out.shape
    step = 32 if max(ranks) > 16 else 16
    K, K2 = (triton.cdiv(rank, step) * step for rank in (ranks[0], ranks[1] if len(ranks) > 1 else 0))
    if n and d:
        _kernel[(triton.cdiv(n, 64), triton.cdiv(d, 128))](
            z, C, z2, C2, out if bias is None else bias, out, n, d, ranks[0], ranks[-1], z.stride(0), *C.stride(),
            z2.stride(0), *C2.stride(), out.stride(0), HAS_BIAS=bias is not None, K=K, K2=K2, STEP=step, ROWS=64,
            COLUMNS=128, num_warps=4,
        )  # fmt: skip
    return out
