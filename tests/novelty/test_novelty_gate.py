"""The gate: what novelty says, that the acceptance rate meets its target, and that no state is lost."""

from __future__ import annotations

import io
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sparselora.config.novelty import POLICIES
from sparselora.errors import InputError
from sparselora.novelty import HeadGradientGate
from sparselora.novelty import gate as gate_module

TARGETS = (0.1, 0.3, 0.5, 0.7, 0.9)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(**options) -> HeadGradientGate:
    """A gate over a head of 8 inputs and 40 outputs, sketches of 32, a basis of 4."""
    return HeadGradientGate(
        **{"d_hidden": 8, "vocab_size": 40, "m": 32, "k": 4, "k_topk": 5, "burn_in": 0, "reorth_every": 8, **options}
    )


def step(gate: HeadGradientGate, nov=None, loss=None, z=None) -> bool:
    accepted = gate.accept(nov if z is None else gate.novelty(z), loss)
    if accepted and z is not None:
        gate.update(z)
    gate.step()
    return accepted


# --- novelty -------------------------------------------------------------------------------------------------------


def test_an_empty_basis_finds_everything_new_and_what_was_just_accepted_not():
    gate = small()
    z = normal(32)
    assert float(gate.novelty(z)) == 1
    gate.update(z)
    assert float(gate.novelty(3 * z)) == pytest.approx(0, abs=1e-6)
    assert float(gate.novelty(normal(32, seed=1))) > 0.5


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(0, 12), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_novelty_is_between_0_and_1(seed, count, scale):
    gate = small()
    rows = scale * normal(14, 32, seed=seed)
    rows[1:4] = rows[0]  # float32 holds neither the square of the largest nor that of the smallest
    for row in rows[:count]:
        gate.update(row)
    for row in [*rows, *gate.subspace.basis[:1], rows.sum(dim=0)]:
        nov = float(gate.novelty(row))
        assert 0 <= nov <= 1
        assert nov == pytest.approx(float(gate.novelty(row.double() / scale)), abs=1e-5)  # it has no unit
    assert float(gate.novelty(torch.zeros(32))) == 0


def test_an_unrelated_direction_scores_about_one_only_when_calibrated():
    """An unrelated vector keeps 1 − k/m of itself by chance: 0.875 at m 512, k 64."""
    m, k = 512, 64
    gate = HeadGradientGate(4, 8, m=m, k=k, k_topk=4, reorth_every=k)
    for row in normal(k, m):
        gate.update(row)
    scores, raw = [], []
    for z in normal(200, m, seed=1):
        scores.append(float(gate.novelty(z)))
        gate.accept(0.5)
        raw.append(gate.metrics()["gate/novelty_raw"])
    assert np.mean(raw) == pytest.approx(1 - k / m, abs=4 * math.sqrt(2 * k) / m / math.sqrt(200))
    assert np.std(raw) == pytest.approx(math.sqrt(2 * k) / m, rel=0.2)
    # At most 1 cuts the upper half of a spread of √(2k)/m, so the mean is a little below.
    assert np.mean(scores) == pytest.approx(1, abs=math.sqrt(2 * k) / m)
    assert np.mean(scores) > 0.98
    # Of 64 copies of one vector the basis is one direction, and the divisor is 1 − 1/m.
    copies = HeadGradientGate(4, 8, m=m, k=k, k_topk=4, reorth_every=k)
    for _ in range(k):
        copies.update(gate.subspace.basis[0])
    assert [float(copies.novelty(z)) for z in normal(50, m, seed=2)] == pytest.approx([1] * 50, abs=0.03)
    assert float(copies.novelty(gate.subspace.basis[0])) == pytest.approx(0, abs=1e-6)


def test_novelty_falls_as_a_stationary_stream_fills_the_basis_and_rises_when_it_turns():
    gate = HeadGradientGate(4, 8, m=128, k=8, k_topk=4, reorth_every=8)
    planes = [torch.linalg.qr(normal(128, 6, seed=s))[0] for s in (0, 1)]
    coordinates, noise = normal(120, 6, seed=2), 0.1 * normal(120, 128, seed=3) / math.sqrt(128)
    scores = []
    for plane in planes:
        for c, e in zip(coordinates, noise):
            z = plane @ c / math.sqrt(6) + e
            scores.append(float(gate.novelty(z)))
            gate.update(z)
    means = [np.mean(scores[i : i + 10]) for i in (0, 20, 110, 120)]
    assert means[0] > 0.3
    assert means[1] < 0.1
    assert means[2] < 0.05
    assert means[3] > 0.7


def test_each_accepted_batch_counts_once_however_large_its_gradient():
    gate = HeadGradientGate(4, 8, m=64, k=2, k_topk=4, reorth_every=1)
    large, common, other = torch.linalg.qr(normal(64, 3))[0].T
    for _ in range(5):
        gate.update(common)
        gate.update(other)
    gate.update(1000 * large)
    assert float(gate.novelty(common)) < 1e-3
    assert float(gate.novelty(large)) > 0.999


def test_a_window_is_the_sum_of_its_batches():
    gate = small()
    h, logits = normal(4, 6, 8), 3 * normal(4, 6, 40, seed=1)
    labels = torch.randint(40, (4, 6), generator=torch.Generator().manual_seed(2))
    labels[1, :3] = -100
    whole = gate.embed(h, logits, labels)
    torch.testing.assert_close(
        gate.embed(h[:1], logits[:1], labels[:1]) + gate.embed(h[1:], logits[1:], labels[1:]), whole
    )
    assert gate.reduce(whole) is whole


def test_reduce_sums_over_ranks(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        z = normal(32)
        total = small().reduce(z)
        assert torch.equal(total, z)
        assert total is not z
    finally:
        torch.distributed.destroy_process_group()


def test_the_shift_follows_the_head_and_can_be_said():
    h, logits = normal(2, 6, 8), 3 * normal(2, 6, 40, seed=1)
    labels = torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(2))
    lm, classifier = small(), small(head="classification")
    rows = (h[:, :-1].reshape(-1, 8), logits[:, :-1].reshape(-1, 40), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(lm.embed(h, logits, labels), lm.embed(*rows, shift=False))
    torch.testing.assert_close(classifier.embed(h, logits, labels), lm.embed(h, logits, labels, shift=False))
    torch.testing.assert_close(classifier.embed(h[:, 0], logits[:, 0], labels[:, 0]), lm.sketch.head_gradient(
        h[:, 0], logits[:, 0], labels[:, 0]))  # fmt: skip
    assert not torch.allclose(lm.embed(h, logits, labels), classifier.embed(h, logits, labels), atol=0.1)


# --- the rate ------------------------------------------------------------------------------------------------------

BURN_IN, STEPS = 256, 5000


def novelties(kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n = BURN_IN + STEPS
    t, noise = np.linspace(0, 1, n), rng.standard_normal(n)
    return {
        "skewed": rng.beta(5, 2, n),
        "uniform": rng.random(n),
        "two kinds": np.where(rng.random(n) < 0.5, 0.1, 0.95),
        "narrow": 0.8 + 0.02 * noise,
        "falling": 0.9 - 0.7 * t + 0.1 * noise,
        "decaying": 0.15 + 0.85 * np.exp(-5 * t) + 0.05 * noise,
        "waves": 0.5 + 0.3 * np.sin(4 * np.pi * t) + 0.1 * noise,
        "jump": np.where(t < 0.5, 0.9, 0.2) + 0.05 * noise,
        "constant": np.full(n, 0.5),
    }[kind].clip(0, 1)


def decisions(gate: HeadGradientGate, novs, losses=None) -> np.ndarray:
    """Decisions after burn-in."""
    losses = itertools.repeat(None) if losses is None else losses
    return np.array([step(gate, float(nov), loss) for nov, loss in zip(novs, losses)][BURN_IN:])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "kind", ["skewed", "uniform", "two kinds", "narrow", "constant", "falling", "decaying", "waves", "jump"]
)
def test_the_acceptance_rate_meets_its_target(kind, target):
    gate = small(target_accept_rate=target, burn_in=BURN_IN, target_novelty_scaler=10.0)
    made = decisions(gate, novelties(kind, seed=int(10 * target)))
    assert made.mean() == pytest.approx(target, abs=0.02)
    assert gate.acceptance_rate() == made.mean()
    assert gate.accepted_steps == BURN_IN + made.sum()
    # Nothing starves: the longest run of rejects is a few times that of independent draws, or, after a jump, passing.
    runs = [len(list(run)) for accepted, run in itertools.groupby(made) if not accepted]
    usual = math.log(STEPS) / -math.log(1 - target)
    assert max(runs) < (600 if kind == "jump" else 3 * usual + 60)


@pytest.mark.parametrize("kind", ["skewed", "uniform", "two kinds", "narrow", "falling", "decaying", "waves", "jump"])
def test_by_default_the_steepness_follows_the_spread_of_the_burn_in(kind):
    """β is 2 over the spread, the gate chooses by novelty however narrow that is, and the rate is met up to the way
    that the threshold has to go, over its gain."""
    novs = novelties(kind, 5)
    gate = small(burn_in=BURN_IN)
    made = decisions(gate, novs)
    assert gate.beta == pytest.approx(2 / np.std(novs[BURN_IN // 2 : BURN_IN]))
    way = 2 * np.ptp(novs) / (gate._bar.gain * STEPS)
    assert made.mean() == pytest.approx(0.3, abs=0.02 + (way if kind in ("falling", "decaying", "jump") else 0))
    if kind in ("skewed", "uniform", "narrow"):  # what does not drift
        gated = novs[BURN_IN:]

        def auc(decided):
            return stats.mannwhitneyu(gated[decided], gated[~decided]).statistic / (decided.sum() * (~decided).sum())

        assert auc(made) > 0.83
        # The controls: one fixed steepness for all does not choose among narrow novelties.
        fixed = decisions(small(burn_in=BURN_IN, target_novelty_scaler=10.0), novs)
        assert (auc(fixed) < 0.6) == (kind == "narrow")


def test_without_a_spread_the_steepness_is_a_fixed_one():
    for burn_in, novs in ((0, novelties("uniform", 0)), (BURN_IN, novelties("constant", 0))):
        gate = small(burn_in=burn_in)
        for nov in novs[: BURN_IN + 10]:
            step(gate, float(nov))
        assert gate.beta == 10
    assert small(target_novelty_scaler=3.0).beta == 3


def test_a_checkpoint_restores_the_steepness():
    novs = novelties("narrow", 0)
    gate, other = small(burn_in=BURN_IN), small(burn_in=BURN_IN)
    for nov in novs[: BURN_IN + 20]:
        step(gate, float(nov))
    other.load_state_dict(gate.state_dict())
    assert other.beta == gate.beta != 10
    assert [step(gate, float(nov)) for nov in novs[-100:]] == [step(other, float(nov)) for nov in novs[-100:]]


def test_with_the_wrong_sign_the_rate_runs_away(monkeypatch):
    def move(self, passed):
        self.ema += self.ema_rate * (passed - self.ema)
        self.value -= self.gain * (self.ema - self.rate)

    monkeypatch.setattr(gate_module._Bar, "move", move)
    gate = small(target_accept_rate=0.3, burn_in=BURN_IN)
    assert abs(decisions(gate, novelties("uniform", 3)).mean() - 0.3) > 0.2


@pytest.mark.parametrize("rate", [0.002, 0.01, 0.2])
@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0])
def test_the_rate_is_met_for_other_scalers_and_averages(beta, rate):
    for kind, tolerance in (("skewed", 0.02), ("narrow", 0.02)):
        gate = small(target_novelty_scaler=beta, novelty_ema_rate=rate, burn_in=BURN_IN)
        assert decisions(gate, novelties(kind, 1)).mean() == pytest.approx(0.3, abs=tolerance)


def test_a_steep_bar_follows_novelties_that_fall_in_a_short_run():
    """With a step of 1/β alone the threshold would stay where the burn-in left it, and nothing would pass."""
    rng = np.random.default_rng(0)
    novs = np.clip(0.3 + 0.4 * np.exp(-np.linspace(0, 8, 250)) + 0.08 * rng.standard_normal(250), 0, 1)
    for follows in (True, False):
        gate = small(target_novelty_scaler=300.0, novelty_ema_rate=0.05, burn_in=25)
        if not follows:
            gate._set_gain = lambda: None  # type: ignore[method-assign]
        made = np.array([step(gate, nov) for nov in novs])[25:]
        assert (abs(made.mean() - 0.3) < 0.05) == follows, made.mean()


def test_without_a_burn_in_the_rate_is_met_too():
    gate = small(burn_in=0)
    made = np.array([step(gate, nov) for nov in novelties("falling", 0)])
    assert made.mean() == pytest.approx(0.3, abs=0.02)
    assert 0.1 < made[:200].mean() < 0.5


def test_newer_batches_are_accepted_more_often_the_more_the_steeper():
    advantage = []
    for beta in (1.0, 10.0, 100.0):
        gate = small(target_novelty_scaler=beta, burn_in=BURN_IN)
        novs = novelties("uniform", 0)
        made = decisions(gate, novs)
        advantage.append(novs[BURN_IN:][made].mean() - novs[BURN_IN:].mean())
    assert 0 < advantage[0] < 0.1 < advantage[1] < advantage[2]
    assert advantage[2] == pytest.approx(0.35, abs=0.02)  # a hard bar: the upper 30 % of uniform values average 0.85


def test_decisions_start_at_the_target_right_after_burn_in():
    """From the burn-in's novelties, where a bar that started anywhere would take hundreds of steps."""
    for policy in POLICIES[1:]:
        rates = []
        for seed in range(20):
            gate = small(policy=policy, target_accept_rate=0.2, burn_in=BURN_IN, seed=seed)
            losses = 2 + 0.3 * np.random.default_rng(1000 + seed).standard_normal(BURN_IN + 50)
            rates.append(decisions(gate, novelties("narrow", seed)[: len(losses)], losses).mean())
        assert np.mean(rates) == pytest.approx(0.2, abs=0.04), policy


@pytest.mark.parametrize("policy", ["random", "novelty", "loss_floor", "novelty+loss_floor"])
@pytest.mark.parametrize("limit", [None, 4])
def test_every_policy_meets_the_target_and_respects_the_limit(policy, limit):
    rng = np.random.default_rng(0)
    n = BURN_IN + STEPS
    losses = 1 + 3 * np.exp(-np.linspace(0, 3, n)) * (1 + 0.2 * rng.standard_normal(n))
    settings = {"target_accept_rate": 0.3, "burn_in": BURN_IN, "target_novelty_scaler": 10.0}
    gate = small(policy=policy, max_consecutive_rejects=limit, **settings)
    made = decisions(gate, novelties("decaying", 1), losses)
    assert made.mean() == pytest.approx(0.3, abs=0.02)
    runs = [len(list(run)) for accepted, run in itertools.groupby(made) if not accepted]
    assert max(runs) == 4 if limit else max(runs) > 4
    thirds = [part.mean() for part in np.array_split(made, 3)]
    assert thirds == pytest.approx([0.3] * 3, abs=0.04)


def test_accept_all_accepts_all():
    gate = small(policy="accept_all", burn_in=0)
    assert all(step(gate) for _ in range(50))
    assert gate.acceptance_rate() == 1
    assert math.isnan(gate.threshold)


def test_random_takes_no_notice_and_the_loss_floor_takes_the_high_losses():
    rng = np.random.default_rng(0)
    n = BURN_IN + STEPS
    novs, losses = rng.random(n), 2 + 0.3 * rng.standard_normal(n)
    gain = {}
    for policy in POLICIES[1:]:
        gate = small(policy=policy, burn_in=BURN_IN)
        made = decisions(gate, novs, losses)
        gain[policy] = [float(x[BURN_IN:][made].mean() - x[BURN_IN:].mean()) for x in (novs, (losses - 2) / 0.3)]
    error = 4 / math.sqrt(0.3 * STEPS)
    assert gain["random"] == pytest.approx([0, 0], abs=error)
    assert gain["novelty"][0] > 0.1
    assert gain["novelty"][1] == pytest.approx(0, abs=error)
    assert gain["loss_floor"][0] == pytest.approx(0, abs=error)
    assert gain["loss_floor"][1] == pytest.approx(1.159, abs=0.1)  # the mean of a normal's upper 30 %
    both = gain["novelty+loss_floor"]
    assert both[0] > 0.1
    assert both[1] == pytest.approx(0.57, abs=0.1)  # the mean above its 35 % quantile: novelty chooses among those
    gate = small(policy="loss_floor", burn_in=BURN_IN)
    decisions(gate, novs, losses)
    assert gate.threshold == pytest.approx(2 + 0.3 * 0.524, abs=0.15)  # in the loss's unit


# --- burn-in and steps ---------------------------------------------------------------------------------------------


def test_burn_in_counts_updates_and_accepts_them_all():
    gate = small(burn_in=3)
    for i in range(3):
        assert gate.in_burn_in
        for _ in range(2):  # two decisions in one accumulation window
            assert gate.accept(0.0)
        gate.step()
        assert (gate.accepted_steps, gate.total_steps) == (i + 1, i + 1)
    assert not gate.in_burn_in
    assert gate.acceptance_rate() == 1
    made = [step(gate, 0.0 if i % 3 else 1.0) for i in range(600)]
    assert gate.acceptance_rate() == np.mean(made)
    assert gate.total_steps == 603
    assert gate.accepted_steps == 3 + sum(made)


def test_update_adds_what_the_sketch_is_when_it_is_called():
    for asked_before in (False, True):
        gate, z = small(), torch.randn(32, generator=torch.Generator().manual_seed(0))
        other = torch.ones(32)
        if asked_before:
            gate.novelty(z)
        gate.update(z)
        torch.testing.assert_close(gate.subspace.rows[0], z / z.norm())
        gate.novelty(z)
        z.copy_(other)  # no longer the sketch that was asked about
        gate.update(z)
        torch.testing.assert_close(gate.subspace.basis @ (other / other.norm()), gate.subspace.basis @ other / 32**0.5)
        assert float(gate.novelty(other)) < 1e-5


def test_a_window_with_one_accept_is_one_update():
    gate = small(policy="loss_floor", burn_in=1)
    step(gate, loss=1.0)
    for loss in (0.0, 5.0, 0.0):
        gate.accept(loss=loss)
    gate.step()
    assert (gate.accepted_steps, gate.total_steps) == (2, 2)
    gate.accept(loss=-9.0)
    gate.step()
    assert (gate.accepted_steps, gate.total_steps) == (2, 3)


def test_a_plan_says_how_much_of_the_run_is_gated():
    assert small(burn_in=200).plan(1000) == 800
    assert small(burn_in=2000).plan(1000) == 0
    gate = small(burn_in=0.1)
    with pytest.raises(InputError, match=r"plan\(total_steps\)"):
        gate.accept(0.5)
    assert gate.plan(40) == 36
    assert gate.burn_in_steps == 4
    assert [step(gate, 0.0) for _ in range(4)] == [True] * 4
    assert not gate.in_burn_in
    with pytest.raises(InputError, match="at least 1 update"):
        gate.plan(0)


def test_metrics_say_what_the_last_decision_was():
    gate = small(burn_in=1)
    assert math.isnan(gate.metrics()["gate/novelty"])
    z = normal(32)
    step(gate, z=z)
    step(gate, z=z)
    metrics = gate.metrics()
    rates = {"gate/acceptance_rate", "gate/acceptance_ema"}
    counts = {"gate/accepted_steps", "gate/total_steps", "gate/no_signal"}
    assert set(metrics) == {"gate/novelty", "gate/novelty_raw", "gate/accept", "gate/threshold"} | rates | counts
    assert metrics["gate/novelty"] == pytest.approx(0, abs=1e-6)
    assert metrics["gate/total_steps"] == 2
    assert metrics["gate/accepted_steps"] == 1 + metrics["gate/accept"]
    assert all(type(value) in (int, float) for value in metrics.values())


# --- what must not happen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("burn_in", [0, 10])
def test_a_batch_without_a_label_is_never_accepted_and_says_so_once(policy, burn_in):
    gate = small(policy=policy, burn_in=burn_in, target_accept_rate=0.99)
    z = gate.embed(normal(2, 5, 8), normal(2, 5, 40), torch.full((2, 5), -100))
    state = gate.state_dict()
    with pytest.warns(UserWarning, match="without a labelled token"):
        assert not step(gate, loss=math.nan, z=z)  # the mean of no losses
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(step(gate, loss=1.0, z=z) for _ in range(5))
    assert (gate.no_signal, gate.total_steps, gate.accepted_steps) == (6, 6, 0)
    assert gate.state_dict()["generator"] == state["generator"]
    assert gate.acceptance_rate() == 1
    gate.update(z)
    assert int(gate.subspace.directions) == 0
    # The control: the same gate accepts one that has a label.
    labels = torch.full((2, 5), -100)
    labels[0, 3] = 7
    assert step(gate, loss=1.0, z=gate.embed(normal(2, 5, 8), normal(2, 5, 40), labels))


def flat(state) -> list:
    if isinstance(state, dict):
        return [x for key in sorted(state) for x in [key, *flat(state[key])]]
    if isinstance(state, list):
        return [y for x in state for y in flat(x)]
    return state.flatten().tolist() if isinstance(state, torch.Tensor) else [state]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_not_finite_stops_the_run_and_leaves_the_state(policy):
    gate = small(policy=policy, burn_in=2)
    for i in range(5):
        step(gate, loss=float(i), z=normal(32, seed=i))
    before = flat(gate.state_dict())
    logits = normal(2, 5, 40)
    logits[1, 2, 3] = math.nan
    bad = gate.embed(normal(2, 5, 8), logits, torch.ones(2, 5, dtype=torch.long))
    for z in (bad, torch.full((32,), math.inf)):
        with pytest.raises(InputError, match="not finite"):
            gate.accept(gate.novelty(z), torch.tensor(1.0))
    for loss in (math.nan, math.inf, torch.tensor(math.nan)):
        with pytest.raises(InputError, match=r"loss is (nan|inf); lower"):
            gate.accept(gate.novelty(normal(32)), loss)
    for nov in (1.5, -0.1, math.nan, torch.tensor(math.nan)):
        with pytest.raises(InputError, match=r"in \[0, 1\]"):
            gate.accept(nov, 1.0)
    assert str(flat(gate.state_dict())) == str(before)
    gate.update(torch.full((32,), math.nan))
    gate.subspace.rotate()
    assert gate.subspace.basis.isfinite().all()


def test_one_read_a_decision(monkeypatch):
    gate = small(policy="novelty+loss_floor")
    reads = []
    for name in ("tolist", "item", "__float__", "__bool__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, _real=real, _name=name: reads.append(_name) or _real(self, *args)
        )
    for i in range(20):
        accepted = gate.accept(gate.novelty(normal(32, seed=i)), torch.tensor(1.0 + i))
        if accepted:
            gate.update(normal(32, seed=i))
        gate.step()
        gate.metrics()
    assert reads == ["tolist"] * 20


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stop", [7, 20, 60])
def test_a_loaded_gate_decides_alike(policy, stop):
    """Stopped in its burn-in, at the end of it, and after; through a file that holds no code."""
    rng = np.random.default_rng(0)
    losses = 2 + 0.3 * rng.standard_normal(150)
    options = {"policy": policy, "burn_in": 20, "max_consecutive_rejects": 5}
    plane = normal(6, 32, seed=9)

    def run(gate, batches):
        return [(step(gate, loss=losses[i], z=normal(6, seed=i) @ plane), str(gate.metrics())) for i in batches]

    whole = run(small(**options), range(150))
    first = small(**options)
    run(first, range(stop))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = small(**options)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(first, range(3))  # the state is a copy
    assert run(second, range(stop, 150)) == whole[stop:]
    # The control: a fresh gate does not.
    if policy != "accept_all":
        assert run(small(**options), range(stop, 150)) != whole[stop:]


def test_a_basis_can_be_taken_over_into_other_settings_of_the_rule():
    first = small(burn_in=10, policy="random")
    for i in range(40):
        step(first, z=normal(32, seed=i))
    second = small(burn_in=0, policy="novelty", target_accept_rate=0.5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.subspace.basis, first.subspace.basis)
    assert math.isnan(second.threshold)
    made = [step(second, z=normal(32, seed=100 + i)) for i in range(400)]
    assert np.mean(made) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 1), ("m", 64), ("k", 3), ("vocab_size", 41), ("d_hidden", 9), ("k_topk", 6), ("reorth_every", 9)],
)
def test_a_state_of_another_sketch_is_refused(name, value):
    with pytest.raises(InputError, match=rf"{name}={value}, this one"):
        small().load_state_dict(small(**{name: value}).state_dict())
    with pytest.raises(InputError, match="means nothing"):
        small().load_state_dict({})


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 500}, "power of two"),
        ({"k": 32}, "below the sketch length 32"),
        ({"k": 0}, "got 0"),
        ({"k_topk": 41}, "vocabulary's 40, got 41"),
        ({"target_novelty": 0.0}, r"in \(0, 1\), got 0"),
        ({"target_novelty": 1}, r"in \(0, 1\), got 1"),
        ({"target_accept_rate": 1.5}, r"in \(0, 1\), got 1.5"),
        ({"target_accept_rate": math.nan}, r"in \(0, 1\), got nan"),
        ({"target_novelty": 0.3, "target_accept_rate": 0.5}, "give one"),
        ({"target_novelty_scaler": 0}, "scaler"),
        ({"novelty_ema_rate": 0}, "ema_rate"),
        ({"burn_in": -1}, "burn_in"),
        ({"burn_in": 1.5}, "burn_in"),
        ({"burn_in": True}, "burn_in"),
        ({"reorth_every": 0}, "reorth_every"),
        ({"policy": "noveltie"}, "did you mean 'novelty'"),
        ({"head": "causal"}, "lm, classification"),
        ({"max_consecutive_rejects": 0}, "1 or more"),
        ({"max_consecutive_rejects": 2}, "raise it to 3 or more"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        small(**options)
    assert "\n" not in str(caught.value)


def test_settings_that_are_fine():
    assert small().target == 0.30
    assert small(target_novelty=0.4, target_accept_rate=0.4).target == 0.4
    assert small(max_consecutive_rejects=3).max_consecutive_rejects == 3
    assert small(vocab_size=3, k_topk=64, head="classification").sketch.top_k == 3  # few labels: clamped
    issue = HeadGradientGate(
        d_hidden=64, vocab_size=50257, m=512, k=64, target_novelty=0.30, target_novelty_scaler=10.0,
        novelty_ema_rate=0.01, burn_in=2000, seed=0, device="cpu", reorth_every=128, k_topk=64,
    )  # fmt: skip
    assert issue.burn_in_steps == 2000


def test_what_a_policy_needs_must_be_given():
    with pytest.raises(InputError, match="needs the batch's novelty"):
        small().accept()
    with pytest.raises(InputError, match="needs the batch's loss"):
        small(policy="novelty+loss_floor").accept(0.5)
    with pytest.raises(InputError, match=r"loss must be one number, got shape \(2,\)"):
        small().accept(0.5, torch.zeros(2))
    with pytest.raises(InputError, match=r"shape \(32,\)"):
        small().novelty(torch.zeros(16))
    with pytest.raises(InputError, match=r"\(\.\.\., L, V\)"):
        small().embed(normal(2, 5, 8), normal(2, 4, 40), torch.ones(2, 5, dtype=torch.long))
