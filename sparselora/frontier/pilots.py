"""Pilot runs: short trainings of a candidate by the one training path, evaluated on the same held-out rows.

The base model is loaded once and goes from one pilot run to the next: an adapter changes no base weight, and taking it
and the sparsity off leaves every module as loaded. A classifier is loaded for each run, for its head is drawn then, and
so is a model with gradient checkpointing, which stays switched on in its modules.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from sparselora.config.train import TrainConfig
from sparselora.data.load import Data, load_data
from sparselora.frontier.candidates import Candidate, with_settings
from sparselora.frontier.device_memory import release_memory
from sparselora.models.load import is_bf16
from sparselora.runs.folder import RunFolder
from sparselora.training.run import BaseModel, PreparedRun, fine_tuner, load_base, prepare, released_base


@dataclass(frozen=True)
class PilotResult:
    """Measurements of one pilot run.

    Attributes:
        steps: optimizer steps.
        rows_seen: training rows, a repeated one as often as it came.
        train_seconds: of the steps alone.
        rows: a row a held-out row: ``row`` (id in the source), ``loss`` (sum over its labels, nats), ``labels``.
    """

    steps: int
    rows_seen: int
    train_seconds: float
    rows: pd.DataFrame

    @property
    def loss(self) -> float:
        """Held-out loss in nats per label."""
        return loss_per_label(self.rows)


def loss_per_label(rows: pd.DataFrame) -> float:
    """Return Σ loss / Σ labels over held-out rows."""
    return float(rows["loss"].sum() / rows["labels"].sum())


class PilotRuns:
    """Trainings of one model and data set that differ in a candidate's settings, their seed and their length.

    Attributes:
        config: of the run that the search is for; its device is resolved.
        cache_dir: where estimators and calibration are kept between pilot runs.
        device: of the model.
    """

    def __init__(self, config: TrainConfig, cache_dir: str, device: torch.device) -> None:
        self.config, self.cache_dir, self.device = config, cache_dir, device
        # Never entered: a pilot run leaves neither records nor checkpoints.
        self._folder = RunFolder(tempfile.mkdtemp(dir=cache_dir), "frontier", {})
        self._base: BaseModel | None = None
        self._data: dict[tuple[int, int, int], Data] = {}

    @property
    def is_causal(self) -> bool:
        return self.config.task == "causal_lm"

    @property
    def bf16(self) -> bool:
        return is_bf16(self.config.dtype, self.device)

    def data(self, config: TrainConfig) -> Data:
        """Return the rows of ``config``: read once for each seed and number of samples."""
        place = (config.seed, config.train_samples, config.eval_samples)
        if place not in self._data:
            self._data[place] = load_data(config)
        return self._data[place]

    def configured(
        self, candidate: Candidate, *, seed: int, steps: int, train_rows: int, eval_rows: int
    ) -> TrainConfig:
        """Return the settings of a pilot run of ``steps`` steps; 0 rows are all."""
        return with_settings(self.config, candidate.settings).replace(
            seed=seed, max_steps=steps, epochs=1.0, train_samples=train_rows, eval_samples=eval_rows, save_steps=0,
            eval_steps=0, report_to="none", generations=0, push_to_hub=False, hub_model_id=None,
        )  # fmt: skip

    def base(self) -> BaseModel:
        """Return the language model on its device, loaded if it is not; it stays the next run's."""
        if self._base is None:
            self._base = load_base(self.config, torch.bfloat16 if self.bf16 else torch.float32)
            self._base.model.to(self.device).requires_grad_(False)
        return self._base

    @contextlib.contextmanager
    def prepared(self, config: TrainConfig) -> Iterator[PreparedRun]:
        """Yield a run of ``config`` before its first step, and take its adapter off the base model afterwards.

        Raises:
            InputError: as `sparselora.training.run.prepare`.
        """
        base = self.base() if self.is_causal else None
        self._base = None  # after an error its modules may be any: the next run loads it again
        run = prepare(config, self.data(config), self._folder, self.cache_dir, base)
        yield run
        if base is not None and not config.gradient_checkpointing:
            self._base = released_base(run)
        del run
        release_memory(self.device)

    def untrained(self, config: TrainConfig) -> pd.DataFrame:
        """Return the held-out rows of the model before its first step, as `PilotResult.rows`."""
        with self.prepared(config) as run:
            return self._rows(run, fine_tuner(run, lambda *_: None).evaluate_rows())

    def train(self, config: TrainConfig, label: str) -> PilotResult:
        """Train by ``config`` and evaluate.

        Raises:
            DivergedError: the loss stopped being finite.
            InputError: as `sparselora.training.run.prepare`.
        """
        with self.prepared(config) as run:
            trainer = fine_tuner(run, lambda *_: None, label)
            trainer.run()
            metrics = trainer.meter.table()
            rows = self._rows(run, trainer.evaluate_rows())
        return PilotResult(len(metrics), int(metrics["rows"].sum()), trainer.train_s, rows)

    def _rows(self, run: PreparedRun, evaluated: pd.DataFrame) -> pd.DataFrame:
        labels: Any = evaluated["tokens"] if run.is_causal else np.ones(len(evaluated), dtype=np.int64)
        return pd.DataFrame({"row": run.data.eval["row"].to_numpy(), "loss": evaluated["loss"], "labels": labels})
