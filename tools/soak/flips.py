"""Checkpoints with one changed byte: each must be detected, and the previous checkpoint must be used."""

import random
from collections.abc import Callable
from pathlib import Path

from covid_cls.errors import InputError
from covid_cls.training.checkpoints import LAST, PREVIOUS, load_classifier, newest_valid, read_checkpoint
from tools.soak.outcome import Outcome
from tools.soak.training import compose_small, make_classifier, make_data, make_trainer

_SEED = 9


def flips(rounds: int, folder: Path) -> Outcome:
    """Change `rounds` bytes, one at a time, in the checkpoints of a run of three epochs.

    Positions and values are random. Every second change is in the last checkpoint: a restart must then continue from
    the previous one.
    """
    settings = compose_small("strategy=fc", "trainer.max_epochs=3", "augment=none", "checkpoint_seconds=0")
    trainer, _ = make_trainer(settings, folder)
    trainer.fit(make_classifier(settings), make_data(settings, folder / "cache"))
    checkpoints, draw = folder / "checkpoints", random.Random(_SEED)
    last, best = checkpoints / LAST, checkpoints / "best.ckpt"
    missed, wrong, used = [], [], 0
    for number in range(rounds):
        path: Path = (last, best)[number % 2]
        place = draw.randrange(path.stat().st_size)
        old = _put(path, place, None)
        # An exclusive or with a value that is not 0 always changes the byte.
        _put(path, place, old ^ draw.randrange(1, 256))
        refusals = [_refusal(read, path) for read in (read_checkpoint, load_classifier)]
        if not all(str(path) in refusal for refusal in refusals):
            missed.append(f"byte {place} of {path.name}: {refusals}")
        if path == last:
            found, contents, warnings = newest_valid(checkpoints)
            named = len(warnings) == 1 and str(last) in warnings[0] and str(checkpoints / PREVIOUS) in warnings[0]
            good = found == checkpoints / PREVIOUS and contents["epoch"] == 1 and named
            used += good
            wrong += [] if good else [f"byte {place} of {path.name}: continues from {found}, warnings {warnings}"]
        _put(path, place, old)
    intact = newest_valid(checkpoints)[0] == last and not _refusal(load_classifier, best)
    return Outcome(
        f"{rounds} single bytes changed in the checkpoints of a run, {rounds - rounds // 2} of them in the last one",
        f"{rounds} of {rounds} refused with their path; "
        f"{rounds - rounds // 2} restarts from the previous one, with a warning",
        "; ".join([f"{rounds - len(missed)} of {rounds}; {used} restarts", *missed, *wrong]),
        not missed and not wrong and intact,
    )


def _put(path: Path, place: int, value: int | None) -> int:
    """Return the byte at `place`, and replace it with `value` unless that is None."""
    with path.open("r+b") as file:
        file.seek(place)
        old = file.read(1)[0]
        if value is not None:
            file.seek(place)
            file.write(bytes([value]))
    return old


def _refusal(read: Callable[[Path], object], path: Path) -> str:
    try:
        read(path)
    except InputError as error:
        return str(error)
    return ""
