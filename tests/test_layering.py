"""Imports point down, and each layer keeps to its libraries."""

import ast
import graphlib
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "covid_cls"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom to the top; two names in one row do not import each other.
LAYERS = (
    {"errors", "tasks", "system"},
    {"io"},
    {"evaluation", "models"},
    {"data"},
    {"shortcuts", "attribution"},
    {"training"},
    {"bundle"},
    {"reporting"},
    {"runtime"},
    {"experiment"},
    {"benchmarking"},
    {"train", "search", "benchmark", "evaluate", "audit", "report", "predict", "explain", "export"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FORBIDDEN = {
    "errors": {"torch", "numpy", "pandas", "pytorch_lightning", "hydra", "omegaconf"},
    "tasks": {"torch", "numpy", "pandas", "pytorch_lightning", "hydra", "omegaconf"},
    "system": {"torch", "numpy", "pandas", "pytorch_lightning", "hydra", "omegaconf"},
    "io": {"torch", "pytorch_lightning", "hydra", "omegaconf"},
    "evaluation": {"torch", "torchvision", "pytorch_lightning", "torchmetrics", "matplotlib", "hydra", "omegaconf"},
    "models": {"pytorch_lightning", "torchmetrics", "pandas", "matplotlib", "hydra", "omegaconf"},
    "data": {"torchvision", "torchmetrics", "matplotlib", "hydra", "omegaconf"},
    "shortcuts": {"torch", "matplotlib", "hydra", "omegaconf"},
    "attribution": {"pytorch_lightning", "matplotlib", "hydra", "omegaconf"},
    "training": {"matplotlib", "hydra", "omegaconf"},
    "bundle": {"pytorch_lightning", "matplotlib", "hydra", "omegaconf"},
    "reporting": {"hydra", "omegaconf"},
    "runtime": {"torchvision", "pytorch_lightning", "pandas", "matplotlib"},
}


def _home(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path, at_runtime: bool = True) -> list[str]:
    """Full names of all modules that a file imports, anywhere in it; not those for the type checker alone."""
    found = []
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if at_runtime and isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            skipped |= {inner for child in node.body for inner in ast.walk(child)}
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found += [f"{module}.{alias.name}" for alias in node.names] if module == "covid_cls" else [module]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    home = _home(path)
    if home == "__init__":
        # The last one is imported within `load`.
        assert _imports(path) == ["pathlib", "typing", "covid_cls.bundle.model"]
        return
    assert home in LEVEL, f"{home} has no place in the layer table: add it here and in CONTRIBUTING.md"
    for name in _imports(path, at_runtime=False):
        if name.startswith("covid_cls."):
            target = name.split(".")[1]
            if target not in (home, "__version__"):
                assert LEVEL[target] < LEVEL[home], f"{path.name} in {home} imports {name}, which is not below it"


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_imports_itself_through_others() -> None:
    modules = {_module(path) for path in FILES}
    imports: dict[str, set[str]] = {}
    for path in FILES:
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("covid_cls"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= names & modules or {str(node.module)}
        # The package itself is imported for its version and `load`, which imports the rest when it is called.
        imports[_module(path)] = found - {_module(path), "covid_cls"}
    imports["covid_cls"] = set()
    # Raises CycleError, which names the modules.
    list(graphlib.TopologicalSorter(imports).static_order())


def test_no_two_files_share_a_name() -> None:
    names = [path.name for path in FILES if path.name != "__init__.py" and path.parent != PACKAGE]
    assert sorted(name for name, count in Counter(names).items() if count > 1) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers_keep_to_their_libraries(path: Path) -> None:
    libraries = {name.split(".")[0] for name in _imports(path)}
    assert not libraries & FORBIDDEN.get(_home(path), set())


def test_only_runtime_imports_hydra() -> None:
    users = {_home(path) for path in FILES if {"hydra", "omegaconf"} & {n.split(".")[0] for n in _imports(path)}}
    assert users == {"runtime"}


def test_only_training_holds_a_lightning_module() -> None:
    holders = {_home(path) for path in FILES if "LightningModule)" in path.read_text(encoding="utf-8")}
    assert holders == {"training", "benchmarking"}  # the benchmark compares with a Lightning loop of its own


def test_contributing_names_every_layer() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    present = {_home(path) for path in FILES} - {"__init__"}
    assert [name for name in sorted(present) if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    "path", sorted((PACKAGE.parent / "tools").rglob("*.py")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_tools_import_nothing_from_tests(path: Path) -> None:
    assert [name for name in _imports(path, at_runtime=False) if name.split(".")[0] == "tests"] == []
