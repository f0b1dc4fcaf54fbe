"""Edit the spectrum of a finished LoRA adapter: rescale each module's singular values by how the loss reacts to them.

A few training rows say how the loss reacts (--calib_samples); --sensitivity takes what an earlier edit of the same
adapter has measured, and needs neither a model nor data then. The edited adapter is one that plain PEFT loads; what is
not edited is carried through untouched. --report evaluates the edit on held-out rows beside its controls: no adapter,
the adapter as it is, the round trip alone, the signed mode, and random draws with the same factors and energy.

--grid runs one edit for each line of a file, a JSON object of these flags and perhaps a name; the flags beside it are
defaults of all lines. What is finished is skipped, so the same call restarts a grid; `compare RUN_ROOT` collects it.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselora.cli import add_run_arguments, check_seed, print_plan, result_arguments
from sparselora.config.fields import options
from sparselora.config.train import TASKS, TrainConfig
from sparselora.errors import InputError
from sparselora.models.names import find_model
from sparselora.runs.folder import RunFolder, write_csv, write_json, write_text
from sparselora.runs.provenance import portable
from sparselora.spectral.modes import ENERGIES, MODES, UPDATE_MODES, EditOptions

if TYPE_CHECKING:
    import pandas as pd

    from sparselora.evaluation.gsm8k import Questions
    from sparselora.models.adapter import AdapterFile
    from sparselora.spectral.calibrate import Adapted, Rows
    from sparselora.spectral.edit import ModuleEdit
    from sparselora.spectral.variants import Variant

GSM8K = "openai/gsm8k:main"
WRITTEN = (
    "run.json", "adapter_config.json", "adapter_model.safetensors", "spectral_edit_meta.json", "sensitivity.csv",
    "edited.csv", *(f"plots/{name}.{kind}" for name in ("spectra", "sensitivity", "layers") for kind in ("png", "csv")),
)  # fmt: skip
REPORT = ("report.md", "report.csv", "report_items.csv", "plots/report.png", "plots/report.csv")
ANSWERS = ("metrics_gsm8k.json", "items_gsm8k.csv")
INPUTS = ("lora_path", "base_model", "dataset", "eval_file", "sensitivity")
"""The arguments that name files or folders."""
ALL = "all"
OUT_DIR = "edited_lora"
GRID_FLAGS = ("grid", "run_root", "gpus", "prefetch")

_FACTORS = {
    "core_frac": "share of the directions that are core",
    "noise_frac": "share that is noise",
    "amp_factor": "core is multiplied by this",
    "sup_factor": "noise is multiplied by this",
    "mid_factor": "the rest is multiplied by this",
    "eta": "step of gd",
    "eta_pos": "with --asymmetric_update: the step where the gradient is positive",
    "eta_neg": "with --asymmetric_update: the step where it is negative",
    "smooth_width": "width of the transitions of smooth_abs, as a share of the directions",
    "z_threshold": "standard deviations beyond which z_score calls a direction core or noise",
}
_DATA = ("text_fields", "label_field", "prompt_field", "completion_field", "template", "max_length")
_AT_LEAST = {"calib_samples": 1, "calib_batch_size": 1, "eval_batch_size": 1, "draws": 1, "eval_fewshot": 0,
             "eval_max_new_tokens": 1}  # fmt: skip
_ONLY_FOR = {"text_fields": "classification", "template": "causal_lm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--lora_path", metavar="DIR", help="folder of a PEFT LoRA adapter; always needed")
    model.add_argument("--base_model", metavar="M", help="its base: local folder, or a name on the hub")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    model.add_argument(
        "--dtype", default="auto", choices=options(TrainConfig)["dtype"].choices,
        help="of the base weights and the computation; auto: bf16 on CUDA",
    )  # fmt: skip
    _add_edit_arguments(parser)
    _add_data_arguments(parser)
    _add_evaluation_arguments(parser)
    _add_grid_arguments(parser)
    add_run_arguments(parser, OUT_DIR)


def _add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    edit = parser.add_argument_group("edit")
    edit.add_argument("--mode", default="abs_select", choices=tuple(MODES), help="what decides the new values")
    defaults = EditOptions()
    for name, text in _FACTORS.items():
        edit.add_argument(f"--{name}", type=float, default=getattr(defaults, name), metavar="X", help=text)
    edit.add_argument(
        "--update_mode", default=defaults.update_mode, choices=UPDATE_MODES, help="how gd applies its step"
    )
    edit.add_argument("--asymmetric_update", action="store_true", help="gd with --eta_pos and --eta_neg, not --eta")
    edit.add_argument(
        "--preserve_energy", default=defaults.preserve_energy, choices=tuple(ENERGIES),
        help="norm of each module's singular values that is restored",
    )  # fmt: skip
    edit.add_argument(
        "--target_modules", nargs="+", default=["down_proj", "o_proj"], metavar="NAME",
        help="ends of the names of the modules to edit; all: every one",
    )  # fmt: skip
    edit.add_argument("--layer_min", type=int, metavar="N", help="first layer to edit")
    edit.add_argument("--layer_max", type=int, metavar="N", help="last layer to edit")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("calibration")
    data.add_argument("--dataset", metavar="D", help="local table, a name of the hub, glue/<task> or docstrings")
    data.add_argument(
        "--task", default="auto", choices=("auto", *TASKS), help="auto: what the adapter was made for, else by the data"
    )
    data.add_argument("--calib_samples", type=int, default=32, metavar="N", help="training rows, drawn by the seed")
    data.add_argument("--calib_batch_size", type=int, default=2, metavar="N", help="rows of a batch (memory only)")
    data.add_argument(
        "--sensitivity",
        metavar="FILE",
        help="sensitivity.csv of an earlier edit of this adapter, in place of calibration",
    )
    for name in _DATA:
        each, default = options(TrainConfig)[name], TrainConfig.__dataclass_fields__[name].default
        how: dict[str, Any] = {"nargs": "+", "metavar": "NAME"} if each.kind is tuple else {"type": each.kind}
        data.add_argument(f"--{name}", help=each.help, default=default, **how)


def _add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--report", action="store_true", help="evaluate the edit and its controls on held-out rows")
    group.add_argument("--draws", type=int, default=20, metavar="N", help="random draws; a verdict needs 20")
    group.add_argument("--eval_gsm8k", action="store_true", help="GSM8K exact match of the edited adapter")
    group.add_argument("--eval_fewshot", type=int, default=5, metavar="N", help="worked examples before each question")
    group.add_argument("--eval_max_new_tokens", type=int, default=256, metavar="N", help="tokens an answer may have")
    group.add_argument("--eval_file", metavar="FILE", help="held-out rows of a local data set; without: every fifth")
    group.add_argument(
        "--eval_samples", type=int, default=-1, metavar="N", help="held-out rows, the same for every seed; -1: all"
    )
    group.add_argument("--eval_batch_size", type=int, default=8, metavar="N", help="rows of a batch (memory only)")


def _add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("grid")
    group.add_argument("--grid", type=Path, metavar="FILE", help="JSONL of flags: run what is not finished")
    group.add_argument("--run_root", type=Path, metavar="DIR", help="folder of a grid's runs, one folder each")
    group.add_argument("--gpus", metavar="0,1,…", help="GPUs of a grid, one run on each at a time; without: one run")
    group.add_argument("--prefetch", action="store_true", help="fetch a grid's adapters and base models first")


# --- settings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The flags, checked: ``config`` is the model and the data, ``edit`` the numbers of the edit."""

    config: TrainConfig
    edit: EditOptions
    args: argparse.Namespace

    @property
    def calibrates(self) -> bool:
        return self.args.sensitivity is None

    @property
    def needs_model(self) -> bool:
        return bool(self.calibrates or self.args.report or self.args.eval_gsm8k)

    @property
    def needs_rows(self) -> bool:
        return bool(self.calibrates or self.args.report)

    @property
    def gsm8k(self) -> str:
        """Where the questions come from: the data set, if it is GSM8K by its name."""
        data = self.args.dataset
        return data if data and data != "gsm8k" and "gsm8k" in Path(data).name.lower() else GSM8K

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {"task": self.config.task, "device": self.args.device.partition(":")[0]}
        return result_arguments(self.args) | own

    @property
    def outputs(self) -> tuple[str, ...]:
        return WRITTEN + REPORT * self.args.report + ANSWERS * self.args.eval_gsm8k


def resolve(args: argparse.Namespace) -> Plan:
    if args.lora_path is None:
        raise InputError("no --lora_path given; name the folder of the adapter to edit")
    for name, least in _AT_LEAST.items():
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be {least} or more, got {getattr(args, name)}")
    if args.eval_samples < 1 and args.eval_samples != -1:
        raise InputError(f"--eval_samples must be 1 or more, or -1 for all rows, got {args.eval_samples}")
    check_seed(args.seed)
    edit = EditOptions(**{field.name: getattr(args, field.name) for field in fields(EditOptions)})
    task = _task(args)
    for name, only in _ONLY_FOR.items():
        if getattr(args, name) is not None and task != only:
            raise InputError(f"--{name} is for task {only}, this is {task}; leave it out, or give --task {only}")
    if args.eval_gsm8k and task != "causal_lm":
        raise InputError("--eval_gsm8k needs a language model, this is a classifier; use --report")
    plan = Plan(_config(args, task), edit, args)
    for name, needed in (("base_model", plan.needs_model), ("dataset", plan.needs_rows)):
        if needed and getattr(args, name) is None:
            raise InputError(f"no --{name} given; name it (only an edit with --sensitivity FILE alone needs none)")
    _refuse_places(args)
    return plan


def _task(args: argparse.Namespace) -> str:
    from sparselora.models.adapter_files import read_config

    kinds = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal_lm"}
    kind = kinds.get(str(read_config(Path(args.lora_path)).get("task_type")))
    if args.task != "auto":
        return str(args.task)
    data = args.dataset or ""
    return kind or ("classification" if data.startswith("glue/") or data == "docstrings" else "causal_lm")


def _config(args: argparse.Namespace, task: str) -> TrainConfig:
    given = {name: getattr(args, name) for name in (*_DATA, "eval_file", "dtype", "device", "seed")}
    if given["text_fields"] is not None:
        given["text_fields"] = tuple(given["text_fields"])
    dataset = GSM8K if args.dataset == "gsm8k" else args.dataset
    return TrainConfig(
        model=args.base_model, task=task, dataset=dataset, eval_samples=max(0, args.eval_samples), **given
    )


def _refuse_places(args: argparse.Namespace) -> None:
    """Raise where the output folder would harm what is read."""
    out = Path(args.out_dir).resolve()
    if args.base_model is not None:
        find_model(args.base_model)
    if args.base_model is not None and Path(args.base_model).is_dir():
        base = Path(args.base_model).resolve()
        if out == base or base in out.parents or out in base.parents:
            raise InputError(f"--out_dir {args.out_dir} is --base_model itself, inside or above it; use another folder")


# --- the run ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    # Where a run belongs to is no part of what it is known by.
    grid = argparse.Namespace(**{name: vars(args).pop(name) for name in GRID_FLAGS})
    if grid.grid is not None:
        run_grid(args, grid)
        return
    for name in GRID_FLAGS[1:]:
        if getattr(grid, name):
            raise InputError(f"--{name} is for a grid; leave it out, or give --grid FILE")
    run_one(args)


def run_one(args: argparse.Namespace) -> None:
    plan = resolve(args)

    from sparselora.models.adapter import open_adapter, refuse_overlap

    refuse_overlap(args.out_dir, args.lora_path)
    if args.dry_run:
        adapter = open_adapter(args.lora_path)
        print_table(adapter, prepare(plan, adapter).edits)
        print_plan(args, plan.outputs)
        return
    if plan.needs_model:
        find_model(args.base_model)
    folder = RunFolder(
        args.out_dir, "edit", plan.arguments, inputs=INPUTS, outputs=plan.outputs, seed=args.seed,
        overwrite=args.overwrite,
    )  # fmt: skip
    if folder.is_finished():
        print(folder.finished_message())
        return
    with folder.reserved():
        adapter = open_adapter(args.lora_path)
        work = prepare(plan, adapter)
        print_table(adapter, work.edits)
        with folder:
            folder.note(device="cpu" if work.adapted is None else work.adapted.device_name)
            write_edit(plan, folder, adapter, work)
            sentences = [write_answers(plan, folder, adapter, work)] if args.eval_gsm8k else []
            sentences += [write_report(plan, folder, adapter, work)] if args.report else []
    for text in sentences:
        print(text)
    print(f"wrote {args.out_dir}")


@dataclass(frozen=True)
class Work:
    """The edit, and what it is evaluated with (None, empty: not wanted)."""

    edits: list[ModuleEdit]
    adapted: Adapted | None
    rows: Rows | None
    calibrated_on: pd.DataFrame | None
    variants: list[Variant]
    questions: Questions | None


def prepare(plan: Plan, adapter: AdapterFile) -> Work:
    """Everything that can be wrong with the input is found here, before anything is written."""
    from sparselora.models.adapter import select_modules
    from sparselora.spectral import calibrate as cal
    from sparselora.spectral.edit import decompositions, edit_modules, read_statistics
    from sparselora.spectral.variants import all_variants

    args = plan.args
    targets = None if args.target_modules == [ALL] else args.target_modules
    modules = select_modules(adapter, targets, args.layer_min, args.layer_max)
    with _bar(len(modules), "module") as bar:
        svds = decompositions(adapter, modules, bar.update)
    found = None if plan.calibrates else read_statistics(Path(args.sensitivity), svds)
    rows = cal.load_rows(plan.config, args.lora_path) if plan.needs_rows else None
    drawn = rows.drawn(args.calib_samples, args.seed) if rows and plan.calibrates else None
    adapted = (
        cal.load_adapted(plan.config, args.lora_path, len(rows.labels) if rows else 0) if plan.needs_model else None
    )
    questions = _questions(plan, adapted) if args.eval_gsm8k else None
    if found is None:
        assert adapted is not None
        assert rows is not None
        assert drawn is not None
        examples = cal.encode(drawn, rows, adapted.tokenizer, plan.config)
        batches = cal.batches(examples, adapted.tokenizer, args.calib_batch_size)
        with _bar(len(batches), "batch") as bar:
            found = cal.calibrate(adapted, batches, svds, bar.update)
    edits = edit_modules(svds, found, args.mode, plan.edit, args.seed)
    variants = all_variants(adapter, edits, args.mode, plan.edit, args.seed, args.draws) if args.report else []
    if adapter.fixed:  # linear modules of zero would not be the model without LoRA
        variants = [variant for variant in variants if variant.kind != "no_lora"]
    return Work(edits, adapted, rows, drawn, variants, questions)


def _questions(plan: Plan, adapted: Adapted | None) -> Questions:
    from sparselora.evaluation.gsm8k import load_questions
    from sparselora.evaluation.losses import prompt_ids

    assert adapted is not None
    args = plan.args
    own = plan.gsm8k != GSM8K
    questions = load_questions(
        plan.gsm8k, eval_file=args.eval_file if own else None, prompt_field=args.prompt_field if own else "prompt",
        completion_field=args.completion_field if own else "completion", samples=plan.config.eval_samples,
        fewshot=args.eval_fewshot, seed=args.seed,
    )  # fmt: skip
    prompt_ids(questions.prompts, adapted.tokenizer, args.eval_max_new_tokens)  # says what does not fit
    return questions


# --- a grid -------------------------------------------------------------------------------------------------------


def run_grid(args: argparse.Namespace, wanted: argparse.Namespace) -> None:
    """Run the edits of ``--grid`` that are not finished. One that fails does not stop the others, but is an error."""
    from sparselora.cli import LineParser
    from sparselora.runs.grid import LOGS
    from sparselora.runs.grid_run import run_grid as run_all

    if wanted.run_root is None:
        raise InputError("--grid needs --run_root DIR, the folder for its runs")
    if args.out_dir != OUT_DIR:
        raise InputError("--out_dir is for one edit; the folders of a grid are in --run_root")
    parser = LineParser(prog="edit")
    add_arguments(parser)
    failures = run_all(
        wanted.grid, wanted.run_root, args, parser, _grid_check(), lambda text: print(text, flush=True),
        gpus=_gpus(wanted.gpus), prefetch=wanted.prefetch,
    )  # fmt: skip
    for each in failures:
        print(f"{each.job.line.name}: exit status {each.status}: {each.said}", file=sys.stderr)
    if failures:
        raise RuntimeError(
            f"{len(failures)} edits failed, their logs are in {wanted.run_root / LOGS}; the same call runs them again"
        )


def _gpus(text: str | None) -> list[str]:
    gpus = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(gpus) or len(set(gpus)) < len(gpus):
        raise InputError(f"--gpus takes different GPUs with commas between them, such as 0,1, got {text!r}")
    return gpus


def _grid_check() -> Callable[[argparse.Namespace], Mapping[str, object]]:
    """The check of one configuration; an adapter that several have is read once."""
    from sparselora.models.adapter import open_adapter, refuse_overlap, select_modules

    opened = functools.cache(open_adapter)

    def check(args: argparse.Namespace) -> Mapping[str, object]:
        for name in GRID_FLAGS:
            delattr(args, name)
        plan = resolve(args)
        refuse_overlap(args.out_dir, args.lora_path)
        targets = None if args.target_modules == [ALL] else args.target_modules
        select_modules(opened(args.lora_path), targets, args.layer_min, args.layer_max)
        return portable(plan.arguments, INPUTS)

    return check


# --- what it writes -----------------------------------------------------------------------------------------------


def write_edit(plan: Plan, folder: RunFolder, adapter: AdapterFile, work: Work) -> None:
    from sparselora.models.adapter import layer_index, write_adapter
    from sparselora.report import spectral as figures
    from sparselora.spectral.edit import direction_table, new_factors
    from sparselora.spectral.sensitivity import to_frame

    write_adapter(folder.folder, adapter, new_factors(adapter, work.edits))
    directions = direction_table(work.edits)
    write_csv(folder.path("sensitivity.csv"), to_frame([edit.found for edit in work.edits]))
    write_csv(folder.path("edited.csv"), directions)
    write_json(folder.path("spectral_edit_meta.json"), _meta(plan, folder, adapter, work))
    directions["layer"] = [layer_index(module) for module in directions["module"]]
    title = f"{adapter.name}, mode {plan.args.mode}"
    figures.spectra(folder.path("plots/spectra.png"), directions, title)
    figures.sensitivity(folder.path("plots/sensitivity.png"), directions, title)
    figures.layers(folder.path("plots/layers.png"), directions, title)


def _meta(plan: Plan, folder: RunFolder, adapter: AdapterFile, work: Work) -> dict[str, Any]:
    from sparselora.spectral.edit import summary

    record = json.loads((folder.folder / "run.json").read_text("utf-8"))
    return {
        "adapter": adapter.name,
        "options": folder.arguments,
        "versions": record["versions"],
        "calibration": {
            "source": "measured" if plan.calibrates else Path(plan.args.sensitivity).name,
            "dataset": work.rows.name if work.rows is not None and plan.calibrates else None,
            "rows": [] if work.calibrated_on is None else work.calibrated_on["row"].tolist(),
        },
        **summary(adapter, work.edits),
    }


def write_answers(plan: Plan, folder: RunFolder, adapter: AdapterFile, work: Work) -> str:
    """GSM8K of the edited adapter; what to print."""
    from sparselora.evaluation.gsm8k import answer
    from sparselora.evaluation.losses import transformers_generator
    from sparselora.spectral.edit import in_place, new_factors

    assert work.adapted is not None
    assert work.questions is not None
    args, questions = plan.args, work.questions
    with in_place(work.adapted.model, new_factors(adapter, work.edits)), _bar(len(questions.rows), "item") as bar:
        generate = transformers_generator(
            work.adapted.model, work.adapted.tokenizer, max_new_tokens=args.eval_max_new_tokens,
            batch_size=args.eval_batch_size, on_done=bar.update,
        )  # fmt: skip
        facts, items = answer(questions, generate)
    named = {"task": "gsm8k", "adapter": Path(args.out_dir).name, "dataset": questions.name, "n": len(items)}
    metrics = {**named, "seed": args.seed, **facts, "backend": "transformers"}
    write_csv(folder.path("items_gsm8k.csv"), items)
    write_json(folder.path("metrics_gsm8k.json"), metrics)
    return (
        f"GSM8K exact match {metrics['exact_match']:.4f} [{metrics['ci_low']:.4f}, {metrics['ci_high']:.4f}] (95 %), "
        f"{metrics['n']} questions, {metrics['fewshot']}-shot"
    )


def write_report(plan: Plan, folder: RunFolder, adapter: AdapterFile, work: Work) -> str:
    """The edit against its controls on held-out rows; what to print."""
    import pandas as pd

    from sparselora.report.spectral import report as figure
    from sparselora.spectral.calibrate import encode, held_out
    from sparselora.spectral.edit import BOOTSTRAP, generator
    from sparselora.spectral.variants import evaluate_variants
    from sparselora.spectral.verdict import compare, to_markdown

    assert work.adapted is not None
    assert work.rows is not None
    args, tables = plan.args, []
    frames = [work.rows.eval] + ([work.calibrated_on] if work.calibrated_on is not None else [])
    with _bar(len(frames) * len(work.variants), "variant") as bar:
        for frame in frames:
            examples = encode(frame, work.rows, work.adapted.tokenizer, plan.config)
            losses = held_out(work.adapted, examples, frame, args.eval_batch_size)
            tables.append(evaluate_variants(work.adapted.model, adapter, work.variants, losses, bar.update))
    items, calibration = tables[0], tables[1] if len(tables) > 1 else None
    facts = pd.DataFrame([variant.facts() for variant in work.variants])
    found = compare(items, facts, generator(args.seed, BOOTSTRAP), calibration)
    title = f"{adapter.name}, mode {args.mode}, on {work.rows.name}"
    write_csv(folder.path("report_items.csv"), items)
    write_csv(folder.path("report.csv"), found.table)
    write_text(folder.path("report.md"), to_markdown(found, title))
    folder.path("plots/report.csv")
    figure(folder.path("plots/report.png"), found.table, f"{title}, n = {found.n} held-out rows")
    return "\n".join(found.sentences)


# --- what it says -------------------------------------------------------------------------------------------------


def print_table(adapter: AdapterFile, edits: Sequence[ModuleEdit]) -> None:
    """The modules and what changes in each."""
    import pandas as pd

    from sparselora.spectral.edit import all_zero, module_table, total_prediction

    table, predicted = module_table(edits), total_prediction(edits)
    shown = pd.DataFrame(
        {
            "module": table["module"],
            "r": table["r"],
            "core/mid/noise/zero": [
                "/".join(str(row[role]) for role in ("core", "mid", "noise", "zero"))
                for row in table.to_dict("records")
            ],
            "Σσ": [_arrow(row, "sum") for row in table.to_dict("records")],
            "‖σ‖₂": [_arrow(row, "l2") for row in table.to_dict("records")],
            "predicted ΔL (nats a label)": table["predicted_second"].map("{:+.3g}".format),
        }
    )
    print(shown.to_string(index=False))
    print(
        f"{adapter.name}: {len(edits)} of {len(adapter.modules)} modules, predicted ΔL {predicted.first:+.4g} (first "
        f"order), {predicted.second:+.4g} (second order) nats a label"
    )
    if all_zero(edits):
        print("every one of them is a zero update: there is nothing to edit")
    for kind, count in pd.Series(list(adapter.carried.values()), dtype=str).value_counts().items():
        print(f"carried through untouched: {count} tensors ({kind})")


def _arrow(row: Mapping[Any, Any], name: str) -> str:
    return f"{row[f'{name}_before']:.4g} → {row[f'{name}_after']:.4g}"


def _bar(total: int, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False)
