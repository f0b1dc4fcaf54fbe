"""The gated Trainer against the plain one: what is accepted trains as if the rest had never been there."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from packaging.specifiers import SpecifierSet
from scipy.stats import mannwhitneyu
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.handle import sparsify
from sparselora.errors import InputError
from sparselora.novelty.gate import HeadGradientGate
from sparselora.novelty.trainer import ACCELERATE, GATE_COLUMNS, SLoRATrainer, find_head
from tests.helpers.contextual_models import tiny
from tests.helpers.processes import start_two

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"m": 64, "k": 8, "k_topk": 16, "reorth_every": 8}
FEW = ["v_proj", "down_proj"]
"""LoRA on these alone, for runs of hundreds of steps: the gate sees the head, whatever else is trained."""


def examples(count: int, seed: int = 0, classes: int = 0) -> list[dict[str, Any]]:
    """Rows of one length, of a causal model with 2 to 9 labelled tokens, or of a classifier with ``classes``."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(2, 64, (10,), generator=generator)
        labels: Any = ids.clone()
        labels[: int(torch.randint(1, 8, (1,), generator=generator))] = -100
        if classes:
            labels = torch.randint(classes, (), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "seed": 0,
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "lr_scheduler_type": "constant", "num_train_epochs": 1, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return TrainingArguments(**(defaults | more))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Scripted:
    """Decisions from a list, in place of the gate's own; all else is the gate's."""

    def __init__(self, trainer: SLoRATrainer, decisions: Sequence[int]) -> None:
        self.gate, self.decisions = trainer.gate, list(decisions)
        trainer.gate.accept = self.accept  # type: ignore[method-assign]

    def accept(self, nov: Any = None, loss: Any = None) -> bool:
        decision = bool(self.decisions.pop(0))
        self.gate._last = (float(nov), float("nan"), float(decision))
        self.gate._step_accepted |= decision
        return decision


class Gradients(TrainerCallback):
    """The gradients as the optimizer is about to see them, one dictionary a window."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor | None]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.seen.append({n: None if p.grad is None else p.grad.clone() for n, p in named.items()})


def test_accepting_all_is_the_plain_trainer_bit_for_bit(tmp_path: Path) -> None:
    for name, classes in (("llama", 0), ("bert", 3)):
        data, found = examples(14, classes=classes), []
        more = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear", "warmup_steps": 2}
        for kind, options in (
            (Trainer, {}),
            (SLoRATrainer, {"gate_config": SMALL | {"policy": "accept_all"}}),
            (SLoRATrainer, {"gate_config": SMALL | {"burn_in": 100, "unit": "micro_batch"}}),
        ):  # fmt: skip
            model = tiny(name)
            kind(model, arguments(tmp_path, **more), train_dataset=data, **options).train()
            found.append(weights(model))
        assert not all(torch.equal(a, b) for a, b in zip(found[0].values(), weights(tiny(name)).values()))
        for other in found[1:]:
            assert_same(found[0], other)


@pytest.mark.filterwarnings("ignore:no gating will happen")
def test_what_is_rejected_leaves_no_trace(tmp_path: Path) -> None:
    """The accepted batches alone, in their order, through the plain Trainer: the same weights, moments and rate."""
    decisions, data = [1, 1, 0, 1, 0, 0, 1, 1], examples(16)
    kept = [row for i, row in enumerate(data) if decisions[i // 2]]
    ours, theirs = tiny("llama"), tiny("llama")
    gated = SLoRATrainer(
        ours, arguments(tmp_path, lr_scheduler_type="cosine"), train_dataset=data, gate_config=SMALL | {"burn_in": 3}
    )
    Scripted(gated, decisions)
    gated.gate.target = 0.4  # 3 + 0.4 · 5 updates are expected: as many as come
    gradients = Gradients()
    gated.add_callback(gradients)
    gated.train()
    plain = Trainer(theirs, arguments(tmp_path, lr_scheduler_type="cosine"), train_dataset=kept)
    plain.train()
    assert_same(weights(ours), weights(theirs))
    for a, b in zip(gated.optimizer.state.values(), plain.optimizer.state.values()):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert gated.lr_scheduler.get_last_lr() == plain.lr_scheduler.get_last_lr()
    assert gated.lr_scheduler.last_epoch == 5
    assert gated.state.global_step == 8
    assert [all(g is None for g in seen.values()) for seen in gradients.seen] == [not d for d in decisions]
    table = gated.gate_table()
    assert table["accept"].tolist() == decisions
    assert table["accepted_steps"].tolist() == [1, 2, 2, 3, 3, 3, 4, 5]
    assert table["tokens_seen"].tolist() == [20 * (i + 1) for i in range(8)]
    assert table["tokens_trained"].iloc[-1] == 100
    assert pd.read_csv(tmp_path / "gate.csv").columns.tolist() == list(GATE_COLUMNS)
    # The control: with all eight batches the weights are others.
    every = tiny("llama")
    Trainer(every, arguments(tmp_path, lr_scheduler_type="cosine"), train_dataset=data).train()
    assert not torch.equal(next(iter(weights(every).values())), next(iter(weights(theirs).values())))


@pytest.mark.parametrize(("name", "classes"), [("llama", 0), ("bert", 3)])
def test_gradient_of_a_window_is_the_mean_over_its_accepted_batches(name: str, classes: int, tmp_path: Path) -> None:
    data, found = examples(8, classes=classes), []
    for rows, decisions in ((data, [1, 1, 0, 1]), ([*data[:4], *data[6:]], [1, 1, 1])):
        trainer = SLoRATrainer(
            tiny(name), arguments(tmp_path, gradient_accumulation_steps=len(decisions), max_grad_norm=0),
            train_dataset=rows, gate_config=SMALL | {"burn_in": 0, "unit": "micro_batch"},
        )  # fmt: skip
        if classes:  # else the Trainer takes a classifier's mean over its own batch for one over the window's labels
            trainer.model_accepts_loss_kwargs = False
        Scripted(trainer, decisions)
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        found.append(gradients.seen[0])
        assert trainer.gate_table()["micro"].tolist() == list(range(len(decisions)))
    for parameter, mine in found[0].items():
        assert mine is not None
        torch.testing.assert_close(mine, found[1][parameter], rtol=1e-5, atol=1e-8)  # the model's loss is float32


def test_loss_on_record_is_the_true_loss_of_every_batch(tmp_path: Path) -> None:
    data, model = examples(8), tiny("llama")
    before = copy.deepcopy(model)
    trainer = SLoRATrainer(model, arguments(tmp_path), train_dataset=data, gate_config=SMALL | {"burn_in": 0})
    Scripted(trainer, [0, 0, 0, 0])
    trainer.train()
    assert_same(weights(model), weights(before))
    for row, loss in enumerate(trainer.gate_table()["loss"]):
        batch = {key: torch.stack([data[2 * row + i][key] for i in range(2)]) for key in data[0]}
        assert loss == pytest.approx(before(**batch).loss.item(), rel=1e-6)


def test_sketch_is_that_of_autograds_head_gradient(tmp_path: Path) -> None:
    """The rows of a window, through the hook, against the gradient that the head's weight would get."""
    data, model = examples(4), tiny("llama")
    trainer = SLoRATrainer(
        model, arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=data,
        gate_config={"m": 256, "k": 8, "k_topk": 64, "burn_in": 9},
    )  # fmt: skip
    gate = trainer.gate
    seen: list[torch.Tensor] = []
    measure = gate.novelty
    gate.novelty = lambda z: (seen.append(z.clone()), measure(z))[1]  # type: ignore[method-assign]
    reference = copy.deepcopy(model)
    trainer.train()
    head, kind = find_head(reference)
    assert kind == "lm"
    head.weight.requires_grad_()
    labels = torch.stack([row["labels"] for row in data])
    logits = reference(input_ids=torch.stack([row["input_ids"] for row in data])).logits
    total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(total, head.weight)
    direct = torch.zeros(256, dtype=torch.float64)
    first, second = gate.sketch.hidden, gate.sketch.vocab
    bucket = (first.buckets[None, :] + second.buckets[:, None]) % 256
    direct.index_add_(0, bucket.flatten(), (gradient * first.signs[None, :] * second.signs[:, None]).flatten())
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].double(), direct, rtol=1e-4, atol=1e-4)


def test_resumed_run_decides_and_ends_as_the_whole_one(tmp_path: Path) -> None:
    config = SMALL | {"burn_in": 6, "target_accept_rate": 0.5}
    data, found = examples(48), []
    for resume in (False, True):
        model = tiny("llama", dropout=0.1)
        options = {
            "save_strategy": "steps",
            "save_steps": 13,
            "output_dir": str(tmp_path / "run"),
            "save_total_limit": 2,
        }
        trainer = SLoRATrainer(model, arguments(tmp_path, **options), train_dataset=data, gate_config=config)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-13") if resume else None)
        found.append((weights(model), trainer.gate_table().drop(columns="wall_s"), trainer.gate.state_dict()))
    (a, table, state), (b, other, resumed) = found
    assert_same(a, b)
    pd.testing.assert_frame_equal(table, other)
    assert 0 < table["accept"].iloc[13:].sum() < len(table) - 13
    assert torch.equal(state["subspace"]["basis"], resumed["subspace"]["basis"])
    assert state["generator"] == resumed["generator"]
    plain = SLoRATrainer(tiny("llama"), arguments(tmp_path), train_dataset=data, gate_config=config | {"k": 4})
    with pytest.raises(InputError, match="k=8"):
        plain.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-13"))


@pytest.mark.parametrize("policy", ["random", "loss_floor", "novelty", "novelty+loss_floor"])
def test_every_policy_gates_at_its_rate(policy: str, tmp_path: Path) -> None:
    config = SMALL | {"burn_in": 0.1, "policy": policy, "target_novelty": 0.4, "novelty_ema_rate": 0.05}
    trainer = SLoRATrainer(
        tiny("llama", targets=FEW), arguments(tmp_path, per_device_train_batch_size=1, learning_rate=1e-3),
        train_dataset=examples(200), gate_config=config,
    )  # fmt: skip
    trainer.train()
    table = trainer.gate_table()
    assert table["accept"].iloc[:20].all()
    assert table["accept"].iloc[20:].mean() == pytest.approx(0.4, abs=0.08)
    assert table["novelty"].notna().all() == ("novelty" in policy)
    assert table["loss"].notna().all()


@pytest.mark.parametrize("mode", ["dense", "svd"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sketch_is_the_same_where_the_loss_never_forms_all_logits(name: str, mode: str, tmp_path: Path) -> None:
    """Contextual sparsity hands rows over chunk by chunk; in mode dense it computes what the plain model does."""
    found = []
    for sparse in (False, True):
        model = tiny(name)
        trainer = SLoRATrainer(
            model, arguments(tmp_path), train_dataset=examples(12), gate_config=SMALL | {"burn_in": 2}
        )
        if sparse:
            config = SparsityConfig(mode=mode, svd_rank=4, ffn_sparsity=0.5 if mode == "svd" else 0.0)
            handle = sparsify(model, config, cache_dir=tmp_path)
            handle.observe_head(trainer.head_rows)
        trainer.train()
        found.append((trainer.gate_table(), weights(model)))
    (plain, _), (rows, _) = found
    same = torch.allclose(*(torch.tensor(t["novelty_raw"].to_numpy()) for t in (plain, rows)), rtol=1e-4, atol=1e-5)
    assert same == (mode == "dense")
    assert rows["accept"].nunique() == 2


@pytest.mark.parametrize("more", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_half_precision_and_recomputation(more: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama").float()
    trainer = SLoRATrainer(
        model, arguments(tmp_path, **more), train_dataset=examples(60),
        gate_config=SMALL | {"burn_in": 5, "target_accept_rate": 0.5},
    )  # fmt: skip
    trainer.train()
    table = trainer.gate_table()
    assert table["accept"].nunique() == 2
    assert table["novelty"].between(0, 1).all()


def test_packed_rows_are_gated_as_padded_ones(tmp_path: Path) -> None:
    """Rows of several lengths in one sequence, without padding: the same sketches, decisions and weights."""
    generator, data = torch.Generator().manual_seed(0), []
    for _ in range(40):
        ids = torch.randint(2, 64, (int(torch.randint(3, 9, (1,), generator=generator)),), generator=generator)
        data.append({"input_ids": ids.tolist(), "labels": [-100, *ids.tolist()[1:]]})
    found = []
    for collator in (DataCollatorWithFlattening(), _padded):
        trainer = SLoRATrainer(
            tiny("llama"), arguments(tmp_path), train_dataset=data, data_collator=collator,
            gate_config=SMALL | {"burn_in": 4, "target_accept_rate": 0.5},
        )  # fmt: skip
        trainer.train()
        found.append((trainer.gate_table().drop(columns="wall_s"), weights(trainer.model)))
    (packed, a), (padded, b) = found
    assert packed["accept"].nunique() == 2
    pd.testing.assert_frame_equal(packed, padded, rtol=1e-4)
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def _padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([row[k] + [fill[k]] * (length - len(row[k])) for row in rows]) for k in fill}
    ones = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    return batch | {"attention_mask": torch.tensor(ones)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more", [{"fp16": True}, {"bf16": True}, {"fp16": True, "gradient_accumulation_steps": 2}], ids=str
)
def test_half_precision_on_a_gpu_leaves_no_trace_of_what_is_rejected(more: dict[str, Any], tmp_path: Path) -> None:
    """With fp16 the scaler of the losses must not notice a rejected window either."""
    window = 2 * more.get("gradient_accumulation_steps", 1)
    decisions, data = [1, 1, 0, 1, 0, 0, 1, 1], examples(8 * window)
    kept = [row for i, row in enumerate(data) if decisions[i // window]]
    ours, theirs = (tiny("llama").float().cuda() for _ in range(2))
    more = more | {"use_cpu": False, "max_grad_norm": 1.0}
    gated = SLoRATrainer(ours, arguments(tmp_path, **more), train_dataset=data, gate_config=SMALL | {"burn_in": 3})
    Scripted(gated, decisions)
    gated.train()
    plain = Trainer(theirs, arguments(tmp_path, **more), train_dataset=kept)
    plain.train()
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, weights(theirs)[name], rtol=1e-3, atol=1e-5)
    if more.get("fp16"):
        assert gated.accelerator.scaler.state_dict() == plain.accelerator.scaler.state_dict()
    assert not torch.equal(*(next(iter(weights(m).values())).cpu() for m in (ours, tiny("llama").float())))


_RANK = """
import sys, torch
sys.path[:0] = {path!r}
from tests.novelty.test_novelty_trainer import *
trainer = SLoRATrainer(
    tiny("llama"), arguments({out!r}, gradient_accumulation_steps=2, learning_rate=1e-3, use_cpu={cpu}),
    train_dataset=examples(120),
    gate_config=SMALL | {{"burn_in": 4, "target_accept_rate": 0.5, "unit": {unit!r}, "policy": {policy!r}}},
)
trainer.train()
table = trainer.gate_table()
torch.save({{"weights": weights(trainer.model), "accept": table["accept"].tolist(), "loss": table["loss"].tolist(),
            "basis": trainer.gate.subspace.basis}}, {out!r} + "/rank%d.pt" % trainer.args.process_index)
"""


@pytest.mark.parametrize(
    ("unit", "policy", "cpu"),
    [
        ("window", "novelty", True),
        pytest.param("micro_batch", "novelty+loss_floor", True, marks=pytest.mark.slow),
        pytest.param("window", "oracle", True, marks=pytest.mark.slow),
        pytest.param("window", "novelty", False, marks=pytest.mark.gpu),
        pytest.param("micro_batch", "oracle", False, marks=pytest.mark.gpu),
        pytest.param("micro_batch", "novelty+loss_floor", False, marks=pytest.mark.gpu),
    ],
)
def test_two_processes_decide_alike_and_end_with_the_same_weights(
    unit: str, policy: str, cpu: bool, tmp_path: Path
) -> None:
    if not cpu and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here = Path(__file__).resolve().parents[1]
    script = tmp_path / "rank.py"
    paths = [str(here), str(here.parent)]
    script.write_text(_RANK.format(path=paths, out=str(tmp_path), unit=unit, policy=policy, cpu=cpu))
    if cpu:
        start_two(str(script), folder=tmp_path)
    else:  # a forked process may find that its server has touched CUDA
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", map_location="cpu") for rank in range(2))
    assert one["accept"] == two["accept"]
    assert 0 < sum(one["accept"]) < len(one["accept"])
    assert one["loss"] == two["loss"]
    assert torch.equal(one["basis"], two["basis"])
    assert_same(one["weights"], two["weights"])
    start = weights(tiny("llama"))
    assert not any(torch.equal(value, start[name.removeprefix("module.")]) for name, value in one["weights"].items())


# --- what must be said --------------------------------------------------------------------------------------------


def test_run_that_ends_inside_its_burn_in_says_so(tmp_path: Path) -> None:
    trainer = SLoRATrainer(tiny("llama"), arguments(tmp_path), train_dataset=examples(8), gate_config=SMALL)
    with pytest.warns(UserWarning, match="no gating will happen: the run's 4 updates end inside the burn-in of 2000"):
        trainer.train()


def test_bar_too_soft_for_the_spread_of_novelties_says_so(tmp_path: Path) -> None:
    for scaler, told in ((0.01, True), (1000.0, False)):
        config = SMALL | {"burn_in": 0, "target_novelty_scaler": scaler, "novelty_ema_rate": 0.05}
        trainer = SLoRATrainer(
            tiny("llama", targets=FEW), arguments(tmp_path, per_device_train_batch_size=1, learning_rate=1e-3),
            train_dataset=examples(220), gate_config=config,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert any("raise target_novelty_scaler from" in str(w.message) for w in caught) == told


def test_batch_without_a_label_is_never_accepted(tmp_path: Path) -> None:
    data = examples(8)
    for row in data[2:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    for policy in ("novelty", "random", "oracle"):
        model = tiny("llama")
        trainer = SLoRATrainer(
            model, arguments(tmp_path), train_dataset=data, gate_config=SMALL | {"burn_in": 100, "policy": policy}
        )
        with pytest.warns(UserWarning, match="without a labelled token"):
            trainer.train()
        assert trainer.gate_table()["accept"].tolist() == [1, 0, 1, 1]
        assert all(bool(torch.isfinite(w).all()) for w in weights(model).values())


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(tmp_path: Path) -> None:
    model = tiny("llama")
    trainer = SLoRATrainer(model, arguments(tmp_path), train_dataset=examples(8), gate_config=SMALL | {"burn_in": 100})
    forward, calls = model.forward, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(weights(model))
        output = forward(*args, **kwargs)
        if len(calls) == 3:
            output["loss"] = output["loss"] * float("nan")
        return output

    model.forward = broken  # type: ignore[method-assign]
    with pytest.raises(InputError, match="the loss is nan"):
        trainer.train()
    assert_same(weights(model), calls[-1])
    assert trainer.gate.total_steps == 2


def test_models_that_cannot_be_gated_are_refused(tmp_path: Path) -> None:
    class Headless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

    with pytest.raises(InputError, match="no head was found in Headless"):
        find_head(Headless())
    frozen = tiny("llama")
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    data = examples(4)
    with pytest.raises(InputError, match="attach a LoRA"):
        SLoRATrainer(frozen, arguments(tmp_path), train_dataset=data, gate_config=SMALL)
    with pytest.raises(InputError, match="power of two"):
        SLoRATrainer(tiny("llama"), arguments(tmp_path), train_dataset=data, gate_config={"m": 100})
    with pytest.raises(InputError, match="k_topk"):
        SLoRATrainer(tiny("llama"), arguments(tmp_path), train_dataset=data, gate_config=SMALL | {"k_topk": 65})
    with pytest.raises(InputError, match="unknown key 'topk'"):
        SLoRATrainer(tiny("llama"), arguments(tmp_path), train_dataset=data, gate_config={"topk": 5})
    with pytest.raises(InputError, match="train with transformers"):
        SLoRATrainer(tiny("llama"), arguments(tmp_path), train_dataset=data, gate_config=SMALL | {"enable": False})


def test_head_of_a_classifier_is_the_one_that_is_trained() -> None:
    for name in ("bert", "roberta", "distilbert"):
        model = tiny(name)
        head, kind = find_head(model)
        assert kind == "classification"
        assert head.weight.requires_grad
        seen: list[torch.Tensor] = []
        head.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output))
        logits = model(input_ids=torch.tensor([[2, 3, 4]])).logits
        torch.testing.assert_close(seen[0], logits)
        gate = HeadGradientGate(head.in_features, head.out_features, m=64, k=8, head="classification")
        assert gate.sketch.top_k == 3


# --- what the gate relies on in accelerate ---------------------------------------------------------------------------


def test_the_installed_accelerate_is_supported() -> None:
    """The range beside the hooks is the range that the package asks for, and holds the installed release."""
    required = re.search(r'"accelerate(.+?)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert required is not None
    assert required[1] == ACCELERATE
    assert importlib.metadata.version("accelerate") in SpecifierSet(ACCELERATE)
    assert "2.0.0" not in SpecifierSet(ACCELERATE)


def test_the_plain_trainer_goes_through_every_hook(tmp_path: Path) -> None:
    """One `accelerator.backward` a batch, one `optimizer.step` a window, and a schedule that asks `_is_overflow`."""
    calls: Counter[str] = Counter()

    class Spy(TrainerCallback):
        def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            step = optimizer.step

            @functools.wraps(step)
            def counted(*args: Any, **named: Any) -> Any:
                calls["step"] += 1
                step(*args, **named)
                optimizer._is_overflow = calls["step"] > 1

            optimizer.step = counted

    options = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}
    trainer = Trainer(tiny("llama"), arguments(tmp_path, **options), train_dataset=examples(12), callbacks=[Spy()])
    backward = trainer.accelerator.backward

    def counted_backward(*args: Any, **named: Any) -> None:
        calls["backward"] += 1
        backward(*args, **named)

    trainer.accelerator.backward = counted_backward
    trainer.train()
    assert calls == {"backward": 6, "step": 3}
    assert trainer.lr_scheduler.last_epoch == 1  # the schedule stood still after the first update


class Unwrapped(TrainerCallback):
    """An optimizer whose step is not the one that the gate wraps."""

    def on_step_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        optimizer.step = functools.partial(type(optimizer).step, optimizer)


@pytest.mark.filterwarnings("ignore:no gating will happen")
def test_a_hook_that_is_no_longer_called_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer() -> SLoRATrainer:
        config = SMALL | {"burn_in": 1}
        built = SLoRATrainer(tiny("llama"), arguments(tmp_path), train_dataset=examples(8), gate_config=config)
        Scripted(built, [1, 1, 0, 1])
        return built

    trainer().train()  # the control
    past_step = trainer()
    past_step.add_callback(Unwrapped())
    with pytest.raises(InputError, match=r"the optimizer stepped past the novelty gate; it needs accelerate >=1\.10"):
        past_step.train()
    renamed = trainer()
    renamed.accelerator.backward = renamed._accelerator_backward  # as if the Trainer called another method
    with pytest.raises(InputError, match=r"did not go through accelerator\.backward"):
        renamed.train()
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda optimizer: False))
    with pytest.raises(InputError, match=r"the schedule moved with a rejected step; it needs accelerate"):
        trainer().train()


# --- the oracle: the novelty of the true LoRA gradient --------------------------------------------------------------


def near_duplicates_and_originals(batches: int, seed: int = 0) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Batches of two rows: originals, or at random near copies of two rows with one token changed; 1 for the latter."""
    rng = np.random.default_rng(seed)
    is_copy, rows = rng.integers(2, size=batches), examples(2 * batches, seed=seed)
    prototypes = examples(2, seed=99)
    for batch in np.flatnonzero(is_copy):
        for place in range(2):
            row = {name: value.clone() for name, value in prototypes[place].items()}
            row["input_ids"][1] = int(rng.integers(2, 64))
            rows[2 * batch + place] = row
    for i, row in enumerate(rows):
        row["planted"] = int(is_copy[i // 2])
    return rows, is_copy


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize("unit", ["window", "micro_batch"])
def test_the_oracle_trains_on_what_it_accepts_as_if_the_rest_had_never_been(tmp_path: Path, unit: str) -> None:
    decisions, data = [1, 1, 0, 1, 0, 0, 1, 1], examples(16)
    kept = [row for i, row in enumerate(data) if decisions[i // 2]]
    ours, theirs = tiny("llama"), tiny("llama")
    settings = SMALL | {"policy": "oracle", "burn_in": 3, "unit": unit}
    gated = SLoRATrainer(ours, arguments(tmp_path), train_dataset=data, gate_config=settings)
    Scripted(gated, decisions)
    gradients = Gradients()
    gated.add_callback(gradients)
    gated.train()
    plain = Trainer(theirs, arguments(tmp_path), train_dataset=kept)
    plain.train()
    assert_same(weights(ours), weights(theirs))
    assert [all(g is None for g in seen.values()) for seen in gradients.seen] == [not d for d in decisions]
    assert gated.gate_table()["novelty"].notna().all()


def test_a_rejected_micro_batch_of_the_oracle_leaves_the_gradient_of_those_before(tmp_path: Path) -> None:
    data, gradients = examples(8), []
    for policy in ("novelty", "oracle"):
        more = {"gradient_accumulation_steps": 4}
        settings = SMALL | {"policy": policy, "burn_in": 100, "unit": "micro_batch"}
        trainer = SLoRATrainer(tiny("llama"), arguments(tmp_path, **more), train_dataset=data, gate_config=settings)
        Scripted(trainer, [1, 0, 1, 1])
        seen = Gradients()
        trainer.add_callback(seen)
        with pytest.warns(match="no gating"):
            trainer.train()
        gradients.append(seen.seen[0])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_oracles_novelty_is_that_of_the_exact_lora_gradients(tmp_path: Path) -> None:
    """Against the span of all earlier gradients, by least squares on whole vectors, at a learning rate of zero."""
    data, _ = near_duplicates_and_originals(12)
    model = tiny("llama")
    settings = {"m": 4096, "k": 30, "k_topk": 16, "reorth_every": 1, "policy": "oracle", "burn_in": 100}
    trainer = SLoRATrainer(
        model, arguments(tmp_path, learning_rate=0.0), train_dataset=data, gate_config=settings, data_collator=collate
    )
    with pytest.warns(match="no gating"):
        trainer.train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in named)
    model.eval()
    vectors = []
    for i in range(12):
        loss = model(**collate(data[2 * i : 2 * i + 2])).loss
        parts = torch.autograd.grad(loss, list(named.values()))
        vectors.append(torch.cat([part.flatten() for part in parts]).double().numpy())
    novelty = trainer.gate_table()["novelty"].to_numpy()
    assert novelty[0] == 1
    for i in range(1, 12):
        earlier = np.linalg.qr(np.stack(vectors[:i], axis=1))[0]
        unit = vectors[i] / np.linalg.norm(vectors[i])
        assert novelty[i] == pytest.approx(1 - np.sum((earlier.T @ unit) ** 2), abs=0.06)


@pytest.mark.parametrize("policy", ["oracle", "novelty"])
def test_planted_duplicates_are_known_by_their_gradients_and_random_rows_are_not(tmp_path: Path, policy: str) -> None:
    data, is_copy = near_duplicates_and_originals(140)
    settings = {"m": 256, "k": 8, "k_topk": 62, "reorth_every": 1, "burn_in": 40, "novelty_ema_rate": 0.05}
    checks = {}
    for name in ("planted", "random"):
        rows = data if name == "planted" else [
            row | {"planted": mark["planted"]} for row, mark in zip(examples(len(data), seed=5), data)
        ]  # fmt: skip
        trainer = SLoRATrainer(
            tiny("llama", targets=FEW), arguments(tmp_path, learning_rate=1e-3, remove_unused_columns=False),
            train_dataset=rows, gate_config=settings | {"policy": policy}, data_collator=collate,
        )  # fmt: skip
        trainer.train()
        table = trainer.gate_table()
        assert table["planted"].tolist() == is_copy.tolist()
        checks[name] = trainer.manipulation_check()
        gated = table.iloc[40:]
        pairs = [gated.loc[gated["planted"] == mark, "novelty"] for mark in (0, 1)]
        expected = mannwhitneyu(*pairs).statistic / (len(pairs[0]) * len(pairs[1]))
        assert checks[name]["duplicate_auc"] == pytest.approx(expected)
        assert checks[name]["novelty_beta"] == pytest.approx(2 / table["novelty"].iloc[20:40].std(ddof=0))
        if name == "planted":
            accepted = gated.groupby("planted")["accept"].mean()
            assert accepted[1] < 0.4 * accepted[0]
    assert checks["planted"]["duplicate_auc"] > 0.8
    assert checks["planted"]["choice_auc"] > 0.8
    assert abs(checks["random"]["duplicate_auc"] - 0.5) < 0.15


def test_a_state_of_the_oracle_is_none_of_a_head_sketch() -> None:
    sizes = {"d_hidden": 8, "vocab_size": 40, "m": 32, "k": 4, "k_topk": 5}
    oracle, head = (HeadGradientGate(**sizes, policy=policy) for policy in ("oracle", "novelty"))
    for gate, other in ((oracle, head), (head, oracle)):
        with pytest.raises(InputError, match="its basis means nothing here"):
            gate.load_state_dict(other.state_dict())
        gate.load_state_dict(gate.state_dict())
