"""The learning rate that a tuning chose for each arm."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparselora.compare.tuned_rates import tuned_rates
from sparselora.errors import InputError


def write(folder: Path, losses: dict[str, str]) -> Path:
    for name, loss in losses.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "summary.csv").write_text(f"model,eval_loss\nm,{loss}\n")
    return folder


def test_the_least_finite_loss_chooses(tmp_path):
    losses = {
        "fp8_lr0.001": "0.5",
        "fp8_lr0.003": "0.4",
        "fp8_lr3e-05": "nan",
        "a_lr_b_lr0.1": "2",
        "a_lr_b_lr0.01": "3",
    }
    assert tuned_rates(write(tmp_path, losses), ["fp8"]) == {"fp8": 0.003, "a_lr_b": 0.1}


@pytest.mark.parametrize("loss", ["nan", "inf", None])
def test_an_arm_without_a_finite_loss_is_refused_by_name(tmp_path, loss):
    write(tmp_path, {"fp8_lr0.001": "0.5"} | ({} if loss is None else {"dense_lr0.001": loss}))
    assert tuned_rates(tmp_path) == {"fp8": 0.001}
    with pytest.raises(InputError, match="finished run of dense with a finite loss"):
        tuned_rates(tmp_path, ["dense", "fp8"])
