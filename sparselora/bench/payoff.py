"""Does sparsity pay? From measured step times to ratios, ceilings, overheads and the point of breaking even.

All times are in milliseconds. A round times every variant once, one after the other, so that other work of the
machine falls on all alike; ratios are taken within a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Lora, Shape, Workload, token_costs, total
from sparselora.contextual.modes import mode_of

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | Array) -> Spread:
        low, median, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
        return cls(float(median), float(low), float(high))


def ratio(slow: Sequence[float] | Array, fast: Sequence[float] | Array) -> Spread:
    """Number of times that ``fast`` is faster than ``slow``, round by round; above 1 it is faster."""
    return Spread.of(np.asarray(slow, dtype=float) / np.asarray(fast, dtype=float))


def best_dense(times: Mapping[str, Sequence[float]], dense: Sequence[str]) -> str:
    """The name among ``dense`` with the smallest median."""
    return min(dense, key=lambda name: float(np.median(np.asarray(times[name]))))


# --- what sparsity can touch --------------------------------------------------------------------------------------


def with_sparsity(config: SparsityConfig, layers: int, sparsity: float) -> SparsityConfig:
    """``config`` with ``sparsity`` in every place where it has one above 0, and nothing elsewhere."""
    named = {
        f"layer.{i}.{part}": sparsity
        for i in range(layers)
        for part in ("ffn", "attention")
        if config.ratio(i, part) > 0
    }
    return config.replace(ffn_sparsity=0.0, attention_sparsity=0.0, layer_sparsity=named)


def touches_attention(config: SparsityConfig, layers: int) -> bool:
    return any(config.ratio(i, "attention") > 0 for i in range(layers))


def without_the_work(config: SparsityConfig, layers: int) -> SparsityConfig:
    """The configuration of the floor: what ``config`` thins out is gone.

    That is mode skip where it thins FFNs alone. Attention cannot be skipped, so where it thins that too, the floor
    keeps one channel in a thousand, drawn at random.
    """
    if touches_attention(config, layers):
        least = with_sparsity(config, layers, 0.999)
        return least.replace(mode="random", compensate="none", sparse_warmup_ratio=0.0)
    return config.replace(mode="skip", compensate="none")


def touchable_flops(shape: Shape, config: SparsityConfig, work: Workload, lora: Lora | None) -> float:
    """The part that ``config`` thins out of the multiplications of the same step in mode dense, in [0, 1]."""
    dense = total(token_costs(shape, config.replace(mode="dense"), work, lora), training=True)
    least = with_sparsity(config, shape.layers, 1 - 1e-9).replace(mode="random")
    return 1 - total(token_costs(shape, least, work, lora), training=True) / dense


def ceiling(part: float) -> float:
    """Amdahl: how many times faster a step becomes when ``part`` of it, in [0, 1], takes no time; inf for all of it."""
    return float("inf") if part >= 1 else 1 / (1 - part)


def kept_share(shape: Shape, config: SparsityConfig, work: Workload, lora: Lora | None) -> float:
    """The part that ``config`` keeps of the multiplications that it thins out (estimates not counted)."""
    control = mode_of(config).control
    free = config if control is None else config.replace(mode=control)
    touched = touchable_flops(shape, config, work, lora)
    dense = total(token_costs(shape, config.replace(mode="dense"), work, lora), training=True)
    left = total(token_costs(shape, free, work, lora), training=True) / dense
    return (left - (1 - touched)) / touched if touched > 0 else 1.0


@dataclass(frozen=True)
class Parts:
    """The time of a sparse step by its causes, in ms.

    Attributes:
        rest: of the step with what is thinned out gone.
        channels: what the kept share of the thinned-out products would take if time fell with their count.
        gather: what it takes beyond that without an estimate: gather, scatter, smaller products.
        choice: what choosing takes on top: estimates and selection.

    Differences of measured times, ``gather`` and ``choice`` come out below 0 where the noise is larger than they are.
    """

    rest: float
    channels: float
    gather: float
    choice: float

    @classmethod
    def of(cls, dense: float, sparse: float, unchosen: float, floor: float, share: float) -> Parts:
        """From the medians of the dense step, the sparse step, the same with channels drawn at random, and the floor.

        Args:
            share: `kept_share`.
        """
        channels = share * max(0.0, dense - floor)
        return cls(rest=floor, channels=channels, gather=unchosen - floor - channels, choice=sparse - unchosen)

    def text(self, step_ms: float) -> str:
        """In words, of a step of ``step_ms``; a part below 0 is no part but noise."""
        named = {"gather, scatter and smaller products": self.gather, "choosing": self.choice}
        shown = [f"{self.rest:.1f} untouched", f"{self.channels:.1f} the kept channels"]
        shown += [f"{ms:.1f} {name} ({ms / step_ms:.1%} of the step)" for name, ms in named.items() if ms >= 0]
        lost = [name for name, ms in named.items() if ms < 0]
        noise = f"; {' and '.join(lost)}: less than the noise of these rounds, raise --rounds" if lost else ""
        return f"where {step_ms:.1f} ms go: {', '.join(shown)}{noise}"


# --- verdict ------------------------------------------------------------------------------------------------------

_DISAGREEMENT = 0.1
"""Relative difference of two estimates of one ratio from which on they are no longer taken for the same."""


def break_even(points: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The smallest of ``points`` (ascending) from which on the ratio reaches 1, interpolated; None where it never does.

    Where it is above 1 from the first point on, that point.
    """
    above = [r >= 1 for r in ratios]
    if not above or not above[-1]:
        return None
    first = len(above) - 1
    while first > 0 and above[first - 1]:
        first -= 1
    if first == 0:
        return float(points[0])
    (x0, x1), (y0, y1) = points[first - 1 : first + 1], ratios[first - 1 : first + 1]
    return float(x0 + (1 - y0) / (y1 - y0) * (x1 - x0))


def break_even_text(name: str, points: Sequence[float], ratios: Sequence[float]) -> str:
    """`break_even` in words; ``name`` is what was varied."""
    point, timed = break_even(points, ratios), f"{name} {', '.join(f'{value:g}' for value in points)}"
    if point is None:
        return f"does not break even (timed: {timed})"
    if point == points[0]:
        return f"pays from the smallest {name} on that was timed, {point:g} (timed: {timed})"
    return f"breaks even at {name} {point:.3g} (timed: {timed})"


def verdict(
    slow: Sequence[float] | Array, fast: Sequence[float] | Array, against: str, step: str = "the sparse step"
) -> str:
    """In words, whether ``step``, whose times are ``fast``, pays; quartiles on both sides of 1 are no difference.

    There is no verdict where the ratio of the medians is another number, and outside the quartiles of the ratios within
    rounds: then a few rounds decide.
    """
    speedup = ratio(slow, fast)
    numbers = f"{speedup.median:.2f}× {against} (quartiles {speedup.low:.2f}–{speedup.high:.2f})"
    of_medians = float(np.median(slow) / np.median(fast))
    differs = abs(of_medians / speedup.median - 1) > _DISAGREEMENT
    if differs and not speedup.low <= of_medians <= speedup.high:
        return (
            f"no verdict: the rounds disagree, {numbers}, but {of_medians:.2f}× by the medians of the steps; raise "
            "--rounds, or leave the machine to it alone"
        )
    if speedup.median < 1 and speedup.high < 1:
        return f"not worth it here: {step} is slower, {numbers}"
    if speedup.low <= 1 or speedup.median < 1:
        return f"not worth it here: no difference that could be told from noise, {numbers}"
    return f"worth it here: {step} is faster, {numbers}"
