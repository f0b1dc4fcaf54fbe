"""Files that a search leaves: the configuration to train with, the page, the table."""

from __future__ import annotations

import pandas as pd

from sparselora.config.train import TrainConfig
from sparselora.frontier.request import VERDICT_OUTPUTS, FrontierRequest
from sparselora.frontier.verdict import write_outputs
from tests.frontier.test_frontier_table import PLANTED
from tests.helpers.made_up_search import Arm, write_search
from tests.test_pages import documented_columns, undocumented

CONFIG = TrainConfig(task="causal_lm", model="tiny", dataset="sums.jsonl", lora_r=8, seed=3)


def request(tolerance: float = 0.02) -> FrontierRequest:
    return FrontierRequest(CONFIG, tolerance, 1200.0, (0, 1, 2), 1, None)


def test_best_yaml_is_the_configuration_that_was_tried(tmp_path):
    write_search(tmp_path, PLANTED, seeds=6, run_noise=0.001)
    page = write_outputs(tmp_path, request(), is_finished=True)
    best = TrainConfig.from_yaml(tmp_path / "best.yaml")
    expected = CONFIG.merge({"sparsity": {"mode": "dense", "context_backward": "none"}})
    assert best.to_dict() == expected.to_dict()
    assert best.lora_r == 8  # the user's own settings, in full length
    assert "**good pays**" in page
    assert f"sparselora train {tmp_path / 'best.yaml'}" in page
    assert "has not ended" not in page
    assert not (tmp_path / "dense.yaml").exists()
    assert {path.name for path in tmp_path.iterdir()} >= set(VERDICT_OUTPUTS) - {"dense.yaml"}


def test_where_nothing_pays_the_page_says_so_and_dense_takes_the_place_of_an_earlier_choice(tmp_path):
    write_search(tmp_path, PLANTED, seeds=6, run_noise=0.001)
    write_outputs(tmp_path, request())
    assert (tmp_path / "best.yaml").exists()
    write_search(tmp_path, PLANTED | {"good": Arm(0.6, 0.05)}, seeds=6, run_noise=0.001)
    page = write_outputs(tmp_path, request())
    assert not (tmp_path / "best.yaml").exists()
    dense = TrainConfig.from_yaml(tmp_path / "dense.yaml")
    assert dense.to_dict() == CONFIG.merge({"sparsity": {"mode": "dense"}}).to_dict()
    assert "**Nothing pays: train dense.**" in page
    assert "has not ended" in page


def test_a_candidate_better_for_its_time_but_above_the_tolerance_is_named_and_not_chosen(tmp_path):
    write_search(tmp_path, {"good": Arm(0.6, 0.012)}, seeds=6, run_noise=0.001)
    page = write_outputs(tmp_path, request(0.01), is_finished=True)
    assert "**Nothing pays" in page
    assert "Better than dense for the same time, but not shown to be within the tolerance: good by 0.0" in page
    assert (tmp_path / "dense.yaml").exists()
    # A control is compared with, and neither chosen nor proposed.
    write_search(tmp_path / "random", {"random": Arm(0.6, -0.1, control=True)}, seeds=6)
    page = write_outputs(tmp_path / "random", request(0.01), is_finished=True)
    assert "**Nothing pays" in page
    assert "not shown to be within" not in page
    page = write_outputs(tmp_path, request(0.05), is_finished=True)
    assert "**good pays**" in page


def test_before_dense_has_a_pilot_there_is_a_page_and_nothing_to_train_with(tmp_path):
    write_search(tmp_path, PLANTED, rungs=(0,))
    pilots = pd.read_csv(tmp_path / "pilots.csv")
    pilots[pilots["candidate"] == "data_75"].to_csv(tmp_path / "pilots.csv", index=False)
    page = write_outputs(tmp_path, request())
    assert "nothing to compare yet" in page
    assert "impossible: no fp8 products here" in page
    assert not (tmp_path / "best.yaml").exists()
    assert not (tmp_path / "dense.yaml").exists()


def test_the_same_files_come_out_of_the_same_pilots(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_search(folder, PLANTED, seeds=2)
        write_outputs(folder, request())
    for name in ("frontier.csv", "frontier_points.csv", "frontier.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_column_is_documented(tmp_path):
    write_search(tmp_path, PLANTED, seeds=2)
    write_outputs(tmp_path, request())
    sections = documented_columns()
    for name in ("frontier.csv", "frontier_points.csv", "pilots.csv", "times.csv", "candidates.csv"):
        assert not undocumented(tmp_path / name, sections)
