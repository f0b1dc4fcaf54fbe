"""Runs on disk and in processes: requests, folders, records, tables, workers, grids.

The public names are imported when they are first used.
"""

from __future__ import annotations

from sparselora import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Progress": "runs.progress",
        "RunFolder": "runs.folder",
        "RunRequest": "runs.request",
        "content_hash": "runs.provenance",
        "fingerprint": "runs.provenance",
        "ordered_map": "runs.workers",
        "read_record": "runs.folder",
        "read_table": "runs.files",
        "replacing": "runs.files",
        "upsert_row": "runs.files",
        "write_csv": "runs.files",
        "write_json": "runs.files",
    },
)
