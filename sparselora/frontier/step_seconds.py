"""Times of the candidates' training steps, interleaved, on batches of real rows; by the code of `bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from sparselora.bench.timing import StepTimes, TimedModel, adapt, shared_copy, time_variants
from sparselora.config.sparsity import SparsityConfig
from sparselora.config.train import TrainConfig
from sparselora.contextual.handle import sparsify
from sparselora.data.batches import Collator, Example, LengthGroups
from sparselora.data.load import encode_rows
from sparselora.errors import InputError
from sparselora.evaluation.losses import held_out_losses
from sparselora.frontier.candidates import DENSE, Candidate, with_settings
from sparselora.frontier.pilots import PilotRuns
from sparselora.models.load import load_classifier
from sparselora.runs.progress import Progress
from sparselora.training.run import calibration_batches

TIME_COLUMNS = ("candidate", "seconds_per_step", "q25", "q75", "tokens_per_s", "peak_gb", "setup_seconds")

WARM_ROUNDS, LEAST_ROUNDS, _MOST_ROUNDS = 1, 3, 12
_TIMING_SHARE, _SHARE_OF_TIMES = 0.15, 0.25
_PROBED_ROWS, _PROBED_STEPS = 8, 2

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Probe:
    """First measurements, of dense alone, on which the plan of the other measurements rests.

    Attributes:
        setup_s: seconds to set up a candidate that is to be timed.
        step_s: seconds of an optimizer step.
        row_s: seconds to evaluate a held-out row.
        overhead_s: seconds of a pilot run beyond its steps and its evaluation.
    """

    setup_s: float
    step_s: float
    row_s: float
    overhead_s: float

    def rounds(self, candidates: int, budget_s: float) -> int:
        """Return the timed rounds of ``candidates`` candidates."""
        affordable = int(_TIMING_SHARE * budget_s / (candidates * self.step_s))
        return min(_MOST_ROUNDS, max(LEAST_ROUNDS, affordable))

    def timed_candidates(self, budget_s: float) -> int:
        """Return the number of candidates that can be set up and timed within a quarter of the budget."""
        steps = LEAST_ROUNDS + WARM_ROUNDS
        return int(_SHARE_OF_TIMES * budget_s / (self.setup_s + steps * self.step_s))


class StepClock:
    """The frozen weights of one model, of which a copy with an adapter of its own is timed for every candidate.

    Args:
        runs: whose model, data and settings these are.
        rows: training rows to make batches of; 0 for all.
    """

    def __init__(self, runs: PilotRuns, rows: int) -> None:
        config = runs.config.replace(train_samples=rows)
        data = runs.data(config)
        self._runs, self._config = runs, config
        self._classifier: nn.Module | None = None
        if runs.is_causal:
            self._tokenizer = runs.base().tokenizer
        else:
            assert config.model is not None
            self._classifier, self._tokenizer = load_classifier(config.model, len(data.labels))
            self._classifier.to(runs.device).requires_grad_(False)
        self.train = encode_rows(data.train, data, self._tokenizer, config)
        self._held_out = encode_rows(data.eval.iloc[:_PROBED_ROWS], data, self._tokenizer, config)
        longest = min(config.max_length, self._tokenizer.model_max_length)
        self._collator = Collator(self._tokenizer.pad_token_id, runs.is_causal, longest=longest)

    @property
    def _model(self) -> nn.Module:
        return self._runs.base().model if self._classifier is None else self._classifier

    def batches(self, count: int) -> list[Batch]:
        """Return ``count`` batches (or all there are) in an order that a run may have, on the CPU."""
        config, rows = self._config, len(self.train)
        if config.group_by_length:
            lengths = [len(example["input_ids"]) for example in self.train]
            order = list(LengthGroups(lengths, config.train_bsz * config.grad_accum, config.seed))
        else:
            order = np.random.default_rng(config.seed).permutation(rows).tolist()
        parts: list[list[Example]] = [
            [self.train[i] for i in order[start : start + config.train_bsz]]
            for start in range(0, rows, config.train_bsz)
        ]
        whole = [part for part in parts if len(part) == config.train_bsz] or parts
        return [self._collator.tensors(part) for part in whole[:count]]

    def probe(self, dense: Candidate) -> Probe:
        """Measure dense alone: its step, an evaluation, and what a pilot run takes beyond both.

        Raises:
            InputError: dense is not possible.
        """
        began = time.perf_counter()
        variant = self.variant(dense, [])
        setup_s = time.perf_counter() - began
        times = time_variants({DENSE: variant}, self.batches(LEAST_ROUNDS), rounds=2, warmup=1)[DENSE]
        variant.close()
        seconds = []
        for _ in range(2):  # the first pass on a GPU takes seconds, which say nothing about the others
            began = time.perf_counter()
            held_out_losses(
                self._model, self._held_out, self._tokenizer, batch_size=self._config.eval_bsz, bf16=self._runs.bf16
            )
            seconds.append(time.perf_counter() - began)
        step_s = times.median_ms / 1000 * self._config.grad_accum
        row_s = seconds[-1] / len(self._held_out)
        pilot = self._runs.configured(
            dense, seed=self._config.seed, steps=_PROBED_STEPS, train_rows=self._config.train_samples,
            eval_rows=len(self._held_out),
        )  # fmt: skip
        began = time.perf_counter()
        self._runs.train(pilot, "first pilot run")
        wall_s = time.perf_counter() - began
        return Probe(setup_s, step_s, row_s, max(0.0, wall_s - _PROBED_STEPS * step_s - len(self._held_out) * row_s))

    def variant(self, candidate: Candidate, setup_s: list[float]) -> TimedModel:
        """Return a copy of the model that trains as ``candidate`` says; seconds of its set-up go to ``setup_s``.

        Raises:
            InputError: the candidate is not possible with this model.
        """
        config, runs = with_settings(self._config, candidate.settings), self._runs
        sparsity = config.seeded_sparsity
        model = adapt(
            shared_copy(self._model), r=config.lora_r, alpha=config.lora_alpha, targets=config.target_modules,
            causal=runs.is_causal,
        )  # fmt: skip
        convert: Callable[[nn.Module], Any] | None = None
        if sparsity is not None:
            convert = self._conversion(config, sparsity, setup_s)
        return TimedModel(model, runs.device, bf16=runs.bf16, convert=convert)

    def _conversion(
        self, config: TrainConfig, sparsity: SparsityConfig, setup_s: list[float]
    ) -> Callable[[nn.Module], Any]:
        def convert(model: nn.Module) -> Any:
            began = time.perf_counter()
            calibration = calibration_batches(config, self.train, self._collator, self._runs.device)
            handle = sparsify(
                model, sparsity, calibration=calibration, cache_dir=self._runs.cache_dir, keep_weights=True
            )
            setup_s.append(time.perf_counter() - began)
            return handle

        return convert

    def measure(self, candidates: Sequence[Candidate], rounds: int) -> tuple[pd.DataFrame, dict[str, str]]:
        """Time the steps of ``candidates`` in turn.

        Returns:
            A row a candidate with the columns `TIME_COLUMNS`, and the candidates that this model cannot have, with the
            reason.
        Raises:
            InputError: dense is not possible.
        """
        variants: dict[str, TimedModel] = {}
        setups: dict[str, float] = {}
        problems: dict[str, str] = {}
        calibrated: dict[str, float] = {}
        with Progress(len(candidates), "candidate", "setting up") as progress:
            for candidate in candidates:
                try:
                    setups[candidate.name], variants[candidate.name] = self._set_up(candidate, calibrated)
                except InputError as error:
                    if candidate.name == DENSE:
                        raise
                    problems[candidate.name] = str(error)
                progress.update()
        batches = self.batches(rounds)
        with Progress((rounds + WARM_ROUNDS) * len(variants), "step", "timing") as progress:
            times = time_variants(variants, batches, rounds=rounds, warmup=WARM_ROUNDS, progress=progress.update)
        for variant in variants.values():
            variant.close()
        tokens = [int(batches[i % len(batches)]["attention_mask"].sum()) for i in range(rounds)]
        rows = [self._row(name, step_times, setups[name], tokens) for name, step_times in times.items()]
        return pd.DataFrame(rows, columns=list(TIME_COLUMNS)), problems

    def _set_up(self, candidate: Candidate, calibrated: dict[str, float]) -> tuple[float, TimedModel]:
        """Return the seconds of a set-up that begins without a cache, and the variant.

        The first candidate of a mode is set up twice: the difference is what the others of its mode find in the cache.

        Args:
            calibrated: seconds of calibration by mode; receives that of a new one.
        """
        config = with_settings(self._config, candidate.settings)
        mode = config.sparsity.mode if config.sparsity is not None else ""
        setup_s: list[float] = []
        variant = self.variant(candidate, setup_s)
        if not setup_s:
            return 0.0, variant
        if mode in calibrated or not (config.sparsity is not None and config.sparsity.is_sparse):
            return setup_s[0] + calibrated.get(mode, 0.0), variant
        variant.close()
        variant = self.variant(candidate, setup_s)
        calibrated[mode] = max(0.0, setup_s[0] - setup_s[1])
        return setup_s[0], variant

    def _row(self, name: str, times: StepTimes, setup_s: float, tokens: Sequence[int]) -> dict[str, Any]:
        seconds = np.array(times.total) / 1000
        low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)) * self._config.grad_accum
        per_round = len(seconds) // len(tokens)
        return dict(
            zip(
                TIME_COLUMNS,
                (name, middle, low, high, per_round * sum(tokens) / seconds.sum(), times.peak_mb / 1000, setup_s),
                strict=True,
            )
        )
