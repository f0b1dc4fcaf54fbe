"""Reading tables: every cell arrives as it stands in the source, or the refusal says which cell and why."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import itertools
import json
import lzma
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselora.data import table_files
from sparselora.data.arrow_tables import from_arrow
from sparselora.data.table_files import read_table
from sparselora.data.tables import Number
from sparselora.errors import InputError

LOOKS_LIKE_ANOTHER = [
    "0007", "1.50", "1e3", "10_2", "12345678901234567890123", "true", "NaN", "nan", "NA", "null", "None", "inf", "-0",
    " 5 ", "2020-01-01", "12", "3.0", "é", "\u2028", "a\x0bb\x1cc", '"', "'", "\\", "😀", "[1]", "{}", "#", "=1",
]  # fmt: skip
"""Strings that a reader which guesses types, dates or missing values would change."""


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def refusal(path: Path, field: str = "a") -> str:
    with pytest.raises(InputError) as caught:
        read_table(path).texts(field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- cells stay as they are ---------------------------------------------------------------------------------------

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(LOOKS_LIKE_ANOTHER), min_size=1)
PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1) | st.sampled_from(LOOKS_LIKE_ANOTHER)


@settings(deadline=None)  # it writes files
@given(texts=TEXTS, ascii_only=st.booleans())
def test_strings_of_json_stay_themselves(
    tmp_path_factory: pytest.TempPathFactory, texts: list, ascii_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("json")
    rows = [json.dumps({"a": text, "b": i}, ensure_ascii=ascii_only) for i, text in enumerate(texts)]
    for name, content in (("x.jsonl", "\n".join(rows)), ("x.json", f"[{', '.join(rows)}]")):
        table = read_table(write(folder / name, content))
        assert table.texts("a") == texts
        assert table.texts("b") == [str(i) for i in range(len(texts))]


@settings(deadline=None)  # it writes files
@given(texts=st.lists(PLAIN, min_size=1))
def test_cells_of_csv_and_tsv_stay_as_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("csv")
    with (folder / "x.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("a", "b"), *((text, "1.0") for text in texts)])
    write(folder / "x.tsv", "a\tb\n" + "".join(f"{text}\t1.0\n" for text in texts))
    for name in ("x.csv", "x.tsv"):
        table = read_table(folder / name)
        assert table.texts("a") == texts
        assert table.texts("b") == ["1.0"] * len(texts)


def test_numbers_and_truth_values_of_json_become_texts_as_json_writes_them(tmp_path: Path) -> None:
    literals = ["5", "1.50", "1e3", "-0", "123456789012345678901234", "true", "false", '"5"', '"x"']
    path = write(tmp_path / "x.jsonl", "".join(f'{{"a": {literal}}}\n' for literal in literals))
    table = read_table(path)
    assert table.texts("a") == [literal.strip('"') for literal in literals]
    assert all(type(text) is str for text in table.texts("a"))
    assert [isinstance(cell, Number) for cell in table.columns["a"]] == [True] * 5 + [False] * 4


def test_missing_cells_are_null_nan_absent_or_empty_in_csv_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"a": "", "b": 1}\n{"a": null}\n{"b": 2}\n{"a": NaN, "b": 3}\n')
    table = read_table(path)
    assert table.columns == {"a": ["", None, None, None], "b": ["1", None, "2", "3"]}
    assert table.texts_or_empty("a") == ["", "", "", ""]
    assert refusal(path) == f"{path} has 3 rows without 'a', the first is row 1; remove them"
    for name, text in (("x.csv", 'a,b\n"",1\nNA,2\n'), ("x.tsv", "a\tb\n\t1\nNA\t2\n")):
        assert read_table(write(tmp_path / name, text)).columns == {"a": [None, "NA"], "b": ["1", "2"]}


# --- forms of JSON ------------------------------------------------------------------------------------------------

ROWS = [{"a": "x\ny"}, {"a": "ü"}]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n".join(map(json.dumps, ROWS)),
        "\r\n".join(map(json.dumps, ROWS)) + "\r\n\r\n",
        "\n\n  " + "\n \n".join(map(json.dumps, ROWS)),
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "\ufeff" + json.dumps(ROWS),
    ],
    ids=["array", "indented", "lines", "crlf", "blank lines", "indented lines", "byte order mark"],
)
def test_arrays_and_lines_are_read_under_either_name(tmp_path: Path, name: str, text: str) -> None:
    table = read_table(write(tmp_path / name, text))
    assert table.texts("a") == ["x\ny", "ü"]
    assert table.rows.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "cannot be read as json (Expecting property name enclosed in double quotes, line 1 column 3)"),
        ('{"a": "x"}\n{"a": "y}\n', "line 2 column"),
        ('[{"a": 1}, ]', "cannot be read as json"),
        ('[{"a": 1} {"a": 2}]', "Expecting ',' or ']' delimiter, line 1 column 11"),
        ('[{"a": 1}] {"a": 2}', "more after the end of the array"),
        ('{"a": 1}\n[2]\n', "row 1 is a list, not an object with named fields"),
        ("[1, 2]", "row 0 is a single value, not an object"),
        ("[null]", "row 0 is null"),
        ('{"a": 1, "a": 2}', "an object has 'a' twice"),
        ("[" * 100_000, "it is nested too deep"),
        ('{"data": [{"a": "x"}], "version": 1}', "is one object with a list or an object in data, not rows"),
        ("[]", "has no rows"),
        ("", "has no rows"),
        (" \n\n", "has no rows"),
        ('{"a": "tab\there"}', "Invalid control character"),
        ("a\x00b", "holds zero bytes"),
    ],
)
def test_json_that_is_no_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(write(tmp_path / "x.json", text))


def test_fields_that_differ_in_every_row_do_not_fill_the_memory(tmp_path: Path) -> None:
    rows = "".join(f'{{"a{i}": 1}}\n' for i in range(4000))
    assert "4000 different fields in 4000 rows" in refusal(write(tmp_path / "x.jsonl", rows))
    few_rows = "".join(f'{{"a": 1, "b{i}": 1}}\n' for i in range(40))
    assert read_table(write(tmp_path / "y.jsonl", few_rows)).texts("a") == ["1"] * 40


# --- cells that are no texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (["x", "y"], "a of row 1 is a list, not a text; give a string or a number"),
        ([], "a of row 1 is a list, not a text"),
        ({"x": 1}, "a of row 1 is an object, not a text"),
        ([{"role": "user", "content": "hello"}], "a of row 1 is a list, not a text; it holds chat messages"),
        ({"role": "user", "content": "hello"}, "a of row 1 is an object, not a text; it holds chat messages"),
        (float("inf"), "a of row 1 is an infinite number, not a text"),
        ("x\ud83d 0", "a of row 1 holds \\ud83d, one half of a surrogate pair"),
    ],
)
def test_a_cell_that_is_no_text_is_refused_where_it_is_used(tmp_path: Path, cell: object, message: str) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps({"a": "x", "b": "y"}) + "\n" + json.dumps({"a": cell, "b": "z"}))
    assert message in refusal(path)
    assert read_table(path).texts("b") == ["y", "z"]  # it is not in the way elsewhere


def test_pairs_of_surrogates_are_one_character(tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "x.jsonl", '{"a": "\\ud83d\\ude00"}')).texts("a") == ["😀"]


# --- csv and tsv --------------------------------------------------------------------------------------------------


def test_csv_with_line_ends_and_separators_in_quoted_cells(tmp_path: Path) -> None:
    long = "w" * 200_000  # longer than what the csv module takes by default
    rows = [('say "hi"\nthere', "1"), ("a,b", "2"), (long, "3"), (' "inner" quotes', "4")]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("a", "b"), *rows])
    limit = csv.field_size_limit()
    table = read_table(write(tmp_path / "x.csv", "\ufeff" + buffer.getvalue() + "\r\n   \r\n"))
    assert list(zip(table.texts("a"), table.texts("b"))) == rows
    assert csv.field_size_limit() == limit


def test_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "x.csv", ",a,\n0,x,\n1,y,\n")).columns == {"a": ["x", "y"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n\n1,2,3\n", "line 4 has 3 cells, the header 2"),
        ("a,b\n1\n", "line 2 has 1 cells, the header 2"),
        ('a,b\n"1\n2",3\nx\n', "line 4 has 1 cells"),
        ("a,a\n1,2\n", "two columns 'a'"),
        ("a;b\n1;2\n", "has one column, 'a;b'; cells of a csv are separated by commas, not by ';'"),
        ("a\tb\n1\t2\n", "not by '\\t'"),
        ('a,b\n"x,1\ny,2\n', "cannot be read as csv (unexpected end of data, line 3)"),
        ('a,b\n"x" y,1\n', "cannot be read as csv (',' expected after '\"', line 2)"),
        ("a,b\n", "has no rows"),
        ("", "has no rows"),
        ("a,b\nx\0,1\n", "holds zero bytes"),
    ],
)
def test_csv_that_does_not_say_which_cell_is_where(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(write(tmp_path / "x.csv", text))


def test_quotation_marks_of_tsv_are_characters(tmp_path: Path) -> None:
    cells = ['"begins', "plain", 'ends"', '"whole"', 'in "side"', '"', '""two""', '" No , " she said .', "'"]
    path = write(tmp_path / "x.tsv", "a\tb\r\n" + "".join(f"{cell}\t{i}\r\n" for i, cell in enumerate(cells)))
    table = read_table(path)
    assert table.texts("a") == cells
    assert table.texts("b") == [str(i) for i in range(len(cells))]
    assert read_table(write(tmp_path / "y.tsv", 'a\tb\n"whole"\t1\n')).texts("a") == ['"whole"']


def test_tsv_with_a_quoted_header_is_quoted_throughout(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": ['say "hi"', "plain", '"whole"'], "b": [1, 2, 3]})
    for quoting in (csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC):
        frame.to_csv(tmp_path / "x.tsv", sep="\t", index=False, quoting=quoting)
        assert read_table(tmp_path / "x.tsv").columns == {"a": frame["a"].tolist(), "b": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\nx\t1\t2\n", "line 2 has 3 cells, the header 2; mend the line"),
        ('a\tb\n"x\ny"\t1\n', "line 2 has 1 cells, the header 2; in a tsv a quotation mark hides no tab"),
        ('a\tb\n"x\ty"\t1\n', "line 2 has 3 cells, the header 2; in a tsv a quotation mark hides no tab"),
        ("a,b\nx,1\n", "cells of a tsv are separated by tabs, not by ','"),
        ("a\ta\nx\t1\n", "two columns 'a'"),
    ],
)
def test_tsv_that_does_not_say_which_cell_is_where(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(write(tmp_path / "x.tsv", text))


def test_other_encodings_are_named_by_byte_and_line(tmp_path: Path) -> None:
    assert "is not in UTF-8 (byte 0xe9 in line 3)" in refusal(write(tmp_path / "x.csv", "a,b\nx,1\né,2\n", "latin-1"))
    assert "UTF-16" in refusal(write(tmp_path / "y.csv", "a,b\nx,1\n", "utf-16-le"))
    assert "is not in UTF-8 (byte 0xff in line 1)" in refusal(write(tmp_path / "z.csv", "ÿ", "latin-1"))


# --- Parquet ------------------------------------------------------------------------------------------------------


def test_every_type_of_parquet_is_a_text_or_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chat = [{"role": "user", "content": "x"}]
    columns: dict[str, tuple[pa.Array, list[str] | str]] = {
        "string": (pa.array(["0007", "é"]), ["0007", "é"]),
        "large": (pa.array(["a", "a"], pa.large_string()), ["a", "a"]),
        "category": (pa.array(["b", "a"]).dictionary_encode(), ["b", "a"]),
        "int_category": (pa.array([5, 7]).dictionary_encode(), ["5", "7"]),
        "int": (pa.array([2**53 + 1, -3]), ["9007199254740993", "-3"]),
        "float": (pa.array([1.0, 0.1]), ["1.0", "0.1"]),
        "float32": (pa.array([1.0, 0.1], pa.float32()), ["1.0", "0.1"]),
        "bool": (pa.array([True, False]), ["true", "false"]),
        "decimal": (pa.array([Decimal("1.50"), Decimal("2.00")]), ["1.50", "2.00"]),
        "null": (pa.array([None, None]), "2 rows without 'null'"),
        "nan": (pa.array([1.0, float("nan")]), "1 row without 'nan'"),
        "list": (pa.array([["x"], []]), "list of row 0 is a list, not a text; give a string"),
        "chat": (pa.array([chat, chat]), "chat of row 0 is a list, not a text; it holds chat messages"),
        "struct": (pa.array([{"x": 1}, {"x": 2}]), "struct of row 0 is an object"),
        "bytes": (pa.array([b"x", b"y"]), "bytes of row 0 is bytes, not a text"),
        "date": (pa.array([datetime.date(2020, 1, 2)] * 2), "date of row 0 is a date"),
        "time": (pa.array([datetime.time(1, 2)] * 2), "time of row 0 is of Arrow's type time64"),
    }
    table = pa.table({name: array for name, (array, _) in columns.items()})
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress((tmp_path / "x.parquet").read_bytes()))
    for got in (read_table(tmp_path / "x.parquet"), read_table(tmp_path / "x.parquet.gz"), from_arrow(table, "hub")):
        assert list(got.columns) == list(columns)
        for name, (_, expected) in columns.items():
            if isinstance(expected, list):
                assert got.texts(name) == expected, name
            else:
                with pytest.raises(InputError) as caught:
                    got.texts(name)
                assert expected in str(caught.value)


def test_whole_numbers_beside_a_null_stay_whole(tmp_path: Path) -> None:
    pd.DataFrame({"a": pd.array([1, None, 3], dtype="Int64")}).to_parquet(tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.parquet").columns == {"a": ["1", None, "3"]}


def test_rows_have_the_index_that_pandas_stored(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": list("uvwxyz")})
    for part, rows in ((frame, [0, 1, 2, 3, 4, 5]), (frame[2:], [2, 3, 4, 5]), (frame[frame["a"] > "w"][::2], [3, 5])):
        part.to_parquet(tmp_path / "x.parquet")
        table = read_table(tmp_path / "x.parquet")
        assert table.rows.tolist() == rows
        assert table.columns == {"a": part["a"].tolist()}


# --- damaged and hostile files ------------------------------------------------------------------------------------


def test_a_gzip_that_is_damaged_inside_or_cut_or_none(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f'{{"a": "{i * 7919}"}}\n' for i in range(3000)).encode())
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff" * 40
    for content in (bytes(damaged), whole[: len(whole) // 2], b"plain"):
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        assert "cannot be read as jsonl" in refusal(tmp_path / "x.jsonl.gz")
    (tmp_path / "x.jsonl.gz").write_bytes(whole)
    assert len(read_table(tmp_path / "x.jsonl.gz")) == 3000


def test_what_unpacks_to_far_more_than_a_table_does_is_refused_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = b'{"a": "x"}\n' * 400_000  # 4.4 MB, gzip makes 10 kB of it
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(rows))
    assert len(read_table(tmp_path / "x.jsonl.gz")) == 400_000, "small enough, however it was packed"
    monkeypatch.setattr(table_files, "_UNPACKED_FREE", 1 << 20)
    assert "unpacks to more than 1 MB" in refusal(tmp_path / "x.jsonl.gz")
    write(tmp_path / "x.jsonl", rows.decode())
    assert len(read_table(tmp_path / "x.jsonl")) == 400_000, "a file that is no larger than it says is read"


@pytest.mark.parametrize("columns", ["one long text", "many small numbers", "plain"])
def test_parquet_that_repeats_is_refused_by_what_it_unpacks_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setattr(table_files, "_UNPACKED_FREE", 1 << 20)
    cells: dict[str, list[Any]] = {
        "one long text": ["w" * 10_000] * 2000,
        "many small numbers": [7] * 2_000_000,
        "plain": [f"{i}" + "w" * 5000 for i in range(500)],
    }
    pd.DataFrame({"a": cells[columns]}).to_parquet(tmp_path / "x.parquet", compression="zstd")
    assert (tmp_path / "x.parquet").stat().st_size < 40_000
    assert "unpacks to more than 1 MB" in refusal(tmp_path / "x.parquet")


def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    pd.DataFrame({"a": ["x"] * 50}).to_parquet(tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    for damaged in (content[:-20], content[len(content) // 2 :], b"", b"PAR1" + b"\xff" * 200 + b"PAR1"):
        (tmp_path / "y.parquet").write_bytes(damaged)
        assert "cannot be read as parquet" in refusal(tmp_path / "y.parquet")


def test_names_from_a_file_neither_break_the_line_nor_fill_it(tmp_path: Path) -> None:
    names = ["x\ny", "\x1b[31mred", *(f"column{i}" for i in range(5000))]
    row = json.dumps(dict.fromkeys(names, 1))
    message = refusal(write(tmp_path / "x.jsonl", row), "missing")
    assert "\x1b" not in message
    assert "and 4994 more" in message
    assert len(message) < 400 + len(str(tmp_path))


# --- real data ----------------------------------------------------------------------------------------------------


def _opened(path: Path) -> io.TextIOBase:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8", newline="")  # type: ignore[operator]


def test_every_shared_file_reads_as_json_itself_says(shared: Path, tmp_path: Path) -> None:
    paths = sorted(path for path in (shared / "data").rglob("*") if ".jsonl" in path.name)
    assert len(paths) > 20
    for path in paths:
        # .xz is no kind that is read: some of its rows are, under another name.
        with _opened(path) as file:
            rows = [json.loads(line) for line in itertools.islice(file, 500 if path.suffix == ".xz" else None)]
        if path.suffix == ".xz":
            path = write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        table = read_table(path)
        assert list(table.columns) == list(dict.fromkeys(name for row in rows for name in row))
        for field, cells in table.columns.items():
            expected = [row.get(field) for row in rows]
            if all(isinstance(value, str) for value in expected):
                assert table.texts(field) == expected, (path, field)
            elif all(isinstance(value, (int, float)) for value in expected):
                assert [json.loads(text) for text in table.texts(field)] == expected, (path, field)
            else:
                assert [cell is None for cell in cells] == [value is None for value in expected]


@pytest.mark.parametrize(
    ("name", "fields"),
    [("mrpc_train.jsonl", ("sentence1", "sentence2", "label")), ("qqp_dev.jsonl", ("question1", "question2", "label"))],
)
def test_real_texts_survive_csv_and_tsv(shared: Path, tmp_path: Path, name: str, fields: tuple[str, ...]) -> None:
    lines = (shared / "data" / "glue" / name).read_text(encoding="utf-8").split("\n")
    rows = [[str(json.loads(line)[field]) for field in fields] for line in lines if line]
    assert any(cell.startswith('"') for row in rows for cell in row), "the test has something to test"
    write(tmp_path / "x.tsv", "".join("\t".join(row) + "\n" for row in [fields, *rows]))
    with (tmp_path / "x.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([fields, *rows])
    for path in (tmp_path / "x.tsv", tmp_path / "x.csv"):
        table = read_table(path)
        assert list(zip(*(table.texts(field) for field in fields))) == [tuple(row) for row in rows]
