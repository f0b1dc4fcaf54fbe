"""Figures of Phase A."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sparselora.report.style import COLORS, new_figure, save_figure

Shape = tuple[int, int]
"""Rows and columns of a matrix."""

_ERROR = "relative error  ‖W − Ŵ‖ / ‖W‖"


def rank_k_comparison(path: Path, subtitle: str, shape: Shape, summary: pd.DataFrame) -> None:
    """Draw rank-k approximations of equal storage against their nulls; data in `toy_results_agg.csv`.

    Args:
        subtitle: lines below the title: family, size, trials.
    """
    with new_figure(5.6) as figure:
        axes = figure.add_subplot()
        _zero_predictor(axes)
        k = np.linspace(summary["rank_used"].min() / 2, min(shape), 400)
        axes.plot(
            k,
            np.sqrt(1 - k / k[-1]),
            "--",
            color=COLORS["grey"],
            label="null √(1 − k/r): random triplets, exact root mean square",
        )
        axes.plot(summary["rank_used"], summary["svd_topk_err_gaussian_limit"], ":", color=COLORS["black"],
                  marker="_", markersize=14, label="SVD of a Gaussian matrix of this shape (limit)")  # fmt: skip
        series = (
            ("random_AB_err", "random A·B, rescaled to ‖W‖", "red", "v"),
            ("random_AB_scaled_err", "random A·B, best scale", "orange", "^"),
            ("rand_svd_subspace_err", "k random singular triplets", "sky", "s"),
            ("svd_topk_err", "best rank k (SVD)", "blue", "o"),
        )
        for name, text, color, marker in series:
            _errorbars(axes, summary, name, text, color, marker)
        _ranks_axis(axes, shape, summary, "rank k, numbers stored k·(n + m), share of W's n·m", "params_svd_topk")
        axes.set_ylim(0, 1.55)
        axes.set_title(f"Approximations of rank k, all of the same storage\n{subtitle}")
        figure.legend(loc="outside lower center", ncols=2)
        save_figure(figure, path)


def column_prune_comparison(path: Path, subtitle: str, shape: Shape, summary: pd.DataFrame) -> None:
    """Draw columns kept by each score: k of them zeroing the rest, and two uses of the storage of rank k."""
    with new_figure(6.2) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        series = (
            ("random_colprune", "random columns", "grey", "x"),
            ("leverage_col", "column norm (the published “leverage”)", "orange", "D"),
            ("topk_energy_col", "energy in the top k singular values", "green", "^"),
            ("leverage_score_col", "leverage score Σ V² of the top k", "purple", "s"),
        )
        kinds = (
            ("_err", "k columns kept, the others\nzeroed: k·n numbers", "nnz_svd_col"),
            ("_eqb_err", "more columns, others zeroed:\nup to k·(n + m) numbers", "nnz_equal_budget"),
            ("_proj_err", "k columns kept, the others\nfitted: k·(n + m) numbers", "params_svd_topk"),
        )
        for axes, (suffix, text, budget) in zip(panels, kinds):
            _zero_predictor(axes)
            # Side by side: where two scores choose alike, both must be seen.
            step = 0.012 * np.log(_span(summary))
            for i, (name, label, color, marker) in enumerate(series):
                _errorbars(axes, summary, f"{name}{suffix}", label, color, marker, shift=np.exp((i - 1.5) * step))
            _errorbars(axes, summary, "svd_topk_err", "best rank k (SVD), for comparison", "blue", "o")
            null = summary.get(f"random_colprune{suffix}_rms_expected")
            if null is not None:
                axes.plot(summary["rank_used"], null, "--", color=COLORS["black"],
                          label="null: random columns, exact root mean square")  # fmt: skip
            _ranks_axis(axes, shape, summary, "rank k, numbers, share of W", budget)
            axes.set_title(text, fontsize=10.5)
            axes.set_ylim(0, 1.06)
        for axes in panels[1:]:
            axes.set_ylabel("")
        figure.suptitle(f"Columns of W kept by a score, against random columns\n{subtitle}", fontsize=12)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        save_figure(figure, path)


def rank_error_curves(path: Path, subtitle: str, curve: pd.DataFrame, optimal: pd.DataFrame) -> None:
    """Draw the best error of every rank, linear and logarithmic, with the least rank of each target error marked."""
    with new_figure(4.8) as figure:
        panels = figure.subplots(1, 2)
        rank, mean = curve["rank"], curve["svd_topk_err_mean"]
        shown = mean > 0
        above_zero = mean[mean > 1e-14]
        lowest = min(float(above_zero.min()), float(optimal["target_error"].min())) / 3
        for axes in panels:
            axes.plot(rank, curve["gaussian_limit"].where(curve["gaussian_limit"] > 0), "--", color=COLORS["black"],
                      linewidth=1.1, zorder=3, label="Gaussian matrix of this shape (limit)")  # fmt: skip
            axes.plot(rank[shown], mean[shown], color=COLORS["blue"], label="best rank k (SVD), mean")
            band = curve["svd_topk_err_std"].fillna(0)
            axes.fill_between(rank[shown], np.maximum(mean - band, mean / 10)[shown], (mean + band)[shown],
                              color=COLORS["blue"], alpha=0.25, linewidth=0, label="± 1 SD over trials")  # fmt: skip
            colors = ("green", "red", "orange", "purple", "sky") * len(optimal)
            for i, (row, color) in enumerate(zip(optimal.itertuples(), colors)):
                saving = "" if row.factors_save else ", no smaller than W"
                # An error of 0 has no place on the logarithmic axis: it is drawn on its lower edge.
                height = (
                    float(mean[row.rank_median]) if axes is panels[0] else max(float(mean[row.rank_median]), lowest)
                )
                # Smaller and smaller: targets that fall on one rank are all seen.
                axes.plot(row.rank_median, height, "o", ms=8 + 4 * (0.5 ** i - 0.5),
                          color=COLORS[color], zorder=5, clip_on=False,
                          label=f"error < {row.target_error:g}: rank {row.rank_median}, "
                                f"{row.stored_ratio:.0%} of W's numbers{saving}")  # fmt: skip
                axes.axhline(row.target_error, color=COLORS[color], linewidth=0.9, linestyle=":")
            axes.set_xlabel("rank k")
            axes.set_xlim(0, rank.max())
        panels[0].set_ylabel(_ERROR)
        panels[0].set_ylim(0, 1.03)
        panels[1].set_yscale("log")
        panels[1].set_ylim(lowest, 1.5)
        panels[0].set_title("linear", fontsize=10.5)
        panels[1].set_title("logarithmic", fontsize=10.5)
        figure.suptitle(f"Error left by the best rank k\n{subtitle}", fontsize=12)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        save_figure(figure, path, curve)


def _errorbars(
    axes: Axes, summary: pd.DataFrame, name: str, label: str, color: str, marker: str, shift: float = 1.0
) -> None:
    axes.errorbar(summary["rank_used"] * shift, summary[f"{name}_mean"], yerr=summary[f"{name}_std"].fillna(0),
                  label=label, color=COLORS[color], marker=marker, markersize=6, capsize=4, linewidth=1.3)  # fmt: skip


def _zero_predictor(axes: Axes) -> None:
    axes.axhline(1.0, color=COLORS["black"], linewidth=1.0, label="zero predictor, Ŵ = 0")


def _ranks_axis(axes: Axes, shape: Shape, summary: pd.DataFrame, label: str, budget: str) -> None:
    """A logarithmic axis with ticks at the ranks measured, each with its budget while there is room for it."""
    ranks = summary["rank_used"].to_numpy()
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xlabel(label if len(ranks) <= 5 else "rank k")
    if len(ranks) <= 5:
        share = summary[budget] / (shape[0] * shape[1])
        axes.set_xticks(ranks, [f"{k}\n{p:,}\n{q:.0%}" for k, p, q in zip(ranks, summary[budget], share)])
    elif len(ranks) <= 12:
        roomy = np.diff(np.log(ranks), prepend=-np.inf) > 0.09 * np.log(_span(summary))
        axes.set_xticks(ranks, [str(k) if fits else "" for k, fits in zip(ranks, roomy)])
    room = _span(summary) ** 0.12
    axes.set_xlim(ranks.min() / room, ranks.max() * room)
    axes.set_ylabel(_ERROR)


def _span(summary: pd.DataFrame) -> float:
    """Largest over smallest rank, at least 2: what the axis covers."""
    return max(2.0, float(summary["rank_used"].max() / summary["rank_used"].min()))
