"""The request for a run: what its folder is opened with, what a dry run prints, what a grid looks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselora.runs.folder import RunFolder
from sparselora.runs.provenance import portable, recorded_fingerprint


@dataclass(frozen=True)
class RunRequest:
    """A run of a command, checked and resolved, before anything is read or written."""

    command: str
    """Name of the command in the run's record."""
    folder: Path
    """The run's folder."""
    arguments: Mapping[str, object]
    """The arguments that decide the result."""
    outputs: tuple[str, ...]
    """Files that the run may write, as paths below its folder; the record may be left out."""
    settings: Mapping[str, object]
    """Names and values that a dry run prints."""
    inputs: tuple[str, ...] = ()
    """Names of the arguments that name files or folders."""
    reads: tuple[tuple[str, Path], ...] = ()
    """Further files or folders that are read: name of the argument, path."""
    shared_outputs: tuple[str, ...] = ()
    """Files next to the run's folder that all runs of a sweep write."""
    seed: int | None = None
    overwrite: bool = False
    """Replace a finished run with other arguments."""

    def recorded_arguments(self) -> dict[str, Any]:
        """Return the arguments as the run's record has them: inputs by name and content, no absolute path."""
        return portable(self.arguments, self.inputs)

    def fingerprint(self) -> str:
        """Return what the record of a run with the same arguments has for its fingerprint."""
        return recorded_fingerprint(self.command, self.recorded_arguments())

    def open(self) -> RunFolder:
        """Return the run's folder.

        Raises:
            InputError: as `RunFolder`.
        """
        return RunFolder(
            self.folder,
            self.command,
            self.arguments,
            inputs=self.inputs,
            reads=self.reads,
            outputs=self.outputs,
            seed=self.seed,
            overwrite=self.overwrite,
        )
