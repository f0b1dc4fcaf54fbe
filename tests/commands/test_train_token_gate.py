"""`train` with per-token gates: what it leaves, resuming, thresholds, and the adapter used again, gated or static."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from sparselora.__main__ import main
from sparselora.compare.training_runs import read_runs
from sparselora.config.token_gates import TokenGateConfig
from sparselora.data.batches import Collator
from sparselora.models import lora
from sparselora.token_gates import gates as token_gate
from sparselora.token_gates.gates import attach_token_gates, save_token_gates
from sparselora.training.resume import OUTPUTS, TOKEN_GATE_OUTPUTS
from sparselora.training.trainer import FineTuner, Settings
from tests.compare.test_compare_runs import Maker
from tests.helpers.byte_llama import save_adapter, save_answering
from tests.helpers.paths import ROOT
from tests.helpers.train_command import Train

GATE = ["--token_gate.budget", "0.5"]


class Killed(BaseException):
    """Stops a run where no handler of errors sees it."""


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    return Train(
        tmp_path_factory.mktemp("token_gate"),
        "--grad_accum",
        "2",
        "--epochs",
        "3",
        "--lora_r",
        "4",
        "--group_by_length",
    )


@pytest.fixture(scope="module")
def gated(train: Train) -> Train:
    """A run with learned gates that begin after a while."""
    schedule = ["--token_gate.warmup_ratio", "0.2", "--token_gate.anneal_ratio", "0.4"]
    assert train("gated", *GATE, *schedule, "--save_steps", "8", "--eval_steps", "2") == 0
    return train


class Classifier:
    """Calls `train` and `eval` on the encoder of the tests."""

    def __init__(self, model: Path, files: tuple[Path, Path], folder: Path) -> None:
        self.model, self.folder = model, folder
        self.data = ["--dataset", str(files[0]), "--eval_file", str(files[1]), "--device", "cpu"]

    def train(self, out: str, *more: str) -> Path:
        how = ["--lora_r", "4", "--lr", "0.02", "--epochs", "4", "--train_bsz", "16", "--eval_bsz", "8"]
        arguments = ["train", "--model", str(self.model), *self.data, *how, *more]
        assert main([*arguments, "--out_dir", str(self.folder / out)]) == 0
        return self.folder / out

    def evaluate(self, adapter: Path, out: str) -> tuple[dict[str, Any], pd.DataFrame]:
        arguments = ["eval", "--model", str(self.model), *self.data, "--adapter", str(adapter)]
        assert main([*arguments, "--out_dir", str(self.folder / out)]) == 0
        metrics = json.loads((self.folder / out / "metrics_classification.json").read_text())
        return metrics, pd.read_csv(self.folder / out / "items_classification.csv")


@pytest.fixture
def classifier(tiny_bert: Path, word_files: tuple[Path, Path], tmp_path: Path) -> Classifier:
    return Classifier(tiny_bert, word_files, tmp_path)


# --- a run --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_its_gates_did(gated: Train, capsys: pytest.CaptureFixture[str]) -> None:
    folder = gated.folder / "gated"
    assert all((folder / name).is_file() for name in (*OUTPUTS, *TOKEN_GATE_OUTPUTS))
    assert set(TOKEN_GATE_OUTPUTS) <= set(gated.record("gated")["outputs"])
    summary, frequency = gated.table("gated", "summary").iloc[0], gated.table("gated", "token_gate")
    assert (summary["gate_policy"], summary["gate_budget"], summary["active_rank"]) == ("learned", 0.5, 2.0)
    # Eight modules of rank 4 and width 32 (two of them with 16 outputs in each layer): heads of 8 features.
    assert summary["gate_params"] == 8 * (8 * 4 + 4)
    assert summary["gate_flops_per_token"] == 8 * (2 * 8 * 4 + 2 * 32 * 2)
    assert summary["adapter_flops_per_token"] == 2 * 2 * (4 * 64 + 4 * 48)
    assert summary["trainable_params"] == 4 * (4 * 64 + 4 * 48) + summary["gate_params"]
    assert frequency.groupby("module")["frequency"].sum().tolist() == pytest.approx([2.0] * 8)
    assert frequency["channel"].tolist() == list(range(4)) * 8
    assert np.isfinite([summary["static_loss"], summary["static_accuracy"]]).all()
    assert summary["static_loss"] != summary["eval_loss"]


def test_gates_begin_after_the_warm_up_and_not_before(gated: Train) -> None:
    assert gated("plain", "--eval_steps", "2") == 0
    plain, run = gated.table("plain"), gated.table("gated")
    # Three of fifteen steps have every channel, and the first that falls still has.
    assert run["loss"].tolist()[:4] == plain["loss"].tolist()[:4]
    assert run["loss"].tolist()[-5:] != plain["loss"].tolist()[-5:]
    nothing = gated.table("plain", "summary").iloc[0]
    assert nothing["gate_policy"] == "none"
    assert nothing[["gate_budget", "active_rank", "gate_params", "static_loss", "static_accuracy"]].isna().all()
    assert not (gated.folder / "plain" / "token_gate.csv").exists()


def test_budget_one_trains_as_without_gates(gated: Train, tmp_path: Path) -> None:
    for out, more in (("plain", []), ("one", ["--token_gate.budget", "1"])):
        assert gated(str(tmp_path / out), *more, "--max_steps", "4") == 0
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_dry_run_names_the_files(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *train.arguments, *GATE, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert all(str(Path(name)) in printed for name in TOKEN_GATE_OUTPUTS)


def test_thresholds_are_set_when_gating_begins(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    calibrate = token_gate.calibrate

    def counted(model: Any, batches: Any) -> None:
        calls.append(model.token_gates.budget)
        before = [gate.head.bias.clone() for gate in model.token_gates]
        calibrate(model, batches)
        assert not any(torch.equal(old, gate.head.bias) for old, gate in zip(before, model.token_gates))

    monkeypatch.setattr("sparselora.training.run.calibrate", counted)
    threshold = [*GATE, "--token_gate.select", "threshold"]
    assert train("threshold", *threshold, "--token_gate.warmup_ratio", "0.4") == 0
    assert calls == [0.5]
    assert 1.2 < train.table("threshold", "summary")["active_rank"].iloc[0] < 2.8
    # A run that is all warm-up is evaluated with gates nevertheless.
    assert train("late", *threshold, "--token_gate.warmup_ratio", "1", "--max_steps", "3") == 0
    assert calls == [0.5, 0.5]
    assert train("topk", *GATE, "--max_steps", "1") == 0
    assert len(calls) == 2


def test_the_adapter_is_turned_when_gating_begins(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, in place and with its optimizer, whose moments of the factors are gone."""
    seen = []
    turn = lora.turn_to_singular

    def watched(model: Any, optimizer: Any, adapter: str) -> None:
        factors = [weight for layer in lora.lora_layers(model).values() for weight in lora.weights(layer)]
        assert all(weight in optimizer.state for weight in factors)
        turn(model, optimizer, adapter)
        seen.append((model.token_gates.budget, any(weight in optimizer.state for weight in factors)))

    monkeypatch.setattr(lora, "turn_to_singular", watched)
    flags = [*GATE, "--token_gate.policy", "static", "--token_gate.warmup_ratio", "0.4"]
    assert train("singular", *flags, "--token_gate.basis", "singular") == 0
    assert seen == [(0.5, False)]
    folder = train.folder / "singular" / "adapter"
    factors = load_file(folder / "adapter_model.safetensors")
    named = [name for name in factors if name.endswith("lora_A.weight")]
    energies = [factors[n].norm(dim=1) * factors[n.replace("lora_A", "lora_B")].norm(dim=0) for n in named]
    assert np.mean([int(e.topk(2).indices.sort().values.tolist() == [0, 1]) for e in energies]) > 0.9
    assert train("channels", *flags) == 0
    assert (
        train.table("channels", "summary")["eval_loss"].iloc[0]
        != train.table("singular", "summary")["eval_loss"].iloc[0]
    )


# --- resuming -----------------------------------------------------------------------------------------------------

RESUMED = {
    "learned": [],
    "random": ["--token_gate.policy", "random"],
    "static": ["--token_gate.policy", "static"],
    "threshold": ["--token_gate.select", "threshold", "--token_gate.supervision", "gradient"],
    "singular": ["--token_gate.basis", "singular"],
    "routed": ["--token_gate.policy", "routed", "--token_gate.anneal_ratio", "0"],
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_run_is_the_uninterrupted_one(train: Train, tmp_path: Path, case: str) -> None:
    arguments = [*GATE, "--token_gate.warmup_ratio", "0.2", "--token_gate.anneal_ratio", "0.2", *RESUMED[case]]
    arguments += ["--save_steps", "4", "--eval_steps", "3", "--lora_dropout", "0.1"]
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    assert train(whole, *arguments) == 0
    train.kill_in_step(10, broken, *arguments)
    assert train(broken, *arguments, "--resume") == 0
    for name, columns in (("metrics", ["step", "loss", "lr", "tokens"]), ("eval", None), ("token_gate", None)):
        one, two = (train.table(out, name) for out in (whole, broken))
        pd.testing.assert_frame_equal(one[columns or list(one)], two[columns or list(two)], check_exact=True)
    files = [name for name in (*OUTPUTS, *TOKEN_GATE_OUTPUTS) if name.endswith(".safetensors")]
    assert len(files) == 3
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_a_checkpoint_without_its_gates_is_not_resumed_from(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    arguments = [*GATE, "--save_steps", "2", "--max_steps", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "evaluate_last", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(run, *arguments)
    (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "token_gate.safetensors").unlink()
    capsys.readouterr()
    assert train(run, *arguments, "--resume") == 0
    error = capsys.readouterr().err
    assert "checkpoint-4 is not whole (token_gate.safetensors" in error
    assert "checkpoint-2" in error


# --- the adapter again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["learned", "static", "routed"])
def test_a_gated_classifier_gives_its_predictions_again(
    classifier: Classifier, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # With a warm-up: what a static gate leaves out from the first step is never trained, and its B stays 0.
    gate = [*GATE, "--token_gate.policy", policy, "--token_gate.warmup_ratio", "0.5"]
    run = classifier.train("run", *gate, "--use_rslora")
    predictions, summary = pd.read_csv(run / "predictions.csv"), pd.read_csv(run / "summary.csv").iloc[0]
    capsys.readouterr()
    metrics, items = classifier.evaluate(run / "adapter", "again")
    assert "gated per token, active rank 2.00 of 4" in capsys.readouterr().out
    assert items["predicted"].tolist() == predictions["predicted"].tolist()
    assert items["loss"].tolist() == pytest.approx(predictions["loss"].tolist(), rel=1e-4, abs=1e-6)
    assert (metrics["gate_policy"], metrics["active_rank"]) == (policy, summary["active_rank"])
    # The subset is a plain adapter, and gives what the run said of it.
    metrics, _ = classifier.evaluate(run / "adapter_static", "static")
    assert "gated per token" not in capsys.readouterr().out
    assert "gate_policy" not in metrics
    assert metrics["loss"] == pytest.approx(summary["static_loss"], rel=1e-5)
    assert metrics["accuracy"] == summary["static_accuracy"]
    if policy == "static":
        assert summary["static_loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    # The control: without its gates the adapter is another model.
    for path in (run / "adapter").glob("token_gate.*"):
        path.unlink()
    assert classifier.evaluate(run / "adapter", "bare")[0]["loss"] != pytest.approx(summary["eval_loss"], rel=1e-4)


def test_the_static_adapter_is_one_that_plain_peft_loads(classifier: Classifier) -> None:
    folder = classifier.train("run", *GATE) / "adapter_static"
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(classifier.model), folder)
    assert {m.shape[0] for name, m in model.named_parameters() if "lora_A" in name} == {2}
    assert not any("gate" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_a_gated_decoder_gives_its_loss_again(gated: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = gated.table("gated", "summary").iloc[0]
    flags = ["--dataset", str(gated.train), "--eval_file", str(gated.dev), "--task", "causal_lm", "--device", "cpu"]
    for name, loss in (("adapter", "eval_loss"), ("adapter_static", "static_loss")):
        adapter, out = gated.folder / "gated" / name, tmp_path / name
        command = ["eval", "--model", str(gated.model), "--adapter", str(adapter), *flags]
        assert main([*command, "--out_dir", str(out)]) == 0
        metrics = json.loads((out / "metrics_causal_lm.json").read_text())
        assert metrics["loss"] == pytest.approx(summary[loss], rel=1e-4)
        assert ("gated per token, active rank 2.00 of 4" in capsys.readouterr().out) == (name == "adapter")


def test_answers_are_generated_with_the_gates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_answering(tmp_path / "answering", "#### 7")
    adapter = save_adapter(tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    attach_token_gates(model, TokenGateConfig(budget=0.25))
    save_token_gates(model, adapter)
    rows = [json.dumps({"question": f"{i} and {i}?", "answer": "#### 7"}) for i in range(4)]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(rows))
    flags = ["--eval_file", str(tmp_path / "gsm8k.jsonl"), "--task", "gsm8k", "--fewshot", "0", "--max_new_tokens", "8"]
    command = ["eval", "--model", str(base), "--adapter", str(adapter), *flags, "--device", "cpu"]
    assert main([*command, "--out_dir", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics_gsm8k.json").read_text())
    assert (metrics["active_rank"], metrics["rank"], metrics["backend"]) == (1.0, 4.0, "transformers")
    printed = capsys.readouterr().out
    assert "gated per token, active rank 1.00 of 4" in printed
    assert "lm_eval" not in printed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert main([*command, "--backend", "vllm", "--out_dir", str(tmp_path / "vllm")]) == 2
    assert "--backend vllm does not gate per token" in capsys.readouterr().err
    assert not (tmp_path / "vllm").exists()


# --- objectives ---------------------------------------------------------------------------------------------------


class _Gradients(TrainerCallback):
    def __init__(self, model: Any) -> None:
        self.model, self.found = model, {}

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        heads = self.model.token_gates.named_parameters()
        self.found = {name: p.grad.clone() for name, p in heads if p.grad is not None}


def head_gradients(model: Any, folder: Path, causal: bool, config: TokenGateConfig, accumulate: int) -> Any:
    """Gradients of the heads in the first step over four texts of one length, in batches of 4/``accumulate``."""
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    targets = ["q_proj", "v_proj"] if causal else ["query", "value"]
    lora = LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM" if causal else "SEQ_CLS"
    )
    still = {} if causal else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    adapted = get_peft_model(kind.from_pretrained(model, **still), lora)
    attach_token_gates(adapted, config)
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 40, 8).tolist() for _ in range(4)]
    examples = [{"input_ids": r, "labels": [-100] * 4 + r[4:] if causal else i % 2} for i, r in enumerate(rows)]
    callback = _Gradients(adapted)
    settings = Settings(
        folder, causal, torch.device("cpu"), train_bsz=4 // accumulate, grad_accum=accumulate, max_steps=1
    )
    trainer = FineTuner(adapted, None, examples, [], Collator(2, causal), settings, callbacks=[callback])
    trainer.args.max_grad_norm = 0.0  # what is looked at would be clipped
    trainer.run()
    return torch.cat([g.flatten() for g in callback.found.values()])


@pytest.mark.parametrize("causal", [False, True])
def test_objectives_reach_the_heads_through_accumulation(
    train: Train, tiny_bert: Path, tmp_path: Path, causal: bool
) -> None:
    model = train.model if causal else tiny_bert

    def gradients(accumulate: int, **settings: Any) -> torch.Tensor:
        config = TokenGateConfig(budget=0.5, **settings)
        return head_gradients(model, tmp_path, causal, config, accumulate)

    task = {n: gradients(n) for n in (1, 2)}
    torch.testing.assert_close(task[1], task[2], rtol=1e-4, atol=1e-7)
    for supervision in ("energy", "gradient"):
        added = {n: gradients(n, supervision=supervision, match_weight=2.0) - task[n] for n in (1, 2)}
        assert added[2].abs().max() > 1e-4
        torch.testing.assert_close(added[1], added[2], rtol=1e-3, atol=1e-6)  # as in one batch of all
        twice = gradients(2, supervision=supervision, match_weight=4.0) - task[2]
        torch.testing.assert_close(twice, 2 * added[2], rtol=1e-3, atol=1e-6)
    free, held = (gradients(2, select="threshold", penalty=penalty) for penalty in (0.0, 10.0))
    assert (held - free).abs().max() > 1e-4


# --- several runs and processes -----------------------------------------------------------------------------------


def test_labels_tell_policy_and_budget_apart(tmp_path: Path) -> None:
    make = Maker(tmp_path, "causal_lm")
    settings = [
        TokenGateConfig(policy="learned", budget=0.5),
        TokenGateConfig(policy="learned", budget=0.25),
        TokenGateConfig(policy="random", budget=0.5),
    ]
    settings += [TokenGateConfig(policy="static"), TokenGateConfig(policy="static", basis="singular")]
    paths = [make("plain", 0)]
    paths += [make(f"g{i}", 0, token_gate=config.to_dict()) for i, config in enumerate(settings)]
    labels = [group.label for group in read_runs(paths).groups]
    assert labels == [
        "plain PEFT", "token gate learned gate_budget=0.5", "token gate learned gate_budget=0.25", "token gate random",
        "token gate static gate_basis=channels", "token gate static gate_basis=singular",
    ]  # fmt: skip


_FLIPPED = """
import os, sys
from sparselora.models import lora
from sparselora.__main__ import main
turn = lora.turn_to_singular

def flipped(model, optimizer, adapter):
    turn(model, optimizer, adapter)
    if os.environ["RANK"] == "1":
        for layer in lora.lora_layers(model, adapter).values():
            for weight in lora.weights(layer, adapter):
                weight.data.neg_()

lora.turn_to_singular = flipped
sys.exit(main(sys.argv[1:]))
"""
"""`train`, but the singular directions of the second process come out with the other sign, as they may."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ([], 1e-3),
        (
            ["--token_gate.select", "threshold"],
            0.15,
        ),  # some decisions near a threshold differ, and what follows from them
        (["--token_gate.policy", "energy", "--token_gate.basis", "singular"], 1e-4),
    ],
)
def test_two_processes_train_as_one_with_twice_the_batch(
    train: Train, tmp_path: Path, settings: list[str], tolerance: float
) -> None:
    (tmp_path / "flipped.py").write_text(_FLIPPED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [*train.arguments, *GATE, "--token_gate.warmup_ratio", "0.2", *settings]
    two = [str(tmp_path / "flipped.py"), "train", *arguments, "--train_bsz", "2", "--out_dir", str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *two], capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["train", *arguments, "--out_dir", str(tmp_path / "one")]) == 0
    one, both = (pd.read_csv(tmp_path / out / "summary.csv").iloc[0] for out in ("one", "two"))
    for name in ("eval_loss", "active_rank", "static_loss"):
        assert both[name] == pytest.approx(one[name], rel=tolerance), name
