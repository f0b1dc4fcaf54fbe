"""Unsloth: its own loading, adapter and kernels. It patches transformers as it is imported, so that comes first."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from sparselora.bench.rivals.jobs import Job

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def prepare(job: Job) -> Any:
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    trainer: Any = importlib.import_module("unsloth").FastLanguageModel
    import torch

    from sparselora.bench.rivals.prepared import Prepared

    with tempfile.TemporaryDirectory() as folder:
        source = job.source if isinstance(job.source, str) else _written(job, Path(folder))
        model, _ = trainer.from_pretrained(
            source,
            max_seq_length=max(case.seq for case in job.cases),
            dtype=torch.bfloat16 if job.bf16 else torch.float32,
            load_in_4bit=False,
        )
    torch.manual_seed(job.seed)
    model = trainer.get_peft_model(
        model, r=job.rank, lora_alpha=job.alpha, lora_dropout=0, bias="none",
        target_modules=list(job.targets or ATTENTION), use_gradient_checkpointing=False, random_state=job.seed,
    )  # fmt: skip
    trainer.for_training(model)
    return Prepared(model, lambda batch: model(**batch).loss, "its kernels, no checkpointing")


def _written(job: Job, folder: Path) -> str:
    """Write random weights and a tokenizer of numbered words as a model folder, and return its name."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from sparselora.bench.rivals.prepared import base_model

    base_model(job).save_pretrained(folder)
    if job.device == "cuda":
        torch.cuda.empty_cache()
    words = {f"w{i}": i for i in range(job.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", pad_token="w2", unk_token="w0"
    ).save_pretrained(folder)
    return str(folder)
