"""Rows of text or instructions, read from files or a hub, as token ids and batches.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Collator": "data.batches",
        "encode_instructions": "data.instructions",
        "load_instructions": "data.instructions",
        "load_text_data": "data.texts",
        "read_table": "data.table_files",
    },
)
