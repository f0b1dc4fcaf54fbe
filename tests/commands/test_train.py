"""`train` from its command line: every record, the same run again, resuming after a kill, several processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sparselora.__main__ import main
from sparselora.config.train import TrainConfig
from sparselora.training.resume import OUTPUTS
from tests.helpers.paths import ROOT
from tests.helpers.processes import start, start_two
from tests.helpers.train_command import Train

MODES = ("dense", "svd", "oracle", "random", "static", "surrogate", "skip")
SPARSE = ["--sparsity.ffn_sparsity", "0.75", "--sparsity.svd_rank", "4", "--sparsity.surrogate_rank", "4"]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    settings = ("--grad_accum", "2", "--epochs", "3", "--lora_r", "4", "--group_by_length")
    return Train(tmp_path_factory.mktemp("train"), *settings)


@pytest.fixture(scope="module")
def runs(train: Train) -> Train:
    """A run of plain PEFT, and one of every mode."""
    assert train("none", "--save_steps", "4", "--eval_steps", "6") == 0
    for mode in MODES:
        assert train(mode, "--sparsity.mode", mode, "--sparsity.sparse_warmup_ratio", "0.2", *SPARSE) == 0
    return train


def test_run_leaves_what_it_says(runs: Train) -> None:
    folder = runs.folder / "none"
    assert all((folder / name).is_file() for name in OUTPUTS)
    record = runs.record("none")
    assert record["status"] == "success"
    assert record["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert str(runs.folder) not in (folder / "run.json").read_text()
    metrics = runs.table("none")
    assert metrics["step"].tolist() == list(range(1, 16))
    assert metrics["lr"].iloc[[0, -1]].tolist() == pytest.approx([1e-2, 1e-2 / 15])
    assert (metrics["sparse"] == 0).all()
    assert (metrics["active_flops_per_token"] > 0).all()
    evaluations = runs.table("none", "eval")
    assert evaluations["step"].tolist() == [6, 12, 15]
    summary = runs.table("none", "summary").iloc[0]
    assert summary["eval_loss"] == evaluations["loss"].iloc[-1]
    assert summary["mode"] == "none"
    predictions = runs.table("none", "predictions")
    assert predictions["row"].tolist() == list(range(9))
    assert predictions["loss"].sum() / predictions["tokens"].sum() == pytest.approx(summary["eval_loss"])
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["checkpoint-12", "checkpoint-15"]


def test_adapter_is_one_that_plain_peft_loads(runs: Train) -> None:
    from sparselora.data.batches import Collator
    from sparselora.data.instructions import encode_instructions, load_instructions
    from sparselora.models.load import load_causal_lm

    tokenizer = load_causal_lm(str(runs.model))[1]
    data = load_instructions(str(runs.train), eval_file=str(runs.dev))
    batch = Collator(2, causal=True).tensors(encode_instructions(data.eval, tokenizer, 64).examples)
    for run in ("none", "svd"):
        base = AutoModelForCausalLM.from_pretrained(runs.model)
        model = PeftModel.from_pretrained(base, runs.folder / run / "adapter").eval()
        loss = model(**batch).loss.item()
        assert loss == pytest.approx(runs.table(run, "summary")["eval_loss"].iloc[0], rel=1e-4)
        with model.disable_adapter():
            assert model(**batch).loss.item() != pytest.approx(loss, rel=1e-3)


def test_every_mode_trains_on_the_same_batches(runs: Train) -> None:
    plain = runs.table("none")
    layers = runs.table("svd", "layers")
    assert layers["ffn_sparsity"].tolist() == [0.75, 0.75]
    for mode in MODES:
        table = runs.table(mode)
        assert table["tokens"].tolist() == plain["tokens"].tolist()
        assert np.isfinite(table["loss"]).all()
        assert table["sparse"].tolist() == [0] * 3 + [int(mode != "dense")] * 12
        # The dense steps, up to the first update that a sparse one made.
        assert table["loss"].iloc[:3].tolist() == pytest.approx(plain["loss"].iloc[:3].tolist(), rel=1e-5)
        sparse, dense = table["active_flops_per_token"].iloc[5], runs.table("dense")["active_flops_per_token"].iloc[5]
        assert (sparse < dense) == (mode != "dense")
    assert runs.table("dense")["loss"].tolist() == pytest.approx(plain["loss"].tolist(), rel=1e-4)
    assert runs.table("skip")["loss"].tolist() != pytest.approx(plain["loss"].tolist(), rel=1e-4)


def test_resolved_configuration_gives_the_same_run(runs: Train, capsys: pytest.CaptureFixture[str]) -> None:
    saved = runs.folder / "svd" / "config.yaml"
    assert TrainConfig.from_yaml(saved).sparsity.layer_sparsity == {}
    settings = TrainConfig.from_yaml(saved)
    assert not any(Path(name).is_absolute() for name in (settings.model, settings.dataset, settings.eval_file))
    again = runs.folder / "again"
    cache = ["--cache_dir", str(runs.folder / "cache")]
    assert main(["train", str(saved), "--out_dir", str(again), *cache]) == 0
    assert runs.table("again")["loss"].tolist() == runs.table("svd")["loss"].tolist()
    assert (again / "config.yaml").read_text() == saved.read_text()
    assert (again / "predictions.csv").read_bytes() == (runs.folder / "svd" / "predictions.csv").read_bytes()
    capsys.readouterr()
    assert main(["train", str(saved), "--out_dir", str(again), *cache]) == 0
    assert "already finished" in capsys.readouterr().out
    assert main(["train", str(saved), "--out_dir", str(again), "--seed", "1"]) == 2
    assert "other arguments" in capsys.readouterr().err


def test_evaluation_is_dense_unless_asked(runs: Train) -> None:
    arguments = ["--sparsity.mode", "svd", "--sparsity.sparse_warmup_ratio", "0.2", *SPARSE]
    assert runs("sparse_eval", *arguments, "--sparsity.sparse_eval") == 0
    assert runs.table("sparse_eval")["loss"].tolist() == runs.table("svd")["loss"].tolist()
    dense, sparse = (runs.table(name, "eval")["loss"].iloc[-1] for name in ("svd", "sparse_eval"))
    assert sparse != pytest.approx(dense, rel=1e-6)


def test_dry_run_and_help_write_nothing(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("planned", "--dry_run", "--sparsity.mode", "skip", "--sparsity.layer_sparsity", "layer.1=0.5") == 0
    printed = capsys.readouterr().out
    assert "lora_r: 4" in printed
    assert "'layer.1': 0.5" in printed
    assert "metrics.csv" in printed
    assert not (train.folder / "planned").exists()
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help_all"])
    assert stop.value.code == 0
    assert "--sparsity.svd_rank" in capsys.readouterr().out


# --- near-duplicate rows ------------------------------------------------------------------------------------------


def test_near_duplicates_are_left_out_once_and_the_run_is_that_of_the_other_rows(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = train.train.read_text().splitlines()
    copies = train.folder / "copies.jsonl"
    copies.write_text("\n".join([*lines[:10], lines[2], *lines[10:], lines[0]]))
    assert train("unique") == 0
    capsys.readouterr()
    assert train("deduped", "--dataset", str(copies), "--dedupe", "1") == 0
    assert "2 near-duplicate rows left out, 40 trained on (duplicates.csv)" in capsys.readouterr().out
    duplicates = train.table("deduped", "duplicates")
    assert duplicates.columns.tolist() == ["row", "duplicate_of", "similarity"]
    assert duplicates["row"].tolist() == [10, 41]
    assert duplicates["duplicate_of"].tolist() == [2, 0]
    losses = [train.table(out)["loss"].tolist() for out in ("unique", "deduped")]
    assert losses[0] == losses[1]
    assert train("copies", "--dataset", str(copies)) == 0
    assert train.table("copies")["loss"].tolist() != losses[0], "the control: the copies count without the setting"
    assert not (train.folder / "copies" / "duplicates.csv").exists()
    assert train("bad", "--dedupe", "1.5") == 2
    assert "dedupe" in capsys.readouterr().err


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["none", "svd", "random", "surrogate", "sampled"],
)  # fmt: skip
def test_resumed_run_is_the_uninterrupted_one(train: Train, tmp_path: Path, mode: str) -> None:
    arguments = ["--save_steps", "4", "--eval_steps", "3", "--lora_dropout", "0.1"]
    if mode == "sampled":
        arguments += ["--sparsity.mode", "dense", "--sparsity.context_backward", "sampled"]
    elif mode != "none":
        arguments += ["--sparsity.mode", mode, "--sparsity.attention_sparsity", "0.5", *SPARSE]
    if mode == "surrogate":
        arguments += ["--sparsity.surrogate_refresh_steps", "4"]
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    assert train(whole, *arguments) == 0
    train.kill_in_step(10, broken, *arguments)
    assert train.record(broken)["status"] == "failed"
    assert train(broken, *arguments, "--resume") == 0
    for name, columns in (("metrics", ["step", "loss", "lr", "sparse", "tokens"]), ("eval", None)):
        one, two = (train.table(out, name) for out in (whole, broken))
        pd.testing.assert_frame_equal(one[columns or list(one)], two[columns or list(two)], check_exact=True)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_run_that_was_killed_goes_on_from_its_last_checkpoint(train: Train, tmp_path: Path) -> None:
    arguments = [*train.arguments, "--epochs", "16", "--save_steps", "10", "--out_dir", str(tmp_path / "killed")]
    process = start("-m", "sparselora", "train", *arguments)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoints" / "checkpoint-20" / "trainer_state.json").exists():
        assert process.exitcode is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert train.record(str(tmp_path / "killed"))["status"] == "running"
    before = train.table(str(tmp_path / "killed"))
    assert len(before) < 80
    assert main(["train", *arguments, "--lr", "0.5", "--resume"]) == 2, "not with other arguments"
    assert main(["train", *arguments, "--resume"]) == 0
    assert train(str(tmp_path / "whole"), "--epochs", "16", "--save_steps", "10") == 0
    one, two = train.table(str(tmp_path / "killed")), train.table(str(tmp_path / "whole"))
    assert one["loss"].tolist() == two["loss"].tolist()
    # The control: times are of the run that took them, so the rows before the checkpoint are the killed run's own.
    assert one["step_ms"].iloc[:10].tolist() == before["step_ms"].iloc[:10].tolist()


SHORT = ("--max_steps", "6", "--save_steps", "2")


@pytest.fixture(scope="module")
def killed(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed behind its checkpoint of step 4: copy it."""
    out = tmp_path_factory.mktemp("killed") / "run"
    train.kill_in_step(5, str(out), *SHORT)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    return out


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(str(out), *SHORT) == 0
    return out


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_checkpoints_are_not_lost_to_a_plain_restart(
    train: Train, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(killed, tmp_path / "run")
    before = snapshot(out)
    for more in ((), ("--lr", "0.5"), ("--lr", "0.5", "--resume")):
        capsys.readouterr()
        assert train(str(out), *SHORT, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "--resume" in error
        assert snapshot(out) == before
    assert train(str(out), *SHORT, "--overwrite") == 0
    assert len(train.table(str(out))) == 6
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]


FOREIGN = ("checkpoint-best/mine.txt", "checkpoint-77/mine.txt", "checkpoint-1-copy/mine.txt", "checkpoint-5", "notes",
           "checkpoint-3/trainer_state.json", "checkpoint-02/mine", "checkpoint-x/a/b")  # fmt: skip


def add_foreign(folder: Path) -> dict[str, bytes]:
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"global_step": 3}')
    return {name: (folder / name).read_bytes() for name in FOREIGN}


@pytest.mark.parametrize("how", ["overwrite", "resume", "finished"])
def test_what_another_put_beside_the_checkpoints_stays(
    train: Train, killed: Path, whole: Path, tmp_path: Path, how: str
) -> None:
    out = shutil.copytree(whole if how == "finished" else killed, tmp_path / "run")
    theirs = add_foreign(out / "checkpoints")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(out / "checkpoints" / "checkpoint-4", elsewhere)
    (out / "checkpoints" / "checkpoint-1").symlink_to(elsewhere)
    shutil.copytree(out / "checkpoints" / "checkpoint-4", out / "checkpoints" / "checkpoint-9")
    inside = out / "checkpoints" / "checkpoint-4" / "mine.txt"
    inside.write_text("mine")
    kept = snapshot(elsewhere)
    assert train(str(out), *SHORT, "--resume" if how == "resume" else "--overwrite") == 0
    assert {name: (out / "checkpoints" / name).read_bytes() for name in FOREIGN} == theirs
    assert snapshot(elsewhere) == kept
    assert (out / "checkpoints" / "checkpoint-1").is_symlink()
    assert (out / "checkpoints" / "checkpoint-9" / "optimizer.pt").is_file(), (
        "a copy under another name is not the run's"
    )
    assert inside.read_text() == "mine"
    assert train.table(str(out))["loss"].tolist() == pd.read_csv(whole / "metrics.csv")["loss"].tolist()
    assert (out / "checkpoints" / "checkpoint-6" / "trainer_state.json").is_file()
    assert not (out / "checkpoints" / "checkpoint-2").exists(), "the run's own go as before"


@pytest.mark.parametrize("kind", ["file", "folder", "link", "all_file", "all_link"])
def test_what_is_in_the_way_of_a_checkpoint_is_refused_before_anything_is_written(
    train: Train, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    place = out / "checkpoints" / "checkpoint-4"
    if kind.startswith("all"):
        place = place.parent
    place.parent.mkdir(parents=True)
    if kind.endswith("file"):
        place.write_text("mine")
    elif kind.endswith("link"):
        place.symlink_to(elsewhere)
    else:
        place.mkdir()
        (place / "mine").write_text("mine")
    before = snapshot(out)
    assert train(str(out), *SHORT, "--overwrite") == 2
    assert "move it away" in capsys.readouterr().err
    assert snapshot(out) == before
    assert snapshot(elsewhere) == {"mine": b"mine"}


TORN = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
        "adapter_config.json", "checkpoint.json")  # fmt: skip


@pytest.mark.parametrize("name", TORN)
@pytest.mark.parametrize("how", ["cut", "zeros", "missing"])
def test_a_torn_checkpoint_is_passed_over_for_the_whole_one_before_it(
    train: Train, killed: Path, whole: Path, tmp_path: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if (how == "zeros") != (name == "optimizer.pt") and how != "cut":
        pytest.skip("one file of each kind of damage is enough")
    out = shutil.copytree(killed, tmp_path / "run")
    file = out / "checkpoints" / "checkpoint-4" / name
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)) if how == "zeros" else content[: len(content) // 2])
    if how == "missing":
        file.unlink()
    status = train(str(out), *SHORT, "--resume")
    error = capsys.readouterr().err
    if name == "checkpoint.json":  # by it a checkpoint is the run's own
        assert status == 2
        assert "was not written by this run" in error
        return
    assert status == 0
    assert f"checkpoint-4 is not whole ({name}" in error
    assert "going on from checkpoint-2" in error
    assert train.table(str(out))["loss"].tolist() == pd.read_csv(whole / "metrics.csv")["loss"].tolist()
    assert (out / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not the table"),
        (b"\xff\xfe\x00step", "is not the table"),
        (b"a,b\n1,2\n", "is not the table"),
        (b"[1, 2", "is not the table"),
        (None, "is missing"),
        ("header", "has 0 rows up to step 4 of the checkpoint, not the 4"),
        ("gap", "has 3 rows"),
        ("text", "is not the table"),
    ],
)
def test_records_of_the_steps_before_a_checkpoint_must_be_whole(
    train: Train, killed: Path, tmp_path: Path, content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(killed, tmp_path / "run")
    file = out / "metrics.csv"
    rows = file.read_text().splitlines(keepends=True)
    changed = {"header": rows[:1], "gap": [*rows[:2], *rows[3:]], "text": [*rows[:2], "x" + rows[2][1:], *rows[3:]]}
    if content is None:
        file.unlink()
    else:
        file.write_bytes("".join(changed[content]).encode() if content in changed else content)
    before = snapshot(out)
    assert train(str(out), *SHORT, "--resume") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "metrics.csv" in error
    assert error.count("\n") == 1
    assert snapshot(out) == before


# --- classification -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "svd"])
def test_classification_learns_and_names_its_rows(
    tiny_bert: Path, word_files: tuple[Path, Path], tmp_path: Path, mode: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {tiny_bert}\ndataset: {word_files[0]}\neval_file: {word_files[1]}\nlora_r: 4\n"
        "lora_alpha: 8\nlr: 0.03\nepochs: 6\ntrain_bsz: 16\neval_bsz: 8\ndevice: cpu\nmax_length: 40\n"
        + ("sparsity: {mode: svd, ffn_sparsity: 0.5, svd_rank: 4, sparse_warmup_ratio: 0.1}\n" if mode == "svd" else "")
    )
    out = tmp_path / "run"
    assert main(["train", str(config), "--out_dir", str(out), "--cache_dir", str(tmp_path)]) == 0
    summary = pd.read_csv(out / "summary.csv").iloc[0]
    assert summary["eval_accuracy"] > 0.65
    predictions = pd.read_csv(out / "predictions.csv")
    dev = pd.read_csv(word_files[1])
    assert list(predictions.columns) == ["row", "label", "predicted", "loss", "correct"]
    assert predictions["row"].tolist() == list(range(40))
    assert predictions["label"].tolist() == dev["label"].tolist()
    assert (predictions["correct"] == (predictions["label"] == predictions["predicted"])).all()
    assert predictions["correct"].mean() == summary["eval_accuracy"]
    assert (pd.read_csv(out / "metrics.csv")["active_flops_per_token"] > 0).all()


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", pytest.param("skip", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_twice_the_batch(train: Train, tmp_path: Path, mode: str) -> None:
    # On the CPU `accelerate launch` starts one process; torchrun sets the same variables as it does for two GPUs.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [*train.arguments, "--eval_steps", "6", "--save_steps", "6"]
    if mode == "skip":
        arguments += ["--sparsity.mode", mode, *SPARSE, "--target_modules", "q_proj", "down_proj"]
    two = ["-m", "sparselora", "train", *arguments, "--train_bsz", "2", "--out_dir", str(tmp_path / "two")]
    if mode == "none":
        done = subprocess.run([*launch, *two], capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        start_two(*two, folder=tmp_path)
    assert main(["train", *arguments, "--out_dir", str(tmp_path / "one")]) == 0
    one, both = (pd.read_csv(tmp_path / out / "metrics.csv") for out in ("one", "two"))
    assert train.record(str(tmp_path / "two"))["arguments"]["processes"] == 2
    assert both["tokens"].tolist() == one["tokens"].tolist()
    assert both["loss"].tolist() == pytest.approx(one["loss"].tolist(), rel=1e-4)
    rows = [pd.read_csv(tmp_path / out / "predictions.csv") for out in ("one", "two")]
    assert len(rows[1]) == 9
    assert rows[1]["loss"].tolist() == pytest.approx(rows[0]["loss"].tolist(), rel=1e-3)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_r", "0"], "lora_r must be"),
        (["--lora_r", "33"], "lora_r must be between 1 and 16"),
        (["--packing", "--group_by_length"], "packing and group_by_length"),
        (["--dataset", "missing.jsonl"], "no file missing.jsonl"),
        (["--prompt_field", "quetsion"], "did you mean 'question'"),
        (["--model", "no-one/no-such-model"], "could not be loaded"),
        (["--target_modules", "query"], "'query' matches no linear layer"),
        (["--template", "no place"], "template must have {prompt}"),
        (["--sparsity.mode", "svd", "--sparsity.ffn_sparsity", "1"], "to compute no FFN use mode: skip"),
        (["--sparsity.mode", "svd", "--sparsity.layer_sparsity", "layer.7=0.5"], "the model has 2 layers"),
        (["--sparsity.mode", "svd", "--sparsity.layer_sparsity", "layer.1"], "takes LAYER=VALUE"),
        (["--sparsity.mode", "svd", "--sparsity.ffn_sparsity", "0.5", "--sparsity.svd_rank", "99"], "rank"),
        (["--sparsity.mode", "svd"], "no sparse layer"),
        (["--scheduler", "constant", "--warmup_ratio", "0.1"], "use constant_with_warmup"),
        (["--report_to", "wandb"], "needs the package wandb"),
        (["--device", "tpu"], "device"),
        (["--seed", "-1"], "seed must be"),
        (["--sparsity.surrogate_refresh_steps", "4", "--save_steps", "6", "--sparsity.mode", "surrogate"], "multiple"),
        (["--model", "/no/such/folder"], "model folder '/no/such/folder' does not exist"),
        (["--model", "~nosuchuser/model"], "unknown user"),
        (["--model", "m/" * 3000], "6000 characters"),
        (["--novelty.policy", "novelty", "--novelty.m", "100"], "power of two"),
        (["--novelty.policy", "random", "--novelty.target_accept_rate", "0"], "must be in (0, 1), got 0"),
        (
            ["--novelty.policy", "novelty", "--novelty.k_topk", "8", "--novelty.k", "512"],
            "k must be below the sketch's length m, 512",
        ),
        (["--novelty.policy", "novelty"], "k_topk must be between 1 and the vocabulary's 43"),
        (
            ["--novelty.policy", "novelty", "--novelty.k_topk", "8", "--novelty.max_consecutive_rejects", "1"],
            "forces one",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    train: Train, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "wandb" in arguments and __import__("importlib.util").util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    train.assert_refused(arguments, message, capsys)


def test_a_novelty_gate_on_a_decoder_classifier_is_refused_before_data_are_read(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--model", str(train.model), "--dataset", "not there.csv", "--task", "classification"]
    out = ["--device", "cpu", "--out_dir", str(tmp_path / "out")]
    assert main([*arguments, *out, "--novelty.policy", "novelty"]) == 2
    error = capsys.readouterr().err
    assert "the novelty gate supports causal models and encoder classifiers" in error
    assert error.count("\n") == 1
    assert main([*arguments, *out]) == 2  # the control: without the gate it is the data
    assert "not there.csv" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_settings_and_unknown_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out_dir", str(tmp_path / "out")]) == 2
    assert "no model given" in capsys.readouterr().err
    config = tmp_path / "config.yaml"
    config.write_text("model: a\nlora_rank: 4\n")
    assert main(["train", str(config), "--out_dir", str(tmp_path / "out")]) == 2
    assert "unknown key 'lora_rank'" in capsys.readouterr().err


def test_real_decoder_learns_from_real_questions(shared: Path, tmp_path: Path) -> None:
    model, data = shared / "models" / "storyllama-20m", shared / "data" / "math"
    arguments = [
        "--task", "causal_lm", "--model", str(model), "--dataset", str(data / "gsm8k_train.jsonl.gz"), "--eval_file",
        str(data / "gsm8k_test.jsonl"), "--train_samples", "12", "--eval_samples", "6", "--max_length", "160",
        "--train_bsz", "4", "--epochs", "2", "--lr", "2e-3", "--device", "cpu", "--cache_dir", str(tmp_path),
        "--sparsity.mode", "surrogate", "--sparsity.layer_sparsity", "layer.1-6=0.99", "--sparsity.surrogate_rank", "8",
        "--sparsity.calibration_samples", "8", "--out_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(["train", *arguments]) == 0
    losses = pd.read_csv(tmp_path / "run" / "metrics.csv")["loss"]
    assert losses.iloc[-3:].mean() < losses.iloc[:3].mean()
    assert pd.read_csv(tmp_path / "run" / "layers.csv")["ffn_sparsity"].tolist() == [0] + [0.99] * 6 + [0]
