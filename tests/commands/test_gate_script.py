"""Phase C with gates by token, from its command line: the cells beside those of pruning, and their comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparselora.__main__ import main
from sparselora.compare.pruning_cells import CONTROL, read_sweep
from sparselora.numerics.channels import GATE_METHODS
from sparselora.pruning.outputs import RESULT_COLUMNS
from sparselora.token_gates.gates import load_token_gates
from tests.commands.test_prune_script import Script
from tests.helpers.paths import ROOT
from tests.helpers.processes import start_two

THRESHOLD = ("--gate_select", "threshold", "--gate_penalty", "5")
STEPS = 6
"""Of the training after the warm-up, 96 rows in batches of 16."""


@pytest.fixture(scope="module")
def sweep(tiny_bert: Path, word_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Script:
    """A cell of every gate, one with a threshold, one at keep ratio 1, and the cells they are compared with."""
    script = Script(tiny_bert, word_files, tmp_path_factory.mktemp("gates") / "runs")
    for method in (*GATE_METHODS, "no_prune", "channel_energy"):
        assert script("--method", method) == 0
    assert script("--method", "token_gate", *THRESHOLD) == 0
    assert script("--method", "token_gate", "--keep_ratio", "1") == 0
    return script


@pytest.fixture
def script(tiny_bert: Path, word_files: tuple[Path, Path], tmp_path: Path) -> Script:
    return Script(tiny_bert, word_files, tmp_path / "runs")


def _predictions(cell: Path) -> pd.DataFrame:
    return pd.read_csv(cell / "predictions.csv")


def _predicted(cell: Path, adapter: str, base: Path, sentences: Path) -> list[int]:
    """What an exported adapter answers; with gates where they lie beside it."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = PeftModel.from_pretrained(model, str(cell / adapter))
    if (cell / adapter / "token_gate.json").exists():
        load_token_gates(model, cell / adapter)
    texts = pd.read_csv(sentences)["sentence"].tolist()
    with torch.no_grad():
        logits = model.eval()(**AutoTokenizer.from_pretrained(base)(texts, padding=True, return_tensors="pt")).logits
    return [int(label) for label in logits.argmax(1)]


def test_rows_say_what_was_active_and_what_it_costs(sweep: Script) -> None:
    table = sweep.results
    assert tuple(table.columns) == RESULT_COLUMNS
    gated = table[table["method"].isin(list(GATE_METHODS)) & (table["keep_ratio"] == 0.5)]
    assert (gated["effective_r"] == 2).all()
    exact = gated[gated["gate"].isna()].set_index("method")
    assert list(exact.index) == list(GATE_METHODS)
    assert (exact["active_r"] == 2).all()
    assert (exact["adapter_flops_per_token_after"] * 2 == exact["adapter_flops_per_token_before"]).all()
    # 8 modules of rank 4 on 24 features: heads of 8 features, a bias each; two rows of A only looked at.
    assert exact["gate_params"].to_dict() == {"token_gate": 8 * (8 * 4 + 4), "energy_gate": 0, "random_gate": 0}
    looks, decides = 8 * 2 * 24 * 2, 8 * 2 * 8 * 4
    assert exact["gate_flops_per_token"].tolist() == [looks + decides, looks, 0]
    # Gates remove nothing, and are no part of the adapter.
    assert (gated["lora_trainable_params"] == gated["lora_total_params"]).all()
    assert (gated["head_params"] == 50).all()

    loose = gated[gated["gate"] == "threshold penalty=5"].iloc[0]
    assert 1.5 < loose["active_r"] < 2.5
    assert loose["active_r"] != 2
    assert loose["adapter_flops_per_token_after"] == pytest.approx(loose["active_r"] * 8 * 2 * 48)
    pruned = table.set_index("method").loc["channel_energy"]
    assert pruned["active_r"] == pruned["effective_r"] == 2
    assert pruned[["gate_params", "gate_flops_per_token"]].tolist() == [0, 0]
    assert pruned[["gate", "metric_static", "acc_static"]].isna().all()


def test_gates_begin_as_the_energy_of_the_same_warm_up(sweep: Script) -> None:
    table = sweep.results
    assert table["loss_before"].nunique() == 1
    begun = table[(table["keep_ratio"] == 0.5) & table["gate"].isna()].set_index("method")["loss_right_after"]
    assert begun["token_gate"] == pytest.approx(begun["energy_gate"], abs=1e-6)
    assert begun["random_gate"] != begun["energy_gate"]
    after = table[table["gate"].isna()].set_index(["method", "keep_ratio"])["loss_after"]
    assert after["token_gate", 0.5] != after["energy_gate", 0.5]  # it has learned


@pytest.mark.usefixtures("blank_figures")
def test_the_singular_basis_is_another_cell_that_starts_from_the_same_function(script: Script) -> None:
    for flags in (("--method", "energy_gate"), ("--method", "energy_gate", "--gate_basis", "singular")):
        assert script(*flags) == 0
    assert script("--method", "channel_energy", "--gate_basis", "singular") == 0  # nothing to a method without gates
    table = script.results
    assert table["loss_before"].nunique() == 1
    assert table["gate"].fillna("").tolist() == ["", "singular", ""]
    gated = table[table["method"] == "energy_gate"]
    assert gated["loss_right_after"].nunique() == 2
    assert (gated["active_r"] == 2).all()


def test_everything_kept_is_no_pruning_bit_for_bit(sweep: Script) -> None:
    cells = [sweep.cell(method="token_gate", keep_ratio=1.0), sweep.cell(method=CONTROL)]
    for name in ("loss_curve.csv", "eval_curve.csv"):
        assert (cells[0] / name).read_bytes() == (cells[1] / name).read_bytes()
    ours, theirs = map(_predictions, cells)
    pd.testing.assert_frame_equal(ours.drop(columns="static"), theirs)
    assert ours["static"].tolist() == ours["after"].tolist()
    row = sweep.results.query("method == 'token_gate' and keep_ratio == 1").iloc[0]
    assert (row["active_r"], row["gate_flops_per_token"]) == (4, 0)


@pytest.mark.parametrize("which", [{"method": "energy_gate"}, {"gate": "threshold penalty=5"}])
def test_saved_gates_and_fixed_subset_answer_as_they_did(
    sweep: Script, which: dict[str, object], tiny_bert: Path, word_files: tuple[Path, Path]
) -> None:
    cell = sweep.cell(**which)
    wanted = _predictions(cell)
    assert _predicted(cell, "adapter", tiny_bert, word_files[1]) == wanted["after"].tolist()
    assert _predicted(cell, "adapter_static", tiny_bert, word_files[1]) == wanted["static"].tolist()
    row = sweep.results.set_index("run_dir").loc[cell.name]
    assert row["acc_static"] == row["metric_static"] == (wanted["static"] == wanted["label"]).mean()
    config = json.loads((cell / "adapter_static" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {})


def test_adapter_without_its_gates_is_another_model(
    sweep: Script, tiny_bert: Path, word_files: tuple[Path, Path], tmp_path: Path
) -> None:
    cell = sweep.cell(method="random_gate")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((cell / "adapter" / name).read_bytes())
    assert _predicted(tmp_path, ".", tiny_bert, word_files[1]) != _predictions(cell)["after"].tolist()


def test_frequencies_are_those_of_the_rows(sweep: Script) -> None:
    for which in ({"method": "energy_gate"}, {"gate": "threshold penalty=5"}):
        cell = sweep.cell(**which)
        table = pd.read_csv(cell / "token_gate.csv")
        assert list(table.columns) == ["module", "channel", "frequency", "energy"]
        assert (table["energy"] > 0).all()
        ranks = table.groupby("module", sort=False)["frequency"].sum()
        record = json.loads((cell / "run.json").read_text())
        assert ranks.to_dict() == pytest.approx(record["active_rank"])
        assert ranks.mean() == pytest.approx(sweep.results.set_index("run_dir").loc[cell.name, "active_r"])
        assert (cell / "token_gate.png").stat().st_size > 2000


@pytest.mark.usefixtures("blank_figures")
def test_a_budget_that_falls_ends_at_the_keep_ratio(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparselora.training.trainer import FineTuner

    seen = []
    evaluate = FineTuner.evaluate_rows

    def noting(self):
        gates = dict(self.model.named_children()).get("token_gates")
        seen.append(None if gates is None else gates.budget)
        return evaluate(self)

    monkeypatch.setattr(FineTuner, "evaluate_rows", noting)
    flags = ["--gate_anneal", "1", "--gate_features", "both", "--gate_estimator", "relaxed"]
    assert script("--method", "token_gate", "--keep_ratio", "0.25", *flags, "--gate_supervision", "gradient") == 0
    # Before, right after, then steps 2, 3, 4 and 6 of 6 on the way from 1 down to 1/4, and the fixed subset.
    falling = [1 - 0.75 * step / STEPS for step in (2, 3, 4, 6)]
    assert seen[0] is None
    assert seen[1:] == pytest.approx([0.25, *falling, 1.0])
    row = script.results.iloc[0]
    assert row["gate"] == "both relaxed supervision=gradient anneal=1"
    assert row["active_r"] == row["effective_r"] == 1
    if not np.isnan(row["steps_to_recovery"]):  # what was evaluated on the way there had more channels
        assert row["steps_to_recovery"] in (0, STEPS)


def test_only_flags_that_matter_make_another_cell(
    sweep: Script, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    count, capsys_text = len(sweep.results), []
    noise = ["--gate_features", "statistics", "--gate_temperature", "2", "--gate_match_weight", "3"]
    for method, flags in (
        ("no_prune", [*noise, *THRESHOLD, "--gate_anneal", "0.5"]),
        ("channel_energy", [*noise, *THRESHOLD]),
        ("energy_gate", noise),
        ("random_gate", noise),
        ("token_gate", ["--gate_penalty", "3", "--gate_match_weight", "3"]),
        ("token_gate", list(THRESHOLD)),
        ("no_prune", ["--gate_basis", "singular"]),
    ):
        assert sweep("--method", method, *flags) == 0
        capsys_text.append(capsys.readouterr().out)
    assert all("already finished" in text for text in capsys_text)
    assert len(sweep.results) == count
    for flags in (["--gate_temperature", "2"], ["--gate_anneal", "0.5"], ["--gate_supervision", "energy"]):
        assert script("--method", "token_gate", *flags, "--dry_run") == 0
        planned = capsys.readouterr().out
        assert not any(name in planned for name in sweep.results["run_dir"])


def test_a_lost_table_is_restored_for_rows_of_an_older_version(sweep: Script, script: Script) -> None:
    """A cell of before there were gates: its row lacks their columns."""
    cell = sweep.cell(method="channel_energy")
    copy = script.runs / cell.name
    copy.mkdir(parents=True)
    record = json.loads((cell / "run.json").read_text())
    for name in ("active_r", "gate_params", "gate_flops_per_token", "gate", "metric_static", "acc_static"):
        del record["result"][name]
    (copy / "run.json").write_text(json.dumps(record))
    assert script("--method", "channel_energy") == 0
    row = script.results.iloc[0]
    assert tuple(script.results.columns) == RESULT_COLUMNS
    assert row["active_r"] == row["effective_r"]
    assert row["run_id"] == record["fingerprint"]


@pytest.mark.parametrize("method", ["token_gate", "energy_gate"])
def test_dry_run_lists_what_a_run_wrote(sweep: Script, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("--method", method, "--dry_run") == 0
    cell = sweep.cell(method=method) if method != "token_gate" else sweep.cell(gate="threshold penalty=5")
    planned = {Path(line).relative_to(sweep.runs) for line in capsys.readouterr().out.split("would write:")[1].split()}
    written = {path.relative_to(cell) for path in cell.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {Path(*path.parts[1:]) for path in planned if len(path.parts) > 1} == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "energy_gate", "--gate_select", "threshold"], "--gate_select threshold needs a gate that learns"),
        (["--method", "random_gate", "--gate_estimator", "relaxed"], "--gate_estimator relaxed needs"),
        (["--method", "energy_gate", "--gate_supervision", "task"], ""),
        (["--method", "token_gate", "--mask"], "--mask goes with methods that choose channels once"),
        (
            ["--method", "energy_gate", "--scope", "global"],
            "--scope global goes with methods that choose channels once",
        ),
        (["--method", "token_gate", "--keep_ratio", "0"], "keep_ratio must be in (0, 1], got 0.0"),
        (["--method", "token_gate", "--gate_anneal", "1.5"], "--gate_anneal must be a number in [0, 1], got 1.5"),
        (["--method", "token_gate", "--gate_temperature", "0"], "--gate_temperature must be a number above 0, got 0.0"),
        (["--method", "token_gate", "--gate_features", "all"], "invalid choice: 'all'"),
    ],
)
def test_flags_that_contradict_the_method(
    script: Script, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = script(*arguments, "--dry_run")
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    error = capsys.readouterr().err
    assert status == (2 if message else 0)
    assert message in error
    assert error.count("\n") == (1 if message else 0)
    assert not script.runs.exists()


def test_two_processes_share_heads_that_are_idle_at_first(script: Script, tmp_path: Path) -> None:
    flags = ["--train_bsz", "8", "--method", "token_gate", "--gate_anneal", "0.5", *THRESHOLD]
    start_two(str(ROOT / "prune_finetune_lora.py"), *script.arguments, *flags, folder=tmp_path)
    table = pd.read_csv(script.cell() / "token_gate.csv")
    assert table.groupby("module")["frequency"].sum().mean() == pytest.approx(script.results["active_r"].iloc[0])


def test_comparison_of_gates_with_their_references(sweep: Script, tmp_path: Path) -> None:
    assert main(["compare", str(sweep.runs), "--out_dir", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "comparisons.csv")
    static, others = (part for _, part in table.groupby(table["moment"] != "static"))
    against = others.groupby(["method", "keep_ratio"], sort=False)["reference"].unique().map(list).to_dict()
    baselines = [CONTROL, "channel_energy", "random_gate"]
    assert against == {
        ("token_gate", 0.5): [*baselines, "energy_gate"],
        ("token_gate", 1.0): [CONTROL],
        ("energy_gate", 0.5): baselines,
        ("random_gate", 0.5): baselines[:2],
        ("channel_energy", 0.5): [CONTROL],
        ("token_gate (threshold, penalty=5)", 0.5): [*baselines, "energy_gate", "token_gate"],
    }
    assert static.groupby(["method", "keep_ratio"], sort=False)["reference"].agg(list).to_dict() == {
        ("token_gate", 0.5): ["token_gate", "channel_energy"],
        ("energy_gate", 0.5): ["energy_gate", "channel_energy"],
        ("random_gate", 0.5): ["random_gate", "channel_energy"],
        ("token_gate (threshold, penalty=5)", 0.5): ["token_gate (threshold, penalty=5)", "channel_energy"],
    }
    assert (static["n_sentences"] == 40).all()
    report = (tmp_path / "out" / "compare.md").read_text()
    assert "best fixed subset" in report
    assert "Gates (`token_gate`" in report
    (study,) = read_sweep(sweep.runs / "results.csv")
    assert not [name for name in study.settings if "gate" in name]
