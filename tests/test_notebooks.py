"""The notebooks are stored without outputs and run on small phantoms."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

from covid_cls.io import TEST_ACCESSES
from tests.conftest import ROOT, Command

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 20_000  # bytes
SMALL = ("data.images=96", "data.size=64")

Notebook = Any  # nbformat has no types


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    """Return the path of each notebook."""
    found: Path = request.param
    return found


def read(path: Path) -> Notebook:
    return nbformat.read(path, as_version=4)


def test_there_are_three_notebooks() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3"]


def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    assert path.stat().st_size < LARGEST
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.source == cell.source.strip()
        assert cell.source
        if cell.cell_type == "code":
            assert cell.outputs == [], cell.id
            assert cell.execution_count is None, cell.id


def test_a_notebook_begins_with_its_question_and_parameters(path: Path) -> None:
    first, second = read(path).cells[:2]
    assert first.cell_type == "markdown"
    title, *rest = first.source.splitlines()
    assert title.startswith("# ")
    assert title.endswith("?")
    text = "\n".join(rest)
    for words in ("**Needs**", "**Your own ", "Research use, not for diagnosis."):
        assert words in text
    assert second.metadata.tags == ["parameters"]


@pytest.fixture(scope="module")
def sweep(train: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the sweep of the notebooks (two strategies, two losses) on fewer and smaller images."""
    folder = tmp_path_factory.mktemp("notebooks")
    grid = ("-m", "name=notebooks", "task=three_class", "strategy=fc,partial", "loss=ce,focal")
    small = ("preprocess.crop=64", "data.batch_size=8", "trainer=cpu", "trainer.max_epochs=2", "logger=none")
    done = train(folder, *grid, *SMALL, *small)
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "notebooks"


@pytest.fixture
def execute(environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a notebook in `tmp_path` with other parameters and returns it with its outputs."""
    jupyter = {"JUPYTER_PATH": "jupyter", "JUPYTER_DATA_DIR": "jupyter", "IPYTHONDIR": "ipython"}
    for name, folder in jupyter.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    write_kernel_spec(tmp_path / "jupyter" / "kernels" / "python3")

    def run(number: int, parameters: str) -> Notebook:
        (path,) = (path for path in NOTEBOOKS if path.name.startswith(f"{number}_"))
        notebook = read(path)
        (position,) = (k for k, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(parameters))
        client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}})
        client.execute(env={**environment, **{name: str(tmp_path / folder) for name, folder in jupyter.items()}})
        return notebook

    return run


def kinds(notebook: Notebook) -> dict[str, list[str]]:
    """Return what each code cell shows, by its id: pictures, tables or text."""
    shown = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert [out.text for out in cell.outputs if out.output_type == "stream"] == [], cell.id
            # A finished progress bar leaves an empty output.
            shown[cell.id] = [best(out.data) for out in cell.outputs if out.data["text/plain"].strip()]
    return shown


def best(data: dict[str, str]) -> str:
    """Return the richest form of an output. An empty picture or table does not count."""
    if len(data.get("image/png", "")) > 4_000:
        return "picture"
    if "<td" in data.get("text/html", "") or "<li>" in data.get("text/html", ""):
        return "table"
    return "text"


@pytest.mark.slow(reason="a notebook is executed by a kernel, which is a process")
def test_the_data_notebook_runs(execute: Any) -> None:
    done = execute(1, f"DATA = {['data=phantom', *SMALL]}\nFOLDS = 2")
    shown = kinds(done)
    assert [cell for cell, found in shown.items() if found == ["picture"]] == ["pictures", "baselines"]
    tables = ["open", "counts", "splits", "attributes", "baselines-table"]
    assert [cell for cell, found in shown.items() if found == ["table"]] == tables
    assert shown["findings"] == ["table"] * 2


@pytest.mark.slow(reason="a notebook is executed by a kernel, which is a process")
def test_the_sweep_notebook_is_one_test_set_access(execute: Any, sweep: Path) -> None:
    done = execute(2, f"RUNS = {str(sweep)!r}\nRESAMPLES = 100")
    shown = kinds(done)
    assert shown["closer"] == ["text", *["picture"] * 3]
    assert shown["configuration"] == ["text", *["picture"] * 3]
    assert [cell for cell, found in shown.items() if found == ["picture"]] == ["intervals-chart", "chart"]
    tables = ["validation", "intervals", "test", "verdict", "grid", "effects"]
    assert [cell for cell, found in shown.items() if found == ["table"]] == tables
    assert shown["pairs"] == ["table"] * 2
    logs = [folder / TEST_ACCESSES for folder in sweep.iterdir() if (folder / "run.json").is_file()]
    assert len(logs) == 4
    for log in logs:
        _, access = log.read_text(encoding="utf-8").splitlines()
        assert access.endswith("notebooks/2_sweep.ipynb")


@pytest.mark.slow(reason="a notebook is executed by a kernel, which is a process")
def test_the_attribution_notebook_runs_without_test_images(execute: Any, sweep: Path) -> None:
    logs = {path: path.read_bytes() for path in sweep.rglob(TEST_ACCESSES)}
    done = execute(3, f"RUNS = {str(sweep)!r}\nFEW = 1")
    assert {path: path.read_bytes() for path in sweep.rglob(TEST_ACCESSES)} == logs
    shown = kinds(done)
    tables = ["model", "predict", "weights", "where", "images", "occlusion"]
    assert [cell for cell in tables if shown[cell] != ["table"]] == []
    assert shown["pictures"] == ["picture"]
    html = {cell.id: cell.outputs[-1].data["text/html"] for cell in done.cells if cell.id in tables}
    # Phantoms have lung masks.
    assert "lungs" in html["where"]
    for numbers, maps, pictures in (("weights", "maps", 2), ("occlusion", "occlusion-maps", 1)):
        # After two epochs from random initialisation, the maps may pass or fail the randomisation test.
        passed = "passes the randomisation test" in html[numbers]
        assert passed or "No figure" in html[numbers]
        assert shown[maps] == (["picture"] * pictures if passed else ["table"])
