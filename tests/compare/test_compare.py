"""`compare` on sweeps whose effects are known because they were planted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sparselora.__main__ import main
from sparselora.compare.pruning_cells import CONTROL, read_sweep
from sparselora.compare.pruning_tables import compare, describe, positive_control
from sparselora.errors import InputError
from sparselora.numerics.stats import compare_paired, holm, mcnemar

METHODS = ("channel_energy", "magnitude_B", "random")
COLUMNS = [
    *("model", "dataset", "method", "keep_ratio", "lora_r", "effective_r", "seed", "train_samples", "eval_samples"),
    *("warmup_epochs", "post_epochs", "acc_before", "acc_after", "delta_acc", "warm_time_sec", "post_time_sec"),
    *("target_modules", "lora_trainable_params", "lora_total_params", "acc_right_after", "loss_before"),
    *("loss_right_after", "loss_after", "metric", "metric_before", "metric_right_after", "metric_after"),
    *("steps_to_recovery", "warm_step_ms", "post_step_ms", "warm_samples_per_s", "post_samples_per_s", "peak_mb"),
    *("head_params", "adapter_flops_per_token_before", "adapter_flops_per_token_after", "scope", "masked", "lr"),
    *("train_bsz", "run_id", "run_dir"),
]


def make_sweep(
    folder: Path,
    lost: dict[tuple[str, float], tuple[float, float]] | None = None,
    *,
    seeds=range(4),
    sentences: int = 400,
    keeps=(0.25, 0.5),
    methods=METHODS,
    predictions: bool = True,
    control: bool = True,
    seed_noise: float = 0.01,
    rng_seed: int = 0,
    **settings: object,
) -> pd.DataFrame:
    """Write a sweep of runs in which a pruned cell gets a sentence wrong that it had right with a planted probability.

    ``lost[(method, keep_ratio)]`` is that probability right after pruning and after more training; elsewhere pruning
    changes answers at random, as many for the better as for the worse.
    """
    rng = np.random.default_rng(rng_seed)
    hard = rng.uniform(size=sentences)  # one difficulty a sentence: seeds agree on most of them
    label = rng.integers(0, 2, size=sentences)
    rows = []
    for seed in seeds:
        # The seed's quality, and how well it trains on, are shared by its cells: that is what pairing removes.
        before = hard + rng.normal(0, 0.15, size=sentences) < 0.8 + rng.normal(0, seed_noise)
        trained = hard + rng.normal(0, 0.15, size=sentences) < 0.83 + rng.normal(0, seed_noise)
        cells = [(m, k) for m in methods for k in keeps] + [(CONTROL, 1.0)] * control
        for method, keep in cells:
            right = {"before": before, "right_after": before, "after": trained}
            if method != CONTROL:
                drops = (lost or {}).get((method, keep), (0.0, 0.0))
                for moment, drop in zip(("right_after", "after"), drops):
                    flips = rng.uniform(size=sentences)
                    even = 0.02 * right[moment].mean() / (~right[moment]).mean()
                    worse, better = right[moment] & (flips < drop + 0.02), ~right[moment] & (flips < even)
                    right[moment] = (right[moment] & ~worse) | better
            run = f"cell_{method}_{keep}_{seed}"
            if predictions:
                (folder / run).mkdir(parents=True, exist_ok=True)
                answers = {name: np.where(ok, label, 1 - label) for name, ok in right.items()}
                pd.DataFrame({"row": np.arange(sentences) + 7, "label": label, **answers}).to_csv(
                    folder / run / "predictions.csv", index=False
                )
            accuracy = {name: ok.mean() for name, ok in right.items()}
            row = dict.fromkeys(COLUMNS, 1)
            row |= {"model": "minilm", "dataset": "docstrings", "method": method, "keep_ratio": keep, "lora_r": 8}
            row |= {"effective_r": 8 * keep, "seed": seed, "train_samples": 200, "eval_samples": sentences}
            row |= {f"acc_{name}": value for name, value in accuracy.items()}
            row |= {f"metric_{name}": value for name, value in accuracy.items()}
            row |= {"metric": "accuracy", "target_modules": "query key", "scope": "module", "masked": False}
            row |= {"lr": 2e-4, "train_bsz": 16, "run_id": run, "run_dir": run}
            rows.append(row | settings)
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.to_csv(folder / "results.csv", index=False)
    return table


@pytest.fixture
def no_figure(monkeypatch):
    """For tests that look at numbers and texts only: drawing is most of a short comparison's time."""
    monkeypatch.setattr("sparselora.report.pruning.metric_against_keep_ratio", lambda *args, **settings: None)


PLANTED = {
    ("random", 0.25): (0.20, 0.10),
    ("random", 0.5): (0.10, 0.0),
    ("magnitude_B", 0.25): (0.10, 0.0),
    ("channel_energy", 0.25): (0.0, 0.0),
}


def _compare(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    (study,) = read_sweep(folder / "results.csv")
    return compare(study, np.random.SeedSequence(0))


def _row(table: pd.DataFrame, method: str, keep: float, moment: str, reference: str) -> pd.Series:
    key = {"method": method, "keep_ratio": keep, "moment": moment, "reference": reference}
    (row,) = [row for _, row in table.iterrows() if all(row[name] == value for name, value in key.items())]
    return row


# --- planted effects ----------------------------------------------------------------------------------------------


def test_planted_effects_are_found_and_absent_ones_are_not(tmp_path):
    make_sweep(tmp_path, PLANTED)
    table, _ = _compare(tmp_path)
    severe = _row(table, "random", 0.25, "right_after", CONTROL)
    assert severe["difference"] < -0.1
    assert severe["ci_high"] < 0
    assert severe["t_p_holm"] < 0.05
    assert severe["bootstrap_p_holm"] < 0.05
    better = _row(table, "magnitude_B", 0.25, "right_after", "random")
    assert better["difference"] > 0
    assert better["bootstrap_p_holm"] < 0.05
    for moment in ("right_after", "after"):
        harmless = _row(table, "channel_energy", 0.25, moment, CONTROL)
        assert harmless["ci_low"] < 0 < harmless["ci_high"] or abs(harmless["difference"]) < 0.02
        assert harmless["t_p_holm"] > 0.05
        assert harmless["bootstrap_p_holm"] > 0.05


def test_without_an_effect_nothing_is_found_more_often_than_it_may_be(tmp_path):
    """Family-wise error over whole sweeps: about one in twenty reports anything, raw p-values far more often."""
    false_t, false_sentences, raw = 0, 0, 0
    sweeps = 10
    for i in range(sweeps):
        folder = tmp_path / str(i)
        make_sweep(folder, rng_seed=100 + i, sentences=150, seeds=range(4), keeps=(0.5,))
        table, _ = _compare(folder)
        false_t += (table["t_p_holm"] < 0.05).any()
        false_sentences += (table["bootstrap_p_holm"] < 0.05).any()
        raw += (table[["t_p", "bootstrap_p"]] < 0.05).any(axis=None)
    # P(more than 3 of 10) at 0.05 is 0.001.
    assert false_t <= 3
    assert false_sentences <= 3
    assert raw > false_t + false_sentences
    assert raw >= 3


def test_numbers_are_those_of_the_tests_on_the_pairs(tmp_path):
    cells = make_sweep(tmp_path, PLANTED)
    table, per_seed = _compare(tmp_path)
    pick = cells.set_index(["method", "keep_ratio", "seed"]).sort_index()["acc_after"]
    ours, control = pick["random", 0.25], pick[CONTROL, 1.0]
    wanted = compare_paired(ours.to_numpy(), control.to_numpy())
    got = _row(table, "random", 0.25, "after", CONTROL)
    for name in ("mean_difference", "ci_low", "ci_high", "t_p", "wilcoxon_p", "cohens_dz", "rank_biserial"):
        ours_name = "difference" if name == "mean_difference" else name
        assert got[ours_name] == pytest.approx(getattr(wanted, name), rel=1e-9, nan_ok=True), name
    assert got["n_sentences"] == 400
    # The mean over sentences and seeds of accuracy is the mean over seeds.
    assert got["sentence_difference"] == pytest.approx(wanted.mean_difference, abs=1e-12)
    for name in ("t_p", "wilcoxon_p", "bootstrap_p"):
        assert table[f"{name}_holm"].tolist() == pytest.approx(holm(table[name].tolist()), nan_ok=True)
    assert table["sentence_draws"].unique().tolist() == [max(10_000, 800 * len(table))]
    frames = [pd.read_csv(tmp_path / f"cell_{name}_3" / "predictions.csv") for name in ("random_0.25", "no_prune_1.0")]
    a, b = ((frame["after"] == frame["label"]).to_numpy() for frame in frames)
    one = _row(per_seed[per_seed["seed"] == 3], "random", 0.25, "after", CONTROL)
    assert (one["only_method_right"], one["only_reference_right"], one["p"]) == mcnemar(a, b)
    # 3 methods × 2 keeps × 2 moments against the control, 2 methods × 2 × 2 against random.
    assert len(table) == 12 + 8
    assert len(per_seed) == 4 * len(table)


def test_pairing_sees_what_independent_groups_would_not(tmp_path):
    """Seeds differ by far more than the effect; the pairs do not."""
    cells = make_sweep(tmp_path, {("random", 0.25): (0.06, 0.0)}, seed_noise=0.12, seeds=range(8))
    got = _row(_compare(tmp_path)[0], "random", 0.25, "right_after", CONTROL)
    assert got["t_p"] < 0.05
    from scipy.stats import ttest_ind

    pick = cells.set_index(["method", "keep_ratio"])["acc_right_after"]
    assert ttest_ind(pick["random", 0.25], pick[CONTROL, 1.0]).pvalue > 0.2


# --- the fixed subset of a gate -----------------------------------------------------------------------------------

GATED: dict[str, Any] = {"methods": ("channel_energy", "svd", "token_gate"), "keeps": (0.25,)}


def make_gated_sweep(folder: Path, *, lost: float = 0.1, in_predictions: bool = True, **options: Any) -> pd.DataFrame:
    """`make_sweep` with gates whose fixed subset gets a sentence wrong, that the gate has right, so often."""
    table = make_sweep(folder, {("token_gate", 0.25): (0.05, 0.02)}, **(GATED | options))
    rng = np.random.default_rng(5)
    for i, run in table.loc[table["method"].str.endswith("_gate"), "run_dir"].items():
        path = folder / run / "predictions.csv"
        frame = pd.read_csv(path)
        right = (frame["after"] == frame["label"]) & (rng.uniform(size=len(frame)) >= lost)
        table.loc[i, "metric_static"] = right.mean()
        if in_predictions:
            frame["static"] = np.where(right, frame["label"], 1 - frame["label"])
            frame.to_csv(path, index=False)
    table.to_csv(folder / "results.csv", index=False)
    return table


def _static(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["moment"] == "static"]


def _right(folder: Path, method: str, moment: str) -> pd.DataFrame:
    """Which sentences the cells of a method got right, a column a seed, read from their files."""
    files = sorted(folder.glob(f"cell_{method}_0.25_*/predictions.csv"))
    frames = {path.parent.name[-1]: pd.read_csv(path, index_col="row") for path in files}
    return pd.DataFrame({seed: frame[moment] == frame["label"] for seed, frame in frames.items()}).astype(float)


@pytest.mark.parametrize("reference", ["token_gate", "channel_energy", "svd"])
def test_the_fixed_subset_is_tested_against_the_end_of_its_references(tmp_path: Path, reference: str) -> None:
    from scipy.stats import binomtest, ttest_rel, wilcoxon

    make_gated_sweep(tmp_path, seeds=range(6))
    table, per_seed = _compare(tmp_path)
    got = _row(table, "token_gate", 0.25, "static", reference)
    ours, theirs = _right(tmp_path, "token_gate", "static"), _right(tmp_path, reference, "after")
    wanted = ttest_rel(ours.mean(), theirs.mean())
    assert got["n_seeds"] == 6
    assert got["n_sentences"] == 400
    assert got["difference"] == pytest.approx((ours.mean() - theirs.mean()).mean())
    assert got["t_p"] == pytest.approx(wanted.pvalue)
    assert [got["ci_low"], got["ci_high"]] == pytest.approx([*wanted.confidence_interval()])
    assert got["wilcoxon_p"] == pytest.approx(wilcoxon(ours.mean().round(9), theirs.mean().round(9)).pvalue)
    assert got["difference"] < -0.03
    assert got["bootstrap_p_holm"] < 0.05
    by_sentence = (ours - theirs).mean(axis=1).to_numpy()
    draws = by_sentence[np.random.default_rng(1).integers(400, size=(4000, 400))].mean(axis=1)
    assert got["sentence_difference"] == pytest.approx(by_sentence.mean())
    assert [got["sentence_ci_low"], got["sentence_ci_high"]] == pytest.approx(
        np.quantile(draws, [0.025, 0.975]), abs=0.2 * draws.std()
    )
    one = _row(per_seed[per_seed["seed"] == 3], "token_gate", 0.25, "static", reference)
    only = [int((ours["3"] > theirs["3"]).sum()), int((ours["3"] < theirs["3"]).sum())]
    assert [one["only_method_right"], one["only_reference_right"]] == only
    assert one["p"] == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    # Neither the same moment of the reference nor another one of the gate would have passed for this.
    for ours_at, theirs_at in (("static", "right_after"), ("after", "after"), ("right_after", "after")):
        other = _right(tmp_path, "token_gate", ours_at).mean() - _right(tmp_path, reference, theirs_at).mean()
        assert abs(other.mean() - got["difference"]) > 0.005


def test_a_fixed_subset_that_loses_nothing_is_not_found(tmp_path: Path) -> None:
    make_gated_sweep(tmp_path, lost=0.0)
    got = _row(_compare(tmp_path)[0], "token_gate", 0.25, "static", "token_gate")
    assert (got["difference"], got["t_p"], got["bootstrap_p"]) == (0, 1, 1)


def test_fixed_subsets_count_in_the_family_and_change_no_other_row(tmp_path: Path) -> None:
    cells = make_gated_sweep(tmp_path)
    table, per_seed = _compare(tmp_path)
    cells.drop(columns="metric_static").to_csv(tmp_path / "results.csv", index=False)
    without, per_seed_without = _compare(tmp_path)
    assert len(_static(table)) == 3
    assert len(_static(without)) == len(_static(per_seed_without)) == 0
    drawn = ["sentence_ci_low", "sentence_ci_high", "sentence_draws", "bootstrap_p"]  # draws follow the family
    others = [name for name in table if name not in drawn and not name.endswith("_holm")]
    before = table[table["moment"] != "static"].reset_index(drop=True)
    pd.testing.assert_frame_equal(before[others], without[others])
    assert (before["sentence_draws"] > without["sentence_draws"]).all()
    for name in ("sentence_ci_low", "sentence_ci_high", "bootstrap_p"):
        assert before[name].tolist() == pytest.approx(without[name].tolist(), abs=0.002)
    assert len(per_seed) == len(per_seed_without) + 3 * 4
    for name in ("t_p", "bootstrap_p"):
        ordered = table.sort_values(name)
        steps = (ordered[name] * np.arange(len(table), 0, -1)).cummax().clip(upper=1)
        assert ordered[f"{name}_holm"].tolist() == pytest.approx(steps.tolist())
    assert (before["t_p_holm"] >= without["t_p_holm"]).all()


def test_only_references_that_the_sweep_has_and_seeds_that_have_the_fixed_subset(tmp_path: Path) -> None:
    cells = make_gated_sweep(tmp_path, methods=("channel_energy", "random", "energy_gate", "random_gate"))
    variant = cells[cells["method"] == "energy_gate"].assign(gate="threshold", metric_after=0.5)
    cells.loc[(cells["method"] == "energy_gate") & (cells["seed"] == 2), "metric_static"] = np.nan
    cells.loc[cells["method"] == "random_gate", "metric_static"] = np.nan  # as if written before there was one
    pd.concat([cells.assign(gate=""), variant]).to_csv(tmp_path / "results.csv", index=False)
    table, per_seed = _compare(tmp_path)
    rows = _static(table).set_index(["method", "reference"])
    assert rows["n_seeds"].to_dict() == {
        ("energy_gate", "energy_gate"): 3,
        ("energy_gate", "channel_energy"): 3,
        ("energy_gate (threshold)", "energy_gate (threshold)"): 4,
        ("energy_gate (threshold)", "channel_energy"): 4,
    }
    own = variant["metric_static"].mean() - 0.5
    assert rows.loc[("energy_gate (threshold)", "energy_gate (threshold)"), "difference"] == pytest.approx(own)
    assert set(_static(per_seed).query("method == 'energy_gate'")["seed"]) == {0, 1, 3}
    assert set(table.loc[table["method"] == "random_gate", "moment"]) == {"right_after", "after"}


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("in_predictions", [True, False])
def test_the_report_names_both_sides_of_a_fixed_subset(tmp_path: Path, in_predictions: bool) -> None:
    """With predictions written before they had a column static too: there the columns of sentences are empty."""
    make_gated_sweep(tmp_path, in_predictions=in_predictions)
    assert main(["compare", str(tmp_path)]) == 0
    report = (tmp_path / "compare" / "compare.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line[:1] == "|"]
    found = {row[3]: row for row in rows if row[2] == "best fixed subset"}
    assert list(found) == ["token_gate, after", "channel_energy, after", "svd, after"]
    for row in found.values():
        assert row[:2] == ["token_gate", "0.25"]
        assert row[4] == "4"
        assert all(row[-3:]) == any(row[-3:]) == in_predictions
    end = [row[3] for row in rows if row[0] == "token_gate" and row[2] == "after"]
    assert end == [CONTROL, "channel_energy", "svd"]
    table = pd.read_csv(tmp_path / "compare" / "comparisons.csv")
    assert (_static(table)["n_sentences"] > 0).tolist() == [in_predictions] * 3
    assert (table.loc[table["moment"] != "static", "n_sentences"] > 0).all()


@pytest.mark.usefixtures("no_figure")
def test_without_gates_there_is_no_word_of_fixed_subsets(tmp_path: Path) -> None:
    make_sweep(tmp_path, PLANTED)
    assert main(["compare", str(tmp_path)]) == 0
    for name in ("compare.md", "comparisons.csv", "mcnemar.csv"):
        text = (tmp_path / "compare" / name).read_text()
        assert "static" not in text
        assert "fixed subset" not in text


# --- positive control ---------------------------------------------------------------------------------------------


def test_positive_control_passes_where_the_effect_is_large(tmp_path):
    make_sweep(tmp_path, PLANTED)
    (study,) = read_sweep(tmp_path / "results.csv")
    control = positive_control(study, np.random.SeedSequence(0))
    assert control is not None
    assert (control.against, control.keep_ratio, control.n_seeds, control.by) == ("random", 0.25, 4, "seeds")
    assert control.is_separated
    assert control.low < control.difference < control.high


@pytest.mark.usefixtures("no_figure")
def test_a_sweep_that_cannot_see_is_called_underpowered(tmp_path, capsys):
    make_sweep(tmp_path, seeds=range(3), sentences=100)
    assert main(["compare", str(tmp_path / "results.csv")]) == 0
    out = capsys.readouterr().out
    assert out.index("**Positive control.**") < out.index("Differences in")
    assert "does not separate. **Underpowered**" in out
    (stated,) = re.findall(r"these 3 seeds would find (\d\.\d+) or more", out)
    (study,) = read_sweep(tmp_path / "results.csv")
    control = positive_control(study, np.random.SeedSequence(0))
    assert control is not None
    assert float(stated) == pytest.approx(control.detectable, abs=5e-5)
    assert "no evidence of equality, and nothing separates" in out


def test_pruning_that_helps_does_not_pass_for_the_control(tmp_path):
    table = make_sweep(tmp_path, predictions=False)
    table.loc[table["method"] == "random", ["acc_right_after", "metric_right_after"]] += 0.2
    table.to_csv(tmp_path / "results.csv", index=False)
    (study,) = read_sweep(tmp_path / "results.csv")
    control = positive_control(study, np.random.SeedSequence(0))
    assert control is not None
    assert control.high < 0
    assert not control.is_separated


@pytest.mark.usefixtures("no_figure")
def test_one_seed_is_described_on_sentences_and_not_judged(tmp_path, capsys):
    make_sweep(tmp_path / "with", PLANTED, seeds=[4])
    assert main(["compare", str(tmp_path / "with" / "results.csv")]) == 0
    out = capsys.readouterr().out
    assert "interval over sentences): **unknown**" in out
    assert "it separates" not in out
    make_sweep(tmp_path / "without", PLANTED, seeds=[4], predictions=False)
    assert main(["compare", str(tmp_path / "without" / "results.csv")]) == 0
    out = capsys.readouterr().out
    assert "**unknown**" in out
    assert "tests on sentences are skipped" in out


@pytest.mark.usefixtures("no_figure")
def test_a_sweep_without_control_or_without_random(tmp_path, capsys):
    make_sweep(tmp_path / "a", PLANTED, control=False)
    assert main(["compare", str(tmp_path / "a" / "results.csv")]) == 0
    assert "add one with --method no_prune" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "a" / "compare" / "comparisons.csv")
    assert set(table["reference"]) == {"random"}
    make_sweep(tmp_path / "b", PLANTED, methods=("channel_energy", "magnitude_B"))
    (study,) = read_sweep(tmp_path / "b" / "results.csv")
    control = positive_control(study, np.random.SeedSequence(0))
    assert control is not None
    assert control.against == "the mean of channel_energy, magnitude_B"


def test_a_lone_cell_still_gives_a_report(tmp_path, capsys):
    for i, control in enumerate((True, False)):
        methods = () if control else ("svd",)
        make_sweep(tmp_path / str(i), methods=methods, keeps=(0.5,), seeds=[0], control=control)
        assert main(["compare", str(tmp_path / str(i))]) == 0
        assert "nothing is tested" in capsys.readouterr().out


@pytest.mark.parametrize(("warmup_epochs", "moment"), [(1, "before"), (0, "after")])
def test_runs_at_chance_are_counted_in_one_line(tmp_path, capsys, no_figure, warmup_epochs, moment):
    make_sweep(tmp_path, keeps=(0.5,), seeds=range(2), warmup_epochs=warmup_epochs)
    assert main(["compare", str(tmp_path)]) == 0
    assert "Nothing was learned" not in capsys.readouterr().out
    for seed in range(2):  # always the same class, in two of eight runs
        path = tmp_path / f"cell_random_0.5_{seed}" / "predictions.csv"
        pd.read_csv(path).assign(**{moment: 1}).to_csv(path, index=False)
    assert main(["compare", str(tmp_path), "--overwrite"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Nothing was learned" in line]
    assert line.startswith(f"**Nothing was learned** by 2 of 8 runs: accuracy {moment} ")


# --- settings are never mixed -------------------------------------------------------------------------------------


def test_different_settings_are_different_studies(tmp_path, capsys):
    a = make_sweep(tmp_path, PLANTED, predictions=False)
    b = make_sweep(tmp_path, PLANTED, predictions=False, train_samples=2000, rng_seed=1)
    b[["acc_right_after", "metric_right_after"]] -= 0.3  # mixed in, this would swamp every difference
    pd.concat([a, b]).to_csv(tmp_path / "results.csv", index=False)
    studies = read_sweep(tmp_path / "results.csv")
    assert [study.settings["train_samples"] for study in studies] == ["200", "2000"]
    assert main(["compare", str(tmp_path / "results.csv")]) == 0
    assert "Study 2 of 2" in capsys.readouterr().out
    alone = make_sweep(tmp_path / "alone", PLANTED, predictions=False)
    assert len(alone) == len(a)
    got, wanted = compare(studies[0], np.random.SeedSequence(0)), _compare(tmp_path / "alone")
    pd.testing.assert_frame_equal(got[0], wanted[0])
    table = pd.read_csv(tmp_path / "compare" / "comparisons.csv")
    assert table.groupby("study")["train_samples"].unique().map(list).to_dict() == {1: [200], 2: [2000]}
    names = {path.name for path in (tmp_path / "compare").iterdir()}
    assert {"accuracy_against_keep_ratio_1.png", "accuracy_against_keep_ratio_2.csv"} <= names


def test_scope_and_masking_make_another_method_but_not_another_control(tmp_path):
    a = make_sweep(tmp_path, PLANTED, predictions=False)
    b = make_sweep(tmp_path, predictions=False, control=False, scope="global", masked=True)
    pd.concat([a, b]).to_csv(tmp_path / "results.csv", index=False)
    (study,) = read_sweep(tmp_path / "results.csv")
    table, _ = compare(study, np.random.SeedSequence(0))
    pairs = set(table[["method", "reference"]].itertuples(index=False, name=None))
    assert ("channel_energy (global, masked)", "random (global, masked)") in pairs
    assert ("channel_energy (global, masked)", CONTROL) in pairs
    assert ("channel_energy (global, masked)", "random") not in pairs


def test_arguments_that_are_no_column_are_told_apart_by_the_cells_records(tmp_path):
    tables = []
    for name, alpha in (("a", 16), ("b", 32)):
        table = make_sweep(tmp_path, PLANTED, predictions=False)
        table["run_dir"] = [f"{name}_{run}" for run in table["run_dir"]]
        for run in table["run_dir"]:
            (tmp_path / run).mkdir()
            arguments = {"lora_alpha": alpha, "lora_dropout": 0.1, "seed": 1, "method": run, "run_id": run}
            (tmp_path / run / "run_args.json").write_text(json.dumps(arguments))
        tables.append(table)
    pd.concat(tables).to_csv(tmp_path / "results.csv", index=False)
    studies = read_sweep(tmp_path / "results.csv")
    assert [study.settings["arg_lora_alpha"] for study in studies] == ["16", "32"]
    assert all("arg_lora_dropout" not in study.settings for study in studies)
    for run in tables[0]["run_dir"]:
        (tmp_path / run / "run_args.json").unlink()
    with pytest.raises(InputError, match=r"two runs of channel_energy at keep_ratio 0\.25 and seed 0"):
        read_sweep(tmp_path / "results.csv")


def test_only_seeds_that_both_have_are_compared(tmp_path):
    table = make_sweep(tmp_path, PLANTED)
    table = table[(table["method"] != CONTROL) | (table["seed"] >= 2)]
    table.to_csv(tmp_path / "results.csv", index=False)
    got = _row(_compare(tmp_path)[0], "random", 0.5, "after", CONTROL)
    assert got["n_seeds"] == 2
    (study,) = read_sweep(tmp_path / "results.csv")
    assert set(describe(study).query("method == 'random'")["n_seeds"]) == {4}


# --- predictions --------------------------------------------------------------------------------------------------


def test_seeds_that_saw_other_sentences_are_paired_on_the_rows_they_share(tmp_path):
    make_sweep(tmp_path, PLANTED, seeds=range(2))
    path = tmp_path / "cell_no_prune_1.0_0" / "predictions.csv"
    pd.read_csv(path).iloc[::-1].iloc[:300].to_csv(path, index=False)  # another order, fewer rows
    table, per_seed = _compare(tmp_path)
    got = per_seed[(per_seed["method"] == "random") & (per_seed["reference"] == CONTROL)]
    assert got.groupby("seed")["n_sentences"].unique().map(list).to_dict() == {0: [300], 1: [400]}
    assert _row(table, "random", 0.25, "after", CONTROL)["n_sentences"] == 400


@pytest.mark.usefixtures("no_figure")
def test_predictions_of_some_cells_only(tmp_path, capsys):
    make_sweep(tmp_path, PLANTED)
    (tmp_path / "cell_random_0.25_0" / "predictions.csv").unlink()
    assert main(["compare", str(tmp_path)]) == 0
    assert "No predictions.csv for 1 of 28 runs: tests on sentences leave them out." in capsys.readouterr().out


def test_predictions_of_another_evaluation_set_are_refused(tmp_path, capsys):
    make_sweep(tmp_path, PLANTED)
    path = tmp_path / "cell_random_0.25_0" / "predictions.csv"
    frame = pd.read_csv(path)
    frame["label"] = 1 - frame["label"]
    frame.to_csv(path, index=False)
    assert main(["compare", str(tmp_path)]) == 2
    assert "not the same evaluation data" in capsys.readouterr().err
    pd.concat([frame, frame]).to_csv(path, index=False)
    assert main(["compare", str(tmp_path)]) == 2
    assert "names a row twice" in capsys.readouterr().err
    path.write_text("row,label\n1,0\n")
    assert main(["compare", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "compare").exists()


# --- the command --------------------------------------------------------------------------------------------------


def test_files_report_and_reproducibility(tmp_path, capsys):
    make_sweep(tmp_path, PLANTED)
    for name in "ab":
        assert main(["compare", str(tmp_path / "results.csv"), "--out_dir", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    names = ["accuracy_against_keep_ratio.csv", "accuracy_against_keep_ratio.png", "compare.md"]
    names += ["comparisons.csv", "mcnemar.csv"]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["outputs"] == names
    assert str(tmp_path) not in (tmp_path / "a" / "run.json").read_text()
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    report = (tmp_path / "a" / "compare.md").read_text()
    assert "it separates" in report
    assert report.count("\n| ") > 20
    assert report.split("## ")[1].strip() in out
    cells = pd.read_csv(tmp_path / "a" / "accuracy_against_keep_ratio.csv")
    assert cells.groupby("method")["moment"].unique().map(list)["random"] == ["before", "right_after", "after"]
    assert cells["n_seeds"].tolist() == [4] * len(cells)
    assert main(["compare", str(tmp_path / "results.csv"), "--out_dir", str(tmp_path / "a")]) == 0
    assert "already finished" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figure")
def test_another_seed_changes_the_bootstrap_and_nothing_else(tmp_path):
    make_sweep(tmp_path, PLANTED)
    tables = []
    for seed in ("0", "1"):
        assert main(["compare", str(tmp_path), "--seed", seed, "--out_dir", str(tmp_path / seed)]) == 0
        tables.append(pd.read_csv(tmp_path / seed / "comparisons.csv"))
    drawn = {"sentence_ci_low", "sentence_ci_high", "bootstrap_p", "bootstrap_p_holm"}
    differ = {name for name in tables[0] if not tables[0][name].equals(tables[1][name])}
    assert differ
    assert differ <= drawn


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, "no table at"),
        (lambda t: t.drop(columns=["metric_right_after", "lr"]), "lacks the columns lr, metric_right_after"),
        (lambda t: t.iloc[:0], "holds no run"),
        (
            lambda t: t.assign(metric_after=t["metric_after"].astype(str).where(t.index != 3, "high")),
            r"row 5: column metric_after",
        ),
        (lambda t: t.assign(metric_before=float("nan")), "column metric_before must be a number"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "two runs of channel_energy"),
        ("", "not a CSV table"),
        (b"\xff\xfe\x00", "not a CSV table"),
    ],
)
def test_bad_tables_are_one_line_and_write_nothing(tmp_path, capsys, change, says):
    path = tmp_path / "results.csv"
    if isinstance(change, str):
        path.write_text(change)
    elif isinstance(change, bytes):
        path.write_bytes(change)
    elif change is not None:
        change(make_sweep(tmp_path, predictions=False)).to_csv(path, index=False)
    assert main(["compare", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(says, err)
    assert not (tmp_path / "compare").exists()


def test_dry_run_writes_nothing(tmp_path, capsys):
    make_sweep(tmp_path, predictions=False)
    assert main(["compare", str(tmp_path), "--dry_run"]) == 0
    assert "comparisons.csv" in capsys.readouterr().out
    assert not (tmp_path / "compare").exists()


# --- language models ----------------------------------------------------------------------------------------------


def make_loss_sweep(
    folder: Path, cost: dict[str, float], *, seeds=range(5), rows: int = 120, **settings: object
) -> None:
    """Write a sweep of a language model, in which a method adds its cost to every label, right after twice."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 40, size=rows)
    table = []
    for seed in seeds:
        base = rng.uniform(0.4, 1.0, size=rows) + rng.normal(0, 0.02)  # nats a label
        for method in (CONTROL, *cost):
            added = cost[method] + rng.normal(0, 0.002) if method != CONTROL else 0.0
            loss = {"before": base, "right_after": base + 2 * added, "after": base - 0.1 + added}
            run = f"cell_{method}_{seed}"
            (folder / run).mkdir(parents=True)
            summed = {name: value * tokens for name, value in loss.items()}
            pd.DataFrame({"row": np.arange(rows), "tokens": tokens, **summed}).to_csv(
                folder / run / "predictions.csv", index=False
            )
            keep = 1.0 if method == CONTROL else 0.25
            row = dict.fromkeys(COLUMNS, 1)
            row |= {"model": "llama", "dataset": "rows", "method": method, "keep_ratio": keep, "lora_r": 16}
            row |= {"effective_r": 16 * keep, "seed": seed, "metric": "answer_loss", "scope": "module"}
            row |= {f"metric_{name}": float(value.sum() / tokens.sum()) for name, value in summed.items()}
            row |= {"masked": False, "target_modules": "q_proj", "run_id": run, "run_dir": run}
            table.append(row | settings)
    pd.DataFrame(table, columns=COLUMNS).to_csv(folder / "results.csv", index=False)


def test_planted_costs_of_a_language_model_are_read_in_nats(tmp_path: Path) -> None:
    make_loss_sweep(tmp_path, {"svd": 0.01, "random": 0.05})
    (study,) = read_sweep(tmp_path / "results.csv")
    table, exact = compare(study, np.random.SeedSequence(0))
    assert exact.empty  # no answer is right or wrong
    after = _row(table, "svd", 0.25, "after", "random")
    assert after["difference"] == pytest.approx(-0.04, abs=5e-3)
    assert after["sentence_difference"] == pytest.approx(after["difference"], abs=1e-4)
    assert _row(table, "svd", 0.25, "right_after", CONTROL)["difference"] == pytest.approx(0.02, abs=5e-3)


@pytest.mark.parametrize(("cost", "separates"), [(0.05, True), (0.0, False), (-0.05, False)])
def test_the_control_of_a_loss_is_separated_where_it_is_lower(tmp_path: Path, cost: float, separates: bool) -> None:
    make_loss_sweep(tmp_path, {"random": cost})
    control = positive_control(read_sweep(tmp_path / "results.csv")[0], np.random.SeedSequence(0))
    assert control.difference == pytest.approx(-2 * cost, abs=5e-3)
    assert control.is_separated == separates


def test_the_page_of_a_language_model_has_no_words_of_classes(tmp_path: Path) -> None:
    make_loss_sweep(tmp_path, {"svd": 0.01, "random": 0.05})
    study = tmp_path / "study.yaml"
    study.write_text(
        "contrasts:\n  - {first: svd@0.25, second: random@0.25, endpoint: after}\n"
        "  - {first: random@0.25, second: no_prune, endpoint: after}\n"
    )
    assert main(["compare", str(tmp_path), "--study", str(study), "--out_dir", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    assert pd.read_csv(out / "contrasts.csv")["verdict"].tolist() == ["better", "worse"]
    page = (out / "compare.md").read_text(encoding="utf-8")
    assert "lower is better" in page
    for word in ("accuracy", "sentence", "McNemar"):
        assert word not in page
    names = {path.name for path in out.iterdir()}
    assert {"loss_against_keep_ratio.csv", "loss_against_keep_ratio.png"} <= names
    assert "mcnemar.csv" not in names


def test_cells_of_language_models_and_of_classifiers_are_not_mixed(tmp_path: Path, capsys) -> None:
    make_loss_sweep(tmp_path / "causal", {"random": 0.05})
    make_sweep(tmp_path / "classes", predictions=False)
    tables = [pd.read_csv(tmp_path / name / "results.csv") for name in ("causal", "classes")]
    (tmp_path / "both").mkdir()
    pd.concat(tables).to_csv(tmp_path / "both" / "results.csv", index=False)
    assert main(["compare", str(tmp_path / "both"), "--out_dir", str(tmp_path / "out")]) == 2
    assert "no metric in common; give each a folder of its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_language_models_evaluated_on_other_rows_are_refused(tmp_path: Path) -> None:
    make_loss_sweep(tmp_path, {"random": 0.05})
    path = tmp_path / "cell_random_3" / "predictions.csv"
    pd.read_csv(path).assign(tokens=lambda rows: rows["tokens"] + 1).to_csv(path, index=False)
    with pytest.raises(InputError, match="has other tokens than its siblings"):
        read_sweep(tmp_path / "results.csv")
