"""Damaged and unusual images, given to the reader alone and to the commands that read complete data sets."""

import csv
import multiprocessing
import os
import resource
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covid_cls.data.limits import BadImage
from covid_cls.data.phantoms import build_phantoms
from covid_cls.data.readers import read_image
from covid_cls.io import read_json
from tools.soak.commands import run
from tools.soak.outcome import Outcome
from tools.soak.zoo import Specimen, plant

Reader = Callable[[Path], np.ndarray]
PATIENCE = 5.0  # seconds per file
MOST_MEMORY = 1000  # MB that reading one file may take; a 16-bit image of 49 megapixels takes 820
ADDRESS_SPACE = 8 * 2**30  # bytes; protects the machine from a reader that allocates without limit
SMALL = ("data.size=32", "preprocess.crop=32", "data.batch_size=8", "backbone.weights=none", "trainer=cpu")
BRIEF = ("trainer.max_epochs=1", "logger=none", "baselines=false", "audit=off", "name=zoo")


class Reading(NamedTuple):
    """The result of reading one file in a separate process.

    Attributes:
        end: "read", "refused" (with `BadImage`), "raised" (any other exception), "died" or "hung".
        grey: The pixels, if the file was read.
        message: The reason, if it was not.
        megabytes: Peak memory that reading took.
    """

    end: str
    grey: np.ndarray | None
    message: str
    megabytes: float


def images(rounds: int, folder: Path) -> Outcome:
    """Read `rounds` files with `read_image`, then run train, audit and predict on them."""
    root = folder / "set"
    (root / "zoo").mkdir(parents=True)
    specimens = plant(root / "zoo", rounds, seed=0)
    readings = read_all([root / "zoo" / specimen.name for specimen in specimens], read_image)
    ends = [reading.end for reading in readings]
    faults = [
        f"{specimen.name!r}: {fault}"
        for specimen, reading in zip(specimens, readings, strict=True)
        if (fault := fault_of(specimen, reading))
    ]
    faults += _commands(folder, specimens, readings)
    peak = max(reading.megabytes for reading in readings)
    counts = {end: ends.count(end) for end in ("read", "refused", "died", "hung", "raised")}
    held = not faults and not counts["died"] and not counts["hung"] and not counts["raised"] and peak < MOST_MEMORY
    return Outcome(
        f"{rounds} files: flipped bits, truncations, bombs, FIFOs, links, odd names, wrong extensions, 16 bits, "
        "animations, EXIF, DICOM; then train, audit and predict on them",
        f"0 deaths, 0 files over {PATIENCE:g} s, 0 other exceptions, 0 images with wrong pixels, "
        f"every refused file named with its line and reason, at most {MOST_MEMORY} MB per file",
        ", ".join(f"{count} {end}" for end, count in counts.items())
        + f"; at most {peak:.0f} MB per file; {len(faults)} faults"
        + "".join(f"; {fault}" for fault in faults[:10]),
        held,
    )


def read_all(paths: Sequence[Path], reader: Reader) -> list[Reading]:
    """Read each path in a separate process, which is replaced when it dies or hangs.

    Args:
        paths: Files to read.
        reader: A function at the top level of a module, since it is pickled.
    """
    readings: list[Reading] = []
    worker, pipe = _start(reader)
    for path in paths:
        pipe.send(path)
        try:
            reading: Reading = pipe.recv() if pipe.poll(PATIENCE) else Reading("hung", None, "", 0)
        except EOFError:
            worker.join()
            reading = Reading("died", None, f"exit code {worker.exitcode}", 0)
        readings.append(reading)
        if reading.end in ("hung", "died"):
            worker.kill()
            worker.join()
            worker, pipe = _start(reader)
    worker.kill()
    worker.join()
    return readings


def _start(reader: Reader) -> tuple[multiprocessing.process.BaseProcess, "Connection[Path, Any]"]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    worker = spawn.Process(target=_serve, args=(theirs, reader), daemon=True)
    worker.start()
    theirs.close()
    # The imports are done when it answers, so that they do not count towards the first file's time.
    ours.recv()
    return worker, ours


def _serve(pipe: "Connection[object, object]", reader: Reader) -> None:
    """Send back a `Reading` for each path received."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    pipe.send("ready")
    while True:
        path = pipe.recv()
        # This resets the peak memory of the process.
        Path("/proc/self/clear_refs").write_text("5")
        before = _megabytes("VmRSS")
        grey, message = None, ""
        try:
            grey, end = reader(path), "read"  # type: ignore[arg-type]
        except BadImage as error:
            end, message = "refused", str(error)
        except BaseException as error:
            end, message = "raised", f"{type(error).__name__}: {error}"
        pipe.send(Reading(end, grey, message, _megabytes("VmHWM") - before))


def _megabytes(entry: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024


def fault_of(specimen: Specimen, reading: Reading) -> str:
    """Return why the reading is not the expected one for this specimen; "" if it is."""
    if reading.end not in ("read", "refused"):
        return f"{reading.end} {reading.message}"
    if reading.end == "refused":
        expected = specimen.grey is None if specimen.refusal is None else specimen.refusal in reading.message
        return "" if expected and "\n" not in reading.message else f"refused: {reading.message}"
    if specimen.grey is None:
        return "" if specimen.refusal is None else "read"
    assert reading.grey is not None
    same = reading.grey.shape == specimen.grey.shape
    if same and np.abs(reading.grey - specimen.grey.astype(float)).max() <= specimen.tolerance:
        return ""
    return "read with other pixels"


def write_manifests(root: Path, specimens: Sequence[Specimen]) -> dict[str, int]:
    """Write two manifests of 36 phantoms and the specimens, and return the line of each path in manifest.csv.

    Specimens that a manifest may not list are in odd.csv.
    """
    phantoms = build_phantoms(root / "phantoms", images=36)
    with phantoms.open(encoding="utf-8") as file:
        good = [{"path": f"phantoms/{row['path']}", "label": row["label"]} for row in csv.DictReader(file)]
    for name, chosen in {"manifest.csv": True, "odd.csv": False}.items():
        rows = [{"path": f"zoo/{s.name}", "label": "covid"} for s in specimens if s.listable == chosen]
        with (root / name).open("w", encoding="utf-8", newline="", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, ["path", "label"])
            writer.writeheader()
            writer.writerows([*good, *rows])
    listed = [f"zoo/{specimen.name}" for specimen in specimens if specimen.listable]
    return {path: line for line, path in enumerate(listed, start=2 + len(good))}


def _commands(folder: Path, specimens: list[Specimen], readings: list[Reading]) -> list[str]:
    """Run train, audit and predict on the set, and return the faults in their behaviour or messages."""
    root = folder / "set"
    refused = {s.name for s, reading in zip(specimens, readings, strict=True) if reading.end == "refused"}
    lines = {path: n for path, n in write_manifests(root, specimens).items() if path.removeprefix("zoo/") in refused}
    odd = sum(not specimen.listable for specimen in specimens)
    data = ("data=manifest", f"data.path={root / 'manifest.csv'}")
    faults: list[str] = []
    for path, counted in {"manifest.csv": f"{len(lines)} images cannot be used", "odd.csv": f"{odd} faults"}.items():
        done = run("train", folder, "data=manifest", f"data.path={root / path}", *SMALL, *BRIEF)
        # libtiff may write to stderr, too.
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if done.returncode != 2 or len(errors) != 1 or counted not in errors[0] or "Traceback" in done.stderr:
            faults.append(f"train on {path}: exit code {done.returncode}, {done.stderr[-300:]}")

    done = run("train", folder, *data, *SMALL, *BRIEF, "data.on_bad_image=quarantine")
    if done.returncode:
        return [*faults, f"train with on_bad_image=quarantine: exit code {done.returncode}, {done.stderr[-300:]}"]
    (record,) = folder.glob("outputs/zoo/*/run.json")
    found = {row["path"]: row for row in read_json(record)["data"]["quarantined"]}
    for path in lines.keys() | found.keys():
        row = found.get(path)
        if row is None or row["line"] != lines.get(path) or not row["reason"]:
            faults.append(f"{path!r} in run.json: {row}, line {lines.get(path)}")

    done = run("audit", folder, *data, "baselines=false", "output=audit")
    if done.returncode not in (0, 1) or "Traceback" in done.stderr:
        faults.append(f"audit: exit code {done.returncode}, {done.stderr[-300:]}")
    faults += _predictions(folder, record.parent, specimens, refused)
    return faults


def _predictions(folder: Path, model: Path, specimens: list[Specimen], refused: set[str]) -> list[str]:
    """Run predict on the folder and return the faults: each file needs a row, and a reason if it was refused."""
    words = (f"model={model}", f"input={folder / 'set' / 'zoo'}", "threshold=argmax", "output=table.csv")
    done = run("predict", folder, *words)
    if done.returncode:
        return [f"predict: exit code {done.returncode}, {done.stderr[-300:]}"]
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["image_id"]: row for row in csv.DictReader(file)}
    faults = []
    for specimen in specimens:
        row = rows.get(os.fsencode(specimen.name).decode("utf-8", "backslashreplace"))
        explained = row is not None and row["decision"] == "undecided" and row["detail"] != ""
        if row is None or (specimen.name in refused and not explained):
            faults.append(f"{specimen.name!r} in predict's table: {row}")
    if len(rows) != len(specimens):
        faults.append(f"{len(rows)} rows in predict's table for {len(specimens)} files")
    return faults
