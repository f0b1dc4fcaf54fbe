"""What sparsify proves of a model before it trains it: an equal training step, or a refusal that names the reason."""

from __future__ import annotations

import dataclasses
import functools
import random
import types
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual import decoder
from sparselora.contextual.handle import sparsify
from sparselora.contextual.proof import (
    disproof,
    failure,
    head_disproof,
    ordinary_tokens,
    relative_difference,
    repeated,
    trial_batch,
    undisturbed,
)
from sparselora.contextual.structure import attention_disproof, find_blocks
from sparselora.errors import InputError
from tests.helpers.contextual_models import SIZES, exact_loss, masked, ragged

DENSE = SparsityConfig(mode="dense")
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                       "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
HEADS = {name: size for name, size in SMALL.items() if name != "num_key_value_heads"}
BERT = HEADS | {"num_labels": 3}

SUPPORTED: dict[str, dict[str, Any]] = {
    "llama": SMALL, "mistral": SMALL, "qwen2": SMALL, "qwen3": SMALL | {"head_dim": 8},
    "gemma": SMALL | {"head_dim": 8},
    "gemma2": SMALL | {"head_dim": 8}, "gemma3_text": SMALL | {"head_dim": 8}, "gpt2": GPT, "phi": SMALL,
    "cohere": SMALL, "cohere2": SMALL, "granite": SMALL | {"logits_scaling": 4.0}, "starcoder2": SMALL, "olmo": SMALL,
    "olmo2": SMALL, "olmo3": SMALL, "stablelm": SMALL, "nemotron": SMALL, "helium": SMALL | {"head_dim": 8},
    "gptj": GPT | {"rotary_dim": 4}, "smollm3": SMALL | {"num_hidden_layers": 4}, "ernie4_5": SMALL,
    "exaone4": SMALL, "apertus": SMALL, "seed_oss": SMALL | {"head_dim": 8}, "arcee": SMALL,
    "nanochat": SMALL, "vaultgemma": SMALL | {"head_dim": 8}, "hyperclovax": SMALL,
    "ministral3": SMALL | {"head_dim": 8},
    "bert": BERT, "roberta": BERT, "electra": BERT | {"embedding_size": 32}, "mpnet": BERT, "xlm-roberta": BERT,
    "deberta-v2": BERT, "nomic_bert": BERT, "eurobert": BERT,
    "distilbert": {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "num_labels": 3},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "glm": (SMALL | {"head_dim": 8}, r"FFN of model\.layers\.0 .* mlp\.gate_up_proj computes gate and up in one"),
    "glm4": (SMALL | {"head_dim": 8}, r"FFN of model\.layers\.0 .* mlp\.gate_up_proj computes gate and up in one"),
    "phi3": (SMALL, r"FFN of model\.layers\.0 .* mlp\.gate_up_proj computes gate and up in one"),
    "modernbert": (BERT | {"local_attention": 8}, r"FFN of model\.layers\.0 .* mlp\.Wi computes gate and up in one"),
    "mpt": ({"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
            r"FFN of transformer\.blocks\.0 .*MptMLP does not compute .*TypeError"),
    "bloom": ({"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}, r"BloomMLP has no activation"),
    "gpt_neox": (HEADS, r"order inside it could not be proved \(are heads interleaved"),
    "persimmon": (HEADS, r"order inside it could not be proved \(are heads interleaved"),
    "codegen": (GPT | {"rotary_dim": 4}, r"order inside it could not be proved \(are heads interleaved"),
    "falcon": ({"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
               r"order of q, k and v inside query_key_value could not be proved"),
    "gpt_bigcode": (GPT | {"multi_query": False}, r"order inside it could not be proved \(are heads interleaved"),
    "albert": (BERT | {"embedding_size": 32}, r"AlbertLayer does not compute"),
    "opt": ({"vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "word_embed_proj_dim": 32}, r"fc1 and fc2 have no own module"),
    "mixtral": (SMALL | {"num_local_experts": 4}, r"wanted one up and one down"),
    "qwen3_moe": (SMALL | {"num_experts": 4, "head_dim": 8}, r"wanted one up and one down"),
    "roberta-prelayernorm": (BERT, r"RobertaPreLayerNormIntermediate does not compute"),
}  # fmt: skip


def built(kind: str, settings: dict[str, Any], dropout: float) -> nn.Module:
    """A small random model, every dropout of its configuration set to ``dropout``, frozen, in training mode."""
    plain = tf.AutoConfig.for_model(kind).to_dict()
    drops = {name: dropout for name, value in plain.items() if "drop" in name and isinstance(value, float)}
    config = tf.AutoConfig.for_model(kind, **settings, **drops)
    torch.manual_seed(0)
    classifies = "num_labels" in settings
    auto = tf.AutoModelForSequenceClassification if classifies else tf.AutoModelForCausalLM
    return with_noise(auto.from_config(config))


def with_noise(model: nn.Module) -> nn.Module:
    """The model frozen, in training mode, no norm or bias trivial; the padding token's embedding stays zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if not (parameter.dim() == 2 and not parameter[0].any()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.train()


def adapted(model: nn.Module, task: str = "CAUSAL_LM", **more: Any) -> nn.Module:
    """With random LoRA factors on all linear layers but a classifier's."""
    if task == "SEQ_CLS":
        more |= {"exclude_modules": ["classifier", "pre_classifier"]}
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type=task, **more))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return peft_model.train()


def padded(model: nn.Module) -> dict[str, torch.Tensor]:
    """Three rows of 11, 8 and 6 tokens, padded right; the prompt is not labelled."""
    ids = torch.randint(4, 90, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 8:], mask[2, 6:] = 0, 0
    ids[mask == 0] = 0
    if getattr(model.config, "problem_type", None) or type(model).__name__.endswith("SequenceClassification"):
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Loss and LoRA gradients of one training step, from one seed."""
    torch.manual_seed(7)
    loss = model(**batch).loss
    factors = [p for name, p in model.named_parameters() if "lora_" in name and p.requires_grad]
    gradients = torch.autograd.grad(loss, factors, allow_unused=True)
    return [loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])]


def assert_dense_is_plain(model: nn.Module, batch: dict[str, torch.Tensor], limit: float = 1e-4) -> Any:
    plain = step(model, batch)
    assert float(plain[1].abs().max()) > 1e-5
    handle = sparsify(model, DENSE)
    ours = step(model, batch)
    handle.remove()
    assert relative_difference(plain, ours) < limit
    return handle


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_training_step_with_dropout_is_the_models_own(kind, dropout, tmp_path):
    base = built(kind, SUPPORTED[kind], dropout)
    batch = padded(base)
    model = adapted(base, "SEQ_CLS" if batch["labels"].dim() == 1 else "CAUSAL_LM")
    assert_dense_is_plain(model, batch)
    if not dropout:
        return
    for mode in ("svd", "skip", "static", "surrogate"):
        attention = 0.0 if mode == "skip" else 0.5
        config = SparsityConfig(mode=mode, ffn_sparsity=0.5, attention_sparsity=attention, svd_rank=4, surrogate_rank=4)
        handle = sparsify(model, config, calibration=[batch], cache_dir=tmp_path)
        loss, gradients = step(model, batch)
        assert loss.isfinite()
        assert gradients.isfinite().all()
        assert len(handle.choices()) == len(handle.report) * (2 if attention else 1)
        handle.remove()


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_of_another_structure_is_refused_by_name(kind):
    settings, message = REFUSED[kind]
    base = built(kind, settings, 0.1)
    with pytest.raises(InputError, match=message):
        sparsify(base, DENSE)


def test_attention_that_is_no_mixture_of_heads_is_dense_or_refused():
    base = built("diffllama", SMALL, 0.0)
    sparsify(base, DENSE).remove()
    with pytest.raises(InputError, match=r"attention sparsity of model\.layers\.0 is not supported: .*q_proj"):
        sparsify(base, SparsityConfig(mode="random", attention_sparsity=0.5))


# --- the output layer ------------------------------------------------------------------------------------------------


def _scaled(logits, hidden):
    return logits * 0.0625


def _capped(logits, hidden):
    return 30 * torch.tanh(logits / 30)


def _clamped(logits, hidden):
    return logits.clamp(-50, 50)


def _tempered_by_its_hidden_state(logits, hidden):
    return logits / (1 + hidden.square().mean(dim=-1, keepdim=True))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("change", [_scaled, _capped, _clamped, _tempered_by_its_hidden_state])
def test_whatever_happens_to_logits_afterwards_is_kept(kind, change):
    """On a model whose padding row is zero, and whose logits are too small for a cap to show."""
    base = built(kind, SUPPORTED[kind], 0.0)
    inner = type(base).forward

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
        logits = change(self.lm_head(hidden), hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return tf.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    with undisturbed(base):
        assert head_disproof(base, base.lm_head) is None  # the control
    type(base).forward = forward
    try:
        with undisturbed(base):
            assert "relative difference" in head_disproof(base, base.lm_head)
        handle = assert_dense_is_plain(adapted(base), padded(base))
        assert not handle.packed
    finally:
        type(base).forward = inner


def test_what_stands_before_the_output_layer_or_in_the_loss_is_kept():
    base = built("llama", SMALL, 0.0)
    base.lm_head.register_forward_pre_hook(lambda _, args: (args[0] / 8,))  # as in MiniCPM
    assert not assert_dense_is_plain(adapted(base), padded(base)).packed
    base = built("llama", SMALL, 0.0)
    base.loss_function = lambda logits, labels, vocab_size, **_: F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.3
    )
    assert_dense_is_plain(adapted(base), padded(base))


def test_ordinary_tokens_are_neither_special_nor_zero():
    base = built("cohere", SMALL, 0.0)
    base.config.image_token_id = 17
    base.model.embed_tokens.weight[20:60] = 0
    tokens = ordinary_tokens(base, 96)
    assert sorted(tokens.tolist()) == [t for t in range(3, 96) if t != 17 and not 20 <= t < 60]
    base.model.embed_tokens.weight.zero_()
    with pytest.raises(InputError, match="no token but special ones"):
        sparsify(base, DENSE)


# --- feed-forward networks -------------------------------------------------------------------------------------------


def _odd_mlp(kind: str):
    """Forwards of a Llama's MLP that differ from down(act(gate) · up) in one thing."""

    def hidden(self, x):
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def drop(x, self, p):
        return F.dropout(x, p, self.training)

    return {
        "after down": lambda self, x: drop(self.down_proj(hidden(self, x)), self, self.residual_dropout),
        "on hidden": lambda self, x: drop(hidden(self, x), self, self.residual_dropout) @ self.down_proj.weight.t(),
        "swapped": lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x)),
        "on input": lambda self, x: self.down_proj(hidden(self, drop(x, self, self.residual_dropout))),
        "hidden number": lambda self, x: self.down_proj(drop(hidden(self, x), self, 0.2)),
        "clipped": lambda self, x: self.down_proj(hidden(self, x).clamp(-0.05, 0.05)),
        "failing": lambda self, x: x.view(7, -1),
        "asks for more": lambda self, x, residual: residual + self.down_proj(hidden(self, x)),
    }[kind]


@pytest.mark.parametrize("kind", ["after down", "swapped"])
def test_an_odd_ffn_that_can_be_repeated_is(kind):
    base = built("llama", SMALL, 0.0)
    for layer in base.model.layers:
        layer.mlp.residual_dropout = 0.4
        layer.mlp.forward = types.MethodType(_odd_mlp(kind), layer.mlp)
    model, batch = adapted(base), padded(base)
    handle = assert_dense_is_plain(model, batch)
    assert not handle.packed or kind == "swapped"
    if kind == "after down":  # the control: there is dropout in it
        handle = sparsify(model, DENSE)
        assert len({round(float(model(**batch).loss.detach()), 6) for _ in range(4)}) == 4
        handle.remove()


@pytest.mark.parametrize("kind", ["on input", "hidden number", "clipped", "failing", "asks for more"])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_odd_ffn_that_cannot_be_repeated_is_refused_by_name(kind, layer):
    base = built("llama", SMALL, 0.0)
    mlp = base.model.layers[layer].mlp
    mlp.residual_dropout = 0.4
    mlp.forward = types.MethodType(_odd_mlp(kind), mlp)
    model = adapted(base)
    with pytest.raises(InputError, match=rf"FFN of model\.layers\.{layer} .*LlamaMLP does not compute"):
        sparsify(model, DENSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropout_on_the_hidden_channels_of_a_decoder_is_drawn_as_the_model_draws_it(kind):
    class Dropped(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.act, self.dropout = act, nn.Dropout(0.3)
            self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x):
            return self.down(self.dropout(self.act(self.up(x))))

    base = built(kind, SUPPORTED[kind], 0.0)
    torch.manual_seed(4)
    for layer in base.model.layers if kind == "llama" else base.transformer.h:
        layer.mlp = Dropped(nn.GELU())
    model = adapted(with_noise(base))
    handle = assert_dense_is_plain(model, padded(base))
    assert not handle.packed


def t5(dropout: float) -> nn.Module:
    config = tf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=dropout,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return with_noise(tf.T5ForConditionalGeneration(config))


@pytest.mark.parametrize("mode", ["dense", "svd", "static", "surrogate"])
def test_t5_has_a_sparse_encoder_and_says_so(mode, tmp_path):
    base = t5(0.3)
    model, batch = adapted(base, "SEQ_2_SEQ_LM"), padded(base)
    assert_dense_is_plain(model, batch)
    config = SparsityConfig(mode=mode, svd_rank=4, surrogate_rank=4)
    if mode == "dense":
        return
    config = config.replace(ffn_sparsity=0.5, attention_sparsity=0.5)
    with pytest.warns(UserWarning, match=r"only the blocks of encoder\.block are sparse"):
        handle = sparsify(model, config, calibration=[batch], cache_dir=tmp_path)
    step(model, batch)
    assert set(handle.choices()) == {(layer, part) for layer in (0, 1) for part in ("ffn", "attention")}
    handle.remove()


# --- attention -------------------------------------------------------------------------------------------------------


def test_q_k_and_v_are_told_by_what_reaches_the_output_projection():
    for kind in ("gpt2", "llama", "bert", "olmo2", "gemma3_text"):
        structure = find_blocks(built(kind, SUPPORTED[kind], 0.2))
        assert all(attention_disproof(structure, block) is None for block in structure.blocks)
        heads = structure.blocks[0].attention
        wrong = [
            dataclasses.replace(heads, heads=heads.heads * 2, kv_heads=heads.kv_heads * 2, head_dim=heads.head_dim // 2)
        ]
        if not heads.fused:
            wrong.append(dataclasses.replace(heads, k=heads.v, v=heads.k))
            wrong.append(dataclasses.replace(heads, q=heads.k, k=heads.q, kv_heads=heads.heads))
        for other in wrong:
            assert attention_disproof(structure, dataclasses.replace(structure.blocks[0], attention=other)), other


def test_the_packed_pass_knows_layers_without_rotation_and_queries_that_grow_with_their_position():
    """Neither shows in the loss of a model that is hardly trained, or in a short text: each attention is tried."""
    assert sparsify(built("smollm3", SMALL | {"num_hidden_layers": 3}, 0.0), DENSE).packed  # all layers rotate
    assert not sparsify(built("smollm3", SMALL | {"num_hidden_layers": 4}, 0.0), DENSE).packed
    yarn = {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0,
    }  # fmt: skip
    sizes = SMALL | {"head_dim": 8}
    for beta in (0.0, 0.5):
        scaled = built("ministral3", sizes | {"rope_parameters": yarn | {"llama_4_scaling_beta": beta}}, 0.0)
        assert sparsify(scaled, DENSE).packed == (beta == 0)


@pytest.mark.parametrize("mode", ["svd", "oracle", "random", "static"])
@pytest.mark.parametrize("rows", [1, 3])
def test_debertas_relative_positions_are_not_taken_for_tokens(mode, rows, tmp_path):
    """Against hand-made masks in float64; with one row of 16 tokens, the positions have the shape of the batch."""
    config = tf.DebertaV2Config(
        **(SIZES | {"attn_implementation": "eager"}), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=3, relative_attention=True, position_buckets=8, share_att_key=True, pos_att_type=["p2c", "c2p"],
        max_relative_positions=16, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    base = with_noise(tf.DebertaV2ForSequenceClassification(config))
    model = adapted(base, "SEQ_CLS").double()
    batch = {name: x[:rows] for name, x in ragged("bert").items()}
    if rows == 1:
        ids = torch.randint(2, 64, (1, 16), generator=torch.Generator().manual_seed(5))
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert base.deberta.encoder.rel_embeddings.weight.shape[0] == 16
    sparse = SparsityConfig(mode=mode, ffn_sparsity=0.5, attention_sparsity=0.5, svd_rank=4)
    handle = sparsify(model, sparse, calibration=[batch], cache_dir=tmp_path)
    ours = exact_loss(model, batch)
    choices = handle.choices()
    handle.remove()
    assert len(choices) == 6
    with masked(model, batch, choices):
        torch.testing.assert_close(ours, exact_loss(model, batch), rtol=0, atol=1e-10)
    assert abs(float((ours - exact_loss(model, batch)).detach())) > 1e-7


# --- adapters and partitioned weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.AdaLoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", total_step=10), "adalora"),
        (peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), "vera"),
        (peft.LoHaConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM"), "loha"),
        (peft.LoKrConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM"), "lokr"),
        (peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"), "oft"),
        (peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                        task_type="CAUSAL_LM"), "ia3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_adapters_of_other_kinds_are_refused_by_name(config, kind):
    model = get_peft_model(built("llama", SMALL, 0.0), config)
    with pytest.raises(InputError, match=rf"layers\.0\..*_proj has an adapter of the kind {kind}\.\w+"):
        sparsify(model, DENSE)


def test_weights_that_are_in_parts_are_refused_by_the_name_of_who_parted_them():
    base = built("llama", SMALL, 0.0)
    weight = base.model.layers[1].mlp.up_proj.weight
    weight.data = torch.empty(0)
    weight.ds_id = 3
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj is partitioned by DeepSpeed ZeRO-3 .*initialize"):
        sparsify(base, DENSE)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_fully_shard_after_sparsify_is_exact(kind, one_process):
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=one_process)
        fully_shard(model, mesh=one_process)

    base = built(kind, SUPPORTED[kind], 0.0)
    model, batch = adapted(base), padded(base)
    loss = model(**batch).loss
    loss.backward()
    factors = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sparsify(model, DENSE)
    shard(model)
    ours = model(**batch).loss
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in factors:
            torch.testing.assert_close(parameter.grad.full_tensor(), factors[name], rtol=1e-4, atol=1e-6)


# --- the prover ------------------------------------------------------------------------------------------------------


def test_a_proof_leaves_no_trace():
    base = built("starcoder2", SMALL, 0.3)
    model = adapted(base, lora_dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.eval()
    base.model.layers[0].mlp.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None

    def state():
        return (
            [module.training for module in model.modules()],
            [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            [None if p.grad is None else float(p.grad.sum()) for p in model.parameters()],
            [float(p.double().sum()) for p in model.parameters()],
            [module.p for module in model.modules() if isinstance(module, nn.Dropout)],
            [vars(module).get("residual_dropout") for module in model.modules()],
            torch.get_rng_state().tolist(),
            random.getstate(),
        )

    before = state()
    handle = sparsify(model, DENSE)
    handle.remove()
    assert state() == before
    for layer in base.model.layers:
        layer.mlp.forward = types.MethodType(_odd_mlp("failing"), layer.mlp)
    before = state()
    with pytest.raises(InputError):
        sparsify(model, DENSE)
    assert state() == before


def test_a_disproof_is_relative_and_an_exception_is_one():
    x = torch.randn(3, 4)
    assert disproof(lambda: [1e-6 * x], lambda: [1.0001e-6 * x], 1e-3) is None
    assert "1.0e-02" in disproof(lambda: [1e-6 * x], lambda: [1.01e-6 * x], 1e-3)
    assert "inf" in disproof(lambda: [x], lambda: [x * float("nan")], 1e-3)
    assert "inf" in disproof(lambda: [x], lambda: [x[:2]], 1e-3)
    assert "inf" in disproof(lambda: [x], list, 1e-3)
    assert "KeyError: 'a'" in disproof(lambda: [x], lambda: [{}["a"]], 1e-3)
    same = disproof(lambda: [torch.rand(3)], lambda: [torch.rand(3)], 0.0)  # from one seed
    assert same is None
    with pytest.raises(torch.OutOfMemoryError):
        disproof(lambda: [x], lambda: (_ for _ in ()).throw(torch.OutOfMemoryError()), 1e-3)


def test_a_failure_is_an_exception_and_no_result():
    assert failure(lambda: [torch.tensor(float("nan"))]) is None
    assert "KeyError: 'a'" in failure(lambda: [{}["a"]])
    for error in (InputError("no"), torch.OutOfMemoryError()):
        with pytest.raises(type(error)):
            failure(lambda error=error: (_ for _ in ()).throw(error))


def test_repeated_results_are_those_of_the_first_call_and_a_failure_is_none_of_them():
    x, values = torch.zeros(1), iter([RuntimeError("once"), 1.0, 2.0])

    def run():
        value = next(values)
        if isinstance(value, Exception):
            raise value
        return [x + value]

    reference = repeated(run)
    assert "RuntimeError: once" in disproof(reference, lambda: [x + 1], 0.0)
    assert disproof(reference, lambda: [x + 1], 0.0) is None
    assert "relative difference" in disproof(reference, lambda: [x + 2], 0.0)  # not the second value of `run`


@pytest.mark.parametrize("mode", ["dense", "static"])
def test_each_way_of_a_training_step_is_tried_once(mode, monkeypatch):
    """The model's own step, the same with its modules replaced, and with its backbone packed; in a sparse mode the last
    two are cheaper as well. The steps that do not call the model's forward have a loss of their own."""
    base = built("llama", SMALL, 0.0)
    config = DENSE if mode == "dense" else SparsityConfig(mode="static", ffn_sparsity=0.5, attention_sparsity=0.0)
    steps, losses = [], []
    own, packed = type(base).forward, decoder.PackedDecoder.loss

    @functools.wraps(own)
    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled() and kwargs.get("labels") is not None:
            steps.append(self)
        return own(self, *args, **kwargs)

    def loss(self, *args, **kwargs):
        losses.append(self)
        return packed(self, *args, **kwargs)

    monkeypatch.setattr(type(base), "forward", forward)
    monkeypatch.setattr(decoder.PackedDecoder, "loss", loss)
    batch = padded(base)
    handle = sparsify(adapted(base), config, calibration=[batch])
    assert handle.packed
    assert (len(steps), len(losses)) == ((3, 1) if mode == "dense" else (5, 2))


def test_a_trial_has_padding_on_both_sides_and_repeats():
    base = built("llama", SMALL, 0.0)
    batch = trial_batch(base)
    assert batch["attention_mask"].sum(dim=1).tolist() == [7, 6]
    assert (batch["labels"] == -100).sum(dim=1).tolist() == [3, 5]
    assert torch.equal(batch["input_ids"], trial_batch(base)["input_ids"])


@pytest.mark.filterwarnings("error:.*block by block")
def test_a_deep_model_in_bf16_stays_packed():
    """Rounding adds up over the layers: that is no other function. The control is a layer more, which is one."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=48, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).to(torch.bfloat16)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).train()
    handle = sparsify(adapted, SparsityConfig(mode="dense"))
    assert handle.packed
    handle.remove()
    layer = model.model.layers[20]
    layer.forward = lambda *args, **kwargs: 0.7 * type(layer).forward(layer, *args, **kwargs)
    with pytest.warns(UserWarning, match="block by block") as caught:
        sparsify(adapted, SparsityConfig(mode="dense"))
    assert "relative difference" in str(caught[0].message)


@pytest.mark.parametrize("factor", [1.0, 1.1])
@pytest.mark.filterwarnings("ignore:.*block by block")
def test_large_key_biases_in_bf16_are_rounding_and_another_scale_is_not(factor, monkeypatch):
    """Qwen2.5 has biases of 145 in its first layers: two right passes differ by 9 % in bfloat16."""
    model = built("qwen2", SMALL | {"num_hidden_layers": 2, "max_position_embeddings": 32768}, 0.0).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias
        bias.data.copy_(10_000 * torch.randn(bias.shape, generator=generator))
    model.model.layers[1].self_attn.scaling *= factor  # ours takes that of the first layer
    limits = []

    def recorded(reference, candidate, limit):
        limits.append(limit)
        return disproof(reference, candidate, limit)

    monkeypatch.setattr(decoder, "disproof", recorded)
    assert sparsify(model, DENSE).packed == (factor == 1.0)
    assert 1e-3 in limits  # bfloat16 alone would have refused both
