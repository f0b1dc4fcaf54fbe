"""The command `train` on a tiny Llama and a file of instructions: runs, killed runs, refusals, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from sparselora.__main__ import main
from sparselora.training.trainer import FineTuner
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

ADAPTER = "adapter/adapter_model.safetensors"


class _Killed(BaseException):
    """Stops a run where no handler of errors sees it."""


@contextmanager
def killed_in_step(step: int) -> Iterator[None]:
    """Have the training in the block stop as by a kill, once ``step`` updates are done; it must come so far."""
    original = FineTuner.training_step

    def stop(trainer: FineTuner, *args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.global_step == step:
            raise _Killed
        return original(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuner, "training_step", stop)
        with pytest.raises(_Killed):
            yield


class Train:
    """Runs of `train` in ``folder``, in batches of 4 of 40 rows on the CPU, with ``arguments`` of the test."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.model = make_tiny_llama(folder / "llama")
        self.train, self.dev = (write_instructions(folder / f"{n}.jsonl", r, r) for n, r in (("train", 40), ("dev", 9)))
        self.arguments = [
            "--task", "causal_lm", "--model", str(self.model), "--dataset", str(self.train), "--eval_file",
            str(self.dev), "--train_bsz", "4", "--lr", "1e-2", "--device", "cpu", "--cache_dir", str(folder / "cache"),
            *arguments,
        ]  # fmt: skip

    def __call__(self, out: str, *arguments: str) -> int:
        return main(["train", *self.arguments, "--out_dir", str(self.folder / out), *arguments])

    def kill_in_step(self, step: int, out: str, *arguments: str) -> None:
        """Run the command and stop it as a kill would, once ``step`` updates are done."""
        with killed_in_step(step):
            self(out, *arguments)

    def assert_refused(self, arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Assert that the command ends with exit status 2, one line with ``message`` in it, and no folder."""
        assert self("bad", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (self.folder / "bad").exists()

    def table(self, out: str, name: str = "metrics") -> pd.DataFrame:
        return pd.read_csv(self.folder / out / f"{name}.csv")

    def record(self, out: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / out / "run.json").read_text())
        return record

    def adapter(self, out: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / out / ADAPTER)
