"""The precisions of frozen products: one class each, with all that the rest of the package asks about a precision.

The products with frozen weights, forward and for the gradient of the input, are nearly all of a LoRA step. In fp8 each
weight is quantised once, a copy for each direction, and activations and gradients row by row where they are computed.
LoRA, norms, attention, the residual stream and the output layer keep the dtype of the pass. `PRECISIONS` is the
registry; names and help lines are in `sparselora.config.sparsity.PRECISIONS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

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
    def check_device(cls, device: torch.device) -> None:
        """Raise an InputError where no products can be formed on ``device``."""

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
        if not weight.is_floating_point() or weight.element_size() == 1:
            raise InputError(f"{name} is stored as {weight.dtype}; fp8 products need weights in bf16, fp16 or fp32")

    @classmethod
    def frozen(cls, W: Tensor) -> FrozenFp8:
        return FrozenFp8.of(W)


class Fp8(Fp8Emulated):
    """Products by the fp8 tensor cores."""

    leaves_device = True

    @classmethod
    def check_device(cls, device: torch.device) -> None:
        if problem := fp8_device_problem(device):
            raise InputError(
                f"frozen_precision fp8 is not possible here: {problem}; use native, or fp8_emulated to try the quality "
                "(slower than native)"
            )

    @classmethod
    def check(cls, name: str, module: torch.nn.Module, weight: Tensor) -> None:
        super().check(name, module, weight)
        cls.check_device(weight.device)
        if problem := fp8_shape_problem(*out_in(module)):
            raise InputError(f"frozen_precision fp8 is not possible for {name}: {problem}; use native")


PRECISIONS: dict[str, type[Precision]] = {"native": Precision, "fp8": Fp8, "fp8_emulated": Fp8Emulated}
"""Precision by its name in a `SparsityConfig`."""


def precision_of(config: SparsityConfig) -> type[Precision]:
    """Return the class of a configuration's precision."""
    return PRECISIONS[config.frozen_precision]


@dataclass(eq=False)
class _Stored:
    """A weight of a linear layer ``owner``, as it was when its fp8 copy was made."""

    owner: Any
    weight: torch.nn.Parameter
    device: torch.device
    version: int
    sums: Tensor
    host_copy: Tensor | None = None

    @property
    def is_away(self) -> bool:
        """True while the weight waits in host memory."""
        return self.host_copy is not None and self.weight.data_ptr() == self.host_copy.data_ptr()

    @classmethod
    def of(cls, owner: Any) -> _Stored:
        weight = owner.weight
        return cls(owner, weight, weight.device, weight._version, _sums(weight.detach()))

    def is_same(self) -> bool:
        """Return whether the weight has the numbers that it had; writing them again (as DDP does) changes nothing."""
        if self.owner.weight is not self.weight:
            return False
        if self.weight._version != self.version:
            if not torch.equal(_sums(self.weight.detach().to(self.device)), self.sums):
                return False
            self.version = self.weight._version
        return True


class Quantisable(Protocol):
    """A linear layer, or several as one, with fp8 copies."""

    fp8: FrozenFp8 | None

    @property
    def bases(self) -> list[Any]:
        """The modules that hold the weights, in the order of their output channels."""
        ...

    def fill(self) -> None:
        """Make the copies again, in their memory, from the weights as they are."""
        ...


@dataclass(eq=False)
class _Group:
    """The weights of one pair of copies."""

    layer: Quantisable
    stored: list[_Stored]
    _has_borrowed: bool = False

    def come_back(self) -> None:
        """Put the weights on their device: into the memory of the copies where they fit, else in memory of their own.

        A weight in 16 bits has the bytes of its two copies, so an evaluation needs no more memory than training.
        """
        away = [stored for stored in self.stored if stored.is_away]
        copies = self.layer.fp8
        fits = (
            copies is not None
            and len(away) == len(self.layer.bases)
            and sum(stored.weight.nbytes for stored in away) == copies.memory.storage.nbytes
        )
        places: list[Tensor | None] = [None] * len(away)
        if fits and copies is not None:
            copies.memory.reclaim, self._has_borrowed = self.leave, True
            parts = copies.memory.storage.split([stored.weight.nbytes for stored in away])
            places = [part.view(s.weight.dtype).view(s.weight.shape) for part, s in zip(parts, away)]
        for stored, place in zip(away, places):
            assert stored.host_copy is not None
            if place is None:
                place = torch.empty_like(stored.host_copy, device=stored.device)
            stored.weight.data = place.copy_(stored.host_copy, non_blocking=True)

    def leave(self) -> None:
        """Let the weights wait in host memory, and have the copies in theirs."""
        self._restore_copies()
        for stored in self.stored:
            if stored.host_copy is None:
                stored.host_copy = _page_locked(stored.weight)
            if not stored.is_away:  # model.to(device) brings them back, too
                stored.weight.data = stored.host_copy

    def stay(self) -> None:
        """Leave the weights that have come back where they are, or put them in memory of their own."""
        if self._has_borrowed:
            for stored in self.stored:
                stored.weight.data = stored.weight.detach().clone()
            self._restore_copies()
        for stored in self.stored:
            stored.host_copy = None

    def _restore_copies(self) -> None:
        """Make the copies again from the weights, after those have borrowed their memory."""
        copies = self.layer.fp8
        if self._has_borrowed and copies is not None:
            for stored in self.stored:  # merging and unmerging an adapter leaves other numbers behind
                sums = _sums(stored.weight.detach().to(stored.device))
                if stored.host_copy is not None and not torch.equal(sums, stored.sums):
                    stored.weight.data = stored.host_copy.to(stored.device)
            copies.memory.reclaim = None
            self.layer.fill()
        self._has_borrowed = False


class FrozenWeights:
    """The weights that fp8 copies were made of; in training passes they may wait in host memory.

    They are on their device in every other pass: evaluation and generation are those of the model as it was loaded. The
    host copies are made once, in page-locked memory where it can be had. In 16 bits the weights come back to where the
    fp8 copies are, and these are made again, bit for bit, for the next training pass. Other weights (fp32) come back
    next to their copies, whose memory an evaluation then needs on top.

    Args:
        leave_device: let them wait in host memory.
    """

    def __init__(self, leave_device: bool) -> None:
        self._leave_device = leave_device
        self._groups: list[_Group] = []

    @property
    def _stored(self) -> list[_Stored]:
        return [stored for group in self._groups for stored in group.stored]

    def add(self, layers: Iterable[Quantisable]) -> None:
        """Take charge of the weights of layers whose copies have just been made."""
        for layer in layers:
            owned = {id(stored.weight) for stored in self._stored}
            self._groups.append(
                _Group(layer, [_Stored.of(base) for base in layer.bases if id(base.weight) not in owned])
            )
        self._leave()

    def begin_pass(self) -> None:
        """Let the weights leave for a pass that multiplies with the copies.

        Raises:
            InputError: a weight was written to or replaced since its copy was made.
        """
        if not all(stored.is_same() for stored in self._stored):
            raise InputError(
                "a frozen weight was changed or replaced after sparsify, and its fp8 copy was not; call remove(), then "
                "sparsify again"
            )
        self._leave()

    def _leave(self) -> None:
        if self._leave_device:
            for group in self._groups:
                group.leave()

    def forget(self) -> None:
        """Hold the weights no longer: others have come in their place."""
        self._leave_device = False
        self._groups.clear()

    def come_back(self) -> None:
        """Put the weights on their device until the next training pass."""
        for group in self._groups:
            group.come_back()

    def stay(self) -> None:
        """Put the weights on their device for good: something multiplies with them in training passes, too."""
        self._leave_device = False
        self.come_back()
        for group in self._groups:
            group.stay()


def _sums(weight: Tensor) -> Tensor:
    """Return the sum and the norm of a weight in float64, by which another one is known."""
    return torch.stack((weight.sum(dtype=torch.float64), torch.linalg.vector_norm(weight, dtype=torch.float64)))


def _page_locked(weight: Tensor) -> Tensor:
    try:
        copy = torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)
    except RuntimeError:  # the system allows no more of it
        copy = torch.empty_like(weight, device="cpu")
    return copy.copy_(weight.detach())
