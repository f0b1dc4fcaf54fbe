from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from sparselora import records
from sparselora.errors import InputError
from sparselora.records import RunFolder, fingerprint, replacing, upsert_row, write_csv, write_json

ROOT = Path(__file__).resolve().parent.parent

# Writes the cells cell_<name>_0 … of one writer of a sweep, one after the other, from a given one on.
WRITER = """
import sys
from pathlib import Path
from sparselora.records import upsert_row
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
    assert not list(tmp_path.glob(".*.tmp")), "leavings of a killed writer are cleared by the next one"


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


# --- run folder ---------------------------------------------------------------------------------------------------


def _run(folder: Path, arguments: dict, *, names=("table.csv",), overwrite: bool = False) -> RunFolder:
    run = RunFolder(folder, "study", arguments, seed=0, overwrite=overwrite)
    with run:
        for name in names:
            run.path(name).write_text(name)
    return run


def _break_off(folder: Path, arguments: dict, name: str, error: BaseException) -> None:
    with RunFolder(folder, "study", arguments) as run:
        run.path(name).write_text(name)
        raise error


def _record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_success_is_recorded_and_then_skipped(tmp_path):
    _run(tmp_path / "out", {"rank": 8}, names=("table.csv", "plots/a.png"))
    record = _record(tmp_path / "out")
    assert (record["status"], record["command"], record["arguments"]) == ("success", "study", {"rank": 8})
    assert record["outputs"] == ["plots/a.png", "table.csv"]
    assert record["wall_s"] >= 0
    assert {"python", "sparselora", "numpy"} <= set(record["versions"])
    again = RunFolder(tmp_path / "out", "study", {"rank": 8})
    assert again.is_finished()
    assert "already finished" in again.finished_message()
    assert not RunFolder(tmp_path / "out", "study", {"rank": 8}, overwrite=True).is_finished()
    assert not RunFolder(tmp_path / "out", "study", {"rank": 9}).is_finished()


def test_a_finished_run_with_other_arguments_is_refused_untouched(tmp_path):
    _run(tmp_path, {"rank": 8})
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(InputError, match="finished run with other arguments"):
        _run(tmp_path, {"rank": 9}, names=("other.csv",))
    with pytest.raises(InputError, match="already finished"):
        _run(tmp_path, {"rank": 8})  # a caller that forgot to ask is_finished()
    assert (tmp_path / "run.json").read_bytes() == before
    assert not (tmp_path / "other.csv").exists()


def test_overwrite_removes_what_was_recorded_and_nothing_else(tmp_path):
    folder = tmp_path / "out"
    _run(folder, {"rank": 8}, names=("old.csv", "plots/old.png"))
    (folder / "mine.txt").write_text("keep me")
    (folder / "plots" / "mine.png").write_text("keep me")
    (tmp_path / "outside.txt").write_text("keep me")
    record = _record(folder)
    record["outputs"] += ["../outside.txt", str(tmp_path / "outside.txt")]
    (folder / "run.json").write_text(json.dumps(record))
    _run(folder, {"rank": 9}, names=("new.csv",), overwrite=True)
    left = {entry.relative_to(tmp_path).as_posix() for entry in tmp_path.rglob("*") if entry.is_file()}
    assert left - {"out/.lock"} == {"outside.txt", "out/mine.txt", "out/plots/mine.png", "out/new.csv", "out/run.json"}


def test_a_folder_with_a_strangers_files_is_refused_without_overwrite(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(InputError, match="not empty"):
        _run(tmp_path, {"rank": 8})
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
    _run(tmp_path, {"rank": 8}, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "keep me"


def test_a_run_killed_before_its_first_record_does_not_lock_its_folder_up(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.4711.tmp").write_text('{"comm')
    assert _run(tmp_path, {"rank": 8}) is not None


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "cancelled"), (ValueError("rank too high"), "failed")]
)
def test_how_a_run_ended_is_recorded_and_it_can_be_run_again(tmp_path, error, status):
    with pytest.raises(type(error)):
        _break_off(tmp_path, {"rank": 8}, "half.csv", error)
    record = _record(tmp_path)
    assert record["status"] == status
    assert record.get("error") == (None if status == "cancelled" else "ValueError: rank too high")
    same = RunFolder(tmp_path, "study", {"rank": 8})
    assert not same.is_finished()
    assert same.can_resume()
    assert not RunFolder(tmp_path, "study", {"rank": 9}).can_resume()


def test_resuming_keeps_what_the_first_part_wrote_and_another_run_does_not(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _break_off(tmp_path, {"rank": 8}, "first.csv", KeyboardInterrupt())
    _run(tmp_path, {"rank": 8}, names=("second.csv",))
    assert _record(tmp_path)["outputs"] == ["first.csv", "second.csv"]
    _run(tmp_path, {"rank": 8}, names=(), overwrite=True)
    assert not (tmp_path / "first.csv").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kill_9_inside_a_run_leaves_it_running_and_releases_the_folder(tmp_path):
    code = (
        "import sys, time; from sparselora.records import RunFolder\n"
        "with RunFolder(sys.argv[1], 'study', {'rank': 8}):\n    print('in', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(InputError, match="in use by another process"):
            _run(tmp_path / "out", {"rank": 8})
        assert _record(tmp_path / "out")["status"] == "running"
    finally:
        holder.kill()
        holder.communicate()
    assert RunFolder(tmp_path / "out", "study", {"rank": 8}).can_resume()
    _run(tmp_path / "out", {"rank": 8})
    assert _record(tmp_path / "out")["status"] == "success"


def test_what_finished_while_we_waited_is_not_overwritten(tmp_path):
    """Two processes look at the same empty folder; the slower one must see the other's result under the lock."""
    late = RunFolder(tmp_path, "study", {"rank": 9})
    _run(tmp_path, {"rank": 8})
    with pytest.raises(InputError, match="finished run with other arguments"), late:
        pass
    assert _record(tmp_path)["arguments"] == {"rank": 8}
    _run(tmp_path, {"rank": 8}, overwrite=True)  # the refusal let go of the lock


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_one(tmp_path, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file"):
        _run(tmp_path / place, {"rank": 8})
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_folder_without_write_permission(tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written"):
        _run(tmp_path / "out", {"rank": 8})


@pytest.mark.parametrize("content", ["{", "5", "[1, 2]"])
def test_a_damaged_record_is_refused_not_ignored(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match="cannot be read"):
        RunFolder(tmp_path, "study", {"rank": 8})


# --- recorded paths -----------------------------------------------------------------------------------------------


def test_no_absolute_path_in_run_json(tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("a\n1\n")
    arguments = {
        "file": str(data),
        "path": data,
        "several": [str(data), "glue/sst2"],
        "nested": {"model": str(tmp_path / "model")},
        "gone": str(tmp_path / "nowhere" / "model"),
        "hub": "org/name",
    }
    with pytest.raises(FileNotFoundError), RunFolder(tmp_path / "out", "study", arguments):
        (tmp_path / "absent" / "weights.bin").read_bytes()
    text = (tmp_path / "out" / "run.json").read_text()
    assert str(tmp_path) not in text
    assert tmp_path.parent.name not in text
    record = json.loads(text)
    assert record["arguments"]["hub"] == "org/name"
    assert record["arguments"]["gone"] == "model"
    assert record["arguments"]["file"]["name"] == "data.csv"
    assert record["arguments"]["several"][1] == "glue/sst2"
    assert record["error"].endswith("'weights.bin'")


def test_error_texts_keep_what_only_looks_like_a_path(tmp_path):
    text = "read/write of loss a/b failed at https://example.org/x, wanted 1 / 2"
    with pytest.raises(ValueError, match="wanted"), RunFolder(tmp_path, "study", {}):
        raise ValueError(text)
    assert _record(tmp_path)["error"] == f"ValueError: {text}"


def test_fingerprint_follows_content_not_place(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.csv").write_text("other" if name == "three" else "same")
    prints = [
        fingerprint("study", {"data": str(tmp_path / name / "data.csv"), "rank": 8}) for name in ("one", "two", "three")
    ]
    assert prints[0] == prints[1] != prints[2]
    assert fingerprint("study", {"a": 1, "b": 2}) == fingerprint("study", {"b": 2, "a": 1})
    assert fingerprint("study", {"a": 1}) != fingerprint("other", {"a": 1})


def test_a_table_or_model_in_the_working_directory_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("same")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "gaussian").mkdir()
    for name in ("data.csv", "model"):
        plain = fingerprint("study", {"input": name})
        assert (
            plain
            == fingerprint("study", {"input": f"./{name}"})
            == fingerprint("study", {"input": str(tmp_path / name)})
        )
    before = fingerprint("study", {"input": "data.csv"})
    (tmp_path / "data.csv").write_text("other")
    assert fingerprint("study", {"input": "data.csv"}) != before
    word = fingerprint("study", {"matrix": "gaussian"})
    (tmp_path / "gaussian").rmdir()
    assert fingerprint("study", {"matrix": "gaussian"}) == word


def test_folders_that_differ_in_large_files_alone_are_told_apart(tmp_path):
    hashes = set()
    for value in (b"a", b"b"):
        folder = tmp_path / value.decode()
        folder.mkdir()
        (folder / "weights").write_bytes(b"header" + value * (records._SMALL_FILE + 1000))
        hashes.add(records._content_hash(folder))
    assert len(hashes) == 2
