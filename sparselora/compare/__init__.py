"""Comparison of two or more groups of runs: pruning cells, training runs, gated runs, edits.

Each kind of run has one module that reads it and says what is compared with what; `runs` and `pairing` are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparselora.compare.contrasts import ContrastComparison, with_contrasts
from sparselora.compare.edit_report import EditComparison
from sparselora.compare.forecast import ForecastComparison
from sparselora.compare.gated_runs import has_gated_runs, read_gated_runs
from sparselora.compare.pruning_report import PruningComparison
from sparselora.compare.runs import Comparison, has_runs
from sparselora.compare.training_runs import TrainingComparison, read_runs
from sparselora.config.contrasts import Study
from sparselora.errors import InputError

__all__ = ["Comparison", "read_comparison"]


def read_comparison(
    paths: Sequence[Path], baseline: Path | None = None, study: Study | None = None, forecast: Path | None = None
) -> ContrastComparison:
    """Read what is to be compared: of which kind the runs are is read from the first path.

    Args:
        paths: the results.csv of a sweep or the folder that holds it; run folders of `train`, or of `edit`, or
            folders that hold them.
        baseline: a run of `train` that the others are compared with.
        study: the contrasts that were named before the runs; without them the comparison is exploratory.
        forecast: the table of a search of the frontier, whose candidates are arms of these runs of `train`.
    Raises:
        InputError: the runs cannot be compared, ``baseline`` or ``forecast`` is not for runs of their kind, or they
            lack a side of a contrast or the candidates of the forecast.
    """
    comparison = _read(paths, baseline)
    if forecast is not None:
        if not isinstance(comparison, TrainingComparison):
            raise InputError("--forecast is for runs of train without a novelty gate; leave it out")
        comparison = ForecastComparison.read(comparison, forecast)
    return with_contrasts(comparison, study)


def _read(paths: Sequence[Path], baseline: Path | None) -> Comparison:
    if has_runs(paths[0], "edit"):
        if baseline is not None:
            raise InputError("--baseline is for runs of train; an edit is compared with its own unedited adapter")
        return EditComparison.read(paths)
    if len(paths) == 1 and baseline is None and not has_runs(paths[0], "train"):
        return PruningComparison.read(paths[0])
    comparison = read_runs(paths, baseline)
    return read_gated_runs(comparison) if has_gated_runs(comparison) else comparison
