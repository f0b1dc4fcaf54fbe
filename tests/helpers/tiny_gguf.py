"""A tiny Llama in a GGUF file, as llama.cpp's converter would write it: names, order of rows, vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 256, 512, 2, 4, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Unknown token, beginning and end, in the order of their ids."""


def byte_tokens() -> list[str]:
    """One token a byte, in GPT-2's alphabet: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tokens() -> list[str]:
    return [*SPECIAL, *byte_tokens(), "th", "the"]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under the names of transformers, rows of q and k in its order; no output layer."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    head = HIDDEN // HEADS
    state = {"model.embed_tokens.weight": matrix(len(tokens()), HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        state |= {
            layer + "input_layernorm.weight": rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32),
            layer + "self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            layer + "self_attn.k_proj.weight": matrix(head * KV_HEADS, HIDDEN),
            layer + "self_attn.v_proj.weight": matrix(head * KV_HEADS, HIDDEN),
            layer + "self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            layer + "post_attention_layernorm.weight": rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32),
            layer + "mlp.gate_proj.weight": matrix(INNER, HIDDEN),
            layer + "mlp.up_proj.weight": matrix(INNER, HIDDEN),
            layer + "mlp.down_proj.weight": matrix(HIDDEN, INNER),
        }
    return state | {"model.norm.weight": rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)}


_PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """llama.cpp's name of a weight of transformers."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, number, part = stem.split(".", 3)
        return f"blk.{number}.{_PARTS[part]}.weight"
    return f"{_PARTS[stem]}.weight"


def permuted(W: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head as llama.cpp wants them: row i of the first half next to row i of the second."""
    half = W.shape[0] // heads // 2
    order = [head * 2 * half + j * half + i for head in range(heads) for i in range(half) for j in range(2)]
    return W[order]


def packed(W: np.ndarray, kind: str) -> np.ndarray:
    """``W`` in blocks of a type. For the K types, which the library only reads, random codes with scales that fit."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quantize

    if kind not in {"Q4_K", "Q6_K"}:
        return quantize(W, GGMLQuantizationType[kind])
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    rng = np.random.default_rng(int(abs(W[0, 0]) * 1e6))
    blocks = rng.integers(0, 256, (W.size // 256, size), dtype=np.uint8)
    scale = np.float16(1e-4).tobytes()
    if kind == "Q4_K":  # d and dmin stand first
        blocks[:, :4] = np.frombuffer(scale + scale, np.uint8)
    else:  # d stands last
        blocks[:, -2:] = np.frombuffer(scale, np.uint8)
    return blocks.reshape(W.shape[0], -1)


def write_gguf(
    path: Path,
    state: Mapping[str, np.ndarray] | None = None,
    kind: str | Mapping[str, str] = "Q8_0",
    *,
    architecture: str = "llama",
    file_type: int | None = None,
    vocabulary: bool = True,
    endianess: Any = None,
    edit: Callable[[Any], object] = lambda writer: None,
) -> Path:
    """Write ``state`` (default: `weights`) as a GGUF file.

    Args:
        kind: block type of the matrices, or of those that are named by transformers' names; others Q8_0.
        file_type: number of the scheme in the metadata.
        edit: called with the writer before the tensors are added.
    """
    from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter

    writer = GGUFWriter(path, architecture, endianess=endianess or GGUFEndian.LITTLE)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens()))
    if file_type is not None:
        writer.add_file_type(file_type)
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens())
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)))
        writer.add_token_merges(["t h", "th e"])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
        writer.add_add_bos_token(False)
    edit(writer)
    for name, weight in (weights() if state is None else state).items():
        if weight.ndim == 1:
            writer.add_tensor(gguf_name(name), weight)
            continue
        W = weight
        if "q_proj" in name or "k_proj" in name:
            W = permuted(weight, HEADS if "q_proj" in name else KV_HEADS)
        stored = kind if isinstance(kind, str) else kind.get(name, "Q8_0")
        writer.add_tensor(gguf_name(name), packed(W, stored), raw_dtype=GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
