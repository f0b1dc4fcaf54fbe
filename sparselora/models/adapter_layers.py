"""The layers that an adapter's modules are in, and the choice of modules by name and layer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparselora.errors import InputError, suggest
from sparselora.models.adapter_files import AdapterFile

_LISTED = 30
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
