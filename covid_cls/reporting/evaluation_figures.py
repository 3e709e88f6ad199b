"""The pictures of one evaluation, drawn from `assessment.assess`'s record."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from covid_cls.evaluation.intervals import proportion_interval
from covid_cls.reporting.figures import CLASS_COLOURS, INK, canvas

_QUIET = "#8A8F98"
_AFTER, _BEFORE = CLASS_COLOURS["covid"], _QUIET
_DASHES = (0, (4, 3))


def reliability_curves(calibration: dict[str, Any]) -> Figure:
    """The share of covid images against their mean p(covid), in ten bins, before and after the temperature.

    calibration: of the record. Bars: 95 % by Wilson over a bin's images, of the last of the two alone.
    """
    figure, axes = canvas(4.6, 4.4)
    axes.plot([0, 1], [0, 1], color=_QUIET, linewidth=0.8, linestyle=_DASHES)
    after = calibration["after"]
    drawn = [("before", calibration["before"], _BEFORE if after else _AFTER)]
    drawn += [(f"after, T = {calibration['temperature']:.2f}", after, _AFTER)] if after else []
    for name, part, colour in drawn:
        bins = part["covid_reliability"]
        x, y = ([bin_[key] for bin_ in bins] for key in ("mean_prob", "share"))
        axes.plot(x, y, color=colour, linewidth=1.4, marker="o", markersize=4, label=name)
    ends = [proportion_interval(bin_["events"], bin_["n"]) for bin_ in bins]
    reach = [[i.value - i.low for i in ends], [i.high - i.value for i in ends]]
    axes.errorbar(x, y, yerr=reach, fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.6)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="p(covid), mean of a bin", ylabel="share that is covid")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def decision_curves(curve: dict[str, list[float | None]]) -> Figure:
    """Net benefit against the threshold of p(covid): of the model, of treating all, of treating none."""
    figure, axes = canvas(4.6, 3.9)
    cuts = np.array(curve["threshold"], dtype=np.float64)
    styles = {"treat_none": (INK, 0.8, "-"), "treat_all": (_QUIET, 1.4, _DASHES), "model": (_AFTER, 1.8, "-")}
    benefit = {name: np.array(curve[name], dtype=np.float64) for name in styles}  # None becomes nan
    for name, (colour, width, style) in styles.items():
        axes.plot(cuts, benefit[name], color=colour, linewidth=width, linestyle=style, label=name.replace("_", " "))
    most = np.nanmax([0.05, *benefit["model"], *benefit["treat_all"]])
    axes.set(xlim=(0, 1), ylim=(-0.3 * most, 1.08 * most), xlabel="threshold of p(covid)", ylabel="net benefit")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    return figure
