"""Errors of approximations of random matrices whose structure is known: what Phase A measures.

Every trial draws one ``(n, m)`` matrix and decomposes it once. Trials are drawn and decomposed in stacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.numerics import channels as ch
from sparselora.numerics import reconstruction as rec
from sparselora.numerics.matrices import FAMILIES
from sparselora.numerics.spectra import blas_threads
from sparselora.runs.progress import Progress

Array = NDArray[np.floating]

PUBLISHED = (
    "seed", "trial", "n", "m", "rank_requested", "rank_used", "k_ratio",
    "svd_topk_err", "random_AB_err", "rand_svd_subspace_err", "leverage_col_err", "random_colprune_err",
    "params_svd_topk", "params_random_AB", "nnz_svd_col", "topk_energy",
)  # fmt: skip
"""The columns that `toy_results_per_trial.csv` starts with."""

SCORES = ("leverage_col", "topk_energy_col", "leverage_score_col", "random_colprune")
"""Ways of choosing columns; the last is the control."""

STREAMS = ("matrix", "random_AB", "rand_svd_subspace", "random_colprune", "control")
"""Sources of randomness. Each has its own child stream, and each rank one below it: adding a rank, a trial or a
baseline changes no other draw."""

_CHUNK_NUMBERS = 1 << 20
"""Numbers in a stack of matrices decomposed at once: 8 MB."""


@dataclass(frozen=True)
class TrialSettings:
    """Settings of the trials.

    Attributes:
        n, m: rows and columns of a matrix.
        ranks: ranks k ascending, each within 1..min(n, m).
        trials: matrices drawn.
        target_errors: errors whose least rank is of interest.
        family: one of `sparselora.numerics.matrices.FAMILIES`.
        parameters: its parameters, all of them.
        seed: of everything random.
    """

    n: int
    m: int
    ranks: tuple[int, ...]
    trials: int
    target_errors: tuple[float, ...]
    family: str
    parameters: Mapping[str, int | float]
    seed: int

    @property
    def full_rank(self) -> int:
        return min(self.n, self.m)

    @property
    def subtitle(self) -> str:
        """Lines below the title of a figure: the family with its parameters; size, trials and seed."""
        parameters = ", ".join(f"{name} {value:g}" for name, value in self.parameters.items())
        family = f"{self.family} ({parameters})" if parameters else self.family
        # A line each, so that none is wider than the figure, whatever the family's parameters.
        return f"{family}\n{self.n}×{self.m}, mean ± SD of {self.trials} trials, seed {self.seed}"


def stream(seed: int, name: str, rank: int = 0) -> np.random.Generator:
    """Return the generator of one source of randomness, one of `STREAMS`, at one rank."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS.index(name), rank)))


def decompose(W: Array) -> tuple[Array, Array, Array]:
    """Decompose each matrix of ``W (t, n, m)`` once.

    Returns:
        G ``(t, m, m)`` = WᵀW, singular values ``(t, r)`` descending, right vectors ``(t, r, m)``. By eigenvectors of
        the Gram matrix on the small side; matrices whose small values that would blur go through an SVD instead.
    """
    Wt = W.transpose(0, 2, 1)
    G = Wt @ W
    wide = W.shape[1] < W.shape[2]
    energy, vectors = np.linalg.eigh(W @ Wt if wide else G)
    s = np.sqrt(np.maximum(energy[:, ::-1], 0.0))
    Vt = vectors[:, :, ::-1].transpose(0, 2, 1)
    blurred = energy[:, 0] < 1e-9 * energy[:, -1]
    if wide:
        Vt = np.divide(Vt @ W, s[:, :, None], out=np.zeros((len(W), s.shape[1], W.shape[2])), where=s[:, :, None] > 0)
    if blurred.any():
        _, s[blurred], Vt[blurred] = np.linalg.svd(W[blurred], full_matrices=False)
    return G, s, Vt


def measure_trials(settings: TrialSettings) -> tuple[pd.DataFrame, Array]:
    """Measure every trial at every rank.

    Returns:
        the per-trial table, and the best rank-k errors for every k ``(trials, full_rank + 1)``.
    """
    n, m, seed = settings.n, settings.m, settings.seed
    streams = {rank: {name: stream(seed, name, rank) for name in STREAMS[1:]} for rank in settings.ranks}
    draw, matrix = FAMILIES[settings.family], stream(seed, "matrix")
    chunk = max(1, _CHUNK_NUMBERS // (n * m))
    tables, tails = [], []
    with Progress(settings.trials, "trial", "toy") as progress, blas_threads(max(n, m)):
        for first in range(0, settings.trials, chunk):
            count = min(chunk, settings.trials - first)
            W = np.stack([draw(matrix, n, m, **settings.parameters) for _ in range(count)])
            G, s, Vt = decompose(W)
            tails.append(rec.relative_tail(s))
            for rank, rngs in streams.items():
                errors = {**low_rank_errors(W, s, rank, rngs), **column_errors(G, s, Vt, n, rank, rngs)}
                tables.append(trial_rows(settings, rank, first, errors))
            progress.update(count)
    table = pd.concat(tables, ignore_index=True).sort_values("trial", kind="stable", ignore_index=True)
    return table, np.concatenate(tails)


def low_rank_errors(W: Array, s: Array, k: int, rngs: dict[str, np.random.Generator]) -> dict[str, Array]:
    """Return the errors ``(t,)`` of the rank-k approximations of ``W (t, n, m)`` with singular values ``s (t, r)``."""
    count, n, m = W.shape
    tail = rec.relative_tail(s)[:, k]
    triplets = random_subsets(rngs["rand_svd_subspace"], count, s.shape[1], k)
    factors = rngs["random_AB"].standard_normal((count, k, n + m))
    A, B = factors[:, :, :n].transpose(0, 2, 1), factors[:, :, n:]
    cosine = rec.factor_cosine(W, A, B)
    missing = s.copy()
    np.put_along_axis(missing, triplets, 0.0, axis=1)
    return {
        "svd_topk_err": tail,
        "random_AB_err": rec.rescaled_error(cosine),
        "rand_svd_subspace_err": rec.subset_error(s**2, triplets),
        "topk_energy": 1 - tail**2,
        "random_AB_scaled_err": rec.optimally_scaled_error(cosine),
        "svd_topk_spectral_err": rec.spectral_tail(s)[:, k],
        "rand_svd_subspace_spectral_err": missing.max(axis=1) / s[:, 0],
    }


def column_errors(
    G: Array, s: Array, Vt: Array, n: int, k: int, rngs: dict[str, np.random.Generator]
) -> dict[str, Array]:
    """Return the errors ``(t,)`` of keeping k columns, or as many as fit in the storage of rank k, by each score.

    Args:
        G, s, Vt: as `decompose` returns them.
        n: rows of the matrices.
    """
    count, m = G.shape[:2]
    energy = np.diagonal(G, axis1=1, axis2=2)
    scores = {
        "leverage_col": energy,
        "topk_energy_col": ch.topk_column_energy(s, Vt, k),
        "leverage_score_col": ch.leverage_scores(Vt, k),
        "random_colprune": rngs["random_colprune"].random((count, m)),
    }
    room = rec.equal_storage_columns(n, m, k)
    errors: dict[str, Array] = {}
    for name in SCORES:
        columns = ch.top_channels(scores[name], k)
        errors[f"{name}_err"] = rec.subset_error(energy, columns)
        errors[f"{name}_proj_err"] = rec.projection_error(G, columns)
        if f"{name}_err" in PUBLISHED:
            errors[f"{name}_spectral_err"] = rec.pruned_spectral_error(G, columns, s[:, 0])
        errors[f"{name}_eqb_err"] = rec.subset_error(energy, ch.top_channels(scores[name], room))
    return errors | control_errors(energy, k, rngs["control"])


def control_errors(energy: Array, k: int, rng: np.random.Generator) -> dict[str, Array]:
    """Return the errors ``(t,)`` of the positive control: a random tenth of the columns doubled, k columns kept.

    A study that can see an effect sees columns chosen by energy do better than random ones here.

    Args:
        energy: squared norms of the columns ``(t, m)``.
    """
    count, m = energy.shape
    uniform = rng.random((count, 2, m))  # drawn trial by trial, so that more trials change none of them
    doubled = ch.top_channels(uniform[:, 0], max(1, m // 10))
    raised = energy.copy()
    np.put_along_axis(raised, doubled, 4 * np.take_along_axis(energy, doubled, axis=1), axis=1)
    return {
        "control_col_err": rec.subset_error(raised, ch.top_channels(raised, k)),
        "control_random_err": rec.subset_error(raised, ch.top_channels(uniform[:, 1], k)),
    }


def random_subsets(rng: np.random.Generator, count: int, n: int, k: int) -> NDArray[np.intp]:
    """Draw ``count`` uniform k-subsets of range(n), ``(count, k)``."""
    return ch.top_channels(rng.random((count, n)), k)


def trial_rows(settings: TrialSettings, k: int, first: int, errors: Mapping[str, Array]) -> pd.DataFrame:
    """Return the rows of one rank and stack, whose first trial is ``first``: the published columns, then ours."""
    n, m = settings.n, settings.m
    room = rec.equal_storage_columns(n, m, k)
    count = len(errors["svd_topk_err"])
    frame = pd.DataFrame({
        "seed": settings.seed, "trial": np.arange(first, first + count), "n": n, "m": m,
        "rank_requested": k, "rank_used": k, "k_ratio": k / settings.full_rank, **errors,
        "params_svd_topk": rec.factor_params(n, m, k), "params_random_AB": rec.factor_params(n, m, k),
        "nnz_svd_col": k * n, "cols_equal_budget": room, "nnz_equal_budget": room * n,
        "full_rank": k == settings.full_rank,
    })  # fmt: skip
    return frame[[*PUBLISHED, *(name for name in frame.columns if name not in PUBLISHED)]]
