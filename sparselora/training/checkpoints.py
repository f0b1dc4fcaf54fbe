"""Checkpoints of a training run: renamed when they are whole, checked before use, removed by their own run alone.

A checkpoint is a folder ``checkpoint-STEP``. The last file written into it, `MANIFEST`, names the run, the step, and
every file with its size and hash: what has no manifest of this run is somebody else's and stays as it is, and what is
not as its manifest says was torn (by a power cut, a full disk) and is not resumed from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparselora.errors import InputError
from sparselora.runs.files import write_json

MANIFEST = "checkpoint.json"
PARTIAL = ".partial"
"""The folder next to the checkpoints in which the next one is written."""

KEPT = 2
"""Checkpoints of a run that stay."""

_NAME = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with a manifest; ``files`` maps each name to its size in bytes and its sha256."""

    path: Path
    step: int
    files: dict[str, tuple[int, str]]

    def fault(self) -> str | None:
        """Describe what is wrong with the files, in a few words; None where all are as they were written."""
        for name, (size, digest) in self.files.items():
            file = self.path / name
            if file.is_symlink() or not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes and not {size}"
            if _sha256(file) != digest:
                return f"{name} has other contents than were written"
        return None

    def remove(self) -> None:
        """Delete the files of the manifest, it and the folder if nothing else is in it."""
        for name in (*self.files, MANIFEST):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()


def partial_folder(folder: Path, step: int) -> Path:
    """Return the folder where the files of the checkpoint of ``step`` go until `finish_checkpoint`."""
    return folder / PARTIAL / f"checkpoint-{step}"


def clear_partial(folder: Path) -> None:
    """Remove what a kill in the middle of a checkpoint left."""
    for path in (folder / PARTIAL).glob("checkpoint-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    with contextlib.suppress(OSError):
        (folder / PARTIAL).rmdir()


def finish_checkpoint(folder: Path, step: int, run: str) -> None:
    """Put the checkpoint written into `partial_folder` in its place, safe from a power cut, and drop older ones.

    Raises:
        InputError: another's file or folder of its name has come there since the run began.
    """
    written, target = partial_folder(folder, step), folder / f"checkpoint-{step}"
    files = sorted(path for path in written.iterdir() if path.is_file())
    for path in files:
        _sync(path)
    listed = {path.name: [path.stat().st_size, _sha256(path)] for path in files}
    write_json(written / MANIFEST, {"run": run, "step": step, "files": listed})
    _sync(written / MANIFEST)
    _sync(written)
    earlier = _read(target, run)
    if earlier is not None:
        earlier.remove()
    if not os.path.lexists(target):
        written.rename(target)
    elif target.is_symlink() or not target.is_dir() or any((target / name).exists() for name in (*listed, MANIFEST)):
        raise InputError(f"{target} was not written by this run; move it away and use --resume")
    else:  # what is left of an earlier checkpoint of this run are files that somebody put into it
        for name in (*listed, MANIFEST):
            os.replace(written / name, target / name)
        written.rmdir()
    with contextlib.suppress(OSError):
        (folder / PARTIAL).rmdir()
    _sync(folder)
    passed = [checkpoint for checkpoint in own_checkpoints(folder, run) if checkpoint.step <= step]
    for checkpoint in passed[:-KEPT]:
        checkpoint.remove()


def own_checkpoints(folder: Path, run: str | None) -> list[Checkpoint]:
    """The checkpoints in ``folder`` that ``run`` wrote, by step; links are followed nowhere."""
    if run is None or folder.is_symlink() or not folder.is_dir():
        return []
    checkpoints = (_read(path, run) for path in folder.iterdir())
    return sorted((c for c in checkpoints if c is not None), key=lambda checkpoint: checkpoint.step)


def last_checkpoint(folder: Path, run: str) -> tuple[Checkpoint | None, list[str]]:
    """The latest whole checkpoint of ``run``, None without one; and a line for each later one that is torn."""
    torn: list[str] = []
    for checkpoint in reversed(own_checkpoints(folder, run)):
        fault = checkpoint.fault()
        if fault is None:
            return checkpoint, torn
        torn.append(f"{checkpoint.path.name} is not whole ({fault})")
    return None, torn


def remove_checkpoints(folder: Path, run: str | None) -> None:
    """Delete the checkpoints that ``run`` wrote, and the folder if nothing else is in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for checkpoint in own_checkpoints(folder, run):
        checkpoint.remove()
    clear_partial(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_place(folder: Path, runs: set[str], is_saved: Callable[[int], bool]) -> None:
    """Raise where checkpoints cannot be written into ``folder`` without touching what ``runs`` did not write.

    Args:
        is_saved: whether there will be a checkpoint of a step.
    Raises:
        InputError: the folder is a link or a file, or holds another's ``checkpoint-STEP`` of a step that will be saved.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder} is a {'link' if folder.is_symlink() else 'file'} and no folder; move it away")
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and is_saved(int(match[1])) and not any(_read(path, run) for run in runs):
            raise InputError(f"{path} was not written by this run and would be in its way; move it away")


def _read(path: Path, run: str) -> Checkpoint | None:
    """The checkpoint at ``path``; None where it is not one that ``run`` wrote there."""
    match = _NAME.fullmatch(path.name)
    if match is None or path.is_symlink() or not path.is_dir():
        return None
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
        if manifest["run"] != run or manifest["step"] != int(match[1]):
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if any(name in ("", ".", "..") or Path(name).name != name for name in files):
        return None
    return Checkpoint(path, int(match[1]), files)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until ``path``, a file or the entries of a folder, is on the disk; Windows cannot say."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
