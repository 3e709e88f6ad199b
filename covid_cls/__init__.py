"""Train, compare and explain transfer learning on chest radiographs. Research software, not a diagnostic device."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from covid_cls.bundle.model import Model

__version__ = "0.1.0"


def load(path: str | Path, device: str = "auto") -> "Model":
    """Load the model that a run wrote.

    Args:
        path: The run folder outputs/<experiment>/<run>, its folder `model`, or a copy of the latter.
        device: auto (a GPU if there is one), cpu, cuda or cuda:<number>.

    Returns:
        A model whose `predict` takes image files, PIL images or uint8 arrays.

    Raises:
        InputError: The folder holds no complete and undamaged model, or the device is not available.
    """
    # Imported here, so that `import covid_cls` does not import torch, which takes seconds.
    from covid_cls.bundle.model import load as load_model

    return load_model(path, device)
