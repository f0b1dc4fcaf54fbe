"""Optimizers of adapters: those of the Trainer by their names, torch's Muon, and LoRA+ by PEFT on top of any."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from sparselora.errors import InputError, shown, suggest

MUON = "muon"
"""Name of `torch.optim.Muon`, for which the Trainer has none."""
DEFAULT_OPTIMIZER = TrainingArguments.default_optim

_WITHOUT_SETTINGS = ("linear", "constant", "constant_with_warmup")
_PROBE = 64
"""Side of the matrix that a probing step updates: 4,096 entries, the fewest that bitsandbytes keeps in 8 bits."""


def parsed_pairs(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Return ``name=value`` pairs as a mapping; a value that reads as a number or a truth value is one."""
    values: dict[str, Any] = {}
    for pair in pairs or ():
        name, _, text = pair.partition("=")
        values[name] = _value(text)
    return values


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def trainer_name(optim: str) -> str:
    """Return the name that `TrainingArguments` takes for ``optim``.

    Raises:
        InputError: no optimizer is called so.
    """
    names = [name.value for name in OptimizerNames]
    if optim == MUON:
        return DEFAULT_OPTIMIZER
    if optim not in names:
        raise InputError(
            f"unknown optim {shown(optim)}{suggest(optim, [*names, MUON])}; known: {', '.join(names)}, muon"
        )
    return optim


def optimizer_class(optim: str, arguments: TrainingArguments, model: nn.Module | None) -> tuple[Any, dict[str, Any]]:
    """Return the class of an optimizer and its keywords, the learning rate among them.

    Raises:
        InputError: torch has no Muon.
        Exception: of many kinds, what the Trainer raises for a package that is not installed.
    """
    if optim != MUON:
        return Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"optim muon needs torch 2.9 or later, got torch {torch.__version__}")
    pairs = arguments.optim_args.split(",") if arguments.optim_args else None
    return torch.optim.Muon, {"lr": arguments.learning_rate} | parsed_pairs(pairs)


def build_optimizer(
    optim: str, arguments: TrainingArguments, model: nn.Module, groups: Sequence[Mapping[str, Any]], ratio: float | None
) -> torch.optim.Optimizer:
    """Build an optimizer of its own way for ``model``: LoRA+ by PEFT where ``ratio`` says so, else Muon.

    Args:
        groups: parameters with and without weight decay, as the Trainer sorts them.
        ratio: learning rate of lora_B over that of lora_A.
    """
    kind, keywords = optimizer_class(optim, arguments, model)
    if ratio is None:
        return kind([group for group in groups if group["params"]], **keywords)
    assert isinstance(model, PeftModel)
    lr = keywords.pop("lr")
    decay = arguments.weight_decay
    return create_loraplus_optimizer(
        model, kind, lr=lr, loraplus_lr_ratio=ratio, loraplus_lr_embedding=lr, loraplus_weight_decay=decay, **keywords
    )


def check_optimizer(
    optim: str, arguments: TrainingArguments, model: nn.Module, ratio: float | None, device: torch.device
) -> None:
    """Raise InputError for an optimizer that cannot train ``model`` on ``device``, after one step on a small matrix.

    A package that is not installed, arguments that it does not have, and a device that it does not support all end in
    an error of the library's, of any kind, when training has begun.
    """
    if optim.startswith("paged_") and device.type == "cpu":
        name = optim.removeprefix("paged_")
        raise InputError(f"optim {optim} pages the memory of a GPU, and the device is a CPU; use {name}")
    if optim == MUON:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.ndim != 2:
                raise InputError(
                    f"optim muon is for matrices, and {name} has {parameter.ndim} dimensions; use another optimizer"
                )
    probe = nn.Linear(_PROBE, _PROBE, bias=False, device=device)
    try:
        kind, keywords = optimizer_class(optim, arguments, model)
        _check_arguments(optim, arguments, model)
        own_groups = {"params", "model", "optimizer_dict"} & keywords.keys()
        is_plain = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        if ratio is not None and (own_groups or not is_plain):
            raise InputError(f"loraplus_lr_ratio and optim {optim} both sort the parameters; give one")
        for name in own_groups:
            del keywords[name]
        if is_plain:
            optimizer = kind(probe.parameters(), **keywords)
            probe.weight.grad = torch.ones_like(probe.weight)
            optimizer.step()
    except InputError:
        raise
    except Exception as error:  # many kinds, from many packages
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        remedy = "install what it needs, or use another"
        raise InputError(f"optim {optim} cannot be used here ({reason}); {remedy}") from None


def _check_arguments(optim: str, arguments: TrainingArguments, model: nn.Module) -> None:
    """Raise for an entry of ``optim_args`` that changes nothing: the Trainer drops what an optimizer does not have."""
    for pair in arguments.optim_args.split(",") if arguments.optim_args else ():
        alone, without = copy.copy(arguments), copy.copy(arguments)
        alone.optim_args, without.optim_args = pair, None
        if optim != MUON and optimizer_class(optim, alone, model)[1] == optimizer_class(optim, without, model)[1]:
            raise InputError(f"optim_args: {pair} changes nothing of optim {optim}; leave it out")


def check_schedule(arguments: TrainingArguments) -> None:
    """Raise InputError for a schedule whose settings are wrong or lacking, or that has none and is given some."""
    name: str = SchedulerType(arguments.lr_scheduler_type).value
    settings: Any = arguments.lr_scheduler_kwargs
    if settings and name in _WITHOUT_SETTINGS:
        raise InputError(
            f"scheduler {name} has no settings, got scheduler_kwargs {', '.join(settings)}; leave them out"
        )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        schedule = get_scheduler(
            arguments.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=4,
            scheduler_specific_kwargs=settings,
        )  # fmt: skip
        optimizer.step()
        schedule.step()
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"scheduler {name}: {reason}; say it by scheduler_kwargs") from None
