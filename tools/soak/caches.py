"""Processes that request one cache at the same moment; some are killed while they build it."""

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
from covid_cls.models.inference import Prefix
from covid_cls.training import feature_cache
from tools.soak.crowd import Member, at_once, take
from tools.soak.outcome import Outcome
from tools.soak.training import compose_small, make_classifier, make_data

CROWD = 8
_SEED = 6
# An image takes about 10 ms to decode, so that a build is long enough to be killed half-way.
_FILES, _ROWS, _SIDE = 4, 16, 600
_SIZE = 64


class Wanted(NamedTuple):
    """A cache that several processes request.

    Attributes:
        at: Folder of the cache.
        features: Whether it holds features of phantoms; otherwise it is a store of decoded images.
        kill_after: Seconds after which the first process that builds the cache is killed; None: it is not killed.
    """

    at: Path
    features: bool
    kill_after: float | None


class Found(NamedTuple):
    """The answer of one process.

    Attributes:
        digest: SHA-256 of the cache's contents, or the error message.
        builds: Number of builds that the process finished.
        seconds: Duration of its last build.
    """

    digest: str
    builds: int
    seconds: float


def caches(rounds: int, folder: Path) -> Outcome:
    """Let 8 processes request each of `rounds` caches; in two rounds of eight the building process is killed.

    Image stores and feature caches alternate.
    """
    draw = random.Random(_SEED)
    table = image_set(folder / "set", _FILES, _SIDE)
    arguments = (pd.concat([table] * (_ROWS // _FILES), ignore_index=True), folder / "phantoms")
    alone = Member(serve, *arguments)
    # The first build of each kind takes longer than the others, so that the second ones are used.
    kinds = (False, True, False, True)
    expected = [at_once([alone], Wanted(folder / f"expected-{k}", kind, None))[0] for k, kind in enumerate(kinds)][2:]
    alone.kill()
    members = [Member(serve, *arguments) for _ in range(CROWD)]
    seconds = [each.seconds for each in expected]
    good = builds = left = planted = killed = 0
    faults = (
        [] if expected[0].digest == digest_of(decoded(arguments[0])) else ["the store differs from the decoded images"]
    )
    for number in range(rounds):
        kind = number % 2
        kill_after = draw.uniform(0.05, 0.95) * seconds[kind] if number % 8 in (2, 3) else None
        wanted = Wanted(folder / f"round-{number}", bool(kind), kill_after)
        answers = at_once(members, wanted)
        dead = [k for k, answer in enumerate(answers) if answer is None]
        survivors = [answer for answer in answers if answer is not None]
        planted += kill_after is not None
        killed += len(dead)
        good += sum(answer.digest == expected[kind].digest for answer in survivors)
        faults += [f"round {number}: {answer.digest}" for answer in survivors if answer.digest != expected[kind].digest]
        builds += sum(answer.builds for answer in survivors)
        left += sum(".tmp" in path.name or ".npy." in path.name for path in wanted.at.rglob("*"))
        if kill_after is None:
            seconds[kind] = min(seconds[kind], *(answer.seconds for answer in survivors))
        for k in dead:
            members[k].kill()
            members[k] = Member(serve, *arguments)
        shutil.rmtree(wanted.at)
    for member in members:
        member.kill()
    return Outcome(
        f"{rounds} rounds of {CROWD} processes that request one cache at once, alternately an image store and a "
        f"feature cache; in {planted} rounds SIGKILL to the building process at a random moment",
        f"every surviving process reads it completely and correctly ({CROWD} per round); {rounds} builds; 0 leftovers",
        f"{good} read correctly, {killed} killed, {CROWD * rounds - good - killed} failed; {builds} builds; "
        f"{left} leftovers" + "".join(f"; {fault[:200]}" for fault in faults[:5]),
        good == CROWD * rounds - killed
        and (builds, left, faults) == (rounds, 0, [])
        and (planted + 1) // 2 <= killed <= planted,
    )


def image_set(root: Path, count: int, side: int) -> pd.DataFrame:
    """Write `count` PNG files of noise and return their table."""
    root.mkdir(parents=True)
    draw = np.random.default_rng(_SEED)
    files = [root / f"{k}.png" for k in range(count)]
    for file in files:
        Image.fromarray(draw.integers(0, 256, (side, side), dtype=np.uint8)).save(file)
    return pd.DataFrame(
        {"path": [file.name for file in files], "file": [str(file) for file in files], "line": 0, "sha256": ""}
    )


def decoded(table: pd.DataFrame) -> "np.ndarray[Any, Any]":
    """Return the images that a store of `table` must contain."""
    return np.stack([store.draw_on_canvas(read_image(Path(file)), _SIZE, _SIZE) for file in table["file"]])


def digest_of(array: "np.ndarray[Any, Any]") -> str:
    """Return the SHA-256 of the bytes of `array`."""
    return hashlib.sha256(array.tobytes()).hexdigest()


def serve(connection: Connection, table: pd.DataFrame, phantoms: Path) -> None:
    """Read the complete cache for each `Wanted` received, and send back a `Found`; runs in a separate process."""
    # Each progress bar would leave an empty line in the output of the tool.
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    settings = compose_small("strategy=fc", "task=three_class", f"data.size={_SIZE}", f"preprocess.crop={_SIZE}")
    classifier, data = make_classifier(settings), make_data(settings, phantoms)
    prefix = Prefix(classifier.net)
    hashes = store.hash_files(table, phantoms)
    # Several records per build, so that a killed process leaves an incomplete cache.
    feature_cache._BATCH, feature_cache._SAVE = 8, 1
    log = BuildLog()
    log.watch(store, "_build")
    log.watch(feature_cache.FeatureCache, "_compute")
    while True:
        log.wanted = wanted = take(connection)
        log.builds, log.seconds = 0, float("inf")
        try:
            if wanted.features:
                data.cache = wanted.at
                (array,) = feature_cache.FeatureCache(classifier, data, prefix, 1.0).load([None], ["train", "val"])
                array = array[data.table.index[data.table["split"] != "test"]]
            else:
                array = store.open_store(table, hashes, size=_SIZE, canvas=_SIZE, cache=wanted.at).images
            read = digest_of(array)
        except Exception as error:
            read = f"{type(error).__name__}: {error}"
        connection.send(Found(read, log.builds, log.seconds))


class BuildLog:
    """Count and time the builds of this process, and kill the process during a build if `wanted` requires it."""

    def __init__(self) -> None:
        self.wanted: Wanted | None = None
        self.builds, self.seconds = 0, 0.0

    def watch(self, owner: Any, name: str) -> None:
        """Wrap the function `name` of a module or class so that its calls are counted and timed."""
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
        killed = self.wanted.at.with_suffix(".killed")
        # Only the first builder is killed.
        if self.wanted.kill_after is None or killed.exists():
            return None
        killed.touch()
        killer = threading.Timer(self.wanted.kill_after, os.kill, (os.getpid(), signal.SIGKILL))
        killer.start()
        return killer
