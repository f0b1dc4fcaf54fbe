"""The least rank of two simulated matrices, low-rank and full-rank, and the time that finding it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.inspection.rank import Rule, describe
from sparselora.numerics import reconstruction as rec
from sparselora.numerics.matrices import gaussian, lowrank
from sparselora.numerics.spectra import blas_threads, spectrum
from sparselora.runs.files import write_csv
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress

Array = NDArray[np.floating]

TIMED_RUNS = 5
"""Alternating runs of each method."""


@dataclass(frozen=True)
class Simulation:
    """A low-rank and a full-rank random matrix of ``n × m``: rank of the signal, noise relative to it, seed."""

    n: int
    m: int
    true_rank: int
    noise: float
    seed: int

    def draw(self) -> dict[str, Array]:
        """Return one matrix ``(n, m)`` of each family, from child streams of the seed."""
        streams = np.random.SeedSequence(self.seed).spawn(2)
        return {
            f"rank {self.true_rank} + noise {self.noise:g}": lowrank(
                np.random.default_rng(streams[0]), self.n, self.m, self.true_rank, self.noise
            ),
            "full-rank random": gaussian(np.random.default_rng(streams[1]), self.n, self.m),
        }


def by_reconstruction(W: Array, target: float) -> int:
    """Return the least rank below a relative error by forming approximations, which `optimal_rank` does not need.

    A thin SVD, then a bisection over ranks, each formed and subtracted; the strongest form of the usual loop.
    """
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    low, high = 0, len(s)
    while low < high:
        k = (low + high) // 2
        if rec.relative_error(W, (U[:, :k] * s[:k]) @ Vt[:k]) < target:
            high = k
        else:
            low = k + 1
    return low


def time_methods(matrices: dict[str, Array], target: float) -> pd.DataFrame:
    """Return milliseconds from matrix to rank, by values only and by reconstruction, alternating."""
    methods: dict[str, Callable[[Array], int]] = {
        "values only": lambda W: rec.optimal_rank(spectrum(W).s, target),
        "reconstruction": lambda W: by_reconstruction(W, target),
    }
    rows = []
    with Progress(len(matrices) * TIMED_RUNS * len(methods), "timed search", "rank") as progress:
        for family, W in matrices.items():
            ms: dict[str, list[float]] = {name: [] for name in methods}
            ranks = {}
            for _ in range(TIMED_RUNS):
                for name, method in methods.items():
                    began = time.perf_counter()
                    ranks[name] = method(W)
                    ms[name].append((time.perf_counter() - began) * 1e3)
                    progress.update()
            for name, values in ms.items():
                rows.append({
                    "matrix": family, "method": name, "target_error": target, "rank": ranks[name], "runs": len(values),
                    "median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values),
                })  # fmt: skip
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class SimulationRequest:
    """Rank both matrices of a simulation.

    Attributes:
        rules: as `sparselora.inspection.rank.rank_rules` returns them.
        target: error at which both methods are timed.
    """

    simulation: Simulation
    rules: Mapping[str, Rule]
    target: float

    @property
    def outputs(self) -> tuple[str, ...]:
        """Files that the run may write."""
        return tuple(f"simulated{end}" for end in (".csv", "_times.csv", "_ranks.csv", "_ranks.png"))


@dataclass(frozen=True)
class SimulatedRanks:
    """Results of a simulation: ranks by matrix, times by matrix and method, singular values by matrix."""

    table: pd.DataFrame
    times: pd.DataFrame
    spectra: Mapping[str, Array]


def simulate_ranks(request: SimulationRequest, folder: RunFolder) -> SimulatedRanks:
    """Rank both matrices of a simulation, and write tables and figure into ``folder``."""
    from sparselora.report import rank as figures

    with folder:
        results = _ranked(request)
        write_csv(folder.path("simulated.csv"), results.table.drop(columns="kind"))
        write_csv(folder.path("simulated_times.csv"), results.times)
        path, labels = folder.path("simulated_ranks.png"), list(request.rules)
        figures.simulated_ranks(path, request.simulation, results.spectra, results.table, labels)
    return results


def _ranked(request: SimulationRequest) -> SimulatedRanks:
    simulation, rules = request.simulation, request.rules
    shape, matrices = (simulation.n, simulation.m), simulation.draw()
    with blas_threads(min(shape)):
        values = {name: spectrum(W).s for name, W in matrices.items()}
        times = time_methods(matrices, request.target)
    return SimulatedRanks(pd.DataFrame([describe(name, shape, s, rules) for name, s in values.items()]), times, values)
