"""Per-token gates of a decoder against their controls at the same budget, paired by seed.

    python results/token_gate/decoder_table.py runs/gate_mawps --out_dir results/token_gate/mawps

Reads summary.csv of the runs that decoder.sh makes, and writes runs.csv (a row a run) and paired.csv. Differences are
of the final evaluation loss in nats a label, below 0 where the first is better, with a paired t interval over seeds;
``static_loss`` is that of the gated model's best fixed subset of channels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from sparselora.stats import compare_paired

PAIRS = (
    ("static", "none"), ("random", "static"), ("energy", "none"), ("energy", "static"), ("energy", "random"),
    ("learned", "none"), ("learned", "static"), ("learned", "energy"),
)  # fmt: skip


def read(folder: Path) -> pd.DataFrame:
    tables = [pd.read_csv(path) for path in sorted(folder.glob("*/summary.csv"))]
    return pd.concat(tables, ignore_index=True).set_index(["gate_policy", "gate_budget", "seed"]).sort_index()


def losses(runs: pd.DataFrame, policy: str, budget: float, column: str = "eval_loss") -> pd.Series:
    """By seed; a run without gates has no budget."""
    found = runs.xs(policy, level="gate_policy").reset_index("gate_budget")
    return found.loc[found["gate_budget"].isna() | (found["gate_budget"] == budget), column]


def difference(name: str, budget: float, a: pd.Series, b: pd.Series) -> dict[str, object]:
    seeds = a.index.intersection(b.index)
    found = compare_paired(a[seeds].to_numpy(), b[seeds].to_numpy())
    return {
        "budget": budget, "difference": name, "n_seeds": found.n, "mean": found.mean_difference,
        "ci_low": found.ci_low, "ci_high": found.ci_high, "t_p": found.t_p, "dz": found.cohens_dz,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--out_dir", type=Path, required=True, help="folder of the tables")
    args = parser.parse_args()
    runs, rows = read(args.runs), []
    for budget in np.unique(runs.index.get_level_values("gate_budget").dropna()):
        rows += [difference(f"{a} − {b}", budget, losses(runs, a, budget), losses(runs, b, budget)) for a, b in PAIRS]
        for policy in ("energy", "learned"):
            fixed = losses(runs, policy, budget, "static_loss")
            rows.append(difference(f"{policy}'s fixed subset − static", budget, fixed, losses(runs, "static", budget)))
    table = pd.DataFrame(rows).round(4)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    runs.dropna(axis=1, how="all").reset_index().to_csv(args.out_dir / "runs.csv", index=False)
    table.to_csv(args.out_dir / "paired.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
