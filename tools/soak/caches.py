"""Processes that want one cache at the same moment, some of which are killed while they build it."""

import hashlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from covid_cls.data import store
from covid_cls.data.readers import read_image
from covid_cls.models.prefix import Prefix
from covid_cls.training import features
from tools.soak.crowd import Member, at_once, take
from tools.soak.outcome import Outcome
from tools.soak.training import compose_small, make_classifier, make_data

CROWD = 8
_SEED = 6
_FILES, _ROWS, _SIDE = 4, 16, 600  # some 10 ms to decode each: a build is long enough to be killed in its middle
_SIZE = 64


class Wanted(NamedTuple):
    """A cache: the store of the images, or the features of the phantoms, below the folder `at`.

    deadly: seconds of its build after which the first process that builds it is killed; None: it is not.
    """

    at: Path
    features: bool
    deadly: float | None


class Found(NamedTuple):
    """What a process read, as a digest or an error's words; the builds that it finished, and the last one's seconds."""

    digest: str
    builds: int
    seconds: float


def caches(rounds: int, folder: Path) -> Outcome:
    """`rounds` caches, stores and features in turn, each wanted by 8 processes; two of eight lose their builder."""
    draw = random.Random(_SEED)
    table = image_set(folder / "set", _FILES, _SIDE)
    arguments = (pd.concat([table] * (_ROWS // _FILES), ignore_index=True), folder / "phantoms")
    alone = Member(serve, *arguments)
    kinds = (False, True, False, True)  # the first build of each takes longer than all others
    whole = [at_once([alone], Wanted(folder / f"whole-{k}", kind, None))[0] for k, kind in enumerate(kinds)][2:]
    alone.kill()
    members = [Member(serve, *arguments) for _ in range(CROWD)]
    seconds = [each.seconds for each in whole]
    good = builds = left = planted = killed = 0
    faults = [] if whole[0].digest == digest_of(decoded(arguments[0])) else ["the store is not what decoding gives"]
    for number in range(rounds):
        kind = number % 2
        deadly = draw.uniform(0.05, 0.95) * seconds[kind] if number % 8 in (2, 3) else None
        wanted = Wanted(folder / f"round-{number}", bool(kind), deadly)
        answers = at_once(members, wanted)
        dead = [k for k, answer in enumerate(answers) if answer is None]
        said = [answer for answer in answers if answer is not None]
        planted += deadly is not None
        killed += len(dead)
        good += sum(answer.digest == whole[kind].digest for answer in said)
        faults += [f"round {number}: {answer.digest}" for answer in said if answer.digest != whole[kind].digest]
        builds += sum(answer.builds for answer in said)
        left += sum(".tmp" in path.name or ".npy." in path.name for path in wanted.at.rglob("*"))
        if deadly is None:
            seconds[kind] = min(seconds[kind], *(answer.seconds for answer in said))
        for k in dead:
            members[k].kill()
            members[k] = Member(serve, *arguments)
        shutil.rmtree(wanted.at)
    for member in members:
        member.kill()
    return Outcome(
        f"{rounds} rounds of {CROWD} processes that want one cache at once, image stores and feature caches in turn; "
        f"in {planted} rounds SIGKILL to its builder at a random moment of the build",
        f"every process that lives reads all of it, rightly ({CROWD} in a round); {rounds} builds; 0 leftovers",
        f"{good} read rightly, {killed} were killed, {CROWD * rounds - good - killed} failed; {builds} builds; "
        f"{left} leftovers" + "".join(f"; {fault[:200]}" for fault in faults[:5]),
        good == CROWD * rounds - killed
        and (builds, left, faults) == (rounds, 0, [])
        and (planted + 1) // 2 <= killed <= planted,
    )


def image_set(root: Path, count: int, side: int) -> pd.DataFrame:
    """The table of `count` PNG files of noise."""
    root.mkdir(parents=True)
    draw = np.random.default_rng(_SEED)
    files = [root / f"{k}.png" for k in range(count)]
    for file in files:
        Image.fromarray(draw.integers(0, 256, (side, side), dtype=np.uint8)).save(file)
    return pd.DataFrame(
        {"path": [file.name for file in files], "file": [str(file) for file in files], "line": 0, "sha256": ""}
    )


def decoded(table: pd.DataFrame) -> "np.ndarray[Any, Any]":
    """What a store of `table` must hold."""
    return np.stack([store.draw_on_canvas(read_image(Path(file)), _SIZE, _SIZE) for file in table["file"]])


def digest_of(array: "np.ndarray[Any, Any]") -> str:
    """Stands for the bytes of `array`."""
    return hashlib.sha256(array.tobytes()).hexdigest()


def serve(connection: Connection, table: pd.DataFrame, phantoms: Path) -> None:
    """In a process of its own: for each `Wanted` that comes, reads the whole cache and tells what it found."""
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  # each progress bar would leave an empty line
    settings = compose_small("strategy=fc", "task=three_class", f"data.size={_SIZE}", f"preprocess.crop={_SIZE}")
    classifier, data = make_classifier(settings), make_data(settings, phantoms)
    prefix = Prefix(classifier.net)
    hashes = store.hash_files(table, phantoms)
    features._BATCH, features._SAVE = 8, 1  # several records in a build, so that a killed one leaves a part
    log = BuildLog()
    log.watch(store, "_build")
    log.watch(features.FeatureCache, "_compute")
    while True:
        log.wanted = wanted = take(connection)
        log.builds, log.seconds = 0, float("inf")
        try:
            if wanted.features:
                data.cache = wanted.at
                (array,) = features.FeatureCache(classifier, data, prefix, 1.0).views([None], ["train", "val"])
                array = array[data.table.index[data.table["split"] != "test"]]
            else:
                array = store.open_store(table, hashes, size=_SIZE, canvas=_SIZE, cache=wanted.at).images
            read = digest_of(array)
        except Exception as error:
            read = f"{type(error).__name__}: {error}"
        connection.send(Found(read, log.builds, log.seconds))


class BuildLog:
    """Counts and times the builds of this process, and ends it in the middle of one where that is wanted."""

    def __init__(self) -> None:
        self.wanted: Wanted | None = None
        self.builds, self.seconds = 0, 0.0

    def watch(self, owner: Any, name: str) -> None:
        """Replace the function `name` of a module or class by one that is watched."""
        build: Callable[..., None] = getattr(owner, name)

        def watched(*arguments: Any) -> None:
            start = time.monotonic()
            killer = self._killer()
            build(*arguments)
            if killer:
                killer.cancel()
            self.builds, self.seconds = self.builds + 1, time.monotonic() - start

        setattr(owner, name, watched)

    def _killer(self) -> threading.Timer | None:
        assert self.wanted
        doomed = self.wanted.at.with_suffix(".doomed")
        if self.wanted.deadly is None or doomed.exists():  # the builder before this one has been killed
            return None
        doomed.touch()
        killer = threading.Timer(self.wanted.deadly, os.kill, (os.getpid(), signal.SIGKILL))
        killer.start()
        return killer
