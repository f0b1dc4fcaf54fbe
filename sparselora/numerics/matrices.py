"""Families of random matrices whose structure is known: where a study can tell whether a signal helps.

Each function draws one ``(n, m)`` float64 matrix from a generator. Entries have unit variance or a stated scale; the
relative errors of every study do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from sparselora.errors import InputError, shown

Matrix = NDArray[np.float64]


def gaussian(rng: np.random.Generator, n: int, m: int) -> Matrix:
    """Independent N(0, 1): no structure at all, the null every other family is read against."""
    return rng.standard_normal((n, m))


def lowrank(rng: np.random.Generator, n: int, m: int, true_rank: int, noise: float) -> Matrix:
    """A B / √true_rank + noise·N(0, 1), A ``(n, true_rank)``, B ``(true_rank, m)``: a simulated network weight.

    The product's entries have unit variance, so ``noise`` is relative to the signal; 0 makes the rank exact.
    """
    signal = rng.standard_normal((n, true_rank)) @ rng.standard_normal((true_rank, m)) / np.sqrt(true_rank)
    return signal + noise * rng.standard_normal((n, m))


def powerlaw(rng: np.random.Generator, n: int, m: int, decay: float) -> Matrix:
    """U diag(i^−decay) Vᵀ with Haar-random frames: the smooth spectrum that trained layers show."""
    s = np.arange(1, min(n, m) + 1, dtype=np.float64) ** -decay
    return (_frame(rng, n, s.size) * s) @ _frame(rng, m, s.size).T


def _frame(rng: np.random.Generator, n: int, r: int) -> Matrix:
    """r orthonormal columns in n dimensions, uniformly distributed: the signs of R make QR's choice unique."""
    Q, R = np.linalg.qr(rng.standard_normal((n, r)))
    return Q * np.sign(np.diagonal(R))


def planted(
    rng: np.random.Generator, n: int, m: int, planted_columns: int, planted_rank: int, strength: float
) -> Matrix:
    """N(0, 1) noise, and a rank-``planted_rank`` signal in ``planted_columns`` random columns.

    The signal's entries have standard deviation ``strength``: how far the columns worth keeping stand out.
    """
    W = rng.standard_normal((n, m))
    columns = rng.permutation(m)[:planted_columns]
    factors = rng.standard_normal((n, planted_rank)) @ rng.standard_normal((planted_rank, planted_columns))
    W[:, columns] += strength / np.sqrt(planted_rank) * factors
    return W


LARGEST_SIDE = 1 << 15
"""Limit on n and m: the Gram matrix of that side has 8 GB."""
LARGEST_STRENGTH = 1e6
"""Limit on noise, decay and strength: squares and their sums stay far from overflow."""

FAMILIES: dict[str, Callable[..., Matrix]] = {
    "gaussian": gaussian,
    "lowrank": lowrank,
    "powerlaw": powerlaw,
    "planted": planted,
}
"""Family name → generator; called as ``FAMILIES[name](rng, n, m, **parameters)``."""

PARAMETERS: dict[str, dict[str, int | float]] = {
    "gaussian": {},
    "lowrank": {"true_rank": 64, "noise": 0.01},
    "powerlaw": {"decay": 1.0},
    "planted": {"planted_columns": 16, "planted_rank": 4, "strength": 3.0},
}
"""The parameters of each family and their defaults."""


def family_parameters(family: str, n: int, m: int, values: Mapping[str, int | float | None]) -> dict[str, int | float]:
    """The family's parameters: those ``values`` (None is not given), defaults for the rest.

    Raises:
        InputError: a parameter of another family, or one that an ``(n, m)`` matrix cannot have; n or m above
            `LARGEST_SIDE`.
    """
    for name, size in (("n", n), ("m", m)):
        if size > LARGEST_SIDE:
            raise InputError(f"--{name} must be at most {LARGEST_SIDE:,}, got {shown(size)}")
    resolved = dict(PARAMETERS[family])
    for name, value in values.items():
        if value is None:
            continue
        if name not in resolved:
            owner = next(other for other, names in PARAMETERS.items() if name in names)
            raise InputError(f"--{name} belongs to --matrix {owner}, got --matrix {family}; drop one of the two")
        resolved[name] = value
    for name, most, of in (
        ("true_rank", min(n, m), "min(n, m)"),
        ("planted_columns", m, "m"),
        ("planted_rank", min(n, m), "min(n, m)"),
    ):
        if name in resolved and not 1 <= resolved[name] <= most:
            raise InputError(f"--{name} must be between 1 and {of} = {most}, got {resolved[name]}")
    for name in ("noise", "decay", "strength"):
        if name in resolved and not 0 <= resolved[name] <= LARGEST_STRENGTH:
            raise InputError(
                f"--{name} must be a finite number between 0 and {LARGEST_STRENGTH:g}, got {resolved[name]}"
            )
    return resolved
