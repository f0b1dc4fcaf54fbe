"""Phase A against a plain loop: one scipy.linalg.svd a trial and rank, every approximation formed and subtracted.

The loop computes the five published errors, `sparselora.inspection.matrix_errors.measure_trials` every column of the
table. Variants alternate; the ratio is of medians. Both run on one BLAS thread: with other work on the machine more
threads stall each other on matrices this small, which would slow down the loop alone.

    python benchmarks/toy.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparselora.inspection.matrix_errors import TrialSettings, measure_trials


def plain_loop(n: int, m: int, ranks: list[int], trials: int) -> list[list[float]]:
    """The five published errors, the way a first script computes them."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(trials):
        W = rng.standard_normal((n, m))
        norm = np.linalg.norm(W)
        for k in ranks:
            U, s, Vt = scipy.linalg.svd(W, full_matrices=False)
            svd = np.linalg.norm(W - (U[:, :k] * s[:k]) @ Vt[:k]) / norm
            R = rng.standard_normal((n, k)) @ rng.standard_normal((k, m))
            random_AB = np.linalg.norm(W - R * (norm / np.linalg.norm(R))) / norm
            some = rng.permutation(len(s))[:k]
            subspace = np.linalg.norm(W - (U[:, some] * s[some]) @ Vt[some]) / norm
            best, random_columns = np.zeros_like(W), np.zeros_like(W)
            top = np.argsort(-((s**2) @ Vt**2))[:k]
            best[:, top] = W[:, top]
            some = rng.permutation(m)[:k]
            random_columns[:, some] = W[:, some]
            rows.append([svd, random_AB, subspace, *(np.linalg.norm(W - X) / norm for X in (best, random_columns))])
    return rows


def timed(function: Callable[[], object]) -> float:
    with threadpool_limits(1, user_api="blas"):
        began = time.perf_counter()
        function()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--m", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    size = parser.parse_args()
    settings = TrialSettings(size.n, size.m, tuple(size.ranks), size.trials, (), "gaussian", {}, seed=0)
    variants = {
        "plain loop, five errors": lambda: plain_loop(size.n, size.m, size.ranks, size.trials),
        "toy_experiment, all columns": lambda: measure_trials(settings),
    }
    for function in variants.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(size.repeats):
        for name, function in variants.items():
            times[name].append(timed(function))
    print(f"{size.n}×{size.m}, ranks {size.ranks}, {size.trials} trials, {size.repeats} alternating runs")
    for name, values in times.items():
        print(f"  {name:28} median {statistics.median(values):.3f} s   [{min(values):.3f}, {max(values):.3f}]")
    loop, ours = (statistics.median(values) for values in times.values())
    print(f"  loop / ours: {loop / ours:.2f}  (1 or more is wanted)")


if __name__ == "__main__":
    main()
