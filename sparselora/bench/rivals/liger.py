"""Liger's kernels for norms, rotation, FFN and the fused output layer, as the Trainer of transformers applies them."""

from __future__ import annotations

import importlib
from typing import Any

from sparselora.bench.rivals.jobs import Job
from sparselora.bench.rivals.prepared import Prepared, base_model, with_adapter


def apply_kernels(model: Any, **kernels: bool) -> None:
    """Put Liger's kernels into ``model``; ``kernels`` says which ones beyond or less than its own choice."""
    importlib.import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance(model=model, **kernels)


def prepare(job: Job) -> Prepared:
    base = base_model(job)
    apply_kernels(base)
    model = with_adapter(base, job)
    return Prepared(model, lambda batch: model(**batch).loss, "its kernels and fused output layer")
