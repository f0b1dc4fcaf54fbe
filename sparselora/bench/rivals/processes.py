"""Start a rival's process, end it when it takes too long, and read its answers."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparselora.bench.rivals import RIVALS
from sparselora.bench.rivals.jobs import Case, Job

LIMIT_S = 1800.0
"""Seconds that a rival's process may take for all of its cases by default; compiling a large model takes minutes."""


@dataclass(frozen=True)
class Measured:
    """Steps of a rival on the batches of one case.

    Attributes:
        step_ms: of every timed step.
        loss: of the first step.
        peak_mb: peak memory of the timed steps in MB; NaN on a CPU.
    """

    step_ms: tuple[float, ...]
    loss: float
    peak_mb: float


@dataclass
class Answer:
    """Results of a rival's process.

    Attributes:
        versions: of the packages in use.
        how: what of the trainer was in use.
        measured: by case.
        failed: reason why there are no times, by case.
        skipped: reason why there are none at all; None where there are.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    how: str = ""
    measured: dict[Case, Measured] = field(default_factory=dict)
    failed: dict[Case, str] = field(default_factory=dict)
    skipped: str | None = None


def run_rival(job: Job, limit_s: float = LIMIT_S) -> Answer:
    """Time a rival in a process of its own; one that is absent, fails or takes over ``limit_s`` gives the reason."""
    absent = [name for name in RIVALS[job.rival].modules if importlib.util.find_spec(name) is None]
    if absent:
        return Answer(skipped=f"{', '.join(absent)} is not installed")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        output, ending = _communicate(job, errors, limit_s)
        errors.seek(0)
        lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    answer = _read(job, output)
    if ending is not None:
        last = f": {lines[-1][:200]}" if lines and "longer" not in ending else ""
        for case in job.cases:
            if case not in answer.measured and case not in answer.failed:
                answer.failed[case] = ending + last
        if not answer.measured and answer.skipped is None:
            answer.skipped = ending + last
    return answer


def _communicate(job: Job, errors: Any, limit_s: float) -> tuple[str, str | None]:
    """Return what the process printed, and how it ended if not well."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(entry for entry in (os.environ.get("PYTHONPATH"), root) if entry)
    process = subprocess.Popen(
        [sys.executable, "-m", "sparselora.bench.rivals.child"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    try:
        output, _ = process.communicate(job.serialised(), timeout=limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return process.communicate()[0], f"took longer than {limit_s:g} s and was stopped"
    finally:
        _end(process)
    status = process.returncode
    if status:
        return output, f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return output, None


def _end(process: subprocess.Popen[str]) -> None:
    """End the process, and what it has started."""
    if process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _read(job: Job, output: str) -> Answer:
    answer = Answer()
    for line in output.splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # the end of a process that was stopped
            continue
        if "case" not in values:
            answer.versions, answer.how = values["versions"], values.get("how", "")
            answer.skipped = values.get("error")
            continue
        case = job.cases[values["case"]]
        if "error" in values:
            answer.failed[case] = values["error"]
            continue
        peak_mb = float("nan") if values["peak_mb"] is None else values["peak_mb"]
        answer.measured[case] = Measured(tuple(values["step_ms"]), values["loss"], peak_mb)
    return answer
