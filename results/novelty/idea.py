"""Novelty of the head gradient's sketch as a proxy for the novelty of the true LoRA gradient.

    python results/novelty/idea.py --model storyllama-20m --dataset mawps_train_valid.jsonl \\
        --prompt_field question --completion_field equation --out_dir results/novelty/idea_decoder
    python results/novelty/idea.py --task classification --model minilm --dataset sst2_sentences_train.jsonl \\
        --out_dir results/novelty/idea_encoder

Trains with every step accepted, by the settings of decoder.yaml or encoder.yaml, and measures each batch before it
joins the past, one number a signal:

- ``sketch_novelty``: of the sketch, against a Frequent Directions basis that is renewed every step;
- ``gate_novelty``: the same with the basis as the gate keeps it, renewed every ``reorth_every`` updates;
- ``head_novelty``: 1 − ‖Vĝ‖² of the exact head gradient, V the k leading directions of all past unit gradients;
- ``lora_novelty``: the same of the exact gradient of all LoRA factors together, the truth that the gate is after.

Writes idea.csv (a row a step and seed), idea_summary.csv (how well each signal predicts the truth, over the whole run
and by thirds) and idea.png. Novelties fall and losses fall as training goes on, so that anything that falls
correlates with them: ``earliness`` (minus the step) is the control for that, and the measures *given the step* leave
out what the step explains. Past gradients are kept whole, 8 bytes · steps · parameters: for small models only.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from sparselora.cli import Parser, add_run_arguments, print_request, run_command
from sparselora.config.train import TrainConfig
from sparselora.data.load import Data, load_data
from sparselora.errors import InputError
from sparselora.models.labels import IGNORED
from sparselora.novelty import HeadGradientGate
from sparselora.novelty.sketch import align_causal
from sparselora.novelty.trainer import find_head
from sparselora.numerics.stats import mean_interval
from sparselora.report.markdown import markdown_table, number
from sparselora.report.style import COLORS, new_figure, save_figure
from sparselora.runs.files import write_csv
from sparselora.runs.folder import RunFolder
from sparselora.runs.request import RunRequest
from sparselora.training.checkpoints import remove_checkpoints
from sparselora.training.resume import CHECKPOINTS
from sparselora.training.run import PreparedRun, fine_tuner, prepare

Tensor = torch.Tensor
Array = NDArray[np.float64]

HERE = Path(__file__).parent
BASES = {"causal_lm": "decoder.yaml", "classification": "encoder.yaml"}
TRUTH, HEAD = "lora_novelty", "head_novelty"
PREDICTORS = ("sketch_novelty", "gate_novelty", HEAD, "loss", "grad_norm", "labels", "earliness", "random")
"""What may tell a batch of new gradient. ``grad_norm`` (of the LoRA gradient) is known only after backward, ``labels``
is how many the batch has."""
TOP = 0.3
"""The share of batches that a gate is asked to pick."""
STRETCHES = ("whole run", "first third", "second third", "last third")
OUTPUTS = ("run.json", "idea.csv", "idea_summary.csv", "idea.png")


# --- what is measured ---------------------------------------------------------------------------------------------


class ExactBasis:
    """The k leading directions of all unit vectors so far, exactly, through their Gram matrix; all in float64.

    Args:
        steps: how many vectors will come; size: their length; k: rank of the subspace.
    """

    def __init__(self, steps: int, size: int, k: int, device: torch.device) -> None:
        self.k = k
        self._past = torch.empty(steps, size, dtype=torch.float64, device=device)
        self._gram = np.zeros((steps, steps))
        self._count = 0

    def novelty(self, vector: Tensor) -> float:
        """1 − ‖Vĝ‖² of ``vector (size,)`` against what came before, which it then joins; 1 for the first."""
        n = self._count
        unit = vector.double() / torch.linalg.vector_norm(vector.double())
        inner = (self._past[:n] @ unit).cpu().numpy()
        novelty = 1 - self._energy(inner)
        self._past[n] = unit
        self._gram[n, :n] = self._gram[:n, n] = inner
        self._gram[n, n] = 1.0
        self._count += 1
        return float(np.clip(novelty, 0.0, 1.0))

    def _energy(self, inner: Array) -> float:
        """‖Vĝ‖² from ĝ's inner products with the past: V = Λ^(−1/2) Uᵀ · past, of the Gram matrix U Λ Uᵀ."""
        n = self._count
        if n == 0:
            return 0.0
        values, vectors = np.linalg.eigh(self._gram[:n, :n])
        leading = slice(max(0, n - self.k), n)
        values, vectors = values[leading], vectors[:, leading]
        real = values > values[-1] * n * np.finfo(np.float64).eps
        return float((((vectors.T @ inner)[real]) ** 2 / values[real]).sum())


def head_gradient(hidden: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Σ_t (softmax(logits_t) − onehot(target_t)) h_tᵀ, flat ``(V·d,)`` float64; arguments as for a `TensorSketch`."""
    rows = (targets != IGNORED).nonzero().squeeze(1)
    error = torch.softmax(logits[rows].double(), dim=1)
    error[torch.arange(len(rows), device=error.device), targets[rows]] -= 1
    return (error.T @ hidden[rows].double()).flatten()


class Observer:
    """Measures every batch of a Trainer between its backward pass and its update.

    Attributes:
        rows: a dictionary a step, the columns of idea.csv.
    """

    def __init__(self, trainer: Any, run: PreparedRun) -> None:
        config = run.config
        assert config.novelty is not None
        self.rows: list[dict[str, float]] = []
        self._config, self._steps = config, config.max_steps
        self._lora = [p for name, p in run.model.named_parameters() if ".lora_" in name and p.requires_grad]
        head: Any
        head, self._kind = find_head(run.model)
        outputs, inputs = head.weight.shape
        settings = config.novelty.gate_arguments() | {"policy": "accept_all", "burn_in": 0}
        self._gates = [
            HeadGradientGate(inputs, outputs, seed=config.seed, device=run.device, head=self._kind, **options)
            for options in (settings | {"reorth_every": 1}, settings)
        ]
        sizes = (sum(p.numel() for p in self._lora), outputs * inputs)
        self._exact = [ExactBasis(self._steps, size, config.novelty.k, run.device) for size in sizes]
        self._rng = np.random.default_rng([config.seed, 2])
        self._seen: tuple[Tensor, Tensor] | None = None
        self._labels: Tensor | None = None
        head.register_forward_hook(self._on_head)
        run.model.register_forward_pre_hook(self._on_batch, with_kwargs=True)
        self._backward = trainer.accelerator.backward
        trainer.accelerator.backward = self._observed

    def _on_batch(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._labels = named["labels"]

    def _on_head(self, module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._seen = inputs[0].detach(), output.detach()

    def _observed(self, loss: Tensor, **named: Any) -> None:
        self._backward(loss, **named)
        self.rows.append(self._measured(float(loss.detach())))

    @torch.no_grad()
    def _measured(self, loss: float) -> dict[str, float]:
        assert self._seen is not None
        assert self._labels is not None
        hidden, logits = self._seen
        labels = self._labels
        fast, shipped = self._gates
        z = fast.embed(hidden, logits, labels)
        novelty = [float(gate.novelty(z)) for gate in (fast, shipped)]
        for gate in (fast, shipped):
            gate.update(z)
        if self._kind == "lm":
            hidden, logits, labels = align_causal(hidden, logits, labels)
        lora = torch.cat([p.grad.flatten() for p in self._lora if p.grad is not None])
        true, head = self._exact
        step = len(self.rows) + 1
        return {
            "seed": self._config.seed,
            "step": step,
            "third": -(-3 * step // self._steps),
            "sketch_novelty": novelty[0],
            "gate_novelty": novelty[1],
            HEAD: head.novelty(head_gradient(hidden, logits, labels)),
            TRUTH: true.novelty(lora),
            "loss": loss,
            "grad_norm": float(torch.linalg.vector_norm(lora.double())),
            "labels": int((labels != IGNORED).sum()),
            "random": float(self._rng.random()),
        }


def observe(config: TrainConfig, data: Data, folder: RunFolder) -> pd.DataFrame:
    """Train by ``config``, every batch accepted, and measure each."""
    run = prepare(config, data, folder, None)
    plain = dataclasses.replace(run, config=config.merge({"novelty": "none"}))
    trainer = fine_tuner(plain, lambda metrics, evaluations: None)
    observer = Observer(trainer, run)
    trainer.train()
    remove_checkpoints(folder.folder / CHECKPOINTS, folder.fingerprint)  # the Trainer makes the folder, without need
    return pd.DataFrame(observer.rows)


# --- how well it predicts -----------------------------------------------------------------------------------------


def rank_correlation(signal: Array, truth: Array, step: Array) -> float:
    return float(scipy_stats.spearmanr(signal, truth).statistic)


def rank_correlation_given_step(signal: Array, truth: Array, step: Array) -> float:
    """Partial rank correlation: of the ranks, less what a line in the step says of them."""
    return float(scipy_stats.pearsonr(_less_trend(signal, step), _less_trend(truth, step)).statistic)


def top_auc(signal: Array, truth: Array, step: Array) -> float:
    """Return how often a batch among the `TOP` share by ``truth`` has more signal than one that is not."""
    top = scipy_stats.rankdata(truth) > (1 - TOP) * len(truth)
    return float(scipy_stats.mannwhitneyu(signal[top], signal[~top]).statistic / (top.sum() * (~top).sum()))


def top_auc_given_step(signal: Array, truth: Array, step: Array) -> float:
    return top_auc(_less_trend(signal, step), _less_trend(truth, step), step)


def _less_trend(values: Array, step: Array) -> Array:
    ranks = scipy_stats.rankdata(values)
    return np.asarray(ranks - np.polyval(np.polyfit(step, ranks, 1), step))


Measure = Callable[[Array, Array, Array], float]
MEASURES: dict[str, Measure] = {
    "spearman": rank_correlation,
    "spearman_given_step": rank_correlation_given_step,
    "auc": top_auc,
    "auc_given_step": top_auc_given_step,
}


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a stretch of training, truth, signal and measure: mean over seeds with a 95 % t interval.

    The first step, where all is new, is left out. A signal that is constant, or a function of the step where that is
    held, has no row.
    """
    rows = rows[rows["step"] > 1].assign(earliness=-rows["step"])
    table = []
    for stretch, part in _stretches(rows):
        for truth, signal in _questions():
            for measure, function in MEASURES.items():
                if signal == "earliness" and measure.endswith("given_step"):
                    continue
                values = [_of_seed(seed, signal, truth, function) for _, seed in part.groupby("seed")]
                if any(np.isnan(values)):
                    continue
                over = mean_interval(values)
                table.append({"stretch": stretch, "truth": truth, "signal": signal, "measure": measure,
                              "n_seeds": over.n, "n_steps": len(part) // over.n, "mean": over.mean,
                              "ci_low": over.low, "ci_high": over.high,
                              "least": min(values), "most": max(values)})  # fmt: skip
    return pd.DataFrame(table)


def _stretches(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield STRETCHES[0], rows
    for third, name in enumerate(STRETCHES[1:], start=1):
        yield name, rows[rows["third"] == third]


def _questions() -> Iterator[tuple[str, str]]:
    yield from ((TRUTH, signal) for signal in PREDICTORS)
    yield from ((HEAD, signal) for signal in PREDICTORS if signal != HEAD)


def _of_seed(rows: pd.DataFrame, signal: str, truth: str, measure: Measure) -> float:
    x, y, step = (rows[name].to_numpy(np.float64) for name in (signal, truth, "step"))
    return float("nan") if np.ptp(x) == 0 or np.ptp(y) == 0 else measure(x, y, step)


# --- what is shown ------------------------------------------------------------------------------------------------

_THIRDS = (("first third", "sky", "o"), ("second third", "orange", "s"), ("last third", "red", "^"))
_SHOWN = (
    ("sketch_novelty", "sketch", "blue", "o"), ("gate_novelty", "sketch, gate's basis", "sky", "s"),
    (HEAD, "exact head gradient", "green", "D"), ("loss", "loss", "purple", "v"),
    ("grad_norm", "gradient norm", "orange", "^"), ("earliness", "earliness", "black", "P"),
    ("random", "random", "grey", "x"),
)  # fmt: skip


def figure(path: Path, rows: pd.DataFrame, summary: pd.DataFrame, title: str) -> None:
    """Sketch novelty against the truth, and how each signal's ranks correlate with it; the data is idea.csv's."""
    with new_figure(7.6) as drawn:
        (scatter, legends), (whole, by_step) = drawn.subplots(2, 2, height_ratios=(1, 1.1))
        for third, (name, color, marker) in enumerate(_THIRDS, start=1):
            part = rows[(rows["third"] == third) & (rows["step"] > 1)]
            scatter.plot(part["sketch_novelty"], part[TRUTH], ls="", marker=marker, ms=4, alpha=0.6,
                         color=COLORS[color], label=f"{name} (n = {len(part)})")  # fmt: skip
        scatter.set(xlabel="novelty of the head gradient's sketch", ylabel="novelty of the true LoRA gradient")
        _correlations(whole, summary, "spearman", "correlation with the true novelty")
        _correlations(by_step, summary, "spearman_given_step", "the same, given the step")
        whole.set_ylabel("Spearman's rank correlation")
        legends.set_axis_off()
        batches = legends.legend(*scatter.get_legend_handles_labels(), loc="upper left", title="left: batches of the")
        legends.add_artist(batches)
        legends.legend(*whole.get_legend_handles_labels(), loc="lower left", title="below: signals")
        seeds = rows["seed"].nunique()
        drawn.suptitle(f"{title}\n{seeds} seeds, bars: 95 % interval over seeds", fontsize=11)
        save_figure(drawn, path)


def _correlations(axes: Any, summary: pd.DataFrame, measure: str, title: str) -> None:
    table = summary[(summary["truth"] == TRUTH) & (summary["measure"] == measure)].set_index(["signal", "stretch"])
    for place, (signal, name, color, marker) in enumerate(_SHOWN):
        shift = 0.11 * (place - (len(_SHOWN) - 1) / 2)
        points = [(x + shift, table.loc[(signal, s)]) for x, s in enumerate(STRETCHES) if (signal, s) in table.index]
        if not points:
            continue
        places, rows = [x for x, _ in points], pd.DataFrame([row for _, row in points])
        axes.vlines(places, rows["ci_low"], rows["ci_high"], color=COLORS[color], lw=1.2, alpha=0.6)
        axes.plot(places, rows["mean"], ls="", marker=marker, ms=6, color=COLORS[color], label=name)
    axes.axhline(0, color=COLORS["black"], lw=1)
    axes.set_xticks(range(len(STRETCHES)), [stretch.replace(" ", "\n") for stretch in STRETCHES])
    axes.set(ylim=(-1.05, 1.05), title=title)


def table_text(summary: pd.DataFrame, truth: str) -> str:
    """Every measure over the whole run, and the correlation given the step by thirds, as Markdown."""
    cells = summary[summary["truth"] == truth]
    table = cells.set_index(["signal", "stretch", "measure"])
    columns = [(STRETCHES[0], measure) for measure in MEASURES]
    columns += [(stretch, "spearman_given_step") for stretch in STRETCHES[1:]]
    header = ["signal", *(f"{measure}, {stretch}" for stretch, measure in columns)]
    signals = dict.fromkeys(cells["signal"])
    return markdown_table(header, [[name, *(_cell(table, (name, *column)) for column in columns)] for name in signals])


def _cell(table: pd.DataFrame, key: tuple[str, str, str]) -> str:
    if key not in table.index:
        return ""
    row = table.loc[key]
    ends = [number(row[name], "+.2f") for name in ("ci_low", "ci_high")]
    return number(row["mean"], "+.2f") + (f" [{', '.join(ends)}]" if all(ends) else "")


# --- the command --------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", required=True, help="local folder, GGUF file, hub name, minilm or smollm2")
    data.add_argument("--dataset", required=True, help="named data set or a file")
    data.add_argument("--prompt_field", help="field of the prompt (causal_lm)")
    data.add_argument("--completion_field", help="field of the completion (causal_lm)")
    data.add_argument("--task", choices=sorted(BASES), default="causal_lm", help="decides the YAML of the settings")
    training = parser.add_argument_group("training (what is not given is the YAML's)")
    training.add_argument("--steps", type=int, default=100, help="steps of a run (100)")
    training.add_argument("--batch", type=int, help="samples of a batch")
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each (0 1 2)")
    training.add_argument("--k", type=int, help="rank of every basis")
    training.add_argument("--m", type=int, help="length of a sketch, a power of two")
    training.add_argument("--reorth_every", type=int, help="steps between renewals of the gate's own basis")
    training.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    add_run_arguments(parser, "idea", seed=False)
    return parser


def settings(args: argparse.Namespace) -> TrainConfig:
    """The YAML's settings with the flags in place of them; ``novelty`` holds what the gate is built with."""
    if args.steps < 12:
        raise InputError(f"--steps must be 12 or more, four a third, got {args.steps}")
    changes = {name: getattr(args, name) for name in ("model", "dataset", "prompt_field", "completion_field", "device")}
    changes |= {"max_steps": args.steps, "train_bsz": args.batch, "grad_accum": 1, "eval_steps": 0, "eval_samples": 1}
    novelty = {"k": args.k, "m": args.m, "reorth_every": args.reorth_every}
    return TrainConfig.from_yaml(HERE / BASES[args.task]).merge(changes | {"novelty": novelty})


def run(args: argparse.Namespace) -> None:
    config = settings(args)
    arguments = config.to_dict() | {"seeds": args.seeds, "device": args.device.partition(":")[0]}
    del arguments["seed"]
    request = RunRequest(
        "idea", Path(args.out_dir), arguments, OUTPUTS, vars(args), inputs=("model", "dataset"),
        overwrite=args.overwrite,
    )  # fmt: skip
    if args.dry_run:
        print_request(request)
        return
    folder = request.open()
    if folder.is_finished():
        print(folder.finished_message())
        return
    rows = _seeds_done(folder)
    with folder:
        data = load_data(config)
        for seed in args.seeds:
            if not len(rows) or seed not in set(rows["seed"]):
                rows = pd.concat([rows, observe(config.merge({"seed": seed}), data, folder)], ignore_index=True)
                write_csv(folder.path("idea.csv"), rows)
        summary = summarise(rows)
        write_csv(folder.path("idea_summary.csv"), summary)
        figure(folder.path("idea.png"), rows, summary, _title(config, data))
    print(f"predicting {TRUTH} (mean over seeds [95 %]):\n\n{table_text(summary, TRUTH)}\n")
    print(f"predicting {HEAD}:\n\n{table_text(summary, HEAD)}\n\nwrote {args.out_dir}")


def _seeds_done(folder: RunFolder) -> pd.DataFrame:
    """The rows of the seeds that an interrupted run with these arguments has finished."""
    done = folder.folder / "idea.csv"
    return pd.read_csv(done) if folder.can_resume() and done.is_file() else pd.DataFrame()


def _title(config: TrainConfig, data: Data) -> str:
    from sparselora.models.model_files import public_name

    assert config.model is not None
    assert config.novelty is not None
    gate = config.novelty
    return (
        f"{public_name(config.model)} on {data.name}: {config.max_steps} steps of {config.train_bsz}, "
        f"k = {gate.k}, m = {gate.m}, LoRA r {config.lora_r}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    command = parser()
    return run_command(run, command.parse_args(argv), command.prog)


if __name__ == "__main__":
    sys.exit(main())
