"""Learning rates of the last rung: each the best of what was tried, and tried once."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.frontier.learning_rates import LR_FACTORS, LearningRates, describe, read_learning_rates
from sparselora.frontier.pilot_pool import PilotFailure, PilotTask

LOSSES = {"dense": (0.9, 0.8, 0.7), "fp8": (0.8, 0.75, 0.9), "skip": (1.5, math.inf, math.inf)}


class Folder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name


class Pool:
    """Gives the planted losses, and remembers what it was asked to run."""

    def __init__(self) -> None:
        self.made: list[tuple[str, float]] = []

    def run(self, tasks: list[PilotTask]):
        for task in tasks:
            self.made.append((task.name, task.config.lr))
            place = min(range(3), key=lambda i: abs(math.log(task.config.lr / (1e-3 * LR_FACTORS[i]))))
            loss = LOSSES[task.name][place]
            yield task, PilotFailure("diverged") if math.isinf(loss) else SimpleNamespace(loss=loss)


def tasks(*names: str) -> list[PilotTask]:
    return [
        PilotTask(name, 0, 1, TrainConfig(lr=1e-3 * factor, max_steps=10), 1.0)
        for name in names
        for factor in LR_FACTORS
    ]


def rates(folder: Path) -> Any:
    return LearningRates(Folder(folder))  # type: ignore[arg-type]


def test_each_has_the_learning_rate_of_its_lowest_loss_and_what_is_on_file_is_not_tried_again(tmp_path):
    pool, learning_rates, count = Pool(), rates(tmp_path), []
    learning_rates.add("dense", 1e-3, 10, 0.8)
    learning_rates.try_all(pool, tasks("dense", "fp8"), lambda: count.append(1))
    assert pool.made == [("dense", 1e-3 / 3), ("dense", 3e-3), *(("fp8", 1e-3 * f) for f in LR_FACTORS)]
    assert len(count) == 5
    again, resumed = Pool(), rates(tmp_path)
    resumed.try_all(again, tasks("dense", "fp8", "skip"), lambda: None)
    assert {name for name, _ in again.made} == {"skip"}
    assert [resumed.best(name) for name in LOSSES] == [3e-3, 1e-3, 1e-3 / 3]
    assert resumed.best("none") is None
    assert resumed.table["loss"].tolist() == [loss for name in ("dense", "fp8", "skip") for loss in LOSSES[name]]
    pd.testing.assert_frame_equal(read_learning_rates(tmp_path), resumed.table)


def test_the_page_says_what_was_chosen_and_where_it_is_the_edge(tmp_path):
    learning_rates = rates(tmp_path)
    assert describe(learning_rates.table) == "Learning rates have not been tuned for any candidate so far."
    learning_rates.try_all(Pool(), tasks("dense", "fp8"), lambda: None)
    text = describe(learning_rates.table)
    assert "best of three in pilots of up to 10 steps with one seed: dense 0.003, fp8 0.001." in text
    assert "For dense it is the edge of what was tried" in text
    inner = learning_rates.table[learning_rates.table["candidate"] == "fp8"]
    assert "edge" not in describe(inner)  # the control


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "learning_rates.csv").write_text("candidate,lr\ndense,fast\n")
    with pytest.raises(InputError, match="learning_rates"):
        read_learning_rates(tmp_path)
