"""A model's name as users give it: an alias, a local folder, or a name on the hub. No weights are read.

A name that can be neither is refused here, before a library asks the hub for it or a folder is claimed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sparselora.errors import InputError
from sparselora.models.weights import check_model_folder, resolve_alias

_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_CHOICES = "name a local folder, a hub name or 'minilm'"


def find_model(model: str) -> str:
    """The folder of a local model (``~`` expanded), or ``model`` itself where it may be a name on the hub.

    Raises:
        InputError: a folder that does not exist or is no model's (an adapter's among them), one that
            `sparselora.models.weights.check_model_folder` refuses, a file, or a name that no system or hub would take.
    """
    try:
        path = Path(resolve_alias(model)).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except RuntimeError:  # expanduser
        raise InputError(f"model {model!r} begins with the home folder of an unknown user; {_CHOICES}") from None
    except (OSError, ValueError):  # too long, not allowed, or with a null byte
        shown = model if len(model) <= 60 else f"{model[:60]}…"
        raise InputError(f"model {shown!r} ({len(model)} characters) is no name of a folder; {_CHOICES}") from None
    if model and is_folder:
        if (path / "adapter_config.json").exists():
            raise InputError(
                f"model folder {model!r} holds an adapter (adapter_config.json); name the folder of its base model"
            )
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {model!r} has no config.json; name the folder of a transformers model")
        check_model_folder(model)
        return str(path)
    if is_file:
        raise InputError(f"model {model!r} is a file; name the folder that holds it")
    local = model.startswith((".", "~", os.sep)) or os.path.isabs(model)
    if local or not _HUB.fullmatch(model) or ".." in model or "--" in model:
        shown = model if len(model) <= 120 else f"{model[:120]}…"
        raise InputError(f"model folder {shown!r} does not exist; {_CHOICES}")
    return model
