"""All predictors on one layer, as curves and bars: the data of a figure in panels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sparselora.inspection import predictors as pred
from sparselora.inspection.layer import CURVE_POINTS, Array, Settings, null_spectrum
from sparselora.numerics import channels as ch
from sparselora.numerics import reconstruction as rec
from sparselora.numerics import spectra


def experiment_table(W: Array, name: str, row: dict[str, Any], settings: Settings) -> pd.DataFrame:
    """Return the curves and bars of one layer: panel, series, x, mean, std over draws, n draws (1: nothing random).

    Args:
        W: the weight, ``(d_out, d_in)``.
        name: of the weight.
        row: of the results table; the layer must not be of full rank.
        settings: of the measurement; whole spectra.
    """
    from sparselora.report.inspection import PREDICTOR_LABELS

    m, k = W.shape[1], row["k_used"]
    with spectra.blas_threads(min(W.shape)):
        gram = spectra.gram(W)
        values, vectors = spectra.eigen(gram.G, k)
        s = spectra.from_gram(W, gram, values, settings.method).s
        Vt = pred.right_vectors(W, gram, values, vectors)
    points: list[tuple[str, str, float, float, float | None, int]] = []
    null = null_spectrum(spectra.gaussian_energy(*W.shape, settings.seed), row["fro_norm"])
    for series, spectrum in (("this layer", s), ("Gaussian, same norm", null)):
        points += [("spectrum", series, i + 1, float(value), None, 1) for i, value in enumerate(spectrum)]
    tails = {"SVD": rec.relative_tail(s), "Gaussian, SVD": rec.relative_tail(null)}
    rngs = pred.layer_streams(settings.seed, name)
    mean, std = pred.random_subset_curve(s**2, rngs["rand_svd_subspace"])
    for rank in np.unique(np.linspace(0, len(s), CURVE_POINTS + 1).round().astype(int)).tolist():
        points += [("rank", series, rank, float(tail[rank]), None, 1) for series, tail in tails.items()]
        points.append(("rank", "random triplets", rank, float(mean[rank]), float(std[rank]), pred.DRAWS))
    scores = pred.column_scores(gram, s, Vt, k)
    mean, std = pred.random_subset_curve(gram.column_energy, rngs["random_colprune"])
    for share in np.linspace(0.05, 1, 20).round(2).tolist():
        count = ch.keep_count(m, share)
        for label, score in zip(("magnitude", "top-k energy", "leverage score"), scores.values()):
            error = float(rec.subset_error(gram.column_energy, ch.top_channels(score, count)))
            points.append(("columns", label, share, error, None, 1))
        points.append(("columns", "random", share, float(mean[count]), float(std[count]), pred.DRAWS))
    for predictor in PREDICTOR_LABELS:
        spread = row.get(f"{predictor}_std")
        points.append(("predictors", predictor, k, row[predictor], spread, 1 if spread is None else pred.DRAWS))
    return pd.DataFrame(points, columns=["panel", "series", "x", "mean", "std", "n"])
