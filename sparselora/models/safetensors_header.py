"""The header of a safetensors file: names, types, shapes and places of its tensors, all of it checked."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sparselora.errors import InputError, printable, shown

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands in for one that was not fetched from Git LFS."""

_LARGEST_HEADER = 100_000_000  # the format's own limit

FLOAT_TYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "F64": ("float64", np.dtype("<f8")),
    "F32": ("float32", np.dtype("<f4")),
    "F16": ("float16", np.dtype("<f2")),
    "BF16": ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
    "F8_E4M3": ("float8_e4m3", np.dtype(ml_dtypes.float8_e4m3fn)),
    "F8_E5M2": ("float8_e5m2", np.dtype(ml_dtypes.float8_e5m2)),
}
"""The safetensors name of a floating type that is read → our name, and the numpy type its bytes are read as."""

_OTHER_DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8), "U8": ("uint8", 8), "I8": ("int8", 8), "U16": ("uint16", 16), "I16": ("int16", 16),
    "U32": ("uint32", 32), "I32": ("int32", 32), "U64": ("uint64", 64), "I64": ("int64", 64), "C64": ("complex64", 64),
    "F4": ("float4_e2m1", 4), "F6_E2M3": ("float6_e2m3", 6), "F6_E3M2": ("float6_e3m2", 6),
    "F8_E8M0": ("float8_e8m0", 8), "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
}  # fmt: skip
"""The other types of the format → our name, and bits an element."""

BITS = {code: 8 * raw.itemsize for code, (_, raw) in FLOAT_TYPES.items()} | {
    code: bits for code, (_, bits) in _OTHER_DTYPES.items()
}


class StoredTensor(NamedTuple):  # of which a file may have a million
    """One entry of a safetensors header; ``code`` is the format's name of the type, ``offset`` is of the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    def is_matrix(self) -> bool:
        return self.code in FLOAT_TYPES and len(self.shape) == 2 and 0 not in self.shape

    @property
    def dtype(self) -> str:
        return FLOAT_TYPES[self.code][0] if self.code in FLOAT_TYPES else _OTHER_DTYPES[self.code][0]

    def __str__(self) -> str:
        return f"{printable(self.name)} ({'x'.join(map(str, self.shape)) or 'scalar'} {self.dtype})"


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts ``layer.2`` before ``layer.10``."""
    key = []
    for i, part in enumerate(re.split(r"([0-9]+)", name)):
        digits = part.lstrip("0")
        key.append((1, len(digits), digits) if i % 2 else (0, 0, part))
    return key


def read_header(file: Path) -> list[StoredTensor]:
    """Read a safetensors file's header, in its order, and check everything in it.

    The format: eight bytes of length (little-endian), that much JSON, then the data without a gap or an overlap.
    """

    def broken(reason: str) -> InputError:
        where = f"{printable(file.name)} in model folder {file.parent.name}"
        return InputError(f"{where} is truncated or corrupt: {reason}; restore it")

    try:
        size = file.stat().st_size
        if not file.is_file():
            raise InputError(f"{printable(file.name)} in model folder {file.parent.name} is no file; restore it")
        with file.open("rb") as stream:
            first = stream.read(8)
            if first + stream.read(len(LFS_POINTER) - 8) == LFS_POINTER:
                raise InputError(
                    f"{printable(file.name)} in model folder {file.parent.name} is a Git-LFS pointer, not the "
                    "weights; run: git lfs pull"
                )
            stream.seek(8)
            if len(first) < 8:
                raise broken(f"{size} bytes are too few for a safetensors file")
            (length,) = struct.unpack("<Q", first)
            if length > min(size - 8, _LARGEST_HEADER):
                raise broken(f"its header would be {length} bytes long, the file has {size}")
            text = stream.read(length)
    except OSError as error:
        raise InputError(
            f"{printable(file.name)} in model folder {file.parent.name} cannot be read ({error.strerror})"
        ) from None
    entries = _entries(text, broken)
    stored, spans = [], []
    for name, entry in entries.items():
        dtype, shape, begin, stop = _entry(name, entry, broken)
        spans.append((begin, stop, name))
        stored.append(StoredTensor(name, dtype, shape, file, 8 + length + begin))
    spans.sort()
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise broken(f"{printable(name)} begins at byte {begin} of the data, where the one before ends at {end}")
        end = stop
    if 8 + length + end != size:
        raise broken(f"its header describes {8 + length + end} bytes, the file has {size}")
    return stored


def _entries(text: bytes, broken: Callable[[str], InputError]) -> dict[str, Any]:
    """The tensors of a header by name, without its metadata."""
    malformed = broken("its header is not what the format asks for")
    try:
        # Not by files.parse_json, which takes four times as long: a header may have a million entries.
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise malformed from None
    if not isinstance(header, dict):
        raise malformed
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise malformed
    return header


def _entry(name: str, entry: Any, broken: Callable[[str], InputError]) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, and first and last byte of one tensor of a header, checked against each other."""

    def are_counts(values: Any) -> bool:
        # `type`, for True is an int to isinstance.
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise broken(f"{printable(name)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise broken(f"{printable(name)} is of the type {shown(dtype)}, which the format does not have")
    if not are_counts(shape):
        raise broken(f"{printable(name)} has the shape {shown(shape)}, wanted whole numbers from 0")
    if not are_counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise broken(f"{printable(name)} lies at the bytes {shown(offsets)}, wanted a first and a last one")
    if 8 * (offsets[1] - offsets[0]) != math.prod(shape) * BITS[dtype]:
        raise broken(f"{printable(name)} is given {offsets[1] - offsets[0]} bytes for {shown(shape)} of {dtype}")
    return dtype, tuple(shape), offsets[0], offsets[1]
