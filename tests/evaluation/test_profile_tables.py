"""results/profile/tables.py on made-up runs: a run that was cut off keeps its layers, and claims no more."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sparselora.errors import InputError

SCRIPT = str(Path(__file__).resolve().parents[2] / "results" / "profile" / "tables.py")
DENSE_LOSS, TOLERANCE, LEVELS = 2.0, 1.0, (0.5, 0.9, 0.99)


def made_up_cells(layers: int) -> pd.DataFrame:
    rng = np.random.default_rng(layers)
    rows = []
    for layer in range(layers):
        for mode, level in [
            ("skip", 1.0),
            *((mode, x) for mode in ("random_fixed", "static", "oracle") for x in LEVELS),
        ]:
            increase, error = rng.uniform(0, 0.04), rng.uniform(0, 0.004)
            rows.append(
                {"layer": layer, "part": "ffn", "mode": mode, "sparsity": level, "loss": DENSE_LOSS + increase,
                 "loss_increase": increase, "standard_error": error, "percent": 100 * increase / DENSE_LOSS,
                 "percent_error": 100 * error / DENSE_LOSS}
            )  # fmt: skip
    return pd.DataFrame(rows)


def record(folder: Path, status: str) -> Path:
    folder.mkdir()
    arguments = {"model": {"name": "m"}, "dataset": {"name": "d.jsonl"}, "rows": 8, "tolerance": TOLERANCE}
    (folder / "run.json").write_text(
        json.dumps(
            {"status": status, "arguments": arguments, "command": "profile", "commit": "abc", "device": "cpu",
             "started": "today", "wall_s": 2.5, "seed": 0, "versions": {"python": "3", "torch": "2"},
             "outputs": ["a.csv", "b.csv"], "rows": 8, "dense_loss": DENSE_LOSS, "seconds": 2.0,
             "calibration_seconds": 1.0, "floor_seconds": 0.5, "tolerance": TOLERANCE, "layer_limit": 0.25}
        )
    )  # fmt: skip
    return folder


def finish(folder: Path, shuffled: float) -> Path:
    """Make a finished run with these costs of another row's prompt, in % of the dense loss, ± 1."""
    record(folder, "success")
    made_up_cells(2).to_csv(folder / "profile.csv", index=False)
    verdicts = {
        "layer": [0, 1], "part": "ffn", "skip_passes": [True, True], "oracle_passes": [True, False],
        "shuffled_times": [3.0, 30.0], "shuffled_passes": [False, True],
    }  # fmt: skip
    pd.DataFrame(verdicts).to_csv(folder / "layers.csv", index=False)
    prompts = {"prompt": ["shuffled", "empty"], "percent": [shuffled, 9.0], "percent_error": 1.0}
    pd.DataFrame(prompts).to_csv(folder / "prompts.csv", index=False)
    schedules = {
        "schedule": "layers 2-3 at 0.5", "mode": "static", "rows": ["measured", "further"], "percent": [1.0, 2.0],
        "percent_error": 0.1, "flops_left": 0.5, "sum_of_layers_percent": 0.7,
    }  # fmt: skip
    pd.DataFrame(schedules).to_csv(folder / "schedules.csv", index=False)
    return folder


@pytest.fixture
def gather(tmp_path, monkeypatch):
    """The script on folders, with tables of its own."""
    out = tmp_path / "results" / "profile"
    out.mkdir(parents=True)
    provenance = "result,covers,provenance,device,started,command,seed,wall_s,versions,commit,arguments,outputs\n"
    (out.parent / "provenance.csv").write_text(provenance + "a,x,,,,,,,,,,\nz,x,,,,,,,,,,\n")
    main = runpy.run_path(SCRIPT)["main"]
    monkeypatch.setitem(main.__globals__, "HERE", out)

    def run(*folders: Path) -> Path:
        monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, folders)])
        main()
        return out

    return run


def test_a_run_that_was_cut_off_keeps_its_layers_and_has_no_control_of_prompts(tmp_path, gather):
    finished, cut_off = finish(tmp_path / "finished", 20.0), record(tmp_path / "cut_off", "cancelled")
    cells = made_up_cells(3)
    contrast = {"part": "ffn", "sparsity": 0.5, "difference": -1.0, "standard_error": 0.1}
    layers = [
        {"cells": rows.to_dict("records"), "contrasts": [{"layer": layer, **contrast}]}
        for layer, rows in cells.groupby("layer")
    ]
    (cut_off / "profile.partial").write_text(json.dumps(layers))
    out = gather(finished, cut_off)
    assert sorted(path.name for path in out.iterdir()) == [
        "cells.csv.gz", "finished.png", "layers.csv", "prompts.csv", "schedules.csv",
    ]  # fmt: skip
    gathered = pd.read_csv(out / "cells.csv.gz")
    assert gathered.groupby(["profile", "status"]).size().to_dict() == {
        ("cut_off", "cancelled"): len(cells),
        ("finished", "success"): len(made_up_cells(2)),
    }
    percent = gathered.loc[gathered["profile"] == "cut_off", "percent"]
    np.testing.assert_allclose(percent, cells["percent"], rtol=1e-5)
    layers_table = pd.read_csv(out / "layers.csv").set_index("profile")
    assert layers_table.loc["cut_off", ["shuffled_times", "shuffled_passes"]].isna().all(axis=None)
    assert layers_table.loc["finished", "shuffled_passes"].astype(str).tolist() == ["False", "True"]  # the control
    static = cells[(cells["mode"] == "static") & (cells["percent"] + 2 * cells["percent_error"] <= TOLERANCE)]
    highest = static.groupby("layer")["sparsity"].max().reindex(range(3), fill_value=0.0)
    assert layers_table.loc["cut_off", "sparsity"].tolist() == highest.tolist()
    for name in ("schedules", "prompts"):
        assert set(pd.read_csv(out / f"{name}.csv")["profile"]) == {"finished"}
    covers = pd.read_csv(out.parent / "provenance.csv")[["result", "covers"]].to_numpy().tolist()
    cut = "rows of cut_off (cut off after the last layer: no prompts and no schedules)"
    assert covers == [["a", "x"], ["profile", cut], ["profile", "rows of finished"], ["z", "x"]]


def test_other_profiles_keep_their_rows(tmp_path, gather, capsys):
    gather(finish(tmp_path / "b", 20.0))
    out = gather(finish(tmp_path / "a", 9.9))  # below ten standard errors
    printed = capsys.readouterr().out
    assert "b: 8 rows, dense loss 2.000, 2 s of which 1 calibrate" in printed
    assert "limit of a layer in the chosen schedule 0.25 %" in printed
    assert "shuffled_passes: 1 of 2; fails in ffn 0" in printed
    assert "layers 2-3 at 0.5, static: +1.0 ± 0.1 % (+2.0 ± 0.1), 0.500 of the FLOPs" in printed
    names = sorted(path.name for path in out.iterdir())
    assert names == ["b.png", "cells.csv.gz", "layers.csv", "prompts.csv", "schedules.csv"]
    before = {name: (out / name).read_bytes() for name in names if name != "b.png"}
    assert [pd.read_csv(out / name)["profile"].unique().tolist() for name in before] == [["a", "b"]] * 4
    gather(tmp_path / "b")
    assert {name: (out / name).read_bytes() for name in before} == before
    pd.read_csv(tmp_path / "b" / "prompts.csv").assign(percent=7.5).to_csv(tmp_path / "b" / "prompts.csv", index=False)
    gather(tmp_path / "b")  # the control: another run takes the place of the old one
    assert pd.read_csv(out / "prompts.csv")["percent"].tolist() == [9.9, 9.0, 7.5, 7.5]
    assert pd.read_csv(out.parent / "provenance.csv")["result"].tolist() == ["a", "profile", "profile", "z"]


def test_a_folder_without_a_profile_is_refused(tmp_path):
    folder = record(tmp_path / "train_run", "success")
    with pytest.raises(InputError, match="no profile"):
        runpy.run_path(SCRIPT)["tables_of"](folder, json.loads((folder / "run.json").read_text()))
