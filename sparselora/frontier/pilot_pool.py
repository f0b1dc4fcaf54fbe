"""Pilot runs of a search one after the other, or several at a time in processes of their own, on one GPU or several.

Which process trains a pilot run makes no difference to it: each has the model as loaded. A process ends with the one
that started it, after the pilot run that it is at.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from tqdm import tqdm

from sparselora.config.train import TrainConfig
from sparselora.errors import InputError
from sparselora.frontier.device_memory import OUT_OF_MEMORY, is_out_of_memory
from sparselora.frontier.pilots import PilotResult, PilotRuns
from sparselora.training.meter import DivergedError

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class PilotTask:
    """One pilot run that is to be made.

    Attributes:
        name: of the candidate.
        seed, rung: place in the search.
        config: its settings.
        cost_s: seconds it takes, by the plan.
    """

    name: str
    seed: int
    rung: int
    config: TrainConfig
    cost_s: float

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}, rung {self.rung}"


@dataclass(frozen=True)
class PilotFailure:
    """A pilot run without a result, of a candidate that is to be dropped for this ``reason``."""

    reason: str


Outcome = PilotResult | PilotFailure


def attempt(runs: PilotRuns, task: PilotTask) -> Outcome:
    """Make one pilot run; a loss that diverges and a device without memory enough are failures of the candidate.

    Raises:
        InputError: as `PilotRuns.train`.
    """
    try:
        return runs.train(task.config, task.label)
    except DivergedError as error:
        return PilotFailure(str(error))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return PilotFailure(OUT_OF_MEMORY)


class PilotPool:
    """Makes pilot runs, by ``runs`` itself where there is one slot, else in a process for each slot.

    Args:
        slots: for each pilot run at a time the value of ``CUDA_VISIBLE_DEVICES`` of its process; None leaves it.
    """

    def __init__(self, runs: PilotRuns, slots: Sequence[str | None]) -> None:
        self._runs = runs
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        if len(slots) > 1:
            context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            for slot in slots:
                connection, far_end = context.Pipe()
                process = context.Process(
                    target=_work, args=(far_end, runs.config, runs.cache_dir, runs.device.type), daemon=True
                )
                with _visible(slot):
                    process.start()
                far_end.close()
                self._connections.append(connection)
                self._processes.append(process)

    def __enter__(self) -> PilotPool:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
            process.join()

    def wait_until_ready(self) -> None:
        """Wait until every process has loaded the model and is idle.

        Raises:
            InputError: a process cannot load it.
        """
        for connection in self._connections:
            _received(connection)

    def run(
        self, tasks: Sequence[PilotTask], is_wanted: Callable[[PilotTask], bool] = lambda task: True
    ) -> Iterator[tuple[PilotTask, Outcome]]:
        """Make the pilot runs and yield each when it has ended.

        One at a time they come in the order of ``tasks``. Several at a time, the first begins first, and then those
        that take longest.

        Args:
            is_wanted: asked before a pilot run begins; those for which it is false are left out.
        Raises:
            InputError: as `PilotRuns.train`.
            RuntimeError: a process was killed.
        """
        if not self._connections:
            for task in tasks:
                if is_wanted(task):
                    yield task, attempt(self._runs, task)
            return
        queue = [*tasks[:1], *sorted(tasks[1:], key=lambda task: -task.cost_s)]
        idle, running = list(self._connections), dict[Connection, PilotTask]()
        while queue or running:
            queue = [task for task in queue if is_wanted(task)]
            while queue and idle:
                connection, task = idle.pop(0), queue.pop(0)
                _send(connection, task)
                running[connection] = task
            for connection in _ready(running):
                outcome = _received(connection)
                idle.append(connection)
                yield running.pop(connection), outcome


def _ready(running: Iterable[Connection]) -> list[Connection]:
    """Return those of the connections on which something has come, in their order; wait for the first."""
    connections = list(running)
    ready = wait(connections) if connections else []
    return [connection for connection in connections if connection in ready]


_KILLED = "a process of the search was killed; was memory short? The same command goes on, with fewer --jobs if need be"


def _send(connection: Connection, task: PilotTask) -> None:
    try:
        connection.send(task)
    except BrokenPipeError:
        raise RuntimeError(_KILLED) from None


def _received(connection: Connection) -> Any:
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionResetError):
        raise RuntimeError(_KILLED) from None
    if kind == "input error":
        raise InputError(value)
    if kind == "error":
        raise RuntimeError(value)
    return value


@contextlib.contextmanager
def _visible(slot: str | None) -> Iterator[None]:
    """Have a process that is started here see the GPU of ``slot`` alone."""
    before = os.environ.get(_VISIBLE)
    if slot is not None:
        os.environ[_VISIBLE] = slot
    try:
        yield
    finally:
        if slot is not None:
            os.environ.pop(_VISIBLE)
            os.environ.update({} if before is None else {_VISIBLE: before})


# --- in a process of its own --------------------------------------------------------------------------------------


def _work(connection: Connection, config: TrainConfig, cache_dir: str, device: str) -> None:
    """Make the pilot runs that come, until nothing more can come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, which then ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress of several processes at once says nothing
            _serve(connection, config, cache_dir, device)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except InputError as error:
        answer = "input error", str(error)
    except BaseException:
        answer = "error", f"in a process of the search: {traceback.format_exc()}"
    with contextlib.suppress(OSError):
        connection.send(answer)


def _serve(connection: Connection, config: TrainConfig, cache_dir: str, device: str) -> None:
    tqdm.set_lock(threading.RLock())  # its own is shared among processes, and outlives one that is ended
    runs = PilotRuns(config, cache_dir, torch.device(device))
    if runs.is_causal:
        runs.base()
    connection.send(("ready", None))
    while True:
        task = connection.recv()
        connection.send(("outcome", attempt(runs, task)))
