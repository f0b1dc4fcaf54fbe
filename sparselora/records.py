"""What a run leaves behind: a folder with ``run.json``, CSV files and figures, and one ``results.csv`` a sweep shares.

Every file is written beside its place and renamed into it, so a kill at any moment leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sparselora import __version__
from sparselora.errors import InputError
from sparselora.files import read_json_object
from sparselora.process import stopped_by

if TYPE_CHECKING:
    import pandas as pd  # at run time only where a table is read or built: Phase B imports it while it computes

_PACKAGES = ("numpy", "scipy", "pandas", "torch", "transformers", "peft", "datasets", "accelerate", "safetensors")
_SMALL_FILE = 1 << 20


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; renamed onto it when the block ends well, removed when it does not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """``frame`` as CSV without its index; floats keep every digit, line ends are ``\\n`` on every system."""
    with replacing(path) as part:
        frame.to_csv(part, index=False, lineterminator="\n")


def upsert_row(path: Path, row: Mapping[str, object], key: str = "run_id") -> None:
    """Add ``row`` to the CSV at ``path``, in place of any row with the same ``key``.

    Safe for parallel writers (a file lock, released by the system when its holder dies) and against a kill (the file
    is replaced whole). A sweep's table is small, so rewriting it costs less than a torn last line.

    Raises:
        InputError: the folder cannot be written, or the file is no table with the columns of ``row``, in their order:
            it was not written by this command.
    """
    import pandas as pd

    # Texts in, texts out: rows that other processes wrote pass through this one untouched.
    cells = {name: "" if value is None else str(value) for name, value in row.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            old = read_rows(path, tuple(cells))
            table = pd.concat([old[old[key] != cells[key]], pd.DataFrame([cells])], ignore_index=True)
            # Whoever holds the lock is the only writer: a temporary file is the leaving of one that was killed.
            for leaving in path.parent.glob(f".{path.name}.*.tmp"):
                leaving.unlink(missing_ok=True)
            write_csv(path, table)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); use another output folder") from None


def read_rows(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The table that `upsert_row` keeps at ``path``, all cells as text; without rows where there is none yet.

    Raises:
        InputError: the file has other columns than ``columns`` in their order.
    """
    import pandas as pd

    table = _read_texts(path) if path.exists() else pd.DataFrame(columns=list(columns), dtype=str)
    if list(table.columns) != list(columns):
        other = sorted(set(table.columns) ^ set(columns)) or ["the same ones in another order"]
        raise InputError(
            f"{path.name} has other columns than this version writes ({', '.join(other[:5])}); move it away"
        )
    return table


def _read_texts(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} is not a CSV table ({' '.join(str(error).split())}); move it away") from None


def _content_hash(path: Path) -> str:
    """sha256 of a file; of a folder: of the names, sizes and last parts of its files, of small ones the whole."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as stream:
            while block := stream.read(_SMALL_FILE):
                digest.update(block)
        return digest.hexdigest()
    for entry in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{entry.relative_to(path).as_posix()} {entry.stat().st_size}\n".encode())
        with entry.open("rb") as stream:  # two adapters of one configuration differ in their weights alone
            stream.seek(max(0, entry.stat().st_size - _SMALL_FILE))
            digest.update(stream.read())
    return digest.hexdigest()


def _portable(value: Any) -> Any:
    """``value`` as it may stand in a committed file: an existing path becomes its name and a content hash."""
    if isinstance(value, (list, tuple)):
        return [_portable(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _portable(item) for name, item in value.items()}
    if isinstance(value, Path) or (isinstance(value, str) and _names_a_path(value)):
        path = Path(value)
        if path.exists():
            return {"name": path.resolve().name, "sha256": _content_hash(path)[:16]}
        if path.is_absolute():
            return path.name
        return path.as_posix()
    return value


def _names_a_path(text: str) -> bool:
    """Whether an argument is a path. A plain word is one where it names a table or a model here: another folder that
    happens to be called like a method or a family must not turn that into a path."""
    if "/" in text or os.sep in text:
        return True
    path = Path(text)
    return bool(path.suffix and path.is_file()) or any(
        (path / name).is_file() for name in ("config.json", "adapter_config.json") if text
    )


def _without_folders(text: str) -> str:
    """``text`` with every absolute path in it cut down to its last part."""
    return re.sub(r"(?<![\w./\\])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\":]+[/\\])*(?=[\w.])", "", text)


def fingerprint(command: str, arguments: Mapping[str, object]) -> str:
    """Twelve hexadecimal digits that are equal when two runs of ``command`` have the same (portable) arguments."""
    text = json.dumps([command, {name: _portable(arguments[name]) for name in sorted(arguments)}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "sparselora": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    """The project's commit, ``+`` where the tree differs from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


class RunFolder:
    """One run's folder and its ``run.json``.

    Use::

        run = RunFolder(out_dir, "toy_experiment", arguments, seed=args.seed, overwrite=args.overwrite)
        if run.is_finished():
            print(run.finished_message()); return
        with run:
            write_csv(run.path("table.csv"), table)

    ``arguments`` are those that decide the result (no output folder, no ``--overwrite``). The ``with`` block records
    ``success``, ``cancelled`` (Ctrl-C) or ``failed`` with the error. A folder is held by one process at a time.

    Raises:
        InputError: the folder cannot be written, is held by another process, holds a finished run with other
            arguments, or holds files that no run of ours recorded (the last two yield to ``overwrite``).
    """

    def __init__(
        self,
        folder: str | Path,
        command: str,
        arguments: Mapping[str, object],
        *,
        seed: int | None = None,
        device: str = "cpu",
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.command = command
        self.fingerprint = fingerprint(command, arguments)
        self.overwrite = overwrite
        self._record: dict[str, Any] = {
            "command": command,
            "arguments": {name: _portable(value) for name, value in arguments.items()},
            "fingerprint": self.fingerprint,
            "seed": seed,
            "device": device,
            "versions": _versions(),
            "commit": _commit(),
        }
        self._outputs: set[str] = set()
        self._lock = FileLock(str(self.folder / ".lock"))
        self._previous = self._read()

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / "run.json"
        try:
            path.stat()
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise InputError(f"output folder {self.folder} is a file; name a folder") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"output folder {self.folder} cannot be used ({reason}); name another") from None
        return read_json_object(path, remedy="move it away", allow_nan=True)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments as they are recorded: without paths of this machine."""
        return dict(self._record["arguments"])

    def is_finished(self) -> bool:
        """Whether a run with the same arguments has already ended well here."""
        return not self.overwrite and self._same_run("success")

    def noted(self, name: str) -> Any:
        """What the previous run in this folder noted under ``name``; None if there was none, or it did not."""
        return (self._previous or {}).get(name)

    def can_resume(self) -> bool:
        """Whether a run with the same arguments was started here and did not end well."""
        return (
            self._previous is not None
            and self._previous.get("fingerprint") == self.fingerprint
            and not self._same_run("success")
        )

    def _same_run(self, status: str) -> bool:
        previous = self._previous
        return (
            previous is not None
            and previous.get("status") == status
            and previous.get("fingerprint") == self.fingerprint
        )

    def finished_message(self) -> str:
        return f"{self.folder}: already finished with these arguments, nothing to do (--overwrite runs it again)"

    def path(self, name: str) -> Path:
        """Where to write the output ``name`` (``"plots/a.png"``); it is recorded as this run's, its folder is made."""
        self._outputs.add(name)
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def note(self, **facts: object) -> None:
        """Add facts to ``run.json`` (written when the run ends)."""
        self._record.update(facts)

    def __enter__(self) -> RunFolder:
        self._claim()
        self._began = time.perf_counter()
        self._record["started"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            self._save("running")
        except BaseException:
            self._lock.release()
            raise
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
            self._record["error"] = _without_folders(f"{type(error).__name__}: {error}")
        try:
            self._save(status)
        finally:
            self._lock.release()

    def _save(self, status: str) -> None:
        self._record["status"] = status
        self._record["outputs"] = sorted(self._outputs)
        write_json(self.folder / "run.json", self._record)

    def _claim(self) -> None:
        self._previous = self._read()
        self._refuse_foreign()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"output folder {self.folder} is in use by another process; wait for it or use another folder"
            ) from None
        except OSError as error:
            raise InputError(
                f"output folder {self.folder} cannot be written ({error.strerror}); use another folder"
            ) from None
        try:
            # Once more: another process may have finished here between that look and the lock.
            self._previous = self._read()
            self._refuse_foreign()
            if self.can_resume():
                self._outputs.update((self._previous or {}).get("outputs", []))
            else:
                self._remove_previous_outputs()
        except BaseException:
            self._lock.release()
            raise

    def _refuse_foreign(self) -> None:
        """Raise for a folder whose contents are not this run's to replace, unless told to overwrite."""
        if self.overwrite:
            return
        if self._previous is None:
            if self.folder.is_dir() and self._strangers():
                raise InputError(
                    f"output folder {self.folder} is not empty and no run is recorded in it; "
                    "use --overwrite or another folder"
                )
        elif self._previous.get("status") == "success":
            whose = "this run, already finished" if self._same_run("success") else "a finished run with other arguments"
            raise InputError(f"output folder {self.folder} holds {whose}; use --overwrite or another folder")

    def _strangers(self) -> bool:
        """Whether anything is here but what a run of ours leaves when it is killed before its first record."""
        return any(
            entry.name != ".lock" and not (entry.name.startswith(".") and entry.name.endswith(".tmp"))
            for entry in self.folder.iterdir()
        )

    def _remove_previous_outputs(self) -> None:
        for name in (self._previous or {}).get("outputs", []):
            target = self.folder / name
            # A record that was edited by hand must not delete anything outside its own folder.
            if self.folder.resolve() in target.resolve().parents:
                target.unlink(missing_ok=True)
