from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sparselora.cli import command_parser
from sparselora.commands import toy
from sparselora.errors import InputError
from sparselora.inspection import matrix_errors
from sparselora.inspection import trial_tables as tables
from sparselora.inspection.matrix_errors import TrialSettings, measure_trials, random_subsets, stream
from sparselora.inspection.trials import OUTPUTS
from sparselora.numerics import channels as ch
from sparselora.numerics import reconstruction as rec
from sparselora.numerics.matrices import FAMILIES, family_parameters, lowrank, planted, powerlaw
from toy_experiment import main

ROOT = Path(__file__).resolve().parents[2]
CSVS = [name for name in OUTPUTS if name.endswith(".csv")]


def settings(*flags: str) -> TrialSettings:
    return toy.trial_settings(command_parser(toy, "toy").parse_args(list(flags)))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The run of the README, whole."""
    folder = tmp_path_factory.mktemp("toy") / "out"
    assert (
        main(["--n", "128", "--m", "64", "--ranks", "8", "16", "32", "--trials", "200", "--outdir", str(folder)]) == 0
    )
    return folder


# --- the numbers --------------------------------------------------------------------------------------------------


def explicit(
    W: np.ndarray, k: int, factors: np.ndarray, triplets: np.ndarray, uniform: np.ndarray, control
) -> dict[str, float]:
    """Every metric of one trial by forming the approximation and subtracting it."""
    n, m = W.shape
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    R = factors[:, :n].T @ factors[:, n:]
    top = s[0]
    approximations = {
        "svd_topk": (U[:, :k] * s[:k]) @ Vt[:k],
        "random_AB": R * np.linalg.norm(W) / np.linalg.norm(R),
        "random_AB_scaled": R * (W * R).sum() / (R * R).sum(),
        "rand_svd_subspace": (U[:, triplets] * s[triplets]) @ Vt[triplets],
    }
    found = {f"{name}_err": rec.relative_error(W, W_hat) for name, W_hat in approximations.items()}
    for name in ("svd_topk", "rand_svd_subspace"):
        found[f"{name}_spectral_err"] = np.linalg.norm(W - approximations[name], 2) / top
    scores = {
        "leverage_col": ((s[:, None] * Vt) ** 2).sum(0),
        "topk_energy_col": ((s[:k, None] * Vt[:k]) ** 2).sum(0),
        "leverage_score_col": (Vt[:k] ** 2).sum(0),
        "random_colprune": uniform,
    }
    room = min(m, k * (n + m) // n)
    for name, score in scores.items():
        for suffix, count in (("_err", k), ("_eqb_err", room)):
            kept = np.argsort(-score, kind="stable")[:count]
            pruned = np.zeros_like(W)
            pruned[:, kept] = W[:, kept]
            found[name + suffix] = rec.relative_error(W, pruned)
            if suffix == "_err":
                C = W[:, kept]
                found[f"{name}_proj_err"] = rec.relative_error(W, C @ np.linalg.pinv(C) @ W)
                found[f"{name}_spectral_err"] = np.linalg.norm(W - pruned, 2) / top
    loud = W.copy()
    loud[:, np.argsort(-control[0], kind="stable")[: max(1, m // 10)]] *= 2
    for name, score in (("control_col", (loud**2).sum(0)), ("control_random", control[1])):
        pruned = np.zeros_like(W)
        kept = np.argsort(-score, kind="stable")[:k]
        pruned[:, kept] = loud[:, kept]
        found[f"{name}_err"] = rec.relative_error(loud, pruned)
    found["topk_energy"] = (s[:k] ** 2).sum() / (s**2).sum()
    return found


@pytest.mark.parametrize("shape", [(11, 7), (7, 11), (8, 8)])
@pytest.mark.parametrize("family", [*FAMILIES, "exact lowrank"])
def test_every_metric_equals_explicit_reconstruction(shape, family):
    n, m = shape
    flags = ["--matrix", family.split()[-1]]
    flags += {"lowrank": ["--true_rank", "5"], "exact lowrank": ["--true_rank", "5", "--noise", "0"]}.get(family, [])
    flags += ["--planted_columns", "3"] if family == "planted" else []
    args = settings("--n", str(n), "--m", str(m), "--ranks", "2", "4", "--trials", "3", *flags)
    table, tails = measure_trials(args)
    draw = stream(0, "matrix")
    matrices = [FAMILIES[args.family](draw, n, m, **args.parameters) for _ in range(3)]
    for k in (2, 4):
        factors = stream(0, "random_AB", k).standard_normal((3, k, n + m))
        triplets = random_subsets(stream(0, "rand_svd_subspace", k), 3, min(n, m), k)
        uniform = stream(0, "random_colprune", k).random((3, m))
        control = stream(0, "control", k).random((3, 2, m))
        for trial, W in enumerate(matrices):
            row = table[(table["trial"] == trial) & (table["rank_used"] == k)].iloc[0]
            expected = explicit(W, k, factors[trial], triplets[trial], uniform[trial], control[trial])
            assert set(expected) == set(tables.metrics(table)) | {
                name for name in table.columns if name.endswith("_spectral_err")
            } | {f"{name}_spectral_err" for name in ("topk_energy_col", "leverage_score_col")}
            for name in tables.metrics(table):
                assert row[name] == pytest.approx(expected[name], abs=1e-10), (name, k, trial)
            assert tails[trial, k] == pytest.approx(expected["svd_topk_err"], abs=1e-10)


def within_four_standard_errors(values: pd.Series, expected: float, rounding: float = 0.0) -> bool:
    return abs(values.mean() - expected) < 4 * values.std(ddof=1) / np.sqrt(len(values)) + rounding


def test_means_agree_with_the_nulls_of_a_gaussian_matrix(full):
    table = pd.read_csv(full / "toy_results_per_trial.csv")
    # Exact: E err² of every random baseline.
    for k, part in table.groupby("rank_used"):
        null = tables.expected_errors(settings(), int(k))
        assert null["rand_svd_subspace_err"] == pytest.approx(np.sqrt(1 - k / 64))
        for name, expected in null.items():
            assert within_four_standard_errors(part[name] ** 2, expected**2), (name, k)
        # The control: chosen columns are no random ones, and the check sees it.
        assert not within_four_standard_errors(part["leverage_col_err"] ** 2, null["random_colprune_err"] ** 2)
        assert not within_four_standard_errors(part["random_AB_scaled_err"] ** 2, 1.0)
    # Monte Carlo over 4,000 other draws, to the digits given there.
    for k, svd, columns in ((8, 0.8404, 0.921), (16, 0.7012, 0.842), (32, 0.4569, 0.671)):
        part = table[table["rank_used"] == k]
        assert within_four_standard_errors(part["svd_topk_err"], svd, 1e-4)
        assert within_four_standard_errors(part["leverage_col_err"], columns, 1e-3)
        assert not within_four_standard_errors(part["svd_topk_err"], rec.gaussian_tail(128, 64)[k])


def test_the_published_leverage_is_column_magnitude_and_beats_every_other_choice_at_zeroing(full):
    table = pd.read_csv(full / "toy_results_per_trial.csv")
    for name in ("topk_energy_col_err", "leverage_score_col_err", "random_colprune_err"):
        assert (table["leverage_col_err"] <= table[name] + 1e-12).all()
        assert (table["leverage_col_err"] < table[name]).any()


@pytest.mark.parametrize("flags", [("--n", "6", "--m", "9"), ("--n", "9", "--m", "6")])
def test_full_rank_is_allowed_flagged_and_left_out_of_the_tests(flags):
    args = settings(*flags, "--ranks", "2", "6", "--trials", "4")
    table, _ = measure_trials(args)
    whole = table[table["full_rank"]]
    assert set(whole["rank_used"]) == {6}
    assert (whole[["svd_topk_err", "rand_svd_subspace_err", "svd_topk_spectral_err"]] == 0).all(axis=None)
    assert not table.loc[table["rank_used"] == 2, "full_rank"].any()
    assert set(tables.compare(table)["rank_used"]) == {2}


def test_decompositions_that_the_gram_matrix_would_blur_go_through_an_svd():
    W = np.stack([lowrank(np.random.default_rng(i), 12, 9, 4, 0.0) for i in range(3)])
    for stack in (W, W.transpose(0, 2, 1).copy()):
        _, s, Vt = matrix_errors.decompose(stack)
        exact = np.linalg.svd(stack, compute_uv=False)
        np.testing.assert_allclose(s, exact, atol=1e-13)
        assert np.sqrt(np.linalg.eigvalsh(stack @ stack.transpose(0, 2, 1))[:, 0].clip(0)).max() < 1e-6
        np.testing.assert_allclose(Vt @ Vt.transpose(0, 2, 1), np.broadcast_to(np.eye(9), (3, 9, 9)), atol=1e-10)


# --- randomness ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("blank_figures")
def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    flags = [
        "--n",
        "16",
        "--m",
        "12",
        "--ranks",
        "2",
        "5",
        "--trials",
        "6",
        "--matrix",
        "planted",
        "--planted_columns",
        "4",
    ]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main([*flags, "--seed", seed, "--out_dir", str(tmp_path / name)]) == 0
    for name in CSVS:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        if name != "toy_optimal_rank.csv":
            assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_adding_a_rank_or_trials_changes_no_other_draw(monkeypatch):
    base = ["--n", "10", "--m", "8"]
    small, _ = measure_trials(settings(*base, "--ranks", "3", "--trials", "5"))
    more_ranks, _ = measure_trials(settings(*base, "--ranks", "2", "3", "7", "--trials", "5"))
    pd.testing.assert_frame_equal(more_ranks[more_ranks["rank_used"] == 3].reset_index(drop=True), small)
    monkeypatch.setattr(matrix_errors, "_CHUNK_NUMBERS", 3 * 80)
    more_trials, _ = measure_trials(settings(*base, "--ranks", "3", "--trials", "8"))
    pd.testing.assert_frame_equal(more_trials[:5], small, rtol=1e-12)
    assert more_trials["random_AB_err"].is_unique


# --- tables -------------------------------------------------------------------------------------------------------


def test_per_trial_table_starts_with_the_published_columns(full):
    table = pd.read_csv(full / "toy_results_per_trial.csv")
    published = (
        "seed, trial, n, m, rank_requested, rank_used, k_ratio, svd_topk_err, random_AB_err, rand_svd_subspace_err, "
        "leverage_col_err, random_colprune_err, params_svd_topk, params_random_AB, nnz_svd_col, topk_energy"
    )
    assert list(table.columns[:16]) == published.split(", ")
    assert len(table) == 600
    assert not table.isna().any(axis=None)
    row = table[table["rank_used"] == 8].iloc[0]
    assert (row["params_svd_topk"], row["nnz_svd_col"], row["cols_equal_budget"]) == (8 * 192, 8 * 128, 12)


def test_aggregate_follows_from_the_per_trial_table(full):
    table, summary = pd.read_csv(full / "toy_results_per_trial.csv"), pd.read_csv(full / "toy_results_agg.csv")
    assert list(summary.columns[:3]) == ["rank_used", "svd_topk_err_mean", "svd_topk_err_std"]
    grouped = table.groupby("rank_used")
    for name in tables.metrics(table):
        np.testing.assert_allclose(summary[f"{name}_mean"], grouped[name].mean())
        np.testing.assert_allclose(summary[f"{name}_std"], grouped[name].std(ddof=1))
        inside = (summary[f"{name}_ci_low"] <= summary[f"{name}_mean"]) & (
            summary[f"{name}_mean"] <= summary[f"{name}_ci_high"]
        )
        assert inside.all()
    assert (summary["n"] == 200).all()


def test_statistics_compare_svd_with_each_baseline_and_can_find_nothing(full):
    frame = pd.read_csv(full / "toy_results_stats.csv")
    svd = frame[(frame["metric"] == "svd_topk_err") & (frame["rank_used"] == 8)]
    assert {"random_AB_err", "rand_svd_subspace_err", "leverage_col_err", "random_colprune_err"} <= set(svd["baseline"])
    assert (svd["mean_difference"] < 0).all()
    assert (frame["t_p_holm"] >= frame["t_p"]).all()
    # A comparison that has no difference to find must not find one: two random choices of columns.
    table = pd.read_csv(full / "toy_results_per_trial.csv")
    part = table[table["rank_used"] == 8]
    shuffled = part["random_colprune_err"].sample(frac=1, random_state=0).to_numpy()
    null = tables.compare(part.assign(leverage_col_err=shuffled))
    pair = null[(null["metric"] == "leverage_col_err") & (null["baseline"] == "random_colprune_err")]
    assert pair["t_p_holm"].item() > 0.05


def test_one_trial_has_no_interval_but_runs(tmp_path):
    assert main(["--n", "6", "--m", "5", "--ranks", "1", "5", "--trials", "1", "--out_dir", str(tmp_path / "o")]) == 0
    summary = pd.read_csv(tmp_path / "o" / "toy_results_agg.csv")
    assert summary["svd_topk_err_std"].isna().all()
    assert summary["svd_topk_err_mean"].notna().all()


def test_every_output_is_there_and_a_second_run_is_skipped(full, capsys):
    for name in (*OUTPUTS, "run.json"):
        assert (full / name).stat().st_size > 0, name
    flags = ["--n", "128", "--m", "64", "--ranks", "8", "16", "32", "--trials", "200", "--outdir", str(full)]
    assert main(flags) == 0
    assert "already finished" in capsys.readouterr().out
    assert main([*flags, "--seed", "3"]) == 2
    assert "other arguments" in capsys.readouterr().err


# --- matrix families ----------------------------------------------------------------------------------------------


def test_families_have_the_structure_they_claim():
    rng = np.random.default_rng(0)
    s = np.linalg.svd(powerlaw(rng, 30, 20, 1.5), compute_uv=False)
    np.testing.assert_allclose(s, np.arange(1, 21) ** -1.5, rtol=1e-10)
    W = lowrank(rng, 40, 30, 5, 0.0)
    assert np.linalg.matrix_rank(W) == 5
    assert np.linalg.matrix_rank(lowrank(rng, 40, 30, 5, 0.1)) == 30
    assert np.mean([lowrank(rng, 40, 30, 5, 0.0).std() for _ in range(50)]) == pytest.approx(1, abs=0.05)
    energy = np.sort(ch.column_energy(planted(rng, 200, 40, 6, 10, 8.0)))
    assert energy[-6] > 3 * energy[-7]


def test_error_falls_below_the_noise_at_the_true_rank():
    args = settings(
        "--matrix", "lowrank", "--n", "48", "--m", "40", "--true_rank", "6", "--ranks", "6", "--trials", "5"
    )
    _, tails = measure_trials(args)
    assert set(tables.optimal_ranks(args, tails)["rank_max"]) <= {5, 6}
    assert (tails[:, 5] > 0.1).all()
    assert (tails[:, 6] < 0.01).all()


def test_parameters_of_another_family_are_refused():
    assert family_parameters("lowrank", 99, 80, {"noise": 0.5, "decay": None}) == {"true_rank": 64, "noise": 0.5}
    with pytest.raises(InputError, match="--decay belongs to --matrix powerlaw"):
        family_parameters("lowrank", 99, 80, {"decay": 1.0})


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "0"], "rank must be between 1 and min(n, m) = 64, got 0"),
        (["--ranks", "8", "65"], "got 65"),
        (["--ranks", "8", "8"], "must differ"),
        (["--ranks", "x"], "must be a whole number"),
        (["--n", "0"], "--n must be at least 1"),
        (["--trials", "0"], "--trials must be at least 1"),
        (["--seed", "-1"], "--seed must be a whole number from 0 to"),
        (["--matrix", "gaussiam"], "invalid choice"),
        (["--true_rank", "4"], "--true_rank belongs to --matrix lowrank"),
        (["--matrix", "lowrank", "--true_rank", "65"], "--true_rank must be between 1 and"),
        (["--matrix", "lowrank", "--noise", "nan"], "--noise must be a finite number"),
        (["--matrix", "planted", "--planted_columns", "99"], "--planted_columns"),
        (["--target_error", "0"], "--target_error must be between 0 and 1"),
        (["--rank", "4"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, flags, message):
    folder = tmp_path / "out"
    try:
        status = main([*flags, "--out_dir", str(folder)])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not folder.exists()


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert main(["--dry_run", "--out_dir", str(tmp_path / "out")]) == 0
    planned = capsys.readouterr().out.split("would write:")[1].split()
    assert not (tmp_path / "out").exists()
    assert main(["--n", "8", "--m", "6", "--ranks", "2", "--trials", "2", "--out_dir", str(tmp_path / "out")]) == 0
    written = [str(path) for path in (tmp_path / "out").iterdir() if path.name != ".lock"]
    assert sorted(planned) == sorted(written)


def test_as_a_process(tmp_path):
    flags = ["--n", "8", "--m", "6", "--ranks", "2", "--trials", "2", "--out_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "toy_experiment.py"), *flags], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "best rank k (SVD)" in done.stdout
    assert done.stderr == ""
