"""The criterion of a rank and the simulated matrices as flags of a command: added to its parser, and read back; needs
no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparselora.errors import InputError

if TYPE_CHECKING:
    from sparselora.inspection.rank import Rule
    from sparselora.inspection.simulation import SimulationRequest

SIMULATED: dict[str, int | float] = {"n": 512, "m": 512, "true_rank": 64, "noise": 0.01}
"""Defaults of the flags of simulated matrices, which are empty where there are none."""


def add_rule_flags(parser: argparse.ArgumentParser) -> None:
    """Add the criterion, its targets, and the choice of modules."""
    group = parser.add_argument_group("criterion")
    group.add_argument("--criterion", choices=("error", "energy", "gap"), default="error", help="when a rank is enough")
    group.add_argument(
        "--target_error", type=float, nargs="+", metavar="E",
        help="relative errors to stay below (default: 0.01 0.05 0.1 0.3)",
    )  # fmt: skip
    group.add_argument(
        "--target_energy", type=float, nargs="+", metavar="X",
        help="shares of the energy to hold; 0.99 is the error 0.1 (default: 0.9 0.95 0.99)",
    )  # fmt: skip
    group.add_argument(
        "--target_modules", nargs="+", metavar="NAME", help="only modules whose name ends in one of these; else all"
    )


def add_simulation_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each entry of `SIMULATED`."""
    group = parser.add_argument_group("simulated matrices")
    group.add_argument("--n", type=int, help="rows (default: 512)")
    group.add_argument("--m", type=int, help="columns (default: 512)")
    group.add_argument("--true_rank", type=int, help="rank of the low-rank matrix's signal (default: 64)")
    group.add_argument("--noise", type=float, help="its noise relative to the signal (default: 0.01)")


def read_rules(args: argparse.Namespace) -> dict[str, Rule]:
    """Return name → rule for every target of the criterion, checked; the names become column names.

    Raises:
        InputError: a target out of range, or given for another criterion.
    """
    from sparselora.inspection.rank import rank_rules

    for name in ("error", "energy"):
        if getattr(args, f"target_{name}") is not None and args.criterion != name:
            raise InputError(f"--target_{name} belongs to --criterion {name}, got --criterion {args.criterion}")
    if args.criterion == "gap":
        return rank_rules("gap")
    if args.criterion == "energy":
        targets, example = args.target_energy or [0.9, 0.95, 0.99], "0.99 keeps 99 % of the energy"
    else:
        targets, example = args.target_error or [0.01, 0.05, 0.1, 0.3], "0.1 leaves 10 % of the norm"
    for target in targets:
        if not 0 < target < 1:
            raise InputError(f"--target_{args.criterion} must be between 0 and 1, got {target}; {example}")
    return rank_rules(args.criterion, targets)


def read_simulation(args: argparse.Namespace, rules: Mapping[str, Rule]) -> SimulationRequest:
    """Return the simulated matrices that the flags describe, to be ranked by ``rules``.

    Raises:
        InputError: modules to choose, of which there are none; sizes out of range.
    """
    from sparselora.inspection.simulation import Simulation, SimulationRequest
    from sparselora.numerics.matrices import family_parameters

    if args.target_modules:
        raise InputError("--target_modules needs --model or --adapter; simulated matrices have no modules")
    values = {name: default if getattr(args, name) is None else getattr(args, name)
              for name, default in SIMULATED.items()}  # fmt: skip
    n, m, true_rank, noise = int(values["n"]), int(values["m"]), int(values["true_rank"]), values["noise"]
    if min(n, m) < 1:
        raise InputError(f"--n and --m must be at least 1, got {n} and {m}")
    family_parameters("lowrank", n, m, {"true_rank": true_rank, "noise": noise})
    return SimulationRequest(Simulation(n, m, true_rank, noise, args.seed), rules, (args.target_error or [0.1])[0])
