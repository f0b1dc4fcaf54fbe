"""Comparison of a pruning sweep: its tables and figures, and the page that says what they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from sparselora.compare.pairing import pair_by_seed
from sparselora.compare.pruning_cells import (
    CONTROL,
    CONTROL_CELL,
    STATIC,
    Cell,
    PruningStudy,
    read_sweep,
    trained_moment,
)
from sparselora.compare.pruning_tables import (
    ENDPOINTS,
    REFERENCE_MOMENT,
    PositiveControl,
    compare,
    describe,
    positive_control,
)
from sparselora.compare.runs import (
    ComparisonReport,
    PairedValues,
    check_endpoint,
    files_of,
    nothing_learned_text,
    unknown_side,
)
from sparselora.config.contrasts import Contrast
from sparselora.errors import InputError, few
from sparselora.numerics.stats import is_bootstrap_floor
from sparselora.report.markdown import LEGEND, markdown_table, mean_and_spread, number, p_value, with_interval

_MOMENT = {"before": "before", "right_after": "right after", "after": "after"}
_STATIC_MOMENT = {STATIC: "best fixed subset"}

_HOW_TO_READ = """\
Runs are paired by seed within one study (equal settings): each difference is the method minus its reference at the
same seed, keep ratio and moment. `no_prune` is the control: the same warm-up and the same further training, nothing
removed. *Right after* is the accuracy between pruning and further training.

- **difference** [95 % interval] and **t p**, **Wilcoxon p**: over seeds (paired t, signed rank); **dz** is the mean
  difference over its standard deviation. **detectable**: the smallest mean difference that this many seeds with this
  spread find four times in five. With n seeds the signed-rank p is never below 2^(1−n): below six there is none.
- **on sentences** [95 % interval] and **bootstrap p**: accuracy on the same sentences, the answers of all seeds to a
  sentence drawn together. A description: it speaks about new sentences for these very runs, not about other seeds, so
  it is no test of a method. ≤ is the smallest p that the number of draws allows.
- **McNemar**: in how many seeds the exact test of the two runs' answers has an adjusted p below 0.05; a description
  of these very runs too.
- Every p is adjusted by Holm over all rows of the study, for each test by itself (for McNemar: all rows and seeds).
  The raw ones are in `comparisons.csv` and `mcnemar.csv`."""

_HOW_TO_READ_LOSSES = """\
Runs are paired by seed within one study (equal settings): each difference is the method minus its reference at the
same seed, keep ratio and moment. `no_prune` is the control: the same warm-up and the same further training, nothing
removed. The metric is the loss, in nats a labelled token: **lower is better**, and a positive difference is a cost.
*Right after* is the loss between pruning and further training.

- **difference** [95 % interval] and **t p**, **Wilcoxon p**: over seeds (paired t, signed rank); **dz** is the mean
  difference over its standard deviation. **detectable**: the smallest mean difference that this many seeds with this
  spread find four times in five. With n seeds the signed-rank p is never below 2^(1−n): below six there is none.
- **on rows** [95 % interval] and **bootstrap p**: the loss a label on the same evaluation rows, the losses of all seeds
  on a row drawn together. A description: it speaks about new rows for these very runs, not about other seeds, so it is
  no test of a method. ≤ is the smallest p that the number of draws allows.
- Every p is adjusted by Holm over all rows of the study, for each test by itself. The raw ones are in
  `comparisons.csv`."""

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
        return ["compare.md", "comparisons.csv", *([] if self.is_loss else ["mcnemar.csv"]), *charts]

    @property
    def is_loss(self) -> bool:
        """True of language models, of which all studies of a sweep then are."""
        return self.studies[0].is_loss

    @property
    def _figures(self) -> list[str]:
        """A name per study, numbered if there are several."""
        name = f"{'loss' if self.is_loss else 'accuracy'}_against_keep_ratio"
        return [name] if len(self.studies) == 1 else [f"{name}_{i + 1}" for i in range(len(self.studies))]

    @property
    def inputs(self) -> list[Path]:
        return [self.results]

    @property
    def files(self) -> list[Path]:
        cells = sorted({str(run.path) for study in self.studies for run in study.runs} - {"."})
        folders = [self.results.parent / cell for cell in cells]
        return [self.results, *files_of(folders, "predictions.csv", "run_args.json")]

    def paired_values(self, contrast: Contrast) -> PairedValues:
        """Return the values by seed. A side is ``METHOD@KEEP_RATIO`` or ``no_prune``, an endpoint the moment of the
        metric: ``right_after``, ``after``, ``static`` (of the first side; of the second it is ``after``)."""
        check_endpoint(contrast, ENDPOINTS)
        where = contrast.settings
        studies = [s for s in self.studies if all(s.settings.get(name) == value for name, value in where.items())]
        if len(studies) != 1:
            raise InputError(
                f"contrast {contrast.first} against {contrast.second}: where {dict(where)} is true of {len(studies)} "
                f"of the {len(self.studies)} studies of the sweep, wanted one; its settings are "
                f"{few(self.studies[0].settings, 20)}"
            )
        sides = {_side_name(cell): group for cell, group in studies[0].cells.items()}
        for side in (contrast.first, contrast.second):
            if side not in sides:
                raise unknown_side(contrast, side, sides, "cell METHOD@KEEP_RATIO")
        endpoint = ENDPOINTS[contrast.endpoint]
        pairs = pair_by_seed(sides[contrast.first], sides[contrast.second])
        pairs = [pair for pair in pairs if not np.isnan(pair[0].metrics[endpoint.metric])]
        return PairedValues(*endpoint.values(pairs), "seed", is_lower_better=self.is_loss)

    def report(self, seed: int) -> ComparisonReport:
        from sparselora.report.pruning import metric_against_keep_ratio

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
            figures[f"{figure}.png"] = partial(metric_against_keep_ratio, described, title=study.title, control=CONTROL)
        how_to_read = [_HOW_TO_READ_LOSSES if self.is_loss else _HOW_TO_READ]
        if any(study.has_gates for study in self.studies):
            how_to_read.append(_HOW_TO_READ_TOKEN_GATES)
        tables = {"comparisons.csv": pd.concat(differences, ignore_index=True)}
        if not self.is_loss:
            tables["mcnemar.csv"] = pd.concat(exact, ignore_index=True)
        return ComparisonReport(
            "Comparison of a pruning sweep", "\n\n".join(how_to_read), "\n".join(sections), tables, figures
        )


def _side_name(cell: Cell) -> str:
    return CONTROL if cell == CONTROL_CELL else f"{cell[0]}@{cell[1]:g}"


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
    parts = [heading, settings + ".", *_nothing_learned(study)]
    parts.append(f"**Positive control.** {_control_text(control, study, table)}")
    without = sum(run.items is None for run in study.runs)
    if without:
        parts.append(
            f"No predictions.csv for {without} of {len(study.runs)} runs: tests on {_rows_name(study)} "
            + ("are skipped." if without == len(study.runs) else "leave them out.")
        )
    parts.append(f"{study.metric}, mean ± standard deviation over seeds:\n\n" + _cells_table(described))
    if len(table):
        parts.append(f"Differences in {study.metric}:\n\n" + _differences_table(table, per_seed, _rows_name(study)))
        parts.append(LEGEND)
    else:
        parts.append("No two cells share a seed with the control or with random: nothing is tested.")
    return "\n\n".join(parts) + "\n"


def _rows_name(study: PruningStudy) -> str:
    return "rows" if study.is_loss else "sentences"


def _nothing_learned(study: PruningStudy) -> list[str]:
    """Return a warning of the runs whose warm-up, or without one whose whole training, taught nothing."""
    judged = [run for run in study.runs if study.is_loss or run.items is not None]
    idle = [run for run in judged if run.is_idle]
    if not idle:
        return []
    moment = trained_moment(study.settings)
    evidence = f"accuracy {_MOMENT[moment]} {'pruning' if moment == 'before' else 'training'} is at chance"
    if study.is_loss:
        evidence = "loss before pruning is not below that without an adapter"
    subject = f"{len(idle)} of {len(judged)} runs"
    return [nothing_learned_text(subject, evidence, "What is pruned in them says nothing")]


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
    if control.by != "seeds":
        return (
            f"{what}, is {interval}: **unknown**. An interval over {control.by} speaks about these runs only; run "
            "three seeds or more."
        )
    if control.is_separated:
        return f"{what}, is {interval}: it separates. This sweep can see an effect of that size."
    could_find = f"; these {seeds} would find {control.detectable:.4f} or more" if control.detectable > 0 else ""
    n_different = int((table["t_p_holm"] < 0.05).sum()) if len(table) else 0
    return (
        f"{what}, is {interval}: it does not separate. **Underpowered**{could_find}. Below, no difference is no "
        "evidence of equality"
        + (
            f"; {n_different} of {len(table)} rows differ all the same (t test over seeds, adjusted p < 0.05)."
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


def _differences_table(table: pd.DataFrame, per_seed: pd.DataFrame, rows_name: str) -> str:
    """Write the differences, with those on ``rows_name`` where there are predictions, and McNemar where classes are."""
    has_sentences, has_classes = bool((table["n_sentences"] > 0).any()), rows_name == "sentences"
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
            is_floor = is_bootstrap_floor(row["bootstrap_p"], row["sentence_draws"])
            cells += [with_interval(row["sentence_difference"], low, high)]
            cells += [p_value(row["bootstrap_p_holm"], is_floor=is_floor)]
        if has_sentences and has_classes:
            exact = is_significant.get(tuple(row[name] for name in key))
            cells += ["" if exact is None else f"{int(exact.sum())} of {len(exact)}"]
        rows.append(cells)
    header += [f"on {rows_name}", "bootstrap p (Holm)"] if has_sentences else []
    return markdown_table(header + (["McNemar"] if has_sentences and has_classes else []), rows)


def _compared(moment: str, reference: str) -> list[str]:
    """Name the moment of a method, and its reference, with the moment of that where it is another."""
    other = REFERENCE_MOMENT[moment]
    return [(_MOMENT | _STATIC_MOMENT)[moment], reference if other == moment else f"{reference}, {_MOMENT[other]}"]
