"""Options of `train` that transformers, PEFT, torch and bitsandbytes compute: held against those, step by step."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from sparselora.__main__ import main
from sparselora.data.batches import Collator
from sparselora.data.instructions import encode_instructions, load_instructions, used_template
from sparselora.errors import InputError
from sparselora.models.attach import attach_lora
from sparselora.models.load import head_modules, load_causal_lm
from sparselora.models.target_modules import resolve_target_modules
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

STEPS, LR = 4, 0.02


class Study:
    """Calls `train` on a tiny Llama and six rows, which are one batch: every step sees them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = str(make_tiny_llama(folder / "llama"))
        self.train, self.dev = (str(write_instructions(folder / f"{n}.jsonl", r, r)) for n, r in (("t", 6), ("d", 7)))

    def __call__(self, out: str, *arguments: str) -> int:
        return main([
            "train", "--task", "causal_lm", "--model", self.model, "--dataset", self.train, "--eval_file", self.dev,
            "--train_bsz", "6", "--epochs", str(STEPS), "--lr", str(LR), "--lora_r", "4", "--lora_alpha", "8",
            "--scheduler", "constant", "--device", "cpu", "--out_dir", str(self.folder / out), *arguments,
        ])  # fmt: skip

    def adapter(self, out: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / out / "adapter" / "adapter_model.safetensors")

    def table(self, out: str, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / out / name)

    def batch(self, path: str) -> dict[str, torch.Tensor]:
        tokenizer = load_causal_lm(self.model)[1]
        data = load_instructions(path, eval_file=self.dev, template=used_template(None))
        return Collator(2, causal=True).tensors(encode_instructions(data.train, tokenizer, 64).examples)

    def loss(self, out: str, model: Any = None) -> float:
        """Loss per label on the held-out rows, of PEFT's model with the adapter in ``out``."""
        base = AutoModelForCausalLM.from_pretrained(self.model)
        adapted = PeftModel.from_pretrained(base, self.folder / out / "adapter") if model is None else model
        with torch.no_grad():
            return float(adapted.eval()(**self.batch(self.dev)).loss)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("options"))


def by_hand(study: Study, optimizer: Any, *, norm: float = 1.0, factors: list[float] | None = None) -> Any:
    """Train with a loop of a few lines; ``optimizer`` makes one of named parameters, ``factors`` scale its rates."""
    torch.manual_seed(0)
    model = load_causal_lm(study.model)[0]
    targets = resolve_target_modules(model, None)
    adapted = attach_lora(
        model, r=4, alpha=8, dropout=0.0, target_modules=targets, base_model="x", task_type="CAUSAL_LM"
    ).train()
    steps = optimizer([(name, p) for name, p in adapted.named_parameters() if p.requires_grad])
    rates, batch = [group["lr"] for group in steps.param_groups], study.batch(study.train)
    for i in range(STEPS):
        for group, rate in zip(steps.param_groups, rates):
            group["lr"] = rate * (factors[i] if factors else 1.0)
        adapted(**batch).loss.backward()
        if norm:
            torch.nn.utils.clip_grad_norm_([p for p in adapted.parameters() if p.requires_grad], norm)
        steps.step()
        steps.zero_grad()
    return adapted


def all_of(kind: Any, **settings: Any) -> Any:
    return lambda named: kind([p for _, p in named], lr=LR, **settings)


def loraplus(named: Any) -> Any:
    sides = [[p for name, p in named if side in name] for side in ("lora_A", "lora_B")]
    return torch.optim.AdamW([{"params": sides[0]}, {"params": sides[1], "lr": 4 * LR}], lr=LR, weight_decay=0.0)


def bitsandbytes_adamw(named: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason="8-bit optimizers need the package bitsandbytes")
    return bnb.optim.AdamW([p for _, p in named], lr=LR, weight_decay=0.0, optim_bits=8)


FALL = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / STEPS)) for i in range(STEPS)]
HANDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "adamw": ([], {"optimizer": all_of(torch.optim.AdamW, weight_decay=0.0)}),
    "8 bits": (["--optim", "adamw_8bit"], {"optimizer": bitsandbytes_adamw}),
    "momentum": (
        ["--optim", "sgd", "--optim_args", "momentum=0.9"], {"optimizer": all_of(torch.optim.SGD, momentum=0.9)},
    ),
    "muon": (
        ["--optim", "muon", "--weight_decay", "0.3", "--optim_args", "momentum=0.8"],
        {"optimizer": lambda named: torch.optim.Muon([p for _, p in named], lr=LR, momentum=0.8, weight_decay=0.3)},
    ),
    "clipped": (
        ["--optim", "sgd", "--max_grad_norm", "0.01"], {"optimizer": all_of(torch.optim.SGD), "norm": 0.01}
    ),
    "not clipped": (["--optim", "sgd", "--max_grad_norm", "0"], {"optimizer": all_of(torch.optim.SGD), "norm": 0.0}),
    "loraplus": (["--loraplus_lr_ratio", "4"], {"optimizer": loraplus}),
    "schedule": (
        ["--scheduler", "cosine_with_min_lr", "--scheduler_kwargs", "min_lr_rate=0.1"],
        {"optimizer": all_of(torch.optim.AdamW, weight_decay=0.0), "factors": FALL},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDS)
def test_an_optimizer_or_schedule_moves_the_adapter_as_a_loop_by_hand(study: Study, name: str) -> None:
    arguments, settings = HANDS[name]
    assert study(name, *arguments) == 0
    stored = study.adapter(name)
    adapted = by_hand(study, **settings)
    scaling = 2.0  # alpha / r, folded into B
    for key, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            own = stored[key.replace(".default", "")] / (scaling if "lora_B" in key else 1.0)
            torch.testing.assert_close(own, parameter.detach(), rtol=2e-4, atol=2e-6)
    control = by_hand(study, all_of(torch.optim.SGD, weight_decay=0.5))
    assert any(
        not torch.allclose(stored[key.replace(".default", "")], p, rtol=2e-4, atol=2e-6)
        for key, p in control.named_parameters()
        if "lora_A" in key
    )


def test_neftune_is_the_same_noise_in_a_packed_pass(study: Study) -> None:
    assert study("quiet") == 0
    assert study("noise", "--neftune_noise_alpha", "8") == 0
    assert study("packed", "--neftune_noise_alpha", "8", "--sparsity.mode", "dense") == 0
    losses = {out: study.table(out, "metrics.csv")["loss"].to_numpy() for out in ("quiet", "noise", "packed")}
    assert losses["packed"] == pytest.approx(losses["noise"], abs=2e-5)
    assert abs(losses["quiet"] - losses["noise"]).min() > 1e-4
    sparse = ["--sparsity.mode", "static", "--sparsity.ffn_sparsity", "0.5"]
    assert study("sparse", "--neftune_noise_alpha", "8", *sparse) == 0
    assert study.table("sparse", "summary.csv")["mode"].iloc[0] == "static"


REFUSED = {
    "optim nonsense": "unknown optim 'nonsense'",
    "optim galore_adamw": "optim galore_adamw cannot be used here",
    "optim paged_adamw_8bit": "the device is a CPU; use adamw_8bit",
    "optim sgd --optim_args colour=3": "colour=3 changes nothing of optim sgd",
    "optim sgd --optim_args momentum": "optim_args takes NAME=VALUE",
    "optim muon --optim_args colour=3": "optim muon cannot be used here",
    "scheduler cosine_with_min_lr": "scheduler cosine_with_min_lr: One of min_lr",
    "scheduler linear --scheduler_kwargs power=2": "scheduler linear has no settings, got scheduler_kwargs power",
    "scheduler polynomial --scheduler_kwargs colour=2": "unexpected keyword argument 'colour'",
    "report_to trackio": "report_to trackio needs the package trackio; install it",
    "use_dora --sparsity.mode static": "use_dora and sparsity are both given",
    "init_lora_weights pissa --load_in_4bit": "load_in_4bit and init_lora_weights pissa",
    "init_lora_weights pissa --no-adapter_on_context": "init_lora_weights pissa and adapter_on_context false",
    "init_lora_weights lora_ga --lora_r 9": "init_lora_weights lora_ga takes 2 · lora_r directions of 16, got lora_r 9",
    "init_lora_weights orthogonal --lora_r 3": "needs an even lora_r, got 3",
    "layers_to_transform 5": "layers_to_transform names 5, and the modules to adapt are in layers 0 to 1",
    "layers_to_transform x": "layers_to_transform takes layers and ranges",
    "target_modules all-linear q_proj": "'all-linear' is no end of a name, so it must stand alone",
    "target_modules .*nothing.*": "matches no linear layer of the model",
    "target_modules ([": "'([' is no regular expression",
    "exclude_modules gate_proj": "'gate_proj' matches none of the modules to adapt",
    "load_in_8bit --sparsity.mode static": "a sparse pass does not compute with 8-bit weights",
    "push_to_hub": "push_to_hub needs hub_model_id",
    "hub_model_id a/b": "hub_model_id is given without push_to_hub",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(
    study: Study, arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "trackio" in arguments and __import__("importlib").util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    out = f"refused {arguments}"[:40]
    assert study(out, *f"--{arguments}".split()) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "kernels-community" not in line]
    assert len(lines) == 1
    assert REFUSED[arguments] in lines[0]
    assert not (study.folder / out / "run.json").exists()


# --- which modules ------------------------------------------------------------------------------------------------


def adapted_names(model: Any) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}


CHOICES: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj", "o_proj"]},
    {"target_modules": r".*layers\.1\..*(q|up)_proj"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*v_proj"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_adapted_modules_are_those_of_peft(study: Study, choice: dict[str, Any]) -> None:
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(study.model), LoraConfig(r=2, task_type="CAUSAL_LM", **choice)
    )
    entries, exclude = choice["target_modules"], choice.get("exclude_modules")
    names = resolve_target_modules(
        AutoModelForCausalLM.from_pretrained(study.model),
        [entries] if isinstance(entries, str) else entries,
        exclude=[exclude] if isinstance(exclude, str) else exclude,
        layers=choice.get("layers_to_transform"),
    )
    assert set(names) == adapted_names(theirs)
    assert 0 < len(names) < 15  # of 14 in layers, and the output layer, which none of them takes


def test_all_linear_leaves_the_head_of_a_classifier_whole() -> None:
    model = BertForSequenceClassification(
        BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30)
    )
    names = resolve_target_modules(model, ["all-linear"], head=head_modules(model))
    assert len(names) == 2 * 6 + 1
    assert not [name for name in names if name.startswith("classifier")]


# --- initialisations and DoRA -------------------------------------------------------------------------------------

MOVES_BASE = ("pissa", "pissa_niter_4", "olora", "lora_ga")


@pytest.mark.parametrize("start", [*MOVES_BASE, "eva", "orthogonal", "gaussian", "dora"])
def test_plain_peft_loads_on_the_base_what_was_trained(study: Study, start: str) -> None:
    arguments = ["--use_dora"] if start == "dora" else ["--init_lora_weights", start]
    assert study(start, *arguments) == 0
    eval_loss = float(study.table(start, "summary.csv")["eval_loss"].iloc[0])
    assert study.loss(start) == pytest.approx(eval_loss, rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(study.model)
    assert study.loss(start, base) != pytest.approx(eval_loss, rel=1e-3), "and it was trained at all"
    tensors = study.adapter(start)
    ranks = {len(A) for name, A in tensors.items() if "lora_A" in name}
    assert ranks == ({8} if start in MOVES_BASE else {4})
    assert any("magnitude" in name for name in tensors) == (start == "dora")
    if start in MOVES_BASE:  # the control: without the factors at the beginning it is another function
        model = PeftModel.from_pretrained(base, study.folder / start / "adapter")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data[:, 4:] = 0
        assert study.loss(start, model) != pytest.approx(eval_loss, rel=1e-4)


def started(study: Study, start: str, batches: Any = None) -> Any:
    torch.manual_seed(0)
    return attach_lora(
        load_causal_lm(study.model)[0], r=4, alpha=8, dropout=0.0, target_modules=["q_proj"], base_model="x",
        task_type="CAUSAL_LM", initialisation=start, batches=batches,
    )  # fmt: skip


def first_factors(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def test_pissa_begins_at_the_best_approximation_and_the_function_of_the_base(study: Study) -> None:
    base = AutoModelForCausalLM.from_pretrained(study.model)
    U, s, Vh = torch.linalg.svd(base.model.layers[0].self_attn.q_proj.weight.double())
    A, B = first_factors(started(study, "pissa"))
    torch.testing.assert_close(2.0 * (B @ A).double(), (U[:, :4] * s[:4]) @ Vh[:4], rtol=0, atol=1e-6)
    assert study.loss("", started(study, "pissa")) == pytest.approx(study.loss("", base), rel=1e-6)
    with started(study, "pissa").disable_adapter():
        pass


def test_lora_ga_begins_at_singular_directions_of_the_gradient(study: Study) -> None:
    batch = study.batch(study.train)
    base = AutoModelForCausalLM.from_pretrained(study.model)
    base(**batch).loss.backward()
    U, _, Vh = torch.linalg.svd(base.model.layers[0].self_attn.q_proj.weight.grad.double())
    model = started(study, "lora_ga", [batch])
    A, B = (weight.double() for weight in first_factors(model))
    for factor, directions in ((A, Vh[:4]), (B.T, U.T[4:8])):
        cosines = torch.nn.functional.cosine_similarity(factor, directions).abs()
        assert cosines.min() > 0.99
    assert study.loss("", model) == pytest.approx(study.loss("", base), rel=1e-5)


def test_eva_begins_in_the_leading_directions_of_the_inputs(study: Study) -> None:
    batch = study.batch(study.train)
    base = AutoModelForCausalLM.from_pretrained(study.model)
    inputs: list[torch.Tensor] = []
    base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _m, args, _o: inputs.append(args[0].detach()))
    base(**batch)
    rows = inputs[0][(batch["attention_mask"] * (batch["labels"] != -100)).bool()].double()
    A, B = first_factors(started(study, "eva", [batch]))
    assert not B.any()
    energy = [float((rows @ side.T).square().sum()) for side in (A.double(), torch.linalg.svd(rows)[2][:4])]
    random = torch.linalg.qr(torch.randn(32, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    assert energy[0] > 0.8 * energy[1] > float((rows @ random).square().sum())


@pytest.mark.parametrize("start", ["pissa", "lora_ga"])
def test_a_resumed_run_is_the_uninterrupted_one(study: Study, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--init_lora_weights", start, "--save_steps", "2"]
    assert study(f"whole {start}", *common) == 0
    from sparselora.training.trainer import FineTuner

    step = FineTuner.training_step

    def interrupted(self: FineTuner, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(FineTuner, "training_step", interrupted)
    assert study(f"cut {start}", *common) == 130
    monkeypatch.undo()
    assert study(f"cut {start}", *common, "--resume") == 0
    whole, cut = (study.adapter(f"{name} {start}") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_pruning_or_exporting_such_an_adapter_without_its_beginning_is_refused(study: Study, tmp_path: Path) -> None:
    from sparselora.models.lora import export_adapter, truncate_svd

    model = started(study, "pissa")
    with pytest.raises(InputError, match="initialised by pissa, which changed the base weights"):
        truncate_svd(model, 0.5, "module")
    with pytest.raises(InputError, match="initialised by pissa, which changed the base weights"):
        export_adapter(model, tmp_path / "adapter", "x")


# --- what is written at the end -----------------------------------------------------------------------------------


def test_generations_are_what_the_exported_adapter_writes(study: Study) -> None:
    sparse = ["--sparsity.mode", "static", "--sparsity.ffn_sparsity", "0.5"]
    assert study("texts", "--generations", "3", "--eval_steps", "3", *sparse) == 0
    table = pd.read_csv(study.folder / "texts" / "generations.csv", keep_default_na=False)
    assert table["step"].tolist() == [3, 3, 3, 4, 4, 4]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(study.model), study.folder / "texts" / "adapter"
    ).eval()
    tokenizer = load_causal_lm(study.model)[1]
    data = load_instructions(study.dev, eval_file=study.dev, template=used_template(None)).eval
    for (_, row), prompt in zip(table[table["step"] == 4].iterrows(), data["prompt"]):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        room = min(64, 64 - max(len(tokenizer(p).input_ids) for p in data["prompt"][:3]))
        output = model.generate(input_ids=ids, max_new_tokens=room, do_sample=False)
        assert row["generated"].strip() == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["prompt"].split() == prompt.split()
    assert study("no texts", *sparse, "--eval_steps", "3") == 0  # the control: generation changes nothing else
    assert study.table("texts", "metrics.csv")["loss"].equals(study.table("no texts", "metrics.csv")["loss"])
    assert not (study.folder / "no texts" / "generations.csv").exists()


def test_the_card_has_settings_and_results_and_the_vllm_line_the_rank(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import ModelCard

    assert study("card", "--init_lora_weights", "olora", "--lora_r", "7") == 0
    assert "--enable-lora --max-lora-rank 16 --lora-modules adapter=" in capsys.readouterr().out
    card = ModelCard.load(study.folder / "card" / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    summary = study.table("card", "summary.csv").iloc[0]
    assert f"| {summary['eval_loss']:.4f} |" in card.text
    for line in ("init_lora_weights: olora", "lora_r: 7", f"lr: {LR}"):
        assert line in card.text
    assert "lora_dropout" not in card.text
    assert str(study.folder) not in card.text
    # vLLM knows neither DoRA's norms nor gates.
    for name, *flags in (("card dora", "--use_dora"), ("card gated", "--token_gate.policy", "routed")):
        assert study(name, *flags) == 0
        assert "vllm serve" not in capsys.readouterr().out


def test_the_evaluation_that_comes_next_reads_the_columns_of_the_run(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for path in map(Path, (study.train, study.dev)):
        files.append(tmp_path / path.name)
        files[-1].write_text(path.read_text().replace('"question"', '"q"').replace('"answer"', '"a"'))
    data = ["--dataset", str(files[0]), "--eval_file", str(files[1]), "--prompt_field", "q", "--completion_field", "a"]
    assert study("columns", *data) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  sparselora eval "))
    assert main([*shlex.split(line)[1:], "--device", "cpu", "--out_dir", str(tmp_path / "eval")]) == 0
    loss = study.table("columns", "summary.csv").iloc[0]["eval_loss"]
    assert json.loads((tmp_path / "eval" / "metrics_causal_lm.json").read_text())["loss"] == pytest.approx(loss)


def test_the_adapter_is_uploaded_to_the_hub(study: Study) -> None:
    """The hub is a server of this test, which keeps what it is asked for."""
    import base64
    import http.server
    import json
    import os
    import subprocess
    import sys
    import threading

    calls: list[tuple[str, str]] = []
    files: dict[str, bytes] = {}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            calls.append((self.path, str(self.headers.get("authorization"))))
            answer: dict[str, Any] = {"url": f"{address}/me/tiny", "name": "me/tiny", "id": "me/tiny"}
            if "preupload" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            elif "/commit/" in self.path:
                lines = [json.loads(line) for line in body.splitlines()]
                files.update({v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in lines[1:]})
                answer = {"commitUrl": f"{address}/me/tiny/commit/1", "commitOid": "1", "success": True}
            self.answer(200 if self.path != "/api/repos/create" or not refuses else 403, answer)

        def do_GET(self) -> None:
            self.answer(404 if refuses else 200, {"id": "me/tiny", "sha": "1", "siblings": []})

        def answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address, refuses = f"http://127.0.0.1:{server.server_port}", False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "NO_PROXY": "*"}

    def train(out: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sparselora", "train", "--task", "causal_lm", "--model", study.model,
                   "--dataset", study.train, "--max_steps", "1", "--lora_r", "2", "--device", "cpu", "--push_to_hub",
                   "--hub_model_id", "me/tiny", "--out_dir", str(study.folder / out)]  # fmt: skip
        return subprocess.run(command, env=environment | changes, capture_output=True, text=True, check=False)

    try:
        result = train("pushed")
        assert result.returncode == 0, result.stderr
        adapter = study.folder / "pushed" / "adapter"
        assert files == {path.name: path.read_bytes() for path in adapter.iterdir()}
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= files.keys()
        assert calls[0] == ("/api/repos/create", "Bearer hf_x")
        refuses = True
        result = train("denied")
        assert result.returncode == 2
        assert "push_to_hub: the hub refuses the repository" in result.stderr.splitlines()[-1]
        calls.clear()
        for changes, line in (({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"), ({"HF_TOKEN": ""}, "needs a token")):
            result = train("impossible", HF_HOME=str(study.folder / "nobody"), **changes)
            assert result.returncode == 2
            assert line in result.stderr.splitlines()[-1]
            assert not (study.folder / "impossible").exists()
        assert not calls
    finally:
        server.shutdown()
