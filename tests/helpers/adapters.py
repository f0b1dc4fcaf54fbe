from __future__ import annotations

from pathlib import Path
from typing import Any

from sparselora.models.adapter_files import Matrices, read_adapter


def read_factors(folder: Path) -> tuple[dict[str, Any], list[Matrices]]:
    """Read an adapter's configuration and the factors of every module in it, as `rank --adapter` does."""
    adapter = read_adapter(folder)
    return adapter.config, [adapter.matrices(module) for module in adapter.entries]
