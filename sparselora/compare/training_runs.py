"""Runs of `train`: read from their folders, grouped by configuration, compared by seed and by row, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.compare.pairing import NAN, Endpoint, Pair, add_holm, compare_pairs, pair_by_seed
from sparselora.compare.runs import (
    ComparisonReport,
    Group,
    PairedValues,
    Run,
    check_endpoint,
    files_of,
    nothing_learned_text,
    run_folders,
    unknown_side,
)
from sparselora.config.contrasts import Contrast
from sparselora.errors import InputError, few
from sparselora.numerics.stats import bootstrap_draws, is_at_chance, is_bootstrap_floor, mean_interval
from sparselora.report.markdown import LEGEND, markdown_table, mean_and_spread, number, p_value, with_interval
from sparselora.runs.files import read_table
from sparselora.runs.folder import NOTHING_LEARNED, read_record
from sparselora.runs.former_names import with_present_names

COMMAND = "train"
_SAME = (
    "model", "task", "dataset", "eval_file", "eval_samples", "prompt_field", "completion_field", "template",
    "chat_template",
)  # fmt: skip
"""Settings that every run must share: runs on other data or another base model are not comparable."""
_NOT_CONFIG = ("seed", "save_steps", "eval_steps", "logging_steps", "report_to")
"""Settings in which runs of one configuration may differ."""
NOVELTY_GATE = "novelty"
"""The section of a run's settings that is its novelty gate's."""
TOKEN_GATE = "token_gate"
"""The section of the gates that decide which rank channels are active for a token."""
UNGATED, ACCEPT_ALL = "none", "accept_all"
"""The policies that skip nothing: of a run without a novelty gate, and of one whose gate lets everything pass."""
DRAWS = 2_000
"""Bootstrap draws, at least: an interval needs no more, a p among many tests does (`bootstrap_draws`)."""

COSTS = ("step_ms", "tokens_per_s", "peak_mb", "active_flops_per_token")
_NUMBERS = ("eval_loss", "eval_accuracy", "sparse_steps", *COSTS)
"""Columns of a run's summary that a comparison reads."""
ENDPOINTS = {"loss": Endpoint("eval_loss", "loss", weight="tokens"), "accuracy": Endpoint("eval_accuracy", "correct")}
"""The metric of a task → where it stands. A language model's loss of a row is summed over its tokens."""


@dataclass(frozen=True)
class TrainingRun(Run):
    """A finished run of `train`: its metrics are its row of summary.csv, its items those of predictions.csv."""

    items: pd.DataFrame = field(repr=False)
    device: str
    is_idle: bool
    """Nothing was learned, as the run itself noted; of a classifier, accuracy at chance."""

    @property
    def novelty_gate(self) -> dict[str, Any]:
        """The settings of its novelty gate; empty if it has none."""
        return _novelty_gate(self.config)

    @property
    def policy(self) -> str:
        """The policy of its novelty gate; `UNGATED` without one, as for every run from before there were any."""
        return str(self.metrics.get("policy", self.novelty_gate.get("policy", UNGATED)))

    @property
    def configuration(self) -> str:
        """The settings that must be equal for two runs to be two seeds of one configuration.

        What is off (null, false) reads as what is not there: runs from before a setting existed do not have it. The
        seed of the sparsity follows the run's, or was 0 in all runs.
        """
        settings = {k: v for k, v in self.config.items() if k not in (*_NOT_CONFIG, NOVELTY_GATE) and not _off(v)}
        if "sparsity" in settings:
            settings["sparsity"] = _without_seed(settings["sparsity"])
        return json.dumps(settings | {NOVELTY_GATE: self.novelty_gate}, sort_keys=True)


def arm_name(run: TrainingRun) -> str:
    """Return the name of a run's folder, without the seed at its end: ``NAME_sSEED`` or ``NAME_seedSEED``."""
    name = run.path.resolve().name
    ends = (f"_s{run.seed}", f"_seed{run.seed}")
    return next((name.removesuffix(end) for end in ends if name.endswith(end)), name)


def _novelty_gate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the novelty gate by their present names; empty where it is absent or not enabled."""
    section = settings.get(NOVELTY_GATE)
    if not section or not section.get("enable", True):
        return {}
    enabled = {name: value for name, value in section.items() if name != "enable" and not _off(value)}
    return with_present_names(enabled, "novelty")


def _without_seed(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "seed"}


def _off(value: Any) -> bool:
    return value is None or value is False


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingComparison:
    """Runs of `train`, checked to be comparable.

    Attributes:
        groups: one per configuration, the baseline among them.
        metric: ``loss`` or ``accuracy``.
        notes: sentences on what limits the comparison.
        default_folder: the folder of the report unless the user names another.
    """

    groups: Sequence[Group[TrainingRun]]
    baseline: Group[TrainingRun]
    metric: str
    notes: Sequence[str] = ()
    default_folder: Path = Path("compare")

    @property
    def is_lower_better(self) -> bool:
        return self.metric == "loss"

    @property
    def runs(self) -> list[TrainingRun]:
        return [run for group in self.groups for run in group.runs.values()]

    @property
    def title(self) -> str:
        summary = next(iter(self.baseline.runs.values())).metrics
        return f"{summary['model']} on {summary['dataset']}, baseline {self.baseline.label}"

    @property
    def baseline_label(self) -> str:
        return self.baseline.label

    @property
    def outputs(self) -> Sequence[str]:
        return OUTPUTS

    @property
    def inputs(self) -> list[Path]:
        return [run.path for run in self.runs]

    @property
    def files(self) -> list[Path]:
        return files_of(self.inputs, "summary.csv", "predictions.csv", "eval.csv", "gate.csv", "metrics.csv")

    def paired_values(self, contrast: Contrast) -> PairedValues:
        """Return the values by seed. A side is the label of a configuration, or the name that the folders of its runs
        have before their seed, ``NAME_sSEED``; an endpoint ``loss`` or ``accuracy``."""
        check_endpoint(contrast, ENDPOINTS)
        if contrast.where:
            raise InputError("runs of train are of one model and data set: leave out where")
        first, second = self._side(contrast, contrast.first), self._side(contrast, contrast.second)
        pairs = pair_by_seed(first, second)
        return PairedValues(*ENDPOINTS[contrast.endpoint].values(pairs), "seed", contrast.endpoint == "loss")

    def _side(self, contrast: Contrast, side: str) -> Group[TrainingRun]:
        names = {group.label: {arm_name(run) for run in group.runs.values()} | {group.label} for group in self.groups}
        groups = [group for group in self.groups if side in names[group.label]]
        if not groups:
            raise unknown_side(contrast, side, sorted(set().union(*names.values())), "configuration or arm")
        if len(groups) > 1:
            raise InputError(f"the runs named {side} differ in more than the seed; name a configuration by its label")
        return groups[0]

    def report(self, seed: int) -> ComparisonReport:
        """Compare every configuration with the baseline."""
        return training_report(self, seed)


def read_runs(paths: Sequence[Path], baseline: Path | None = None) -> TrainingComparison:
    """Read the runs in ``paths`` (their folders, or folders that hold them) and group them by configuration.

    Args:
        baseline: a run of the configuration that the others are compared with; without, the first that skips no
            step: without a novelty gate, else of policy accept_all, else the first of all.
    Raises:
        InputError: a path without runs, a run that is not finished, runs on other data, two runs of one configuration
            and seed, one configuration alone, evaluation rows that differ.
    """
    runs: dict[Path, TrainingRun] = {}
    baseline_run = None
    for path in [*paths, *([baseline] if baseline is not None else [])]:
        folders = [folder for folder, _ in run_folders(path, COMMAND)]
        if not folders:
            raise InputError(f"{path} holds no run of train; name run folders, or a folder of run folders")
        for folder in folders:
            if folder.resolve() not in runs:
                runs[folder.resolve()] = _read_run(folder)
        if path is baseline:
            baseline_run = runs[folders[0].resolve()]
    comparison = group_runs(list(runs.values()), baseline_run)
    return replace(comparison, default_folder=paths[0].parent / "compare")


def group_runs(runs: Sequence[TrainingRun], baseline_run: TrainingRun | None = None) -> TrainingComparison:
    """Group runs that have been read, and check that they can be compared; as `read_runs`."""
    _check_same(runs)
    first = _most_plain(runs) if baseline_run is None else baseline_run
    groups = _grouped(runs, first)
    if len(groups) < 2:
        raise InputError(f"all {len(runs)} runs are of one configuration; give runs of two or more to compare")
    base = next(group for group in groups if first in group.runs.values())
    metric = "loss" if first.config["task"] == "causal_lm" else "accuracy"
    return TrainingComparison(groups, base, metric, _notes(runs, groups, base))


def _most_plain(runs: Sequence[TrainingRun]) -> TrainingRun:
    rank = {UNGATED: 0, ACCEPT_ALL: 1}
    return min(runs, key=lambda run: (rank.get(run.policy, 2), run.config.get(TOKEN_GATE) is not None))


def _read_run(folder: Path) -> TrainingRun:
    record = read_record(folder) or {}
    if record.get("status") != "success":
        raise InputError(f"run {folder} has status {record.get('status')}; finish it (--resume) or leave it out")
    settings = with_present_names(record.get("arguments", {}), COMMAND)
    if lacking := [name for name in ("seed", "task", "model", "dataset") if name not in settings]:
        raise InputError(f"run {folder} is not whole (its run.json does not give {', '.join(lacking)}); run it again")
    try:
        items = read_table(folder / "predictions.csv", numbers=("loss", "correct"), texts=("row",)).set_index("row")
        summaries = read_table(folder / "summary.csv", numbers=_NUMBERS, texts=("model", "dataset"))
        if len(summaries) != 1:
            raise InputError(f"summary.csv has {len(summaries)} rows, not one")
    except InputError as error:
        raise InputError(f"run {folder} is not whole ({error}); run it again with --overwrite") from None
    metrics = {str(name): value for name, value in summaries.to_dict("records")[0].items()}
    is_idle = NOTHING_LEARNED in record or ("label" in items and is_at_chance(items["correct"], items["label"]))
    return TrainingRun(folder, settings, int(settings["seed"]), metrics, items, str(record.get("device", "")), is_idle)


def _check_same(runs: Sequence[TrainingRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for name in _SAME:
            if first.config.get(name) != run.config.get(name):
                values = [_shown(side.config.get(name)) for side in (first, run)]
                raise InputError(
                    f"{first.path} has {name} {values[0]} and {run.path} has {values[1]}; they cannot be compared"
                )
        fixed = [name for name in ("label", "tokens") if name in first.items]
        if not first.items.index.equals(run.items.index) or not all(
            name in run.items and first.items[name].tolist() == run.items[name].tolist() for name in fixed
        ):
            raise InputError(f"{first.path} and {run.path} were evaluated on different rows; they cannot be compared")


def _grouped(runs: Sequence[TrainingRun], baseline: TrainingRun) -> list[Group[TrainingRun]]:
    """Group by configuration, in the order of their first run, the baseline's in front."""
    by_configuration: dict[str, dict[int, TrainingRun]] = {baseline.configuration: {}}
    for run in runs:
        seeds = by_configuration.setdefault(run.configuration, {})
        if run.seed in seeds:
            raise InputError(
                f"{seeds[run.seed].path} and {run.path} are one configuration with one seed; give one of them"
            )
        seeds[run.seed] = run
    labels = _labels([next(iter(seeds.values())).config for seeds in by_configuration.values()])
    return [Group(label, dict(sorted(seeds.items()))) for label, seeds in zip(labels, by_configuration.values())]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings on one level, with a ``mode`` that names the kind of step."""
    sections = (*_NOT_CONFIG, "sparsity", NOVELTY_GATE, TOKEN_GATE)
    flat = {name: value for name, value in settings.items() if name not in sections}
    section, gate = settings.get("sparsity"), _novelty_gate(settings)
    flat |= {"mode": "plain PEFT"} if section is None else _without_seed(section)
    if gate:
        policy = gate.pop("policy", "gate")
        short = {"rate" if name == "target_accept_rate" else name: value for name, value in gate.items()}
        flat |= {"mode": policy if section is None else f"{flat['mode']} + {policy}"} | short
    if tokens := dict(settings.get(TOKEN_GATE) or {}):
        flat |= {"mode": f"token gate {tokens.pop('policy')}"} | {f"gate_{name}": tokens[name] for name in tokens}
    return flat


def _labels(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each by its mode, and the other settings in which those of one mode differ."""
    flat = [_flat(settings) for settings in configurations]
    labels = []
    for settings in flat:
        alike = [other for other in flat if other["mode"] == settings["mode"]]
        names = [name for name in settings if any(_differ(other.get(name), settings[name]) for other in alike)]
        labels.append(" ".join([str(settings["mode"]), *(f"{name}={_shown(settings[name])}" for name in names)]))
    return labels


def _differ(value: Any, other: Any) -> bool:
    return value != other and not (_off(value) and _off(other))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        if set(value) == {"name", "sha256"}:
            return f"{value['name']} ({value['sha256'][:6]})"
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _notes(
    runs: Sequence[TrainingRun], groups: Sequence[Group[TrainingRun]], baseline: Group[TrainingRun]
) -> list[str]:
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


def describe_runs(comparison: TrainingComparison) -> pd.DataFrame:
    """Return a row per configuration: mean, standard deviation and 95 % interval of the metric over seeds, costs."""
    rows = []
    for group in comparison.groups:
        quality = mean_interval(group.values(f"eval_{comparison.metric}"))
        row = {
            "config": group.label,
            "n_seeds": quality.n,
            "metric": comparison.metric,
            "mean": quality.mean,
            "std": quality.std,
            "ci_low": quality.low,
            "ci_high": quality.high,
        }
        rows.append(row | {name: float(np.mean(group.values(name))) for name in ("eval_loss", "sparse_steps", *COSTS)})
    return pd.DataFrame(rows)


def compare_runs(comparison: TrainingComparison, seed: np.random.SeedSequence) -> pd.DataFrame:
    """Return a row per configuration except the baseline: its difference in the metric, and its ratios in cost.

    ``difference`` is configuration minus baseline over the seeds that both have, with a paired t interval over seeds;
    ``row_…`` describes the same mean on the evaluation rows, with a bootstrap interval over rows (all seeds of a row
    drawn together, ``row_draws`` times). ``detectable`` is the smallest mean difference that as many seeds with this
    spread find four times in five. A ratio is the geometric mean over seeds of baseline / configuration for
    ``speed_up`` (times of a step), of configuration / baseline for the others. The p values are adjusted by Holm over
    the rows of this table.
    """
    others = [group for group in comparison.groups if group is not comparison.baseline]
    endpoint, draws = ENDPOINTS[comparison.metric], bootstrap_draws(len(others), DRAWS)
    rows = []
    for group, child in zip(others, seed.spawn(len(others))):
        pairs = pair_by_seed(group, comparison.baseline)
        difference = compare_pairs(pairs, endpoint, np.random.default_rng(child), draws)
        rows.append({
            "config": group.label,
            "baseline": comparison.baseline.label,
            "n_seeds": len(pairs),
            "n_rows": difference.items.n,
            "difference": difference.seeds.mean_difference,
            "ci_low": difference.seeds.ci_low,
            "ci_high": difference.seeds.ci_high,
            "t_p": difference.seeds.t_p,
            "wilcoxon_p": difference.seeds.wilcoxon_p,
            "cohens_dz": difference.seeds.cohens_dz,
            "detectable": difference.detectable,
            "row_difference": difference.items.mean,
            "row_ci_low": difference.items.low,
            "row_ci_high": difference.items.high,
            "row_draws": draws if difference.items.n else 0,
            "row_p": difference.items.p,
            **_cost_ratios(pairs),
        })  # fmt: skip
    table = pd.DataFrame(rows)
    add_holm(table, ("t_p", "row_p"), next_to_raw=True)
    return table


def _cost_ratios(pairs: Sequence[Pair]) -> dict[str, float]:
    """Return geometric means over seeds of the ratios in cost, that of times with its interval; NaN without pairs."""
    low, mean, high = _log_ratio([(base, run) for run, base in pairs], "step_ms")
    ratios = {"speed_up": mean, "speed_up_low": low, "speed_up_high": high}
    for name, cost in zip(("tokens_ratio", "memory_ratio", "flops_ratio"), COSTS[1:]):
        ratios[name] = _log_ratio(pairs, cost)[1]
    return ratios


def _log_ratio(pairs: Sequence[Pair], cost: str) -> tuple[float, float, float]:
    """Return low end, geometric mean and high end of first / second over seeds; the ends are NaN for one seed."""
    if not pairs:
        return NAN, NAN, NAN
    logs = mean_interval([float(np.log(first.metrics[cost] / second.metrics[cost])) for first, second in pairs])
    return float(np.exp(logs.low)), float(np.exp(logs.mean)), float(np.exp(logs.high))


# --- the report ---------------------------------------------------------------------------------------------------

OUTPUTS = ("compare.md", "configs.csv", "comparisons.csv", "quality_against_cost.png", "quality_against_cost.csv")

HOW_TO_READ = """\
Runs are grouped by configuration (all settings but the seed) and paired by seed with the baseline: each difference is
the configuration minus the baseline at the same seed, which trains on the same batches. Times are medians over steps.

- **difference** [95 % interval], **t p**, **dz**: over seeds (paired t); **detectable** is the smallest mean difference
  that this many seeds with this spread find four times in five.
- **on rows** [95 % interval] and **bootstrap p**: the same difference on the same evaluation rows, the answers of all
  seeds to a row drawn together. A description: it speaks about new rows for these very runs, not about other seeds, so
  it is no test of a method. ≤ is the smallest p that the number of draws allows.
- **speed-up**: time of the baseline's step over that of the configuration's, a geometric mean over seeds. The other
  ratios are configuration over baseline.
- Every p is adjusted by Holm over the rows of the table. The raw ones are in `comparisons.csv`."""


def training_report(comparison: TrainingComparison, seed: int) -> ComparisonReport:
    """Write the report of `TrainingComparison.report`."""
    from sparselora.report.runs import quality_against_cost

    configs, differences = describe_runs(comparison), compare_runs(comparison, np.random.SeedSequence(seed))
    unit = "nats per token, lower is better" if comparison.is_lower_better else "fraction, higher is better"
    parts = [
        f"## {comparison.title}",
        *_nothing_learned(comparison),
        f"Evaluation {comparison.metric} ({unit}), mean ± standard deviation over seeds, and costs:",
        _configs_table(configs),
        f"Differences in {comparison.metric} to {comparison.baseline.label}:",
        _differences_table(differences),
        LEGEND,
        _detectable_text(differences),
        *comparison.notes,
    ]
    draw = partial(quality_against_cost, configs, differences, title=comparison.title)
    return ComparisonReport(
        "Comparison of runs",
        HOW_TO_READ,
        "\n\n".join(parts) + "\n",
        {"configs.csv": configs, "comparisons.csv": differences},
        {"quality_against_cost.png": draw},
    )


def _nothing_learned(comparison: TrainingComparison) -> list[str]:
    idle = {g.label: [seed for seed, run in g.runs.items() if run.is_idle] for g in comparison.groups}
    names = [f"{label} (seed {', '.join(map(str, seeds))})" for label, seeds in idle.items() if seeds]
    if not names:
        return []
    evidence = "held-out loss not clearly below that before training"
    if comparison.metric == "accuracy":
        evidence = "accuracy at chance"
    return [nothing_learned_text(few(names), evidence, "Differences between such runs say nothing")]


def _configs_table(configs: pd.DataFrame) -> str:
    metric = configs["metric"].iloc[0]
    header = ["config", "seeds", metric, "ms/step", "tokens/s", "peak MB", "FLOPs/token", "sparse steps"]
    rows = []
    for row in configs.to_dict("records"):
        cells = [row["config"], str(row["n_seeds"]), mean_and_spread(row["mean"], row["std"])]
        cells += [f"{row['step_ms']:.1f}", f"{row['tokens_per_s']:.0f}"]
        cells += [number(row["peak_mb"], ".0f"), number(row["active_flops_per_token"], ".4g")]
        rows.append([*cells, f"{row['sparse_steps']:.0f}"])
    return markdown_table(header, rows)


def _differences_table(differences: pd.DataFrame) -> str:
    header = ["config", "seeds", "difference", "t p (Holm)", "dz", "detectable", "on rows", "bootstrap p (Holm)"]
    header += ["speed-up", "memory", "FLOPs"]
    rows = []
    for row in differences.to_dict("records"):
        cells = [row["config"], str(row["n_seeds"]), with_interval(row["difference"], row["ci_low"], row["ci_high"])]
        cells += [p_value(row["t_p_holm"]), number(row["cohens_dz"], "+.2f"), number(row["detectable"], ".4f")]
        cells += [with_interval(row["row_difference"], row["row_ci_low"], row["row_ci_high"])]
        cells += [p_value(row["row_p_holm"], is_floor=is_bootstrap_floor(row["row_p"], row["row_draws"]))]
        low, high = row["speed_up_low"], row["speed_up_high"]
        spread = "" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        cells += [f"{row['speed_up']:.2f}×{spread}" if not np.isnan(row["speed_up"]) else ""]
        rows.append([*cells, *(number(row[name], ".2f") for name in ("memory_ratio", "flops_ratio"))])
    return markdown_table(header, rows)


def _detectable_text(differences: pd.DataFrame) -> str:
    """Say what these seeds could have seen."""
    detectable = differences["detectable"].dropna()
    if detectable.empty and differences["n_seeds"].max() < 2:
        return (
            "With one seed a configuration nothing is said about seeds: only the intervals over rows stand. "
            "Run three seeds or more."
        )
    if detectable.empty:
        return "The differences are the same at every seed: without a spread nothing is said about other seeds."
    least, most = detectable.min(), detectable.max()
    smallest = f"{least:.4f}" if np.isclose(least, most) else f"{least:.4f} to {most:.4f} (by configuration)"
    return (
        f"These seeds find a difference of {smallest} four times in five; a smaller one may be there and not be seen, "
        "so no difference is no evidence of equality beyond the interval."
    )
