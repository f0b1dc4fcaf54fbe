"""The numbers of an edit as flags of a command: added to its parser, and read back."""

from __future__ import annotations

import argparse
from dataclasses import fields

from sparselora.spectral.modes import ENERGIES, MODES, UPDATE_MODES, EditOptions

_NUMBERS = {
    "core_frac": "share of the directions that are core",
    "noise_frac": "share of the directions that are noise",
    "amp_factor": "factor of the core",
    "sup_factor": "factor of the noise",
    "mid_factor": "factor of the rest",
    "eta": "step size of mode gd",
    "eta_pos": "with --asymmetric_update: step size where the gradient is positive",
    "eta_neg": "with --asymmetric_update: step size where the gradient is negative",
    "smooth_width": "width of the transitions of smooth_abs, as a share of the directions",
    "z_threshold": "standard deviations beyond which z_score calls a direction core or noise",
}


def add_edit_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--mode``, a flag for each field of `EditOptions`, and the choice of modules."""
    group = parser.add_argument_group("edit")
    group.add_argument("--mode", default="abs_select", choices=tuple(MODES), help="rule for the new singular values")
    defaults = EditOptions()
    for name, text in _NUMBERS.items():
        group.add_argument(f"--{name}", type=float, default=getattr(defaults, name), metavar="X", help=text)
    group.add_argument(
        "--update_mode", default=defaults.update_mode, choices=UPDATE_MODES, help="application of a step of mode gd"
    )
    group.add_argument(
        "--asymmetric_update", action="store_true", help="mode gd takes --eta_pos and --eta_neg in place of --eta"
    )
    group.add_argument(
        "--intruder_k", type=int, default=defaults.intruder_k, metavar="N",
        help="mode damp_intruders: leading singular vectors of the updated weight to look at",
    )  # fmt: skip
    group.add_argument(
        "--intruder_cosine", type=float, default=defaults.intruder_cosine, metavar="X",
        help="mode damp_intruders: one whose cosine with every singular vector of the base is below it is an intruder",
    )  # fmt: skip
    group.add_argument(
        "--preserve_energy", default=defaults.preserve_energy, choices=tuple(ENERGIES),
        help="norm of a module's singular values to restore",
    )  # fmt: skip
    group.add_argument(
        "--target_modules", nargs="+", default=["down_proj", "o_proj"], metavar="NAME",
        help="ends of module names; all: every module",
    )  # fmt: skip
    group.add_argument("--layer_min", type=int, metavar="N", help="first layer to edit")
    group.add_argument("--layer_max", type=int, metavar="N", help="last layer to edit")


def read_edit_options(args: argparse.Namespace) -> EditOptions:
    """Return the numbers that the flags give.

    Raises:
        InputError: one is out of its range.
    """
    return EditOptions(**{field.name: getattr(args, field.name) for field in fields(EditOptions)})
