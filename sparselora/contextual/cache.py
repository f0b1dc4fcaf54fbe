"""On-disk cache of tensors that are expensive to compute and depend only on weights, or on weights and data.

One safetensors file an entry, named by a hash of everything that the entry depends on. A file that is damaged, cut off
or not ours counts as absent: the value is computed again and the file replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparselora.errors import InputError
from sparselora.runs.cached_folder import default_folder
from sparselora.runs.files import replacing

VERSION = 1
"""Part of every key: raise it when what is stored, or how it is computed, changes."""

_PIECE = 1 << 24
"""Bytes that are hashed at a time."""

Tensors = dict[str, torch.Tensor]
Value = str | int | float | bool


def digest(*tensors: torch.Tensor | None) -> str:
    """sha256 (hexadecimal) of the tensors' dtypes, shapes and bytes, in their order; None counts as a value too.

    Values and not storage are hashed: a transposed view equals its contiguous copy, and a tensor on another device
    equals its copy here.
    """
    total = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            total.update(b"none;")
            continue
        total.update(f"{tensor.dtype}{tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        for piece in flat.view(torch.uint8).split(_PIECE):
            total.update(piece.clone().numpy().data)  # a copy: numpy would fix the memory of a weight that is freed
    return total.hexdigest()


def data_digest(batches: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """sha256 of calibration data: every tensor of every batch with its name, in batch order and by name within one."""
    total = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            total.update(f"{name}={digest(batch[name])};".encode())
        total.update(b"|")
    return total.hexdigest()


class Cache:
    """Entries in ``folder`` (default: `default_folder`), which is made when the first one is written.

    Nothing is kept where the default folder cannot be written; a folder given by name that cannot be is an error.

    Raises:
        InputError: ``folder`` was given and is no folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._asked_for = folder is not None
        self.folder = default_folder() if folder is None else Path(folder)
        if self._asked_for and self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"cache folder {self.folder} is a file; name a folder")

    def fetch(self, kind: str, parts: Mapping[str, Value], compute: Callable[[], Tensors]) -> Tensors:
        """The entry of ``kind`` for ``parts``, computed and kept if it is not there yet.

        Args:
            kind: a short word, the start of the file's name.
            parts: everything the value depends on, weights and data as `digest`.
            compute: gives named tensors; called only when they are not there.
        Returns:
            The tensors: on the CPU if they were read, where ``compute`` left them if not; equal bit for bit.
        Raises:
            InputError: a folder that was asked for cannot be written.
        """
        key = entry_key(kind, parts)
        if (tensors := self._read(kind, key)) is not None:
            return tensors
        computed = {name: tensor.detach() for name, tensor in compute().items()}
        self._write(kind, key, computed)
        return computed

    def path(self, kind: str, key: str) -> Path:
        return self.folder / f"{kind}-{key[:32]}.safetensors"

    def _read(self, kind: str, key: str) -> Tensors | None:
        try:
            with safe_open(self.path(kind, key), framework="pt") as stream:
                label = (stream.metadata() or {}).get("sparselora", "")
                # Copies: the file may be replaced by another process while its tensors live.
                tensors = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError):
            return None
        return tensors if label == _label(key, tensors) else None

    def _write(self, kind: str, key: str, tensors: Tensors) -> None:
        packed = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        path = self.path(kind, key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                save_file(packed, part, metadata={"sparselora": _label(key, packed)})
        except (OSError, SafetensorError) as error:
            if self._asked_for:
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())
                raise InputError(f"cache folder {self.folder} cannot be written ({reason}); name another") from None


def entry_key(kind: str, parts: Mapping[str, Value]) -> str:
    """sha256 of the kind, the parts by name, and `VERSION`."""
    return hashlib.sha256(json.dumps([VERSION, kind, dict(parts)], sort_keys=True).encode()).hexdigest()


def _label(key: str, tensors: Tensors) -> str:
    """The label that a file must carry: its key, and a hash of its names and values (safetensors itself has none)."""
    names = sorted(tensors)
    return f"{key} {','.join(names)} {digest(*(tensors[name] for name in names))}"
