"""The copy of a run's report in a file that the user names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from sparselora.errors import InputError
from sparselora.runs.files import write_text
from sparselora.runs.folder import RECORD, RunFolder, missing_folders, read_record, remove_empty
from sparselora.runs.provenance import files_read


class CopyOfReport:
    """A copy of one of a run's outputs in a file that the user names; without such a file, nothing.

    That the file may and can be written is checked when this is made, before any work.

    Args:
        path: the file, None for no copy.
        flag: the flag that names it.
        run: whose output ``name`` is copied.
    Raises:
        InputError: ``path`` is a folder, link or device; it is an input, or a file of a run; it exists and is neither
            to be overwritten nor what a finished run would copy there; it cannot be written.
    """

    def __init__(self, path: str | Path | None, flag: str, run: RunFolder, name: str) -> None:
        self.path = None if path is None else Path(path)
        self.source = run.folder / name
        if self.path is not None:
            self._check(self.path, flag, run)

    def _check(self, path: Path, flag: str, run: RunFolder) -> None:
        for argument, source in run.inputs:
            if path.resolve() == source.resolve() or (source.is_dir() and path in files_read(source)):
                raise InputError(f"{flag} {path} is or belongs to the input {argument}; use another name")
        if path.is_dir():
            raise InputError(f"{flag} {path} is a folder; name a file")
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{flag} {path} is no regular file; use another name")
        if path.resolve() in {run.folder.resolve() / output for output in run.outputs}:
            raise InputError(f"{flag} {path} is a file of this run; use another name")
        for parent in path.resolve().parents:
            record = read_record(parent)
            written = () if record is None else (RECORD, *record.get("outputs", []))
            if path.resolve().relative_to(parent).as_posix() in written:
                raise InputError(f"{flag} {path} is a file of the run in {parent.name}; use another name")
        holds_the_same = run.is_finished() and path.is_file() and path.read_bytes() == self._text().encode()
        if path.exists() and not run.overwrite and not holds_the_same:
            raise InputError(f"{flag} {path} exists; use --overwrite or another name")
        try:
            with _folders(path.parent):
                probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                probe.touch(exist_ok=False)
                probe.unlink()
        except OSError as error:
            raise InputError(f"{flag} {path} cannot be written ({error.strerror}); use another name") from None

    def _text(self) -> str:
        try:
            return self.source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise InputError(
                f"{self.source.name} is gone from the finished run in {self.source.parent}; use --overwrite"
            ) from None

    def write(self) -> None:
        """Write the copy, and its folder where there is none."""
        if self.path is None:
            return
        write_text(self.path, self._text())


@contextlib.contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """Make ``folder`` for the block; those that were not there are removed again, unless something is in them."""
    missing = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        remove_empty(missing)
