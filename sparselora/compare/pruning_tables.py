"""Tables of a comparison of pruning cells: means over seeds, differences by seed and by sentence, the positive control.

The control is ``no_prune``, the same run with the same further training; the baseline is ``random`` at the same keep
ratio. Token gates, which prune nothing, have baselines of their own (`references`), and so has the fixed subset of
channels that a token gate used most (`static_references`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from sparselora.compare.pairing import (
    Endpoint,
    Pair,
    add_holm,
    bootstrap_items,
    compare_pairs,
    compare_values,
    detectable,
    pair_by_seed,
)
from sparselora.compare.pruning_cells import CONTROL_CELL, MOMENTS, STATIC, PruningMethod, PruningStudy
from sparselora.numerics.channels import GATE_METHODS
from sparselora.numerics.stats import bootstrap_draws, holm, mcnemar, mean_interval

DRAWS = 10_000
"""Bootstrap draws, at least: answers are right or wrong, so a draw costs next to nothing."""

REFERENCE_MOMENT = {"right_after": "right_after", "after": "after", STATIC: "after"}
"""Moment at which a method is tested → the moment of the reference."""
ENDPOINTS = {
    moment: Endpoint(
        f"metric_{moment}", moment, weight="tokens", reference_metric=f"metric_{reference}", reference_item=reference
    )
    for moment, reference in REFERENCE_MOMENT.items()
}
_STATIC_BASELINES = ("channel_energy", "svd")
"""Channels or singular directions chosen once, for all tokens."""
_GATE_BASELINES = (*_STATIC_BASELINES, "random_gate", "energy_gate")
"""Baselines of token gates at a budget: channels chosen for all tokens, any for each, those of largest energy."""
_TESTS = ("t_p", "wilcoxon_p", "bootstrap_p")
_MCNEMAR = [
    *("method", "keep_ratio", "moment", "reference", "seed"),
    *("n_sentences", "only_method_right", "only_reference_right", "p"),
]


# --- description --------------------------------------------------------------------------------------------------


def describe(study: PruningStudy) -> pd.DataFrame:
    """Return mean and interval of the metric for each (method, keep ratio) at the three moments, over seeds.

    A method with token gates has a fourth, ``static``: at the end, with the channels that were active most for every
    token.
    """
    rows = []
    for method, keep in [CONTROL_CELL, *study.pruned()]:
        group = study.pick(method, keep)
        if not group.runs:
            continue
        values = {moment: _without_nan(group.values(f"metric_{moment}")) for moment in (*MOMENTS, STATIC)}
        for moment in MOMENTS if not values[STATIC] else values:
            interval = mean_interval(values[moment])
            rows.append(
                {
                    "method": str(method),
                    "keep_ratio": keep,
                    "effective_r": float(np.mean(group.values("effective_r"))),
                    "active_r": float(np.mean(group.values("active_r"))),
                    "moment": moment,
                    "metric": study.metric,
                    "n_seeds": interval.n,
                    "mean": interval.mean,
                    "std": interval.std,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                }
            )
    return pd.DataFrame(rows)


def _without_nan(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


# --- comparison ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A cell and moment, and the method that it is tested against."""

    method: PruningMethod
    keep_ratio: float
    moment: str
    reference: PruningMethod

    @property
    def columns(self) -> dict[str, Any]:
        """Its columns in a table."""
        return {name: str(value) if isinstance(value, PruningMethod) else value for name, value in vars(self).items()}

    def pairs(self, study: PruningStudy) -> list[Pair]:
        """Return the runs of the cell, where they have that moment, and of its reference at the seeds of both."""
        group = study.pick(self.method, self.keep_ratio)
        pairs = pair_by_seed(group, study.pick(self.reference, self.keep_ratio))
        return [pair for pair in pairs if not math.isnan(pair[0].metrics[f"metric_{self.moment}"])]


def compare(study: PruningStudy, seed: np.random.SeedSequence) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare every pruned method with its `references`, right after pruning and after more training.

    And the fixed subset of every token gate with its `static_references`, which chose once and trained on: of these it
    is the moment ``after``.

    Returns:
        A table with a row per question. ``difference`` is method minus reference over seeds, in the metric's own unit,
        positive where the method is better (of a loss, where it is worse), with interval, tests and sizes;
        ``smallest_detectable`` what this many seeds with this spread find with power 0.8. The sentence columns describe
        accuracy, or the loss a label, on the evaluation rows, the seeds' answers to one drawn together,
        ``sentence_draws`` times; NaN without predictions. ``<test>_holm`` is adjusted over all rows of the study for
        each of the t, Wilcoxon and bootstrap tests. And a table of exact McNemar tests, a row per question and seed,
        adjusted over all its rows; of language models, which have no right and wrong, none. Either may be empty.
    """
    questions = _questions(study)
    draws = bootstrap_draws(len(questions), DRAWS)
    differences, exact = [], []
    for question, child in zip(questions, seed.spawn(len(questions))):
        endpoint, pairs = ENDPOINTS[question.moment], question.pairs(study)
        difference = compare_pairs(pairs, endpoint, np.random.default_rng(child), draws)
        seeds, sentences = asdict(difference.seeds), difference.items
        differences.append({
            **question.columns,
            "n_seeds": seeds.pop("n"),
            "difference": seeds.pop("mean_difference"),
            **seeds,
            "smallest_detectable": difference.detectable,
            "n_sentences": sentences.n,
            "sentence_difference": sentences.mean,
            "sentence_ci_low": sentences.low,
            "sentence_ci_high": sentences.high,
            "sentence_draws": draws if sentences.n else 0,
            "bootstrap_p": sentences.p,
        })  # fmt: skip
        for pair in pairs if not study.is_loss else ():
            answers = endpoint.items(pair)
            if answers is not None:
                exact.append((*question.columns.values(), pair[0].seed, len(answers[0]), *mcnemar(*answers)))
    table = pd.DataFrame(differences)
    add_holm(table, _TESTS)
    per_seed = pd.DataFrame(exact, columns=_MCNEMAR)
    per_seed["p_holm"] = holm(per_seed["p"].tolist())
    return table, per_seed


def _questions(study: PruningStudy) -> list[Question]:
    """List the tests of a study; fixed subsets last, so that the other tests draw the same numbers without them."""
    questions = [
        Question(method, keep, moment, reference)
        for method, keep in study.pruned()
        for reference in references(method)
        for moment in MOMENTS[1:]
        if reference != method
    ]
    questions += [
        Question(method, keep, STATIC, reference)
        for method, keep in study.pruned()
        for reference in static_references(method)
        if keep < 1  # of all channels the subset is the token gate itself
    ]
    return [question for question in questions if question.pairs(study)]


def references(method: PruningMethod) -> tuple[PruningMethod, ...]:
    """Return the methods that ``method`` is compared with, at its keep ratio.

    The control, and ``random`` of the same scope and masking. Of a token gate: the control, ``channel_energy``,
    ``svd``, ``random_gate`` and, if it learns, ``energy_gate``, all as they are by default; of a variant its default
    too, and ``energy_gate`` of the same variant.
    """
    control, default = CONTROL_CELL[0], PruningMethod(method.name)
    if not method.is_token_gate:
        return control, replace(method, name="random")
    baselines = _GATE_BASELINES if GATE_METHODS[method.name] == "learned" else _GATE_BASELINES[:-1]
    variant = (replace(method, name="energy_gate"),) if method != default else ()
    return tuple(dict.fromkeys((control, *map(PruningMethod, baselines), default, *variant)))


def static_references(method: PruningMethod) -> tuple[PruningMethod, ...]:
    """Return the references of a token gate's fixed subset: the gate itself, ``channel_energy``, ``svd``; else none."""
    return (method, *map(PruningMethod, _STATIC_BASELINES)) if method.is_token_gate else ()


# --- positive control ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PositiveControl:
    """The effect that must be there: the control against the most severe pruning, right after.

    Attributes:
        against: the most severe pruning: random at the lowest keep ratio, or the mean of all methods there.
        difference, low, high: the control minus it, with its 95 % interval ``by`` seeds, which decides; or ``by``
            sentences, which describes, where there is one seed, or seeds without any spread. NaN without either.
        detectable: the smallest difference that this many seeds would find with power 0.8; NaN without a spread.
    """

    against: str
    keep_ratio: float
    n_seeds: int
    difference: float
    low: float
    high: float
    by: str
    detectable: float
    is_loss: bool = False
    """Lower is better, so that the difference of an effect is negative."""

    @property
    def is_separated(self) -> bool:
        """True if the interval over seeds has the control better."""
        return self.by == "seeds" and (self.high < 0 if self.is_loss else self.low > 0)


def positive_control(study: PruningStudy, seed: np.random.SeedSequence) -> PositiveControl | None:
    """Return the study's `PositiveControl`; None without a control, or without a pruned cell at one of its seeds."""
    pruned = [(method, keep) for method, keep in study.pruned() if keep < 1 and not method.is_token_gate]
    if not pruned:
        return None
    lowest = min(keep for _, keep in pruned)
    severe = [method for method, keep in pruned if keep == lowest]
    methods = [method for method in severe if method.name == "random"][:1] or severe
    control, groups = study.pick(*CONTROL_CELL), [study.pick(method, lowest) for method in methods]
    seeds = [number for number in control.runs if any(number in group.runs for group in groups)]
    if not seeds:
        return None
    endpoint = ENDPOINTS["right_after"]
    pairs = [(control.runs[s], group.runs[s]) for group in groups for s in seeds if s in group.runs]
    unpruned = [float(control.runs[s].metrics[endpoint.metric]) for s in seeds]
    pruned_by_seed = [[float(b.metrics[endpoint.metric]) for a, b in pairs if a.seed == s] for s in seeds]
    severest = [float(np.mean(values)) for values in pruned_by_seed]
    gap, by = compare_values(unpruned, severest), "seeds"
    low, high = gap.ci_low, gap.ci_high
    if math.isnan(low):
        sentences = bootstrap_items(pairs, endpoint, np.random.default_rng(seed), DRAWS)
        low, high, by = sentences.low, sentences.high, "rows" if study.is_loss else "sentences"
    against = str(methods[0]) if len(methods) == 1 else f"the mean of {', '.join(map(str, methods))}"
    return PositiveControl(
        against, lowest, gap.n, gap.mean_difference, low, high, by, detectable(unpruned, severest), study.is_loss
    )  # fmt: skip
