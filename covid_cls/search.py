"""python -m covid_cls.search: the learning rate of a cell, chosen by validation scores alone."""

import logging
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from covid_cls.command import check_section, plain, recipe, run_command
from covid_cls.errors import InputError
from covid_cls.multirun import cell_options, this_start
from covid_cls.sweep import Sweep, gpu_slots, run_cell

if TYPE_CHECKING:
    from covid_cls.reporting.search import RateSearch

log = logging.getLogger(__name__)


def search(cfg: DictConfig) -> None:
    """Train the cell that `cfg` describes at one rate after another; a table, search.json and the line for the best."""
    # Imported late: --help and a misspelt key need no torch.
    settings = plain(cfg)
    words = _train_words(settings)

    from covid_cls.reporting.search import RateSearch, search_name

    check_section("search", RateSearch, settings["search"])
    rates = RateSearch(**settings["search"])
    slots = gpu_slots(settings["trainer"], settings["sweep"]["jobs_per_gpu"])

    from covid_cls.training.sections import SECTIONS, read_data

    for section, constructor in SECTIONS.items():
        check_section(section, constructor, settings[section])
    data = read_data(settings)
    name = search_name(settings, str(settings["name"] or recipe() or data.name), data.digest)
    with rates.opened(Path(settings["output_root"]) / name, data.task, anew=settings["rerun"]):
        if rates.left:
            cell = [*words, *(f"{key}={settings[key]}" for key in ("test", "probes", "audit"))]
            _try_rates(rates, slots, name, cell, settings["sweep"]["fail_fast"])
        command = shlex.join(["python", "-m", "covid_cls.search", *HydraConfig.get().overrides.task])
        train = ["python", "-m", "covid_cls.train", *words]
        log.info("\n".join(rates.write_results({"command": command, "config": settings}, train)))
        if not any(trial.state == "finished" for trial in rates.trials()):
            sys.exit(1)


def _train_words(settings: dict[str, Any]) -> list[str]:
    """The words of the command line that are train's. InputError where they do not fit a search."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        raise InputError(
            "-m: a search is of one cell; give one value for each key, and a search of its own to the next"
        )
    if settings["test"] is not False:
        raise InputError(f"test={settings['test']}: what selects must not see the test split; leave test out")
    keyed = [(word.lstrip("+~").partition("=")[0], word) for word in hydra_config.overrides.task]
    if any(key == "optimizer.lr" for key, _ in keyed):
        raise InputError("optimizer.lr: is what is searched; give search.low and search.high")
    return [word for key, word in keyed if key.partition(".")[0] not in ("search", "test")]


def _try_rates(rates: "RateSearch", slots: list[str], name: str, words: list[str], fail_fast: bool) -> None:
    """Returns when all rates were tried, after a list of what failed; exits where a signal or a fault of all did."""
    from covid_cls.reporting.search import rate_name

    sweep, left, ended = Sweep(rates.folder / "starts" / this_start(), slots), rates.left, False
    options = cell_options(HydraConfig.get(), "covid_cls.search")

    def try_next(_: int) -> None:
        nonlocal ended
        if ended or sweep.signal:
            return
        number, rate = rates.ask()
        cell = [*words, f'name="{name}/{rate_name(rate)}"', f"optimizer.lr={rate}"]
        status = run_cell("covid_cls.train", cell, sweep.folder, number, fail_fast, options)["status"]
        if status in ("finished", "failed"):
            log.info(rates.tell(number, rate))
        # Refused once is refused at every rate, and what fails before a rate has scored or diverged is no rate's fault.
        ended = ended or status in ("refused", "not started") or (status == "failed" and rates.left == left)

    with ThreadPoolExecutor(max(1, len(slots))) as pool:
        list(pool.map(try_next, range(left)))
    code = sweep.close()
    if ended or sweep.signal:
        sys.exit(code)


def main(words: Sequence[str]) -> int:
    """Run the command on the words of its command line; return the exit code."""
    return run_command(search, "search", words, stopped="the same command goes on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
