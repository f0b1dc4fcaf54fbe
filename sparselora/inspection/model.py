"""All layers of a model, measured in parallel and resumably, and everything that is written of them."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselora.errors import InputError
from sparselora.inspection.layer import LayerRecord, Settings, inspect_layer, skipped_layer, unmeasured_row
from sparselora.models.model_files import model_label
from sparselora.models.weights import MatrixInfo, UnmeasuredTensor, load_matrix
from sparselora.numerics import spectra
from sparselora.runs.files import write_csv, write_text
from sparselora.runs.folder import RunFolder
from sparselora.runs.progress import Progress
from sparselora.runs.user_files import parse_json
from sparselora.runs.workers import ordered_map, worker_count

if TYPE_CHECKING:
    import pandas as pd  # loaded by `import_for_tables`

PARTIAL = "layer_reconstruction.partial"

LayerPlan = Sequence[tuple[MatrixInfo, str]]
"""Matrices with the reason to skip them, ``""`` for none."""


@dataclass(frozen=True)
class InspectRequest:
    """One inspection of a model.

    Attributes:
        model: name or folder, for titles.
        settings: of the measurement.
        plots: ``all`` (an overview and a figure for each layer), ``overview`` or ``none``.
        is_resumed: take over the layers that a killed run has measured.
        has_experiment: compare all predictors on one layer.
        experiment_param: name of that layer; None for the first attention or feed-forward weight.
    """

    model: str
    settings: Settings
    plots: str
    is_resumed: bool
    has_experiment: bool
    experiment_param: str | None


@dataclass(frozen=True)
class Results:
    """The tables of an inspection.

    Attributes:
        table: one row per tensor that is not a vector.
        layers: the rows that are compared: measured and not of full rank.
        summary: mean with interval, median and std of every figure.
        tests: paired tests of the predictors.
        skipped: tensors that were not measured.
    """

    table: pd.DataFrame
    layers: pd.DataFrame
    summary: pd.DataFrame
    tests: pd.DataFrame
    skipped: list[UnmeasuredTensor]


def inspect_model(
    request: InspectRequest, plan: LayerPlan, unmeasured: Sequence[UnmeasuredTensor], folder: RunFolder
) -> Results:
    """Measure the matrices of ``plan`` and write tables and figures into the open ``folder``.

    Args:
        unmeasured: the tensors of the model that are no matrices.
    """
    records = measure(request, plan, folder)
    from sparselora.inspection import tables

    records += [{"row": unmeasured_row(tensor, request.settings.seed)} for tensor in unmeasured if not tensor.is_vector]
    table = tables.layer_table(records)
    layers = tables.compared_layers(table)
    results = Results(
        table, layers, tables.summarise(layers), tables.compare(layers), [*_skipped(plan, records), *unmeasured]
    )
    if request.plots != "none" and request.settings.method != "randomized" and len(layers):
        _write_overview(request, folder, records, results)
    if request.has_experiment:
        _write_experiment(request, folder, plan, table)
    write_csv(folder.path("not_measured.csv"), tables.unmeasured_table(results.skipped))
    write_csv(folder.path("summary.csv"), results.summary)
    write_csv(folder.path("predictor_tests.csv"), results.tests)
    write_csv(folder.path("layer_reconstruction.csv"), table)
    (folder.folder / PARTIAL).unlink()
    return results


# --- measurement --------------------------------------------------------------------------------------------------


def measure(request: InspectRequest, plan: LayerPlan, folder: RunFolder) -> list[dict[str, Any]]:
    """Return one record per matrix: its ``row`` of the table and its ``curve``; a resumed run takes over those there
    are."""
    path = folder.folder / PARTIAL
    done = read_partial(path) if request.is_resumed else {}
    write_text(path, "".join(json.dumps(record) + "\n" for record in done.values()))
    todo = [(info, reason) for info, reason in plan if info.name not in done]
    count = sum(not reason for _, reason in todo)
    with _layer_figures(request, folder) as draw, path.open("a", encoding="utf-8", newline="\n") as log:
        records = ordered_map(
            partial(_measure_one, request.settings, draw), todo, costs(todo), processes(todo), import_for_tables
        )
        with Progress(count, "layer", "inspect") as progress:
            for (info, reason), record in zip(todo, records):
                # The line comes after the figure: what is in the file needs no more work.
                log.write(json.dumps(record) + "\n")
                log.flush()
                done[info.name] = record
                progress.update(0 if reason else 1)
    return [done[info.name] for info, _ in plan]


def import_for_tables() -> None:
    """Import what only the tables need while the workers compute: a good part of a small model's whole time."""
    import sparselora.inspection.tables  # noqa: F401


def costs(layers: LayerPlan) -> list[float]:
    """Return roughly the multiplications of each layer: its Gram matrix, and the decomposition of that."""
    return [0.0 if reason else info.elements * min(info.shape) + 8 * min(info.shape) ** 3 for info, reason in layers]


def processes(layers: LayerPlan) -> int:
    """Return the number of processes: one per core where a layer uses one core; only this one where BLAS uses all, or
    where starting more would not pay."""
    small = all(reason or spectra.single_threaded(min(info.shape)) for info, reason in layers)
    return worker_count() if small and sum(costs(layers)) > 2e9 else 1


Draw = Callable[[LayerRecord], None]


def _measure_one(settings: Settings, draw: Draw, layer: tuple[MatrixInfo, str]) -> dict[str, Any]:
    info, reason = layer
    record = skipped_layer(info, reason, settings.seed) if reason else inspect_layer(load_matrix(info), info, settings)
    if record.s is not None:
        draw(record)
    return {"row": record.row, "curve": record.curve}


def read_partial(path: Path) -> dict[str, dict[str, Any]]:
    """Return the whole lines of an interrupted run's log, by parameter; a torn or damaged line is a layer to measure
    again."""
    done = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if line.endswith("\n"):
                with suppress(InputError, KeyError, TypeError):
                    record = parse_json(line, allow_nan=True)
                    done[str(record["row"]["param"])] = {"row": record["row"], "curve": record["curve"]}
    return done


def _skipped(plan: LayerPlan, records: Sequence[dict[str, Any]]) -> list[UnmeasuredTensor]:
    """Return the matrices that were left out: for a limit, or because they turned out to be zero."""
    reasons = {record["row"]["param"]: record["row"]["skipped"] for record in records}
    infos = [info for info, _ in plan if reasons[info.name]]
    return [UnmeasuredTensor(info.name, info.shape, info.dtype, reasons[info.name]) for info in infos]


# --- figures ------------------------------------------------------------------------------------------------------


@contextmanager
def _layer_figures(request: InspectRequest, folder: RunFolder) -> Iterator[Draw]:
    """Yield a function that writes a layer's svd_<param>.png and its data, or nothing unless figures are wanted."""
    if request.plots != "all":
        yield lambda record: None
        return
    from sparselora.report.inspection import SpectrumFigure

    with SpectrumFigure() as figure:

        def draw(record: LayerRecord) -> None:
            row, s, null = record.row, record.s, record.null
            assert s is not None
            assert null is not None
            edge = math.sqrt(row["mp_edge"]) if row.get("mp_edge") else None
            facts = f"{row['shape']}, stable rank {row['stable_rank']:.1f}, energy in top {row['k_used']}: " + (
                f"{row['topk_energy']:.1%} ({row['topk_energy_over_gaussian']:.1f}× Gaussian)"
            )
            figure.draw(folder.path(figure_name(row["param"])), row["param"], s, null, row["k_used"], edge, facts)
            lines = [f"{i + 1},{value!r},{other!r}" for i, (value, other) in enumerate(zip(s.tolist(), null.tolist()))]
            write_text(folder.path(figure_name(row["param"], "csv")), "\n".join(["i,s,s_gaussian", *lines, ""]))

        yield draw


def figure_name(param: str, suffix: str = "png") -> str:
    """Return the file of a layer's spectrum; a name that had to be changed for it gets a checksum, so none meet."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", param)[:120]
    if name != param:
        name += f"-{zlib.crc32(param.encode('utf-8', 'surrogatepass')):08x}"
    return f"plots/svd_{name}.{suffix}"


def _write_overview(
    request: InspectRequest, folder: RunFolder, records: Sequence[dict[str, Any]], results: Results
) -> None:
    import pandas as pd

    from sparselora.report import inspection

    layers, settings = results.layers, request.settings
    shown = set(layers["param"])
    curves = pd.concat(
        [
            pd.DataFrame({"param": record["row"]["param"], "family": record["row"]["family"], **record["curve"]})
            for record in records
            if record["row"]["param"] in shown
        ],
        ignore_index=True,
    )
    overall = results.summary[results.summary["by"] == "all"].set_index("metric")
    intervals = {
        name: (float(overall.loc[name, "mean"]), float(overall.loc[name, "ci_high"] - overall.loc[name, "mean"]))
        for name in inspection.PREDICTOR_LABELS
    }
    title = (
        f"{model_label(request.model)}: {len(layers)} layers, rank k = {settings.rank}, "
        f"{settings.keep_ratio:.0%} of columns or rows kept"
    )
    inspection.overview(folder.path("overview.png"), layers, curves, intervals, title)


def _write_experiment(request: InspectRequest, folder: RunFolder, plan: LayerPlan, table: pd.DataFrame) -> None:
    from sparselora.inspection.experiment import experiment_table
    from sparselora.report import inspection

    usable = table[table["full_rank"].eq(False)]
    # Without a name the first layer of the stack, not the embedding before it.
    ranked = usable.sort_values("family", key=lambda kind: kind.isin(("embedding", "other")), kind="stable")
    name = request.experiment_param or ranked["param"].iloc[0]
    row = table[table["param"] == name].iloc[0].to_dict()
    W = load_matrix(next(info for info, _ in plan if info.name == name))
    facts = [f"{row['shape']}, rank k = {row['k_used']}, {row['cols_kept']} columns and {row['rows_kept']} rows kept"]
    points = experiment_table(W, name, row, request.settings)
    inspection.experiment(folder.path("experiment.png"), points, name, facts)
