"""Train and evaluate a classifier with the Hugging Face Trainer, one phase at a time, and measure what it cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    DataCollatorWithPadding,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from sparselora.data.tokens import encode_fields

_WARM_STEPS = 3
"""Steps at the start of a phase that are left out of its step time: allocations and caches are made there."""


@dataclass(frozen=True)
class Settings:
    """What both phases of a run share.

    ``folder`` is the run's own, batch sizes are per process, ``bf16`` computes in bfloat16 autocast.
    """

    lr: float
    train_bsz: int
    eval_bsz: int
    seed: int
    device: torch.device
    bf16: bool
    folder: Path


@dataclass(frozen=True)
class Evaluation:
    """Predicted class ids ``(n,)`` in the order of the evaluation frame, accuracy, mean loss, and the task's metric."""

    predicted: NDArray[np.int64]
    accuracy: float
    loss: float
    metric: float


@dataclass
class PhaseResult:
    """Losses of every step (mean over processes), evaluations by step, and times.

    ``step_ms`` is the median over steps from a batch at hand to the optimizer step done, ``seconds`` the wall clock of
    the whole phase without its evaluations, ``samples_per_s`` counts all processes.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    step_ms: float = float("nan")
    seconds: float = 0.0
    samples_per_s: float = float("nan")


def tokenize(frame: pd.DataFrame, text_fields: tuple[str, ...], tokenizer: Any, max_length: int) -> Dataset:
    """Encode ``frame`` as token ids and labels, cut to ``max_length`` tokens (or the model's limit), not padded.

    Raises:
        InputError: what `sparselora.data.tokens.encode_fields` refuses.
    """
    encoded = encode_fields(frame, text_fields, tokenizer, max_length)
    return Dataset.from_dict({**encoded, "labels": frame["label"].tolist()})


METRICS: dict[str, Callable[[NDArray[np.int64], NDArray[np.int64]], float]] = {
    "accuracy": lambda labels, predicted: float((labels == predicted).mean()),
    "f1": lambda labels, predicted: float(f1_score(labels, predicted)),
    "matthews": lambda labels, predicted: float(matthews_corrcoef(labels, predicted)),
}


def linear_schedule(
    optimizer: torch.optim.Optimizer, first_step: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear decay to 0 over ``total_steps``, entered at ``first_step``: the phases of a run share one schedule."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - (first_step + step) / total_steps))


class PhaseTrainer(Trainer):
    """One phase of a run: some steps of training, and evaluations whenever asked.

    The optimizer and scheduler are the caller's, so that their state can be carried from one phase to the next. Of a
    step's end, ``callbacks`` hear before the evaluation that may follow it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        train: Dataset,
        held_out: Dataset,
        metric: str,
        settings: Settings,
        *,
        steps: int,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        data_seed: int,
        evaluate_at: frozenset[int] = frozenset(),
        before_evaluation: Callable[[], None] = lambda: None,
        callbacks: Sequence[TrainerCallback] = (),
        find_unused_parameters: bool = False,
    ) -> None:
        """``find_unused_parameters``: for several processes, where a step may leave a trained parameter out of use."""
        arguments = TrainingArguments(
            output_dir=str(settings.folder),
            max_steps=max(steps, 1),
            per_device_train_batch_size=settings.train_bsz,
            per_device_eval_batch_size=settings.eval_bsz,
            seed=settings.seed,
            data_seed=data_seed,
            use_cpu=settings.device.type == "cpu",
            bf16=settings.bf16,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            ddp_find_unused_parameters=find_unused_parameters,
            disable_tqdm=not sys.stderr.isatty(),
        )
        # One process, one device: on a machine with several GPUs the Trainer would wrap the model in DataParallel.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            optimizers=(optimizer, scheduler),
            callbacks=list(callbacks),
        )
        # Classifiers average the loss over their own batch. PEFT's wrapper takes any keyword, from which the Trainer
        # would conclude that the loss is divided by the batch of all processes, and multiply it by their number.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if sys.stderr.isatty():
            self.add_callback(_QuietProgress())
        self._model = model
        self._held_out = held_out
        self._before_evaluation = before_evaluation
        self._recorder = _Recorder(self, evaluate_at)
        self.add_callback(self._recorder)
        self._steps = steps
        self._metric = metric
        # Sentences of like length together: less padding. Predictions are put back in the frame's order.
        self._order = np.argsort([len(ids) for ids in held_out["input_ids"]], kind="stable")

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if self._model.training:
            self._recorder.losses.append(loss.detach())  # no .item(): nothing waits for the device here
        return result

    def run_phase(self) -> PhaseResult:
        """Train for the phase's steps.

        Raises:
            RuntimeError: the loss stopped being finite.
        """
        if self._steps == 0:
            return PhaseResult()
        # An evaluation marks the model as prepared, without the wrapper that averages gradients over processes: marked
        # so, training would go without it, and every process would train a model of its own.
        if self.accelerator.num_processes > 1:
            self.accelerator.free_memory()
            vars(self._model).pop("_is_accelerate_prepared", None)
            self.model_wrapped = self._model
        self.train()
        assert self.accelerator.num_processes == 1 or isinstance(self.model_wrapped, DistributedDataParallel)
        losses = self.accelerator.reduce(torch.stack(self._recorder.losses).float(), reduction="mean").tolist()
        for step, loss in enumerate(losses, start=1):
            if not np.isfinite(loss):
                raise RuntimeError(f"training diverged: the loss is {loss} at step {step}; lower --lr")
        seconds = np.asarray(self._recorder.step_seconds)
        warm = min(_WARM_STEPS, len(seconds) - 1)
        batch = self.args.train_batch_size * self.accelerator.num_processes
        median = float(np.median(seconds[warm:]))
        return PhaseResult(
            losses=losses,
            evaluations=self._recorder.evaluations,
            step_ms=1000 * median,
            seconds=self._recorder.train_seconds,
            samples_per_s=batch / median,
        )

    def evaluate_now(self) -> Evaluation:
        """Predictions and metrics of the held-out data as the model is."""
        self._before_evaluation()
        output = self.predict(self._held_out.select(self._order))
        back = np.argsort(self._order)
        labels = np.asarray(output.label_ids, dtype=np.int64)[back]
        logits = np.asarray(output.predictions, dtype=np.float64)[back]
        predicted = logits.argmax(axis=1)
        shifted = logits - logits.max(axis=1, keepdims=True)
        picked = shifted[np.arange(len(labels)), labels] - np.log(np.exp(shifted).sum(axis=1))
        return Evaluation(
            predicted=predicted,
            accuracy=METRICS["accuracy"](labels, predicted),
            loss=float(-picked.mean()),
            metric=METRICS[self._metric](labels, predicted),
        )


class _Recorder(TrainerCallback):
    """Times each step, and evaluates after the steps it is told to."""

    def __init__(self, trainer: PhaseTrainer, evaluate_at: frozenset[int]) -> None:
        self._trainer = trainer
        self._evaluate_at = evaluate_at
        self.losses: list[torch.Tensor] = []
        self.step_seconds: list[float] = []
        self.evaluations: dict[int, Evaluation] = {}
        self.train_seconds = 0.0

    def _now(self) -> float:
        if self._trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._phase_began = self._now()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._step_began = self._now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        now = self._now()
        self.step_seconds.append(now - self._step_began)
        self.train_seconds += now - self._phase_began
        if state.global_step in self._evaluate_at:
            self.evaluations[state.global_step] = self._trainer.evaluate_now()
        self._phase_began = self._now()
        return control


class _QuietProgress(ProgressCallback):
    """The Trainer's bar without its habit of printing every log to stdout."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass
