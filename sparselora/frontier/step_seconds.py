"""Times of the candidates' training steps, interleaved, on batches of real rows; by the code of `bench`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from sparselora.bench.timing import BURST, StepTimes, TimedModel, adapt, shared_copy, time_variants
from sparselora.config.sparsity import SparsityConfig
from sparselora.config.train import TrainConfig
from sparselora.contextual.handle import sparsify
from sparselora.data.batches import BatchOrder, Collator, Example, LengthGroups
from sparselora.data.load import encode_rows
from sparselora.errors import InputError
from sparselora.evaluation.losses import held_out_losses
from sparselora.frontier.candidates import DENSE, Candidate, with_settings
from sparselora.frontier.device_memory import OUT_OF_MEMORY, is_out_of_memory, release_memory
from sparselora.frontier.pilots import PilotRuns
from sparselora.models.load import load_classifier
from sparselora.runs.progress import Progress
from sparselora.training.run import calibration_batches

TIME_COLUMNS = ("candidate", "seconds_per_step", "q25", "q75", "tokens_per_s", "peak_gb", "setup_seconds")

_MOST_ROUNDS = 12
_TIMING_SHARE, _SHARE_OF_TIMES = 0.15, 0.25

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Amounts:
    """Amounts of measurement on one kind of device.

    Attributes:
        warm_rounds, least_rounds: rounds that are not counted, and those that are, at least.
        steps_per_round: steps that a candidate takes in a counted round.
        batches: different batches, at most.
        probed_rows: held-out rows of an evaluation, in batches of ``eval_bsz``.
        probed_steps: steps of the first pilot run.
        passes: how often each of the first measurements is made; the last one counts.
    """

    warm_rounds: int
    least_rounds: int
    steps_per_round: int
    batches: int
    probed_rows: int
    probed_steps: int
    passes: int

    @classmethod
    def on(cls, device: torch.device, eval_bsz: int) -> Amounts:
        if device.type != "cuda":
            return cls(1, 3, 1, _MOST_ROUNDS, probed_rows=8, probed_steps=2, passes=1)
        # A step is timed as the replay of a graph of its own batch's shape, or nearly, as in a long run. Two warm
        # passes over the batches capture most of them; their number bounds the time that this takes. What comes first
        # also compiles kernels. The first pilot run is long enough to bear the captures that each of them begins with.
        batches = 6
        return cls(1 + 2 * batches, batches, BURST, batches, probed_rows=2 * eval_bsz, probed_steps=16, passes=2)


@dataclass(frozen=True)
class Probe:
    """First measurements, of dense alone, on which the plan of the other measurements rests.

    Attributes:
        candidate_s: seconds to set up a candidate and to time it in the least number of rounds.
        step_s: seconds of an optimizer step.
        row_s: seconds to evaluate a held-out row.
        overhead_s: seconds of a pilot run beyond its steps and its evaluation.
    """

    candidate_s: float
    step_s: float
    row_s: float
    overhead_s: float

    def timed_candidates(self, budget_s: float) -> int:
        """Return the number of candidates that can be set up and timed within a quarter of the budget."""
        return int(_SHARE_OF_TIMES * budget_s / self.candidate_s)


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
        self._amounts = Amounts.on(runs.device, config.eval_bsz)
        self._calibration_s: dict[str, float] = {}  # by mode
        self._compiled: set[tuple[str, str]] = set()  # mode and precision
        self._classifier: nn.Module | None = None
        if runs.is_causal:
            self._tokenizer = runs.base().tokenizer
        else:
            assert config.model is not None
            self._classifier, self._tokenizer = load_classifier(config.model, len(data.labels))
            self._classifier.to(runs.device).requires_grad_(False)
        self.train = encode_rows(data.train, data, self._tokenizer, config)
        self._held_out = encode_rows(data.eval.iloc[: self._amounts.probed_rows], data, self._tokenizer, config)
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
        elif config.shuffle_batches:
            order = list(BatchOrder(rows, config.train_bsz * config.grad_accum, config.seed))
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
        amounts = self._amounts
        batches = self.batches(amounts.batches)
        for _ in range(amounts.passes):
            began = time.perf_counter()
            variant = self.variant(dense, [], self._runs.cache_dir)
            times = time_variants(
                {DENSE: variant}, batches, rounds=amounts.least_rounds, warmup=amounts.warm_rounds
            )[DENSE]  # fmt: skip
            variant.close()
            candidate_s = time.perf_counter() - began
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
            dense, seed=self._config.seed, steps=amounts.probed_steps, train_rows=self._config.train_samples,
            eval_rows=len(self._held_out),
        )  # fmt: skip
        for _ in range(amounts.passes):
            began = time.perf_counter()
            self._runs.train(pilot, "first pilot run")
            wall_s = time.perf_counter() - began
        rest_s = wall_s - amounts.probed_steps * step_s - len(self._held_out) * row_s
        return Probe(candidate_s, step_s, row_s, max(0.0, rest_s))

    def rounds(self, candidates: int, step_s: float, budget_s: float) -> int:
        """Return the timed rounds of ``candidates`` candidates with steps of ``step_s`` seconds."""
        affordable = int(_TIMING_SHARE * budget_s / (candidates * self._amounts.steps_per_round * step_s))
        return min(_MOST_ROUNDS, max(self._amounts.least_rounds, affordable))

    def variant(self, candidate: Candidate, setup_s: list[float], cache_dir: str) -> TimedModel:
        """Return a copy of the model that trains as ``candidate`` says; seconds of its set-up go to ``setup_s``.

        Raises:
            InputError: the candidate is not possible with this model.
        """
        config, runs = with_settings(self._config, candidate.settings), self._runs
        sparsity = config.seeded_sparsity
        model = adapt(
            shared_copy(self._model), r=config.lora_r, alpha=config.lora_alpha, targets=config.target_modules,
            causal=runs.is_causal, exclude=config.exclude_modules, layers=config.layers,
        )  # fmt: skip
        convert: Callable[[nn.Module], Any] | None = None
        if sparsity is not None:
            convert = self._conversion(config, sparsity, setup_s, cache_dir)
        return TimedModel(model, runs.device, bf16=runs.bf16, convert=convert)

    def _conversion(
        self, config: TrainConfig, sparsity: SparsityConfig, setup_s: list[float], cache_dir: str
    ) -> Callable[[nn.Module], Any]:
        def convert(model: nn.Module) -> Any:
            began = time.perf_counter()
            calibration = calibration_batches(config, self.train, self._collator, self._runs.device)
            handle = sparsify(model, sparsity, calibration=calibration, cache_dir=cache_dir, keep_weights=True)
            setup_s.append(time.perf_counter() - began)
            return handle

        return convert

    def measure(self, candidates: Sequence[Candidate], rounds: int) -> tuple[pd.DataFrame, dict[str, str]]:
        """Time the steps of ``candidates`` in turn, dense first.

        All of them are on the device at a time. If its memory does not suffice they are timed in two halves, and so on,
        each with dense, whose time makes the halves comparable.

        Returns:
            A row a candidate with the columns `TIME_COLUMNS`, and the candidates that this model or this device cannot
            have, with the reason.
        Raises:
            InputError: dense is not possible.
        """
        dense, *others = candidates
        problems: dict[str, str] = {}
        rows: list[dict[str, Any]] = []
        waves = [others]
        while waves:
            wave = waves.pop(0)
            measured = self._timed([dense, *wave], rounds, problems)
            release_memory(self._runs.device)
            if measured is None and not wave:
                raise InputError(f"{OUT_OF_MEMORY} for a step of dense training; use a smaller train_bsz or max_length")
            if measured is None:
                middle = (len(wave) + 1) // 2
                waves[:0] = [wave[:middle], wave[middle:]] if len(wave) > 1 else []
                problems |= {wave[0].name: OUT_OF_MEMORY} if len(wave) == 1 else {}
                continue
            if not rows:
                rows.append(measured[0])
            slower = rows[0]["seconds_per_step"] / measured[0]["seconds_per_step"]
            rows += [_scaled(row, slower) for row in measured[1:]]
        if not rows:  # nothing went next to dense
            return self.measure([dense], rounds)[0], problems
        return pd.DataFrame(rows, columns=list(TIME_COLUMNS)), problems

    def _timed(
        self, candidates: Sequence[Candidate], rounds: int, problems: dict[str, str]
    ) -> list[dict[str, Any]] | None:
        """Return the rows of ``candidates`` without those that are not possible, whose reasons go to ``problems``.

        None if the device has no memory for all of them at a time.
        """
        variants: dict[str, TimedModel] = {}
        setups: dict[str, float] = {}
        batches = self.batches(min(rounds, self._amounts.batches))
        warm_rounds = self._amounts.warm_rounds
        try:
            with Progress(len(candidates), "candidate", "setting up") as progress:
                for candidate in candidates:
                    try:
                        setups[candidate.name], variants[candidate.name] = self._set_up(candidate)
                    except InputError as error:
                        if candidate.name == DENSE:
                            raise
                        problems[candidate.name] = str(error)
                    progress.update()
            with Progress((rounds + warm_rounds) * len(variants), "step", "timing") as progress:
                times = time_variants(variants, batches, rounds=rounds, warmup=warm_rounds, progress=progress.update)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            for variant in variants.values():
                variant.close()
        tokens = [int(batches[i % len(batches)]["attention_mask"].sum()) for i in range(rounds)]
        return [self._row(name, step_times, setups[name], tokens) for name, step_times in times.items()]

    def _set_up(self, candidate: Candidate) -> tuple[float, TimedModel]:
        """Return the seconds of a set-up that begins without a cache, and the variant.

        The first candidate of a mode is set up twice: the difference is what the others of its mode find in the cache.
        Before that, on a GPU, is a set-up that compiles the kernels, for which no later run pays.
        """
        sparsity = with_settings(self._config, candidate.settings).sparsity
        setup_s: list[float] = []
        if sparsity is None:
            return 0.0, self.variant(candidate, setup_s, self._runs.cache_dir)
        kernels = sparsity.mode, sparsity.frozen_precision
        if self._runs.device.type == "cuda" and kernels not in self._compiled:
            with tempfile.TemporaryDirectory(prefix="sparselora-frontier-") as cache_dir:
                self.variant(candidate, [], cache_dir).close()
            self._compiled.add(kernels)
        variant = self.variant(candidate, setup_s, self._runs.cache_dir)
        calibration_s = self._calibration_s.get(sparsity.mode)
        if calibration_s is not None or not sparsity.is_sparse:
            return setup_s[0] + (calibration_s or 0.0), variant
        variant.close()
        variant = self.variant(candidate, setup_s, self._runs.cache_dir)
        self._calibration_s[sparsity.mode] = max(0.0, setup_s[0] - setup_s[1])
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


def _scaled(row: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return a row whose step took ``factor`` times as long."""
    times = {column: row[column] * factor for column in ("seconds_per_step", "q25", "q75")}
    return {**row, **times, "tokens_per_s": row["tokens_per_s"] / factor}
