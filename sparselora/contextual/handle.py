"""Make one model's training steps sparse, and undo it: `sparsify` and its `Handle`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.cache import Cache
from sparselora.contextual.choices import Choice
from sparselora.contextual.decoder import PackedDecoder
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.loss_output import LossOutput, UnreadLogits
from sparselora.contextual.modes import mode_of
from sparselora.contextual.output_layer import is_readable, no_loss
from sparselora.contextual.pass_arguments import batch_shape, layout_of, wants_loss_alone
from sparselora.contextual.passes import Passes, is_own_forward
from sparselora.contextual.patches import forget_copied_patches, is_patched
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.precision import precision_of
from sparselora.contextual.proof import undisturbed
from sparselora.contextual.requirements import check_layers, check_settings
from sparselora.contextual.sharding import check_loaded_everywhere, gathered, gathered_root, is_sharded
from sparselora.contextual.statistics import Calibration
from sparselora.contextual.step import Step
from sparselora.contextual.step_count import StepCount
from sparselora.contextual.structure import Structure, find_blocks
from sparselora.contextual.trainers import attach, calibration_batches, is_trainer
from sparselora.contextual.trial import try_passes
from sparselora.errors import InputError
from sparselora.kernels.cross_entropy import Observer
from sparselora.models.four_bit import keep_storage
from sparselora.numerics.channels import keep_count

Tensor = torch.Tensor

_FEW_CONTEXT = 0.02
"""Share of context tokens below which a batch counts as one without."""

GRAPH_MULTIPLE = 128
"""What collators give `TokenLayout.build` as ``multiple`` for training on a GPU."""


def sparsify(
    model: nn.Module | Any,
    config: SparsityConfig,
    *,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    cache_dir: str | Path | None = None,
    keep_weights: bool = False,
) -> Handle:
    """Make the training passes of ``model`` sparse as ``config`` says; evaluation and generation stay dense.

    Passes without gradients are dense too: a reference model, the probabilities of sampled text.

    With gradient checkpointing, a model that does not run packed must go backward through a pass before the next one.
    Only this model object changes, and only the ``forward`` of some of its modules; `Handle.remove` puts them back. The
    model stands on its device, with its adapter attached and its base weights frozen. A copy of it (`copy.deepcopy`) is
    dense, and its training passes raise while the model's should be sparse.

    A training pass that should be sparse and cannot be raises InputError. The labels say which tokens are context; in
    their place ``logits_to_keep``, of which all other positions are context, or ``token_layout``, a `TokenLayout`. With
    keywords that are not the model's own, or a loss of its own, the model's own forward runs around the sparse layers.

    Given a trainer of transformers or TRL, its model is converted, its steps are followed, and the labels that it takes
    out of a batch (label smoothing, a loss of its own) are still known; calibration batches, where the mode needs them
    and none are given, are the first of its training data.

    In an encoder under mode ``skip`` or ``surrogate`` the adapter of a replaced layer gets no gradient:
    DistributedDataParallel then needs ``find_unused_parameters=True``.

    Args:
        model: a transformers model, with or without PEFT's wrapper; or a trainer that has one.
        calibration: collated batches of training data, for the modes that need them (``config.needs_calibration``).
        cache_dir: where estimators and calibrations are kept; None for the user's cache folder.
        keep_weights: with ``frozen_precision`` fp8, leave the frozen weights on the device, next to their fp8 copies,
            in place of host memory: they belong to another model as well.

    Raises:
        InputError: a model that is sparse already, an unsupported architecture or adapter, layers the model does not
            have, a rank that is too large, or no calibration where one is needed.
    """
    trainer: Any = model if is_trainer(model) else None
    if trainer is not None:
        model = trainer.model
        if calibration is None and config.needs_calibration:
            calibration = calibration_batches(trainer)
    permit = keep_storage(model)
    try:
        with gathered_root(model):
            handle = _converted(model, config, calibration, cache_dir, keep_weights)
    except BaseException:
        permit()
        raise
    detach = (lambda: None) if trainer is None else attach(handle, trainer)

    def undo() -> None:
        permit()
        detach()

    handle.on_remove = undo
    return handle


def _converted(
    model: nn.Module,
    config: SparsityConfig,
    calibration: Iterable[Mapping[str, Tensor]] | None,
    cache_dir: str | Path | None,
    keep_weights: bool,
) -> Handle:
    if is_patched(model):
        raise InputError("the model is sparse already; call remove() on its handle first")
    forget_copied_patches(model)
    structure = find_blocks(model)
    check_loaded_everywhere(structure.module(structure.blocks[0].name))
    config.check(len(structure.blocks))
    plans = [LayerPlan(structure, block, config) for block in structure.blocks]
    check_settings(structure, plans, config)
    cache = Cache(cache_dir)
    for plan in plans:
        with gathered(structure.module(plan.block.name)):
            plan.mode.attach(cache_dir)
    calibrated = None
    if config.needs_calibration:
        if calibration is None:
            raise InputError(
                f"mode {config.mode} with compensate {config.compensate} needs calibration batches of training data; "
                "give sparsify(..., calibration=batches)"
            )
        calibrated = Calibration(structure, plans, calibration, cache)
        calibrated.run()
    return Handle(structure, plans, config, calibrated, keep_weights=keep_weights)


class Handle:
    """A model whose training passes are sparse.

    Attributes:
        config: the settings.
        packed: whether the layers run on packed tokens (Llama-like decoders), or block by block.
        report: one row a layer: its sparsities, and how many channels stay.
        on_remove: called by `remove` when every module is as it was.
    """

    def __init__(
        self, structure: Structure, plans: list[LayerPlan], config: SparsityConfig, calibration: Calibration | None,
        *, keep_weights: bool = False,
    ) -> None:  # fmt: skip
        self.config, self._structure, self._plans, self._calibration = config, structure, plans, calibration
        self.on_remove: Callable[[], None] = lambda: None
        self._steps = StepCount(config)
        self._logits = UnreadLogits()
        self._latest: Step | None = None
        self._labels: Tensor | None = None
        self._has_warned = self._measuring = self._removed = False
        self._names = list(inspect.signature(type(structure.model).forward).parameters)[1:]
        self._passes = Passes(structure, plans, config, lambda: self._is_due, keep_weights=keep_weights)
        try:
            with undisturbed(structure.model):
                try_passes(self._passes)
        except BaseException:
            self.remove()
            raise
        self._passes.step = None
        self._stand_outermost()

    @property
    def packed(self) -> bool:
        return self._decoder is not None

    @property
    def _decoder(self) -> PackedDecoder | None:
        return self._passes.decoder

    @property
    def active(self) -> bool:
        """True if the next training pass is sparse; otherwise it is dense, with the exact savings."""
        return self._steps.is_active and self.config.is_sparse and not self._removed

    @property
    def _is_due(self) -> bool:
        """True if the next training pass has to be ours: sparse, or otherwise not what the model would compute."""
        return self.active or (self.config.changes_every_step and not self._removed)

    @property
    def report(self) -> list[dict[str, Any]]:
        rows = []
        for plan in self._plans:
            heads = plan.block.attention
            width, sparsity = plan.linears.ffn_width, plan.sparsity["ffn"]
            channels = mode_of(self.config).ffn_channels(self.config, width, sparsity) if sparsity else width
            rows.append(
                {
                    "layer": plan.block.index,
                    "name": plan.block.name,
                    "ffn_sparsity": sparsity,
                    "ffn_channels": width,
                    "ffn_kept": channels,
                    "attention_sparsity": plan.sparsity["attention"],
                    "kv_channels": heads.kv_width,
                    "kv_kept": keep_count(heads.kv_width, 1 - plan.sparsity["attention"]),
                }
            )
        return rows

    def choices(self) -> dict[tuple[int, str], Choice]:
        """Choices of the latest pass, by layer and part (``ffn``, ``attention``); dense layers are absent."""
        return {} if self._latest is None else dict(self._latest.choices)

    def hold_choices(self) -> None:
        """Keep the channels of the latest pass from now on. What choosing costs is the difference in time."""
        for (layer, part), choice in self.choices().items():
            self._plans[layer].mode.fixed[part] = choice
        self.forget_graphs()

    def begin_step(self, step: int, total_steps: int) -> None:
        """Announce the next optimizer step, counted from 0: it may be sparse, and it seeds mode random."""
        if self._removed:
            return
        if not self._passes.patches.outermost(self._structure.model):
            self._stand_outermost()
        self._steps.begin(step, total_steps)
        if self._steps.is_refresh_due and self._calibration is not None:
            self._passes.step, self._measuring = None, True
            self._passes.frozen.come_back()
            try:
                self._calibration.run(refresh=True)
            finally:
                self._measuring = False
            self.forget_graphs()

    def end_step(self) -> None:
        """Announce that the optimizer step has ended, after its backward passes.

        Raises:
            InputError: it should have been sparse, and no training pass of the model was; or `begin_step` was not
                called for it.
        """
        if not (self.config.is_exact or self._removed):
            self._steps.end(self._is_due)

    @contextmanager
    def labelled(self, labels: Tensor | None) -> Iterator[None]:
        """Have passes that come without labels take their context from these, ``(batch, length)``; None has none."""
        before, self._labels = self._labels, labels
        try:
            yield
        finally:
            self._labels = before

    def observe_head(self, observe: Observer) -> None:
        """Show ``observe`` the output layer's input rows ``(T, d)``, logits and targets in every training pass.

        For a decision on whether backward is to run: forward and backward are then not captured as one CUDA graph.
        """
        self._passes.observe = observe
        if self._decoder is not None:
            self._decoder.observe = observe

    @property
    def replaced_bytes(self) -> int:
        """Bytes of the frozen weights that fp8 copies replace on the device during training, wherever they are."""
        if not precision_of(self.config).leaves_device:
            return 0
        weights = {id(linear.base.weight): linear.base.weight for plan in self._plans for linear in plan.linears.all}
        return sum(weight.nbytes for weight in weights.values())

    def forget_graphs(self) -> None:
        """Run the next pass without a CUDA graph, launch by launch; passes after it are captured again."""
        if self._passes.graphs is not None:
            self._passes.graphs.clear()

    def follow_parameters(self) -> None:
        """Take up the model's trained parameters, some of which were replaced by others (of another rank, say)."""
        if self._passes.graphs is not None:
            self._passes.graphs.follow([p for p in self._structure.model.parameters() if p.requires_grad])

    @property
    def graphs(self) -> tuple[int, int]:
        """Number of CUDA graphs that were captured, and of passes that replayed one."""
        graphs = self._passes.graphs
        return (0, 0) if graphs is None else (graphs.captures, graphs.replays)

    def remove(self) -> None:
        """Put every module back as it was."""
        self._removed = True  # a forward that was set over ours still calls it
        self._passes.remove()
        self._latest = None
        self._logits.forget()
        self.on_remove()

    # --- a pass ---

    def _stand_outermost(self) -> None:
        """Put our forward around the model's present one."""
        model: Any = self._structure.model
        original = model.forward
        is_own = is_own_forward(model)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(original, is_own, args, kwargs)

        self._passes.patches.set(model, forward)

    def _forward(
        self, original: Callable[..., Any], is_own: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One pass by ``original``; ``is_own``: that is the forward of the model's class, which we know."""
        model, passes = self._structure.model, self._passes
        token_layout: TokenLayout | None = kwargs.pop("token_layout", None)
        if self._removed:
            return original(*args, **kwargs)
        if self._measuring or not (self.config.sparse_eval or (model.training and torch.is_grad_enabled())):
            passes.frozen.come_back()
            with passes.within(None):
                return original(*args, **kwargs)
        if not passes.is_sharded and is_sharded(self._plans[0].linears.up.base):
            passes.follow_shards()
        check_layers(self._structure, self._plans, passes.has_activated)
        if passes.trains:
            self._steps.check_announced()
        arguments = {**dict(zip(self._names, args)), **kwargs}
        step = passes.step if passes.is_inside else None  # the forward that we stand around has called the model's own
        if step is None or batch_shape(arguments) != (step.layout.batch, step.layout.length):
            layout = token_layout if token_layout is not None else self._layout(arguments)
            if layout is None:
                passes.frozen.come_back()
                with passes.within(None):
                    return original(*args, **kwargs)
            layout = layout if layout.tokens.device == passes.device else layout.to(passes.device)
            step = self._new_step(passes.activated(layout, arguments))
        self._latest = step
        passes.frozen.begin_pass()
        loss: Any
        with passes.within(step):
            if not is_own or not self._wants_loss_alone(arguments):
                output = original(*args, **kwargs)
            elif passes.is_packable(arguments, step.layout):
                self._latest = step = replace(step, is_packed=True)
                with passes.within(None):  # its own code needs no patched module
                    if passes.is_sharded and not step.layout.n_output:
                        loss = no_loss(original, arguments)
                    else:
                        loss = passes.packed_loss(step, arguments)
                output = self._loss_output(loss, step, original, args, kwargs)
            elif passes.head is not None and step.layout.n_output and is_readable(passes.head):
                loss = passes.labelled_loss(arguments, step.layout)
                output = self._loss_output(loss, step, original, args, kwargs)
            else:
                output = original(*args, **kwargs)
        if not passes.is_inside:
            passes.check_computed(self._latest)
        return output

    def _loss_output(
        self, loss: Tensor, step: Step, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LossOutput:
        """The loss, with the logits of the same pass for who reads them: computed then, and from then on always."""

        def logits() -> Tensor:
            with self._passes.within(replace(step, is_packed=False)):
                computed: Tensor = original(*args, **kwargs).logits
            return computed

        return self._logits.output(loss, logits)

    def _wants_loss_alone(self, arguments: Mapping[str, Any]) -> bool:
        if not self._structure.causal or self._logits.are_read:
            return False
        return wants_loss_alone(self._structure.model, self._names, arguments)

    def _layout(self, arguments: Mapping[str, Any]) -> TokenLayout | None:
        """The layout that the arguments say: see `layout_of`."""
        passes = self._passes
        return layout_of(
            self._structure, arguments, self._labels, follows_labels=passes.follows_labels, trains=passes.trains,
            multiple=GRAPH_MULTIPLE if passes.device.type == "cuda" else 0,
        )  # fmt: skip

    def _new_step(self, layout: TokenLayout) -> Step:
        seed = self._steps.next_seed()
        sparse = self.active
        split = 0
        if sparse:
            split = self._passes.split(layout)
        if sparse or self.config.cuts_context:
            self._warn_without_context(layout, split if sparse else layout.n_context)
        return self._passes.cut(Step(layout, sparse, split, seed))

    def _warn_without_context(self, layout: TokenLayout, split: int) -> None:
        """Warn, once, where next to nothing is sparse: the last token of a text, which predicts nothing, is context."""
        if self._has_warned or not layout.n or split > max(layout.n_sequences, _FEW_CONTEXT * layout.n):
            return
        self._has_warned = True
        warnings.warn(
            f"{split} of the {layout.n} tokens of a batch are context, the others carry labels, so next to nothing of "
            "its pass is sparse; label completions only, or set dense_output_tokens to false",
            stacklevel=2,
        )
