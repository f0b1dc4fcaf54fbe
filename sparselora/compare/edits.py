"""Finished edits with reports, read from their folders: what each was measured on, and the names of configurations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sparselora.compare.runs import Run, run_folders
from sparselora.errors import InputError
from sparselora.numerics.stats import is_at_chance, mean_interval
from sparselora.runs.files import read_table
from sparselora.runs.former_names import with_present_names
from sparselora.spectral.modes import EditOptions

COMMAND = "edit"
_NOT_CONFIG = frozenset({
    "adapter", "model", "dataset", "task", "eval_file", "eval_samples", "text_fields", "label_field",
    "prompt_field", "completion_field", "template", "max_length", "seed", "device", "dtype", "sensitivity", "report",
    "draws", "calib_bsz", "eval_bsz", "eval_gsm8k", "fewshot", "max_new_tokens",
    "general_dataset", "general_samples", "oracle", "sgd",
})  # fmt: skip
"""Arguments of an edit in which runs of one configuration may differ: what it is applied to, and how it is measured."""
_STUDY = ("model", "dataset", "eval_file", "eval_samples", "task")
"""Losses are averaged over runs that share these only."""
_REPORT_NUMBERS = ("loss", "loss_change", "change_l2", "predicted_first", "predicted_second", "calibration_change")


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
    def is_adapter_idle(self) -> bool:
        """Return whether the adapter, unedited, is not clearly better than the model without its LoRA: by the loss of
        the rows (paired t interval), and of a classifier by accuracy above chance."""
        by_kind = {
            kind: self.items[self.items["variant"] == name]
            for name, kind in zip(self.variants["variant"], self.variants["kind"])
            if kind in ("base", "no_lora", "unedited")
        }
        unedited, without = by_kind["unedited"], by_kind.get("no_lora", by_kind["base"])
        gain = mean_interval(without["loss"].to_numpy() - unedited["loss"].to_numpy())
        if "label" in unedited and is_at_chance(unedited["correct"], unedited["label"]):
            return True
        return not gain.low > 0

    @property
    def columns(self) -> dict[str, Any]:
        """Its columns in a table."""
        return {"name": self.name, "study": self.study, "config": self.label, "adapter": self.adapter}


@dataclass(frozen=True)
class Edits:
    """Finished edits with reports, in order.

    Attributes:
        n_left_out: how many were not finished, or had no report.
        root: the folder that holds them.
    """

    runs: Sequence[EditRun]
    n_left_out: int
    root: Path


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
    return Edits(_named(runs), n_left_out, root)


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
