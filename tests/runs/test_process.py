"""Real processes: signals at every moment, readers that leave, closed streams, outputs of other encodings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparselora.runs.process import PARENT

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="needs the signals of POSIX")
ENTRIES = {
    "toy_experiment.py": "numpy",
    "inspect_svd_predictors.py": "numpy",
    "prune_finetune_lora.py": "numpy",
    "-m sparselora": "sparselora.commands.savings",
}
"""Each entry point, and an import of it that takes time."""

PROGRAM = """
import argparse, os, signal, sys, time
from sparselora.runs.process import end, start
start("study")
from sparselora.cli import run_command
from sparselora.runs.folder import RunFolder

def run(args):
    with RunFolder(sys.argv[1], "study", {}):
        BODY

status = run_command(run, argparse.Namespace(debug=False), "study")
AFTER
end(status)
"""


def _program(folder: Path, body: str = "pass", after: str = "", **how: Any) -> subprocess.CompletedProcess[str]:
    code = PROGRAM.replace("BODY", body.replace("\n", "\n        ")).replace("AFTER", after)
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | how.pop("env", {})
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"} | how
    return subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, timeout=60, **how)


def _status(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["status"])


# --- signals ------------------------------------------------------------------------------------------------------

STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


def _line(program: str, name: str) -> str:
    return f"{program}: cancelled{'' if name == 'SIGINT' else f' ({name})'}\n"


@posix
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", STATUS)
def test_a_signal_while_libraries_are_imported_is_one_line(entry, name):
    """Sent by the import itself, before a single function of the command has run."""
    code = f"""
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {ENTRIES[entry]!r}:
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Finder())
sys.argv = ["program", "savings", "--dry_run"]
runpy.{"run_module" if entry[0] == "-" else "run_path"}({entry.removeprefix("-m ")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    program = "python -m sparselora" if entry[0] == "-" else entry
    assert (done.returncode, done.stdout, done.stderr) == (STATUS[name], "", _line(program, name))


@posix
@pytest.mark.parametrize("name", STATUS)
def test_a_signal_in_a_run_is_recorded_as_cancelled(tmp_path, name):
    done = _program(tmp_path, f"os.kill(os.getpid(), signal.{name})\ntime.sleep(30)")
    assert (done.returncode, done.stdout, done.stderr) == (STATUS[name], "", _line("study", name))
    assert _status(tmp_path) == "cancelled"


@posix
def test_a_signal_that_comes_again_does_not_disturb_the_record(tmp_path):
    """A closed terminal sends SIGHUP to the group and the shell sends it to its jobs."""
    again = "try:\n    os.kill(os.getpid(), signal.SIGHUP)\nfinally:\n    os.kill(os.getpid(), signal.SIGHUP)"
    done = _program(tmp_path, again + "\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(0.1)")
    assert (done.returncode, done.stderr) == (129, _line("study", "SIGHUP"))
    assert _status(tmp_path) == "cancelled"


@posix
@pytest.mark.parametrize("name", STATUS)
def test_an_import_that_turns_a_signal_into_another_error_is_still_a_cancelled_run(tmp_path, name):
    body = f"""
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(30)
except BaseException:
    raise ImportError("initialization failed") from None"""
    done = _program(tmp_path, body)
    assert (done.returncode, done.stderr) == (STATUS[name], _line("study", name))
    assert _status(tmp_path) == "cancelled"
    control = _program(tmp_path / "control", 'raise ImportError("initialization failed")')
    assert control.returncode == 1
    assert _status(tmp_path / "control") == "failed"


@posix
@pytest.mark.parametrize("name", STATUS)
def test_a_signal_after_the_work_changes_nothing(tmp_path, name):
    late = f"import atexit; atexit.register(lambda: os.kill(os.getpid(), signal.{name}))"
    done = _program(tmp_path, "print('result')", late)
    assert (done.returncode, done.stdout, done.stderr) == (0, "result\n", "")
    assert _status(tmp_path) == "success"
    last = f"class Last:\n    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, signal.{name})\nlast = Last()"
    assert _program(tmp_path / "last", "print('result')", last).returncode == 0


@posix
def test_what_was_ignored_from_the_start_stays_ignored(tmp_path):
    done = _program(
        tmp_path, "os.kill(os.getpid(), signal.SIGHUP)", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    assert done.returncode == 0
    assert _status(tmp_path) == "success"


@posix
def test_a_forked_worker_that_is_terminated_raises_nothing(tmp_path):
    body = """
ready, say = os.pipe()
pid = os.fork()
if not pid:
    os.write(say, b"x")
    time.sleep(30)
    os._exit(0)
os.read(ready, 1)
os.kill(pid, signal.SIGTERM)
print(os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)"""
    done = _program(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{int(signal.SIGTERM)}\n", "")


@posix
def test_a_process_ends_soon_after_the_one_it_is_to_end_with(tmp_path):
    """The one between is killed with SIGKILL, so it cannot pass anything on."""
    code = PROGRAM.replace("BODY", "print('ready', flush=True); time.sleep(60)").replace("AFTER", "")
    between = f"""
import os, subprocess, sys, time
environment = os.environ | {{"{PARENT}": str(os.getpid())}}
subprocess.Popen([sys.executable, "-c", {code!r}, {str(tmp_path)!r}], env=environment, start_new_session=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", between], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    assert _status(tmp_path) == "running"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while _status(tmp_path) == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert _status(tmp_path) == "cancelled"
    assert parent.stdout.read() == ""  # the last writer is gone
    parent.stdout.close()


# --- streams ------------------------------------------------------------------------------------------------------

SYMBOLS = "‖W − Ŵ‖ × ½ → σ² · 3 ± 1 … Δ é 語 \udc80"


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("ascii", "||W - W^|| x 1/2 -> sigma^2 * 3 +/- 1 ... delta e ? ?"),
        ("cp1252", "||W - W^|| × ½ -> sigma² · 3 ± 1 … delta é ? ?"),
        ("utf-8", "‖W − Ŵ‖ × ½ → σ² · 3 ± 1 … Δ é 語 ?"),
    ],
)
def test_an_output_of_another_encoding_is_no_failure(tmp_path, encoding, line):
    body = f"print({SYMBOLS!r}); print({SYMBOLS!r}, file=sys.stderr)"
    done = _program(tmp_path, body, env={"PYTHONIOENCODING": encoding}, encoding=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, line + "\n", line + "\n")
    assert _status(tmp_path) == "success"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("entry", [*ENTRIES, "-m sparselora savings"])
def test_help_in_another_encoding(entry, encoding):
    command = [sys.executable, *entry.split(), "--help"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding=encoding, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


def test_a_reader_that_leaves_does_not_stop_the_work(tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    body = "for i in range(20000): print('line', i)\nopen(os.path.join(sys.argv[1], 'last'), 'w').close()"
    done = _program(tmp_path, body, stdout=write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
    assert _status(tmp_path) == "success"
    assert (tmp_path / "last").exists()


def test_a_broken_pipe_that_is_not_the_output_is_a_failure(tmp_path):
    body = "r, w = os.pipe(); os.close(r); os.write(w, b'x')"
    done = _program(tmp_path, body)
    assert done.returncode == 1
    assert done.stderr.startswith("study: failed: BrokenPipeError")
    assert _status(tmp_path) == "failed"


@posix
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_streams_are_no_failure_and_no_file_takes_their_place(tmp_path, closed):
    body = "print('result'); print('note', file=sys.stderr); open(os.path.join(sys.argv[1], 'table'), 'w').write('1')"
    body += "; os.write(1, b'library'); os.write(2, b'library')"
    done = _program(tmp_path, body, preexec_fn=lambda: [os.close(number) for number in closed])
    assert done.returncode == 0
    assert _status(tmp_path) == "success"
    assert (tmp_path / "table").read_text() == "1"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_on_a_full_disk_is_one_line_and_status_1(tmp_path):
    with open("/dev/full", "w") as full:
        done = _program(tmp_path, "print('result')", stdout=full)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        usage = [sys.executable, "-m", "sparselora", "--help"]
        done = subprocess.run(usage, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)


# --- the collector ------------------------------------------------------------------------------------------------


def _collected(code: str) -> list[str]:
    """Return what ``code`` prints in a process of its own, where ``seen`` has the generation of each collection."""
    start = "import gc\nfrom sparselora.runs.process import end, importing\nseen = []\n"
    start += "gc.callbacks.append(lambda phase, info: seen.append(info['generation']) if phase == 'start' else None)\n"
    done = subprocess.run([sys.executable, "-c", start + code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_nothing_is_collected_while_modules_are_imported():
    code = "seen.clear()\nimport pandas\nprint(len(seen) > 0)"  # the control
    assert _collected(code) == ["True"]
    code = "with importing():\n    seen.clear()\n    import pandas\n    print(len(seen))\nprint(gc.isenabled())"
    assert _collected(code) == ["0", "True"]


def test_the_collector_is_left_as_it_was():
    code = """
gc.disable()
with importing(): pass
print(gc.isenabled())
gc.enable()
try:
    with importing(): raise ImportError
except ImportError:
    print(gc.isenabled())
"""
    assert _collected(code) == ["False", "True"]


def test_only_what_was_imported_first_is_set_apart():
    """What a later command leaves is freed: the cycle is, and the control, from before the first, is not."""
    code = """
import weakref
class Cycle:
    def __init__(self): self.itself = self
def abandoned(): return weakref.ref(Cycle())
gc.collect()
gc.disable()
early = abandoned()
with importing(): pass
late = abandoned()
with importing(): pass
gc.collect()
print(early() is None, late() is None)
"""
    assert _collected(code) == ["False", "True"]


def test_what_is_to_happen_at_the_end_of_a_process_does(tmp_path):
    code = f"""
import atexit, tempfile
folder = tempfile.TemporaryDirectory(dir={str(tmp_path)!r})
folder.itself = folder
atexit.register(lambda: print("last", gc.get_freeze_count() > 0))
end(0)
"""
    assert _collected(code) == ["last", "True"]
    assert list(tmp_path.iterdir()) == []
