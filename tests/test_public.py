"""Public names of the folders: importable in any order, and only loaded when used."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import sparselora.bench
import sparselora.config
import sparselora.contextual
import sparselora.data
import sparselora.evaluation
import sparselora.inspection
import sparselora.kernels
import sparselora.models
import sparselora.novelty
import sparselora.numerics
import sparselora.pruning
import sparselora.report
import sparselora.runs
import sparselora.spectral
import sparselora.token_gates
import sparselora.training
from sparselora.contextual.modes import MODES
from tests.helpers.paths import ROOT

PACKAGES = [
    sparselora.bench,
    sparselora.config,
    sparselora.contextual,
    sparselora.data,
    sparselora.evaluation,
    sparselora.inspection,
    sparselora.kernels,
    sparselora.models,
    sparselora.novelty,
    sparselora.numerics,
    sparselora.pruning,
    sparselora.report,
    sparselora.runs,
    sparselora.spectral,
    sparselora.token_gates,
    sparselora.training,
]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_every_public_name_is_there_and_is_no_module(package):
    assert dir(package) == sorted(package.__all__)
    for _ in range(2):  # once a module is loaded, it must not take the place of a name
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.__getattr__("nothing")


def test_the_page_on_the_library_names_them_all():
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        folder = package.__name__.removeprefix("sparselora.")
        row = next((line for line in text.splitlines() if line.startswith(f"| `{folder}` |")), text)
        assert set(package.__all__) <= set(re.findall(r"`(\w+)`", row)), folder


def test_modes_and_costs_need_no_torch():
    code = (
        f"import sys, {', '.join(package.__name__ for package in PACKAGES)};"
        "import sparselora.bench.payoff;"
        "import sparselora.contextual.flops;"
        "from sparselora.contextual.modes import MODES; print(*MODES); assert 'torch' not in sys.modules;"
        "from sparselora.contextual import sparsify; assert callable(sparsify) and 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(MODES)
