"""Public names of the folders: importable in any order, and only loaded when used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sparselora.contextual
import sparselora.data
import sparselora.evaluation
import sparselora.models
import sparselora.token_gates
from sparselora.contextual.modes import MODES

PACKAGES = [
    sparselora.contextual, sparselora.data, sparselora.evaluation, sparselora.models, sparselora.token_gates
]  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_every_public_name_is_there_and_is_no_module(package):
    assert dir(package) == sorted(package.__all__)
    for _ in range(2):  # once a module is loaded, it must not take the place of a name
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.__getattr__("nothing")


def test_modes_and_costs_need_no_torch():
    code = (
        "import sys, sparselora.contextual, sparselora.token_gates;"
        "import sparselora.data, sparselora.models, sparselora.evaluation;"
        "import sparselora.bench.payoff;"
        "import sparselora.contextual.flops;"
        "from sparselora.contextual.modes import MODES; print(*MODES); assert 'torch' not in sys.modules;"
        "from sparselora.contextual import sparsify; assert callable(sparsify) and 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(MODES)
