"""Text classification data: GLUE by name, local tables, and documentation strings harvested from installed packages.

Every source becomes a `TextData`: two frames with the columns ``row`` (the row id in the source), the text fields, and
``label`` (a class id), already checked: no missing text or label, two classes or more, none that only evaluation has.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from sparselora.data.hub import load_from_hub, split_table
from sparselora.data.table_files import FILE_KINDS, is_table, read_table, table_name
from sparselora.data.tables import EVAL_SUBSET_SEED, HELD_OUT_EVERY, Number, Table, cell_text, draw_rows, kind_of
from sparselora.errors import InputError, few, plain, suggest
from sparselora.models.class_names import Classes


@dataclass(frozen=True)
class GlueTask:
    text_fields: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str
    eval_split: str = "validation"


GLUE = {
    "glue/sst2": GlueTask(("sentence",), ("negative", "positive"), "accuracy"),
    "glue/cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "glue/mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1"),
    "glue/qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), "f1"),
    "glue/mnli": GlueTask(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy", "validation_matched"
    ),
    "glue/qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment"), "accuracy"),
    "glue/rte": GlueTask(("sentence1", "sentence2"), ("entailment", "not_entailment"), "accuracy"),
}
"""The GLUE tasks with class labels; ``metric`` is the task's own, reported with accuracy."""

TEXT_FIELDS = (
    ("sentence",),
    ("text",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""Column names tried, in this order, when a local file is given without ``text_fields``."""


@dataclass(frozen=True)
class TextData:
    """``train`` and ``eval`` frames, as the module's docstring says, with the names of what is in them."""

    name: str
    train: pd.DataFrame
    eval: pd.DataFrame
    text_fields: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str


def load_text_data(
    dataset: str,
    *,
    text_fields: Sequence[str] | None = None,
    label_field: str = "label",
    eval_file: str | None = None,
    train_samples: int = 0,
    eval_samples: int = 0,
    seed: int = 0,
    classes: Classes | None = None,
) -> TextData:
    """Load ``dataset`` and take ``train_samples`` and ``eval_samples`` rows of it (0: all).

    The training subset is drawn by ``seed``; the evaluation subset is the same for every seed, so that runs can be
    compared sentence by sentence. A local file without ``eval_file`` holds out every fifth row.

    Classes have the ids that ``classes`` record, if they are those of the data. Else labels that are numbers come in
    their order, and words after them in that of their characters. A label of csv or tsv, or a string, is the class that
    is written there ("01" is not "1"); a number of JSON or Parquet is its whole number (1.0 is 1).

    Args:
        dataset: ``glue/<task>``, ``docstrings``, or the path of a csv, tsv, json, jsonl or parquet file (``.gz`` too).
        classes: of the model or adapter that is trained or evaluated, where they are recorded.
    Raises:
        InputError: unknown name, ``eval_file`` or ``text_fields`` for a named data set, missing file or column, the
            same column twice, empty or one-class data, unlabelled rows, texts or labels that are none, a label that
            only the evaluation data has, classes that a fixed head does not know, a hub that cannot be reached.
    """
    if train_samples < 0 or eval_samples < 0:
        raise InputError(f"sample counts must be 0 (all rows) or more, got {min(train_samples, eval_samples)}")
    if (dataset == "docstrings" or dataset in GLUE) and (eval_file or text_fields):
        raise InputError(
            f"dataset {dataset} has its own text and evaluation rows; text fields and eval_file are for files"
        )
    if dataset == "docstrings":
        data = harvest_docstrings()
    elif dataset in GLUE:
        data = _load_glue(dataset)
    elif is_table(dataset):
        data = _load_files(dataset, eval_file, text_fields, label_field, classes)
    else:
        names = (*GLUE, "docstrings")
        raise InputError(
            f"unknown dataset {dataset!r}{suggest(dataset, names)}; "
            f"use one of {', '.join(names)}, or a file that ends in {', '.join(FILE_KINDS)} (.gz too)"
        )
    if classes is not None:
        data = _aligned(data, classes)
    train = draw_rows(data.train, train_samples, seed)
    held_out = draw_rows(data.eval, eval_samples, EVAL_SUBSET_SEED)
    if train["label"].nunique() < 2 and not _is_fixed(classes):
        raise InputError(
            f"training data of {data.name} has one class only in {len(train)} rows; take more --train_samples"
        )
    return TextData(data.name, train, held_out, data.text_fields, data.labels, data.metric)


def _is_fixed(classes: Classes | None) -> bool:
    return classes is not None and classes.is_fixed


def _aligned(data: TextData, classes: Classes) -> TextData:
    """``data`` with the class ids of ``classes``, where its labels are theirs."""
    classes.check(data.labels, data.name)
    ids = classes.ids(data.labels)
    if ids is None:
        return data
    order = np.array([ids[label] for label in data.labels])
    train, held_out = (frame.assign(label=order[frame["label"].to_numpy()]) for frame in (data.train, data.eval))
    return replace(data, train=train, eval=held_out, labels=classes.names)


# --- GLUE ----------------------------------------------------------------------------------------------------------


def _load_glue(name: str) -> TextData:
    task = GLUE[name]
    loaded = load_from_hub(
        "nyu-mll/glue",
        name.removeprefix("glue/"),
        f"dataset {name}",
        "go online once, or use --dataset docstrings or a local file",
    )
    frames = []
    for split in ("train", task.eval_split):
        table = split_table(loaded, split, f"{name} ({split})")
        texts = {field: table.texts(field) for field in task.text_fields}
        numbers = {field: [int(cell) for cell in table.cells(field)] for field in ("idx", "label")}
        frames.append(pd.DataFrame({"row": numbers["idx"], **texts, "label": numbers["label"]}))
    return TextData(name, frames[0], frames[1], task.text_fields, task.labels, task.metric)


# --- local files ---------------------------------------------------------------------------------------------------


def _load_files(
    path: str, eval_path: str | None, text_fields: Sequence[str] | None, label_field: str, classes: Classes | None
) -> TextData:
    _refuse_repeated(text_fields, label_field)
    table = read_table(path)
    fields = tuple(text_fields) if text_fields else _usual_fields(table, label_field)
    parts = table.held_out() if eval_path is None else (table, read_table(eval_path))
    frames = [_frame(part, fields, label_field) for part in parts]
    train, held_out = (set(frame["label"]) for frame in frames)
    # A head that is used as it is says what the classes are; else the training rows do.
    labels = tuple(sorted(train | held_out if _is_fixed(classes) else train, key=_label_order))
    if len(labels) < 2 and not _is_fixed(classes):
        raise InputError(
            f"{path} has one class only ({plain(labels[0])!r} in column {label_field!r}); classification needs two"
        )
    strange = sorted(held_out - set(labels), key=_label_order)
    if strange:
        raise InputError(
            f"{parts[1].source} has labels that the training data lacks: {few(strange, 5)}; known: {few(labels)}"
        )
    ids = {label: i for i, label in enumerate(labels)}
    train_frame, eval_frame = (frame.assign(label=[ids[label] for label in frame["label"]]) for frame in frames)
    return TextData(table_name(path), train_frame, eval_frame, fields, labels, "accuracy")


def _refuse_repeated(text_fields: Sequence[str] | None, label_field: str) -> None:
    fields = tuple(text_fields or ())
    if len(fields) > 2:
        raise InputError(f"at most two text fields make a pair, got {len(fields)}: {few(fields)}")
    if len(set(fields)) < len(fields):
        raise InputError(f"the two text fields are both {fields[0]!r}; name two different columns, or one")
    if {"row", "label"} & set(fields) - {label_field}:
        raise InputError("a text field cannot be called 'row' or 'label'; rename the column")
    if label_field in fields:
        raise InputError(f"column {label_field!r} is the text field and the label field; name two different columns")


def _usual_fields(table: Table, label_field: str) -> tuple[str, ...]:
    for candidate in TEXT_FIELDS:
        if set(candidate) <= table.columns.keys() - {label_field}:
            return candidate
    raise InputError(
        f"{table.source} has no text column of a usual name; its columns are {few(table.columns)}: "
        "name one by --text_fields"
    )


def _frame(table: Table, fields: tuple[str, ...], label_field: str) -> pd.DataFrame:
    """Row ids, texts, and labels by name."""
    columns = {"row": table.rows} | {field: table.texts(field) for field in fields}
    return pd.DataFrame(columns | {"label": _labels(table, label_field)})


_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"(-?[0-9]+)(\.0*)?")


def _labels(table: Table, field: str) -> list[str]:
    """The class of each row, by name."""
    labels, numbers = [], []
    for i, cell in enumerate(table.cells(field)):
        if not isinstance(cell, (str, bool)):
            raise InputError(
                f"{table.where(field, i)} is {kind_of(cell)[0]}, not a class; one class a row is supported"
            )
        label = cell_text(cell, table.where(field, i))
        if not label:
            raise InputError(f"{table.where(field, i)} is empty; name the class, or remove the row")
        if isinstance(cell, Number) or (not table.is_typed and _NUMBER.fullmatch(label)):
            numbers.append(i)
        labels.append(label)
    # In csv and tsv nothing is a number by type: a column is one of numbers if all its cells are.
    if not table.is_typed and len(numbers) < len(labels):
        return labels
    for i in numbers:
        whole = _WHOLE.fullmatch(labels[i])
        if whole is None:
            raise InputError(
                f"{table.source} column {field!r} holds real numbers ({plain(labels[i])} in row {table.rows[i]}), not "
                "classes; give whole numbers or words"
            )
        if labels[i].startswith("-") and whole[1].strip("-0"):
            raise InputError(
                f"{table.source} has negative labels in {field!r} ({plain(labels[i])} in row {table.rows[i]}), which "
                "mark unlabelled rows; remove them"
            )
        if table.is_typed:
            labels[i] = whole[1].lstrip("-")
    return labels


def _label_order(label: str) -> tuple[bool, float, str]:
    """Numbers by their size, before words by their characters."""
    return (False, float(label), label) if _NUMBER.fullmatch(label) else (True, 0.0, label)


# --- documentation strings -----------------------------------------------------------------------------------------

LIBRARIES = ("matplotlib", "numpy", "pandas", "scipy", "sklearn")
"""Packages that `harvest_docstrings` reads; each is a class."""

_SENTENCES_PER_LIBRARY = 1000
_WORDS = range(6, 25)
_GIVEAWAY = re.compile(
    "|".join((*LIBRARIES, r"\b(np|pd|plt|mpl|scikit|learn|estimators?)\b", ">>>", "::")), re.IGNORECASE
)


def harvest_docstrings() -> TextData:
    """Return a classification task: the library that a sentence of documentation comes from.

    Sentences of the documentation strings of `LIBRARIES`, read from the installed source files without importing them.
    Whole modules go to training or (one in five, by a hash of the module's name) to evaluation, a sentence that
    occurs twice is used once, and sentences that name a library are left out. The same package versions give
    the same data.
    """
    rows = []
    seen: set[str] = set()
    for label, library in enumerate(LIBRARIES):
        count = 0
        for module, path in _modules(library):
            for sentence in _sentences(path):
                key = sentence.lower()
                if key not in seen:
                    seen.add(key)
                    rows.append((sentence, label, _digest(module) % HELD_OUT_EVERY == 0))
                    count += 1
            if count >= _SENTENCES_PER_LIBRARY:
                break
        if count == 0:
            raise InputError(
                f"dataset 'docstrings' found no documentation in {library}; is it installed with its sources?"
            )
    frame = pd.DataFrame(rows, columns=["text", "label", "held_out"])
    frame.insert(0, "row", np.arange(len(frame)))
    parts = [frame[frame["held_out"] == held].drop(columns="held_out").reset_index(drop=True) for held in (False, True)]
    return TextData("docstrings", parts[0], parts[1], ("text",), LIBRARIES, "accuracy")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _modules(library: str) -> Iterator[tuple[str, Path]]:
    """(module name, file) of a library, tests left out, in the order of a hash: any prefix is a sample of the whole."""
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise InputError(f"dataset 'docstrings' needs the package {library}; install the requirements")
    root = Path(spec.origin).parent
    names = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    modules = {
        f"{library}/{name}": path for name, path in names.items() if not re.search(r"(^|/)_?tests?(/|ing)", name)
    }
    return iter(sorted(modules.items(), key=lambda item: _digest(item[0])))


def _sentences(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _prose(ast.get_docstring(node) or "")


def _prose(docstring: str) -> Iterator[str]:
    """Plain sentences of a docstring's text before its first underlined section."""
    head = re.split(r"\n[^\n]+\n\s*[-=~]{3,}", "\n" + docstring, maxsplit=1)[0]
    for paragraph in re.split(r"\n\s*\n", head):
        text = " ".join(re.sub(r":[\w:]+:`[~!]?([^`<]+)[^`]*`", r"\1", paragraph).replace("`", "").split())
        if text.startswith(("..", "*", "-", "@", "#")):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
            plain = sentence.isascii() and sentence[:1].isupper() and sentence.endswith(".")
            if plain and len(sentence.split()) in _WORDS and not _GIVEAWAY.search(sentence):
                yield sentence
