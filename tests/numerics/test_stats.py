from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from sparselora.errors import InputError
from sparselora.numerics.stats import (
    auc,
    bootstrap_draws,
    column_intervals,
    compare_paired,
    equivalence_p,
    holm,
    is_bootstrap_floor,
    mcnemar,
    mean_interval,
    noninferiority_p,
    paired_bootstrap,
    rank_correlation,
    ratio_of_means,
    smallest_detectable_difference,
    step_down,
)


def _brute_force_wilcoxon(d: np.ndarray) -> float:
    """Two-sided p of the signed-rank sum over all 2^n sign assignments, mid-ranks, zeros dropped."""
    d = d[d != 0]
    ranks = scipy_stats.rankdata(np.abs(d))
    centre = ranks.sum() / 2
    observed = abs(ranks[d > 0].sum() - centre)
    sums = [sum(r for r, sign in zip(ranks, signs) if sign) for signs in itertools.product([0, 1], repeat=len(d))]
    return float(np.mean([abs(total - centre) >= observed - 1e-9 for total in sums]))


# --- intervals ----------------------------------------------------------------------------------------------------


def test_mean_interval_is_students_t():
    x = np.array([2.0, 4.0, 4.0, 5.0, 9.0])
    got = mean_interval(x)
    low, high = scipy_stats.t.interval(0.95, 4, loc=x.mean(), scale=scipy_stats.sem(x))
    assert (got.n, got.mean) == (5, 4.8)
    assert got.std == pytest.approx(math.sqrt(((x - 4.8) ** 2).sum() / 4), rel=1e-14)
    assert (got.low, got.high) == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))
    assert type(got.low) is float


def test_mean_interval_of_one_value_has_no_width_and_of_none_is_refused():
    one = mean_interval([3.0])
    assert one.mean == 3.0
    assert all(math.isnan(value) for value in (one.std, one.low, one.high))
    with pytest.raises(InputError, match="no values"):
        mean_interval([])


def test_mean_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(7)
    trials, hits_95, hits_normal = 2000, 0, 0
    for x in rng.normal(1.5, 2.0, size=(trials, 4)):
        interval = mean_interval(x)
        hits_95 += interval.low <= 1.5 <= interval.high
        # The control: 1.96 standard errors, the normal quantile, is too narrow for four values.
        hits_normal += abs(x.mean() - 1.5) <= 1.96 * interval.std / 2
    standard_error = math.sqrt(0.95 * 0.05 / trials)
    assert abs(hits_95 / trials - 0.95) < 4 * standard_error
    assert hits_normal / trials < 0.95 - 4 * standard_error


# --- paired comparison --------------------------------------------------------------------------------------------


def test_t_test_and_effect_size_against_scipy_and_by_hand():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=12), rng.normal(0.4, 1, size=12)
    got = compare_paired(a, b)
    assert got.t_p == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert got.cohens_dz == pytest.approx((a - b).mean() / (a - b).std(ddof=1), rel=1e-9)
    assert got.ci_low < got.mean_difference < got.ci_high
    assert (got.ci_low > 0 or got.ci_high < 0) == (got.t_p < 0.05)


@pytest.mark.parametrize(
    "differences",
    [
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        [0.1, -0.2, 0.3, 0.4, 0.7, 0.9],
        [0.1, 0.1, -0.1, 0.3, 0.3, 0.3, -0.3],
        [0.0, 0.0, 0.2, -0.5, 0.2, 0.9],
        [1.0, 2.0, -3.0, 4.0, 5.0, -6.0, 7.0, 8.0, 9.0],
    ],
)
def test_wilcoxon_equals_all_sign_flips(differences):
    d = np.array(differences)
    got = compare_paired(d, np.zeros_like(d))
    assert got.wilcoxon_p == pytest.approx(_brute_force_wilcoxon(d), abs=1e-9)


def test_there_is_no_signed_rank_test_that_could_not_reject():
    d = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    assert math.isnan(compare_paired(d, np.zeros(5)).wilcoxon_p)
    assert _brute_force_wilcoxon(d) > 0.05  # the best five pairs could do
    six = compare_paired(np.append(d, 0.6), np.zeros(6)).wilcoxon_p
    assert six == pytest.approx(scipy_stats.wilcoxon(np.append(d, 0.6), method="exact").pvalue)
    assert six < 0.05


def test_rank_biserial_is_the_share_of_favourable_rank_sum():
    d = np.array([1.0, -2.0, 3.0, 4.0, 0.0])
    # Ranks 1, 2, 3, 4 of the non-zero differences: (1 + 3 + 4 − 2) / 10.
    assert compare_paired(d, np.zeros(5)).rank_biserial == pytest.approx(0.6)
    assert compare_paired(-d, np.zeros(5)).rank_biserial == pytest.approx(-0.6)
    assert compare_paired(np.abs(d), np.zeros(5)).rank_biserial == 1.0


def test_no_difference_at_all():
    same = compare_paired([0.8, 0.9, 0.7] * 2, [0.8, 0.9, 0.7] * 2)
    assert (same.t_p, same.wilcoxon_p, same.cohens_dz, same.rank_biserial) == (1.0, 1.0, 0.0, 0.0)
    assert (same.mean_difference, same.ci_low, same.ci_high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_every_difference_equal_up_to_rounding(sign):
    # In floats 0.82 − 0.81, 0.81 − 0.80 and 0.80 − 0.79 are not one number.
    a, b = np.array([0.82, 0.81, 0.80] * 2), np.array([0.81, 0.80, 0.79] * 2)
    assert len(set(a - b)) > 1
    got = compare_paired(a, b) if sign == 1 else compare_paired(b, a)
    assert math.isnan(got.t_p)
    assert math.isnan(got.ci_low)
    assert got.mean_difference == pytest.approx(sign * 0.01)
    assert got.cohens_dz == sign * math.inf
    assert got.wilcoxon_p == pytest.approx(2 / 2**6)
    assert got.rank_biserial == sign


def test_coincidences_of_rounding_are_no_discoveries():
    """Accuracies over 100 sentences and three seeds: equal differences are common, and must not count as p = 0."""
    rng = np.random.default_rng(9)
    d = rng.binomial(100, 0.03, size=(4000, 3)) - rng.binomial(100, 0.03, size=(4000, 3))
    equal = (np.ptp(d, axis=1) == 0) & (d[:, 0] != 0)
    assert equal.mean() > 0.01
    p = [compare_paired(row / 100, np.zeros(3)).t_p for row in d[:800]]
    assert np.mean(np.array(p) < 0.001) < 0.001 + 4 * math.sqrt(0.001 / 800)


def test_rounding_noise_breaks_no_ties():
    # The magnitudes 0.1, 0.1, 0.1 of three counts over ten are one tie; unequal last bits would rank them 1, 2, 3.
    a, b = np.array([0.3, 0.4, 0.7, 0.9]), np.array([0.2, 0.5, 0.6, 0.6])
    got = compare_paired(a, b)
    assert got.rank_biserial == pytest.approx((2 - 2 + 2 + 4) / 10)


def test_tiny_values_are_not_mistaken_for_noise():
    a = np.array([1e-20, 3e-20, 2e-20])
    assert compare_paired(a, np.zeros(3)).mean_difference == pytest.approx(2e-20)


def test_one_pair_has_a_difference_and_nothing_else():
    got = compare_paired([0.9], [0.8])
    assert got.n == 1
    assert got.mean_difference == pytest.approx(0.1)
    assert all(math.isnan(x) for x in (got.ci_low, got.ci_high, got.t_p, got.wilcoxon_p, got.cohens_dz))


def test_unpaired_values_are_refused():
    with pytest.raises(InputError, match="one shape"):
        compare_paired([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match="one shape"):
        compare_paired([[1.0], [2.0]], [[1.0], [2.0]])
    with pytest.raises(InputError, match="no values"):
        compare_paired([], [])


# --- many tests ---------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    # 4·0.01, 3·0.02 = 0.06, 2·0.03 → kept up to 0.06, 1·0.5.
    assert holm([0.02, 0.01, 0.5, 0.03]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_holm_leaves_out_what_was_not_tested():
    with_nan = holm([0.01, float("nan"), 0.04, 0.03])
    assert math.isnan(with_nan[1])
    assert [with_nan[i] for i in (0, 2, 3)] == pytest.approx(holm([0.01, 0.04, 0.03]))
    assert all(map(math.isnan, holm([float("nan"), float("nan")])))


def test_holm_keeps_the_order_of_p_values_and_never_exceeds_bonferroni():
    rng = np.random.default_rng(1)
    for size in (1, 2, 7, 30):
        p = rng.uniform(size=size) ** 3
        adjusted = np.array(holm(p))
        assert np.all(adjusted >= p)
        assert np.all(adjusted <= np.minimum(1, p * size) + 1e-15)
        assert np.all(np.diff(adjusted[np.argsort(p)]) >= 0)


def test_holm_controls_the_familywise_error_and_raw_p_values_do_not():
    rng = np.random.default_rng(2)
    families = rng.uniform(size=(2000, 8))
    raw = np.mean([(p < 0.05).any() for p in families])
    held = np.mean([min(holm(p)) < 0.05 for p in families])
    assert held < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)
    assert raw > 0.3


def test_step_down_with_one_hypothesis_each_is_holm():
    rng = np.random.default_rng(3)
    for size in (1, 2, 7, 30):
        p = (rng.uniform(size=size) ** 3).tolist()
        assert [value for (value,) in step_down([[value] for value in p])] == pytest.approx(holm(p))


def test_step_down_by_hand():
    # 3·0.001; both of the first contrast done: 2·0.01, 2·0.02 (the second is still open), 2·0.03, 1·0.5.
    adjusted = step_down([[0.001, 0.001], [0.01, 0.03], [0.02, 0.5]])
    assert np.ravel(adjusted) == pytest.approx([0.003, 0.003, 0.02, 0.06, 0.04, 0.5])
    # What could not be tested keeps its contrast open; contrasts tested elsewhere count too.
    assert step_down([[0.01], [float("nan")], [0.02]])[2] == pytest.approx([0.04])
    assert step_down([[0.01], [0.02]], family=5) == [[0.05], [0.08]]
    assert step_down([]) == []
    with pytest.raises(InputError, match="family of 1 cannot hold 2"):
        step_down([[0.01], [0.02]], family=1)


def test_step_down_is_the_closed_test_where_only_one_hypothesis_of_a_contrast_can_be_true():
    """Against brute force: a hypothesis is rejected at its adjusted p only if Bonferroni over every set of hypotheses
    that can be true together, and that holds it, rejects too."""
    rng = np.random.default_rng(4)
    for _ in range(200):
        p = rng.uniform(size=(3, 2)) ** 4
        adjusted = np.array(step_down(p.tolist()))
        choices = list(itertools.product([None, 0, 1], repeat=3))  # which hypothesis of each contrast is true
        for i, j in itertools.product(range(3), range(2)):
            together = [[(k, c) for k, c in enumerate(choice) if c is not None] for choice in choices if choice[i] == j]
            closed = max(min(1.0, len(subset) * min(p[k, c] for k, c in subset)) for subset in together)
            assert adjusted[i, j] >= closed - 1e-12
    assert (adjusted <= np.minimum(1, 3 * p).max() + 1e-12).all()


# --- equivalence --------------------------------------------------------------------------------------------------


def test_equivalence_is_two_one_sided_tests_of_scipy():
    rng = np.random.default_rng(5)
    for n in (2, 3, 8, 20):
        b = rng.normal(2.0, 0.1, n)
        a = b + rng.normal(0.004, 0.01, n)
        upper = scipy_stats.ttest_1samp(a - b, 0.02, alternative="less").pvalue
        lower = scipy_stats.ttest_1samp(a - b, -0.02, alternative="greater").pvalue
        assert equivalence_p(a, b, 0.02) == pytest.approx(max(upper, lower), rel=1e-9)
        upper = scipy_stats.ttest_1samp(a - 1.01 * b, 0, alternative="less").pvalue
        lower = scipy_stats.ttest_1samp(a - 0.99 * b, 0, alternative="greater").pvalue
        assert equivalence_p(a, b, 0.01, is_relative=True) == pytest.approx(max(upper, lower), rel=1e-9)
        assert equivalence_p(-a, -b, 0.01, is_relative=True) == pytest.approx(max(upper, lower), rel=1e-9)


def test_equivalence_holds_its_level_at_the_margin_and_no_difference_found_does_not():
    """Three seeds of a method that is exactly at the margin: "p > 0.05, so equal" is wrong in most of them."""
    rng = np.random.default_rng(6)
    trials = 3000
    d = rng.normal(1.0, 1.0, size=(trials, 3))
    falsely = np.mean([equivalence_p(x, np.zeros(3), 1.0) < 0.05 for x in d])
    assert falsely < 0.05 + 4 * math.sqrt(0.05 * 0.95 / trials)
    assert np.mean([compare_paired(x, np.zeros(3)).t_p > 0.05 for x in d]) > 0.5
    # And it can decide: eight seeds of equal methods with a spread a third of the margin.
    assert np.mean([equivalence_p(x, np.zeros(8), 1.0) < 0.05 for x in rng.normal(0, 1 / 3, (500, 8))]) > 0.95


def test_equivalence_without_a_spread_or_a_margin():
    assert math.isnan(equivalence_p([1.0, 2.0], [1.0, 2.0], 0.1))
    assert math.isnan(equivalence_p([1.0], [1.1], 0.1, is_relative=True))
    for margin, is_relative in ((0.0, False), (-1.0, False), (1.0, True), (float("nan"), False)):
        with pytest.raises(InputError, match="margin must be positive"):
            equivalence_p([1.0, 2.0], [1.0, 2.5], margin, is_relative=is_relative)
    with pytest.raises(InputError, match="one shape"):
        equivalence_p([1.0, 2.0], [1.0], 0.1)


def test_noninferiority_is_the_upper_one_of_two_one_sided_tests_of_scipy():
    rng = np.random.default_rng(8)
    for n in (2, 3, 8):
        b = rng.normal(2.0, 0.1, n)
        a = b + rng.normal(0.004, 0.01, n)
        upper = scipy_stats.ttest_1samp(a - 1.01 * b, 0, alternative="less").pvalue
        assert noninferiority_p(a, b, 0.01) == pytest.approx(upper, rel=1e-9)
        assert noninferiority_p(a, b, 0.01) <= equivalence_p(a, b, 0.01, is_relative=True)
    # Far better is not equivalent, and not worse either.
    better = b - 0.5
    assert noninferiority_p(better, b + rng.normal(0, 0.01, n), 0.01) < 0.001
    assert equivalence_p(better, b + rng.normal(0, 0.01, n), 0.01, is_relative=True) > 0.99
    assert math.isnan(noninferiority_p([1.0], [1.1], 0.1))
    assert math.isnan(noninferiority_p([1.0, 2.0], [1.0, 2.0], 0.1))
    with pytest.raises(InputError, match="margin must be positive"):
        noninferiority_p([1.0, 2.0], [1.0, 2.5], 0.0)
    with pytest.raises(InputError, match="one shape"):
        noninferiority_p([1.0, 2.0], [1.0], 0.1)


def test_rank_correlation_is_scipys_with_ties():
    rng = np.random.default_rng(9)
    for n in (2, 5, 30):
        a = rng.integers(0, 6, n).astype(float)
        a[0] = -1.0
        b = a + rng.normal(0, 3, n).round()
        b[0] = -9.0
        assert rank_correlation(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
    assert rank_correlation([1.0, 2.0, 3.0], [1.0, 10.0, 1000.0]) == 1.0  # plain correlation is 0.82
    assert math.isnan(rank_correlation([1.0], [2.0]))
    assert math.isnan(rank_correlation([1.0, 2.0], [3.0, 3.0]))
    with pytest.raises(InputError, match="one shape"):
        rank_correlation([1.0, 2.0], [1.0])


# --- ratios -------------------------------------------------------------------------------------------------------


def test_ratio_interval_holds_what_a_t_test_does_not_reject():
    rng = np.random.default_rng(7)
    y = rng.normal(2.0, 0.3, 5)
    x = 0.8 * y + rng.normal(0, 0.1, 5)
    got = ratio_of_means(x, y)
    assert got.ratio == pytest.approx(x.mean() / y.mean())
    for rho in np.linspace(got.low - 0.5, got.high + 0.5, 101):
        is_inside = got.low <= rho <= got.high
        assert is_inside == (scipy_stats.ttest_1samp(x - rho * y, 0).pvalue >= 0.05)


def test_ratio_of_a_gap_that_is_not_there_is_open():
    open_ratio = ratio_of_means([0.1, 0.2, 0.3], [0.1, -0.2, 0.05])
    assert (open_ratio.low, open_ratio.high) == (-math.inf, math.inf)
    one = ratio_of_means([1.0], [2.0])
    assert (one.ratio, math.isnan(one.low)) == (0.5, True)
    assert math.isnan(ratio_of_means([1.0], [0.0]).ratio)
    constant = ratio_of_means([1.0, 1.0], [2.0, 2.0])
    assert (constant.low, constant.high) == (0.5, 0.5)
    with pytest.raises(InputError, match="one shape"):
        ratio_of_means([], [])


def test_ratio_intervals_cover_and_a_bootstrap_over_three_seeds_does_not():
    rng = np.random.default_rng(8)
    trials, covered, by_bootstrap = 2000, 0, 0
    resamples = np.array(list(itertools.product(range(3), repeat=3)))  # all of them
    for _ in range(trials):
        y = rng.normal(1.0, 0.1, 3)
        x = 0.8 * y + rng.normal(0, 0.1, 3)
        interval = ratio_of_means(x, y)
        covered += interval.low <= 0.8 <= interval.high
        low, high = np.quantile(x[resamples].mean(1) / y[resamples].mean(1), [0.025, 0.975])
        by_bootstrap += low <= 0.8 <= high
    assert abs(covered / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)
    assert by_bootstrap / trials < 0.8


# --- answers on the same items ------------------------------------------------------------------------------------


def test_mcnemar_is_the_binomial_test_of_the_discordant_items():
    first = [True] * 9 + [False] * 2 + [True] * 5 + [False] * 4
    second = [False] * 9 + [True] * 2 + [True] * 5 + [False] * 4
    only_first, only_second, p = mcnemar(first, second)
    assert (only_first, only_second) == (9, 2)
    assert p == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    assert mcnemar(second, first)[2] == pytest.approx(p)
    assert mcnemar([True, False], [True, False]) == (0, 0, 1.0)
    with pytest.raises(InputError, match="one shape"):
        mcnemar([True], [True, False])


def test_bootstrap_mean_and_interval_of_many_items_are_the_normal_ones():
    rng = np.random.default_rng(3)
    d = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=800)
    got = paired_bootstrap(d, np.ones(800), np.random.default_rng(0))
    half = 1.96 * d.std() / math.sqrt(800)
    assert got.mean == pytest.approx(d.mean())
    assert got.low == pytest.approx(d.mean() - half, abs=0.1 * half)
    assert got.high == pytest.approx(d.mean() + half, abs=0.1 * half)
    assert got.p == pytest.approx(2 * scipy_stats.norm.sf(d.mean() / d.std() * math.sqrt(800)), abs=0.005)


def test_bootstrap_equals_drawing_the_items_themselves():
    rng = np.random.default_rng(4)
    sums, counts = rng.integers(-3, 4, size=60).astype(float), rng.integers(1, 4, size=60).astype(float)
    got = paired_bootstrap(sums, counts, np.random.default_rng(0), draws=20_000)
    index = np.random.default_rng(5).integers(0, 60, size=(20_000, 60))
    means = sums[index].sum(1) / counts[index].sum(1)
    assert got.low == pytest.approx(np.quantile(means, 0.025), abs=0.01)
    assert got.high == pytest.approx(np.quantile(means, 0.975), abs=0.01)


def test_bootstrap_draws_whole_items_not_answers():
    """Three seeds that give the same answer to a sentence are one observation: the interval must not shrink by √3."""
    rng = np.random.default_rng(6)
    d = rng.choice([-1.0, 0.0, 1.0], size=200)
    once = paired_bootstrap(d, np.ones(200), np.random.default_rng(0))
    thrice = paired_bootstrap(3 * d, np.full(200, 3.0), np.random.default_rng(0))
    as_answers = paired_bootstrap(np.tile(d, 3), np.ones(600), np.random.default_rng(0))
    assert (thrice.low, thrice.high, thrice.p) == (once.low, once.high, once.p)
    assert as_answers.high - as_answers.low < 0.65 * (once.high - once.low)


def test_bootstrap_is_calibrated_under_the_null():
    rng = np.random.default_rng(8)
    p = [paired_bootstrap(rng.choice([-1.0, 0, 0, 1.0], size=150), np.ones(150), rng, draws=500).p for _ in range(400)]
    assert abs(np.mean(np.array(p) < 0.1) - 0.1) < 4 * math.sqrt(0.09 / 400)


@pytest.mark.parametrize("values", [[-1.0, 0.0, 1.0], None])
def test_bootstrap_says_the_smallest_p_that_its_draws_allow(values):
    rng = np.random.default_rng(10)
    d = rng.choice(values, size=100) if values else rng.normal(size=100)
    got = paired_bootstrap(d + 9, np.ones(100), rng, draws=999)
    assert got.p == pytest.approx(2 / 1000)
    assert is_bootstrap_floor(got.p, 999)
    assert not is_bootstrap_floor(paired_bootstrap(d, np.ones(100), rng, draws=999).p, 999)
    assert not is_bootstrap_floor(math.nan, 999)


def test_draws_follow_the_family():
    for family in (1, 7, 105):
        draws = bootstrap_draws(family, 2000)
        assert draws == max(2000, 800 * family)
        assert family * 2 / (draws + 1) < 0.05 / 19  # far below the level after Holm
    assert bootstrap_draws(10, 2000, alpha=0.01) == 40_000
    # The control: 2,000 draws cannot show anything among 105 tests.
    assert 105 * 2 / 2001 > 0.05


def test_losses_are_resampled_as_whole_items_too():
    """Items whose values are all distinct are drawn by index; the law is that of drawing how often each comes."""
    rng = np.random.default_rng(11)
    sums, counts = rng.normal(size=50), rng.integers(1, 4, size=50).astype(float)
    got = paired_bootstrap(sums, counts, np.random.default_rng(0), draws=20_000)
    times = np.random.default_rng(5).multinomial(50, np.full(50, 1 / 50), size=20_000)
    means = (times @ sums) / (times @ counts)
    assert got.low == pytest.approx(np.quantile(means, 0.025), abs=0.01)
    assert got.high == pytest.approx(np.quantile(means, 0.975), abs=0.01)


def test_bootstrap_edge_cases():
    rng = np.random.default_rng(0)
    nothing = paired_bootstrap(np.zeros(10), np.ones(10), rng)
    assert (nothing.mean, nothing.low, nothing.high, nothing.p) == (0.0, 0.0, 0.0, 1.0)
    everything = paired_bootstrap(np.ones(10), np.ones(10), rng, draws=999)
    assert everything.p == pytest.approx(2 / 1000)
    assert math.isnan(paired_bootstrap([1.0], [1.0], rng).p)
    with pytest.raises(InputError, match="one shape"):
        paired_bootstrap([], [], rng)


# --- power --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_smallest_detectable_difference_is_found_with_the_stated_power(n):
    difference = smallest_detectable_difference(2.0, n)
    rng = np.random.default_rng(n)
    samples = rng.normal(difference, 2.0, size=(40_000, n))
    t = samples.mean(1) / (samples.std(1, ddof=1) / math.sqrt(n))
    found = np.mean(np.abs(t) > scipy_stats.t.ppf(0.975, n - 1))
    assert abs(found - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 40_000)


def test_eight_seeds_find_a_difference_of_one_and_a_fifth_standard_deviations():
    assert smallest_detectable_difference(1.0, 8) == pytest.approx(1.2, abs=0.05)
    assert smallest_detectable_difference(1.0, 3) > 3


def test_smallest_detectable_difference_limits():
    assert math.isnan(smallest_detectable_difference(1.0, 1))
    assert smallest_detectable_difference(0.0, 5) == 0.0
    assert smallest_detectable_difference(1.0, 10) < smallest_detectable_difference(1.0, 5)
    # Many items: the familiar 2.80 standard errors.
    assert smallest_detectable_difference(1.0, 10_000) * 100 == pytest.approx(2.8016, abs=0.002)


def test_column_intervals_are_mean_intervals_of_what_is_there():
    table = np.random.default_rng(0).normal(3, 2, (7, 5))
    table[2, 1] = table[:6, 3] = table[:, 4] = np.nan
    n, mean, median, std, low, high = column_intervals(table)
    assert n.tolist() == [7, 6, 7, 1, 0]
    for j in range(4):
        values = table[~np.isnan(table[:, j]), j]
        i = mean_interval(values)
        np.testing.assert_allclose((mean[j], std[j], low[j], high[j]), (i.mean, i.std, i.low, i.high), rtol=1e-12)
        assert median[j] == pytest.approx(np.median(values))
    assert np.isnan([mean[4], median[4], std[4], low[4], high[4]]).all()


def test_auc_is_the_share_of_pairs_with_ties_counted_half():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, rng.integers(1, 9)), rng.integers(0, 6, rng.integers(1, 9))
        pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
        assert auc(a, b) == pytest.approx(np.mean(pairs))
    assert auc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert math.isnan(auc([], [1.0]))
