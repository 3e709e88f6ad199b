"""Insert faults into a copy of the package, one at a time; the quick tests must detect each of them: `make faults`.

`python -m tools.planted_faults [NUMBER ...]` prints a line per fault with the test that failed first, and exits with 1
if a fault was not detected. The tests most likely to notice run first; only if they pass, all quick tests run.
"""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """Code in one function that is replaced by faulty code.

    Code is compared as syntax tree, so that comments, docstrings and layout of the function can change.

    Attributes:
        name: The fault.
        file: Path in the package.
        function: Function in the file, or method as Class.method.
        right: Expression that occurs once in the function.
        wrong: Expression that replaces it.
        first: Tests that run first.
    """

    name: str
    file: str
    function: str
    right: str
    wrong: str
    first: str


FAULTS = (
    Fault(
        "focal gamma is ignored",
        "models/losses.py",
        "FocalLoss.__init__",
        "float(gamma)",
        "0.0",
        "tests/models/test_losses.py",
    ),
    Fault(
        "class weights are reversed",
        "models/losses.py",
        "Loss.__init__",
        "torch.tensor(weights)",
        "torch.tensor(weights[::-1])",
        "tests/models/test_losses.py",
    ),
    Fault(
        "folds are drawn by image instead of by patient",
        "data/splits.py",
        "assign_splits",
        'table["patient_id"] if group == "patient" else table["path"]',
        'table["path"]',
        "tests/data/test_splits.py",
    ),
    Fault(
        "validation and test are swapped",
        "data/datamodule.py",
        "Radiographs.ordered_loader",
        "self.dataset(split, features)",
        'self.dataset({"val": "test", "test": "val"}.get(split, split), features)',
        "tests/data/test_datamodule.py",
    ),
    Fault(
        "the bootstrap draws images instead of patients",
        "evaluation/intervals.py",
        "patient_codes",
        "pd.factorize(keys, sort=True)[0]",
        "np.arange(len(keys))",
        "tests/evaluation/test_intervals.py",
    ),
    Fault(
        "the temperature is inverted",
        "evaluation/calibration.py",
        "calibrated",
        "logit / temperature",
        "logit * temperature",
        "tests/evaluation/test_calibration.py",
    ),
    Fault(
        "MONOCHROME1 is not inverted",
        "data/dicom.py",
        "_grey",
        '255 - shown if image.PhotometricInterpretation == "MONOCHROME1" else shown',
        "shown",
        "tests/data/test_dicom.py",
    ),
    Fault(
        "frozen batch norms stay in training mode",
        "models/backbones.py",
        "Staged.train",
        "stage.eval()",
        "stage.train(mode)",
        "tests/models/test_backbones.py",
    ),
    Fault(
        "a checkpoint's checksum is not verified",
        "training/checkpoints.py",
        "_check_digest",
        "data[-_COMMENT_SIZE:] != _comment(sha256)",
        "False",
        "tests/training/test_checkpoints.py",
    ),
    Fault(
        "the positive class of the AUROC is flipped",
        "evaluation/metrics.py",
        "_auroc",
        "sk.roc_auc_score(positive, score)",
        "sk.roc_auc_score(1 - positive, score)",
        "tests/evaluation/test_metrics.py",
    ),
    Fault(
        "the search for near duplicates returns nothing",
        "shortcuts/duplicates.py",
        "find_pairs",
        "side >= SIDE",
        "False",
        "tests/shortcuts/test_duplicates.py",
    ),
    Fault(
        "a resumed run starts its epoch order at 0",
        "data/datamodule.py",
        "Radiographs.load_state_dict",
        'int(state_dict["next_epoch"])',
        "0",
        "tests/training/test_checkpoints.py tests/data/test_datamodule.py",
    ),
)


class Replacement(ast.NodeTransformer):
    """Replaces one expression by another wherever it occurs, and counts how often that is."""

    def __init__(self, right: str, wrong: str) -> None:
        self.right = ast.dump(ast.parse(right, mode="eval").body)
        self.wrong = ast.parse(wrong, mode="eval").body
        self.count = 0

    def visit(self, node: ast.AST) -> ast.AST:
        """Return the replacement of a matching node; visit the children of any other node."""
        if ast.dump(node) == self.right:
            self.count += 1
            return self.wrong
        return self.generic_visit(node)


def planted(fault: Fault, code: str) -> str:
    """Return the code of a file with the fault in it.

    Raises:
        SystemExit: The function does not exist, or does not contain the expression exactly once.
    """
    module = ast.parse(code)
    scope: ast.AST = module
    for name in fault.function.split("."):
        found = [node for node in ast.iter_child_nodes(scope) if getattr(node, "name", None) == name]
        if not found:
            sys.exit(f"{fault.file} has no function {fault.function}; correct the fault '{fault.name}'")
        scope = found[0]
    replacement = Replacement(fault.right, fault.wrong)
    replacement.visit(scope)
    if replacement.count != 1:
        sys.exit(f"{fault.file}: {fault.function} contains {fault.right!r} {replacement.count} times, not once")
    return ast.unparse(module)


def detected_by(fault: Fault, copy: Path) -> str | None:
    """Insert the fault into the checkout `copy` and return the first test that fails, or None if none does."""
    file = copy / "covid_cls" / fault.file
    right = file.read_text(encoding="utf-8")
    file.write_text(planted(fault, right), encoding="utf-8")
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
    """Insert the faults whose numbers are given, or all of them, and return the exit code."""
    chosen = [FAULTS[int(word) - 1] for word in sys.argv[1:]] or list(FAULTS)
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*_cache", ".venv", ".git", "outputs", "*.egg-info"))
        for fault in chosen:
            test = detected_by(fault, copy)
            missed += test is None
            print(f"{fault.name}: {'NOT DETECTED' if test is None else test}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults were detected")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
