"""Figures show the numbers that they are given."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from covid_cls.evaluation.metrics import class_scores, decide, roc_points
from covid_cls.evaluation.predictions import truth_and_prob
from covid_cls.io import prediction_columns
from covid_cls.reporting.figures import confusion_matrix, image_sheet, learning_curves, roc_curves, save_figure
from covid_cls.reporting.style import CLASS_COLOURS
from covid_cls.tasks import TASKS

ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def history(n):
    epoch = np.arange(n)
    return pd.DataFrame({"epoch": epoch, "loss/train": 1 / (1 + epoch), "loss/val": 1.2 / (1 + epoch)})


def predictions(task, n=60):
    rng = np.random.default_rng(0)
    truth = np.arange(n) % len(task.classes)
    logit = rng.normal(size=(n, len(task.classes))) + 2 * np.array(task.targets)[truth]
    prob = 1 / (1 + np.exp(-logit)) if task.multilabel else np.exp(logit)
    if not task.multilabel:
        prob /= prob.sum(axis=1, keepdims=True)
    table = pd.DataFrame({"image_id": np.arange(n).astype(str), "label": [task.classes[k] for k in truth]})
    for k, name in enumerate(task.classes):
        table[f"logit_{name}"], table[f"prob_{name}"] = logit[:, k], prob[:, k]
    return table.reindex(columns=prediction_columns(task.classes), fill_value="")


def curves(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def overlaps(figure):
    """Return pairs of visible texts that overlap in the drawn figure."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    texts = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
    texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)]


@pytest.mark.parametrize("n", [1, 2, 50])
def test_learning_curves_show_the_logged_values(n):
    table = history(n)
    figure = learning_curves(table, "loss", best_epoch=0)
    lines = curves(figure)
    for split in ("train", "val"):
        np.testing.assert_array_equal(lines[split].get_xdata(), table["epoch"])
        np.testing.assert_array_equal(lines[split].get_ydata(), table[f"loss/{split}"])
    assert list(lines["selected: epoch 0"].get_xdata()) == [0, 0]
    assert legend(figure) == ["train", "val", "selected: epoch 0"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("epoch", "loss")
    assert overlaps(figure) == []
    assert all(float(tick) == int(tick) for tick in figure.axes[0].get_xticks())


def test_a_single_epoch_is_a_visible_point():
    assert curves(learning_curves(history(1), "loss"))["val"].get_marker() == "o"


def test_a_curve_connects_the_epochs_that_have_a_value():
    table = history(10)
    table.loc[table["epoch"] % 5 != 4, "loss/val"] = np.nan
    lines = curves(learning_curves(table, "loss"))
    assert list(lines["val"].get_xdata()) == [4, 9]
    assert len(lines["train"].get_xdata()) == 10


def test_a_split_without_values_has_no_curve():
    figure = learning_curves(history(3).drop(columns="loss/val"), "loss")
    assert legend(figure) == ["train"]


def test_a_metric_that_was_not_logged_gives_a_message():
    axes = learning_curves(history(3), "accuracy").axes[0]
    assert [text.get_text() for text in axes.texts] == ["no accuracy was logged"]
    assert axes.get_ylabel() == "accuracy (fraction of images)"
    assert axes.get_legend() is None


@pytest.mark.parametrize(
    ("counts", "fields"),
    [
        ([[45, 5], [0, 1234]], ["45\n90.0%", "5\n10.0%", "0\n0.0%", "1234\n100.0%"]),
        (
            [[8, 1, 1], [0, 9, 1], [2, 2, 6]],
            ["8\n80.0%", "1\n10.0%", "1\n10.0%", "0\n0.0%", "9\n90.0%", "1\n10.0%", "2\n20.0%", "2\n20.0%", "6\n60.0%"],
        ),
        ([[3, 1], [0, 0]], ["3\n75.0%", "1\n25.0%", "0\n–", "0\n–"]),
    ],
    ids=["two classes", "three classes", "a class without images"],
)
def test_the_confusion_matrix_shows_counts_and_shares_of_each_row(counts, fields):
    classes = ("covid", "normal", "pneumonia")[: len(counts)]
    figure = confusion_matrix(np.array(counts), classes, "test split")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == fields
    assert [text.get_text() for text in axes.get_xticklabels()] == list(classes)
    rows = [f"{name}\nn = {sum(row)}" for name, row in zip(classes, counts, strict=True)]
    assert [text.get_text() for text in axes.get_yticklabels()] == rows
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("test split", "decision", "truth")
    assert overlaps(figure) == []


def luminance(colour):
    channels = np.array([int(to_hex(colour)[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_text_is_legible_on_every_shade():
    axes = confusion_matrix([[100, 0], [50, 50]], ("covid", "normal"), "").axes[0]
    image, text = axes.images[0], luminance(axes.texts[0].get_color())
    for share in np.linspace(0, 1, 11):
        assert (luminance(image.cmap(image.norm(share))) + 0.05) / (text + 0.05) >= 4.5  # contrast of WCAG 2.1 AA


@ALL_TASKS
def test_roc_curves_have_the_points_colour_and_auroc_of_their_class(task):
    table = predictions(task)
    truth, prob = truth_and_prob(table, task)
    scores = class_scores(truth, prob, decide(prob, task), task)
    figure = roc_curves(table, task)
    lines = figure.axes[0].lines[1:]
    for name, line in zip(task.classes, lines, strict=True):
        np.testing.assert_array_equal(line.get_xydata().T, roc_points(truth, prob, task)[name])
        assert line.get_color() == CLASS_COLOURS[name]
        assert line.get_label().startswith(name)
        assert line.get_label().endswith(f"AUROC {scores[name]['auroc']:.3f}")
    assert legend(figure)[0] == "chance, AUROC 0.5"
    assert ("pneumonia (with covid)" in "".join(legend(figure))) == task.multilabel
    assert overlaps(figure) == []


def test_a_class_without_images_is_in_the_legend():
    task = TASKS["three_class"]
    table = predictions(task)
    with pytest.warns(UserWarning, match="'normal'"):
        figure = roc_curves(table[table["label"] != "normal"], task)
    assert legend(figure)[2] == "normal, AUROC undefined"
    assert len(curves(figure)["normal, AUROC undefined"].get_xdata()) == 0


def test_a_saved_figure_is_a_png_of_its_size_without_temporary_files(tmp_path):
    path = tmp_path / "figures" / "loss.png"
    figure = learning_curves(history(3), "loss")
    save_figure(figure, path)
    with Image.open(path) as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (960, 600))
    assert [file.name for file in path.parent.iterdir()] == ["loss.png"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(learning_curves(history(3), "loss"), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_can_draw_at_the_same_time(tmp_path):
    def draw(k):
        save_figure(confusion_matrix([[k, 1], [1, 9]], ("covid", "normal"), "x"), tmp_path / f"{k}.png")
        return (tmp_path / f"{k}.png").read_bytes()

    alone = [draw(k) for k in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(4))) == alone


def test_a_sheet_shows_each_image_below_its_caption():
    images = np.arange(5, dtype=np.uint8)[:, None, None] * np.full((1, 8, 8), 50, dtype=np.uint8)
    names = [f"image {k}" for k in range(5)]
    sheet = image_sheet(list(images), names, columns=3)
    used = [axes for axes in sheet.axes if axes.images]
    assert [axes.get_title() for axes in used] == names
    assert len(sheet.axes) == 2 * 3
    for axes, image in zip(used, images, strict=True):
        (shown,) = axes.images
        np.testing.assert_array_equal(shown.get_array(), image)
        # A dark image stays dark.
        assert shown.get_clim() == (0, 255)


def test_a_sheet_without_images_is_empty():
    assert not any(axes.images for axes in image_sheet([], []).axes)


def test_an_image_without_a_caption_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        image_sheet([np.zeros((8, 8), dtype=np.uint8)] * 2, ["one"])
