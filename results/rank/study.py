"""The grids of the study of ranks, its table of truncated adapters and its figure.

    python results/rank/study.py tune smollm2 tune.jsonl                       # three learning rates an arm
    python results/rank/study.py main smollm2 runs/tune_smollm2 main.jsonl     # every arm at its own rate
    python results/rank/study.py pruning runs/tune_smollm2 pruning.jsonl       # Phase C at the rate of r16
    python results/rank/study.py curve runs/reduce results/rank/curve.csv      # runs of `reduce --eval`, one table
    python results/rank/study.py figure                                        # of the packed runs and curve.csv

README.md has the commands that run the grids.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sparselora.compare.tuned_rates import tuned_rates
from sparselora.numerics.stats import mean_interval
from sparselora.report.style import COLORS, legend_columns, new_figure, save_figure
from sparselora.runs.files import read_table, write_csv, write_text

HERE = Path(__file__).resolve().parent

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


def rate_of(arm: str, rates: Mapping[str, float]) -> float:
    """Return the tuned learning rate of an arm, of one that was not tuned that of the arm it follows.

    Raises:
        SystemExit: neither was tuned.
    """
    if arm in rates:
        return rates[arm]
    if arm not in RATE_OF:
        raise SystemExit(f"no finished run of the tuning of {arm}")
    return rate_of(RATE_OF[arm], rates)


def main_lines(model: str, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return every run of ``model``, each arm at its own learning rate."""
    return [
        {"name": f"{arm}_s{seed}", "seed": seed, "lr": rate_of(arm, rates)} | dict(ARMS[arm])
        for arm, seed in PLAN[model]
    ]


def pruning_lines(rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the cells of Phase C: 4 of 16 channels by each method, with the learning rate of r16."""
    rate = rate_of("r16", rates)
    return [
        {"method": method, "keep_ratio": 1.0 if method == "no_prune" else 0.25, "seed": seed, "lr": rate}
        for seed in PRUNING_SEEDS
        for method in METHODS
    ]


def write_grid(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object a line."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


# --- the tables and the figure ------------------------------------------------------------------------------------

NAMES = {"smollm2": "SmolLM2-135M-Instruct", "qwen": "Qwen2.5-Coder-0.5B-Instruct"}
LINES = {
    "from the start": (("r1", "r4", "r16", "r64"), "blue", "o"),
    "squeezed in training from 64": (("squeeze_64_4", "squeeze_64_16"), "green", "s"),
    "squeezed in training from 16": (("squeeze_16_4",), "orange", "D"),
    "squeezed from 64, global budget": (("squeeze_64_16_budget",), "purple", "P"),
}
"""Label in the figure → arms, colour and marker."""
TRUNCATED = {"svd": ("r64 truncated after training", "red", "^"),
             "activations": ("the same, weighted by inputs", "sky", "v")}  # fmt: skip
"""Method of `reduce --eval` → label, colour and marker."""


def last_rank(arm: str) -> int:
    """Return the rank with which an arm ends; of a global budget its mean."""
    ranks = [part for part in arm.replace("r", "").split("_") if part.isdigit()]
    return int(ranks[-1])


def arms(model: str) -> pd.DataFrame:
    """Return a row an arm of the packed runs: learning rate, last rank, seeds, mean loss with its 95 % interval."""
    runs = read_table(HERE / model / "runs.csv", numbers=("summary/eval_loss", "arguments.lr"))
    rows = []
    for arm, group in runs.groupby(runs["run"].str.rsplit("_s", n=1).str[0], sort=False):
        loss = mean_interval(group["summary/eval_loss"].tolist())
        accuracy = group["summary/eval_accuracy"].mean()
        rows.append({"model": model, "arm": arm, "rank": last_rank(str(arm)), "lr": group["arguments.lr"].iloc[0],
                     "seeds": loss.n, "loss": loss.mean, "std": loss.std, "ci_low": loss.low, "ci_high": loss.high,
                     "accuracy": accuracy})  # fmt: skip
    return pd.DataFrame(rows)


def curve(runs: Path) -> pd.DataFrame:
    """Return the tables of runs of `reduce --eval`, whose folders are called MODEL_sSEED, below one another."""
    tables = []
    for path in sorted(runs.glob("*/losses_by_rank.csv")):
        model, seed = path.parent.name.rsplit("_s", 1)
        table = read_table(path, numbers=("loss", "rank"))
        table.insert(0, "model", model)
        table.insert(1, "seed", int(seed))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def draw(path: Path) -> None:
    """Draw the loss against the rank that is served, a panel a model."""
    truncated = read_table(HERE / "curve.csv", numbers=("loss", "rank"))
    with new_figure(4.6) as figure:
        panels = figure.subplots(1, len(NAMES))
        for axes, (model, name) in zip(panels, NAMES.items()):
            table = arms(model).set_index("arm")
            for label, (names, color, marker) in LINES.items():
                part = table.loc[[arm for arm in names if arm in table.index]]
                if part.empty:
                    continue
                error = part["ci_high"] - part["loss"]
                axes.errorbar(part["rank"], part["loss"], yerr=error.fillna(0), color=COLORS[color], marker=marker,
                              capsize=3, label=label)  # fmt: skip
            part = truncated[(truncated["model"] == model) & (truncated["budget"] == "uniform")]
            for method, (label, color, marker) in TRUNCATED.items():
                means = part[part["method"] == method].groupby("rank")["loss"].mean()
                axes.plot(means.index, means, color=COLORS[color], marker=marker, linestyle="--", label=label)
            axes.set_xscale("log", base=2)
            axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
            axes.set_title(name)
            axes.set_xlabel("rank that is served")
        panels[0].set_ylabel("loss on held-out rows (nats a label)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns(labels, 3))
        save_figure(figure, path)


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
    table = actions.add_parser("curve")
    table.add_argument("runs", type=Path, help="folder of runs of reduce --eval, MODEL_sSEED")
    table.add_argument("table", type=Path, help="file to write")
    actions.add_parser("figure")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.action == "curve":
        write_csv(args.table, curve(args.runs))
        return
    if args.action == "figure":
        draw(HERE / "figure.png")
        print(pd.concat([arms(model) for model in NAMES]).to_string(index=False))
        return
    rates = {} if args.action == "tune" else tuned_rates(args.tuning)
    for arm, rate in rates.items():
        print(f"{arm}: learning rate {rate:g}")
    if args.action == "tune":
        lines = tuning_lines(args.model)
    elif args.action == "main":
        lines = main_lines(args.model, rates)
    else:
        lines = pruning_lines(rates)
    write_grid(args.grid, lines)
    print(f"{args.grid}: {len(lines)} runs")


if __name__ == "__main__":
    main()
