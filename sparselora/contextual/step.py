"""One pass over a batch: its tokens, and what its layers have chosen so far."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sparselora.config.sparsity import Part
from sparselora.contextual.choices import Choice
from sparselora.contextual.layout import TokenLayout
from sparselora.kernels.rows import AdapterRows

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """One pass over a batch.

    Attributes:
        layout: the batch's tokens in packed order.
        sparse: sparse layers are sparse in this pass.
        split: packed rows before this one are sparse tokens.
        seed: seed of draws of channels, another one in every pass.
        choices: choice of each layer's part, filled in as the pass reaches it; a recomputation of the pass reads them.
        is_packed: our own code runs the whole pass, and leaves out layers that nothing depends on.
        attached_layers: number of layers, from the first, in which the context has a backward pass; None for all.
        sample_weight: factor of the LoRA gradients of the layout's sampled context.
        scores: scores of channels by mode, layer and part, shared by passes in which they are the same; None where they
            are not kept.
        computed: names of the modules that the pass has called in our place of them; not filled in if ``is_packed``.
    """

    layout: TokenLayout
    sparse: bool
    split: int
    seed: int
    choices: dict[tuple[int, str], Choice] = field(default_factory=dict)
    is_packed: bool = False
    attached_layers: int | None = None
    sample_weight: float = 1.0
    scores: dict[tuple[str, int, Part], Any] | None = None
    computed: set[str] = field(default_factory=set)
    _samples: dict[tuple[int, int], Tensor | None] = field(default_factory=dict, init=False)

    @property
    def is_cheaper(self) -> bool:
        """Return whether the pass leaves out more than what the result does not depend on."""
        return self.sparse or self.attached_layers is not None or self.layout.n_detached > 0

    def detached(self, layer: int) -> int:
        """Return the packed row of layer ``layer`` before which rows have no backward pass; 0 where all have one."""
        cut = self.attached_layers is not None and layer >= self.attached_layers
        return self.layout.n_context if cut else self.layout.n_detached

    @property
    def adapted(self) -> AdapterRows:
        """The part of the packed rows in the LoRAs."""
        return AdapterRows(self.layout.n_inactive, self.layout.n_sampled, self.sample_weight)

    def sampled(self, x: Tensor, unmasked: Tensor | None, limit: int) -> Tensor:
        """Return at most ``limit`` of the unmasked rows of ``x (t, d)``, evenly spaced, the same for every layer.

        Args:
            unmasked: indices of the rows that count; None for all.
            limit: 0 takes all.
        """
        index = self._sample(limit, len(x) if unmasked is None else len(unmasked))
        if unmasked is not None:
            index = unmasked if index is None else unmasked.index_select(0, index)
        return x if index is None else x.index_select(0, index)

    def _sample(self, limit: int, total: int) -> Tensor | None:
        if (limit, total) not in self._samples:
            index = self.layout.spread(limit, total)
            if index is not None and self.layout.places is not None and total == self.split:
                index = self.layout.places.index_select(0, index)  # the same tokens, whatever is drawn
            self._samples[limit, total] = index
        return self._samples[limit, total]


@contextmanager
def side_stream(x: Tensor, wanted: bool) -> Iterator[Callable[[], Any]]:
    """Run the block on a second stream, after all that came before; the yielded function returns the event of its end.

    It is for a selection, which occupies one multiprocessor or two, next to the dense tokens' products on all others;
    what would occupy them all is to be done before, or it waits for those products. What the block allocates may be
    freed any time: a later block on that stream waits for everything that was enqueued before it. On a CPU, or where it
    is not ``wanted``, the block runs as usual and the event is None.
    """
    if not wanted or not x.is_cuda:
        yield lambda: None
        return
    stream = _second_stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        yield stream.record_event


@functools.cache
def _second_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
