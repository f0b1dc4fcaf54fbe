"""The records in results/: small, with words for their provenance, and tables that rebuild from them byte for byte."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sparselora.__main__ import main
from sparselora.commands.grid import grid_command, parse_defaults
from sparselora.config.contrasts import read_contrasts
from sparselora.config.flags import resolve_config
from sparselora.errors import InputError
from sparselora.runs.grid import Line, read_grid
from sparselora.runs.packed import is_packed, pack, provenance, unpack
from tests.helpers.made_up_runs import write_gated_runs
from tests.helpers.paths import ROOT

RESULTS = ROOT / "results"


def _tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".md")}


def _script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, RESULTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.py")), ids=lambda path: path.name)
def test_every_script_can_be_imported(path: Path) -> None:
    """A renamed function of the package must not leave a script behind."""
    _script(str(path.relative_to(RESULTS)))


def test_records_are_few_and_small() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    sizes = [path.stat().st_size for path in files]
    assert len(files) <= 150
    assert sum(sizes) <= 6_000_000
    assert max(sizes) <= 1_000_000


def test_records_say_what_their_commit_is() -> None:
    packed = [path.parent for path in RESULTS.rglob("runs.csv") if is_packed(path.parent)]
    assert len(packed) == 7
    for path in [*(folder / "runs.csv" for folder in packed), RESULTS / "provenance.csv"]:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        commits = [None if commit in ("", "null") else commit for commit in table["commit"]]
        assert table["provenance"].tolist() == [provenance(commit) for commit in commits]
    assert all((RESULTS / name).is_dir() for name in table["result"])


def test_tables_of_the_pruning_sweep_rebuild_from_the_packed_one(tmp_path: Path, capsys) -> None:
    assert main(["compare", str(RESULTS / "pruning" / "runs"), "--out_dir", str(tmp_path / "compare")]) == 0
    assert _tables(tmp_path / "compare") == _tables(RESULTS / "pruning" / "compare")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arms", "sets", "model"),
    [
        ("encoder", ("sst2", "mnli"), "minilm"),
        ("decoder", ("gsm8k", "commonsense", "mawps"), "storyllama-20m"),
    ],
)
def test_tables_of_the_contextual_studies_rebuild(
    arms: str, sets: tuple[str, ...], model: str, tmp_path: Path, request
) -> None:
    if model != "minilm":  # its shape, for the shares of MACs
        model = str(request.getfixturevalue("shared") / "models" / model)
    study = RESULTS / "contextual"
    command = [sys.executable, str(study / "study.py"), *(str(study / "runs" / name) for name in sets)]
    subprocess.run([*command, "--model", model, "--out_dir", tmp_path], check=True, stdout=subprocess.DEVNULL)
    rebuilt, committed = _tables(tmp_path), _tables(study / arms)
    assert {name: rebuilt[name] for name in committed} == committed


def test_tables_of_the_token_gates_rebuild(tmp_path: Path, monkeypatch, capsys) -> None:
    for name, tables in (("encoder", ("means", "paired")), ("decoder", ("runs", "losses", "paired"))):
        folder = RESULTS / "token_gate" / name
        argv = ["table", str(folder / "runs.csv"), "--out_dir", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", argv)
        _script(f"token_gate/{name}_table.py").main()
        assert _tables(tmp_path / name) == {f"{table}.csv": (folder / f"{table}.csv").read_bytes() for table in tables}


def test_novelty_is_compared_with_random_within_each_data_set(tmp_path: Path, capsys) -> None:
    arms = {"accept_all": ("accept_all", 0.0), "half": ("none", 0.3), "random_0.3": ("random", 0.2)}
    write_gated_runs(tmp_path / "easy", arms | {"novelty_0.3": ("bernoulli", 0.1)})
    write_gated_runs(tmp_path / "hard", arms | {"novelty_0.3": ("bernoulli", 0.4)})
    pack(tmp_path / "hard", tmp_path / "packed" / "hard")
    rates = _script("novelty/rates.py")
    for name, hard in (("folders", tmp_path / "hard"), ("packed_too", tmp_path / "packed" / "hard")):
        assert rates.main([str(tmp_path / "easy"), str(hard), "--out_dir", str(tmp_path / name)]) == 0
    assert _tables(tmp_path / "folders") == _tables(tmp_path / "packed_too")
    study = pd.read_csv(tmp_path / "folders" / "study.csv")
    rows = study[study["question"] == "Better than random at rate 0.3?"].set_index("dataset")
    assert rows["final_loss_difference"].to_dict() == pytest.approx({"easy": -0.1, "hard": 0.2}, abs=1e-3)
    assert rows["answer"].to_dict() == {"easy": "better", "hard": "worse"}
    control = study[study["first"] == "half"]
    assert control["answer"].tolist() == ["worse", "worse"]
    runs = pd.read_csv(tmp_path / "folders" / "runs.csv")
    assert runs.groupby(["dataset", "arm"]).size().to_dict() == {(d, a): 2 for d in ("easy", "hard") for a in
                                                               (*arms, "novelty_0.3")}  # fmt: skip


# --- the grids ----------------------------------------------------------------------------------------------------

DECODER = ["results/contextual/decoder.yaml", "--train_samples"]
FIELDS = ["--prompt_field", "question", "--completion_field", "equation", "--device", "cpu"]
ENCODER = ["--epochs", "3", "--lr", "1e-3", "--train_bsz", "64", "--eval_bsz", "256"]
CONTEXTUAL = {
    "gsm8k": (("decoder_main", "decoder_factors"), [*DECODER, "4000"]),
    "commonsense": (("decoder_main",), [*DECODER, "4000"]),
    "mawps": (("decoder_main", "decoder_refresh"), [*DECODER, "0", *FIELDS]),
    "sst2": (("encoder",), ENCODER),
    "mnli": (("encoder",), ENCODER),
}
"""Grid files and shared flags behind each packed study, as results/contextual/README.md gives them."""
DATA = frozenset({"model", "dataset", "eval_file"})


def _lines(name: str, command: str, defaults: list[str], monkeypatch) -> list[Line]:
    monkeypatch.chdir(ROOT)  # the lines name files from there
    grid = grid_command(command)
    return read_grid(RESULTS / f"{name}.jsonl", grid, parse_defaults(grid, defaults))


@pytest.mark.parametrize("study", CONTEXTUAL)
def test_contextual_grids_give_the_recorded_settings(study: str, tmp_path: Path, monkeypatch) -> None:
    unpack(RESULTS / "contextual" / "runs" / study, tmp_path / study)
    records = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / study).glob("*/run.json")}
    files, defaults = CONTEXTUAL[study]
    data = ["--model", "m", "--dataset", "d.jsonl", "--eval_file", "e.jsonl"]
    lines = [line for name in files for line in _lines(f"contextual/{name}", "train", [*defaults, *data], monkeypatch)]
    assert {line.name for line in lines} == set(records)
    for line in lines:
        settings = resolve_config(argparse.Namespace(**line.values)).to_dict()
        recorded = records[line.name]["arguments"]
        sections = {name for name, value in recorded.items() if isinstance(value, dict)} - DATA
        for name in set(recorded) - DATA - sections:
            assert settings[name] == recorded[name], (line.name, name)
        for section in sections:
            # The seed of the sparsity was 0 in all of these runs, today it follows the run's; their oracle is now named
            # oracle_activation.
            former = {key: value for key, value in recorded[section].items() if key != "seed"}
            former |= {"mode": "oracle_activation"} if former.get("mode") == "oracle" else {}
            assert {key: settings[section][key] for key in former} == former, (line.name, section)


def test_quality_grid_gives_the_settings_of_the_runs_that_were_made(tmp_path: Path, monkeypatch) -> None:
    unpack(RESULTS / "fast" / "runs", tmp_path / "runs")
    records = {
        path.parent.name: json.loads(path.read_text())["arguments"] for path in (tmp_path / "runs").glob("*/run.json")
    }
    data = ["--model", "m", "--dataset", "d.jsonl", "--eval_file", "e.jsonl", "--device", "cuda"]
    lines = _lines("fast/quality", "train", ["results/fast/quality.yaml", *data], monkeypatch)
    settings = {line.name: resolve_config(argparse.Namespace(**line.values)).to_dict() for line in lines}
    assert sorted(records) == sorted(
        f"{arm}_s{seed}" for arm in ("dense", "fp8", "both", "dense_time_both") for seed in range(3)
    )
    for name, recorded in records.items():
        for setting in set(recorded) - DATA - {"sparsity"}:
            assert settings[name][setting] == recorded[setting], (name, setting)
        former = {key: value for key, value in recorded["sparsity"].items() if key != "seed"}
        assert {key: settings[name]["sparsity"][key] for key in former} == former, name


def _tuned(folder: Path, losses: Mapping[str, float]) -> None:
    for name, loss in losses.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "summary.csv").write_text(f"eval_loss\n{loss}\n")


def test_grids_of_the_quality_study_hold_every_arm_of_its_contrasts(tmp_path: Path, monkeypatch) -> None:
    study = _script("fast/study.py")
    speed = pd.read_csv(RESULTS / "fast" / "speed.csv")
    speed = speed[speed["group"] != "sampled"]
    assert "dense_time_fp8_sampled_half" not in study.equal_time_steps("qwen", speed)
    timed = {"dense": 200.0, "fp8 + sampled half": 101.0, "sampled half": 150.0}
    rows = [{"group": "sampled", "variant": name, "step_ms": ms} for name, ms in timed.items()]
    speed = pd.concat([speed, pd.DataFrame(rows)], ignore_index=True)

    arms, rates = ("dense", "both", "dense_time_both", "fp8_upper"), (0.0009, 0.0018, 0.0027)
    losses = {f"{arm}_lr{rate}": 1 + abs(i - j) for i, arm in enumerate(arms) for j, rate in enumerate(rates)}
    losses["both_lr0.0009"] = float("nan")  # a run that diverged is never the best one
    _tuned(tmp_path / "tune_qwen", losses)
    _tuned(tmp_path / "tune_smollm2", losses)
    study.write_grids("main", tmp_path, speed)

    text = (RESULTS / "fast" / "study.yaml").read_text()
    named = set(re.findall(r"(?:first|second): ([a-z0-9_]+)", text))
    monkeypatch.chdir(ROOT)
    grid = grid_command("train")
    data = ["--model", "m", "--dataset", "d.jsonl", "--eval_file", "e.jsonl", "--device", "cpu"]
    defaults = parse_defaults(grid, ["results/fast/quality.yaml", *data])
    for model in ("qwen", "smollm2"):
        lines = {line.name: line.values for line in read_grid(tmp_path / "grids" / f"{model}.jsonl", grid, defaults)}
        assert {f"{arm}_s{seed}" for arm in named for seed in range(3, 9)} <= set(lines)
        assert not any(name.endswith(("_s0", "_s1", "_s2")) for name in lines)  # those were seen
        settings = {name: resolve_config(argparse.Namespace(**values)).to_dict() for name, values in lines.items()}
        assert len({json.dumps(values) for values in settings.values()}) == len(lines)  # no configuration twice
        chosen = {arm: settings[f"{arm}_s3"]["lr"] for arm in named}
        assert [chosen["dense"], chosen["both"], chosen["dense_time_both"], chosen["fp8_upper"]] == [
            0.0009, 0.0018, 0.0027, 0.0027,
        ]  # fmt: skip
        assert [chosen["fp8"], chosen["none"], chosen["sampled_half"]] == [0.0009, 0.0018, 0.0027]
        sparsity = settings["fp8_sampled_half_s8"]["sparsity"]
        assert (sparsity["frozen_precision"], sparsity["context_backward"]) == ("fp8", "sampled")
        steps = study.STEPS[model]
        assert settings["dense_s3"]["max_steps"] in (0, steps)
        longest = settings["dense_time_fp8_sampled_half_s3"]["max_steps"]
        assert longest * 200 >= steps * 101 > (longest - 1) * 200  # the fewest steps that take no less time
    breaks = read_grid(tmp_path / "grids" / "breaks.jsonl", grid, defaults)
    pairs: dict[str, list[dict[str, Any]]] = {}
    for line in breaks:
        values = resolve_config(argparse.Namespace(**line.values)).to_dict()
        pairs.setdefault(line.name.partition("_")[2], []).append(values)
    for first, second in pairs.values():  # dense and fp8 differ in nothing else
        assert {first["sparsity"].pop("frozen_precision"), second["sparsity"].pop("frozen_precision")} == {
            "native", "fp8",
        }  # fmt: skip
        assert first == second


def test_tables_of_the_quality_study_are_of_its_records(tmp_path: Path) -> None:
    study = _script("fast/study.py")
    unpack(RESULTS / "fast" / "runs", tmp_path / "all")
    rng = np.random.default_rng(0)
    loss: dict[str, list[float]] = {"dense": [], "fp8": [], "both": []}
    for arm, losses in loss.items():
        for path in sorted((tmp_path / "all").glob(f"{arm}_s*"))[:3]:
            (tmp_path / "runs" / "qwen").mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / "runs" / "qwen" / path.name)
            losses.append(
                float(pd.read_csv(tmp_path / "runs" / "qwen" / path.name / "summary.csv")["eval_loss"].iloc[0])
            )
    names = sorted(path.name for path in (tmp_path / "runs" / "qwen").iterdir())
    rows = pd.read_csv(tmp_path / "runs" / "qwen" / names[0] / "predictions.csv")["row"]
    matches = {}
    for name in ["base", *names]:
        folder = tmp_path / "runs" / "exact" / name
        folder.mkdir(parents=True)
        items = pd.DataFrame({"row": rows, "correct": rng.integers(0, 2, len(rows))}).sample(frac=1, random_state=1)
        items.to_csv(folder / "items_gsm8k.csv", index=False)
        matches[name] = items.set_index("row")["correct"]
        metrics = {"n": len(rows), "exact_match": float(items["correct"].mean())}
        (folder / "metrics_gsm8k.json").write_text(json.dumps(metrics))
        (folder / "run.json").write_text(json.dumps({"command": "eval", "status": "success", "commit": "c"}))
    for part, name, lr, status in (
        ("tune_qwen", "dense_lr0.001", 0.001, "success"), ("tune_qwen", "dense_lr0.003", 0.003, "success"),
        ("breaks", "dense_r4_s3", 0.001, "success"), ("breaks", "fp8_r4_s3", 0.001, "failed"),
    ):  # fmt: skip
        folder = tmp_path / "runs" / part / name
        folder.mkdir(parents=True)
        record = {"command": "train", "status": status, "seed": 3, "commit": "c", "arguments": {"lr": lr}}
        (folder / "run.json").write_text(json.dumps(record))
        summary = {"steps": 9, "eval_rows": 5, "eval_loss": 1 + lr, "eval_accuracy": 0.5}
        if status == "success":
            pd.DataFrame([summary]).to_csv(folder / "summary.csv", index=False)

    target = tmp_path / "records"
    target.mkdir()
    (target / "study.yaml").write_text((RESULTS / "fast" / "study.yaml").read_text())
    study.pack_runs(tmp_path / "runs", target)
    speed = pd.read_csv(RESULTS / "fast" / "speed.csv")
    (target / "README.md").write_text("no place for a table")
    with pytest.raises(InputError, match="qwen contrasts"):
        study.write_tables(target, speed)
    marked = ["qwen contrasts", "qwen arms", "qwen rates", "breaks"]
    (target / "README.md").write_text("".join(f"{name}\n<!-- {name} -->\nold\n<!-- end -->\n" for name in marked))
    study.write_tables(target, speed)
    page = (target / "README.md").read_text()
    study.write_tables(target, speed)
    assert (target / "README.md").read_text() == page  # written over, not appended

    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    dense, both = np.array(loss["dense"]), np.array(loss["both"])
    interval = stats.ttest_rel(both, dense).confidence_interval()
    contrast = next(row for row in cells if row[0] == "both − dense")
    assert contrast[2] == f"{(both - dense).mean():+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
    assert f"{100 * (both - dense).mean() / dense.mean():+.2f} [" in contrast[3]
    family = len(re.findall("first:", (target / "study.yaml").read_text()))
    assert contrast[4] == f"{family * stats.ttest_rel(both, dense).pvalue:.3f}"  # the first of Holm's steps
    arm = next(row for row in cells if row[0] == "both" and len(row) > 6)
    mean = np.mean([matches[name].mean() for name in names if name.startswith("both")])
    assert arm[8] == f"{100 * mean:.1f} (3)"
    assert ["dense", "1.0010", "1.0030"] in [[cell.strip("*") for cell in row] for row in cells]
    assert any("**1.0010**" in row for row in cells)
    assert next(row for row in cells if row[0] == "r4")[1:] == ["1.0010", "", "failed, not run"]
    packed = pd.read_csv(target / "runs" / "predictions.csv.gz").set_index("row")
    assert packed[f"{names[0]}/exact"].to_dict() == matches[names[0]].to_dict()  # row by row, though in another order


def test_equal_times_of_two_arms_are_two_runs() -> None:
    study = _script("fast/study.py")
    variants = {"main": ("fp8", "no context backward", "both"), "sparse": ("both, upper half", "both + static 90 %"),
                "sampled": ("fp8 + sampled half",)}  # fmt: skip
    rows = [(group, name, 50.0) for group, names in variants.items() for name in names]
    rows += [(group, "dense", 100.0) for group in variants]
    steps = study.equal_time_steps("qwen", pd.DataFrame(rows, columns=["group", "variant", "step_ms"]))
    assert sorted(steps.values()) == [94, 95, 96, 97, 98, 99]
    assert steps["dense_time_both"] == 94


def test_grids_of_the_quality_study_want_rates_that_were_tuned(tmp_path: Path) -> None:
    study = _script("fast/study.py")
    speed = pd.read_csv(RESULTS / "fast" / "speed.csv")
    _tuned(tmp_path / "tune_qwen", {"dense_lr0.0009": 1.0, "both_lr0.0009": float("inf")})
    with pytest.raises(InputError, match="no finished run of both, dense_time_both, fp8_upper"):
        study.write_grids("main", tmp_path, speed)


def test_verdicts_of_the_quality_study_are_those_of_its_page(tmp_path: Path, capsys) -> None:
    study, packed = RESULTS / "fast" / "study.yaml", str(RESULTS / "fast" / "runs")
    assert main(["compare", packed, "--study", str(study), "--out_dir", str(tmp_path / "all")]) == 2
    assert "sampled_half" in capsys.readouterr().err  # the runs of one contrast were not made
    later = ("sampled_half", "fp8_upper")  # arms without runs
    lines = [line for line in study.read_text().splitlines() if not any(arm in line for arm in later)]
    (tmp_path / "judged.yaml").write_text("\n".join(["family: 4", *lines]))
    command = ["compare", packed, "--study", str(tmp_path / "judged.yaml"), "--out_dir", str(tmp_path / "judged")]
    assert main(command) == 0
    page = (RESULTS / "fast" / "README.md").read_text(encoding="utf-8").replace("−", "-")
    contrasts = pd.read_csv(tmp_path / "judged" / "contrasts.csv")
    assert len(contrasts) == 3
    for row in contrasts.itertuples():
        assert f"{row.difference:+.4f} [{row.ci_low:+.4f}, {row.ci_high:+.4f}] | {row.t_p_adjusted:.3f} |" in page
        assert f"| {row.verdict} |" in page


def test_rank_grids_set_what_their_arms_are_named_for(tmp_path: Path, monkeypatch) -> None:
    study, data = _script("rank/study.py"), ["--model", "m", "--dataset", "d.jsonl"]
    rates = dict.fromkeys(study.TUNED["qwen"], 3e-3) | {"r16": 7e-4}

    def lines(written: list[dict[str, Any]], command: str, defaults: list[str]) -> list[Line]:
        study.write_grid(tmp_path / "grid.jsonl", written)
        grid = grid_command(command)
        return read_grid(tmp_path / "grid.jsonl", grid, parse_defaults(grid, [*defaults, *data]))

    monkeypatch.chdir(ROOT)
    base = ["results/rank/rank.yaml"]
    for model, count in (("smollm2", 49), ("qwen", 20)):
        assert len(lines(study.tuning_lines(model), "train", base)) == 3 * len(study.TUNED[model])
        runs = lines(study.main_lines(model, rates), "train", base)
        assert len(runs) == count
        for line in runs:
            config = resolve_config(argparse.Namespace(**line.values))
            arm, last_rank = line.name.rsplit("_s", 1)[0], int(re.findall(r"\d+", line.name)[-2])
            assert (config.squeeze or f"{config.lora_r}").split(":")[-1] == str(last_rank)
            assert config.lora_alpha == 2 * config.lora_r
            assert config.squeeze_budget == ("global" if "budget" in arm else "uniform")
            assert config.lr == (7e-4 if arm in ("r16", "squeeze_16_4") else 3e-3)
    cells = lines(study.pruning_lines(rates), "prune", ["--task", "causal_lm"])
    assert {(line.values["method"], line.values["lr"]) for line in cells} == {(m, 7e-4) for m in study.METHODS}
    sides = {side for contrast in read_contrasts(RESULTS / "rank" / "study.yaml").contrasts
             for side in (contrast.first, contrast.second)}  # fmt: skip
    assert sides == set(study.PRIMARY)


def test_tables_of_the_profiles_agree_with_one_another() -> None:
    """Costs of single layers stand in three tables, of which the largest is rounded."""
    tables = RESULTS / "profile"
    cells = pd.read_csv(tables / "cells.csv.gz")
    layers, schedules = (pd.read_csv(tables / f"{name}.csv") for name in ("layers", "schedules"))
    skipped = cells[cells["mode"] == "skip"].set_index(["profile", "layer"])["percent"]
    verdicts = layers[layers["part"] == "ffn"].set_index(["profile", "layer"])["skip_percent"]
    assert skipped.to_dict() == pytest.approx(verdicts.to_dict(), rel=1e-5)
    ranges = schedules[schedules["schedule"].str.startswith("layers") & (schedules["rows"] == "measured")]
    assert set(ranges["profile"]) == {"qwen05_gsm8k"}  # the page says why those of the others are withdrawn
    assert len(ranges) == 5 * 6  # levels, modes
    for row in ranges.to_dict("records"):
        first, last, level = re.fullmatch(r"layers (\d+)-(\d+) at ([\d.]+)", row["schedule"]).groups()
        summed = cells[
            (cells["profile"] == row["profile"]) & (cells["part"] == "ffn") & (cells["mode"] == row["mode"])
            & cells["layer"].between(int(first), int(last)) & cells["sparsity"].isin([float(level), 1.0])
        ]  # fmt: skip
        assert summed["percent"].sum() == pytest.approx(row["sum_of_layers_percent"], rel=1e-4, abs=1e-4)
    cut_off = layers[layers["status"] == "cancelled"]
    assert cut_off["profile"].unique().tolist() == ["qwen05_mnli"]
    assert cut_off["shuffled_passes"].isna().all()  # not measured, so neither passed nor failed


def test_pruning_grid_gives_the_recorded_settings(tmp_path: Path, monkeypatch) -> None:
    unpack(RESULTS / "pruning" / "runs", tmp_path / "runs")
    records = [json.loads(path.read_text())["arguments"] for path in (tmp_path / "runs").glob("*/run.json")]
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    command = text[text.index("grid results/pruning/sweep.jsonl") :].split("```")[0]
    defaults = command.split("--defaults", 1)[1].split("python -m", 1)[0].replace("\\\n", " ").split()
    lines = _lines("pruning/sweep", "prune", defaults, monkeypatch)
    shared = {name for name in records[0] if name in lines[0].values} - DATA
    assert len(shared) > 15

    def key(values: Mapping[str, Any]) -> str:
        settings = {name: values[name] for name in shared}
        if settings["method"] == "no_prune":  # of which the ratio says nothing
            settings["keep_ratio"] = 1.0
        numbers = {name: float(value) for name, value in settings.items() if isinstance(value, (int, float))}
        return json.dumps(settings | numbers, sort_keys=True)

    assert sorted(key(line.values) for line in lines) == sorted(map(key, records))


def test_other_grids_name_the_runs_of_the_tables(monkeypatch) -> None:
    data = ["--model", "m", "--dataset", "d.jsonl"]
    runs = pd.read_csv(RESULTS / "novelty" / "runs.csv")
    for study, name in (("gsm8k", "gsm8k"), ("mnli", "encoder"), ("sst2", "encoder"), ("mawps", "mawps")):
        rows = runs[runs["dataset"] == study]
        base = "encoder" if name == "encoder" else "decoder"
        lines = _lines(f"novelty/{name}", "train", [f"results/novelty/{base}.yaml", *data], monkeypatch)
        assert sorted(line.name for line in lines) == sorted(rows["arm"] + "_s" + rows["seed"].astype(str))
    gates = pd.read_csv(RESULTS / "token_gate" / "decoder" / "runs.csv").fillna({"gate_basis": "", "gate_budget": 0})
    lines = _lines(
        "token_gate/decoder", "train", ["results/novelty/decoder.yaml", "--novelty", "none", *data], monkeypatch
    )
    settings = [resolve_config(argparse.Namespace(**line.values)) for line in lines]
    resolved = [
        ("none", "", 0.0, config.lora_r, config.seed) if config.token_gate is None
        else (config.token_gate.policy, config.token_gate.basis, config.token_gate.budget, config.lora_r, config.seed)
        for config in settings
    ]  # fmt: skip
    columns = gates[["gate_policy", "gate_basis", "gate_budget", "lora_r", "seed"]]
    assert sorted(resolved) == sorted(columns.itertuples(index=False, name=None))
    cells = pd.read_csv(RESULTS / "token_gate" / "encoder" / "runs.csv")
    names = ("method", "keep_ratio", "lora_r", "seed")
    shared = [*data, "--lora_r", "8", "--lora_alpha", "16"]
    main_lines, ablations = (
        [tuple(1.0 if name == "keep_ratio" and line.values["method"] == "no_prune" else line.values[name]
               for name in names)
         for line in _lines(f"token_gate/{grid}", "prune", shared, monkeypatch)]
        for grid in ("encoder_main", "encoder_ablations")
    )  # fmt: skip
    for study, lines in (("mnli_train_10k", main_lines), ("sst2_sentences_train", main_lines + ablations)):
        rows = cells.loc[cells["dataset"] == study, list(names)]
        rows.loc[rows["method"] == "no_prune", "keep_ratio"] = 1.0
        assert sorted(lines) == sorted(rows.itertuples(index=False, name=None))
    all_edits = pd.read_csv(RESULTS / "spectral" / "edits.csv")
    for study in ("mawps", "mawps_early", "sst2"):
        edits = all_edits[all_edits["folder"] == study]
        lines = _lines(f"spectral/{study}", "edit", ["--model", "m"], monkeypatch)
        modes = sorted((line.values["mode"], line.values["seed"]) for line in lines)
        assert modes == sorted(edits[["mode", "seed"]].itertuples(index=False, name=None))
