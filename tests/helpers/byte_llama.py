"""A tiny Llama whose tokens are bytes, so that any text goes in and out, and its adapters: for tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

POSITIONS = 256


def byte_tokenizer(longest: int = POSITIONS) -> PreTrainedTokenizerFast:
    """A token a byte, so that any text goes in and out."""
    vocabulary = {"<eos>": 0, "<pad>": 1}
    vocabulary |= {byte: i + 2 for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=longest
    )


def _config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def byte_llama() -> LlamaForCausalLM:
    """Random weights, two layers, float64."""
    torch.manual_seed(0)
    return LlamaForCausalLM(_config(2)).double()


def save_adapter(folder: Path, layers: int = 2, r: int = 4) -> Path:
    """A random adapter of a Llama like `byte_llama`, with ``layers`` layers."""
    torch.manual_seed(1)
    lora = LoraConfig(r=r, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM(_config(layers)), lora).save_pretrained(folder)
    return folder


def save_answering(folder: Path, answer: str, steps: int = 100) -> Path:
    """A model that was trained to write ``answer`` after every ``Answer:``, and then to ask a next question."""
    tokenizer, model = byte_tokenizer(), byte_llama().float()
    torch.manual_seed(0)
    turn = "Question: {} and {}?\nAnswer: " + answer + "\n\n"
    texts = [turn.format(a, b) + turn.format(b, a) + "Question: " for a in range(5) for b in (a, (a + 1) % 5)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert len({len(row) for row in ids}) == 1
    tokens = torch.tensor(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
