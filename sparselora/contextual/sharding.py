"""Weights that FSDP2 (`torch.distributed.fsdp.fully_shard`) keeps in parts, one a process.

FSDP2 gathers the weights of a module in a hook before its forward and frees them in one after it; both hooks register
others, which do the same for its backward pass and sum the gradients over processes. A pass of ours that reads weights
without calling their module runs between the same hooks: `between_hooks`. A weight is then whole for as long as its
module runs, so nothing may keep a copy of it for the backward pass: what is made of it is made again there. Outside of
a pass, weights are whole within `gathered`. Every process has to come by the same gathers in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations import is_fsdp_enabled

from sparselora.errors import InputError

T = TypeVar("T")


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 keeps the weights of ``module``, by itself or with those of a module around it."""
    return bool(module.__dict__.get("_is_fsdp_managed_module", False))


def is_unit(module: nn.Module) -> bool:
    """Return whether ``module`` was given to `fully_shard` itself: its calls gather weights."""
    return isinstance(module, FSDPModule)


def shards_inside(module: nn.Module) -> bool:
    """Return whether a part of ``module`` is sharded by itself, so that its weights are whole in its own calls only."""
    return any(isinstance(part, FSDPModule) for part in module.modules() if part is not module)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of ``module``, without what `fully_shard` mixes into it."""
    kind = type(module)
    return kind.__mro__[2] if isinstance(module, FSDPModule) else kind


def unwrapped(layer: nn.Module) -> nn.Module:
    """Return the layer inside the wrapper by which FSDP's activation checkpointing recomputes it."""
    return layer._checkpoint_wrapped_module if isinstance(layer, ActivationWrapper) else layer


def between_hooks(module: nn.Module, compute: Callable[..., T], *inputs: Any) -> T:
    """Return ``compute(*inputs)``; for a module that is sharded itself, in place of its forward, between its hooks.

    Args:
        inputs: tensors whose gradient ends the backward pass of the module are among these, not in a closure.
    """
    if not isinstance(module, FSDPModule):
        return compute(*inputs)
    attributes = module.__dict__
    forward = attributes.get("forward")
    attributes["forward"] = compute
    try:
        result: T = nn.Module._call_impl(module, *inputs)
    finally:
        if forward is None:
            del attributes["forward"]
        else:
            attributes["forward"] = forward
    return result


def check_loaded_everywhere(block: nn.Module) -> None:
    """Raise where processes have different weights in ``block``, which is not sharded yet.

    Accelerate can have transformers load weights into the first process of a host alone, and hand them on as it
    shards; before that the others hold whatever memory held. Every process must call it.

    Raises:
        InputError: they differ.
    """
    if not is_fsdp_enabled() or any(is_sharded(part) for part in block.modules()):
        return
    sums = [repr(float(p.detach().sum(dtype=torch.float64))) for p in block.parameters() if not p.requires_grad]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, sums)
    if any(others != everywhere[0] for others in everywhere):
        raise InputError(
            "the weights are loaded in the first process only (accelerate's fsdp_cpu_ram_efficient_loading), and "
            "sparsify reads them in every process; set it to false, or call sparsify once the model is sharded"
        )


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Have the weights of ``module`` whole, outside of a pass, where it or its parts are sharded by themselves."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


@contextmanager
def gathered_root(model: nn.Module) -> Iterator[None]:
    """Have the weights whole that the outermost sharded module keeps itself, so that parts of it run by themselves.

    Those of its parts, such as the blocks, are gathered as they run. Afterwards, passes that ended in an exception are
    forgotten.
    """
    root = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
    if root is None:
        yield
        return
    root._get_fsdp_state()._lazy_init()  # or the first part to run would be taken for the outermost
    root.set_reshard_after_backward(False, recurse=False)
    root.unshard()
    try:
        yield
    finally:
        root.set_reshard_after_backward(True, recurse=False)
        root.reset_iter_state()


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return ``named_parameters()`` with sharded ones as autograd sees them in a pass; within `gathered_root`."""
    parameters = dict(model.named_parameters())
    units = [(prefix, module) for prefix, module in model.named_modules() if is_unit(module)]
    for prefix, module in units:
        with gathered(module):
            for name, parameter in module.named_parameters(prefix):
                if not isinstance(parameter, DTensor):
                    parameters[name] = parameter
    return parameters


def reduce_every_gradient(root: nn.Module) -> None:
    """Have a process whose batch leaves an adapter out add zeros to its gradient: the others wait for them."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_reduce_scatter_unused_params(True, recurse=False)
