"""A LoRA training step of a Llama-3-8B shape with fp8 products and without a backward pass through the context.

    python benchmarks/fast.py --csv results/fast/speed.csv   # every group, about five minutes on one H200
    python benchmarks/fast.py --groups main --rounds 8       # the four combinations at 8 x 512, 128 labelled
    python benchmarks/fast.py --groups ragged                # rows of unequal lengths, from the first batch on

Random bfloat16 weights, LoRA r 32 in float32, AdamW. The variants of a group share the frozen weights and take turns on
the same batch, the dense step among them. Prints medians, quartiles, ratios, tokens per second, the FLOP floor of the
frozen products at the rates of a large bf16 and a large fp8 product, and in group ``main`` the peak memory of each
variant alone on the device. Rows of groups that are not measured again stay in the table.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch

from benchmarks.contextual import ATTENTION, FFN, LLAMA_3_8B, close, profiled, ragged_batch
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
from sparselora.contextual.handle import sparsify

BOTH = {"frozen_precision": "fp8", "context_backward": "none"}
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "no context backward": {"context_backward": "none"},
    "fp8": {"frozen_precision": "fp8"},
    "both": BOTH,
    "sampled half": {"context_backward": "sampled"},
    "fp8 + sampled half": {"frozen_precision": "fp8", "context_backward": "sampled"},
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
    "sampled": (("dense", "sampled half", "fp8 + sampled half"), Workload(8, 512, 128), ATTENTION),
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


FIRST, LATER = 96, 48
"""Ragged batches of a run from its start on, and after those."""


def ragged_row(name: str, variant: TimedModel, work: Workload) -> dict[str, Any]:
    """Tokens without padding per second of wall-clock time, of ragged batches and of batches of one fixed shape.

    Every capture of a CUDA graph counts where it happens. Before it, three steps compile and load the kernels; their
    graphs are forgotten.
    """
    vocabulary, handle = LLAMA_3_8B["vocab_size"], variant.handle
    fixed = [random_batch(vocabulary, work, causal=True, seed=i % 2) for i in range(12)]
    variant.burst(fixed[:3])
    handle.forget_graphs()
    row: dict[str, Any] = {"variant": name, "steps": FIRST, "later_steps": LATER}
    batches = [ragged_batch(vocabulary, work, seed) for seed in range(FIRST + LATER)]
    for prefix, part in (("", batches[:FIRST]), ("later_", batches[FIRST:]), ("fixed_", fixed)):
        if prefix == "fixed_":
            handle.forget_graphs()
            variant.burst(fixed[:3])  # its one capture, which a long run does not feel
        before = handle.graphs
        began = time.perf_counter()
        spent = [sum(parts) for parts in variant.burst(part)]
        seconds = time.perf_counter() - began
        row[f"{prefix}tokens_per_s"] = sum(int(batch["attention_mask"].sum()) for batch in part) / seconds
        row[f"{prefix}step_ms"] = statistics.median(spent)
        row[f"{prefix}captured"], row[f"{prefix}replayed"] = (n - m for n, m in zip(handle.graphs, before))
    print(
        f"{name:>20}  {row['tokens_per_s']:.0f} tokens/s in the first {FIRST} ragged batches, "
        f"{row['tokens_per_s'] / row['fixed_tokens_per_s']:.0%} of the fixed shape's, with {row['captured']} captures; "
        f"{row['later_tokens_per_s']:.0f} in the next {LATER}, "
        f"{row['later_tokens_per_s'] / row['fixed_tokens_per_s']:.0%}, with {row['later_captured']}; median steps "
        f"{row['step_ms']:.1f} and {row['later_step_ms']:.1f} ms",
        flush=True,
    )
    return row


def measure_ragged(base: Any, device: torch.device) -> list[dict[str, Any]]:
    """The rows of group ``ragged``, one variant at a time: the graphs of each have the device for themselves."""
    rows = []
    for name in GROUPS["ragged"][0]:
        variants = {name: build(name, base, device)}
        rows.append(ragged_row(name, variants[name], GROUPS["ragged"][1]) | {"group": "ragged"})
        close(variants)
    return rows


def peak_gb(name: str, base: Any, device: torch.device, work: Workload) -> float:
    """Peak memory of the allocator in the first step of a variant that has the device for itself, in GB.

    With fp8 the frozen weights wait in host memory, as in a training run.
    """
    config = SparsityConfig(**({"mode": "dense"} | SETTINGS[name]))
    variants = {name: TimedModel(base, device, bf16=True, convert=lambda model: sparsify(model, config))}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    variants[name].step(random_batch(LLAMA_3_8B["vocab_size"], work, causal=True, seed=0))
    peak = torch.cuda.max_memory_allocated() / 1e9
    close(variants)
    return peak


def measure(
    group: str, model: Any, device: torch.device, rates: Mapping[str, float], rounds: int, profile: Path | None
) -> list[dict[str, Any]]:
    names, work, targets = GROUPS[group]
    base = adapt(shared_copy(model), r=32, alpha=64, targets=targets, causal=True)
    if group == "ragged":
        return measure_ragged(base, device)
    peaks = {name: peak_gb(name, base, device, work) for name in names} if group == "main" else {}
    variants = {name: build(name, base, device) for name in names}
    batches = [random_batch(LLAMA_3_8B["vocab_size"], work, causal=True, seed=i) for i in range(2)]
    times = time_variants(variants, batches, rounds=rounds, warmup=4)
    rows = step_table(times, ["dense"], work.batch * work.seq)
    print(f"--- {group}: {work.batch} x {work.seq}, {work.labelled} labelled, LoRA on {' '.join(targets)}", flush=True)
    for row in rows:
        name = row["variant"]
        del row["peak_mb"]  # counted beside the other variants; here each had the device for itself
        row["peak_gb"] = peaks.get(name, float("nan"))
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
