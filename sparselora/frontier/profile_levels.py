"""A finished profile as a search reads it: the sparsities that it leaves open, and its schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselora.config.sparsity import SparsityConfig
from sparselora.errors import InputError
from sparselora.runs.files import read_table
from sparselora.runs.folder import read_record

_LAYERS, _SCHEDULE = "layers.csv", "schedule.yaml"


@dataclass(frozen=True)
class ProfileLevels:
    """Sparsities that a profile leaves open.

    Attributes:
        schedule: sparsity by key of ``layer_sparsity``; empty where every layer stays dense.
        ffn_sparsities: the highest sparsity of each layer's FFN within the profile's tolerance; 0: dense.
    """

    schedule: Mapping[str, float]
    ffn_sparsities: tuple[float, ...]

    def is_open(self, level: float) -> bool:
        """Return whether at least half of the FFNs may be as sparse as ``level``."""
        return 2 * sum(sparsity >= level for sparsity in self.ffn_sparsities) >= len(self.ffn_sparsities)


def read_profile(folder: Path, model: Any) -> ProfileLevels:
    """Read the folder of a run of `profile`.

    Args:
        model: the search's model as records have it (`sparselora.runs.provenance.portable`).
    Raises:
        InputError: no finished run of `profile`, one of another model, or damaged files.
    """
    record = read_record(folder)
    if record is None or record["command"] != "profile" or record["status"] != "success":
        raise InputError(
            f"profile {folder} is not the folder of a finished run of profile; run it first, or leave it out"
        )
    profiled = record.get("arguments", {}).get("model")
    if profiled != model:
        raise InputError(f"profile {folder} is of another model, {profiled}; profile this one, or leave it out")
    layers = read_table(folder / _LAYERS, numbers=("layer", "sparsity"), texts=("part",))
    sparsities = layers.loc[layers["part"] == "ffn", "sparsity"]
    if not len(sparsities):
        raise InputError(f"profile {folder} measured no FFN; profile with --ffn_levels, or leave it out")
    schedule = SparsityConfig.from_yaml(folder / _SCHEDULE)
    return ProfileLevels(dict(schedule.layer_sparsity), tuple(float(value) for value in sparsities))
