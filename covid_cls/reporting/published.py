"""Figures that others published, with their protocols: to stand beside ours, not to be ranked with them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from covid_cls.evaluation.intervals import Interval, proportion_interval
from covid_cls.evaluation.resampling import weighted_scores
from covid_cls.labels import TASKS, Task

SEED = "the work this project starts from"
DARKCOVIDNET = "DarkCovidNet (Ozturk et al. 2020)"
_SEED_PROTOCOL = (
    "one run on 1,500 images of its own, which are not public; computed here from its confusion matrices, and within "
    "a point of the accuracies it names (89, 92, 95 and 95 %)"
)
_LABELS_PROTOCOL = (
    "one run on validation images of its own; F1 as published, which does not agree with the counts beside it"
)
_DARK_PROTOCOL = "5-fold cross-validation split by image, each fold's validation part reported, no separate test set"
_DECIDED = ("accuracy", "balanced_accuracy", "macro_f1")
_DECIDED_PER_CLASS = ("sensitivity", "specificity", "ppv", "npv", "f1")


class Reference(NamedTuple):
    """A published result. counts: its confusion matrix, rows truth and columns decision in the task's order, or None.

    correct, images: how many of how many images were decided rightly (from the published accuracy where no counts
    were given). said: the figures as published, by flat score name, where counts do not give them.
    """

    work: str
    model: str
    task: str
    protocol: str
    images: int | None = None
    correct: int | None = None
    counts: tuple[tuple[int, ...], ...] | None = None
    said: tuple[tuple[str, float], ...] = ()

    def scores(self) -> dict[str, float]:
        """Every score that the published counts determine, and those said beside them, by flat name."""
        found = dict(self.said)
        if self.correct is not None and self.images is not None:
            found["accuracy"] = self.correct / self.images
        return found | (_scores_of(self.counts, TASKS[self.task]) if self.counts else {})

    def accuracy(self, level: float = 0.95) -> Interval | None:
        """The accuracy with its Wilson interval, as if images were independent; None where no count is known."""
        if self.counts:
            matrix = np.array(self.counts)
            return proportion_interval(int(matrix.trace()), int(matrix.sum()), level)
        if self.correct is None or self.images is None:
            return None
        return proportion_interval(self.correct, self.images, level)


REFERENCES: Sequence[Reference] = (
    Reference(SEED, "ResNet18, fc", "binary", _SEED_PROTOCOL, counts=((504, 111), (49, 836))),
    Reference(SEED, "VGG16, fc", "binary", _SEED_PROTOCOL, counts=((550, 65), (65, 820))),
    Reference(SEED, "ResNet18, full", "binary", _SEED_PROTOCOL, counts=((554, 61), (5, 880))),
    Reference(SEED, "VGG16, full", "binary", _SEED_PROTOCOL, counts=((557, 58), (5, 880))),
    # Published as 98.08 % of 625 images and 87.02 % of 1,125: the counts are implied.
    Reference(DARKCOVIDNET, "DarkCovidNet", "binary", _DARK_PROTOCOL, images=625, correct=613),
    Reference(DARKCOVIDNET, "DarkCovidNet", "three_class", _DARK_PROTOCOL, images=1125, correct=979),
    *(
        Reference(SEED, model, "three_class_multilabel", _LABELS_PROTOCOL, said=said)
        for model, said in {
            "ResNet18, focal": (("label_accuracy", 0.95), ("covid_f1_at_half", 0.69)),
            "ResNet18, without focal": (("label_accuracy", 0.96), ("covid_f1_at_half", 0.68)),
            "VGG16, focal": (("label_accuracy", 0.96), ("covid_f1_at_half", 0.83)),
            "VGG16, without focal": (("label_accuracy", 0.96), ("covid_f1_at_half", 0.90)),
        }.items()
    ),
)


def references(task: Task, data: str) -> list[tuple[Reference, bool]]:
    """The published results of a task, and whether each was measured on the data set named `data`."""
    return [(r, r.work == DARKCOVIDNET and "darkcovidnet" in data.lower()) for r in REFERENCES if r.task == task.name]


def _scores_of(counts: Sequence[Sequence[int]], task: Task) -> dict[str, float]:
    """The scores of a confusion matrix that follow from decisions alone."""
    size = len(task.classes)
    truth, decided = (index.ravel() for index in np.indices((size, size)))  # one image a cell, weighted by its count
    names = [*_DECIDED, *(f"{name}.{score}" for name in task.classes for score in _DECIDED_PER_CLASS)]
    weights = np.array(counts).reshape(1, -1)
    return {
        name: float(value[0])
        for name, value in weighted_scores(truth, np.eye(size)[decided], decided, task, weights, names).items()
    }
