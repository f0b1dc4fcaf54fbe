"""A LoRA training step of a Llama-3-8B shape: PEFT, PEFT with Liger's kernels, and ours, dense and sparse, in one run.

    python benchmarks/contextual.py --csv speed.csv          # everything, about five minutes on one H200
    python benchmarks/contextual.py --parts math             # the arithmetic setting: 8 x 512, 128 labelled

Random bfloat16 weights, LoRA r 32 in float32, AdamW. All variants share the frozen weights and take turns on the same
batch. Prints medians, quartiles, ratios against the best dense step, the FLOP floor at the measured rate of a large
matrix product, peak memory, and how often a step made the host wait.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch

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
from sparselora.contextual.flops import Workload
from sparselora.contextual.structure import unwrap
from sparselora.models.architectures import SHAPES
from sparselora.models.load import device_name
from sparselora.report.contextual import sweep

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


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
PARTS = ("math", "commonsense", "all_linear", "encoder", "sparsity")
VARIANTS = ["peft", *(["liger"] if importlib.util.find_spec("liger_kernel") else []), "dense", "svd"]
"""Of a Llama; Liger's kernels where they are installed."""
WORK = Workload(8, 512, 128)
Variants = dict[str, TimedModel]


class LigerModel(TimedModel):
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


def ragged_batch(vocabulary: int, work: Workload, seed: int) -> dict[str, torch.Tensor]:
    """Rows of half to all of ``work.seq`` tokens, a tenth to four tenths of them labelled, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(work.seq // 2, work.seq + 1, (work.batch,), generator=generator)
    shares = 0.1 + 0.3 * torch.rand(work.batch, generator=generator)
    tokens = torch.randint(vocabulary, (work.batch, int(lengths.max())), generator=generator)
    mask, labels = torch.ones_like(tokens), tokens.clone()
    for row, (length, share) in enumerate(zip(lengths.tolist(), shares.tolist())):
        mask[row, length:] = 0
        labels[row, length:] = -100
        labels[row, : length - round(share * length)] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def ragged(variants: Mapping[str, TimedModel], vocabulary: int, work: Workload, count: int) -> list[dict[str, Any]]:
    """Tokens per second without padding over ``count`` fresh ragged batches, after twice as many to warm up on."""
    batches = [ragged_batch(vocabulary, work, seed) for seed in range(3 * count)]
    warm, fresh = batches[: 2 * count], batches[2 * count :]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in fresh)
    rows = []
    for name, variant in variants.items():
        for batch in warm if variant.handle is not None else warm[:3]:
            variant.step(batch)
        before = variant.handle.graphs if variant.handle is not None else (0, 0)
        spent = [sum(parts) for parts in variant.burst(fresh)]
        after = variant.handle.graphs if variant.handle is not None else (0, 0)
        row = {
            "variant": name, "tokens_per_s": 1000 * tokens / sum(spent), "step_ms": statistics.median(spent),
            "median_tokens_per_s": 1000 * tokens / count / statistics.median(spent),
            "captured_before": before[0], "captured": after[0] - before[0], "replayed": after[1] - before[1],
            "steps": count,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:>10}  ragged {row['tokens_per_s']:8.0f} tokens/s, {row['median_tokens_per_s']:.0f} by "
            f"the median step of {row['step_ms']:.1f} ms; graphs captured "
            f"{row['captured_before']} + {row['captured']}, replayed in {row['replayed']} of {count} steps",
            flush=True,
        )
    return rows


class Bench:
    """One model with random weights, its variants at several settings, and the rows that were measured."""

    def __init__(self, config: Mapping[str, Any], device: torch.device, rate: float, causal: bool = True) -> None:
        self.config, self.device, self.rate, self.causal = config, device, rate, causal
        model = build_model(config, causal=causal, device=device, dtype=torch.bfloat16, seed=0)
        self.model = model.requires_grad_(False)  # so that copies share its weights
        self.adapters: dict[tuple[str, ...], Any] = {}

    def adapted(self, targets: tuple[str, ...] | None) -> Any:
        """The model with a LoRA on ``targets``; each adapter is on a copy that shares the frozen weights."""
        key = targets or ()
        if key not in self.adapters:
            self.adapters[key] = adapt(
                shared_copy(self.model), r=32, alpha=64, targets=targets, causal=self.causal
            )  # fmt: skip
        return self.adapters[key]

    def variant(
        self, name: str, base: Any, layers: Mapping[str, float], batch: Mapping[str, torch.Tensor]
    ) -> TimedModel:
        if name == "peft":
            return TimedModel(base, self.device, bf16=True)
        if name == "liger":
            return LigerModel(base, self.device, bf16=True)
        rank = 8 if self.causal else 4
        config = SparsityConfig(mode=name, svd_rank=rank, layer_sparsity={} if name == "dense" else layers)
        calibration = [{k: v[:1] for k, v in batch.items()}] if config.needs_calibration else None
        return TimedModel(base, self.device, bf16=True, convert=convert_with(config, calibration))

    def variants(self, names: Sequence[str], layers: Mapping[str, float], targets: tuple[str, ...] | None) -> Variants:
        began, base = time.perf_counter(), self.adapted(targets)
        batch = self.batches(Workload(1, 512, 128 if self.causal else 0))[0]
        made = {name: self.variant(name, base, layers, batch) for name in names}
        print(f"{', '.join(names)} set up in {time.perf_counter() - began:.0f} s", flush=True)
        return made

    def batches(self, work: Workload) -> list[dict[str, torch.Tensor]]:
        return [random_batch(self.config["vocab_size"], work, causal=self.causal, seed=i) for i in range(2)]

    def measure(self, title: str, variants: Variants, work: Workload, rounds: int = 5) -> list[dict[str, Any]]:
        """Rows of `step_table`, with what they are of."""
        times = time_variants(variants, self.batches(work), rounds=rounds, warmup=4)
        dense = [name for name in variants if name in ("peft", "liger", "dense")] or list(variants)
        print(f"--- {title}: {work.batch} x {work.seq}, {work.labelled} labelled", flush=True)
        rows = step_table(times, dense, work.batch * work.seq)
        for row in rows:
            row |= {"setting": title, "batch": work.batch, "seq": work.seq, "labelled": work.labelled}
            print(
                f"{row['variant']:>10}  {row['step_ms']:7.1f} ms [{row['step_ms_low']:.1f}, {row['step_ms_high']:.1f}]"
                f"  x{row['speedup']:.2f} of the best dense  {row['peak_mb'] / 1000:.1f} GB  {row['host_waits']} waits",
                flush=True,
            )
        return rows

    def once(self, title: str, names: Sequence[str], work: Workload, layers: Mapping[str, float],
             targets: tuple[str, ...] | None = ATTENTION) -> list[dict[str, Any]]:  # fmt: skip
        variants = self.variants(names, layers, targets)
        try:
            return self.measure(title, variants, work)
        finally:
            close(variants)


def close(variants: Variants) -> None:
    for variant in variants.values():
        variant.close()
    variants.clear()
    gc.collect()  # a handle and its closures refer to one another
    torch.cuda.empty_cache()


def arithmetic(bench: Bench, profile: Path | None) -> list[dict[str, Any]]:
    """The published arithmetic setting: at its own shape, on ragged batches, and as sequence and batch grow."""
    variants, work = bench.variants([*VARIANTS, "surrogate"], SETTINGS["math"], ATTENTION), WORK
    rows = bench.measure("math", variants, work, rounds=6)
    for row in ragged(variants, bench.config["vocab_size"], work, 12):
        rows.append(row | {"setting": "math, ragged"})
    rows += bench.measure("math, long", variants, Workload(2, 2048, 512), rounds=3)
    few = {name: variants[name] for name in ("dense", "svd", "surrogate")}
    for batch, seq in ((2, 512), (4, 512), (16, 512), (16, 256), (4, 1024)):
        rows += bench.measure("growth", few, Workload(batch, seq, seq // 4), rounds=3)
    for name, variant in variants.items() if profile else ():
        if name != "peft":
            with profiled(profile, name):
                variant.step(bench.batches(work)[0])
                torch.cuda.synchronize()
    variants["svd"].handle.hold_choices()  # the channels of one step for ever: what choosing costs is the difference
    rows += bench.measure("math, channels held", {"held": variants["svd"]}, work, rounds=4)
    close(variants)
    return rows


def encoder(device: torch.device, rate: float) -> list[dict[str, Any]]:
    """A DistilBERT shape, all tokens sparse, the optimised configuration."""
    layers = {f"layer.{i}": s for i, s in enumerate((0.4, 0.5, 0.6, 0.8, 0.9, 0.95))}
    bench = Bench(SHAPES["distilbert"], device, rate, causal=False)
    return bench.once("encoder", ["peft", "dense", "svd"], Workload(256, 128), layers, None)


def growth_figures(table: pd.DataFrame, folder: Path, stem: str) -> None:
    """Step time and speed-up against the tokens of a step, the length of its rows, and the sparsity of the FFNs."""
    rows = table[table["variant"].isin(["dense", "svd", "surrogate"])].assign(tokens=table["batch"] * table["seq"])
    same = rows[rows["setting"].isin(["math", "math, long", "growth"])]
    device = table["device"].iloc[0]
    for column, part, label, what in (
        ("tokens", same[same["seq"] == 512], "tokens per step", "rows of 512 tokens, arithmetic setting"),
        ("seq", same[same["tokens"] == 4096], "tokens per row", "4,096 tokens per step, arithmetic setting"),
        ("sparsity", rows[rows["setting"] == "sparsity"], "sparsity of 28 FFNs", "8 × 512 tokens, attention 0.5"),
    ):
        if column in part and part[column].nunique() > 1:  # only the part "sparsity" has that column
            title = f"Llama-3-8B shape, {what}, a quarter labelled ({device})"
            sweep(folder / f"{stem}_by_{column}.png", part, column, label, title)


def run_parts(
    parts: Sequence[str], device: torch.device, rate: float, *, profile: Path | None = None, csv: Path | None = None
) -> list[dict[str, Any]]:
    """Make the measurements ``parts`` of `PARTS`, and write the table and its figures after each."""
    bench = Bench(LLAMA_3_8B, device, rate) if set(parts) - {"encoder"} else None
    rows: list[dict[str, Any]] = []
    for part in parts:
        if part == "encoder" or bench is None:
            rows += encoder(device, rate)
        elif part == "math":
            rows += arithmetic(bench, profile)
        elif part == "commonsense":
            rows += bench.once(part, VARIANTS, replace(WORK, labelled=3), SETTINGS[part])
        elif part == "all_linear":
            rows += bench.once(part, VARIANTS, WORK, SETTINGS["math"], (*ATTENTION, *FFN))
        else:
            for sparsity in (0.5, 0.9):
                layers = {name: 0.5 if name.endswith(".attention") else sparsity for name in SETTINGS["math"]}
                rows += [row | {"sparsity": sparsity} for row in bench.once(part, ["dense", "svd"], WORK, layers)]
        if csv is not None:  # after each part: a run that is cut short keeps what it has
            table = pd.DataFrame(rows).assign(device=device_name(device), matrix_rate=rate)
            table.to_csv(csv, index=False)
            growth_figures(table, csv.parent, csv.stem)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which measurements to make")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of one step of each variant (math)")
    parser.add_argument("--csv", type=Path, help="file for the table")
    args = parser.parse_args()
    os.environ.setdefault("SPARSELORA_CACHE", tempfile.mkdtemp())
    device = torch.device("cuda")
    rate = product_rate(device, torch.bfloat16)
    print(f"{device_name(device)}, torch {torch.__version__}, {rate / 1e12:.0f} TFLOP/s", flush=True)
    run_parts(args.parts, device, rate, profile=args.profile, csv=args.csv)


if __name__ == "__main__":
    main()
