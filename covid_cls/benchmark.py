"""python -m covid_cls.benchmark: how fast the plain loop and covid_cls train one cell of the grid, in turn."""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from covid_cls.command import check_section, plain, run_command

log = logging.getLogger(__name__)
KEYS = ("output", "images", "rounds", "epochs", "plain", "start", "growth", "keep")  # not train's
_REPLACED = ("output_root", "name", "rerun", "trainer.max_epochs")  # by time_starts


def benchmark(cfg: DictConfig) -> None:
    """Measure the cell that `cfg` describes; benchmark.json and benchmark.png in `output`, a table on the console."""
    settings = plain(cfg)
    # Imported late: --help and a misspelt key need no torch.
    from covid_cls.models.losses import check_weighting
    from covid_cls.models.transforms import Augment
    from covid_cls.speed.measure import check_options
    from covid_cls.speed.report import surroundings
    from covid_cls.training.features import fixed_views
    from covid_cls.training.sections import SECTIONS

    for name, constructor in SECTIONS.items():
        check_section(name, constructor, settings[name])
    check_weighting(settings["loss"], settings["data"]["sampler"])
    fixed_views(settings["feature_cache"], Augment(**settings["augment"]), settings["strategy"])
    check_options(settings)
    overrides = list(HydraConfig.get().overrides.task)
    command = shlex.join(["python", "-m", "covid_cls.benchmark", *overrides])
    about = {"command": command, **surroundings(), "config": settings}
    if settings["growth"] is None:
        _measure_cell(settings, overrides, about)
    else:
        _measure_growth(settings, about)


def _measure_cell(settings: dict[str, Any], overrides: list[str], about: dict[str, Any]) -> None:
    from covid_cls.speed.charts import result_chart
    from covid_cls.speed.measure import measure
    from covid_cls.speed.report import headline, result_rows
    from covid_cls.speed.start import time_starts

    baseline = "Lightning loop" if settings["plain"]["lightning"] else "plain loop"
    result = {**about, "baseline": baseline, **measure(settings, Path(settings["output"]))}
    if settings["start"]:
        result["start"] = time_starts([word for word in overrides if not _own(word)])
    depth = settings["strategy"]["freeze_until"] or settings["strategy"]["name"]
    title = f"{settings['backbone']['name']}, {depth}, {result['images']['images']} images on {result['device']}"
    _write(settings, result, result_chart(result, title), title, headline(result), result_rows(result))


def _measure_growth(settings: dict[str, Any], about: dict[str, Any]) -> None:
    from covid_cls.models.transforms import Augment
    from covid_cls.speed.charts import growth_chart
    from covid_cls.speed.growth import measure_growth
    from covid_cls.speed.report import growth_rows

    data, crop = settings["data"], settings["preprocess"]["crop"]
    sides = {"size": data["size"], "canvas": Augment(**settings["augment"]).canvas(crop), "crop": crop}
    records = measure_growth(settings["growth"], Path(settings["output"]), **sides, batch_size=data["batch_size"])
    result = {**about, "growth": records, "notes": ["Drawn radiographs; no network."]}
    _write(settings, result, growth_chart(records), "growth with the number of images", "", growth_rows(records))


def _write(
    settings: dict[str, Any], result: dict[str, Any], chart: Any, title: str, lead: str, rows: list[tuple[str, ...]]
) -> None:
    from covid_cls.records import write_json
    from covid_cls.reporting.figures import save_figure
    from covid_cls.reporting.text import text_table
    from covid_cls.speed.report import append_section, markdown_section

    output = Path(settings["output"])
    write_json(output / "benchmark.json", result)
    save_figure(chart, output / "benchmark.png")
    if settings["keep"]:
        append_section(Path(settings["keep"]).expanduser(), markdown_section(title, lead, result, rows))
    notes = [f"note: {note}" for note in result["notes"]]
    log.info("\n".join([title, text_table(rows), *([lead] if lead else []), *notes, f"results in {output}"]))


def _own(override: str) -> bool:
    """Whether a word of the command line is the benchmark's own and not train's."""
    key = override.lstrip("+~").partition("=")[0]
    return key.partition(".")[0] in KEYS or key in _REPLACED


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line; return the exit code."""
    return run_command(benchmark, "benchmark", words, stopped="nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
