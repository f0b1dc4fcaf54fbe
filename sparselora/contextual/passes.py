"""The passes of one converted model: by its own code over our blocks, with our output layer, or packed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.activated import invocation_starts, invocation_tokens
from sparselora.contextual.decoder import PackedDecoder, packed_decoder
from sparselora.contextual.graphs import GraphedLoss
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.modes import mode_of
from sparselora.contextual.output_layer import is_readable, labelled_loss, plain_head
from sparselora.contextual.pass_arguments import batch_shape, is_packable
from sparselora.contextual.patches import Patches, patch_block, patched_modules
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.precision import FrozenWeights, precision_of
from sparselora.contextual.requirements import check_computed, check_layers, check_refresh
from sparselora.contextual.sharding import is_sharded, reduce_every_gradient
from sparselora.contextual.step import Step
from sparselora.contextual.structure import Structure, partition
from sparselora.errors import InputError
from sparselora.kernels.cross_entropy import Observer

Tensor = torch.Tensor


class Passes:
    """The passes of one model, whose blocks follow the `Step` that is under way.

    Attributes:
        structure, plans, config: of the model, of its layers, and their settings.
        decoder: the packed pass; None where the model has another structure or function.
        head: the output layer that the loss without packing is computed by at labels only; None where it is not plain.
        packs_backbone: the model without its output layer runs packed, whoever calls it in a pass of ours.
        frozen: the frozen weights that fp8 copies stand for.
        patches: the forwards that are replaced.
        step: the pass that is under way, or that a backward pass may recompute.
        observe: sees the output layer's input rows, logits and targets in every training pass.
    """

    def __init__(
        self, structure: Structure, plans: list[LayerPlan], config: SparsityConfig, is_due: Callable[[], bool],
        *, keep_weights: bool,
    ) -> None:  # fmt: skip
        self.structure, self.plans, self.config = structure, plans, config
        self._is_due = is_due
        self.patches = Patches(is_due)
        self.step: Step | None = None
        self.observe: Observer | None = None
        self.packs_backbone = False
        self._inside = 0
        self._invocation = invocation_tokens(structure.model)
        has_own_forward = is_own_forward(structure.model)
        self.decoder = packed_decoder(structure, plans, has_own_forward)
        trained = [p for p in structure.model.parameters() if p.requires_grad]
        self.is_sharded = is_sharded(plans[0].linears.up.base)
        if self.is_sharded:
            check_refresh(config)
        if self.decoder is not None and trained and trained[0].is_cuda and not self.is_sharded:
            self.decoder.graphs = GraphedLoss(trained)
        self.head: nn.Linear | None = None
        if structure.causal and has_own_forward:
            self.head = plain_head(structure.model, None if self.decoder is None else self.decoder.head)
        self.frozen = FrozenWeights(precision_of(config).leaves_device and not keep_weights)
        for plan in plans:
            patch_block(self.patches, plan, structure.module, self._current, structure.causal, self.frozen.stay)
        if self.decoder is not None:
            self._patch_backbone(self.decoder)

    @property
    def graphs(self) -> GraphedLoss | None:
        """The CUDA graphs of the packed pass, where it has them."""
        return None if self.decoder is None else self.decoder.graphs

    @property
    def is_inside(self) -> bool:
        """True within a pass."""
        return self._inside > 0

    @property
    def has_activated(self) -> bool:
        """True if the LoRA is an activated one."""
        return self._invocation is not None

    @property
    def device(self) -> torch.device:
        return self.plans[0].linears.device

    @property
    def trains(self) -> bool:
        """True in a training pass of a model that differs from the plain one in some."""
        return not self.config.is_exact and self.structure.model.training and torch.is_grad_enabled()

    @property
    def follows_labels(self) -> bool:
        """True if a pass treats context and output tokens differently."""
        return (self.config.is_sparse and self.config.dense_output_tokens) or self.config.cuts_context

    @contextmanager
    def within(self, step: Step | None) -> Iterator[None]:
        """Have the blocks follow ``step``, or be as they are. After it, a pass with gradients can be recomputed."""
        before, self.step = self.step, step
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if step is None or self._inside or not torch.is_grad_enabled():
                self.step = before

    def _current(self) -> Step | None:
        """The pass that a call of a block belongs to; None leaves the block as it is."""
        if self._inside:
            return self.step
        if torch._C._current_graph_task_id() != -1:  # backward: gradient checkpointing computes the block again
            return self.step
        if self._is_due() and self.structure.model.training and torch.is_grad_enabled():
            raise InputError(self._bypassed())
        self.frozen.come_back()  # a part of the model is called by itself
        return None

    def _bypassed(self) -> str:
        model: Any = self.structure.model
        if self.patches.outermost(model):
            cause = f"a part of {type(model).__name__} was called by itself; call the model"
        else:
            function = getattr(model.forward, "__func__", model.forward)
            name = getattr(function, "__qualname__", type(function).__name__)
            cause = (
                f"the forward of {type(model).__name__} was replaced after sparsify, by {name}, which does not call "
                "the sparse one; add SparsityCallback(handle) to the trainer, or call begin_step before each step, or "
                "call sparsify once the trainer is made"
            )
        return f"a training pass should be sparse and went past sparsify: {cause}"

    def _patch_backbone(self, decoder: PackedDecoder) -> None:
        """Have the model without its output layer run on packed tokens, whoever calls it in one of our passes."""
        backbone = decoder.decoder
        names = list(inspect.signature(type(backbone).forward).parameters)[1:]

        def forward(*args: Any, **kwargs: Any) -> Any:
            step = self._current()
            arguments = {**dict(zip(names, args)), **kwargs}
            if (
                step is None
                or not self.packs_backbone
                or not self.is_packable(arguments, step.layout)
                or batch_shape(arguments) != (step.layout.batch, step.layout.length)
            ):
                return original(*args, **kwargs)
            hidden: Any
            with self.within(None):
                hidden = decoder.whole_hidden(step, arguments["input_ids"], arguments.get("position_ids"))
            step.computed.update(name for plan in self.plans for name in patched_modules(plan))
            return BaseModelOutputWithPast(last_hidden_state=hidden)

        original = self.patches.set(backbone, forward)

    def quantise(self) -> None:
        """Make the fp8 copies of frozen weights that products are formed from."""
        for plan in self.plans:  # block by block: there may be no room for all weights and all copies
            plan.linears.quantise(precision_of(self.config))
            if not self.is_sharded:
                self.frozen.add(plan.linears.products)

    def follow_shards(self) -> None:
        """Read weights that have been sharded in the layers' passes, and free what was made of them before."""
        check_refresh(self.config)
        self.is_sharded = True
        self.frozen.forget()
        for plan in self.plans:
            plan.linears.follow_shards()
        if mode_of(self.config).replaces_layer:
            reduce_every_gradient(self.structure.model)
        if self.decoder is not None:
            self.decoder.graphs = None

    def cut(self, step: Step) -> Step:
        """Return ``step`` with a backward pass for the part of the context that the settings say."""
        if self._invocation is not None:  # there is none before the invocation tokens, and all behind them has one
            return step
        if not self.config.samples_context:
            return replace(step, attached_layers=self.config.attached_layers(len(self.plans)))
        share = self.config.context_backward_share
        drawn = step.layout.draw(share, step.seed)
        layout = _on_host(step.layout, lambda layout: layout.sampled(drawn))
        return replace(step, layout=layout, sample_weight=1 / share)

    def split(self, layout: TokenLayout) -> int:
        """Number of packed rows that a sparse pass treats as sparse."""
        return layout.n_context if self.config.dense_output_tokens else layout.n

    def activated(self, layout: TokenLayout, arguments: Mapping[str, Any]) -> TokenLayout:
        """Return the layout with the tokens on which an activated LoRA is inactive in front.

        Raises:
            InputError: the batch has embeddings in place of tokens; labels where the adapter is inactive.
        """
        if self._invocation is None:
            return layout
        if arguments.get("input_ids") is None:
            raise InputError("an activated LoRA looks for its invocation tokens in input_ids, and a pass has none")
        if getattr(self.structure.module(self.plans[0].block.name), "gradient_checkpointing", False):
            raise InputError(
                "gradient checkpointing of a model with an activated LoRA is not supported; switch it off: what comes "
                "before the invocation tokens is not kept for the backward pass anyway"
            )
        starts = invocation_starts(arguments["input_ids"], self._invocation)
        return _on_host(layout, lambda layout: layout.activated(starts))

    def packed_loss(self, step: Step, arguments: Mapping[str, Any]) -> Tensor:
        assert self.decoder is not None
        return self.decoder.loss(
            step, arguments["input_ids"], arguments.get("position_ids"), arguments.get("num_items_in_batch")
        )

    def labelled_loss(self, arguments: Mapping[str, Any], layout: TokenLayout) -> Tensor:
        """The loss by the model's own pass, with the output layer at labelled positions only."""
        assert self.head is not None
        return labelled_loss(self.structure.model, self.head, arguments, layout, self.observe)

    def is_packable(self, arguments: Mapping[str, Any], layout: TokenLayout) -> bool:
        """Return whether the packed pass can stand for one with these arguments."""
        if self.decoder is None:
            return False
        if self.is_sharded:
            if not self.decoder.gathers_layers or not is_readable(self.decoder.head):
                return False
        elif partition(self.plans[0].linears.up.base.weight):  # whole only while its own block runs
            return False
        return is_packable(arguments, layout, self.decoder.window)

    def check_layers(self) -> None:
        """Raise where the first block's layers are no longer those that were converted."""
        check_layers(self.structure, self.plans, self.has_activated)

    def check_computed(self, step: Step) -> None:
        """Raise where a layer took no part in the pass that has ended."""
        check_computed(self.structure, self.plans, self.config, step)

    def remove(self) -> None:
        """Put every module back as it was."""
        self.patches.remove()
        if self.graphs is not None:
            self.graphs.clear()  # their memory is theirs alone while they live: 98 GB after a whole benchmark
        for plan in self.plans:
            plan.linears.release()
        self.frozen.stay()  # where the copies were there is room now
        self.step = None


def _on_host(layout: TokenLayout, change: Callable[[TokenLayout], TokenLayout]) -> TokenLayout:
    """Return ``change(layout)``, made on the CPU where the layout comes from there: only there it gets a ``graph``."""
    return change(layout) if layout.host is None else change(layout.host).to(layout.tokens.device)


def is_own_forward(model: Any) -> bool:
    """Return whether the forward of ``model`` is that of its class, and not one that a trainer has set."""
    function = getattr(getattr(model, "_old_forward", model.forward), "__func__", None)  # accelerate's hooks keep it
    return function is type(model).forward
