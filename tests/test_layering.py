"""Imports point down, and each layer keeps to its libraries."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "covid_cls"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom to the top; two names in one row do not import each other.
LAYERS = (
    {"errors", "interrupts", "machine"},
    {"labels", "records"},
    {"sweep"},
    {"evaluation", "models"},
    {"data"},
    {"audits", "training", "attribution"},
    {"artifact"},
    {"reporting"},
    {"multirun", "targets"},
    {"command"},
    {"assemble"},
    {"cell", "speed"},
    {"train", "search", "benchmark", "evaluate", "audit", "report", "predict", "explain", "export"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FORBIDDEN = {
    "errors": {"torch", "numpy", "pandas", "pytorch_lightning", "hydra", "omegaconf"},
    "labels": {"torch", "numpy", "pandas", "pytorch_lightning", "hydra", "omegaconf"},
    "records": {"pytorch_lightning", "hydra", "omegaconf"},
    "evaluation": {"torch", "torchvision", "pytorch_lightning", "torchmetrics", "matplotlib", "hydra", "omegaconf"},
    "models": {"pytorch_lightning", "torchmetrics", "pandas", "matplotlib", "hydra", "omegaconf"},
    "data": {"torchvision", "torchmetrics", "matplotlib", "hydra", "omegaconf"},
    "audits": {"torch", "matplotlib", "hydra", "omegaconf"},
    "training": {"matplotlib", "hydra", "omegaconf"},
    "attribution": {"pytorch_lightning", "matplotlib", "hydra", "omegaconf"},
    "artifact": {"pytorch_lightning", "matplotlib", "hydra", "omegaconf"},
    "reporting": {"hydra", "omegaconf"},
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
        assert _imports(path) == ["pathlib", "typing", "covid_cls.artifact.model"]  # the last one within `load`
        return
    assert home in LEVEL, f"{home} has no place in the layer table: add it here and in CONTRIBUTING.md"
    for name in _imports(path, at_runtime=False):
        if name.startswith("covid_cls."):
            target = name.split(".")[1]
            if target not in (home, "__version__"):
                assert LEVEL[target] < LEVEL[home], f"{path.name} in {home} imports {name}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers_keep_to_their_libraries(path: Path) -> None:
    libraries = {name.split(".")[0] for name in _imports(path)}
    assert not libraries & FORBIDDEN.get(_home(path), set())


def test_only_commands_import_hydra() -> None:
    users = {_home(path) for path in FILES if {"hydra", "omegaconf"} & {n.split(".")[0] for n in _imports(path)}}
    assert users == {"multirun", "command", "targets"} | LAYERS[-1]


def test_only_training_holds_a_lightning_module() -> None:
    holders = {_home(path) for path in FILES if "LightningModule)" in path.read_text(encoding="utf-8")}
    assert holders == {"training", "speed"}  # the benchmark compares with a Lightning loop of its own


def test_contributing_names_every_layer() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    present = {_home(path) for path in FILES} - {"__init__"}
    assert [name for name in sorted(present) if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    "path", sorted((PACKAGE.parent / "tools").rglob("*.py")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_tools_import_nothing_from_tests(path: Path) -> None:
    assert [name for name in _imports(path, at_runtime=False) if name.split(".")[0] == "tests"] == []
