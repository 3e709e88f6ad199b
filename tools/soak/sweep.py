"""Runs that raise, exit, are killed or diverge, in a sweep of real commands."""

import os
import subprocess
from pathlib import Path

from covid_cls.io import read_json
from tools.soak.commands import ROOT, run
from tools.soak.outcome import Outcome

WORDS = (
    "-m",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "data.size=32",
    "preprocess.crop=32",
    "data.images=36",
    "data.batch_size=6",
    "backbone.weights=none",
    "strategy=full",
    "logger=none",
    "baselines=false",
    "name=soak",
)
# Python runs this file at the start of each process, so that the package itself needs no code for it. Three runs end
# after their training, when prediction begins; the fourth trains with a learning rate at which every network diverges.
PLANTED = """
import os, signal, sys
from pathlib import Path

faults = {"seed=1": "raise", "seed=2": "exit", "seed=3": "kill", "seed=4": "diverge"}
words = sys.orig_argv if "hydra.mode=RUN" in sys.orig_argv and Path(os.environ["FAULTS"]).exists() else ()
fault = next((faults[word] for word in words if word in faults), None)


def end(*args, **kwargs):
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        sys.exit(3)
    raise RuntimeError("planted")


class Saboteur:
    def find_spec(self, name, path=None, target=None):
        if name == "hydra" and fault == "diverge":
            sys.argv += ["optimizer.lr=1e30", "scheduler=none"]
        if name == "covid_cls.experiment" and fault:
            import covid_cls.training.split_predictions

            covid_cls.training.split_predictions.predict_split = end


sys.meta_path.insert(0, Saboteur())
"""
ENDS = ("RuntimeError: planted", "exit code 3", "killed by SIGKILL", "became nan or inf")


def sweep(rounds: int, folder: Path) -> Outcome:
    """Start a sweep of `rounds` runs (at least five), four of which fail; then repeat it without the faults."""
    (folder / "sitecustomize.py").write_text(PLANTED, encoding="utf-8")
    (folder / "faults").touch()
    done = start(rounds, folder)
    before = finished(folder)
    named = sum(end in done.stderr for end in ENDS)
    (folder / "faults").unlink()
    again = start(rounds, folder)
    after = finished(folder)
    untouched = sum(after.get(path) == times for path, times in before.items())
    counts = [len(before), named, done.returncode, again.stdout.count("] $ "), untouched, again.returncode]
    return Outcome(
        f"{rounds} runs: one raises, one calls sys.exit, one is killed with SIGKILL, one diverges; "
        "then the same command without these faults",
        as_text(rounds - 4, 4, 1, 4, rounds - 4, 0),
        as_text(*counts) + ("" if counts[2] == 1 else f" ({done.stderr[-500:]})"),
        counts == [rounds - 4, 4, 1, 4, rounds - 4, 0],
    )


def as_text(finished: int, named: int, code: int, started: int, untouched: int, code_again: int) -> str:
    """Return the counts as text."""
    return (
        f"{finished} finish, {named} failures are named, exit code {code}; "
        f"then {started} are started, {untouched} left unchanged, exit code {code_again}"
    )


def start(rounds: int, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run the sweep's command and return its exit code and output."""
    seeds = ",".join(str(seed) for seed in range(rounds))
    return run(
        "train",
        folder,
        *WORDS,
        f"seed={seeds}",
        "hydra.launcher.n_jobs=2",
        timeout=3600,
        PYTHONPATH=f"{folder}{os.pathsep}{ROOT}",
        FAULTS=str(folder / "faults"),
    )


def finished(folder: Path) -> dict[Path, list[int]]:
    """Return, for each finished run's run.json, when it and the run's checkpoints were written (ns)."""
    records = folder.glob("outputs/soak/*/run.json")
    return {
        path: [file.stat().st_mtime_ns for file in (path, *sorted(path.parent.glob("checkpoints/*")))]
        for path in records
        if read_json(path)["status"] == "finished"
    }
