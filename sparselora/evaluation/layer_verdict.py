"""Verdicts on the layers of a profile: where there is nothing to choose, how sparse a layer may be, what stays dense.

A layer's cost is the rise of the answer loss with that layer alone sparse, in % of the dense loss, with its standard
error over rows. Rows are few and layers many, so a layer is sparse in the schedule only where the cost *and two
standard errors* stay below a limit: too few rows make a schedule denser, never bolder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from sparselora.config.sparsity import Part
from sparselora.contextual.layer_sensitivity import Cell

PROFILED = ("skip", "random_fixed", "svd", "static", "oracle", "surrogate")
"""The modes that are measured, in the order of tables and figures."""
CONTRAST = ("oracle", "random_fixed")
"""The two modes whose difference says if choosing channels matters."""
SUGGESTED = "static"
"""The mode of the schedule."""

_LEFT_OUT = "skip"
SKIP_ERRORS = 10.0
"""Standard errors that skipping a layer's FFN has to cost before modes are distinguishable in it."""
_SHUFFLED_TIMES = 10.0
"""How many times the effect that is sought shuffled prompts have to cost."""
_ERRORS = 2.0


def layer_verdicts(
    cells: pd.DataFrame, contrasts: pd.DataFrame, dense_loss: float, tolerance: float, prompts: pd.DataFrame
) -> pd.DataFrame:
    """Return a row a layer and part: costs, controls, how sparse it may be alone (0: dense) and the verdict.

    Args:
        cells: columns layer, part, mode, sparsity, loss_increase, standard_error.
        contrasts: columns layer, part, sparsity, difference (oracle minus fixed random channels), standard_error.
        dense_loss: in nats per label.
        tolerance: rise that the layer alone may cost, in % of ``dense_loss``.
        prompts: the control of the prompts, columns prompt, loss_increase, standard_error.
    """
    shuffled = prompts.set_index("prompt").loc["shuffled"]
    rows = []
    for (layer, part), group in cells.groupby(["layer", "part"], sort=True):
        differences = contrasts[(contrasts["layer"] == layer) & (contrasts["part"] == part)]
        rows.append(
            {"layer": layer, "part": part, **_verdict(part, group, differences, dense_loss, tolerance, dict(shuffled))}
        )
    # All FFNs, then all attentions: two schedules, each read from the first layer to the last.
    return pd.DataFrame(rows).sort_values(["part", "layer"], ascending=[False, True], ignore_index=True)


def _verdict(
    part: str, cells: pd.DataFrame, differences: pd.DataFrame, dense_loss: float, tolerance: float,
    shuffled: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    percent = 100 / dense_loss
    nan = float("nan")
    static = cells[cells["mode"] == SUGGESTED].sort_values("sparsity")
    cost, error = static["loss_increase"] * percent, static["standard_error"] * percent
    within = static[(cost + _ERRORS * error).to_numpy() <= tolerance]
    sparsity = float(within["sparsity"].max()) if len(within) else 0.0
    skipped = cells[cells["mode"] == _LEFT_OUT]
    skip, skip_error = (
        (float(skipped[name].iloc[0]) * percent for name in ("loss_increase", "standard_error"))
        if len(skipped)
        else (nan, nan)
    )
    lower = differences["difference"] + _ERRORS * differences["standard_error"] < 0
    beats = bool(lower.any())
    highest = static.iloc[-1]
    effect = abs(float(highest["loss_increase"]))
    return {
        "skip_percent": skip,
        "skip_standard_error": skip_error,
        "skip_errors": _ratio(skip, skip_error),
        "skip_passes": bool(skip >= SKIP_ERRORS * skip_error and skip > 0) if len(skipped) else None,
        "oracle_minus_random": float(differences["difference"].min()) * percent if len(differences) else nan,
        "oracle_levels": int(lower.sum()),
        "oracle_passes": beats,
        "shuffled_times": _ratio(float(shuffled["loss_increase"]), effect),
        "shuffled_passes": bool(
            float(shuffled["loss_increase"]) >= SKIP_ERRORS * float(shuffled["standard_error"])
            and float(shuffled["loss_increase"]) >= _SHUFFLED_TIMES * effect
        ),
        "static_percent": float(highest["loss_increase"]) * percent,
        "static_standard_error": float(highest["standard_error"]) * percent,
        "sparsity": sparsity,
        "verdict": _text(part, static, sparsity, (skip, skip_error), beats, percent, tolerance),
    }


def _ratio(value: float, unit: float) -> float:
    """Return ``value / unit``; of 0 in 0 units, 0."""
    if unit == 0:
        return 0.0 if value == 0 else float("inf") if value > 0 else -float("inf")
    return value / unit


def _text(
    part: str, static: pd.DataFrame, sparsity: float, skip: tuple[float, float], beats: bool, percent: float,
    tolerance: float,
) -> str:  # fmt: skip
    cost, error = skip
    if part == "ffn" and abs(cost) <= _ERRORS * error and cost + _ERRORS * error <= tolerance:
        return f"nothing to choose here: skipping the FFN costs less than 2 SE ({cost:+.2f} ± {error:.2f} %)"
    choice = "" if beats else "; choosing does not matter: the oracle does not beat random channels"
    if sparsity:
        row = static[static["sparsity"] == sparsity].iloc[0]
        cost, error = row["loss_increase"] * percent, row["standard_error"] * percent
        return f"static at {100 * sparsity:g} % costs {cost:.2f} ± {error:.2f} %{choice}"
    row = static.iloc[0]
    cost, error = row["loss_increase"] * percent, row["standard_error"] * percent
    if cost <= tolerance:
        return f"keep dense: too few rows to tell (static at {100 * row['sparsity']:g} %: {cost:+.2f} ± {error:.2f} %)"
    return f"keep dense: static at {100 * row['sparsity']:g} % costs {cost:.2f} ± {error:.2f} %{choice}"


def cells_within(cells: pd.DataFrame, dense_loss: float, limit: float) -> list[Cell]:
    """Return the sparsest cell of each layer and part that alone costs at most ``limit`` % of the dense loss.

    Args:
        cells: as in `layer_verdicts`.
    """
    parts: dict[str, Part] = {"ffn": "ffn", "attention": "attention"}
    static = cells[cells["mode"] == SUGGESTED]
    cost = (static["loss_increase"] + _ERRORS * static["standard_error"]) * 100 / dense_loss
    highest = static[cost <= limit].groupby(["layer", "part"])["sparsity"].max()
    return [Cell(int(layer), parts[part], float(sparsity)) for (layer, part), sparsity in highest.items()]
