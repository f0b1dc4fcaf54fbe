from __future__ import annotations

import os
from pathlib import Path

import pytest

# The suite is offline; a test marked `network` unsets these itself.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models that stands beside a maintainer's checkout."""
    folder = ROOT.parent / "shared"
    if not (folder / "data" / "MANIFEST.md").exists():
        pytest.skip("needs ../shared, which only a maintainer has")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the pip-installed all-MiniLM-L6-v2."""
    from sparselora.errors import InputError
    from sparselora.weights import resolve_alias

    try:
        return Path(resolve_alias("minilm"))
    except InputError as error:
        pytest.skip(str(error))
