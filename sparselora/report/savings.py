"""Figure of the savings of LoRA over ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter

from sparselora.report.style import COLORS, literal, new_figure, save_figure


def savings_chart(table: pd.DataFrame, path: Path) -> None:
    """Trainable parameters (left, logarithmic) and training memory (right) of one model, a bar a rank.

    Args:
        table: one row per rank, in ascending order, with the columns of ``savings.csv``; written next to the figure.
    """
    first = table.iloc[0]
    places, labels = np.arange(len(table)), [str(rank) for rank in table["rank"]]
    with new_figure(4.4) as figure:
        left, right = figure.subplots(1, 2)
        figure.suptitle(f"{literal(first['model'])}, LoRA on {first['targets']}", fontsize=12)

        left.bar(places, table["lora_params"], color=COLORS["blue"], width=0.7)
        for x, (count, percent) in enumerate(zip(table["lora_params"], table["lora_percent_of_full"])):
            left.annotate(
                f"{_percent(percent)}%", (x, count), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=9
            )
        ends = []
        for column, color, text in (
            ("full_model_params", "black", "whole model"),
            ("full_attention_params", "red", "attention q, k, v, o"),
        ):
            value = first[column]
            left.axhline(value, color=COLORS[color], linestyle="--", linewidth=1.3)
            left.annotate(
                f"{text}: {_short(value)}",
                (0, value),
                xycoords=("axes fraction", "data"),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=9.5,
                color=COLORS[color],
            )
            ends.append(value)
        left.set_yscale("log")
        left.set_ylim(table["lora_params"].min() / 3, max(ends) * 3)
        left.set_ylabel("trainable parameters")
        counted = "whole model" if first["full_counts"] == "model" else "attention projections"
        left.set_title(f"above the bars:\nshare of the {counted}", fontsize=10)

        unit, name = _unit(table[["adapter_bytes", "lora_gradient_bytes", "lora_optimizer_bytes"]].sum(axis=1).max())
        base = np.zeros(len(table))
        for column, color, text in (
            ("adapter_bytes", "blue", "adapter"),
            ("lora_gradient_bytes", "sky", "its gradients"),
            ("lora_optimizer_bytes", "orange", "optimizer state"),
        ):
            height = table[column].to_numpy() / unit
            right.bar(places, height, bottom=base, color=COLORS[color], width=0.7, label=text)
            base = base + height
        right.set_ylabel(f"memory added by LoRA ({name})")
        right.legend(loc="upper left")
        full = first["full_gradient_bytes"] + first["full_optimizer_bytes"]
        size, name = _unit(full)
        right.set_title(f"full fine-tuning: {full / size:.3g} {name}\nof gradients and optimizer state", fontsize=10)

        for axes in (left, right):
            axes.set_xticks(places, labels)
            axes.set_xlabel("LoRA rank")
            axes.grid(visible=False, axis="x")
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        save_figure(figure, path, data=table)


def _percent(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


def _short(value: float) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:g}"


def _unit(value: float) -> tuple[float, str]:
    """The decimal unit that writes ``value`` bytes with one to three digits before the point."""
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= size:
            return size, name
    return 1e3, "kB"
