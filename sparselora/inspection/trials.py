"""Phase A: trials on random matrices whose structure is known, their tables and figures."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from sparselora.inspection import trial_tables as tables
from sparselora.inspection.matrix_errors import TrialSettings, measure_trials
from sparselora.runs.files import write_csv
from sparselora.runs.folder import RunFolder

OUTPUTS = (
    "run.json", "toy_results_per_trial.csv", "toy_results_agg.csv", "toy_results_stats.csv", "toy_optimal_rank.csv",
    "rank_k_comparison.png", "column_prune_comparison.png", "rank_error_curves.png", "rank_error_curves.csv",
)  # fmt: skip
"""The files of a run."""


@dataclass(frozen=True)
class TrialResults:
    """Tables over the trials: means per rank, paired tests, and the least rank of each target error."""

    summary: pd.DataFrame
    tests: pd.DataFrame
    optimal_ranks: pd.DataFrame


def run_trials(settings: TrialSettings, folder: RunFolder) -> TrialResults:
    """Measure the trials, and write tables and figures into the open ``folder``."""
    table, tails = measure_trials(settings)
    curve = tables.error_curve(settings, tails)
    results = TrialResults(
        tables.summarise(settings, table), tables.compare(table), tables.optimal_ranks(settings, tails)
    )
    write_csv(folder.path("toy_results_per_trial.csv"), table)
    write_csv(folder.path("toy_results_agg.csv"), results.summary)
    write_csv(folder.path("toy_results_stats.csv"), results.tests)
    write_csv(folder.path("toy_optimal_rank.csv"), results.optimal_ranks)

    from sparselora.report import toy as figures

    shape, subtitle = (settings.n, settings.m), settings.subtitle
    figures.rank_k_comparison(folder.path("rank_k_comparison.png"), subtitle, shape, results.summary)
    figures.column_prune_comparison(folder.path("column_prune_comparison.png"), subtitle, shape, results.summary)
    figures.rank_error_curves(folder.path("rank_error_curves.png"), subtitle, curve, results.optimal_ranks)
    return results
