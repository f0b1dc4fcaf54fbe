"""Models with a fresh LoRA as settings ask for it: the one way to them for training and for pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel

from sparselora.models.attach import attach_lora
from sparselora.models.class_names import name_classes
from sparselora.models.load import head_modules, load_classifier
from sparselora.models.model_files import hub_name
from sparselora.models.target_modules import resolve_target_modules


class LoraSettings(Protocol):
    """The settings of a fresh adapter that `TrainConfig` and `pruning.Cell` share."""

    @property
    def model(self) -> str | None: ...

    @property
    def target_modules(self) -> Sequence[str] | None: ...

    @property
    def lora_r(self) -> int: ...

    @property
    def lora_alpha(self) -> float: ...

    @property
    def lora_dropout(self) -> float: ...


def adapt_model(
    model: Any,
    settings: LoraSettings,
    *,
    task_type: str = "SEQ_CLS",
    use_rslora: bool = False,
    use_dora: bool = False,
    initialisation: str = "default",
    batches: Sequence[Mapping[str, torch.Tensor]] | None = None,
    exclude_modules: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    invocation_tokens: Sequence[int] | None = None,
) -> tuple[PeftModel, list[str]]:
    """Attach a LoRA to ``model``; return both as one model, and the names of the modules that are adapted.

    The keywords are those of `attach_lora` and `resolve_target_modules`.

    Raises:
        InputError: as `resolve_target_modules` and `attach_lora`.
    """
    assert settings.model is not None
    head = head_modules(model) if task_type == "SEQ_CLS" else []
    target_modules = resolve_target_modules(
        model, settings.target_modules, exclude=exclude_modules, layers=layers, head=head
    )
    adapted = attach_lora(
        model,
        r=settings.lora_r,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        initialisation=initialisation,
        batches=batches,
        target_modules=target_modules,
        base_model=hub_name(settings.model),
        task_type=task_type,
        invocation_tokens=invocation_tokens,
    )
    return adapted, target_modules


def load_named_classifier(model: str, labels: Sequence[str]) -> tuple[Any, Any]:
    """Load a classifier of the classes ``labels``, and its tokenizer.

    A fresh head is drawn from torch's global generator: seed it first.

    Raises:
        InputError: as `load_classifier`.
    """
    loaded, tokenizer = load_classifier(model, num_labels=len(labels))
    name_classes(loaded, labels)
    return loaded, tokenizer
