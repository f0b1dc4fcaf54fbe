"""A training pass that should be sparse is sparse, or says why not: other people's trainers, losses and copies."""

from __future__ import annotations

import copy
import functools
import inspect
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import Trainer

from sparselora.config.sparsity import SparsityConfig
from sparselora.config.token_gates import TokenGateConfig
from sparselora.contextual.handle import Handle, sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.trainers import SparsityCallback
from sparselora.errors import InputError
from sparselora.models.lora import lora_layers, mask_channels
from sparselora.token_gates.gates import attach_token_gates
from tests.contextual.test_contextual import SPARSE, assert_same, gradients
from tests.helpers.contextual_models import SIZES, exact_loss, masked, ragged, tiny
from tests.novelty.test_novelty_trainer import arguments, examples

SVD = SparsityConfig(mode="svd", **SPARSE)
CHOICES = {(0, "ffn"), (2, "ffn"), (1, "attention"), (2, "attention")}


def sparse(name: str, folder: Path, config: SparsityConfig = SVD) -> tuple[nn.Module, dict[str, Any], Handle]:
    model = tiny(name)
    return model, ragged(name), sparsify(model, config, cache_dir=folder)


def layout_of(batch: dict[str, Any]) -> TokenLayout:
    return TokenLayout.build(batch["attention_mask"], batch["labels"])


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def replace_forward(model: Any) -> None:
    """What trainers with a fused loss do: a forward over the model's that calls the backbone past it."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def fused(
        self: Any,
        *args: Any,
        fused_loss: bool = False,
        labels: Any = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_loss:
            return original(*args, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
        hidden = getattr(self, self.base_model_prefix)(*args, **kwargs).last_hidden_state
        loss = mean_loss(self.get_output_embeddings()(hidden), labels)
        if num_items_in_batch is not None:
            loss = loss * (labels[:, 1:] != -100).sum() / num_items_in_batch
        return types.SimpleNamespace(loss=loss, fused=True)

    model.forward = types.MethodType(fused, model)


# --- a pass under a loss that is not the model's --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_logits_of_a_pass_with_a_layout_in_place_of_labels_are_sparse(name, tmp_path):
    """The trainer pops the labels, and computes the loss from the logits."""
    model, batch, handle = sparse(name, tmp_path)
    ours = mean_loss(model(**without_labels(batch), token_layout=layout_of(batch)).logits, batch["labels"])
    choices = handle.choices()
    handle.remove()
    assert set(choices) == CHOICES
    with masked(model, batch, choices):
        assert_same(ours, exact_loss(model, batch), model)
    assert abs(float((ours - exact_loss(model, batch)).detach())) > 1e-6  # the control: it is not the dense model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("first", ["sparsify", "trainer"])
def test_a_replaced_forward_with_its_own_loss_is_sparse_in_both_orders(name, first, tmp_path):
    model, batch = tiny(name), ragged(name)
    inner = model.get_base_model()
    if first == "trainer":
        replace_forward(inner)
    handle = sparsify(model, SVD, cache_dir=tmp_path)
    assert handle.packed == (name == "llama")
    if first == "sparsify":
        replace_forward(inner)
    handle.begin_step(0, 10)
    output = model(**batch, fused_loss=True)
    choices = handle.choices()
    assert output.fused
    assert set(choices) == CHOICES
    assert torch.allclose(model(**batch).loss.double(), output.loss, atol=1e-5)  # so is its way to our loss
    handle.remove()
    with masked(model, batch, choices):
        assert_same(output.loss, exact_loss(model, batch), model)
    dense = exact_loss(model, batch)
    assert torch.allclose(model(**batch, fused_loss=True).loss, dense)  # and removed, the trainer's forward stays
    assert abs(float((output.loss - dense).detach())) > 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_replaced_forward_that_nothing_steps_over_is_an_error(name, tmp_path):
    model, batch, _ = sparse(name, tmp_path)
    model(**batch).loss.backward()  # the control
    inner = model.get_base_model()
    backbone = getattr(inner, inner.base_model_prefix)

    def past(self: Any, labels: Any = None, **kwargs: Any) -> Any:
        return backbone(**kwargs)

    inner.forward = types.MethodType(past, inner)
    with pytest.raises(InputError, match=r"replaced after sparsify, by .*past.*SparsityCallback"):
        model(**batch)
    del inner.__dict__["forward"]
    with torch.no_grad():
        backbone(**{k: v for k, v in batch.items() if k != "labels"})  # as in generation
    inner.eval()
    backbone(**{k: v for k, v in batch.items() if k != "labels"})


def test_the_backbone_called_by_itself_in_training_is_an_error(tmp_path):
    for name in ("llama", "gpt2", "bert"):
        model, batch, handle = sparse(name, tmp_path)
        model(**batch)
        inner = model.get_base_model()
        with pytest.raises(InputError, match="called by itself"):
            getattr(inner, inner.base_model_prefix)(input_ids=batch["input_ids"])
        handle.remove()
        getattr(inner, inner.base_model_prefix)(input_ids=batch["input_ids"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_models_loss_function_is_kept(name, tmp_path):
    """A loss that was set on the model is not replaced by ours, and counts the items of an accumulated step."""
    model, batch, handle = sparse(name, tmp_path)
    plain = model(**batch).loss

    def doubled(logits: Any, labels: Any, vocab_size: int, num_items_in_batch: Any = None, **_: Any) -> torch.Tensor:
        shifted = labels[:, 1:]
        total = mean_loss(logits, labels) * (shifted != -100).sum()
        return 2 * total / num_items_in_batch

    model.get_base_model().loss_function = doubled
    n = layout_of(batch).n_output
    torch.testing.assert_close(model(**batch, num_items_in_batch=n).loss, 2 * plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(**batch, num_items_in_batch=5 * n).loss, 0.4 * plain, rtol=1e-6, atol=1e-6)
    assert handle.choices()
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_embeddings_in_place_of_ids_are_sparse(name, tmp_path):
    model, batch, handle = sparse(name, tmp_path)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    ours = model(inputs_embeds=embedded, **rest).loss
    choices = handle.choices()
    handle.remove()
    assert set(choices) == CHOICES
    with masked(model, batch, choices):
        assert_same(ours, exact_loss(model, batch), model, atol=1e-6)


def test_without_dense_output_tokens_no_labels_are_needed(tmp_path):
    config = SparsityConfig(mode="svd", dense_output_tokens=False, **SPARSE)
    model, batch, handle = sparse("llama", tmp_path, config)
    ours = mean_loss(model(**without_labels(batch)).logits, batch["labels"])
    choices = handle.choices()
    handle.remove()
    with masked(model, batch, choices, all_tokens=True):
        assert_same(ours, exact_loss(model, batch), model)


def test_blocks_in_evaluation_mode_take_part_in_a_training_pass(tmp_path):
    model, batch, handle = sparse("gpt2", tmp_path)
    expected = model(**batch).loss
    for block in model.get_base_model().transformer.h:
        block.eval()
    assert torch.equal(model(**batch).loss, expected)
    assert set(handle.choices()) == CHOICES


# --- what cannot be sparse says so -----------------------------------------------------------------------------------


def four_dimensional(batch: dict[str, Any]) -> dict[str, Any]:
    n = batch["input_ids"].shape[1]
    mask = torch.ones(n, n).tril().bool()[None, None] & batch["attention_mask"].bool()[:, None, None]
    return batch | {"attention_mask": mask}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (without_labels, "has no labels .*token_layout"),
        (lambda batch: without_labels(batch) | {"shift_labels": batch["labels"].roll(-1, 1)}, "has no labels"),
        (four_dimensional, r"attention_mask is of shape \(3, 1, 11, 11\), wanted \(batch, length\).*token_layout"),
        (lambda batch: batch | {"attention_mask": {"full_attention": None}}, "attention_mask is a dict"),
        (lambda batch: {"labels": batch["labels"]}, "neither input_ids nor inputs_embeds"),
        (lambda batch: batch | {"past_key_values": tf.DynamicCache()}, "past_key_values .prefix tuning"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_hides_the_context_is_named(name, change, cause, tmp_path):
    model, batch, handle = sparse(name, tmp_path)
    with pytest.raises(InputError, match=f"a training pass cannot be sparse: it.*{cause}"):
        model(**change(batch))
    model(**batch).loss.backward()  # the control: the batch itself is trained on
    handle.remove()


def test_a_mask_of_its_own_is_sparse_with_a_layout(tmp_path):
    model, batch, handle = sparse("llama", tmp_path)
    ours = model(**four_dimensional(batch), token_layout=layout_of(batch)).loss
    choices = handle.choices()
    handle.remove()
    assert set(choices) == CHOICES
    with masked(model, batch, choices):
        torch.testing.assert_close(ours.double(), exact_loss(model, batch), rtol=0, atol=1e-6)


def test_evaluation_generation_and_the_dense_mode_need_no_labels(tmp_path):
    model, batch, handle = sparse("llama", tmp_path)
    inputs = without_labels(batch)
    with torch.no_grad():
        model(**inputs)
        model(**four_dimensional(inputs))
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=1)  # in training mode
    assert not handle.choices()
    handle.remove()
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=1))
    handle = sparsify(model, SparsityConfig(mode="dense"))
    model(**inputs)
    model(**four_dimensional(batch))


def test_prefix_tuning_is_refused(tmp_path):
    base = tiny("llama", lora=False).float()
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    handle = sparsify(model, SVD, cache_dir=tmp_path)
    with pytest.raises(InputError, match="prefix tuning"):
        model(**ragged("llama"))
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_batch_without_context_is_told_once(name, tmp_path):
    model, batch, handle = sparse(name, tmp_path)
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    with pytest.warns(UserWarning, match="3 of the 27 tokens of a batch are context"):
        model(**batch | {"labels": labels})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch | {"labels": labels})
        handle.remove()
        handle = sparsify(model, SVD, cache_dir=tmp_path)
        model(**batch)  # the control


def test_an_ffn_that_is_called_in_parts_is_an_error(tmp_path):
    base = tf.BertForSequenceClassification(tf.BertConfig(**SIZES, num_labels=3, chunk_size_feed_forward=1))
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).train()
    with pytest.raises(InputError, match=r"called on \(2, 1\) tokens, the batch is \(2, 8\)"):
        sparsify(model, SVD, cache_dir=tmp_path)
    layers = model.get_base_model().bert.encoder.layer
    for layer in layers:
        layer.chunk_size_feed_forward = 0
    sparsify(model, SVD, cache_dir=tmp_path)
    for layer in layers:
        layer.chunk_size_feed_forward = 1
    with pytest.raises(InputError, match=r"called on \(3, 1\) tokens, the batch is \(3, 11\)"):
        model(**ragged("bert"))


def test_an_ffn_that_was_replaced_is_an_error(tmp_path):
    model, batch, handle = sparse("gpt2", tmp_path)
    mlp = model.get_base_model().transformer.h[2].mlp
    mlp.forward = types.MethodType(type(mlp).forward, mlp)
    with pytest.raises(InputError, match=r"the ffn of transformer\.h\.2 should have been sparse and was not"):
        model(**batch)
    handle.remove()
    assert "forward" in mlp.__dict__  # not ours to take away


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("kind", ["gates", "mask"])
def test_hooks_on_the_factors_are_not_passed_over(name, kind, tmp_path):
    model, batch, handle = sparse(name, tmp_path)
    if kind == "gates":
        undo: Any = attach_token_gates(model.float(), TokenGateConfig(policy="energy", budget=0.5))
    else:
        undo = mask_channels(model, {layer: [0] for layer in lora_layers(model)})
    with pytest.raises(InputError, match="has a hook on its factors"):
        model(**batch)
    undo.remove()
    model(**batch)
    handle.remove()


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"sparse_warmup_ratio": 0.1}, {"sparse_warmup_steps": 2}, {"sparse_end_ratio": 0.9}, {"sparse_end_step": 4}],
    ids=str,
)
def test_a_schedule_that_nobody_steps_is_an_error(settings, tmp_path):
    model, batch, handle = sparse("llama", tmp_path, SparsityConfig(mode="svd", **SPARSE, **settings))
    with pytest.raises(InputError, match="nothing says which step it is"):
        model(**batch)
    handle.begin_step(0, 10)
    model(**batch)
    handle.remove()


def test_a_step_without_a_pass_or_a_beginning_is_an_error(tmp_path):
    model, batch, handle = sparse("llama", tmp_path)
    with pytest.raises(InputError, match="a step ended that begin_step was not called for"):
        handle.end_step()
    handle.begin_step(0, 10)
    with pytest.raises(InputError, match="step 0 should have been sparse, and the sparse model was not called"):
        handle.end_step()
    handle.begin_step(0, 10)
    model(**batch)
    handle.end_step()
    with pytest.raises(InputError, match="begin_step was not called"):
        handle.end_step()


class NeverBegins(Trainer):
    """A trainer that leaves out one event of its callbacks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.callback_handler.on_step_begin = lambda args, state, control: control


class FromLogits(Trainer):
    """A trainer that takes the labels out of the batch, and its loss from the logits."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **_: Any) -> Any:
        labels = inputs.pop("labels")
        return mean_loss(model(**inputs).logits, labels)


class Fused(Trainer):
    """A trainer whose loss is fused: it replaces the model's forward, and calls it with a keyword of its own."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        replace_forward(model.get_base_model())
        super().__init__(model, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **_: Any) -> Any:
        return model(**inputs, fused_loss=True, num_items_in_batch=num_items_in_batch).loss


class OfACopy(Trainer):
    """A trainer that trains a copy of the model it was given."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(model), *args, **kwargs)


def custom_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return mean_loss(outputs.logits, labels)


def trained(trainer: Trainer, handle: Handle | None) -> dict[str, torch.Tensor]:
    if handle is not None:
        trainer.add_callback(SparsityCallback(handle))
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("kind", "more", "options", "cause"),
    [
        (FromLogits, {}, {}, "has no labels"),
        (Trainer, {"label_smoothing_factor": 0.1}, {}, "has no labels"),
        (Trainer, {}, {"compute_loss_func": custom_loss}, "has no labels"),
        (OfACopy, {}, {}, "belongs to a copy"),
        (NeverBegins, {}, {}, "begin_step was not called for"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_trainer_that_would_train_dense_stops_and_says_why(name, kind, more, options, cause, tmp_path):
    found = {}
    for mode in ("dense", "svd"):
        model = tiny(name).float()
        config = SVD if mode == "svd" else SparsityConfig(mode="dense")
        handle = sparsify(model, config, cache_dir=tmp_path)
        trainer = kind(model, arguments(tmp_path, **more), train_dataset=examples(4), **options)
        try:
            found[mode] = trained(trainer, handle)
        except InputError as error:
            found[mode] = str(error)
    assert cause in found["svd"]
    plain = trained(kind(tiny(name).float(), arguments(tmp_path, **more), train_dataset=examples(4), **options), None)
    for parameter, value in plain.items():  # the control: mode dense is the plain trainer
        torch.testing.assert_close(found["dense"][parameter], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("first", ["sparsify", "trainer"])
@pytest.mark.parametrize("kind", [Fused, Trainer])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trainers_are_sparse_in_both_orders(name, kind, first, tmp_path):
    """Weights after a few steps: those of a loop that masks by hand; and mode dense trains as the plain trainer."""
    found = {}
    for mode in ("dense", "static", "plain"):
        model = tiny(name)
        layers = {"layer.0": 0.6, "layer.1": 0.75}
        config = SparsityConfig(mode=mode, layer_sparsity=layers) if mode == "static" else SparsityConfig(mode="dense")
        args = arguments(tmp_path, gradient_accumulation_steps=2, optim="sgd")
        trainer: Any = None
        if first == "trainer":
            trainer = kind(model, args, train_dataset=examples(8))
        handle = None
        if mode != "plain":
            handle = sparsify(model, config, calibration=[ragged(name)], cache_dir=tmp_path)
        if trainer is None:
            trainer = kind(model, args, train_dataset=examples(8))
        found[mode] = trained(trainer, handle)
        if mode == "static":
            assert handle is not None
            choices = handle.choices()
            assert set(choices) == {(0, "ffn"), (1, "ffn")}
            found["masked"] = masked_training(name, choices)
    for parameter, value in found["plain"].items():
        torch.testing.assert_close(found["dense"][parameter], value, rtol=0, atol=1e-7)
        torch.testing.assert_close(found["static"][parameter], found["masked"][parameter], rtol=0, atol=1e-7)
    change = max(float((found["static"][n] - found["plain"][n]).abs().max()) for n in found["plain"])
    assert change > 1e-5


def masked_training(name: str, choices: Any) -> dict[str, torch.Tensor]:
    """Two steps of SGD by hand, two batches each, the model masked; losses are shares of a step's mean over labels."""
    model, rows = tiny(name), examples(8)
    batches = [{k: torch.stack([row[k] for row in pair]) for k in pair[0]} for pair in zip(rows[::2], rows[1::2])]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for window in (batches[:2], batches[2:]):
        total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
        for batch in window:
            n = int((batch["labels"][:, 1:] != -100).sum())
            with masked(model, batch, choices):
                loss = exact_loss(model, batch)
                (loss * n / total).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# --- copies, compilers, hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_copy_of_a_sparse_model_computes_with_its_own_weights(name, tmp_path):
    """And is dense: a reference model, a moving average; to be trained it is made sparse itself."""
    model, batch, handle = sparse(name, tmp_path)
    before = model(**batch).loss
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = exact_loss(model.eval(), batch)
        torch.testing.assert_close(exact_loss(twin.eval(), batch), expected, rtol=0, atol=1e-12)
        for parameter in twin.parameters():
            parameter.zero_()
        zeroed = exact_loss(twin.train(), batch)  # without gradients a copy is no training pass
    assert abs(float(zeroed - expected)) > 1e-3
    if name != "bert":
        assert float(zeroed) == pytest.approx(float(torch.log(torch.tensor(64.0))), abs=1e-6)  # nothing but zeros
    with pytest.raises(InputError, match="belongs to a copy of a sparse model"):
        twin(**batch)
    assert torch.equal(model.train()(**batch).loss, before)
    again = sparsify(copy.deepcopy(model), SVD, cache_dir=tmp_path)
    own = again._structure.model
    assert torch.equal(own(**batch).loss, before)
    again.remove()
    assert not any("forward" in module.__dict__ for module in own.modules())
    handle.remove()
    twin(**batch).loss.backward()  # nothing is due any more


def test_a_copy_under_a_dense_handle_is_plain(tmp_path):
    model, batch = tiny("llama"), ragged("llama")
    sparsify(model, SparsityConfig(mode="dense"))
    twin, plain = copy.deepcopy(model), tiny("llama")
    losses = [mean_loss(each(**batch).logits, batch["labels"]) for each in (twin, plain)]
    assert torch.equal(*losses)
    found, expected = gradients(losses[0], twin), gradients(losses[1], plain)
    assert all(torch.equal(found[parameter], expected[parameter]) for parameter in expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_saved_sparse_model_is_the_plain_one(name, tmp_path):
    model, batch, handle = sparse(name, tmp_path)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    forwards = [m.__dict__["forward"].__func__ is type(m).forward for m in loaded.modules() if "forward" in m.__dict__]
    assert all(forwards)
    handle.remove()
    assert torch.equal(exact_loss(loaded, batch), exact_loss(model, batch))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("first", ["sparsify", "compile"])
def test_a_compiled_model_is_sparse(name, first, tmp_path):
    model, batch, handle = sparse(name, tmp_path)
    expected = model(**batch).loss
    if first == "compile":
        handle.remove()
        compiled = torch.compile(model, backend="eager")
        handle = sparsify(compiled, SVD, cache_dir=tmp_path)
    else:
        compiled = torch.compile(model, backend="eager")
    ours = compiled(**batch).loss
    assert set(handle.choices()) >= CHOICES - {(2, "ffn")}
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert max(float(g.abs().max()) for g in gradients(ours, model).values()) > 1e-4
    handle.remove()


def test_layers_compiled_one_by_one_are_sparse(tmp_path):
    model, batch, handle = sparse("gpt2", tmp_path)
    expected = model(**batch).loss
    for layer in model.get_base_model().transformer.h:
        layer.compile(backend="eager")
    torch.testing.assert_close(model(**batch).loss, expected, rtol=0, atol=1e-10)
    assert set(handle.choices()) == CHOICES
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_noise_on_embeddings_is_that_of_whole_batches(name, tmp_path):
    """NEFTune scales its noise by the length of a batch: packed tokens have the noise that padded ones have."""
    model, batch = tiny(name), ragged(name)
    embedding: Any = model.get_base_model().get_input_embeddings()
    embedding.neftune_noise_alpha = 3.0
    hook = embedding.register_forward_hook(tf.integrations.neftune.neftune_post_forward_hook)

    def seeded(loss: Any) -> torch.Tensor:
        torch.manual_seed(5)
        return loss()

    expected = seeded(lambda: exact_loss(model, batch))
    handle = sparsify(model, SparsityConfig(mode="dense"))
    assert_same(seeded(lambda: model(**batch).loss), expected, model)
    handle.remove()
    hook.remove()
    assert abs(float((expected - exact_loss(model, batch)).detach())) > 1e-3


def test_a_forward_that_is_a_method_stays_one(tmp_path):
    model, _, handle = sparse("llama", tmp_path)
    inner = model.get_base_model()
    assert inner.forward.__func__ is not type(inner).forward
    assert inner.forward.__self__ is inner
    names = list(inspect.signature(type(inner).forward).parameters)[1:]
    assert list(inspect.signature(inner.forward).parameters) == names
    handle.remove()


def test_merging_under_a_handle(tmp_path):
    model, batch, _ = sparse("llama", tmp_path)
    with torch.no_grad():
        expected = exact_loss(model.eval(), batch)
        merged = model.merge_and_unload()
        torch.testing.assert_close(exact_loss(merged, batch), expected, rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="was replaced after sparsify"):
        merged.train()(**batch)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_pass_is_the_same_after_a_pass_without_gradients(reentrant, tmp_path):
    """A reference pass between forward and backward: what checkpointing computes again still follows the first."""
    model, batch = tiny("gpt2"), ragged("gpt2")
    model.enable_input_require_grads()
    other = ragged("gpt2", left=True)

    def run(between: bool) -> dict[str, torch.Tensor]:
        handle = sparsify(model, SVD, cache_dir=tmp_path)
        handle.begin_step(0, 10)
        loss = model(**batch).loss
        if between:
            with torch.no_grad(), model.disable_adapter():
                model(**other)
        model.zero_grad()
        loss.backward()
        handle.remove()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = run(False)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = run(True)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-10)
