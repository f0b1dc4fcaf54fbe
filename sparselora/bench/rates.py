"""Rates of a device for products and copies, from which the least time of a part of a step follows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from sparselora.kernels.fp8 import quantise_rows, scaled_product


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of the product of two large square matrices: random, for zeros take less power and time.

    Args:
        dtype: of the operands; ``torch.float8_e4m3fn`` with a scale for each row.
    """
    n = 8192 if device.type == "cuda" else 1024
    is_fp8 = dtype == torch.float8_e4m3fn
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if is_fp8 else dtype) for _ in range(2))
    if is_fp8:
        qa, qb = quantise_rows(a), quantise_rows(b)
        return 2 * n**3 / _seconds(device, lambda: scaled_product(qa, qb, torch.bfloat16))
    return 2 * n**3 / _seconds(device, lambda: a @ b)


def copy_rate(device: torch.device) -> float:
    """Return bytes per second that a large copy reads and writes."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(device, lambda: target.copy_(source))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    times = []
    for _ in range(12 if device.type == "cuda" else 5):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])
