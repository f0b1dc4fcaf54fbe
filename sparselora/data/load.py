"""The data of a training run: what its configuration names, as frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.models.prompt_template import DEFAULT_TEMPLATE, Template

if TYPE_CHECKING:
    from sparselora.data.instructions import StreamedInstructions


@dataclass(frozen=True)
class Data:
    """Frames for training and evaluation with a column ``row``; text fields and classes of a classification, the
    template of prompts with completions or of conversations. Of rows that are streamed, ``train`` has the first few,
    and ``streamed`` all."""

    name: str
    train: pd.DataFrame
    eval: pd.DataFrame
    text_fields: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    template: Template = DEFAULT_TEMPLATE
    streamed: StreamedInstructions | None = None


def load_data(config: TrainConfig, adapter: str | None = None, *, streams: bool = False) -> Data:
    """Load the rows that ``config`` names, its samples of them drawn by its seed.

    Classes have the ids that ``adapter``, which is used as it is, records; without one, those of the model, if the data
    have the same. Prompts have the template that `used_template` gives.

    Args:
        streams: the caller takes training rows from `Data.streamed`, where the configuration says so.
    Raises:
        InputError: data that cannot be read or lacks a column; streaming, where the caller does not.
    """
    assert config.dataset is not None
    if config.streaming and not streams:
        raise InputError("streaming is for train, which reads its rows one after the other; leave it out")
    samples: dict[str, Any] = {
        "train_samples": config.train_samples, "eval_samples": config.eval_samples, "seed": config.seed,
    }  # fmt: skip
    if config.task == "causal_lm":
        # Imported here and below, for the libraries behind them take seconds.
        from sparselora.data.instructions import load_instructions

        instructions = load_instructions(
            config.dataset,
            eval_file=config.eval_file,
            prompt_field=config.prompt_field,
            completion_field=config.completion_field,
            template=config.template,
            chat_template=config.chat_template,
            adapter=adapter,
            train_split=config.train_split,
            streaming=config.streaming,
            **samples,
        )
        return Data(
            instructions.name,
            instructions.train,
            instructions.eval,
            template=instructions.template,
            streamed=instructions.streamed,
        )
    from sparselora.data.texts import load_text_data
    from sparselora.models.class_names import read_classes

    assert config.model is not None
    texts = load_text_data(
        config.dataset,
        text_fields=config.text_fields,
        label_field=config.label_field,
        eval_file=config.eval_file,
        classes=read_classes(config.model, adapter, is_fixed=adapter is not None),
        **samples,
    )
    return Data(texts.name, texts.train, texts.eval, texts.text_fields, texts.labels)


def encode_rows(frame: pd.DataFrame, data: Data, tokenizer: Any, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the rows of ``frame``, which are of ``data``, as token ids with labels, by the task of ``config``; cut to
    its ``max_length``.

    Raises:
        InputError: rows that the tokenizer cannot encode.
    """
    if not len(frame):
        return []
    if config.task == "causal_lm":
        from sparselora.data.instructions import encode_instructions

        return list(encode_instructions(frame, tokenizer, config.max_length, data.template).examples)
    from sparselora.data.batches import encode_texts

    return encode_texts(frame, data.text_fields, tokenizer, config.max_length)
