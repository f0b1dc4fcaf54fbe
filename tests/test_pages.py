"""The fenced `sh` and `python` blocks of README and docs run in order, a folder per page; what they write is in docs.

A block that cannot run here has the reason in an HTML comment on the line above it (`SKIP`). In the pages MODEL and
mine.jsonl stand for the reader's model and data; here they are a tiny Llama with random weights, and sums as text.

By default the sizes in the commands are those of `SMALL_SIZES`. Marked slow, the pages run at the sizes they print, and
no run of a classifier may end at chance.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd
import pytest

from tests.helpers import processes
from tests.helpers.byte_llama import byte_llama, byte_tokenizer
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = (
    "docs/data.md",
    "docs/glossary.md",
    "docs/library.md",
    "docs/matrices.md",
    "docs/studies.md",
    "docs/weights.md",
)
"""Pages that run in the default suite, at small sizes; the others are marked slow."""

SKIP = re.compile(r"<!-- not run in a test: (.+) -->")

SMALL_SIZES = {
    "--train_samples": "64", "--eval_samples": "24", "--max_samples": "24", "--max_length": "32",
    "--trials": "6", "--max_layers": "2", "--rounds": "1", "--seq": "16", "--calib_samples": "8",
}  # fmt: skip
"""Values that these flags have in the quick run, where a command gives them."""

EXPANDED = """
python() { printf '%q ' "$@"; printf '\\n'; }
sparselora() { python -m sparselora "$@"; }
"""
"""A shell function in place of Python: the shell expands loops, variables and continued lines, and prints each call."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, first line in the page, and why it is skipped (None: it runs)."""

    language: str
    text: str
    line: int
    skipped: str | None


def read_blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    lines = text.splitlines()
    start, language = None, ""
    for number, line in enumerate(lines):
        fence = re.fullmatch(r"```(\w*)", line)
        if fence is None:
            continue
        if start is None:
            start, language = number, fence.group(1)
            continue
        skip = SKIP.fullmatch(lines[start - 1]) if start else None
        yield Block(language, "\n".join(lines[start + 1 : number]), start + 2, skip.group(1) if skip else None)
        start = None
    assert start is None, f"the fence on line {start} is not closed"


def expanded_calls(block: Block) -> list[list[str]]:
    """The arguments of each call of Python in a block of shell, as the shell expands them."""
    run = subprocess.run(
        ["bash", "-euc", EXPANDED + block.text], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert run.returncode == 0, f"line {block.line}: {run.stderr}"
    return [shlex.split(line) for line in run.stdout.splitlines()]


def with_small_sizes(arguments: list[str]) -> list[str]:
    """``arguments`` with the values of `SMALL_SIZES`."""
    return [SMALL_SIZES.get(flag, value) for flag, value in zip(["", *arguments], arguments)]


def run_page(page: Path, folder: Path, is_small: bool) -> None:
    """Run the blocks of ``page`` in ``folder``; each call of a command must end with status 0."""
    names: dict[str, object] = {}
    if page.name == "README.md":  # the model, batches and optimizer that it takes as the reader's
        library = read_blocks((ROOT / "docs/library.md").read_text(encoding="utf-8"))
        exec(next(block for block in library if block.language == "python").text, names)
        exec("optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad])", names)
    for block in read_blocks(page.read_text(encoding="utf-8")):
        if block.skipped or block.language not in ("sh", "python"):
            continue
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
            continue
        for arguments in expanded_calls(block):
            call = with_small_sizes(arguments) if is_small else arguments
            run_call(call, folder, f"{page.name}, block of line {block.line}")


def run_call(arguments: list[str], folder: Path, where: str) -> None:
    """Run ``python *arguments`` in ``folder``; it must end with status 0."""
    log = folder / "log.txt"
    process = processes.start(*arguments, log=log, folder=folder)
    process.join(1200)
    assert process.exitcode == 0, f"{where}: python {shlex.join(arguments)}\n{log.read_text()[-3000:]}"


@pytest.fixture
def reader_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a reader's clone: the checkout's files, a model MODEL and data mine.jsonl."""
    for name in ("configs", "examples", "results", "benchmarks", *(path.name for path in ROOT.glob("*.py"))):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    grid = next(
        block for block in read_blocks((ROOT / "docs/grid.md").read_text(encoding="utf-8")) if block.language == "json"
    )
    (tmp_path / "grid.jsonl").write_text(grid.text + "\n")
    byte_llama().float().save_pretrained(tmp_path / "MODEL")
    byte_tokenizer().save_pretrained(tmp_path / "MODEL")
    sums = [{"prompt": f"What is {i} plus {j}?", "completion": str(i + j)} for i in range(20) for j in range(10)]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in sums))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


# --- columns ------------------------------------------------------------------------------------------------------


def documented_columns(pages: list[Path] = PAGES) -> list[tuple[str, set[str]]]:
    """File name patterns of every section on a CSV, each with the column patterns of its table."""
    sections = []
    for page in pages:
        for section in re.split(r"^#+ ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            heading, _, text = section.partition("\n")
            files = [name for name in re.findall(r"`([^`]+)`", heading) if name.endswith(".csv")]
            columns = {name.replace("…", "*") for name in re.findall(r"`([^`]+)`", text)}
            sections += [(name, columns) for name in files]
    return sections


def undocumented(path: Path, sections: list[tuple[str, set[str]]]) -> list[str]:
    """Columns of the CSV at ``path`` that no section on a file of its name lists."""
    with path.open(newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
    patterns = set().union(*(listed for name, listed in sections if fnmatchcase(path.name, name)))
    return [column for column in columns if not any(fnmatchcase(column, pattern) for pattern in patterns)]


def check_columns(folder: Path) -> None:
    sections = documented_columns()
    written = [path for path in sorted(folder.rglob("*.csv")) if not path.is_symlink() and "/results/" not in str(path)]
    missing = {str(path.relative_to(folder)): names for path in written if (names := undocumented(path, sections))}
    assert not missing


# --- chance -------------------------------------------------------------------------------------------------------

CHANCE = 0.2
"""Accuracy of guessing on `docstrings`: five classes of equal size."""


def check_that_classifiers_learned(folder: Path) -> None:
    """Every run on `docstrings` ends, and every warm-up of Phase C, well above chance: three standard errors."""
    for path in folder.rglob("summary.csv"):
        table = pd.read_csv(path)
        if "eval_accuracy" in table and table["dataset"][0] == "docstrings":
            assert table["eval_accuracy"][0] > CHANCE + 3 * (CHANCE * (1 - CHANCE) / table["eval_rows"][0]) ** 0.5, path
    for path in folder.rglob("results.csv"):
        table = pd.read_csv(path)
        assert (table["acc_before"] > CHANCE + 3 * (CHANCE * (1 - CHANCE) / table["eval_samples"]) ** 0.5).all(), path


# --- tests --------------------------------------------------------------------------------------------------------


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page", [page if _name(page) in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in PAGES], ids=_name
)
def test_blocks_run_in_order_in_one_folder(page, reader_folder, minilm):
    run_page(page, reader_folder, is_small=True)
    check_columns(reader_folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_run_as_printed_and_learn(page, reader_folder, minilm):
    run_page(page, reader_folder, is_small=False)
    check_that_classifiers_learned(reader_folder)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1800


def test_a_block_without_a_reason_is_not_skipped():
    page = "<!-- not run in a test: installs packages -->\n```sh\npip\n```\n\n```sh\npython a.py\n```\n"
    assert [block.skipped for block in read_blocks(page)] == ["installs packages", None]


def test_calls_are_those_of_the_shell():
    block = Block("sh", 'for x in 1 2; do\n  python a.py --x $x \\\n    --y "b c"\ndone', 1, None)
    assert expanded_calls(block) == [["a.py", "--x", "1", "--y", "b c"], ["a.py", "--x", "2", "--y", "b c"]]


def test_a_failing_call_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(AssertionError, match="trian"):
        run_call(["-m", "sparselora", "trian"], tmp_path, "a page")


def test_a_column_that_no_page_names_is_seen(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,invented\n1,2,3\n")
    assert undocumented(tmp_path / "metrics.csv", documented_columns()) == ["invented"]
    (tmp_path / "unheard_of.csv").write_text("step\n1\n")
    assert undocumented(tmp_path / "unheard_of.csv", documented_columns()) == ["step"]
