"""The forgetting of general text: intervals and verdict against planted changes, and texts that are refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from sparselora.errors import InputError
from sparselora.spectral.forgetting import compare_general, load_general_text

NAMES = {"base": "no adapter", "unedited": "unedited", "edit": "gd"}


def compared(forgotten: float, change: float, seed: int = 0, noise: float = 0.05):
    """Rows whose loss a token the adapter raises by ``forgotten`` and the edit then changes by ``change``."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 40, 150)
    loss = rng.gamma(3, 1, 150)
    tables = []
    for kind, move in (("base", 0.0), ("unedited", forgotten), ("edit", change)):
        loss = loss + move + (0 if kind == "base" else noise * rng.standard_normal(150))
        tables.append(
            pd.DataFrame({"variant": NAMES[kind], "row": range(150), "loss": loss * tokens, "tokens": tokens})
        )
    items = pd.concat(tables[::-1], ignore_index=True)
    return items, compare_general("texts", items, NAMES, 0.0123, np.random.default_rng(1))


def test_losses_are_means_over_tokens_and_differences_are_paired_by_row():
    items, forgetting = compared(0.3, -0.1)
    table = forgetting.table.set_index("kind")
    sums = items.groupby("variant")[["loss", "tokens"]].sum()
    mean = sums["loss"] / sums["tokens"]
    assert list(table.index) == ["base", "unedited", "edit"]
    assert table["loss"].to_numpy() == pytest.approx(mean[[*NAMES.values()]].to_numpy())
    assert table.loc["unedited", "from_base"] == pytest.approx(mean["unedited"] - mean["no adapter"])
    assert table.loc["edit", "from_base"] == pytest.approx(mean["gd"] - mean["no adapter"])
    assert table.loc["edit", "from_unedited"] == pytest.approx(mean["gd"] - mean["unedited"])
    assert table.loc["base", ["from_base", "from_unedited"]].isna().all()
    # The noise of a pair, not that of the losses, is the width: 0.05 a row against a spread of 1.7.
    width = table.loc["unedited", "from_base_high"] - table.loc["unedited", "from_base_low"]
    assert 0.5 < width / (2 * 1.96 * 0.05 / np.sqrt(150)) < 2


@pytest.mark.parametrize(
    ("forgotten", "change", "sentence"),
    [
        (0.3, -0.15, "gives back 50 % of it"),
        (0.3, 0.1, "makes it worse"),
        (0.3, 0.0, "gives nothing back that can be measured"),
        (0.0, -0.1, "shows no clear change"),
        (-0.2, 0.0, "is better there"),
    ],
)
def test_the_verdict_says_what_was_planted(forgotten, change, sentence):
    _, forgetting = compared(forgotten, change, noise=0.02)
    # Without the noise of the draw, the planted share is exact to a few per cent.
    said = forgetting.verdict.replace("49 %", "50 %").replace("51 %", "50 %")
    assert sentence in said
    assert forgetting.verdict.count(".") >= 2
    page = forgetting.to_markdown()
    assert "nan" not in page
    assert forgetting.verdict in page


def test_an_edit_that_does_nothing_rarely_gives_back():
    words = ["nothing back" in compared(0.3, 0.0, seed)[1].verdict for seed in range(40)]
    assert sum(words) >= 34


def test_infinite_losses_are_refused():
    items, _ = compared(0.1, 0.1)
    items.loc[0, "loss"] = np.inf
    with pytest.raises(InputError, match="not finite"):
        compare_general("texts", items, NAMES, 0.0, np.random.default_rng(1))


def test_texts_are_drawn_alike_and_bad_files_are_refused(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(50)))
    first, second = (load_general_text(str(path), 10) for _ in range(2))
    assert first.frame.equals(second.frame)
    assert len(first.frame) == first.frame["row"].nunique() == 10
    assert first.frame["text"].tolist() == [f"text {row}" for row in first.frame["row"]]
    assert len(load_general_text(str(path), 0).frame) == 50
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(InputError, match=r"no column 'text' \(its columns are prompt"):
        load_general_text(str(other), 0)
    with pytest.raises(InputError, match="must be a file with a column 'text'"):
        load_general_text("wikitext", 0)
