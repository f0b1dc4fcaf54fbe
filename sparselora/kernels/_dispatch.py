"""Choice of the implementation of an operation: plain torch or Triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Collection

import torch


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def row_warps(block: int) -> int:
    """Return the number of warps of a program that holds a row of ``block`` elements."""
    return min(16, max(1, block // 512))


def use_triton(impl: str, tensor: torch.Tensor, dtypes: Collection[torch.dtype] = FLOATS) -> bool:
    """Return whether ``impl`` means Triton for ``tensor``, in an operation on ``dtypes``.

    Raises:
        ValueError: an unknown name, or Triton asked for where it cannot run.
    """
    possible = tensor.is_cuda and has_triton() and tensor.dtype in dtypes
    if impl == "auto":
        return possible
    if impl == "triton" and not possible:
        raise ValueError("impl 'triton' needs CUDA tensors of 16 or 32 bits and the package triton; use impl 'auto'")
    if impl not in ("torch", "triton"):
        raise ValueError(f"impl must be 'auto', 'torch' or 'triton', got {impl!r}")
    return impl == "triton"
