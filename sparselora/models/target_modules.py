"""The modules of a model that a LoRA adapts: as named, by ends of names or a regular expression, or found."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparselora.errors import InputError, shown, suggest
from sparselora.models.adapter_layers import layer_index


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers of a model, in module order."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def is_match(name: str, suffix: str) -> bool:
    """Return whether the name of a module ends in ``suffix``: PEFT's rule for an entry of ``target_modules``."""
    return name == suffix or name.endswith("." + suffix)


def attention_projections(model: nn.Module) -> list[str]:
    """Shortest name endings that match the linear layers inside attention blocks, and no other linear layer.

    An attention block is a module whose class is called ``…Attention…``: so it is in every architecture of
    transformers. DistilBERT gives q_lin, k_lin, v_lin, out_lin; BERT query, key, value, attention.output.dense.

    Raises:
        InputError: the model has no such block.
    """
    blocks = [name for name, module in model.named_modules() if "Attention" in type(module).__name__]
    linears = linear_names(model)
    inside = [name for name in linears if any(name.startswith(block + ".") for block in blocks)]
    if not inside:
        raise InputError(
            f"no attention projections found; name target modules among: {', '.join(known_targets(model))}"
        )
    outside = [name for name in linears if name not in set(inside)]
    projections: dict[str, None] = {}
    for name in inside:
        parts = name.split(".")
        endings = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        projections[next(ending for ending in endings if not any(is_match(other, ending) for other in outside))] = None
    return list(projections)


def known_targets(model: nn.Module) -> list[str]:
    """Last name components of the model's linear layers, each once, in module order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear_names(model)))


def resolve_target_modules(
    model: nn.Module,
    entries: Sequence[str] | None,
    *,
    exclude: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    head: Sequence[str] = (),
) -> list[str]:
    """``entries`` as they are if each matches a linear layer; without entries, the attention projections.

    Where it takes more than ends of names to say which (``all-linear``, a regular expression, ``exclude`` or
    ``layers``), the full names of the modules that PEFT would adapt, in module order.

    Args:
        exclude: modules to leave out, by ends of their names or by one regular expression.
        layers: numbers of the layers to adapt.
        head: top-level modules that are trained whole, of which ``all-linear`` takes none.
    Raises:
        InputError: an entry, ``exclude`` or a layer that matches nothing; the message lists what the model has.
    """
    whole = _whole_entry("target_modules", entries)
    if whole is None:
        _check_entries(model, entries or ())
    targets = whole or (list(entries) if entries else attention_projections(model))
    if not isinstance(targets, str) and not exclude and layers is None:
        return targets
    config = LoraConfig(target_modules=targets)
    _maybe_include_all_linear_layers(config, model)  # writes their names in place of the word
    linears = linear_names(model)
    names = [name for name in linears if check_target_module_exists(config, name)]
    if whole == ALL_LINEAR:
        names = [name for name in names if name.partition(".")[0] not in head]
    if not names:
        raise InputError(
            f"target_modules {shown(targets)} matches no linear layer of the model, whole names such as {linears[0]}; "
            f"it has: {', '.join(known_targets(model))}"
        )
    if exclude:
        unwanted = LoraConfig(target_modules=_whole_entry("exclude_modules", exclude) or list(exclude))
        remaining = [name for name in names if not check_target_module_exists(unwanted, name)]
        if len(remaining) in (0, len(names)):
            extent = "all" if not remaining else "none"
            raise InputError(f"exclude_modules {shown(' '.join(exclude))} matches {extent} of the modules to adapt")
        names = remaining
    if layers is not None:
        there = {layer_index(name) for name in names}
        if lacking := [str(layer) for layer in layers if layer not in there]:
            present = sorted(layer for layer in there if layer is not None)
            numbers = f"layers {present[0]} to {present[-1]}" if present else "no numbered layers"
            raise InputError(
                f"layers_to_transform names {', '.join(lacking)}, and the modules to adapt are in {numbers}"
            )
        names = [name for name in names if layer_index(name) in layers]
    return names


ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output layer."""


def _whole_entry(setting: str, entries: Sequence[str] | None) -> str | None:
    """Return the one entry that is `ALL_LINEAR` or a regular expression, not the end of a name; None without such.

    Raises:
        InputError: it stands among others, or is no regular expression.
    """
    special = [entry for entry in entries or () if not re.fullmatch(r"[\w.]+", entry)]
    if not special:
        return None
    if len(entries or ()) > 1:
        raise InputError(
            f"{setting}: {shown(special[0])} is no end of a name, so it must stand alone; write one regular "
            "expression for all"
        )
    if special[0] != ALL_LINEAR:
        try:
            re.compile(special[0])
        except re.error as error:
            raise InputError(f"{setting}: {shown(special[0])} is no regular expression ({error}); correct it") from None
    return special[0]


def _check_entries(model: nn.Module, entries: Sequence[str]) -> None:
    linears = linear_names(model)
    for entry in entries:
        if not any(is_match(name, entry) for name in linears):
            names = known_targets(model)
            raise InputError(
                f"target module {entry!r} matches no linear layer of the model{suggest(entry, names)}; "
                f"it has: {', '.join(names)}"
            )
