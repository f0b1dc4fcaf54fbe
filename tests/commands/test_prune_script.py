"""Phase C from its command line: a real (tiny) model, real files, every record."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig, RobertaConfig

import prune_finetune_lora
from sparselora.numerics.channels import PRUNE_METHODS
from tests.helpers.paths import ROOT
from tests.helpers.processes import start, start_two

LEADING = (
    "model,dataset,method,keep_ratio,lora_r,effective_r,seed,train_samples,eval_samples,warmup_epochs,post_epochs,"
    "acc_before,acc_after,delta_acc,warm_time_sec,post_time_sec,target_modules,lora_trainable_params,lora_total_params"
)
TIMES = [
    "warm_time_sec",
    "post_time_sec",
    "warm_step_ms",
    "post_step_ms",
    "warm_samples_per_s",
    "post_samples_per_s",
    "peak_mb",
]


class Script:
    """Calls the script on the tiny model and the word files; reads what it left in ``runs``."""

    def __init__(self, model: Path, files: tuple[Path, Path], runs: Path) -> None:
        self.runs = runs
        self.arguments = [
            "--model", str(model), "--dataset", str(files[0]), "--eval_file", str(files[1]), "--out_dir", str(runs),
            "--train_samples", "0", "--eval_samples", "0", "--lora_r", "4", "--lr", "3e-2", "--warmup_epochs", "2",
            "--device", "cpu",
        ]  # fmt: skip

    def __call__(self, *arguments: str) -> int:
        return prune_finetune_lora.main([*self.arguments, *arguments])

    @property
    def results(self) -> pd.DataFrame:
        return pd.read_csv(self.runs / "results.csv")

    def cell(self, **wanted: object) -> Path:
        table = self.results
        for name, value in wanted.items():
            table = table[table[name] == value]
        assert len(table) == 1
        return self.runs / table["run_dir"].iloc[0]


@pytest.fixture
def script(tiny_bert: Path, word_files: tuple[Path, Path], tmp_path: Path) -> Script:
    return Script(tiny_bert, word_files, tmp_path / "runs")


@pytest.fixture(scope="module")
def sweep(tiny_bert: Path, word_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Script:
    """One cell of every method, and the masked twin of one."""
    script = Script(tiny_bert, word_files, tmp_path_factory.mktemp("sweep") / "runs")
    for method in PRUNE_METHODS:
        assert script("--method", method, "--keep_ratio", "0.5") == 0
    assert script("--method", "channel_energy", "--keep_ratio", "0.5", "--mask") == 0
    return script


def test_table_has_the_published_columns_and_a_row_a_cell(sweep: Script) -> None:
    table = sweep.results
    assert ",".join(table.columns).startswith(LEADING)
    assert len(table) == len(PRUNE_METHODS) + 1
    assert table["run_id"].is_unique
    pruned = table[(table["method"] != "no_prune") & ~table["masked"]]
    assert (pruned["effective_r"] == 2).all()
    assert (pruned["lora_trainable_params"] * 2 == pruned["lora_total_params"]).all()
    assert (pruned["adapter_flops_per_token_after"] * 2 == pruned["adapter_flops_per_token_before"]).all()
    # 2 layers, 4 projections of 24×24, rank 4; a head of 24×2 + 2.
    assert (table["lora_total_params"] == 2 * 4 * (24 + 24) * 4).all()
    assert (table["head_params"] == 50).all()
    assert (table["delta_acc"] == table["acc_after"] - table["acc_before"]).all()
    for name in TIMES:
        assert (table[name] > 0).all(), name


def test_methods_share_their_warm_up_and_the_control_prunes_nothing(sweep: Script) -> None:
    table = sweep.results.set_index("method")
    assert table["loss_before"].nunique() == 1
    control = table.loc["no_prune"]
    assert control["keep_ratio"] == 1.0
    assert control["lora_trainable_params"] == control["lora_total_params"]
    assert control["loss_right_after"] == control["loss_before"]
    assert (table.drop("no_prune")["loss_right_after"] != control["loss_before"]).all()
    assert table["acc_before"].iloc[0] > 0.6, "the warm-up must learn something for pruning to hurt"


def test_removed_channels_are_masked_channels(sweep: Script) -> None:
    twins = sweep.results.query("method == 'channel_energy'")
    for name in ("acc_right_after", "acc_after", "loss_right_after", "loss_after"):
        assert twins[name].iloc[0] == pytest.approx(twins[name].iloc[1], abs=1e-6), name


def test_cell_keeps_what_happened(sweep: Script) -> None:
    cell = sweep.cell(method="svd")
    row = sweep.results.set_index("method").loc["svd"]
    record = json.loads((cell / "run.json").read_text())
    assert record["status"] == "success"
    assert record["fingerprint"] == row["run_id"]
    assert set(record["ranks"].values()) == {2}
    assert str(sweep.runs) not in (cell / "run.json").read_text()
    assert json.loads((cell / "run_args.json").read_text())["target_modules"] == row["target_modules"].split()
    assert (sweep.runs / "run_args.json").exists()

    predictions = pd.read_csv(cell / "predictions.csv")
    for moment in ("before", "right_after", "after"):
        assert (predictions[moment] == predictions["label"]).mean() == pytest.approx(row[f"acc_{moment}"])
    losses = pd.read_csv(cell / "loss_curve.csv")
    assert losses["step"].tolist() == list(range(1, 19))
    assert losses["phase"].value_counts().to_dict() == {"warmup": 12, "post": 6}
    curve = pd.read_csv(cell / "eval_curve.csv")
    assert curve["step"].tolist() == [12, 12, 14, 15, 16, 18]
    assert curve["accuracy"].iloc[-1] == row["acc_after"]
    assert (cell / "loss_curve.png").stat().st_size > 10_000


def test_adapter_loads_in_plain_peft_with_the_same_predictions(
    sweep: Script, tiny_bert: Path, word_files: tuple[Path, Path]
) -> None:
    cell = sweep.cell(method="magnitude_B")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    model = PeftModel.from_pretrained(base, str(cell / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    sentences = pd.read_csv(word_files[1])["sentence"].tolist()
    with torch.no_grad():
        logits = model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits
    assert logits.argmax(1).tolist() == pd.read_csv(cell / "predictions.csv")["after"].tolist()
    assert json.loads((cell / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny_bert"


@pytest.mark.parametrize("family", ["distilbert", "roberta"])
@pytest.mark.usefixtures("blank_figures")
def test_other_encoders_by_their_architecture(
    family: str, tiny_bert: Path, word_files: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    if family == "distilbert":
        config: Any = DistilBertConfig(vocab_size=64, dim=24, n_layers=2, n_heads=4, hidden_dim=40)
        targets, head = "q_lin k_lin v_lin out_lin", 24 * 24 + 24 + 50
    else:
        shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
        config = RobertaConfig(vocab_size=64, pad_token_id=0, max_position_embeddings=40, **shape)
        targets, head = "query key value attention.output.dense", 24 * 24 + 24 + 50
    folder = tmp_path / f"tiny_{family}"
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    script = Script(folder, word_files, tmp_path / "runs")
    assert script("--method", "svd", "--keep_ratio", "0.25") == 0
    row = script.results.iloc[0]
    assert row["model"] == f"tiny_{family}"
    assert row["target_modules"] == targets
    assert row["head_params"] == head
    assert row["lora_trainable_params"] == 2 * 4 * 48
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    PeftModel.from_pretrained(base, str(script.cell() / "adapter"))


def test_keeping_everything_changes_nothing(script: Script) -> None:
    assert script("--keep_ratio", "1", "--method", "channel_energy") == 0
    row = script.results.iloc[0]
    assert row["acc_right_after"] == row["acc_before"]
    assert row["loss_right_after"] == row["loss_before"]
    assert row["steps_to_recovery"] == 0


@pytest.mark.usefixtures("blank_figures")
def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    tiny_bert: Path, word_files: tuple[Path, Path], tmp_path: Path
) -> None:
    tables = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        script = Script(tiny_bert, word_files, tmp_path / name)
        assert script("--method", "random", "--seed", seed) == 0
        cell = script.cell()
        files = {
            f.name: f.read_bytes() for f in (cell / "predictions.csv", cell / "loss_curve.csv", cell / "eval_curve.csv")
        }
        tables.append((script.results.drop(columns=TIMES).to_csv(), files))
    assert tables[0] == tables[1]
    assert tables[0][1]["loss_curve.csv"] != tables[2][1]["loss_curve.csv"]


@pytest.mark.usefixtures("blank_figures")
def test_finished_cell_is_skipped_and_overwrite_runs_it_again(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("--method", "no_prune") == 0
    stamp = (script.cell() / "predictions.csv").stat().st_mtime_ns
    # The control is one cell for all ratios and scopes.
    assert script("--method", "no_prune", "--keep_ratio", "0.25", "--scope", "global") == 0
    assert "already finished" in capsys.readouterr().out
    assert (script.cell() / "predictions.csv").stat().st_mtime_ns == stamp
    assert script("--method", "no_prune", "--overwrite") == 0
    assert (script.cell() / "predictions.csv").stat().st_mtime_ns > stamp
    assert len(script.results) == 1


@pytest.mark.usefixtures("blank_figures")
def test_lost_table_is_restored_and_a_strange_one_refused_before_training(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("--method", "no_prune") == 0
    table = script.runs / "results.csv"
    written = table.read_bytes()
    table.unlink()
    assert script("--method", "no_prune") == 0
    assert table.read_bytes() == written
    table.write_text("a,b\n1,2\n")
    assert script("--method", "random") == 2
    assert "other columns" in capsys.readouterr().err
    assert table.read_text() == "a,b\n1,2\n"
    assert len(list(script.runs.glob("*/run.json"))) == 1


@pytest.mark.parametrize("phase", ["warmup", "post"])
def test_a_phase_may_have_no_steps(script: Script, phase: str) -> None:
    assert script(f"--{phase}_epochs", "0", "--method", "random") == 0
    row = script.results.iloc[0]
    assert pd.isna(row["warm_step_ms" if phase == "warmup" else "post_step_ms"])
    assert "NaN" not in (script.cell() / "run.json").read_text()
    if phase == "warmup":  # B is still zero: nothing has been learnt that pruning could lose
        assert row["acc_right_after"] == row["acc_before"]
    else:
        assert row["acc_after"] == row["acc_right_after"]


@pytest.mark.usefixtures("blank_figures")
def test_global_scope_spends_one_budget(script: Script) -> None:
    assert script("--scope", "global", "--keep_ratio", "0.25") == 0
    ranks = json.loads((script.cell() / "run.json").read_text())["ranks"]
    assert sum(ranks.values()) == 8
    assert len(set(ranks.values())) > 1


@pytest.mark.parametrize("mask", [[], ["--mask"]])
@pytest.mark.usefixtures("blank_figures")
def test_dry_run_lists_what_a_run_writes_and_writes_nothing(
    script: Script, mask: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("--dry_run", *mask) == 0
    planned = capsys.readouterr().out.split("would write:")[1].split()
    assert not script.runs.exists()
    assert script(*mask) == 0
    written = [str(path) for path in script.runs.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert sorted(planned) == sorted(written)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep_ratio", "0"], "keep_ratio must be in (0, 1], got 0.0"),
        (["--keep_ratio", "1.5"], "keep_ratio must be in (0, 1], got 1.5"),
        (["--lora_r", "0"], "--lora_r must be at least 1, got 0"),
        (["--lora_r", "25"], "lora_r must be between 1 and 24"),
        (["--method", "energy"], "invalid choice: 'energy'"),
        (["--dataset", "glue/sst"], "did you mean 'glue/sst2'"),
        (["--dataset", "glue/sst2"], "eval_file are for files"),
        (["--eval_file", ""], "--eval_file must not be empty"),
        (["--model", "no-one/no-such-model"], "could not be loaded"),
        (["--target_modules", "q_lin"], "'q_lin' matches no linear layer"),
        (["--text_fields", "words"], "no column 'words'"),
        (["--method", "svd", "--mask"], "nothing to mask"),
        (["--lr", "nan"], "--lr must be a finite number"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--warmup_epochs", "-1"], "--warmup_epochs must be 0 or more"),
        (["--device", "tpu"], "device"),
        (["--seed", "-1"], "--seed must be a whole number from 0 to"),
        (["--seed", "4294967296"], "--seed must be a whole number from 0 to"),
        (["--dataset", "docstrings"], "eval_file are for files"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    script: Script, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = script(*arguments)
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not script.runs.exists()


def test_output_folder_that_cannot_be_written(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert script("--out_dir", str(tmp_path / "file")) == 2
    assert "file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.usefixtures("blank_figures")
def test_killed_cell_is_completed_by_the_same_call(script: Script) -> None:
    process = start(str(ROOT / "prune_finetune_lora.py"), *script.arguments, "--post_epochs", "2")
    deadline = time.monotonic() + 120
    while not list(script.runs.glob("*/run.json")):
        assert process.exitcode is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    (record,) = script.runs.glob("*/run.json")
    assert json.loads(record.read_text())["status"] == "running"
    assert script("--post_epochs", "2") == 0
    assert len(script.results) == 1
    assert json.loads(record.read_text())["status"] == "success"


def test_two_processes_train_one_model(script: Script, tmp_path: Path) -> None:
    program = str(ROOT / "prune_finetune_lora.py")
    start_two(program, *script.arguments, "--train_bsz", "8", "--scope", "global", folder=tmp_path)
    # Two processes with batches of 8 take the steps of one with batches of 16, on other batches: alike, not equal.
    cell, row = script.cell(), script.results.iloc[0]
    losses = pd.read_csv(cell / "loss_curve.csv")["train_loss"]
    assert len(losses) == 18
    assert losses[0] == pytest.approx(0.69, abs=0.02)
    assert json.loads((cell / "run.json").read_text())["arguments"]["processes"] == 2
    assert row["lora_trainable_params"] * 2 == row["lora_total_params"]
    assert row["acc_before"] > 0.6
    assert len(pd.read_csv(cell / "predictions.csv")) == 40


def test_epochs_that_round_to_no_step_are_refused_before_the_folder_is_claimed(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("--warmup_epochs", "0.01", "--post_epochs", "0.01") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--warmup_epochs 0.01 is no step" in error
    assert not script.runs.exists() or not any(script.runs.iterdir())
