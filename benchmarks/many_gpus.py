"""Steps of LoRA on several cards: each alone, with DistributedDataParallel, and over a base that FSDP2 shards.

    torchrun --nproc_per_node 2 benchmarks/many_gpus.py --shape llama3-8b --csv many.csv
    torchrun --nproc_per_node 2 benchmarks/many_gpus.py --shape llama-70b --layout fsdp2   # fits no card alone
    torchrun --nproc_per_node 2 benchmarks/many_gpus.py --model ./llama --arm plain dense fp8
    torchrun --nproc_per_node 2 benchmarks/many_gpus.py --tiny                             # on the CPU

In the layout ``alone`` every process trains by itself, at the same time as the others, so its tokens a second are what
one card does. The arm ``plain`` is PEFT and transformers alone, as a Trainer runs them under DDP or FSDP2. Printed for
each: the median step in ms (of the slowest process) and its spread, tokens a second of all processes, that as a
multiple of one process alone, the largest peak of memory of a process, and the loss of the first process's rows in the
first step. The learning rate is 0, so that all arms take their steps at the same weights; AdamW runs all the same.

Weights of a ``--shape`` are random. With ``--layout fsdp2`` alone each process makes its own shards only.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.handle import GRAPH_MULTIPLE, sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.models.architectures import SHAPES

ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "dense": {},
    "no context backward": {"context_backward": "none"},
    "fp8": {"frozen_precision": "fp8"},
    "both": {"frozen_precision": "fp8", "context_backward": "none"},
    "sparse": {"mode": "random_fixed", "ffn_sparsity": 0.9},
    "fp8_emulated": {"frozen_precision": "fp8_emulated"},
}
LAYOUTS = ("alone", "ddp", "fsdp2")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
WARM_UP = 3
"""Steps before those that are timed: the first compiles and loads, the second captures a CUDA graph."""


def adapted(arguments: argparse.Namespace, device: torch.device) -> Any:
    """Build the model with a LoRA in float32 whose lora_B is drawn; without weights for `makes_shards`."""
    torch.manual_seed(0)
    if arguments.model:
        base: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    else:
        shape = dict(TINY if arguments.tiny else SHAPES[arguments.shape])
        shape["num_hidden_layers"] = arguments.layers or shape["num_hidden_layers"]
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        with torch.device("meta" if makes_shards(arguments) else device):
            base = AutoModelForCausalLM.from_config(config, dtype=arguments.dtype)
    base.config.use_cache = False
    place = base.lm_head.weight.device
    with torch.device(place):
        model: Any = get_peft_model(base, LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name and not parameter.is_meta:
            nn.init.normal_(parameter, std=1e-3)
    return model.train() if makes_shards(arguments) else model.to(device).train()


def makes_shards(arguments: argparse.Namespace) -> bool:
    """Return whether each process draws its own shards, so that the shape need not fit one card."""
    return not arguments.model and arguments.layout == ["fsdp2"]


def shard(model: Any, arguments: argparse.Namespace, device: torch.device) -> None:
    """Shard block by block, and draw the weights of a model without."""
    half = arguments.dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None
    base = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer, mp_policy=policy or MixedPrecisionPolicy())
    fully_shard(model, mp_policy=policy or MixedPrecisionPolicy())
    if not makes_shards(arguments):
        return
    model.to_empty(device=device)
    base.model.rotary_emb = type(base.model.rotary_emb)(base.config).to(device)  # its buffers are not in a checkpoint
    generator = torch.Generator(device).manual_seed(1 + dist.get_rank())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if "norm" in name:
                local.fill_(1)
            else:
                local.normal_(std=1e-3 if "lora_B" in name else 0.02, generator=generator)


def batch(arguments: argparse.Namespace, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random prompts with completions, other ones for each process."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    ids = torch.randint(2, vocabulary, (arguments.rows, arguments.length), generator=generator)
    labels = ids.clone()
    labels[:, : arguments.length - (arguments.labelled or arguments.length // 4)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(model: Any, called: Any, arm: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time steps of ``called``, which is ``model`` or what averages its gradients, in one arm.

    Every process calls it, and has the same times: those of the slowest.
    """
    settings = ARMS[arm]
    handle = None if settings is None else sparsify(model, SparsityConfig(**({"mode": "dense"} | settings)))
    host = batch(arguments, model.config.vocab_size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=device.type == "cuda")
    half = arguments.dtype == torch.bfloat16
    loss, times = float("nan"), []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for number in range(WARM_UP + arguments.steps):
        inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in host.items()}
        if handle is not None:
            multiple = GRAPH_MULTIPLE if device.type == "cuda" else 0
            layout = TokenLayout.build(host["attention_mask"], host["labels"], multiple=multiple)
            inputs["token_layout"] = layout.to(device)
            handle.begin_step(number, WARM_UP + arguments.steps)
        synchronise(device)
        dist.barrier()
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            result = called(**inputs).loss
        result.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronise(device)
        slowest = torch.tensor(time.perf_counter() - began, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if number == 0:
            loss = float(result.detach())
        if number >= WARM_UP:
            times.append(1000 * float(slowest))
        if handle is not None:
            handle.end_step()
    peak = torch.tensor(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0.0, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    graphs = (0, 0) if handle is None else handle.graphs
    if handle is not None:
        handle.remove()
    return {
        "step_ms": statistics.median(times), "fastest_ms": min(times), "slowest_ms": max(times),
        "peak_gb": float(peak) / 1e9, "loss": loss, "graph_replays": graphs[1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="local folder or hub name of a Llama-like model")
    source.add_argument("--shape", choices=[name for name in SHAPES if name.startswith("llama")], help="random weights")
    source.add_argument("--tiny", action="store_true", help="random weights in two layers")
    parser.add_argument("--layers", type=int, help="layers of a shape (default: all)")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all three")
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=["plain", "dense", "sparse"])
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on GPUs, fp32 on the CPU")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch, per process (default: 4)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row (default: 64)")
    parser.add_argument("--labelled", type=int, help="labelled tokens of a row (default: a quarter)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each arm (default: 5)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--csv", type=Path, help="also write the table, row by row as it is measured")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    arguments.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype or ("bf16" if on_gpu else "fp32")]
    dist.init_process_group("nccl" if on_gpu else "gloo")
    model = adapted(arguments, device)
    tokens, processes = arguments.rows * arguments.length, dist.get_world_size()
    is_first, rates = dist.get_rank() == 0, {}
    if is_first:
        print(f"{processes} processes, {tokens} tokens each, {model.config.num_hidden_layers} layers", flush=True)
    rows: list[dict[str, Any]] = []
    for layout in [name for name in LAYOUTS if name in arguments.layout]:  # a sharded model stays sharded: last
        called = model
        if layout == "ddp":
            called = DistributedDataParallel(model, device_ids=[device.index] if on_gpu else None)
        elif layout == "fsdp2":
            shard(model, arguments, device)
        for arm in arguments.arm:
            row = measured(model, called, arm, arguments, device)
            rate = 1000 * tokens * (1 if layout == "alone" else processes) / row["step_ms"]
            rates[layout, arm] = rate
            ratio = rate / rates["alone", arm] if ("alone", arm) in rates else float("nan")
            rows.append({
                "layout": layout, "arm": arm, "cards": 1 if layout == "alone" else processes,
                "layers": model.config.num_hidden_layers, "rows": arguments.rows, "length": arguments.length,
                "tokens_per_s": rate, "ratio_to_one": ratio, **row,
            })  # fmt: skip
            if not is_first:
                continue
            print(
                f"{layout:6s} {arm:20s} {row['step_ms']:9.1f} ms ({row['fastest_ms']:.1f} to {row['slowest_ms']:.1f}), "
                f"{rate:9.0f} tokens/s, {ratio:5.2f} of one, peak {row['peak_gb']:.2f} GB, loss {row['loss']:.6f}",
                flush=True,
            )
            if arguments.csv is not None:
                with arguments.csv.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)
        del called
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
