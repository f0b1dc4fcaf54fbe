"""A rival's model that is ready to train, and the parts that several rivals share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparselora.bench.rivals.jobs import Job
from sparselora.bench.timing import adapt, build_model

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Prepared:
    """A model with its adapter in training mode.

    Attributes:
        model: its trained parameters are what an optimizer steps on.
        loss: the mean cross-entropy of the labelled tokens of a batch on the model's device.
        how: what of the trainer is in use, in a few words.
    """

    model: nn.Module
    loss: Callable[[Batch], torch.Tensor]
    how: str


def base_model(job: Job) -> Any:
    """Return the model without an adapter, on the job's device."""
    dtype = torch.bfloat16 if job.bf16 else torch.float32
    return build_model(job.source, causal=True, device=torch.device(job.device), dtype=dtype, seed=job.seed)


def with_adapter(model: nn.Module, job: Job) -> Any:
    """Return ``model`` with PEFT's LoRA, whose factors are drawn by the job's seed."""
    torch.manual_seed(job.seed)
    return adapt(model, r=job.rank, alpha=job.alpha, targets=job.targets, causal=True)


def compile_layers(model: nn.Module, job: Job) -> bool:
    """Compile every decoder layer on its own, on a GPU, and return whether that was done."""
    if job.device != "cuda":
        return False
    for layer in decoder_layers(model):
        layer.compile(dynamic=False)
    return True


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the longest list of modules: the decoder's layers."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
