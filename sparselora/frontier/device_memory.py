"""Memory of the device between one candidate and the next."""

from __future__ import annotations

import gc

import torch

OUT_OF_MEMORY = "the device has not enough memory"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether ``error``, or one that it followed, is that the device has no memory left.

    A CUDA graph whose capture runs out of memory ends with another error.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def release_memory(device: torch.device) -> None:
    """Give back what only the garbage collector or the allocator still holds, such as that of forgotten graphs."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
