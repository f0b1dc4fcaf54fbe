"""Strict settings: what a field of a dataclass accepts, and YAML that says where it is wrong.

Every error is an `InputError` of one line that names the key, the value, and what is accepted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from sparselora.errors import InputError, suggest

# --- what a value may be ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """What a field accepts, and its line of help.

    ``kind`` is the type of the value: int, float, bool, str, or tuple for a list of texts. ``low`` and ``high`` bound
    a number, inclusively but for ``below``, which excludes ``high``. ``optional`` admits None (null in YAML).
    """

    kind: type
    help: str
    low: float | None = None
    high: float | None = None
    below: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False

    def accepts(self) -> str:
        """In words: ``a whole number of 1 or more``."""
        if self.choices:
            text = "one of " + ", ".join(self.choices)
        elif self.kind in (int, float):
            text = "a whole number" if self.kind is int else "a number"
            if self.high is not None:
                text += f" in [{self.low:g}, {self.high:g}{')' if self.below else ']'}"
            elif self.low is not None:
                text += f" of {self.low:g} or more" if not self.below else f" above {self.low:g}"
        else:
            text = {bool: "true or false", str: "a text", tuple: "a list of texts"}[self.kind]
        return text + (" or null" if self.optional else "")

    def check(self, name: str, value: Any) -> Any:
        """``value`` in the field's own type (a whole number for a float becomes one, a list a tuple).

        Raises:
            InputError: it is of another type, or outside its range.
        """
        if value is None and self.optional:
            return None
        fits = value is not None
        if self.kind is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        elif self.kind is float:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        elif self.kind is tuple:
            value = (value,) if isinstance(value, str) else value
            fits = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, str) for v in value)
        else:
            fits = isinstance(value, self.kind)
        if not fits or not self._in_range(value):
            near = suggest(value, self.choices) if self.choices and isinstance(value, str) else ""
            raise InputError(f"{name} must be {self.accepts()}, got {shown(value)}{near}")
        return self.kind(value) if self.kind in (float, tuple) else value

    def _in_range(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.kind not in (int, float):
            return True
        if self.low is not None and (value < self.low or (self.below and self.high is None and value == self.low)):
            return False
        return self.high is None or value < self.high or (value == self.high and not self.below)


def shown(value: Any) -> str:
    """``value`` as YAML writes it, where Python would write otherwise: true, false, null."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value)


def option(default: Any, kind: type, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"option": Option(kind, help, **limits)})


def options(cls: type) -> dict[str, Option]:
    """Field name → `Option` for the plain fields of `SparsityConfig` or `TrainConfig`, in their order."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(cls) if "option" in f.metadata}


def check_fields(config: Any) -> None:
    for name, each in options(type(config)).items():
        object.__setattr__(config, name, each.check(name, getattr(config, name)))


T = TypeVar("T")


def build(cls: type[T], values: Any, what: str) -> T:
    """``cls(**values)`` after a look at the keys."""
    if not isinstance(values, Mapping):
        raise InputError(f"{what} must be a mapping of settings to values, got {shown(values)}")
    known = [f.name for f in dataclasses.fields(cast(Any, cls))]
    for name in values:
        if name not in known:
            raise InputError(f"unknown key {name!r} in {what}{suggest(str(name), known)} (known: {', '.join(known)})")
    return cls(**values)


# --- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML whose mappings name a key once, and in which ``1e-4`` is a number."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise InputError(f"line {key_node.start_mark.line + 1}: a key must be a text, got {shown(key)}")
        if key in seen:
            raise InputError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice; give it once")
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: the text ``1e3`` in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
    )


class in_file:
    """Names the file in an `InputError` that its contents raise."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError):
            raise InputError(f"{self._path}: {error}") from None


def parse_yaml(text: str) -> dict[str, Any]:
    """The mapping that ``text`` is; an empty text is an empty mapping.

    Raises:
        InputError: it is no YAML or no mapping, or gives a key twice.
    """
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"no valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"a configuration is a mapping of settings to values, got {shown(values)}")
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file is missing or unreadable; else as `parse_yaml`, with the file's name.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"configuration {path} cannot be read ({reason}); name a YAML file") from None
    with in_file(path):
        return parse_yaml(text)


def to_yaml_text(values: Mapping[str, Any]) -> str:
    """``values`` as `parse_yaml` reads them, in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
