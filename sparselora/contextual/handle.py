"""Make one model's training steps sparse, and undo it: `sparsify` and its `Handle`."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import TransformersKwargs

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.activated import activated_from, invocation_starts, invocation_tokens, is_activated
from sparselora.contextual.cache import Cache
from sparselora.contextual.choices import Choice
from sparselora.contextual.decoder import PackedDecoder, packed_decoder
from sparselora.contextual.graphs import GraphedLoss
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.modes import mode_of
from sparselora.contextual.patches import Patches, forget_copied_patches, is_patched, patch_block, patched_modules
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.precision import FrozenWeights, precision_of
from sparselora.contextual.proof import (
    Run,
    disproof,
    head_disproof,
    random_input,
    seed_generators,
    tolerance,
    trial_batch,
    undisturbed,
    with_gradients,
)
from sparselora.contextual.sharding import (
    between_hooks,
    class_of,
    gathered,
    gathered_root,
    is_sharded,
    is_unit,
    reduce_every_gradient,
    whole_parameters,
)
from sparselora.contextual.statistics import Calibration
from sparselora.contextual.step import Step
from sparselora.contextual.structure import Structure, attention_disproof, base_weight, find_blocks, partition
from sparselora.contextual.trainers import LossOutput, attach, calibration_batches, is_trainer, loss_output
from sparselora.errors import InputError
from sparselora.kernels.cross_entropy import Observer, linear_cross_entropy
from sparselora.models.four_bit import is_rearranged, keep_storage
from sparselora.numerics.channels import keep_count

Tensor = torch.Tensor

_PACKED = {"input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch", "use_cache", "return_dict",
           "output_attentions", "output_hidden_states", "token_layout", "inputs_embeds", "task_ids"}  # fmt: skip
"""Arguments that the packed pass understands (those it ignores must be empty)."""

_SEQUENCES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""What collators that pack rows say of the sequences in a row, again: positions that start at 0 again have said it."""

_LAYOUT = "token_layout=TokenLayout.build(attention_mask, labels)"

_ROUNDING = 2.0
"""Largest relative change of the LoRA's gradient by fp8 products. It is 0.07 to 0.13 on SmolLM2-135M and Qwen2.5-0.5B,
and adds up to 0.7 over the 32 layers of a random Llama-3-8B; 1.4 is that of two unrelated gradients."""

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
    config.check(len(structure.blocks))
    plans = [LayerPlan(structure, block, config) for block in structure.blocks]
    for plan in plans:
        heads = plan.block.attention
        if plan.sparsity["attention"] and not heads.fused and (reason := attention_disproof(structure, plan.block)):
            raise InputError(
                f"attention sparsity of {plan.block.name} is not supported: {heads.q}, {heads.k} and {heads.v} could "
                f"not be proved to be q, k and v of {heads.heads} heads in {heads.kv_heads} groups ({reason}); set "
                "attention_sparsity 0"
            )
    if config.cuts_context and not structure.causal:
        raise InputError(
            f"context_backward {config.context_backward} needs a causal language model, whose labels tell the context "
            f"from the completion; {type(structure.model).__name__} has none: use context_backward full"
        )
    if config.samples_context:
        _check_trained(structure, plans, "context_backward sampled weights the gradients of the blocks' LoRAs")
    if invocation_tokens(structure.model) is not None:
        _check_activated(structure, plans, config)
    if config.is_sparse and getattr(structure.model.config, "is_encoder_decoder", False):
        warnings.warn(
            f"{type(structure.model).__name__} has an encoder and a decoder: only the blocks of "
            f"{structure.blocks[0].name.rpartition('.')[0]} are sparse",
            stacklevel=2,
        )
    if config.is_sparse and not any(any(plan.sparsity.values()) for plan in plans):
        raise InputError(
            f"mode {config.mode} has no sparse layer; set ffn_sparsity, attention_sparsity or use mode dense"
        )
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
        self._step: Step | None = None
        self._latest: Step | None = None
        self._number: int | None = None
        self._active = True
        self._passes = 0
        self._begun = self._has_warned = False
        self._labels: Tensor | None = None
        self._reads_logits = False
        self._unread: tuple[Tensor, Callable[[], Tensor]] | None = None
        self._output = loss_output(self._read_logits)
        self._packs_backbone = False
        self._inside = 0
        self._patches = Patches(lambda: self._is_due)
        self._invocation = invocation_tokens(structure.model)
        is_own = _has_own_forward(structure.model)
        self._decoder = packed_decoder(structure, plans, is_own)
        trained = [p for p in structure.model.parameters() if p.requires_grad]
        self._is_sharded = is_sharded(plans[0].linears.up.base)
        if self._is_sharded:
            _check_refresh(config)
        if self._decoder is not None and trained and trained[0].is_cuda and not self._is_sharded:
            self._decoder.graphs = GraphedLoss(trained)
        self._head = _plain_head(structure.model) if structure.causal and is_own else None
        self._measuring = self._removed = False
        self._frozen = FrozenWeights(precision_of(config).leaves_device and not keep_weights)
        self.on_remove: Callable[[], None] = lambda: None
        self._observe: Observer | None = None
        self._names = list(inspect.signature(type(structure.model).forward).parameters)[1:]
        for plan in plans:
            patch_block(self._patches, plan, structure.module, self._current, structure.causal, self._frozen.stay)
        if self._decoder is not None:
            self._patch_backbone(self._decoder)
        try:
            with undisturbed(structure.model):
                self._prove()
        except BaseException:
            self.remove()
            raise
        self._step = None
        self._stand_outermost()

    @property
    def packed(self) -> bool:
        return self._decoder is not None

    @property
    def active(self) -> bool:
        """True if the next training pass is sparse; otherwise it is dense, with the exact savings."""
        return self._active and self.config.is_sparse and not self._removed

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
        if not self._patches.outermost(self._structure.model):
            self._stand_outermost()
        self._number, self._passes, self._begun = step, 0, True
        self._active = self.config.active(step, total_steps)
        every = self.config.surrogate_refresh_steps
        if every and step and step % every == 0 and self._active and self._calibration is not None:
            self._step, self._measuring = None, True
            self._frozen.come_back()
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
        if self.config.is_exact or self._removed:
            return
        if not self._begun:
            raise InputError(
                "a step ended that begin_step was not called for, so the sparse schedule is not followed; let the "
                "trainer call on_step_begin of SparsityCallback, or call begin_step(step, total_steps) before each step"
            )
        self._begun = False
        if self._is_due and not self._passes:
            raise InputError(
                f"step {self._number} should have been sparse, and the sparse model was not called in it; the trainer "
                "trains another object (a copy, a reloaded model): call sparsify on that one"
            )

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
        self._observe = observe
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
        if self._decoder is not None and self._decoder.graphs is not None:
            self._decoder.graphs.clear()

    def follow_parameters(self) -> None:
        """Take up the model's trained parameters, some of which were replaced by others (of another rank, say)."""
        if self._decoder is not None and self._decoder.graphs is not None:
            self._decoder.graphs.follow([p for p in self._structure.model.parameters() if p.requires_grad])

    @property
    def graphs(self) -> tuple[int, int]:
        """Number of CUDA graphs that were captured, and of passes that replayed one."""
        graphs = None if self._decoder is None else self._decoder.graphs
        return (0, 0) if graphs is None else (graphs.captures, graphs.replays)

    def remove(self) -> None:
        """Put every module back as it was."""
        self._removed = True  # a forward that was set over ours still calls it
        self._patches.remove()
        self.forget_graphs()  # their memory is theirs alone while they live: 98 GB after a whole benchmark
        for plan in self._plans:
            plan.linears.release()
        self._frozen.stay()  # where the copies were there is room now
        self._step = self._latest = self._unread = None
        self.on_remove()

    # --- the proof ---

    def _prove(self) -> None:
        """Give up each pass of ours whose loss or LoRA gradients are not the model's, and raise if none is left.

        One small batch in mode dense against the model's own forward; then in the precision of the settings, which may
        round; then the sparse pass, which must run.
        """
        model: Any = self._structure.model
        batch = trial_batch(model)
        layout = TokenLayout.build(batch["attention_mask"].cpu(), batch["labels"].cpu(), causal=self._structure.causal)
        layout = layout.to(batch["input_ids"].device)
        adapters = [p for name, p in whole_parameters(model).items() if p.requires_grad and "lora_" in name]
        if any(is_rearranged(weight) for weight in model.parameters()):
            adapters = []  # the model's own gradients are no reference; ours go through the matrix as it was stored
        limit = tolerance(base_weight(self._plans[0].linears.up.module), 1e-3, 0.25)
        starts = [1 + row for row in range(layout.batch)]  # of an activated LoRA: no label's predecessor comes before
        if self._invocation is not None:
            layout = layout.activated(torch.tensor(starts))

        def own(step: Step | None) -> Tensor:
            with self._within(step), activated_from(model, starts, layout.length):
                loss = _own_loss(model, batch, self._structure.causal)
            if step is not None and step.is_cheaper:
                self._check_choices(step)
            return loss

        def headed(step: Step) -> Tensor:
            with self._within(step):
                return self._labelled_loss(batch, layout)

        def packed(step: Step) -> Tensor:
            with self._within(None):
                return self._packed_loss(step, batch)

        def through_backbone(step: Step) -> Tensor:
            self._packs_backbone = True
            try:
                return own(step)
            finally:
                self._packs_backbone = False

        def run(loss: Callable[[Step], Tensor], sparse: bool, cut: bool = False) -> Run:
            split = self._split(layout) if sparse else 0
            step = Step(layout, sparse, split, seed=0)
            return with_gradients(functools.partial(loss, self._cut(step) if cut else step), adapters)

        reference = with_gradients(functools.partial(own, None), adapters)
        reason = disproof(reference, run(own, sparse=False), limit)
        if reason is not None:
            raise InputError(
                f"{type(model).__name__} is not supported: with its linear layers replaced by ours, a training step "
                f"has another loss or gradient ({reason})"
            )
        if self._head is not None and disproof(reference, run(headed, sparse=False), limit) is not None:
            self._head = None
        packs_loss = self._decoder is not None and _has_own_forward(model)
        if packs_loss and disproof(reference, run(packed, sparse=False), limit) is not None:
            self._decoder, packs_loss = None, False
        packs_backbone = (
            self._decoder is not None and disproof(reference, run(through_backbone, sparse=False), limit) is None
        )
        if precision_of(self.config).quantises:
            seed_generators()
            exact = reference()  # now: afterwards the weights may be in host memory
            self._quantise()
            loss = packed if packs_loss else own
            reason = disproof(lambda: exact, run(loss, sparse=False), _ROUNDING)
            if reason is not None:
                raise InputError(
                    f"frozen_precision {self.config.frozen_precision} changes a step of {type(model).__name__} beyond "
                    f"rounding ({reason}); use frozen_precision native"
                )
        ways = {own: True, packed: packs_loss, through_backbone: packs_backbone}
        for loss in [way for way, is_used in ways.items() if is_used and not self.config.is_exact]:
            cheaper = run(loss, sparse=self.config.is_sparse, cut=True)
            reason = disproof(cheaper, cheaper, float("inf"))
            if reason is not None:
                raise InputError(f"{type(model).__name__} is not supported in mode {self.config.mode}: {reason}")
        self._packs_backbone = packs_backbone

    def _quantise(self) -> None:
        """Make the fp8 copies of frozen weights that products are formed from."""
        for plan in self._plans:  # block by block: there may be no room for all weights and all copies
            plan.linears.quantise(precision_of(self.config))
            if not self._is_sharded:
                self._frozen.add(plan.linears.products)

    def _follow_shards(self) -> None:
        """Read weights that have been sharded in the layers' passes, and free what was made of them before."""
        _check_refresh(self.config)
        self._is_sharded = True
        self._frozen.forget()
        for plan in self._plans:
            plan.linears.follow_shards()
        if mode_of(self.config).replaces_layer:
            reduce_every_gradient(self._structure.model)
        if self._decoder is not None:
            self._decoder.graphs = None

    def _cut(self, step: Step) -> Step:
        """Return ``step`` with a backward pass for the part of the context that the settings say."""
        if self._invocation is not None:  # there is none before the invocation tokens, and all behind them has one
            return step
        if not self.config.samples_context:
            return replace(step, attached_layers=self.config.attached_layers(len(self._plans)))
        share = self.config.context_backward_share
        drawn = step.layout.draw(share, step.seed)
        layout = _on_host(step.layout, lambda layout: layout.sampled(drawn))
        return replace(step, layout=layout, sample_weight=1 / share)

    def _split(self, layout: TokenLayout) -> int:
        """Number of packed rows that a sparse pass treats as sparse."""
        return layout.n_context if self.config.dense_output_tokens else layout.n

    # --- the pass ---

    def _patch_backbone(self, decoder: PackedDecoder) -> None:
        """Have the model without its output layer run on packed tokens, whoever calls it in one of our passes."""
        backbone = decoder.decoder
        names = list(inspect.signature(type(backbone).forward).parameters)[1:]

        def forward(*args: Any, **kwargs: Any) -> Any:
            step = self._current()
            arguments = {**dict(zip(names, args)), **kwargs}
            if (
                step is None
                or not self._packs_backbone
                or not self._packable(arguments, step.layout)
                or _shape(arguments) != (step.layout.batch, step.layout.length)
            ):
                return original(*args, **kwargs)
            hidden: Any
            with self._within(None):
                hidden = decoder.whole_hidden(step, arguments["input_ids"], arguments.get("position_ids"))
            step.computed.update(name for plan in self._plans for name in patched_modules(plan))
            return BaseModelOutputWithPast(last_hidden_state=hidden)

        original = self._patches.set(backbone, forward)

    def _stand_outermost(self) -> None:
        """Put our forward around the model's present one."""
        model: Any = self._structure.model
        original = model.forward
        is_own = _has_own_forward(model)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(original, is_own, args, kwargs)

        self._patches.set(model, forward)

    def _forward(
        self, original: Callable[..., Any], is_own: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One pass by ``original``; ``is_own``: that is the forward of the model's class, which we know."""
        model: Any = self._structure.model
        token_layout: TokenLayout | None = kwargs.pop("token_layout", None)
        if self._removed:
            return original(*args, **kwargs)
        if self._measuring or not (self.config.sparse_eval or (model.training and torch.is_grad_enabled())):
            self._frozen.come_back()
            with self._within(None):
                return original(*args, **kwargs)
        if not self._is_sharded and is_sharded(self._plans[0].linears.up.base):
            self._follow_shards()
        self._check_layers()
        self._check_begun()
        arguments = {**dict(zip(self._names, args)), **kwargs}
        step = self._step if self._inside else None  # the forward that we stand around has called the model's own
        if step is None or _shape(arguments) != (step.layout.batch, step.layout.length):
            layout = token_layout if token_layout is not None else self._layout(arguments)
            if layout is None:
                self._frozen.come_back()
                with self._within(None):
                    return original(*args, **kwargs)
            device = self._plans[0].linears.device
            layout = layout if layout.tokens.device == device else layout.to(device)
            step = self._new_step(self._activated(layout, arguments))
        self._latest = step
        self._frozen.begin_pass()
        loss: Any
        with self._within(step):
            if not is_own or not self._own_loss(arguments):
                output = original(*args, **kwargs)
            elif self._decoder is not None and self._packable(arguments, step.layout):
                self._latest = step = replace(step, is_packed=True)
                with self._within(None):  # its own code needs no patched module
                    if self._is_sharded and not step.layout.n_output:
                        loss = _no_loss(original, arguments)
                    else:
                        loss = self._packed_loss(step, arguments)
                output = self._loss_output(loss, step, original, args, kwargs)
            elif self._head is not None and step.layout.n_output and _is_readable(self._head):
                loss = self._labelled_loss(arguments, step.layout)
                output = self._loss_output(loss, step, original, args, kwargs)
            else:
                output = original(*args, **kwargs)
        if not self._inside:
            self._check_choices(self._latest)
        return output

    def _loss_output(
        self, loss: Tensor, step: Step, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LossOutput:
        """The loss, with the logits of the same pass for who reads them: computed then, and from then on always."""

        def read() -> Tensor:
            self._reads_logits = True
            with self._within(replace(step, is_packed=False)):
                logits: Tensor = original(*args, **kwargs).logits
            return logits

        self._unread = loss.detach(), read
        computed: Any = loss  # transformers names the types of its outputs by their dtype
        output = self._output(loss=computed)
        output.__dict__["_reader"] = read
        return output

    def _read_logits(self, loss: Tensor) -> Tensor:
        """The logits of the latest pass, whose ``loss`` it has to be."""
        if self._unread is None or not torch.equal(self._unread[0].float(), loss.detach().float()):
            raise InputError("the logits of a training pass were read after the next one; read them before it")
        return self._unread[1]()

    @contextmanager
    def _within(self, step: Step | None) -> Iterator[None]:
        """Have the blocks follow ``step``, or be as they are. After it, a pass with gradients can be recomputed."""
        before, self._step = self._step, step
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if step is None or self._inside or not torch.is_grad_enabled():
                self._step = before

    def _current(self) -> Step | None:
        """The pass that a call of a block belongs to; None leaves the block as it is."""
        if self._inside:
            return self._step
        if torch._C._current_graph_task_id() != -1:  # backward: gradient checkpointing computes the block again
            return self._step
        if self._is_due and self._structure.model.training and torch.is_grad_enabled():
            raise InputError(self._bypassed())
        self._frozen.come_back()  # a part of the model is called by itself
        return None

    def _bypassed(self) -> str:
        model: Any = self._structure.model
        if self._patches.outermost(model):
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

    def _check_begun(self) -> None:
        """Raise where the settings follow the steps, and nobody says which one it is."""
        config = self.config
        follows = (
            config.sparse_warmup_ratio > 0 or bool(config.sparse_warmup_steps) or config.sparse_end_ratio < 1
            or config.sparse_end_step is not None or config.surrogate_refresh_steps > 0
        )  # fmt: skip
        if self._number is None and follows and self._trains:
            raise InputError(
                "the settings follow the training steps (sparse_warmup, sparse_end or surrogate_refresh_steps) and "
                "nothing says which step it is; add SparsityCallback(handle) to the trainer, or call "
                "begin_step(step, total_steps) before each step"
            )

    @property
    def _trains(self) -> bool:
        """True in a training pass of a model that differs from the plain one in some."""
        return not self.config.is_exact and self._structure.model.training and torch.is_grad_enabled()

    def _own_loss(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether the loss is the model's own and all that is wanted: then ours does without most logits."""
        model: Any = self._structure.model
        if not (self._structure.causal and model.training and arguments.get("labels") is not None):
            return False
        if self._reads_logits:
            return False
        if (
            arguments.get("output_hidden_states")
            or arguments.get("output_attentions")
            or arguments.get("return_dict") is False
        ):
            return False
        if any(value is not None and name not in self._own_names for name, value in arguments.items()):
            return False
        return getattr(model, "loss_function", ForCausalLMLoss) is ForCausalLMLoss

    @functools.cached_property
    def _own_names(self) -> set[str]:
        return {*self._names, *_PACKED, *TransformersKwargs.__annotations__} - {"shift_labels"}

    def _packed_loss(self, step: Step, arguments: Mapping[str, Any]) -> Tensor:
        assert self._decoder is not None
        return self._decoder.loss(
            step, arguments["input_ids"], arguments.get("position_ids"), arguments.get("num_items_in_batch")
        )

    def _check_choices(self, step: Step) -> None:
        """Raise where a layer that should have been ours was not: its forward was replaced, or not called."""
        config: Any = self._structure.model.config
        if step.is_packed or any(name.endswith("layerdrop") and value for name, value in vars(config).items()):
            return
        if self.config.changes_every_step:
            missing = [name for plan in self._plans for name in patched_modules(plan) if name not in step.computed]
            if missing:
                raise InputError(
                    f"{missing[0]} took no part in a pass that should be cheaper: its forward was replaced after "
                    "sparsify, or the model does not call it; call remove(), then sparsify again"
                )
        if not step.split:
            return
        for plan in self._plans:
            for part, sparsity in plan.sparsity.items():
                if sparsity and (plan.block.index, part) not in step.choices:
                    raise InputError(
                        f"the {part} of {plan.block.name} should have been sparse and was not: its forward was "
                        "replaced after sparsify, or the model does not call it; call remove(), then sparsify again"
                    )

    def _check_layers(self) -> None:
        """Raise where the first block's layers are no longer those that were converted."""
        for linear in self._plans[0].linears.all:
            if self._structure.module(linear.name) is not linear.module:
                raise InputError(f"{linear.name} was replaced after sparsify; call remove(), then sparsify again")
            if linear.adapter() is not None and is_activated(linear.module) != (self._invocation is not None):
                raise InputError(
                    f"another adapter of {linear.name} was made active after sparsify, and one of the two is an "
                    "activated LoRA; call remove(), then sparsify again"
                )

    def _packable(self, arguments: Mapping[str, Any], layout: TokenLayout) -> bool:
        if arguments.get("inputs_embeds") is not None or arguments.get("input_ids") is None:
            return False
        if self._is_sharded:
            if self._decoder is None or not self._decoder.gathers_layers or not _is_readable(self._decoder.head):
                return False
        elif partition(self._plans[0].linears.up.base.weight):  # whole only while its own block runs
            return False
        understood = _PACKED | _SEQUENCES if layout.sequences else _PACKED
        if any(value is not None and name not in understood for name, value in arguments.items()):
            return False
        if layout.sequences and arguments.get("max_length_q") not in (None, layout.width):
            return False
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        # A mask of its own, or positions that may start again, decide which tokens see one another.
        if (mask is not None and mask.dim() != 2) or bool(layout.sequences) != (mask is None and positions is not None):
            return False
        window = self._decoder.window if self._decoder is not None else None
        longest = layout.width if layout.sequences else arguments["input_ids"].shape[1]
        return window is None or longest <= window

    def _layout(self, arguments: Mapping[str, Any]) -> TokenLayout | None:
        """The layout from the arguments: on a GPU this waits for the device once. None where nothing tells.

        Raises:
            InputError: nothing tells, in a training pass.
        """
        shape, mask, labels = _shape(arguments), arguments.get("attention_mask"), arguments.get("labels")
        if labels is None and self._labels is not None and self._labels.shape == shape:
            labels = self._labels
        last_logits = arguments.get("logits_to_keep")
        last_logits = last_logits if isinstance(last_logits, int) and not isinstance(last_logits, bool) else 0
        cause = None
        if shape is None:
            cause = "it has neither input_ids nor inputs_embeds of (batch, length)"
        elif arguments.get("past_key_values") is not None:
            cause = "it has past_key_values (prefix tuning, a cache), which sparse passes do not support; use a LoRA"
        elif mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            cause = f"its attention_mask is {kind}, wanted (batch, length), so padding is unknown; or add {_LAYOUT}"
        elif (
            self._structure.causal and labels is None and not last_logits
            and (self._follows_labels or not self._trains)
        ):  # fmt: skip
            cause = (
                "it has no labels (label smoothing and a loss of the trainer's own take them out of the batch), so "
                f"which tokens are context is unknown; call sparsify on the trainer, or add {_LAYOUT} to the batch, or "
                "set dense_output_tokens to false"
            )
        if cause is not None:
            if self._trains:
                raise InputError(f"a training pass cannot be sparse: {cause}")
            if not self._structure.model.training:  # asked for by sparse_eval
                warnings.warn(f"an evaluation pass is dense in spite of sparse_eval: {cause}", stacklevel=2)
            return None
        mask = None if mask is None else mask.detach().cpu()
        labels = labels.detach().cpu() if self._structure.causal and labels is not None else None
        assert shape is not None
        positions = arguments.get("position_ids") if mask is None and self._structure.causal else None
        return TokenLayout.build(
            mask, labels, shape, causal=self._structure.causal,
            multiple=GRAPH_MULTIPLE if self._plans[0].linears.device.type == "cuda" else 0, last_logits=last_logits,
            position_ids=positions if isinstance(positions, Tensor) and positions.dim() == 2 else None,
        )  # fmt: skip

    @property
    def _follows_labels(self) -> bool:
        """True if a pass treats context and output tokens differently."""
        return (self.config.is_sparse and self.config.dense_output_tokens) or self.config.cuts_context

    def _activated(self, layout: TokenLayout, arguments: Mapping[str, Any]) -> TokenLayout:
        """Return the layout with the tokens on which an activated LoRA is inactive in front.

        Raises:
            InputError: the batch has embeddings in place of tokens; labels where the adapter is inactive.
        """
        if self._invocation is None:
            return layout
        if arguments.get("input_ids") is None:
            raise InputError("an activated LoRA looks for its invocation tokens in input_ids, and a pass has none")
        if getattr(self._structure.module(self._plans[0].block.name), "gradient_checkpointing", False):
            raise InputError(
                "gradient checkpointing of a model with an activated LoRA is not supported; switch it off: what comes "
                "before the invocation tokens is not kept for the backward pass anyway"
            )
        starts = invocation_starts(arguments["input_ids"], self._invocation)
        return _on_host(layout, lambda layout: layout.activated(starts))

    def _new_step(self, layout: TokenLayout) -> Step:
        number = self._passes if self._number is None else self._number
        seed = (self.config.drawing_seed * 1_000_003 + number) * 1_009 + (0 if self._number is None else self._passes)
        self._passes += 1
        sparse = self.active
        split = 0
        if sparse:
            split = self._split(layout)
        if sparse or self.config.cuts_context:
            self._warn_without_context(layout, split if sparse else layout.n_context)
        return self._cut(Step(layout, sparse, split, seed))

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

    def _labelled_loss(self, arguments: Mapping[str, Any], layout: TokenLayout) -> Tensor:
        """The loss with the output layer at labelled positions only, for decoders that keep their own pass."""
        model: Any = self._structure.model
        backbone = getattr(model, model.base_model_prefix)
        skipped = ("labels", "num_items_in_batch", "logits_to_keep", "return_dict")
        hidden = backbone(**{k: v for k, v in arguments.items() if k not in skipped})[0]
        rows = hidden.flatten(0, 1).index_select(0, layout.tokens[layout.n_context :])
        assert self._head is not None
        head = self._head

        def summed(rows: Tensor) -> Tensor:
            rows = rows.to(head.weight.dtype)
            return linear_cross_entropy(rows, head.weight, head.bias, layout.targets, observe=self._observe)

        loss = between_hooks(head, summed, rows)
        count = arguments.get("num_items_in_batch")
        return loss / (layout.n_output if count is None else count)


def _on_host(layout: TokenLayout, change: Callable[[TokenLayout], TokenLayout]) -> TokenLayout:
    """Return ``change(layout)``, made on the CPU where the layout comes from there: only there it gets a ``graph``."""
    return change(layout) if layout.host is None else change(layout.host).to(layout.tokens.device)


def _has_own_forward(model: Any) -> bool:
    """Return whether the forward of ``model`` is that of its class, and not one that a trainer has set."""
    function = getattr(getattr(model, "_old_forward", model.forward), "__func__", None)  # accelerate's hooks keep it
    return function is type(model).forward


def _shape(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """``(batch, length)`` of the arguments of a pass."""
    for name, dims in (("input_ids", 2), ("inputs_embeds", 3)):
        if isinstance(arguments.get(name), Tensor) and arguments[name].dim() == dims:
            return arguments[name].shape[0], arguments[name].shape[1]
    return None


def _plain_head(model: Any) -> nn.Linear | None:
    """The output layer, where the loss is nothing but that of its product with the last hidden state; else None."""
    head = model.get_output_embeddings()
    if class_of(head) is not nn.Linear or head.weight.requires_grad:
        return None
    with undisturbed(model):
        return head if head_disproof(model, head) is None else None


def _is_readable(head: nn.Module) -> bool:
    """Return whether the weight of an output layer is whole in the pass of its model, or can be gathered."""
    return class_of(head) is not nn.Linear or is_unit(head) or not partition(cast(nn.Linear, head).weight)


def _no_loss(forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Tensor:
    """A loss of zero, by the model's own pass: other processes wait for this one's part in every gather of weights."""
    inputs = {name: value for name, value in arguments.items() if name not in ("labels", "num_items_in_batch")}
    loss: Tensor = forward(**inputs, logits_to_keep=1).logits.float().sum() * 0.0
    return loss


def _own_loss(model: Any, batch: Mapping[str, Tensor], causal: bool) -> Tensor:
    """The loss of a causal model by its own forward; of another, a fixed product with its backbone's hidden states."""
    if causal:
        loss: Tensor = model(**batch).loss
        return loss
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = batch["input_ids"]
    hidden = model.base_model(**inputs)[0]
    return (hidden.double() * random_input(tuple(hidden.shape[1:]), hidden, [1.0] * len(hidden)).double()).mean()


def _check_activated(structure: Structure, plans: list[LayerPlan], config: SparsityConfig) -> None:
    """Raise where an activated LoRA cannot be trained as PEFT would."""
    if not structure.causal:
        raise InputError(f"an activated LoRA needs a causal language model, got {type(structure.model).__name__}")
    if config.context_backward not in ("full", "none"):
        raise InputError(
            f"context_backward {config.context_backward} is not for an activated LoRA: before its invocation tokens "
            "nothing has a gradient; use full or none, which are one and exact there"
        )
    adapted = {id(linear.module) for plan in plans for linear in plan.linears.all}
    for name, module in structure.model.named_modules():
        if is_activated(module) and id(module) not in adapted:
            raise InputError(f"{name} has an activated LoRA, which is supported on the blocks' linear layers only")
    _check_trained(structure, plans, "an activated LoRA is trained by the blocks' LoRAs alone")


def _check_refresh(config: SparsityConfig) -> None:
    if config.surrogate_refresh_steps:
        raise InputError(
            "surrogate_refresh_steps is not supported for weights that fully_shard (FSDP2) keeps in parts; set it to 0"
        )


def _check_trained(structure: Structure, plans: list[LayerPlan], reason: str) -> None:
    """Raise where another parameter is trained than the blocks' LoRAs and the output layer, which context misses."""
    adapters = (linear.adapter() for plan in plans for linear in plan.linears.all)
    weighted = {id(factor) for adapter in adapters if adapter is not None for factor in (adapter.A, adapter.B)}
    model: Any = structure.model
    head, embedding = (
        set() if module is None else {id(parameter) for parameter in module.parameters()}
        for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )  # the head sees output tokens alone
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in weighted | (head - embedding):
            raise InputError(
                f"{reason}, and {name} is trained too; freeze it, or use a plain LoRA with context_backward full"
            )
