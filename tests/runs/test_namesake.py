"""Another package of the same import name: said in one line where it shares our folder, and nothing otherwise."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from sparselora.namesake import DISTRIBUTION, mixed_installation
from tests.helpers.paths import ROOT


def install(site: Path, name: str, entry: str = "", *, listed: bool = True) -> importlib.metadata.Distribution:
    """Write the record of an installed distribution that says it has ``sparselora/__init__.py``."""
    folder = site / f"{name.replace('-', '_')}-1.2.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (folder / "RECORD").write_text("sparselora/__init__.py,,\n" if listed else "__editable__.pth,,\n")
    if entry:
        (folder / "entry_points.txt").write_text(f"[console_scripts]\nsparselora = {entry}\n")
    return importlib.metadata.Distribution.at(folder)


def test_only_another_package_in_our_folder_is_named(tmp_path: Path) -> None:
    ours = tmp_path / "a" / "sparselora"
    theirs = install(tmp_path / "a", "sparselora")
    line = mixed_installation(ours, [theirs])
    assert line is not None
    assert "sparselora 1.2" in line
    assert DISTRIBUTION in line
    assert "\n" not in line
    assert mixed_installation(tmp_path / "elsewhere" / "sparselora", [theirs]) is None
    assert mixed_installation(ours, [install(tmp_path / "b", "sparselora", listed=False)]) is None
    former = install(tmp_path / "c", "sparselora", "sparselora.__main__:console")
    assert mixed_installation(tmp_path / "c" / "sparselora", [former]) is None
    assert mixed_installation(ours, []) is None


@pytest.mark.parametrize("overwritten", [False, True], ids=["ours on top", "theirs on top"])
def test_the_command_ends_with_that_line(tmp_path: Path, overwritten: bool) -> None:
    shutil.copytree(ROOT / "sparselora", tmp_path / "sparselora", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "sparselora", "--version"]

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert call().returncode == 0  # the control
    install(tmp_path, "sparselora")
    if overwritten:
        (tmp_path / "sparselora" / "__init__.py").write_text("VERSION = 'theirs'\n")
    result = call()
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "another package of the same import name" in result.stderr


def test_the_distribution_has_every_folder_of_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["name"] == DISTRIBUTION
    folders = {path.parent for path in (ROOT / "sparselora").rglob("__init__.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(settings["tool"]["setuptools"]["packages"]) == names
    assert not [path for path in (ROOT / "sparselora").rglob("*") if path.suffix in {".json", ".txt", ".yaml"}]
