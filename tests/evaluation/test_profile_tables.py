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
    (folder / "run.json").write_text(json.dumps({"status": status, "arguments": arguments}))
    return folder


def test_a_run_that_was_cut_off_keeps_its_layers_and_has_no_control_of_prompts(tmp_path, monkeypatch):
    finished, cut_off = record(tmp_path / "finished", "success"), record(tmp_path / "cut_off", "cancelled")
    made_up_cells(2).to_csv(finished / "profile.csv", index=False)
    verdicts = {"layer": [0, 1], "part": "ffn", "shuffled_times": [3.0, 30.0], "shuffled_passes": [False, True]}
    pd.DataFrame(verdicts).to_csv(finished / "layers.csv", index=False)
    for name in ("schedules", "prompts"):
        pd.DataFrame({"loss": [1.0]}).to_csv(finished / f"{name}.csv", index=False)
    cells = made_up_cells(3)
    contrast = {"part": "ffn", "sparsity": 0.5, "difference": -1.0, "standard_error": 0.1}
    layers = [
        {"cells": rows.to_dict("records"), "contrasts": [{"layer": layer, **contrast}]}
        for layer, rows in cells.groupby("layer")
    ]
    (cut_off / "profile.partial").write_text(json.dumps(layers))
    out = tmp_path / "out"
    out.mkdir()
    main = runpy.run_path(SCRIPT)["main"]
    monkeypatch.setitem(main.__globals__, "HERE", out)
    monkeypatch.setattr(sys, "argv", ["tables.py", str(finished), str(cut_off)])
    main()

    assert sorted(path.name for path in out.iterdir()) == [
        "cells.csv.gz", "cut_off.png", "finished.png", "layers.csv", "prompts.csv", "schedules.csv",
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
        assert pd.read_csv(out / f"{name}.csv")["profile"].tolist() == ["finished"]


def test_a_folder_without_a_profile_is_refused(tmp_path):
    folder = record(tmp_path / "train_run", "success")
    with pytest.raises(InputError, match="no profile"):
        runpy.run_path(SCRIPT)["tables_of"](folder, json.loads((folder / "run.json").read_text()))
