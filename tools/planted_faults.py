"""Plant faults in a copy of the package, one at a time, and see that the quick tier catches each: `make faults`.

`python -m tools.planted_faults [NUMBER ...]` prints a line per fault with the test that failed first, and exits with 1
if a fault was missed. The tests most likely to notice run first; only if they pass does the complete quick tier run.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """Replace `right` by `wrong` in a file of the package. first: tests to begin with."""

    name: str
    file: str
    right: str
    wrong: str
    first: str


FAULTS = (
    Fault(
        "focal gamma is ignored",
        "models/losses.py",
        "self.name, self.multilabel, self.gamma = name, multilabel, float(gamma)",
        "self.name, self.multilabel, self.gamma = name, multilabel, 0.0",
        "tests/models/test_losses.py",
    ),
    Fault(
        "class weights are reversed",
        "models/losses.py",
        'self.register_buffer("weights", None if weights is None else torch.tensor(weights), persistent=False)',
        'self.register_buffer("weights", None if weights is None else torch.tensor(weights[::-1]), persistent=False)',
        "tests/models/test_losses.py",
    ),
    Fault(
        "folds are drawn by image instead of by patient",
        "data/splits.py",
        'units = table["patient_id"] if group == "patient" else table["path"]',
        'units = table["path"]',
        "tests/data/test_splits.py",
    ),
    Fault(
        "validation and test are swapped",
        "data/datamodule.py",
        "        dataset = self.dataset(split, features)\n        return batch_loader(dataset, Ordered",
        '        dataset = self.dataset({"val": "test", "test": "val"}.get(split, split), features)\n'
        "        return batch_loader(dataset, Ordered",
        "tests/data/test_datamodule.py",
    ),
    Fault(
        "the bootstrap draws images instead of patients",
        "evaluation/resampling.py",
        "return np.asarray(pd.factorize(keys, sort=True)[0], dtype=np.int64)",
        "return np.arange(len(keys), dtype=np.int64)",
        "tests/evaluation/test_resampling.py tests/evaluation/test_intervals.py",
    ),
    Fault(
        "the temperature is inverted",
        "evaluation/calibration.py",
        "scaled = logit / temperature\n    return",
        "scaled = logit * temperature\n    return",
        "tests/evaluation/test_calibration.py",
    ),
    Fault(
        "MONOCHROME1 is not inverted",
        "data/dicom.py",
        'if image.PhotometricInterpretation == "MONOCHROME1" else shown',
        'if image.PhotometricInterpretation == "MONOCHROME0" else shown',
        "tests/data/test_dicom.py",
    ),
    Fault(
        "frozen batch norms stay in training mode",
        "models/backbones.py",
        "            stage.eval()\n        return self",
        "            stage.train(mode)\n        return self",
        "tests/models/test_backbones.py",
    ),
    Fault(
        "a checkpoint's checksum is not verified",
        "training/checkpoints.py",
        "if file.read() != _comment(digest.hexdigest()):",
        "if False:",
        "tests/training/test_checkpoints.py",
    ),
    Fault(
        "the positive class of the AUROC is flipped",
        "evaluation/metrics.py",
        "return float(sk.roc_auc_score(positive, score))",
        "return float(sk.roc_auc_score(1 - positive, score))",
        "tests/evaluation/test_metrics.py",
    ),
    Fault(
        "the search for near duplicates returns nothing",
        "audits/duplicates.py",
        "        if side >= SIDE:\n",
        "        if False:\n",
        "tests/audits/test_duplicates.py",
    ),
    Fault(
        "a resumed run starts its epoch order at 0",
        "data/datamodule.py",
        'self._next_epoch = int(state_dict["next_epoch"])',
        "self._next_epoch = 0",
        "tests/training/test_checkpoints.py tests/data/test_datamodule.py",
    ),
)


def caught_by(fault: Fault, copy: Path) -> str | None:
    """Plant the fault in the checkout `copy` and return the first test that fails, or None if none does."""
    file = copy / "covid_cls" / fault.file
    right = file.read_text(encoding="utf-8")
    if right.count(fault.right) != 1:
        sys.exit(f"{fault.file} has the text of the fault '{fault.name}' {right.count(fault.right)} times, not once")
    file.write_text(right.replace(fault.right, fault.wrong), encoding="utf-8")
    try:
        return _first_failure(copy, *fault.first.split(), "-n", "0") or _first_failure(copy)
    finally:
        file.write_text(right, encoding="utf-8")


def _first_failure(copy: Path, *arguments: str) -> str | None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    # Started in the copy, so that its package is imported and not the installed one.
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return found[1] if found else None


def main() -> int:
    """Plant the faults whose numbers are given, or all; return the exit code."""
    chosen = [FAULTS[int(word) - 1] for word in sys.argv[1:]] or list(FAULTS)
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*_cache", ".venv", ".git", "outputs", "*.egg-info"))
        for fault in chosen:
            test = caught_by(fault, copy)
            missed += test is None
            print(f"{fault.name}: {'MISSED' if test is None else test}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults were caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
