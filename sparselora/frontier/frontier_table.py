"""Table of a search: each candidate against dense training on the same rows, and for the same wall clock.

Losses of a candidate are compared at the last rung that both it and dense have finished, seed by seed. Over two seeds
and more an interval is Student's t over seeds, and the verdict is a test; over the rows of one seed it describes these
very runs and carries no verdict (docs/statistics.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.compare.contrasts import BETTER, UNDECIDED, WORSE, verdict
from sparselora.compare.pairing import NAN, compare_values
from sparselora.compare.training_runs import DRAWS
from sparselora.frontier.candidates import DENSE
from sparselora.frontier.equal_time import (
    EqualTime,
    EqualTimeDifference,
    Values,
    dense_for,
    difference_over_rows,
    difference_over_seeds,
    side,
)
from sparselora.frontier.pilot_results import PilotResults
from sparselora.numerics.stats import Bootstrap, holm, noninferiority_p, paired_bootstrap, step_down

ALPHA = 0.05
"""Probability of any false verdict among the finalists."""
SEEDS, ROWS = "seeds", "rows of one seed"
"""Units over which an interval is formed."""
BASELINE = "baseline"
LESS_TIME = "dense for less time"
LOOKS = {BETTER: "looks better", WORSE: "looks worse", UNDECIDED: "open"}
"""Words for the side on which an interval over rows lies; they are no verdict."""


# --- one candidate ------------------------------------------------------------------------------------------------


def difference_to_dense(results: PilotResults, name: str, rung: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return a candidate's loss minus dense's on as many rows, with its interval, over the seeds that both have."""
    candidate, dense = results.at(name, rung), results.at(DENSE, rung)
    seeds = candidate.index.intersection(dense.index)
    first, second = (pilots.loc[seeds, "loss"].to_numpy(dtype=float) for pilots in (candidate, dense))
    pairs = compare_values(first, second)
    low, high = pairs.ci_low, pairs.ci_high
    if len(seeds) == 1 and name != DENSE:
        over_rows = _row_difference(results, (name, rung, int(seeds[0])), (DENSE, rung, int(seeds[0])), rng)
        low, high = over_rows.low, over_rows.high
    return {
        "seeds": len(seeds),
        # Dense's mean over all of its seeds and the paired difference: a candidate with the first seed alone has
        # neither the luck nor the misfortune of that seed.
        "loss": float(dense["loss"].mean()) + pairs.mean_difference,
        "difference": pairs.mean_difference,
        "difference_low": low if name != DENSE else NAN,
        "difference_high": high if name != DENSE else NAN,
    }


def _row_difference(
    results: PilotResults, first: tuple[str, int, int], second: tuple[str, int, int], rng: np.random.Generator
) -> Bootstrap:
    shared = results.rows[first].index.intersection(results.rows[second].index)
    a, b = results.rows[first].loc[shared], results.rows[second].loc[shared]
    return paired_bootstrap(a["loss"] - b["loss"], a["labels"], rng, draws=DRAWS)


def compare_at_equal_time(
    results: PilotResults, name: str, rung: int, tolerance: float, rng: np.random.Generator
) -> tuple[EqualTime, EqualTimeDifference]:
    """Return a candidate's loss against dense for the same time: over its seeds, or over the rows of its only one."""
    candidate = results.at(name, rung)
    seeds = [int(seed) for seed in candidate.index.intersection(results.at(DENSE, rung).index)]
    points = results.dense_points(seeds)
    equal_time = dense_for(float(candidate["seconds"].median()), [point.seconds for point in points])
    if len(seeds) > 1:
        losses = candidate.loc[seeds, "loss"].to_numpy(dtype=float)
        dense_losses = np.array([[point.loss(results, seed) for point in points] for seed in seeds])
        return equal_time, difference_over_seeds(losses, dense_losses, equal_time, tolerance)
    seed = seeds[0]
    table = results.rows[name, rung, seed]
    shared = table.index
    for point in points:
        for other, other_rung in point.runs:
            shared = shared.intersection(results.rows[other, other_rung, seed].index)
    table = table.loc[shared]
    dense_rows = np.stack([point.row_losses(results, seed, shared) for point in points], axis=1)
    losses, labels = table["loss"].to_numpy(dtype=float), table["labels"].to_numpy(dtype=float)
    return equal_time, difference_over_rows(losses, dense_rows, labels, equal_time, rng, DRAWS)


# --- all candidates -----------------------------------------------------------------------------------------------


def frontier_table(results: PilotResults, tolerance: float, seed: int) -> pd.DataFrame:
    """Return a row per candidate, in the order of the search; the columns are those of docs/frontier.md.

    Args:
        tolerance: share of dense's loss by which a loss may rise.
        seed: of the bootstraps over rows.
    """
    rows = []
    for name in results.candidates.index:
        rows.append(_measured(results, name) | _compared(results, name, tolerance, np.random.default_rng(seed)))
    table = pd.DataFrame(rows, columns=[*rows[0]])
    _add_verdicts(table, results, tolerance)
    table["pareto"] = on_pareto_line(table, pilot_points(results))
    return table


_TIMES = ("tokens_per_s", "peak_gb", "setup_seconds")
_NOTHING_COMPARED = {
    "rung": NAN, "steps": NAN, "seeds": 0, "rows": 0, "seconds": NAN, "time_ratio": NAN,
    "step_seconds_ratio": NAN, "train_seconds_ratio": NAN,
    "loss": NAN, "difference": NAN, "difference_low": NAN, "difference_high": NAN, "shorter_difference": NAN,
    "dense_time": "", "dense_loss": NAN, "equal_time_difference": NAN, "equal_time_low": NAN, "equal_time_high": NAN,
    "interval_over": "", "t_p": NAN, "equivalence_p": NAN, "tolerance_p": NAN,
}  # fmt: skip


def _measured(results: PilotResults, name: str) -> dict[str, Any]:
    """Return the columns of a candidate that come from its entry and its timed steps."""
    candidate = results.candidates.loc[name]
    row: dict[str, Any] = {"candidate": name}
    row |= {"control": bool(candidate["control"]), "stage": candidate["stage"], "reason": candidate["reason"]}
    row["lr"] = float(candidate["lr"])
    times = results.times.reindex([name]).iloc[0]
    row |= {f"step_ms{end}": 1000 * times[column] for end, column in
            (("", "seconds_per_step"), ("_q25", "q25"), ("_q75", "q75"))}  # fmt: skip
    return row | {column: times[column] for column in _TIMES}


def _compared(results: PilotResults, name: str, tolerance: float, rng: np.random.Generator) -> dict[str, Any]:
    """Return the columns of a candidate that come from its pilots."""
    rungs = results.rungs(name)
    if not rungs:
        return dict(_NOTHING_COMPARED)
    rung = rungs[-1]
    candidate, dense = results.at(name, rung), results.at(DENSE, rung)
    shared = candidate.index.intersection(dense.index)
    difference = difference_to_dense(results, name, rung, rng)
    row = _NOTHING_COMPARED | {
        "rung": rung, "steps": int(candidate["steps"].iloc[0]),
        "rows": len(results.rows[name, rung, int(shared[0])]),
        "seconds": float(candidate["seconds"].median()),
        "time_ratio": float(candidate["seconds"].median() / dense["seconds"].median()),
        "step_seconds_ratio": _step_seconds(results, name, candidate) / _step_seconds(results, DENSE, dense),
        "train_seconds_ratio": float(
            candidate.loc[shared, "train_seconds"].sum() / dense.loc[shared, "train_seconds"].sum()
        ),
        **difference,
    }  # fmt: skip
    if len(rungs) > 1:
        row["shorter_difference"] = _mean_difference(results, name, rungs[-2])
    if results.is_dense(name):
        return row
    equal_time, against = compare_at_equal_time(results, name, rung, tolerance, rng)
    losses, dense_losses = (pilots.loc[shared, "loss"].to_numpy(dtype=float) for pilots in (candidate, dense))
    return row | {
        "dense_time": equal_time.place, "dense_loss": against.dense, "equal_time_difference": against.difference,
        "equal_time_low": against.low, "equal_time_high": against.high,
        "interval_over": SEEDS if len(shared) > 1 else ROWS,
        "t_p": against.t_p, "equivalence_p": against.equivalence_p,
        "tolerance_p": noninferiority_p(losses, dense_losses, tolerance),
    }  # fmt: skip


def _mean_difference(results: PilotResults, name: str, rung: int) -> float:
    """Return the loss minus dense's at a rung, mean over the seeds that both have."""
    return float((results.at(name, rung)["loss"] - results.at(DENSE, rung)["loss"]).mean())


def _step_seconds(results: PilotResults, name: str, pilots: pd.DataFrame) -> float:
    """Return the seconds that the steps of a pilot take at the time of the interleaved ones, without set-up."""
    return float(results.times.loc[name, "seconds_per_step"] * pilots["steps"].iloc[0])


def _add_verdicts(table: pd.DataFrame, results: PilotResults, tolerance: float) -> None:
    """Add the p values that are adjusted over the finalists, the verdicts and who pays."""
    finalists = table.index[table["interval_over"] == SEEDS]
    adjusted = step_down(table.loc[finalists, ["t_p", "equivalence_p"]].to_numpy().tolist())
    for place, column in enumerate(("t_p_adjusted", "equivalence_p_adjusted")):
        table[column] = pd.Series([p[place] for p in adjusted], index=finalists, dtype=float).reindex(table.index)
    within = pd.Series(holm(table.loc[finalists, "tolerance_p"].tolist()), index=finalists, dtype=float)
    table["tolerance_p_adjusted"] = within.reindex(table.index)
    texts, pays = [], []
    for row in table.to_dict("records"):
        text = _verdict(row, results, tolerance)
        texts.append(text)
        pays.append(text == BETTER and row["tolerance_p_adjusted"] <= ALPHA)
    table["verdict"], table["pays"] = texts, pays


def _verdict(row: Mapping[str, Any], results: PilotResults, tolerance: float) -> str:
    if not row["seeds"]:
        return ""
    if row["candidate"] == DENSE:
        return BASELINE
    if results.is_dense(row["candidate"]):
        return LESS_TIME
    if row["interval_over"] == SEEDS:
        # A shortcut that dense beats in its own time is of no use, however little it is beaten by: so better and worse
        # come before equivalence here.
        p_values = row["t_p_adjusted"], row["equivalence_p_adjusted"]
        margin = f"{100 * tolerance:g} %"
        text = verdict(p_values[:1], row["equal_time_difference"], True, margin, ALPHA)
        return text if text != UNDECIDED else verdict(p_values, row["equal_time_difference"], True, margin, ALPHA)
    interval = EqualTimeDifference(NAN, row["equal_time_difference"], row["equal_time_low"], row["equal_time_high"])
    return LOOKS[side(interval)]


# --- the Pareto line ----------------------------------------------------------------------------------------------


def pilot_points(results: PilotResults) -> pd.DataFrame:
    """Return time and loss of every pilot length: columns candidate, rung, steps, seconds, seeds, loss.

    The loss is dense's mean at that rung and the paired difference to it (see `difference_to_dense`).
    """
    rows = []
    for name in results.candidates.index:
        for rung in results.rungs(name):
            pilots, dense = results.at(name, rung), results.at(DENSE, rung)
            rows.append({
                "candidate": name, "rung": rung, "steps": int(pilots["steps"].iloc[0]),
                "seconds": float(pilots["seconds"].median()), "seeds": len(pilots.index.intersection(dense.index)),
                "loss": float(dense["loss"].mean()) + _mean_difference(results, name, rung),
            })  # fmt: skip
    return pd.DataFrame(rows, columns=["candidate", "rung", "steps", "seconds", "seeds", "loss"])


def pareto_mask(seconds: Values, losses: Values) -> NDArray[np.bool_]:
    """Return which of the points ``(points,)`` no other one beats: is as fast and as low, and not equal."""
    order = np.lexsort((losses, seconds))
    mask = np.zeros(len(seconds), dtype=bool)
    last: tuple[float, float] | None = None  # of the points on the line, from the fastest on
    for place in order:
        point = float(seconds[place]), float(losses[place])
        if last is None or point[1] < last[1] or point == last:
            mask[place], last = True, point
    return mask


def on_pareto_line(table: pd.DataFrame, points: pd.DataFrame) -> list[bool]:
    """Return whether no pilot of any candidate, at any rung, is as fast and as low as a candidate's last one."""
    mask = pareto_mask(points["seconds"].to_numpy(dtype=float), points["loss"].to_numpy(dtype=float))
    best = {(row["candidate"], row["rung"]) for row in points[mask].to_dict("records")}
    return [(row["candidate"], row["rung"]) in best for row in table.to_dict("records")]
