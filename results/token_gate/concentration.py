"""Agreement between the choices of tokens: the share of them that uses the channels or directions most of them use.

    python results/token_gate/concentration.py runs/gate_mnli runs/gate_mawps --out_dir results/token_gate

Reads token_gate.csv of every gated run in the folders, of encoder_main.jsonl and decoder.jsonl, and writes
concentration.csv: of each data set, policy, basis and budget the share of its k choices that a token has among the k
most used of a module, mean over modules and seeds. It is 1 where one fixed subset serves all tokens, and about the
budget where they choose at random. The figure has the use of each direction at a quarter of them, energy gate, most
used first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from sparselora.numerics.channels import keep_count

POLICIES = {"token_gate": "learned", "energy_gate": "energy", "random_gate": "random"}
ARM = ["dataset", "r", "budget", "basis", "policy"]


def arm(result: dict[str, object]) -> dict[str, object] | None:
    """Return what a run's gates were; None for a variant that is neither plain nor in the singular basis."""
    if "gate_policy" in result:  # of `train`
        return {"budget": result["gate_budget"], "basis": result["gate_basis"], "policy": result["gate_policy"]}
    basis = result["gate"] or "channels"
    if basis not in ("channels", "singular"):
        return None
    return {"budget": result["keep_ratio"], "basis": basis, "policy": POLICIES[str(result["method"])]}


def read(folders: list[Path]) -> pd.DataFrame:
    """Return a row for each module and run: its arm, and ``use``, the shares of tokens by channel, largest first."""
    rows = []
    for path in sorted(path for folder in folders for path in folder.glob("*/token_gate.csv")):
        record = json.loads((path.parent / "run.json").read_text())
        settings = arm(record["result"])
        if settings is None:
            continue
        settings["warmup"] = record["arguments"].get("warmup_epochs", 0)
        for _, use in pd.read_csv(path).groupby("module")["frequency"]:
            ordered = use.sort_values(ascending=False).to_numpy()
            rows.append({"dataset": record["result"]["dataset"], "r": len(use), **settings, "use": ordered})
    table = pd.DataFrame(rows)  # of several warm-ups the usual one
    return table[table["warmup"] == table.groupby("dataset")["warmup"].transform(lambda epochs: epochs.mode()[0])]


def draw(table: pd.DataFrame, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, constrained_layout=True)
    for axis, basis in zip(axes, ("channels", "singular"), strict=True):
        quarter = table[(table["basis"] == basis) & (table["policy"] == "energy") & (table["budget"] == 0.25)]
        for name, part in quarter.groupby("dataset"):
            for r, rows in part.groupby("r"):
                if r == part["r"].mode()[0]:
                    use = np.stack(rows["use"]).mean(axis=0)
                    axis.plot((np.arange(r) + 0.5) / r, use, marker="o", markersize=3, label=f"{name} (r {r})")
        axis.axhline(0.25, color="0.6", linestyle=":", label="equally often" if basis == "channels" else None)
        axis.set(xlabel="rank of use, as a share of r", title=f"basis: {basis}", xlim=(0, 1), ylim=(0, 1.02))
    axes[0].set_ylabel("share of tokens")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out_dir", type=Path, required=True, help="folder of the table and the figure")
    args = parser.parse_args()
    table = read(args.runs)
    count = [keep_count(r, budget) for r, budget in zip(table["r"], table["budget"], strict=True)]
    table["share"] = [use[:k].sum() / k for use, k in zip(table["use"], count, strict=True)]
    means = table.groupby(ARM)["share"].mean().round(3).reset_index()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    means.to_csv(args.out_dir / "concentration.csv", index=False)
    draw(table, args.out_dir / "concentration.png")
    print(means.to_string(index=False))


if __name__ == "__main__":
    main()
