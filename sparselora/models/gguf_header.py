"""Header of a GGUF file: the model's architecture, its tensors and how they are quantised. No weights are read.

The format (version 2 and 3, little-endian): the magic ``GGUF``, the version, the numbers of tensors and of key–value
pairs; then the pairs, then a name, dimensions, type and offset for each tensor, then the data, aligned. Everything is
checked here, so that whoever reads the file afterwards finds what the header says.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sparselora.errors import InputError, few, printable, shown

MAGIC = b"GGUF"
REQUIREMENT = "gguf==0.19.0"

_VERSIONS = (2, 3)
_LARGEST_COUNT = 1 << 20
"""Most tensors, and most key–value pairs. A mixture of experts of a hundred layers has about two thousand tensors."""
_MOST_DIMENSIONS = 4
_DEEPEST = 4
_LFS_POINTER = b"version https://git-lfs"

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Number of a type of values → its letter in `struct`."""

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GgufTensor(NamedTuple):
    """A tensor as the header describes it.

    Attributes:
        shape: as torch has it, ``(d_out, d_in)`` for a matrix: the reverse of the file's order.
        type: name of the block type in ggml, such as ``Q4_K`` or ``F16``.
        offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int

    @property
    def dtype(self) -> str:
        """Name of the type in tables: that of torch for plain numbers, else the block type."""
        return _FLOATS.get(self.type, self.type)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Bits of storage an element."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return 8 * size / elements


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file that was checked against its own header.

    Attributes:
        metadata: key → number, text or boolean; an array is its length.
        tensors: in the file's order.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def setting(self, name: str) -> Any:
        """Return the architecture's own setting ``name``, such as ``block_count``; None where there is none."""
        return self.metadata.get(f"{self.architecture}.{name}")

    @property
    def quantisation(self) -> str:
        """The scheme that the file is named for, and the types of its matrices, those of most elements first.

        ``Q8_0``, ``Q4_1 + Q8_0`` or ``Q4_K_M: Q4_K + Q6_K``.
        """
        elements: dict[str, int] = {}
        for tensor in self.tensors:
            if len(tensor.shape) > 1:
                elements[tensor.type] = elements.get(tensor.type, 0) + tensor.elements
        types = sorted(elements, key=lambda name: -elements[name])
        if not types:
            return "F32"
        scheme = _scheme(self.metadata.get("general.file_type"))
        if not any(scheme.startswith(name) for name in types):
            scheme = types[0]  # none is named, or one that the tensors do not bear out
        if scheme in types:
            return " + ".join([scheme, *(name for name in types if name != scheme)])
        return f"{scheme}: {' + '.join(types)}"


def _scheme(file_type: Any) -> str:
    from gguf import LlamaFileType

    try:
        return LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return ""


def is_gguf(path: Path) -> bool:
    """Return whether ``path`` is a file that is GGUF by its name or its first bytes."""
    try:
        if not path.is_file():
            return False
        if path.suffix.lower() == ".gguf":
            return True
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def read_gguf_header(file: Path) -> GgufHeader:
    """Read and check the header of a GGUF file; a file that has not changed is read once.

    Raises:
        InputError: the package gguf is missing; or the file is not GGUF, big-endian, of another version, truncated or
            corrupt, one part of a split model, an adapter, a vocabulary without tensors, or has tensors of a type that
            cannot be dequantised.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"model {file.name!r} is a GGUF file, which needs the package gguf (extra llm); install it with: "
            f"pip install {REQUIREMENT}"
        )
    try:
        status = file.stat()
        return _read(file.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError as error:
        raise InputError(f"GGUF file {printable(file.name)} cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=8)
def _read(file: Path, size: int, _modified: int, _inode: int) -> GgufHeader:
    label = f"GGUF file {printable(file.name)}"
    with file.open("rb") as stream:
        first = stream.read(len(_LFS_POINTER))
        if first == _LFS_POINTER:
            raise InputError(f"{label} is a Git-LFS pointer, not the weights; run: git lfs pull")
        if first[:4] != MAGIC:
            begins = shown(first[:4]).removeprefix("b")
            raise InputError(f"{label} is not GGUF: it begins with {begins}, wanted 'GGUF'; restore it")
        with mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as data:
            header = _Reader(data, size, label).header(file)
    _refuse_partial(header, label)
    _refuse_unknown_types(header, label)
    return header


def _refuse_partial(header: GgufHeader, label: str) -> None:
    """Raise for a file that is GGUF and no whole model."""
    metadata = header.metadata
    if not isinstance(metadata.get("general.architecture"), str) or not metadata["general.architecture"]:
        raise InputError(f"{label} names no architecture (general.architecture); it is no model, or restore it")
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise InputError(f"{label} is one of {parts} parts of a split model; join them first: llama-gguf-split --merge")
    if metadata.get("general.type") == "adapter":
        raise InputError(f"{label} is an adapter; name the GGUF file of a model")
    if not header.tensors:
        raise InputError(f"{label} holds a vocabulary and no tensors; name the GGUF file of a model")


def _refuse_unknown_types(header: GgufHeader, label: str) -> None:
    """Raise where a tensor is of a type that the library names and cannot dequantise."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for name in dict.fromkeys(tensor.type for tensor in header.tensors if tensor.type not in _FLOATS):
        kind = GGMLQuantizationType[name]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            tensor = next(tensor for tensor in header.tensors if tensor.type == name)
            raise InputError(
                f"{label} stores {printable(tensor.name)} as {name}, which the package gguf cannot dequantise; use "
                "another quantisation of the model, such as Q8_0 or Q4_K_M"
            ) from None


class _Reader:
    """Reads a header front to back; whatever lies beyond the end of the file, or cannot be, is an `InputError`."""

    def __init__(self, data: mmap.mmap, size: int, label: str) -> None:
        self.data = data
        self.size = size
        self.label = label
        self.position = len(MAGIC)

    def header(self, file: Path) -> GgufHeader:
        self._check_version()
        tensor_count, pair_count = self._number("Q"), self._number("Q")
        for count, what in ((tensor_count, "tensors"), (pair_count, "key–value pairs")):
            if count > _LARGEST_COUNT:
                raise self._broken(f"it would have {count:,} {what}")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._text()
            if key in metadata:
                raise self._broken(f"the key {shown(key)} stands in it twice")
            metadata[key] = self._value(self._number("I"))
        entries = [self._entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._broken(f"general.alignment is {shown(alignment)}, wanted a power of two")
        start = -(-self.position // alignment) * alignment
        return GgufHeader(file, metadata, self._placed(entries, start))

    def _check_version(self) -> None:
        version = self._number("I")
        if version in _VERSIONS:
            return
        if version & 0xFFFF == 0:
            raise InputError(f"{self.label} is big-endian; convert it with: gguf-convert-endian FILE little")
        raise InputError(
            f"{self.label} has version {version} of the format, wanted {few(_VERSIONS)}; convert the model again"
        )

    def _broken(self, reason: str) -> InputError:
        return InputError(f"{self.label} is truncated or corrupt: {reason}; restore it")

    def _skip(self, count: int) -> int:
        """Pass over ``count`` bytes; return where they begin."""
        begin = self.position
        if count > self.size - begin:
            raise self._broken(f"its header goes on behind the end of the file at {self.size:,} bytes")
        self.position = begin + count
        return begin

    def _number(self, letter: str) -> Any:
        return struct.unpack_from("<" + letter, self.data, self._skip(struct.calcsize("<" + letter)))[0]

    def _text(self) -> str:
        length = self._number("Q")
        begin = self._skip(length)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken(f"the text at byte {begin:,} is not UTF-8") from None

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY or depth == _DEEPEST:
            raise self._broken(f"a value has type {kind}, which the format does not have")
        item, length = self._number("I"), self._number("Q")
        if item in _SCALARS:
            self._skip(length * struct.calcsize("<" + _SCALARS[item]))
        elif item == _STRING:
            self._skip_texts(length)
        else:
            for _ in range(length):
                self._value(item, depth + 1)
        return length

    def _skip_texts(self, count: int) -> None:
        """Pass over texts; a vocabulary has hundreds of thousands, so that a call for each would take seconds."""
        unpack, data, position, last = struct.Struct("<Q").unpack_from, self.data, self.position, self.size - 8
        for _ in range(count):
            if position > last:
                raise self._broken("a list of texts goes on behind the end of the file")
            position += 8 + unpack(data, position)[0]
        self._skip(position - self.position)

    def _entry(self) -> tuple[str, tuple[int, ...], str, int]:
        """Return name, shape, block type and offset in the data of one tensor."""
        from gguf import GGMLQuantizationType

        name = self._text()
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._broken(f"{printable(name)} has {dimensions} dimensions, wanted 1 to {_MOST_DIMENSIONS}")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        if 0 in shape or math.prod(shape) >= 1 << 62:
            raise self._broken(f"{printable(name)} has the shape {shown(shape)}")
        code, offset = self._number("I"), self._number("Q")
        try:
            return name, shape, GGMLQuantizationType(code).name, offset
        except ValueError:
            raise InputError(
                f"{self.label} stores {printable(name)} in blocks of type {code}, which the package gguf does not "
                "know; use another quantisation of the model, such as Q8_0 or Q4_K_M, or a newer gguf"
            ) from None

    def _placed(self, entries: list[tuple[str, tuple[int, ...], str, int]], start: int) -> tuple[GgufTensor, ...]:
        """Return the tensors with their offsets in the file, whose data begin at ``start``; check that they fit."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        tensors, spans = [], []
        for name, shape, kind, offset in entries:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
            if shape[-1] % block:
                raise self._broken(f"rows of {printable(name)} have {shape[-1]} elements, no multiple of {block}")
            begin = start + offset
            spans.append((begin, begin + math.prod(shape) // block * size, name))
            tensors.append(GgufTensor(name, shape, kind, begin))
        spans.sort()
        for (_, end, _), (begin, _, name) in pairwise(spans):
            if begin < end:
                raise self._broken(f"{printable(name)} begins before the tensor in front of it ends")
        if spans and spans[-1][1] > self.size:
            raise self._broken(f"its header describes {spans[-1][1]:,} bytes, the file has {self.size:,}")
        for first, second in pairwise(sorted(tensor.name for tensor in tensors)):
            if first == second:
                raise self._broken(f"{printable(first)} stands in it twice")
        return tuple(tensors)
