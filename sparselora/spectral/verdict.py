"""Does an edit beat its null? Pure functions over per-item results of the edit and its controls on the same items.

Variants are of these kinds: ``base`` (no adapter) and ``no_lora`` (the weights trained in addition to LoRA alone), the
positive controls; ``unedited``, what all is compared with; ``round_trip``, the same update decomposed and put together
again, which shows what rounding does; the ``edit``; ``signed``, the mode that follows the gradient's sign; ``oracle``,
that mode by the gradient of the evaluation rows themselves, an upper bound; ``sgd``, the adapter after a few steps of
gradient descent on the calibration rows, the rival with the same information; and ``draw``, the null: the edit's
factors in random places, with its energy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparselora.errors import InputError
from sparselora.numerics.stats import Bootstrap, is_bootstrap_floor, mcnemar, paired_bootstrap
from sparselora.report.markdown import markdown_table, number, p_value, with_interval

ONCE = ("base", "unedited", "round_trip", "edit")
LEAST_DRAWS = 20
"""With fewer, the best rank there is has p above 0.05."""

BETTER, WORSE, SAME, NONE = "better", "worse", "not distinguishable", "no verdict"
_LEVEL = 0.05
_RESAMPLES = 2000
_CHANGES = ("predicted_first", "predicted_second", "calibration_change")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """Verdict on an edit against its null.

    Attributes:
        word: ``better`` or ``worse`` where at most one draw in twenty (`rank_p`, of that side) is as good or as bad,
            *and* the 95 % interval over items of the difference to the mean of the draws does not reach 0; else
            ``not distinguishable``; ``no verdict`` of fewer than `LEAST_DRAWS` draws.
        gap: loss of the edit minus the mean of the draws, nats a label, bootstrap over items.
        better_p, worse_p: `rank_p` of the edit's loss among those of the draws, one-sided.
        accuracy_p: the same of its accuracy; NaN for a language model.
        draws: how many.
    """

    word: str
    gap: Bootstrap
    better_p: float
    worse_p: float
    accuracy_p: float
    draws: int


@dataclass(frozen=True)
class Report:
    """``table`` has a row a variant; ``sentences`` say in words what it shows."""

    table: pd.DataFrame
    verdict: Verdict
    sentences: list[str]
    n: int

    @property
    def classifies(self) -> bool:
        return "accuracy" in self.table


def rank_p(value: float, draws: Array) -> float:
    """(1 + number of ``draws (k,)`` at least as low) / (k + 1): exact if ``value`` is one more draw of their kind."""
    return float((1 + (draws <= value).sum()) / (len(draws) + 1))


def shown_rank_p(p: float, draws: int) -> str:
    """Return a `rank_p` as a text, with ≤ where it is the smallest that ``draws`` allow."""
    return p_value(p, is_floor=draws > 0 and p <= 1 / (draws + 1))


def _bootstrap_p(row: dict[Any, Any]) -> str:
    return p_value(row["bootstrap_p"], is_floor=is_bootstrap_floor(row["bootstrap_p"], _RESAMPLES))


# --- comparing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Items:
    """Losses and answers ``(variants, n)``, and the labels of each item ``(n,)``."""

    names: list[str]
    losses: Array
    labels: Array
    correct: NDArray[np.bool_] | None

    def of(self, name: str) -> Array:
        return np.asarray(self.losses[self.names.index(name)])

    def answers(self, name: str) -> NDArray[np.bool_]:
        assert self.correct is not None
        return np.asarray(self.correct[self.names.index(name)])

    def mean_gap(self, name: str, reference: Array) -> float:
        """Loss of a variant minus ``reference (n,)``, nats a label."""
        return float((self.of(name) - reference).sum() / self.labels.sum())

    def gap(self, name: str, reference: Array, rng: np.random.Generator) -> Bootstrap:
        """`mean_gap` with its interval over items."""
        return paired_bootstrap(self.of(name) - reference, self.labels, rng, draws=_RESAMPLES)


def compare(
    items: pd.DataFrame, variants: pd.DataFrame, rng: np.random.Generator, calibration: pd.DataFrame | None = None
) -> Report:
    """The report on what was measured.

    Args:
        items: a row an item and variant: ``variant``, ``row``, ``loss``; ``tokens`` of a language model (``loss`` is
            summed over them), ``correct`` of a classifier. Every variant has the same rows in the same order.
        variants: ``variant``, ``kind``, ``change_l2``, ``predicted_first``, ``predicted_second``; in the order wanted.
        rng: of the bootstrap.
        calibration: as ``items``, on the rows that the predictions come from; None where they are not known.
    Raises:
        InputError: a kind of `ONCE` is not there exactly once, or the items of two variants differ.
    """
    kinds = variants.set_index("variant")["kind"]
    for kind in ONCE:
        if (kinds == kind).sum() != 1:
            raise InputError(f"a report needs one variant of kind {kind}, got {(kinds == kind).sum()}")
    losses = _items(items, list(kinds.index))
    single = {kind: str(kinds.index[kinds == kind][0]) for kind in ONCE}
    draws = [str(name) for name in kinds.index[kinds == "draw"]]
    rows = [_row(losses, facts, single["unedited"], rng) for facts in variants.to_dict("records")]
    table = pd.DataFrame(rows).assign(calibration_change=float("nan"))
    if calibration is not None:
        seen = _items(calibration, losses.names)
        means = seen.losses.sum(axis=1) / seen.labels.sum()
        table["calibration_change"] = means - means[losses.names.index(single["unedited"])]
    verdict = _verdict(losses, single["edit"], draws, rng)
    rivals = [str(name) for name in kinds.index[kinds == "sgd"]]
    gaps = {name: losses.gap(single["edit"], losses.of(name), rng) for name in rivals}
    return Report(table, verdict, _sentences(table, verdict, gaps), len(losses.labels))


def _items(items: pd.DataFrame, names: list[str]) -> _Items:
    parts = {str(name): part for name, part in items.groupby("variant", sort=False)}
    if set(parts) != set(names):
        raise InputError(f"items and variants differ: {', '.join(sorted(set(parts) ^ set(names)))}")
    first = parts[names[0]]
    shared = [name for name in ("row", "tokens", "label") if name in items]
    for name in names:
        if not np.array_equal(parts[name][shared].to_numpy(), first[shared].to_numpy()):
            raise InputError(f"variant {name} was evaluated on other items than {names[0]}")
    labels = first["tokens"].to_numpy(dtype=float) if "tokens" in first else np.ones(len(first))
    losses = np.stack([parts[name]["loss"].to_numpy(dtype=float) for name in names])
    if not np.isfinite(losses).all():
        raise InputError("a loss is not finite; evaluate in float32 or bfloat16")
    correct = None
    if "correct" in items:
        correct = np.stack([parts[name]["correct"].to_numpy(dtype=bool) for name in names])
    return _Items(names, losses, labels, correct)


def _row(losses: _Items, facts: dict[Any, Any], unedited: str, rng: np.random.Generator) -> dict[Any, Any]:
    """A variant's loss and accuracy, and their differences to the unedited adapter's; of a draw without an interval."""
    name = str(facts["variant"])
    nan, reference = float("nan"), losses.of(unedited)
    if facts["kind"] == "draw":
        gap = Bootstrap(len(losses.labels), losses.mean_gap(name, reference), nan, nan, nan)
    else:
        gap = losses.gap(name, reference, rng)
    row = {"variant": name, "kind": facts["kind"], "n": len(losses.labels)}
    row |= {"loss": losses.of(name).sum() / losses.labels.sum(), "loss_change": gap.mean}
    row |= {"ci_low": gap.low, "ci_high": gap.high, "bootstrap_p": gap.p}
    if losses.correct is not None:
        only, only_unedited, p = mcnemar(losses.answers(name), losses.answers(unedited))
        row |= {"accuracy": losses.answers(name).mean(), "right_only_here": only}
        row |= {"right_only_unedited": only_unedited, "mcnemar_p": p}
    return row | {key: facts[key] for key in ("change_l2", "predicted_first", "predicted_second")}


def _verdict(losses: _Items, edit: str, draws: list[str], rng: np.random.Generator) -> Verdict:
    nan = float("nan")
    if not draws:
        return Verdict(NONE, Bootstrap(len(losses.labels), nan, nan, nan, nan), nan, nan, nan, 0)
    gap = losses.gap(edit, np.mean([losses.of(name) for name in draws], axis=0), rng)
    loss, others = losses.of(edit).sum(), np.array([losses.of(name).sum() for name in draws])
    better, worse = rank_p(loss, others), rank_p(-loss, -others)
    accuracy = nan
    if losses.correct is not None:
        right = np.array([float(losses.answers(name).sum()) for name in draws])
        accuracy = rank_p(-float(losses.answers(edit).sum()), -right)
    word = SAME
    if len(draws) < LEAST_DRAWS:
        word = NONE
    elif better <= _LEVEL and gap.high < 0:
        word = BETTER
    elif worse <= _LEVEL and gap.low > 0:
        word = WORSE
    return Verdict(word, gap, better, worse, accuracy, len(draws))


# --- in words -----------------------------------------------------------------------------------------------------


def _sentences(table: pd.DataFrame, verdict: Verdict, rivals: dict[str, Bootstrap]) -> list[str]:
    rows = {str(row["kind"]): row for row in table.to_dict("records") if row["kind"] != "draw"}
    bound = [_upper_bound(rows["oracle"])] if "oracle" in rows else []
    return [
        _positive_control(rows),
        f"Round trip: {rows['round_trip']['loss_change']:+.2g} nats a label against the unedited adapter; what is "
        "smaller than this is rounding.",
        _against_unedited(rows["edit"]),
        _against_null(verdict),
        *bound,
        *([_against_rivals(rivals)] if rivals else []),
        _prediction(table),
    ]


def _positive_control(rows: dict[str, dict[Any, Any]]) -> str:
    """The adapter against the best there is without its LoRA."""
    base = rows.get("no_lora", rows["base"])
    low, high = -base["ci_high"], -base["ci_low"]
    what = "the weights trained in addition to LoRA, alone" if "no_lora" in rows else "the model without it"
    gain = with_interval(-base["loss_change"], low, high)
    if high < 0:
        return f"Positive control: the adapter's loss is {gain} nats a label from that of {what}: it helps."
    return (
        f"Positive control FAILS: the adapter's loss is {gain} nats a label from that of {what}, no clear gain; an "
        "edit of such an adapter shows little."
    )


def _against_unedited(edit: dict[Any, Any]) -> str:
    text = (
        f"The edit changes the loss by {with_interval(edit['loss_change'], edit['ci_low'], edit['ci_high'], '+.5f')} "
        f"nats a label against the unedited adapter (bootstrap p {_bootstrap_p(edit)})"
    )
    if "accuracy" in edit:
        text += (
            f", and the accuracy to {edit['accuracy']:.4f} ({edit['right_only_here']} items right only with it, "
            f"{edit['right_only_unedited']} only without; McNemar p {p_value(edit['mcnemar_p'])})"
        )
    return text + "."


def _upper_bound(oracle: dict[Any, Any]) -> str:
    change = with_interval(oracle["loss_change"], oracle["ci_low"], oracle["ci_high"], "+.5f")
    return (
        f"Upper bound, an oracle that uses the evaluation rows' own gradient: it changes their loss by {change} nats a "
        "label, by a step of mode gd with the same settings."
    )


def _against_rivals(rivals: dict[str, Bootstrap]) -> str:
    """The edit against gradient descent on the same rows."""
    gaps = (f"{with_interval(gap.mean, gap.low, gap.high, '+.5f')} ({name})" for name, gap in rivals.items())
    state = "not throughout better than"
    if all(gap.high < 0 for gap in rivals.values()):
        state = "better than"
    elif all(gap.low > 0 for gap in rivals.values()):
        state = "worse than"
    return (
        f"The edit is {state} plain SGD on lora_A and lora_B with the same calibration rows: its loss is "
        f"{', '.join(gaps)} nats a label from that of SGD, whose step size was chosen on these rows."
    )


def _against_null(verdict: Verdict) -> str:
    if verdict.word == NONE:
        return f"No verdict: {verdict.draws} random draws; at least {LEAST_DRAWS} are needed."
    sentences = {
        BETTER: "The edit is better than its random-index null",
        WORSE: "The edit is worse than its random-index null",
        SAME: "The edit is not distinguishable from its random-index null",
    }[verdict.word]
    gap = verdict.gap
    text = (
        f"{sentences}: its loss is {with_interval(gap.mean, gap.low, gap.high, '+.5f')} nats a label from the mean of "
        f"{verdict.draws} draws (rank p {shown_rank_p(verdict.better_p, verdict.draws)} for better, "
        f"{shown_rank_p(verdict.worse_p, verdict.draws)} for worse"
    )
    if not math.isnan(verdict.accuracy_p):
        text += f"; by accuracy {shown_rank_p(verdict.accuracy_p, verdict.draws)} for better"
    return text + ")."


def _prediction(table: pd.DataFrame) -> str:
    edited = table[table["kind"].isin(["edit", "signed", "draw"])]
    predicted = edited["predicted_second"].to_numpy()
    says = []
    for where, column in (("on the calibration rows", "calibration_change"), ("held out", "loss_change")):
        measured = edited[column].to_numpy()
        if len(edited) > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0:  # NaN where nothing was measured
            says.append(f"{np.corrcoef(predicted, measured)[0, 1]:+.2f} {where}")
    if not says:
        return "Predicted against measured ΔL: too few different values for a correlation."
    return f"Predicted (second order) against measured ΔL over {len(edited)} edits: correlation {', '.join(says)}."


# --- as Markdown --------------------------------------------------------------------------------------------------

HOW_TO_READ = f"""\
Losses are cross-entropies in nats a label on held-out items; every variant saw the same ones. **Change** is against the
unedited adapter, with a 95 % interval by bootstrap over items (p: of no change): it speaks about other items, not about
another calibration. **predicted** is Σ g·Δσ (first order) and that with ½ Σ F·Δσ² (second), from the calibration rows;
**there** is the change measured on these rows.

The null takes the edit's factors to random directions of each module and gives the change the same ‖Δσ‖₂. The edit is
*better* than it (or *worse*) if its rank among them has p of at most 0.05, p = (1 + draws at least as good, or as
bad) / (draws + 1), and the interval over items of its distance to the mean of the draws leaves out 0; else the two
are *not distinguishable*. With fewer than {LEAST_DRAWS} draws there is no verdict."""


def to_markdown(report: Report, title: str) -> str:
    """The report as a page: what it shows, the table with the draws in one line, and how to read it."""
    sentences = "\n".join(f"- {sentence}" for sentence in report.sentences)
    parts = [f"# {title}", f"{report.n} held-out items.", sentences, _table(report), HOW_TO_READ]
    return "\n\n".join(parts) + "\n"


def _table(report: Report) -> str:
    header = ["variant", "loss", "change", "p", "‖Δσ‖₂", "predicted, 1st", "2nd", "there"]
    if report.classifies:
        header += ["accuracy", "McNemar p"]
    draws = report.table[report.table["kind"] == "draw"]
    lines = [_line(row, report.classifies) for row in report.table.to_dict("records") if row["kind"] != "draw"]
    if len(draws):
        lines.append(_draws_line(draws, report.classifies))
    return markdown_table(header, lines)


def _line(row: dict[Any, Any], classifies: bool) -> list[str]:
    name = f"{row['variant']} (edit)" if row["kind"] == "edit" else str(row["variant"])
    change = (
        "" if row["kind"] == "unedited" else with_interval(row["loss_change"], row["ci_low"], row["ci_high"], "+.5f")
    )
    line = [name, f"{row['loss']:.5f}", change, "" if row["kind"] == "unedited" else _bootstrap_p(row)]
    line += [number(row["change_l2"], ".4g"), *(number(row[n], "+.5f") for n in _CHANGES)]
    return line + ([f"{row['accuracy']:.4f}", p_value(row["mcnemar_p"])] if classifies else [])


def _draws_line(draws: pd.DataFrame, classifies: bool) -> list[str]:
    """Mean and, in brackets, the least and the largest of the draws."""

    def spread(column: str, form: str) -> str:
        values = draws[column]
        return with_interval(values.mean(), values.min(), values.max(), form)

    line = [f"{len(draws)} draws: mean [range]", spread("loss", ".5f"), spread("loss_change", "+.5f"), ""]
    line += [number(draws["change_l2"].mean(), ".4g"), *(spread(name, "+.5f") for name in _CHANGES)]
    return line + ([spread("accuracy", ".4f"), ""] if classifies else [])
