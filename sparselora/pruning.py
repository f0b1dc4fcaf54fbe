"""One run of Phase C: warm up a LoRA on text classification, prune its rank channels, train on; measure throughout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from sparselora import lora
from sparselora.training import Evaluation, PhaseResult, PhaseTrainer, Settings, linear_schedule, peak_memory_mb

_EVALUATIONS = 4
"""Evaluations spread evenly over the training after pruning; the last is the outcome's ``after``."""
_CALIBRATION_SAMPLES = 128
"""Training sentences from which the method ``gradient`` takes its sensitivities."""


@dataclass(frozen=True)
class Outcome:
    """What a run measured. ``ranks`` are the channels each adapted module keeps, pairs are (before, after) pruning."""

    warm: PhaseResult
    post: PhaseResult
    before: Evaluation
    right_after: Evaluation
    after: Evaluation
    ranks: dict[str, int]
    adapter_params: tuple[int, int]
    adapter_flops_per_token: tuple[int, int]
    head_params: int
    peak_mb: float

    def steps_to_recovery(self) -> int | None:
        """Steps after pruning until accuracy is back where it was, at the evaluated steps; None if it never was."""
        seen = {0: self.right_after} | self.post.evaluations
        return next((step for step in sorted(seen) if seen[step].accuracy >= self.before.accuracy), None)


@dataclass(frozen=True)
class Study:
    """A model with a fresh adapter, its data as tokens, and how to prune and train it; `run` may be called once.

    ``method`` is one of `sparselora.channels.PRUNE_METHODS`, ``mask`` masks channels in place of removing them, and
    ``metric`` is the data's own, of `sparselora.training.METRICS`.
    """

    model: PeftModel
    tokenizer: Any
    train: Dataset
    held_out: Dataset
    metric: str
    settings: Settings
    method: str
    keep_ratio: float
    scope: str = "module"
    mask: bool = False

    def run(self, warmup_epochs: float, post_epochs: float) -> Outcome:
        """Warm up, evaluate, prune, evaluate, train on. One learning-rate schedule falls over both phases."""
        warm_steps, post_steps = self._steps(warmup_epochs), self._steps(post_epochs)
        total = warm_steps + post_steps
        params, flops = lora.adapter_parameters(self.model), lora.adapter_flops_per_token(self.model)
        head = sum(p.numel() for p in self.model.parameters() if p.requires_grad) - params

        optimizer = self._optimizer()
        trainer = self._trainer(optimizer, warm_steps, 0, total)
        warm = trainer.run_phase()
        before = trainer.evaluate_now()
        trainer.accelerator.free_memory()  # under DDP its hooks hold the parameters that are about to go

        ranks, replaced = self._prune()

        carried = self._optimizer()
        lora.carry_optimizer_state(optimizer, carried, replaced)
        points = frozenset(round(post_steps * part / _EVALUATIONS) for part in range(1, _EVALUATIONS + 1))
        trainer = self._trainer(carried, post_steps, warm_steps, total, evaluate_at=points)
        right_after = trainer.evaluate_now()
        post = trainer.run_phase()
        return Outcome(
            warm=warm,
            post=post,
            before=before,
            right_after=right_after,
            after=post.evaluations[post_steps] if post_steps else right_after,
            ranks=ranks,
            adapter_params=(params, lora.adapter_parameters(self.model)),
            adapter_flops_per_token=(flops, lora.adapter_flops_per_token(self.model)),
            head_params=head,
            peak_mb=peak_memory_mb(self.settings.device),
        )

    def _steps(self, epochs: float) -> int:
        processes = PartialState(cpu=self.settings.device.type == "cpu").num_processes
        batch = self.settings.train_bsz * processes
        return round(epochs * -(-len(self.train) // batch))

    def _optimizer(self) -> torch.optim.AdamW:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.settings.lr, weight_decay=0.0)

    def _trainer(
        self,
        optimizer: torch.optim.Optimizer,
        steps: int,
        first_step: int,
        total: int,
        evaluate_at: frozenset[int] = frozenset(),
    ) -> PhaseTrainer:
        return PhaseTrainer(
            self.model,
            self.tokenizer,
            self.train,
            self.held_out,
            self.metric,
            self.settings,
            steps=steps,
            optimizer=optimizer,
            scheduler=linear_schedule(optimizer, first_step, total),
            # Another order in the second phase, the same for every method: runs of one seed are paired batch by batch.
            data_seed=self.settings.seed + (1_000_000 if first_step else 0),
            evaluate_at=evaluate_at,
        )

    def _prune(self) -> tuple[dict[str, int], list[lora.Replaced]]:
        """Act on the rank channels; the rank each adapted module is left with, and the replaced parameters."""
        ranks = {name: lora.rank(layer) for name, layer in lora.lora_layers(self.model).items()}
        if self.method == "no_prune":
            return ranks, []
        if self.method == "svd":
            replaced = lora.truncate_svd(self.model, self.keep_ratio, self.scope)
            left = {name: lora.rank(layer) for name, layer in lora.lora_layers(self.model).items()}
            return {name: left.get(name, 0) for name in ranks}, replaced
        # A child stream of the seed: the draw does not depend on how many random numbers training took.
        rng = np.random.default_rng(np.random.SeedSequence(self.settings.seed).spawn(1)[0])
        scores = lora.score_channels(self.model, self.method, rng=rng, losses=self._calibration_losses)
        kept = lora.select_channels(scores, self.keep_ratio, self.scope)
        ranks = {name: len(index) for name, index in kept.items()}
        if self.mask:
            lora.mask_channels(self.model, kept)
            return ranks, []
        return ranks, lora.prune(self.model, kept)

    def _calibration_losses(self) -> Iterator[torch.Tensor]:
        part = self.train.select(range(min(_CALIBRATION_SAMPLES, len(self.train))))
        batches = DataLoader(part, self.settings.train_bsz, collate_fn=DataCollatorWithPadding(self.tokenizer))
        device = self.settings.device
        autocast = torch.autocast(device.type, torch.bfloat16) if self.settings.bf16 else contextlib.nullcontext()
        self.model.eval()
        for batch in batches:
            with autocast:
                loss = self.model(**{name: value.to(device) for name, value in batch.items()}).loss
            yield loss
