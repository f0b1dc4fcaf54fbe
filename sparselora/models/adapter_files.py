"""LoRA adapters on disk, as PEFT writes them: read as numpy factors, without a model and, from safetensors, without
torch; and written, with one rank and alpha == rank in every module.

Which adapters are plain LoRA on the model that they name, what their tensors are called and what their scalings are is
decided here for every command that reads factors.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from sparselora.errors import InputError, shown
from sparselora.models.class_names import record
from sparselora.models.weights import LFS_POINTER, file_matrices, load_matrix
from sparselora.runs.folder import replacing, write_json
from sparselora.runs.user_files import read_json_object

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""

_KEY = re.compile(
    rf"^{re.escape(PREFIX)}(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))$"
)

# --- the configuration --------------------------------------------------------------------------------------------

_REFUSED = {
    "use_dora": "a DoRA adapter: its update depends on the norms of the base weights, not on B A alone",
    "enable_lora": "a merged fused-projection adapter (enable_lora) of an early PEFT; save it again with a current one",
    "use_qalora": "a QA-LoRA adapter: its A works on pooled inputs",
    "use_bdlora": "a block-diagonal (BD-LoRA) adapter",
    "kasa_config": "a KaSA adapter: its update has a diagonal between the factors",
    "monteclora_config": "a Monte-Carlo-LoRA adapter",
    "arrow_config": "an Arrow router: it chooses among other adapters and has no update of its own",
    "target_parameters": "an adapter of 3-D expert parameters (target_parameters)",
}
"""Configuration fields that make ΔW something else than scaling · B A."""

_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations by name that leave the base weights alone, as true and false do."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of the names of initialisations that take a part out of the base weights or quantise them. PEFT repeats
that when it loads the adapter, by an amount that depends on the rank; LoRA-GA alone needs the changed base."""
TO_PLAIN_LORA = "convert it to plain LoRA first (path_initial_model_for_weight_conversion of save_pretrained)"

_LARGEST_ALPHA = 1e30
LARGEST_WEIGHT = 1e50
"""Limits on lora_alpha and on a value of a factor: squares of an update within them stay in float64."""


def changes_base(init_lora_weights: object) -> bool:
    """Return whether PEFT changes the base weights for a LoRA that was initialised so."""
    return str(init_lora_weights).lower().startswith(CHANGES_BASE)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_integer(value) and value > 0


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and abs(value) <= _LARGEST_ALPHA


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _optional(is_item: Callable[[Any], bool], *, alone: bool) -> Callable[[Any], bool]:
    """A test for null or a list of items, or with ``alone`` one item."""

    def accepts(value: Any) -> bool:
        items = value if isinstance(value, list) else [value] if alone else [None]
        return value is None or all(map(is_item, items))

    return accepts


def _table(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test for null or an object of such values."""
    return lambda value: value is None or (isinstance(value, dict) and all(map(is_value, value.values())))


_Fields = dict[str, tuple[Callable[[Any], bool], str]]
"""Field of a configuration → a test of its value, and what it must be."""

_TEXTS = (_optional(_is_text, alone=True), "a text, a list of texts or null")
_SWITCH = (_is_switch, "true or false")
_COMMON_FIELDS: _Fields = {
    "peft_type": (_is_text, "a text"),
    "task_type": (lambda value: value is None or _is_text(value), "a text or null"),
    "target_modules": _TEXTS,
    "exclude_modules": _TEXTS,
    "modules_to_save": (_optional(_is_text, alone=False), "a list of texts or null"),
    "layers_pattern": _TEXTS,
    "layers_to_transform": (_optional(_is_integer, alone=True), "an integer, a list of integers or null"),
}
_LORA_FIELDS: _Fields = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_number, f"a finite number of at most {_LARGEST_ALPHA:g}"),
    "rank_pattern": (_table(_is_rank), "an object of positive integers by module, or null"),
    "alpha_pattern": (_table(_is_number), "an object of finite numbers by module, or null"),
    "lora_dropout": (_is_share, "a number from 0 to 1"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "init_lora_weights": (lambda value: _is_switch(value) or _is_text(value), "true, false or a text"),
    "layer_replication": (lambda value: value is None or isinstance(value, list), "a list or null"),
    "use_rslora": _SWITCH,
    "use_dora": _SWITCH,
    "use_qalora": _SWITCH,
    "lora_bias": _SWITCH,
    "fan_in_fan_out": _SWITCH,
    "ensure_weight_tying": _SWITCH,
}


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter of any of PEFT's methods, its fields checked as far as LoRA has them.

    Raises:
        InputError: no such folder or file, not JSON, a field of another type or out of range (the message names it), a
            pattern that is no regular expression.
    """
    if not folder.is_dir():
        raise InputError(f"adapter folder {str(folder)!r} does not exist; name the folder with {CONFIG} in it")
    path = folder / CONFIG
    if not path.exists():
        raise InputError(f"adapter folder {folder.name} has no {CONFIG}; PEFT writes it beside the weights")
    config = read_json_object(path, f"{CONFIG} in adapter folder {folder.name}", allow_nan=True)
    fields = _COMMON_FIELDS | (_LORA_FIELDS if config.get("peft_type") == "LORA" else {})
    for name, (accepts, wanted) in fields.items():
        if name in config and not accepts(config[name]):
            raise InputError(
                f"adapter {folder.name}, {CONFIG}: {name} must be {wanted}, got {shown(config[name])}; correct it"
            )
    for field, text, expression in _expressions(config):
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(
                f"adapter {folder.name}, {CONFIG}: {field} holds {shown(text)}, which is no regular expression "
                f"({error}); correct it"
            ) from None
    return config


def is_plain_lora(config: Mapping[str, Any]) -> bool:
    """Return whether every module's update is scaling · B A, with factors of the configured rank."""
    return config.get("peft_type") == "LORA" and not any(config.get(field) for field in _REFUSED)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the adapter's configuration, checked to be plain LoRA (or rsLoRA) on the base model as it is.

    Raises:
        InputError: what `read_peft_config` refuses; another method than LoRA; a variant named in the message; an
            initialisation that changes the base weights, or copied layers: without the adapter the loaded model is not
            the base then, and at another rank the adapter is another function.
    """
    config = read_peft_config(folder)
    if config.get("peft_type") != "LORA":
        raise InputError(f"adapter {folder.name} is of type {shown(config.get('peft_type'))}; only LORA is read")
    for field, reason in _REFUSED.items():
        if config.get(field):
            raise InputError(f"adapter {folder.name} is {reason}; only plain LoRA and rsLoRA are read")
    start = config.get("init_lora_weights", True)
    if changes_base(start):
        raise InputError(
            f"adapter {folder.name} was initialised by {start}, which changes the base weights by its rank when it is "
            f"loaded; {TO_PLAIN_LORA}"
        )
    if isinstance(start, str) and start.lower() not in _KEEPS_BASE:
        raise InputError(
            f"adapter {folder.name} was initialised by {shown(start)}, and what that does to the base weights is not "
            f"known; wanted true, false, {', '.join(_KEEPS_BASE)}"
        )
    if config.get("layer_replication"):
        raise InputError(
            f"adapter {folder.name} copies layers of the base model (layer_replication), so that its modules are not "
            "those of the base; save the model with copied layers, and the adapter without layer_replication"
        )
    return config


# --- patterns of the configuration --------------------------------------------------------------------------------

_SLOWEST_S = 5.0
"""Seconds for all patterns of an adapter on all names. Those of real adapters take milliseconds."""
_MATCH = (
    "import json, re, sys; p, n = json.load(sys.stdin); [(re.match(x, y), re.fullmatch(x, y)) for x in p for y in n]"
)


def _by_end(key: str) -> str:
    """The expression by which PEFT holds a key of ``rank_pattern`` against a module's name: a dotted end of it."""
    return rf"(.*\.)?({key})$"


def _expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Field, text in it, and the regular expression that PEFT makes of the text and matches with names of modules."""
    for field in ("target_modules", "exclude_modules"):  # a list there holds plain names
        if isinstance(config.get(field), str):
            yield field, config[field], config[field]
    for text in config.get("modules_to_save") or ():
        yield "modules_to_save", text, rf"(^|.*\.){text}($|\..*)"
    layers = config.get("layers_pattern") or ()
    for text in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", text, rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\."
    for field in ("rank_pattern", "alpha_pattern"):
        table = config.get(field)
        for key in table if isinstance(table, dict) else ():
            yield field, key, _by_end(key)


def refuse_slow_patterns(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise InputError where the configuration's patterns would take for ever on the ``names`` of modules.

    Nothing can stop Python's matching of an expression such as ``(a+)+b``, so that a process of its own tries them
    first, under a limit of time. Texts that repeat nothing, which is nearly all, are safe and are not tried.
    """
    expressions = [expression for _, text, expression in _expressions(config) if re.search(r"[*+?{]", text)]
    if not expressions:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH], input=json.dumps([expressions, list(names)]).encode(),
            timeout=_SLOWEST_S, check=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.SubprocessError:
        raise InputError(
            f"adapter {folder.name}, {CONFIG}: its patterns (rank_pattern, alpha_pattern, target_modules, …) take more "
            f"than {_SLOWEST_S:g} s on the names of the modules; write them without repetitions within repetitions"
        ) from None


def _by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that is the module's name or a dotted end of it: PEFT's rule, keys are expressions."""
    for key, value in (pattern or {}).items():
        if re.match(_by_end(key), module):
            return value
    return default


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
    """Where a module's two factors are in the file, by PEFT's keys, and c of ΔW = c · B A."""

    key_A: str
    key_B: str
    scaling: float
    is_embedding: bool = False

    @property
    def key_bias(self) -> str:
        """Where the bias of lora_B would be (``lora_bias=True``); the layer adds it times the scaling."""
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


# --- factors ------------------------------------------------------------------------------------------------------


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


def lora_modules(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    convolutions: bool = False,
) -> dict[str, LoraModule]:
    """Return the LoRA modules of an adapter by name, in the file's order, with their scalings.

    These follow the configuration: alpha/r, alpha/√r for rsLoRA, ``rank_pattern`` and ``alpha_pattern`` as PEFT matches
    them.

    Args:
        shapes: of every tensor by PEFT's key (`peft_keys`).
        convolutions: whether LoRA on convolutions may be there.
    Raises:
        InputError: no LoRA weights; magnitudes of a DoRA whose configuration hides it; one of two factors is missing,
            empty, not 2-D, or of another rank than configured; patterns that would hang.
    """
    found: dict[str, dict[str, str]] = {}
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
        found.setdefault(match["module"], {})[match["linear"] or match["embedding"]] = key
        embeddings.update([match["module"]] if match["embedding"] else [])
    if not found:
        raise InputError(f"adapter {folder.name} holds no lora_A and lora_B weights")
    refuse_slow_patterns(folder, config, found)
    modules = {}
    for module, sides in found.items():
        if set(sides) != {"A", "B"}:
            raise InputError(
                f"adapter {folder.name}: {module} has no lora_{'B' if 'A' in sides else 'A'}; restore the file"
            )
        A, B = (tuple(shapes[sides[side]]) for side in "AB")
        scaling = _scaling(folder, config, module, A, B, convolutions)
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
    convolutions: bool,
) -> float:
    """A module's scaling, from the configuration; the shapes of its factors are checked against it."""
    r = _by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
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
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)


# --- reading ------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> tuple[dict[str, Any], list[Factors]]:
    """Return a PEFT LoRA adapter: its configuration and the factors of every module, in the file's order by module.

    Other tensors in the file (a trained head, biases) are left alone.

    Raises:
        InputError: what `read_config`, `peft_keys` and `lora_modules` refuse; weights that are missing, a Git-LFS
            pointer, truncated or not finite.
    """
    config = read_config(folder)
    path = weights_file(folder)
    tensors: dict[str, torch.Tensor] = {}
    if path.name == PICKLE:
        tensors = unpickled(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    else:
        shapes = stored_shapes(path)
    keys = peft_keys(folder, config, shapes)
    modules = lora_modules(folder, config, {key: shapes[name] for name, key in keys.items()})
    refuse_tied(folder, config, modules)
    infos = {} if tensors else {info.name: info for info in file_matrices(path)}
    names = {key: name for name, key in keys.items()}

    def value(key: str) -> NDArray[np.floating]:
        name = names[key]
        if name in infos:
            array = load_matrix(infos[name])
        elif name in tensors and tensors[name].is_floating_point():
            exact = tensors[name].element_size() == 8
            array = (tensors[name].double() if exact else tensors[name].float()).numpy()
        else:
            raise InputError(f"{name} in {folder.name} is no matrix of floating-point numbers; the weights are damaged")
        if not float(np.abs(array).max()) <= LARGEST_WEIGHT:
            raise InputError(
                f"{name} in {folder.name} holds NaN, infinite values or some above {LARGEST_WEIGHT:g}; the weights are "
                "damaged"
            )
        return array

    return config, [
        Factors(module, value(entry.key_A), value(entry.key_B), entry.scaling) for module, entry in modules.items()
    ]


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
    """Return the shape of every tensor in a safetensors file by its name there.

    Raises:
        InputError: a file that is truncated or not safetensors.
    """
    file_matrices(path)  # checks the header, and says in words what is wrong with it
    try:
        with safe_open(path, "numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path.name} in adapter folder {path.parent.name} is truncated or corrupt ({error}); restore it"
        ) from None


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


# --- writing ------------------------------------------------------------------------------------------------------


def uniform_config(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return ``config`` for factors that hold the whole update, all of one ``rank``: alpha == r, and no patterns.

    Loaders differ on modules of several ranks: PEFT divides each module's alpha by its rank, vLLM the global alpha by
    the global rank, llama.cpp the global alpha by each module's rank. All three then find the scale 1.
    """
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    unused = ("eva_config", "corda_config", "lora_ga_config")  # settings of another initialisation
    return {**config, **plain, "init_lora_weights": True, **{name: None for name in unused if config.get(name)}}


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
) -> None:
    """Write an adapter: ``adapter_config.json`` and ``adapter_model.safetensors``, each whole or not at all.

    Args:
        tensors: by PEFT's key.
        ranks: module → its channels that are no padding; kept as ``ranks`` in the metadata of the weights.
        classes: names of a classifier's classes by id, kept there too, as `class_names.recorded_names` reads
            them.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({"ranks": json.dumps(dict(ranks))} if ranks else {}) | record(classes)
    with replacing(folder / SAFETENSORS) as part:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part, metadata=metadata)
    write_json(folder / CONFIG, dict(config))
