"""Data sets of the Hugging Face hub, or of its cache, as tables."""

from __future__ import annotations

import logging
from typing import Any

from sparselora.data.arrow_tables import from_arrow
from sparselora.data.tables import Table
from sparselora.errors import InputError


def load_from_hub(path: str, configuration: str | None, subject: str, remedy: str) -> Any:
    """Return a data set of the hub, by split.

    Args:
        path, configuration: as ``datasets.load_dataset`` takes them.
        subject: the beginning of the message where it cannot be loaded: the data set by the name that the user gave.
        remedy: the end of that message: what to do.
    Raises:
        InputError: it cannot be loaded.
    """
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one clear line, not a line for every retry
    try:
        return datasets.load_dataset(path, configuration)
    except Exception as error:  # the hub client raises a dozen kinds, all of them "not available"
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{subject} could not be loaded from the hub ({reason}); {remedy}") from None


def split_table(loaded: Any, split: str, source: str) -> Table:
    """Return the rows of one split of what `load_from_hub` returned; messages call it ``source``."""
    return from_arrow(loaded[split].with_format("arrow")[:], source)
