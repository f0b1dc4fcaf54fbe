"""Phase B: do the weights of this model concentrate, which cheap predictor ranks channels best, what rank do they need?

Reads a model's safetensors one matrix at a time (torch and transformers are not needed), takes each spectrum once, and
measures the relative error ‖W − Ŵ‖_F / ‖W‖_F of

  the best rank k (svd_topk_err), k random singular triplets (rand_svd_subspace_err), a random product A·B rescaled to
  the norm of W as published (random_AB_err) or by its best factor (random_AB_scaled_err);
  keeping keep_count(d_in, keep_ratio) columns and zeroing the others, by energy over all singular values
  (leverage_col_err, the published definition: exactly column magnitude, so mag_col_err is the same number), by energy
  or leverage in the top k (topk_energy_col_err, leverage_score_col_err), at random (random_colprune_err);
  keeping as large a share of the rows by magnitude (mag_row_err) or at random (random_rowprune_err).

*_proj_err fits every column by the kept ones instead of zeroing it; *_eqb_err keeps as many columns or rows as the
storage of rank k, k(d_out + d_in) numbers, has room for; *_spectral_err is in the spectral norm. Random baselines are
the mean (and *_std) over 30 seeded draws (3 for the projections); *_rms_expected is the exact root of E err² over all
draws: a little above the mean, as √(mean² + std²) is. The positive control (control_col_err) is the layer with a random
tenth of its columns doubled.
Layers of rank k or less are marked full_rank and left out of every mean, test and figure of all layers. Tensors that
are no matrix (experts in three dimensions, convolutions, norms, biases, empty ones) are listed with the reason in
not_measured.csv; quantised checkpoints are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sparselora.cli import add_run_arguments, output_folder, result_arguments, run_in_folder, source_name
from sparselora.errors import InputError, suggest
from sparselora.inspection.layer import Settings
from sparselora.inspection.model import PARTIAL, InspectRequest, LayerPlan, Results, figure_name, inspect_model
from sparselora.models.model_files import model_facts, model_label
from sparselora.models.weights import (
    MatrixInfo,
    UnmeasuredTensor,
    describe_unmeasured,
    limit,
    list_tensors,
    refuse_damaged,
)
from sparselora.numerics import channels as ch
from sparselora.numerics import spectra
from sparselora.runs.folder import RunFolder
from sparselora.runs.request import RunRequest

# --- arguments ----------------------------------------------------------------------------------------------------


EXAMPLES = """\
  sparselora inspect --model minilm --rank 8
  sparselora inspect --model ./llama --max_layers 0 --plots overview --resume"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("model")
    what.add_argument(
        "--model", default="distilbert-base-uncased", metavar="M",
        help="hub name, folder with safetensors, GGUF file, minilm or smollm2",
    )  # fmt: skip
    what.add_argument("--max_layers", type=int, default=200, help="measure at most this many matrices; 0: all")
    what.add_argument("--max_elems", type=int, default=10_000_000, help="skip matrices with more elements; 0: none")
    how = parser.add_argument_group("measurement")
    how.add_argument("--rank", type=int, default=8, help="k of the rank-k approximations")
    how.add_argument("--keep_ratio", type=float, default=0.3, help="share of columns or rows kept")
    how.add_argument(
        "--target_error", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.3], metavar="E",
        help="errors whose least rank is reported",
    )  # fmt: skip
    how.add_argument(
        "--spectrum", choices=spectra.METHODS, default="gram64",
        help="gram64 is exact for float32 weights and falls back to svd by itself; randomized knows only the top k "
        "and leaves the rest empty",
    )  # fmt: skip
    show = parser.add_argument_group("figures")
    show.add_argument(
        "--plots", choices=("all", "overview", "none"), default="all",
        help="all: overview and one spectrum per layer under plots/",
    )  # fmt: skip
    show.add_argument(
        "--run_experiment", action="store_true", help="also compare all predictors on one layer, in panels"
    )
    show.add_argument("--experiment_param", metavar="NAME", help="that layer")
    add_run_arguments(parser, "predictor_results/<model>")
    parser.add_argument("--resume", action="store_true", help="continue a run that was killed")


def check(args: argparse.Namespace) -> None:
    if args.rank < 1:
        raise InputError(f"--rank must be at least 1, got {args.rank}")
    ch.keep_count(1, args.keep_ratio)
    for target in args.target_error:
        if not 0 < target < 1:
            raise InputError(f"--target_error must be between 0 and 1, got {target}")
    if args.experiment_param and not args.run_experiment:
        raise InputError("--experiment_param names the layer of --run_experiment; add --run_experiment")
    if args.run_experiment and args.spectrum == "randomized":
        raise InputError("--run_experiment needs whole spectra; use --spectrum gram64 or svd")


def choose(args: argparse.Namespace) -> tuple[LayerPlan, list[UnmeasuredTensor]]:
    """Return every matrix of the model with the reason to skip it, and the tensors that are no matrices.

    Raises:
        InputError: whatever is wrong with the model, or with the choice of its layers.
    """
    tensors = list_tensors(args.model)
    plan = limit(tensors.matrices, args.max_elems, args.max_layers)
    taken = [info for info, reason in plan if not reason]
    if not taken:
        raise InputError(f"no matrix of {args.model!r} has at most {args.max_elems} elements; raise --max_elems")
    largest = max(min(info.shape) for info in taken)
    if args.rank > largest:
        raise InputError(f"--rank {args.rank} is above min(n, m) of every layer (at most {largest}); lower it")
    names = [info.name for info in taken]
    if args.experiment_param and args.experiment_param not in names:
        hint = suggest(args.experiment_param, names) or f" (the first: {names[0]})"
        raise InputError(f"--experiment_param {args.experiment_param!r} is not among the {len(names)} layers{hint}")
    if args.run_experiment:
        check_experiment(args, taken)
    return plan, tensors.unmeasured


def check_experiment(args: argparse.Namespace, infos: Sequence[MatrixInfo]) -> None:
    """Raise InputError if --run_experiment has no layer among ``infos``, which are those that have any figures."""
    name = args.experiment_param
    if name and name not in [info.name for info in infos]:
        raise InputError(f"--experiment_param {name!r}: all values are zero; name another layer")
    if not name and all(min(info.shape) <= args.rank for info in infos):
        raise InputError(
            f"--run_experiment needs a layer of rank above --rank {args.rank} that is not zero; "
            "lower --rank or drop --run_experiment"
        )


# --- the run ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    check(args)
    plan, unmeasured = choose(args)

    def body(folder: RunFolder) -> None:
        if args.resume and (folder.folder / PARTIAL).exists() and not folder.can_resume():
            raise InputError(
                f"--resume: {folder.folder} holds an interrupted run with other arguments; repeat its arguments"
            )
        nonzero = [info for info, reason in plan if not reason and refuse_damaged(info)]  # before anything is written
        if args.run_experiment:
            check_experiment(args, nonzero)
        with folder:
            folder.note(**model_facts(args.model))
            results = inspect_model(inspect_request(args), plan, unmeasured, folder)
        report(args, folder.folder, results)

    run_in_folder(_request(args, plan), body, dry_run=args.dry_run)


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    check(args)
    plan, _ = choose(args)
    return _request(args, plan)


def _request(args: argparse.Namespace, plan: LayerPlan) -> RunRequest:
    outputs = ["layer_reconstruction.csv", "not_measured.csv", "summary.csv", "predictor_tests.csv"]
    if args.plots != "none":
        outputs += ["overview.png", "overview.csv"]
    if args.run_experiment:
        outputs += ["experiment.png", "experiment.csv"]
    if args.plots == "all":
        outputs += [figure_name(info.name, end) for info, reason in plan if not reason for end in ("png", "csv")]
    return RunRequest(
        "inspect_svd_predictors",
        output_folder(args, "predictor_results", source_name(args.model)),
        result_arguments(args),
        (*outputs, PARTIAL),
        settings=vars(args),
        inputs=("model",),
        seed=args.seed,
        overwrite=args.overwrite,
    )


def inspect_request(args: argparse.Namespace) -> InspectRequest:
    """Freeze the checked arguments."""
    settings = Settings(args.rank, args.keep_ratio, tuple(args.target_error), args.seed, args.spectrum)
    return InspectRequest(args.model, settings, args.plots, args.resume, args.run_experiment, args.experiment_param)


def report(args: argparse.Namespace, folder: Path, results: Results) -> None:
    """Print what the tables show."""
    table, layers, summary, tests = results.table, results.layers, results.summary, results.tests
    skipped, full = table["skipped"].ne("").sum(), table["full_rank"].eq(True).sum()
    print(
        f"{model_label(args.model)}: {len(layers)} layers compared, {full} of full rank at k = {args.rank} left out, "
        f"{skipped} skipped"
    )
    if layers.empty:
        print(f"  no layer of rank above {args.rank}: summary.csv and predictor_tests.csv have no rows")
    overall = summary[summary["by"] == "all"].set_index("metric")
    for name in ("stable_rank", "effective_rank", "alpha", "mp_spikes", "topk_energy", "topk_energy_over_gaussian"):
        if name in overall.index:
            print(f"  {name:<26} median {overall.loc[name, 'median']:.4g}   mean {overall.loc[name, 'mean']:.4g}")
    for target in args.target_error:
        name = f"rank_at_{target:g}"
        if name in overall.index:
            stored = overall.loc[f"stored_at_{target:g}", "median"]
            print(
                f"  error below {target:<14g} rank {overall.loc[name, 'median']:g} (median), storing {stored:.2f} of W"
            )
    if len(tests):
        print(f"  {'predictor':<28}{'mean error':>11}   {'against':<27}{'difference':>11}  {'p (Holm)':>9}  detectable")
    for test in tests.itertuples():
        print(
            f"  {test.predictor:<28}{overall.loc[test.predictor, 'mean']:>11.4f}   {test.against:<27}"
            f"{test.mean_difference:>+11.4f}  {test.t_p_holm:>9.2g}  {test.smallest_detectable:>10.2g}"
        )
    print(f"written to {folder}: layer_reconstruction.csv, summary.csv, predictor_tests.csv, not_measured.csv")
    if results.skipped:
        print(f"not measured (listed in not_measured.csv): {describe_unmeasured(results.skipped)}")
