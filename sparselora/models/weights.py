"""A model's 2-D weights, listed from the headers of its files and read one at a time: needs no torch.

`list_tensors` reads only the headers, so that a caller can plan; `load_matrix` then reads one matrix by seeking to it.
No weights are mapped into memory: what has been read and let go is gone from the process. The files are safetensors,
or one GGUF file, whose blocks are dequantised.

A tensor that is no matrix is never passed over in silence: it is in the listing with the reason. A checkpoint whose
weights are codes (GPTQ, AWQ, bitsandbytes, fp8 with scales, ...) is refused, for its 2-D float tensors are scales.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselora.errors import InputError, printable
from sparselora.models.gguf_header import GgufHeader, read_gguf_header
from sparselora.models.gguf_weights import (
    block_size,
    check_names,
    dequantised,
    interleaved_heads,
    loaded_name,
    separate_halves,
)
from sparselora.models.model_files import INDEX, gguf_file, model_folder, read_config, weight_files, weight_map
from sparselora.models.quantised import is_scale, quantisation_method, refuse_quantised
from sparselora.models.safetensors_header import FLOAT_TYPES, StoredTensor, natural_order, read_header

_BLOCK = 1 << 22  # elements decoded at a time
_CHECK_BLOCK = 1 << 18

_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_WEIGHT = re.compile(r"(^|\.)((cross)?attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)\.weight$")


@dataclass(frozen=True)
class MatrixInfo:
    """A 2-D floating-point weight as its file's header describes it; nothing of its data has been read.

    ``shape`` is (d_out, d_in) as torch's Linear has it, also where the file stores the transpose (``transposed``, the
    Conv1D of GPT-2). ``dtype`` is the stored type: float64, float32, float16, bfloat16, float8_e4m3 or float8_e5m2, or
    the block type of a quantised GGUF tensor, such as Q4_K. ``interleaved_heads`` is not 0 where the file has the rows
    of so many heads in llama.cpp's order.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    file: Path
    offset: int
    transposed: bool = False
    interleaved_heads: int = 0

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
    """All tensors of a model's files: each is either one of the ``matrices`` or one of the ``unmeasured``.

    ``named_as_loaded``: the names are those of the loaded model's state, whatever the files call the tensors.
    """

    matrices: list[MatrixInfo]
    unmeasured: list[UnmeasuredTensor]
    named_as_loaded: bool = False


_VECTOR = "vector or scalar"


# --- the listing --------------------------------------------------------------------------------------------------


def list_tensors(model: str) -> ModelTensors:
    """List every tensor of a model (alias, local folder, GGUF file or hub name), ordered by name, numbers by value.

    Matrices are the 2-D weights in floating point; everything else is listed with the reason. Names
    have what a terminal would act on as escape sequences.

    Raises:
        InputError: no such model, an adapter, no weights or not all shards, a file that is truncated or not
            safetensors, a tensor in two files or missing from the shards, quantised weights, or no matrix at all; a
            GGUF file that `read_gguf_header` refuses, or of an architecture whose names are not known.
    """
    if (file := gguf_file(model)) is not None:
        return _gguf_tensors(read_gguf_header(file))
    folder = model_folder(model)
    config = read_config(folder)
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for tensor in read_header(file):
            other = stored.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise InputError(
                    f"{printable(tensor.name)} is in both {printable(other.file.name)} and {printable(file.name)}; "
                    "remove the stale file"
                )
    if not (folder / "model.safetensors").exists() and (folder / INDEX).exists():
        lost = [name for name in weight_map(folder / INDEX) if name not in stored]
        if lost:
            raise InputError(
                f"{INDEX} in model folder {folder.name} names {len(lost)} tensors that its shards lack "
                f"({printable(lost[0])}); complete the download"
            )
    refuse_quantised(list(stored.values()), f"model {printable(folder.name)}", quantisation_method(config))
    conv1d = config.get("model_type") in _CONV1D_MODELS
    matrices, unmeasured = [], []
    for tensor in sorted(stored.values(), key=lambda tensor: natural_order(tensor.name)):
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


def _gguf_tensors(header: GgufHeader) -> ModelTensors:
    check_names(header)
    matrices, unmeasured = [], []
    named = {printable(loaded_name(header, tensor)): tensor for tensor in header.tensors}
    for name, tensor in sorted(named.items(), key=lambda item: natural_order(item[0])):
        reason = _VECTOR if len(tensor.shape) < 2 else "" if len(tensor.shape) == 2 else _many(tensor.shape)
        if reason:
            unmeasured.append(UnmeasuredTensor(name, tensor.shape, tensor.dtype, reason))
        else:
            rows, columns = tensor.shape
            heads = interleaved_heads(header, tensor)
            info = MatrixInfo(name, (rows, columns), tensor.dtype, header.file, tensor.offset, interleaved_heads=heads)
            matrices.append(info)
    return ModelTensors(matrices, unmeasured, named_as_loaded=True)


def file_matrices(file: Path, conv1d: bool = False) -> list[MatrixInfo]:
    """The 2-D floating-point tensors of one safetensors file, in the file's order; ``conv1d``: of a GPT-2-like model.

    Raises:
        InputError: a file that is truncated or not safetensors, or fp8 weights with separate scales.
    """
    stored = read_header(file)
    refuse_quantised([t for t in stored if t.code in FLOAT_TYPES], printable(file.name))
    return [_matrix(tensor, tensor.name, conv1d) for tensor in stored if tensor.is_matrix()]


def _matrix(tensor: StoredTensor, name: str, conv1d: bool) -> MatrixInfo:
    transposed = conv1d and _CONV1D_WEIGHT.search(tensor.name) is not None
    rows, columns = tensor.shape
    shape = (columns, rows) if transposed else (rows, columns)
    return MatrixInfo(name, shape, tensor.dtype, tensor.file, tensor.offset, transposed)


_LORA = "factor of an adapter"
_LORA_FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")


def _reason_not_to_measure(tensor: StoredTensor) -> str:
    """Return the reason why a tensor of an unquantised model is no matrix to measure, ``""`` for one that is."""
    if 0 in tensor.shape:
        return "empty"
    if len(tensor.shape) < 2:
        return _VECTOR
    if tensor.code == "BOOL":
        return "mask (bool)"
    if tensor.code == "C64":
        return "complex numbers"
    if tensor.code not in FLOAT_TYPES:
        return f"no floating-point numbers ({tensor.dtype})"
    if is_scale(tensor):
        return "named as a scale, zero point or code book"
    if tensor.name.endswith("_blocks"):
        return "blocks of codes"
    if tensor.name.rpartition(".")[2].lower().endswith(("bias", "biases")):
        return "bias"
    if len(tensor.shape) > 2:
        return _many(tensor.shape)
    return _LORA if _LORA_FACTOR.search(tensor.name) else ""


def _many(shape: Sequence[int]) -> str:
    return f"{len(shape)} dimensions (experts or a convolution)"


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


# --- the numbers --------------------------------------------------------------------------------------------------


def load_matrix(info: MatrixInfo) -> NDArray[np.floating]:
    """The matrix ``info.shape`` as float32 (float64 if it is stored so); every stored type fits exactly.

    A transposed weight is returned as a view of its stored form.

    Raises:
        InputError: NaN or infinite values, or a file that has changed since it was listed.
    """
    flat: NDArray[np.floating] = np.empty(info.elements, np.float64 if info.dtype == "float64" else np.float32)
    # In blocks, so that the packed bytes and the decoded matrix are never both whole in memory.
    for start, values in _blocks(info, _BLOCK):
        flat[start : start + values.size] = values
    _refuse_nonfinite(flat, info)
    W = flat.reshape(info.shape[::-1] if info.transposed else info.shape)
    if info.interleaved_heads:
        W = separate_halves(W, info.interleaved_heads)
    return W.T if info.transposed else W


def refuse_damaged(info: MatrixInfo) -> bool:
    """Read the matrix in small blocks, raise what `load_matrix` would, and return whether any value is not zero.

    For checks before a run: nothing is kept.
    """
    is_nonzero = False
    for start, values in _blocks(info, _CHECK_BLOCK):
        _refuse_nonfinite(values, info, start)
        is_nonzero = is_nonzero or bool(values.any())
    return is_nonzero


def _blocks(info: MatrixInfo, size: int) -> Iterator[tuple[int, NDArray[np.floating]]]:
    """Yield index and values of ``size`` elements after ``size`` elements, in the file's order.

    Args:
        size: a power of two above the elements of any quantised block.
    """
    raw_type = dict(FLOAT_TYPES.values()).get(info.dtype)
    elements, width = (1, raw_type.itemsize) if raw_type is not None else block_size(info.dtype)
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        for start in range(0, info.elements, size):
            count = min(size, info.elements - start)
            packed = np.fromfile(stream, np.uint8, count // elements * width)
            if packed.size != count // elements * width:
                raise InputError(f"{info.name} in {info.file.name} ends early; the file has changed, run again")
            yield start, dequantised(packed, info.dtype) if raw_type is None else _decode(packed.view(raw_type))


def _decode(block: NDArray[Any]) -> NDArray[np.floating]:
    """Return the values of a block of a type below 32 bits as float32, which holds them exactly; others as they are."""
    if block.itemsize > 2:
        return block
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
