"""The page of a profile says what its controls showed, and no more."""

from __future__ import annotations

import pandas as pd
import pytest

from sparselora.report.profile import _prompt_lines


@pytest.mark.parametrize(
    ("increase", "sentence"),
    [
        (1.2, ": the task reads its context"),
        (0.8, ": FAILS: the task reads its context, but by less than 10 SE: measure more rows"),
        (0.15, ": FAILS: nothing shows that the task reads its context"),
        (-1.2, ": FAILS: nothing shows that the task reads its context"),
    ],
)
def test_a_prompts_cost_is_judged_by_its_standard_errors(increase, sentence):
    prompts = {"prompt": "shuffled", "rows": 12, "loss_increase": increase, "standard_error": 0.1}
    table = pd.DataFrame([prompts | {"percent": 40 * increase, "percent_error": 4.0}])
    (line,) = _prompt_lines(table)
    assert line.endswith(sentence)
