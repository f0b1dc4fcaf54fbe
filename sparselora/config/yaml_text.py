"""YAML 1.2 of settings, in and out: no text may hang the reader, end it in a traceback, or mean two things.

Every error is an `InputError` of one line that says what is wrong, and on which line.
"""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.emitter import Emitter
from ruamel.yaml.error import YAMLError, YAMLWarning
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from sparselora.errors import InputError, plain, shown
from sparselora.runs.user_files import DEEPEST, in_file, read_text

_LARGEST_YAML = 256 * 2**10
"""Limit on a file of settings, in bytes; the longest has some thousands."""
_MOST_NODES = 10_000
"""Limit on the values and keys of a file, with those that an alias repeats."""


# --- in -----------------------------------------------------------------------------------------------------------


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        InputError: the file is missing, unreadable or too large; else as `parse_yaml`, with the file's name.
    """
    text = read_text(path, f"configuration {path}", remedy="name a YAML file", limit=_LARGEST_YAML)
    with in_file(path):
        return parse_yaml(text)


def parse_yaml(text: str) -> dict[str, Any]:
    """Return the mapping that ``text`` is; an empty text is an empty mapping.

    Raises:
        InputError: it is no YAML or no mapping, has a key that is no text or given twice, or a merge key, is nested
            deeper than `DEEPEST`, or holds more than `_MOST_NODES` values once its aliases are written out.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", YAMLWarning)
            node = yaml.compose(io.StringIO(text))
            if node is None:
                return {}
            _count(node, {})
            values = yaml.constructor.construct_document(node)
    except InputError:
        raise
    except YAMLError as error:
        raise InputError(f"no valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # !!int "", !!bool maybe, a date of month 13
        raise InputError(f"no valid YAML: a value is not of the type it seems to be of ({error})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"a configuration is a mapping of settings to values, got {shown(values)}")
    return values


class _Composer(Composer):
    """Ends at `DEEPEST` lists and mappings within one another, before the scanner has spent seconds on them."""

    _depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        if self._depth > DEEPEST:
            raise InputError("lists or mappings are nested too deep; a configuration has about three levels")
        self._depth += 1
        node: Node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _count(node: Node, counts: dict[int, int]) -> int:
    """Return the number of values in ``node`` with its aliases written out, each of which is checked once.

    Args:
        counts: by the identity of a node, those that are complete, and 0 for those around this one.
    """
    line = node.start_mark.line + 1
    if id(node) in counts:
        if not counts[id(node)]:
            raise InputError(f"line {line}: a value contains itself; write it out")
        return counts[id(node)]
    counts[id(node)] = 0
    parts: list[Node] = []
    if isinstance(node, MappingNode):
        _check_keys([key for key, _ in node.value])
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, CollectionNode):
        parts = node.value
    elif any("\ud800" <= character <= "\udfff" or character == "\0" for character in node.value):
        raise InputError(f"line {line}: {shown(node.value)} is no valid text; remove the characters")
    total = 1 + sum(_count(part, counts) for part in parts)
    if total > _MOST_NODES:
        raise InputError(f"line {line}: more than {_MOST_NODES:,} values; write fewer, and no alias of an alias")
    counts[id(node)] = total
    return total


def _check_keys(keys: list[Node]) -> None:
    names = set()
    for key in keys:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            raise InputError(f"line {line}: merge keys (<<) are not read; write out what they would add")
        if not isinstance(key, ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            value = plain(key.value) if isinstance(key, ScalarNode) else "a list or a mapping"
            raise InputError(f"line {line}: a key must be a text, got {value}")
        if key.value in names:
            raise InputError(f"line {line}: key {shown(key.value)} is given twice; give it once")
        names.add(key.value)


# --- out ----------------------------------------------------------------------------------------------------------

_YAML_1_1 = re.compile(
    r"(?:yes|no|on|off|Yes|No|On|Off|YES|NO|ON|OFF)|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"
)
"""Texts that a reader of YAML 1.1 takes for a boolean or a number to the base of 60."""


def to_yaml_text(values: Mapping[str, Any]) -> str:
    """Return ``values`` as a text that `parse_yaml` reads, in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer, yaml.Emitter = _Representer, _Emitter
    yaml.default_flow_style, yaml.width = False, 120
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    stream = io.StringIO()
    yaml.dump(dict(values), stream)
    return stream.getvalue()


class _Representer(SafeRepresenter):
    """Writes what readers of YAML 1.1 and 1.2 take for the same: ``1.0e-05``, and ``'yes'`` in quotes."""

    def represent_float(self, data: float) -> ScalarNode:
        text = repr(data)
        return self.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e", 1))

    def represent_str(self, data: str) -> ScalarNode:
        style = "'" if _YAML_1_1.fullmatch(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Representer.add_representer(float, _Representer.represent_float)
_Representer.add_representer(str, _Representer.represent_str)


class _Emitter(Emitter):
    """Quotes and folds texts as PyYAML does, which wrote the files of earlier runs."""

    def choose_scalar_style(self) -> Any:
        style = super().choose_scalar_style()
        if "\x85" in self.event.value:  # a line break of YAML 1.1, which the emitter writes as such and 1.2 has not
            return '"'
        is_wide_key = self.simple_key_context and self.analysis.multiline
        if style == '"' and not self.event.style and self.analysis.allow_single_quoted and not is_wide_key:
            return "'"
        return style

    def write_plain(self, text: str, split: bool = True) -> None:
        width, self.best_width = self.best_width, sys.maxsize
        for position, word in enumerate(re.split("(?<! ) (?! )", text)):  # folded at single spaces only
            if position and split and self.column > width:
                self.write_indent()
            super().write_plain(word, split=False)
        self.best_width = width

    def write_double_quoted(self, text: str, split: bool = True) -> None:
        super().write_double_quoted(text, split=False)  # folded, it loses a space after a backslash
