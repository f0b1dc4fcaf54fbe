"""The prompt template that an adapter was trained with, in a small file in its folder. PEFT takes no notice of it."""

from __future__ import annotations

from pathlib import Path

from sparselora.errors import InputError, plain, shown
from sparselora.runs.files import write_json
from sparselora.runs.user_files import read_json_object

TEMPLATE_FILE = "prompt_template.json"
_FIELD = "template"


def recorded_template(folder: Path) -> str | None:
    """Return the template that the adapter in ``folder`` records; None where there is no record.

    Raises:
        InputError: a record that is damaged.
    """
    path = folder / TEMPLATE_FILE
    if not path.exists():
        return None
    label = f"{TEMPLATE_FILE} of adapter {plain(folder.name)}"
    remedy = "restore it, or remove it and give the template"
    template = read_json_object(path, label, remedy=remedy).get(_FIELD)
    if not isinstance(template, str) or "{prompt}" not in template:
        raise InputError(f"{label} must hold a {_FIELD} with {{prompt}} in it, got {shown(template)}; {remedy}")
    return template


def template_outputs(folder: str | Path) -> tuple[str, ...]:
    """Return the file that a changed copy of the adapter in ``folder`` takes over from it, if that is there."""
    return (TEMPLATE_FILE,) if (Path(folder) / TEMPLATE_FILE).exists() else ()


def write_template(folder: Path, template: str) -> None:
    """Record ``template`` in the folder of an adapter."""
    write_json(folder / TEMPLATE_FILE, {_FIELD: template})
