"""TRL's fused output layer, which computes logits at labelled positions only; Liger's layers below where installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from sparselora.bench.rivals.jobs import Job
from sparselora.bench.rivals.liger import apply_kernels
from sparselora.bench.rivals.prepared import Prepared, base_model, with_adapter


def fuse_output_layer(model: Any) -> None:
    """Let ``model``, which has no adapter yet, compute its loss without most logits, given ``fused_lm_head=True``."""
    importlib.import_module("trl.trainer.utils").add_fused_lm_head(model)


def prepare(job: Job) -> Prepared:
    base = base_model(job)
    has_liger = job.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    if has_liger:
        apply_kernels(base, fused_linear_cross_entropy=False)
    fuse_output_layer(base)
    model = with_adapter(base, job)
    how = "fused output layer" + (", Liger's layers" if has_liger else "")
    return Prepared(model, lambda batch: model(**batch, fused_lm_head=True).loss, how)
