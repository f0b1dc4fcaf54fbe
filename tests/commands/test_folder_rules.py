"""What every command does with a folder that is not, or not only, its own: the fourth of README's rules.

The commands are those of the registry and the scripts beside it; one without an entry here fails. Each is run once, and
its folder is then copied, changed and given to the same call again: every such call must end with exit status 2 and one
line, and leave every file in and around the folder as it was.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparselora.__main__ import COMMANDS, main
from tests.helpers.tiny_llama import make_tiny_llama, write_instructions

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("toy_experiment", "inspect_svd_predictors", "prune_finetune_lora")

NO_FOLDER = {"smoke_test": "works in a temporary folder", "grid": "has the folders of the runs that it starts"}
CELLS = {"prune_finetune_lora"}
"""Commands whose runs are folders in --out_dir."""


def _write_adapter(llama: Path) -> None:
    """Write a fresh adapter of a language model to the folder ``adapter`` next to it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(llama.parent / "adapter")


def _flags(
    model: Path, rows: tuple[Path, Path], run: Path, sweep: Path, yaml: Path, llama: tuple[Path, Path]
) -> dict[str, list[str]]:
    """A small valid call of every command, without --out_dir."""
    data = ["--dataset", str(rows[0]), "--eval_file", str(rows[1])]
    short, adapter = ["--device", "cpu", "--max_length", "8"], str(run / "adapter")
    return {
        "toy_experiment": ["--n", "6", "--m", "5", "--ranks", "2", "--trials", "3"],
        "inspect_svd_predictors": ["--model", str(model), "--rank", "2", "--max_layers", "3", "--plots", "all"],
        "prune_finetune_lora": ["--model", str(model), *data, "--train_samples", "8", "--eval_samples", "4", "--lora_r",
                                "2", "--method", "no_prune", "--post_epochs", "0", *short],
        "rank": ["--adapter", adapter],
        "savings": ["--model", str(model), "--lora_r", "2"],
        "train": ["--model", str(model), *data, "--task", "classification", "--max_steps", "1", *short],
        "bench": ["--flops", "--model", str(model), "--sparsity", str(yaml), "--seq", "8"],
        "sensitivity": ["--model", str(model), *data, "--task", "classification", "--adapter", adapter, "--samples",
                        "4", "--held_out", "4", "--ffn_levels", "0.5", "--budget", "0.9", "--attention_levels", *short],
        "profile": ["--model", str(llama[0]), "--dataset", str(llama[1]), "--rows", "2", "--calibration_rows", "4",
                    "--ffn_levels", "0.5", "--attention_levels", "--svd_rank", "2", "--map_rank", "2", "--device",
                    "cpu"],
        "frontier": ["--model", str(llama[0]), "--task", "causal_lm", "--dataset", str(llama[1]), "--max_steps", "8",
                     "--lr", "2e-2", "--seeds", "1", "--budget", "1h", "--device", "cpu"],
        "eval": ["--model", str(model), "--adapter", adapter, "--task", "classification", *data, "--eval_samples",
                 "4", *short],
        "edit": ["--model", str(model), "--adapter", adapter, *data, "--target_modules", "all",
                 "--calib_samples", "2", *short],
        "reduce": ["--adapter", adapter, "--rank", "1"],
        "merge": ["--model", str(llama[0]), "--adapter", str(llama[0].parent / "adapter")],
        "compare": [str(sweep)],
    }  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A finished run of every command: its flags and its folder, which no test writes to."""

    flags: dict[str, list[str]]
    folders: dict[str, Path]

    def out_dir(self, command: str) -> Path:
        """What --out_dir was."""
        return self.folders[command].parent if command in CELLS else self.folders[command]


def call(command: str, *flags: str) -> int:
    try:
        if command in SCRIPTS:
            status: int = importlib.import_module(command).main(flags)
            return status
        return main([command, *flags])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def finished(
    tiny_bert: Path,
    word_files: tuple[Path, Path],
    trained_classifier: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    base = tmp_path_factory.mktemp("finished")
    yaml = base / "inputs" / "sparse.yaml"
    yaml.parent.mkdir()
    yaml.write_text("mode: svd\nffn_sparsity: 0.5\n")
    llama = make_tiny_llama(base / "inputs" / "llama"), write_instructions(base / "inputs" / "rows.jsonl", 40)
    _write_adapter(llama[0])
    # The sweep that is compared is a copy: else the folder of one command would change under another.
    flags = _flags(tiny_bert, word_files, trained_classifier, base / "inputs" / "sweep", yaml, llama)
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparselora.report.style.FigureCanvasAgg.draw", lambda canvas: canvas.get_renderer())
        for command, typed in flags.items():
            out = base / command
            assert call(command, *typed, "--out_dir", str(out)) == 0, command
            if command in CELLS:
                shutil.copytree(out, base / "inputs" / "sweep")
            folders[command] = next(out.glob("*/run.json")).parent if command in CELLS else out
    return Finished(flags, folders)


@dataclass
class Place:
    """A copy of the folder of a command's finished run, to be changed; ``check`` calls the command on it."""

    finished: Finished
    command: str
    root: Path
    capsys: pytest.CaptureFixture[str]

    def __post_init__(self) -> None:
        self.out_dir = self.root / "out"
        shutil.copytree(self.finished.out_dir(self.command), self.out_dir)
        self.folder = self.out_dir / self.finished.folders[self.command].name if self.is_cell else self.out_dir

    @property
    def is_cell(self) -> bool:
        return self.command in CELLS

    @property
    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "run.json").read_text()))

    def write_record(self, **changes: Any) -> None:
        (self.folder / "run.json").write_text(json.dumps(self.record | changes))

    def empty(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def refuses(self, *more: str, out_dir: str | Path | None = None, says: str = "") -> None:
        """Assert that the call ends with one line and status 2, with --overwrite too, and that no file changes."""
        before = tree(self.root)
        for flags in ((), ("--overwrite",)):
            self.capsys.readouterr()
            typed = [*self.finished.flags[self.command], "--out_dir", str(out_dir or self.out_dir), *more, *flags]
            status = call(self.command, *typed)
            error = self.capsys.readouterr().err
            assert tree(self.root) == before, (self.command, flags, error)
            assert (status, error.count("\n")) == (2, 1), (self.command, flags, error)
            assert says in error


def tree(folder: Path) -> dict[str, object]:
    """Every entry below ``folder``, with the content of a file and the target of a link."""
    entries = (Path(top) / name for top, folders, files in os.walk(folder) for name in (*folders, *files))
    return {
        entry.relative_to(folder).as_posix(): os.readlink(entry) if entry.is_symlink()
        else entry.read_bytes() if entry.is_file() else None
        for entry in entries
    }  # fmt: skip


@pytest.fixture(params=[*SCRIPTS, *(name for name in COMMANDS if name not in NO_FOLDER)])
def place(
    request: pytest.FixtureRequest, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Place:
    return Place(finished, request.param, tmp_path, capsys)


def test_every_command_has_an_entry():
    entries = _flags(Path(), (Path(), Path()), Path(), Path(), Path(), (Path(), Path()))
    scripts = {path.stem for path in ROOT.glob("*.py") if "run_script(" in path.read_text()}
    assert set(entries) | set(NO_FOLDER) == set(COMMANDS) | scripts
    assert scripts == set(SCRIPTS)


# --- finished runs ------------------------------------------------------------------------------------------------


def test_a_finished_run_is_skipped_and_one_with_other_arguments_refused(place):
    flags = [*place.finished.flags[place.command], "--out_dir", str(place.out_dir)]
    before = tree(place.root)
    assert call(place.command, *flags) == 0
    assert "already finished" in place.capsys.readouterr().out
    assert tree(place.root) == before
    place.write_record(fingerprint="0" * 12)
    before = tree(place.root)
    assert call(place.command, *flags) == 2
    error = place.capsys.readouterr().err
    assert "other arguments" in error
    assert error.count("\n") == 1
    assert tree(place.root) == before


def test_a_file_beside_the_outputs_outlives_overwrite(place):
    """The control of the refusals: where nothing is in the way, --overwrite runs and leaves what is not its own."""
    (place.folder / "mine.txt").write_text("mine")
    (place.folder / "below").mkdir()
    (place.folder / "below" / ".mine.csv.12.tmp").write_text("mine")
    if place.command in ("toy_experiment", "savings", "reduce", "rank", "bench"):  # the others take longer
        flags = [*place.finished.flags[place.command], "--out_dir", str(place.out_dir), "--overwrite"]
        assert call(place.command, *flags) == 0
        assert (
            place.record["started"]
            >= json.loads((place.finished.folders[place.command] / "run.json").read_text())["started"]
        )
    assert (
        (place.folder / "mine.txt").read_text() == (place.folder / "below" / ".mine.csv.12.tmp").read_text() == "mine"
    )


# --- folders of others --------------------------------------------------------------------------------------------


def test_a_folder_without_a_record(place):
    place.empty()
    (place.folder / "mine.txt").write_text("mine")
    before = tree(place.root)
    assert call(place.command, *place.finished.flags[place.command], "--out_dir", str(place.out_dir)) == 2
    assert "not empty" in place.capsys.readouterr().err
    assert tree(place.root) == before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", '{"name": "mine"}', '{"command": "COMMAND", "status": "success"}',
     '{"command": "COMMAND", "status": "done", "fingerprint": "0123456789ab"}',
     '{"command": ["COMMAND"], "status": "failed", "fingerprint": "0123456789ab"}',
     '{"command": "COMMAND", "status": "running", "fingerprint": 5, "outputs": ["mine.txt"]}',
     '{"command": "COMMAND", "status": "running", "fingerprint": "0123456789ab", "outputs": "mine.txt"}'],
)  # fmt: skip
def test_a_record_that_is_not_ours(place, content):
    outputs = place.record["outputs"]
    place.empty()
    (place.folder / "run.json").write_text(content.replace("COMMAND", _recorded(place)))
    for name in ("mine.txt", *outputs):
        (place.folder / name).parent.mkdir(exist_ok=True)
        (place.folder / name).write_text("mine")
    place.refuses(says="run.json")


def _recorded(place: Place) -> str:
    """The name that the command goes by in a record."""
    return str(json.loads((place.finished.folders[place.command] / "run.json").read_text())["command"])


@pytest.mark.parametrize("status", ["success", "failed", "running"])
def test_the_folder_of_another_command(place, status):
    commands = list(place.finished.folders)
    other = commands[(commands.index(place.command) + 1) % len(commands)]
    shutil.rmtree(place.folder)
    shutil.copytree(place.finished.folders[other], place.folder)
    place.write_record(status=status)
    place.refuses(says="holds a run of")


# --- what is in the way in a folder of ours -----------------------------------------------------------------------


def test_a_foreign_file_of_the_name_of_an_output(place):
    outputs = place.record["outputs"]
    assert outputs
    place.write_record(status="failed", outputs=[])
    record = (place.folder / "run.json").read_bytes()
    for name in outputs:
        place.empty()
        (place.folder / "run.json").write_bytes(record)
        (place.folder / name).parent.mkdir(exist_ok=True)
        (place.folder / name).write_text("mine")
        place.refuses(says=Path(name).name)


def test_a_link_or_folder_in_place_of_an_output(place):
    elsewhere = place.root / "elsewhere"
    place.write_record(status="failed")
    outputs = place.record["outputs"]
    for number, name in enumerate(outputs):
        target, kept = place.folder / name, place.root / f"kept{number}"
        target.rename(kept)
        target.symlink_to(kept)
        place.refuses(says=target.name)
        target.unlink()
        target.mkdir()
        place.refuses(says=target.name)
        target.rmdir()
        kept.rename(target)
    for name in {Path(output).parts[0] for output in outputs if "/" in output}:
        (place.folder / name).rename(elsewhere)
        (place.folder / name).symlink_to(elsewhere)
        place.refuses(says="link")
        (place.folder / name).unlink()
        elsewhere.rename(place.folder / name)


def test_an_input_that_is_or_lies_in_the_output_folder(place):
    inputs = [Path(word) for word in place.finished.flags[place.command] if os.path.isabs(word)]
    if not inputs:
        pytest.skip("reads no file")
    for number, source in enumerate(inputs):
        # Alone in the folder, and in that of a run that may be overwritten.
        for folder in (place.root / f"new{number}", place.out_dir):
            copy = folder / source.name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, _made(copy))
            flags = [str(copy) if word == str(source) else word for word in place.finished.flags[place.command]]
            changed = Finished({place.command: flags}, place.finished.folders)
            moved = Place.__new__(Place)
            moved.__dict__.update(vars(place) | {"finished": changed})
            moved.refuses(out_dir=folder, says="another")
            if source.is_dir():
                moved.refuses(out_dir=copy)
            (shutil.rmtree if source.is_dir() else os.remove)(copy)


def _made(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    return path


# --- places and seeds ---------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written(place):
    (place.root / "file").write_text("mine")
    for out_dir in (place.root / "file", place.root / "file" / "below", Path("/proc/nowhere/out"), Path("/dev/null")):
        place.refuses(out_dir=out_dir)


def test_a_folder_in_use(place):
    from filelock import FileLock

    place.write_record(status="failed")
    with FileLock(str(place.folder / ".lock")):
        place.refuses(says="in use by another process")


@pytest.mark.parametrize("seed", ["-1", str(2**32), str(2**64), "1e3"])
def test_a_seed_out_of_range(place, seed):
    if place.command in ("savings", "reduce"):
        pytest.skip("draws nothing")
    place.refuses("--seed", seed, says="seed")


def test_smoke_test_takes_the_same_seeds(capsys):
    assert call("smoke_test", "--seed", "-1") == 2
    assert "--seed must be a whole number from 0 to 4294967295, got -1" in capsys.readouterr().err


# --- single files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "flag"), [("compare", "--output"), ("eval", "--out_json")])
def test_the_file_of_a_copy(finished, tmp_path, capsys, command, flag):
    place = Place(finished, command, tmp_path, capsys)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "mine").write_text("mine")
    places = [tmp_path, tmp_path / "link", tmp_path / "mine" / "below", place.folder / "run.json", "/proc/nowhere/copy"]
    outputs = [place.folder / name for name in place.record["outputs"]]
    inputs = [word for word in finished.flags[command] if os.path.isabs(word) and Path(word).is_file()]
    for target in [*places, *outputs, *inputs]:
        place.refuses(flag, str(target), says=flag)
    before = tree(tmp_path)
    assert call(command, *finished.flags[command], "--out_dir", str(place.out_dir), flag, str(tmp_path / "mine")) == 2
    assert tree(tmp_path) == before
    new = tmp_path / "new" / "copy"
    for _ in range(2):
        assert call(command, *finished.flags[command], "--out_dir", str(place.out_dir), flag, str(new)) == 0
    assert new.read_bytes() in [path.read_bytes() for path in outputs]


@pytest.mark.parametrize("content", ["mine", "[]", "{}", '{"run_id": 5}', '{"run_id": "0123456789ab"}'])
def test_foreign_arguments_of_a_sweep(finished, tmp_path, capsys, content):
    place = Place(finished, "prune_finetune_lora", tmp_path, capsys)
    (place.out_dir / "run_args.json").write_text(content)
    place.refuses(says="run_args.json")


@pytest.mark.parametrize("spoil", ["folder", "link", "long row", "other columns"])
def test_a_table_of_a_sweep_that_is_not_ours(finished, tmp_path, capsys, spoil):
    place = Place(finished, "prune_finetune_lora", tmp_path, capsys)
    table = place.out_dir / "results.csv"
    text = table.read_text()
    table.unlink()
    spoilers: dict[str, Callable[[], object]] = {
        "folder": table.mkdir, "link": lambda: table.symlink_to(place.folder / "predictions.csv"),
        "long row": lambda: table.write_text(text + "x," + text.splitlines()[1] + "\n"),
        "other columns": lambda: table.write_text("a,b\n1,2\n"),
    }  # fmt: skip
    spoilers[spoil]()
    place.refuses(says="results.csv")


def _lines(grid: Path, flags: Sequence[str]) -> None:
    names = ("model", "adapter", "dataset", "eval_file")
    line = {name: flags[flags.index(f"--{name}") + 1] for name in names}
    more = {"target_modules": "all", "calib_samples": 2, "device": "cpu", "max_length": 8, "name": "first"}
    grid.write_text(json.dumps(line | more) + "\n")


def test_a_grid_in_a_place_that_is_not_its_own(finished, tmp_path, capsys):
    grid = tmp_path / "grid.jsonl"
    _lines(grid, finished.flags["edit"])
    (tmp_path / "file").write_text("mine")
    for name, make in {
        "log": lambda root: (root / "logs" / "first.log").write_text("mine"),
        "record": lambda root: (root / "first" / "run.json").write_text('{"name": "mine"}'),
        "other": lambda root: shutil.copy(finished.folders["toy_experiment"] / "run.json", root / "first"),
        "links": lambda root: ((root / "logs").rmdir(), (root / "logs").symlink_to(tmp_path / "elsewhere")),
    }.items():
        for below in ("logs", "first"):
            (tmp_path / name / below).mkdir(parents=True)
        make(tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    for root in ("log", "record", "other", "links", "file", "/proc/nowhere/runs"):
        before = {name: content for name, content in tree(tmp_path).items() if not name.endswith(".lock")}
        for more in ((), ("--overwrite",)):
            assert call("edit", "--grid", str(grid), "--run_root", str(tmp_path / root), *more) == 2, root
            assert capsys.readouterr().err.count("\n") == 1
            after = {name: content for name, content in tree(tmp_path).items() if not name.endswith(".lock")}
            assert after == before, root
