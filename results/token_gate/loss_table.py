r"""Held-out losses of a Phase C sweep, which are finer than its accuracies: means, and differences paired by seed.

    python results/token_gate/loss_table.py results/token_gate/singular/results.csv \
        --csv results/token_gate/singular/losses.csv

Nats, with a paired t interval over seeds; a row a moment and pair of methods at one keep ratio, or a method alone.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pandas as pd

from sparselora.stats import compare_paired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.csv of the sweep")
    parser.add_argument("--csv", type=Path, required=True, help="file for the table")
    args = parser.parse_args()
    cells = pd.read_csv(args.results, keep_default_na=False)
    cells["label"] = cells["method"] + cells["gate"].map(lambda gate: f" ({gate})" if gate else "")
    rows = []
    for moment in ("before", "right_after", "after"):
        for keep, part in cells.groupby("keep_ratio"):
            losses = part.pivot(index="seed", columns="label", values=f"loss_{moment}").dropna()
            row = {"moment": moment, "keep_ratio": keep, "n_seeds": len(losses)}
            rows += [{**row, "what": label, "mean": losses[label].mean()} for label in losses]
            for a, b in itertools.permutations(losses, 2):
                found = compare_paired(losses[a].to_numpy(), losses[b].to_numpy())
                mean, low, high = found.mean_difference, found.ci_low, found.ci_high
                rows.append({**row, "what": f"{a} − {b}", "mean": mean, "ci_low": low, "ci_high": high})
    table = pd.DataFrame(rows).round(4)
    table.to_csv(args.csv, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
