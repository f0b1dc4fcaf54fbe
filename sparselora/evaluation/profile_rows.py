"""Rows that a profile is made on, drawn by its seed, and the same rows with other prompts."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sparselora.data.conversations import encode_prompts_of
from sparselora.data.load import Data, encode_rows, load_data
from sparselora.data.tokens import encode_prompts
from sparselora.errors import InputError
from sparselora.evaluation.adapted_model import AdaptedModel
from sparselora.evaluation.layer_passes import RowBatch
from sparselora.evaluation.profile_request import ProfileRequest
from sparselora.evaluation.row_batches import Batch, disjoint_rows, example_batches
from sparselora.models.labels import IGNORED
from sparselora.models.prompt_template import ChatTemplate

Example = dict[str, Any]


@dataclass(frozen=True)
class ProfileRows:
    """Frames of the rows of a run, as `sparselora.data.instructions.InstructionData` has them.

    Attributes:
        data: where they come from.
        measured: held-out rows to measure on.
        further: as many others, which check the whole schedules.
        calibration: training rows.
    """

    data: Data
    measured: pd.DataFrame
    further: pd.DataFrame
    calibration: pd.DataFrame

    @classmethod
    def draw(cls, request: ProfileRequest) -> ProfileRows:
        """Draw the rows by the run's seed.

        Raises:
            InputError: data that cannot be read, or too few rows.
        """
        data, seed, n_calibrated = load_data(request.config), request.config.seed, request.base.calibration_samples
        for kind, frame, count in (("held-out", data.eval, 2 * request.rows), ("training", data.train, n_calibrated)):
            if len(frame) < count:
                raise InputError(
                    f"{data.name} has {len(frame)} {kind} rows, and {count} are needed (--rows {request.rows} to "
                    f"measure on and as many to check on, --calibration_rows {n_calibrated}); ask for fewer"
                )
        measured, further = disjoint_rows(len(data.eval), [request.rows, request.rows], seed)
        (calibration,) = disjoint_rows(len(data.train), [n_calibrated], seed)
        return cls(data, data.eval.iloc[measured], data.eval.iloc[further], data.train.iloc[calibration])


class RowEncoder:
    """Rows of one run as batches on the device of the model that is profiled."""

    def __init__(self, request: ProfileRequest, data: Data, adapted: AdaptedModel) -> None:
        self._config, self._data, self._adapted = request.config, data, adapted

    def examples(self, frame: pd.DataFrame) -> list[Example]:
        """Return rows as token ids and labels, the shortest first, so that little is padded."""
        examples = encode_rows(frame, self._data, self._adapted.tokenizer, self._config)
        return sorted(examples, key=lambda example: len(example["input_ids"]))

    def tensors(self, examples: Sequence[Example]) -> list[Batch]:
        """Return ``input_ids``, ``attention_mask`` and ``labels (batch, length)`` of ``examples``, in their order."""
        return example_batches(examples, self._adapted, self._config)

    def batches(self, examples: Sequence[Example]) -> list[RowBatch]:
        return [RowBatch.build(batch, self._adapted.device) for batch in self.tensors(examples)]

    def empty_prompt(self) -> list[int]:
        """Return the tokens of the template without a prompt, at least one."""
        template, tokenizer = self._data.template, self._adapted.tokenizer
        if isinstance(template, ChatTemplate):
            return encode_prompts_of(tokenizer, [[{"role": "user", "content": ""}]], template)[0]
        literals = [literal for literal, *_ in string.Formatter().parse(template)]
        return encode_prompts(tokenizer, ["".join(literals) or "\n"])[0]


def with_other_prompts(examples: Sequence[Example], empty_prompt: list[int]) -> dict[str, list[Example]]:
    """Return the examples with the prompt of another row (``shuffled``), and with ``empty_prompt`` (``empty``).

    Prompt tokens are those before the first label; labels stay the same.
    """
    firsts = [next(i for i, label in enumerate(example["labels"]) if label != IGNORED) for example in examples]
    prompts = [example["input_ids"][:first] for example, first in zip(examples, firsts)]

    def joined(others: Sequence[list[int]]) -> list[Example]:
        return [
            {
                "input_ids": prompt + example["input_ids"][first:],
                "labels": [IGNORED] * len(prompt) + example["labels"][first:],
            }
            for prompt, example, first in zip(others, examples, firsts, strict=True)
        ]

    return {"shuffled": joined([*prompts[-1:], *prompts[:-1]]), "empty": joined([empty_prompt] * len(examples))}


def check_context(name: str, batches: Sequence[RowBatch]) -> None:
    """Raise where rows have no context: the last token of a row, which predicts nothing, is none."""
    refuse_without_context(name, sum(batch.layout.n_context - batch.layout.batch for batch in batches))


def refuse_without_context(name: str, context_tokens: int) -> None:
    """Raise where the rows of ``name`` have no tokens of context, the last token of each row left out."""
    if context_tokens <= 0:
        raise InputError(
            f"the rows of {name} have no context: every token but the last predicts a label, so there is nothing that "
            "could be sparse; give data with prompts (--prompt_field), whose completions alone are labelled"
        )
