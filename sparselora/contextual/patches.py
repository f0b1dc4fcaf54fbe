"""Patched FFN and attention projections of any transformer: its own code runs, with ours in place of its linear layers.

A patch replaces the forward of one module of one model and is undone by deleting it. Outside a training pass, or where
the shape is not that of the batch at hand, the original runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from sparselora.contextual.plan import AttentionChoice, LayerPlan, Step
from sparselora.contextual.row_linear import Segment, join_linear, split_linear
from sparselora.errors import InputError
from sparselora.kernels.slots import Piece, from_slots, to_slots

Tensor = torch.Tensor
Forward = Callable[..., Any]


@dataclass(frozen=True)
class _Patch:
    """A forward that was replaced: of ``module``, whose own was ``own`` (None for its class's)."""

    module: nn.Module
    own: Any


class Patches:
    """Replaced forwards of modules; `remove` puts everything back as it was.

    Each is a bound method, as what it stands for, so that a copy of the module (`copy.deepcopy`) has it bound to the
    copy. A copy computes with its own weights, dense; it raises in a training pass that should be sparse.

    Args:
        is_due: whether a training pass at this moment should be sparse.
    """

    def __init__(self, is_due: Callable[[], bool]) -> None:
        self._is_due = is_due
        self._patched: list[tuple[nn.Module, Any]] = []

    def set(self, module: nn.Module, forward: Forward) -> Forward:
        """Replace the forward of this one module, by one that torch.compile leaves alone; returns the original."""
        original: Forward = module.forward
        untraced: Forward = torch.compiler.disable(forward)  # not called outside of tracing: it takes microseconds
        patch = _Patch(module, module.__dict__.get("forward"))

        def patched(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if owner is module:
                return (untraced if torch.compiler.is_dynamo_compiling() else forward)(*args, **kwargs)
            if owner.training and torch.is_grad_enabled() and self._is_due():
                raise InputError(
                    f"{type(owner).__name__} belongs to a copy of a sparse model, and a copy is dense: this training "
                    "pass should be sparse; call sparsify on the copy, or train the original"
                )
            return _unpatched(owner, patch)(*args, **kwargs)

        functools.update_wrapper(patched, getattr(original, "__func__", original), updated=())
        # The Trainer reads from the signature which columns the model takes; __wrapped__ may have one of its own.
        parameters = inspect.signature(original).parameters.values()
        owner = inspect.Parameter("_owner", inspect.Parameter.POSITIONAL_ONLY)
        patched.__signature__ = inspect.Signature([owner, *parameters])  # type: ignore[attr-defined]
        patched._sparselora = patch  # type: ignore[attr-defined]
        self._patched.append((module, MethodType(patched, module)))
        module.__dict__["forward"] = self._patched[-1][1]
        return original

    def outermost(self, module: nn.Module) -> bool:
        """Return whether the forward of ``module`` is one of ours, not one that was set later."""
        own = module.__dict__.get("forward")
        return any(own is method for _, method in self._patched)

    def remove(self) -> None:
        """Put every forward back; one that was set over ours stays, and ours stands aside in it."""
        for module, method in reversed(self._patched):
            if module.__dict__.get("forward") is method:
                _restore(module, method.__func__._sparselora.own)
        self._patched.clear()


def _patch_of(module: nn.Module) -> _Patch | None:
    return getattr(getattr(module.__dict__.get("forward"), "__func__", None), "_sparselora", None)


def _restore(module: nn.Module, own: Any) -> None:
    if own is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = own


def _unpatched(copied: nn.Module, patch: _Patch) -> Forward:
    """The forward that a copy of the patched module would have had without the patch."""
    function = type(copied).forward if patch.own is None else getattr(patch.own, "__func__", None)
    return patch.own if function is None else MethodType(function, copied)


def is_patched(model: nn.Module) -> bool:
    """Return whether the forward of a module of ``model`` is replaced; what a copy has of it does not count."""
    patches = [(module, _patch_of(module)) for module in model.modules()]
    return any(patch is not None and patch.module is module for module, patch in patches)


def forget_copied_patches(model: nn.Module) -> None:
    """Make a copy of a sparse model plain: take away the replaced forwards that were copied with it."""
    for module in model.modules():
        patch = _patch_of(module)
        if patch is not None and patch.module is not module:
            _restore(module, None if patch.own is None else _unpatched(module, patch))


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

    def replace(target: nn.Module, ours: Callable[[Tensor, Step, _Rows], Tensor], sparsity: float = 0.0) -> None:
        original: Forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            step = current()
            if step is None:
                return original(x, *args, **kwargs)
            if not _takes_part(x, step):
                if step.sparse and sparsity:
                    raise InputError(
                        f"{plan.block.name}: its {type(target).__name__} was called on {tuple(x.shape[:-1])} tokens, "
                        f"the batch is {(step.layout.batch, step.layout.length)}, so it cannot be sparse; switch off "
                        "what splits or flattens its input (chunk_size_feed_forward?), or use mode dense"
                    )
                return original(x, *args, **kwargs)
            rows = x.reshape(-1, x.shape[-1]).to(_compute_dtype(x))
            with torch.autocast(x.device.type, enabled=False):
                y = ours(rows, step, _Rows.of(step, causal))
            # No view in autograd's eyes: some models clamp q, k and v in place.
            result: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:2], y.shape[-1]])
            return result

        original = patches.set(target, forward)

    ffn, attention = plan.block.ffn, plan.block.attention

    def run_ffn(x: Tensor, step: Step, rows: _Rows) -> Tensor:
        packed = rows.pack(x)
        noise = None
        if ffn.inner_dropout is not None:  # drawn for all rows in their order, as the model would
            noise = rows.pack(ffn.inner_dropout(x.new_ones(len(x), plan.ffn_width)))
        y = rows.unpack(plan.ffn(packed, rows.split, step, rows.voters, noise))
        return y if ffn.dropout is None else ffn.dropout(y)

    replace(module(ffn.unit), run_ffn, plan.ffn_sparsity)
    if ffn.pair:  # the unit's result is final already
        _pass_through(patches, module(ffn.down), current)
    for part in ("q",) if attention.fused else ("q", "k", "v"):
        replace(module(getattr(attention, part)), _projection(plan, part))
    replace(module(attention.o), _output(plan), plan.attention_sparsity)


def _takes_part(x: Tensor, step: Step) -> bool:
    """Return whether a call is of the shape of the pass: q and k of some models see other things than its tokens."""
    return x.dim() == 3 and x.shape[:2] == (step.layout.batch, step.layout.length)


def _pass_through(patches: Patches, target: nn.Module, current: Callable[[], Step | None]) -> None:
    original: Forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        step = current()
        if step is None or not _takes_part(x, step):
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
