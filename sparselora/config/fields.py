"""Strict settings: frozen pydantic models whose errors are one line, and what their fields accept in words.

Every error is an `InputError` of one line that names the key, the value, and what is accepted.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from sparselora.config.yaml_text import read_yaml, to_yaml_text
from sparselora.errors import InputError, shown, suggest
from sparselora.runs.user_files import in_file

S = TypeVar("S", bound="Settings")


def as_tuple(value: Any) -> Any:
    """Return a list of texts, or a text that stands for a list of it alone, as a tuple."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)]
"""A list of texts in a file, one or more words behind a flag."""


class Settings(BaseModel):
    """Base of the settings: strict about names, types and ranges, immutable, to and from mappings and YAML.

    Raises:
        InputError: an unknown name, a value of another type or outside its range, settings that contradict one another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    title: ClassVar[str] = "the settings"
    """Name of the settings in an error."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_line(type(self), values, error.errors(include_url=False))) from None

    @field_validator("*", mode="before")
    @classmethod
    def _check_plain(cls, value: Any) -> Any:
        """Refuse a blank text, and a whole number that 64 bits do not hold."""
        blank = any(isinstance(text, str) and not text.strip() for text in _items(value))
        if blank or (isinstance(value, int) and abs(value) >= 2**63):
            raise PydanticCustomError("plain_value", "is blank or too large")
        return value

    @classmethod
    def from_dict(cls: type[S], values: Any) -> S:
        """Build from a mapping as `to_dict` gives it; settings left out have their defaults.

        Raises:
            InputError: ``values`` is no mapping; else as the constructor.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{cls.title} must be a mapping of settings to values, got {shown(values)}")
        return cls(**{str(name): value for name, value in cls._by_field(values).items()})

    @classmethod
    def _by_field(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return ``values`` with other names of a setting, which only a mapping may have, replaced by the field's."""
        return values

    @classmethod
    def from_yaml(cls: type[S], path: str | Path) -> S:
        """Build from a YAML file.

        Raises:
            InputError: as `read_yaml` and `from_dict`, with the file's name.
        """
        values = read_yaml(path)
        with in_file(path):
            return cls.from_dict(values)

    def replace(self: S, **changes: Any) -> S:
        """Return these settings with ``changes`` in place of their values, checked like new ones."""
        return type(self)(**dict(self) | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting, in plain types."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return every setting as a text that `from_yaml` reads."""
        return to_yaml_text(self.to_dict())


def _items(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, tuple | list) else (value,)


# --- errors -------------------------------------------------------------------------------------------------------


def _line(cls: type[Settings], values: Mapping[str, Any], errors: list[ErrorDetails]) -> str:
    """Return the first of pydantic's ``errors`` about ``cls(**values)`` in one line; an unknown name goes first."""
    error = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    if error["type"] == "extra_forbidden":
        name, names = str(error["loc"][0]), list(cls.model_fields)
        return f"unknown key {shown(name)} in {cls.title}{suggest(name, names)} (known: {', '.join(names)})"
    if error["type"] == "value_error":  # one of our own, raised by a validator
        return str(error["ctx"]["error"])
    name, *keys = map(str, error["loc"])
    field, value = cls.model_fields[name], values[name]
    if keys and isinstance(value, Mapping):
        field, value = FieldInfo.from_annotation(get_args(field.annotation)[1]), value[keys[0]]
        name = f"{name} of {keys[0]}"
    option = Option.of(field)
    near = suggest(value, option.choices) if option.choices and isinstance(value, str) else ""
    remedy = f"; {error['msg']}" if error["type"] == "remedy" else ""
    return f"{name} must be {option.accepts()}, got {shown(value)}{near}{remedy}"


# --- fields in words ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """Values that a field accepts, its default and its line of help.

    ``kind`` is the type of the value: int, float, bool, str, tuple for a list of texts, Mapping, or the class of a
    section. ``low`` and ``high`` bound a number; ``excludes_low`` and ``excludes_high`` leave the bound itself out.
    ``optional`` admits None (null in YAML).
    """

    kind: type
    help: str
    default: Any
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    excludes_low: bool = False
    excludes_high: bool = False
    optional: bool = False

    @classmethod
    def of(cls, field: FieldInfo) -> Option:
        """Return what ``field`` of a model accepts."""
        kind: Any = field.annotation
        optional = get_origin(kind) in (Union, types.UnionType)
        if optional:
            kind = next(part for part in get_args(kind) if part is not types.NoneType)
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        kind = str if choices else get_origin(kind) or kind
        limits = {name: getattr(rule, name) for rule in field.metadata for name in _LIMITS if hasattr(rule, name)}
        return cls(
            kind, field.description or "", field.default, choices,
            low=limits.get("ge", limits.get("gt")), high=limits.get("le", limits.get("lt")),
            excludes_low="gt" in limits, excludes_high="lt" in limits, optional=optional,
        )  # fmt: skip

    def accepts(self) -> str:
        """Return the accepted values in words: ``a whole number of 1 or more``."""
        if self.choices:
            text = "one of " + ", ".join(self.choices)
        elif self.kind in (int, float):
            text = "a whole number" if self.kind is int else "a number"
            if self.high is not None:
                begin, end = "(" if self.excludes_low else "[", ")" if self.excludes_high else "]"
                text += f" in {begin}{_bound(self.low)}, {_bound(self.high)}{end}"
            elif self.low is not None:
                text += f" above {_bound(self.low)}" if self.excludes_low else f" of {_bound(self.low)} or more"
        else:
            text = _IN_WORDS.get(self.kind, "a mapping of settings to values")
        return text + (" or null" if self.optional else "")


_LIMITS = ("ge", "gt", "le", "lt")
_IN_WORDS = {
    bool: "true or false",
    str: "a text that is not empty",
    tuple: "a list of texts that are not empty",
}


def _bound(value: float | None) -> str:
    """Return ``value`` with all its digits where it is whole."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def options(cls: type[Settings]) -> dict[str, Option]:
    """Return field name → `Option` for the fields of ``cls`` that hold one plain value or a list, in their order."""
    fields = {name: Option.of(field) for name, field in cls.model_fields.items()}
    return {name: option for name, option in fields.items() if option.kind in (int, float, *_IN_WORDS)}
