"""Finished edits: read from their folders, compared with their own controls, averaged over adapters, and the report.

An edit's report already pairs it, row by row, with its unedited adapter and with random draws. Here the configurations
are compared over adapters; the best is chosen on one half of the held-out rows and reported on the other; and the
second-order prediction of the change is held against the measured one.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.compare.pairing import NAN, add_holm, mean_over_clusters
from sparselora.compare.runs import ComparisonReport, Run, files_of, run_folders
from sparselora.errors import InputError
from sparselora.report.markdown import markdown_table, number, p_value, with_interval
from sparselora.runs.folder import read_table
from sparselora.runs.former_names import with_present_names
from sparselora.spectral.modes import EditOptions
from sparselora.spectral.verdict import BETTER, WORSE, compare

COMMAND = "edit"
_NOT_CONFIG = frozenset({
    "adapter", "model", "dataset", "task", "eval_file", "eval_samples", "text_fields", "label_field",
    "prompt_field", "completion_field", "template", "max_length", "seed", "device", "dtype", "sensitivity", "report",
    "draws", "calib_bsz", "eval_bsz", "eval_gsm8k", "fewshot", "max_new_tokens",
})  # fmt: skip
"""Arguments of an edit in which runs of one configuration may differ: what it is applied to, and how it is measured."""
_STUDY = ("model", "dataset", "eval_file", "eval_samples", "task")
"""Losses are averaged over runs that share these only."""
_REPORT_NUMBERS = ("loss", "loss_change", "change_l2", "predicted_first", "predicted_second", "calibration_change")

ENDPOINTS = ("loss_change", "null_gap")
"""The changes that are tested: against the unedited adapter and against the mean of its null's draws."""
HALVES = SELECTION, REPORTING = ("selection", "reporting")
_DESCRIBED = (
    "accuracy_change", "predicted_second", "calibration_change", "signed_change", "signed_calibration_change",
)  # fmt: skip
"""Means that come with an interval but are not tested."""

EDITED = ("edit", "signed", "draw")
"""The kinds of variants that change the adapter, and so have a prediction."""
PREDICTED = "predicted_second"
MEASURED = {"calibration": "calibration_change", "held_out": "loss_change"}
"""Where a change is measured → its column in a report."""
FITS = tuple(f"{place}_{quantity}" for place in MEASURED for quantity in ("correlation", "slope"))
ALL_EDITS, DRAWS_ALONE, ALL_MODES = "all", "draws", "all modes"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class EditRun(Run):
    """A finished edit with a report: its items are those of ``report_items.csv``, a row per variant and item.

    Attributes:
        variants: ``report.csv``, a row per variant.
        label: its configuration: the mode, and the settings in which the configurations differ.
        study: model and data; losses are averaged over runs of one study only.
        adapter: name of the edited adapter.
    """

    items: pd.DataFrame
    variants: pd.DataFrame
    label: str = ""
    study: str = ""
    adapter: str = ""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def mode(self) -> str:
        return str(self.config["mode"])

    @property
    def options(self) -> dict[str, Any]:
        """The settings that make the configuration."""
        return {name: value for name, value in self.config.items() if name not in _NOT_CONFIG}

    @property
    def columns(self) -> dict[str, Any]:
        """Its columns in a table."""
        return {"name": self.name, "study": self.study, "config": self.label, "adapter": self.adapter}


@dataclass(frozen=True)
class Edits:
    """Finished edits with reports, in order.

    Attributes:
        n_left_out: how many were not finished, or had no report.
        default_folder: the folder of the comparison unless the user names another.
    """

    runs: Sequence[EditRun]
    n_left_out: int
    default_folder: Path
    baseline_label: None = None

    @property
    def outputs(self) -> Sequence[str]:
        return (
            "compare.md", "edits.csv", "adapters.csv", "configs.csv", "selection.csv", "prediction.csv",
            "edit_configs.png", "edit_configs.csv", "prediction.png", "prediction_points.csv",
        )  # fmt: skip

    @property
    def inputs(self) -> list[Path]:
        return [run.path for run in self.runs]

    @property
    def files(self) -> list[Path]:
        return files_of(self.inputs, "report.csv", "report_items.csv")

    def report(self, seed: int) -> ComparisonReport:
        """Compare the configurations. The bootstraps are those of the runs' own reports, whatever ``seed``."""
        return edits_report(self)


# --- reading ------------------------------------------------------------------------------------------------------


def read_edits(paths: Sequence[Path]) -> Edits:
    """Read the finished edits with a report in ``paths`` (their folders, or folders that hold them).

    Raises:
        InputError: a path holds no edit; no edit is finished and has a report; a report cannot be read.
    """
    runs, n_left_out = [], 0
    for path in paths:
        folders = list(run_folders(path, COMMAND))
        if not folders:
            raise InputError(f"{path} holds no run of edit; name their folders, or the --run_root of a grid")
        for folder, record in folders:
            if record.get("status") == "success" and (folder / "report.csv").is_file():
                runs.append(_read_edit(folder, record))
            else:
                n_left_out += 1
    if not runs:
        raise InputError(f"none of {n_left_out} edits is finished and has a report; run them with --report")
    root = paths[0].parent if (paths[0] / "run.json").is_file() else paths[0]
    return Edits(_named(runs), n_left_out, root / "compare")


def _read_edit(folder: Path, record: dict[str, Any]) -> EditRun:
    arguments, seed = with_present_names(record.get("arguments", {}), COMMAND), record.get("seed")
    if not isinstance(seed, int) or not {"mode", "adapter"} <= set(arguments):
        raise InputError(f"run.json in {folder} gives no seed, mode or adapter; run the edit again")
    try:
        variants = read_table(folder / "report.csv", numbers=_REPORT_NUMBERS, texts=("variant", "kind"))
        items = read_table(folder / "report_items.csv", numbers=("loss",), texts=("variant", "row"))
    except InputError as error:
        raise InputError(f"the report in {folder} cannot be read ({error}); run the edit again") from None
    return EditRun(folder, arguments, seed, {}, items, variants)


def _named(runs: Sequence[EditRun]) -> list[EditRun]:
    """Name the configuration, study and adapter of each run."""
    studies = [f"{_plain(run.config.get('model'))} on {_plain(run.config.get('dataset'))}" for run in runs]
    identities = [json.dumps({name: run.config.get(name) for name in _STUDY}, sort_keys=True) for run in runs]
    adapters = [run.config["adapter"] for run in runs]
    names = zip(
        _labels([run.options for run in runs]),
        _distinct(studies, identities),
        _distinct([_plain(path) for path in adapters], [json.dumps(path, sort_keys=True) for path in adapters]),
    )
    return [
        replace(run, label=label, study=study, adapter=adapter) for run, (label, study, adapter) in zip(runs, names)
    ]


def _labels(options: Sequence[dict[str, Any]]) -> list[str]:
    """Name each configuration by its mode, and the settings in which they are not all equal.

    An option of the edit counts only where it differs between configurations of one mode: another may not read it.
    """
    names = sorted({name for settings in options for name in settings} - {"mode"})

    def differing(among: Sequence[dict[str, Any]]) -> set[str]:
        return {name for name in names if len({json.dumps(settings.get(name)) for settings in among}) > 1}

    shared = differing(options) - {option.name for option in fields(EditOptions)}
    modes = {str(settings["mode"]) for settings in options}
    named = {mode: shared | differing([s for s in options if s["mode"] == mode]) for mode in modes}
    return [
        ", ".join(
            [
                str(settings["mode"]),
                *(f"{name} {_shown(settings.get(name))}" for name in sorted(named[str(settings["mode"])])),
            ]
        )
        for settings in options
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> str:
    """Return an argument as one reads it: a recorded path by its name."""
    return str(value["name"]) if isinstance(value, dict) else str(value)


def _distinct(names: Sequence[str], identities: Sequence[str]) -> list[str]:
    """Return ``names``, with some digits of the identity where different things have one name."""
    by_name: dict[str, set[str]] = {}
    for name, identity in zip(names, identities):
        by_name.setdefault(name, set()).add(identity)
    return [
        name if len(by_name[name]) == 1 else f"{name}@{hashlib.sha256(identity.encode()).hexdigest()[:6]}"
        for name, identity in zip(names, identities)
    ]


# --- runs ---------------------------------------------------------------------------------------------------------


def run_table(edits: Edits, bootstrap: Callable[[int], np.random.Generator]) -> pd.DataFrame:
    """Return a row per run: the edit, its loss against the unedited adapter and against its null, the verdict, how the
    signed mode does, and how well ΔL was predicted (`FITS`).

    Args:
        bootstrap: seed → the generator with which the run's own report was made, so that the intervals are its own.
    """
    return pd.DataFrame([run.columns | _run_row(run, bootstrap(run.seed)) for run in edits.runs])


def _run_row(run: EditRun, rng: np.random.Generator) -> dict[str, Any]:
    try:
        report = compare(run.items, run.variants, rng)
    except InputError as error:
        raise InputError(f"{run.name}: {error}") from None
    by_kind = report.table.drop_duplicates("kind").set_index("kind")
    edit, unedited = by_kind.loc["edit"], by_kind.loc["unedited"]
    control = by_kind.loc["no_lora" if "no_lora" in by_kind.index else "base"]
    row: dict[str, Any] = {"mode": run.mode, "seed": run.seed, "n_rows": report.n}
    row |= {"unedited_loss": unedited["loss"], "adapter_gain": control["loss_change"]}
    row |= {name: edit[name] for name in ("loss_change", "ci_low", "ci_high", "bootstrap_p")}
    verdict = report.verdict
    row |= {"null_gap": verdict.gap.mean, "null_ci_low": verdict.gap.low, "null_ci_high": verdict.gap.high}
    row |= {"rank_p": verdict.better_p, "rank_p_worse": verdict.worse_p, "draws": verdict.draws}
    row["accuracy_change"] = edit["accuracy"] - unedited["accuracy"] if report.classifies else NAN
    row |= {"predicted_first": edit["predicted_first"], "predicted_second": edit["predicted_second"]}
    # What was measured on the calibration rows is in the report alone.
    points = points_of(run)
    measured = points.drop_duplicates("kind").set_index("kind").reindex(["edit", "signed"])
    row["calibration_change"] = measured.loc["edit", "calibration_change"]
    row["signed_change"] = measured.loc["signed", "loss_change"]
    row["signed_calibration_change"] = measured.loc["signed", "calibration_change"]
    return row | fits(points) | {"verdict": verdict.word}


# --- adapters and configurations ----------------------------------------------------------------------------------


def over_adapters(runs: pd.DataFrame, name: str, tested: bool = True) -> dict[str, float]:
    """Return `mean_over_clusters` of a column over adapters: those of one adapter share its held-out rows."""
    return mean_over_clusters(runs, name, "adapter", tested)


def adapter_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per configuration, study and adapter: means over its runs, each run with equal weight.

    Args:
        runs: of `run_table`.
    """
    groups = runs.groupby(["study", "config", "adapter"], sort=False)
    means = groups[[*ENDPOINTS, *_DESCRIBED, *FITS]].mean()
    means.insert(0, "n_runs", groups.size())
    return means.reset_index()


def config_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per configuration and study.

    Runs (calibration seeds) are averaged within their adapter first; means, Student's-t 95 % intervals and p of no
    change are over adapters, each with equal weight, p also adjusted by Holm over all rows. How many runs there are,
    and how many are better and worse than their null.

    With one adapter there is neither interval nor p (NaN). An adapter without a value (no draws, no signed mode) does
    not count for it: ``NAME_n`` says how many do.

    Args:
        runs: of `run_table`.
    """
    rows = []
    for (study, config), part in runs.groupby(["study", "config"], sort=False):
        row: dict[str, Any] = {"study": study, "config": config, "mode": part["mode"].iloc[0], "n_runs": len(part)}
        row |= {"n_adapters": part["adapter"].nunique(), "n_seeds": part["seed"].nunique()}
        for name in ENDPOINTS:
            row |= over_adapters(part, name)
        for name in _DESCRIBED:
            row |= over_adapters(part, name, tested=False)
        row |= {"better": int((part["verdict"] == BETTER).sum()), "worse": int((part["verdict"] == WORSE).sum())}
        rows.append(row)
    table = pd.DataFrame(rows)
    add_holm(table, [f"{name}_p" for name in ENDPOINTS])
    return table


# --- selection ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1 << 16)
def half_of(row: object) -> str:
    """Return the half of the held-out rows that a row is in: by a hash of its id alone, so the same for every run."""
    return SELECTION if hashlib.sha256(f"row {row}".encode()).digest()[0] % 2 else REPORTING


def half_changes(run: EditRun, half: str) -> dict[str, float]:
    """Return the number of rows in ``half``, and on these the loss of the edit minus that of the unedited adapter and
    minus the mean of the draws, nats per label; NaN without rows or draws."""
    ids = run.items["row"].unique()
    items = run.items[run.items["row"].isin([row for row in ids if half_of(row) == half])]
    kinds = run.variants.set_index("variant")["kind"]
    labels = items["tokens"] if "tokens" in items else pd.Series(1.0, index=items.index)
    sums = pd.DataFrame({"loss": items["loss"], "labels": labels}).groupby(items["variant"]).sum()
    loss = (sums["loss"] / sums["labels"]).groupby(kinds.reindex(sums.index)).mean()
    edit = loss.get("edit", NAN)
    return {
        "n_rows": int((items["variant"] == kinds.index[kinds == "edit"][0]).sum()),
        "loss_change": edit - loss.get("unedited", NAN),
        "null_gap": edit - loss.get("draw", NAN),
    }


def selection_table(edits: Edits) -> pd.DataFrame:
    """Return a row per study: the configuration with the lowest mean loss change on the selection half (the first of
    equals), and how it does on the reporting half.

    Both means are over adapters, runs averaged within each first, and so are the latter's Student's-t 95 % interval
    and p (NaN with one adapter). Only configurations with as many adapters as the most have, and among these as many
    runs, can be chosen: a mean over other runs is another quantity.
    """
    halves = pd.DataFrame(
        [run.columns | {"half": half, **half_changes(run, half)} for run in edits.runs for half in HALVES]
    )
    rows = []
    for study, part in halves.groupby("study", sort=False):
        selection, reporting = (part[part["half"] == half] for half in HALVES)
        means = _comparable_means(selection)
        if means.empty or not reporting["n_rows"].min():
            continue
        best = str(means.idxmin())
        best_runs = reporting[reporting["config"] == best]
        row: dict[str, Any] = {"study": study, "config": best, "n_configs": len(means), "n_runs": len(best_runs)}
        row["n_adapters"] = best_runs["adapter"].nunique()
        row |= {"selection_rows": int(selection["n_rows"].max()), "reporting_rows": int(reporting["n_rows"].max())}
        row["selection_change"] = means[best]
        for name in ENDPOINTS:
            row |= over_adapters(best_runs, name)
        rows.append(row)
    return pd.DataFrame(rows)


def _comparable_means(runs: pd.DataFrame) -> pd.Series:
    """Return the mean loss change over adapters of each configuration that can be chosen and has one."""
    by_config = runs.groupby("config", sort=False)
    size = pd.DataFrame({"adapters": by_config["adapter"].nunique(), "runs": by_config.size()})
    size = size[size["adapters"] == size["adapters"].max()]
    full = size.index[size["runs"] == size["runs"].max()]
    means = pd.Series(
        {config: over_adapters(by_config.get_group(config), "loss_change")["loss_change"] for config in full}
    )
    return means.dropna()


# --- prediction ---------------------------------------------------------------------------------------------------


def points_of(run: EditRun) -> pd.DataFrame:
    """Return a row per edited variant of a run: ``variant``, ``kind``, `PREDICTED` and the columns of `MEASURED`."""
    table = run.variants[run.variants["kind"].isin(EDITED)]
    return table.reindex(columns=["variant", "kind", PREDICTED, *MEASURED.values()]).reset_index(drop=True)


def prediction_points(edits: Edits) -> pd.DataFrame:
    """Return `points_of` every run, with its columns, ``mode`` and ``seed`` in front."""
    parts = []
    for run in edits.runs:
        points = points_of(run)
        front = pd.DataFrame(run.columns | {"mode": run.mode, "seed": run.seed}, index=points.index)
        parts.append(pd.concat([front, points], axis=1))
    return pd.concat(parts, ignore_index=True)


def fits(points: pd.DataFrame) -> dict[str, float]:
    """Return `FITS` of the points of a run: correlation of predicted and measured change, slope of measured on
    predicted."""
    row: dict[str, float] = {}
    predicted = points[PREDICTED].to_numpy(dtype=float)
    for place, column in MEASURED.items():
        correlation, slope = fit(predicted, points[column].to_numpy(dtype=float))
        row |= {f"{place}_correlation": correlation, f"{place}_slope": slope}
    return row


def fit(x: Array, y: Array) -> tuple[float, float]:
    """Return Pearson's correlation and the least-squares slope of ``y (n,)`` on ``x (n,)``, over the finite pairs.

    NaN of fewer than three pairs or where all x are equal; the correlation also where all y are.
    """
    is_finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[is_finite], y[is_finite]
    if len(x) < 3 or np.ptp(x) == 0:
        return NAN, NAN
    from_x, from_y = x - x.mean(), y - y.mean()
    products, squares = float(from_x @ from_y), float(from_x @ from_x)
    correlation = NAN if np.ptp(y) == 0 else products / float(np.sqrt(squares * (from_y @ from_y)))
    return correlation, products / squares


def prediction_table(edits: Edits) -> pd.DataFrame:
    """Return rows per study and mode, and of all modes where a study has several: `FITS` of each run, averaged within
    its adapter, their means over adapters with Student's-t 95 % interval.

    Each twice: over ``all`` edits of a run (the edit, the signed mode, the draws) and over its ``draws`` alone, where
    neither of the others can carry the correlation as a point far from the rest.
    """
    rows = []
    for (study, mode), part in _with_all_modes(_run_fits(edits)).groupby(["study", "mode"], sort=False):
        for over, runs in part.groupby("over", sort=False):
            row = {"study": study, "mode": mode, "over": over, "n_runs": len(runs)}
            row |= {"n_adapters": runs["adapter"].nunique(), "n_points": int(runs["n_points"].sum())}
            for name in FITS:
                row |= over_adapters(runs, name, tested=False)
            rows.append(row)
    return pd.DataFrame(rows)


def _run_fits(edits: Edits) -> pd.DataFrame:
    """Return two rows per run: `FITS` over all its edits and over its draws alone."""
    rows = []
    for run in edits.runs:
        points = points_of(run)
        for over, part in ((ALL_EDITS, points), (DRAWS_ALONE, points[points["kind"] == "draw"])):
            row = {"study": run.study, "mode": run.mode, "adapter": run.adapter, "over": over}
            rows.append({**row, "n_points": len(part), **fits(part)})
    return pd.DataFrame(rows)


def _with_all_modes(runs: pd.DataFrame) -> pd.DataFrame:
    several = runs.groupby("study")["mode"].transform("nunique") > 1
    return pd.concat([runs, runs[several].assign(mode=ALL_MODES)], ignore_index=True)


# --- the report ---------------------------------------------------------------------------------------------------

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


def edits_report(edits: Edits) -> ComparisonReport:
    """Compare the configurations of every study."""
    from sparselora.report.spectral import edit_configs, predictions
    from sparselora.spectral.edit import BOOTSTRAP, generator

    runs = run_table(edits, lambda seed: generator(seed, BOOTSTRAP))
    configs, selection, fitted = config_table(runs), selection_table(edits), prediction_table(edits)
    points = prediction_points(edits)
    sections = []
    for study, part in configs.groupby("study", sort=False):
        sections += [
            f"## {study}",
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
        cells += [number(row["rank_p"], ".3f"), number(row["accuracy_change"], "+.4f")]
        cells += [number(row["predicted_second"], "+.5f"), number(row["calibration_change"], "+.5f"), row["verdict"]]
        rows.append(cells)
    return markdown_table(header, rows)
