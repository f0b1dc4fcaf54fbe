"""Rows that are streamed: those of the whole file, in its order, and never all in memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sparselora.__main__ import main
from sparselora.data.instructions import encode_instructions, load_instructions
from sparselora.data.streamed import StreamedRows
from sparselora.errors import InputError
from tests.helpers.byte_llama import byte_tokenizer
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

ODD_ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "completion": 1.50}, {"prompt": "zwei\nlines \u2028 ü", "completion": "x", "extra": None},
    {"completion": True, "prompt": "last"}, {"prompt": "", "completion": "\\n \"quoted\""},
]  # fmt: skip


def write(path: Path, rows: list[Any], end: str = "\n", blank: str = "") -> Path:
    path.write_bytes((end + blank).join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    return path


def loaded(path: Path, **settings: Any) -> Any:
    return load_instructions(str(path), eval_file=str(path), **settings)


@pytest.mark.parametrize("form", [{}, {"end": "\r\n"}, {"blank": "\n  \n\n"}])
@pytest.mark.parametrize("samples", [0, 3])
def test_examples_are_those_of_the_whole_file_in_its_order(tmp_path, form, samples):
    rows = write(tmp_path / "rows.jsonl", ODD_ROWS * 50, **form)
    tokenizer = byte_tokenizer()
    whole = loaded(rows, train_samples=samples, seed=5)
    streamed = loaded(rows, train_samples=samples, seed=5, streaming=True).streamed
    expected = encode_instructions(whole.train, tokenizer, 20, whole.template).examples
    examples = streamed.examples(tokenizer, 20)
    assert list(examples) == expected
    assert streamed.rows.rows.tolist() == whole.train["row"].tolist()
    assert [examples[i] for i in (-1, 1, 0)] == [expected[i] for i in (-1, 1, 0)]
    with pytest.raises(IndexError):
        examples[len(expected)]


def test_a_file_without_a_last_line_end_and_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "p", "completion": "c"}).encode())
    rows = StreamedRows.of(str(tmp_path / "a.jsonl"))
    assert rows.table(0).columns == {"prompt": ["p"], "completion": ["c"]}


def test_lines_that_reach_over_pieces_of_the_file(tmp_path, monkeypatch):
    """Of a few bytes each; the reference is Python's own splitting into lines."""
    monkeypatch.setattr("sparselora.data.streamed._CHUNK", 7)
    rng = np.random.default_rng(0)
    for trial in range(40):
        lines = [" " * int(rng.integers(3)) + "x" * int(rng.integers(20)) for _ in range(int(rng.integers(1, 9)))]
        content = "\n".join([*lines, "y"]).encode()
        (tmp_path / f"{trial}.jsonl").write_bytes(content)
        rows = StreamedRows.of(str(tmp_path / f"{trial}.jsonl"))
        spans = zip(rows.starts.tolist(), rows.stops.tolist())
        assert [content[start:stop] for start, stop in spans] == [x for x in content.split(b"\n") if x.strip()]


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """The peak of a pass over 4,000 rows; the control has them all."""
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "p" * 900 + str(i), "completion": "c"} for i in range(4000)])
    tokenizer = byte_tokenizer(2000)

    def peak(read: Any) -> int:
        tracemalloc.start()
        try:
            read()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    streamed = loaded(rows.parent / "rows.jsonl", streaming=True).streamed.examples(tokenizer, 1000)
    assert peak(lambda: [len(streamed[i]["input_ids"]) for i in range(0, len(streamed), 4)]) < 1 << 20
    assert peak(lambda: [streamed[i] for i in range(0, len(streamed), 4)]) > 8 << 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"prompt": "a", "completion": "b"}\n' * 70 + b'{"prompt": "a"\n', "row 70 cannot be read"),
        (b'{"prompt": "a", "completion": "b"}\n' * 70 + b'{"prompt": "\xff", "completion": "b"}', "row 70 cannot be"),
        (b'{"prompt": "a", "completion": "b"}\n' * 70 + b'{"prompt": "a", "completion": " "}', "row 70"),
        (
            b'{"prompt": "a", "completion": "b"}\n' * 70 + b'{"prompt": "a"}',
            "without 'completion', the first is row 70",
        ),
        (b'{"prompt": "a", "completion": "b"}\n' * 70 + b"[1, 2]", r"row 70 cannot be read \(it is no object\)"),
        (b'{"prompt": "a", "completion": "b"}\n' * 70 + b'{"prompt": "a"} {"completion": "b"}', "2 objects in 1 lines"),
    ],
)
def test_a_later_row_that_cannot_be_used_is_named(tmp_path, content, reason):
    (tmp_path / "rows.jsonl").write_bytes(content)
    good = write(tmp_path / "good.jsonl", ODD_ROWS)
    data = load_instructions(str(tmp_path / "rows.jsonl"), eval_file=str(good), streaming=True)
    examples = data.streamed.examples(byte_tokenizer(), 20)
    with pytest.raises(InputError, match=reason):
        examples[70]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.csv", b"prompt,completion\na,b\n", "ends in .jsonl"),
        ("rows.jsonl.gz", b"", "ends in .jsonl"),
        ("rows.jsonl", b"\n \n", "has no rows"),
        ("rows.jsonl", b'[\n{"prompt": "a", "completion": "b"}\n]', "row 0 cannot be read .* one object a line"),
        ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 9 + b'{"prompt": "a"\n', "row 9 cannot be read"),
    ],
)
def test_a_file_that_cannot_be_streamed_is_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason):
        load_instructions(str(tmp_path / name), eval_file=str(write(tmp_path / "g.jsonl", ODD_ROWS)), streaming=True)


def test_a_streamed_run_is_the_run(tmp_path, capsys):
    """Shuffled, in two epochs, with calibration: the same losses and the same bytes. The control is another order."""
    train, dev = (write_instructions(tmp_path / f"{name}.jsonl", 30, seed) for seed, name in enumerate("td"))
    common = [
        "train", "--task", "causal_lm", "--model", str(make_tiny_llama(tmp_path / "llama")), "--dataset", str(train),
        "--eval_file", str(dev), "--epochs", "2", "--lora_r", "4", "--lr", "0.01", "--device", "cpu",
        "--sparsity.mode", "static", "--sparsity.ffn_sparsity", "0.5", "--train_samples", "20",
    ]  # fmt: skip
    for out, flags in (("whole", []), ("streamed", ["--streaming"]), ("other", ["--seed", "1"])):
        assert main([*common, *flags, "--out_dir", str(tmp_path / out)]) == 0
    whole, streamed, other = (pd.read_csv(tmp_path / out / "metrics.csv") for out in ("whole", "streamed", "other"))
    columns = ["loss", "tokens", "outputs"]
    assert streamed[columns].equals(whole[columns])
    assert not np.allclose(other["loss"], whole["loss"])
    names = ("adapter/adapter_model.safetensors", "predictions.csv")
    for name in names:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    capsys.readouterr()
    assert main([*common, "--streaming", "--out_dir", str(tmp_path / "whole")]) == 0
    assert "finished" in capsys.readouterr().out  # known as the same run
    assert main([*common, "--streaming", "--packing", "--out_dir", str(tmp_path / "no")]) == 2
    assert "streaming and packing are both given" in capsys.readouterr().err
    sensitivity = ["sensitivity", *common[1:9], "--max_steps", "1", "--streaming", "--out_dir", str(tmp_path / "no")]
    assert main(sensitivity) == 2
    assert "streaming is for train" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_row_that_is_found_bad_in_a_batch_is_one_line(tmp_path, capsys, workers):
    """Without the traceback of the process that prepared the batch."""
    train, dev = (write_instructions(tmp_path / f"{name}.jsonl", 70, seed) for seed, name in enumerate("td"))
    with train.open("a") as file:
        file.write('{"question": "w1", "answ')
    arguments = [
        "train", "--task", "causal_lm", "--model", str(make_tiny_llama(tmp_path / "llama")), "--dataset", str(train),
        "--eval_file", str(dev), "--device", "cpu", "--streaming", "--dataloader_num_workers", workers,
        "--out_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m sparselora train: error:")
    assert "t.jsonl: row 70 cannot be read" in error
    assert "Traceback" not in error
