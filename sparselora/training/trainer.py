"""The one Trainer: it fine-tunes a LoRA and measures every step without waiting for the device.

`train` and both phases of Phase C run on it.
Examples are dictionaries of token ids and labels (`sparselora.data.instructions`, `sparselora.data.batches`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from sparselora.data.batches import Batch, BatchOrder, Collator, Example, LengthGroups
from sparselora.errors import InputError
from sparselora.models.label_scores import LabelScores
from sparselora.models.labels import IGNORED
from sparselora.runs.progress import Progress
from sparselora.training.checkpoints import Checkpoint, clear_partial, finish_checkpoint, partial_folder
from sparselora.training.fully_sharded import (
    is_sharded,
    load_adapter,
    load_moments,
    whole_adapter,
    whole_moments,
)
from sparselora.training.meter import StepMeter
from sparselora.training.optimizers import DEFAULT_OPTIMIZER, MUON, build_optimizer, parsed_pairs, trainer_name

_HOST_KEYS = ("token_counts", "position")
"""Entries of a batch that the host reads and the model does not get."""


# --- training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Settings of the training; each name as in `sparselora.config.train.TrainConfig`, batch sizes per process.

    Attributes:
        folder: where checkpoints go, marked as those of ``run``.
        causal: a language model; False for a classifier.
        bf16: compute in bfloat16 autocast.
        data_seed: seed of the order of the batches; None for ``seed``.
        evaluate_at: steps after which to evaluate, in addition to every ``eval_steps``.
        find_unused_parameters: for several processes, where a step may leave a trained parameter out of use.
    """

    folder: Path
    causal: bool
    device: torch.device
    bf16: bool = False
    epochs: float = 1.0
    max_steps: int = 0
    train_bsz: int = 8
    eval_bsz: int = 16
    grad_accum: int = 1
    lr: float = 2e-4
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    scheduler: str = "linear"
    scheduler_kwargs: Sequence[str] | None = None
    optim: str = DEFAULT_OPTIMIZER
    optim_args: Sequence[str] | None = None
    loraplus_lr_ratio: float | None = None
    max_grad_norm: float = 1.0
    neftune_noise_alpha: float | None = None
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    shuffle_batches: bool = False
    seed: int = 0
    data_seed: int | None = None
    evaluate_at: frozenset[int] = frozenset()
    save_steps: int = 0
    eval_steps: int = 0
    logging_steps: int = 1
    report_to: str = "none"
    push_to_hub: bool = False
    hub_model_id: str | None = None
    tf32: bool = False
    dataloader_num_workers: int = 0
    find_unused_parameters: bool = False
    run: str = ""

    def arguments(self) -> TrainingArguments:
        logged = self.report_to != "none"
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            num_train_epochs=self.epochs,
            max_steps=self.max_steps or -1,
            per_device_train_batch_size=self.train_bsz,
            per_device_eval_batch_size=self.eval_bsz,
            gradient_accumulation_steps=self.grad_accum,
            learning_rate=self.lr,
            # Below 1 this is a share of the steps; 1 itself would be one step.
            warmup_steps=min(self.warmup_ratio, math.nextafter(1.0, 0.0)),
            weight_decay=self.weight_decay,
            lr_scheduler_type=self.scheduler,
            lr_scheduler_kwargs=parsed_pairs(self.scheduler_kwargs) or None,
            optim=trainer_name(self.optim),
            optim_args=",".join(self.optim_args) if self.optim_args else None,
            max_grad_norm=self.max_grad_norm,
            neftune_noise_alpha=self.neftune_noise_alpha,
            gradient_checkpointing=self.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if self.gradient_checkpointing else None,
            seed=self.seed,
            data_seed=self.seed if self.data_seed is None else self.data_seed,
            use_cpu=self.device.type == "cpu",
            bf16=self.bf16,
            # Logging reads the loss, and the filter of NaN reads it at every step: both wait for the device.
            logging_strategy="steps" if logged else "no",
            logging_steps=self.logging_steps,
            logging_nan_inf_filter=False,
            save_strategy="steps" if self.save_steps else "no",
            save_steps=self.save_steps or 500,
            save_total_limit=None,  # the Trainer would delete whatever is called checkpoint-…
            eval_strategy="steps" if self.eval_steps else "no",
            eval_steps=self.eval_steps or None,
            report_to=self.report_to,
            push_to_hub=self.push_to_hub,
            hub_model_id=self.hub_model_id,
            hub_strategy="end",  # a checkpoint is no adapter that is ready to use
            remove_unused_columns=False,
            ddp_find_unused_parameters=self.find_unused_parameters,
            # A blocking copy to the device waits for the step before.
            accelerator_config={"non_blocking": self.device.type == "cuda"},
            log_level="error",
            tf32=True if self.tf32 and self.device.type == "cuda" else None,
            dataloader_num_workers=self.dataloader_num_workers,
            disable_tqdm=True,  # our own progress is shown in a log too
        )
        # One process, one device: on a machine with several GPUs the Trainer would wrap the model in DataParallel.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments


@dataclass(frozen=True)
class CheckpointPart:
    """State that a checkpoint holds next to the adapter: functions that write it to a folder and read it again.

    Attributes:
        prepare: called with the folder before the adapter is read from it.
        restore: called with the folder after that.
    """

    save: Callable[[str], object]
    prepare: Callable[[str], object] = lambda folder: None
    restore: Callable[[str], object] = lambda folder: None


class FineTuner(Trainer):
    """A Trainer of adapters that records every step and every evaluation.

    Attributes:
        settings: settings of the training.
        meter: measurements of the steps.
        evaluated: a row an evaluation: ``step``, ``loss``, ``accuracy`` and ``n``.
        evaluated_rows: step → `evaluate_rows` of its evaluation during the training.
        train_s: seconds that `run` took, evaluations left out.

    Args:
        train, held_out: examples; ``held_out`` may be empty.
        collator: makes a batch of examples.
        callbacks: those of the caller, called at the beginning of a step before its clock starts to run for the
            forward pass, but within the step's time; at the end of a step before the evaluation that may follow.
        is_sparse: returns whether the current step is sparse.
        on_progress: called (in the main process) before a checkpoint, now and then, and at the end, with the two
            tables `metrics` and `evaluations`, so that the caller can write them.
        before_evaluation: called before each evaluation.
        checkpoint_parts: state that checkpoints hold next to the adapter, which PEFT knows nothing of.
        label: name of this training, in front of its lines of progress.
        trainer: further arguments of the next class in the order of inheritance, such as ``optimizers``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        train: Sequence[Example],
        held_out: Sequence[Example],
        collator: Collator,
        settings: Settings,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        is_sparse: Callable[[], bool] = lambda: False,
        on_progress: Callable[[pd.DataFrame, pd.DataFrame], None] = lambda metrics, evaluations: None,
        before_evaluation: Callable[[], object] = lambda: None,
        checkpoint_parts: Sequence[CheckpointPart] = (),
        label: str = "training",
        **trainer: Any,
    ) -> None:
        # Examples of similar length together: less padding. Rows are put back in their order by position.
        order = np.argsort([len(example["input_ids"]) for example in held_out], kind="stable")
        self.settings = settings
        self.meter = StepMeter(settings.device, is_sparse)
        self.evaluated: list[dict[str, Any]] = []
        self.groups: LengthGroups | BatchOrder | None = None
        self.evaluated_rows: dict[int, pd.DataFrame] = {}
        self.train_s = self._evaluation_s = 0.0
        self._report, self._before_evaluation = on_progress, before_evaluation
        self._checkpoint_parts = tuple(checkpoint_parts)
        self._progress = _ShownProgress(self, label)
        self._is_writing = False
        self._label_scores: LabelScores | None = None
        super().__init__(
            model=model,
            args=settings.arguments(),
            train_dataset=train,
            eval_dataset=[{**held_out[i], "position": int(i)} for i in order],
            processing_class=tokenizer,
            data_collator=collator,
            # The meter is last to begin and first to end, but the caller's work at a step's beginning is in its time.
            callbacks=[_Begin(self.meter), *callbacks, _Records(self), self._progress],
            **trainer,
        )
        if is_sharded(model):
            self.accelerator.state.fsdp_plugin.auto_wrap_policy = None  # the blocks are sharded: none are looked for
        if not settings.causal:
            # Classifiers average the loss over their own batch. They take any keyword, from which the Trainer would
            # conclude that the loss is divided by the labels of all batches of the step.
            self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    # --- a step ---

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        settings = self.settings
        if self.optimizer is None and (settings.optim == MUON or settings.loraplus_lr_ratio is not None):
            trained = cast(nn.Module, self.model if model is None else model)
            decayed = set(self.get_decay_parameter_names(trained))
            parameters = [(name in decayed, p) for name, p in trained.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for is_decayed, p in parameters if is_decayed], "weight_decay": settings.weight_decay},
                {"params": [p for is_decayed, p in parameters if not is_decayed], "weight_decay": 0.0},
            ]
            self.optimizer = build_optimizer(settings.optim, self.args, trained, groups, settings.loraplus_lr_ratio)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        size = self.settings.train_bsz * self.settings.grad_accum * self.accelerator.num_processes
        if self.settings.shuffle_batches:
            self.groups = BatchOrder(len(cast(Any, self.train_dataset)), size, self.settings.seed)
            return self.groups
        if not self.settings.group_by_length:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(example["input_ids"]) for example in self.train_dataset]  # type: ignore[union-attr]
        self.groups = LengthGroups(lengths, size, self.settings.seed)
        return self.groups

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        self.meter.begin_batch(inputs["token_counts"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.meter.end_batch(loss)  # no .item(): nothing waits for the device here
        return loss

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        tensors = {name: value for name, value in inputs.items() if name not in _HOST_KEYS}
        result = super().compute_loss(model, tensors, *args, **kwargs)
        self.meter.end_forward()
        return result

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0  # counted by `sparselora.contextual.flops`, which knows what a sparse step leaves out

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.report()  # before the checkpoint: what it resumes from must be on record
        folder, step = self.settings.folder, self.state.global_step
        if self.args.should_save:
            clear_partial(folder)
        self.accelerator.wait_for_everyone()
        self._is_writing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_writing = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(folder, step, self.settings.run)

    def _get_output_dir(self, trial: Any) -> str:
        if self._is_writing:
            return str(partial_folder(self.settings.folder, self.state.global_step).parent)
        return super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        tensors = whole_adapter(self.model)
        if self.args.should_save:
            self._save(output_dir, tensors)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        moments = whole_moments(self.model, self.optimizer)
        if self.args.should_save:
            torch.save(moments, Path(output_dir, OPTIMIZER_NAME))
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_moments(self.model, self.optimizer, checkpoint)
        schedule = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
        cast(Any, self.lr_scheduler).load_state_dict(schedule)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The adapter alone, and no look at the hub for whether the base model's vocabulary has changed.
        folder = output_dir or str(self.settings.folder)
        cast(Any, self.model).save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        for part in self._checkpoint_parts:
            part.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        for part in self._checkpoint_parts:
            part.prepare(resume_from_checkpoint)
        if is_sharded(self.model):
            load_adapter(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        for part in self._checkpoint_parts:
            part.restore(resume_from_checkpoint)

    def run(
        self,
        checkpoint: Checkpoint | None = None,
        metrics: pd.DataFrame | None = None,
        evaluations: pd.DataFrame | None = None,
    ) -> None:
        """Train to the end, from ``checkpoint`` if one is given.

        Args:
            metrics, evaluations: of the interrupted run; their rows up to the checkpoint's step stay.
        Raises:
            InputError: a streamed row that cannot be used.
            RuntimeError: the loss stopped being finite.
        """
        if checkpoint is not None:
            if metrics is not None:
                self.meter.restore(metrics, checkpoint.step)
            if evaluations is not None:
                self.evaluated = evaluations[evaluations["step"] <= checkpoint.step].to_dict("records")
        self._unprepare()
        began, self._evaluation_s = time.perf_counter(), 0.0
        try:
            self.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        except InputError as error:
            # PyTorch puts the traceback of the process that prepared the batch before the error's own text.
            raise InputError(str(error).rpartition(f"{InputError.__name__}: ")[2].strip()) from None
        finally:
            self._progress.close()
        self.report()
        self.train_s = time.perf_counter() - began - self._evaluation_s

    def _unprepare(self) -> None:
        """Undo what an evaluation before the training has prepared, of several processes.

        It marks the model as prepared, without the wrapper that averages gradients over processes: marked so, training
        would go without it, and every process would train a model of its own.
        """
        if self.accelerator.num_processes == 1 or not hasattr(self.model, "_is_accelerate_prepared"):
            return
        self.accelerator.free_memory()
        vars(self.model).pop("_is_accelerate_prepared")
        self.model_wrapped = cast(nn.Module, self.model)

    def rewrap(self) -> None:
        """Have the gradients of trained parameters that took others' places averaged over processes.

        The training loop holds the wrapper that averages, which is therefore built again in its place.
        """
        wrapper = self.model_wrapped
        if not isinstance(wrapper, DistributedDataParallel):
            return
        handler = self.accelerator.ddp_handler
        places = {name: getattr(wrapper, name) for name in ("device_ids", "output_device")}
        for name in ("reducer", "logger"):  # the old reducer listens to gradients as long as it lives
            delattr(wrapper, name)
        options = {} if handler is None else handler.to_kwargs()
        wrapper.module.to(self.accelerator.device)  # weights in host memory, with fp8 copies, are refused
        DistributedDataParallel.__init__(wrapper, wrapper.module, **places, **options)
        if handler is not None:
            handler.register_comm_hook(wrapper)

    def report(self) -> None:
        """Bring the records up to date and hand them to the caller; every process must call it."""
        self.meter.drain(self.accelerator)
        if self.accelerator.is_main_process:
            self._report(self.meter.table(), pd.DataFrame(self.evaluated))

    # --- evaluation ---

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluate on the held-out rows, put it on record, and return it with the prefix ``eval_``."""
        rows = self.evaluate_rows()
        self.evaluated_rows[self.state.global_step] = rows
        numbers = summarise_rows(rows, self.settings.causal)
        self._record(numbers)
        prefixed = {f"eval_{name}": value for name, value in numbers.items()}
        if self.settings.report_to != "none":
            self.log(dict(prefixed))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, prefixed)
        return prefixed

    def evaluate_last(self) -> pd.DataFrame:
        """`evaluate_rows` of the model as it is, put on record in place of what was evaluated at this step."""
        rows = self.evaluate_rows()
        self._record(summarise_rows(rows, self.settings.causal))
        return rows

    def _record(self, numbers: dict[str, float]) -> None:
        step = self.state.global_step
        self.evaluated = [*(row for row in self.evaluated if row["step"] != step), {"step": step, **numbers}]

    def evaluate_rows(self) -> pd.DataFrame:
        """Evaluate the model as it is: a row for each held-out example, in their order.

        Columns: ``loss``, for a classifier ``predicted`` (class id) and ``correct`` (0 or 1), for a causal model
        ``tokens`` (labels), ``loss`` (their sum, nats) and ``correct`` (tokens predicted by argmax).
        """
        columns = ["tokens", "loss", "correct"] if self.settings.causal else ["predicted", "loss", "correct"]
        if not len(self.eval_dataset):  # type: ignore[arg-type]
            return pd.DataFrame(columns=columns)
        self._before_evaluation()
        began = time.perf_counter()
        loader = self.get_eval_dataloader(self.eval_dataset)  # type: ignore[arg-type]
        with self._progress.evaluation(len(loader)):
            output = self.evaluation_loop(loader, "Evaluation", prediction_loss_only=False)
        self._evaluation_s += time.perf_counter() - began
        values, position = np.asarray(output.predictions), np.asarray(output.label_ids)
        table = pd.DataFrame(values[np.argsort(position)], columns=columns)
        whole = [name for name in columns if name != "loss"]
        return table.astype(dict.fromkeys(whole, "int64"))

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        inputs = self._prepare_inputs(inputs)
        labels, position = inputs["labels"], inputs["position"]
        tensors = {name: value for name, value in inputs.items() if name not in (*_HOST_KEYS, "labels")}
        if is_sharded(model):  # processes gather weights from one another, so they must make the same passes
            pad = self.accelerator.pad_across_processes
            labels = cast(Any, pad(labels, dim=1, pad_index=IGNORED))
            tensors = {  # a layout of tokens would be that of the shorter rows
                name: cast(Any, pad(value, dim=1)) for name, value in tensors.items() if torch.is_tensor(value)
            }
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.settings.causal:
                if self._label_scores is None or self._label_scores.model is not model:
                    self._label_scores = LabelScores(model)
                return None, self._label_scores(tensors, labels), position
            return None, _class_scores(model(**tensors).logits, labels), position


def _class_scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``(batch, 3)`` of float64: predicted class, loss, and 1 where it is right; of logits ``(batch, classes)``."""
    predicted = logits.argmax(dim=1)
    loss = F.cross_entropy(logits.double(), labels, reduction="none")
    return torch.stack((predicted.double(), loss, (predicted == labels).double()), dim=1)


def drawn_batches(
    examples: Sequence[Example], collator: Collator, device: torch.device, *, samples: int, seed: int, size: int
) -> list[dict[str, torch.Tensor]]:
    """Draw ``samples`` of ``examples`` (or all) by ``seed``, as batches of ``size`` on ``device``."""
    index = np.sort(np.random.default_rng(seed).permutation(len(examples))[:samples])
    parts = [[examples[i] for i in index[start : start + size]] for start in range(0, len(index), size)]
    return [{name: value.to(device) for name, value in collator.tensors(part).items()} for part in parts]


def summarise_rows(rows: pd.DataFrame, causal: bool) -> dict[str, float]:
    """Mean loss and accuracy of `FineTuner.evaluate_rows`: over rows, or over labelled tokens; NaN without any."""
    count = float(rows["tokens"].sum()) if causal else float(len(rows))
    if count == 0:
        return {"loss": float("nan"), "accuracy": float("nan"), "n": 0}
    return {
        "loss": float(rows["loss"].sum()) / count,
        "accuracy": float(rows["correct"].sum()) / count,
        "n": int(count),
    }


# --- callbacks ----------------------------------------------------------------------------------------------------


class _Begin(TrainerCallback):
    """Starts the clock of a step, before any other callback works for it."""

    def __init__(self, meter: StepMeter) -> None:
        self._meter = meter

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._meter.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        self._meter.note_lr(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._meter.end_step(state.global_step)


class _Records(TrainerCallback):
    """Reads the meter now and then, by the count of steps (every process at the same one), and asks for evaluations."""

    _EVERY = 100

    def __init__(self, trainer: FineTuner) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self._trainer.groups is not None:  # accelerate does not reach a sampler behind skipped batches and shards
            self._trainer.groups.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self._trainer.settings.evaluate_at:
            control.should_evaluate = True
        if state.global_step % self._EVERY == 0:
            self._trainer.report()


class _ShownProgress(TrainerCallback):
    """Shows the progress of training and evaluation on stderr, and the mean loss of every epoch."""

    def __init__(self, trainer: FineTuner, label: str) -> None:
        self._trainer = trainer
        self._label = label
        self._training: Progress | None = None
        self._evaluation: Progress | None = None
        self._epoch_began = 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._training = Progress(
            state.max_steps, "step", self._label, done=state.global_step,
            describe=lambda: f"loss {self._trainer.meter.last_loss():.4g}", is_shown=state.is_world_process_zero,
        )  # fmt: skip
        self._epoch_began = state.global_step

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        assert self._training is not None
        self._training.update()

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        assert self._training is not None
        self._trainer.meter.drain(self._trainer.accelerator)  # every process is at the same step
        loss = self._trainer.meter.mean_loss(self._epoch_began)
        epoch = f"epoch {math.ceil(state.epoch)} of {math.ceil(state.num_train_epochs)}"
        place = f"{epoch}, step {state.global_step} of {state.max_steps}"
        if state.global_step > self._epoch_began:
            self._training.say(f"{self._label}: {place}, loss {loss:.4f}")
        self._epoch_began = state.global_step

    def on_prediction_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.update()

    @contextlib.contextmanager
    def evaluation(self, batches: int) -> Iterator[None]:
        """Show the progress of an evaluation of ``batches`` batches."""
        is_main = self._trainer.is_world_process_zero()
        with Progress(batches, "batch", "evaluation", is_shown=is_main) as self._evaluation:
            yield
        self._evaluation = None

    def close(self) -> None:
        if self._training is not None:
            self._training.close()
