"""A Trainer whose backward passes are gated: `SLoRATrainer`.

Every batch goes forward once. Its gradient is sketched from that pass (what the head saw, and its logits), the gate
decides, and backward runs on the graph that is already there, or the graph is dropped. What is rejected leaves
parameters, gradients, optimizer and schedule as they were; the learning rate moves with accepted updates only.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from sparselora.config.novelty import ORACLE, GateConfig
from sparselora.data.batches import PLANTED
from sparselora.errors import InputError
from sparselora.models.four_bit import is_4bit
from sparselora.models.labels import IGNORED
from sparselora.novelty.gate import HeadGradientGate
from sparselora.novelty.manipulation import manipulation_check
from sparselora.novelty.sketch import GradientSketch, SketchSum

Tensor = torch.Tensor

STATE = "gate.pt"
"""The gate's file in a checkpoint."""

ACCELERATE = ">=1.10,<2"
"""Releases of accelerate whose seams this module relies on: `Trainer.training_step` calls ``accelerator.backward``, the
training loop ``optimizer.step``, and ``accelerator.optimizer_step_was_skipped``, which holds the schedule back, reads
``optimizer._is_overflow``. Each is checked at every step, so that another release ends in an error and not in a run
without a gate."""

GATE_COLUMNS = ("step", "micro", "novelty", "novelty_raw", "accept", "acceptance_rate", "threshold", "accepted_steps",
                "total_steps", "loss", "tokens", "tokens_seen", "tokens_trained", "wall_s", "planted")  # fmt: skip
"""One row a decision: ``step`` and ``micro`` say of which window and which of its batches (0 for the whole window),
``loss`` is the true mean loss of what was decided on, accepted or not, ``tokens`` its tokens without padding (of
several processes, the main one's), the columns behind it their running sums, and ``wall_s`` the seconds of training so
far. ``accepted_steps`` and ``total_steps`` count windows, as of the end of the row's own. ``planted`` is the share of
its examples that the data mark as near-duplicates (`PLANTED`), NaN without marks."""

_ON_HOST = "gate_on_host"
_NO_GRADIENT = (
    "no parameter gets a gradient; attach a LoRA (peft.get_peft_model), and with gradient checkpointing call "
    "model.enable_input_require_grads()"
)
_STUCK_AFTER = 200
_STUCK = 0.15
_BLIND = 0.5  # β times the spread of the novelties, below which the odds of acceptance hardly depend on them


# --- what a forward pass shows -------------------------------------------------------------------------------------


def find_head(model: nn.Module) -> tuple[nn.Module, str]:
    """The linear layer that makes the logits, and its kind: ``lm`` or ``classification``.

    Raises:
        InputError: none is found, or the logits are more than its output (capped or scaled).
    """
    inner: Any = model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    config = getattr(inner, "config", None)
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise InputError(
                f"the model's logits are not its head's output ({name}); the novelty gate needs a plain head"
            )
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is not None:
        return head, "lm"
    classes = getattr(config, "num_labels", None)
    heads = [
        module for name, module in inner.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes and "original_module" not in name
    ]  # fmt: skip
    if not heads:
        raise InputError(
            f"no head was found in {type(inner).__name__}: neither output embeddings nor a linear layer with "
            f"num_labels={classes} outputs; the novelty gate needs a language model or a sequence classifier"
        )
    return heads[-1], "classification"


def build_gate(
    model: Any, config: GateConfig, *, seed: int, device: torch.device
) -> tuple[nn.Module, HeadGradientGate]:
    """The head of ``model`` and its gate.

    Raises:
        InputError: no plain head (`find_head`), or settings that its sizes do not allow.
    """
    head, kind = find_head(model)
    outputs, inputs = _head_sizes(head)
    return head, HeadGradientGate(inputs, outputs, seed=seed, device=device, head=kind, **config.gate_arguments())


def _head_sizes(head: nn.Module) -> tuple[int, int]:
    """``(V, d)`` of the output layer."""
    weight: Any = getattr(head, "base_layer", head).weight
    outputs, inputs = weight.quant_state.shape if is_4bit(weight) else weight.shape
    return outputs, inputs


@dataclass
class _Shown:
    """Input and output of the head in the latest forward pass, or rows that a fused loss has handed over."""

    hidden: Tensor | None = None
    logits: Tensor | None = None
    rows: SketchSum | None = None

    def clear(self) -> None:
        self.hidden = self.logits = self.rows = None


@dataclass(frozen=True)
class _OnHost:
    """Facts of a batch that the host reads without waiting for the device: its labels, and tokens without padding."""

    labels: Tensor
    tokens: int
    rows: int
    planted: float


class _WithLabels:
    """A collator whose batches carry `_OnHost`; no tensor itself, it is not moved to the device with the batch."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: Any) -> Any:
        batch = self._collator(examples)
        if "labels" in batch:
            mask, labels = batch.get("attention_mask"), batch["labels"].cpu()
            planted = sum(float(e[PLANTED]) if isinstance(e, Mapping) and PLANTED in e else math.nan for e in examples)
            tokens = int(labels.numel() if mask is None else mask.sum())
            batch[_ON_HOST] = _OnHost(labels, tokens, len(examples), planted)
        return batch


# --- the window at hand --------------------------------------------------------------------------------------------


@dataclass
class _Decision:
    """One decision's part of the log; ``loss`` stays on the device until the log is read."""

    row: dict[str, float]
    loss: Tensor


@dataclass
class _Window:
    """The accumulation window so far.

    ``held`` are the losses that wait for a decision on the whole window, and ``sum`` what it will be made on.
    ``weight`` and ``accepted_weight`` are the parts of the gradient's normalisation: labels, or batches.
    """

    held: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)
    sum: Tensor | None = None
    facts: tuple[_OnHost, ...] = ()
    micro: int = 0
    weight: float = 0.0
    accepted_weight: float = 0.0
    accepted: int = 0
    decisions: list[_Decision] = field(default_factory=list)


@dataclass
class _Batch:
    """The batch that goes forward: its facts on the host, the count of its labels, and how its loss is normalised."""

    facts: _OnHost
    count: int
    items: Any


class SLoRATrainer(Trainer):
    """A Trainer that runs backward only for batches whose head gradient is new (`HeadGradientGate`).

    Args:
        gate_config: a `GateConfig` or a mapping of its settings, by the names of `HeadGradientGate`.
        gate_log: CSV file of the decisions, written at checkpoints, now and then, and at the end; by default
            ``gate.csv`` in the output folder.
        args, kwargs: the Trainer's.

    ``max_steps`` and ``num_train_epochs`` count windows, accepted or not. The schedule of the learning rate spans the
    updates that the target rate lets expect, so that it ends where it would.

    Attributes:
        gate: the gate.
    Raises:
        InputError: bad settings, or a gate that is off (the transformers Trainer trains without one); a model whose
            head is not found.
    """

    def __init__(
        self,
        *args: Any,
        gate_config: GateConfig | Mapping[str, Any],
        gate_log: Path | None = None,
        **kwargs: Any,
    ) -> None:
        self.gate_config = GateConfig.from_dict(gate_config) if isinstance(gate_config, Mapping) else gate_config
        if not self.gate_config.enable:
            raise InputError("gate_config has enable: false; train with transformers.Trainer, or enable the gate")
        super().__init__(*args, **kwargs)
        if str(self.accelerator.distributed_type.value) not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise InputError(
                f"the novelty gate runs on one device or with DistributedDataParallel, not with "
                f"{self.accelerator.distributed_type.value}; take another accelerate configuration"
            )
        if not self._trained_parameters():
            raise InputError(_NO_GRADIENT)
        self._head, self.gate = build_gate(self.model, self.gate_config, seed=self.args.seed, device=self.args.device)
        self._gate_log = gate_log or Path(str(self.args.output_dir)) / "gate.csv"
        self._shown, self._window = _Shown(), _Window()
        self._batch: _Batch | None = None
        self._decisions: list[_Decision] = []
        self._rows: list[dict[str, float]] = []
        self._seen = self._trained = self._decided_step = 0
        self._began: float | None = None
        self._rejected = self._told_stuck = self._told_blind = self._checked_gradients = False
        self._gradients: GradientSketch | None = None
        if self.gate.policy == ORACLE:
            self._gradients = GradientSketch(
                self._lora_parameters(), self.gate_config.m, self.args.seed, self.gate.device
            )
        self._accelerator_backward = self.accelerator.backward
        self.accelerator.backward = self._offer
        self.add_callback(_GateCallback(self))

    # --- what the forward pass shows ---

    def train(self, *args: Any, **kwargs: Any) -> Any:
        hook = self._head.register_forward_hook(self._on_head)
        try:
            return super().train(*args, **kwargs)
        finally:
            hook.remove()

    def _on_head(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._batch is not None:
            self._shown.hidden, self._shown.logits = inputs[0].detach(), output.detach()

    def head_rows(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> None:
        """For a loss that never forms all logits: rows ``(T, d)``, their logits ``(T, V)`` and what they predict."""
        if self._batch is None or not self._sketches_head():
            return
        if self._shown.rows is None:
            self._shown.rows = self.gate.sketch.accumulate()
        self._shown.rows.add(hidden, logits, targets)

    def _sketches_head(self) -> bool:
        return "novelty" in self.gate_config.policy

    def _has_novelty(self) -> bool:
        return self._sketches_head() or self._gradients is not None

    def _sketch(self) -> Tensor:
        """The sketch of the batch that has just gone forward; where none is needed, how many labels it had."""
        assert self._batch is not None
        shown, batch = self._shown, self._batch
        if not self._sketches_head():
            counted = torch.zeros(self.gate.sketch.m, device=self.gate.device)
            counted[0] = batch.count
            return counted
        if shown.rows is not None:
            return shown.rows.value()
        if batch.count == 0:
            return torch.zeros(self.gate.sketch.m, device=self.gate.device)
        if shown.logits is None or shown.hidden is None:
            raise InputError(
                "the head made no logits in the forward pass (a fused loss?); the novelty gate needs them, or a loss "
                "that calls head_rows"
            )
        return self.gate.embed(shown.hidden, shown.logits, batch.facts.labels)

    # --- a batch ---

    def get_train_dataloader(self) -> Any:
        collator, self.data_collator = self.data_collator, _WithLabels(self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._began is None:
            self._began = time.perf_counter() - (self._rows[-1]["wall_s"] if self._rows else 0.0)
        self._batch = self._described(inputs, num_items_in_batch)
        try:
            # Whether gradients are to be averaged over processes is not known before the decision: done by hand.
            with self.accelerator.no_sync(model):
                loss = super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError:
            raise InputError(
                "out of GPU memory; lower the batch per device, use unit: micro_batch (a window holds the graphs of "
                "all its batches), gradient checkpointing or 4-bit weights"
            ) from None
        finally:
            self._batch = None
            self._shown.clear()
        if self.accelerator.sync_gradients:
            self._end_window(model)
        return loss

    def _described(self, inputs: Any, items: Any) -> _Batch:
        facts: _OnHost | None = inputs.pop(_ON_HOST, None)
        if facts is None:
            raise InputError("the novelty gate needs labels in every batch")
        shifted = facts.labels[..., 1:] if self.gate.head == "lm" else facts.labels
        return _Batch(facts, int((shifted != IGNORED).sum()), items)

    def _offer(self, loss: Tensor, **kwargs: Any) -> None:
        """In place of the accelerator's backward: decide first."""
        assert self._batch is not None
        batch, window = self._batch, self._window
        normalised = batch.items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
        weight = float(batch.count) if normalised else 1.0
        mean = loss.detach() * (self._own_share(batch) if normalised else self.current_gradient_accumulation_steps)
        evidence = torch.cat(
            [self._sketch().float(), torch.stack([mean.float() * weight, torch.full_like(mean, weight).float()])]
        )
        window.weight += weight
        if self.gate_config.unit == "micro_batch":
            if self._run_if_accepted([(loss, kwargs)], evidence, (batch.facts,)):
                window.accepted_weight += weight
            window.micro += 1
            return
        window.held.append((loss, kwargs))
        window.facts += (batch.facts,)
        window.sum = evidence if window.sum is None else window.sum + evidence
        if self.accelerator.sync_gradients:
            if self._run_if_accepted(window.held, window.sum, window.facts):
                window.accepted_weight = window.weight
            window.held.clear()

    def _run_if_accepted(
        self, held: list[tuple[Tensor, dict[str, Any]]], evidence: Tensor, facts: Sequence[_OnHost]
    ) -> bool:
        """Decide on the losses in ``held`` and run their backward passes if they are accepted."""
        if self._gradients is None:
            accepted = self._decide(evidence, facts)
            if accepted:
                self._run_backward(held)
            return accepted
        # The oracle runs them in any case, decides by the gradient, and drops it again.
        trained = self._trained_parameters()
        earlier = [p.grad for p in trained]
        for p in trained:
            p.grad = None
        self._run_backward(held)
        sketch = self._gradients.value()
        # Without a label there is no gradient, or the NaN of a mean over none.
        sketch = torch.where(evidence[0] > 0, sketch, torch.zeros_like(sketch))
        accepted = self._decide(torch.cat([sketch, evidence[-2:]]), facts)
        for p, before in zip(trained, earlier):
            if not accepted:
                p.grad = before
            elif before is not None:
                p.grad = before if p.grad is None else before + p.grad
        return accepted

    def _own_share(self, batch: _Batch) -> Any:
        """By what the loss, a share of the window's mean over labels, is multiplied to be this batch's own mean."""
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return batch.items / max(batch.count, 1) / processes

    def _decide(self, evidence: Tensor, facts: Sequence[_OnHost]) -> bool:
        """Ask the gate; ``evidence (m + 2,)`` is the sketch, the sum of the losses by weight, and their weight."""
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(evidence)
            torch.distributed.broadcast(evidence, 0)  # an order of summation that differs would let decisions differ
        sketch, mean = evidence[:-2], evidence[-2] / evidence[-1]
        accepted = self.gate.accept(self.gate.novelty(sketch), mean)
        if accepted and self._has_novelty():
            self.gate.update(sketch)
        tokens = sum(fact.tokens for fact in facts)
        self._window.accepted += accepted
        self._seen += tokens
        self._trained += tokens * accepted
        row: dict[str, float] = {
            "micro": self._window.micro, "tokens": tokens, "tokens_seen": self._seen, "tokens_trained": self._trained,
        }  # fmt: skip
        metrics = self.gate.metrics()
        row |= {name: metrics[f"gate/{name}"] for name in ("accept", "acceptance_rate", "threshold")}
        for name in ("novelty", "novelty_raw"):
            row[name] = metrics[f"gate/{name}"] if self._has_novelty() else float("nan")
        row["planted"] = sum(fact.planted for fact in facts) / sum(fact.rows for fact in facts)
        self._window.decisions.append(_Decision(row, mean))
        return accepted

    def _run_backward(self, held: list[tuple[Tensor, dict[str, Any]]]) -> None:
        for loss, kwargs in held:
            self._accelerator_backward(loss, **kwargs)
        if not self._checked_gradients:
            self._checked_gradients = True
            if all(p.grad is None for p in self._trained_parameters()):
                raise InputError(_NO_GRADIENT)

    def _end_window(self, model: nn.Module) -> None:
        window, self._window = self._window, _Window()
        if not window.decisions:
            raise InputError(
                "a step ended without a decision of the novelty gate: its backward pass did not go through "
                "accelerator.backward; call super().training_step, or self.accelerator.backward(loss)"
            )
        self.gate.step()
        self._rejected = window.accepted == 0
        if not self._rejected:
            self._finish_gradients(window)
        now = time.perf_counter() - (self._began or 0.0)
        for decision in window.decisions:
            decision.row |= {
                "step": self.state.global_step + 1, "accepted_steps": self.gate.accepted_steps,
                "total_steps": self.gate.total_steps, "wall_s": now,
            }  # fmt: skip
        self._decisions += window.decisions
        self._decided_step = self.state.global_step + 1
        self._warn_if_stuck()
        self._warn_if_blind()

    def _finish_gradients(self, window: _Window) -> None:
        """The mean over what was accepted, and over processes."""
        trained = self._trained_parameters()
        weights = window.weight, window.accepted_weight
        processes = self.accelerator.num_processes
        if processes > 1 and self._tokens_are_shared():
            totals = torch.tensor(weights, device=self.args.device)
            torch.distributed.all_reduce(totals)
            weights = tuple(totals.tolist())
        factor = weights[0] / weights[1] if weights[1] else 1.0
        if factor != 1.0:
            torch._foreach_mul_([p.grad for p in trained if p.grad is not None], factor)
        if processes > 1:
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
            torch.distributed.all_reduce(flat)
            for p, part in zip(trained, (flat / processes).split([p.numel() for p in trained])):
                p.grad = part.view_as(p)

    def _trained_parameters(self) -> list[nn.Parameter]:
        assert self.model is not None
        return [p for p in self.model.parameters() if p.requires_grad]

    def _lora_parameters(self) -> list[nn.Parameter]:
        """Return the trained factors of LoRA; of a model without any, all trained parameters."""
        assert self.model is not None
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return [p for name, p in trained.items() if "lora_" in name] or list(trained.values())

    def _tokens_are_shared(self) -> bool:
        return self.gate.head == "lm" and bool(self.args.average_tokens_across_devices)

    def _warn_if_stuck(self) -> None:
        metrics, target = self.gate.metrics(), self.gate.target
        decided = self.gate.gated_decisions
        off = metrics["gate/acceptance_ema"] - target
        if self._told_stuck or self.gate.policy == "accept_all" or decided < _STUCK_AFTER or abs(off) < _STUCK:
            return
        self._told_stuck = True
        cure = "raise novelty_ema_rate, so that the threshold follows faster, or lower target_novelty_scaler"
        warnings.warn(
            f"acceptance runs at {metrics['gate/acceptance_ema']:.2f}, the target is {target:g}, after {decided} "
            f"decisions; {cure}",
            stacklevel=2,
        )

    def _warn_if_blind(self) -> None:
        if self._told_blind or not self._has_novelty() or self.gate.gated_decisions < _STUCK_AFTER:
            return
        self._told_blind = True
        rows = [*self._rows, *(decision.row for decision in self._decisions)][-_STUCK_AFTER:]
        spread = float(pd.Series([row["novelty"] for row in rows]).std())
        if self.gate.beta * spread < _BLIND:
            better = f"{2 / spread:.0f}" if spread > 0 else "more"
            warnings.warn(
                f"novelty decides little: its spread over the last {_STUCK_AFTER} decisions is {spread:.3f}, far below "
                f"1/target_novelty_scaler, so batches are accepted nearly at random; raise target_novelty_scaler from "
                f"{self.gate.beta:g} to about {better}",
                stacklevel=2,
            )

    # --- updates ---

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        gated = self.gate.plan(num_training_steps)
        if gated == 0 and self.gate.policy != "accept_all":
            warnings.warn(
                f"no gating will happen: the run's {num_training_steps} updates end inside the burn-in of "
                f"{self.gate.burn_in_steps}; lower burn_in, a share such as 0.1 say, or train longer",
                stacklevel=2,
            )
        if gated:
            rate = 1.0 if self.gate.policy == "accept_all" else self.gate.target
            num_training_steps = num_training_steps - gated + max(1, round(rate * gated))
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._rejected:
            return torch.zeros(())
        return super()._clip_grad_norm(model)

    # --- records ---

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self.gate.metrics()
        super().log(logs, *args, **kwargs)

    def gate_table(self) -> pd.DataFrame:
        """Every decision so far, with the columns `GATE_COLUMNS`; reads the losses from the device."""
        if self._decisions:
            losses = torch.stack([decision.loss for decision in self._decisions]).tolist()
            self._rows += [decision.row | {"loss": loss} for decision, loss in zip(self._decisions, losses)]
            self._decisions = []
        table = pd.DataFrame(self._rows, columns=list(GATE_COLUMNS))
        whole = ["step", "micro", "accept", "accepted_steps", "total_steps", "tokens", "tokens_seen", "tokens_trained"]
        return table.astype(dict.fromkeys(whole, "int64"))

    def write_gate_log(self) -> None:
        """Bring the file of decisions up to date; only the main process writes."""
        table = self.gate_table()
        if self.is_world_process_zero():
            self._gate_log.parent.mkdir(parents=True, exist_ok=True)
            new = self._gate_log.with_suffix(".new")
            table.to_csv(new, index=False)
            new.replace(self._gate_log)

    def manipulation_check(self) -> dict[str, float]:
        """Return `sparselora.novelty.manipulation.manipulation_check` of the decisions so far."""
        return manipulation_check(self.gate_table(), self.gate.policy, self.gate.beta)

    # --- checkpoints ---

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.gate.state_dict() | {"rows": self.gate_table().to_dict("list")}, Path(output_dir) / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        if not path.is_file():
            raise InputError(
                f"{checkpoint} holds no state of a gate; resume with the settings of the run, or start again"
            )
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        self._rows = pd.DataFrame(state.pop("rows")).to_dict("records")
        self.gate.load_state_dict(state)
        if self._rows:
            self._seen, self._trained = int(self._rows[-1]["tokens_seen"]), int(self._rows[-1]["tokens_trained"])


class _GateCallback(TrainerCallback):
    """Keeps rejected windows from the optimizer, and the log up to date."""

    _EVERY = 100

    def __init__(self, trainer: SLoRATrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        trainer, step = self._trainer, optimizer.step
        self._stepped = 0

        @functools.wraps(step)  # with the mark by which a scheduler knows its optimizer
        def step_if_accepted(*arguments: Any, **named: Any) -> Any:
            # What the Trainer asks before it moves the schedule.
            optimizer._is_overflow = trainer._rejected
            self._stepped = trainer._decided_step
            return None if trainer._rejected else step(*arguments, **named)

        optimizer.step = step_if_accepted

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, decided = self._trainer, self._trainer._decided_step
        if decided != state.global_step:
            raise InputError(
                f"step {state.global_step} ended and the novelty gate decided on none since step {decided}: "
                "training_step is overridden; have it call super().training_step(model, inputs, num_items_in_batch)"
            )
        if self._stepped != decided:
            raise self._unsupported("the optimizer stepped past the novelty gate")
        if trainer._rejected and not trainer.accelerator.optimizer_step_was_skipped:
            raise self._unsupported("the schedule moved with a rejected step")
        if state.global_step % self._EVERY == 0:
            self._trainer.write_gate_log()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.write_gate_log()

    @staticmethod
    def _unsupported(what: str) -> InputError:
        version = importlib.metadata.version("accelerate")
        return InputError(f"{what}; it needs accelerate {ACCELERATE} (installed: {version}) and its optimizer's step")
