"""GSM8K exact match of a loaded model: questions with worked examples before them, and answers compared as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pandas as pd

from sparselora.data.instructions import InstructionData, load_instructions
from sparselora.evaluation import losses as ev

GSM8K = "openai/gsm8k:main"
TEMPLATE = f"{ev.NEXT_QUESTION} {{prompt}}\nAnswer:"
"""Wording of lm-eval's ``gsm8k``: that of a model which was trained with no other."""


@dataclass(frozen=True)
class Questions:
    """The held-out questions as prompts, with their rows and the numbers that answer them."""

    name: str
    rows: list[Any]
    prompts: list[str]
    gold: list[Decimal]
    fewshot: int


def load_questions(
    dataset: str,
    *,
    eval_file: str | None,
    prompt_field: str,
    completion_field: str,
    template: str,
    samples: int,
    fewshot: int,
    seed: int,
) -> Questions:
    """``samples`` held-out questions (0: all) in ``template``, each after ``fewshot`` examples of the training rows.

    Raises:
        InputError: data that cannot be loaded, an answer without a number, too few training rows.
    """
    data = load_instructions(
        dataset,
        eval_file=eval_file,
        prompt_field=prompt_field,
        completion_field=completion_field,
        template=template,
        eval_samples=samples,
    )
    return ask(data, template, fewshot, seed)


def ask(data: InstructionData, template: str, fewshot: int, seed: int) -> Questions:
    """Every held-out row of ``data``, whose prompts have ``template``, after ``fewshot`` of its training rows.

    A solution follows its question as in training, at once; in `TEMPLATE`, after a space, as in lm-eval.

    Raises:
        InputError: an answer without a number, too few training rows.
    """
    questions = data.eval["prompt"].tolist()
    gold = ev.gold_answers(data.eval["completion"].tolist())
    shots = ev.worked_examples(data.train, questions, fewshot, seed)
    gap = " " if template == TEMPLATE else ""
    prompts = [ev.few_shot_prompt(shots, question, gap) for question in questions]
    return Questions(data.name, data.eval["row"].tolist(), prompts, gold, fewshot)


def answer(questions: Questions, generate: ev.Generate) -> tuple[dict[str, Any], pd.DataFrame]:
    """Metrics, and a row a question: what ``generate`` answered and whether it is right."""
    predicted = [ev.parse_answer(text) for text in generate(questions.prompts)]
    correct = ev.exact_match(predicted, questions.gold)
    rate, low, high = ev.share(correct)
    metrics = {
        "exact_match": rate, "ci_low": low, "ci_high": high, "correct": int(correct.sum()),
        "answered": sum(value is not None for value in predicted), "fewshot": questions.fewshot,
    }  # fmt: skip
    items = pd.DataFrame({
        "row": questions.rows, "gold": [ev.plain_number(value) for value in questions.gold],
        "predicted": [ev.plain_number(value) for value in predicted], "correct": correct.astype(int),
    })  # fmt: skip
    return metrics, items
