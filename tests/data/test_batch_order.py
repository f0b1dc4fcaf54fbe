"""The order of batches that are kept together, and marks of planted near-duplicates from the file to the example."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparselora.data.batches import BatchOrder, Collator
from sparselora.data.instructions import load_instructions
from sparselora.errors import InputError


@pytest.mark.parametrize(("count", "size"), [(20, 4), (23, 4), (3, 4), (1, 1), (12, 1)])
def test_batches_are_whole_and_every_row_comes_once(count: int, size: int) -> None:
    order = BatchOrder(count, size, seed=3)
    assert len(order) == count
    indices = list(order)
    assert sorted(indices) == list(range(count))
    for start in range(0, count, size):
        batch = indices[start : start + size]
        assert batch[0] % size == 0
        assert batch == list(range(batch[0], batch[0] + len(batch)))


def test_the_order_is_that_of_seed_and_epoch() -> None:
    order, same, other = BatchOrder(40, 4, 0), BatchOrder(40, 4, 0), BatchOrder(40, 4, 1)
    assert list(order) == list(same) != list(other)
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first, "the control: another epoch, another order"
    assert list(order) == list(other)  # seed + epoch, as those of similar length


def rows(path: Path, marks: list) -> str:
    lines = [
        {"prompt": f"p{i}", "completion": "c"} | ({} if m is None else {"planted": m}) for i, m in enumerate(marks)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_marks_of_planted_rows_are_read_and_do_not_reach_the_model(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", [0, 1, 1, 0, 0, 1])
    data = load_instructions(path, eval_file=path)
    assert data.train["planted"].tolist() == [0, 1, 1, 0, 0, 1]
    assert "planted" not in load_instructions(rows(tmp_path / "plain.jsonl", [None] * 6)).train
    examples = [{"input_ids": [1, 2], "labels": [-100, 2], "planted": 1} for _ in range(2)]
    assert set(Collator(0, True)(examples)) == {"input_ids", "labels", "attention_mask", "token_counts"}


@pytest.mark.parametrize("mark", [2, "yes", 0.5])
def test_another_mark_is_refused(tmp_path: Path, mark: object) -> None:
    with pytest.raises(InputError, match=r"planted of row 1 is .*marks planted near-duplicates by 1"):
        load_instructions(rows(tmp_path / "rows.jsonl", [0, mark, 1, 0, 0]))
