"""The tensors of an adapter's file, safetensors or a pickle, by their names there: shapes without torch, and values."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from sparselora.errors import InputError
from sparselora.models.safetensors_header import LFS_POINTER, read_header
from sparselora.models.weights import file_matrices

if TYPE_CHECKING:
    import torch

SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


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


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in an adapter's file by its name there.

    Raises:
        InputError: a file that is truncated, not safetensors, or pickled with more than tensors.
    """
    if path.name == PICKLE:
        return {name: tuple(tensor.shape) for name, tensor in unpickled(path).items()}
    file_matrices(path)  # refuses codes with separate scales
    return {tensor.name: tensor.shape for tensor in read_header(path)}


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


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of an adapter's file by its name there, in its own type.

    Raises:
        InputError: a file that is truncated, not safetensors, or pickled with more than tensors.
    """
    if path.name == PICKLE:
        return unpickled(path)
    stored_shapes(path)  # checks the header, and says in words what is wrong with it
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path.name} in adapter folder {path.parent.name} is truncated or corrupt ({error}); restore it"
        ) from None
