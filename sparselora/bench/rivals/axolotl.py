"""axolotl's LoRA kernels in attention and FFN of a Llama-like model; TRL's fused output layer where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sparselora.bench.rivals.jobs import Job
from sparselora.bench.rivals.prepared import Prepared, base_model, compile_layers, decoder_layers, with_adapter
from sparselora.bench.rivals.trl import fuse_output_layer


def prepare(job: Job) -> Prepared:
    kernels = importlib.import_module("axolotl.kernels.lora")
    base = base_model(job)
    fused = importlib.util.find_spec("trl") is not None
    if fused:
        fuse_output_layer(base)
    model = with_adapter(base, job)
    put_in_kernels(list(decoder_layers(model)), kernels)
    compiled = compile_layers(model, job)
    how = ["LoRA kernels", *(["fused output layer"] if fused else []), *(["layers compiled"] if compiled else [])]
    extra = {"fused_lm_head": True} if fused else {}
    return Prepared(model, lambda batch: model(**batch, **extra).loss, ", ".join(how))


def put_in_kernels(layers: Sequence[Any], kernels: Any) -> None:
    """Have the attention of all decoder layers, and their FFN where it is adapted, compute by axolotl's kernels.

    Raises:
        NotImplementedError: an attention that is not Llama's: other projections, or norms of queries and keys.
    """
    attention, ffn = layers[0].self_attn, layers[0].mlp
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not all(hasattr(getattr(attention, name, None), "lora_A") for name in projections) or hasattr(
        attention, "q_norm"
    ):
        raise NotImplementedError("its kernels are for adapters on q, k, v and o of a Llama-like attention")
    _replace_forward([layer.self_attn for layer in layers], _attention_forward(type(attention), kernels))
    if all(hasattr(getattr(ffn, name, None), "lora_A") for name in ("gate_proj", "up_proj", "down_proj")):
        _replace_forward([layer.mlp for layer in layers], kernels.apply_lora_mlp_swiglu)


def _replace_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> None:
    """Give ``modules``, all of one class, a class of their own with this ``forward``.

    A forward of each module's own would be a function of its own to torch.compile, which compiles eight of a kind and
    leaves further layers as they are.
    """
    base = type(modules[0])
    with_kernels = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    for module in modules:
        module.__class__ = with_kernels


def _attention_forward(attention_class: type[nn.Module], kernels: Any) -> Callable[..., Any]:
    code = sys.modules[attention_class.__module__]
    apply_qkv, apply_o = kernels.apply_lora_qkv, kernels.apply_lora_o

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **keywords: Any,
    ) -> tuple[torch.Tensor, Any]:
        rows = hidden_states.shape[:-1]
        q, k, v = (part.view(*rows, -1, self.head_dim).transpose(1, 2) for part in apply_qkv(self, hidden_states))
        q, k = code.apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = code.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **keywords)
        return apply_o(self, mixed.reshape(*rows, -1).contiguous()), weights

    return forward
