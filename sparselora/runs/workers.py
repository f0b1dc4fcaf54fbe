"""A map over independent items by forked processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_count(most: int = 4) -> int:
    """Return the number of processes worth starting: the cores available to this one, at most ``most``; 1 without a
    safe fork.

    Windows and macOS start processes from nothing, which takes longer than inspecting a small model.
    """
    if sys.platform != "linux":
        return 1
    return min(most, len(os.sched_getaffinity(0)))


def ordered_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    costs: Sequence[float],
    workers: int,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[Result]:
    """Yield ``function(item)`` for every item, in order, by ``workers`` forked processes (this one if below 2).

    Which process computes an item depends on ``costs (len(items),)`` alone: each item goes to the one with least to do
    so far. ``meanwhile`` is called once, while they are at their first items. What ``function`` raises is raised here.
    No process outlives this one by more than the item it is at.
    """
    if workers < 2 or len(items) < 2:
        meanwhile()
        yield from map(function, items)
        return
    owners = _share(costs, workers)
    context = multiprocessing.get_context("fork")
    receivers: list[Connection] = []
    processes = []
    try:
        for worker in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            receivers.append(receiver)
            mine = [item for item, owner in zip(items, owners) if owner == worker]
            processes.append(context.Process(target=_work, args=(function, mine, sender, receivers), daemon=True))
            processes[-1].start()
            sender.close()
        meanwhile()
        for owner in owners:
            try:
                error, value = receivers[owner].recv()
            except EOFError:
                raise RuntimeError("a worker process was killed; was memory short?") from None
            if error is not None:
                raise error
            yield value
    finally:
        for receiver in receivers:
            receiver.close()
        for process in processes:
            process.terminate()
            process.join()


def _share(costs: Sequence[float], workers: int) -> list[int]:
    """The worker of each item: in order, whoever has least to do."""
    load, owners = [0.0] * workers, []
    for cost in costs:
        owner = load.index(min(load))
        load[owner] += cost
        owners.append(owner)
    return owners


def _work(
    function: Callable[[Any], Any], items: Sequence[Any], sender: Connection, receivers: Sequence[Connection]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, which then ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for receiver in receivers:
        receiver.close()  # so that nobody listens once the parent is gone, and the next send ends this process
    try:
        for item in items:
            sender.send((None, function(item)))
    except BrokenPipeError:
        pass
    except Exception as error:
        sender.send((error, None))
