"""Parts of a step by the time they take: of the plain PEFT step, our dense one and the configuration's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from sparselora.bench.rates import copy_rate, product_rate
from sparselora.bench.request import ExplainRequest
from sparselora.bench.step_parts import PARTS, STEP, Sizes, cpu_parts, gpu_parts
from sparselora.bench.step_times import Bench, variant_configs
from sparselora.bench.timing import TimedModel
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import token_costs
from sparselora.models.model_files import model_facts
from sparselora.report.contextual import step_parts
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress


@dataclass(frozen=True)
class ExplainResults:
    """Results of an explanation.

    Attributes:
        parts: a row for every variant and part.
        where: device and dtype, in words.
    """

    parts: pd.DataFrame
    where: str


def explain_steps(request: ExplainRequest, folder: RunFolder) -> ExplainResults:
    """Profile the steps, and write table and figure into ``folder``.

    Raises:
        InputError: a model or configuration that cannot be used, before anything is written.
    """
    setup = request.setup
    bench = Bench(request)
    configs = variant_configs(setup, controls=False)
    variants = {name: bench.variant(config) for name, config in configs.items()}
    with folder:
        floors = Floors(bench)
        rows: list[dict[str, Any]] = []
        with Progress(len(variants), "variant", "profile") as progress:
            for name, variant in variants.items():
                parts = profiled_parts(variant, bench, request)
                rows += [{"variant": name, **row} for row in part_rows(parts, floors.of(configs[name]))]
                variant.close()
                progress.update()
        table = pd.DataFrame(rows)
        step_parts(folder.path("explain.png"), table, f"{setup.title} ({bench.where})", PARTS)
        source = setup.source if isinstance(setup.source, str) else None
        folder.note(device=bench.device.type, rates=floors.rates, **model_facts(source))
    return ExplainResults(table, bench.where)


# --- the profile --------------------------------------------------------------------------------------------------


def profiled_parts(variant: TimedModel, bench: Bench, request: ExplainRequest) -> dict[str, float]:
    """Return milliseconds of every part of a step, the mean of the profiled steps; they add up to the step.

    On a GPU the kernels are those of steps that ran launch by launch, for a CUDA graph hides what launched them; the
    step is timed as it runs, without the profiler, and what the kernels leave of it are ``gaps``: below zero where
    kernels run side by side.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    is_cuda = variant.device.type == "cuda"
    batches = bench.batches(bench.setup.work, 2)
    for i in range(max(3, request.warmup)):
        variant.step(batches[i % 2])
    step_ms = statistics.median(sum(parts) for parts in variant.burst([batches[0]] * (request.rounds + 1))[1:])
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for i in range(request.rounds):
            if is_cuda and variant.handle is not None:
                variant.handle.forget_graphs()
            with record_function(STEP):
                variant.step(batches[i % 2])
    events = profiler.events()
    setup = bench.setup
    sizes = Sizes.of(setup.shape, setup.lora, int(setup.model_config["vocab_size"]))
    spent = (gpu_parts if is_cuda else cpu_parts)(events, sizes)
    parts = {part: microseconds / 1000 / request.rounds for part, microseconds in spent.items()}
    return parts | {"gaps": step_ms - sum(parts.values())} if is_cuda else parts


# --- the least time -----------------------------------------------------------------------------------------------


class Floors:
    """The least time of the parts of a step on one device, from its multiplications and its memory traffic.

    Attributes:
        rates: FLOP/s of a large product in the dtype of the pass and, where a variant uses it, in fp8; bytes per second
            of a large copy.
    """

    def __init__(self, bench: Bench) -> None:
        self._setup, self._bench = bench.setup, bench
        self._bytes = 2 if bench.bf16 else 4
        dtype = torch.bfloat16 if bench.bf16 else torch.float32
        self.rates = {"product": product_rate(bench.device, dtype), "copy": copy_rate(bench.device)}
        config = bench.setup.config
        if config is not None and config.frozen_precision == "fp8":
            self.rates["fp8 product"] = product_rate(bench.device, torch.float8_e4m3fn)

    def of(self, config: SparsityConfig | None) -> dict[str, tuple[float, float]]:
        """Return the FLOPs and bytes that a step by ``config`` cannot do without, as their milliseconds, by part.

        NaN where one is not counted. Each operand is counted once for each product, an activation once where it is read
        and once where it is written.
        """
        setup, work = self._setup, self._setup.work
        tokens = work.batch * work.seq
        costs = {cost.component: cost for cost in token_costs(setup.shape, config, work, setup.lora)}
        backward = (costs["attention projections"].training - costs["attention projections"].mean) / max(
            1e-9, costs["attention projections"].mean
        )  # share of the tokens with a backward pass
        is_fp8 = config is not None and config.frozen_precision == "fp8"
        macs = {
            "frozen products": sum(costs[name].training for name in ("FFN", "attention projections", "estimator")),
            "LoRA": costs["adapter"].training,
            "attention": costs["attention scores"].training,
            "head and loss": costs["head"].training,
        }
        flop_ms = {
            part: 2e3
            * tokens
            * count
            / self.rates["fp8 product" if is_fp8 and part == "frozen products" else "product"]
            for part, count in macs.items()
        }
        shape = setup.shape
        weights = shape.layers * sum(d_out * d_in for d_out, d_in in shape.sides.values())
        hidden = (2 if shape.gated else 1) * shape.ffn_width
        # norms: stream and update in, stream and input out; activation: hidden in, one out; the reverse in backward
        elementwise = shape.layers * tokens * (1 + backward) * (8 * shape.width + hidden + shape.ffn_width)
        attention = shape.layers * tokens * (2 * shape.q_width + 2 * shape.kv_width) * (1 + 2 * backward)
        trained = sum(p.numel() for p in self._bench.model.parameters() if p.requires_grad)
        traffic = {
            "frozen products": 2 * weights * (1 if is_fp8 else self._bytes),
            "attention": attention * self._bytes,
            "head and loss": 2 * shape.head_macs * self._bytes,
            "norms and activations": elementwise * self._bytes,
            "optimizer": 7 * 4 * trained,  # parameter, gradient and two moments in, all but the gradient out
        }
        byte_ms = {part: 1e3 * count / self.rates["copy"] for part, count in traffic.items()}
        return {part: (flop_ms.get(part, math.nan), byte_ms.get(part, math.nan)) for part in flop_ms | byte_ms}


# --- tables -------------------------------------------------------------------------------------------------------


def part_rows(parts: Mapping[str, float], floors: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Return a row for every part of one step and one for the whole.

    Columns: part, ms, share (of the step), flop_floor_ms, byte_floor_ms, times_floor (ms over the larger floor).
    """
    step_ms = sum(parts.values())
    rows = []
    for part, ms in [*parts.items(), ("step", step_ms)]:
        flop_ms, byte_ms = floors.get(part, (math.nan, math.nan))
        floor = max((value for value in (flop_ms, byte_ms) if not math.isnan(value)), default=math.nan)
        rows.append(
            {"part": part, "ms": ms, "share": ms / step_ms, "flop_floor_ms": flop_ms, "byte_floor_ms": byte_ms,
             "times_floor": ms / floor if floor else math.nan}
        )  # fmt: skip
    return rows


def format_parts(table: pd.DataFrame) -> str:
    """Return the rows of `explain_steps` as text, a block a variant."""

    def number(value: float, digits: str) -> str:
        return "" if math.isnan(value) else format(value, digits)

    blocks = []
    for name, rows in table.groupby("variant", sort=False):
        cells = {
            "part": rows["part"], "ms": rows["ms"].map("{:.2f}".format), "share": rows["share"].map("{:.1%}".format),
            "FLOP floor ms": [number(value, ".2f") for value in rows["flop_floor_ms"]],
            "byte floor ms": [number(value, ".2f") for value in rows["byte_floor_ms"]],
            "× floor": [number(value, ".1f") for value in rows["times_floor"]],
        }  # fmt: skip
        blocks.append(f"{name}:\n{pd.DataFrame(cells).to_string(index=False)}")
    return "\n\n".join(blocks)
