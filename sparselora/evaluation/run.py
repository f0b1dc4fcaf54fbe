"""One evaluation: the model, the rows and the measure of a task, from a request to the files of its folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import set_seed

from sparselora.data.batches import Example, encode_texts
from sparselora.data.conversations import template_text
from sparselora.data.instructions import DEFAULT_TEMPLATE, InstructionData, encode_instructions, load_instructions
from sparselora.data.texts import load_text_data
from sparselora.errors import InputError
from sparselora.evaluation import losses as ev
from sparselora.evaluation.gsm8k import TEMPLATE, Questions, answer, ask
from sparselora.evaluation.request import EvalRequest
from sparselora.models import load as models
from sparselora.models.class_names import read_classes
from sparselora.models.model_files import gguf_file, model_facts, public_name
from sparselora.models.packaged import PACKAGES, resolve_alias
from sparselora.models.prompt_template import ChatTemplate, Template, merged_folder
from sparselora.runs.files import write_csv, write_json
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress
from sparselora.token_gates.gates import TokenGates, load_token_gates

Measure = Callable[[], tuple[dict[str, Any], pd.DataFrame]]
"""Returns the metrics, and a table with one row per item. It is made when everything that can be wrong with the input
has been checked."""

_GENERATED = "generated"
"""The column of that table with the text of an answer."""


@dataclass(frozen=True)
class _Place:
    """The device of an evaluation, and ``bf16``: compute in bfloat16 autocast."""

    device: torch.device
    bf16: bool


def run_evaluation(request: EvalRequest, folder: RunFolder) -> tuple[dict[str, Any], str | None]:
    """Load, measure and write everything.

    Args:
        folder: reserved, but not entered: nothing is written before the data and the model have been checked.
    Returns:
        The metrics, and the command line by which lm-eval measures the same (None where it cannot).
    Raises:
        InputError: data, a model or settings that do not go together.
    """
    # Once only: of several GPUs, this makes the one that is meant the only one.
    device = models.resolve_device(request.device)
    place = _Place(device, models.is_bf16(request.dtype, device))
    measure = _PREPARE[request.task](request, place)
    with folder:
        folder.note(device=models.device_name(device), **model_facts(request.model))
        metrics, items = measure()
        if _GENERATED in items:
            write_csv(folder.path(request.generations_name), items[["row", _GENERATED]])
            items = items.drop(columns=_GENERATED)
        write_csv(folder.path(request.items_name), items)
        write_json(folder.path(request.metrics_name), metrics)
    # lm-eval has its own prompts, would leave the gates out, and take the wrong end of texts for a GGUF file.
    if request.task != "gsm8k" or metrics.get("template") != TEMPLATE or request.is_gated or _is_gguf(request):
        return metrics, None
    return metrics, ev.lm_eval_command(
        resolve_alias(request.model),
        request.adapter,
        dtype="bfloat16" if place.bf16 else "float32",
        fewshot=request.fewshot,
        batch_size=request.eval_bsz,
        device=device.type if request.device == "auto" else request.device,
        seed=request.seed,
    )


# --- the tasks --------------------------------------------------------------------------------------------------------


def _prepare_gsm8k(request: EvalRequest, place: _Place) -> Measure:
    data = _instructions(request, TEMPLATE)
    questions = ask(data, request.fewshot, request.seed)
    generate, backend, model, tokenizer = _generator(request, place, questions)

    def measure() -> tuple[dict[str, Any], pd.DataFrame]:
        texts = generate()
        facts, items = answer(questions, texts)
        items[_GENERATED] = texts
        facts |= {**_template_facts(data.template, tokenizer), "backend": backend, **_gate_facts(model)}
        return _metrics(request, data.name, len(items), facts), items

    return measure


def _prepare_causal_lm(request: EvalRequest, place: _Place) -> Measure:
    data = _instructions(request, DEFAULT_TEMPLATE)
    model, tokenizer = _load_model(request, place)
    encoded = encode_instructions(data.eval, tokenizer, request.max_length, data.template)

    def measure() -> tuple[dict[str, Any], pd.DataFrame]:
        items = _losses(request, place, model, encoded.examples, tokenizer)
        items.insert(0, "row", data.eval["row"])
        loss, error = ev.mean_loss(items["loss"], items["tokens"])
        facts = {
            "loss": loss,
            "loss_stderr": error,
            "tokens": int(items["tokens"].sum()),
            "cut": encoded.cut,
            **_template_facts(data.template, tokenizer),
        }
        return _metrics(request, data.name, len(items), facts | _gate_facts(model)), items

    return measure


def _prepare_classification(request: EvalRequest, place: _Place) -> Measure:
    data = load_text_data(
        request.dataset,
        text_fields=request.text_fields,
        label_field=request.label_field,
        eval_file=request.eval_file,
        eval_samples=request.eval_samples,
        classes=read_classes(request.model, request.adapter),
    )
    model, tokenizer = _load_model(request, place, num_labels=len(data.labels))
    examples = encode_texts(data.eval, data.text_fields, tokenizer, request.max_length)

    def measure() -> tuple[dict[str, Any], pd.DataFrame]:
        items = _losses(request, place, model, examples, tokenizer)
        items.insert(0, "row", data.eval["row"])
        rate, low, high = ev.share(items["correct"])
        loss, error = ev.mean_loss(items["loss"], [1] * len(items))
        facts = {"accuracy": rate, "ci_low": low, "ci_high": high, "loss": loss, "loss_stderr": error,
                 "classes": len(data.labels), "labels": list(data.labels),
                 "labels_seen": items["label"].nunique()}  # fmt: skip
        return _metrics(request, data.name, len(items), facts | _gate_facts(model)), items

    return measure


_PREPARE: Mapping[str, Callable[[EvalRequest, _Place], Measure]] = {
    "gsm8k": _prepare_gsm8k,
    "causal_lm": _prepare_causal_lm,
    "classification": _prepare_classification,
}


def _template_facts(template: Template, tokenizer: Any) -> dict[str, str]:
    """Return the text around the prompts, as metrics have it."""
    if isinstance(template, ChatTemplate):
        return {"chat_template": template_text(tokenizer, template)}
    return {"template": template}


def _instructions(request: EvalRequest, default_template: str) -> InstructionData:
    return load_instructions(
        request.dataset,
        eval_file=request.eval_file,
        prompt_field=request.prompt_field,
        completion_field=request.completion_field,
        template=request.template,
        chat_template=request.chat_template,
        adapter=request.adapter if request.adapter is not None else merged_folder(request.model),
        default_template=default_template,
        eval_samples=request.eval_samples,
    )


def _load_model(request: EvalRequest, place: _Place, num_labels: int = 0) -> tuple[Any, Any]:
    """Load the model with its adapter and gates on its device, and its tokenizer."""
    set_seed(request.seed)  # before a head is drawn
    model: Any
    if request.task == "classification":
        model, tokenizer = models.load_classifier(request.model, num_labels)
    else:
        model, tokenizer = models.load_causal_lm(request.model, torch.bfloat16 if place.bf16 else torch.float32)
    if request.adapter is not None:
        model = ev.with_adapter(model, request.adapter)
    model = model.to(place.device).eval()
    if request.is_gated:
        assert request.adapter is not None
        load_token_gates(model, request.adapter)
    return model, tokenizer


def _losses(
    request: EvalRequest, place: _Place, model: Any, examples: Sequence[Example], tokenizer: Any
) -> pd.DataFrame:
    with Progress(len(examples), "row", "evaluation") as progress:
        return ev.held_out_losses(
            model, examples, tokenizer, batch_size=request.eval_bsz, bf16=place.bf16, on_done=progress.update
        )


def _generator(
    request: EvalRequest, place: _Place, questions: Questions
) -> tuple[Callable[[], list[str]], str, Any, Any]:
    """Return what answers the questions, by vLLM or transformers, the name of that backend, and the model and tokenizer
    of the latter."""
    if _uses_vllm(request, place, is_chat=isinstance(questions.template, ChatTemplate)):
        config = request.adapter_config()
        generate = ev.vllm_generator(
            resolve_alias(request.model),
            lora_dir=request.adapter,
            lora_rank=max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()]),
            max_new_tokens=request.max_new_tokens,
            dtype="bfloat16" if place.bf16 else "float32",
            seed=request.seed,
        )
        return lambda: generate(questions.prompts), "vllm", None, None
    model, tokenizer = _load_model(request, place)
    prompts, ends = questions.for_model(tokenizer)
    ev.prompt_ids(prompts, tokenizer, request.max_new_tokens)  # says what does not fit, before anything is written

    def generate_all() -> list[str]:
        with Progress(len(prompts), "answer", "evaluation") as progress:
            generate = ev.transformers_generator(
                model, tokenizer, max_new_tokens=request.max_new_tokens, batch_size=request.eval_bsz, ends=ends,
                on_done=progress.update,
            )  # fmt: skip
            return generate(prompts)

    return generate_all, "transformers", model, tokenizer


def _uses_vllm(request: EvalRequest, place: _Place, is_chat: bool) -> bool:
    is_installed = importlib.util.find_spec("vllm") is not None
    if request.backend == "vllm" and not is_installed:
        raise InputError("--backend vllm needs the package vllm; install it (extra eval), or use transformers")
    if request.backend == "vllm" and _is_gguf(request):
        raise InputError(
            f"--backend vllm does not read --model {request.model} as transformers does, so its texts would end "
            "elsewhere; use transformers"
        )
    if request.backend == "vllm" and request.is_gated:
        raise InputError(
            f"--backend vllm does not gate per token, and --adapter {request.adapter} has gates; use transformers"
        )
    if request.backend == "vllm" and is_chat:
        raise InputError("--backend vllm does not render prompts by a chat template; use transformers")
    if request.backend != "auto":
        return request.backend == "vllm"
    is_excluded = request.is_gated or is_chat or _is_gguf(request)
    return is_installed and place.device.type == "cuda" and not is_excluded


def _is_gguf(request: EvalRequest) -> bool:
    """Return whether the model is loaded from a GGUF file, not from a folder that one was converted to."""
    return request.model not in PACKAGES and gguf_file(request.model) is not None


# --- metrics ----------------------------------------------------------------------------------------------------------


def _gate_facts(model: Any) -> dict[str, Any]:
    """Policy, active and full rank of a model with token gates, as means over its modules; empty without gates."""
    gates = getattr(model, "token_gates", None)
    if not isinstance(gates, TokenGates):
        return {}
    ranks = [gate.rank for gate in gates]
    active = sum(gates.active_rank().values()) / len(ranks)
    return {"gate_policy": gates.config.policy, "active_rank": active, "rank": sum(ranks) / len(ranks)}


def _metrics(request: EvalRequest, data: str, n: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task": request.task,
        "model": public_name(request.model),
        "adapter": None if request.adapter is None else public_name(request.adapter),
        "dataset": data if request.eval_file is None else Path(request.eval_file).name,
        "n": n,
        "seed": request.seed,
        **{name: None if value != value else value for name, value in facts.items()},
    }
