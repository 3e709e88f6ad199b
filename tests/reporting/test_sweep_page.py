"""The page and the tables of a sweep, made from run folders with random predictions."""

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
from covid_cls.evaluation.comparison import compare_configurations, score_configurations
from covid_cls.evaluation.intervals import proportion_interval
from covid_cls.evaluation.metrics import point_scores
from covid_cls.evaluation.predictions import pool_folds
from covid_cls.io import DISCLAIMER, read_predictions
from covid_cls.reporting.sweep_analysis import ProtocolResult, ReportOptions, analyse_protocol, compare_split_pairs
from covid_cls.reporting.sweep_loading import LoadedSweep, find_runs, load_sweep
from covid_cls.reporting.sweep_page import About, report_page
from covid_cls.reporting.sweep_tables import (
    CSV_COLUMNS,
    REFERENCES,
    common_runs,
    grid_table,
    references,
    results_csv,
    results_md,
)
from covid_cls.tasks import TASKS
from tests.reporting.sweeps import changed, predictions, write_grid, write_run

TASK = TASKS["three_class"]
OPTIONS = ReportOptions(resamples=100)


class Page(HTMLParser):
    """The text of a page, its ids and links, and the tags that were not closed."""

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


def measured(root: Path, options: ReportOptions = OPTIONS) -> tuple[LoadedSweep, list[ProtocolResult]]:
    sweep = load_sweep(find_runs(root), "report")
    results = []
    for protocol in sweep.protocols:
        result, omissions = analyse_protocol(protocol, options)
        results.append(result)
        sweep.omissions.extend(omissions)
    return sweep, results


def page(root: Path, options: ReportOptions = OPTIONS) -> Page:
    return page_of(*measured(root, options))


def page_of(sweep: LoadedSweep, results: list[ProtocolResult]) -> Page:
    about = About(
        "Report of demo", "python -m covid_cls.report", datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)
    )
    text = report_page(sweep, results, compare_split_pairs(results), sweep.omissions, about)
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
def grid_measured(grid: Path) -> tuple[LoadedSweep, list[ProtocolResult]]:
    return measured(grid)


@pytest.fixture(scope="module")
def results(grid_measured: tuple[LoadedSweep, list[ProtocolResult]]) -> list[ProtocolResult]:
    return grid_measured[1]


@pytest.fixture(scope="module")
def shown(grid_measured: tuple[LoadedSweep, list[ProtocolResult]]) -> Page:
    return page_of(*grid_measured)


def test_the_page_needs_no_other_file(shown: Page) -> None:
    assert all(link.startswith("#") for link in shown.links)
    assert len(shown.ids) == len(set(shown.ids))
    assert {link[1:] for link in shown.links} <= set(shown.ids)
    assert shown.text.count(DISCLAIMER) == 2


def test_the_page_starts_with_the_verdict_then_facts_then_the_grid(shown: Page) -> None:
    order = [
        "not evidence of disease detection: source predicts label (Cramér's V 1.00)",
        "of 8 configurations are shown to beat every baseline that cannot see the disease",
        "60 of 30 patients: 20 covid, 20 normal, 20 pneumonia",
        "including this report",
        "random weights (18 runs)",
        "Mean ± standard deviation over runs",
        "DarkCovidNet (Ozturk et al. 2020)",
        "the outer 6 of 64 pixels",
        "pairs differ at Holm-corrected p < 0.05",
        "vgg16 - resnet18",
        "variance due to the seed, %",
        "truth \\ decision",
        "Reliability of p(covid)",
        "hospital_b",
        "no protocol was trained both with data.group=image and",
        "ECE of p(covid)",
        "every run in the folder is in the report",
        "No seed is selected",
    ]
    places = [shown.text.index(words) for words in order]
    assert places == sorted(places)


def test_a_single_seed_without_baselines_is_reported_as_such(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    text = page(tmp_path).text
    assert "single seed" in text
    assert "was not compared with any shortcut baseline" in text
    assert "No shortcut baselines were found for these runs" in text
    assert "nan" not in re.findall(r"\bnan\b", text)


def test_different_numbers_of_seeds_are_shown_in_a_column(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    for seed in (0, 1):
        write_run(tmp_path, changed(seed=seed, loss__name="focal"))
    _, results = measured(tmp_path)
    headers, table, _ = grid_table(results[0])
    assert headers[3] == "runs"
    assert [row[3] for row in table] == ["single seed", "2 seeds"]


def test_test_set_accesses_are_counted_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    for count in (1, 2):
        assert f"test-set accesses {count}, including this report; the first was on" in page(tmp_path).text


def test_failed_runs_are_listed_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    write_run(tmp_path, changed(seed=1), status="failed", reason="MemoryError")
    assert "failed MemoryError" in page(tmp_path).text


def test_names_from_the_user_cannot_become_markup(tmp_path: Path) -> None:
    settings = changed(data__path="sets/<script>a/manifest.csv")
    table = predictions(TASK).assign(source="<script>b")
    write_run(tmp_path, settings, table=table, notes=["<script>c"], device={"gpu": "<script>d"})
    write_run(tmp_path, changed(seed=1), status="failed", reason="<script>e")
    text = page(tmp_path).text
    # A parser that met a script element would not have seen these as text.
    for name in "abcde":
        assert f"<script>{name}" in text


def test_a_leaky_split_is_named_first(tmp_path: Path) -> None:
    write_run(tmp_path, changed(data__group="image"), notes=["LEAKY SPLIT: by image"])
    text = page(tmp_path).text
    assert text.index("split by image: LEAKY") < 150
    assert "LEAKY SPLIT: by image (1 run)" in text


@pytest.mark.parametrize("task", ["binary", "three_class_multilabel"])
def test_each_task_has_its_own_columns_and_published_results(tmp_path: Path, task: str) -> None:
    for seed in (0, 1):
        write_run(tmp_path, changed(task__name=task, seed=seed), baselines={"frame": 0.5})
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
    assert {row["configuration"] for row in rows if not row["backbone"]} == {"baseline: frame", "baseline: majority"}
    assert {(row["n_images"], row["n_patients"], row["n_folds"]) for row in rows} == {("60", "30", "1")}


def test_folds_are_pooled_for_the_score_but_not_for_its_standard_deviation(tmp_path: Path) -> None:
    for fold in (0, 1):
        write_run(tmp_path, changed(data__folds=2, data__fold=fold), baselines={"header": 0.5})
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
    (baseline,) = results[0].baselines
    assert len(baseline.scores.truth) == 60


def test_the_same_folder_gives_the_same_bytes(grid: Path, results: list[ProtocolResult]) -> None:
    first, second = results, measured(grid)[1]
    assert results_csv(first) == results_csv(second)
    assert results_md(first, DISCLAIMER) == results_md(second, DISCLAIMER)
    assert results_md(first, DISCLAIMER).endswith(f"\n\n{DISCLAIMER}\n")


def test_baselines_of_other_images_are_listed_and_not_used(tmp_path: Path) -> None:
    folder = write_run(tmp_path, changed(), baselines={"frame": 0.5, "header": 0.5, "corners": 1.0})
    for name, text in (("frame", "image_id\n"), ("corners", "")):
        (folder / "baselines" / f"{name}-test.csv").write_text(text, encoding="utf-8")
    other = read_predictions(folder / "baselines" / "header-test.csv", TASK.classes).assign(
        image_id=lambda t: "x" + t["image_id"]
    )
    other.to_csv(folder / "baselines" / "header-test.csv", index=False)
    sweep, (result,) = measured(tmp_path)
    assert (result.baselines, result.perturbations) == ([], [])
    assert [o.what for o in sweep.omissions] == [
        f"resnet18, fc, ce: {n}" for n in ("baseline header", "baseline frame", "corners")
    ]
    assert "holds other images than the predictions of the run" in sweep.omissions[0].reason


def test_perturbation_tests_count_changed_decisions(tmp_path: Path) -> None:
    table = predictions(TASK, skill=50.0)
    folder = write_run(tmp_path, changed(), table=table, baselines={"corners": 50.0, "marker": 50.0})
    path = folder / "baselines" / "marker-test.csv"
    swapped = table.copy()
    scores = [f"{kind}_{name}" for kind in ("logit", "prob") for name in TASK.classes]
    swapped.loc[:14, scores] = table.loc[30:44, scores].to_numpy()[::-1]
    swapped.to_csv(path, index=False)
    _, (result,) = measured(tmp_path)
    found = {s.perturbation: s for s in result.perturbations}
    assert (found["corners"].changed, found["corners"].change.value) == (0.0, 0.0)
    truth = np.array([TASK.classes.index(label) for label in table["label"]])
    wrong = (truth[:15] != truth[30:45][::-1]).mean() * 15 / 60
    assert found["marker"].changed == pytest.approx(wrong)
    assert found["marker"].change.high < 0


def test_a_network_trained_on_borders_is_compared_with_the_same_network_on_entire_images(
    results: list[ProtocolResult],
) -> None:
    (result,) = results
    (border,) = [r for r in result.configurations.values() if r.configuration.baseline]
    sibling = result.sibling(border.configuration)
    assert sibling is not None
    assert sibling.name == "resnet18, full, ce"
    assert [s.name for s in result.ranking if "border" in s.name] == []


def test_leaky_and_patient_wise_splits_are_paired_by_image(tmp_path: Path) -> None:
    for group, skill in (("image", 3.0), ("patient", 1.0)):
        for loss in ("ce", "focal"):
            for fold in (0, 1):
                settings = changed(data__group=group, loss__name=loss, data__folds=2, data__fold=fold)
                write_run(tmp_path, settings, skill=skill + (loss == "focal"))
    _, results = measured(tmp_path)
    split_pairs = compare_split_pairs(results)
    assert [split_pair.configuration for split_pair in split_pairs] == [
        "resnet18, fc, ce",
        "resnet18, fc, focal",
        "mean over 2 configurations",
    ]
    tables = {r.protocol.leaky: r.protocol.configurations[0].tables for r in results}
    pair = {"leaky": tables[True], "patient-wise": tables[False]}
    (expected,) = compare_configurations(score_configurations(pair, TASK, resamples=OPTIONS.resamples))
    assert split_pairs[0].difference == pytest.approx(expected.difference)
    assert split_pairs[2].difference.value == pytest.approx(
        np.mean([split_pair.difference.value for split_pair in split_pairs[:2]])
    )


def test_split_pairs_without_common_images_state_the_problem(tmp_path: Path) -> None:
    write_run(tmp_path, changed(data__group="image"))
    write_run(tmp_path, changed(), table=predictions(TASK, n=59))
    (split_pair,) = compare_split_pairs(measured(tmp_path)[1])
    assert "train all folds of a cross-validation under both splits" in split_pair.problem
    assert math.isnan(split_pair.difference.value)


def test_an_unknown_metric_is_refused_with_the_known_ones(grid: Path) -> None:
    with pytest.raises(InputError, match="metric=acuracy: no such score; choose one of accuracy, balanced_accuracy"):
        measured(grid, ReportOptions(metric="acuracy", resamples=50))
    with pytest.raises(InputError, match="metric=brier: lower values are better"):
        measured(grid, ReportOptions(metric="brier", resamples=50))


def test_published_counts_give_the_published_scores() -> None:
    published = {
        "ResNet18, fc": (0.89, 0.91),
        "VGG16, fc": (0.92, 0.93),
        "ResNet18, full": (0.95, 0.96),
        "VGG16, full": (0.95, 0.96),
    }
    for reference, (accuracy, f1) in zip(REFERENCES, published.values(), strict=False):
        scores = reference.scores()
        assert scores["accuracy"] == pytest.approx(accuracy, abs=0.01)
        assert scores["normal.f1"] == pytest.approx(f1, abs=0.01)
    dark = {reference.task: reference for reference in REFERENCES if reference.model == "DarkCovidNet"}
    assert round(100 * dark["binary"].scores()["accuracy"], 2) == 98.08
    assert round(100 * dark["three_class"].scores()["accuracy"], 2) == 87.02
    assert dark["binary"].accuracy() == proportion_interval(613, 625)


def test_published_results_on_the_same_images_are_recognised_by_the_name_of_the_data_set() -> None:
    assert [same for _, same in references(TASK, "darkcovidnet/manifest.csv")] == [True]
    assert [same for _, same in references(TASK, "imbalanced/manifest.csv")] == [False]
