"""An edit from its request to its folder: `plan_edit` reads, measures and edits, `PlannedEdit.write` writes and
evaluates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd

from sparselora.data.batches import Example
from sparselora.data.load import Data, encode_rows
from sparselora.evaluation import gsm8k, losses
from sparselora.evaluation.adapted_model import AdaptedModel, load_adapted_model
from sparselora.models.adapter_files import open_adapter
from sparselora.models.adapter_layers import layer_index, select_modules
from sparselora.models.load import device_name
from sparselora.models.model_files import model_facts
from sparselora.runs.files import write_csv, write_json, write_text
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress
from sparselora.spectral import calibrate as cal
from sparselora.spectral.descent import PASSES, Descent, descend
from sparselora.spectral.edit import (
    BOOTSTRAP,
    DIRECTIONS,
    GENERAL_BOOTSTRAP,
    HALVES,
    AdapterEdit,
    decompositions,
    generator,
    in_place,
    read_statistics,
)
from sparselora.spectral.factors import AdapterSVD
from sparselora.spectral.forgetting import KINDS, Forgetting, GeneralText, compare_general, load_general_text
from sparselora.spectral.intruders import describe, intruder_splits, intruder_table
from sparselora.spectral.request import DESCENT, GSM8K, INTRUDERS, EditRequest
from sparselora.spectral.variants import ORACLE, SIGNED, Variant, all_variants, evaluate_variants, sgd_variants
from sparselora.spectral.verdict import compare, to_markdown


@dataclass(frozen=True)
class PlannedEdit:
    """An edit that is ready to be written: everything that can be wrong with its input has been found.

    Attributes:
        request: as it was asked for.
        edit: the new singular values.
        adapted: model with the adapter; None if nothing needs it.
        rows: data to calibrate and evaluate on; None if nothing needs them.
        calibration: rows that the statistics were measured on; None if they were read.
        variants: the edit and its controls; empty without a report.
        questions: to be answered by the edited adapter; None for none.
        general: text to measure forgetting on; None for none.
        general_examples: its rows, encoded.
        intruders: table of the intruder dimensions; None where the mode looks for none.
        descent: SGD steps on the calibration rows; None where none are taken.
    """

    request: EditRequest
    edit: AdapterEdit
    adapted: AdaptedModel | None
    rows: Data | None
    calibration: pd.DataFrame | None
    variants: list[Variant]
    questions: gsm8k.Questions | None
    general: GeneralText | None
    general_examples: list[Example]
    intruders: pd.DataFrame | None
    descent: Descent | None

    @property
    def overview(self) -> str:
        """The modules, the change of each, and what is carried through, in lines for a terminal."""
        lines = [self.edit.overview()] + ([] if self.intruders is None else [describe(self.intruders)])
        return "\n".join(lines)

    def write(self, folder: RunFolder) -> list[str]:
        """Write the edited adapter with its tables and figures, then evaluate it as requested.

        Args:
            folder: reserved, but not entered.
        Returns:
            The results in sentences.
        """
        device = "cpu" if self.adapted is None else device_name(self.adapted.device)
        with folder:
            folder.note(device=device, **model_facts(self.request.config.model))
            self._write_edit(folder)
            sentences = [self._write_answers(folder)] if self.questions is not None else []
            return sentences + (self._write_report(folder) if self.request.report else [])

    def _write_edit(self, folder: RunFolder) -> None:
        from sparselora.report import spectral as figures

        self.edit.write(folder.folder)
        tables = self.edit.tables()
        for name, table in tables.items():
            write_csv(folder.path(name), table)
        write_json(folder.path("spectral_edit_meta.json"), self._meta(folder))
        if self.intruders is not None:
            write_csv(folder.path(INTRUDERS), self.intruders)
        directions = tables[DIRECTIONS]
        directions = directions.assign(layer=[layer_index(module) for module in directions["module"]])
        for name, draw in (
            ("spectra", figures.spectra),
            ("sensitivity", figures.sensitivity),
            ("layers", figures.layers),
        ):
            draw(folder.path(f"plots/{name}.png"), directions, self._title)

    @property
    def _title(self) -> str:
        return f"{self.edit.adapter.name}, mode {self.request.mode}"

    def _meta(self, folder: RunFolder) -> dict[str, Any]:
        record = json.loads((folder.folder / "run.json").read_text("utf-8"))
        source = self.request.sensitivity
        return {
            "adapter": self.edit.adapter.name,
            "options": folder.arguments,
            "versions": record["versions"],
            "calibration": {
                "source": "measured" if source is None else source.name,
                "dataset": self.rows.name if self.rows is not None and source is None else None,
                "rows": [] if self.calibration is None else self.calibration["row"].tolist(),
            },
            **self.edit.summary(),
        }

    def _write_answers(self, folder: RunFolder) -> str:
        assert self.adapted is not None
        assert self.questions is not None
        request, questions = self.request, self.questions
        with (
            in_place(self.adapted.model, self.edit.factors()),
            Progress(len(questions.rows), "item", "GSM8K") as progress,
        ):
            prompts, ends = questions.for_model(self.adapted.tokenizer)
            generate = losses.transformers_generator(
                self.adapted.model, self.adapted.tokenizer, max_new_tokens=request.max_new_tokens,
                batch_size=request.eval_bsz, ends=ends, on_done=progress.update,
            )  # fmt: skip
            facts, items = gsm8k.answer(questions, generate(prompts))
        names = {"task": "gsm8k", "adapter": folder.folder.name, "dataset": questions.name, "n": len(items)}
        metrics = {**names, "seed": request.config.seed, **facts, "backend": "transformers"}
        write_csv(folder.path("items_gsm8k.csv"), items)
        write_json(folder.path("metrics_gsm8k.json"), metrics)
        return (
            f"GSM8K exact match {metrics['exact_match']:.4f} [{metrics['ci_low']:.4f}, {metrics['ci_high']:.4f}] "
            f"(95 %), {metrics['n']} questions, {metrics['fewshot']}-shot"
        )

    def _write_report(self, folder: RunFolder) -> list[str]:
        """Evaluate the edit and its controls on held-out rows, and where they are known on the calibration rows."""
        from sparselora.report.spectral import report as figure

        assert self.adapted is not None
        assert self.rows is not None
        request, tables = self.request, []
        frames = [self.rows.eval] + ([self.calibration] if self.calibration is not None else [])
        with Progress(sum(map(len, frames)) * len(self.variants), "row", "report") as progress:
            for frame in frames:
                examples = encode_rows(frame, self.rows, self.adapted.tokenizer, request.config)
                measure = cal.held_out(self.adapted, examples, frame, request.eval_bsz, progress.update)
                tables.append(evaluate_variants(self.adapted.model, self.edit.adapter, self.variants, measure))
        items, calibration = tables[0], tables[1] if len(tables) > 1 else None
        facts = pd.DataFrame([variant.facts() for variant in self.variants])
        report = compare(items, facts, generator(request.config.seed, BOOTSTRAP), calibration)
        title = f"{self._title}, on {self.rows.name}"
        write_csv(folder.path("report_items.csv"), items)
        write_csv(folder.path("report.csv"), report.table)
        if self.descent is not None:
            write_csv(folder.path(DESCENT), self.descent.table)
        page, sentences = to_markdown(report, title), list(report.sentences)
        if self.general is not None:
            change = report.table.loc[report.table["kind"] == "edit", "loss_change"].item()
            forgetting = self._write_forgetting(folder, self.general, float(change))
            page, sentences = f"{page}\n{forgetting.to_markdown()}", [*sentences, forgetting.verdict]
        write_text(folder.path("report.md"), page)
        figure(folder.path("plots/report.png"), report.table, f"{title}, n = {report.n} held-out rows")
        return sentences

    def _write_forgetting(self, folder: RunFolder, general: GeneralText, task_change: float) -> Forgetting:
        """Evaluate the model without the adapter, with it and with the edit on general text."""
        assert self.adapted is not None
        by_kind = {variant.kind: variant for variant in self.variants if variant.kind in KINDS}
        variants = [by_kind[kind] for kind in KINDS]
        examples, batch_size = self.general_examples, self.request.eval_bsz
        with Progress(len(examples) * len(variants), "row", "general text") as progress:
            measure = cal.held_out(self.adapted, examples, general.frame, batch_size, progress.update)
            items = evaluate_variants(self.adapted.model, self.edit.adapter, variants, measure)
        names = {kind: by_kind[kind].name for kind in KINDS}
        rng = generator(self.request.config.seed, GENERAL_BOOTSTRAP)
        forgetting = compare_general(general.name, items, names, task_change, rng)
        write_csv(folder.path("general_items.csv"), items)
        write_csv(folder.path("general.csv"), forgetting.table)
        return forgetting


def plan_edit(request: EditRequest) -> PlannedEdit:
    """Read and decompose the adapter, measure or read the statistics, and edit; load what the evaluation needs.

    Raises:
        InputError: anything that can be wrong with the input; nothing is written before.
    """
    config, seed = request.config, request.config.seed
    adapter = open_adapter(request.adapter)
    modules = select_modules(adapter, request.target_modules, request.layer_min, request.layer_max)
    rows = cal.load_rows(config, request.adapter) if request.needs_rows else None
    calibration = None
    if rows is not None and request.is_calibrated:
        calibration = cal.drawn_rows(rows, request.calib_samples, seed)
    general = None
    if request.general_dataset is not None:
        general = load_general_text(request.general_dataset, request.general_samples)
    adapted = None
    if request.needs_model:
        adapted = load_adapted_model(config, request.adapter, len(rows.labels) if rows is not None else 0)
    questions = _questions(request, adapted)
    general_examples = []
    if general is not None:
        assert adapted is not None
        general_examples = general.encode(adapted.tokenizer, config.max_length)
    intruders = None
    with Progress(len(modules), "module", "SVD") as progress:
        if request.needs_base:
            assert adapted is not None
            splits = intruder_splits(adapted.model, adapter, modules, request.options, progress.update)
            svds = cast(dict[str, AdapterSVD], splits)
            intruders = intruder_table(splits)
        else:
            svds = decompositions(adapter, modules, progress.update)
    statistics = None if request.sensitivity is None else read_statistics(request.sensitivity, svds)
    if statistics is None:
        assert adapted is not None
        assert rows is not None
        assert calibration is not None
        examples = encode_rows(calibration, rows, adapted.tokenizer, config)
        batches = cal.batches(examples, adapted.tokenizer, request.calib_bsz)
        with Progress(len(batches), "batch", "calibration") as progress:
            statistics = cal.calibrate(adapted, batches, svds, progress.update)
    edit = AdapterEdit.by_mode(adapter, svds, statistics, request.mode, request.options, seed)
    variants = all_variants(edit, request.mode, request.options, seed, request.draws) if request.report else []
    descent = None
    if request.sgd:
        assert adapted is not None
        assert rows is not None
        assert calibration is not None
        examples = encode_rows(calibration, rows, adapted.tokenizer, config)
        halves = generator(seed, HALVES)
        with Progress(PASSES * len(examples), "row", "SGD") as progress:
            descent = descend(adapted, adapter, modules, examples, request.calib_bsz, halves, progress.update)
        variants += sgd_variants(descent)
    if request.oracle:
        assert adapted is not None
        assert rows is not None
        examples = encode_rows(rows.eval, rows, adapted.tokenizer, config)
        batches = cal.batches(examples, adapted.tokenizer, request.calib_bsz)
        with Progress(len(batches), "batch", "oracle") as progress:
            statistics = cal.calibrate(adapted, batches, svds, progress.update)
        bound = AdapterEdit.by_mode(adapter, svds, statistics, SIGNED, request.options, seed)
        variants.append(Variant(f"{SIGNED} oracle, by the evaluation rows", ORACLE, bound))
    return PlannedEdit(
        request, edit, adapted, rows, calibration, variants, questions, general, general_examples, intruders, descent
    )


def _questions(request: EditRequest, adapted: AdaptedModel | None) -> gsm8k.Questions | None:
    if request.gsm8k is None:
        return None
    assert adapted is not None
    config, is_local = request.config, request.gsm8k != GSM8K
    questions = gsm8k.load_questions(
        request.gsm8k, eval_file=config.eval_file if is_local else None,
        prompt_field=config.prompt_field if is_local else "prompt",
        completion_field=config.completion_field if is_local else "completion",
        template=config.template, chat_template=config.chat_template, adapter=request.adapter,
        samples=config.eval_samples, fewshot=request.fewshot, seed=config.seed,
    )  # fmt: skip
    prompts, _ = questions.for_model(adapted.tokenizer)
    losses.prompt_ids(prompts, adapted.tokenizer, request.max_new_tokens)  # refuses what does not fit
    return questions
