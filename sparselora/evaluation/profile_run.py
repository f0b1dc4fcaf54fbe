"""The profile of a causal language model before any training, from a request to the files of its folder.

Forward passes alone, on held-out rows: the loss that each sparse layer alone costs, and whole schedules. Channels and
maps that need calibration see training rows; no measured row is among them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.cache import Cache
from sparselora.contextual.flops import Shape
from sparselora.contextual.layer_schedule import SparseMacs
from sparselora.contextual.layer_sensitivity import with_layers
from sparselora.contextual.plan import LayerPlan
from sparselora.contextual.statistics import Calibration
from sparselora.contextual.structure import Structure, find_blocks
from sparselora.evaluation.adapted_model import AdaptedModel, load_adapted_model
from sparselora.evaluation.layer_passes import LayerPasses, RowBatch
from sparselora.evaluation.layer_probe import SHARES
from sparselora.evaluation.layer_profile import LayerProfiler, Rows, layer_cells
from sparselora.evaluation.layer_verdict import PROFILED, SUGGESTED, layer_verdicts
from sparselora.evaluation.profile_request import PARTIAL, ProfileRequest
from sparselora.evaluation.profile_rows import ProfileRows, RowEncoder, check_context, with_other_prompts
from sparselora.evaluation.row_batches import average_workload
from sparselora.evaluation.sparse_blocks import prove_blocks
from sparselora.evaluation.whole_schedules import fitted_schedule, schedule_table, whole_schedules
from sparselora.models.load import device_name
from sparselora.models.model_files import model_facts, model_label
from sparselora.report.profile import heat_map, profile_page
from sparselora.runs.files import write_csv, write_json, write_text
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress, duration
from sparselora.runs.user_files import read_json

Tensor = torch.Tensor
Tables = dict[str, list[dict[str, Any]]]


def run_profile(request: ProfileRequest, folder: RunFolder) -> str:
    """Load, measure and write everything, and return the summary to print.

    Args:
        folder: reserved, but not entered: nothing is written before data and model have been checked.
    Raises:
        InputError: data, a model or settings that do not go together.
    """
    measurement = Measurement.prepare(request)
    with folder:
        adapted = measurement.adapted
        folder.note(device=device_name(adapted.device), **model_facts(str(request.config.model)))
        return _measure(measurement, folder)


# --- what is measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """A model without gradients, proved to be one whose layers can be sparse, and the rows of a profile.

    Attributes:
        examples: encoded rows to measure on, the shortest first.
        macs: what the layers cost on them.
    """

    request: ProfileRequest
    adapted: AdaptedModel
    structure: Structure
    passes: LayerPasses
    rows: ProfileRows
    encoder: RowEncoder
    examples: list[dict[str, Any]]
    macs: SparseMacs

    @classmethod
    def prepare(cls, request: ProfileRequest) -> Measurement:
        """Load everything and try it on a few tokens, so that what can be wrong with the input is found at once."""
        rows = ProfileRows.draw(request)
        adapted = load_adapted_model(request.config, None, 0)
        adapted.model.requires_grad_(False)
        encoder = RowEncoder(request, rows.data, adapted)
        examples = encoder.examples(rows.measured)
        check_context(rows.data.name, encoder.batches(examples))
        structure = find_blocks(adapted.model)
        passes = LayerPasses(structure)
        for settings in (request.calibrated, *([request.schedule] if request.schedule is not None else [])):
            settings.check(len(structure.blocks))
        prove_blocks(structure, request.parts)
        shape = Shape.from_config(adapted.model.config.to_dict())
        macs = SparseMacs(shape, average_workload(encoder.tensors(examples), is_causal=True))
        return cls(request, adapted, structure, passes, rows, encoder, examples, macs)

    @property
    def title(self) -> str:
        return f"{model_label(str(self.request.config.model))} on {self.rows.data.name}"


# --- measuring ----------------------------------------------------------------------------------------------------


def _measure(measurement: Measurement, folder: RunFolder) -> str:
    request, passes = measurement.request, measurement.passes
    encoder, rows = measurement.encoder, measurement.rows
    began = time.perf_counter()
    batches = encoder.batches(measurement.examples)
    cells_of_layer = layer_cells(request.base, request.levels, 0)
    measured = Rows.of(passes, batches, len(cells_of_layer))
    with Progress(0, "step") as progress:
        progress.say(_announcement(measurement, _dense_seconds(measurement.structure, batches)))
    calibrating = time.perf_counter()
    moments = _calibrated(measurement)
    calibrated = time.perf_counter() - calibrating
    profiler = LayerProfiler(passes, measured, request.base, request.levels, moments, request.cache_dir)
    prompts = _prompt_controls(measurement, measured)
    tables = _measured_layers(profiler, folder)
    cells, contrasts, energy, explained = (
        pd.DataFrame(tables[name]) for name in ("cells", "contrasts", "energy", "explained")
    )
    verdicts = layer_verdicts(cells, contrasts, measured.dense.mean, request.tolerance, prompts)
    verdicts = _with_maps(verdicts, energy, explained)
    schedule_cells, layer_limit = fitted_schedule(request, passes, measured, cells, moments)
    further = Rows.of(passes, encoder.batches(encoder.examples(rows.further)))
    schedules = schedule_table(
        request, passes, {"measured": measured, "further": further}, cells, schedule_cells, moments,
        measurement.macs,
    )  # fmt: skip
    facts = {
        "rows": request.rows, "dense_loss": measured.dense.mean, "tolerance": request.tolerance,
        "layer_limit": layer_limit, "cells": len(cells),
        "seconds": round(time.perf_counter() - began, 1), "calibration_seconds": round(calibrated, 1),
        **_floor(profiler.passes, measurement),
    }  # fmt: skip
    folder.note(**facts)
    best = with_layers(request.base.replace(mode=SUGGESTED, seed=None), schedule_cells)
    page = profile_page(measurement.title, facts, verdicts, prompts, schedules)
    for name, table in {
        "profile.csv": cells, "contrasts.csv": contrasts, "energy.csv": energy, "maps.csv": explained,
        "layers.csv": verdicts, "prompts.csv": prompts, "schedules.csv": schedules,
    }.items():  # fmt: skip
        write_csv(folder.path(name), table)
    figure_title = f"{measurement.title}: one layer sparse at a time, n = {request.rows} held-out rows"
    heat_map(folder.path("profile.png"), cells, figure_title)
    write_text(folder.path("profile.md"), page)
    write_text(folder.path("schedule.yaml"), _yaml(best, layer_limit, measurement))
    folder.path(PARTIAL).unlink(missing_ok=True)
    return page


def _dense_seconds(structure: Structure, batches: Sequence[RowBatch]) -> float:
    """Return the seconds of a dense pass over all rows at the speed of passes that take many copies of a batch."""
    passes, batch = LayerPasses(structure), batches[0]  # its own, so that what it counts is not of the cells
    _, hidden = passes.dense(batch, 0)
    copies = [hidden] * passes.copies(batch)
    passes.losses_after(batch, 0, copies).cpu()  # the first of its shape on a GPU takes seconds
    began = time.perf_counter()
    passes.losses_after(batch, 0, copies).cpu()
    seconds = (time.perf_counter() - began) / len(copies)
    return seconds * sum(batch.layout.n for batch in batches) / batch.layout.n


def _announcement(measurement: Measurement, dense_seconds: float) -> str:
    """Say what will be done, and how long it takes at the speed of the dense passes over the measured rows."""
    request, layers = measurement.request, len(measurement.structure.blocks)
    cells = len(layer_cells(request.base, request.levels, 0))
    schedules = len(whole_schedules(request, [], layers)) + 1
    passes = cells * (layers + 1) / 2 + 2 * schedules * len(PROFILED)
    return (
        f"profile: {cells} cells in each of {layers} layers on {request.rows} rows are the work of {passes:.0f} dense "
        f"passes over them, about {duration(passes * dense_seconds)}; fewer rows or levels take less"
    )


def _calibrated(measurement: Measurement) -> dict[str, Tensor]:
    """Return the moments of every layer on the calibration rows, from the cache if they are there."""
    request, structure, encoder = measurement.request, measurement.structure, measurement.encoder
    batches = encoder.tensors(encoder.examples(measurement.rows.calibration))
    plans = [LayerPlan(structure, block, request.calibrated) for block in structure.blocks]
    calibration = Calibration(structure, plans, batches, Cache(request.cache_dir))
    with Progress(calibration.steps, "step", "calibration") as progress:
        return calibration.moments(progress.update)


def _measured_layers(profiler: LayerProfiler, folder: RunFolder) -> Tables:
    """Measure layer after layer, and keep what is done, so that a run that was stopped goes on at the next layer."""
    path = folder.path(PARTIAL)
    done: list[Tables] = read_json(path, allow_nan=True) if folder.can_resume() and path.is_file() else []
    layers = len(profiler.structure.blocks)
    with Progress(layers, "layer", "profile", done=len(done)) as progress:
        hidden = profiler.inputs(len(done)) if len(done) < layers else []
        for layer in range(len(done), layers):
            tables, hidden = profiler.measure(layer, hidden)
            done.append(tables)
            write_json(path, done)
            progress.update()
    return {name: [row for tables in done for row in tables[name]] for name in done[0]}


def _prompt_controls(measurement: Measurement, measured: Rows) -> pd.DataFrame:
    """Return what another row's prompt and an empty one cost: a task that does not read its prompt has no context."""
    encoder, examples, table = measurement.encoder, measurement.examples, []
    for name, others in with_other_prompts(examples, encoder.empty_prompt()).items():
        losses = Rows.of(measurement.passes, encoder.batches(others)).dense
        table.append({"prompt": name, "rows": len(others), **measured.percents(measured.increase(losses.sums))})
    return pd.DataFrame(table)


def _with_maps(verdicts: pd.DataFrame, energy: pd.DataFrame, explained: pd.DataFrame) -> pd.DataFrame:
    """Return ``verdicts`` with the energy in the best channels and what the map explains (of attention: v and o)."""
    columns = {}
    for part, channels, fitted in (("ffn", "ffn", "ffn"), ("attention", "v", "o")):
        rows = energy[energy["channels"] == channels] if len(energy) else energy
        for row in rows.to_dict("records"):
            columns[row["layer"], part, f"energy_best_{100 * row['best']:g}"] = row["energy"]
        for row in explained[explained["map"] == fitted].to_dict("records") if len(explained) else ():
            columns[row["layer"], part, "map_explained"] = row["explained"]
    names = [*(f"energy_best_{100 * share:g}" for share in SHARES), "map_explained"]
    added = {
        name: [columns.get((layer, part, name), float("nan")) for layer, part in verdicts[["layer", "part"]].to_numpy()]
        for name in names
    }
    text = verdicts.pop("verdict")
    return verdicts.assign(**added, verdict=text)


def _floor(passes: LayerPasses, measurement: Measurement) -> dict[str, float]:
    """Return the FLOPs of the products that the cells need, and the seconds these take at the device's rate.

    The rate is measured on the product of a first FFN projection with 4,096 tokens.
    """
    structure, device = measurement.structure, measurement.adapted.device
    plan = LayerPlan(structure, structure.blocks[0], SparsityConfig(mode="dense"))
    distinct = {weight.data_ptr(): weight.numel() for weight in (linear.stored() for linear in plan.linears.all)}
    flops = 2.0 * (
        sum(distinct.values()) * passes.restarted_tokens + passes.head.weight.numel() * passes.restarted_labels
    )
    weight = plan.linears.up.stored().to(torch.bfloat16 if measurement.adapted.bf16 else torch.float32)
    x = torch.randn(4096, weight.shape[1], device=device).to(weight.dtype)
    repeats = 20

    def run() -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run()
    rate = repeats * 2.0 * x.shape[0] * weight.numel() / run()
    return {"tflop": float(f"{flops / 1e12:.3g}"), "floor_seconds": float(f"{flops / rate:.3g}")}


def _yaml(config: SparsityConfig, layer_limit: float, measurement: Measurement) -> str:
    return (
        f"# Schedule of `python -m sparselora profile` for {measurement.title}: as a whole it costs at most\n"
        f"# {measurement.request.tolerance:g} % of the answer loss, two standard errors included, on the measured rows "
        f"(each layer alone at most {layer_limit:g} %);\n"
        f"# sparse tokens keep {measurement.macs.remaining(config):.3f} of the frozen projections' FLOPs. On further "
        "rows: see schedules.csv.\n" + config.to_yaml()
    )
