"""Classes of a classifier: the ids of labels are those of the head, recorded on training and read back."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparselora.__main__ import main
from sparselora.data.texts import load_text_data
from sparselora.errors import InputError
from sparselora.models.adapter_files import write_files
from sparselora.models.class_names import Classes, read_classes, recorded_names

NAMES = ("entailment", "neutral", "contradiction")


def lines(path: Path, rows: list[tuple[str, Any]]) -> str:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def rows_of(labels: list[Any], n: int = 15) -> list[tuple[str, Any]]:
    return [(f"w{i}", labels[i % len(labels)]) for i in range(n)]


# --- which labels are which class ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "labels", "fixed", "free"),
    [
        (NAMES, NAMES, [0, 1, 2], [0, 1, 2]),
        (NAMES, sorted(NAMES), [2, 0, 1], [2, 0, 1]),
        (NAMES, ["neutral"], [1], [1]),
        (NAMES, ["NEUTRAL", "Entailment"], [1, 0], [1, 0]),
        (NAMES, ["0", "1", "2"], [0, 1, 2], [0, 1, 2]),
        (NAMES, ["0", "2"], [0, 2], None),
        (NAMES, ["0", "3"], None, None),
        (NAMES, ["00", "1"], None, None),
        (NAMES, ["neutral", "other"], None, None),
        (NAMES, ["neutral", "Neutral"], None, None),
        (NAMES, ["0", "neutral"], None, None),
        (("a", "A"), ["A"], [1], [1]),
        (("1", "2"), ["1", "2"], [0, 1], [0, 1]),
        (("1", "2"), ["0", "1"], None, None),
        (("0", "1", "10", "2"), ["2", "10"], [3, 2], [3, 2]),
        (("LABEL_0", "LABEL_1"), ["0", "1"], [0, 1], None),
        (("LABEL_0", "LABEL_1"), ["no", "yes"], None, None),
    ],
)
def test_ids_of_labels(names: tuple[str, ...], labels: list[str], fixed: list | None, free: list | None) -> None:
    for is_fixed, expected in ((True, fixed), (False, free)):
        ids = Classes(names, "the model m", is_fixed).ids(labels)
        assert (None if ids is None else [ids[label] for label in labels]) == expected


def test_data_take_the_ids_of_the_head_in_any_order_of_the_names(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", rows_of(["b", "a", "c"]))
    for names in itertools.permutations("abc"):
        for is_fixed in (True, False):
            data = load_text_data(path, classes=Classes(names, "the model m", is_fixed))
            assert data.labels == names
            for frame in (data.train, data.eval):
                assert [names[i] for i in frame["label"]] == ["bac"[row % 3] for row in frame["row"]]
    assert load_text_data(path).labels == ("a", "b", "c")


def test_a_fixed_head_says_what_differs_and_another_is_replaced(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", rows_of(["b", "a", "other"]))
    with pytest.raises(InputError) as caught:
        load_text_data(path, classes=Classes(("a", "b"), "the adapter run/adapter", is_fixed=True))
    assert str(caught.value) == (
        "the adapter run/adapter knows 2 classes (a, b), x 3 (a, b, other); give data with the labels it was trained on"
    )
    assert load_text_data(path, classes=Classes(("a", "b"), "the model m", is_fixed=False)).labels == (
        "a",
        "b",
        "other",
    )


def test_a_fixed_head_is_evaluated_on_rows_of_one_class_and_on_one_that_training_rows_lack(tmp_path: Path) -> None:
    classes = Classes(NAMES, "the model m", is_fixed=True)
    one = load_text_data(lines(tmp_path / "x.jsonl", rows_of(["neutral"])), classes=classes)
    assert set(one.eval["label"]) == {1}
    other = lines(tmp_path / "y.jsonl", rows_of(["contradiction"]))
    assert set(load_text_data(str(tmp_path / "x.jsonl"), eval_file=other, classes=classes).eval["label"]) == {2}
    with pytest.raises(InputError, match="one class only"):
        load_text_data(str(tmp_path / "x.jsonl"))


# --- the record ---------------------------------------------------------------------------------------------------


def test_a_record_holds_any_name_and_none_is_written_without(tmp_path: Path) -> None:
    names = ("ja, ü", "no\n", "", *map(str, range(12)))
    for written in (names, ()):
        write_files(tmp_path, {}, {"x": torch.ones(2)}, {"m": 1}, written)
        assert recorded_names(tmp_path) == written
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            assert file.metadata()["format"] == "pt"
            assert json.loads(file.metadata()["ranks"]) == {"m": 1}


@pytest.mark.parametrize("text", ["{", "[]", '{"0": 1}', '{"1": "a"}', '{"0": "a", "1": "a"}', "[" * 100_000, "null"])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors", metadata={"id2label": text})
    with pytest.raises(InputError, match="which are none; train it again") as caught:
        recorded_names(tmp_path)
    assert "\n" not in str(caught.value)


def test_classes_of_a_model_are_read_only_where_it_has_a_head(tmp_path: Path, tiny_bert: Path) -> None:
    assert read_classes(str(tiny_bert)) is None
    with pytest.raises(InputError, match="nothing"):
        read_classes(str(tmp_path / "nothing"))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    model.config.id2label = dict(enumerate(NAMES))
    model.save_pretrained(tmp_path / "model")
    classes = read_classes(str(tmp_path / "model"))
    assert classes is not None
    assert classes.names == NAMES


# --- through the commands -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A classifier whose configuration names its classes, not in the order of the alphabet, and what it predicts."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(1)
    model: Any = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3).eval()
    torch.nn.init.normal_(model.classifier.weight, std=3.0)
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(folder)
    batch = tokenizer([f"w{i}" for i in range(15)], return_tensors="pt")
    return folder, model(**batch).logits.argmax(dim=1).tolist()


def test_eval_reads_the_names_of_a_published_classifier(published: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder, predicted = published
    assert len({*predicted}) > 1
    for kind in ("words", "numbers"):  # rows that are right by construction
        rows = [(f"w{i}", NAMES[p] if kind == "words" else p) for i, p in enumerate(predicted)]
        data = ["--dataset", lines(tmp_path / f"{kind}.jsonl", rows), "--task", "classification"]
        assert main(["eval", "--model", str(folder), *data, "--out_dir", str(tmp_path / kind)]) == 0
        assert json.loads((tmp_path / kind / "metrics_classification.json").read_text())["accuracy"] == 1.0


def test_train_records_its_classes_and_eval_reads_them_back(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"w{i % 50} w{i % 7}", "abc"[i % 3]) for i in range(60)]
    run = tmp_path / "run"
    train = ["--dataset", lines(tmp_path / "three.jsonl", rows), "--task", "classification", "--max_steps", "2"]
    assert main(["train", "--model", str(tiny_bert), *train, "--lora_r", "2", "--out_dir", str(run)]) == 0
    assert recorded_names(run / "adapter") == ("a", "b", "c")
    reduce = ["--adapter", str(run / "adapter"), "--rank", "1", "--out_dir", str(tmp_path / "reduced")]
    assert main(["reduce", *reduce]) == 0
    assert recorded_names(tmp_path / "reduced") == ("a", "b", "c"), "an edit carries the record"

    def evaluate(name: str, part: list[tuple[str, str]]) -> int:
        data = ["--eval_file", lines(tmp_path / f"{name}.jsonl", part), "--task", "classification"]
        model = ["--model", str(tiny_bert), "--adapter", str(run / "adapter")]
        return main(["eval", *model, *data, "--out_dir", str(tmp_path / name)])

    assert evaluate("all", rows) == evaluate("without_a", [row for row in rows if row[1] != "a"]) == 0
    assert "the adapter knows 3 classes (a, b, c), the file 2" in capsys.readouterr().out
    everything, some = (pd.read_csv(tmp_path / name / "items_classification.csv") for name in ("all", "without_a"))
    expected = everything[everything["label"] != 0]
    assert some[["label", "predicted"]].to_numpy().tolist() == expected[["label", "predicted"]].to_numpy().tolist()
    assert some["loss"].to_numpy() == pytest.approx(expected["loss"].to_numpy(), abs=1e-5)
    assert evaluate("renamed", [(text, label.replace("c", "see")) for text, label in rows]) == 2
    assert not (tmp_path / "renamed").exists()
    error = capsys.readouterr().err
    assert "adapter knows 3 classes (a, b, c), renamed 3 (a, b, see)" in error
    assert error.count("\n") == 1
