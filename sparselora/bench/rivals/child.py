"""The process of one rival: ``python -m sparselora.bench.rivals.child`` with a `Job` on stdin.

Each line that it prints is a JSON object: first ``how`` and ``versions``, then one a case, with ``case`` (its number)
and either ``step_ms`` (of every timed step), ``loss`` (of the first step), ``peak_mb`` (null on a CPU) or ``error``.
Whatever else prints in this process goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from sparselora.bench.rivals import RIVALS
from sparselora.bench.rivals.jobs import Case, Job


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def send(answer: Mapping[str, Any]) -> None:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

        run(Job.deserialised(sys.stdin.read()), send)


def run(job: Job, send: Callable[[Mapping[str, Any]], None]) -> None:
    """Prepare the rival, and ``send`` what it is and what it takes."""
    try:
        prepared = importlib.import_module(f"sparselora.bench.rivals.{job.rival}").prepare(job)
    except Exception as error:
        traceback.print_exc()
        send({"versions": versions(job.rival), "error": _line(error)})
        return
    send({"versions": versions(job.rival), "how": prepared.how})
    optimizer = None
    for number, case in enumerate(job.cases):
        try:
            optimizer = optimizer or _optimizer(prepared.model, job)
            send({"case": number, **measure(prepared, optimizer, job, case)})
        except Exception as error:
            traceback.print_exc()
            send({"case": number, "error": _line(error)})


def versions(rival: str) -> dict[str, str]:
    """Return the versions of the packages that a rival's step is made of, torch, transformers and PEFT among them."""
    numbers = {}
    for name in dict.fromkeys((*RIVALS[rival].distributions, "peft", "transformers", "torch")):
        try:
            numbers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            module = sys.modules.get(name.replace("-", "_"))
            if module is not None:
                numbers[name] = str(getattr(module, "__version__", "unknown"))
    return numbers


def _optimizer(model: Any, job: Job) -> Any:
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, fused=job.device == "cuda")


def measure(prepared: Any, optimizer: Any, job: Job, case: Case) -> dict[str, Any]:
    """Return milliseconds of every timed step, the loss of the first untimed one, and the peak memory of the steps."""
    import torch

    from sparselora.bench.rivals.batches import case_batches

    is_cuda = job.device == "cuda"
    batches = case_batches(job.vocabulary, case, seed=job.seed)
    if case.layout == "full":  # nothing to mask; looking for it would have the host wait for the device
        batches = [{name: x for name, x in batch.items() if name != "attention_mask"} for batch in batches]

    def mark() -> Any:
        if not is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(number: int) -> Any:
        batch = {name: x.to(job.device, non_blocking=True) for name, x in batches[number % len(batches)].items()}
        with torch.autocast(job.device, torch.bfloat16) if job.bf16 else nullcontext():
            loss = prepared.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    loss = float(step(0))
    for number in range(1, max(job.warmup, len(batches))):
        step(number)
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    marks = [mark()]
    for number in range(job.rounds):
        step(number)
        marks.append(mark())
    if is_cuda:
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    else:
        times = [1000 * (b - a) for a, b in itertools.pairwise(marks)]
    peak_mb = torch.cuda.max_memory_allocated() / 1e6 if is_cuda else None
    return {"step_ms": times, "loss": loss, "peak_mb": peak_mb}


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


if __name__ == "__main__":
    main()
