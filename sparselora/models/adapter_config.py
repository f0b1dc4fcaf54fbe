"""The configuration of a PEFT adapter: its fields and patterns checked, before anything is built or matched by them.

Decides for every command that reads factors which adapters are plain LoRA on the model that they name.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparselora.errors import InputError, shown
from sparselora.runs.user_files import read_json_object

CONFIG = "adapter_config.json"

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
"""Limit on lora_alpha: squares of an update within it stay in float64."""


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
    "alora_invocation_tokens": (
        _optional(lambda token: _is_integer(token) and 0 <= token < 2**31, alone=False),
        "a list of token ids or null",
    ),
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
        raise InputError(f"adapter folder {folder.name} has no {CONFIG}; PEFT writes it next to the weights")
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


def value_by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that is the module's name or a dotted end of it: PEFT's rule, keys are expressions."""
    for key, value in (pattern or {}).items():
        if re.match(_by_end(key), module):
            return value
    return default


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as ``max_lora_rank``."""


def vllm_rank(rank: int) -> int | None:
    """Return the least ``max_lora_rank`` with which vLLM serves ``rank``; None where it serves none so large."""
    return next((served for served in VLLM_RANKS if served >= rank), None)


# --- for writing -------------------------------------------------------------------------------------------------


def uniform_config(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return ``config`` for factors that hold the whole update, all of one ``rank``: alpha == r, and no patterns.

    Loaders differ on modules of several ranks: PEFT divides each module's alpha by its rank, vLLM the global alpha by
    the global rank, llama.cpp the global alpha by each module's rank. All three then find the scale 1.
    """
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    unused = ("eva_config", "corda_config", "lora_ga_config")  # settings of another initialisation
    return {**config, **plain, "init_lora_weights": True, **{name: None for name in unused if config.get(name)}}
