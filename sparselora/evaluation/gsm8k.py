"""GSM8K exact match of a loaded model: questions with worked examples before them, and answers compared as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pandas as pd

from sparselora.data.conversations import encode_prompts_of, last_question, single_turns, turn_ends
from sparselora.data.instructions import InstructionData, load_instructions
from sparselora.evaluation import losses as ev
from sparselora.models.prompt_template import ChatTemplate, Template

GSM8K = "openai/gsm8k:main"
TEMPLATE = f"{ev.NEXT_QUESTION} {{prompt}}\nAnswer:"
"""Wording of lm-eval's ``gsm8k``: that of a model which was trained with no other."""


@dataclass(frozen=True)
class Questions:
    """The held-out questions as prompts, with their rows and the numbers that answer them.

    Attributes:
        name: of the data.
        rows: their ids.
        prompts: texts; with a chat template the conversations up to the answer.
        gold: the numbers.
        fewshot: worked examples before each.
        template: of the prompts.
    """

    name: str
    rows: list[Any]
    prompts: list[Any]
    gold: list[Decimal]
    fewshot: int
    template: Template

    def for_model(self, tokenizer: Any) -> tuple[list[ev.Prompt], set[int]]:
        """Return the prompts as a generator takes them, and tokens that end an answer in addition to EOS.

        Raises:
            InputError: a chat template that is missing, or refuses a conversation.
        """
        if not isinstance(self.template, ChatTemplate):
            return self.prompts, set()
        return [*encode_prompts_of(tokenizer, self.prompts, self.template)], turn_ends(tokenizer, self.template)


def load_questions(
    dataset: str,
    *,
    eval_file: str | None,
    prompt_field: str,
    completion_field: str,
    samples: int,
    fewshot: int,
    seed: int,
    template: str | None = None,
    chat_template: str | None = None,
    adapter: str | None = None,
) -> Questions:
    """``samples`` held-out questions (0: all), each after ``fewshot`` examples of the training rows.

    Args:
        template, chat_template, adapter: as `sparselora.data.instructions.used_template` takes them; the default is
            `TEMPLATE`.
    Raises:
        InputError: data that cannot be loaded, an answer without a number, too few training rows.
    """
    data = load_instructions(
        dataset,
        eval_file=eval_file,
        prompt_field=prompt_field,
        completion_field=completion_field,
        template=template,
        chat_template=chat_template,
        adapter=adapter,
        default_template=TEMPLATE,
        eval_samples=samples,
    )
    return ask(data, fewshot, seed)


def ask(data: InstructionData, fewshot: int, seed: int) -> Questions:
    """Every held-out row of ``data`` after ``fewshot`` of its training rows.

    A solution follows its question as in training, at once; in `TEMPLATE`, after a space, as in lm-eval; in a
    conversation as a turn of its own, before the last message.

    Raises:
        InputError: an answer without a number, too few training rows.
    """
    rows = data.eval["row"].tolist()
    if isinstance(data.template, ChatTemplate):
        answered = [last_question(messages) for messages in data.eval["messages"]]
        earlier = [last_question(messages) for messages in data.train["messages"]] if fewshot else []
        gold = ev.gold_answers([solution for _, solution in answered])
        pool = pd.DataFrame(
            {
                "prompt": [messages[-1]["content"] for messages, _ in earlier],
                "completion": [text for _, text in earlier],
            }
        )
        shots = ev.worked_examples(pool, [messages[-1]["content"] for messages, _ in answered], fewshot, seed)
        turns = [message for turn in single_turns(*zip(*shots)) for message in turn] if shots else []
        prompts: list[Any] = [[*messages[:-1], *turns, messages[-1]] for messages, _ in answered]
        return Questions(data.name, rows, prompts, gold, fewshot, data.template)
    questions = data.eval["prompt"].tolist()
    gold = ev.gold_answers(data.eval["completion"].tolist())
    shots = ev.worked_examples(data.train, questions, fewshot, seed)
    gap = " " if data.template == TEMPLATE else ""
    prompts = [ev.few_shot_prompt(shots, question, gap) for question in questions]
    return Questions(data.name, rows, prompts, gold, fewshot, data.template)


def answer(questions: Questions, texts: Sequence[str]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Metrics, and a row a question: what ``texts``, its answers, give as a number and whether it is right."""
    predicted = [ev.parse_answer(text) for text in texts]
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
