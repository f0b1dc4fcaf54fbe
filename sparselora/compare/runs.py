"""Runs and groups of runs as every comparison sees them, whatever command made the runs.

One module per kind of run reads its files into `Run`s: `pruning_cells` (Phase C), `training_runs` and `gated_runs`
(`train`), `edits` (`edit`). What is compared with what stands next to them (`pruning_tables`, `edit_tables`), then the
page (`pruning_report`, `edit_report`). `pairing` has the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pandas as pd

from sparselora.config.contrasts import Contrast
from sparselora.errors import InputError, few, suggest
from sparselora.runs.folder import read_record


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        config: its settings, name → value.
        seed: what it is paired by.
        metrics: what was measured of the whole run, name → value; NaN where it was not.
        items: what was measured of each evaluation item: an index of row ids, a column per quantity. None without.
    """

    path: Path
    config: Mapping[str, Any]
    seed: int
    metrics: Mapping[str, Any]
    items: pd.DataFrame | None = field(repr=False)


AnyRun = TypeVar("AnyRun", bound=Run)


@dataclass(frozen=True)
class Group(Generic[AnyRun]):
    """The runs of one configuration, by seed in ascending order."""

    label: str
    runs: Mapping[int, AnyRun]

    def values(self, metric: str) -> list[float]:
        """Return a metric of every run, in the order of the seeds."""
        return [float(run.metrics[metric]) for run in self.runs.values()]


@dataclass(frozen=True)
class ComparisonReport:
    """The outcome of a comparison, ready to be written.

    Attributes:
        title: heading of the page.
        how_to_read: explanation of its columns, Markdown.
        text: its sections, Markdown; printed too.
        tables: file name → table.
        figures: file name → function that draws the figure at a path, with its data in a CSV of the same name.
    """

    title: str
    how_to_read: str
    text: str
    tables: Mapping[str, pd.DataFrame]
    figures: Mapping[str, Callable[[Path], None]]

    @property
    def page(self) -> str:
        """The whole page: how to read it, then its sections."""
        return f"# {self.title}\n\n{self.how_to_read}\n\n{self.text}"


@dataclass(frozen=True)
class PairedValues:
    """Values of the two sides of a contrast at the units that both have, in one order.

    Attributes:
        unit: ``seed`` or ``adapter``, of which each value has another.
        is_lower_better: True of a loss.
    """

    first: Sequence[float]
    second: Sequence[float]
    unit: str
    is_lower_better: bool


class Comparison(Protocol):
    """Runs of one kind that have been read and checked, before anything is computed."""

    @property
    def default_folder(self) -> Path:
        """The folder of the report unless the user names another."""

    @property
    def outputs(self) -> Sequence[str]:
        """Names of the files of the report."""

    @property
    def inputs(self) -> Sequence[Path]:
        """The table or the run folders that are compared."""

    @property
    def files(self) -> Sequence[Path]:
        """Everything that was read of the inputs; the comparison is identified by its content. Some may not exist."""

    @property
    def baseline_label(self) -> str | None:
        """Label of the baseline, where a user can choose it."""

    def paired_values(self, contrast: Contrast) -> PairedValues:
        """Return the values of the two sides of a contrast.

        Raises:
            InputError: the runs have no such sides, or no such endpoint.
        """

    def report(self, seed: int) -> ComparisonReport:
        """Compare; ``seed`` is that of the bootstraps."""


def check_endpoint(contrast: Contrast, endpoints: Iterable[str]) -> None:
    """Raise `InputError` where the endpoint of a contrast is none of ``endpoints``."""
    names = list(endpoints)
    if contrast.endpoint not in names:
        raise InputError(
            f"contrast {contrast.first} against {contrast.second}: these runs have no endpoint {contrast.endpoint!r}"
            f"{suggest(contrast.endpoint, names)} (they have {', '.join(names)})"
        )


def unknown_side(contrast: Contrast, side: str, known_sides: Iterable[str], what: str) -> InputError:
    """Return the error of a contrast whose ``side`` is among no runs; ``what`` the sides are."""
    names = list(known_sides)
    return InputError(
        f"contrast {contrast.first} against {contrast.second}: no {what} {side!r}{suggest(side, names)} "
        f"(there are {few(names, 20)})"
    )


def run_folders(path: Path, command: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folders of runs of ``command`` with their records: ``path`` itself, or those directly inside it."""
    candidates = [path] if (path / "run.json").is_file() else sorted(path.iterdir()) if path.is_dir() else []
    for folder in candidates:
        record = read_record(folder)
        if record is not None and record["command"] == command:
            yield folder, record


def has_runs(path: Path, command: str) -> bool:
    """Return whether ``path`` is the folder of a run of ``command``, or holds such folders."""
    return next(run_folders(path, command), None) is not None


def nothing_learned_text(subject: str, evidence: str, consequence: str) -> str:
    """Return one line of Markdown that warns of runs or adapters, the ``subject``, without effect."""
    cure = "train longer, on more rows or with another lr"
    return f"**Nothing was learned** by {subject}: {evidence}. {consequence}; {cure}."


def files_of(folders: Sequence[Path], *names: str) -> list[Path]:
    return [folder / name for folder in folders for name in names]
