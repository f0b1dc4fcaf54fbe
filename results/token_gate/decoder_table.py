"""Per-token gates of a decoder against their controls at the same budget, paired by seed.

    python results/token_gate/decoder_table.py results/token_gate/decoder/runs.csv --out_dir results/token_gate/decoder

Reads runs of decoder.jsonl, or the runs.csv that it wrote of them, and writes runs.csv (a row a run), losses.csv (means
over seeds) and paired.csv.
Losses are the final ones of the evaluation in nats a label; a difference is below 0 where the first is better, with a
paired t interval over seeds. ``fixed`` is a gated model's best fixed subset of channels, ``SVD`` static choice among
singular directions, and ``small`` a plain LoRA of the active rank, trained as such from the start.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from sparselora.config.train import TrainConfig
from sparselora.numerics.stats import compare_paired
from sparselora.runs.files import read_table

PAIRS = (
    ("static", "all channels"), ("random", "static"), ("energy", "all channels"), ("energy", "static"),
    ("energy", "random"), ("learned", "all channels"), ("learned", "static"), ("learned", "energy"),
    ("energy fixed", "static"), ("learned fixed", "static"), ("SVD", "static"), ("SVD", "all channels"),
    ("energy", "SVD"), ("learned", "SVD"), ("energy singular", "SVD"), ("learned singular", "SVD"),
    ("learned singular", "energy singular"), ("small", "all channels"), ("small", "static"), ("SVD", "small"),
    ("energy", "small"), ("energy singular", "small"), ("energy singular fixed", "SVD"),
)  # fmt: skip


def read(folder: Path) -> pd.DataFrame:
    """Read the summaries of the runs in a folder, or the table of them."""
    if folder.is_file():
        return read_table(folder)
    tables = []
    for path in sorted(folder.glob("*/summary.csv")):
        config = TrainConfig.from_yaml(path.parent / "config.yaml")
        tables.append(pd.read_csv(path).assign(lora_r=config.lora_r))
    return pd.concat(tables, ignore_index=True)


def losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Return ``eval_loss`` by arm, budget and seed; a fixed subset is an arm of its own."""
    full = runs["lora_r"].max()
    plain = runs["gate_policy"].eq("none")
    arm = runs["gate_policy"] + runs["gate_basis"].eq("singular").map({True: " singular", False: ""})
    arm = (
        arm.replace("static singular", "SVD")
        .mask(plain, "small")
        .mask(plain & (runs["lora_r"] == full), "all channels")
    )
    budget = runs["gate_budget"].fillna(runs["lora_r"] / full)
    final = pd.DataFrame({"arm": arm, "budget": budget, "seed": runs["seed"], "loss": runs["eval_loss"]})
    fixed = final.assign(arm=arm + " fixed", loss=runs["static_loss"]).dropna()
    return pd.concat([final, fixed], ignore_index=True)


def difference(table: pd.DataFrame, budget: float, names: tuple[str, str]) -> dict[str, object]:
    """Compare two arms at one budget, paired by seed."""
    arms = table[table["budget"].eq(budget) | table["arm"].eq("all channels")]
    a, b = (arms[arms["arm"] == name].set_index("seed")["loss"] for name in names)
    seeds = a.index.intersection(b.index)
    paired = compare_paired(a[seeds].to_numpy(), b[seeds].to_numpy())
    return {
        "budget": budget, "difference": " − ".join(names), "n_seeds": paired.n, "mean": paired.mean_difference,
        "ci_low": paired.ci_low, "ci_high": paired.ci_high, "t_p": paired.t_p, "dz": paired.cohens_dz,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs, or their runs.csv")
    parser.add_argument("--out_dir", type=Path, required=True, help="folder of the tables")
    args = parser.parse_args()
    runs = read(args.runs)
    table = losses(runs)
    budgets = sorted(runs["gate_budget"].dropna().unique())
    pairs = pd.DataFrame([difference(table, budget, names) for budget in budgets for names in PAIRS]).round(4)
    means = table.groupby(["arm", "budget"])["loss"].agg(["count", "mean", "std"]).round(4).reset_index()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    runs.dropna(axis=1, how="all").to_csv(args.out_dir / "runs.csv", index=False)
    means.to_csv(args.out_dir / "losses.csv", index=False)
    pairs.to_csv(args.out_dir / "paired.csv", index=False)
    print(means.to_string(index=False), pairs.to_string(index=False), sep="\n\n")


if __name__ == "__main__":
    main()
