"""Names of a classifier's classes: recorded in the files of its adapter, read back, and matched with labels of data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselora.errors import InputError, few, plain
from sparselora.models.model_files import find_model

RECORD = "id2label"
"""Name of the record: in the configuration of a model, and in the metadata of an adapter's safetensors file."""

_WEIGHTS = "adapter_model.safetensors"
_ID = re.compile(r"0|[1-9][0-9]*")


@dataclass(frozen=True)
class Classes:
    """Classes of a classifier's head.

    Attributes:
        names: their names in the order of their ids.
        source: what records them, for messages.
        is_fixed: the head is used as it is, so a label that it does not know is an error. Else it may be replaced.
    """

    names: tuple[str, ...]
    source: str
    is_fixed: bool

    @property
    def are_named(self) -> bool:
        """Return whether the names are other than those that transformers makes up."""
        return self.names != tuple(f"LABEL_{i}" for i in range(len(self.names)))

    def ids(self, labels: Sequence[str]) -> dict[str, int] | None:
        """The class id of each of ``labels``; None where they are another head's.

        A label is a name, in upper or lower case, or, where no name is a number, an id. A head that may be replaced is
        kept for ids only if all of them occur: 0 and 1 are no two classes of three.
        """
        for spelling in (str, str.casefold):
            ids = {spelling(name): i for i, name in enumerate(self.names)}
            spelled = [spelling(label) for label in labels]
            if len(ids) == len(self.names) and len(set(spelled)) == len(labels) and set(spelled) <= ids.keys():
                return {label: ids[name] for label, name in zip(labels, spelled)}
        if any(_ID.fullmatch(name) for name in self.names) or not all(_ID.fullmatch(label) for label in labels):
            return None
        id_texts = {str(i) for i in range(len(self.names))}
        fits = set(labels) <= id_texts if self.is_fixed else set(labels) == id_texts and self.are_named
        return {label: int(label) for label in labels} if fits else None

    def check(self, labels: Sequence[str], data: str) -> None:
        """Raise where a head that is used as it is does not know ``labels``.

        Raises:
            InputError: it is another head's, or has another number of classes.
        """
        if not self.is_fixed or self.ids(labels) is not None:
            return
        if not self.are_named and len(labels) == len(self.names):
            return  # names were never recorded: the order is that of the labels
        names = f" ({few(self.names)})" if self.are_named else ""
        raise InputError(
            f"{self.source} knows {len(self.names)} classes{names}, {data} {len(labels)} ({few(labels)}); "
            "give data with the labels it was trained on"
        )


def name_classes(model: Any, names: Sequence[str]) -> None:
    """Give the classes of a loaded classifier their names, in its configuration."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}


def record(names: Sequence[str]) -> dict[str, str]:
    """Return metadata of an adapter's weights that record the classes ``names``; empty without any.

    Loaders that know nothing of the record load the adapter all the same.
    """
    if not names:
        return {}
    return {RECORD: json.dumps({str(i): name for i, name in enumerate(names)}, ensure_ascii=False)}


def class_names(model: Any, adapter: str = "default") -> tuple[str, ...]:
    """Names of the classes of a model with an adapter; empty if it is no classifier, or they have no names."""
    if str(model.peft_config[adapter].task_type).rpartition(".")[2] != "SEQ_CLS":
        return ()
    classes = Classes(_names(model.config.id2label), "", is_fixed=True)
    return classes.names if classes.are_named else ()


def read_classes(model: str, adapter: str | None = None, *, is_fixed: bool = True) -> Classes | None:
    """The classes of a classifier: those its adapter records, or, without an adapter, the model's; None for none.

    Without a record, an adapter's classes are in the order of the labels it was trained on.

    Raises:
        InputError: a record that is damaged, a name that is no model's.
    """
    if adapter is not None:
        names = recorded_names(Path(adapter))
        return Classes(names, f"the adapter {adapter}", is_fixed) if names else None
    import transformers

    source = find_model(model)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception:  # whatever it is, loading the model says it
        return None
    if not any("ForSequenceClassification" in name for name in (config.architectures or [])):
        return None  # a head that is not there
    names = _names(config.id2label)
    return Classes(names, f"the model {model}", is_fixed) if names else None


def recorded_names(folder: Path) -> tuple[str, ...]:
    """Names of classes that the adapter in ``folder`` records; empty for none.

    Raises:
        InputError: a record that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / _WEIGHTS).is_file():
        return ()
    try:
        with safe_open(folder / _WEIGHTS, framework="numpy") as file:
            text = (file.metadata() or {}).get(RECORD)
    except (SafetensorError, OSError):  # loading the adapter says it
        return ()
    if text is None:
        return ()
    try:
        names = _names(json.loads(text))
    except (ValueError, RecursionError):
        names = ()
    if not names:
        raise InputError(f"{folder / _WEIGHTS} records its classes as {plain(text)}, which are none; train it again")
    return names


def _names(id2label: object) -> tuple[str, ...]:
    """Names in the order of ids 0, 1, …; empty if that is not what ``id2label`` holds."""
    if not isinstance(id2label, Mapping):
        return ()
    by_id: dict[str, Any] = {str(key): name for key, name in id2label.items()}
    names = [by_id.get(str(i)) for i in range(len(by_id))]
    texts = tuple(name for name in names if isinstance(name, str))
    return texts if len(texts) == len(by_id) == len(set(texts)) else ()
