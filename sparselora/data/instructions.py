"""Instruction data for causal language models: prompts with their completions, or conversations, as ids and labels.

Labels stand on completions alone. The prompt is cut at its beginning and the completion at its end, so that no
example is left without a label, however long its prompt.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparselora.data.batches import PLANTED
from sparselora.data.conversations import conversation_field, encode_conversations, read_conversations, single_turns
from sparselora.data.hub import load_from_hub, split_table
from sparselora.data.streamed import StreamedExamples, StreamedRows
from sparselora.data.table_files import FILE_KINDS, is_table, read_table, table_name
from sparselora.data.tables import EVAL_SUBSET_SEED, Table, draw_rows
from sparselora.data.tokens import encode_completions, encode_prompts, row_id
from sparselora.errors import InputError, counted, few, plain, shown, suggest
from sparselora.models.labels import IGNORED
from sparselora.models.prompt_template import DEFAULT_TEMPLATE, ChatTemplate, Template, recorded_template
from sparselora.runs.process import complain, process_rank

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


def used_template(
    template: str | None,
    adapter: str | None = None,
    default: str = DEFAULT_TEMPLATE,
    *,
    chat_template: str | None = None,
    conversations: str | None = None,
) -> Template:
    """Return the text around each prompt, in training and evaluation alike: nothing else decides it.

    It is ``template`` or ``chat_template``; where neither is given, the one that the adapter in the folder ``adapter``
    was trained with; without a record, ``default``, or for conversations the chat template of the model's tokenizer. A
    template other than the recorded one is taken, with a warning on stderr.

    Args:
        adapter: folder of an adapter, or of a model that one was merged into.
        conversations: name of the data, where they are conversations, which have no other than a chat template.
    Raises:
        InputError: a record that is damaged; a template other than a chat template for conversations.
    """
    recorded = None if adapter is None else recorded_template(Path(adapter))
    if conversations is not None and template is not None:
        raise InputError(
            f"template is for prompts with completions, and {conversations} holds conversations, which a chat template "
            "renders; leave template out (chat_template gives another than the tokenizer's)"
        )
    used: Template | None = template if chat_template is None else ChatTemplate(chat_template)
    if used is None and recorded is not None and (conversations is None or isinstance(recorded, ChatTemplate)):
        return recorded
    used = used or (default if conversations is None else ChatTemplate())
    if recorded not in (None, used) and process_rank() == 0:
        complain(
            f"WARNING: {_shown(used)} is not {_shown(recorded)}, which the adapter was trained with; leave it out for "
            "the same prompts"
        )
    return used


def _shown(template: Template | None) -> str:
    if isinstance(template, ChatTemplate):
        return "the tokenizer's chat template" if template.jinja is None else f"chat_template {shown(template.jinja)}"
    return f"template {template!r}"


@dataclass(frozen=True)
class InstructionData:
    """Rows to train on and to evaluate, and the text around their prompts.

    Attributes:
        name: of the data.
        train, eval: frames with the columns ``row`` (id in the source), ``prompt`` (template applied) and
            ``completion``; with a chat template ``row`` and ``messages``, the conversation. ``planted`` where the
            source has it.
        fields: the two columns of the source that they come from, or the one of conversations.
        template: what `used_template` says.
        streamed: all rows to train on, where ``train`` has the first few only.
    """

    name: str
    train: pd.DataFrame
    eval: pd.DataFrame
    fields: tuple[str, ...]
    template: Template
    streamed: StreamedInstructions | None = None


_STREAMED_HEAD = 64
"""Rows of a streamed file that are looked at for its fields, and tokenised before the training begins."""


def load_instructions(
    dataset: str,
    *,
    eval_file: str | None = None,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    template: str | None = None,
    chat_template: str | None = None,
    adapter: str | None = None,
    default_template: str = DEFAULT_TEMPLATE,
    train_split: str = "train",
    streaming: bool = False,
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
        streaming: read training rows of a jsonl file when they are asked for; needs ``eval_file``.
        prompt_field, completion_field: columns; where the data lacks ``prompt`` and ``completion``, `FIELDS` are tried.
            With prompt field ``instruction``, a text in a column ``input`` is put after it. A prompt field that holds
            conversations is the only one that is read; where there are no usual names, `conversation_field` looks for
            such a column.
        template: the text before the completion, with ``{prompt}`` in it; other columns may stand in braces too.
        chat_template: Jinja text that renders conversations, and prompts with completions as those of two turns.
        adapter, default_template: as `used_template` takes them.
    Raises:
        InputError: a missing file, hub, column or text, a cell that is no text, an empty completion, the same column
            twice, a template that names no column, messages without role or text.
    """
    if prompt_field == completion_field:
        raise InputError(f"prompt_field and completion_field are both {prompt_field!r}; name two different fields")
    rows = None
    if streaming:
        rows = StreamedRows.of(dataset)
        assert eval_file is not None
        name = table_name(dataset)
        tables = (rows.table(0, _STREAMED_HEAD), read_table(eval_file, f"{eval_file} (evaluation)"))
    elif is_table(dataset):
        name, tables = _from_files(dataset, eval_file)
    elif eval_file is not None:
        raise InputError(f"eval_file goes with a local training file; dataset {dataset!r} has its own evaluation rows")
    else:
        name, tables = _from_hub(dataset, train_split)
    fields = _resolve_fields(tables[0], name, prompt_field, completion_field)
    used = used_template(
        template, adapter, default_template, chat_template=chat_template,
        conversations=name if len(fields) == 1 else None,
    )  # fmt: skip
    frames = [_frame(table, fields, used) for table in tables]
    streamed = None
    if rows is not None:
        streamed = StreamedInstructions(rows.drawn(train_samples, seed), fields, used, tuple(tables[0].columns))
        train_samples = 0
    return InstructionData(
        name,
        draw_rows(frames[0], train_samples, seed),
        draw_rows(frames[1], eval_samples, EVAL_SUBSET_SEED),
        fields,
        used,
        streamed,
    )


@dataclass(frozen=True)
class StreamedInstructions:
    """Training rows of a file that are not in memory, and how a row becomes a prompt with its completion.

    Attributes:
        columns: those of the file; a row without one has an empty cell there, as in a table of the whole file.
    """

    rows: StreamedRows
    fields: tuple[str, ...]
    template: Template
    columns: tuple[str, ...]

    def examples(self, tokenizer: Any, max_length: int) -> StreamedExamples:
        """Return the examples, each encoded when it is asked for; the first ones now, to refuse what cannot work."""
        streamed = StreamedExamples(
            self.rows,
            lambda table: _frame(table.with_columns(self.columns), self.fields, self.template),
            lambda frame: encode_instructions(frame, tokenizer, max_length, self.template).examples,
        )
        streamed[:_STREAMED_HEAD]
        return streamed


def _from_files(path: str, eval_path: str | None) -> tuple[str, tuple[Table, Table]]:
    table = read_table(path)
    if eval_path is None:
        return table_name(path), table.held_out()
    return table_name(path), (table, read_table(eval_path, f"{eval_path} (evaluation)"))


def _from_hub(dataset: str, train_split: str) -> tuple[str, tuple[Table, Table]]:
    path, _, configuration = dataset.partition(":")
    loaded = load_from_hub(
        path,
        configuration or None,
        f"dataset {dataset!r} is no file that ends in {', '.join(FILE_KINDS)} (.gz too), and",
        "check the path, or go online once (owner/name or owner/name:configuration)",
    )
    if train_split not in loaded:
        raise InputError(f"dataset {dataset!r} has no split {train_split!r}; it has: {', '.join(loaded)}")
    name = path.rpartition("/")[2]
    train = split_table(loaded, train_split, dataset)
    for split in ("validation", "test"):
        if split in loaded and split != train_split:
            return name, (train, split_table(loaded, split, f"{dataset} ({split})"))
    return name, train.held_out()


# --- fields and template ------------------------------------------------------------------------------------------


def _resolve_fields(table: Table, name: str, prompt_field: str, completion_field: str) -> tuple[str, ...]:
    """The two columns: as named, or, for a name that was left at its default, the first of `FIELDS` that is there.

    The one column of conversations, where it is named, or where there are no two others.
    """
    columns = list(table.columns)
    is_alone = prompt_field != "prompt" and completion_field == "completion" and "completion" not in columns
    if is_alone and (chats := conversation_field(table, prompt_field)) is not None:
        return (chats,)
    for field, default in ((prompt_field, "prompt"), (completion_field, "completion")):
        if field not in columns and field != default:
            raise InputError(f"{name} has no field {field!r}{suggest(field, columns)}; its fields are {few(columns)}")
    if prompt_field in columns and completion_field in columns:
        return prompt_field, completion_field
    for prompt, completion in FIELDS:
        if prompt_field not in ("prompt", prompt) or completion_field not in ("completion", completion):
            continue  # the one that was named stays
        if prompt in columns and completion in columns:
            return prompt, completion
    if prompt_field == "prompt" and (chats := conversation_field(table, prompt_field)) is not None:
        return (chats,)
    raise InputError(
        f"{name} has no prompt and completion of a usual name, nor messages or conversations; its fields are "
        f"{few(columns)}: name two by --prompt_field and --completion_field"
    )


def _frame(table: Table, fields: tuple[str, ...], template: Template) -> pd.DataFrame:
    frame = _rendered(table, fields, template)
    if PLANTED in table.columns:
        frame[PLANTED] = _marks(table)
    return frame


def _marks(table: Table) -> list[int]:
    """Return the marks of planted near-duplicates, 0 or 1 a row."""
    marks = table.texts(PLANTED)
    for i, mark in enumerate(marks):
        if mark not in ("0", "1"):
            raise InputError(
                f"{table.where(PLANTED, i)} is {shown(mark)}; the column marks planted near-duplicates by 1 and other "
                "rows by 0: rename it if it means something else"
            )
    return [int(mark) for mark in marks]


def _rendered(table: Table, fields: tuple[str, ...], template: Template) -> pd.DataFrame:
    if isinstance(template, str):
        return _with_template(table, fields, template)
    if len(fields) == 1:
        conversations = read_conversations(table, fields[0])
    else:
        frame = _with_template(table, fields, "{prompt}")
        conversations = single_turns(frame["prompt"].tolist(), frame["completion"].tolist())
    messages = np.empty(len(table), dtype=object)  # lists of one length would become an array of two dimensions
    messages[:] = conversations
    return pd.DataFrame({"row": table.rows, "messages": messages})


def _with_template(table: Table, fields: tuple[str, ...], template: str) -> pd.DataFrame:
    parts = _template_parts(template, table)
    others = sorted({name for _, name in parts if name is not None} - {"prompt"})
    columns = {"prompt": _prompts(table, fields[0], others)} | {name: table.texts(name) for name in others}
    completions = table.texts(fields[1])
    empty = [i for i, completion in enumerate(completions) if not completion.strip()]
    if empty:
        raise InputError(
            f"{table.source} has {counted(len(empty), 'row')} with an empty {fields[1]!r}, the first is row "
            f"{table.rows[empty[0]]}; remove them"
        )
    prompts = [
        "".join(literal + (columns[name][i] if name is not None else "") for literal, name in parts)
        for i in range(len(table))
    ]
    return pd.DataFrame({"row": table.rows, "prompt": prompts, "completion": completions})


def _prompts(table: Table, field: str, used: Sequence[str]) -> list[str]:
    """The prompts; an Alpaca ``input`` follows its ``instruction`` on a line of its own, unless the template has it."""
    prompts = table.texts(field)
    if field != "instruction" or "input" not in table.columns or "input" in used:
        return prompts
    inputs = table.texts_or_empty("input")
    return [f"{prompt}\n{extra}" if extra.strip() else prompt for prompt, extra in zip(prompts, inputs)]


def _template_parts(template: str, table: Table) -> list[tuple[str, str | None]]:
    """Pieces of the template: each a text, and the field that follows it (None: none); a field is a column or
    ``prompt``."""
    columns = {"prompt", *table.columns}
    parts = _parsed(template)
    if all(name != "prompt" for _, name, _, _ in parts):
        raise InputError(f"template must have {{prompt}} in it, got {template!r}")
    for _, name, spec, conversion in parts:
        if name is not None and (name not in columns or spec or conversion):
            raise InputError(
                f"template has {{{plain(name)}}}, which is no field of {table.source}{suggest(name, columns)}; "
                f"its fields are {few(sorted(columns))}; write {{{{ for a brace"
            )
    return [(literal, name) for literal, name, _, _ in parts]


def closing_text(template: str) -> str:
    """Return the text of a template after its last field; empty where it ends with the field.

    Raises:
        InputError: it is no template.
    """
    text = ""
    for literal, field, _, _ in _parsed(template):
        text = text + literal if field is None else ""
    return text


def _parsed(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r} is no template ({error}); write {{{{ for a brace") from None


# --- tokens -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedInstructions:
    """Examples ``{"input_ids", "labels"}`` in the order of the frame, and how many were too long and cut."""

    examples: list[dict[str, list[int]]]
    cut: int


def encode_instructions(
    frame: pd.DataFrame, tokenizer: Any, max_length: int, template: Template = DEFAULT_TEMPLATE
) -> EncodedInstructions:
    """Token ids and labels of ``frame``: at most ``max_length``, not padded.

    Its columns are ``prompt`` and ``completion``, or with a chat template ``messages``, which `encode_conversations`
    encodes. Prompt and completion are tokenised apart, as generation will see them; the tokenizer's own beginning (BOS)
    is kept, and EOS follows a completion that was not cut. Neither comes twice where a text has it already. What is too
    long loses the beginning of its prompt (what comes before the first label), but never more of it than down to half
    of ``max_length``; the rest is cut from the end. The first position carries no label: nothing predicts it.

    Args:
        template: that of the data, of which a chat template is applied here.
    Raises:
        InputError: ``max_length`` below 2, a tokenizer without EOS, a completion without a token, tokens that the model
            has no embedding for; what `encode_conversations` refuses.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the model's tokenizer has no end-of-sequence token, so a completion would not end")
    longest = min(max_length, tokenizer.model_max_length)
    if longest < 2:
        raise InputError(f"max_length must be at least 2 (a prompt token and a label), got {longest}")
    bos = tokenizer.bos_token_id
    if isinstance(template, ChatTemplate):
        rows = encode_conversations(frame, tokenizer, template)
    else:
        prompts = encode_prompts(tokenizer, frame["prompt"].tolist())
        completions = encode_completions(tokenizer, frame["completion"].tolist())
        empty = next((i for i, completion in enumerate(completions) if not completion), None)
        if empty is not None:
            raise InputError(
                f"completion of row {row_id(frame, empty)} has no token for this tokenizer; remove the row"
            )
        rows = [
            (prompt + completion, [IGNORED] * len(prompt) + completion)
            for prompt, completion in zip(prompts, completions)
        ]
    return EncodedInstructions(
        [_cut(ids, labels, longest, bos) for ids, labels in rows], sum(len(ids) > longest for ids, _ in rows)
    )


def _cut(ids: list[int], labels: list[int], longest: int, bos: int | None) -> dict[str, list[int]]:
    n_prompt = next(i for i, label in enumerate(labels) if label != IGNORED)
    room = min(n_prompt, max(longest - (len(ids) - n_prompt), longest // 2))
    if room < n_prompt:
        begin = ids[:1] if ids[0] == bos and room > 1 else []
        first = n_prompt - room + len(begin)
        ids, labels = begin + ids[first:], [IGNORED] * len(begin) + labels[first:]
    ids, labels = ids[:longest], labels[:longest]
    labels[0] = IGNORED
    return {"input_ids": ids, "labels": labels}


def check_invocation(frame: pd.DataFrame, examples: Sequence[dict[str, list[int]]], tokens: Sequence[int]) -> None:
    """Raise where the last ``tokens`` of an example do not begin before its first label: an activated LoRA needs that.

    Args:
        examples: of `encode_instructions` for ``frame``.
        tokens: of the template's closing text.
    """
    for i, example in enumerate(examples):
        ids = example["input_ids"]
        first_label = next(place for place, label in enumerate(example["labels"]) if label != IGNORED)
        starts = [j for j in range(len(ids) - len(tokens) + 1) if ids[j : j + len(tokens)] == list(tokens)]
        if not starts:
            raise InputError(
                f"the closing text of the template is not in row {row_id(frame, i)} as the {len(tokens)} tokens that "
                "it is by itself, so an activated LoRA would be inactive; begin it with a line break or a special "
                "token and end it so, or raise max_length"
            )
        if starts[-1] >= first_label:
            raise InputError(
                f"the closing text of the template comes again in the completion of row {row_id(frame, i)}, and an "
                "activated LoRA is active from the last one on; take a text that no completion has"
            )
