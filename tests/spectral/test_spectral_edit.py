from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselora.errors import InputError
from sparselora.numerics.channels import keep_count
from sparselora.spectral.modes import (
    MODES,
    EditOptions,
    EditResult,
    edit_spectrum,
    energy_matched_random,
    predicted_change,
    removal_cost,
)


def statistics(r: int = 10, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(r)
    return {
        "sigma": np.sort(rng.uniform(0.1, 5, r))[::-1].copy(),
        "mean": mean,
        "mean_abs": np.abs(mean) + rng.uniform(0, 1, r),
        "fisher": mean**2 + rng.uniform(0, 1, r),
    }


def edit(mode: str, given: dict[str, np.ndarray] | None = None, seed: int = 0, **options: object) -> EditResult:
    given = given or statistics()
    return edit_spectrum(
        mode,
        **given,
        options=EditOptions(**options),
        generator=np.random.default_rng(seed),
        is_intruder=np.arange(len(given["sigma"])) % 3 == 1,
    )


# --- every mode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_an_edit_that_changes_nothing_changes_no_bit(mode):
    given = statistics()
    result = edit(mode, given, amp_factor=1, sup_factor=1, mid_factor=1, eta=0)
    np.testing.assert_array_equal(result.sigma, given["sigma"])
    assert result.change_l2 == 0
    assert edit(mode, given).change_l2 > 0, "the control: with the defaults every mode does something"
    given["sigma"][3:6] = given["sigma"][3] * (1 - np.array([0, 1e-12, 2e-12]))
    result = edit(mode, given, amp_factor=1, sup_factor=1, eta=0, preserve_energy="l1")
    np.testing.assert_array_equal(result.sigma, given["sigma"])


@pytest.mark.parametrize("mode", MODES)
def test_zero_directions_stay_and_count_for_nothing(mode):
    given = statistics(12)
    longer = {name: np.r_[values, np.zeros(3) if name == "sigma" else 9 * np.ones(3)] for name, values in given.items()}
    plain, padded = edit(mode, given), edit(mode, longer)
    np.testing.assert_array_equal(padded.sigma, np.r_[plain.sigma, 0, 0, 0])
    np.testing.assert_array_equal(padded.role, [*plain.role, "zero", "zero", "zero"])
    nothing = edit(mode, {name: np.zeros(4) for name in given})
    assert not nothing.sigma.any()
    assert nothing.count("zero") == 4


@pytest.mark.parametrize("mode", MODES)
def test_it_is_pure_and_a_function_of_the_directions_not_of_their_scale(mode):
    given = statistics()
    copies = {name: values.copy() for name, values in given.items()}
    first, second = edit(mode, given), edit(mode, given)
    np.testing.assert_array_equal(first.sigma, second.sigma)
    for name in given:
        np.testing.assert_array_equal(given[name], copies[name])
    # ΔW ten times as large has gradients a tenth and Fisher values a hundredth as large.
    scaled = {"sigma": 10 * given["sigma"], "mean": given["mean"] / 10, "mean_abs": given["mean_abs"] / 10,
              "fisher": given["fisher"] / 100}  # fmt: skip
    np.testing.assert_allclose(edit(mode, scaled).sigma, 10 * first.sigma, rtol=1e-12)


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"random_index", "damp_intruders"}))
def test_silent_statistics_are_refused(mode):
    given = statistics()
    silent = {name: values if name == "sigma" else np.zeros_like(values) for name, values in given.items()}
    with pytest.raises(InputError, match="all zero"):
        edit(mode, silent)
    assert edit("random_index", silent).change_l2 > 0


def test_bad_arguments_are_refused():
    given = statistics()
    with pytest.raises(InputError, match="did you mean 'abs_select'"):
        edit("abs_selct", given)
    with pytest.raises(InputError, match="needs a generator"):
        edit_spectrum("random_index", **given, options=EditOptions())
    with pytest.raises(InputError, match="its statistics 9, 10, 10"):
        edit("gd", {**given, "mean": given["mean"][1:]})
    with pytest.raises(InputError, match="mean must be one finite number"):
        edit("gd", {**given, "mean": np.full(10, np.nan)})
    with pytest.raises(InputError, match="sigma must be 0 or more"):
        edit("gd", {**given, "sigma": -given["sigma"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core_frac": 1.2}, "core_frac must be between 0 and 1"),
        ({"noise_frac": -0.1}, "noise_frac must be a finite number of 0 or more"),
        ({"core_frac": 0.7, "noise_frac": 0.4}, "must be at most 1"),
        ({"amp_factor": float("inf")}, "amp_factor must be a finite number"),
        ({"sup_factor": float("nan")}, "sup_factor"),
        ({"mid_factor": "1"}, "mid_factor"),
        ({"eta": -1}, "eta"),
        ({"smooth_width": 0}, "smooth_width must be above 0"),
        ({"update_mode": "adaptive"}, "update_mode must be one of multiplicative, additive"),
        ({"preserve_energy": "l_2"}, "did you mean 'l2'"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        EditOptions(**options)
    assert "\n" not in str(caught.value)


# --- selections ---------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    r=st.integers(1, 70), core=st.sampled_from([0, 0.1, 0.2, 0.25, 0.5, 1]), noise=st.sampled_from([0, 0.1, 0.25, 0.5]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_counts_and_factors_of_a_selection(r, core, noise, seed):
    if core + noise > 1:
        return
    given = statistics(r, seed)
    n_core = keep_count(r, core) if core else 0
    n_noise = min(keep_count(r, noise) if noise else 0, r - n_core)
    for mode in ("abs_select", "random_index", "fisher"):
        result = edit(mode, given, core_frac=core, noise_frac=noise, mid_factor=1.1)
        assert (result.count("core"), result.count("noise")) == (n_core, n_noise)
        factor = np.select([result.role == "core", result.role == "noise"], [1.25, 0.8], 1.1)
        np.testing.assert_allclose(result.sigma, given["sigma"] * factor, rtol=1e-14)
    order = np.argsort(-given["mean_abs"])
    result = edit("abs_select", given, core_frac=core, noise_frac=noise)
    assert set(np.flatnonzero(result.role == "core")) == set(order[:n_core])
    assert set(np.flatnonzero(result.role == "noise")) == set(order[r - n_noise :])


def test_a_quarter_of_ten_is_three():
    assert round(10 * 0.25) == 2, "the control: Python rounds half to even"
    assert edit("abs_select", statistics(10), core_frac=0.25).count("core") == 3


def test_ties_in_sensitivity_go_to_the_larger_sigma():
    given = {**statistics(6), "mean_abs": np.ones(6)}
    assert list(edit("abs_select", given).role) == ["core", "core", "mid", "mid", "noise", "noise"]


def test_random_index_is_drawn_by_its_generator():
    draws = {tuple(edit("random_index", seed=seed).role) for seed in range(20)}
    assert len(draws) > 15
    assert tuple(edit("random_index", seed=3).role) == tuple(edit("random_index", seed=3).role)


def test_fisher_ranks_by_what_removal_costs():
    given = {"sigma": np.array([3.0, 2, 1]), "mean": np.array([1.0, -1, 0]), "mean_abs": np.array([1.0, 1, 9]),
             "fisher": np.array([0.1, 1, 0.1])}  # fmt: skip
    # −σg + σ²F/2: −2.55, 4, 0.05
    np.testing.assert_allclose(removal_cost(*(given[name] for name in ("sigma", "mean", "fisher"))), [-2.55, 4, 0.05])
    assert list(edit("fisher", given).role) == ["noise", "core", "mid"]
    assert list(edit("abs_select", given).role) == ["mid", "noise", "core"]


def test_z_score_lets_the_data_say_how_many():
    given = statistics(10)
    given["mean_abs"] = np.array([1.0] * 8 + [0.0, 20.0])
    assert list(edit("z_score", given).role) == ["mid"] * 9 + ["core"]
    given["mean_abs"] = np.full(10, 0.1)
    assert edit("z_score", given).count("mid") == 10


def test_smooth_abs_is_monotone_between_the_factors_and_sharp_in_the_limit():
    given = statistics(40)
    result = edit("smooth_abs", given)
    factor = (result.sigma / given["sigma"])[np.argsort(given["mean_abs"])]
    assert (np.diff(factor) > 0).all()
    assert factor[0] > 0.8
    assert factor[-1] < 1.25
    sharp = edit("abs_select", given)
    np.testing.assert_allclose(edit("smooth_abs", given, smooth_width=1e-4).sigma, sharp.sigma, rtol=1e-12)
    assert np.abs(result.sigma - sharp.sigma).max() > 0.01


# --- gradient steps -----------------------------------------------------------------------------------------------


def test_gd_goes_down_the_gradient():
    given = statistics()
    g = given["mean"] / np.abs(given["mean"]).max()
    np.testing.assert_allclose(edit("gd", given).sigma, given["sigma"] * np.exp(-0.2 * g), rtol=1e-14)
    added = edit("gd", given, update_mode="additive")
    np.testing.assert_allclose(added.sigma, given["sigma"] - 0.2 * given["sigma"].mean() * g, rtol=1e-14)
    for result in (edit("gd", given), added):
        assert predicted_change(given["sigma"], result.sigma, given["mean"], given["fisher"]).first < 0
        np.testing.assert_array_equal(result.role == "core", result.sigma > given["sigma"])
    both = edit("gd", given, asymmetric_update=True, eta_pos=0.0, eta_neg=0.5)
    np.testing.assert_allclose(both.sigma, given["sigma"] * np.exp(np.where(g < 0, -0.5 * g, 0)), rtol=1e-14)
    np.testing.assert_array_equal(edit("gd", given, eta_pos=9.0).sigma, edit("gd", given).sigma)


def test_additive_steps_are_clipped_after_energy_is_restored():
    given = {"sigma": np.array([4.0, 1, 0.1]), "mean": np.array([-1.0, 0, 1]), "mean_abs": np.ones(3),
             "fisher": np.ones(3)}  # fmt: skip
    step = 0.2 * 1.7
    raw = np.array([4 + step, 1, 0.1 - step])
    assert raw[2] < 0
    plain = edit("gd", given, update_mode="additive")
    np.testing.assert_allclose(plain.sigma, [4 + step, 1, 0])
    kept = edit("gd", given, update_mode="additive", preserve_energy="l1")
    np.testing.assert_allclose(kept.sigma, np.maximum(raw * 5.1 / np.abs(raw).sum(), 0))
    assert kept.sigma.sum() < 5.1, "the control: clipped first, the sum would be restored"


# --- equal singular values ----------------------------------------------------------------------------------------


def test_equal_values_are_one_space_whatever_its_basis():
    rng = np.random.default_rng(0)
    G = rng.standard_normal((8, 8))  # ∂L/∂ΔW in the singular bases
    sigma = np.array([5.0, 2, 2, 2 * (1 - 1e-12), 1, 0.5, 0.4, 0.3])
    turn = np.eye(8)
    turn[1:4, 1:4] = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    updates = []
    for basis in (np.eye(8), turn):
        mean = np.diag(basis.T @ G @ basis)
        given = {"sigma": sigma, "mean": mean, "mean_abs": np.abs(mean), "fisher": mean**2}
        new = edit("gd", given).sigma
        assert np.ptp(new[1:4]) < 1e-9
        updates.append(basis @ np.diag(new) @ basis.T)
        # The control: neither is the statistic of a single direction the same.
        assert np.ptp(mean[1:4]) > 0.1
    np.testing.assert_allclose(updates[0], updates[1], atol=1e-9)


def test_a_selection_through_a_space_of_equal_values_does_not_split_it():
    given = {"sigma": np.full(5, 2.0), "mean": np.arange(5.0), "mean_abs": np.arange(5.0), "fisher": np.ones(5)}
    result = edit("abs_select", given)
    np.testing.assert_allclose(result.sigma, 2 * (1.25 + 3 + 0.8) / 5)
    assert (result.count("core"), result.count("noise")) == (1, 1)
    distinct = {**given, "sigma": np.array([2.0, 1.9, 1.8, 1.7, 1.6])}
    np.testing.assert_allclose(edit("abs_select", distinct).sigma, distinct["sigma"] * [0.8, 1, 1, 1, 1.25])


# --- energy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_energy_is_preserved_in_the_norm_that_is_named(mode):
    given = statistics()
    sigma = given["sigma"]
    l1, l2 = (edit(mode, given, preserve_energy=name, mid_factor=0.9).sigma for name in ("l1", "l2"))
    assert l1.sum() == pytest.approx(sigma.sum(), rel=1e-13)
    assert np.linalg.norm(l2) == pytest.approx(np.linalg.norm(sigma), rel=1e-13)
    assert abs(np.linalg.norm(l1) / np.linalg.norm(sigma) - 1) > 1e-6, "the control: l1 does not preserve l2"


def test_nothing_can_be_restored_from_nothing():
    zero = {"amp_factor": 0, "mid_factor": 0, "sup_factor": 0}
    assert not edit("abs_select", **zero).sigma.any()
    with pytest.raises(InputError, match="cannot restore"):
        edit("abs_select", **zero, preserve_energy="l2")


def test_predictions():
    given = statistics()
    sigma, mean, fisher = given["sigma"], given["mean"], given["fisher"]
    gone = predicted_change(sigma, np.zeros(10), mean, fisher)
    assert gone.second == pytest.approx(removal_cost(sigma, mean, fisher).sum())
    assert gone.first == pytest.approx(-sigma @ mean)
    assert predicted_change(sigma, sigma, mean, fisher).second == 0
    # Exact where the loss is a quadratic with that curvature.
    new = edit("abs_select", given).sigma

    def loss(s: np.ndarray) -> float:
        return float(mean @ (s - sigma) + fisher @ (s - sigma) ** 2 / 2)

    assert predicted_change(sigma, new, mean, fisher).second == pytest.approx(loss(new))


# --- the null -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(sorted(MODES)), r=st.integers(3, 40), seed=st.integers(0, 20),
    energy=st.sampled_from(["none", "l1", "l2"]), sup=st.sampled_from([0.8, 0.0]),
)  # fmt: skip
def test_a_draw_is_matched_in_the_norm_of_the_change(mode, r, seed, energy, sup):
    given = statistics(r, seed)
    edited = edit(mode, given, preserve_energy=energy, sup_factor=sup, amp_factor=2.0)
    draw = energy_matched_random(given["sigma"], edited, np.random.default_rng(seed))
    assert draw.change_l2 == pytest.approx(edited.change_l2, rel=1e-9)
    assert draw.change_l2 == pytest.approx(np.linalg.norm(draw.sigma - given["sigma"]), rel=1e-12)
    assert (draw.sigma >= 0).all()
    assert sorted(draw.role) == sorted(edited.role)


def test_unmatched_draws_are_no_null():
    given = statistics(30)
    edited = edit("abs_select", given)
    rng = np.random.default_rng(0)
    matched = [energy_matched_random(given["sigma"], edited, rng) for _ in range(20)]
    assert len({draw.sigma.tobytes() for draw in matched}) == 20
    np.testing.assert_allclose([draw.change_l2 for draw in matched], edited.change_l2, rtol=1e-9)
    raw = [edit("random_index", given, seed=seed).change_l2 for seed in range(20)]
    assert np.ptp(raw) > 0.05 * edited.change_l2
    # Up to that stretch a draw is one of random_index.
    factor = matched[0].sigma / given["sigma"] - 1
    stretch = factor[matched[0].role == "core"] / 0.25
    np.testing.assert_allclose(stretch, stretch[0])
    np.testing.assert_allclose(factor[matched[0].role == "noise"], -0.2 * stretch[0])
    np.testing.assert_allclose(factor[matched[0].role == "mid"], 0, atol=1e-15)


def test_draws_that_cannot_reach_the_norm_are_drawn_again():
    sigma = np.array([10.0, 1, 1.1, 1.2, 1.3])
    edited = EditResult(np.r_[0.0, sigma[1:]], np.array(["noise", "mid", "mid", "mid", "mid"]), 10.0)
    draw = energy_matched_random(sigma, edited, np.random.default_rng(0))
    np.testing.assert_allclose(draw.sigma, edited.sigma)  # only this one can
    same = energy_matched_random(sigma, EditResult(sigma, edited.role, 0.0), np.random.default_rng(0))
    np.testing.assert_array_equal(same.sigma, sigma)
    with pytest.raises(InputError, match="no random draw"):
        energy_matched_random(sigma, EditResult(edited.sigma, edited.role, 99.0), np.random.default_rng(0))
