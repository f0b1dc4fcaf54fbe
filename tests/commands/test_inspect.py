"""Phase B: every error against explicit reconstruction, and the script as its users run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

import inspect_svd_predictors
from sparselora.inspection import predictors
from sparselora.inspection import tables as layer_tables
from sparselora.inspection.layer import Settings, measure_layer
from sparselora.inspection.model import PARTIAL
from sparselora.numerics import channels as ch
from sparselora.numerics import spectra
from sparselora.numerics.channels import keep_count, top_channels
from sparselora.numerics.matrices import planted
from sparselora.numerics.reconstruction import relative_error

SCRIPT = Path(inspect_svd_predictors.__file__)
SHAPES = [(40, 24), (24, 40), (30, 30), (12, 70)]


def weights(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Columns and rows of unequal norms, so that a predictor has something to find."""
    rng = np.random.default_rng(seed)
    scale = np.exp(0.5 * rng.standard_normal(shape[1])), np.exp(0.4 * rng.standard_normal((shape[0], 1)))
    return rng.standard_normal(shape) * scale[0] * scale[1]


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "model", layers=3)


def make_model(folder: Path, layers: int, shape: tuple[int, int] = (40, 24)) -> Path:
    folder.mkdir()
    tensors = {
        "embed.weight": weights((200, 24), 99),
        "type.weight": weights((2, 24), 98),
        "empty.weight": np.zeros((9, 9)),
    }
    for layer in range(layers):
        tensors[f"h.{layer}.attn.q.weight"] = weights((24, 24), 2 * layer)
        tensors[f"h.{layer}.mlp.up.weight"] = weights(shape, 2 * layer + 1)
    save_file({name: W.astype(np.float32) for name, W in tensors.items()}, folder / "model.safetensors")
    return folder


def run(model: Path, out: Path, *more: str) -> int:
    flags = ["--rank", "4", "--max_elems", "2000", "--plots", "none"]
    return inspect_svd_predictors.main(["--model", str(model), "--out_dir", str(out), *flags, *more])


def without_times(path: Path) -> str:
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table[[name for name in table.columns if not name.endswith("_ms")]].to_csv()


# --- every figure against explicit reconstruction -----------------------------------------------------------------


def zeroed(W: np.ndarray, kept: np.ndarray, axis: int) -> np.ndarray:
    out = np.zeros_like(W)
    at = (slice(None), kept) if axis == 1 else (kept,)
    out[at] = W[at]
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 5])
def test_errors_equal_explicit_reconstruction(shape, k):
    W, (n, m), keep = weights(shape), shape, 0.3
    row, s, _ = measure_layer(W, "w", Settings(k, keep, (0.05, 0.3), seed=0))
    U, exact, Vt = np.linalg.svd(W, full_matrices=False)

    def close(name: str, value: float) -> None:
        assert row[name] == pytest.approx(value, abs=1e-10), name

    low = (U[:, :k] * exact[:k]) @ Vt[:k]
    close("svd_topk_err", relative_error(W, low))
    close("svd_topk_spectral_err", np.linalg.norm(W - low, 2) / np.linalg.norm(W, 2))
    close("topk_energy", np.linalg.norm(low) ** 2 / np.linalg.norm(W) ** 2)
    close("fro_norm", np.linalg.norm(W))
    scores = {
        "leverage_col": ((exact[:, None] * Vt) ** 2).sum(axis=0),
        "topk_energy_col": ((exact[:k, None] * Vt[:k]) ** 2).sum(axis=0),
        "leverage_score_col": (Vt[:k] ** 2).sum(axis=0),
    }
    for name, score in scores.items():
        kept = top_channels(score, keep_count(m, keep))
        pruned, C = zeroed(W, kept, 1), W[:, kept]
        close(f"{name}_err", relative_error(W, pruned))
        close(f"{name}_spectral_err", np.linalg.norm(W - pruned, 2) / np.linalg.norm(W, 2))
        fitted = C @ np.linalg.lstsq(C, W, rcond=None)[0]
        # Where C spans everything the exact error is 0; √ of what cancels in the closed form is its rounding.
        assert row[f"{name}_proj_err"] == pytest.approx(relative_error(W, fitted), abs=1e-10 if len(kept) < n else 1e-7)
        close(f"{name}_eqb_err", relative_error(W, zeroed(W, top_channels(score, k * (n + m) // n), 1)))
    by_row = top_channels((W**2).sum(axis=1), keep_count(n, keep))
    close("mag_row_err", relative_error(W, zeroed(W, by_row, 0)))
    close("mag_row_spectral_err", np.linalg.norm(W - zeroed(W, by_row, 0), 2) / np.linalg.norm(W, 2))
    close("mag_best_err", min(row["mag_col_err"], row["mag_row_err"]))
    assert row["mag_col_err"] == row["leverage_col_err"]
    for target in (0.05, 0.3):
        brute = next(r for r in range(len(s) + 1) if relative_error(W, (U[:, :r] * exact[:r]) @ Vt[:r]) < target)
        assert row[f"rank_at_{target:g}"] == brute
        close(f"stored_at_{target:g}", brute * (n + m) / (n * m))


def test_random_baselines_follow_their_law():
    W, k = weights((40, 24)), 5
    s = np.linalg.svd(W, compute_uv=False)
    # Random A·B: the cosine drawn from the singular values, against cosines of products that are formed.
    drawn = np.concatenate(
        [predictors.random_product_cosines(s, 40, 24, k, np.random.default_rng([1, i])) for i in range(40)]
    )
    rng = np.random.default_rng(2)
    formed = []
    for _ in range(1200):
        R = rng.standard_normal((40, k)) @ rng.standard_normal((k, 24))
        formed.append(np.sum(W * R) / (np.linalg.norm(W) * np.linalg.norm(R)))
    assert abs(drawn.mean()) < 4.5 * drawn.std() / np.sqrt(len(drawn))
    assert np.mean(drawn**2) == pytest.approx(1 / (40 * 24), rel=0.15)
    assert drawn.std() == pytest.approx(np.std(formed), rel=0.1)
    assert np.mean(drawn**4) == pytest.approx(np.mean(np.array(formed) ** 4), rel=0.4)
    # Mean squares over the 30 draws lie around the exact expectations.
    row = measure_layer(W, "w", Settings(k, 0.3, (0.1,), seed=0)).figures
    for name in ("rand_svd_subspace_err", "random_AB_err", "random_colprune_err"):
        rms = np.sqrt(row[name] ** 2 + row[f"{name}_std"] ** 2 * (1 - 1 / predictors.DRAWS))
        assert abs(rms - row[f"{name}_rms_expected"]) < 5 * row[f"{name}_std"] / np.sqrt(predictors.DRAWS), name
    assert row["random_AB_scaled_err"] <= 1 < row["random_AB_err"]


def test_curve_of_random_subsets_has_the_exact_mean_square():
    energy = np.random.default_rng(3).random(40) ** 4
    mean, std = predictors.random_subset_curve(energy, np.random.default_rng(4))
    assert (mean[0], mean[-1], std[0], std[-1]) == pytest.approx((1, 0, 0, 0), abs=1e-7)
    square = mean**2 + std**2 * (1 - 1 / predictors.DRAWS)
    gap = np.abs(square - (1 - np.arange(41) / 40))
    assert (gap <= 2 * mean * 5 * std / np.sqrt(predictors.DRAWS) + 1e-12).all()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.usefixtures("blank_figures")
def test_two_processes_give_the_table_of_one(model, tmp_path, monkeypatch):
    for count in (1, 2):
        monkeypatch.setattr("sparselora.inspection.model.processes", lambda layers, count=count: count)
        assert run(model, tmp_path / str(count), "--plots", "all") == 0
    for path in (tmp_path / "1").rglob("*.csv"):
        name = path.relative_to(tmp_path / "1")
        assert without_times(path) == without_times(tmp_path / "2" / name), name
    pictures = [{path.name for path in (tmp_path / count).rglob("*.png")} for count in "12"]
    assert pictures[0] == pictures[1]
    outputs = [json.loads((tmp_path / count / "run.json").read_text())["outputs"] for count in "12"]
    assert outputs[0] == outputs[1]


def test_dependent_columns_are_projected_on_what_is_there():
    rng = np.random.default_rng(0)
    low = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 30))
    for W in (low, low.T):
        gram = spectra.gram(W)
        kept = np.arange(6)
        C = W[:, kept]
        exact = relative_error(W, C @ np.linalg.pinv(C) @ W)
        assert predictors.projection_error(W, gram, kept) == pytest.approx(exact, abs=1e-6)


def test_truncated_scores_differ_from_magnitude_on_a_noise_column():
    rng = np.random.default_rng(0)
    W = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 20)) * 3
    W[:, 7] = 0
    W[:, 7] = 5 * rng.standard_normal(60)
    _, s, Vt = np.linalg.svd(W, full_matrices=False)
    gram = spectra.gram(W)
    values, vectors = spectra.eigen(gram.G, 2)
    scores = predictors.column_scores(gram, s, predictors.right_vectors(W, gram, values, vectors), 2)
    np.testing.assert_allclose(scores["leverage_col"], (W**2).sum(axis=0))
    place = {name: int(np.argsort(-score).tolist().index(7)) for name, score in scores.items()}
    assert place["leverage_col"] < place["topk_energy_col"]
    np.testing.assert_allclose(scores["leverage_score_col"], ch.leverage_scores(Vt, 2), atol=1e-10)


def test_a_planted_signal_is_found_and_a_gaussian_has_none():
    rng = np.random.default_rng(0)
    gaps = {"planted": [], "gaussian": []}
    for i in range(12):
        for name, W in (("planted", planted(rng, 60, 40, 8, 3, 3.0)), ("gaussian", rng.standard_normal((60, 40)))):
            row = measure_layer(W, str(i), Settings(3, 0.2, (0.1,), 0)).figures
            gaps[name].append(row["random_colprune_err"] - row["topk_energy_col_err"])
    assert min(gaps["planted"]) > 0.1 > np.mean(gaps["gaussian"])


# --- the script ---------------------------------------------------------------------------------------------------


def test_tables_of_a_small_model(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(model, out) == 0
    table = pd.read_csv(out / "layer_reconstruction.csv")
    assert tuple(table.columns[: len(layer_tables.PUBLISHED)]) == layer_tables.PUBLISHED
    assert len(table) == 9
    reasons = table.set_index("param")["skipped"].dropna()
    assert set(reasons.index) == {"embed.weight", "empty.weight"}
    assert "max_elems" in reasons["embed.weight"]
    full = table[table["full_rank"] == True]  # noqa: E712
    assert full["param"].tolist() == ["type.weight"]
    assert full["k_used"].tolist() == [2]
    values = json.loads(table.set_index("param").loc["h.1.mlp.up.weight", "top_singular_values"])
    exact = np.linalg.svd(weights((40, 24), 3).astype(np.float32).astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(values, exact[:10], rtol=1e-8)
    summary = pd.read_csv(out / "summary.csv").set_index(["by", "group", "metric"])
    measured = table[table["full_rank"] == False]  # noqa: E712
    assert summary.loc[("all", "all", "svd_topk_err"), "n"] == len(measured) == 6
    assert summary.loc[("all", "all", "svd_topk_err"), "mean"] == pytest.approx(measured["svd_topk_err"].mean())
    assert summary.loc[("layer_type", "mlp.up", "alpha"), "n"] == 3
    assert summary.loc[("depth", "2", "stable_rank"), "n"] == 2
    tests = pd.read_csv(out / "predictor_tests.csv")
    assert list(zip(tests["predictor"], tests["against"])) == list(layer_tables.TESTS)
    assert (tests["t_p_holm"] >= tests["t_p"]).all()
    control = tests.set_index("predictor").loc["control_col_err"]
    assert control["ci_high"] < 0
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "success"
    assert str(tmp_path) not in (out / "run.json").read_text()
    assert "svd_topk_err" in capsys.readouterr().out
    assert run(model, out) == 0
    assert "already finished" in capsys.readouterr().out


def test_same_seed_same_bytes(model, tmp_path):
    for name, more in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        assert run(model, tmp_path / name, *more) == 0
    a, b, c = (without_times(tmp_path / name / "layer_reconstruction.csv") for name in "abc")
    assert a == b != c
    for name in ("summary.csv", "predictor_tests.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_figures_and_their_data(model, tmp_path):
    out = tmp_path / "out"
    assert run(model, out, "--plots", "all", "--run_experiment", "--experiment_param", "h.1.mlp.up.weight") == 0
    pictures = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    measured = ["type.weight", *(f"h.{i}.{name}.weight" for i in range(3) for name in ("attn.q", "mlp.up"))]
    assert pictures == {"overview.png", "experiment.png", *(f"plots/svd_{name}.png" for name in measured)}
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert (out / name).with_suffix(".csv").exists()
    table = pd.read_csv(out / "layer_reconstruction.csv").set_index("param")
    bars = pd.read_csv(out / "experiment.csv").query("panel == 'predictors'").set_index("series")["mean"]
    for name in bars.index:
        assert bars[name] == pytest.approx(table.loc["h.1.mlp.up.weight", name])
    assert set(json.loads((out / "run.json").read_text())["outputs"]) >= pictures


@pytest.mark.parametrize("method", spectra.METHODS)
@pytest.mark.usefixtures("blank_figures")
def test_every_spectrum_method_runs(model, tmp_path, method):
    out = tmp_path / "out"
    assert run(model, out, "--spectrum", method, "--plots", "overview") == 0
    table = pd.read_csv(out / "layer_reconstruction.csv").dropna(subset="k_used")
    assert set(table["spectrum_method"]) <= {method, "svd"}
    assert table["svd_topk_err"].between(0, 1).all()
    assert table["stable_rank"].ge(1 - 1e-12).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "--rank must be at least 1"),
        (["--rank", "25"], "above min(n, m) of every layer"),
        (["--keep_ratio", "0"], "keep_ratio must be in (0, 1]"),
        (["--keep_ratio", "1.5"], "keep_ratio must be in (0, 1]"),
        (["--target_error", "0"], "--target_error must be between 0 and 1"),
        (["--seed", "-1"], "--seed must be a whole number from 0 to"),
        (["--max_elems", "3"], "no matrix of"),
        (["--max_layers", "-1"], "max_layers must be 0"),
        (["--model", "nobody/nothing-of-this-name"], "is no local folder"),
        (["--experiment_param", "h.1.mlp.up.weight"], "add --run_experiment"),
        (["--run_experiment", "--experiment_param", "h.1.mlp.upp.weight"], "did you mean 'h.1.mlp.up.weight'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(model, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert run(model, out, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_damaged_models_write_nothing(model, tmp_path, capsys):
    out, file = tmp_path / "out", model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    assert run(model, out) == 2
    assert "truncated or corrupt" in capsys.readouterr().err
    bad = weights((30, 30)).astype(np.float32)
    bad[3, 3] = np.nan
    save_file({"h.0.a.weight": weights((30, 30)).astype(np.float32), "h.1.b.weight": bad}, file)
    assert run(model, out) == 2
    assert "holds NaN" in capsys.readouterr().err
    file.unlink()
    assert run(model, out) == 2
    assert "holds no weights" in capsys.readouterr().err
    assert not out.exists()


def test_other_runs_and_unwritable_folders_are_left_alone(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(model, out) == 0
    before = (out / "layer_reconstruction.csv").read_bytes()
    assert run(model, out, "--seed", "5") == 2
    assert "finished run with other arguments" in capsys.readouterr().err
    assert (out / "layer_reconstruction.csv").read_bytes() == before
    assert run(model, out, "--seed", "5", "--overwrite") == 0
    (tmp_path / "file").write_text("x")
    assert run(model, tmp_path / "file") == 2


def test_dry_run_writes_nothing(model, tmp_path, capsys):
    assert run(model, tmp_path / "out", "--dry_run") == 0
    assert "layer_reconstruction.csv" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# --- nothing to compare, and what is no matrix --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full rank", "zero", "both"])
@pytest.mark.parametrize("plots", ["none", "overview", "all"])
@pytest.mark.usefixtures("blank_figures")
def test_without_a_layer_to_compare_the_tables_are_written_and_the_tests_are_empty(tmp_path, capsys, kind, plots):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    full = {f"h.{i}.q.weight": weights((16, 4), i).astype(np.float32) for i in range(3)}
    zero = {f"h.{i}.k.weight": np.zeros((16, 16), np.float32) for i in range(2)}
    save_file({"full rank": full, "zero": zero, "both": full | zero}[kind], model / "model.safetensors")
    assert run(model, out, "--plots", plots) == 0
    text = capsys.readouterr().out
    assert "0 layers compared" in text
    assert "no layer of rank above 4" in text
    table = pd.read_csv(out / "layer_reconstruction.csv")
    assert len(table) == {"full rank": 3, "zero": 2, "both": 5}[kind]
    assert table["full_rank"].eq(True).sum() == (0 if kind == "zero" else 3)
    for name, first in (("summary.csv", "by"), ("predictor_tests.csv", "predictor")):
        empty = pd.read_csv(out / name)
        assert len(empty) == 0
        assert empty.columns[0] == first
    assert json.loads((out / "run.json").read_text())["status"] == "success"
    # The control: one layer of more rank, and there are rows with the same columns.
    columns = pd.read_csv(out / "predictor_tests.csv").columns
    save_file(full | {"h.9.q.weight": weights((16, 9)).astype(np.float32)}, model / "model.safetensors")
    assert run(model, tmp_path / "more", "--plots", "none") == 0
    assert pd.read_csv(tmp_path / "more" / "predictor_tests.csv").columns.tolist() == columns.tolist()


@pytest.mark.parametrize(
    ("name", "message"), [(None, "needs a layer of rank above --rank 4"), ("h.0.k.weight", "all values are zero")]
)
def test_an_experiment_without_its_layer_is_refused_before_the_run(tmp_path, capsys, name, message):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    tensors = {"h.0.k.weight": np.zeros((16, 16), np.float32), "h.0.q.weight": weights((16, 4)).astype(np.float32)}
    save_file(tensors, model / "model.safetensors")
    more = ["--experiment_param", name] if name else []
    assert run(model, out, "--run_experiment", *more) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_experts_and_empty_tensors_are_counted_and_named(model, tmp_path, capsys):
    from safetensors.numpy import load_file

    more = {
        "h.0.mlp.experts.gate_up_proj": np.ones((4, 24, 16), np.float32),
        "h.0.mlp.experts.down_proj": np.ones((4, 16, 24), np.float32),
        "h.0.attn.k.weight": np.ones((0, 24), np.float32),
        "h.0.norm.weight": np.ones(24, np.float32),
        "position_ids": np.zeros((1, 8), np.int64),
    }
    file, out = model / "model.safetensors", tmp_path / "out"
    assert run(model, tmp_path / "before") == 0
    capsys.readouterr()
    save_file(load_file(file) | more, file)
    assert run(model, out) == 0
    text = capsys.readouterr().out
    assert "6 skipped" in text  # two by the limit and for zeros as before, two experts, one empty, one of integers
    assert (
        "2 × 3 dimensions (experts or a convolution): h.0.mlp.experts.down_proj, h.0.mlp.experts.gate_up_proj" in text
    )
    assert "1 × empty: h.0.attn.k.weight" in text
    table = pd.read_csv(out / "layer_reconstruction.csv").set_index("param")
    assert table.loc["h.0.mlp.experts.down_proj", ["shape", "dtype"]].tolist() == ["4x16x24", "float32"]
    assert table.loc["h.0.mlp.experts.down_proj", "skipped"].startswith("3 dimensions")
    listing = pd.read_csv(out / "not_measured.csv").set_index("name")
    assert set(listing.index) == {*more, "embed.weight", "empty.weight"}
    assert listing.loc["position_ids", "reason"] == "no floating-point numbers (int64)"
    # What is measured is measured as before.
    assert (tmp_path / "before" / "summary.csv").read_bytes() == (out / "summary.csv").read_bytes()


def test_hostile_names_reach_neither_the_terminal_nor_each_others_figures(tmp_path, capsys):
    names = ["h.0.a/b.weight", "h.0.a_b.weight", "h.0.\x1b[31m.weight", "h.0.$\\frac$.weight", "h.0." + "n" * 300]
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    save_file(
        {name: weights((9, 12), i).astype(np.float32) for i, name in enumerate(names)}, model / "model.safetensors"
    )
    assert run(model, out, "--plots", "all") == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert len(list((out / "plots").glob("*.png"))) == len(names)
    assert "\x1b" not in (out / "layer_reconstruction.csv").read_text()


# --- processes ----------------------------------------------------------------------------------------------------


def command(model: Path, out: Path, *more: str) -> list[str]:
    flags = ["--rank", "4", "--max_elems", "0", "--plots", "none", *more]
    return [sys.executable, str(SCRIPT), "--model", str(model), "--out_dir", str(out), *flags]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_resume_after_kill_gives_the_same_table(tmp_path):
    model = make_model(tmp_path / "model", layers=40, shape=(300, 200))
    out = tmp_path / "killed"
    process = subprocess.Popen(command(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial, deadline = out / PARTIAL, time.monotonic() + 60
    while time.monotonic() < deadline and not (partial.exists() and partial.read_bytes().count(b"\n") >= 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = partial.read_bytes().count(b"\n")
    assert 5 <= done < 83
    assert not (out / "layer_reconstruction.csv").exists()
    with partial.open("ab") as log:
        log.write(b'{"row": {"param": "torn')  # what a kill in the middle of a write leaves
    flags = ["--model", str(model), "--rank", "4", "--max_elems", "0", "--plots", "none"]
    assert inspect_svd_predictors.main([*flags, "--out_dir", str(out), "--resume", "--seed", "1"]) == 2
    (out / ".summary.csv.1.tmp").write_text("left by a kill")
    assert inspect_svd_predictors.main([*flags, "--out_dir", str(out), "--resume"]) == 0
    assert inspect_svd_predictors.main([*flags, "--out_dir", str(tmp_path / "whole")]) == 0
    tables = [folder / "layer_reconstruction.csv" for folder in (out, tmp_path / "whole")]
    assert without_times(tables[0]) == without_times(tables[1])
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == [
        "layer_reconstruction.csv", "not_measured.csv", "predictor_tests.csv", "run.json", "summary.csv",
    ]  # fmt: skip
    assert (out / "summary.csv").read_bytes() == (tmp_path / "whole" / "summary.csv").read_bytes()


PEAK = r"""
import pathlib, re, resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
print("loaded", *(name for name in ("torch", "transformers", "datasets", "peft") if name in sys.modules))
# Not ru_maxrss, which a child takes over from the process that forked it.
own = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
print("peak", max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_depend_on_the_number_of_layers(tmp_path):
    peaks = []
    for layers in (4, 40):
        folder = tmp_path / f"model{layers}"
        folder.mkdir()
        rng = np.random.default_rng(0)
        W = rng.standard_normal((6000, 150)).astype(np.float32)  # 3.6 MB; 40 of them would be 144 MB
        save_file({f"h.{i}.mlp.up.weight": W + i for i in range(layers)}, folder / "model.safetensors")
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *command(folder, tmp_path / f"out{layers}")[1:]],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        assert lines[-2] == "loaded"
        peaks.append(int(lines[-1].split()[1]) / 1024)
    # A tenth of the 130 MB that keeping the weights would add.
    assert peaks[1] - peaks[0] < 13, peaks
