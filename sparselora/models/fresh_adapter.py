"""Models with a fresh LoRA as settings ask for it: the one way to them for training and for pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from peft import PeftModel

from sparselora.models.class_names import name_classes
from sparselora.models.load import attach_lora, load_classifier, resolve_target_modules
from sparselora.models.model_files import hub_name


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
    invocation_tokens: Sequence[int] | None = None,
) -> tuple[PeftModel, list[str]]:
    """Attach a LoRA to ``model``; return both as one model, and the names of the modules that are adapted.

    Raises:
        InputError: as `resolve_target_modules` and `attach_lora`.
    """
    assert settings.model is not None
    target_modules = resolve_target_modules(model, settings.target_modules)
    adapted = attach_lora(
        model,
        r=settings.lora_r,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        use_rslora=use_rslora,
        target_modules=target_modules,
        base_model=hub_name(settings.model),
        task_type=task_type,
        invocation_tokens=invocation_tokens,
    )
    return adapted, target_modules


def load_adapted_classifier(
    settings: LoraSettings, labels: Sequence[str], *, use_rslora: bool = False
) -> tuple[PeftModel, Any, list[str]]:
    """Load a classifier of the classes ``labels`` and adapt it: the model, its tokenizer, and the modules adapted.

    Head and adapter are drawn from torch's global generator: seed it first.

    Raises:
        InputError: as `load_classifier` and `adapt_model`.
    """
    assert settings.model is not None
    model, tokenizer = load_classifier(settings.model, num_labels=len(labels))
    name_classes(model, labels)
    adapted, target_modules = adapt_model(model, settings, use_rslora=use_rslora)
    return adapted, tokenizer, target_modules
