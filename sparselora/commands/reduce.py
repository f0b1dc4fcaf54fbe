"""A smaller adapter: each module's update cut to a lower rank, in factor space, with the least error there is.

The rank is the same for every module (--rank, at most what it has) or the least that holds a share of the squared norm
of its update (--energy). The scale is folded into the factors, and channels of zeros fill them up to the largest rank,
so that alpha == r in every module: PEFT, vLLM and llama.cpp all load the same update. What is no linear LoRA module is
carried through. An AdaLoRA adapter becomes a plain LoRA: --energy 1 keeps its whole update, at the least rank.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sparselora.cli import add_run_arguments, result_arguments, run_in_folder
from sparselora.errors import InputError
from sparselora.models.prompt_template import template_outputs
from sparselora.runs.files import write_csv
from sparselora.runs.folder import RunFolder
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    from sparselora.spectral.reduce import ReducedAdapter

_OUTPUTS = ("adapter_config.json", "adapter_model.safetensors", "reduce.csv")
EXAMPLES = """\
  sparselora reduce --adapter runs/train/adapter --energy 0.95
  sparselora reduce --adapter runs/train/adapter --rank 4 --out_dir adapter_r4"""
INPUTS = ("adapter",)
"""The arguments that name files or folders."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("adapter")
    source.add_argument("--adapter", required=True, metavar="DIR", help="folder of a PEFT LoRA or AdaLoRA adapter")
    size = parser.add_argument_group("how small (one of)").add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="N", help="rank of every module; one that has less keeps what it has")
    size.add_argument(
        "--energy", type=float, metavar="X", help="least rank of each module that holds this share of ‖ΔW‖², as 0.95"
    )
    add_run_arguments(parser, "reduced_lora", seed=False)
    accept_former_names(parser, FORMER_NAMES["reduce"])


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    if args.rank is not None and args.rank < 1:
        raise InputError(f"--rank must be at least 1, got {args.rank}; PEFT has no rank 0")
    if args.energy is not None and not 0 < args.energy <= 1:
        raise InputError(f"--energy must be in (0, 1], got {args.energy}; 0.95 keeps 95 % of the energy")

    # Imported after the flags are checked: torch takes seconds.
    from sparselora.models.adapter_files import refuse_overlap

    refuse_overlap(args.out_dir, args.adapter)
    return RunRequest(
        "reduce",
        Path(args.out_dir),
        result_arguments(args),
        (*_OUTPUTS, *template_outputs(args.adapter)),
        settings=vars(args),
        inputs=INPUTS,
        overwrite=args.overwrite,
    )


def run(args: argparse.Namespace) -> None:
    def reduced() -> ReducedAdapter:
        from sparselora.models.adalora import open_as_lora
        from sparselora.spectral.reduce import reduce_adapter

        return reduce_adapter(open_as_lora(args.adapter), args.rank, args.energy)

    def body(folder: RunFolder) -> None:
        result = reduced()
        with folder:
            result.write(folder.folder)
            write_csv(folder.path("reduce.csv"), result.table)
            folder.note(carried=result.adapter.carried)
        print_table(result)
        print(f"adapter and table: {args.out_dir}")

    run_in_folder(request(args), body, dry_run=args.dry_run, preview=lambda: print_table(reduced()))


def print_table(result: ReducedAdapter) -> None:
    """Print the rank of every module, before and after, and the size of the whole."""
    import pandas as pd

    adapter, table = result.adapter, result.table
    shown = pd.DataFrame(
        {
            "module": table["module"],
            "shape": [f"{n}×{m}" for n, m in zip(table["d_out"], table["d_in"])],
            "rank": [f"{r} → {k}" for r, k in zip(table["r"], table["rank"])],
            "retained energy": table["retained_energy"].map("{:.6f}".format),
            "relative error": table["relative_error"].map("{:.4g}".format),
        }
    )
    print(shown.to_string(index=False))
    before, after = int(table["params_before"].sum()), int(table["params_after"].sum())
    largest = float(table["fro_norm"].max())
    energies = (table["fro_norm"] / largest) ** 2 if largest else table["fro_norm"]
    retained = float((energies * table["retained_energy"]).sum() / energies.sum()) if largest else 1.0
    print(
        f"{adapter.name}: {len(table)} modules, {before:,} → {after:,} parameters ({after / before:.1%}), "
        f"{retained:.4%} of the energy retained"
    )
    if result.ranks is not None:
        stored = sum(A.numel() + B.numel() for A, B in result.factors.values())
        print(
            f"the file holds {stored:,} of them: channels of zeros fill every module up to rank {result.config['r']}, "
            "as loaders differ on modules of several ranks"
        )
    if result.biases:
        print(f"with the scaling folded in: {len(result.biases)} LoRA biases")
    carried = {name: kind for name, kind in adapter.carried.items() if name not in result.biases}
    for kind, count in pd.Series(carried, dtype=str).value_counts().items():
        print(f"carried through untouched: {count} tensors ({kind})")
