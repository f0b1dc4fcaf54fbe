"""The study of cheaper steps: its grids, with every arm's settings, learning rate and steps.

    python configs/studies/frontier.py tune runs/search runs/d    # runs/d/tune.jsonl: learning rates
    python configs/studies/frontier.py main runs/search runs/d    # runs/d/main.jsonl, at the rates of runs/d/tune
    python configs/studies/frontier.py exact runs/search runs/d   # runs/d/exact.jsonl: answers of the adapters
    python configs/studies/frontier.py pool FOLDER pooled.jsonl   # GSM8K's test rows and five sister sets, in one file

runs/search is the folder of a finished `sparselora frontier` with the study's model and data. Each grid is run by
`sparselora grid runs/d/STAGE.jsonl --run_root runs/d/STAGE --defaults configs/studies/frontier.yaml --model MODEL ...`,
and `sparselora compare runs/d/main --study configs/studies/frontier_contrasts.yaml` judges, with `--forecast
runs/search/frontier.csv` the search as well.

Arms have the settings of the search's candidates, under their names, and some more that differ from these in the choice
of channels alone. Dense training for the time of an arm takes as many dense steps as fit into it, set-up included, by
the step times of the search: this model's own, on these rows. The grids go seed by seed, primary arms first, so that
what is cut off leaves whole pairs.

By a step of 40 ms on a full card and 2.5 s of evaluation, a run takes 10 s of an H200 with the 0.5B model: 5 min for
the learning rates, 16 min for 95 runs, 25 min for the answers of 56 adapters to 4,060 questions. SmolLM2 takes about
half.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sparselora.compare.tuned_rates import tuned_rates
from sparselora.config.yaml_text import read_yaml
from sparselora.errors import InputError

SETTINGS = Path(__file__).with_name("frontier.yaml")
TIME = "dense_time_"
"""Beginning of the names of dense training for the time of an arm."""

CHANNELS = {"svd": "svd", "random_fixed": "random_fixed", "random": "random", "oracle": "oracle"}
"""Mode by the beginning of an arm's name: static at 50 and 90 % with other choices of channels."""
PRIMARY = ("dense", "fp8_none", "static_50", "svd_50", "random_fixed_50", "dense_time_static_50", "dense_time_fp8_none")
"""The arms of the primary contrasts, with `SEEDS`, and dense for the time of the second of them."""
SECONDARY = (
    "fp8", "none", "upper", "sampled_half", "skip", "map", "random_50", "oracle_50", "fp8_none_static_50", "static_90",
    "svd_90", "random_fixed_90", "static_layers",
)  # fmt: skip
"""Arms for description, with the first three seeds."""
SEEDS = range(10, 18)
TUNING_SEED = 100
FACTORS = (1 / 3, 1.0, 3.0)
TUNED = (
    "dense", "fp8_none", "static_50", "svd_50", "random_fixed_50", "skip", "map", "static_90", "dense_time_static_50",
)  # fmt: skip
LIKE = {
    "fp8": "dense", "none": "fp8_none", "upper": "fp8_none", "sampled_half": "fp8_none", "random_50": "random_fixed_50",
    "oracle_50": "static_50", "fp8_none_static_50": "static_50", "svd_90": "svd_50",
    "random_fixed_90": "random_fixed_50", "static_layers": "static_90", "dense_time_fp8_none": "dense_time_static_50",
}  # fmt: skip
"""Arm that was not tuned → the tuned one whose learning rate it takes; dense's, where the search lacks that one."""

POOLED = ("gsm8k", "svamp", "multiarith", "singleeq", "addsub", "mawps")
"""Sets of word problems whose answers are one number: 4,060 questions in all."""


class Arms:
    """Settings of the arms that a search leaves possible, and the steps of dense training for their time.

    Args:
        search: folder of a finished `frontier`.
    Raises:
        InputError: no such folder.
    """

    def __init__(self, search: Path) -> None:
        if not (search / "frontier.csv").is_file():
            raise InputError(f"{search} is not the folder of a finished search; run sparselora frontier first")
        candidates = pd.read_csv(search / "candidates.csv", keep_default_na=False)
        times = pd.read_csv(search / "times.csv").set_index("candidate")
        self.times: dict[str, tuple[float, float]] = {
            str(name): (row["seconds_per_step"], row["setup_seconds"]) for name, row in times.iterrows()
        }
        self.settings: dict[str, dict[str, Any]] = {
            row["candidate"]: json.loads(row["settings"]) for row in candidates.to_dict("records")
            if row["candidate"] in self.times
        }  # fmt: skip
        for level in ("50", "90"):
            static = self.settings.get(f"static_{level}", {})
            others = {f"{name}_{level}": static | {"sparsity.mode": mode} for name, mode in CHANNELS.items()}
            self.settings |= others if static else {}

    @property
    def steps(self) -> int:
        """Steps of a whole run."""
        settings = read_yaml(SETTINGS)
        return math.ceil(settings["epochs"] * settings["train_samples"] / settings["train_bsz"])

    def possible(self, arms: Sequence[str]) -> list[str]:
        """Return those of ``arms`` that this search had, or that differ from what it had in the choice of channels."""
        return [arm for arm in arms if arm.removeprefix(TIME) in self.settings]

    def flags(self, arm: str) -> dict[str, Any]:
        """Return the flags of an arm beyond its seed and its learning rate."""
        if arm.startswith(TIME):
            return {**self.settings["dense"], "max_steps": self.equal_steps()[arm]}
        flags = dict(self.settings[arm])
        if layers := flags.get("sparsity.layer_sparsity"):
            flags["sparsity.layer_sparsity"] = [f"{key}={value}" for key, value in layers.items()]
        return flags

    def equal_steps(self) -> dict[str, int]:
        """Return the steps of dense training for the time of each such arm, rounded up: dense has no less time.

        No two have the same number, nor that of a whole run, which would be one run under two names.
        """
        steps: dict[str, int] = {}
        dense_s, dense_setup_s = self.times["dense"]
        for arm in self.possible([arm for arm in PRIMARY if arm.startswith(TIME)]):
            step_s, setup_s = self.times[arm.removeprefix(TIME)]
            count = math.ceil((self.steps * step_s + setup_s - dense_setup_s) / dense_s)
            while count in (self.steps, *steps.values()):
                count += 1
            steps[arm] = count
        return steps


def tuning(arms: Arms) -> list[dict[str, Any]]:
    """Return the runs that choose learning rates."""
    rates = [float(f"{read_yaml(SETTINGS)['lr'] * factor:.4g}") for factor in FACTORS]
    return [
        {"name": f"{arm}_lr{rate}", "seed": TUNING_SEED, "lr": rate, **arms.flags(arm)}
        for rate in rates
        for arm in arms.possible(TUNED)
    ]


def runs(arms: Arms, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a run for each arm and seed, the primary arms of all seeds first."""
    grid = [(arm, seed) for seed in SEEDS for arm in arms.possible(PRIMARY)]
    grid += [(arm, seed) for seed in SEEDS[:3] for arm in arms.possible(SECONDARY)]
    return [
        {"name": f"{arm}_s{seed}", "seed": seed, "lr": rates.get(LIKE.get(arm, arm), rates["dense"]), **arms.flags(arm)}
        for arm, seed in grid
    ]


def exact(folder: Path, arms: Arms) -> list[dict[str, Any]]:
    """Return the evaluations of the base model and of the primary arms' adapters in ``folder``, seed by seed."""
    names = [f"{arm}_s{seed}" for seed in SEEDS for arm in arms.possible(PRIMARY)]
    adapters = [folder / name / "adapter" for name in names]
    return [{"name": "base"}] + [
        {"name": path.parent.name, "adapter": str(path)}
        for path in adapters
        if (path / "adapter_model.safetensors").is_file()
    ]


def pooled(folder: Path) -> list[dict[str, Any]]:
    """Return the questions of the `POOLED` sets in the form of GSM8K; a solution ends with ``####`` and its number."""
    rows = []
    for name in POOLED:
        for line in (folder / f"{name}_test.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            answer = str(row["answer"])
            rows.append({
                "set": name, "question": row.get("question") or row["instruction"],
                "answer": answer if "####" in answer else f"#### {answer}",
            })  # fmt: skip
    return rows


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"wrote {path} ({len(lines)} lines)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the grids of the study of cheaper steps.")
    parser.add_argument("stage", choices=("tune", "main", "exact", "pool"))
    parser.add_argument("source", type=Path, help="folder of the search; of the test sets for pool")
    parser.add_argument("target", type=Path, help="folder of the study; the file for pool")
    args = parser.parse_args()
    if args.stage == "pool":
        write(args.target, pooled(args.source))
        return
    arms, target = Arms(args.source), args.target
    if args.stage == "tune":
        write(target / "tune.jsonl", tuning(arms))
    elif args.stage == "main":
        write(target / "main.jsonl", runs(arms, tuned_rates(target / "tune", arms.possible(TUNED))))
    else:
        write(target / "exact.jsonl", exact(target / "main", arms))


if __name__ == "__main__":
    main()
