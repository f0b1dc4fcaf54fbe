"""Primary contrasts of a study: the few comparisons it is made for, written down and committed before its runs.

    alpha: 0.05
    contrasts:
      - {first: static, second: dense_half, endpoint: loss}
      - {first: fp8, second: dense, endpoint: loss, margin: 1 %}

What decides is named before there are numbers to choose by; everything else that a comparison shows is description.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from sparselora.config.fields import Settings
from sparselora.config.yaml_text import read_yaml
from sparselora.errors import InputError, shown
from sparselora.runs.user_files import in_file

_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%\s*")


class Contrast(Settings):
    """A difference that decides: ``first`` minus ``second`` at ``endpoint``, over seeds.

    Attributes:
        first, second: names of what is compared, as the kind of comparison has them.
        endpoint: the quantity.
        margin: largest difference that counts as none; a number in the endpoint's unit, or a text such as ``1 %``, of
            the mean of ``second``. Without one, equivalence is not tested.
        where: settings of the part of the runs that is meant, where they are of several models or data sets.

    Raises:
        InputError: a value of another type, a side or an endpoint that is missing, a margin that is not positive.
    """

    title: ClassVar[str] = "the contrast"

    first: str = ""
    second: str = ""
    endpoint: str = ""
    margin: Any = None
    where: Any = None

    @model_validator(mode="after")
    def _check(self) -> Contrast:
        if missing := [name for name in ("first", "second", "endpoint") if not getattr(self, name)]:
            raise InputError(f"{' and '.join(missing)} must be a text; a contrast names first, second and endpoint")
        size = self.margin_size
        if self.margin is not None and (size is None or not 0 < size < math.inf or (self.is_relative and size >= 1)):
            raise InputError(
                "margin must be a positive number in the unit of the endpoint, or a text such as '1 %', got "
                f"{shown(self.margin)}"
            )
        if self.where is not None and not isinstance(self.where, Mapping):
            raise InputError(f"where must be a mapping of settings to values, got {shown(self.where)}")
        if self.first == self.second:
            raise InputError(f"a contrast compares two things, got {shown(self.first)} twice")
        return self

    @property
    def settings(self) -> dict[str, str]:
        """The settings of ``where`` as texts."""
        return {str(name): str(value) for name, value in (self.where or {}).items()}

    @property
    def is_relative(self) -> bool:
        """True if the margin is a share of the mean of ``second``."""
        return isinstance(self.margin, str)

    @property
    def margin_size(self) -> float | None:
        """The margin as a number: in the unit of the endpoint, or as a fraction if it is relative."""
        if isinstance(self.margin, str):
            match = _PERCENT.fullmatch(self.margin)
            return float(match[1]) / 100 if match else None
        is_number = isinstance(self.margin, (int, float)) and not isinstance(self.margin, bool)
        return float(self.margin) if is_number and self.margin is not None else None

    @property
    def margin_text(self) -> str:
        """The margin in words; empty without one."""
        size = self.margin_size
        return "" if size is None else f"{100 * size:g} %" if self.is_relative else f"{size:g}"


class Study(Settings):
    """The contrasts of a study.

    Attributes:
        contrasts: at least one.
        alpha: probability of any false verdict among the family, at most.
        family: number of primary contrasts of the whole study, where other files hold some; else that of this one.
        name, sha256: of the file.

    Raises:
        InputError: a value of another type or outside its range, no contrast, the same one twice.
    """

    title: ClassVar[str] = "the study"

    contrasts: tuple[Contrast, ...] = ()
    alpha: float = Field(0.05, ge=0.0001, le=0.5, description="probability of any false verdict")
    family: int | None = Field(None, ge=1, description="contrasts of the whole study")
    name: str = "contrasts"
    sha256: str = "not read from a file"

    @model_validator(mode="after")
    def _check(self) -> Study:
        if not self.contrasts:
            raise InputError("a study names at least one contrast: first, second, endpoint")
        keys = [(c.first, c.second, c.endpoint, tuple(sorted(c.settings.items()))) for c in self.contrasts]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise InputError(f"contrast {i + 1} ({key[0]} against {key[1]} at {key[2]}) is there twice")
        if self.family is not None and self.family < len(self.contrasts):
            raise InputError(
                f"family must be at least the {len(self.contrasts)} contrasts of the file, got {self.family}"
            )
        return self


def read_contrasts(path: Path) -> Study:
    """Return the study that a YAML file describes: ``contrasts``, ``alpha``, ``family``.

    Raises:
        InputError: no such file, an unknown key, what `Contrast` and `Study` refuse; with the file's name.
    """
    values: dict[str, Any] = read_yaml(path)
    with in_file(path):
        listed = values.pop("contrasts", [])
        if not isinstance(listed, list):
            raise InputError(f"contrasts must be a list, got {shown(listed)}")
        contrasts = []
        for i, settings in enumerate(listed, start=1):
            try:
                contrasts.append(Contrast.from_dict(settings))
            except InputError as error:
                raise InputError(f"contrast {i}: {error}") from None
        if reserved := values.keys() & {"name", "sha256"}:
            raise InputError(f"unknown key {shown(min(reserved))} (known: contrasts, alpha, family)")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Study.from_dict(values | {"contrasts": tuple(contrasts), "name": path.name, "sha256": digest})
