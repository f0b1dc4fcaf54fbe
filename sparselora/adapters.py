"""LoRA adapters on disk, as PEFT writes them: read as numpy factors, without a model and, from safetensors, without
torch."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from sparselora.errors import InputError, shown
from sparselora.files import read_json_object
from sparselora.weights import LFS_POINTER, file_matrices, load_matrix

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_"
    r"(?:(?P<linear>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<embedding>[AB])(?:\.[^.]+)?)$"
)

_REFUSED = {
    "use_dora": "a DoRA adapter: its update depends on the norms of the base weights, not on B A alone",
    "enable_lora": "a merged fused-projection adapter (enable_lora) of an early PEFT; save it again with a current one",
    "use_qalora": "a QA-LoRA adapter: its A works on pooled inputs",
    "use_bdlora": "a block-diagonal (BD-LoRA) adapter",
    "kasa_config": "a KaSA adapter: its update has a diagonal between the factors",
    "monteclora_config": "a Monte-Carlo-LoRA adapter",
    "target_parameters": "an adapter of 3-D expert parameters (target_parameters)",
}
"""Configuration fields that make ΔW something else than scaling · B A."""


@dataclass(frozen=True)
class Factors:
    """One module's update ΔW = scaling · B A; ``A (r, d_in)``, ``B (d_out, r)``, float32 or float64."""

    module: str
    A: NDArray[np.floating]
    B: NDArray[np.floating]
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        return self.B.shape[0], self.A.shape[1]


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, checked to be plain LoRA (or rsLoRA).

    Raises:
        InputError: no such folder or file, not JSON, another method than LoRA, or a variant named in the message.
    """
    if not folder.is_dir():
        raise InputError(f"adapter folder {str(folder)!r} does not exist; name the folder with {CONFIG} in it")
    path = folder / CONFIG
    if not path.exists():
        raise InputError(f"adapter folder {folder.name} has no {CONFIG}; PEFT writes it beside the weights")
    config = read_json_object(path, f"{CONFIG} in adapter folder {folder.name}")
    if config.get("peft_type") != "LORA":
        raise InputError(f"adapter {folder.name} is of type {shown(config.get('peft_type'))}; only LORA is read")
    for field, reason in _REFUSED.items():
        if config.get(field):
            raise InputError(f"adapter {folder.name} is {reason}; only plain LoRA and rsLoRA are read")
    return config


def read_adapter(folder: Path) -> tuple[dict[str, Any], list[Factors]]:
    """A PEFT LoRA adapter: its configuration and the factors of every module, in the file's order by module.

    Scalings follow the configuration: alpha/r, alpha/√r for rsLoRA, ``rank_pattern`` and ``alpha_pattern`` as PEFT
    matches them. Other tensors in the file (a trained head, biases) are left alone.

    Raises:
        InputError: what `read_config` refuses; weights that are missing, a Git-LFS pointer, truncated, not finite, not
            2-D, without their other factor, or of another rank than configured.
    """
    config = read_config(folder)
    pairs: dict[str, dict[str, NDArray[np.floating]]] = {}
    for key, tensor in _tensors(folder):
        match = lora_key(key)
        if match:
            pairs.setdefault(match.module, {})[match.side] = tensor
    if not pairs:
        raise InputError(f"adapter {folder.name} holds no lora_A and lora_B weights")
    return config, [_factors(folder, config, module, pair) for module, pair in pairs.items()]


def _factors(folder: Path, config: Mapping[str, Any], module: str, pair: dict[str, NDArray[np.floating]]) -> Factors:
    scaling = pair_scaling(folder, config, module, {side: value.shape for side, value in pair.items()})
    return Factors(module, pair["A"], pair["B"], scaling)


@dataclass(frozen=True)
class LoraKey:
    """What the name of a LoRA weight says: its module, ``side`` A or B, and whether the module is an embedding."""

    module: str
    side: str
    embedding: bool


def lora_key(name: str) -> LoraKey | None:
    """The parts of a tensor's name as PEFT writes it, with or without an adapter's name in it; None for others."""
    match = _KEY.match(name)
    if match is None:
        return None
    return LoraKey(match["module"], match["linear"] or match["embedding"], match["embedding"] is not None)


def pair_scaling(
    folder: Path,
    config: Mapping[str, Any],
    module: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    convolutions: bool = False,
) -> float:
    """A module's scaling, from the configuration; the ``shapes`` of its sides A and B are checked against it.

    Raises:
        InputError: one of the two factors is missing, not 2-D (unless ``convolutions`` may be there), or of another
            rank than configured.
    """
    if set(shapes) != {"A", "B"}:
        missing = "B" if "A" in shapes else "A"
        raise InputError(f"adapter {folder.name}: {module} has no lora_{missing}; restore the file")
    A, B = tuple(shapes["A"]), tuple(shapes["B"])
    r = int(_by_pattern(config.get("rank_pattern"), module, config.get("r", 8)))
    linear = len(A) == len(B) == 2
    if not linear and not (convolutions and min(len(A), len(B)) > 2):
        raise InputError(
            f"adapter {folder.name}: {module} is not 2-D (lora_A {A}, lora_B {B}); "
            "only linear and embedding layers are read"
        )
    # A grouped convolution's lora_B has a share of the rank in each group.
    if A[0] != r or (linear and B[1] != r):
        raise InputError(
            f"adapter {folder.name}: {module} has lora_A {A} and lora_B {B}, {CONFIG} says rank {r}; "
            "the two files do not belong together"
        )
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return alpha / (sqrt(r) if config.get("use_rslora") else r)


def _by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that is the module's name or a dotted end of it: PEFT's rule, keys are expressions."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def weights_file(folder: Path) -> Path:
    """The file with an adapter's weights, safetensors before a pickle.

    Raises:
        InputError: there is none, it cannot be read, or it is a Git-LFS pointer.
    """
    path = next((folder / name for name in (SAFETENSORS, PICKLE) if (folder / name).exists()), None)
    if path is None:
        raise InputError(f"adapter folder {folder.name} has no weights; it needs {SAFETENSORS} or {PICKLE}")
    try:
        with path.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path.name} in adapter folder {folder.name} cannot be read ({error.strerror})") from None
    if start == LFS_POINTER:
        raise InputError(f"{path.name} in {folder.name} is a Git-LFS pointer, not the weights; run: git lfs pull")
    return path


def _tensors(folder: Path) -> Iterator[tuple[str, NDArray[np.floating]]]:
    """Name and value of the LoRA tensors of an adapter, one at a time where the format allows."""
    path = weights_file(folder)
    if path.name == PICKLE:
        yield from _pickled(path)
        return
    matrices = {info.name: info for info in file_matrices(path)}
    with safe_open(path, "numpy") as file:
        others = [name for name in file.keys() if _KEY.match(name) and name not in matrices]  # noqa: SIM118
    if others:
        raise InputError(f"adapter {folder.name}: {others[0]} is not 2-D; only linear and embedding layers are read")
    for name, info in matrices.items():
        if _KEY.match(name):
            yield name, load_matrix(info)


def unpickled(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a pickled state dictionary, each with storage of its own, on the CPU. No code of it is run.

    Raises:
        InputError: a file that is truncated or holds anything but tensors by name.
    """
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path.name} in adapter folder {path.parent.name} is truncated, or holds more than tensors "
            f"({type(error).__name__}); restore it, or save it again as {SAFETENSORS}"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"{path.name} in adapter folder {path.parent.name} holds no dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{path.name} in adapter folder {path.parent.name} holds {name!r}, which is no tensor; "
                f"save the adapter again as {SAFETENSORS}"
            )
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _pickled(path: Path) -> Iterator[tuple[str, NDArray[np.floating]]]:
    for name, tensor in unpickled(path).items():
        if _KEY.match(name):
            value = tensor.float().numpy()
            if not np.isfinite(value).all():
                raise InputError(f"{name} in {path.parent.name} holds NaN or infinite values; the weights are damaged")
            yield name, value
