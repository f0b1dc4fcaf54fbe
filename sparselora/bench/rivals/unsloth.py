"""Unsloth: its own loading, adapter and kernels. It patches transformers as it is imported, so that comes first."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from sparselora.bench.rivals.jobs import Job

_COMPILED = tempfile.TemporaryDirectory()
"""Folder of the code that it writes, otherwise in the working directory; gone when the process ends."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def prepare(job: Job) -> Any:
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", _COMPILED.name)
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
            local_files_only=Path(source).is_dir(),
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
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from sparselora.bench.rivals.prepared import base_model

    model = base_model(job)
    model.config.update({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    model.save_pretrained(folder)
    del model
    if job.device == "cuda":
        torch.cuda.empty_cache()
    words = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(3, job.vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=max(case.seq for case in job.cases),
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)
