"""Agreement between the choices of tokens: the share of them that uses the channels or directions most of them use.

    python results/token_gate/concentration.py runs/gate_mnli runs/gate_mawps --out_dir results/token_gate
    python results/token_gate/concentration.py results/token_gate/concentration.csv --out_dir results/token_gate

Reads token_gate.csv of every gated run in the folders, of encoder_main.jsonl and decoder.jsonl, and writes
concentration.csv: of each data set, policy, basis and budget the share of its k choices that a token has among the k
most used of a module, mean over modules and seeds. It is 1 where one fixed subset serves all tokens, and about the
budget where they choose at random. The figure has those at a quarter, and can be drawn from the table again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from sparselora.numerics.channels import keep_count
from sparselora.report.style import COLORS, legend_columns, new_figure, save_figure
from sparselora.runs.files import write_csv

POLICIES = {"token_gate": "learned", "energy_gate": "energy", "random_gate": "random"}
STYLES = {"energy": ("blue", -0.1), "learned": ("orange", 0.1), "random": ("grey", 0.0)}
"""Color and shift of each policy's dots; hollow is the basis of channels."""
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


def share_of_most_used(table: pd.DataFrame) -> pd.DataFrame:
    """Return, of each arm, the share of a token's k choices that are among the k most used, mean over modules."""
    count = [keep_count(r, budget) for r, budget in zip(table["r"], table["budget"], strict=True)]
    shares = [use[:k].sum() / k for use, k in zip(table["use"], count, strict=True)]
    return table.assign(share=shares).groupby(ARM)["share"].mean().round(3).reset_index()


def draw(means: pd.DataFrame, path: Path) -> None:
    """Draw a dot for each data set, policy and basis at a quarter: the share of a token's choices that most make."""
    quarter = means[(means["budget"] == 0.25) & means["policy"].isin(STYLES)]
    usual = quarter.groupby("dataset")["r"].transform(lambda ranks: ranks.mode()[0])
    quarter = quarter[quarter["r"] == usual]
    names = list(quarter["dataset"].unique())
    with new_figure(1.6 + 0.45 * len(names)) as figure:
        axes = figure.subplots()
        for (policy, basis), part in quarter.groupby(["policy", "basis"]):
            color, shift = STYLES[str(policy)]
            fill = COLORS[color] if basis == "singular" else "white"
            places = [names.index(name) + shift for name in part["dataset"]]
            style = {"ls": "", "marker": "o", "ms": 8, "color": COLORS[color], "mfc": fill}
            axes.plot(part["share"], places, label=f"{policy}, {basis}", **style)
        axes.axvline(0.25, color=COLORS["grey"], ls=":", label="at random")
        ranks = quarter.drop_duplicates("dataset")["r"]
        axes.set_yticks(range(len(names)), [f"{name} (r {r})" for name, r in zip(names, ranks, strict=True)])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set(xlim=(0, 1), xlabel="share of a token's choices that are among the most used quarter")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns(labels, 3))
        save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or one concentration.csv")
    parser.add_argument("--out_dir", type=Path, required=True, help="folder of the table and the figure")
    args = parser.parse_args()
    means = pd.read_csv(args.runs[0]) if args.runs[0].is_file() else share_of_most_used(read(args.runs))
    args.out_dir.mkdir(parents=True, exist_ok=True)
    write_csv(args.out_dir / "concentration.csv", means)
    draw(means, args.out_dir / "concentration.png")
    print(means.to_string(index=False))


if __name__ == "__main__":
    main()
