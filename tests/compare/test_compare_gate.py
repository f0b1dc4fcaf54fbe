"""`compare` on runs with a novelty gate: what it reads, what it concludes, and how it says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sparselora.__main__ import main
from sparselora.compare.gated_runs import (
    GatedComparison,
    gate_behaviour,
    gate_table,
    loss_curves,
    policy_of,
    read_gated_runs,
    verdict_sentence,
)
from sparselora.compare.training_runs import read_runs
from sparselora.config.novelty import GateConfig
from sparselora.config.train import TrainConfig
from sparselora.errors import InputError

STEPS, EVERY, ROWS = 100, 20, 40
TOKENS = 50
COSTS = {"step_ms": 10.0, "tokens_per_s": 1000.0, "peak_mb": 100.0, "active_flops_per_token": 1e6, "sparse_steps": 0}
RATE, BURN_IN = 0.25, 20


class Maker:
    """Writes folders as `train` leaves them: 100 steps, an evaluation every 20, 50 tokens and 10 ms a step.

    A gated run accepts its first 20 steps, and then every fourth; a step that it skips takes 4 ms.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(
        self, name: str, seed: int, losses: Sequence[float] | float, policy: str | None = None, *, old: bool = False,
        gate: dict[str, Any] | None = None, gated: bool = True, metrics: bool = True, step_ms: float = 10.0,
        check: dict[str, float] | None = None,
        **settings: Any,
    ) -> Path:  # fmt: skip
        folder = self.root / name
        folder.mkdir(parents=True)
        curve = [losses + 0.1 * k for k in (4, 3, 2, 1, 0)] if isinstance(losses, float) else list(losses)
        config = TrainConfig(model="tiny", dataset="d.jsonl", task="causal_lm", seed=seed).to_dict() | settings
        section = GateConfig(policy=policy, target_accept_rate=RATE, **gate or {}).to_dict() if policy else None
        config = {name: value for name, value in config.items() if name != "slora"} | (
            {} if old else {"novelty": section}
        )
        record = {"command": "train", "status": "success", "arguments": config, "device": "cpu", "seed": seed}
        (folder / "run.json").write_text(json.dumps(record))
        steps = np.arange(1, STEPS + 1)
        accept = (steps <= BURN_IN) | (steps % 4 == 0) if policy not in (None, "accept_all") else steps > 0
        milliseconds = np.where(accept, step_ms, 0.4 * step_ms)
        tokens = np.full(STEPS, TOKENS)
        if metrics:
            table = {"step": steps, "tokens": tokens, "step_ms": milliseconds}
            pd.DataFrame(table).to_csv(folder / "metrics.csv", index=False)
        self._evaluations(folder, curve, seed)
        summary: dict[str, Any] = {"model": "tiny", "dataset": "d", "task": "causal_lm", "steps": STEPS} | COSTS
        summary |= {"eval_loss": curve[-1], "eval_accuracy": 1 / curve[-1]}
        if not old:
            summary |= {
                "policy": policy or "none",
                "target_rate": RATE if policy else np.nan,
                "accepted_steps": accept.sum(),
                "acceptance_rate": accept[BURN_IN:].mean() if policy else np.nan,
                "gated_decisions": (STEPS - BURN_IN) * bool(policy and gated),
                "tokens_seen": tokens.sum(),
                "tokens_trained": tokens[accept].sum(),
            }
        pd.DataFrame([summary | (check or {})]).to_csv(folder / "summary.csv", index=False)
        if policy:
            self._decisions(folder, accept, tokens, milliseconds, "novelty" in policy)
        return folder

    def _evaluations(self, folder: Path, curve: Sequence[float], seed: int) -> None:
        at = [EVERY * (k + 1) for k in range(len(curve))]
        table = {"step": at, "loss": curve, "accuracy": [1 / loss for loss in curve], "n": 5 * ROWS}
        pd.DataFrame(table).to_csv(folder / "eval.csv", index=False)
        noise = np.random.default_rng(seed).normal(0, 0.1, ROWS)
        loss = 5 * (curve[-1] + noise - noise.mean())
        rows = {"row": np.arange(ROWS), "tokens": 5, "loss": loss, "correct": 2}
        pd.DataFrame(rows).to_csv(folder / "predictions.csv", index=False)

    def _decisions(
        self, folder: Path, accept: np.ndarray, tokens: np.ndarray, milliseconds: np.ndarray, sketched: bool
    ) -> None:
        steps = np.arange(1, STEPS + 1)
        table = {
            "step": steps, "micro": 0, "novelty": 0.6 if sketched else np.nan, "novelty_raw": np.nan,
            "accept": accept.astype(int), "acceptance_rate": np.cumsum(accept) / steps,
            "threshold": np.where(steps > BURN_IN, 0.5, np.nan) if sketched else np.nan,
            "accepted_steps": np.cumsum(accept), "total_steps": steps, "loss": 2.0, "tokens": tokens,
            "tokens_seen": np.cumsum(tokens), "tokens_trained": np.cumsum(tokens * accept),
            "wall_s": np.cumsum(milliseconds) / 1000 + 7.0,
        }  # fmt: skip
        pd.DataFrame(table).to_csv(folder / "gate.csv", index=False)


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Maker(tmp_path / "runs")


def study_of(*paths: Path, baseline: Path | None = None) -> GatedComparison:
    return read_gated_runs(read_runs(paths, baseline))


def table_of(*paths: Path) -> pd.DataFrame:
    return gate_table(study_of(*paths), np.random.SeedSequence(0)).set_index("policy")


def arms(make: Make, base: Sequence[float], novelty: Sequence[float], **how: Any) -> list[Path]:
    paths = [make(f"base_s{seed}", seed, loss) for seed, loss in enumerate(base)]
    return paths + [make(f"novelty_s{seed}", seed, loss, "novelty", **how) for seed, loss in enumerate(novelty)]


# --- numbers ------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_a_hand_computation(make: Make) -> None:
    base, gated = [2.0, 2.1, 1.9], [2.03, 2.11, 1.92]
    table = table_of(*arms(make, base, gated))
    assert list(table.index) == ["none", "novelty"]
    row = table.loc["novelty"]
    # 20 of burn-in and every fourth of the other 80; 10 ms for each of those 40, 4 ms for each of the others.
    assert row["accepted_steps"] == 40
    assert row["fewer_steps_pct"] == pytest.approx(60)
    assert row["acceptance_rate"] == pytest.approx(0.25)
    assert row["tokens_seen"] == 100 * TOKENS
    assert row["tokens_trained"] == 40 * TOKENS
    assert row["wall_s"] == pytest.approx(0.4 + 0.24)
    assert table.loc["none", "wall_s"] == pytest.approx(1.0)
    assert table.loc["none", "tokens_trained"] == 100 * TOKENS
    assert (row["target_rate"], row["k"], row["burn_in"]) == (RATE, 64, 2000)
    assert row["final_loss"] == pytest.approx(np.mean(gated))
    assert row["best_accuracy"] == pytest.approx(np.mean(1 / np.array(gated)))
    differences = np.subtract(gated, base)
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert row["final_loss_difference"] == pytest.approx(differences.mean())
    assert (row["final_loss_ci_low"], row["final_loss_ci_high"]) == pytest.approx((low, high))
    assert row["final_loss_p"] == pytest.approx(stats.ttest_rel(gated, base).pvalue)
    relative = 100 * (np.divide(gated, base) - 1)
    assert row["relative_pct"] == pytest.approx(relative.mean())
    ends = stats.t.interval(0.95, 2, relative.mean(), stats.sem(relative))
    assert (row["relative_low"], row["relative_high"]) == pytest.approx(ends)
    assert row["n_rows"] == ROWS
    assert row["row_difference"] == pytest.approx(differences.mean(), abs=1e-4)
    assert row["row_ci_low"] <= row["row_difference"] <= row["row_ci_high"]


def test_best_is_of_all_evaluations(make: Make) -> None:
    row = table_of(make("base", 0, 2.0), make("novelty", 0, [2.5, 2.2, 1.8, 1.9, 2.0], "novelty")).loc["novelty"]
    assert (row["final_loss"], row["best_loss"]) == (2.0, 1.8)
    assert row["best_loss_difference"] == pytest.approx(-0.2)


def test_rows_are_compared_by_loss_in_classification_too(make: Make) -> None:
    paths = [
        make("base", 0, 2.0, task="classification"), make("novelty", 0, 2.1, "novelty", task="classification")
    ]  # fmt: skip
    for path in paths:
        table = pd.read_csv(path / "predictions.csv").drop(columns="tokens")
        table.assign(label=1, correct=1).to_csv(path / "predictions.csv", index=False)
    row = table_of(*paths).loc["novelty"]
    assert row["row_difference"] == pytest.approx(0.5, abs=1e-3), "each row's loss is five times its mean over tokens"


# --- equal expense ------------------------------------------------------------------------------------------------


def test_baseline_is_read_at_equal_steps_and_at_equal_time(make: Make) -> None:
    paths = [
        make("base", 0, [3.0, 2.8, 2.5, 2.3, 2.2]), make("novelty", 0, 2.4, "novelty"),
        make("base_s1", 1, [4.0, 3.8, 3.5, 3.3, 3.2]), make("novelty_s1", 1, 3.2, "novelty"),
    ]  # fmt: skip
    row = table_of(*paths).loc["novelty"]
    assert row["at_steps_seeds"] == row["at_wall_seeds"] == 2
    # 40 updates: the baseline's second evaluation. 0.64 s: its 64th step, a fifth of the way from the third to the 4th.
    assert row["at_steps_baseline_loss"] == pytest.approx((2.8 + 3.8) / 2)
    assert row["at_steps_difference"] == pytest.approx(((2.4 - 2.8) + (3.2 - 3.8)) / 2)
    assert row["at_wall_baseline_loss"] == pytest.approx(((2.5 - 0.2 * 0.2) + (3.5 - 0.2 * 0.2)) / 2)
    assert row["at_wall_difference"] == pytest.approx(((2.4 - 2.46) + (3.2 - 3.46)) / 2)
    gap = np.array([2.4 - 2.8, 3.2 - 3.8])
    ends = stats.t.interval(0.95, 1, gap.mean(), stats.sem(gap))
    assert (row["at_steps_ci_low"], row["at_steps_ci_high"]) == pytest.approx(ends)


def test_out_of_range_is_not_reached(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make("base", 0, 2.0)
    pd.read_csv(base / "eval.csv").iloc[2:].to_csv(base / "eval.csv", index=False)  # from step 60 on
    slow = make("slow", 0, 2.0, "novelty", step_ms=20.0)  # 1.28 s, when the baseline had ended after 1 s
    row = table_of(base, slow).loc["novelty"]
    assert row["at_steps_seeds"] == row["at_wall_seeds"] == 0
    assert np.isnan(row["at_steps_baseline_loss"])
    assert np.isnan(row["at_wall_difference"])
    assert main(["compare", str(base), str(slow), "--out_dir", str(tmp_path / "out")]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.count("not reached") == 2]
    assert line.startswith("| novelty")


def test_times_are_read_from_one_clock(make: Make) -> None:
    # gate.csv's clock has run for seven seconds more: through evaluations that the steps of the baseline leave out.
    paths = [make("base", 0, 2.0), make("novelty", 0, 2.0, "novelty")]
    assert table_of(*paths).loc["novelty", "wall_s"] == pytest.approx(0.64)
    (paths[1] / "metrics.csv").unlink()
    assert table_of(*paths).loc["novelty", "wall_s"] == pytest.approx(7.64)
    assert any("No metrics.csv in novelty" in note for note in study_of(*paths).notes)


def test_micro_batches_are_counted_by_their_window(make: Make) -> None:
    paths = [make("base", 0, 2.0), make("novelty", 0, 2.0, "novelty", gate={"unit": "micro_batch"})]
    table = pd.read_csv(paths[1] / "gate.csv")
    first = table.assign(micro=0, accept=0, tokens_seen=table["tokens_seen"] - 10)
    both = pd.concat([first, table.assign(micro=1)]).sort_values(["step", "micro"])
    both.to_csv(paths[1] / "gate.csv", index=False)
    study = study_of(*paths)
    run = study.arms[1].runs[0]
    assert list(run.evaluations["accepted_steps"]) == [20, 25, 30, 35, 40]
    assert list(run.evaluations["tokens_seen"]) == [1000, 2000, 3000, 4000, 5000]
    assert gate_behaviour(study)["accepted_share"].iloc[0] == 0.5, "one of two batches in each window of the burn-in"


# --- verdicts -----------------------------------------------------------------------------------------------------

BASE = [2.0, 2.1, 1.9]


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ([1.001, 1.002, 1.0015], "yes"),
        ([0.999, 0.998, 0.9985], "yes"),
        ([1.02, 1.021, 1.019], "no"),
        ([0.98, 0.979, 0.981], "no"),
        ([1.002, 1.02, 0.99], "undecided"),
        ([1.0049, 1.0052, 1.0055], "undecided"),
        ([1.0, 1.0, 1.0], "yes"),
    ],
)
def test_verdict_needs_the_whole_interval(make: Make, factors: list[float], verdict: str) -> None:
    row = table_of(*arms(make, BASE, [f * b for f, b in zip(factors, BASE)])).loc["novelty"]
    assert row["verdict"] == verdict
    sign = "-" if np.mean(factors) < 1 else r"\+"
    text = verdict_sentence(row.to_dict())
    pattern = (
        r"novelty: within 0\.5 % of the baseline's loss at 60\.0 % fewer accepted steps: "
        rf"\*\*{verdict}\*\* \(difference {sign}\d\.\d\d % \[[+-]\d\.\d\d, [+-]\d\.\d\d\] over 3 seeds\)\."
    )
    assert re.fullmatch(pattern, text), text


def test_one_seed_has_no_interval_and_says_so(make: Make) -> None:
    row = table_of(*arms(make, [2.0], [2.0])).loc["novelty"]
    assert row["verdict"] == "undecided"
    assert "one seed: no interval" in verdict_sentence(row.to_dict())


def test_no_gating_happened_where_the_run_ended_in_its_burn_in(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = arms(make, BASE, BASE, gated=False)
    row = table_of(*paths).loc["novelty"]
    assert row["verdict"] == "no gating happened"
    assert main(["compare", *map(str, paths), "--out_dir", str(tmp_path / "out")]) == 0
    assert "novelty: **no gating happened**" in capsys.readouterr().out


def test_seeds_without_a_partner_leave_nothing_to_conclude(make: Make) -> None:
    row = table_of(make("base", 0, 2.0), make("novelty", 1, 2.0, "novelty")).loc["novelty"]
    assert (row["n_pairs"], row["verdict"]) == (0, "")
    assert "no seed in common" in verdict_sentence(row.to_dict())


# --- which runs, and which baseline -------------------------------------------------------------------------------


def test_baseline_is_the_run_that_skips_nothing(make: Make) -> None:
    novelty, everything = make("novelty", 0, 2.0, "novelty"), make("all", 0, 2.0, "accept_all")
    assert policy_of(study_of(novelty, everything).baseline) == "accept_all"
    plain = make("plain", 0, 2.0)
    assert study_of(novelty, everything, plain).baseline.label == "plain PEFT"
    assert policy_of(study_of(novelty, plain, baseline=everything).baseline) == "accept_all"


def test_without_such_a_run_there_is_no_verdict(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [make("random", 0, 2.0, "random"), make("novelty", 0, 2.0, "novelty")]
    study = study_of(*paths)
    assert not study.has_verdict
    assert set(gate_table(study, np.random.SeedSequence(0))["verdict"]) == {""}
    assert main(["compare", *map(str, paths), "--out_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "**No verdict**: the baseline, random, skips steps itself" in printed
    assert "within 0.5 %" not in printed


def test_old_runs_without_the_new_columns_are_ungated(make: Make) -> None:
    old = [make(f"old_s{s}", s, 2.0, old=True, metrics=False) for s in range(2)]
    new = [make("same_s2", 2, 2.0), *(make(f"novelty_s{s}", s, 2.0, "novelty") for s in range(3))]
    study = study_of(*old, *new)
    assert [(arm.label, len(arm.runs)) for arm in study.arms] == [("plain PEFT", 3), ("novelty", 3)], (
        "a section that is null reads as one that is not there"
    )
    table = gate_table(study, np.random.SeedSequence(0))
    assert list(table["accepted_steps"]) == [100, 40]
    assert table["fewer_steps_pct"].iloc[1] == pytest.approx(60)
    assert table["at_steps_seeds"].iloc[1] == 3
    assert table["at_wall_seeds"].iloc[1] == 1, "an old run without metrics.csv has no clock"
    assert "No metrics.csv in old_s0, old_s1" in study.notes[0]


def test_arms_are_told_apart_by_what_they_differ_in(make: Make) -> None:
    paths = [
        make("base", 0, 2.0), make("a", 0, 2.0, "novelty"), make("b", 0, 2.0, "novelty", gate={"k": 16}),
        make("off", 1, 2.0, "novelty", gate={"enable": False}),
    ]  # fmt: skip
    record = json.loads((paths[1] / "run.json").read_text())
    section = record["arguments"]["slora"] = record["arguments"].pop("novelty")  # as earlier runs recorded it
    section["target_novelty"], section["target_accept_rate"] = section["target_accept_rate"], None
    (paths[1] / "run.json").write_text(json.dumps(record))
    summary = pd.read_csv(paths[3] / "summary.csv").assign(policy="none")
    summary.to_csv(paths[3] / "summary.csv", index=False)
    study = study_of(*paths)
    assert [arm.label for arm in study.arms] == ["plain PEFT", "novelty k=64", "novelty k=16"]
    assert list(study.baseline.runs) == [0, 1], "a gate that is not enabled is none"


def test_a_run_that_is_not_whole_is_one_line(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, gated = make("base", 0, 2.0), make("novelty", 0, 2.0, "novelty")
    table = pd.read_csv(gated / "gate.csv")
    table.drop(columns="wall_s").to_csv(gated / "gate.csv", index=False)
    with pytest.raises(InputError, match=r"gate\.csv lacks the columns wall_s"):
        study_of(base, gated)
    table.iloc[:0].to_csv(gated / "gate.csv", index=False)
    with pytest.raises(InputError, match=r"gate\.csv has no rows"):
        study_of(base, gated)
    (gated / "gate.csv").unlink()
    assert main(["compare", str(base), str(gated), "--out_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "(policy novelty) has no gate.csv; run it again" in error
    assert not (tmp_path / "out").exists()


# --- the command --------------------------------------------------------------------------------------------------


def test_curves_and_behaviour_are_means_over_seeds(make: Make) -> None:
    study = study_of(*arms(make, [2.0, 2.2], [2.4, 2.6]))
    curves = loss_curves(study).set_index(["policy", "step"])
    assert curves.loc[("novelty", 100), "loss"] == pytest.approx(2.5)
    assert list(curves.loc["novelty", "accepted_steps"]) == [20, 25, 30, 35, 40]
    assert curves.loc[("none", 40), "tokens_trained"] == 40 * TOKENS
    assert curves.loc[("novelty", 40), "tokens_trained"] == 25 * TOKENS
    ends = stats.t.interval(0.95, 1, 2.1, stats.sem([2.0, 2.2]))
    assert tuple(curves.loc[("none", 100), ["ci_low", "ci_high"]]) == pytest.approx(ends)
    shares = gate_behaviour(study)
    assert len(shares) == 34
    assert (shares["decisions"].iloc[:-1] == 6).all(), "three steps of two seeds"
    assert shares["accepted_share"].iloc[:6].eq(1).all(), "within the burn-in"
    assert np.average(shares["accepted_share"], weights=shares["decisions"]) == pytest.approx(0.4)


def test_command_writes_report_tables_and_figures(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = arms(make, BASE, [2.001, 2.101, 1.901])
    paths += [make(f"{policy}_s{s}", s, 2.05, policy) for policy in ("random", "loss_floor") for s in range(3)]
    out, report = tmp_path / "out", tmp_path / "reports" / "gate.md"
    arguments = ["compare", str(tmp_path / "runs"), "--out_dir", str(out), "--output", str(report)]
    assert main([*arguments, "--dry_run"]) == 0
    assert not out.exists()
    assert not report.exists()
    assert "gate_behaviour.png" in capsys.readouterr().out
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "- novelty: within 0.5 % of the baseline's loss at 60.0 % fewer accepted steps: **yes**" in printed
    assert "40 of" not in printed
    assert "2,000 of 5,000" in printed
    for name in ("gate.csv", "gate_loss.png", "gate_loss.csv", "gate_behaviour.png", "gate_behaviour.csv"):
        assert (out / name).is_file(), name
        assert name in json.loads((out / "run.json").read_text())["outputs"]
    assert report.read_text() == (out / "compare.md").read_text()
    assert "Of runs with a gate" in report.read_text()
    report.unlink()
    assert main(arguments) == 0
    assert "already finished" in capsys.readouterr().out
    assert report.read_text() == (out / "compare.md").read_text(), "a finished comparison is copied all the same"
    assert main([*arguments[:-1], str(out)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_without_a_gated_run_nothing_about_gates_is_written(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [make("base", 0, 2.0), make("wide", 0, 2.0, lora_r=32)]
    for path in paths:
        (path / "eval.csv").unlink()
    assert main(["compare", *map(str, paths), "--out_dir", str(tmp_path / "out")]) == 0
    assert "accepted steps" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "gate.csv").exists()


# --- the manipulation check ---------------------------------------------------------------------------------------


def test_runs_whose_gate_did_not_choose_are_named(make: Make) -> None:
    checks = [{"novelty_beta": 20.0 + s, "choice_auc": auc, "duplicate_auc": 0.95} for s, auc in enumerate((0.9, 0.7))]
    paths = [make(f"base_s{s}", s, 2.0) for s in range(2)]
    paths += [make(f"novelty_s{s}", s, 2.0, "novelty", check=checks[s]) for s in range(2)]
    paths += [make(f"random_s{s}", s, 2.0, "random") for s in range(2)]
    fixed = {"target_novelty_scaler": 10.0}
    paths += [make(f"fixed_s{s}", s, 2.0, "novelty", gate=fixed, check=checks[0]) for s in range(2)]
    study = study_of(*paths)
    (note,) = [note for note in study.notes if "did not choose" in note]
    assert "novelty_s1" in note
    assert not re.search("novelty_s0|random_s|fixed_s", note)
    table = gate_table(study, np.random.SeedSequence(0))
    by_beta = table[table["policy"] == "novelty"].sort_values("beta")
    assert by_beta["beta"].tolist() == [10.0, 20.5]
    assert by_beta["choice_auc"].tolist() == pytest.approx([0.9, 0.8])
    assert table.loc[table["policy"] == "random", ["choice_auc", "duplicate_auc"]].isna().all(axis=None)
    lines = study.report(0).text.splitlines()
    assert any("0.80 (0.95)" in line for line in lines)
