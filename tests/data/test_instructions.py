"""Instruction data: fields, template, and that every example carries exactly the labels it should."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sparselora.data.instructions import encode_instructions, load_instructions
from sparselora.errors import InputError
from sparselora.models.labels import IGNORED
from tests.helpers.tiny_llama import make_tiny_llama

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path_factory.mktemp("llama")))


def write(path: Path, rows: list[dict[str, object]]) -> str:
    text = "\n".join(json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("prompt", "completion"), ("prompt", "completion")),
        (("instruction", "output", "answer"), ("instruction", "output")),
        (("question", "answer", "final_answer"), ("question", "answer")),
        (("instruction", "answer", "model_output"), ("instruction", "answer")),
    ],
)
def test_fields_are_found_by_their_usual_names(tmp_path: Path, names: tuple[str, ...], found: tuple[str, str]) -> None:
    path = write(tmp_path / "data.jsonl", [{name: f"{name} {i}" for name in names} for i in range(10)])
    data = load_instructions(path)
    assert data.fields == found
    assert data.train["prompt"].iloc[0] == f"{found[0]} 0\n"
    assert data.train["completion"].iloc[0] == f"{found[1]} 0"
    assert data.eval["row"].tolist() == [4, 9]
    assert len(data.train) == 8


def test_a_field_that_is_named_wins_and_its_partner_is_still_found(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"question": "q", "answer": "a", "final_answer": "f"}] * 5)
    assert load_instructions(path, completion_field="final_answer", prompt_field="question").fields[1] == "final_answer"
    assert load_instructions(path, prompt_field="question").fields == ("question", "answer")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_kinds_of_file_give_the_same_data(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(10)]
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write(path, rows)
    data = load_instructions(str(path))
    assert data.name == "data"
    assert data.train["completion"].tolist() == [f"c{i}" for i in range(10) if i % 5 != 4]


def test_template_takes_the_prompt_and_other_fields_and_leaves_braces_in_texts_alone(tmp_path: Path) -> None:
    rows = [{"prompt": "say {x}", "completion": "{y}", "unit": "kg"}] * 5
    data = load_instructions(write(tmp_path / "d.jsonl", rows), template="Q ({unit}): {prompt} {{}}\nA: ")
    assert data.train["prompt"].iloc[0] == "Q (kg): say {x} {}\nA: "
    assert data.train["completion"].iloc[0] == "{y}"


def test_alpaca_input_follows_the_instruction_unless_the_template_places_it(tmp_path: Path) -> None:
    rows = [{"instruction": "add", "input": extra, "output": "3"} for extra in ("1 2", "", "1 2", "", "")]
    path = write(tmp_path / "d.jsonl", rows)
    assert load_instructions(path).train["prompt"].tolist()[:2] == ["add\n1 2\n", "add\n"]
    assert load_instructions(path, template="{input}|{prompt}").train["prompt"].iloc[0] == "1 2|add"


def test_texts_are_trained_as_the_file_has_them(tmp_path: Path) -> None:
    rows = [{"instruction": "0007", "input": extra, "output": "1.50", "x.y": 5} for extra in (5, None, "", "1e3", 0.5)]
    path = write(tmp_path / "d.jsonl", rows)
    data = load_instructions(path, template="{x.y} {prompt}", eval_file=path)
    assert data.train["prompt"].tolist() == ["5 0007\n5", "5 0007", "5 0007", "5 0007\n1e3", "5 0007\n0.5"]
    assert data.train["completion"].tolist() == ["1.50"] * 5


def test_data_of_the_hub_go_through_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def hub(prompts: list) -> None:
        data = datasets.Dataset.from_dict({"prompt": prompts, "completion": ["0007"] * len(prompts)})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": data.select(range(1, len(prompts)))})

    hub(["0", "01", "NA", "true", "5", "nan"])
    data = load_instructions("owner/name")
    assert data.train["prompt"].tolist() == ["01\n", "NA\n", "true\n", "5\n"]
    assert data.eval["prompt"].tolist() == ["nan\n"]
    hub([[{"role": "user", "content": "x"}]] * 6)
    with pytest.raises(InputError, match="owner/name: prompt of row 0 is a list, not a text; it holds chat messages"):
        load_instructions("owner/name")


def test_training_rows_follow_the_seed_and_evaluation_rows_do_not(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "completion": "c"} for i in range(50)])
    one, two = (load_instructions(path, train_samples=8, eval_samples=4, seed=seed) for seed in (0, 1))
    assert one.train["row"].tolist() != two.train["row"].tolist()
    assert one.eval["row"].tolist() == two.eval["row"].tolist()
    assert one.train["row"].is_monotonic_increasing
    again = load_instructions(path, train_samples=8, eval_samples=4, seed=0)
    assert again.train.equals(one.train)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}] * 5, {}, "name two by --prompt_field"),
        ([{"prompt": "a", "completion": "b"}] * 5, {"prompt_field": "promt"}, "did you mean 'prompt'"),
        ([{"prompt": "a", "completion": ""}] * 5, {}, "empty 'completion', the first is row 0"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}] * 3, {}, "without 'prompt'"),
        ([{"prompt": "a", "completion": "b"}] * 5, {"template": "{prompt} {unit}"}, "no field of"),
        ([{"prompt": "a", "completion": "b"}] * 5, {"template": "{prompt"}, "no template"),
        ([{"prompt": "a", "completion": "b"}] * 5, {"template": "{prompt:>9}"}, "no field of"),
        ([{"prompt": "a", "completion": "b"}] * 3, {}, "too few to hold out"),
        ([{"prompt": "a", "completion": "b"}] * 5, {"prompt_field": "completion"}, "are both 'completion'"),
        ([{"prompt": ["a"], "completion": "b"}] * 5, {}, "prompt of row 0 is a list, not a text"),
        ([{"prompt": "a", "completion": {"x": "b"}}] * 5, {}, "completion of row 0 is an object, not a text"),
        ([{"instruction": "a", "input": ["x"], "output": "b"}] * 5, {}, "input of row 0 is a list, not a text"),
        ([{"prompt": "a", "completion": "b", "c": [1]}] * 5, {"template": "{c}{prompt}"}, "c of row 0 is a list"),
    ],
)
def test_bad_data_is_one_clear_line(tmp_path: Path, rows: list, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=r".") as caught:
        load_instructions(write(tmp_path / "d.jsonl", rows), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_and_a_hub_that_is_not_to_be_had() -> None:
    with pytest.raises(InputError, match="no file"):
        load_instructions("missing.jsonl")
    with pytest.raises(InputError, match="could not be loaded from the hub"):
        load_instructions("no-one/no-such-data")


# --- tokens -------------------------------------------------------------------------------------------------------


def frame(*pairs: tuple[str, str]) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["prompt", "completion"])


def test_labels_stand_on_the_completion_and_its_end_alone(tokenizer) -> None:
    encoded = encode_instructions(frame(("w0 w1 w2\n", "w3 w4"), ("w5", "w6")), tokenizer, 64)
    assert encoded.cut == 0
    first = encoded.examples[0]
    assert first["input_ids"] == [3, 4, 5, 6, 7, EOS]
    assert first["labels"] == [IGNORED, IGNORED, IGNORED, 6, 7, EOS]


def test_padding_that_is_the_end_token_does_not_hide_the_end(tmp_path: Path) -> None:
    from sparselora.data.batches import Collator
    from sparselora.models.load import load_causal_lm

    _, tokenizer = load_causal_lm(str(make_tiny_llama(tmp_path, pad=False)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    encoded = encode_instructions(frame(("w0", "w1"), ("w0 w1 w2 w3", "w1 w2")), tokenizer, 64)
    batch = Collator(tokenizer.pad_token_id, causal=True)(encoded.examples)
    assert batch["labels"][0].tolist() == [IGNORED, 4, EOS] + [IGNORED] * 5
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 7]
    assert (batch["token_counts"].tokens, batch["token_counts"].outputs) == (10, 5)


@settings(deadline=None)
@given(prompt=st.integers(0, 40), completion=st.integers(1, 40), longest=st.integers(2, 50), data=st.randoms())
def test_no_cut_leaves_an_example_without_a_label_that_is_predicted(
    tokenizer, prompt: int, completion: int, longest: int, data
) -> None:
    texts = [" ".join(f"w{data.randrange(40)}" for _ in range(n)) for n in (prompt, completion)]
    (example,) = encode_instructions(frame(tuple(texts)), tokenizer, longest).examples
    ids, labels = example["input_ids"], example["labels"]
    assert len(ids) == len(labels) == min(longest, prompt + completion + 1)
    assert any(label != IGNORED for label in labels[1:])
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids))
    wanted = [tokenizer.convert_tokens_to_ids(text.split()) for text in texts]
    kept = max((i for i, label in enumerate(labels) if label == IGNORED), default=-1) + 1
    if prompt:
        assert ids[:kept] == wanted[0][prompt - kept :], "the prompt keeps its end"
    whole = [*wanted[1], EOS]
    assert ids[kept if prompt else 0 :] == whole[: len(ids) - (kept if prompt else 0)], "the completion its beginning"
    if prompt + completion + 1 <= longest:
        assert ids[-1] == EOS


def test_cuts_are_counted_and_max_length_is_at_least_two(tokenizer) -> None:
    encoded = encode_instructions(frame(("w0 w1 w2", "w3"), ("w0", "w3")), tokenizer, 4)
    assert encoded.cut == 1
    assert [len(e["input_ids"]) for e in encoded.examples] == [4, 3]
    with pytest.raises(InputError, match="max_length"):
        encode_instructions(frame(("w0", "w1")), tokenizer, 1)
