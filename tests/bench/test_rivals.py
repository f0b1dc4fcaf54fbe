"""Other trainers in processes of their own: the same rows, the same loss, and nothing of theirs stops a bench.

The stand-ins are packages of a trainer's name on PYTHONPATH; the real ones are PEFT, and TRL where it is installed.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import subprocess
import sys
import time
import types
from pathlib import Path

import pandas as pd
import pytest
import torch

from sparselora.__main__ import main
from sparselora.bench import against
from sparselora.bench.against import against_lines, against_table, our_cases, rival_cases
from sparselora.bench.rivals import RIVALS, axolotl, child, processes
from sparselora.bench.rivals.batches import case_batches
from sparselora.bench.rivals.jobs import Case, Job, cases
from sparselora.bench.rivals.prepared import base_model, decoder_layers, with_adapter
from sparselora.bench.rivals.processes import Answer, Measured, run_rival
from sparselora.bench.timing import StepTimes, TimedModel, adapt, build_model, convert_with
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Workload
from sparselora.models.architectures import SHAPES
from tests.helpers.tiny_llama import make_tiny_llama
from tests.test_pages import check_columns

TINY = {**SHAPES["llama-7b"], "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
WORK = Workload(3, 16, 4)
EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def job(rival: str, **settings: object) -> Job:
    values = {
        "rival": rival, "source": TINY, "vocabulary": 50, "rank": 2, "alpha": 4.0, "targets": None, "device": "cpu",
        "bf16": False, "rounds": 2, "warmup": 1, "seed": 0, "cases": rival_cases(rival, cases(WORK)),
    }  # fmt: skip
    return Job(**values | settings)


# --- batches ------------------------------------------------------------------------------------------------------


def test_padded_and_packed_rows_are_the_same_tokens_and_labels():
    for labelled in (4, 16):
        padded, packed = (case_batches(50, Case(layout, 3, 16, labelled), seed=1)[0] for layout in ("padded", "packed"))
        valid = padded["attention_mask"].bool()
        assert torch.equal(padded["input_ids"][valid][None], packed["input_ids"])
        assert torch.equal(padded["labels"][valid][None], packed["labels"])
        assert (padded["labels"][~valid] == -100).all()
        assert valid.sum(dim=1).tolist() == [16, 12, 8]
        assert (packed["position_ids"] == 0).sum() == 3
        starts = packed["position_ids"][0] == 0
        assert (packed["labels"][0][starts] == -100).all()  # no row predicts the beginning of the next
        assert (padded["labels"] != -100).sum() == ((4 + 3 + 2) if labelled == 4 else 36 - 3)


def test_full_rows_are_all_of_one_length_and_batches_differ_in_tokens_alone():
    first, second = case_batches(50, Case("full", 2, 16, 4), seed=1)
    assert first["input_ids"].shape == (2, 16)
    assert first["attention_mask"].all()
    assert not torch.equal(first["input_ids"], second["input_ids"])
    ragged = case_batches(50, Case("packed", 5, 16, 16), seed=1)
    assert len({batch["input_ids"].shape for batch in ragged}) == 1


def test_every_rival_is_timed_on_the_rows_it_can_take():
    assert [(case.layout, case.labelled) for case in cases(WORK)] == [
        (layout, labelled) for labelled in (4, 16) for layout in ("full", "padded", "packed")
    ]
    assert len(cases(Workload(3, 16, 16))) == 3  # all are labelled as it is
    assert cases(WORK, ["padded-all", "full"]) == (Case("full", 3, 16, 4), Case("padded", 3, 16, 16))
    assert our_cases(cases(WORK, ["packed", "full-all"])) == (Case("padded", 3, 16, 4), Case("full", 3, 16, 16))
    assert {case.layout for case in our_cases(cases(WORK))} == {"full", "padded"}
    assert {name: any(case.layout == "packed" for case in rival_cases(name, cases(WORK))) for name in RIVALS} == {
        "unsloth": False, "trl": True, "axolotl": True, "liger": True, "peft": True,
    }  # fmt: skip


# --- one rival's steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rival", ["peft", "trl"])
def test_a_rival_computes_the_loss_of_our_dense_step_in_every_layout(rival):
    if importlib.util.find_spec(RIVALS[rival].modules[0]) is None:
        pytest.skip(f"{rival} is not installed")
    answers: list[dict] = []
    child.run(job(rival), answers.append)
    described, *measured = answers
    assert described["versions"]["torch"] == torch.__version__
    assert [answer["case"] for answer in measured] == list(range(6))
    losses = {}
    for answer, case in zip(measured, rival_cases(rival, cases(WORK))):
        assert "error" not in answer, answer
        assert len(answer["step_ms"]) == 2
        assert min(answer["step_ms"]) > 0
        losses[case] = answer["loss"]
    model = build_model(TINY, causal=True, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    torch.manual_seed(0)
    adapted = adapt(model, r=2, alpha=4.0, targets=None, causal=True)
    ours = TimedModel(adapted, torch.device("cpu"), bf16=False, convert=convert_with(SparsityConfig(mode="dense")))
    for case in our_cases(cases(WORK)):
        ours.step(case_batches(50, case, seed=0)[0])
        assert losses[case] == pytest.approx(float(ours.loss), abs=2e-3)
        if case.layout == "padded":
            packed = Case("packed", case.batch, case.seq, case.labelled)
            assert losses[packed] == pytest.approx(losses[case], abs=2e-3)
    assert max(losses.values()) - min(losses.values()) > 5e-3  # the control: other rows have other losses


def test_every_layer_that_computes_by_kernels_is_compiled(monkeypatch):
    """torch.compile gives up after some versions of one function: here two, as the first layer's input has no gradient.

    The control is a forward of each layer's own, of which the first two are compiled.
    """
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    kernels = types.ModuleType("axolotl.kernels.lora")
    kernels.apply_lora_qkv = lambda attention, x: (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
    kernels.apply_lora_o = lambda attention, x: attention.o_proj(x.relu() - (-x).relu())
    kernels.apply_lora_mlp_swiglu = lambda ffn, x: ffn.down_proj(ffn.act_fn(ffn.gate_proj(x)) * ffn.up_proj(x))
    graphs, passes = [], []

    def backend(graph, inputs):
        graphs.append(graph.code.count(".relu()"))

        def run(*values):
            passes.append(graph)
            return graph.forward(*values)

        return run

    work = job(
        "axolotl", source={**TINY, "num_hidden_layers": 3}, targets=EVERY_LINEAR,
        cases=cases(Workload(2, 16, 4), ["full"]),
    )  # fmt: skip
    models = {name: with_adapter(base_model(work), work) for name in ("plain", "kernels", "control")}
    axolotl.put_in_kernels(decoder_layers(models["kernels"]), kernels)
    for layer in decoder_layers(models["control"]):
        axolotl.put_in_kernels([layer], kernels)
    losses, relus, compiled = {}, {}, {}
    for name, model in models.items():
        torch.compiler.reset()
        graphs.clear()
        passes.clear()
        for layer in decoder_layers(model):
            layer.compile(dynamic=False, backend=backend)
        losses[name] = [model(**case_batches(50, case, seed=0)[0]).loss.item() for case in work.cases]
        relus[name], compiled[name] = graphs.copy(), len(passes)
    torch.compiler.reset()
    assert losses["kernels"] == pytest.approx(losses["plain"], abs=1e-5)
    assert relus["kernels"] == [2, 2]
    assert relus["plain"] == [0, 0]  # nothing of transformers itself is patched
    assert compiled["kernels"] == compiled["plain"] == 3
    assert compiled["control"] == 2


# --- processes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Write a package ``unsloth`` whose import runs a text, for this process and those it starts."""

    def write(text: str) -> None:
        folder = tmp_path / "path" / "unsloth"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(str(folder.parent))
        monkeypatch.setenv("PYTHONPATH", str(folder.parent))

    return write


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(processes.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda _: None)
    assert run_rival(job("liger")).skipped == "liger_kernel is not installed"


def test_a_failure_has_its_reason_and_versions(stand_in):
    stand_in("__version__ = '7.8'\nprint('a banner')\nraise RuntimeError('needs\\na GPU')")
    answer = run_rival(job("unsloth"))
    assert answer.skipped == "RuntimeError: needs a GPU"
    assert answer.versions["torch"] == torch.__version__
    assert not answer.measured


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL"),
        ("import os, sys\nsys.stderr.write('out of luck\\n')\nsys.stderr.flush()\nos._exit(3)",
         "ended with status 3: out of luck"),
    ],
)  # fmt: skip
def test_a_process_that_dies_has_its_reason(stand_in, text, reason):
    stand_in(text)
    assert run_rival(job("unsloth")).skipped == reason


def test_a_process_that_takes_too_long_is_ended_with_all_it_started(stand_in, tmp_path):
    pids = tmp_path / "pids"
    stand_in(
        "import os, subprocess, time\n"
        "helper = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{helper.pid}}')\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    assert run_rival(job("unsloth"), 3.0).skipped == "took longer than 3 s and was stopped"
    assert time.monotonic() - began < 30
    left = pids.read_text().split()
    while left and time.monotonic() - began < 30:  # a killed process takes its time to go
        left = [pid for pid in left if is_running(pid)]
    assert left == []


def is_running(pid: str) -> bool:
    try:
        return "zombie" not in Path("/proc", pid, "status").read_text()
    except OSError:
        return False


def test_the_trainer_is_the_first_to_import_transformers():
    code = "import sparselora.bench.rivals.child, sys; print(*({'torch', 'transformers', 'peft'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


UNSLOTH = """
import torch
from types import SimpleNamespace
__version__ = "1.2.3"
print("a banner that is no JSON")

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
    def forward(self, input_ids, labels, attention_mask=None):
        if labels.ne(-100).all():
            raise ValueError("all labelled")
        if attention_mask is not None and attention_mask.all():
            raise ValueError("a mask of nothing")
        return SimpleNamespace(loss=(self.weight * 2).sum())

class FastLanguageModel:
    @staticmethod
    def from_pretrained(source, **settings):
        assert settings["max_seq_length"] == 16 and source == "a-model"
        return Model(), None
    @staticmethod
    def get_peft_model(model, **settings):
        assert settings["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"] and settings["r"] == 2
        return model
    @staticmethod
    def for_training(model):
        model.train()
"""


def test_a_case_that_fails_leaves_the_others(stand_in):
    stand_in(UNSLOTH)
    full, other = Case("full", 2, 16, 4), Case("padded", 2, 16, 4)
    answer = run_rival(job("unsloth", source="a-model", cases=(full, other, Case("packed", 2, 16, 4))))
    assert answer.skipped is None
    assert answer.versions["unsloth"] == "1.2.3"
    assert answer.measured.keys() == {full, other}
    assert answer.measured[full].loss == pytest.approx(6.0)
    assert math.isnan(answer.measured[full].peak_mb)
    (reason,) = answer.failed.values()  # packed rows have positions, which it does not know
    assert reason.startswith("TypeError: ")
    assert "position_ids" in reason


# --- the table ----------------------------------------------------------------------------------------------------


def test_speed_is_compared_with_the_best_rival_on_the_same_rows():
    """Rivals need 10 ms padded and 5 packed for the same 12 tokens; ours 4, and 20 for other rows, at best 10."""
    padded, packed, full = (Case(layout, 2, 8, 2) for layout in ("padded", "packed", "full"))
    assert (padded.tokens, full.tokens) == (12, 16)

    def steps(ms: float, loss: float) -> Measured:
        return Measured((ms, ms, ms), loss, 100.0)

    answers = {
        "trl": Answer({"trl": "1"}, "fused", {padded: steps(10, 3.0), packed: steps(5, 3.0), full: steps(10, 9.0)}),
        "peft": Answer({"peft": "2"}, "plain", {full: steps(12, 3.0)}, {padded: "out of memory"}),
        "liger": Answer(skipped="liger_kernel is not installed"),
    }
    ours = {
        padded: {name: StepTimes([4.0], [0.0], [0.0], loss=3.0) for name in ("PEFT", "dense")},
        full: {name: StepTimes([20.0], [0.0], [0.0], loss=3.0) for name in ("PEFT", "dense")},
    }
    table = against_table(ours, answers)
    speedups = table.set_index(["trainer", "layout"])["speedup"]
    assert speedups["ours: dense", "padded"] == pytest.approx(5 / 4)
    assert speedups["trl", "padded"] == pytest.approx(1 / 2)
    assert speedups["trl", "packed"] == pytest.approx(1)
    assert speedups["ours: dense", "full"] == pytest.approx(1 / 2)
    text = "\n".join(against_lines(table, answers))
    assert "left out: liger: liger_kernel is not installed" in text
    assert "left out: peft, padded, 2 labelled: out of memory" in text
    assert "trl: fused (trl 1)" in text
    assert "trl, full, 2 labelled: its loss is 9.000" in text
    assert text.count("its loss is") == 1


# --- the command --------------------------------------------------------------------------------------------------


def test_a_bench_against_rivals_writes_their_times_and_versions(tmp_path, capsys, stand_in):
    stand_in("raise ImportError('no GPU here')")
    llama, out = make_tiny_llama(tmp_path / "llama"), tmp_path / "out"
    flags = ["--train_bsz", "2", "--seq", "8", "--rounds", "1", "--warmup", "1", "--device", "cpu", "--lora_r", "2"]
    status = main(["bench", "--model", str(llama), *flags, "--against", "unsloth,peft", "--out_dir", str(out)])
    text = capsys.readouterr().out
    assert status == 0
    assert "left out: unsloth: ImportError: no GPU here" in text
    table = pd.read_csv(out / "against.csv")
    assert set(table["trainer"]) == {"PEFT as it is", "ours: dense", "peft"}
    assert len(table) == 4 * 2 + 6
    assert table[table["trainer"] == "peft"]["versions"].str.contains("transformers ").all()
    record = json.loads((out / "run.json").read_text())
    assert record["rivals"]["peft"]["torch"] == torch.__version__
    assert "its loss is" not in text
    check_columns(out)


def test_a_stopped_run_keeps_the_trainers_it_has_timed_and_leaves_them_the_memory(tmp_path, monkeypatch, capsys):
    llama, out = make_tiny_llama(tmp_path / "llama"), tmp_path / "out"
    left = []

    def answer(work, limit_s):
        left.append([x for x in gc.get_objects() if type(x).__name__ == "LlamaForCausalLM"])
        if work.rival == "peft":
            raise KeyboardInterrupt
        assert (work.cases, limit_s) == ((Case("full", 2, 8, 8),), 7.0)
        return Answer({"trl": "1"}, "fused", {work.cases[0]: Measured((2.0, 4.0), 3.0, 1.0)})

    monkeypatch.setattr(against, "run_rival", answer)
    gc.collect()
    before = len([x for x in gc.get_objects() if type(x).__name__ == "LlamaForCausalLM"])
    flags = ["--train_bsz", "2", "--seq", "8", "--rounds", "1", "--warmup", "1", "--device", "cpu", "--lora_r", "2"]
    flags += ["--combinations", "--cases", "full-all", "--rival_limit_s", "7"]
    status = main(["bench", "--model", str(llama), *flags, "--against", "trl,peft", "--out_dir", str(out)])
    assert status == 130, capsys.readouterr().err
    assert [len(models) - before for models in left] == [0, 0]
    table = pd.read_csv(out / "against.csv")
    assert (table["layout"] + table["labelled"].map(str)).unique().tolist() == ["full8"]
    assert table["trainer"].tolist()[-1] == "trl"
    assert "ours: dense" in table["trainer"].tolist()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shape", "llama-7b", "--cases", "full"], "--cases is for times of other trainers"),
        (["--shape", "llama-7b", "--explain", "--rival_limit_s", "9"], "--rival_limit_s is for times of other"),
        (["--shape", "llama-7b", "--against", "peft", "--rival_limit_s", "-9"], "above 0, got -9"),
        (["--shape", "llama-7b", "--against", "unslooth"], "did you mean 'unsloth'"),
        (["--shape", "llama-7b", "--against", "peft,"], "without --flops it takes trainers"),
        (["--shape", "llama-7b", "--against", "some.yaml"], "unsloth,trl,axolotl,liger,peft"),
        (["--shape", "distilbert", "--seq", "8", "--against", "peft"], "distilbert is an encoder"),
    ],
)
def test_a_wrong_rival_is_one_line_and_status_two(tmp_path, capsys, flags, words):
    status = main(["bench", *flags, "--out_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert words in error
    assert not (tmp_path / "out").exists()
