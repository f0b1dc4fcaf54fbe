"""Evaluate a model, with a LoRA adapter or alone: GSM8K exact match, held-out loss, or accuracy of a classifier.

The rows evaluated are those that `train` holds out of the same --dataset: those of --eval_file, else a hub's validation
or test split, else every fifth row. With --eval_file alone, all of its rows. Without data: GSM8K's test split.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparselora.cli import ReportCopy, add_run_arguments, output_folder, row_count, run_in_folder, source_name
from sparselora.config.flags import add_setting_flags
from sparselora.config.train import chat_template_text
from sparselora.errors import InputError, few
from sparselora.evaluation.request import GSM8K, TASKS, EvalRequest
from sparselora.models.adapter_config import read_peft_config
from sparselora.models.model_files import find_model
from sparselora.runs.folder import RunFolder
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names
from sparselora.runs.process import importing
from sparselora.runs.request import RunRequest

INPUTS = ("model", "adapter", "dataset", "eval_file")
"""The arguments that name files or folders."""
BACKENDS = ("auto", "transformers", "vllm")
_DTYPES = ("auto", "fp32", "bf16")
_DATA_FIELDS = (
    "text_fields",
    "label_field",
    "prompt_field",
    "completion_field",
    "template",
    "chat_template",
    "max_length",
)
_ONLY_FOR = {
    "text_fields": ("classification",), "template": ("causal_lm", "gsm8k"), "chat_template": ("causal_lm", "gsm8k"),
}  # fmt: skip

EXAMPLES = """\
  sparselora eval --model minilm --adapter runs/train/adapter --dataset docstrings
  sparselora eval --model ./llama --dataset rows.jsonl --eval_samples 200 --out_json results.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", required=True, metavar="M", help="local folder, GGUF file, hub name, minilm or smollm2 (needed)"
    )
    model.add_argument("--adapter", metavar="DIR", help="PEFT adapter of the model (default: none)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    model.add_argument("--dtype", default="auto", choices=_DTYPES, help="of weights and computation")
    _add_data_arguments(parser)
    answers = parser.add_argument_group("answers (task gsm8k)")
    answers.add_argument("--fewshot", type=int, default=5, metavar="N", help="worked examples, from the training rows")
    answers.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="longest answer, in tokens")
    answers.add_argument(
        "--backend", default="auto", choices=BACKENDS, help="auto: vLLM if installed and CUDA is available"
    )
    add_run_arguments(parser, "eval_results")
    parser.set_defaults(out_dir=None)
    parser.add_argument(
        "--out_json", metavar="FILE",
        help="a copy of the metrics; without --out_dir, the run's folder is FILE with _eval in place of its ending "
        "(without both: eval_results/<task>-<model>)",
    )  # fmt: skip
    accept_former_names(parser, FORMER_NAMES["eval"])


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset", metavar="D",
        help="local table, hub name, gsm8k, glue/<task> or docstrings",
    )  # fmt: skip
    data.add_argument("--eval_file", metavar="FILE", help="rows to evaluate, of a local data set")
    data.add_argument(
        "--task", default="auto", choices=("auto", *TASKS),
        help="auto: gsm8k for data of that name, classification for GLUE, docstrings and the adapter of a classifier, "
        "else causal_lm: loss of the completions",
    )  # fmt: skip
    data.add_argument("--eval_samples", type=row_count, default=0, metavar="N", help="rows to evaluate; 0: all")
    data.add_argument("--eval_bsz", type=int, default=8, metavar="N", help="items in a batch")
    add_setting_flags(data, _DATA_FIELDS)


# --- the request --------------------------------------------------------------------------------------------------


def read_request(args: argparse.Namespace) -> EvalRequest:
    """Check the flags, and freeze them with the task and the data set that they mean."""
    for name, least in (("fewshot", 0), ("max_new_tokens", 1), ("eval_bsz", 1), ("max_length", 2)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be {least} or more, got {getattr(args, name)}")
    task = _task(args)
    for name, only in _ONLY_FOR.items():
        if getattr(args, name) is not None and task not in only:
            raise InputError(
                f"--{name} is for task {' and '.join(only)}, this is {task}; leave it out, or give --task {only[0]}"
            )
    if args.template is not None and args.chat_template is not None:
        raise InputError("--template and --chat_template are both given; one of them writes the prompts: give one")
    values = {field.name: getattr(args, field.name) for field in fields(EvalRequest)}
    if args.chat_template is not None:
        values["chat_template"] = chat_template_text(args.chat_template)
    text_fields = None if args.text_fields is None else tuple(args.text_fields)
    evaluation = EvalRequest(**values | {"task": task, "dataset": _dataset(args, task), "text_fields": text_fields})
    evaluation.adapter_config()  # raises for a folder without one
    return evaluation


def _task(args: argparse.Namespace) -> str:
    if args.task != "auto":
        return str(args.task)
    data = args.dataset or args.eval_file or "gsm8k"
    if data.startswith("glue/") or data == "docstrings":
        return "classification"
    if "gsm8k" in Path(data).name.lower():
        return "gsm8k"
    is_classifier = args.adapter is not None and read_peft_config(Path(args.adapter)).get("task_type") == "SEQ_CLS"
    return "classification" if is_classifier else "causal_lm"


def _dataset(args: argparse.Namespace, task: str) -> str:
    name = args.dataset or args.eval_file
    if name is None and task == "classification":
        raise InputError("no data given; name a data set by --dataset, or a file by --eval_file")
    return GSM8K if name in (None, "gsm8k") else str(name)


def _folder(args: argparse.Namespace, task: str) -> Path:
    """Return the run's folder: ``--out_dir``, or next to ``--out_json``, or named after the model and the adapter."""
    if args.out_dir is None and args.out_json is not None:
        copy = Path(args.out_json)
        return copy.with_name(f"{copy.stem}_eval")
    return output_folder(args, "eval_results", task, source_name(args.model), source_name(args.adapter))


# --- the run ------------------------------------------------------------------------------------------------------


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of an evaluation."""
    return _request(args, read_request(args))


def _request(args: argparse.Namespace, evaluation: EvalRequest) -> RunRequest:
    folder = _folder(args, evaluation.task)
    return RunRequest(
        "eval",
        folder,
        evaluation.arguments,
        evaluation.outputs,
        settings=evaluation.arguments | {"out_json": args.out_json, "out_dir": folder},
        inputs=INPUTS,
        seed=evaluation.seed,
        overwrite=args.overwrite,
    )


def run(args: argparse.Namespace) -> None:
    evaluation = read_request(args)

    def body(folder: RunFolder) -> None:
        # Imported late: torch takes seconds to load, and a finished run or a bad flag should return at once.
        with importing():
            from sparselora.evaluation.run import run_evaluation

        metrics, lm_eval = run_evaluation(evaluation, folder)
        _print(evaluation, metrics, lm_eval)
        print(f"wrote {folder.folder}")

    run_in_folder(
        _request(args, evaluation),
        body,
        dry_run=args.dry_run,
        check=lambda: find_model(evaluation.model),
        copy=ReportCopy("--out_json", args.out_json, evaluation.metrics_name),
    )


def _print(evaluation: EvalRequest, metrics: Mapping[str, Any], lm_eval: str | None) -> None:
    subject = metrics["model"] + (f" with {metrics['adapter']}" if metrics["adapter"] else ", no adapter")
    print(f"{subject}, {metrics['dataset']}, {metrics['n']} rows:")
    if "active_rank" in metrics:
        rank = f"active rank {metrics['active_rank']:.2f} of {metrics['rank']:g}"
        print(f"  gated per token, {rank} ({metrics['gate_policy']})")
    interval = f"[{metrics.get('ci_low', 0):.4f}, {metrics.get('ci_high', 0):.4f}] (95 %)"
    if evaluation.task == "gsm8k":
        print(f"  exact match {metrics['exact_match']:.4f} {interval}, {metrics['fewshot']}-shot")
        print(f"  {metrics['correct']} right, {metrics['answered']} with a number")
        if lm_eval is not None:
            print(f"  by lm-eval, on the whole test split: {lm_eval}")
    else:
        error = "" if metrics["loss_stderr"] is None else f" ± {metrics['loss_stderr']:.4f} (standard error)"
        if evaluation.task == "classification":
            print(f"  accuracy {metrics['accuracy']:.4f} {interval}")
            if metrics["labels_seen"] < metrics["classes"]:
                source = "adapter" if metrics["adapter"] else "model"
                names = few(metrics["labels"])
                print(f"  the {source} knows {metrics['classes']} classes ({names}), the file {metrics['labels_seen']}")
        unit = f"nats a token, {metrics['tokens']} tokens" if evaluation.task == "causal_lm" else "nats"
        print(f"  loss {_shown(metrics['loss'])}{error}, {unit}")
        if evaluation.task == "classification" and metrics["ci_low"] <= 1 / metrics["classes"]:
            print("  no better than guessing: is the classifier's head trained, or in the adapter?")


def _shown(loss: float | None) -> str:
    return "nan" if loss is None else f"{loss:.4f}"
