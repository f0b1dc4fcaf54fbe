"""Chat templates of the usual kinds, each with generation blocks and without, and a tokenizer for them: for tests."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_BEGIN, _END = "{% generation %}", "{% endgeneration %}"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}[[{{ m['content'] }}<|im_end|>]]"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if m['role'] == 'assistant' %}[[{{ m['content'] | trim }}<|eot_id|>]]"
    "{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' and loop.first %}{% set ns.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}[INST] {{ ns.system }}{{ m['content'] }} [/INST]{% set ns.system = '' %}"
    "{% elif m['role'] == 'assistant' %}[[ {{ m['content'] | trim }}{{ eos_token }}]]"
    "{% else %}{{ raise_exception('roles are user and assistant, after a system prompt') }}{% endif %}{% endfor %}"
)
KINDS = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}

_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>")
_TEXT = (
    "the user asks and the assistant answers, in turns. What is 7 times 8? It is 56. system user assistant\n\n"
    "  spaces   and\nlines [INST] [/INST] a question Question: a reply Answer: yes, no. Name the capital of France."
)


def plain(kind: str) -> str:
    """Return a template without generation blocks."""
    return KINDS[kind].replace("[[", "").replace("]]", "")


def with_blocks(kind: str) -> str:
    """Return the same template with blocks around what the assistant writes."""
    return KINDS[kind].replace("[[", _BEGIN).replace("]]", _END)


def chat_tokenizer(template: str | None = None, eos: str = "</s>", merges: int = 120) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ``merges`` merges, so that tokens reach over the edges of words, and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(_SPECIAL) + 1 + merges, show_progress=False, special_tokens=["<pad>", *_SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([_TEXT] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>",
        additional_special_tokens=[token for token in _SPECIAL if token not in ("<s>", eos)],
    )  # fmt: skip
    fast.chat_template = template
    return fast


def make_chat_llama(folder: Path, template: str | None, eos: str = "</s>") -> Path:
    """A random Llama with `chat_tokenizer`, as a local model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = chat_tokenizer(template, eos)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
