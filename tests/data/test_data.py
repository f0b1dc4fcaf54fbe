"""Text data: every kind of table reads alike, subsets are seeded, and bad data is named before training starts."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from sparselora.data.table_files import read_table
from sparselora.data.texts import LIBRARIES, harvest_docstrings, load_text_data
from sparselora.errors import InputError
from sparselora.models.class_names import Classes

FRAME = pd.DataFrame({"sentence": [f"text {i}" for i in range(20)], "label": [i % 2 for i in range(20)]})

WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "json": lambda frame, path: frame.to_json(path, orient="records"),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "parquet": lambda frame, path: frame.to_parquet(path),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_kind_of_table_reads_alike(tmp_path: Path, kind: str, zipped: bool) -> None:
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](FRAME, path)
    if zipped and kind == "parquet":
        pytest.skip("parquet compresses inside the file")
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path = path.with_name(path.name + ".gz")
    data = load_text_data(str(path))
    assert data.name == "data"
    assert data.text_fields == ("sentence",)
    assert data.labels == ("0", "1")
    assert data.eval["row"].tolist() == [4, 9, 14, 19]
    assert sorted([*data.train["row"], *data.eval["row"]]) == list(range(20))
    for part in (data.train, data.eval):
        assert part["sentence"].tolist() == [f"text {i}" for i in part["row"]]
        assert part["label"].tolist() == [i % 2 for i in part["row"]]


def save(tmp_path: Path, name: str = "train.csv", **columns: list[object]) -> str:
    pd.DataFrame(columns).to_csv(tmp_path / name, index=False)
    return str(tmp_path / name)


def test_training_subset_follows_the_seed_and_evaluation_subset_does_not(tmp_path: Path) -> None:
    train = save(tmp_path, sentence=[f"s{i}" for i in range(50)], label=[i % 2 for i in range(50)])
    dev = save(tmp_path, "dev.csv", sentence=[f"d{i}" for i in range(50)], label=[i % 2 for i in range(50)])
    draws = [load_text_data(train, eval_file=dev, train_samples=10, eval_samples=10, seed=seed) for seed in (0, 0, 1)]
    rows = [(d.train["row"].tolist(), d.eval["row"].tolist()) for d in draws]
    assert rows[0] == rows[1]
    assert rows[0][0] != rows[2][0]
    assert rows[0][1] == rows[2][1]
    assert all(len(r) == 10 and r == sorted(set(r)) for pair in rows for r in pair)


def test_text_labels_pairs_and_words_that_look_missing(tmp_path: Path) -> None:
    path = save(
        tmp_path, premise=["NA", "null", "b", "c", "d"], hypothesis=["x"] * 5, label=["no", "yes", "no", "yes", "no"]
    )
    data = load_text_data(path)
    assert data.text_fields == ("premise", "hypothesis")
    assert data.labels == ("no", "yes")
    assert data.train["premise"].tolist()[:2] == ["NA", "null"]


def test_numeric_labels_are_ordered_as_numbers(tmp_path: Path) -> None:
    path = save(tmp_path, text=[f"t{i}" for i in range(22)], label=[i % 11 for i in range(22)])
    assert load_text_data(path).labels == tuple(map(str, range(11)))


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"sentence": ["a"] * 10, "label": [1] * 10}, {}, "one class only"),
        ({"words": ["a"] * 10, "label": [0, 1] * 5}, {}, "name one by --text_fields"),
        ({"sentence": ["a"] * 10, "target": [0, 1] * 5}, {}, "no column 'label'"),
        ({"sentence": ["a"] * 10, "labels": [0, 1] * 5}, {}, "did you mean 'labels'"),
        ({"sentence": ["a"] * 10, "label": [0, 1] * 5}, {"text_fields": ["text"]}, "no column 'text'"),
        ({"sentence": ["a", None] * 5, "label": [0, 1] * 5}, {}, "4 rows without 'sentence', the first is row 1"),
        ({"sentence": ["a"] * 10, "label": [0, None] * 5}, {}, "4 rows without 'label'"),
        ({"sentence": ["a"] * 10, "label": [0.5, 1.5] * 5}, {}, "real numbers"),
        ({"sentence": ["a"] * 10, "label": [0, -1] * 5}, {}, "negative labels"),
        ({"sentence": [], "label": []}, {}, "no rows"),
        ({"sentence": ["a", "b"], "label": [0, 1]}, {}, "empty"),
        ({"sentence": ["a"] * 10, "label": [0, 1] * 5}, {"train_samples": -1}, "0 (all rows) or more"),
        ({"sentence": ["a"] * 10, "label": [0, 1] * 4 + [0, 2]}, {}, "labels that the training data lacks: 2"),
    ],
)
def test_bad_tables_are_named(
    tmp_path: Path, columns: dict[str, list[object]], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_text_data(save(tmp_path, **columns), **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "cells", "labels"),
    [
        ("x.csv", ["1", "01"], ("01", "1")),
        ("x.csv", ["1", "1.0"], ("1", "1.0")),
        ("x.csv", ["true", "False"], ("False", "true")),
        ("x.csv", ["10", "9", "b", "a"], ("9", "10", "a", "b")),
        ("x.csv", ["nan", "inf", "-1"], ("-1", "inf", "nan")),
        ("x.tsv", ["1", "01"], ("01", "1")),
        ("x.jsonl", ['"1"', '"01"'], ("01", "1")),
        ("x.jsonl", ['"-1"', '"0"', '"0.5"'], ("-1", "0", "0.5")),
        ("x.jsonl", ["1", "0"], ("0", "1")),
        ("x.jsonl", ["1.0", "0", "1", "-0"], ("0", "1")),
        ("x.jsonl", ["1", '"1"', '"0"'], ("0", "1")),
        ("x.jsonl", ["true", "false"], ("false", "true")),
        (
            "x.jsonl",
            ["123456789012345678901", "123456789012345678902"],
            ("123456789012345678901", "123456789012345678902"),
        ),
    ],
)
def test_labels_are_the_classes_that_are_written(tmp_path: Path, name: str, cells: list[str], labels: tuple) -> None:
    rows = [cells[i % len(cells)] for i in range(10 * len(cells))]
    if name == "x.jsonl":
        text = "".join(f'{{"text": "t", "label": {cell}}}\n' for cell in rows)
    else:
        comma = "," if name == "x.csv" else "\t"
        text = f"text{comma}label\n" + "".join(f"t{comma}{cell}\n" for cell in rows)
    (tmp_path / name).write_text(text)
    data = load_text_data(str(tmp_path / name))
    assert data.labels == labels
    for frame in (data.train, data.eval):
        for row, label in zip(frame["row"], frame["label"]):
            written = rows[row].strip('"')
            assert labels[label] == written or float(labels[label]) == float(written)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[0, 5]", "label of row 1 is a list, not a class; one class a row is supported"),
        ('{"x": 1}', "label of row 1 is an object, not a class"),
        ('""', "label of row 1 is empty"),
        ("1e30", "holds real numbers (1e30 in row 1), not classes"),
        ("0.5", "holds real numbers (0.5 in row 1), not classes"),
        ("-1", "has negative labels in 'label' (-1 in row 1)"),
        ("-1.0", "has negative labels in 'label' (-1.0 in row 1)"),
        ("null", "1 row without 'label', the first is row 1"),
        ('"\\ud83d"', "label of row 1 holds \\ud83d"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, cell: str, message: str) -> None:
    rows = ["0", cell, "1", "1", "0", "1"]
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "t", "label": {row}}}\n' for row in rows))
    with pytest.raises(InputError) as caught:
        load_text_data(str(tmp_path / "x.jsonl"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_list_a_few_of_many_labels(tmp_path: Path) -> None:
    train = save(tmp_path, sentence=["a"] * 400, label=[f"class{i}" for i in range(400)])
    dev = save(tmp_path, "dev.csv", sentence=["a"] * 300, label=[f"other{i}" for i in range(300)])
    with pytest.raises(InputError, match=r"lacks: other0, .* and 295 more; known: class0, .* and 392 more") as caught:
        load_text_data(train, eval_file=dev)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_fields": ["label"]}, "column 'label' is the text field and the label field"),
        ({"text_fields": ["sentence"], "label_field": "sentence"}, "column 'sentence' is the text field and the label"),
        ({"text_fields": ["sentence", "sentence"]}, "the two text fields are both 'sentence'"),
        ({"text_fields": ["a", "b", "c"]}, "at most two text fields"),
        ({"text_fields": ["row"]}, "cannot be called 'row'"),
        ({"label_field": "/"}, "no column '/'"),
        ({"label_field": "sentence"}, "has no text column of a usual name"),
    ],
)
def test_fields_that_exclude_each_other(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_text_data(save(tmp_path, sentence=["a"] * 10, label=[0, 1] * 5), **options)
    assert message in str(caught.value)


def test_glue_from_the_hub_goes_through_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {"idx": [3, 5, 8], "sentence": ["0007", "NA", "é"], "label": [1, 0, 1]}
    splits = {name: datasets.Dataset.from_dict(rows) for name in ("train", "validation")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
    data = load_text_data("glue/sst2")
    assert data.eval.to_dict("list") == {"row": [3, 5, 8], "sentence": ["0007", "NA", "é"], "label": [1, 0, 1]}
    head = Classes(("POSITIVE", "NEGATIVE"), "the model m", is_fixed=True)
    assert load_text_data("glue/sst2", classes=head).eval["label"].tolist() == [0, 1, 0]


def test_label_that_only_evaluation_has(tmp_path: Path) -> None:
    train = save(tmp_path, sentence=["a", "b"], label=[0, 1])
    dev = save(tmp_path, "dev.csv", sentence=["a", "b"], label=[0, 7])
    with pytest.raises(InputError, match="lacks: 7; known: 0, 1"):
        load_text_data(train, eval_file=dev)


def test_unknown_and_unreadable_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'glue/sst2'"):
        load_text_data("glue/sst")
    with pytest.raises(InputError, match="no file"):
        load_text_data(str(tmp_path / "nothing.csv"))
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(InputError, match="cannot be read as json"):
        read_table(tmp_path / "broken.json")
    with pytest.raises(InputError, match="from the hub"):  # the suite is offline
        load_text_data("glue/rte")


def test_docstrings_split_by_module_without_shared_text_and_repeatably(monkeypatch: pytest.MonkeyPatch) -> None:
    data = harvest_docstrings()
    assert data.labels == LIBRARIES
    train, held_out = set(data.train["text"]), set(data.eval["text"])
    assert not train & held_out
    assert len(train) == len(data.train)
    assert not any(library in text.lower() for text in train | held_out for library in LIBRARIES)
    assert data.train["label"].value_counts().min() > 300
    assert data.eval["label"].value_counts().min() > 50
    # Each library is read as if those after it were not there: two of them are read again.
    monkeypatch.setattr("sparselora.data.texts.LIBRARIES", LIBRARIES[:2])
    again = harvest_docstrings()
    for whole, part in ((data.train, again.train), (data.eval, again.eval)):
        pd.testing.assert_frame_equal(whole[whole["label"] < 2], part)


@pytest.mark.network
def test_glue_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    data = load_text_data("glue/rte", train_samples=20, eval_samples=20)
    assert len(data.train) == len(data.eval) == 20
