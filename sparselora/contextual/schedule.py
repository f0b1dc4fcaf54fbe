"""Make one model's training steps sparse, and undo it: `sparsify` and its `Handle`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparselora.channels import keep_count
from sparselora.config import SparsityConfig
from sparselora.contextual.cache import Cache
from sparselora.contextual.calibration import Calibration
from sparselora.contextual.decoder import changes_logits, packed_decoder
from sparselora.contextual.estimator import (
    AttentionWeights,
    FFNWeights,
    build_attention_estimators,
    build_ffn_estimators,
)
from sparselora.contextual.graphs import GraphedLoss
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.modules import Patches, patch_block
from sparselora.contextual.plan import AttentionChoice, FFNChoice, LayerPlan, Step, fused_sizes
from sparselora.contextual.structure import Structure, find_blocks
from sparselora.errors import InputError
from sparselora.kernels.cross_entropy import Observer, linear_cross_entropy

Tensor = torch.Tensor

_PACKED = {"input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch", "use_cache", "return_dict",
           "output_attentions", "output_hidden_states", "token_layout", "inputs_embeds", "task_ids"}  # fmt: skip
"""Arguments that the packed pass understands (those it ignores must be empty)."""


GRAPH_MULTIPLE = 128
"""What collators give `TokenLayout.build` as ``multiple`` for training on a GPU."""


def sparsify(
    model: nn.Module,
    config: SparsityConfig,
    *,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    cache_dir: str | Path | None = None,
) -> Handle:
    """Make the training passes of ``model`` sparse as ``config`` says; evaluation and generation stay dense.

    With gradient checkpointing, a model that does not run packed must go backward through a pass before the next one.
    Only this model object changes, and only the ``forward`` of some of its modules; `Handle.remove` puts them back. The
    model stands on its device, with its adapter attached and its base weights frozen.

    Args:
        model: a transformers model, with or without PEFT's wrapper.
        calibration: collated batches of training data, for the modes that need them (``config.needs_calibration``).
        cache_dir: where estimators and calibrations are kept; None for the user's cache folder.

    Raises:
        InputError: a model that is sparse already, an unsupported architecture or adapter, layers the model does not
            have, a rank that is too large, or no calibration where one is needed.
    """
    structure = find_blocks(model)
    if hasattr(structure.model.forward, "_sparselora"):
        raise InputError("the model is sparse already; call remove() on its handle first")
    config.check(len(structure.blocks))
    plans = [LayerPlan(structure, block, config) for block in structure.blocks]
    if config.mode != "dense" and not any(p.ffn_sparsity or p.attention_sparsity for p in plans):
        raise InputError(
            f"mode {config.mode} has no sparse layer; set ffn_sparsity, attention_sparsity or use mode dense"
        )
    cache = Cache(cache_dir)
    if config.mode == "svd":
        _attach_estimators(plans, config, cache_dir)
    if config.mode == "skip":
        for plan in plans:
            plan.fixed_ffn = FFNChoice()
    calibrated = None
    if config.needs_calibration:
        if calibration is None:
            raise InputError(
                f"mode {config.mode} with compensate {config.compensate} needs calibration batches of training data; "
                "give sparsify(..., calibration=batches)"
            )
        calibrated = Calibration(structure, plans, calibration, cache)
        calibrated.run()
    return Handle(structure, plans, config, calibrated)


def _attach_estimators(plans: list[LayerPlan], config: SparsityConfig, cache_dir: str | Path | None) -> None:
    ffn = {p.block.ffn.unit: p for p in plans if p.ffn_sparsity}
    attention = {p.block.attention.o: p for p in plans if p.attention_sparsity}
    if ffn:
        for name, estimator in build_ffn_estimators(
            map(_ffn_weights, ffn.values()), config.svd_rank, cache_dir
        ).items():
            ffn[name].ffn_estimator = estimator
    if attention:
        weights = map(_attention_weights, attention.values())
        for name, found in build_attention_estimators(weights, config.svd_rank, cache_dir).items():
            attention[name].attention_estimator = found


def _ffn_weights(plan: LayerPlan) -> FFNWeights:
    up, gate = plan.up.stored(), None if plan.gate is None else plan.gate.stored()
    return FFNWeights(
        plan.block.ffn.unit, up, plan.block.ffn.act, gate, plan.up.bias(up.dtype),
        None if plan.gate is None else plan.gate.bias(up.dtype),
    )  # fmt: skip


def _attention_weights(plan: LayerPlan) -> AttentionWeights:
    heads = plan.block.attention
    if heads.fused:
        weight = plan.attention["q"].stored()
        parts: list[Any] = list(weight.split(fused_sizes(heads)))
        bias = plan.attention["q"].bias(weight.dtype)
        biases: list[Any] = [None] * 3 if bias is None else list(bias.split(fused_sizes(heads)))
    else:
        parts = [plan.attention[part].stored() for part in "qkv"]
        biases = [plan.attention[part].bias(parts[0].dtype) for part in "qkv"]
    q, k, v = parts
    return AttentionWeights(heads.o, q, k, v, heads.heads, heads.kv_heads, heads.head_dim, heads.rope, *biases)


class Handle:
    """A model whose training passes are sparse.

    Attributes:
        config: the settings.
        packed: whether the whole pass runs on packed tokens (Llama-like decoders), or block by block.
        report: one row a layer: its sparsities, and how many channels stay.
    """

    def __init__(
        self, structure: Structure, plans: list[LayerPlan], config: SparsityConfig, calibration: Calibration | None
    ) -> None:
        self.config, self._structure, self._plans, self._calibration = config, structure, plans, calibration
        self._step: Step | None = None
        self._latest: Step | None = None
        self._number: int | None = None
        self._active = True
        self._passes = 0
        self._patches = Patches()
        self._decoder = packed_decoder(structure, plans)
        trained = [p for p in structure.model.parameters() if p.requires_grad]
        if self._decoder is not None and trained and trained[0].is_cuda:
            self._decoder.graphs = GraphedLoss(trained)
        self._head = _plain_head(structure.model) if structure.causal else None
        for plan in plans:
            patch_block(self._patches, plan, structure.module, lambda: self._step, structure.causal)
        self._measuring = False
        self._observe: Observer | None = None
        self._original: Callable[..., Any] = structure.model.forward
        self._signature = inspect.signature(self._original)

        @functools.wraps(self._original)  # the Trainer reads from the signature which columns the model takes
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        forward._sparselora = True  # type: ignore[attr-defined]
        self._patches.set(structure.model, forward)

    @property
    def packed(self) -> bool:
        return self._decoder is not None

    @property
    def active(self) -> bool:
        """Whether the next training pass is sparse; otherwise it is dense, with the exact savings."""
        return self._active and self.config.mode != "dense"

    @property
    def report(self) -> list[dict[str, Any]]:
        rows = []
        for plan in self._plans:
            heads = plan.block.attention
            kept = keep_count(plan.ffn_width, 1 - plan.ffn_sparsity)
            if self.config.mode in ("skip", "surrogate") and plan.ffn_sparsity:
                kept = self.config.surrogate_channels if self.config.mode == "surrogate" else 0
            rows.append(
                {
                    "layer": plan.block.index,
                    "name": plan.block.name,
                    "ffn_sparsity": plan.ffn_sparsity,
                    "ffn_channels": plan.ffn_width,
                    "ffn_kept": kept,
                    "attention_sparsity": plan.attention_sparsity,
                    "kv_channels": heads.kv_width,
                    "kv_kept": keep_count(heads.kv_width, 1 - plan.attention_sparsity),
                }
            )
        return rows

    def choices(self) -> dict[tuple[int, str], FFNChoice | AttentionChoice]:
        """What the latest pass chose, by layer and part (``ffn``, ``attention``); dense layers are absent."""
        return {} if self._latest is None else dict(self._latest.choices)

    def hold_choices(self) -> None:
        """Keep the channels of the latest pass from now on. What choosing costs is the difference in time."""
        for (layer, _), choice in self.choices().items():
            if isinstance(choice, FFNChoice):
                self._plans[layer].fixed_ffn = choice
            else:
                self._plans[layer].fixed_attention = choice
        if self._decoder is not None and self._decoder.graphs is not None:
            self._decoder.graphs.clear()

    def begin_step(self, step: int, total_steps: int) -> None:
        """Say which optimizer step comes, counted from 0: it decides whether it is sparse, and seeds mode random."""
        self._number, self._passes = step, 0
        self._active = self.config.active(step, total_steps)
        every = self.config.surrogate_refresh_steps
        if every and step and step % every == 0 and self._active and self._calibration is not None:
            self._step, self._measuring = None, True
            try:
                self._calibration.run(refresh=True)
            finally:
                self._measuring = False
            if self._decoder is not None and self._decoder.graphs is not None:
                self._decoder.graphs.clear()

    def observe_head(self, observe: Observer) -> None:
        """Show ``observe`` the output layer's input rows ``(T, d)``, logits and targets in every training pass.

        For a decision on whether backward shall run: forward and backward are then not captured as one CUDA graph.
        """
        self._observe = observe
        if self._decoder is not None:
            self._decoder.observe = observe

    @property
    def graphs(self) -> tuple[int, int]:
        """How many CUDA graphs were captured, and how many passes were replays of one."""
        found = None if self._decoder is None else self._decoder.graphs
        return (0, 0) if found is None else (found.captures, found.replays)

    def remove(self) -> None:
        """Put every module back as it was."""
        self._patches.remove()
        for plan in self._plans:
            plan.release()
        self._step = self._latest = None

    # --- the pass ---

    def _forward(self, *args: Any, token_layout: TokenLayout | None = None, **kwargs: Any) -> Any:
        model: Any = self._structure.model
        self._step = None
        if self._measuring or not (model.training or self.config.sparse_eval):
            return self._original(*args, **kwargs)
        self._check_layers()
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        layout = token_layout if token_layout is not None else self._layout(given)
        if layout is None:
            return self._original(*args, **kwargs)
        device = self._plans[0].up.base.weight.device
        self._step = self._latest = self._new_step(layout if layout.tokens.device == device else layout.to(device))
        more = given.get("output_hidden_states") or given.get("output_attentions") or given.get("return_dict") is False
        if more or not (self._structure.causal and model.training and given.get("labels") is not None):
            return self._original(*args, **kwargs)
        count = given.get("num_items_in_batch")
        if self._decoder is not None and self._packable(given):
            step, self._step = self._step, None  # its own code needs no patched module
            loss: Any = self._decoder.loss(step, given["input_ids"], given.get("position_ids"), count)
            return CausalLMOutputWithPast(loss=loss)
        if self._head is not None and layout.n_output:
            loss = self._labelled_loss(given, self._step.layout, count)
            return CausalLMOutputWithPast(loss=loss)
        return self._original(*args, **kwargs)

    def _check_layers(self) -> None:
        """Raise where the first block's layers are no longer those that were converted."""
        for linear in self._plans[0].linears:
            if self._structure.module(linear.name) is not linear.module:
                raise InputError(f"{linear.name} was replaced after sparsify; call remove(), then sparsify again")

    def _packable(self, given: Mapping[str, Any]) -> bool:
        if given.get("inputs_embeds") is not None or given.get("input_ids") is None:
            return False
        if any(value is not None and name not in _PACKED for name, value in given.items()):
            return False
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if (mask is not None and mask.dim() != 2) or (mask is None and positions is not None):
            return False  # a mask of its own, or positions that may start again: which tokens see which is its to say
        window = self._decoder.window if self._decoder is not None else None
        return window is None or given["input_ids"].shape[1] <= window

    def _layout(self, given: Mapping[str, Any]) -> TokenLayout | None:
        """The layout from the arguments: on a GPU this waits for the device once. None where nothing tells."""
        ids, mask, labels = (given.get(name) for name in ("input_ids", "attention_mask", "labels"))
        if ids is None or (mask is not None and mask.dim() != 2):
            return None
        if not self._structure.causal:
            labels = None
        elif labels is None:
            return None
        mask = None if mask is None else mask.detach().cpu()
        return TokenLayout.build(
            mask, None if labels is None else labels.detach().cpu(), tuple(ids.shape), causal=self._structure.causal,
            multiple=GRAPH_MULTIPLE if ids.is_cuda else 0,
        )  # fmt: skip

    def _new_step(self, layout: TokenLayout) -> Step:
        number = self._passes if self._number is None else self._number
        seed = (self.config.seed * 1_000_003 + number) * 1_009 + (0 if self._number is None else self._passes)
        self._passes += 1
        sparse = self.active
        split = 0
        if sparse:
            split = layout.n_context if self.config.dense_output_tokens else layout.n
        return Step(layout, sparse, split, seed)

    def _labelled_loss(self, given: Mapping[str, Any], layout: TokenLayout, count: Any) -> Tensor:
        """The loss with the output layer at labelled positions only, for decoders that keep their own pass."""
        model: Any = self._structure.model
        backbone = getattr(model, model.base_model_prefix)
        skipped = ("labels", "num_items_in_batch", "logits_to_keep", "return_dict")
        hidden = backbone(**{k: v for k, v in given.items() if k not in skipped})[0]
        rows = hidden.flatten(0, 1).index_select(0, layout.tokens[layout.n_context :])
        assert self._head is not None
        weight = self._head.weight
        rows = rows.to(weight.dtype)
        loss = linear_cross_entropy(rows, weight, self._head.bias, layout.targets, observe=self._observe)
        return loss / (layout.n_output if count is None else count)


@torch.no_grad()
def _plain_head(model: Any) -> nn.Linear | None:
    """The output layer, where logits are nothing but its product with the last hidden state; else None."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad or changes_logits(model.config):
        return None
    ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    training = model.training
    model.eval()
    try:
        hidden = getattr(model, model.base_model_prefix)(input_ids=ids)[0]
        same = torch.allclose(model(input_ids=ids).logits.float(), head(hidden).float(), rtol=1e-2, atol=1e-3)
    finally:
        model.train(training)
    return head if same else None


class SparsityCallback(TrainerCallback):
    """Tells a `Handle` which step comes."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handle.begin_step(state.global_step, state.max_steps)
