"""A smaller adapter: each module's update cut to a lower rank, in factor space, with the least error there is.

The rank is the same for every module (--rank, at most what it has) or the least that holds a share of the squared norm
of its update (--energy). The scale is folded into the factors, so that alpha == r in every module; plain PEFT loads the
result. What is no linear LoRA module is carried through untouched.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm import tqdm

from sparselora.cli import add_run_arguments, print_plan, result_arguments
from sparselora.errors import InputError
from sparselora.reconstruction import energy_rank
from sparselora.records import RunFolder, write_csv

if TYPE_CHECKING:
    from torch import Tensor

    from sparselora.spectral.adapter import AdapterFile

_BOUND_TO_RANK = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that change the base weights when PEFT loads the adapter, by an amount that depends on the rank."""

_OUTPUTS = ("adapter_config.json", "adapter_model.safetensors", "reduce.csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("adapter")
    source.add_argument("--lora_path", required=True, metavar="DIR", help="folder of a PEFT LoRA adapter")
    size = parser.add_argument_group("how small (one of)").add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="N", help="rank of every module; one that has less keeps what it has")
    size.add_argument(
        "--energy", type=float, metavar="X", help="least rank of each module that holds this share of ‖ΔW‖², as 0.95"
    )
    add_run_arguments(parser, "reduced_lora", seed=False)


def run(args: argparse.Namespace) -> None:
    if args.rank is not None and args.rank < 1:
        raise InputError(f"--rank must be at least 1, got {args.rank}; PEFT has no rank 0")
    if args.energy is not None and not 0 < args.energy <= 1:
        raise InputError(f"--energy must be in (0, 1], got {args.energy}; 0.95 keeps 95 % of the energy")

    # torch takes longer to import than a wrong argument to be told.
    from sparselora.spectral.adapter import open_adapter, refuse_overlap

    refuse_overlap(args.out_dir, args.lora_path)
    if args.dry_run:
        adapter = open_adapter(Path(args.lora_path))
        refuse_rank_bound(adapter)
        print_table(adapter, reduced(adapter, args.rank, args.energy)[0])
        print_plan(args, ["run.json", *_OUTPUTS])
        return
    folder = RunFolder(
        args.out_dir, "reduce", result_arguments(args), inputs=("lora_path",), outputs=_OUTPUTS,
        overwrite=args.overwrite,
    )  # fmt: skip
    if folder.is_finished():
        print(folder.finished_message())
        return
    with folder.reserved():
        adapter = open_adapter(Path(args.lora_path))
        refuse_rank_bound(adapter)
        table = write_reduced(args, adapter, folder)
    print_table(adapter, table)
    print(f"adapter and table: {args.out_dir}")


def write_reduced(args: argparse.Namespace, adapter: AdapterFile, folder: RunFolder) -> pd.DataFrame:
    """Reduce the adapter and write it; its table."""
    from sparselora.spectral.adapter import write_adapter

    table, factors = reduced(adapter, args.rank, args.energy)
    with folder:
        ranks = {str(name): int(rank) for name, rank in zip(table["module"], table["rank"])}
        write_adapter(folder.folder, adapter, factors, reduced_config(adapter, ranks), scaled_biases(adapter))
        write_csv(folder.path("reduce.csv"), table)
        folder.note(carried=adapter.carried)
    return table


def refuse_rank_bound(adapter: AdapterFile) -> None:
    start = str(adapter.config.get("init_lora_weights", True))
    if start.lower().startswith(_BOUND_TO_RANK):
        raise InputError(
            f"adapter {adapter.name} was initialised by {start}, which changes the base weights by its rank when "
            "it is loaded; convert it to plain LoRA first (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    if not adapter.modules:
        raise InputError(f"adapter {adapter.name} has LoRA on embeddings and convolutions only; none can be reduced")


def reduced(
    adapter: AdapterFile, rank: int | None, energy: float | None
) -> tuple[pd.DataFrame, dict[str, tuple[Tensor, Tensor]]]:
    """One row a module, and its new factors (A, B), scale included, in the stored types.

    ``retained_energy`` is the share of ‖ΔW‖² kept (1 for a zero update), ``relative_error`` is ‖ΔW − ΔW'‖/‖ΔW‖.
    """
    from sparselora.spectral.factors import adapter_svd, truncated

    rows, factors = [], {}
    for name in tqdm(adapter.modules, desc="modules", delay=2, file=sys.stderr):
        A, B, scaling = adapter.factors(name)
        svd = adapter_svd(A, B, scaling)
        s = svd.sigma.cpu().numpy()
        wanted = rank if rank is not None else energy_rank(s, energy or 1.0)
        k = max(1, min(wanted, svd.rank, A.shape[1], B.shape[0]))
        new_A, new_B = truncated(svd, k)
        factors[name] = new_A.to(A), new_B.to(B)
        whole = float((s**2).sum())
        lost = float((s[k:] ** 2).sum()) / whole if whole else 0.0
        rows.append({
            "module": name, "d_out": B.shape[0], "d_in": A.shape[1], "r": svd.rank, "rank": k,
            "retained_energy": 1 - lost, "relative_error": lost**0.5, "fro_norm": whole**0.5,
            "params_before": A.numel() + B.numel(), "params_after": new_A.numel() + new_B.numel(),
        })  # fmt: skip
    return pd.DataFrame(rows), factors


def reduced_config(adapter: AdapterFile, ranks: dict[str, int]) -> dict[str, Any]:
    """The fields of the configuration that say alpha == r: for all modules, or each by name where ranks differ.

    Modules that are carried keep their rank and scaling.
    """
    alphas: dict[str, float] = dict(ranks)
    for name, entry in adapter.fixed.items():
        r = adapter.tensors[entry.key_A].shape[0]
        ranks, alphas = {**ranks, name: r}, {**alphas, name: entry.scaling * r}
    largest = max(ranks.values())
    common = {"r": largest, "lora_alpha": largest, "use_rslora": False}
    if set(ranks.values()) == set(alphas.values()) == {largest}:
        return {**common, "rank_pattern": {}, "alpha_pattern": {}}
    # PEFT takes the first key that a name ends in: every module is named, and a longer name stands before its ending.
    order = sorted(ranks, key=lambda name: -name.count("."))
    return {
        **common,
        "rank_pattern": {name: ranks[name] for name in order},
        "alpha_pattern": {name: alphas[name] for name in order},
    }


def scaled_biases(adapter: AdapterFile) -> dict[str, Tensor]:
    """The biases of lora_B, which the layer multiplies by the scaling, with the scaling in them."""
    entries = [entry for entry in adapter.modules.values() if entry.key_bias in adapter.tensors]
    return {
        entry.key_bias: (adapter.tensors[entry.key_bias].double() * entry.scaling).to(adapter.tensors[entry.key_bias])
        for entry in entries
    }


def print_table(adapter: AdapterFile, table: pd.DataFrame) -> None:
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
    whole = float((table["fro_norm"] ** 2).sum())
    kept = float((table["fro_norm"] ** 2 * table["retained_energy"]).sum()) / whole if whole else 1.0
    print(
        f"{adapter.name}: {len(table)} modules, {before:,} → {after:,} parameters ({after / before:.1%}), "
        f"{kept:.4%} of the energy retained"
    )
    scaled = set(scaled_biases(adapter))
    if scaled:
        print(f"with the scaling folded in: {len(scaled)} LoRA biases")
    kinds = pd.Series([kind for name, kind in adapter.carried.items() if name not in scaled], dtype=str).value_counts()
    for kind, count in kinds.items():
        print(f"carried through untouched: {count} tensors ({kind})")
