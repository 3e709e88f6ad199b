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


@pytest.mark.slow(reason="builds a wheel")
def test_the_wheel_holds_all_configuration_files_and_templates_and_nothing_foreign(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "covid_cls").rglob("*.j2")}
    assert templates
    assert templates == {name for name in names if name.endswith(".j2")}
    here = {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    shipped = {name.removeprefix("covid_cls/conf/") for name in names if name.startswith("covid_cls/conf/")}
    assert here
    assert shipped == here
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"covid_cls"}
    assert "covid_cls/py.typed" in names


@pytest.mark.slow(reason="builds a wheel")
def test_a_command_runs_from_the_wheel_in_an_empty_folder(
    wheel: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    env = {**environment, "PYTHONPATH": str(site)}
    where = [sys.executable, "-c", "import covid_cls.runtime.cli as c; print(c.conf_folder())"]
    found = subprocess.run(where, cwd=folder, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(site / "covid_cls" / "conf")
    page = [sys.executable, "-c", "from covid_cls.reporting.html import bullets; print(bullets(['found']))"]
    found = subprocess.run(page, cwd=folder, env=env, capture_output=True, text=True, check=True)
    assert "<li>found</li>" in found.stdout
    words = ["experiment=original_part2/focal", "--cfg", "job"]
    done = subprocess.run(
        [sys.executable, "-m", "covid_cls.train", *words], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "three_class_multilabel" in done.stdout


def test_ci_runs_the_test_command_that_the_readme_prints() -> None:
    commands = re.findall(r"^python3 -m venv .*pytest$", README, flags=re.MULTILINE)
    assert len(commands) == 1
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines.index(".venv/bin/python -m pytest -m slow") > lines.index(commands[0])
    assert "python -m pytest -m slow" in README


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


def audited(tmp_path: Path, environment: dict[str, str], stub: str) -> subprocess.CompletedProcess[str]:
    """CI's audit with `stub` in place of pip-audit, which is given the report's path as `report`."""
    package = tmp_path / "pip_audit"
    package.mkdir()
    (package / "__init__.py").touch()
    text = f"import json, sys\nfrom pathlib import Path\nreport = Path(sys.argv[-1])\n{stub}\n"
    (package / "__main__.py").write_text(text, encoding="utf-8")
    env = {**environment, "PYTHONPATH": str(tmp_path)}
    return subprocess.run([sys.executable, ROOT / ".ci" / "audit.py"], env=env, capture_output=True, text=True)


def found(*packages: dict[str, object]) -> str:
    return f"report.write_text(json.dumps({{'dependencies': {list(packages)!r}}}))"


KNOWN = {"id": "PYSEC-2026-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}
HARMLESS = {"name": "torch", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "other", "skip_reason": "not found"}


def test_ci_fails_on_a_known_vulnerability(tmp_path: Path, environment: dict[str, str]) -> None:
    vulnerable = {"name": "pillow", "version": "1.0", "vulns": [KNOWN]}
    done = audited(tmp_path, environment, found(HARMLESS, vulnerable, UNKNOWN) + "\nsys.exit(1)")
    assert done.returncode == 1
    assert "pillow 1.0: PYSEC-2026-1, mended in 2.0" in done.stdout
    assert "1 of 2 packages have known vulnerabilities; 1 could not be looked up" in done.stdout


def test_ci_passes_where_none_is_known_but_of_pip_that_came_with_python(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    done = audited(tmp_path, environment, found(HARMLESS, {"name": "pip", "version": "1.0", "vulns": [KNOWN]}))
    assert done.returncode == 0
    assert "pip 1.0: PYSEC-2026-1" in done.stdout


def test_ci_says_that_a_mirror_without_the_service_audits_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    done = audited(tmp_path, environment, found(UNKNOWN))
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert "audit: skipped, the network failed: the service answers for none" in done.stdout


@pytest.mark.slow(reason="runs pip-audit")
def test_ci_passes_and_says_so_where_the_network_is_down(tmp_path: Path, environment: dict[str, str]) -> None:
    # the real pip-audit; port 9 discards, and nobody listens there
    proxy = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"), "http://127.0.0.1:9")
    env = {**environment, **proxy, "PIP_CACHE_DIR": str(tmp_path), "NO_PROXY": "", "no_proxy": ""}
    done = subprocess.run([sys.executable, ROOT / ".ci" / "audit.py"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert "audit: skipped, the network failed: requests.exceptions.ProxyError" in done.stdout


def test_ci_fails_where_pip_audit_itself_does(tmp_path: Path, environment: dict[str, str]) -> None:
    done = audited(tmp_path, environment, "raise ImportError('no module named cyclonedx')")
    assert done.returncode == 1
    assert "ImportError" in done.stderr


def test_ci_audits_after_the_tests() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines.index(".venv/bin/python .ci/audit.py") > [
        ".venv/bin/python -m pytest" in line for line in lines
    ].index(True)
