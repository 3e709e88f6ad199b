"""Start the package's commands as real processes, away from the user's cache and from any GPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command_line(name: str, *words: str) -> list[str]:
    """Return the arguments that run `python -m covid_cls.<name>` with unbuffered output."""
    return [sys.executable, "-u", "-m", f"covid_cls.{name}", *words]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return this process's environment with the package importable, a cache in `folder`, one thread and no GPU.

    Args:
        folder: Folder of the command; its cache is `folder`/cache.
        variables: Environment variables to add or to replace.
    """
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COVID_CLS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }


def run(
    name: str, folder: Path, *words: str, timeout: float = 900, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m covid_cls.<name> *words` in `folder` and return its exit code and output.

    Args:
        name: Command, such as "train".
        folder: Working directory of the command.
        words: Arguments of the command.
        timeout: Seconds after which `subprocess.TimeoutExpired` is raised.
        variables: Environment variables to add or to replace.
    """
    return subprocess.run(
        command_line(name, *words),
        cwd=folder,
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        # File names in messages may hold bytes that are not UTF-8.
        errors="replace",
        timeout=timeout,
        check=False,
    )
