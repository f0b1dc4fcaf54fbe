"""Counts from a configuration against the models that transformers builds from it and the adapters that peft adds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from sparselora.errors import InputError
from sparselora.models.architectures import (
    FAMILIES,
    SHAPES,
    Architecture,
    architecture,
    lora_parameters,
    training_memory,
)

ROOT = Path(__file__).resolve().parents[2]

# Odd sizes on purpose: no two dimensions are equal by accident.
DECODER = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3}
GROUPED = {**DECODER, "num_attention_heads": 6, "num_key_value_heads": 2}
ENCODER = {**DECODER, "num_attention_heads": 4, "max_position_embeddings": 40, "type_vocab_size": 3}
OPT = {**DECODER, "ffn_dim": 112, "num_attention_heads": 4, "max_position_embeddings": 40}
QWEN_MOE = {**GROUPED, "num_experts": 5, "moe_intermediate_size": 20}

CONFIGS = {
    "bert": tf.BertConfig(**ENCODER),
    "roberta": tf.RobertaConfig(**ENCODER),
    "xlm-roberta": tf.XLMRobertaConfig(**ENCODER),
    "distilbert": tf.DistilBertConfig(dim=48, hidden_dim=112, n_layers=3, n_heads=4, vocab_size=101),
    "gpt2": tf.GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=101, n_positions=40),
    "gpt2 inner": tf.GPT2Config(n_embd=48, n_layer=3, n_head=4, n_inner=100, vocab_size=101, tie_word_embeddings=False),
    "opt": tf.OPTConfig(**OPT),
    "opt narrow": tf.OPTConfig(**OPT, word_embed_proj_dim=20, do_layer_norm_before=False),
    "opt plain": tf.OPTConfig(**OPT, enable_bias=False, layer_norm_elementwise_affine=False, tie_word_embeddings=False),
    "llama": tf.LlamaConfig(**DECODER, num_attention_heads=6),
    "llama grouped": tf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama wide": tf.LlamaConfig(**GROUPED, head_dim=32, attention_bias=True, mlp_bias=True),
    "mistral": tf.MistralConfig(**GROUPED, head_dim=16),
    "qwen2": tf.Qwen2Config(**GROUPED),
    "qwen2 tied": tf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": tf.Qwen3Config(**GROUPED),
    "qwen3 bias": tf.Qwen3Config(**GROUPED, head_dim=16, attention_bias=True),
    "gemma": tf.GemmaConfig(**GROUPED),
    "gemma2": tf.Gemma2Config(**GROUPED, head_dim=16),
    "gemma3_text": tf.Gemma3TextConfig(**GROUPED, head_dim=16),
    "mixtral": tf.MixtralConfig(**GROUPED, num_local_experts=5),
    "qwen2_moe": tf.Qwen2MoeConfig(**QWEN_MOE, shared_expert_intermediate_size=36),
    "qwen2_moe mixed": tf.Qwen2MoeConfig(
        **{**QWEN_MOE, "num_hidden_layers": 6},
        shared_expert_intermediate_size=36,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        qkv_bias=False,
    ),
    "qwen3_moe": tf.Qwen3MoeConfig(**QWEN_MOE, head_dim=16),
    "qwen3_moe mixed": tf.Qwen3MoeConfig(**QWEN_MOE, head_dim=16, mlp_only_layers=[0], tie_word_embeddings=True),
}
ENCODERS = {"bert", "roberta", "xlm-roberta", "distilbert"}


def _build(config: tf.PretrainedConfig) -> torch.nn.Module:
    auto = tf.AutoModel if config.model_type in ENCODERS else tf.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    model.tie_weights()
    return model


def _read(config: tf.PretrainedConfig) -> Architecture:
    return architecture(config.to_dict())


def _layers(model: torch.nn.Module) -> torch.nn.Module:
    """The layers alone, without a configuration: peft then adapts the modules as they are."""
    inner = getattr(model, "model", getattr(model, "transformer", model))
    for path in ("layers", "layer", "h", "encoder.layer", "decoder.layers", "transformer.layer"):
        try:
            return torch.nn.ModuleDict({"layers": inner.get_submodule(path)})
        except AttributeError:
            continue
    raise AssertionError("no layers found")


def _peft_parameters(model: torch.nn.Module, names: list[str], rank: int) -> int:
    """What peft itself trains when it adapts the modules (or expert tensors) of these names."""
    experts = [name for name in names if ".experts." in name]
    linear = [rf".*\.\d+\.{name.replace('.', chr(92) + '.')}" for name in names if name not in experts]
    config = LoraConfig(
        r=rank,
        target_modules="|".join(linear) if linear else None,
        target_parameters=experts or None,
        fan_in_fan_out=False,
    )
    with torch.device("meta"):
        adapted = get_peft_model(_layers(model), config)
    return adapted.get_nb_trainable_parameters()[0]


def test_every_family_is_tested():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_counts_equal_the_built_model(name):
    config = CONFIGS[name]
    model, read = _build(config), _read(config)
    assert read.model_parameters() == sum(p.numel() for p in model.parameters())
    attention = [m.name for m in read.matrices if set(m.parts) <= set("qkvo")]
    counted = sum(
        p.numel()
        for key, p in model.named_parameters()
        if any(f".{n}.weight" in key or f".{n}.bias" in key for n in attention)
    )
    assert read.attention_parameters() == counted > 0


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_lora_counts_equal_peft(name):
    config = CONFIGS[name]
    read = _read(config)
    for targets in (["q", "v"], read.targets()):
        matrices = read.resolve(targets)
        wanted = _peft_parameters(_build(config), [matrix.name for matrix in matrices], 3)
        assert lora_parameters(matrices, 3) == wanted, targets


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("bert-base", 109_482_240),
        ("bert-large", 335_141_888),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-70b", 68_976_648_192),
    ],
)
def test_built_in_shapes_have_their_published_sizes(shape, parameters):
    assert architecture(SHAPES[shape]).model_parameters() == parameters


def test_built_in_shapes_equal_the_built_models():
    for shape in SHAPES.values():
        config = tf.AutoConfig.for_model(**shape)
        assert architecture(shape).model_parameters() == sum(p.numel() for p in _build(config).parameters())


def test_known_adapters():
    llama, large = (architecture(SHAPES[name]) for name in ("llama-7b", "llama-70b"))
    assert lora_parameters(llama.resolve(["q", "v"]), 16) == 8_388_608
    assert llama.attention_parameters() == 32 * 4 * 4096**2
    # Grouped heads: v is 1024 × 8192. Counting it as square would give 41,943,040.
    assert lora_parameters(large.resolve(["q", "v"]), 16) == 80 * 16 * (8192 + 8192 + 8192 + 1024)
    assert lora_parameters(architecture(SHAPES["gpt2"]).resolve(["q", "v"]), 8) == 12 * 8 * (768 + 3 * 768)


def test_real_configurations(minilm, shared):
    for folder in (minilm, shared / "models" / "storyllama-20m"):
        config = tf.AutoConfig.from_pretrained(folder)
        assert _read(config).model_parameters() == sum(p.numel() for p in _build(config).parameters())


def test_a_fused_matrix_has_one_adapter_whichever_part_is_asked_for():
    read = architecture(SHAPES["gpt2"])
    assert read.resolve(["q"]) == read.resolve(["v", "k"]) == read.resolve(["q", "q", "k"])
    assert [matrix.name for matrix in read.resolve(["q", "o"])] == ["attn.c_attn", "attn.c_proj"]


def test_unknown_names_are_refused_with_what_is_known():
    with pytest.raises(InputError, match=r"'bertt'.*did you mean 'bert'.*distilbert"):
        architecture({"model_type": "bertt"})
    with pytest.raises(InputError, match="unknown architecture ''"):
        architecture({})
    with pytest.raises(InputError, match=r"'gate' .*bert has: q k v o fc1 fc2"):
        architecture(SHAPES["bert-base"]).resolve(["q", "gate"])
    with pytest.raises(InputError, match="no target"):
        architecture(SHAPES["bert-base"]).resolve([])


@pytest.mark.parametrize("value", [None, 0, -3, 2.5, "768", True])
def test_a_broken_configuration_names_its_field(value):
    with pytest.raises(InputError, match="'hidden_size'"):
        architecture({**SHAPES["bert-base"], "hidden_size": value})


def test_the_number_of_experts_goes_by_two_names():
    config = {**CONFIGS["qwen3_moe"].to_dict()}
    experts = config.pop("num_local_experts")
    assert architecture({**config, "num_experts": experts}) == _read(CONFIGS["qwen3_moe"])
    dense = architecture({**config, "num_experts": 0})
    assert [matrix.name for matrix in dense.resolve(["down"])] == ["mlp.down_proj"]
    with pytest.raises(InputError, match="'num_experts'"):
        architecture(config)


def test_ranks_without_sense_are_refused():
    matrices = _read(CONFIGS["llama grouped"]).resolve(["q", "v"])
    assert lora_parameters(matrices, 16) > 0
    with pytest.raises(InputError, match=r"rank 17 .*v_proj \(16 × 48\); use at most 16"):
        lora_parameters(matrices, 17)
    with pytest.raises(InputError, match="at least 1"):
        lora_parameters(matrices, 0)


def test_training_memory_is_what_torch_holds():
    """Parameters, gradients and AdamW's moments of a real layer, float32 and bfloat16."""
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        layer = torch.nn.Linear(40, 30, dtype=dtype)
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(2, 40, dtype=dtype)).sum().backward()
        optimizer.step()
        moments = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
        held = training_memory(40 * 30 + 30, size)
        assert held.parameters == sum(p.numel() * p.element_size() for p in layer.parameters())
        assert held.gradients == sum(p.grad.numel() * p.grad.element_size() for p in layer.parameters())
        assert held.optimizer == sum(t.numel() * t.element_size() for t in moments)
        assert held.total == 4 * held.parameters
    assert training_memory(10, 2, optimizer_bytes=12).optimizer == 120
    assert training_memory(1000, 0.5).parameters == 500


def test_counting_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from sparselora.models.architectures import *; architecture(SHAPES['gpt2']).model_parameters()\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
