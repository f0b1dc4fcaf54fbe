"""Write the grids of the studies of novelty gate, edits and token gates on a pretrained model: every arm's settings.

    python configs/studies/grids.py novelty tune runs/novelty          # runs/novelty/tune.jsonl
    python configs/studies/grids.py novelty main runs/novelty          # main.jsonl, at the rates and times of tune/
    python configs/studies/grids.py edits adapters runs/edits          # adapters.jsonl
    python configs/studies/grids.py edits main runs/edits              # early.jsonl and over.jsonl
    python configs/studies/grids.py token_gates tune runs/token_gates  # as for the novelty gate

The contrasts, and the commands that run the grids, are in the YAML file of each study.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sparselora.compare.tuned_rates import tuned_rates
from sparselora.errors import InputError

Settings = dict[str, Any]

STEPS = 468
"""Steps of a whole pass over GSM8K in batches of 16, and over 234 batches of originals with as many near-duplicates."""
BURN_IN, RATE = 0.1, 0.3
UPDATES = round(BURN_IN * STEPS) + round(RATE * (STEPS - round(BURN_IN * STEPS)))
"""Updates that a gate makes of them: burn-in, and its rate of the rest."""
TUNING_SEED, SEEDS = 100, range(8)
RATES = (3e-4, 9e-4, 2.7e-3)


@dataclass(frozen=True)
class GatedStudy:
    """Arms of a study, which of them are tuned, and what the others take.

    Attributes:
        arms: settings beyond those of base.yaml, by arm.
        like: the tuned arm whose learning rate an arm takes, by arm; a tuned one takes its own.
        timed: arm → (arm whose wall clock it gets, tuned arm that it is otherwise).
    """

    arms: Mapping[str, Settings]
    like: Mapping[str, str]
    timed: Mapping[str, tuple[str, str]]

    @property
    def tuned(self) -> list[str]:
        return sorted(set(self.like.values()))


def gate(policy: str) -> Settings:
    settings = {"policy": policy, "target_accept_rate": RATE, "burn_in": BURN_IN, "novelty_ema_rate": 0.05, "k": 32}
    return {f"novelty.{name}": value for name, value in (settings | {"reorth_every": 4}).items()}


def rank(r: int) -> Settings:
    return {"lora_r": r, "lora_alpha": 2 * r}


def token_gate(policy: str, basis: str = "channels") -> Settings:
    settings = {"policy": policy, "basis": basis, "budget": 0.25, "warmup_ratio": 0.33}
    return {f"token_gate.{name}": value for name, value in settings.items()}


STUDIES = {
    "novelty": GatedStudy(
        {
            "ungated": {},
            "ungated_updates": {"max_steps": UPDATES},
            "ungated_time": {},
            "dedupe": {"dedupe": 0.8, "shuffle_batches": False},  # whole rows go, and so no batch stays
            **{policy: gate(policy) for policy in ("random", "novelty", "loss_floor", "oracle")},
        },
        {
            "ungated": "ungated",
            "dedupe": "ungated",
            "ungated_updates": "ungated_updates",
            "ungated_time": "ungated_updates",
            "random": "random",
            "novelty": "random",
            "loss_floor": "random",
            "oracle": "random",
        },
        {"ungated_time": ("random", "ungated")},
    ),
    "token_gates": GatedStudy(
        {
            "r16": rank(16),
            "r4": rank(4),
            "r1": rank(1),
            "r16_time": rank(16),
            "energy": token_gate("energy"),
            "routed": {"token_gate.policy": "routed", "token_gate.budget": 0.25},
            "static": token_gate("static"),
            "random": token_gate("random"),
            "energy_singular": token_gate("energy", "singular"),
        },
        {
            "r16": "r16",
            "r4": "r4",
            "r1": "r1",
            "r16_time": "r16",
            "energy": "energy",
            "routed": "routed",
            "static": "energy",
            "random": "energy",
            "energy_singular": "energy",
        },
        {"r16_time": ("energy", "r16")},
    ),
}

EDITS: list[Settings] = [
    {"mode": "abs_select"},
    {"mode": "gd", "eta": 0.02, "sgd": True, "oracle": True},
    {"mode": "gd", "eta": 0.2},
    {"mode": "fisher"},
    {"mode": "damp_intruders", "sup_factor": 0.0, "general_dataset": "docstrings"},
]
CALIBRATION = (32, 512)
ADAPTERS: dict[str, Settings] = {"early": {"epochs": 0.33}, "over": {"epochs": 5}}
ADAPTER_SEEDS = range(5)


# --- lines --------------------------------------------------------------------------------------------------------


def tuning_lines(study: GatedStudy) -> list[Settings]:
    """Return a line per tuned arm and learning rate, on one seed that no other run has."""
    return [
        {"name": f"{arm}_lr{rate:g}", "seed": TUNING_SEED, "lr": rate, **study.arms[arm]}
        for arm in study.tuned
        for rate in RATES
    ]


def main_lines(study: GatedStudy, tuned: Path) -> list[Settings]:
    """Return a line per arm and seed, with the learning rates and steps that the runs in ``tuned`` give."""
    rates = tuned_rates(tuned, study.tuned)
    lines = []
    for arm, settings in study.arms.items():
        values = {"lr": rates[study.like[arm]], **settings}
        if arm in study.timed:
            values["max_steps"] = equal_time_steps(tuned, *study.timed[arm], rates)
        lines += [{"name": f"{arm}_s{seed}", "seed": seed, **values} for seed in SEEDS]
    return lines


def equal_time_steps(tuned: Path, clock: str, arm: str, rates: Mapping[str, float]) -> int:
    """Return how many steps of ``arm`` last as long as the run of ``clock``, rounded up."""
    seconds = {name: step_seconds(tuned / f"{name}_lr{rates[name]:g}") for name in (clock, arm)}
    return math.ceil(seconds[clock].sum() / seconds[arm].mean())


def step_seconds(run: Path) -> pd.Series:
    """Return the seconds of every step of a run but its first three, which prepare."""
    return pd.read_csv(run / "metrics.csv")["step_ms"].iloc[3:] / 1000


def adapter_lines() -> list[Settings]:
    return [
        {"name": f"{group}_s{seed}", "seed": seed, **settings}
        for group, settings in ADAPTERS.items()
        for seed in ADAPTER_SEEDS
    ]


def edit_lines(group: str, adapters: Path) -> list[Settings]:
    """Return a line per adapter of a group, edit and number of calibration rows."""
    return [
        {"adapter": (adapters / f"{group}_s{seed}" / "adapter").as_posix(), "seed": seed, "calib_samples": rows, **edit}
        for seed in ADAPTER_SEEDS
        for edit in EDITS
        for rows in CALIBRATION
    ]


def grids(study: str, phase: str, runs: Path) -> dict[str, list[Settings]]:
    """Return the lines of a phase by the name of their file.

    Raises:
        InputError: a phase that the study does not have; runs of the phase before it are missing.
    """
    if study == "edits":
        if phase == "adapters":
            return {"adapters": adapter_lines()}
        if phase == "main":
            return {group: edit_lines(group, runs / "adapters") for group in ADAPTERS}
    elif phase == "tune":
        return {"tune": tuning_lines(STUDIES[study])}
    elif phase == "main":
        return {"main": main_lines(STUDIES[study], runs / "tune")}
    raise InputError(f"study {study} has no phase {phase}; the first is {'adapters' if study == 'edits' else 'tune'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=(*STUDIES, "edits"))
    parser.add_argument("phase", choices=("tune", "adapters", "main"))
    parser.add_argument("runs", type=Path, help="folder of the study's runs")
    args = parser.parse_args(arguments)
    try:
        files = grids(args.study, args.phase, args.runs)
    except InputError as error:
        parser.error(str(error))
    args.runs.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        path = args.runs / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"{len(lines)} lines: {path}")


if __name__ == "__main__":
    main()
