"""What the edits of a study do, over adapters: calibration seeds of one adapter are averaged before the interval.

    python results/spectral/by_adapter.py results/spectral/mawps/reports --csv results/spectral/mawps/by_adapter.csv

The folder holds the report.csv of each run as ADAPTER_seedN.csv. Changes are in nats a label against the unedited
adapter; the correlations are of predicted (second order) with measured change over a run's edits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from sparselora.stats import mean_interval


def measured(path: Path) -> dict[str, object]:
    table = pd.read_csv(path)
    by_kind = table.groupby("kind")["loss_change"].mean()
    edits = table[table["kind"].isin(["edit", "signed", "draw"])]
    signed = table[table["kind"] == "signed"].iloc[0]
    return {
        "adapter": path.stem.rpartition("_seed")[0],
        "edit": by_kind["edit"],
        "edit_minus_draws": by_kind["edit"] - by_kind["draw"],
        "signed": by_kind["signed"],
        "signed_on_calibration_rows": signed["calibration_change"],
        "correlation_calibration_rows": edits["predicted_second"].corr(edits["calibration_change"]),
        "correlation_held_out": edits["predicted_second"].corr(edits["loss_change"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, help="folder of the runs' report.csv")
    parser.add_argument("--csv", type=Path, required=True, help="file for the table")
    args = parser.parse_args()
    adapters = pd.DataFrame([measured(path) for path in sorted(args.reports.glob("*.csv"))]).groupby("adapter").mean()
    rows = []
    for name in adapters:
        found = mean_interval(adapters[name].to_numpy())
        rows.append(
            {"quantity": name, "mean": found.mean, "ci_low": found.low, "ci_high": found.high, **adapters[name]}
        )
    table = pd.DataFrame(rows).round(4)
    table.to_csv(args.csv, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
