"""GGUF files as transformers loads them, and what its conversion leaves to be mended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from sparselora.errors import InputError, few, printable
from sparselora.models.gguf_header import GgufHeader
from sparselora.models.quiet_loading import quiet_loading

_SAMPLED_ROWS = 256
_SAME = 0.5
"""Relative distance below which the embedding and the output layer are two quantisations of one matrix. Blocks of 2
bits are about 0.3 from their original, two matrices that were trained apart more than 1."""


def check_architecture(header: GgufHeader) -> None:
    """Raise InputError where transformers does not convert the architecture, or the file has no vocabulary."""
    names = sorted(name for name in GGUF_SUPPORTED_ARCHITECTURES if name not in {"general", "tokenizer"})
    label = f"GGUF file {printable(header.file.name)}"
    plain = header.architecture.replace("-", "_").replace("moe", "_moe").replace("__", "_").removesuffix("encoder")
    if header.architecture not in names and plain not in names:
        raise InputError(
            f"{label} has the architecture {printable(header.architecture)!r}, which transformers does not convert; "
            f"it converts {few(names, most=30)}"
        )
    if not header.metadata.get("tokenizer.ggml.tokens"):
        raise InputError(f"{label} has no vocabulary (tokenizer.ggml.tokens); use a file with its tokenizer")


def gguf_place(header: GgufHeader) -> dict[str, str]:
    """Return the arguments by which ``from_pretrained`` of transformers finds the file."""
    return {"pretrained_model_name_or_path": str(header.file.parent), "gguf_file": header.file.name}


def save_dequantised(header: GgufHeader, folder: Path) -> None:
    """Write the causal language model in a GGUF file to ``folder``, as bfloat16 safetensors with its tokenizer.

    Raises:
        InputError: as `check_architecture`; a weight of the model is not in the file.
    """
    check_architecture(header)
    with quiet_loading():
        tokenizer = transformers.AutoTokenizer.from_pretrained(**gguf_place(header), trust_remote_code=False)
        causal_lm: Any = transformers.AutoModelForCausalLM
        model, report = causal_lm.from_pretrained(
            **gguf_place(header), trust_remote_code=False, output_loading_info=True, dtype=torch.bfloat16
        )
    if missing := report["missing_keys"]:
        raise InputError(
            f"GGUF file {printable(header.file.name)} has no weights for {few(sorted(missing))}; restore it"
        )
    mend(model, tokenizer, header)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_gguf_config(header: GgufHeader) -> dict[str, Any]:
    """Return the configuration that transformers makes of a GGUF file, as ``config.json`` would have it.

    Raises:
        InputError: as `check_architecture`.
    """
    check_architecture(header)
    with quiet_loading():
        config = transformers.AutoConfig.from_pretrained(**gguf_place(header), trust_remote_code=False)
    return {name: value for name, value in config.to_dict().items() if name != "quantization_config"}


def mend(model: nn.Module, tokenizer: Any, header: GgufHeader) -> None:
    """Give a converted model and its tokenizer what the file says and the conversion drops.

    The conversion takes the ends of texts from the tokenizer's class and not from the file; where the original ties the
    output layer to the embedding and the file stores it a second time, in other blocks, it makes two matrices of them;
    and it calls the model quantised, so that it could neither be trained whole nor saved.
    """
    for field, token in (("eos_token", "eos"), ("pad_token", "padding")):
        number = header.metadata.get(f"tokenizer.ggml.{token}_token_id")
        if number is not None:
            setattr(tokenizer, field, tokenizer.convert_ids_to_tokens(int(number)))
    _tie_copies(model, header)
    _forget_quantisation(model)


def _tie_copies(model: Any, header: GgufHeader) -> None:
    """Tie the output layer and the embedding where they are one matrix, to whichever is stored in more bits."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight or head.weight.shape != embedding.weight.shape:
        return
    rows = torch.linspace(0, len(head.weight) - 1, min(_SAMPLED_ROWS, len(head.weight))).long()
    above, below = head.weight.detach()[rows].float(), embedding.weight.detach()[rows].float()
    if not torch.linalg.norm(above - below) < _SAME * torch.linalg.norm(above):
        return
    bits = {tensor.name: tensor.bits for tensor in header.tensors}
    if bits.get("output.weight", 0) >= bits.get("token_embd.weight", 0):
        embedding.weight = head.weight
    else:
        head.weight = embedding.weight
    model.config.get_text_config().tie_word_embeddings = True
    model.config.tie_word_embeddings = True


def _forget_quantisation(model: Any) -> None:
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
