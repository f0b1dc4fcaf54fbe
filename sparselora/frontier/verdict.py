"""The outcome of a search: its table, page and figure, and the configuration to train with."""

from __future__ import annotations

import shlex
from pathlib import Path

import pandas as pd

from sparselora.frontier.candidates import DENSE, with_settings
from sparselora.frontier.choice import choose
from sparselora.frontier.frontier_table import frontier_table, pareto_mask, pilot_points
from sparselora.frontier.learning_rates import describe, read_learning_rates
from sparselora.frontier.pilot_results import PilotResults, read_results
from sparselora.frontier.request import BEST_FILE, DENSE_FILE, FrontierRequest
from sparselora.models.model_files import model_label
from sparselora.report.frontier import FrontierFacts, frontier_figure, frontier_page
from sparselora.runs.files import write_csv, write_text
from sparselora.runs.progress import duration


def write_outputs(folder: Path, request: FrontierRequest, *, is_finished: bool = False) -> str:
    """Compare the pilots that have finished, write the table, the page, the figure and the configuration.

    Args:
        folder: of the search.
        is_finished: the search has ended; if not, the page says so, and a later call replaces all of it.
    Returns:
        The page.
    Raises:
        InputError: a table of the search is damaged.
    """
    results = read_results(folder)
    table = frontier_table(results, request.tolerance, request.config.seed)
    choice = choose(table, request.tolerance)
    points = _all_points(results)
    is_dense = choice.name == DENSE
    yaml_name = DENSE_FILE if is_dense else BEST_FILE
    run_folder = folder.with_name(f"{folder.name}_{'dense' if is_dense else 'best'}")
    command = ["sparselora", "train", str(folder / yaml_name), "--out_dir", str(run_folder)]
    dense = table.set_index("candidate").loc[DENSE]
    facts = FrontierFacts(
        title=f"{model_label(str(request.config.model))} on {Path(str(request.config.dataset)).name}",
        tolerance=request.tolerance,
        budget=duration(request.budget),
        full_steps=results.full_steps,
        base_loss=float(results.pilots["loss_base"].mean()),
        dense_loss=float(dense["loss"]),
        is_finished=is_finished,
        winner=None if is_dense else choice.name,
        is_verdict=choice.is_verdict,
        learning_rates=describe(read_learning_rates(folder)),
        command=shlex.join(command),
    )
    page = frontier_page(table, facts)
    write_csv(folder / "frontier.csv", table.astype(dict.fromkeys(("stage", "rung", "steps"), "Int64")))
    write_csv(folder / "frontier_points.csv", points)
    if len(points):
        frontier_figure(folder / "frontier.png", table, points, facts.title)
        winner = results.candidates.loc[choice.name]
        config = with_settings(request.config, winner["settings"]).replace(lr=float(winner["lr"]))
        write_text(folder / yaml_name, _comment(facts) + config.to_yaml())
        (folder / (BEST_FILE if is_dense else DENSE_FILE)).unlink(missing_ok=True)
    write_text(folder / "frontier.md", page)
    return page


def _all_points(results: PilotResults) -> pd.DataFrame:
    """Return `pilot_points` with the number of its length where it is dense, else −1, and the Pareto line of all."""
    points = pilot_points(results)
    numbers = {run: i for i, point in enumerate(results.dense_points([])) for run in point.runs}
    places = points[["candidate", "rung"]].itertuples(index=False)
    points["dense_length"] = [numbers.get((place.candidate, place.rung), -1) for place in places]
    points["pareto"] = pareto_mask(points["seconds"].to_numpy(dtype=float), points["loss"].to_numpy(dtype=float))
    return points


def _comment(facts: FrontierFacts) -> str:
    """Return why this is the configuration, as the comment of its file."""
    tolerance = f"{100 * facts.tolerance:g} %"
    if facts.winner is None:
        reason = f"dense: nothing was shown to pay within {tolerance} of its loss"
    elif facts.is_verdict:
        reason = f"{facts.winner}: better than dense for the same time, within {tolerance} of its loss"
    else:
        reason = f"{facts.winner}: looks better than dense for the same time on rows of one seed, which is no verdict"
    state = "" if facts.is_finished else " The search had not ended."
    return f"# `python -m sparselora frontier` on {facts.title}:\n# {reason}.{state}\n"
