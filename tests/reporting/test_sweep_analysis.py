"""The statistics of a sweep's report read baselines and perturbation tests next to each run."""

from pathlib import Path

from covid_cls.reporting.sweep_analysis import ProtocolResult, ReportOptions, analyse_protocol
from covid_cls.reporting.sweep_loading import find_runs, load_sweep
from tests.reporting.sweeps import changed, write_run


def analysed(root: Path) -> ProtocolResult:
    (protocol,) = load_sweep(find_runs(root), "report").protocols
    result, omissions = analyse_protocol(protocol, ReportOptions(resamples=20))
    assert omissions == []
    return result


def test_baselines_in_the_folder_of_earlier_versions_give_the_same_results(tmp_path: Path) -> None:
    folder = write_run(tmp_path, changed(), baselines={"frame": 0.5, "corners": 1.0})
    now = analysed(tmp_path)
    (folder / "baselines").rename(folder / "probes")
    former = analysed(tmp_path)
    assert [baseline.name for baseline in former.baselines] == ["frame"]
    assert former.baselines[0].intervals == now.baselines[0].intervals
    assert [test.perturbation for test in former.perturbations] == ["corners"]
    assert former.perturbations == now.perturbations
    assert former.verdict == now.verdict


def test_runs_without_baselines_have_no_baseline_results(tmp_path: Path) -> None:
    write_run(tmp_path, changed())
    result = analysed(tmp_path)
    assert (result.baselines, result.perturbations) == ([], [])
