"""The runs of the quality study, as grids: every arm by its settings, its learning rate and its steps.

    python results/fast/study.py tune runs       # runs/grids/tune_qwen.jsonl and tune_smollm2.jsonl
    python results/fast/study.py main runs       # qwen, smollm2, breaks.jsonl, at the rates of runs/tune_MODEL
    python results/fast/study.py exact runs      # exact.jsonl: exact match of the adapters in runs/qwen

Dense training for the time of an arm takes as many dense steps as fit into it, by the step times of speed.csv.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sparselora.errors import InputError

HERE = Path(__file__).resolve().parent

FP8 = {"sparsity.frozen_precision": "fp8"}
NONE = {"sparsity.context_backward": "none"}
UPPER = {"sparsity.context_backward": "upper", "sparsity.context_backward_share": 0.5}
HALF = {"sparsity.context_backward": "sampled", "sparsity.context_backward_share": 0.5}
QUARTER = {"sparsity.context_backward": "sampled", "sparsity.context_backward_share": 0.25}
STATIC = {"sparsity.mode": "static"}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "fp8": FP8,
    "none": NONE,
    "both": FP8 | NONE,
    "fp8_upper": FP8 | UPPER,
    "fp8_sampled_half": FP8 | HALF,
    "sampled_half": HALF,
    "upper": UPPER,
    "sampled_quarter": QUARTER,
    "both_static50": FP8 | NONE | STATIC | {"sparsity.ffn_sparsity": 0.5},
    "both_static90": FP8 | NONE | STATIC | {"sparsity.ffn_sparsity": 0.9},
}
"""Arm by its name: settings beyond those of quality.yaml."""

SPEED = {
    "fp8": ("main", "fp8"),
    "none": ("main", "no context backward"),
    "both": ("main", "both"),
    "fp8_upper": ("sparse", "both, upper half"),
    "fp8_sampled_half": ("sampled", "fp8 + sampled half"),
    "sampled_half": ("sampled", "sampled half"),
    "both_static50": ("sparse", "both + static 50 %"),
    "both_static90": ("sparse", "both + static 90 %"),
}
"""Arm → group and variant of speed.csv."""

TIME = "dense_time_"
PRIMARY = (
    "dense", "fp8", "both", "fp8_upper", "fp8_sampled_half", "none", "sampled_half",
    "dense_time_both", "dense_time_fp8_upper", "dense_time_fp8_sampled_half",
)  # fmt: skip
"""The arms of the contrasts in study.yaml."""
SECONDARY = (
    "upper", "sampled_quarter", "both_static50", "both_static90",
    "dense_time_fp8", "dense_time_none", "dense_time_both_static90",
)  # fmt: skip
SEEDS = range(3, 9)
"""Of the primary arms: seeds 0 to 2 were run, and seen, before the arms with `fp8_upper` and `fp8_sampled_half` were
added."""

EXACT = ("dense", "fp8", "both", "fp8_upper", "fp8_sampled_half", "none", "dense_time_both", "dense_time_fp8_upper")
"""Arms whose adapters answer the questions of GSM8K."""

TUNED = ("dense", "both", "dense_time_both", "fp8_upper")
TUNING_SEED = 100
LIKE = {
    "fp8": "dense", "none": "both", "both_static50": "both", "both_static90": "both", "upper": "fp8_upper",
    "sampled_half": "fp8_upper", "sampled_quarter": "fp8_upper", "fp8_sampled_half": "fp8_upper",
}  # fmt: skip
"""Arm that was not tuned → the tuned one whose learning rate it takes; dense for equal time takes that of
``dense_time_both``."""

STEPS = {"qwen": 188, "smollm2": 230}
"""Steps of a whole run, by model: one pass over 3,000 rows of GSM8K, two over MRPC."""
RATES = {"qwen": (9e-4, 1.8e-3, 2.7e-3), "smollm2": (6e-4, 1.8e-3, 5.4e-3)}
MODEL: dict[str, dict[str, Any]] = {
    "qwen": {},
    "smollm2": {
        "prompt_field": "sentence1",
        "completion_field": "sentence2",
        "template": "Sentence: {prompt}\nIn other words:",
        "max_length": 256,
        "train_bsz": 32,
        "train_samples": 0,
        "max_steps": STEPS["smollm2"],
    },
}
"""Settings of a model's runs beyond those of quality.yaml."""

BREAKS: dict[str, dict[str, Any]] = {
    "lr3": {"lr": 3},
    "lr10": {"lr": 10},
    "r4": {"lora_r": 4, "lora_alpha": 8},
    "r64": {"lora_r": 64, "lora_alpha": 128},
    "linears": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
}  # fmt: skip
"""Settings under which fp8 is compared with dense; ``lr`` multiplies the tuned rate."""


def dense_steps(arm: str, speed: pd.DataFrame, steps: int) -> int:
    """Return the dense steps that last as long as ``steps`` of ``arm``, rounded up: dense has no less time.

    Raises:
        InputError: the arm or the dense step of its group was not timed.
    """
    group, variant = SPEED[arm]
    times = speed[speed["group"] == group].set_index("variant")["step_ms"]
    if variant not in times or "dense" not in times:
        raise InputError(f"speed.csv has no {variant!r} in group {group}; run benchmarks/fast.py --groups {group}")
    return math.ceil(steps * times[variant] / times["dense"])


def equal_time_steps(model: str, speed: pd.DataFrame) -> dict[str, int]:
    """Return the steps of each arm of dense training for equal time; arms whose step was not timed are left out.

    No two have the same number, which would be one run under two names: the later one gets a step more.
    """
    steps: dict[str, int] = {}
    for arm in (*PRIMARY, *SECONDARY):
        if not arm.startswith(TIME):
            continue
        try:
            count = dense_steps(arm.removeprefix(TIME), speed, STEPS[model])
        except InputError as error:
            print(f"left out {arm}: {error}")
            continue
        while count in steps.values():
            count += 1
        steps[arm] = count
    return steps


def settings(arm: str, model: str, steps: Mapping[str, int]) -> dict[str, Any]:
    """Return the flags of an arm beyond its seed and learning rate; ``steps`` is of `equal_time_steps`."""
    if arm.startswith(TIME):
        return MODEL[model] | {"max_steps": steps[arm]}
    return MODEL[model] | ARMS[arm]


def tuning(model: str, steps: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the runs that choose learning rates."""
    return [
        {"name": f"{arm}_lr{rate:g}", "seed": TUNING_SEED, "lr": rate, **settings(arm, model, steps)}
        for rate in RATES[model]
        for arm in TUNED
    ]


def chosen_rates(folder: Path) -> dict[str, float]:
    """Return the learning rate of each tuned arm with the least held-out loss.

    Raises:
        InputError: an arm without a finished run.
    """
    rates: dict[str, tuple[float, float]] = {}
    for path in sorted(folder.glob("*_lr*/summary.csv")):
        arm, _, rate = path.parent.name.rpartition("_lr")
        loss = float(pd.read_csv(path)["eval_loss"].iloc[0])
        if math.isfinite(loss):
            rates[arm] = min(rates.get(arm, (math.inf, 0.0)), (loss, float(rate)))
    if lacking := [arm for arm in TUNED if arm not in rates]:
        raise InputError(f"{folder} has no finished run of {', '.join(lacking)}; run the grid of tuning first")
    return {arm: rate for arm, (_, rate) in rates.items()}


def rate_of(arm: str, rates: Mapping[str, float]) -> float:
    """Return the learning rate of an arm, which is its own or that of the arm it is like."""
    if arm in rates:
        return rates[arm]
    return rates[TIME + "both" if arm.startswith(TIME) else LIKE[arm]]


def runs(
    model: str, arms: Sequence[str], seeds: Sequence[int], steps: Mapping[str, int], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return a run for each seed and arm, the arms of a seed together: what is cut off leaves whole pairs."""
    return [
        {"name": f"{arm}_s{seed}", "seed": seed, "lr": rate_of(arm, rates), **settings(arm, model, steps)}
        for seed in seeds
        for arm in arms
        if not arm.startswith(TIME) or arm in steps
    ]


def breaks(rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return pairs of a dense and an fp8 run under settings that may be hard for fp8."""
    grid = []
    for seed in SEEDS[:2]:
        for setting, flags in BREAKS.items():
            rate = rates["dense"] * flags.get("lr", 1)
            grid += [
                {"name": f"{arm}_{setting}_s{seed}", "seed": seed, **ARMS[arm], **flags, "lr": round(rate, 6)}
                for arm in ("dense", "fp8")
            ]
    return grid


def exact(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of the base model and of the adapters that are trained, a seed after the other."""
    names = [f"{arm}_s{seed}" for seed in SEEDS for arm in EXACT]
    adapters = [folder / name / "adapter" for name in names]
    return [{"name": "base"}] + [
        {"name": path.parent.name, "adapter": str(path)}
        for path in adapters
        if (path / "adapter_model.safetensors").exists()
    ]


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"wrote {path} ({len(lines)} runs)")


def write_grids(stage: str, folder: Path, speed: pd.DataFrame) -> None:
    """Write the grids of a stage to ``folder/grids``; the runs of earlier stages are in ``folder``."""
    grids = folder / "grids"
    if stage == "exact":
        write(grids / "exact.jsonl", exact(folder / "qwen"))
        return
    for model in STEPS:
        steps = equal_time_steps(model, speed)
        if stage == "tune":
            write(grids / f"tune_{model}.jsonl", tuning(model, steps))
            continue
        if not (folder / f"tune_{model}").is_dir():
            print(f"left out {model}: no rates in {folder / f'tune_{model}'}")
            continue
        rates = chosen_rates(folder / f"tune_{model}")
        print(model, rates)
        lines = runs(model, PRIMARY, SEEDS, steps, rates)
        if model == "qwen":
            lines += runs(model, SECONDARY, SEEDS[:3], steps, rates)
            write(grids / "breaks.jsonl", breaks(rates))
        write(grids / f"{model}.jsonl", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "main", "exact"))
    parser.add_argument("folder", type=Path, help="of the runs; grids are written to its folder grids")
    parser.add_argument("--speed", type=Path, default=HERE / "speed.csv", help="table of step times")
    args = parser.parse_args()
    write_grids(args.stage, args.folder, pd.read_csv(args.speed))


if __name__ == "__main__":
    main()
