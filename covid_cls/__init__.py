"""Train, compare and explain transfer learning on chest radiographs. Research software, not a diagnostic device."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from covid_cls.artifact.model import Model

__version__ = "0.1.0"


def load(path: str | Path, device: str = "auto") -> "Model":
    """The model in a folder that a run wrote: outputs/<experiment>/<cell>/model. See `artifact.model.load`."""
    from covid_cls.artifact.model import load as load_model  # `import covid_cls` alone needs no torch

    return load_model(path, device)
