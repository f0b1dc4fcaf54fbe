"""Many edits in one table: each against its controls, the configurations over seeds and adapters, and the best of them
chosen on one half of the held-out rows and reported on the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.errors import InputError
from sparselora.markdown import markdown_table, number, p_value, with_interval
from sparselora.spectral.report import BETTER, WORSE, compare
from sparselora.stats import compare_paired, holm, mean_interval

COMMAND = "edit"
_NOT_CONFIG = frozenset({
    "lora_path", "base_model", "dataset", "task", "eval_file", "eval_samples", "text_fields", "label_field",
    "prompt_field", "completion_field", "template", "max_length", "seed", "device", "dtype", "sensitivity", "report",
    "draws", "calib_batch_size", "eval_batch_size", "eval_gsm8k", "eval_fewshot", "eval_max_new_tokens",
})  # fmt: skip
"""Arguments of an edit in which runs of one configuration may differ: what it is applied to, and how it is measured."""
_STUDY = ("base_model", "dataset", "eval_file", "eval_samples", "task")
"""Losses are averaged over runs that share these only."""
_FILES = ("report.csv", "report_items.csv")
_ENDPOINTS = ("loss_change", "null_gap")
SELECTION, REPORTING = "selection", "reporting"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class EditRun:
    """A finished edit with a report: its ``run.json``, ``report.csv`` and ``report_items.csv``."""

    name: str
    record: dict[str, Any]
    table: pd.DataFrame
    items: pd.DataFrame

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.record["arguments"])

    @property
    def seed(self) -> int:
        return int(self.record["seed"])

    @property
    def study(self) -> str:
        return json.dumps({name: self.arguments.get(name) for name in _STUDY}, sort_keys=True)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes the configuration."""
        return {name: value for name, value in self.arguments.items() if name not in _NOT_CONFIG}


@dataclass(frozen=True)
class Edits:
    """The runs in order, the label of each one's configuration and study, and how many are left out as unfinished or
    without a report."""

    runs: list[EditRun]
    configs: list[str]
    studies: list[str]
    adapters: list[str]
    left_out: int


# --- reading ------------------------------------------------------------------------------------------------------


def holds_edits(path: Path) -> bool:
    """Whether ``path`` is the folder of an edit, or holds such folders."""
    return any(True for _ in _edit_folders(path))


def _edit_folders(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    candidates = [path] if (path / "run.json").is_file() else sorted(path.iterdir()) if path.is_dir() else []
    for folder in candidates:
        try:
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("command") == COMMAND:
            yield folder, record


def read_edits(paths: Sequence[Path]) -> Edits:
    """The finished edits with a report in ``paths`` (their folders, or folders that hold them).

    Raises:
        InputError: a path holds no edit; no edit is finished and has a report; a report cannot be read.
    """
    runs, left_out = [], 0
    for path in paths:
        found = list(_edit_folders(path))
        if not found:
            raise InputError(f"{path} holds no run of edit; name their folders, or the --run_root of a grid")
        for folder, record in found:
            if record.get("status") == "success" and (folder / "report.csv").is_file():
                runs.append(_read_edit(folder, record))
            else:
                left_out += 1
    if not runs:
        raise InputError(f"none of {left_out} edits is finished and has a report; run them with --report")
    configs = _labels([run.settings for run in runs], always="mode")
    studies = [_study_name(run) for run in runs]
    return Edits(runs, configs, _distinct(studies, [r.study for r in runs]), _adapter_names(runs), left_out)


def _read_edit(folder: Path, record: dict[str, Any]) -> EditRun:
    try:
        tables = [pd.read_csv(folder / name, float_precision="round_trip") for name in _FILES]
    except (OSError, ValueError) as error:
        raise InputError(f"the report in {folder} cannot be read ({error}); run the edit again") from None
    return EditRun(folder.resolve().name, record, *tables)


def _labels(settings: Sequence[dict[str, Any]], always: str) -> list[str]:
    """A label for each configuration: ``always``, then the settings in which they are not all equal."""
    names = sorted({name for each in settings for name in each} - {always})
    differ = [name for name in names if len({json.dumps(each.get(name)) for each in settings}) > 1]
    return [
        ", ".join([str(each[always]), *(f"{name} {_shown(each.get(name))}" for name in differ)]) for each in settings
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> str:
    """An argument as one reads it: a recorded path by its name."""
    return str(value["name"]) if isinstance(value, dict) else str(value)


def _study_name(run: EditRun) -> str:
    return f"{_plain(run.arguments.get('base_model'))} on {_plain(run.arguments.get('dataset'))}"


def _adapter_names(runs: Sequence[EditRun]) -> list[str]:
    given = [run.arguments["lora_path"] for run in runs]
    return _distinct([_plain(value) for value in given], [json.dumps(value, sort_keys=True) for value in given])


def _distinct(names: Sequence[str], identities: Sequence[str]) -> list[str]:
    """``names``, with some digits of the identity where different things have one name."""
    of: dict[str, set[str]] = {}
    for name, identity in zip(names, identities):
        of.setdefault(name, set()).add(identity)
    return [
        name if len(of[name]) == 1 else f"{name}@{hashlib.sha256(identity.encode()).hexdigest()[:6]}"
        for name, identity in zip(names, identities)
    ]


# --- tables -------------------------------------------------------------------------------------------------------


def run_table(edits: Edits, bootstrap: Callable[[int], np.random.Generator]) -> pd.DataFrame:
    """A row a run: what it edits and how, its loss against the unedited adapter and against its null, and the verdict.

    Args:
        bootstrap: seed → the generator with which the run's own report was made, so that the intervals are its own.
    """
    rows = []
    for run, config, study, adapter in zip(edits.runs, edits.configs, edits.studies, edits.adapters):
        try:
            found = compare(run.items, run.table, bootstrap(run.seed))
        except InputError as error:
            raise InputError(f"{run.name}: {error}") from None
        by_kind = found.table.drop_duplicates("kind").set_index("kind")
        edit, unedited = by_kind.loc["edit"], by_kind.loc["unedited"]
        control = by_kind.loc["no_lora" if "no_lora" in by_kind.index else "base"]
        row: dict[str, Any] = {"name": run.name, "study": study, "config": config, "adapter": adapter}
        row |= {"mode": run.arguments["mode"], "seed": run.seed, "n_rows": found.n}
        row |= {"unedited_loss": unedited["loss"], "adapter_gain": control["loss_change"]}
        row |= {name: edit[name] for name in ("loss_change", "ci_low", "ci_high", "bootstrap_p")}
        verdict = found.verdict
        row |= {"null_gap": verdict.gap.mean, "null_ci_low": verdict.gap.low, "null_ci_high": verdict.gap.high}
        row |= {"rank_p": verdict.better_p, "rank_p_worse": verdict.worse_p, "draws": verdict.draws}
        row["accuracy_change"] = edit["accuracy"] - unedited["accuracy"] if found.classifies else float("nan")
        row |= {"predicted_first": edit["predicted_first"], "predicted_second": edit["predicted_second"]}
        row["calibration_change"] = run.table.set_index("kind").loc["edit"].get("calibration_change", float("nan"))
        rows.append(row | {"verdict": verdict.word})
    return pd.DataFrame(rows)


def config_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a configuration and study, over its runs: means of the changes with Student's-t 95 % interval and p, also
    adjusted by Holm over all rows; how many runs are better and worse than their null.

    Args:
        runs: of `run_table`.
    """
    rows = []
    for (study, config), part in runs.groupby(["study", "config"], sort=False):
        row: dict[str, Any] = {"study": study, "config": config, "mode": part["mode"].iloc[0], "n_runs": len(part)}
        row |= {"n_adapters": part["adapter"].nunique(), "n_seeds": part["seed"].nunique()}
        for name in _ENDPOINTS:
            row |= _over_runs(name, part[name].to_numpy(dtype=float))
        row["accuracy_change"] = part["accuracy_change"].mean()
        row["predicted_second"] = part["predicted_second"].mean()
        row |= {"better": int((part["verdict"] == BETTER).sum()), "worse": int((part["verdict"] == WORSE).sum())}
        rows.append(row)
    table = pd.DataFrame(rows)
    for name in _ENDPOINTS:
        table[f"{name}_p_holm"] = holm(table[f"{name}_p"].tolist())
    return table


def _over_runs(name: str, values: Array) -> dict[str, float]:
    """Mean, interval and p of no change over runs, as columns; a run without the value (no draws) does not count."""
    known = values[~np.isnan(values)]
    if not known.size:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high", f"{name}_p"), float("nan"))
    found = mean_interval(known)
    p = compare_paired(known, np.zeros_like(known)).t_p
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_p": p}


# --- selection ----------------------------------------------------------------------------------------------------


def half_of(row: object) -> str:
    """The half of the held-out rows that a row is in: by a hash of its id alone, so the same for every run."""
    return SELECTION if hashlib.sha256(f"row {row}".encode()).digest()[0] % 2 else REPORTING


def half_changes(run: EditRun, half: str) -> dict[str, float]:
    """Number of rows in ``half``, and on these the loss of the edit minus that of the unedited adapter and minus the
    mean of the draws, nats a label; NaN without rows or draws."""
    items = run.items[run.items["row"].map(half_of) == half]
    kinds = run.table.set_index("variant")["kind"]
    labels = items["tokens"] if "tokens" in items else pd.Series(1.0, index=items.index)
    sums = pd.DataFrame({"kind": items["variant"].map(kinds), "variant": items["variant"], "loss": items["loss"]})
    sums["labels"] = labels
    each = sums.groupby(["kind", "variant"])[["loss", "labels"]].sum()
    loss = (each["loss"] / each["labels"]).groupby("kind").mean()
    nan = float("nan")
    edit = loss.get("edit", nan)
    rows = int((items["variant"].map(kinds) == "edit").sum())
    return {
        "n_rows": rows,
        "loss_change": edit - loss.get("unedited", nan),
        "null_gap": edit - loss.get("draw", nan),
    }


def selection_table(edits: Edits) -> pd.DataFrame:
    """A row a study: the configuration with the lowest mean loss change on the selection half (the first of equals),
    and how it does on the reporting half: mean over its runs with Student's-t 95 % interval and p.

    Only configurations with as many runs as the most have can be chosen: a mean over other runs is another quantity.
    """
    halves = pd.DataFrame([
        {"study": study, "config": config, "half": half, **half_changes(run, half)}
        for run, study, config in zip(edits.runs, edits.studies, edits.configs)
        for half in (SELECTION, REPORTING)
    ])  # fmt: skip
    rows = []
    for study, part in halves.groupby("study", sort=False):
        chosen_on, reported_on = (part[part["half"] == half] for half in (SELECTION, REPORTING))
        by_config = chosen_on.groupby("config", sort=False)["loss_change"]
        full = by_config.size() == by_config.size().max()
        means = by_config.mean()[full].dropna()
        if means.empty or not reported_on["n_rows"].min():
            continue
        best = str(means.idxmin())
        there = reported_on[reported_on["config"] == best]
        row: dict[str, Any] = {"study": study, "config": best, "n_configs": len(means), "n_runs": len(there)}
        row |= {"selection_rows": int(chosen_on["n_rows"].max()), "reporting_rows": int(reported_on["n_rows"].max())}
        row["selection_change"] = means[best]
        for name in _ENDPOINTS:
            row |= _over_runs(name, there[name].to_numpy(dtype=float))
        rows.append(row)
    return pd.DataFrame(rows)


# --- as Markdown --------------------------------------------------------------------------------------------------

HOW_TO_READ_EDITS = """\
Losses are cross-entropies in nats a label on held-out rows; below 0 is better. **Change** is against the unedited
adapter, **to the null** against the mean of the random draws, which take the same factors to random directions with
the same energy. A run's intervals [95 %] are by bootstrap over rows, its **rank p** and verdict are those of its own
report. **predicted** is the second-order ΔL from the calibration rows, **there** the change measured on these.

Of a configuration (all options of the edit; seeds and adapters are its runs) the means have Student's-t 95 % intervals
over runs, and p is adjusted by Holm over the rows of the table. Runs of one adapter share its held-out rows and its
quirks: these intervals speak about other seeds of these adapters before they speak about other adapters.

**Selection**: the held-out rows are split in two by a hash of their ids. The configuration with the lowest mean loss
change on the one half is reported on the other, which had no part in the choice; so its number is not that of a
winner picked on the rows that it is shown on."""


def edits_report(edits: Edits, runs: pd.DataFrame, configs: pd.DataFrame, chosen: pd.DataFrame) -> str:
    """The section of the report under its heading: configurations, the selection, the runs."""
    parts = []
    for study, part in configs.groupby("study", sort=False):
        own = runs[runs["study"] == study]
        parts += [f"## {study}", _positive_control(own), _configs_markdown(part)]
        picked = chosen[chosen["study"] == study] if len(chosen) else chosen
        parts += [_selection_text(picked.iloc[0]) if len(picked) else "No selection: too few held-out rows to split."]
        parts.append(_runs_markdown(own))
    if edits.left_out:
        parts.append(f"{edits.left_out} edits are left out: not finished, or without a report.")
    return "\n\n".join(parts) + "\n"


def _positive_control(runs: pd.DataFrame) -> str:
    gains = runs.drop_duplicates("adapter")
    shown = ", ".join(f"{row['adapter']} {-row['adapter_gain']:+.4f}" for row in gains.to_dict("records"))
    return f"Positive control: the loss of each adapter, unedited, from that without it: {shown} nats a label."


def _interval(row: Any, name: str) -> str:
    return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], "+.5f")


def _configs_markdown(configs: pd.DataFrame) -> str:
    header = ["config", "runs", "adapters", "change", "p", "to the null", "p", "accuracy", "predicted", "better/worse"]
    rows = []
    for row in configs.to_dict("records"):
        cells = [row["config"], str(row["n_runs"]), str(row["n_adapters"])]
        for name in _ENDPOINTS:
            cells += [_interval(row, name), p_value(row[f"{name}_p_holm"])]
        cells += [number(row["accuracy_change"], "+.4f"), number(row["predicted_second"], "+.5f")]
        rows.append([*cells, f"{row['better']}/{row['worse']} of {row['n_runs']}"])
    return markdown_table(header, rows)


def _selection_text(row: Any) -> str:
    text = (
        f"Selection: of {row['n_configs']} configurations **{row['config']}** has the lowest mean loss change "
        f"({row['selection_change']:+.5f}) on the {row['selection_rows']} rows of the selection half. On the "
        f"{row['reporting_rows']} others: {_interval(row, 'loss_change')} against the unedited adapter (p "
        f"{p_value(row['loss_change_p']) or 'unknown'}, {row['n_runs']} runs)"
    )
    text += "." if np.isnan(row["null_gap"]) else f", {_interval(row, 'null_gap')} to the null."
    if row["selection_change"] >= 0:
        text += " No configuration lowers the loss on the selection half: leaving the adapter as it is was the choice."
    return text


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
