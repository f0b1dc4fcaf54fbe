"""Who imports whom, read from the source: nothing points back up, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sparselora"

LAYERS = [
    {"__init__"},
    {"errors", "kernels._dispatch"},
    {"files", "process"},
    {"settings", "provenance"},
    {"cli", "channels", "reconstruction", "matrices", "spectra", "stats", "costs", "records", "workers", "markdown"},
    {"kernels.*", "predictors", "sweep", "run_tables", "figures", "weights", "gate_config",
     "token_gate_config", "spectral.edit", "spectral.factors", "spectral.report", "spectral.grid",
     "spectral.over_adapters", "four_bit"},
    {"model_names"},
    {"classes"},
    {"kernels.scores", "config", "checkpoints", "adapters", "tables", "tokens", "layer_tables",
     "spectral.grid_run", "spectral.edit_runs"},
    {"figures.*", "lora", "module_names", "models", "data", "flags", "flops", "model_configs", "gate_tables",
     "token_gate_flags", "spectral.edit_prediction"},
    {"training", "contextual.layout", "contextual.cache", "contextual.selection",
     "contextual.gate_scores", "gate_report", "spectral.adapter", "spectral.sensitivity", "spectral.edit_tables",
     "spectral.edit_comparison"},
    {"contextual.proof"},
    {"contextual.structure"},
    {"contextual.module_gate", "contextual.estimator", "contextual.frozen", "contextual.graphs", "novelty.sketch",
     "spectral.editing"},
    {"contextual.linears", "contextual.token_gate", "novelty.gate", "spectral.variants"},
    {"contextual.surrogate", "novelty.trainer", "token_gate_outputs"},
    {"contextual.plan", "novelty"},
    {"contextual.calibration", "contextual.modules", "contextual.decoder"},
    {"contextual.schedule"},
    {"contextual.sensitivity", "pruning", "instructions", "step_meter", "bench.payoff", "bench.setup"},
    {"batches", "run_data", "prune_cells", "bench.timing", "bench.estimator_check"},
    {"finetuning", "spectral.evaluate"},
    {"spectral.calibration", "spectral.gsm8k"},
    {"commands.*"},
    {"__main__"},
]  # fmt: skip
"""From the bottom up. A module imports from lower lines only, never from its own: equals do not know one another.

``figures.*`` are the modules of a package. A package that is not named by itself is a docstring.
"""

STANDARD = frozenset(sys.stdlib_module_names)
NUMERIC = frozenset({"numpy", "scipy"})
ALLOWED: dict[str, frozenset[str]] = {
    "__init__": frozenset(),
    "errors": frozenset(),
    "files": frozenset(),
    "cli": frozenset(),
    "costs": frozenset(),
    "__main__": frozenset(),
    "channels": NUMERIC,
    "reconstruction": NUMERIC,
    "matrices": NUMERIC,
    "spectra": NUMERIC | {"threadpoolctl"},
    "stats": NUMERIC,
    "predictors": NUMERIC,
    "kernels": frozenset({"torch", "triton"}),
    "settings": frozenset({"yaml"}),
    "config": frozenset(),
    "gate_config": frozenset(),
    "token_gate_config": frozenset(),
    "token_gate_flags": frozenset(),
    "novelty": frozenset({"numpy", "torch", "transformers", "pandas"}),
    "spectral.edit": NUMERIC,
    "spectral.factors": frozenset({"torch"}),
    "spectral.adapter": frozenset({"torch", "safetensors"}),
    "spectral.sensitivity": frozenset({"torch", "peft", "pandas"}),
    "spectral.report": NUMERIC | {"pandas"},
    "spectral.editing": NUMERIC | {"pandas", "torch"},
    "spectral.variants": frozenset({"pandas", "torch"}),
    "spectral.grid": frozenset(),
    "spectral.edit_runs": frozenset({"pandas"}),
    "spectral.over_adapters": frozenset({"numpy", "pandas"}),
    "spectral.edit_prediction": frozenset({"numpy", "pandas"}),
    "spectral.edit_tables": frozenset({"numpy", "pandas"}),
    "spectral.edit_comparison": frozenset({"numpy", "pandas"}),
    "spectral.grid_run": frozenset({"filelock", "huggingface_hub"}),
    "flags": frozenset(),
    "flops": frozenset(),
    "model_configs": frozenset({"huggingface_hub"}),
    "records": frozenset({"pandas", "filelock"}),
    "run_tables": frozenset({"numpy", "pandas"}),
    "gate_tables": frozenset({"numpy", "pandas"}),
    "gate_report": frozenset({"pandas"}),
    "markdown": frozenset(),
    "sweep": frozenset({"numpy", "pandas"}),
    "layer_tables": frozenset({"numpy", "pandas"}),
    "figures": frozenset({"numpy", "pandas", "matplotlib", "PIL"}),
    "weights": frozenset({"numpy", "huggingface_hub"}),
    "module_names": frozenset({"torch", "transformers"}),
    "adapters": frozenset({"numpy", "safetensors", "huggingface_hub", "torch"}),
    "contextual": frozenset({"numpy", "torch", "transformers", "peft", "safetensors", "bitsandbytes"}),
    "instructions": frozenset({"numpy", "pandas", "datasets"}),
    "spectral.evaluate": NUMERIC | {"pandas", "torch", "transformers", "peft", "vllm"},
    "bench.payoff": NUMERIC,
    "bench.setup": frozenset(),
    "model_names": frozenset(),
    "checkpoints": frozenset(),
    "four_bit": frozenset({"torch", "bitsandbytes"}),
}
"""What a module may import from outside, anywhere in it. Modules that are not named here may import anything."""

LIGHT = {
    "adapters": {"torch", "huggingface_hub"},
    "weights": {"huggingface_hub"},
    "model_configs": {"huggingface_hub"},
    "module_names": {"torch", "transformers"},
    "instructions": {"datasets"},
    "contextual": {"bitsandbytes"},
    "spectral.evaluate": {"vllm"},
    "spectral.grid_run": {"huggingface_hub"},
}
"""Of `ALLOWED`, what must be imported inside a function: these modules are loaded where it is not wanted or not there.
"""

WRITERS = {
    "records", "figures", "adapters", "contextual.cache", "contextual.token_gate", "checkpoints", "finetuning",
    "novelty.trainer", "spectral.grid_run", "commands.smoke_test",
}  # fmt: skip
"""The modules that may write files: `adapters` an adapter in PEFT's format, `contextual.cache`
factors and statistics in the user's cache, `contextual.token_gate` gates beside an adapter, `checkpoints` and
`finetuning` those of a run, `novelty.trainer` the gate's log and its state in them, `spectral.grid_run` a log of each
process, `commands.smoke_test` an adapter in a folder that is gone when it ends."""


@functools.cache
def _sources() -> dict[str, ast.Module]:
    """Dotted module name inside the package (``figures.toy``) → its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def _imports(tree: ast.AST) -> Iterator[str]:
    """What a syntax tree imports, at any depth: ``from a.b import c`` gives ``a.b`` and, module or not, ``a.b.c``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _top_level(tree: ast.Module) -> ast.Module:
    """The part of a module that runs when it is imported: without function bodies and ``if TYPE_CHECKING``."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def _within(module: str, names: Collection[str]) -> bool:
    """Whether ``names`` has the module or a package that it is in."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


def _layer(module: str) -> int:
    keys = {module, f"{module.split('.')[0]}.*"} if "." in module else {module}
    named = [i for i, names in enumerate(LAYERS) if module in names]
    found = named or [i for i, names in enumerate(LAYERS) if keys & names]
    assert len(found) == 1, f"{module} has no line, or several"
    return found[0]


def _is_plain_package(module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in set().union(*LAYERS)) and module not in set().union(*LAYERS)


def _own(tree: ast.AST) -> set[str]:
    """Modules of the package that a tree imports, by their names in it; ``__init__`` for the package itself."""
    known = _sources().keys()
    found = set()
    for name in _imports(tree):
        parts = name.split(".")
        if parts[0] != "sparselora" or len(parts) == 1:
            continue
        while parts[1:] and ".".join(parts[1:]) not in known:
            parts.pop()  # `from sparselora.stats import holm` names no module `stats.holm`.
        found.add(".".join(parts[1:]) or "__init__")
    return {name for name in found if not _is_plain_package(name)}


def _outside(tree: ast.AST) -> set[str]:
    tops = {name.split(".")[0] for name in _imports(tree)}
    return tops - STANDARD - {"sparselora"}


def test_every_module_has_its_layer():
    names = [name for line in LAYERS for name in line]
    assert len(names) == len(set(names))
    for module, tree in _sources().items():
        if _is_plain_package(module):
            assert [type(node) for node in tree.body] == [ast.Expr], f"{module} is more than a docstring"
        else:
            _layer(module)
    for name in names:
        assert any(name in {module, f"{module.split('.')[0]}.*"} for module in _sources()), f"there is no {name}"


@pytest.mark.parametrize("module", _sources())
def test_nothing_points_back_up(module):
    if not _is_plain_package(module):
        above = {other for other in _own(_sources()[module]) if _layer(other) >= _layer(module)}
        assert not above


def test_kernels_know_nothing_of_the_package():
    for module, tree in _sources().items():
        if _within(module, {"kernels"}):
            assert all(_within(other, {"kernels"}) for other in _own(tree)), module


@pytest.mark.parametrize("module", ALLOWED)
def test_modules_import_from_outside_only_what_they_may(module):
    for name, tree in _sources().items():
        if _within(name, {module}):
            assert _outside(tree) <= ALLOWED[module], name
            assert not _outside(_top_level(tree)) & LIGHT.get(module, set()), name


def test_commands_and_main_load_nothing_heavy_by_themselves():
    heavy = {"torch", "transformers", "peft", "datasets", "matplotlib", "safetensors", "huggingface_hub"}
    heavy_modules = {
        "figures", "lora", "models", "data", "training", "pruning", "contextual", "kernels", "instructions", "batches",
        "step_meter", "finetuning", "spectral.evaluate", "spectral.factors", "spectral.adapter",
        "spectral.sensitivity", "spectral.editing", "spectral.variants", "spectral.calibration", "spectral.gsm8k",
        "bench.timing", "bench.estimator_check",
    }  # fmt: skip
    for name, tree in _sources().items():
        if name.split(".")[0] in {"commands", "__main__"}:
            assert not _outside(_top_level(tree)) & heavy, name
            assert not [own for own in _own(_top_level(tree)) if _within(own, heavy_modules)], name


def test_scripts_and_benchmarks_are_nobodys_library():
    scripts = {path.stem for path in [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]}
    assert scripts
    for name, tree in _sources().items():
        assert not {n.split(".")[0] for n in _imports(tree)} & scripts, name


# --- writing and printing -----------------------------------------------------------------------------------------

WRITE_METHODS = {"write_text", "write_bytes", "to_csv", "to_parquet", "to_json", "savefig", "save_pretrained", "savez"}
WRITE_FUNCTIONS = {"save_file", "savetxt"}


def _writes(tree: ast.AST) -> set[str]:
    """Calls that write a file, as far as names can tell."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        # `write_text(path, …)` is the one in records; `path.write_text(…)` is pathlib's.
        if name in (WRITE_METHODS if method else WRITE_FUNCTIONS):
            found.add(name)
        if name == "open":
            arguments = [
                *node.args[0 if method else 1 :],
                *(keyword.value for keyword in node.keywords if keyword.arg == "mode"),
            ]
            modes = [a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes):
                found.add("open for writing")
        if ast.unparse(node.func) in {"os.replace", "os.rename", "shutil.move", "np.save", "torch.save"}:
            found.add(ast.unparse(node.func))
    return found


@pytest.mark.parametrize("module", _sources())
def test_only_the_writers_write_files(module):
    if not _within(module, WRITERS):
        assert not _writes(_sources()[module])


@pytest.mark.parametrize("module", _sources())
def test_library_code_never_prints(module):
    if module.split(".")[0] in {"commands", "__main__", "cli", "process"}:
        return
    calls = [node.func for node in ast.walk(_sources()[module]) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_no_module_draws_from_a_global_generator():
    for name, tree in _sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert not call.startswith("random."), name
                if call.startswith(("np.random.", "numpy.random.")):
                    assert call.split(".")[2].split("(")[0] in {"default_rng", "SeedSequence", "Generator", "PCG64"}, (
                        name
                    )


# --- controls: the rules see what they forbid ---------------------------------------------------------------------


def test_the_rules_see_what_they_forbid():
    lazy = ast.parse("def f():\n    from sparselora.commands import rank\n    import torch")
    assert _own(lazy) == {"commands.rank"}
    assert _outside(lazy) == {"torch"}
    assert _outside(_top_level(lazy)) == set()
    assert _own(ast.parse("from sparselora import __version__, stats")) == {"__init__", "stats"}
    assert _own(ast.parse("from sparselora.figures import COLORS, toy")) == {"figures", "figures.toy"}
    assert _layer("figures") < _layer("figures.toy")
    assert _layer("contextual.plan") < _layer("contextual.schedule")
    with pytest.raises(AssertionError, match="no line"):
        _layer("contextual.new")
    bad = "open('x', 'w'); path.open('ab'); p.write_text('x'); os.replace(a, b); open(name, mode='r+')"
    assert _writes(ast.parse(bad)) == {"open for writing", "write_text", "os.replace"}
    assert not _writes(ast.parse("open('x'); path.open('rb'); text.replace('a', 'w'); write_text(path, text)"))


# --- the processes themselves -------------------------------------------------------------------------------------


def _loaded(code: str) -> set[str]:
    heavy = {"numpy", "scipy", "pandas", "torch", "transformers", "peft", "matplotlib", "datasets", "safetensors"}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sorted({heavy!r} & set(sys.modules)))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_and_its_help_load_nothing_heavy():
    assert _loaded("import sparselora; dir(sparselora); sparselora.__version__") == set()
    assert _loaded("from sparselora.__main__ import main; main(['--help']); main(['--version'])") == set()
    # The control: a public name is loaded when it is asked for, and only then.
    assert "numpy" in _loaded("import sparselora; sparselora.keep_count(8, 0.5)")


def test_every_public_name_is_there():
    import sparselora

    for name in sparselora.__all__:
        assert getattr(sparselora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'sparsity'"):
        sparselora.__getattr__("sparsity")


def test_counting_and_inspecting_need_no_torch(tmp_path):
    code = (
        "from sparselora.__main__ import main\n"
        f"assert main(['savings', '--shape', 'gpt2', '--out_dir', {str(tmp_path / 'out')!r}]) == 0"
    )
    assert not _loaded(code) & {"torch", "transformers", "peft", "datasets"}


def test_every_package_is_installed():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'^ +"(sparselora[\w.]*)",$', text, flags=re.MULTILINE)
    found = [".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")]
    assert sorted(listed) == sorted(found)
