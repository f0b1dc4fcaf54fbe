"""Time whole LoRA training steps of several variants of one model, interleaved: PEFT, dense, sparse.

The variants share the frozen weights; each has its own adapter, optimizer and conversion.
"""

from __future__ import annotations

import copy
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
import transformers
from torch import nn

from sparselora.bench.payoff import Spread, best_dense, ratio
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Workload
from sparselora.contextual.handle import GRAPH_MULTIPLE, sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.errors import InputError
from sparselora.models.attach import attach_lora
from sparselora.models.labels import IGNORED
from sparselora.models.load import load_causal_lm, load_classifier
from sparselora.models.target_modules import resolve_target_modules

_LABELS = 2

PHASES = ("forward", "backward", "optimizer")

BURST = 3
"""Steps that a variant takes at its turn on a GPU."""


@dataclass
class StepTimes:
    """Milliseconds of every timed step, by phase; peak memory in MB and waits for the device of one step (CUDA only).

    ``peak_mb`` is that of the variant alone, with the frozen weights that all variants share (`TimedModel.alone_mb`).
    ``compiled`` counts what torch.compile compiled during the timed steps, where none is wanted. ``loss`` is that of
    the very first step.
    """

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    peak_mb: float = float("nan")
    host_waits: float = float("nan")
    compiled: int = 0
    loss: float = float("nan")

    @property
    def total(self) -> list[float]:
        return [sum(parts) for parts in zip(self.forward, self.backward, self.optimizer)]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.total)


# --- what is timed ------------------------------------------------------------------------------------------------


def build_model(
    source: str | Mapping[str, Any], *, causal: bool, device: torch.device, dtype: torch.dtype, seed: int
) -> nn.Module:
    """The model of a name or folder with its weights, or of a configuration with random ones, on ``device``.

    Raises:
        InputError: a name that cannot be loaded, a configuration that transformers cannot build.
    """
    torch.manual_seed(seed)
    if isinstance(source, str):
        model = load_causal_lm(source, dtype)[0] if causal else load_classifier(source, _LABELS)[0].to(dtype)
        return model.to(device)
    values = {name: value for name, value in source.items() if name != "model_type"}
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    try:
        config = transformers.AutoConfig.for_model(source["model_type"], **values)
        with torch.device(device):
            built = auto.from_config(config, dtype=dtype)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"transformers cannot build this configuration: {' '.join(str(error).split())[:160]}"
        ) from None
    built.config.use_cache = False
    return built


def adapt(
    model: nn.Module, *, r: int, alpha: float, targets: Sequence[str] | None, causal: bool,
    exclude: Sequence[str] | None = None, layers: Sequence[int] | None = None,
) -> nn.Module:  # fmt: skip
    """``model`` with a LoRA of rank ``r`` on ``targets`` (None: the attention projections), in training mode.

    lora_B starts at zero and would leave lora_A without a gradient, so it is drawn.

    Args:
        exclude, layers: modules to leave out, and the layers to adapt, as `resolve_target_modules` has them.
    Raises:
        InputError: a target that matches nothing, a rank out of range.
    """
    adapted = attach_lora(
        model,
        r=r,
        alpha=alpha,
        dropout=0.0,
        target_modules=resolve_target_modules(model, targets, exclude=exclude, layers=layers),
        base_model="",
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return adapted.train()


def random_batch(vocabulary: int, work: Workload, *, causal: bool, seed: int) -> dict[str, torch.Tensor]:
    """A batch on the CPU: random tokens, no padding; the last ``work.labelled`` of a row labelled, or a class a row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (work.batch, work.seq), generator=generator)
    labels = torch.randint(_LABELS, (work.batch,), generator=generator)
    if causal:
        labels = tokens.clone()
        labels[:, : work.seq - work.labelled] = IGNORED
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose frozen parameters are those of the original and whose trained ones are its own."""
    frozen: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


class TimedModel:
    """One way to do the step: a copy of the model, converted by ``convert``, with AdamW on what is trained.

    Args:
        convert: changes the copy and returns its handle, which has ``begin_step(step, total_steps)`` and ``remove()``;
            None leaves it PEFT as it is.
        bf16: compute in bfloat16 autocast.
        holds_choices: keep the channels of the first step for all others; choosing then costs nothing.

    Attributes:
        model: the copy, converted.
        handle: of its conversion; None without one.
        loss: of the latest step, on the device.
        held_bytes: memory on the GPU that making it took and that it keeps: adapter, fp8 copies.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        bf16: bool,
        convert: Callable[[nn.Module], Any] | None = None,
        holds_choices: bool = False,
    ) -> None:
        self.device = device
        before = self._allocated()
        self.model = shared_copy(model)
        self.handle = convert(self.model) if convert else None
        self.held_bytes = self._allocated() - before
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
        self._bf16 = bf16
        self._holds_choices = holds_choices
        self._steps = 0
        self.loss = torch.tensor(float("nan"))

    @property
    def is_graphed(self) -> bool:
        """True once a step was the replay of a CUDA graph."""
        return self.handle is not None and self.handle.graphs[1] > 0

    def alone_mb(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Peak memory of one step in MB, had the variant the device for itself; NaN without a GPU.

        The memory of other variants on the device does not count, nor do the weights that wait in host memory while
        their fp8 copies are used: here they stay on the device, for the others.
        """
        if self.device.type != "cuda":
            self.step(batch)
            return float("nan")
        shared = {p.data_ptr(): p.nbytes for p in self.model.parameters() if not p.requires_grad and p.is_cuda}
        before = self._allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step(batch)
        added = torch.cuda.max_memory_allocated() - before
        replaced = 0 if self.handle is None else self.handle.replaced_bytes
        return (sum(shared.values()) - replaced + self.held_bytes + added) / 1e6

    def _allocated(self) -> int:
        """Bytes in use, without what only waits for the garbage collector: it would be freed in the middle."""
        gc.collect()
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def step(self, batch: Mapping[str, torch.Tensor]) -> tuple[float, float, float]:
        """One training step on a batch of the CPU; milliseconds forward (transfer included), backward, optimizer."""
        return self.burst([batch])[0]

    def burst(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> list[tuple[float, float, float]]:
        """Steps one after the other, as a training loop runs them: the host waits after the last only."""
        marks = [self._enqueue(batch) for batch in batches]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [tuple(a.elapsed_time(b) for a, b in pairwise(step_marks)) for step_marks in marks]
        return [tuple(1000 * (b - a) for a, b in pairwise(step_marks)) for step_marks in marks]

    def _enqueue(self, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """One step; the marks before and between its phases and after the last."""
        layout = self._layout(batch)
        marks = [self._mark()]
        if self.handle is not None:
            self.handle.begin_step(self._steps, self._steps + 1_000_000)
        self._steps += 1
        with torch.autocast(self.device.type, torch.bfloat16) if self._bf16 else nullcontext():
            loss = self.model(**self._moved(batch, layout)).loss
        marks.append(self._mark())
        self.loss = loss.detach()
        loss.backward()
        marks.append(self._mark())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        marks.append(self._mark())
        if self.handle is not None and self._holds_choices and self._steps == 1:
            self.handle.hold_choices()
        return marks

    def _layout(self, batch: Mapping[str, torch.Tensor]) -> TokenLayout | None:
        """The layout that the collator works out on the host; PEFT as it is does not know it."""
        if self.handle is None:
            return None
        multiple = GRAPH_MULTIPLE if self.device.type == "cuda" else 0
        causal = batch["labels"].dim() == 2
        return TokenLayout.build(batch["attention_mask"], batch["labels"], causal=causal, multiple=multiple)

    def _moved(self, batch: Mapping[str, torch.Tensor], layout: TokenLayout | None) -> dict[str, Any]:
        moved: dict[str, Any] = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        return moved if layout is None else moved | {"token_layout": layout.to(self.device)}

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def close(self) -> None:
        """Undo the conversion and let go of the adapter's copy."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = None  # it has the model
        del self.model, self._optimizer


# --- timing -------------------------------------------------------------------------------------------------------


def time_variants(
    variants: Mapping[str, TimedModel],
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    rounds: int,
    warmup: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, StepTimes]:
    """Every variant once a round, in an order that turns by one each round, on the same batch.

    ``warmup`` rounds are not counted; memory is that of a variant's very first step, which no CUDA graph serves (a
    replay's memory does not count as allocated), and waits are those of one step after them.
    """
    names = list(variants)
    times = {name: StepTimes() for name in names}
    for name in names:
        times[name].peak_mb = variants[name].alone_mb(batches[0])
        times[name].loss = float(variants[name].loss)
        progress()
    for i in range(1, warmup):
        for name in names:
            variants[name].step(batches[i % len(batches)])
            progress()
    for name in names:
        times[name].host_waits = _host_waits(variants[name], batches[0])
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            before = _compiled()
            cuda = variants[name].device.type == "cuda"
            steps = variants[name].burst([batches[i % len(batches)]] * (BURST if cuda else 1))
            times[name].compiled += _compiled() - before
            for parts in steps[1:] if cuda else steps:  # the first of a burst waits for the host to start
                for phase, ms in zip(PHASES, parts):
                    getattr(times[name], phase).append(ms)
            progress()
    return times


def _host_waits(variant: TimedModel, batch: Mapping[str, torch.Tensor]) -> float:
    if variant.device.type != "cuda":
        return float("nan")
    with _counting_waits() as count:
        variant.step(batch)
    return count()


@contextmanager
def _counting_waits() -> Iterator[Callable[[], int]]:
    """Counts the calls within that made the host wait for the device, as far as torch can tell."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(w.message) for w in caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _compiled() -> int:
    """Graphs that torch.compile has compiled so far in this process."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0
    counters: Any = sys.modules["torch._dynamo.utils"].counters
    return int(counters["stats"]["unique_graphs"])


def convert_with(config: SparsityConfig, calibration: Any = None) -> Callable[[nn.Module], Any]:
    """Return a function that turns a model, whose weights others share, into one that trains by ``config``."""
    return lambda model: sparsify(model, config, calibration=calibration, keep_weights=True)


def step_table(times: Mapping[str, StepTimes], dense: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """A row a variant: medians and quartiles in ms, tokens per second, and the speed-up over the best of ``dense``.

    Columns: variant, dense (whether it computes every channel), n (timed steps), step_ms with ``_low`` and ``_high``
    (quartiles), the medians of the phases, tokens_per_s, speedup with quartiles (of the ratios within a round),
    peak_mb, host_waits, compiled.
    """
    totals = {name: variant.total for name, variant in times.items()}
    best = best_dense(totals, dense)
    rows = []
    for name, variant in times.items():
        row: dict[str, Any] = {"variant": name, "dense": name in dense, "n": len(variant.total)}
        for column, spread in (("step_ms", Spread.of(variant.total)), ("speedup", ratio(totals[best], variant.total))):
            row |= {column: spread.median, f"{column}_low": spread.low, f"{column}_high": spread.high}
        row |= {f"{phase}_ms": statistics.median(getattr(variant, phase)) for phase in PHASES}
        row["tokens_per_s"] = 1000 * tokens / variant.median_ms
        rows.append(row | {"peak_mb": variant.peak_mb, "host_waits": variant.host_waits, "compiled": variant.compiled})
    return rows


def format_steps(table: pd.DataFrame) -> str:
    """Return `step_table` as text, without the columns of memory and waits where there is no GPU."""
    quartiles = [f"{low:.1f}–{high:.1f}" for low, high in zip(table["step_ms_low"], table["step_ms_high"])]
    formats = {
        "step": ("variant", "{}"), "median ms": ("step_ms", "{:.1f}"), "quartiles": ("quartiles", "{}"),
        "forward": ("forward_ms", "{:.1f}"), "backward": ("backward_ms", "{:.1f}"),
        "optimizer": ("optimizer_ms", "{:.1f}"), "tokens/s": ("tokens_per_s", "{:,.0f}"),
        "× best dense": ("speedup", "{:.2f}"), "peak MB": ("peak_mb", "{:,.0f}"),
        "host waits": ("host_waits", "{:.0f}"), "compiled": ("compiled", "{}"),
    }  # fmt: skip
    if table["peak_mb"].isna().any():
        del formats["peak MB"], formats["host waits"]
    table = table.assign(quartiles=quartiles)
    cells = {label: table[column].map(text.format) for label, (column, text) in formats.items()}
    return (
        f"{pd.DataFrame(cells).to_string(index=False)}\n"
        "host waits and compiled: synchronisations of one step, and graphs compiled while the clock ran; 0 is wanted."
    )
