"""The ``config.json`` of a model: of a local folder, an alias, or a name on the hub. No weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparselora.errors import InputError
from sparselora.models.architectures import SHAPES
from sparselora.models.weights import local_path, parse_config


def model_label(model: str) -> str:
    """A name for tables and files: the last part of a path or hub name."""
    return Path(model).resolve().name if Path(model).exists() else model.rsplit("/", 1)[-1]


def read_model_config(model: str) -> dict[str, Any]:
    """The ``config.json`` of a local folder, an alias, or a model on the hub (that one file only).

    Raises:
        InputError: there is none, it cannot be had, or `sparselora.models.weights.read_config` would refuse it.
    """
    folder = local_path(model)
    if folder.exists():
        path = folder / "config.json" if folder.is_dir() else folder
        if not path.exists():
            raise InputError(f"model folder {model} has no config.json; name a folder of a transformers model")
    else:
        path = _download(model)
    return parse_config(path, f"the configuration of {model}")


def _download(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # each of its retries would be a line before ours
    try:
        return Path(hf_hub_download(model, "config.json"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {model!r} is no local folder and its config.json cannot be had from the hub "
            f"({type(error).__name__}); check the name and the network, or use --shape ({', '.join(SHAPES)})"
        ) from None
