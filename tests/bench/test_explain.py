"""Where a step's time goes: the parts add up to the step, and slowness that is planted in a part is found there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from sparselora.__main__ import main
from sparselora.bench.explain import Floors, part_rows
from sparselora.bench.request import ExplainRequest
from sparselora.bench.setup import SetupRequest, resolve
from sparselora.bench.step_parts import PARTS, STEP, Sizes, cpu_parts, gpu_parts, part_of
from sparselora.bench.timing import TimedModel, adapt, build_model, convert_with, random_batch
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Lora, Shape, Workload
from sparselora.models.architectures import SHAPES
from tests.helpers.tiny_llama import make_tiny_llama
from tests.test_pages import check_columns

TINY = {**SHAPES["llama-7b"], "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LORA = Lora(3, ("q", "k", "v", "o"))
SIZES = Sizes.of(Shape.from_config(TINY), LORA, 50)
BATCH = random_batch(50, Workload(3, 20, 5), causal=True, seed=0)


def variant(config: SparsityConfig | None = None) -> TimedModel:
    model = build_model(TINY, causal=True, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    adapted = adapt(model, r=3, alpha=6.0, targets=None, causal=True)
    timed = TimedModel(adapted, torch.device("cpu"), bf16=False, convert=convert_with(config) if config else None)
    timed.step(BATCH)
    timed.step(BATCH)
    return timed


def profiled(timed: TimedModel, steps: int = 1) -> tuple[dict[str, float], float, float]:
    """Milliseconds of the parts, of the ranges around the steps, and of the steps by a clock of our own."""
    spent = 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(steps):
            began = time.perf_counter()
            with torch.profiler.record_function(STEP):
                timed.step(BATCH)
            spent += time.perf_counter() - began
    events = profiler.events()
    ranges = sum(event.cpu_time_total for event in events if event.name == STEP)
    return {part: us / 1000 for part, us in cpu_parts(events, SIZES).items()}, ranges / 1000, 1000 * spent


@pytest.mark.parametrize(
    "config", [None, SparsityConfig(mode="dense"), SparsityConfig(mode="random", ffn_sparsity=0.5)]
)
def test_the_parts_add_up_to_the_step(config):
    parts, ranges_ms, clock_ms = profiled(variant(config), steps=3)
    assert sum(parts.values()) == pytest.approx(ranges_ms, rel=1e-6)
    assert 0.7 * clock_ms < ranges_ms < clock_ms + 0.1
    assert set(parts) <= set(PARTS)
    for part in ("frozen products", "LoRA", "attention", "head and loss", "norms and activations", "optimizer", "gaps"):
        assert parts[part] > 0, part


def busy(work: Callable[[], object], seconds: float = 0.06) -> Callable[..., None]:
    def hook(*_: object, **__: object) -> None:
        end = time.perf_counter() + seconds
        with torch.no_grad():
            while time.perf_counter() < end:
                work()

    return hook


def planted(part: str, timed: TimedModel) -> None:
    """Add 60 ms of one kind of work to a step of the plain model."""
    model = timed.model.base_model.model
    layer = model.model.layers[1]
    x, heads = torch.randn(3000, 32), torch.randn(50, 4, 20, 8)
    q = layer.self_attn.q_proj
    frozen, factor, head = (w.detach().t() for w in (q.base_layer.weight, q.lora_A["default"].weight,
                                                     model.lm_head.weight))  # fmt: skip
    work = {
        "frozen products": lambda: x @ frozen,
        "LoRA": lambda: x @ factor,
        "attention": lambda: torch.nn.functional.scaled_dot_product_attention(heads, heads, heads),
        "head and loss": lambda: x @ head,
        "norms and activations": lambda: torch.nn.functional.silu(x),
        "optimizer": lambda: x * x,
        "gaps": lambda: time.sleep(0.001),
    }[part]
    if part == "optimizer":
        timed._optimizer.register_step_pre_hook(busy(work))
    elif part == "norms and activations":  # in the backward pass
        layer.mlp.register_full_backward_hook(busy(work))
    else:
        layer.register_forward_pre_hook(busy(work))


@pytest.mark.parametrize(
    "part",
    ["frozen products", "LoRA", "attention", "head and loss", "norms and activations", "optimizer", "gaps"],
)
def test_slowness_in_one_part_is_found_there(part):
    timed = variant()
    before, *_ = profiled(timed)
    planted(part, timed)
    after, *_ = profiled(timed)
    gains = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in PARTS}
    # between two operations the loop of the hook itself runs, which is a gap
    others = sum(max(0.0, gain) for name, gain in gains.items() if name not in (part, "gaps"))
    assert gains[part] > 30, gains
    assert gains[part] > 3 * others, gains


# --- recognising operations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        ([(60, 32), (32, 16)], "frozen products"),  # k
        ([(60, 16), (16, 32)], "frozen products"),  # its input gradient
        ([(60, 32), (32, 64)], "frozen products"),  # q, k and v side by side
        ([(60, 32), (32, 96)], "frozen products"),  # gate and up
        ([(60, 32), (32, 24)], "frozen products"),  # half of the channels
        ([(3, 32), (32, 16)], "LoRA"),  # as many rows as the rank: a gradient of a factor
        ([(60, 32), (32, 3)], "LoRA"),
        ([(60, 9), (9, 32)], "LoRA"),  # three adapters of one input
        ([(32, 60), (60, 3)], "LoRA"),
        ([(15, 32), (32, 50)], "head and loss"),
        ([(15, 50), (50, 32)], "head and loss"),
    ],
)
def test_products_are_recognised_by_their_shapes(shapes, part):
    assert part_of("aten::mm", shapes, SIZES) == part
    rows, columns = shapes[0][0], shapes[1][1]
    assert part_of("aten::addmm_", [(rows, columns), *shapes], SIZES) == part
    assert part_of("aten::addmm", [(columns,), *shapes], SIZES) == part


def event(name: str, *children: SimpleNamespace, shapes=(), kernels=(), device="CPU", us=0.0) -> SimpleNamespace:
    made_event = SimpleNamespace(
        name=name, input_shapes=shapes, cpu_children=list(children), cpu_parent=None,
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        device_type=SimpleNamespace(name=device), is_user_annotation=False,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
    )  # fmt: skip
    for child in children:
        child.cpu_parent = made_event
    return made_event


def test_kernels_belong_to_what_launched_them():
    """A kernel's time counts once, whichever thread launched it; one that nothing launched counts by its name."""
    product = event("aten::mm", shapes=[[60, 32], [32, 16]], kernels=[("gemm", 10.0)])
    factor = event("aten::mm", shapes=[[60, 32], [32, 3]], kernels=[("gemm", 2.0)])
    split = event("_SplitLinear", product, factor, kernels=[("_kernel", 1.0)])
    norm = event("_AddRMSNormBackward", event("aten::mul", kernels=[("vectorized", 4.0)]), kernels=[("_backward", 3.0)])
    backward = event("autograd::engine::evaluate_function: _AddRMSNormBackward", norm)
    update = event("Optimizer.step#AdamW.step", event("aten::_fused_adamw_", kernels=[("multi_tensor", 6.0)]))
    step = event(STEP, split, update, event("aten::copy_", kernels=[("Memcpy HtoD", 5.0)]), kernels=[(STEP, 99.0)])
    lone = [event("flash_fwd", device="CUDA", us=7.0), event("gemm", device="CUDA", us=12.0)]
    events = [step, split, product, factor, backward, norm, *norm.cpu_children, update, *update.cpu_children, *lone]
    annotation = event(STEP, device="CUDA", us=99.0)
    annotation.is_user_annotation = True
    parts = gpu_parts([*events, *step.cpu_children[2:], annotation], SIZES)
    assert parts == {
        "frozen products": 11.0,  # the kernel of its own goes with what it mostly does, unless its name says more
        "LoRA": 2.0, "attention": 7.0, "norms and activations": 7.0, "optimizer": 6.0, "other": 5.0,
    }  # fmt: skip


# --- floors -------------------------------------------------------------------------------------------------------


def test_floors_are_the_work_at_the_measured_rates():
    request = ExplainRequest(resolve(SetupRequest(None, "llama-7b", None, None, 3, None, None, 3, 20, 5)), 1, 1, "cpu",
                             "fp32", 0)  # fmt: skip
    setup = replace(request.setup, shape=Shape.from_config(TINY), model_config=TINY)
    trained = variant().model
    floors = object.__new__(Floors)
    floors._setup, floors._bytes = setup, 4
    floors._bench = SimpleNamespace(model=trained)
    floors.rates = {"product": 1e9, "copy": 1e9, "fp8 product": 2e9}
    plain = floors.of(None)
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert plain["frozen products"][0] == pytest.approx(2e3 * 60 * 2 * weights / 1e9)
    assert plain["frozen products"][1] == pytest.approx(1e3 * 2 * weights * 4 / 1e9)
    assert plain["LoRA"][0] == pytest.approx(2e3 * 60 * 3 * 2 * 3 * (2 * 64 + 2 * 48) / 1e9)
    parameters = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert plain["optimizer"][1] == pytest.approx(1e3 * 28 * parameters / 1e9)
    fp8 = floors.of(SparsityConfig(mode="dense", frozen_precision="fp8"))
    dense = floors.of(SparsityConfig(mode="dense"))
    assert fp8["frozen products"][0] == pytest.approx(dense["frozen products"][0] / 2)
    assert fp8["head and loss"] == dense["head and loss"]
    assert (
        floors.of(SparsityConfig(mode="dense", context_backward="none"))["norms and activations"][1]
        < (dense["norms and activations"][1])
    )


def test_rows_have_their_share_and_distance_from_the_floor():
    rows = part_rows({"LoRA": 3.0, "gaps": 1.0}, {"LoRA": (0.5, math.nan)})
    table = pd.DataFrame(rows).set_index("part")
    assert table.loc["LoRA", ["share", "times_floor"]].tolist() == [0.75, 6.0]
    assert math.isnan(table.loc["gaps", "times_floor"])
    assert table.loc["step", "ms"] == 4.0


# --- the command --------------------------------------------------------------------------------------------------


def test_the_step_of_an_encoder_is_explained_too(tiny_bert, tmp_path):
    out = tmp_path / "out"
    flags = ["--train_bsz", "2", "--seq", "12", "--rounds", "1", "--device", "cpu", "--lora_r", "2"]
    assert main(["bench", "--explain", "--model", str(tiny_bert), *flags, "--out_dir", str(out)]) == 0
    parts = pd.read_csv(out / "explain.csv").set_index(["variant", "part"])["ms"]
    for part in ("frozen products", "LoRA", "attention", "norms and activations", "optimizer"):
        assert parts["PEFT", part] > 0


def test_a_bench_explains_the_plain_step_ours_and_the_configurations(tmp_path, capsys):
    llama, out, settings = make_tiny_llama(tmp_path / "llama"), tmp_path / "out", tmp_path / "sparsity.yaml"
    settings.write_text("mode: static\nffn_sparsity: 0.5\ncontext_backward: none\n")
    flags = ["--model", llama, "--sparsity", settings, "--train_bsz", 2, "--seq", 16, "--rounds", 2, "--device", "cpu"]
    arguments = ["bench", "--explain", *map(str, flags), "--lora_r", "2", "--out_dir", str(out)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    table = pd.read_csv(out / "explain.csv")
    label = "static, context backward none"
    assert table["variant"].unique().tolist() == ["PEFT", "dense", "dense, context backward none", label]
    for _, rows in table.groupby("variant"):
        step = rows[rows["part"] == "step"]["ms"].item()
        assert rows[rows["part"] != "step"]["ms"].sum() == pytest.approx(step)
    assert (out / "explain.png").stat().st_size > 1000
    assert "× floor" in text
    assert f"{label}:" in text
    check_columns(out)
