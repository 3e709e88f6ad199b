"""Class names, their order and their aliases: the only module that maps class indices to names."""

import re
from dataclasses import dataclass

CLASSES = ("covid", "normal", "pneumonia")
POSITIVE = "covid"

# Only lower-case letters and digits, because `canonical` removes everything else before the lookup.
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
    """Return the class that a label or folder name means, or None if it means no class.

    Examples: "COVID-19" is covid, "No_findings" is normal, "Viral Pneumonia" is pneumonia. Case, spaces, punctuation
    and a number of images after the name ("normal (500)") are ignored.
    """
    # First with all digits, since "covid-19" ends with a number that belongs to the name.
    for text in (name, re.sub(r"[\s_(\-]+\d+\)?\s*$", "", name)):
        found = _BY_ALIAS.get(re.sub(r"[^a-z0-9]", "", text.lower()))
        if found:
            return found
    return None


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: The name in the configuration group `task`.
        classes: Class names in the order of the network's outputs; the positive class, covid, is first.
        multilabel: False for one softmax over the classes. True for one sigmoid per class, where a covid image is also
            positive for pneumonia (target [1, 0, 1]).
    """

    name: str
    classes: tuple[str, ...]
    multilabel: bool = False

    @property
    def targets(self) -> tuple[tuple[int, ...], ...]:
        """Return the 0/1 target vectors: row k belongs to an image whose class has index k."""
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
