"""A model by the name that users give it, and its files: needs neither numpy nor torch, and reads no weights.

A name is an alias, a local folder, a GGUF file or a name on the hub. One that can be none of these is refused here,
before a library asks the hub for it or a folder is claimed.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparselora.errors import InputError, printable, shown
from sparselora.models.architectures import SHAPES
from sparselora.models.gguf_header import is_gguf, read_gguf_header
from sparselora.models.packaged import PACKAGES, packaged_path, resolve_alias
from sparselora.runs.user_files import expand_user, read_json_object

INDEX = "model.safetensors.index.json"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MOST = {"layer": 10_000, "expert": 100_000}
"""Most layers and experts that a configuration may ask for: whoever builds or counts them takes time for each."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_CHOICES = f"name a local folder, a GGUF file, a hub name, or one of {', '.join(PACKAGES)}"


# --- where a model is ---------------------------------------------------------------------------------------------


def gguf_file(model: str) -> Path | None:
    """Return the GGUF file that holds a model, which may be that of a package; None for any other model.

    Raises:
        InputError: a name that ends in .gguf and is no file; an alias whose package is not installed.
    """
    path = packaged_path(model) if model in PACKAGES else expand_user(model)
    if is_gguf(path):
        return path
    if model.lower().endswith(".gguf") and not os.path.isdir(path):
        raise InputError(f"GGUF file {shown(model)} does not exist; {_CHOICES}")
    return None


def quantisation(model: str) -> str:
    """Return how the weights of a model in a GGUF file are quantised, such as ``Q4_K_M: Q4_K + Q6_K``; else ``""``."""
    file = gguf_file(model)
    return "" if file is None else read_gguf_header(file).quantisation


def model_facts(model: str | None) -> dict[str, str]:
    """Return what the record of a run says of a model in addition to its name: ``quantisation``, if it has any."""
    label = quantisation(model) if model else ""
    return {"quantisation": label} if label else {}


def public_name(model: str) -> str:
    """Return the name of ``model`` in records: the alias or hub name, or a local folder's own name without its path.

    A model in a GGUF file is named with its quantisation.
    """
    name = Path(model).resolve().name if Path(model).exists() else model
    label = quantisation(model)
    return f"{name} ({label})" if label else name


def model_label(model: str) -> str:
    """Return `public_name` without the owner of a hub name, for tables and figures."""
    return public_name(model).rsplit("/", 1)[-1]


def hub_name(model: str) -> str:
    """Return the name by which another machine finds ``model``: for an alias, that of its hub repository."""
    if model in PACKAGES:
        return PACKAGES[model].hub_name
    return Path(model).resolve().name if Path(model).exists() else model


def find_model(model: str) -> str:
    """The folder or GGUF file of a local model (``~`` expanded), or ``model`` where it may be a name on the hub.

    Raises:
        InputError: a folder that does not exist or is no model's (an adapter's among them), one that
            `check_model_folder` refuses, a GGUF file that is damaged or that transformers does not convert, another
            file, or a name that no system or hub would take.
    """
    if model not in PACKAGES and (file := gguf_file(model)) is not None:
        from sparselora.models.gguf_models import check_architecture

        check_architecture(read_gguf_header(file))
        return str(file)
    folder = resolve_alias(model)
    try:
        path = Path(folder).expanduser()
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
            hint = _gguf_hint(path) or "name the folder of a transformers model"
            raise InputError(f"model folder {model!r} has no config.json; {hint}")
        check_model_folder(model)
        return str(path)
    if is_file:
        raise InputError(f"model {model!r} is a file and not GGUF; name the folder that holds it")
    local = model.startswith((".", "~", os.sep)) or os.path.isabs(model)
    if local or not _HUB_NAME.fullmatch(model) or ".." in model or "--" in model:
        shown = model if len(model) <= 120 else f"{model[:120]}…"
        raise InputError(f"model folder {shown!r} does not exist; {_CHOICES}")
    return model


def local_path(model: str) -> Path:
    """Return the path that a model would have as a local folder, whether it is there or not.

    Raises:
        InputError: a name too long for a path, or with a NUL in it.
    """
    path = expand_user(resolve_alias(model))
    try:
        path.exists()  # which raises for names that no file system takes
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {shown(model)} cannot be a path ({getattr(error, 'strerror', None) or error}); {_CHOICES}"
        ) from None
    return path


def model_folder(model: str) -> Path:
    """The local folder of a model: an alias, a folder, or a hub name whose weights are downloaded (or were before).

    Raises:
        InputError: neither a local folder nor available on the hub.
    """
    path = local_path(model)
    if model and path.is_dir():
        return path.resolve()  # so that "." has a name
    if path.is_file():
        raise InputError(f"model {model!r} is a file and not GGUF; name the folder that holds it")
    if model.startswith((".", "~", os.sep)) or model.count("/") > 1 or not model:
        raise InputError(f"model folder {model!r} does not exist; {_CHOICES}")
    return _download_weights(model)


def _download_weights(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Files of the top folder only: others are copies in another format or precision.
        folder = snapshot_download(model, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {model!r} is no local folder, is not cached and cannot be had from the hub "
            f"({type(error).__name__}); check the name and the network, or {_CHOICES}"
        ) from None
    return Path(folder)


# --- its configuration --------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a model's folder; empty if it has none.

    Raises:
        InputError: it cannot be read, is no JSON object, is nested too deep, has a ``model_type`` that is no text, or
            asks for more layers or experts than any model has.
    """
    path = folder / "config.json"
    return parse_config(path, f"{path.name} in model folder {folder.name}") if path.exists() else {}


def read_model_config(model: str) -> dict[str, Any]:
    """The configuration of a local folder, a GGUF file, an alias, or a model on the hub (that one file only).

    Raises:
        InputError: there is none, it cannot be had, or `read_config` would refuse it.
    """
    if model not in PACKAGES and (file := gguf_file(model)) is not None:
        from sparselora.models.gguf_models import read_gguf_config

        return read_gguf_config(read_gguf_header(file))
    folder = local_path(model)
    if folder.exists():
        path = folder / "config.json" if folder.is_dir() else folder
        if not path.exists():
            raise InputError(f"model folder {model} has no config.json; name a folder of a transformers model")
    else:
        path = _download_config(model)
    return parse_config(path, f"the configuration of {model}")


def _download_config(model: str) -> Path:
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


def parse_config(path: Path, label: str) -> dict[str, Any]:
    """Read the model configuration in the file ``path``, which messages call ``label``; see `read_config`."""
    config = read_json_object(path, label, allow_nan=True)
    model_type = config.get("model_type", "")
    if not isinstance(model_type, str):
        raise InputError(f"model_type in {label} must be a text, got {shown(model_type)}; restore the file")
    for field, value in _whole_numbers(config):
        for word, most in _MOST.items():
            if word in field.lower() and value > most:
                raise InputError(
                    f"{shown(field)} in {label} is {shown(value)}, above the limit of {most:,}; correct it"
                )
    return config


def _whole_numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield field and value of every whole number in a configuration and the configurations inside it."""
    todo: list[Any] = [config]
    while todo:
        for field, value in todo.pop().items():
            if isinstance(value, dict):
                todo.append(value)
            elif isinstance(value, int):
                yield field, value


# --- which files hold its weights ---------------------------------------------------------------------------------


def check_model_folder(model: str) -> None:
    """Check what can be checked of a model before it is loaded; a name that is no local folder passes.

    Raises:
        InputError: a folder that holds an adapter and no model, a configuration that `read_config` refuses, an index
            that names files outside the folder or that are not there, or shards without an index.
    """
    folder = local_path(model)
    if not model or not folder.is_dir():
        return
    read_config(folder)
    _refuse_adapter(folder)
    if (folder / "model.safetensors").exists():
        return
    for name in (INDEX, _PICKLED_INDEX):
        if (folder / name).exists():
            _indexed_files(folder / name)
            return
    shards = [path for path in folder.glob("*.safetensors") if _SHARD.search(path.name)]
    if shards:
        _refuse_lone_shards(folder, shards)


_SHARD = re.compile(r"^(?P<stem>.*)-(?P<number>\d{1,9})-of-(?P<total>\d{1,9})(?P<end>\.[a-z.]+)$")
"""``model-00001-of-00002.safetensors``"""


def _refuse_adapter(folder: Path) -> None:
    """Raise for the folder of a PEFT adapter, with or without the configuration of its base model next to it."""
    adapter = [name for name in _ADAPTER_FILES if (folder / name).exists()]
    weights = [path for path in folder.glob("*.safetensors") if path.name not in _ADAPTER_FILES]
    pickled = [path for path in folder.glob("*.bin") if path.name.startswith("pytorch_model")]
    if adapter and not (weights and (folder / "config.json").exists()) and not pickled:
        raise InputError(f"model folder {folder.name} is an adapter's folder ({adapter[0]}); use --adapter")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: ``model.safetensors``, else what the index names, else all there are, sorted.

    Pickled ``.bin`` weights are not read.
    """
    _refuse_adapter(folder)
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():
        return [single]
    if index.exists():
        return _indexed_files(index)
    files = sorted(path for path in folder.glob("*.safetensors") if path.name not in _ADAPTER_FILES)
    if files:
        _refuse_lone_shards(folder, files)
        return files
    pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    if pickled:
        raise InputError(
            f"model folder {folder.name} holds only pickled weights ({printable(pickled[0])}), which are not read "
            "because they can run code; save the model again with safe_serialization=True"
        )
    hint = _gguf_hint(folder) or f"it needs model.safetensors, or shards and {INDEX}"
    raise InputError(f"model folder {folder.name} holds no weights; {hint}")


def _gguf_hint(folder: Path) -> str:
    """Return what to do with a folder that holds a GGUF file; "" for any other."""
    file = next(iter(sorted(folder.glob("*.gguf"))), None)
    return "" if file is None else f"name its GGUF file: {printable(str(folder / file.name))}"


def _refuse_lone_shards(folder: Path, files: Iterable[Path]) -> None:
    """Raise if one of ``files`` is a numbered shard of a set that is not whole."""
    sets: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for path in files:
        match = _SHARD.match(path.name)
        if match:
            sets[match["stem"], match["total"], match["end"]].add(int(match["number"]))
    for (stem, total, end), numbers in sets.items():
        if numbers != set(range(1, len(numbers) + 1)) or len(numbers) != int(total):
            missing = next(number for number in range(1, len(numbers) + 2) if number not in numbers)
            name = f"{stem}-{missing:0{len(total)}d}-of-{total}{end}"
            raise InputError(
                f"model folder {folder.name} holds {len(numbers)} of {int(total)} shards (not {printable(name)}), "
                "so most of the model would be missing; complete the download"
            )


def weight_map(index: Path) -> dict[str, str]:
    """Return what an index says: the name of each tensor → that of the file in the same folder that holds it."""
    label = f"{index.name} in model folder {index.parent.name}"
    names = read_json_object(index, label).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{label} has no weight_map; restore the file")
    for name in names.values():
        if not isinstance(name, str) or not name:
            raise InputError(f"{label} names {shown(name)} as a shard, which is no file name; restore the file")
        # What stands in the index, not where a link leads: the hub's cache is made of links.
        if re.search(r"[/\\:\0]", name) or name in {".", ".."}:
            raise InputError(
                f"{label} names the shard {printable(name)[:200]!r}, which is outside the folder; restore the file"
            )
    return names


def _indexed_files(index: Path) -> list[Path]:
    files = sorted({index.parent / name for name in weight_map(index).values()})
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise InputError(
            f"model folder {index.parent.name} lacks {len(missing)} of {len(files)} shards ({printable(missing[0])}); "
            "complete the download"
        )
    _refuse_lone_shards(index.parent, files)
    return files
