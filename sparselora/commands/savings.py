"""Savings of LoRA over full fine-tuning: trainable parameters, adapter size, gradient and optimizer memory.

Counted from a model's configuration alone; no weights are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from sparselora.cli import add_run_arguments, output_folder, result_arguments, run_in_folder
from sparselora.errors import InputError
from sparselora.models.architectures import (
    SHAPES,
    TARGETS,
    Architecture,
    architecture,
    lora_parameters,
    training_memory,
)
from sparselora.models.model_files import model_label, read_model_config
from sparselora.runs.files import write_csv
from sparselora.runs.folder import RunFolder
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names
from sparselora.runs.request import RunRequest

CHART_RANKS = (4, 8, 16, 32, 64, 128, 256)
_FULL = {
    "model": "every parameter of the model, a tied one once",
    "attention": "weights and biases of the four attention projections (q, k, v, o) in every layer",
}

EXAMPLES = """\
  sparselora savings --shape llama-7b gpt2 --lora_r 8 64
  sparselora savings --model ./llama --target_modules attention"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model").add_mutually_exclusive_group()
    model.add_argument("--model", help="local folder with a config.json, GGUF file, hub name, minilm or smollm2")
    model.add_argument(
        "--shape",
        nargs="+",
        choices=SHAPES,
        default=["bert-base"],
        metavar="NAME",
        help=f"built-in configurations, one or several of: {', '.join(SHAPES)}",
    )
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--lora_r", type=int, nargs="+", default=[8, 16, 32, 64], metavar="R", help="ranks of the table"
    )
    adapter.add_argument(
        "--target_modules",
        nargs="+",
        default=["q", "v"],
        metavar="NAME",
        help="what is adapted: " + ", ".join(f"{name} ({text})" for name, text in TARGETS.items()),
    )
    count = parser.add_argument_group("what is counted")
    count.add_argument(
        "--full",
        choices=_FULL,
        default="model",
        help="what full fine-tuning trains: " + "; ".join(f"{name}: {text}" for name, text in _FULL.items()),
    )
    count.add_argument(
        "--bytes_per_param",
        type=float,
        default=4.0,
        metavar="N",
        help="bytes of a trained parameter and of its gradient",
    )
    count.add_argument(
        "--optimizer_bytes",
        type=float,
        metavar="N",
        help="bytes of optimizer state per trained parameter (default: 2 × bytes_per_param, AdamW's two moments in the "
        "parameter's own type, as torch keeps them; 8 for float32 moments of bfloat16 weights)",
    )
    add_run_arguments(parser, "savings_results/<models>", seed=False)
    accept_former_names(parser, FORMER_NAMES["savings"])


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    _check_bytes(args)
    return _request(args, _models(args))


def _request(args: argparse.Namespace, models: Mapping[str, Architecture]) -> RunRequest:
    arguments = result_arguments(args) | {"shape": None if args.model is not None else args.shape}
    return RunRequest(
        "savings",
        output_folder(args, "savings_results", "+".join(models)),
        arguments,
        ("savings.csv", *(f"savings_{name}.{end}" for name in models for end in ("csv", "png"))),
        settings=vars(args) | {"shape": arguments["shape"]},
        inputs=("model",),
        overwrite=args.overwrite,
    )


def run(args: argparse.Namespace) -> None:
    _check_bytes(args)
    models = _models(args)
    table = pd.concat([_savings(name, model, args.lora_r, args) for name, model in models.items()], ignore_index=True)
    charts = {
        name: _savings(name, model, _chart_ranks(model, args.target_modules), args) for name, model in models.items()
    }

    def body(folder: RunFolder) -> None:
        with folder:
            # matplotlib takes longer to import than everything else here takes to run.
            from sparselora.report.savings import savings_chart

            write_csv(folder.path("savings.csv"), table)
            for name, chart in charts.items():
                savings_chart(chart, folder.path(f"savings_{name}.png"))
        for name, model in models.items():
            _print_table(model, table[table["model"] == name])
        _print_definitions(args, folder.folder)

    run_in_folder(_request(args, models), body, dry_run=args.dry_run)


def _models(args: argparse.Namespace) -> dict[str, Architecture]:
    if args.model is not None:
        return {model_label(args.model): architecture(read_model_config(args.model))}
    return {name: architecture(SHAPES[name]) for name in dict.fromkeys(args.shape)}


# --- reading ------------------------------------------------------------------------------------------------------


def _check_bytes(args: argparse.Namespace) -> None:
    for name in ("bytes_per_param", "optimizer_bytes"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1024:
            raise InputError(f"--{name} must be a number of bytes in [0, 1024], got {value}")
    if not args.bytes_per_param:
        raise InputError("--bytes_per_param must be above 0; use 4 for float32, 2 for bfloat16")


# --- counting -----------------------------------------------------------------------------------------------------


def _chart_ranks(model: Architecture, targets: list[str]) -> list[int]:
    largest = min(matrix.largest_rank for matrix in model.resolve(targets))
    return [rank for rank in CHART_RANKS if rank <= largest]


def _savings(name: str, model: Architecture, ranks: list[int], args: argparse.Namespace) -> pd.DataFrame:
    """One row a rank: what is trained, and the bytes it takes, for LoRA and for full fine-tuning."""
    matrices = model.resolve(args.target_modules)
    counts = {"model": model.model_parameters(), "attention": model.attention_parameters()}
    full = training_memory(counts[args.full], args.bytes_per_param, args.optimizer_bytes)
    rows = []
    for rank in dict.fromkeys(ranks):
        trained = lora_parameters(matrices, rank)
        lora = training_memory(trained, args.bytes_per_param, args.optimizer_bytes)
        rows.append(
            {
                "model": name,
                "model_type": model.model_type,
                "targets": " ".join(args.target_modules),
                "modules": " ".join(matrix.name for matrix in matrices),
                "adapted_matrices": sum(matrix.count for matrix in matrices),
                "rank": rank,
                "lora_params": trained,
                "full_counts": args.full,
                "full_params": counts[args.full],
                "full_model_params": counts["model"],
                "full_attention_params": counts["attention"],
                "lora_percent_of_full": 100 * trained / counts[args.full],
                "adapter_bytes": lora.parameters,
                "lora_gradient_bytes": lora.gradients,
                "lora_optimizer_bytes": lora.optimizer,
                "full_weight_bytes": full.parameters,
                "full_gradient_bytes": full.gradients,
                "full_optimizer_bytes": full.optimizer,
                # The frozen weights stay in memory under LoRA; its own come on top.
                "saved_bytes": full.gradients + full.optimizer - lora.total,
            }
        )
    return pd.DataFrame(rows)


# --- printing -----------------------------------------------------------------------------------------------------


def _bytes(value: float) -> str:
    """``value`` bytes in decimal units, three digits: 33.6 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def _print_table(model: Architecture, table: pd.DataFrame) -> None:
    first = table.iloc[0]
    print(f"{first['model']} ({first['model_type']}): whole model {first['full_model_params']:,} parameters,", end=" ")
    print(f"attention projections {first['full_attention_params']:,}")
    print(f"LoRA on {first['targets']}: {first['modules']} ({first['adapted_matrices']:,} matrices)")
    for matrix in model.resolve(sorted(set(first["targets"].split()))):
        if len(matrix.parts) > 1:
            print(f"  {matrix.name} holds {', '.join(matrix.parts)} in one matrix: one adapter covers them all")
    shown = pd.DataFrame(
        {
            "rank": table["rank"],
            "LoRA params": table["lora_params"].map("{:,}".format),
            "% of full": table["lora_percent_of_full"].map("{:.3g}".format),
            "adapter": table["adapter_bytes"].map(_bytes),
            "LoRA grad.": table["lora_gradient_bytes"].map(_bytes),
            "full grad.": table["full_gradient_bytes"].map(_bytes),
            "LoRA opt.": table["lora_optimizer_bytes"].map(_bytes),
            "full opt.": table["full_optimizer_bytes"].map(_bytes),
            "saved": table["saved_bytes"].map(_bytes),
        }
    )
    print(shown.to_string(index=False), end="\n\n")


def _print_definitions(args: argparse.Namespace, folder: Path) -> None:
    for name, text in _FULL.items():
        print(f"--full {name}: full fine-tuning trains {text}{'  (counted above)' if name == args.full else ''}")
    state = 2 * args.bytes_per_param if args.optimizer_bytes is None else args.optimizer_bytes
    print(
        f"Counted: {args.bytes_per_param:g} bytes per trained parameter and per gradient, {state:g} of optimizer state "
        "(AdamW: two moments).\nsaved = full gradients + full optimizer − LoRA's parameters, gradients and optimizer; "
        "the frozen weights stay in memory.\nNot counted: activations, frozen weights and master copies, a task head, "
        "file headers. kB, MB, GB are powers of 1000."
    )
    print(f"wrote {folder}")
