"""Page and figure of a search at its real size: all candidates, several rungs, two dozen labels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from scipy import optimize

from sparselora.config.train import TrainConfig
from sparselora.frontier.request import FrontierRequest
from sparselora.frontier.verdict import write_outputs
from sparselora.report import frontier
from sparselora.report.frontier import spread
from tests.helpers.made_up_search import Arm, dense_loss, write_search

LAST, DROPPED, EARLY = (0, 1, 2), (0,), (0, 1)
ALL = {
    "none": Arm(0.62, 0.003, {"sparsity.context_backward": "none"}, rungs=LAST),
    "fp8_none": Arm(0.5, 0.004, {"sparsity.frozen_precision": "fp8"}, rungs=LAST),
    "static_50": Arm(0.85, 0.008, {"sparsity.mode": "static"}, rungs=LAST),
    "rank_half": Arm(0.97, 0.0005, {"lora_r": 4}, rungs=LAST),
    "fp8": Arm(0.8, 0.001, rungs=EARLY),
    "upper": Arm(0.8, 0.002, rungs=EARLY),
    "none_static_50": Arm(0.55, 0.012, rungs=EARLY),
    "fp8_none_static_50": Arm(0.35, 0.015, rungs=EARLY),
    "sampled_half": Arm(0.83, 0.006, rungs=DROPPED),
    "static_90": Arm(0.76, 0.02, rungs=DROPPED),
    "svd_99": Arm(0.7, 0.06, rungs=DROPPED),
    "skip": Arm(0.66, 0.18, rungs=DROPPED),
    "map": Arm(0.62, 0.12, rungs=DROPPED, setup_s=40),
    "lora_upper_half": Arm(0.8, 0.015, {"lora_r": 8}, rungs=DROPPED),
    "svd_layers": Arm(1.25, 0.01, rungs=DROPPED),
    "static_layers": Arm(0.8, 0.004, rungs=DROPPED),
    "random_99": Arm(0.7, 0.25, control=True, rungs=DROPPED),
    "random_layers": Arm(0.82, 0.05, control=True, rungs=DROPPED),
    "impossible": Arm(1.0, rungs=(), reason="no fp8 products on cpu"),
}
CONFIG = TrainConfig(task="causal_lm", model="a_model", dataset="a $data$ set.jsonl")


def outputs(folder: Path, seeds: int = 3, rungs: tuple[int, ...] = (0, 1, 2), **settings: object) -> str:
    write_search(folder, ALL, seeds=seeds, rungs=rungs, run_noise=0.001, row_noise=0.03, **settings)
    request = FrontierRequest(CONFIG, 0.01, 1200.0, (0, 1, 2), 1, None)
    return write_outputs(folder, request, is_finished=rungs == (0, 1, 2))


# --- the figure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rungs", [(0,), (0, 1), (0, 1, 2)])
def test_labels_are_inside_and_do_not_touch(rungs, tmp_path, monkeypatch):
    figures: list[Figure] = []
    save = frontier.save_figure

    def keep(figure: Figure, path: Path, data: pd.DataFrame | None = None) -> None:
        save(figure, path, data)
        figures.append(figure)

    monkeypatch.setattr(frontier, "save_figure", keep)
    outputs(tmp_path, rungs=rungs)
    (figure,) = figures
    unseen = {id(label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
              for place, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels())
              if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())}  # fmt: skip
    texts = [
        text
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and id(text) not in unseen
    ]
    # An annotation's own extent has its line in it, which may cross what it likes.
    boxes = {text: box for text in texts if (box := Text.get_window_extent(text)).width}
    labels = [text.get_text().partition(" (")[0] for text in boxes]
    assert {"dense", "half_data", "random_99"} <= set(labels)
    assert {name for name, arm in ALL.items() if set(arm.rungs) & set(rungs)} <= set(labels)
    for text, box in boxes.items():
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y0 >= 0, text
        assert box.y1 <= figure.bbox.y1, text
        for other, other_box in boxes.items():
            if other is not text:
                assert not box.overlaps(other_box), (text, other)
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.width == (8 * 110)


def test_labels_are_spread_as_least_squares_would():
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(1, 9))
        heights = np.sort(rng.uniform(0, 1, n) ** 2)
        got = np.array(spread(heights.tolist(), 0.1, -10.0, 10.0))
        gaps = [{"type": "ineq", "fun": lambda y, i=i: y[i + 1] - y[i] - 0.1} for i in range(n - 1)]
        start = heights + 0.1 * np.arange(n)
        best = optimize.minimize(lambda y, h=heights: ((y - h) ** 2).sum(), start, constraints=gaps, tol=1e-12)
        assert (np.diff(got) >= 0.1 - 1e-9).all()
        assert ((got - heights) ** 2).sum() == pytest.approx(best.fun, abs=1e-6)
    assert spread([0.9, 0.95], 0.2, 0.0, 1.0) == pytest.approx([0.8, 1.0])
    assert spread([0.0, 0.0], 0.2, 0.0, 1.0) == pytest.approx([0.0, 0.2])
    assert spread([0.5] * 8, 0.2, 0.0, 1.0) == pytest.approx([0.2 * i for i in range(8)])  # no room: from below on


def test_the_data_of_the_figure_are_the_pilots(tmp_path):
    outputs(tmp_path)
    points = pd.read_csv(tmp_path / "frontier_points.csv")
    assert len(points) == 3 * 3 + sum(len(arm.rungs) for arm in ALL.values())
    # Three lengths a rung, of which half of one is the whole of the rung before.
    assert sorted(points["dense_length"].unique()) == [-1, *range(7)]
    line = points[points["pareto"]].sort_values("seconds")
    assert (np.diff(line["loss"]) <= 0).all()


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_says_what_it_rests_on(tmp_path):
    page = outputs(tmp_path)
    assert page.startswith("# Frontier of a_model on a $data$ set.jsonl")
    assert "The longest pilots have 256 of the 2,048 steps of a whole run (12.5 %)" in page
    assert "from 1.3000 to 0.6" in page
    dropped = next(line for line in page.splitlines() if "Dropped on shorter pilots" in line)
    assert all(name in dropped for name, arm in ALL.items() if arm.rungs and 2 not in arm.rungs)
    assert not any(f" {name}," in dropped for name, arm in ALL.items() if 2 in arm.rungs)
    assert "Faster than any dense pilot" not in page  # the rung before has dense pilots as short
    assert "impossible: no fp8 products on cpu" in page
    assert re.search(
        r"Controls with random channels, loss − dense: random_99 \+0\.2\d+ \[.*\], random_layers \+0\.0", page
    )
    assert "own clocks" not in page
    slope = (dense_loss(128) - dense_loss(256)) / np.log(2) * np.log(1.1)
    moved = float(re.search(r"would move a loss at equal time by about ([0-9.]+) nats", page)[1])
    assert moved == pytest.approx(slope, abs=0.0005)
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert len(table) == 2 + 3 + len(ALL) - 1
    assert [line.split()[1] for line in table[2:5]] == ["dense", "data_75", "half_data"]


def test_a_search_that_goes_on_says_so_and_names_the_candidates_that_no_dense_pilot_is_as_fast_as(tmp_path):
    page = outputs(tmp_path, rungs=(0,), seeds=1)
    assert "**The search has not ended**" in page
    faster = next(line for line in page.splitlines() if "Faster than any dense pilot" in line)
    assert faster.endswith(": fp8_none_static_50.")


def test_slower_ones_and_clocks_that_disagree_are_named(tmp_path):
    write_search(tmp_path, {"slow": Arm(1.3, 0.0), "odd": Arm(0.7, 0.0)}, rungs=(0,))
    pilots = pd.read_csv(tmp_path / "pilots.csv")
    pilots.loc[pilots["candidate"] == "odd", "train_seconds"] *= 1.5
    pilots.to_csv(tmp_path / "pilots.csv", index=False)
    page = write_outputs(tmp_path, FrontierRequest(CONFIG, 0.01, 60.0, (0,), 1, None))
    assert "Slower than any dense pilot" in page
    assert "(extrapolated): slow." in page
    assert "odd 1.05 against 0.70" in page
    assert "**No shortcut on this machine, model and batch**: slow 1.30 times dense's time" in page  # and not odd


def test_data_that_do_not_need_all_rows_are_said_to_be_so(tmp_path):
    page = outputs(tmp_path)
    assert "Dense on less data is within the tolerance" not in page
    request = FrontierRequest(CONFIG, 0.5, 60.0, (0,), 1, None)
    assert "Dense on less data is within the tolerance, too (data_75, half_data)" in write_outputs(tmp_path, request)


def test_a_cost_that_grows_with_the_pilots_is_named(tmp_path):
    for seed, growing in ((1, True), (2, False)):
        folder = tmp_path / str(seed)
        write_search(folder, {"rank_half": Arm(0.9, 0.03)}, seeds=4, run_noise=0.001)
        pilots = pd.read_csv(folder / "pilots.csv")
        earlier = (pilots["candidate"] == "rank_half") & (pilots["rung"] < 2)
        pilots.loc[earlier, "loss"] -= 0.02 if growing else -0.02
        pilots.to_csv(folder / "pilots.csv", index=False)
        page = write_outputs(folder, FrontierRequest(CONFIG, 0.01, 60.0, (0,), 1, None))
        assert ("The loss over dense grew" in page) == growing
