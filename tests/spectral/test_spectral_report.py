"""The verdict on an edit: its statistics against scipy and brute force, and edits that are known to be good or null."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from sparselora.errors import InputError
from sparselora.spectral.verdict import BETTER, NONE, SAME, WORSE, compare, rank_p, to_markdown

N = 200


def study(
    edit: float = 0.0, draws: int = 20, classify: bool = False, base: float = 0.5, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Losses of N items: draws move each item's by their own noise, the edit by that and ``edit`` nats a label."""
    rng = np.random.default_rng(seed)
    labels = np.ones(N, dtype=int) if classify else rng.integers(5, 30, N)
    unedited = rng.gamma(2.0, 1.0, N) * labels
    moves = {"no adapter": base, "unedited": 0.0, "round trip": 1e-9, "abs_select": edit, "gd": 0.0}
    kinds = dict(zip(moves, ("base", "unedited", "round_trip", "edit", "signed")))
    moves |= {f"draw {i}": 0.0 for i in range(draws)}
    tables, facts = [], []
    for name, move in moves.items():
        noise = 0.0 if name in ("unedited", "round trip") else 0.02 * rng.standard_normal(N)
        table = pd.DataFrame({"variant": name, "row": range(N), "loss": unedited + (move + noise) * labels})
        if classify:
            table["correct"] = (table["loss"] < 1.5).astype(int)
        else:
            table["tokens"] = labels
        tables.append(table)
        facts.append({"variant": name, "kind": kinds.get(name, "draw"), "change_l2": 1.0, "predicted_first": move,
                      "predicted_second": move + 0.1 * rng.standard_normal()})  # fmt: skip
    return pd.concat(tables, ignore_index=True), pd.DataFrame(facts)


def report(seed: int = 0, **options):
    items, facts = study(seed=seed, **options)
    return items, compare(items, facts, np.random.default_rng(1))


# --- the verdict --------------------------------------------------------------------------------------------------


def test_a_planted_better_edit_is_found_and_a_worse_one():
    _, found = report(edit=-0.02)
    assert found.verdict.word == BETTER
    assert found.verdict.better_p == pytest.approx(1 / 21)
    assert found.verdict.gap.high < 0
    assert any("better than its random-index null" in sentence for sentence in found.sentences)
    _, found = report(edit=0.02)
    assert found.verdict.word == WORSE
    assert any("worse than its random-index null" in sentence for sentence in found.sentences)


def test_a_null_edit_is_rarely_taken_for_another():
    words = [report(seed=seed)[1].verdict.word for seed in range(40)]
    # By rank alone, one in 21 on either side; the interval can only make it fewer.
    assert words.count(SAME) >= 40 - scipy_stats.binom.ppf(0.999, 40, 2 / 21)


def test_a_gain_over_the_unedited_adapter_is_none_over_the_null_if_the_draws_gain_too():
    items, facts = study(edit=-0.05)
    chosen = items["variant"].str.startswith("draw")
    items.loc[chosen, "loss"] -= 0.05 * items.loc[chosen, "tokens"]
    found = compare(items, facts, np.random.default_rng(1))
    row = found.table.set_index("kind").loc["edit"]
    assert row["ci_high"] < 0  # better than unedited
    assert found.verdict.word == SAME


def test_few_draws_give_no_verdict():
    for draws in (0, 19):
        _, found = report(edit=-0.1, draws=draws)
        assert found.verdict.word == NONE
        assert any(f"No verdict: {draws} random draws; at least 20" in sentence for sentence in found.sentences)


def test_an_edit_that_is_like_every_draw_is_not_told_apart():
    items, facts = study()
    same = items[items["variant"] == "unedited"]
    items = pd.concat([same.assign(variant=name) for name in facts["variant"]], ignore_index=True)
    found = compare(items, facts, np.random.default_rng(1))
    assert (found.verdict.word, found.verdict.better_p, found.verdict.worse_p) == (SAME, 1.0, 1.0)


# --- the statistics -----------------------------------------------------------------------------------------------


def test_rank_p_counts_ties_and_is_exact_under_exchange():
    assert rank_p(1.0, np.array([0.5, 1.0, 2.0])) == 3 / 4
    values = np.random.default_rng(0).standard_normal(20)
    # Whichever of exchangeable values is the edit, p is at most 0.05 k of the times for each k.
    found = sorted(rank_p(values[i], np.delete(values, i)) for i in range(20))
    assert found == pytest.approx([(i + 1) / 20 for i in range(20)])


def test_losses_and_changes_are_those_of_brute_force():
    items, found = report(edit=-0.01)
    table = found.table.set_index("variant")
    wide = items.pivot(index="row", columns="variant", values="loss")
    tokens = items[items["variant"] == "unedited"]["tokens"].to_numpy()
    for name in wide:
        assert table.loc[name, "loss"] == pytest.approx(wide[name].sum() / tokens.sum())
        change = (wide[name] - wide["unedited"]).sum() / tokens.sum()
        assert table.loc[name, "loss_change"] == pytest.approx(change, abs=1e-12)
    draws = [name for name in wide if name.startswith("draw")]
    gap = (wide["abs_select"] - wide[draws].mean(axis=1)).to_numpy()
    assert found.verdict.gap.mean == pytest.approx(gap.sum() / tokens.sum())
    below = sum(wide[name].sum() <= wide["abs_select"].sum() for name in draws)
    assert found.verdict.better_p == (1 + below) / 21


def test_the_interval_is_that_of_scipys_bootstrap():
    items, found = report(edit=-0.01)
    wide = items.pivot(index="row", columns="variant", values="loss")
    tokens = items[items["variant"] == "unedited"]["tokens"].to_numpy()
    gap = (wide["abs_select"] - wide["unedited"]).to_numpy()
    theirs = scipy_stats.bootstrap(
        (gap, tokens), lambda d, n, axis=-1: d.sum(axis=axis) / n.sum(axis=axis), paired=True, n_resamples=4000,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    row = found.table.set_index("variant").loc["abs_select"]
    width = theirs.high - theirs.low
    assert row["ci_low"] == pytest.approx(theirs.low, abs=0.1 * width)
    assert row["ci_high"] == pytest.approx(theirs.high, abs=0.1 * width)


def test_accuracies_are_compared_by_mcnemar():
    items, found = report(edit=-0.3, classify=True)
    answers = items.pivot(index="row", columns="variant", values="correct").astype(bool)
    row = found.table.set_index("variant").loc["abs_select"]
    only, other = (
        (answers["abs_select"] & ~answers["unedited"]).sum(),
        (answers["unedited"] & ~answers["abs_select"]).sum(),
    )
    assert (row["right_only_here"], row["right_only_unedited"]) == (only, other)
    assert row["mcnemar_p"] == pytest.approx(scipy_stats.binomtest(int(only), int(only + other), 0.5).pvalue)
    assert row["accuracy"] == answers["abs_select"].mean()
    assert found.verdict.accuracy_p == 1 / 21
    assert "McNemar p" in to_markdown(found, "title")


def test_the_positive_control_speaks_up():
    _, found = report(base=0.5)
    assert "it helps" in found.sentences[0]
    _, found = report(base=-0.01)
    assert "FAILS" in found.sentences[0]


def test_what_a_classifier_trained_beside_lora_is_the_stricter_control():
    items, facts = study(classify=True, base=2.0)
    alone = items[items["variant"] == "unedited"].assign(variant="no LoRA")
    items = pd.concat([items, alone], ignore_index=True)
    facts = pd.concat([facts, facts[facts["kind"] == "base"].assign(variant="no LoRA", kind="no_lora")])
    found = compare(items, facts, np.random.default_rng(1))
    assert "FAILS" in found.sentences[0]
    assert "in addition to LoRA" in found.sentences[0]


def test_predictions_are_held_against_both_kinds_of_rows():
    items, facts = study(edit=-0.05)
    seen = items.copy()
    by_name = facts.set_index("variant")["predicted_second"]
    base = items[items["variant"] == "unedited"].set_index("row")["loss"]
    seen["loss"] = base[seen["row"]].to_numpy() + seen["variant"].map(by_name) * seen["tokens"]
    seen.loc[seen["variant"] == "unedited", "loss"] = base.to_numpy()
    found = compare(items, facts, np.random.default_rng(1), calibration=seen)
    assert "correlation +1.00 on the calibration rows" in found.sentences[-1]
    edited = found.table[found.table["kind"].isin(["edit", "signed", "draw"])]
    assert edited["calibration_change"].to_numpy() == pytest.approx(edited["predicted_second"].to_numpy())
    assert compare(items, facts, np.random.default_rng(1)).table["calibration_change"].isna().all()


# --- the page and bad input ---------------------------------------------------------------------------------------


def test_the_page_has_a_line_for_every_control_and_one_for_the_draws():
    _, found = report()
    page = to_markdown(found, "a title")
    assert page.startswith("# a title\n")
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["no adapter", "unedited", "round trip", "abs_select (edit)", "gd", "20 draws: mean [range]"]
    assert "nan" not in page


def test_the_same_seed_gives_the_same_report():
    first, second = report()[1], report()[1]
    pd.testing.assert_frame_equal(first.table, second.table, check_exact=True)
    assert first.sentences == second.sentences


def test_other_items_or_no_control_are_refused():
    items, facts = study()
    random = np.random.default_rng(0)
    with pytest.raises(InputError, match="one variant of kind round_trip, got 0"):
        compare(items, facts[facts["kind"] != "round_trip"], random)
    other = items.copy()
    other.loc[other.index[-1], "row"] = 999
    with pytest.raises(InputError, match="draw 19 was evaluated on other items"):
        compare(other, facts, random)
    with pytest.raises(InputError, match="items and variants differ: gd"):
        compare(items[items["variant"] != "gd"], facts, random)
    items.loc[3, "loss"] = math.inf
    with pytest.raises(InputError, match="not finite"):
        compare(items, facts, random)
