"""What is shipped: a wheel that works in an empty folder, and documents that agree with the code."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_configuration_file_and_nothing_foreign(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    here = {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    shipped = {name.removeprefix("covid_cls/conf/") for name in names if name.startswith("covid_cls/conf/")}
    assert here
    assert shipped == here
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"covid_cls"}
    assert "covid_cls/py.typed" in names


def test_a_command_runs_from_the_wheel_in_an_empty_folder(
    wheel: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    env = {**environment, "PYTHONPATH": str(site)}
    where = [sys.executable, "-c", "import covid_cls.command as c; print(c.conf_folder())"]
    found = subprocess.run(where, cwd=folder, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(site / "covid_cls" / "conf")
    words = ["experiment=seed_part2/focal", "--cfg", "job"]
    done = subprocess.run(
        [sys.executable, "-m", "covid_cls.train", *words], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "three_class_multilabel" in done.stdout


def test_ci_runs_the_test_command_that_the_readme_prints() -> None:
    commands = re.findall(r"^python3 -m venv .*pytest$", README, flags=re.MULTILINE)
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_readme_says_what_this_is_not() -> None:
    assert "not a diagnostic device" in README


def test_the_version_is_in_the_changelog_or_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text


def test_upper_bounds_have_a_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    project = tomllib.loads("\n".join(lines))["project"]
    assert project["requires-python"] == ">=3.11"
    capped = [line for line in lines if re.search(r'^\s+"[\w-]+.*[<~]=?\d', line) and "#" not in line]
    assert capped == []


def test_nothing_over_200_kilobytes_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert names
    assert [name for name in names if (ROOT / name).stat().st_size > 200_000] == []
