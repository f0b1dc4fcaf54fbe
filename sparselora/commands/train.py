"""Fine-tune a LoRA on text classification or instruction data, dense or with contextual sparsity.

A YAML file gives the settings, flags win over it, and the resolved settings are saved as config.yaml, which gives the
same run again. Start on several GPUs with `accelerate launch -m sparselora train …`.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparselora.cli import Parser, add_run_arguments, run_in_folder
from sparselora.config.flags import COMMON_TRAINING, add_config_flags, resolve_config
from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.models.adapter_config import read_peft_config, vllm_rank
from sparselora.models.model_files import find_model, read_model_config
from sparselora.runs.folder import RunFolder
from sparselora.runs.process import importing, process_count, process_rank
from sparselora.runs.request import RunRequest
from sparselora.training.resume import DUPLICATES, JINJA_FILE, find_start, outputs_of

EXAMPLES = """\
  sparselora train --model minilm --task classification --dataset docstrings --epochs 3
  sparselora train configs/llama_sparse.yaml --model ./llama --dataset rows.jsonl --dry_run"""
INPUTS = ("model", "dataset", "eval_file")
"""The settings that name files or folders."""


def add_arguments(parser: Parser) -> None:
    add_config_flags(parser)
    add_run_arguments(parser, "runs/train", seed=False)
    run = parser.add_argument_group("resuming and caching")
    run.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    run.add_argument("--cache_dir", metavar="DIR", help="folder that keeps estimators and calibration between runs")
    parser.shorten_help(COMMON_TRAINING)


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    return _request(args, _checked_config(args))


def _request(args: argparse.Namespace, config: TrainConfig) -> RunRequest:
    return RunRequest(
        "train",
        Path(args.out_dir),
        _arguments(config),
        outputs_of(config),
        settings=config.to_dict() | {"out_dir": args.out_dir},
        inputs=INPUTS,
        seed=config.seed,
        overwrite=args.overwrite,
    )


def run(args: argparse.Namespace) -> None:
    config = _checked_config(args)
    is_main = process_rank() == 0

    def body(folder: RunFolder) -> None:
        start = find_start(config, folder, resume=args.resume)
        # Imported late: torch takes seconds to load, and a finished run or a bad flag should return at once.
        with importing():
            from sparselora.training.run import run_training

        summary = run_training(config, folder, start, args.cache_dir)
        if is_main:
            _print(summary, folder.folder)
            _print_next(config, folder.folder)

    run_in_folder(
        _request(args, config), body, dry_run=args.dry_run, check=lambda: _check_model(config), is_main=is_main
    )


def _checked_config(args: argparse.Namespace) -> TrainConfig:
    config = resolve_config(args)
    _check(config)
    return config


def _arguments(config: TrainConfig) -> dict[str, Any]:
    """Return what decides the result of a run, by which it is known."""
    arguments = config.to_dict() | {"device": config.device.partition(":")[0]}
    for name in ("token_gate", "chat_template", "dedupe"):  # so that a run from before there were such is known again
        if arguments[name] is None:
            del arguments[name]
    del arguments["streaming"]  # the run is the same
    if not config.shuffle_batches:
        del arguments["shuffle_batches"]
    if config.squeeze is None:  # nor of the squeeze
        arguments = {name: value for name, value in arguments.items() if not name.startswith("squeeze")}
    if process_count() > 1:  # under `accelerate launch` the batch is that much larger: another run
        arguments["processes"] = process_count()
    return arguments


def _check(config: TrainConfig) -> None:
    for name in ("model", "dataset"):
        if getattr(config, name) is None:
            raise InputError(f"no {name} given; set it in the configuration or by --{name}")
    if config.scheduler == "constant" and config.warmup_ratio > 0:
        raise InputError("scheduler constant has no warm-up; use constant_with_warmup, or warmup_ratio 0")
    refresh = config.sparsity.surrogate_refresh_steps if config.sparsity else 0
    if refresh and config.save_steps % refresh:  # a fit is not in the checkpoint, but made again at its own step
        raise InputError(
            f"save_steps must be a multiple of surrogate_refresh_steps {refresh}, got {config.save_steps}: "
            "a run that is resumed between two fits would not be the same"
        )
    if config.report_to != "none" and not importlib.util.find_spec(config.report_to):
        raise InputError(f"report_to {config.report_to} needs the package {config.report_to}; install it")
    _check_hub(config)
    if config.gated and config.report_to == "wandb":
        os.environ.setdefault("WANDB_PROJECT", "slora")


def _check_hub(config: TrainConfig) -> None:
    """Raise for an upload that is impossible from here, before anything is trained for it."""
    if not config.push_to_hub:
        return
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise InputError("push_to_hub needs the hub, and HF_HUB_OFFLINE is set; unset it, or leave push_to_hub out")
    if get_token() is None:
        raise InputError("push_to_hub needs a token of the hub, and there is none; run hf auth login, or set HF_TOKEN")


def _check_model(config: TrainConfig) -> None:
    """Raise for a model that is not there or cannot do what is wanted of it, before any data are read."""
    assert config.model is not None
    find_model(config.model)
    _check_precision(config)
    if config.gated and config.task == "classification" and _is_decoder(read_model_config(config.model)):
        raise InputError(
            f"the novelty gate supports causal models and encoder classifiers, and {config.model} is a decoder; use "
            "task causal_lm, or --no-novelty.enable"
        )


def _check_precision(config: TrainConfig) -> None:
    """Raise for products that the kind of device cannot form; the card itself is looked at when the run has begun."""
    if config.sparsity is None or not config.sparsity.is_quantised:
        return
    import torch

    from sparselora.contextual.precision import precision_of

    # No question to CUDA beyond whether it is there: another device may be chosen only before its first use.
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        precision_of(config.sparsity).check_device(torch.device("cpu"))


def _is_decoder(model_config: Mapping[str, Any]) -> bool:
    """Return whether a classifier of this architecture has its head at every token, as decoders have it."""
    from transformers.models.auto import modeling_auto as auto

    kind = model_config.get("model_type")
    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return kind in causal and kind not in masked


def _print(summary: dict[str, Any], folder: Path) -> None:
    accuracy = "token accuracy" if summary["task"] == "causal_lm" else "accuracy"
    print(f"{folder}: {summary['steps']} steps, mode {summary['mode']}")
    if "duplicates" in summary:
        print(
            f"  {summary['duplicates']} near-duplicate rows left out, {summary['train_rows']} trained on ({DUPLICATES})"
        )
    if summary["policy"] != "none":
        from sparselora.novelty.manipulation import describe_check

        rate = "no gating happened" if not summary["gated_decisions"] else f"rate {summary['acceptance_rate']:.3f}"
        print(f"  gate {summary['policy']}: {summary['accepted_steps']} updates of {summary['steps']} steps, {rate}")
        for sentence in describe_check(summary):
            print(f"  {sentence}")
    if summary["gate_policy"] != "none":
        print(
            f"  token gate {summary['gate_policy']}: active rank {summary['active_rank']:.2f}; as a fixed subset: loss "
            f"{summary['static_loss']:.4f}, {accuracy} {summary['static_accuracy']:.4f}"
        )
    print(f"  evaluation loss {summary['eval_loss']:.4f}, {accuracy} {summary['eval_accuracy']:.4f}")
    counted = "" if math.isnan(flops := summary["active_flops_per_token"]) else f", {flops:.3g} FLOPs a token"
    print(f"  {summary['step_ms']:.1f} ms a step, {summary['tokens_per_s']:.0f} tokens/s{counted}")


def _print_next(config: TrainConfig, folder: Path) -> None:
    """Print the commands that usually come next, ready to paste."""
    fields = ["prompt_field", "completion_field"] if config.task == "causal_lm" else ["text_fields", "label_field"]
    flags = ["--dataset", str(config.dataset), *(["--eval_file", config.eval_file] if config.eval_file else [])]
    for name in fields:
        if (value := getattr(config, name)) != TrainConfig.model_fields[name].default:
            flags += [f"--{name}", *([value] if isinstance(value, str) else value)]
    data = shlex.join(flags)
    model, adapter = shlex.quote(str(config.model)), shlex.quote(str(folder / "adapter"))
    print(f"  loss by step: {folder / 'loss.png'}")
    print("next:")
    print(f"  sparselora eval --model {model} --adapter {adapter} {data} --task {config.task}")
    print(f"  sparselora compare {shlex.quote(str(folder))} ANOTHER_RUN")
    rank = vllm_rank(read_peft_config(folder / "adapter")["r"])
    # vLLM serves neither a row's trained norm (DoRA), nor an adapter that is active on a part of the text only, nor
    # gates: it would leave all channels active.
    is_plain = config.adapter_on_context and not config.use_dora and not config.token_gate
    if config.task == "causal_lm" and rank and is_plain:
        line = f"vllm serve {model} --enable-lora --max-lora-rank {rank} --lora-modules adapter={adapter}"
        if config.chat_template is not None:  # else vLLM takes the tokenizer's, as the run did
            line += f" --chat-template {shlex.quote(str(folder / JINJA_FILE))}"
        print(f"  {line}")
