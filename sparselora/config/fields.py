"""Strict settings: fields that check their values, and YAML whose errors say where it is wrong.

Every error is an `InputError` of one line that names the key, the value, and what is accepted.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from sparselora.errors import InputError, shown, suggest
from sparselora.runs.user_files import read_text

LARGEST_SEED = 2**32 - 1
"""Largest seed that random, numpy and torch all take."""


# --- what a value may be ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """Values that a field accepts, and its line of help.

    ``kind`` is the type of the value: int, float, bool, str, or tuple for a list of texts. ``low`` and ``high`` bound
    a number, inclusively except for ``below``, which excludes ``high``. ``optional`` admits None (null in YAML).
    ``default`` is the field's value where none is given.
    """

    kind: type
    help: str
    low: float | None = None
    high: float | None = None
    below: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False
    default: Any = None

    def accepts(self) -> str:
        """Return the accepted values in words: ``a whole number of 1 or more``."""
        if self.choices:
            text = "one of " + ", ".join(self.choices)
        elif self.kind in (int, float):
            text = "a whole number" if self.kind is int else "a number"
            if self.high is not None:
                text += f" in [{_bound(self.low)}, {_bound(self.high)}{')' if self.below else ']'}"
            elif self.low is not None:
                text += f" of {_bound(self.low)} or more" if not self.below else f" above {_bound(self.low)}"
        else:
            text = {bool: "true or false", str: "a text", tuple: "a list of texts"}[self.kind]
            text += " that are not empty" if self.kind is tuple else " that is not empty" if self.kind is str else ""
        return text + (" or null" if self.optional else "")

    def check(self, name: str, value: Any) -> Any:
        """Return ``value`` in the field's own type (a whole number for a float becomes one, a list a tuple).

        Raises:
            InputError: it is of another type, or outside its range.
        """
        if value is None and self.optional:
            return None
        fits = value is not None
        if self.kind is int:
            fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        elif self.kind is float:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        elif self.kind is tuple:
            value = (value,) if isinstance(value, str) else value
            texts = isinstance(value, (list, tuple)) and all(isinstance(v, str) and v.strip() for v in value)
            fits = texts and len(value) > 0
        else:
            fits = isinstance(value, self.kind) and not (isinstance(value, str) and not value.strip())
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


def _bound(value: float | None) -> str:
    """Return ``value`` with all its digits where it is whole."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def option(default: Any, kind: type, help: str, **limits: Any) -> Any:
    """Return a field of a dataclass of settings; ``limits`` are those of `Option`."""
    return field(default=default, metadata={"option": Option(kind, help, default=default, **limits)})


def options(cls: type) -> dict[str, Option]:
    """Return field name → `Option` for the plain fields of a dataclass of settings, in their order."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(cls) if "option" in f.metadata}


def check_fields(config: Any) -> None:
    """Put every field of ``config`` into its own type.

    Raises:
        InputError: a value of another type, or outside its range.
    """
    for name, setting in options(type(config)).items():
        object.__setattr__(config, name, setting.check(name, getattr(config, name)))


T = TypeVar("T")


def build(cls: type[T], values: Any, what: str) -> T:
    """Return ``cls(**values)``; ``what`` names the settings in an error.

    Raises:
        InputError: ``values`` is no mapping, or has an unknown key.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{what} must be a mapping of settings to values, got {shown(values)}")
    names = [f.name for f in dataclasses.fields(cast(Any, cls))]
    for name in values:
        if name not in names:
            raise InputError(
                f"unknown key {shown(name)} in {what}{suggest(str(name), names)} (known: {', '.join(names)})"
            )
    return cls(**values)


# --- YAML ---------------------------------------------------------------------------------------------------------

_LARGEST_YAML = 256 * 2**10
"""Limit on a file of settings, in bytes; the longest has some thousands."""
_MOST_NODES = 10_000
"""Limit on the values and keys of a file, with those that an alias repeats."""


class _Loader(yaml.SafeLoader):
    """YAML whose mappings name a key once, and in which ``1e-4`` is a number."""

    _expanded: dict[int, int]

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" or c == "\0" for c in value):
            raise InputError(f"line {node.start_mark.line + 1}: {shown(value)} is no valid text; remove the characters")
        return value

    def get_single_node(self) -> yaml.Node | None:
        self._expanded = {}
        return super().get_single_node()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """As the parent class does; counts what each node stands for, so that aliases of aliases of … end here."""
        node: yaml.Node = super().compose_node(parent, index)
        line = node.start_mark.line + 1
        if id(node) not in self._expanded:
            inner: list[yaml.Node] = []
            if isinstance(node, yaml.CollectionNode):
                if node.end_mark is None:
                    raise InputError(f"line {line}: a value contains itself; write it out")
                pairs = isinstance(node, yaml.MappingNode)
                inner = [part for pair in node.value for part in pair] if pairs else node.value
            self._expanded[id(node)] = 1 + sum(self._expanded[id(part)] for part in inner)
        if self._expanded[id(node)] > _MOST_NODES:
            raise InputError(f"line {line}: more than {_MOST_NODES:,} values; write fewer, and no alias of an alias")
        return node


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise InputError(f"line {line}: merge keys (<<) are not read; write out what they would add")
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise InputError(f"line {line}: a key must be a text, got {shown(key)}")
        if key in seen:
            raise InputError(f"line {line}: key {shown(key)} is given twice; give it once")
        seen.add(key)
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
    """Return the mapping that ``text`` is; an empty text is an empty mapping.

    Raises:
        InputError: it is no YAML or no mapping, gives a key twice, has a merge key, is nested too deep, or holds more
            than `_MOST_NODES` values once its aliases are written out.
    """
    try:
        values = yaml.load(text, _Loader)
    except InputError:
        raise
    except RecursionError:
        raise InputError("lists or mappings are nested too deep; a configuration has about three levels") from None
    except yaml.YAMLError as error:
        raise InputError(f"no valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # !!int "", !!bool maybe, a date of month 13
        raise InputError(f"no valid YAML: a value is not of the type it seems to be of ({error})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"a configuration is a mapping of settings to values, got {shown(values)}")
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        InputError: the file is missing, unreadable or too large; else as `parse_yaml`, with the file's name.
    """
    text = read_text(path, f"configuration {path}", remedy="name a YAML file", limit=_LARGEST_YAML)
    with in_file(path):
        return parse_yaml(text)


def to_yaml_text(values: Mapping[str, Any]) -> str:
    """Return ``values`` as a text that `parse_yaml` reads, in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
