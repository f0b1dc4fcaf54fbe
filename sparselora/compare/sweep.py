"""Read a pruning sweep's ``results.csv`` and compare its cells, paired by seed and by sentence.

A *study* is the part of a sweep with one set of settings: only its cells are compared with one another. The control is
``no_prune``, the same run with the same further training; the baseline is ``random`` at the same keep ratio. Gates by
token, which prune nothing, have baselines of their own (`references`), and so has the fixed subset of channels that a
gate used most (`static_references`).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.errors import InputError
from sparselora.numerics.channels import GATE_METHODS
from sparselora.numerics.stats import (
    Bootstrap,
    compare_paired,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    smallest_detectable_difference,
)
from sparselora.runs.folder import read_table, read_texts
from sparselora.runs.user_files import read_json_object

CONTROL = "no_prune"
MOMENTS = ("before", "right_after", "after")
STATIC = "static"
"""The moment that gates alone have: at the end, with the channels that were active most often for every token."""
REFERENCE_MOMENT = {"right_after": "right_after", "after": "after", STATIC: "after"}
"""Moment at which a method is tested → the moment of the reference."""
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

_STATIC_BASELINES = ("channel_energy", "svd")
"""Channels or singular directions chosen once, for all tokens."""
_GATE_BASELINES = (*_STATIC_BASELINES, "random_gate", "energy_gate")
"""What gates at a budget are held against: those chosen for all tokens, any for each, those of largest energy."""
_CELL = ("method", "keep_ratio", "scope", "masked", "seed", "effective_r", "run_dir")
_NUMBERS = ("keep_ratio", "seed", "effective_r", *(f"metric_{moment}" for moment in MOMENTS))
_NO_SETTING = frozenset(
    {"method", "keep_ratio", "scope", "mask", "seed", "run_id", "run_dir", "device", "eval_bsz", *SETTINGS}
)
_GATE_SETTING = "gate_"
"""How the arguments begin that make another gate, and no other study."""
_TESTS = ("t_p", "wilcoxon_p", "bootstrap_p")
_MCNEMAR = [
    *("method", "keep_ratio", "moment", "reference", "seed"),
    *("n_sentences", "only_method_right", "only_reference_right", "p"),
]


@dataclass(frozen=True)
class Study:
    """The cells of a sweep that share their settings.

    Attributes:
        settings: name → text, as the table has it.
        cells: a row a cell: ``label`` (the method, with its scope, masking and gate where they are not the default),
            ``keep_ratio``, ``seed``, ``effective_r``, ``active_r``, ``metric_*``, ``run_dir``. NaN where the table has
            no number: ``metric_static`` is of gates only.
        predictions: ``run_dir`` → frame indexed by ``row`` with label, before, right_after, after, and static if the
            cell has gates; without the cells that have none.
    """

    settings: dict[str, str]
    cells: pd.DataFrame
    predictions: dict[str, pd.DataFrame] = field(repr=False)

    @property
    def metric(self) -> str:
        return self.settings["metric"]

    def pick(self, label: str, keep_ratio: float) -> pd.DataFrame:
        """The cells of one method at one keep ratio, by seed, ascending; the control at any ratio. May be empty."""
        return self._by_seed.get((label, 0.0 if label == CONTROL else keep_ratio), self.cells[:0].set_index("seed"))

    @cached_property
    def _by_seed(self) -> dict[tuple[str, float], pd.DataFrame]:
        # The control removes nothing: whatever ratio stands beside it, it is the control for all of them.
        keep = self.cells["keep_ratio"].where(self.cells["label"] != CONTROL, 0.0)
        groups = self.cells.groupby([self.cells["label"], keep])
        return {(str(name), float(ratio)): cells.set_index("seed").sort_index() for (name, ratio), cells in groups}

    def pruned(self) -> list[tuple[str, float]]:
        """Every (label, keep ratio) but the control, in the order of the sweep's table, keep ratios ascending."""
        cells = self.cells[self.cells["label"] != CONTROL]
        return [
            (str(label), float(keep))
            for label in cells["label"].unique()
            for keep in np.sort(cells.loc[cells["label"] == label, "keep_ratio"].unique())
        ]


# --- reading ------------------------------------------------------------------------------------------------------


def read_sweep(path: Path) -> list[Study]:
    """The studies in the ``results.csv`` at ``path``, with the predictions that lie beside it.

    Raises:
        InputError: no such table, a missing column, a number that is none, two cells that cannot be told apart, or
            predictions that are not of one evaluation set.
    """
    table = _read_table(path)
    table["label"] = [_label(row) for row in table.to_dict("records")]
    settings = [*SETTINGS, *_add_other_settings(table, path.parent)]
    studies = []
    for _, cells in table.groupby(settings, sort=False, dropna=False):
        cells = _one_control(cells)
        _check_unique(cells, path)
        predictions = {
            run: frame for run in cells["run_dir"] if (frame := _read_predictions(path.parent, run)) is not None
        }
        _check_labels(predictions)
        first, kept = cells.iloc[0], ["label", "run_dir", *_NUMBERS, "active_r", "metric_static"]
        cells = cells[kept].astype({"label": object, "run_dir": object}).reset_index(drop=True)
        studies.append(Study({name: str(first[name]) for name in settings}, cells, predictions))
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
    """``table`` with the columns of gates, which one that was written before there were any does not have."""
    table = table.assign(**{name: "" for name in ("gate", "active_r", "metric_static") if name not in table.columns})
    table["active_r"] = pd.to_numeric(table["active_r"], errors="coerce").fillna(table["effective_r"])
    table["metric_static"] = pd.to_numeric(table["metric_static"], errors="coerce")
    return table


def _label(row: dict[str, Any]) -> str:
    """The method; scope, masking and what is set of a gate, which make it another one, in brackets. They mean nothing
    to the control."""
    if row["method"] == CONTROL:
        return CONTROL
    variant = [row["scope"]] * (row["scope"] not in {"", "module"}) + ["masked"] * (row["masked"].lower() == "true")
    variant += row["gate"].split()
    return row["method"] + (f" ({', '.join(variant)})" if variant else "")


def _add_other_settings(table: pd.DataFrame, folder: Path) -> list[str]:
    """Add a column for each argument of the runs that differs between cells and is no column of the table yet.

    A sweep over, say, the dropout is told apart by the ``run_args.json`` of its cells only.
    """
    arguments = []
    for run in table["run_dir"]:
        path = folder / run / "run_args.json"
        if not path.exists():
            return []
        arguments.append(read_json_object(path, f"{run}/run_args.json", allow_nan=True))
    known = {name for each in arguments for name in each if not name.startswith(_GATE_SETTING)}
    names = sorted(known - _NO_SETTING)
    added = []
    for name in names:
        texts = [json.dumps(each.get(name), sort_keys=True) for each in arguments]
        if len(set(texts)) > 1:
            table[f"arg_{name}"] = texts
            added.append(f"arg_{name}")
    return added


def _one_control(cells: pd.DataFrame) -> pd.DataFrame:
    """``cells`` with one control a seed: nothing is pruned in it, so its scope and masking do not make it another."""
    control = cells["label"] == CONTROL
    return pd.concat([cells[control].drop_duplicates("seed"), cells[~control]])


def _check_unique(cells: pd.DataFrame, path: Path) -> None:
    twice = cells[cells.duplicated(["label", "keep_ratio", "seed"])]
    if len(twice):
        row = twice.iloc[0]
        raise InputError(
            f"{path.name} holds two runs of {row['label']} at keep_ratio {row['keep_ratio']:g} and seed "
            f"{row['seed']:g} whose settings differ in nothing it records; keep one of them"
        )


def _read_predictions(folder: Path, run: str) -> pd.DataFrame | None:
    path = folder / run / "predictions.csv"
    if not run or not path.exists():
        return None
    try:
        frame = read_table(path, texts=("row", "label", *MOMENTS)).set_index("row")
    except InputError as error:
        raise InputError(f"{run}/predictions.csv cannot be read ({error})") from None
    return frame[["label", *MOMENTS, *frame.columns.intersection([STATIC])]]


def _check_labels(predictions: dict[str, pd.DataFrame]) -> None:
    known = pd.Series(dtype=object)
    for run, frame in predictions.items():
        if frame.index.has_duplicates:
            raise InputError(f"{run}/predictions.csv names a row twice")
        shared = frame.index.intersection(known.index)
        if (frame.loc[shared, "label"] != known[shared]).any():
            raise InputError(f"{run}/predictions.csv has other labels than its siblings: not the same evaluation data")
        known = frame["label"].combine_first(known)


# --- description --------------------------------------------------------------------------------------------------


def describe(study: Study) -> pd.DataFrame:
    """Mean and interval of the metric for each (method, keep ratio) at the three moments, over seeds.

    A method with gates has a fourth, ``static``: at the end, with the channels that were active most for every token.
    """
    rows = []
    for label, keep in [(CONTROL, 1.0), *study.pruned()]:
        cells = study.pick(label, keep)
        static = (STATIC,) * bool(cells["metric_static"].notna().any())
        for moment in (*MOMENTS, *static) if len(cells) else ():
            interval = mean_interval(cells[f"metric_{moment}"].dropna())
            rows.append(
                {
                    "method": label,
                    "keep_ratio": keep,
                    "effective_r": cells["effective_r"].mean(),
                    "active_r": cells["active_r"].mean(),
                    "moment": moment,
                    "metric": study.metric,
                    "n_seeds": interval.n,
                    "mean": interval.mean,
                    "std": interval.std,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                }
            )
    return pd.DataFrame(rows)


# --- comparison ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One method against a reference at one moment, paired by seed; the metric's own unit, positive where it is better.

    At ``static`` it is the fixed subset of a gate's channels against the reference, maybe that gate itself, ``after``.
    ``smallest_detectable`` is the mean difference that this many seeds with this spread find with power 0.8. The
    sentence columns are of accuracy, the seeds' answers to a sentence drawn together; NaN without predictions.
    """

    method: str
    keep_ratio: float
    moment: str
    reference: str
    n_seeds: int
    difference: float
    ci_low: float
    ci_high: float
    t_p: float
    wilcoxon_p: float
    cohens_dz: float
    rank_biserial: float
    smallest_detectable: float
    n_sentences: int
    sentence_difference: float
    sentence_ci_low: float
    sentence_ci_high: float
    bootstrap_p: float


def compare(study: Study, seed: np.random.SeedSequence) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every pruned method against its `references`, right after pruning and after more training.

    And the fixed subset of every gate against its `static_references`.

    Returns:
        A table of `Difference` rows with a Holm-adjusted column ``<test>_holm`` for each of the t, Wilcoxon and
        bootstrap tests (the family: all rows of the study), and one of exact McNemar tests, a row a seed
        (the family: all its rows). Either may be empty.
    """
    questions = _questions(study)
    differences, exact = [], []
    for (label, keep, moment, reference), child in zip(questions, seed.spawn(len(questions))):
        ours, theirs = _paired_cells(study, label, keep, moment, reference)
        answers = [(s, _answers(study, ours.loc[s, "run_dir"], theirs.loc[s, "run_dir"], moment)) for s in ours.index]
        seen = [(s, frame) for s, frame in answers if frame is not None]
        differences.append(
            _difference(label, keep, moment, reference, ours, theirs, [frame for _, frame in seen], child)
        )
        for s, frame in seen:
            only_method, only_reference, p = mcnemar(frame["ours"], frame["theirs"])
            exact.append((label, keep, moment, reference, int(s), len(frame), only_method, only_reference, p))
    table = pd.DataFrame([asdict(each) for each in differences])
    for name in _TESTS if len(table) else ():
        table[f"{name}_holm"] = holm(table[name].tolist())
    per_seed = pd.DataFrame(exact, columns=_MCNEMAR)
    per_seed["p_holm"] = holm(per_seed["p"].tolist())
    return table, per_seed


def _questions(study: Study) -> list[tuple[str, float, str, str]]:
    """Method, keep ratio, moment and reference of every test; fixed subsets last, so that no other's draws change."""
    asked = [
        (label, keep, moment, reference)
        for label, keep in study.pruned()
        for reference in references(label)
        for moment in MOMENTS[1:]
        if reference != label
    ]
    asked += [
        (label, keep, STATIC, reference)
        for label, keep in study.pruned()
        for reference in static_references(label)
        if keep < 1  # of all channels the subset is the gate itself
    ]
    return [question for question in asked if len(_paired_cells(study, *question)[0])]


def has_gates(study: Study) -> bool:
    """Whether any cell of the study chose its channels by token."""
    return any(label.split(" ")[0] in GATE_METHODS for label, _ in study.pruned())


def references(label: str) -> tuple[str, ...]:
    """What the method of a label is compared with, at its keep ratio.

    The control, and ``random`` of the same scope and masking. Of a gate: the control, ``channel_energy``, ``svd``,
    ``random_gate`` and, if it learns, ``energy_gate``, all as they are by default; of a variant its default too, and
    ``energy_gate`` of the same variant.
    """
    method = label.split(" ")[0]
    if method not in GATE_METHODS:
        return CONTROL, label.replace(method, "random", 1)
    baselines = _GATE_BASELINES if GATE_METHODS[method] == "learned" else _GATE_BASELINES[:-1]
    own = (label.replace(method, "energy_gate", 1),) if label != method else ()
    return tuple(dict.fromkeys((CONTROL, *baselines, method, *own)))


def static_references(label: str) -> tuple[str, ...]:
    """What the fixed subset of a gate is compared with: the gate itself, ``channel_energy``, ``svd``; else nothing."""
    return (label, *_STATIC_BASELINES) if label.split(" ")[0] in GATE_METHODS else ()


def _paired_cells(
    study: Study, label: str, keep: float, moment: str, reference: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of a method, where it has that moment, and of its reference at the seeds that both have."""
    ours, theirs = study.pick(label, keep), study.pick(reference, keep)
    seeds = ours.index[ours[f"metric_{moment}"].notna()].intersection(theirs.index)
    return ours.loc[seeds], theirs.loc[seeds]


def _answers(study: Study, ours: str, theirs: str, moment: str) -> pd.DataFrame | None:
    """Which sentences each of two runs got right: boolean columns ours, theirs, on the rows that both answered.

    None if one of them has no predictions, or none at its moment.
    """
    right = {}
    for name, run, at in (("ours", ours, moment), ("theirs", theirs, REFERENCE_MOMENT[moment])):
        frame = study.predictions.get(run)
        if frame is None or at not in frame:
            return None
        right[name] = frame[at] == frame["label"]
    return pd.concat(right, axis=1, join="inner")


def _difference(
    label: str,
    keep: float,
    moment: str,
    reference: str,
    ours: pd.DataFrame,
    theirs: pd.DataFrame,
    answers: list[pd.DataFrame],
    seed: np.random.SeedSequence,
) -> Difference:
    a, b = ours[f"metric_{moment}"].to_numpy(), theirs[f"metric_{REFERENCE_MOMENT[moment]}"].to_numpy()
    seeds, sentences = compare_paired(a, b), _bootstrap(answers, seed)
    return Difference(
        method=label,
        keep_ratio=keep,
        moment=moment,
        reference=reference,
        n_seeds=seeds.n,
        difference=seeds.mean_difference,
        ci_low=seeds.ci_low,
        ci_high=seeds.ci_high,
        t_p=seeds.t_p,
        wilcoxon_p=seeds.wilcoxon_p,
        cohens_dz=seeds.cohens_dz,
        rank_biserial=seeds.rank_biserial,
        smallest_detectable=_detectable(a - b),
        n_sentences=sentences.n,
        sentence_difference=sentences.mean,
        sentence_ci_low=sentences.low,
        sentence_ci_high=sentences.high,
        bootstrap_p=sentences.p,
    )


def _detectable(d: NDArray[np.float64]) -> float:
    """What the seeds of these differences could find; NaN where they show no spread to judge by."""
    return smallest_detectable_difference(float(d.std(ddof=1)), len(d)) if np.ptp(d) > 1e-12 else math.nan


def _bootstrap(answers: list[pd.DataFrame], seed: np.random.SeedSequence) -> Bootstrap:
    """Bootstrap over sentences, a sentence's differences over the seeds summed; NaN without any sentence."""
    if not sum(map(len, answers)):
        return Bootstrap(0, math.nan, math.nan, math.nan, math.nan)
    d = pd.concat([frame["ours"].astype(float) - frame["theirs"].astype(float) for frame in answers])
    by_sentence = d.groupby(level=0)
    return paired_bootstrap(by_sentence.sum(), by_sentence.size(), np.random.default_rng(seed))


# --- positive control ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PositiveControl:
    """Whether the study sees the effect that must be there: the control against the most severe pruning, right after.

    Attributes:
        against: what is held to be severe: random pruning at the lowest keep ratio, or the mean of all methods there.
        difference, low, high: the control minus it, with the 95 % interval that decides (``by`` seeds, or ``by``
            sentences where there is one seed, or seeds without any spread); NaN where neither exists.
        detectable: the smallest difference that this many seeds would find with power 0.8; NaN without a spread.
    """

    against: str
    keep_ratio: float
    n_seeds: int
    difference: float
    low: float
    high: float
    by: str
    detectable: float

    @property
    def separated(self) -> bool:
        return self.low > 0


def positive_control(study: Study, seed: np.random.SeedSequence) -> PositiveControl | None:
    """The study's `PositiveControl`; None without a control, or without a pruned cell at one of its seeds."""
    pruned = [(label, keep) for label, keep in study.pruned() if keep < 1 and label.split(" ")[0] not in GATE_METHODS]
    if not pruned:
        return None
    lowest = min(keep for _, keep in pruned)
    severe = [label for label, keep in pruned if keep == lowest]
    random = [label for label in severe if label.split(" ")[0] == "random"][:1]
    chosen = random or severe
    control = study.pick(CONTROL, 1.0)
    runs = [study.pick(label, lowest) for label in chosen]
    values = pd.concat([cells["metric_right_after"] for cells in runs], axis=1).mean(axis=1)
    seeds = control.index.intersection(values.index)
    if seeds.empty:
        return None
    ours, theirs = control.loc[seeds, "metric_right_after"].to_numpy(), values[seeds].to_numpy()
    gap, by = compare_paired(ours, theirs), "seeds"
    low, high = gap.ci_low, gap.ci_high
    if math.isnan(low):
        pairs = [
            (control.loc[s, "run_dir"], cells.loc[s, "run_dir"]) for cells in runs for s in seeds if s in cells.index
        ]
        answers = [_answers(study, *pair, "right_after") for pair in pairs]
        sentences = _bootstrap([frame for frame in answers if frame is not None], seed)
        low, high, by = sentences.low, sentences.high, "sentences"
    against = chosen[0] if len(chosen) == 1 else f"the mean of {', '.join(chosen)}"
    return PositiveControl(against, lowest, gap.n, gap.mean_difference, low, high, by, _detectable(ours - theirs))
