"""Finished edits as they lie in their folders: what each was, its report, its configuration, study and adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from sparselora.errors import InputError
from sparselora.runs.folder import read_record, read_table
from sparselora.runs.former_names import with_present_names
from sparselora.spectral.modes import EditOptions

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


@dataclass(frozen=True)
class EditRun:
    """A finished edit with a report: its ``run.json``, ``report.csv`` and ``report_items.csv``."""

    path: Path
    record: dict[str, Any]
    table: pd.DataFrame
    items: pd.DataFrame

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def arguments(self) -> dict[str, Any]:
        return with_present_names(self.record["arguments"], COMMAND)

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
        record = read_record(folder)
        if record is not None and record["command"] == COMMAND:
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
    configs = _labels([run.settings for run in runs])
    studies = [_study_name(run) for run in runs]
    return Edits(runs, configs, _distinct(studies, [r.study for r in runs]), _adapter_names(runs), left_out)


def _read_edit(folder: Path, record: dict[str, Any]) -> EditRun:
    arguments, seed = with_present_names(record.get("arguments", {}), COMMAND), record.get("seed")
    if not isinstance(seed, int) or not {"mode", "adapter"} <= set(arguments):
        raise InputError(f"run.json in {folder} gives no seed, mode or adapter; run the edit again")
    try:
        table = read_table(folder / "report.csv", numbers=_REPORT_NUMBERS, texts=("variant", "kind"))
        items = read_table(folder / "report_items.csv", numbers=("loss",), texts=("variant", "row"))
        return EditRun(folder, record, table, items)
    except InputError as error:
        raise InputError(f"the report in {folder} cannot be read ({error}); run the edit again") from None


def _labels(settings: Sequence[dict[str, Any]]) -> list[str]:
    """A label for each configuration: its mode, then the settings in which they are not all equal.

    An option of the edit counts only where it differs between configurations of one mode: another may not read it.
    """
    names = sorted({name for each in settings for name in each} - {"mode"})

    def differ(among: Sequence[dict[str, Any]]) -> set[str]:
        return {name for name in names if len({json.dumps(each.get(name)) for each in among}) > 1}

    shared = differ(settings) - {f.name for f in fields(EditOptions)}
    modes = {str(each["mode"]) for each in settings}
    told = {mode: shared | differ([each for each in settings if each["mode"] == mode]) for mode in modes}
    return [
        ", ".join(
            [str(each["mode"]), *(f"{name} {_shown(each.get(name))}" for name in sorted(told[str(each["mode"])]))]
        )
        for each in settings
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> str:
    """An argument as one reads it: a recorded path by its name."""
    return str(value["name"]) if isinstance(value, dict) else str(value)


def _study_name(run: EditRun) -> str:
    return f"{_plain(run.arguments.get('model'))} on {_plain(run.arguments.get('dataset'))}"


def _adapter_names(runs: Sequence[EditRun]) -> list[str]:
    given = [run.arguments["adapter"] for run in runs]
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
