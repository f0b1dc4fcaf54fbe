"""A map over forked processes: order, errors, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from sparselora.errors import InputError
from sparselora.runs import workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order_whoever_computed_them(count):
    items = list(range(17))

    def square(i: int) -> tuple[int, int]:
        time.sleep(0.01 * (i % 3 == 0))  # later items are ready before earlier ones
        return i * i, os.getpid()

    found = list(workers.ordered_map(square, items, [1.0 + i % 5 for i in items], count))
    assert [value for value, _ in found] == [i * i for i in items]
    processes = {process for _, process in found}
    assert len(processes) == count
    assert (os.getpid() in processes) == (count == 1)
    assert not multiprocessing.active_children()


def test_costs_alone_decide_who_computes_what():
    assert workers._share([5, 1, 1, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1, 1, 0]
    assert workers._share([0, 0, 0], 2) == [0, 0, 0]


def test_errors_arrive_in_their_place_and_end_the_others():
    def fail_at_three(i: int) -> int:
        if i == 3:
            raise InputError("no. 3 is damaged")
        return i

    found = workers.ordered_map(fail_at_three, range(50), [1.0] * 50, 2)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match=r"no\. 3 is damaged"):
        next(found)
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_an_error_and_an_abandoned_map_leaves_none():
    with pytest.raises(RuntimeError, match="worker process was killed"):
        list(workers.ordered_map(lambda i: os.kill(os.getpid(), signal.SIGKILL), [1, 2], [1.0, 1.0], 2))
    found = workers.ordered_map(lambda i: time.sleep(0.01), range(1000), [1.0] * 1000, 2)
    next(found)
    found.close()
    assert not multiprocessing.active_children()


ENDLESS = """
import time
from sparselora.runs.workers import ordered_map
def work(i):
    time.sleep(0.02)
    return __import__("os").getpid()
for process in ordered_map(work, range(10_000), [1.0] * 10_000, 2):
    print(process, flush=True)
"""


def test_workers_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True)
    children = {int(parent.stdout.readline()) for _ in range(4)}
    assert len(children) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
