"""Patched FFN and attention projections of any transformer: its own code runs, with ours in place of its linear layers.

A patch replaces the forward of one module of one model and is undone by deleting it. Outside a training pass, or where
the shape is not that of the batch at hand, the original runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

from sparselora.config.sparsity import Part
from sparselora.contextual.choices import AttentionChoice
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.row_linear import join_linear, split_linear
from sparselora.contextual.step import Step
from sparselora.errors import InputError
from sparselora.kernels.rows import EVERY_ROW, AdapterRows, Rows
from sparselora.kernels.slots import from_slots, to_slots

Tensor = torch.Tensor
Forward = Callable[..., Any]


@dataclass(frozen=True)
class _Patch:
    """A replaced forward of ``module``; ``instance_forward`` is the one that the instance had, None for its class's."""

    module: nn.Module
    instance_forward: Any


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
        forward = module.__dict__.get("forward")
        return any(forward is method for _, method in self._patched)

    def remove(self) -> None:
        """Put every forward back; one that was set over ours stays, and ours stands aside in it."""
        for module, method in reversed(self._patched):
            if module.__dict__.get("forward") is method:
                _restore(module, method.__func__._sparselora.instance_forward)
        self._patched.clear()


def _patch_of(module: nn.Module) -> _Patch | None:
    return getattr(getattr(module.__dict__.get("forward"), "__func__", None), "_sparselora", None)


def _restore(module: nn.Module, instance_forward: Any) -> None:
    if instance_forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = instance_forward


def _unpatched(copied: nn.Module, patch: _Patch) -> Forward:
    """The forward that a copy of the patched module would have had without the patch."""
    function = (
        type(copied).forward if patch.instance_forward is None else getattr(patch.instance_forward, "__func__", None)
    )
    return patch.instance_forward if function is None else MethodType(function, copied)


def is_patched(model: nn.Module) -> bool:
    """Return whether the forward of a module of ``model`` is replaced; what a copy has of it does not count."""
    patches = [(module, _patch_of(module)) for module in model.modules()]
    return any(patch is not None and patch.module is module for module, patch in patches)


def forget_copied_patches(model: nn.Module) -> None:
    """Make a copy of a sparse model plain: take away the replaced forwards that were copied with it."""
    for module in model.modules():
        patch = _patch_of(module)
        if patch is not None and patch.module is not module:
            _restore(module, None if patch.instance_forward is None else _unpatched(module, patch))


@dataclass(frozen=True)
class _Packing:
    """The way between the rows of a padded batch ``(batch · length)`` and those that a plan computes.

    Attributes:
        index: row of each packed token; None where every row takes part, as in an encoder: padding is computed with the
            rest, but masked where channels are chosen.
        n, total: packed rows, padded rows.
        split: packed rows before this one are sparse.
        unmasked: indices of the rows that choices are made by; None for all.
        detached: packed rows before this one have no backward pass, as `sparselora.kernels.rows` says.
        adapted: the packed rows that take part in LoRAs.
    """

    index: Tensor | None
    n: int
    total: int
    split: int
    unmasked: Tensor | None
    detached: int = 0
    adapted: AdapterRows = EVERY_ROW

    @property
    def follows_order(self) -> bool:
        """Return whether what is computed differs by packed row, so that rows are to be packed."""
        return self.detached > 0 or self.adapted != EVERY_ROW

    @classmethod
    def of(cls, step: Step, causal: bool, layer: int) -> _Packing:
        layout = step.layout
        total = layout.batch * layout.length
        if causal:
            return cls(layout.tokens, layout.n, total, step.split, None, step.detached(layer), step.adapted)
        return cls(None, total, total, total if step.sparse else 0, None if layout.n == total else layout.tokens)

    def slots(self, device: torch.device) -> Tensor:
        return torch.arange(self.total, device=device) if self.index is None else self.index

    def pack(self, x: Tensor) -> Tensor:
        if self.index is None:
            return x
        covered = self.n == self.total
        return from_slots(x, [Rows(0, self.n)], self.index, covered=covered, detached=self.detached)[0]

    def unpack(self, y: Tensor) -> Tensor:
        if self.index is None:
            return y
        return self.spread([(Rows(0, self.n), y)], y.shape[1])

    def spread(self, values: Sequence[tuple[Rows, Tensor]], width: int) -> Tensor:
        """Return the padded rows ``(batch · length, width)`` of packed ones that may hold some channels only."""
        covered, slots = self.n == self.total, self.slots(values[0][1].device)
        return to_slots(values, slots, (self.total, width), covered=covered, detached=self.detached)


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def patch_block(
    patches: Patches,
    plan: LayerPlan,
    module: Callable[[str], nn.Module],
    current: Callable[[], Step | None],
    causal: bool,
    keep_weights: Callable[[], None] = lambda: None,
    *,
    dense_is_ours: bool = True,
) -> None:
    """Patch one block's FFN and projections.

    Args:
        module: a module of the model by name.
        current: the pass that is under way, or None.
        dense_is_ours: our linear layers compute a part that is dense in a sparse pass; if not, the model's own do.
        keep_weights: called where the pass needs a frozen weight itself, wherever it is.
    """

    def pass_of(part: Part) -> Step | None:
        """Return the pass that is under way, if our linear layers compute this part of the block in it."""
        step = current()
        if step is not None and step.sparse and not dense_is_ours and not plan.sparsity[part]:
            return None
        return step

    def replace(
        name: str, part: Part, compute: Callable[[Tensor, Step, _Packing], Tensor], sparsity: float = 0.0
    ) -> None:
        target = module(name)
        original: Forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            step = pass_of(part)
            if step is None:
                return original(x, *args, **kwargs)
            if not _takes_part(x, step):
                if (step.sparse and sparsity) or step.detached(plan.block.index):
                    raise InputError(
                        f"{plan.block.name}: its {type(target).__name__} was called on {tuple(x.shape[:-1])} tokens, "
                        f"the batch is {(step.layout.batch, step.layout.length)}, so it cannot be sparse; switch off "
                        "what splits or flattens its input (chunk_size_feed_forward?), or use mode dense"
                    )
                keep_weights()
                return original(x, *args, **kwargs)
            step.computed.add(name)
            flat = x.reshape(-1, x.shape[-1]).to(_compute_dtype(x))
            with torch.autocast(x.device.type, enabled=False):
                y = compute(flat, step, _Packing.of(step, causal, plan.block.index))
            # No view in autograd's eyes: some models clamp q, k and v in place.
            result: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:2], y.shape[-1]])
            return result

        original = patches.set(target, forward)

    ffn, attention = plan.block.ffn, plan.block.attention

    def run_ffn(x: Tensor, step: Step, packing: _Packing) -> Tensor:
        packed = packing.pack(x)
        noise = None
        if ffn.inner_dropout is not None:  # drawn for all rows in their order, as the model would
            noise = packing.pack(ffn.inner_dropout(x.new_ones(len(x), plan.linears.ffn_width)))
        y = plan.ffn(packed, packing.split, step, packing.unmasked, noise, packing.detached, packing.adapted)
        y = packing.unpack(y)
        return y if ffn.dropout is None else ffn.dropout(y)

    replace(ffn.unit, "ffn", run_ffn, plan.sparsity["ffn"])
    if ffn.pair:  # the unit's result is final already
        _pass_through(patches, module(ffn.down), lambda: pass_of("ffn"), keep_weights)
    for letter in ("q",) if attention.fused else ("q", "k", "v"):
        replace(getattr(attention, letter), "attention", _projection(plan, letter))
    replace(attention.o, "attention", _output(plan), plan.sparsity["attention"])


def patched_modules(plan: LayerPlan, parts: Collection[Part] = ("ffn", "attention")) -> list[str]:
    """Return the names of the modules of a block that `patch_block` replaces and a pass over its ``parts`` calls."""
    ffn, attention = plan.block.ffn, plan.block.attention
    letters = ("q",) if attention.fused else ("q", "k", "v")
    names = [ffn.unit] if "ffn" in parts else []
    return [*names, *(getattr(attention, x) for x in (*letters, "o"))] if "attention" in parts else names


def _takes_part(x: Tensor, step: Step) -> bool:
    """Return whether a call is of the shape of the pass: q and k of some models see other things than its tokens."""
    return x.dim() == 3 and x.shape[:2] == (step.layout.batch, step.layout.length)


def _pass_through(
    patches: Patches, target: nn.Module, current: Callable[[], Step | None], keep_weights: Callable[[], None]
) -> None:
    original: Forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        step = current()
        if step is not None and _takes_part(x, step):
            return x
        if step is not None:
            keep_weights()
        return original(x, *args, **kwargs)

    original = patches.set(target, forward)


def _ranges(packing: _Packing, choice: AttentionChoice) -> list[tuple[int, int, AttentionChoice | None]]:
    """Return the sparse rows with their choice, then the others, as ``(start, stop, choice)``; without empty ones."""
    ranges = ((0, packing.split, choice), (packing.split, packing.n, None))
    return [(start, stop, followed) for start, stop, followed in ranges if stop > start]


def _projection(plan: LayerPlan, part: str) -> Callable[[Tensor, Step, _Packing], Tensor]:
    linears = plan.linears
    held = "qkv" if plan.block.attention.fused else part

    def run(x: Tensor, step: Step, packing: _Packing) -> Tensor:
        is_sparse = step.sparse and plan.sparsity["attention"] > 0
        packed = packing.pack(x) if is_sparse or packing.follows_order else x
        selection = plan.score("attention", packed[: packing.split], step, packing.unmasked)
        if selection is None:
            operands = [(linears.projection(part, None, x.dtype),)]
            (y,) = split_linear(packed, [Rows(0, len(packed))], operands, packing.detached, packing.adapted)
            return packing.unpack(y) if packed is not x else y
        ranges = _ranges(packing, cast(AttentionChoice, selection.choose()))
        rows = [Rows(start, stop, None if c is None else c.channels(held)) for start, stop, c in ranges]
        operands = [(linears.projection(part, c, x.dtype),) for _, _, c in ranges]
        values = split_linear(packed, rows, operands, packing.detached, packing.adapted)
        return packing.spread(list(zip(rows, values)), linears.attention[part].width)

    return run


def _output(plan: LayerPlan) -> Callable[[Tensor, Step, _Packing], Tensor]:
    linears = plan.linears

    def run(x: Tensor, step: Step, packing: _Packing) -> Tensor:
        choice = step.choices.get((plan.block.index, "attention"))
        width = linears.attention["o"].width
        if choice is None:
            packed = packing.pack(x) if packing.follows_order else x
            rows, operands, shape = [Rows(0, len(packed))], [(linears.output(None, x.dtype),)], (len(packed), width)
            y = join_linear([[packed]], rows, operands, shape, packing.detached, packing.adapted)
            return packing.unpack(y) if packing.follows_order else y
        ranges = _ranges(packing, cast(AttentionChoice, choice))
        rows = [Rows(start, stop, None if c is None else c.channels("o")) for start, stop, c in ranges]
        covered, slots = packing.n == packing.total, packing.slots(x.device)
        values = from_slots(x, rows, slots, covered=covered, detached=packing.detached)
        operands = [(linears.output(c, x.dtype),) for _, _, c in ranges]
        shape = (packing.n, width)
        y = join_linear([[value] for value in values], rows, operands, shape, packing.detached, packing.adapted)
        return packing.unpack(y)

    return run
