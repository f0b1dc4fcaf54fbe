"""Gather the run folders of profiles into the tables and figures of this folder.

python results/profile/tables.py runs/profile/qwen05_gsm8k runs/profile/smollm2_mrpc ...

Writes cells.csv.gz, layers.csv, schedules.csv and prompts.csv, each with the name of the profile in front, its rows in
../provenance.csv, and the heat map of each profile whose control of the prompts holds; prints the numbers of its
controls. Profiles that are not named keep their rows. Of a run that was cut off, the layers that it finished are kept:
their status is `cancelled`, and what was not measured (prompts, the control with them, whole schedules) is missing.
"""

from __future__ import annotations

import csv
import io
import json
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
from sparselora.runs.files import write_text
from sparselora.runs.packed import provenance
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


def joined(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows at ``path`` of other profiles and those of ``table``, by profile; all cells are text."""
    if not path.is_file():
        return table
    before = pd.read_csv(path, dtype=str, keep_default_na=False)
    rows = pd.concat([before[~before["profile"].isin(table["profile"].unique())], table], ignore_index=True)
    return rows.sort_values("profile", kind="stable")


def as_text(table: pd.DataFrame, number: str | None = None) -> pd.DataFrame:
    """Return the cells of ``table`` as a CSV has them, with numbers in the format ``number``."""
    stream = io.StringIO(table.to_csv(index=False, float_format=number))
    return pd.read_csv(stream, dtype=str, keep_default_na=False)


def write_provenance(path: Path, name: str, record: dict[str, Any]) -> None:
    """Write where the rows of a profile come from into the table of all results, in place of those it had."""
    with path.open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    covers = f"rows of {name}"
    cut_off = "" if record["status"] == "success" else " (cut off after the last layer: no prompts and no schedules)"
    cells = {
        **record, "result": HERE.name, "covers": covers + cut_off, "provenance": provenance(record.get("commit")),
        "versions": ", ".join(f"{package} {version}" for package, version in record["versions"].items()),
        "arguments": json.dumps(record["arguments"]), "outputs": " ".join(record["outputs"]),
    }  # fmt: skip
    rows = [row for row in rows if row[0] != HERE.name or row[1].partition(" (")[0] != covers]
    place = next((i for i, row in enumerate(rows) if row[:2] > [HERE.name, covers]), len(rows))
    rows.insert(place, [str(cells[column]) for column in header])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def holds(prompts: pd.DataFrame) -> bool:
    """Return whether another row's prompt costs at least ten standard errors, the bar of `profile` itself."""
    row = prompts.set_index("prompt").loc["shuffled"].astype(float)
    return bool(row["percent"] >= 10 * row["percent_error"])


def summary(name: str, record: dict[str, Any], tables: dict[str, pd.DataFrame]) -> str:
    """Return the controls of a finished profile as text, with the layers in which they fail."""
    lines = [
        f"{name}: {record['rows']} rows, dense loss {record['dense_loss']:.3f}, {record['seconds']:.0f} s of which "
        f"{record['calibration_seconds']:.0f} calibrate, floor {record['floor_seconds']:.0f} s, limit of a layer in "
        f"the chosen schedule {record.get('layer_limit', record['tolerance']):g} %"
    ]
    for row in tables["prompts"].to_dict("records"):
        lines.append(f"  {row['prompt']} prompt {float(row['percent']):+.1f} ± {float(row['percent_error']):.1f} %")
    layers = tables["layers"].assign(place=lambda t: t["part"].astype(str) + " " + t["layer"].astype(str))
    for control in ("skip_passes", "oracle_passes", "shuffled_passes"):
        tested = layers[layers[control].isin(["True", "False"])]
        failed = tested.loc[tested[control] == "False", "place"].tolist()
        lines.append(f"  {control}: {len(tested) - len(failed)} of {len(tested)}; fails in {', '.join(failed) or '-'}")
    schedules = tables["schedules"]
    for row in schedules[schedules["rows"] == "measured"].to_dict("records"):
        further = schedules[
            (schedules["schedule"] == row["schedule"]) & (schedules["mode"] == row["mode"])
            & (schedules["rows"] == "further")
        ].iloc[0]  # fmt: skip
        costs = [f"{float(r['percent']):+.1f} ± {float(r['percent_error']):.1f}" for r in (row, further)]
        lines.append(
            f"  {row['schedule']}, {row['mode']}: {costs[0]} % ({costs[1]}), {float(row['flops_left']):.3f} of the "
            f"FLOPs, layers' sum {float(row['sum_of_layers_percent']):+.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Write tables and figures of the folders that are named."""
    gathered: dict[str, list[pd.DataFrame]] = {"cells": [], "layers": [], "schedules": [], "prompts": []}
    for folder in map(Path, sys.argv[1:]):
        record = read_json_object(folder / "run.json")
        tables = tables_of(folder, record)
        if "prompts" in tables:
            print(summary(folder.name, record, tables))
            if holds(tables["prompts"]):
                draw(HERE / f"{folder.name}.png", tables["cells"], record)
        write_provenance(HERE.parent / "provenance.csv", folder.name, record)
        for name, table in tables.items():
            table.insert(0, "profile", folder.name)
            if name in ("cells", "layers"):
                table.insert(1, "status", record["status"])
            gathered[name].append(table)
    for name, profiles in gathered.items():
        if not profiles:
            continue
        table = pd.concat(profiles, ignore_index=True)
        if name == "cells":  # the only large one: six digits are more than its standard errors leave of meaning
            numbers = table.columns.difference(["profile", "status", "part", "mode"])
            table[numbers] = table[numbers].apply(pd.to_numeric)
            path = HERE / "cells.csv.gz"
            gzip = {"method": "gzip", "mtime": 0}
            joined(path, as_text(table, "%.6g")).to_csv(path, index=False, compression=gzip)
        else:
            path = HERE / f"{name}.csv"
            write_text(path, joined(path, as_text(table)).to_csv(index=False))


if __name__ == "__main__":
    main()
