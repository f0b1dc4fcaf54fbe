"""Patched FFN and attention projections of any transformer: its own code runs, with ours in place of its linear layers.

A patch replaces the forward of one module of one model and is undone by deleting it. Outside a training pass, or where
the shape is not that of the batch at hand, the original runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparselora.contextual.linears import Segment, join_linear, split_linear
from sparselora.contextual.plan import AttentionChoice, LayerPlan, Step
from sparselora.kernels.slots import Piece, from_slots, to_slots

Tensor = torch.Tensor
Forward = Callable[..., Any]


class Patches:
    """Replaced forwards of modules; `remove` puts everything back as it was."""

    def __init__(self) -> None:
        self._undo: list[tuple[nn.Module, Any]] = []

    def set(self, module: nn.Module, forward: Forward) -> Forward:
        """Replace the forward of this one module; returns the original."""
        original: Forward = module.forward
        self._undo.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward
        return original

    def remove(self) -> None:
        for module, own in reversed(self._undo):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own
        self._undo.clear()


@dataclass(frozen=True)
class _Rows:
    """The rows of a padded batch ``(batch · length)`` as a plan sees them.

    ``index`` gives the row of each packed token; None where every row takes part, as in an encoder: padding is computed
    with the rest, and has no say (``voters``).
    """

    index: Tensor | None
    n: int
    total: int
    split: int
    voters: Tensor | None

    @classmethod
    def of(cls, step: Step, causal: bool) -> _Rows:
        layout = step.layout
        total = layout.batch * layout.length
        if causal:
            return cls(layout.tokens, layout.n, total, step.split, None)
        return cls(None, total, total, total if step.sparse else 0, None if layout.n == total else layout.tokens)

    def slots(self, device: torch.device) -> Tensor:
        return torch.arange(self.total, device=device) if self.index is None else self.index

    def pack(self, x: Tensor) -> Tensor:
        if self.index is None:
            return x
        return from_slots(x, [Piece(0, self.n)], self.index, covered=self.n == self.total)[0]

    def unpack(self, y: Tensor) -> Tensor:
        if self.index is None:
            return y
        shape = (self.total, y.shape[1])
        return to_slots([(Piece(0, self.n), y)], self.index, shape, covered=self.n == self.total)


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def patch_block(
    patches: Patches,
    plan: LayerPlan,
    module: Callable[[str], nn.Module],
    current: Callable[[], Step | None],
    causal: bool,
) -> None:
    """Patch one block's FFN and projections.

    Args:
        module: a module of the model by name.
        current: the pass that is under way, or None.
    """

    def replace(target: nn.Module, ours: Callable[[Tensor, Step, _Rows], Tensor]) -> None:
        original: Forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            step = current()
            if step is None or not _takes_part(x, step, target, plan):
                return original(x, *args, **kwargs)
            rows = x.reshape(-1, x.shape[-1]).to(_compute_dtype(x))
            with torch.autocast(x.device.type, enabled=False):
                y = ours(rows, step, _Rows.of(step, causal))
            return y.view(*x.shape[:2], -1)

        original = patches.set(target, forward)

    ffn, attention = plan.block.ffn, plan.block.attention

    def run_ffn(x: Tensor, step: Step, rows: _Rows) -> Tensor:
        packed = rows.pack(x)
        y = rows.unpack(plan.ffn(packed, rows.split, step, rows.voters))
        return y if ffn.dropout is None else ffn.dropout(y)

    replace(module(ffn.unit), run_ffn)
    if ffn.pair:  # the unit's result is final already
        _pass_through(patches, module(ffn.down), lambda x, step: _takes_part(x, step, module(ffn.unit), plan), current)
    for part in ("q",) if attention.fused else ("q", "k", "v"):
        replace(module(getattr(attention, part)), _projection(plan, part))
    replace(module(attention.o), _output(plan))


def _takes_part(x: Tensor, step: Step, target: nn.Module, plan: LayerPlan) -> bool:
    """Whether a call of ``target`` belongs to the pass ``step``: in training (or asked for), and of its shape."""
    wanted = target.training or plan.config.sparse_eval
    return wanted and x.dim() == 3 and x.shape[:2] == (step.layout.batch, step.layout.length)


def _pass_through(
    patches: Patches, target: nn.Module, takes_part: Callable[[Tensor, Step], bool], current: Callable[[], Step | None]
) -> None:
    original: Forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        step = current()
        if step is None or not takes_part(x, step):
            return original(x, *args, **kwargs)
        return x

    original = patches.set(target, forward)


def _spans(rows: _Rows, choice: AttentionChoice | None) -> list[tuple[int, int, AttentionChoice | None]]:
    split = rows.split if choice is not None else 0
    return [(a, b, c) for a, b, c in ((0, split, choice), (split, rows.n, None)) if b > a]


def _projection(plan: LayerPlan, part: str) -> Callable[[Tensor, Step, _Rows], Tensor]:
    def run(x: Tensor, step: Step, rows: _Rows) -> Tensor:
        packed = rows.pack(x) if step.sparse and plan.attention_sparsity > 0 else x
        choose = plan.attention_chooser(packed[: rows.split], step, rows.voters)
        choice = None if choose is None else choose()
        if choice is None:
            (y,) = split_linear(x, [Segment(0, len(x), (plan.projection(part, None, x.dtype),))])
            return y
        spans = _spans(rows, choice)
        segments = [Segment(a, b, (plan.projection(part, c, x.dtype),)) for a, b, c in spans]
        values = split_linear(packed, segments)
        held = "qkv" if plan.block.attention.fused else part
        pieces = [
            (Piece(a, b, None if c is None else c.channels(held)), y) for (a, b, c), y in zip(spans, values)
        ]  # fmt: skip
        width = plan.attention[part].width
        return to_slots(pieces, rows.slots(x.device), (rows.total, width), covered=rows.n == rows.total)

    return run


def _output(plan: LayerPlan) -> Callable[[Tensor, Step, _Rows], Tensor]:
    def run(x: Tensor, step: Step, rows: _Rows) -> Tensor:
        choice = step.choices.get((plan.block.index, "attention"))
        if choice is None:
            operand = plan.output(None, x.dtype)
            return join_linear([[x]], [Segment(0, len(x), (operand,))], (len(x), plan.attention["o"].width))
        assert isinstance(choice, AttentionChoice)
        spans = _spans(rows, choice)
        places = [Piece(a, b, None if c is None else c.channels("o")) for a, b, c in spans]
        values = from_slots(x, places, rows.slots(x.device), covered=rows.n == rows.total)
        segments = [Segment(a, b, (plan.output(c, x.dtype),)) for a, b, c in spans]
        y = join_linear([[value] for value in values], segments, (rows.n, plan.attention["o"].width))
        return rows.unpack(y)

    return run
