"""Conversations as token ids and labels: the tokenizer's chat template renders them, by transformers' own functions.

Labels stand on what the assistant writes, in every turn. A template with generation blocks says itself what that is.
For any other it is what the conversation has more, once the turn is in it, than the prompt of that turn: the messages
before, rendered with ``add_generation_prompt``. That holds only if a template never writes earlier text otherwise
because of what comes later, which is proved for every turn of every row.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sparselora.data.tables import Number, Table, cell_text, is_chat
from sparselora.data.tokens import check_ids, row_id
from sparselora.errors import InputError, counted, few, one_line, shown
from sparselora.models.labels import IGNORED
from sparselora.models.prompt_template import ChatTemplate
from sparselora.runs.process import complain, process_rank

Message = dict[str, str]
Conversation = list[Message]

FIELDS = ("messages", "conversations")
"""Columns of conversations that are tried where none is named."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles that chat templates call otherwise."""

_AT_ONCE = 512
"""Conversations that are rendered and tokenised together."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def conversation_field(table: Table, prompt_field: str) -> str | None:
    """Return the column that holds conversations: the one that is named, else the first of `FIELDS` that is there."""
    names = FIELDS if prompt_field == "prompt" else (prompt_field,)
    for name in names:
        if any(is_chat(cell) for cell in table.columns.get(name, ())):
            return name
    return None


def read_conversations(table: Table, field: str) -> list[Conversation]:
    """Return the messages of every row, as ``{"role", "content"}``, from that form or ShareGPT's ``from``, ``value``.

    Other keys of messages, and a column ``tools``, are left out, with a line on stderr that says so.

    Raises:
        InputError: a row without messages, a message without role or text.
    """
    others: dict[str, int] = {}
    conversations = []
    for i, cell in enumerate(table.cells(field)):
        where = table.where(field, i)
        if not isinstance(cell, list):
            raise InputError(f"{where} is no list of messages; give a list of objects with role and content")
        if not cell:
            raise InputError(f"{where} has no messages; remove the row")
        conversations.append([_message(message, f"{where}, message {k}") for k, message in enumerate(cell)])
        for message in cell:
            for key, value in message.items():
                if value is not None and key not in ("role", "content", "from", "value"):
                    others[key] = others.get(key, 0) + 1
    tools = sum(cell is not None and cell != [] for cell in table.columns.get("tools", ()))
    left_out = [f"{key} of {counted(count, 'message')}" for key, count in others.items()]
    left_out += [f"tools of {counted(tools, 'row')}"] if tools else []
    if left_out and process_rank() == 0:
        complain(f"WARNING: {table.source}: only role and content of messages are used; left out: {few(left_out)}")
    return conversations


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise InputError(f"{where} is no object; give one with role and content")
    names = ("role", "content") if "role" in message else ("from", "value")
    values = []
    for name in names:
        value = message.get(name)
        if not isinstance(value, str) or isinstance(value, Number):
            kind = "a list" if isinstance(value, list) else shown(value)
            reason = f"is {kind}, not a text" if name in message else "is missing"
            raise InputError(f"{where}: {name} {reason}; give every message a role and a content that is a string")
        values.append(cell_text(value, f"{where}: {name}"))
    role = _SHAREGPT_ROLES.get(values[0], values[0]) if names[0] == "from" else values[0]
    return {"role": role, "content": values[1]}


def single_turns(prompts: Sequence[str], completions: Sequence[str]) -> list[Conversation]:
    """Return prompts with their completions as conversations of a user and an assistant."""
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def last_question(conversation: Conversation) -> tuple[Conversation, str]:
    """Return the messages before the assistant's last one, and the text of that.

    Raises:
        InputError: the assistant says nothing, or nothing comes before it.
    """
    turns = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    if not turns or turns[-1] == 0:
        raise InputError("a conversation has no message of the assistant that answers another; remove it")
    return conversation[: turns[-1]], conversation[turns[-1]]["content"]


# --- rendering ----------------------------------------------------------------------------------------------------


def template_text(tokenizer: Any, template: ChatTemplate) -> str:
    """Return the Jinja text of ``template``, which may be the tokenizer's own.

    Raises:
        InputError: the tokenizer has none.
    """
    if template.jinja is not None:
        return template.jinja
    try:
        text: str = tokenizer.get_chat_template()
    except ValueError as error:  # none, or several without one called default
        reason = "has no chat template" if tokenizer.chat_template is None else one_line(str(error))[:160]
        raise InputError(
            f"the model's tokenizer {reason}, and the data are conversations; give one by chat_template (a file, or "
            "its text)"
        ) from None
    return text


def encode_prompts_of(tokenizer: Any, conversations: Sequence[Conversation], template: ChatTemplate) -> list[list[int]]:
    """Return the tokens after which the assistant answers the last message of each conversation.

    Raises:
        InputError: the template refuses a conversation; tokens beyond the model.
    """
    jinja = template_text(tokenizer, template)
    texts = [
        _rendered(tokenizer, jinja, messages, f"conversation {i}", asks=True)
        for i, messages in enumerate(conversations)
    ]
    ids = [list(tokens) for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    check_ids(tokenizer, ids)
    return ids


def generation_prompt(tokenizer: Any, template: ChatTemplate) -> str:
    """Return the text that a chat template writes between a question and the assistant's answer; it may be empty."""
    jinja = template_text(tokenizer, template)
    question = [{"role": "user", "content": "x"}]
    bare, asking = (_rendered(tokenizer, jinja, question, "a question", asks=asks) for asks in (False, True))
    return asking.removeprefix(bare) if asking.startswith(bare) else ""


def turn_ends(tokenizer: Any, template: ChatTemplate) -> set[int]:
    """Return the tokens that end what the assistant writes: EOS, and the template's own, where that is another."""
    ends = {tokenizer.eos_token_id} - {None}
    jinja, question = template_text(tokenizer, template), [{"role": "user", "content": "x"}]
    answer = [*question, {"role": "assistant", "content": "y"}]
    try:
        asking = _rendered(tokenizer, jinja, question, "a question", asks=True)
        written = _rendered(tokenizer, jinja, answer, "an answer", asks=False)
    except InputError:  # it wants more than a question and an answer, such as a system prompt
        return ends
    tokens = tokenizer(written.removeprefix(asking), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    if written.startswith(asking):
        ends |= {token for token in tokens if token in special}
    return ends


def _rendered(tokenizer: Any, jinja: str, messages: Conversation, where: str, *, asks: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=jinja, tokenize=False, add_generation_prompt=asks
        )
    except (TemplateError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        reason = one_line(str(error))[:160] or type(error).__name__
        raise InputError(
            f"{where}: the chat template refuses the conversation ({reason}; roles: "
            f"{few([message['role'] for message in messages])}); mend or remove the row, or give another chat_template"
        ) from None
    return text


# --- tokens and labels --------------------------------------------------------------------------------------------


def encode_conversations(
    frame: pd.DataFrame, tokenizer: Any, template: ChatTemplate
) -> list[tuple[list[int], list[int]]]:
    """Return token ids of the conversations in the column ``messages`` of ``frame``, and their labels, uncut.

    Token ids are those of ``apply_chat_template``. Labels are on the assistant's tokens, those of its turn's end with
    them but not what a template writes behind that end; the first token of a row has none, for nothing predicts it.

    Raises:
        InputError: a template that is missing, refuses a row, or writes earlier turns otherwise once later ones follow;
            a row in which the assistant has no token; a tokenizer that does not know the places of its tokens.
    """
    jinja = template_text(tokenizer, template)
    if not tokenizer.is_fast:
        raise InputError("the model's tokenizer does not tell the places of its tokens in a text; use a fast tokenizer")
    encode = _by_blocks if _GENERATION.search(jinja) else _by_prefixes
    names = [f"messages of row {row_id(frame, i)}" for i in range(len(frame))]
    conversations = frame["messages"].tolist()
    rows = []
    for start in range(0, len(frame), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        for where, (ids, is_label) in zip(names[part], encode(tokenizer, jinja, conversations[part], names[part])):
            is_label[:1] = False
            if not is_label.any():
                raise InputError(
                    f"{where}: no token of an assistant's turn in it, so there is nothing to learn; remove the row"
                )
            rows.append((ids, np.where(is_label, ids, IGNORED).tolist()))
    check_ids(tokenizer, [ids for ids, _ in rows])
    return rows


Encoded = Iterator[tuple[list[int], Any]]


def _by_blocks(tokenizer: Any, jinja: str, conversations: Sequence[Conversation], names: Sequence[str]) -> Encoded:
    """Yield ids, and which of them carry labels, as the template's generation blocks say."""
    for messages, where in zip(conversations, names):  # says which row a template refuses
        _rendered(tokenizer, jinja, messages, where, asks=False)
    encoded = tokenizer.apply_chat_template(
        list(conversations), chat_template=jinja, return_dict=True, return_assistant_tokens_mask=True
    )
    for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        yield list(ids), np.array(mask, dtype=bool)


def _by_prefixes(tokenizer: Any, jinja: str, conversations: Sequence[Conversation], names: Sequence[str]) -> Encoded:
    """Yield ids, and which of them carry labels: those between the prompt of an assistant's turn and its end."""
    render = functools.partial(_rendered, tokenizer, jinja)
    texts, spans = [], []
    for messages, where in zip(conversations, names):
        text = render(messages, where, asks=False)
        texts.append(text)
        spans.append(list(_assistant_spans(render, messages, text, where)))
    ends = np.array(sorted(turn_ends(tokenizer, ChatTemplate(jinja))))
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for ids, offsets, turns in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
        places, is_end = np.array(offsets).reshape(-1, 2), np.isin(ids, ends)
        is_label = np.zeros(len(ids), dtype=bool)
        for start, stop in turns:
            # A token that reaches over an edge is none that a prompt's end or an answer's end would have given.
            inside = (places[:, 0] >= start) & (places[:, 1] <= stop) & (places[:, 0] < stop)
            last = np.flatnonzero(inside & is_end)
            inside[last[-1] + 1 if len(last) else len(ids) :] = False
            is_label |= inside
        yield list(ids), is_label


def _assistant_spans(render: Any, messages: Conversation, text: str, where: str) -> Iterator[tuple[int, int]]:
    """Yield where in ``text``, the conversation as rendered, what the assistant writes in a turn begins and ends."""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise InputError(
                f"{where}: the assistant speaks first, before anything asks it; remove the row or the turn"
            )
        prompt = render(messages[:i], where, asks=True)
        written = text if i == len(messages) - 1 else render(messages[: i + 1], where, asks=False)
        if not (written.startswith(prompt) and text.startswith(written)):
            raise InputError(
                f"{where}: the chat template does not write the prompt of message {i} as the beginning of the whole "
                "conversation, so the assistant's tokens cannot be told; give a chat_template with generation blocks "
                "({% generation %} … {% endgeneration %})"
            )
        yield len(prompt), len(written)
