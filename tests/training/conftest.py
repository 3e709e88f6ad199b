"""What the tests of training share: one cache of phantoms, and folders that do not outlive their test."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where phantoms and stores are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run's folder, emptied afterwards: checkpoints are 80 MB each."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)
