"""Learning rates of the longest pilot runs: for each candidate, dense too, the best of three.

Compared at one learning rate, methods differ by how well it suits them, and dense training for less time wants another
than dense for longer. So before the last rung everything that runs in it is tried at a third of, once and three times
the learning rate of the search, in pilot runs of half the length and with the first seed, and goes on with the one
whose held-out loss is lowest. It is the same choice for all, controls included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from sparselora.frontier.pilot_pool import PilotFailure, PilotPool, PilotTask
from sparselora.frontier.request import LEARNING_RATES
from sparselora.runs.files import read_table, write_csv
from sparselora.runs.folder import RunFolder

LR_FACTORS = (1 / 3, 1.0, 3.0)
"""Learning rates that are tried, relative to that of the search. Between neighbours the loss of a short fine-tune on
GSM8K changes by 0.2 to 0.5 % of itself (results/fast)."""
_COLUMNS = ("candidate", "lr", "steps", "loss")


class LearningRates:
    """Losses of candidates by learning rate.

    Attributes:
        table: columns candidate, lr, steps, loss (nats per label; infinite where the run failed), by candidate and lr.

    Args:
        folder: of the search, entered.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.table = read_learning_rates(folder.folder)

    def loss(self, name: str, lr: float) -> float | None:
        """Return the loss of a candidate at a learning rate; None where it has not been tried."""
        losses = self.table.loc[(self.table["candidate"] == name) & (self.table["lr"] == lr), "loss"]
        return float(losses.iloc[0]) if len(losses) else None

    def add(self, name: str, lr: float, steps: int, loss: float) -> None:
        """Put a loss on file."""
        row = pd.DataFrame([(name, lr, steps, loss)], columns=list(_COLUMNS))
        table = pd.concat([self.table, row], ignore_index=True) if len(self.table) else row
        self.table = table.sort_values(["candidate", "lr"], kind="stable", ignore_index=True)
        write_csv(self._folder.path(LEARNING_RATES), self.table)

    def try_all(self, pool: PilotPool, tasks: Sequence[PilotTask], on_done: Callable[[], object]) -> None:
        """Make the pilot runs of ``tasks`` that are not on file; each has the learning rate of its settings."""
        remaining = [task for task in tasks if self.loss(task.name, task.config.lr) is None]
        for task, outcome in pool.run(remaining):
            loss = math.inf if isinstance(outcome, PilotFailure) else outcome.loss
            self.add(task.name, task.config.lr, task.config.max_steps, loss)
            on_done()

    def best(self, name: str) -> float | None:
        """Return the learning rate of the lowest loss of a candidate; None where none was tried."""
        losses = self.table[self.table["candidate"] == name]
        return float(losses.sort_values("loss", kind="stable")["lr"].iloc[0]) if len(losses) else None


def read_learning_rates(folder: Path) -> pd.DataFrame:
    """Return `LearningRates.table` as it is on file; empty where there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / LEARNING_RATES
    if not path.is_file():
        return pd.DataFrame(columns=list(_COLUMNS))
    return read_table(path, numbers=_COLUMNS[1:], texts=("candidate",))


def describe(table: pd.DataFrame) -> str:
    """Return how the learning rates of the longest pilot runs were chosen, and which they are, as a sentence or two.

    Args:
        table: as `LearningRates.table`; empty where none were tried.
    """
    if not len(table):
        return "Learning rates have not been tuned for any candidate so far."
    ranked = {str(name): lrs.sort_values("loss", kind="stable") for name, lrs in table.groupby("candidate")}
    rates = ", ".join(f"{name} {lrs['lr'].iloc[0]:.3g}" for name, lrs in ranked.items())
    edge = [name for name, lrs in ranked.items() if lrs["lr"].iloc[0] in (lrs["lr"].min(), lrs["lr"].max())]
    text = (
        f"The longest pilots have the learning rate that was best of three in pilots of up to {table['steps'].max():,} "
        f"steps with one seed: {rates}. Shorter ones have yours."
    )
    if edge:
        text += f" For {', '.join(edge)} it is the edge of what was tried, and one beyond it may be better."
    return text
