"""A smaller adapter: each module's update cut to a lower rank, in factor space, with the least error there is.

The rank is the same for every module (--rank, at most what it has) or the least that holds a share of the squared norm
of its update (--energy). The scale is folded into the factors, and channels of zeros fill them up to the largest rank,
so that alpha == r in every module: PEFT, vLLM and llama.cpp all load the same update. What is no linear LoRA module is
carried through.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from sparselora.cli import add_run_arguments, print_plan, result_arguments
from sparselora.errors import InputError
from sparselora.models.adapter_config import uniform_config
from sparselora.models.adapter_files import padded
from sparselora.numerics.reconstruction import energy_rank
from sparselora.runs.folder import RunFolder, write_csv
from sparselora.runs.former_names import FORMER_NAMES, accept_former_names

if TYPE_CHECKING:
    from torch import Tensor

    from sparselora.models.adapter_files import AdapterFile

_OUTPUTS = ("adapter_config.json", "adapter_model.safetensors", "reduce.csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("adapter")
    source.add_argument("--adapter", required=True, metavar="DIR", help="folder of a PEFT LoRA adapter")
    size = parser.add_argument_group("how small (one of)").add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="N", help="rank of every module; one that has less keeps what it has")
    size.add_argument(
        "--energy", type=float, metavar="X", help="least rank of each module that holds this share of ‖ΔW‖², as 0.95"
    )
    add_run_arguments(parser, "reduced_lora", seed=False)
    accept_former_names(parser, FORMER_NAMES["reduce"])


def run(args: argparse.Namespace) -> None:
    if args.rank is not None and args.rank < 1:
        raise InputError(f"--rank must be at least 1, got {args.rank}; PEFT has no rank 0")
    if args.energy is not None and not 0 < args.energy <= 1:
        raise InputError(f"--energy must be in (0, 1], got {args.energy}; 0.95 keeps 95 % of the energy")

    # torch takes longer to import than a wrong argument to be told.
    from sparselora.models.adapter_files import refuse_overlap, write_adapter

    refuse_overlap(args.out_dir, args.adapter)
    if args.dry_run:
        adapter, (table, result) = _reduced(args)
        print_table(adapter, table, result)
        print_plan(args, ["run.json", *_OUTPUTS])
        return
    folder = RunFolder(
        args.out_dir, "reduce", result_arguments(args), inputs=("adapter",), outputs=_OUTPUTS,
        overwrite=args.overwrite,
    )  # fmt: skip
    if folder.is_finished():
        print(folder.finished_message())
        return
    with folder.reserved():
        adapter, (table, result) = _reduced(args)
        with folder:
            for name in _OUTPUTS:
                folder.path(name)
            write_adapter(folder.folder, adapter, result.factors, result.config, result.biases, result.ranks)
            write_csv(folder.path("reduce.csv"), table)
            folder.note(carried=adapter.carried)
    print_table(adapter, table, result)
    print(f"adapter and table: {args.out_dir}")


def _reduced(args: argparse.Namespace) -> tuple[AdapterFile, tuple[pd.DataFrame, Exported]]:
    """The adapter that is given, the table of its reduction, and what is written of it."""
    from sparselora.models.adapter_files import open_adapter

    adapter = open_adapter(Path(args.adapter))
    if not adapter.modules:
        raise InputError(f"adapter {adapter.name} has LoRA on embeddings and convolutions only; none can be reduced")
    table, factors = reduced(adapter, args.rank, args.energy)
    return adapter, (table, exported(adapter, factors))


def reduced(
    adapter: AdapterFile, rank: int | None, energy: float | None
) -> tuple[pd.DataFrame, dict[str, tuple[Tensor, Tensor]]]:
    """One row a module, and its new factors (A, B), scale included, in the stored types.

    ``retained_energy`` is the share of ‖ΔW‖² kept (1 for a zero update), ``relative_error`` is ‖ΔW − ΔW'‖/‖ΔW‖.

    Raises:
        InputError: factors that do not fit in the stored type.
    """
    from sparselora.spectral.factors import adapter_svd, truncated

    rows, factors = [], {}
    for name in tqdm(adapter.modules, desc="modules", delay=2, file=sys.stderr):
        A, B, scaling = adapter.factors(name)
        svd = adapter_svd(A, B, scaling)
        s = svd.sigma.cpu().numpy()
        wanted = rank if rank is not None else energy_rank(s, energy or 1.0)
        k = max(1, min(wanted, svd.rank, A.shape[1], B.shape[0]))
        try:
            new_A, new_B = factors[name] = truncated(svd, k, A.dtype, B.dtype)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        shares = s / s[0] if s[0] else s  # squares of the values themselves may leave float64
        whole = float((shares**2).sum())
        lost = float((shares[k:] ** 2).sum()) / whole if whole else 0.0
        rows.append({
            "module": name, "d_out": B.shape[0], "d_in": A.shape[1], "r": svd.rank, "rank": k,
            "retained_energy": 1 - lost, "relative_error": lost**0.5, "fro_norm": float(s[0]) * whole**0.5,
            "params_before": A.numel() + B.numel(), "params_after": new_A.numel() + new_B.numel(),
        })  # fmt: skip
    return pd.DataFrame(rows), factors


class Exported(NamedTuple):
    """What is written of a reduced adapter, as `sparselora.models.adapter_files.write_adapter` takes it."""

    factors: dict[str, tuple[Tensor, Tensor]]
    config: dict[str, Any]
    biases: dict[str, Tensor]
    ranks: dict[str, int] | None


def exported(adapter: AdapterFile, factors: dict[str, tuple[Tensor, Tensor]]) -> Exported:
    """Fill the factors up to one rank with zeros, and say alpha == r for all of them.

    Modules that are carried (embeddings, convolutions) keep their rank and scaling by name, in the patterns that PEFT
    reads: a larger rank of theirs does not make the others large again.
    """
    ranks = {name: len(A) for name, (A, _) in factors.items()}
    largest = max(ranks.values())
    config = uniform_config(adapter.config, largest)
    if adapter.fixed:
        stored = {name: len(adapter.tensors[entry.key_A]) for name, entry in adapter.fixed.items()}
        # PEFT takes the first key that a name ends in: every module is named, a longer name before its ending.
        order = sorted([*ranks, *stored], key=lambda name: -name.count("."))
        config["rank_pattern"] = {name: stored.get(name, largest) for name in order}
        config["alpha_pattern"] = {
            name: adapter.fixed[name].scaling * stored[name] if name in stored else largest for name in order
        }
    filled = {name: padded(A, B, largest) for name, (A, B) in factors.items()}
    return Exported(filled, config, scaled_biases(adapter), ranks if set(ranks.values()) != {largest} else None)


def scaled_biases(adapter: AdapterFile) -> dict[str, Tensor]:
    """The biases of lora_B, which the layer multiplies by the scaling, with the scaling in them."""
    entries = [entry for entry in adapter.modules.values() if entry.key_bias in adapter.tensors]
    return {
        entry.key_bias: (adapter.tensors[entry.key_bias].double() * entry.scaling).to(adapter.tensors[entry.key_bias])
        for entry in entries
    }


def print_table(adapter: AdapterFile, table: pd.DataFrame, result: Exported) -> None:
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
    kept = float((energies * table["retained_energy"]).sum() / energies.sum()) if largest else 1.0
    print(
        f"{adapter.name}: {len(table)} modules, {before:,} → {after:,} parameters ({after / before:.1%}), "
        f"{kept:.4%} of the energy retained"
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
