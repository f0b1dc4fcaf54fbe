"""Times of candidates that are not all on the device at once, and how much is measured on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparselora.errors import InputError
from sparselora.frontier.candidates import Candidate
from sparselora.frontier.device_memory import OUT_OF_MEMORY
from sparselora.frontier.step_seconds import TIME_COLUMNS, Amounts, StepClock
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

TRUE_S = {"dense": 1.0, "a": 0.5, "b": 0.25, "c": 2.0, "d": 3.0, "e": 4.0}


def clock(room: int, needs: dict[str, int] | None = None) -> tuple[StepClock, list[list[str]]]:
    """A clock whose device has memory for ``room`` candidates (some need more), and is slower each time."""
    waves: list[list[str]] = []
    needs = needs or {}

    class Limited(StepClock):
        def __init__(self) -> None:
            self._runs: Any = SimpleNamespace(device=torch.device("cpu"))

        def _timed(self, candidates, rounds, problems):
            names = [candidate.name for candidate in candidates]
            if sum(needs.get(name, 1) for name in names) > room:
                return None
            waves.append(names)
            slower = 1 + 0.1 * (len(waves) - 1)
            return [
                dict(zip(TIME_COLUMNS, (n, TRUE_S[n] * slower, TRUE_S[n], TRUE_S[n] * 2, 100 / slower, 1.0, 0.5)))
                for n in names
            ]

    return Limited(), waves


def test_candidates_that_do_not_fit_together_are_timed_in_parts_each_with_dense():
    limited, waves = clock(room=3)
    table, problems = limited.measure([Candidate(name) for name in TRUE_S], 3)
    assert waves == [["dense", "a", "b"], ["dense", "c"], ["dense", "d", "e"]]
    assert not problems
    # The device was slower at each part, and dense with it.
    assert dict(zip(table["candidate"], table["seconds_per_step"])) == pytest.approx(TRUE_S)
    assert table["tokens_per_s"].tolist() == pytest.approx([100.0] * 6)
    whole, waves = clock(room=6)  # the control
    whole.measure([Candidate(name) for name in TRUE_S], 3)
    assert waves == [list(TRUE_S)]


def test_a_candidate_that_does_not_fit_next_to_dense_is_left_out():
    limited, waves = clock(room=3, needs={"b": 3})
    table, problems = limited.measure([Candidate(name) for name in ("dense", "a", "b")], 3)
    assert table["candidate"].tolist() == ["dense", "a"]
    assert problems == {"b": OUT_OF_MEMORY}
    limited, waves = clock(room=3, needs={"b": 3})
    table, problems = limited.measure([Candidate(name) for name in ("dense", "b")], 3)
    assert (table["candidate"].tolist(), problems, waves) == (["dense"], {"b": OUT_OF_MEMORY}, [["dense"]])
    limited, _ = clock(room=3, needs={"dense": 4})
    with pytest.raises(InputError, match="not enough memory for a step of dense training; use a smaller train_bsz"):
        limited.measure([Candidate("dense"), Candidate("a")], 3)


def test_memory_that_runs_out_while_timing_is_noticed_and_another_error_is_not(tmp_path: Path, monkeypatch):
    from sparselora.config.train import TrainConfig
    from sparselora.frontier import step_seconds
    from sparselora.frontier.pilots import PilotRuns

    folder = make_tiny_llama(tmp_path / "llama", layers=2)
    rows = write_instructions(tmp_path / "rows.jsonl", 40)
    config = TrainConfig(model=str(folder), dataset=str(rows), task="causal_lm", device="cpu", train_bsz=2)
    runs = PilotRuns(config, str(tmp_path), torch.device("cpu"))
    real, closed = StepClock(runs, 0), []
    dense = Candidate("dense", {"sparsity.mode": "dense"})

    def failing(error: Exception):
        def time_variants(variants, *args, **more):
            closed.append(next(iter(variants.values())))
            raise error

        return time_variants

    monkeypatch.setattr(step_seconds, "time_variants", failing(torch.OutOfMemoryError("CUDA out of memory")))
    assert real._timed([dense], 1, {}) is None
    assert not hasattr(closed[0], "model")  # let go
    monkeypatch.setattr(step_seconds, "time_variants", failing(ValueError("another")))
    with pytest.raises(ValueError, match="another"):
        real._timed([dense], 1, {})


def test_every_timed_batch_is_captured_before_it_is_timed_on_a_gpu():
    gpu, cpu = Amounts.on(torch.device("cuda"), 16), Amounts.on(torch.device("cpu"), 16)
    assert gpu.warm_rounds > gpu.batches
    assert gpu.least_rounds >= gpu.batches
    assert (cpu.warm_rounds, cpu.least_rounds, cpu.steps_per_round) == (1, 3, 1)
