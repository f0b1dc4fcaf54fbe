"""Gather the run folders of profiles into the tables and figures of this folder.

python results/profile/tables.py runs/profile/qwen05_gsm8k runs/profile/smollm2_gsm8k ...

Writes cells.csv.gz, layers.csv, schedules.csv and prompts.csv, each with the name of the profile in front, and the heat
map of each profile. Of a run that was cut off, the layers that it finished are kept: their status is `cancelled`, and
what was not measured (prompts, the control with them, whole schedules) is missing.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from sparselora.errors import InputError
from sparselora.evaluation.layer_verdict import layer_verdicts
from sparselora.evaluation.profile_request import PARTIAL
from sparselora.report.profile import heat_map
from sparselora.runs.files import write_csv
from sparselora.runs.user_files import read_json, read_json_object

HERE = Path(__file__).resolve().parent
NOT_MEASURED = ("shuffled_times", "shuffled_passes")
"""Columns of layers.csv that need the control of the prompts, which a run measures but writes at its end."""


def unfinished(folder: Path, tolerance: float) -> dict[str, pd.DataFrame]:
    """Return the cells of the layers that a run finished before it was cut off, and their verdicts."""
    layers = read_json(folder / PARTIAL, allow_nan=True)
    cells, contrasts = (
        pd.DataFrame([row for layer in layers for row in layer[name]]) for name in ("cells", "contrasts")
    )
    dense_loss = float(cells["loss"].iloc[0] - cells["loss_increase"].iloc[0])
    no_prompts = pd.DataFrame([{"prompt": "shuffled", "loss_increase": float("nan"), "standard_error": float("nan")}])
    verdicts = layer_verdicts(cells, contrasts, dense_loss, tolerance, no_prompts)
    verdicts[list(NOT_MEASURED)] = None
    return {"cells": cells, "layers": verdicts}


def tables_of(folder: Path, record: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """Return the tables of one run, the numbers as it wrote them.

    Raises:
        InputError: the folder is no profile with finished layers.
    """
    if (folder / PARTIAL).is_file():
        return unfinished(folder, float(record["arguments"]["tolerance"]))
    if not (folder / "schedules.csv").is_file():
        raise InputError(f"{folder} holds no profile; give run folders of sparselora profile")
    files = {"cells": "profile", "layers": "layers", "schedules": "schedules", "prompts": "prompts"}
    return {name: pd.read_csv(folder / f"{file}.csv", dtype=str) for name, file in files.items()}


def draw(path: Path, cells: pd.DataFrame, record: dict[str, Any]) -> None:
    """Draw the heat map of one profile; its data are in cells.csv.gz."""
    arguments = record["arguments"]
    data = arguments["dataset"]["name"].split(".")[0]
    title = f"{arguments['model']['name']} on {data}: one layer sparse at a time, n = {arguments['rows']} held-out rows"
    numeric = cells.assign(**{name: pd.to_numeric(cells[name]) for name in cells.columns.difference(["part", "mode"])})
    with tempfile.TemporaryDirectory() as folder:
        heat_map(Path(folder) / path.name, numeric, title)
        shutil.copyfile(Path(folder) / path.name, path)


def main() -> None:
    """Write tables and figures of the folders that are named."""
    gathered: dict[str, list[pd.DataFrame]] = {"cells": [], "layers": [], "schedules": [], "prompts": []}
    for folder in map(Path, sys.argv[1:]):
        record = read_json_object(folder / "run.json")
        tables = tables_of(folder, record)
        draw(HERE / f"{folder.name}.png", tables["cells"], record)
        for name, table in tables.items():
            table.insert(0, "profile", folder.name)
            if name in ("cells", "layers"):
                table.insert(1, "status", record["status"])
            gathered[name].append(table)
    for name, profiles in gathered.items():
        table = pd.concat(profiles, ignore_index=True)
        if name == "cells":  # the only large one: six digits are more than its standard errors leave of meaning
            numbers = table.columns.difference(["profile", "status", "part", "mode"])
            table[numbers] = table[numbers].apply(pd.to_numeric)
            gzip = {"method": "gzip", "mtime": 0}
            table.to_csv(HERE / "cells.csv.gz", index=False, float_format="%.6g", compression=gzip)
        else:
            write_csv(HERE / f"{name}.csv", table)


if __name__ == "__main__":
    main()
