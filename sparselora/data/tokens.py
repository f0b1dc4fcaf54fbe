"""Texts as token ids, checked for what a model cannot read: ids it has no embedding for, texts without a token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from sparselora.errors import InputError, plain


def encode_fields(
    frame: pd.DataFrame, text_fields: Sequence[str], tokenizer: Any, max_length: int
) -> Mapping[str, list[list[int]]]:
    """Encode the texts (or pairs) of ``frame`` with the tokenizer's special tokens, cut to ``max_length``, not padded.

    Raises:
        InputError: a ``max_length`` that the special tokens fill, a text without a token, tokens beyond the model.
    """
    longest = min(max_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair=len(text_fields) == 2)
    least = special + len(text_fields)
    if longest < least:
        raise InputError(
            f"max_length {longest} leaves no room for the text: {special} positions are special tokens; use at least "
            f"{least}"
        )
    encoded = tokenizer(*(frame[name].tolist() for name in text_fields), truncation=True, max_length=longest)
    ids: list[list[int]] = encoded["input_ids"]
    empty = next((i for i, tokens in enumerate(ids) if not tokens), None)
    if empty is not None:
        raise InputError(
            f"{' and '.join(map(plain, text_fields))} of row {row_id(frame, empty)} has no token for this tokenizer; "
            "remove the row"
        )
    check_ids(tokenizer, ids)
    return dict(encoded)


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, with the tokenizer's own beginning (BOS), once, and without the end that it may add.

    A prompt that begins with BOS itself, as a chat template writes it, gets no second one, and keeps its own end.

    Raises:
        InputError: tokens beyond the model.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = text_ids(tokenizer, prompts, special=True)
    doubtful = [i for i, tokens in enumerate(ids) if _leading(tokens, bos) > 1 or _leading(tokens[::-1], eos) > 0]
    as_written = text_ids(tokenizer, [prompts[i] for i in doubtful], special=False)
    for i, written in zip(doubtful, as_written):
        begin = max(0, _leading(ids[i], bos) - max(1, _leading(written, bos)))
        end = _leading(ids[i][::-1], eos) - _leading(written[::-1], eos)
        ids[i] = ids[i][begin : len(ids[i]) - max(0, end)]
    return ids


def encode_completions(tokenizer: Any, completions: Sequence[str]) -> list[list[int]]:
    """Token ids of completions, each with one end of sequence (EOS): its own, where the text has it at its end.

    Raises:
        InputError: tokens beyond the model.
    """
    eos = tokenizer.eos_token_id
    ids = text_ids(tokenizer, completions, special=False)
    for text, tokens in zip(completions, ids):
        # A chat template may write white space behind it.
        ended = tokens[-1:] == [eos] or (text.rstrip().endswith(tokenizer.eos_token) and eos in tokens)
        if tokens and not ended:
            tokens.append(eos)
    return ids


def text_ids(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's special tokens if ``special``.

    Raises:
        InputError: tokens beyond the model.
    """
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
    )
    ids = [list(tokens) for tokens in encoded["input_ids"]]
    check_ids(tokenizer, ids)
    return ids


def check_ids(tokenizer: Any, ids: Iterable[Sequence[int]]) -> None:
    """Raise where a token, or the padding, is beyond ``tokenizer.embedding_rows``, the rows of the model's embedding.

    Tokenizers that were not loaded together with a model are not checked.

    Raises:
        InputError: a token that the model has no embedding for.
    """
    rows = getattr(tokenizer, "embedding_rows", None)
    if rows is None:
        return
    largest = max((max(tokens) for tokens in ids if tokens), default=-1)
    largest = max(largest, -1 if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    if largest >= rows:
        token = plain(str(tokenizer.convert_ids_to_tokens(largest)))
        raise InputError(
            f"the tokenizer gives token {largest} ({token}), the model has embeddings for 0 to {rows - 1}: they do not "
            "belong together; use the model's own tokenizer, or resize its embeddings"
        )


def row_id(frame: pd.DataFrame, i: int) -> Any:
    """Id of the row at position ``i``, for messages: its column ``row``, or the position."""
    return frame["row"].iloc[i] if "row" in frame else i


def _leading(tokens: Sequence[int], token: int | None) -> int:
    """Count of ``token`` at the beginning of ``tokens``."""
    return next((i for i, other in enumerate(tokens) if other != token), len(tokens)) if token is not None else 0
