"""Files that are written whole, and tables that several runs write."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from sparselora.errors import InputError
from sparselora.runs.files import read_rows, read_table, replacing, upsert_row, write_csv, write_json

ROOT = Path(__file__).resolve().parents[2]

# Writes the cells cell_<name>_0 … of one writer of a sweep, one after the other, from a given one on.
WRITER = """
import sys
from pathlib import Path
from sparselora.runs.files import upsert_row
path, name, first, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for i in range(first, count):
    upsert_row(path, {"value": i / 3, "text": "a, \\"b\\"" + "x" * 2000, "run_id": f"{name}_{i}"})
    print(i, flush=True)
"""


def _start(path: Path, name: str, first: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(first), str(count)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# --- results.csv of a sweep ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_four_writers_and_kill_9(tmp_path):
    """Three writers run through; the fourth is killed again and again at random moments and started over."""
    path, count, kills = tmp_path / "results.csv", 25, 4
    steady = [_start(path, f"w{i}", 0, count) for i in range(3)]
    for attempt in range(kills):
        victim = _start(path, "victim", 0, 100_000)
        assert victim.stdout is not None
        for _ in range(2 + attempt):
            victim.stdout.readline()
        time.sleep(0.0013 * attempt)  # another point of the lock-read-write-rename cycle each time
        victim.kill()
        victim.communicate()
        if path.exists():
            readable = pd.read_csv(path)
            assert readable["run_id"].is_unique
            assert set(readable["text"]) == {'a, "b"' + "x" * 2000}
    for process in steady:
        process.communicate()
        assert process.returncode == 0
    final = _start(path, "victim", 0, count)
    final.communicate()
    assert final.returncode == 0
    table = pd.read_csv(path)
    assert table["run_id"].is_unique
    wanted = {f"{name}_{i}" for name in ("w0", "w1", "w2", "victim") for i in range(count)}
    assert wanted <= set(table["run_id"])
    assert all(name.startswith("victim_") for name in set(table["run_id"]) - wanted)
    assert not list(tmp_path.glob(".*.tmp")), "leftover files of a killed writer are cleared by the next one"


def test_upsert_replaces_the_row_of_the_same_run_and_touches_no_other(tmp_path):
    path = tmp_path / "sweep" / "results.csv"
    upsert_row(path, {"acc": 0.1 + 0.2, "note": "007", "run_id": "a"})
    upsert_row(path, {"acc": 1.0, "note": None, "run_id": "b"})
    before = path.read_text()
    upsert_row(path, {"acc": 0.5, "note": "new", "run_id": "b"})
    after = path.read_text()
    # Every digit and leading zero of another run's row is kept: it passes through as text.
    assert "0.30000000000000004,007,a\n" in before
    assert after == before.replace("1.0,,b", "0.5,new,b")


def test_upsert_refuses_a_table_that_is_not_its_own(tmp_path):
    path = tmp_path / "results.csv"
    upsert_row(path, {"acc": 1, "run_id": "a"})
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"other columns .*loss"):
        upsert_row(path, {"acc": 1, "loss": 2, "run_id": "a"})
    with pytest.raises(InputError, match="another order"):
        upsert_row(path, {"run_id": "a", "acc": 1})
    assert path.read_bytes() == before
    for content in (b"", b'"unclosed\n1,2\n', b"\xff\xfe\x00nonsense"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"results\.csv"):
            upsert_row(path, {"acc": 1, "run_id": "a"})
        assert path.read_bytes() == content


def test_upsert_into_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        upsert_row(tmp_path / "file" / "results.csv", {"acc": 1, "run_id": "a"})


# --- one file -----------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    write_csv(path, pd.DataFrame({"a": [0.1, 1 / 3]}))
    old = path.read_bytes()

    def break_off():
        with replacing(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    with pytest.raises(TypeError):
        write_json(path, {"not": object()})
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.csv"]
    assert b"\r" not in old
    assert pd.read_csv(path, float_precision="round_trip")["a"].tolist() == [0.1, 1 / 3]


# --- tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("acc,run_id\n1,a,extra\n", "row 2 has 3 cells, its header 2"),
        ("acc,run_id\n1,a\n2\n", "row 3 has 1 cells, its header 2"),
        ("acc,acc\n1,2\n", "names a column twice"),
        ('acc,run_id\n"1,a\n', "unexpected end of data"),
        ("\n\n", "it is empty"),
        ("acc,run_id\n1,a\0\n", "null character"),
    ],
)
def test_a_table_that_reads_shifted_is_refused_and_kept(tmp_path, text, reason):
    path = tmp_path / "results.csv"
    path.write_text(text)
    for read in (lambda: upsert_row(path, {"acc": 1, "run_id": "a"}), lambda: read_table(path)):
        with pytest.raises(InputError, match="not a CSV table") as error:
            read()
        assert reason in str(error.value)
    assert path.read_text() == text


def test_a_folder_or_link_in_place_of_a_table(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("acc,run_id\n1,a\n")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("folder", "link"):
        with pytest.raises(InputError, match=f"{name} is"):
            upsert_row(tmp_path / name, {"acc": 1, "run_id": "b"})
    assert (tmp_path / "file").read_text() == "acc,run_id\n1,a\n"
    assert len(read_rows(tmp_path / "file", ("acc", "run_id"))) == 1


def test_a_table_says_which_column_is_missing_or_holds_no_numbers(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,c\n1,x,\n2,3,\n")
    table = read_table(path, numbers=("a", "c"), texts=("b",))
    assert table["a"].tolist() == [1, 2]
    assert table["c"].isna().all()
    with pytest.raises(InputError, match="lacks the columns d"):
        read_table(path, numbers=("a", "d"))
    with pytest.raises(InputError, match="column b that does not hold numbers"):
        read_table(path, numbers=("b",))


def test_a_written_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda part, path: (calls.append("rename"), real(part, path)))
    write_json(tmp_path / "a.json", {})
    assert calls == [str(tmp_path / f".a.json.{os.getpid()}.tmp"), "rename", str(tmp_path)]


def test_a_compressed_table_has_the_same_rows_and_the_same_bytes_every_time(tmp_path):
    table = pd.DataFrame({"name": ["a", "b"], "value": [0.1, 1 / 3]})
    for name in ("first.csv.gz", "second.csv.gz"):
        write_csv(tmp_path / name, table)
    assert (tmp_path / "first.csv.gz").read_bytes() == (tmp_path / "second.csv.gz").read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "first.csv.gz", float_precision="round_trip"), table)
    write_csv(tmp_path / "plain.csv", table)
    assert gzip.decompress((tmp_path / "first.csv.gz").read_bytes()) == (tmp_path / "plain.csv").read_bytes()
