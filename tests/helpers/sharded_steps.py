"""Two processes of one job that train a sharded model: run by `tests.helpers.processes.start_two` with a case's name.

The reference of each step is the same model in one process, whole, on the rows of both: the losses of each process's
rows, and the mean of their gradients.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.handle import Handle, sparsify
from sparselora.errors import InputError
from tests.helpers.contextual_models import _built, ragged, tiny

SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "svd": {"mode": "svd", "ffn_sparsity": 0.5, "attention_sparsity": 0.5},
    "static": {"mode": "static", "ffn_sparsity": 0.5, "attention_sparsity": 0.5, "compensate": "mean"},
    "oracle": {"mode": "oracle", "ffn_sparsity": 0.5},
    "surrogate": {"mode": "surrogate", "ffn_sparsity": 0.5, "surrogate_rank": 4},
    "skip": {"mode": "skip", "ffn_sparsity": 0.5},
    "fp8": {"mode": "dense", "frozen_precision": "fp8_emulated"},
    "fp8 none": {"mode": "dense", "frozen_precision": "fp8_emulated", "context_backward": "none"},
    "fp8 svd": {
        "mode": "svd", "ffn_sparsity": 0.5, "frozen_precision": "fp8_emulated", "context_backward": "none",
    },
}  # fmt: skip
STEPS = 2


def stack(model: Any) -> nn.ModuleList:
    inner = model.get_base_model()
    return inner.model.layers if hasattr(inner, "model") else inner.transformer.h


def shard(model: nn.Module, how: str = "blocks") -> None:
    """Shard by hand, or as accelerate does: embeddings, and the last norm with the output layer, by themselves."""
    inner: Any = model.get_base_model()  # type: ignore[operator]
    if how == "parts":
        for layer in stack(model):
            fully_shard(layer.mlp)
            fully_shard(layer.self_attn)
    if how == "recomputed":
        for i, layer in enumerate(stack(model)):
            stack(model)[i] = checkpoint_wrapper(layer)
    for layer in stack(model):
        fully_shard(layer)
    if how == "accelerate":
        if inner.lm_head.weight is inner.model.embed_tokens.weight:
            fully_shard([inner.model.norm, inner.model.embed_tokens, inner.lm_head], reshard_after_forward=False)
        else:
            fully_shard(inner.model.embed_tokens)
            fully_shard([inner.model.norm, inner.lm_head], reshard_after_forward=False)
    fully_shard(model)


def rows_of(name: str, rank: int) -> dict[str, torch.Tensor]:
    rows = slice(0, 2) if rank == 0 else slice(2, 3)
    return {key: value[rows] for key, value in ragged(name).items()}


def converted(model: nn.Module, name: str, settings: dict[str, Any], folder: Path) -> Handle:
    config = SparsityConfig(**settings)
    return sparsify(model, config, calibration=[ragged(name)] if config.needs_calibration else None, cache_dir=folder)


def steps(model: nn.Module, handle: Handle, name: str, ranks: list[int]) -> list[float]:
    losses = []
    for step in range(STEPS):
        handle.begin_step(step, 10)
        for rank in ranks:
            loss = model(**rows_of(name, rank)).loss
            losses.append(float(loss.detach()))
            loss.backward()
        handle.end_step()
    return losses


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in named.items() if g is not None}


def compare(name: str, settings: dict[str, Any], order: str, how: str, folder: Path) -> dict[str, Any]:
    """Largest differences of losses and gradients from one process's, and the control: from this rank's rows alone."""
    rank = dist.get_rank()
    whole, alone = tiny(name), tiny(name)
    handle = converted(whole, name, settings, folder)
    expected = steps(whole, handle, name, [0, 1])[rank::2]
    handle.remove()
    handle = converted(alone, name, settings, folder)
    steps(alone, handle, name, [rank])
    handle.remove()
    model: Any = tiny(name)
    if how == "recomputed":
        model.get_base_model().config.use_cache = False
    if order == "shard first":
        shard(model, how)
    handle = converted(model, name, settings, folder)
    if order == "sparsify first":
        shard(model, how)
    losses = steps(model, handle, name, [rank])
    sharded, mean, own = gradients(model), gradients(whole), gradients(alone)
    result = {
        "packed": handle._latest is not None and handle._latest.is_packed,
        "choices": len(handle.choices()),
        "loss": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        "gradient": max(float((sharded[n] - g / 2).abs().max()) for n, g in mean.items()),
        "extra": [n for n in sharded if n not in mean and bool(sharded[n].any())],
        "control": max(float((sharded[n] - own[n]).abs().max()) for n in own),
    }
    handle.remove()
    result["after remove"] = steps_without(model, name, rank)
    return result


def steps_without(model: nn.Module, name: str, rank: int) -> float:
    """Difference of the loss of the sharded model, dense again, from transformers' own in one process."""
    with torch.no_grad():
        ours, theirs = model(**rows_of(name, rank)).loss, tiny(name)(**rows_of(name, rank)).loss
    return abs(float(ours - theirs))


def memory(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What is left of the whole weights after sharding, and between forward and backward of a step."""
    # Held, so that nothing later stands at the address of one that is gone.
    earlier = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and not x.is_sparse]
    model: Any = tiny(name)
    layers = stack(model)
    handle = converted(model, name, settings, folder)
    # Twice as many numbers as any activation of this batch has, so that a tensor of that size is a weight.
    frozen = [p for layer in layers for p in layer.parameters() if not p.requires_grad and p.dim() == 2]
    replaced, shapes = [weakref.ref(p) for p in frozen], {tuple(p.shape) for p in frozen}
    shapes |= {tuple(reversed(shape)) for shape in shapes} | {(2 * d_out, d_in) for d_out, d_in in shapes}
    del frozen
    shard(model)
    handle.begin_step(0, 10)
    loss = model(**rows_of(name, dist.get_rank())).loss
    gc.collect()
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    known = {x.data_ptr() for x in (*earlier, *parts, *_built(name, None, True, 3, 0.0)[0].parameters())}  # of tiny

    def copies() -> int:
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
        weights = [x for x in tensors if x.dim() == 2 and tuple(x.shape) in shapes and x.data_ptr() not in known]
        return sum(x.untyped_storage().nbytes() > 0 for x in weights)

    held_copies = copies()
    one_more = torch.zeros(next(iter(shapes)))  # the control
    counted = copies()
    del one_more
    loss.backward()
    held = sum(ref() is not None for ref in replaced)
    handle.remove()
    return {
        "replaced weights that live": held,
        "copies between forward and backward": held_copies,
        "with one more": counted,
    }


def no_labels(name: str, folder: Path) -> dict[str, Any]:
    """A step in which one process has no label: the other goes on, and the gradient is half of its own."""
    rank = dist.get_rank()
    model, whole = tiny(name), tiny(name)
    handle = converted(model, name, SETTINGS["svd"], folder)
    shard(model)
    batch = rows_of(name, 0)
    if rank == 1:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    handle.begin_step(0, 10)
    loss = model(**batch).loss
    loss.backward()
    reference = converted(whole, name, SETTINGS["svd"], folder)
    reference.begin_step(0, 10)
    whole(**rows_of(name, 0)).loss.backward()
    expected = gradients(whole)
    worst = max(float((g - expected[n] / 2).abs().max()) for n, g in gradients(model).items())
    return {"loss": float(loss.detach()), "gradient": worst}


def resumed(name: str, folder: Path) -> dict[str, Any]:
    """The third step of two processes, and of one that has loaded what they saved whole after the second."""
    rank, options = dist.get_rank(), StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    model = tiny(name)
    handle = converted(model, name, SETTINGS["svd"], folder)
    shard(model)

    def step(model: nn.Module, handle: Handle, optimizer: torch.optim.Optimizer, number: int, ranks: list[int]) -> None:
        handle.begin_step(number, 10)
        for part in ranks:
            (model(**rows_of(name, part)).loss / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for number in range(2):
        step(model, handle, optimizer, number, [rank])
    tensors, moments = get_state_dict(model, optimizer, options=options)
    adapter = folder.parent / f"adapter{rank}"
    model.save_pretrained(str(adapter), state_dict=tensors)  # type: ignore[operator]
    torch.save(moments, adapter / "optimizer.pt")  # now: its counts of steps are the optimizer's own
    step(model, handle, optimizer, 2, [rank])
    expected = get_model_state_dict(model, options=options)
    results = {}
    for case, state in (("resumed", torch.load(adapter / "optimizer.pt")), ("without moments", None)):
        alone: Any = tiny(name)
        alone.load_adapter(str(adapter), "default", is_trainable=True)
        handle = converted(alone, name, SETTINGS["svd"], folder)
        optimizer = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=0.01)
        if state is not None:
            set_optimizer_state_dict(alone, optimizer, state, options=options)
        step(alone, handle, optimizer, 2, [0, 1])
        trained = dict(alone.named_parameters())
        results[case] = max(float((trained[n] - x).detach().abs().max()) for n, x in expected.items())
    return results


def refused(name: str, folder: Path) -> dict[str, str]:
    """Messages of what does not go together with sharded weights."""
    messages = {}

    def message(case: str, attempt: Any) -> None:
        try:
            attempt()
            messages[case] = "accepted"
        except InputError as error:
            messages[case] = str(error)

    refreshed = {"mode": "surrogate", "ffn_sparsity": 0.5, "surrogate_rank": 4, "surrogate_refresh_steps": 2}
    model: Any = tiny(name)
    shard(model)
    parts: Any = tiny(name)
    shard(parts, "parts")
    message("parts", lambda: converted(parts, name, SETTINGS["dense"], folder))
    message("refresh", lambda: converted(model, name, refreshed, folder))
    wrapped: Any = tiny(name)
    shard(wrapped, "recomputed")
    message("wrapped", lambda: converted(wrapped, name, SETTINGS["dense"], folder))
    factors: Any = tiny(name)
    handle = converted(factors, name, SETTINGS["dense"], folder)
    for module in factors.modules():
        if type(module) is nn.Linear and module.weight.requires_grad:
            fully_shard(module)
    shard(factors)
    handle.begin_step(0, 10)
    message("factors", lambda: factors(**rows_of(name, dist.get_rank())))
    assert any(isinstance(module, FSDPModule) for module in factors.modules())
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    loaded: Any = tiny(name)
    message("loaded", lambda: converted(loaded, name, SETTINGS["dense"], folder).remove())  # the control
    if dist.get_rank() == 1:
        stack(loaded)[0].mlp.up_proj.base_layer.weight.data.zero_()
    message("not loaded", lambda: converted(loaded, name, SETTINGS["dense"], folder))
    return messages


def main() -> None:
    case, folder = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    dist.init_device_mesh("cpu", (2,))
    cache = folder / f"cache{rank}"
    kind, name, *rest = case.split(":")
    results: Any
    if kind == "compare":
        settings, orders, how = rest
        results = {
            f"{setting}, {order}": compare(name, SETTINGS[setting], order, how, cache)
            for setting in settings.split(",")
            for order in orders.split(",")
        }
    elif kind == "memory":
        results = {setting: memory(name, SETTINGS[setting], cache) for setting in ("dense", "svd", "fp8 svd")}
    else:
        results = {"no_labels": no_labels, "refused": refused, "resumed": resumed}[kind](name, cache)
    (folder / f"results{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
