"""The Trainer under `train`: batches, losses, evaluation, and that nothing in a step waits for the device."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Lora, Shape, Workload, token_costs, total
from sparselora.contextual.handle import sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.trainers import SparsityCallback
from sparselora.data.batches import Collator, LengthGroups, encode_texts
from sparselora.data.instructions import encode_instructions, load_instructions
from sparselora.errors import InputError
from sparselora.models.architectures import SHAPES
from sparselora.models.attach import attach_lora
from sparselora.models.labels import IGNORED
from sparselora.models.load import load_causal_lm, load_classifier
from sparselora.models.lora import lora_layers
from sparselora.training.meter import METRICS, StepFlops, step_medians
from sparselora.training.trainer import FineTuner, Settings, summarise_rows
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def examples(llama: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = write_instructions(tmp_path_factory.mktemp("data") / "d.jsonl", 40)
    return encode_instructions(load_instructions(str(path)).train, load_causal_lm(llama)[1], 32).examples


def tuner(llama: str, examples: list, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> FineTuner:
    torch.manual_seed(0)
    model, tokenizer = load_causal_lm(llama, dtype)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = attach_lora(
        model, r=4, alpha=8, dropout=0.0, target_modules=targets, base_model="tiny", task_type="CAUSAL_LM"
    )
    chosen = {"train_bsz": 4, "eval_bsz": 5, "lr": 1e-2, "max_steps": 4, "seed": 0} | settings
    collator = Collator(tokenizer.pad_token_id, causal=True)
    return FineTuner(
        model, tokenizer, examples[:24], examples[24:], collator, Settings(folder, causal=True, device=CPU, **chosen)
    )


# --- batches ------------------------------------------------------------------------------------------------------


def test_batch_is_padded_to_the_right_and_counted_on_the_host() -> None:
    seen = []
    collator = Collator(
        9, causal=True, longest=10, layout=lambda mask, labels, _: seen.append((mask, labels)) or "layout"
    )
    short = {"input_ids": [5, 6], "labels": [IGNORED, 6]}
    batch = collator([short, {"input_ids": list(range(9)), "labels": [IGNORED] * 7 + [7, 8]}])
    assert batch["input_ids"].shape == (2, 10), "a multiple of 8, but no longer than allowed"
    assert batch["input_ids"][0].tolist() == [5, 6] + [9] * 8
    assert batch["labels"][0].tolist() == [IGNORED, 6] + [IGNORED] * 8
    counts = batch["token_counts"]
    assert (counts.rows, counts.tokens, counts.outputs, counts.padded) == (2, 11, 3, 20)
    assert batch["token_layout"] == "layout"
    assert seen[0][0] is batch["attention_mask"]
    assert collator([short])["input_ids"].shape == (1, 8)


def test_order_by_length_depends_on_seed_and_epoch_alone_and_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 400).tolist()
    sampler = LengthGroups(lengths, 8, seed=3)
    first = list(sampler)
    torch.rand(5)  # the global generator has no say
    assert list(sampler) == first
    assert sorted(first) == list(range(400))
    sampler.set_epoch(1)
    assert list(sampler) != first

    def padding(order: list[int]) -> int:
        return sum(8 * max(lengths[i] for i in order[s : s + 8]) for s in range(0, 400, 8)) - sum(lengths)

    assert padding(first) < padding(list(range(400))) / 3


# --- losses -------------------------------------------------------------------------------------------------------


def label_counts(examples: list) -> list[int]:
    return [sum(label != IGNORED for label in example["labels"][1:]) for example in examples]


def test_accumulated_batches_are_one_large_batch(llama: str, examples: list, tmp_path: Path) -> None:
    assert len(set(label_counts(examples))) > 1, "with equal counts a mean of means would be right too"
    one = tuner(llama, examples, tmp_path, train_bsz=8, grad_accum=1)
    four = tuner(llama, examples, tmp_path, train_bsz=2, grad_accum=4)
    for each in (one, four):
        each.run()
    left, right = one.meter.table(), four.meter.table()
    assert left["tokens"].tolist() == right["tokens"].tolist()
    assert left["loss"].tolist() == pytest.approx(right["loss"].tolist(), rel=1e-5)
    for a, b in zip(one.model.parameters(), four.model.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


def test_loss_of_a_step_is_the_mean_over_its_labels(llama: str, examples: list, tmp_path: Path) -> None:
    trainer = tuner(llama, examples, tmp_path, train_bsz=24, max_steps=1)
    trainer.model.eval()
    total, means = 0.0, []
    for example in examples[:24]:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        means.append(trainer.model(input_ids=ids, labels=labels).loss.item())
        total += means[-1] * label_counts([example])[0]
    trainer.run()
    measured = trainer.meter.table()["loss"].iloc[0]
    assert measured == pytest.approx(total / sum(label_counts(examples[:24])), rel=1e-5)
    assert measured != pytest.approx(np.mean(means), rel=1e-5), "the mean of the rows' means is something else"


def test_checkpointed_activations_give_the_same_losses(llama: str, examples: list, tmp_path: Path) -> None:
    plain, recomputed = (tuner(llama, examples, tmp_path, gradient_checkpointing=flag) for flag in (False, True))
    for each in (plain, recomputed):
        each.run()
    assert plain.meter.table()["loss"].tolist() == recomputed.meter.table()["loss"].tolist()


def test_in_bfloat16_the_adapter_stays_in_float32(llama: str, examples: list, tmp_path: Path) -> None:
    trainer = tuner(llama, examples, tmp_path, dtype=torch.bfloat16, bf16=True)
    exact = tuner(llama, examples, tmp_path)
    for each in (trainer, exact):
        each.run()
    kinds = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert trainer.meter.table()["loss"].tolist() == pytest.approx(exact.meter.table()["loss"].tolist(), rel=2e-2)


def test_a_loss_that_is_not_finite_stops_the_run(llama: str, examples: list, tmp_path: Path) -> None:
    trainer = tuner(llama, examples, tmp_path, lr=1e-2)
    trainer.model.base_model.model.model.norm.weight.data.fill_(torch.inf)
    with pytest.raises(RuntimeError, match="training diverged: the loss is nan at step 1; lower --lr"):
        trainer.run()


def test_warm_up_of_the_learning_rate(llama: str, examples: list, tmp_path: Path) -> None:
    trainer = tuner(llama, examples, tmp_path, max_steps=8, warmup_ratio=0.5, scheduler="constant_with_warmup", lr=1.0)
    trainer.settings.arguments()
    rates = []
    trainer.meter.note_lr = rates.append  # type: ignore[method-assign]
    trainer.create_optimizer_and_scheduler(8)
    assert [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


# --- the step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "dense", "svd"])
def test_nothing_in_a_step_reads_a_tensor(
    llama: str, examples: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    trainer = tuner(llama, examples, tmp_path, grad_accum=2)
    if mode != "none":
        config = SparsityConfig(mode=mode, ffn_sparsity=0.5, attention_sparsity=0.5, svd_rank=2)
        handle = sparsify(trainer.model, config, cache_dir=tmp_path)
        trainer.data_collator = dataclasses.replace(trainer.data_collator, layout=TokenLayout.build)
        trainer.add_callback(SparsityCallback(handle))
    reads: list[str] = []

    def watch(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if trainer.meter.running and self.numel():
                reads.append(f"{name} in {traceback.extract_stack(limit=3)[0]}")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, method)

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        watch(name)
    trainer.run()
    # Plain PEFT leaves the mask to transformers, which reads it in every pass; the packed pass has none to read.
    masks = [read for read in reads if "masking_utils" in read]
    assert reads == masks
    assert bool(masks) == (mode == "none")
    # The control: what the watch is there to see.
    trainer.meter.begin_step()
    torch.ones(1).item()
    assert reads[-1].startswith("item")


def test_times_of_a_step_add_up(llama: str, examples: list, tmp_path: Path) -> None:
    trainer = tuner(llama, examples, tmp_path, grad_accum=2, max_steps=6)
    trainer.run()
    table = trainer.meter.table()
    assert list(table.columns) == list(METRICS)
    assert table["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert (table["rows"] == 8).all()
    parts = table[["forward_ms", "backward_ms", "optimizer_ms"]]
    assert (parts > 0).all(axis=None)
    assert (parts.sum(axis=1) <= table["step_ms"] + 1e-6).all()
    assert (table["tokens"] < table["padded"]).all(), "padding does not count"
    assert table["tokens_per_s"].tolist() == pytest.approx((1000 * table["tokens"] / table["step_ms"]).tolist())


def test_medians_are_those_of_the_sparse_steps() -> None:
    table = pd.DataFrame({name: [1.0] * 10 for name in METRICS}).assign(
        step_ms=[9.0] * 5 + [2.0] * 5, sparse=[0] * 5 + [1] * 5, tokens=10, padded=20, active_flops_per_token=7.0
    )
    medians = step_medians(table)
    assert medians["step_ms"] == 2
    assert medians["tokens_per_s"] == pytest.approx(5000)
    assert medians["padding"] == pytest.approx(0.5)
    assert medians["sparse_steps"] == 5
    assert step_medians(table.assign(sparse=0))["step_ms"] == 2, "all steps but the first three"


def test_flops_of_an_unknown_architecture_are_nan() -> None:
    assert np.isnan(StepFlops({"model_type": "novel"}, None, 8, ["q_proj"]).per_token(1, 8, 2, False))


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["query", "attention.output.dense"], ("q", "o")),  # which ends like the FFN's output.dense, and is not it
        (["output.dense"], ("o", "fc2")),
        (["layer.3.attention.self.key"], ("k",)),
        (["dense"], ("o", "fc1", "fc2")),
    ],
)
def test_flops_count_the_adapters_that_peft_attaches(targets: list[str], adapted: tuple[str, ...]) -> None:
    work, config = Workload(1, 16, 0), SHAPES["bert-base"]
    wanted = 2 * total(token_costs(Shape.from_config(config), None, work, Lora(8, adapted)), training=True)
    assert StepFlops(config, None, 8, targets).per_token(4, 64, 0, False) == wanted


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluation_counts_labelled_tokens_row_by_row(llama: str, examples: list, tmp_path: Path) -> None:
    trainer = tuner(llama, examples, tmp_path)
    rows = trainer.evaluate_rows()
    trainer.model.eval()
    for example, row in zip(examples[24:], rows.to_dict("records")):
        logits = trainer.model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
        wanted = torch.tensor(example["labels"][1:])
        assert row["loss"] == pytest.approx(F.cross_entropy(logits, wanted, reduction="sum").item(), rel=1e-4)
        assert row["tokens"] == (wanted != IGNORED).sum()
        assert row["correct"] == (logits.argmax(dim=1) == wanted).sum()
    numbers = summarise_rows(rows, causal=True)
    assert numbers["n"] == sum(label_counts(examples[24:]))
    assert numbers["loss"] == pytest.approx(rows["loss"].sum() / numbers["n"])
    assert trainer.evaluate()["eval_loss"] == numbers["loss"]


def test_classes_are_in_the_order_of_the_frame(tiny_bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = load_classifier(str(tiny_bert), 3)
    model = attach_lora(model, r=2, alpha=4, dropout=0.0, target_modules=["query"], base_model="tiny")
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 60, rng.integers(1, 20))) for _ in range(23)]
    frame = pd.DataFrame({"text": texts, "label": rng.integers(0, 3, 23)})
    held_out = encode_texts(frame, ("text",), tokenizer, 40)
    settings = Settings(tmp_path, causal=False, device=CPU, eval_bsz=4)
    trainer = FineTuner(model, tokenizer, held_out, held_out, Collator(0, causal=False), settings)
    rows = trainer.evaluate_rows()
    model.eval()
    for text, label, row in zip(texts, frame["label"], rows.to_dict("records")):
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert row["predicted"] == logits.argmax().item()
        assert row["loss"] == pytest.approx(-logits.log_softmax(0)[label].item(), rel=1e-4)
        assert row["correct"] == (row["predicted"] == label)
    assert not trainer.model_accepts_loss_kwargs


# --- models -------------------------------------------------------------------------------------------------------


def test_an_encoder_is_no_causal_model(tiny_bert: Path) -> None:
    with pytest.raises(InputError, match="is an encoder"):
        load_causal_lm(str(tiny_bert))


def test_alpha_and_rslora_reach_the_adapter(llama: str) -> None:
    model, _ = load_causal_lm(llama)
    adapted = attach_lora(
        model, r=4, alpha=6.0, dropout=0.0, target_modules=["q_proj"], base_model="tiny", task_type="CAUSAL_LM",
        use_rslora=True,
    )  # fmt: skip
    assert {layer.scaling["default"] for layer in lora_layers(adapted).values()} == {3.0}
    assert adapted.peft_config["default"].modules_to_save is None
    assert not model.config.use_cache
