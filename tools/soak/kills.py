"""Runs that are killed with SIGKILL at a random moment, restarted, and compared with an undisturbed run."""

import hashlib
import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from covid_cls.io import file_sha256, read_json
from covid_cls.training.checkpoints import read_checkpoint
from tools.soak.commands import command_line, environment
from tools.soak.outcome import Outcome

# Epochs of a run, and of a run if there are at most two rounds.
EPOCHS, FEW = 16, 4
# Dropout, trainable batch norm and a schedule that changes at each step: all the state that a checkpoint must keep.
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
    "baselines=false",
)
CACHES = (("feature_cache=off",), ("feature_cache=exact", "augment=none"), ("feature_cache=views:2",))
WORKERS = (2, 4, 0)
# Values of checkpoint_seconds: a checkpoint in every epoch, or in some epochs as in longer runs.
SECONDS = (0, 3)
PATIENCE = 30.0  # seconds within which the worker processes of a killed run must exit
_SEED = 6


def kills(rounds: int, folder: Path) -> Outcome:
    """Kill each of `rounds` runs once, restart it, and compare its results with an undisturbed run.

    The numbers of workers and the feature caches alternate; the moments are spread evenly over the duration of a run.
    """
    epochs = EPOCHS if rounds > 2 else FEW
    draw = random.Random(_SEED)
    # In epochs: a value below 1 is in the start-up phase, one above `epochs` is during the final predictions.
    moments = [(k + draw.random()) / rounds * (epochs + 1) for k in draw.sample(range(rounds), rounds)]
    undisturbed: dict[str, dict[str, str]] = {}
    phases, faults, orphans = Counter[str](), [], 0
    for number, moment in enumerate(moments):
        cached = CACHES[number // len(WORKERS) % len(CACHES)]
        if cached[0] not in undisturbed:
            run = Start(folder / f"undisturbed-{len(undisturbed)}", epochs, *cached)
            run.end()
            undisturbed[cached[0]] = run.results()
        words = (
            *cached,
            f"data.workers={WORKERS[number % len(WORKERS)]}",
            f"checkpoint_seconds={SECONDS[number % len(SECONDS)]}",
        )
        killed = Start(folder / f"killed-{number}", epochs, *words)
        killed.wait_for(f"epoch {int(moment)}/" if moment >= 1 else "phantoms: ")
        # An epoch with its checkpoint takes about 0.6 s.
        time.sleep(moment % 1)
        others, phase = killed.kill(), killed.phase()
        phases[phase] += 1
        # Immediately, as an impatient user does, while worker processes of the killed run may still be alive.
        again = Start(folder / f"killed-{number}", epochs, *words)
        orphans += left_of(others)
        again.end()
        differing = sorted(name for name, value in again.results().items() if value != undisturbed[cached[0]][name])
        if differing:
            faults.append(f"{' '.join(words)}, killed {phase}: {', '.join(differing)} differ")
    landed = ", ".join(f"{count} {phase}" for phase, count in phases.items())
    return Outcome(
        f"{rounds} kills with SIGKILL ({landed}), workers 0, 2 and 4, feature_cache off, exact and views:2",
        f"{rounds} of {rounds} runs with the weights and predictions of the undisturbed run; 0 orphans",
        f"{rounds - len(faults)} of {rounds}; {orphans} orphans" + "".join(f"; {fault}" for fault in faults),
        not faults and not orphans,
    )


class Start:
    """One start of `train` in `folder`, with a separate cache; its output goes to a file."""

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
        """Wait until the command ends.

        Raises:
            RuntimeError: if the exit code is not 0.
        """
        code = self.process.wait(600)
        if code:
            raise RuntimeError(f"{self.process.args!r}: exit code {code}: {self.log.read_text()[-2000:]}")

    def wait_for(self, words: str) -> None:
        """Wait until the command has printed `words` or has ended."""
        while words not in self.log.read_text(encoding="utf-8") and self.process.poll() is None:
            time.sleep(0.02)

    def kill(self) -> list[psutil.Process]:
        """Kill the command's process only, and return the child processes that it had started."""
        others = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        return others

    def phase(self) -> str:
        """Return the phase in which the command ended, according to its output."""
        printed = self.log.read_text(encoding="utf-8")
        if "results in" in printed:
            return "after the end"
        if f"epoch {self.epochs}/" in printed:
            return "while predicting"
        return "in training" if "training started" in printed else "before training"

    def results(self) -> dict[str, str]:
        """Return the SHA-256 of the weights in both checkpoints and of both prediction tables."""
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
    """Return how many processes do not exit within `PATIENCE` seconds, and kill these."""
    _, left = psutil.wait_procs(processes, PATIENCE)
    left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    return len(left)
