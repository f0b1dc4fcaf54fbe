"""Rescale the singular values of one module's update by how the loss reacts to them: pure functions over arrays.

Statistics of a direction i are taken on a calibration set: ``mean`` g_i = ∂L/∂σ_i with its sign, ``mean_abs`` the mean
of |∂L/∂σ_i|, ``fisher`` the mean of its square. A mode in `MODES` maps them to new singular values and to a role.

What holds for every mode: a direction of sigma 0 stays 0, has the role ``zero`` and takes part in no count. Directions
of equal sigma (relative 1e-9) span a space of which the SVD picks any basis, so they share the mean of their statistics
and, except for `random_index` and `damp_intruders`, of the factors they are multiplied with. Ties are stable: the lower
index, the larger sigma, ranks first. Statistics that are all zero say nothing and are refused, not resolved by index.
Energy is restored before negative values are clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparselora.errors import InputError, suggest
from sparselora.numerics.channels import keep_count

Array = NDArray[np.float64]
Roles = NDArray[np.str_]

CORE, MID, NOISE, ZERO = ROLES = ("core", "mid", "noise", "zero")
UPDATE_MODES = ("multiplicative", "additive")

_TIE = 1e-9
_MOST_DRAWS = 1000


# --- options and results ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditOptions:
    """Numbers of an edit, whatever its mode; a mode reads the fields that concern it.

    Attributes:
        core_frac, noise_frac: shares of the live directions that are core and noise, counted by `keep_count` (0 is
            none); where both round up past the end, core is served first.
        amp_factor, mid_factor, sup_factor: factors of core, the rest and noise.
        eta: step of `gd` along the gradient divided by its largest magnitude in the module.
        update_mode: ``multiplicative`` σ·exp(−eta·g̃), or ``additive`` σ − eta·σ̄·g̃ with σ̄ the module's mean sigma, so
            that one eta means the same on adapters of any size.
        asymmetric_update: step eta_pos where g > 0 (sigma shrinks) and eta_neg where g < 0 (sigma grows), not eta.
        smooth_width: width of the two transitions of `smooth_abs`, as a share of the directions.
        z_threshold: standard deviations from the mean at which `z_score` calls a direction core or noise.
        intruder_k, intruder_cosine: `damp_intruders` looks at the first intruder_k left singular vectors of W0 + ΔW and
            takes those whose largest cosine with any of W0's is below intruder_cosine.
        preserve_energy: ``l1`` restores Σ|σ|, ``l2`` restores Σσ², ``none`` neither.

    Raises:
        InputError: a value out of its range.
    """

    core_frac: float = 0.2
    noise_frac: float = 0.2
    amp_factor: float = 1.25
    sup_factor: float = 0.80
    mid_factor: float = 1.0
    eta: float = 0.2
    update_mode: str = "multiplicative"
    asymmetric_update: bool = False
    eta_pos: float = 0.2
    eta_neg: float = 0.2
    smooth_width: float = 0.1
    z_threshold: float = 1.0
    intruder_k: int = 10
    intruder_cosine: float = 0.5
    preserve_energy: str = "none"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type != "float":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise InputError(f"{field.name} must be a finite number of 0 or more, got {value!r}")
            if field.name.endswith("_frac") and value > 1:
                raise InputError(f"{field.name} must be between 0 and 1, got {value}; 0.2 is a fifth of the directions")
        if self.core_frac + self.noise_frac > 1 + 1e-9:
            raise InputError(
                f"core_frac + noise_frac must be at most 1, got {self.core_frac} + {self.noise_frac}; "
                "no direction can be both"
            )
        if isinstance(self.intruder_k, bool) or not isinstance(self.intruder_k, int) or self.intruder_k < 1:
            raise InputError(f"intruder_k must be a whole number of 1 or more, got {self.intruder_k!r}; 10 is usual")
        if not 0 < self.intruder_cosine <= 1:
            raise InputError(f"intruder_cosine must be above 0 and at most 1, got {self.intruder_cosine}; 0.5 is usual")
        if self.smooth_width == 0:
            raise InputError("smooth_width must be above 0; mode abs_select has sharp transitions")
        _choose("update_mode", self.update_mode, UPDATE_MODES)
        _choose("preserve_energy", self.preserve_energy, ENERGIES)


@dataclass(frozen=True)
class EditResult:
    """New values ``sigma (r,)``, one of `ROLES` per direction, and the l2 norm of the change that was made."""

    sigma: Array
    role: Roles
    change_l2: float

    def count(self, role: str) -> int:
        return int((self.role == role).sum())


@dataclass(frozen=True)
class PredictedChange:
    """ΔL of an edit: ``first`` order Σ g·Δσ, and ``second`` order with ½ Σ F·Δσ², F standing in for the curvature."""

    first: float
    second: float


@dataclass(frozen=True)
class _Live:
    """The directions with sigma > 0, n of them; tied ones (equal ``group``) already share their statistics.

    ``is_intruder`` is None where the decomposition of ΔW does not set intruder dimensions apart.
    """

    sigma: Array
    mean: Array
    mean_abs: Array
    fisher: Array
    group: NDArray[np.intp]
    is_intruder: NDArray[np.bool_] | None = None

    def shared(self, values: Array) -> Array:
        """``values (n,)`` with each group's mean in all its places."""
        return (np.bincount(self.group, values) / np.bincount(self.group))[self.group]

    def together(self, new: Array) -> Array:
        """``new (n,)`` with tied directions multiplied by the mean of their factors; all others as they are."""
        tied = np.bincount(self.group)[self.group] > 1
        return np.where(tied, self.sigma * self.shared(new / self.sigma), new)


def _choose(name: str, value: str, accepted: tuple[str, ...] | dict[str, Any]) -> None:
    if value not in accepted:
        raise InputError(f"{name} must be one of {', '.join(accepted)}, got {value!r}{suggest(str(value), accepted)}")


# --- modes --------------------------------------------------------------------------------------------------------

Generator = np.random.Generator | None
Mode = Callable[[_Live, EditOptions, Generator], tuple[Array, Roles]]
"""(live directions, options, generator) → (their new sigma, their roles)."""


def abs_select(live: _Live, options: EditOptions, generator: Generator) -> tuple[Array, Roles]:
    """The largest mean |g| are core (× amp_factor), the smallest noise (× sup_factor), the rest × mid_factor."""
    _refuse_silent(live.mean_abs, "mean_abs")
    return _scale(live, _by_order(_descending(live.mean_abs), options), options)


def random_index(live: _Live, options: EditOptions, generator: Generator) -> tuple[Array, Roles]:
    """The counts and factors of `abs_select` on directions drawn by ``generator``: the null of every selection."""
    if generator is None:
        raise InputError("mode random_index needs a generator")
    return _scale(live, _by_order(generator.permutation(len(live.sigma)), options), options)


def fisher(live: _Live, options: EditOptions, generator: Generator) -> tuple[Array, Roles]:
    """`abs_select` by `removal_cost`: core costs most to remove, noise least (below 0 its removal lowers the loss)."""
    _refuse_silent(np.concatenate([live.mean, live.fisher]), "mean and fisher")
    cost = removal_cost(live.sigma, live.mean, live.fisher)
    return _scale(live, _by_order(_descending(live.shared(cost)), options), options)


def z_score(live: _Live, options: EditOptions, generator: Generator) -> tuple[Array, Roles]:
    """Core and noise are where mean |g| is z_threshold standard deviations above and below the module's mean.

    How many there are is the data's choice; none where all are equal.
    """
    _refuse_silent(live.mean_abs, "mean_abs")
    away = live.mean_abs - live.mean_abs.mean()
    limit = options.z_threshold * away.std()
    # Equal values differ from their mean by rounding.
    flat = np.abs(away) <= 1e-12 * live.mean_abs.max()
    role = np.where(flat, MID, np.where(away >= limit, CORE, np.where(away <= -limit, NOISE, MID)))
    return _scale(live, role, options)


def smooth_abs(live: _Live, options: EditOptions, generator: Generator) -> tuple[Array, Roles]:
    """`abs_select` with soft edges: the factor goes from sup over mid to amp along the rank of mean |g|.

    At p in (0, 1), the share of directions below, it is mid + (amp − mid)·S((p − p_core)/w) + (sup − mid)·S((p_noise −
    p)/w), where S is the logistic function and p_core, p_noise are where `abs_select` draws its lines; as the width w
    goes to 0 it becomes `abs_select`.
    """
    _refuse_silent(live.mean_abs, "mean_abs")
    n = len(live.sigma)
    order = _descending(live.mean_abs)
    role = _by_order(order, options)
    above = np.empty(n)
    above[order] = np.arange(n)
    p = 1 - (above + 0.5) / n
    p_core, p_noise = 1 - (role == CORE).mean(), (role == NOISE).mean()
    up = _logistic((p - p_core) / options.smooth_width) if CORE in role else np.zeros(n)
    down = _logistic((p_noise - p) / options.smooth_width) if NOISE in role else np.zeros(n)
    mid = options.mid_factor
    factor = mid + (options.amp_factor - mid) * up + (options.sup_factor - mid) * down
    return live.sigma * np.maximum(factor, 0.0), role


def gd(live: _Live, options: EditOptions, generator: Generator) -> tuple[Array, Roles]:
    """One step down the signed gradient, g̃ = g / max |g|. Core grows (g < 0), noise shrinks (g > 0).

    See `EditOptions` for the step sizes; an additive step can pass 0, and is clipped there.
    """
    _refuse_silent(live.mean, "mean")
    g = live.mean / np.abs(live.mean).max()
    eta: Array | float = options.eta
    if options.asymmetric_update:
        eta = np.where(g > 0, options.eta_pos, options.eta_neg)
    if options.update_mode == "additive":
        new = live.sigma - eta * live.sigma.mean() * g
    else:
        new = live.sigma * np.exp(-eta * g)
    return new, np.where(g < 0, CORE, np.where(g > 0, NOISE, MID))


def damp_intruders(live: _Live, options: EditOptions, generator: Generator) -> tuple[Array, Roles]:
    """The part of ΔW along the intruder dimensions of W0 + ΔW is noise (× sup_factor), the rest stays.

    The decomposition decides which these are, see `sparselora.spectral.intruders`; no statistic is read.
    """
    if live.is_intruder is None:
        raise InputError("mode damp_intruders needs a decomposition that sets intruder dimensions apart")
    role = np.where(live.is_intruder, NOISE, MID)
    return np.where(live.is_intruder, live.sigma * options.sup_factor, live.sigma), role


MODES: dict[str, Mode] = {
    "abs_select": abs_select,
    "random_index": random_index,
    "gd": gd,
    "smooth_abs": smooth_abs,
    "z_score": z_score,
    "fisher": fisher,
    "damp_intruders": damp_intruders,
}

NEEDS_BASE = frozenset({"damp_intruders"})
"""Modes whose directions depend on the base weights, too."""

_BY_DIRECTION = frozenset({random_index, damp_intruders})
"""Modes that do not treat tied directions alike: they go by what a direction is, not by its statistics."""


def removal_cost(sigma: ArrayLike, mean: ArrayLike, fisher: ArrayLike) -> Array:
    """Predicted ΔL when sigma_i becomes 0, −σg + σ²F/2 per direction ``(r,)``."""
    s, g, F = (np.asarray(values, dtype=np.float64) for values in (sigma, mean, fisher))
    return np.asarray(-s * g + s**2 * F / 2)


def _refuse_silent(values: Array, name: str) -> None:
    if not values.any():
        raise InputError(
            f"the calibration gradients ({name}) are all zero, so they rank nothing; "
            "calibrate on examples that reach this module, or leave it out"
        )


def _descending(scores: Array) -> NDArray[np.intp]:
    return np.argsort(-scores, kind="stable")


def _count(n: int, share: float) -> int:
    return keep_count(n, share) if share > 0 else 0


def _by_order(order: NDArray[np.intp], options: EditOptions) -> Roles:
    """Roles of n directions from their ranking, the most important first."""
    n = len(order)
    core = _count(n, options.core_frac)
    noise = min(_count(n, options.noise_frac), n - core)
    role = np.full(n, MID, dtype="<U5")
    role[order[:core]] = CORE
    role[order[n - noise :]] = NOISE
    return role


def _scale(live: _Live, role: Roles, options: EditOptions) -> tuple[Array, Roles]:
    factor = {CORE: options.amp_factor, MID: options.mid_factor, NOISE: options.sup_factor}
    return live.sigma * np.array([factor[str(name)] for name in role]), role


def _logistic(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


# --- the edit -----------------------------------------------------------------------------------------------------


def edit_spectrum(
    mode: str,
    sigma: ArrayLike,
    mean: ArrayLike,
    mean_abs: ArrayLike,
    fisher: ArrayLike,
    options: EditOptions,
    generator: Generator = None,
    is_intruder: NDArray[np.bool_] | None = None,
) -> EditResult:
    """New singular values of one module.

    Args:
        mode: a key of `MODES`.
        sigma: ``(r,)``, 0 or more, as `factors.adapter_svd` gives them.
        mean, mean_abs, fisher: statistics ``(r,)`` of ∂L/∂σ; see the module's docstring.
        generator: what `random_index` draws from.
        is_intruder: ``(r,)``, what `damp_intruders` damps; None where the decomposition does not say.
    Raises:
        InputError: an unknown mode; arrays of other lengths or with NaN or infinite values; statistics that the mode
            needs and that are all zero; an energy that cannot be restored because nothing is left.
    """
    _choose("mode", mode, MODES)
    inputs = {"sigma": sigma, "mean": mean, "mean_abs": mean_abs, "fisher": fisher}
    s, *statistics = (_vector(name, values) for name, values in inputs.items())
    if any(len(values) != len(s) for values in statistics):
        raise InputError(f"sigma has {len(s)} values, its statistics {', '.join(str(len(v)) for v in statistics)}")
    if (s < 0).any():
        raise InputError(f"sigma must be 0 or more, got {s.min()}")
    alive = s > 0
    new, role = np.zeros_like(s), np.full(len(s), ZERO, dtype="<U5")
    if alive.any():
        live = _live(s[alive], *(values[alive] for values in statistics))
        live = replace(live, is_intruder=None if is_intruder is None else is_intruder[alive])
        moved, role[alive] = MODES[mode](live, options, generator)
        if MODES[mode] not in _BY_DIRECTION:
            moved = live.together(moved)
        new[alive] = np.maximum(_restored(live.sigma, moved, options.preserve_energy), 0.0)
    return _result(s, new, role)


def _vector(name: str, values: ArrayLike) -> Array:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise InputError(f"{name} must be one finite number a direction, got shape {vector.shape} or NaN in it")
    return vector


def _live(sigma: Array, *statistics: Array) -> _Live:
    group = _ties(sigma)
    bare = _Live(sigma, sigma, sigma, sigma, group)
    mean, mean_abs, squares = (bare.shared(values) for values in statistics)
    return _Live(sigma, mean, mean_abs, squares, group)


def _ties(sigma: Array) -> NDArray[np.intp]:
    """A number per direction, the same for neighbours in size that differ by 1e-9 of the larger or less."""
    order = _descending(sigma)
    ranked = sigma[order]
    group = np.empty(len(sigma), dtype=np.intp)
    group[order] = np.cumsum(np.r_[False, ranked[:-1] - ranked[1:] > _TIE * ranked[:-1]])
    return group


ENERGIES: dict[str, Callable[[Array], float]] = {
    "none": lambda sigma: 1.0,
    "l1": lambda sigma: float(np.abs(sigma).sum()),
    "l2": lambda sigma: float(np.linalg.norm(sigma)),
}
"""What an edit can preserve: a norm of the singular values."""


def _restored(sigma: Array, new: Array, energy: str) -> Array:
    before, after = ENERGIES[energy](sigma), ENERGIES[energy](new)
    if after == 0:
        raise InputError(
            f"preserve_energy {energy} cannot restore an update whose singular values are all 0 after the edit; "
            "use factors above 0, or none"
        )
    return new * (before / after)


def _result(sigma: Array, new: Array, role: Roles) -> EditResult:
    change = new - sigma
    return EditResult(new, role, float(np.linalg.norm(change)))


def predicted_change(sigma: ArrayLike, new_sigma: ArrayLike, mean: ArrayLike, fisher: ArrayLike) -> PredictedChange:
    """Return the predicted change of the loss when sigma becomes new_sigma; all ``(r,)``, in the statistics' unit.

    At new_sigma = 0 the second order is the sum of `removal_cost`.
    """
    change = np.asarray(new_sigma, dtype=np.float64) - np.asarray(sigma, dtype=np.float64)
    first = float(np.asarray(mean, dtype=np.float64) @ change)
    return PredictedChange(first, first + float(np.asarray(fisher, dtype=np.float64) @ change**2) / 2)


# --- the null -----------------------------------------------------------------------------------------------------


def energy_matched_random(sigma: ArrayLike, edited: EditResult, generator: np.random.Generator) -> EditResult:
    """A random draw to hold an edit against: its factors in random places, its ‖Δσ‖₂ = ‖ΔΔW‖_F restored.

    The factors σ'/σ of the edit are dealt out again over the live directions; for `abs_select` that is a draw of
    `random_index`. The change is then stretched by one number until its l2 norm is that of the edit (`change_l2` of
    the result says so), values that would pass 0 staying at 0. A draw that cannot reach that norm, because it only
    suppresses directions that are too small, is drawn again.

    Raises:
        InputError: no draw reaches the norm.
    """
    s = _vector("sigma", sigma)
    alive = s > 0
    if edited.change_l2 == 0 or not alive.any():
        return _result(s, s.copy(), edited.role.copy())
    factor, new, role = edited.sigma[alive] / s[alive], s.copy(), edited.role.copy()
    for _ in range(_MOST_DRAWS):
        deal = generator.permutation(len(factor))
        change = _stretched(s[alive], s[alive] * (factor[deal] - 1), edited.change_l2)
        if change is not None:
            new[alive] = s[alive] + change
            role[alive] = edited.role[alive][deal]
            return _result(s, np.maximum(new, 0.0), role)
    raise InputError(
        f"no random draw of {_MOST_DRAWS} changes sigma by as much as the edit ({edited.change_l2:g} in l2); "
        "amplify some directions, or edit fewer of the largest"
    )


def _stretched(sigma: Array, change: Array, norm: float) -> Array | None:
    """c · ``change``, held at −sigma, with the c that gives it ``norm``; None where no c does.

    Each pass fixes the values that would go below 0 and spreads what they cannot take over the others; c only grows,
    so that a fixed value stays fixed.
    """
    held = np.zeros(len(sigma), dtype=bool)
    while True:
        free = float(np.sum(change[~held] ** 2))
        missing = norm**2 - float(np.sum(sigma[held] ** 2))
        if missing <= 1e-24 * norm**2:
            return np.where(held, -sigma, 0.0)
        if free == 0:
            return None
        stretched = change * math.sqrt(missing / free)
        over = ~held & (stretched < -sigma * (1 + 1e-12))
        if not over.any():
            return np.where(held, -sigma, stretched)
        held |= over
