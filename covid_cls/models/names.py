"""Short names of the loss and the strategy of a run, as run folders and reports show them; needs no torch."""

from collections.abc import Mapping
from typing import Any


def loss_label(loss: Mapping[str, Any]) -> str:
    """Return the name of a loss from its section of the configuration, e.g. "focal".

    Cross-entropy with class weights is "weighted_ce", as the option of conf/loss is called.
    """
    # Run folders carry this name, so cross-entropy whose weights were set to null must stay "ce".
    weighted = loss["name"] == "ce" and loss.get("class_weights") is not None
    return "weighted_ce" if weighted else str(loss["name"])


def strategy_label(strategy: Mapping[str, Any]) -> str:
    """Return the name of a strategy from its section of the configuration: "fc", "full", or "until_<stage>"."""
    stage = strategy["freeze_until"]
    return f"until_{stage}" if stage else str(strategy["name"])
