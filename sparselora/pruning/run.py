"""One run of Phase C: warm up a LoRA on text classification, prune its rank channels, train on; measure throughout.

Or, in place of pruning, gate them by token: every channel stays, and each token uses some.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, TrainerControl, TrainerState, TrainingArguments

from sparselora.config.token_gates import TokenGateConfig
from sparselora.models import lora
from sparselora.numerics.channels import keep_count
from sparselora.token_gates.gates import (
    TokenGateCallback,
    TokenGates,
    active_adapter_flops_per_token,
    attach_token_gates,
    calibrate,
    find_token_gates,
    gate_flops_per_token,
    gate_parameters,
    save_token_gates,
)
from sparselora.token_gates.outputs import energies, sum_counts
from sparselora.training.loop import Evaluation, PhaseResult, PhaseTrainer, Settings, linear_schedule
from sparselora.training.meter import peak_memory_mb

_EVALUATIONS = 4
"""Evaluations spread evenly over the training after pruning; the last is the outcome's ``after``."""
_CALIBRATION_SAMPLES = 128
"""Training sentences from which the method ``gradient`` takes its sensitivities, and a gate its thresholds."""


@dataclass(frozen=True)
class GateOutcome:
    """What gates did on the held-out rows at the end, padding left out; by module.

    Attributes:
        active_rank: mean number of active channels of a token.
        frequency: share of the tokens for which each channel was active ``(r,)``.
        energy: ‖B_k‖‖A_k‖ of each channel ``(r,)``.
        parameters, flops_per_token: of the gates themselves, over all modules.
        static: the channels that were active most often, as many as the budget has.
        static_evaluation: the trained model with these alone, for every token.
    """

    active_rank: dict[str, float]
    frequency: dict[str, NDArray[np.float64]]
    energy: dict[str, NDArray[np.floating]]
    parameters: int
    flops_per_token: int
    static: lora.Kept
    static_evaluation: Evaluation


@dataclass(frozen=True)
class Outcome:
    """What a run measured. ``ranks`` are the channels each adapted module keeps, pairs are (before, after) pruning.

    With gates ``ranks`` are the channels that the budget allows a token, and the FLOPs after are those of the channels
    that were active. ``settled`` is the step after pruning from which the budget is the final one.
    """

    warm: PhaseResult
    post: PhaseResult
    before: Evaluation
    right_after: Evaluation
    after: Evaluation
    ranks: dict[str, int]
    adapter_params: tuple[int, int]
    adapter_flops_per_token: tuple[float, float]
    head_params: int
    peak_mb: float
    settled: int = 0
    gate: GateOutcome | None = None

    @property
    def active_r(self) -> float:
        """Mean number of channels that a token uses, over the modules."""
        used = self.ranks if self.gate is None else self.gate.active_rank
        return sum(used.values()) / len(used)

    def steps_to_recovery(self) -> int | None:
        """Steps after pruning until accuracy is back where it was, at the evaluated steps; None if it never was.

        While a budget still falls the model has more channels than it will have: those steps do not count.
        """
        seen = {step: e for step, e in self.post.evaluations.items() if step >= self.settled} | {0: self.right_after}
        return next((step for step in sorted(seen) if seen[step].accuracy >= self.before.accuracy), None)


@dataclass(frozen=True)
class Study:
    """A model with a fresh adapter, its data as tokens, and how to prune and train it; `run` may be called once.

    ``method`` is one of `channels.PRUNE_METHODS`, ``mask`` masks channels in place of removing them, and
    ``metric`` is the data's own, of `sparselora.training.loop.METRICS`. ``gate``, if given, takes the place of the four
    settings of pruning.
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
    gate: TokenGateConfig | None = None

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
        gates = self._attach_gates(optimizer)

        carried = self._optimizer()
        lora.carry_optimizer_state(optimizer, carried, replaced)
        points = frozenset(round(post_steps * part / _EVALUATIONS) for part in range(1, _EVALUATIONS + 1))
        trainer = self._trainer(carried, post_steps, warm_steps, total, evaluate_at=points, gates=gates)
        right_after = trainer.evaluate_now()
        post = trainer.run_phase()
        flops_after: float = lora.adapter_flops_per_token(self.model)
        gated = None
        if gates is not None:
            gated = self._measure_gates(gates, trainer)
            flops_after = active_adapter_flops_per_token(gates, gated.active_rank)
        return Outcome(
            warm=warm,
            post=post,
            before=before,
            right_after=right_after,
            after=post.evaluations[post_steps] if post_steps else right_after,
            ranks=ranks,
            adapter_params=(params, lora.adapter_parameters(self.model)),
            adapter_flops_per_token=(flops, flops_after),
            head_params=head,
            peak_mb=peak_memory_mb(self.settings.device),
            settled=0 if self.gate is None else min(math.ceil(self.gate.anneal_ratio * post_steps - 1e-9), post_steps),
            gate=gated,
        )

    def export(self, folder: Path, base_model: str, gated: GateOutcome | None) -> None:
        """Write what was trained to ``folder/adapter``, of a gated run with its gates.

        Its best fixed subset goes to ``folder/adapter_static``, and is all that is left of the model: the last thing to
        do with it.
        """
        lora.export_adapter(self.model, folder / "adapter", base_model)
        if gated is not None:
            save_token_gates(self.model, folder / "adapter")
            find_token_gates(self.model).remove()
            lora.prune(self.model, gated.static)
            lora.export_adapter(self.model, folder / "adapter_static", base_model)

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
        gates: TokenGates | None = None,
    ) -> PhaseTrainer:
        gating = {} if gates is None else _gating(gates)
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
            **gating,
        )

    def _prune(self) -> tuple[dict[str, int], list[lora.Replaced]]:
        """Act on the rank channels; the rank each adapted module is left with, and the replaced parameters."""
        ranks = {name: lora.rank(layer) for name, layer in lora.lora_layers(self.model).items()}
        if self.gate is not None:
            return {name: keep_count(r, self.gate.budget) for name, r in ranks.items()}, []
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

    def _attach_gates(self, optimizer: torch.optim.Optimizer) -> TokenGates | None:
        """The gates, begun at their final budget; a threshold starts where it keeps that.

        In the singular basis the adapter is turned, and the moments that ``optimizer`` has of it are gone.
        """
        if self.gate is None:
            return None
        gates = attach_token_gates(self.model, self.gate)
        if self.gate.budget < 1:
            gates.begin(optimizer)
        if self.gate.budget < 1 and self.gate.select == "threshold":
            with self._autocast():
                calibrate(self.model, self._calibration_batches())
        return gates

    def _measure_gates(self, gates: TokenGates, trainer: PhaseTrainer) -> GateOutcome:
        """What the last evaluation counted, and the best fixed subset in its turn."""
        sum_counts(gates, lambda count: trainer.accelerator.reduce(count, reduction="sum"))
        static = gates.static_subset()
        active_rank, frequency = gates.active_rank(), gates.frequency()
        budget, flops = gates.budget, gate_flops_per_token(gates)
        gates.set_budget(1)
        masks = lora.mask_channels(self.model, static)
        evaluation = trainer.evaluate_now()
        masks.remove()
        gates.set_budget(budget)
        return GateOutcome(
            active_rank=active_rank,
            frequency=frequency,
            energy=energies(gates),
            parameters=gate_parameters(gates),
            flops_per_token=flops,
            static=static,
            static_evaluation=evaluation,
        )

    def _calibration_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        part = self.train.select(range(min(_CALIBRATION_SAMPLES, len(self.train))))
        for batch in DataLoader(part, self.settings.train_bsz, collate_fn=DataCollatorWithPadding(self.tokenizer)):
            yield {name: value.to(self.settings.device) for name, value in batch.items()}

    def _calibration_losses(self) -> Iterator[torch.Tensor]:
        self.model.eval()
        for batch in self._calibration_batches():
            with self._autocast():
                loss = self.model(**batch).loss
            yield loss

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = self.settings.device
        return torch.autocast(device.type, torch.bfloat16) if self.settings.bf16 else contextlib.nullcontext()


class _MovingBudget(TokenGateCallback):
    """Moves the budget when a step ends too: what is evaluated then has that of the next, the last evaluation the final
    one."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.on_step_begin(args, state, control, **kwargs)


def _gating(gates: TokenGates) -> dict[str, Any]:
    """What `PhaseTrainer` needs to know of gates."""
    idle = gates.config.anneal_ratio > 0 or not all(gate.gates for gate in gates)
    return {
        "before_evaluation": gates.reset_counts,
        "callbacks": [_MovingBudget(gates, on_begin=lambda _: None)],  # they have begun
        # A head has no part in a step whose budget leaves its module all channels.
        "find_unused_parameters": gates.config.policy == "learned" and idle,
    }
