"""The training pass of a Llama-like decoder on packed tokens, with the savings that are exact.

Tokens are packed without padding, context tokens first; only attention sees them in their order. The output layer and
the loss exist where a label is, and in the last layer the query, the output projection and the FFN where an output
token is. All of this is exact, and mode ``dense`` has it too.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparselora.config.sparsity import Part
from sparselora.contextual.activated import invocation_tokens
from sparselora.contextual.choices import AttentionChoice, fused_sizes
from sparselora.contextual.graphs import Fit, GraphedLoss
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.lora_casts import LoraCasts
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.proof import (
    disproof,
    head_disproof,
    is_low_precision,
    random_input,
    tolerance,
    trial_batch,
    undisturbed,
)
from sparselora.contextual.row_linear import join_linear, split_linear
from sparselora.contextual.sharding import (
    between_hooks,
    class_of,
    gathered,
    is_sharded,
    is_unit,
    shards_inside,
    unwrapped,
)
from sparselora.contextual.step import Step, side_stream
from sparselora.contextual.structure import Structure, base_weight
from sparselora.kernels.activation import by_attachment
from sparselora.kernels.cross_entropy import Observer, linear_cross_entropy
from sparselora.kernels.norm import add_rms_norm
from sparselora.kernels.rows import Channels, Rows, detach_rows
from sparselora.kernels.slots import Rotation, from_slots, to_heads, to_slots

Tensor = torch.Tensor

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = ("q_norm", "k_norm")


class PackedDecoder:
    """The packed pass of one model. Build it by `packed_decoder`, which proves that it computes the same function."""

    def __init__(self, structure: Structure, plans: Sequence[LayerPlan]) -> None:
        self.model, self.plans = structure.model, plans
        model: Any = structure.model
        self.decoder: Any = model.model
        self.head: Any = model.lm_head
        self.window: int | None = _window(structure.model.config)
        first = self.decoder.layers[0].self_attn
        self.scaling: float = first.scaling
        self.head_norms = hasattr(first, "q_norm")
        self.casts = LoraCasts([plan.linears for plan in plans])
        self.graphs: GraphedLoss | None = None
        self.observe: Observer | None = None
        # Weak: what fully_shard replaces is to be freed.
        self._parameters = [weakref.ref(parameter) for parameter in structure.model.parameters()]

    def loss(self, step: Step, input_ids: Tensor, position_ids: Tensor | None, count: Tensor | int | None) -> Tensor:
        """Cross-entropy of the labelled tokens, summed and divided by ``count`` (their number, if None)."""
        if step.layout.n_output == 0:  # still a gradient, of zero, for every parameter: DDP waits for all of them
            return sum((p.sum() for p in self.model.parameters() if p.requires_grad), torch.zeros(())) * 0.0
        total = step.layout.n_output if count is None else count
        fit: Fit | None = None
        state: tuple[Any, ...] = ()
        if self.graphs is not None and step.layout.graph is not None and self._graphable(step):
            state = (step.sparse, self._pass_dtype(), self._adapter_state(), self._frozen_state())
            fit = self.graphs.fitting(state, step.layout)
            step = replace(step, layout=fit.layout, split=fit.layout.n_context if step.split else 0)
        x, rotation, dtype = self._embedded(step.layout, input_ids, position_ids)

        def run(layout: TokenLayout, x: Tensor, rotation: Rotation, choices: dict[Any, Any]) -> Tensor:
            split = layout.n_context if fit is not None and step.split else step.split
            return self._summed_loss(replace(step, layout=layout, split=split, choices=choices), x, rotation, dtype)

        with torch.autocast(x.device.type, enabled=False):
            if fit is not None and self.graphs is not None:
                replayed = self.graphs.loss(state, fit, x.detach(), rotation, run, step.choices, self.casts.memory)
                if replayed is not None:
                    return replayed / total
            return run(step.layout, x, rotation, step.choices) / total

    def _graphable(self, step: Step) -> bool:
        """Return whether this pass can be captured as a CUDA graph: no host synchronisation, gradients of LoRA only."""
        if self.observe is not None:  # who looks at the pass may decide that there is no backward
            return False
        if self.graphs is None or not torch.is_grad_enabled() or self.decoder.layers[0].gradient_checkpointing:
            return False
        if torch.is_anomaly_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return False  # they copy tensors to the host, or ask for values: a capture forbids it
        mode = self.plans[0].mode
        if step.sparse and not (mode.config.dense_output_tokens and (mode.is_capturable or self._has_fixed_choices())):
            return False
        trained = {id(p) for p in self._trained_parameters}
        # An adapted output layer is a module of its own, whose parameters a capture cannot replace by its own leaves.
        return {id(p) for p in self.graphs.parameters} == trained <= {id(p) for p in self.casts.parameters}

    @property
    def _trained_parameters(self) -> list[nn.Parameter]:
        parameters = (ref() for ref in self._parameters)
        return [parameter for parameter in parameters if parameter is not None and parameter.requires_grad]

    @property
    def is_sharded(self) -> bool:
        """True if FSDP2 keeps the weights of the layers."""
        return is_sharded(self.plans[0].linears.up.base)

    @property
    def gathers_layers(self) -> bool:
        """True if each layer's weights are whole while it runs: they are sharded by the layer, or around the model."""
        return not is_unit(self.decoder) and not any(shards_inside(unwrapped(layer)) for layer in self.decoder.layers)

    def _has_fixed_choices(self) -> bool:
        """Return whether no layer chooses in a pass with dense output tokens: the last FFN has no other rows there."""
        return all(
            part in plan.mode.fixed
            for plan in self.plans
            for part, sparsity in plan.sparsity.items()
            if sparsity and not (part == "ffn" and plan is self.plans[-1])
        )

    def _adapter_state(self) -> tuple[Any, ...]:
        """The places of the factors and the way they are applied: a graph holds for one such state."""
        adapters = [linear.adapter() for plan in self.plans for linear in plan.linears.all]
        return tuple(None if a is None else (a.A.data_ptr(), a.B.data_ptr(), a.scale, a.dropout) for a in adapters)

    def _frozen_state(self) -> tuple[int, ...]:
        """The places of the frozen tensors that a pass reads."""
        tensors = (parameters.get(name) for parameters, name in self._frozen_parameters)
        return tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)

    @functools.cached_property
    def _frozen_parameters(self) -> list[tuple[dict[str, nn.Parameter | None], str]]:
        """A module's parameters and the name of one, for each that a pass reads, save weights that have fp8 copies."""
        layers = self.decoder.layers
        modules = [self.head, self.decoder.norm]
        modules += [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        if self.head_norms:
            modules += [getattr(layer.self_attn, name) for layer in layers for name in _HEAD_NORMS]
        names = [(module._parameters, name) for module in modules for name in ("weight", "bias")]
        for product in (product for plan in self.plans for product in plan.linears.products):
            of_product = ("weight", "bias") if product.precision is None else ("bias",)
            names += [(base._parameters, name) for base in product.bases for name in of_product]
        return names

    def hidden(self, step: Step, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """The normalised last hidden state of the output tokens, ``(n_output, d)``."""
        x, rotation, dtype = self._embedded(step.layout, input_ids, position_ids)
        with torch.autocast(x.device.type, enabled=False):
            return self._through_layers(step, x, rotation, dtype)

    def whole_hidden(self, step: Step, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """The normalised last hidden state of every token, ``(batch, length, d)``, for readers that we do not know.

        Padding has zeros. The last layer computes context tokens too, as it does in the model's own pass.
        """
        layout = step.layout
        x, rotation, dtype = self._embedded(layout, input_ids, position_ids)
        with torch.autocast(x.device.type, enabled=False):
            rows = self._through_layers(step, x, rotation, dtype, trims=False)
        padded = rows.new_zeros(layout.batch * layout.length, rows.shape[1]).index_copy(0, layout.tokens, rows)
        return padded.view(layout.batch, layout.length, -1)

    def disproof(self) -> str | None:
        """Return why the packed pass is another function than the model's own; None if they agree.

        The whole pass is tried, and every attention by itself, on the arguments that the model gives it but louder
        inputs: in a model that is hardly trained, a rotation or a clipping hides in the residual stream. Both at the
        last positions that the model knows too, where some scale their rotation or queries otherwise.
        """
        farthest = int(getattr(self.model.config, "max_position_embeddings", None) or 0)
        batch = trial_batch(self.model)
        length = batch["input_ids"].shape[1]
        for start in (max(0, farthest - length), 0):  # the first last: a rotation may remember where it was
            positions = torch.arange(start, start + length, device=batch["input_ids"].device)[None]
            reason = self._disproof_at(batch, positions)
            if reason is not None:
                return reason
        return None

    def _disproof_at(self, batch: dict[str, Tensor], positions: Tensor) -> str | None:
        layout = TokenLayout.build(batch["attention_mask"], batch["labels"]).to(positions.device)
        if invocation_tokens(self.model) is not None:  # called by itself, it leaves an activated LoRA inactive
            layout = replace(layout, n_inactive=layout.n)
        step = Step(layout, sparse=False, split=0, seed=0)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "position_ids": positions}
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def theirs() -> list[Tensor]:
            hooks = [
                layer.self_attn.register_forward_pre_hook(
                    lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
                )
                for layer in self.decoder.layers
            ]
            try:
                hidden = self.decoder(**inputs, use_cache=False)[0]
            finally:
                for hook in hooks:
                    hook.remove()
            return [hidden.flatten(0, 1)[layout.tokens[layout.n_context :]]]

        # Rounding adds up over the layers: two equal bf16 passes of a random Llama-3-8B differ by 0.051 (H200).
        limit = tolerance(base_weight(self.plans[0].linears.up.module), 1e-3, 0.25)
        reason = disproof(theirs, lambda: [self.hidden(step, batch["input_ids"], positions)], limit)
        if reason is not None:
            return reason
        _, rotation, _ = self._embedded(layout, batch["input_ids"], positions)
        for plan, layer, (args, kwargs) in zip(self.plans, self.decoder.layers, calls, strict=True):
            reason = reason or self._attention_disproof(plan, layer.self_attn, args, kwargs, step, rotation)
        return reason

    def _attention_disproof(
        self, plan: LayerPlan, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], step: Step,
        rotation: Rotation,
    ) -> str | None:  # fmt: skip
        layout, weight = step.layout, base_weight(self.plans[0].linears.up.module)
        inputs = args[0] if args else kwargs["hidden_states"]
        x = random_input(tuple(inputs.shape[1:]), inputs, (1.0, 1.0 if is_low_precision(weight) else 4.0))
        rows = layout.tokens // layout.length

        def by_row(y: Tensor) -> list[Tensor]:
            return [y[rows == row] for row in range(layout.batch)]

        def theirs() -> list[Tensor]:
            y = attention(x, *args[1:], **kwargs) if args else attention(**{**kwargs, "hidden_states": x})
            return by_row((y[0] if isinstance(y, tuple) else y).flatten(0, 1)[layout.tokens])

        def ours() -> list[Tensor]:
            h = x.flatten(0, 1)[layout.tokens]
            return by_row(self._attention(plan, attention, h, step, rotation, last=False))

        # Keys with large biases (145 in the first layers of Qwen2.5) are rounded in steps of their size: two right
        # passes then differ by 9 % in bfloat16. In float32 the same function shows.
        def theirs_wide() -> list[Tensor]:
            wide, named = copy.deepcopy(attention).float(), _as_float(kwargs)
            if not args:
                named |= {"hidden_states": x.float()}
            y = wide(x.float(), *_as_float(args[1:]), **named) if args else wide(**named)
            return by_row((y[0] if isinstance(y, tuple) else y).flatten(0, 1)[layout.tokens])

        def ours_wide() -> list[Tensor]:
            h = x.float().flatten(0, 1)[layout.tokens]
            return by_row(self._attention(plan, attention, h, step, rotation, last=False))

        with gathered(self.decoder.layers[plan.block.index]):
            reason = disproof(theirs, ours, tolerance(weight, 1e-3, 0.05))
            if reason is None or weight.dtype not in (torch.float16, torch.bfloat16):
                return reason
            return disproof(theirs_wide, ours_wide, tolerance(weight.new_empty(0, dtype=torch.float32), 1e-3, 0.05))

    def _embedded(
        self, layout: TokenLayout, input_ids: Tensor, position_ids: Tensor | None
    ) -> tuple[Tensor, Rotation, torch.dtype]:
        """Packed tokens ``(n, d)``, their rotation, and the dtype to compute in."""
        embed = self.decoder.embed_tokens
        if embed._forward_hooks or embed._forward_pre_hooks:  # such as NEFTune's noise: they know whole batches only
            x = embed(input_ids).flatten(0, 1).index_select(0, layout.tokens)
        else:
            x = embed(input_ids.reshape(-1).index_select(0, layout.tokens))
        dtype = self._pass_dtype()
        if position_ids is None:
            positions = layout.columns
        else:
            shape = (layout.batch, layout.length)
            positions = position_ids.expand(shape).reshape(-1).index_select(0, layout.tokens)
        with torch.autocast(x.device.type, enabled=False):
            cos, sin = self.decoder.rotary_emb(x[None, :1].to(dtype), positions[None])
        if not self.is_sharded:
            self.casts.prepare(dtype)
        return x, Rotation(cos[0].contiguous(), sin[0].contiguous()), dtype

    def _pass_dtype(self) -> torch.dtype:
        weight = next(self.decoder.embed_tokens.parameters())
        kind = weight.device.type
        dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return dtype

    def _summed_loss(self, step: Step, x: Tensor, rotation: Rotation, dtype: torch.dtype) -> Tensor:
        x = self._through_layers(step, x, rotation, dtype)
        targets, head = step.layout.targets, self.head
        if class_of(head) is nn.Linear and not head.weight.requires_grad:

            def loss(x: Tensor) -> Tensor:
                return linear_cross_entropy(x, head.weight, head.bias, targets, observe=self.observe)

            return between_hooks(head, loss, x)
        logits = head(x.to(next(head.parameters()).dtype))  # a head that is adapted or trained
        if self.observe is not None:
            self.observe(x.detach(), logits.detach(), targets)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def _through_layers(
        self, step: Step, x: Tensor, rotation: Rotation, dtype: torch.dtype, trims: bool = True
    ) -> Tensor:
        """The normalised last hidden state of the output tokens; of all tokens unless it ``trims`` the last layer."""
        if not self.is_sharded:  # factors are whole in one layer at a time
            self.casts.refresh()
        delta = None
        detached = 0
        try:
            for plan, layer in zip(self.plans, self.decoder.layers):
                if step.detached(plan.block.index) != detached:  # from here on up the context has no backward pass
                    detached = step.detached(plan.block.index)
                    x = detach_rows(x, detached)
                    delta = None if delta is None else detach_rows(delta, detached)
                last = trims and plan.block.index == len(self.plans) - 1
                run = functools.partial(self._layer, plan, layer, step, rotation, dtype, last)
                x, delta = self._run_layer(layer, run, x, delta)
        finally:
            self.casts.forget()
        norm, quantises, detached = self.decoder.norm, self.plans[-1].quantises, 0 if trims else detached

        def normalise(x: Tensor, delta: Tensor) -> Tensor:
            return add_rms_norm(
                x, delta, norm.weight, norm.variance_epsilon, dtype, quantise_grad=quantises, detached=detached
            )[1]

        return between_hooks(norm, normalise, x, delta)

    @staticmethod
    def _run_layer(
        layer: Any, run: Callable[..., tuple[Tensor, Tensor]], x: Tensor, delta: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run a layer, recomputed in the backward pass where the model's own is."""
        inner: Any = unwrapped(layer)
        inside: Callable[..., tuple[Tensor, Tensor]] = functools.partial(between_hooks, inner, run)
        if layer.training and (inner is not layer or layer.gradient_checkpointing):
            inside = functools.partial(checkpoint, inside, use_reentrant=False)
        return inside(x, delta) if inner is layer else between_hooks(layer, inside, x, delta)

    def _layer(
        self, plan: LayerPlan, layer: Any, step: Step, rotation: Rotation, dtype: torch.dtype, last: bool, x: Tensor,
        delta: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        detached = step.detached(plan.block.index)
        x, h = self._norm(plan, "attention", layer.input_layernorm, x, delta, dtype, detached)
        delta = self._attention(plan, layer.self_attn, h, step, rotation, last)
        split, adapted = step.split, step.adapted
        if last:  # what is not an output token ends here
            n_context = step.layout.n_context
            x, split, detached = x[n_context:], max(0, split - n_context), max(0, detached - n_context)
            adapted = adapted.after(n_context)
        x, h = self._norm(plan, "ffn", layer.post_attention_layernorm, x, delta, dtype, detached)
        return x, plan.ffn(h, split, step, detached=detached, adapted=adapted)

    @staticmethod
    def _norm(
        plan: LayerPlan, part: Part, norm: Any, x: Tensor, delta: Tensor | None, dtype: torch.dtype, detached: int
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and the normalised input of a part: in fp8 alone where nothing else reads it."""
        return add_rms_norm(
            x,
            delta,
            norm.weight,
            norm.variance_epsilon,
            dtype,
            quantise=plan.quantises,
            keep_wide=plan.reads_wide(part),
            quantise_grad=plan.quantises,
            detached=detached,
        )

    def _attention(
        self, plan: LayerPlan, attention: Any, h: Tensor, step: Step, rotation: Rotation, last: bool
    ) -> Tensor:
        layout, heads, linears = step.layout, plan.block.attention, plan.linears
        detached = step.detached(plan.block.index)
        selection = plan.score("attention", h[: step.split], step)
        split = 0 if selection is None else step.split
        edge = layout.n_context if last else 0  # rows from here on need a query
        ranges = list(pairwise(sorted({0, split, edge, layout.n})))
        choice: AttentionChoice | None = None

        def computed(start: int, stop: int, choice: AttentionChoice | None, ready: Any = None) -> Rows:
            return Rows(start, stop, _channels(plan, choice, start >= edge, h.device), ready)

        linears.qkv.join()
        with side_stream(h, selection is not None and not selection.is_fixed) as done:
            if selection is not None:
                choice = cast(AttentionChoice, selection.choose())
            sparse_rows = [computed(a, b, choice) for a, b in ranges if b <= split]
            operands = [linears.projections(r.channels, choice, h.dtype) for r in sparse_rows]
            ready = done()
        dense_rows = [computed(a, b, None) for a, b in ranges if b > split]
        operands += [linears.projections(r.channels, None, h.dtype) for r in dense_rows]
        rows = [*(replace(r, ready=ready) for r in sparse_rows), *dense_rows]
        values = list(zip(rows, split_linear(h, rows, [(operand,) for operand in operands], detached, step.adapted)))
        values = [(r, value if len(r.after(detached)) else value.detach()) for r, value in values]
        widths = (heads.heads * heads.head_dim, heads.kv_width, heads.kv_width)
        if self.head_norms:
            normalised = self._normalised(attention, values, layout.n, widths, heads.head_dim, detached)
            values = [(Rows(0, layout.n), normalised)]
        n_slots = layout.n_slots
        q, k, v = to_heads(
            values, layout.slots, n_slots, widths, rotation, covered=layout.covered,
            quantise_grad=plan.quantises and not self.head_norms, detached=detached,
        )  # fmt: skip
        sizes = [rows * width for rows, width in layout.buffers]
        mixed = []
        for (rows_here, width), *parts in zip(layout.buffers, *(part.split(sizes) for part in (q, k, v))):
            query, key, value = (part.view(rows_here, width, -1, heads.head_dim).transpose(1, 2) for part in parts)
            attended = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scaling, enable_gqa=heads.heads != heads.kv_heads
            )
            mixed.append(attended.transpose(1, 2).reshape(rows_here * width, widths[0]))
        full = torch.cat(mixed) if len(mixed) > 1 else mixed[0]
        queries = [(r, choice if r.stop <= split else None) for r in rows if r.start >= edge]
        return self._output(plan, full, queries, step, last)

    @staticmethod
    def _output(
        plan: LayerPlan, full: Tensor, queries: list[tuple[Rows, AttentionChoice | None]], step: Step, last: bool
    ) -> Tensor:
        """The output projection of the rows with a query, from attention's buffer."""
        layout, detached = step.layout, step.detached(plan.block.index)
        d = plan.linears.attention["o"].width
        if not queries:
            return full.new_zeros(0, d)
        rows = [Rows(r.start, r.stop, None if choice is None else choice.channels("o")) for r, choice in queries]
        covered = layout.covered and not last
        values = from_slots(full, rows, layout.slots, covered=covered, quantise=plan.quantises, detached=detached)
        first = rows[0].start
        shifted = [Rows(r.start - first, r.stop - first) for r in rows]
        operands = [(plan.linears.output(choice, full.dtype),) for _, choice in queries]
        adapted = step.adapted.after(first)
        return join_linear(
            [[value] for value in values], shifted, operands, (layout.n - first, d), max(0, detached - first), adapted
        )

    @staticmethod
    def _normalised(
        attention: Any, values: list[tuple[Rows, Tensor]], n: int, widths: tuple[int, int, int], head_dim: int,
        detached: int,
    ) -> Tensor:  # fmt: skip
        """q, k and v of all packed rows, q and k through the norm over heads; dropped channels count as zeros there."""
        here = torch.arange(n, device=values[0][1].device)
        whole = to_slots(values, here, (n, sum(widths)), covered=True, detached=detached)

        def normalised(rows: Tensor) -> Tensor:
            q, k, v = rows.split(widths, dim=1)
            q = attention.q_norm(q.reshape(len(q), -1, head_dim)).reshape(len(q), -1).to(v.dtype)
            k = attention.k_norm(k.reshape(len(k), -1, head_dim)).reshape(len(k), -1).to(v.dtype)
            return torch.cat((q, k, v), dim=1)

        return by_attachment(normalised, whole, detached)


def _as_float(value: Any) -> Any:
    """Return the arguments of a call with its 16-bit tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, dict):
        return {key: _as_float(item) for key, item in value.items()}
    return tuple(_as_float(item) for item in value) if isinstance(value, tuple) else value


def _channels(
    plan: LayerPlan, choice: AttentionChoice | None, has_query: bool, device: torch.device
) -> Channels | None:
    """Return the channels of q, k and v side by side that rows with or without a query compute; None for all."""
    if choice is not None:
        return choice.channels("qkv" if has_query else "kv")
    if has_query:
        return None
    sizes = fused_sizes(plan.block.attention)
    return Channels.of(torch.arange(sizes[0], sum(sizes), device=device), sum(sizes))


def packed_decoder(structure: Structure, plans: Sequence[LayerPlan], has_own_loss: bool = True) -> PackedDecoder | None:
    """The packed pass of this model, or None where its structure or its function is another.

    Args:
        has_own_loss: the forward of the model's class computes the loss; otherwise `PackedDecoder.loss` is not for it.
    """
    model: Any = structure.model
    decoder = getattr(model, "model", None)
    layers = getattr(decoder, "layers", None)
    if not structure.causal or decoder is None or layers is None or not hasattr(model, "lm_head"):
        return None
    if {name for name, _ in decoder.named_children()} != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return None
    for layer in layers:
        inside = {name for name, _ in layer.self_attn.named_children()} if hasattr(layer, "self_attn") else set()
        if {name for name, _ in layer.named_children()} != _LAYER or inside - set(_HEAD_NORMS) != _ATTENTION:
            return None
        norms = (layer.input_layernorm, layer.post_attention_layernorm, decoder.norm)
        if not all(hasattr(n, "variance_epsilon") and not n.weight.requires_grad for n in norms):
            return None
        if getattr(layer.self_attn, "attention_dropout", 0.0) or not hasattr(layer.self_attn, "scaling"):
            return None
    packed = PackedDecoder(structure, plans)
    with undisturbed(model), torch.no_grad():
        reason = (head_disproof(model, packed.head) if has_own_loss else None) or packed.disproof()
    if reason is not None:
        warnings.warn(
            f"{type(model).__name__} trains block by block, which is slower: its pass on packed tokens would be "
            f"another function ({reason})",
            stacklevel=2,
        )
    return packed if reason is None else None


def _window(config: Any) -> int | None:
    """The sliding window of attention, where the model has one."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in kind for kind in kinds):
        return None
    return getattr(config, "sliding_window", None)
