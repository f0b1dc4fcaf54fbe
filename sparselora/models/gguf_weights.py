"""Tensors of a GGUF file under the names that transformers gives them, and their values, dequantised in pieces.

Needs the package gguf and no torch. llama.cpp has its own names, and stores the rows of Llama's query and key
projections in the order of another rotary embedding; both are undone here, as transformers does when it loads the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselora.errors import InputError, few, printable
from sparselora.models.gguf_header import GgufHeader, GgufTensor

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_MODEL = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head",
}  # fmt: skip
_GPT2_LAYER = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip

_NAMES: dict[str, tuple[Mapping[str, str], str, Mapping[str, str]]] = {
    "llama": (_MODEL, "model.layers", _LAYER),
    "qwen2": (_MODEL, "model.layers", _LAYER),
    "qwen3": (_MODEL, "model.layers", _LAYER | _QK_NORMS),
    "gemma2": (_MODEL, "model.layers", _LAYER | _GEMMA),
    "gemma3": (_MODEL, "model.layers", _LAYER | _QK_NORMS | _GEMMA),
    "phi3": (_MODEL, "model.layers", _LAYER | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "starcoder2": (_MODEL, "model.layers", _LAYER | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "stablelm": (_MODEL, "model.layers", _LAYER),
    "gpt2": (_GPT2_MODEL, "transformer.h", _GPT2_LAYER),
}
"""Architecture → names of the model's own modules, the name of its list of layers, and names within a layer. A test
holds this against transformers."""

_BLOCK_TENSOR = re.compile(r"blk\.(\d+)\.(.+)")


def check_names(header: GgufHeader) -> None:
    """Raise InputError where the architecture's names are not known here."""
    if header.architecture not in _NAMES:
        raise InputError(
            f"GGUF file {printable(header.file.name)} has the architecture {printable(header.architecture)!r}, whose "
            f"tensors cannot be read one at a time; those of {few(_NAMES, most=20)} can"
        )


def loaded_name(header: GgufHeader, tensor: GgufTensor) -> str:
    """Return the name that the loaded model's state has for ``tensor``; llama.cpp's where it has none.

    Call `check_names` first.
    """
    model, layers, in_layer = _NAMES[header.architecture]
    stem, dot, ending = tensor.name.rpartition(".")
    if block := _BLOCK_TENSOR.fullmatch(stem):
        name = in_layer.get(block[2])
        return f"{layers}.{block[1]}.{name}{dot}{ending}" if name else tensor.name
    return f"{model[stem]}{dot}{ending}" if stem in model else tensor.name


def interleaved_heads(header: GgufHeader, tensor: GgufTensor) -> int:
    """Return into how many heads the rows of ``tensor`` divide if each has its rotary pairs side by side; else 0."""
    if header.architecture != "llama" or not (part := re.search(r"\.attn_([qk])\.", tensor.name)):
        return 0
    heads = header.setting("attention.head_count")
    if part[1] == "k":
        heads = header.setting("attention.head_count_kv") or heads
    if not isinstance(heads, int) or heads < 1 or tensor.shape[0] % (2 * heads):
        raise InputError(
            f"GGUF file {printable(header.file.name)}: {printable(tensor.name)} has {tensor.shape[0]} rows, no "
            f"multiple of 2 for each of {heads} heads; restore it"
        )
    return heads


def separate_halves(W: NDArray[Any], heads: int) -> NDArray[Any]:
    """Return ``W`` ``(d_out, d_in)`` with row 2i + j of each head at j · head_dim / 2 + i: transformers' order."""
    pairs = W.reshape(heads, -1, 2, *W.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(W.shape)


def block_size(dtype: str) -> tuple[int, int]:
    """Return elements and bytes of one block of a quantised type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]


def dequantised(blocks: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Return the values ``(n,)`` of whole blocks of a quantised type, packed as the file has them."""
    from gguf import GGMLQuantizationType, dequantize

    _, size = block_size(dtype)
    with np.errstate(all="ignore"):  # of damaged scales; whoever reads the values sees that they are not finite
        return dequantize(blocks.reshape(-1, size), GGMLQuantizationType[dtype]).reshape(-1)
