"""The trial of a converted model: each of its passes has to be the model's own function, or is given up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparselora.contextual.activated import activated_from
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.passes import Passes, is_own_forward
from sparselora.contextual.precision import precision_of
from sparselora.contextual.proof import (
    Run,
    disproof,
    failure,
    random_input,
    repeated,
    tolerance,
    trial_batch,
    with_gradients,
)
from sparselora.contextual.sharding import whole_parameters
from sparselora.contextual.step import Step
from sparselora.contextual.structure import base_weight
from sparselora.errors import InputError
from sparselora.models.four_bit import is_rearranged

Tensor = torch.Tensor

_ROUNDING = 2.0
"""Largest relative change of the LoRA's gradient by fp8 products. It is 0.07 to 0.13 on SmolLM2-135M and Qwen2.5-0.5B,
and adds up to 0.7 over the 32 layers of a random Llama-3-8B; 1.4 is that of two unrelated gradients."""


def try_passes(passes: Passes) -> None:
    """Give up each pass of ours whose loss or LoRA gradients are not the model's, and raise if none is left.

    One small batch in mode dense against the model's own forward; then in the precision of the settings, which may
    round; then the sparse pass, which must run.
    """
    model: Any = passes.structure.model
    batch = trial_batch(model)
    layout = TokenLayout.build(batch["attention_mask"].cpu(), batch["labels"].cpu(), causal=passes.structure.causal)
    layout = layout.to(batch["input_ids"].device)
    adapters = [p for name, p in whole_parameters(model).items() if p.requires_grad and "lora_" in name]
    if any(is_rearranged(weight) for weight in model.parameters()):
        adapters = []  # the model's own gradients are no reference; ours go through the matrix as it was stored
    limit = tolerance(base_weight(passes.plans[0].linears.up.module), 1e-3, 0.25)
    starts = [1 + row for row in range(layout.batch)]  # of an activated LoRA: no label's predecessor comes before
    if passes.has_activated:
        layout = layout.activated(torch.tensor(starts))

    def own(step: Step | None) -> Tensor:
        with passes.within(step), activated_from(model, starts, layout.length):
            loss = _own_loss(model, batch, passes.structure.causal)
        if step is not None and step.is_cheaper:
            passes.check_computed(step)
        return loss

    def headed(step: Step) -> Tensor:
        with passes.within(step):
            return passes.labelled_loss(batch, layout)

    def packed(step: Step) -> Tensor:
        with passes.within(None):
            return passes.packed_loss(step, batch)

    def through_backbone(step: Step) -> Tensor:
        passes.packs_backbone = True
        try:
            return own(step)
        finally:
            passes.packs_backbone = False

    def run(loss: Callable[[Step], Tensor], sparse: bool, cut: bool = False) -> Run:
        split = passes.split(layout) if sparse else 0
        step = Step(layout, sparse, split, seed=0)
        return with_gradients(functools.partial(loss, passes.cut(step) if cut else step), adapters)

    reference = repeated(with_gradients(functools.partial(own, None), adapters))
    reason = disproof(reference, run(own, sparse=False), limit)
    if reason is not None:
        raise InputError(
            f"{type(model).__name__} is not supported: with its linear layers replaced by ours, a training step "
            f"has another loss or gradient ({reason})"
        )
    if passes.head is not None and disproof(reference, run(headed, sparse=False), limit) is not None:
        passes.head = None
    packs_loss = passes.decoder is not None and is_own_forward(model)
    if packs_loss and disproof(reference, run(packed, sparse=False), limit) is not None:
        passes.decoder, packs_loss = None, False
    packs_backbone = (
        passes.decoder is not None and disproof(reference, run(through_backbone, sparse=False), limit) is None
    )
    if precision_of(passes.config).quantises:
        passes.quantise()  # the reference is of before: from now on the weights may be in host memory
        loss = packed if packs_loss else own
        reason = disproof(reference, run(loss, sparse=False), _ROUNDING)
        if reason is not None:
            raise InputError(
                f"frozen_precision {passes.config.frozen_precision} changes a step of {type(model).__name__} beyond "
                f"rounding ({reason}); use frozen_precision native"
            )
    ways = {own: True, packed: packs_loss, through_backbone: packs_backbone}
    for loss in [way for way, is_used in ways.items() if is_used and not passes.config.is_exact]:
        reason = failure(run(loss, sparse=passes.config.is_sparse, cut=True))
        if reason is not None:
            raise InputError(f"{type(model).__name__} is not supported in mode {passes.config.mode}: {reason}")
    passes.packs_backbone = packs_backbone


def _own_loss(model: Any, batch: Mapping[str, Tensor], causal: bool) -> Tensor:
    """The loss of a causal model by its own forward; of another, a fixed product with its backbone's hidden states."""
    if causal:
        loss: Tensor = model(**batch).loss
        return loss
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = batch["input_ids"]
    hidden = model.base_model(**inputs)[0]
    return (hidden.double() * random_input(tuple(hidden.shape[1:]), hidden, [1.0] * len(hidden)).double()).mean()
