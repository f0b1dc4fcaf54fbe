"""Texts as tokens: nothing comes twice, nothing is empty, and no token is beyond the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparselora.data.batches import encode_texts
from sparselora.data.instructions import encode_instructions
from sparselora.data.tokens import encode_completions, encode_prompts
from sparselora.errors import InputError

PAD, EOS, BOS, W0 = 0, 1, 2, 3


def tokenizer(added: str = "$A", **tokens: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of words that puts ``added`` around a text, and drops what is strange."""
    vocabulary = {name: i for i, name in enumerate(["[PAD]", "</s>", "<s>", *(f"w{i}" for i in range(9))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="none"))
    inner.normalizer = normalizers.Replace(Regex("strange.*"), "")
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if added != "$A":
        special = [(name, vocabulary[name]) for name in ("<s>", "</s>")]
        inner.post_processor = processors.TemplateProcessing(
            single=added, pair=f"{added} $B:1 </s>:1", special_tokens=special
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **{"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", **tokens}
    )


@pytest.mark.parametrize(
    ("added", "text", "expected"),
    [
        ("$A", "w0", [W0]),
        ("$A", "<s> w0", [BOS, W0]),
        ("$A", "<s> <s> w0", [BOS, BOS, W0]),
        ("$A", "w0 </s>", [W0, EOS]),
        ("<s> $A", "w0", [BOS, W0]),
        ("<s> $A", "<s> w0", [BOS, W0]),
        ("<s> $A", "<s> <s> w0", [BOS, BOS, W0]),
        ("<s> $A", "w0 <s> w1", [BOS, W0, BOS, W0 + 1]),
        ("$A </s>", "w0", [W0]),
        ("$A </s>", "w0 </s>", [W0, EOS]),
        ("<s> $A </s>", "<s> w0 </s> w1", [BOS, W0, EOS, W0 + 1]),
        ("<s> $A </s>", "", [BOS]),
    ],
)
def test_a_prompt_begins_once_and_ends_as_its_text_does(added: str, text: str, expected: list[int]) -> None:
    others = ["w3", text, "<s> w4"]
    assert encode_prompts(tokenizer(added), others)[1] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("w0", [W0, EOS]), ("w0 </s>", [W0, EOS]), ("w0 </s>\n", [W0, EOS]), ("w0 </s> w1", [W0, EOS, W0 + 1, EOS])],
)
@pytest.mark.parametrize("added", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_completion_ends_once(added: str, text: str, expected: list[int]) -> None:
    assert encode_completions(tokenizer(added), [text]) == [expected]


def test_white_space_behind_the_end_is_no_second_end() -> None:
    words = tokenizer()
    words.add_tokens("\n")
    newline = words.convert_tokens_to_ids("\n")
    assert encode_completions(words, ["w0 </s>\n"]) == [[W0, EOS, newline]]


def test_a_row_without_a_token_is_named() -> None:
    frame = pd.DataFrame({"row": [7, 9], "prompt": ["w0", "w1"], "completion": ["w2", "strange words"]})
    with pytest.raises(InputError, match="completion of row 9 has no token for this tokenizer"):
        encode_instructions(frame, tokenizer(), 16)
    texts = pd.DataFrame({"row": [7, 9], "text": ["w0", "strange"], "label": [0, 1]})
    with pytest.raises(InputError, match="text of row 9 has no token for this tokenizer"):
        encode_texts(texts, ("text",), tokenizer(), 16)
    assert len(encode_texts(texts, ("text",), tokenizer("<s> $A </s>"), 16)) == 2, "its special tokens are tokens"


@pytest.mark.parametrize(("fields", "least"), [(("text",), 3), (("text", "other"), 5)])
def test_a_length_that_special_tokens_fill_is_refused_and_one_more_is_not(fields: tuple[str, ...], least: int) -> None:
    frame = pd.DataFrame({"text": ["w0 w1 w2"], "other": ["w3 w4"], "label": [0]})
    for length in range(1, least):
        with pytest.raises(InputError, match=f"max_length {length} leaves no room for the text.*at least {least}"):
            encode_texts(frame, fields, tokenizer("<s> $A </s>"), length)
    (example,) = encode_texts(frame, fields, tokenizer("<s> $A </s>"), least)
    assert len(example["input_ids"]) == least
    assert W0 in example["input_ids"]


@pytest.mark.parametrize("rows", [11, 12])
def test_tokens_beyond_the_embedding_are_refused(rows: int) -> None:
    words = tokenizer()
    words.embedding_rows = rows  # type: ignore[attr-defined]
    frame = pd.DataFrame({"prompt": ["w0"], "completion": ["w8"], "text": ["w8"], "label": [0]})
    calls = (
        lambda: encode_instructions(frame, words, 16),
        lambda: encode_instructions(frame.assign(prompt="w8", completion="w0"), words, 16),
        lambda: encode_texts(frame, ("text",), words, 16),
    )
    for call in calls:
        if rows == 12:
            call()
            continue
        with pytest.raises(InputError, match=r"gives token 11 \(w8\), the model has embeddings for 0 to 10"):
            call()
    words.add_special_tokens({"pad_token": "[new]"})
    with pytest.raises(InputError, match=r"gives token 12 \(\[new\]\)"):
        encode_texts(frame.assign(text="w0"), ("text",), words, 16)


def test_train_refuses_a_tokenizer_of_another_model_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparselora.__main__ import main
    from tests.helpers.tiny_llama import make_tiny_llama

    folder = make_tiny_llama(tmp_path / "model")
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    words.add_tokens([f"more{i}" for i in range(200)])
    words.save_pretrained(folder)
    (tmp_path / "x.jsonl").write_text('{"prompt": "w1", "completion": "more199"}\n' * 10)
    arguments = ["--model", str(folder), "--dataset", str(tmp_path / "x.jsonl"), "--task", "causal_lm"]
    assert main(["train", *arguments, "--max_steps", "1", "--out_dir", str(tmp_path / "run")]) == 2
    assert "they do not belong together" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
