"""Loss differences that a search of the frontier forecast from short pilots, next to those of full runs.

The full runs are of `train`; an arm, the name of their folders without the seed, is a candidate of the search. What a
forecast has to give is the order, so it is judged by its rank correlation (Spearman).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from sparselora.compare.pairing import compare_values
from sparselora.compare.runs import ComparisonReport, PairedValues
from sparselora.compare.training_runs import TrainingComparison, arm_name
from sparselora.config.contrasts import Contrast
from sparselora.errors import InputError, few
from sparselora.numerics.stats import rank_correlation
from sparselora.report.markdown import markdown_table, number, with_interval
from sparselora.runs.files import read_table

_DENSE = "dense"
"""The candidate and the arm that differences are taken to."""
_LESS_DATA = "dense for less time"
"""Verdict of the controls whose order is known: dense on less data. They would flatter the correlation."""
_LEAST = 2


def forecast_table(comparison: TrainingComparison, path: Path) -> pd.DataFrame:
    """Return a row per candidate that has full runs: its forecast loss difference to dense, and that of the full runs.

    Args:
        path: ``frontier.csv`` of a search.
    Raises:
        InputError: the file is no such table, or the runs lack dense or two of its candidates.
    """
    forecast = read_table(path, numbers=("difference",), texts=("candidate", "verdict"))
    forecast = forecast[forecast["difference"].notna() & ~forecast["verdict"].isin([_LESS_DATA])]
    arms = {arm_name(run) for run in comparison.runs}
    candidates = forecast[forecast["candidate"].isin(arms - {_DENSE})]
    if _DENSE not in arms or len(candidates) < _LEAST:
        names = sorted(set(forecast["candidate"]) - {_DENSE})
        raise InputError(
            f"{path.name} is checked by runs of {_DENSE} and at least {_LEAST} of its candidates ({few(names, 20)}), "
            f"and these runs are named {few(sorted(arms), 20)}"
        )
    rows = []
    for row in candidates.to_dict("records"):
        values = comparison.paired_values(Contrast(first=row["candidate"], second=_DENSE, endpoint="loss"))
        pairs = compare_values(values.first, values.second)
        rows.append({
            "candidate": row["candidate"], "forecast": row["difference"], "seeds": pairs.n,
            "difference": pairs.mean_difference, "ci_low": pairs.ci_low, "ci_high": pairs.ci_high,
        })  # fmt: skip
    table = pd.DataFrame(rows)
    if not table["seeds"].all():
        raise InputError(f"{few(table.loc[table['seeds'] == 0, 'candidate'], 20)} has no seed that {_DENSE} has")
    return table.sort_values("forecast", kind="stable", ignore_index=True)


def forecast_section(table: pd.DataFrame, path: Path) -> str:
    """Write the section of the forecast."""
    correlation = rank_correlation(table["forecast"], table["difference"])
    rows = [
        [row["candidate"], number(row["forecast"], "+.4f"),
         with_interval(row["difference"], row["ci_low"], row["ci_high"]), f"{row['seeds']} seeds"]
        for row in table.to_dict("records")
    ]  # fmt: skip
    shown = "undefined, for all of one side are equal" if pd.isna(correlation) else f"{correlation:+.2f}"
    return "\n\n".join([
        f"## Forecast of {path.name}",
        "Loss minus dense's, nats per label: forecast from the pilots of the search, and of these full runs. Rank "
        f"correlation (Spearman) **{shown}**, n = {len(table)} candidates.",
        markdown_table(["candidate", "forecast", "full runs", "over"], rows),
    ])  # fmt: skip


@dataclass(frozen=True)
class ForecastComparison:
    """A comparison of full runs, and the forecast that a search made for them.

    Attributes:
        path: ``frontier.csv`` of the search.
        table: of `forecast_table`.
    """

    comparison: TrainingComparison
    path: Path
    table: pd.DataFrame

    @classmethod
    def read(cls, comparison: TrainingComparison, path: Path) -> ForecastComparison:
        return cls(comparison, path, forecast_table(comparison, path))

    @property
    def default_folder(self) -> Path:
        return self.comparison.default_folder

    @property
    def outputs(self) -> list[str]:
        return [*self.comparison.outputs, "forecast.csv"]

    @property
    def inputs(self) -> Sequence[Path]:
        return self.comparison.inputs

    @property
    def files(self) -> list[Path]:
        return [*self.comparison.files, self.path]

    @property
    def baseline_label(self) -> str:
        return self.comparison.baseline_label

    def paired_values(self, contrast: Contrast) -> PairedValues:
        return self.comparison.paired_values(contrast)

    def report(self, seed: int) -> ComparisonReport:
        """Report the forecast, then the comparison."""
        report = self.comparison.report(seed)
        text = f"{forecast_section(self.table, self.path)}\n\n{report.text}"
        return replace(report, text=text, tables={"forecast.csv": self.table, **report.tables})
