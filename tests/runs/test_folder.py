"""The folder of a run: what it refuses, replaces and records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sparselora.errors import InputError
from sparselora.runs import folder as records
from sparselora.runs.files import write_json, write_text
from sparselora.runs.folder import RunFolder
from sparselora.runs.report_copy import CopyOfReport

ROOT = Path(__file__).resolve().parents[2]


# --- run folder ---------------------------------------------------------------------------------------------------


def _run(folder: Path, arguments: dict, *, names=("table.csv",), overwrite: bool = False) -> RunFolder:
    run = RunFolder(folder, "study", arguments, outputs=names, seed=0, overwrite=overwrite)
    with run:
        for name in names:
            write_text(run.path(name), name)
    return run


def _break_off(folder: Path, arguments: dict, name: str, error: BaseException, outputs: Sequence[str] = ()) -> None:
    with RunFolder(folder, "study", arguments, outputs=outputs or [name]) as run:
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
def test_a_file_of_an_outputs_name_is_replaced_only_if_our_record_names_it(tmp_path, overwrite):
    with pytest.raises(KeyboardInterrupt):
        _break_off(tmp_path, {"rank": 8}, "half.csv", KeyboardInterrupt())
    (tmp_path / "table.csv").write_text("mine")
    before = _tree(tmp_path)
    run = RunFolder(tmp_path, "study", {"rank": 8}, outputs=("table.csv", "half.csv"), overwrite=overwrite)

    def write() -> None:
        with run:
            run.path("half.csv").write_text("new")
            run.path("table.csv").write_text("ours")

    with pytest.raises(InputError, match=r"table\.csv is in the way"):
        write()
    assert _tree(tmp_path) == before, "found before anything is done"
    (tmp_path / "table.csv").unlink()
    _run(tmp_path, {"rank": 8}, names=("table.csv", "half.csv"), overwrite=overwrite)
    _run(tmp_path, {"rank": 9}, names=("table.csv",), overwrite=True)
    assert (tmp_path / "table.csv").read_text() == "table.csv"


def test_a_file_that_was_not_announced_cannot_be_written(tmp_path):
    with pytest.raises(AssertionError, match=r"late\.csv was not announced"):
        _break_off(tmp_path, {"rank": 8}, "late.csv", KeyboardInterrupt(), outputs=["table.csv"])
    assert _record(tmp_path)["outputs"] == []


def test_a_killed_run_knows_its_files_and_no_others(tmp_path):
    """What is announced is on record while the run goes on: after kill -9 the files are known to be ours."""
    code = (
        "import os, sys; from sparselora.runs.folder import RunFolder\n"
        "with RunFolder(sys.argv[1], 'study', {'rank': 8}, outputs=['table.csv', 'plots/a.png', 'never.csv']) as run:\n"
        "    run.path('table.csv').write_text('half'); os._exit(9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == 9
    assert set(_record(tmp_path)["outputs"]) == {"table.csv", "plots/a.png", "never.csv"}
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
