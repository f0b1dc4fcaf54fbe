"""Times of whole training steps: PEFT, dense, sparse and its controls, at one size of batch and as one size varies."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from sparselora.bench.against import against_lines, against_table, our_cases, rival_cases, run_rivals
from sparselora.bench.payoff import (
    Parts,
    best_dense,
    break_even_text,
    ceiling,
    kept_share,
    ratio,
    touchable_flops,
    verdict,
    with_sparsity,
    without_the_work,
)
from sparselora.bench.request import ExplainRequest, TimesRequest
from sparselora.bench.rivals.batches import case_batches
from sparselora.bench.rivals.jobs import Case, Job
from sparselora.bench.rivals.processes import Answer
from sparselora.bench.setup import Setup
from sparselora.bench.timing import (
    StepTimes,
    TimedModel,
    adapt,
    build_model,
    convert_with,
    random_batch,
    step_table,
    time_variants,
)
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Workload
from sparselora.contextual.modes import mode_of
from sparselora.errors import InputError
from sparselora.models.load import is_bf16, resolve_device
from sparselora.models.model_files import model_facts
from sparselora.report.contextual import step_times, sweep
from sparselora.runs.files import write_csv
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress

PLAIN = ("PEFT", "dense")
"""The variants that compute every channel."""
FLOOR = "floor"
"""The variant without the work that sparsity thins out."""

_DENSE = SparsityConfig(mode="dense")
_AXES = {"sparsity": "sparsity of the sparse layers", "seq": "tokens of a row", "batch": "rows of a batch"}


@dataclass(frozen=True)
class TimesResults:
    """Results of a bench of times.

    Attributes:
        steps: `sparselora.bench.timing.step_table` of the variants.
        where: device and dtype, in words.
        skipped: variants that this machine or model cannot do, each with the reason.
        payoff: lines that say whether the configuration pays; none without one that changes the step.
        against: lines on the rivals' times; none without rivals.
    """

    steps: pd.DataFrame
    where: str
    skipped: Mapping[str, str]
    payoff: tuple[str, ...]
    against: tuple[str, ...]


def time_steps(request: TimesRequest, folder: RunFolder) -> TimesResults:
    """Build the variants, time them, and write tables and figures into ``folder``.

    Raises:
        InputError: a model or configuration that cannot be used, before anything is written.
    """
    bench, setup = Bench(request), request.setup
    configs = variant_configs(setup)
    combined = combinations(setup) if request.combinations else {}
    skipped: dict[str, str] = {}
    with Progress(len(configs | combined), "variant", "setting up") as progress:
        variants = {}
        for name, config in (configs | combined).items():
            try:
                variants[name] = bench.variant(config, holds_choices=name in _held_variants(setup))
            except InputError as error:
                if name in configs:
                    raise
                skipped[name] = str(error)
            progress.update()
    with folder:
        measured = bench.time(variants, setup.work, "steps")
        table = pd.DataFrame(step_table(measured, PLAIN, setup.work.batch * setup.work.seq))
        graphed = frozenset(name for name, variant in variants.items() if variant.is_graphed)
        write_csv(folder.path("every_step.csv"), every_step(measured))
        figure_title = f"{setup.title} ({bench.where}, n = {request.rounds} rounds)"
        step_times(folder.path("steps.png"), table, figure_title)
        if FLOOR in variants:
            variants.pop(FLOOR).close()
        swept: dict[str, pd.DataFrame] = {}
        for name, values in request.sweeps.items():
            swept[name] = bench.sweep(variants, name, values)
            figure_title = f"{_swept_title(setup, name)} ({bench.where})"
            sweep(folder.path(f"by_{name}.png"), swept[name], name, _AXES[name], figure_title)
        our_times = {case: bench.time_case(variants, case) for case in our_cases(request.cases)}
        for variant in variants.values():
            variant.close()
        answers: dict[str, Answer] = {}
        against: list[str] = []
        if request.rivals:
            variants.clear()
            bench.release()

            def job(rival: str) -> Job:
                return bench.job(rival, rival_cases(rival, request.cases))

            for rival, answer in run_rivals(request.rivals, job, request.rival_limit_s):
                answers[rival] = answer
                compared = against_table(our_times, answers)
                write_csv(folder.path("against.csv"), compared)  # a run that is stopped keeps what it has
            against = against_lines(compared, answers)
        source = setup.source if isinstance(setup.source, str) else None
        versions = {name: dict(answer.versions) for name, answer in answers.items()}
        folder.note(device=bench.device.type, skipped=skipped, rivals=versions, **model_facts(source))
    payoff = payoff_lines(setup, measured, swept, graphed)
    return TimesResults(table, bench.where, skipped, tuple(payoff), tuple(against))


# --- variants -----------------------------------------------------------------------------------------------------


def variant_configs(setup: Setup, *, controls: bool = True) -> dict[str, SparsityConfig | None]:
    """Return PEFT (None), dense, the configuration's step, and the controls that show where its time goes, by name."""
    configs: dict[str, SparsityConfig | None] = {"PEFT": None, "dense": _DENSE}
    config, layers = setup.config, setup.shape.layers
    if config is None:
        return configs
    configs[dense_label(config)] = config.replace(mode="dense")
    if not config.is_sparse:
        return configs
    configs[variant_label(config)] = config
    mode = mode_of(config)
    if not controls:
        return configs
    if mode.control is not None:
        configs[_control_label(mode.control)] = config.replace(mode=mode.control)
    if not mode.computes_nothing:
        configs[FLOOR] = without_the_work(config, layers)
    return configs


def combinations(setup: Setup) -> dict[str, SparsityConfig]:
    """Return, by name, fp8 and no context backward, alone and together, dense and with the configuration's sparsity.

    Where the configuration has another precision than native, or another ``context_backward`` than full, that one is
    combined in place of fp8 or none.
    """
    config = setup.config or _DENSE
    precision = config.frozen_precision if config.frozen_precision != "native" else "fp8"
    context = config.context_backward if config.cuts_context else "none"
    modes = ("dense", config.mode) if config.is_sparse else ("dense",)
    combined = [
        config.replace(mode=mode, frozen_precision=frozen_precision, context_backward=context_backward)
        for mode in modes
        for context_backward in ("full", context)
        for frozen_precision in ("native", precision)
    ]
    return {variant_label(settings): settings for settings in combined}


def variant_label(config: SparsityConfig) -> str:
    """Return the variant's name: its mode, and what else makes its step another than the plain one."""
    precision = () if config.frozen_precision == "native" else (config.frozen_precision,)
    context = (f"context backward {config.context_backward}",) if config.cuts_context else ()
    return ", ".join((config.mode, *precision, *context))


def dense_label(config: SparsityConfig) -> str:
    """Return the name of the variant that differs from ``config`` by its sparsity alone."""
    return variant_label(config.replace(mode="dense"))


def _control_label(control: str) -> str:
    """Return the variant's name of the same number of channels by mode ``control``."""
    return f"{control} channels"


def _held_variants(setup: Setup) -> frozenset[str]:
    """Return the controls: they keep the channels of their first step, so that they choose nothing while timed."""
    control = None if setup.config is None else mode_of(setup.config).control
    return frozenset({FLOOR} if control is None else {FLOOR, _control_label(control)})


class Bench:
    """One model on its device, of which all variants are made and timed.

    Attributes:
        request, setup: as given.
        causal: the model is a decoder.
        device: where it is.
        bf16: compute in bfloat16 autocast.
        model: with its adapter, as PEFT has it.
    """

    def __init__(self, request: TimesRequest | ExplainRequest) -> None:
        self.request, self.setup = request, request.setup
        self.causal = self.setup.shape.decoder
        self.device = resolve_device(request.device)
        self.bf16 = is_bf16(request.dtype, self.device)
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        model = build_model(self.setup.source, causal=self.causal, device=self.device, dtype=dtype, seed=request.seed)
        train = self.setup.train
        self.model = adapt(
            model, r=train.lora_r, alpha=train.lora_alpha, targets=train.target_modules, causal=self.causal
        )

    @property
    def where(self) -> str:
        return f"{self.device.type}, {'bf16' if self.bf16 else 'fp32'}"

    def variant(self, config: SparsityConfig | None, *, holds_choices: bool = False) -> TimedModel:
        convert = None
        if config is not None:
            config = config.replace(
                sparse_warmup_ratio=0.0, sparse_warmup_steps=None, sparse_end_ratio=1.0, sparse_end_step=None
            )
            calibration = self.batches(self.setup.work, 2) if config.needs_calibration else None
            convert = convert_with(config, calibration)
        return TimedModel(self.model, self.device, bf16=self.bf16, convert=convert, holds_choices=holds_choices)

    def batches(self, work: Workload, count: int = 4) -> list[dict[str, torch.Tensor]]:
        vocabulary = int(self.setup.model_config["vocab_size"])
        seeds = range(self.request.seed, self.request.seed + count)
        return [random_batch(vocabulary, work, causal=self.causal, seed=seed) for seed in seeds]

    def time(self, variants: Mapping[str, TimedModel], work: Workload, label: str) -> dict[str, StepTimes]:
        rounds, warmup = self.request.rounds, self.request.warmup
        with Progress((rounds + max(1, warmup)) * len(variants), "step", label) as progress:
            return time_variants(variants, self.batches(work), rounds=rounds, warmup=warmup, progress=progress.update)

    def time_case(self, variants: Mapping[str, TimedModel], case: Case) -> dict[str, StepTimes]:
        """Return the times of all variants but the controls on the batches that rivals are timed on."""
        rounds, warmup = self.request.rounds, self.request.warmup
        timed = {name: variant for name, variant in variants.items() if name not in _held_variants(self.setup)}
        batches = case_batches(int(self.setup.model_config["vocab_size"]), case, seed=self.request.seed)
        label = f"{case.layout}, {case.labelled} labelled"
        with Progress((rounds + max(1, warmup)) * len(timed), "step", label) as progress:
            return time_variants(timed, batches, rounds=rounds, warmup=warmup, progress=progress.update)

    def job(self, rival: str, cases: tuple[Case, ...]) -> Job:
        """Return the work of a rival's process: this model and adapter, on the batches of ``cases``."""
        request, train = self.request, self.setup.train
        return Job(
            rival=rival,
            source=self.setup.source,
            vocabulary=int(self.setup.model_config["vocab_size"]),
            rank=train.lora_r,
            alpha=train.lora_alpha,
            targets=None if train.target_modules is None else tuple(train.target_modules),
            device=self.device.type,
            bf16=self.bf16,
            rounds=request.rounds,
            warmup=request.warmup,
            seed=request.seed,
            cases=cases,
        )

    def release(self) -> None:
        """Let go of the model, whose memory on the device others need."""
        del self.model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def sweep(self, variants: Mapping[str, TimedModel], name: str, values: Sequence[float]) -> pd.DataFrame:
        """Return `step_table` of all variants but the controls at every value, which is the column ``name``.

        As sparsity varies, of the plain variants and the configuration's.
        """
        setup, frames = self.setup, []
        plain = {key: variants[key] for key in PLAIN}
        others = variants.keys() - {*PLAIN, *_held_variants(setup)}
        for value in values:
            work, sparse = setup.work, {key: variants[key] for key in variants if key in others}
            if name == "sparsity":
                assert setup.config is not None
                swept_config = with_sparsity(setup.config, setup.shape.layers, value)
                sparse = {variant_label(setup.config): self.variant(swept_config)}
            else:
                work = dataclasses.replace(setup.work, **{name: int(value)})
                if name == "seq":
                    work = dataclasses.replace(work, labelled=round(setup.work.output_share * value))
            measured = self.time(plain | sparse, work, f"{name} {value}")
            frames.append(pd.DataFrame(step_table(measured, PLAIN, work.batch * work.seq)).assign(**{name: value}))
            if name == "sparsity":
                for variant in sparse.values():
                    variant.close()
        return pd.concat(frames, ignore_index=True)


def _swept_title(setup: Setup, name: str) -> str:
    """Return the title without what is varied."""
    work = setup.work
    if name == "sparsity":
        return setup.title
    size = f"{work.batch} rows" if name == "seq" else f"rows of {work.seq} tokens"
    return f"{setup.label}, {size}" + (f", {work.output_share:.3g} of them labelled" if setup.shape.decoder else "")


# --- tables and lines ---------------------------------------------------------------------------------------------


def every_step(measured: Mapping[str, StepTimes]) -> pd.DataFrame:
    """Return one row per timed step of each variant."""
    rows: list[dict[str, Any]] = [
        {"round": i, "variant": name, "forward_ms": forward, "backward_ms": backward, "optimizer_ms": optimizer}
        for name, times in measured.items()
        for i, (forward, backward, optimizer) in enumerate(zip(times.forward, times.backward, times.optimizer))
    ]
    return pd.DataFrame(rows)


def payoff_lines(
    setup: Setup, measured: Mapping[str, StepTimes], swept: Mapping[str, pd.DataFrame], graphed: frozenset[str]
) -> list[str]:
    """Return in words: the part of a step that sparsity can touch, where the time goes, and whether it pays.

    Args:
        swept: tables of `step_table` by what was varied, which is a column of each.
        graphed: variants that ran as CUDA graphs, whose times are comparable with one another alone.
    """
    config = setup.config
    if config is None or not (config.is_sparse or config.changes_every_step):
        return []
    label, companion = variant_label(config), dense_label(config)
    totals = {name: times.total for name, times in measured.items()}
    dense = best_dense(totals, PLAIN)
    lines = []
    if config.is_sparse:
        by_flops = touchable_flops(setup.shape, config, setup.work, setup.lora)
        lines.append(f"touched: {by_flops:.1%} of the dense step's multiplications; ceiling {ceiling(by_flops):.2f}×")
        lines += _cause_lines(setup, config, measured, graphed)
    for name, table in swept.items():
        rows = table.set_index("variant").loc[[label]].sort_values(name)
        lines.append(break_even_text(name, rows[name].tolist(), rows["speedup"].tolist()))
    if companion not in (label, "dense"):
        lines.append(
            f"against the same settings without sparsity: {ratio(totals[companion], totals[label]).median:.2f}×"
        )
    lines.append(f"against PEFT as it is: {ratio(totals['PEFT'], totals[label]).median:.2f}×")
    step = "the sparse step" if config.is_sparse else f"the step {label}"
    lines.append(verdict(totals[dense], totals[label], f"the best dense step ({dense})", step))
    return lines


def _cause_lines(
    setup: Setup, config: SparsityConfig, measured: Mapping[str, StepTimes], graphed: frozenset[str]
) -> list[str]:
    """Return in words what the times of the controls say: the ceiling as measured, and where the time goes."""
    if FLOOR not in measured:
        return []
    control = mode_of(config).control
    label, companion = variant_label(config), dense_label(config)
    names = [companion, FLOOR] if control is None else [companion, FLOOR, label, _control_label(control)]
    without = [name for name in names if name not in graphed]
    if 0 < len(without) < len(names):
        return [
            f"where the time goes is not known here: {', '.join(without)} cannot be captured as a CUDA graph, and the "
            "other steps were"
        ]
    part = 1 - measured[FLOOR].median_ms / measured[companion].median_ms
    gone = f"{part:.1%} of the dense step's time goes when that work is gone"
    lines = [f"measured: {gone}; ceiling {ceiling(part):.2f}×"]
    if control is not None:
        parts = Parts.of(
            dense=measured[companion].median_ms,
            sparse=measured[label].median_ms,
            unchosen=measured[_control_label(control)].median_ms,
            floor=measured[FLOOR].median_ms,
            share=kept_share(setup.shape, config, setup.work, setup.lora),
        )
        lines.append(parts.text(measured[label].median_ms))
    return lines
