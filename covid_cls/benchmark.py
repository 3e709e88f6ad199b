"""python -m covid_cls.benchmark: compare the training speed of a plain PyTorch loop and of covid_cls."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from covid_cls.runtime.cli import Job, call_command, run_command
from covid_cls.runtime.schema import check_section, check_sections

log = logging.getLogger(__name__)


class BenchmarkSettings(NamedTuple):
    """Schema of the settings that `train` does not have; conf/benchmark.yaml describes them."""

    output: str
    images: int | None
    rounds: int
    epochs: int
    start: bool
    growth: Sequence[int] | None
    keep: str | None


# Settings that `train` does not have, or that are replaced when its start is measured.
NOT_FOR_TRAIN = {*BenchmarkSettings._fields, "plain", "plain.workers", "plain.lightning"}
NOT_FOR_TRAIN |= {"output_root", "name", "rerun", "trainer.max_epochs"}


def benchmark(*overrides: str, **settings: Any) -> dict[str, Any]:
    """Measure a configuration, e.g. `benchmark("backbone=resnet18", rounds=3)`, and return benchmark.json.

    Args:
        *overrides: Words as on the command line.
        **settings: More settings by their names.

    Raises:
        InputError: A setting or the data set is wrong.
    """
    return call_command(_benchmark, "benchmark", overrides, settings)


def _benchmark(job: Job) -> dict[str, Any]:
    settings = job.settings
    # Imported late: --help and a misspelt key need no torch.
    from covid_cls.benchmarking import benchmark_page, measure
    from covid_cls.benchmarking.timing import time_starts
    from covid_cls.io import write_json
    from covid_cls.models.losses import check_weighting
    from covid_cls.models.transforms import Augment
    from covid_cls.reporting.figures import save_figure
    from covid_cls.reporting.html import text_table
    from covid_cls.training.feature_cache import fixed_views
    from covid_cls.training.settings import SECTIONS

    check_sections(settings, {**SECTIONS, "plain": _plain})
    check_section("", BenchmarkSettings, {name: settings[name] for name in BenchmarkSettings._fields})
    check_weighting(settings["loss"], settings["data"]["sampler"])
    fixed_views(settings["feature_cache"], Augment(**settings["augment"]), settings["strategy"])
    measure.check_options(settings)
    output = Path(settings["output"]).expanduser()
    result = {"command": job.command, **benchmark_page.surroundings(), "config": settings}
    if settings["growth"] is None:
        result |= measure.measure(settings, output)
        if settings["start"]:
            result["start"] = time_starts(_for_train(job.overrides))
        title, lead = benchmark_page.result_title(result), benchmark_page.headline(result)
        rows, chart = benchmark_page.result_rows(result), benchmark_page.result_chart(result, title)
    else:
        result |= measure.measure_growth(settings, output)
        title, lead = "growth with the number of images", ""
        rows, chart = benchmark_page.growth_rows(result["growth"]), benchmark_page.growth_chart(result["growth"])
    write_json(output / "benchmark.json", result)
    save_figure(chart, output / "benchmark.png")
    if settings["keep"]:
        section = benchmark_page.markdown_section(title, lead, result, rows)
        benchmark_page.append_section(Path(settings["keep"]).expanduser(), section)
    notes = [f"note: {note}" for note in result["notes"]]
    log.info("\n".join([title, text_table(rows), *([lead] if lead else []), *notes, f"results in {output}"]))
    return result


def _plain(workers: int, lightning: bool) -> None:
    """Schema of the section `plain`."""


def _for_train(overrides: Sequence[str]) -> list[str]:
    return [word for word in overrides if word.lstrip("+~").partition("=")[0] not in NOT_FOR_TRAIN]


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line and return the exit code."""
    return run_command(_benchmark, "benchmark", words, stopped="nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
