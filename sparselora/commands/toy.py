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
import sys
from dataclasses import asdict

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from sparselora.cli import add_run_arguments, output_folder, result_arguments, run_in_folder
from sparselora.errors import InputError, shown
from sparselora.numerics import channels as ch
from sparselora.numerics import reconstruction as rec
from sparselora.numerics.matrices import FAMILIES, family_parameters
from sparselora.numerics.spectra import blas_threads
from sparselora.numerics.stats import compare_paired, holm, mean_interval, smallest_detectable_difference
from sparselora.runs.folder import RunFolder, write_csv
from sparselora.runs.request import RunRequest

Array = NDArray[np.floating]

PUBLISHED = (
    "seed", "trial", "n", "m", "rank_requested", "rank_used", "k_ratio",
    "svd_topk_err", "random_AB_err", "rand_svd_subspace_err", "leverage_col_err", "random_colprune_err",
    "params_svd_topk", "params_random_AB", "nnz_svd_col", "topk_energy",
)  # fmt: skip
"""The columns that `toy_results_per_trial.csv` starts with."""

SCORES = ("leverage_col", "topk_energy_col", "leverage_score_col", "random_colprune")
"""How columns are chosen; the last is the control."""

CONTROL = ("control_col_err", "control_random_err")
"""The positive control: what is compared, and with what."""

STREAMS = ("matrix", "random_AB", "rand_svd_subspace", "random_colprune", "control")
"""Sources of randomness. Each has its own child stream, and each rank one below it: adding a rank, a trial or a
baseline changes no other draw."""

OUTPUTS = (
    "run.json", "toy_results_per_trial.csv", "toy_results_agg.csv", "toy_results_stats.csv", "toy_optimal_rank.csv",
    "rank_k_comparison.png", "column_prune_comparison.png", "rank_error_curves.png", "rank_error_curves.csv",
)  # fmt: skip

MOST_TRIALS = 1_000_000  # of which every figure is kept

_CHUNK_NUMBERS = 1 << 20  # of a stack of matrices decomposed at once: 8 MB


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


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the family's parameters filled in; raises InputError before anything is written."""
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
    names = ("true_rank", "noise", "decay", "planted_columns", "planted_rank", "strength")
    parameters = family_parameters(args.matrix, args.n, args.m, {name: getattr(args, name) for name in names})
    resolved = {**vars(args), **dict.fromkeys(names), **parameters, "parameters": parameters}
    resolved["ranks"] = sorted(args.ranks)
    return argparse.Namespace(**resolved)


# --- measurement --------------------------------------------------------------------------------------------------


def stream(seed: int, name: str, rank: int = 0) -> np.random.Generator:
    """The generator of one source of randomness at one rank."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS.index(name), rank)))


def decompose(W: Array) -> tuple[Array, Array, Array]:
    """One decomposition of each matrix in ``W (t, n, m)``.

    Returns:
        G ``(t, m, m)`` = WᵀW, singular values ``(t, r)`` descending, right vectors ``(t, r, m)``. By eigenvectors of
        the Gram matrix on the small side; matrices whose small values that would blur go through an SVD instead.
    """
    Wt = W.transpose(0, 2, 1)
    G = Wt @ W
    wide = W.shape[1] < W.shape[2]
    energy, vectors = np.linalg.eigh(W @ Wt if wide else G)
    s = np.sqrt(np.maximum(energy[:, ::-1], 0.0))
    Vt = vectors[:, :, ::-1].transpose(0, 2, 1)
    blurred = energy[:, 0] < 1e-9 * energy[:, -1]
    if wide:
        Vt = np.divide(Vt @ W, s[:, :, None], out=np.zeros((len(W), s.shape[1], W.shape[2])), where=s[:, :, None] > 0)
    if blurred.any():
        _, s[blurred], Vt[blurred] = np.linalg.svd(W[blurred], full_matrices=False)
    return G, s, Vt


def measure(args: argparse.Namespace) -> tuple[pd.DataFrame, Array]:
    """Every trial at every rank: the per-trial table, and best rank-k errors for every k ``(trials, r + 1)``."""
    streams = {rank: {name: stream(args.seed, name, rank) for name in STREAMS[1:]} for rank in args.ranks}
    draw = stream(args.seed, "matrix")
    chunk = max(1, _CHUNK_NUMBERS // (args.n * args.m))
    tables, tails = [], []
    progress = tqdm(total=args.trials, desc="trials", delay=2, file=sys.stderr)
    with progress, blas_threads(max(args.n, args.m)):
        for first in range(0, args.trials, chunk):
            count = min(chunk, args.trials - first)
            W = np.stack([FAMILIES[args.matrix](draw, args.n, args.m, **args.parameters) for _ in range(count)])
            G, s, Vt = decompose(W)
            tails.append(rec.relative_tail(s))
            for rank, rngs in streams.items():
                errors = {**low_rank_errors(W, s, rank, rngs), **column_errors(G, s, Vt, args.n, rank, rngs)}
                tables.append(label(args, rank, first, errors))
            progress.update(count)
    table = pd.concat(tables, ignore_index=True).sort_values("trial", kind="stable", ignore_index=True)
    return table, np.concatenate(tails)


def low_rank_errors(W: Array, s: Array, k: int, rngs: dict[str, np.random.Generator]) -> dict[str, Array]:
    """Errors ``(t,)`` of the rank-k approximations of ``W (t, n, m)``."""
    count, n, m = W.shape
    tail = rec.relative_tail(s)[:, k]
    triplets = random_subsets(rngs["rand_svd_subspace"], count, s.shape[1], k)
    factors = rngs["random_AB"].standard_normal((count, k, n + m))
    A, B = factors[:, :, :n].transpose(0, 2, 1), factors[:, :, n:]
    cosine = rec.factor_cosine(W, A, B)
    missing = s.copy()
    np.put_along_axis(missing, triplets, 0.0, axis=1)
    return {
        "svd_topk_err": tail,
        "random_AB_err": rec.rescaled_error(cosine),
        "rand_svd_subspace_err": rec.subset_error(s**2, triplets),
        "topk_energy": 1 - tail**2,
        "random_AB_scaled_err": rec.optimally_scaled_error(cosine),
        "svd_topk_spectral_err": rec.spectral_tail(s)[:, k],
        "rand_svd_subspace_spectral_err": missing.max(axis=1) / s[:, 0],
    }


def column_errors(
    G: Array, s: Array, Vt: Array, n: int, k: int, rngs: dict[str, np.random.Generator]
) -> dict[str, Array]:
    """Errors ``(t,)`` of keeping k columns, or as many as fit in the storage of rank k, by each score."""
    count, m = G.shape[:2]
    energy = np.diagonal(G, axis1=1, axis2=2)
    scores = {
        "leverage_col": energy,
        "topk_energy_col": ch.topk_column_energy(s, Vt, k),
        "leverage_score_col": ch.leverage_scores(Vt, k),
        "random_colprune": rngs["random_colprune"].random((count, m)),
    }
    room = rec.equal_storage_columns(n, m, k)
    errors: dict[str, Array] = {}
    for name in SCORES:
        columns = ch.top_channels(scores[name], k)
        errors[f"{name}_err"] = rec.subset_error(energy, columns)
        errors[f"{name}_proj_err"] = rec.projection_error(G, columns)
        if f"{name}_err" in PUBLISHED:
            errors[f"{name}_spectral_err"] = rec.pruned_spectral_error(G, columns, s[:, 0])
        errors[f"{name}_eqb_err"] = rec.subset_error(energy, ch.top_channels(scores[name], room))
    return errors | control_errors(energy, k, rngs["control"])


def control_errors(energy: Array, k: int, rng: np.random.Generator) -> dict[str, Array]:
    """Positive control: the same matrices with a random tenth of their columns doubled, k columns kept.

    A study that can see an effect tells columns chosen by energy from random ones here.
    """
    count, m = energy.shape
    uniform = rng.random((count, 2, m))  # drawn trial by trial, so that more trials change none of them
    doubled = ch.top_channels(uniform[:, 0], max(1, m // 10))
    raised = energy.copy()
    np.put_along_axis(raised, doubled, 4 * np.take_along_axis(energy, doubled, axis=1), axis=1)
    return {
        "control_col_err": rec.subset_error(raised, ch.top_channels(raised, k)),
        "control_random_err": rec.subset_error(raised, ch.top_channels(uniform[:, 1], k)),
    }


def random_subsets(rng: np.random.Generator, count: int, n: int, k: int) -> NDArray[np.intp]:
    """``count`` uniform k-subsets of range(n), ``(count, k)``."""
    return ch.top_channels(rng.random((count, n)), k)


def expectations(args: argparse.Namespace, k: int) -> dict[str, float]:
    """Exact √(E err²) over the random choices, for any matrix of the family: no draw goes into them."""
    n, m = args.n, args.m
    room = rec.equal_storage_columns(n, m, k)
    expected_errors = {
        "random_AB_err": np.sqrt(2),  # E⟨W, AB⟩ = 0: its sign is a coin's
        "rand_svd_subspace_err": np.sqrt(1 - k / min(n, m)),
        "random_colprune_err": np.sqrt(1 - k / m),
        "random_AB_scaled_err": np.sqrt(1 - 1 / (n * m)),  # AB points in every direction alike, whatever k
        "random_colprune_eqb_err": np.sqrt(1 - room / m),
    }
    if args.matrix == "gaussian":
        # k independent columns span a uniform subspace, which leaves (n − k)/n of every other column.
        expected_errors["random_colprune_proj_err"] = np.sqrt((1 - k / m) * (1 - k / n))
    return expected_errors


def label(args: argparse.Namespace, k: int, first: int, errors: dict[str, Array]) -> pd.DataFrame:
    """The rows of one rank and chunk: the published columns in their order, then ours."""
    n, m = args.n, args.m
    room = rec.equal_storage_columns(n, m, k)
    count = len(errors["svd_topk_err"])
    frame = pd.DataFrame({
        "seed": args.seed, "trial": np.arange(first, first + count), "n": n, "m": m,
        "rank_requested": k, "rank_used": k, "k_ratio": k / min(n, m), **errors,
        "params_svd_topk": rec.factor_params(n, m, k), "params_random_AB": rec.factor_params(n, m, k),
        "nnz_svd_col": k * n, "cols_equal_budget": room, "nnz_equal_budget": room * n, "full_rank": k == min(n, m),
    })  # fmt: skip
    return frame[[*PUBLISHED, *(name for name in frame.columns if name not in PUBLISHED)]]


# --- tables -------------------------------------------------------------------------------------------------------


def metrics(table: pd.DataFrame) -> list[str]:
    return [name for name in table.columns if name.endswith("_err") or name == "topk_energy"]


def aggregate(args: argparse.Namespace, table: pd.DataFrame) -> pd.DataFrame:
    """One row a rank: mean and std of each metric, then n, 95 % intervals, nulls and budgets.

    Where E err² is known exactly, ``_rms_expected`` is its root and ``_rms`` what was measured.
    """
    limit = rec.gaussian_tail(args.n, args.m)
    rows = []
    for rank in args.ranks:
        part = table[table["rank_used"] == rank]
        intervals = {name: mean_interval(part[name]) for name in metrics(table)}
        row: dict[str, object] = {"rank_used": rank}
        for name, value in intervals.items():
            row |= {f"{name}_mean": value.mean, f"{name}_std": value.std}
        row["n"] = len(part)
        for name, value in intervals.items():
            row |= {f"{name}_ci_low": value.low, f"{name}_ci_high": value.high}
        for name, expected in expectations(args, rank).items():
            row |= {f"{name}_rms": np.sqrt((part[name] ** 2).mean()), f"{name}_rms_expected": expected}
        row["svd_topk_err_gaussian_limit"] = limit[rank]
        budget = ("params_svd_topk", "params_random_AB", "nnz_svd_col", "cols_equal_budget", "nnz_equal_budget")
        row |= {name: part[name].iloc[0] for name in (*budget, "full_rank")}
        rows.append(row)
    return pd.DataFrame(rows)


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """Paired tests on the same trials: SVD against each baseline, each column score against random columns.

    The last pair is the positive control. Holm's correction runs over all tests of the table. Full-rank rows have
    error 0 and nothing to test.
    """
    baselines = [name for name in metrics(table) if name not in ("svd_topk_err", "topk_energy")]
    baselines = [name for name in baselines if not name.endswith("_spectral_err") and not name.startswith("control")]
    pairs = [("svd_topk_err", name) for name in baselines]
    pairs += [
        (f"{score}{kind}", f"random_colprune{kind}")
        for kind in ("_err", "_proj_err", "_eqb_err")
        for score in SCORES[:-1]
    ]
    pairs.append(CONTROL)
    rows = []
    for rank, part in table[~table["full_rank"]].groupby("rank_used", sort=False):
        for metric, baseline in pairs:
            result = compare_paired(part[metric], part[baseline])
            rows.append({"rank_used": rank, "metric": metric, "baseline": baseline, **asdict(result)})
    if not rows:
        return pd.DataFrame(columns=["rank_used", "metric", "baseline"])
    frame = pd.DataFrame(rows)
    for test in ("t_p", "wilcoxon_p"):
        frame.insert(frame.columns.get_loc(test) + 1, f"{test}_holm", holm(frame[test].tolist()))
    return frame


def error_curve(args: argparse.Namespace, tails: Array) -> pd.DataFrame:
    """Mean best error of every rank 0..r over the trials, with the Gaussian limit of the same shape."""
    spread = tails.std(axis=0, ddof=1) if len(tails) > 1 else np.full(tails.shape[1], np.nan)
    limit = rec.gaussian_tail(args.n, args.m)
    return pd.DataFrame({
        "rank": np.arange(tails.shape[1]), "n": len(tails), "svd_topk_err_mean": tails.mean(axis=0),
        "svd_topk_err_std": spread, "gaussian_limit": limit,
    })  # fmt: skip


def optimal_ranks(args: argparse.Namespace, tails: Array) -> pd.DataFrame:
    """The least rank below each target error, over the trials, and what its factors store against W."""
    rows = []
    for target in args.target_error:
        ranks = np.argmax(tails < target, axis=1)
        median = int(np.median(ranks))
        params = rec.factor_params(args.n, args.m, median)
        rows.append({
            "target_error": target, "n": len(ranks), "rank_min": ranks.min(), "rank_median": median,
            "rank_max": ranks.max(), "params_factors": params, "params_full": args.n * args.m,
            "stored_ratio": params / (args.n * args.m), "factors_save": params < args.n * args.m,
        })  # fmt: skip
    return pd.DataFrame(rows)


# --- main ---------------------------------------------------------------------------------------------------------


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    return _request(resolve(args))


def _request(args: argparse.Namespace) -> RunRequest:
    return RunRequest(
        "toy_experiment",
        output_folder(args, "toy_results", args.matrix),
        result_arguments(args),
        OUTPUTS,
        settings=vars(args),
        seed=args.seed,
        overwrite=args.overwrite,
    )


def run(args: argparse.Namespace) -> None:
    args = resolve(args)
    run_in_folder(_request(args), lambda folder: write_results(args, folder), dry_run=args.dry_run)


def write_results(args: argparse.Namespace, folder: RunFolder) -> None:
    with folder:
        table, tails = measure(args)
        summary = aggregate(args, table)
        curve, optimal = error_curve(args, tails), optimal_ranks(args, tails)

        write_csv(folder.path("toy_results_per_trial.csv"), table)
        write_csv(folder.path("toy_results_agg.csv"), summary)
        tests = compare(table)
        write_csv(folder.path("toy_results_stats.csv"), tests)
        write_csv(folder.path("toy_optimal_rank.csv"), optimal)

        from sparselora.report import toy as figures

        figures.rank_k_comparison(folder.path("rank_k_comparison.png"), args, summary)
        figures.column_prune_comparison(folder.path("column_prune_comparison.png"), args, summary)
        folder.path("rank_error_curves.csv")
        figures.rank_error_curves(folder.path("rank_error_curves.png"), args, curve, optimal)
    report(args, summary, optimal)
    report_control(tests)
    print("SVD is below every baseline by construction: read each against its expectation, and the column scores")
    print(f"against random columns. Tables and figures: {folder.folder.as_posix()}")


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


def report(args: argparse.Namespace, summary: pd.DataFrame, optimal: pd.DataFrame) -> None:
    shown = {
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
    print(f"relative error ‖W − Ŵ‖/‖W‖, {args.matrix} {args.n}×{args.m}, mean ± std of {args.trials} trials")
    print(f"{'':36}" + "".join(f"{f'k = {rank}':>18}" for rank in args.ranks))
    for name, text in shown.items():
        cells = zip(summary[f"{name}_mean"], summary[f"{name}_std"])
        print(f"  {text:34}" + "".join(f"{f'{mean:.4f} ± {std:.4f}':>18}" for mean, std in cells))
        if f"{name}_rms_expected" in summary:
            exact = zip(summary[f"{name}_rms"], summary[f"{name}_rms_expected"])
            print(
                f"  {'    root mean square / exact null':34}" + "".join(f"{f'{a:.4f} / {b:.4f}':>18}" for a, b in exact)
            )
    for row in optimal.itertuples():
        saving = "" if row.factors_save else ", as factors no smaller than W"
        print(f"error below {row.target_error:g}: rank {row.rank_median} of {min(args.n, args.m)} "
              f"({row.stored_ratio:.0%} of W's numbers{saving})")  # fmt: skip
