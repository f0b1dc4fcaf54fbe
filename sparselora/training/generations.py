"""Answers to held-out prompts at each evaluation of a language model, as a table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pandas as pd
from transformers import TrainerCallback, TrainingArguments

from sparselora.data.batches import Example
from sparselora.evaluation.losses import generate_tokens
from sparselora.models.labels import IGNORED
from sparselora.models.load import evaluating

MAX_NEW_TOKENS = 64
"""Most tokens of an answer: enough to read how a model writes, and little next to an evaluation."""

COLUMNS = ("step", "row", "prompt", "completion", "generated")


class Generations(TrainerCallback):
    """Answers the first prompts at each evaluation, greedily, by the dense model.

    Attributes:
        examples: token ids and labels; an answer is the last run of labels, a prompt all that stands before it.
        rows: id of each example in its source.
        table: one row a step and example, with `COLUMNS`.

    Args:
        ends: tokens that end an answer, in addition to EOS.
        on_change: called with the table when it has grown.
    """

    def __init__(
        self, examples: Sequence[Example], rows: Sequence[Any], tokenizer: Any, batch_size: int,
        ends: Collection[int],
        on_change: Callable[[pd.DataFrame], object],
    ) -> None:  # fmt: skip
        self.examples = examples
        self.rows = rows
        self.table = pd.DataFrame(columns=list(COLUMNS))
        self._tokenizer, self._batch_size, self._ends, self._on_change = tokenizer, batch_size, ends, on_change

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.answer(model, state.global_step)

    def answer(self, model: Any, step: int) -> None:
        """Generate, and put the answers on record in place of those of the same step."""
        decode, limit = self._tokenizer.decode, self._tokenizer.model_max_length
        spans = [last_labels(example["labels"]) for example in self.examples]
        prompts = [example["input_ids"][: span.start] for example, span in zip(self.examples, spans)]
        answers: list[str] = []
        with evaluating(model):
            for start in range(0, len(prompts), self._batch_size):
                part = prompts[start : start + self._batch_size]
                room = min(MAX_NEW_TOKENS, limit - max(map(len, part)))
                answers += (
                    generate_tokens(model, self._tokenizer, part, room, self._ends) if room > 0 else [""] * len(part)
                )
        added = pd.DataFrame(
            [
                (
                    step,
                    row,
                    decode(prompt),
                    decode(example["input_ids"][span], skip_special_tokens=True),
                    answer,
                )
                for row, example, span, prompt, answer in zip(self.rows, self.examples, spans, prompts, answers)
            ],
            columns=list(COLUMNS),
        )
        earlier = self.table[self.table["step"] != step]
        self.table = pd.concat([earlier, added], ignore_index=True) if len(earlier) else added
        self._on_change(self.table)

    def restore(self, table: pd.DataFrame, step: int) -> None:
        """Take over the rows up to ``step`` of an interrupted run."""
        self.table = table[table["step"] <= step].reset_index(drop=True)


def last_labels(labels: Sequence[int]) -> slice:
    """Return the places of the last run of labels: of a conversation the assistant's last turn, which ``eval`` asks for
    too."""
    stop = max(i for i, label in enumerate(labels) if label != IGNORED) + 1
    start = max((i + 1 for i, label in enumerate(labels[:stop]) if label == IGNORED), default=0)
    return slice(start, stop)
