"""The rise of the loss when one layer at a time is sparse, and the layer sparsities that follow for a FLOP budget.

Forward passes alone, over rows of the training data. The schedule that is chosen and a uniform one of the same budget
are then measured on further rows. Settings are those of `train`: data, model, train_bsz and sparsity (mode, ranks,
compensation, which tokens) matter here; what is about the adapter and its optimization does not.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from sparselora.cli import Parser, add_run_arguments, output_folder, run_in_folder, source_name
from sparselora.config.flags import COMMON_DATA, add_config_flags, resolve_config
from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.errors import InputError
from sparselora.evaluation.sensitivity_request import OUTPUTS, SensitivityRequest
from sparselora.models.adapter_config import read_peft_config
from sparselora.models.model_files import find_model
from sparselora.runs.folder import RunFolder
from sparselora.runs.process import importing
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    from sparselora.evaluation.sensitivity_run import LayerSensitivities

INPUTS = ("model", "dataset", "eval_file", "adapter")
"""The arguments that name files or folders."""
_OWN = ("ffn_levels", "attention_levels", "samples", "held_out", "budget", "adapter")
"""Settings of the measurement itself, by the names of their flags."""
_FFN_LEVELS = (0.5, 0.75, 0.9, 0.99)
_ATTENTION_LEVELS = (0.25, 0.5, 0.75)

EXAMPLES = """\
  sparselora sensitivity configs/llama_sparse.yaml --model ./llama --dataset rows.jsonl
  sparselora sensitivity --model minilm --dataset docstrings --adapter runs/dense/adapter --budget 0.5"""


def add_arguments(parser: Parser) -> None:
    add_config_flags(parser)
    measure = parser.add_argument_group("measurement")
    measure.add_argument(
        "--ffn_levels", type=float, nargs="*", default=list(_FFN_LEVELS), metavar="S",
        help="FFN sparsities to measure; no value: none",
    )  # fmt: skip
    measure.add_argument(
        "--attention_levels", type=float, nargs="*", default=list(_ATTENTION_LEVELS), metavar="S",
        help="attention sparsities to measure; no value: none",
    )  # fmt: skip
    measure.add_argument("--samples", type=int, default=64, metavar="N", help="training rows to measure on")
    measure.add_argument("--held_out", type=int, default=64, metavar="N", help="other rows to check the schedules on")
    measure.add_argument(
        "--budget", type=float, default=0.5, metavar="SHARE",
        help="share of the frozen projections' dense FLOPs that sparse tokens may compute",
    )  # fmt: skip
    measure.add_argument("--adapter", metavar="DIR", help="adapter of a dense run to measure with")
    add_run_arguments(parser, "sensitivity_results/<model>", seed=False)
    parser.add_argument("--cache_dir", metavar="DIR", help="folder that keeps estimators and calibration between runs")
    parser.shorten_help((*COMMON_DATA, "sparsity", "sparsity.mode", *_OWN))


# --- the request --------------------------------------------------------------------------------------------------


def read_request(args: argparse.Namespace) -> SensitivityRequest:
    """Check the flags and freeze them.

    Raises:
        InputError: a flag that is missing or out of range, a mode that leaves nothing out, or no level.
    """
    config = resolve_config(_with_model(args))
    for name in ("model", "dataset"):
        if getattr(config, name) is None:
            raise InputError(f"no {name} given; set it in the configuration or by --{name}")
    sparsity = config.seeded_sparsity or SparsityConfig(seed=config.seed)
    if not sparsity.is_sparse:
        raise InputError(f"mode {sparsity.mode} leaves nothing out; measure another by --sparsity.mode")
    levels: dict[Part, list[float]] = {
        "ffn": sorted(set(args.ffn_levels)),
        "attention": sorted(set(args.attention_levels)) if sparsity.facts.has_attention else [],
    }
    for value in (*levels["ffn"], *levels["attention"]):
        if not 0 < value < 1:
            raise InputError(f"a level must be above 0 and below 1, got {value:g}")
    if not any(levels.values()):
        raise InputError("no levels given; give --ffn_levels or --attention_levels some numbers")
    if not 0 < args.budget < 1:
        raise InputError(f"--budget must be above 0 and below 1, got {args.budget:g}")
    for name in ("samples", "held_out"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.adapter is not None:
        read_peft_config(Path(args.adapter))
    return SensitivityRequest(
        config, sparsity, levels, args.samples, args.held_out, args.budget, args.adapter, args.cache_dir
    )


def _with_model(args: argparse.Namespace) -> argparse.Namespace:
    """Return ``args`` with the first argument as --model, if it is a model and no configuration."""
    if args.config is None or args.config.suffix in (".yaml", ".yml") or args.config.is_file():
        return args
    if args.model is not None:
        raise InputError(f"two models given, {args.config} and --model {args.model}; give one")
    return argparse.Namespace(**vars(args) | {"model": args.config.as_posix(), "config": None})


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run, as a grid asks for it."""
    return _run_request(args, read_request(args))


def _run_request(args: argparse.Namespace, measurement: SensitivityRequest) -> RunRequest:
    folder = output_folder(args, "sensitivity_results", source_name(measurement.config.model))
    return RunRequest(
        "sensitivity",
        folder,
        measurement.arguments,
        OUTPUTS,
        settings=measurement.arguments | {"out_dir": folder},
        inputs=INPUTS,
        seed=measurement.config.seed,
        overwrite=args.overwrite,
    )


# --- the run ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    measurement = read_request(args)
    model = measurement.config.model
    assert model is not None

    def body(folder: RunFolder) -> None:
        # Imported late: torch takes seconds to load, and a finished run or a bad flag should return at once.
        with importing():
            from sparselora.evaluation.sensitivity_run import run_sensitivity

        _print(measurement, run_sensitivity(measurement, folder))
        print(f"wrote {folder.folder}: train --sparsity {folder.folder / 'chosen.yaml'} uses the schedule")

    run_in_folder(_run_request(args, measurement), body, dry_run=args.dry_run, check=lambda: find_model(model))


def _print(measurement: SensitivityRequest, outcome: LayerSensitivities) -> None:
    """Print the schedule that was chosen, and how it does on other rows."""
    mode, dense = measurement.sparsity.mode, outcome.dense_loss
    print(f"{outcome.data_name}, mode {mode}: dense loss {dense:.4f} on {measurement.samples} rows")
    print("chosen:")
    for part, rows in outcome.allocation.groupby("part", sort=False):
        print(f"  {part:<9} " + " ".join(f"{int(r)}:{s:g}" for r, s in zip(rows["layer"], rows["chosen"])))
    print(f"on {measurement.held_out} other rows (budget {measurement.budget:g}):")
    print(f"  {'schedule':<9} {'FLOPs left':>10} {'loss':>8} {'increase':>9} {'± s.e.':>8} {'predicted':>10}")
    for row in outcome.check.to_dict("records"):
        # One batch has no standard error, and a schedule beyond the levels that were measured no prediction.
        error, predicted = row["standard_error"], row["predicted_increase"]
        print(
            f"  {row['schedule']:<9} {row['remaining']:>10.3f} {row['loss']:>8.4f} {row['loss_increase']:>+9.4f} "
            f"{'-' if math.isnan(error) else f'{error:.4f}':>8} "
            f"{'unknown' if math.isnan(predicted) else f'{predicted:+.4f}':>10}"
        )
    print(outcome.verdict)
    if outcome.doubt is not None:
        print(f"warning: {outcome.doubt} (--adapter DIR)")
