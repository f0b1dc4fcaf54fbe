"""The candidate to train with: the fastest that pays."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from sparselora.compare.contrasts import BETTER
from sparselora.frontier.candidates import DENSE
from sparselora.frontier.frontier_table import BASELINE, LESS_TIME, LOOKS, SEEDS


@dataclass(frozen=True)
class Choice:
    """The candidate to train with.

    Attributes:
        name: `DENSE` if nothing pays.
        is_verdict: it rests on tests over seeds; else on the rows of one seed.
    """

    name: str
    is_verdict: bool


def choose(table: pd.DataFrame, tolerance: float) -> Choice:
    """Return the fastest candidate that pays; dense if none does.

    It pays if it is better than dense for the same time, and not worse than dense on as many rows by more than the
    tolerance; each is a test over seeds, adjusted over the finalists. As long as no candidate has two seeds, intervals
    over the rows of one seed take the place of both tests, at the last rung that any has reached.
    """
    eligible = table[~table["control"].astype(bool) & ~table["verdict"].isin(["", BASELINE, LESS_TIME])]
    is_verdict = bool((eligible["interval_over"] == SEEDS).any())
    if is_verdict:
        paying = eligible[eligible["pays"].astype(bool)]
    else:
        dense = eligible["loss"] - eligible["difference"]
        paying = eligible[
            (eligible["rung"] == eligible["rung"].max())
            & (eligible["verdict"] == LOOKS[BETTER])
            & (eligible["difference_high"] <= tolerance * dense)
        ]
    name = str(paying.sort_values("time_ratio", kind="stable")["candidate"].iloc[0]) if len(paying) else DENSE
    return Choice(name, is_verdict)
