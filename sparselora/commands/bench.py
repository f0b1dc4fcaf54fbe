"""Does contextual sparsity pay, for this model, batch and device? Times, multiplications, or the quality of estimates.

Without --flops or --estimators whole training steps are timed, interleaved: PEFT as it is, our dense step with the
savings that change no result, and the sparse step of a configuration; then what sparsity can touch, the ceiling that
leaves, what choosing and gathering cost, and from which sparsity on it pays.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

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
from sparselora.bench.setup import Setup, check_tokens, resolve
from sparselora.cli import add_run_arguments, output_folder, result_arguments, run_in_folder
from sparselora.config.sparsity import MODES, SparsityConfig
from sparselora.config.train import DTYPES, read_sparsity
from sparselora.contextual.flops import (
    Workload,
    compare_costs,
    comparison_table,
    format_comparison,
    layer_costs,
    token_costs,
)
from sparselora.contextual.modes import mode_of, selects_channels
from sparselora.errors import InputError
from sparselora.models.architectures import SHAPES
from sparselora.models.model_files import model_facts
from sparselora.runs.files import write_csv
from sparselora.runs.folder import RunFolder
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    from sparselora.bench.timing import StepTimes, TimedModel

Measure = Callable[[RunFolder], None]
"""What a ``_prepare_…`` gives after everything that can be wrong with the input was found: it measures and writes."""

_DENSE = SparsityConfig(mode="dense")
_PLAIN = ("PEFT", "dense")
_LABELS = {"sparsity": "sparsity of the sparse layers", "seq": "tokens of a row", "batch": "rows of a batch"}


# --- arguments ----------------------------------------------------------------------------------------------------

EXAMPLES = """\
  sparselora bench --shape llama3-8b --flops
  sparselora bench --model ./llama --mode svd --seq 512"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure (default: times)").add_mutually_exclusive_group()
    what.add_argument("--flops", action="store_true", help="count multiplications per token; no model is built")
    what.add_argument(
        "--estimators",
        action="store_true",
        help="measure how well estimates rank channels, by layer",
    )
    _add_model_arguments(parser)
    work = parser.add_argument_group("batch")
    work.add_argument("--train_bsz", type=int, default=8, metavar="N", help="rows in a batch")
    work.add_argument("--seq", type=int, default=512, metavar="N", help="tokens in a row")
    work.add_argument(
        "--labelled", type=int, metavar="N", help="labelled tokens in a row of a decoder (default: a quarter)"
    )
    count = parser.add_argument_group("--flops")
    count.add_argument(
        "--against",
        default="dense",
        metavar="YAML",
        help="what to compare with: a configuration, dense (with the exact savings) or peft (without)",
    )
    count.add_argument("--unit", choices=("MACs", "FLOPs"), default="FLOPs", help="one MAC is two FLOPs")
    times = parser.add_argument_group("times")
    times.add_argument("--rounds", type=int, default=20, metavar="N", help="timed steps of each variant")
    times.add_argument("--warmup", type=int, default=3, metavar="N", help="untimed steps of each variant before them")
    times.add_argument(
        "--sparsities", type=float, nargs="*", default=[0.25, 0.5, 0.75, 0.9, 0.99], metavar="S",
        help="sparsities to search for the break-even point; no value: none",
    )  # fmt: skip
    times.add_argument("--seqs", type=int, nargs="+", metavar="N", help="lengths to time as well")
    times.add_argument("--batches", type=int, nargs="+", metavar="N", help="batch sizes to time as well")
    times.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    times.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bf16 on a GPU, fp32 on the CPU")
    quality = parser.add_argument_group("--estimators")
    quality.add_argument(
        "--dataset", help="texts of the activations: a file, or a named data set (default: the configuration's)"
    )
    quality.add_argument("--text_fields", nargs="+", metavar="NAME", help="text columns, of an encoder")
    quality.add_argument(
        "--prompt_field", metavar="NAME", help="prompt column, of a decoder (default: the configuration's)"
    )
    quality.add_argument("--completion_field", metavar="NAME", help="completion column (default: the configuration's)")
    quality.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32], metavar="R", help="ranks of the estimators"
    )
    quality.add_argument("--samples", type=int, default=64, metavar="N", help="texts, in batches of --train_bsz")
    add_run_arguments(parser, "bench_results/<what>-<model>")
    accept_former_names(parser, FORMER_NAMES["bench"])


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model").add_mutually_exclusive_group()
    model.add_argument(
        "--model", help="local folder, GGUF file, hub name, minilm or smollm2 (default: the configuration's)"
    )
    model.add_argument(
        "--shape", choices=SHAPES, metavar="NAME", help=f"random weights of this shape: {', '.join(SHAPES)}"
    )
    sparse = parser.add_argument_group("sparsity and adapter")
    sparse.add_argument("--sparsity", metavar="YAML", help="sparsity settings, or a training configuration with them")
    sparse.add_argument("--mode", choices=MODES, help="mode in place of the configuration's")
    sparse.add_argument("--lora_r", type=int, metavar="R", help="LoRA rank (default: the configuration's, or 16)")
    sparse.add_argument(
        "--lora_alpha", type=float, metavar="A", help="LoRA alpha (default: the configuration's, or 32)"
    )
    sparse.add_argument(
        "--target_modules",
        nargs="+",
        metavar="NAME",
        help="modules to adapt (default: the configuration's, or attention's projections)",
    )


def run(args: argparse.Namespace) -> None:
    setup = resolve(args)
    _check(args, setup)
    kind = "flops" if args.flops else "estimators" if args.estimators else "times"
    prepare = {"flops": _prepare_flops, "estimators": _prepare_estimators, "times": _prepare_times}[kind]

    def body(folder: RunFolder) -> None:
        measure = prepare(args, setup)
        with folder:
            measure(folder)
        print(f"wrote {folder.folder}")

    request = RunRequest(
        "bench",
        output_folder(args, "bench_results", f"{kind}-{setup.label}"),
        result_arguments(args),
        tuple(_outputs(args, setup)),
        settings=vars(args),
        inputs=("model", "dataset", "sparsity", "against"),
        seed=args.seed,
        overwrite=args.overwrite,
    )
    run_in_folder(request, body, dry_run=args.dry_run)


def _check(args: argparse.Namespace, setup: Setup) -> None:
    """Raise before anything is built or written for what would fail later."""
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed must be 0 or more and below 2**32, got {args.seed}")
    if args.flops:
        _ = setup.sparse
        return
    setup.check_lengths([args.seq, *(args.seqs or [])])
    if args.estimators:
        _ = setup.sparse
        return
    if args.rounds < 1 or args.warmup < 0:
        raise InputError(f"--rounds must be at least 1 and --warmup 0, got {args.rounds} and {args.warmup}")
    for name, values in _sweeps(args, setup):
        for value in values:
            if name == "sparsity":
                with_sparsity(setup.sparse, setup.shape.layers, value)
            elif value < 1:
                raise InputError(f"--{name}{'s' if name == 'seq' else 'es'} must be at least 1, got {value}")
            else:
                check_tokens(*((args.train_bsz, value) if name == "seq" else (value, args.seq)))


def _outputs(args: argparse.Namespace, setup: Setup) -> list[str]:
    if args.flops:
        return ["run.json", "flops.csv", "flops_per_layer.csv", "flops.png"]
    if args.estimators:
        return ["run.json", "estimators_by_batch.csv", "estimators.csv", "estimators.png"]
    names = ["steps", *(f"by_{name}" for name, _ in _sweeps(args, setup))]
    return ["run.json", "every_step.csv", *(f"{name}.{end}" for name in names for end in ("csv", "png"))]


# --- multiplications ----------------------------------------------------------------------------------------------


def _prepare_flops(args: argparse.Namespace, setup: Setup) -> Measure:
    names = {"dense": _DENSE, "peft": None}
    before = names[args.against] if args.against in names else read_sparsity(args.against)
    if before is not None:
        before.check(setup.shape.layers)
    first, second = (token_costs(setup.shape, config, setup.work, setup.lora) for config in (before, setup.sparse))
    return partial(_flops, args, setup, before, compare_costs(first, second))


def _flops(args: argparse.Namespace, setup: Setup, before: SparsityConfig | None, rows: Any, folder: RunFolder) -> None:
    from sparselora.report.contextual import flops

    after = setup.sparse
    table = pd.DataFrame(comparison_table(rows, args.unit))
    write_csv(folder.path("flops.csv"), table)
    write_csv(folder.path("flops_per_layer.csv"), _per_layer(setup, before, args.unit))
    labels = [Path(args.against).stem, Path(args.sparsity or after.mode).stem]
    flops(folder.path("flops.png"), table, labels, args.unit, setup.title)
    print(f"{setup.title}, LoRA r {setup.lora.rank} on {' '.join(setup.lora.targets)}")
    print(f"{labels[1]} (after) against {labels[0]} (before), on average over the tokens:")
    print(format_comparison(rows, args.unit))
    print(
        "One MAC is 2 FLOPs. training: forward and backward; a frozen weight counts twice its forward, adapters and "
        "attention scores three times, an estimate once.\nNot counted: norms, softmax, embeddings, the optimizer."
    )


def _per_layer(setup: Setup, before: SparsityConfig | None, unit: str) -> pd.DataFrame:
    """Forward counts of every layer and component for a context and for an output token."""
    times, rows = (1 if unit == "MACs" else 2), []
    for layer in range(setup.shape.layers):
        old, new = (
            layer_costs(setup.shape, config, setup.work, layer, setup.lora, exact=config is not None)
            for config in (before, setup.sparse)
        )
        for component in old[0]:
            row: dict[str, Any] = {"layer": layer, "component": component}
            for tokens, i in (("context", 0), ("output", 1)):
                row[f"{tokens}_{unit}_before"] = times * old[i][component]
                row[f"{tokens}_{unit}_after"] = times * new[i][component]
            rows.append(row)
    return pd.DataFrame(rows)


# --- times --------------------------------------------------------------------------------------------------------


class _Bench:
    """The variants of one model, and what has been timed of them."""

    def __init__(self, args: argparse.Namespace, setup: Setup) -> None:
        import torch

        from sparselora.bench.timing import adapt, build_model
        from sparselora.models.load import resolve_device

        self.args, self.setup = args, setup
        self.causal = setup.shape.decoder
        self.device = resolve_device(args.device)
        self.bf16 = _bf16(args, self.device)
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        model = build_model(setup.source, causal=self.causal, device=self.device, dtype=dtype, seed=args.seed)
        train = setup.train
        self.model = adapt(
            model, r=train.lora_r, alpha=train.lora_alpha, targets=train.target_modules, causal=self.causal
        )

    def variant(self, config: SparsityConfig | None) -> TimedModel:
        from sparselora.bench.timing import TimedModel, convert_with

        convert = None
        if config is not None:
            config = config.replace(
                sparse_warmup_ratio=0.0, sparse_warmup_steps=None, sparse_end_ratio=1.0, sparse_end_step=None
            )
            calibration = self.batches(self.setup.work, 2) if config.needs_calibration else None
            convert = convert_with(config, calibration)
        return TimedModel(self.model, self.device, bf16=self.bf16, convert=convert)

    def batches(self, work: Workload, count: int = 4) -> list[dict[str, Any]]:
        from sparselora.bench.timing import random_batch

        vocabulary = int(self.setup.model_config["vocab_size"])
        seeds = range(self.args.seed, self.args.seed + count)
        return [random_batch(vocabulary, work, causal=self.causal, seed=seed) for seed in seeds]

    def time(self, variants: Mapping[str, TimedModel], work: Workload, what: str) -> dict[str, StepTimes]:
        from tqdm import tqdm

        from sparselora.bench.timing import time_variants

        steps = (self.args.rounds + self.args.warmup) * len(variants)
        with tqdm(total=steps, desc=what, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:
            return time_variants(
                variants, self.batches(work), rounds=self.args.rounds, warmup=self.args.warmup, progress=bar.update
            )


def _bf16(args: argparse.Namespace, device: Any) -> bool:
    return bool(args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda"))


def _main_variants(setup: Setup) -> dict[str, SparsityConfig | None]:
    """PEFT, dense, the sparse step, and what it is measured against to see where its time goes."""
    configs: dict[str, SparsityConfig | None] = {"PEFT": None, "dense": _DENSE}
    sparse, layers = setup.config, setup.shape.layers
    if sparse is None or not sparse.is_sparse:
        return configs
    configs[sparse.mode] = sparse
    mode = mode_of(sparse)
    if mode.control is not None:
        configs[_control_label(mode.control)] = sparse.replace(mode=mode.control)
    if not mode.computes_nothing:
        configs["floor"] = without_the_work(sparse, layers)
    return configs


def _control_label(control: str) -> str:
    """Return the variant's name of the same number of channels by mode ``control``."""
    return f"{control} channels"


def _sweeps(args: argparse.Namespace, setup: Setup) -> list[tuple[str, list[Any]]]:
    """Name and values of each sweep; sparsity matters only to modes that keep channels."""
    channels = setup.config is not None and selects_channels(setup.config)
    sweeps = [
        ("sparsity", args.sparsities if channels else []),
        ("seq", args.seqs or []),
        ("batch", args.batches or []),
    ]
    return [(name, sorted(set(values))) for name, values in sweeps if values]


def _prepare_times(args: argparse.Namespace, setup: Setup) -> Measure:
    bench = _Bench(args, setup)
    variants = {name: bench.variant(config) for name, config in _main_variants(setup).items()}
    return partial(_times, args, setup, bench, variants)


def _times(
    args: argparse.Namespace, setup: Setup, bench: _Bench, variants: dict[str, TimedModel], folder: RunFolder
) -> None:
    from sparselora.bench.timing import step_table
    from sparselora.report.contextual import step_times, sweep

    measured = bench.time(variants, setup.work, "steps")
    table = pd.DataFrame(step_table(measured, _PLAIN, setup.work.batch * setup.work.seq))
    write_csv(folder.path("every_step.csv"), _every_step(measured))
    where = f"{bench.device.type}, {'bf16' if bench.bf16 else 'fp32'}"
    step_times(folder.path("steps.png"), table, f"{setup.title} ({where}, n = {args.rounds} rounds)")
    if "floor" in variants:
        variants.pop("floor").close()
    swept: dict[str, pd.DataFrame] = {}
    for name, values in _sweeps(args, setup):
        swept[name] = _sweep(bench, variants, name, values)
        sweep(folder.path(f"by_{name}.png"), swept[name], name, _LABELS[name], f"{_swept_title(setup, name)} ({where})")
    folder.note(device=bench.device.type, **model_facts(setup.source if isinstance(setup.source, str) else None))
    print(f"{setup.title}; {where}; LoRA r {setup.lora.rank} on {' '.join(setup.lora.targets)}; {args.rounds} rounds")
    _print_steps(table)
    if setup.config is not None and setup.config.is_sparse:
        _print_payoff(setup, measured, swept)


def _swept_title(setup: Setup, name: str) -> str:
    """The title without what is varied."""
    work = setup.work
    if name == "sparsity":
        return setup.title
    size = f"{work.batch} rows" if name == "seq" else f"rows of {work.seq} tokens"
    return f"{setup.label}, {size}" + (f", {work.output_share:.3g} of them labelled" if setup.shape.decoder else "")


def _every_step(measured: Mapping[str, StepTimes]) -> pd.DataFrame:
    rows = [
        {"round": i, "variant": name, "forward_ms": f, "backward_ms": b, "optimizer_ms": o}
        for name, times in measured.items()
        for i, (f, b, o) in enumerate(zip(times.forward, times.backward, times.optimizer))
    ]
    return pd.DataFrame(rows)


def _sweep(bench: _Bench, variants: Mapping[str, TimedModel], name: str, values: Sequence[Any]) -> pd.DataFrame:
    """`step_table` at every value, which becomes the column ``name``."""
    from sparselora.bench.timing import step_table

    setup, frames = bench.setup, []
    plain = {key: variants[key] for key in _PLAIN}
    names = () if setup.config is None else (setup.config.mode,)
    for value in values:
        work, sparse = setup.work, {key: v for key, v in variants.items() if key in names}
        if name == "sparsity":
            sparse = {setup.sparse.mode: bench.variant(with_sparsity(setup.sparse, setup.shape.layers, value))}
        else:
            work = dataclasses.replace(setup.work, **{name: value})
            if name == "seq":
                work = dataclasses.replace(work, labelled=round(setup.work.output_share * value))
        measured = bench.time(plain | sparse, work, f"{name} {value}")
        frames.append(pd.DataFrame(step_table(measured, _PLAIN, work.batch * work.seq)).assign(**{name: value}))
        if name == "sparsity":
            sparse[setup.sparse.mode].close()
    return pd.concat(frames, ignore_index=True)


def _print_steps(table: pd.DataFrame) -> None:
    shown = pd.DataFrame(
        {
            "step": table["variant"],
            "median ms": table["step_ms"].map("{:.1f}".format),
            "quartiles": [f"{a:.1f}–{b:.1f}" for a, b in zip(table["step_ms_low"], table["step_ms_high"])],
            **{phase: table[f"{phase}_ms"].map("{:.1f}".format) for phase in ("forward", "backward", "optimizer")},
            "tokens/s": table["tokens_per_s"].map("{:,.0f}".format),
            "× best dense": table["speedup"].map("{:.2f}".format),
        }
    )
    if table["peak_mb"].notna().all():
        shown["peak MB"] = table["peak_mb"].map("{:,.0f}".format)
        shown["host waits"] = table["host_waits"].map("{:.0f}".format)
    shown["compiled"] = table["compiled"]
    print(shown.to_string(index=False))
    print(
        "host waits and compiled: synchronisations of one step, and graphs compiled while the clock ran; 0 is wanted."
    )


def _print_payoff(setup: Setup, measured: Mapping[str, StepTimes], swept: Mapping[str, pd.DataFrame]) -> None:
    config, sparse = setup.sparse, measured[setup.sparse.mode]
    totals = {name: times.total for name, times in measured.items()}
    dense = best_dense(totals, _PLAIN)
    by_flops = touchable_flops(setup.shape, config, setup.work, setup.lora)
    print(f"touched: {by_flops:.1%} of the dense step's multiplications; ceiling {ceiling(by_flops):.2f}×")
    if "floor" in measured:
        part = 1 - measured["floor"].median_ms / measured["dense"].median_ms
        print(
            f"measured: {part:.1%} of the dense step's time goes when that work is gone; ceiling {ceiling(part):.2f}×"
        )
    control = mode_of(config).control
    if control is not None:
        parts = Parts.of(
            dense=measured["dense"].median_ms,
            sparse=sparse.median_ms,
            unchosen=measured[_control_label(control)].median_ms,
            floor=measured["floor"].median_ms,
            share=kept_share(setup.shape, config, setup.work, setup.lora),
        )
        print(parts.text(sparse.median_ms))
    for name, table in swept.items():
        rows = table.set_index("variant").loc[[config.mode]].sort_values(name)
        print(break_even_text(name, rows[name].tolist(), rows["speedup"].tolist()))
    print(f"against PEFT as it is: {ratio(totals['PEFT'], sparse.total).median:.2f}×")
    print(verdict(totals[dense], sparse.total, f"the best dense step ({dense})"))


# --- estimates ----------------------------------------------------------------------------------------------------


def _prepare_estimators(args: argparse.Namespace, setup: Setup) -> Measure:
    import torch

    from sparselora.bench.estimator_check import check_estimators, text_batches
    from sparselora.models.load import load_causal_lm, load_classifier, resolve_device

    if not isinstance(setup.source, str):
        raise InputError("--estimators needs the weights of a real --model; random ones (--shape) have no structure")
    flags = ("dataset", "text_fields", "prompt_field", "completion_field")
    train = setup.train.merge({name: getattr(args, name) for name in flags})
    if train.dataset is None:
        raise InputError("--estimators needs texts: give --dataset FILE")
    device = resolve_device(args.device)
    if setup.shape.decoder:
        model, tokenizer = load_causal_lm(setup.source, torch.bfloat16 if _bf16(args, device) else torch.float32)
    else:
        model, tokenizer = load_classifier(setup.source, 2)
    fields = (train.prompt_field, train.completion_field) if setup.shape.decoder else train.text_fields
    batches = text_batches(
        train.dataset, tokenizer, causal=setup.shape.decoder, fields=fields, samples=args.samples,
        batch=args.train_bsz, max_length=args.seq, seed=args.seed,
    )  # fmt: skip
    model = model.to(device)
    check_estimators(model, batches[:1], setup.sparse, args.ranks)  # says what does not fit before anything is written
    return partial(_estimators, args, setup, model, batches)


def _estimators(args: argparse.Namespace, setup: Setup, model: Any, batches: list[Any], folder: RunFolder) -> None:
    from tqdm import tqdm

    from sparselora.bench.estimator_check import check_estimators, summarise
    from sparselora.report.contextual import estimators

    with tqdm(total=len(batches), unit="batch", disable=not sys.stderr.isatty(), leave=False) as bar:
        rows = check_estimators(model, batches, setup.sparse, args.ranks, progress=bar.update)
    table = pd.DataFrame(rows)
    means = summarise(table)
    write_csv(folder.path("estimators_by_batch.csv"), table)
    estimators(folder.path("estimators.png"), means, f"{setup.label}: estimates against the oracle")
    print(f"{setup.label}: estimates against the oracle, mean over {len(batches)} batches and the sparse layers")
    shown = means.groupby(["part", "rank"])[
        ["sparsity", "recall", "random_recall", "energy", "random_energy", "cosine"]
    ].mean()
    print(shown.reset_index().to_string(index=False, float_format="{:.3f}".format))
    print(
        "recall: part of the oracle's channels found; energy: Σ oracle² of the found against that of the oracle's own."
    )
