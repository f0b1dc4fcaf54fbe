"""`sparsify` in the trainers of transformers and TRL: they train the masked model, in every order and setting."""

from __future__ import annotations

import functools
import gc
import importlib.util
import logging
import warnings
import weakref
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.handle import sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.trainers import batch_labels, calibration_batches
from sparselora.errors import InputError
from tests.contextual.test_contextual import assert_same
from tests.helpers.byte_llama import byte_llama
from tests.helpers.contextual_models import exact_loss, masked, ragged, tiny
from tests.helpers.paths import ROOT
from tests.helpers.trainer_cases import (
    CASES,
    MODES,
    Case,
    Trained,
    build,
    calibration,
    config_of,
    difference,
    lora_model,
    train,
    train_masked,
    weights_of,
)

HAS_TRL = importlib.util.find_spec("trl") is not None
NO_TRL = "TRL is not installed (the extra trainers)"


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def name_of(case: Case) -> str:
    return f"{case.trainer}-{case.name}"


def parameters(cases: list[Case]) -> list[Any]:
    missing = pytest.mark.skipif(not HAS_TRL, reason=NO_TRL)
    return [pytest.param(c, marks=() if c.trainer == "Trainer" else missing, id=name_of(c)) for c in cases]


def case_of(trainer: str, name: str) -> Case:
    return next(case for case in CASES if (case.trainer, case.name) == (trainer, name))


@functools.cache
def plain(name: str, folder: Any, max_steps: int) -> Trained:
    case = next(case for case in CASES if name_of(case) == name)
    return train(case, None, "after", folder, max_steps=max_steps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainers")


@pytest.mark.parametrize("case", parameters(CASES))
def test_a_trainer_trains_the_masked_model(case, folder):
    """A reference model, what is sampled and what is measured on the way are dense, or this would differ."""
    dense = plain(name_of(case), folder, 2).weights
    sparse = train(case, config_of("static"), "trainer", folder)
    assert set(sparse.choices) >= {(0, "ffn")}
    expected = train_masked(case, sparse.choices, folder)
    control = difference(sparse.weights, dense)
    assert control > 5e-5
    assert difference(sparse.weights, expected.weights) < 1e-4 * max(control, 0.01)


ONE_EACH = [
    case_of("Trainer", "label smoothing"),
    case_of("SFTTrainer", "completions"),
    case_of("DPOTrainer", "pairs"),
    case_of("GRPOTrainer", "sampling"),
]


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("case", parameters(ONE_EACH))
def test_every_mode_trains_the_masked_model(case, mode, folder):
    sparse = train(case, config_of(mode), "trainer", folder, max_steps=1)
    assert set(sparse.choices) == {(0, "ffn"), (1, "ffn")}
    assert sparse.packed_passes == 1
    expected = train_masked(case, sparse.choices, folder, max_steps=1)
    assert difference(sparse.weights, expected.weights) < 2e-6
    assert difference(sparse.weights, plain(name_of(case), folder, 1).weights) > 1e-3


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("case", parameters(ONE_EACH[1:]))
def test_before_and_after_the_trainer_is_made(case, order, folder):
    by_trainer = train(case, config_of("static"), "trainer", folder)
    by_model = train(case, config_of("static"), order, folder)
    assert difference(by_trainer.weights, by_model.weights) < 1e-6
    assert by_model.packed_passes == 2
    dense = train(case, SparsityConfig(mode="dense"), order, folder)
    assert difference(dense.weights, plain(name_of(case), folder, 2).weights) < 1e-6
    assert difference(dense.weights, by_model.weights) > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "static", "layer_sparsity": {"layer.0-1": 0.75}, "context_backward": "none"},
        {"mode": "dense", "context_backward": "none"},
        {"mode": "svd", "svd_rank": 4, "layer_sparsity": {"layer.0-1": 0.75}, "context_backward": "sampled"},
        {"mode": "dense", "frozen_precision": "fp8_emulated"},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", parameters(ONE_EACH[1:2]))
def test_precision_and_context_backward_are_those_of_the_plain_loss(case, settings, folder):
    """TRL's loss against the Trainer's, which computes the loss of the packed pass itself."""
    import trl
    from transformers import Trainer

    config = SparsityConfig(**settings)
    by_trl = train(case, config, "trainer", folder)
    kind, original = trl.SFTTrainer, trl.SFTTrainer.compute_loss

    def plain_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return Trainer.compute_loss(self, model, inputs, *args, **kwargs)

    try:
        kind.compute_loss = plain_loss
        by_model = train(case, config, "before", folder)
    finally:
        kind.compute_loss = original
    control = difference(by_trl.weights, plain(name_of(case), folder, 2).weights)
    assert control > 1e-4
    rounding = 0.1 if "frozen_precision" in settings else 1e-4
    assert difference(by_trl.weights, by_model.weights) < rounding * control


# --- the passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_reference_pass_in_training_mode_is_exact(name, tmp_path):
    model, batch = tiny(name), ragged(name)
    with torch.no_grad(), model.disable_adapter():
        expected = model(**batch).logits
    handle = sparsify(model, config_of("svd"), cache_dir=tmp_path)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    sparse = model(**batch).logits
    assert handle.choices()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, model.eval()(**batch).logits)  # the control
    assert sparse.requires_grad


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma"])
@pytest.mark.parametrize("left", [False, True])
def test_logits_that_are_read_are_those_of_the_pass(name, left, tmp_path):
    """First those of a pass that had computed the loss alone, then those that it computes from then on."""
    model, batch = tiny(name), ragged(name, left)
    config = SparsityConfig(mode="random", layer_sparsity={"layer.0": 0.5, "layer.2.ffn": 0.5})
    handle = sparsify(model, config, cache_dir=tmp_path)
    runs = []
    for _ in range(2):
        output = model(**batch)
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        torch.testing.assert_close(loss, output.loss.double(), rtol=0, atol=1e-5)
        assert output.logits is output["logits"]
        runs.append((loss, handle.choices()))
    handle.remove()
    for loss, choices in runs:
        with masked(model, batch, choices):
            assert_same(loss, exact_loss(model, batch), model)
        assert abs(float((loss - exact_loss(model, batch)).detach())) > 1e-7  # the control: it is not the dense model
    assert abs(float((runs[0][0] - runs[1][0]).detach())) > 1e-9  # drawn anew


def test_no_weight_outlives_its_model_and_handle(tmp_path):
    """transformers keeps each class of outputs for good: it must not lead to weights. The control: the handle does."""
    model, batch = tiny("llama"), ragged("llama")
    handle = sparsify(model, config_of("static"), calibration=[batch], cache_dir=tmp_path)
    model(**batch).loss.backward()
    handle.remove()
    alive = weakref.ref(model.get_base_model().lm_head.weight)
    del model
    gc.collect()
    assert alive() is not None
    del handle
    gc.collect()
    assert alive() is None


def test_an_output_that_was_rebuilt_reads_its_own_logits_or_none(tmp_path):
    """Mixed precision makes a new output of the items of the old one."""
    model, batch = tiny("llama"), ragged("llama")
    sparsify(model, config_of("static"), calibration=[batch], cache_dir=tmp_path)
    first, second = model(**batch), model(**ragged("llama", left=True))
    rebuilt = [type(output)(dict(output.items())) for output in (first, second)]
    assert torch.equal(rebuilt[1].logits, second.logits)
    model.zero_grad()
    other = model(**batch | {"labels": batch["labels"].roll(1, 0)})
    assert other.logits is not None
    with pytest.raises(InputError, match="read after the next one"):
        _ = rebuilt[0].logits


def test_the_last_logits_tell_the_context(tmp_path):
    layout = TokenLayout.build(torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]), None, last_logits=2)
    assert layout.tokens[layout.n_context :].tolist() == [3, 4, 8]
    assert layout.n_context == 5
    assert layout.targets.tolist() == [-100] * 3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_to_keep_in_place_of_labels(name, tmp_path):
    """As a trainer on sampled completions calls the model: the loss is that of the last tokens."""
    model, batch = tiny(name), ragged(name, left=True)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-3] = -100
    handle = sparsify(model, config_of("svd"), cache_dir=tmp_path)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs, logits_to_keep=4).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, -3:].flatten())
    choices = handle.choices()
    handle.remove()
    with masked(model, batch, choices):  # the last token is dense, which reaches no loss
        assert_same(loss, exact_loss(model, batch), model)
    assert abs(float((loss - exact_loss(model, batch)).detach())) > 1e-6


@pytest.mark.parametrize("trainer", ["Trainer"])
def test_a_trainer_of_all_labels_says_that_nothing_is_sparse(trainer, tmp_path):
    case = Case("all labels", trainer, data=all_labelled)
    with pytest.warns(UserWarning, match="next to nothing of its pass is sparse; label completions only") as told:
        train(case, config_of("static"), "trainer", tmp_path)
    assert sum("next to nothing" in str(warning.message) for warning in told) == 1  # once


def all_labelled() -> Any:
    from tests.helpers.trainer_cases import encoded

    return [row | {"labels": row["input_ids"]} for row in encoded()]


# --- sparsify(trainer) -----------------------------------------------------------------------------------------------


def test_removing_leaves_the_trainer_as_it_was(tmp_path):
    trainer = build(case_of("Trainer", "loss of the model"), lora_model(), tmp_path)
    callbacks = list(trainer.callback_handler.callbacks)
    handle = sparsify(trainer, config_of("svd"), cache_dir=tmp_path)
    assert "compute_loss" in trainer.__dict__
    assert len(trainer.callback_handler.callbacks) == len(callbacks) + 1
    handle.remove()
    assert "compute_loss" not in trainer.__dict__
    assert trainer.callback_handler.callbacks == callbacks


def test_calibration_takes_the_trainers_own_rows_and_no_random_number(tmp_path):
    trainer = build(case_of("Trainer", "loss of the model"), lora_model(), tmp_path)
    state = torch.get_rng_state()
    batches = calibration_batches(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(len(batch["input_ids"]) for batch in batches) == 12
    (every,) = calibration()
    rows = {tuple(ids[ids != 1].tolist()) for ids in every["input_ids"]}
    assert {tuple(ids[ids != 1].tolist()) for batch in batches for ids in batch["input_ids"]} == rows
    handle = sparsify(trainer, config_of("static"), cache_dir=tmp_path)
    trainer.train()
    assert set(handle.choices()) == {(0, "ffn")}


@pytest.mark.skipif(not HAS_TRL, reason=NO_TRL)
def test_prompts_to_sample_from_cannot_calibrate(tmp_path):
    trainer = build(case_of("GRPOTrainer", "sampling"), lora_model(), tmp_path)
    with pytest.raises(InputError, match=r"not token ids with labels .*calibration=batches"):
        sparsify(trainer, config_of("static"), cache_dir=tmp_path)
    sparsify(trainer, config_of("svd"), cache_dir=tmp_path)  # the control: it needs none


def test_the_labels_of_a_batch():
    ids = torch.tensor([[5, 6, 7]])
    assert batch_labels({"input_ids": ids, "labels": ids + 1}).tolist() == [[6, 7, 8]]
    assert batch_labels({"input_ids": ids, "completion_mask": torch.tensor([[0, 1, 1]])}).tolist() == [[-100, 6, 7]]
    assert batch_labels({"input_ids": ids, "completion_mask": torch.tensor([[1]])}) is None
    assert batch_labels([{"prompt": "a"}]) is None


@pytest.mark.parametrize(
    "case", parameters([case_of("Trainer", "loss of the model"), case_of("SFTTrainer", "completions")])
)
def test_evaluation_is_dense_and_a_resumed_run_is_the_uninterrupted_one(case, tmp_path):
    def run(folder: Any, steps: int, resume: bool = False) -> Any:
        model = lora_model()
        trainer = build(case, model, folder, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.eval_dataset = trainer.train_dataset
        handle = sparsify(
            trainer, config_of("static", sparse_warmup_steps=1), calibration=calibration(), cache_dir=tmp_path
        )
        if steps == 2:
            trainer.add_callback(StopAt(2))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        sparse_loss = trainer.evaluate()["eval_loss"]
        handle.remove()
        assert trainer.evaluate()["eval_loss"] == sparse_loss
        return weights_of(model), model

    whole, model = run(tmp_path / "whole", 4)
    first, _ = run(tmp_path / "parts", 2)
    resumed, _ = run(tmp_path / "parts", 4, resume=True)
    assert difference(resumed, whole) < 1e-6
    assert difference(first, whole) > 1e-4
    loaded = PeftModel.from_pretrained(byte_llama().float(), tmp_path / "whole" / "checkpoint-4")
    (batch,) = calibration()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


class StopAt(TrainerCallback):
    """Stops training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_a_row_for_every_case_and_no_difference():
    text = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    written = text.split("<!-- written by benchmarks/trainers.py -->")[1].split("<!-- end of what is written -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines() if "e-" in line]
    settings, modes = ([row for row in rows if (row[2] in MODES) == is_mode] for is_mode in (False, True))
    assert [(row[0], row[1]) for row in settings] == [(case.trainer, case.name) for case in CASES]
    assert [tuple(row[:3]) for row in modes] == [(case.trainer, case.name, m) for case in ONE_EACH for m in MODES]
    for row in settings:
        assert float(row[2]) < 1e-5
        assert float(row[3]) < 0.01 * float(row[4])
    assert all(float(row[3]) < 1e-5 for row in modes)
    assert "**" not in written
