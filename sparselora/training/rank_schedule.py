"""The ranks of an adapter in the course of its training, and the callback that cuts it from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import broadcast
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.models.adapter_names import PREFIX
from sparselora.runs.files import write_json
from sparselora.runs.user_files import read_json
from sparselora.spectral.factors import AdapterSVD
from sparselora.spectral.squeeze import (
    adopt_ranks,
    budget_ranks,
    decompose,
    squeezable_layers,
    squeeze,
    uniform_ranks,
)
from sparselora.training.trainer import CheckpointPart

SQUEEZE_COLUMNS = (
    "step", "module", "d_out", "d_in", "rank_before", "rank_after", "retained_energy", "relative_error",
)  # fmt: skip
"""A row a cut and module; ``step`` is the last one at the higher rank."""
STATE = "squeeze.json"
"""The rows of the cuts so far, in a checkpoint."""


@dataclass(frozen=True)
class RankSchedule:
    """Falling ranks, and the steps after which each but the first begins.

    Attributes:
        ranks: n + 1 of them.
        cuts: n steps, ascending: after the i-th, the adapter is cut to rank i + 1.
        total_steps: of the training.
        rewarm_steps: steps after each cut in which the learning rate rises again; 0: it stays as scheduled.
    """

    ranks: tuple[int, ...]
    cuts: tuple[int, ...]
    total_steps: int
    rewarm_steps: int = 0

    @classmethod
    def of(cls, config: TrainConfig, total_steps: int) -> RankSchedule | None:
        """Return the schedule of a training of ``total_steps``; None where the rank stays.

        Raises:
            InputError: there are too few steps for as many cuts.
        """
        ranks = config.squeeze_ranks
        if len(ranks) == 1:
            return None
        count = len(ranks) - 1
        cuts = tuple(round(total_steps * config.squeeze_ratio * i / count) for i in range(1, count + 1))
        if list(cuts) != sorted(set(cuts)) or cuts[0] < 1 or cuts[-1] >= total_steps:
            raise InputError(
                f"squeeze {config.squeeze} with squeeze_ratio {config.squeeze_ratio:g} cuts after steps "
                f"{', '.join(map(str, cuts))} of {total_steps}, and each cut needs steps of its own before and after "
                "it; train longer, or name fewer ranks"
            )
        return cls(ranks, cuts, total_steps, round(total_steps * config.squeeze_warmup_ratio))

    def rank_in(self, step: int) -> int:
        """Return the rank in step ``step``, counted from 1."""
        return self.ranks[sum(step > cut for cut in self.cuts)]

    def lr_factor(self, step: int) -> float:
        """Return by what the learning rate of the step after ``step`` others is multiplied."""
        since = min((step - cut for cut in self.cuts if cut <= step), default=self.rewarm_steps)
        return (since + 1) / (self.rewarm_steps + 1) if since < self.rewarm_steps else 1.0


class SqueezeCallback(TrainerCallback):
    """Cuts the adapter of ``model`` at the beginning of the step after each cut of ``schedule``.

    Attributes:
        rows: of the cuts so far, with the columns `SQUEEZE_COLUMNS`.
        after_cut: called after each cut: the trained parameters are others.

    Args:
        budget, multiple: ``squeeze_budget`` and ``squeeze_multiple`` of `TrainConfig`.
    Raises:
        InputError: an adapter that cannot be cut (`squeezable_layers`).
    """

    def __init__(self, model: nn.Module, schedule: RankSchedule, *, budget: str, multiple: int) -> None:
        squeezable_layers(model)
        self.schedule = schedule
        self.rows: list[dict[str, Any]] = []
        self.after_cut: list[Callable[[], object]] = []
        self._model, self._budget, self._multiple = model, budget, multiple

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        lr_scheduler: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        assert state.max_steps == self.schedule.total_steps, (state.max_steps, self.schedule)
        if self.schedule.rewarm_steps:
            assert isinstance(lr_scheduler, LambdaLR)
            lr_scheduler.lr_lambdas = [self._rewarmed(scheduled) for scheduled in lr_scheduler.lr_lambdas]

    def _rewarmed(self, scheduled: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: scheduled(step) * self.schedule.lr_factor(step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        if state.global_step not in self.schedule.cuts:
            return
        svds = decompose(self._model)
        # Several GPUs may round differently, and all must cut the same.
        _agree([tensor for svd in svds.values() for tensor in (svd.U, svd.sigma, svd.V)])
        rank = self.schedule.rank_in(state.global_step + 1)
        ranks = budget_ranks(svds, rank, self._multiple) if self._budget == "global" else uniform_ranks(svds, rank)
        squeeze(self._model, svds, ranks, optimizer, agree=_agree)
        self.rows += [
            {"step": state.global_step, "module": name.removeprefix(PREFIX), **_described(svd, ranks[name])}
            for name, svd in svds.items()
        ]
        self._announce()

    def _announce(self) -> None:
        for listener in self.after_cut:
            listener()

    def table(self) -> pd.DataFrame:
        """Return a row a cut and module, with the columns `SQUEEZE_COLUMNS`."""
        return pd.DataFrame(self.rows, columns=list(SQUEEZE_COLUMNS))

    def checkpoint_part(self) -> CheckpointPart:
        """Return the part of a checkpoint that holds the cuts so far, and cuts a fresh adapter to their ranks."""
        return CheckpointPart(
            save=lambda folder: write_json(Path(folder) / STATE, self.rows), prepare=self._restore_ranks
        )

    def _restore_ranks(self, folder: str) -> None:
        self.rows = read_json(Path(folder) / STATE)
        ranks = {PREFIX + row["module"]: row["rank_after"] for row in self.rows}
        if ranks:
            adopt_ranks(self._model, ranks)
            self._announce()


def _agree(tensors: Sequence[torch.Tensor]) -> None:
    """Give every process the tensors of the first one."""
    broadcast(list(tensors))


def _described(svd: AdapterSVD, rank: int) -> dict[str, Any]:
    squares = svd.sigma.square()
    whole = float(squares.sum())
    lost = float(squares[rank:].sum()) / whole if whole else 0.0
    return {
        "d_out": len(svd.U), "d_in": len(svd.V), "rank_before": svd.rank, "rank_after": min(rank, svd.rank),
        "retained_energy": 1 - lost, "relative_error": lost**0.5,
    }  # fmt: skip
