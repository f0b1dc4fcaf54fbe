"""The user's cache, and folders in it that are made once, whole or not at all, whatever number of processes asks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from sparselora.errors import InputError
from sparselora.runs.files import sync_folder

FOLDER_VARIABLE = "SPARSELORA_CACHE"


def default_folder() -> Path:
    """``$SPARSELORA_CACHE``, else ``sparselora`` in ``$XDG_CACHE_HOME``, else ``~/.cache/sparselora``."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "sparselora"


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` of the cache, which ``fill`` writes the first time.

    Of several processes one fills it and the others wait. It is written under another name and renamed, so that it is
    whole if it is there.

    Args:
        fill: writes files directly in the empty folder that it is given.
    Raises:
        InputError: the cache cannot be written.
    """
    folder = default_folder() / name
    if folder.is_dir():
        return folder
    part = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return folder
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            part.mkdir()
            try:
                fill(part)
                for file in part.iterdir():
                    with file.open("rb+") as stream:
                        os.fsync(stream.fileno())
                os.replace(part, folder)
                sync_folder(folder.parent)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"cache folder {default_folder()} cannot be written ({error.strerror or error}); set {FOLDER_VARIABLE} to "
            "a folder that can"
        ) from None
    return folder
