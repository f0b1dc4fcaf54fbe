"""PEFT's LoRA adapters on disk: one reader, without a model and from safetensors without torch, and one writer.

`models.adapter_config` decides which adapters are LoRA at all, `models.adapter_names` which module a tensor is of, and
`models.adapter_tensors` reads the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparselora.config.token_gates import SETTINGS
from sparselora.errors import InputError
from sparselora.models.adapter_config import CONFIG, read_config
from sparselora.models.adapter_names import LoraModule, lora_modules, not_a_matrix, peft_keys, refuse_tied
from sparselora.models.adapter_tensors import PICKLE, SAFETENSORS, stored_shapes, stored_tensors, weights_file
from sparselora.models.class_names import record, recorded_names
from sparselora.models.prompt_template import Template, recorded_template, write_template
from sparselora.models.safetensors_header import natural_order
from sparselora.models.weights import MatrixInfo, file_matrices, load_matrix
from sparselora.runs.files import replacing, write_json

if TYPE_CHECKING:
    import torch

LARGEST_WEIGHT = 1e50
"""Limit on a value of a factor: squares of an update within it stay in float64."""

# --- reading ------------------------------------------------------------------------------------------------------


class Matrices(NamedTuple):
    """Factors of one module, ΔW = scaling · B A, as numpy arrays of float32 or float64."""

    module: str
    A: NDArray[np.floating]
    """``(r, d_in)``"""
    B: NDArray[np.floating]
    """``(d_out, r)``"""
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it is stored. Its values are read when they are first asked for.

    Each linear pair of lora_A and lora_B can be replaced; everything else in the file (a trained head, biases, LoRA on
    embeddings and convolutions) is carried through byte for byte, and listed.

    Attributes:
        path: of the file with the weights.
        config: ``adapter_config.json``.
        names: PEFT's key of every tensor (`peft_keys`) → its name in the file.
        shapes: of every tensor, by PEFT's key.
        entries: every LoRA module by name, in the file's order.
        classes: names of a classifier's classes, where they are recorded.
        template: prompt template or chat template of a language model, where it is recorded.
    """

    path: Path
    config: dict[str, Any]
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    entries: dict[str, LoraModule]
    classes: tuple[str, ...] = ()
    template: Template | None = None

    @property
    def name(self) -> str:
        """Name of the adapter's folder."""
        return self.path.parent.resolve().name

    @cached_property
    def modules(self) -> dict[str, LoraModule]:
        """The linear LoRA modules, which can be edited, by name and layer number."""
        linear = {module: entry for module, entry in self.entries.items() if self._is_linear(entry)}
        return dict(sorted(linear.items(), key=lambda item: natural_order(item[0])))

    @cached_property
    def fixed(self) -> dict[str, LoraModule]:
        """LoRA modules of another kind (embeddings, convolutions), which are carried."""
        other = {module: entry for module, entry in self.entries.items() if not self._is_linear(entry)}
        return dict(sorted(other.items(), key=lambda item: natural_order(item[0])))

    def _is_linear(self, entry: LoraModule) -> bool:
        return not entry.is_embedding and len(self.shapes[entry.key_A]) == 2

    @cached_property
    def carried(self) -> dict[str, str]:
        """Key → kind, for every tensor that is not a factor of one of ``modules``."""
        kinds = {
            key: "LoRA of an embedding" if entry.is_embedding else "LoRA of a convolution"
            for entry in self.fixed.values()
            for key in entry[:2]
        }
        factors = {key for entry in self.modules.values() for key in entry[:2]}
        return {key: kinds.get(key) or _kind(key) for key in self.names if key not in factors}

    @cached_property
    def _stored(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name in the file."""
        return stored_tensors(self.path)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the file in its stored type, by PEFT's key.

        Raises:
            InputError: a file that is truncated; linear factors of integers or eight bits, or that are not finite.
        """
        tensors = {key: self._stored[name] for key, name in self.names.items()}
        for entry in self.modules.values():
            for key in (entry.key_A, entry.key_B):
                self._refuse_damaged(key, tensors[key])
        return tensors

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return ``lora_A (r, d_in)``, ``lora_B (d_out, r)`` as stored, and the scaling, of a linear module."""
        entry = self.modules[module]
        return self.tensors[entry.key_A], self.tensors[entry.key_B], entry.scaling

    def matrices(self, module: str) -> Matrices:
        """Return the factors of a linear or embedding module as arrays; from safetensors without torch.

        Raises:
            InputError: LoRA of a convolution; values that are no floating-point numbers or not finite.
        """
        entry = self.entries[module]
        shapes = self.shapes[entry.key_A], self.shapes[entry.key_B]
        if max(map(len, shapes)) > 2:
            raise InputError(not_a_matrix(self.path.parent, module, *shapes))
        return Matrices(module, self._array(entry.key_A), self._array(entry.key_B), entry.scaling)

    @cached_property
    def _infos(self) -> dict[str, MatrixInfo]:
        return {info.name: info for info in file_matrices(self.path)}

    def _array(self, key: str) -> NDArray[np.floating]:
        name, folder = self.names[key], self.path.parent.name
        if self.path.name != PICKLE:
            array = load_matrix(self._infos[name]) if name in self._infos else None
        else:
            tensor = self._stored[name]
            exact = tensor.element_size() == 8
            array = (tensor.double() if exact else tensor.float()).numpy() if tensor.is_floating_point() else None
        if array is None:
            raise InputError(f"{name} in {folder} is no matrix of floating-point numbers; the weights are damaged")
        if not float(np.abs(array).max()) <= LARGEST_WEIGHT:
            raise InputError(_damaged(name, folder))
        return array

    def _refuse_damaged(self, key: str, tensor: torch.Tensor) -> None:
        import torch

        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise InputError(
                f"{key} in {self.path.parent.name} is {tensor.dtype}; LoRA weights are floating-point numbers of at "
                "least 16 bits"
            )
        if not tensor.abs().max() <= LARGEST_WEIGHT:
            raise InputError(_damaged(key, self.path.parent.name))


def _damaged(name: str, folder: str) -> str:
    return f"{name} in {folder} holds NaN, infinite values or some above {LARGEST_WEIGHT:g}; the weights are damaged"


def _kind(key: str) -> str:
    if ".lora_" in key:
        return "LoRA bias" if key.endswith(".bias") else "other LoRA tensor"
    if key.endswith(".base_layer.weight"):  # PEFT saves the embedding under a LoRA with it
        return "weight of the base model"
    return "trained in full"


def read_adapter(folder: str | Path) -> AdapterFile:
    """Return the PEFT LoRA adapter in ``folder``: configuration, names and shapes now, values when they are asked for.

    Raises:
        InputError: what `read_config`, `peft_keys` and `lora_modules` refuse; weights that are missing, a Git-LFS
            pointer, or truncated.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = weights_file(folder)
    by_name = stored_shapes(path)
    names = {key: name for name, key in peft_keys(folder, config, by_name).items()}
    shapes = {key: by_name[name] for key, name in names.items()}
    entries = lora_modules(folder, config, shapes)
    refuse_tied(folder, config, entries)
    return AdapterFile(path, config, names, shapes, entries, recorded_names(folder), recorded_template(folder))


def open_adapter(folder: str | Path) -> AdapterFile:
    """Read a PEFT LoRA adapter to edit it, with all its values.

    Raises:
        InputError: what `read_adapter` and `AdapterFile.tensors` refuse; token gates.
    """
    adapter = read_adapter(folder)
    if (Path(folder) / SETTINGS).is_file():
        raise InputError(
            f"adapter {Path(folder).name} is gated per token ({SETTINGS}), and singular directions mix the channels "
            "that its gates choose from; take the adapter_static next to it"
        )
    _ = adapter.tensors  # damage is found here, before anything is written
    return adapter


# --- writing ------------------------------------------------------------------------------------------------------


def folded(name: str, A: torch.Tensor, B: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``A (r, d_in)`` and scaling · ``B (d_out, r)`` in their types.

    Where B's type cannot hold that, A takes a power of two of it, which is exact.

    Raises:
        InputError: neither does it fit so.
    """
    from torch import finfo

    exact = B.detach().double() * scaling
    largest_A, largest_B = float(A.abs().max()), float(exact.abs().max())
    balance = round(math.log2(largest_B / largest_A) / 2) if 0 < largest_A * largest_B < math.inf else 0
    for power in (0, balance):
        new_A, new_B = (A.detach().double() * 2.0**power).to(A.dtype), (exact * 2.0**-power).to(B.dtype)
        wanted = (A.detach().double() * 2.0**power, exact * 2.0**-power)
        if all(
            bool(new.isfinite().all()) and (new.double() - old).norm() <= finfo(new.dtype).eps * old.norm()
            for new, old in zip((new_A, new_B), wanted)
        ):
            return new_A, new_B
    raise InputError(
        f"{name}: its factors times the scaling {scaling:g} do not fit in {B.dtype}; convert the adapter to float32"
    )


def padded(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``A (r, d_in)``, ``B (d_out, r)`` with channels of zeros up to ``rank``: the same product.

    Both factors of such a channel are 0, so that it has no gradient either: training on does not fill it.
    """
    r = A.shape[0]
    new_A, new_B = A.new_zeros(rank, A.shape[1]), B.new_zeros(B.shape[0], rank)
    new_A[:r], new_B[:, :r] = A, B
    return new_A, new_B


def write_files(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    ranks: Mapping[str, int] | None = None,
    classes: Sequence[str] = (),
    template: Template | None = None,
) -> None:
    """Write an adapter: ``adapter_config.json`` and ``adapter_model.safetensors``, each whole or not at all.

    Args:
        tensors: by PEFT's key.
        ranks: module → its channels that are no padding; kept as ``ranks`` in the metadata of the weights.
        classes: names of a classifier's classes by id, kept there too, as `class_names.recorded_names` reads
            them.
        template: text around the prompts that it was trained on, for `prompt_template.recorded_template`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({"ranks": json.dumps(dict(ranks))} if ranks else {}) | record(classes)
    with replacing(folder / SAFETENSORS) as part:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part, metadata=metadata)
    write_json(folder / CONFIG, dict(config))
    if template is not None:
        write_template(folder, template)


def refuse_overlap(out_dir: str | Path, adapter_dir: str | Path) -> None:
    """Raises InputError where the output folder is the adapter's own, in it or above it: writing would harm it."""
    out, source = Path(out_dir).resolve(), Path(adapter_dir).resolve()
    same = out == source or (out.exists() and source.exists() and os.path.samefile(out, source))
    if same or source in out.parents or out in source.parents:
        where = "equal to" if same else "inside" if source in out.parents else "above"
        raise InputError(f"out_dir {out.name} is {where} the adapter's folder {source.name}; name another folder")


def write_adapter(
    folder: str | Path,
    adapter: AdapterFile,
    new_factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    config_changes: Mapping[str, Any] | None = None,
    new_tensors: Mapping[str, torch.Tensor] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> None:
    """Write ``adapter`` with other factors, as ``adapter_config.json`` and ``adapter_model.safetensors``.

    Types and every tensor that is not named stay as they are; a pickled adapter comes out as safetensors.

    Args:
        new_factors: module → (lora_A, lora_B), in the stored types.
        config_changes: fields of the configuration that take other values.
        new_tensors: other tensors that take other values, by key.
        ranks: as `write_files` takes them.
    """
    replaced = dict(new_tensors or {})
    for module, (A, B) in new_factors.items():
        entry = adapter.modules[module]
        replaced |= {entry.key_A: A, entry.key_B: B}
    for key, tensor in replaced.items():
        assert tensor.dtype == adapter.tensors[key].dtype, f"{key} changed its type"
    tensors = {key: replaced.get(key, tensor) for key, tensor in adapter.tensors.items()}
    write_files(
        Path(folder), {**adapter.config, **(config_changes or {})}, tensors, ranks, adapter.classes, adapter.template
    )
