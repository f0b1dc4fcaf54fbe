"""A warning wherever nothing was learned: a classifier at chance, a language model no better than before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from sparselora.__main__ import main
from sparselora.numerics.stats import is_at_chance
from tests.helpers.tiny_llama import make_tiny_llama


@pytest.mark.parametrize("n", [1, 7, 40, 200])
def test_chance_is_the_share_of_the_most_frequent_class_within_the_interval(n):
    for hits in range(n + 1):
        correct = np.arange(n) < hits
        labels = np.arange(n) % 3
        low = binomtest(hits, n).proportion_ci(0.95, method="wilson").low
        assert is_at_chance(correct, labels) == (low <= np.bincount(labels).max() / n + 1e-12)
    assert is_at_chance([], [])


def test_always_naming_the_majority_is_no_learning():
    labels = np.repeat([0, 1], [180, 20])
    assert is_at_chance(labels == 0, labels)  # 90 % right
    assert not is_at_chance(np.ones(200), labels)


@pytest.mark.parametrize(("lr", "warned"), [("1e-2", False), ("1e-12", True)])
def test_train_warns_where_the_loss_did_not_fall(tmp_path: Path, capsys, lr: str, warned: bool):
    model = make_tiny_llama(tmp_path / "model")
    rows = [{"prompt": f"w{i % 7} w3", "completion": "w5 w6"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "run"
    arguments = ["--model", str(model), "--dataset", str(tmp_path / "rows.jsonl"), "--task", "causal_lm", "--lr", lr]
    assert main(["train", *arguments, "--max_steps", "12", "--device", "cpu", "--out_dir", str(out)]) == 0
    printed = capsys.readouterr()
    assert ("WARNING: nothing was learned: held-out loss" in printed.err) == warned
    assert ("nothing_learned" in json.loads((out / "run.json").read_text())) == warned
    assert (out / "loss.png").stat().st_size > 2000
    line = next(line for line in printed.out.splitlines() if "sparselora eval" in line)
    assert str(out / "adapter") in line
