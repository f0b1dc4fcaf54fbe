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

from sparselora.errors import InputError
from sparselora.runs import folder as records
from sparselora.runs import provenance
from sparselora.runs.folder import (
    CopyOfReport,
    RunFolder,
    read_rows,
    read_table,
    replacing,
    upsert_row,
    write_csv,
    write_json,
)
from sparselora.runs.provenance import commit, content_hash, fingerprint, model_stem, portable

ROOT = Path(__file__).resolve().parents[2]

# Writes the cells cell_<name>_0 … of one writer of a sweep, one after the other, from a given one on.
WRITER = """
import sys
from pathlib import Path
from sparselora.runs.folder import upsert_row
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
        "import sys, time; from sparselora.runs.folder import RunFolder\n"
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


OURS = {"command": "study", "fingerprint": "0123456789ab", "status": "running", "arguments": {}, "outputs": []}


@pytest.mark.parametrize(
    "content",
    [
        "{", "5", "[1, 2]", "[]", "{}", "null", '{"name": "my run"}', "\xff", "[" * 100_000,
        *(json.dumps({name: value for name, value in OURS.items() if name != left_out})
          for left_out in ("command", "fingerprint", "status")),
        *(json.dumps(OURS | change) for change in (
            {"command": 5}, {"command": None}, {"fingerprint": 12}, {"fingerprint": ["0123456789ab"]},
            {"status": "done"}, {"status": ["success"]}, {"status": None}, {"outputs": "table.csv"}, {"outputs": [5]},
            {"outputs": {}}, {"arguments": []},
        )),
    ],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_record_that_is_not_ours_is_refused_untouched(tmp_path, content, overwrite):
    (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    (tmp_path / "table.csv").write_text("mine")
    before = _tree(tmp_path)
    with pytest.raises(InputError, match="no record of sparselora"):
        _run(tmp_path, {"rank": 8}, overwrite=overwrite)
    assert _tree(tmp_path) == before


def test_a_record_of_ours_is_known_with_any_status(tmp_path):
    """The control of the test above: with nothing changed the same record is accepted."""
    for status in records.STATUSES:
        (tmp_path / "run.json").write_text(json.dumps(OURS | {"status": status}))
        assert RunFolder(tmp_path, "study", {"rank": 8}, overwrite=True).noted("status") == status


@pytest.mark.parametrize("status", records.STATUSES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_of_another_command_is_refused_in_every_state(tmp_path, status, overwrite):
    _run(tmp_path, {"rank": 8})
    write_json(tmp_path / "run.json", _record(tmp_path) | {"status": status})
    before = _tree(tmp_path)
    with pytest.raises(InputError, match="holds a run of study, this is other"):
        RunFolder(tmp_path, "other", {"rank": 8}, overwrite=overwrite)
    assert _tree(tmp_path) == before


# --- files that no record names -----------------------------------------------------------------------------------


def _tree(folder: Path) -> dict[str, object]:
    """Every entry below ``folder``: the content of a file, the target of a link."""
    return {
        entry.relative_to(folder).as_posix(): os.readlink(entry) if entry.is_symlink()
        else entry.read_bytes() if entry.is_file() else None
        for entry in sorted(folder.rglob("*"))
        if entry.name != ".lock"
    }  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("announced", [True, False])
def test_a_file_of_an_outputs_name_is_replaced_only_if_our_record_names_it(tmp_path, overwrite, announced):
    with pytest.raises(KeyboardInterrupt):
        _break_off(tmp_path, {"rank": 8}, "half.csv", KeyboardInterrupt())
    (tmp_path / "table.csv").write_text("mine")
    before = _tree(tmp_path)
    outputs = ("table.csv", "half.csv") if announced else ()
    run = RunFolder(tmp_path, "study", {"rank": 8}, outputs=outputs, overwrite=overwrite)

    def write() -> None:
        with run:
            run.path("half.csv").write_text("new")
            run.path("table.csv").write_text("ours")

    with pytest.raises(InputError, match=r"table\.csv is in the way"):
        write()
    assert (tmp_path / "table.csv").read_text() == "mine"
    if announced:  # found before anything is done; else at the last moment
        assert _tree(tmp_path) == before
    (tmp_path / "table.csv").unlink()
    _run(tmp_path, {"rank": 8}, names=("table.csv", "half.csv"), overwrite=overwrite)
    _run(tmp_path, {"rank": 9}, names=("table.csv",), overwrite=True)
    assert (tmp_path / "table.csv").read_text() == "table.csv"


def test_a_killed_run_knows_its_files_and_no_others(tmp_path):
    """What is announced is on record while the run goes on: after kill -9 the files are known to be ours."""
    code = (
        "import os, sys; from sparselora.runs.folder import RunFolder\n"
        "with RunFolder(sys.argv[1], 'study', {'rank': 8}, outputs=['table.csv', 'plots/a.png', 'never.csv']) as run:\n"
        "    run.path('table.csv').write_text('half'); run.path('late.csv').write_text('half'); os._exit(9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == 9
    assert set(_record(tmp_path)["outputs"]) == {"table.csv", "plots/a.png", "never.csv", "late.csv"}
    (tmp_path / f".table.csv.{os.getpid()}.tmp").write_text("torn")
    (tmp_path / ".mine.csv.12.tmp").write_text("mine")
    _run(tmp_path, {"rank": 9})
    assert _record(tmp_path)["outputs"] == ["table.csv"], "what was announced and not written is nobody's"
    assert sorted(_tree(tmp_path)) == [".mine.csv.12.tmp", "run.json", "table.csv"]


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_in_place_of_an_output_is_neither_followed_nor_replaced(tmp_path, kind, recorded, overwrite):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.png").write_text("mine")
    names = ("table.csv", "plots/a.png")
    if recorded:
        _run(out, {"rank": 8}, names=names)
        write_json(out / "run.json", _record(out) | {"status": "failed"})
        (out / "plots" / "a.png").unlink()
        (out / "plots").rmdir()
    else:
        out.mkdir()
        write_json(out / "run.json", OURS)
    if kind == "folder":
        (out / "plots").symlink_to(elsewhere)
    else:
        (out / "plots").mkdir()
        (out / "plots" / "a.png").symlink_to(elsewhere / ("a.png" if kind == "file" else "nothing"))
    before = _tree(tmp_path)
    for arguments in ({"rank": 8}, {"rank": 9}):
        run = RunFolder(out, "study", arguments, outputs=names, overwrite=overwrite)
        with pytest.raises(InputError, match=r"link|in the way"), run:
            pass
    assert _tree(tmp_path) == before
    # Where the run has no such output, the link stays and so does what is behind it.
    _run(out, {"rank": 9}, names=("table.csv",), overwrite=overwrite)
    after = _tree(tmp_path)
    assert {name: after[name] for name in before if "a.png" in name} == {
        name: content for name, content in before.items() if "a.png" in name
    }


def test_an_input_in_the_output_folder_is_refused(tmp_path, monkeypatch):
    run = tmp_path / "run"
    _run(run, {"rank": 8})
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    inputs = [run, run / "table.csv", run / "adapter", run / "adapter" / "..", "run/adapter", tmp_path / "link"]
    before = _tree(tmp_path)
    for source in inputs:
        for folder in (run, "run", tmp_path / "link", "./run/../run"):
            for value in (source, [tmp_path / "nothing", source]):
                with pytest.raises(InputError, match=r"output folder .* the input data"):
                    RunFolder(folder, "study", {"data": value}, inputs=("data",), overwrite=True)
    assert _tree(tmp_path) == before
    for source in (tmp_path / "nothing", "hub/name", None, ""):
        RunFolder(run, "study", {"data": source}, inputs=("data",), overwrite=True)


# --- holding a folder ---------------------------------------------------------------------------------------------


def test_a_reserved_folder_is_refused_to_others_and_leaves_nothing_if_the_input_is_bad(tmp_path):
    out = tmp_path / "a" / "b"
    first = RunFolder(out, "study", {"rank": 8}, outputs=("table.csv",))

    def check(run: RunFolder) -> None:
        with run.reserved():
            assert (out / ".lock").exists()
            with pytest.raises(InputError, match="in use"), RunFolder(out, "study", {"rank": 8}, overwrite=True):
                pass
            raise InputError("bad data")

    with pytest.raises(InputError, match="bad data"):
        check(first)
    assert list(tmp_path.iterdir()) == []
    with first.reserved(), first:
        first.path("table.csv").write_text("x")
    assert _record(out)["status"] == "success"
    before = _tree(tmp_path)
    second = RunFolder(out, "study", {"rank": 9}, overwrite=True)
    with pytest.raises(InputError, match="bad data"):
        check(second)
    assert _tree(tmp_path) == before, "a finished run is removed only when its successor begins"


def test_a_lock_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    for number, make in enumerate((
        lambda lock: lock.write_text("mine"), lambda lock: lock.symlink_to(tmp_path / "elsewhere"), Path.mkdir
    )):  # fmt: skip
        out = tmp_path / f"out{number}"
        out.mkdir()
        make(out / ".lock")
        with pytest.raises(InputError, match="lock"):
            _run(out, {"rank": 8}, overwrite=True)
    assert (tmp_path / "elsewhere").read_text() == (tmp_path / "out0" / ".lock").read_text() == "mine"


# --- a copy of the report -----------------------------------------------------------------------------------------


def _copied(path: Path, folder: Path, **how: object) -> CopyOfReport:
    return CopyOfReport(
        path, "--output", RunFolder(folder, "study", {"rank": 8}, outputs=("table.csv",), **how), "table.csv"
    )


def test_a_copy_goes_to_a_new_file_or_an_old_one_that_may_be_replaced(tmp_path):
    out, target = tmp_path / "out", tmp_path / "new" / "copy.csv"
    _copied(target, out)
    assert not target.parent.exists(), "the check leaves nothing behind"
    _run(out, {"rank": 8})
    _copied(target, out).write()
    assert target.read_text() == "table.csv"
    _copied(target, out).write()  # the same again
    target.write_text("mine")
    with pytest.raises(InputError, match="exists; use --overwrite"):
        _copied(target, out)
    assert target.read_text() == "mine"
    _copied(target, out, overwrite=True).write()
    assert target.read_text() == "table.csv"


def test_a_copy_never_goes_over_what_is_no_copy(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    _run(other, {"rank": 8}, names=("table.csv", "adapter/weights.bin"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    before = _tree(tmp_path)
    places = ["", "link", "file/below", "out/table.csv", "out/run.json", "other/run.json", "other/adapter/weights.bin"]
    for place in [*(tmp_path / name for name in places), Path("/dev/null"), Path("/proc/nowhere/copy.csv")]:
        with pytest.raises(InputError, match="--output"):
            _copied(place, out, overwrite=True)
    model = tmp_path / "file"
    run = RunFolder(out, "study", {"model": model}, inputs=("model",), overwrite=True)
    with pytest.raises(InputError, match="input model"):
        CopyOfReport(model, "--output", run, "table.csv")
    assert _tree(tmp_path) == before


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


# --- recorded paths -----------------------------------------------------------------------------------------------


def test_no_absolute_path_in_run_json(tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("a\n1\n")
    arguments = {
        "file": str(data),
        "path": data,
        "several": [str(data), "glue/sst2"],
        "gone": str(tmp_path / "nowhere" / "model"),
        "hub": "org/name",
    }
    run = RunFolder(tmp_path / "out", "study", arguments, inputs=tuple(arguments))
    with pytest.raises(FileNotFoundError), run:
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


def _print(**arguments: object) -> str:
    return fingerprint("study", arguments, inputs=("data",))


@pytest.mark.parametrize(
    ("one", "two"),
    [("/a/{prompt}", "/b/{prompt}"), ("A//{prompt}", "A/{prompt}"), ("./x", "x"), ("/", "/tmp"), ("a/.", "a")],
)
def test_a_text_with_a_slash_is_a_text(one, two):
    assert _print(template=one) != _print(template=two)
    assert portable({"template": one}, ("data",)) == {"template": one}


def test_fingerprint_follows_content_not_place(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.csv").write_text("other" if name == "three" else "same")
    prints = [_print(data=str(tmp_path / name / "data.csv"), rank=8) for name in ("one", "two", "three")]
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
        assert _print(data=name) == _print(data=f"./{name}") == _print(data=str(tmp_path / name))
    before = _print(data="data.csv")
    (tmp_path / "data.csv").write_text("other")
    assert _print(data="data.csv") != before
    word = fingerprint("study", {"matrix": "gaussian"}, inputs=("data",))
    (tmp_path / "gaussian").rmdir()
    assert fingerprint("study", {"matrix": "gaussian"}, inputs=("data",)) == word


@pytest.mark.parametrize("at", [0, 20 << 20, (40 << 20) - 1])
@pytest.mark.parametrize("in_folder", [False, True])
def test_one_byte_anywhere_in_a_file_of_40_mb_makes_another_run(tmp_path, at, in_folder):
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(40 << 20)
    place = path.parent if in_folder else path
    before = _print(data=place)
    assert _print(data=place) == before
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"x")
    assert _print(data=place) != before


def test_a_hash_that_was_kept_is_not_that_of_a_changed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_CACHED", 1)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"a" * 100)
    first, times = content_hash(path), path.stat()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert content_hash(path) != first


def test_only_what_a_run_reads_of_a_folder_is_hashed(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors", "photo.jpg", "disk.img", "below/model.safetensors", "data/a.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe.json")
    opened = []
    real = provenance._sha256
    monkeypatch.setattr(provenance, "_sha256", lambda path, size: (opened.append(path.name), real(path, size))[1])
    content_hash(tmp_path)
    assert opened == ["config.json", "model.safetensors"]
    opened.clear()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).unlink()
    content_hash(tmp_path)
    assert opened == ["a.csv"], "a folder of tables"
    opened.clear()
    for place in ("/dev/zero", "/dev/null", tmp_path / "pipe.json", "/proc", tmp_path / "nothing"):
        assert content_hash(Path(place)) is None
    assert opened == []


def test_a_model_is_named_by_its_folder_whichever_way_it_is_given(tmp_path, monkeypatch):
    (tmp_path / "minilm" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "minilm")
    for name in (".", "./", "../minilm", "below/..", str(tmp_path / "minilm")):
        assert model_stem(name) == "minilm"
    assert (model_stem("glue/sst2"), model_stem("data/train.csv.gz"), model_stem("/a/.hidden.csv")) == (
        "sst2", "train", "hidden",
    )  # fmt: skip


def test_the_commit_is_that_of_the_checkout():
    """By git itself, from the folder of the tests."""
    root = Path(__file__).resolve().parents[2]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode:
        assert commit() is None
    else:
        assert head.stdout.startswith(commit().rstrip("+"))
