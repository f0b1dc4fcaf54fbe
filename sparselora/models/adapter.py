"""An adapter on disk with every tensor in its file, so that it can be edited and written again with nothing lost.

`models.adapter_files` says which adapters are LoRA at all and what their scalings are. Here each linear pair of lora_A
and lora_B can be replaced; everything else in the file (a trained head, biases, LoRA on embeddings and convolutions) is
carried through byte for byte, and listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparselora.config.token_gates import SETTINGS
from sparselora.errors import InputError, suggest
from sparselora.models.adapter_files import (
    LARGEST_WEIGHT,
    PICKLE,
    LoraModule,
    lora_modules,
    peft_keys,
    read_config,
    refuse_tied,
    stored_shapes,
    unpickled,
    weights_file,
    write_files,
)
from sparselora.models.class_names import recorded_names

_LISTED = 30


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it is stored.

    Attributes:
        name: of its folder.
        config: ``adapter_config.json``.
        tensors: every tensor of the file in its own type, by PEFT's key (`sparselora.models.adapter_files.peft_keys`).
        modules: the linear LoRA modules, which can be edited, by name and layer number.
        fixed: LoRA modules of another kind (embeddings, convolutions), which are carried.
        carried: key → what it is, for every tensor that is not a factor of one of ``modules``.
        classes: names of a classifier's classes, where they are recorded.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    modules: dict[str, LoraModule]
    fixed: dict[str, LoraModule]
    carried: dict[str, str]
    classes: tuple[str, ...] = ()

    def factors(self, module: str) -> tuple[Tensor, Tensor, float]:
        """``lora_A (r, d_in)``, ``lora_B (d_out, r)`` as stored, and the scaling."""
        entry = self.modules[module]
        return self.tensors[entry.key_A], self.tensors[entry.key_B], entry.scaling


# --- reading ------------------------------------------------------------------------------------------------------


def open_adapter(folder: str | Path) -> AdapterFile:
    """Read a PEFT LoRA adapter whole, from safetensors or a pickle of tensors.

    Raises:
        InputError: what `models.adapter_files` refuses (other methods, DoRA, changed base weights, unknown names,
            factors that are missing or of another rank than configured); gates per token; weights that are missing, a
            Git-LFS pointer, truncated, pickled with more than tensors, or not finite.
    """
    folder = Path(folder)
    config = read_config(folder)
    if (folder / SETTINGS).is_file():
        raise InputError(
            f"adapter {folder.name} is gated per token ({SETTINGS}), and singular directions mix the channels that its "
            "gates choose from; take the adapter_static beside it"
        )
    stored = stored_tensors(weights_file(folder))
    tensors = {key: stored[name] for name, key in peft_keys(folder, config, stored).items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    every = lora_modules(folder, config, shapes, convolutions=True)
    refuse_tied(folder, config, every)
    modules, fixed = {}, {}
    reasons: dict[str, str] = {}
    for module, entry in sorted(every.items(), key=lambda item: _natural(item[0])):
        kind = "LoRA of an embedding" if entry.is_embedding else "LoRA of a convolution"
        if entry.is_embedding or len(shapes[entry.key_A]) != 2:
            fixed[module] = entry
            reasons |= {entry.key_A: kind, entry.key_B: kind}
            continue
        modules[module] = entry
        for key in (entry.key_A, entry.key_B):
            _refuse_damaged(folder, key, tensors[key])
    factors = {key for entry in modules.values() for key in entry[:2]}
    carried = {name: reasons.get(name) or _kind(name) for name in tensors if name not in factors}
    return AdapterFile(folder.resolve().name, config, tensors, modules, fixed, carried, recorded_names(folder))


def stored_tensors(path: Path) -> dict[str, Tensor]:
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


def _refuse_damaged(folder: Path, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(
            f"{name} in {folder.name} is {tensor.dtype}; LoRA weights are floating-point numbers of at least 16 bits"
        )
    if not tensor.abs().max() <= LARGEST_WEIGHT:
        raise InputError(
            f"{name} in {folder.name} holds NaN, infinite values or some above {LARGEST_WEIGHT:g}; the weights are "
            "damaged"
        )


def _natural(name: str) -> list[str | int]:
    """A sort key that puts ``layer.2`` before ``layer.10``: texts and numbers in turn."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"(\d+)", name))]


def _kind(name: str) -> str:
    if ".lora_" in name:
        return "LoRA bias" if name.endswith(".bias") else "other LoRA tensor"
    if name.endswith(".base_layer.weight"):  # PEFT saves the embedding under a LoRA with it
        return "weight of the base model"
    return "trained in full"


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
        given = " ".join(target_modules or [])
        raise InputError(
            f"target_modules {given} matches nothing in adapter {adapter.name}{suggest(given, ends)}; "
            f"there are: {', '.join(ends[:_LISTED])}"
        )
    if layer_min is None and layer_max is None:
        return named
    low, high = layer_min if layer_min is not None else 0, layer_max if layer_max is not None else float("inf")
    layers = {name: layer_index(name) for name in named}
    chosen = [name for name in named if (at := layers[name]) is not None and low <= at <= high]
    if not chosen:
        there = sorted({at for at in layers.values() if at is not None})
        raise InputError(
            f"no module of adapter {adapter.name} is in layers {low} to {high}; "
            + (f"there are layers {', '.join(map(str, there))}" if there else "its modules are in no numbered layer")
        )
    return chosen


def _ends_in(name: str, targets: Sequence[str] | None) -> bool:
    return targets is None or any(name == target or name.endswith(f".{target}") for target in targets)


def _ending(name: str) -> str:
    """A module's name after its layer's number: ``encoder.layer.3.output.dense`` → ``output.dense``."""
    match = _CONTAINER.search(name) or _NUMBER.search(name)
    return name[match.end() + 1 :] if match and match.end() < len(name) else name


# --- writing ------------------------------------------------------------------------------------------------------


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
    new_factors: Mapping[str, tuple[Tensor, Tensor]],
    config_changes: Mapping[str, Any] | None = None,
    new_tensors: Mapping[str, Tensor] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> None:
    """Write ``adapter`` with other factors, as ``adapter_config.json`` and ``adapter_model.safetensors``.

    Types and every tensor that is not named stay as they are; a pickled adapter comes out as safetensors.

    Args:
        new_factors: module → (lora_A, lora_B), in the stored types.
        config_changes: fields of the configuration that take other values.
        new_tensors: other tensors that take other values, by key.
        ranks: as `sparselora.models.adapter_files.write_files` takes them.
    """
    replaced = dict(new_tensors or {})
    for module, (A, B) in new_factors.items():
        entry = adapter.modules[module]
        replaced |= {entry.key_A: A, entry.key_B: B}
    for key, tensor in replaced.items():
        assert tensor.dtype == adapter.tensors[key].dtype, f"{key} changed its type"
    tensors = {key: replaced.get(key, tensor) for key, tensor in adapter.tensors.items()}
    write_files(Path(folder), {**adapter.config, **(config_changes or {})}, tensors, ranks, adapter.classes)
