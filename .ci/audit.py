"""Says which packages of this environment have a known vulnerability. Exit code 1 where one has.

python .ci/audit.py

What is unknown because the network failed does not fail the audit, and is said in one line. Anything else that goes
wrong with pip-audit does. pip itself comes with Python and not with us: what is known of it is shown, and passes.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PATIENCE = 600  # seconds for all packages; a request has 15, and there are about 150 of them
# How pip-audit ends where its service cannot be asked: it catches two kinds of error and lets the others through.
NETWORK = re.compile(r"requests\.exceptions\.|pip_audit\._service\.interface\.|your network may be blocking")


def audit() -> int:
    """The exit code, after what was found is printed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = ["--skip-editable", "--progress-spinner", "off", "--format", "json", "--output", str(report)]
        try:
            command = [sys.executable, "-m", "pip_audit", *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)  # noqa: S603
        except subprocess.TimeoutExpired:
            return skipped(f"no answer within {PATIENCE} seconds")
        if not report.is_file():  # it is written where all packages were asked for, whatever was found
            return failed(done.stderr)
        packages = json.loads(report.read_text(encoding="utf-8"))["dependencies"]
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:  # a mirror without the service answers "not found" for each, and pip-audit exits with 0
        return skipped("the service answers for none of the packages")
    vulnerable = [package for package in asked if package["vulns"]]
    for package in vulnerable:
        for known in package["vulns"]:
            mended = ", ".join(known["fix_versions"]) or "no release"
            print(f"{package['name']} {package['version']}: {known['id']}, mended in {mended}")
    print(f"audit: {len(vulnerable)} of {len(asked)} packages have known vulnerabilities", end="; ")
    print(f"{len(packages) - len(asked)} could not be looked up")
    return 1 if any(package["name"] != "pip" for package in vulnerable) else 0


def failed(stderr: str) -> int:
    """The exit code where there is no report: 0 if the network is the reason."""
    last = (stderr.strip().splitlines() or ["it printed nothing"])[-1]
    if NETWORK.search(last):
        return skipped(last)
    print(f"{stderr}\naudit: pip-audit failed", file=sys.stderr)
    return 1


def skipped(reason: str) -> int:
    """Exit code 0, after the reason is printed."""
    print(f"audit: skipped, the network failed: {reason[:200]}")
    return 0


if __name__ == "__main__":
    sys.exit(audit())
