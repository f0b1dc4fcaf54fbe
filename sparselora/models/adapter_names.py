"""The names of an adapter's tensors: those by which PEFT loads them, and the modules and scalings they stand for."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparselora.errors import InputError
from sparselora.models.adapter_config import CONFIG, refuse_slow_patterns, value_by_pattern

PREFIX = "base_model.model."
"""PEFT's prefix of the names of a model's modules."""

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
        raise InputError(not_a_matrix(folder, module, A, B))
    # A grouped convolution's lora_B has a share of the rank in each group.
    if A[0] != r or (linear and B[1] != r):
        raise InputError(
            f"adapter {folder.name}: {module} has lora_A {A} and lora_B {B}, {CONFIG} says rank {r}; "
            "the two files do not belong together"
        )
    alpha = value_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)


def not_a_matrix(folder: Path, module: str, A: tuple[int, ...], B: tuple[int, ...]) -> str:
    """Return the message about a module whose factors, of shapes ``A`` and ``B``, are not two matrices."""
    shapes = f"(lora_A {A}, lora_B {B})"
    return f"adapter {folder.name}: {module} is not 2-D {shapes}; only linear and embedding layers are read"
