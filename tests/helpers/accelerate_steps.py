"""Train a tiny Llama by transformers' Trainer with `sparsify(trainer)`, in one process or under accelerate's FSDP2.

accelerate shards on GPUs only, so on the CPU its look at the machine is answered in their place: two processes of gloo
that are called GPUs. The settings choose the same channels in every batch, whichever rows it has. Run by
`tests.helpers.processes` with the name of a setting, a folder for the adapter, and the rows of a process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.handle import sparsify
from tests.helpers.contextual_models import ragged, tiny
from tests.helpers.sharded_steps import SETTINGS

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets."""

STEPS = 3


def call_the_cpu_a_gpu() -> None:
    """Have accelerate take the processes for those of GPUs, where there are none."""
    if torch.cuda.is_available():
        return

    def backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = backend
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))


def main() -> None:
    setting, folder, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if "RANK" in os.environ:
        call_the_cpu_a_gpu()
    model: Any = tiny("llama")
    if torch.cuda.is_available():
        model.float()  # kernels have no float64
    batch = ragged("llama")
    examples = [{name: values[i] for name, values in batch.items()} for i in (0, 1, 2, 0)] * STEPS
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=rows, learning_rate=0.1, optim="sgd",
        max_grad_norm=0.0, lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu="RANK" not in os.environ and not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = InOrder(model=model, args=arguments, train_dataset=examples)
    config = SparsityConfig(**SETTINGS[setting])
    handle = sparsify(trainer, config, calibration=[batch] if config.needs_calibration else None, cache_dir=folder)
    trainer.train()
    packed = handle._latest is not None and handle._latest.is_packed
    trainer.save_model(str(folder / "adapter"))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        sharded = any("FSDP" in type(module).__name__ for module in trainer.model.modules())
        results = {"losses": losses, "packed": packed, "sharded": sharded, "choices": len(handle.choices())}
        (folder / "results.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class InOrder(Trainer):
    """A Trainer that does not shuffle, so that two processes have the rows of one."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
