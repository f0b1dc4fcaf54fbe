"""Another distribution that installs the import name ``sparselora``: that of the authors of SparseLoRA.

Imports nothing of the package, whose files the other one may have overwritten.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

DISTRIBUTION = "sparselora-lab"
"""Name under which pip knows this package."""
_NAME, _ENTRY = "sparselora", "sparselora.__main__:console"
_PACKAGE = Path(__file__).resolve().parent


def mixed_installation(
    package: Path = _PACKAGE, distributions: Iterable[importlib.metadata.Distribution] | None = None
) -> str | None:
    """Describe in one line a ``sparselora`` of others whose files are in the folder of this one; None without it.

    Two such packages overwrite one another's files, and fail in strange ways.

    Args:
        package: folder of this package.
        distributions: those of the name, by default what is installed.
    """
    for distribution in importlib.metadata.distributions(name=_NAME) if distributions is None else distributions:
        if any(entry.value == _ENTRY for entry in distribution.entry_points):
            continue  # an installation of this package under its former name
        init = f"{_NAME}/__init__.py"
        is_listed = any(file.as_posix() == init for file in distribution.files or ())
        if is_listed and Path(str(distribution.locate_file(init))).resolve().parent == package:
            return (
                f"the distribution {_NAME} {distribution.version} is another package of the same import name, in "
                f"the folder of {DISTRIBUTION}, so that their files are mixed; uninstall both, and install "
                "one of them, or each in an environment of its own"
            )
    return None
