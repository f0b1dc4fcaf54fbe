"""A LoRA training step of a Llama-3-8B shape with fp8 products and without a backward pass through the context.

    python benchmarks/fast.py --csv results/fast/speed.csv   # every group, about five minutes on one H200
    python benchmarks/fast.py --groups main --rounds 8       # the four combinations at 8 x 512, 128 labelled

Random bfloat16 weights, LoRA r 32 in float32, AdamW. The variants of a group share the frozen weights and take turns on
the same batch, the dense step among them. Prints medians, quartiles, ratios, tokens per second, the FLOP floor of the
frozen products at the rates of a large bf16 and a large fp8 product, and peak memory of each variant alone. Rows of
groups that are not measured again stay in the table.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch

from benchmarks.contextual import ATTENTION, FFN, LLAMA_3_8B, close, profiled, ragged
from sparselora.bench.rates import product_rate
from sparselora.bench.timing import (
    TimedModel,
    adapt,
    build_model,
    convert_with,
    random_batch,
    shared_copy,
    step_table,
    time_variants,
)
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Lora, Shape, Workload, token_costs, total

BOTH = {"frozen_precision": "fp8", "context_backward": "none"}
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "no context backward": {"context_backward": "none"},
    "fp8": {"frozen_precision": "fp8"},
    "both": BOTH,
    "both, upper half": BOTH | {"context_backward": "upper"},
    "both + static 50 %": BOTH | {"mode": "static", "layer_sparsity": {"layer.3-30": 0.5}},
    "both + static 90 %": BOTH | {"mode": "static", "layer_sparsity": {"layer.3-30": 0.9}},
}
"""Variant by its name: settings beyond mode dense."""

GROUPS: dict[str, tuple[tuple[str, ...], Workload, tuple[str, ...]]] = {
    "main": (("dense", "no context backward", "fp8", "both"), Workload(8, 512, 128), ATTENTION),
    "sparse": (
        ("dense", "both, upper half", "both + static 50 %", "both + static 90 %"), Workload(8, 512, 128), ATTENTION,
    ),
    "ragged": (("dense", "no context backward", "fp8", "both"), Workload(8, 512, 128), ATTENTION),
    "all_linear": (("dense", "both"), Workload(8, 512, 128), (*ATTENTION, *FFN)),
    "all_labelled": (("dense", "fp8"), Workload(8, 512, 511), ATTENTION),
    "2x4096": (("dense", "both"), Workload(2, 4096, 1024), ATTENTION),
    "1x16384": (("dense", "both"), Workload(1, 16384, 4096), ATTENTION),
}  # fmt: skip


def floor_ms(settings: Mapping[str, Any], work: Workload, rates: Mapping[str, float]) -> float:
    """Milliseconds of the frozen products of a step at the rate of a large product; nothing else is counted."""
    config = SparsityConfig(**({"mode": "dense"} | dict(settings)))
    costs = token_costs(Shape.from_config(LLAMA_3_8B), config, work, Lora(32))
    rate = rates["fp8" if config.frozen_precision == "fp8" else "bf16"]
    macs = total(costs, training=True, components=("FFN", "attention projections"))
    head = total(costs, training=True, components=("head",))
    tokens = work.batch * work.seq
    return 1000 * 2 * tokens * (macs / rate + head / rates["bf16"])


def build(name: str, base: Any, device: torch.device) -> TimedModel:
    config = SparsityConfig(**({"mode": "dense"} | SETTINGS[name]))
    calibration = None
    if config.needs_calibration:
        calibration = [random_batch(LLAMA_3_8B["vocab_size"], Workload(1, 512, 128), causal=True, seed=9)]
    return TimedModel(base, device, bf16=True, convert=convert_with(config, calibration))


def measure(
    group: str, model: Any, device: torch.device, rates: Mapping[str, float], rounds: int, profile: Path | None
) -> list[dict[str, Any]]:
    names, work, targets = GROUPS[group]
    base = adapt(shared_copy(model), r=32, alpha=64, targets=targets, causal=True)
    variants = {name: build(name, base, device) for name in names}
    if group == "ragged":
        rows = [row | {"group": group} for row in ragged(variants, LLAMA_3_8B["vocab_size"], work, 12)]
        close(variants)
        return rows
    batches = [random_batch(LLAMA_3_8B["vocab_size"], work, causal=True, seed=i) for i in range(2)]
    times = time_variants(variants, batches, rounds=rounds, warmup=4)
    rows = step_table(times, ["dense"], work.batch * work.seq)
    print(f"--- {group}: {work.batch} x {work.seq}, {work.labelled} labelled, LoRA on {' '.join(targets)}", flush=True)
    for row in rows:
        name = row["variant"]
        row["peak_gb"] = row["peak_mb"] / 1e3
        row |= {"group": group, "batch": work.batch, "seq": work.seq, "labelled": work.labelled}
        row["floor_ms"] = floor_ms(SETTINGS[name], work, rates)
        print(
            f"{name:>20}  {row['step_ms']:7.1f} ms [{row['step_ms_low']:.1f}, {row['step_ms_high']:.1f}]  floor "
            f"{row['floor_ms']:.0f}  x{row['speedup']:.2f} of dense  {row['tokens_per_s']:.0f} tokens/s  "
            f"{row['peak_gb']:.1f} GB  {row['host_waits']} waits",
            flush=True,
        )
    for name, variant in variants.items() if profile else ():
        with profiled(profile, f"{group}_{name.replace(' ', '_').replace('%', '')}"):
            variant.step(batches[0])
            torch.cuda.synchronize()
    close(variants)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="what to measure")
    parser.add_argument("--rounds", type=int, default=6, help="rounds, in which each variant takes three steps")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of one step of each variant")
    parser.add_argument("--csv", type=Path, help="file for the table")
    args = parser.parse_args(arguments)
    os.environ.setdefault("SPARSELORA_CACHE", tempfile.mkdtemp())
    device = torch.device("cuda")
    rates = {"bf16": product_rate(device, torch.bfloat16), "fp8": product_rate(device, torch.float8_e4m3fn)}
    name = torch.cuda.get_device_name()
    print(
        f"{name}, torch {torch.__version__}, bf16 {rates['bf16'] / 1e12:.0f} and fp8 {rates['fp8'] / 1e12:.0f} TFLOP/s"
    )
    model = build_model(LLAMA_3_8B, causal=True, device=device, dtype=torch.bfloat16, seed=0).requires_grad_(False)
    table = pd.read_csv(args.csv) if args.csv and args.csv.exists() else pd.DataFrame({"group": []})
    for group in args.groups:
        rows = pd.DataFrame(measure(group, model, device, rates, args.rounds, args.profile))
        rows = rows.assign(device=name, bf16_rate=rates["bf16"], fp8_rate=rates["fp8"])
        table = pd.concat([table[table["group"] != group], rows], ignore_index=True)
        if args.csv:  # after each group: a run that is cut short keeps what it has
            table.to_csv(args.csv, index=False)


if __name__ == "__main__":
    main()
