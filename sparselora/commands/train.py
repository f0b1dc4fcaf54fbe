"""Fine-tune a LoRA on text classification or instruction data, dense or with contextual sparsity.

A YAML file gives the settings, flags win over it, and the resolved settings are saved as config.yaml, which gives the
same run again. Start on several GPUs with `accelerate launch -m sparselora train …`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from sparselora.cli import add_run_arguments, print_plan
from sparselora.config.flags import add_config_flags, resolve_config
from sparselora.config.train import TrainConfig
from sparselora.data.load import Data, load_data
from sparselora.errors import InputError
from sparselora.models.hub import read_model_config
from sparselora.models.names import find_model
from sparselora.runs.folder import RunFolder, write_csv, write_text
from sparselora.training.checkpoints import (
    Checkpoint,
    check_place,
    last_checkpoint,
    own_checkpoints,
    remove_checkpoints,
)

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback

    from sparselora.data.batches import Collator, Example
    from sparselora.token_gates.gates import TokenGates
    from sparselora.training.meter import StepFlops
    from sparselora.training.trainer import FineTuner

OUTPUTS = (
    "run.json", "config.yaml", "metrics.csv", "eval.csv", "layers.csv", "summary.csv", "predictions.csv",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
)  # fmt: skip
INPUTS = ("model", "dataset", "eval_file")
"""The settings that name files or folders."""
CHECKPOINTS = "checkpoints"
GATE_LOG = "gate.csv"
TOKEN_GATE_OUTPUTS = (
    "token_gate.csv", "adapter/token_gate.json", "adapter/token_gate.safetensors",
    "adapter_static/adapter_config.json", "adapter_static/adapter_model.safetensors",
)  # fmt: skip
THRESHOLD_SAMPLES = 64
"""Training rows on which the thresholds of token gates are set when gating begins."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    add_run_arguments(parser, "runs/train", seed=False)
    run = parser.add_argument_group("resuming and caches")
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint of a run that was killed")
    run.add_argument("--cache_dir", metavar="DIR", help="where estimators and calibration are kept between runs")


# --- the run ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    config = resolve_config(args)
    _check(config)
    outputs = (*OUTPUTS, *((GATE_LOG,) if config.gated else TOKEN_GATE_OUTPUTS if config.token_gate else ()))
    if args.dry_run:
        print_plan(argparse.Namespace(**config.to_dict(), out_dir=args.out_dir), outputs)
        return
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    arguments = config.to_dict() | {"device": config.device.partition(":")[0]}
    if config.token_gate is None:  # so that a run from before there were gates is known again
        del arguments["token_gate"]
    if processes > 1:  # under `accelerate launch` the batch is that much larger: another run
        arguments["processes"] = processes
    _check_model(config)
    folder = RunFolder(
        args.out_dir, "train", arguments, inputs=INPUTS, outputs=outputs, seed=config.seed, overwrite=args.overwrite
    )
    if folder.is_finished():
        if rank == 0:
            print(folder.finished_message())
        return
    start = _start(config, folder, args)
    previous = folder.noted("fingerprint")
    # Every process trains, the first keeps the records.
    with folder.reserved() if rank == 0 else contextlib.nullcontext():
        data = load_data(config)
        work = prepare(config, data, folder, args.cache_dir)
        check_place(folder.folder / CHECKPOINTS, {folder.fingerprint, str(previous)}, _saves(config, work))
        with folder if rank == 0 else contextlib.nullcontext():
            if rank == 0 and not start.resuming:
                for run_id in (previous, folder.fingerprint):
                    remove_checkpoints(folder.folder / CHECKPOINTS, run_id)
            summary = train(config, data, work, folder, start)
    if processes > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
    if rank == 0:
        _print(summary, folder.folder)


def _check(config: TrainConfig) -> None:
    for name in ("model", "dataset"):
        if getattr(config, name) is None:
            raise InputError(f"no {name} given; set it in the configuration or by --{name}")
    if config.packing:
        raise InputError("packing is not supported; use group_by_length, which leaves little padding")
    if config.scheduler == "constant" and config.warmup_ratio > 0:
        raise InputError("scheduler constant has no warm-up; use constant_with_warmup, or warmup_ratio 0")
    refresh = config.sparsity.surrogate_refresh_steps if config.sparsity else 0
    if refresh and config.save_steps % refresh:  # a fit is not in the checkpoint, but made anew at its own step
        raise InputError(
            f"save_steps must be a multiple of surrogate_refresh_steps {refresh}, got {config.save_steps}: "
            "a run that is resumed between two fits would not be the same"
        )
    if config.report_to != "none" and not importlib.util.find_spec(config.report_to):
        raise InputError(f"report_to {config.report_to} needs the package {config.report_to}; install it")
    if config.gated and config.report_to == "wandb":
        os.environ.setdefault("WANDB_PROJECT", "slora")


def _check_model(config: TrainConfig) -> None:
    """Raise for a model that is not there or cannot do what is wanted of it, before any data are read."""
    assert config.model is not None
    find_model(config.model)
    if config.gated and config.task == "classification" and _is_decoder(read_model_config(config.model)):
        raise InputError(
            f"the novelty gate supports causal models and encoder classifiers, and {config.model} is a decoder; use "
            "task causal_lm, or --no-novelty.enable"
        )


def _is_decoder(model_config: Mapping[str, Any]) -> bool:
    """Return whether a classifier of this architecture has its head at every token, as decoders have it."""
    from transformers.models.auto import modeling_auto as auto

    kind = model_config.get("model_type")
    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return kind in causal and kind not in masked


def _saves(config: TrainConfig, work: Work) -> Callable[[int], bool]:
    """A function that says of a step whether there will be a checkpoint of it."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batches = math.ceil(len(work.train) / (config.train_bsz * processes))
    last = config.max_steps or math.ceil(config.epochs * max(1, math.ceil(batches / config.grad_accum)))
    return lambda step: bool(config.save_steps) and 0 < step <= last and (step % config.save_steps == 0 or step == last)


# --- where it starts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or behind ``checkpoint`` with the records of the steps before it."""

    resuming: bool = False
    checkpoint: Checkpoint | None = None
    metrics: pd.DataFrame | None = None
    evaluations: pd.DataFrame | None = None


def _start(config: TrainConfig, folder: RunFolder, args: argparse.Namespace) -> Start:
    """Where this run begins, seen from what is in its folder.

    Raises:
        InputError: what is in the folder is another run's, there are checkpoints and neither ``--resume`` nor
            ``--overwrite`` says what to do with them, or the records of the steps before a checkpoint are damaged.
    """
    status, checkpoints = folder.noted("status"), folder.folder / CHECKPOINTS
    if status == "success" and not args.overwrite:
        raise InputError(
            f"output folder {args.out_dir} holds a finished run with other arguments; use --overwrite or another folder"
        )
    if not args.resume or status is None:
        passed = own_checkpoints(checkpoints, folder.noted("fingerprint"))
        if passed and not args.overwrite:
            cure = "use --resume to go on" if folder.can_resume() else "repeat its arguments with --resume to go on"
            raise InputError(
                f"output folder {args.out_dir} holds an interrupted run with a checkpoint of step {passed[-1].step}; "
                f"{cure}, or --overwrite to begin anew"
            )
        return Start()
    if not folder.can_resume():
        raise InputError(
            f"--resume: {args.out_dir} holds an interrupted run with other arguments; repeat its arguments"
        )
    checkpoint, torn = last_checkpoint(checkpoints, folder.fingerprint)
    if int(os.environ.get("RANK", "0")) == 0:
        for line in torn:
            print(f"{line}; going on from {checkpoint.path.name if checkpoint else 'the beginning'}", file=sys.stderr)
    if checkpoint is None:
        return Start(resuming=True)
    return Start(True, checkpoint, *_earlier_records(config, folder.folder, checkpoint.step))


def _earlier_records(config: TrainConfig, folder: Path, step: int) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """``metrics.csv`` and ``eval.csv`` (None without evaluations) of an interrupted run, whole up to ``step``."""
    from sparselora.training.meter import METRICS

    metrics = _earlier(folder / "metrics.csv", METRICS, list(range(1, step + 1)), step)
    if not config.eval_steps:
        return metrics, None
    steps = list(range(config.eval_steps, step + 1, config.eval_steps))
    return metrics, _earlier(folder / "eval.csv", ("step", "loss", "accuracy", "n"), steps, step) if steps else None


def _earlier(path: Path, columns: Sequence[str], steps: list[int], last: int) -> pd.DataFrame:
    cure = "restore it, or begin anew by --overwrite"
    try:
        table = pd.read_csv(path)
        rows = table.loc[table["step"] <= last, list(columns)].astype(float)
        found = rows["step"].tolist()
    except FileNotFoundError:
        raise InputError(f"--resume: {path} is missing; {cure}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"--resume: {path} is not the table that the run wrote ({reason}); {cure}") from None
    if found != steps:
        raise InputError(
            f"--resume: {path} has {len(found)} rows up to step {last} of the checkpoint, not the {len(steps)} that "
            f"the run wrote; {cure}"
        )
    return table


@dataclass(frozen=True)
class Work:
    """A model with a fresh adapter on its device, made sparse if it shall be, and its data as tokens.

    ``cut`` counts the training examples that were too long; ``handle`` is None for plain PEFT, ``gates`` where every
    rank channel is active for every token.
    """

    model: Any
    tokenizer: Any
    targets: list[str]
    train: list[Example]
    held_out: list[Example]
    cut: int
    collator: Collator
    handle: Any
    gates: TokenGates | None
    trainable_params: int
    sparsify_s: float
    device: torch.device
    bf16: bool


def prepare(config: TrainConfig, data: Data, folder: RunFolder, cache_dir: str | None) -> Work:
    # Imported here, for they take seconds, and a finished run or a wrong flag should take none.
    import torch
    from accelerate import PartialState
    from transformers import set_seed

    from sparselora.data.batches import Collator
    from sparselora.models import load as models

    causal = config.task == "causal_lm"
    device = models.resolve_device(config.device)
    device = PartialState(cpu=device.type == "cpu").device  # of several processes, each has its own
    folder.note(device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and device.type == "cuda")
    set_seed(config.seed)  # before the head and the adapter are drawn
    model, tokenizer, targets = adapted_model(config, data, torch.bfloat16 if bf16 and causal else torch.float32)
    _check_training(config, model)
    model.to(device)
    train, held_out, cut = _encode(config, data, tokenizer)
    longest = min(config.max_length, tokenizer.model_max_length)
    collator = Collator(tokenizer.pad_token_id, causal, longest=longest)
    began, handle = time.perf_counter(), None
    if config.sparsity is not None:
        from sparselora.contextual.layout import TokenLayout
        from sparselora.contextual.sparsify import GRAPH_MULTIPLE, sparsify

        multiple = GRAPH_MULTIPLE if device.type == "cuda" and causal else 0
        calibration = calibration_batches(config, train, collator, device)
        handle = sparsify(model, config.sparsity, calibration=calibration, cache_dir=cache_dir)
        collator = dataclasses.replace(
            collator,
            layout=lambda mask, labels: TokenLayout.build(
                mask, labels if causal else None, causal=causal, multiple=multiple
            ),
        )
    spent = time.perf_counter() - began
    gates = None
    if config.token_gate is not None:
        from sparselora.token_gates.gates import attach_token_gates

        gates = attach_token_gates(model, config.token_gate)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Work(model, tokenizer, targets, train, held_out, cut, collator, handle, gates, trained, spent, device, bf16)


def _check_training(config: TrainConfig, model: Any) -> None:
    """Raise for what the Trainer would refuse only when the run has begun."""
    import torch

    if config.gradient_checkpointing and not model.get_base_model().supports_gradient_checkpointing:
        raise InputError(
            f"gradient_checkpointing is not supported by {type(model.get_base_model()).__name__}; leave it out"
        )
    if config.gated:
        from sparselora.novelty.trainer import build_gate

        assert config.novelty is not None
        build_gate(model, config.novelty, seed=config.seed, device=torch.device("cpu"))


def adapted_model(config: TrainConfig, data: Data, dtype: torch.dtype) -> tuple[Any, Any, list[str]]:
    """The model with a fresh adapter, its tokenizer, and the modules that are adapted."""
    from sparselora.models import load as models
    from sparselora.models.class_names import name_classes

    assert config.model is not None
    causal = config.task == "causal_lm"
    if causal:
        model, tokenizer = models.load_causal_lm(
            config.model, dtype, in_4bit=config.load_in_4bit, flash_attention=config.use_flash_attention_2
        )
    else:
        model, tokenizer = models.load_classifier(config.model, num_labels=len(data.labels))
        name_classes(model, data.labels)
    targets = models.resolve_target_modules(model, config.target_modules)
    adapted = models.attach_lora(
        model,
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=targets,
        base_model=models.hub_name(config.model),
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
    )
    return adapted, tokenizer, targets


def _encode(config: TrainConfig, data: Data, tokenizer: Any) -> tuple[list[Example], list[Example], int]:
    if config.task == "causal_lm":
        from sparselora.data.instructions import encode_instructions

        train, held_out = (encode_instructions(f, tokenizer, config.max_length) for f in (data.train, data.eval))
        return train.examples, held_out.examples, train.cut
    from sparselora.data.batches import encode_texts

    parts = [encode_texts(f, data.text_fields, tokenizer, config.max_length) for f in (data.train, data.eval)]
    return parts[0], parts[1], 0


def train(config: TrainConfig, data: Data, work: Work, folder: RunFolder, start: Start) -> dict[str, Any]:
    """Train, evaluate, and write everything but run.json; the summary's row, empty but in the first process."""
    from accelerate import PartialState

    from sparselora.training.meter import StepFlops

    flops = StepFlops(work.model.config.to_dict(), config.sparsity, config.lora_r, work.targets)

    def on_progress(metrics: pd.DataFrame, evaluations: pd.DataFrame) -> None:
        write_csv(folder.path("metrics.csv"), flops.beside(metrics))
        write_csv(folder.path("eval.csv"), evaluations)

    main = PartialState().is_main_process
    if main:
        write_text(folder.path("config.yaml"), config.to_yaml())
        folder.note(target_modules=work.targets, examples_cut=work.cut)
    trainer = fine_tuner(config, work, folder, on_progress)
    trainer.run(start.checkpoint, start.metrics, start.evaluations)
    if work.gates is not None:
        work.gates.reset_counts()
    rows = trainer.evaluate_last()
    layers = work.handle.report if work.handle is not None else _dense_layers(work.model)
    if work.handle is not None:
        work.handle.remove()
    if main:
        write_adapter(config, work, folder)
    gated = finish_gates(config, work, folder, trainer)
    if not main:
        return {}
    return write_results(config, data, work, folder, trainer, rows, pd.DataFrame(layers), flops, gated)


def fine_tuner(
    config: TrainConfig, work: Work, folder: RunFolder, on_progress: Callable[[pd.DataFrame, pd.DataFrame], None]
) -> FineTuner:
    """The Trainer of this run: gated by novelty, sparse, both or neither."""
    from sparselora.training.trainer import FineTuner, Settings

    values = config.to_dict()
    shared = {name: values[name] for name in Settings.__dataclass_fields__ if name in values and name != "device"}
    settings = Settings(
        **shared,
        folder=folder.folder / CHECKPOINTS,
        run=folder.fingerprint,
        causal=config.task == "causal_lm",
        device=work.device,
        bf16=work.bf16,
        # DistributedDataParallel must be told that a step may leave parameters out: the heads of learned gates before
        # gating begins, the adapter of an FFN that is left out itself.
        find_unused_parameters=(config.token_gate is not None and config.token_gate.policy == "learned")
        or (config.sparsity is not None and config.sparsity.mode in ("skip", "surrogate")),
    )
    handle: Any = work.handle
    callbacks: list[TrainerCallback] = []
    if handle is not None:
        from sparselora.contextual.sparsify import SparsityCallback

        callbacks.append(SparsityCallback(handle))
    if work.gates is not None:
        from sparselora.token_gates.gates import TokenGateCallback

        callbacks.append(TokenGateCallback(work.gates, lambda optimizer: begin_gating(config, work, optimizer)))
    gated: dict[str, Any] = {}
    kind = FineTuner
    if config.gated:
        kind = _gated_kind()
        gated = {"gate_config": config.novelty, "gate_log": folder.path(GATE_LOG)}
    trainer = kind(
        work.model,
        work.tokenizer,
        work.train,
        work.held_out,
        work.collator,
        settings,
        callbacks=callbacks,
        is_sparse=lambda: handle is not None and bool(handle.active),
        on_progress=on_progress,
        gates=work.gates,
        **gated,
    )
    if gated and handle is not None:
        handle.observe_head(cast(Any, trainer).head_rows)
    return trainer


def _gated_kind() -> type[FineTuner]:
    from sparselora.novelty import SLoRATrainer
    from sparselora.training.trainer import FineTuner

    class GatedFineTuner(FineTuner, SLoRATrainer):
        """Every step on record, and backward only for what is new."""

    return GatedFineTuner


def calibration_batches(
    config: TrainConfig, train: Sequence[Example], collator: Collator, device: torch.device
) -> list[dict[str, torch.Tensor]] | None:
    """Batches of training rows drawn by the sparsity's own seed, on the model's device; None if none are needed."""
    from sparselora.training.trainer import drawn_batches

    sparsity = config.sparsity
    if sparsity is None or not sparsity.needs_calibration:
        return None
    samples = {"samples": sparsity.calibration_samples, "seed": sparsity.seed, "size": config.eval_bsz}
    return drawn_batches(train, collator, device, **samples)


def begin_gating(config: TrainConfig, work: Work, optimizer: torch.optim.Optimizer) -> None:
    """Start the gates from the adapter as it is, turned to its singular directions if they are the basis.

    Thresholds start at their budget: on the same rows in every process and a resumed run.
    """
    import torch
    from accelerate.utils import broadcast

    from sparselora.token_gates.gates import calibrate
    from sparselora.training.trainer import drawn_batches

    assert work.gates is not None
    work.gates.begin(optimizer)
    # Processes must agree, and a singular direction may come out with the other sign on another machine.
    broadcast([p.data for p in work.model.parameters() if p.requires_grad])
    if work.gates.config.select != "threshold":
        return
    drawn = {"samples": THRESHOLD_SAMPLES, "seed": config.seed, "size": config.eval_bsz}
    with torch.autocast(work.device.type, torch.bfloat16, enabled=work.bf16):
        calibrate(work.model, drawn_batches(work.train, work.collator, work.device, **drawn))


def _dense_layers(model: Any) -> list[dict[str, Any]]:
    count = getattr(model.config, "num_hidden_layers", 0)
    return [{"layer": i, "ffn_sparsity": 0.0, "attention_sparsity": 0.0} for i in range(count)]


# --- records ------------------------------------------------------------------------------------------------------


def write_adapter(config: TrainConfig, work: Work, folder: RunFolder) -> None:
    from sparselora.models.load import hub_name
    from sparselora.models.lora import export_adapter

    assert config.model is not None
    for name in OUTPUTS[-2:]:
        folder.path(name)
    export_adapter(work.model, folder.folder / "adapter", hub_name(config.model))


def finish_gates(config: TrainConfig, work: Work, folder: RunFolder, trainer: FineTuner) -> dict[str, Any]:
    """`finish_token_gates` of this run; every process must call it."""
    from sparselora.models.load import hub_name
    from sparselora.token_gates.outputs import UNGATED_SUMMARY, finish_token_gates
    from sparselora.training.trainer import summarise_rows

    if work.gates is None:
        return dict(UNGATED_SUMMARY)
    assert config.model is not None
    return finish_token_gates(
        work.model,
        work.gates,
        base_model=hub_name(config.model),
        evaluate=lambda: summarise_rows(trainer.evaluate_rows(), config.task == "causal_lm"),
        total=lambda count: cast(Any, trainer.accelerator.reduce(count, "sum")),
        path=folder.path if trainer.accelerator.is_main_process else None,
    )


def write_results(
    config: TrainConfig,
    data: Data,
    work: Work,
    folder: RunFolder,
    trainer: FineTuner,
    rows: pd.DataFrame,
    layers: pd.DataFrame,
    flops: StepFlops,
    gated: Mapping[str, Any],
) -> dict[str, Any]:
    from sparselora.models.load import public_name
    from sparselora.training.meter import step_medians

    assert config.model is not None
    metrics = flops.beside(trainer.meter.table())
    write_csv(folder.path("eval.csv"), pd.DataFrame(trainer.evaluated))
    write_csv(folder.path("layers.csv"), layers)
    known = [name for name in ("row", "label") if name in data.eval]
    predictions = pd.concat([data.eval[known].reset_index(drop=True), rows.reset_index(drop=True)], axis=1)
    write_csv(folder.path("predictions.csv"), predictions)
    last = trainer.evaluated[-1]
    summary = {
        "model": public_name(config.model),
        "dataset": data.name,
        "task": config.task,
        "mode": config.sparsity.mode if config.sparsity else "none",
        "seed": config.seed,
        "train_rows": len(work.train),
        "eval_rows": len(work.held_out),
        "steps": len(metrics),
        "trainable_params": work.trainable_params,
        "train_loss": float(metrics["loss"].iloc[-max(1, len(metrics) // 10) :].mean()),
        "eval_loss": last["loss"],
        "eval_accuracy": last["accuracy"],
        **step_medians(metrics),
        "sparsify_s": work.sparsify_s,
        **gate_summary(config, trainer, metrics),
        **gated,
    }
    write_csv(folder.path("summary.csv"), pd.DataFrame([summary]))
    folder.note(result={name: None if value != value else value for name, value in summary.items()})
    return summary


def gate_summary(config: TrainConfig, trainer: FineTuner, metrics: pd.DataFrame) -> dict[str, Any]:
    """What the gate did, for the summary; a run without one accepted every step."""
    gate = getattr(trainer, "gate", None)
    if gate is None:
        tokens = int(metrics["tokens"].sum())
        return {"policy": "none", "target_rate": float("nan"), "accepted_steps": len(metrics),
                "acceptance_rate": float("nan"), "gated_decisions": 0, "tokens_seen": tokens,
                "tokens_trained": tokens}  # fmt: skip
    last = cast(Any, trainer).gate_table().iloc[-1]
    return {
        "policy": gate.policy,
        "target_rate": gate.target,
        "accepted_steps": gate.accepted_steps,
        "acceptance_rate": gate.acceptance_rate() if gate.gated_decisions else float("nan"),
        "gated_decisions": gate.gated_decisions,
        "tokens_seen": int(last["tokens_seen"]),
        "tokens_trained": int(last["tokens_trained"]),
    }


def _print(summary: dict[str, Any], folder: Path) -> None:
    accuracy = "token accuracy" if summary["task"] == "causal_lm" else "accuracy"
    print(f"{folder}: {summary['steps']} steps, mode {summary['mode']}")
    if summary["policy"] != "none":
        rate = "no gating happened" if not summary["gated_decisions"] else f"rate {summary['acceptance_rate']:.3f}"
        print(f"  gate {summary['policy']}: {summary['accepted_steps']} updates of {summary['steps']} steps, {rate}")
    if summary["gate_policy"] != "none":
        print(
            f"  token gate {summary['gate_policy']}: active rank {summary['active_rank']:.2f}; as a fixed subset: loss "
            f"{summary['static_loss']:.4f}, {accuracy} {summary['static_accuracy']:.4f}"
        )
    print(f"  evaluation loss {summary['eval_loss']:.4f}, {accuracy} {summary['eval_accuracy']:.4f}")
    counted = "" if math.isnan(flops := summary["active_flops_per_token"]) else f", {flops:.3g} FLOPs a token"
    print(f"  {summary['step_ms']:.1f} ms a step, {summary['tokens_per_s']:.0f} tokens/s{counted}")
