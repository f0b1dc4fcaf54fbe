"""Quality of estimates on real texts: a model, its texts, the tables over batches and layers, and their figure."""

from __future__ import annotations

import pandas as pd
import torch

from sparselora.bench.estimator_check import check_estimators, summarise, text_batches
from sparselora.bench.request import EstimatesRequest
from sparselora.models.load import is_bf16, load_causal_lm, load_classifier, resolve_device
from sparselora.models.model_files import model_facts
from sparselora.report.contextual import estimators
from sparselora.runs.files import write_csv
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress


def measure_estimates(request: EstimatesRequest, folder: RunFolder) -> pd.DataFrame:
    """Measure, write tables and figure into ``folder``, and return the means over batches.

    Raises:
        InputError: a model, data set or ranks that cannot be used, before anything is written.
    """
    setup, texts = request.setup, request.texts
    assert isinstance(setup.source, str), "random weights have no structure to estimate"
    assert texts.dataset is not None
    device, causal = resolve_device(request.device), setup.shape.decoder
    if causal:
        dtype = torch.bfloat16 if is_bf16(request.dtype, device) else torch.float32
        model, tokenizer = load_causal_lm(setup.source, dtype)
    else:
        model, tokenizer = load_classifier(setup.source, 2)
    batches = text_batches(
        texts.dataset, tokenizer, causal=causal,
        fields=(texts.prompt_field, texts.completion_field) if causal else texts.text_fields,
        samples=request.samples, batch=setup.work.batch, max_length=setup.work.seq, seed=request.seed,
    )  # fmt: skip
    model = model.to(device)
    check_estimators(model, batches[:1], request.sparsity, request.ranks)  # raises for what does not fit
    with folder:
        folder.note(device=device.type, **model_facts(setup.source))
        with Progress(len(batches), "batch", "estimates") as progress:
            rows = check_estimators(model, batches, request.sparsity, request.ranks, progress=progress.update)
        table = pd.DataFrame(rows)
        means = summarise(table)
        write_csv(folder.path("estimators_by_batch.csv"), table)
        estimators(folder.path("estimators.png"), means, f"{setup.label}: estimates against the oracle")
    return means
