"""The runs of a grid, carried out: adapters and models fetched first, then one process and one log file each."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparselora.errors import InputError, counted
from sparselora.runs.grid import FINISHED, LOGS, GridCommand, Job, Line, at_line, plan_grid, read_grid
from sparselora.runs.prefetch import fetch_adapter, fetch_model, hub_models, with_local_adapters
from sparselora.runs.process import PARENT

_GRACE_S = 10.0
"""Time that a stopped run has to record that it was, before it is killed."""
_POLL_S = 0.05
_LOG_START = b"$ -m sparselora "
"""How every log begins."""

Say = Callable[[str], object]


def run_grid(
    grid: Path,
    command: GridCommand,
    run_root: Path,
    defaults: Mapping[str, Any],
    say: Say,
    *,
    gpus: Sequence[str] = (),
    jobs: int = 1,
    prefetch: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
) -> list[Failure]:
    """Carry out the runs of the file ``grid`` that are not finished.

    Args:
        run_root: folder of the runs, their logs, and the adapters that are fetched.
        defaults: the value of each flag that a line leaves out.
        say: receives the lines that report progress.
        gpus: as for `run_jobs`.
        jobs: runs at a time, on each GPU or in all.
        prefetch: fetch the adapters and models of the hub first, then run without it.
        dry_run: only report the state of each run.
        overwrite: run finished ones again.
    Returns:
        The runs that failed.
    Raises:
        InputError: whatever is wrong with the grid, before anything runs.
    """
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, got {jobs}")
    lines = read_grid(grid, command, defaults)
    if gpus:
        lines = _on_gpus(grid, lines)
    fetch = prefetch and not dry_run
    lines = with_local_adapters(grid, lines, run_root, fetch_adapter if fetch else None)
    planned = plan_grid(grid, lines, run_root, command, overwrite=overwrite)
    for job in planned if dry_run else ():
        say(f"{job.line.name}: {job.state}")
    finished = sum(job.state == FINISHED for job in planned)
    say(f"{counted(len(planned), 'run')}, {finished} finished, {len(planned) - finished} to run")
    if dry_run:
        return []
    for name in hub_models(lines) if fetch else ():
        say(f"fetching {name}")
        fetch_model(name)
    offline = fetch and not any(command.reads_hub(line.values) for line in lines)
    return run_jobs(planned, run_root, gpus, say, at_once=jobs, offline=offline)


def _on_gpus(path: Path, lines: Sequence[Line]) -> list[Line]:
    """Return ``lines`` with device cuda: a process without its GPU must fail, not go to the CPU.

    Raises:
        InputError: a line names another device, or the command has no choice of device.
    """
    for line in lines:
        with at_line(path, line.number):
            if "device" not in line.values:
                raise InputError("this command runs on no GPU; leave the GPUs out")
            if line.values["device"] not in ("auto", "cuda", None):
                raise InputError(f"device {line.values['device']} cannot go with GPUs; leave it out")
    return [replace(line, values=line.values | {"device": "cuda"}) for line in lines]


def parse_gpus(text: str | None) -> list[str]:
    """Return the GPUs in a text such as ``0,1``; none for None.

    Raises:
        InputError: an empty one, or one twice.
    """
    gpus = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(gpus) or len(set(gpus)) < len(gpus):
        raise InputError(f"GPUs are different names with commas between them, such as 0,1, got {text!r}")
    return gpus


# --- running ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A job that did not end well, with its exit status and the last line of its log."""

    job: Job
    status: int
    last_line: str


@dataclass
class _Running:
    job: Job
    gpu: str | None
    process: subprocess.Popen[bytes]
    began: float


def run_jobs(
    jobs: Sequence[Job], run_root: Path, gpus: Sequence[str], say: Say, *, at_once: int = 1, offline: bool = False
) -> list[Failure]:
    """Run what is not finished, each in a process of its own.

    The process of a job on a GPU sees this one alone. What a process prints is in ``logs/NAME.log``. When this call is
    interrupted, the processes are, too, and have time to record it; when it is killed, they end by themselves.

    Args:
        gpus: values of CUDA_VISIBLE_DEVICES.
        say: receives a line when a run starts and when it ends.
        at_once: processes at a time, on each of ``gpus`` or, without any, in all.
        offline: the processes ask no hub.
    Returns:
        The failures, in the order of ``jobs``.
    Raises:
        InputError: another process works on the same ``run_root``.
    """
    lock = FileLock(str(run_root / ".lock"))
    try:
        (run_root / LOGS).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"run root {run_root} is in use by another process; wait for it") from None
    except OSError as error:
        raise InputError(f"run root {run_root} cannot be written ({error.strerror}); use another folder") from None
    try:
        _refuse_foreign_logs(jobs, run_root)
        slots: list[str | None] = [*gpus] * at_once if gpus else [None] * at_once
        return _run_all([job for job in jobs if job.state != FINISHED], run_root, slots, say, offline)
    finally:
        lock.release()


def _refuse_foreign_logs(jobs: Sequence[Job], run_root: Path) -> None:
    """Raise where a log would be written to another place, or over a file that is no log of a grid."""
    if (run_root / LOGS).is_symlink():
        raise InputError(f"{run_root / LOGS} is a link, and logs would be written behind it; use another run root")
    for log in (_log(job, run_root) for job in jobs if job.state != FINISHED):
        if not os.path.lexists(log):
            continue
        if log.is_symlink() or not log.is_file() or not _begins_like_a_log(log):
            raise InputError(f"{log} is in the way of a log, and no grid wrote it; move it away")


def _begins_like_a_log(path: Path) -> bool:
    with path.open("rb") as stream:
        start = stream.read(len(_LOG_START))
    return _LOG_START.startswith(start)  # also one that was cut short


def _run_all(
    jobs: Sequence[Job], run_root: Path, slots: Sequence[str | None], say: Say, offline: bool
) -> list[Failure]:
    """Run ``jobs``, one in each slot at a time; a slot is a GPU, or None."""
    waiting = list(enumerate(jobs, 1))
    running: list[_Running] = []
    failures: dict[int, Failure] = {}
    free = list(slots)
    try:
        while waiting or running:
            while waiting and free:
                number, job = waiting.pop(0)
                gpu = free.pop(0)
                say(f"[{number}/{len(jobs)}] {job.line.name}: started" + (f" on GPU {gpu}" if gpu is not None else ""))
                running.append(_Running(job, gpu, _start(job, run_root, gpu, offline), time.monotonic()))
            for ended in [run for run in running if run.process.poll() is not None]:
                running.remove(ended)
                free.append(ended.gpu)
                status = ended.process.returncode
                outcome = "done" if status == 0 else f"failed with exit status {status}"
                say(f"{ended.job.line.name}: {outcome} after {time.monotonic() - ended.began:.0f} s")
                if status:
                    failures[ended.job.line.number] = Failure(ended.job, status, _last_line(_log(ended.job, run_root)))
            time.sleep(_POLL_S)
    finally:
        _stop([run.process for run in running])
    return [failures[job.line.number] for job in jobs if job.line.number in failures]


def _start(job: Job, run_root: Path, gpu: str | None, offline: bool) -> subprocess.Popen[bytes]:
    environment = {**os.environ, PARENT: str(os.getpid())}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    # In a session of its own: a Ctrl-C at the terminal reaches it once, from here, and not in the midst of its record.
    with _log(job, run_root).open("wb") as log:
        log.write(f"$ {shlex.join(job.process[1:])}\n".encode())
        log.flush()
        return subprocess.Popen(
            job.process, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt them; kill what has not ended after `_GRACE_S`, or when this is interrupted once more."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _GRACE_S
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()  # nothing, where it has ended
            process.wait()


def _log(job: Job, run_root: Path) -> Path:
    return run_root / LOGS / f"{job.line.name}.log"


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def report_failures(failures: Sequence[Failure], run_root: Path, complain: Say) -> None:
    """Report each of ``failures`` by a line.

    Raises:
        RuntimeError: there are any.
    """
    for failure in failures:
        complain(f"{failure.job.line.name}: exit status {failure.status}: {failure.last_line}")
    if failures:
        logs = "its log is" if len(failures) == 1 else "their logs are"
        raise RuntimeError(
            f"{counted(len(failures), 'run')} failed, {logs} in {run_root / LOGS}; the same call runs them again"
        )
