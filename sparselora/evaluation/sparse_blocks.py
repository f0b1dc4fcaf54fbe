"""Blocks of a model that are sparse during chosen forward passes, and the proof that they may be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.contextual.modes import Mode, mode_of
from sparselora.contextual.patches import Patches, patch_block, patched_modules
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.proof import disproof, tolerance, trial_batch, undisturbed
from sparselora.contextual.statistics import apply_moments
from sparselora.contextual.step import Step
from sparselora.contextual.structure import Block, Structure, attention_disproof, base_weight, distinct_blocks
from sparselora.errors import InputError
from sparselora.evaluation.layer_passes import LayerPasses, RowBatch

Tensor = torch.Tensor


@dataclass
class SameInput:
    """Results that passes over one block share, because its input is the same and one part alone is sparse in each.

    Attributes:
        scores: of channels, as in a `Step`.
        attention: what the block's attention returns where it is dense; None before the first pass in which it is.
    """

    scores: dict[tuple[str, int, Part], Any] = field(default_factory=dict)
    attention: Any = None


class SparseBlocks:
    """Blocks of a model whose sparse parts follow plans while a pass is under way, and are the model's own otherwise.

    Args:
        layers: blocks to patch, by index.
        config: what every plan begins with; `set_mode` changes it.
    """

    def __init__(self, structure: Structure, layers: Sequence[int], config: SparsityConfig) -> None:
        self.plans = [LayerPlan(structure, structure.blocks[layer], config) for layer in layers]
        self._patches = Patches(lambda: False)
        self._step: Step | None = None
        self._steps: list[Step] = []
        self._same_input: SameInput | None = None
        self._attached: dict[tuple[int, str], Mode] = {}
        for plan in self.plans:
            patch_block(
                self._patches, plan, structure.module, lambda: self._step, causal=True, dense_is_ours=False
            )  # fmt: skip
            self._patch_parts(plan, structure)
            self._patch_attention(plan, structure)

    def set_mode(self, config: SparsityConfig, moments: Mapping[str, Tensor], cache_dir: str | Path | None) -> None:
        """Let the blocks be sparse as ``config`` says, by the calibrated ``moments``."""
        for plan in self.plans:
            plan.mode = mode_of(config)(plan.linears, config)
            place = (plan.block.index, config.mode)
            plan.mode.attach(cache_dir, self._attached.get(place))
            self._attached[place] = plan.mode
            if config.needs_calibration and any(plan.sparsity.values()):
                apply_moments(plan, moments)

    @property
    def is_fixed(self) -> bool:
        """Return whether all choices were made by `set_mode`, so that they are the same for every batch."""
        return all(
            part in plan.mode.fixed for plan in self.plans for part, sparsity in plan.sparsity.items() if sparsity
        )

    @contextmanager
    def within(self, batch: RowBatch, *, all_tokens: bool, same_input: SameInput | None = None) -> Iterator[None]:
        """Have the blocks be sparse for a pass over ``batch``: for its context tokens, or for all.

        In a batch that was joined, each of its parts makes choices of its own.

        Args:
            same_input: shared with passes of the one block over this batch whose input is the same.
        """
        assert same_input is None or len(self.plans) == 1
        scores = None if same_input is None else same_input.scores
        parts = (batch,) if self.is_fixed else batch.parts
        layouts = [part.layout for part in parts]
        steps = [Step(x, sparse=True, split=x.n if all_tokens else x.n_context, seed=0, scores=scores) for x in layouts]
        self._same_input = same_input
        try:
            with self._during(steps):
                yield
        finally:
            self._same_input = None

    @contextmanager
    def dense(self, batch: RowBatch) -> Iterator[None]:
        """Have our linear layers compute a pass over ``batch`` in place of the model's own, all of it."""
        with self._during([Step(batch.layout, sparse=False, split=0, seed=0)]):
            yield

    @contextmanager
    def _during(self, steps: list[Step]) -> Iterator[None]:
        self._steps, self._step = steps, steps[0]
        try:
            yield
        finally:
            self._steps, self._step = [], None
        for plan in self.plans:
            sparse = [part for part, sparsity in plan.sparsity.items() if sparsity]
            if any(not step.computed.issuperset(patched_modules(plan, sparse)) for step in steps):
                raise InputError(f"{plan.block.name} ran dense in a pass in which it should have been sparse")

    def _patch_parts(self, plan: LayerPlan, structure: Structure) -> None:
        """Have the sparse modules of a block compute the parts of a joined batch one after the other."""
        down = [plan.block.ffn.down] if plan.block.ffn.pair else []
        names: dict[Part, list[str]] = {
            "ffn": [*patched_modules(plan, ["ffn"]), *down], "attention": patched_modules(plan, ["attention"])
        }  # fmt: skip
        for part, name in ((part, name) for part, of_part in names.items() for name in of_part):
            self._patch_module(plan, part, structure.module(name))

    def _patch_module(self, plan: LayerPlan, part: Part, module: nn.Module) -> None:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if len(self._steps) < 2 or not plan.sparsity[part]:
                return original(x, *args, **kwargs)
            outputs = []
            for step, rows in zip(self._steps, x.split([step.layout.batch for step in self._steps]), strict=True):
                self._step = step
                output = original(rows[:, : step.layout.length], *args, **kwargs)
                outputs.append(F.pad(output, (0, 0, 0, x.shape[1] - output.shape[1])))
            return torch.cat(outputs)

        original = self._patches.set(module, forward)

    def _patch_attention(self, plan: LayerPlan, structure: Structure) -> None:
        """Have the attention of a block run once for all passes with the same input in which it is dense."""
        name, ffn = _attention_module(plan.block), plan.block.ffn
        if name is None:
            return

        def forward(*args: Any, **kwargs: Any) -> Any:
            shared = self._same_input
            if shared is None or plan.sparsity["attention"]:
                return original(*args, **kwargs)
            if shared.attention is None:
                output = original(*args, **kwargs)
                if any(ffn.unit in step.computed for step in self._steps):
                    return output  # the FFN came first, and this is not the same in another pass
                shared.attention = output
            # Copies: a block may add to what its attention returns in place.
            if isinstance(shared.attention, tuple):
                return (shared.attention[0].clone(), *shared.attention[1:])
            return shared.attention.clone()

        original = self._patches.set(structure.module(name), forward)

    def remove(self) -> None:
        """Put every module back as it was."""
        self._patches.remove()
        for plan in self.plans:
            plan.linears.release()


def _attention_module(block: Block) -> str | None:
    """Return the name of the module that holds the block's projections and not its FFN; None where there is none."""
    projections = [getattr(block.attention, letter).split(".") for letter in "qkvo"]
    common = itertools.takewhile(lambda levels: len(set(levels)) == 1, zip(*projections))
    name = ".".join(levels[0] for levels in common)
    holds_ffn = any(f"{x}.".startswith(f"{name}.") for x in (block.ffn.unit, block.ffn.up, block.ffn.down))
    return name if name.startswith(f"{block.name}.") and not holds_ffn else None


def prove_blocks(structure: Structure, parts: Sequence[Part]) -> None:
    """Prove on a few tokens that passes may begin at a block, that its linear layers may be replaced, and its heads.

    Forward passes alone: training, which `sparsify` proves, is not needed to measure.

    Args:
        parts: of a layer that will be sparse.
    Raises:
        InputError: they may not.
    """
    model = structure.model
    _prove_restart(structure)
    for block in distinct_blocks(structure) if "attention" in parts else ():
        if not block.attention.fused and (reason := attention_disproof(structure, block)):
            raise InputError(
                f"attention sparsity of {block.name} is not supported: its projections could not be proved to be q, k "
                f"and v of {block.attention.heads} heads in {block.attention.kv_heads} groups ({reason}); leave "
                "attention_levels empty"
            )
    batch = trial_batch(model)
    rows = RowBatch.build(batch, batch["input_ids"].device)
    blocks = SparseBlocks(structure, range(len(structure.blocks)), SparsityConfig(mode="dense"))

    def logits() -> list[Tensor]:
        return [model(**rows.inputs, use_cache=False).logits.flatten(0, 1)[rows.layout.tokens]]

    def ours() -> list[Tensor]:
        with blocks.dense(rows):
            return logits()

    try:
        limit = tolerance(base_weight(blocks.plans[0].linears.up.module), 1e-3, 0.25)  # those of a training step
        with undisturbed(model), torch.no_grad():
            reason = disproof(logits, ours, limit)
    finally:
        blocks.remove()
    if reason is not None:
        raise InputError(
            f"{type(model).__name__} is not supported: with its linear layers replaced by ours, a pass has other "
            f"logits ({reason})"
        )


def _prove_restart(structure: Structure) -> None:
    """Prove that a model whose blocks are called one after the other has the losses of a whole pass.

    Raises:
        InputError: it has not.
    """
    passes, batch = LayerPasses(structure), trial_batch(structure.model)
    rows = RowBatch.build(batch, batch["input_ids"].device)

    def whole() -> list[Tensor]:
        return [torch.from_numpy(passes.dense(rows, 0)[0])]

    def restarted() -> list[Tensor]:
        _, hidden = passes.dense(rows, 0)
        return [passes.losses_after(rows, 0, passes.block_outputs(rows, 0, hidden, [nullcontext()]))[0].cpu()]

    weight = base_weight(structure.module(structure.blocks[0].ffn.up))
    with undisturbed(structure.model):
        structure.model.eval()
        reason = disproof(whole, restarted, tolerance(weight, 1e-4, 1e-2))
    if reason is not None:
        raise InputError(
            f"{type(structure.model).__name__} is not supported: its blocks, called one after the other, have other "
            f"losses than a whole pass ({reason}), so that layers cannot be measured one at a time"
        )
