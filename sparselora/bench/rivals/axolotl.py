"""axolotl's LoRA kernels in attention and FFN of a Llama-like model; TRL's fused output layer where it is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from typing import Any

import torch

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
    for layer in decoder_layers(model):
        put_in_kernels(layer, kernels)
    compiled = compile_layers(model, job)
    how = ["LoRA kernels", *(["fused output layer"] if fused else []), *(["layers compiled"] if compiled else [])]
    extra = {"fused_lm_head": True} if fused else {}
    return Prepared(model, lambda batch: model(**batch, **extra).loss, ", ".join(how))


def put_in_kernels(layer: Any, kernels: Any) -> None:
    """Have the attention of a decoder layer, and its FFN where that is adapted, compute by axolotl's kernels.

    Raises:
        NotImplementedError: an attention that is not Llama's: other projections, or norms of queries and keys.
    """
    attention, ffn = layer.self_attn, layer.mlp
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not all(hasattr(getattr(attention, name, None), "lora_A") for name in projections) or hasattr(
        attention, "q_norm"
    ):
        raise NotImplementedError("its kernels are for adapters on q, k, v and o of a Llama-like attention")
    attention.forward = types.MethodType(functools.partial(_attend, kernels=kernels), attention)
    if all(hasattr(getattr(ffn, name, None), "lora_A") for name in ("gate_proj", "up_proj", "down_proj")):
        ffn.forward = types.MethodType(kernels.apply_lora_mlp_swiglu, ffn)


def _attend(
    attention: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    *,
    kernels: Any,
    **keywords: Any,
) -> tuple[torch.Tensor, Any]:
    code = sys.modules[type(attention).__module__]
    rows = hidden_states.shape[:-1]
    q, k, v = (
        part.view(*rows, -1, attention.head_dim).transpose(1, 2)
        for part in kernels.apply_lora_qkv(attention, hidden_states)
    )
    q, k = code.apply_rotary_pos_emb(q, k, *position_embeddings)
    attend = code.ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    keywords = {name: value for name, value in keywords.items() if name != "past_key_values"}
    mixed, weights = attend(
        attention, q, k, v, attention_mask, dropout=0.0, scaling=attention.scaling, **keywords
    )  # fmt: skip
    return kernels.apply_lora_o(attention, mixed.reshape(*rows, -1).contiguous()), weights
