"""Gate that decides whether a batch's gradient is new enough to be worth a backward pass.

A batch's novelty is the part of its head gradient's sketch that lies outside the leading subspace of the sketches
accepted so far. The gate accepts batches by it at a target rate:

    z = gate.embed(hidden, logits, labels)
    if gate.accept(gate.novelty(z)):
        loss.backward(), optimizer.step(), gate.update(z)
    gate.step()

Sketches add up: the sketch of an accumulation window, or of all ranks' batches, is the sum of its parts' sketches, and
one decision is made for the sum.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparselora.config.novelty import ORACLE, POLICIES, check_rejects, target_rate
from sparselora.errors import InputError, suggest
from sparselora.novelty.sketch import FrequentDirections, TensorSketch, align_causal

Tensor = torch.Tensor


HEADS = ("lm", "classification")

_RECENT = 512  # batches of the burn-in that are remembered, the last ones; the bars start from their later half
_CONSTANT = 0.5  # what policy random takes for the novelty of every batch
_SPREADS = 2.0  # β times the spread: of normal novelties, accepted ones exceed rejected ones with an AUC of 0.87
_BETA = 10.0  # β where no novelty was measured in the burn-in, or all were the same
_LEAST_SPREAD = 1e-6  # rounding of a novelty, which is a float32 near 1
_NAN = float("nan")


@dataclass
class _Bar:
    """A threshold that moves until batches pass it at ``rate``: too many passes raise it.

    Its moves add up to ``gain`` times the sum of (running rate − rate): over N decisions the pass rate is off by
    (last value − first value)/(gain·N), whatever the signal, up to the lag of the running rate.
    """

    rate: float
    gain: float
    ema_rate: float
    value: float = _NAN
    ema: float = field(init=False)

    def __post_init__(self) -> None:
        self.ema = self.rate

    def move(self, passed: bool) -> None:
        self.ema += self.ema_rate * (passed - self.ema)
        self.value += self.gain * (self.ema - self.rate)


@dataclass
class _Scale:
    """Running mean and variance with memory 1/rate, or of all values while those are fewer."""

    rate: float
    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def standardise(self, x: float) -> float:
        """Standard deviations of x above the mean of the values before it, which x then joins; 0 without a spread."""
        score = (x - self.mean) / math.sqrt(self.variance) if self.variance > 0 else 0.0
        self.count += 1
        weight = max(self.rate, 1 / self.count)
        step = x - self.mean
        self.mean += weight * step
        self.variance = (1 - weight) * (self.variance + weight * step * step)
        return score


def _logistic(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))


def _unit(z: Tensor) -> tuple[Tensor, Tensor]:
    """z/‖z‖ in float32 and ‖z‖ in float64, which no finite z overflows; zeros for z = 0, NaN if z is not finite."""
    z = z.detach().double()
    norm = torch.linalg.vector_norm(z)
    return (z / norm.clamp_min(torch.finfo(torch.float64).tiny)).float(), norm


def _version(z: Tensor) -> int:
    """Counts the changes of z in place; inference tensors, which do not count them, are not distinguishable."""
    return 0 if z.is_inference() else z._version


def _start_of_bar(novelties: list[float], rate: float, beta: float) -> float:
    """The τ for which the mean of σ(β(ν − τ)) over ``novelties`` is ``rate``, by bisection."""
    values = np.array(novelties or [1.0])  # with nothing seen the basis is empty, and everything is new
    margin = (abs(math.log(rate / (1 - rate))) + 1) / beta
    low, high = float(values.min()) - margin, float(values.max()) + margin
    for _ in range(60):
        middle = (low + high) / 2
        accepted = float((0.5 * (1 + np.tanh(beta * (values - middle) / 2))).mean())
        low, high = (middle, high) if accepted > rate else (low, middle)
    return (low + high) / 2


class HeadGradientGate:
    """Accepts batches whose head gradient is new, at a target rate.

    **Novelty** of a sketch z is (1 − ‖Vẑ‖²)/(1 − k'/m), at most 1, with ẑ = z/‖z‖ and V the orthonormal basis of k' ≤ k
    directions: the divisor is what an unrelated vector keeps by chance, so that one scores about 1. With an empty basis
    novelty is 1. The basis holds unit vectors' directions: each accepted batch counts once, however large its gradient.

    **Policies** decide from a novelty ν, a loss and a uniform draw, the same number of draws under each:

    * ``accept_all``.
    * ``novelty``: with probability σ(β(ν − τ)). After each decision τ ← τ + η(a − target), a the running acceptance
      rate.
    * ``random``: the same with ν = 1/2 for every batch, so that it meets the target as closely.
    * ``loss_floor``: if the loss is at least a floor, which moves like τ. Floor and loss are counted in running
      standard deviations from the running mean of all batches' losses, so that the floor follows a falling loss.
    * ``oracle``: as ``novelty``, where the sketches are those of the true LoRA gradient (`GradientSketch`), after the
      backward pass: a control, which saves nothing and shows what the best sketch of the head could win.
    * ``novelty+loss_floor``: the floor rejects (1 − target)/2 of all batches, those of least loss; the others are
      accepted with probability σ(β(ν − τ)), τ moving so that ``target`` of all batches are accepted.

    η = min(20·novelty_ema_rate, 1)·max(1/β, s/2), with s the spread of the novelties in the later half of the burn-in:
    well below 8/β for a soft bar and 5s for a steep one, where the loop would overshoot, and enough for a steep bar to
    cross the novelties. For the defaults it is 0.02, by which τ crosses half the range in some hundred decisions.

    **Burn-in**: the first updates, all accepted. From its later half, at most 256 batches, τ and the floor start where
    those would have been accepted at the target rate; the running rate starts at the target.

    **A batch without a labelled token** (z = 0) has no gradient: it is rejected under every policy, burn-in included,
    takes no draw, moves nothing, and is counted apart (`no_signal`); the first one warns.

    **Several ranks**: build the gate with the same seed on each, and give `novelty` and `update` what `reduce` returns,
    and `accept` the mean of the ranks' losses; then every rank decides alike.

    Args:
        d_hidden, vocab_size: inputs and outputs of the head (its weight's shape reversed).
        m: length of a sketch, a power of two; k: rank of the basis, below m.
        target_novelty: the fraction of batches to accept after burn-in, in (0, 1): an acceptance *rate*, its name
            notwithstanding. ``target_accept_rate`` says the same clearly; give one. 0.30 without either.
        target_novelty_scaler: β, the steepness of the accept probability, above 0. It goes from 1/2 to 0.88 as novelty
            rises by 2/β: β far below 1/(spread of the novelties) accepts nearly at random, far above it is a hard bar.
            None: 2 over the spread (standard deviation) of the novelties in the later half of the burn-in, set where
            that ends; 10 where no novelty was measured in it, or all were equal.
        novelty_ema_rate: weight of a decision in the running rate, in (0, 1]; it also sets η.
        burn_in: updates, or a float in (0, 1): that fraction of the updates given to `plan`.
        seed: of the hashes and of the draws.
        reorth_every: updates between renewals of the basis, at least 1. A young basis is renewed sooner: after updates
            1, 2, 4, ….
        k_topk: logits kept of each token; clamped to ``vocab_size`` for a classifier.
        policy: one of `POLICIES`.
        head: ``lm``, where position i predicts label i + 1, or ``classification``, where it predicts its own.
        max_consecutive_rejects: after so many in a row the next batch is accepted, whatever the policy; None: no limit.
    Attributes:
        sketch, subspace: the `TensorSketch` of batches, and the `FrequentDirections` of accepted ones.
        beta: β; of a gate that finds it by itself final at the end of the burn-in.
        accepted_steps: steps with an accepted batch, updates of the optimizer; total_steps: calls of `step`.
        no_signal: batches rejected for want of a labelled token.
    Raises:
        InputError: any of these out of range.
    """

    def __init__(
        self,
        d_hidden: int,
        vocab_size: int,
        m: int = 512,
        k: int = 64,
        target_novelty: float | None = None,
        target_novelty_scaler: float | None = None,
        novelty_ema_rate: float = 0.01,
        burn_in: int | float = 2000,
        seed: int = 0,
        device: torch.device | str = "cpu",
        reorth_every: int = 128,
        k_topk: int = 64,
        *,
        target_accept_rate: float | None = None,
        policy: str = "novelty",
        head: str = "lm",
        max_consecutive_rejects: int | None = None,
    ) -> None:
        self.target = target_rate(target_novelty, target_accept_rate)
        if target_novelty_scaler is not None and not 0 < target_novelty_scaler < math.inf:
            raise InputError(f"target_novelty_scaler must be above 0 and finite, got {target_novelty_scaler}")
        if not 0 < novelty_ema_rate <= 1:
            raise InputError(f"novelty_ema_rate must be in (0, 1], got {novelty_ema_rate}")
        for name, value, choices in (("policy", policy, POLICIES), ("head", head, HEADS)):
            if value not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}{suggest(value, choices)}")
        _check_burn_in(burn_in)
        check_rejects(max_consecutive_rejects, self.target)
        if head == "classification":
            k_topk = min(k_topk, vocab_size)
        self.sketch = TensorSketch(d_hidden, vocab_size, m, top_k=k_topk, seed=seed, device=device)
        self.device = self.sketch.device
        self.subspace = FrequentDirections(m, k, rotate_every=reorth_every, device=self.device)
        self.policy, self.head, self.seed = policy, head, seed
        self._given_beta = target_novelty_scaler
        self.beta = _BETA if target_novelty_scaler is None else float(target_novelty_scaler)
        self.max_consecutive_rejects = max_consecutive_rejects
        self.accepted_steps = self.total_steps = self.no_signal = 0

        self._burn_in = burn_in
        self._planned: int | None = None
        self._speed = speed = min(20 * novelty_ema_rate, 1.0)
        floor_rate = (1 + self.target) / 2 if policy == "novelty+loss_floor" else self.target
        self._bar = _Bar(self.target, speed / self.beta, novelty_ema_rate)
        self._floor = _Bar(
            floor_rate, speed / 4, novelty_ema_rate
        )  # a hard bar in a unit normal is no steeper than β = 4
        self._losses = _Scale(novelty_ema_rate)
        self._uses_novelty = "novelty" in policy or policy == ORACLE
        self._uses_loss = "loss_floor" in policy
        self._draws = self._uses_novelty or policy == "random"
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        self._rng = np.random.default_rng([seed, 1])
        self._step_accepted = False
        self._gated = self._gated_accepts = self._rejects = 0  # decisions after burn-in; the current run of rejects
        self._measured: Tensor | None = None
        self._direction: tuple[Tensor, int, Tensor] | None = None  # the last z, its version, what `update` would add
        self._last: tuple[float, ...] = (_NAN, _NAN, _NAN)  # novelty, raw novelty and decision

    # --- a batch ---------------------------------------------------------------------------------------------------

    def embed(self, h: Tensor, logits: Tensor, labels: Tensor, *, shift: bool | None = None) -> Tensor:
        """The sketch ``(m,)`` of a batch's head gradient, from its forward pass; a sum over tokens, not a mean.

        Args:
            h: inputs of the head ``(..., d_hidden)``; logits: its outputs ``(..., vocab_size)``; detached here.
            labels: ``(...)``, −100 where there is none. On the CPU they let unlabelled rows be skipped even if the rest
                is on a GPU.
            shift: whether position i predicts label i + 1 of the last axis of ``labels``; by default it does for
                ``head="lm"``. False for rows that are aligned already.
        Raises:
            InputError: shapes or devices that do not fit.
        """
        if (self.head == "lm") if shift is None else shift:
            h, logits, labels = align_causal(h, logits, labels)
        elif labels.dim() != 1 and h.dim() == logits.dim() == labels.dim() + 1:
            h, logits, labels = h.flatten(0, -2), logits.flatten(0, -2), labels.flatten()
        return self.sketch.head_gradient(h, logits, labels)

    def reduce(self, z: Tensor) -> Tensor:
        """The sum of ``z (m,)`` over all ranks; ``z`` itself without torch.distributed. Every rank must call it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return z
        total = z.clone()
        torch.distributed.all_reduce(total)
        return total

    @torch.no_grad()
    def novelty(self, z: Tensor) -> Tensor:
        """Novelty of ``z (m,)``, a float32 scalar in [0, 1] on the device.

        0 for z = 0, NaN if z is not finite. The next `accept` is about this batch: in the same transfer it reads its
        norm and its raw novelty too.

        Raises:
            InputError: z of another shape.
        """
        if z.shape != (self.sketch.m,):
            raise InputError(f"a sketch must have shape ({self.sketch.m},), got {tuple(z.shape)}")
        with torch.autocast(self.device.type, enabled=False):
            unit, norm = _unit(z)
            self._direction = z, _version(z), torch.where(norm.isfinite(), unit, 0.0)
            raw = (1 - (self.subspace.basis @ unit).square().sum()).clamp(0, 1)
            calibrated = (raw / (1 - self.subspace.directions / self.sketch.m)).clamp_max(1)
            empty = norm == 0
            calibrated, raw = calibrated.masked_fill(empty, 0), raw.masked_fill(empty, 0)
        self._measured = torch.stack([calibrated.double(), raw.double(), norm])
        return calibrated

    def accept(self, nov: Tensor | float | None = None, loss: Tensor | float | None = None) -> bool:
        """Return whether the batch is accepted. Arguments are read from the device at once: the one synchronisation.

        Args:
            nov: what `novelty` returned; any number in [0, 1] if the gate is used without sketches; it may be left out
                under policies that do not use it.
            loss: the batch's mean loss, a scalar; needed by policies that use it, else only checked.
        Raises:
            InputError: a novelty that is not finite or outside [0, 1], a loss that is not finite, or either missing
                though the policy needs it. The gate is as it was before.
        """
        novelty, raw, norm, value = self._read(nov, loss)
        if norm == 0:
            return self._refuse()
        if novelty is None and self._uses_novelty:
            raise InputError(f"policy {self.policy} needs the batch's novelty; call accept(gate.novelty(z))")
        if value is None and self._uses_loss:
            raise InputError(f"policy {self.policy} needs the batch's loss; call accept(nov, loss)")
        if novelty is not None and not 0 <= novelty <= 1:
            raise InputError(
                f"novelty must be in [0, 1], got {novelty}; NaN means hidden states or logits that are not finite; "
                "lower the learning rate or use bf16 or fp32, and resume from the last checkpoint"
            )
        if value is not None and not math.isfinite(value):
            raise InputError(
                f"the loss is {value}; lower the learning rate or use bf16 or fp32, and resume from the last checkpoint"
            )
        novelty, value = _NAN if novelty is None else novelty, _NAN if value is None else value
        accepted = self._decide(novelty, value)
        self._measured = None
        self._last = (novelty, raw, float(accepted))
        self._step_accepted |= accepted
        return accepted

    def update(self, z: Tensor) -> None:
        """Adds the direction of an accepted batch's ``z (m,)`` to the basis; a z that is zero or not finite adds none.

        Raises:
            InputError: z of another shape.
        """
        if self._direction is not None and self._direction[0] is z and self._direction[1] == _version(z):
            # After a decision a GPU waits for the host: what `novelty` has queued before need not be queued again.
            self.subspace.update(self._direction[2])
            return
        with torch.no_grad():
            unit, norm = _unit(z)
            self.subspace.update(torch.where(norm.isfinite(), unit, 0.0))

    def step(self) -> None:
        """Ends a step, one batch or one accumulation window; if a batch in it was accepted, the step is an update."""
        self.total_steps += 1
        self.accepted_steps += self._step_accepted
        self._step_accepted = False

    # --- the decision ----------------------------------------------------------------------------------------------

    def _read(
        self, nov: Tensor | float | None, loss: Tensor | float | None
    ) -> tuple[float | None, float, float | None, float | None]:
        """Novelty, raw novelty, norm of z and loss, in one transfer; what was not measured is None, raw novelty NaN."""
        values: dict[str, float] = {}
        names, waiting = [], []
        if self._measured is not None:
            names, waiting = ["measured", "raw", "norm"], [self._measured]
        for name, x in (("novelty", nov), ("loss", loss)):
            if isinstance(x, Tensor) and x.numel() != 1:
                raise InputError(f"{name} must be one number, got shape {tuple(x.shape)}; give the batch's mean")
            if isinstance(x, Tensor) and x.device == self.device:
                names.append(name)
                waiting.append(x.detach().reshape(1))
            elif x is not None:
                values[name] = float(x)
        if waiting:
            values.update(zip(names, torch.cat([x.double() for x in waiting]).tolist()))
        return (
            values.get("novelty", values.get("measured")),
            values.get("raw", _NAN),
            values.get("norm"),
            values.get("loss"),
        )

    def _refuse(self) -> bool:
        if not self.no_signal:
            warnings.warn(
                "a batch without a labelled token is rejected: it has no gradient; check that truncation and masking "
                "leave labels (said once, then counted in gate.no_signal)",
                stacklevel=3,
            )
        self.no_signal += 1
        self._measured = None
        self._last = (_NAN, _NAN, 0.0)
        return False

    def _decide(self, novelty: float, loss: float) -> bool:
        draw = float(self._rng.random())
        score = self._losses.standardise(loss) if self._uses_loss else _NAN
        if self.in_burn_in:
            self._recent.append((novelty, score))
            return True
        self._start_bars()
        above = not self._uses_loss or score >= self._floor.value
        signal = novelty if self._uses_novelty else _CONSTANT
        new = not self._draws or draw < _logistic(self.beta * (signal - self._bar.value))
        accepted = (above and new) or self._rejects == self.max_consecutive_rejects
        self._rejects = 0 if accepted else self._rejects + 1
        self._gated += 1
        self._gated_accepts += accepted
        self._bar.move(accepted)
        self._floor.move(above if self._uses_novelty else accepted)
        return accepted

    def _start_bars(self) -> None:
        """Gives the bars that the policy uses their first values.

        From the later half of the burn-in: in the first, while the basis is young, everything is new.
        """
        recent = list(self._recent)[len(self._recent) // 2 :]
        if self._draws and math.isnan(self._bar.value):
            novelties = [novelty for novelty, _ in recent if not math.isnan(novelty)]
            novelties = novelties if self._uses_novelty else [_CONSTANT]
            rate = self.target / self._floor.rate if self._uses_loss else self.target  # of those above the floor
            self._set_gain()
            self._bar.value = _start_of_bar(novelties, rate, self.beta)
        if self._uses_loss and math.isnan(self._floor.value):
            scores = [score for _, score in recent if not math.isnan(score)]
            self._floor.value = float(np.quantile(scores, 1 - self._floor.rate)) if scores else 0.0

    def _set_gain(self) -> None:
        """Set β unless it was given, and how fast τ moves, from the burn-in, which a checkpoint holds."""
        recent = list(self._recent)[len(self._recent) // 2 :]
        novelties = [novelty for novelty, _ in recent if not math.isnan(novelty)] if self._uses_novelty else []
        spread = float(np.std(novelties)) if novelties else 0.0
        if self._given_beta is None:
            self.beta = _SPREADS / spread if spread > _LEAST_SPREAD else _BETA
        self._bar.gain = self._speed * max(1 / self.beta, spread / 2)

    # --- the run ---------------------------------------------------------------------------------------------------

    def plan(self, total_steps: int) -> int:
        """Says how many updates the run has, which a fractional burn-in needs; returns how many of them are gated.

        0 means that the run ends inside its burn-in: no gating would happen.

        Raises:
            InputError: total_steps below 1.
        """
        if total_steps < 1:
            raise InputError(f"a run must have at least 1 update, got {total_steps}")
        self._planned = total_steps
        return max(0, total_steps - self.burn_in_steps)

    @property
    def burn_in_steps(self) -> int:
        """Updates in the burn-in.

        Raises:
            InputError: burn-in is a fraction and nothing was planned.
        """
        if isinstance(self._burn_in, int):
            return self._burn_in
        if self._planned is None:
            raise InputError(
                f"burn_in={self._burn_in} is a fraction of the run; call gate.plan(total_steps) first, or give "
                "a number of updates"
            )
        return round(self._burn_in * self._planned)

    @property
    def in_burn_in(self) -> bool:
        """Return whether the next batch is accepted because the burn-in lasts."""
        return self.accepted_steps < self.burn_in_steps

    def acceptance_rate(self) -> float:
        """Accepted decisions of all since burn-in, in [0, 1]; 1 before the first. No batch without signal counts."""
        return self._gated_accepts / self._gated if self._gated else 1.0

    @property
    def gated_decisions(self) -> int:
        """Decisions after burn-in."""
        return self._gated

    @property
    def threshold(self) -> float:
        """τ, or for ``loss_floor`` the floor in the loss's unit; NaN in the burn-in and for other policies."""
        if self.policy == "loss_floor":
            return self._losses.mean + self._floor.value * math.sqrt(self._losses.variance)
        return self._bar.value if self._uses_novelty else _NAN

    def metrics(self) -> dict[str, float]:
        """The state after the last decision, for a log; NaN where a figure does not apply.

        ``gate/acceptance_ema`` is the running rate that moves the threshold.
        """
        novelty, raw, accepted = self._last
        return {
            "gate/novelty": novelty,
            "gate/novelty_raw": raw,
            "gate/accept": accepted,
            "gate/acceptance_rate": self.acceptance_rate(),
            "gate/acceptance_ema": self._bar.ema,
            "gate/threshold": self.threshold,
            "gate/accepted_steps": self.accepted_steps,
            "gate/total_steps": self.total_steps,
            "gate/no_signal": self.no_signal,
        }

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Settings that must match for a saved basis to be loaded."""
        sketch, subspace = self.sketch, self.subspace
        return {
            "d_hidden": sketch.d_hidden,
            "vocab_size": sketch.vocab_size,
            "m": sketch.m,
            "k": subspace.k,
            "k_topk": sketch.top_k,
            "reorth_every": subspace.rotate_every,
            "seed": self.seed,
            "head": self.head,
            # A basis of one kind of gradient means nothing to sketches of another; states from before hold no such key.
            **({"sketched": "lora"} if self.policy == ORACLE else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, as tensors, numbers, strings, lists and dicts.

        Take it between a decision and its `step`, or after; not between `novelty` and `accept`.
        """
        return {
            "settings": self._settings(),
            "policy": self.policy,
            "subspace": self.subspace.state_dict(),
            "bars": [[bar.value, bar.ema] for bar in (self._bar, self._floor)],
            "losses": [self._losses.mean, self._losses.variance, self._losses.count],
            "recent": [list(pair) for pair in self._recent],
            "generator": self._rng.bit_generator.state,
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "last": list(self._last),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was called: given the same batches, the same decisions follow.

        Policy, target, β and burn-in stay this gate's, so that a basis can be used with others. Under another policy
        the thresholds start again, from the same burn-in.

        Raises:
            InputError: a state whose sketch or basis was made with other settings.
        """
        saved, settings = state.get("settings", {}), self._settings()
        for name in {**settings, **saved}:
            if saved.get(name) != settings.get(name):
                raise InputError(
                    f"the saved gate has {name}={saved.get(name)}, this one {settings.get(name)}; its basis means "
                    "nothing here, so build the gate as it was or start without the state"
                )
        self.subspace.load_state_dict(state["subspace"])
        for bar, (value, ema) in zip((self._bar, self._floor), state["bars"]):
            bar.value, bar.ema = (value, ema) if state["policy"] == self.policy else (_NAN, bar.rate)
        self._losses.mean, self._losses.variance, self._losses.count = state["losses"]
        self._recent = deque(((novelty, score) for novelty, score in state["recent"]), maxlen=_RECENT)
        self._set_gain()
        self._rng.bit_generator.state = state["generator"]
        for name in _COUNTERS:
            setattr(self, name, state["counters"][name])
        self._last = tuple(state["last"])
        self._measured = None


_COUNTERS = (
    "accepted_steps", "total_steps", "no_signal", "_step_accepted", "_gated", "_gated_accepts", "_rejects"
)  # fmt: skip


def _check_burn_in(burn_in: int | float) -> None:
    if isinstance(burn_in, bool) or not (burn_in >= 0 if isinstance(burn_in, int) else 0 < burn_in < 1):
        raise InputError(
            f"burn_in must be a whole number of updates from 0, or a fraction of the run in (0, 1), got {burn_in}"
        )
