"""Comparison of finished edits: its tables and figures, and the page that says what they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.compare.edit_tables import (
    ENDPOINTS,
    FITS,
    adapter_table,
    config_table,
    contrast_values,
    prediction_points,
    prediction_table,
    run_table,
    selection_table,
)
from sparselora.compare.edits import EditRun, Edits, read_edits
from sparselora.compare.runs import ComparisonReport, PairedValues, files_of, nothing_learned_text
from sparselora.config.contrasts import Contrast
from sparselora.errors import few
from sparselora.report.markdown import markdown_table, number, p_value, with_interval
from sparselora.spectral.verdict import shown_rank_p

_ON_CALIBRATION = ("predicted_second", "calibration_change")

HOW_TO_READ = """\
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


@dataclass(frozen=True)
class EditComparison:
    """Finished edits, to be compared by configuration."""

    edits: Edits
    baseline_label: None = None

    @classmethod
    def read(cls, paths: Sequence[Path]) -> EditComparison:
        return cls(read_edits(paths))

    @property
    def default_folder(self) -> Path:
        return self.edits.root / "compare"

    @property
    def outputs(self) -> Sequence[str]:
        return (
            "compare.md", "edits.csv", "adapters.csv", "configs.csv", "selection.csv", "prediction.csv",
            "edit_configs.png", "edit_configs.csv", "prediction.png", "prediction_points.csv",
        )  # fmt: skip

    @property
    def inputs(self) -> list[Path]:
        return [run.path for run in self.edits.runs]

    @property
    def files(self) -> list[Path]:
        return files_of(self.inputs, "report.csv", "report_items.csv")

    def paired_values(self, contrast: Contrast) -> PairedValues:
        """Return the values by adapter, each the mean over its runs. ``first`` is the label of a configuration,
        ``second`` another or, of the same runs, ``unedited`` or ``null`` (the mean of the draws); the endpoint is
        ``loss``, in nats a label."""
        return contrast_values(self.edits, contrast)

    def report(self, seed: int) -> ComparisonReport:
        """Compare the configurations of every study. The bootstraps are those of the edits' own reports, whatever
        ``seed``."""
        from sparselora.report.spectral import edit_configs, predictions
        from sparselora.spectral.edit import BOOTSTRAP, generator

        edits = self.edits
        runs = run_table(edits, lambda seed: generator(seed, BOOTSTRAP))
        configs, selection, fitted = config_table(runs), selection_table(edits), prediction_table(edits)
        points = prediction_points(edits)
        sections = []
        for study, part in configs.groupby("study", sort=False):
            sections += [
                f"## {study}",
                *_nothing_learned([run for run in edits.runs if run.study == study]),
                _study_section(part, *(_of_study(table, study) for table in (runs, selection, fitted))),
            ]
        if edits.n_left_out:
            sections.append(f"{edits.n_left_out} edits are left out: not finished, or without a report.")
        tables = {"edits": runs, "adapters": adapter_table(runs), "configs": configs, "selection": selection}
        tables |= {"prediction": fitted, "prediction_points": points}
        title = f"{len(edits.runs)} edits by configuration"
        prediction_title = f"Predicted against measured change of the loss, {len(edits.runs)} runs"
        figures = {
            "edit_configs.png": partial(edit_configs, configs=configs, title=title),
            "prediction.png": partial(predictions, points=points, title=prediction_title),
        }
        return ComparisonReport(
            "Comparison of edits",
            HOW_TO_READ,
            "\n\n".join(sections) + "\n",
            {f"{name}.csv": table for name, table in tables.items()},
            figures,
        )


def _of_study(table: pd.DataFrame, study: object) -> pd.DataFrame:
    return table[table["study"] == study] if len(table) else table


def _nothing_learned(runs: Sequence[EditRun]) -> list[str]:
    idle = {run.adapter: None for run in runs if run.is_adapter_idle}
    if not idle:
        return []
    evidence = "without an edit they are not clearly better than the model without them"
    return [nothing_learned_text(f"the adapters {few(idle)}", evidence, "Edits of such adapters show little")]


def _study_section(
    configs: pd.DataFrame, runs: pd.DataFrame, selection: pd.DataFrame, predictions: pd.DataFrame
) -> str:
    """Write what follows the heading of a study: control, configurations, the selection, the prediction, the runs."""
    parts = [_positive_control(runs), _configs_markdown(configs)]
    if runs["adapter"].nunique() == 1:
        parts.append("One adapter: there is no interval and no p over adapters.")
    has_selection = len(selection) > 0
    parts.append(
        _selection_text(selection.iloc[0]) if has_selection else "No selection: too few held-out rows to split."
    )
    return "\n\n".join([*parts, _predictions_markdown(predictions), _runs_markdown(runs)])


def _positive_control(runs: pd.DataFrame) -> str:
    gains = runs.drop_duplicates("adapter")
    shown = ", ".join(f"{row['adapter']} {-row['adapter_gain']:+.4f}" for row in gains.to_dict("records"))
    return f"Positive control: the loss of each adapter, unedited, from that without it: {shown} nats a label."


def _interval(row: Any, name: str, form: str = "+.5f") -> str:
    return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], form)


def _configs_markdown(configs: pd.DataFrame) -> str:
    header = ["config", "runs", "adapters", "change", "p (Holm)", "to the null", "p (Holm)", "accuracy", "predicted"]
    header += ["there", "better/worse"]
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
        text += " No configuration lowers the loss on the selection half: keep the adapter as it is."
    return text


def _certainty(row: Any) -> str:
    """Say how sure the reported change is, and what it is the mean of."""
    if row["n_adapters"] == 1:
        return f"{row['n_runs']} runs of one adapter: no interval over adapters"
    return f"p {p_value(row['loss_change_p']) or 'unknown'}, {row['n_runs']} runs of {row['n_adapters']} adapters"


def _predictions_markdown(predictions: pd.DataFrame) -> str:
    header = ["mode", "over", "runs", "adapters", "correlation there", "slope", "correlation held out", "slope"]
    rows = []
    for row in predictions.to_dict("records"):
        cells = [row["mode"], row["over"], str(row["n_runs"]), str(row["n_adapters"])]
        rows.append([*cells, *(_interval(row, name, "+.2f") for name in FITS)])
    return markdown_table(header, rows)


def _runs_markdown(runs: pd.DataFrame) -> str:
    header = ["run", "adapter", "config", "seed", "unedited", "change", "to the null", "rank p", "accuracy"]
    header += ["predicted", "there", "verdict"]
    rows = []
    for row in runs.to_dict("records"):
        cells = [row["name"], row["adapter"], row["config"], str(row["seed"]), f"{row['unedited_loss']:.5f}"]
        cells += [with_interval(row["loss_change"], row["ci_low"], row["ci_high"], "+.5f")]
        cells += [with_interval(row["null_gap"], row["null_ci_low"], row["null_ci_high"], "+.5f")]
        cells += [shown_rank_p(row["rank_p"], row["draws"]), number(row["accuracy_change"], "+.4f")]
        cells += [number(row["predicted_second"], "+.5f"), number(row["calibration_change"], "+.5f"), row["verdict"]]
        rows.append(cells)
    return markdown_table(header, rows)
