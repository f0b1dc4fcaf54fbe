"""A LoRA training step of a Llama-3-8B shape: PEFT, PEFT with Liger's kernels, and ours, dense and sparse, in one run.

    python benchmarks/contextual.py                                   # 8 x 512, 128 labelled: the arithmetic setting
    python benchmarks/contextual.py --setting commonsense --labelled 3
    python benchmarks/contextual.py --batch 2 --seq 2048 --labelled 512

Random bfloat16 weights, LoRA r 32 in float32, AdamW. All variants share the frozen weights and take turns on the same
batch. Prints medians, quartiles, ratios against the best dense step, the FLOP floor at the measured rate of a large
matrix product, peak memory, and how often a step made the host wait.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from sparselora.bench.timing import (
    Variant,
    adapt,
    build_model,
    convert_with,
    random_batch,
    step_table,
    time_variants,
)
from sparselora.config import SparsityConfig
from sparselora.contextual.structure import unwrap
from sparselora.flops import Workload

LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
SETTINGS: dict[str, dict[str, float]] = {
    "math": {
        "layer.3-30": 0.99, "layer.14-19.attention": 0.75, "layer.21-23.attention": 0.75,
        "layer.25-29.attention": 0.75,
    },
    "commonsense": {
        "layer.17-30": 0.97, "layer.17-19.attention": 0.2, "layer.21-23.attention": 0.2, "layer.25-29.attention": 0.2,
    },
}  # fmt: skip


class LigerVariant(Variant):
    """PEFT with Liger's kernels. They patch functions of the modelling module too, so those are swapped in per step."""

    def __init__(self, model: Any, device: torch.device, *, bf16: bool) -> None:
        super().__init__(model, device, bf16=bf16)
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        self._module = importlib.import_module("transformers.models.llama.modeling_llama")
        before = dict(vars(self._module))
        apply_liger_kernel_to_llama(model=unwrap(self.model))
        self._patched = {name: value for name, value in vars(self._module).items() if before.get(name) is not value}
        self._plain = {name: before[name] for name in self._patched if name in before}
        vars(self._module).update(self._plain)

    def _enqueue(self, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        vars(self._module).update(self._patched)
        try:
            return super()._enqueue(batch)
        finally:
            vars(self._module).update(self._plain)


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of an 8192³ bfloat16 product of random matrices."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 8192**3 / (statistics.median(times[2:]) / 1000)


@contextmanager
def profiled(path: Path | None, title: str) -> Iterator[None]:
    if path is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        yield
    kernels = [e for e in profiler.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels) / 1000
    lines = [f"{title}: {total:.1f} ms in {sum(e.count for e in kernels)} kernels"]
    lines += [f"{e.self_device_time_total / 1000:8.3f} ms {e.count:5d}  {e.key[:110]}" for e in kernels]
    (path / f"{title}.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:1]))


def ragged_batch(vocabulary: int, args: argparse.Namespace, seed: int) -> dict[str, torch.Tensor]:
    """Rows of half to all of ``--seq`` tokens, a tenth to four tenths of them labelled, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(args.seq // 2, args.seq + 1, (args.batch,), generator=generator)
    shares = 0.1 + 0.3 * torch.rand(args.batch, generator=generator)
    tokens = torch.randint(vocabulary, (args.batch, int(lengths.max())), generator=generator)
    mask, labels = torch.ones_like(tokens), tokens.clone()
    for row, (length, share) in enumerate(zip(lengths.tolist(), shares.tolist())):
        mask[row, length:] = 0
        labels[row, length:] = -100
        labels[row, : length - round(share * length)] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def ragged(variants: Mapping[str, Variant], args: argparse.Namespace) -> None:
    """Tokens per second without padding over fresh ragged batches, after as many to warm up on."""
    batches = [ragged_batch(128256, args, seed) for seed in range(2 * args.ragged)]
    for name, variant in variants.items():
        for batch in batches[: args.ragged]:
            variant.step(batch)
        before = variant.handle.graphs if variant.handle is not None else (0, 0)
        spent = [sum(parts) for parts in variant.burst(batches[args.ragged :])]
        after = variant.handle.graphs if variant.handle is not None else (0, 0)
        tokens = [int(batch["attention_mask"].sum()) for batch in batches[args.ragged :]]
        print(
            f"{name:>10}  ragged: {1000 * sum(tokens) / sum(spent):8.0f} tokens/s"
            f"  step {statistics.median(spent):.1f} ms  graphs captured {before[0]} + {after[0] - before[0]}, replayed {after[1] - before[1]} of {args.ragged}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="math")
    parser.add_argument("--variants", nargs="+", default=["peft", "liger", "dense", "svd", "surrogate"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--labelled", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--all_linear", action="store_true", help="LoRA on the FFN too")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="folder for a profile of one step of each variant")
    parser.add_argument("--ragged", type=int, default=0, help="also time this many batches of real-world raggedness")
    parser.add_argument("--json", type=Path, help="file for the table")
    args = parser.parse_args()
    os.environ.setdefault("SPARSELORA_CACHE", tempfile.mkdtemp())
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), torch.__version__)
    rate = matrix_rate(device)
    sparsity = {k: v for k, v in SETTINGS[args.setting].items() if args.layers == 32}
    if not sparsity:
        sparsity = {f"layer.1-{args.layers - 2}": 0.99, f"layer.1-{args.layers - 2}.attention": 0.75}
    model = build_model(
        LLAMA_3_8B | {"num_hidden_layers": args.layers}, causal=True, device=device, dtype=torch.bfloat16, seed=0
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    targets += ["gate_proj", "up_proj", "down_proj"] if args.all_linear else []
    adapted = adapt(model, r=32, alpha=64, targets=targets, causal=True)
    work = Workload(batch=args.batch, seq=args.seq, labelled=args.labelled)
    batches = [random_batch(128256, work, causal=True, seed=i) for i in range(2)]
    variants: dict[str, Variant] = {}
    for name in args.variants:
        began = time.perf_counter()
        if name == "peft":
            variants[name] = Variant(adapted, device, bf16=True)
        elif name == "liger":
            variants[name] = LigerVariant(adapted, device, bf16=True)
        else:
            layers = {} if name == "dense" else sparsity
            config = SparsityConfig(mode=name, svd_rank=8, surrogate_rank=64, layer_sparsity=layers)
            calibration = [{k: v[:1] for k, v in batches[0].items()}] if config.needs_calibration else None
            variants[name] = Variant(adapted, device, bf16=True, convert=convert_with(config, calibration))
        print(f"{name}: set up in {time.perf_counter() - began:.1f} s", flush=True)
    times = time_variants(variants, batches, rounds=args.rounds, warmup=args.warmup)
    dense = [name for name in variants if name in ("peft", "liger", "dense")] or list(variants)[:1]
    rows = step_table(times, dense, args.batch * args.seq)
    print(f"{args.setting}, {args.batch} x {args.seq}, {args.labelled} labelled; matrix rate {rate / 1e12:.0f} TFLOP/s")
    for row in rows:
        print(
            f"{row['variant']:>10}  {row['step_ms']:7.1f} ms [{row['step_ms_low']:.1f}, {row['step_ms_high']:.1f}]"
            f"  fwd {row['forward_ms']:.1f} bwd {row['backward_ms']:.1f} opt {row['optimizer_ms']:.1f}"
            f"  x{row['speedup']:.2f}  {row['peak_mb'] / 1000:.1f} GB  waits {row['host_waits']}"
        )
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"args": settings, "rate": rate, "rows": rows}))
    if args.ragged:
        ragged(variants, args)
    if args.profile:
        args.profile.mkdir(parents=True, exist_ok=True)
        for name, variant in variants.items():
            if name != "peft":
                with profiled(args.profile, name):
                    variant.step(batches[0])
                    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
