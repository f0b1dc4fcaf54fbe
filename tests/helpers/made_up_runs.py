"""Folders of runs that were made up: what `train` leaves, and runs whose steps were gated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

COSTS = {"step_ms": 10.5, "tokens_per_s": 100.0, "peak_mb": 5.0, "active_flops_per_token": 1e6, "sparse_steps": 0}
STEPS, ROWS = 8, 40


def write_run(folder: Path, seed: int, arguments: dict[str, Any], **tables: str) -> None:
    folder.mkdir(parents=True)
    record = {"command": "train", "arguments": arguments, "seed": seed, "device": "cpu", "commit": None}
    record |= {"status": "success", "outputs": []}
    (folder / "run.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, text in tables.items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")


def write_gated_runs(folder: Path, arms: Mapping[str, tuple[str, float]]) -> None:
    """Write two seeds of each arm, named ARM_sSEED.

    Args:
        arms: name → policy of the gate (``none``: no gate) and what the arm adds to the loss of each row.
    """
    rng = np.random.default_rng(0)
    steps = np.arange(1, STEPS + 1)
    for arm, (policy, effect) in arms.items():
        for seed in range(2):
            loss = 2 + effect + rng.normal(0, 0.001, ROWS)
            arguments = {"model": "tiny", "dataset": "d.jsonl", "task": "causal_lm", "seed": seed, "lora_r": 8}
            summary = {"model": "tiny", "dataset": "d", "task": "causal_lm", "seed": seed, "steps": STEPS}
            summary |= {"eval_loss": loss.mean(), "eval_accuracy": 0.0, **COSTS}
            tables = {"predictions": pd.DataFrame({"row": range(ROWS), "tokens": 1, "loss": loss, "correct": 0})}
            tables["eval"] = pd.DataFrame({"step": [4, 8], "loss": [3.0, loss.mean()], "accuracy": 0.0, "n": ROWS})
            tables["metrics"] = pd.DataFrame({"step": steps, "tokens": 50, "step_ms": 10.25})
            if policy != "none":
                arguments["novelty"] = {"policy": policy, "target_accept_rate": 0.5}
                accept = np.ones(STEPS, int) if policy == "accept_all" else steps % 2
                summary |= {"policy": policy, "gated_decisions": 6, "target_rate": 0.5}
                summary |= {"acceptance_rate": accept.mean(), "accepted_steps": accept.sum()}
                tables["gate"] = pd.DataFrame({
                    "step": steps, "accept": accept, "acceptance_rate": 0.5, "novelty": rng.uniform(size=STEPS),
                    "threshold": 0.5, "loss": 2.0, "accepted_steps": accept.cumsum(), "tokens_seen": 50 * steps,
                    "tokens_trained": 50 * accept.cumsum(), "wall_s": 0.01 * steps,
                })  # fmt: skip
            tables["summary"] = pd.DataFrame([summary])
            texts = {name: table.to_csv(index=False) for name, table in tables.items()}
            write_run(folder / f"{arm}_s{seed}", seed, arguments, **texts)
