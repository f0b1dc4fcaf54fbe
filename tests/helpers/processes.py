"""Real processes that need not import the heavy libraries again: they are forked from a server that has them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_PRELOADED = (
    "accelerate", "datasets", "peft", "scipy.stats", "sklearn.metrics", "transformers.trainer",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "prune_finetune_lora",
    "sparselora.commands.train", "sparselora.commands.edit",
)  # fmt: skip


def start(
    *arguments: str, log: Path | None = None, environment: Mapping[str, str] | None = None, folder: Path = _ROOT
) -> Any:
    """``python *arguments`` as a process in ``folder``; its ``exitcode`` is None while it runs. Output goes to ``log``.

    It has the environment of the moment, but for what Python reads before it runs: hash seed and thread counts.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    process = context.Process(
        target=_main, args=(arguments, str(log or os.devnull), {**os.environ, **(environment or {})}, str(folder))
    )
    process.start()
    return process


def start_two(*arguments: str, folder: Path) -> None:
    """``python *arguments`` as two processes of one job, with the variables that torchrun sets; both must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    logs = [folder / f"process{rank}.log" for rank in range(2)]
    both = [
        start(*arguments, log=log, environment=job | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + 300
    try:
        while any(process.exitcode is None for process in both):
            assert time.monotonic() < deadline, [log.read_text()[-2000:] for log in logs]
            assert not any(process.exitcode for process in both), [log.read_text()[-2000:] for log in logs]
            time.sleep(0.02)
    finally:
        for process in both:
            process.kill()
            process.join()
    assert [process.exitcode for process in both] == [0, 0], [log.read_text()[-2000:] for log in logs]


def _main(arguments: Sequence[str], log: str, environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if "WORLD_SIZE" in environment:  # torchrun sets OMP_NUM_THREADS, which is read when torch is imported
        import torch

        torch.set_num_threads(1)
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
