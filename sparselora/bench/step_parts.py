"""The parts of a training step and the time that each takes, from a profile of it.

Every operation that the profiler recorded belongs to one part: by its name, where it is a part by itself (a norm, the
optimizer); a matrix product by its shapes, which say whether the weight is frozen, a LoRA factor or the output layer;
anything else by the operation around it, or by the one that it spends most of its time in. On a GPU the time is that of
the kernels which an operation launched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparselora.contextual.flops import Lora, Shape

PARTS = (
    "frozen products", "LoRA", "attention", "head and loss", "norms and activations", "fp8 quantisation",
    "choosing channels", "optimizer", "other", "gaps",
)  # fmt: skip
"""The parts, in the order of a table. ``other``: embedding, copies, packing; ``gaps``: nothing of the step runs."""

STEP = "sparselora.step"
"""Name of the range around a profiled step."""

_WHOLE = {
    "Optimizer.": "optimizer",
    "_LinearCrossEntropy": "head and loss",
    "aten::cross_entropy": "head and loss",
    "aten::nll_loss": "head and loss",
    "aten::_log_softmax": "head and loss",
    "aten::log_softmax": "head and loss",
    "_AddRMSNorm": "norms and activations",
    "_SwiGLU": "norms and activations",
    "aten::silu": "norms and activations",
    "aten::gelu": "norms and activations",
    "aten::native_layer_norm": "norms and activations",
    "aten::layer_norm": "norms and activations",
    "aten::rms_norm": "norms and activations",
    "_ToHeads": "attention",
    "_FromSlots": "attention",
    "aten::scaled_dot_product": "attention",
    "aten::_scaled_dot_product": "attention",
    "aten::_flash_attention": "attention",
    "aten::_efficient_attention": "attention",
    "_WithTwin": "fp8 quantisation",
    "_WithGradientTwin": "fp8 quantisation",
    "aten::topk": "choosing channels",
    "aten::sort": "choosing channels",
}
"""Beginning of a name → the part of the operation and of all within it."""

_AROUND = {"_SplitLinear": "LoRA", "_JoinLinear": "LoRA"}
"""Beginning of a name → the part of what is no product within it: scaling and casts of the adapter."""

_KERNELS = {
    "_table_kernel": "LoRA",
    "_pair_kernel": "LoRA",
    "_rows_kernel": "fp8 quantisation",
    "_scatter_kernel": "attention",
    "_gather_kernel": "attention",
    "_gated_kernel": "choosing channels",
    "_attention_kernel": "choosing channels",
    "flash": "attention",
    "fmha": "attention",
}
"""Text in a kernel's name → its part, where no operation says it."""

_Times = Callable[[Any], list[tuple[str, float]]]

_ELEMENTWISE = frozenset(
    {"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "pow", "rsqrt", "sqrt", "neg", "mean", "sum",
     "sigmoid", "tanh", "relu", "native_dropout", "dropout"}
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Sizes by which a matrix product is recognised.

    Attributes:
        vocabulary: rows of the output layer of a decoder; 0 for an encoder.
        ranks: rank of the LoRA, and of as many as share an input.
        frozen: pairs ``{d_out, d_in}`` of frozen weights, alone and side by side.
    """

    vocabulary: int
    ranks: frozenset[int]
    frozen: frozenset[frozenset[int]]

    @classmethod
    def of(cls, shape: Shape, lora: Lora, vocabulary: int) -> Sizes:
        sides = shape.sides
        joined = [*sides.values()]
        for names in (("q", "k", "v"), ("k", "v"), ("gate", "up")):
            if all(name in sides for name in names):
                joined.append((sum(sides[name][0] for name in names), sides[names[0]][1]))
        return cls(
            vocabulary if shape.decoder else 0,
            frozenset(lora.rank * count for count in (1, 2, 3)),
            frozenset(frozenset(pair) for pair in joined),
        )

    def product_part(self, m: int, k: int, n: int) -> str:
        """Return the part of the product of ``(m, k)`` and ``(k, n)``."""
        if self.vocabulary in (k, n):
            return "head and loss"
        if frozenset((k, n)) in self.frozen and m not in self.ranks:
            return "frozen products"
        return "LoRA" if self.ranks & {m, k, n} else "frozen products"  # of a part of the channels


def part_of(name: str, shapes: Sequence[Sequence[int]], sizes: Sizes) -> str | None:
    """Return the part of an operation by its name and the shapes of its arguments; None where they do not say it."""
    for beginning, part in _WHOLE.items():
        if name.startswith(beginning):
            return part
    if name in ("aten::bmm", "aten::baddbmm", "aten::baddbmm_"):
        return "attention"
    matrices = [shape for shape in shapes if len(shape) == 2]
    if name in ("aten::mm", "aten::_scaled_mm") and len(matrices) >= 2:
        return sizes.product_part(matrices[0][0], matrices[0][1], matrices[1][1])
    if name in ("aten::addmm", "aten::addmm_") and len(shapes) >= 3 and len(matrices) >= 2:
        return sizes.product_part(shapes[1][0], shapes[1][1], shapes[2][1])
    if name.removeprefix("aten::") in _ELEMENTWISE:
        if sizes.vocabulary and any(shape and shape[-1] == sizes.vocabulary for shape in shapes):
            return "head and loss"
        return "attention" if any(len(shape) == 4 for shape in shapes) else "norms and activations"
    return None


def cpu_parts(events: Iterable[Any], sizes: Sizes) -> dict[str, float]:
    """Return microseconds of every part over all profiled steps on the CPU; they add up to the ranges of the steps.

    Args:
        events: those of ``torch.profiler.profile``, with ranges named `STEP`.
    """
    spent: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.name == STEP:
            for child in event.cpu_children:
                _add(spent, _spent(child, sizes, None, None, _self_time))
            spent["gaps"] += event.self_cpu_time_total
    return _in_order(spent)


def gpu_parts(events: Sequence[Any], sizes: Sizes) -> dict[str, float]:
    """Return microseconds of the kernels of every part over all profiled steps; nothing is said of gaps.

    Args:
        events: those of ``torch.profiler.profile``, of steps that ran launch by launch.
    """
    spent: defaultdict[str, float] = defaultdict(float)
    alone: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type.name == "CUDA":
            if not event.is_user_annotation:
                alone[event.name] += event.time_range.elapsed_us()
            continue
        for name, microseconds in _kernel_times(event):
            alone[name] -= microseconds
        if event.cpu_parent is None:
            _add(spent, _spent(event, sizes, None, None, _kernel_times))
    for name, microseconds in alone.items():  # no operation was open as they were launched
        if microseconds > 0.01:  # more than the rounding of sums
            spent[_kernel_part(name) or "other"] += microseconds
    return _in_order(spent)


def _in_order(spent: Mapping[str, float]) -> dict[str, float]:
    return {part: spent[part] for part in PARTS if spent.get(part)}


def _add(total: defaultdict[str, float], spent: Mapping[str, float]) -> None:
    for part, microseconds in spent.items():
        total[part] += microseconds


def _self_time(event: Any) -> list[tuple[str, float]]:
    return [("", event.self_cpu_time_total)]


def _kernel_times(event: Any) -> list[tuple[str, float]]:
    # a range has a twin of its own name on the GPU's timeline, which is no kernel
    return [(kernel.name, kernel.duration) for kernel in event.kernels if kernel.name != event.name]


def _kernel_part(name: str) -> str | None:
    return next((part for text, part in _KERNELS.items() if text in name), None)


def _spent(event: Any, sizes: Sizes, whole: str | None, around: str | None, times: _Times) -> dict[str, float]:
    """Time of an operation and all within it, by part.

    Args:
        whole: part of an operation around it that is all one part.
        around: part of what says nothing of itself, by an operation around it.
        times: names of kernels and times that are the operation's own.
    """
    part = part_of(event.name, event.input_shapes or (), sizes)
    if part in _WHOLE.values() and any(event.name.startswith(beginning) for beginning in _WHOLE):
        whole = whole or part
    is_product = event.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::_scaled_mm", "aten::bmm")
    if around is not None and not is_product and whole is None:
        part = around
    around = next((inside for beginning, inside in _AROUND.items() if event.name.startswith(beginning)), around)
    spent: defaultdict[str, float] = defaultdict(float)
    for child in event.cpu_children:
        _add(spent, _spent(child, sizes, whole, around, times))
    longest = max(spent, key=lambda name: spent[name]) if spent else None
    for kernel, microseconds in times(event):
        spent[whole or _kernel_part(kernel) or part or longest or around or "other"] += microseconds
    return spent
