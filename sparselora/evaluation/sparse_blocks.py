"""Blocks of a model that are sparse during chosen forward passes, and the proof that they may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.contextual.modes import mode_of
from sparselora.contextual.patches import Patches, patch_block, patched_modules
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.proof import disproof, tolerance, trial_batch, undisturbed
from sparselora.contextual.statistics import apply_moments
from sparselora.contextual.step import Step
from sparselora.contextual.structure import Structure, attention_disproof, base_weight, distinct_blocks
from sparselora.errors import InputError
from sparselora.evaluation.layer_passes import RowBatch

Tensor = torch.Tensor


class SparseBlocks:
    """Blocks of a model whose linear layers follow plans while a pass is under way, and are the model's own otherwise.

    Args:
        layers: blocks to patch, by index.
        config: what every plan begins with; `set_mode` changes it.
    """

    def __init__(self, structure: Structure, layers: Sequence[int], config: SparsityConfig) -> None:
        self.plans = [LayerPlan(structure, structure.blocks[layer], config) for layer in layers]
        self._patches = Patches(lambda: False)
        self._step: Step | None = None
        for plan in self.plans:
            patch_block(self._patches, plan, structure.module, lambda: self._step, causal=True)

    def set_mode(self, config: SparsityConfig, moments: Mapping[str, Tensor], cache_dir: str | Path | None) -> None:
        """Let the blocks be sparse as ``config`` says, by the calibrated ``moments``."""
        for plan in self.plans:
            plan.mode = mode_of(config)(plan.linears, config)
            plan.mode.attach(cache_dir)
            if config.needs_calibration and any(plan.sparsity.values()):
                apply_moments(plan, moments)

    @property
    def is_fixed(self) -> bool:
        """Return whether all choices were made by `set_mode`, so that they are the same for every batch."""
        return all(
            part in plan.mode.fixed for plan in self.plans for part, sparsity in plan.sparsity.items() if sparsity
        )

    @contextmanager
    def within(self, batch: RowBatch, *, all_tokens: bool) -> Iterator[None]:
        """Have the blocks be sparse for a pass over ``batch``: for its context tokens, or for all."""
        layout = batch.layout
        with self._during(Step(layout, sparse=True, split=layout.n if all_tokens else layout.n_context, seed=0)):
            yield

    @contextmanager
    def dense(self, batch: RowBatch) -> Iterator[None]:
        """Have our linear layers compute a pass over ``batch`` in place of the model's own, all of it."""
        with self._during(Step(batch.layout, sparse=False, split=0, seed=0)):
            yield

    @contextmanager
    def _during(self, step: Step) -> Iterator[None]:
        self._step = step
        try:
            yield
        finally:
            self._step = None
        for plan in self.plans:
            if any(plan.sparsity.values()) and not step.computed.issuperset(patched_modules(plan)):
                raise InputError(f"{plan.block.name} ran dense in a pass in which it should have been sparse")

    def remove(self) -> None:
        """Put every module back as it was."""
        self._patches.remove()
        for plan in self.plans:
            plan.linears.release()


def prove_blocks(structure: Structure, parts: Sequence[Part]) -> None:
    """Prove on a few tokens that the linear layers of every block may be replaced, and that its heads are as they seem.

    Forward passes alone: training, which `sparsify` proves, is not needed to measure.

    Args:
        parts: of a layer that will be sparse.
    Raises:
        InputError: they may not.
    """
    model = structure.model
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
