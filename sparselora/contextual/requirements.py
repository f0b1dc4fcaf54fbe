"""The requirements of a configuration on a model, and of a sparse pass on its layers: refused by name if unmet."""

from __future__ import annotations

import warnings
from typing import Any

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.activated import invocation_tokens, is_activated
from sparselora.contextual.patches import patched_modules
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.step import Step
from sparselora.contextual.structure import Structure, attention_disproof
from sparselora.errors import InputError


def check_settings(structure: Structure, plans: list[LayerPlan], config: SparsityConfig) -> None:
    """Raise where a model cannot be trained as ``config`` says, whatever its passes compute."""
    for plan in plans:
        heads = plan.block.attention
        if plan.sparsity["attention"] and not heads.fused and (reason := attention_disproof(structure, plan.block)):
            raise InputError(
                f"attention sparsity of {plan.block.name} is not supported: {heads.q}, {heads.k} and {heads.v} could "
                f"not be proved to be q, k and v of {heads.heads} heads in {heads.kv_heads} groups ({reason}); set "
                "attention_sparsity 0"
            )
    if config.cuts_context and not structure.causal:
        raise InputError(
            f"context_backward {config.context_backward} needs a causal language model, whose labels tell the context "
            f"from the completion; {type(structure.model).__name__} has none: use context_backward full"
        )
    if config.samples_context:
        check_trained(structure, plans, "context_backward sampled weights the gradients of the blocks' LoRAs")
    if invocation_tokens(structure.model) is not None:
        check_activated(structure, plans, config)
    if config.is_sparse and getattr(structure.model.config, "is_encoder_decoder", False):
        warnings.warn(
            f"{type(structure.model).__name__} has an encoder and a decoder: only the blocks of "
            f"{structure.blocks[0].name.rpartition('.')[0]} are sparse",
            stacklevel=3,
        )
    if config.is_sparse and not any(any(plan.sparsity.values()) for plan in plans):
        raise InputError(
            f"mode {config.mode} has no sparse layer; set ffn_sparsity, attention_sparsity or use mode dense"
        )


def check_activated(structure: Structure, plans: list[LayerPlan], config: SparsityConfig) -> None:
    """Raise where an activated LoRA cannot be trained as PEFT would."""
    if not structure.causal:
        raise InputError(f"an activated LoRA needs a causal language model, got {type(structure.model).__name__}")
    if config.context_backward not in ("full", "none"):
        raise InputError(
            f"context_backward {config.context_backward} is not for an activated LoRA: before its invocation tokens "
            "nothing has a gradient; use full or none, which are one and exact there"
        )
    adapted = {id(linear.module) for plan in plans for linear in plan.linears.all}
    for name, module in structure.model.named_modules():
        if is_activated(module) and id(module) not in adapted:
            raise InputError(f"{name} has an activated LoRA, which is supported on the blocks' linear layers only")
    check_trained(structure, plans, "an activated LoRA is trained by the blocks' LoRAs alone")


def check_refresh(config: SparsityConfig) -> None:
    """Raise where surrogates are to be fitted again to weights that are kept in parts."""
    if config.surrogate_refresh_steps:
        raise InputError(
            "surrogate_refresh_steps is not supported for weights that fully_shard (FSDP2) keeps in parts; set it to 0"
        )


def check_trained(structure: Structure, plans: list[LayerPlan], reason: str) -> None:
    """Raise where another parameter is trained than the blocks' LoRAs and the output layer, which context misses."""
    adapters = (linear.adapter() for plan in plans for linear in plan.linears.all)
    weighted = {id(factor) for adapter in adapters if adapter is not None for factor in (adapter.A, adapter.B)}
    model: Any = structure.model
    head, embedding = (
        set() if module is None else {id(parameter) for parameter in module.parameters()}
        for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )  # the head sees output tokens alone
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in weighted | (head - embedding):
            raise InputError(
                f"{reason}, and {name} is trained too; freeze it, or use a plain LoRA with context_backward full"
            )


def check_layers(structure: Structure, plans: list[LayerPlan], has_activated: bool) -> None:
    """Raise where the first block's layers are no longer those that were converted."""
    for linear in plans[0].linears.all:
        if structure.module(linear.name) is not linear.module:
            raise InputError(f"{linear.name} was replaced after sparsify; call remove(), then sparsify again")
        if linear.adapter() is not None and is_activated(linear.module) != has_activated:
            raise InputError(
                f"another adapter of {linear.name} was made active after sparsify, and one of the two is an "
                "activated LoRA; call remove(), then sparsify again"
            )


def check_computed(structure: Structure, plans: list[LayerPlan], config: SparsityConfig, step: Step) -> None:
    """Raise where a layer that should have been ours was not: its forward was replaced, or not called."""
    model_config: Any = structure.model.config
    if step.is_packed or any(name.endswith("layerdrop") and value for name, value in vars(model_config).items()):
        return
    if config.changes_every_step:
        missing = [name for plan in plans for name in patched_modules(plan) if name not in step.computed]
        if missing:
            raise InputError(
                f"{missing[0]} took no part in a pass that should be cheaper: its forward was replaced after "
                "sparsify, or the model does not call it; call remove(), then sparsify again"
            )
    if not step.split:
        return
    for plan in plans:
        for part, sparsity in plan.sparsity.items():
            if sparsity and (plan.block.index, part) not in step.choices:
                raise InputError(
                    f"the {part} of {plan.block.name} should have been sparse and was not: its forward was "
                    "replaced after sparsify, or the model does not call it; call remove(), then sparsify again"
                )
