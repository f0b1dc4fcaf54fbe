"""Our steps next to those of other dense trainers: on rows of full length, padded and packed; few or all labelled."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from sparselora.bench.payoff import Spread
from sparselora.bench.rivals import RIVALS
from sparselora.bench.rivals.jobs import LAYOUTS, Case, Job
from sparselora.bench.rivals.processes import Answer, run_rival
from sparselora.bench.timing import StepTimes
from sparselora.runs.progress import Progress

_SAME_LOSS = 0.05
"""Largest relative difference of two losses of one model on the same tokens, in bf16 and some steps apart."""


def against_table(our_times: Mapping[Case, Mapping[str, StepTimes]], answers: Mapping[str, Answer]) -> pd.DataFrame:
    """Return a row for every step that was timed, ours first, in the order of the cases.

    Columns: trainer, how, versions, layout, labelled, tokens (of a batch, without padding), n (timed steps), step_ms
    with ``_low`` and ``_high`` (quartiles), tokens_per_s, speedup (tokens per second over those of the best rival on
    the same rows, padded or packed), peak_mb, loss (of the first step).
    """
    rows: list[dict[str, Any]] = []
    for case in _all_cases(our_times, answers):
        for name, times in our_times.get(case, {}).items():
            how = {"trainer": f"ours: {name}" if name != "PEFT" else "PEFT as it is", "how": "", "versions": ""}
            rows.append(how | _row(case, times.total, times.peak_mb, times.loss))
        for name, answer in answers.items():
            if case in answer.measured:
                measured = answer.measured[case]
                versions = " ".join(f"{package} {version}" for package, version in answer.versions.items())
                how = {"trainer": name, "how": answer.how, "versions": versions}
                rows.append(how | _row(case, measured.step_ms, measured.peak_mb, measured.loss))
    best: dict[tuple[bool, int], float] = {}
    for row in rows:
        if row["trainer"] in answers:
            best[_rows_of(row)] = max(best.get(_rows_of(row), 0.0), row["tokens_per_s"])
    for row in rows:
        row["speedup"] = row["tokens_per_s"] / best[_rows_of(row)] if _rows_of(row) in best else math.nan
    columns = ["trainer", "how", "versions", "layout", "labelled", "tokens", "n", "step_ms", "step_ms_low",
               "step_ms_high", "tokens_per_s", "speedup", "peak_mb", "loss"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _all_cases(our_times: Mapping[Case, Any], answers: Mapping[str, Answer]) -> list[Case]:
    every = {*our_times, *(case for answer in answers.values() for case in answer.measured)}
    return sorted(every, key=lambda case: (case.labelled, LAYOUTS.index(case.layout)))


def _rows_of(row: Mapping[str, Any]) -> tuple[bool, int]:
    """Return the rows of text that a batch has: padded and packed are two layouts of the same."""
    return row["layout"] == "full", row["labelled"]


def _row(case: Case, step_ms: Sequence[float], peak_mb: float, loss: float) -> dict[str, Any]:
    spread = Spread.of(step_ms)
    return {
        "layout": case.layout, "labelled": case.labelled, "tokens": case.tokens, "n": len(step_ms),
        "step_ms": spread.median, "step_ms_low": spread.low, "step_ms_high": spread.high,
        "tokens_per_s": 1000 * case.tokens / statistics.median(step_ms), "peak_mb": peak_mb, "loss": loss,
    }  # fmt: skip


def against_lines(table: pd.DataFrame, answers: Mapping[str, Answer]) -> list[str]:
    """Return in words: versions, the table, what was left out and why, and losses that no longer agree."""
    lines = []
    for name, answer in answers.items():
        if answer.versions:
            packages = " ".join(f"{package} {version}" for package, version in answer.versions.items())
            lines.append(f"{name}: {answer.how or 'not timed'} ({packages})")
    if not table.empty:
        lines.append(_formatted(table))
    for name, answer in answers.items():
        if answer.skipped is not None:
            lines.append(f"left out: {name}: {answer.skipped}")
            continue
        lines += [
            f"left out: {name}, {case.layout}, {case.labelled} labelled: {reason}"
            for case, reason in answer.failed.items()
        ]
    return lines + _other_losses(table)


def _formatted(table: pd.DataFrame) -> str:
    formats = {
        "trainer": ("trainer", "{}"), "rows": ("layout", "{}"), "labelled": ("labelled", "{}"),
        "median ms": ("step_ms", "{:.1f}"), "quartiles": ("quartiles", "{}"), "tokens/s": ("tokens_per_s", "{:,.0f}"),
        "× best rival": ("speedup", "{:.2f}"), "peak MB": ("peak_mb", "{:,.0f}"), "loss": ("loss", "{:.3f}"),
    }  # fmt: skip
    if table["peak_mb"].isna().all():
        del formats["peak MB"]
    if table["speedup"].isna().all():
        del formats["× best rival"]
    quartiles = [f"{low:.1f}–{high:.1f}" for low, high in zip(table["step_ms_low"], table["step_ms_high"])]
    table = table.assign(quartiles=quartiles)
    return pd.DataFrame({label: table[column].map(text.format) for label, (column, text) in formats.items()}).to_string(
        index=False
    )


def _other_losses(table: pd.DataFrame) -> list[str]:
    """Return a line for every rival whose loss is another than that of the plain step: it may do other work."""
    lines = []
    plain = table[table["trainer"] == "PEFT as it is"]
    for row in table[table["versions"] != ""].itertuples():
        same = plain[((plain["layout"] == "full") == (row.layout == "full")) & (plain["labelled"] == row.labelled)]
        if len(same) and abs(row.loss / same["loss"].iloc[0] - 1) > _SAME_LOSS:
            lines.append(
                f"{row.trainer}, {row.layout}, {row.labelled} labelled: its loss is {row.loss:.3f}, that of the plain "
                f"step {same['loss'].iloc[0]:.3f}: it may do other work, so its time is no measure"
            )
    return lines


def rival_cases(rival: str, compared: Sequence[Case]) -> tuple[Case, ...]:
    """Return the cases among ``compared`` that a rival can be timed on."""
    return tuple(case for case in compared if case.layout != "packed" or RIVALS[rival].has_packed)


def our_cases(compared: Sequence[Case]) -> tuple[Case, ...]:
    """Return the cases that our steps are timed on: padding is left out of them, so packed rows are given padded."""
    return tuple(
        dict.fromkeys(
            dataclasses.replace(case, layout="padded") if case.layout == "packed" else case for case in compared
        )
    )


def run_rivals(rivals: Sequence[str], job: Callable[[str], Job], limit_s: float) -> Iterator[tuple[str, Answer]]:
    """Yield the name and answer of each rival, timed one after the other on the work that ``job`` gives it.

    Args:
        limit_s: seconds that each may take for all of its cases.
    """
    with Progress(len(rivals), "trainer", "rivals") as progress:
        for name in rivals:
            yield name, run_rival(job(name), limit_s)
            progress.update()
