"""Folders of searches that were made up: pilots of known quality, with noise between seeds and between rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

DENSE_STEP_S, FULL_STEPS = 0.5, 2048
RUNGS = (64, 128, 256)
"""Steps of the pilots of each rung."""
LESS_DATA = {"data_75": 0.75, "half_data": 0.5}
_BASE = {"sparsity.mode": "dense"}


def dense_loss(steps: float) -> float:
    """Return the loss that dense training of so many steps has, without noise: falling and convex in log steps."""
    return 0.5 + 0.3 * (steps / 64) ** -0.4


@dataclass(frozen=True)
class Arm:
    """A planted candidate.

    Attributes:
        ratio: of its step time to dense's.
        effect: added to the loss that dense has for the same steps; ``None``: exactly that of dense for the same time.
        settings: changed settings.
        setup_s: seconds before the first step.
        rungs: at which it has pilots.
        seeds: of its pilots at the last of all rungs; the rungs before have the first of them.
    """

    ratio: float
    effect: float | None = 0.0
    settings: Mapping[str, Any] = field(default_factory=lambda: {"sparsity.context_backward": "none"})
    control: bool = False
    setup_s: float = 0.0
    rungs: Sequence[int] = (0, 1, 2)
    reason: str = ""


def write_search(
    folder: Path, arms: Mapping[str, Arm], *, seeds: int = 1, run_noise: float = 0.003, row_noise: float = 0.1,
    rows: int = 200, draw: int = 0, rungs: Sequence[int] = (0, 1, 2), seed_noise: float = 0.01,
) -> None:  # fmt: skip
    """Write a search of ``arms``, dense and dense on less data.

    Args:
        seeds: of the last rung.
        run_noise: spread of a run's mean loss, drawn anew for each run.
        row_noise: spread of a row's loss within a run, drawn anew for each run.
        rungs: that have run.
        seed_noise: spread of what all runs of one seed share.
    """
    rng = np.random.default_rng(draw)
    folder.mkdir(parents=True, exist_ok=True)
    fixed = {"dense": Arm(1.0, settings={}, control=True)}
    fixed |= {name: Arm(1.0, settings={"epochs": share}, control=True) for name, share in LESS_DATA.items()}
    every = fixed | dict(arms)
    difficulty = rng.lognormal(0, 0.4, rows)
    labels = rng.integers(5, 60, rows)
    luck = seed_noise * rng.normal(size=seeds)
    pilots, tables = [], []
    for rung in rungs:
        for name, arm in every.items():
            if rung not in arm.rungs:
                continue
            for seed in range(seeds if rung == RUNGS.index(RUNGS[-1]) else 1):
                steps = round(RUNGS[rung] * LESS_DATA.get(name, 1.0))
                loss = dense_loss(steps * arm.ratio) if arm.effect is None else dense_loss(steps) + arm.effect
                loss += luck[seed] + run_noise * rng.normal()
                noise = row_noise * rng.normal(size=rows)
                # The mean over labels is the run's loss; a row that is difficult is so in every run.
                per_label = loss * difficulty / np.average(difficulty, weights=labels)
                per_label += noise - np.average(noise, weights=labels)
                pilots.append({
                    "candidate": name, "seed": seed, "rung": rung, "steps": steps, "rows_seen": 16 * steps,
                    "train_seconds": steps * DENSE_STEP_S * arm.ratio * 1.02,
                    "loss": loss, "loss_base": 1.3, "finished": "2026-01-01T00:00:00+00:00",
                })  # fmt: skip
                tables.append(pd.DataFrame({
                    "candidate": name, "rung": rung, "seed": seed, "row": range(rows), "loss": per_label * labels,
                    "labels": labels,
                }))  # fmt: skip
    pd.DataFrame([
        {"candidate": name, "settings": json.dumps(_BASE | dict(arm.settings)), "lr": 2e-4, "control": arm.control,
         "stage": max((rung for rung in rungs if rung in arm.rungs), default=""), "reason": arm.reason}
        for name, arm in every.items()
    ]).to_csv(folder / "candidates.csv", index=False)  # fmt: skip
    pd.DataFrame([
        {"candidate": name, "seconds_per_step": DENSE_STEP_S * arm.ratio, "q25": 0.98 * DENSE_STEP_S * arm.ratio,
         "q75": 1.03 * DENSE_STEP_S * arm.ratio, "tokens_per_s": 1000 / arm.ratio, "peak_gb": 2.5,
         "setup_seconds": arm.setup_s}
        for name, arm in every.items() if arm.rungs
    ]).to_csv(folder / "times.csv", index=False)  # fmt: skip
    (folder / "plan.json").write_text(json.dumps({"plan": {"full_steps": FULL_STEPS}}))
    pd.DataFrame(pilots).to_csv(folder / "pilots.csv", index=False)
    pd.concat(tables).to_csv(folder / "pilots_rows.csv.gz", index=False)
