"""Files of text, JSON and YAML that would hang a reader, end it in a traceback, or mean two things."""

from __future__ import annotations

import json
import os
import time

import pytest

from sparselora.config.yaml_text import parse_yaml, read_yaml
from sparselora.errors import InputError, one_line, shown, suggest
from sparselora.runs.user_files import DEEPEST, expand_user, parse_json, read_json, read_json_object, read_text

# --- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested"),
        ("[" * 100_000 + "]" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "Infinity"),
        ('{"r": 1e400}', "1e400"),
        ('{"\\ud800": 1}', "half a character"),
        ('["\\uDFFF"]', "half a character"),
        ("1" * 5000, "no valid JSON"),
        ("{'a': 1}", "no valid JSON"),
        ("", "no valid JSON"),
        (b"\xff\xfe{\x00}\x00", "no valid JSON"),
    ],
)
def test_hostile_json_is_refused_at_once(text, reason):
    began = time.monotonic()
    with pytest.raises(InputError, match=reason):
        parse_json(text)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "value", [{}, [], None, 1.5, {"a": {"b": [1, "é😀", True]}}, json.loads("[" * DEEPEST + "1" + "]" * DEEPEST)]
)
def test_plain_json_is_read_as_the_standard_library_does(value, tmp_path):
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode("utf-8-sig")) == value
    (tmp_path / "a.json").write_text(text, encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == value


def test_numbers_that_are_not_finite_are_read_where_the_caller_allows_them():
    nan, above, below = parse_json('{"a": NaN, "b": 1e400, "c": -Infinity}', allow_nan=True).values()
    assert nan != nan
    assert (above, below) == (float("inf"), float("-inf"))


def test_errors_of_a_file_name_it_and_end_with_what_to_do(tmp_path):
    path = tmp_path / "adapter_config.json"
    what = "adapter_config.json in folder ad"
    with pytest.raises(InputError, match=r"^adapter_config.json in folder ad cannot be read \(no such .*\); restore"):
        read_json(path, what)
    for data, reason in (
        (b"\xff", "not UTF-8"),
        (b"{", "no valid JSON"),
        (b"[1]", r"must hold a JSON object, got \[1\]"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"^{what} .*{reason}.*; write it anew$"):
            read_json_object(path, what, remedy="write it anew")
    with pytest.raises(InputError, match="no regular file"):
        read_json(tmp_path)
    path.write_bytes(b"x" * 101)
    assert len(read_text(path, limit=101)) == 101
    with pytest.raises(InputError, match="more than 100 bytes"):
        read_text(path, limit=100)


@pytest.mark.parametrize("name", ["~nosuchuser/a", "x" * 5000 + "/y", "a\0b", "/dev/null/a"])
def test_names_that_no_file_can_have_are_one_line(name):
    for read in (read_text, read_json, read_yaml):
        with pytest.raises(InputError, match="cannot be read"):
            read(name)
    assert str(expand_user("~")) == os.path.expanduser("~")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_place_of_a_json_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="no regular file"):
        read_json(tmp_path / "config.json")


# --- YAML ---------------------------------------------------------------------------------------------------------


def _aliases(levels: int, width: int) -> str:
    """``width ** levels`` texts in a few hundred bytes."""
    lines = [f"a0: &a0 [{', '.join('x' * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (_aliases(9, 9), "more than 10,000 values"),
        (_aliases(30, 2), "more than 10,000 values"),
        (_aliases(2, 40) + "\nb: [" + ", ".join(["*a1"] * 7) + "]", "more than 10,000 values"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: [1, *a]}", "contains itself"),
        ("[" * 100_000, "nested too deep"),
        ("a: " + "{b: " * 100_000, "nested too deep"),
        ("- " * 100_000, "nested too deep"),
        ("x: &d {a: 1}\ny:\n  <<: *d", "line 3: merge keys"),
        ("<<: {a: 1}", "line 1: merge keys"),
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice"),
        ("? {a: b}\n: c", "line 1: a key must be a text, got a list or a mapping"),
        ("a: 1\n? [b]\n: c", "line 2: a key must be a text"),
        ("a: 1\n1.5: 2", "line 2: a key must be a text, got 1.5"),
        ("a: {b: 1, 'b': 2}", "line 1: key 'b' is given twice"),
        ("a: *b", "no valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2", "no valid YAML: expected a single document"),
        ("a: \x07", "no valid YAML"),
        ("%YAML 9.9\n---\na: 1", "no valid YAML"),
        ("a: [" + "1, " * 20_000 + "]", "more than 10,000 values"),
        ("a: !!int ''", "no valid YAML"),
        ("a: !!bool maybe", "no valid YAML"),
        ("a: !!timestamp today", "no valid YAML"),
        ("a: !!map [1]", "no valid YAML"),
        ("a: 2020-13-45", "no valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "no valid YAML"),
        ('a: "\\ud800"', "no valid text"),
        ('a: "b\\0"', "no valid text"),
        ("a: " + "1" * 10_000, "no valid YAML"),
    ],
)
def test_hostile_yaml_is_refused_at_once(text, reason):
    began = time.monotonic()
    with pytest.raises(InputError, match=reason):
        parse_yaml(text)
    assert time.monotonic() - began < 5


def test_lists_are_read_to_the_depth_that_is_said():
    def nested(depth: int) -> str:
        return "a: " + "[" * depth + "]" * depth

    assert parse_yaml(nested(DEEPEST - 1))
    with pytest.raises(InputError, match="nested too deep"):
        parse_yaml(nested(DEEPEST + 1))


def test_a_mapping_of_yaml_1_1_warns_nobody(recwarn):
    assert parse_yaml("%YAML 1.1\n---\na: &a 1\nb: &a 1e-4\nc: *a") == {"a": 1, "b": 1e-4, "c": 1e-4}
    assert not recwarn.list


def test_aliases_that_stay_small_are_read():
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]\nc: *a") == {"a": [1, 2], "b": [[1, 2]] * 2, "c": [1, 2]}


def test_a_configuration_with_a_byte_order_mark_is_read_and_a_huge_one_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("lr: 1e-4\n", encoding="utf-8-sig")
    assert read_yaml(path) == {"lr": 1e-4}
    path.write_text("# " + "x" * 2**20)
    with pytest.raises(InputError, match="more than 262,144 bytes"):
        read_yaml(path)


# --- what an error shows ------------------------------------------------------------------------------------------


def test_a_value_in_an_error_is_short_whatever_it_is():
    cycle: list[object] = []
    cycle.append(cycle)
    wide: object = "x"
    for _ in range(30):
        wide = [wide] * 30  # 30 ** 30 texts in one list
    for value in (cycle, wide, "x" * 10**6, 10**5000, -(16**9000), {"a" * 10**5: 1}, [1.5] * 10**6):
        assert len(shown(value)) < 210
    assert [shown(value) for value in (None, True, "a\n", 1.5, [None])] == ["null", "true", r"'a\n'", "1.5", "[None]"]
    assert suggest("x" * 10**6, ["rank"]) == ""


def test_an_error_is_one_line_that_sends_nothing_to_the_terminal():
    text = one_line("no file a\nb: error: forged\r\x1b[31mred\x1b[0m \u202egnol \udc80 é × →")
    assert text == r"no file a b: error: forged \x1b[31mred\x1b[0m \u202egnol \udc80 é × →"
    long = one_line("begin " + "x" * 10**6 + "; what to do")
    assert len(long) < 1100
    assert long.startswith("begin x")
    assert long.endswith("x; what to do")
