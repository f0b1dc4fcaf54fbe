"""`compare --forecast`: the order that a search forecast, against that of full runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sparselora.__main__ import main
from tests.compare.test_compare_runs import Maker
from tests.test_pages import documented_columns, undocumented

EFFECTS = {"fp8": 0.0, "none": 0.1, "static_50": 0.2, "skip": 0.4}
"""Arm → what its full runs add to dense's loss."""


@pytest.fixture
def full_runs(tmp_path: Path) -> Path:
    make = Maker(tmp_path / "full", "causal_lm")
    for seed in range(3):
        make(f"dense_s{seed}", seed)
        make(f"half_data_s{seed}", seed, 0.3, epochs=0.5)
        for rank, (name, effect) in enumerate(EFFECTS.items(), 2):
            make(f"{name}_s{seed}", seed, effect, lora_r=rank)
    return tmp_path / "full"


def write_forecast(path: Path, differences: dict[str, float]) -> Path:
    rows = [{"candidate": "dense", "difference": 0.0, "verdict": "baseline"}]
    rows += [{"candidate": "half_data", "difference": 9.0, "verdict": "dense for less time"}]
    rows += [{"candidate": name, "difference": value, "verdict": "open"} for name, value in differences.items()]
    rows += [{"candidate": "impossible", "difference": None, "verdict": ""}]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def compared(runs: Path, forecast: Path, out: Path) -> int:
    return main(["compare", str(runs), "--forecast", str(forecast), "--out_dir", str(out)])


@pytest.mark.parametrize("values", [(0.001, 0.02, 0.03, 0.2), (0.02, 0.001, 0.03, 0.03), (0.4, 0.3, 0.2, 0.1)])
def test_the_rank_correlation_is_scipys_over_the_candidates_with_full_runs(
    values: tuple[float, ...], full_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    differences = dict(zip(EFFECTS, values)) | {"not_run_in_full": 0.7}
    forecast = write_forecast(tmp_path / "frontier.csv", differences)
    assert compared(full_runs, forecast, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    losses = {
        name: np.array([pd.read_csv(full_runs / f"{name}_s{s}" / "summary.csv")["eval_loss"][0] for s in range(3)])
        for name in ("dense", *EFFECTS)
    }
    full = [float((losses[name] - losses["dense"]).mean()) for name in EFFECTS]
    table = pd.read_csv(tmp_path / "out" / "forecast.csv").set_index("candidate")
    assert set(table.index) == set(EFFECTS)  # neither dense, nor dense on less data, nor what has no full run
    assert table.loc[list(EFFECTS), "difference"].tolist() == pytest.approx(full)
    assert table.loc[list(EFFECTS), "forecast"].tolist() == list(values)
    interval = stats.ttest_rel(losses["none"], losses["dense"]).confidence_interval()
    assert table.loc["none", ["ci_low", "ci_high"]].tolist() == pytest.approx([interval.low, interval.high])
    assert f"**{stats.spearmanr(values, full).statistic:+.2f}**, n = 4 candidates" in printed
    assert "## Forecast of frontier.csv" in (tmp_path / "out" / "compare.md").read_text()
    assert not undocumented(tmp_path / "out" / "forecast.csv", documented_columns())


def test_another_forecast_is_another_comparison(full_runs: Path, tmp_path: Path) -> None:
    forecast = write_forecast(tmp_path / "frontier.csv", dict.fromkeys(EFFECTS, 0.1))
    assert compared(full_runs, forecast, tmp_path / "out") == 0
    assert "undefined" in (tmp_path / "out" / "compare.md").read_text()
    assert compared(full_runs, forecast, tmp_path / "out") == 0  # finished
    write_forecast(tmp_path / "frontier.csv", dict.fromkeys(EFFECTS, 0.2))
    assert compared(full_runs, forecast, tmp_path / "out") == 2


def test_runs_that_lack_the_candidates_are_refused_in_one_line(
    full_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for differences in ({"fp8": 0.1, "other": 0.2}, {}):
        forecast = write_forecast(tmp_path / "frontier.csv", differences)
        assert compared(full_runs, forecast, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "at least 2 of its candidates" in error
    (tmp_path / "frontier.csv").write_text("candidate,loss\na,1\n")
    assert compared(full_runs, tmp_path / "frontier.csv", tmp_path / "out") == 2
    assert "lacks the columns" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
