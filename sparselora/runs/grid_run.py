"""The edits of a grid, run: adapters and models fetched first, then one process and one log file each."""

from __future__ import annotations

import argparse
import os
import re
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

from sparselora.errors import InputError
from sparselora.runs.grid import ADAPTERS, FINISHED, LOGS, Job, Line, at_line, flags_of, plan_grid, read_grid
from sparselora.runs.process import PARENT

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_GRACE_S = 10.0
"""How long a stopped edit has to record that it was, before it is killed."""
_POLL_S = 0.05
_LOG_START = b"$ -m sparselora edit "
"""How every log begins."""

Say = Callable[[str], object]


def run_grid(
    grid: Path,
    run_root: Path,
    defaults: argparse.Namespace,
    parser: argparse.ArgumentParser,
    check: Callable[[argparse.Namespace], Mapping[str, object]],
    say: Say,
    *,
    gpus: Sequence[str] = (),
    prefetch: bool = False,
) -> list[Failure]:
    """Run the edits of the file ``grid`` that are not finished; with ``defaults.dry_run`` only say which these are.

    Args:
        run_root: where each has its folder.
        defaults: the flags beside ``--grid``.
        parser: of one edit; raises InputError.
        check: as for `plan_grid`.
        say: is told what happens.
        gpus, prefetch: see `run_jobs`; fetch what is on the hub, then run without it.
    Returns:
        What failed.
    """
    lines = read_grid(grid, vars(defaults), flags_of(parser))
    if gpus:
        lines = _on_gpus(grid, lines)
    fetch = prefetch and not defaults.dry_run
    lines = with_local_adapters(grid, lines, run_root, fetch_adapter if fetch else None)
    jobs = plan_grid(grid, lines, run_root, parser, check, overwrite=defaults.overwrite)
    for job in jobs if defaults.dry_run else ():
        say(f"{job.line.name}: {job.state}")
    finished = sum(job.state == FINISHED for job in jobs)
    say(f"{len(jobs)} configurations, {finished} finished, {len(jobs) - finished} to run")
    if defaults.dry_run:
        return []
    for name in base_models(lines) if fetch else ():
        say(f"fetching {name}")
        fetch_model(name)
    return run_jobs(jobs, run_root, gpus, say, offline=fetch and only_local_data(lines))


def _on_gpus(path: Path, lines: Sequence[Line]) -> list[Line]:
    """``lines`` with device cuda: a process without its GPU must fail, not go to the CPU.

    Raises:
        InputError: one names another device.
    """
    for line in lines:
        with at_line(path, line.number):
            if line.values["device"] not in ("auto", "cuda"):
                raise InputError(f"device {line.values['device']} cannot go with --gpus; leave it out")
    return [replace(line, values=line.values | {"device": "cuda"}) for line in lines]


# --- the hub ------------------------------------------------------------------------------------------------------


def is_hub_name(text: str | None) -> bool:
    """Whether ``text`` is no folder here and has the form owner/name."""
    return text is not None and not Path(text).exists() and _HUB_NAME.fullmatch(text) is not None


def local_adapter(name: str, run_root: Path) -> Path:
    """Where the adapter ``owner/name`` of the hub is, once it is fetched: a folder with a name that one can read."""
    return run_root / ADAPTERS / name.replace("/", "--")


def with_local_adapters(
    path: Path, lines: Sequence[Line], run_root: Path, fetch: Callable[[str, Path], object] | None
) -> list[Line]:
    """``lines`` with the adapters of the hub as folders of the grid, fetched by ``fetch`` where they are not there.

    Raises:
        InputError: one is not there, and ``fetch`` is None; or it cannot be had.
    """
    found = []
    for line in lines:
        name = line.values["adapter"]
        if not is_hub_name(name):
            found.append(line)
            continue
        folder = local_adapter(name, run_root)
        with at_line(path, line.number):
            if not (folder / "adapter_config.json").is_file():
                if fetch is None:
                    raise InputError(
                        f"adapter {name!r} is no folder and was not fetched; --prefetch takes it from the hub (a dry "
                        "run does not)"
                    )
                fetch(name, folder)
        found.append(replace(line, values=line.values | {"adapter": str(folder)}))
    return found


def fetch_adapter(name: str, folder: Path) -> None:
    """Download the files of an adapter to ``folder``.

    Raises:
        InputError: it is not to be had.
    """
    _download(name, "adapter", local_dir=folder, allow_patterns=["adapter_*", "*.json"], ignore_patterns=["*/*"])


def fetch_model(name: str) -> None:
    """Download a base model to the hub's cache, without copies in the formats of other libraries.

    Raises:
        InputError: it is not to be had.
    """
    _download(name, "base model", ignore_patterns=["*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "*/*"])


def _download(name: str, what: str, **how: Any) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, **how)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{what} {name!r} cannot be had from the hub ({type(error).__name__}); check the name and the network, or "
            "name a local folder"
        ) from None


def base_models(lines: Sequence[Line]) -> list[str]:
    """The base models of the hub, each once."""
    named = (line.values["model"] for line in lines)
    return list(dict.fromkeys(name for name in named if name and _is_hub_model(name)))


def _is_hub_model(name: str) -> bool:
    """Also ``gpt2``: models may be without an owner. ``minilm`` is the name of an installed one."""
    return name != "minilm" and not Path(name).exists() and name.count("/") < 2 and not name.startswith((".", "~", "/"))


def only_local_data(lines: Sequence[Line]) -> bool:
    """Whether no line takes its rows from the hub."""
    named = (line.values["dataset"] for line in lines)
    asked = any(line.values["eval_gsm8k"] for line in lines)
    return not asked and all(name is None or name == "docstrings" or Path(name).exists() for name in named)


# --- running ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A job that did not end well, with its exit status and the last line of its log."""

    job: Job
    status: int
    said: str


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    began: float


def run_jobs(
    jobs: Sequence[Job], run_root: Path, gpus: Sequence[str], say: Say, *, offline: bool = False
) -> list[Failure]:
    """Run what is not finished, each in a process of its own: one a GPU at a time, or just one without ``gpus``.

    The process of a job on a GPU sees this one alone. What a process prints is in ``logs/NAME.log``. When this call is
    interrupted, the processes are, too, and have time to record it; when it is killed, they end by themselves.

    Args:
        gpus: values of CUDA_VISIBLE_DEVICES.
        say: is told what starts and what ends.
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
        raise InputError(f"--run_root {run_root} is in use by another process; wait for it") from None
    except OSError as error:
        raise InputError(f"--run_root {run_root} cannot be written ({error.strerror}); use another folder") from None
    try:
        _refuse_foreign_logs(jobs, run_root)
        return _run_all([job for job in jobs if job.state != FINISHED], gpus, say, offline)
    finally:
        lock.release()


def _refuse_foreign_logs(jobs: Sequence[Job], run_root: Path) -> None:
    """Raise where a log would be written to another place, or over a file that is no log of a grid."""
    if (run_root / LOGS).is_symlink():
        raise InputError(f"{run_root / LOGS} is a link, and logs would be written behind it; use another --run_root")
    for log in (_log(job) for job in jobs if job.state != FINISHED):
        if not os.path.lexists(log):
            continue
        if log.is_symlink() or not log.is_file() or not _begins_like_a_log(log):
            raise InputError(f"{log} is in the way of a log, and no grid wrote it; move it away")


def _begins_like_a_log(path: Path) -> bool:
    with path.open("rb") as stream:
        start = stream.read(len(_LOG_START))
    return _LOG_START.startswith(start)  # also one that was cut short


def _run_all(jobs: Sequence[Job], gpus: Sequence[str], say: Say, offline: bool) -> list[Failure]:
    waiting = list(enumerate(jobs, 1))
    running: dict[str | None, _Running] = {}
    failures: dict[int, Failure] = {}
    free: list[str | None] = list(gpus) or [None]
    try:
        while waiting or running:
            while waiting and free:
                number, job = waiting.pop(0)
                gpu = free.pop(0)
                say(f"[{number}/{len(jobs)}] {job.line.name}: started" + (f" on GPU {gpu}" if gpu is not None else ""))
                running[gpu] = _Running(job, _start(job, gpu, offline), time.monotonic())
            for gpu in [gpu for gpu, each in running.items() if each.process.poll() is not None]:
                ended = running.pop(gpu)
                free.append(gpu)
                status = ended.process.returncode
                how = "done" if status == 0 else f"failed with exit status {status}"
                say(f"{ended.job.line.name}: {how} after {time.monotonic() - ended.began:.0f} s")
                if status:
                    failures[ended.job.line.number] = Failure(ended.job, status, _last_line(_log(ended.job)))
            time.sleep(_POLL_S)
    finally:
        _stop([each.process for each in running.values()])
    return [failures[job.line.number] for job in jobs if job.line.number in failures]


def _start(job: Job, gpu: str | None, offline: bool) -> subprocess.Popen[bytes]:
    environment = {**os.environ, PARENT: str(os.getpid())}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    # In a session of its own: a Ctrl-C at the terminal reaches it once, from here, and not in the midst of its record.
    with _log(job).open("wb") as log:
        log.write(f"$ {shlex.join(job.command[1:])}\n".encode())
        log.flush()
        return subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
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


def _log(job: Job) -> Path:
    return job.folder.parent / LOGS / f"{job.line.name}.log"


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
