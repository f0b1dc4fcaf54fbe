"""Time, tokens, loss and memory of every training step, recorded without synchronising the device."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Lora, Shape, Workload, token_costs, total
from sparselora.errors import InputError
from sparselora.models.architectures import architecture

METRICS = (
    "step", "loss", "lr", "sparse", "step_ms", "forward_ms", "backward_ms", "optimizer_ms", "tokens", "outputs",
    "rows", "padded", "tokens_per_s", "peak_mb",
)  # fmt: skip
"""A row a step. Losses are means, counts are sums over processes; times and memory are those of the first process."""


class DivergedError(RuntimeError):
    """The loss of a training run stopped being finite."""


class Counts(Protocol):
    """Counts of one batch: rows, tokens without padding, those whose successor is labelled, padded positions."""

    @property
    def rows(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    @property
    def padded(self) -> int: ...


_WARM_STEPS = 3
"""Steps at the start that are left out of the medians: allocations and caches are made there."""

Mark = Any  # a CUDA event, or seconds of the host's clock


@dataclass
class _Step:
    """One optimizer step as it happens: marks in time, and losses that stay on the device until they are read."""

    begin: Mark
    sparse: bool = False
    forwards: list[tuple[Mark, Mark, Mark]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    end: Mark = None
    number: int = 0
    lr: float = float("nan")
    peak_mb: float = float("nan")


class StepMeter:
    """Collects the steps of a training run.

    ``step_ms`` runs from a step's beginning, with its batches at hand, to its end; ``optimizer_ms`` from the last
    backward pass, clipping included. On CUDA times are those between events in the stream, on the CPU those of the
    host's clock.

    Args:
        device: where the step runs.
        is_sparse: asked once a step, at its first batch.
    """

    def __init__(self, device: torch.device, is_sparse: Callable[[], bool]) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._is_sparse = is_sparse
        self._open: _Step | None = None
        self._batch: list[Mark] = []
        self._pending: list[_Step] = []
        self._rows: list[tuple[float, ...]] = []

    def _mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def running(self) -> bool:
        """Return whether a step has begun and not ended."""
        return self._open is not None

    # --- called by the Trainer ---

    def begin_step(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._open = _Step(self._mark())

    def begin_batch(self, counts: Counts) -> None:
        assert self._open is not None
        if not self._open.counts:
            self._open.sparse = self._is_sparse()
        self._open.counts.append(counts)
        self._batch = [self._mark()]

    def end_forward(self) -> None:
        self._batch.append(self._mark())

    def end_batch(self, loss: torch.Tensor) -> None:
        assert self._open is not None
        begin, middle = self._batch
        self._open.forwards.append((begin, middle, self._mark()))
        self._open.losses.append(loss.detach())

    def note_lr(self, lr: float) -> None:
        assert self._open is not None
        self._open.lr = float(lr)

    def end_step(self, number: int) -> None:
        assert self._open is not None
        self._open.end = self._mark()
        self._open.number = number
        self._open.peak_mb = peak_memory_mb(self._device)
        self._pending.append(self._open)
        self._open = None

    # --- read out ---

    def drain(self, accelerator: Any) -> None:
        """Read what is pending; waits for the device. Every process calls it after the same step.

        Raises:
            DivergedError: a loss is not finite.
        """
        if not self._pending:
            return
        if self._cuda:
            torch.cuda.synchronize(self._device)
        losses = torch.stack([torch.stack(step.losses).float().sum() for step in self._pending])
        losses = accelerator.reduce(losses, reduction="mean").tolist()
        names = ("tokens", "outputs", "rows", "padded")
        own_counts = [[sum(getattr(batch, name) for batch in step.counts) for name in names] for step in self._pending]
        counts = accelerator.reduce(torch.tensor(own_counts, device=self._device), reduction="sum").tolist()
        for step, loss, count in zip(self._pending, losses, counts):
            if not np.isfinite(loss):
                raise DivergedError(f"training diverged: the loss is {loss} at step {step.number}; lower --lr")
            times = self._times(step)
            speed = 1000 * count[0] / times[0]
            self._rows.append((step.number, loss, step.lr, int(step.sparse), *times, *count, speed, step.peak_mb))
        self._pending = []

    def _times(self, step: _Step) -> tuple[float, float, float, float]:
        forward = sum(self._ms(begin, middle) for begin, middle, _ in step.forwards)
        backward = sum(self._ms(middle, end) for _, middle, end in step.forwards)
        return self._ms(step.begin, step.end), forward, backward, self._ms(step.forwards[-1][2], step.end)

    def _ms(self, begin: Mark, end: Mark) -> float:
        return float(begin.elapsed_time(end)) if self._cuda else 1000 * (end - begin)

    def last_loss(self) -> float:
        """Loss of the last step that ended (of this process, if it has not been drained); waits for the device."""
        if self._pending:
            return float(torch.stack(self._pending[-1].losses).float().sum())
        return float(self._rows[-1][1]) if self._rows else float("nan")

    def mean_loss(self, after: int = 0) -> float:
        """Mean loss of the drained steps with numbers above ``after``; NaN without any."""
        losses = [row[1] for row in self._rows if row[0] > after]
        return sum(losses) / len(losses) if losses else float("nan")

    def table(self) -> pd.DataFrame:
        """Return what has been read, one row per step, with the columns `METRICS`."""
        table = pd.DataFrame(self._rows, columns=list(METRICS))
        whole = ["step", "sparse", "tokens", "outputs", "rows", "padded"]
        return table.astype(dict.fromkeys(whole, "int64"))

    def restore(self, table: pd.DataFrame, last_step: int) -> None:
        """Take over the rows of an interrupted run up to ``last_step``."""
        earlier_rows = table.loc[table["step"] <= last_step, list(METRICS)]
        self._rows = list(earlier_rows.itertuples(index=False, name=None))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far, in MB (1e6 bytes): allocated on a CUDA device, resident on the CPU.

    NaN on a system that does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _adapts(target: str, name: str) -> bool:
    """Return whether an entry of ``target_modules`` matches the matrix ``name`` of a layer, by PEFT's rule."""
    if f".{name}".endswith(f".{target}"):
        return True
    # Longer than the name within a layer, such as layers.3.self_attn.q_proj: the layer's number stands before it.
    return target.endswith(f".{name}") and target.removesuffix(f".{name}").rpartition(".")[2].isdigit()


class StepFlops:
    """FLOPs of a training step per token, from the counts of its batch; NaN for an architecture that is not known.

    Args:
        described: what the model's ``config.json`` says.
        sparsity: None for plain PEFT.
        lora_r, targets: of the adapter: its rank, and entries of ``target_modules``.
    """

    def __init__(
        self, described: Mapping[str, Any], sparsity: SparsityConfig | None, lora_r: int, targets: Sequence[str]
    ) -> None:
        self._config = sparsity
        self._rank = lora_r
        self._known: dict[tuple[int, int, bool, int], float] = {}
        self._shape: Shape | None = None
        with contextlib.suppress(InputError, KeyError):
            self._shape = Shape.from_config(described)
            adapted = {
                short
                for matrix in architecture(described).matrices
                for short in matrix.parts
                if any(_adapts(target, matrix.name) for target in targets)
            }
            self._adapted = tuple(name for name in self._shape.sides if name in adapted)

    def per_token(self, rows: int, tokens: int, outputs: int, sparse: bool, rank: int | None = None) -> float:
        """Return the FLOPs per token of a step with ``tokens`` tokens in ``rows`` rows, all as if of one length.

        Args:
            rank: of the adapter in that step; None for ``lora_r``.
        """
        rank = self._rank if rank is None else rank
        if self._shape is None:
            return float("nan")
        length = max(1, round(tokens / rows))
        key = (length, min(length, round(outputs / rows)), sparse, rank)
        if key not in self._known:
            config = self._config
            if config is not None and not sparse:
                config = SparsityConfig(mode="dense")
            work = Workload(1, length, key[1])
            self._known[key] = 2 * total(
                token_costs(self._shape, config, work, Lora(rank, self._adapted)), training=True
            )
        return self._known[key]

    def beside(self, metrics: pd.DataFrame, rank_in: Callable[[int], int] | None = None) -> pd.DataFrame:
        """``metrics`` with the column ``active_flops_per_token``.

        Args:
            rank_in: the adapter's rank in a step, by its number; None for ``lora_r`` in all.
        """
        columns = (metrics[name] for name in ("rows", "tokens", "outputs", "sparse"))
        ranks = [None if rank_in is None else rank_in(int(step)) for step in metrics["step"]]
        values = [
            self.per_token(int(rows), int(tokens), int(outputs), bool(sparse), rank)
            for rows, tokens, outputs, sparse, rank in zip(*columns, ranks)
        ]
        return metrics.assign(active_flops_per_token=values)


def steady_steps(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``metrics`` after the first few steps, in which allocations and caches are made."""
    return metrics.iloc[min(_WARM_STEPS, len(metrics) - 1) :]


def step_medians(metrics: pd.DataFrame) -> dict[str, float]:
    """Medians over the sparse steps (over all, if none is), the first few left out; tokens/s from the sums of both."""
    steady = steady_steps(metrics)
    if bool((steady["sparse"] == 1).any()):
        steady = steady[steady["sparse"] == 1]
    times = {name: float(steady[name].median()) for name in ("step_ms", "forward_ms", "backward_ms", "optimizer_ms")}
    return {
        **times,
        "tokens_per_s": float(1000 * steady["tokens"].sum() / steady["step_ms"].sum()),
        "padding": float(1 - steady["tokens"].sum() / steady["padded"].sum()),
        "peak_mb": float(metrics["peak_mb"].max()),
        "active_flops_per_token": float(steady["active_flops_per_token"].mean()),
        "sparse_steps": int((metrics["sparse"] == 1).sum()),
    }
