"""Forgetting by an adapter: the loss of general text without it, with it, and after an edit, paired by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sparselora.data.batches import Example
from sparselora.data.table_files import is_table, read_table, table_name
from sparselora.data.tables import EVAL_SUBSET_SEED, draw_rows
from sparselora.data.tokens import encode_prompts, row_id
from sparselora.errors import InputError, few
from sparselora.models.labels import IGNORED
from sparselora.numerics.stats import Bootstrap, is_bootstrap_floor, paired_bootstrap
from sparselora.report.markdown import markdown_table, p_value, with_interval

DOCSTRINGS = "docstrings"
TEXT = "text"
"""Column of the texts."""

KINDS = ("base", "unedited", "edit")
_RESAMPLES = 2000


@dataclass(frozen=True)
class GeneralText:
    """Texts that are not about the adapter's task: ``frame`` has the columns ``row`` and ``text``."""

    name: str
    frame: pd.DataFrame

    def encode(self, tokenizer: Any, max_length: int) -> list[Example]:
        """Return each text as token ids, cut to ``max_length``; every token but the first is a label.

        Raises:
            InputError: a text of fewer than two tokens, or of tokens beyond the model.
        """
        longest = min(max_length, tokenizer.model_max_length)
        rows = [ids[:longest] for ids in encode_prompts(tokenizer, self.frame[TEXT].tolist())]
        short = next((i for i, ids in enumerate(rows) if len(ids) < 2), None)
        if short is not None:
            raise InputError(
                f"{self.name}: the text of row {row_id(self.frame, short)} has no second token to predict; remove it"
            )
        return [{"input_ids": ids, "labels": [IGNORED, *ids[1:]]} for ids in rows]


def load_general_text(dataset: str, samples: int) -> GeneralText:
    """Load ``samples`` texts (0: all), the same in every run.

    Args:
        dataset: a csv, tsv, json, jsonl or parquet file (``.gz`` too) with a column ``text``, or ``docstrings``.
    Raises:
        InputError: another name, a file that cannot be read, no column ``text``, a cell that is no text.
    """
    if dataset == DOCSTRINGS:
        from sparselora.data.texts import harvest_docstrings

        name, frame = DOCSTRINGS, harvest_docstrings().eval[["row", TEXT]]
    elif is_table(dataset):
        table = read_table(dataset)
        if TEXT not in table.columns:
            raise InputError(
                f"general_dataset {dataset} has no column {TEXT!r} (its columns are {few(table.columns)}); rename one"
            )
        name, frame = table_name(dataset), pd.DataFrame({"row": table.rows, TEXT: table.texts(TEXT)})
    else:
        raise InputError(
            f"general_dataset must be a file with a column {TEXT!r} (csv, tsv, json, jsonl, parquet) or {DOCSTRINGS}, "
            f"got {dataset!r}"
        )
    return GeneralText(name, draw_rows(frame, samples, EVAL_SUBSET_SEED))


# --- the comparison -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forgetting:
    """``table`` has a row for each of `KINDS`; ``verdict`` says in one sentence what it shows."""

    name: str
    table: pd.DataFrame
    verdict: str

    def to_markdown(self) -> str:
        """Return the section of the report."""
        lines = []
        for row in self.table.to_dict("records"):
            line = [str(row["variant"]), f"{row['loss']:.5f}"]
            for other in ("base", "unedited"):
                values = (row[f"from_{other}"], row[f"from_{other}_low"], row[f"from_{other}_high"])
                p = row[f"from_{other}_p"]
                line += [with_interval(*values, "+.5f"), p_value(p, is_floor=is_bootstrap_floor(p, _RESAMPLES))]
            lines.append(line)
        header = ["variant", "loss", "from no adapter", "p", "from unedited", "p"]
        n = int(self.table["n"].iloc[0])
        return "\n\n".join([
            f"## Forgetting: general text, {self.name}, {n} rows", self.verdict, markdown_table(header, lines),
            "Losses are nats a token, every token but a row's first; differences are paired by row, with a 95 % "
            "interval by bootstrap over rows (p: of no difference). Above 0 is worse.\n",
        ])  # fmt: skip


def compare_general(
    name: str, items: pd.DataFrame, names: dict[str, str], task_change: float, rng: np.random.Generator
) -> Forgetting:
    """Compare the losses of general text by the base model, the adapter and the edited adapter.

    Args:
        items: a row an item and variant, as `sparselora.spectral.verdict.compare` takes them.
        names: kind → variant, for each of `KINDS`.
        task_change: change of the task's loss by the edit, nats a label, for the verdict.
        rng: of the bootstrap.
    Raises:
        InputError: a loss that is not finite.
    """
    parts = {kind: items[items["variant"] == names[kind]].reset_index(drop=True) for kind in KINDS}
    tokens = parts["base"]["tokens"].to_numpy(dtype=float)
    losses = {kind: part["loss"].to_numpy(dtype=float) for kind, part in parts.items()}
    if not all(np.isfinite(values).all() for values in losses.values()):
        raise InputError("a loss of general text is not finite; evaluate in float32 or bfloat16")
    rows, gaps = [], {}
    for kind in KINDS:
        row: dict[str, Any] = {"variant": names[kind], "kind": kind, "n": len(tokens)}
        row["loss"] = losses[kind].sum() / tokens.sum()
        for other in ("base", "unedited"):
            gap = Bootstrap(len(tokens), *[float("nan")] * 4)
            if KINDS.index(kind) > KINDS.index(other):
                gap = paired_bootstrap(losses[kind] - losses[other], tokens, rng, draws=_RESAMPLES)
            gaps[kind, other] = gap
            row |= {f"from_{other}": gap.mean, f"from_{other}_low": gap.low, f"from_{other}_high": gap.high}
            row[f"from_{other}_p"] = gap.p
        rows.append(row)
    verdict = _verdict(gaps["unedited", "base"], gaps["edit", "unedited"], task_change)
    return Forgetting(name, pd.DataFrame(rows), verdict)


def _verdict(forgotten: Bootstrap, change: Bootstrap, task_change: float) -> str:
    before = f"{with_interval(forgotten.mean, forgotten.low, forgotten.high)} nats a token from the model without it"
    after = with_interval(change.mean, change.low, change.high)
    if not forgotten.low > 0:
        state = "is better" if forgotten.high < 0 else "shows no clear change"
        return (
            f"General text: the adapter forgets nothing that can be measured: it {state} there ({before}); the edit "
            f"changes that by {after}."
        )
    text = f"General text: the adapter forgets ({before}); the edit "
    if change.high < 0:
        share = -100 * change.mean / forgotten.mean
        text += f"gives back {share:.0f} % of it ({after})"
    elif change.low > 0:
        text += f"makes it worse ({after})"
    else:
        text += f"gives nothing back that can be measured ({after})"
    return f"{text}, and changes the task's loss by {task_change:+.4f} nats a label."
