"""Many edits in one table: each against its controls, the configurations over adapters, and the best of them chosen on
one half of the held-out rows and reported on the other."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from sparselora.compare.edit_prediction import FITS, fits, points_of
from sparselora.compare.edit_runs import EditRun, Edits
from sparselora.compare.over_adapters import ENDPOINTS, over_adapters
from sparselora.errors import InputError
from sparselora.numerics.stats import holm
from sparselora.spectral.verdict import BETTER, WORSE, compare

SELECTION, REPORTING = "selection", "reporting"
_DESCRIBED = (
    "accuracy_change", "predicted_second", "calibration_change", "signed_change", "signed_calibration_change",
)  # fmt: skip
"""Means that come with an interval but are not tested."""


# --- runs ---------------------------------------------------------------------------------------------------------


def run_table(edits: Edits, bootstrap: Callable[[int], np.random.Generator]) -> pd.DataFrame:
    """A row a run: what it edits and how, its loss against the unedited adapter and against its null, the verdict, how
    the signed mode does, and how well ΔL was predicted (`FITS`).

    Args:
        bootstrap: seed → the generator with which the run's own report was made, so that the intervals are its own.
    """
    labels = zip(edits.runs, edits.studies, edits.configs, edits.adapters)
    return pd.DataFrame([
        {"name": run.name, "study": study, "config": config, "adapter": adapter} | _run_row(run, bootstrap(run.seed))
        for run, study, config, adapter in labels
    ])  # fmt: skip


def _run_row(run: EditRun, rng: np.random.Generator) -> dict[str, Any]:
    try:
        found = compare(run.items, run.table, rng)
    except InputError as error:
        raise InputError(f"{run.name}: {error}") from None
    by_kind = found.table.drop_duplicates("kind").set_index("kind")
    edit, unedited = by_kind.loc["edit"], by_kind.loc["unedited"]
    control = by_kind.loc["no_lora" if "no_lora" in by_kind.index else "base"]
    row: dict[str, Any] = {"mode": run.arguments["mode"], "seed": run.seed, "n_rows": found.n}
    row |= {"unedited_loss": unedited["loss"], "adapter_gain": control["loss_change"]}
    row |= {name: edit[name] for name in ("loss_change", "ci_low", "ci_high", "bootstrap_p")}
    verdict = found.verdict
    row |= {"null_gap": verdict.gap.mean, "null_ci_low": verdict.gap.low, "null_ci_high": verdict.gap.high}
    row |= {"rank_p": verdict.better_p, "rank_p_worse": verdict.worse_p, "draws": verdict.draws}
    row["accuracy_change"] = edit["accuracy"] - unedited["accuracy"] if found.classifies else float("nan")
    row |= {"predicted_first": edit["predicted_first"], "predicted_second": edit["predicted_second"]}
    # What was measured on the calibration rows is in the report alone.
    points = points_of(run)
    measured = points.drop_duplicates("kind").set_index("kind").reindex(["edit", "signed"])
    row["calibration_change"] = measured.loc["edit", "calibration_change"]
    row["signed_change"] = measured.loc["signed", "loss_change"]
    row["signed_calibration_change"] = measured.loc["signed", "calibration_change"]
    return row | fits(points) | {"verdict": verdict.word}


# --- adapters and configurations ----------------------------------------------------------------------------------


def adapter_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a configuration, study and adapter: means over its runs, each run with equal weight.

    Args:
        runs: of `run_table`.
    """
    keys = ["study", "config", "adapter"]
    groups = runs.groupby(keys, sort=False)
    means = groups[[*ENDPOINTS, *_DESCRIBED, *FITS]].mean()
    means.insert(0, "n_runs", groups.size())
    return means.reset_index()


def config_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a configuration and study. Runs (calibration seeds) are averaged within their adapter first; means,
    Student's-t 95 % intervals and p of no change are over adapters, each with equal weight, p also adjusted by Holm
    over all rows. How many runs there are, and how many are better and worse than their null.

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
            described = over_adapters(part, name)
            del described[f"{name}_p"]
            row |= described
        row |= {"better": int((part["verdict"] == BETTER).sum()), "worse": int((part["verdict"] == WORSE).sum())}
        rows.append(row)
    table = pd.DataFrame(rows)
    for name in ENDPOINTS:
        table[f"{name}_p_holm"] = holm(table[f"{name}_p"].tolist())
    return table


# --- selection ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1 << 16)
def half_of(row: object) -> str:
    """The half of the held-out rows that a row is in: by a hash of its id alone, so the same for every run."""
    return SELECTION if hashlib.sha256(f"row {row}".encode()).digest()[0] % 2 else REPORTING


def half_changes(run: EditRun, half: str) -> dict[str, float]:
    """Number of rows in ``half``, and on these the loss of the edit minus that of the unedited adapter and minus the
    mean of the draws, nats a label; NaN without rows or draws."""
    ids = run.items["row"].unique()
    items = run.items[run.items["row"].isin([row for row in ids if half_of(row) == half])]
    kinds = run.table.set_index("variant")["kind"]
    labels = items["tokens"] if "tokens" in items else pd.Series(1.0, index=items.index)
    each = pd.DataFrame({"loss": items["loss"], "labels": labels}).groupby(items["variant"]).sum()
    loss = (each["loss"] / each["labels"]).groupby(kinds.reindex(each.index)).mean()
    nan = float("nan")
    edit = loss.get("edit", nan)
    return {
        "n_rows": int((items["variant"] == kinds.index[kinds == "edit"][0]).sum()),
        "loss_change": edit - loss.get("unedited", nan),
        "null_gap": edit - loss.get("draw", nan),
    }


def selection_table(edits: Edits) -> pd.DataFrame:
    """A row a study: the configuration with the lowest mean loss change on the selection half (the first of equals),
    and how it does on the reporting half. Both means are over adapters, runs averaged within each first, and so are
    the latter's Student's-t 95 % interval and p (NaN with one adapter).

    Only configurations with as many adapters as the most have, and among these as many runs, can be chosen: a mean
    over other runs is another quantity.
    """
    halves = pd.DataFrame([
        {"study": study, "config": config, "adapter": adapter, "half": half, **half_changes(run, half)}
        for run, study, config, adapter in zip(edits.runs, edits.studies, edits.configs, edits.adapters)
        for half in (SELECTION, REPORTING)
    ])  # fmt: skip
    rows = []
    for study, part in halves.groupby("study", sort=False):
        chosen_on, reported_on = (part[part["half"] == half] for half in (SELECTION, REPORTING))
        means = _comparable_means(chosen_on)
        if means.empty or not reported_on["n_rows"].min():
            continue
        best = str(means.idxmin())
        there = reported_on[reported_on["config"] == best]
        row: dict[str, Any] = {"study": study, "config": best, "n_configs": len(means), "n_runs": len(there)}
        row["n_adapters"] = there["adapter"].nunique()
        row |= {"selection_rows": int(chosen_on["n_rows"].max()), "reporting_rows": int(reported_on["n_rows"].max())}
        row["selection_change"] = means[best]
        for name in ENDPOINTS:
            row |= over_adapters(there, name)
        rows.append(row)
    return pd.DataFrame(rows)


def _comparable_means(runs: pd.DataFrame) -> pd.Series:
    """Mean loss change over adapters of each configuration that can be chosen; none that is not known."""
    by_config = runs.groupby("config", sort=False)
    size = pd.DataFrame({"adapters": by_config["adapter"].nunique(), "runs": by_config.size()})
    size = size[size["adapters"] == size["adapters"].max()]
    full = size.index[size["runs"] == size["runs"].max()]
    means = pd.Series(
        {config: over_adapters(by_config.get_group(config), "loss_change")["loss_change"] for config in full}
    )
    return means.dropna()
