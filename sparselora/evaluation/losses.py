"""Quality of a model, with an adapter or without: answers to GSM8K, held-out loss, accuracy of a classifier.

Everything is per item, in the order of the items given, so that two models can be compared item by item. What a model
wrote is reduced to the number it answered; texts are not kept.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from sparselora.data.batches import Collator, Example
from sparselora.data.tokens import encode_prompts
from sparselora.errors import InputError, one_line
from sparselora.models.adapter_config import (
    VLLM_RANKS,
    is_plain_lora,
    read_peft_config,
    refuse_slow_patterns,
    vllm_rank,
)
from sparselora.models.adapter_files import write_files
from sparselora.models.adapter_names import lora_modules, peft_keys
from sparselora.models.adapter_tensors import stored_tensors, weights_file
from sparselora.models.label_scores import LabelScores
from sparselora.models.load import evaluating

Prompt = str | list[int]
"""A text, or the token ids of a conversation."""
Generate = Callable[[Sequence[Any]], list[str]]
"""Prompts → what the model writes after each, up to the next question."""

# --- answers ------------------------------------------------------------------------------------------------------

NEXT_QUESTION = "Question:"
"""The text at which generation stops: a base model goes on with a question of its own, and answers it."""

_NEXT = re.compile(rf"{NEXT_QUESTION}|(?:^|\n)[ \t]*(?:Question|Problem|Q)[ \t]*[0-9]*[ \t]*:")
_MINUS = r"[-−]"
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9^])"  # not in a word (H2O, x2), nor an exponent (m^2)
    rf"(?P<sign>(?<![)\]}}]){_MINUS})?(?:\\?[$€£][ ]?(?P<inner_sign>{_MINUS})?)?"  # 9-3 and (9)-3 hold a 3, not a −3
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/(?P<denominator>0*[1-9][0-9]*))?"
)
_MARKED = re.compile(rf"####\s*[*=:]*\s*{_NUMBER.pattern}")


def first_answer(text: str) -> str:
    """``text`` before the next question that it asks itself; all of it if there is none."""
    match = _NEXT.search(text)
    return text[: match.start()] if match else text


def parse_answer(text: str) -> Decimal | None:
    """The number that ``text`` gives as its answer; None without one.

    Only what stands before a next question is read. There it is the first number that follows ``####``, else the last
    number. Read as written in figures: ``18.`` and ``18.00`` are 18; thousands commas, ``$``, ``€`` and ``£`` are
    dropped, and so is a percent sign (5% is 5: gold answers give the count); ``-3``, ``-$3``, ``$-3`` and ``−3`` are
    negative, but 9-3 ends in 3; 3/4 is 0.75. Figures in words and exponents (H2O, m^2) are no numbers.
    """
    answer = first_answer(text)
    marked = _MARKED.search(answer)
    numbers = [marked] if marked else list(_NUMBER.finditer(answer))
    return _value(numbers[-1]) if numbers else None


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", ""))
    if match["denominator"]:
        value /= Decimal(match["denominator"])
    return -value if match["sign"] or match["inner_sign"] else value


def plain_number(value: Decimal | None) -> str:
    """``value`` without an exponent or trailing zeros, so that equal numbers are equal texts; empty for None."""
    if value is None:
        return ""
    text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def gold_answers(completions: Sequence[str]) -> list[Decimal]:
    """The numbers that reference solutions end in.

    Raises:
        InputError: a solution without a number.
    """
    numbers = []
    for i, completion in enumerate(completions):
        number = parse_answer(completion)
        if number is None:
            raise InputError(
                f"answer {i} of the evaluated rows holds no number; exact match compares numbers (use task causal_lm)"
            )
        numbers.append(number)
    return numbers


def exact_match(predicted: Sequence[Decimal | None], gold: Sequence[Decimal]) -> NDArray[np.bool_]:
    """Item by item ``(n,)``, whether the numbers are equal; no answer is never right."""
    return np.array([a is not None and a == b for a, b in zip(predicted, gold, strict=True)], dtype=bool)


# --- prompts ------------------------------------------------------------------------------------------------------


def worked_examples(train: pd.DataFrame, evaluated: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` questions with their solutions, drawn from ``train`` (columns ``prompt``, ``completion``) by ``seed``.

    A question that is among the ``evaluated`` ones, up to case and white space, is never drawn.

    Raises:
        InputError: fewer other questions than ``count``.
    """
    seen = {_key(question) for question in evaluated}
    rows = [i for i, question in enumerate(train["prompt"]) if _key(question) not in seen]
    if count > len(rows):
        raise InputError(
            f"{count} worked examples are wanted, the training rows have {len(rows)} questions that are not evaluated; "
            "use a smaller --fewshot, or a --dataset with more rows"
        )
    index = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [(train["prompt"].iloc[rows[i]], train["completion"].iloc[rows[i]]) for i in index]


def _key(question: str) -> str:
    return " ".join(question.lower().split())


def few_shot_prompt(examples: Sequence[tuple[str, str]], question: str, gap: str = "") -> str:
    """The worked examples (question, solution) with ``gap`` between the two, then ``question``, as worded."""
    return "".join(f"{earlier}{gap}{solution}\n\n" for earlier, solution in examples) + question


def lm_eval_command(
    base_model: str, lora_dir: str | None, *, dtype: str, fewshot: int, batch_size: int, device: str, seed: int
) -> str:
    """The command line by which lm-eval measures the same on GSM8K's test split (its own examples are drawn by it)."""
    model = f"pretrained={base_model}" + (f",peft={lora_dir}" if lora_dir else "") + f",dtype={dtype}"
    words = ["lm_eval", "--model", "hf", "--model_args", model, "--tasks", "gsm8k", "--num_fewshot", str(fewshot),
             "--batch_size", str(batch_size), "--device", device, "--seed", str(seed)]  # fmt: skip
    return shlex.join(words)


# --- generation ---------------------------------------------------------------------------------------------------


def transformers_generator(
    model: nn.Module,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    batch_size: int,
    ends: Collection[int] = (),
    on_done: Callable[[int], object] = lambda count: None,
) -> Generate:
    """Greedy generation by transformers, in batches padded on the left, prompts of similar length together.

    A sequence ends at EOS or one of the tokens ``ends``, at the next question, or after ``max_new_tokens``. Sampling
    and penalties that the model's own generation settings ask for are off. ``on_done`` is called with the size of each
    batch that is done. Calling the result raises `InputError` where a prompt leaves no room for ``max_new_tokens``.
    """

    def generate(prompts: Sequence[Prompt]) -> list[str]:
        ids = prompt_ids(prompts, tokenizer, max_new_tokens)
        longest_first = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # what does not fit in memory shows at once
        texts = [""] * len(ids)
        with evaluating(model):
            for start in range(0, len(ids), batch_size):
                part = longest_first[start : start + batch_size]
                batch = [ids[i] for i in part]
                for i, text in zip(part, generate_tokens(model, tokenizer, batch, max_new_tokens, ends)):
                    texts[i] = first_answer(text)
                on_done(len(part))
        return texts

    return generate


def prompt_ids(prompts: Sequence[Prompt], tokenizer: Any, max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt: of a text with the tokenizer's own beginning (BOS) but without an end.

    Raises:
        InputError: a prompt that leaves no room for ``max_new_tokens`` among the positions the model has, or that has
            no token; tokens that the model has no embedding for.
    """
    encoded = iter(encode_prompts(tokenizer, [prompt for prompt in prompts if isinstance(prompt, str)]))
    ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
    if not all(ids):
        raise InputError("a question has no token for this tokenizer; use the model's own tokenizer")
    longest = max(map(len, ids), default=0)
    if longest + max_new_tokens > tokenizer.model_max_length:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {tokenizer.model_max_length} "
            "positions of the model; use a smaller --fewshot or --max_new_tokens"
        )
    return ids


@torch.no_grad()
def generate_tokens(
    model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int] = ()
) -> list[str]:
    """Generate the continuation of each of one batch of prompts, greedily, as `transformers_generator` does."""
    length, device = max(map(len, ids)), next(model.parameters()).device
    pad, eos = tokenizer.pad_token_id, sorted({*_end_tokens(model, tokenizer), *ends})
    tokens = torch.tensor([[pad] * (length - len(row)) + list(row) for row in ids], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad, eos_token_id=eos,
        # Unset fields are taken from the model's own settings, which may be meant for chat: say them all.
        temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1.0, no_repeat_ngram_size=0,
    )  # fmt: skip
    stop = StoppingCriteriaList([_NextQuestion(tokenizer, length)])
    output = model.generate(input_ids=tokens, attention_mask=mask, generation_config=settings, stopping_criteria=stop)
    return tokenizer.batch_decode(output[:, length:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *([end] if isinstance(end, int) else end or [])})


class _NextQuestion(StoppingCriteria):
    """Ends a sequence whose newest tokens, decoded, hold the beginning of a next question.

    Decoded, not compared as tokens: how ``Question:`` is cut into tokens depends on what stands before it.
    """

    _TAIL = 2 * len(NEXT_QUESTION)

    def __init__(self, tokenizer: Any, prompt_length: int) -> None:
        self._tokenizer, self._begin = tokenizer, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        begin = max(self._begin, input_ids.shape[1] - self._TAIL)
        texts = self._tokenizer.batch_decode(input_ids[:, begin:], clean_up_tokenization_spaces=False)
        has_ended = [NEXT_QUESTION in text for text in texts]
        return torch.tensor(has_ended, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


def vllm_generator(
    base_model: str,
    *,
    max_new_tokens: int,
    lora_dir: str | None = None,
    lora_rank: int = 0,
    dtype: str = "auto",
    seed: int = 0,
) -> Generate:
    """Greedy generation by vLLM, which must be installed (extra ``eval``): ends as `transformers_generator` does.

    Args:
        lora_rank: largest rank of the adapter in ``lora_dir``.
        dtype: as vLLM names it.
    Raises:
        InputError: a rank above what vLLM serves.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapted: dict[str, Any] = {}
    if lora_dir is not None:
        served_rank = vllm_rank(lora_rank)
        if served_rank is None:
            raise InputError(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, got {lora_rank}; use --backend transformers")
        adapted = {"enable_lora": True, "max_lora_rank": served_rank}
    engine = LLM(model=base_model, dtype=dtype, seed=seed, **adapted)
    request = LoRARequest("adapter", 1, lora_dir) if lora_dir is not None else None
    sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop=[NEXT_QUESTION])

    def generate(prompts: Sequence[str]) -> list[str]:
        outputs = engine.generate(list(prompts), sampling, lora_request=request, use_tqdm=sys.stderr.isatty())
        return [first_answer(output.outputs[0].text) for output in outputs]

    return generate


# --- losses -------------------------------------------------------------------------------------------------------


def held_out_losses(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    batch_size: int,
    bf16: bool = False,
    on_done: Callable[[int], object] = lambda count: None,
) -> pd.DataFrame:
    """`item_losses` of ``examples``, in their order; batches are made of examples of similar length."""
    if not examples:
        raise InputError("there are no rows to evaluate")
    device = next(model.parameters()).device
    collator = Collator(tokenizer.pad_token_id, causal=False, longest=tokenizer.model_max_length)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(order), batch_size):
            part = [examples[i] for i in order[start : start + batch_size]]
            yield {name: value.to(device) for name, value in collator.tensors(part).items()}
            on_done(len(part))

    table = item_losses(model, batches(), bf16=bf16)
    table.index = pd.Index(order)
    return table.sort_index()


@torch.no_grad()
def item_losses(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], *, bf16: bool = False) -> pd.DataFrame:
    """A row an item, in the order of the batches; the model is in evaluation mode (no dropout).

    Language model (labels ``(batch, length)``): ``loss``, the sum in nats over the item's labels, and ``tokens``, how
    many these are; the logits of a position are for the label at the next, and IGNORED is none. Classifier (labels
    ``(batch,)``): ``loss``, the cross-entropy in nats, ``label``, ``predicted`` and ``correct`` (0 or 1). How items
    are batched and padded makes no difference beyond rounding.

    Args:
        batches: ``input_ids``, ``attention_mask`` and ``labels`` on the model's device.
        bf16: compute in bfloat16 autocast.
    """
    tables = []
    with evaluating(model):
        label_scores = LabelScores(model)
        for batch in batches:
            labels = batch["labels"]
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=bf16):
                if labels.ndim == 2:
                    tokens, loss, _ = label_scores(inputs, labels).T.tolist()
                    tables.append(pd.DataFrame({"loss": loss, "tokens": [int(count) for count in tokens]}))
                    continue
                logits = model(**inputs).logits
            tables.append(_class_losses(logits, labels))
    return pd.concat(tables, ignore_index=True)


def _class_losses(logits: torch.Tensor, labels: torch.Tensor) -> pd.DataFrame:
    predicted = logits.argmax(dim=1)
    loss = F.cross_entropy(logits.double(), labels, reduction="none")
    columns = {"loss": loss, "label": labels, "predicted": predicted, "correct": (predicted == labels).long()}
    return pd.DataFrame({name: value.tolist() for name, value in columns.items()})


# --- in numbers ---------------------------------------------------------------------------------------------------


def share(correct: ArrayLike) -> tuple[float, float, float]:
    """The share of right items ``(n,)``, n ≥ 1, and its 95 % interval (Wilson's, which 0 of n has too)."""
    from scipy.stats import binomtest

    right = np.asarray(correct, dtype=bool)
    interval = binomtest(int(right.sum()), right.size).proportion_ci(0.95, method="wilson")
    return float(right.mean()), float(interval.low), float(interval.high)


def mean_loss(sums: ArrayLike, counts: ArrayLike) -> tuple[float, float]:
    """Σ sums / Σ counts over items ``(n,)``, and its standard error with items drawn whole; (NaN, NaN) for no count.

    The labels of an item are not independent of one another, so it is items that are counted; NaN for one.
    """
    total, seen = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if seen.sum() == 0:
        return math.nan, math.nan
    mean = float(total.sum() / seen.sum())
    if total.size < 2:
        return mean, math.nan
    spread = float(((total - mean * seen) ** 2).sum()) * total.size / (total.size - 1)
    return mean, math.sqrt(spread) / float(seen.sum())


# --- the adapter --------------------------------------------------------------------------------------------------


_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "CPT")
"""Methods of PEFT that put embeddings of virtual tokens before those of the text."""


def with_adapter(model: nn.Module, folder: str) -> nn.Module:
    """``model`` with the adapter in ``folder``, loaded by plain PEFT (pickled weights without code only).

    Raises:
        InputError: what `adapter_config.read_peft_config` and `peft_keys` refuse; weights that cannot be read, are
            not finite, or of other ranks than configured; an adapter that has weights for other modules than the
            model's, or lacks some of those that it should have; prompts of several tasks, or before the text of a
            classifier that reads the last token.
    """
    from peft import PeftModel

    path = Path(folder)
    config = read_peft_config(path)
    stored = stored_tensors(weights_file(path))
    keys = peft_keys(path, config, stored) if config.get("peft_type") == "LORA" else {name: name for name in stored}
    weights = {key: stored[name] for name, key in keys.items()}
    if is_plain_lora(config):
        # PEFT makes factors of the configured ranks before it compares them; a damaged file may put these at any size.
        lora_modules(path, config, {key: tuple(value.shape) for key, value in weights.items()})
    refuse_slow_patterns(path, config, [name for name, _ in model.named_modules()])
    for name, weight in weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight.float()).all():
            raise InputError(f"adapter {folder} holds NaN or infinite values in {name}; the weights are damaged")
    with tempfile.TemporaryDirectory() as renamed, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if weights.keys() != stored.keys():
            write_files(Path(renamed), config, weights)
        source = folder if weights.keys() == stored.keys() else renamed
        try:
            adapted = PeftModel.from_pretrained(model, source)
            loaded = adapted.load_adapter(source, "default")
        except Exception as error:  # other shapes, other modules, unknown methods: the libraries raise a dozen kinds
            raise InputError(
                f"adapter {folder} cannot be loaded into the model ({one_line(str(error))[:160]}); give one that "
                "was trained on it"
            ) from None
    for warning in told:
        if "missing adapter keys" in str(warning.message):
            raise InputError(
                f"adapter {folder} lacks weights for modules of the model that its configuration names; "
                "check --model, or restore the adapter's files"
            )
    if config["peft_type"] == "MULTITASK_PROMPT_TUNING":
        raise InputError(
            f"adapter {folder} has prompts of several tasks, and rows do not say theirs; it is not evaluated"
        )
    if config["peft_type"] in _PROMPTS and config.get("task_type") == "SEQ_CLS" and hasattr(model, "score"):
        raise InputError(
            f"adapter {folder} ({config['peft_type']}) puts virtual tokens before the text of a classifier that reads "
            "the last token, and PEFT gives it no ids by which to find that before padding; use LoRA or prefix tuning"
        )
    if not adapted.active_peft_config.is_prompt_learning and loaded.unexpected_keys:
        strange = min(loaded.unexpected_keys)
        raise InputError(f"adapter {folder} has weights for {strange}, which the model lacks; check --model")
    return adapted
