"""Colours that figures and pages share."""

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
CLASS_COLOURS = {"covid": "#D55E00", "normal": "#0072B2", "pneumonia": "#009E73"}
SPLIT_COLOURS = {"train": "#8A8F98", "val": "#0072B2"}
KIND_COLOURS = {"network": "#0072B2", "baseline": "#D55E00", "published": "#8A8F98"}
# On an HTML page, whatever a figure draws in INK takes the text colour of the page, light or dark.
INK = "#22262B"
QUIET = "#8A8F98"
# For text in a quiet tone: QUIET is too light to read on white.
QUIET_TEXT = "#5D646D"
WRONG = "#B3261E"
