"""Phase A: does an SVD or energy signal beat random choice, on matrices whose structure is known?

Every trial draws one (n, m) matrix, decomposes it once, and measures, for each rank k, the relative error
‖W − Ŵ‖_F / ‖W‖_F of: the best rank-k approximation (svd_topk_err); k random singular triplets
(rand_svd_subspace_err); a random product A·B of rank k, rescaled to the norm of W (random_AB_err) or by its best
factor (random_AB_scaled_err); and the matrix with all but k columns zeroed, the columns chosen at random
(random_colprune_err) or by a score. *_proj_err fits every column by the kept ones instead of zeroing it;
*_eqb_err keeps as many columns as the storage of rank k, k(n + m) numbers, has room for; *_spectral_err is the
error in the spectral norm. leverage_col_err keeps its published definition, energy over all singular values, which
is exactly the column's squared norm: it is column magnitude. topk_energy_col_err and leverage_score_col_err are the
scores that look at the top k directions alone. control_*_err are the positive control: a tenth of the columns doubled.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sparselora.cli import add_run_arguments, output_folder, result_arguments, run_in_folder
from sparselora.errors import InputError, shown
from sparselora.inspection.matrix_errors import TrialSettings
from sparselora.inspection.trial_tables import CONTROL
from sparselora.inspection.trials import OUTPUTS, run_trials
from sparselora.numerics.matrices import FAMILIES, family_parameters
from sparselora.numerics.stats import smallest_detectable_difference
from sparselora.runs.folder import RunFolder
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    import pandas as pd

MOST_TRIALS = 1_000_000
"""Trials whose figures are all kept in memory."""
FAMILY_FLAGS = ("true_rank", "noise", "decay", "planted_columns", "planted_rank", "strength")
"""The flags that are parameters of a family of matrices."""

# --- arguments ----------------------------------------------------------------------------------------------------

EXAMPLES = """\
  sparselora toy --matrix planted --trials 200
  sparselora toy --n 256 --m 128 --ranks 8 32 --out_dir toy_256"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("experiment")
    size.add_argument("--n", type=int, default=128, help="rows of W, its outputs")
    size.add_argument("--m", type=int, default=64, help="columns of W, its inputs")
    size.add_argument(
        "--ranks", type=int, nargs="+", default=[8, 16, 32], metavar="K",
        help="ranks k, each within 1..min(n, m); k is also the number of columns kept",
    )  # fmt: skip
    size.add_argument("--trials", type=int, default=200, help="matrices drawn")
    size.add_argument(
        "--target_error", type=float, nargs="+", default=[0.01, 0.1], metavar="E",
        help="errors whose least rank is marked in rank_error_curves.png",
    )  # fmt: skip
    kind = parser.add_argument_group("matrix family")
    kind.add_argument("--matrix", choices=FAMILIES, default="gaussian", help="what W is drawn from")
    kind.add_argument("--true_rank", type=int, help="lowrank: rank of the signal (default: 64)")
    kind.add_argument("--noise", type=float, help="lowrank: noise relative to the signal (default: 0.01)")
    kind.add_argument("--decay", type=float, help="powerlaw: s_i is proportional to i^-DECAY (default: 1)")
    kind.add_argument("--planted_columns", type=int, help="planted: columns that carry the signal (default: 16)")
    kind.add_argument("--planted_rank", type=int, help="planted: rank of the signal in them (default: 4)")
    kind.add_argument("--strength", type=float, help="planted: signal relative to the noise (default: 3)")
    add_run_arguments(parser, "toy_results/<matrix>")


def trial_settings(args: argparse.Namespace) -> TrialSettings:
    """Check the arguments and freeze them, with the family's parameters filled in.

    Raises:
        InputError: an argument out of range, or of another family.
    """
    for name in ("n", "m", "trials"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.trials > MOST_TRIALS:
        raise InputError(f"--trials must be at most {MOST_TRIALS:,}, got {shown(args.trials)}")
    most = min(args.n, args.m)
    for rank in args.ranks:
        if not 1 <= rank <= most:
            raise InputError(f"rank must be between 1 and min(n, m) = {most}, got {rank}; change --ranks, --n or --m")
    if len(set(args.ranks)) < len(args.ranks):
        raise InputError(f"--ranks must differ, got {' '.join(map(str, args.ranks))}")
    for target in args.target_error:
        if not 0 < target < 1:
            raise InputError(f"--target_error must be between 0 and 1, got {target}")
    parameters = family_parameters(args.matrix, args.n, args.m, {name: getattr(args, name) for name in FAMILY_FLAGS})
    return TrialSettings(
        args.n, args.m, tuple(sorted(args.ranks)), args.trials, tuple(args.target_error), args.matrix, parameters,
        args.seed,
    )  # fmt: skip


# --- the run ------------------------------------------------------------------------------------------------------


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    return _request(args, trial_settings(args))


def _request(args: argparse.Namespace, settings: TrialSettings) -> RunRequest:
    resolved: dict[str, Any] = {
        **dict.fromkeys(FAMILY_FLAGS), **settings.parameters, "parameters": settings.parameters,
        "ranks": list(settings.ranks),
    }  # fmt: skip
    return RunRequest(
        "toy_experiment",
        output_folder(args, "toy_results", args.matrix),
        result_arguments(args) | resolved,
        OUTPUTS,
        settings=vars(args) | resolved,
        seed=args.seed,
        overwrite=args.overwrite,
    )


def run(args: argparse.Namespace) -> None:
    settings = trial_settings(args)

    def body(folder: RunFolder) -> None:
        with folder:
            results = run_trials(settings, folder)
        report(settings, results.summary, results.optimal_ranks)
        report_control(results.tests)
        print("SVD is below every baseline by construction: read each against its expectation, and the column scores")
        print(f"against random columns. Tables and figures: {folder.folder.as_posix()}")

    run_in_folder(_request(args, settings), body, dry_run=args.dry_run)


def report_control(tests: pd.DataFrame) -> None:
    """Print whether this run could see an effect at all, at each rank."""
    if len(tests):
        print("positive control, a tenth of the columns doubled, k columns by energy minus k random ones:")
    for row in tests[tests["metric"] == CONTROL[0]].itertuples():
        difference = f"{row.mean_difference:+.4f} [{row.ci_low:+.4f}, {row.ci_high:+.4f}]"
        if row.n < 2:
            verdict = "one trial has no interval, so nothing here is tested"
        elif row.ci_high < 0:
            verdict = "separates"
        else:
            spread = abs(row.mean_difference / row.cohens_dz) if row.cohens_dz else float("nan")
            least = smallest_detectable_difference(spread, row.n)
            verdict = f"does not separate: underpowered, differences below {least:.4f} go unseen"
        print(f"  k = {row.rank_used}: {difference}, {verdict}")


def report(settings: TrialSettings, summary: pd.DataFrame, optimal: pd.DataFrame) -> None:
    """Print the mean errors of each rank, the exact expectations of random choices, and the least ranks."""
    labels = {
        "svd_topk_err": "best rank k (SVD)",
        "rand_svd_subspace_err": "k random singular triplets",
        "random_AB_err": "random A·B, norm of W",
        "random_AB_scaled_err": "random A·B, best scale",
        "leverage_col_err": "k columns by energy (= magnitude)",
        "topk_energy_col_err": "k columns by top-k energy",
        "leverage_score_col_err": "k columns by leverage score",
        "random_colprune_err": "k random columns",
        "leverage_col_proj_err": "projection on k columns by energy",
        "random_colprune_proj_err": "projection on k random columns",
    }
    size = f"{settings.family} {settings.n}×{settings.m}"
    print(f"relative error ‖W − Ŵ‖/‖W‖, {size}, mean ± std of {settings.trials} trials")
    print(f"{'':36}" + "".join(f"{f'k = {rank}':>18}" for rank in settings.ranks))
    for name, text in labels.items():
        cells = zip(summary[f"{name}_mean"], summary[f"{name}_std"])
        print(f"  {text:34}" + "".join(f"{f'{mean:.4f} ± {std:.4f}':>18}" for mean, std in cells))
        if f"{name}_rms_expected" in summary:
            exact = zip(summary[f"{name}_rms"], summary[f"{name}_rms_expected"])
            print(
                f"  {'    root mean square / exact null':34}" + "".join(f"{f'{a:.4f} / {b:.4f}':>18}" for a, b in exact)
            )
    for row in optimal.itertuples():
        saving = "" if row.factors_save else ", as factors no smaller than W"
        print(f"error below {row.target_error:g}: rank {row.rank_median} of {settings.full_rank} "
              f"({row.stored_ratio:.0%} of W's numbers{saving})")  # fmt: skip
