"""The folder of a run: whose it is, which files in it are its own, and the record of both in ``run.json``."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from sparselora.errors import InputError
from sparselora.runs.files import leftovers, remove_leftovers, write_json
from sparselora.runs.process import stopped_by
from sparselora.runs.provenance import (
    commit,
    input_paths,
    portable,
    recorded_fingerprint,
    versions,
    without_folders,
)
from sparselora.runs.user_files import read_json

RECORD = "run.json"
NOTHING_LEARNED = "nothing_learned"
"""Note in the record of a training run whose adapter does not do clearly better than none: the warning, in words."""
STATUSES = ("running", "success", "cancelled", "failed")

_LOCK = ".lock"


# --- records ------------------------------------------------------------------------------------------------------


def read_record(folder: Path) -> dict[str, Any] | None:
    """The ``run.json`` in ``folder`` if it has the form of ours; None if there is none or it has another."""
    path = folder / RECORD
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        record = read_json(path, allow_nan=True)
    except (OSError, InputError):
        return None
    return record if _is_record(record) else None


def _is_record(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("command"), str)
        and isinstance(value.get("status"), str)
        and value["status"] in STATUSES
        and isinstance(value.get("arguments", {}), dict)
        and isinstance(value.get("outputs", []), list)
        and all(isinstance(name, str) for name in value.get("outputs", []))
    )


# --- places -------------------------------------------------------------------------------------------------------


def refuse_inputs_inside(folder: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Raise where ``folder``, which is written, is one of the ``inputs`` (name of the argument, path) or holds it.

    Raises:
        InputError: it is, or it does.
    """
    target = folder.resolve()
    for name, path in inputs:
        source = path.resolve()
        if source == target or target in source.parents:
            where = "is" if source == target else "holds"
            raise InputError(f"output folder {folder} {where} the input {name} {path}; use another output folder")


def missing_folders(folder: Path) -> list[Path]:
    """``folder`` and those above it that are not there, the deepest first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    for place in folders:
        with contextlib.suppress(OSError):
            place.rmdir()


# --- a run --------------------------------------------------------------------------------------------------------


class FolderTakenError(InputError):
    """An output folder holds, or is held by, something else: another folder would do."""


class RunFolder:
    """One run's folder and its ``run.json``.

    Use::

        run = RunFolder(
            out_dir, "inspect", arguments, inputs=("model",), outputs=OUTPUTS, seed=seed, overwrite=overwrite
        )
        if run.is_finished():
            print(run.finished_message()); return
        with run.reserved():
            model = load(...)  # whatever may refuse the input
            with run:
                write_csv(run.path("table.csv"), table)

    The ``with`` block records ``success``, ``cancelled`` (Ctrl-C) or ``failed`` with the error. A folder is held by one
    process at a time. What is in it and is not in the record of a run of the same command is never replaced.

    Args:
        arguments: those that decide the result (no output folder, no ``--overwrite``).
        inputs: the names of those that name files or folders, which `provenance.portable` knows by their content.
        reads: what else is read, name of the argument and path.
        outputs: all files that the run may write, as paths below the folder. They are on record as long as it runs, so
            that the leftover files of a killed run can be recognised.
        overwrite: replace a finished run of this command with other arguments.
    Raises:
        InputError: the folder is or holds an input; it has a ``run.json`` that is not ours, or of another command; it
            has files and no record (this alone yields to ``overwrite``).
    """

    def __init__(
        self,
        folder: str | Path,
        command: str,
        arguments: Mapping[str, object],
        *,
        inputs: Sequence[str] = (),
        reads: Iterable[tuple[str, Path]] = (),
        outputs: Iterable[str] = (),
        seed: int | None = None,
        device: str = "cpu",
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.command = command
        self.overwrite = overwrite
        self._outputs = set(outputs) - {RECORD}
        self._lock = FileLock(str(self.folder / _LOCK))
        self._holds = 0
        self._created: list[Path] = []
        # What costs nothing to find out comes before the hash of a model.
        self._previous = self._read()
        self._inputs = [*input_paths(arguments, inputs), *reads]
        refuse_inputs_inside(self.folder, self._inputs)
        self._refuse_unknown_files()
        recorded = portable(arguments, inputs)
        self.fingerprint = recorded_fingerprint(command, recorded)
        self._record: dict[str, Any] = {
            "command": command,
            "arguments": recorded,
            "fingerprint": self.fingerprint,
            "seed": seed,
            "device": device,
            "versions": versions(),
            "commit": commit(),
        }

    @property
    def outputs(self) -> frozenset[str]:
        """The files that the run may write, its record among them."""
        return frozenset(self._outputs | {RECORD})

    @property
    def inputs(self) -> list[tuple[str, Path]]:
        """Name of the argument and path for each file or folder that is read."""
        return list(self._inputs)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments as they are recorded: without paths of this machine."""
        return dict(self._record["arguments"])

    def is_finished(self) -> bool:
        """Return whether a run with the same arguments has already ended well here."""
        return not self.overwrite and self._is_same_run() and self._has_succeeded()

    def noted(self, name: str) -> Any:
        """Return what the previous run in this folder noted under ``name``; None without one."""
        return (self._previous or {}).get(name)

    def can_resume(self) -> bool:
        """Return whether a run with the same arguments was started here and did not end well."""
        return self._is_same_run() and not self._has_succeeded()

    def _is_same_run(self) -> bool:
        return self._previous is not None and self._previous["fingerprint"] == self.fingerprint

    def _has_succeeded(self) -> bool:
        return self._previous is not None and self._previous["status"] == "success"

    def finished_message(self) -> str:
        return f"{self.folder}: already finished with these arguments, nothing to do (--overwrite runs it again)"

    def path(self, name: str) -> Path:
        """Return the path of ``name`` (``"plots/a.png"``), which is one of `outputs`."""
        assert name in self.outputs, f"{name} was not announced as an output of {self.command}"
        return self.folder / name

    def note(self, **facts: object) -> None:
        """Add facts to ``run.json`` (written when the run ends)."""
        self._record.update(facts)

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Hold the folder while what is left of the input is checked, without a record.

        Another process is refused here, before it loads anything. Nothing is left behind if the run does not begin.

        Raises:
            InputError: the folder cannot be written, is held by another process, holds a finished run that is not to
                be overwritten, or holds a file of a name that the run would write and that no run recorded.
        """
        self._hold()
        try:
            yield
        finally:
            self._let_go()

    def __enter__(self) -> RunFolder:
        self._hold()
        try:
            self._remove_leftovers()
            if self.can_resume():
                self._outputs.update(self._previous_outputs())
            else:
                self._remove_previous_outputs()
            self._began = time.perf_counter()
            self._record["started"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self._save("running")
        except BaseException:
            self._let_go()
            raise
        self._created = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._record["wall_s"] = round(time.perf_counter() - self._began, 3)
        if error is None:
            status = "success"
        elif isinstance(error, KeyboardInterrupt) or stopped_by() is not None:
            status = "cancelled"
        else:
            status = "failed"
            self._record["error"] = without_folders(f"{type(error).__name__}: {error}")
        # What was announced and not written is not ours: a file of that name that comes later is somebody else's.
        self._outputs = {name for name in self._outputs if (self.folder / name).is_file()}
        try:
            self._save(status)
        finally:
            self._let_go()

    def _save(self, status: str) -> None:
        self._record["status"] = status
        self._record["outputs"] = sorted(self._outputs)
        write_json(self.folder / RECORD, self._record)

    # --- holding the folder

    def _hold(self) -> None:
        """Take the lock, once more if this object has it, and look at the folder under it."""
        if not self._holds:
            self._look()
            self._lock_folder()
        self._holds += 1
        try:
            # Once more: another process may have finished here between that look and the lock.
            self._look()
            for name in sorted(self._outputs):
                self._refuse_occupied(name)
        except BaseException:
            self._let_go()
            raise

    def _look(self) -> None:
        self._previous = self._read()
        self._refuse_unknown_files()
        self._refuse_finished()

    def _lock_folder(self) -> None:
        missing, lock = missing_folders(self.folder), self.folder / _LOCK
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._created = missing if lock.exists() else [lock, *missing]
            self._lock.acquire(timeout=0)
        except Timeout:
            raise FolderTakenError(
                f"output folder {self.folder} is in use by another process; wait for it or use another folder"
            ) from None
        except OSError as error:
            remove_empty(missing)
            raise InputError(
                f"output folder {self.folder} cannot be written ({error.strerror}); use another folder"
            ) from None

    def _let_go(self) -> None:
        """Release the lock at the last call, and remove what was made for a run that did not begin."""
        self._holds -= 1
        if self._holds:
            return
        for place in self._created:
            with contextlib.suppress(OSError):
                place.unlink() if place.name == _LOCK else place.rmdir()
        self._lock.release()

    # --- whose the folder is

    def _read(self) -> dict[str, Any] | None:
        """The record in the folder, None where there is none.

        Raises:
            InputError: the folder is a file, or the record is not ours or another command's.
        """
        path = self.folder / RECORD
        try:
            path.lstat()
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise InputError(f"output folder {self.folder} is a file; name a folder") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"output folder {self.folder} cannot be used ({reason}); name another") from None
        record = read_record(self.folder)
        if record is None or not isinstance(record.get("fingerprint"), str):
            raise FolderTakenError(
                f"output folder {self.folder} holds a {RECORD} that is damaged or no record of sparselora; move it "
                "away or use another folder"
            )
        if record["command"] != self.command:
            raise FolderTakenError(
                f"output folder {self.folder} holds a run of {record['command']}, this is {self.command}; use another "
                "folder (--overwrite replaces only runs of the same command)"
            )
        return record

    def _refuse_unknown_files(self) -> None:
        """Raise where there are files and no record, unless told to overwrite."""
        lock = self.folder / _LOCK
        if os.path.lexists(lock) and not (lock.is_file() and not lock.is_symlink() and lock.stat().st_size == 0):
            raise InputError(f"output folder {self.folder} holds a {_LOCK} that is not ours; use another folder")
        if self._previous is not None or self.overwrite or not self.folder.is_dir():
            return
        try:
            # Except for what a run of ours leaves when it is killed before its first record.
            own_files = {lock, *leftovers(self.folder, {RECORD})}
            unknown_files = set(self.folder.iterdir()) - own_files
        except OSError as error:
            raise InputError(f"output folder {self.folder} cannot be read ({error.strerror})") from None
        if unknown_files:
            raise FolderTakenError(
                f"output folder {self.folder} is not empty and no run is recorded in it; "
                "use --overwrite or another folder"
            )

    def _refuse_finished(self) -> None:
        if self._has_succeeded() and not self.overwrite:
            whose = "this run, already finished" if self._is_same_run() else "a finished run with other arguments"
            raise FolderTakenError(f"output folder {self.folder} holds {whose}; use --overwrite or another folder")

    def _refuse_occupied(self, name: str) -> None:
        """Raise where the output ``name`` would replace what no run of ours recorded, or would be written elsewhere."""
        place = self.folder
        for part in PurePosixPath(name).parts[:-1]:
            place = place / part
            if place.is_symlink() or (place.exists() and not place.is_dir()):
                what = "link" if place.is_symlink() else "file"
                raise InputError(
                    f"{place} is a {what}, and {name} would be written below it; move it away or use another folder"
                )
        target = self.folder / name
        if not os.path.lexists(target):
            return
        if target.is_symlink() or not target.is_file() or name not in self._previous_outputs():
            raise InputError(
                f"{target} is in the way: no run recorded it, and this one would write it; move it away or use "
                "another folder"
            )

    def _previous_outputs(self) -> set[str]:
        return set((self._previous or {}).get("outputs", []))

    def _remove_previous_outputs(self) -> None:
        for name in self._previous_outputs() - {RECORD}:
            target = self.folder / name
            if self._is_below(name) and not target.is_symlink() and not target.is_dir():
                target.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of a run that was killed."""
        by_folder: dict[Path, set[str]] = {self.folder: {RECORD}}
        for name in self._outputs | self._previous_outputs():
            if self._is_below(name):
                target = self.folder / name
                by_folder.setdefault(target.parent, set()).add(target.name)
        for folder, names in by_folder.items():
            remove_leftovers(folder, names)

    def _is_below(self, name: str) -> bool:
        """Return whether a recorded output is in this folder: not if the record was edited by hand, nor if a link has
        taken the place of a folder."""
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
            return False
        return (self.folder / name).parent.resolve() == self.folder.resolve().joinpath(*parts[:-1])
