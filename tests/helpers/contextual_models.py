"""Tiny random models of each architecture, a ragged batch, and the masked reference that defines a sparse pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from sparselora.contextual.choices import AttentionChoice, FFNChoice, fused_sizes
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.structure import find_blocks

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 32, "attn_implementation": "sdpa",
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True, head_dim=10)
    ),
    "llama_mha_tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES, num_key_value_heads=2, head_dim=6)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, num_key_value_heads=1)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=64, n_embd=24, n_layer=3, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    ),
    "olmo_clipped": lambda: tf.OlmoForCausalLM(tf.OlmoConfig(**SIZES, num_key_value_heads=2, clip_qkv=0.05)),
}  # fmt: skip
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES, **NO_DROPOUT, num_labels=3)),
    "roberta": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**SIZES, **NO_DROPOUT, num_labels=3, pad_token_id=1)
    ),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(
            vocab_size=64, dim=24, hidden_dim=40, n_layers=3, n_heads=4, max_position_embeddings=32, dropout=0.0,
            attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=3,
        )
    ),
    "deberta": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(
            **(SIZES | {"attn_implementation": "eager"}), **NO_DROPOUT, num_labels=3,
            relative_attention=True, position_buckets=8, share_att_key=True,
            pos_att_type=["p2c", "c2p"], max_relative_positions=16, pad_token_id=1,
        )
    ),
}  # fmt: skip
PACKED = {"llama", "llama_mha_tied", "mistral", "qwen2", "qwen3"}


class ExactNorm(nn.Module):
    """RMS norm in the dtype of its input: transformers' own rounds to float32 on the way."""

    def __init__(self, theirs: nn.Module, plus_one: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(theirs.weight.detach(), requires_grad=False)
        self.plus_one = plus_one
        self.name = "eps" if plus_one else "variance_epsilon"  # as theirs
        setattr(self, self.name, getattr(theirs, self.name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + getattr(self, self.name))
        return (self.weight + self.plus_one) * unit


def tiny(name: str, *, targets: Any = None, lora: bool = True, r: int = 3, dropout: float = 0.0) -> nn.Module:
    """A float64 model with random LoRA factors, in training mode; the generator is left as building it leaves it."""
    model, state = _built(name, targets and tuple(targets), lora, r, dropout)
    torch.manual_seed(0)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@cache
def _built(name: str, targets: Any, lora: bool, r: int, dropout: float) -> tuple[nn.Module, torch.Tensor]:
    """Building costs many times what a copy does."""
    torch.manual_seed(0)
    base = (DECODERS | ENCODERS)[name]().double()
    generator = torch.Generator().manual_seed(3)
    for parameter in base.parameters():  # biases and norms are not trivial
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    for parent in list(base.modules()):
        for child_name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, child_name, ExactNorm(child, type(child).__name__.startswith("Gemma")))
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    if not lora:
        return base.train(), torch.get_rng_state()
    adapted = get_peft_model(
        base,
        LoraConfig(
            r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=list(targets or every_linear(base)),
            task_type="CAUSAL_LM" if name in DECODERS else "SEQ_CLS", fan_in_fan_out=name == "gpt2",
        ),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return adapted.train(), torch.get_rng_state()


def every_linear(base: nn.Module) -> list[str]:
    structure = find_blocks(base)
    names = []
    for block in structure.blocks:
        a, f = block.attention, block.ffn
        names += [n for n in (a.q, a.k, a.v, a.o, f.up, f.down, f.gate) if n is not None]
    return sorted(set(names))


def ragged(name: str, left: bool = False) -> dict[str, torch.Tensor]:
    """Three rows of 11, 7 and 9 tokens, padded to 11; decoders with 5, 3 and 6 prompt tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (3, 11), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, (n, prompt) in enumerate([(11, 5), (7, 3), (9, 6)]):
        start = 11 - n if left else 0
        mask[row] = 0
        mask[row, start : start + n] = 1
        labels[row] = -100
        labels[row, start + prompt : start + n] = ids[row, start + prompt : start + n]
    ids[mask == 0] = 1
    if name in ENCODERS:
        labels = torch.tensor([0, 2, 1])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def training_loss(name: str, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a training pass; DeBERTa rounds its own to float32, so there from the logits."""
    return exact_loss(model, batch) if name == "deberta" else model(**batch).loss


def exact_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's loss from its logits, without transformers' conversion of logits to float32."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if batch["labels"].dim() == 1:
        return nn.functional.cross_entropy(logits, batch["labels"])
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def bytes_kept(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> int:
    """Return the bytes that autograd keeps of a training pass, without the model's parameters."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=labels).loss
    assert loss.requires_grad
    return sum(size for place, size in sizes.items() if place not in weights)


Choices = dict[tuple[int, str], Any]


@contextmanager
def masked(
    model: nn.Module, batch: dict[str, torch.Tensor], choices: Choices, *, all_tokens: bool = False
) -> Iterator[None]:
    """Hooks that multiply by 0 what a sparse pass leaves out: the definition that the fast code must equal."""
    structure = find_blocks(model)
    causal = structure.causal
    layout = TokenLayout.build(batch["attention_mask"], batch["labels"] if causal else None, causal=causal)
    sparse = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    sparse[layout.tokens[: layout.n if all_tokens else layout.n_context]] = True
    if not causal:  # an encoder's padding is computed like its neighbours
        sparse[:] = True
    sparse = sparse.view(batch["input_ids"].shape)[..., None]
    handles = []

    def channels(width: int, index: torch.Tensor | None) -> torch.Tensor:
        kept = torch.zeros(width, dtype=torch.float64)
        kept[torch.arange(width) if index is None else index] = 1
        return torch.where(sparse, kept, torch.ones((), dtype=torch.float64))

    def after(mask: torch.Tensor) -> Callable[..., torch.Tensor]:
        return (
            lambda _module, _inputs, output: (  # projections are called on relative positions too
                output * mask.to(output.dtype) if output.shape[:2] == mask.shape[:2] else output
            )
        )

    def before(mask: torch.Tensor) -> Callable[..., tuple[torch.Tensor]]:
        return lambda _module, inputs: (inputs[0] * mask.to(inputs[0].dtype),)

    for block in structure.blocks:
        choice = choices.get((block.index, "ffn"))
        if isinstance(choice, FFNChoice):
            handles += _mask_ffn(structure, block, choice, sparse, channels, before)
        choice = choices.get((block.index, "attention"))
        if isinstance(choice, AttentionChoice) and choice.maps is None:
            heads = block.attention
            widths = {"q": heads.heads * heads.head_dim, "k": heads.kv_width, "v": heads.kv_width}
            if heads.fused:
                widths = {"q": sum(fused_sizes(heads))}
            for part, width in widths.items():
                mask = channels(width, choice.channels("qkv" if heads.fused else part).index)
                handles.append(structure.module(getattr(heads, part)).register_forward_hook(after(mask)))
            mask = channels(heads.heads * heads.head_dim, choice.channels("o").index)
            handles.append(structure.module(heads.o).register_forward_pre_hook(before(mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask_ffn(structure: Any, block: Any, choice: FFNChoice, sparse: Any, channels: Any, before: Any) -> list[Any]:
    up, down = structure.module(block.ffn.up), structure.module(block.ffn.down)
    seen: dict[str, torch.Tensor] = {}
    width = structure.module(block.ffn.down).in_features if hasattr(down, "in_features") else 40

    def remember(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen["x"] = inputs[0]

    def replace(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        extra: Any = 0.0 if choice.bias is None else choice.bias
        if choice.map is not None:
            extra = extra + choice.map.apply(seen["x"])
        kept = output if choice.channels is not None else torch.zeros_like(output)
        return torch.where(sparse, kept + extra, output)

    handles = [up.register_forward_pre_hook(remember)]
    if choice.channels is not None:
        handles.append(down.register_forward_pre_hook(before(channels(width, choice.channels))))
    handles.append(down.register_forward_hook(replace))
    return handles
