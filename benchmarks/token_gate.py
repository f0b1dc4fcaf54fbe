"""What per-token gates of rank channels cost and save in wall clock: one layer, and a training step of an encoder.

    python benchmarks/token_gate.py                      # a GPU where there is one, else the CPU at a small shape
    python benchmarks/token_gate.py --csv results/token_gate/speed_h200.csv

Forward and backward, variants interleaved, medians with quartiles. `none` has no adapter: what another variant takes
beyond it is its adapter's time, and `full` less `none` is all that any choice of channels could save. `static` has k
channels in smaller tensors; the gates choose k of r for every token, and compute all r of them, for tokens that choose
differently share one product. No weights are needed: the encoder has the shape of MiniLM.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from sparselora.config.token_gates import TokenGateConfig
from sparselora.models.lora import adapter_flops_per_token
from sparselora.token_gates.gates import (
    active_adapter_flops_per_token,
    attach_token_gates,
    find_token_gates,
    gate_flops_per_token,
)

VARIANTS = ("none", "full", "static", "energy", "learned", "random")
KEEP = 4
"""One channel of so many is active."""


class Layer(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.proj(x)
        return out


def adapted(base: nn.Module, variant: str, r: int, targets: list[str]) -> nn.Module:
    if variant == "none":
        return base.requires_grad_(False)
    rank = r // KEEP if variant == "static" else r
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, bias="none"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    if variant in ("energy", "learned", "random"):
        attach_token_gates(model, TokenGateConfig(policy=variant, budget=1 / KEEP))
    return model.train()


def flops(model: nn.Module, variant: str) -> tuple[float, float]:
    """FLOPs per token, forward, of the adapter's active channels and of the decision."""
    if variant == "none":
        return 0.0, 0.0
    if variant in ("full", "static"):
        return adapter_flops_per_token(model), 0.0
    gates = find_token_gates(model)
    return active_adapter_flops_per_token(gates), gate_flops_per_token(gates)


def measure(steps: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step, interleaved, after two rounds that do not count."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = now()
            step()
            if turn >= 2:
                taken[name].append(now() - start)
    return taken


def peak_mb(step: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def rows_of(
    title: str,
    make: Callable[[str], tuple[nn.Module, Callable[[], Any]]],
    count: int,
    device: torch.device,
    rounds: int,
) -> list[dict[str, Any]]:
    models, steps = {}, {}
    for variant in VARIANTS:
        models[variant], steps[variant] = make(variant)
    taken = measure(steps, device, rounds)
    base, full = (statistics.median(taken[name]) for name in ("none", "full"))
    rows = []
    for variant in VARIANTS:
        low, middle, high = statistics.quantiles(taken[variant], n=4)
        active, decision = flops(models[variant], variant)
        rows.append({
            "case": title, "variant": variant, "ms": middle, "q1": low, "q3": high, "adapter_ms": middle - base,
            "of_full": middle / full, "per_s": 1e3 * count / middle, "adapter_flops_per_token": active,
            "gate_flops_per_token": decision, "peak_mb": peak_mb(steps[variant], device),
        })  # fmt: skip
    return rows


def layer_case(
    tokens: int, d_in: int, d_out: int, r: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> list[dict[str, Any]]:
    x = torch.randn(tokens, d_in, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, d_out, device=device, dtype=dtype)

    def make(variant: str) -> tuple[nn.Module, Callable[[], Any]]:
        model = adapted(Layer(d_in, d_out).to(device, dtype), variant, r, ["proj"]).to(device)

        def step() -> None:  # PEFT keeps the adapter in float32: autocast computes it as training does
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = model(x)
            out.backward(gradient)

        return model, step

    return rows_of(f"layer {d_in}→{d_out}, r {r}, {tokens} tokens", make, tokens, device, rounds)


def encoder_case(batch: int, length: int, r: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    ids = torch.randint(1000, 30000, (batch, length), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}

    def make(variant: str) -> tuple[nn.Module, Callable[[], Any]]:
        base = BertForSequenceClassification(config)
        model = adapted(base, variant, r, ["query", "key", "value", "dense"]).to(device)
        head = base.classifier if variant == "none" else model.base_model.model.classifier  # type: ignore[union-attr]
        head.requires_grad_(True)  # type: ignore[operator]

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(**inputs).loss
            loss.backward()

        return model, step

    return rows_of(f"encoder step, r {r}, {batch} × {length} tokens", make, batch, device, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="interleaved repetitions (default: 20)")
    parser.add_argument("--csv", type=Path, help="file for the table")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, for the quartiles, got {args.rounds}")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        shapes = [(4096, 4096, 4096, r, torch.bfloat16) for r in (16, 64)] + [(4096, 4096, 14336, 16, torch.bfloat16)]
        encoders = [(256, 64, 8), (32, 64, 8)]
    else:
        shapes, encoders = [(512, 768, 768, 16, torch.float32)], [(8, 64, 8)]
    rows = []
    for tokens, d_in, d_out, r, dtype in shapes:
        rows += layer_case(tokens, d_in, d_out, r, device, dtype, args.rounds)
    for batch, length, r in encoders:
        rows += encoder_case(batch, length, r, device, args.rounds)
    table = pd.DataFrame(rows).round(4)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    print(f"torch {torch.__version__}, {name}")
    print(table.to_string(index=False))
    if args.csv:
        table.to_csv(args.csv, index=False)


if __name__ == "__main__":
    main()
