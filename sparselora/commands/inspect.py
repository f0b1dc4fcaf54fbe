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
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sparselora.cli import add_run_arguments, result_arguments, run_in_folder
from sparselora.errors import InputError, suggest
from sparselora.inspection import layer as predictors
from sparselora.models.weights import (
    MatrixInfo,
    UnmeasuredTensor,
    describe_unmeasured,
    limit,
    list_tensors,
    load_matrix,
    refuse_damaged,
)
from sparselora.numerics import channels as ch
from sparselora.numerics import reconstruction as rec
from sparselora.numerics import spectra
from sparselora.runs.folder import RunFolder, write_csv, write_text
from sparselora.runs.request import RunRequest
from sparselora.runs.user_files import parse_json
from sparselora.runs.workers import ordered_map, worker_count

if TYPE_CHECKING:
    import pandas as pd  # see import_for_tables

PARTIAL = "layer_reconstruction.partial"
TOP_VALUES = 10
CURVE_POINTS = 64


# --- arguments ----------------------------------------------------------------------------------------------------


EXAMPLES = """\
  sparselora inspect --model minilm --rank 8
  sparselora inspect --model ./llama --max_layers 0 --plots overview --resume"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("model")
    what.add_argument(
        "--model", default="distilbert-base-uncased", metavar="M",
        help="hub name, folder with safetensors, or minilm",
    )  # fmt: skip
    what.add_argument("--max_layers", type=int, default=200, help="most matrices, 0 for all")
    what.add_argument("--max_elems", type=int, default=10_000_000, help="most elements of a matrix, 0 for any")
    how = parser.add_argument_group("measurement")
    how.add_argument("--rank", type=int, default=8, help="k of the rank-k approximations")
    how.add_argument("--keep_ratio", type=float, default=0.3, help="share of columns or rows kept")
    how.add_argument(
        "--target_error", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.3], metavar="E",
        help="errors whose least rank is wanted",
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
    add_run_arguments(parser, "predictor_results")
    parser.add_argument("--resume", action="store_true", help="go on after a run that was killed")


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


Plan = Sequence[tuple[MatrixInfo, str]]
"""Matrices with the reason to skip them, ``""`` for none."""


def choose(args: argparse.Namespace) -> tuple[Plan, list[UnmeasuredTensor]]:
    """Every matrix of the model with the reason to skip it, and what is no matrix.

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


# --- measurement --------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, plan: Plan, run: RunFolder) -> list[dict[str, Any]]:
    """One record a matrix: its ``row`` of the table and its ``curve``; those of a killed run are taken over."""
    partial = run.folder / PARTIAL
    done = read_partial(partial) if args.resume else {}
    lines = [json.dumps(record) + "\n" for record in done.values()]
    write_text(partial, "".join(lines))
    todo = [(info, reason) for info, reason in plan if info.name not in done]
    with layer_figures(args, run) as draw, partial.open("a", encoding="utf-8", newline="\n") as log:
        progress = tqdm(total=sum(not reason for _, reason in todo), desc="layers", delay=2, file=sys.stderr)
        found = ordered_map(
            lambda layer: measure_one(args, *layer, draw), todo, costs(todo), processes(todo), import_for_tables
        )
        for (info, reason), record in zip(todo, found):
            # The line comes after the figure: what is in the file needs no more work.
            log.write(json.dumps(record) + "\n")
            log.flush()
            done[info.name] = record
            progress.update(not reason)
        progress.close()
    records = [done[info.name] for info, _ in plan]
    if args.plots == "all":
        for record in records:
            if record["row"].get("k_used"):
                for suffix in ("png", "csv"):
                    run.path(figure_name(record["row"]["param"], suffix))
    return records


def import_for_tables() -> None:
    """What only the tables need, a good part of a small model's whole time: imported while the workers compute."""
    import sparselora.inspection.tables  # noqa: F401


def costs(layers: Plan) -> list[float]:
    """Roughly the multiplications each layer asks for: its Gram matrix, and what is done with that."""
    return [0.0 if reason else info.elements * min(info.shape) + 8 * min(info.shape) ** 3 for info, reason in layers]


def processes(layers: Plan) -> int:
    """One a core where a layer uses one core; this one alone where BLAS uses all, or starting more would not pay."""
    small = all(reason or spectra.single_threaded(min(info.shape)) for info, reason in layers)
    return worker_count() if small and sum(costs(layers)) > 2e9 else 1


Draw = Callable[[dict[str, Any], np.ndarray], None]


def measure_one(args: argparse.Namespace, info: MatrixInfo, reason: str, draw: Draw) -> dict[str, Any]:
    n, m = info.shape
    row: dict[str, Any] = {
        "param": info.name,
        "shape": f"{n}x{m}",
        "skipped": reason,
        "seed": args.seed,
        "n": n,
        "m": m,
    }
    row |= {"dtype": info.dtype, "layer_type": layer_type(info.name), "family": family(info.name)}
    row["depth"] = depth(info.name)
    if reason:
        return {"row": row, "curve": None}
    W = load_matrix(info)
    if not W.any():
        return {"row": row | {"skipped": "all values are zero"}, "curve": None}
    figures, s = predictors.measure_layer(
        W, info.name, args.rank, args.keep_ratio, args.target_error, args.seed, args.spectrum
    )
    row |= {name: round(plain(value), 3) if name.endswith("_ms") else plain(value) for name, value in figures.items()}
    row["top_singular_values"] = json.dumps([float(value) for value in s[:TOP_VALUES]])
    draw(row, s)
    return {"row": row, "curve": curve(s, n, m, args) if args.spectrum != "randomized" else None}


def plain(value: Any) -> Any:
    """A Python value that JSON and CSV write the same way; what is not a finite number is empty."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def curve(s: np.ndarray, n: int, m: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """A layer's spectrum, energy and null at a fixed number of places, so that no more is kept for the overview."""
    r = len(s)
    at = np.unique(np.linspace(0, r - 1, CURVE_POINTS).round().astype(int))
    energy = np.cumsum(s**2) / np.sum(s**2)
    null = spectra.gaussian_energy(n, m, args.seed)[1:]
    places = {"fraction": (at + 1) / r, "s_over_s1": s[at] / s[0], "energy": energy[at], "energy_gaussian": null[at]}
    return {name: [float(value) for value in values] for name, values in places.items()}


def read_partial(path: Path) -> dict[str, dict[str, Any]]:
    """The whole lines of an interrupted run's log, by parameter; a torn or damaged line is a layer to measure again."""
    done = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if line.endswith("\n"):
                with suppress(InputError, KeyError, TypeError):
                    record = parse_json(line, allow_nan=True)
                    done[str(record["row"]["param"])] = {"row": record["row"], "curve": record["curve"]}
    return done


@contextmanager
def layer_figures(args: argparse.Namespace, run: RunFolder) -> Iterator[Draw]:
    """A function that writes a layer's svd_<param>.png and its data; it does nothing unless figures are wanted."""
    if args.plots != "all":
        yield lambda row, s: None
        return
    from sparselora.report.inspection import SpectrumFigure

    with SpectrumFigure() as figure:

        def draw(row: dict[str, Any], s: np.ndarray) -> None:
            null = null_spectrum(row, args.seed)
            edge = math.sqrt(row["mp_edge"]) if row.get("mp_edge") else None
            facts = f"{row['shape']}, stable rank {row['stable_rank']:.1f}, energy in top {row['k_used']}: " + (
                f"{row['topk_energy']:.1%} ({row['topk_energy_over_gaussian']:.1f}× Gaussian)"
            )
            figure.draw(run.path(figure_name(row["param"])), row["param"], s, null, row["k_used"], edge, facts)
            lines = [f"{i + 1},{value!r},{other!r}" for i, (value, other) in enumerate(zip(s.tolist(), null.tolist()))]
            write_text(run.path(figure_name(row["param"], "csv")), "\n".join(["i,s,s_gaussian", *lines, ""]))

        yield draw


def null_spectrum(row: dict[str, Any], seed: int) -> np.ndarray:
    """Singular values of a Gaussian matrix of the layer's shape and Frobenius norm (root mean square over draws)."""
    return np.asarray(np.sqrt(np.diff(spectra.gaussian_energy(row["n"], row["m"], seed))) * row["fro_norm"])


def figure_name(param: str, suffix: str = "png") -> str:
    """The file of a layer's spectrum; where its name had to be changed for that, a checksum keeps it its own."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", param)[:120]
    if name != param:
        name += f"-{zlib.crc32(param.encode('utf-8', 'surrogatepass')):08x}"
    return f"plots/svd_{name}.{suffix}"


# --- what a name says about a layer -------------------------------------------------------------------------------


def layer_type(name: str) -> str:
    """The name without its place in the stack: ``encoder.layer.3.output.dense.weight`` → ``output.dense``."""
    short = re.sub(r"\.weight$", "", name)
    short = re.sub(r"^.*?\.\d+\.", "", short)
    return re.sub(r"\d+", "*", short)


def depth(name: str) -> int | None:
    found = re.search(r"\.([0-9]{1,9})\.", name)
    return int(found.group(1)) if found else None


def family(name: str) -> str:
    """attention, feed-forward, embedding or other, for the colours of the overview."""
    if re.search(r"embed|\bwte\b|\bwpe\b|lm_head", name):
        return "embedding"
    if re.search(r"attn|attention", name):
        return "attention"
    if re.search(r"mlp|ffn|intermediate|output\.dense|fc\d?|experts", name):
        return "feed-forward"
    return "other"


# --- one layer ----------------------------------------------------------------------------------------------------


def experiment_table(args: argparse.Namespace, info: MatrixInfo, row: dict[str, Any]) -> pd.DataFrame:
    """Curves and bars of one layer: panel, series, x, mean, std over draws, n draws (1: nothing random)."""
    import pandas as pd

    from sparselora.report.inspection import PREDICTOR_LABELS

    W, m, k = load_matrix(info), info.shape[1], row["k_used"]
    with spectra.blas_threads(min(info.shape)):
        gram = spectra.gram(W)
        values, vectors = spectra.eigen(gram.G, k)
        s = spectra.from_gram(W, gram, values, args.spectrum).s
        Vt = predictors.right_vectors(W, gram, values, vectors)
    points: list[tuple[str, str, float, float, float | None, int]] = []
    null = null_spectrum(row, args.seed)
    for series, spectrum in (("this layer", s), ("Gaussian, same norm", null)):
        points += [("spectrum", series, i + 1, float(value), None, 1) for i, value in enumerate(spectrum)]
    tails = {"SVD": rec.relative_tail(s), "Gaussian, SVD": rec.relative_tail(null)}
    rngs = predictors.layer_streams(args.seed, info.name)
    mean, std = predictors.random_subset_curve(s**2, rngs["rand_svd_subspace"])
    for rank in np.unique(np.linspace(0, len(s), CURVE_POINTS + 1).round().astype(int)).tolist():
        points += [("rank", series, rank, float(tail[rank]), None, 1) for series, tail in tails.items()]
        points.append(("rank", "random triplets", rank, float(mean[rank]), float(std[rank]), predictors.DRAWS))
    scores = predictors.column_scores(gram, s, Vt, k)
    mean, std = predictors.random_subset_curve(gram.column_energy, rngs["random_colprune"])
    for share in np.linspace(0.05, 1, 20).round(2).tolist():
        count = ch.keep_count(m, share)
        for label, score in zip(("magnitude", "top-k energy", "leverage score"), scores.values()):
            error = float(rec.subset_error(gram.column_energy, ch.top_channels(score, count)))
            points.append(("columns", label, share, error, None, 1))
        points.append(("columns", "random", share, float(mean[count]), float(std[count]), predictors.DRAWS))
    for name in PREDICTOR_LABELS:
        spread = row.get(f"{name}_std")
        points.append(("predictors", name, k, row[name], spread, 1 if spread is None else predictors.DRAWS))
    return pd.DataFrame(points, columns=["panel", "series", "x", "mean", "std", "n"])


# --- the run ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    check(args)
    plan, unmeasured = choose(args)

    def body(folder: RunFolder) -> None:
        if args.resume and (folder.folder / PARTIAL).exists() and not folder.can_resume():
            raise InputError(
                f"--resume: {args.out_dir} holds an interrupted run with other arguments; repeat its arguments"
            )
        nonzero = [info for info, reason in plan if not reason and refuse_damaged(info)]  # before anything is written
        if args.run_experiment:
            check_experiment(args, nonzero)
        write_and_report(args, plan, unmeasured, folder)

    run_in_folder(_request(args, plan), body, dry_run=args.dry_run)


def request(args: argparse.Namespace) -> RunRequest:
    """Return the checked request of a run."""
    check(args)
    plan, _ = choose(args)
    return _request(args, plan)


def _request(args: argparse.Namespace, plan: Plan) -> RunRequest:
    outputs = ["layer_reconstruction.csv", "not_measured.csv", "summary.csv", "predictor_tests.csv"]
    if args.plots != "none":
        outputs += ["overview.png", "overview.csv"]
    if args.run_experiment:
        outputs += ["experiment.png", "experiment.csv"]
    if args.plots == "all":
        outputs += [figure_name(info.name, end) for info, reason in plan if not reason for end in ("png", "csv")]
    return RunRequest(
        "inspect_svd_predictors",
        Path(args.out_dir),
        result_arguments(args),
        (*outputs, PARTIAL),
        settings=vars(args),
        inputs=("model",),
        seed=args.seed,
        overwrite=args.overwrite,
    )


def write_and_report(args: argparse.Namespace, plan: Plan, unmeasured: list[UnmeasuredTensor], run: RunFolder) -> None:
    """Measure, write everything, and print what it shows."""
    with run:
        records = measure(args, plan, run)
        from sparselora.inspection import tables

        records += [{"row": unmeasured_row(args, tensor)} for tensor in unmeasured if not tensor.is_vector]
        table = tables.layer_table(records)
        layers = tables.compared_layers(table)
        summary, tests = tables.summarise(layers), tables.compare(layers)
        if args.plots != "none" and args.spectrum != "randomized" and len(layers):
            write_overview(args, run, records, layers, summary)
        if args.run_experiment:
            write_experiment(args, run, plan, table)
        skipped = skipped_matrices(plan, records) + unmeasured
        write_csv(run.path("not_measured.csv"), tables.unmeasured_table(skipped))
        write_csv(run.path("summary.csv"), summary)
        write_csv(run.path("predictor_tests.csv"), tests)
        write_csv(run.path("layer_reconstruction.csv"), table)
        (run.folder / PARTIAL).unlink()
    report(args, table, layers, summary, tests)
    if skipped:
        print(f"not measured (listed in not_measured.csv): {describe_unmeasured(skipped)}")


def unmeasured_row(args: argparse.Namespace, tensor: UnmeasuredTensor) -> dict[str, Any]:
    """The row in the table of layers of a tensor that is no matrix."""
    shape = "x".join(map(str, tensor.shape))
    row = {"param": tensor.name, "shape": shape, "skipped": tensor.reason, "seed": args.seed, "dtype": tensor.dtype}
    return row | {"layer_type": layer_type(tensor.name), "family": family(tensor.name), "depth": depth(tensor.name)}


def skipped_matrices(plan: Plan, records: Sequence[dict[str, Any]]) -> list[UnmeasuredTensor]:
    """The matrices that were left out: for a limit, or because they turned out to be zero."""
    reasons = {record["row"]["param"]: record["row"]["skipped"] for record in records}
    infos = [info for info, _ in plan if reasons[info.name]]
    return [UnmeasuredTensor(info.name, info.shape, info.dtype, reasons[info.name]) for info in infos]


def write_overview(
    args: argparse.Namespace,
    run: RunFolder,
    records: Sequence[dict[str, Any]],
    layers: pd.DataFrame,
    summary: pd.DataFrame,
) -> None:
    import pandas as pd

    from sparselora.report import inspection

    shown = set(layers["param"])
    curves = pd.concat(
        [
            pd.DataFrame({"param": record["row"]["param"], "family": record["row"]["family"], **record["curve"]})
            for record in records
            if record["row"]["param"] in shown
        ],
        ignore_index=True,
    )
    overall = summary[summary["by"] == "all"].set_index("metric")
    intervals = {
        name: (float(overall.loc[name, "mean"]), float(overall.loc[name, "ci_high"] - overall.loc[name, "mean"]))
        for name in inspection.PREDICTOR_LABELS
    }
    title = (
        f"{Path(args.model).name}: {len(layers)} layers, rank k = {args.rank}, "
        f"{args.keep_ratio:.0%} of columns or rows kept"
    )
    run.path("overview.csv")
    inspection.overview(run.path("overview.png"), layers, curves, intervals, title)


def write_experiment(args: argparse.Namespace, run: RunFolder, plan: Plan, table: pd.DataFrame) -> None:
    from sparselora.report import inspection

    usable = table[table["full_rank"].eq(False)]
    # Without a name the first layer of the stack, not the embedding before it.
    ranked = usable.sort_values("family", key=lambda kind: kind.isin(("embedding", "other")), kind="stable")
    name = args.experiment_param or ranked["param"].iloc[0]
    row = table[table["param"] == name].iloc[0].to_dict()
    info = next(info for info, _ in plan if info.name == name)
    facts = [f"{row['shape']}, rank k = {row['k_used']}, {row['cols_kept']} columns and {row['rows_kept']} rows kept"]
    run.path("experiment.csv")
    inspection.experiment(run.path("experiment.png"), experiment_table(args, info, row), name, facts)


def report(
    args: argparse.Namespace, table: pd.DataFrame, layers: pd.DataFrame, summary: pd.DataFrame, tests: pd.DataFrame
) -> None:
    skipped, full = table["skipped"].ne("").sum(), table["full_rank"].eq(True).sum()
    print(
        f"{Path(args.model).name}: {len(layers)} layers compared, {full} of full rank at k = {args.rank} left out, "
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
    print(f"written to {args.out_dir}: layer_reconstruction.csv, summary.csv, predictor_tests.csv, not_measured.csv")
