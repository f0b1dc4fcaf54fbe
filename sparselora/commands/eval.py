"""Evaluate a model, with a LoRA adapter or alone: GSM8K exact match, held-out loss, or accuracy of a classifier.

The rows evaluated are those that `train` holds out of the same --dataset: those of --eval_file, else a hub's validation
or test split, else every fifth row. With --eval_file alone, all of its rows. Without data: GSM8K's test split.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sparselora.cli import (
    ReportCopy,
    add_run_arguments,
    output_folder,
    result_arguments,
    row_count,
    run_in_folder,
    source_name,
)
from sparselora.config.flags import add_setting_flags
from sparselora.errors import InputError, few
from sparselora.models.adapter_config import read_peft_config
from sparselora.models.names import find_model
from sparselora.runs.folder import RunFolder, write_csv, write_json
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    import pandas as pd

    from sparselora.evaluation.losses import Generate

GSM8K = "openai/gsm8k:main"
TASKS = ("gsm8k", "causal_lm", "classification")
INPUTS = ("model", "adapter", "dataset", "eval_file")
"""The arguments that name files or folders."""
BACKENDS = ("auto", "transformers", "vllm")
_DTYPES = ("auto", "fp32", "bf16")
_DATA_FIELDS = ("text_fields", "label_field", "prompt_field", "completion_field", "template", "max_length")
_ONLY_FOR = {"text_fields": "classification", "template": "causal_lm"}

EXAMPLES = """\
  sparselora eval --model minilm --adapter runs/train/adapter --dataset docstrings
  sparselora eval --model ./llama --dataset rows.jsonl --eval_samples 200 --out_json results.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="M", help="local folder or hub name (needed)")
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


# --- settings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The flags, checked; ``task`` and ``dataset`` as resolved."""

    task: str
    dataset: str
    args: argparse.Namespace

    @property
    def folder(self) -> Path:
        """The run's folder: ``--out_dir``, or beside ``--out_json``, or called after the model and the adapter."""
        args = self.args
        if args.out_dir is None and args.out_json is not None:
            return _beside(Path(args.out_json))
        return output_folder(args, "eval_results", self.task, source_name(args.model), source_name(args.adapter))

    @property
    def metrics_name(self) -> str:
        return f"metrics_{self.task}.json"

    @property
    def items_name(self) -> str:
        return f"items_{self.task}.csv"

    @property
    def generations_name(self) -> str:
        """The texts that were generated, in a file apart: what is published need not hold them."""
        return f"generations_{self.task}.csv"

    @property
    def outputs(self) -> tuple[str, ...]:
        generated = (self.generations_name,) if self.task == "gsm8k" else ()
        return self.metrics_name, self.items_name, *generated

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        given = {name: value for name, value in result_arguments(self.args).items() if name != "out_json"}
        return given | {"task": self.task, "dataset": self.dataset, "device": self.args.device.partition(":")[0]}


def resolve(args: argparse.Namespace) -> Plan:
    for name, least in (("fewshot", 0), ("max_new_tokens", 1), ("eval_bsz", 1), ("max_length", 2)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be {least} or more, got {getattr(args, name)}")
    task = _task(args)
    for name, only in _ONLY_FOR.items():
        if getattr(args, name) is not None and task != only:
            raise InputError(f"--{name} is for task {only}, this is {task}; leave it out, or give --task {only}")
    return Plan(task, _dataset(args, task), args)


def _beside(out_json: Path) -> Path:
    return out_json.with_name(f"{out_json.stem}_eval")


def _task(args: argparse.Namespace) -> str:
    if args.task != "auto":
        return str(args.task)
    data = args.dataset or args.eval_file or "gsm8k"
    if data.startswith("glue/") or data == "docstrings":
        return "classification"
    if "gsm8k" in Path(data).name.lower():
        return "gsm8k"
    return "classification" if _adapter_config(args.adapter).get("task_type") == "SEQ_CLS" else "causal_lm"


def _dataset(args: argparse.Namespace, task: str) -> str:
    given = args.dataset or args.eval_file
    if given is None and task == "classification":
        raise InputError("no data given; name a data set by --dataset, or a file by --eval_file")
    return GSM8K if given in (None, "gsm8k") else str(given)


def _adapter_config(folder: str | None) -> dict[str, Any]:
    """The adapter's configuration; empty without an adapter.

    Raises:
        InputError: there is none in ``folder``, or it cannot be read.
    """
    return {} if folder is None else read_peft_config(Path(folder))


# --- the run ------------------------------------------------------------------------------------------------------


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of an evaluation."""
    return _request(resolve(args))


def _request(plan: Plan) -> RunRequest:
    args = plan.args
    _adapter_config(args.adapter)
    return RunRequest(
        "eval",
        plan.folder,
        plan.arguments,
        plan.outputs,
        settings=plan.arguments | {"out_json": args.out_json, "out_dir": plan.folder},
        inputs=INPUTS,
        seed=args.seed,
        overwrite=args.overwrite,
    )


def run(args: argparse.Namespace) -> None:
    plan = resolve(args)

    def body(folder: RunFolder) -> None:
        measure = _PREPARE[plan.task](plan)
        with folder:
            folder.note(device=_device_name(args))
            metrics, items = measure()
            if _GENERATED in items:
                write_csv(folder.path(plan.generations_name), items[["row", _GENERATED]])
                items = items.drop(columns=_GENERATED)
            write_csv(folder.path(plan.items_name), items)
            write_json(folder.path(plan.metrics_name), metrics)
        _print(plan, metrics)

    run_in_folder(
        _request(plan),
        body,
        dry_run=args.dry_run,
        check=lambda: find_model(args.model),
        copy=ReportCopy("--out_json", args.out_json, plan.metrics_name),
    )


@functools.cache
def _device_type(device: str) -> str:
    """``cpu`` or ``cuda``. Asked for once: of several GPUs, the answer makes the one that is meant the only one."""
    from sparselora.models.load import resolve_device

    return resolve_device(device).type


def _device_name(args: argparse.Namespace) -> str:
    import torch

    return torch.cuda.get_device_name() if _device_type(args.device) == "cuda" else "cpu"


def _bf16(args: argparse.Namespace) -> bool:
    return bool(args.dtype == "bf16" or (args.dtype == "auto" and _device_type(args.device) == "cuda"))


# --- the tasks ----------------------------------------------------------------------------------------------------

Measure = Callable[[], tuple[dict[str, Any], "pd.DataFrame"]]
"""What a task's ``_prepare_…`` gives, after everything that can be wrong with the input was found: to be called for the
metrics, and a table with a row an item."""

_GENERATED = "generated"
"""The column of that table with the text of an answer."""


def _prepare_gsm8k(plan: Plan) -> Measure:
    from sparselora.evaluation.gsm8k import answer, ask

    data = _instructions(plan, template="{prompt}")
    questions = ask(data, plan.args.fewshot, plan.args.seed)
    generate, backend, model = _generator(plan, questions.prompts)

    def measure() -> tuple[dict[str, Any], pd.DataFrame]:
        texts = generate(questions.prompts)
        facts, items = answer(questions, lambda _: texts)
        items[_GENERATED] = texts
        return _metrics(plan, data.name, len(items), {**facts, "backend": backend, **_gate_facts(model)}), items

    return measure


def _prepare_causal_lm(plan: Plan) -> Measure:
    from sparselora.data.instructions import encode_instructions
    from sparselora.evaluation import losses as ev

    data = _instructions(plan, template=plan.args.template)
    model, tokenizer, bf16 = _load_model(plan)
    encoded = encode_instructions(data.eval, tokenizer, plan.args.max_length)

    def measure() -> tuple[dict[str, Any], pd.DataFrame]:
        items = _losses(plan, model, encoded.examples, tokenizer, bf16)
        items.insert(0, "row", data.eval["row"])
        loss, error = ev.mean_loss(items["loss"], items["tokens"])
        facts = {"loss": loss, "loss_stderr": error, "tokens": int(items["tokens"].sum()), "cut": encoded.cut}
        return _metrics(plan, data.name, len(items), facts | _gate_facts(model)), items

    return measure


def _prepare_classification(plan: Plan) -> Measure:
    from sparselora.data.batches import encode_texts
    from sparselora.data.texts import load_text_data
    from sparselora.evaluation import losses as ev
    from sparselora.models.class_names import read_classes

    args = plan.args
    data = load_text_data(
        plan.dataset,
        text_fields=args.text_fields,
        label_field=args.label_field,
        eval_file=args.eval_file,
        eval_samples=plan.args.eval_samples,
        classes=read_classes(args.model, args.adapter),
    )
    model, tokenizer, bf16 = _load_model(plan, num_labels=len(data.labels))
    examples = encode_texts(data.eval, data.text_fields, tokenizer, args.max_length)

    def measure() -> tuple[dict[str, Any], pd.DataFrame]:
        items = _losses(plan, model, examples, tokenizer, bf16)
        items.insert(0, "row", data.eval["row"])
        rate, low, high = ev.share(items["correct"])
        loss, error = ev.mean_loss(items["loss"], [1] * len(items))
        facts = {"accuracy": rate, "ci_low": low, "ci_high": high, "loss": loss, "loss_stderr": error,
                 "classes": len(data.labels), "labels": list(data.labels),
                 "labels_seen": items["label"].nunique()}  # fmt: skip
        return _metrics(plan, data.name, len(items), facts | _gate_facts(model)), items

    return measure


_PREPARE: Mapping[str, Callable[[Plan], Measure]] = {
    "gsm8k": _prepare_gsm8k,
    "causal_lm": _prepare_causal_lm,
    "classification": _prepare_classification,
}


def _instructions(plan: Plan, template: str | None) -> Any:
    from sparselora.data.instructions import load_instructions

    args = plan.args
    return load_instructions(
        plan.dataset,
        eval_file=args.eval_file,
        prompt_field=args.prompt_field,
        completion_field=args.completion_field,
        template=template,
        eval_samples=plan.args.eval_samples,
    )


def _load_model(plan: Plan, num_labels: int = 0) -> tuple[Any, Any, bool]:
    """The model with its adapter on its device, its tokenizer, and whether to compute in bfloat16."""
    import torch
    from transformers import set_seed

    from sparselora.evaluation.losses import with_adapter
    from sparselora.models import load as models

    args = plan.args
    device, bf16 = _device_type(args.device), _bf16(args)
    set_seed(args.seed)  # before a head is drawn
    if plan.task == "classification":
        model, tokenizer = models.load_classifier(args.model, num_labels)
    else:
        model, tokenizer = models.load_causal_lm(args.model, torch.bfloat16 if bf16 else torch.float32)
    if args.adapter is not None:
        model = with_adapter(model, args.adapter)
    model = model.to(device).eval()
    if _gated(args.adapter):
        from sparselora.token_gates.gates import load_token_gates

        load_token_gates(cast(Any, model), args.adapter)
    return model, tokenizer, bf16


def _gated(lora_dir: str | None) -> bool:
    """Whether the adapter has gates that choose its active rank channels token by token."""
    return lora_dir is not None and (Path(lora_dir) / "token_gate.json").is_file()


def _gate_facts(model: Any) -> dict[str, Any]:
    """Of a model with token gates, what they did since they were loaded: means over its modules. Empty without."""
    from sparselora.token_gates.gates import TokenGates

    gates = getattr(model, "token_gates", None)
    if not isinstance(gates, TokenGates):
        return {}
    ranks = [gate.rank for gate in gates]
    active = sum(gates.active_rank().values()) / len(ranks)
    return {"gate_policy": gates.config.policy, "active_rank": active, "rank": sum(ranks) / len(ranks)}


def _generator(plan: Plan, prompts: list[str]) -> tuple[Generate, str, Any]:
    """What answers, by vLLM or transformers, which of them it is, and the model of the latter."""
    from sparselora.evaluation import losses as ev

    args = plan.args
    if _with_vllm(args):
        from sparselora.models.weights import resolve_alias

        config = _adapter_config(args.adapter)
        generate = ev.vllm_generator(
            resolve_alias(args.model),
            lora_dir=args.adapter,
            lora_rank=max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()]),
            max_new_tokens=args.max_new_tokens,
            dtype="bfloat16" if _bf16(args) else "float32",
            seed=args.seed,
        )
        return generate, "vllm", None
    model, tokenizer, _ = _load_model(plan)
    ev.prompt_ids(prompts, tokenizer, args.max_new_tokens)  # says what does not fit, before anything is written

    def answer(texts: Sequence[str]) -> list[str]:
        with _bar(len(texts)) as bar:
            generate = ev.transformers_generator(
                model, tokenizer, max_new_tokens=args.max_new_tokens, batch_size=args.eval_bsz, on_done=bar.update
            )
            return generate(texts)

    return answer, "transformers", model


def _with_vllm(args: argparse.Namespace) -> bool:
    installed = importlib.util.find_spec("vllm") is not None
    if args.backend == "vllm" and not installed:
        raise InputError("--backend vllm needs the package vllm; install it (extra eval), or use transformers")
    gated = _gated(args.adapter)
    if args.backend == "vllm" and gated:
        raise InputError(
            f"--backend vllm does not gate per token, and --adapter {args.adapter} has gates; use transformers"
        )
    cuda = _device_type(args.device) == "cuda"  # asked for in any case: vLLM takes the device that is visible
    return bool(args.backend == "vllm") if args.backend != "auto" else installed and cuda and not gated


def _losses(plan: Plan, model: Any, examples: list[Any], tokenizer: Any, bf16: bool) -> pd.DataFrame:
    from sparselora.evaluation.losses import held_out_losses

    with _bar(len(examples)) as bar:
        return held_out_losses(model, examples, tokenizer, batch_size=plan.args.eval_bsz, bf16=bf16, on_done=bar.update)


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="item", disable=not sys.stderr.isatty(), leave=False)


# --- what it says -------------------------------------------------------------------------------------------------


def _metrics(plan: Plan, data: str, n: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    from sparselora.models.load import public_name

    adapter, eval_file = plan.args.adapter, plan.args.eval_file
    return {
        "task": plan.task,
        "model": public_name(plan.args.model),
        "adapter": None if adapter is None else public_name(adapter),
        "dataset": data if eval_file is None else Path(eval_file).name,
        "n": n,
        "seed": plan.args.seed,
        **{name: None if value != value else value for name, value in facts.items()},
    }


def _print(plan: Plan, metrics: Mapping[str, Any]) -> None:
    what = metrics["model"] + (f" with {metrics['adapter']}" if metrics["adapter"] else ", no adapter")
    print(f"{what}, {metrics['dataset']}, {metrics['n']} rows:")
    if "active_rank" in metrics:
        rank = f"active rank {metrics['active_rank']:.2f} of {metrics['rank']:g}"
        print(f"  gated per token, {rank} ({metrics['gate_policy']})")
    interval = f"[{metrics.get('ci_low', 0):.4f}, {metrics.get('ci_high', 0):.4f}] (95 %)"
    if plan.task == "gsm8k":
        print(f"  exact match {metrics['exact_match']:.4f} {interval}, {metrics['fewshot']}-shot")
        print(f"  {metrics['correct']} right, {metrics['answered']} with a number")
        if not _gated(plan.args.adapter):  # which lm-eval would leave out
            print(f"  by lm-eval, on the whole test split: {_lm_eval(plan)}")
    else:
        error = "" if metrics["loss_stderr"] is None else f" ± {metrics['loss_stderr']:.4f} (standard error)"
        if plan.task == "classification":
            print(f"  accuracy {metrics['accuracy']:.4f} {interval}")
            if metrics["labels_seen"] < metrics["classes"]:
                source = "adapter" if metrics["adapter"] else "model"
                names = few(metrics["labels"])
                print(f"  the {source} knows {metrics['classes']} classes ({names}), the file {metrics['labels_seen']}")
        unit = f"nats a token, {metrics['tokens']} tokens" if plan.task == "causal_lm" else "nats"
        print(f"  loss {_shown(metrics['loss'])}{error}, {unit}")
        if plan.task == "classification" and metrics["ci_low"] <= 1 / metrics["classes"]:
            print("  no better than guessing: is the classifier's head trained, or in the adapter?")
    print(f"wrote {plan.folder}")


def _shown(loss: float | None) -> str:
    return "nan" if loss is None else f"{loss:.4f}"


def _lm_eval(plan: Plan) -> str:
    from sparselora.evaluation.losses import lm_eval_command

    args = plan.args
    return lm_eval_command(
        args.model,
        args.adapter,
        dtype="bfloat16" if _bf16(args) else "float32",
        fewshot=args.fewshot,
        batch_size=args.eval_bsz,
        device=_device_type(args.device) if args.device == "auto" else args.device,
        seed=args.seed,
    )
