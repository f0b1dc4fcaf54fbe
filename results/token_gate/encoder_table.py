"""Per-token gates of an encoder against their controls at the same budget, paired by seed.

    python results/token_gate/encoder_table.py results/token_gate/encoder/runs.csv --out_dir results/token_gate/encoder

Reads the tables of sweeps (a results.csv, or the rows of several), and writes means.csv (of accuracy and held-out loss
over seeds) and paired.csv, a block a data set.
Differences are of accuracy in percentage points and of loss in nats, with paired t intervals over seeds, right after
channels are chosen and after more training. ``fixed`` is a gated model's best fixed subset of channels (no loss is
recorded of it) and ``small`` a plain LoRA of the active rank, trained as such from the start.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sparselora.numerics.stats import compare_paired
from sparselora.runs.files import write_csv

CONTROLS = (
    ("random", "no_prune"), ("channel_energy", "random"), ("channel_energy", "no_prune"),
    ("random_gate", "channel_energy"), ("energy_gate", "no_prune"), ("energy_gate", "channel_energy"),
    ("token_gate", "channel_energy"), ("token_gate", "energy_gate"), ("token_gate", "no_prune"),
    ("energy_gate fixed", "channel_energy"), ("token_gate fixed", "channel_energy"),
    ("svd", "channel_energy"), ("svd", "no_prune"), ("energy_gate", "svd"), ("token_gate", "svd"),
    ("energy_gate (singular)", "svd"), ("token_gate (singular)", "svd"),
    ("small", "no_prune"), ("small", "channel_energy"), ("svd", "small"), ("energy_gate", "small"),
)  # fmt: skip
MEASURES = {"accuracy": ("acc", 100.0), "loss": ("loss", 1.0)}
SETTINGS = ["lora_r", "warmup_epochs", "keep_ratio"]


def read(paths: Sequence[Path]) -> pd.DataFrame:
    """Read the cells of all data sets: a row for each sweep's cell."""
    tables = [pd.read_csv(path, keep_default_na=False, na_values={"acc_static": [""]}) for path in paths]
    return pd.concat(tables, ignore_index=True)


def by_moment(cells: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each arm, setting, seed and moment of one data set, with accuracy in percent and loss."""
    cells = cells.assign(arm=cells["method"] + cells["gate"].map(lambda gate: f" ({gate})" if gate else ""))
    full = cells.loc[cells["method"] != "no_prune", "lora_r"].mode()[0]
    small = cells[cells["method"].eq("no_prune") & (cells["lora_r"] < full)]
    budgets = set(cells.loc[cells["lora_r"] == full, "keep_ratio"])
    small = small[(small["lora_r"] / full).isin(budgets) & small["warmup_epochs"].eq(cells["warmup_epochs"].max())]
    renamed = small.assign(arm="small", keep_ratio=small["lora_r"] / full, lora_r=full)
    cells = pd.concat([cells, renamed], ignore_index=True)
    names = [*SETTINGS, "arm", "seed"]
    parts = []
    for moment in ("before", "right_after", "after"):
        values = {name: cells[f"{column}_{moment}"] * scale for name, (column, scale) in MEASURES.items()}
        parts.append(cells[names].assign(moment=moment, **values))
    fixed = cells[cells["acc_static"].notna()]
    values = {"accuracy": 100 * fixed["acc_static"], "loss": float("nan")}
    parts.append(fixed[names].assign(arm=fixed["arm"] + " fixed", moment="after", **values))
    return pd.concat(parts, ignore_index=True)


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Compare the pairs of `CONTROLS`, and each variant of the learned gate with the plain one."""
    variants = [arm for arm in table["arm"].unique() if arm.startswith("token_gate (") and not arm.endswith("fixed")]
    pairs = [*CONTROLS, *((variant, "token_gate") for variant in variants if variant != "token_gate (singular)")]
    rows = []
    for setting, part in table[table["arm"] != "no_prune"].groupby(SETTINGS):
        like = (table[SETTINGS[:2]] == list(setting[:2])).all(axis=1)
        part = pd.concat([part, table[like & table["arm"].eq("no_prune")]])
        for moment in ("right_after", "after"):
            arms = {arm: cells.set_index("seed") for arm, cells in part[part["moment"] == moment].groupby("arm")}
            columns = dict(zip(SETTINGS, setting, strict=True)) | {"moment": moment}
            rows += [{**columns, **difference(arms[a], arms[b], a, b)} for a, b in pairs if a in arms and b in arms]
    return pd.DataFrame(rows)


def difference(a: pd.DataFrame, b: pd.DataFrame, *names: str) -> dict[str, object]:
    """Compare two arms, tables by seed, at the seeds that both have."""
    seeds = a.index.intersection(b.index)
    row: dict[str, object] = {"difference": " − ".join(names), "n_seeds": len(seeds)}
    for measure in MEASURES:
        paired = compare_paired(a.loc[seeds, measure].to_numpy(), b.loc[seeds, measure].to_numpy())
        row |= {
            measure: paired.mean_difference, f"{measure}_low": paired.ci_low, f"{measure}_high": paired.ci_high,
            f"{measure}_p": paired.t_p,
        }  # fmt: skip
    return row


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Describe each arm over its seeds, rounded to four digits."""
    described = table.groupby([*SETTINGS, "arm", "moment"])[list(MEASURES)].agg(["count", "mean", "std"]).round(4)
    described.columns = ["_".join(names) for names in described.columns]
    return described.drop(columns="loss_count").reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.csv of each sweep, or runs.csv with all rows")
    parser.add_argument("--out_dir", type=Path, required=True, help="folder of the tables")
    args = parser.parse_args()
    blocks = {str(name): by_moment(cells) for name, cells in read(args.results).groupby("dataset", sort=False)}
    described = pd.concat([means(table).assign(dataset=name) for name, table in blocks.items()])
    pairs = pd.concat([differences(table).round(4).assign(dataset=name) for name, table in blocks.items()])
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name, table in (("means", described), ("paired", pairs)):
        write_csv(args.out_dir / f"{name}.csv", table[["dataset", *table.columns.drop("dataset")]])
    print(pairs.to_string(index=False))


if __name__ == "__main__":
    main()
