"""PEFT: the model of transformers with adapters in its linear layers; on a GPU each layer compiled."""

from __future__ import annotations

from sparselora.bench.rivals.jobs import Job
from sparselora.bench.rivals.prepared import Prepared, base_model, compile_layers, with_adapter


def prepare(job: Job) -> Prepared:
    model = with_adapter(base_model(job), job)
    compiled = compile_layers(model, job)
    return Prepared(model, lambda batch: model(**batch).loss, "layers compiled" if compiled else "as it is")
