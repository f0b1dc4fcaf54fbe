"""The text around a prompt that an adapter was trained with: a small file in its folder, which PEFT does not read.

A model that the adapter was merged into has the same file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparselora.errors import InputError, plain, shown
from sparselora.models.model_files import local_path
from sparselora.runs.files import write_json
from sparselora.runs.user_files import read_json_object

TEMPLATE_FILE = "prompt_template.json"
DEFAULT_TEMPLATE = "{prompt}\n"
_FIELD, _CHAT_FIELD = "template", "chat_template"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, which renders conversations.

    Attributes:
        jinja: its text, as ``apply_chat_template`` takes it; None for that of the model's tokenizer.
    """

    jinja: str | None = None


Template = str | ChatTemplate
"""The text around a prompt, with ``{prompt}`` in it, or a chat template."""


def recorded_template(folder: Path) -> Template | None:
    """Return the template that the adapter, or the merged model, in ``folder`` records; None where there is none.

    Raises:
        InputError: a record that is damaged.
    """
    path = folder / TEMPLATE_FILE
    if not path.exists():
        return None
    label = f"{TEMPLATE_FILE} of {plain(folder.name)}"
    remedy = "restore it, or remove it and give the template"
    record = read_json_object(path, label, remedy=remedy)
    template, chat_template = record.get(_FIELD), record.get(_CHAT_FIELD)
    if template is None and isinstance(chat_template, str) and chat_template:
        return ChatTemplate(chat_template)
    if not isinstance(template, str) or "{prompt}" not in template or chat_template is not None:
        raise InputError(
            f"{label} must hold a {_FIELD} with {{prompt}} in it, or a {_CHAT_FIELD} alone, got "
            f"{shown(template if chat_template is None else record)}; {remedy}"
        )
    return template


def merged_folder(model: str) -> str | None:
    """Return the folder of ``model`` if an adapter with a template was merged into it."""
    path = local_path(model)
    return str(path) if (path / TEMPLATE_FILE).is_file() else None


def template_outputs(folder: str | Path) -> tuple[str, ...]:
    """Return the file that a changed copy of the adapter in ``folder`` takes over from it, if that is there."""
    return (TEMPLATE_FILE,) if (Path(folder) / TEMPLATE_FILE).exists() else ()


def write_template(folder: Path, template: Template) -> None:
    """Record ``template`` in the folder of an adapter; of a chat template its text, whoever has it."""
    if isinstance(template, ChatTemplate):
        assert template.jinja is not None
        write_json(folder / TEMPLATE_FILE, {_CHAT_FIELD: template.jinja})
    else:
        write_json(folder / TEMPLATE_FILE, {_FIELD: template})
