"""The rise of the loss when one layer at a time is sparse, and the layer sparsities that follow for a FLOP budget.

Forward passes alone, over rows of the training data. The schedule that is chosen and a uniform one of the same budget
are then measured on further rows. Settings are those of `train`: data, model, train_bsz and sparsity (mode, ranks,
compensation, which tokens) matter here; what is about the adapter and its optimization does not.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sparselora.cli import Parser, add_run_arguments, output_folder, run_in_folder, source_name
from sparselora.config.flags import COMMON_DATA, add_config_flags, resolve_config
from sparselora.config.sparsity import Part, SparsityConfig
from sparselora.config.train import TrainConfig
from sparselora.contextual.flops import Shape, Workload
from sparselora.contextual.modes import selects_channels
from sparselora.data.load import load_data
from sparselora.errors import InputError
from sparselora.models.adapter_config import read_peft_config
from sparselora.models.model_files import find_model, model_facts, model_label
from sparselora.runs.files import write_csv, write_text
from sparselora.runs.folder import RunFolder
from sparselora.runs.request import RunRequest

if TYPE_CHECKING:
    import torch

    from sparselora.contextual.layer_sensitivity import Increase, Losses, SparseMacs
    from sparselora.data.batches import Example

    Batch = Mapping[str, torch.Tensor]

OUTPUTS = (
    "run.json", "sensitivity.csv", "allocation.csv", "check.csv", "chosen.yaml", "uniform.yaml",
    "loss_by_layer.csv", "loss_by_layer.png",
)  # fmt: skip
_MATTERS = (
    "model", "task", "dataset", "eval_file", "text_fields", "label_field", "prompt_field", "completion_field",
    "template", "train_samples", "max_length", "train_bsz", "dtype", "seed",
)  # fmt: skip
_OWN = ("ffn_levels", "attention_levels", "samples", "held_out", "budget", "adapter")
"""Settings of the measurement itself, by the names of their flags."""
_FFN_LEVELS = (0.5, 0.75, 0.9, 0.99)
_ATTENTION_LEVELS = (0.25, 0.5, 0.75)
_LEARNED = 0.95
"""A classifier whose loss is above this share of that of guessing has not learned: its head is fresh, most likely."""
_CHANCE = 0.1

EXAMPLES = """\
  sparselora sensitivity configs/llama_sparse.yaml --model ./llama --dataset rows.jsonl
  sparselora sensitivity --model minilm --dataset docstrings --adapter runs/dense/adapter --budget 0.5"""


def add_arguments(parser: Parser) -> None:
    add_config_flags(parser)
    measure = parser.add_argument_group("measurement")
    measure.add_argument(
        "--ffn_levels", type=float, nargs="*", default=list(_FFN_LEVELS), metavar="S",
        help="FFN sparsities to measure; no value: none",
    )  # fmt: skip
    measure.add_argument(
        "--attention_levels", type=float, nargs="*", default=list(_ATTENTION_LEVELS), metavar="S",
        help="attention sparsities to measure; no value: none",
    )  # fmt: skip
    measure.add_argument("--samples", type=int, default=64, metavar="N", help="training rows to measure on")
    measure.add_argument("--held_out", type=int, default=64, metavar="N", help="other rows to check the schedules on")
    measure.add_argument(
        "--budget", type=float, default=0.5, metavar="SHARE",
        help="share of the frozen projections' dense FLOPs that sparse tokens may compute",
    )  # fmt: skip
    measure.add_argument("--adapter", metavar="DIR", help="adapter of a dense run to measure with")
    add_run_arguments(parser, "sensitivity_results/<model>", seed=False)
    parser.add_argument("--cache_dir", metavar="DIR", help="folder that keeps estimators and calibration between runs")
    parser.shorten_help((*COMMON_DATA, "sparsity", "sparsity.mode", *_OWN))


# --- settings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Checked settings of one measurement, from the flags and the configuration."""

    config: TrainConfig
    sparsity: SparsityConfig
    levels: dict[Part, list[float]]
    samples: int
    held_out: int
    budget: float
    adapter: str | None
    cache_dir: str | None

    @property
    def causal(self) -> bool:
        return self.config.task == "causal_lm"

    @property
    def parts(self) -> list[Part]:
        return [part for part, levels in self.levels.items() if levels]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that decide the result."""
        values = self.config.to_dict()
        sparsity = {n: v for n, v in self.sparsity.to_dict().items() if "_sparsity" not in n}
        return {
            **{name: values[name] for name in _MATTERS}, "device": self.config.device.partition(":")[0],
            "sparsity": sparsity, **{f"{part}_levels": levels for part, levels in self.levels.items()},
            "samples": self.samples, "held_out": self.held_out, "budget": self.budget, "adapter": self.adapter,
            **({"load_in_4bit": True} if self.config.load_in_4bit else {}),
        }  # fmt: skip


def resolve(args: argparse.Namespace) -> Plan:
    if args.config is not None and args.config.suffix not in (".yaml", ".yml") and not args.config.is_file():
        if args.model is not None:
            raise InputError(f"two models given, {args.config} and --model {args.model}; give one")
        args.model, args.config = args.config.as_posix(), None
    config = resolve_config(args)
    for name in ("model", "dataset"):
        if getattr(config, name) is None:
            raise InputError(f"no {name} given; set it in the configuration or by --{name}")
    sparsity = config.seeded_sparsity or SparsityConfig(seed=config.seed)
    if not sparsity.is_sparse:
        raise InputError(f"mode {sparsity.mode} leaves nothing out; measure another by --sparsity.mode")
    levels: dict[Part, list[float]] = {
        "ffn": sorted(set(args.ffn_levels)),
        "attention": sorted(set(args.attention_levels)) if sparsity.facts.has_attention else [],
    }
    for value in (*levels["ffn"], *levels["attention"]):
        if not 0 < value < 1:
            raise InputError(f"a level must be above 0 and below 1, got {value:g}")
    if not any(levels.values()):
        raise InputError("no levels given; give --ffn_levels or --attention_levels some numbers")
    if not 0 < args.budget < 1:
        raise InputError(f"--budget must be above 0 and below 1, got {args.budget:g}")
    for name in ("samples", "held_out"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.adapter is not None:
        read_peft_config(Path(args.adapter))
    return Plan(config, sparsity, levels, args.samples, args.held_out, args.budget, args.adapter, args.cache_dir)


# --- the run ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    plan = resolve(args)
    model = plan.config.model
    assert model is not None

    def body(folder: RunFolder) -> None:
        setup = prepare(plan, folder)
        with folder:
            summary = measure(plan, setup, folder)
        print(summary)
        print(f"wrote {folder.folder}: train --sparsity {folder.folder / 'chosen.yaml'} uses the schedule")

    folder = output_folder(args, "sensitivity_results", source_name(model))
    request = RunRequest(
        "sensitivity",
        folder,
        plan.arguments,
        tuple(OUTPUTS),
        settings=plan.arguments | {"out_dir": folder},
        inputs=("model", "dataset", "eval_file", "adapter"),
        seed=plan.config.seed,
        overwrite=args.overwrite,
    )
    run_in_folder(request, body, dry_run=args.dry_run, check=lambda: find_model(model))


@dataclass(frozen=True)
class Setup:
    """The model on its device, and batches to measure on, to check on and to calibrate with (None: not needed).

    ``dense`` are the losses of the dense model on what is measured on.
    """

    model: Any
    measured: list[Batch]
    held_out: list[Batch]
    calibration: list[Batch] | None
    macs: SparseMacs
    dense: Losses
    name: str
    bf16: bool


def prepare(plan: Plan, folder: RunFolder) -> Setup:
    import torch
    from transformers import set_seed

    from sparselora.contextual.layer_sensitivity import SparseMacs, evaluate
    from sparselora.evaluation.losses import with_adapter
    from sparselora.models import load as models

    config = plan.config
    assert config.model is not None
    device = models.resolve_device(config.device)
    folder.note(device=models.device_name(device), **model_facts(config.model))
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and device.type == "cuda")
    data = load_data(config, plan.adapter)
    set_seed(config.seed)  # before a head is drawn
    model: Any
    if plan.causal:
        model, tokenizer = models.load_causal_lm(
            config.model, torch.bfloat16 if bf16 else torch.float32, in_4bit=config.load_in_4bit,
            flash_attention=config.use_flash_attention_2,
        )  # fmt: skip
    else:
        model, tokenizer = models.load_classifier(config.model, num_labels=len(data.labels))
    if plan.adapter is not None:
        model = with_adapter(model, plan.adapter)
    model.to(device).requires_grad_(False)
    draws = _draw(len(data.train), plan)
    batches = [_batches(data.train.iloc[rows], data.text_fields, tokenizer, plan, device) for rows in draws]
    macs = SparseMacs(Shape.from_config(model.config.to_dict()), _workload(batches[0], plan.causal))
    dense = evaluate(model, batches[0], bf16=bf16)
    setup = Setup(model, batches[0], batches[1], batches[2] or None, macs, dense, data.name, bf16)
    _check_trained(plan, setup)
    _check_schedules(plan, setup)
    return setup


def _check_schedules(plan: Plan, setup: Setup) -> None:
    """Raise for a budget that no schedule has, or a sparsity that the model does not take, before all is measured."""
    from sparselora.contextual.layer_sensitivity import (
        cells,
        choose_schedule,
        sparse_losses,
        uniform_schedule,
        with_layers,
    )

    every = cells(setup.macs.shape.layers, plan.levels, plan.sparsity)
    unmeasured = [{**vars(cell), "loss_increase": 0.0} for cell in every]
    choose_schedule(plan.sparsity, unmeasured, setup.macs, plan.budget)
    uniform_schedule(plan.sparsity, setup.macs, plan.budget, plan.parts)
    sparse_losses(
        setup.model, setup.measured[:1], with_layers(plan.sparsity, [every[0], every[-1]]),
        calibration=setup.calibration, cache_dir=plan.cache_dir, bf16=setup.bf16,
    )  # fmt: skip


def _draw(rows: int, plan: Plan) -> list[np.ndarray]:
    """Rows to measure on, to check on, and to calibrate with, disjoint. The first two are the same in every mode."""
    fitted = plan.sparsity.calibration_samples if plan.sparsity.needs_calibration else 0
    need = plan.samples + plan.held_out + fitted
    if need > rows:
        raise InputError(
            f"{need} rows are needed (--samples {plan.samples}, --held_out {plan.held_out}, calibration {fitted}), "
            f"the training data has {rows}; ask for fewer"
        )
    order = np.random.default_rng(plan.config.seed).permutation(rows)
    return np.split(order[:need], [plan.samples, plan.samples + plan.held_out])


def _batches(frame: pd.DataFrame, fields: Sequence[str], tokenizer: Any, plan: Plan, device: Any) -> list[Batch]:
    from sparselora.data.batches import Collator, encode_texts
    from sparselora.data.instructions import encode_instructions

    if not len(frame):
        return []
    config, examples = plan.config, list[Any]()
    if plan.causal:
        examples = encode_instructions(frame, tokenizer, config.max_length).examples
    else:
        examples = encode_texts(frame, fields, tokenizer, config.max_length)
    if config.group_by_length:
        examples.sort(key=_length)
    collator = Collator(tokenizer.pad_token_id, plan.causal, longest=min(config.max_length, tokenizer.model_max_length))
    parts = [examples[i : i + config.train_bsz] for i in range(0, len(examples), config.train_bsz)]
    return [{name: value.to(device) for name, value in collator.tensors(part).items()} for part in parts]


def _length(example: Example) -> int:
    return len(example["input_ids"])


def _workload(batches: Sequence[Batch], causal: bool) -> Workload:
    """The batches' average row."""
    rows = sum(len(batch["input_ids"]) for batch in batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    outputs = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches) if causal else 0
    return Workload(max(1, rows // len(batches)), max(1, round(tokens / rows)), round(outputs / rows))


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(plan: Plan, setup: Setup, folder: RunFolder) -> str:
    """Measure, choose, check and write; what to print."""
    from tqdm import tqdm

    from sparselora.contextual.layer_sensitivity import (
        cells,
        choose_schedule,
        sensitivity,
        sparse_losses,
        uniform_schedule,
    )
    from sparselora.report.sensitivity import loss_by_layer

    base, reference, macs = plan.sparsity, setup.dense, setup.macs
    losses = partial(
        sparse_losses, setup.model, calibration=setup.calibration, cache_dir=plan.cache_dir, bf16=setup.bf16
    )
    every = cells(macs.shape.layers, plan.levels, base)
    with tqdm(total=len(every), unit="layer", disable=not sys.stderr.isatty(), leave=False) as bar:
        rows = sensitivity(partial(losses, setup.measured), reference, base, every, bar.update)
    table = pd.DataFrame(rows).assign(
        macs_saved=[macs.saved(base, cell) for cell in every], dense_loss=reference.mean, batches=len(setup.measured)
    )
    write_csv(folder.path("sensitivity.csv"), table)
    uniform = uniform_schedule(base, macs, plan.budget, plan.parts)
    schedules = {"uniform": uniform, "chosen": choose_schedule(base, rows, macs, plan.budget)}
    check, verdict = _check(setup, losses, schedules, macs, rows)
    write_csv(folder.path("check.csv"), check)
    allocation = _allocation(every, schedules, macs)
    write_csv(folder.path("allocation.csv"), allocation)
    for name, config in schedules.items():
        write_text(folder.path(f"{name}.yaml"), _yaml(name, config, plan, setup, macs))
    loss_by_layer(
        folder.path("loss_by_layer.png"), table, allocation.rename(columns={"chosen": "sparsity"}),
        {part: uniform.ratio(0, part) for part in plan.parts} if selects_channels(base) else {},
        f"{model_label(str(plan.config.model))} on {setup.name}, mode {base.mode}, "
        f"n = {len(setup.measured)} batches of {plan.config.train_bsz}",
    )  # fmt: skip
    return _report(plan, setup, reference.mean, allocation, check, verdict) + _doubt(table)


def _check_trained(plan: Plan, setup: Setup) -> None:
    if plan.causal:
        return
    loss = setup.dense.mean
    guessing = math.log(setup.model.config.num_labels)
    if loss >= _LEARNED * guessing:
        raise InputError(
            f"the dense model's loss is {loss:.3f}, no better than guessing ({guessing:.3f}), so nothing can be "
            "measured by it; give a trained classifier, or --adapter DIR of a dense run"
        )


def _doubt(table: pd.DataFrame) -> str:
    """A warning where fewer layers help: such a model does not know these data, and no layer shows its worth."""
    helped = int((table["loss_increase"] < -2 * table["standard_error"]).sum())
    if helped <= _CHANCE * len(table):
        return ""
    return (
        f"\nwarning: {helped} of {len(table)} cells lower the loss by more than two standard errors, so the model does "
        "not fit these data yet; train dense for some steps and give --adapter DIR"
    )


def _check(
    setup: Setup, losses: Any, schedules: Mapping[str, SparsityConfig], macs: Any, rows: Sequence[Mapping[str, Any]]
) -> tuple[pd.DataFrame, str]:
    """The schedules on rows that were not used to choose, and a sentence about their difference."""
    from sparselora.contextual.layer_sensitivity import evaluate, increase, predicted_increase

    dense = evaluate(setup.model, setup.held_out, bf16=setup.bf16)
    held_out = {name: losses(setup.held_out, config) for name, config in schedules.items()}
    table = [{"schedule": "dense", "remaining": 1.0, "predicted_increase": 0.0, "loss": dense.mean,
              "loss_increase": 0.0, "standard_error": 0.0}]  # fmt: skip
    for name, config in schedules.items():
        change = increase(held_out[name], dense)
        table.append({"schedule": name, "remaining": macs.remaining(config),
                      "predicted_increase": predicted_increase(config, rows), **vars(change)})  # fmt: skip
    gap = increase(held_out["chosen"], held_out["uniform"])
    return pd.DataFrame(table).assign(batches=len(setup.held_out)), difference_text(gap)


def difference_text(gap: Increase) -> str:
    """The loss of the chosen schedule minus that of the uniform one, and whether it is more than noise."""
    difference = f"chosen minus uniform: {gap.loss_increase:+.4f}"
    if math.isnan(gap.standard_error):
        return f"{difference} on one batch, which has no standard error: not tested; raise --held_out"
    size = abs(gap.loss_increase) / gap.standard_error if gap.standard_error > 0 else 0.0
    says = "not distinguishable" if size <= 2 else "better" if gap.loss_increase < 0 else "worse"
    return f"{difference} ± {gap.standard_error:.4f} (standard error): {says}"


def _allocation(every: Sequence[Any], schedules: Mapping[str, SparsityConfig], macs: Any) -> pd.DataFrame:
    """A row a layer and part: its sparsity under each schedule and its MACs per sparse token, dense and chosen."""
    dense, rows = SparsityConfig(mode="dense"), []
    for layer, part in dict.fromkeys((cell.layer, cell.part) for cell in every):
        sparsities = {name: config.ratio(layer, part) for name, config in schedules.items()}
        before = macs.layer(dense, layer)[part]
        after = macs.layer(schedules["chosen"], layer)[part]
        rows.append({"layer": layer, "part": part, **sparsities, "dense_macs": before, "chosen_macs": after})
    return pd.DataFrame(rows)


def _yaml(name: str, config: SparsityConfig, plan: Plan, setup: Setup, macs: Any) -> str:
    return (
        f"# The {name} schedule of `python -m sparselora sensitivity` for {model_label(str(plan.config.model))} on "
        f"{setup.name}:\n# sparse tokens keep {macs.remaining(config):.3f} of the frozen projections' FLOPs "
        f"(budget {plan.budget:g}).\n" + config.to_yaml()
    )


def _report(plan: Plan, setup: Setup, dense: float, allocation: pd.DataFrame, check: pd.DataFrame, verdict: str) -> str:
    lines = [f"{setup.name}, mode {plan.sparsity.mode}: dense loss {dense:.4f} on {plan.samples} rows", "chosen:"]
    for part, rows in allocation.groupby("part", sort=False):
        lines.append(f"  {part:<9} " + " ".join(f"{int(r)}:{s:g}" for r, s in zip(rows["layer"], rows["chosen"])))
    lines.append(f"on {plan.held_out} other rows (budget {plan.budget:g}):")
    lines.append(f"  {'schedule':<9} {'FLOPs left':>10} {'loss':>8} {'increase':>9} {'± s.e.':>8} {'predicted':>10}")
    for row in check.to_dict("records"):
        lines.append(
            f"  {row['schedule']:<9} {row['remaining']:>10.3f} {row['loss']:>8.4f} {row['loss_increase']:>+9.4f} "
            f"{_or_dash(row['standard_error']):>8} {_or_unknown(row['predicted_increase']):>10}"
        )
    return "\n".join([*lines, verdict])


def _or_dash(value: float) -> str:
    """One batch has no standard error."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def _or_unknown(value: float) -> str:
    """A schedule beyond the levels that were measured has no prediction."""
    return "unknown" if math.isnan(value) else f"{value:+.4f}"
