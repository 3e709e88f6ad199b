"""Fixtures of the training tests: a cache of their own."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for phantoms and image stores."""
    return tmp_path_factory.mktemp("cache")
