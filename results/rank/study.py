"""The grids of the study of ranks: learning rates first, then every arm at its own, then Phase C.

    python results/rank/study.py tune smollm2 tune.jsonl
    python results/rank/study.py main smollm2 runs/tune_smollm2 main.jsonl
    python results/rank/study.py pruning runs/tune_smollm2 pruning.jsonl

README.md has the commands that run them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparselora.runs.files import read_table, write_text

ARMS: Mapping[str, Mapping[str, Any]] = {
    "r64": {"lora_r": 64, "lora_alpha": 128},
    "r16": {"lora_r": 16, "lora_alpha": 32},
    "r4": {"lora_r": 4, "lora_alpha": 8},
    "squeeze_64_16": {"lora_r": 64, "lora_alpha": 128, "squeeze": "64:16"},
    "squeeze_64_4": {"lora_r": 64, "lora_alpha": 128, "squeeze": "64:4"},
    "r1": {"lora_r": 1, "lora_alpha": 2},
    "squeeze_16_4": {"lora_r": 16, "lora_alpha": 32, "squeeze": "16:4"},
    "squeeze_64_16_budget": {"lora_r": 64, "lora_alpha": 128, "squeeze": "64:16", "squeeze_budget": "global"},
}
"""Name of an arm → what it sets."""
PRIMARY = ("r64", "r16", "r4", "squeeze_64_4", "squeeze_64_16")
"""The arms of the contrasts of study.yaml."""
SECONDARY = ("r1", "squeeze_16_4", "squeeze_64_16_budget")
LEAST_RATE = {
    "r64": 2e-4, "r16": 4e-4, "r4": 8e-4, "r1": 1.6e-3, "squeeze_64_16": 2e-4, "squeeze_64_4": 2e-4,
}  # fmt: skip
"""The least of an arm's three learning rates, each three times the one before: as the scaling is the same at all ranks,
an update grows with the rank."""
RATE_OF = {"squeeze_64_16_budget": "squeeze_64_16", "squeeze_64_16": "squeeze_64_4", "squeeze_16_4": "r16", "r1": "r4"}
"""An arm that was not tuned → the one whose rate it has."""
TUNED = {"smollm2": tuple(LEAST_RATE), "qwen": ("r64", "r16", "r4", "squeeze_64_4")}
"""Model → the arms that are tuned with it."""
TUNING_SEED = 100
PLAN = {
    "smollm2": [
        *((arm, seed) for seed in range(5) for arm in PRIMARY),
        *((arm, seed) for seed in range(3) for arm in SECONDARY),
        *((arm, seed) for seed in range(5, 8) for arm in PRIMARY),
    ],
    "qwen": [(arm, seed) for seed in range(4) for arm in PRIMARY],
}
"""Model → its runs, those that matter most first, for the time on a card may end."""
METHODS = ("no_prune", "svd", "random", "channel_energy")
PRUNING_SEEDS = range(4)


def tuning_lines(model: str) -> list[dict[str, Any]]:
    """Return three runs of each arm, the middle rates first."""
    rates = [(arm, f"{LEAST_RATE[arm] * factor:.4g}") for factor in (3, 9, 1) for arm in TUNED[model]]
    return [
        {"name": f"{arm}_lr{rate}", "seed": TUNING_SEED, "lr": float(rate)} | dict(ARMS[arm]) for arm, rate in rates
    ]


def tuned_losses(root: Path) -> dict[str, dict[float, float]]:
    """Return arm → learning rate → held-out loss of the finished runs of a tuning."""
    losses: dict[str, dict[float, float]] = {}
    for path in sorted(root.glob("*/summary.csv")):
        arm, rate = path.parent.name.rsplit("_lr", 1)
        losses.setdefault(arm, {})[float(rate)] = float(read_table(path, numbers=("eval_loss",))["eval_loss"].iloc[0])
    return losses


def best_rate(arm: str, losses: Mapping[str, Mapping[float, float]]) -> float:
    """Return the learning rate of the least loss, of an arm that was not tuned that of the arm it follows.

    Raises:
        SystemExit: neither was tuned.
    """
    if arm in losses:
        return min(losses[arm], key=lambda rate: losses[arm][rate])
    if arm not in RATE_OF:
        raise SystemExit(f"no finished run of the tuning of {arm}")
    return best_rate(RATE_OF[arm], losses)


def main_lines(model: str, losses: Mapping[str, Mapping[float, float]]) -> list[dict[str, Any]]:
    """Return every run of ``model``, each arm at its own learning rate."""
    return [
        {"name": f"{arm}_s{seed}", "seed": seed, "lr": best_rate(arm, losses)} | dict(ARMS[arm])
        for arm, seed in PLAN[model]
    ]


def pruning_lines(losses: Mapping[str, Mapping[float, float]]) -> list[dict[str, Any]]:
    """Return the cells of Phase C: 4 of 16 channels by each method, with the learning rate of r16."""
    rate = best_rate("r16", losses)
    return [
        {"method": method, "keep_ratio": 1.0 if method == "no_prune" else 0.25, "seed": seed, "lr": rate}
        for seed in PRUNING_SEEDS
        for method in METHODS
    ]


def write_grid(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object a line."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("tune", "main", "pruning"):
        grid = actions.add_parser(action)
        if action != "pruning":
            grid.add_argument("model", choices=tuple(PLAN))
        if action != "tune":
            grid.add_argument("tuning", type=Path, help="folder of the runs of the tuning")
        grid.add_argument("grid", type=Path, help="file to write")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    losses = {} if args.action == "tune" else tuned_losses(args.tuning)
    for arm, by_rate in losses.items():
        print(f"{arm}: " + ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in sorted(by_rate.items())))
    if args.action == "tune":
        lines = tuning_lines(args.model)
    elif args.action == "main":
        lines = main_lines(args.model, losses)
    else:
        lines = pruning_lines(losses)
    write_grid(args.grid, lines)
    print(f"{args.grid}: {len(lines)} runs")


if __name__ == "__main__":
    main()
