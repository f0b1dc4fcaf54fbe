"""Write a grid for `python -m sparselora edit --grid`: adapters × modes × seeds × values of the modes' options.

    python results/spectral/make_grid.py --adapter runs/a/adapter runs/b/adapter --model M --dataset D \\
        --modes abs_select gd --seeds 0 1 2 --core_frac 0.1 0.2 --eta 0.1 0.2 --report > grid.jsonl

Adapters of other bases or for other data: another call, with >>. An option is crossed with the modes that read it only.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import Any

from sparselora.spectral.modes import ENERGIES, MODES

_FACTORS = ("core_frac", "noise_frac", "amp_factor", "sup_factor", "mid_factor")
READS = {
    "abs_select": _FACTORS,
    "random_index": _FACTORS,
    "gd": ("eta",),
    "smooth_abs": (*_FACTORS, "smooth_width"),
    "z_score": ("amp_factor", "sup_factor", "mid_factor", "z_threshold"),
    "fisher": _FACTORS,
}
"""The options that a mode reads."""
OPTIONS = (*_FACTORS, "eta", "smooth_width", "z_threshold")
SAME = ("model", "dataset", "task", "eval_file", "calib_samples", "eval_samples", "draws")
"""What all lines share."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", nargs="+", required=True, metavar="DIR", help="the adapters")
    parser.add_argument("--modes", nargs="+", default=["abs_select"], choices=tuple(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    for name in OPTIONS:
        parser.add_argument(f"--{name}", nargs="+", type=float, metavar="X", help="values to cross")
    parser.add_argument("--preserve_energy", nargs="+", choices=tuple(ENERGIES), help="values to cross")
    parser.add_argument("--target_modules", nargs="+", metavar="NAME", help="the same on every line, as below")
    for name in SAME:
        parser.add_argument(f"--{name}", type=int if name.endswith("samples") or name == "draws" else str)
    parser.add_argument("--report", action="store_true", help="every edit with its controls")
    for line in configurations(parser.parse_args()):
        print(json.dumps(line, ensure_ascii=False))


def configurations(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shared = {name: getattr(args, name) for name in (*SAME, "target_modules") if getattr(args, name) is not None}
    if args.report:
        shared["report"] = True
    for adapter, mode in itertools.product(args.adapter, args.modes):
        given = {name: getattr(args, name) for name in (*READS[mode], "preserve_energy") if getattr(args, name)}
        for values in itertools.product(*given.values()):
            for seed in args.seeds:
                yield {"adapter": adapter, "mode": mode, "seed": seed, **dict(zip(given, values)), **shared}


if __name__ == "__main__":
    main()
