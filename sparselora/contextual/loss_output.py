"""The output of a training pass that has computed the loss without most logits."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparselora.errors import InputError

Tensor = torch.Tensor


class LossOutput(CausalLMOutputWithPast):
    """Output of a pass that has computed the loss without most logits; reading ``logits`` computes them all.

    A subclass per handle names the ``latest_logits`` of a loss, since autocast rebuilds an output from its class and
    its items; one that is as it was has a reader of its own.
    """

    latest_logits: Callable[[Tensor], Tensor]
    _reader: Callable[[], Tensor] | None = None
    _logits: Tensor | None = None

    def _read(self) -> Tensor | None:
        if self._logits is None and "loss" in self.keys():
            loss: Any = self.loss
            self.__dict__["_logits"] = type(self).latest_logits(loss) if self._reader is None else self._reader()
        return self._logits

    def _set(self, value: Tensor | None) -> None:
        self.__dict__["_logits"] = value

    logits: Any = property(_read, _set)

    def __getitem__(self, key: Any) -> Any:
        return self.logits if key == "logits" else super().__getitem__(key)


# To look for tensors in an output, as fully_shard does, is not to read its logits.
LossOutput.__dataclass_fields__ = {
    name: field for name, field in CausalLMOutputWithPast.__dataclass_fields__.items() if name != "logits"
}


def loss_output(latest_logits: Callable[[Tensor], Tensor]) -> type[LossOutput]:
    """The class of a handle's outputs, whose method ``latest_logits`` is.

    transformers keeps every class of outputs for as long as Python runs, so it must not keep the handle and its model.
    """
    method = weakref.WeakMethod(latest_logits)

    def read(loss: Tensor) -> Tensor:
        reader = method()
        if reader is None:
            raise InputError("the logits of a training pass were read after sparsify was undone; read them before it")
        logits: Tensor = reader(loss)
        return logits

    return type("LossOutput", (LossOutput,), {"latest_logits": staticmethod(read)})


class UnreadLogits:
    """The logits of the latest pass, computed for who reads them.

    Attributes:
        are_read: somebody has read logits; passes had better compute them from then on.
    """

    def __init__(self) -> None:
        self.are_read = False
        self._latest: tuple[Tensor, Callable[[], Tensor]] | None = None
        self._output = loss_output(self.of_loss)

    def output(self, loss: Tensor, logits: Callable[[], Tensor]) -> LossOutput:
        """Return the output of a pass with this ``loss``, whose ``logits`` are computed when somebody reads them."""

        def read() -> Tensor:
            self.are_read = True
            return logits()

        self._latest = loss.detach(), read
        computed: Any = loss  # transformers names the types of its outputs by their dtype
        output = self._output(loss=computed)
        output.__dict__["_reader"] = read
        return output

    def of_loss(self, loss: Tensor) -> Tensor:
        """The logits of the latest pass, whose ``loss`` it has to be."""
        if self._latest is None or not torch.equal(self._latest[0].float(), loss.detach().float()):
            raise InputError("the logits of a training pass were read after the next one; read them before it")
        return self._latest[1]()

    def forget(self) -> None:
        """Hold the latest pass no longer."""
        self._latest = None
