"""Runs that are killed with SIGKILL at any moment of their life, started again, and compared with one that was not."""

import hashlib
import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil

from covid_cls.records import file_sha256, read_json
from covid_cls.training.checkpoints import read_checkpoint
from tools.soak.commands import command_line, environment
from tools.soak.outcome import Outcome

EPOCHS, FEW = 16, 4  # of which a run consists, and where it is killed once or twice in all
# With dropout, batch norm that trains, and a schedule that moves at each step: all that a checkpoint could forget.
WORDS = (
    "trainer=cpu",
    "callbacks=no_early_stopping",
    "task=three_class",
    "data.images=36",
    "data.size=32",
    "preprocess.crop=32",
    "data.batch_size=6",
    "backbone.weights=none",
    "strategy=partial",
    "logger=none",
    "probes=false",
)
CACHES = (("feature_cache=off",), ("feature_cache=exact", "augment=none"), ("feature_cache=views:2",))
WORKERS = (2, 4, 0)
SECONDS = (0, 3)  # checkpoint_seconds: each epoch on disk, or one in several, as by default in longer runs
PATIENCE = 30.0  # seconds for the worker processes of a killed run to be gone
_SEED = 6


def kills(rounds: int, folder: Path) -> Outcome:
    """`rounds` runs, each killed once: over all numbers of workers and all caches in turn, evenly over a run's life."""
    epochs = EPOCHS if rounds > 2 else FEW
    draw = random.Random(_SEED)
    # Epochs that have ended, and a part of the next: less than one is the start-up, more than all the predictions.
    moments = [(k + draw.random()) / rounds * (epochs + 1) for k in draw.sample(range(rounds), rounds)]
    whole: dict[str, dict[str, str]] = {}
    phases, faults, orphans = Counter[str](), [], 0
    for number, moment in enumerate(moments):
        cached = CACHES[number // len(WORKERS) % len(CACHES)]
        if cached[0] not in whole:
            run = Start(folder / f"whole-{len(whole)}", epochs, *cached)
            run.end()
            whole[cached[0]] = run.results()
        words = (
            *cached,
            f"data.workers={WORKERS[number % len(WORKERS)]}",
            f"checkpoint_seconds={SECONDS[number % len(SECONDS)]}",
        )
        killed = Start(folder / f"killed-{number}", epochs, *words)
        killed.wait_for(f"epoch {int(moment)}/" if moment >= 1 else "phantoms: ")
        time.sleep(moment % 1)  # an epoch and its saving take about 0.6 s
        others, phase = killed.kill(), killed.phase()
        phases[phase] += 1
        again = Start(folder / f"killed-{number}", epochs, *words)  # at once, as an impatient user does
        orphans += left_of(others)
        again.end()
        differing = sorted(name for name, value in again.results().items() if value != whole[cached[0]][name])
        if differing:
            faults.append(f"{' '.join(words)}, killed {phase}: {', '.join(differing)} differ")
    landed = ", ".join(f"{count} {phase}" for phase, count in phases.items())
    return Outcome(
        f"{rounds} kills with SIGKILL ({landed}), workers 0, 2 and 4, feature_cache off, exact and views:2",
        f"{rounds} of {rounds} runs with the weights and predictions of the undisturbed one; 0 orphans",
        f"{rounds - len(faults)} of {rounds}; {orphans} orphans" + "".join(f"; {fault}" for fault in faults),
        not faults and not orphans,
    )


class Start:
    """One start of the command in `folder`, with a cache of its own; its output goes to a file."""

    def __init__(self, folder: Path, epochs: int, *words: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.epochs, self.log = folder, epochs, folder / f"log-{len(list(folder.glob('log-*')))}"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command_line("train", *WORDS, f"trainer.max_epochs={epochs}", *words),
                cwd=folder,
                env=environment(folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self) -> None:
        """Wait for the end; RuntimeError where that is none of a finished run."""
        code = self.process.wait(600)
        if code:
            raise RuntimeError(f"{self.process.args}: exit code {code}: {self.log.read_text()[-2000:]}")

    def wait_for(self, words: str) -> None:
        """Return once the command has printed `words`, or has ended."""
        while words not in self.log.read_text(encoding="utf-8") and self.process.poll() is None:
            time.sleep(0.02)

    def kill(self) -> list[psutil.Process]:
        """Kill the command's process alone; the processes that it had started."""
        others = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        return others

    def phase(self) -> str:
        """How far it came, from what it printed."""
        printed = self.log.read_text(encoding="utf-8")
        if "results in" in printed:
            return "after the end"
        if f"epoch {self.epochs}/" in printed:
            return "while predicting"
        return "in training" if "first step" in printed else "before the first step"

    def results(self) -> dict[str, str]:
        """Digests of the weights and of the predictions."""
        (record,) = self.folder.rglob("run.json")
        assert read_json(record)["status"] == "finished"
        found = {}
        for name in ("best", "last"):
            state = read_checkpoint(record.parent / "checkpoints" / f"{name}.ckpt")["state_dict"]
            content = hashlib.sha256()
            for key, tensor in state.items():
                content.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
            found[f"{name} weights"] = content.hexdigest()
        for split in ("val", "test"):
            path = record.parent / f"predictions-{split}.csv"
            found[path.name] = file_sha256(path)
        return found


def left_of(processes: list[psutil.Process]) -> int:
    """How many of them do not end by themselves; they are ended."""
    _, left = psutil.wait_procs(processes, PATIENCE)
    left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    return len(left)
