"""results/profile/prediction.py on made-up profiles: its correlation equals scipy's, and turns round with the costs."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from sparselora.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "results" / "profile" / "prediction.py"))


def write_profile(folder: Path, cost) -> pd.DataFrame:
    """Write a profile in which an arm costs ``cost(its exact match)``."""
    trained = pd.read_csv(ROOT / "results" / "contextual" / "pretrained.csv").set_index("setting")
    rows = []
    for arm, (mode, level) in SCRIPT["ARMS"].items():
        percent = cost(float(trained.loc[arm, "exact_match_percent"]))
        for kind in ("measured", "further"):
            rows.append(
                {"schedule": f"layers 2-22 at {level:g}", "mode": mode, "rows": kind, "percent": percent,
                 "percent_error": 0.5, "sum_of_layers_percent": percent / 2}
            )  # fmt: skip
    folder.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "schedules.csv", index=False)
    return SCRIPT["joined"](folder)


def test_a_profile_that_orders_as_training_does_has_correlation_minus_one(tmp_path):
    arms = write_profile(tmp_path / "a", lambda match: 100 - match)
    assert len(arms) == 9
    assert SCRIPT["correlation"](arms, "percent")[0] == pytest.approx(-1)
    opposite = write_profile(tmp_path / "b", lambda match: match)
    assert SCRIPT["correlation"](opposite, "percent")[0] == pytest.approx(1)  # the control
    assert "-1.00 over n = 9" in SCRIPT["sentence"](arms)


def test_the_committed_profiles_give_the_correlations_of_their_page():
    folder = ROOT / "results" / "profile"
    arms = SCRIPT["joined"](folder)  # of four profiles one is meant
    page = (folder / "README.md").read_text(encoding="utf-8").replace("−", "-")
    for cost in SCRIPT["COSTS"]:
        value, p = SCRIPT["correlation"](arms, cost)
        assert value == pytest.approx(spearmanr(arms[cost], arms["exact_match_percent"]).statistic)
        assert f"{value:+.2f} (p {p:.2g})" in page


def test_correlation_and_p_value_equal_those_over_all_orders(tmp_path):
    arms = write_profile(tmp_path / "a", lambda match: (7 * match) % 5).iloc[:6]
    value, p = SCRIPT["correlation"](arms, "percent")
    assert value == pytest.approx(spearmanr(arms["percent"], arms["exact_match_percent"]).statistic)
    orders = itertools.permutations(arms["percent"])
    statistics = np.array([spearmanr(order, arms["exact_match_percent"]).statistic for order in orders])
    tails = ((statistics <= value + 1e-9).mean(), (statistics >= value - 1e-9).mean())
    assert p == pytest.approx(min(1, 2 * min(tails)))


def test_the_figure_is_drawn_and_a_missing_arm_is_refused(tmp_path):
    arms = write_profile(tmp_path / "a", lambda match: 100 - match)
    SCRIPT["draw"](arms, tmp_path / "a" / "prediction.png")
    assert (tmp_path / "a" / "prediction.csv").exists()
    table = pd.read_csv(tmp_path / "a" / "schedules.csv")
    table[table["mode"] != "oracle"].to_csv(tmp_path / "a" / "schedules.csv", index=False)
    with pytest.raises(InputError, match="oracle"):
        SCRIPT["joined"](tmp_path / "a")
