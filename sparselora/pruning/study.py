"""One run of Phase C: warm up a LoRA on text classification, prune its rank channels, train on; measure throughout.

Or, in place of pruning, gate them by token: every channel stays, and each token uses some.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from peft import PeftModel
from sklearn.metrics import f1_score, matthews_corrcoef
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerControl, TrainerState, TrainingArguments

from sparselora.data.batches import Collator, Example
from sparselora.data.instructions import InstructionData
from sparselora.data.texts import TextData
from sparselora.models import lora
from sparselora.models.model_files import hub_name
from sparselora.numerics.channels import keep_count
from sparselora.pruning.cell import Cell
from sparselora.spectral.squeeze import decompose, squeeze
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
from sparselora.training.meter import peak_memory_mb, steady_steps
from sparselora.training.trainer import FineTuner, Settings, summarise_rows

_EVALUATIONS = 4
"""Evaluations spread evenly over the training after pruning; the last is the outcome's ``after``."""
_CALIBRATION_SAMPLES = 128
"""Training sentences from which the method ``gradient`` takes its sensitivities, and a gate its thresholds."""


METRICS: Mapping[str, Callable[[NDArray[np.int64], NDArray[np.int64]], float]] = {
    "accuracy": lambda labels, predicted: float((labels == predicted).mean()),
    "f1": lambda labels, predicted: float(f1_score(labels, predicted)),
    "matthews": lambda labels, predicted: float(matthews_corrcoef(labels, predicted)),
}
"""Metric of a data set → function of the true and the predicted classes ``(n,)``."""


@dataclass(frozen=True)
class Evaluation:
    """Measurements of a model on the evaluation rows.

    Attributes:
        rows: `FineTuner.evaluate_rows`, in the order of the evaluation rows.
        accuracy: share of the rows that are classified rightly; of a language model, of the labelled tokens.
        loss: mean over the rows, or over the labelled tokens.
        metric: the task's own; of a language model, the loss.
    """

    rows: pd.DataFrame
    accuracy: float
    loss: float
    metric: float


@dataclass(frozen=True)
class PhaseResult:
    """Losses of every step (mean over processes), evaluations by step, and times.

    Attributes:
        step_ms: median over the steps, from a batch at hand to the optimizer step done; NaN without steps.
        seconds: wall clock of the whole phase without its evaluations.
        samples_per_s: rows trained on, over all processes.
        peak_mb: peak memory in MB (1e6 bytes).
    """

    losses: list[float] = field(default_factory=list)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    step_ms: float = float("nan")
    seconds: float = 0.0
    samples_per_s: float = float("nan")
    peak_mb: float = float("nan")


@dataclass(frozen=True)
class GateOutcome:
    """Use of the channels on the held-out rows at the end, padding left out; by module.

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
    """Measurements of a cell. ``ranks`` are the channels each adapted module keeps, pairs are (before, after) pruning.

    ``untrained`` is a language model without its adapter.
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
    untrained: Evaluation | None = None

    @property
    def active_r(self) -> float:
        """Mean number of channels that a token uses, over the modules."""
        used = self.ranks if self.gate is None else self.gate.active_rank
        return sum(used.values()) / len(used)

    def steps_to_recovery(self) -> int | None:
        """Steps after pruning until accuracy is back where it was, at the evaluated steps; None if it never was.

        Of a language model, until the loss is.

        While a budget still falls the model has more channels than it will have: those steps do not count.
        """
        seen = {step: e for step, e in self.post.evaluations.items() if step >= self.settled} | {0: self.right_after}
        before = self.before
        if self.untrained is not None:
            return next((step for step in sorted(seen) if seen[step].loss <= before.loss), None)
        return next((step for step in sorted(seen) if seen[step].accuracy >= before.accuracy), None)


def linear_schedule(
    optimizer: torch.optim.Optimizer, first_step: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear decay to 0 over ``total_steps``, entered at ``first_step``: the phases of a run share one schedule."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - (first_step + step) / total_steps))


@dataclass(frozen=True)
class Study:
    """A cell before its first step: the model with a fresh adapter, and the data as tokens. `run` may be called once.

    Attributes:
        cell: settings.
        data: rows of the data set, as frames.
        model: model with a fresh adapter, on ``device``.
        tokenizer: its tokenizer.
        target_modules: entries of ``target_modules`` that the adapter was attached to.
        train: training examples, as token ids.
        held_out: evaluation examples.
        steps: optimizer steps before and after pruning.
        device: where the model is; of several processes, each has its own.
        bf16: compute in bfloat16 autocast.
        folder: the cell's own.
    """

    cell: Cell
    data: TextData | InstructionData
    model: PeftModel
    tokenizer: Any
    target_modules: list[str]
    train: list[Example]
    held_out: list[Example]
    steps: tuple[int, int]
    device: torch.device
    bf16: bool
    folder: Path

    def run(self) -> Outcome:
        """Warm up, evaluate, prune, evaluate, train on. One learning-rate schedule falls over both phases."""
        post_steps, gate = self.steps[1], self.cell.gate
        params, flops = lora.adapter_parameters(self.model), lora.adapter_flops_per_token(self.model)
        head = sum(p.numel() for p in self.model.parameters() if p.requires_grad) - params

        optimizer = self._optimizer()
        trainer = self._trainer(optimizer, "warm-up")
        untrained = self._evaluate(trainer) if self.cell.is_causal else None  # a fresh adapter adds nothing
        warm = self._train(trainer)
        before = self._evaluate(trainer)
        trainer.accelerator.free_memory()  # under DDP its hooks hold the parameters that are about to go

        ranks, replaced = self._prune(optimizer)
        gates = self._attach_gates(optimizer)

        carried = self._optimizer()
        lora.carry_optimizer_state(optimizer, carried, replaced)
        trainer = self._trainer(carried, "after gating" if gate else "after pruning", gates=gates, is_post=True)
        right_after = self._evaluate(trainer)
        post = self._train(trainer)
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
            peak_mb=float(np.fmax.reduce([warm.peak_mb, post.peak_mb, peak_memory_mb(self.device)])),
            settled=0 if gate is None else min(math.ceil(gate.anneal_ratio * post_steps - 1e-9), post_steps),
            gate=gated,
            untrained=untrained,
        )

    def export_and_dismantle(self, gated: GateOutcome | None) -> None:
        """Write what was trained to ``adapter/`` in the folder, of a gated run with its gates.

        The best fixed subset of a gated run goes to ``adapter_static/``, and is all that is left of the model: the last
        thing to do with it.
        """
        base_model = hub_name(self.cell.model)
        template = self.data.template if isinstance(self.data, InstructionData) else None
        lora.export_adapter(self.model, self.folder / "adapter", base_model, template=template)
        if gated is not None:
            save_token_gates(self.model, self.folder / "adapter")
            find_token_gates(self.model).remove()
            lora.prune(self.model, gated.static)
            lora.export_adapter(self.model, self.folder / "adapter_static", base_model, template=template)

    def _optimizer(self) -> torch.optim.AdamW:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.cell.lr, weight_decay=0.0)

    @property
    def _collator(self) -> Collator:
        return Collator(self.tokenizer.pad_token_id, causal=self.cell.is_causal, multiple=1)

    def _trainer(
        self, optimizer: torch.optim.Optimizer, label: str, *, gates: TokenGates | None = None, is_post: bool = False
    ) -> FineTuner:
        """Build the trainer of one phase, whose optimizer may hold the state of the phase before."""
        warm_steps, post_steps = self.steps
        points = frozenset(round(post_steps * part / _EVALUATIONS) for part in range(1, _EVALUATIONS + 1))
        settings = Settings(
            folder=self.folder,
            causal=self.cell.is_causal,
            device=self.device,
            bf16=self.bf16,
            max_steps=post_steps if is_post else warm_steps,
            train_bsz=self.cell.train_bsz,
            eval_bsz=self.cell.eval_bsz,
            lr=self.cell.lr,
            seed=self.cell.seed,
            # Another order in the second phase, the same for every method: runs of one seed are paired batch by batch.
            data_seed=self.cell.seed + (1_000_000 if is_post and warm_steps else 0),
            evaluate_at=points if is_post else frozenset(),
            find_unused_parameters=gates is not None and _has_unused_heads(gates),
        )
        schedule = linear_schedule(optimizer, warm_steps if is_post else 0, warm_steps + post_steps)
        return FineTuner(
            self.model,
            self.tokenizer,
            self.train,
            self.held_out,
            self._collator,
            settings,
            callbacks=[] if gates is None else [_MovingBudget(gates, on_begin=lambda _: None)],  # they have begun
            before_evaluation=(lambda: None) if gates is None else gates.reset_counts,
            label=label,
            optimizers=(optimizer, schedule),
        )

    def _train(self, trainer: FineTuner) -> PhaseResult:
        """Train for the phase's steps; nothing for none.

        Raises:
            RuntimeError: the loss stopped being finite.
        """
        if trainer.settings.max_steps == 0:
            return PhaseResult()
        trainer.run()
        processes = trainer.accelerator.num_processes
        assert processes == 1 or isinstance(trainer.model_wrapped, DistributedDataParallel)
        steps = trainer.meter.table()
        step_ms = float(steady_steps(steps)["step_ms"].median())
        return PhaseResult(
            losses=steps["loss"].tolist(),
            evaluations={step: self._measured(rows) for step, rows in trainer.evaluated_rows.items()},
            step_ms=step_ms,
            seconds=trainer.train_s,
            samples_per_s=1000 * self.cell.train_bsz * processes / step_ms,
            peak_mb=float(steps["peak_mb"].max()),
        )

    def _evaluate(self, trainer: FineTuner) -> Evaluation:
        return self._measured(trainer.evaluate_rows())

    def _measured(self, rows: pd.DataFrame) -> Evaluation:
        """Metrics of the rows of `FineTuner.evaluate_rows`."""
        if isinstance(self.data, InstructionData):
            summary = summarise_rows(rows, causal=True)
            return Evaluation(rows, summary["accuracy"], summary["loss"], metric=summary["loss"])
        predicted = rows["predicted"].to_numpy(np.int64)
        labels = self.data.eval["label"].to_numpy(np.int64)
        return Evaluation(
            rows=rows,
            accuracy=METRICS["accuracy"](labels, predicted),
            loss=float(rows["loss"].mean()),
            metric=METRICS[self.data.metric](labels, predicted),
        )

    def _prune(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, int], list[lora.Replaced]]:
        """Act on the rank channels; the rank each adapted module is left with, and the replaced parameters.

        A squeeze replaces them in ``optimizer`` itself.
        """
        ranks = {name: lora.rank(layer) for name, layer in lora.lora_layers(self.model).items()}
        if self.cell.gate is not None:
            return {name: keep_count(r, self.cell.gate.budget) for name, r in ranks.items()}, []
        if self.cell.method == "no_prune":
            return ranks, []
        if self.cell.method == "svd":
            replaced = lora.truncate_svd(self.model, self.cell.keep_ratio, self.cell.scope)
            left = {name: lora.rank(layer) for name, layer in lora.lora_layers(self.model).items()}
            return {name: left.get(name, 0) for name in ranks}, replaced
        if self.cell.method == "squeeze":
            svds = decompose(self.model)
            sigmas = {name: svd.sigma.cpu().numpy() for name, svd in svds.items()}
            kept_directions = lora.select_channels(sigmas, self.cell.keep_ratio, self.cell.scope)
            ranks = {name: len(index) for name, index in kept_directions.items()}
            squeeze(self.model, svds, ranks, optimizer)
            return ranks, []
        # A child stream of the seed: the draw does not depend on how many random numbers training took.
        rng = np.random.default_rng(np.random.SeedSequence(self.cell.seed).spawn(1)[0])
        scores = lora.score_channels(self.model, self.cell.method, rng=rng, losses=self._calibration_losses)
        kept_channels = lora.select_channels(scores, self.cell.keep_ratio, self.cell.scope)
        ranks = {name: len(index) for name, index in kept_channels.items()}
        if self.cell.mask:
            lora.mask_channels(self.model, kept_channels)
            return ranks, []
        return ranks, lora.prune(self.model, kept_channels)

    def _attach_gates(self, optimizer: torch.optim.Optimizer) -> TokenGates | None:
        """The gates, begun at their final budget; a threshold starts where it keeps that.

        In the singular basis the adapter is turned, and the moments that ``optimizer`` has of it are gone.
        """
        if self.cell.gate is None:
            return None
        gates = attach_token_gates(self.model, self.cell.gate)
        if self.cell.gate.budget < 1:
            gates.begin(optimizer)
        if self.cell.gate.budget < 1 and self.cell.gate.select == "threshold":
            with self._autocast():
                calibrate(self.model, self._calibration_batches())
        return gates

    def _measure_gates(self, gates: TokenGates, trainer: FineTuner) -> GateOutcome:
        """Read the counts of the last evaluation, and evaluate the best fixed subset."""
        sum_counts(gates, lambda count: trainer.accelerator.reduce(count, reduction="sum"))
        static = gates.static_subset()
        active_rank, frequency = gates.active_rank(), gates.frequency()
        budget, flops = gates.budget, gate_flops_per_token(gates)
        gates.set_budget(1)
        masks = lora.mask_channels(self.model, static)
        evaluation = self._evaluate(trainer)
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
        examples, size = self.train[:_CALIBRATION_SAMPLES], self.cell.train_bsz
        for start in range(0, len(examples), size):
            batch = self._collator.tensors(examples[start : start + size])
            yield {name: value.to(self.device) for name, value in batch.items()}

    def _calibration_losses(self) -> Iterator[torch.Tensor]:
        self.model.eval()
        for batch in self._calibration_batches():
            with self._autocast():
                loss = self.model(**batch).loss
            yield loss

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()


class _MovingBudget(TokenGateCallback):
    """Moves the budget when a step ends too: what is evaluated then has that of the next, the last evaluation the final
    one."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.on_step_begin(args, state, control, **kwargs)


def _has_unused_heads(gates: TokenGates) -> bool:
    """Return whether a step may leave heads out: one whose budget gives a module all its channels does."""
    return gates.config.policy == "learned" and (gates.config.anneal_ratio > 0 or not all(gate.gates for gate in gates))
