"""One layer of a model, measured: a row of the results table, its spectrum, and that of a Gaussian matrix."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparselora.inspection import predictors as pred
from sparselora.models.weights import MatrixInfo, UnmeasuredTensor
from sparselora.numerics import channels as ch
from sparselora.numerics import reconstruction as rec
from sparselora.numerics import spectra
from sparselora.numerics.spectra import Spectrum

Array = NDArray[np.floating]

TOP_VALUES = 10
CURVE_POINTS = 64


# --- what a name says about a layer -------------------------------------------------------------------------------


def layer_type(name: str) -> str:
    """Return the name without its place in the stack: ``encoder.layer.3.output.dense.weight`` → ``output.dense``."""
    short = re.sub(r"\.weight$", "", name)
    short = re.sub(r"^.*?\.\d+\.", "", short)
    return re.sub(r"\d+", "*", short)


def depth(name: str) -> int | None:
    """Return the number of the layer in the stack; None where the name has none."""
    match = re.search(r"\.([0-9]{1,9})\.", name)
    return int(match.group(1)) if match else None


def family(name: str) -> str:
    """Return attention, feed-forward, embedding or other, for the colours of the overview."""
    if re.search(r"embed|\bwte\b|\bwpe\b|lm_head", name):
        return "embedding"
    if re.search(r"attn|attention", name):
        return "attention"
    if re.search(r"mlp|ffn|intermediate|output\.dense|fc\d?|experts", name):
        return "feed-forward"
    return "other"


# --- one layer ----------------------------------------------------------------------------------------------------


class Timings(dict[str, float]):
    """Milliseconds by name, added up over the blocks measured."""

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self[name] = self.get(name, 0.0) + 1e3 * (time.perf_counter() - began)


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement of a layer.

    Attributes:
        rank: k of the approximations; where it reaches min(W.shape) the layer is marked ``full_rank``.
        keep_ratio: share of the columns or rows that is kept.
        targets: relative errors whose least rank is wanted.
        seed: with the layer's name, it decides every random draw.
        method: one of `sparselora.numerics.spectra.METHODS`; ``randomized`` leaves what needs the whole spectrum empty.
    """

    rank: int
    keep_ratio: float
    targets: tuple[float, ...]
    seed: int
    method: str = "gram64"


class Measured(NamedTuple):
    """The figures of one weight, as columns of the results table, and the spectra behind them."""

    figures: dict[str, object]
    s: Array
    """Singular values, descending: ``(r,)``, or the top k of them if the spectrum is randomized."""
    null_energy: Array
    """Energy in the top 0..r singular values of a Gaussian matrix of this shape, ``(r + 1,)``."""


def measure_layer(W: Array, name: str, settings: Settings) -> Measured:
    """Measure every predictor on one weight ``W (d_out, d_in)``; its ``name`` decides the random draws."""
    n, m = W.shape
    k = min(settings.rank, n, m)
    clock, rngs = Timings(), pred.layer_streams(settings.seed, name)
    null_energy = spectra.gaussian_energy(n, m, settings.seed)
    with clock.measure("svd_ms"):
        gram = spectra.gram(W)
    with spectra.blas_threads(min(n, m)):
        with clock.measure("svd_ms"):
            if settings.method == "randomized":
                spectrum, U, Vt = spectra.randomized_spectrum(W, k, rngs["randomized"])
                likely = Vt[0] if gram.of_columns else U[:, 0]
            else:
                values, vectors = spectra.eigen(gram.G, k)
                spectrum = spectra.from_gram(W, gram, values, settings.method)
                Vt, likely = pred.right_vectors(W, gram, values, vectors), vectors[:, 0]
        s, top = spectrum.s, float(spectrum.s[0])
        columns, rows = ch.keep_count(m, settings.keep_ratio), ch.keep_count(n, settings.keep_ratio)
        column_room, row_room = (max(1, rec.equal_storage_columns(*shape, k)) for shape in ((n, m), (m, n)))
        row: dict[str, object] = {"k_used": k, "full_rank": k == min(n, m), "fro_norm": float(np.sqrt(gram.total))}
        with clock.measure("recon_ms"):
            row |= pred.low_rank_errors(spectrum, k)
        if spectrum.complete:
            with clock.measure("rand_sub_ms"):
                row |= pred.random_subspace_errors(s, k, rngs["rand_svd_subspace"])
            with clock.measure("rand_ab_ms"):
                row |= pred.random_product_errors(s, n, m, k, rngs["random_AB"])
        with clock.measure("leverage_ms"):
            row |= pred.column_errors(W, gram, pred.column_scores(gram, s, Vt, k), columns, column_room, top, likely)
        with clock.measure("mag_ms"):
            row |= pred.row_errors(W, gram, rows, row_room, top, likely, rngs["random_rowprune"])
        row |= pred.random_column_errors(W, gram, columns, column_room, rngs["random_colprune"])
        row |= pred.control_errors(gram, columns, rngs["control"])
    row["mag_col_err"] = row["leverage_col_err"]
    row["mag_best_err"] = min(float(str(row[f"mag_{side}_err"])) for side in ("col", "row"))
    row |= {
        "params_svd_topk": rec.factor_params(n, m, k),
        "params_random_AB": rec.factor_params(n, m, k),
        "nnz_mag_col": n * columns,
        "nnz_mag_row": m * rows,
        "cols_kept": columns,
        "rows_kept": rows,
        "cols_equal_budget": column_room,
        "rows_equal_budget": row_room,
        "nnz_equal_budget": n * column_room,
    }
    row |= spectrum_figures(spectrum, n, m, k, null_energy)
    row |= least_ranks(spectrum, n, m, settings.targets)
    return Measured(row | dict(clock), s, null_energy)


def spectrum_figures(spectrum: Spectrum, n: int, m: int, k: int, null_energy: Array) -> dict[str, object]:
    """Return the figures of the spectrum alone: ranks, tail exponent, random bulk, and the energy in the top k next
    to that of a Gaussian matrix."""
    s, null = spectrum.s, float(null_energy[k])
    held = float(np.sum(s[:k] ** 2) / spectrum.total)
    figures: dict[str, object] = {
        "topk_energy_gaussian": null,
        "topk_energy_over_gaussian": held / null,
        "spectral_norm": float(s[0]),
        "stable_rank": spectrum.total / float(s[0]) ** 2,
        "spectrum_method": spectrum.method,
        "spectrum_error_bound": spectrum.error_bound,
    }
    if spectrum.complete:
        tail, bulk = spectra.power_law(s), spectra.marchenko_pastur(s, n, m)
        figures |= {
            "effective_rank": spectra.effective_rank(s),
            "entropy": spectra.relative_entropy(s, max(n, m)),
            "matrix_rank": spectra.matrix_rank(s, max(n, m)),
            "condition": spectra.condition(s),
            "alpha": tail.alpha,
            "alpha_x_min": tail.x_min,
            "alpha_distance": tail.distance,
            "alpha_n_tail": tail.n_tail,
            "mp_edge": bulk.edge,
            "mp_sigma": bulk.sigma,
            "mp_spikes": bulk.spikes,
        }
    return figures


def least_ranks(spectrum: Spectrum, n: int, m: int, targets: Sequence[float]) -> dict[str, object]:
    """Return for each target error the least rank below it, and the storage of its factors relative to the matrix.

    Above 1 the factors are bigger than the matrix they replace.
    """
    ranks: dict[str, object] = {}
    for target in targets:
        rank = rec.optimal_rank(spectrum.s, target) if spectrum.complete else None
        ranks[f"rank_at_{target:g}"] = rank
        ranks[f"stored_at_{target:g}"] = None if rank is None else rec.factor_params(n, m, rank) / (n * m)
    return ranks


# --- as a record --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerRecord:
    """A layer in the results.

    Attributes:
        row: of the results table, in types that JSON and CSV write alike.
        curve: spectrum, energy and null at a fixed number of places; None if they were not measured whole.
        s: singular values ``(r,)``, descending; None where nothing was measured, or in a record that was read back.
        null: the same of a Gaussian matrix of this shape and Frobenius norm (root mean square over draws).
    """

    row: dict[str, Any]
    curve: dict[str, list[float]] | None = None
    s: Array | None = None
    null: Array | None = None


def skipped_layer(info: MatrixInfo, reason: str, seed: int) -> LayerRecord:
    """Return the record of a matrix that is not measured, with the reason."""
    return LayerRecord(_description(info, seed, reason))


def unmeasured_row(tensor: UnmeasuredTensor, seed: int) -> dict[str, Any]:
    """Return the row of a tensor that is no matrix."""
    shape = "x".join(map(str, tensor.shape))
    row = {"param": tensor.name, "shape": shape, "skipped": tensor.reason, "seed": seed, "dtype": tensor.dtype}
    return row | {"layer_type": layer_type(tensor.name), "family": family(tensor.name), "depth": depth(tensor.name)}


def inspect_layer(W: Array, info: MatrixInfo, settings: Settings) -> LayerRecord:
    """Measure one weight ``W (d_out, d_in)`` of a model, listed as ``info``."""
    row = _description(info, settings.seed)
    if not W.any():
        return LayerRecord(row | {"skipped": "all values are zero"})
    figures, s, null_energy = measure_layer(W, info.name, settings)
    row |= {name: round(_plain(value), 3) if name.endswith("_ms") else _plain(value) for name, value in figures.items()}
    row["top_singular_values"] = json.dumps([float(value) for value in s[:TOP_VALUES]])
    curve = _curve(s, null_energy) if settings.method != "randomized" else None
    return LayerRecord(row, curve, s, null_spectrum(null_energy, row["fro_norm"]))


def null_spectrum(null_energy: Array, fro_norm: float) -> Array:
    """Return the singular values ``(r,)`` of a Gaussian matrix of this norm from its cumulative energy ``(r + 1,)``."""
    return np.asarray(np.sqrt(np.diff(null_energy)) * fro_norm)


def _description(info: MatrixInfo, seed: int, reason: str = "") -> dict[str, Any]:
    n, m = info.shape
    return {
        "param": info.name, "shape": f"{n}x{m}", "skipped": reason, "seed": seed, "n": n, "m": m, "dtype": info.dtype,
        "layer_type": layer_type(info.name), "family": family(info.name), "depth": depth(info.name),
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """Return a Python value that JSON and CSV write the same way; what is not a finite number is empty."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _curve(s: Array, null_energy: Array) -> dict[str, list[float]]:
    """Return spectrum, energy and null at a fixed number of places, so that no more is kept for the overview."""
    r = len(s)
    places = np.unique(np.linspace(0, r - 1, CURVE_POINTS).round().astype(int))
    energy = np.cumsum(s**2) / np.sum(s**2)
    curve = {
        "fraction": (places + 1) / r,
        "s_over_s1": s[places] / s[0],
        "energy": energy[places],
        "energy_gaussian": null_energy[1:][places],
    }
    return {name: [float(value) for value in values] for name, values in curve.items()}
