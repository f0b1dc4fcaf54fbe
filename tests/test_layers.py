"""The order of imports, read from the source: no folder imports one below it, and nothing heavy loads early."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sparselora"

ORDER = (
    "namesake", "errors", "numerics", "runs", "config", "cli", "models", "data", "report", "kernels", "contextual",
    "token_gates", "novelty", "evaluation", "spectral", "training", "inspection", "pruning", "compare", "bench",
    "frontier", "commands", "__main__",
)  # fmt: skip
"""Folders and files at the top of the package: each imports only those before it, and itself."""

CAPABILITIES = ("contextual", "token_gates", "novelty", "spectral")
"""Folders that know nothing of one another."""

STANDARD = frozenset(sys.stdlib_module_names)
NUMERIC = frozenset({"numpy", "scipy"})
ALLOWED: dict[str, frozenset[str]] = {
    "__init__": frozenset(),
    "__main__": frozenset(),
    "namesake": frozenset(),
    "errors": frozenset(),
    "cli": frozenset(),
    "numerics": NUMERIC | {"threadpoolctl"},
    "runs": frozenset({"pandas", "filelock", "huggingface_hub", "tqdm"}),
    "config": frozenset({"pydantic", "pydantic_core", "ruamel"}),
    "models.architectures": frozenset(),
    "models.model_files": frozenset({"huggingface_hub"}),
    "models.packaged": frozenset(),
    "models.gguf_header": frozenset({"gguf", "numpy"}),
    "models.gguf_weights": frozenset({"gguf", "numpy"}),
    "models.safetensors_header": frozenset({"ml_dtypes", "numpy"}),
    "models.quantised": frozenset(),
    "models.weights": frozenset({"numpy"}),
    "report": frozenset({"numpy", "pandas", "matplotlib", "PIL"}),
    "kernels": frozenset({"torch", "triton"}),
    "contextual": frozenset({"numpy", "torch", "transformers", "peft", "safetensors", "bitsandbytes"}),
    "token_gates": frozenset({"numpy", "pandas", "torch", "peft", "safetensors", "transformers"}),
    "novelty": frozenset({"numpy", "torch", "transformers", "pandas", "scipy"}),
    "spectral": NUMERIC | {"pandas", "torch", "peft", "transformers"},
    "inspection": NUMERIC | {"pandas"},
    "compare": frozenset({"numpy", "pandas"}),
}
"""Packages that a folder, or a module of one, may import, anywhere in it. What is not named may import anything."""

LIGHT = {
    "models.model_files": {"huggingface_hub"},
    "models.gguf_header": {"gguf", "numpy"},
    "models.gguf_weights": {"gguf"},
    "models.adapter_files": {"torch", "huggingface_hub"},
    "models.adapter_tensors": {"torch"},
    "data.instructions": {"datasets"},
    "contextual": {"bitsandbytes"},
    "evaluation": {"vllm"},
    "runs": {"huggingface_hub"},
}
"""Packages that these import inside functions only: they are slow to load, or may not be installed."""

NO_TORCH = (
    "numerics",
    "runs",
    "config",
    "models.weights",
    "models.model_files",
    "models.architectures",
    "inspection",
    "compare",
)
"""What loads without torch: counting, inspecting weights and comparing runs need no PyTorch."""

WRITERS = {
    "runs", "report", "models.adapter_files", "models.gguf_models", "models.merge", "contextual.cache",
    "token_gates.gates", "training.checkpoints", "training.trainer", "novelty.trainer", "inspection.model",
    "spectral.self_check", "bench.rivals.unsloth",
}  # fmt: skip
"""The modules that write files: `models` adapters in PEFT's format and a packaged model in the user's cache,
`contextual.cache` factors and statistics there, `token_gates.gates` gates beside an adapter, the trainers the
checkpoints of a run and the gate's log, `inspection.model` the layers that are measured so far, `spectral.self_check`
an adapter and `bench.rivals.unsloth` a model in a temporary folder."""


@functools.cache
def _sources() -> dict[str, ast.Module]:
    """Dotted module name inside the package (``report.toy``) → its syntax tree."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield what a syntax tree imports, at any depth: ``from a.b import c`` gives ``a.b`` and ``a.b.c``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _top_level(tree: ast.Module) -> ast.Module:
    """Return the part of a module that runs on import: no function bodies, no ``if TYPE_CHECKING``."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def _within(module: str, names: Collection[str]) -> bool:
    """Return whether ``names`` has the module or a package that contains it."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


def _folder(module: str) -> str:
    return module.split(".")[0]


def _modules(tree: ast.AST) -> set[str]:
    """Modules of the package that a tree imports, by their names in it; ``__init__`` for the package itself."""
    known = _sources().keys()
    modules = set()
    for name in _imports(tree):
        parts = name.split(".")
        if parts[0] != "sparselora" or len(parts) == 1:
            continue
        while parts[1:] and ".".join(parts[1:]) not in known:
            parts.pop()  # `from sparselora.numerics.stats import holm` names no module `stats.holm`.
        modules.add(".".join(parts[1:]) or "__init__")
    return modules


def _outside(tree: ast.AST) -> set[str]:
    tops = {name.split(".")[0] for name in _imports(tree)}
    return tops - STANDARD - {"sparselora"}


def test_every_folder_has_its_place():
    assert {_folder(module) for module in _sources()} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", _sources())
def test_no_folder_imports_one_below_it(module):
    imported = {_folder(other) for other in _modules(_sources()[module])} - {"__init__", _folder(module)}
    if module == "__init__":
        assert not imported
    else:
        assert not {other for other in imported if ORDER.index(other) > ORDER.index(_folder(module))}


@pytest.mark.parametrize("folder", CAPABILITIES)
def test_capabilities_do_not_import_one_another(folder):
    for module, tree in _sources().items():
        if _folder(module) == folder:
            assert not {_folder(other) for other in _modules(tree)} & set(CAPABILITIES) - {folder}, module


def test_no_module_imports_itself_in_a_circle():
    graph = {module: _modules(tree) - {module, _folder(module), "__init__"} for module, tree in _sources().items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_kernels_know_nothing_of_the_package():
    for module, tree in _sources().items():
        if _within(module, {"kernels"}):
            # The list of public names is made by the function that makes it for every folder.
            lazy = {"__init__"} if module == "kernels" else set()
            assert all(_within(other, {"kernels"}) for other in _modules(tree) - lazy), module


@pytest.mark.parametrize("module", ALLOWED)
def test_modules_import_from_outside_only_what_they_may(module):
    for name, tree in _sources().items():
        if _within(name, {module}):
            assert _outside(tree) <= ALLOWED[module], name


@pytest.mark.parametrize("module", LIGHT)
def test_slow_packages_are_imported_inside_functions(module):
    for name, tree in _sources().items():
        if _within(name, {module}):
            assert not _outside(_top_level(tree)) & LIGHT[module], name


def test_commands_and_main_load_nothing_heavy_by_themselves():
    heavy = {"torch", "transformers", "peft", "datasets", "matplotlib", "huggingface_hub"}
    for name, tree in _sources().items():
        if _folder(name) in {"commands", "__main__"}:
            assert not _outside(_top_level(tree)) & heavy, name
            for other in _modules(_top_level(tree)):
                assert not _outside(_top_level(_sources()[other])) & heavy, f"{name} imports {other}"


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
    if module.split(".")[0] in {"commands", "__main__", "cli"} or module == "runs.process":
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
    assert _modules(lazy) == {"commands", "commands.rank"}
    assert _outside(lazy) == {"torch"}
    assert _outside(_top_level(lazy)) == set()
    assert _modules(ast.parse("from sparselora import __version__, numerics")) == {"__init__", "numerics"}
    assert _modules(ast.parse("from sparselora.report import style, toy")) == {"report", "report.style", "report.toy"}
    assert ORDER.index("models") < ORDER.index("contextual") < ORDER.index("commands")
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


def _call(*arguments: str) -> str:
    """Return code that calls a command and survives that it ends."""
    return (
        "from contextlib import suppress\n"
        "from sparselora.__main__ import main\n"
        f"with suppress(SystemExit):\n    main({list(arguments)!r})"
    )


def test_importing_the_package_and_its_help_load_nothing_heavy():
    assert _loaded("import sparselora; dir(sparselora); sparselora.__version__") == set()
    assert _loaded("from sparselora.__main__ import main; main(['--help']); main(['--version'])") == set()
    assert _loaded(_call("train", "--help")) == _loaded(_call("train", "--nonsense")) == set()
    # The control: a public name is loaded when it is asked for, and only then.
    assert "numpy" in _loaded("import sparselora; sparselora.keep_count(8, 0.5)")


@pytest.mark.parametrize("command", ["bench", "edit", "eval", "frontier", "grid", "merge", "profile", "prune", "rank",
                                     "reduce", "sensitivity"])  # fmt: skip
def test_help_needs_no_tables_and_no_torch(command):
    assert _loaded(_call(command, "--help")) <= {"numpy", "safetensors"}


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
