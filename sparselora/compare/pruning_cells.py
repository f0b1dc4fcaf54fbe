"""Cells of a pruning sweep, read from `results.csv` and from the predictions in the folders of its runs.

A *study* is the part of a sweep with one set of settings: only its cells are compared with one another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.compare.runs import Group, Run
from sparselora.errors import InputError
from sparselora.numerics.channels import GATE_METHODS
from sparselora.numerics.stats import is_at_chance
from sparselora.pruning.outputs import ANSWER_LOSS
from sparselora.runs.files import read_table, read_texts
from sparselora.runs.folder import NOTHING_LEARNED, read_record
from sparselora.runs.user_files import read_json_object

CONTROL = "no_prune"
STATIC = "static"
"""The moment that token gates alone have: at the end, with the channels that were active most often for every token."""
MOMENTS = ("before", "right_after", "after")
SETTINGS = (
    "model",
    "dataset",
    "lora_r",
    "target_modules",
    "train_samples",
    "eval_samples",
    "warmup_epochs",
    "post_epochs",
    "lr",
    "train_bsz",
    "metric",
)
"""Columns whose values must agree for two cells to be compared."""
_CELL = ("method", "keep_ratio", "scope", "masked", "seed", "effective_r", "run_dir")
_NUMBERS = ("keep_ratio", "seed", "effective_r", *(f"metric_{moment}" for moment in MOMENTS))
_METRICS = ("effective_r", "active_r", *(f"metric_{moment}" for moment in (*MOMENTS, STATIC)))
_NO_SETTING = frozenset(
    {"method", "keep_ratio", "scope", "mask", "seed", "run_id", "run_dir", "device", "eval_bsz", *SETTINGS}
)
_GATE_SETTING = "gate_"
"""Prefix of the arguments that make another token gate, and no other study."""


@dataclass(frozen=True)
class PruningMethod:
    """A way of choosing channels: the method, and the settings that make it another one.

    Its text is the label in tables: the method, with its scope, masking and token-gate settings in brackets where they
    are not the default.
    """

    name: str
    scope: str = ""
    is_masked: bool = False
    gate: tuple[str, ...] = ()

    def __str__(self) -> str:
        settings = [*filter(None, [self.scope]), *(["masked"] if self.is_masked else []), *self.gate]
        return self.name + (f" ({', '.join(settings)})" if settings else "")

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> PruningMethod:
        """Return the method of a row of ``results.csv``. The settings mean nothing to the control, which has none."""
        if row["method"] == CONTROL:
            return cls(CONTROL)
        scope = "" if row["scope"] == "module" else str(row["scope"])
        return cls(row["method"], scope, row["masked"].lower() == "true", tuple(row["gate"].split()))

    @property
    def is_token_gate(self) -> bool:
        return self.name in GATE_METHODS


Cell = tuple[PruningMethod, float]
"""A method at a keep ratio; the control has one cell, at 1."""
CONTROL_CELL: Cell = (PruningMethod(CONTROL), 1.0)


@dataclass(frozen=True)
class PruningRun(Run):
    """A finished cell.

    Its metrics are ``effective_r``, ``active_r`` and ``metric_MOMENT`` (NaN where there is none: ``static`` is of token
    gates only). Its items are the evaluation rows: of a classifier the ``label``, and by moment whether the answer was
    right; of a language model the labelled ``tokens``, and by moment the loss summed over them.
    """

    is_idle: bool
    """Nothing had been learned when it was pruned: accuracy at chance; of a language model, as the run itself noted."""


@dataclass(frozen=True)
class PruningStudy:
    """The cells of a sweep that share their settings.

    Attributes:
        settings: name → text, as the table has it.
        cells: (method, keep ratio) → its runs, methods in the order of the table, keep ratios ascending.
    """

    settings: dict[str, str]
    cells: dict[Cell, Group[PruningRun]]

    @property
    def metric(self) -> str:
        return self.settings["metric"]

    @property
    def is_loss(self) -> bool:
        """True of language models, whose metric is a loss: lower is better."""
        return self.metric == ANSWER_LOSS

    @property
    def title(self) -> str:
        return f"{self.settings['model']} on {self.settings['dataset']}, LoRA r {self.settings['lora_r']}"

    @property
    def runs(self) -> list[PruningRun]:
        return [run for group in self.cells.values() for run in group.runs.values()]

    @property
    def has_gates(self) -> bool:
        """True if any cell chose its channels by token."""
        return any(method.is_token_gate for method, _ in self.pruned())

    def pick(self, method: PruningMethod, keep_ratio: float) -> Group[PruningRun]:
        """Return the runs of one method at one keep ratio, maybe none; of the control at any ratio."""
        cell = CONTROL_CELL if method == CONTROL_CELL[0] else (method, keep_ratio)
        return self.cells.get(cell, Group(str(method), {}))

    def pruned(self) -> list[Cell]:
        """Return every cell except the control."""
        return [cell for cell in self.cells if cell != CONTROL_CELL]


# --- reading ------------------------------------------------------------------------------------------------------


def read_sweep(path: Path) -> list[PruningStudy]:
    """Read the studies in the ``results.csv`` at ``path``, with the predictions in the run folders next to it.

    Raises:
        InputError: no such table, a missing column, a cell of the table that is not a number where one is needed, two
            runs that differ in nothing recorded, or predictions that are not of one evaluation set.
    """
    table = _read_table(path)
    table["cell_method"] = [PruningMethod.of_row(row) for row in table.to_dict("records")]
    settings = [*SETTINGS, *_add_other_settings(table, path.parent)]
    studies = []
    for _, part in table.groupby(settings, sort=False, dropna=False):
        rows = _one_control(part).to_dict("records")
        runs = [(_cell_of(row), _read_run(row, path.parent)) for row in rows]
        _check_items([run for _, run in runs])
        texts = {name: str(rows[0][name]) for name in settings}
        studies.append(PruningStudy(texts, _grouped(runs, path)))
    return studies


def _read_table(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise InputError(f"no table at {path}; give the results.csv of a sweep, or its folder")
    table = read_texts(path)
    missing = [name for name in dict.fromkeys((*SETTINGS, *_CELL, *_NUMBERS)) if name not in table.columns]
    if missing:
        raise InputError(
            f"{path.name} lacks the columns {', '.join(missing)}; give a results.csv that prune_finetune_lora.py wrote"
        )
    if table.empty:
        raise InputError(f"{path.name} holds no run; run a sweep with prune_finetune_lora.py first")
    if (table["metric"] == ANSWER_LOSS).nunique() > 1:
        raise InputError(
            f"{path.name} holds cells of language models (metric {ANSWER_LOSS}) and of classifiers, which have no "
            "metric in common; give each a folder of its own"
        )
    for name in _NUMBERS:
        values = pd.to_numeric(table[name], errors="coerce")
        bad = table.loc[~np.isfinite(values), name]
        if len(bad):
            raise InputError(
                f"{path.name}, row {bad.index[0] + 2}: column {name} must be a number, got {bad.iloc[0]!r}"
            )
        table[name] = values
    return _with_gate_columns(table)


def _with_gate_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return ``table`` with the columns of token gates, which one written before there were any does not have."""
    table = table.assign(**{name: "" for name in ("gate", "active_r", "metric_static") if name not in table.columns})
    table["active_r"] = pd.to_numeric(table["active_r"], errors="coerce").fillna(table["effective_r"])
    table["metric_static"] = pd.to_numeric(table["metric_static"], errors="coerce")
    return table


def _add_other_settings(table: pd.DataFrame, folder: Path) -> list[str]:
    """Add a column for each argument of the runs that differs between cells and is no column of the table yet.

    The cells of a sweep over, say, the dropout differ only in their ``run_args.json``.
    """
    arguments = []
    for run in table["run_dir"]:
        path = folder / run / "run_args.json"
        if not path.exists():
            return []
        arguments.append(read_json_object(path, f"{run}/run_args.json", allow_nan=True))
    names = {name for cell in arguments for name in cell if not name.startswith(_GATE_SETTING)}
    added = []
    for name in sorted(names - _NO_SETTING):
        texts = [json.dumps(cell.get(name), sort_keys=True) for cell in arguments]
        if len(set(texts)) > 1:
            table[f"arg_{name}"] = texts
            added.append(f"arg_{name}")
    return added


def _one_control(rows: pd.DataFrame) -> pd.DataFrame:
    """Return ``rows`` with one control per seed: nothing is pruned in it, so its scope and masking do not count."""
    is_control = rows["method"] == CONTROL
    return pd.concat([rows[is_control].drop_duplicates("seed"), rows[~is_control]])


def _cell_of(row: dict[Any, Any]) -> Cell:
    return CONTROL_CELL if row["method"] == CONTROL else (row["cell_method"], float(row["keep_ratio"]))


def _read_run(row: dict[Any, Any], folder: Path) -> PruningRun:
    config = {name: row[name] for name in (*SETTINGS, "method", "keep_ratio", "scope", "masked", "gate")}
    metrics = {name: float(row[name]) for name in _METRICS}
    is_loss = row["metric"] == ANSWER_LOSS
    items = _read_items(folder, row["run_dir"], is_loss)
    if is_loss:
        is_idle = NOTHING_LEARNED in ((row["run_dir"] and read_record(folder / row["run_dir"])) or {})
    else:
        moment = trained_moment(config)
        is_idle = items is not None and is_at_chance(items[moment], items["label"])
    return PruningRun(Path(row["run_dir"]), config, int(row["seed"]), metrics, items, is_idle)


def trained_moment(settings: Mapping[str, Any]) -> str:
    """Return the moment at which a cell must have learned something: before pruning, unless it had no warm-up."""
    return "before" if float(settings["warmup_epochs"]) > 0 else "after"


def _read_items(folder: Path, run: str, is_loss: bool) -> pd.DataFrame | None:
    """Return the items of a `PruningRun`; None without predictions."""
    path = folder / run / "predictions.csv"
    if not run or not path.exists():
        return None
    try:
        if is_loss:
            frame = read_table(path, numbers=("tokens", *MOMENTS), texts=("row",)).set_index("row")
        else:
            frame = read_table(path, texts=("row", "label", *MOMENTS)).set_index("row")
    except InputError as error:
        raise InputError(f"{run}/predictions.csv cannot be read ({error})") from None
    moments = [*MOMENTS, *frame.columns.intersection([STATIC])]
    if is_loss:
        return frame[["tokens", *moments]]
    return frame[["label"]].assign(**{moment: frame[moment] == frame["label"] for moment in moments})


def _check_items(runs: Sequence[PruningRun]) -> None:
    """Raise where runs were evaluated on other rows: a row has one label, or one number of labelled tokens."""
    labels = pd.Series(dtype=object)
    for run in runs:
        if run.items is None:
            continue
        if run.items.index.has_duplicates:
            raise InputError(f"{run.path}/predictions.csv names a row twice")
        name = "label" if "label" in run.items else "tokens"
        shared = run.items.index.intersection(labels.index)
        if (run.items.loc[shared, name] != labels[shared]).any():
            raise InputError(
                f"{run.path}/predictions.csv has other {name.rstrip('s')}s than its siblings: not the same evaluation "
                "data"
            )
        labels = run.items[name].combine_first(labels)


def _grouped(runs: Sequence[tuple[Cell, PruningRun]], path: Path) -> dict[Cell, Group[PruningRun]]:
    """Group by cell: methods in the order of their first run, keep ratios ascending."""
    methods = list(dict.fromkeys(method for (method, _), _ in runs))
    by_cell: dict[Cell, dict[int, PruningRun]] = {
        cell: {} for cell in sorted({cell for cell, _ in runs}, key=lambda cell: (methods.index(cell[0]), cell[1]))
    }
    for (method, keep), run in runs:
        seeds = by_cell[method, keep]
        if run.seed in seeds:
            raise InputError(
                f"{path.name} holds two runs of {method} at keep_ratio {run.config['keep_ratio']:g} and seed "
                f"{run.seed:g} whose settings differ in nothing it records; keep one of them"
            )
        seeds[run.seed] = run
    return {cell: Group(str(cell[0]), dict(sorted(seeds.items()))) for cell, seeds in by_cell.items()}
