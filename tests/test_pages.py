"""The fenced `sh` and `python` blocks of README and docs run in order, a folder per page; what they write is in docs.

A block that cannot run here has the reason in an HTML comment on the line above it (`SKIP`). In the pages MODEL and
mine.jsonl stand for the reader's model and data; here they are a tiny Llama with random weights, and sums as text.

By default the sizes in the commands are those of `SMALL_SIZES`. Marked slow, the pages run at the sizes they print, and
no command may say that nothing was learned.
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

import pytest
from PIL import Image

from sparselora.report.style import WIDTH
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
python() { printf '%s\\0' "$#" "$@"; }
sparselora() { python -m sparselora "$@"; }
"""
"""A shell function in place of Python: the shell expands loops, variables and continued lines, and prints how many
arguments each call has, and the arguments, which may hold line breaks."""

RUN = ("sh", "python")
SHOWN = ("", "csv", "json", "yaml")
"""Languages of blocks that are run, and of those that are output or files; no others, such as bash."""

NOTHING_LEARNED = re.compile(r"^.*(?:at chance|nothing was learned).*$", re.IGNORECASE | re.MULTILINE)
"""A line that a command prints where training changed nothing that can be seen."""


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
            assert language in RUN + SHOWN, f"line {number + 1}: blocks of {language} are neither run nor shown"
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
    words, calls = iter(run.stdout.split("\0")[:-1]), []
    for count in words:
        calls.append([next(words) for _ in range(int(count))])
    return calls


def with_small_sizes(arguments: list[str]) -> list[str]:
    """``arguments`` with the values of `SMALL_SIZES`."""
    return [SMALL_SIZES.get(flag, value) for flag, value in zip(["", *arguments], arguments)]


def run_page(page: Path, folder: Path, is_small: bool) -> None:
    """Run the blocks of ``page`` in ``folder``. Each call of a command must end with status 0, and none may say that
    nothing was learned, unless the sizes are small."""
    names: dict[str, object] = {}
    if page.name == "README.md":  # the model, batches and optimizer that it takes as the reader's
        library = read_blocks((ROOT / "docs/library.md").read_text(encoding="utf-8"))
        exec(next(block for block in library if block.language == "python").text, names)
        exec("optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad])", names)
    for block in read_blocks(page.read_text(encoding="utf-8")):
        if block.skipped or block.language not in RUN:
            continue
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
            continue
        for arguments in expanded_calls(block):
            call = with_small_sizes(arguments) if is_small else arguments
            where = f"{page.name}, block of line {block.line}"
            printed = run_call(call, folder, where)
            if not is_small:
                check_that_something_was_learned(printed, where)


def check_that_something_was_learned(printed: str, where: str) -> None:
    """No line that a command ``printed`` warns of accuracy at chance or a loss that did not fall."""
    warnings = NOTHING_LEARNED.findall(printed)
    assert not warnings, f"{where}: {warnings}"


def run_call(arguments: list[str], folder: Path, where: str) -> str:
    """Run ``python *arguments`` in ``folder``, which must end with status 0, and return what it printed."""
    log = folder / "log.txt"
    process = processes.start(*arguments, log=log, folder=folder)
    process.join(1200)
    printed = log.read_text(encoding="utf-8")
    assert process.exitcode == 0, f"{where}: python {shlex.join(arguments)}\n{printed[-3000:]}"
    return printed


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
    sums = [{"prompt": f"What is {i} plus {j}?", "completion": str(i + j)} for i in range(35) for j in range(20)]
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


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_figures_are_as_wide_as_they_are_shown():
    """A README shows a picture at most 8 inches wide: a wider one is made smaller there, and its letters with it."""
    shown = 0
    for page in [*PAGES, *(ROOT / "results").rglob("README.md")]:
        for line in page.read_text(encoding="utf-8").splitlines():
            for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", line):
                assert line.startswith("!["), f"{page}: {target} shares its line, and so the width, with others"
                with Image.open(page.parent / target) as picture:
                    assert picture.width / picture.info["dpi"][0] == pytest.approx(WIDTH, rel=1e-3), target
                shown += 1
    assert shown > 10


def test_no_figure_has_letters_below_eight_points():
    sources = [*(ROOT / "sparselora" / "report").glob("*.py"), *(ROOT / "results").rglob("*.py")]
    sizes = [float(size) for path in sources for size in re.findall(r"(?:font|label)size=([\d.]+)", path.read_text())]
    assert len(sizes) > 20
    assert min(sizes) >= 8


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1800


def test_a_block_without_a_reason_is_not_skipped():
    page = "<!-- not run in a test: installs packages -->\n```sh\npip\n```\n\n```sh\npython a.py\n```\n"
    assert [block.skipped for block in read_blocks(page)] == ["installs packages", None]


def test_a_block_that_is_neither_run_nor_shown_is_seen():
    with pytest.raises(AssertionError, match="line 1: blocks of bash"):
        list(read_blocks("```bash\npython a.py\n```\n"))


def test_calls_are_those_of_the_shell():
    block = Block("sh", 'for x in 1 2; do\n  python a.py --x $x \\\n    --y "b\nc" ""\ndone', 1, None)
    assert expanded_calls(block) == [["a.py", "--x", "1", "--y", "b\nc", ""], ["a.py", "--x", "2", "--y", "b\nc", ""]]


def test_a_failing_call_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(AssertionError, match="trian"):
        run_call(["-m", "sparselora", "trian"], tmp_path, "a page")


@pytest.mark.parametrize(("lr", "passes"), [("1e-2", True), ("1e-12", False)])
def test_a_run_that_learned_nothing_fails(lr, passes, tiny_bert, word_files, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    data = ["--dataset", str(word_files[0]), "--eval_file", str(word_files[1]), "--task", "classification"]
    train = ["-m", "sparselora", "train", "--model", str(tiny_bert), *data, "--epochs", "6", "--device", "cpu"]
    printed = run_call([*train, "--lr", lr, "--out_dir", str(tmp_path / "run")], tmp_path, "a page")
    if passes:
        check_that_something_was_learned(printed, "a page")
        return
    with pytest.raises(AssertionError, match="is at chance"):
        check_that_something_was_learned(printed, "a page")


def test_a_column_that_no_page_names_is_seen(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,invented\n1,2,3\n")
    assert undocumented(tmp_path / "metrics.csv", documented_columns()) == ["invented"]
    (tmp_path / "unheard_of.csv").write_text("step\n1\n")
    assert undocumented(tmp_path / "unheard_of.csv", documented_columns()) == ["step"]
