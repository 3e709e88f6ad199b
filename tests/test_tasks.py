"""Names become classes in one place: every spelling in use is known, and nothing else is."""

import pytest

from covid_cls.tasks import CLASSES, POSITIVE, TASKS, canonical

SPELLINGS = {
    "covid": (
        "covid",
        "Covid",
        "COVID",
        "COVID-19",
        "Covid-19",
        "covid_19",
        "covid 19",
        "COVID19",
        " COVID-19 ",
        "Covid-19 125",
        "COVID-19 (219)",
        "covid_125",
        "Covid-19_500",
        "nCoV",
        "SARS-CoV-2",
        "COVID-19 pneumonia",
        "Coronavirus",
    ),
    "normal": (
        "normal",
        "NORMAL",
        "Normal",
        "No_findings",
        "No Finding",
        "no-finding",
        "No_findings 500",
        "normal (500)",
        "Normal_1341",
        "healthy",
        "Control",
        "Non-COVID / normal",
    ),
    "pneumonia": (
        "pneumonia",
        "Pneumonia",
        "PNEUMONIA",
        "Pneumonia 500",
        "Viral Pneumonia",
        "viral_pneumonia",
        "Viral Pneumonia 1345",
        "Bacterial pneumonia",
        "Lung_Opacity",
        "Lung Opacity",
        "non-COVID pneumonia",
    ),
}


@pytest.mark.parametrize(("name", "label"), [(name, label) for label, names in SPELLINGS.items() for name in names])
def test_spellings_in_use_are_known(name: str, label: str) -> None:
    assert canonical(name) == label
    assert canonical(name.upper()) == label
    assert canonical(name.lower()) == label


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "_",
        "-19",
        "19",
        "125",
        "lung",
        "covidx",
        "xcovid",
        "non-covid",
        "normalcovid",
        "covid,normal",
        "abnormal",
    ],
)
def test_other_names_are_no_class(name: str) -> None:
    assert canonical(name) is None


@pytest.mark.parametrize(
    "name", ["train", "images", "masks", "metadata", "tuberculosis", "Covid-19 125 old", "no", "0", "1"]
)
def test_names_found_beside_classes_are_no_class(name: str) -> None:
    assert canonical(name) is None


def test_class_order_is_fixed() -> None:
    # an artifact's outputs mean these names in this order: changing it breaks every model that was ever saved
    assert CLASSES == ("covid", "normal", "pneumonia")
    assert POSITIVE == "covid"
    assert {name: task.classes for name, task in TASKS.items()} == {
        "binary": ("covid", "normal"),
        "three_class": ("covid", "normal", "pneumonia"),
        "three_class_multilabel": ("covid", "normal", "pneumonia"),
    }


def test_canonical_names_stand_for_themselves() -> None:
    assert [canonical(name) for name in CLASSES] == list(CLASSES)


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        ("binary", ((1, 0), (0, 1))),
        ("three_class", ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
        ("three_class_multilabel", ((1, 0, 1), (0, 1, 0), (0, 0, 1))),  # covid implies pneumonia
    ],
)
def test_targets(task: str, targets: tuple[tuple[int, ...], ...]) -> None:
    assert TASKS[task].targets == targets


def test_only_the_multilabel_task_is_multilabel() -> None:
    assert [name for name, task in TASKS.items() if task.multilabel] == ["three_class_multilabel"]
