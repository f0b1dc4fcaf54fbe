"""One step of LoRA over a frozen base that FSDP2 shards: ours in a mode, against plain PEFT on the same shards.

    torchrun --nproc_per_node 2 benchmarks/many_gpus.py --model ./llama-70b --arm dense sparse fp8
    torchrun --nproc_per_node 2 benchmarks/many_gpus.py --tiny                 # two processes on the CPU

Each process reads the model on the CPU, shards it block by block, and is made sparse afterwards, so the shape need not
fit one card. The arms are taken in turn: ``plain`` is PEFT and transformers alone, as TRL's trainer runs them under
FSDP2. Printed for each: the median of a step in ms and its spread, tokens a second of all processes, the largest peak
of memory of this process, and the loss, which is that of plain PEFT where the arm is exact.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.handle import sparsify

ARMS: dict[str, SparsityConfig | None] = {
    "plain": None,
    "dense": SparsityConfig(mode="dense"),
    "sparse": SparsityConfig(mode="random_fixed", ffn_sparsity=0.9),
    "fp8": SparsityConfig(mode="dense", frozen_precision="fp8"),
    "fp8_emulated": SparsityConfig(mode="dense", frozen_precision="fp8_emulated"),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(arguments: argparse.Namespace, device: torch.device) -> Any:
    torch.manual_seed(0)
    if arguments.tiny:
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        )  # fmt: skip
        base: Any = LlamaForCausalLM(config)
    else:
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    base.config.use_cache = False
    model: Any = get_peft_model(base, LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(base.dtype)  # one dtype a group: fully_shard wants it
    for layer in base.model.layers:
        fully_shard(layer.to(device))
    return fully_shard(model.to(device)).train()


def batch(arguments: argparse.Namespace, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random prompts with a completion of a quarter of their length, other ones for each process."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    ids = torch.randint(2, vocabulary, (arguments.rows, arguments.length), generator=generator)
    labels = ids.clone()
    labels[:, : 3 * arguments.length // 4] = -100
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local folder or hub name of a Llama-like model")
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers, in place of --model")
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=["plain", "dense", "sparse"])
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch, per process (default: 4)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row (default: 64)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each arm (default: 5)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    arguments = parser.parse_args()
    if bool(arguments.model) == arguments.tiny:
        parser.error("give one of --model and --tiny")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    model = adapted(arguments, device)
    inputs = batch(arguments, model.config.vocab_size, device)
    times: dict[str, list[float]] = {arm: [] for arm in arguments.arm}
    losses: dict[str, float] = {}
    peaks = dict.fromkeys(arguments.arm, 0)
    for number in range(arguments.steps + 1):  # the first step of each arm warms up
        for arm in arguments.arm:
            settings = ARMS[arm]
            handle = None if settings is None else sparsify(model, settings)
            for timed in (False, True):
                if on_gpu:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                dist.barrier()
                began = time.perf_counter()
                loss = model(**inputs).loss
                loss.backward()
                losses.setdefault(arm, float(loss.detach()))
                model.zero_grad()
                if on_gpu:
                    torch.cuda.synchronize()
                dist.barrier()
                if timed and number:
                    times[arm].append(1000 * (time.perf_counter() - began))
                    peaks[arm] = max(peaks[arm], torch.cuda.max_memory_allocated() if on_gpu else 0)
            if handle is not None:
                handle.remove()
    if dist.get_rank() == 0:
        tokens = arguments.rows * arguments.length * dist.get_world_size()
        print(f"{dist.get_world_size()} processes, {tokens} tokens a step, {model.config.num_hidden_layers} layers")
        for arm, ms in times.items():
            median = statistics.median(ms)
            print(
                f"{arm:12s} {median:9.1f} ms ({min(ms):.1f} to {max(ms):.1f}), {1000 * tokens / median:9.0f} tokens/s, "
                f"peak {peaks[arm] / 1e9:.2f} GB, loss {losses[arm]:.6f}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
