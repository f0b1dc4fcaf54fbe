"""Cells of a pruning sweep: read from `results.csv`, compared by seed and by sentence, and the report on them.

A *study* is the part of a sweep with one set of settings: only its cells are compared with one another. The control is
``no_prune``, the same run with the same further training; the baseline is ``random`` at the same keep ratio. Token
gates, which prune nothing, have baselines of their own (`references`), and so has the fixed subset of channels that a
token gate used most (`static_references`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.compare.pairing import (
    Endpoint,
    Pair,
    add_holm,
    bootstrap_items,
    compare_pairs,
    compare_values,
    detectable,
    pair_by_seed,
)
from sparselora.compare.runs import ComparisonReport, Group, Run, files_of
from sparselora.errors import InputError
from sparselora.numerics.channels import GATE_METHODS
from sparselora.numerics.stats import holm, mcnemar, mean_interval
from sparselora.report.markdown import LEGEND, markdown_table, mean_and_spread, number, p_value, with_interval
from sparselora.runs.folder import read_table, read_texts
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
DRAWS = 10_000
"""Bootstrap draws: answers are right or wrong, so a draw costs next to nothing."""

_REFERENCE_MOMENT = {"right_after": "right_after", "after": "after", STATIC: "after"}
"""Moment at which a method is tested → the moment of the reference."""
_ENDPOINTS = {
    moment: Endpoint(f"metric_{moment}", moment, reference_metric=f"metric_{reference}", reference_item=reference)
    for moment, reference in _REFERENCE_MOMENT.items()
}
_STATIC_BASELINES = ("channel_energy", "svd")
"""Channels or singular directions chosen once, for all tokens."""
_GATE_BASELINES = (*_STATIC_BASELINES, "random_gate", "energy_gate")
"""Baselines of token gates at a budget: channels chosen for all tokens, any for each, those of largest energy."""
_CELL = ("method", "keep_ratio", "scope", "masked", "seed", "effective_r", "run_dir")
_NUMBERS = ("keep_ratio", "seed", "effective_r", *(f"metric_{moment}" for moment in MOMENTS))
_METRICS = ("effective_r", "active_r", *(f"metric_{moment}" for moment in (*MOMENTS, STATIC)))
_NO_SETTING = frozenset(
    {"method", "keep_ratio", "scope", "mask", "seed", "run_id", "run_dir", "device", "eval_bsz", *SETTINGS}
)
_GATE_SETTING = "gate_"
"""Prefix of the arguments that make another token gate, and no other study."""
_TESTS = ("t_p", "wilcoxon_p", "bootstrap_p")
_MCNEMAR = [
    *("method", "keep_ratio", "moment", "reference", "seed"),
    *("n_sentences", "only_method_right", "only_reference_right", "p"),
]


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
class PruningStudy:
    """The cells of a sweep that share their settings.

    Attributes:
        settings: name → text, as the table has it.
        cells: (method, keep ratio) → its runs, methods in the order of the table, keep ratios ascending. A run's
            metrics are ``effective_r``, ``active_r`` and ``metric_MOMENT`` (NaN where there is none: ``static`` is of
            token gates only); its items say for each sentence and moment whether the answer was right.
    """

    settings: dict[str, str]
    cells: dict[Cell, Group[Run]]

    @property
    def metric(self) -> str:
        return self.settings["metric"]

    @property
    def title(self) -> str:
        return f"{self.settings['model']} on {self.settings['dataset']}, LoRA r {self.settings['lora_r']}"

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.cells.values() for run in group.runs.values()]

    @property
    def has_gates(self) -> bool:
        """True if any cell chose its channels by token."""
        return any(method.is_token_gate for method, _ in self.pruned())

    def pick(self, method: PruningMethod, keep_ratio: float) -> Group[Run]:
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
        _check_labels([run for _, run in runs])
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


def _read_run(row: dict[Any, Any], folder: Path) -> Run:
    config = {name: row[name] for name in (*SETTINGS, "method", "keep_ratio", "scope", "masked", "gate")}
    metrics = {name: float(row[name]) for name in _METRICS}
    return Run(Path(row["run_dir"]), config, int(row["seed"]), metrics, _read_answers(folder, row["run_dir"]))


def _read_answers(folder: Path, run: str) -> pd.DataFrame | None:
    """Return each sentence's label and, by moment, whether the answer was right; None without predictions."""
    path = folder / run / "predictions.csv"
    if not run or not path.exists():
        return None
    try:
        frame = read_table(path, texts=("row", "label", *MOMENTS)).set_index("row")
    except InputError as error:
        raise InputError(f"{run}/predictions.csv cannot be read ({error})") from None
    moments = [*MOMENTS, *frame.columns.intersection([STATIC])]
    return frame[["label"]].assign(**{moment: frame[moment] == frame["label"] for moment in moments})


def _check_labels(runs: Sequence[Run]) -> None:
    labels = pd.Series(dtype=object)
    for run in runs:
        if run.items is None:
            continue
        if run.items.index.has_duplicates:
            raise InputError(f"{run.path}/predictions.csv names a row twice")
        shared = run.items.index.intersection(labels.index)
        if (run.items.loc[shared, "label"] != labels[shared]).any():
            raise InputError(
                f"{run.path}/predictions.csv has other labels than its siblings: not the same evaluation data"
            )
        labels = run.items["label"].combine_first(labels)


def _grouped(runs: Sequence[tuple[Cell, Run]], path: Path) -> dict[Cell, Group[Run]]:
    """Group by cell: methods in the order of their first run, keep ratios ascending."""
    methods = list(dict.fromkeys(method for (method, _), _ in runs))
    by_cell: dict[Cell, dict[int, Run]] = {
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


# --- description --------------------------------------------------------------------------------------------------


def describe(study: PruningStudy) -> pd.DataFrame:
    """Return mean and interval of the metric for each (method, keep ratio) at the three moments, over seeds.

    A method with token gates has a fourth, ``static``: at the end, with the channels that were active most for every
    token.
    """
    rows = []
    for method, keep in [CONTROL_CELL, *study.pruned()]:
        group = study.pick(method, keep)
        if not group.runs:
            continue
        values = {moment: _without_nan(group.values(f"metric_{moment}")) for moment in (*MOMENTS, STATIC)}
        for moment in MOMENTS if not values[STATIC] else values:
            interval = mean_interval(values[moment])
            rows.append(
                {
                    "method": str(method),
                    "keep_ratio": keep,
                    "effective_r": float(np.mean(group.values("effective_r"))),
                    "active_r": float(np.mean(group.values("active_r"))),
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


def _without_nan(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


# --- comparison ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A cell and moment, and the method that it is tested against."""

    method: PruningMethod
    keep_ratio: float
    moment: str
    reference: PruningMethod

    @property
    def columns(self) -> dict[str, Any]:
        """Its columns in a table."""
        return {name: str(value) if isinstance(value, PruningMethod) else value for name, value in vars(self).items()}

    def pairs(self, study: PruningStudy) -> list[Pair]:
        """Return the runs of the cell, where they have that moment, and of its reference at the seeds of both."""
        group = study.pick(self.method, self.keep_ratio)
        pairs = pair_by_seed(group, study.pick(self.reference, self.keep_ratio))
        return [pair for pair in pairs if not math.isnan(pair[0].metrics[f"metric_{self.moment}"])]


def compare(study: PruningStudy, seed: np.random.SeedSequence) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare every pruned method with its `references`, right after pruning and after more training.

    And the fixed subset of every token gate with its `static_references`, which chose once and trained on: of these it
    is the moment ``after``.

    Returns:
        A table with a row per question. ``difference`` is method minus reference over seeds, in the metric's own unit,
        positive where the method is better, with interval, tests and sizes; ``smallest_detectable`` what this many
        seeds with this spread find with power 0.8. The sentence columns are of accuracy, the seeds' answers to a
        sentence drawn together; NaN without predictions. ``<test>_holm`` is adjusted over all rows of the study for
        each of the t, Wilcoxon and bootstrap tests. And a table of exact McNemar tests, a row per question and seed,
        adjusted over all its rows. Either may be empty.
    """
    questions = _questions(study)
    differences, exact = [], []
    for question, child in zip(questions, seed.spawn(len(questions))):
        endpoint, pairs = _ENDPOINTS[question.moment], question.pairs(study)
        difference = compare_pairs(pairs, endpoint, np.random.default_rng(child), DRAWS)
        seeds, sentences = asdict(difference.seeds), difference.items
        differences.append({
            **question.columns,
            "n_seeds": seeds.pop("n"),
            "difference": seeds.pop("mean_difference"),
            **seeds,
            "smallest_detectable": difference.detectable,
            "n_sentences": sentences.n,
            "sentence_difference": sentences.mean,
            "sentence_ci_low": sentences.low,
            "sentence_ci_high": sentences.high,
            "bootstrap_p": sentences.p,
        })  # fmt: skip
        for pair in pairs:
            answers = endpoint.items(pair)
            if answers is not None:
                exact.append((*question.columns.values(), pair[0].seed, len(answers[0]), *mcnemar(*answers)))
    table = pd.DataFrame(differences)
    add_holm(table, _TESTS)
    per_seed = pd.DataFrame(exact, columns=_MCNEMAR)
    per_seed["p_holm"] = holm(per_seed["p"].tolist())
    return table, per_seed


def _questions(study: PruningStudy) -> list[Question]:
    """List the tests of a study; fixed subsets last, so that the other tests draw the same numbers without them."""
    questions = [
        Question(method, keep, moment, reference)
        for method, keep in study.pruned()
        for reference in references(method)
        for moment in MOMENTS[1:]
        if reference != method
    ]
    questions += [
        Question(method, keep, STATIC, reference)
        for method, keep in study.pruned()
        for reference in static_references(method)
        if keep < 1  # of all channels the subset is the token gate itself
    ]
    return [question for question in questions if question.pairs(study)]


def references(method: PruningMethod) -> tuple[PruningMethod, ...]:
    """Return the methods that ``method`` is compared with, at its keep ratio.

    The control, and ``random`` of the same scope and masking. Of a token gate: the control, ``channel_energy``,
    ``svd``, ``random_gate`` and, if it learns, ``energy_gate``, all as they are by default; of a variant its default
    too, and ``energy_gate`` of the same variant.
    """
    control, default = CONTROL_CELL[0], PruningMethod(method.name)
    if not method.is_token_gate:
        return control, replace(method, name="random")
    baselines = _GATE_BASELINES if GATE_METHODS[method.name] == "learned" else _GATE_BASELINES[:-1]
    variant = (replace(method, name="energy_gate"),) if method != default else ()
    return tuple(dict.fromkeys((control, *map(PruningMethod, baselines), default, *variant)))


def static_references(method: PruningMethod) -> tuple[PruningMethod, ...]:
    """Return the references of a token gate's fixed subset: the gate itself, ``channel_energy``, ``svd``; else none."""
    return (method, *map(PruningMethod, _STATIC_BASELINES)) if method.is_token_gate else ()


# --- positive control ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PositiveControl:
    """The effect that must be there: the control against the most severe pruning, right after.

    Attributes:
        against: the most severe pruning: random at the lowest keep ratio, or the mean of all methods there.
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
    def is_separated(self) -> bool:
        return self.low > 0


def positive_control(study: PruningStudy, seed: np.random.SeedSequence) -> PositiveControl | None:
    """Return the study's `PositiveControl`; None without a control, or without a pruned cell at one of its seeds."""
    pruned = [(method, keep) for method, keep in study.pruned() if keep < 1 and not method.is_token_gate]
    if not pruned:
        return None
    lowest = min(keep for _, keep in pruned)
    severe = [method for method, keep in pruned if keep == lowest]
    methods = [method for method in severe if method.name == "random"][:1] or severe
    control, groups = study.pick(*CONTROL_CELL), [study.pick(method, lowest) for method in methods]
    seeds = [number for number in control.runs if any(number in group.runs for group in groups)]
    if not seeds:
        return None
    endpoint = _ENDPOINTS["right_after"]
    pairs = [(control.runs[s], group.runs[s]) for group in groups for s in seeds if s in group.runs]
    unpruned = [float(control.runs[s].metrics[endpoint.metric]) for s in seeds]
    pruned_by_seed = [[float(b.metrics[endpoint.metric]) for a, b in pairs if a.seed == s] for s in seeds]
    severest = [float(np.mean(values)) for values in pruned_by_seed]
    gap, by = compare_values(unpruned, severest), "seeds"
    low, high = gap.ci_low, gap.ci_high
    if math.isnan(low):
        sentences = bootstrap_items(pairs, endpoint, np.random.default_rng(seed), DRAWS)
        low, high, by = sentences.low, sentences.high, "sentences"
    against = str(methods[0]) if len(methods) == 1 else f"the mean of {', '.join(map(str, methods))}"
    return PositiveControl(
        against, lowest, gap.n, gap.mean_difference, low, high, by, detectable(unpruned, severest)
    )  # fmt: skip


# --- the report ---------------------------------------------------------------------------------------------------

_MOMENT = {"before": "before", "right_after": "right after", "after": "after"}
_STATIC_MOMENT = {STATIC: "best fixed subset"}

_HOW_TO_READ = """\
Runs are paired by seed within one study (equal settings): each difference is the method minus its reference at the
same seed, keep ratio and moment. `no_prune` is the control: the same warm-up and the same further training, nothing
removed. *Right after* is the accuracy between pruning and further training.

- **difference** [95 % interval] and **t p**, **Wilcoxon p**: over seeds (paired t, signed rank); **dz** is the mean
  difference over its standard deviation. **detectable**: the smallest mean difference that this many seeds with this
  spread find four times in five. With n seeds the signed-rank p is never below 2^(1−n).
- **on sentences** [95 % interval] and **bootstrap p**: accuracy on the same sentences, the answers of all seeds to a
  sentence drawn together (10,000 draws). It speaks about new sentences for these seeds, not about new seeds.
- **McNemar**: in how many seeds the exact test of the two runs' answers has an adjusted p below 0.05.
- Every p is adjusted by Holm over all rows of the study, for each test by itself (for McNemar: all rows and seeds).
  The raw ones are in `comparisons.csv` and `mcnemar.csv`."""

_HOW_TO_READ_TOKEN_GATES = """\
Gates (`token_gate`, `energy_gate`, `random_gate`) remove nothing: each token uses that share of the channels, *mean
rank* of them. They are compared with `no_prune`, with as many channels or singular directions chosen once
(`channel_energy`, `svd`), with channels drawn for each token (`random_gate`) and, if the gate learns, of largest energy
for each token (`energy_gate`); a variant (in brackets) also with its plain gate.

*Best fixed subset* is the gated model at the end without its gates, every token using the channels that were active
most often. It is compared with the gate itself (what is lost by choosing once what was trained to be chosen for each
token) and with `channel_energy` and `svd`, which chose once and trained on: these have no such moment, so theirs is
*after*."""


@dataclass(frozen=True)
class PruningComparison:
    """The studies of a sweep whose table is ``results``."""

    results: Path
    studies: Sequence[PruningStudy]
    baseline_label: None = None

    @classmethod
    def read(cls, path: Path) -> PruningComparison:
        results = path / "results.csv" if path.is_dir() else path
        return cls(results, read_sweep(results))

    @property
    def default_folder(self) -> Path:
        return self.results.parent / "compare"

    @property
    def outputs(self) -> list[str]:
        charts = [f"{name}.{end}" for name in self._figures for end in ("csv", "png")]
        return ["compare.md", "comparisons.csv", "mcnemar.csv", *charts]

    @property
    def _figures(self) -> list[str]:
        """A name per study, numbered if there are several."""
        name = "accuracy_against_keep_ratio"
        return [name] if len(self.studies) == 1 else [f"{name}_{i + 1}" for i in range(len(self.studies))]

    @property
    def inputs(self) -> list[Path]:
        return [self.results]

    @property
    def files(self) -> list[Path]:
        cells = sorted({str(run.path) for study in self.studies for run in study.runs} - {"."})
        folders = [self.results.parent / cell for cell in cells]
        return [self.results, *files_of(folders, "predictions.csv", "run_args.json")]

    def report(self, seed: int) -> ComparisonReport:
        from sparselora.report.pruning import accuracy_against_keep_ratio

        sections, differences, exact, figures = [], [], [], {}
        seeds = np.random.SeedSequence(seed).spawn(len(self.studies))
        for i, (study, child, figure) in enumerate(zip(self.studies, seeds, self._figures), start=1):
            for_control, for_tests = child.spawn(2)
            described, control = describe(study), positive_control(study, for_control)
            table, per_seed = compare(study, for_tests)
            differences.append(_with_settings(table, i, study))
            exact.append(_with_settings(per_seed, i, study))
            place = f"Study {i} of {len(self.studies)}: " if len(self.studies) > 1 else ""
            sections.append(_section(f"## {place}{study.title}", study, described, control, table, per_seed))
            figures[f"{figure}.png"] = partial(
                accuracy_against_keep_ratio, described, title=study.title, control=CONTROL
            )
        how_to_read = [_HOW_TO_READ]
        if any(study.has_gates for study in self.studies):
            how_to_read.append(_HOW_TO_READ_TOKEN_GATES)
        tables = {
            "comparisons.csv": pd.concat(differences, ignore_index=True),
            "mcnemar.csv": pd.concat(exact, ignore_index=True),
        }
        return ComparisonReport(
            "Comparison of a pruning sweep", "\n\n".join(how_to_read), "\n".join(sections), tables, figures
        )


def _with_settings(table: pd.DataFrame, place: int, study: PruningStudy) -> pd.DataFrame:
    """Return ``table`` with the study it belongs to in front."""
    front = pd.DataFrame({"study": place, **study.settings}, index=table.index)
    return pd.concat([front, table], axis=1)


def _section(
    heading: str,
    study: PruningStudy,
    described: pd.DataFrame,
    control: PositiveControl | None,
    table: pd.DataFrame,
    per_seed: pd.DataFrame,
) -> str:
    settings = "; ".join(
        f"{name.removeprefix('arg_')} {value}"
        for name, value in study.settings.items()
        if name not in {"model", "dataset", "lora_r"}
    )
    parts = [heading, settings + ".", f"**Positive control.** {_control_text(control, study, table)}"]
    without = sum(run.items is None for run in study.runs)
    if without:
        parts.append(
            f"No predictions.csv for {without} of {len(study.runs)} runs: tests on sentences "
            + ("are skipped." if without == len(study.runs) else "leave them out.")
        )
    parts.append(f"{study.metric}, mean ± standard deviation over seeds:\n\n" + _cells_table(described))
    if len(table):
        parts.append(f"Differences in {study.metric}:\n\n" + _differences_table(table, per_seed))
        parts.append(LEGEND)
    else:
        parts.append("No two cells share a seed with the control or with random: nothing is tested.")
    return "\n\n".join(parts) + "\n"


def _control_text(control: PositiveControl | None, study: PruningStudy, table: pd.DataFrame) -> str:
    if not study.pruned():
        return "None is needed: nothing is pruned in these runs."
    if control is None:
        return (
            f"Missing: the sweep has no {CONTROL} run at a seed of a pruned one. Whether it could see an effect is "
            "unknown; add one with --method no_prune."
        )
    what = f"{CONTROL} minus {control.against} at keep ratio {control.keep_ratio:g}, right after pruning"
    seeds = "1 seed" if control.n_seeds == 1 else f"{control.n_seeds} seeds"
    if np.isnan(control.low):
        return f"{what}, is {control.difference:+.4f} ({seeds}, no interval): **unknown**. Run three seeds or more."
    interval = (
        f"{control.difference:+.4f} [{control.low:+.4f}, {control.high:+.4f}] ({seeds}, interval over {control.by})"
    )
    if control.is_separated:
        return f"{what}, is {interval}: it separates. This sweep can see an effect of that size."
    could_find = f"; these {seeds} would find {control.detectable:.4f} or more" if control.detectable > 0 else ""
    p_values = table[[name for name in ("t_p_holm", "bootstrap_p_holm") if name in table]].min(axis=1)
    n_different = int((p_values < 0.05).sum())
    return (
        f"{what}, is {interval}: it does not separate. **Underpowered**{could_find}. Below, no difference is no "
        "evidence of equality"
        + (
            f"; {n_different} of {len(table)} rows differ all the same (adjusted p < 0.05)."
            if n_different
            else ", and nothing separates."
        )
    )


def _cells_table(described: pd.DataFrame) -> str:
    moments = _MOMENT | (_STATIC_MOMENT if (described["moment"] == STATIC).any() else {})
    rows = []
    for (method, keep), part in described.groupby(["method", "keep_ratio"], sort=False):
        by_moment = {row["moment"]: mean_and_spread(row["mean"], row["std"]) for row in part.to_dict("records")}
        first = part.iloc[0]
        cells = [str(method), f"{keep:g}", f"{first['active_r']:.3g}", str(first["n_seeds"])]
        rows.append([*cells, *(by_moment.get(moment, "") for moment in moments)])
    return markdown_table(["method", "keep", "mean rank", "seeds", *moments.values()], rows)


def _differences_table(table: pd.DataFrame, per_seed: pd.DataFrame) -> str:
    has_sentences = bool((table["n_sentences"] > 0).any())
    header = ["method", "keep", "moment", "against", "seeds", "difference", "t p (Holm)"]
    header += ["Wilcoxon p (Holm)", "dz", "detectable"]
    key = ["method", "keep_ratio", "moment", "reference"]
    is_significant = {question: part["p_holm"] < 0.05 for question, part in per_seed.groupby(key)}
    rows = []
    for row in table.to_dict("records"):
        cells = [row["method"], f"{row['keep_ratio']:g}", *_compared(row["moment"], row["reference"])]
        cells += [str(row["n_seeds"])]
        cells += [with_interval(row["difference"], row["ci_low"], row["ci_high"])]
        cells += [p_value(row["t_p_holm"]), p_value(row["wilcoxon_p_holm"])]
        cells += [number(row["cohens_dz"], "+.2f"), number(row["smallest_detectable"], ".4f")]
        if has_sentences:
            low, high = row["sentence_ci_low"], row["sentence_ci_high"]
            cells += [with_interval(row["sentence_difference"], low, high), p_value(row["bootstrap_p_holm"])]
            exact = is_significant.get(tuple(row[name] for name in key))
            cells += ["" if exact is None else f"{int(exact.sum())} of {len(exact)}"]
        rows.append(cells)
    return markdown_table(header + (["on sentences", "bootstrap p (Holm)", "McNemar"] if has_sentences else []), rows)


def _compared(moment: str, reference: str) -> list[str]:
    """Name the moment of a method, and its reference, with the moment of that where it is another."""
    other = _REFERENCE_MOMENT[moment]
    return [(_MOMENT | _STATIC_MOMENT)[moment], reference if other == moment else f"{reference}, {_MOMENT[other]}"]
