"""The precisions of frozen products: one class each, with all that the rest of the package asks about a precision.

The products with frozen weights, forward and for the gradient of the input, are nearly all of a LoRA step. In fp8 each
weight is quantised once, a copy for each direction, and activations and gradients row by row where they are computed.
LoRA, norms, attention, the residual stream and the output layer keep the dtype of the pass. `PRECISIONS` is the
registry; names and help lines are in `sparselora.config.sparsity.PRECISIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.structure import out_in
from sparselora.errors import InputError
from sparselora.kernels.fp8 import FrozenFp8, fp8_device_problem, fp8_shape_problem
from sparselora.models.four_bit import is_4bit

Tensor = torch.Tensor


class Precision:
    """The precision of the pass itself: products with the weights as they are.

    Class attributes:
        quantises: products are formed from fp8 copies of the weights, and activations need fp8 twins.
        leaves_device: the copies stand on the device in place of the weights, which wait in host memory.
    """

    quantises: ClassVar[bool] = False
    leaves_device: ClassVar[bool] = False

    @classmethod
    def check(cls, name: str, module: torch.nn.Module, weight: Tensor) -> None:
        """Raise an InputError where the products of a linear layer cannot be formed."""

    @classmethod
    def frozen(cls, W: Tensor) -> FrozenFp8:
        """Return the copies of ``W (d_out, d_in)`` for both directions."""
        raise NotImplementedError(f"{cls.__name__} multiplies with the weights themselves")


class Fp8Emulated(Precision):
    """The rounding of fp8 by plain torch on any device: slower than bf16, to try the quality and for tests."""

    quantises = True

    @classmethod
    def check(cls, name: str, module: torch.nn.Module, weight: Tensor) -> None:
        if is_4bit(weight):
            raise InputError(
                f"{name} is stored in 4 bits, and fp8 products would store it in 16 (8 for each direction); load the "
                "model in bf16, or use frozen_precision native"
            )
        if weight.dtype not in (torch.bfloat16, torch.float32, torch.float16):
            raise InputError(f"{name} is stored as {weight.dtype}; fp8 products need weights in bf16, fp16 or fp32")

    @classmethod
    def frozen(cls, W: Tensor) -> FrozenFp8:
        return FrozenFp8.of(W)


class Fp8(Fp8Emulated):
    """Products by the fp8 tensor cores."""

    leaves_device = True

    @classmethod
    def check(cls, name: str, module: torch.nn.Module, weight: Tensor) -> None:
        super().check(name, module, weight)
        problem = fp8_device_problem(weight.device) or fp8_shape_problem(*out_in(module))
        if problem:
            raise InputError(f"frozen_precision fp8 is not possible for {name}: {problem}")


PRECISIONS: dict[str, type[Precision]] = {"native": Precision, "fp8": Fp8, "fp8_emulated": Fp8Emulated}
"""Precision by its name in a `SparsityConfig`."""


def precision_of(config: SparsityConfig) -> type[Precision]:
    """Return the class of a configuration's precision."""
    return PRECISIONS[config.frozen_precision]


class HostWeights:
    """Frozen weights that wait in host memory while a training pass multiplies with their fp8 copies.

    They come back for every other pass: evaluation and generation are those of the model as it was loaded. The host
    copies are made once, in page-locked memory where it can be had.

    Raises:
        InputError: (by `leave`) a weight changed while it was on the device; its fp8 copy would be another's.
    """

    def __init__(self, weights: Sequence[torch.nn.Parameter]) -> None:
        self._weights = list(weights)
        self._copies: list[Tensor] = []
        self._versions: list[int] = []
        self._devices = [weight.device for weight in self._weights]
        self._is_away = False

    def leave(self) -> None:
        """Move the weights to host memory."""
        if self._is_away:
            return
        if not self._copies:
            self._copies = [_page_locked(weight) for weight in self._weights]
        elif [weight._version for weight in self._weights] != self._versions:
            raise InputError(
                "a frozen weight was changed between training passes, and its fp8 copy was not; call remove(), then "
                "sparsify again"
            )
        for weight, copy in zip(self._weights, self._copies):
            weight.data = copy
        self._is_away = True

    def come_back(self) -> None:
        """Move the weights to their device."""
        if not self._is_away:
            return
        for weight, copy, device in zip(self._weights, self._copies, self._devices):
            weight.data = copy.to(device, non_blocking=True)
        self._versions = [weight._version for weight in self._weights]
        self._is_away = False


def _page_locked(weight: Tensor) -> Tensor:
    try:
        copy = torch.empty_like(weight, device="cpu", pin_memory=True)
    except RuntimeError:  # the system allows no more of it
        copy = torch.empty_like(weight, device="cpu")
    return copy.copy_(weight.detach())
