"""Parameters and training memory of a transformer and of its LoRA adapters, from ``config.json`` alone.

Nothing is loaded or built: the counts follow from the configuration, and equal those of the model that transformers
(5 and later) builds from it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparselora.errors import InputError, suggest

Config = Mapping[str, Any]

TARGETS = {
    "q": "query projection",
    "k": "key projection",
    "v": "value projection",
    "o": "attention output projection",
    "gate": "gate of a gated FFN",
    "up": "up projection of a gated FFN",
    "down": "down projection of a gated FFN",
    "fc1": "first layer of a plain FFN",
    "fc2": "second layer of a plain FFN",
}
"""Short names of the projections; each family says which of its modules they are."""

ATTENTION = frozenset("qkvo")

MOST_LAYERS, LARGEST_SIZE = 10_000, 1_000_000_000
"""Most layers, and the largest other size, that a configuration may have."""


@dataclass(frozen=True)
class Matrix:
    """A weight ``(d_out, d_in)`` that occurs ``count`` times in the model, once a layer (or a layer and expert).

    ``parts`` are the short names of what it computes: more than one where the model fuses projections into one matrix,
    as GPT-2 does with q, k and v. Such a matrix has one adapter.
    """

    name: str
    parts: tuple[str, ...]
    d_out: int
    d_in: int
    count: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Weights and biases of all occurrences."""
        return self.count * self.d_out * (self.d_in + self.bias)

    @property
    def largest_rank(self) -> int:
        return min(self.d_out, self.d_in)

    def lora_parameters(self, rank: int) -> int:
        """``count · rank · (d_in + d_out)``: a lora_A ``(rank, d_in)`` and a lora_B ``(d_out, rank)`` each."""
        return self.count * rank * (self.d_in + self.d_out)


@dataclass(frozen=True)
class Architecture:
    """The matrices of a model that an adapter can sit on, and the parameters of everything else by name.

    A decoder is counted as a causal language model: with its output layer, once if that is tied to the embedding. An
    encoder is counted without any task head; BERT and RoBERTa with their pooler.
    """

    model_type: str
    matrices: tuple[Matrix, ...]
    other: Mapping[str, int]

    def targets(self) -> list[str]:
        """The short names this model has, in the order of `TARGETS`."""
        parts = {part for matrix in self.matrices for part in matrix.parts}
        return [name for name in TARGETS if name in parts]

    def resolve(self, targets: Iterable[str]) -> list[Matrix]:
        """The matrices that compute any of ``targets``.

        Raises:
            InputError: a name this model has no matrix for, or no name at all.
        """
        wanted, accepted = list(dict.fromkeys(targets)), self.targets()
        if not wanted:
            raise InputError(f"no target given; {self.model_type} has: {' '.join(accepted)}")
        for name in wanted:
            if name not in accepted:
                raise InputError(
                    f"unknown target {name!r}{suggest(name, accepted)} ({self.model_type} has: {' '.join(accepted)})"
                )
        return [matrix for matrix in self.matrices if set(matrix.parts) & set(wanted)]

    def attention_parameters(self) -> int:
        """Weights and biases of the attention projections q, k, v and o in all layers."""
        return sum(matrix.parameters for matrix in self.matrices if set(matrix.parts) <= ATTENTION)

    def model_parameters(self) -> int:
        """Every parameter of the model, a tied one once."""
        return sum(matrix.parameters for matrix in self.matrices) + sum(self.other.values())


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes held for trained parameters: the parameters themselves, their gradients, the optimizer's state."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def training_memory(parameters: int, bytes_per_param: float, optimizer_bytes: float | None = None) -> TrainingMemory:
    """Return the memory that training ``parameters`` parameters holds between steps.

    Args:
        bytes_per_param: of a parameter and of its gradient (4 for float32, 2 for bfloat16).
        optimizer_bytes: of optimizer state per parameter; by default ``2 · bytes_per_param``, the two moments that
            torch's AdamW keeps in the parameter's own dtype.
    """
    state = 2 * bytes_per_param if optimizer_bytes is None else optimizer_bytes
    size = round(parameters * bytes_per_param)
    return TrainingMemory(size, size, round(parameters * state))


# --- from a configuration -----------------------------------------------------------------------------------------


def architecture(config: Config) -> Architecture:
    """The `Architecture` that a ``config.json`` describes.

    Raises:
        InputError: a ``model_type`` that is not known here, or a field that is missing or no positive number.
    """
    model_type = config.get("model_type", "")
    if not isinstance(model_type, str):
        raise InputError(f"model_type in the model's configuration must be a text, got {reprlib.repr(model_type)}")
    if model_type not in FAMILIES:
        raise InputError(
            f"unknown architecture {model_type!r} in the model's configuration{suggest(model_type, FAMILIES)} "
            f"(known: {', '.join(FAMILIES)})"
        )
    return FAMILIES[model_type](model_type, config)


def _size(config: Config, name: str, default: int | None = None) -> int:
    """A positive whole number from the configuration; ``default`` where it is absent or null."""
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        got = "nothing" if value is None else reprlib.repr(value)
        raise InputError(f"the model's configuration needs a positive whole number as {name!r}, got {got}")
    most = MOST_LAYERS if "layer" in name else LARGEST_SIZE
    if value > most:
        raise InputError(
            f"the model's configuration has {reprlib.repr(value)} as {name!r}; at most {most:,} is counted"
        )
    return value


def _bert(model_type: str, config: Config) -> Architecture:
    """BERT and RoBERTa: post-norm layers, position and segment embeddings, a pooler."""
    d, f, layers = _size(config, "hidden_size"), _size(config, "intermediate_size"), _size(config, "num_hidden_layers")
    embedded = _size(config, "vocab_size") + _size(config, "max_position_embeddings") + _size(config, "type_vocab_size")
    return Architecture(
        model_type,
        (
            Matrix("attention.self.query", ("q",), d, d, layers, bias=True),
            Matrix("attention.self.key", ("k",), d, d, layers, bias=True),
            Matrix("attention.self.value", ("v",), d, d, layers, bias=True),
            Matrix("attention.output.dense", ("o",), d, d, layers, bias=True),
            Matrix("intermediate.dense", ("fc1",), f, d, layers, bias=True),
            Matrix("output.dense", ("fc2",), d, f, layers, bias=True),
        ),
        {"embeddings": embedded * d, "norms": 2 * d * (1 + 2 * layers), "pooler": d * (d + 1)},
    )


def _distilbert(model_type: str, config: Config) -> Architecture:
    d, f, layers = _size(config, "dim"), _size(config, "hidden_dim"), _size(config, "n_layers")
    embedded = _size(config, "vocab_size") + _size(config, "max_position_embeddings")
    attention = (("q_lin", "q"), ("k_lin", "k"), ("v_lin", "v"), ("out_lin", "o"))
    return Architecture(
        model_type,
        (
            *(Matrix(f"attention.{name}", (part,), d, d, layers, bias=True) for name, part in attention),
            Matrix("ffn.lin1", ("fc1",), f, d, layers, bias=True),
            Matrix("ffn.lin2", ("fc2",), d, f, layers, bias=True),
        ),
        {"embeddings": embedded * d, "norms": 2 * d * (1 + 2 * layers)},
    )


def _gpt2(model_type: str, config: Config) -> Architecture:
    """GPT-2: q, k and v are one matrix, c_attn."""
    d, layers, vocabulary = _size(config, "n_embd"), _size(config, "n_layer"), _size(config, "vocab_size")
    f = _size(config, "n_inner", 4 * d)
    return Architecture(
        model_type,
        (
            Matrix("attn.c_attn", ("q", "k", "v"), 3 * d, d, layers, bias=True),
            Matrix("attn.c_proj", ("o",), d, d, layers, bias=True),
            Matrix("mlp.c_fc", ("fc1",), f, d, layers, bias=True),
            Matrix("mlp.c_proj", ("fc2",), d, f, layers, bias=True),
        ),
        {
            "embeddings": (vocabulary + _size(config, "n_positions")) * d,
            "norms": 2 * d * (1 + 2 * layers),
            "output layer": _untied(config, vocabulary * d, tied_by_default=True),
        },
    )


def _opt(model_type: str, config: Config) -> Architecture:
    """OPT: its smallest embedding may be narrower than the model, with projections in and out."""
    d, f, layers = _size(config, "hidden_size"), _size(config, "ffn_dim"), _size(config, "num_hidden_layers")
    vocabulary, width = _size(config, "vocab_size"), _size(config, "word_embed_proj_dim", d)
    bias = bool(config.get("enable_bias", True))
    last_norm = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
    norm = 2 * d if config.get("layer_norm_elementwise_affine", True) else 0
    attention = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o"))
    return Architecture(
        model_type,
        (
            *(Matrix(f"self_attn.{name}", (part,), d, d, layers, bias=bias) for name, part in attention),
            Matrix("fc1", ("fc1",), f, d, layers, bias=bias),
            Matrix("fc2", ("fc2",), d, f, layers, bias=bias),
        ),
        {
            # Two position embeddings more than positions: the padding offset.
            "embeddings": vocabulary * width + (_size(config, "max_position_embeddings") + 2) * d,
            "projections of the embedding": 0 if width == d else 2 * width * d,
            "norms": norm * (2 * layers + bool(last_norm)),
            "output layer": _untied(config, vocabulary * width, tied_by_default=True),
        },
    )


@dataclass(frozen=True)
class _Decoder:
    """Differences of a family of the Llama kind from Llama, where its configuration does not say."""

    tied: bool = False
    head_dim: int | None = None
    qkv_bias: bool | str = "attention_bias"
    o_bias: bool | str = "attention_bias"
    ffn_bias: bool | str = False
    head_norms: bool = False
    norms_per_layer: int = 2
    mixture: bool = False
    expert_width: str = "moe_intermediate_size"
    shared_expert: bool = False

    def __call__(self, model_type: str, config: Config) -> Architecture:
        d, layers, vocabulary = (_size(config, n) for n in ("hidden_size", "num_hidden_layers", "vocab_size"))
        heads = _size(config, "num_attention_heads")
        head_dim = _size(config, "head_dim", self.head_dim or d // heads)
        groups = _size(config, "num_key_value_heads", heads)
        q_bias, o_bias = _flag(config, self.qkv_bias), _flag(config, self.o_bias)
        experts = _experts(config) if self.mixture else 0
        sparse = _sparse_layers(config, layers) if experts else 0
        ffn, router = self._ffn(config, d, layers - sparse, sparse, experts)
        return Architecture(
            model_type,
            (
                Matrix("self_attn.q_proj", ("q",), heads * head_dim, d, layers, bias=q_bias),
                Matrix("self_attn.k_proj", ("k",), groups * head_dim, d, layers, bias=q_bias),
                Matrix("self_attn.v_proj", ("v",), groups * head_dim, d, layers, bias=q_bias),
                Matrix("self_attn.o_proj", ("o",), d, heads * head_dim, layers, bias=o_bias),
                *ffn,
            ),
            {
                "embeddings": vocabulary * d,
                "norms": d * (1 + self.norms_per_layer * layers) + 2 * head_dim * layers * self.head_norms,
                "router": router,
                "output layer": _untied(config, vocabulary * d, tied_by_default=self.tied),
            },
        )

    def _ffn(self, config: Config, d: int, dense: int, sparse: int, experts: int) -> tuple[list[Matrix], int]:
        """The FFN matrices of ``dense`` plain and ``sparse`` mixture layers, and the parameters that route tokens."""
        matrices, router = [], 0
        if dense:
            matrices += _gated_ffn("mlp", d, _size(config, "intermediate_size"), dense, _flag(config, self.ffn_bias))
        if sparse:
            width = _size(config, self.expert_width)
            router = sparse * experts * d
            # One tensor (experts, 2·width, d) holds the gate and up projections of all experts.
            matrices += [
                Matrix("mlp.experts.gate_up_proj", ("gate", "up"), 2 * width, d, sparse * experts),
                Matrix("mlp.experts.down_proj", ("down",), d, width, sparse * experts),
            ]
            if self.shared_expert:
                shared = _size(config, "shared_expert_intermediate_size")
                matrices += _gated_ffn("mlp.shared_expert", d, shared, sparse, False)
                router += sparse * d
        return matrices, router


def _gated_ffn(prefix: str, d: int, f: int, count: int, bias: bool) -> list[Matrix]:
    return [
        Matrix(f"{prefix}.gate_proj", ("gate",), f, d, count, bias=bias),
        Matrix(f"{prefix}.up_proj", ("up",), f, d, count, bias=bias),
        Matrix(f"{prefix}.down_proj", ("down",), d, f, count, bias=bias),
    ]


def _experts(config: Config) -> int:
    """Experts a layer. The field changed its name over the years; 0 means that no layer is a mixture."""
    name = "num_local_experts" if config.get("num_local_experts") is not None else "num_experts"
    return 0 if config.get(name) == 0 else _size(config, name)


def _sparse_layers(config: Config, layers: int) -> int:
    """Return the count of layers with experts: all but those that the configuration names or steps over."""
    step, dense = _size(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise InputError(
            f"the model's configuration needs a list of layers as 'mlp_only_layers', got {reprlib.repr(dense)}"
        )
    dense = frozenset(dense)
    return sum(1 for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)


def _flag(config: Config, value: bool | str) -> bool:
    """A fixed answer, or that of the configuration field of this name (``qkv_bias`` is true where it is absent)."""
    return value if isinstance(value, bool) else bool(config.get(value, value == "qkv_bias"))


def _untied(config: Config, parameters: int, *, tied_by_default: bool) -> int:
    """Parameters of the output layer that the embedding does not already hold."""
    tied = config.get("tie_word_embeddings")
    return 0 if (tied_by_default if tied is None else tied) else parameters


FAMILIES: dict[str, Callable[[str, Config], Architecture]] = {
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _Decoder(ffn_bias="mlp_bias"),
    "mistral": _Decoder(qkv_bias=False, o_bias=False),
    "qwen2": _Decoder(qkv_bias=True, o_bias=False),
    "qwen3": _Decoder(head_dim=128, head_norms=True),
    "gemma": _Decoder(tied=True, head_dim=256),
    "gemma2": _Decoder(tied=True, head_dim=256, norms_per_layer=4),
    "gemma3_text": _Decoder(tied=True, head_dim=256, head_norms=True, norms_per_layer=4),
    "mixtral": _Decoder(qkv_bias=False, o_bias=False, mixture=True, expert_width="intermediate_size"),
    "qwen2_moe": _Decoder(qkv_bias="qkv_bias", o_bias=False, mixture=True, shared_expert=True),
    "qwen3_moe": _Decoder(head_norms=True, mixture=True),
}
"""``model_type`` of a configuration → what reads it."""


def _bert_shape(d: int, layers: int) -> Config:
    return {
        "model_type": "bert",
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_size": d,
        "intermediate_size": 4 * d,
        "num_hidden_layers": layers,
        "num_attention_heads": d // 64,
    }


def _gpt2_shape(d: int, layers: int) -> Config:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": d,
        "n_layer": layers,
        "n_head": d // 64,
    }


def _llama_shape(d: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int = 32000) -> Config:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": d,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": False,
    }


SHAPES: dict[str, Config] = {
    "bert-base": _bert_shape(768, 12),
    "bert-large": _bert_shape(1024, 24),
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "dim": 768,
        "hidden_dim": 3072,
        "n_layers": 6,
        "n_heads": 12,
    },
    "gpt2": _gpt2_shape(768, 12),
    "gpt2-medium": _gpt2_shape(1024, 24),
    "llama-7b": _llama_shape(4096, 11008, 32, 32, 32),
    "llama-13b": _llama_shape(5120, 13824, 40, 40, 40),
    "llama-70b": _llama_shape(8192, 28672, 80, 64, 8),
    "llama3-8b": _llama_shape(4096, 14336, 32, 32, 8, 128256),
}
"""Built-in configurations, for counting without a model at hand; llama-70b is Llama-2's, with 8 key-value heads."""


def lora_parameters(matrices: Sequence[Matrix], rank: int) -> int:
    """LoRA parameters of rank ``rank`` on every one of ``matrices``.

    Raises:
        InputError: ``rank`` below 1 or above the small side of a matrix, where factors hold more than the matrix.
    """
    if rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}")
    for matrix in matrices:
        if rank > matrix.largest_rank:
            raise InputError(
                f"rank {rank} is above the small side of {matrix.name} ({matrix.d_out} × {matrix.d_in}); "
                f"use at most {min(weight.largest_rank for weight in matrices)} for these targets"
            )
    return sum(matrix.lora_parameters(rank) for matrix in matrices)
