"""Instruction data for causal language models: prompts with their completions, as token ids and labels.

Labels stand on the completion alone. The prompt is cut at its beginning and the completion at its end, so that no
example is left without a label, however long its prompt.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.data import FILE_KINDS, read_table
from sparselora.errors import InputError, suggest

IGNORED = -100
"""The label of a position whose token is not learned."""

FIELDS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("instruction", "answer"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
)
"""Names tried, in this order, where the data has no fields ``prompt`` and ``completion``."""

DEFAULT_TEMPLATE = "{prompt}\n"

_HELD_OUT_EVERY = 5
_EVAL_SUBSET_SEED = 0


@dataclass(frozen=True)
class InstructionData:
    """``train`` and ``eval`` frames with the columns ``row`` (id in the source), ``prompt`` (template applied) and
    ``completion``; ``fields`` are the two columns of the source that they come from."""

    name: str
    train: pd.DataFrame
    eval: pd.DataFrame
    fields: tuple[str, str]


def load_instructions(
    dataset: str,
    *,
    eval_file: str | None = None,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    template: str | None = None,
    train_split: str = "train",
    train_samples: int = 0,
    eval_samples: int = 0,
    seed: int = 0,
) -> InstructionData:
    """Load ``dataset`` and take ``train_samples`` and ``eval_samples`` rows of it (0: all).

    The training subset is drawn by ``seed``; the evaluation subset is the same for every seed. Without an evaluation
    file (or, on the hub, a split ``validation`` or ``test``) every fifth row is held out.

    Args:
        dataset: a json, jsonl, parquet, csv or tsv file (``.gz`` too), or a data set of the hub, ``owner/name`` or
            ``owner/name:configuration``.
        train_split: split to train on, of a data set of the hub.
        prompt_field, completion_field: columns; where the data lacks ``prompt`` and ``completion``, `FIELDS` are tried.
            With prompt field ``instruction``, a text in a column ``input`` is put after it.
        template: the text before the completion, with ``{prompt}`` in it; other columns may stand in braces too.
    Raises:
        InputError: a missing file, hub, column or text, an empty completion, a template that names no column.
    """
    if dataset.removesuffix(".gz").endswith(FILE_KINDS):
        name, raw = _from_files(dataset, eval_file)
    elif eval_file is not None:
        raise InputError(f"eval_file goes with a local training file; dataset {dataset!r} has its own evaluation rows")
    else:
        name, raw = _from_hub(dataset, train_split)
    fields = _resolve_fields(next(iter(raw.values())), name, prompt_field, completion_field)
    frames = [_with_template(frame, source, fields, template) for source, frame in raw.items()]
    return InstructionData(
        name,
        _drawn(frames[0], train_samples, seed),
        _drawn(frames[1], eval_samples, _EVAL_SUBSET_SEED),
        fields,
    )


def _drawn(frame: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """``count`` rows drawn by ``seed``, in their order; all of them for 0."""
    if count == 0 or count >= len(frame):
        return frame.reset_index(drop=True)
    index = np.random.default_rng(seed).permutation(len(frame))[:count]
    return frame.iloc[np.sort(index)].reset_index(drop=True)


def _from_files(path: str, eval_path: str | None) -> tuple[str, dict[str, pd.DataFrame]]:
    table = read_table(Path(path))
    name = Path(path).name.removesuffix(".gz").rpartition(".")[0]
    if eval_path is not None:
        return name, {path: table, f"{eval_path} (evaluation)": read_table(Path(eval_path))}
    return name, _hold_out(table, path)


def _hold_out(table: pd.DataFrame, source: str) -> dict[str, pd.DataFrame]:
    held = np.arange(len(table)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    if not held.any():
        raise InputError(
            f"{source} has {len(table)} rows, too few to hold out every fifth; give more, or an --eval_file"
        )
    return {source: table[~held], f"the held-out rows of {source}": table[held]}


def _from_hub(dataset: str, train_split: str) -> tuple[str, dict[str, pd.DataFrame]]:
    import datasets

    path, _, configuration = dataset.partition(":")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one clear line, not a line for every retry
    try:
        loaded = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # the hub client raises a dozen kinds, all of them "not to be had"
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"dataset {dataset!r} is no file that ends in {', '.join(FILE_KINDS)} (.gz too), and could not be loaded "
            f"from the hub ({reason}); check the path, or go online once (owner/name or owner/name:configuration)"
        ) from None
    if train_split not in loaded:
        raise InputError(f"dataset {dataset!r} has no split {train_split!r}; it has: {', '.join(loaded)}")
    name = path.rpartition("/")[2]
    train = loaded[train_split].to_pandas()
    for split in ("validation", "test"):
        if split in loaded and split != train_split:
            return name, {dataset: train, f"{dataset} ({split})": loaded[split].to_pandas()}
    return name, _hold_out(train, dataset)


# --- fields and template ------------------------------------------------------------------------------------------


def _resolve_fields(table: pd.DataFrame, name: str, prompt_field: str, completion_field: str) -> tuple[str, str]:
    """The two columns: as named, or, for a name that was left at its default, the first of `FIELDS` that is there."""
    columns = [str(column) for column in table.columns]
    for given, default in ((prompt_field, "prompt"), (completion_field, "completion")):
        if given not in columns and given != default:
            raise InputError(
                f"{name} has no field {given!r}{suggest(given, columns)}; its fields are {', '.join(columns)}"
            )
    if prompt_field in columns and completion_field in columns:
        return prompt_field, completion_field
    for prompt, completion in FIELDS:
        if prompt_field not in ("prompt", prompt) or completion_field not in ("completion", completion):
            continue  # the one that was named stays
        if prompt in columns and completion in columns:
            return prompt, completion
    raise InputError(
        f"{name} has no prompt and completion of a usual name; its fields are {', '.join(columns)}: "
        "name two by --prompt_field and --completion_field"
    )


def _with_template(table: pd.DataFrame, source: str, fields: tuple[str, str], template: str | None) -> pd.DataFrame:
    text = DEFAULT_TEMPLATE if template is None else template
    others = _placeholders(text, table, source) - {"prompt"}
    for column in (*fields, *sorted(others)):
        if column not in table.columns:
            raise InputError(f"{source} has no field {column!r}; its fields are {', '.join(map(str, table.columns))}")
        missing = table.index[table[column].isna()]
        if len(missing):
            raise InputError(
                f"{source} has {len(missing)} rows without {column!r}, the first is row {missing[0]}; remove them"
            )
    completions = table[fields[1]].astype(str)
    empty = table.index[completions.str.strip() == ""]
    if len(empty):
        raise InputError(
            f"{source} has {len(empty)} rows with an empty {fields[1]!r}, the first is row {empty[0]}; remove them"
        )
    rows = table[list(others)].to_dict("records") if others else [{}] * len(table)
    prompts = [
        text.format_map({**row, "prompt": prompt}) for row, prompt in zip(rows, _prompts(table, fields[0], others))
    ]
    return pd.DataFrame({"row": table.index.to_numpy(), "prompt": prompts, "completion": completions.to_list()})


def _prompts(table: pd.DataFrame, field: str, used: set[str]) -> list[str]:
    """The prompts; an Alpaca ``input`` follows its ``instruction`` on a line of its own, unless the template has it."""
    prompts = table[field].astype(str).tolist()
    if field != "instruction" or "input" not in table.columns or "input" in used:
        return prompts
    inputs = table["input"].fillna("").astype(str)
    return [f"{prompt}\n{extra}" if extra.strip() else prompt for prompt, extra in zip(prompts, inputs)]


def _placeholders(template: str, table: pd.DataFrame, source: str) -> set[str]:
    """Names in braces; every one is a column or ``prompt``."""
    known = {"prompt", *map(str, table.columns)}
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template)]
    except ValueError as error:
        raise InputError(f"template {template!r} is no template ({error}); write {{{{ for a brace") from None
    names = {name for name, _, _ in parts if name is not None}
    if "prompt" not in names:
        raise InputError(f"template must have {{prompt}} in it, got {template!r}")
    for name, spec, conversion in parts:
        if name is not None and (name not in known or spec or conversion):
            raise InputError(
                f"template has {{{name}}}, which is no field of {source}{suggest(name, known)}; "
                f"its fields are {', '.join(sorted(known))}; write {{{{ for a brace"
            )
    return names


# --- tokens -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedInstructions:
    """Examples ``{"input_ids", "labels"}`` in the order of the frame, and how many were too long and cut."""

    examples: list[dict[str, list[int]]]
    cut: int


def encode_instructions(frame: pd.DataFrame, tokenizer: Any, max_length: int) -> EncodedInstructions:
    """Token ids and labels of ``frame`` (columns ``prompt``, ``completion``): at most ``max_length``, not padded.

    Prompt and completion are tokenised apart, as generation will see them; the tokenizer's own beginning (BOS) is kept,
    and EOS follows a completion that was not cut. What is too long loses the beginning of its prompt, but never more
    of it than down to half of ``max_length``; the rest is cut from the end of the completion. The first position
    carries no label: nothing predicts it.

    Raises:
        InputError: ``max_length`` below 2, a tokenizer without EOS.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the model's tokenizer has no end-of-sequence token, so a completion would not end")
    longest = min(max_length, tokenizer.model_max_length)
    if longest < 2:
        raise InputError(f"max_length must be at least 2 (a prompt token and a label), got {longest}")
    prompts = _token_ids(tokenizer, frame["prompt"].tolist(), special=True)
    completions = _token_ids(tokenizer, frame["completion"].tolist(), special=False)
    examples, cut = [], 0
    for prompt, completion in zip(prompts, completions):
        if prompt and prompt[-1] == eos:  # some tokenizers end every text themselves
            prompt = prompt[:-1]
        whole = [*completion, eos]
        cut += len(prompt) + len(whole) > longest
        examples.append(_join(prompt, whole, longest, tokenizer.bos_token_id))
    return EncodedInstructions(examples, cut)


def _token_ids(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded: Mapping[str, Any] = tokenizer(
        list(texts), add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _join(prompt: list[int], completion: list[int], longest: int, bos: int | None) -> dict[str, list[int]]:
    room = min(len(prompt), max(longest - len(completion), longest // 2))
    if room < len(prompt):
        begin = prompt[:1] if prompt[0] == bos and room > 1 else []
        prompt = begin + prompt[len(prompt) - room + len(begin) :]
    completion = completion[: longest - room]
    labels = [IGNORED] * len(prompt) + completion
    labels[0] = IGNORED
    return {"input_ids": prompt + completion, "labels": labels}
