"""The tables that `compare` makes of many edits: adapters count, not runs; what is chosen; what was predicted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sparselora.__main__ import main
from sparselora.compare.edit_tables import (
    FITS,
    REPORTING,
    SELECTION,
    config_table,
    fit,
    half_of,
    over_adapters,
    prediction_table,
    run_table,
    selection_table,
)
from sparselora.compare.edits import read_edits

N = 40
LABELS = 2
DRAWS = 20


def save_edit(
    folder: Path, mode: str, seed: int, change, adapter: str = "a", rivals: dict | None = None, **arguments: object
) -> Path:
    """An edit's record and report as `edit` leaves them: its loss is ``change`` (a number, or one a row) nats a label
    above that of the unedited adapter, the draws' are on the mean 0.01 above it; ``rivals`` are further variants, each
    with its kind and its own change."""
    from sparselora.spectral.edit import BOOTSTRAP, generator
    from sparselora.spectral.verdict import compare

    plain = 2.0 + 0.01 * np.arange(N)
    losses = {"no adapter": plain + 1, "unedited": plain, "round trip": plain, mode: plain + change}
    losses |= {f"draw {i}": plain + 0.01 + 0.001 * (i - 9.5) for i in range(DRAWS)}
    kinds = dict(zip(losses, ["base", "unedited", "round_trip", "edit", *["draw"] * DRAWS]))
    for name, (kind, beyond) in (rivals or {}).items():
        losses[name], kinds[name] = plain + beyond, kind
    parts = [
        pd.DataFrame({"variant": name, "row": range(N), "loss": LABELS * loss, "tokens": LABELS})
        for name, loss in losses.items()
    ]
    items = pd.concat(parts, ignore_index=True)
    facts = pd.DataFrame({"variant": losses.keys(), "kind": kinds.values(), "change_l2": 1.0})
    facts = facts.assign(predicted_first=0.5, predicted_second=0.25)
    folder.mkdir(parents=True)
    compare(items, facts, generator(seed, BOOTSTRAP)).table.to_csv(folder / "report.csv", index=False)
    items.to_csv(folder / "report_items.csv", index=False)
    known = {"adapter": {"name": adapter, "sha256": adapter}, "model": "m", "dataset": "d", "mode": mode}
    known |= {"seed": seed, "core_frac": 0.2, **arguments}
    record = {"command": "edit", "status": "success", "fingerprint": folder.name, "seed": seed, "arguments": known}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_the_tables_are_what_one_computes_by_hand(tmp_path, capsys):
    changes = {"abs_select": [-0.02, -0.04, -0.03], "gd": [0.01, 0.03, 0.05]}
    for mode, values in changes.items():
        for number, change in enumerate(values):  # the mean of two seeds of each of three adapters
            for seed in range(2):
                apart = (seed - 0.5) * 0.002
                save_edit(tmp_path / f"{mode}{number}{seed}", mode, seed, change + apart, f"a{number}")
    (save_edit(tmp_path / "half", "gd", 9, 0.0) / "report.csv").unlink()
    assert main(["compare", str(tmp_path)]) == 0
    out = tmp_path / "compare"
    runs = pd.read_csv(out / "edits.csv").set_index("name")
    assert len(runs) == 12
    assert runs["unedited_loss"].to_numpy() == pytest.approx(2.0 + 0.01 * (N - 1) / 2)
    assert runs.loc["gd11", "loss_change"] == pytest.approx(0.031)
    assert runs.loc["gd11", "null_gap"] == pytest.approx(0.021)
    assert runs.loc["abs_select00", "rank_p"] == pytest.approx(1 / 21)
    lines = {line.split("|")[1].strip(): line for line in (out / "compare.md").read_text().splitlines() if "|" in line}
    assert "≤0.048" in lines["abs_select00"]  # the best rank that twenty draws have
    assert "≤" not in lines["gd00"]
    assert runs["verdict"].to_dict() == {
        **{f"abs_select{i}{seed}": "better" for i in range(3) for seed in range(2)},
        **{f"gd0{seed}": "not distinguishable" for seed in range(2)},
        **{f"gd{i}{seed}": "worse" for i in (1, 2) for seed in range(2)},
    }  # fmt: skip
    configs = pd.read_csv(out / "configs.csv").set_index("config")
    assert list(configs.index) == ["abs_select", "gd"]
    half = 4.302652729911275 * 0.01 / np.sqrt(3)  # t of 2 degrees of freedom; the spread is 0.01
    best = configs.loc["abs_select"]
    assert best[["loss_change", "loss_change_low", "loss_change_high"]].tolist() == pytest.approx(
        [-0.03, -0.03 - half, -0.03 + half]
    )
    assert best["null_gap"] == pytest.approx(-0.04)
    # t = 3·√3 and 1.5·√3 at two degrees of freedom; Holm doubles the smaller.
    p = {3.0: 0.0350988, 1.5: 0.1217}
    assert configs["loss_change_p"].tolist() == pytest.approx(list(p.values()), rel=1e-3)
    assert configs["loss_change_p_holm"].tolist() == pytest.approx([2 * p[3.0], p[1.5]], rel=1e-3)
    assert configs[["better", "worse"]].to_numpy().tolist() == [[6, 0], [0, 4]]
    assert configs[["n_runs", "n_adapters", "loss_change_n"]].to_numpy().tolist() == [[6, 3, 3]] * 2
    adapters = pd.read_csv(out / "adapters.csv").set_index(["config", "adapter"])
    assert adapters["loss_change"].tolist() == pytest.approx(changes["abs_select"] + changes["gd"])
    chosen = pd.read_csv(out / "selection.csv").iloc[0]
    assert (chosen["n_runs"], chosen["n_adapters"]) == (6, 3)
    assert chosen[["loss_change_low", "loss_change_high"]].tolist() == pytest.approx([-0.03 - half, -0.03 + half])
    text = (out / "compare.md").read_text()
    assert "of 2 configurations **abs_select** has the lowest" in text
    assert "1 edits are left out" in text
    assert str(tmp_path) not in text + (out / "run.json").read_text()
    assert "6 runs of 3 adapters" in text
    for name in ("edit_configs.png", "edit_configs.csv", "prediction.png", "prediction_points.csv", "prediction.csv"):
        assert (out / name).is_file()
    # Its own folder is beside the runs, and the same call is done.
    capsys.readouterr()
    assert main(["compare", str(tmp_path)]) == 0
    assert "already finished" in capsys.readouterr().out


def test_the_halves_are_disjoint_and_whole_and_the_same_for_every_run(tmp_path):

    halves = {half: {row for row in range(1000) if half_of(row) == half} for half in (SELECTION, REPORTING)}
    assert not halves[SELECTION] & halves[REPORTING]
    assert halves[SELECTION] | halves[REPORTING] == set(range(1000))
    assert 400 < len(halves[SELECTION]) < 600


def test_the_best_is_chosen_on_one_half_and_reported_on_the_other(tmp_path):
    """One that only looks good where it is chosen: reported on the same rows it would be a success."""

    chosen = np.array([half_of(row) == SELECTION for row in range(N)])
    for seed in range(2):
        save_edit(tmp_path / f"lucky{seed}", "gd", seed, np.where(chosen, -0.5, 0.25), core_frac=0.1)
        save_edit(tmp_path / f"honest{seed}", "gd", seed, np.where(chosen, -0.1, -0.2))
    # The best of all, but with one run less than the others.
    save_edit(tmp_path / "once", "gd", 0, -9.0, core_frac=0.9)
    edits = read_edits([tmp_path])
    (row,) = selection_table(edits).to_dict("records")
    assert row["config"] == "gd, core_frac 0.1"
    assert (row["n_configs"], row["n_runs"]) == (2, 2)
    assert row["selection_change"] == pytest.approx(-0.5)
    assert row["loss_change"] == pytest.approx(0.25)
    assert row["null_gap"] == pytest.approx(0.24)
    assert (row["selection_rows"], row["reporting_rows"]) == (chosen.sum(), N - chosen.sum())


def test_adapters_and_data_are_told_apart(tmp_path):

    save_edit(tmp_path / "r0", "gd", 0, 0.1)
    save_edit(tmp_path / "r1", "gd", 0, 0.2, adapter="other")
    record = json.loads((tmp_path / "r1" / "run.json").read_text())
    known = record["arguments"]  # as a run recorded them before flags had the same names in all commands
    known |= {"lora_path": known.pop("adapter") | {"name": "a"}, "base_model": known.pop("model")}
    (tmp_path / "r1" / "run.json").write_text(json.dumps(record))
    save_edit(tmp_path / "r2", "gd", 0, 0.3, dataset={"name": "rows.csv", "sha256": "x"})
    edits = read_edits([tmp_path])
    assert len({run.adapter for run in edits.runs}) == 2
    assert edits.runs[0].adapter.startswith("a@")
    assert [run.study for run in edits.runs] == ["m on d", "m on d", "m on rows.csv"]
    configs = config_table(run_table(edits, np.random.default_rng))
    assert configs[["study", "n_runs", "n_adapters"]].to_numpy().tolist() == [["m on d", 2, 2], ["m on rows.csv", 1, 1]]


def test_edits_without_a_report_and_other_runs_are_refused(tmp_path, capsys):
    (save_edit(tmp_path / "e" / "r", "gd", 0, 0.1) / "report.csv").unlink()
    (tmp_path / "none").mkdir()
    whole = save_edit(tmp_path / "w" / "r", "gd", 0, 0.1)
    for flags, said in (
        (["e"], "run them with --report"),
        (["w", "none"], "holds no run of edit"),
        (["w", "--baseline", "w"], "--baseline is for runs of train"),
    ):
        words = [word if word.startswith("--") else str(tmp_path / word) for word in flags]
        assert main(["compare", *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["compare", str(whole), "--dry_run"]) == 0
    assert str(tmp_path / "w" / "compare" / "edits.csv") in capsys.readouterr().out
    assert not (tmp_path / "w" / "compare").exists()


# --- over adapters ------------------------------------------------------------------------------------------------


def values(*runs: tuple[str, float]) -> pd.DataFrame:
    return pd.DataFrame(runs, columns=["adapter", "x"])


@pytest.mark.parametrize("seed", range(5))
def test_a_mean_over_adapters_is_a_t_test_of_their_means(seed):
    rng = np.random.default_rng(seed)
    runs = pd.DataFrame({"adapter": rng.choice(list("abcd"), 30), "x": rng.normal(0.3, 1, 30)})
    means = [runs.loc[runs["adapter"] == name, "x"].mean() for name in "abcd"]
    oracle = stats.ttest_1samp(means, 0.0)
    found = over_adapters(runs, "x")
    assert found["x_n"] == 4
    assert found["x"] == pytest.approx(np.mean(means))
    assert (found["x_low"], found["x_high"]) == pytest.approx(tuple(oracle.confidence_interval(0.95)))
    assert found["x_p"] == pytest.approx(oracle.pvalue)
    # The control: over runs as if they were independent the interval is another.
    assert found["x_low"] != pytest.approx(stats.ttest_1samp(runs["x"], 0.0).confidence_interval(0.95).low, rel=1e-3)


def test_more_seeds_of_the_same_adapters_do_not_narrow_the_interval():
    few = values(("a", 0.1), ("a", 0.3), ("b", 0.5), ("c", 0.4))
    many = pd.concat([few] * 10, ignore_index=True)
    assert over_adapters(many, "x") == pytest.approx(over_adapters(few, "x"))
    # Nor does an adapter with more seeds weigh more.
    uneven = pd.concat([few, *[values(("b", 0.5))] * 20], ignore_index=True)
    assert over_adapters(uneven, "x") == pytest.approx(over_adapters(few, "x"))
    # The control: more adapters do narrow it.
    apart = pd.concat([few.assign(adapter=few["adapter"] + str(i)) for i in range(10)], ignore_index=True)
    widths = [found["x_high"] - found["x_low"] for found in (over_adapters(runs, "x") for runs in (few, apart))]
    assert widths[1] < widths[0] / 3


def test_what_is_not_known_does_not_count():
    nan = float("nan")
    known = values(("a", 1.0), ("b", 2.0), ("c", 4.0))
    assert over_adapters(pd.concat([known, values(("a", nan), ("d", nan))]), "x") == over_adapters(known, "x")
    one = over_adapters(values(("a", 1.0), ("a", 3.0)), "x")
    assert (one["x"], one["x_n"]) == (2.0, 1)
    assert np.isnan([one[f"x_{name}"] for name in ("low", "high", "p")]).all()
    none = over_adapters(values(("a", nan)), "x")
    assert none["x_n"] == 0
    assert np.isnan(none["x"])


def test_one_adapter_has_no_interval_and_is_shown_so(tmp_path):
    for seed in range(4):
        save_edit(tmp_path / f"r{seed}", "gd", seed, 0.02 + 0.001 * seed)
    assert main(["compare", str(tmp_path)]) == 0
    out = tmp_path / "compare"
    configs = pd.read_csv(out / "configs.csv").iloc[0]
    assert (configs["n_runs"], configs["n_adapters"]) == (4, 1)
    assert configs["loss_change"] == pytest.approx(0.0215)
    empty = ["loss_change_low", "loss_change_high", "loss_change_p", "loss_change_p_holm", "null_gap_low", "null_gap_p"]
    assert configs[empty].isna().all()
    text = (out / "compare.md").read_text()
    assert "One adapter: there is no interval and no p over adapters." in text
    assert "4 runs of one adapter: no interval over adapters" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| gd ") and " of 4 " in line]
    assert "+0.02150 |" in line
    assert "[" not in line


def test_adapters_that_do_not_help_are_named_in_one_line(tmp_path):
    """Of adapter b the loss without it is made that with it, but for noise around 0."""
    for adapter in ("a", "b"):
        folder = save_edit(tmp_path / adapter, "gd", 0, 0.02, adapter=adapter)
    items = pd.read_csv(folder / "report_items.csv")
    plain = items.loc[items["variant"] == "unedited", "loss"].to_numpy()
    items.loc[items["variant"] == "no adapter", "loss"] = plain + 0.1 * (-1.0) ** np.arange(N)
    items.to_csv(folder / "report_items.csv", index=False)
    assert main(["compare", str(tmp_path)]) == 0
    text = (tmp_path / "compare" / "compare.md").read_text()
    (line,) = [line for line in text.splitlines() if "Nothing was learned" in line]
    assert line.startswith("**Nothing was learned** by the adapters b:")


def test_a_configuration_of_fewer_adapters_cannot_be_chosen(tmp_path):
    """It has as many runs as the other, and is better on the one adapter that it was tried on."""

    for number in range(2):
        save_edit(tmp_path / f"both{number}", "gd", 0, -0.1, f"a{number}")
        save_edit(tmp_path / f"one{number}", "gd", number, -0.5, "a0", core_frac=0.9)
    (row,) = selection_table(read_edits([tmp_path])).to_dict("records")
    assert (row["config"], row["n_configs"], row["n_adapters"]) == ("gd, core_frac 0.2", 1, 2)


# --- prediction ---------------------------------------------------------------------------------------------------


def predict(folder: Path, predicted: np.ndarray, there: np.ndarray, held_out: np.ndarray) -> None:
    """Write what was predicted and measured of the edit and its draws into a saved report."""
    table = pd.read_csv(folder / "report.csv")
    edited = table["kind"].isin(["edit", "draw"])
    table.loc[edited, "predicted_second"] = predicted
    table.loc[edited, "calibration_change"] = there
    table.loc[edited, "loss_change"] = held_out
    table.to_csv(folder / "report.csv", index=False)


@pytest.mark.usefixtures("blank_figures")
def test_the_prediction_is_what_one_computes_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    expected: dict[str, list] = {}
    for adapter, seeds in (("a", 3), ("b", 1), ("c", 2)):
        for seed in range(seeds):
            predicted, noise = rng.normal(size=(2, DRAWS + 1))
            predict(save_edit(tmp_path / f"{adapter}{seed}", "gd", seed, 0.1, adapter), predicted, predicted * 3, noise)
            expected.setdefault(adapter, []).append(stats.linregress(predicted, noise))
    assert main(["compare", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "compare" / "prediction.csv").set_index("over")
    assert list(table.index) == ["all", "draws"]
    row = table.loc["all"]
    assert row[["n_runs", "n_adapters", "n_points"]].tolist() == [6, 3, 6 * (DRAWS + 1)]
    assert row[["calibration_correlation", "calibration_slope"]].tolist() == pytest.approx([1, 3])
    for name, attribute in (("correlation", "rvalue"), ("slope", "slope")):
        oracle = stats.ttest_1samp(
            [np.mean([getattr(fit, attribute) for fit in fits]) for fits in expected.values()], 0
        )
        interval = oracle.confidence_interval(0.95)
        found = row[[f"held_out_{name}_low", f"held_out_{name}_high"]].tolist()
        assert found == pytest.approx([interval.low, interval.high])
    points = pd.read_csv(tmp_path / "compare" / "prediction_points.csv")
    assert len(points) == 6 * (DRAWS + 1)
    assert set(points["kind"]) == {"edit", "draw"}
    runs = pd.read_csv(tmp_path / "compare" / "edits.csv").set_index("name")
    assert runs.loc["b0", "held_out_correlation"] == pytest.approx(expected["b"][0].rvalue)


def test_the_edit_alone_can_carry_the_correlation_over_all_but_not_that_over_draws(tmp_path):

    rng = np.random.default_rng(1)
    predicted, measured = rng.normal(size=(2, DRAWS + 1))
    predicted[0] = measured[0] = -100.0
    predict(save_edit(tmp_path / "r", "gd", 0, 0.1), predicted, measured, measured)
    table = prediction_table(read_edits([tmp_path])).set_index("over")
    assert table.loc["all", "held_out_correlation"] > 0.95
    assert table.loc["draws", "held_out_correlation"] == pytest.approx(np.corrcoef(predicted[1:], measured[1:])[0, 1])


def test_modes_have_a_row_each_and_one_together(tmp_path):

    for mode in ("gd", "abs_select"):
        save_edit(tmp_path / mode, mode, 0, 0.1)
    table = prediction_table(read_edits([tmp_path]))
    assert list(table["mode"].unique()) == ["abs_select", "gd", "all modes"]
    # All were predicted alike: there is no correlation, and nothing on calibration rows was measured.
    assert table[list(FITS)].isna().all(axis=None)


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, np.nan], [1.0, 2.0, 3.0])]
)
def test_too_few_or_equal_predictions_have_no_fit(x, y):
    assert np.isnan(fit(np.array(x), np.array(y))).all()


def test_the_figure_of_predictions_takes_any_values(tmp_path):
    from sparselora.report.spectral import predictions

    rng = np.random.default_rng(0)
    points = pd.DataFrame({"study": "s", "mode": "gd", "name": "r", "kind": ["edit", "signed"] + ["draw"] * 10})
    wide, narrow = 10.0 ** rng.uniform(-4, 0, 12), rng.uniform(1, 2, 12)
    for number, values in enumerate((wide, -narrow, np.zeros(12), np.full(12, np.nan))):
        table = points.assign(predicted_second=values, calibration_change=-values, loss_change=np.nan)
        predictions(tmp_path / f"{number}.png", table, "title")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000


# --- draws that are made once -------------------------------------------------------------------------------------


def test_a_run_table_is_the_same_whatever_runs_are_beside_it(tmp_path):

    rng = np.random.default_rng(0)
    paths = [save_edit(tmp_path / f"r{i}", "gd", i % 2, rng.normal(0, 0.1, N), f"a{i % 3}") for i in range(6)]
    together = run_table(read_edits([tmp_path]), np.random.default_rng)
    alone = pd.concat([run_table(read_edits([path]), np.random.default_rng) for path in paths], ignore_index=True)
    pd.testing.assert_frame_equal(together, alone, check_exact=True)
