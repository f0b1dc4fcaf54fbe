"""`compare --study`: contrasts that were named before the runs, their verdicts, and what is said without them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sparselora.__main__ import main
from sparselora.compare import read_comparison
from sparselora.compare.contrasts import EQUIVALENT, UNDECIDED, contrast_table, verdict
from sparselora.compare.runs import PairedValues
from sparselora.config.contrasts import Contrast, Study, read_contrasts
from sparselora.errors import InputError
from tests.compare.test_compare import PLANTED, make_sweep
from tests.compare.test_compare_runs import Maker
from tests.compare.test_edit_tables import save_edit

SEEDS = range(6)


def contrast(first: str, second: str, endpoint: str, **settings: object) -> Contrast:
    return Contrast(first=first, second=second, endpoint=endpoint, **settings)


def study_file(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(text)
    return path


# --- the verdict --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p_values", "difference", "is_lower_better", "expected"),
    [
        ([0.01], -1.0, True, "better"),
        ([0.01], -1.0, False, "worse"),
        ([0.05], 1.0, True, "worse"),
        ([0.051], 1.0, True, "undecided"),
        ([math.nan], 1.0, True, "undecided"),
        ([0.01, 0.2], -1.0, True, "better"),
        ([0.01, 0.04], -1.0, True, "equivalent within 1 %"),
        ([0.9, 0.04], -1.0, True, "equivalent within 1 %"),
        ([0.9, 0.06], -1.0, True, "undecided"),
        ([math.nan, math.nan], 0.0, True, "undecided"),
    ],
)
def test_words_of_the_verdict(p_values: list[float], difference: float, is_lower_better: bool, expected: str) -> None:
    assert verdict(p_values, difference, is_lower_better, "1 %", 0.05) == expected


def test_the_table_is_scipys_tests_adjusted_over_the_family() -> None:
    rng = np.random.default_rng(0)
    sides = {name: rng.normal(2.0, 0.01, 8) + shift for name, shift in (("a", 0.0), ("b", 0.05), ("c", 0.001))}
    study = Study(
        contrasts=(
            contrast("b", "a", "loss"),
            contrast("c", "a", "loss", margin="2 %"),
            contrast("c", "b", "loss", margin=0.5),
        ),
        family=4,
    )
    table = contrast_table(study, lambda c: PairedValues(sides[c.first], sides[c.second], "seed", True))
    p = [stats.ttest_rel(sides[c.first], sides[c.second]).pvalue for c in study.contrasts]
    assert table["t_p"].tolist() == pytest.approx(p)
    upper = stats.ttest_1samp(sides["c"] - 1.02 * sides["a"], 0, alternative="less").pvalue
    lower = stats.ttest_1samp(sides["c"] - 0.98 * sides["a"], 0, alternative="greater").pvalue
    assert table.loc[1, "equivalence_p"] == pytest.approx(max(upper, lower))
    assert math.isnan(table.loc[0, "equivalence_p"])
    smallest = min([*p, *table["equivalence_p"].dropna()])
    adjusted = table[["t_p_adjusted", "equivalence_p_adjusted"]].to_numpy()
    assert np.nanmin(adjusted) == pytest.approx(4 * smallest)
    assert table["verdict"].tolist() == ["worse", f"{EQUIVALENT} 2 %", f"{EQUIVALENT} 0.5"]


# --- the file -----------------------------------------------------------------------------------------------------


def test_a_study_is_read_with_its_hash(tmp_path: Path) -> None:
    path = study_file(
        tmp_path,
        "alpha: 0.01\nfamily: 3\ncontrasts:\n"
        "  - {first: a, second: b, endpoint: loss}\n"
        "  - {first: a, second: c, endpoint: loss, margin: 1.5 %, where: {lora_r: 8}}\n",
    )
    study = read_contrasts(path)
    assert (study.alpha, study.family, study.name) == (0.01, 3, "study.yaml")
    assert study.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert study.contrasts[1].margin_size == pytest.approx(0.015)
    assert study.contrasts[1].settings == {"lora_r": "8"}
    assert (study.contrasts[1].margin_text, study.contrasts[0].margin_text) == ("1.5 %", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("contrasts: []", "names at least one contrast"),
        ("contrasts: 3", "contrasts must be a list"),
        ("alpha: 0.05", "names at least one contrast"),
        ("alfa: 0.05\ncontrasts: [{first: a, second: b, endpoint: loss}]", "unknown key 'alfa' .* 'alpha'"),
        ("name: x\ncontrasts: [{first: a, second: b, endpoint: loss}]", "unknown key 'name'"),
        ("alpha: 1.5\ncontrasts: [{first: a, second: b, endpoint: loss}]", "alpha must be"),
        ("family: 1\ncontrasts: [{first: a, second: b, endpoint: x}, {first: a, second: c, endpoint: x}]", "family"),
        ("contrasts: [{first: a, second: b}]", "contrast 1: endpoint must be a text"),
        ("contrasts: [{first: a, second: a, endpoint: x}]", "compares two things"),
        ("contrasts: [{first: a, second: b, endpoint: x, margin: 0}]", "margin must be a positive number"),
        ("contrasts: [{first: a, second: b, endpoint: x, margin: 1 pp}]", "margin must be a positive number"),
        ("contrasts: [{first: a, second: b, endpoint: x, margin: 100 %}]", "margin must be a positive number"),
        ("contrasts: [{first: a, second: b, endpoint: x, margin: true}]", "margin must be a positive number"),
        ("contrasts: [{first: a, second: b, endpoint: x, where: 3}]", "where must be a mapping"),
        ("contrasts: [{first: a, second: b, endpoint: x}, {first: a, second: b, endpoint: x}]", "is there twice"),
        ("contrasts: [{first: a, segond: b, endpoint: x}]", "did you mean 'second'"),
    ],
)
def test_a_bad_study_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_contrasts(study_file(tmp_path, text))
    assert "study.yaml" in str(error.value)
    assert "\n" not in str(error.value)


# --- runs of train ------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make = Maker(tmp_path / "runs", "causal_lm")
    for seed in SEEDS:
        make(f"plain_s{seed}", seed, lora_r=16)
        make(f"same_s{seed}", seed, lora_r=8)
        make(f"bad_s{seed}", seed, 0.05, lora_r=4)
    return tmp_path / "runs"


TRAINING = """\
contrasts:
  - {first: bad, second: plain, endpoint: loss, margin: 0.5 %}
  - {first: same, second: plain, endpoint: loss, margin: 0.5 %}
"""


def test_arms_are_named_by_their_folders(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = study_file(tmp_path, TRAINING)
    out = tmp_path / "out"
    assert main(["compare", str(runs), "--study", str(path), "--out_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    table = pd.read_csv(out / "contrasts.csv")
    assert table["verdict"].tolist() == ["worse", "equivalent within 0.5 %"]
    assert table["n"].tolist() == [6, 6]
    pairs = [
        [pd.read_csv(runs / f"{arm}_s{s}" / "summary.csv")["eval_loss"][0] for s in SEEDS] for arm in ("bad", "plain")
    ]
    assert table.loc[0, "t_p"] == pytest.approx(stats.ttest_rel(*pairs).pvalue)
    assert table.loc[0, "difference"] == pytest.approx(np.mean(pairs[0]) - np.mean(pairs[1]))
    page = (out / "compare.md").read_text()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert f"study.yaml (sha256 {digest})" in page
    assert page.index("## Primary contrasts") < page.index("not named before the runs") < page.index("Evaluation loss")
    assert "**worse**" in printed
    record = json.loads((out / "run.json").read_text())
    assert record["arguments"]["study"] == {"name": "study.yaml", "sha256": digest}
    assert "contrasts.csv" in record["outputs"]
    # Another study is another comparison.
    path.write_text(TRAINING + "alpha: 0.01\n")
    assert main(["compare", str(runs), "--study", str(path), "--out_dir", str(out)]) == 2


def test_without_a_study_all_is_exploratory(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs)]) == 0
    assert "**Exploratory**" in capsys.readouterr().out
    page = (runs.parent / "compare" / "compare.md").read_text()
    assert "**Exploratory**" in page
    for word in ("better", "worse", "equivalent within"):
        assert f"**{word}" not in page
    assert not (runs.parent / "compare" / "contrasts.csv").exists()


@pytest.mark.parametrize(
    ("contrast", "message"),
    [
        ("{first: plane, second: bad, endpoint: loss}", "no configuration or arm 'plane'; did you mean 'plain'"),
        ("{first: plain, second: bad, endpoint: los}", "no endpoint 'los'; did you mean 'loss'"),
        ("{first: plain, second: bad, endpoint: loss, where: {lora_r: 8}}", "leave out where"),
    ],
)
def test_what_the_runs_lack_is_refused_before_a_folder_is_claimed(
    runs: Path, tmp_path: Path, contrast: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study_file(tmp_path, f"contrasts:\n  - {contrast}\n")
    assert main(["compare", str(runs), "--study", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (runs.parent / "compare").exists()


def test_an_arm_of_two_configurations_is_refused(tmp_path: Path) -> None:
    make = Maker(tmp_path / "runs", "causal_lm")
    for seed in range(2):
        make(f"plain_s{seed}", seed)
        make(f"mixed_s{seed}", seed, lora_r=4 + seed)
    study = Study(contrasts=(contrast("mixed", "plain", "loss"),))
    with pytest.raises(InputError, match="named mixed differ in more than the seed"):
        read_comparison([tmp_path / "runs"], None, study)


# --- other kinds of runs ------------------------------------------------------------------------------------------


def test_cells_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = make_sweep(tmp_path / "sweep", PLANTED, seeds=range(8))
    path = study_file(
        tmp_path,
        "contrasts:\n  - {first: random@0.25, second: no_prune, endpoint: right_after}\n"
        "  - {first: random@0.25, second: channel_energy@0.5, endpoint: after, margin: 0.5, where: {lora_r: 8}}\n",
    )
    assert main(["compare", str(tmp_path / "sweep"), "--study", str(path)]) == 0
    table = pd.read_csv(tmp_path / "sweep" / "compare" / "contrasts.csv")
    pick = cells.set_index(["method", "keep_ratio", "seed"])["acc_right_after"].sort_index()
    wanted = stats.ttest_rel(pick["random", 0.25], pick["no_prune", 1.0])
    assert table.loc[0, "t_p"] == pytest.approx(wanted.pvalue)
    assert table["verdict"].tolist() == ["worse", "equivalent within 0.5"]
    assert table.loc[1, "where"] == "lora_r 8"
    capsys.readouterr()
    for change, message in (("no_prune", "no_prun"), ("right_after", "before"), ("lora_r: 8", "lora_r: 9")):
        path.write_text(path.read_text().replace(change, message))
        assert main(["compare", str(tmp_path / "sweep"), "--study", str(path), "--out_dir", str(tmp_path / "x")]) == 2
        assert "contrast random@0.25 against" in capsys.readouterr().err


def test_edits_are_compared_over_adapters(tmp_path: Path) -> None:
    changes = {"abs_select": [-0.02, -0.04, -0.03, -0.025], "gd": [0.01, 0.03, 0.05, -0.01]}
    for mode, values in changes.items():
        for number, change in enumerate(values):
            for seed in range(2):
                save_edit(tmp_path / f"{mode}{number}{seed}", mode, seed, change + (seed - 0.5) * 0.002, f"a{number}")
    pairs = (("abs_select", "unedited"), ("gd", "null"), ("abs_select", "gd"))
    contrasts = tuple(contrast(first, second, "loss") for first, second in pairs)
    table = read_comparison([tmp_path], None, Study(contrasts=contrasts)).table
    assert table is not None
    assert table["unit"].tolist() == ["adapter"] * 3
    assert table["n"].tolist() == [4] * 3
    first, second = np.array(changes["abs_select"]), np.array(changes["gd"])
    assert table["difference"].tolist() == pytest.approx(
        [first.mean(), (second - 0.01).mean(), (first - second).mean()]
    )
    assert table["t_p"].tolist() == pytest.approx(
        [
            stats.ttest_1samp(first, 0).pvalue,
            stats.ttest_1samp(second, 0.01).pvalue,
            stats.ttest_rel(first, second).pvalue,
        ]
    )
    assert table["verdict"].tolist()[0] == "better"
    for wrong in (contrast("abs", "gd", "loss"), contrast("gd", "nil", "loss"), contrast("gd", "null", "accuracy")):
        with pytest.raises(InputError, match="contrast"):
            read_comparison([tmp_path], None, Study(contrasts=(wrong,)))
    with pytest.raises(InputError, match="where must name one study"):
        read_comparison([tmp_path], None, Study(contrasts=(contrast("gd", "null", "loss", where={"study": "x"}),)))


def test_an_edit_is_compared_with_sgd_on_its_rows_and_with_the_oracle(tmp_path: Path) -> None:
    changes = [-0.02, -0.04, -0.03, -0.025]
    rivals = [{"SGD, 1 step": ("sgd", -0.01 * i), "SGD, 5 steps": ("sgd", -0.03), "bound": ("oracle", -0.05 - 0.01 * i)}
              for i in range(4)]  # fmt: skip
    for i, change in enumerate(changes):
        save_edit(tmp_path / f"gd{i}", "gd", 0, change, f"a{i}", rivals[i])
    contrasts = tuple(contrast("gd", second, "loss") for second in ("sgd_1", "sgd_5", "oracle"))
    table = read_comparison([tmp_path], None, Study(contrasts=contrasts)).table
    assert table is not None
    wanted = [
        [change - rivals[i][name][1] for i, change in enumerate(changes)]
        for name in ("SGD, 1 step", "SGD, 5 steps", "bound")
    ]
    assert table["difference"].tolist() == pytest.approx([np.mean(differences) for differences in wanted])
    assert table["t_p"].tolist() == pytest.approx([stats.ttest_1samp(d, 0).pvalue for d in wanted])
    with pytest.raises(InputError, match="sgd_3"):
        read_comparison([tmp_path], None, Study(contrasts=(contrast("gd", "sgd_3", "loss"),)))


# --- by simulation ------------------------------------------------------------------------------------------------

TABLES = [pytest.param(150, id="quick"), pytest.param(4000, id="slow", marks=pytest.mark.slow)]
MARGIN = 0.01


def _simulate(rng: np.random.Generator, n: int, truths: list[float]) -> pd.DataFrame:
    """A study of n seeds, a contrast per truth, all against one baseline whose runs vary as much as theirs."""
    sides = {f"arm {i}": 2 + truth + rng.normal(0, 0.004, n) for i, truth in enumerate(truths)}
    sides["baseline"] = 2 + rng.normal(0, 0.004, n)
    study = Study(
        contrasts=tuple(contrast(arm, "baseline", "loss", margin=MARGIN) for arm in sides if arm != "baseline")
    )
    return contrast_table(study, lambda c: PairedValues(sides[c.first], sides[c.second], "seed", True))


def _is_false(truth: float, word: str) -> bool:
    is_equivalent = word.startswith(EQUIVALENT)
    return (is_equivalent and abs(truth) >= MARGIN) or (word in ("better", "worse") and truth == 0)


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("truths", [[0.0] * 5, [0.0, 0.0, MARGIN, -MARGIN, MARGIN]], ids=["null", "at the margin"])
def test_false_verdicts_of_a_study_are_at_most_five_in_a_hundred(tables: int, n: int, truths: list[float]) -> None:
    rng = np.random.default_rng(n)
    false = 0
    for _ in range(tables):
        words = _simulate(rng, n, truths)["verdict"]
        false += any(_is_false(truth, word) for truth, word in zip(truths, words, strict=True))
    assert false / tables <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / tables)


def _null_rows(rng: np.random.Generator, arms: int, rows: int = 200) -> list[np.ndarray]:
    """Differences by row, summed over three seeds, of arms that are all the same method. As on GSM8K with the small
    decoder, runs differ between seeds by about five times what their rows' noise alone would give."""

    def run() -> np.ndarray:
        return rng.normal(0, 0.012, rows) + rng.normal(0, 0.004)  # noise of its rows, luck of its seed

    baseline = [run() for _ in range(3)]
    return [sum(run() - other for other in baseline) for _ in range(arms)]


@pytest.mark.parametrize("tables", [pytest.param(15, id="quick"), pytest.param(400, id="slow", marks=pytest.mark.slow)])
def test_the_former_rule_over_rows_gave_false_verdicts_in_most_null_tables(tables: int) -> None:
    """The control of the test above: Holm over bootstrap tests on rows, "better" where one is below 0.05."""
    from sparselora.numerics.stats import holm, paired_bootstrap

    rng = np.random.default_rng(0)
    false = 0
    for _ in range(tables):
        found = [paired_bootstrap(sums, np.full(200, 3), rng, draws=2000) for sums in _null_rows(rng, 10)]
        adjusted = holm([row.p for row in found])
        false += any(p < 0.05 and row.mean < 0 for p, row in zip(adjusted, found, strict=True))
    assert false / tables > 0.6


@pytest.mark.parametrize("tables", TABLES)
def test_eight_seeds_find_a_difference_of_one_and_a_fifth_standard_deviations(tables: int) -> None:
    rng = np.random.default_rng(1)
    words = []
    for _ in range(tables):
        d = rng.normal(1.2, 1.0, 8)
        study = Study(contrasts=(contrast("a", "b", "loss"),))
        words.append(contrast_table(study, lambda _, d=d: PairedValues(d, np.zeros(8), "seed", False))["verdict"][0])
    share = words.count("better") / tables
    assert 0.8 - 4 * math.sqrt(0.16 / tables) < share < 0.9
    assert words.count("better") + words.count(UNDECIDED) == tables


@pytest.mark.parametrize("tables", TABLES)
def test_intervals_of_contrasts_cover(tables: int) -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(tables):
        row = _simulate(rng, 5, [0.02]).iloc[0]
        covered += row["ci_low"] <= 0.02 <= row["ci_high"]
    assert abs(covered / tables - 0.95) < 4 * math.sqrt(0.95 * 0.05 / tables)
