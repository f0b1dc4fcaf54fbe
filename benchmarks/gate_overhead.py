"""What the novelty gate costs in a LoRA training step, and what it saves.

    python benchmarks/gate_overhead.py --csv overhead.csv                      # a Llama-3-8B shape, on a GPU
    python benchmarks/gate_overhead.py --device cpu --model PATH
    python benchmarks/gate_overhead.py --device cpu --model minilm --task classification --batch 16 --seq 64

Paths on the same frozen weights: `peft`, plain PEFT with all its logits, seen by a hook on its head; for language
models `dense`, our packed pass, which hands its labelled rows to the gate. The gate has no burn-in, a warm basis
(sketches of this model among random directions) and a warm threshold. First every path takes turns with and without
the gate, all batches accepted: forward F, backward with optimizer B, the parts of the gate. Then whole runs in blocks
that alternate: all batches accepted, without a gate, and gated; forecast (F + B)/(F + pB) with the acceptance p that
was measured. On a GPU `graphed` is the dense path as it trains without a gate: from CUDA graphs of forward and backward
together, which a decision between the two rules out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch

from benchmarks.contextual import ATTENTION, LLAMA_3_8B
from sparselora.bench import timing
from sparselora.bench.payoff import Spread
from sparselora.bench.timing import TimedModel, adapt, build_model, convert_with, random_batch
from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.flops import Workload
from sparselora.models.load import resolve_device
from sparselora.models.model_files import public_name
from sparselora.novelty import HeadGradientGate
from sparselora.novelty.trainer import find_head

Batch = Mapping[str, torch.Tensor]
Turn = tuple[str, bool]  # a path's name, and whether the gate is on
GATE_PARTS = ("embed", "decide", "update")
WANTED = {"gate_percent": "at most 2", "speedup": "at least 1.45", "forecast_error_percent": "within ±5"}

_WARM_BATCHES, _DIRECTIONS_A_BATCH = 48, 42  # 2,064 updates of the basis
_BURST = 4  # steps of a turn on a GPU; the first waits for the host to start, and is not counted
_BLOCKS = 10


class GatedModel(TimedModel):
    """A `TimedModel` whose backward waits for `gate`; without one it trains on every batch, on the same path."""

    def __init__(self, model: Any, device: torch.device, path: str) -> None:
        convert = convert_with(SparsityConfig(mode="dense")) if path != "peft" else None
        super().__init__(model, device, bf16=device.type == "cuda", convert=convert)
        self.gate: HeadGradientGate | None = None
        self._spans: list[list[tuple[str, Any, Any]]] = []
        self._seen: Any = None  # of the latest pass: hidden states and logits, or the sum of its rows' sketches
        self._head, self._kind = find_head(self.model)
        if path == "peft":
            self._head.register_forward_hook(self._on_head)
        elif path == "dense" and self.handle is not None:
            self.handle.observe_head(self._observe)

    def new_gate(self, state: Mapping[str, Any] | None = None, **settings: Any) -> HeadGradientGate:
        V, d = self._head.get_parameter("weight").shape
        gate = HeadGradientGate(d, V, device=self.device, head=self._kind, **settings)
        if state is not None:
            gate.load_state_dict(dict(state))
        return gate

    def _on_head(self, module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if self.gate is not None:
            self._seen = inputs[0].detach(), output.detach()

    def _observe(self, hidden: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        if self.gate is None:
            return
        with self._span("observe"):
            if self._seen is None:
                self._seen = self.gate.sketch.accumulate()
            self._seen.add(hidden, logits, targets)

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._spans[-1].append((name, start, self._mark()))

    def train(self, batch: Batch, *, backward: bool = True) -> bool:
        """One step; whether the batch was accepted. ``backward=False`` drops the graph all the same."""
        self._spans.append([])
        layout, accepted = self._layout(batch), True
        with self._span("forward"):
            if self.handle is not None:
                self.handle.begin_step(0, 1)
            with torch.autocast("cuda", torch.bfloat16) if self._bf16 else nullcontext():
                loss = self.model(**self._moved(batch, layout)).loss
        if self.gate is not None:
            accepted = self._decide(self.gate, batch["labels"], loss.detach())
        if accepted and backward:
            with self._span("backward"):
                loss.backward()
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
        return accepted

    def _decide(self, gate: HeadGradientGate, labels: torch.Tensor, loss: torch.Tensor) -> bool:
        seen, self._seen = self._seen, None
        with self._span("embed"):
            sketch = gate.embed(seen[0], seen[1], labels) if isinstance(seen, tuple) else seen.value()
        with self._span("decide"):
            accepted = gate.accept(gate.novelty(sketch), loss)
        if accepted:
            with self._span("update"):
                gate.update(sketch)
        gate.step()
        return accepted

    def phases(self) -> list[dict[str, float]]:
        """Milliseconds by phase of the steps since the last call; the gate's work in the forward pass is the gate's."""
        steps, self._spans = self._spans, []
        cuda, found = self.device.type == "cuda", []
        if cuda:
            torch.cuda.synchronize()
        for spans in steps:
            ms: dict[str, float] = defaultdict(float)
            for name, start, end in spans:
                ms[name] += start.elapsed_time(end) if cuda else 1000 * (end - start)
            ms["forward"] -= ms["observe"]
            ms["embed"] += ms.pop("observe")
            found.append(ms)
        return found


class Overhead:
    """One model, its paths, and the rows measured so far: a quantity's median, quartiles and number of values."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.cuda = args, device.type == "cuda"
        self.causal = args.task == "causal_lm"
        seq = args.seq or (512 if self.cuda else 128)
        self.work = Workload(args.batch, seq, (args.labelled or seq // 4) if self.causal else 0)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        model: Any = build_model(args.model or LLAMA_3_8B, causal=self.causal, device=device, dtype=dtype, seed=0)
        self.vocabulary = int(model.config.vocab_size)
        model.requires_grad_(False)  # so that copies share its weights
        base = adapt(model, r=32, alpha=64, targets=None if args.model else ATTENTION, causal=self.causal)
        names = ["peft", "dense", "graphed"][: 1 + self.causal * (1 + self.cuda)]
        self.paths = {name: GatedModel(base, device, name) for name in names}
        self.gated = [name for name in names if name != "graphed"]
        self.turns = deque([*((name, False) for name in names), *((name, True) for name in self.gated)])
        self.rows: list[dict[str, Any]] = []

    def batches(self, first: int, count: int) -> list[Batch]:
        return [random_batch(self.vocabulary, self.work, causal=self.causal, seed=first + i) for i in range(count)]

    def train(self, turn: Turn, gates: Mapping[str, HeadGradientGate], batches: Sequence[Batch]) -> int:
        """Trains on ``batches`` one after the other; how many were accepted."""
        path = self.paths[turn[0]]
        path.gate = gates[turn[0]] if turn[1] else None
        return sum(path.train(batch) for batch in batches)

    def gates(self, state: Mapping[str, Any], **settings: Any) -> dict[str, HeadGradientGate]:
        return {name: self.paths[name].new_gate(state, burn_in=0, **settings) for name in self.gated}

    def note(self, path: str, quantity: str, values: Sequence[float]) -> float:
        """Adds a row and returns its median."""
        spread = Spread.of(values)
        self.rows.append({"path": path, "quantity": quantity, **vars(spread), "n": len(values)})
        more = f"  [{spread.low:.4g}, {spread.high:.4g}]" if len(values) > 1 else ""
        more += f"   wanted: {WANTED[quantity]}" if quantity in WANTED else ""
        print(f"{path:>8}  {quantity:<24} {spread.median:10.4g}{more}", flush=True)
        return spread.median

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def warm(self) -> dict[str, Any]:
        """The state of a gate that has seen batches of this model, and 2,000 random directions between them."""
        path = self.paths["dense" if self.causal else "peft"]
        gate = path.gate = path.new_gate(burn_in=10**9)
        generator = torch.Generator().manual_seed(1)
        for batch in self.batches(1_000_000, _WARM_BATCHES):
            path.train(batch, backward=False)
            for direction in torch.randn(_DIRECTIONS_A_BATCH, gate.sketch.m, generator=generator).to(gate.device):
                gate.update(direction)
        path.phases()
        return gate.state_dict()

    def split(self, state: Mapping[str, Any]) -> None:
        """F, B and the parts of the gate: every path in turn with and without it, every batch accepted."""
        gates, size = self.gates(state, policy="accept_all"), _BURST if self.cuda else 1
        found: dict[Turn, list[dict[str, float]]] = defaultdict(list)
        for turn in self.turns:
            self.train(turn, gates, self.batches(0, 3))  # a graph is captured by the second step
            self.probe(turn, gates)
        for i in range(self.args.rounds):
            self.turns.rotate(-1)  # each comes first in turn
            for turn in self.turns:
                self.train(turn, gates, self.batches(size * i, size))
                found[turn] += self.paths[turn[0]].phases()[1 if self.cuda else 0 :]
        for name in self.gated:
            self.note_split(name, found[name, False], found[name, True], self.paths[name].new_gate(state))

    def note_split(self, name: str, plain: Sequence[Any], gated: Sequence[Any], gate: HeadGradientGate) -> None:
        forward = self.note(name, "forward_ms", [step["forward"] for step in plain])
        self.note(name, "backward_ms", [step["backward"] for step in plain])
        for part in GATE_PARTS:
            self.note(name, f"{part}_ms", [step[part] for step in gated])
        share = self.note(name, "renewal_ms", self.renewals(gate)) / gate.subspace.rotate_every
        spent = [sum(step[part] for part in GATE_PARTS) + share for step in gated]
        self.note(name, "gate_ms", spent)
        self.note(name, "gate_percent", [100 * ms / forward for ms in spent])
        self.note(name, "added_to_step_ms", [sum(b.values()) - sum(a.values()) for a, b in zip(plain, gated)])

    def probe(self, turn: Turn, gates: Mapping[str, HeadGradientGate]) -> None:
        """How often a step makes the host wait, and its peak memory; a replayed graph's memory does not count."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            with timing._counting_waits() as count:
                self.train(turn, gates, self.batches(3, 1))
            kind = "gated" if turn[1] else "ungated"
            self.note(turn[0], f"host_waits_{kind}", [count()])
            self.note(turn[0], f"peak_mb_{kind}", [torch.cuda.max_memory_allocated() / 1e6])
        self.paths[turn[0]].phases()

    def renewals(self, gate: HeadGradientGate) -> list[float]:
        """Milliseconds of an update that renews the basis, as every `reorth_every`-th does."""
        times, every = [], gate.subspace.rotate_every
        for _ in range(6 * every):
            row, before = torch.randn(gate.sketch.m, device=gate.device), self.now()
            gate.update(row)
            if gate.subspace.updates % every == 0:
                times.append(1000 * (self.now() - before))
        return times[1:]

    def race(self, state: Mapping[str, Any]) -> None:
        """Wall clock of `--steps` batches, in alternating blocks."""
        gates = self.gates(state, target_accept_rate=self.args.rate)
        seconds: dict[Turn, float] = defaultdict(float)
        accepted: dict[Turn, int] = defaultdict(int)
        size = -(-self.args.steps // _BLOCKS)
        for start in range(0, self.args.steps, size):
            batches = self.batches(start, min(size, self.args.steps - start))
            self.turns.rotate(-1)
            for turn in self.turns:
                before = self.now()
                accepted[turn] += self.train(turn, gates, batches)
                seconds[turn] += self.now() - before
                self.paths[turn[0]].phases()
        medians = {(row["path"], row["quantity"]): row["median"] for row in self.rows}
        for name in self.gated:
            rate = self.note(name, "accepted", [accepted[name, True] / self.args.steps])
            every = self.note(name, "accept_all_s", [seconds[name, False]])
            speedup = every / self.note(name, "gated_s", [seconds[name, True]])
            self.note(name, "speedup", [speedup])
            F, B = medians[name, "forward_ms"], medians[name, "backward_ms"]
            forecast = self.note(name, "forecast", [(F + B) / (F + rate * B)])
            self.note(name, "forecast_error_percent", [100 * (speedup / forecast - 1)])
        if "graphed" in self.paths:
            graphed = self.note("graphed", "accept_all_s", [seconds["graphed", False]])
            self.note("dense", "speedup_over_graphed", [graphed / seconds["dense", True]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--model", help="folder, hub name or minilm (default: a Llama-3-8B shape with random weights)")
    parser.add_argument("--task", choices=("causal_lm", "classification"), default="causal_lm")
    parser.add_argument("--batch", type=int, default=8, help="rows (default: 8)")
    parser.add_argument("--seq", type=int, help="tokens of a row (default: 512 on a GPU, else 128)")
    parser.add_argument("--labelled", type=int, help="labelled tokens of a row, its last ones (default: a quarter)")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of the split (default: 12)")
    parser.add_argument("--steps", type=int, default=200, help="batches of a whole run (default: 200)")
    parser.add_argument("--rate", type=float, default=0.3, help="acceptance that the gate aims at (default: 0.3)")
    parser.add_argument("--csv", type=Path, help="file for the table")
    args = parser.parse_args()
    device = resolve_device(args.device)
    if device.type == "cpu" and args.model is None:
        parser.error("on a CPU, give --model: the Llama-3-8B shape needs a GPU")
    bench = Overhead(args, device)
    model = public_name(args.model) if args.model else "Llama-3-8B shape"
    where = torch.cuda.get_device_name() if bench.cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{model} on {where}, torch {torch.__version__}\n{bench.work}", flush=True)
    state = bench.warm()
    for measure in (bench.split, bench.race):
        measure(state)
        if args.csv:  # after each part: a run that is cut short keeps what it has
            run = {"model": model, "device": where, **vars(bench.work), "steps": args.steps, "rate": args.rate}
            pd.DataFrame(bench.rows).assign(**run).to_csv(args.csv, index=False)


if __name__ == "__main__":
    main()
