"""A tiny Llama with a word tokenizer, and an instruction set it can learn: for tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WORDS = 40


def make_tiny_llama(folder: Path, pad: bool = True, layers: int = 2) -> Path:
    """A random Llama with four heads in two groups, as a local model folder; ``pad`` False: without padding."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "<eos>"} | ({"pad_token": "<pad>"} if pad else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2 if pad else None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_instructions(path: Path, rows: int, seed: int = 0) -> Path:
    """Prompts of a few words; the completion repeats the last of them."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        words = [f"w{i}" for i in rng.integers(0, WORDS, rng.integers(3, 14))]
        lines.append(json.dumps({"question": " ".join(words), "answer": " ".join(words[-int(rng.integers(1, 4)) :])}))
    path.write_text("\n".join(lines) + "\n")
    return path
