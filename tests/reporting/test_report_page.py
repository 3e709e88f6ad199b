import csv
import datetime
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from covid_cls.errors import InputError
from covid_cls.evaluation.comparison import compare_cells
from covid_cls.evaluation.grid import point_scores, pool_folds
from covid_cls.evaluation.intervals import proportion_interval
from covid_cls.labels import TASKS
from covid_cls.records import DISCLAIMER, read_predictions
from covid_cls.reporting.collect import Sweep, collect
from covid_cls.reporting.measure import measure, measure_twins
from covid_cls.reporting.published import REFERENCES, references
from covid_cls.reporting.report_page import About, report_page
from covid_cls.reporting.report_tables import CSV_COLUMNS, common_runs, grid_table, results_csv, results_md
from covid_cls.reporting.standing import Options, ProtocolResult
from tests.reporting.sweeps import changed, predictions, write_grid, write_run

TASK = TASKS["three_class"]
OPTIONS = Options(resamples=100)


class Page(HTMLParser):
    """The text of a page, its ids and links, and the tags that were left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("href", "xlink:href", "src")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def measured(root: Path, options: Options = OPTIONS) -> tuple[Sweep, list[ProtocolResult]]:
    sweep = collect(root, "report")
    results = []
    for protocol in sweep.protocols:
        result, omissions = measure(protocol, options)
        results.append(result)
        sweep.omissions.extend(omissions)
    return sweep, results


def page(root: Path, options: Options = OPTIONS) -> Page:
    return page_of(*measured(root, options))


def page_of(sweep: Sweep, results: list[ProtocolResult]) -> Page:
    about = About(
        "Report of demo", "python -m covid_cls.report", datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)
    )
    text = report_page(sweep, results, measure_twins(results), sweep.omissions, about)
    found = Page(text)
    assert found.open == []
    return found


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grid")
    write_grid(root)
    for seed in (0, 1):
        write_run(root, changed(seed=seed, strategy__name="full", preprocess__seen="border"), skill=0.6)
    return root


@pytest.fixture(scope="module")
def grid_measured(grid: Path) -> tuple[Sweep, list[ProtocolResult]]:
    return measured(grid)


@pytest.fixture(scope="module")
def results(grid_measured: tuple[Sweep, list[ProtocolResult]]) -> list[ProtocolResult]:
    return grid_measured[1]


@pytest.fixture(scope="module")
def shown(grid_measured: tuple[Sweep, list[ProtocolResult]]) -> Page:
    return page_of(*grid_measured)


def test_the_page_stands_alone(shown: Page) -> None:
    assert all(link.startswith("#") for link in shown.links)
    assert len(shown.ids) == len(set(shown.ids))
    assert {link[1:] for link in shown.links} <= set(shown.ids)
    assert shown.text.count(DISCLAIMER) == 2


def test_the_page_opens_with_the_verdict_then_the_facts_then_the_grid(shown: Page) -> None:
    order = [
        "not evidence of disease detection: source predicts label (Cramér's V 1.00)",
        "of 8 cells are shown to beat every probe that cannot see the disease",
        "60 of 30 patients: 20 covid, 20 normal, 20 pneumonia",
        "this report is opening",
        "random weights (18 runs)",
        "Mean ± sd over runs",
        "DarkCovidNet (Ozturk et al. 2020)",
        "the outer 6 of 64 pixels",
        "pairs differ at Holm-corrected p < 0.05",
        "vgg16 - resnet18",
        "seed's share of variance",
        "truth \\ decision",
        "Reliability of p(covid)",
        "hospital_b",
        "what a leak adds is unknown",
        "ECE of p(covid)",
        "every run below the folder is in the report",
        "No seed is picked",
    ]
    places = [shown.text.index(words) for words in order]
    assert places == sorted(places)


def test_a_single_seed_is_called_one(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    text = page(tmp_path).text
    assert "single seed" in text
    assert "was not compared with any shortcut probe" in text
    assert "No probes beside these runs" in text
    assert "nan" not in re.findall(r"\bnan\b", text)


def test_cells_with_fewer_seeds_than_others_say_so(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    for seed in (0, 1):
        write_run(tmp_path, changed(seed=seed, loss__name="focal"))
    _, results = measured(tmp_path)
    headers, table, _ = grid_table(results[0])
    assert headers[3] == "runs"
    assert [row[3] for row in table] == ["single seed", "2 seeds"]


def test_openings_are_counted_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    assert "were opened once, first on" in page(tmp_path).text
    assert "were opened 2 times, first on" in (second := page(tmp_path).text)
    assert "this report is opening 2." in second


def test_what_is_left_out_stands_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    write_run(tmp_path, changed(seed=1), status="failed", reason="MemoryError: <3 GB>")
    text = page(tmp_path).text
    assert "failed MemoryError: <3 GB>" in text  # escaped in the source, or the parser had not seen it as text


def test_a_leaky_split_is_named_first(tmp_path: Path) -> None:
    write_run(tmp_path, changed(data__group="image"), notes=["LEAKY SPLIT: by image"])
    text = page(tmp_path).text
    assert text.index("split by image: LEAKY") < 150
    assert "LEAKY SPLIT: by image (1 run)" in text


@pytest.mark.parametrize("task", ["binary", "three_class_multilabel"])
def test_other_tasks_have_their_own_columns_and_references(tmp_path: Path, task: str) -> None:
    for seed in (0, 1):
        write_run(tmp_path, changed(task__name=task, seed=seed), probes={"frame": 0.5})
    text = page(tmp_path).text
    assert "ResNet18, f" in text
    assert ("accuracy per label" in text) == (task == "three_class_multilabel")


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_every_number_of_the_csv_comes_from_the_predictions(grid: Path, results: list[ProtocolResult]) -> None:
    rows = rows_of(results_csv(results))
    assert list(rows[0]) == list(CSV_COLUMNS)
    for row in rows:
        if not row["backbone"]:
            continue
        place = f"three_class-{row['backbone']}-{row['strategy']}-{row['loss']}-patient-{row['seen']}-s*"
        scores = [
            point_scores(read_predictions(folder / "predictions-test.csv", TASK.classes), TASK)[row["score"]]
            for folder in sorted(grid.glob(place))
        ]
        assert len(scores) == int(row["n_seeds"]) == 2
        assert float(row["value"]) == pytest.approx(np.mean(scores), abs=1e-9)
        assert float(row["mean"]) == pytest.approx(np.mean(scores), abs=1e-9)
        assert float(row["sd"]) == pytest.approx(np.std(scores, ddof=1), abs=1e-9)
        if row["low"]:
            assert float(row["low"]) < float(row["high"])
    assert {row["cell"] for row in rows if not row["backbone"]} == {"probe: frame", "probe: majority"}
    assert {(row["n_images"], row["n_patients"], row["n_folds"]) for row in rows} == {("60", "30", "1")}


def test_folds_are_pooled_for_the_value_and_apart_for_the_sd(tmp_path: Path) -> None:
    for fold in (0, 1):
        write_run(tmp_path, changed(data__folds=2, data__fold=fold), probes={"header": 0.5})
    _, results = measured(tmp_path)
    tables = [read_predictions(path, TASK.classes) for path in sorted(tmp_path.glob("*/predictions-test.csv"))]
    (row,) = [r for r in rows_of(results_csv(results)) if r["score"] == "macro_auroc" and r["backbone"]]
    each = [point_scores(table, TASK)["macro_auroc"] for table in tables]
    assert float(row["value"]) == pytest.approx(point_scores(pool_folds(tables), TASK)["macro_auroc"], abs=1e-9)
    assert float(row["mean"]) == pytest.approx(np.mean(each), abs=1e-9)
    assert float(row["sd"]) == pytest.approx(np.std(each, ddof=1), abs=1e-9)
    assert (row["n_seeds"], row["n_folds"]) == ("1", "2")
    headers, table, left = grid_table(results[0])
    assert (headers[:4], left) == (["backbone", "strategy", "loss", "accuracy"], 3)
    assert table[0][:3] == ["resnet18", "fc", "ce"]
    assert common_runs(results[0]) == "single seed × 2 folds"
    (probe,) = results[0].probes
    assert len(probe.table) == 60


def test_the_same_folder_gives_the_same_bytes(grid: Path, results: list[ProtocolResult]) -> None:
    first, second = results, measured(grid)[1]
    assert results_csv(first) == results_csv(second)
    assert results_md(first, DISCLAIMER) == results_md(second, DISCLAIMER)
    assert results_md(first, DISCLAIMER).endswith(f"\n\n{DISCLAIMER}\n")


def test_probes_of_other_images_are_listed_and_not_used(tmp_path: Path) -> None:
    folder = write_run(tmp_path, changed(), probes={"frame": 0.5, "header": 0.5, "corners": 1.0})
    for name, text in (("frame", "image_id\n"), ("corners", "")):
        (folder / "probes" / f"{name}-test.csv").write_text(text, encoding="utf-8")
    other = read_predictions(folder / "probes" / "header-test.csv", TASK.classes).assign(
        image_id=lambda t: "x" + t["image_id"]
    )
    other.to_csv(folder / "probes" / "header-test.csv", index=False)
    sweep, (result,) = measured(tmp_path)
    assert (result.probes, result.stress) == ([], [])
    assert [o.what for o in sweep.omissions] == [
        f"resnet18, fc, ce: {n}" for n in ("probe header", "probe frame", "corners")
    ]
    assert "is of other images than the run's own predictions" in sweep.omissions[0].reason


def test_stress_counts_changed_decisions(tmp_path: Path) -> None:
    table = predictions(TASK, skill=50.0)
    folder = write_run(tmp_path, changed(), table=table, probes={"corners": 50.0, "marker": 50.0})
    path = folder / "probes" / "marker-test.csv"
    swapped = table.copy()
    scores = [f"{kind}_{name}" for kind in ("logit", "prob") for name in TASK.classes]
    swapped.loc[:14, scores] = table.loc[30:44, scores].to_numpy()[::-1]
    swapped.to_csv(path, index=False)
    _, (result,) = measured(tmp_path)
    found = {s.stress: s for s in result.stress}
    assert (found["corners"].changed, found["corners"].change.value) == (0.0, 0.0)
    truth = np.array([TASK.classes.index(label) for label in table["label"]])
    wrong = (truth[:15] != truth[30:45][::-1]).mean() * 15 / 60
    assert found["marker"].changed == pytest.approx(wrong)
    assert found["marker"].change.high < 0


def test_a_recipe_probe_is_set_beside_its_sibling(results: list[ProtocolResult]) -> None:
    (result,) = results
    (border,) = [r for r in result.cells.values() if r.cell.probe]
    sibling = result.sibling(border.cell)
    assert sibling is not None
    assert sibling.cell.name == "resnet18, full, ce"
    assert [s.name for s in result.standings if "border" in s.name] == []


def test_leaky_twins_are_paired_by_image(tmp_path: Path) -> None:
    for group, skill in (("image", 3.0), ("patient", 1.0)):
        for loss in ("ce", "focal"):
            for fold in (0, 1):
                settings = changed(data__group=group, loss__name=loss, data__folds=2, data__fold=fold)
                write_run(tmp_path, settings, skill=skill + (loss == "focal"))
    _, results = measured(tmp_path)
    twins = measure_twins(results)
    assert [twin.cell for twin in twins] == ["resnet18, fc, ce", "resnet18, fc, focal", "mean over 2 cells"]
    tables = {r.protocol.leaky: r.protocol.cells[0].tables for r in results}
    (expected,) = compare_cells({"leaky": tables[True], "honest": tables[False]}, TASK, resamples=OPTIONS.resamples)
    assert twins[0].difference == pytest.approx(expected.difference)
    assert twins[2].difference.value == pytest.approx(np.mean([twin.difference.value for twin in twins[:2]]))


def test_twins_without_common_images_say_why(tmp_path: Path) -> None:
    write_run(tmp_path, changed(data__group="image"))
    write_run(tmp_path, changed(), table=predictions(TASK, n=59))
    (twin,) = measure_twins(measured(tmp_path)[1])
    assert "give both all folds of a cross-validation" in twin.why
    assert math.isnan(twin.difference.value)


def test_an_unknown_metric_is_refused_with_the_known_ones(grid: Path) -> None:
    with pytest.raises(InputError, match="metric=acuracy: no such score; choose one of accuracy, balanced_accuracy"):
        measured(grid, Options(metric="acuracy", resamples=50))
    with pytest.raises(InputError, match="metric=brier: less of it is better"):
        measured(grid, Options(metric="brier", resamples=50))


def test_published_counts_give_the_published_figures() -> None:
    said = {
        "ResNet18, fc": (0.89, 0.91),
        "VGG16, fc": (0.92, 0.93),
        "ResNet18, full": (0.95, 0.96),
        "VGG16, full": (0.95, 0.96),
    }
    for reference, (accuracy, f1) in zip(REFERENCES, said.values(), strict=False):
        scores = reference.scores()
        assert scores["accuracy"] == pytest.approx(accuracy, abs=0.01)
        assert scores["normal.f1"] == pytest.approx(f1, abs=0.01)
    dark = {reference.task: reference for reference in REFERENCES if reference.model == "DarkCovidNet"}
    assert round(100 * dark["binary"].scores()["accuracy"], 2) == 98.08
    assert round(100 * dark["three_class"].scores()["accuracy"], 2) == 87.02
    assert dark["binary"].accuracy() == proportion_interval(613, 625)


def test_a_published_figure_on_the_same_images_is_known_by_the_sets_name() -> None:
    assert [same for _, same in references(TASK, "darkcovidnet/manifest.csv")] == [True]
    assert [same for _, same in references(TASK, "imbalanced/manifest.csv")] == [False]
