"""The tables of Phase B: a row a layer, their summary, and paired tests of the predictors over layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pandas as pd

from sparselora.models.weights import UnmeasuredTensor
from sparselora.numerics.stats import (
    PairedComparison,
    column_intervals,
    compare_paired,
    holm,
    smallest_detectable_difference,
)

PUBLISHED = (
    "param", "shape", "skipped", "seed", "n", "m", "k_used", "svd_topk_err", "rand_svd_subspace_err", "random_AB_err",
    "leverage_col_err", "mag_col_err", "mag_row_err", "mag_best_err", "topk_energy", "fro_norm", "params_svd_topk",
    "params_random_AB", "nnz_mag_col", "nnz_mag_row", "svd_ms", "recon_ms", "rand_sub_ms", "rand_ab_ms", "leverage_ms",
    "mag_ms", "top_singular_values",
)  # fmt: skip
"""The columns that `layer_reconstruction.csv` starts with."""

TESTS = (
    ("svd_topk_err", "rand_svd_subspace_err"),
    ("svd_topk_err", "random_AB_scaled_err"),
    ("leverage_col_err", "random_colprune_err"),
    ("topk_energy_col_err", "random_colprune_err"),
    ("leverage_score_col_err", "random_colprune_err"),
    ("leverage_col_proj_err", "random_colprune_proj_err"),
    ("topk_energy_col_proj_err", "random_colprune_proj_err"),
    ("leverage_score_col_proj_err", "random_colprune_proj_err"),
    ("leverage_col_eqb_err", "random_colprune_eqb_err"),
    ("topk_energy_col_eqb_err", "random_colprune_eqb_err"),
    ("leverage_score_col_eqb_err", "random_colprune_eqb_err"),
    ("svd_topk_err", "leverage_col_eqb_err"),
    ("mag_row_err", "random_rowprune_err"),
    ("mag_row_eqb_err", "random_rowprune_eqb_err"),
    ("control_col_err", "control_random_err"),
)
"""Pairs (predictor, what it is held against). The last is the positive control: a tenth of the columns doubled."""

_TEST_COLUMNS = (
    "predictor", "against", *(field.name for field in fields(PairedComparison)), "smallest_detectable",
    "t_p_holm", "wilcoxon_p_holm",
)  # fmt: skip

NOT_SUMMARISED = frozenset({"seed", "n", "m", "k_used", "depth"})
"""Numbers that say what a layer is and not how well something works on it."""


def layer_table(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """`layer_reconstruction.csv`: the published columns in their order, then ours. Python objects, so that counts stay
    integers where other rows are empty. ``full_rank`` is a column even where nothing was measured."""
    rows = [record["row"] for record in records]
    added = list(dict.fromkeys(name for row in rows for name in row if name not in PUBLISHED))
    columns = list(dict.fromkeys([*PUBLISHED, *added, "full_rank"]))
    return pd.DataFrame([[row.get(name) for name in columns] for row in rows], columns=columns, dtype=object)


def compared_layers(table: pd.DataFrame) -> pd.DataFrame:
    """The layers that were measured and are not full rank, with numbers as numbers."""
    return table[table["full_rank"].eq(False)].infer_objects()


def summarise(layers: pd.DataFrame) -> pd.DataFrame:
    """Mean with its interval, median and std of every figure: over all layers, by type and by depth.

    Without layers there is no row.
    """
    columns = ["by", "group", "metric", "n", "mean", "median", "std", "ci_low", "ci_high"]
    if layers.empty:
        return pd.DataFrame(columns=columns)
    numeric = layers.select_dtypes("number").columns
    metrics = [name for name in numeric if name not in NOT_SUMMARISED and not name.endswith("_ms")]
    groups = [("all", "all", np.arange(len(layers)))]
    for by in ("family", "layer_type", "depth"):
        groups += [
            (by, key if isinstance(key, str) else f"{key:g}", rows)
            for key, rows in sorted(layers.groupby(by).indices.items())
        ]
    table = layers[metrics].to_numpy(dtype=np.float64)
    rows = []
    for by, key, members in groups:
        figures = (values.tolist() for values in column_intervals(table[members]))
        rows += [(by, key, name, *values) for name, *values in zip(metrics, *figures) if values[0]]
    return pd.DataFrame(rows, columns=columns)


def compare(layers: pd.DataFrame) -> pd.DataFrame:
    """`TESTS`, paired over layers, Holm-adjusted over all of them; negative differences favour the predictor.

    Without layers to compare there is no row.
    """
    rows = []
    for first, second in TESTS:
        pair = layers.reindex(columns=[first, second]).dropna()
        if pair.empty:  # a randomised spectrum knows no random triplets
            continue
        comparison = compare_paired(pair[first], pair[second])
        spread = float((pair[first] - pair[second]).std())
        detectable = smallest_detectable_difference(spread, comparison.n)
        rows.append({"predictor": first, "against": second, **asdict(comparison), "smallest_detectable": detectable})
    if not rows:
        return pd.DataFrame(columns=list(_TEST_COLUMNS))
    tests = pd.DataFrame(rows)
    for name in ("t_p", "wilcoxon_p"):
        tests[f"{name}_holm"] = holm(tests[name])
    return tests


def unmeasured_table(tensors: Sequence[UnmeasuredTensor]) -> pd.DataFrame:
    """`not_measured.csv`: a row for every tensor of the model that the other tables have no figures of, and why."""
    rows = [
        (tensor.name, "x".join(map(str, tensor.shape)), tensor.dtype, math.prod(tensor.shape), tensor.reason)
        for tensor in tensors
    ]
    return pd.DataFrame(rows, columns=["name", "shape", "dtype", "numbers", "reason"])
