"""The scripts of docs/hpc.md: an array job with one run per task, and a large run that returns to the queue."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL
from tests.examples.documents import code_blocks

LARGE, SCRIPT = code_blocks("hpc.md", "bash")
# Replaces python and records its arguments.
RECORD = '#!/bin/sh\nprintf "%s\\n" "$*" >> started.txt\n'


def run_task(folder: Path, environment: dict[str, str], number: int, path: Path, *words: str) -> str:
    (folder / "sweep.sh").write_text(SCRIPT, encoding="utf-8")
    env = {**environment, "SLURM_ARRAY_TASK_ID": str(number), "PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "sweep.sh", *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tasks_are_all_runs_of_the_grid_once(environment: dict[str, str], tmp_path: Path) -> None:
    found = re.search(r"--array=0-(\d+)", (ROOT / "docs" / "hpc.md").read_text(encoding="utf-8"))
    assert found is not None
    (tmp_path / "python").write_text(RECORD, encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    for number in range(int(found[1]) + 1):
        run_task(tmp_path, environment, number, tmp_path)
    started = (tmp_path / "started.txt").read_text(encoding="utf-8").splitlines()
    expected = {
        f"-m covid_cls.train name=my_sweep task=three_class strategy={strategy} loss={loss} seed={seed}"
        for strategy in ("fc", "partial", "full")
        for loss in ("ce", "focal")
        for seed in (0, 1)
    }
    assert len(started) == len(expected)
    assert {line.strip() for line in started} == expected


@pytest.mark.slow(reason="a script of the documentation starts a training")
def test_a_task_trains_its_run(environment: dict[str, str], tmp_path: Path) -> None:
    words = (*SMALL, "trainer.max_epochs=1", "backbone.weights=none", "baselines=false")
    run_task(tmp_path, environment, 10, Path(sys.executable).parent, *words)
    (run,) = (tmp_path / "outputs" / "my_sweep").iterdir()
    assert run.name.startswith("three_class-resnet18-partial-focal-s1-")


@pytest.mark.parametrize(("ended", "requeued"), [(0, False), (143, True), (1, False)])
def test_a_large_run_returns_to_the_queue_after_a_warning(ended: int, requeued: bool, tmp_path: Path) -> None:
    (tmp_path / "large.sh").write_text(LARGE, encoding="utf-8")
    for name, code in (("srun", ended), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> started.txt\nexit {code}\n', encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "large.sh", "seed=1"], cwd=tmp_path, env=env, check=False)
    assert done.returncode == ended
    run, *rest = (tmp_path / "started.txt").read_text(encoding="utf-8").splitlines()
    assert run.startswith("srun --kill-on-bad-exit=1 python -m covid_cls.train trainer=ddp ")
    assert run.endswith(" seed=1")
    assert rest == (["scontrol requeue 7"] if requeued else [])
