"""Who imports whom, read from the source: nothing points back up, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sparselora"

LAYERS = [
    {"__init__"},
    {"errors"},
    {"cli", "channels", "reconstruction", "matrices", "spectra", "stats", "costs", "records", "workers"},
    {"predictors", "sweep", "layer_tables", "figures", "weights"},
    {"adapters", "lora", "models", "data"},
    {"training"},
    {"pruning"},
    {"commands"},
    {"__main__"},
]
"""From the bottom up. A module imports from lower lines only, never from its own: equals do not know one another."""

STANDARD = frozenset(sys.stdlib_module_names)
NUMERIC = frozenset({"numpy", "scipy"})
ALLOWED: dict[str, frozenset[str]] = {
    "__init__": frozenset(),
    "errors": frozenset(),
    "cli": frozenset(),
    "costs": frozenset(),
    "__main__": frozenset(),
    "channels": NUMERIC,
    "reconstruction": NUMERIC,
    "matrices": NUMERIC,
    "spectra": NUMERIC | {"threadpoolctl"},
    "stats": NUMERIC,
    "predictors": NUMERIC,
    "records": frozenset({"pandas", "filelock"}),
    "sweep": frozenset({"numpy", "pandas"}),
    "layer_tables": frozenset({"numpy", "pandas"}),
    "figures": frozenset({"numpy", "pandas", "matplotlib", "PIL"}),
    "weights": frozenset({"numpy", "huggingface_hub"}),
    "adapters": frozenset({"numpy", "safetensors", "huggingface_hub", "torch"}),
}
"""What a module may import from outside, anywhere in it. Modules that are not named here may import anything."""

LIGHT = {"adapters": {"torch", "huggingface_hub"}, "weights": {"huggingface_hub"}}
"""Of `ALLOWED`, what must be imported inside a function: these modules are loaded where torch is not wanted."""

WRITERS = {"records", "figures", "lora"}
"""The modules that may write files: `lora` an adapter in PEFT's format."""


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
    """Every module that a syntax tree imports, at any depth; ``from a.b import c`` gives ``a.b`` and ``a.b.c``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            if node.module == "sparselora":
                yield from (f"sparselora.{alias.name}" for alias in node.names)


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


def _layer(module: str) -> int:
    top = module.split(".")[0]
    (level,) = [i for i, names in enumerate(LAYERS) if top in names]
    return level


def _own(tree: ast.AST) -> set[str]:
    """Modules of the package that a tree imports, by their first name in it; ``__init__`` for the package itself."""
    known = set().union(*LAYERS)
    found = set()
    for name in _imports(tree):
        if name.split(".")[0] == "sparselora":
            top = [*name.split("."), "__init__"][1]
            # `from sparselora import __version__` names no module.
            found.add(top if top in known else "__init__")
    return found


def _outside(tree: ast.AST) -> set[str]:
    tops = {name.split(".")[0] for name in _imports(tree)}
    return tops - STANDARD - {"sparselora"}


def test_every_module_has_its_layer():
    placed = set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(placed)
    assert {name.split(".")[0] for name in _sources()} == placed


@pytest.mark.parametrize("module", _sources())
def test_nothing_points_back_up(module):
    top = module.split(".")[0]
    for other in _own(_sources()[module]):
        below = _layer(other) < _layer(module)
        # Within figures, each module uses what their package shares.
        assert below or other == top == "figures", f"{module} imports {other}"


@pytest.mark.parametrize("module", ALLOWED)
def test_modules_import_from_outside_only_what_they_may(module):
    for name, tree in _sources().items():
        if name.split(".")[0] == module:
            assert _outside(tree) <= ALLOWED[module], name
            assert not _outside(_top_level(tree)) & LIGHT.get(module, set()), name


def test_figures_and_commands_do_not_know_their_siblings():
    for name, tree in _sources().items():
        package, _, leaf = name.partition(".")
        if package in {"figures", "commands"}:
            siblings = {n for n in _imports(tree) if n.startswith(f"sparselora.{package}.")}
            assert not siblings, f"{name} imports {siblings}"
            assert leaf or package


def test_commands_and_main_load_nothing_heavy_by_themselves():
    heavy = {"torch", "transformers", "peft", "datasets", "matplotlib", "safetensors", "huggingface_hub"}
    heavy_modules = {"figures", "lora", "models", "data", "training", "pruning"}
    for name, tree in _sources().items():
        if name.split(".")[0] in {"commands", "__main__"}:
            assert not _outside(_top_level(tree)) & heavy, name
            assert not _own(_top_level(tree)) & heavy_modules, name


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
    if module.split(".")[0] not in WRITERS:
        assert not _writes(_sources()[module])


@pytest.mark.parametrize("module", _sources())
def test_library_code_never_prints(module):
    if module.split(".")[0] in {"commands", "__main__", "cli"}:
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
    assert _own(lazy) == {"commands"}
    assert _outside(lazy) == {"torch"}
    assert _outside(_top_level(lazy)) == set()
    assert _own(ast.parse("from sparselora import __version__, stats")) == {"__init__", "stats"}
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


def test_counting_and_inspecting_need_no_torch(tmp_path):
    code = (
        "from sparselora.__main__ import main\n"
        f"assert main(['savings', '--shape', 'gpt2', '--out_dir', {str(tmp_path / 'out')!r}]) == 0"
    )
    assert not _loaded(code) & {"torch", "transformers", "peft", "datasets"}
