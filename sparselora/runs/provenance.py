"""The identity of a run: its arguments, the content of the files that they name, the versions and the commit.

Nothing here names a place on this machine: a file or folder that is there is recorded by its name and a content hash.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import stat
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparselora import __version__
from sparselora.runs.cached_folder import default_folder
from sparselora.runs.files import write_text
from sparselora.runs.user_files import expand_user

_PACKAGES = ("numpy", "scipy", "pandas", "torch", "transformers", "peft", "datasets", "accelerate", "safetensors")
_BLOCK = 1 << 22
_SMALL = 1 << 24
"""Bytes up to which a named file is read whatever it is called; above, it must be called like a model or a table."""
_CACHED = 1 << 26
"""Bytes from which on a hash is kept, in the user's cache too: 0.7 s of each run for a GB of weights."""
_SETTLED_NS = 2_000_000_000
"""Nanoseconds since the last change of a file after which its next one has another time, however coarse the clock of
its file system is. A hash is kept in the user's cache from then on."""

_DATA_KINDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
_DATA_ENDS = (*_DATA_KINDS, *(f"{kind}.gz" for kind in _DATA_KINDS))
_MODEL_ENDS = (".safetensors", ".bin", ".pt", ".json", ".txt", ".model", ".jinja", ".py")
_MODEL_SIGNS = ("config.json", "adapter_config.json")


# --- content ------------------------------------------------------------------------------------------------------


def content_hash(path: Path) -> str | None:
    """Hexadecimal sha256 of what a run reads from ``path``; None where that is nothing.

    A regular file counts whole. Of a folder, the files of a model or an adapter count, or else its tables and those in
    its sub-folder ``data``; names are part of the hash. Nothing else is opened: no device, pipe or socket, no large
    file that is neither a model nor a table, no folder below.
    """
    if path.is_dir():
        files = files_read(path)
        if not files:
            return None
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.relative_to(path).as_posix()} {_file_hash(file)}\n".encode())
        return digest.hexdigest()
    return _file_hash(path) if _is_readable(path) else None


def files_hash(paths: Iterable[Path]) -> str:
    """The first sixteen digits of the sha256 of the names and contents of ``paths``, without those that are not
    there."""
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(f"{path.parent.name}/{path.name} {_file_hash(path)}\n".encode())
    return digest.hexdigest()[:16]


def files_read(folder: Path) -> list[Path]:
    """The files of a model in ``folder``, or its tables, in the order of their names."""
    entries = _regular_files(folder)
    if any(entry.name in _MODEL_SIGNS or entry.suffix == ".safetensors" for entry in entries):
        return [entry for entry in entries if entry.name.endswith(_MODEL_ENDS)]
    entries += _regular_files(folder / "data")
    return [entry for entry in entries if entry.name.endswith(_DATA_ENDS)]


def _regular_files(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_file())
    except OSError:
        return []


def _is_readable(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    named = path.name.lower().endswith((*_DATA_ENDS, *_MODEL_ENDS, ".gguf"))
    return stat.S_ISREG(status.st_mode) and (named or status.st_size <= _SMALL)


def _file_hash(path: Path) -> str:
    status = path.stat()
    if status.st_size < _CACHED:
        return _sha256(path, status.st_size)
    return _large_file_hash(str(path.resolve()), _identity(status))


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Numbers of a file of which one changes with its content. The last no program can set back."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.cache
def _large_file_hash(path: str, identity: tuple[int, ...]) -> str:
    name = hashlib.sha256(repr((path, identity)).encode()).hexdigest()[:32]
    entry = default_folder() / "hashes" / name
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", text := entry.read_text()):
            return text
    is_settled = time.time_ns() - max(identity[-2:]) > _SETTLED_NS
    digest = _sha256(Path(path), identity[2])
    if is_settled:
        with contextlib.suppress(OSError):  # a cache that cannot be written saves no time, and costs nothing
            write_text(entry, digest)
    return digest


def _sha256(path: Path, size: int) -> str:
    """sha256 of the first ``size`` bytes, which is all of a file that does not grow under the reader."""
    digest, block = hashlib.sha256(), memoryview(bytearray(min(_BLOCK, size)))
    with path.open("rb", buffering=0) as stream:
        while size > 0 and (count := stream.readinto(block[: min(len(block), size)])):
            digest.update(block[:count])
            size -= count
    return digest.hexdigest()


# --- arguments ----------------------------------------------------------------------------------------------------


def portable(arguments: Mapping[str, Any], inputs: Iterable[str] = ()) -> dict[str, Any]:
    """``arguments`` as they may stand in a committed file.

    Args:
        inputs: the names of those that name files or folders. A value that is there becomes its name and the first
            sixteen digits of its `content_hash`; an absolute one that is not becomes its last part. Every other
            argument stays as it is: a text with a slash is a text.
    """
    declared = frozenset(inputs)
    return {name: _recorded_path(value) if name in declared else value for name, value in arguments.items()}


def _recorded_path(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_recorded_path(item) for item in value]
    if not isinstance(value, (str, Path)) or value == "":
        return value
    path = expand_user(value)
    if _exists(path):
        content = content_hash(path)
        named = {"name": path.resolve().name}
        return named if content is None else {**named, "sha256": content[:16]}
    if path.is_absolute():
        return path.name
    return value if isinstance(value, str) else path.as_posix()


def input_paths(arguments: Mapping[str, Any], inputs: Iterable[str]) -> list[tuple[str, Path]]:
    """Name of the argument and path for each of the ``inputs`` that is there."""
    named = []
    for name in inputs:
        value = arguments.get(name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, (str, Path)) and item != "" and _exists(expand_user(item)):
                named.append((name, expand_user(item)))
    return named


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL in it
        return False


def fingerprint(command: str, arguments: Mapping[str, Any], inputs: Iterable[str] = ()) -> str:
    """Twelve hexadecimal digits that are equal when two runs of ``command`` have the same `portable` arguments."""
    return recorded_fingerprint(command, portable(arguments, inputs))


def recorded_fingerprint(command: str, arguments: Mapping[str, Any]) -> str:
    """`fingerprint` of arguments that are `portable` already."""
    text = json.dumps([command, dict(sorted(arguments.items()))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def without_folders(text: str) -> str:
    """``text`` with every absolute path in it cut down to its last part."""
    return re.sub(r"(?<![\w./\\])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\":]+[/\\])*(?=[\w.])", "", text)


def model_stem(name: str) -> str:
    """The name of a model or a table for the name of a folder: its last part, up to the first dot behind its start."""
    path = expand_user(name)
    last = path.resolve().name if _exists(path) else path.name
    head, _, _ = last.lstrip(".").partition(".")
    return head


# --- versions -----------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    installed = {"python": platform.python_version(), "sparselora": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def commit() -> str | None:
    """Return the project's commit, ``+`` where the tree differs from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, ["rev-parse", "--short=12", "HEAD"])
        changes = _git(root, ["status", "--porcelain", "-uno"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")


def _git(root: Path, words: Sequence[str]) -> str:
    # Without optional locks: reading the state must not write into the repository.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(
        ["git", *words], cwd=root, capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()
