"""A result as table, Markdown section and chart."""

from pathlib import Path

import pytest

from covid_cls.benchmarking.benchmark_page import (
    append_section,
    growth_chart,
    growth_rows,
    headline,
    markdown_section,
    result_chart,
    result_rows,
    surroundings,
)
from covid_cls.reporting.html import text_table
from tests.benchmarking.small import result

GROWTH = [
    {
        "images": count,
        "store_bytes": count * 100_000,
        "build_seconds": count / 100,
        "reopen_seconds": 0.5,
        "epoch_seconds": 2.0,
        "images_per_second": 600.0,
        "peak_bytes": 500_000_000,
    }
    for count in (1000, 2000)
]


def test_the_headline_has_the_ratio_and_its_spread() -> None:
    assert "4.00 times as fast as the plain loop" in headline(result())
    assert "4.00 to 8.00 over 3 rounds" in headline(result())


def test_the_table_marks_extrapolated_values() -> None:
    rows = {name: cells for name, *cells in result_rows(result())}
    assert rows["images/s"] == ["25.0", "100"]
    assert rows["ms per image, data"] == ["20.000", "5.000"]
    assert rows["share of the device's measured peak"] == ["25%", "25%"]
    assert rows["seconds to 5 epochs from an empty cache"] == ["20.0 (extrapolated)", "8.0"]
    assert "peak memory of the GPU, MB" not in rows


def test_columns_of_a_text_table_are_aligned() -> None:
    lines = text_table([("", "a"), ("name", "12.5")]).splitlines()
    assert lines == ["         a", "name  12.5"]


def test_the_growth_table_has_a_row_per_size() -> None:
    heading, *rows = growth_rows(GROWTH)
    assert rows[1] == ("2,000", "200", "20.00", "0.50", "2.00", "600", "500")
    assert len(heading) == len(rows[0])


def test_a_kept_result_is_added_as_the_last_section(tmp_path: Path) -> None:
    about = {**surroundings(), "command": "python -m covid_cls.benchmark rounds=3", **result()}
    path = tmp_path / "benchmarks.md"
    path.write_text("# Benchmarks\n", encoding="utf-8")
    for title in ("first", "second"):
        append_section(path, markdown_section(title, headline(about), about, result_rows(about)))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Benchmarks"
    assert [line for line in lines if line.startswith("### ")] == [
        f"### {about['date'][:10]}: {title}" for title in ("first", "second")
    ]
    assert lines.count("python -m covid_cls.benchmark rounds=3") == 2
    assert lines.count("| images/s | 25.0 | 100 |") == 2
    assert sum(f"torch {about['versions']['torch']}" in line for line in lines) == 2
    assert sum(about["hardware"]["cpu"] in line for line in lines) == 2


def test_bars_have_the_length_of_the_values() -> None:
    left, right = result_chart(result(), "resnet18").axes
    assert [bar.get_width() for bar in left.patches] == [25.0, 100.0, 125.0]
    spans = [segment[:, 0].tolist() for segment in left.collections[0].get_segments()]
    assert spans == [[12.5, pytest.approx(100 / 3)], [100.0, 200.0], [125.0, 125.0]]
    assert [bar.get_width() for bar in right.patches] == [20, 5, 10, 2.5, 10, 2.5]
    assert [bar.get_x() for bar in right.patches] == [0, 0, 20, 5, 30, 7.5]


def test_growth_is_plotted_against_the_number_of_images() -> None:
    memory, before, speed = growth_chart(GROWTH).axes
    drawn = [axes.lines[0].get_xydata().tolist() for axes in (memory, before, speed)]
    assert drawn == [[[1000, 500], [2000, 500]], [[1000, 10], [2000, 20]], [[1000, 600], [2000, 600]]]
