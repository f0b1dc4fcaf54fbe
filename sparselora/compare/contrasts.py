"""Verdicts on the primary contrasts of a study, and the label on everything else.

The unit is the seed (of edits, the adapter): only over these does a difference speak about the method. Two hypotheses
of a contrast can be rejected: "there is no difference" by a paired t test, and, where a margin was named, "the
difference is at least the margin" by two one-sided ones. `step_down` adjusts both for the whole family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.compare.pairing import NAN, compare_values, detectable
from sparselora.compare.runs import Comparison, ComparisonReport, PairedValues
from sparselora.config.contrasts import Contrast, Study
from sparselora.numerics.stats import equivalence_p, step_down
from sparselora.report.markdown import markdown_table, number, p_value, with_interval

BETTER, WORSE, UNDECIDED, EQUIVALENT = "better", "worse", "undecided", "equivalent within"

EXPLORATORY = (
    "**Exploratory**: no contrasts were named before these runs, so nothing below is a verdict on a method. Intervals "
    "describe what was seen; p values count the tests of a table, not those that were not made."
)
_BEYOND = "Everything below was not named before the runs: it is exploratory."


def verdict(p_values: Sequence[float], difference: float, is_lower_better: bool, margin: str, alpha: float) -> str:
    """Return the verdict on a contrast.

    Args:
        p_values: adjusted, of "no difference" and, if there is a margin, of "at least the margin".
        margin: in words; empty without one.
    """
    if len(p_values) > 1 and p_values[1] <= alpha:
        return f"{EQUIVALENT} {margin}"
    if p_values[0] <= alpha:
        return BETTER if (difference < 0) == is_lower_better else WORSE
    return UNDECIDED


def contrast_table(study: Study, pairs: Callable[[Contrast], PairedValues]) -> pd.DataFrame:
    """Return a row per contrast: first minus second with a paired t interval, both tests, and the verdict.

    ``t_p`` is the p of "no difference", ``equivalence_p`` of "the difference is at least the margin" (NaN without
    one), each also adjusted by `step_down` over the family. ``detectable`` is the smallest mean difference that as many
    units with this spread find four times in five, before the adjustment.
    """
    rows: list[dict[str, Any]] = []
    p_values = []
    for contrast in study.contrasts:
        values = pairs(contrast)
        over = compare_values(values.first, values.second)
        size = contrast.margin_size
        tests = [over.t_p]
        if size is not None:
            tests.append(equivalence_p(values.first, values.second, size, is_relative=contrast.is_relative))
        p_values.append(tests)
        rows.append({
            "first": contrast.first,
            "second": contrast.second,
            "where": ", ".join(f"{name} {value}" for name, value in contrast.settings.items()),
            "endpoint": contrast.endpoint,
            "unit": values.unit,
            "n": over.n,
            "first_mean": float(np.mean(values.first)) if over.n else NAN,
            "second_mean": float(np.mean(values.second)) if over.n else NAN,
            "difference": over.mean_difference,
            "ci_low": over.ci_low,
            "ci_high": over.ci_high,
            "cohens_dz": over.cohens_dz,
            "detectable": detectable(values.first, values.second),
            "margin": contrast.margin_text,
            "t_p": over.t_p,
            "equivalence_p": tests[1] if len(tests) > 1 else NAN,
            "is_lower_better": values.is_lower_better,
        })  # fmt: skip
    for row, adjusted in zip(rows, step_down(p_values, study.family), strict=True):
        row["t_p_adjusted"] = adjusted[0]
        row["equivalence_p_adjusted"] = adjusted[1] if len(adjusted) > 1 else NAN
        is_lower_better = bool(row.pop("is_lower_better"))
        row["verdict"] = verdict(adjusted, row["difference"], is_lower_better, row["margin"], study.alpha)
    return pd.DataFrame(rows)


# --- the report ---------------------------------------------------------------------------------------------------

HOW_TO_READ = """\
**Primary contrasts** were named in the study's file; whether it was committed before the runs, its history shows. Each
is first minus second over seeds (of edits, over adapters), paired. *better* or *worse*: the t test of no difference has
an adjusted p of at most alpha. *equivalent within* a margin: two one-sided t tests reject a difference as large as the
margin. *undecided* is all the rest, and no evidence of equality. The p values are adjusted over the whole family of
contrasts (Holm; where a contrast has two hypotheses, of which one at most is true, it counts until both are rejected),
so the probability of any false verdict is at most alpha. Intervals are 95 % each, not adjusted."""


def contrast_section(study: Study, table: pd.DataFrame) -> str:
    """Write the section of the primary contrasts."""
    header = ["first", "second", "where", "endpoint", "n", "difference", "p", "margin", "equivalence p", "detectable"]
    rows = []
    for row in table.to_dict("records"):
        cells = [row["first"], row["second"], row["where"], row["endpoint"], f"{row['n']} {row['unit']}s"]
        cells += [with_interval(row["difference"], row["ci_low"], row["ci_high"]), p_value(row["t_p_adjusted"])]
        cells += [row["margin"], p_value(row["equivalence_p_adjusted"]), number(row["detectable"], ".4f")]
        rows.append([*cells, f"**{row['verdict']}**"])
    family = study.family or len(study.contrasts)
    parts = [
        "## Primary contrasts",
        f"Named in {study.name} (sha256 {study.sha256[:16]}): {len(table)} of a family of {family}, alpha "
        f"{study.alpha:g}. p values are adjusted over the family.",
        markdown_table([*header, "verdict"], rows),
        _BEYOND,
    ]
    return "\n\n".join(parts)


def with_contrasts(comparison: Comparison, study: Study | None) -> ContrastComparison:
    """Return ``comparison`` with the verdicts on the contrasts of ``study``; without one, labelled exploratory.

    Raises:
        InputError: the runs have no such sides, or no such endpoint.
    """
    table = None if study is None else contrast_table(study, comparison.paired_values)
    return ContrastComparison(comparison, study, table)


@dataclass(frozen=True)
class ContrastComparison:
    """A comparison with the contrasts that a study named for it; without any, everything in it is exploratory.

    Attributes:
        table: of `contrast_table`; None without a study.
    """

    comparison: Comparison
    study: Study | None
    table: pd.DataFrame | None

    @property
    def default_folder(self) -> Path:
        return self.comparison.default_folder

    @property
    def outputs(self) -> list[str]:
        return [*self.comparison.outputs, *([] if self.study is None else ["contrasts.csv"])]

    @property
    def inputs(self) -> Sequence[Path]:
        return self.comparison.inputs

    @property
    def files(self) -> Sequence[Path]:
        return self.comparison.files

    @property
    def baseline_label(self) -> str | None:
        return self.comparison.baseline_label

    def paired_values(self, contrast: Contrast) -> PairedValues:
        return self.comparison.paired_values(contrast)

    def report(self, seed: int) -> ComparisonReport:
        """Report the contrasts, then the comparison; ``seed`` is that of the bootstraps."""
        report = self.comparison.report(seed)
        if self.study is None or self.table is None:
            return replace(report, text=f"{EXPLORATORY}\n\n{report.text}")
        return replace(
            report,
            how_to_read=f"{HOW_TO_READ}\n\n{report.how_to_read}",
            text=f"{contrast_section(self.study, self.table)}\n\n{report.text}",
            tables={"contrasts.csv": self.table, **report.tables},
        )
