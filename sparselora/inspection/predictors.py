"""Every predictor's error on one weight: low rank, random, pruned columns and rows. Nothing is reconstructed.

Three budgets: rank k; ``keep_count(d, keep_ratio)`` columns or rows; and, under names with ``eqb``, as many columns or
rows as fit in the storage of rank k, k(d_out + d_in) numbers. ``*_proj_err`` fits every column by the kept ones
instead of zeroing it. ``*_spectral_err`` is in the spectral norm.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sparselora.numerics import channels as ch
from sparselora.numerics import reconstruction as rec
from sparselora.numerics import spectra
from sparselora.numerics.spectra import Gram, Spectrum

Array = NDArray[np.floating]
Index = NDArray[np.intp]

DRAWS = 30
PROJECTION_DRAWS = 3  # of the 30: each needs a factorisation of its own

_STREAMS = ("rand_svd_subspace", "random_AB", "random_colprune", "random_rowprune", "control", "randomized")
_BLOCK = 1 << 19


def layer_streams(seed: int, name: str) -> dict[str, np.random.Generator]:
    """One generator for each random baseline of a layer; the same whatever layers were measured before it."""
    children = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).spawn(len(_STREAMS))
    return {stream: np.random.default_rng(child) for stream, child in zip(_STREAMS, children)}


def right_vectors(W: Array, gram: Gram, values: Array, vectors: Array) -> Array:
    """Top right singular vectors ``Vt (k, d_in)`` from the top eigenvectors ``(r, k)`` of the Gram matrix.

    ``values (r,)`` are its eigenvalues. Where the Gram matrix is of rows, V = WᵀU / s; zero rows where s is zero.
    """
    if gram.of_columns:
        return vectors.T
    k, d_in = vectors.shape[1], W.shape[1]
    Vt = np.empty((k, d_in))
    step = max(1, _BLOCK // W.shape[0])
    for start in range(0, d_in, step):
        Vt[:, start : start + step] = vectors.T @ np.asarray(W[:, start : start + step], dtype=np.float64)
    s = np.sqrt(values[:k, None])
    return np.divide(Vt, s, out=np.zeros_like(Vt), where=s > 0)


# --- low rank -----------------------------------------------------------------------------------------------------


def low_rank_errors(spectrum: Spectrum, k: int) -> dict[str, float]:
    """Error of the best rank k, and the energy in it. With an incomplete spectrum from what ‖W‖² leaves over."""
    if spectrum.complete:
        tail = float(rec.relative_tail(spectrum.s)[k])
        spectral = float(rec.spectral_tail(spectrum.s)[k])
    else:
        held = float(np.sum(spectrum.s[:k] ** 2))
        tail = float(np.sqrt(max(0.0, 1 - held / spectrum.total))) if spectrum.total > 0 else 0.0
        spectral = float("nan")
    return {
        "svd_topk_err": tail,
        "svd_topk_spectral_err": spectral,
        "topk_energy": 1 - tail**2 if spectrum.total > 0 else float("nan"),
    }


def random_subspace_errors(s: Array, k: int, rng: np.random.Generator) -> dict[str, float]:
    """Mean and std over `DRAWS` draws of k random singular triplets, and the exact √(E err²) over all draws."""
    triplets = random_subsets(rng, len(s), k)
    error = rec.subset_error(np.broadcast_to(s**2, (DRAWS, len(s))), triplets)
    missing = np.tile(s, (DRAWS, 1))
    np.put_along_axis(missing, triplets, 0.0, axis=1)
    spectral = missing.max(axis=1) / s[0] if s[0] > 0 else np.zeros(DRAWS)
    return {
        **_mean_std("rand_svd_subspace_err", error),
        "rand_svd_subspace_err_rms_expected": math.sqrt(1 - k / len(s)),
        "rand_svd_subspace_spectral_err": float(spectral.mean()),
    }


def random_product_errors(s: Array, n: int, m: int, k: int, rng: np.random.Generator) -> dict[str, float]:
    """Mean and std over `DRAWS` draws of a random A·B: rescaled to ‖W‖_F as published, and by its best factor."""
    cosine = random_product_cosines(s, n, m, k, rng)
    return {
        **_mean_std("random_AB_err", rec.rescaled_error(cosine)),
        "random_AB_err_rms_expected": math.sqrt(2),  # E⟨W, AB⟩ = 0: its sign is a coin's
        **_mean_std("random_AB_scaled_err", rec.optimally_scaled_error(cosine)),
    }


def random_product_cosines(s: Array, n: int, m: int, k: int, rng: np.random.Generator) -> Array:
    """Cosines ``(DRAWS,)`` of W and A·B, A ``(n, k)`` and B ``(k, m)`` Gaussian, drawn from the singular values alone.

    A Gaussian matrix looks the same in every basis, so A and B are drawn in that of W's singular vectors: the r rows of
    A and columns of B that W meets, and the Gram matrix of those it does not (a Wishart matrix) for the norm of A·B.
    """
    r, norm = len(s), float(np.linalg.norm(s))
    if norm == 0:
        return np.zeros(DRAWS)
    cosines = []
    step = max(1, _BLOCK // (2 * r * k))
    for start in range(0, DRAWS, step):
        count = min(step, DRAWS - start)
        A, B = rng.standard_normal((2, count, r, k))
        AtA = A.transpose(0, 2, 1) @ A + _wisharts(count, n - r, k, rng)
        BBt = B.transpose(0, 2, 1) @ B + _wisharts(count, m - r, k, rng)
        inner = (A * B).sum(axis=2) @ s
        cosines.append(inner / (norm * np.sqrt((AtA * BBt).sum(axis=(1, 2)))))
    return np.clip(np.concatenate(cosines), -1.0, 1.0)


def _wisharts(count: int, freedom: int, k: int, rng: np.random.Generator) -> Array:
    """``(count, k, k)`` matrices XᵀX, X Gaussian ``(freedom, k)``; by Cholesky factors (Bartlett) where smaller."""
    if freedom < k:
        X = rng.standard_normal((count, freedom, k))
        return np.asarray(X.transpose(0, 2, 1) @ X)
    L = np.tril(rng.standard_normal((count, k, k)), -1)
    places = np.arange(k)
    L[:, places, places] = np.sqrt(rng.chisquare(np.arange(freedom, freedom - k, -1), size=(count, k)))
    return np.asarray(L @ L.transpose(0, 2, 1))


# --- columns and rows ---------------------------------------------------------------------------------------------


def column_scores(gram: Gram, s: Array, Vt: Array, k: int) -> dict[str, Array]:
    """Scores ``(d_in,)`` of the columns by name. ``leverage_col`` is the published definition, Σ_i s_i²V_ij² over all
    i: it equals the column's energy, so it ranks exactly as magnitude does."""
    return {
        "leverage_col": gram.column_energy,
        "topk_energy_col": ch.topk_column_energy(s, Vt, k),
        "leverage_score_col": ch.leverage_scores(Vt, k),
    }


def column_errors(
    W: Array, gram: Gram, scores: Mapping[str, Array], count: int, room: int, top: float, likely: Array
) -> dict[str, float]:
    """Errors of keeping ``count`` (equal budget: ``room``) columns by each score.

    ``top`` is the spectral norm of W, ``likely (r,)`` the top eigenvector of its Gram matrix.
    """
    errors = {}
    energy = gram.column_energy
    for name, score in scores.items():
        kept_columns = ch.top_channels(score, count)
        errors[f"{name}_err"] = float(rec.subset_error(energy, kept_columns))
        errors[f"{name}_proj_err"] = projection_error(W, gram, kept_columns)
        errors[f"{name}_spectral_err"] = dropped_norm(W, gram, kept_columns, True, likely) / top if top > 0 else 0.0
        errors[f"{name}_eqb_err"] = float(rec.subset_error(energy, ch.top_channels(score, room)))
    return errors


def random_column_errors(W: Array, gram: Gram, count: int, room: int, rng: np.random.Generator) -> dict[str, float]:
    """Mean and std of keeping random columns: `DRAWS` draws, `PROJECTION_DRAWS` of them projected on.

    With them the exact √(E err²), which is √(1 − share kept) whatever the matrix.
    """
    energy = gram.column_energy
    kept_columns = random_subsets(rng, len(energy), count)
    projected = np.array([projection_error(W, gram, np.sort(some)) for some in kept_columns[:PROJECTION_DRAWS]])
    return {
        **_mean_std("random_colprune_err", _draw_errors(energy, kept_columns)),
        "random_colprune_err_rms_expected": math.sqrt(1 - count / len(energy)),
        **_mean_std("random_colprune_proj_err", projected),
        **_mean_std("random_colprune_eqb_err", _draw_errors(energy, random_subsets(rng, len(energy), room))),
    }


def row_errors(
    W: Array, gram: Gram, count: int, room: int, top: float, likely: Array, rng: np.random.Generator
) -> dict[str, float]:
    """Errors of keeping ``count`` (equal budget: ``room``) rows by magnitude, and by chance; see `column_errors`."""
    energy = gram.row_energy
    kept_rows = ch.top_channels(energy, count)
    return {
        "mag_row_err": float(rec.subset_error(energy, kept_rows)),
        "mag_row_spectral_err": dropped_norm(W, gram, kept_rows, False, likely) / top if top > 0 else 0.0,
        "mag_row_eqb_err": float(rec.subset_error(energy, ch.top_channels(energy, room))),
        **_mean_std("random_rowprune_err", _draw_errors(energy, random_subsets(rng, len(energy), count))),
        **_mean_std("random_rowprune_eqb_err", _draw_errors(energy, random_subsets(rng, len(energy), room))),
    }


def control_errors(gram: Gram, count: int, rng: np.random.Generator) -> dict[str, float]:
    """Positive control: this layer with a random tenth of its columns doubled. A score worth anything finds them."""
    energy = gram.column_energy.copy()
    planted = rng.permutation(len(energy))[: max(1, len(energy) // 10)]
    energy[planted] *= 4
    by_chance = _draw_errors(energy, random_subsets(rng, len(energy), count))
    return {
        "control_col_err": float(rec.subset_error(energy, ch.top_channels(energy, count))),
        "control_random_err": float(by_chance.mean()),
    }


def random_subsets(rng: np.random.Generator, n: int, k: int) -> Index:
    """`DRAWS` uniform k-subsets of range(n), ``(DRAWS, k)``."""
    return np.argpartition(rng.random((DRAWS, n)), k - 1, axis=1)[:, :k]


def random_subset_curve(energy: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Mean and std over `DRAWS` draws of the error of keeping k random parts, each ``(n + 1,)`` for k = 0..n.

    Args:
        energy: squared norm of each part, ``(n,)``; not all zero.
    """
    order = rng.permuted(np.broadcast_to(energy, (DRAWS, len(energy))), axis=1)
    left = np.zeros((DRAWS, len(energy) + 1))
    left[:, :-1] = np.cumsum(order[:, ::-1], axis=1)[:, ::-1]
    error = np.sqrt(left / energy.sum())
    return error.mean(axis=0), error.std(axis=0, ddof=1)


def _draw_errors(energy: Array, subsets: Index) -> Array:
    return np.asarray(rec.subset_error(np.broadcast_to(energy, (len(subsets), len(energy))), subsets))


def _mean_std(name: str, values: Array) -> dict[str, float]:
    return {name: float(values.mean()), f"{name}_std": float(values.std(ddof=1))}


def projection_error(W: Array, gram: Gram, kept_columns: Index) -> float:
    """‖W − C C⁺W‖_F / ‖W‖_F, C the kept columns ``(c,)`` of W, whichever side its Gram matrix is of."""
    if gram.of_columns:
        return float(rec.projection_error(gram.G, kept_columns))
    return rec.span_error(W[:, kept_columns], gram.G)


def dropped_norm(W: Array, gram: Gram, kept_channels: Index, columns: bool, likely: Array) -> float:
    """‖W without the kept columns (or rows)‖₂, from the Gram matrix of W's small side.

    ``likely (r,)`` is the top eigenvector of that Gram matrix, which is never far from what is left of it.
    """
    if columns == gram.of_columns:
        mask = np.ones(len(gram.G), dtype=bool)
        mask[kept_channels] = False
        left, likely = gram.G[mask][:, mask], likely[mask]
    else:
        # The small side is the other one: what is kept is taken off its Gram matrix.
        left = gram.G.copy()
        step = max(1, _BLOCK // len(left))
        for start in range(0, len(kept_channels), step):
            part = kept_channels[start : start + step]
            block = np.asarray(W[:, part] if columns else W[part].T, dtype=np.float64)
            left -= block @ block.T
    return float(np.sqrt(max(0.0, spectra.largest_eigenvalue(left, likely))))
