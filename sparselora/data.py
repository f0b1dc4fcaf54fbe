"""Text classification data: GLUE by name, local tables, and documentation strings harvested from installed packages.

Every source becomes a `TextData`: two frames with the columns ``row`` (the row id in the source), the text fields, and
``label`` (a class id), already checked: no missing text or label, two classes or more, none that only evaluation has.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sparselora.errors import InputError, suggest


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
"""The GLUE tasks with class labels; ``metric`` is the task's own, reported beside accuracy."""

TEXT_FIELDS = (
    ("sentence",),
    ("text",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""Column names tried, in this order, when a local file is given without ``text_fields``."""

FILE_KINDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

_HELD_OUT_EVERY = 5
_EVAL_SUBSET_SEED = 0


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
) -> TextData:
    """Load ``dataset`` and take ``train_samples`` and ``eval_samples`` rows of it (0: all).

    The training subset is drawn by ``seed``; the evaluation subset is the same for every seed, so that runs can be
    compared sentence by sentence. A local file without ``eval_file`` holds out every fifth row.

    Args:
        dataset: ``glue/<task>``, ``docstrings``, or the path of a csv, tsv, json, jsonl or parquet file (``.gz`` too).
    Raises:
        InputError: unknown name, ``eval_file`` or ``text_fields`` for a named data set, missing file or column, empty
            or one-class data, unlabelled rows, a label that only the evaluation data has, a hub that cannot be reached.
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
    elif dataset.removesuffix(".gz").endswith(FILE_KINDS):
        data = _load_files(dataset, eval_file, text_fields, label_field)
    else:
        known = (*GLUE, "docstrings")
        raise InputError(
            f"unknown dataset {dataset!r}{suggest(dataset, known)}; "
            f"use one of {', '.join(known)}, or a file that ends in {', '.join(FILE_KINDS)} (.gz too)"
        )
    train = _subset(data.train, train_samples, seed)
    held_out = _subset(data.eval, eval_samples, _EVAL_SUBSET_SEED)
    if train["label"].nunique() < 2:
        raise InputError(
            f"training data of {data.name} has one class only in {len(train)} rows; take more --train_samples"
        )
    return TextData(data.name, train, held_out, data.text_fields, data.labels, data.metric)


def _subset(frame: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    if count == 0 or count >= len(frame):
        return frame
    index = np.random.default_rng(seed).permutation(len(frame))[:count]
    return frame.iloc[np.sort(index)].reset_index(drop=True)


# --- GLUE ----------------------------------------------------------------------------------------------------------


def _load_glue(name: str) -> TextData:
    import datasets

    task = GLUE[name]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one clear line, not a line for every retry
    try:
        loaded = datasets.load_dataset("nyu-mll/glue", name.removeprefix("glue/"))
    except Exception as error:  # the hub client raises a dozen kinds, all of them "not to be had"
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"dataset {name} could not be loaded from the hub ({reason}); go online once, "
            "or use --dataset docstrings or a local file"
        ) from None
    frames = [loaded[split].to_pandas().rename(columns={"idx": "row"}) for split in ("train", task.eval_split)]
    train, held_out = (frame[["row", *task.text_fields, "label"]] for frame in frames)
    return TextData(name, train, held_out, task.text_fields, task.labels, task.metric)


# --- local files ---------------------------------------------------------------------------------------------------


def _load_files(path: str, eval_path: str | None, text_fields: Sequence[str] | None, label_field: str) -> TextData:
    table = read_table(Path(path))
    fields = _resolve_fields(table, path, text_fields)
    if eval_path is None:
        held = np.arange(len(table)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        raw = {path: table[~held], f"the held-out rows of {path}": table[held]}
    else:
        raw = {path: table, eval_path: read_table(Path(eval_path))}
    frames = [_checked(frame, source, fields, label_field) for source, frame in raw.items()]
    labels = tuple(sorted({str(value) for value in frames[0]["label"]}, key=_label_order))
    if len(labels) < 2:
        raise InputError(
            f"{path} has one class only ({labels[0]!r} in column {label_field!r}); classification needs two"
        )
    ids = {label: i for i, label in enumerate(labels)}
    for source, frame in zip(raw, frames):
        strange = sorted({str(value) for value in frame["label"]} - set(ids))
        if strange:
            raise InputError(
                f"{source} has labels that the training data lacks: {', '.join(strange[:5])}; "
                f"known: {', '.join(labels)}"
            )
        frame["label"] = [ids[str(value)] for value in frame["label"]]
    name = Path(path).name.removesuffix(".gz").rpartition(".")[0]
    return TextData(name, frames[0], frames[1], fields, labels, "accuracy")


def _label_order(label: str) -> tuple[bool, float, str]:
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


def read_table(path: Path) -> pd.DataFrame:
    """A csv, tsv, json (an array of objects), jsonl or parquet file, ``.gz`` too, as a frame.

    Raises:
        InputError: no such file, not one of these kinds, cannot be parsed, or without rows.
    """
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in FILE_KINDS:
        raise InputError(f"{path} is not a table this reads; its name must end in {', '.join(FILE_KINDS)} (.gz too)")
    if not path.is_file():
        raise InputError(f"no file {path}; check the path")
    try:
        if kind == ".parquet":
            table = pd.read_parquet(path)
        elif kind in (".csv", ".tsv"):
            # Texts such as "null" or "NA" are texts; only an empty cell is missing.
            table = pd.read_csv(path, sep="," if kind == ".csv" else "\t", keep_default_na=False, na_values=[""])
        else:
            table = pd.read_json(path, lines=kind == ".jsonl", convert_dates=False)
    except (ValueError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} cannot be read as {kind[1:]} ({reason}); check the file") from None
    if table.empty:
        raise InputError(f"{path} has no rows; give a file with data")
    return table


def _resolve_fields(table: pd.DataFrame, path: str, text_fields: Sequence[str] | None) -> tuple[str, ...]:
    if text_fields:
        return tuple(text_fields)
    for candidate in TEXT_FIELDS:
        if set(candidate) <= set(table.columns):
            return candidate
    raise InputError(
        f"{path} has no text column of a usual name; its columns are {_columns(table)}: name one by --text_field"
    )


def _columns(table: pd.DataFrame) -> str:
    return ", ".join(map(str, table.columns))


def _checked(table: pd.DataFrame, path: str, fields: tuple[str, ...], label_field: str) -> pd.DataFrame:
    if len(fields) > 2:
        raise InputError(f"at most two text fields make a pair, got {len(fields)}: {', '.join(fields)}")
    if table.empty:
        raise InputError(f"{path} is empty; give a file with more rows, or an --eval_file")
    for column in (*fields, label_field):
        if column not in table.columns:
            raise InputError(
                f"{path} has no column {column!r}{suggest(column, table.columns)}; its columns are {_columns(table)}"
            )
        missing = table.index[table[column].isna()]
        if len(missing):
            raise InputError(
                f"{path} has {len(missing)} rows without {column!r}, the first is row {missing[0]}; remove them"
            )
    frame = pd.DataFrame({"row": table.index.to_numpy()})
    for column in fields:
        frame[column] = table[column].astype(str).to_numpy()
    label = table[label_field]
    # A column of whole numbers that pandas read as floats is still a column of class ids.
    whole = pd.api.types.is_float_dtype(label) and bool((label % 1 == 0).all())
    frame["label"] = (label.astype(int) if whole else label).to_numpy()
    if pd.api.types.is_float_dtype(frame["label"]):
        raise InputError(f"{path} column {label_field!r} holds real numbers ({frame['label'].iloc[0]}), not classes")
    if pd.api.types.is_integer_dtype(frame["label"]) and (frame["label"] < 0).any():
        raise InputError(f"{path} has negative labels in {label_field!r}, which mark unlabelled rows; remove them")
    return frame


# --- documentation strings -----------------------------------------------------------------------------------------

LIBRARIES = ("matplotlib", "numpy", "pandas", "scipy", "sklearn")
"""Packages that `harvest_docstrings` reads; each is a class."""

_SENTENCES_PER_LIBRARY = 1000
_WORDS = range(6, 25)
_GIVEAWAY = re.compile(
    "|".join((*LIBRARIES, r"\b(np|pd|plt|mpl|scikit|learn|estimators?)\b", ">>>", "::")), re.IGNORECASE
)


def harvest_docstrings() -> TextData:
    """Which library does this sentence of documentation come from?

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
                    rows.append((sentence, label, _digest(module) % _HELD_OUT_EVERY == 0))
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
