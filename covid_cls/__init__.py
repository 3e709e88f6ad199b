"""Train, compare and explain transfer learning on chest radiographs. Research software, not a diagnostic device."""

__version__ = "0.1.0"
