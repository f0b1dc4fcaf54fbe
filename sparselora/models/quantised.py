"""Detection of quantised checkpoints: their 2-D float tensors are scales, and must not be taken for weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparselora.errors import InputError, printable
from sparselora.models.safetensors_header import BITS, FLOAT_TYPES, StoredTensor

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


def is_scale(tensor: StoredTensor) -> bool:
    """Return whether a tensor's name is that of a scale, a zero point or a code book."""
    words = set(_words(tensor.name))
    return bool(_SCALE_WORDS & words) or {"quant", "map"} <= words


def _owner(name: str) -> str:
    """The module that a weight, its codes or its scale belong to: ``a.q_proj`` of ``a.q_proj.weight.absmax``."""
    return re.sub(r"(\._?weight|\.quant_state)+$", "", name.rpartition(".")[0])


def quantisation_method(config: Mapping[str, Any]) -> str:
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


def _codes(stored: Sequence[StoredTensor]) -> list[StoredTensor]:
    """The tensors that hold codes of weights and not weights.

    They are whole numbers or floats below 8 bits that are named as a weight, lie next to a scale or are a good part of
    the file, and fp8 with a scale, which may be in another file. fp8 without a scale is a weight.
    """
    scales = [tensor.name for tensor in stored if is_scale(tensor)]
    scaled = {_owner(name) for name in scales} - {""}
    scaled |= {name[: cut.start()] for name in scales for cut in re.finditer(r"[._](?=[^.]*$)", name)}
    every = any(_words(tensor.name) == ["scaled", "fp8"] for tensor in stored)
    codes, unnamed = [], []
    for tensor in stored:
        if tensor.code in _FULL_PRECISION or tensor.code == "BOOL" or not tensor.shape or 0 in tensor.shape:
            continue
        words, beside_scale = set(_words(tensor.name)), bool({tensor.name, _owner(tensor.name)} & scaled)
        if tensor.code in FLOAT_TYPES:  # fp8
            if (beside_scale or every) and not is_scale(tensor):
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


def _bits(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * BITS[tensor.code]


def refuse_quantised(stored: Sequence[StoredTensor], label: str, method: str = "") -> None:
    """Raise if a checkpoint is quantised, by its configuration (``method``) or by what its tensors are."""
    codes = _codes(stored)
    if not codes and not method:
        return
    codes = [tensor for tensor in codes if not is_scale(tensor)] or codes
    counted = f"{len(codes)} of {len(stored)} tensors hold codes, the first {codes[0]}" if codes else ""
    raise InputError(
        f"{label} is quantised ({'; '.join(filter(None, (method, counted)))}): codes and their scales are not the "
        "weights; use the unquantised model, or convert this one to bf16 first"
    )
