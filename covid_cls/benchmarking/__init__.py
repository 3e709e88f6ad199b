"""Measure how fast a plain PyTorch loop and covid_cls train, and how the cost of a data set grows."""
