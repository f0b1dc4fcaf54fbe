"""Which trainer trains sparse in which setting: trains each on a tiny model, and writes the tables of docs/trainers.md.

python benchmarks/trainers.py              # prints them; three minutes on a CPU
python benchmarks/trainers.py --write      # puts them into docs/trainers.md

Every cell is a run: the largest difference of a weight of the adapter, after SGD, from a plain run whose hooks leave
out what the sparse pass leaves out. Needs the extra ``trainers``.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sparselora.config.sparsity import SparsityConfig  # noqa: E402
from tests.helpers.trainer_cases import (  # noqa: E402
    CASES,
    MODES,
    Case,
    config_of,
    difference,
    train,
    train_masked,
)

PAGE = ROOT / "docs" / "trainers.md"
BEGIN, END = "<!-- written by benchmarks/trainers.py -->", "<!-- end of what is written -->"
ORDERS = ("trainer", "before", "after")
LIMIT = 1e-5
"""Above it the two runs are different ones: float32 rounds to 6e-8, over two steps of SGD and weights of size 1."""
EACH_MODE = (
    ("Trainer", "label smoothing"), ("SFTTrainer", "completions"), ("DPOTrainer", "pairs"), ("GRPOTrainer", "sampling"),
)  # fmt: skip


def setting_row(case: Case) -> list[str]:
    """One row of the table of settings, mode static: ``case`` dense and sparse, each against its reference."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = train(case, None, "after", folder).weights
        dense = train(case, SparsityConfig(mode="dense"), "trainer", folder).weights
        sparse = train(case, config_of("static"), "trainer", folder)
        masked = train_masked(case, sparse.choices, folder).weights
    return [
        case.trainer,
        case.name,
        figure(difference(dense, plain)),
        figure(difference(sparse.weights, masked)),
        f"{difference(sparse.weights, plain):.0e}",
        "packed" if sparse.packed_passes else "block by block",
    ]


def mode_row(case: Case, mode: str) -> list[str]:
    """One row of the table of modes: one step of ``case``, sparsified in each order."""
    orders = [order for order in ORDERS if order == "trainer" or case.trainer != "Trainer"]  # without it no labels
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [train(case, config_of(mode), order, folder, max_steps=1) for order in orders]
        masked = train_masked(case, runs[0].choices, folder, max_steps=1)
    cells = [figure(difference(run.weights, masked.weights)) for run in runs]
    return [case.trainer, case.name, mode, *cells, *["refused by name"] * (len(ORDERS) - len(cells))]


def figure(value: float) -> str:
    """A difference; in bold where it is one."""
    return f"{value:.0e}" if value <= LIMIT else f"**{value:.0e}**"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quiet() -> None:
    """Keep the trainers' own output from the tables."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def tables() -> str:
    cases = [next(case for case in CASES if (case.trainer, case.name) == name) for name in EACH_MODE]
    with ProcessPoolExecutor(2, initializer=quiet) as pool:
        modes = [pool.submit(mode_row, case, mode) for case in cases for mode in MODES]
        settings = [pool.submit(setting_row, case) for case in CASES]
        by_setting, by_mode = ([row.result() for row in rows] for rows in (settings, modes))
    header = ["trainer", "setting", "dense − plain", "sparse − masked", "sparse − plain", "layers run"]
    orders = ["trainer", "setting", "mode", "`sparsify(trainer)`", "model, before the trainer", "model, after it"]
    return f"{table(header, by_setting)}\n\n{table(orders, by_mode)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/trainers.md")
    args = parser.parse_args()
    text = tables()
    if not args.write:
        print(text)
        return
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
