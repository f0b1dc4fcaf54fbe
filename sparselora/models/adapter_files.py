"""PEFT's LoRA adapters on disk: one reader, without a model and from safetensors without torch, and one writer.

`models.adapter_config` decides which adapters are LoRA at all. Here their tensors get the names by which PEFT loads
them and their modules their scalings, for every command that reads factors.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from sparselora.config.token_gates import SETTINGS
from sparselora.errors import InputError, suggest
from sparselora.models.adapter_config import CONFIG, read_config, refuse_slow_patterns, value_by_pattern
from sparselora.models.class_names import record, recorded_names
from sparselora.models.prompt_template import Template, recorded_template, write_template
from sparselora.models.safetensors_header import LFS_POINTER, natural_order, read_header
from sparselora.models.weights import MatrixInfo, file_matrices, load_matrix
from sparselora.runs.files import replacing, write_json

if TYPE_CHECKING:
    import torch

SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

PREFIX = "base_model.model."
"""PEFT's prefix of the names of a model's modules."""

LARGEST_WEIGHT = 1e50
"""Limit on a value of a factor: squares of an update within it stay in float64."""

_LISTED = 30

_KEY = re.compile(
    rf"^{re.escape(PREFIX)}(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))$"
)

# --- the names of tensors -----------------------------------------------------------------------------------------

_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"}
)
"""Modules that torch.compile, FSDP, activation checkpointing and Lightning put around others, in their names."""
_DDP = "module"
"""The same of DistributedDataParallel and DeepSpeed; a model may have a module of this name."""

_ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.[^.]+(?=\.(?:weight|bias)$)|(\.lora_embedding_[AB])\.[^.]+$")
_SAVED_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")


class LoraModule(NamedTuple):
    """Keys in PEFT's form of a module's two factors, and c of ΔW = c · B A."""

    key_A: str
    key_B: str
    scaling: float
    is_embedding: bool = False

    @property
    def key_bias(self) -> str:
        """Key of the bias of lora_B (``lora_bias=True``); the layer adds it times the scaling."""
        return self.key_B.removesuffix("weight") + "bias"


def peft_keys(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return, for the name of every tensor in an adapter's file, the key by which PEFT loads it.

    They differ where the adapter was saved with a wrapper around the model or its modules (torch.compile, DDP, FSDP,
    checkpointing), with the prefix ``base_model.model.`` repeated or left out, or with the adapter's name in the key;
    a warning says what was removed.

    Raises:
        InputError: another prefix; copies of modules that were not trained; a tensor that is there twice.
    """
    names = list(names)
    targets = [config.get("target_modules"), config.get("modules_to_save")]
    words = re.findall(r"\w+", " ".join(t if isinstance(t, str) else " ".join(t) for t in targets if t))
    wrappers = _WRAPPERS if _DDP in words else _WRAPPERS | {_DDP}
    bare = not any(PREFIX in f"{name}." for name in names)
    keys: dict[str, str] = {}
    removed: dict[str, None] = {}
    prefixed = False
    for name in names:
        parts = name.split(".")
        rest = key = ".".join(part for part in parts if part not in wrappers)
        while key.startswith(PREFIX):
            key = key.removeprefix(PREFIX)
        before, within, _ = key.rpartition(PREFIX)
        if within or key.startswith("base_model."):
            raise InputError(
                f"adapter {folder.name}: {name} has the prefix {before or 'base_model.'!r}, which is no known wrapper; "
                "save the adapter with save_pretrained of the PEFT model itself"
            )
        if ".original_module." in key:
            raise InputError(
                f"adapter {folder.name} holds {name}, an untrained copy of a module: the file is a dump of the whole "
                "model's state; save the adapter with save_pretrained"
            )
        times = (len(rest) - len(key)) // len(PREFIX)
        rest = key
        key = _SAVED_COPY.sub("", _ADAPTER_NAME.sub(lambda match: match[1] or match[2], key))
        removed |= {f"{part}.": None for part in parts if part in wrappers}
        removed |= {f"{PREFIX} where it is repeated": None} if times > 1 else {}
        removed |= {"the adapter's name": None} if key != rest else {}
        if times or bare or _KEY.match(PREFIX + key):
            key, prefixed = PREFIX + key, prefixed or not times
        keys[name] = key
    counts = Counter(keys.values())
    for key, count in counts.items():
        if count > 1:
            raise InputError(f"adapter {folder.name} has {key} twice; save it again")
    changes = [f"without {', '.join(removed)}"] if removed else []
    changes += [f"with {PREFIX} before them"] if prefixed else []
    if changes:
        warnings.warn(
            f"adapter {folder.name} has names of tensors by which PEFT loads nothing; read {' and '.join(changes)}",
            stacklevel=2,
        )
    return keys


# --- modules ------------------------------------------------------------------------------------------------------


def lora_modules(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, LoraModule]:
    """Return the LoRA modules of an adapter by name, in the file's order, with their scalings.

    These follow the configuration: alpha/r, alpha/√r for rsLoRA, ``rank_pattern`` and ``alpha_pattern`` as PEFT matches
    them.

    Args:
        shapes: of every tensor by PEFT's key (`peft_keys`).
    Raises:
        InputError: no LoRA weights; magnitudes of a DoRA whose configuration hides it; one of two factors is missing,
            empty, of too few dimensions, or of another rank than configured; patterns that would hang.
    """
    sides_by_module: dict[str, dict[str, str]] = {}
    embeddings = set()
    for key, shape in shapes.items():
        if "lora_magnitude_vector" in key:
            raise InputError(f"adapter {folder.name} holds {key}: it is a DoRA adapter, though {CONFIG} says otherwise")
        match = _KEY.match(key)
        if match is None:
            continue
        if math.prod(shape) == 0:
            raise InputError(
                f"adapter {folder.name} holds empty tensors ({key} {shape}): it was saved under DeepSpeed ZeRO-3 "
                "without gathering the weights; save it again with stage3_gather_16bit_weights_on_model_save"
            )
        sides_by_module.setdefault(match["module"], {})[match["linear"] or match["embedding"]] = key
        embeddings.update([match["module"]] if match["embedding"] else [])
    if not sides_by_module:
        raise InputError(f"adapter {folder.name} holds no lora_A and lora_B weights")
    refuse_slow_patterns(folder, config, sides_by_module)
    modules = {}
    for module, sides in sides_by_module.items():
        if set(sides) != {"A", "B"}:
            raise InputError(
                f"adapter {folder.name}: {module} has no lora_{'B' if 'A' in sides else 'A'}; restore the file"
            )
        A, B = (tuple(shapes[sides[side]]) for side in "AB")
        scaling = _scaling(folder, config, module, A, B)
        modules[module] = LoraModule(sides["A"], sides["B"], scaling, module in embeddings)
    return modules


def refuse_tied(folder: Path, config: Mapping[str, Any], modules: Mapping[str, LoraModule]) -> None:
    """Raise InputError where the factors of an embedding are another module's as well: one cannot change alone."""
    tied = [name for name, entry in modules.items() if entry.is_embedding]
    if config.get("ensure_weight_tying") and tied:
        raise InputError(
            f"adapter {folder.name} gives the factors of {tied[0]} to the modules tied to it as well "
            "(ensure_weight_tying), so that one cannot change alone; train without ensure_weight_tying"
        )


def _scaling(
    folder: Path,
    config: Mapping[str, Any],
    module: str,
    A: tuple[int, ...],
    B: tuple[int, ...],
) -> float:
    """Return a module's scaling, from the configuration; the shapes of its factors are checked against it."""
    r = value_by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    linear = len(A) == len(B) == 2
    if not linear and min(len(A), len(B)) <= 2:
        raise InputError(_not_a_matrix(folder, module, A, B))
    # A grouped convolution's lora_B has a share of the rank in each group.
    if A[0] != r or (linear and B[1] != r):
        raise InputError(
            f"adapter {folder.name}: {module} has lora_A {A} and lora_B {B}, {CONFIG} says rank {r}; "
            "the two files do not belong together"
        )
    alpha = value_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)


def _not_a_matrix(folder: Path, module: str, A: tuple[int, ...], B: tuple[int, ...]) -> str:
    shapes = f"(lora_A {A}, lora_B {B})"
    return f"adapter {folder.name}: {module} is not 2-D {shapes}; only linear and embedding layers are read"


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
            raise InputError(_not_a_matrix(self.path.parent, module, *shapes))
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


# --- choosing -----------------------------------------------------------------------------------------------------

_CONTAINER = re.compile(r"(?:^|\.)(?:\w*layers?|h|\w*blocks?)\.(\d+)(?=\.|$)")
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def layer_index(module: str) -> int | None:
    """The number of the layer that a module is in; None where its name has none.

    It is the first number after a list of layers (``layers.3``, ``encoder.layer.3``, ``h.3``, ``block.3``, …), so that
    neither an expert inside the layer nor a wrapper around the model counts; else the first number there is.
    """
    match = _CONTAINER.search(module) or _NUMBER.search(module)
    return int(match[1]) if match else None


def select_modules(
    adapter: AdapterFile,
    target_modules: Sequence[str] | None = None,
    layer_min: int | None = None,
    layer_max: int | None = None,
) -> list[str]:
    """The modules whose name ends in one of ``target_modules`` (whole dotted parts; None for all) in a layer from
    ``layer_min`` to ``layer_max``, both included. With a limit, modules outside layers are left out.

    Raises:
        InputError: nothing is left; the message lists the endings and the layers that there are.
    """
    if layer_min is not None and layer_max is not None and layer_min > layer_max:
        raise InputError(f"layer_min must not be above layer_max, got {layer_min} and {layer_max}")
    if not adapter.modules:
        raise InputError(f"adapter {adapter.name} has LoRA on embeddings and convolutions only; nothing can be edited")
    named = [name for name in adapter.modules if _ends_in(name, target_modules)]
    if not named:
        ends = sorted({_ending(name) for name in adapter.modules})
        endings = " ".join(target_modules or [])
        raise InputError(
            f"target_modules {endings} matches nothing in adapter {adapter.name}{suggest(endings, ends)}; "
            f"there are: {', '.join(ends[:_LISTED])}"
        )
    if layer_min is None and layer_max is None:
        return named
    low, high = layer_min if layer_min is not None else 0, layer_max if layer_max is not None else float("inf")
    layers = {name: layer_index(name) for name in named}
    selected = [name for name in named if (layer := layers[name]) is not None and low <= layer <= high]
    if not selected:
        there = sorted({layer for layer in layers.values() if layer is not None})
        raise InputError(
            f"no module of adapter {adapter.name} is in layers {low} to {high}; "
            + (f"there are layers {', '.join(map(str, there))}" if there else "its modules are in no numbered layer")
        )
    return selected


def _ends_in(name: str, targets: Sequence[str] | None) -> bool:
    return targets is None or any(name == target or name.endswith(f".{target}") for target in targets)


def _ending(name: str) -> str:
    """A module's name after its layer's number: ``encoder.layer.3.output.dense`` → ``output.dense``."""
    match = _CONTAINER.search(name) or _NUMBER.search(name)
    return name[match.end() + 1 :] if match and match.end() < len(name) else name


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
