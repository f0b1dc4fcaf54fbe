"""Adapters and models of the hub that a grid names, fetched before its runs start."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparselora.errors import InputError
from sparselora.runs.grid import ADAPTERS, Line, at_line

INSTALLED = frozenset({"minilm", "smollm2"})
"""Models that come as Python packages (`sparselora.models.packaged`)."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_name(text: str) -> bool:
    """Return whether ``text`` is no folder here and has the form owner/name."""
    return not Path(text).exists() and _HUB_NAME.fullmatch(text) is not None


def local_adapter(name: str, run_root: Path) -> Path:
    """Return the folder of the adapter ``owner/name`` of the hub once it is fetched."""
    return run_root / ADAPTERS / name.replace("/", "--")


def with_local_adapters(
    path: Path, lines: Sequence[Line], run_root: Path, fetch: Callable[[str, Path], object] | None
) -> list[Line]:
    """Return ``lines`` with the adapters of the hub as folders of the grid, fetched by ``fetch`` where missing.

    Raises:
        InputError: one is not there, and ``fetch`` is None; or it cannot be had.
    """
    local_lines = []
    for line in lines:
        name = line.values.get("adapter")
        if name is None or not is_hub_name(name):
            local_lines.append(line)
            continue
        folder = local_adapter(name, run_root)
        with at_line(path, line.number):
            if not (folder / "adapter_config.json").is_file():
                if fetch is None:
                    raise InputError(
                        f"adapter {name!r} is no folder and was not fetched; --prefetch takes it from the hub (a dry "
                        "run does not)"
                    )
                fetch(name, folder)
        local_lines.append(replace(line, values=line.values | {"adapter": str(folder)}))
    return local_lines


def fetch_adapter(name: str, folder: Path) -> None:
    """Download the files of an adapter to ``folder``.

    Raises:
        InputError: it is not available.
    """
    _download(name, "adapter", local_dir=folder, allow_patterns=["adapter_*", "*.json"], ignore_patterns=["*/*"])


def fetch_model(name: str) -> None:
    """Download a base model to the hub's cache, without copies in the formats of other libraries.

    Raises:
        InputError: it is not available.
    """
    _download(name, "base model", ignore_patterns=["*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "*/*"])


def _download(name: str, what: str, **options: Any) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{what} {name!r} cannot be had from the hub ({type(error).__name__}); check the name and the network, or "
            "name a local folder"
        ) from None


def hub_models(lines: Sequence[Line]) -> list[str]:
    """Return the models of the hub that ``lines`` name, each once."""
    names = (line.values.get("model") for line in lines)
    return list(dict.fromkeys(name for name in names if name and _is_hub_model(name)))


def _is_hub_model(name: str) -> bool:
    """Return whether a model is on the hub, where some have no owner (``gpt2``); `INSTALLED` ones are not."""
    if name in INSTALLED or Path(name).exists():
        return False
    return name.count("/") < 2 and not name.startswith((".", "~", "/"))
