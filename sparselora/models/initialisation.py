"""PEFT's initialisations of a LoRA, those that read data and those that move a part of the base weights into it.

PiSSA, OLoRA and LoRA-GA begin with an update that is not zero and subtract it from the base weights, so that the
function is that of the base at first. The trained update is then relative to weights that nobody else has. Here the
factors at the beginning are kept, and the exported adapter is the difference: B A - B0 A0, of twice the rank, for the
base as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import EvaConfig, LoraGAConfig, preprocess_loraga
from torch import nn

from sparselora.errors import InputError
from sparselora.models.lora import Factors, lora_layers, weights

LORA_GA, EVA = "lora_ga", "eva"
READS_DATA = (EVA, LORA_GA)
"""Values of ``init_lora_weights`` that need batches."""


def start_settings(initialisation: str) -> dict[str, Any]:
    """Return the settings of `LoraConfig` for an ``init_lora_weights`` of ours."""
    settings: dict[str, Any] = {"init_lora_weights": True if initialisation == "default" else initialisation}
    if initialisation == EVA:
        settings["eva_config"] = EvaConfig(rho=1.0)  # the same rank in every module, as lora_r says
    if initialisation == LORA_GA:
        settings["lora_ga_config"] = LoraGAConfig()
    return settings


def start_adapter(
    model: nn.Module, config: LoraConfig, batches: Sequence[Mapping[str, torch.Tensor]] | None
) -> PeftModel:
    """Attach the adapter of ``config`` with PEFT's initialisation, after passes over ``batches`` if it needs them.

    Raises:
        InputError: weights or sizes with which PEFT has no such initialisation.
    """
    start = config.init_lora_weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # hints on memory, and on hooks that PEFT sets itself
            return _started(model, config, batches)
    except (ValueError, TypeError, RuntimeError) as error:
        if start in (True, False):
            raise
        raise InputError(f"init_lora_weights {start}: {' '.join(str(error).split())[:200]}") from None


def _started(model: nn.Module, config: LoraConfig, batches: Sequence[Mapping[str, torch.Tensor]] | None) -> PeftModel:
    if config.init_lora_weights == LORA_GA:
        assert batches
        preprocess_loraga(model, config, lambda: _accumulate(model, batches))
    adapted = get_peft_model(model, config)
    if config.init_lora_weights == EVA:
        assert batches
        initialize_lora_eva_weights(
            adapted, [dict(batch) for batch in batches], show_progress_bar=False, gather_distributed_inputs=False
        )
    return adapted


def _accumulate(model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    for batch in batches:
        model(**batch).loss.backward()


def initial_factors(model: PeftModel) -> Factors:
    """Copies of the factors of a fresh adapter that was moved out of the base weights."""
    layers = lora_layers(model)
    return {name: tuple(weight.detach().clone() for weight in weights(layer)) for name, layer in layers.items()}  # type: ignore[misc]


@contextmanager
def untrained(model: PeftModel, initial: Factors | None) -> Iterator[None]:
    """The model before training: without its adapter, or with the ``initial`` factors where they are of the base."""
    if initial is None:
        with model.disable_adapter():
            yield
        return
    trained = initial_factors(model)
    _set(model, initial)
    try:
        yield
    finally:
        _set(model, trained)


@torch.no_grad()
def _set(model: PeftModel, factors: Factors) -> None:
    for name, layer in lora_layers(model).items():
        for weight, values in zip(weights(layer), factors[name], strict=True):
            weight.copy_(values)
