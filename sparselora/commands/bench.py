"""Does a cheaper step pay, for this model, batch and device? Times, their parts, multiplications, quality of estimates.

Without --flops, --explain or --estimators whole training steps are timed, interleaved: PEFT as it is, our dense step
with the savings that change no result, and the step of a configuration; then what sparsity can touch, the ceiling that
leaves, what choosing and gathering cost, and from which sparsity on it pays.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselora.bench.request import (
    BenchRequest,
    EstimatesRequest,
    ExplainRequest,
    FlopsRequest,
    TimesRequest,
    bench_request,
)
from sparselora.bench.rivals import RIVALS
from sparselora.bench.rivals.jobs import CASE_NAMES
from sparselora.bench.rivals.processes import LIMIT_S
from sparselora.cli import add_run_arguments, output_folder, result_arguments, run_in_folder
from sparselora.config.sparsity import MODES
from sparselora.config.train import DTYPES
from sparselora.models.architectures import SHAPES
from sparselora.runs.folder import RunFolder
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names
from sparselora.runs.grid import is_local_data
from sparselora.runs.process import importing
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    import pandas as pd

    from sparselora.bench.explain import ExplainResults
    from sparselora.bench.step_times import TimesResults

INPUTS = ("model", "dataset", "sparsity", "against")
"""The arguments that name files or folders."""

# --- arguments ----------------------------------------------------------------------------------------------------

EXAMPLES = """\
  sparselora bench --shape llama3-8b --flops
  sparselora bench --model ./llama --mode svd --seq 512
  sparselora bench --model ./llama --combinations --against unsloth,trl,peft
  sparselora bench --model ./llama --explain"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kind = parser.add_argument_group("what to measure (default: times)").add_mutually_exclusive_group()
    kind.add_argument("--flops", action="store_true", help="count multiplications per token; no model is built")
    kind.add_argument("--explain", action="store_true", help="show where a step's time goes, part by part")
    kind.add_argument("--estimators", action="store_true", help="measure how well estimates rank channels, by layer")
    _add_model_arguments(parser)
    work = parser.add_argument_group("batch and comparison")
    work.add_argument("--train_bsz", type=int, default=8, metavar="N", help="rows in a batch")
    work.add_argument("--seq", type=int, default=512, metavar="N", help="tokens in a row")
    work.add_argument(
        "--labelled", type=int, metavar="N", help="labelled tokens in a row of a decoder (default: a quarter)"
    )
    work.add_argument(
        "--against",
        default="dense",
        metavar="NAME",
        help=f"trainers to time as well, parted by commas, of {','.join(RIVALS)}; with --flops what to compare with: a "
        "YAML file, dense (with the exact savings) or peft (without)",
    )
    work.add_argument(
        "--cases",
        nargs="+",
        choices=CASE_NAMES,
        metavar="NAME",
        help="rows to compare trainers on: full, padded or packed; full-all, padded-all or packed-all: every token "
        "labelled (default: all of these)",
    )
    work.add_argument(
        "--rival_limit_s",
        type=float,
        metavar="S",
        help=f"seconds after which a trainer is stopped, with the rows that it has (default: {LIMIT_S:g})",
    )
    count = parser.add_argument_group("--flops")
    count.add_argument("--unit", choices=("MACs", "FLOPs"), default="FLOPs", help="one MAC is two FLOPs")
    times = parser.add_argument_group("times")
    times.add_argument("--rounds", type=int, default=20, metavar="N", help="timed steps of each variant")
    times.add_argument("--warmup", type=int, default=3, metavar="N", help="untimed steps of each variant before them")
    times.add_argument(
        "--combinations", action="store_true", help="fp8 and no context backward too, alone, together and with sparsity"
    )
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


# --- the request --------------------------------------------------------------------------------------------------


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    return _request(args, bench_request(vars(args)))


def _request(args: argparse.Namespace, measurement: BenchRequest) -> RunRequest:
    return RunRequest(
        "bench",
        output_folder(args, "bench_results", f"{_kind(vars(args))}-{measurement.setup.label}"),
        result_arguments(args),
        measurement.outputs,
        settings=vars(args),
        inputs=INPUTS,
        seed=args.seed,
        overwrite=args.overwrite,
    )


def name_parts(values: Mapping[str, Any]) -> tuple[list[str], frozenset[str]]:
    """Return how the name of a bench in a grid begins: measurement and model; and the flags to leave out behind."""
    names = (Path(str(values[name])).stem for name in ("shape", "model", "sparsity") if values[name] is not None)
    return [_kind(values), *names], frozenset({"flops", "explain", "estimators", "shape", "device", *INPUTS})


def _kind(values: Mapping[str, Any]) -> str:
    return next((kind for kind in ("flops", "explain", "estimators") if values[kind]), "times")


def reads_hub(values: Mapping[str, Any]) -> bool:
    """Return whether a bench with these values may read a data set on the hub."""
    return bool(values["estimators"]) and not is_local_data(values["dataset"])


# --- the run ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    measurement = bench_request(vars(args))

    def body(folder: RunFolder) -> None:
        if isinstance(measurement, FlopsRequest):
            from sparselora.bench.multiplications import count_multiplications

            _print_flops(measurement, count_multiplications(measurement, folder))
        elif isinstance(measurement, EstimatesRequest):
            with importing():
                from sparselora.bench.estimates import measure_estimates

            _print_estimates(measurement, measure_estimates(measurement, folder))
        elif isinstance(measurement, ExplainRequest):
            from sparselora.bench.explain import explain_steps

            _print_parts(measurement, explain_steps(measurement, folder))
        else:
            with importing():
                from sparselora.bench.step_times import time_steps

            _print_times(measurement, time_steps(measurement, folder))
        print(f"wrote {folder.folder}")

    run_in_folder(_request(args, measurement), body, dry_run=args.dry_run)


def _print_flops(counted: FlopsRequest, comparison: str) -> None:
    setup, (before, after) = counted.setup, counted.labels
    print(f"{setup.title}, LoRA r {setup.lora.rank} on {' '.join(setup.lora.targets)}")
    print(f"{after} (after) against {before} (before), on average over the tokens:")
    print(comparison)


def _print_parts(explained: ExplainRequest, results: ExplainResults) -> None:
    from sparselora.bench.explain import format_parts

    print(f"{explained.setup.title}; {results.where}; mean of {explained.rounds} steps")
    print(format_parts(results.parts))


def _print_times(timed: TimesRequest, results: TimesResults) -> None:
    from sparselora.bench.timing import format_steps

    setup = timed.setup
    adapter = f"LoRA r {setup.lora.rank} on {' '.join(setup.lora.targets)}"
    print(f"{setup.title}; {results.where}; {adapter}; {timed.rounds} rounds")
    skipped = (f"left out: {name}: {reason}" for name, reason in results.skipped.items())
    print("\n".join((format_steps(results.steps), *skipped, *results.payoff, *results.against)))


def _print_estimates(measured: EstimatesRequest, means: pd.DataFrame) -> None:
    from sparselora.bench.estimator_check import format_estimates

    batches = means["n"].iloc[0]
    print(f"{measured.setup.label}: estimates against the oracle, mean over {batches} batches and the sparse layers")
    print(format_estimates(means))
