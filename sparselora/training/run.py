"""One run of `train`: model, data and records, from a configuration to the files of its folder.

`run_training` is the whole of it. `prepare` and `fine_tuner` are its first two steps, for studies that train in their
own way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from huggingface_hub import upload_folder
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from sparselora.config.train import PRINCIPAL, TrainConfig
from sparselora.contextual.handle import GRAPH_MULTIPLE, Handle, sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.modes import mode_of
from sparselora.contextual.precision import precision_of
from sparselora.contextual.trainers import SparsityCallback
from sparselora.data.batches import PLANTED, Collator, Example, encode_texts
from sparselora.data.conversations import generation_prompt, template_text, turn_ends
from sparselora.data.instructions import check_invocation, closing_text, encode_instructions
from sparselora.data.load import Data, load_data
from sparselora.data.packing import pack_examples
from sparselora.errors import InputError
from sparselora.evaluation.losses import held_out_losses
from sparselora.models import load as models
from sparselora.models.fresh_adapter import adapt_model, load_named_classifier
from sparselora.models.initialisation import READS_DATA, initial_factors, untrained
from sparselora.models.lora import Factors, export_adapter
from sparselora.models.model_files import hub_name, model_facts, public_name
from sparselora.models.packed_rows import check_packed_rows
from sparselora.models.prompt_template import ChatTemplate, Template
from sparselora.novelty.duplicates import near_duplicates
from sparselora.novelty.trainer import SLoRATrainer, build_gate
from sparselora.numerics.stats import is_at_chance
from sparselora.report.model_card import model_card
from sparselora.report.training import plot_loss
from sparselora.runs.files import write_csv, write_text
from sparselora.runs.folder import NOTHING_LEARNED, RunFolder
from sparselora.runs.process import complain, process_count, process_rank
from sparselora.spectral.squeeze import check_turnable
from sparselora.token_gates.gates import (
    TokenGateCallback,
    TokenGates,
    attach_token_gates,
    calibrate,
    restore_token_gates,
    save_token_gates,
)
from sparselora.token_gates.outputs import UNGATED_SUMMARY, finish_token_gates
from sparselora.training.checkpoints import check_place, remove_checkpoints
from sparselora.training.fully_sharded import check_shards, is_sharded, shard, wants_shards, whole_adapter
from sparselora.training.generations import Generations
from sparselora.training.meter import StepFlops, step_medians
from sparselora.training.optimizers import check_optimizer, check_schedule, optimizer_class
from sparselora.training.rank_schedule import RankSchedule, SqueezeCallback
from sparselora.training.resume import CHECKPOINTS, DUPLICATES, GATE_LOG, GENERATIONS, JINJA_FILE, SQUEEZE_LOG, Start
from sparselora.training.trainer import CheckpointPart, FineTuner, Settings, drawn_batches, summarise_rows

THRESHOLD_SAMPLES = 64
"""Training rows on which the thresholds of token gates are set when gating begins."""

INITIALISATION_SAMPLES = 64
"""Training rows that an initialisation from data reads (EVA, LoRA-GA)."""

_BASE_SAMPLES = 128
"""Held-out rows on which a language model is compared with itself before training."""


@dataclass(frozen=True)
class PreparedRun:
    """A run of `train` before its first step: the adapted model on its device, and its data as tokens.

    Attributes:
        config: settings of the run.
        data: rows of the data set, as frames.
        folder: the run's folder.
        model: model with a fresh adapter, sparse or gated by token if ``config`` says so.
        tokenizer: its tokenizer.
        target_modules: entries of ``target_modules`` that the adapter was attached to.
        train: training examples, as token ids.
        rows: what batches are made of: those examples, or several of them in each row.
        held_out: evaluation examples; may be empty.
        examples_cut: training examples that were longer than the limit and lost their end; None if streamed.
        duplicates: training rows that were left out as near-duplicates; None where they were not looked for.
        collator: makes batches of examples.
        sparsity: what undoes the sparsity of the model; None without any.
        gates: token gates of the model; None where every rank channel is active for every token.
        initial: factors at the beginning, where they were moved out of the base weights; else None.
        squeeze: cuts the adapter's rank on the way; None where the rank stays.
        sparsify_s: seconds that calibrating and replacing took.
        device: where the model is; of several processes, each has its own.
        bf16: compute in bfloat16 autocast.
    """

    config: TrainConfig
    data: Data
    folder: RunFolder
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    target_modules: list[str]
    train: Sequence[Example]
    rows: Sequence[Example]
    held_out: list[Example]
    examples_cut: int | None
    duplicates: pd.DataFrame | None
    collator: Collator
    sparsity: Handle | None
    gates: TokenGates | None
    initial: Factors | None
    squeeze: SqueezeCallback | None
    sparsify_s: float
    device: torch.device
    bf16: bool

    @property
    def rank_in(self) -> Callable[[int], int] | None:
        """The adapter's rank in a step, by its number; None where the rank stays."""
        return None if self.squeeze is None else self.squeeze.schedule.rank_in

    @property
    def is_causal(self) -> bool:
        return self.config.task == "causal_lm"

    @property
    def template(self) -> Template | None:
        """The text around a prompt, of a chat template its own text; None for a classifier."""
        if not self.is_causal:
            return None
        template = self.data.template
        return ChatTemplate(template_text(self.tokenizer, template)) if isinstance(template, ChatTemplate) else template

    @property
    def base_model(self) -> str:
        """The name under which another machine finds the base model."""
        assert self.config.model is not None
        return hub_name(self.config.model)


def run_training(config: TrainConfig, folder: RunFolder, start: Start, cache_dir: str | None) -> dict[str, Any]:
    """Load, train, evaluate and write everything; every process of a distributed run calls it.

    Args:
        folder: held but not entered: nothing is written before the data and the model have been checked.
        start: where the run begins (`sparselora.training.resume.find_start`).
        cache_dir: where estimators and calibration are kept between runs; None for the user's cache.
    Returns:
        The row of ``summary.csv``; empty in all processes but the first.
    Raises:
        InputError: data, a model or settings that do not go together.
        RuntimeError: the loss stopped being finite.
    """
    is_main = process_rank() == 0
    previous = folder.noted("fingerprint")
    run = prepare(config, load_data(config, streams=True), folder, cache_dir)
    check_place(folder.folder / CHECKPOINTS, {folder.fingerprint, str(previous)}, _saved_steps(run))
    with folder if is_main else contextlib.nullcontext():  # every process trains, the first keeps the records
        if is_main and not start.is_resumed:
            for run_id in (previous, folder.fingerprint):
                remove_checkpoints(folder.folder / CHECKPOINTS, run_id)
        summary = _train(run, start)
    leave_process_group()
    return summary


def leave_process_group() -> None:
    """End the communication of a distributed run; nothing for a single process."""
    if process_count() > 1:
        PartialState().destroy_process_group()


def _saved_steps(run: PreparedRun) -> Callable[[int], bool]:
    """Return a function that tells for a step whether it will have a checkpoint."""
    config, last = run.config, _total_steps(run.config, len(run.rows))
    return lambda step: bool(config.save_steps) and 0 < step <= last and (step % config.save_steps == 0 or step == last)


def _total_steps(config: TrainConfig, rows: int) -> int:
    """Return the optimizer steps of a run of ``config`` on ``rows`` training rows."""
    batches = math.ceil(rows / (config.train_bsz * process_count()))
    return config.max_steps or math.ceil(config.epochs * max(1, math.ceil(batches / config.grad_accum)))


# --- model and data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseModel:
    """A language model without an adapter and its tokenizer, loaded once for one run after the other.

    A classifier has none: its head is drawn when it is loaded, by the seed of its run.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase


def load_base(config: TrainConfig, dtype: torch.dtype) -> BaseModel:
    """Load the language model that ``config`` names, on the CPU.

    Args:
        dtype: of its weights.
    Raises:
        InputError: a model that cannot be loaded.
    """
    assert config.model is not None
    model, tokenizer = models.load_causal_lm(
        config.model,
        dtype,
        in_4bit=config.load_in_4bit,
        in_8bit=config.load_in_8bit,
        flash_attention=config.use_flash_attention_2,
    )
    return BaseModel(model, tokenizer)


def released_base(run: PreparedRun) -> BaseModel:
    """Take adapter and sparsity off the model of a run that has ended: its weights and modules are as loaded."""
    if run.sparsity is not None:
        run.sparsity.remove()
    return BaseModel(cast(Any, run.model).unload(), run.tokenizer)


def prepare(
    config: TrainConfig, data: Data, folder: RunFolder, cache_dir: str | None, base: BaseModel | None = None
) -> PreparedRun:
    """Load the model, attach a fresh adapter, encode ``data``, and make the model sparse or gated as ``config`` says.

    Args:
        base: the language model, where it is loaded already; the adapter is attached to this very object.
    Raises:
        InputError: a model that cannot be loaded, adapted, made sparse or gated as the settings want.
    """
    if wants_shards():
        check_shards(config)
    causal = config.task == "causal_lm"
    device = models.resolve_device(config.device)
    device = PartialState(cpu=device.type == "cpu").device  # of several processes, each has its own
    if config.sparsity is not None:
        precision_of(config.sparsity).check_device(device)
    folder.note(device=models.device_name(device), **model_facts(config.model))
    bf16 = models.is_bf16(config.dtype, device)
    set_seed(config.seed)  # before the head and the adapter are drawn
    if base is not None and config.init_lora_weights in PRINCIPAL:
        raise InputError(
            f"init_lora_weights {config.init_lora_weights} changes the base weights, on which other runs go on from "
            "here; use another"
        )
    loaded, tokenizer = _load(config, data, torch.bfloat16 if bf16 and causal else torch.float32, base)
    train, held_out, examples_cut = _encode(config, data, tokenizer)
    duplicates = None
    if config.dedupe is not None:
        data, train, duplicates = _deduplicated(data, train, config.dedupe, device)
    if config.gated and PLANTED in data.train:
        train = [example | {PLANTED: mark} for example, mark in zip(train, data.train[PLANTED].tolist())]
    tokens = None if config.adapter_on_context else _invocation_tokens(data, tokenizer)
    if tokens is not None:
        for frame, examples in ((data.train, train), (data.eval, held_out)):
            check_invocation(frame, examples, tokens)
    longest = min(config.max_length, tokenizer.model_max_length)
    collator = Collator(tokenizer.pad_token_id, causal, longest=longest)
    rows, batches = train, None
    if config.packing:
        packed = pack_examples(train, longest)
        rows = packed.rows
        folder.note(packing={"rows": len(rows), "examples": len(train), "fill": round(packed.fill, 4)})
    if config.init_lora_weights != "default":
        loaded.to(device)  # decompositions and passes are for the device; plain factors are drawn on the CPU
    if config.init_lora_weights in READS_DATA:
        batches = drawn_batches(
            train, collator, device, samples=INITIALISATION_SAMPLES, seed=config.seed, size=config.eval_bsz
        )
    model, target_modules = adapt_model(
        loaded,
        config,
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        initialisation=config.init_lora_weights,
        batches=batches,
        exclude_modules=config.exclude_modules,
        layers=config.layers,
        invocation_tokens=tokens,
    )
    initial = initial_factors(model) if config.init_lora_weights in PRINCIPAL else None
    _check_training(config, model, device)
    squeeze = _squeeze(config, model, device, len(rows))
    if wants_shards():
        shard(model, bf16=bf16)
    else:
        model.to(device)
    if config.packing:
        check_packed_rows(model)
    began, sparsity = time.perf_counter(), None
    if (settings := config.seeded_sparsity) is not None:
        multiple = GRAPH_MULTIPLE if device.type == "cuda" and causal else 0
        calibration = calibration_batches(config, train, collator, device)
        sparsity = sparsify(model, settings, calibration=calibration, cache_dir=cache_dir)
        collator = dataclasses.replace(
            collator,
            layout=lambda mask, labels, positions: TokenLayout.build(
                mask, labels if causal else None, causal=causal, multiple=multiple, position_ids=positions
            ),
        )
    sparsify_s = time.perf_counter() - began
    gates = None if config.token_gate is None else attach_token_gates(model, config.token_gate)
    return PreparedRun(
        config=config,
        data=data,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        target_modules=target_modules,
        train=train,
        rows=rows,
        held_out=held_out,
        examples_cut=examples_cut,
        duplicates=duplicates,
        collator=collator,
        sparsity=sparsity,
        gates=gates,
        initial=initial,
        squeeze=squeeze,
        sparsify_s=sparsify_s,
        device=device,
        bf16=bf16,
    )


def _check_training(config: TrainConfig, model: Any, device: torch.device) -> None:
    """Raise for what the Trainer would refuse only when the run has begun."""
    if config.gradient_checkpointing and not model.get_base_model().supports_gradient_checkpointing:
        raise InputError(
            f"gradient_checkpointing is not supported by {type(model.get_base_model()).__name__}; leave it out"
        )
    arguments = _settings(config, Path(), device, push_to_hub=False, report_to="none").arguments()
    check_schedule(arguments)
    check_optimizer(config.optim, arguments, model, config.loraplus_lr_ratio, device)
    if config.gated:
        assert config.novelty is not None
        build_gate(model, config.novelty, seed=config.seed, device=torch.device("cpu"))


def _squeeze(config: TrainConfig, model: PeftModel, device: torch.device, rows: int) -> SqueezeCallback | None:
    """Return what cuts the rank of ``model`` in a training on ``rows`` rows; None where it stays."""
    schedule = RankSchedule.of(config, _total_steps(config, rows))
    if schedule is None:
        return None
    distribution = PartialState().distributed_type.value
    if distribution not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise InputError(
            f"squeeze runs on one device or with DistributedDataParallel, not with {distribution}, which shards the "
            "parameters that are cut; take another accelerate configuration"
        )
    arguments = _settings(config, Path(), device, push_to_hub=False, report_to="none").arguments()
    check_turnable(*optimizer_class(config.optim, arguments, model))
    return SqueezeCallback(model, schedule, budget=config.squeeze_budget, multiple=config.squeeze_multiple)


def _load(
    config: TrainConfig, data: Data, dtype: torch.dtype, base: BaseModel | None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the model without an adapter, and its tokenizer.

    Args:
        dtype: of the weights of a language model; classifiers are loaded in float32.
        base: the language model, where it is loaded already.
    """
    assert config.model is not None
    if config.task != "causal_lm":
        return load_named_classifier(config.model, data.labels)
    base = base or load_base(config, dtype)
    return base.model, base.tokenizer


def _invocation_tokens(data: Data, tokenizer: Any) -> list[int]:
    """Return the tokens of the template's closing text, from which on an activated LoRA is active.

    Of a chat template it is what it writes between a question and its answer.

    Raises:
        InputError: the template has no such text.
    """
    template = data.template
    is_chat = isinstance(template, ChatTemplate)
    text = generation_prompt(tokenizer, template) if isinstance(template, ChatTemplate) else closing_text(template)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if not text.strip() or not tokens:
        raise InputError(
            "adapter_on_context false needs a template with a text after its last field, from which on the adapter is "
            f"active, got {'a chat template that writes nothing there' if is_chat else repr(template)}; for example "
            "{prompt}, a line break and ### Answer:"
        )
    return tokens


def _encode(config: TrainConfig, data: Data, tokenizer: Any) -> tuple[Sequence[Example], list[Example], int | None]:
    """Encode the training and the held-out rows; the third value counts training rows that were cut, None where they
    are streamed."""
    if data.streamed is not None:
        held_out = encode_instructions(data.eval, tokenizer, config.max_length, data.template)
        return data.streamed.examples(tokenizer, config.max_length), held_out.examples, None
    if config.task == "causal_lm":
        train, held_out = (
            encode_instructions(frame, tokenizer, config.max_length, data.template) for frame in (data.train, data.eval)
        )
        return train.examples, held_out.examples, train.cut
    texts = [encode_texts(f, data.text_fields, tokenizer, config.max_length) for f in (data.train, data.eval)]
    return texts[0], texts[1], 0


def _deduplicated(
    data: Data, train: Sequence[Example], similarity: float, device: torch.device
) -> tuple[Data, list[Example], pd.DataFrame]:
    """Return the data and their examples without near-duplicates, and the table of what is left out: ``row``,
    ``duplicate_of`` (ids of rows) and ``similarity``."""
    pairs = near_duplicates([example["input_ids"] for example in train], similarity, device=device)
    row_ids, left_out = data.train["row"], set(pairs["place"])
    duplicates = pd.DataFrame({
        "row": row_ids.iloc[pairs["place"]].to_numpy(), "duplicate_of": row_ids.iloc[pairs["duplicate_of"]].to_numpy(),
        "similarity": pairs["similarity"],
    })  # fmt: skip
    places = [place for place in range(len(train)) if place not in left_out]
    frame = data.train.iloc[places].reset_index(drop=True)
    return dataclasses.replace(data, train=frame), [train[place] for place in places], duplicates


def calibration_batches(
    config: TrainConfig, train: Sequence[Example], collator: Collator, device: torch.device
) -> list[dict[str, torch.Tensor]] | None:
    """Draw batches of training rows by the sparsity's own seed, on the model's device; None if none are needed."""
    sparsity = config.seeded_sparsity
    if sparsity is None or not sparsity.needs_calibration:
        return None
    return drawn_batches(
        train, collator, device, samples=sparsity.calibration_samples, seed=sparsity.drawing_seed, size=config.eval_bsz
    )


# --- training ---------------------------------------------------------------------------------------------------------


def _train(run: PreparedRun, start: Start) -> dict[str, Any]:
    """Train, evaluate, and write everything but run.json; the summary's row, empty but in the first process."""
    config, folder = run.config, run.folder
    flops = StepFlops(run.model.config.to_dict(), config.sparsity, config.lora_r, run.target_modules)

    def write_progress(metrics: pd.DataFrame, evaluations: pd.DataFrame) -> None:
        write_csv(folder.path("metrics.csv"), flops.beside(metrics, run.rank_in))
        write_csv(folder.path("eval.csv"), evaluations)
        if run.squeeze is not None:
            write_csv(folder.path(SQUEEZE_LOG), run.squeeze.table())

    is_main = process_rank() == 0
    if is_main:
        write_text(folder.path("config.yaml"), config.to_yaml())
        folder.note(target_modules=run.target_modules, examples_cut=run.examples_cut)
        if run.duplicates is not None:
            write_csv(folder.path(DUPLICATES), run.duplicates)
    trainer = fine_tuner(run, write_progress)
    generations = _generations(run, start)
    if generations is not None:
        trainer.add_callback(generations)
    trainer.run(start.checkpoint, start.metrics, start.evaluations)
    trainable_params = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    if run.gates is not None:
        run.gates.reset_counts()
    rows = trainer.evaluate_last()
    if generations is not None:
        generations.answer(run.model, trainer.state.global_step)
    layers = run.sparsity.report if run.sparsity is not None else _dense_layers(run.model)
    if run.sparsity is not None:
        run.sparsity.remove()
    tensors = whole_adapter(run.model) if is_sharded(run.model) else None
    if is_main:
        export_adapter(
            run.model, folder.folder / "adapter", run.base_model, template=run.template, initial=run.initial,
            tensors=tensors,
        )  # fmt: skip
        if config.chat_template is not None:
            write_text(folder.path(JINJA_FILE), config.chat_template)
    gate_columns = _finish_token_gates(run, trainer)
    warning = _nothing_learned(run, rows) if is_main or is_sharded(run.model) else None
    if not is_main:
        return {}
    if warning:
        complain(f"WARNING: {warning}: train longer, on more rows or with another lr before you compare or prune it")
        folder.note(**{NOTHING_LEARNED: warning})
    summary = _write_results(run, trainer, rows, pd.DataFrame(layers), flops, gate_columns, trainable_params)
    card = model_card(config.to_dict(), TrainConfig().to_dict(), summary, run.base_model)
    write_text(folder.path("adapter/README.md"), card)
    if config.push_to_hub:
        _upload(trainer, folder.folder / "adapter")
    return summary


def _generations(run: PreparedRun, start: Start) -> Generations | None:
    """Build what answers held-out prompts, with the answers of an interrupted run; None where nobody asked."""
    count, path = run.config.generations, run.folder.folder / GENERATIONS
    if not count or not run.held_out:
        return None

    def write(table: pd.DataFrame) -> None:
        if process_rank() == 0:
            write_csv(run.folder.path(GENERATIONS), table)

    rows = run.data.eval["row"].tolist()[:count]
    template = run.data.template
    ends = turn_ends(run.tokenizer, template) if isinstance(template, ChatTemplate) else set()
    generations = Generations(run.held_out[:count], rows, run.tokenizer, run.config.eval_bsz, ends, write)
    if start.checkpoint is not None and path.exists():
        generations.restore(pd.read_csv(path, keep_default_na=False), start.checkpoint.step)
    return generations


def _upload(trainer: FineTuner, adapter: Path) -> None:
    """Upload the adapter to the repository that the Trainer has made sure of.

    Raises:
        InputError: the hub refuses it; the adapter stays where it is.
    """
    repository = str(trainer.hub_model_id)
    try:
        upload_folder(repo_id=repository, folder_path=adapter, commit_message="Adapter trained with sparselora")
    except (OSError, ValueError) as error:
        raise InputError(
            f"the adapter is trained and in {adapter}, but {repository} could not be uploaded to "
            f"({' '.join(str(error).split())[:160]}); upload it by: hf upload {repository} {adapter}"
        ) from None


def _nothing_learned(run: PreparedRun, rows: pd.DataFrame) -> str | None:
    """Describe a classifier at chance, or a language model no better than without its adapter; None otherwise.

    Args:
        rows: `FineTuner.evaluate_rows` of the trained model.
    """
    if not run.held_out:
        return None
    if not run.is_causal:
        if not is_at_chance(rows["correct"], run.data.eval["label"]):
            return None
        return f"accuracy {rows['correct'].mean():.4f} is at chance (n = {len(rows)})"
    examples, part = run.held_out[:_BASE_SAMPLES], rows.iloc[:_BASE_SAMPLES]
    if part["tokens"].sum() == 0:
        return None
    with untrained(run.model, run.initial):
        base = held_out_losses(run.model, examples, run.tokenizer, batch_size=run.config.eval_bsz, bf16=run.bf16)
    before, after = (float(table["loss"].sum() / table["tokens"].sum()) for table in (base, part))
    gains = base["loss"].to_numpy() - part["loss"].to_numpy()
    noise = 2 * math.sqrt(len(gains)) * float(gains.std(ddof=1)) if len(gains) > 1 else 0.0
    if gains.sum() > noise:
        return None
    return (
        f"nothing was learned: held-out loss {after:.4f}, not clearly below the {before:.4f} before training "
        f"({len(part)} rows)"
    )


def _dense_layers(model: Any) -> list[dict[str, Any]]:
    count = getattr(model.config, "num_hidden_layers", 0)
    return [{"layer": i, "ffn_sparsity": 0.0, "attention_sparsity": 0.0} for i in range(count)]


class GatedFineTuner(FineTuner, SLoRATrainer):
    """A `FineTuner` that runs backward only for batches whose gradient is new."""


def _settings(config: TrainConfig, folder: Path, device: torch.device, **changes: Any) -> Settings:
    """Return the Trainer's settings of a run on ``device`` with checkpoints in ``folder``."""
    values = config.to_dict()
    shared = {name: values[name] for name in Settings.__dataclass_fields__ if name in values and name != "device"}
    # DistributedDataParallel must know that a step may leave parameters out: the heads of learned gates before gating
    # begins, the adapter of an FFN that is left out itself.
    leaves_out = (config.token_gate is not None and config.token_gate.has_heads) or (
        config.sparsity is not None and mode_of(config.sparsity).replaces_layer
    )
    computed = {"causal": config.task == "causal_lm", "find_unused_parameters": leaves_out}
    return Settings(**{**shared, **computed, "folder": folder, "device": device, **changes})


def fine_tuner(
    run: PreparedRun, on_progress: Callable[[pd.DataFrame, pd.DataFrame], None], label: str = "training"
) -> FineTuner:
    """Build the Trainer of ``run``: gated by novelty, sparse, both or neither.

    Args:
        label: name of this training, in front of its lines of progress.
    """
    config = run.config
    settings = _settings(config, run.folder.folder / CHECKPOINTS, run.device, bf16=run.bf16, run=run.folder.fingerprint)
    sparsity, gates = run.sparsity, run.gates
    callbacks: list[TrainerCallback] = []
    parts: list[CheckpointPart] = []
    if run.squeeze is not None:
        callbacks.append(run.squeeze)
        parts.append(run.squeeze.checkpoint_part())
    if sparsity is not None:
        callbacks.append(SparsityCallback(sparsity))
    if gates is not None:
        callbacks.append(TokenGateCallback(gates, lambda optimizer: _begin_gating(run, optimizer)))
        parts.append(token_gate_part(run.model, gates))
    kind: type[FineTuner] = FineTuner
    gated: dict[str, Any] = {}
    if config.gated:
        kind, gated = GatedFineTuner, {"gate_config": config.novelty, "gate_log": run.folder.path(GATE_LOG)}
    trainer = _built(
        kind,
        run.model,
        run.tokenizer,
        run.rows,
        run.held_out,
        run.collator,
        settings,
        callbacks=callbacks,
        is_sparse=lambda: sparsity is not None and bool(sparsity.active),
        on_progress=on_progress,
        checkpoint_parts=parts,
        label=label,
        **gated,
    )
    if run.squeeze is not None:
        run.squeeze.after_cut.append(trainer.rewrap)
        if sparsity is not None:
            run.squeeze.after_cut.append(sparsity.follow_parameters)
    if gated and sparsity is not None:
        sparsity.observe_head(cast(Any, trainer).head_rows)
    return trainer


def _built(kind: type[FineTuner], *arguments: Any, **keywords: Any) -> FineTuner:
    """Build the Trainer, which makes sure of the repository to upload to.

    Raises:
        InputError: the hub refuses it.
    """
    try:
        return kind(*arguments, **keywords)
    except HfHubHTTPError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"push_to_hub: the hub refuses the repository ({reason}); check name and token") from None


def token_gate_part(model: PeftModel, gates: TokenGates) -> CheckpointPart:
    """The part of a checkpoint that holds the state of ``gates``."""
    return CheckpointPart(
        save=lambda folder: save_token_gates(model, folder),
        restore=lambda folder: restore_token_gates(gates, folder),
    )


def _begin_gating(run: PreparedRun, optimizer: torch.optim.Optimizer) -> None:
    """Start the gates from the adapter as it is, turned to its singular directions if they are the basis.

    Thresholds start at their budget: on the same rows in every process and a resumed run.
    """
    assert run.gates is not None
    run.gates.begin(optimizer)
    # Processes must agree, and a singular direction may come out with the other sign on another machine.
    broadcast([p.data for p in run.model.parameters() if p.requires_grad])
    if run.gates.config.select != "threshold":
        return
    batches = drawn_batches(
        run.train, run.collator, run.device, samples=THRESHOLD_SAMPLES, seed=run.config.seed, size=run.config.eval_bsz
    )
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
        calibrate(run.model, batches)


# --- records ----------------------------------------------------------------------------------------------------------


def _finish_token_gates(run: PreparedRun, trainer: FineTuner) -> dict[str, Any]:
    """`finish_token_gates` of this run, which leaves the model with the fixed subset; every process must call it."""
    if run.gates is None:
        return dict(UNGATED_SUMMARY)
    return finish_token_gates(
        run.model,
        run.gates,
        base_model=run.base_model,
        template=run.template,
        evaluate=lambda: summarise_rows(trainer.evaluate_rows(), run.is_causal),
        total=lambda count: cast(Any, trainer.accelerator.reduce(count, "sum")),
        path=run.folder.path if trainer.accelerator.is_main_process else None,
    )


def _write_results(
    run: PreparedRun,
    trainer: FineTuner,
    rows: pd.DataFrame,
    layers: pd.DataFrame,
    flops: StepFlops,
    gate_columns: Mapping[str, Any],
    trainable_params: int,
) -> dict[str, Any]:
    """Write the tables and the figure of a run that has ended; return the row of ``summary.csv``."""
    config, folder, held_out = run.config, run.folder, run.data.eval
    assert config.model is not None
    metrics, evaluations = flops.beside(trainer.meter.table(), run.rank_in), pd.DataFrame(trainer.evaluated)
    write_csv(folder.path("eval.csv"), evaluations)
    write_csv(folder.path("layers.csv"), layers)
    columns = [name for name in ("row", "label") if name in held_out]
    predictions = pd.concat([held_out[columns].reset_index(drop=True), rows.reset_index(drop=True)], axis=1)
    write_csv(folder.path("predictions.csv"), predictions)
    mode = config.sparsity.mode if config.sparsity else "none"
    plot_loss(
        folder.path("loss.png"), metrics, evaluations,
        f"{public_name(config.model)} on {run.data.name}, " + ("LoRA" if mode == "none" else f"mode {mode}"),
        "token" if run.is_causal else "row",
    )  # fmt: skip
    last = trainer.evaluated[-1]
    summary = {
        "model": public_name(config.model),
        "dataset": run.data.name,
        "task": config.task,
        "mode": mode,
        "seed": config.seed,
        "train_rows": len(run.train),
        **({} if run.duplicates is None else {"duplicates": len(run.duplicates)}),
        "eval_rows": len(run.held_out),
        "steps": len(metrics),
        "trainable_params": trainable_params,
        "train_loss": float(metrics["loss"].iloc[-max(1, len(metrics) // 10) :].mean()),
        "eval_loss": last["loss"],
        "eval_accuracy": last["accuracy"],
        **step_medians(metrics),
        "sparsify_s": run.sparsify_s,
        **_novelty_summary(trainer, metrics),
        **gate_columns,
    }
    write_csv(folder.path("summary.csv"), pd.DataFrame([summary]))
    folder.note(result={name: None if value != value else value for name, value in summary.items()})
    return summary


def _novelty_summary(trainer: FineTuner, metrics: pd.DataFrame) -> dict[str, Any]:
    """Columns of the summary about the novelty gate; a run without one accepted every step."""
    if not isinstance(trainer, GatedFineTuner):
        tokens = int(metrics["tokens"].sum())
        return {"policy": "none", "target_rate": float("nan"), "accepted_steps": len(metrics),
                "acceptance_rate": float("nan"), "gated_decisions": 0, "tokens_seen": tokens,
                "tokens_trained": tokens}  # fmt: skip
    gate, last = trainer.gate, trainer.gate_table().iloc[-1]
    assert gate is not None
    return {
        "policy": gate.policy,
        "target_rate": gate.target,
        "accepted_steps": gate.accepted_steps,
        "acceptance_rate": gate.acceptance_rate() if gate.gated_decisions else float("nan"),
        "gated_decisions": gate.gated_decisions,
        "tokens_seen": int(last["tokens_seen"]),
        "tokens_trained": int(last["tokens_trained"]),
        **trainer.manipulation_check(),
    }
