"""The tables of many edits as a Markdown report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sparselora.compare.edit_prediction import FITS
from sparselora.compare.over_adapters import ENDPOINTS
from sparselora.report.markdown import markdown_table, number, p_value, with_interval

_ON_CALIBRATION = ("predicted_second", "calibration_change")

HOW_TO_READ_EDITS = """\
Losses are cross-entropies in nats a label on held-out rows; below 0 is better. **Change** is against the unedited
adapter, **to the null** against the mean of the random draws, which take the same factors to random directions with
the same energy. A run's intervals [95 %] are by bootstrap over rows, its **rank p** and verdict are those of its own
report. **predicted** is the second-order ΔL from the calibration rows, **there** the change measured on these.

Of a configuration (all options of the edit) the runs of one adapter (its calibration seeds) are averaged first, because
they share its held-out rows and its quirks. Means, Student's-t 95 % intervals and p are over adapters, each with equal
weight: n is the number of adapters, and more seeds do not make it larger. p is adjusted by Holm over the rows of the
table. An adapter without a value (no draws, no signed mode) does not count for it. With one adapter there is no
interval and no p: nothing is said about other adapters. **better/worse** counts runs. `adapters.csv` has the means of
each adapter, and `configs.csv` also how the **signed** mode does, held out and on the calibration rows.

**Prediction**: in each run, the correlation of the predicted second-order ΔL with the measured change over its edits
(the edit, the signed mode, the draws), and the least-squares slope of measured on predicted, 1 if the size is right
too; on the calibration rows (**there**) and on the held-out ones. They are averaged as above. Over *draws* alone
neither the edit nor the signed mode can carry a correlation as a point far from the rest.

**Selection**: the held-out rows are split in two by a hash of their ids. The configuration with the lowest mean loss
change on the one half is reported on the other, which had no part in the choice; so its number is not that of a
winner picked on the rows that it is shown on. Both means are over adapters, as above."""


def edits_report(
    runs: pd.DataFrame, configs: pd.DataFrame, chosen: pd.DataFrame, predictions: pd.DataFrame, left_out: int
) -> str:
    """The section of the report under its heading: configurations, the selection, the prediction, the runs."""
    parts = []
    for study, part in configs.groupby("study", sort=False):
        own = runs[runs["study"] == study]
        parts += [f"## {study}", _positive_control(own), _configs_markdown(part)]
        if own["adapter"].nunique() == 1:
            parts.append("One adapter: there is no interval and no p over adapters.")
        picked = chosen[chosen["study"] == study] if len(chosen) else chosen
        parts += [_selection_text(picked.iloc[0]) if len(picked) else "No selection: too few held-out rows to split."]
        parts += [_predictions_markdown(predictions[predictions["study"] == study]), _runs_markdown(own)]
    if left_out:
        parts.append(f"{left_out} edits are left out: not finished, or without a report.")
    return "\n\n".join(parts) + "\n"


def _positive_control(runs: pd.DataFrame) -> str:
    gains = runs.drop_duplicates("adapter")
    shown = ", ".join(f"{row['adapter']} {-row['adapter_gain']:+.4f}" for row in gains.to_dict("records"))
    return f"Positive control: the loss of each adapter, unedited, from that without it: {shown} nats a label."


def _interval(row: Any, name: str, form: str = "+.5f") -> str:
    return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], form)


def _configs_markdown(configs: pd.DataFrame) -> str:
    header = ["config", "runs", "adapters", "change", "p", "to the null", "p", "accuracy", "predicted", "there"]
    header.append("better/worse")
    rows = []
    for row in configs.to_dict("records"):
        cells = [row["config"], str(row["n_runs"]), str(row["n_adapters"])]
        for name in ENDPOINTS:
            cells += [_interval(row, name), p_value(row[f"{name}_p_holm"])]
        cells += [_interval(row, "accuracy_change", "+.4f"), *(_interval(row, name) for name in _ON_CALIBRATION)]
        rows.append([*cells, f"{row['better']}/{row['worse']} of {row['n_runs']}"])
    return markdown_table(header, rows)


def _selection_text(row: Any) -> str:
    text = (
        f"Selection: of {row['n_configs']} configurations **{row['config']}** has the lowest mean loss change "
        f"({row['selection_change']:+.5f}) on the {row['selection_rows']} rows of the selection half. On the "
        f"{row['reporting_rows']} others: {_interval(row, 'loss_change')} against the unedited adapter ("
        f"{_certainty(row)})"
    )
    text += "." if np.isnan(row["null_gap"]) else f", {_interval(row, 'null_gap')} to the null."
    if row["selection_change"] >= 0:
        text += " No configuration lowers the loss on the selection half: leaving the adapter as it is was the choice."
    return text


def _certainty(row: Any) -> str:
    """How sure the reported change is, and of how much it is the mean."""
    of = f"{row['n_runs']} runs of {row['n_adapters']} adapters"
    if row["n_adapters"] == 1:
        return f"{row['n_runs']} runs of one adapter: no interval over adapters"
    return f"p {p_value(row['loss_change_p']) or 'unknown'}, {of}"


def _predictions_markdown(predictions: pd.DataFrame) -> str:
    header = ["mode", "over", "runs", "adapters", "correlation there", "slope", "correlation held out", "slope"]
    rows = []
    for row in predictions.to_dict("records"):
        cells = [row["mode"], row["over"], str(row["n_runs"]), str(row["n_adapters"])]
        rows.append([*cells, *(_interval(row, name, "+.2f") for name in FITS)])
    return markdown_table(header, rows)


def _runs_markdown(runs: pd.DataFrame) -> str:
    header = [
        "run",
        "adapter",
        "config",
        "seed",
        "unedited",
        "change",
        "to the null",
        "rank p",
        "accuracy",
        "predicted",
    ]
    rows = []
    for row in runs.to_dict("records"):
        cells = [row["name"], row["adapter"], row["config"], str(row["seed"]), f"{row['unedited_loss']:.5f}"]
        cells += [with_interval(row["loss_change"], row["ci_low"], row["ci_high"], "+.5f")]
        cells += [with_interval(row["null_gap"], row["null_ci_low"], row["null_ci_high"], "+.5f")]
        cells += [number(row["rank_p"], ".3f"), number(row["accuracy_change"], "+.4f")]
        cells += [number(row["predicted_second"], "+.5f"), number(row["calibration_change"], "+.5f"), row["verdict"]]
        rows.append(cells)
    return markdown_table([*header, "there", "verdict"], rows)
