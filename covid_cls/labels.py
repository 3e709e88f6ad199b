"""Class names, their order and their aliases: the only place where an index meets a name."""

import re
from dataclasses import dataclass

CLASSES = ("covid", "normal", "pneumonia")
POSITIVE = "covid"

# Lower case, letters and digits only: `canonical` strips everything else before it looks here.
_ALIASES = {
    "covid": ("covid", "covid19", "covid2019", "ncov", "sarscov2", "coronavirus", "covidpneumonia", "covid19pneumonia"),
    "normal": ("normal", "nofinding", "nofindings", "healthy", "control", "noncovidnormal"),
    "pneumonia": (
        "pneumonia",
        "viralpneumonia",
        "bacterialpneumonia",
        "viral",
        "bacterial",
        "lungopacity",
        "noncovidpneumonia",
        "othernoncovidpneumonia",
    ),
}
_BY_ALIAS = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}


def canonical(name: str) -> str | None:
    """The class that `name` means ("COVID-19", "No_findings", "Viral Pneumonia"), or None if it names none.

    Case, spaces and punctuation do not count, nor does a count behind the name ("Covid-19 125", "normal (500)").
    """
    for text in (name, re.sub(r"[\s_(\-]+\d+\)?\s*$", "", name)):
        found = _BY_ALIAS.get(re.sub(r"[^a-z0-9]", "", text.lower()))
        if found:
            return found
    return None


@dataclass(frozen=True)
class Task:
    """A set of classes in their fixed order and how their scores relate.

    multilabel=False: one softmax over `classes`. multilabel=True: one sigmoid per class, and a covid image is also
    positive for pneumonia (target [1, 0, 1]).
    """

    name: str
    classes: tuple[str, ...]
    multilabel: bool = False

    @property
    def targets(self) -> tuple[tuple[int, ...], ...]:
        """Row k: the 0/1 target vector of an image whose class has index k."""
        size = len(self.classes)
        rows = [[int(i == k) for i in range(size)] for k in range(size)]
        if self.multilabel:
            rows[self.classes.index("covid")][self.classes.index("pneumonia")] = 1
        return tuple(tuple(row) for row in rows)


TASKS = {
    task.name: task
    for task in (
        Task("binary", ("covid", "normal")),
        Task("three_class", CLASSES),
        Task("three_class_multilabel", CLASSES, multilabel=True),
    )
}
