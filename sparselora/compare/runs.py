"""Compare runs of `train`: one row a configuration, differences to a baseline paired by seed and by evaluation row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.errors import InputError
from sparselora.numerics.stats import (
    compare_paired,
    holm,
    mean_interval,
    paired_bootstrap,
    smallest_detectable_difference,
)
from sparselora.runs.folder import read_record, read_table
from sparselora.runs.former_names import with_present_names

COMMAND = "train"
_SAME = ("model", "task", "dataset", "eval_file", "eval_samples", "prompt_field", "completion_field", "template")
"""Settings that every run must share: runs on other data or another base model are not comparable."""
_NOT_CONFIG = ("seed", "save_steps", "eval_steps", "logging_steps", "report_to")
"""Settings in which runs of one configuration may differ."""
GATE = "novelty"
"""The section of a run's settings that is its novelty gate's."""
TOKEN_GATE = "token_gate"
"""The section of the gates that decide which rank channels are active for a token."""
UNGATED, ACCEPT_ALL = "none", "accept_all"
"""The policies that skip nothing: of a run without a gate, and of one whose gate lets everything pass."""
DRAWS = 2_000
"""Bootstrap draws: losses of rows are all distinct, so a draw costs as much as there are rows."""

COSTS = ("step_ms", "tokens_per_s", "peak_mb", "active_flops_per_token")
_NUMBERS = ("eval_loss", "eval_accuracy", "sparse_steps", *COSTS)
"""Columns of a run's summary that a comparison reads."""


@dataclass(frozen=True)
class Run:
    """A finished run: its settings, its row of summary.csv, and what it said about each evaluation row."""

    path: Path
    settings: dict[str, Any]
    device: str
    summary: dict[str, Any]
    predictions: pd.DataFrame

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    @property
    def gate(self) -> dict[str, Any]:
        """The settings of its novelty gate; empty if it has none."""
        return _gate(self.settings)

    @property
    def policy(self) -> str:
        """The policy of its gate; `UNGATED` without one, as for every run from before there were gates."""
        return str(self.summary.get("policy", self.gate.get("policy", UNGATED)))

    @property
    def config(self) -> str:
        """The settings that must be equal for two runs to be two seeds of one configuration.

        What is off (null, false) reads as what is not there: runs from before a setting existed do not have it.
        """
        kept = {k: v for k, v in self.settings.items() if k not in (*_NOT_CONFIG, GATE) and not _off(v)}
        return json.dumps(kept | {GATE: self.gate}, sort_keys=True)


def _gate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the gate by their present names; empty where it is absent or not enabled."""
    section = settings.get(GATE)
    if not section or not section.get("enable", True):
        return {}
    chosen = {name: value for name, value in section.items() if name != "enable" and not _off(value)}
    return with_present_names(chosen, "novelty")


def _off(value: Any) -> bool:
    return value is None or value is False


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, by seed."""

    label: str
    runs: dict[int, Run]


@dataclass(frozen=True)
class Comparison:
    """The groups, the baseline among them, the metric, and notes on what limits the comparison."""

    groups: list[Group]
    baseline: Group
    metric: str
    notes: list[str]

    @property
    def lower_is_better(self) -> bool:
        return self.metric == "loss"


# --- reading ------------------------------------------------------------------------------------------------------


def holds_train_runs(path: Path) -> bool:
    """Whether ``path`` is the folder of a run of `train`, or holds such folders."""
    return any(True for _ in _run_folders(path))


def _run_folders(path: Path) -> Iterator[Path]:
    candidates = [path] if (path / "run.json").is_file() else sorted(path.iterdir()) if path.is_dir() else []
    for folder in candidates:
        record = read_record(folder)
        if record is not None and record["command"] == COMMAND:
            yield folder


def read_runs(paths: Sequence[Path], baseline: Path | None = None) -> Comparison:
    """The runs in ``paths`` (their folders, or folders that hold them), grouped by configuration.

    Args:
        baseline: a run of the configuration that the others are compared with; without, the first that skips no
            step: without a gate, else of policy accept_all, else the first of all.
    Raises:
        InputError: a path without runs, a run that is not finished, runs on other data, a seed given twice, one
            configuration alone, evaluation rows that differ.
    """
    runs: dict[Path, Run] = {}
    for path in [*paths, *([baseline] if baseline is not None else [])]:
        folders = list(_run_folders(path))
        if not folders:
            raise InputError(f"{path} holds no run of train; name run folders, or a folder of run folders")
        for folder in folders:
            runs.setdefault(folder.resolve(), _read_run(folder))
    every = list(runs.values())
    _check_same(every)
    first = _most_plain(every) if baseline is None else runs[next(_run_folders(baseline)).resolve()]
    groups = _grouped(every, first)
    if len(groups) < 2:
        raise InputError(f"all {len(every)} runs are of one configuration; give runs of two or more to compare")
    base = next(group for group in groups if first in group.runs.values())
    metric = "loss" if first.settings["task"] == "causal_lm" else "accuracy"
    return Comparison(groups, base, metric, _notes(every, groups, base))


def _most_plain(runs: Sequence[Run]) -> Run:
    rank = {UNGATED: 0, ACCEPT_ALL: 1}
    return min(runs, key=lambda run: (rank.get(run.policy, 2), run.settings.get("token_gate") is not None))


def _read_run(folder: Path) -> Run:
    record = read_record(folder) or {}
    if record.get("status") != "success":
        raise InputError(f"run {folder} has status {record.get('status')}; finish it (--resume) or leave it out")
    settings = with_present_names(record.get("arguments", {}), COMMAND)
    if lacking := [name for name in ("seed", "task", "model", "dataset") if name not in settings]:
        raise InputError(f"run {folder} is not whole (its run.json does not give {', '.join(lacking)}); run it again")
    try:
        predictions = read_table(folder / "predictions.csv", numbers=("loss", "correct"), texts=("row",))
        summaries = read_table(folder / "summary.csv", numbers=_NUMBERS, texts=("model", "dataset"))
        if len(summaries) != 1:
            raise InputError(f"summary.csv has {len(summaries)} rows, not one")
    except InputError as error:
        raise InputError(f"run {folder} is not whole ({error}); run it again with --overwrite") from None
    return Run(folder, settings, str(record.get("device", "")), dict(summaries.to_dict("records")[0]), predictions)


def _check_same(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for name in _SAME:
            one, two = (_shown(each.settings.get(name)) for each in (first, run))
            if first.settings.get(name) != run.settings.get(name):
                raise InputError(f"{first.path} has {name} {one} and {run.path} has {two}; they cannot be compared")
        fixed = [name for name in ("row", "label", "tokens") if name in first.predictions]
        if not all(name in run.predictions and _equal(first, run, name) for name in fixed):
            raise InputError(f"{first.path} and {run.path} were evaluated on different rows; they cannot be compared")


def _equal(first: Run, second: Run, name: str) -> bool:
    return first.predictions[name].tolist() == second.predictions[name].tolist()


def _grouped(runs: Sequence[Run], baseline: Run) -> list[Group]:
    """Groups in the order of their first run, the baseline's in front."""
    by_config: dict[str, dict[int, Run]] = {baseline.config: {}}
    for run in runs:
        seeds = by_config.setdefault(run.config, {})
        if run.seed in seeds:
            raise InputError(
                f"{seeds[run.seed].path} and {run.path} are one configuration with one seed; give one of them"
            )
        seeds[run.seed] = run
    labels = _labels([next(iter(seeds.values())).settings for seeds in by_config.values()])
    return [Group(label, dict(sorted(seeds.items()))) for label, seeds in zip(labels, by_config.values())]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in settings.items() if name not in (*_NOT_CONFIG, "sparsity", GATE, TOKEN_GATE)}
    section, gate = settings.get("sparsity"), _gate(settings)
    flat |= {"mode": "plain PEFT"} if section is None else dict(section)
    if gate:
        policy = gate.pop("policy", "gate")
        short = {"rate" if name == "target_accept_rate" else name: value for name, value in gate.items()}
        flat |= {"mode": policy if section is None else f"{flat['mode']} + {policy}"} | short
    if tokens := dict(settings.get(TOKEN_GATE) or {}):
        flat |= {"mode": f"token gate {tokens.pop('policy')}"} | {f"gate_{name}": tokens[name] for name in tokens}
    return flat


def _labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The mode of each, and the other settings in which those of one mode differ."""
    flat = [_flat(config) for config in configs]
    labels = []
    for one in flat:
        alike = [other for other in flat if other["mode"] == one["mode"]]
        names = [name for name in one if any(_differ(other.get(name), one[name]) for other in alike)]
        labels.append(" ".join([str(one["mode"]), *(f"{name}={_shown(one[name])}" for name in names)]))
    return labels


def _differ(one: Any, two: Any) -> bool:
    return one != two and not (_off(one) and _off(two))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        if set(value) == {"name", "sha256"}:
            return f"{value['name']} ({value['sha256'][:6]})"
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _notes(runs: Sequence[Run], groups: Sequence[Group], baseline: Group) -> list[str]:
    notes = []
    devices = sorted({run.device for run in runs})
    if len(devices) > 1:
        notes.append(f"Runs are from {len(devices)} devices ({', '.join(devices)}): times and memory do not compare.")
    for group in groups:
        lacking = sorted(set(baseline.runs) ^ set(group.runs))
        if lacking:
            notes.append(f"{group.label}: seeds {', '.join(map(str, lacking))} have no partner and are left unpaired.")
    return notes


# --- tables -------------------------------------------------------------------------------------------------------


def describe_runs(comparison: Comparison) -> pd.DataFrame:
    """A row a configuration: mean, standard deviation and 95 % interval of the metric over seeds, mean costs."""
    rows = []
    for group in comparison.groups:
        runs = list(group.runs.values())
        quality = mean_interval([_quality(run, comparison.metric) for run in runs])
        row = {
            "config": group.label,
            "n_seeds": quality.n,
            "metric": comparison.metric,
            "mean": quality.mean,
            "std": quality.std,
            "ci_low": quality.low,
            "ci_high": quality.high,
            "eval_loss": float(np.mean([run.summary["eval_loss"] for run in runs])),
            "sparse_steps": float(np.mean([run.summary["sparse_steps"] for run in runs])),
        }
        rows.append(row | {name: float(np.mean([run.summary[name] for run in runs])) for name in COSTS})
    return pd.DataFrame(rows)


def _quality(run: Run, metric: str) -> float:
    return float(run.summary[f"eval_{metric}"])


def compare_runs(comparison: Comparison, seed: np.random.SeedSequence) -> pd.DataFrame:
    """A row a configuration other than the baseline: its difference in the metric, and its ratios in cost.

    ``difference`` is configuration minus baseline over the seeds that both have, with a paired t interval over seeds;
    ``row_…`` is the same mean on the evaluation rows, with a bootstrap interval over rows (all seeds of a row drawn
    together). ``detectable`` is the smallest mean difference that as many seeds with this spread find four times in
    five. A ratio is the geometric mean over seeds of baseline / configuration for ``speed_up`` (times of a step), of
    configuration / baseline for the others. The p values are adjusted by Holm over the rows of this table.
    """
    others = [group for group in comparison.groups if group is not comparison.baseline]
    rows = [
        _row(comparison, group, np.random.default_rng(child)) for group, child in zip(others, seed.spawn(len(others)))
    ]
    table = pd.DataFrame(rows)
    for name in ("t_p", "row_p"):
        table.insert(int(table.columns.get_indexer([name])[0]) + 1, f"{name}_holm", holm(table[name].tolist()))
    return table


def _row(comparison: Comparison, group: Group, rng: np.random.Generator) -> dict[str, Any]:
    base = comparison.baseline.runs
    seeds = [seed for seed in group.runs if seed in base]
    start = {"config": group.label, "baseline": comparison.baseline.label, "n_seeds": len(seeds)}
    if not seeds:
        nan = float("nan")
        names = (
            "difference", "ci_low", "ci_high", "t_p", "wilcoxon_p", "cohens_dz", "detectable", "row_difference",
            "row_ci_low", "row_ci_high", "row_p", "speed_up", "speed_up_low", "speed_up_high", "tokens_ratio",
            "memory_ratio", "flops_ratio",
        )  # fmt: skip
        return start | {"n_rows": 0} | dict.fromkeys(names, nan)
    pairs = [(group.runs[seed], base[seed]) for seed in seeds]
    ours, theirs = ([_quality(run, comparison.metric) for run in side] for side in zip(*pairs))
    paired = compare_paired(ours, theirs)
    spread = float(np.std(np.subtract(ours, theirs), ddof=1)) if len(seeds) > 1 else float("nan")
    sums, counts = row_differences(pairs, comparison.metric)
    by_row = paired_bootstrap(sums, counts, rng, draws=DRAWS)
    low, mid, high = _ratio([(theirs_.summary["step_ms"], ours_.summary["step_ms"]) for ours_, theirs_ in pairs])
    ratios = {
        name: _ratio([(ours_.summary[cost], theirs_.summary[cost]) for ours_, theirs_ in pairs])[1]
        for name, cost in zip(("tokens_ratio", "memory_ratio", "flops_ratio"), COSTS[1:])
    }
    return start | {
        "n_rows": by_row.n,
        "difference": paired.mean_difference,
        "ci_low": paired.ci_low,
        "ci_high": paired.ci_high,
        "t_p": paired.t_p,
        "wilcoxon_p": paired.wilcoxon_p,
        "cohens_dz": paired.cohens_dz,
        "detectable": smallest_detectable_difference(spread, len(seeds)),
        "row_difference": by_row.mean,
        "row_ci_low": by_row.low,
        "row_ci_high": by_row.high,
        "row_p": by_row.p,
        "speed_up": mid,
        "speed_up_low": low,
        "speed_up_high": high,
        **ratios,
    }


def row_differences(pairs: Sequence[tuple[Run, Run]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each evaluation row: its difference summed over seeds (and tokens), and over how many.

    Args:
        pairs: the runs of one seed each, whose first minus second is taken.
        metric: ``loss``, of tokens where rows have several, or ``accuracy``.
    """
    column = "loss" if metric == "loss" else "correct"
    sums = sum(np.asarray(ours.predictions[column] - theirs.predictions[column], float) for ours, theirs in pairs)
    # Single precision: runs that compute the same in another order differ in the last bits of every row.
    scale = max(float(np.abs(run.predictions[column]).max()) for run in pairs[0])
    sums = np.round(np.asarray(sums) / (scale or 1.0), 5) * (scale or 1.0)
    first = pairs[0][0].predictions
    by_token = metric == "loss" and "tokens" in first
    each = np.asarray(first["tokens"], float) if by_token else np.ones(len(first))
    kept = each > 0  # a row without a label says nothing
    return sums[kept], (each * len(pairs))[kept]


def _ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Low end, geometric mean and high end of first / second over seeds; the ends are NaN for one seed."""
    found = mean_interval([float(np.log(first / second)) for first, second in pairs])
    return float(np.exp(found.low)), float(np.exp(found.mean)), float(np.exp(found.high))
