"""The figures and the printed tables of `compare`: bars at their markers, no empty columns, what p is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from sparselora.report.markdown import markdown_table
from sparselora.report.pruning import metric_against_keep_ratio
from sparselora.report.runs import quality_against_cost


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that a test makes, in place of files."""
    figures: list[Figure] = []
    for module in ("runs", "pruning"):
        monkeypatch.setattr(
            f"sparselora.report.{module}.save_figure", lambda figure, path, data: figures.append(figure)
        )
    return figures


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_intervals_lie_at_the_marker_of_their_difference(drawn: list[Figure], n_seeds: int) -> None:
    std = 0.1 if n_seeds > 1 else np.nan
    configs = pd.DataFrame({"config": ["a", "b"], "metric": "loss", "step_ms": [1.0, 2.0], "mean": [2.0, 2.1],
                            "std": std, "n_seeds": n_seeds})  # fmt: skip
    ends = (0.05, 0.15) if n_seeds > 1 else (np.nan, np.nan)
    differences = pd.DataFrame({"config": ["b"], "difference": 0.1, "ci_low": ends[0], "ci_high": ends[1],
                                "row_ci_low": 0.02, "row_ci_high": 0.12})  # fmt: skip
    quality_against_cost(configs, differences, Path("x.png"), "title")
    left, right = drawn[0].axes
    (marker,) = [line for line in right.lines if line.get_marker() not in ("None", None, "")]
    bars = [segment for bar in right.collections if isinstance(bar, LineCollection) for segment in bar.get_segments()]
    bars = [bar for bar in bars if len(bar) and np.isfinite(bar).all()]
    assert len(bars) == (2 if n_seeds > 1 else 1)
    assert [bar[:, 0].tolist() for bar in bars][-1] == [0.02, 0.12]
    assert all(bar[:, 1].tolist() == [marker.get_ydata()[0]] * 2 for bar in bars)
    assert ("standard deviation" in left.get_title()) == ("over seeds" in right.get_title()) == (n_seeds > 1)


@pytest.mark.parametrize("ratios", [(0.5,), (0.25, 0.5)])
@pytest.mark.parametrize("n_methods", [2, 9])
def test_methods_of_one_keep_ratio_stay_at_its_tick(drawn: list[Figure], ratios: tuple, n_methods: int) -> None:
    cells = pd.DataFrame([
        {"method": f"m{i}", "keep_ratio": keep, "moment": moment, "metric": "accuracy", "n_seeds": 1, "mean": 0.5,
         "std": np.nan}
        for i in range(n_methods) for keep in ratios for moment in ("before", "right_after", "after")
    ])  # fmt: skip
    metric_against_keep_ratio(cells, Path("x.png"), "title")
    for axes in drawn[0].axes:
        low, high = axes.get_xlim()
        for i, keep in enumerate(ratios):
            places = [line.get_xdata()[i] for line in axes.lines if len(line.get_xdata()) == len(ratios)]
            assert len(places) >= n_methods
            assert max(places) - min(places) <= 0.85 * (high - low) / (len(ratios) + 1)
            assert abs(np.mean(places) - keep) < 1e-9
    assert "one seed" in drawn[0].get_suptitle()
    assert "±" not in drawn[0].get_suptitle()


def test_columns_without_any_value_are_left_out() -> None:
    table = markdown_table(["a", "b", "c"], [["1", "", ""], ["2", "", "x"]])
    assert table.splitlines() == ["| a | c |", "| - | - |", "| 1 |   |", "| 2 | x |"]
    assert markdown_table(["a", "b"], []).startswith("| a | b |")
